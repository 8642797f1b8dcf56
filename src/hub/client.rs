//! One connection to one Hub: who we are, how requests are made, and what its answers mean.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use hf_hub::{HFClientSync, HFError};
use reqwest::blocking::{Client, RequestBuilder, Response};
use reqwest::header::{AUTHORIZATION, HeaderMap, LINK, LOCATION, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::weights::header::HEADER_BYTES_MAX;

/// An access token. It shows itself nowhere but in the header it is made for.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        out.write_str("Token(…)")
    }
}

/// Everything a client depends on: nothing is read from the environment here.
#[derive(Debug, Clone)]
pub struct HubOptions {
    pub endpoint: String,
    pub token: Option<Token>,
    /// The cache shared with Python's huggingface_hub (`…/hub`).
    pub cache: PathBuf,
    pub offline: bool,
}

/// A Hub.
#[derive(Debug)]
pub struct Hub {
    pub options: HubOptions,
    http: Client,
}

/// One file of a repository, as the Hub lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    pub path: String,
    pub size: u64,
    /// sha256 of an LFS file, git blob sha1 of a regular one: the ETag of its download.
    pub oid: String,
    pub lfs: bool,
}

const TRIES: u32 = 5;
/// Of a listing: a thousand files are on each.
const PAGES_MAX: usize = 1000;
/// Of a refusal, so much is read for its message.
const ERROR_BYTES_MAX: u64 = 64 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Without a byte for this long, a transfer is dead.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// The answer to an upload comes when all of it has arrived.
pub(super) const UPLOAD_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// A Hub may ask for more patience than a user has.
const WAIT_MAX: Duration = Duration::from_secs(300);

impl Hub {
    /// Prepares a client; nothing is sent yet.
    pub fn new(options: HubOptions) -> Result<Self> {
        let http = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            // in the blocking client: of waiting for an answer, and of each single read of its body
            .timeout(READ_TIMEOUT)
            // an upload that nobody acknowledges any more
            .tcp_user_timeout(READ_TIMEOUT)
            .redirect(Policy::none())
            .user_agent(concat!("svdhub/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| unreachable(&options.endpoint, e))?;
        Ok(Self { options, http })
    }

    pub fn endpoint(&self) -> &str {
        self.options.endpoint.trim_end_matches('/')
    }

    /// hf-hub with our endpoint and token: passed on always, because its 1.1 stops reading the environment.
    pub(super) fn api(&self) -> Result<HFClientSync> {
        let mut builder = hf_hub::HFClient::builder()
            .endpoint(self.endpoint())
            .cache_dir(&self.options.cache)
            .retry_max_attempts(3)
            .user_agent(concat!("svdhub/", env!("CARGO_PKG_VERSION")));
        if let Some(Token(token)) = &self.options.token {
            builder = builder.token(token);
        }
        builder
            .build_sync()
            .map_err(|e| self.understand(e, "", "main"))
    }

    /// The commit a revision names now.
    ///
    /// Asked without hf-hub, which takes a missing repository for a missing revision (1.0.0).
    pub fn commit_of(&self, repo: &str, revision: &str) -> Result<String> {
        if self.options.offline {
            return Err(Error::Offline { repo: repo.into() });
        }
        let what = Asked {
            action: "read the repository",
            url: format!(
                "{}/api/models/{repo}/revision/{}",
                self.endpoint(),
                segment(revision)
            ),
            repo: repo.into(),
            revision: revision.into(),
            file: String::new(),
        };
        let response = self.send(&what, &|url| self.request(Method::GET, url))?;
        let info: serde_json::Value = self.json(&what, response)?;
        match info["sha"].as_str() {
            Some(sha) if sha.len() == 40 && sha.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Ok(sha.into())
            }
            _ => Err(Error::HubStatus {
                status: 200,
                request: what.action.into(),
                detail: "its answer names no commit".into(),
            }),
        }
    }

    /// Every file of a commit.
    ///
    /// Asked without hf-hub, whose listing drops the sha256 of large files (1.0.0 expects it under another name).
    pub fn files(&self, repo: &str, commit: &str) -> Result<Vec<RemoteFile>> {
        #[derive(serde::Deserialize)]
        struct Entry {
            #[serde(rename = "type")]
            kind: String,
            path: String,
            oid: String,
            #[serde(default)]
            size: u64,
            lfs: Option<Large>,
        }
        #[derive(serde::Deserialize)]
        struct Large {
            oid: String,
        }
        let mut what = Asked {
            action: "list the files",
            url: format!(
                "{}/api/models/{repo}/tree/{}?recursive=true",
                self.endpoint(),
                segment(commit)
            ),
            repo: repo.into(),
            revision: commit.into(),
            file: String::new(),
        };
        let mut files = Vec::new();
        for _ in 0..PAGES_MAX {
            let response = self.send(&what, &|url| self.request(Method::GET, url))?;
            let next = next_page(response.headers());
            let entries: Vec<Entry> = self.json(&what, response)?;
            for entry in entries.into_iter().filter(|e| e.kind == "file") {
                if !stays_inside(&entry.path) {
                    return Err(Error::HostilePath {
                        repo: repo.into(),
                        name: entry.path,
                    });
                }
                let oid = entry.lfs.as_ref().map_or(&entry.oid, |lfs| &lfs.oid);
                // it names the file's contents in the cache
                let digits = if entry.lfs.is_some() { 64 } else { 40 };
                if oid.len() != digits || !oid.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(Error::HostilePath {
                        repo: repo.into(),
                        name: oid.clone(),
                    });
                }
                files.push(RemoteFile {
                    path: entry.path,
                    size: entry.size,
                    lfs: entry.lfs.is_some(),
                    oid: entry.lfs.map_or(entry.oid, |lfs| lfs.oid),
                });
            }
            match next {
                // a page elsewhere would get our token, or lead in circles
                Some(url) if self.is_ours(&url) && url != what.url => what.url = url,
                _ => return Ok(files),
            }
        }
        Err(Error::HubStatus {
            status: 200,
            request: what.action.into(),
            detail: format!("its listing goes on after {PAGES_MAX} pages"),
        })
    }

