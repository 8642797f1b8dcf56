//! A LoRA that is read: PEFT's, whoever wrote it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use serde::Deserialize;
use serde_json::Value;

use super::{LORA_CONFIG, LORA_WEIGHTS, Naming, PREFIX};
use crate::error::{Error, Result};
use crate::json;
use crate::model::LowRank;
use crate::sum::sha256_file;
use crate::weights::element::is_float;
use crate::weights::place::refuse_links_outside;
use crate::weights::{Checkpoint, Elements, Entry, dtype_name};

/// The numbers of a LoRA, by the names of the checkpoint it belongs to.
#[derive(Debug, Clone)]
pub struct LoraAdapter {
    pub dir: PathBuf,
    /// By module.
    pub pairs: BTreeMap<String, LowRank>,
    /// What is carried whole (`modules_to_save`), by tensor.
    pub whole: BTreeMap<String, Elements>,
}

/// What of `adapter_config.json` decides the numbers. Other keys are about training, or show in the tensors.
#[derive(Deserialize)]
struct Config {
    peft_type: String,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    bias: Option<String>,
    #[serde(default)]
    alpha_pattern: Option<BTreeMap<String, Value>>,
    #[serde(default)]
    init_lora_weights: Value,
    #[serde(default)]
    use_qalora: bool,
    #[serde(default)]
    alora_invocation_tokens: Value,
    #[serde(default)]
    layer_replication: Value,
    #[serde(default)]
    target_parameters: Value,
    #[serde(default)]
    r: Value,
    #[serde(default)]
    rank_pattern: Value,
    #[serde(default)]
    target_modules: Value,
    #[serde(default)]
    exclude_modules: Value,
    #[serde(default)]
    layers_to_transform: Value,
}

