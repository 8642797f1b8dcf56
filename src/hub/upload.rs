//! A directory to the Hub: large files through Xet or LFS, the rest in commits, and then compared with what arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hf_hub::{HFClientSync, RepoTypeModel};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Asked, FIRST_PAUSE, Hub, READ, TRIES, WAIT_MAX, segment};
use super::local::{INLINE_BYTES_MAX, LocalFile, local_files};
use crate::contents::Contents;
use crate::error::{Error, IoContext, Result};
use crate::event::Observer;
use crate::outlet::Away;

/// How to push.
#[derive(Debug, Clone)]
pub struct PushOptions {
    pub private: bool,
    /// Made from `main` if it is not there.
    pub branch: Option<String>,
    /// Propose the commit instead of landing it.
    pub pull_request: bool,
    pub tag: Option<String>,
    /// The commit's title.
    pub message: String,
    /// Delete the weights of the repository that would be taken for these or beside them.
    pub replace: bool,
}

/// What a directory says of its files.
#[derive(Debug, Clone)]
pub struct Claims {
    /// The sha256 of some: what was damaged since is not pushed.
    pub sha256: BTreeMap<String, String>,
    /// Files that it cannot be without.
    pub needed: BTreeSet<String>,
    /// Whether a loader would take a file of that name for weights of what is pushed.
    pub is_weights: fn(&str) -> bool,
}

impl Default for Claims {
    fn default() -> Self {
        Self {
            sha256: BTreeMap::new(),
            needed: BTreeSet::new(),
            is_weights: |_| false,
        }
    }
}

impl Default for PushOptions {
    fn default() -> Self {
        Self {
            private: false,
            branch: None,
            pull_request: false,
            tag: None,
            message: "Upload with svdhub".into(),
            replace: false,
        }
    }
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Pushed {
    pub repo: String,
    pub branch: String,
    /// The commit that holds the files.
    pub commit: String,
    pub url: String,
    pub pull_request_url: Option<String>,
    pub files: usize,
    pub bytes_sent: u64,
    /// Files that were there already.
    pub unchanged: usize,
}

/// A push under way.
pub(super) struct Push<'a> {
    pub hub: &'a Hub,
    pub repo: &'a str,
    /// What the next commit lands on: the branch, or the pull request once there is one.
    pub revision: String,
    pub options: &'a PushOptions,
    pub observer: &'a dyn Observer,
    /// Of the one file that is sent, where it does not lie on the disk.
    pub contents: Option<&'a dyn Contents>,
}

/// A commit that is on the Hub.
struct Landed {
    commit: String,
    pull_request_url: Option<String>,
}

/// A pull request that a run which was killed has left.
struct Waiting {
    number: u64,
    commit: String,
    /// Those of our files that it holds already.
    held: BTreeSet<String>,
}

/// Files of one preupload request, as the Hub's clients do.
const PREUPLOAD_FILES: usize = 256;
/// Of one commit; the Hub advises against more.
const COMMIT_FILES: usize = 50;
const COMMIT_BYTES: u64 = 16_000_000;
/// How the names of pull requests begin, which are no branches.
const PULL_REQUESTS: &str = "refs/pr/";

