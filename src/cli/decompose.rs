//! `svdhub decompose`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use svdhub::card::{bytes, thousands};
use svdhub::decompose::{self, Facts, Options};
use svdhub::format::ArtifactLayout;
use svdhub::hub::ModelRef;
use svdhub::job::{Share, ShareRecord};
use svdhub::linalg::{Algorithm, Backend, TOLERANCES};
use svdhub::outlet::Outlet;
use svdhub::{Error, Result, publish};

use super::passing::{Passing, told, with_push};
use super::plan::PlanArgs;
use super::progress::clock;
use super::session::{DeviceChoice, Session, shown};
use super::size::size;

/// Split every linear weight into singular values and vectors.
///
/// Works on a few matrices at a time, whatever the size of the model. Interrupted, the same command goes on where it
/// stopped. The result restores the base byte for byte, can be published once, and trained from by many. With --stream and
/// --push neither the model nor its decomposition ever lies on this disk as a whole.
#[derive(Args)]
pub struct Command {
    /// A Hub id (org/name, org/name@revision) or a directory
    model: ModelRef,
    /// Where to write the decomposition
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    plan: PlanArgs,
    /// Largest relative error of each kept singular value
    #[arg(long, value_name = "T", default_value_t = Algorithm::default().tolerance, value_parser = tolerance)]
    tolerance: f64,
    /// Rather fast than exact: singular values err by up to 15 %, as torch.svd_lowrank's do
    #[arg(long, conflicts_with = "tolerance")]
    fast: bool,
    /// Multiply whole matrices there: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: DeviceChoice,
    /// Start a new file when one would grow beyond this (500MB, 5GB) [default: 5GB; 2GB where files only pass through]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shard_size: Option<u64>,
    /// Do only share I of N, for `svdhub assemble` to join; N machines with the same options do it all
    #[arg(long, value_name = "I/N", conflicts_with = "push")]
    part: Option<Share>,
    #[command(flatten)]
    passing: Passing,
}

fn tolerance(text: &str) -> Result<f64> {
    let value = text.parse::<f64>().ok().filter(|t| TOLERANCES.contains(t));
    value.ok_or_else(|| Error::Parse {
        what: "a tolerance",
        value: text.into(),
        reason: "expected a number from 1e-6 (the limit of f32 factors) to 0.1".into(),
    })
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let base = match self.passing.stream {
            true => session.base_in_place(&self.model)?,
            false => session.base(&self.model)?,
        };
        let backend = Backend::from(session.device(self.device)?);
        let usual = match self.passing.passes_through() {
            true => decompose::PASSING_SHARD_BYTES,
            false => Options::default().shard_bytes_max,
        };
        let options = Options {
            plan: self.plan.options(),
            algorithm: Algorithm {
                tolerance: self.tolerance,
                fast: self.fast,
                backend: backend.name().into(),
                ..Algorithm::default()
            },
            backend,
            shard_bytes_max: self.shard_size.unwrap_or(usual),
        };
        if let Some(share) = self.part {
            let record =
                decompose::run_share(&base, &self.out, share, &options, session.observer())?;
            return session.print(&record, || show_share(&record, &shown(&self.out)));
        }
        let hub = self.passing.hub(session)?;
        // a sidecar may stand beside its base
        let is_whole = options.plan.storing.layout == ArtifactLayout::Residual;
        let foreign =
            |name: &str| is_whole && publish::are_weights(name) && !name.starts_with("svd");
        let outlet = self.passing.outlet(hub, session, &foreign)?;
        let outlet = outlet.as_ref().map(|outlet| outlet as &dyn Outlet);
        let facts = decompose::run_to(&base, &self.out, outlet, &options, session.observer())?;
        let pushed = self.passing.publish(hub, &self.out, session)?;
        session.print(&with_push(&facts, pushed.as_ref()), || {
            show(&facts, &shown(&self.out)) + &told(pushed.as_ref())
        })
    }
}

fn show_share(record: &ShareRecord, out: &str) -> String {
    format!(
        "part {}: {} matrices, {:.1} GFLOP · {} in {}\n\n{out}\n",
        record.part,
        record.modules.len(),
        record.flops as f64 / 1e9,
        bytes(record.bytes),
        clock(record.seconds),
    )
}

/// A decomposition for people.
pub fn show(facts: &Facts, out: &str) -> String {
    let mut text = format!(
        "{} linear layers, {} singular values, {:.1} % of the energy · {} in {}\n",
        facts.linear_layers,
        thousands(facts.trainable.sigma),
        100.0 * facts.captured_energy,
        bytes(facts.bytes),
        clock(facts.seconds),
    );
    if facts.exceptions > 0 {
        text.push_str(&format!(
            "{} elements ({:.2} %) are stored exactly, so that the base comes back byte for byte\n",
            thousands(facts.exceptions),
            100.0 * facts.exceptions_share
        ));
    }
    if facts.untied_head {
        text.push_str("the head is untied from the embedding: the merged model will have one more tensor, and say so\n");
    }
    text.push_str(&format!("\n{out}\n"));
    text
}
