//! `svdhub publish`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use svdhub::card::bytes;
use svdhub::hub::{PushOptions, Pushed, published_files};
use svdhub::outlet::Away;
use svdhub::workspace::refuse_unfinished;
use svdhub::{Result, publish};

use super::session::Session;

/// Push a directory to the Hub, with a card.
///
/// The card is rendered from report.json (a README of your own is left alone). All files but hidden ones go up, in one
/// commit where they fit, else the weights first and the card last; then they are compared with the local ones by hash.
/// Files that are there already are not sent again: after a break, run the same command once more.
#[derive(Args)]
pub struct Command {
    /// A decomposition, an adapter, a model or an export
    dir: PathBuf,
    /// org/name
    repo: String,
    /// Create the repository private
    #[arg(long)]
    private: bool,
    /// Push to this branch, made if it is not there
    #[arg(long, value_name = "BRANCH")]
    branch: Option<String>,
    /// Open a pull request instead of committing
    #[arg(long)]
    pr: bool,
    /// Tag the commit
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// The commit's title
    #[arg(long, value_name = "TEXT", default_value_t = PushOptions::default().message)]
    message: String,
    /// Delete the weights in the repository that are not among these, in the same commit
    #[arg(long)]
    replace: bool,
    /// Write the card and say what would be sent
    #[arg(long)]
    dry_run: bool,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        if self.dry_run {
            refuse_unfinished(&self.dir)?;
            publish::refuse_no_repo(&self.repo)?;
            publish::write_card(&self.dir, &self.repo, session.observer())?;
            let mut files = published_files(&self.dir)?;
            let away = Away::of(&self.dir)?.files;
            files.extend(
                away.into_keys()
                    .filter(|name| !self.dir.join(name).exists()),
            );
            let facts = json!({"repo": self.repo, "files": files, "dry_run": true});
            return session.print(&facts, || {
                let list: String = files.iter().map(|f| format!("  {f}\n")).collect();
                format!("would be sent to {}:\n{list}", self.repo)
            });
        }
        let options = PushOptions {
            private: self.private,
            branch: self.branch.clone(),
            pull_request: self.pr,
            tag: self.tag.clone(),
            message: self.message.clone(),
            replace: self.replace,
        };
        let pushed = publish::run(
            session.hub()?,
            &self.dir,
            &self.repo,
            &options,
            session.observer(),
        )?;
        session.print(&pushed, || show(&pushed))
    }
}

fn show(pushed: &Pushed) -> String {
    format!(
        "{} files, {} unchanged, {} sent · commit {}\nthe remote files are the local ones, by hash\n\n{}\n",
        pushed.files,
        pushed.unchanged,
        bytes(pushed.bytes_sent),
        pushed.commit,
        pushed.pull_request_url.as_ref().unwrap_or(&pushed.url)
    )
}
