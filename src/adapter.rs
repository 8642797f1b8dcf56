//! A trained adapter on disk: what was moved of every module, of norms and embeddings, and the decomposition it belongs to.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array2, s};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::artifact::Artifact;
use crate::error::{Error, Result};
use crate::format::{Origin, Pin};
use crate::json::{self, Tool};
use crate::linalg::ExactSum;
use crate::split::Change;
use crate::sum::{sha256_file, sha256_hex};
use crate::weights::element::is_float;
use crate::weights::place::refuse_links_outside;
use crate::weights::shard::write_atomically;
use crate::weights::{Checkpoint, Dtype, Elements, Header, ShardWriter};

pub const WEIGHTS_FILE: &str = "adapter.safetensors";
/// Not `adapter_config.json`: PEFT would take the folder for one of its own.
pub const CONFIG_FILE: &str = "svd_adapter.json";

/// The version of the adapter config this build writes.
///
/// 2: with the sha256 of the weights, and of the config itself. 3: with R, and with whole linear weights.
pub const SCHEMA: u32 = 3;

/// What an adapter was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterConfig {
    pub schema: u32,
    /// `sigma`, `lora-xs` or `full`
    pub method: String,
    /// Groups of numbers that moved: the method's own, under its name, then `norms`, `embeddings`.
    pub trained: Vec<String>,
    pub decomposition: Origin,
    pub base: Pin,
    /// Of the weights' file. Not in schema 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_sha256: Option<String>,
    pub tool: Tool,
    /// Of this config without this key. Not in schema 1.
    #[serde(default, skip_serializing)]
    pub sha256: Option<String>,
}

/// The numbers of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub dir: PathBuf,
    pub config: AdapterConfig,
    /// Δσ (q,) by module: trained minus original.
    pub delta: BTreeMap<String, Vec<f32>>,
    /// R (r, r) by module, between the first r ≤ q rows of u and v, in f32.
    pub core: BTreeMap<String, Elements>,
    /// Trained tensors by their checkpoint name, in f32: norms, the embedding, linear weights as a whole.
    pub tensors: BTreeMap<String, Elements>,
}

/// Whether a directory holds an adapter.
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG_FILE).exists()
}

impl Adapter {
    /// Writes `adapter.safetensors` and then its config. Returns the sha256 of the weights.
    pub fn save(&self) -> Result<String> {
        let whole = self.tensors.iter();
        let mut tensors: BTreeMap<String, Cow<Elements>> = whole
            .map(|(name, elements)| (name.clone(), Cow::Borrowed(elements)))
            .collect();
        for (module, delta) in &self.delta {
            let stored = Elements::from_f32(&[delta.len()], delta);
            tensors.insert(format!("{module}.delta"), Cow::Owned(stored));
        }
        for (module, core) in &self.core {
            tensors.insert(format!("{module}.core"), Cow::Borrowed(core));
        }
        let digests: String = tensors.values().map(|elements| digest(elements)).collect();
        let header = Header::compose_with(
            &[(DIGESTS, &digests)],
            tensors
                .iter()
                .map(|(name, e)| (name.as_str(), e.dtype, e.shape.as_slice())),
        )?;
        let mut writer = ShardWriter::create(&self.dir.join(WEIGHTS_FILE), header)?;
        for (name, elements) in &tensors {
            writer.put(name, &elements.bytes)?;
        }
        let sum = writer.finish()?;
        let config = AdapterConfig {
            weights_sha256: Some(sum.clone()),
            ..self.config.clone()
        };
        let config: Map<String, Value> = serde_json::to_value(config)
            .and_then(serde_json::from_value)
            .expect("a config serialises to an object");
        write_atomically(&self.dir.join(CONFIG_FILE), &json::seal(config))?;
        Ok(sum)
    }

