//! One connection to one Hub: who we are, how requests are made, and what its answers mean.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use hf_hub::HFClientSync;
use reqwest::blocking::{Client, RequestBuilder, Response};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::redirect::Policy;
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::oidc::{Login, Minted};
use super::refusal::{unreachable, wait_asked, without};
use super::sender::Sender;
use super::xet::Engine;
use crate::error::{Error, Result};
use crate::sum::is_hex;
use crate::weights::header::HEADER_BYTES_MAX;

/// An access token. It shows itself nowhere but in the header it is made for.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl Token {
    /// Its text, for the one place in a body where it belongs, and to be found where it does not.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }

    /// The header it is made for, which the logs of other crates do not show either.
    pub(super) fn bearer(&self) -> HeaderValue {
        let text = format!("Bearer {}", self.0);
        // a token with a line break in it is none, and the Hub says so
        let mut value = HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("Bearer ?"));
        value.set_sensitive(true);
        value
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
    /// Who a job of a CI system is; where this is given, the token is not used.
    pub login: Option<Login>,
    /// The cache shared with Python's huggingface_hub (`…/hub`).
    pub cache: PathBuf,
    /// Where Xet remembers what it has sent (`…/xet`); with none, large files travel by HTTP and LFS alone.
    pub xet: Option<PathBuf>,
    pub offline: bool,
    /// Without a byte for this long, a transfer is dead.
    pub patience: Duration,
}

impl HubOptions {
    /// An anonymous client, which keeps what Xet remembers beside the cache.
    pub fn new(endpoint: impl Into<String>, cache: impl Into<PathBuf>) -> Self {
        let cache = cache.into();
        Self {
            endpoint: endpoint.into(),
            token: None,
            login: None,
            xet: Some(cache.with_file_name("xet")),
            cache,
            offline: false,
            patience: PATIENCE,
        }
    }
}

/// A Hub.
#[derive(Debug)]
pub struct Hub {
    pub options: HubOptions,
    http: Client,
    /// The token that a login gave, until it expires.
    pub(super) minted: Mutex<Option<Minted>>,
    sender: OnceLock<Sender>,
    pub(super) xet: Engine,
}

/// Where models are published, unless somebody names another Hub.
pub const PUBLIC_HUB: &str = "https://huggingface.co";

pub(super) const TRIES: u32 = 5;
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);
/// The answer to an upload comes when all of it has arrived: slower than this, it has not.
const UPLOAD_BYTES_PER_S: u64 = 32 << 10;
/// A Hub may ask for more patience than a user has.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(300);
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(300);
pub(super) const USER_AGENT: &str = concat!("svdhub/", env!("CARGO_PKG_VERSION"));

/// An answer to read at once has this many times what a single reading may take.
const ANSWER_PATIENCES: u32 = 3;

impl Hub {
    /// Prepares a client; nothing is sent yet.
    ///
    /// # Errors
    /// What is no address of a server; and one with a user's name or password in it, which would be in every message.
    pub fn new(options: HubOptions) -> Result<Self> {
        let refused = |value: String, reason: &str| Error::Parse {
            what: "the address of a Hub",
            value,
            reason: reason.into(),
        };
        let url = reqwest::Url::parse(&options.endpoint).ok();
        let Some(url) = url.filter(|url| matches!(url.scheme(), "http" | "https")) else {
            // what stands before an @ may be secret
            let shown = match options.endpoint.rsplit_once('@') {
                Some((_, host)) => format!("…@{host}"),
                None => options.endpoint.clone(),
            };
            let reason = "it is not of the form https://host or http://host:port";
            return Err(refused(shown, reason));
        };
        if !(url.username().is_empty() && url.password().is_none()) {
            let host = url.host_str().unwrap_or_default();
            let shown = format!("{}://…@{host}", url.scheme());
            let reason = "it holds a name or a password: a Hub is given a token, in HF_TOKEN";
            return Err(refused(shown, reason));
        }
        let http = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            // in the blocking client: of waiting for an answer, and of each single read of its body
            .timeout(options.patience)
            // an upload that nobody acknowledges any more
            .tcp_user_timeout(options.patience)
            .redirect(Policy::none())
            .user_agent(USER_AGENT)
            .build()
            .map_err(|e| unreachable(&options.endpoint, e))?;
        Ok(Self {
            options,
            http,
            minted: Mutex::default(),
            sender: OnceLock::new(),
            xet: Engine::default(),
        })
    }

    pub fn endpoint(&self) -> &str {
        self.options.endpoint.trim_end_matches('/')
    }

