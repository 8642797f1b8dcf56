//! `svdhub verify`.

use std::process::ExitCode;

use clap::Args;
use svdhub::Result;
use svdhub::card::bytes;
use svdhub::hub::ModelRef;
use svdhub::verify::{self, Facts};

use super::output::Table;
use super::session::Session;

/// Read a directory again and check every hash, shape and number.
///
/// Knows decompositions, adapters, models and exports. Exits with 1 if anything is not as it should be, and names file and tensor.
#[derive(Args)]
pub struct Command {
    /// A directory, or a Hub id
    dir: ModelRef,
    /// Hold a merged model's names, shapes and dtypes against this base; or give a sidecar its base
    #[arg(long, value_name = "MODEL")]
    against: Option<ModelRef>,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let found = session.locate(&self.dir)?;
        let against = self
            .against
            .as_ref()
            .map(|model| session.base(model))
            .transpose()?;
        let facts = verify::run(&found.dir, against.as_ref(), session.observer())?;
        session.print(&facts, || show(&facts))?;
        Ok(if facts.ok {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

fn show(facts: &Facts) -> String {
    let mut text = format!(
        "{}: {} files, {} tensors, {}\n",
        facts.kind,
        facts.files,
        facts.tensors,
        bytes(facts.bytes)
    );
    for check in &facts.checks {
        text.push_str(&format!("  {check}\n"));
    }
    if facts.ok {
        text.push_str("all as it should be\n");
        return text;
    }
    let mut table = Table::new(["file", "tensor", "expected", "found"]);
    for problem in &facts.problems {
        let tensor = problem.tensor.as_deref().unwrap_or("–");
        table.row([
            problem.file.as_str(),
            tensor,
            &problem.expected,
            &problem.found,
        ]);
    }
    text.push_str(&format!("{} problems:\n", facts.problems.len()));
    text.push_str(&table.render());
    text
}
