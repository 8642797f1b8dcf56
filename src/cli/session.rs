//! One run of the program: the Hub it talks to, who watches, and how names become directories.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use candle_core::Device;
use serde::Serialize;
use svdhub::adapter::{Adapter, Mixture};
use svdhub::artifact::{Artifact, is_artifact};
use svdhub::base::{self, Base};
use svdhub::device;
use svdhub::event::Observer;
use svdhub::format::{ArtifactLayout, Origin, Pin};
use svdhub::hub::{Hub, ModelRef, Snapshot};
use svdhub::kind::Kind;
use svdhub::parallel::{self, Alone, Group};
use svdhub::source::Source;
use svdhub::weights::Layout;
use svdhub::workspace::refuse_unfinished;
use svdhub::{Error, Result};

use super::output::plain;
use super::progress::Progress;
use super::{Global, advice, env};

/// Everything a verb needs from outside.
pub struct Session {
    pub json: bool,
    progress: Progress,
    endpoint: Option<String>,
}

impl Session {
    pub fn new(global: &Global) -> Self {
        Self {
            json: global.json,
            progress: Progress::new(global.quiet),
            endpoint: global.endpoint.clone(),
        }
    }

    pub fn observer(&self) -> &dyn Observer {
        &self.progress
    }

    /// The Hub of this session.
    pub fn hub(&self) -> Result<Hub> {
        Hub::new(env::hub_options(self.endpoint.as_deref())?)
    }