    /// The JSON of an answer.
    pub(super) fn json<T: DeserializeOwned>(&self, what: &Asked, response: Response) -> Result<T> {
        let refuse = |detail: String| Error::HubStatus {
            status: 200,
            request: what.action.into(),
            detail,
        };
        let mut text = Vec::new();
        let mut body = response.take(HEADER_BYTES_MAX);
        body.read_to_end(&mut text)
            .map_err(|e| refuse(format!("its answer broke off ({e})")))?;
        serde_json::from_slice(&text)
            .map_err(|e| refuse(format!("its answer is not what was asked for ({e})")))
    }

    pub(super) fn request(&self, method: Method, url: &str) -> RequestBuilder {
        let builder = self.http.request(method, url);
        match &self.options.token {
            // only to the Hub itself: a signed link elsewhere needs no token, and must not get one
            Some(Token(token)) if self.is_ours(url) => {
                builder.header(AUTHORIZATION, format!("Bearer {token}"))
            }
            _ => builder,
        }
    }

    fn is_ours(&self, url: &str) -> bool {
        let origin = |url: &str| {
            reqwest::Url::parse(url)
                .ok()
                .map(|u| u.origin().ascii_serialization())
        };
        origin(url).is_some() && origin(url) == origin(self.endpoint())
    }

