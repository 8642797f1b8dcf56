//! Large bodies in large pieces: reqwest's blocking client hands a body over 8 KiB at a time, each with two changes of
//! thread, and an upload then takes half as long again (0.13, loopback, 2026-11).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use reqwest::blocking::{Request, Response};
use reqwest::header::CONTENT_LENGTH;
use reqwest::redirect::Policy;
use reqwest::{Body, Client, ResponseBuilderExt};
use tokio::runtime::{Builder, Runtime};

use super::client::USER_AGENT;

/// Part of a file, read where it lies as often as it is sent.
pub(super) struct Section {
    pub file: Arc<File>,
    pub position: u64,
    pub left: u64,
}

const PIECE_BYTES: usize = 256 << 10;

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        let n = self.file.read_at(&mut buffer[..most], self.position)?;
        self.position += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

impl Section {
    fn pieces(self) -> Body {
        Body::wrap_stream(stream::try_unfold(self, |mut section| async move {
            let mut piece = vec![0; PIECE_BYTES];
            let n = section.read(&mut piece)?;
            piece.truncate(n);
            Ok::<_, std::io::Error>((n > 0).then_some((piece, section)))
        }))
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

    /// Sends a request with a section as its body, in its time for the whole, and reads the answer.
    pub fn send(
        &self,
        request: &Request,
        body: Section,
        timeout: Duration,
    ) -> Result<Response, reqwest::Error> {
        let sending = self
            .client
            .request(request.method().clone(), request.url().clone())
            .headers(request.headers().clone())
            .header(CONTENT_LENGTH, body.left)
            .timeout(timeout)
            .body(body.pieces());
        self.runtime.block_on(async {
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
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_that_part_of_the_file_and_no_more() {
        let mut file = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut file, b"0123456789").expect("writes");
        let mut text = String::new();
        let mut section = Section {
            file: Arc::new(file),
            position: 3,
            left: 4,
        };
        section.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "3456");
    }
}
