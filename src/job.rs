//! What one decomposition is: the settings that make two runs the same job, and how machines divide it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::format::Pin;
use crate::json::{self, Tool};
use crate::linalg::{Algorithm, Backend};
use crate::plan::{Plan, PlanOptions, PlannedTensor};
use crate::sum::sha256_hex;
use crate::workspace::{PART_FILE, refuse_interrupted};

/// How to decompose.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    pub plan: PlanOptions,
    pub algorithm: Algorithm,
    /// Where products with whole matrices are computed; [`Algorithm::backend`] names it.
    #[serde(skip)]
    pub backend: Backend,
    pub shard_bytes_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            plan: PlanOptions::default(),
            algorithm: Algorithm::default(),
            backend: Backend::default(),
            shard_bytes_max: 5_000_000_000,
        }
    }
}

/// Which model is decomposed, and how.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    pub base: Pin,
    pub options: Options,
}

impl Job {
    /// What makes two runs the same job, in words.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let Options {
            plan,
            algorithm,
            shard_bytes_max,
            // named by the algorithm
            backend: _,
        } = &self.options;
        let files = self.base.sha256.iter();
        let files: String = files.map(|(file, sum)| format!("{sum} {file}\n")).collect();
        let list = |patterns: &[crate::plan::Pattern]| {
            let names: Vec<String> = patterns.iter().map(ToString::to_string).collect();
            names.join(",")
        };
        let layout = format!("{:?}", plan.storing.layout).to_lowercase();
        let content = sha256_hex(files.as_bytes());
        let head = if plan.untie_head {
            "untied"
        } else {
            "as in the base"
        };
        [
            // a directory may move or lie elsewhere on another machine: there, the content says it all
            ("base model", self.base.describe()),
            ("content of the base model", content),
            ("rank", plan.rank.to_string()),
            ("layout", layout),
            ("dtype of the factors", plan.storing.factors.to_string()),
            ("include", list(&plan.include)),
            ("exclude", list(&plan.exclude)),
            ("head", head.into()),
            ("tolerance", algorithm.tolerance.to_string()),
            ("fast", algorithm.fast.to_string()),
            ("backend", algorithm.backend.clone()),
            ("shard size", shard_bytes_max.to_string()),
        ]
        .map(|(what, value)| (what.to_string(), value))
        .into()
    }
}

/// The share of a job that one machine of several takes: `2/4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// From 1.
    pub number: usize,
    pub of: usize,
}

impl FromStr for Share {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_once('/').and_then(|(number, of)| {
            let (number, of) = (number.trim().parse().ok()?, of.trim().parse().ok()?);
            let sound = (1..=of).contains(&number) && of <= Self::OF_MAX;
            sound.then_some(Self { number, of })
        });
        numbers.ok_or_else(|| Error::Parse {
            what: "a part",
            value: text.into(),
            reason: format!(
                "expected I/N with I from 1 to N, as in 2/4, and N at most {}",
                Self::OF_MAX
            ),
        })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        write!(out, "{}/{}", self.number, self.of)
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Share {
    /// More machines than anybody has; what is missing of a job is told part by part.
    const OF_MAX: usize = 10_000;

    /// The matrices of this share, the most expensive first.
    ///
    /// The longest goes to whoever has least (Graham 1969: at most 4/3 of the best division). Every machine divides the
    /// same plan in the same way, so that none needs to know of another.
    pub fn of(self, plan: &Plan) -> Vec<&PlannedTensor> {
        let mut tensors: Vec<&PlannedTensor> = plan.decomposed().collect();
        tensors.sort_by_key(|t| (std::cmp::Reverse(t.flops()), &t.name));
        let mut loads = vec![0u64; self.of];
        let mut mine = Vec::new();
        for tensor in tensors {
            let least = (0..self.of).min_by_key(|&i| loads[i]);
            let least = least.expect("a job has at least one share");
            loads[least] = loads[least].saturating_add(tensor.flops());
            if least + 1 == self.number {
                mine.push(tensor);
            }
        }
        mine
    }
}

/// `part.json`: the record of a finished share. With it, and only with it, a directory is a part of a decomposition.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShareRecord {
    pub part: Share,
    pub job: Job,
    /// The sha256 of the header of each matrix's file, which names the sums of its tensors.
    pub modules: BTreeMap<String, String>,
    pub flops: u64,
    pub bytes: u64,
    pub threads: usize,
    pub seconds: f64,
    pub tool: Tool,
}

/// The folder of a part's directory that holds its matrices.
pub const MATRICES: &str = "matrices";

impl ShareRecord {
    /// Reads the record of a finished share.
    pub fn read(dir: &Path) -> Result<Self> {
        refuse_interrupted(dir)?;
        let path = dir.join(PART_FILE);
        if !path.exists() {
            return Err(Error::NotAPart { path: dir.into() });
        }
        let record: Self = json::read(&path)?;
        let pin = record.job.base.check();
        pin.map_err(|reason| Error::Pin { path, reason })?;
        Ok(record)
    }

    /// What must be equal in all shares of a job.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let mut settings = self.job.settings();
        settings.insert("number of parts".into(), self.part.of.to_string());
        settings.insert("version of svdhub".into(), self.tool.version.clone());
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelConfig;
    use crate::plan::expected_inventory;
    use crate::weights::Dtype;
    use serde_json::json;
    use std::collections::BTreeSet;

    #[test]
    fn shares_cover_the_plan_once_and_evenly() {
        let config = json!({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": false});
        let config = ModelConfig::parse(Path::new("config.json"), &config).expect("parses");
        let inventory = expected_inventory(&config, Dtype::BF16).expect("composes");
        let plan = Plan::new(Path::new("."), &config, &inventory, &PlanOptions::default());
        let plan = plan.expect("plans");
        for of in [1, 3, 7, 300] {
            let shares: Vec<_> = (1..=of)
                .map(|number| Share { number, of }.of(&plan))
                .collect();
            let names: Vec<&str> = shares.iter().flatten().map(|t| t.module()).collect();
            let distinct: BTreeSet<&str> = names.iter().copied().collect();
            assert_eq!((names.len(), distinct.len()), (225, 225), "{of} shares");
            let flops = |share: &Vec<&PlannedTensor>| share.iter().map(|t| t.flops()).sum::<u64>();
            let most = shares.iter().map(flops).max().expect("a share");
            let even = plan.flops as f64 / of as f64;
            let single = plan.decomposed().map(PlannedTensor::flops).max();
            let bound = (4.0 / 3.0 * even).max(single.expect("a matrix") as f64);
            assert!(most as f64 <= bound, "{of} shares: {most} of {even}");
        }
    }

    #[test]
    fn a_share_is_read_as_it_is_written() {
        let share: Share = "2/4".parse().expect("parses");
        assert_eq!(share, Share { number: 2, of: 4 });
        assert_eq!(share.to_string().parse::<Share>().expect("parses"), share);
        for bad in [
            "", "2", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/2/3", "1/10001",
        ] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }
}
