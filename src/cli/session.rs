//! One run of the program: the Hub it talks to, who watches, and how names become directories.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

use candle_core::Device;
use serde::Serialize;
use svdhub::adapter::{Adapter, Mixture};
use svdhub::artifact::{Artifact, is_artifact};
use svdhub::base::{self, Base};
use svdhub::device;
use svdhub::error::Clash;
use svdhub::event::Observer;
use svdhub::format::{ArtifactLayout, Origin, Pin};
use svdhub::hub::{DataRef, Hub, ModelRef, Snapshot};
use svdhub::kind::Kind;
use svdhub::parallel::{self, Alone, Group, Started};
use svdhub::source::Source;
use svdhub::text::Data;
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
    hub: OnceLock<Arc<Hub>>,
}

impl Session {
    pub fn new(global: &Global) -> Self {
        Self {
            json: global.json,
            progress: Progress::new(global.quiet),
            endpoint: global.endpoint.clone(),
            hub: OnceLock::new(),
        }
    }

    pub fn observer(&self) -> &dyn Observer {
        &self.progress
    }

    /// The Hub of this session: a job signs in to it once.
    pub fn hub(&self) -> Result<&Arc<Hub>> {
        if let Some(hub) = self.hub.get() {
            return Ok(hub);
        }
        let hub = Hub::new(env::hub_options(self.endpoint.as_deref())?)?;
        Ok(self.hub.get_or_init(|| Arc::new(hub)))
    }

    /// The files of data, fetched if they are on the Hub.
    pub fn data(&self, named: &DataRef) -> Result<Data> {
        match named {
            DataRef::File(path) => Ok(path.as_path().into()),
            DataRef::Dataset { id, revision, path } => {
                let hub = self.hub()?;
                hub.data(id, revision, path.as_deref(), self.observer())
            }
        }
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
        // a quoted text of several lines stays below its own
        let indented = |text: String| text.trim_end().replace('\n', "\n    ");
        complain(&format!("error: {}", indented(error.to_string())));
        let mut source = std::error::Error::source(error);
        let mut said = error.to_string();
        while let Some(cause) = source {
            let text = cause.to_string();
            // many libraries repeat their source in their own text
            if !said.contains(&text) {
                complain(&format!("  because: {}", indented(text.clone())));
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
                let layout = Layout::Model;
                let (found, checkpoint) =
                    self.hub()?.remote(id, revision, layout, self.observer())?;
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
        self.artifact_at(&self.locate(model)?, base)
    }

    fn artifact_at(&self, found: &Snapshot, base: Option<&ModelRef>) -> Result<(Artifact, Origin)> {
        let mut artifact = Artifact::open(&found.dir, None)?;
        artifact.check_small_files()?;
        if artifact.svd.layout == ArtifactLayout::Sidecar {
            let base = self.base_of(&[&artifact.dir], &artifact.svd.base, base)?;
            artifact = Artifact::open(&found.dir, Some(base))?;
            artifact.check_base(self.observer())?;
        }
        let origin = origin(found, &artifact);
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
                let layout = Layout::Decomposition;
                let (found, weights) = self.hub()?.remote(id, revision, layout, self.observer())?;
                let artifact = Artifact::open_stored(&found.dir, weights, None)?;
                (found, artifact)
            }
            _ => {
                let found = self.locate(model)?;
                let artifact = Artifact::open(&found.dir, None)?;
                (found, artifact)
            }
        };
        artifact.check_small_files()?;
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
        let located = self.located(adapters)?;
        if let Some((path, _)) = located.iter().find(|(dir, _)| Kind::of(dir) == Kind::Lora) {
            return Err(Error::Adapter {
                path: path.clone(),
                reason: "is a LoRA of PEFT, which no export is made of; `merge` takes it".into(),
            });
        }
        mixture_of(artifact, &located)
    }

    /// Where adapters are, each with its factor.
    fn located(&self, adapters: &[Weighted]) -> Result<Vec<Located>> {
        let located = adapters
            .iter()
            .map(|adapter| Ok((self.locate(&adapter.adapter)?.dir, adapter.weight)));
        located.collect()
    }

    /// The same, those of PEFT apart.
    fn loras_and_others(&self, adapters: &[Weighted]) -> Result<(Vec<Located>, Vec<Located>)> {
        let located = self.located(adapters)?.into_iter();
        Ok(located.partition(|(dir, _)| Kind::of(dir) == Kind::Lora))
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
        let (loras, others) = self.loras_and_others(adapters)?;
        let (source, origin) = if is_artifact(&found.dir) {
            let (artifact, origin) = self.artifact_at(&found, base)?;
            let mixture = mixture_of(&artifact, &others)?;
            (Source::Decomposition { artifact, mixture }, Some(origin))
        } else if others.is_empty() {
            let base = Base::open(&found.dir, found.repo, found.commit)?;
            (Source::Model(base), None)
        } else {
            return Err(Error::NotAnArtifact { path: found.dir });
        };
        Ok((with_loras(source, loras)?, origin))
    }

    /// As [`Session::source`], but of repositories the weights stay where they are, and every tensor is checked whenever it is
    /// read.
    pub fn source_to_stream(
        &self,
        model: &ModelRef,
        adapters: &[Weighted],
        base: Option<&ModelRef>,
    ) -> Result<Source> {
        let (loras, others) = self.loras_and_others(adapters)?;
        let index = Layout::Decomposition.index_file();
        let found = self.locate_files(model, &["config.json", &index])?;
        let source = if is_artifact(&found.dir) {
            let artifact = self.artifact_to_stream(model, base)?;
            let mixture = mixture_of(&artifact, &others)?;
            Source::Decomposition { artifact, mixture }
        } else if others.is_empty() && !loras.is_empty() {
            let base = self.base_in_place(model)?;
            Source::Model(base.checked(None, self.observer())?)
        } else {
            return Err(Error::NotAnArtifact { path: found.dir });
        };
        with_loras(source, loras)
    }
}

