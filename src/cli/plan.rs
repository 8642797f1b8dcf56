//! `svdhub plan`.

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use svdhub::Result;
use svdhub::artifact::is_artifact;
use svdhub::base::Base;
use svdhub::card::{bytes, thousands};
use svdhub::format::{ArtifactLayout, FactorsDtype, Rank, Storing};
use svdhub::hub::ModelRef;
use svdhub::model::ModelConfig;
use svdhub::model::memory::Step;
use svdhub::plan::{
    Action, Foreseen, Pattern, Plan, PlanOptions, PlannedTensor, expected_inventory,
};
use svdhub::train;
use svdhub::weights::{Dtype, Inventory, Layout};
use svdhub::workspace::refuse_unfinished;

use super::output::Table;
use super::progress::clock;
use super::session::Session;
use super::size::{count, size};
use super::train::{Group, MethodArgs, length};

/// Say what will be done with every tensor, and what can be trained.
///
/// Reads config.json and the headers of the weight files; from the Hub by byte range, so that no weights are downloaded.
/// A directory with nothing but a config.json is planned from the shapes its architecture implies.
#[derive(Args)]
pub struct Command {
    /// A Hub id (org/name, org/name@revision) or a directory
    model: ModelRef,
    #[command(flatten)]
    pub options: PlanArgs,
    #[command(flatten)]
    step: StepArgs,
    /// List every tensor
    #[arg(long)]
    all: bool,
}

/// A step of training, to say what memory it takes. As for `train`.
#[derive(Args, Clone)]
struct StepArgs {
    #[command(flatten)]
    method: MethodArgs,
    /// What moves beside the linear layers
    #[arg(
        long,
        value_name = "GROUPS",
        value_delimiter = ',',
        help_heading = "Method"
    )]
    train: Vec<Group>,
    /// Windows per step
    #[arg(long, value_name = "N", value_parser = count, default_value_t = NonZeroUsize::new(train::Options::default().batch).expect("the default is positive"), help_heading = "Method")]
    batch: NonZeroUsize,
    /// Windows computed at a time [default: all of a step]
    #[arg(long, value_name = "N", value_parser = count, help_heading = "Method")]
    micro_batch: Option<NonZeroUsize>,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = train::Options::default().length, value_parser = length, help_heading = "Method")]
    length: usize,
    /// Compute each block again for its gradients
    #[arg(long, help_heading = "Method")]
    recompute: bool,
}

impl StepArgs {
    fn step(&self) -> Result<Step> {
        Ok(Step {
            method: self.method.method(0)?,
            norms: self.train.contains(&Group::Norms),
            embeddings: self.train.contains(&Group::Embeddings),
            batch: self.batch.get(),
            at_once: self.micro_batch.map_or(usize::MAX, NonZeroUsize::get),
            length: self.length,
            recompute: self.recompute,
            on_gpu: false,
        })
    }
}

/// What is decomposed, and how far. The same for `plan` and `decompose`.
#[derive(Args, Clone)]
pub struct PlanArgs {
    #[command(flatten)]
    rank: RankArgs,
    /// Decompose only modules that match, `*` for any characters or part of a name (q_proj, layers.3)
    #[arg(long, value_name = "PATTERN", help_heading = "Rank")]
    include: Vec<Pattern>,
    /// Leave modules that match alone
    #[arg(long, value_name = "PATTERN", help_heading = "Rank")]
    exclude: Vec<Pattern>,
    /// Decompose a head that is tied to the embedding as a copy of its own; the merged model is then untied too
    #[arg(long, help_heading = "Rank")]
    untie_head: bool,
    /// residual: self-contained; sidecar: small, needs the base model beside it
    #[arg(long, value_name = "LAYOUT", default_value = "residual")]
    layout: ArtifactLayout,
    /// f32, or bf16 at half the size: the weights come back exactly all the same
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    factors_dtype: FactorsDtype,
    /// Matrices at a time [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Start a matrix only when it fits into this much memory beside the others (8GB) [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
}

