//! Large files by Xet: in chunks, of which a store beside the Hub keeps each once.
//!
//! hf-xet carries the chunks. Here is decided what it may take and where its results go: what it brings is appended to the
//! file that HTTP would append to, so that either goes on where the other stopped, and is verified like everything else.

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use reqwest::Method;
use reqwest::header::{AUTHORIZATION, HeaderMap};
use serde::Deserialize;
use xet::XetError;
use xet::xet_session::{
    Sha256Policy, XetConfig, XetDownloadStreamGroup, XetFileInfo, XetSession, XetSessionBuilder,
    XetUploadCommit,
};

use super::cache::open_partial;
use super::client::{Asked, CONNECT_TIMEOUT, FIRST_PAUSE, Hub, TRIES, segment};
use super::listing::RemoteFile;
use super::local::LocalFile;
use super::upload::Push;
use crate::contents::Contents;
use crate::error::{Error, IoContext, Result};
use crate::event::{Gauge, Observer, Stage};
use crate::sum::Sum;

/// Of all downloads together, the decoded bytes that wait to be written: hf-xet's `download_buffer_size` and `_limit`, 128 MB.
///
/// Left alone it takes a sixteenth of the machine's memory, and up to a quarter. With this, 2 GB came in a process of 231 MB
/// (2 cores, 2026-11).
const BUFFER_BYTES: u64 = 128_000_000;
/// Chunks travel in blocks of at most 64 MiB: so many are fetched at once, as far as the buffer holds them.
const PARALLEL_FETCHES: usize = 4;
/// So many blocks are sent at once.
///
/// An upload holds two more, one that is filled and one that is packed: 268 MB together; 2 GB went from a process of 376 MB.
const PARALLEL_SENDS: usize = 2;
/// Files that are cut into chunks at the same time: each has a block that is being filled.
const PARALLEL_FILES: usize = 1;
/// Of a smaller file whose listing names no chunks, the question would cost about as much as the file.
const ASK_BYTES: u64 = 32 << 20;
/// Handed over at once of what does not lie on the disk.
const FED_BYTES: usize = 1 << 20;
const PROGRESS_PAUSE: Duration = Duration::from_millis(100);

/// hf-xet, started when the first file needs it.
#[derive(Default)]
pub(super) struct Engine(Mutex<Option<XetSession>>);

impl fmt::Debug for Engine {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        out.write_str("Engine(…)")
    }
}

/// What opens the store for one repository, and who makes another when it expires.
struct Pass {
    issuer: String,
    headers: HeaderMap,
    access: Access,
}

/// As the Hub tells it; no `Debug`, since it holds a token.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Access {
    access_token: String,
    /// Seconds since 1970.
    exp: u64,
    cas_url: String,
}

impl Hub {
    /// hf-xet, as we want it: its memory bounded, as patient as our own requests, and telling nobody of transfers.
    fn engine(&self) -> Result<XetSession, XetError> {
        let mut engine = locked(&self.xet.0);
        if let Some(session) = &*engine {
            return Ok(session.clone());
        }
        // not its `new`, which reads the environment
        let mut config = XetConfig::default();
        config.reconstruction.download_buffer_size = BUFFER_BYTES.into();
        config.reconstruction.download_buffer_perfile_size = 0.into();
        config.reconstruction.download_buffer_limit = BUFFER_BYTES.into();
        config.data.max_concurrent_file_ingestion = PARALLEL_FILES;
        let client = &mut config.client;
        client.ac_max_upload_concurrency = PARALLEL_SENDS;
        client.ac_initial_upload_concurrency = PARALLEL_SENDS;
        client.ac_max_download_concurrency = PARALLEL_FETCHES;
        client.ac_initial_download_concurrency = PARALLEL_FETCHES;
        client.retry_max_attempts = TRIES as usize;
        client.retry_base_delay = FIRST_PAUSE;
        client.connect_timeout = CONNECT_TIMEOUT;
        client.read_timeout = self.options.patience;
        config.telemetry.enabled = false;
        let mut builder = XetSessionBuilder::new_with_config(config);
        if let Some(dir) = &self.options.xet {
            builder = builder.with_cache_dir(dir);
        }
        Ok(engine.insert(builder.build()?).clone())
    }

