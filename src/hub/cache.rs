//! The cache on this machine's disk, which Python's huggingface_hub shares, and what lies in it of a commit.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::client::is_dataset;
use super::listing::{RemoteFile, stays_inside};
use crate::base::travels;
use crate::error::{Error, IoContext, Result};
use crate::kind::SINGLE_FILES;
use crate::lock;
use crate::sum::hex;
use crate::weights::Layout;
use crate::weights::checkpoint::Index;
use crate::weights::shard::write_atomically;

/// A repository at one commit, on this machine's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub dir: PathBuf,
    /// Hub id, if it came from one.
    pub repo: Option<String>,
    /// 40 hex digits.
    pub commit: Option<String>,
}

/// sha256 of an LFS file, git's blob id of a regular one.
pub(super) fn digest(path: &Path, lfs: bool) -> Result<String> {
    if lfs {
        return crate::sum::sha256_file(path, |_| {});
    }
    let mut opened = File::open(path).context("open", path)?;
    let length = opened.metadata().context("read", path)?.len();
    let mut hash = Sha1::new_with_prefix(format!("blob {length}\0"));
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        // a listing may call any file a regular one: it need not fit into memory
        let n = opened.read(&mut buffer).context("read", path)?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

/// Where a folder keeps what downloads into it leave.
pub(super) const STATE: &str = ".cache/svdhub";

/// What there begins with this is of that file.
fn name_in_state(file: &str) -> String {
    crate::sum::sha256_hex(file.as_bytes())[..16].into()
}

/// Where a download goes, and what it uses on its way.
pub(super) struct Place {
    pub lock: PathBuf,
    pub partial: PathBuf,
    pub target: PathBuf,
    /// The target's name is its hash: nothing else can be there.
    named_by_hash: bool,
}

impl Place {
    pub fn in_folder(dir: &Path, file: &RemoteFile) -> Self {
        assert!(stays_inside(&file.path), "a hostile name has no place");
        let state = dir.join(STATE);
        // a beginning of other contents is no beginning of these
        let name = format!("{}-{}", name_in_state(&file.path), file.oid);
        Self {
            lock: state.join(format!("{name}.lock")),
            partial: state.join(format!("{name}.incomplete")),
            target: dir.join(&file.path),
            named_by_hash: false,
        }
    }

    /// Refuses a file that lies where this one would, unless some download brought it just so: one that changed since may be
    /// somebody's work.
    pub fn refuse_foreign(dir: &Path, file: &RemoteFile) -> Result<()> {
        let path = dir.join(&file.path);
        if path.symlink_metadata().is_err() {
            return Ok(());
        }
        let name = name_in_state(&file.path);
        let found = [digest(&path, false)?, digest(&path, true)?];
        let state = std::fs::read_dir(dir.join(STATE)).into_iter().flatten();
        let is_ours = state.flatten().any(|entry| {
            let entry = entry.file_name();
            let rest = entry.to_str().and_then(|entry| entry.strip_prefix(&name));
            let sum = rest.and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".lock"));
            sum.is_some_and(|sum| found.iter().any(|found| found == sum))
        });
        match is_ours {
            true => Ok(()),
            false => Err(Error::ForeignFile { path }),
        }
    }

    pub fn is_filled(&self, file: &RemoteFile) -> Result<bool> {
        if self.named_by_hash {
            return Ok(self.target.exists());
        }
        let size = std::fs::metadata(&self.target).map(|found| found.len());
        Ok(size.is_ok_and(|size| size == file.size) && digest(&self.target, file.lfs)? == file.oid)
    }
}

/// The bytes that [`open_partial`] would find.
pub(super) fn begun(partial: &Path, size: u64) -> u64 {
    let received = std::fs::metadata(partial).map_or(0, |found| found.len());
    if received <= size { received } else { 0 }
}

/// A file that transfers append to, and its bytes so far; one that is longer than it may become begins anew.
pub(super) fn open_partial(partial: &Path, size: u64) -> Result<(File, u64)> {
    let out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(partial)
        .context("open", partial)?;
    let received = out.metadata().context("read", partial)?.len();
    if received <= size {
        return Ok((out, received));
    }
    out.set_len(0).context("write", partial)?;
    Ok((out, 0))
}

/// Of a repository's files, those that some verb reads.
pub(super) fn needed(mut files: Vec<RemoteFile>, weights: &[String]) -> Vec<RemoteFile> {
    files.retain(|file| is_read(&file.path, file.size, weights));
    files
}

/// Whether some verb reads a file: one of the `weights`, or what is small and lies at the top.
fn is_read(path: &str, bytes: u64, weights: &[String]) -> bool {
    let index = path.ends_with(".safetensors.index.json");
    let named = weights.iter().any(|name| name == path);
    !path.contains('/') && (named || index || travels(path, bytes))
}