    /// Prints facts: as JSON where that was asked for, else through `show`.
    pub fn print(&self, facts: &impl Serialize, show: impl FnOnce() -> String) -> Result<ExitCode> {
        if self.json {
            let json = serde_json::to_string_pretty(facts).expect("facts serialise");
            tell(&format!("{json}\n"))?;
        } else {
            tell(&show())?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Tells what went wrong, why, and what helps.
    pub fn explain(&self, error: &Error) {
        complain(&format!("error: {error}"));
        let mut source = std::error::Error::source(error);
        let mut said = error.to_string();
        while let Some(cause) = source {
            let text = cause.to_string();
            // many libraries repeat their source in their own text
            if !said.contains(&text) {
                complain(&format!("  because: {text}"));
                said.push_str(&text);
            }
            source = cause.source();
        }
        if let Some(help) = advice::advice(error) {
            complain(&format!("  help: {help}"));
        }
    }

    /// A directory as it is, or a repository in the cache.
    pub fn locate(&self, model: &ModelRef) -> Result<Snapshot> {
        match model {
            ModelRef::Directory(dir) => {
                refuse_unfinished(dir)?;
                Ok(Snapshot {
                    dir: dir.clone(),
                    repo: None,
                    commit: None,
                })
            }
            ModelRef::Repo { id, revision } => self.hub()?.snapshot(id, revision, self.observer()),
        }
    }

    /// As [`Session::locate`], but of a repository only the files of these names that it has.
    pub fn locate_files(&self, model: &ModelRef, names: &[&str]) -> Result<Snapshot> {
        match model {
            ModelRef::Directory(_) => self.locate(model),
            ModelRef::Repo { id, revision } => {
                self.hub()?
                    .snapshot_of(id, revision, names, self.observer())
            }
        }
    }

    /// Opens a plain model.
    pub fn base(&self, model: &ModelRef) -> Result<Base> {
        let found = self.locate(model)?;
        Base::open(&found.dir, found.repo, found.commit)
    }

    /// Opens a plain model, of a repository without bringing its weights: they are read by byte range.
    pub fn base_in_place(&self, model: &ModelRef) -> Result<Base> {
        match model {
            ModelRef::Repo { id, revision } if !self.hub()?.options.offline => {
                let hub = Arc::new(self.hub()?);
                let layout = Layout::Model;
                let (found, checkpoint) = hub.remote(id, revision, layout, self.observer())?;
                Ok(Base {
                    dir: found.dir,
                    checkpoint,
                    repo: found.repo,
                    revision: found.commit,
                })
            }
            _ => self.base(model),
        }
    }

    /// Opens a decomposition, and the base it needs if it is a sidecar.
    pub fn artifact(
        &self,
        model: &ModelRef,
        base: Option<&ModelRef>,
    ) -> Result<(Artifact, Origin)> {
        let found = self.locate(model)?;
        let mut artifact = Artifact::open(&found.dir, None)?;
        if artifact.svd.layout == ArtifactLayout::Sidecar {
            let base = self.base_of(&[&artifact.dir], &artifact.svd.base, base)?;
            artifact = Artifact::open(&found.dir, Some(base))?;
            artifact.check_base(self.observer())?;
        }
        let origin = origin(&found, &artifact);
        Ok((artifact, origin))
    }

    /// As [`Session::artifact`], but of repositories the weights stay where they are, and every tensor is checked whenever it
    /// is read.
    pub fn artifact_to_stream(
        &self,
        model: &ModelRef,
        base: Option<&ModelRef>,
    ) -> Result<Artifact> {
        let (artifact, _) = self.artifact_in_place(model)?;
        if artifact.svd.layout != ArtifactLayout::Sidecar {
            return Ok(artifact.checked());
        }
        let pin = &artifact.svd.base;
        let base = match (base, &pin.repo, &pin.revision) {
            (Some(given), _, _) => self.base_in_place(given)?,
            (None, Some(id), Some(revision)) => self.base_in_place(&ModelRef::Repo {
                id: id.clone(),
                revision: revision.clone(),
            })?,
            _ => self.base_of(&[&artifact.dir], pin, None)?,
        };
        base.check(pin, self.observer())?;
        let base = base.checked(None, self.observer())?;
        let checkpoint = artifact.checkpoint.clone();
        Ok(Artifact::open_stored(&artifact.dir, checkpoint, Some(base))?.checked())
    }

    /// Opens a decomposition on its own, of a repository without bringing its weights: they are read by byte range.
    pub fn artifact_in_place(&self, model: &ModelRef) -> Result<(Artifact, Origin)> {
        let (found, artifact) = match model {
            ModelRef::Repo { id, revision } if !self.hub()?.options.offline => {
                let hub = Arc::new(self.hub()?);
                let layout = Layout::Decomposition;
                let (found, weights) = hub.remote(id, revision, layout, self.observer())?;
                let artifact = Artifact::open_stored(&found.dir, weights, None)?;
                (found, artifact)
            }
            _ => {
                let found = self.locate(model)?;
                let artifact = Artifact::open(&found.dir, None)?;
                (found, artifact)
            }
        };
        let origin = origin(&found, &artifact);
        Ok((artifact, origin))
    }

    /// The base of a decomposition, or of its parts: as given, as pinned, or where one of the directories remembers it.
    pub fn base_of(&self, dirs: &[&Path], pin: &Pin, given: Option<&ModelRef>) -> Result<Base> {
        if let Some(given) = given {
            return self.base(given);
        }
        if let (Some(id), Some(revision)) = (pin.repo.clone(), pin.revision.clone()) {
            return self.base(&ModelRef::Repo { id, revision });
        }
        let mut remembered = dirs.iter().filter_map(|dir| base::remembered(dir));
        match remembered.find(|dir| dir.is_dir()) {
            Some(dir) => Base::open(&dir, None, None),
            None => Err(Error::BaseNeeded {
                artifact: dirs.first().map_or_else(PathBuf::new, |dir| dir.into()),
                base: pin.describe(),
            }),
        }
    }

    /// Opens adapters of a decomposition, each `ADAPTER` or `ADAPTER*WEIGHT`.
    pub fn mixture(&self, artifact: &Artifact, adapters: &[Weighted]) -> Result<Mixture> {
        let parts = adapters
            .iter()
            .map(|adapter| {
                let found = self.locate(&adapter.adapter)?;
                if Kind::of(&found.dir) == Kind::Lora {
                    return Err(Error::Adapter {
                        path: found.dir,
                        reason: "is a LoRA of PEFT, which only `evaluate` and `generate` take; PEFT's merge_and_unload() merges it"
                            .into(),
                    });
                }
                Ok((Adapter::open(&found.dir, artifact)?, adapter.weight))
            })
            .collect::<Result<_>>()?;
        Ok(Mixture { parts })
    }

    /// Opens whatever can be run: a plain model, or a decomposition with adapters.
    pub fn source(
        &self,
        model: &ModelRef,
        adapters: &[Weighted],
        base: Option<&ModelRef>,
    ) -> Result<Source> {
        Ok(self.source_and_origin(model, adapters, base)?.0)
    }

    /// As [`Session::source`], with where a decomposition is from.
    pub fn source_and_origin(
        &self,
        model: &ModelRef,
        adapters: &[Weighted],
        base: Option<&ModelRef>,
    ) -> Result<(Source, Option<Origin>)> {
        let found = self.locate(model)?;
        let (mut loras, mut others) = (Vec::new(), Vec::new());
        for adapter in adapters {
            let dir = self.locate(&adapter.adapter)?.dir;
            match Kind::of(&dir) {
                Kind::Lora => loras.push((dir, adapter.weight)),
                _ => others.push(adapter.clone()),
            }
        }
        let (mut source, origin) = if is_artifact(&found.dir) {
            let (artifact, origin) = self.artifact(model, base)?;
            let mixture = self.mixture(&artifact, &others)?;
            (Source::Decomposition { artifact, mixture }, Some(origin))
        } else if others.is_empty() {
            let base = Base::open(&found.dir, found.repo, found.commit)?;
            (Source::Model(base), None)
        } else {
            return Err(Error::NotAnArtifact { path: found.dir });
        };
        for (dir, weight) in loras {
            source = source.with_lora(&dir, weight)?;
        }
        Ok((source, origin))
    }
}

fn origin(found: &Snapshot, artifact: &Artifact) -> Origin {
    Origin {
        repo: found.repo.clone(),
        revision: found.commit.clone(),
        content_sha256: artifact.content_sha256.clone(),
    }
}

/// An adapter and its factor: `DIR`, `DIR*0.7`, `org/name*-1`.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    pub adapter: ModelRef,
    pub weight: f64,
}

impl std::str::FromStr for Weighted {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let (name, weight) = match text.rsplit_once('*') {
            Some((name, weight)) => {
                let parsed = weight.trim().parse::<f64>().ok().filter(|w| w.is_finite());
                let weight = parsed.ok_or_else(|| Error::Parse {
                    what: "an adapter's factor",
                    value: weight.into(),
                    reason: "it is not a number".into(),
                })?;
                (name, weight)
            }
            None => (text, 1.0),
        };
        Ok(Self {
            adapter: name.trim().parse()?,
            weight,
        })
    }
}

