//! `config.json` as the decoder and the plan understand it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::family::{
    Activation, AttentionScale, Biases, Cap, EmbeddingScale, FAMILIES, Family, KNOWN_TO_DIFFER,
    Names, NormKind, NormPlaces, Projections, QueryKeyNorm, Windows,
};
use crate::error::{Error, Result};
use crate::json;

/// The hyper-parameters of a decoder-only model, and what sets its family apart.
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
    pub norm: NormKind,
    pub norm_eps: f64,
    /// Added to the stored weight of every norm: 1 where checkpoints keep the distance from one.
    pub norm_offset: f64,
    pub norm_places: NormPlaces,
    pub query_key_norm: QueryKeyNorm,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<Rope>,
    /// One for each layer.
    pub attention: Vec<Attention>,
    /// Scores are q·k times this.
    pub attention_scale: f64,
    /// Scores are bent to `cap·tanh(score / cap)`.
    pub attention_cap: Option<f64>,
    pub activation: Activation,
    /// The MLP multiplies the activated gate with another projection; without a gate it is the activation alone.
    pub gated: bool,
    /// Attention and MLP read the same stream, and both add to it.
    pub parallel: bool,
    /// What is read from the embedding is multiplied by this.
    pub embedding_scale: f64,
    /// What attention and MLP add to the stream is multiplied by this.
    pub residual_scale: f64,
    /// Logits are divided by this.
    pub logits_divisor: f64,
    /// Logits are bent like scores.
    pub logits_cap: Option<f64>,
    /// The head is the embedding matrix.
    pub tied: bool,
    pub qkv_bias: bool,
    pub output_bias: bool,
    pub mlp_bias: bool,
    pub names: &'static Names,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
}