/// How many singular values are kept: one of these.
#[derive(Args, Clone)]
#[group(multiple = false)]
pub struct RankArgs {
    /// Keep this share of each weight's singular values, 0 < F ≤ 1 [default: 0.1; of a decomposition, all it has]
    #[arg(long, value_name = "F", value_parser = Rank::fraction, help_heading = "Rank")]
    rank_fraction: Option<Rank>,
    /// Keep this many singular values of each weight
    #[arg(long, value_name = "Q", help_heading = "Rank")]
    rank: Option<NonZeroUsize>,
    /// Keep as few of each weight as hold this share of its energy Σσ², 0 < E ≤ 1
    #[arg(long, value_name = "E", value_parser = Rank::energy, help_heading = "Rank")]
    energy: Option<Rank>,
    /// Keep the N largest of the whole model, at least one of each weight
    #[arg(long, value_name = "N", help_heading = "Rank")]
    budget: Option<NonZeroU64>,
}

impl RankArgs {
    pub fn rank(&self) -> Option<Rank> {
        self.rank_fraction
            .or(self.energy)
            .or(self.rank.map(Rank::Fixed))
            .or(self.budget.map(|total| Rank::Budget(total.get())))
    }
}

impl PlanArgs {
    pub fn options(&self) -> PlanOptions {
        let default = PlanOptions::default();
        PlanOptions {
            rank: self.rank.rank().unwrap_or(default.rank),
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            untie_head: self.untie_head,
            storing: Storing {
                layout: self.layout,
                factors: self.factors_dtype,
            },
            threads: self.threads.map_or(default.threads, usize::from),
            memory: self.memory,
        }
    }
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let plan = self.plan(session)?;
        session.print(&plan, || show(&plan, &self.model.to_string(), self.all))
    }

    fn plan(&self, session: &Session) -> Result<Plan> {
        let options = self.options.options();
        let step = self.step.step()?;
        let plan = |root: &Path, config: &ModelConfig, inventory: &Inventory| -> Result<Plan> {
            let plan = Plan::new(root, config, inventory, &options)?;
            let factors = options.storing.factors;
            Ok(plan.with_training(config, &step, factors, PlannedTensor::kept_at_most))
        };
        match &self.model {
            ModelRef::Repo { .. } if session.hub()?.options.offline => {
                let base = session.base(&self.model)?;
                let config = ModelConfig::read(&base.dir)?;
                plan(&base.dir, &config, &base.checkpoint.inventory)
            }
            ModelRef::Repo { id, revision } => {
                let (json, inventory, _) = session.hub()?.headers(id, revision)?;
                let root = PathBuf::from(id);
                let config = ModelConfig::parse(&root.join("config.json"), &json)?;
                plan(&root, &config, &inventory)
            }
            ModelRef::Directory(dir) => {
                refuse_unfinished(dir)?;
                let config = ModelConfig::read(dir)?;
                let weights = [Layout::Model.single_file(), Layout::Model.index_file()];
                let has_weights = weights.iter().any(|name| dir.join(name).exists());
                if has_weights || is_artifact(dir) {
                    let base = Base::open(dir, None, None)?;
                    plan(dir, &config, &base.checkpoint.inventory)
                } else {
                    session.observer().note(format!(
                        "{} has no weights: planning from config.json alone, in bf16",
                        dir.display()
                    ));
                    let inventory = expected_inventory(&config, Dtype::BF16)?;
                    plan(dir, &config, &inventory)
                }
            }
        }
    }
}

