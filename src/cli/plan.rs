//! `svdhub plan`.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use svdhub::base::Base;
use svdhub::card::{bytes, thousands};
use svdhub::format::{ArtifactLayout, Rank};
use svdhub::hub::ModelRef;
use svdhub::model::ModelConfig;
use svdhub::plan::{Action, Pattern, Plan, PlanOptions, expected_inventory};
use svdhub::weights::{Dtype, Layout};
use svdhub::{Error, Result};

use super::decompose::size;
use super::output::Table;
use super::progress::clock;
use super::session::Session;

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
    /// List every tensor
    #[arg(long)]
    all: bool,
}

/// What is decomposed, and how far. The same for `plan` and `decompose`.
#[derive(Args, Clone)]
pub struct PlanArgs {
    /// Keep this share of each weight's singular values, 0 < F ≤ 1 [default: 0.1]
    #[arg(long, value_name = "F", value_parser = Rank::fraction, conflicts_with = "rank", help_heading = "Rank")]
    rank_fraction: Option<Rank>,
    /// Keep this many singular values of each weight
    #[arg(long, value_name = "Q", help_heading = "Rank")]
    rank: Option<NonZeroUsize>,
    /// Decompose only modules that match, `*` for any characters or part of a name (q_proj, layers.3)
    #[arg(long, value_name = "PATTERN", help_heading = "Rank")]
    include: Vec<Pattern>,
    /// Leave modules that match alone
    #[arg(long, value_name = "PATTERN", help_heading = "Rank")]
    exclude: Vec<Pattern>,
    /// residual: self-contained; sidecar: small, needs the base model beside it
    #[arg(long, value_name = "LAYOUT", default_value = "residual", value_parser = layout)]
    layout: ArtifactLayout,
    /// Matrices at a time [default: one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Start a matrix only when it fits into this much memory beside the others (8GB) [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
}

fn layout(text: &str) -> Result<ArtifactLayout> {
    match text {
        "residual" => Ok(ArtifactLayout::Residual),
        "sidecar" => Ok(ArtifactLayout::Sidecar),
        _ => Err(Error::Parse {
            what: "a layout",
            value: text.into(),
            reason: "expected residual or sidecar".into(),
        }),
    }
}

impl PlanArgs {
    pub fn options(&self) -> PlanOptions {
        let default = PlanOptions::default();
        PlanOptions {
            rank: self
                .rank_fraction
                .or(self.rank.map(Rank::Fixed))
                .unwrap_or(default.rank),
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            layout: self.layout,
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
        match &self.model {
            ModelRef::Repo { .. } if session.hub()?.options.offline => {
                let base = session.base(&self.model)?;
                let config = ModelConfig::read(&base.dir)?;
                Plan::new(&base.dir, &config, &base.checkpoint.inventory, &options)
            }
            ModelRef::Repo { id, revision } => {
                let (json, inventory, _) = session.hub()?.headers(id, revision)?;
                let root = PathBuf::from(id);
                let config = ModelConfig::parse(&root.join("config.json"), &json)?;
                Plan::new(&root, &config, &inventory, &options)
            }
            ModelRef::Directory(dir) => {
                let config = ModelConfig::read(dir)?;
                let weights = [Layout::Model.single_file(), Layout::Model.index_file()];
                if weights.iter().any(|name| dir.join(name).exists()) {
                    let base = Base::open(dir, None, None)?;
                    Plan::new(dir, &config, &base.checkpoint.inventory, &options)
                } else {
                    session.observer().note(format!(
                        "{} has no weights: planning from config.json alone, in bf16",
                        dir.display()
                    ));
                    let inventory = expected_inventory(&config, Dtype::BF16)?;
                    Plan::new(dir, &config, &inventory, &options)
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
    table.row(["Σ", &thousands(trainable.sigma)]);
    table.row(["Σ + norms", &thousands(trainable.sigma + trainable.norms)]);
    for (rank, count) in by_rank(&plan.lora) {
        table.row([
            format!("LoRA of rank {rank}, same layers"),
            thousands(count),
        ]);
    }
    table.row(["embeddings, apart", &thousands(trainable.embeddings)]);
    text.push_str(&table.render());

    let mut table = Table::new(["cost of decomposing", ""]);
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
    text.push('\n');
    text.push_str(&if all { every(plan) } else { groups(plan) });
    text
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
        let q = tensor.q.map_or("–".into(), |q| q.to_string());
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