    /// Asks the Hub for what opens its store.
    fn pass(&self, what: &Asked) -> Result<Pass> {
        let (access, _) = self.answer(what, &|url| self.request(Method::GET, url))?;
        let mut headers = HeaderMap::new();
        if let Some(token) = self.token() {
            headers.insert(AUTHORIZATION, token.bearer());
        }
        Ok(Pass {
            issuer: what.url.clone(),
            headers,
            access,
        })
    }
}

/// The way through Xet of some files of one commit: opened by the first that asks, and closed for all when it fails one.
pub(super) struct Way<'a> {
    hub: &'a Hub,
    repo: &'a str,
    commit: &'a str,
    observer: &'a dyn Observer,
    state: Mutex<State>,
}

enum State {
    Untried,
    Open(XetDownloadStreamGroup),
    Closed,
}

impl<'a> Way<'a> {
    pub fn new(hub: &'a Hub, repo: &'a str, commit: &'a str, observer: &'a dyn Observer) -> Self {
        let state = match hub.options.xet {
            Some(_) => State::Untried,
            None => State::Closed,
        };
        Self {
            hub,
            repo,
            commit,
            observer,
            state: Mutex::new(state),
        }
    }

    /// Appends what is missing of a file, if it is in the store; says whether all of it has come.
    ///
    /// Where not, it is left to HTTP, which goes on behind what has.
    pub fn append(&self, file: &RemoteFile, partial: &Path, gauge: &Gauge) -> Result<bool> {
        let Some(hash) = self.name_of(file) else {
            return Ok(false);
        };
        let Some(group) = self.open() else {
            return Ok(false);
        };
        let (mut out, mut received) = open_partial(partial, file.size)?;
        if received == file.size {
            return Ok(true);
        }
        let info = XetFileInfo::new(hash, file.size);
        let mut stream = match group.download_stream_blocking(info, Some(received..file.size)) {
            Ok(stream) => stream,
            Err(error) => return Ok(self.fails(&error.to_string())),
        };
        loop {
            match stream.blocking_next() {
                Ok(Some(piece)) if received + piece.len() as u64 <= file.size => {
                    out.write_all(&piece)
                        .map_err(|source| Error::io("write", partial, source))?;
                    received += piece.len() as u64;
                    gauge.reach(received);
                }
                Ok(None) if received == file.size => break,
                Ok(_) => {
                    let why = format!(
                        "another length than the {} bytes of `{}`",
                        file.size, file.path
                    );
                    return Ok(self.fails(&why));
                }
                Err(error) => return Ok(self.fails(&error.to_string())),
            }
        }
        out.sync_all().context("flush", partial)?;
        Ok(true)
    }

    /// What came this way is not the file: nothing more does.
    pub fn brought_wrong_bytes(&self, file: &RemoteFile) {
        self.fails(&format!("its `{}` has another sha256", file.path));
    }

    /// The name of a file in the store: from the listing, or where that says none, from the headers of the file.
    fn name_of(&self, file: &RemoteFile) -> Option<String> {
        if !file.lfs || matches!(*locked(&self.state), State::Closed) {
            return None;
        }
        if file.xet_hash.is_some() || file.size < ASK_BYTES {
            return file.xet_hash.clone();
        }
        let what = self.hub.asked(self.repo, self.commit, &file.path);
        // not sent on to where the bytes are: that place knows no names
        let answer = self.hub.request(Method::HEAD, &what.url).send().ok()?;
        let name = answer.headers().get("x-xet-hash")?.to_str().ok()?;
        Some(name.to_string())
    }

    fn open(&self) -> Option<XetDownloadStreamGroup> {
        let mut state = locked(&self.state);
        if let State::Untried = &*state {
            *state = match self.group() {
                Ok(group) => State::Open(group),
                Err(why) => {
                    self.note(&why);
                    State::Closed
                }
            };
        }
        match &*state {
            State::Open(group) => Some(group.clone()),
            _ => None,
        }
    }

    fn group(&self) -> Result<XetDownloadStreamGroup, String> {
        let rest = format!("xet-read-token/{}", segment(self.commit));
        let url = self.hub.api_url(self.repo, &rest);
        let what = Asked::of("open its Xet store", url, self.repo, self.commit);
        let pass = self.hub.pass(&what).map_err(|error| error.to_string())?;
        let group = || -> Result<_, XetError> {
            let builder = self.hub.engine()?.new_download_stream_group()?;
            builder
                .with_endpoint(pass.access.cas_url)
                .with_token_info(pass.access.access_token, pass.access.exp)
                .with_token_refresh_url(pass.issuer, pass.headers)
                .build_blocking()
        };
        group().map_err(|error| error.to_string())
    }