/// The plan for people.
pub fn show(plan: &Plan, name: &str, all: bool) -> String {
    let mut text = format!(
        "{name}: {}, {} parameters, {} linear layers to decompose ({})\n\n",
        plan.model_type,
        thousands(plan.parameters),
        plan.linear_layers,
        plan.rank
    );
    let trainable = plan.trainable;
    let mut table = Table::new(["trainable numbers", ""]);
    table.row(["Σ", &singular_values(plan, 0)]);
    table.row(["Σ + norms", &singular_values(plan, trainable.norms)]);
    for (rank, count) in by_rank(&plan.lora) {
        table.row([
            format!("LoRA of rank {rank}, same layers"),
            thousands(count),
        ]);
    }
    table.row(["embeddings, apart", &thousands(trainable.embeddings)]);
    text.push_str(&table.render());

    let title = if plan.ranks_known() {
        "cost of decomposing"
    } else {
        "cost of decomposing, at most"
    };
    let mut table = Table::new([title, ""]);
    table.row(["disk", &bytes(plan.disk_bytes)]);
    table.row([
        format!("peak memory, {} at a time", plan.threads),
        bytes(plan.peak_bytes),
    ]);
    table.row([
        format!("time, {:.1} GFLOP, estimated", plan.flops as f64 / 1e9),
        clock(plan.seconds.max(1.0)),
    ]);
    text.push('\n');
    text.push_str(&table.render());
    if let Some(training) = &plan.training {
        text.push_str(&format!(
            "\ntraining by {}, {} × {} tokens{}: {} numbers move, peak memory {} on a CPU\n",
            training.method,
            training.batch,
            training.length,
            match (training.micro_batch, training.recompute) {
                (None, false) => String::new(),
                (None, true) => ", recomputing".into(),
                (Some(windows), false) => format!(", {windows} at a time"),
                (Some(windows), true) => format!(", {windows} at a time, recomputing"),
            },
            thousands(training.parameters),
            bytes(training.peak_bytes),
        ));
    }
    text.push('\n');
    text.push_str(&if all { every(plan) } else { groups(plan) });
    text
}

/// How many Σ and `more` are, or can be where the weights themselves will tell.
pub fn singular_values(plan: &Plan, more: u64) -> String {
    let Foreseen {
        sigma, sigma_max, ..
    } = plan.trainable;
    match sigma {
        Some(sigma) => thousands(sigma + more),
        None => format!("at most {}", thousands(sigma_max + more)),
    }
}

fn by_rank(lora: &BTreeMap<String, u64>) -> Vec<(u64, u64)> {
    let parsed = lora.iter().map(|(rank, &n)| (rank.parse().unwrap_or(0), n));
    let mut ranks: Vec<(u64, u64)> = parsed.collect();
    ranks.sort_unstable();
    ranks
}

fn shape(shape: &[usize]) -> String {
    let sides: Vec<String> = shape.iter().map(ToString::to_string).collect();
    sides.join(" × ")
}

fn every(plan: &Plan) -> String {
    let mut table = Table::new(["tensor", "shape", "dtype", "q", "why"]);
    for tensor in &plan.tensors {
        let q = match (tensor.action, tensor.q) {
            (Action::Copy, _) => "–".into(),
            (Action::Decompose, Some(q)) => q.to_string(),
            (Action::Decompose, None) => format!("≤ {}", tensor.q_max),
        };
        let cells = [
            tensor.name.clone(),
            shape(&tensor.shape),
            tensor.dtype.clone(),
            q,
            tensor.reason.clone(),
        ];
        table.row(cells);
    }
    table.render()
}

/// Layers repeat: tensors that differ in a number only are shown as one line.
fn groups(plan: &Plan) -> String {
    let mut seen: Vec<(String, usize)> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for tensor in &plan.tensors {
        let name: Vec<&str> = tensor
            .name
            .split('.')
            .map(|part| {
                if part.parse::<u32>().is_ok() {
                    "*"
                } else {
                    part
                }
            })
            .collect();
        let what = match tensor.action {
            Action::Decompose => "decompose",
            Action::Copy => "copy",
        };
        let key = [
            name.join("."),
            shape(&tensor.shape),
            what.into(),
            tensor.reason.clone(),
        ]
        .join("\t");
        let at = *places.entry(key.clone()).or_insert_with(|| {
            seen.push((key, 0));
            seen.len() - 1
        });
        seen[at].1 += 1;
    }
    let mut table = Table::new(["tensors", "count", "shape", "", "why"]);
    for (key, count) in seen {
        let cells: Vec<&str> = key.split('\t').collect();
        table.row([cells[0], &count.to_string(), cells[1], cells[2], cells[3]]);
    }
    table.render()
}