/// Where an adapter is, and its factor.
type Located = (PathBuf, f64);

fn with_loras(source: Source, loras: Vec<Located>) -> Result<Source> {
    let mut loras = loras.into_iter();
    loras.try_fold(source, |source, (dir, weight)| {
        source.with_lora(&dir, weight)
    })
}

fn mixture_of(artifact: &Artifact, adapters: &[Located]) -> Result<Mixture> {
    let opened = adapters
        .iter()
        .map(|(dir, weight)| Ok((Adapter::open(dir, artifact)?, *weight)));
    let parts = opened.collect::<Result<_>>()?;
    Ok(Mixture { parts })
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

/// `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    /// The GPU of this number, or without one the first; of several processes on a machine, each its own.
    Cuda(Option<usize>),
}

impl std::str::FromStr for DeviceChoice {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let number = |n: &str| n.parse().ok();
        match text {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(None)),
            other => {
                let number = other.strip_prefix("cuda:").and_then(number);
                number.map(|number| Self::Cuda(Some(number)))
            }
        }
        .ok_or_else(|| Error::Parse {
            what: "a device",
            value: text.into(),
            reason: "expected auto, cpu, cuda or cuda:N".into(),
        })
    }
}

impl Session {
    /// The device to compute on; `auto` takes a GPU where there is one and says so where there is none.
    pub fn device(&self, choice: DeviceChoice) -> Result<Device> {
        match choice {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Cuda(number) => device::open(number.unwrap_or(0)),
            DeviceChoice::Auto if !candle_core::utils::cuda_is_available() => Ok(Device::Cpu),
            DeviceChoice::Auto => device::open(0).or_else(|error| self.on_cpu(&error)),
        }
    }

    /// The same of one of several processes, each of which takes a GPU of its own.
    fn device_among(&self, choice: DeviceChoice, started: &Started) -> Result<Device> {
        let told = match choice {
            DeviceChoice::Cpu => return Ok(Device::Cpu),
            DeviceChoice::Cuda(number) => number,
            DeviceChoice::Auto => None,
        };
        let by_torchrun = matches!(started, Started::ByTorchrun(_));
        let open = || match device::gpus()? {
            // it says what is missing
            0 => self.device(choice),
            gpus => {
                let shared = by_torchrun && env::shares_this_machine();
                device::open(own_gpu(told, env::place_on_this_machine(), gpus, shared)?)
            }
        };
        match choice {
            // MPI refuses them together if others have a GPU
            DeviceChoice::Auto if !by_torchrun => open().or_else(|error| self.on_cpu(&error)),
            _ => open(),
        }
    }

    fn on_cpu(&self, error: &Error) -> Result<Device> {
        self.observer()
            .warn(format!("{error}; computing on the CPU"));
        Ok(Device::Cpu)
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
                reason: "none of mpirun, srun and torchrun has started this one".into(),
            });
        };
        let device = self.device_among(choice, &started)?;
        let group = parallel::join(&started, &device)?;
        Ok((device, group))
    }
}

/// The number of the GPU of one of several processes, `place` among those on its machine, that sees so many of them.
///
/// One may be all that it sees: Slurm's --gpus-per-task shows each process its own. `shared`: torchrun has started several
/// on this machine.
fn own_gpu(told: Option<usize>, place: usize, gpus: usize, shared: bool) -> Result<usize> {
    let own = place % gpus;
    match told {
        Some(number) if shared && number != own => {
            Err(Error::Clash(Clash::OneGpu { place, number }))
        }
        told => Ok(told.unwrap_or(own)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_on_a_machine_takes_a_gpu_of_its_own() {
        for shared in [false, true] {
            let own = |place, gpus| own_gpu(None, place, gpus, shared).expect("a GPU");
            assert_eq!([0, 1, 2, 3].map(|place| own(place, 4)), [0, 1, 2, 3]);
            // of each only its own is visible
            assert_eq!([0, 1, 2, 3].map(|place| own(place, 1)), [0; 4]);
            assert_eq!(own_gpu(Some(2), 2, 4, shared).expect("its own"), 2);
            assert_eq!(own_gpu(Some(0), 2, 1, shared).expect("its own"), 0);
        }
        // a script around the program may choose by another rule
        assert_eq!(own_gpu(Some(3), 0, 4, false).expect("as told"), 3);
        let refused = own_gpu(Some(0), 2, 4, true).expect_err("refused");
        let help = advice::advice(&refused).expect("help");
        assert!(refused.to_string().contains("LOCAL_RANK"), "{refused}");
        assert!(help.contains("--device auto"), "{help}");
    }

    #[test]
    fn a_gpu_without_a_number_is_no_certain_one() {
        let choice = |text: &str| text.parse::<DeviceChoice>().ok();
        assert_eq!(choice("cuda"), Some(DeviceChoice::Cuda(None)));
        assert_eq!(choice("cuda:1"), Some(DeviceChoice::Cuda(Some(1))));
        assert_eq!(choice("cuda:"), None);
        assert_eq!(choice("gpu"), None);
    }
}
