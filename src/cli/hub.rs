//! `svdhub hub`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use svdhub::hub::server::{Server, ServerOptions};
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
        /// The token that may write; without one, any token that begins with hf_ may
        #[arg(long, value_name = "T")]
        token: Option<String>,
    },
}

impl Command {
    pub fn run(&self, _: &Session) -> Result<ExitCode> {
        let Action::Serve { dir, port, token } = &self.action;
        let options = ServerOptions {
            port: *port,
            token: token.clone(),
        };
        let server = Server::start(dir, &options).map_err(|e| Error::io("serve", dir, e))?;
        tell(&format!("{}\n", server.endpoint()))?;
        server.wait();
        Ok(ExitCode::SUCCESS)
    }
}
