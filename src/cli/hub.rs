//! `svdhub hub`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use svdhub::hub::server::{Grant, Server, ServerOptions};
use svdhub::{Error, Result};

use super::session::{Session, tell};

/// Serve a Hub of your own on this machine.
#[derive(Args)]
pub struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Serve the repositories kept in a folder, until interrupted
    ///
    /// Speaks the Hub's protocol on the loopback address: set HF_ENDPOINT to the address it prints, and HF_TOKEN to the
    /// token. Python's huggingface_hub needs HF_HUB_DISABLE_XET=1.
    Serve {
        /// Where the repositories are kept
        dir: PathBuf,
        /// 0 takes any free port
        #[arg(long, value_name = "P", default_value_t = 8090)]
        port: u16,
        /// A token that may write; T=read reads, T=org/name writes there alone. Without any, all that begin with hf_ write
        #[arg(long = "token", value_name = "T")]
        grants: Vec<Grant>,
        /// Take larger files in parts of so many bytes
        #[arg(long, value_name = "BYTES")]
        part_bytes: Option<u64>,
    },
}

impl Command {
    pub fn run(&self, _: &Session) -> Result<ExitCode> {
        let Action::Serve {
            dir,
            port,
            grants,
            part_bytes,
        } = &self.action;
        let options = ServerOptions {
            port: *port,
            grants: grants.clone(),
            part_bytes: *part_bytes,
            ..ServerOptions::default()
        };
        let server = Server::start(dir, &options).map_err(|e| Error::io("serve", dir, e))?;
        tell(&format!("{}\n", server.endpoint()))?;
        server.wait();
        Ok(ExitCode::SUCCESS)
    }
}
