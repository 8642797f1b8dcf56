//! The store of chunks beside the Hub, which Xet clients call the CAS: that of xet-client's simulation, on a port of its own.
//!
//! A client brings chunks there first and then commits a file by its sha256. Only now does the Hub look which of the store's
//! files is said to have that sha256, reads it, and keeps the content among its own once the sha256 is right: clients
//! without Xet get the same bytes, and a lie about a sha256 reaches nobody.
//!
//! The store is open to all of this machine: it asks for no token, and the Hub's tokens for it are a courtesy to clients.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::http::header;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use xet_client::ClientError;
use xet_client::cas_client::{
    Client, DeletionControlableClient, DirectAccessClient, LocalClient, LocalServer,
};
use xet_client::cas_types::HexMerkleHash;
use xet_runtime::config::XetConfig;
use xet_runtime::core::XetContext;

use super::access::{now, seal};
use super::reply::{Refusal, Reply, encode, header_text, refuse};
use super::repo::{Entry, EntryKind, Refused};
use super::routes::{Hub, Visit};
use super::store::{Incoming, Store};

/// A running store of chunks; it stops with the runtime it was started in.
pub struct Cas {
    chunks: Arc<LocalClient>,
    address: SocketAddr,
    known: Mutex<Known>,
    /// Dropped, it would stop the store.
    _running: oneshot::Sender<()>,
}

/// The files of the store by the sha256 that their senders told.
#[derive(Default)]
struct Known {
    seen: HashSet<HexMerkleHash>,
    told: HashMap<String, Vec<HexMerkleHash>>,
}

/// What a token opens.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Right {
    Read,
    Write,
}