/// What one layer's attention sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// It reaches this many positions back, the own one included.
    pub window: Option<usize>,
    /// Which of the config's ropes turns queries and keys; none leaves them as they are.
    pub rope: Option<usize>,
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
    /// Slow turns are stretched, fast ones are not, and between `slow` and `fast` turns in the original window it changes
    /// gradually (Peng et al. 2023).
    Yarn {
        factor: f64,
        attention: f64,
        fast: f64,
        slow: f64,
        original: f64,
        /// The two bounds are rounded to whole elements.
        truncate: bool,
    },
    /// θ grows with a sequence that is longer than the original window.
    Dynamic {
        factor: f64,
        original: f64,
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
        Self::parse(&path, &json::read(&path)?)
    }

    /// Interprets the JSON of a `config.json`; `path` names it in errors.
    pub fn parse(path: &Path, json: &Value) -> Result<Self> {
        let key = Keys { path, json };
        key.refuse_other_kinds()?;
        let family = key.family()?;
        let hidden = key.count("hidden_size")?;
        let heads = key.count("num_attention_heads")?;
        let head_dim = match key.optional("head_dim")?.or(family.head_dim) {
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
        let layers = key.count("num_hidden_layers")?;
        let positions_max = key.optional("max_position_embeddings")?.unwrap_or(2048);
        let flag = |name: &str| json[name].as_bool().unwrap_or(false);
        let multiplier = |name: &str| Ok::<_, Error>(key.number(name)?.unwrap_or(1.0));
        let (qkv_bias, output_bias) = match family.biases {
            Biases::Configured => (flag("attention_bias"), flag("attention_bias")),
            Biases::QueryKeyValue => (true, false),
            Biases::Everywhere => {
                let attention = json["attention_bias"].as_bool().unwrap_or(true);
                (attention, attention)
            }
        };
        let (activation_key, activation) = family.activation;
        let ropes = ropes(&key, family, head_dim, positions_max)?;
        let intermediate = key.count("intermediate_size")?;
        let vocabulary = key.count("vocab_size")?;
        let projections = 2 * (heads + kv_heads) * head_dim;
        let parameters = hidden as u128
            * (layers as u128 * (projections + 3 * intermediate) as u128 + 2 * vocabulary as u128);
        if parameters > PARAMETERS_MAX {
            return Err(key.refuse(
                "hidden_size",
                &format!("is {hidden}, which makes {parameters} parameters with the other sizes"),
            ));
        }
        Ok(Self {
            path: path.into(),
            model_type: family.model_type.into(),
            hidden,
            intermediate,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocabulary,
            positions_max,
            norm: family.norm,
            norm_eps: key.number(family.norm_eps.0)?.unwrap_or(family.norm_eps.1),
            norm_offset: family.norm_offset,
            norm_places: family.norm_places,
            query_key_norm: family.query_key_norm,
            attention: attention(&key, family, layers, ropes.len())?,
            ropes,
            attention_scale: match family.attention_scale {
                AttentionScale::RootOfHead => (head_dim as f64).sqrt().recip(),
                AttentionScale::QueryScalar(usual) => {
                    let scalar = key.positive("query_pre_attn_scalar")?.unwrap_or(usual);
                    scalar.sqrt().recip()
                }
                AttentionScale::Multiplier => multiplier("attention_multiplier")?,
            },
            attention_cap: key.cap("attn_logit_softcapping", &family.attention_cap)?,
            activation: Activation::named(json[activation_key].as_str().unwrap_or(activation)),
            gated: family.gated,
            parallel: family.parallel && json["use_parallel_residual"].as_bool().unwrap_or(true),
            embedding_scale: match family.embedding_scale {
                EmbeddingScale::One => 1.0,
                EmbeddingScale::RootOfHidden => (hidden as f64).sqrt(),
                EmbeddingScale::Multiplier => multiplier("embedding_multiplier")?,
            },
            residual_scale: match family.multipliers {
                true => multiplier("residual_multiplier")?,
                false => 1.0,
            },
            logits_divisor: match family.multipliers {
                true => key.positive("logits_scaling")?.unwrap_or(1.0),
                false => 1.0,
            },
            logits_cap: key.cap("final_logit_softcapping", &family.logits_cap)?,
            tied: json["tie_word_embeddings"].as_bool().unwrap_or(family.tied),
            qkv_bias,
            output_bias,
            mlp_bias: flag("mlp_bias") || matches!(family.biases, Biases::Everywhere),
            names: family.names,
            eos: token_ids(&json["eos_token_id"]),
        })
    }

    /// How many positions the model reaches, its ropes stretched.
    pub fn positions_reached(&self) -> usize {
        let reached = self
            .ropes
            .iter()
            .map(|r| r.positions_max(self.positions_max));
        reached.max().unwrap_or(self.positions_max)
    }

    /// What stands before the names of a checkpoint that `has` tensors: it may be of the inner model alone.
    pub fn prefix(&self, has: impl Fn(&str) -> bool) -> &'static str {
        match has(&self.embedding("")) {
            true => "",
            false => self.names.prefix,
        }
    }

    /// The tensor of the embedding under `prefix`.
    pub fn embedding(&self, prefix: &str) -> String {
        format!("{prefix}{}.weight", self.names.embedding)
    }

    /// Every tensor the decoder needs, with its shape, under `prefix`.
    pub fn tensors(&self, prefix: &str) -> Vec<(String, Vec<usize>)> {
        let (h, i, names) = (self.hidden, self.intermediate, self.names);
        let (query, key) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut tensors = vec![(self.embedding(prefix), vec![self.vocabulary, h])];
        for layer in 0..self.layers {
            let name = |part: &str| format!("{prefix}layers.{layer}.{part}");
            let mut linear = |part: &str, out: usize, input: usize, bias: bool| {
                tensors.push((name(&format!("{part}.weight")), vec![out, input]));
                if bias {
                    tensors.push((name(&format!("{part}.bias")), vec![out]));
                }
            };
            let mut many = |projections: Projections, outs: &[usize], bias: bool| match projections
            {
                Projections::Apart(parts) => {
                    for (part, &out) in parts.iter().zip(outs) {
                        linear(part, out, h, bias);
                    }
                }
                Projections::Stacked(part) | Projections::ByHead(part) => {
                    linear(part, outs.iter().sum(), h, bias);
                }
            };
            many(names.query_key_value, &[query, key, key], self.qkv_bias);
            many(names.gate_up, &[i, i], self.mlp_bias);
            linear(names.output, h, query, self.output_bias);
            linear(names.down, h, i, self.mlp_bias);
            let normed = match self.query_key_norm {
                QueryKeyNorm::None => None,
                QueryKeyNorm::EachHead => Some((self.head_dim, self.head_dim)),
                QueryKeyNorm::AllHeads => Some((query, key)),
            };
            if let Some((query, key)) = normed {
                self.norm(&mut tensors, name(names.query_norm), query);
                self.norm(&mut tensors, name(names.key_norm), key);
            }
            for norm in self.norm_places.modules().into_iter().flatten() {
                self.norm(&mut tensors, name(norm), h);
            }
        }
        self.norm(&mut tensors, format!("{prefix}{}", names.norm), h);
        if !self.tied {
            tensors.push((format!("{}.weight", names.head), vec![self.vocabulary, h]));
        }
        tensors
    }

    fn norm(&self, tensors: &mut Vec<(String, Vec<usize>)>, module: String, side: usize) {
        tensors.push((format!("{module}.weight"), vec![side]));
        if self.norm == NormKind::Layer {
            tensors.push((format!("{module}.bias"), vec![side]));
        }
    }
}

