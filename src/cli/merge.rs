//! `svdhub merge`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use svdhub::card::bytes;
use svdhub::hub::ModelRef;
use svdhub::merge::{self, Facts, Options};
use svdhub::outlet::Outlet;
use svdhub::source::Source;
use svdhub::weights::{Dtype, Layout, Rounding};
use svdhub::{Error, Result, publish};

use super::passing::{Passing, told, with_push};
use super::progress::clock;
use super::session::{Session, Weighted, shown};

/// Put what was trained back into an ordinary model.
///
/// Files, tensor names and dtypes are the base's. Without an adapter the base itself comes back, byte for byte, and that
/// is checked. Several adapters of one decomposition are added, each with its factor; LoRAs of PEFT too, for which a plain
/// model will do.
#[derive(Args)]
pub struct Command {
    /// A decomposition, or with LoRAs a plain model: a Hub id or a directory
    model: ModelRef,
    /// An adapter of the decomposition, or a LoRA of PEFT, with a factor if wanted; may be repeated (--adapter a*0.7
    /// --adapter b*0.3)
    #[arg(long, value_name = "DIR[*WEIGHT]")]
    adapter: Vec<Weighted>,
    /// Where to write the model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// base, f32, bf16 or f16
    #[arg(long, default_value = "base", value_parser = dtype)]
    dtype: DtypeChoice,
    /// nearest, or stochastic: small changes then survive 16 bits on average, at the price of noise
    #[arg(long, value_name = "HOW", default_value = "nearest")]
    rounding: RoundingChoice,
    /// Of stochastic rounding: the same seed gives the same bytes [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The base model of a sidecar, if it is not where the sidecar says
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
    #[command(flatten)]
    passing: Passing,
}

/// The base's own dtypes, or one for all.
#[derive(Clone, Copy)]
struct DtypeChoice(Option<Dtype>);

fn dtype(text: &str) -> Result<DtypeChoice> {
    let dtype = match text {
        "base" => None,
        "f32" => Some(Dtype::F32),
        "bf16" => Some(Dtype::BF16),
        "f16" => Some(Dtype::F16),
        _ => {
            return Err(Error::Parse {
                what: "a dtype",
                value: text.into(),
                reason: "expected base, f32, bf16 or f16".into(),
            });
        }
    };
    Ok(DtypeChoice(dtype))
}

#[derive(Clone, Copy, ValueEnum)]
enum RoundingChoice {
    Nearest,
    Stochastic,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let rounding = self.rounding()?;
        let base = self.base.as_ref();
        let source = match self.passing.stream {
            true => session.source_to_stream(&self.model, &self.adapter, base)?,
            false => session.source(&self.model, &self.adapter, base)?,
        };
        if let Source::Model(base) = &source {
            return Err(Error::NotAnArtifact {
                path: base.dir.clone(),
            });
        }
        let options = Options {
            dtype: self.dtype.0,
            rounding,
            ..Options::default()
        };
        let hub = self.passing.hub(session)?;
        let of_base = source.base_headers()?;
        let of_base: BTreeSet<&str> = of_base.iter().map(|(file, _)| file.as_str()).collect();
        let index = Layout::Model.index_file();
        let foreign =
            |name: &str| publish::are_weights(name) && !of_base.contains(name) && name != index;
        let outlet = self.passing.outlet(hub, session, &foreign)?;
        let outlet = outlet.as_ref().map(|outlet| outlet as &dyn Outlet);
        let observer = session.observer();
        let facts = merge::run_to(&source, &self.out, outlet, &options, observer)?;
        let pushed = self.passing.publish(hub, &self.out, session)?;
        session.print(&with_push(&facts, pushed.as_ref()), || {
            show(&facts, &shown(&self.out)) + &told(pushed.as_ref())
        })
    }

    fn rounding(&self) -> Result<Rounding> {
        match (self.rounding, self.seed) {
            (RoundingChoice::Nearest, None) => Ok(Rounding::Nearest),
            (RoundingChoice::Nearest, Some(_)) => Err(Error::Parse {
                what: "an option that does something here",
                value: "--seed".into(),
                reason: "only --rounding stochastic draws".into(),
            }),
            (RoundingChoice::Stochastic, seed) => Ok(Rounding::Stochastic {
                seed: seed.unwrap_or_default(),
            }),
        }
    }
}

fn show(facts: &Facts, out: &str) -> String {
    let outcome = if facts.identical_to_base {
        "the base, byte for byte".to_string()
    } else if facts.tensors_identical_to_base {
        "every tensor of the base, byte for byte, and its head untied".to_string()
    } else {
        format!(
            "{:.1} % of the training's effect kept, rounding error {:.1} % of the change, {:.1} % of the elements kept the base's value",
            100.0 * facts.kept_effect,
            100.0 * facts.rounding_loss,
            100.0 * facts.unchanged_share
        )
    };
    format!(
        "{} in {} · {outcome}\n\n{out}\n",
        bytes(facts.bytes),
        clock(facts.seconds)
    )
}