    /// hf-hub with our endpoint and token: passed on always, because its 1.1 stops reading the environment.
    ///
    /// With a connection of ours too: its own has no timeouts.
    pub(super) fn api(&self) -> Result<HFClientSync> {
        self.sign_in()?;
        let connection = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(self.options.patience)
            .user_agent(USER_AGENT)
            .build()
            .map_err(|e| unreachable(self.endpoint(), e))?;
        let mut builder = hf_hub::HFClient::builder()
            .client(connection)
            .endpoint(self.endpoint())
            .cache_dir(&self.options.cache)
            .retry_max_attempts(3);
        if let Some(Token(token)) = self.token() {
            builder = builder.token(token);
        }
        builder
            .build_sync()
            .map_err(|e| self.understand(e, READ, "", "main"))
    }

    /// The commit a revision names now.
    ///
    /// Asked without hf-hub, which takes a missing repository for a missing revision (1.0.0).
    pub fn commit_of(&self, repo: &str, revision: &str) -> Result<String> {
        if self.options.offline {
            return Err(Error::Offline { repo: repo.into() });
        }
        let info = self.info(repo, revision)?;
        match info["sha"].as_str() {
            Some(sha) if is_hex(sha, 40) => Ok(sha.into()),
            _ => Err(Error::HubStatus {
                status: 200,
                request: READ.into(),
                detail: "its answer names no commit".into(),
            }),
        }
    }

    /// What the Hub tells about a repository at a revision.
    pub(super) fn info(&self, repo: &str, revision: &str) -> Result<serde_json::Value> {
        let url = self.api_url(repo, &format!("revision/{}", segment(revision)));
        let what = Asked::of(READ, url, repo, revision);
        let info = self.answer(&what, &|url| self.request(Method::GET, url))?;
        Ok(info.0)
    }

    /// Models have no kind in their name, datasets are called `datasets/org/name`.
    pub(super) fn api_url(&self, repo: &str, rest: &str) -> String {
        let kind = if is_dataset(repo) { "" } else { "models/" };
        format!("{}/api/{kind}{repo}/{rest}", self.endpoint())
    }

    /// Sends a request that may be repeated, and reads the JSON of its answer; one that breaks off is asked for again.
    pub(super) fn answer<T: DeserializeOwned>(
        &self,
        what: &Asked,
        build: &dyn Fn(&str) -> RequestBuilder,
    ) -> Result<(T, HeaderMap)> {
        let mut tries = 0;
        loop {
            tries += 1;
            let response = self.send(what, build)?;
            let headers = response.headers().clone();
            match self.json(what, response) {
                Err(Error::AnswerCut { .. }) if tries < TRIES => {}
                result => return Ok((result?, headers)),
            }
        }
    }

    /// The JSON of an answer.
    pub(super) fn json<T: DeserializeOwned>(&self, what: &Asked, response: Response) -> Result<T> {
        self.json_without(self.token().as_ref(), what, response)
    }

    /// The same; a secret that was sent is in no message.
    pub(super) fn json_without<T: DeserializeOwned>(
        &self,
        secret: Option<&Token>,
        what: &Asked,
        response: Response,
    ) -> Result<T> {
        let (text, is_whole) = self.beginning(response, HEADER_BYTES_MAX);
        if !is_whole {
            return Err(Error::AnswerCut {
                request: what.action.into(),
            });
        }
        serde_json::from_slice(&text).map_err(|e| {
            // what it found instead may be what was sent
            let found = match secret {
                Some(secret) => without(secret, &e.to_string()),
                None => e.to_string(),
            };
            Error::HubStatus {
                status: 200,
                request: what.action.into(),
                detail: format!("its answer is not what was asked for ({found})"),
            }
        })
    }

    /// The first `most` bytes of an answer's body, or what came of them in time, and whether it ended there.
    pub(super) fn beginning(&self, response: Response, most: u64) -> (Vec<u8>, bool) {
        let mut text = Vec::new();
        let mut body = response.take(most);
        // one that comes byte by byte is in time with each of them, and never ends
        let last = Instant::now() + ANSWER_PATIENCES * self.options.patience;
        let mut block = [0; 16 << 10];
        loop {
            match body.read(&mut block) {
                Ok(0) => return (text, true),
                Ok(count) if Instant::now() < last => text.extend_from_slice(&block[..count]),
                _ => return (text, false),
            }
        }
    }

    /// A request with what opens the Hub; [`Hub::send`] has signed in before.
    pub(super) fn request(&self, method: Method, url: &str) -> RequestBuilder {
        let builder = self.http.request(method, url);
        // only to the Hub itself: a signed link elsewhere needs no token, and must not get one
        match self.token().filter(|_| self.is_ours(url)) {
            Some(token) => builder.header(AUTHORIZATION, token.bearer()),
            None => builder,
        }
    }

    /// A request that shows no token.
    pub(super) fn anonymous(&self, method: Method, url: &str) -> RequestBuilder {
        self.http.request(method, url)
    }

