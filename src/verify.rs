//! `verify`: reads a directory again, byte by byte, and says what is not as it should be.

mod decomposition;
mod export;
mod model;
mod problem;
mod sums;

use std::path::Path;

use serde::Serialize;

use crate::adapter::{self, Adapter};
use crate::base::Base;
use crate::error::Result;
use crate::event::Observer;
use crate::kind::Kind;
use crate::weights::Inventory;
use crate::{linalg, report};
use decomposition::decomposition;
use export::export;
use model::model;
pub use problem::Problem;
use problem::{as_problem, tells_of_damage};
use sums::{check_card, check_seal, compare_sum};

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Facts {
    pub ok: bool,
    /// `decomposition`, `adapter`, `model`, `lora` or `state-dict`
    pub kind: &'static str,
    pub files: usize,
    pub tensors: usize,
    pub bytes: u64,
    /// What was compared, in words.
    pub checks: Vec<String>,
    pub problems: Vec<Problem>,
}

impl Facts {
    fn count(&mut self, inventory: &Inventory) {
        self.files = inventory.files.len();
        self.tensors = inventory.entries().count();
        self.bytes = inventory.files.iter().map(|f| f.header.file_bytes()).sum();
    }

    fn problem(
        &mut self,
        file: &str,
        tensor: Option<&str>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) {
        self.problems.push(Problem {
            file: file.into(),
            tensor: tensor.map(str::to_string),
            expected: expected.into(),
            found: found.into(),
        });
    }
}

/// Verifies whatever `dir` holds; a model is also held against `against`.
///
/// Damage is an answer, not an error: it comes back in [`Facts::problems`].
pub fn run(dir: &Path, against: Option<&Base>, observer: &dyn Observer) -> Result<Facts> {
    linalg::single_threaded_blas();
    let kind = Kind::of(dir);
    let mut facts = Facts {
        kind: kind.name(),
        ..Facts::default()
    };
    let looked = match kind {
        Kind::Decomposition => decomposition(dir, against, observer, &mut facts),
        Kind::Adapter => adapter(dir, &mut facts),
        Kind::Model => model(dir, against, observer, &mut facts),
        Kind::Lora | Kind::StateDict => export(kind, dir, observer, &mut facts),
    };
    let looked = looked.and_then(|()| check_card(dir, &mut facts));
    let compared = matches!(kind, Kind::Decomposition | Kind::Model);
    if against.is_some() && !compared {
        let check = format!(
            "not compared with the base: that is for models, not for {}s",
            kind.name()
        );
        facts.checks.push(check);
    }
    match looked {
        Ok(()) => {}
        // a file that cannot be understood is what verify is there to find
        Err(error) if tells_of_damage(&error) => {
            facts.problems.push(as_problem(dir, &error));
        }
        Err(error) => return Err(error),
    }
    facts.ok = facts.problems.is_empty();
    Ok(facts)
}

fn adapter(dir: &Path, facts: &mut Facts) -> Result<()> {
    let adapter = Adapter::read(dir)?;
    facts.files = 1;
    facts.tensors = adapter.len();
    let path = dir.join(adapter::WEIGHTS_FILE);
    facts.bytes = std::fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
    facts
        .checks
        .push("header, config and finite numbers".into());
    let sealed = adapter.config.schema >= 2;
    check_seal(dir, report::FILE, sealed, facts)?;
    check_seal(dir, adapter::CONFIG_FILE, sealed, facts)?;
    // schema 1 left it to the report
    let mut reported = report::read(dir)?.remove("train").unwrap_or_default();
    let reported = reported["adapter_sha256"].take();
    let stated = adapter.config.weights_sha256.clone();
    if let Some(expected) = stated.or(reported.as_str().map(String::from)) {
        let found = adapter.sha256()?;
        facts.checks.push("sha256 of the weights".into());
        if found != expected {
            let damaged = adapter.damaged_tensors()?;
            for tensor in &damaged {
                compare_sum(
                    adapter::WEIGHTS_FILE,
                    Some(tensor),
                    &expected,
                    &found,
                    facts,
                );
            }
            if damaged.is_empty() {
                compare_sum(adapter::WEIGHTS_FILE, None, &expected, &found, facts);
            }
        }
    }
    Ok(())
}
