//! `generate`: what a model, or a decomposition with adapters, makes of a prompt.

pub mod choice;
mod spelling;

use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use chrono::NaiveDateTime;
use serde::{Deserialize, Serialize};

use crate::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::event::Observer;
use crate::model::{Cache, Decoder, Trained};
use crate::random::SplitMix;
use crate::source::{Source, load};
use crate::text::{encode, tokenizer};
use choice::{Choice, likeliest};
use spelling::Spelling;

/// New tokens, unless it is said how many.
pub const TOKENS_MAX: usize = 256;

/// How to go on from a prompt.
#[derive(Debug, Clone)]
pub struct Options {
    /// New tokens at most.
    pub tokens_max: usize,
    pub choice: Choice,
    /// Whether the prompt goes through the chat template; if it is not said, where the model has one.
    pub chat: Option<bool>,
    /// What a chat template takes for the present.
    pub now: NaiveDateTime,
    pub device: Device,
}

impl Options {
    /// As the files of the model in `dir` say.
    pub fn read(dir: &Path, observer: &dyn Observer) -> Result<Self> {
        Ok(Self {
            tokens_max: TOKENS_MAX,
            choice: Choice::read(dir, observer)?,
            chat: None,
            now: chrono::Utc::now().naive_utc(),
            device: Device::Cpu,
        })
    }
}

/// Why a text went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// The model ended it.
    End,
    /// As many tokens are there as were asked for.
    Tokens,
    /// The model reaches no further position.
    Positions,
}

/// The facts of a generation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub prompt: String,
    /// What came behind it.
    pub text: String,
    /// Of the prompt, with what a chat template or the tokenizer adds.
    pub prompt_tokens: usize,
    /// New ones, the end included.
    pub tokens: usize,
    pub ids: Vec<u32>,
    pub stop: Stop,
    pub seconds: f64,
    /// New tokens, the reading of the prompt included.
    pub tokens_per_s: f64,
}

/// Goes on from `prompt`, and tells `say` each piece of text as soon as it is sure.
///
/// # Errors
/// An empty prompt, or one that leaves no room for an answer; a chat template that is missing or refuses.
pub fn run(
    source: &Source,
    prompt: &str,
    options: &Options,
    observer: &dyn Observer,
    say: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Facts> {
    let dir = source.dir();
    if prompt.is_empty() {
        return Err(Error::PromptEmpty);
    }
    let config = source.config()?;
    let template = match options.chat {
        Some(true) => Some(ChatTemplate::required(dir)?),
        Some(false) => None,
        None => ChatTemplate::read(dir)?,
    };
    let tokenizer = tokenizer(dir)?;
    let path = dir.join("tokenizer.json");
    // a template writes the special tokens itself
    let (text, adds_tokens) = match &template {
        Some(template) => (template.ready(options.now)?.opened_by(prompt)?, false),
        None => (prompt.to_string(), true),
    };
    let read = &encode(&tokenizer, &path, &text, adds_tokens)?[..];
    if read.is_empty() {
        return Err(Error::PromptEmpty);
    }
    if let Some(&id) = read.iter().find(|&&id| id as usize >= config.vocabulary) {
        return Err(Error::TokenOutside {
            path,
            id,
            vocabulary: config.vocabulary,
        });
    }
    let most = config.positions_reached();
    if read.len() >= most {
        return Err(Error::PromptTooLong {
            path: config.path,
            found: read.len(),
            most,
        });
    }
    let decoder = load(source, Trained::default(), &options.device, observer)?;
    let started = Instant::now();
    let mut spelling = Spelling::behind(&tokenizer, &path, read);
    let mut text = String::new();
    let (ids, stop) = go_on(&decoder, read, options, &mut |id| {
        let piece = spelling.push(id)?;
        text.push_str(&piece);
        say(&piece)
    })?;
    let rest = spelling.finish()?;
    say(&rest)?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Facts {
        prompt: prompt.into(),
        text: text + &rest,
        prompt_tokens: read.len(),
        tokens: ids.len(),
        tokens_per_s: ids.len() as f64 / seconds.max(1e-9),
        ids,
        stop,
        seconds,
    })
}

/// The tokens that a decoder puts behind those it `read`, each told to `say`, and why it stopped.
pub fn go_on(
    decoder: &Decoder,
    read: &[u32],
    options: &Options,
    say: &mut dyn FnMut(u32) -> Result<()>,
) -> Result<(Vec<u32>, Stop)> {
    let choice = &options.choice;
    let most = decoder.config.positions_reached();
    let mut random = SplitMix(choice.sampling.seed);
    let mut cache = Cache::default();
    let mut all = read.to_vec();
    let stop = loop {
        let new = all.len() - read.len();
        if new == options.tokens_max {
            break Stop::Tokens;
        }
        if all.len() >= most {
            break Stop::Positions;
        }
        let unread = &all[cache.tokens()..];
        let ids = Tensor::new(unread, &decoder.device)?.unsqueeze(0)?;
        let logits = decoder.next_logits(&mut cache, &ids)?;
        let mut logits = logits.squeeze(0)?.to_vec1::<f32>()?;
        choice.penalise(&mut logits, &all);
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(Error::BrokenLogits { token: all.len() });
        }
        let id = match choice.samples {
            true => choice.sampling.draw(&logits, &mut random),
            false => likeliest(&logits),
        };
        all.push(id);
        say(id)?;
        if choice.ends.contains(&id) {
            break Stop::End;
        }
    };
    Ok((all.split_off(read.len()), stop))
}