    /// A request to somebody else, with what opens that.
    pub(super) fn foreign(&self, method: Method, url: &str, token: &Token) -> RequestBuilder {
        let builder = self.http.request(method, url);
        builder.header(AUTHORIZATION, token.bearer())
    }

    /// How long to wait for the answer to an upload.
    pub(super) fn upload_patience(&self, bytes: u64) -> Duration {
        self.options.patience + Duration::from_secs(bytes / UPLOAD_BYTES_PER_S)
    }

    pub(super) fn is_ours(&self, url: &str) -> bool {
        is_same_origin(url, self.endpoint())
    }

    /// An address in an answer of the Hub: a mirror passes on those of the public one, which names itself in them.
    pub(super) fn at_endpoint(&self, url: &str) -> String {
        match url.strip_prefix(PUBLIC_HUB) {
            Some(path) if path.starts_with('/') => format!("{}{path}", self.endpoint()),
            _ => url.into(),
        }
    }

    /// Sends a request that may be repeated, follows redirects, and turns every refusal into an [`Error`].
    ///
    /// Repeats on broken connections, 5xx and 429, waiting as long as the Hub asks; goes back to the Hub where a link it
    /// gave has expired, and signs in again where a login has.
    pub(super) fn send(
        &self,
        what: &Asked,
        build: &dyn Fn(&str) -> RequestBuilder,
    ) -> Result<Response> {
        self.send_by(what, &|url| build(url).send())
    }

    /// The same, of a request that `send` makes and sends.
    pub(super) fn send_by(
        &self,
        what: &Asked,
        send: &dyn Fn(&str) -> Result<Response, reqwest::Error>,
    ) -> Result<Response> {
        self.sign_in()?;
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let last = attempt == TRIES;
            let mut wait = pause;
            match follow(&what.url, send) {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => {
                    let status = response.status();
                    let asked = wait_asked(response.headers());
                    let elsewhere = !self.is_ours(response.url().as_str());
                    // before the login is forgotten: an answer may repeat its token
                    let error = self.refusal(what, response);
                    let expired = status == StatusCode::UNAUTHORIZED && self.forget_login();
                    let again = status.is_server_error()
                        || status == StatusCode::TOO_MANY_REQUESTS
                        || status == StatusCode::REQUEST_TIMEOUT
                        || (elsewhere
                            && self.is_ours(&what.url)
                            && status == StatusCode::FORBIDDEN)
                        || expired;
                    if last || !again {
                        return Err(error);
                    }
                    match asked {
                        Some(asked) if asked > WAIT_MAX => return Err(error),
                        Some(asked) => wait = wait.max(asked),
                        None => {}
                    }
                    if expired {
                        self.sign_in()?;
                    }
                    tracing::debug!(%status, attempt, ?wait, "repeating to {}", what.action);
                }
                Err(error) => {
                    if last || error.is_builder() || !self.reachable_later(&error) {
                        return Err(unreachable(self.endpoint(), error));
                    }
                    tracing::debug!(attempt, "broken connection: repeating to {}", what.action);
                }
            }
            std::thread::sleep(wait);
            pause *= 2;
        }
        unreachable!("the last try returns")
    }

    /// Sends a request that must not be repeated, unless it was not carried out but sent elsewhere.
    pub(super) fn send_once(
        &self,
        what: &Asked,
        build: &dyn Fn(&str) -> RequestBuilder,
    ) -> Result<Response> {
        self.sign_in()?;
        let response = follow(&what.url, &|url| build(url).send())
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

    /// What sends large bodies, on so many threads.
    pub(super) fn sender(&self, threads: usize) -> Result<&Sender> {
        if self.sender.get().is_none() {
            let sender = Sender::new(threads, CONNECT_TIMEOUT, self.options.patience);
            let sender = sender.map_err(|e| unreachable(self.endpoint(), e))?;
            // another thread may have been faster: one of the two is as good
            let _ = self.sender.set(sender);
        }
        Ok(self.sender.get().expect("it was set above"))
    }
}

