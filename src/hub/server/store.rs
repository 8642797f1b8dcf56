//! What the Hub remembers: every repository a folder of small JSON files, every content once under its sha256.
//!
//! ```text
//! models/<owner>/<name>/repo.json             branches, tags, pull requests, who may see it; replaced last
//!                      /commits/<sha>.json    parent, title, message, date, and the whole tree
//! objects/<xx>/<sha256>                       contents, shared by all repositories
//!             <sha256>.xet                    the name of the content in the store of chunks, where it is there too
//! parts/<sha256>/<number>                     of uploads in parts, until the whole is put together; removed at the start
//! xet/                                        the store of chunks, see `xet`
//! incoming/                                   uploads under way; what a killed Hub left here is removed at the start
//! ```
//! Nothing is kept in memory: every answer is read from the folder, so a folder of repositories can be stopped,
//! copied and served again. One Hub at a time writes to a folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::discuss::Discussion;
use super::repo::{
    Change, Commit, Draft, Entry, EntryKind, INLINE_BYTES_MAX, Refused, Repo, RepoId, RepoKind, To,
    check_folders, check_path, git_id, is_hex, lfs_pointer, now,
};
use crate::sum::hex;

/// What a new repository sends to LFS.
const LFS_PATTERNS: [&str; 9] = [
    "*.bin",
    "*.gguf",
    "*.npz",
    "*.onnx",
    "*.parquet",
    "*.pt",
    "*.pth",
    "*.safetensors",
    "*tfevents*",
];

/// A folder of repositories.
pub struct Store {
    root: PathBuf,
    /// Held while refs are read, changed and replaced: two commits on one branch must not lose one of them.
    writing: Mutex<()>,
    temporaries: AtomicU64,
}

impl Store {
    /// Opens a folder that another store left, or begins one where nothing is.
    ///
    /// # Errors
    /// The folder holds what is not ours: what is left over is removed here, and nobody else's files with it.
    pub fn open(root: &Path) -> io::Result<Store> {
        let incoming = root.join("incoming");
        // every store has had one from its first moment on
        let is_ours = incoming.is_dir();
        if !is_ours && fs::read_dir(root).is_ok_and(|mut found| found.next().is_some()) {
            let reason =
                "it holds files that no Hub of svdhub's wrote: name an empty folder, or a new one";
            return Err(io::Error::new(io::ErrorKind::DirectoryNotEmpty, reason));
        }
        fs::create_dir_all(&incoming)?;
        fs::create_dir_all(root.join("objects"))?;
        let parts = root.join("parts");
        let left_over = fs::read_dir(&parts).into_iter().flatten();
        for object in left_over {
            let object = object?;
            if is_sha256(&object.file_name().to_string_lossy()) {
                fs::remove_dir_all(object.path())?;
            }
        }
        for left_over in fs::read_dir(&incoming)? {
            fs::remove_file(left_over?.path())?;
        }
        Ok(Store {
            root: root.to_owned(),
            writing: Mutex::new(()),
            temporaries: AtomicU64::new(0),
        })
    }

    /// Makes a repository whose `main` holds one commit with a `.gitattributes`.
    pub fn create(&self, id: &RepoId, private: bool) -> Result<(), Refused> {
        let _writing = self.lock();
        if self.folder(id).join("repo.json").exists() {
            return Err(Refused::RepoExists(id.clone()));
        }
        fs::create_dir_all(self.folder(id).join("commits"))?;
        let attributes = |pattern| format!("{pattern} filter=lfs diff=lfs merge=lfs -text\n");
        let attributes: String = LFS_PATTERNS.map(attributes).concat();
        let draft = Draft {
            title: "initial commit".to_owned(),
            changes: vec![Change {
                path: ".gitattributes".to_owned(),
                to: To::Content(attributes.into_bytes()),
            }],
            ..Draft::default()
        };
        let first = self.write_commit(id, None, draft)?;
        let mut repo = Repo {
            created: now(),
            private,
            ..Repo::default()
        };
        repo.branches.insert("main".to_owned(), first);
        self.write_repo(id, &repo)
    }

    /// Forgets a repository; its contents stay, other repositories may share them.
    pub fn delete(&self, id: &RepoId) -> Result<(), Refused> {
        let _writing = self.lock();
        // Without repo.json it is no repository any more, whatever is still there when we are killed.
        fs::remove_file(self.folder(id).join("repo.json")).map_err(missing(Refused::NoRepo))?;
        Ok(fs::remove_dir_all(self.folder(id))?)
    }