/// Token ids, of which some files hold one and others a list.
pub fn token_ids(value: &Value) -> Vec<u32> {
    let list = value
        .as_array()
        .map_or(std::slice::from_ref(value), Vec::as_slice);
    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
    list.iter().filter_map(id).collect()
}

/// What each layer sees; `ropes` is how many ropes there are.
fn attention(key: &Keys, family: &Family, layers: usize, ropes: usize) -> Result<Vec<Attention>> {
    let json = key.json;
    let switched = json["use_sliding_window"].as_bool().unwrap_or(false);
    let window = match (&family.windows, json.get("sliding_window")) {
        (Windows::Nowhere, _) => None,
        (Windows::Later | Windows::WithoutRope, _) if !switched => None,
        (_, None) => family.window,
        (_, Some(_)) => key.optional("sliding_window")?,
    };
    let turned = turned(key, family, layers)?;
    let windowed: Vec<bool> = match (&family.windows, key.layer_types(layers)?) {
        (Windows::Nowhere, _) => vec![false; layers],
        (Windows::Everywhere, _) => vec![true; layers],
        (_, Some(types)) => types,
        (Windows::Later, None) => {
            let first = key.optional("max_window_layers")?.unwrap_or(28);
            (0..layers).map(|layer| layer >= first).collect()
        }
        (Windows::WithoutRope, None) => turned.iter().map(|turned| !turned).collect(),
        (Windows::AllBut(usual), None) => {
            let period = key.optional("sliding_window_pattern")?.unwrap_or(*usual);
            let windowed = |layer: usize| !(layer + 1).is_multiple_of(period);
            (0..layers).map(windowed).collect()
        }
    };
    let layer = |(windowed, turned): (bool, bool)| Attention {
        window: window.filter(|_| windowed),
        rope: turned.then_some(if windowed { ropes - 1 } else { 0 }),
    };
    Ok(windowed.into_iter().zip(turned).map(layer).collect())
}

/// Which layers turn queries and keys.
fn turned(key: &Keys, family: &Family, layers: usize) -> Result<Vec<bool>> {
    if !family.rope_skips_layers {
        return Ok(vec![true; layers]);
    }
    match &key.json["no_rope_layers"] {
        Value::Null => {
            let period = key.optional("no_rope_layer_interval")?.unwrap_or(4);
            let turned = |layer: usize| !(layer + 1).is_multiple_of(period);
            Ok((0..layers).map(turned).collect())
        }
        // 1 where there is a rope, 0 where there is none, whatever the name says
        value => {
            let flags = value.as_array().filter(|flags| flags.len() == layers);
            flags
                .and_then(|flags| flags.iter().map(|f| Some(f.as_u64()? != 0)).collect())
                .ok_or_else(|| {
                    let reason = format!("is not a list of {layers} numbers, one for each layer");
                    key.refuse("no_rope_layers", &reason)
                })
        }
    }
}

/// The rope of most layers, and behind it that of layers with a window where they have one of their own.
fn ropes(key: &Keys, family: &Family, head_dim: usize, positions_max: usize) -> Result<Vec<Rope>> {
    let json = key.json;
    // transformers 5 keeps theta and scaling together in `rope_parameters`, once for each kind of layer where they differ
    let (all, windows) = match &json["rope_parameters"] {
        Value::Null => (&json["rope_scaling"], &Value::Null),
        kinds if kinds["full_attention"].is_object() => {
            (&kinds["full_attention"], &kinds["sliding_attention"])
        }
        one => (one, &Value::Null),
    };
    let theta = |parameters: &Value, (spelled, usual): (&str, f64)| {
        let theta = parameters["rope_theta"].as_f64();
        theta.or(json[spelled].as_f64()).unwrap_or(usual)
    };
    let mut ropes = vec![rope(
        key,
        family,
        all,
        theta(all, family.rope_theta),
        head_dim,
        positions_max,
    )?];
    if let Some(usual) = family.rope_of_windows {
        let theta = theta(windows, usual);
        ropes.push(rope(key, family, windows, theta, head_dim, positions_max)?);
    }
    Ok(ropes)
}

