//! What can go wrong on purpose, for tests of clients.

use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

use super::reply::{Content, Reply};
use crate::hub::PUBLIC_HUB;

const SLOW_PIECE_BYTES: usize = 64 << 10;

/// Something to go wrong.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Part of `METHOD /path?query`.
    pub matching: String,
    pub times: usize,
    pub effect: Effect,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Effect {
    /// This answer, and nothing is carried out.
    Status {
        status: u16,
        headers: Vec<(String, String)>,
        body: String,
    },
    /// The right headers with the full length, then the connection breaks.
    CutBody { after_bytes: u64 },
    /// The byte in the middle of the body is flipped.
    WrongBytes,
    /// The request is carried out, then answered with this.
    StatusAfter { status: u16 },
    /// The right answer, late.
    Slow { delay_ms: u64 },
    /// The right headers, then the body in pieces of at most 64 KiB, each late.
    SlowBody { delay_ms: u64 },
    /// The addresses on the CDN that the answer names permit nothing any more.
    ExpiredLink,
    /// The range that was asked for is not heeded.
    IgnoreRange,
    /// A list of files names one more, of six bytes.
    ExtraFile { path: String },
    /// The answer names the public Hub where it means this one, as through a mirror.
    PublicNames,
}

/// Takes the oldest fault that matches a request off the list, or one of its times.
pub fn take(faults: &mut Vec<Fault>, request: &str) -> Option<Effect> {
    faults.retain(|fault| fault.times > 0);
    let mut matching = faults.iter_mut();
    let fault = matching.find(|fault| request.contains(&fault.matching))?;
    fault.times -= 1;
    Some(fault.effect.clone())
}

/// Applies the effects that concern what an answer says; `endpoint` is what it calls this Hub.
pub fn forge(reply: &mut Reply, effect: Option<&Effect>, endpoint: &str) {
    match effect {
        Some(Effect::ExpiredLink) => {
            readdress(reply, |text| {
                text.replace("signature=", "signature=expired-")
            });
        }
        Some(Effect::PublicNames) => {
            // with its slash: the CDN's address may be longer by a digit
            let (here, there) = (format!("{endpoint}/"), format!("{PUBLIC_HUB}/"));
            readdress(reply, |text| text.replace(&here, &there));
        }
        Some(Effect::ExtraFile { path }) => {
            if let Content::Bytes(bytes) = &mut reply.content
                && let Ok(Value::Array(mut entries)) = serde_json::from_slice(bytes)
            {
                let oid = "ce013625030ba8dba906f756967f9e9ca394464a";
                entries.push(json!({"type": "file", "oid": oid, "size": 6, "path": path}));
                *bytes = Value::Array(entries).to_string().into_bytes();
            }
        }
        _ => {}
    }
}

/// Changes the addresses in an answer.
fn readdress(reply: &mut Reply, change: impl Fn(&str) -> String) {
    let headers = reply.headers.iter_mut();
    for (_, value) in headers.filter(|(name, _)| matches!(*name, "link" | "location")) {
        *value = change(value);
    }
    if let Content::Bytes(bytes) = &mut reply.content {
        *bytes = change(&String::from_utf8_lossy(bytes)).into_bytes();
    }
}

/// Applies the effects that concern the bytes of a body.
pub fn spoil(body: Body, bytes: u64, effect: Option<Effect>) -> Body {
    match effect {
        Some(Effect::WrongBytes) => wrong(body, bytes / 2),
        Some(Effect::CutBody { after_bytes }) => cut(body, after_bytes),
        Some(Effect::SlowBody { delay_ms }) => slow(body, Duration::from_millis(delay_ms)),
        _ => body,
    }
}

fn wrong(body: Body, position: u64) -> Body {
    let mut left = Some(position);
    let mut flip = move |piece: Bytes| {
        let mut piece = piece.to_vec();
        let there = left.and_then(|left| piece.get_mut(usize::try_from(left).ok()?));
        left = match there {
            Some(byte) => {
                *byte ^= 0xff;
                None
            }
            None => left.map(|left| left - piece.len() as u64),
        };
        Bytes::from(piece)
    };
    Body::from_stream(
        body.into_data_stream()
            .map(move |piece| piece.map(&mut flip)),
    )
}

fn slow(body: Body, delay: Duration) -> Body {
    let pieces = body.into_data_stream().flat_map(|piece| {
        let pieces: Vec<_> = match piece {
            Ok(piece) => (0..piece.len())
                .step_by(SLOW_PIECE_BYTES)
                .map(|at| Ok(piece.slice(at..piece.len().min(at + SLOW_PIECE_BYTES))))
                .collect(),
            Err(error) => vec![Err(error)],
        };
        stream::iter(pieces)
    });
    Body::from_stream(pieces.then(move |piece| async move {
        tokio::time::sleep(delay).await;
        piece
    }))
}

fn cut(body: Body, after_bytes: u64) -> Body {
    let start = (body.into_data_stream(), after_bytes);
    Body::from_stream(stream::unfold(start, |(mut pieces, left)| async move {
        if left == 0 {
            // Let what was written so far reach the client before the connection breaks.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let error = axum::Error::new(io::Error::other("cut on purpose"));
            return Some((Err(error), (pieces, 0)));
        }
        let piece = pieces.next().await?;
        let fitting = |piece: Bytes| {
            let bytes = usize::try_from(left).unwrap_or(usize::MAX);
            piece.slice(..piece.len().min(bytes))
        };
        let piece = piece.map(fitting);
        let sent = piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Some((piece, (pieces, left - sent)))
    }))
}
