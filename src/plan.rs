//! What will be done with every tensor, known from `config.json` and the safetensors headers alone.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::{ArtifactLayout, ModuleTensors, Rank, base_header_tensor};
use crate::model::ModelConfig;
use crate::weights::checkpoint::WeightFile;
use crate::weights::element::is_float;
use crate::weights::{Dtype, Entry, Header, Inventory, dtype_name};

/// A module name pattern: `*` stands for any run of characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pattern(String);

impl FromStr for Pattern {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl Pattern {
    /// Whether the pattern matches the whole name, or a run of its dot-separated parts (`q_proj`, `layers.3`).
    pub fn matches(&self, name: &str) -> bool {
        let whole = if self.0.contains('*') {
            glob(self.0.as_bytes(), name.as_bytes())
        } else {
            self.0 == name
        };
        whole || format!(".{name}.").contains(&format!(".{}.", self.0))
    }
}

fn glob(pattern: &[u8], name: &[u8]) -> bool {
    // greedy with one step back: linear in practice, no recursion to blow up
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && pattern[p] == name[n] {
            p += 1;
            n += 1;
        } else if let Some((at, from)) = star {
            p = at + 1;
            n = from + 1;
            star = Some((at, from + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

/// What a plan depends on beside the model.
#[derive(Debug, Clone)]
pub struct PlanOptions {
    pub rank: Rank,
    /// Modules to decompose; empty means all linear ones.
    pub include: Vec<Pattern>,
    pub exclude: Vec<Pattern>,
    pub layout: ArtifactLayout,
    pub threads: usize,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            rank: Rank::default(),
            include: Vec::new(),
            exclude: Vec::new(),
            layout: ArtifactLayout::Residual,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Linear,
    Head,
    Embedding,
    Norm,
    Bias,
    Other,
}

/// The one place that reads meaning into tensor names.
pub fn role(tensor: &str) -> Role {
    let parts: Vec<&str> = tensor.rsplit('.').collect();
    match parts.as_slice() {
        ["bias", ..] => Role::Bias,
        ["weight", "lm_head", ..] => Role::Head,
        ["weight", "embed_tokens", ..] => Role::Embedding,
        ["weight", module, ..] if module.ends_with("_proj") => Role::Linear,
        ["weight", module, ..] if module.contains("norm") => Role::Norm,
        _ => Role::Other,
    }
}

/// Where a module stands: the number of its layer, if it is in one, and its part there (`q_proj`, `lm_head`).
pub fn place(module: &str) -> (Option<u32>, &str) {
    let layer = module.split('.').find_map(|part| part.parse().ok());
    let part = module.rsplit('.').next().unwrap_or(module);
    (layer, part)
}

/// What happens to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    Decompose,
    Copy,
}

/// One tensor of the plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: String,
    pub bytes: u64,
    pub role: Role,
    pub action: Action,
    /// Singular triplets to keep, of a tensor that is decomposed.
    pub q: Option<usize>,
    pub reason: String,
}

impl PlannedTensor {
    /// The module of a weight: its name without `.weight`.
    pub fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }

    /// (m, n) of a planned decomposition.
    fn sides(&self) -> (usize, usize) {
        (self.shape[0], self.shape[1])
    }

    /// Multiplications and additions of the Gram route (facts of 2026-11: 1.3–2.1 × these are measured).
    pub fn flops(&self) -> u64 {
        let Some(q) = self.q else { return 0 };
        let (m, n) = self.sides();
        let (s, l, q) = (m.min(n) as f64, m.max(n) as f64, q as f64);
        let svd = s * s * l + 8.0 / 3.0 * s.powi(3) + 2.0 * q * s * s + 2.0 * q * s * l + q * q * l;
        // the residual is a product in f64, worth two in f32
        (svd + 4.0 * q * s * l) as u64
    }

    /// Bytes one worker holds while it decomposes this tensor.
    fn worker_bytes(&self, layout: ArtifactLayout) -> u64 {
        let Some(q) = self.q else {
            return self.bytes;
        };
        let (m, n) = self.sides();
        let (elements, short) = ((m * n) as u64, m.min(n) as u64);
        let factors = 4 * (q * (m + n)) as u64;
        // values in f32 and bytes as stored, the Gram matrix, its eigenvectors and workspace in f64
        let decomposing = 4 * elements + self.bytes + 3 * 8 * short * short + 2 * factors;
        let splitting = match layout {
            // stored, widened, residual values, and their bytes on the way to disk
            ArtifactLayout::Residual => self.bytes + 3 * 4 * elements + 2 * factors,
            ArtifactLayout::Sidecar => self.bytes + 4 * elements + 2 * factors,
        };
        decomposing.max(splitting)
    }

    /// Bytes the tensor takes in the artifact.
    fn artifact_bytes(&self, layout: ArtifactLayout) -> u64 {
        match (self.q, layout) {
            (None, ArtifactLayout::Residual) => self.bytes,
            (None, ArtifactLayout::Sidecar) => 0,
            (Some(q), _) => {
                let (m, n) = self.sides();
                let factors = 4 * (q * (m + n + 1)) as u64;
                // of an f32 weight, 14–19 % of the elements are stored exactly, in 8 bytes each; of 16 bits, almost none
                let exact = if self.dtype == "F32" { 5 } else { 4 };
                match layout {
                    ArtifactLayout::Residual => factors + exact * (m * n) as u64,
                    ArtifactLayout::Sidecar => factors,
                }
            }
        }
    }
}

/// Numbers that training could move, by group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trainable {
    pub sigma: u64,
    pub norms: u64,
    pub embeddings: u64,
}

/// The whole plan of one decomposition.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    pub model_type: String,
    pub rank: Rank,
    pub layout: ArtifactLayout,
    pub parameters: u64,
    pub trainable: Trainable,
    /// LoRA parameters by rank, on the same linear layers, for comparison.
    pub lora: BTreeMap<String, u64>,
    pub linear_layers: usize,
    pub flops: u64,
    /// An estimate: the rate of a core is not measured here.
    pub seconds: f64,
    pub peak_bytes: u64,
    pub disk_bytes: u64,
    pub threads: usize,
    #[serde(rename = "modules")]
    pub tensors: Vec<PlannedTensor>,
}

