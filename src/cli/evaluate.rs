//! `svdhub evaluate`.

use std::num::NonZeroUsize;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Map, json};
use svdhub::card::thousands;
use svdhub::evaluate::{self, Facts, Options};
use svdhub::event::Observer;
use svdhub::hub::{DataRef, ModelRef};
use svdhub::source::{Source, base_of_lora};
use svdhub::text::LossOn;
use svdhub::{Result, heap, report};

use super::session::{DeviceChoice, Session, Weighted};
use super::size::count;
use super::train::length;

/// Measure the next-token loss on a text.
///
/// Consecutive windows that share no context; every token but the first of a window is predicted. The result goes into
/// the report of the adapter or model, where that is a directory of ours.
#[derive(Args)]
pub struct Command {
    /// A model or a decomposition: a Hub id or a directory
    model: ModelRef,
    /// An adapter of the decomposition, or a LoRA of PEFT, with a factor if wanted; may be repeated
    #[arg(long, value_name = "DIR[*WEIGHT]")]
    adapter: Vec<Weighted>,
    /// A text, or rows in a file or on the Hub, as `svdhub train` takes them
    #[arg(long, value_name = "FILE|DATASET")]
    data: DataRef,
    /// What is measured of rows with answers: answers, or all
    #[arg(long, value_name = "PART", default_value = "answers")]
    loss_on: LossOn,
    /// Windows at a time
    #[arg(long, value_name = "N", value_parser = count, default_value_t = NonZeroUsize::new(Options::default().batch).expect("the default is positive"))]
    batch: NonZeroUsize,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = Options::default().length, value_parser = length)]
    length: usize,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// The base model of a sidecar, if it is not where the sidecar says
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        heap::keep_all();
        let data = session.data(&self.data)?;
        let source = session.source(&self.model, &self.adapter, self.base.as_ref())?;
        let options = Options {
            batch: self.batch.get(),
            length: self.length,
            loss_on: self.loss_on,
            device: session.device(self.device)?,
        };
        let facts = evaluate::run(&source, &data, &options, session.observer())?;
        let code = session.print(&facts, || {
            format!(
                "loss {:.4} nats/token · perplexity {:.2} · {} tokens · {:.0} tokens/s\n",
                facts.loss,
                facts.perplexity,
                thousands(facts.tokens as u64),
                facts.tokens_per_s
            )
        })?;
        let observer = session.observer();
        if let Err(error) = record(&source, &facts, observer) {
            observer.warn(format!("this is in no report: {error}"));
        }
        Ok(code)
    }
}

/// Whether the report of a LoRA names another base than the one it is evaluated on.
fn stands_elsewhere(lora: &Path, source: &Source, observer: &dyn Observer) -> Result<bool> {
    let Some(named) = base_of_lora(lora)? else {
        return Ok(false);
    };
    let found = match source {
        Source::Model(base) => base.sums(observer)?,
        Source::Decomposition { artifact, .. } => artifact.svd.base.sha256.clone(),
        Source::WithLoras { .. } => return Ok(false),
    };
    Ok(named != json!(found))
}

/// Adds an evaluation to the report of what was evaluated: the adapter's, or the model's if it is ours.
pub fn record(source: &Source, facts: &Facts, observer: &dyn Observer) -> Result<()> {
    let (dir, subject): (&Path, &str) = match source {
        Source::Model(base) => (&base.dir, "merged"),
        Source::Decomposition { artifact, mixture } => match mixture.parts.as_slice() {
            [] => (&artifact.dir, "base"),
            [(adapter, 1.0)] => (&adapter.dir, "trained"),
            // a mixture has no directory of its own
            _ => return Ok(()),
        },
        Source::WithLoras { source, loras } => match (&**source, &loras[..]) {
            (Source::Decomposition { mixture, .. }, _) if !mixture.parts.is_empty() => {
                return Ok(());
            }
            (_, [(lora, 1.0)]) => (&lora.dir, "trained"),
            _ => return Ok(()),
        },
    };
    // a directory in the Hub's cache is a link farm that is shared with others
    let ours = dir.join(svdhub::workspace::STATE_DIR).is_dir() && dir.join(report::FILE).is_file();
    if !ours {
        return Ok(());
    }
    if let Source::WithLoras { source, .. } = source
        && stands_elsewhere(dir, source, observer)?
    {
        let said = "the LoRA was trained on other weight files: this is in no report";
        observer.warn(said.into());
        return Ok(());
    }
    let mut entry = json!(facts);
    entry["subject"] = subject.into();
    report::add(dir, Map::new(), "evaluate", &json!([entry]))
}
