//! JSON on disk.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, IoContext, Result};
use crate::sum::sha256_hex;

/// Reads and parses a file; errors name it.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).context("read", path)?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        path: path.into(),
        source,
    })
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
    let mut object: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: path.into(),
            source,
        })?;
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
