//! A small Hugging Face Hub on this machine: what tests, offline teams and `svdhub hub serve` publish to.
//!
//! It speaks as much of the Hub's protocol as huggingface_hub, hf-hub, huggingface.js and curl use for models and
//! datasets: large files by classic LFS, in one piece or in parts, and by Xet where that is switched on (where not, the newest
//! Python client needs `HF_HUB_DISABLE_XET=1`). Contents come from a second port, because clients treat a redirect within one
//! origin differently, and chunks from a third. Tests can break any reply of the first two on purpose and read afterwards what
//! was asked.
//!
//! This file moves bytes; `routes` finds who answers: `access`, `browse`, `publish`, `lfs`, `xet`, `discuss`. `repo` says what
//! a repository is, `store` remembers, `fault` breaks.

mod access;
mod browse;
mod discuss;
mod fault;
mod lfs;
mod publish;
mod reply;
mod repo;
mod routes;
mod store;
mod xet;

pub use access::{Grant, Scope};
pub use fault::{Effect, Fault};

use std::hash::{BuildHasher, RandomState};
use std::io::{self, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, BodyDataStream, Bytes, to_bytes};
use axum::extract::Request as HttpRequest;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, Response, StatusCode, header};
use axum::serve::ListenerExt;
use futures_util::{StreamExt, stream};
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::block_in_place;
use tokio_util::io::ReaderStream;

use lfs::Receiving;
use reply::{Call, Content, Refusal, Reply, header_text};
use routes::Hub;
use store::Store;
use xet::Cas;

/// The largest body of a request that is not an LFS upload: a commit with its small files.
const BODY_BYTES_MAX: usize = 200_000_000;

/// The most lines of the journal: a Hub may serve for months.
const JOURNAL_MAX: usize = 100_000;

/// Pieces in which contents leave; the default of 4 KiB costs more system calls than copying.
const PIECE_BYTES: usize = 256 << 10;

/// How a Hub is started.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// 0: any free port.
    pub port: u16,
    /// The tokens that are known; with none, every token `hf_…` writes, and every `hf_read…` reads.
    ///
    /// Beside known ones a token `hf_read…` is that of a stranger, who reads what is public.
    pub grants: Vec<Grant>,
    /// The most entries of one page of a list.
    pub page_entries: usize,
    /// LFS objects larger than this are sent in parts of it, where the client can do that.
    pub part_bytes: Option<u64>,
    /// Whether large files may come and go by Xet; what comes so takes its space twice.
    pub xet: bool,
    /// How long a token holds that was exchanged for a job's identity.
    pub login_seconds: u64,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            port: 0,
            grants: Vec::new(),
            page_entries: 1000,
            part_bytes: None,
            xet: false,
            login_seconds: 3600,
        }
    }
}

/// A running Hub; it stops when this value is dropped.
pub struct Server {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// With its query. Contents have the path `/objects/<sha256>`.
    pub path: String,
    pub status: u16,
    /// The length of the request's body, as far as it was read.
    pub received: u64,
    /// The length of the answer's body.
    pub bytes: u64,
    /// Whether an Authorization header came, with whatever in it.
    pub authorized: bool,
    pub range: Option<String>,
    pub user_agent: Option<String>,
}