    /// Reads an adapter and refuses it if it was not trained on `artifact`.
    pub fn open(dir: &Path, artifact: &Artifact) -> Result<Self> {
        let adapter = Self::read(dir)?;
        if let Some(expected) = &adapter.config.weights_sha256 {
            let found = adapter.sha256()?;
            if found != *expected {
                return Err(Error::Checksum {
                    what: "the adapter's weights".into(),
                    path: dir.join(WEIGHTS_FILE),
                    expected: expected.clone(),
                    found,
                });
            }
        }
        let pin = &adapter.config.decomposition;
        if pin.content_sha256 != artifact.content_sha256 {
            return Err(Error::AdapterMismatch {
                adapter: dir.into(),
                what: "the decomposition with content",
                expected: pin.content_sha256.clone(),
                found: artifact.content_sha256.clone(),
            });
        }
        for (module, delta) in &adapter.delta {
            let expected = artifact.svd.modules.get(module).map(|record| record.q);
            if expected != Some(delta.len()) {
                return Err(Error::Adapter {
                    path: dir.join(WEIGHTS_FILE),
                    reason: match expected {
                        Some(q) => {
                            format!("`{module}.delta` has {} numbers, expected {q}", delta.len())
                        }
                        None => format!("`{module}` is not a module of the decomposition"),
                    },
                });
            }
        }
        for (module, core) in &adapter.core {
            let q = artifact.svd.modules.get(module).map(|record| record.q);
            if q.is_none_or(|q| core.shape[0] > q) {
                return Err(Error::Adapter {
                    path: dir.join(WEIGHTS_FILE),
                    reason: match q {
                        Some(q) => {
                            format!("`{module}.core` is {:?}, and q is {q}", core.shape)
                        }
                        None => format!("`{module}` is not a module of the decomposition"),
                    },
                });
            }
        }
        for (name, trained) in &adapter.tensors {
            let fits = match artifact.module_of(name) {
                Some((_, record)) => *trained.shape == record.shape,
                None => artifact
                    .base_entry(name)
                    .is_some_and(|(dtype, shape)| is_float(dtype) && shape == trained.shape),
            };
            if !fits {
                return Err(Error::Adapter {
                    path: dir.join(WEIGHTS_FILE),
                    reason: format!(
                        "`{name}` {:?} is not a tensor that an adapter of this model trains",
                        trained.shape
                    ),
                });
            }
        }
        Ok(adapter)
    }

    /// Reads an adapter on its own.
    pub fn read(dir: &Path) -> Result<Self> {
        let config_path = dir.join(CONFIG_FILE);
        if !config_path.exists() {
            return Err(Error::Adapter {
                path: dir.into(),
                reason: format!("no adapter is here: {CONFIG_FILE} is missing"),
            });
        }
        refuse_links_outside(dir)?;
        let config: AdapterConfig = json::read(&config_path)?;
        if config.schema > SCHEMA {
            return Err(Error::Adapter {
                path: config_path,
                reason: format!(
                    "schema {} is newer than this build, which reads up to {SCHEMA}",
                    config.schema
                ),
            });
        }
        if let Err(reason) = config.base.check() {
            return Err(Error::Pin {
                path: config_path,
                reason,
            });
        }
        let path = dir.join(WEIGHTS_FILE);
        let checkpoint = Checkpoint::single(dir, WEIGHTS_FILE)?;
        let mut adapter = Self {
            dir: dir.into(),
            config,
            delta: BTreeMap::new(),
            core: BTreeMap::new(),
            tensors: BTreeMap::new(),
        };
        for (_, entry) in checkpoint.inventory.entries() {
            if entry.dtype != Dtype::F32 {
                return Err(Error::Dtype {
                    tensor: entry.name.clone(),
                    path,
                    expected: "F32".into(),
                    found: crate::weights::dtype_name(entry.dtype),
                });
            }
            let elements = checkpoint.read_finite(&entry.name)?;
            if let Some(module) = entry.name.strip_suffix(".core")
                && !matches!(elements.shape[..], [r, s] if r == s)
            {
                return Err(Error::Adapter {
                    path,
                    reason: format!("`{module}.core` is {:?}, not square", elements.shape),
                });
            }
            adapter.insert(&entry.name, elements);
        }
        Ok(adapter)
    }

    /// Takes in what training moved, under the name it has in the file.
    pub fn insert(&mut self, name: &str, elements: Elements) {
        if let Some(module) = name.strip_suffix(".delta") {
            self.delta.insert(module.into(), elements.to_f32());
        } else if let Some(module) = name.strip_suffix(".core") {
            self.core.insert(module.into(), elements);
        } else {
            self.tensors.insert(name.into(), elements);
        }
    }

    /// Tensors in its file.
    pub fn len(&self) -> usize {
        self.delta.len() + self.core.len() + self.tensors.len()
    }

    /// Whether its file holds no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the model with it is the model without it.
    pub fn moves_nothing(&self) -> bool {
        let cores = self.core.values().flat_map(Elements::to_f32);
        let mut moved = self.delta.values().flatten().copied().chain(cores);
        self.tensors.is_empty() && moved.all(|x| x == 0.0)
    }

