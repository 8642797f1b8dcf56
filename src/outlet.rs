//! Where finished weight files go while the rest of a model is still being made, so that no disk has to hold all of it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::contents::Contents;
use crate::error::Result;
use crate::json;
use crate::weights::shard::write_atomically;
use crate::workspace::{STATE_DIR, Workspace};

/// A file whose bytes are final. Its name may not be yet.
#[derive(Debug, Clone)]
pub struct Finished {
    pub name: String,
    pub bytes: u64,
    pub sha256: String,
}

/// What takes finished files.
pub trait Outlet: Sync {
    /// Takes a file; whoever made it may remove it then. One that is there already costs nothing.
    fn take(&self, file: &Finished, contents: &dyn Contents) -> Result<()>;

    /// Whether a file that was taken is still there.
    fn holds(&self, file: &Finished) -> Result<bool>;

    /// Whether files stay here all the same.
    fn keeps(&self) -> bool;

    /// Bytes that what is on its way may take here. Less than the least that the work needs is a refusal.
    fn room(&self) -> Option<u64>;

    /// Where that is: another place makes another job.
    fn place(&self) -> String;
}

/// The files of a directory that are not in it, because an outlet has taken them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Away {
    pub files: BTreeMap<String, AwayFile>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AwayFile {
    pub bytes: u64,
    pub sha256: String,
}

const FILE: &str = "away.json";

impl Away {
    /// What is away from a directory: nothing, of most.
    pub fn of(dir: &Path) -> Result<Self> {
        let path = dir.join(STATE_DIR).join(FILE);
        match path.exists() {
            true => json::read(&path),
            false => Ok(Self::default()),
        }
    }

    pub fn add(&mut self, name: &str, bytes: u64, sha256: &str) {
        let file = AwayFile {
            bytes,
            sha256: sha256.into(),
        };
        self.files.insert(name.into(), file);
    }

    /// Notes in a directory what is away from it.
    pub fn save(&self, workspace: &Workspace) -> Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        let json = serde_json::to_vec_pretty(self).expect("a list serialises");
        write_atomically(&workspace.state(FILE), &json).map(drop)
    }
}
