//! `svdhub export`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use svdhub::card::{bytes, thousands};
use svdhub::export::{self, Facts, LoraFacts, Options, SvdTrainingFacts, Target, Written};
use svdhub::hub::ModelRef;
use svdhub::{Error, Result};

use super::output::Table;
use super::progress::clock;
use super::session::{Session, Weighted, shown};

/// Write trained singular values for other programs.
///
/// `peft-lora` writes a LoRA that PEFT and serving engines put on the base model: each trained σ is a row of it, so that
/// nobody needs the decomposition any more and nothing is lost, unless --rank (or the 512 that engines take) leaves the
/// smallest changes out. What that costs is known before, and measured on what was written. `svd-training` writes the state dict of the
/// Python library of that name.
#[derive(Args)]
pub struct Command {
    /// A decomposition: a Hub id or a directory
    decomposition: ModelRef,
    /// An adapter, with a factor if wanted; may be repeated (--adapter a*0.7 --adapter b*0.3)
    #[arg(long, value_name = "DIR[*WEIGHT]", required = true)]
    adapter: Vec<Weighted>,
    /// Who will load it
    #[arg(long, value_name = "FORMAT")]
    to: Format,
    /// Where to write it
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep the so many largest changes of each weight (peft-lora) [default: all, up to 512]
    #[arg(long, value_name = "K")]
    rank: Option<NonZeroUsize>,
    /// The base model of a sidecar, if it is not where the sidecar says
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    PeftLora,
    SvdTraining,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let target = match (self.to, self.rank) {
            (Format::PeftLora, rank) => Target::PeftLora { rank },
            (Format::SvdTraining, None) => Target::SvdTraining,
            (Format::SvdTraining, Some(rank)) => {
                return Err(Error::Parse {
                    what: "--rank",
                    value: rank.to_string(),
                    reason: "svd-training keeps M′ and all triplets; only a LoRA can be cut".into(),
                });
            }
        };
        let (artifact, _) = session.artifact(&self.decomposition, self.base.as_ref())?;
        let mixture = session.mixture(&artifact, &self.adapter)?;
        let options = Options::to(target);
        let facts = export::run(&artifact, &mixture, &self.out, &options, session.observer())?;
        session.print(&facts, || show(&facts, &shown(&self.out)))
    }
}

fn show(facts: &Facts, out: &str) -> String {
    let written = match &facts.written {
        Written::PeftLora(lora) => show_lora(lora),
        Written::SvdTraining(state) => show_state(state),
    };
    format!(
        "{written}{} in {}\n\n{out}\n",
        bytes(facts.bytes),
        clock(facts.seconds)
    )
}

fn show_lora(lora: &LoraFacts) -> String {
    let mut text = String::new();
    if lora.predicted_error > 0.0 {
        let mut table = Table::new(["module", "kept", "of", "error predicted", "measured"]);
        for (name, module) in &lora.modules {
            table.row([
                name.clone(),
                module.kept.to_string(),
                module.trained.to_string(),
                format!("{:.3e}", module.predicted_error),
                format!("{:.3e}", module.measured_error),
            ]);
        }
        text = format!("{}\n", table.render());
    }
    text.push_str(&format!(
        "rank {} · {} of {} changed singular values in {} modules",
        lora.rank,
        thousands(lora.kept as u64),
        thousands(lora.trained as u64),
        lora.modules.len()
    ));
    if !lora.modules_to_save.is_empty() {
        text.push_str(&format!(" · {} norms", lora.modules_to_save.len()));
    }
    text.push_str(&format!(
        "\n‖ΔW − B·A‖ / ‖ΔW‖: {:.3e} predicted, {:.3e} measured\n",
        lora.predicted_error, lora.measured_error
    ));
    text
}

fn show_state(state: &SvdTrainingFacts) -> String {
    format!(
        "{} triplets, and {} of zeros beside them · load with \
         SVDForCausalLM.create_from_model(model, rank_fraction={}) and load_state_dict\n",
        thousands(state.triplets as u64),
        thousands(state.zeros as u64),
        state.rank_fraction
    )
}
