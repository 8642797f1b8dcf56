//! `svdhub hub`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use svdhub::card::bytes;
use svdhub::hub::ModelRef;
use svdhub::hub::server::{Grant, Server, ServerOptions};
use svdhub::{Error, Result};

use super::session::{Session, shown, tell};

/// Fetch from a Hub, or serve one of your own on this machine.
#[derive(Args)]
pub struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Download every file of a repository into a folder, verified by hash
    ///
    /// Goes on where it stopped; what is there already is not sent again.
    Download {
        /// org/name or org/name@revision
        repo: ModelRef,
        /// Where the files go
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Serve the repositories kept in a folder, until interrupted
    ///
    /// Speaks the Hub's protocol on the loopback address: set HF_ENDPOINT to the address it prints, and HF_TOKEN to the
    /// token. Large files come and go by Xet and by LFS; the store of Xet's chunks, on a port of its own, lies open to this
    /// machine. To rehearse a keyless login, set HF_OIDC_RESOURCE to org/name, ACTIONS_ID_TOKEN_REQUEST_URL to
    /// <address>/oidc/token?job=1 and ACTIONS_ID_TOKEN_REQUEST_TOKEN to the token.
    Serve {
        /// Where the repositories are kept
        dir: PathBuf,
        /// 0 takes any free port
        #[arg(long, value_name = "P", default_value_t = 8090)]
        port: u16,
        /// A token that may write; T=read reads, T=propose opens pull requests, T=org/name writes there alone. Without any,
        /// all that begin with hf_ write
        #[arg(long = "token", value_name = "T")]
        grants: Vec<Grant>,
        /// Take larger files in parts of so many bytes
        #[arg(long, value_name = "BYTES")]
        part_bytes: Option<u64>,
        /// Take and give large files by LFS alone: the newest huggingface_hub then needs HF_HUB_DISABLE_XET=1
        #[arg(long)]
        no_xet: bool,
    },
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        match &self.action {
            Action::Download { repo, out } => download(session, repo, out),
            Action::Serve {
                dir,
                port,
                grants,
                part_bytes,
                no_xet,
            } => {
                let options = ServerOptions {
                    port: *port,
                    grants: grants.clone(),
                    part_bytes: *part_bytes,
                    xet: !no_xet,
                    ..ServerOptions::default()
                };
                let server =
                    Server::start(dir, &options).map_err(|e| Error::io("serve", dir, e))?;
                tell(&format!("{}\n", server.endpoint()))?;
                server.wait();
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn download(session: &Session, repo: &ModelRef, out: &Path) -> Result<ExitCode> {
    let ModelRef::Repo { id, revision } = repo else {
        return Err(Error::Parse {
            what: "a repository",
            value: repo.to_string(),
            reason: "it is not of the form org/name or org/name@revision".into(),
        });
    };
    let hub = session.hub()?;
    let found = hub.download(id, revision, out, session.observer())?;
    session.print(&found, || {
        format!(
            "{} files, {} unchanged, {} fetched · commit {}\nevery file is the remote one, by hash\n\n{}\n",
            found.files,
            found.unchanged,
            bytes(found.bytes),
            found.commit,
            shown(out)
        )
    })
}