impl Hub {
    /// Pushes every file of `dir`, and makes sure that it arrived.
    ///
    /// What fits one commit lands whole or not at all; of more, the weights come first, what names them next, and the card
    /// last. Killed at any time, the same call goes on: what is on the Hub is not sent again.
    pub fn push(
        &self,
        dir: &Path,
        repo: &str,
        claims: &Claims,
        options: &PushOptions,
        observer: &dyn Observer,
    ) -> Result<Pushed> {
        if self.options.offline {
            return Err(Error::OfflineSending { repo: repo.into() });
        }
        let mut files = local_files(dir, observer)?;
        for file in &files {
            let stated = claims.sha256.get(&file.name);
            if let Some(expected) = stated.filter(|sum| **sum != file.sha256) {
                return Err(Error::Checksum {
                    what: format!("`{}`", file.name).into(),
                    path: file.path.clone(),
                    expected: expected.clone(),
                    found: file.sha256.clone(),
                });
            }
        }
        let api = self.api()?;
        let branch = options.branch.clone().unwrap_or_else(|| "main".into());
        self.prepare(&api, repo, &branch, options)?;
        let mut push = Push {
            hub: self,
            repo,
            revision: branch.clone(),
            options,
            observer,
            contents: None,
        };
        let mut head = self.commit_of(repo, &branch)?;
        let away = Away::of(dir)?.files;
        let ours = |name: &str| away.contains_key(name) || files.iter().any(|f| f.name == name);
        let names = away.keys().chain(files.iter().map(|file| &file.name));
        // a directory without weights of its own says nothing of others
        let stale: Vec<String> = match names.into_iter().any(|name| (claims.is_weights)(name)) {
            true => {
                let there = self.files(repo, &head)?.into_iter().map(|file| file.path);
                there
                    .filter(|name| (claims.is_weights)(name) && !ours(name))
                    .collect()
            }
            false => Vec::new(),
        };
        if !(stale.is_empty() || options.replace) {
            return Err(Error::OtherWeights {
                repo: repo.into(),
                files: stale,
            });
        }
        if let Some(missing) = claims
            .sha256
            .keys()
            .chain(&claims.needed)
            .find(|name| !ours(name))
        {
            return Err(Error::Lost {
                path: dir.join(missing),
            });
        }
        push.preupload(&mut files)?;
        let bytes_sent = push.send_large(&files)?;
        let mut taken = push.taken(dir)?;
        if !taken.is_empty() {
            let differing = self.differing(repo, &head, &taken)?;
            for file in &mut taken {
                file.unchanged = !differing.contains(&file.name);
            }
        }
        files.extend(taken);
        let mut pull_request_url = None;
        let mut batches = batches(&files);
        if batches.is_empty() && !stale.is_empty() {
            batches.push(Vec::new());
        }
        let title = |number: usize| match batches.len() {
            1 => options.message.clone(),
            all => format!("{} ({number} of {all})", options.message),
        };
        let first = (batches.len() > 1).then(|| title(1));
        let mut held = BTreeSet::new();
        if !batches.is_empty()
            && let Some(there) =
                push.waiting_pull_request(&files, &stale, &head, first.as_deref())?
        {
            push.revision = format!("{PULL_REQUESTS}{}", there.number);
            pull_request_url = Some(push.discussion_url(there.number));
            head = there.commit;
            held = there.held;
        }
        for (number, batch) in (1..).zip(&batches) {
            // what names the weights has come, and these are named no more
            let gone: &[String] = if number == batches.len() { &stale } else { &[] };
            let is_there = batch.iter().all(|file| held.contains(&file.name));
            if is_there && !self.has_any(repo, &head, gone)? {
                continue;
            }
            let landed = push.commit(&head, batch, gone, &title(number))?;
            head = landed.commit;
            if let Some(url) = landed.pull_request_url {
                let opened = url.rsplit('/').next().unwrap_or_default();
                push.revision = format!("{PULL_REQUESTS}{opened}");
                pull_request_url = Some(url);
            }
        }
        let mut differing = self.differing(repo, &head, &files)?;
        if self.has_any(repo, &head, &stale)? {
            differing.extend(stale);
        }
        if !differing.is_empty() {
            return Err(Error::RemoteDiffers {
                repo: repo.into(),
                differing,
            });
        }
        if let Some(tag) = &options.tag {
            self.tag(&api, repo, tag, &head)?;
        }
        Ok(Pushed {
            repo: repo.into(),
            branch,
            url: format!("{}/{repo}", self.endpoint()),
            commit: head,
            pull_request_url,
            files: files.len(),
            bytes_sent,
            unchanged: files.iter().filter(|f| f.unchanged).count(),
        })
    }

