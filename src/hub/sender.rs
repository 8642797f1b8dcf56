//! Large bodies in large pieces: reqwest's blocking client hands a body over 8 KiB at a time, each with two changes of
//! thread, and an upload then takes half as long again (0.13, loopback, 2026-11).

use std::ops::Range;
use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::{future, stream};
use reqwest::blocking::{Request, Response};
use reqwest::header::CONTENT_LENGTH;
use reqwest::redirect::Policy;
use reqwest::{Body, Client, ResponseBuilderExt};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};

use super::client::USER_AGENT;
use crate::contents::Contents;
use crate::error::Error;
use crate::event::Gauge;

/// Part of what is sent, read as often as it is sent.
pub(super) struct Sent<'a> {
    pub contents: &'a dyn Contents,
    pub range: Range<u64>,
    /// Told how far the contents have gone.
    pub gauge: &'a Gauge<'a>,
    /// Why it could not be read, if so: no Hub is to blame.
    pub unread: Mutex<Option<Error>>,
}

const PIECE_BYTES: u64 = 256 << 10;
/// Read before they are asked for.
const PIECES_AHEAD: usize = 2;

impl Sent<'_> {
    /// Reads all pieces, as long as somebody takes them.
    fn read(&self, mut give: impl FnMut(std::io::Result<Vec<u8>>) -> bool) {
        let mut at = self.range.start;
        while at < self.range.end {
            let mut piece = vec![0; PIECE_BYTES.min(self.range.end - at) as usize];
            let n = match self.contents.read_at(at, &mut piece) {
                Ok(n) if n > 0 => n,
                result => {
                    if let Err(error) = result {
                        let unread = self.unread.lock();
                        *unread.unwrap_or_else(PoisonError::into_inner) = Some(error);
                    }
                    give(Err(std::io::ErrorKind::UnexpectedEof.into()));
                    return;
                }
            };
            piece.truncate(n);
            at += n as u64;
            if !give(Ok(piece)) {
                return;
            }
            self.gauge.reach(at);
        }
    }
}

/// A client beside the blocking one, with threads of its own: reading from the disk may hold them up.
#[derive(Debug)]
pub(super) struct Sender {
    runtime: Runtime,
    client: Client,
}

impl Sender {
    pub fn new(
        threads: usize,
        connect_timeout: Duration,
        patience: Duration,
    ) -> Result<Self, reqwest::Error> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build()
            .expect("a runtime needs nothing but threads");
        let client = Client::builder()
            .connect_timeout(connect_timeout)
            .tcp_user_timeout(patience)
            .redirect(Policy::none())
            .user_agent(USER_AGENT)
            .build()?;
        Ok(Self { runtime, client })
    }

    /// Sends a request with `sent` as its body, in its time for the whole, and reads the answer.
    pub fn send(
        &self,
        request: &Request,
        sent: &Sent,
        timeout: Duration,
    ) -> Result<Response, reqwest::Error> {
        let (pieces, taken) = mpsc::channel(PIECES_AHEAD);
        let body = stream::unfold(taken, |mut taken| async {
            taken.recv().await.map(|piece| (piece, taken))
        });
        let sending = self
            .client
            .request(request.method().clone(), request.url().clone())
            .headers(request.headers().clone())
            .header(CONTENT_LENGTH, sent.range.end - sent.range.start)
            .timeout(timeout)
            .body(Body::wrap_stream(body));
        let (answered, mut is_answered) = oneshot::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                sent.read(|piece| {
                    // a connection may keep a body that nobody reads any more
                    let giving = pin!(pieces.send(piece));
                    let given = self
                        .runtime
                        .block_on(future::select(giving, &mut is_answered));
                    matches!(given, future::Either::Left((Ok(()), _)))
                });
            });
            let answer = self.runtime.block_on(async {
                let answer = sending.send().await?;
                let mut response = http::Response::builder()
                    .status(answer.status())
                    .url(answer.url().clone());
                if let Some(headers) = response.headers_mut() {
                    *headers = answer.headers().clone();
                }
                let bytes = answer.bytes().await?;
                let response = response.body(bytes).expect("its parts were an answer");
                Ok(Response::from(response))
            });
            drop(answered);
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Silent, Stage};

    #[test]
    fn what_is_sent_is_that_part_of_the_contents_and_no_more() {
        let contents: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let gauge = Gauge::new(&Silent, Stage::Upload, "", 0);
        let read = |range: Range<u64>| {
            let sent = Sent {
                contents: &contents,
                range,
                gauge: &gauge,
                unread: Mutex::default(),
            };
            let (mut bytes, mut cut) = (Vec::new(), false);
            sent.read(|piece| {
                match piece {
                    Ok(piece) => bytes.extend(piece),
                    Err(_) => cut = true,
                }
                true
            });
            (bytes, cut)
        };
        assert_eq!(read(3..700_000), (contents[3..700_000].to_vec(), false));
        assert_eq!(
            read(999_999..1_000_005),
            (contents[999_999..].to_vec(), true)
        );
    }
}
