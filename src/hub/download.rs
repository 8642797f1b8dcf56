//! Files from the Hub into the cache that Python's huggingface_hub shares, verified before they get their name.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::header::RANGE;
use reqwest::{Method, StatusCode};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::client::{Asked, Hub, RemoteFile, segment, segments};
use crate::base::is_weights_or_media;
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::json;
use crate::weights::checkpoint::{Checkpoint, Index, Storage, WeightFile};
use crate::weights::header::HEADER_BYTES_MAX;
use crate::weights::{Header, Inventory, Layout};
use crate::workers;
use crate::workspace::check_free_space;

/// A repository at one commit, on this machine's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub dir: PathBuf,
    /// Hub id, if it came from one.
    pub repo: Option<String>,
    /// 40 hex digits.
    pub commit: Option<String>,
}

/// Weights of one commit that are read where they are.
#[derive(Debug)]
struct RemoteWeights {
    hub: Arc<Hub>,
    repo: String,
    commit: String,
}

impl Storage for RemoteWeights {
    fn read_at(&self, file: &str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset + buffer.len() as u64;
        let bytes = self
            .hub
            .range(&self.repo, &self.commit, file, offset, end)?;
        buffer.copy_from_slice(&bytes);
        Ok(())
    }
}

const PARALLEL_DOWNLOADS: usize = 4;
/// A broken-off transfer goes on from where it stopped, this many times.
const RESUMPTIONS: usize = 5;

impl Hub {
    /// Downloads what a model, decomposition or adapter needs; what is in the cache already is not sent again.
    pub fn snapshot(
        &self,
        repo: &str,
        revision: &str,
        observer: &dyn Observer,
    ) -> Result<Snapshot> {
        self.bring(repo, revision, observer, |commit, listed| {
            let weights = self.weight_files(repo, commit, &listed)?;
            Ok(needed(listed, &weights))
        })
    }

    /// Downloads the files of these names, as far as the repository has them; [`Hub::snapshot`] can add the others later.
    pub fn snapshot_of(
        &self,
        repo: &str,
        revision: &str,
        names: &[&str],
        observer: &dyn Observer,
    ) -> Result<Snapshot> {
        self.bring(repo, revision, observer, |_, mut listed| {
            listed.retain(|file| names.contains(&file.path.as_str()));
            Ok(listed)
        })
    }

    /// Brings those files of a commit into the cache that `choose` picks from its listing.
    fn bring(
        &self,
        repo: &str,
        revision: &str,
        observer: &dyn Observer,
        choose: impl FnOnce(&str, Vec<RemoteFile>) -> Result<Vec<RemoteFile>>,
    ) -> Result<Snapshot> {
        let cache = Cache::of(&self.options.cache, repo);
        if self.options.offline {
            return cache.offline(repo, revision);
        }
        let commit = self.commit_of(repo, revision)?;
        let files = choose(&commit, self.files(repo, &commit)?)?;
        let missing: Vec<RemoteFile> = files
            .iter()
            .filter(|file| !cache.blob(&file.oid).exists())
            .cloned()
            .collect();
        let sizes = missing.iter().map(|file| file.size);
        let bytes = sizes.fold(0, u64::saturating_add);
        if !missing.is_empty() {
            check_free_space(&cache.root, bytes)?;
            observer.start(Stage::Download, bytes, Unit::Bytes);
            workers::for_each(&missing, PARALLEL_DOWNLOADS, |file| {
                self.fetch(repo, &commit, file, &cache, observer)
            })?;
            observer.finish(Stage::Download);
        }
        let dir = cache.link(&commit, &files)?;
        if revision != commit {
            cache.remember(revision, &commit)?;
        }
        Ok(Snapshot {
            dir,
            repo: Some(repo.into()),
            commit: Some(commit),
        })
    }

    /// The weight files of whatever the repository holds: single files, and what the indices name.
    fn weight_files(&self, repo: &str, commit: &str, files: &[RemoteFile]) -> Result<Vec<String>> {
        let mut weights = vec![crate::adapter::WEIGHTS_FILE.to_string()];
        for layout in [Layout::Model, Layout::Decomposition] {
            let named = |name: &str| files.iter().find(|f| f.path == name);
            let index_file = layout.index_file();
            if named(&layout.single_file()).is_some() {
                weights.push(layout.single_file());
            } else if let Some(file) = named(&index_file) {
                let bytes = self.whole(repo, commit, file)?;
                weights.extend(Index::parse(&Path::new(repo).join(&index_file), &bytes)?.files());
            }
        }
        Ok(weights)
    }

