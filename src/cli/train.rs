//! `svdhub train`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use svdhub::card::{bytes, thousands};
use svdhub::event::Silent;
use svdhub::hub::{DataRef, ModelRef};
use svdhub::model::{Method, Parametrisation};
use svdhub::text::LossOn;
use svdhub::train::optimizer::Schedule;
use svdhub::train::{self, Duration, Facts, Options};
use svdhub::{Error, Result, heap};

use super::progress::clock;
use super::session::{DeviceChoice, Session, shown};
use super::size::count;

/// Move the singular values on a text, or what another method moves.
///
/// Next-token loss, AdamW. What moved is an adapter that belongs to this decomposition: some kilobytes of Δσ (sigma), or
/// R (lora-xs), or every linear weight in f32 (full); `svdhub merge` makes an ordinary model of each. With lora it is an
/// adapter directory of PEFT, and MODEL may be a plain model too.
#[derive(Args)]
pub struct Command {
    /// A decomposition, or with --method lora any model: a Hub id or a directory
    model: ModelRef,
    /// A text; or a .jsonl, .json or .parquet file with rows of `messages`, of `prompt` and `completion`, of `text`, or of
    /// `instruction`, `input` and `output`; or such files on the Hub: org/name, or hf://datasets/org/name/FILE
    #[arg(long, value_name = "FILE|DATASET")]
    data: DataRef,
    /// What is learnt of rows with answers: answers, or all
    #[arg(long, value_name = "PART", default_value = "answers")]
    loss_on: LossOn,
    /// Where to write the adapter
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    method: MethodArgs,
    /// What moves beside the linear layers: norms, embeddings or both; a tied head moves along with the embedding
    #[arg(long, value_name = "GROUPS", value_delimiter = ',')]
    train: Vec<Group>,
    /// Train for this many steps
    #[arg(long, value_name = "N", conflicts_with = "epochs")]
    steps: Option<NonZeroUsize>,
    /// Train for this many passes over the text [default: 1]
    #[arg(long, value_name = "N", value_parser = positive)]
    epochs: Option<f64>,
    /// Learning rate: each number moves by about this much per step
    /// [default: 1e-2; sigma in relative terms and lora-xs 1e-3, lora 2e-4, full 1e-5]
    #[arg(long, value_name = "X", value_parser = positive)]
    lr: Option<f64>,
    /// constant, linear or cosine (both to zero)
    #[arg(long, default_value = "linear")]
    schedule: Schedule,
    /// Steps over which the learning rate grows to its full size
    #[arg(long, value_name = "N", default_value_t = 0)]
    warmup: usize,
    /// Pull of what moves towards zero: of Δσ and R, that is towards the base model
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = not_negative)]
    weight_decay: f64,
    /// Windows per step
    #[arg(long, value_name = "N", value_parser = count, default_value_t = NonZeroUsize::new(Options::default().batch).expect("the default is positive"))]
    batch: NonZeroUsize,
    /// Windows computed at a time; their gradients are added up: the same step from less memory [default: all of a step]
    #[arg(long, value_name = "N", value_parser = count)]
    micro_batch: Option<NonZeroUsize>,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = Options::default().length, value_parser = length)]
    length: usize,
    /// Of the order of the windows, and of A where a LoRA begins
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Compute each block again for its gradients instead of keeping all of it: the same numbers from less memory, slower
    #[arg(long)]
    recompute: bool,
    /// Go on where an interrupted run stopped
    #[arg(long)]
    resume: bool,
    /// auto, cpu, cuda or cuda:N; with --parallel, auto and cuda take a GPU for each process
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Share each step's windows among the processes that mpirun, srun or torchrun started, on CPUs over MPI, on GPUs, one for
    /// each, over NCCL; all gradients are added up
    #[arg(long)]
    parallel: bool,
    /// The base model of a sidecar, if it is not where the sidecar says
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
}

/// r of a LoRA, unless it is given: PEFT's own.
const LORA_RANK: usize = 8;

