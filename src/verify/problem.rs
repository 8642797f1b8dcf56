//! Errors as findings: what cannot be read is what `verify` is there to find.

use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Summed};

/// One thing that is not as it should be.
#[derive(Debug, Clone, Serialize)]
pub struct Problem {
    pub file: String,
    pub tensor: Option<String>,
    pub expected: String,
    pub found: String,
}

/// Whether an error says that something of the directory is not as it should be, and not that it cannot be looked at.
pub fn tells_of_damage(error: &Error) -> bool {
    !matches!(
        error,
        Error::Io { .. } | Error::BaseNeeded { .. } | Error::DiskFull { .. }
    ) && !matches!(error, Error::NotAModel { missing, .. } if missing.starts_with("the directory"))
}

/// The error as a finding in `dir`.
pub fn as_problem(dir: &Path, error: &Error) -> Problem {
    let name = |path: &Path| path.strip_prefix(dir).unwrap_or(path).display().to_string();
    let (file, tensor, expected, found) = match error {
        Error::Header { path, reason } => (
            name(path),
            None,
            "a safetensors file".into(),
            reason.clone(),
        ),
        Error::Truncated {
            path,
            expected,
            found,
        } => (
            name(path),
            None,
            format!("{expected} bytes"),
            format!("{found} bytes"),
        ),
        Error::ShardMissing { index, file } => (
            file.clone(),
            None,
            format!("the file, as {} says", name(index)),
            "nothing".into(),
        ),
        Error::IndexedTensorMissing {
            index,
            tensor,
            file,
        } => (
            file.clone(),
            Some(tensor.clone()),
            format!("the tensor, as {} says", name(index)),
            "nothing".into(),
        ),
        Error::TensorNotIndexed { tensor, path } => (
            name(path),
            Some(tensor.clone()),
            "an index entry".into(),
            "none".into(),
        ),
        Error::TensorMissing { tensor, path } => (
            name(path),
            Some(tensor.clone()),
            "the tensor".into(),
            "nothing".into(),
        ),
        Error::Shape {
            tensor,
            path,
            expected,
            found,
        } => (
            name(path),
            Some(tensor.clone()),
            format!("{expected:?}"),
            format!("{found:?}"),
        ),
        Error::Dtype {
            tensor,
            path,
            expected,
            found,
        } => (
            name(path),
            Some(tensor.clone()),
            expected.clone(),
            found.clone(),
        ),
        Error::NotFinite {
            tensor,
            path,
            value,
            index,
        } => (
            name(path),
            Some(tensor.clone()),
            "finite numbers".into(),
            format!("{value} at {index:?}"),
        ),
        Error::Json { path, source } => (name(path), None, "valid JSON".into(), source.to_string()),
        Error::Checksum {
            what,
            path,
            expected,
            found,
        } => (
            name(path),
            match what {
                Summed::Tensor(name) => Some(name.clone()),
                Summed::Words(_) => None,
            },
            format!("sha256 {expected}"),
            format!("sha256 {found}"),
        ),
        Error::NotAModel { missing, .. } => {
            (missing.clone(), None, "the file".into(), "nothing".into())
        }
        Error::SvdSection { path, reason } => (
            name(path),
            None,
            "a valid `svd` section".into(),
            reason.clone(),
        ),
        Error::LinkOutside { path, target } => (
            name(path),
            None,
            "a file in this directory".into(),
            format!("a link to {}", target.display()),
        ),
        other => (
            String::new(),
            None,
            "a sound directory".into(),
            other.to_string(),
        ),
    };
    Problem {
        file,
        tensor,
        expected,
        found,
    }
}