impl Cas {
    /// Serves the store that is kept in a folder.
    pub async fn start(folder: &Path) -> io::Result<Cas> {
        // its default, not its `new`, which reads the environment
        let context = XetContext::from_external(Handle::current(), XetConfig::default());
        let chunks = LocalClient::new(context, folder).await;
        let chunks = chunks.map_err(io::Error::other)?;
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let reading: Arc<dyn DirectAccessClient> = chunks.clone();
        let deleting: Arc<dyn DeletionControlableClient> = chunks.clone();
        let (host, port) = (address.ip().to_string(), address.port());
        let server = LocalServer::from_client(reading, Some(deleting), host, port);
        let (running, stopped) = oneshot::channel();
        tokio::spawn(async move { server.serve_until_stopped(listener, stopped).await });
        Ok(Cas {
            chunks,
            address,
            known: Mutex::default(),
            _running: running,
        })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Brings the content with this sha256 among the Hub's own, if the store has it and it was not done before.
    pub fn deliver(&self, hub: &Store, sha256: &str) -> Result<(), Refused> {
        if hub.xet_hash(sha256).is_some() {
            return Ok(());
        }
        for file in self.files_told(sha256)? {
            let mut content = hub.receive()?;
            self.copy(file, &mut content)?;
            match content.finish(Some(sha256)) {
                Ok(_) => return Ok(hub.remember_xet_hash(sha256, &file.to_string())?),
                Err(Refused::Digest { found, .. }) => {
                    tracing::warn!(%file, sha256, found, "another sha256 than was told");
                }
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }

    /// The files of which a sender told this sha256; those that came since the last call are looked at first.
    fn files_told(&self, sha256: &str) -> Result<Vec<HexMerkleHash>, ClientError> {
        // lists of plain values: a panic elsewhere leaves them whole
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (file, _) in wait(self.chunks.list_file_shard_entries())? {
            if known.seen.contains(&file.into()) {
                continue;
            }
            let found = wait(self.chunks.get_file_reconstruction_info(&file))?;
            let told = found.and_then(|(info, _)| info.metadata_ext);
            if let Some(told) = told {
                let files = known.told.entry(told.sha256.hex()).or_default();
                files.push(file.into());
            }
            known.seen.insert(file.into());
        }
        Ok(known.told.get(sha256).cloned().unwrap_or_default())
    }

    /// Reads a file segment by segment: none is larger than a block, 64 MiB.
    fn copy(&self, file: HexMerkleHash, to: &mut Incoming) -> Result<(), Refused> {
        let found = wait(self.chunks.get_file_reconstruction_info(&file.0))?;
        let segments = found.map(|(info, _)| info.segments).unwrap_or_default();
        for part in segments {
            let chunks = vec![(part.chunk_index_start, part.chunk_index_end)];
            for bytes in wait(self.chunks.get_xorb_ranges(&part.xorb_hash, chunks))? {
                to.write(&bytes)?;
            }
        }
        Ok(())
    }
}

/// Waits for the store, from a thread of the runtime that may block.
fn wait<T>(work: impl Future<Output = T>) -> T {
    Handle::current().block_on(work)
}

impl Visit<'_> {
    /// Where the store is and what opens it: in the body, as some clients read it, and in headers, as others do.
    pub fn xet_token(&self, right: Right, revision: Option<&str>) -> Result<Reply, Refusal> {
        let told = self.told(right, revision)?;
        let answer = json!({"casUrl": told.url, "accessToken": told.token, "exp": told.expires});
        let headers = told.headers().into_iter();
        Ok(headers.fold(Reply::json(answer), |reply, (name, value)| {
            reply.header(name, value)
        }))
    }

    /// The same as the action of an LFS batch: its address gives another when this one expires.
    pub fn xet_pass(&self, right: Right, revision: Option<&str>) -> Result<Value, Refusal> {
        let headers = self.told(right, revision)?.headers();
        let headers: Map<String, Value> = headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect();
        let mut href = self.xet_url(right, revision.unwrap_or(MAIN));
        if revision.is_none() {
            href += "?create_pr=1";
        }
        Ok(json!({"href": href, "header": headers}))
    }

    /// Adds to the answer about a file where its chunks are; who asks for that gets it instead of a redirect.
    pub fn with_chunks(&self, reply: Reply, hash: &str, commit: &str) -> Reply {
        let Some(cas) = &self.hub.cas else {
            return reply;
        };
        let issuer = self.xet_url(Right::Read, commit);
        let chunks = format!("{}/v1/reconstructions/{hash}", cas.url());
        let links =
            format!("<{issuer}>; rel=\"xet-auth\", <{chunks}>; rel=\"xet-reconstruction-info\"");
        let accepted = header_text(&self.call.headers, header::ACCEPT).unwrap_or_default();
        let mut reply = reply;
        if reply.status == 302 && accepted.contains(FILE_INFO) {
            let told = json!({"hash": hash, "refreshUrl": issuer, "reconstructionUrl": chunks});
            reply.content = Reply::json(told).content;
            reply = reply.status(200).header("content-type", FILE_INFO);
        }
        reply.header("x-xet-hash", hash).header("link", links)
    }

    /// Where a client asks for what opens the store.
    fn xet_url(&self, right: Right, revision: &str) -> String {
        let (base, kind, word) = (&self.call.base, self.id.kind.plural(), right.word());
        let revision = encode(revision);
        format!("{base}/api/{kind}/{}/xet-{word}-token/{revision}", self.id)
    }

    /// Of no revision where a pull request is about to be opened.
    fn told(&self, right: Right, revision: Option<&str>) -> Result<Told, Refusal> {
        let Some(cas) = &self.hub.cas else {
            return refuse(404, "This Hub has no Xet storage");
        };
        match right {
            Right::Read => self.check_gate()?,
            Right::Write => self.check_writes_to(revision)?,
        }
        self.hub
            .store
            .commit_at(&self.id, revision.unwrap_or(MAIN))?;
        Ok(Told {
            url: cas.url(),
            // sealed, not the secret itself, which signs addresses too
            token: format!("xet_{}", seal(self.hub, "xet", right.word())),
            expires: now() + TOKEN_SECONDS,
        })
    }
}

/// What a client is told to get into the store.
struct Told {
    url: String,
    token: String,
    /// Seconds since 1970.
    expires: u64,
}

impl Told {
    fn headers(&self) -> [(&'static str, String); 3] {
        [
            ("x-xet-cas-url", self.url.clone()),
            ("x-xet-access-token", self.token.clone()),
            ("x-xet-token-expiration", self.expires.to_string()),
        ]
    }
}

impl Right {
    fn word(self) -> &'static str {
        match self {
            Right::Read => "read",
            Right::Write => "write",
        }
    }
}

const TOKEN_SECONDS: u64 = 3600;
const MAIN: &str = "main";
/// What huggingface.js asks for.
const FILE_INFO: &str = "application/vnd.xet-fileinfo+json";

/// The name of a file's content in the store, if it is there.
pub fn xet_hash(hub: &Hub, entry: &Entry) -> Option<String> {
    let large = hub.cas.is_some() && entry.kind == EntryKind::Lfs;
    large.then(|| hub.store.xet_hash(&entry.sha256))?
}
