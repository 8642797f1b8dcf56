//! What can go wrong on purpose, for tests of clients.

use std::io;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures_util::{StreamExt, stream};

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
}

/// Takes the oldest fault that matches a request off the list, or one of its times.
pub fn take(faults: &mut Vec<Fault>, request: &str) -> Option<Effect> {
    faults.retain(|fault| fault.times > 0);
    let mut matching = faults.iter_mut();
    let fault = matching.find(|fault| request.contains(&fault.matching))?;
    fault.times -= 1;
    Some(fault.effect.clone())
}

/// Applies the effects that concern the bytes of a body.
pub fn spoil(body: Body, bytes: u64, effect: Option<Effect>) -> Body {
    match effect {
        Some(Effect::WrongBytes) => wrong(body, bytes / 2),
        Some(Effect::CutBody { after_bytes }) => cut(body, after_bytes),
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
