//! Files from the Hub into the cache that Python's huggingface_hub shares, verified before they get their name.

use std::io::{Read, Write};
use std::path::Path;

use reqwest::blocking::Response;
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Method, StatusCode};

use super::cache::{Cache, Place, Snapshot, begun, digest, needed, open_partial};
use super::client::{Asked, DOWNLOAD, Hub, segment, segments};
use super::listing::{RemoteFile, refuse_hostile};
use super::xet::Way;
use crate::error::{Error, IoContext, Result};
use crate::event::{Gauge, Observer, Stage, Unit};
use crate::kind::SINGLE_FILES;
use crate::lock;
use crate::weights::Layout;
use crate::weights::checkpoint::Index;
use crate::workers;
use crate::workspace::check_free_space;

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

const PARALLEL_DOWNLOADS: usize = 4;
/// A broken-off transfer goes on from where it stopped, this many times.
pub(super) const RESUMPTIONS: usize = 5;

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
        refuse_hostile(repo, &files)?;
        let mut missing = Vec::new();
        for file in &files {
            if !Place::in_folder(dir, file).is_filled(file)? {
                Place::refuse_foreign(dir, file)?;
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
    pub(super) fn bring(
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
        refuse_hostile(repo, &files)?;
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
        place: impl Fn(&RemoteFile) -> Place,
    ) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        let sizes = files.iter().map(|file| file.size);
        let bytes = sizes.fold(0, u64::saturating_add);
        let work: Vec<(&RemoteFile, Place, u64)> = files
            .iter()
            .map(|file| {
                let place = place(file);
                let done = begun(&place.partial, file.size);
                (file, place, done)
            })
            .collect();
        let done = work.iter().map(|(_, _, done)| *done);
        let done = done.fold(0, u64::saturating_add);
        observer.resume(Stage::Download, done, bytes, Unit::Bytes);
        let xet = Way::new(self, repo, commit, observer);
        workers::for_each(&work, PARALLEL_DOWNLOADS, |(file, place, done)| {
            let gauge = Gauge::new(observer, Stage::Download, &file.path, *done);
            self.fetch(repo, commit, file, place, &xet, &gauge)
        })?;
        observer.finish(Stage::Download);
        Ok(())
    }

    /// The weight files of whatever the repository holds: single files, and what the indices name.
    fn weight_files(&self, repo: &str, commit: &str, files: &[RemoteFile]) -> Result<Vec<String>> {
        let mut weights = SINGLE_FILES.map(String::from).to_vec();
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

    pub(super) fn asked(&self, repo: &str, commit: &str, file: &str) -> Asked {
        Asked {
            action: DOWNLOAD,
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
        gauge: &Gauge,
    ) -> Result<()> {
        for path in [&place.lock, &place.partial, &place.target] {
            let folder = path.parent().expect("every place lies in a folder");
            std::fs::create_dir_all(folder).context("create", folder)?;
        }
        let _held = lock::hold(&place.lock)?;
        if place.is_filled(file)? {
            // another process brought it while we waited
            gauge.reach(file.size);
            return Ok(());
        }
        let length = || std::fs::metadata(&place.partial).map_or(0, |found| found.len());
        loop {
            let before = length();
            let in_chunks = xet.append(file, &place.partial, gauge)?;
            let by_xet = length() > before;
            if !in_chunks {
                self.append_all(repo, commit, file, &place.partial, gauge)?;
            }
            let found = digest(&place.partial, file.lfs)?;
            if found == file.oid {
                break;
            }
            // nothing of it can be trusted, not even as a beginning
            std::fs::remove_file(&place.partial).context("remove", &place.partial)?;
            match (before > 0, in_chunks, by_xet) {
                // what an earlier run left, or Xet before it failed, may be the part that is wrong: all is fetched once more
                (true, _, _) | (false, false, true) => {}
                (false, true, _) => xet.brought_wrong_bytes(file),
                (false, false, false) => {
                    return Err(Error::Checksum {
                        what: format!("the download of `{}` from {repo}", file.path).into(),
                        path: place.target.clone(),
                        expected: file.oid.clone(),
                        found,
                    });
                }
            }
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
        gauge: &Gauge,
    ) -> Result<()> {
        for attempt in 0.. {
            match self.append(repo, commit, file, partial, gauge) {
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
        gauge: &Gauge,
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
            gauge.reach(received);
        }
        if received != file.size {
            return Err(cut(received));
        }
        out.sync_all().context("flush", partial)
    }
}

/// Whether an answer is a part of a file that begins at `start`, and the file has `size` bytes where that is known.
pub(super) fn begins_at(response: &Response, start: u64, size: Option<u64>) -> bool {
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