/// One repository's part of the cache, laid out as huggingface_hub does.
pub(super) struct Cache {
    pub root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub fn of(cache: &Path, repo: &str) -> Self {
        let kind = if is_dataset(repo) { "" } else { "models--" };
        let name = format!("{kind}{}", repo.replace('/', "--"));
        Self {
            root: cache.join(&name),
            locks: cache.join(".locks").join(&name),
        }
    }

    pub fn blob(&self, oid: &str) -> PathBuf {
        self.root.join("blobs").join(oid)
    }

    pub fn place(&self, oid: &str) -> Place {
        let blob = self.blob(oid);
        Place {
            lock: self.locks.join(format!("{oid}.lock")),
            partial: blob.with_extension("incomplete"),
            target: blob,
            named_by_hash: true,
        }
    }

    /// Where huggingface_hub 2 keeps the listing of a commit, and looks for it.
    fn listing_path(&self, commit: &str) -> PathBuf {
        self.root.join("trees").join(format!("{commit}.json"))
    }

    /// Held while names are given: another process may bring the same repository at the same moment.
    fn lock(&self) -> Result<File> {
        let path = self.locks.join("svdhub.lock");
        std::fs::create_dir_all(&self.locks).context("create", &self.locks)?;
        lock::hold(&path)
    }

    /// Keeps the listing of a commit: offline, it tells what is missing. A cache that is shared read-only does without.
    pub fn list(&self, commit: &str, files: &[RemoteFile]) -> Result<()> {
        use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        match self.write_listing(commit, files) {
            Err(Error::Io { source, .. })
                if matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem) =>
            {
                Ok(())
            }
            written => written,
        }
    }

    fn write_listing(&self, commit: &str, files: &[RemoteFile]) -> Result<()> {
        let path = self.listing_path(commit);
        if path.exists() {
            return Ok(());
        }
        let _held = self.lock()?;
        let entry = |file: &RemoteFile| {
            let mut entry = json!({"size": file.size, "blob_id": file.blob_id});
            if file.lfs {
                entry["lfs_sha256"] = json!(file.oid);
                entry["lfs_size"] = json!(file.size);
            }
            if let Some(hash) = &file.xet_hash {
                entry["xet_hash"] = json!(hash);
            }
            (file.path.clone(), entry)
        };
        // what is never fetched is never missing
        let files = files.iter().filter(|file| stays_inside(&file.path));
        let files: serde_json::Map<_, _> = files.map(entry).collect();
        let listing = json!({"format_version": 1, "files": files});
        let folder = path.parent().expect("a listing lies in a folder");
        std::fs::create_dir_all(folder).context("create", folder)?;
        write_atomically(&path, listing.to_string().as_bytes()).map(drop)
    }

    /// The paths of a revision's files, where its listing was kept.
    pub fn paths(&self, revision: &str) -> Option<Vec<String>> {
        let listed = self.listed(&self.commit(revision))?;
        Some(listed.into_iter().map(|(path, _)| path).collect())
    }

    /// The commit that a revision named when it was fetched last; a commit names itself.
    fn commit(&self, revision: &str) -> String {
        let named = std::fs::read_to_string(self.root.join("refs").join(revision));
        named.map_or_else(|_| revision.into(), |named| named.trim().into())
    }

    /// The paths of a commit's files and their bytes, where its listing was kept.
    fn listed(&self, commit: &str) -> Option<Vec<(String, u64)>> {
        let text = std::fs::read(self.listing_path(commit)).ok()?;
        let listing: Value = serde_json::from_slice(&text).ok()?;
        let files = listing["files"].as_object()?;
        let bytes = |entry: &Value| entry["size"].as_u64().unwrap_or_default();
        Some(
            (files.iter())
                .map(|(path, entry)| (path.clone(), bytes(entry)))
                .collect(),
        )
    }

    /// Links the files of a commit to their contents.
    pub fn link(&self, commit: &str, files: &[RemoteFile]) -> Result<PathBuf> {
        let dir = self.root.join("snapshots").join(commit);
        let ends = |file: &RemoteFile| {
            assert!(stays_inside(&file.path), "a hostile name has no place");
            let up = "../".repeat(file.path.matches('/').count());
            let target = PathBuf::from(format!("{up}../../blobs")).join(&file.oid);
            (dir.join(&file.path), target)
        };
        let is_there = |(link, target): &(PathBuf, PathBuf)| {
            std::fs::read_link(link).is_ok_and(|found| found == *target)
        };
        if dir.is_dir() && files.iter().map(ends).all(|ends| is_there(&ends)) {
            return Ok(dir);
        }
        let _held = self.lock()?;
        std::fs::create_dir_all(&dir).context("create", &dir)?;
        for file in files {
            let (link, target) = ends(file);
            // another process may have made it while we waited
            if is_there(&(link.clone(), target.clone())) {
                continue;
            }
            let folder = link.parent().expect("a link lies in a folder");
            std::fs::create_dir_all(folder).context("create", folder)?;
            let name = link.file_name().expect("a link has a name");
            let temporary = folder.join(format!(".{}.link", name.display()));
            let _ = std::fs::remove_file(&temporary);
            std::os::unix::fs::symlink(&target, &temporary).context("link", &temporary)?;
            std::fs::rename(&temporary, &link).context("rename", &link)?;
        }
        Ok(dir)
    }

    pub fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.root.join("refs").join(revision);
        if std::fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        let folder = path.parent().expect("a ref lies in a folder");
        let _held = self.lock()?;
        std::fs::create_dir_all(folder).context("create", folder)?;
        write_atomically(&path, commit.as_bytes()).map(drop)
    }

    /// A commit as it lies in the cache, if nothing of it is missing: of these names, or of what verbs read.
    pub fn kept(&self, repo: &str, revision: &str, names: Option<&[&str]>) -> Result<Snapshot> {
        let commit = self.commit(revision);
        let dir = self.root.join("snapshots").join(&commit);
        if !dir.is_dir() {
            return Err(Error::Offline { repo: repo.into() });
        }
        let listed = self.listed(&commit);
        let wanted = match (names, listed) {
            (Some(names), Some(listed)) => {
                let paths = listed.into_iter().map(|(path, _)| path);
                paths
                    .filter(|path| names.contains(&path.as_str()))
                    .collect()
            }
            (Some(_), None) => Vec::new(),
            (None, listed) => self.needed(&dir, listed)?,
        };
        let missing: Vec<String> = wanted
            .into_iter()
            .filter(|path| !dir.join(path).is_file())
            .collect();
        if !missing.is_empty() {
            return Err(Error::NotAllCached {
                repo: repo.into(),
                missing,
            });
        }
        Ok(Snapshot {
            dir,
            repo: Some(repo.into()),
            commit: Some(commit),
        })
    }

    /// What verbs read of a snapshot, by its listing; without one, what lies there and what its indices name.
    fn needed(&self, dir: &Path, listed: Option<Vec<(String, u64)>>) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir).context("list", dir)? {
            let name = entry.context("list", dir)?.file_name();
            let bytes = std::fs::metadata(dir.join(&name)).map_or(0, |found| found.len());
            found.extend(name.into_string().map(|name| (name, bytes)));
        }
        let mut shards = Vec::new();
        let mut weights = SINGLE_FILES.map(String::from).to_vec();
        for layout in [Layout::Model, Layout::Decomposition] {
            weights.push(layout.single_file());
            let index = dir.join(layout.index_file());
            if let Ok(bytes) = std::fs::read(&index) {
                shards.extend(Index::parse(&index, &bytes)?.files());
            }
        }
        let mut wanted = listed.unwrap_or(found);
        wanted.retain(|(path, bytes)| is_read(path, *bytes, &weights));
        Ok(wanted
            .into_iter()
            .map(|(path, _)| path)
            .chain(shards)
            .collect())
    }
}