    /// Makes the repository and the branch, as far as they are not there.
    pub(super) fn prepare(
        &self,
        api: &HFClientSync,
        repo: &str,
        branch: &str,
        options: &PushOptions,
    ) -> Result<()> {
        let (owner, name) = hf_hub::split_id(repo);
        let made = api
            .create_repository()
            .repo_id(repo)
            .repo_type(RepoTypeModel)
            .private(options.private)
            .exist_ok(true)
            .send()
            .map_err(|e| self.understand(e, "create the repository", repo, "main"));
        match made {
            Ok(_) => {}
            // a token for one repository may write to it, and make none
            Err(refused @ Error::Forbidden { .. }) => {
                self.commit_of(repo, "main").map_err(|_| refused)?;
            }
            Err(other) => return Err(other),
        }
        if options.private && self.info(repo, "main")?["private"] == false {
            return Err(Error::NotPrivate { repo: repo.into() });
        }
        if branch == "main" {
            return Ok(());
        }
        if branch.starts_with(PULL_REQUESTS) {
            // it is opened by a commit, never made by its name
            return self.commit_of(repo, branch).map(drop);
        }
        let remote = api.model(owner, name);
        let is_there = || -> Result<bool> {
            let refs = remote
                .list_refs()
                .send()
                .map_err(|e| self.understand(e, READ, repo, branch))?;
            Ok(refs.branches.iter().any(|b| b.name == branch))
        };
        if is_there()? {
            return Ok(());
        }
        match remote.create_branch().branch(branch).send() {
            Ok(()) => Ok(()),
            // made by a request whose answer was lost, or by somebody else
            Err(_) if is_there()? => Ok(()),
            Err(error) => Err(self.understand(error, "create a branch", repo, branch)),
        }
    }

    /// Names a commit; a tag that names it already is fine.
    fn tag(&self, api: &HFClientSync, repo: &str, tag: &str, commit: &str) -> Result<()> {
        let (owner, name) = hf_hub::split_id(repo);
        let remote = api.model(owner, name);
        let made = remote.create_tag().tag(tag).revision(commit).send();
        let Err(error) = made else {
            return Ok(());
        };
        let refs = remote
            .list_refs()
            .send()
            .map_err(|e| self.understand(e, READ, repo, commit))?;
        match refs.tags.into_iter().find(|there| there.name == tag) {
            Some(there) if there.target_commit == commit => Ok(()),
            Some(there) => Err(Error::TagTaken {
                repo: repo.into(),
                tag: tag.into(),
                commit: there.target_commit,
            }),
            None => Err(self.understand(error, "tag a commit", repo, commit)),
        }
    }

    /// Whether a commit holds one of these files.
    fn has_any(&self, repo: &str, commit: &str, names: &[String]) -> Result<bool> {
        if names.is_empty() {
            return Ok(false);
        }
        let files = self.files(repo, commit)?;
        Ok(files.iter().any(|file| names.contains(&file.path)))
    }

    /// The files that a commit holds otherwise, or not at all, by hash.
    fn differing<'a>(
        &self,
        repo: &str,
        commit: &str,
        files: impl IntoIterator<Item = &'a LocalFile>,
    ) -> Result<Vec<String>> {
        let remote = self.files(repo, commit)?;
        let there: std::collections::HashMap<&str, &str> = remote
            .iter()
            .map(|file| (file.path.as_str(), file.oid.as_str()))
            .collect();
        let differs = |file: &&LocalFile| there.get(file.name.as_str()).copied() != file.oid();
        let files = files.into_iter().filter(differs);
        Ok(files.map(|file| file.name.clone()).collect())
    }
}

