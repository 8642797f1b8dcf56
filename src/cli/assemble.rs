//! `svdhub assemble`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use svdhub::Result;
use svdhub::assemble::{self, Shares};
use svdhub::hub::ModelRef;

use super::decompose::show;
use super::session::{Session, shown};

/// Join the parts that several machines decomposed.
///
/// The result is, byte for byte, what `svdhub decompose` without --part writes. Interrupted, the same command goes on
/// where it stopped. The parts themselves stay as they are.
#[derive(Args)]
pub struct Command {
    /// The directories that `svdhub decompose --part` wrote, all of them, in any order
    #[arg(required = true, value_name = "DIR")]
    parts: Vec<PathBuf>,
    /// Where to write the decomposition
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The model that was decomposed, if it is not where the parts say
    #[arg(long, value_name = "MODEL")]
    base: Option<ModelRef>,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let shares = Shares::open(&self.parts)?;
        let dirs: Vec<_> = shares.dirs().collect();
        let base = session.base_of(&dirs, &shares.job().base, self.base.as_ref())?;
        let facts = assemble::run(&shares, &base, &self.out, session.observer())?;
        session.print(&facts, || show(&facts, &shown(&self.out)))
    }
}
