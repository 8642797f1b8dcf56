//! `export`: a decomposition and adapters in, files that other programs load out.

mod lora;
mod svd_training;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::adapter::Mixture;
use crate::artifact::Artifact;
use crate::base::side_sums;
use crate::error::{Error, Result};
use crate::event::Observer;
use crate::model::ModelConfig;
use crate::peft::Naming;
use crate::sum::Sum;
use crate::weights::Checkpoint;
use crate::workspace::{Again, Workspace};
use crate::{linalg, report, workers};

pub use lora::{LoraFacts, LoraModule};
pub use svd_training::SvdTrainingFacts;

/// Who will load what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// PEFT, and what reads its files. A rank keeps so many Δσ of each module, the largest.
    PeftLora { rank: Option<NonZeroUsize> },
    /// The Python library svd-training 0.0.2.
    SvdTraining,
}

impl Target {
    pub fn name(self) -> &'static str {
        match self {
            Self::PeftLora { .. } => "peft-lora",
            Self::SvdTraining => "svd-training",
        }
    }
}

/// How to export.
#[derive(Debug, Clone)]
pub struct Options {
    pub target: Target,
    pub threads: usize,
}

impl Options {
    pub fn to(target: Target) -> Self {
        Self {
            target,
            threads: workers::cores(),
        }
    }
}

/// The facts of an export, as `report.json` keeps them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    /// The sha256 of each adapter's weights, and its factor.
    pub adapters: Vec<(String, f64)>,
    /// The sha256 of each file of weights.
    pub sha256: BTreeMap<String, String>,
    /// Of each tensor: what is damaged later can be named.
    #[serde(default)]
    pub tensor_sha256: BTreeMap<String, String>,
    /// Of every other file but the card, which is the reader's to edit.
    #[serde(default)]
    pub side_sha256: BTreeMap<String, String>,
    pub bytes: u64,
    pub seconds: f64,
    #[serde(flatten)]
    pub written: Written,
}

/// What was written, in the terms of who loads it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "to", rename_all = "kebab-case")]
pub enum Written {
    PeftLora(LoraFacts),
    SvdTraining(SvdTrainingFacts),
}

/// The one file of weights that an export writes.
struct File {
    name: &'static str,
    sha256: String,
    bytes: u64,
    /// The small files that were written with it.
    beside: Vec<String>,
}

impl File {
    /// The sha256 of each tensor, read back.
    fn tensor_sums(&self, dir: &Path) -> Result<BTreeMap<String, String>> {
        let written = Checkpoint::single(dir, self.name)?;
        let sums = written.inventory.entries().map(|(_, entry)| {
            let mut sum = Sum::default();
            written.read_blocks(&entry.name, |block| {
                sum.update(&block.bytes);
                Ok(())
            })?;
            Ok((entry.name.clone(), sum.finish()))
        });
        sums.collect()
    }
}

/// Writes `mixture` for another program to `out`.
pub fn run(
    artifact: &Artifact,
    mixture: &Mixture,
    out: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    let started = Instant::now();
    linalg::single_threaded_blas();
    let config = ModelConfig::read(&artifact.dir)?;
    let job = Job {
        artifact,
        mixture,
        naming: Naming::of(&config, |name| artifact.base_entry(name).is_some()),
        out,
        threads: options.threads,
        observer,
    };
    // refused before anything is written
    job.refuse_other_methods(options.target.name())?;
    let prepared = match options.target {
        Target::PeftLora { rank } => Prepared::Lora(lora::Plan::new(&job, rank)?),
        Target::SvdTraining => Prepared::SvdTraining(svd_training::Plan::new(&job)?),
    };
    let adapters = mixture.sums()?;
    let settings = BTreeMap::from([
        ("decomposition".into(), artifact.content_sha256.clone()),
        ("adapters".into(), format!("{adapters:?}")),
        ("target".into(), format!("{:?}", options.target)),
    ]);
    let (mut workspace, claim) = Workspace::claim(out, "export", settings)?;
    if claim.is_finished(out, Again::BeginsAnew, observer) {
        return report::section(out, "export");
    }
    let (written, file) = match prepared {
        Prepared::Lora(plan) => {
            let (facts, file) = plan.write(&job)?;
            (Written::PeftLora(facts), file)
        }
        Prepared::SvdTraining(plan) => {
            let (facts, file) = plan.write(&job)?;
            (Written::SvdTraining(facts), file)
        }
    };
    let facts = Facts {
        adapters,
        tensor_sha256: file.tensor_sums(out)?,
        side_sha256: side_sums(out, file.beside)?,
        sha256: [(file.name.to_string(), file.sha256)].into(),
        bytes: file.bytes,
        seconds: started.elapsed().as_secs_f64(),
        written,
    };
    report::add(out, job.inherited(facts.is_whole())?, "export", &facts)?;
    workspace.finish()?;
    Ok(facts)
}

enum Prepared {
    Lora(lora::Plan),
    SvdTraining(svd_training::Plan),
}

impl Facts {
    /// Whether every trained number is in there.
    fn is_whole(&self) -> bool {
        match &self.written {
            Written::PeftLora(lora) => lora.predicted_error == 0.0,
            Written::SvdTraining(_) => true,
        }
    }
}

/// What both targets work on.
struct Job<'a> {
    artifact: &'a Artifact,
    mixture: &'a Mixture,
    naming: Naming,
    out: &'a Path,
    threads: usize,
    observer: &'a dyn Observer,
}

impl Job<'_> {
    /// The names of all trained tensors beside Δσ.
    fn trained_tensors(&self) -> Vec<&str> {
        let parts = self.mixture.parts.iter();
        let mut names: Vec<&str> = parts
            .flat_map(|(adapter, _)| adapter.tensors.keys().map(String::as_str))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Refuses adapters that hold more of a linear layer than Δσ.
    fn refuse_other_methods(&self, target: &'static str) -> Result<()> {
        let parts = self.mixture.parts.iter();
        let mut others = parts.flat_map(|(adapter, _)| {
            let cores = adapter.core.keys().map(|module| format!("R of `{module}`"));
            let whole = adapter.tensors.keys();
            let whole = whole.filter(|name| self.artifact.module_of(name).is_some());
            cores.chain(whole.map(|name| format!("`{name}`")))
        });
        match others.next() {
            None => Ok(()),
            Some(first) => Err(Error::NotExpressible {
                what: match others.count() {
                    0 => first,
                    more => format!("{first} and {more} more"),
                },
                target,
                reason: "of linear layers, only Δσ is translated".into(),
            }),
        }
    }

    /// The sections of the report that are true of what is written.
    fn inherited(&self, whole: bool) -> Result<Map<String, Value>> {
        let mut inherited = report::inherited(&self.artifact.dir)?;
        // what was trained and measured tells of this only if it is one adapter, at its own strength
        if let [(adapter, 1.0)] = self.mixture.parts.as_slice() {
            inherited.extend(report::read(&adapter.dir)?);
        }
        if !whole {
            inherited.remove("evaluate");
        }
        Ok(inherited)
    }
}