/// What moves of the linear layers.
#[derive(Args, Clone)]
pub struct MethodArgs {
    /// sigma: Σ; lora: B·A, on all linear layers and an untied head; lora-xs: r × r numbers between the first r rows of u
    /// and v; full: every linear weight
    #[arg(
        long,
        value_name = "METHOD",
        default_value = "sigma",
        help_heading = "Method"
    )]
    method: MethodChoice,
    /// Of sigma: absolute moves all σ by about the same, relative by the same share of themselves [default: absolute]
    #[arg(long, value_name = "HOW", help_heading = "Method")]
    parametrisation: Option<ParametrisationChoice>,
    #[arg(
        long,
        value_name = "R",
        value_parser = count,
        help_heading = "Method",
        help = format!("r of lora and lora-xs; where fewer triplets are stored, lora-xs takes these [default: {LORA_RANK}]")
    )]
    lora_rank: Option<NonZeroUsize>,
    /// α of lora: B·A is multiplied by α/r [default: 2·r]
    #[arg(long, value_name = "ALPHA", value_parser = count, help_heading = "Method")]
    lora_alpha: Option<NonZeroUsize>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum MethodChoice {
    Sigma,
    Lora,
    LoraXs,
    Full,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum ParametrisationChoice {
    Absolute,
    Relative,
}

impl MethodArgs {
    /// The method; `seed` is of what it draws.
    ///
    /// # Errors
    /// An option of another method.
    pub fn method(&self, seed: u64) -> Result<Method> {
        use MethodChoice::{Full, Lora, LoraXs, Sigma};
        let given = [
            (
                "--parametrisation",
                self.parametrisation.is_some(),
                &[Sigma][..],
            ),
            ("--lora-rank", self.lora_rank.is_some(), &[Lora, LoraXs]),
            ("--lora-alpha", self.lora_alpha.is_some(), &[Lora]),
        ];
        let name = |method: &MethodChoice| {
            let value = method.to_possible_value().expect("none is hidden");
            value.get_name().to_string()
        };
        for (option, is_given, methods) in given {
            if is_given && !methods.contains(&self.method) {
                let methods: Vec<_> = methods.iter().map(name).collect();
                return Err(Error::Parse {
                    what: "an option that does something here",
                    value: option.into(),
                    reason: format!(
                        "the method is {}, and it is one of {}",
                        name(&self.method),
                        methods.join(" and ")
                    ),
                });
            }
        }
        let rank = self.lora_rank.map_or(LORA_RANK, NonZeroUsize::get);
        Ok(match self.method {
            Sigma => Method::Sigma(match self.parametrisation {
                None => Parametrisation::default(),
                Some(ParametrisationChoice::Absolute) => Parametrisation::Absolute,
                Some(ParametrisationChoice::Relative) => Parametrisation::Relative,
            }),
            Lora => Method::Lora(svdhub::model::Lora {
                rank,
                alpha: self.lora_alpha.map_or(2 * rank, NonZeroUsize::get),
                seed,
            }),
            LoraXs => Method::LoraXs { rank },
            Full => Method::Full,
        })
    }
}

/// Numbers that may move beside the linear layers.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Group {
    Norms,
    Embeddings,
}

pub fn positive(text: &str) -> Result<f64> {
    number(text, |x| x > 0.0, "expected one above 0")
}

fn not_negative(text: &str) -> Result<f64> {
    number(text, |x| x >= 0.0, "expected 0, or one above it")
}

fn number(text: &str, fits: impl Fn(f64) -> bool, reason: &str) -> Result<f64> {
    let value = text.parse::<f64>().ok();
    let value = value.filter(|&x| fits(x) && x.is_finite());
    value.ok_or_else(|| Error::Parse {
        what: "a number",
        value: text.into(),
        reason: reason.into(),
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
        heap::keep_all();
        let method = self.method.method(self.seed)?;
        let (device, group) = session.device_and_group(self.device, self.parallel)?;
        let data = session.data(&self.data)?;
        let (source, pin) = session.source_and_origin(&self.model, &[], self.base.as_ref())?;
        let duration = match (self.steps, self.epochs) {
            (Some(steps), _) => Duration::Steps(steps.get()),
            (None, epochs) => Duration::Epochs(epochs.unwrap_or(1.0)),
        };
        let options = Options {
            duration,
            batch: self.batch.get(),
            micro_batch: self.micro_batch.map(NonZeroUsize::get),
            length: self.length,
            learning_rate: self.lr.unwrap_or(method.learning_rate()),
            schedule: self.schedule,
            warmup: self.warmup,
            weight_decay: self.weight_decay,
            method,
            norms: self.train.contains(&Group::Norms),
            embeddings: self.train.contains(&Group::Embeddings),
            seed: self.seed,
            loss_on: self.loss_on,
            recompute: self.recompute,
            resume: self.resume,
            device,
            group: group.clone(),
            ..Options::default()
        };
        if group.rank() > 0 {
            train::assist(&source, &data, &options, &Silent)?;
            group.finish()?;
            return Ok(ExitCode::SUCCESS);
        }
        let facts = train::run(&source, pin, &data, &self.out, &options, session.observer())?;
        group.finish()?;
        session.print(&facts, || show(&facts, &shown(&self.out)))
    }
}

fn show(facts: &Facts, out: &str) -> String {
    let ends = |losses: &[f32]| match (losses.first(), losses.last()) {
        (Some(first), Some(last)) => {
            format!("loss {first:.4} in the first, {last:.4} in the last")
        }
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
