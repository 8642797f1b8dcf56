//! `svdhub convert`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use svdhub::Result;
use svdhub::convert::{self, Options};
use svdhub::format::{ArtifactLayout, FactorsDtype};
use svdhub::hub::ModelRef;

use super::decompose::show;
use super::plan::RankArgs;
use super::session::{Session, shown};
use super::size::size;

/// Change how a decomposition is stored: its layout, the dtype of its vectors, or how many triplets it keeps.
///
/// Fewer triplets are the first ones of those that are there: of a sidecar in a Hub repository nothing else is fetched, so
/// that one published decomposition serves every smaller rank. Interrupted, the same command goes on where it stopped.
#[derive(Args)]
pub struct Command {
    /// A decomposition: a Hub id or a directory
    decomposition: ModelRef,
    /// Where to write the new one
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// residual: self-contained; sidecar: small, needs the base model beside it [default: as it is]
    #[arg(long, value_name = "LAYOUT")]
    layout: Option<ArtifactLayout>,
    /// f32 or bf16 [default: as it is]
    #[arg(long, value_name = "DTYPE")]
    factors_dtype: Option<FactorsDtype>,
    #[command(flatten)]
    rank: RankArgs,
    /// The base model of a sidecar, if it is needed and not where the sidecar says
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
    /// Start a new file when one would grow beyond this (500MB, 5GB)
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    shard_size: u64,
}

/// Requests under way at once: each waits for the Hub longer than for this machine.
const REMOTE_THREADS: usize = 8;

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let mut options = Options {
            layout: self.layout,
            factors: self.factors_dtype,
            rank: self.rank.rank(),
            shard_bytes_max: self.shard_size,
            ..Options::default()
        };
        let (mut artifact, mut origin) = session.artifact_in_place(&self.decomposition)?;
        if options.needs_matrices(&artifact) {
            // every byte is read: they may as well stay in the cache
            (artifact, origin) = session.artifact(&self.decomposition, self.base.as_ref())?;
        } else if matches!(self.decomposition, ModelRef::Repo { .. }) {
            options.threads = options.threads.max(REMOTE_THREADS);
        }
        let facts = convert::run(&artifact, &origin, &self.out, &options, session.observer())?;
        session.print(&facts, || show(&facts, &shown(&self.out)))
    }
}