    /// Gives a repository another name.
    pub fn rename(&self, from: &RepoId, to: &RepoId) -> Result<(), Refused> {
        let _writing = self.lock();
        if self.folder(to).join("repo.json").exists() {
            return Err(Refused::RepoExists(to.clone()));
        }
        let target = self.folder(to);
        let owner = target
            .parent()
            .expect("a repository lies in its owner's folder");
        fs::create_dir_all(owner)?;
        rename_durably(&self.folder(from), &target).map_err(missing(Refused::NoRepo))
    }

    /// Every repository of a kind, in order.
    pub fn repos(&self, kind: RepoKind) -> Result<Vec<RepoId>, Refused> {
        let mut found = Vec::new();
        let names = |folder: &Path| -> io::Result<Vec<String>> {
            let entries = match fs::read_dir(folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(error),
            };
            let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().into_string().ok());
            let names: io::Result<Vec<Option<String>>> = entries.map(name).collect();
            Ok(names?.into_iter().flatten().collect())
        };
        let folder = self.root.join(kind.plural());
        for owner in names(&folder)? {
            let ids = names(&folder.join(&owner))?;
            found.extend(
                ids.iter()
                    .filter_map(|name| RepoId::new(kind, &owner, name)),
            );
        }
        found.retain(|id| self.folder(id).join("repo.json").exists());
        found.sort_by_key(RepoId::to_string);
        Ok(found)
    }

    pub fn repo(&self, id: &RepoId) -> Result<Repo, Refused> {
        read_json(&self.folder(id).join("repo.json")).map_err(missing(Refused::NoRepo))
    }

    /// Changes what `repo.json` holds, all of it or nothing.
    pub fn change<F>(&self, id: &RepoId, change: F) -> Result<Repo, Refused>
    where
        F: FnOnce(&mut Repo) -> Result<(), Refused>,
    {
        let _writing = self.lock();
        let mut repo = self.repo(id)?;
        change(&mut repo)?;
        self.write_repo(id, &repo)?;
        Ok(repo)
    }

    /// The commit that a branch, a tag, a pull request or a commit id names.
    pub fn commit_at(&self, id: &RepoId, revision: &str) -> Result<Commit, Refused> {
        let named = self.repo(id)?.resolve(revision);
        let unknown = Refused::NoRevision(revision.to_owned());
        self.read_commit(id, named.as_deref().unwrap_or(revision))
            .map_err(missing(unknown))
    }

    /// The commits from `revision` back to the first one.
    pub fn history(&self, id: &RepoId, revision: &str) -> Result<Vec<Commit>, Refused> {
        let mut commits = vec![self.commit_at(id, revision)?];
        while let Some(parent) = commits.last().and_then(|commit| commit.parent.clone()) {
            commits.push(self.read_commit(id, &parent)?);
        }
        Ok(commits)
    }

    /// Adds a commit to a branch or pull request and says its id.
    pub fn commit(&self, id: &RepoId, revision: &str, draft: Draft) -> Result<String, Refused> {
        let mut made = String::new();
        self.change(id, |repo| {
            let head = repo.head_mut(revision)?;
            made = self.write_commit(id, Some(head), draft)?;
            head.clone_from(&made);
            Ok(())
        })?;
        Ok(made)
    }

    /// Opens a pull request with one commit on top of `revision`, told by `discussion` from that commit's parent.
    ///
    /// Says the commit's id and the number.
    pub fn open_pull_request(
        &self,
        id: &RepoId,
        revision: &str,
        draft: Draft,
        discussion: impl FnOnce(String) -> Discussion,
    ) -> Result<(String, usize), Refused> {
        let (mut made, mut number) = (String::new(), 0);
        self.change(id, |repo| {
            let unknown = || Refused::NoRevision(revision.to_owned());
            let head = repo.resolve(revision).ok_or_else(unknown)?;
            made = self.write_commit(id, Some(&head), draft)?;
            number = repo.discuss(discussion(head));
            let name = format!("refs/pr/{number}");
            repo.pull_requests.insert(name, made.clone());
            Ok(())
        })?;
        Ok((made, number))
    }

    /// Where the content with this sha256 lies, and its size, if the Hub has it.
    pub fn object(&self, sha256: &str) -> Option<(PathBuf, u64)> {
        let path = self.object_path(sha256)?;
        let size = fs::metadata(&path).ok()?.len();
        Some((path, size))
    }

    /// The name of a content in the store of chunks, if it came through that.
    pub fn xet_hash(&self, sha256: &str) -> Option<String> {
        fs::read_to_string(self.xet_path(sha256)?).ok()
    }

    /// Keeps the name of a content in the store of chunks.
    pub fn remember_xet_hash(&self, sha256: &str, hash: &str) -> io::Result<()> {
        let path = self.xet_path(sha256);
        self.write(&path.expect("it names a content"), hash.as_bytes())
    }

    fn xet_path(&self, sha256: &str) -> Option<PathBuf> {
        Some(self.object_path(sha256)?.with_extension("xet"))
    }

    /// The folder of the store of chunks.
    pub fn xet_folder(&self) -> PathBuf {
        self.root.join("xet")
    }

    /// Where the content of a file lies, and its size.
    pub fn content(&self, entry: &Entry) -> Result<(PathBuf, u64), Refused> {
        let lost = || Refused::Lost(entry.sha256.clone());
        self.object(&entry.sha256).ok_or_else(lost)
    }

    /// Begins to receive a content of any size.
    pub fn receive(&self) -> io::Result<Incoming<'_>> {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        let path = self.root.join("incoming").join(name);
        let file = File::create(&path)?;
        let digest = Sha256::new();
        Ok(Incoming {
            store: self,
            path,
            file,
            digest,
        })
    }

    /// Puts an object together from parts that have arrived, each told by its number and sha256.
    pub fn join_parts(&self, sha256: &str, parts: &[(usize, String)]) -> Result<(), Refused> {
        if self.object(sha256).is_some() {
            return Ok(());
        }
        let mut whole = self.receive()?;
        for (number, expected) in parts {
            let lost = || Refused::NoPart(*number);
            let path = self.part_path(sha256, *number).ok_or_else(lost)?;
            let mut part = File::open(path).map_err(missing(lost()))?;
            let mut digest = Sha256::new();
            let mut buffer = vec![0; 1 << 20];
            loop {
                let n = part.read(&mut buffer)?;
                if n == 0 {
                    break;
                }
                digest.update(&buffer[..n]);
                whole.write(&buffer[..n])?;
            }
            if hex(&digest.finalize()) != *expected {
                return Err(lost());
            }
        }
        whole.finish(Some(sha256))?;
        if let Some(folder) = self.part_path(sha256, 0).as_deref().and_then(Path::parent) {
            fs::remove_dir_all(folder)?;
        }
        Ok(())
    }

    fn part_path(&self, sha256: &str, number: usize) -> Option<PathBuf> {
        let folder = is_sha256(sha256).then(|| self.root.join("parts").join(sha256))?;
        Some(folder.join(number.to_string()))
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The lock guards files, which are whole at every moment: a panic elsewhere spoils nothing.
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn folder(&self, id: &RepoId) -> PathBuf {
        self.root.join(id.folder())
    }

    fn object_path(&self, sha256: &str) -> Option<PathBuf> {
        is_sha256(sha256).then(|| self.root.join("objects").join(&sha256[..2]).join(sha256))
    }

    fn commit_path(&self, id: &RepoId, commit: &str) -> PathBuf {
        self.folder(id)
            .join("commits")
            .join(format!("{commit}.json"))
    }

    fn read_commit(&self, id: &RepoId, commit: &str) -> io::Result<Commit> {
        if !is_hex(commit) {
            return Err(io::ErrorKind::NotFound.into());
        }
        read_json(&self.commit_path(id, commit))
    }

    fn write_commit(
        &self,
        id: &RepoId,
        parent: Option<&str>,
        draft: Draft,
    ) -> Result<String, Refused> {
        if draft.parent.is_some() && draft.parent.as_deref() != parent {
            return Err(Refused::Stale);
        }
        let mut tree = match parent {
            Some(parent) => self.read_commit(id, parent)?.tree,
            None => BTreeMap::new(),
        };
        for change in draft.changes {
            self.apply(&mut tree, change)?;
        }
        check_folders(&tree)?;
        let mut commit = Commit {
            id: String::new(),
            parent: parent.map(str::to_owned),
            title: draft.title,
            message: draft.message,
            date: now(),
            tree,
        };
        commit.id = git_id(
            "commit",
            &serde_json::to_vec(&commit).map_err(io::Error::from)?,
        );
        self.write_json(&self.commit_path(id, &commit.id), &commit)?;
        Ok(commit.id)
    }

    fn apply(&self, tree: &mut BTreeMap<String, Entry>, change: Change) -> Result<(), Refused> {
        let path = change.path;
        let entry = match change.to {
            To::Content(content) => {
                let size = content.len() as u64;
                if size > INLINE_BYTES_MAX {
                    return Err(Refused::TooLarge { path, bytes: size });
                }
                let mut incoming = self.receive()?;
                incoming.write(&content)?;
                let (kind, oid) = (EntryKind::Regular, git_id("blob", &content));
                let sha256 = incoming.finish(None)?;
                Entry {
                    kind,
                    oid,
                    sha256,
                    size,
                }
            }
            To::Lfs(sha256, expected) => {
                let found = self.object(&sha256).map(|(_, size)| size);
                let fits = |size: &u64| expected.is_none_or(|expected| expected == *size);
                let Some(size) = found.filter(fits) else {
                    return Err(Refused::NoObject { path, sha256 });
                };
                let oid = git_id("blob", lfs_pointer(&sha256, size).as_bytes());
                let kind = EntryKind::Lfs;
                Entry {
                    kind,
                    oid,
                    sha256,
                    size,
                }
            }
            To::NoFile => {
                return tree.remove(&path).map(drop).ok_or(Refused::NoFile(path));
            }
            To::NoFolder => {
                let (before, prefix) = (tree.len(), format!("{}/", path.trim_end_matches('/')));
                tree.retain(|path, _| !path.starts_with(&prefix));
                let found = tree.len() < before;
                return found.then_some(()).ok_or(Refused::NoFile(path));
            }
        };
        check_path(&path)?;
        tree.insert(path, entry);
        Ok(())
    }

    fn write_repo(&self, id: &RepoId, repo: &Repo) -> Result<(), Refused> {
        Ok(self.write_json(&self.folder(id).join("repo.json"), repo)?)
    }

    fn write_json(&self, path: &Path, value: &impl Serialize) -> io::Result<()> {
        self.write(path, &serde_json::to_vec(value)?)
    }

    /// Sibling temporary file, fsync, rename: a reader sees the old file or the new one.
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        rename_durably(&temporary, path)
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && is_hex(text)
}

