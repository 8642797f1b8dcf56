//! `config.json` as the decoder and the plan understand it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, IoContext, Result};

/// The families, by `model_type`. A new Llama-like one is a row here and its switches below.
pub const SUPPORTED: [&str; 5] = ["llama", "mistral", "phi3", "qwen2", "qwen3"];

/// The hyper-parameters of a decoder-only model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub path: PathBuf,
    pub model_type: String,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub positions_max: usize,
    pub norm_eps: f64,
    pub rope: Rope,
    /// Attention reaches this many positions back, the own one included.
    pub sliding_window: Option<usize>,
    /// Layers before this one attend to everything even where a window is set (qwen2).
    pub full_attention_layers: usize,
    pub activation: String,
    /// The head is the embedding matrix.
    pub tied: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    /// `qkv_proj` and `gate_up_proj` instead of five matrices.
    pub fused: bool,
    pub eos: Option<u32>,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    /// Leading elements of each head that rotate.
    pub dim: usize,
    pub scaling: Scaling,
}

/// How a rope is stretched beyond its original window; formulas as in transformers' `modeling_rope_utils`.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    None,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low: f64,
        high: f64,
        original: f64,
    },
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        original: usize,
        attention: f64,
    },
    /// Known to exist, not to this decoder: plan and decompose work, training refuses.
    Unsupported(String),
}

impl ModelConfig {
    /// Reads `config.json` of a model directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        if !path.exists() {
            return Err(Error::NotAModel {
                path: dir.into(),
                missing: "config.json".into(),
            });
        }
        let bytes = std::fs::read(&path).context("read", &path)?;
        let json = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        Self::parse(&path, &json)
    }

    /// Interprets the JSON of a `config.json`; `path` names it in errors.
    pub fn parse(path: &Path, json: &Value) -> Result<Self> {
        let key = Keys { path, json };
        let model_type = json["model_type"].as_str().unwrap_or_default().to_string();
        if !SUPPORTED.contains(&model_type.as_str()) {
            let found = if model_type.is_empty() {
                json["architectures"][0]
                    .as_str()
                    .unwrap_or("(no model_type)")
                    .to_string()
            } else {
                model_type
            };
            return Err(Error::Architecture {
                path: path.into(),
                found,
                supported: SUPPORTED.join(", "),
            });
        }
        if !json["quantization_config"].is_null() {
            return Err(key.refuse(
                "quantization_config",
                "says that the weights are quantised: decompose the original checkpoint instead",
            ));
        }
        let family = model_type.as_str();
        let hidden = key.count("hidden_size")?;
        let heads = key.count("num_attention_heads")?;
        let head_dim = match key.optional("head_dim")? {
            Some(dim) => dim,
            None if heads > hidden => {
                return Err(key.refuse(
                    "num_attention_heads",
                    &format!("is {heads}, more than the hidden size {hidden}"),
                ));
            }
            None => hidden / heads,
        };
        if heads * head_dim > SIDE_MAX {
            return Err(key.refuse(
                "head_dim",
                &format!("is {head_dim} in each of {heads} heads, which no model has"),
            ));
        }
        let kv_heads = key.optional("num_key_value_heads")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(key.refuse(
                "num_key_value_heads",
                &format!("is {kv_heads}, which does not divide the {heads} attention heads"),
            ));
        }
        let positions_max = key.optional("max_position_embeddings")?.unwrap_or(2048);
        let flag = |name: &str| json[name].as_bool().unwrap_or(false);
        let window = match family {
            "qwen2" | "qwen3" if !flag("use_sliding_window") => None,
            _ => key.optional("sliding_window")?,
        };
        let attention_bias = flag("attention_bias");
        let intermediate = key.count("intermediate_size")?;
        let layers = key.count("num_hidden_layers")?;
        let vocabulary = key.count("vocab_size")?;
        let attention = 2 * (heads + kv_heads) * head_dim;
        let parameters = hidden as u128
            * (layers as u128 * (attention + 3 * intermediate) as u128 + 2 * vocabulary as u128);
        if parameters > PARAMETERS_MAX {
            return Err(key.refuse(
                "hidden_size",
                &format!("is {hidden}, which makes {parameters} parameters with the other sizes"),
            ));
        }
        Ok(Self {
            path: path.into(),
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocabulary,
            positions_max,
            norm_eps: json["rms_norm_eps"].as_f64().unwrap_or(1e-6),
            rope: rope(&key, head_dim, positions_max)?,
            sliding_window: window,
            full_attention_layers: match family {
                "qwen2" | "qwen3" => key.optional("max_window_layers")?.unwrap_or(0),
                _ => 0,
            },
            activation: json["hidden_act"].as_str().unwrap_or("silu").to_string(),
            tied: flag("tie_word_embeddings"),
            qkv_bias: family == "qwen2" || attention_bias,
            output_bias: family != "qwen2" && attention_bias,
            mlp_bias: flag("mlp_bias"),
            qk_norm: family == "qwen3",
            fused: family == "phi3",
            eos: token(&json["eos_token_id"]),
            model_type,
        })
    }

    /// Every tensor the decoder needs, with its shape, under `prefix` (`model.` in most checkpoints).
    pub fn tensors(&self, prefix: &str) -> Vec<(String, Vec<usize>)> {
        let (h, i) = (self.hidden, self.intermediate);
        let (query, key) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![(
            format!("{prefix}embed_tokens.weight"),
            vec![self.vocabulary, h],
        )];
        for layer in 0..self.layers {
            let name = |part: &str| format!("{prefix}layers.{layer}.{part}");
            let mut linear = |part: &str, out: usize, input: usize, bias: bool| {
                tensors.push((name(&format!("{part}.weight")), vec![out, input]));
                if bias {
                    tensors.push((name(&format!("{part}.bias")), vec![out]));
                }
            };
            if self.fused {
                linear("self_attn.qkv_proj", query + 2 * key, h, self.qkv_bias);
                linear("mlp.gate_up_proj", 2 * i, h, self.mlp_bias);
            } else {
                linear("self_attn.q_proj", query, h, self.qkv_bias);
                linear("self_attn.k_proj", key, h, self.qkv_bias);
                linear("self_attn.v_proj", key, h, self.qkv_bias);
                linear("mlp.gate_proj", i, h, self.mlp_bias);
                linear("mlp.up_proj", i, h, self.mlp_bias);
            }
            linear("self_attn.o_proj", h, query, self.output_bias);
            linear("mlp.down_proj", h, i, self.mlp_bias);
            if self.qk_norm {
                tensors.push((name("self_attn.q_norm.weight"), vec![self.head_dim]));
                tensors.push((name("self_attn.k_norm.weight"), vec![self.head_dim]));
            }
            tensors.push((name("input_layernorm.weight"), vec![h]));
            tensors.push((name("post_attention_layernorm.weight"), vec![h]));
        }
        tensors.push((format!("{prefix}norm.weight"), vec![h]));
        if !self.tied {
            tensors.push(("lm_head.weight".into(), vec![self.vocabulary, h]));
        }
        tensors
    }

    /// The window of one layer, if it has one.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window
            .filter(|_| layer >= self.full_attention_layers)
    }
}

