//! Files from the Hub into the cache that Python's huggingface_hub shares, verified before they get their name.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::blocking::Response;
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::client::{Asked, Hub, RemoteFile, segment, segments};
use super::xet::Way;
use crate::base::is_weights_or_media;
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::json;
use crate::sum::hex;
use crate::weights::checkpoint::{Checkpoint, Index, Storage, WeightFile};
use crate::weights::header::HEADER_BYTES_MAX;
use crate::weights::shard::write_atomically;
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

/// What came into a folder.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Downloaded {
    pub repo: String,
    pub commit: String,
    pub files: usize,
    /// Files that were there already.
    pub unchanged: usize,
    pub bytes: u64,
}

/// Weights of one commit that are read where they are.
#[derive(Debug)]
struct RemoteWeights {
    hub: Arc<Hub>,
    repo: String,
    commit: String,
    /// By file, of those that lie in LFS.
    stated: BTreeMap<String, String>,
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

    fn stated_sha256(&self, file: &str) -> Option<String> {
        self.stated.get(file).cloned()
    }

    fn is_remote(&self) -> bool {
        true
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
        self.bring(repo, revision, None, observer, |commit, listed| {
            let weights = self.weight_files(repo, commit, &listed)?;
            Ok(needed(listed, &weights))
        })
    }