/// Program, libraries and their thread-local buffers (measured 2026-11: 45–60 MB).
const PROCESS_BYTES: u64 = 60 << 20;

/// Sustained rate of the whole Gram route on one core, flop/s (Zen 4, OpenBLAS 0.3.21, 2026-11: 45–70 of 95 for GEMM).
const FLOPS_PER_CORE: f64 = 50e9;

impl Plan {
    /// Plans the decomposition of the model in `root` (named in errors only).
    ///
    /// # Errors
    /// A tensor that the architecture needs is missing, has another shape, or a dtype that is not f32, f16 or bf16.
    pub fn new(
        root: &Path,
        config: &ModelConfig,
        inventory: &Inventory,
        options: &PlanOptions,
    ) -> Result<Self> {
        check_shapes(root, config, inventory)?;
        let tensors: Vec<PlannedTensor> = inventory
            .entries()
            .map(|(file, entry)| planned(root, file, entry, config, options))
            .collect::<Result<_>>()?;
        refuse_taken_names(root, inventory, &tensors)?;
        let decomposed = || tensors.iter().filter(|t| t.q.is_some());
        if decomposed().next().is_none() {
            return Err(Error::NothingToDecompose {
                path: root.into(),
                reason: "no linear weight matches the include and exclude patterns".into(),
            });
        }
        let count = |role: Role| {
            tensors
                .iter()
                .filter(|t| t.role == role)
                .map(|t| t.shape.iter().product::<usize>() as u64)
                .sum::<u64>()
        };
        let sides: u64 = decomposed().map(|t| (t.shape[0] + t.shape[1]) as u64).sum();
        let flops = tensors.iter().map(PlannedTensor::flops).sum::<u64>();
        let mut workers: Vec<u64> = tensors
            .iter()
            .map(|t| t.worker_bytes(options.layout))
            .collect();
        workers.sort_unstable_by(|a, b| b.cmp(a));
        Ok(Self {
            model_type: config.model_type.clone(),
            rank: options.rank,
            layout: options.layout,
            parameters: inventory.entries().map(|(_, e)| e.elements() as u64).sum(),
            trainable: Trainable {
                sigma: decomposed().filter_map(|t| t.q).map(|q| q as u64).sum(),
                norms: count(Role::Norm),
                embeddings: count(Role::Embedding),
            },
            lora: [8, 16, 32].map(|r: u64| (r.to_string(), r * sides)).into(),
            linear_layers: decomposed().count(),
            flops,
            seconds: flops as f64 / FLOPS_PER_CORE / options.threads as f64,
            peak_bytes: PROCESS_BYTES + workers.iter().take(options.threads).sum::<u64>(),
            disk_bytes: tensors
                .iter()
                .map(|t| t.artifact_bytes(options.layout))
                .sum(),
            threads: options.threads,
            tensors,
        })
    }

