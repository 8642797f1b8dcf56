//! `report.json`: the facts of every run that led to a directory. Pages are rendered from it and compute nothing.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::Result;
use crate::json::{self, Tool};
use crate::lock;
use crate::weights::shard::write_atomically;
use crate::workspace::STATE_DIR;

/// The report's file name.
pub const FILE: &str = "report.json";

/// All sections of a directory's report; empty where there is none.
pub fn read(dir: &Path) -> Result<Map<String, Value>> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(Map::new());
    }
    match json::read(&path)? {
        Value::Object(mut sections) => {
            sections.remove(json::SEAL);
            Ok(sections)
        }
        _ => Ok(Map::new()),
    }
}

/// The sections that what is made from a directory carries on: the spectrum describes the tensors of the decomposition
/// alone, and takes more room than an adapter.
pub fn inherited(dir: &Path) -> Result<Map<String, Value>> {
    let mut sections = read(dir)?;
    sections.remove(crate::spectrum::SECTION);
    Ok(sections)
}

/// One section of a directory's report.
pub fn section<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<T> {
    let section = read(dir)?.remove(name).unwrap_or_default();
    json::interpret(&dir.join(FILE), section)
}

/// Writes `section` into a directory's report, after the sections it `inherits`.
///
/// Evaluations gather: those inherited stay beside those made here, a repeated one takes the place of the earlier.
pub fn add(
    dir: &Path,
    inherits: Map<String, Value>,
    section: &str,
    facts: &impl Serialize,
) -> Result<()> {
    // another process may add to the same report
    let state = dir.join(STATE_DIR);
    let held = state
        .is_dir()
        .then(|| lock::hold(&state.join("report.lock")));
    let _held = held.transpose()?;
    let mut sections = inherits;
    for (name, facts) in read(dir)? {
        match (sections.get_mut(&name), facts) {
            (Some(Value::Array(gathered)), Value::Array(own)) => {
                let new = own.into_iter().filter(|e| !gathered.contains(e));
                let new: Vec<Value> = new.collect();
                gathered.extend(new);
            }
            (_, facts) => {
                sections.insert(name, facts);
            }
        }
    }
    let facts = serde_json::to_value(facts).expect("facts serialise");
    let tool = serde_json::to_value(Tool::this()).expect("a tool serialises");
    sections.insert("tool".into(), tool);
    match (sections.get_mut(section), facts) {
        (Some(Value::Array(gathered)), Value::Array(new)) => {
            let same = |a: &Value, b: &Value| {
                let mut keys = ["subject", "data", "length", "loss_on"].into_iter();
                // earlier builds kept no sum of the text
                let (one, other) = (&a["data_sha256"], &b["data_sha256"]);
                keys.all(|key| a[key] == b[key])
                    && (one == other || one.is_null() || other.is_null())
            };
            gathered.retain(|old| !new.iter().any(|n| same(old, n)));
            gathered.extend(new);
        }
        (_, facts) => {
            sections.insert(section.into(), facts);
        }
    }
    write_atomically(&dir.join(FILE), &json::seal(sections)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_many_add_at_once_is_all_there() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let dir = dir.path();
        std::fs::create_dir(dir.join(STATE_DIR)).expect("creates");
        std::thread::scope(|scope| {
            for data in 0..8 {
                scope.spawn(move || {
                    let entry = json!([{"subject": "base", "data": data, "length": 1}]);
                    add(dir, Map::new(), "evaluate", &entry).expect("adds");
                });
            }
        });
        let found = read(dir).expect("reads");
        assert_eq!(
            found["evaluate"].as_array().map(Vec::len),
            Some(8),
            "{found:?}"
        );
    }
}