    /// Downloads every file of a repository into a folder; what is there already, by hash, is not sent again.
    pub fn download(
        &self,
        repo: &str,
        revision: &str,
        dir: &Path,
        observer: &dyn Observer,
    ) -> Result<Downloaded> {
        if self.options.offline {
            return Err(Error::Offline { repo: repo.into() });
        }
        let commit = self.commit_of(repo, revision)?;
        let files = self.files(repo, &commit)?;
        let mut missing = Vec::new();
        for file in &files {
            if !Place::in_folder(dir, file).is_filled(file)? {
                missing.push(file.clone());
            }
        }
        let sizes = missing.iter().map(|file| file.size);
        let bytes = sizes.fold(0, u64::saturating_add);
        check_free_space(dir, bytes)?;
        self.fetch_all(repo, &commit, &missing, observer, |file| {
            Place::in_folder(dir, file)
        })?;
        Ok(Downloaded {
            repo: repo.into(),
            commit,
            files: files.len(),
            unchanged: files.len() - missing.len(),
            bytes,
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
        self.bring(repo, revision, Some(names), observer, |_, mut listed| {
            listed.retain(|file| names.contains(&file.path.as_str()));
            Ok(listed)
        })
    }

    /// Brings those files of a commit into the cache that `choose` picks from its listing.
    ///
    /// Offline, and where the Hub cannot be reached, the cache is taken as it is: as long as it holds everything that a
    /// model, decomposition or adapter needs, or those of the `names` that the repository has.
    fn bring(
        &self,
        repo: &str,
        revision: &str,
        names: Option<&[&str]>,
        observer: &dyn Observer,
        choose: impl FnOnce(&str, Vec<RemoteFile>) -> Result<Vec<RemoteFile>>,
    ) -> Result<Snapshot> {
        let cache = Cache::of(&self.options.cache, repo);
        if self.options.offline {
            return cache.kept(repo, revision, names);
        }
        let commit = match self.commit_of(repo, revision) {
            Ok(commit) => commit,
            Err(error @ Error::HubUnreachable { .. }) => {
                let Ok(kept) = cache.kept(repo, revision, names) else {
                    return Err(error);
                };
                let commit = kept.commit.clone().unwrap_or_default();
                observer.warn(format!("{error}: taking {commit} of {repo} from the cache"));
                return Ok(kept);
            }
            Err(other) => return Err(other),
        };
        let listed = self.files(repo, &commit)?;
        cache.list(&commit, &listed)?;
        let files = choose(&commit, listed)?;
        let missing: Vec<RemoteFile> = files
            .iter()
            .filter(|file| !cache.blob(&file.oid).exists())
            .cloned()
            .collect();
        let sizes = missing.iter().map(|file| file.size);
        check_free_space(&cache.root, sizes.fold(0, u64::saturating_add))?;
        self.fetch_all(repo, &commit, &missing, observer, |file| {
            cache.place(&file.oid)
        })?;
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

    /// Downloads files in parallel, each to its place.
    fn fetch_all(
        &self,
        repo: &str,
        commit: &str,
        files: &[RemoteFile],
        observer: &dyn Observer,
        place: impl Fn(&RemoteFile) -> Place + Sync,
    ) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let sizes = files.iter().map(|file| file.size);
        let bytes = sizes.fold(0, u64::saturating_add);
        observer.start(Stage::Download, bytes, Unit::Bytes);
        let xet = Way::new(self, repo, commit, observer);
        workers::for_each(files, PARALLEL_DOWNLOADS, |file| {
            self.fetch(repo, commit, file, &place(file), &xet, observer)
        })?;
        observer.finish(Stage::Download);
        Ok(())
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
        let found = self.bring(repo, revision, Some(&[]), observer, |_, listed| {
            Ok(needed(listed, &[]))
        })?;
        let commit = found.commit.clone().unwrap_or_else(|| revision.into());
        let files = self.files(repo, &commit)?;
        let index = |name: &str| {
            let path = found.dir.join(name);
            std::fs::read(&path).context("read", &path)
        };
        let (inventory, indexed) = self.inventory(repo, &commit, &files, layout, index)?;
        let large = files.iter().filter(|file| file.lfs);
        let storage = RemoteWeights {
            hub: self.clone(),
            repo: repo.into(),
            commit,
            stated: large
                .map(|file| (file.path.clone(), file.oid.clone()))
                .collect(),
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
        if response.status() == StatusCode::PARTIAL_CONTENT {
            if !begins_at(&response, range.start, None) {
                return Err(cut(0));
            }
        } else {
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

    pub(super) fn asked(&self, repo: &str, commit: &str, file: &str) -> Asked {
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

    /// One file to its place: resumed if a part is there, verified, then renamed.
    fn fetch(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        place: &Place,
        xet: &Way,
        observer: &dyn Observer,
    ) -> Result<()> {
        for path in [&place.lock, &place.partial, &place.target] {
            let folder = path.parent().expect("every place lies in a folder");
            std::fs::create_dir_all(folder).context("create", folder)?;
        }
        let lock = File::create(&place.lock).context("create", &place.lock)?;
        lock.lock().context("lock", &place.lock)?;
        if place.is_filled(file)? {
            // another process brought it while we waited
            observer.advance(Stage::Download, file.size, &file.path);
            return Ok(());
        }
        // what an earlier run left may be the part that is wrong: then all is fetched once more
        let mut begun = std::fs::metadata(&place.partial).is_ok_and(|found| found.len() > 0);
        loop {
            let in_chunks = xet.append(file, &place.partial)?;
            if !in_chunks {
                self.append_all(repo, commit, file, &place.partial, observer)?;
            }
            let found = digest(&place.partial, file)?;
            if found == file.oid {
                break;
            }
            // nothing of it can be trusted, not even as a beginning
            std::fs::remove_file(&place.partial).context("remove", &place.partial)?;
            if in_chunks {
                xet.brought_wrong_bytes(file);
            } else if !begun {
                return Err(Error::Checksum {
                    what: format!("the download of `{}` from {repo}", file.path),
                    path: place.target.clone(),
                    expected: file.oid.clone(),
                    found,
                });
            }
            begun = false;
        }
        std::fs::rename(&place.partial, &place.target).context("rename", &place.target)
    }

    /// Appends what is missing of a file; a transfer that breaks off goes on from where it stopped.
    fn append_all(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        partial: &Path,
        observer: &dyn Observer,
    ) -> Result<()> {
        for attempt in 0.. {
            match self.append(repo, commit, file, partial, observer) {
                Err(Error::DownloadCut { .. }) if attempt < RESUMPTIONS => {}
                result => return result,
            }
        }
        unreachable!("the last try returns")
    }

    fn append(
        &self,
        repo: &str,
        commit: &str,
        file: &RemoteFile,
        partial: &Path,
        observer: &dyn Observer,
    ) -> Result<()> {
        let (mut out, mut received) = open_partial(partial, file.size)?;
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
        let cut = |received: u64| Error::DownloadCut {
            file: file.path.clone(),
            received,
            expected: file.size,
        };
        if response.status() == StatusCode::PARTIAL_CONTENT {
            if !begins_at(&response, received, Some(file.size)) {
                return Err(cut(received));
            }
        } else if received > 0 {
            out.set_len(0).context("write", partial)?;
            received = 0;
        }
        // before anything of it is kept: a page that calls itself a success is no beginning of a file
        match response.content_length() {
            Some(length) if length != file.size - received => {
                return Err(Error::HubStatus {
                    status: response.status().as_u16(),
                    request: what.action.into(),
                    detail: format!(
                        "{length} bytes, where {} of `{}` were asked for",
                        file.size - received,
                        file.path
                    ),
                });
            }
            _ => {}
        }
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

/// Whether an answer is a part of a file that begins at `start`, and the file has `size` bytes where that is known.
fn begins_at(response: &Response, start: u64, size: Option<u64>) -> bool {
    let header = response.headers().get(CONTENT_RANGE);
    let told = header.and_then(|range| range.to_str().ok());
    let told = told.and_then(|range| range.strip_prefix("bytes ")?.split_once('/'));
    told.is_some_and(|(range, total)| {
        let first = range
            .split_once('-')
            .and_then(|(first, _)| first.parse().ok());
        let total: Option<u64> = total.parse().ok();
        first == Some(start) && (size.is_none() || total.is_none() || total == size)
    })
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
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

/// Where a download goes, and what it uses on its way.
struct Place {
    lock: PathBuf,
    partial: PathBuf,
    target: PathBuf,
    /// The target's name is its hash: nothing else can be there.
    named_by_hash: bool,
}

impl Place {
    fn in_folder(dir: &Path, file: &RemoteFile) -> Self {
        let name = crate::sum::sha256_hex(file.path.as_bytes());
        // a beginning of other contents is no beginning of these
        let name = format!("{}-{}", &name[..16], file.oid);
        let state = dir.join(".cache").join("svdhub");
        Self {
            lock: state.join(format!("{name}.lock")),
            partial: state.join(format!("{name}.incomplete")),
            target: dir.join(&file.path),
            named_by_hash: false,
        }
    }

    fn is_filled(&self, file: &RemoteFile) -> Result<bool> {
        if self.named_by_hash {
            return Ok(self.target.exists());
        }
        let size = std::fs::metadata(&self.target).map(|found| found.len());
        Ok(size.is_ok_and(|size| size == file.size) && digest(&self.target, file)? == file.oid)
    }
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
fn needed(mut files: Vec<RemoteFile>, weights: &[String]) -> Vec<RemoteFile> {
    files.retain(|file| is_read(&file.path, weights));
    files
}

/// Whether some verb reads a file: one of the `weights`, or what is small and lies at the top.
fn is_read(path: &str, weights: &[String]) -> bool {
    let index = path.ends_with(".safetensors.index.json");
    let named = weights.iter().any(|name| name == path);
    !path.contains('/') && (named || index || !is_weights_or_media(path))
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

    fn place(&self, oid: &str) -> Place {
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

    /// Keeps the listing of a commit: offline, it tells what is missing.
    fn list(&self, commit: &str, files: &[RemoteFile]) -> Result<()> {
        let path = self.listing_path(commit);
        if path.exists() {
            return Ok(());
        }
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
        let files: serde_json::Map<_, _> = files.iter().map(entry).collect();
        let listing = json!({"format_version": 1, "files": files});
        let folder = path.parent().expect("a listing lies in a folder");
        std::fs::create_dir_all(folder).context("create", folder)?;
        write_atomically(&path, listing.to_string().as_bytes()).map(drop)
    }

    /// The paths of a commit's files, where its listing was kept.
    fn listed(&self, commit: &str) -> Option<Vec<String>> {
        let text = std::fs::read(self.listing_path(commit)).ok()?;
        let listing: Value = serde_json::from_slice(&text).ok()?;
        let files = listing["files"].as_object()?;
        Some(files.keys().cloned().collect())
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
        write_atomically(&path, commit.as_bytes()).map(drop)
    }

    /// A commit as it lies in the cache, if nothing of it is missing: of these names, or of what verbs read.
    fn kept(&self, repo: &str, revision: &str, names: Option<&[&str]>) -> Result<Snapshot> {
        let named = std::fs::read_to_string(self.root.join("refs").join(revision));
        let commit = named.unwrap_or_else(|_| revision.to_string());
        let commit = commit.trim().to_string();
        let dir = self.root.join("snapshots").join(&commit);
        if !dir.is_dir() {
            return Err(Error::Offline { repo: repo.into() });
        }
        let listed = self.listed(&commit);
        let wanted = match (names, listed) {
            (Some(names), Some(listed)) => {
                let named = |path: &String| names.contains(&path.as_str());
                listed.into_iter().filter(named).collect()
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
    fn needed(&self, dir: &Path, listed: Option<Vec<String>>) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).context("list", dir)? {
            names.extend(entry.context("list", dir)?.file_name().into_string());
        }
        let mut shards = Vec::new();
        let mut weights = vec![crate::adapter::WEIGHTS_FILE.to_string()];
        for layout in [Layout::Model, Layout::Decomposition] {
            weights.push(layout.single_file());
            let index = dir.join(layout.index_file());
            if let Ok(bytes) = std::fs::read(&index) {
                shards.extend(Index::parse(&index, &bytes)?.files());
            }
        }
        let mut wanted = listed.unwrap_or(names);
        wanted.retain(|path| is_read(path, &weights));
        wanted.extend(shards);
        Ok(wanted)
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
            size: 1,
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