/// What identifies the contents of a file.
pub(super) struct Digests {
    pub size: u64,
    pub sha256: String,
    /// The id git gives them, of a file that is no larger than asked.
    pub blob_id: Option<String>,
}

/// Reads a file once, for all that identifies it.
pub(super) fn digests(path: &Path, blob_bytes_max: u64) -> Result<Digests> {
    let mut file = File::open(path).context("open", path)?;
    let told = file.metadata().context("read", path)?.len();
    let mut blob =
        (told <= blob_bytes_max).then(|| Sha1::new_with_prefix(format!("blob {told}\0")));
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer).context("read", path)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        if let Some(blob) = &mut blob {
            blob.update(&buffer[..n]);
        }
        size += n as u64;
    }
    Ok(Digests {
        size,
        sha256: hex(&hash.finalize()),
        blob_id: blob.map(|blob| hex(&blob.finalize())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_reading_gives_gits_id_and_the_sha256() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("hello");
        std::fs::write(&path, "hello\n").expect("writes");
        // sha256sum, and git hash-object
        let found = digests(&path, 6).expect("reads");
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!((found.size, found.sha256.as_str()), (6, sha256));
        let blob = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(found.blob_id.as_deref(), Some(blob));
        assert_eq!(digests(&path, 5).expect("reads").blob_id, None);
    }

    #[test]
    fn only_what_a_verb_reads_is_fetched() {
        let file = |path: &&str| RemoteFile {
            path: path.to_string(),
            size: if path.starts_with("large") {
                100_000_001
            } else {
                1
            },
            oid: String::new(),
            blob_id: String::new(),
            xet_hash: None,
            lfs: false,
        };
        let all = [
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "onnx/config.json",
            "consolidated.safetensors",
            "odd-00001.safetensors",
            "logo.png",
            "large.parquet",
            "chat_template.jinja",
        ];
        let weights = [
            "model.safetensors".to_string(),
            "odd-00001.safetensors".into(),
        ];
        let kept: Vec<String> = needed(all.iter().map(file).collect(), &weights)
            .into_iter()
            .map(|f| f.path)
            .collect();
        assert_eq!(
            kept,
            [
                "config.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "odd-00001.safetensors",
                "chat_template.jinja"
            ]
        );
    }
}