    /// `config.json` and the headers of all weight files, without the weights.
    pub fn headers(
        &self,
        repo: &str,
        revision: &str,
    ) -> Result<(serde_json::Value, Inventory, String)> {
        let commit = self.commit_of(repo, revision)?;
        let files = self.files(repo, &commit)?;
        let config = self.listed(repo, &commit, &files, "config.json")?;
        let config = json::parse(&PathBuf::from(repo).join("config.json"), &config)?;
        let index = |name: &str| self.listed(repo, &commit, &files, name);
        let (inventory, _) = self.inventory(repo, &commit, &files, Layout::Model, index)?;
        Ok((config, inventory, commit))
    }

    /// A checkpoint whose small files are brought into the cache while its weights stay where they are: they are read by
    /// byte range, each tensor when it is asked for.
    pub fn remote(
        self: &Arc<Self>,
        repo: &str,
        revision: &str,
        layout: Layout,
        observer: &dyn Observer,
    ) -> Result<(Snapshot, Checkpoint)> {
        let found = self.bring(repo, revision, observer, |_, listed| {
            Ok(needed(listed, &[]))
        })?;
        let commit = found.commit.clone().unwrap_or_else(|| revision.into());
        let files = self.files(repo, &commit)?;
        let index = |name: &str| {
            let path = found.dir.join(name);
            std::fs::read(&path).context("read", &path)
        };
        let (inventory, indexed) = self.inventory(repo, &commit, &files, layout, index)?;
        let storage = RemoteWeights {
            hub: self.clone(),
            repo: repo.into(),
            commit,
        };
        let checkpoint = Checkpoint::stored(&found.dir, inventory, indexed, Arc::new(storage));
        Ok((found, checkpoint))
    }

    /// All of a file that the listing names.
    fn listed(
        &self,
        repo: &str,
        commit: &str,
        files: &[RemoteFile],
        name: &str,
    ) -> Result<Vec<u8>> {
        match files.iter().find(|file| file.path == name) {
            Some(file) => self.whole(repo, commit, file),
            None => Err(Error::EntryNotFound {
                repo: repo.into(),
                revision: commit.into(),
                file: name.into(),
            }),
        }
    }

    /// What the headers of a repository's weight files say, and whether an index names them, which `read_index` reads.
    fn inventory(
        &self,
        repo: &str,
        commit: &str,
        files: &[RemoteFile],
        layout: Layout,
        read_index: impl FnOnce(&str) -> Result<Vec<u8>>,
    ) -> Result<(Inventory, bool)> {
        let root = PathBuf::from(repo);
        let named = |name: &str| files.iter().find(|f| f.path == name);
        let single = layout.single_file();
        let index_file = layout.index_file();
        let mut index = None;
        let names = if named(&single).is_some() {
            vec![single]
        } else {
            let bytes = read_index(&index_file)?;
            let parsed = Index::parse(&root.join(&index_file), &bytes)?;
            index.insert(parsed).files()
        };
        let weights = names
            .into_iter()
            .map(|name| {
                let Some(file) = named(&name) else {
                    return Err(Error::ShardMissing {
                        index: root.join(&index_file),
                        file: name,
                    });
                };
                let header = self.header(repo, commit, file)?;
                Ok(WeightFile { name, header })
            })
            .collect::<Result<Vec<_>>>()?;
        let inventory = Inventory::new(&root, weights)?;
        if let Some(index) = &index {
            index.check(&root.join(&index_file), &inventory)?;
        }
        Ok((inventory, index.is_some()))
    }

    /// A file that is read without being kept: what has no place in memory is none of these.
    fn whole(&self, repo: &str, commit: &str, file: &RemoteFile) -> Result<Vec<u8>> {
        if file.size > HEADER_BYTES_MAX {
            return Err(Error::TooLarge {
                path: PathBuf::from(repo).join(&file.path),
                found: file.size,
                most: HEADER_BYTES_MAX,
            });
        }
        self.range(repo, commit, &file.path, 0, file.size)
    }

    fn header(&self, repo: &str, commit: &str, file: &RemoteFile) -> Result<Header> {
        let path = PathBuf::from(repo).join(&file.path);
        // most headers are shorter than this: one request instead of two
        let guess = file.size.min(16 << 10);
        let mut prefix = self.range(repo, commit, &file.path, 0, guess)?;
        let length = match prefix.first_chunk::<8>() {
            Some(length) => u64::from_le_bytes(*length),
            None => 0,
        };
        if length > HEADER_BYTES_MAX || 8 + length > file.size {
            return Err(Error::Header {
                path,
                reason: format!("its header claims {length} bytes of {}", file.size),
            });
        }
        let needed = 8 + length;
        if needed > guess {
            prefix.extend(self.range(repo, commit, &file.path, guess, needed)?);
        }
        prefix.truncate(needed as usize);
        let header = Header::parse(&path, prefix)?;
        if header.file_bytes() != file.size {
            return Err(Error::Truncated {
                path,
                expected: header.file_bytes(),
                found: file.size,
            });
        }
        Ok(header)
    }