impl Server {
    /// Serves the repositories below `root`, a folder that is made if it is missing.
    pub fn start(root: &Path, options: &ServerOptions) -> io::Result<Server> {
        let store = Store::open(root)?;
        let (hub_listener, hub_address) = listen(options.port)?;
        let (cdn_listener, cdn_address) = listen(0)?;
        let cdn = format!("http://{cdn_address}");
        // Disk work blocks its thread, so there are more threads than a small machine has cores.
        let runtime = Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()?;
        let cas = match options.xet {
            true => Some(runtime.block_on(Cas::start(&store.xet_folder()))?),
            false => None,
        };
        let hub = Hub {
            store,
            cas,
            grants: options.grants.clone(),
            page_entries: options.page_entries.max(1),
            part_bytes: options.part_bytes,
            login_seconds: options.login_seconds,
            cdn,
            secret: secret(),
        };
        let endpoint = format!("http://{hub_address}");
        let shared = Arc::new(Shared {
            hub,
            endpoint,
            faults: Mutex::default(),
            journal: Mutex::default(),
        });
        let (stop, stopped) = oneshot::channel();
        let listeners = [(hub_listener, Side::Hub), (cdn_listener, Side::Cdn)];
        let serving = Arc::clone(&shared);
        let run = move || run(&runtime, serving, listeners, stopped);
        let thread = std::thread::Builder::new()
            .name("hub".to_owned())
            .spawn(run)?;
        Ok(Server {
            shared,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// `http://127.0.0.1:PORT`, for `HF_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        self.shared.endpoint.clone()
    }

    /// What was asked so far (lately, where that was very much), in the order in which the answers began.
    pub fn requests(&self) -> Vec<Request> {
        locked(&self.shared.journal).clone()
    }

    /// Lets the next matching requests go wrong; of several faults that match, the oldest comes first.
    pub fn inject(&self, fault: Fault) {
        locked(&self.shared.faults).push(fault);
    }

    /// Forgets the faults that have not struck yet.
    pub fn heal(&self) {
        locked(&self.shared.faults).clear();
    }

    /// Serves until the process ends.
    pub fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            // An error here is the panic of the other thread, which has already been printed.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Shared {
    hub: Hub,
    endpoint: String,
    faults: Mutex<Vec<Fault>>,
    journal: Mutex<Vec<Request>>,
}

impl Shared {
    fn note(&self, request: Request) {
        let mut journal = locked(&self.journal);
        if journal.len() == JOURNAL_MAX {
            journal.drain(..JOURNAL_MAX / 2);
        }
        journal.push(request);
    }
}

/// The two origins.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Hub,
    Cdn,
}

fn listen(port: u16) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Unguessable enough for one machine: the standard library seeds its hash maps from the system's randomness.
fn secret() -> String {
    let half = |index: u8| format!("{:016x}", RandomState::new().hash_one(index));
    half(0) + &half(1)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Lists of plain values: a panic elsewhere leaves them whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(
    runtime: &Runtime,
    shared: Arc<Shared>,
    listeners: [(TcpListener, Side); 2],
    stopped: oneshot::Receiver<()>,
) {
    runtime.block_on(async {
        for (listener, side) in listeners {
            let listener = match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => return tracing::error!(%error, "the Hub cannot listen"),
            };
            // Small answers must not wait for the client's delayed acknowledgement.
            let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
            let shared = Arc::clone(&shared);
            let router =
                Router::new().fallback(move |request| handle(Arc::clone(&shared), side, request));
            tokio::spawn(async move { axum::serve(listener, router).await });
        }
        // An answer as well as the end of the sender says stop.
        let _ = stopped.await;
    });
}

async fn handle(shared: Arc<Shared>, side: Side, request: HttpRequest) -> Response<Body> {
    let (mut parts, body) = request.into_parts();
    let received = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&received);
    let body = Body::from_stream(body.into_data_stream().inspect(move |piece| {
        let bytes = piece.as_ref().map_or(0, Bytes::len);
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
    }));
    let range = header_text(&parts.headers, header::RANGE).map(str::to_owned);
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let path = path.to_owned();
    let line = format!("{} {path}", parts.method);
    let effect = fault::take(&mut locked(&shared.faults), &line);
    if let Some(Effect::IgnoreRange) = effect {
        parts.headers.remove(header::RANGE);
    }
    let mut reply = match &effect {
        Some(Effect::Status {
            status, body: said, ..
        }) => {
            discard(body.into_data_stream()).await;
            let mut reply = Reply::empty(*status);
            reply.content = Content::Bytes(said.clone().into_bytes());
            reply
        }
        Some(Effect::StatusAfter { status }) => {
            carry_out(&shared, side, &parts, body).await;
            Refusal::new(*status, "injected after the request was carried out").0
        }
        _ => carry_out(&shared, side, &parts, body).await,
    };
    fault::forge(&mut reply, effect.as_ref(), &shared.endpoint);
    if let Some(Effect::Slow { delay_ms }) = effect {
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
    }
    let text = |name| header_text(&parts.headers, name).map(str::to_owned);
    tracing::debug!(method = %parts.method, path, status = reply.status, "hub");
    // Noted before the answer goes out: whoever has the answer finds it in the journal.
    shared.note(Request {
        method: parts.method.to_string(),
        path,
        status: reply.status,
        received: received.load(Ordering::Relaxed),
        bytes: reply.content.len(),
        authorized: parts.headers.contains_key(header::AUTHORIZATION),
        range,
        user_agent: text(header::USER_AGENT),
    });
    respond(reply, &parts.method, effect).await
}

/// Reads a body to its end, so that the client has sent everything before it reads the answer.
async fn discard(mut pieces: BodyDataStream) {
    while let Some(Ok(_)) = pieces.next().await {}
}