/// A content on its way in: hashed while it is written, kept only when it is whole.
pub struct Incoming<'a> {
    store: &'a Store,
    path: PathBuf,
    file: File,
    digest: Sha256,
}

impl Incoming<'_> {
    pub fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.digest.update(chunk);
        self.file.write_all(chunk)
    }

    /// Checks the sha256, puts the content among the objects and says its sha256.
    pub fn finish(self, expected: Option<&str>) -> Result<String, Refused> {
        let found = hex(&self.digest.clone().finalize());
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            let expected = expected.to_owned();
            return Err(Refused::Digest { expected, found });
        }
        let path = self.store.object_path(&found);
        let path = path.expect("our own digest is 64 hex digits");
        if self.store.object(&found).is_none() {
            fs::create_dir_all(path.parent().expect("an object path ends in <xx>/<sha256>"))?;
            self.file.sync_all()?;
            rename_durably(&self.path, &path)?;
        }
        Ok(found)
    }
}

impl Incoming<'_> {
    /// Keeps the content as one part of an object until all have come, and says the part's sha256.
    pub fn finish_part(self, sha256: &str, number: usize) -> Result<String, Refused> {
        let found = hex(&self.digest.clone().finalize());
        let path = self.store.part_path(sha256, number);
        let path = path.ok_or(Refused::NoPart(number))?;
        fs::create_dir_all(path.parent().expect("a part lies in its object's folder"))?;
        fs::rename(&self.path, &path)?;
        Ok(found)
    }
}