/// One rope; `scaling` is the object that tells how it is stretched.
fn rope(
    key: &Keys,
    family: &Family,
    scaling: &Value,
    theta: f64,
    head_dim: usize,
    positions_max: usize,
) -> Result<Rope> {
    let json = key.json;
    let (spelled, usual) = family.rope_share;
    let share = scaling["partial_rotary_factor"]
        .as_f64()
        .or(json[spelled].as_f64())
        .unwrap_or(usual);
    if !(share > 0.0 && share <= 1.0) {
        return Err(key.refuse(spelled, &format!("is {share}, not a share of a head")));
    }
    let dim = (head_dim as f64 * share) as usize;
    let kind = scaling["rope_type"]
        .as_str()
        .or(scaling["type"].as_str())
        .unwrap_or("default");
    let number = |name: &str| {
        let number = scaling[name].as_f64().filter(|&x| x > 0.0);
        number.ok_or_else(|| {
            key.refuse(
                &format!("rope_scaling.{name}"),
                "is missing or not a positive number",
            )
        })
    };
    let number_or = |name: &str, usual: f64| match &scaling[name] {
        Value::Null => Ok(usual),
        _ => number(name),
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
        // Phi-3 once called it `su`, and `yarn`
        "longrope" | "su" | "yarn" if kind != "yarn" || family.model_type == "phi3" => {
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
        "yarn" => {
            let factor = number("factor")?;
            let temperature = |slope: f64| match factor > 1.0 {
                true => 0.1 * slope * factor.ln() + 1.0,
                false => 1.0,
            };
            let slopes = ["mscale", "mscale_all_dim"].map(|name| scaling[name].as_f64());
            let usual = match slopes {
                [Some(one), Some(all)] if one != 0.0 && all != 0.0 => {
                    temperature(one) / temperature(all)
                }
                _ => temperature(1.0),
            };
            Scaling::Yarn {
                factor,
                attention: number_or("attention_factor", usual)?,
                fast: number_or("beta_fast", 32.0)?,
                slow: number_or("beta_slow", 1.0)?,
                original: number_or("original_max_position_embeddings", positions_max as f64)?,
                truncate: scaling["truncate"].as_bool().unwrap_or(true),
            }
        }
        "dynamic" => Scaling::Dynamic {
            factor: number("factor")?,
            original: positions_max as f64,
        },
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

    /// Models that no family here could be, by what their configs say beside the type.
    fn refuse_other_kinds(&self) -> Result<()> {
        const EXPERTS: [&str; 4] = [
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ];
        const OTHERS: [(&str, &str); 4] = [
            (
                "quantization_config",
                "says that the weights are quantised: decompose the original checkpoint instead",
            ),
            (
                "vision_config",
                "describes a vision tower beside the language model, and only language models are known",
            ),
            (
                "audio_config",
                "describes an audio tower beside the language model, and only language models are known",
            ),
            (
                "text_config",
                "puts the language model inside another one, and only bare language models are known",
            ),
        ];
        let json = self.json;
        if let Some((key, reason)) = OTHERS.iter().find(|(key, _)| !json[*key].is_null()) {
            return Err(self.refuse(key, reason));
        }
        if let Some(key) = EXPERTS.iter().find(|k| json[**k].as_u64() > Some(1)) {
            let reason = format!(
                "is {}: in a mixture of experts a router chooses the weights of each token, and no such layer is known",
                json[*key]
            );
            return Err(self.refuse(key, &reason));
        }
        if json["use_bidirectional_attention"].as_bool() == Some(true) {
            let reason = "is set: the model looks ahead, and predicts no next token";
            return Err(self.refuse("use_bidirectional_attention", reason));
        }
        Ok(())
    }

    /// The row that `model_type` names.
    fn family(&self) -> Result<&'static Family> {
        let found = self.json["model_type"].as_str().unwrap_or_default();
        if let Some(family) = FAMILIES.iter().find(|f| f.model_type == found) {
            return Ok(family);
        }
        if let Some((_, reason)) = KNOWN_TO_DIFFER.iter().find(|(name, _)| *name == found) {
            return Err(self.refuse("model_type", &format!("is `{found}`, which {reason}")));
        }
        let found = match found {
            "" => self.json["architectures"][0].as_str(),
            named => Some(named),
        };
        let supported: Vec<&str> = FAMILIES.iter().map(|f| f.model_type).collect();
        Err(Error::Architecture {
            path: self.path.into(),
            found: found.unwrap_or("(no model_type)").into(),
            supported: supported.join(", "),
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        match &self.json[key] {
            Value::Null => Ok(None),
            value => match value.as_f64().filter(|x| x.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.refuse(key, &format!("is {value}, not a number"))),
            },
        }
    }

    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(number) if number <= 0.0 => {
                Err(self.refuse(key, &format!("is {number}, not a positive number")))
            }
            number => Ok(number),
        }
    }

    fn cap(&self, key: &str, cap: &Cap) -> Result<Option<f64>> {
        match cap {
            Cap::Never => Ok(None),
            Cap::OrElse(usual) if self.json.get(key).is_none() => Ok(*usual),
            Cap::OrElse(_) => self.positive(key),
        }
    }

    /// Which layers have a window, where the config lists it.
    fn layer_types(&self, layers: usize) -> Result<Option<Vec<bool>>> {
        let listed = match &self.json["layer_types"] {
            Value::Null => return Ok(None),
            Value::Array(types) if types.len() == layers => types,
            _ => {
                let reason = format!("is not a list of {layers} names, one for each layer");
                return Err(self.refuse("layer_types", &reason));
            }
        };
        let windowed = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(self.refuse(
                "layer_types",
                &format!("holds {kind}: full_attention and sliding_attention are known"),
            )),
        };
        let windowed: Result<Vec<bool>> = listed.iter().map(windowed).collect();
        windowed.map(Some)
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
    fn published_models_have_their_number_of_parameters() {
        // gemma-2b, gemma-2-2b, gemma-3-1b, SmolLM3-3B, OLMo-2-1B, pythia-160m: hidden, intermediate, layers, heads,
        // shared heads, head_dim, vocabulary
        let models = [
            (
                "gemma",
                [2048, 16384, 18, 8, 1, 256, 256_000],
                2_506_172_416,
            ),
            (
                "gemma2",
                [2304, 9216, 26, 8, 4, 256, 256_000],
                2_614_341_888,
            ),
            (
                "gemma3_text",
                [1152, 6912, 26, 4, 1, 256, 262_144],
                999_885_952,
            ),
            (
                "smollm3",
                [2048, 11008, 36, 16, 4, 128, 128_256],
                3_075_098_624,
            ),
            (
                "olmo2",
                [2048, 8192, 16, 16, 16, 128, 100_352],
                1_484_916_736,
            ),
            ("gpt_neox", [768, 3072, 12, 12, 12, 64, 50_304], 162_322_944),
        ];
        for (family, sides, parameters) in models {
            let [
                hidden,
                intermediate,
                layers,
                heads,
                shared,
                head_dim,
                vocabulary,
            ] = sides;
            let config = parse(json!({"model_type": family, "hidden_size": hidden, "intermediate_size": intermediate,
                "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": shared,
                "head_dim": head_dim, "vocab_size": vocabulary}))
            .expect("parses");
            let tensors = config.tensors(config.names.prefix);
            let counted: usize = tensors
                .iter()
                .map(|(_, s)| s.iter().product::<usize>())
                .sum();
            assert_eq!(counted, parameters, "{family}");
        }
    }

    #[test]
    fn both_spellings_of_rope_parameters_are_read() {
        let mut old = llama();
        old["rope_theta"] = 5e5.into();
        old["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
        let mut new = llama();
        new["rope_parameters"] = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5});
        let (old, new) = (parse(old).expect("parses"), parse(new).expect("parses"));
        assert_eq!(old.ropes, new.ropes);
        assert_eq!(old.ropes[0].scaling, Scaling::Linear { factor: 4.0 });
    }

    #[test]
    fn what_a_family_leaves_out_is_what_transformers_takes() {
        let with = |family: &str, more: Value| {
            let mut config = llama();
            config["model_type"] = family.into();
            config
                .as_object_mut()
                .expect("an object")
                .remove("tie_word_embeddings");
            for (key, value) in more.as_object().expect("an object") {
                config[key] = value.clone();
            }
            parse(config).expect("parses")
        };
        let gemma = with("gemma2", json!({}));
        assert!(gemma.tied && gemma.head_dim == 256);
        assert_eq!(
            (gemma.attention_cap, gemma.logits_cap),
            (Some(50.0), Some(30.0))
        );
        assert_eq!(gemma.attention_scale, 1.0 / 16.0);
        assert_eq!(gemma.activation, Activation::GeluTanh);
        let windows = |c: &ModelConfig| c.attention.iter().map(|a| a.window).collect::<Vec<_>>();
        assert_eq!(windows(&gemma), [Some(4096), None]);
        // null is not absent
        let uncapped = json!({"attn_logit_softcapping": null, "final_logit_softcapping": null});
        let uncapped = with("gemma2", uncapped);
        assert_eq!((uncapped.attention_cap, uncapped.logits_cap), (None, None));
        let off = with("qwen2", json!({"sliding_window": 5}));
        assert_eq!(windows(&off), [None, None]);
        let smollm = with("smollm3", json!({"num_hidden_layers": 4}));
        assert!(smollm.tied);
        assert_eq!(
            smollm.attention.iter().map(|a| a.rope).collect::<Vec<_>>(),
            [Some(0), Some(0), Some(0), None]
        );
    }

    #[test]
    fn ropes_of_two_kinds_of_layers_are_read_in_both_spellings() {
        let mut old = llama();
        old["model_type"] = "gemma3_text".into();
        old["sliding_window_pattern"] = 2.into();
        old["sliding_window"] = 9.into();
        let mut new = old.clone();
        old["rope_theta"] = 5e5.into();
        old["rope_local_base_freq"] = 300.0.into();
        old["rope_scaling"] = json!({"rope_type": "linear", "factor": 4.0});
        new["rope_parameters"] = json!({
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}});
        let (old, new) = (parse(old).expect("parses"), parse(new).expect("parses"));
        assert_eq!(old, new);
        assert_eq!(old.ropes[1].theta, 300.0);
        assert_eq!(old.ropes[1].scaling, Scaling::None);
        let seen: Vec<_> = old.attention.iter().map(|a| (a.window, a.rope)).collect();
        assert_eq!(seen, [(Some(9), Some(1)), (None, Some(0))]);
    }

    #[test]
    fn unknown_ropes_and_activations_are_left_to_training() {
        let mut config = llama();
        config["rope_scaling"] = json!({"rope_type": "spiral", "factor": 4.0});
        config["hidden_act"] = "relu2".into();
        let parsed = parse(config).expect("a plan does not need them");
        assert_eq!(
            parsed.ropes[0].scaling,
            Scaling::Unsupported("spiral".into())
        );
        assert_eq!(parsed.activation, Activation::Unsupported("relu2".into()));
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
            ("num_experts", json!(64), "mixture of experts"),
            ("num_local_experts", json!(8), "mixture of experts"),
            ("n_routed_experts", json!(256), "mixture of experts"),
            ("vision_config", json!({}), "vision tower"),
            ("text_config", json!({}), "inside another"),
            ("model_type", json!("gpt2"), "transposed"),
            ("use_bidirectional_attention", json!(true), "looks ahead"),
            ("rms_norm_eps", json!("small"), "not a number"),
        ] {
            let mut config = llama();
            config[key] = value;
            let error = parse(config).expect_err(key).to_string();
            assert!(error.contains(word), "{key}: {error}");
        }
        for (family, key, value, word) in [
            ("qwen3", "layer_types", json!(["full_attention"]), "2 names"),
            (
                "qwen3",
                "layer_types",
                json!(["full_attention", "linear_attention"]),
                "linear_attention",
            ),
            ("smollm3", "no_rope_layers", json!([1]), "2 numbers"),
            ("gemma2", "query_pre_attn_scalar", json!(-1.0), "positive"),
            ("gemma2", "final_logit_softcapping", json!(0), "positive"),
            ("granite", "logits_scaling", json!(0.0), "positive"),
        ] {
            let mut config = llama();
            config["model_type"] = family.into();
            config["use_sliding_window"] = true.into();
            config[key] = value;
            let error = parse(config).expect_err(key).to_string();
            assert!(
                error.contains(key) && error.contains(word),
                "{key}: {error}"
            );
        }
    }
}