/// `auto`, `cpu` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let number = |n: &str| n.parse().ok();
        match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            other => other.strip_prefix("cuda:").and_then(number).map(Self::Cuda),
        }
        .ok_or_else(|| Error::Parse {
            what: "a device",
            value: text.into(),
            reason: "expected auto, cpu or cuda:N".into(),
        })
    }
}

impl Session {
    /// The device to compute on; `auto` takes a GPU where there is one and says so where there is none.
    pub fn device(&self, choice: DeviceChoice) -> Result<Device> {
        self.device_of(choice, 0)
    }

    /// The same of one of several processes on this machine, which `auto` gives a GPU each.
    fn device_of(&self, choice: DeviceChoice, process: usize) -> Result<Device> {
        match choice {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(n) => device::open(n),
            DeviceChoice::Auto if !candle_core::utils::cuda_is_available() => Ok(Device::Cpu),
            DeviceChoice::Auto => device::open(process).or_else(|error| {
                self.observer()
                    .warn(format!("{error}; computing on the CPU"));
                Ok(Device::Cpu)
            }),
        }
    }

    /// Where this process computes, and the processes that were started with it to work together, if that is what they do.
    pub fn device_and_group(
        &self,
        choice: DeviceChoice,
        parallel: bool,
    ) -> Result<(Device, Arc<dyn Group>)> {
        if !parallel {
            return Ok((self.device(choice)?, Arc::new(Alone)));
        }
        let Some(started) = env::started() else {
            return Err(Error::Parallel {
                reason: "neither mpirun nor srun has started this one".into(),
            });
        };
        let device = self.device_of(choice, env::place_on_this_machine())?;
        let group = parallel::join(&started, &device)?;
        Ok((device, group))
    }
}

/// Writes to standard output. A reader that has gone away has read enough.
pub fn tell(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("write", "standard output", error))
        }
        _ => Ok(()),
    }
}

/// Writes a line to standard error. Where nobody can read it, work goes on without.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", plain(line));
}

/// A directory in one's own terms: relative where it lies below the current one.
pub fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    path.strip_prefix(here)
        .unwrap_or(path)
        .display()
        .to_string()
}
