//! JSON on disk.

use std::collections::HashSet;
use std::path::Path;

use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, IoContext, Result};
use crate::sum::sha256_hex;

/// Reads and parses a file; errors name it.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse(path, &std::fs::read(path).context("read", path)?)
}

/// Parses bytes that came from `path`. An object that names a key twice is refused: readers differ in which they believe.
pub fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    refuse_repeated_keys(bytes)
        .and_then(|()| serde_json::from_slice(bytes))
        .map_err(|source| Error::Json {
            path: path.into(),
            source,
        })
}

/// Refuses JSON in which an object, at any depth, names a key twice.
pub fn refuse_repeated_keys(bytes: &[u8]) -> serde_json::Result<()> {
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    Distinct::deserialize(&mut parser).map(|Distinct| ())
}

/// Any JSON whose objects name each key once; nothing of it is kept.
struct Distinct;

impl<'de> Deserialize<'de> for Distinct {
    fn deserialize<D: Deserializer<'de>>(parser: D) -> std::result::Result<Self, D::Error> {
        parser.deserialize_any(Distinct)
    }
}

impl<'de> Visitor<'de> for Distinct {
    type Value = Self;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self, A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            map.next_value::<Self>()?;
            if let Some(key) = seen.replace(key) {
                return Err(A::Error::custom(format!("it names `{key}` twice")));
            }
        }
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Self, A::Error> {
        while list.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> std::result::Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> std::result::Result<Self, E> {
        Ok(self)
    }
}

/// Interprets parsed JSON that came from `path`.
pub fn interpret<T: DeserializeOwned>(path: &Path, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|source| Error::Json {
        path: path.into(),
        source,
    })
}

/// The key under which an object of ours keeps the sha256 of itself without this key.
pub const SEAL: &str = "sha256";

/// An object as we write it, with a sum of itself: what changes it later shows.
pub fn seal(mut object: Map<String, Value>) -> Vec<u8> {
    object.remove(SEAL);
    let sum = sum(&object);
    object.insert(SEAL.into(), sum.into());
    pretty(&object)
}

/// The sum that the sealed file at `path` states, and the one it has. `None` if it states none.
pub fn seal_of(path: &Path) -> Result<Option<(String, String)>> {
    let bytes = std::fs::read(path).context("read", path)?;
    let mut object: Map<String, Value> = parse(path, &bytes)?;
    let Some(stated) = object.get(SEAL).and_then(Value::as_str).map(String::from) else {
        return Ok(None);
    };
    // another form of the same values is not what was written either
    let found = if seal(object.clone()) == bytes {
        stated.clone()
    } else {
        object.remove(SEAL);
        match sum(&object) {
            sum if sum == stated => "the same values in another form".into(),
            sum => sum,
        }
    };
    Ok(Some((stated, found)))
}

fn sum(object: &Map<String, Value>) -> String {
    sha256_hex(&pretty(object))
}

fn pretty(object: &Map<String, Value>) -> Vec<u8> {
    serde_json::to_vec_pretty(object).expect("a JSON value serialises")
}

/// The program that wrote a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    pub name: String,
    pub version: String,
}

impl Tool {
    pub fn this() -> Self {
        Self {
            name: env!("CARGO_PKG_NAME").into(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_is_named_twice_is_refused_at_any_depth() {
        let sound =
            br#"{"a": [{"b": 1, "c": null}, {"b": -1}], "b": {"a": 1.5, "c": "a"}, "c": true}"#;
        assert!(parse::<Value>(Path::new("x.json"), sound).is_ok());
        for (twice, key) in [
            (r#"{"a": 1, "a": 1}"#, "`a`"),
            (r#"{"a": [{"b": 1}, {"c": {"d": 1, "\u0064": 2}}]}"#, "`d`"),
        ] {
            let error = parse::<Value>(Path::new("x.json"), twice.as_bytes()).expect_err("twice");
            let Error::Json { path, source } = error else {
                panic!("{error:?}");
            };
            assert_eq!(path, Path::new("x.json"));
            assert!(source.to_string().contains(key), "{source}");
        }
        let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        assert!(parse::<Value>(Path::new("x.json"), &deep).is_err());
    }
}