    /// The most disk that decomposing takes at any moment: finished matrices wait beside the shard that is being written.
    pub fn disk_bytes_peak(&self, shard_bytes_max: u64) -> u64 {
        self.disk_bytes + self.disk_bytes.min(shard_bytes_max) + self.disk_bytes / 50
    }

    /// The tensors to decompose, in checkpoint order.
    pub fn decomposed(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.tensors.iter().filter(|t| t.q.is_some())
    }
}

/// The headers a checkpoint of this config would have, for planning without one.
pub fn expected_inventory(config: &ModelConfig, dtype: Dtype) -> Result<Inventory> {
    let tensors = config.tensors("model.");
    let header = Header::compose(
        tensors
            .iter()
            .map(|(name, shape)| (name.as_str(), dtype, shape.as_slice())),
    )?;
    let file = WeightFile {
        name: "model.safetensors".into(),
        header,
    };
    Inventory::new(&config.path, vec![file])
}

/// `model.` in most checkpoints, nothing in those saved from the inner model.
pub fn prefix(inventory: &Inventory) -> &'static str {
    if inventory.contains("embed_tokens.weight") {
        ""
    } else {
        "model."
    }
}

/// Refuses weights that are not those the config describes.
pub fn check_shapes(root: &Path, config: &ModelConfig, inventory: &Inventory) -> Result<()> {
    for (tensor, expected) in config.tensors(prefix(inventory)) {
        match inventory.get(&tensor) {
            None => {
                return Err(Error::TensorMissing {
                    tensor,
                    path: root.into(),
                });
            }
            Some((file, entry)) if entry.shape != expected => {
                return Err(Error::Shape {
                    tensor,
                    path: root.join(&file.name),
                    expected,
                    found: entry.shape.clone(),
                });
            }
            Some((file, entry)) if !is_float(entry.dtype) => {
                return Err(Error::Dtype {
                    tensor,
                    path: root.join(&file.name),
                    expected: "F32, F16 or BF16".into(),
                    found: dtype_name(entry.dtype),
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// A stranger's tensor must not be called like a part of the decomposition it is carried along in.
fn refuse_taken_names(root: &Path, inventory: &Inventory, tensors: &[PlannedTensor]) -> Result<()> {
    let modules = tensors.iter().filter(|t| t.q.is_some());
    let parts = modules.flat_map(|t| ModuleTensors::of(t.module()).all());
    let headers = inventory
        .files
        .iter()
        .map(|file| base_header_tensor(&file.name));
    match parts.chain(headers).find(|name| inventory.contains(name)) {
        Some(tensor) => Err(Error::NameTaken {
            tensor,
            path: root.into(),
        }),
        None => Ok(()),
    }
}

fn planned(
    root: &Path,
    file: &WeightFile,
    entry: &Entry,
    config: &ModelConfig,
    options: &PlanOptions,
) -> Result<PlannedTensor> {
    let role = role(&entry.name);
    let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
    let linear = matches!(role, Role::Linear | Role::Head) && entry.shape.len() == 2;
    let copy = |reason: &str| (None, reason.to_string());
    let (q, reason) = if !linear {
        copy(match role {
            Role::Norm => "a norm, not a matrix",
            Role::Bias => "a bias, carried along",
            Role::Embedding if config.tied => "the embedding, and the head tied to it",
            Role::Embedding => "the embedding",
            _ => "not a linear weight",
        })
    } else if role == Role::Head && config.tied {
        copy("tied to the embedding: decomposing it would untie the model")
    } else if options.exclude.iter().any(|p| p.matches(module)) {
        copy("excluded")
    } else if !options.include.is_empty() && !options.include.iter().any(|p| p.matches(module)) {
        copy("not included")
    } else {
        if !is_float(entry.dtype) {
            return Err(Error::Dtype {
                tensor: entry.name.clone(),
                path: root.join(&file.name),
                expected: "F32, F16 or BF16".into(),
                found: dtype_name(entry.dtype),
            });
        }
        let short = entry.shape[0].min(entry.shape[1]);
        if short == 0 {
            copy("empty")
        } else {
            let q = options.rank.q(short);
            (Some(q), format!("linear, {q} of {short} triplets"))
        }
    };
    Ok(PlannedTensor {
        name: entry.name.clone(),
        shape: entry.shape.clone(),
        dtype: dtype_name(entry.dtype),
        bytes: entry.bytes,
        role,
        action: if q.is_some() {
            Action::Decompose
        } else {
            Action::Copy
        },
        q,
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn plan(config: Value, rank: Rank) -> Plan {
        let config = ModelConfig::parse(Path::new("config.json"), &config).expect("parses");
        let inventory = expected_inventory(&config, Dtype::BF16).expect("composes");
        let options = PlanOptions {
            rank,
            ..PlanOptions::default()
        };
        Plan::new(Path::new("."), &config, &inventory, &options).expect("plans")
    }

    #[test]
    fn the_published_parameter_table_comes_out_exactly() {
        let phi3 = json!({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": false});
        for (f, sigma, with_norms) in [
            (0.1, 39_603, 239_283),
            (0.2, 79_206, 278_886),
            (0.5, 198_144, 397_824),
        ] {
            let plan = plan(phi3.clone(), Rank::Fraction(f));
            assert_eq!(plan.trainable.sigma, sigma);
            assert_eq!(plan.trainable.sigma + plan.trainable.norms, with_norms);
            assert_eq!(plan.trainable.embeddings, 98_500_608);
            assert_eq!(plan.linear_layers, 129);
            let lora: Vec<u64> = ["8", "16", "32"].map(|r| plan.lora[r]).to_vec();
            assert_eq!(lora, [12_864_000, 25_728_000, 51_456_000]);
        }
        let mistral = json!({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": false});
        let plan = plan(mistral, Rank::Fraction(0.25));
        assert_eq!(
            plan.trainable,
            Trainable {
                sigma: 181_248,
                norms: 266_240,
                embeddings: 131_072_000
            }
        );
    }

    #[test]
    fn patterns_match_names_and_parts() {
        let name = "model.layers.12.self_attn.q_proj";
        for yes in [
            "q_proj",
            "layers.12",
            "model.layers.*.q_proj",
            "*q_proj",
            "self_attn",
            name,
        ] {
            assert!(Pattern(yes.into()).matches(name), "{yes}");
        }
        for no in ["proj", "layers.1", "q_proj*x", "layers.*", "k_proj"] {
            assert!(!Pattern(no.into()).matches(name), "{no}");
        }
    }

    #[test]
    fn the_smallest_rank_is_one() {
        assert_eq!(Rank::Fraction(0.1).q(5), 1);
        assert_eq!(Rank::Fraction(1.0).q(5), 5);
        assert_eq!(Rank::fraction("0.5").expect("parses").q(7), 3);
        assert!(
            Rank::fraction("0").is_err()
                && Rank::fraction("1.5").is_err()
                && Rank::fraction("nan").is_err()
        );
    }
}