async fn carry_out(shared: &Shared, side: Side, parts: &Parts, body: Body) -> Reply {
    if side == Side::Cdn && parts.method == Method::PUT {
        let call = Call::new(parts, Bytes::new(), &shared.endpoint);
        let mut pieces = body.into_data_stream();
        let received = receive(&shared.hub, &call, &mut pieces).await;
        discard(pieces).await;
        return received.unwrap_or_else(|Refusal(reply)| reply);
    }
    let Ok(body) = to_bytes(body, BODY_BYTES_MAX).await else {
        return Refusal::new(413, "The body was cut or is too large").0;
    };
    let call = Call::new(parts, body, &shared.endpoint);
    block_in_place(|| match side {
        Side::Hub => routes::answer(&shared.hub, &call),
        Side::Cdn => lfs::download(&shared.hub, &call).unwrap_or_else(|Refusal(reply)| reply),
    })
}

/// Takes an LFS object of any size, or a part of one, piece by piece to disk.
async fn receive(hub: &Hub, call: &Call, pieces: &mut BodyDataStream) -> Result<Reply, Refusal> {
    let mut receiving = Receiving::begin(hub, call)?;
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| Refusal::new(400, "The body was cut"))?;
        block_in_place(|| receiving.write(&piece))?;
    }
    block_in_place(|| receiving.finish())
}

async fn respond(reply: Reply, method: &Method, effect: Option<Effect>) -> Response<Body> {
    let bytes = reply.bytes();
    let mut response = Response::new(Body::empty());
    *response.status_mut() =
        StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    // Given even where a body is left out, as in the answer to HEAD.
    let headers = response.headers_mut();
    if reply.status != 304 {
        headers.insert(header::CONTENT_LENGTH, bytes.into());
    }
    for (name, value) in &reply.headers {
        if let Ok(value) = HeaderValue::from_bytes(value.as_bytes()) {
            headers.insert(*name, value);
        }
    }
    if let Some(Effect::Status { headers: extra, .. }) = &effect {
        for (name, value) in extra {
            let name = HeaderName::try_from(name.as_str());
            if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
                headers.insert(name, value);
            }
        }
    }
    if method != Method::HEAD {
        *response.body_mut() = match content(reply.content).await {
            Ok(body) => fault::spoil(body, bytes, effect),
            // The headers promise a length: a broken connection is the honest end.
            Err(error) => Body::from_stream(stream::once(async move { Err::<Bytes, _>(error) })),
        };
    }
    response
}