    /// Bytes `start … end − 1` of a file; a transfer that breaks off goes on from where it stopped.
    pub fn range(
        &self,
        repo: &str,
        commit: &str,
        file: &str,
        start: u64,
        end: u64,
    ) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut resumptions = 0;
        while (bytes.len() as u64) < end.saturating_sub(start) {
            let before = bytes.len();
            match self.append_range(repo, commit, file, start + before as u64..end, &mut bytes) {
                Ok(()) => {}
                Err(Error::DownloadCut { .. })
                    if bytes.len() > before && resumptions < RESUMPTIONS =>
                {
                    resumptions += 1;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    fn append_range(
        &self,
        repo: &str,
        commit: &str,
        file: &str,
        range: Range<u64>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let what = self.asked(repo, commit, file);
        let response = self.send(&what, &|url| {
            self.request(Method::GET, url)
                .header(RANGE, format!("bytes={}-{}", range.start, range.end - 1))
        })?;
        let mut response = response;
        let cut = |received: u64| Error::DownloadCut {
            file: file.into(),
            received,
            expected: range.end - range.start,
        };
        if response.status() != StatusCode::PARTIAL_CONTENT {
            // a server that ignores ranges sends the file from its beginning
            let skipped = std::io::copy(
                &mut response.by_ref().take(range.start),
                &mut std::io::sink(),
            );
            if skipped.ok() != Some(range.start) {
                return Err(cut(0));
            }
        }
        let wanted = range.end - range.start;
        let before = bytes.len();
        let read = response.take(wanted).read_to_end(bytes);
        let received = (bytes.len() - before) as u64;
        match read {
            Ok(_) if received == wanted => Ok(()),
            _ => Err(cut(received)),
        }
    }

    fn asked(&self, repo: &str, commit: &str, file: &str) -> Asked {
        Asked {
            action: "download a file",
            url: format!(
                "{}/{repo}/resolve/{}/{}",
                self.endpoint(),
                segment(commit),
                segments(file)
            ),
            repo: repo.into(),
            revision: commit.into(),
            file: file.into(),
        }
    }

    /// One file into the cache: resumed if a part is there, verified, then renamed.
    fn fetch(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        cache: &Cache,
        observer: &dyn Observer,
    ) -> Result<()> {
        let lock_path = cache.lock_path(&file.oid);
        let lock = File::create(&lock_path).context("create", &lock_path)?;
        lock.lock().context("lock", &lock_path)?;
        let blob = cache.blob(&file.oid);
        if blob.exists() {
            // another process brought it while we waited
            observer.advance(Stage::Download, file.size, &file.path);
            return Ok(());
        }
        let partial = blob.with_extension("incomplete");
        for attempt in 0..=RESUMPTIONS {
            match self.append(repo, commit, file, &partial, observer) {
                Ok(()) => break,
                Err(Error::DownloadCut { .. }) if attempt < RESUMPTIONS => {}
                Err(error) => return Err(error),
            }
        }
        let found = digest(&partial, file)?;
        if found != file.oid {
            // nothing of it can be trusted, not even as a beginning
            std::fs::remove_file(&partial).context("remove", &partial)?;
            return Err(Error::Checksum {
                what: format!("the download of `{}` from {repo}", file.path),
                path: blob,
                expected: file.oid.clone(),
                found,
            });
        }
        std::fs::rename(&partial, &blob).context("rename", &blob)
    }

    fn append(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        partial: &Path,
        observer: &dyn Observer,
    ) -> Result<()> {
        let mut out = OpenOptions::new()
            .create(true)
            .append(true)
            .open(partial)
            .context("open", partial)?;
        let mut received = out.metadata().context("read", partial)?.len();
        if received > file.size {
            out.set_len(0).context("write", partial)?;
            received = 0;
        }
        if received == file.size {
            return Ok(());
        }
        let what = self.asked(repo, commit, &file.path);
        let mut response = self.send(&what, &|url| {
            let request = self.request(Method::GET, url);
            if received > 0 {
                request.header(RANGE, format!("bytes={received}-"))
            } else {
                request
            }
        })?;
        if received > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
            out.set_len(0).context("write", partial)?;
            received = 0;
        }
        let cut = |received: u64| Error::DownloadCut {
            file: file.path.clone(),
            received,
            expected: file.size,
        };
        let mut buffer = vec![0u8; 256 << 10];
        loop {
            let n = response.read(&mut buffer).map_err(|_| cut(received))?;
            if n == 0 || received > file.size {
                break;
            }
            out.write_all(&buffer[..n])
                .map_err(|source| Error::io("write", partial, source))?;
            received += n as u64;
            observer.advance(Stage::Download, n as u64, &file.path);
        }
        if received != file.size {
            return Err(cut(received));
        }
        out.sync_all().context("flush", partial)
    }
}

/// sha256 of an LFS file, git's blob id of a regular one.
fn digest(path: &Path, file: &RemoteFile) -> Result<String> {
    if file.lfs {
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
            return Ok(crate::sum::hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

/// The id git gives to a file's contents.
pub(super) fn git_blob_id(bytes: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(format!("blob {}\0", bytes.len()));
    hash.update(bytes);
    crate::sum::hex(&hash.finalize())
}

/// Of a repository's files, those that some verb reads: `weights`, and what is small and lies at the top.
fn needed(files: Vec<RemoteFile>, weights: &[String]) -> Vec<RemoteFile> {
    let index = |path: &str| path.ends_with(".safetensors.index.json");
    files
        .into_iter()
        .filter(|file| !file.path.contains('/'))
        .filter(|file| {
            weights.contains(&file.path) || index(&file.path) || !is_weights_or_media(&file.path)
        })
        .collect()
}

/// One repository's part of the cache, laid out as huggingface_hub does.
struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    fn of(cache: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self {
            root: cache.join(&name),
            locks: cache.join(".locks").join(&name),
        }
    }

    fn blob(&self, oid: &str) -> PathBuf {
        self.root.join("blobs").join(oid)
    }

    fn lock_path(&self, oid: &str) -> PathBuf {
        // the folders are made here, where the first file of a repository passes
        let _ = std::fs::create_dir_all(&self.locks);
        let _ = std::fs::create_dir_all(self.root.join("blobs"));
        self.locks.join(format!("{oid}.lock"))
    }

    /// Links the files of a commit to their contents.
    fn link(&self, commit: &str, files: &[RemoteFile]) -> Result<PathBuf> {
        let dir = self.root.join("snapshots").join(commit);
        std::fs::create_dir_all(&dir).context("create", &dir)?;
        for file in files {
            let link = dir.join(&file.path);
            let target = PathBuf::from("../../blobs").join(&file.oid);
            if std::fs::read_link(&link).is_ok_and(|found| found == target) {
                continue;
            }
            let temporary = dir.join(format!(".{}.link", file.path));
            let _ = std::fs::remove_file(&temporary);
            std::os::unix::fs::symlink(&target, &temporary).context("link", &temporary)?;
            std::fs::rename(&temporary, &link).context("rename", &link)?;
        }
        Ok(dir)
    }

    fn remember(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.root.join("refs").join(revision);
        let folder = path.parent().expect("a ref lies in a folder");
        std::fs::create_dir_all(folder).context("create", folder)?;
        crate::weights::shard::write_atomically(&path, commit.as_bytes()).map(drop)
    }

    fn offline(&self, repo: &str, revision: &str) -> Result<Snapshot> {
        let named = std::fs::read_to_string(self.root.join("refs").join(revision));
        let commit = named.unwrap_or_else(|_| revision.to_string());
        let dir = self.root.join("snapshots").join(commit.trim());
        if !dir.is_dir() {
            return Err(Error::Offline { repo: repo.into() });
        }
        Ok(Snapshot {
            dir,
            repo: Some(repo.into()),
            commit: Some(commit.trim().into()),
        })
    }
}

/// The sha256 and length of what a reader yields, and git's blob id if it is small.
pub(super) fn local_digest(path: &Path) -> Result<(String, u64)> {
    let mut file = File::open(path).context("open", path)?;
    let (mut hash, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer).context("read", path)?;
        if n == 0 {
            return Ok((crate::sum::hex(&hash.finalize()), size));
        }
        hash.update(&buffer[..n]);
        size += n as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blob_ids_are_gits() {
        // printf 'hello\n' | git hash-object --stdin
        assert_eq!(
            git_blob_id(b"hello\n"),
            "ce013625030ba8dba906f756967f9e9ca394464a"
        );
    }

    #[test]
    fn only_what_a_verb_reads_is_fetched() {
        let file = |path: &&str| RemoteFile {
            path: path.to_string(),
            size: 1,
            oid: String::new(),
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