/// The ways to begin a LoRA that leave the base as it is; others, such as `pissa`, take from it what they begin with.
const INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl Config {
    fn check(&self, path: &Path) -> Result<()> {
        let refused = if self.peft_type != "LORA" {
            Some(("peft_type", self.peft_type.clone(), "LORA"))
        } else if self.use_dora {
            Some(("use_dora", "true".into(), "false"))
        } else if self.fan_in_fan_out {
            Some(("fan_in_fan_out", "true".into(), "false"))
        } else if let Some(bias) = self.bias.as_deref().filter(|&bias| bias != "none") {
            Some(("bias", bias.into(), "none"))
        } else if self.alpha_pattern.as_ref().is_some_and(|p| !p.is_empty()) {
            Some(("alpha_pattern", "not empty".into(), "{}"))
        } else if let Some(way) = (self.init_lora_weights.as_str())
            .filter(|way| !INITIALISATIONS.contains(&way.to_lowercase().as_str()))
        {
            let expected = "true, \"gaussian\", \"eva\" or \"orthogonal\", since PEFT changes the base for others";
            Some(("init_lora_weights", format!("{way:?}"), expected))
        } else if self.use_qalora {
            Some(("use_qalora", "true".into(), "false"))
        } else {
            let absent = [
                ("alora_invocation_tokens", &self.alora_invocation_tokens),
                ("layer_replication", &self.layer_replication),
                ("target_parameters", &self.target_parameters),
            ];
            let found = absent.into_iter().find(|(_, value)| !is_empty(value));
            found.map(|(key, value)| (key, value.to_string(), "null"))
        };
        match refused {
            None => Ok(()),
            Some((key, found, expected)) => Err(Error::Adapter {
                path: path.into(),
                reason: format!("`{key}` is {found}; a LoRA is read where it is {expected}"),
            }),
        }
    }

    /// Why PEFT would not take the LoRA of a module from the file, or not the one that is there.
    fn contradicts(&self, module: &str, rank: usize) -> Option<String> {
        let one_rank = !self.r.is_null() && is_empty(&self.rank_pattern);
        if one_rank && self.r.as_u64() != Some(rank as u64) {
            return Some(format!("has rank {rank}, and `r` is {}", self.r));
        }
        // a text is a pattern, or `all-linear`
        let names = |value: &Value| -> Vec<String> {
            let names = value.as_array().into_iter().flatten();
            names
                .filter_map(|name| Some(name.as_str()?.to_string()))
                .collect()
        };
        let ends_in = |name: &String| {
            let rest = module.strip_suffix(name.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let targets = names(&self.target_modules);
        let is_named = targets.iter().any(|target| target == module);
        if !targets.is_empty() && !targets.iter().any(ends_in) {
            return Some("is none of `target_modules`".into());
        }
        if names(&self.exclude_modules).iter().any(ends_in) {
            return Some("is among `exclude_modules`".into());
        }
        let layers: Option<Vec<u64>> = match &self.layers_to_transform {
            Value::Number(layer) => layer.as_u64().map(|layer| vec![layer]),
            Value::Array(layers) if !layers.is_empty() => {
                Some(layers.iter().filter_map(Value::as_u64).collect())
            }
            _ => None,
        };
        let layer = module.split('.').find_map(|part| part.parse().ok());
        match (layers, layer) {
            // what is named whole is taken of whatever layer
            (Some(layers), Some(layer)) if !is_named && !layers.contains(&layer) => Some(format!(
                "is of layer {layer}, which `layers_to_transform` leaves out"
            )),
            _ => None,
        }
    }

    /// PEFT's α/r, or α/√r.
    fn scale(&self, rank: usize) -> f64 {
        match self.use_rslora {
            true => self.lora_alpha / (rank as f64).sqrt(),
            false => self.lora_alpha / rank as f64,
        }
    }
}

impl LoraAdapter {
    /// The sha256 of its weights.
    pub fn sha256(&self) -> Result<String> {
        sha256_file(&self.dir.join(LORA_WEIGHTS), |_| {})
    }

    /// Reads the LoRA in `dir` for a checkpoint, of which `shape_of` tells the shape of a tensor, and `is_tied` whether it is
    /// embedding and head at once.
    ///
    /// # Errors
    /// Weights that are not a safetensors file; variants that compute otherwise (DoRA, biases, transposed weights, an α for
    /// each module); a tensor that belongs to nothing in the checkpoint, or does not fit.
    pub fn open(
        dir: &Path,
        naming: Naming,
        shape_of: impl Fn(&str) -> Option<Vec<usize>>,
        is_tied: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        refuse_links_outside(dir)?;
        let path = dir.join(LORA_CONFIG);
        let config: Config = json::read(&path)?;
        config.check(&path)?;
        let checkpoint = Checkpoint::single(dir, LORA_WEIGHTS)?;
        let path = dir.join(LORA_WEIGHTS);
        let mut read = Self {
            dir: dir.into(),
            pairs: BTreeMap::new(),
            whole: BTreeMap::new(),
        };
        let refuse = |tensor: &str, reason: String| Error::Adapter {
            path: path.clone(),
            reason: format!("`{tensor}` {reason}"),
        };
        let mut halves: BTreeMap<String, [Option<Elements>; 2]> = BTreeMap::new();
        // what the model calls it, which PEFT's config speaks of
        let mut called: BTreeMap<String, String> = BTreeMap::new();
        for (_, entry) in checkpoint.inventory.entries() {
            let elements = numbers(&checkpoint, entry, &path)?;
            let Some(name) = entry.name.strip_prefix(PREFIX) else {
                return Err(refuse(&entry.name, format!("does not begin with {PREFIX}")));
            };
            let in_model = name;
            let name = naming.in_checkpoint(name);
            let half = [".lora_A.weight", ".lora_B.weight"].map(|side| name.strip_suffix(side));
            if let [Some(module), _] | [_, Some(module)] = half {
                let sides = [".lora_A.weight", ".lora_B.weight"];
                let own = sides.iter().find_map(|side| in_model.strip_suffix(side));
                called.insert(module.into(), own.unwrap_or(module).into());
            }
            match half {
                [Some(module), _] => halves.entry(module.into()).or_default()[0] = Some(elements),
                [_, Some(module)] => halves.entry(module.into()).or_default()[1] = Some(elements),
                [None, None] => {
                    // under a LoRA of a head PEFT keeps a copy of the head
                    let own = name.replace(".base_layer.", ".");
                    if shape_of(&own).as_ref() != Some(&elements.shape) {
                        let reason = "is neither of lora_A and lora_B, nor a tensor of the model";
                        return Err(refuse(&entry.name, reason.into()));
                    }
                    if !is_tied(&own) {
                        read.whole.insert(own, elements);
                    } else if own == name {
                        let reason = "is carried whole, where the model has one weight for embedding and head: \
                                      PEFT gives it two, which no config here can say";
                        return Err(refuse(&entry.name, reason.into()));
                    }
                }
            }
        }
        if halves.is_empty() && read.whole.is_empty() {
            return Err(Error::Adapter {
                path,
                reason: "it holds no tensor".into(),
            });
        }
        for (module, [a, b]) in halves {
            let (Some(a), Some(b)) = (a, b) else {
                return Err(refuse(&module, "has not both of lora_A and lora_B".into()));
            };
            let shape = shape_of(&format!("{module}.weight"));
            let fits = match (&shape.as_deref(), &b.shape[..], &a.shape[..]) {
                (Some([m, n]), [rows, r], [rank, columns]) => {
                    (m, n, r) == (rows, columns, rank) && *r > 0
                }
                _ => false,
            };
            if !fits {
                let found = match &shape {
                    Some(shape) => format!("is {shape:?} in the model"),
                    None => "is not in the model".into(),
                };
                let reason = format!(
                    "{found}, which B {:?}·A {:?} does not fit",
                    b.shape, a.shape
                );
                return Err(refuse(&module, reason));
            }
            if let Some(reason) = config.contradicts(&called[&module], a.shape[0]) {
                return Err(refuse(&module, reason));
            }
            let scale = config.scale(a.shape[0]);
            let pair = LowRank {
                a: matrix(&a),
                b: matrix(&b),
                scale,
            };
            read.pairs.insert(module, pair);
        }
        Ok(read)
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn numbers(checkpoint: &Checkpoint, entry: &Entry, path: &Path) -> Result<Elements> {
    if !is_float(entry.dtype) {
        return Err(Error::Dtype {
            tensor: entry.name.clone(),
            path: path.into(),
            expected: "F32, F16 or BF16".into(),
            found: dtype_name(entry.dtype),
        });
    }
    checkpoint.read_finite(&entry.name)
}

fn matrix(elements: &Elements) -> Array2<f32> {
    let sides = (elements.shape[0], elements.shape[1]);
    Array2::from_shape_vec(sides, elements.to_f32()).expect("a tensor's elements cover its shape")
}