/// Sends where redirects lead.
fn follow(
    url: &str,
    send: &dyn Fn(&str) -> Result<Response, reqwest::Error>,
) -> Result<Response, reqwest::Error> {
    let mut url = url.to_string();
    for _ in 0..5 {
        let response = send(&url)?;
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
    send(&url)
}

/// A request in the terms of an error message.
pub(super) struct Asked {
    pub action: &'static str,
    pub url: String,
    pub repo: String,
    pub revision: String,
    pub file: String,
}

impl Asked {
    pub fn of(action: &'static str, url: String, repo: &str, revision: &str) -> Self {
        Self {
            action,
            url,
            repo: repo.into(),
            revision: revision.into(),
            file: String::new(),
        }
    }
}

/// What is asked without changing anything.
pub(super) const READ: &str = "read the repository";
pub(super) const LIST: &str = "list the files";
pub(super) const DOWNLOAD: &str = "download a file";

/// Whether a repository is one of data.
pub(super) fn is_dataset(repo: &str) -> bool {
    repo.starts_with("datasets/")
}

/// Whether two addresses are of the same server.
pub(super) fn is_same_origin(one: &str, other: &str) -> bool {
    let origin = |url: &str| {
        let url = reqwest::Url::parse(url).ok()?;
        Some(url.origin().ascii_serialization())
    };
    origin(one).is_some() && origin(one) == origin(other)
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
    use serde_json::json;

    use super::super::oidc::Identity;
    use super::*;

    #[test]
    fn what_a_mirror_says_of_the_public_hub_is_said_of_the_mirror() {
        let options = HubOptions::new("https://mirror.example/hf/", "/nowhere");
        let hub = Hub::new(options).expect("builds");
        let named = hub.at_endpoint("https://huggingface.co/api/x?y=1");
        assert_eq!(named, "https://mirror.example/hf/api/x?y=1");
        for other in [
            "https://huggingface.co.evil.example/x",
            "https://cdn.huggingface.co/x",
            "http://huggingface.co/x",
        ] {
            assert_eq!(hub.at_endpoint(other), other);
        }
    }

    #[test]
    fn an_answer_that_comes_byte_by_byte_is_not_waited_for() {
        use std::io::Write;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("has one");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                std::thread::spawn(move || {
                    let head = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n";
                    let mut sent = stream.write_all(head.as_bytes());
                    while sent.is_ok() {
                        std::thread::sleep(Duration::from_millis(20));
                        sent = stream.write_all(b" ");
                    }
                });
            }
        });
        let mut options = HubOptions::new(format!("http://{address}"), "/nowhere");
        options.patience = Duration::from_millis(100);
        let hub = Hub::new(options).expect("builds");
        let found = hub.commit_of("org/name", "main");
        assert!(matches!(found, Err(Error::AnswerCut { .. })), "{found:?}");
    }

    /// A Hub that answers each request by what its head is.
    fn answering(answer: impl Fn(&str) -> String + Send + 'static) -> String {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("has one");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.expect("a connection");
                let mut head = vec![0; 1 << 16];
                let mut read = 0;
                while !head[..read].windows(4).any(|end| end == b"\r\n\r\n") {
                    read += stream.read(&mut head[read..]).expect("a request");
                }
                let answer = answer(&String::from_utf8_lossy(&head[..read]));
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        format!("http://{address}")
    }

    fn said(status: &str, body: &str) -> String {
        let length = body.len();
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
    }

    #[test]
    fn a_token_of_a_job_is_quoted_by_nobody() {
        let job = |endpoint: String| {
            let login = Login {
                resource: "org/name".into(),
                identity: Identity::Token(Token::new("a_jobs_identity")),
            };
            let hub = Hub::new(HubOptions {
                login: Some(login),
                ..HubOptions::new(endpoint, "/nowhere")
            });
            let failed = hub.expect("builds").commit_of("org/name", "main");
            failed.expect_err("nothing is answered").to_string()
        };
        // a token without end, which the Hub does not take all the same
        let told = job(answering(|head| {
            if head.starts_with("POST /oauth/token") {
                let minted = json!({"access_token": "hf_minted", "expires_in": u64::MAX});
                return said("200 OK", &minted.to_string());
            }
            let mut lines = head.lines().map(str::to_lowercase);
            let shown = lines.find(|line| line.starts_with("authorization"));
            let told = json!({"error": format!("User Access Token {}", shown.unwrap_or_default())});
            said("401 Unauthorized", &told.to_string())
        }));
        assert!(told.contains("(the token)"), "{told}");
        assert!(!told.contains("hf_minted"), "{told}");
        let told = job(answering(|_| {
            said("400 Bad Request", "not a_jobs_identity")
        }));
        assert!(told.contains("not (the token)"), "{told}");
        // nor that of a user, where an answer of the wrong kind holds it
        let listed = answering(|_| said("200 OK", r#""hf_of_a_user""#));
        let hub = Hub::new(HubOptions {
            token: Some(Token::new("hf_of_a_user")),
            ..HubOptions::new(listed, "/nowhere")
        });
        let failed = hub.expect("builds").files("org/name", "main");
        let told = failed.expect_err("no listing").to_string();
        assert!(told.contains("(the token)"), "{told}");
    }

    #[test]
    fn the_token_goes_to_the_hub_alone() {
        let hub = Hub::new(HubOptions {
            token: Some(Token::new("hf_secret")),
            ..HubOptions::new("http://127.0.0.1:9", "/nowhere")
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
        let request = hub.request(Method::GET, "http://127.0.0.1:9/api/x").build();
        assert!(!format!("{request:?}").contains("hf_secret"));
    }
}
