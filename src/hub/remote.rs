//! Weights that stay on the Hub: headers and tensors by byte range.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use reqwest::header::RANGE;
use reqwest::{Method, StatusCode};

use super::cache::{Snapshot, needed};
use super::client::{FIRST_PAUSE, Hub};
use super::download::{RESUMPTIONS, begins_at};
use super::listing::RemoteFile;
use crate::error::{Error, IoContext, Result};
use crate::event::Observer;
use crate::json;
use crate::weights::checkpoint::{Checkpoint, Index, Storage, WeightFile};
use crate::weights::header::HEADER_BYTES_MAX;
use crate::weights::{Header, Inventory, Layout};

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

impl Hub {
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
    pub(super) fn whole(&self, repo: &str, commit: &str, file: &RemoteFile) -> Result<Vec<u8>> {
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
                Err(Error::DownloadCut { .. }) if resumptions < RESUMPTIONS => {
                    resumptions += 1;
                    if bytes.len() == before {
                        std::thread::sleep(FIRST_PAUSE);
                    }
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
}
