//! The Hub: the only place that speaks HTTP. hf-hub makes repositories, branches and tags, and lists refs; hf-xet carries chunks
//! of large files; our own thin layer does the rest, because hf-hub 1.0.0 stores error pages as weights, accepts truncated
//! files, sends large files inline, and drops their sha256 from listings.

mod cache;
mod client;
mod dataset;
mod download;
mod lfs;
mod listing;
mod local;
mod oidc;
mod outlet;
mod refusal;
mod remote;
mod sender;
pub mod server;
mod upload;
mod xet;

pub use cache::Snapshot;
pub use client::{Hub, HubOptions, PUBLIC_HUB, Token};
pub use dataset::DataRef;
pub use download::Downloaded;
pub use local::published_files;
pub use oidc::{Identity, Login};
pub use outlet::HubOutlet;
pub use upload::{Claims, PushOptions, Pushed};

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::format::is_repo_id;

/// How a model, a decomposition or an adapter is named: a directory, or a repository at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    Directory(PathBuf),
    Repo { id: String, revision: String },
}

impl FromStr for ModelRef {
    type Err = Error;

    /// An existing directory wins; `org/name` or `org/name@revision` is a repository; anything else must be a path.
    fn from_str(text: &str) -> Result<Self> {
        let path = PathBuf::from(text);
        if path.is_dir() || text.starts_with(['.', '/', '~']) {
            return Ok(Self::Directory(path));
        }
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        // a revision becomes a file below the cache's `refs`; git knows none of these either
        let leads_out = revision
            .split('/')
            .any(|part| matches!(part, "" | "." | ".."));
        if is_repo_id(id) && !leads_out {
            Ok(Self::Repo {
                id: id.into(),
                revision: revision.into(),
            })
        } else {
            Err(Error::Parse {
                what: "a model",
                value: text.into(),
                reason: "it is neither a directory that exists nor of the form org/name or org/name@revision"
                    .into(),
            })
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(out, "{}", path.display()),
            Self::Repo { id, revision } if revision == "main" => out.write_str(id),
            Self::Repo { id, revision } => write!(out, "{id}@{revision}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_by_directory_or_repository() {
        let here = env!("CARGO_MANIFEST_DIR");
        assert_eq!(
            here.parse::<ModelRef>().expect("a directory"),
            ModelRef::Directory(here.into())
        );
        assert_eq!(
            "a/b@v1".parse::<ModelRef>().expect("a repo"),
            ModelRef::Repo {
                id: "a/b".into(),
                revision: "v1".into()
            }
        );
        assert_eq!(
            "a/b".parse::<ModelRef>().expect("a repo").to_string(),
            "a/b"
        );
        assert_eq!(
            "./missing".parse::<ModelRef>().expect("a path"),
            ModelRef::Directory("./missing".into())
        );
        for bad in [
            "",
            "a",
            "a/b/c",
            "a/..",
            "a/b@",
            "a b/c",
            "a/b@../../x",
            "a/b@/x",
        ] {
            assert!(bad.parse::<ModelRef>().is_err(), "{bad}");
        }
    }
}
