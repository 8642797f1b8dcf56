//! `svdhub generate`.

use std::process::ExitCode;

use clap::Args;
use svdhub::generate::choice::{Choice, Sampling};
use svdhub::generate::{self, Facts, Options, Stop};
use svdhub::hub::ModelRef;
use svdhub::{Error, Result, heap};

use super::session::{DeviceChoice, Session, Weighted, tell};
use super::train::positive;

/// Let a model go on from a prompt.
///
/// The text comes on standard output, as soon as it is there. Where the model has a chat template, the prompt is what its
/// user says. Tokens are chosen as the model's generation_config.json says, and where that says nothing the likeliest is.
#[derive(Args)]
pub struct Command {
    /// A model or a decomposition: a Hub id or a directory
    model: ModelRef,
    /// What to go on from
    prompt: String,
    /// An adapter of the decomposition, or a LoRA of PEFT, with a factor if wanted; may be repeated
    #[arg(long, value_name = "DIR[*WEIGHT]")]
    adapter: Vec<Weighted>,
    /// New tokens at most
    #[arg(long, value_name = "N", default_value_t = generate::TOKENS_MAX)]
    max_tokens: usize,
    /// Take the prompt for what the user of a chat says
    #[arg(long, overrides_with = "no_chat")]
    chat: bool,
    /// Go on from the prompt as it is
    #[arg(long, overrides_with = "chat")]
    no_chat: bool,
    /// Choose the likeliest token every time
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "top_k", "seed"], help_heading = "Choice")]
    greedy: bool,
    /// Choose at random, with logits divided by this
    #[arg(long, value_name = "T", value_parser = positive, help_heading = "Choice")]
    temperature: Option<f64>,
    /// Choose at random among the fewest tokens that together are so likely
    #[arg(long, value_name = "P", value_parser = share, help_heading = "Choice")]
    top_p: Option<f64>,
    /// Choose at random among so many of the likeliest tokens; 0 lets all in
    #[arg(long, value_name = "K", help_heading = "Choice")]
    top_k: Option<usize>,
    /// Choose at random; the same seed makes the same choice
    #[arg(long, value_name = "N", help_heading = "Choice")]
    seed: Option<u64>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// The base model of a sidecar, if it is not where the sidecar says
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
}

fn share(text: &str) -> Result<f64> {
    positive(text)
        .ok()
        .filter(|x| *x <= 1.0)
        .ok_or_else(|| Error::Parse {
            what: "a share",
            value: text.into(),
            reason: "expected a number above 0, and at most 1".into(),
        })
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        heap::keep_all();
        let source = session.source(&self.model, &self.adapter, self.base.as_ref())?;
        let mut options = Options::read(source.dir(), session.observer())?;
        options.tokens_max = self.max_tokens;
        self.choose(&mut options.choice);
        options.chat = match (self.chat, self.no_chat) {
            (false, false) => None,
            (chat, _) => Some(chat),
        };
        options.now = chrono::Local::now().naive_local();
        options.device = session.device(self.device)?;
        let mut say = |piece: &str| match session.json {
            true => Ok(()),
            false => tell(piece),
        };
        let observer = session.observer();
        let facts = generate::run(&source, &self.prompt, &options, observer, &mut say)?;
        let code = session.print(&facts, || "\n".into())?;
        if facts.stop == Stop::Positions {
            observer.warn(positions(&facts));
        }
        observer.note(summary(&facts));
        Ok(code)
    }

    /// What was asked for, over what the model has by itself: whoever asks for a way to draw wants tokens drawn.
    fn choose(&self, choice: &mut Choice) {
        let asked = self.temperature.is_some()
            || self.top_p.is_some()
            || self.top_k.is_some()
            || self.seed.is_some();
        choice.samples = !self.greedy && (asked || choice.samples);
        let base = choice.sampling;
        choice.sampling = Sampling {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            seed: self.seed.unwrap_or(base.seed),
        };
    }
}

fn positions(facts: &Facts) -> String {
    let all = facts.prompt_tokens + facts.tokens;
    format!("the text stops at {all} tokens, because the model reaches no further position")
}

fn summary(facts: &Facts) -> String {
    let stop = match facts.stop {
        Stop::End => "the model ended the text",
        Stop::Tokens => "as many as were asked for",
        Stop::Positions => "no further position",
    };
    format!(
        "{} tokens behind {} · {stop} · {:.1} tokens/s",
        facts.tokens, facts.prompt_tokens, facts.tokens_per_s
    )
}
