//! A directory to the Hub: large files through LFS, everything in one commit, and then compared with what arrived.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hf_hub::RepoTypeModel;
use reqwest::Method;
use reqwest::blocking::Body;
use serde_json::{Value, json};

use super::client::{Asked, Hub, UPLOAD_TIMEOUT, segment};
use super::download::{git_blob_id, local_digest};
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};

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
}

impl Default for PushOptions {
    fn default() -> Self {
        Self {
            private: false,
            branch: None,
            pull_request: false,
            tag: None,
            message: "Upload with svdhub".into(),
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

/// One file to push.
#[derive(Debug, Clone)]
struct LocalFile {
    name: String,
    path: PathBuf,
    size: u64,
    sha256: String,
    lfs: bool,
    unchanged: bool,
}

/// Files of one preupload request, as the Hub's clients do.
const PREUPLOAD_FILES: usize = 256;

/// The files of a directory that are published: no hidden ones, no folders, links only if they lead to files.
pub fn published_files(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).context("list", dir)? {
        let entry = entry.context("list", dir)?;
        if let Ok(name) = entry.file_name().into_string()
            && !name.starts_with('.')
            && entry.path().is_file()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

impl Hub {
    /// Pushes every file of `dir` in one commit: it lands whole or not at all.
    pub fn push(
        &self,
        dir: &Path,
        repo: &str,
        options: &PushOptions,
        observer: &dyn Observer,
    ) -> Result<Pushed> {
        if self.options.offline {
            return Err(Error::Offline { repo: repo.into() });
        }
        let api = self.api()?;
        let (owner, name) = hf_hub::split_id(repo);
        api.create_repository()
            .repo_id(repo)
            .repo_type(RepoTypeModel)
            .private(options.private)
            .exist_ok(true)
            .send()
            .map_err(|e| self.understand(e, repo, "main"))?;
        let branch = options.branch.clone().unwrap_or_else(|| "main".into());
        let remote = api.model(owner, name);
        if branch != "main" {
            let refs = remote
                .list_refs()
                .send()
                .map_err(|e| self.understand(e, repo, &branch))?;
            if !refs.branches.iter().any(|b| b.name == branch) {
                remote
                    .create_branch()
                    .branch(&branch)
                    .send()
                    .map_err(|e| self.understand(e, repo, &branch))?;
            }
        }
        let parent = self.commit_of(repo, &branch)?;
        let mut files = self.local_files(dir, observer)?;
        self.preupload(repo, &branch, options, &mut files)?;
        let bytes_sent = self.send_large(repo, &branch, &files, observer)?;
        let answer = self.commit(repo, &branch, &parent, options, &files)?;
        let commit = answer["commitOid"].as_str().unwrap_or(&parent).to_string();
        self.compare(repo, &commit, &files)?;
        if let Some(tag) = &options.tag {
            remote
                .create_tag()
                .tag(tag)
                .revision(&commit)
                .send()
                .map_err(|e| self.understand(e, repo, &branch))?;
        }
        Ok(Pushed {
            repo: repo.into(),
            branch,
            url: format!("{}/{repo}", self.endpoint()),
            commit,
            pull_request_url: answer["pullRequestUrl"].as_str().map(str::to_string),
            files: files.len(),
            bytes_sent,
            unchanged: files.iter().filter(|f| f.unchanged).count(),
        })
    }

    fn local_files(&self, dir: &Path, observer: &dyn Observer) -> Result<Vec<LocalFile>> {
        let names = published_files(dir)?;
        let size = |name: &String| std::fs::metadata(dir.join(name)).map_or(0, |m| m.len());
        observer.start(Stage::Hash, names.iter().map(size).sum(), Unit::Bytes);
        let files = names
            .into_iter()
            .map(|name| {
                let path = dir.join(&name);
                let (sha256, size) = local_digest(&path)?;
                observer.advance(Stage::Hash, size, &name);
                Ok(LocalFile {
                    name,
                    path,
                    size,
                    sha256,
                    lfs: false,
                    unchanged: false,
                })
            })
            .collect();
        observer.finish(Stage::Hash);
        files
    }

    /// Asks which files go through LFS, and which are there already.
    fn preupload(
        &self,
        repo: &str,
        branch: &str,
        options: &PushOptions,
        files: &mut [LocalFile],
    ) -> Result<()> {
        let query = if options.pull_request {
            "?create_pr=1"
        } else {
            ""
        };
        let url = format!(
            "{}/api/models/{repo}/preupload/{}{query}",
            self.endpoint(),
            segment(branch)
        );
        let what = asked("publish", url, repo, branch);
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
            let response = self.send(&what, &|url| self.request(Method::POST, url).json(&body))?;
            let answer: Value = self.json(&what, response)?;
            for told in answer["files"].as_array().into_iter().flatten() {
                let Some(file) = batch.iter_mut().find(|f| told["path"] == f.name.as_str()) else {
                    continue;
                };
                file.lfs = told["uploadMode"] == "lfs";
                if let Some(oid) = told["oid"].as_str() {
                    file.unchanged = oid == file.remote_oid()?;
                }
            }
        }
        Ok(())
    }

    /// Sends the contents of LFS files that the Hub does not have.
    fn send_large(
        &self,
        repo: &str,
        branch: &str,
        files: &[LocalFile],
        observer: &dyn Observer,
    ) -> Result<u64> {
        let large: Vec<&LocalFile> = files.iter().filter(|f| f.lfs && !f.unchanged).collect();
        if large.is_empty() {
            return Ok(0);
        }
        let url = format!("{}/{repo}.git/info/lfs/objects/batch", self.endpoint());
        let what = asked("upload a large file", url, repo, branch);
        let objects: Vec<Value> = large
            .iter()
            .map(|f| json!({"oid": f.sha256, "size": f.size}))
            .collect();
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "hash_algo": "sha256",
            "ref": {"name": format!("refs/heads/{branch}")},
            "objects": objects,
        });
        let response = self.send(&what, &|url| {
            self.request(Method::POST, url)
                .header("Accept", "application/vnd.git-lfs+json")
                .header("Content-Type", "application/vnd.git-lfs+json")
                .body(body.to_string())
        })?;
        let answer: Value = self.json(&what, response)?;
        observer.start(
            Stage::Upload,
            large.iter().map(|f| f.size).sum(),
            Unit::Bytes,
        );
        let mut sent = 0;
        for file in large {
            let objects = answer["objects"].as_array();
            let told = objects
                .into_iter()
                .flatten()
                .find(|o| o["oid"] == file.sha256.as_str());
            let Some(told) = told else {
                return Err(Error::HubStatus {
                    status: 200,
                    request: what.action.into(),
                    detail: format!("its answer does not say where `{}` goes", file.name),
                });
            };
            if let Some(message) = told["error"]["message"].as_str() {
                return Err(Error::HubStatus {
                    status: told["error"]["code"].as_u64().unwrap_or(0) as u16,
                    request: what.action.into(),
                    detail: message.into(),
                });
            }
            let upload = &told["actions"]["upload"];
            if upload.is_object() {
                self.send_object(repo, branch, file, upload)?;
                sent += file.size;
            }
            let verify = &told["actions"]["verify"];
            if let Some(href) = verify["href"].as_str() {
                let body = json!({"oid": file.sha256, "size": file.size});
                let what = asked("confirm an upload", href.into(), repo, branch);
                self.send(&what, &|url| {
                    with_headers(self.request(Method::POST, url), &verify["header"]).json(&body)
                })?;
            }
            observer.advance(Stage::Upload, file.size, &file.name);
        }
        observer.finish(Stage::Upload);
        Ok(sent)
    }

    /// One object: in one piece, or in the parts the Hub asks for.
    fn send_object(
        &self,
        repo: &str,
        branch: &str,
        file: &LocalFile,
        upload: &Value,
    ) -> Result<()> {
        let href = upload["href"].as_str().unwrap_or_default().to_string();
        let header = &upload["header"];
        let chunk = header["chunk_size"]
            .as_str()
            .and_then(|size| size.parse::<u64>().ok())
            .filter(|&size| size > 0);
        let Some(chunk) = chunk else {
            self.put(repo, branch, file, &href, 0, file.size, header)?;
            return Ok(());
        };
        let mut parts = Vec::new();
        for (number, start) in (0..file.size).step_by(chunk as usize).enumerate() {
            let number = number + 1;
            let part = header[format!("{number:05}")]
                .as_str()
                .unwrap_or_default()
                .to_string();
            let length = chunk.min(file.size - start);
            let etag = self.put(repo, branch, file, &part, start, length, &Value::Null)?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let body = json!({"oid": file.sha256, "parts": parts});
        let what = asked("complete an upload", href, repo, branch);
        self.send(&what, &|url| self.request(Method::POST, url).json(&body))?;
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn put(
        &self,
        repo: &str,
        branch: &str,
        file: &LocalFile,
        href: &str,
        start: u64,
        length: u64,
        header: &Value,
    ) -> Result<String> {
        use std::io::{Seek, SeekFrom};
        let what = asked("upload a large file", href.into(), repo, branch);
        // opened before the request is built, so that a missing file is an error of its own
        File::open(&file.path).context("open", &file.path)?;
        let response = self.send(&what, &|url| {
            let request =
                with_headers(self.request(Method::PUT, url), header).timeout(UPLOAD_TIMEOUT);
            let body = File::open(&file.path).and_then(|mut opened| {
                opened.seek(SeekFrom::Start(start))?;
                Ok(opened.take(length))
            });
            match body {
                Ok(body) => request.body(Body::sized(body, length)),
                Err(_) => request,
            }
        })?;
        let etag = response.headers().get("etag").and_then(|e| e.to_str().ok());
        Ok(etag.unwrap_or_default().to_string())
    }

    /// One commit with everything that changed. It is sent once: a repeated commit could land twice.
    fn commit(
        &self,
        repo: &str,
        branch: &str,
        parent: &str,
        options: &PushOptions,
        files: &[LocalFile],
    ) -> Result<Value> {
        let changed: Vec<&LocalFile> = files.iter().filter(|f| !f.unchanged).collect();
        if changed.is_empty() {
            return Ok(json!({ "commitOid": parent }));
        }
        let header = json!({"key": "header", "value":
            {"summary": options.message, "description": "", "parentCommit": parent}});
        let mut lines = vec![header.to_string()];
        for file in changed {
            let line = if file.lfs {
                json!({"key": "lfsFile", "value":
                    {"path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.size}})
            } else {
                let bytes = std::fs::read(&file.path).context("read", &file.path)?;
                json!({"key": "file", "value":
                    {"path": file.name, "content": STANDARD.encode(bytes), "encoding": "base64"}})
            };
            lines.push(line.to_string());
        }
        let body = lines.join("\n");
        let query = if options.pull_request {
            "?create_pr=1"
        } else {
            ""
        };
        let url = format!(
            "{}/api/models/{repo}/commit/{}{query}",
            self.endpoint(),
            segment(branch)
        );
        let what = asked("commit", url, repo, branch);
        let response = self.send_once(&what, || {
            self.request(Method::POST, &what.url)
                .header("Content-Type", "application/x-ndjson")
                .timeout(UPLOAD_TIMEOUT)
                .body(body)
        })?;
        self.json(&what, response)
    }

    /// Compares the commit's files with the local ones by hash.
    fn compare(&self, repo: &str, commit: &str, files: &[LocalFile]) -> Result<()> {
        let remote = self.files(repo, commit)?;
        let mut differing = Vec::new();
        for file in files {
            let expected = file.remote_oid()?;
            let there = remote.iter().find(|r| r.path == file.name);
            if there.is_none_or(|r| r.oid != expected) {
                differing.push(file.name.clone());
            }
        }
        if differing.is_empty() {
            Ok(())
        } else {
            Err(Error::RemoteDiffers {
                repo: repo.into(),
                differing,
            })
        }
    }
}

impl LocalFile {
    /// The id under which the Hub keeps these contents.
    fn remote_oid(&self) -> Result<String> {
        if self.lfs {
            return Ok(self.sha256.clone());
        }
        let bytes = std::fs::read(&self.path).context("read", &self.path)?;
        Ok(git_blob_id(&bytes))
    }
}

fn asked(action: &'static str, url: String, repo: &str, revision: &str) -> Asked {
    Asked {
        action,
        url,
        repo: repo.into(),
        revision: revision.into(),
        file: String::new(),
    }
}

fn with_headers(
    mut request: reqwest::blocking::RequestBuilder,
    headers: &Value,
) -> reqwest::blocking::RequestBuilder {
    for (name, value) in headers.as_object().into_iter().flatten() {
        if let Some(value) = value.as_str() {
            request = request.header(name, value);
        }
    }
    request
}
