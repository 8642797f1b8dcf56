//! What a repository is made of: names, refs, commits and trees, the changes between them, and their ids.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};

use super::discuss::Discussion;
use crate::sum::hex;

/// The largest file that may travel inside a commit; the public Hub asks for LFS above it.
pub const INLINE_BYTES_MAX: u64 = 10_000_000;

/// The two kinds of repository that this Hub knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    Model,
    Dataset,
}

/// A repository's kind and its `owner/name`, both safe as folder names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    pub kind: RepoKind,
    owner: String,
    name: String,
}

/// What `repo.json` holds: the names of commits, and who may see them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repo {
    pub created: String,
    pub private: bool,
    /// `None`: the files are open to everybody who sees the repository.
    pub gated: Option<Gate>,
    pub branches: BTreeMap<String, String>,
    pub tags: BTreeMap<String, String>,
    /// Keys are whole ref names, `refs/pr/1`.
    pub pull_requests: BTreeMap<String, String>,
    #[serde(default)]
    pub discussions: BTreeMap<usize, Discussion>,
}

/// How access to a gated repository is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gate {
    Auto,
    Manual,
}

/// One commit with its whole tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    pub id: String,
    pub parent: Option<String>,
    pub title: String,
    pub message: String,
    pub date: String,
    pub tree: BTreeMap<String, Entry>,
}

/// A file in a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub kind: EntryKind,
    /// The id of the git blob: of the file itself, or of the pointer file that stands for an LFS object.
    pub oid: String,
    pub sha256: String,
    pub size: u64,
}

/// Whether git holds the file itself or a pointer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    Regular,
    Lfs,
}

/// What a commit does to one path.
#[derive(Clone, Debug)]
pub struct Change {
    pub path: String,
    pub to: To,
}

/// What is at a path afterwards.
#[derive(Clone, Debug)]
pub enum To {
    Content(Vec<u8>),
    /// The sha256 of an object that the Hub has, and the size it should have.
    Lfs(String, Option<u64>),
    NoFile,
    NoFolder,
}

/// A commit as a client asks for it.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    pub title: String,
    pub message: String,
    /// The head that the client saw; another head refuses the commit.
    pub parent: Option<String>,
    pub changes: Vec<Change>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("Repository not found")]
    NoRepo,
    #[error("You already created this repo: {0}")]
    RepoExists(RepoId),
    #[error("Invalid rev id: {0}")]
    NoRevision(String),
    #[error("Reference already exists: {0}")]
    RefExists(String),
    #[error("Invalid reference name: {0:?}")]
    RefName(String),
    #[error("A commit has happened since. Please refresh and try again.")]
    Stale,
    /// The first words are what the Python client looks for.
    #[error("A file with this name doesn't exist: {0}")]
    NoFile(String),
    #[error("Invalid path in repo: {0:?}")]
    Path(String),
    #[error("{0} would be a file and a folder at once")]
    FileAndFolder(String),
    #[error("{path} has {bytes} bytes: files larger than 10 MB must be uploaded with LFS")]
    TooLarge { path: String, bytes: u64 },
    #[error("LFS pointer of {path}: no object {sha256} of that size")]
    NoObject { path: String, sha256: String },
    #[error("part {0} of the object did not arrive, or another in its place")]
    NoPart(usize),
    #[error("the content has the sha256 {found}, not {expected}")]
    Digest { expected: String, found: String },
    #[error("the content {0} is missing in the folder of the Hub")]
    Lost(String),
    #[error("the folder of the Hub cannot be read or written")]
    Disk(#[from] io::Error),
    #[error("the store of chunks fails")]
    Cas(#[from] xet_client::ClientError),
}

impl RepoKind {
    pub fn singular(self) -> &'static str {
        match self {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        }
    }

    pub fn plural(self) -> &'static str {
        match self {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        }
    }

    /// What stands before `owner/name` in addresses that are not part of the API.
    pub fn prefix(self) -> &'static str {
        match self {
            RepoKind::Model => "",
            RepoKind::Dataset => "datasets/",
        }
    }
}

