//! `config.json` as the decoder and the plan understand it.

mod attention;
mod keys;

use std::path::{Path, PathBuf};

use serde_json::Value;

use attention::{attention, ropes};
use keys::{Keys, PARAMETERS_MAX, SIDE_MAX};

use super::family::{
    Activation, AttentionScale, Biases, EmbeddingScale, Names, NormKind, NormPlaces, Projections,
    QueryKeyNorm,
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
        key.refuse_wrong_types()?;
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
        let kv_heads = match json.get("num_key_value_heads") {
            None => family.kv_heads,
            Some(_) => key.optional("num_key_value_heads")?,
        };
        let kv_heads = kv_heads.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(key.refuse(
                "num_key_value_heads",
                &format!("is {kv_heads}, which does not divide the {heads} attention heads"),
            ));
        }
        let layers = key.count("num_hidden_layers")?;
        let positions_max = key.optional("max_position_embeddings")?;
        let positions_max = positions_max.unwrap_or(family.positions_max);
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
            norm_eps: key
                .not_negative(family.norm_eps.0)?
                .unwrap_or(family.norm_eps.1),
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

    /// Projections of one input that a GPU computes as one, with the outputs of all of them: what comes out of one product is
    /// used as it lies there, unless a norm stands in between.
    pub fn stacked_on_gpu(&self) -> impl Iterator<Item = (&'static [&'static str], usize)> {
        let (query, key) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let turned = self.query_key_norm == QueryKeyNorm::None;
        [
            (self.names.query_key_value, query + 2 * key, turned),
            (self.names.gate_up, 2 * self.intermediate, self.gated),
        ]
        .into_iter()
        .filter_map(|(projections, side, suits)| match projections {
            Projections::Apart(parts) if suits => Some((parts, side)),
            _ => None,
        })
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
    fn a_scaling_beside_the_parameters_of_transformers_5_takes_their_place() {
        let scaled = |model_type: &str, scaling: Value, parameters: Value| {
            let mut config = llama();
            config["model_type"] = model_type.into();
            config["rope_scaling"] = scaling;
            config["rope_parameters"] = parameters;
            parse(config)
        };
        let linear = json!({"rope_type": "linear", "factor": 4.0});
        let kept = json!({"rope_type": "default", "rope_theta": 1e4});
        let rope = scaled("llama", linear.clone(), kept.clone())
            .expect("parses")
            .ropes[0]
            .clone();
        assert_eq!(rope.scaling, Scaling::Linear { factor: 4.0 });
        // an empty one is none
        let rope = scaled("llama", json!({}), linear.clone())
            .expect("parses")
            .ropes[0]
            .clone();
        assert_eq!(rope.scaling, Scaling::Linear { factor: 4.0 });
        let other = json!({"rope_type": "default", "rope_theta": 5e5});
        let rope = scaled("llama", linear.clone(), other)
            .expect("two thetas")
            .ropes[0]
            .clone();
        assert!(matches!(rope.scaling, Scaling::Unsupported(why) if why.contains("rope_theta")));
        // of two kinds of layers, those without a window
        let both = json!({"sliding_attention": {"rope_theta": 77.0}});
        let mut gemma = llama();
        gemma["model_type"] = "gemma3_text".into();
        gemma["rope_parameters"] = both;
        gemma["rope_scaling"] = linear;
        let ropes = parse(gemma.clone()).expect("parses").ropes;
        assert_eq!(ropes[0].scaling, Scaling::Linear { factor: 4.0 });
        assert_eq!((ropes[0].theta, ropes[1].theta), (1e6, 77.0));
        // one for two kinds of layers is told from none
        gemma["rope_scaling"] = Value::Null;
        gemma["rope_parameters"] = kept;
        let ropes = parse(gemma.clone()).expect("can be decomposed").ropes;
        assert!(matches!(ropes[1].scaling, Scaling::Unsupported(_)));
        gemma["rope_parameters"] = json!({});
        assert_eq!(
            parse(gemma).expect("parses").ropes[1].scaling,
            Scaling::None
        );
    }

    #[test]
    fn ropes_that_readers_differ_about_are_not_trained() {
        for (model_type, key, value) in [
            ("llama", "partial_rotary_factor", json!(0.5)),
            (
                "qwen3",
                "rope_scaling",
                json!({"rope_type": "yarn", "type": "linear", "factor": 2.0}),
            ),
            (
                "llama",
                "rope_scaling",
                json!({"rope_type": "longrope", "short_factor": [1, 1, 1, 1],
                "long_factor": [2, 2, 2, 2], "original_max_position_embeddings": 32}),
            ),
        ] {
            let mut config = llama();
            config["model_type"] = model_type.into();
            config[key] = value;
            let rope = parse(config).expect("can be decomposed").ropes[0].clone();
            assert!(
                matches!(rope.scaling, Scaling::Unsupported(_)),
                "{key}: {rope:?}"
            );
        }
        let mut phi = llama();
        phi["model_type"] = "phi3".into();
        phi["partial_rotary_factor"] = json!(0.75);
        assert_eq!(parse(phi).expect("parses").ropes[0].dim, 6);
    }

    #[test]
    fn listed_windows_need_no_switch_where_the_switch_only_lists_them() {
        let windows = |model_type: &str, types: Value| {
            let mut config = llama();
            config["model_type"] = model_type.into();
            config["sliding_window"] = json!(9);
            config["layer_types"] = types;
            let layers = parse(config).expect("parses").attention;
            layers.iter().map(|layer| layer.window).collect::<Vec<_>>()
        };
        let listed = json!(["sliding_attention", "full_attention"]);
        assert_eq!(windows("smollm3", listed.clone()), [Some(9), None]);
        assert_eq!(windows("smollm3", Value::Null), [None, None]);
        assert_eq!(windows("qwen3", listed), [None, None]);
        // a family without windows reads no list of them
        assert_eq!(windows("llama", json!(["odd"])), [None, None]);
    }

    #[test]
    fn a_gpu_stacks_what_no_norm_follows() {
        let stacked = |model_type: &str| -> Vec<(Vec<&str>, usize)> {
            let mut config = llama();
            config["model_type"] = model_type.into();
            let parsed = parse(config).expect("parses");
            let all = parsed.stacked_on_gpu().map(|(parts, side)| {
                let ends = parts.iter().map(|part| part.rsplit('.').next());
                (ends.map(|end| end.expect("a name")).collect(), side)
            });
            all.collect()
        };
        let attention = (vec!["q_proj", "k_proj", "v_proj"], 64 + 2 * 32);
        let mlp = (vec!["gate_proj", "up_proj"], 2 * 172);
        assert_eq!(stacked("llama"), [attention, mlp.clone()]);
        // norms of queries and keys; and what is stacked already
        assert_eq!(stacked("qwen3"), [mlp]);
        assert_eq!(stacked("phi3"), []);
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

    /// As transformers 4.57 fills them in.
    #[test]
    fn what_a_config_leaves_out_is_its_familys() {
        let with = |family: &str, values: Value| {
            let mut config = llama();
            config["model_type"] = family.into();
            config["num_attention_heads"] = 8.into();
            config["head_dim"] = 8.into();
            config["num_hidden_layers"] = 3.into();
            let object = config.as_object_mut().expect("an object");
            for absent in ["num_key_value_heads", "max_position_embeddings"] {
                object.remove(absent);
            }
            for (key, value) in values.as_object().expect("an object") {
                object.insert(key.clone(), value.clone());
            }
            parse(config).expect("parses")
        };
        let mistral = with("mistral", json!({}));
        assert_eq!((mistral.kv_heads, mistral.positions_max), (8, 131_072));
        assert_eq!(with("gemma2", json!({})).kv_heads, 4);
        assert_eq!(with("llama", json!({})).kv_heads, 8);
        assert_eq!(
            with("smollm3", json!({"num_key_value_heads": null})).kv_heads,
            8
        );

        // a Mistral that lists its layers is a Ministral
        let types = ["full_attention", "sliding_attention", "full_attention"];
        let listed = json!({"sliding_window": 5, "layer_types": types});
        let windows = |config: &ModelConfig| -> Vec<Option<usize>> {
            config.attention.iter().map(|a| a.window).collect()
        };
        for family in ["mistral", "ministral"] {
            assert_eq!(
                windows(&with(family, listed.clone())),
                [None, Some(5), None]
            );
            let all = with(family, json!({"sliding_window": 5}));
            assert_eq!(windows(&all), [Some(5); 3]);
        }
        assert_eq!(windows(&with("phi3", listed)), [Some(5); 3]);
        let period = json!({"sliding_window": 5, "sliding_window_pattern": 3});
        assert_eq!(
            windows(&with("gemma2", period.clone())),
            [Some(5), None, Some(5)]
        );
        assert_eq!(
            windows(&with("gemma3_text", period)),
            [Some(5), Some(5), None]
        );

        let long =
            json!({"type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2]});
        let phi = with(
            "phi3",
            json!({"max_position_embeddings": 8192, "rope_scaling": long}),
        );
        let Scaling::LongRope { original, .. } = phi.ropes[0].scaling else {
            panic!("{:?}", phi.ropes);
        };
        assert_eq!(original, 4096);
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
    fn a_longrope_without_its_first_length_says_itself_how_far_it_is_stretched() {
        let mut config = llama();
        let head_dim = parse(llama()).expect("parses").head_dim;
        let factors = vec![1.0; head_dim / 2];
        config["max_position_embeddings"] = 64.into();
        config["rope_scaling"] = json!({"rope_type": "longrope", "factor": 4.0, "short_factor": factors,
            "long_factor": factors});
        let rope = parse(config).expect("parses").ropes.remove(0);
        let Scaling::LongRope {
            original,
            attention,
            ..
        } = rope.scaling
        else {
            panic!("{rope:?}");
        };
        // transformers 4.57, _compute_longrope_parameters
        let wanted = (1.0 + 4f64.ln() / 64f64.ln()).sqrt();
        assert!(
            original == 64 && (attention - wanted).abs() < 1e-15,
            "{attention}"
        );
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
            ("rope_theta", json!(0.0), "rope_theta"),
            ("rope_theta", json!(-1e4), "rope_theta"),
            (
                "rope_scaling",
                json!({"type": "longrope", "original_max_position_embeddings": 1}),
                "too few",
            ),
            ("rope_theta", json!("500000"), "not a number"),
            (
                "rope_parameters",
                json!({"rope_theta": "7"}),
                "`rope_parameters.rope_theta` is \"7\", not a number",
            ),
            ("rope_scaling", json!("linear"), "not an object"),
            ("hidden_act", json!(5), "not a text"),
            ("attention_bias", json!("no"), "not true or false"),
            ("tie_word_embeddings", json!("yes"), "not true or false"),
            ("eos_token_id", json!("x"), "not a token"),
            ("rms_norm_eps", json!(-1), "below 0"),
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