/// A token id that may be a list of ids, as `eos_token_id` is in some configs: the first counts.
fn token(value: &Value) -> Option<u32> {
    let value = if value.is_array() { &value[0] } else { value };
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn rope(key: &Keys, head_dim: usize, positions_max: usize) -> Result<Rope> {
    // transformers 5 keeps theta and scaling together in `rope_parameters`
    let (json, parameters) = (key.json, &key.json["rope_parameters"]);
    let scaling = if parameters.is_object() {
        parameters
    } else {
        &json["rope_scaling"]
    };
    let theta = parameters["rope_theta"]
        .as_f64()
        .or(json["rope_theta"].as_f64())
        .unwrap_or(10_000.0);
    let share = parameters["partial_rotary_factor"]
        .as_f64()
        .or(json["partial_rotary_factor"].as_f64())
        .unwrap_or(1.0);
    if !(share > 0.0 && share <= 1.0) {
        return Err(key.refuse(
            "partial_rotary_factor",
            &format!("is {share}, not a share of a head"),
        ));
    }
    let dim = (head_dim as f64 * share) as usize;
    let kind = scaling["rope_type"]
        .as_str()
        .or(scaling["type"].as_str())
        .unwrap_or("default");
    let number = |name: &str| {
        scaling[name].as_f64().ok_or_else(|| {
            key.refuse(
                &format!("rope_scaling.{name}"),
                "is missing or not a number",
            )
        })
    };
    let list = |name: &str| -> Result<Vec<f64>> {
        let values: Option<Vec<f64>> = scaling[name]
            .as_array()
            .and_then(|a| a.iter().map(Value::as_f64).collect());
        match values {
            Some(values) if values.len() == dim / 2 => Ok(values),
            _ => Err(key.refuse(
                &format!("rope_scaling.{name}"),
                &format!("is not a list of {} numbers", dim / 2),
            )),
        }
    };
    let scaling = match kind {
        "default" => Scaling::None,
        "linear" => Scaling::Linear {
            factor: number("factor")?,
        },
        "llama3" => Scaling::Llama3 {
            factor: number("factor")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
            original: number("original_max_position_embeddings")?,
        },
        "longrope" | "su" => {
            let original = json["original_max_position_embeddings"]
                .as_u64()
                .or(scaling["original_max_position_embeddings"].as_u64())
                .map_or(positions_max, |n| n as usize);
            let stretch = positions_max as f64 / original as f64;
            let attention = scaling["attention_factor"].as_f64().unwrap_or_else(|| {
                if stretch <= 1.0 {
                    1.0
                } else {
                    (1.0 + stretch.ln() / (original as f64).ln()).sqrt()
                }
            });
            Scaling::LongRope {
                short: list("short_factor")?,
                long: list("long_factor")?,
                original,
                attention,
            }
        }
        other => Scaling::Unsupported(other.into()),
    };
    Ok(Rope {
        theta,
        dim,
        scaling,
    })
}

/// The longest side: far beyond any model, and the bits of a matrix with two such sides still count in 64.
const SIDE_MAX: usize = 1 << 28;

/// The most layers: each has tensors with names, from a config of a few hundred bytes.
const LAYERS_MAX: u64 = 4096;

/// The most parameters: some hundred times those of the largest model, and sums of their bytes still count in 64 bits.
const PARAMETERS_MAX: u128 = 1 << 48;

/// Reads keys of one config and names them when they are wrong.
struct Keys<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Keys<'_> {
    fn refuse(&self, key: &str, reason: &str) -> Error {
        Error::Config {
            path: self.path.into(),
            key: key.into(),
            reason: reason.into(),
        }
    }

    fn beyond(&self, key: &str, value: &Value) -> Error {
        self.refuse(key, &format!("is {value}, which no model has"))
    }

    fn optional(&self, key: &str) -> Result<Option<usize>> {
        match &self.json[key] {
            Value::Null => Ok(None),
            value => match (key, value.as_u64()) {
                ("max_window_layers", Some(0)) => Ok(Some(0)),
                ("num_hidden_layers", Some(n)) if n > LAYERS_MAX => Err(self.beyond(key, value)),
                (_, Some(n)) if n > SIDE_MAX as u64 => Err(self.beyond(key, value)),
                (_, Some(n)) if n > 0 => Ok(Some(n as usize)),
                _ => Err(self.refuse(key, &format!("is {value}, not a positive whole number"))),
            },
        }
    }

    fn count(&self, key: &str) -> Result<usize> {
        self.optional(key)?
            .ok_or_else(|| self.refuse(key, "is missing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(json: Value) -> Result<ModelConfig> {
        ModelConfig::parse(Path::new("config.json"), &json)
    }

    fn llama() -> Value {
        json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": true})
    }

    #[test]
    fn tensors_follow_the_family() {
        let mut config = llama();
        let names = |c: &ModelConfig| {
            c.tensors("model.")
                .into_iter()
                .map(|(n, _)| n)
                .collect::<Vec<_>>()
        };
        let parsed = parse(config.clone()).expect("parses");
        assert_eq!(parsed.head_dim, 8);
        assert_eq!(names(&parsed).len(), 1 + 2 * 9 + 1);
        config["model_type"] = "qwen2".into();
        assert!(
            names(&parse(config.clone()).expect("parses"))
                .contains(&"model.layers.1.self_attn.k_proj.bias".to_string())
        );
        config["model_type"] = "phi3".into();
        config["tie_word_embeddings"] = false.into();
        let fused = parse(config).expect("parses");
        assert!(fused.tensors("model.").contains(&(
            "model.layers.0.self_attn.qkv_proj.weight".into(),
            vec![128, 64]
        )));
        assert!(names(&fused).contains(&"lm_head.weight".to_string()));
    }

    #[test]
    fn both_spellings_of_rope_parameters_are_read() {
        let mut old = llama();
        old["rope_theta"] = 5e5.into();
        old["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
        let mut new = llama();
        new["rope_parameters"] = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5});
        let (old, new) = (parse(old).expect("parses"), parse(new).expect("parses"));
        assert_eq!(old.rope, new.rope);
        assert_eq!(old.rope.scaling, Scaling::Linear { factor: 4.0 });
    }

    #[test]
    fn broken_values_are_named() {
        for (key, value, word) in [
            ("hidden_size", json!(-3), "hidden_size"),
            ("num_key_value_heads", json!(3), "divide"),
            ("vocab_size", json!(1u64 << 40), "no model has"),
            ("head_dim", json!(1u64 << 28), "no model has"),
            ("model_type", json!("mixtral"), "mixtral"),
            ("vocab_size", json!(null), "missing"),
            ("rope_scaling", json!({"rope_type": "llama3"}), "factor"),
            ("quantization_config", json!({"bits": 4}), "quantised"),
        ] {
            let mut config = llama();
            config[key] = value;
            let error = parse(config).expect_err(key).to_string();
            assert!(error.contains(word), "{key}: {error}");
        }
    }
}