impl RepoId {
    /// `None` when owner or name cannot name a repository, and so cannot name a folder either.
    pub fn new(kind: RepoKind, owner: &str, name: &str) -> Option<RepoId> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let valid = |part: &str| {
            let bad = part.starts_with(['.', '-']) || part.ends_with(".git") || part.contains("..");
            (1..=96).contains(&part.len()) && !bad && part.bytes().all(allowed)
        };
        let (owner, name) = (owner.to_owned(), name.to_owned());
        (valid(&owner) && valid(&name)).then_some(RepoId { kind, owner, name })
    }

    /// `models/<owner>/<name>`.
    pub fn folder(&self) -> PathBuf {
        [self.kind.plural(), &self.owner, &self.name]
            .iter()
            .collect()
    }

    /// `owner/name`, or `datasets/owner/name`.
    pub fn full_name(&self) -> String {
        format!("{}{self}", self.kind.prefix())
    }

    pub fn owner(&self) -> &str {
        &self.owner
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

impl Repo {
    /// The id behind a branch, a tag or a pull request.
    pub fn resolve(&self, name: &str) -> Option<String> {
        let branch = self
            .branches
            .get(name.strip_prefix("refs/heads/").unwrap_or(name));
        let tag = || {
            self.tags
                .get(name.strip_prefix("refs/tags/").unwrap_or(name))
        };
        branch
            .or_else(tag)
            .or_else(|| self.pull_requests.get(name))
            .cloned()
    }

    /// Adds a discussion and says its number; those of pull requests are counted with it.
    pub fn discuss(&mut self, discussion: Discussion) -> usize {
        let of_ref = |name: &String| name.rsplit('/').next()?.parse().ok();
        let numbers = self.pull_requests.keys().filter_map(of_ref);
        let last = numbers.chain(self.discussions.keys().copied()).max();
        let number = last.unwrap_or(0) + 1;
        self.discussions.insert(number, discussion);
        number
    }

    /// The Hub says `false` where nothing is gated.
    pub fn gated_json(&self) -> Value {
        self.gated.map_or(Value::Bool(false), |gate| json!(gate))
    }

    /// What a commit may move: a branch or a pull request, but no tag.
    pub fn head_mut(&mut self, name: &str) -> Result<&mut String, Refused> {
        let branch = name.strip_prefix("refs/heads/").unwrap_or(name);
        let head = self.branches.get_mut(branch);
        let head = head.or_else(|| self.pull_requests.get_mut(name));
        head.ok_or_else(|| Refused::NoRevision(name.to_owned()))
    }
}

impl Commit {
    /// What a later commit makes of the paths in which it differs: a file, or none.
    pub fn changed(&self, later: &Commit) -> BTreeMap<String, Option<Entry>> {
        let paths = self.tree.keys().chain(later.tree.keys());
        let differs = |path: &&String| self.tree.get(*path) != later.tree.get(*path);
        let to = |path: &String| (path.clone(), later.tree.get(path).cloned());
        paths.filter(differs).map(to).collect()
    }

    /// Every folder of the tree with an id that changes with its contents; `""` is the root.
    pub fn folders(&self) -> BTreeMap<&str, String> {
        let mut contents: BTreeMap<&str, String> = BTreeMap::from([("", String::new())]);
        for (path, entry) in &self.tree {
            let parents = path.match_indices('/').map(|(end, _)| &path[..end]);
            for folder in parents.chain([""]) {
                *contents.entry(folder).or_default() += &format!("{path} {}\n", entry.oid);
            }
        }
        contents
            .into_iter()
            .map(|(folder, text)| (folder, git_id("tree", text.as_bytes())))
            .collect()
    }
}

impl Entry {
    /// The size of the pointer file that git holds for an LFS object.
    pub fn pointer_bytes(&self) -> usize {
        lfs_pointer(&self.sha256, self.size).len()
    }
}

/// The id git gives to an object: the sha1 of its kind, its length and its bytes.
pub fn git_id(kind: &str, content: &[u8]) -> String {
    let mut digest = Sha1::new();
    digest.update(format!("{kind} {}\0", content.len()));
    digest.update(content);
    hex(&digest.finalize())
}

pub fn is_hex(text: &str) -> bool {
    let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    !text.is_empty() && text.bytes().all(digit)
}

pub fn lfs_pointer(sha256: &str, size: u64) -> String {
    format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n")
}

/// A path that leads out of a folder on some reader's disk never enters a tree.
pub fn check_path(path: &str) -> Result<(), Refused> {
    let bad_segment = |segment: &str| matches!(segment, "" | "." | ".." | ".git");
    if path.contains(['\\', '\0']) || path.split('/').any(bad_segment) {
        return Err(Refused::Path(path.to_owned()));
    }
    Ok(())
}

pub fn check_folders(tree: &BTreeMap<String, Entry>) -> Result<(), Refused> {
    for path in tree.keys() {
        let mut folders = path.match_indices('/').map(|(end, _)| &path[..end]);
        if let Some(folder) = folders.find(|folder| tree.contains_key(*folder)) {
            return Err(Refused::FileAndFolder(folder.to_owned()));
        }
    }
    Ok(())
}

/// Adds a branch or a tag.
pub fn add_ref(refs: &mut BTreeMap<String, String>, name: &str, id: String) -> Result<(), Refused> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-/+".contains(&b);
    let looks_like_a_commit = name.len() == 40 && is_hex(name);
    let reserved = looks_like_a_commit || name.starts_with("refs/");
    if reserved || check_path(name).is_err() || !name.bytes().all(allowed) {
        return Err(Refused::RefName(name.to_owned()));
    }
    if refs.contains_key(name) {
        return Err(Refused::RefExists(name.to_owned()));
    }
    refs.insert(name.to_owned(), id);
    Ok(())
}

/// Removes a branch or a tag.
pub fn remove_ref(refs: &mut BTreeMap<String, String>, name: &str) -> Result<(), Refused> {
    let unknown = || Refused::NoRevision(name.to_owned());
    refs.remove(name).map(drop).ok_or_else(unknown)
}

/// The moment of a commit, `2026-11-23T10:20:30.000Z`.
pub fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    utc(since.map_or(0, |since| since.as_secs()))
}

/// Seconds since 1970 in words, by Howard Hinnant's days-to-civil algorithm.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // months since March
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = (shifted + 2) % 12 + 1;
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.000Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_ids_are_those_of_git() {
        // `git hash-object --stdin`, and `git hash-object -t tree` of nothing.
        let blob = |content| git_id("blob", content);
        assert_eq!(blob(b""), "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391");
        assert_eq!(blob(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
        let tree = git_id("tree", b"");
        assert_eq!(tree, "4b825dc642cb6eb9a060e54bf8d69288fbee4904");
        assert_eq!(utc(1_709_210_096), "2024-02-29T12:34:56.000Z");
    }
}