    /// Sends a request that may be repeated, follows redirects, and turns every refusal into an [`Error`].
    ///
    /// Repeats on broken connections, 5xx and 429, waiting as long as the Hub asks.
    pub(super) fn send(
        &self,
        what: &Asked,
        build: &dyn Fn(&str) -> RequestBuilder,
    ) -> Result<Response> {
        let mut wait = Duration::from_millis(300);
        for attempt in 1.. {
            let last = attempt == TRIES;
            match self.follow(&what.url, build) {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let status = response.status();
                    let asked = retry_after(response.headers());
                    let error = self.refusal(what, response);
                    let again = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
                    if last || !again {
                        return Err(error);
                    }
                    match asked {
                        Some(asked) if asked > WAIT_MAX => return Err(error),
                        Some(asked) => wait = wait.max(asked),
                        None => {}
                    }
                    tracing::debug!(%status, attempt, "repeating {}", what.url);
                }
                Err(error) => {
                    if last || error.is_builder() || !self.reachable_later(&error) {
                        return Err(unreachable(self.endpoint(), error));
                    }
                    tracing::debug!(attempt, "repeating {} after a broken connection", what.url);
                }
            }
            std::thread::sleep(wait);
            wait *= 2;
        }
        unreachable!("the last try returns")
    }

    /// Sends a request that must not be repeated.
    pub(super) fn send_once(
        &self,
        what: &Asked,
        build: impl FnOnce() -> RequestBuilder,
    ) -> Result<Response> {
        let response = build()
            .send()
            .map_err(|e| unreachable(self.endpoint(), e))?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(self.refusal(what, response))
        }
    }

    /// A refused connection stays refused: no Hub is there. Everything else may pass.
    fn reachable_later(&self, error: &reqwest::Error) -> bool {
        !error.is_connect()
    }

    fn follow(
        &self,
        url: &str,
        build: &dyn Fn(&str) -> RequestBuilder,
    ) -> Result<Response, reqwest::Error> {
        let mut url = url.to_string();
        for _ in 0..5 {
            let response = build(&url).send()?;
            let target = response
                .headers()
                .get(LOCATION)
                .and_then(|l| l.to_str().ok());
            match target {
                Some(target) if response.status().is_redirection() => {
                    let base = response.url().clone();
                    match base.join(target) {
                        Ok(next) => url = next.into(),
                        Err(_) => return Ok(response),
                    }
                }
                _ => return Ok(response),
            }
        }
        build(&url).send()
    }

    /// What a refusal means.
    fn refusal(&self, what: &Asked, response: Response) -> Error {
        let status = response.status();
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.to_string())
        };
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        let wait = retry_after(response.headers());
        let detail = message.unwrap_or_else(|| shortened(response));
        self.meaning(what, status.as_u16(), code.as_deref(), detail, wait)
    }

    fn meaning(
        &self,
        what: &Asked,
        status: u16,
        code: Option<&str>,
        detail: String,
        wait: Option<Duration>,
    ) -> Error {
        let (repo, revision) = (what.repo.clone(), what.revision.clone());
        let endpoint = self.endpoint().to_string();
        match (status, code) {
            (_, Some("GatedRepo")) => Error::Gated { repo, endpoint },
            (_, Some("RepoNotFound")) => Error::RepoNotFound { repo, endpoint },
            (_, Some("RevisionNotFound")) => Error::RevisionNotFound { repo, revision },
            (_, Some("EntryNotFound")) => Error::EntryNotFound {
                repo,
                revision,
                file: what.file.clone(),
            },
            (401, _) => Error::Unauthorized { detail },
            (403, _) => Error::Forbidden {
                action: what.action.into(),
                detail,
            },
            (412, _) => Error::BranchMoved {
                repo,
                branch: revision,
                detail,
            },
            (429, _) => Error::RateLimited {
                retry_after_s: wait.map_or(60, |w| w.as_secs()),
            },
            _ => Error::HubStatus {
                status,
                request: what.action.into(),
                detail,
            },
        }
    }

    /// What an error of hf-hub means, in our terms. Its own texts hold URLs, never tokens.
    pub(super) fn understand(&self, error: HFError, repo: &str, revision: &str) -> Error {
        let what = Asked {
            action: "read the repository",
            url: String::new(),
            repo: repo.into(),
            revision: revision.into(),
            file: String::new(),
        };
        // the type of hf-hub's context cannot be named, its fields can
        macro_rules! told {
            ($context:expr, $wait:expr) => {{
                let context = $context;
                let detail = context
                    .server_message
                    .clone()
                    .unwrap_or_else(|| context.status.to_string());
                let code = context.error_code.as_deref();
                self.meaning(&what, context.status.as_u16(), code, detail, $wait)
            }};
        }
        match error {
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context } => told!(context, None),
            HFError::RateLimited {
                retry_after,
                context,
            } => told!(context, retry_after),
            HFError::RepoNotFound { context, .. } => match context {
                Some(context) if context.status == StatusCode::UNAUTHORIZED => {
                    told!(context, None)
                }
                _ => Error::RepoNotFound {
                    repo: repo.into(),
                    endpoint: self.endpoint().into(),
                },
            },
            HFError::RevisionNotFound { .. } => Error::RevisionNotFound {
                repo: repo.into(),
                revision: revision.into(),
            },
            HFError::EntryNotFound { path, .. } => Error::EntryNotFound {
                repo: repo.into(),
                revision: revision.into(),
                file: path,
            },
            HFError::Request { source, .. } => unreachable(self.endpoint(), source),
            other => Error::HubStatus {
                status: 0,
                request: what.action.into(),
                detail: other.to_string(),
            },
        }
    }
}