impl Push<'_> {
    /// Asks which files go through LFS, and which are there already.
    fn preupload(&self, files: &mut [LocalFile]) -> Result<()> {
        let url = self.revision_url("preupload");
        let what = Asked::of("publish", url, self.repo, &self.revision);
        for batch in files.chunks_mut(PREUPLOAD_FILES) {
            let asked: Vec<Value> = batch
                .iter()
                .map(|file| {
                    let mut sample = Vec::new();
                    let opened = File::open(&file.path).context("open", &file.path)?;
                    opened
                        .take(512)
                        .read_to_end(&mut sample)
                        .context("read", &file.path)?;
                    Ok(json!({"path": file.name, "size": file.size, "sample": STANDARD.encode(sample)}))
                })
                .collect::<Result<_>>()?;
            let body = json!({ "files": asked });
            let post = |url: &str| self.hub.request(Method::POST, url).json(&body);
            let (answer, _): (Value, _) = self.hub.answer(&what, &post)?;
            for file in batch {
                let mut all = answer["files"].as_array().into_iter().flatten();
                let Some(told) = all.find(|told| told["path"] == file.name.as_str()) else {
                    return Err(Error::HubStatus {
                        status: 200,
                        request: what.action.into(),
                        detail: format!("its answer does not say how `{}` travels", file.name),
                    });
                };
                let large = told["uploadMode"] == "lfs" || file.size > INLINE_BYTES_MAX;
                // S3 takes no empty objects (501), whatever .gitattributes says of their names
                file.lfs = large && file.size > 0;
                file.unchanged = told["oid"]
                    .as_str()
                    .is_some_and(|oid| Some(oid) == file.oid());
            }
        }
        Ok(())
    }

    /// One commit on top of `parent`, in which some files are `gone`.
    ///
    /// Where its answer is lost, the Hub is asked whether it has landed before it is sent once more.
    fn commit(
        &self,
        parent: &str,
        batch: &[&LocalFile],
        gone: &[String],
        title: &str,
    ) -> Result<Landed> {
        let body = commit_body(parent, batch, gone, title)?;
        let before = self.pull_requests()?;
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let error = match self.send_commit(&body) {
                Ok(landed) => return Ok(landed),
                Err(error) => error,
            };
            let wait = match &error {
                // not carried out
                Error::RateLimited { retry_after_s }
                    if Duration::from_secs(*retry_after_s) <= WAIT_MAX =>
                {
                    Duration::from_secs(*retry_after_s)
                }
                error if is_lost(error) => pause,
                Error::BranchMoved { .. } if attempt > 1 => pause,
                _ => return Err(error),
            };
            // the Hub may be at it still
            std::thread::sleep(wait.max(pause));
            if let Some(landed) = self.landed(parent, batch, gone, &before)? {
                tracing::debug!(
                    commit = landed.commit,
                    "the commit whose answer was lost is there"
                );
                return Ok(landed);
            }
            if attempt == TRIES {
                return Err(error);
            }
            pause *= 2;
        }
        unreachable!("the last try returns")
    }

    fn send_commit(&self, body: &str) -> Result<Landed> {
        let url = self.revision_url("commit");
        let what = Asked::of("commit", url, self.repo, &self.revision);
        let response = self.hub.send_once(&what, &|url| {
            self.hub
                .request(Method::POST, url)
                .header("Content-Type", "application/x-ndjson")
                .timeout(self.hub.upload_patience(body.len() as u64))
                .body(body.to_owned())
        })?;
        let answer: Value = self.hub.json(&what, response)?;
        match answer["commitOid"].as_str() {
            Some(commit) => Ok(Landed {
                commit: commit.into(),
                pull_request_url: answer["pullRequestUrl"].as_str().map(str::to_string),
            }),
            None => Err(Error::AnswerCut {
                request: what.action.into(),
            }),
        }
    }

    /// The commit that holds a batch, if it landed on `parent`, or in a pull request that was not there `before`.
    fn landed(
        &self,
        parent: &str,
        batch: &[&LocalFile],
        gone: &[String],
        before: &BTreeSet<(String, String)>,
    ) -> Result<Option<Landed>> {
        let holds = |commit: &str| -> Result<bool> {
            let differing = self
                .hub
                .differing(self.repo, commit, batch.iter().copied())?;
            Ok(differing.is_empty() && !self.hub.has_any(self.repo, commit, gone)?)
        };
        if self.opens_pull_request() {
            for (name, commit) in self.pull_requests()?.difference(before) {
                if holds(commit)? {
                    let number = name.rsplit('/').next().unwrap_or_default();
                    return Ok(Some(Landed {
                        commit: commit.clone(),
                        pull_request_url: Some(self.discussion_url(number)),
                    }));
                }
            }
            return Ok(None);
        }
        let head = self.hub.commit_of(self.repo, &self.revision)?;
        if head == parent {
            return Ok(None);
        }
        if holds(&head)? {
            return Ok(Some(Landed {
                commit: head,
                pull_request_url: None,
            }));
        }
        Err(Error::BranchMoved {
            repo: self.repo.into(),
            branch: self.revision.clone(),
            detail: format!("{head} is not ours"),
        })
    }

    /// An open pull request that proposes just these files, or some of them: a run that was killed has left it.
    ///
    /// One that holds all, and none of the `gone`, is as good as ours. One that holds some is ours if it has the title of the
    /// `first` of several commits, if we opened it, and if it changes nothing else at `head`.
    fn waiting_pull_request(
        &self,
        files: &[LocalFile],
        gone: &[String],
        head: &str,
        first: Option<&str>,
    ) -> Result<Option<Waiting>> {
        const LOOKED_AT: usize = 20;
        if !self.opens_pull_request() {
            return Ok(None);
        }
        let query = "discussions?type=pull_request&status=open";
        let url = self.hub.api_url(self.repo, query);
        let what = Asked::of("list pull requests", url, self.repo, &self.revision);
        let get = |url: &str| self.hub.request(Method::GET, url);
        // a repository may have none, or not let us see them: then a new one is opened
        let Ok((answer, _)) = self.hub.answer::<Value>(&what, &get) else {
            return Ok(None);
        };
        let listed = answer["discussions"].as_array().into_iter().flatten();
        let open = listed.filter(|it| it["isPullRequest"] == true && it["status"] == "open");
        for it in open.take(LOOKED_AT) {
            let Some(number) = it["num"].as_u64() else {
                continue;
            };
            let commit = self
                .hub
                .commit_of(self.repo, &format!("{PULL_REQUESTS}{number}"))?;
            let differing = self.hub.differing(self.repo, &commit, files)?;
            let held: BTreeSet<String> = files
                .iter()
                .filter(|file| !differing.contains(&file.name))
                .map(|file| file.name.clone())
                .collect();
            let touched: BTreeSet<String> = held.iter().chain(gone).cloned().collect();
            let is_whole = differing.is_empty() && !self.hub.has_any(self.repo, &commit, gone)?;
            let is_ours = is_whole
                || first.is_some_and(|title| it["title"] == title)
                    && self.have_opened(it)
                    && self.differs_in(head, &commit, &touched)?;
            if is_ours {
                return Ok(Some(Waiting {
                    number,
                    commit,
                    held,
                }));
            }
        }
        Ok(None)
    }

    /// Whether we have opened a pull request, as far as the Hub says who we are.
    fn have_opened(&self, request: &Value) -> bool {
        let url = format!("{}/api/whoami-v2", self.hub.endpoint());
        let what = Asked::of("ask who we are", url, self.repo, &self.revision);
        let get = |url: &str| self.hub.request(Method::GET, url);
        match self.hub.answer::<Value>(&what, &get) {
            Ok((who, _)) => who["name"] == request["author"]["name"],
            // the token of a job may have no name
            Err(_) => true,
        }
    }

    /// Whether two commits differ in files of these names, and in no others.
    fn differs_in(&self, before: &str, after: &str, names: &BTreeSet<String>) -> Result<bool> {
        let others = |commit: &str| -> Result<BTreeSet<(String, String)>> {
            let files = self.hub.files(self.repo, commit)?.into_iter();
            let files = files.filter(|file| !names.contains(&file.path));
            Ok(files.map(|file| (file.path, file.oid)).collect())
        };
        Ok(!names.is_empty() && others(before)? == others(after)?)
    }

    fn discussion_url(&self, number: impl Display) -> String {
        format!("{}/{}/discussions/{number}", self.hub.endpoint(), self.repo)
    }

    /// Every pull request with its commit, where one is about to be opened.
    fn pull_requests(&self) -> Result<BTreeSet<(String, String)>> {
        if !self.opens_pull_request() {
            return Ok(BTreeSet::new());
        }
        let (owner, name) = hf_hub::split_id(self.repo);
        let refs = self
            .hub
            .api()?
            .model(owner, name)
            .list_refs()
            .include_pull_requests(true)
            .send()
            .map_err(|e| self.hub.understand(e, READ, self.repo, &self.revision))?;
        let requests = refs.pull_requests.into_iter();
        Ok(requests.map(|it| (it.git_ref, it.target_commit)).collect())
    }

    /// Whether the next commit proposes a change where none is proposed yet.
    pub fn opens_pull_request(&self) -> bool {
        self.options.pull_request && !self.revision.starts_with(PULL_REQUESTS)
    }

    /// What git calls the revision.
    pub fn git_ref(&self) -> String {
        match self.revision.starts_with(PULL_REQUESTS) {
            true => self.revision.clone(),
            false => format!("refs/heads/{}", self.revision),
        }
    }

    pub fn revision_url(&self, verb: &str) -> String {
        let query = if self.opens_pull_request() {
            "?create_pr=1"
        } else {
            ""
        };
        let rest = format!("{verb}/{}{query}", segment(&self.revision));
        self.hub.api_url(self.repo, &rest)
    }
}

