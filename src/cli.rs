//! The command line: what can be asked, and who answers.

mod advice;
mod assemble;
mod convert;
mod decompose;
mod demo;
mod env;
mod evaluate;
mod export;
mod generate;
mod hub;
mod inspect;
mod merge;
mod output;
mod passing;
mod plan;
mod progress;
mod publish;
mod session;
mod size;
mod train;
mod verify;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use session::Session;

/// Fine-tune Hugging Face models by their singular values.
///
/// Every linear weight M is split once as M = M′ + uᵀ·diag(σ)·v; training moves σ alone, forty thousand numbers of 3.8 billion;
/// merging gives back an ordinary model. Each verb reads a directory or a Hub repository and writes a directory.
#[derive(Parser)]
#[command(
    name = "svdhub",
    version,
    max_term_width = 110,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    global: Global,
}

/// Options of every verb.
#[derive(Args)]
pub struct Global {
    /// Print the facts as JSON on standard output
    #[arg(long, global = true, help_heading = "Output")]
    pub json: bool,
    /// Say nothing of progress
    #[arg(short, long, global = true, help_heading = "Output")]
    pub quiet: bool,
    /// Talk to this Hub [default: HF_ENDPOINT, else the public one]
    #[arg(long, global = true, value_name = "URL", help_heading = "Hub")]
    pub endpoint: Option<String>,
}

#[derive(Subcommand)]
enum Verb {
    Plan(plan::Command),
    Decompose(decompose::Command),
    Assemble(assemble::Command),
    Convert(convert::Command),
    Train(train::Command),
    Evaluate(evaluate::Command),
    Generate(generate::Command),
    Merge(merge::Command),
    Export(export::Command),
    Publish(publish::Command),
    Verify(verify::Command),
    Inspect(inspect::Command),
    Demo(demo::Command),
    Hub(hub::Command),
}

/// Parses the arguments, runs the verb, and explains what went wrong.
pub fn run() -> ExitCode {
    env::let_waiting_threads_sleep();
    say_nothing_of_what_is_caught();
    let cli = Cli::parse();
    env::start_logging();
    let session = Session::new(&cli.global);
    let result = match &cli.verb {
        Verb::Plan(command) => command.run(&session),
        Verb::Decompose(command) => command.run(&session),
        Verb::Assemble(command) => command.run(&session),
        Verb::Convert(command) => command.run(&session),
        Verb::Train(command) => command.run(&session),
        Verb::Evaluate(command) => command.run(&session),
        Verb::Generate(command) => command.run(&session),
        Verb::Merge(command) => command.run(&session),
        Verb::Export(command) => command.run(&session),
        Verb::Publish(command) => command.run(&session),
        Verb::Verify(command) => command.run(&session),
        Verb::Inspect(command) => command.run(&session),
        Verb::Demo(command) => command.run(&session),
        Verb::Hub(command) => command.run(&session),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            session.explain(&error);
            ExitCode::FAILURE
        }
    }
}

/// The engine of regular expressions panics at one that takes it too long, and the reader of tables at some that are broken:
/// `text` makes errors of both, which say the same.
fn say_nothing_of_what_is_caught() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let caught = ["/onig-", "/parquet-", "/thrift-"];
        let is_caught = panic
            .location()
            .is_some_and(|at| caught.iter().any(|it| at.file().contains(it)));
        if !is_caught {
            usual(panic);
        }
    }));
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