/// A request in the terms of an error message.
pub(super) struct Asked {
    pub action: &'static str,
    pub url: String,
    pub repo: String,
    pub revision: String,
    pub file: String,
}

fn unreachable(endpoint: &str, error: reqwest::Error) -> Error {
    Error::HubUnreachable {
        endpoint: endpoint.into(),
        // a URL may carry a signature
        source: Box::new(error.without_url()),
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers
        .get(RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds))
}

/// The address of the next page: `<url>; rel="next"`.
fn next_page(headers: &HeaderMap) -> Option<String> {
    let links = headers.get(LINK)?.to_str().ok()?;
    let next = links
        .split(',')
        .find(|link| link.contains("rel=\"next\""))?;
    let url = next.split_once('<')?.1.split_once('>')?.0;
    Some(url.to_string())
}

/// The beginning of an answer's text, for messages.
fn shortened(response: Response) -> String {
    let status = response.status();
    let mut text = Vec::new();
    // of a page without end, the beginning too
    let _ = response.take(ERROR_BYTES_MAX).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let error = serde_json::from_str::<serde_json::Value>(&text)
        .ok()
        .and_then(|json| json["error"].as_str().map(str::to_string));
    let text = error.unwrap_or_else(|| text.trim().chars().take(200).collect());
    if text.is_empty() {
        status.to_string()
    } else {
        text
    }
}

/// Whether a repository's path names a file inside the folder it is downloaded to.
fn stays_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.contains(['\\', '\0', ':'])
        && path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..")
}

/// One path segment of a URL.
pub(super) fn segment(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                (b as char).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}

/// A path of several segments in a URL.
pub(super) fn segments(path: &str) -> String {
    path.split('/').map(segment).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_folder_are_seen() {
        for bad in [
            "../x",
            "a/../../x",
            "/etc/passwd",
            "a//b",
            "",
            "a\\b",
            "C:x",
            "a/./b",
            "x\0y",
        ] {
            assert!(!stays_inside(bad), "{bad:?}");
        }
        for good in ["a", "a/b.c", "..a/b", "model-00001-of-00002.safetensors"] {
            assert!(stays_inside(good), "{good:?}");
        }
    }

    #[test]
    fn the_token_goes_to_the_hub_alone() {
        let hub = Hub::new(HubOptions {
            endpoint: "http://127.0.0.1:9".into(),
            token: Some(Token::new("hf_secret")),
            cache: "/nowhere".into(),
            offline: false,
        })
        .expect("builds");
        let carries = |url: &str| {
            let request = hub
                .request(reqwest::Method::GET, url)
                .build()
                .expect("a request");
            request.headers().contains_key(AUTHORIZATION)
        };
        assert!(carries("http://127.0.0.1:9/api/x"));
        assert!(!carries("http://127.0.0.1:10/api/x"));
        assert!(!carries("http://127.0.0.1.evil.example/api"));
        assert!(!format!("{hub:?}").contains("hf_secret"));
    }
}