    /// Closes the way, and says so once.
    fn fails(&self, why: &str) -> bool {
        let before = std::mem::replace(&mut *locked(&self.state), State::Closed);
        if let State::Open(_) = before {
            self.note(why);
        }
        false
    }

    fn note(&self, why: &str) {
        self.observer
            .note(format!("Xet fails ({why}): fetching by HTTP instead"));
    }
}

impl Push<'_> {
    /// Sends files to the store, as far as it lacks their chunks, and says how many bytes that were.
    pub fn send_chunks(&self, files: &[&LocalFile]) -> Result<u64> {
        let what = self.asked(
            "open the Hub's Xet store",
            self.revision_url("xet-write-token"),
        );
        let pass = self.hub.pass(&what)?;
        let failed = |source: XetError| {
            // one that failed a transfer may fail the next for that alone
            locked(&self.hub.xet.0).take();
            Error::Xet {
                source: Box::new(source),
            }
        };
        let begin = || -> Result<_, XetError> {
            let commit = self
                .hub
                .engine()?
                .new_upload_commit()?
                .with_endpoint(pass.access.cas_url)
                .with_token_info(pass.access.access_token, pass.access.exp)
                .with_token_refresh_url(pass.issuer, pass.headers)
                .build_blocking()?;
            if self.contents.is_none() {
                for file in files {
                    let sum = Sha256Policy::from_hex(&file.sha256);
                    commit.upload_from_path_blocking(file.path.clone(), sum)?;
                }
            }
            Ok(commit)
        };
        let commit = begin().map_err(failed)?;
        if let Some(contents) = self.contents {
            for file in files {
                self.feed(&commit, file, contents, &failed)?;
            }
        }
        let report = self.watched(&commit, files, || commit.commit_blocking());
        let report = report.map_err(failed)?;
        // the store was told the sha256 that the file had before, and believes it
        if self.contents.is_none() {
            for file in files {
                file.check_unchanged()?;
            }
        }
        Ok(report.dedup_metrics.xorb_bytes_uploaded)
    }

    /// Hands over contents that do not lie on the disk as a file, and refuses others than were announced.
    fn feed(
        &self,
        commit: &XetUploadCommit,
        file: &LocalFile,
        contents: &dyn Contents,
        failed: &dyn Fn(XetError) -> Error,
    ) -> Result<()> {
        let announced = Sha256Policy::from_hex(&file.sha256);
        let stream = commit.upload_stream_blocking(Some(file.name.clone()), announced);
        let stream = stream.map_err(failed)?;
        let (mut at, mut sum) = (0, Sum::default());
        loop {
            let mut piece = vec![0; FED_BYTES];
            let n = contents.read_at(at, &mut piece)?;
            if n == 0 {
                break;
            }
            piece.truncate(n);
            sum.update(&piece);
            at += n as u64;
            stream.write_blocking(piece).map_err(failed)?;
        }
        let found = sum.finish();
        if found != file.sha256 {
            return Err(Error::Checksum {
                what: format!("`{}` changed while it was sent", file.name).into(),
                path: file.path.clone(),
                expected: file.sha256.clone(),
                found,
            });
        }
        stream.finish_blocking().map(drop).map_err(failed)
    }

    /// Does some work while a commit's progress is told.
    fn watched<T: Send>(
        &self,
        commit: &XetUploadCommit,
        files: &[&LocalFile],
        work: impl FnOnce() -> T + Send,
    ) -> T {
        let all: u64 = files.iter().map(|file| file.size).sum();
        let item = files.first().map_or("", |file| file.name.as_str());
        let mut told = 0;
        let mut tell = |done: u64| {
            let done = done.min(all);
            if done > told {
                self.observer.advance(Stage::Upload, done - told, item);
                told = done;
            }
        };
        std::thread::scope(|scope| {
            let working = scope.spawn(work);
            while !working.is_finished() {
                tell(commit.progress().total_bytes_completed);
                std::thread::sleep(PROGRESS_PAUSE);
            }
            tell(all);
            match working.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // each holds one value, which is replaced whole: a panic elsewhere spoils nothing
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