/// What is to be committed together: weights first, what names them later, the card in the last commit.
fn batches(files: &[LocalFile]) -> Vec<Vec<&LocalFile>> {
    let mut changed: Vec<&LocalFile> = files.iter().filter(|f| !f.unchanged).collect();
    changed.sort_by_key(|file| file.turn());
    let mut batches: Vec<Vec<&LocalFile>> = Vec::new();
    let mut inline = 0;
    for file in changed {
        let bytes = if file.lfs { 0 } else { file.size };
        let fits = |batch: &&mut Vec<&LocalFile>| {
            batch.len() < COMMIT_FILES && inline + bytes <= COMMIT_BYTES
        };
        match batches.last_mut().filter(fits) {
            Some(batch) => {
                batch.push(file);
                inline += bytes;
            }
            None => {
                batches.push(vec![file]);
                inline = bytes;
            }
        }
    }
    batches
}

fn commit_body(parent: &str, batch: &[&LocalFile], gone: &[String], title: &str) -> Result<String> {
    let header = json!({"key": "header", "value":
        {"summary": title, "description": "", "parentCommit": parent}});
    let mut body = header.to_string();
    for file in batch {
        let line = if file.lfs {
            json!({"key": "lfsFile", "value":
                {"path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.size}})
        } else {
            let bytes = std::fs::read(&file.path).context("read", &file.path)?;
            json!({"key": "file", "value":
                {"path": file.name, "content": STANDARD.encode(bytes), "encoding": "base64"}})
        };
        body.push('\n');
        body.push_str(&line.to_string());
    }
    for name in gone {
        body.push('\n');
        body.push_str(&json!({"key": "deletedFile", "value": {"path": name}}).to_string());
    }
    Ok(body)
}

/// Whether a request may have been carried out although its answer was none.
fn is_lost(error: &Error) -> bool {
    match error {
        Error::AnswerCut { .. } | Error::HubUnreachable { .. } => true,
        Error::HubStatus { status, .. } => matches!(status, 200 | 408 | 500..),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::local::Stamp;

    fn file(name: &str, size: u64, lfs: bool) -> LocalFile {
        LocalFile {
            name: name.into(),
            path: name.into(),
            size,
            sha256: String::new(),
            blob_id: None,
            lfs,
            unchanged: false,
            stamp: Stamp::default(),
        }
    }

    #[test]
    fn the_card_and_what_names_the_weights_come_last() {
        let mut files = vec![
            file("README.md", 100, false),
            file("config.json", 100, false),
            file("model.safetensors.index.json", 100, false),
        ];
        files.extend((0..120).map(|i| file(&format!("model-{i}.safetensors"), 1 << 30, true)));
        files.push(file("tokenizer.json", 9_000_000, false));
        files.push(file("merges.txt", 9_000_000, false));
        let batches = batches(&files);
        let sizes: Vec<usize> = batches.iter().map(Vec::len).collect();
        assert_eq!(sizes, [50, 50, 21, 4]);
        assert_eq!(sizes.iter().sum::<usize>(), files.len());
        let last: Vec<&str> = batches[3].iter().map(|file| file.name.as_str()).collect();
        let expected = [
            "merges.txt",
            "config.json",
            "model.safetensors.index.json",
            "README.md",
        ];
        assert_eq!(last, expected);
        assert!(super::batches(&[]).is_empty());
    }
}