async fn content(content: Content) -> io::Result<Body> {
    match content {
        Content::Bytes(bytes) => Ok(Body::from(bytes)),
        Content::File(path, part) => {
            let mut file = tokio::fs::File::open(path).await?;
            file.seek(SeekFrom::Start(part.start)).await?;
            let part = file.take(part.end - part.start);
            let pieces = ReaderStream::with_capacity(part, PIECE_BYTES);
            Ok(Body::from_stream(pieces))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::io::{Read, Write};
    use std::net::TcpStream;

    const WRITE: &str = "Authorization: Bearer hf_writer\r\n";

    struct Answer {
        status: u16,
        head: String,
        body: Vec<u8>,
    }

    impl Answer {
        fn header(&self, name: &str) -> Option<&str> {
            let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
            lines.find(|(key, _)| *key == name).map(|(_, value)| value)
        }
    }

    /// One request on its own connection.
    fn ask(method: &str, url: &str, headers: &str, body: &[u8]) -> Answer {
        let address = url.strip_prefix("http://").unwrap();
        let (host, path) = address.split_once('/').unwrap();
        let mut stream = TcpStream::connect(host).unwrap();
        let length = body.len();
        let head = format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\n{headers}");
        let head = format!("{head}Connection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        let mut ends = received.windows(4);
        let end = ends.position(|window| window == b"\r\n\r\n").unwrap();
        let body = received.split_off(end + 4);
        let head = String::from_utf8(received).unwrap();
        let status = head[9..12].parse().unwrap();
        Answer { status, head, body }
    }

    fn post(server: &Server, path: &str, body: &str) -> (u16, Value) {
        let url = format!("{}{path}", server.endpoint());
        let answer = ask("POST", &url, WRITE, body.as_bytes());
        (answer.status, serde_json::from_slice(&answer.body).unwrap())
    }

    /// A Hub with `ada/engine`, which holds 1,000 bytes as the LFS object `w.bin`.
    fn hub_with_weights() -> (tempfile::TempDir, Server, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::start(folder.path(), &ServerOptions::default()).unwrap();
        let create = json!({"name": "engine", "organization": "ada"}).to_string();
        assert_eq!(post(&server, "/api/repos/create", &create).0, 200);

        let weights: Vec<u8> = (0..1000u32).map(|i| (i * i % 251) as u8).collect();
        let oid = crate::sum::sha256_hex(&weights);
        let objects = json!([{"oid": oid, "size": 1000}]);
        let batch = json!({"operation": "upload", "transfers": ["new"], "objects": objects});
        let offer = || {
            post(
                &server,
                "/ada/engine.git/info/lfs/objects/batch",
                &batch.to_string(),
            )
            .1
        };
        let first = offer();
        assert_eq!(first["transfer"], "basic");
        let href = &first["objects"][0]["actions"]["upload"]["href"];
        let href = href.as_str().unwrap();
        assert_eq!(ask("PUT", href, "", b"something else").status, 400);
        let forged = href.replace("signature=", "signature=0");
        assert_eq!(ask("PUT", &forged, "", &weights).status, 403);
        assert_eq!(ask("PUT", href, "", b"").status, 501);
        assert_eq!(ask("PUT", href, "", &weights).status, 200);
        assert!(offer()["objects"][0].get("actions").is_none());

        let header = json!({"key": "header", "value": {"summary": "weights"}});
        let file = json!({"path": "w.bin", "algo": "sha256", "oid": oid, "size": 1000});
        let commit = format!("{header}\n{}", json!({"key": "lfsFile", "value": file}));
        assert_eq!(
            post(&server, "/api/models/ada/engine/commit/main", &commit).0,
            200
        );
        (folder, server, weights)
    }

    fn weights_url(server: &Server) -> String {
        let url = format!("{}/ada/engine/resolve/main/w.bin", server.endpoint());
        let resolved = ask("HEAD", &url, "", b"");
        assert_eq!(resolved.status, 302);
        assert_eq!(resolved.header("x-linked-size"), Some("1000"));
        let location = resolved.header("location").unwrap();
        assert!(!location.starts_with(&server.endpoint()), "one origin");
        location.to_owned()
    }

    #[test]
    fn ranges_of_weights_come_from_the_other_origin() {
        let (_folder, server, weights) = hub_with_weights();
        let url = weights_url(&server);
        assert_eq!(ask("GET", &url, "", b"").body, weights);
        let part = ask("GET", &url, "Range: bytes=10-19\r\n", b"");
        assert_eq!((part.status, part.body.as_slice()), (206, &weights[10..20]));
        assert_eq!(part.header("content-range"), Some("bytes 10-19/1000"));
        let outside = ask("GET", &url, "Range: bytes=1000-\r\n", b"");
        assert_eq!(outside.status, 416);
        assert_eq!(outside.header("content-range"), Some("bytes */1000"));
        let tag = format!("If-None-Match: {}\r\n", part.header("etag").unwrap());
        assert_eq!(ask("GET", &url, &tag, b"").status, 304);
        let last = server.requests().pop().unwrap();
        assert_eq!((last.method.as_str(), last.status), ("GET", 304));
        assert!(!last.authorized && last.path.starts_with("/objects/"));
    }

    #[test]
    fn faults_strike_as_often_as_asked() {
        let (_folder, server, weights) = hub_with_weights();
        let url = weights_url(&server);
        let inject = |matching: &str, effect| {
            let (matching, times) = (matching.to_owned(), 1);
            server.inject(Fault {
                matching,
                times,
                effect,
            });
        };
        inject("GET /objects/", Effect::CutBody { after_bytes: 600 });
        let cut = ask("GET", &url, "", b"");
        assert_eq!(
            (cut.status, cut.header("content-length")),
            (200, Some("1000"))
        );
        assert_eq!(cut.body, weights[..600]);

        inject("GET /objects/", Effect::WrongBytes);
        let wrong = ask("GET", &url, "", b"").body;
        let differing = wrong.iter().zip(&weights).filter(|(a, b)| a != b);
        assert_eq!((wrong.len(), differing.count()), (1000, 1));

        let headers = vec![("Retry-After".to_owned(), "7".to_owned())];
        let (status, body) = (429, "later".to_owned());
        inject(
            "GET /objects/",
            Effect::Status {
                status,
                headers,
                body,
            },
        );
        let limited = ask("GET", &url, "", b"");
        assert_eq!(
            (limited.status, limited.header("retry-after")),
            (429, Some("7"))
        );
        assert_eq!(ask("GET", &url, "", b"").body, weights);

        inject(
            "POST /api/repos/create",
            Effect::StatusAfter { status: 500 },
        );
        let create = || post(&server, "/api/repos/create", r#"{"name": "x"}"#).0;
        assert_eq!((create(), create()), (500, 409));
    }

    #[test]
    fn an_object_in_parts_is_put_together_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let options = ServerOptions {
            part_bytes: Some(400),
            ..ServerOptions::default()
        };
        let server = Server::start(folder.path(), &options).unwrap();
        assert_eq!(
            post(&server, "/api/repos/create", r#"{"name": "x"}"#).0,
            200
        );
        let weights: Vec<u8> = (0..1000u32).map(|i| (i * i % 251) as u8).collect();
        let oid = crate::sum::sha256_hex(&weights);
        let batch = |transfers: &[&str]| {
            let objects = json!([{"oid": oid, "size": 1000}]);
            let asked = json!({"operation": "upload", "transfers": transfers, "objects": objects});
            let path = "/local/x.git/info/lfs/objects/batch";
            post(&server, path, &asked.to_string()).1
        };
        assert_eq!(batch(&["basic"])["transfer"], "basic");
        let told = batch(&["basic", "multipart"]);
        assert_eq!(told["transfer"], "multipart");
        let upload = &told["objects"][0]["actions"]["upload"];
        assert_eq!(upload["header"]["chunk_size"], "400");
        let mut parts = Vec::new();
        for (number, part) in weights.chunks(400).enumerate() {
            let url = upload["header"][format!("{:05}", number + 1)]
                .as_str()
                .unwrap();
            let answer = ask("PUT", url, "", part);
            assert_eq!(answer.status, 200);
            let etag = answer.header("etag").unwrap();
            parts.push(json!({"partNumber": number + 1, "etag": etag}));
        }
        assert_eq!(parts.len(), 3);
        let complete = |parts: &[Value]| {
            let body = json!({"oid": oid, "parts": parts}).to_string();
            let kind = "Content-Type: application/vnd.git-lfs+json\r\n";
            let href = upload["href"].as_str().unwrap();
            ask("POST", href, kind, body.as_bytes()).status
        };
        assert_eq!(complete(&parts[..2]), 400, "a part is missing");
        assert_eq!(
            complete(&[parts[1].clone()]),
            400,
            "they begin with the first"
        );
        let mut swapped = parts.clone();
        swapped[0]["etag"] = parts[1]["etag"].clone();
        assert_eq!(complete(&swapped), 400, "another part in its place");
        assert_eq!(complete(&parts), 200);
        assert!(batch(&["multipart"])["objects"][0].get("actions").is_none());
        assert_eq!(
            std::fs::read(server.shared.hub.store.object(&oid).unwrap().0).unwrap(),
            weights
        );
        let sent: u64 = server
            .requests()
            .iter()
            .filter(|r| r.method == "PUT")
            .map(|r| r.received)
            .sum();
        assert_eq!(sent, 1000, "the journal counts what came in");
    }

    #[test]
    fn links_expire_ranges_are_ignored_and_bodies_dawdle() {
        let (_folder, server, weights) = hub_with_weights();
        let once = |matching: &str, effect| {
            let (matching, times) = (matching.to_owned(), 1);
            server.inject(Fault {
                matching,
                times,
                effect,
            });
        };
        once("/resolve/", Effect::ExpiredLink);
        assert_eq!(ask("GET", &weights_url(&server), "", b"").status, 403);
        let url = weights_url(&server);
        once("GET /objects/", Effect::IgnoreRange);
        let whole = ask("GET", &url, "Range: bytes=10-19\r\n", b"");
        assert_eq!((whole.status, whole.body.len()), (200, 1000));
        once("GET /objects/", Effect::SlowBody { delay_ms: 1 });
        assert_eq!(ask("GET", &url, "", b"").body, weights);
        let path = "../../escaped".to_owned();
        once("/tree/", Effect::ExtraFile { path });
        let tree = format!("{}/api/models/ada/engine/tree/main", server.endpoint());
        let listed = ask("GET", &tree, "", b"").body;
        assert!(String::from_utf8(listed).unwrap().contains("../../escaped"));
    }

    #[test]
    fn a_folder_of_repositories_is_served_again() {
        let (folder, server, weights) = hub_with_weights();
        drop(server);
        let server = Server::start(folder.path(), &ServerOptions::default()).unwrap();
        assert_eq!(ask("GET", &weights_url(&server), "", b"").body, weights);
    }
}
