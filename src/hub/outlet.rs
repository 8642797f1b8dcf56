//! A repository as an outlet: the contents of finished files go up while others are still being made, and a commit gives
//! them their names in the end.

use std::path::PathBuf;

use super::client::Hub;
use super::lfs::Told;
use super::local::{LocalFile, Stamp};
use super::upload::{Push, PushOptions};
use crate::contents::Contents;
use crate::error::{Error, Result};
use crate::event::{Observer, Silent};
use crate::outlet::{Away, Finished, Outlet};

/// Takes finished files to a repository.
pub struct HubOutlet<'a> {
    hub: &'a Hub,
    repo: String,
    branch: String,
    options: PushOptions,
    keeps: bool,
    room: Option<u64>,
    observer: &'a dyn Observer,
}

impl Hub {
    /// An outlet to a repository, which is made if it is not there. With `keeps`, files stay on this machine too; without,
    /// what is on its way takes at most `room` bytes of it. Weights there that cannot be ours are `foreign`.
    ///
    /// # Errors
    /// Now, rather than after hours of work: a token that may not write there, no network, weights there that are foreign.
    pub fn outlet<'a>(
        &'a self,
        repo: &str,
        options: &PushOptions,
        keeps: bool,
        room: Option<u64>,
        foreign: &dyn Fn(&str) -> bool,
        observer: &'a dyn Observer,
    ) -> Result<HubOutlet<'a>> {
        if self.options.offline {
            return Err(Error::OfflineSending { repo: repo.into() });
        }
        let branch = options.branch.clone().unwrap_or_else(|| "main".into());
        self.prepare(&self.api()?, repo, &branch, options)?;
        if !options.replace {
            let there = self.files(repo, &self.commit_of(repo, &branch)?)?;
            let there = there.into_iter().map(|file| file.path);
            let files: Vec<String> = there.filter(|name| foreign(name)).collect();
            if !files.is_empty() {
                let repo = repo.into();
                return Err(Error::OtherWeights { repo, files });
            }
        }
        Ok(HubOutlet {
            hub: self,
            repo: repo.into(),
            branch,
            options: options.clone(),
            keeps,
            room,
            observer,
        })
    }
}

impl HubOutlet<'_> {
    fn push<'p>(&'p self, contents: Option<&'p dyn Contents>) -> Push<'p> {
        Push {
            hub: self.hub,
            repo: &self.repo,
            revision: self.branch.clone(),
            options: &self.options,
            // what is shown is the work, not each file's way
            observer: &Silent,
            contents,
        }
    }
}

impl Outlet for HubOutlet<'_> {
    fn take(&self, file: &Finished, contents: &dyn Contents) -> Result<()> {
        let sent = self.push(Some(contents)).send_large(&[local(file)])?;
        if sent > 0 {
            self.observer.note(format!(
                "{} MB of finished weights are at {}",
                sent.div_ceil(1_000_000),
                self.repo
            ));
        }
        Ok(())
    }

    fn holds(&self, file: &Finished) -> Result<bool> {
        self.push(None).has(&local(file))
    }

    fn keeps(&self) -> bool {
        self.keeps
    }

    fn room(&self) -> Option<u64> {
        self.room
    }

    fn place(&self) -> String {
        let kept = if self.keeps { ", and stay" } else { "" };
        format!("{}@{}{kept}", self.repo, self.branch)
    }
}

fn local(file: &Finished) -> LocalFile {
    LocalFile {
        name: file.name.clone(),
        path: PathBuf::from(&file.name),
        size: file.bytes,
        sha256: file.sha256.clone(),
        blob_id: None,
        lfs: true,
        unchanged: false,
        stamp: Stamp::default(),
    }
}

impl Push<'_> {
    /// Whether the Hub has the contents of a large file.
    fn has(&self, file: &LocalFile) -> Result<bool> {
        match self.objects(&[file], self.hub.options.xet.is_some()) {
            Ok(Told::Lfs(told)) => Ok(told[0]["actions"].is_null()),
            // of what is in its store of chunks, a Hub does not say before the commit that names it
            Ok(Told::Xet(_))
            | Err(Error::HubStatus {
                status: 404 | 405 | 501,
                ..
            }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// The files that an outlet took from `dir`, to be named by a commit.
    ///
    /// # Errors
    /// One whose contents the Hub does not have any more.
    pub(super) fn taken(&self, dir: &std::path::Path) -> Result<Vec<LocalFile>> {
        let away = Away::of(dir)?.files.into_iter();
        let mut files = Vec::new();
        for (name, file) in away.filter(|(name, _)| !dir.join(name).exists()) {
            let finished = Finished {
                name: name.clone(),
                bytes: file.bytes,
                sha256: file.sha256,
            };
            let taken = local(&finished);
            if !self.has(&taken)? {
                return Err(Error::NotThereAnyMore {
                    repo: self.repo.into(),
                    file: name,
                    dir: dir.into(),
                });
            }
            files.push(taken);
        }
        Ok(files)
    }
}