    /// The tensors whose bytes are not those that were written.
    pub fn damaged_tensors(&self) -> Result<Vec<String>> {
        let checkpoint = Checkpoint::single(&self.dir, WEIGHTS_FILE)?;
        let header = &checkpoint.inventory.files[0].header;
        let digests = header.metadata(DIGESTS).unwrap_or_default();
        let mut damaged = Vec::new();
        for (entry, expected) in header.entries.iter().zip(digests.as_bytes().chunks(8)) {
            if digest(&checkpoint.read(&entry.name)?).as_bytes() != expected {
                damaged.push(entry.name.clone());
            }
        }
        Ok(damaged)
    }

    /// The sha256 of the adapter's weights.
    pub fn sha256(&self) -> Result<String> {
        sha256_file(&self.dir.join(WEIGHTS_FILE), |_| {})
    }
}

/// The first 8 digits of each tensor's sha256, in the order of the file: enough to tell which one is damaged, and little
/// beside an adapter.
const DIGESTS: &str = "sha256_8";

fn digest(elements: &Elements) -> String {
    sha256_hex(&elements.bytes)[..8].into()
}

/// x + Σ weight·(trained − x), each the exact sum, rounded to odd.
pub fn moved(base: impl Iterator<Item = f64>, trained: &[(f64, Vec<f32>)]) -> Vec<f64> {
    let mut sum = ExactSum::default();
    let sums = base.enumerate().map(|(at, x)| {
        sum.clear();
        sum.add(x);
        for (weight, trained) in trained {
            sum.add_product(*weight, trained[at].into());
            sum.add_product(-weight, x);
        }
        // a zero that does not move keeps its sign
        match sum.to_odd() {
            found if found == x => x,
            found => found,
        }
    });
    sums.collect()
}

/// A weighted sum of adapters of one decomposition: exactly linear in Δσ and R.
#[derive(Debug, Clone, Default)]
pub struct Mixture {
    pub parts: Vec<(Adapter, f64)>,
}

impl Mixture {
    /// The sha256 of each adapter's weights, and its factor.
    pub fn sums(&self) -> Result<Vec<(String, f64)>> {
        let parts = self.parts.iter();
        let sums = parts.map(|(adapter, weight)| Ok((adapter.sha256()?, *weight)));
        sums.collect()
    }

    /// Σ weight·Δσ of a module with q triplets, summed in f64.
    pub fn delta(&self, module: &str, q: usize) -> Vec<f32> {
        let mut sum = vec![0f64; q];
        for (adapter, weight) in &self.parts {
            if let Some(delta) = adapter.delta.get(module) {
                for (total, &d) in sum.iter_mut().zip(delta) {
                    *total += weight * f64::from(d);
                }
            }
        }
        sum.into_iter().map(|x| x as f32).collect()
    }

    /// What stands between the vectors of a module with q triplets.
    pub fn change(&self, module: &str, q: usize) -> Change {
        let cores = || {
            let parts = self.parts.iter();
            parts.filter_map(|(adapter, weight)| Some((adapter.core.get(module)?, weight)))
        };
        let r = cores().map(|(core, _)| core.shape[0]).max().unwrap_or(0);
        let mut sum = Array2::<f64>::zeros((r, r));
        for (core, weight) in cores() {
            let r = core.shape[0];
            let values = Array2::from_shape_vec((r, r), core.to_f32()).expect("a core is square");
            let mut first = sum.slice_mut(s![..r, ..r]);
            first.scaled_add(*weight, &values.mapv(f64::from));
        }
        Change {
            delta: self.delta(module, q),
            core: sum.mapv(|x| x as f32),
        }
    }

    /// Whether any of them trained the tensor.
    pub fn trains(&self, tensor: &str) -> bool {
        let mut adapters = self.parts.iter().map(|(adapter, _)| adapter);
        adapters.any(|adapter| adapter.tensors.contains_key(tensor))
    }

    /// base + Σ weight·(trained − base), or `None` where no part trained the tensor.
    ///
    /// Each the exact sum, rounded to odd: rounded once more it is the nearest.
    pub fn tensor(&self, name: &str, base: &Elements) -> Option<Vec<f64>> {
        let trained: Vec<(f64, Vec<f32>)> = self
            .parts
            .iter()
            .filter_map(|(adapter, weight)| Some((*weight, adapter.tensors.get(name)?.to_f32())))
            .collect();
        let values = || base.to_f32().into_iter().map(f64::from);
        (!trained.is_empty()).then(|| moved(values(), &trained))
    }

