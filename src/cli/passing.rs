//! Options of the verbs that can work from the Hub to the Hub, with little on this disk.

use std::path::Path;

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use svdhub::hub::{Hub, HubOutlet, PushOptions, Pushed};
use svdhub::{Result, publish};

use super::session::Session;
use super::size::size;

/// Where weights come from, and where they go.
#[derive(Args)]
pub struct Passing {
    /// Leave the weights on the Hub and read each tensor by byte range; otherwise they are downloaded into the cache
    #[arg(long, help_heading = "Hub")]
    pub stream: bool,
    /// Send each finished file to this repository while others are made, and publish all of it in the end
    #[arg(long, value_name = "REPO", help_heading = "Hub")]
    push: Option<String>,
    /// Keep what was sent on this disk too; otherwise each file is removed once the Hub has it
    #[arg(long, requires = "push", help_heading = "Hub")]
    keep: bool,
    /// Take at most this much of the disk on the way (14GB) [default: 10GB, as far as it is free and enough]
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "push", conflicts_with = "keep", help_heading = "Hub")]
    disk: Option<u64>,
    /// Create the repository private
    #[arg(long, requires = "push", help_heading = "Hub")]
    private: bool,
    /// Push to this branch, made if it is not there
    #[arg(long, value_name = "BRANCH", requires = "push", help_heading = "Hub")]
    branch: Option<String>,
    /// Delete the weights in the repository that are not among these, in the last commit
    #[arg(long, requires = "push", help_heading = "Hub")]
    replace: bool,
}

impl Passing {
    fn options(&self) -> PushOptions {
        PushOptions {
            private: self.private,
            branch: self.branch.clone(),
            replace: self.replace,
            ..PushOptions::default()
        }
    }

    /// Whether what is made does not stay on this disk.
    pub fn passes_through(&self) -> bool {
        self.push.is_some() && !self.keep
    }

    /// The Hub, where it is needed.
    pub fn hub<'a>(&self, session: &'a Session) -> Result<Option<&'a Hub>> {
        match self.push {
            Some(_) => Ok(Some(session.hub()?)),
            None => Ok(None),
        }
    }

    /// Where finished files go, if not only to the output directory; weights there that cannot be ours are `foreign`.
    pub fn outlet<'a>(
        &self,
        hub: Option<&'a Hub>,
        session: &'a Session,
        foreign: &dyn Fn(&str) -> bool,
    ) -> Result<Option<HubOutlet<'a>>> {
        let (Some(repo), Some(hub)) = (&self.push, hub) else {
            return Ok(None);
        };
        publish::refuse_no_repo(repo)?;
        let observer = session.observer();
        let (options, keep, room) = (self.options(), self.keep, self.disk);
        let outlet = hub.outlet(repo, &options, keep, room, foreign, observer)?;
        Ok(Some(outlet))
    }

    /// Publishes what is in the output directory, and what was sent from it.
    pub fn publish(
        &self,
        hub: Option<&Hub>,
        out: &Path,
        session: &Session,
    ) -> Result<Option<Pushed>> {
        let (Some(repo), Some(hub)) = (&self.push, hub) else {
            return Ok(None);
        };
        publish::run(hub, out, repo, &self.options(), session.observer()).map(Some)
    }
}

/// Facts with those of the push beside them.
pub fn with_push(facts: &impl Serialize, pushed: Option<&Pushed>) -> Value {
    let mut facts = json!(facts);
    if let Some(pushed) = pushed {
        facts["pushed"] = json!(pushed);
    }
    facts
}

/// A line about the push, if there was one.
pub fn told(pushed: Option<&Pushed>) -> String {
    match pushed {
        None => String::new(),
        Some(pushed) => format!(
            "commit {} · the remote files are those that were made here, by hash\n\n{}\n",
            pushed.commit, pushed.url
        ),
    }
}
