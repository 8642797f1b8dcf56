//! `svdhub train`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use svdhub::adapter::Mixture;
use svdhub::card::{bytes, thousands};
use svdhub::hub::ModelRef;
use svdhub::source::Source;
use svdhub::train::optimizer::Schedule;
use svdhub::train::{self, Duration, Facts, Options};
use svdhub::{Error, Result};

use super::progress::clock;
use super::session::{DeviceChoice, Session, keep_freed_memory, shown};

/// Move the singular values on a text.
///
/// Next-token loss, AdamW. Only Σ moves (and the norms, if asked); the result is an adapter of some kilobytes that
/// belongs to this decomposition.
#[derive(Args)]
pub struct Command {
    /// A decomposition: a Hub id or a directory
    decomposition: ModelRef,
    /// A text, or a .jsonl file with a `text` field in every line
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Where to write the adapter
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What moves beside Σ
    #[arg(long, value_name = "GROUPS", value_delimiter = ',')]
    train: Vec<Group>,
    /// Train for this many steps
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<NonZeroUsize>,
    /// Train for this many passes over the text [default: 1]
    #[arg(long, value_name = "N", value_parser = positive)]
    epochs: Option<f64>,
    /// Learning rate: each σ moves by about this much per step
    #[arg(long, value_name = "X", default_value_t = Options::default().learning_rate, value_parser = positive)]
    lr: f64,
    /// constant, linear or cosine (both to zero)
    #[arg(long, default_value = "linear")]
    schedule: Schedule,
    /// Steps over which the learning rate grows to its full size
    #[arg(long, value_name = "N", default_value_t = 0)]
    warmup: usize,
    /// Pull of Δσ towards zero, that is towards the base model
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    weight_decay: f64,
    /// Windows per step
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::new(Options::default().batch).expect("the default is positive"))]
    batch: NonZeroUsize,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = Options::default().length, value_parser = length)]
    length: usize,
    /// Order of the windows
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Go on where an interrupted run stopped
    #[arg(long)]
    resume: bool,
    /// auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// The base model of a sidecar, if it is not where the sidecar says
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
}

/// Numbers that may move beside Σ.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Group {
    Norms,
}

pub fn positive(text: &str) -> Result<f64> {
    let value = text
        .parse::<f64>()
        .ok()
        .filter(|x| *x > 0.0 && x.is_finite());
    value.ok_or_else(|| Error::Parse {
        what: "a number",
        value: text.into(),
        reason: "expected one above 0".into(),
    })
}

/// A window predicts its tokens from those before: it has two at least.
pub fn length(text: &str) -> Result<usize> {
    let value = text.parse::<usize>().ok().filter(|&n| n >= 2);
    value.ok_or_else(|| Error::Parse {
        what: "a window length",
        value: text.into(),
        reason: "expected a whole number of at least 2".into(),
    })
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        keep_freed_memory();
        let (artifact, pin) = session.artifact(&self.decomposition, self.base.as_ref())?;
        let source = Source::Decomposition {
            artifact,
            mixture: Mixture::default(),
        };
        let duration = match (self.steps, self.epochs) {
            (Some(steps), _) => Duration::Steps(steps.get()),
            (None, epochs) => Duration::Epochs(epochs.unwrap_or(1.0)),
        };
        let options = Options {
            duration,
            batch: self.batch.get(),
            length: self.length,
            learning_rate: self.lr,
            schedule: self.schedule,
            warmup: self.warmup,
            weight_decay: self.weight_decay,
            norms: self.train.contains(&Group::Norms),
            seed: self.seed,
            resume: self.resume,
            device: session.device(self.device)?,
            ..Options::default()
        };
        let facts = train::run(
            &source,
            pin,
            &self.data,
            &self.out,
            &options,
            session.observer(),
        )?;
        session.print(&facts, || show(&facts, &shown(&self.out)))
    }
}

fn show(facts: &Facts, out: &str) -> String {
    let ends = |losses: &[f32]| match (losses.first(), losses.last()) {
        (Some(first), Some(last)) => format!("loss {first:.4} → {last:.4}"),
        _ => "no steps".into(),
    };
    format!(
        "{} numbers, {} steps, {} · {:.0} tokens/s, {} · {}\n\n{out}\n",
        thousands(facts.parameters),
        facts.steps,
        ends(&facts.losses),
        facts.tokens_per_s,
        clock(facts.seconds),
        bytes(facts.adapter_bytes),
    )
}