impl Drop for Incoming<'_> {
    fn drop(&mut self) {
        // After a rename there is nothing left to remove, and a file that stays is removed at the next start.
        let _ = fs::remove_file(&self.path);
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// A missing file has a meaning; every other failure of the disk is just that.
fn missing(meaning: Refused) -> impl FnOnce(io::Error) -> Refused {
    |error| match error.kind() {
        io::ErrorKind::NotFound => meaning,
        _ => Refused::Disk(error),
    }
}

fn rename_durably(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    // Only now does the new name survive a power cut. Windows cannot open a folder, and needs no such thing.
    #[cfg(unix)]
    if let Some(folder) = to.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::discuss::Status;
    use super::super::repo::add_ref;
    use super::*;

    fn id() -> RepoId {
        RepoId::new(RepoKind::Model, "ada", "engine").unwrap()
    }

    fn draft(path: &str, to: To) -> Draft {
        let (path, mut draft) = (path.to_owned(), Draft::default());
        draft.changes.push(Change { path, to });
        draft
    }

    fn adding(path: &str, content: &[u8]) -> Draft {
        draft(path, To::Content(content.to_vec()))
    }

    fn store_with_repo() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.create(&id(), false).unwrap();
        (folder, store)
    }

    fn incoming_is_empty(folder: &tempfile::TempDir) -> bool {
        let mut incoming = fs::read_dir(folder.path().join("incoming")).unwrap();
        incoming.next().is_none()
    }

    #[test]
    fn state_survives_a_restart() {
        let (folder, store) = store_with_repo();
        let made = store
            .commit(&id(), "main", adding("a/b", b"hello\n"))
            .unwrap();
        let tag = |repo: &mut Repo| add_ref(&mut repo.tags, "v1", made.clone());
        store.change(&id(), tag).unwrap();
        let told = |base| Discussion::new("c", "", Status::Open, Some(base));
        let (opened, number) = store
            .open_pull_request(&id(), "main", adding("c", b"c"), told)
            .unwrap();
        assert_eq!(number, 1);
        let before = store.repo(&id()).unwrap();
        drop(store);
        fs::write(folder.path().join("incoming/killed"), b"half of a file").unwrap();

        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.repo(&id()).unwrap(), before);
        assert_eq!(store.commit_at(&id(), "v1").unwrap().id, made);
        assert_eq!(store.commit_at(&id(), "refs/pr/1").unwrap().id, opened);
        let main = store.commit_at(&id(), "main").unwrap();
        let (path, _) = store.content(&main.tree["a/b"]).unwrap();
        assert_eq!(fs::read(path).unwrap(), b"hello\n");
        assert!(incoming_is_empty(&folder));
    }

    #[test]
    fn stale_parent_is_refused_and_changes_nothing() {
        let (_folder, store) = store_with_repo();
        let first = store.commit_at(&id(), "main").unwrap().id;
        store.commit(&id(), "main", adding("a", b"1")).unwrap();
        let before = store.repo(&id()).unwrap();
        let mut late = adding("a", b"2");
        late.parent = Some(first);
        let refused = store.commit(&id(), "main", late);
        assert!(matches!(refused, Err(Refused::Stale)));
        assert_eq!(store.repo(&id()).unwrap(), before);
    }

    #[test]
    fn content_with_another_sha256_is_thrown_away() {
        let (folder, store) = store_with_repo();
        let mut incoming = store.receive().unwrap();
        incoming.write(b"not what was promised").unwrap();
        let sha256 = hex(&Sha256::digest(b"what was promised"));
        let refused = incoming.finish(Some(&sha256));
        assert!(matches!(refused, Err(Refused::Digest { .. })));
        assert!(store.object(&sha256).is_none());
        assert!(incoming_is_empty(&folder));
        let pointer = draft("w.bin", To::Lfs(sha256, None));
        let refused = store.commit(&id(), "main", pointer);
        assert!(matches!(refused, Err(Refused::NoObject { .. })));
    }

    #[test]
    fn paths_that_leave_the_folder_are_refused() {
        let (_folder, store) = store_with_repo();
        let paths = "|/etc/x|../x|a/../x|./x|a//b|a/|a\\b|a\0b|.git/config";
        for path in paths.split('|') {
            let refused = store.commit(&id(), "main", adding(path, b"x"));
            assert!(matches!(refused, Err(Refused::Path(_))), "{path:?}");
        }
        store.commit(&id(), "main", adding("a", b"x")).unwrap();
        let both = store.commit(&id(), "main", adding("a/b", b"x"));
        assert!(matches!(both, Err(Refused::FileAndFolder(_))));
        for name in ["..", "a..b", ".hidden", "a/b", "", "x.git"] {
            assert_eq!(RepoId::new(RepoKind::Model, "ada", name), None, "{name:?}");
        }
    }

    #[test]
    fn deleting_takes_the_named_file_or_the_whole_folder() {
        let (_folder, store) = store_with_repo();
        for path in ["x/1", "x/2/3", "xy", "y"] {
            store
                .commit(&id(), "main", adding(path, b"content"))
                .unwrap();
        }
        let mut delete = draft("x", To::NoFolder);
        delete.changes.extend(draft("y", To::NoFile).changes);
        store.commit(&id(), "main", delete.clone()).unwrap();
        let tree = store.commit_at(&id(), "main").unwrap().tree;
        assert_eq!(tree.keys().collect::<Vec<_>>(), [".gitattributes", "xy"]);
        let again = store.commit(&id(), "main", delete);
        assert!(matches!(again, Err(Refused::NoFile(_))));
    }
}