    /// The same, rounded to f32.
    pub fn tensor_f32(&self, name: &str, base: &Elements) -> Option<Elements> {
        let values: Vec<f32> = self
            .tensor(name, base)?
            .into_iter()
            .map(|x| x as f32)
            .collect();
        Some(Elements::from_f32(&base.shape, &values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelConfig;
    use serde_json::json;

    #[test]
    fn a_zero_that_no_adapter_moves_keeps_its_sign() {
        let base = Elements::from_f32(&[3], &[-0.0, 0.0, 2.0]);
        let config = json!({"schema": SCHEMA, "method": "sigma", "trained": [], "decomposition": {"repo": null,
            "revision": null, "content_sha256": "c"}, "base": {"repo": null, "revision": null, "sha256": {}},
            "weights_sha256": null, "tool": Tool::this(), "sha256": null});
        let adapter = |values: &[f32]| Adapter {
            dir: PathBuf::new(),
            config: serde_json::from_value(config.clone()).expect("a config"),
            delta: BTreeMap::new(),
            core: BTreeMap::new(),
            tensors: [("e".into(), Elements::from_f32(&[3], values))].into(),
        };
        for parts in [
            vec![(adapter(&[-0.0, 0.0, 5.0]), 0.0)],
            vec![
                (adapter(&[-0.0, 0.0, 5.0]), 1.0),
                (adapter(&[-0.0, 0.0, 5.0]), -1.0),
            ],
        ] {
            let sum = Mixture { parts }.tensor("e", &base).expect("is trained");
            let bits: Vec<u64> = sum.iter().map(|x| x.to_bits()).collect();
            assert_eq!(bits, [-0f64, 0.0, 2.0].map(f64::to_bits));
        }
    }

    #[test]
    fn sigma_and_norms_of_phi_3_mini_at_a_tenth_are_less_than_a_megabyte() {
        let dir = tempfile::tempdir().expect("a folder");
        let phi3 = json!({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": false});
        let phi3 = ModelConfig::parse(dir.path(), &phi3).expect("a config");
        let (mut delta, mut tensors) = (BTreeMap::new(), BTreeMap::new());
        for (name, shape) in phi3.tensors("model.") {
            match shape[..] {
                [m, n] if !name.ends_with("embed_tokens.weight") => {
                    let module = name.strip_suffix(".weight").expect("a weight");
                    delta.insert(module.into(), vec![0.5; m.min(n) / 10]);
                }
                [n] => {
                    tensors.insert(name, Elements::from_f32(&[n], &vec![1.5; n]));
                }
                _ => {}
            }
        }
        let numbers = |counts: Vec<usize>| counts.iter().sum::<usize>();
        let sigma = numbers(delta.values().map(Vec::len).collect());
        let norms = numbers(tensors.values().map(Elements::len).collect());
        assert_eq!((sigma, sigma + norms), (39_603, 239_283));
        let commit = Some("0123456789".repeat(4));
        let adapter = Adapter {
            dir: dir.path().into(),
            config: AdapterConfig {
                schema: SCHEMA,
                method: "sigma".into(),
                trained: vec!["sigma".into(), "norms".into()],
                decomposition: Origin {
                    repo: Some("someone/Phi-3-mini-128k-instruct-svd".into()),
                    revision: commit.clone(),
                    content_sha256: "a".repeat(64),
                },
                base: Pin {
                    repo: Some("microsoft/Phi-3-mini-128k-instruct".into()),
                    revision: commit,
                    sha256: (1..=2)
                        .map(|i| {
                            (
                                format!("model-0000{i}-of-00002.safetensors"),
                                "b".repeat(64),
                            )
                        })
                        .collect(),
                },
                weights_sha256: None,
                tool: Tool::this(),
                sha256: None,
            },
            delta,
            core: BTreeMap::new(),
            tensors,
        };
        adapter.save().expect("saves");
        let files = [WEIGHTS_FILE, CONFIG_FILE].map(|f| dir.path().join(f).metadata());
        let bytes: u64 = files.map(|m| m.expect("is there").len()).iter().sum();
        assert!((957_132..1_000_000).contains(&bytes), "{bytes} bytes");
        assert_eq!(
            Adapter::read(dir.path()).expect("reads").delta,
            adapter.delta
        );
    }
}
