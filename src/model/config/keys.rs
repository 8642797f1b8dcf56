//! One key of a config at a time, and what is wrong with it.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::family::{Cap, FAMILIES, Family, KNOWN_TO_DIFFER};

/// The longest side: far beyond any model, and the bits of a matrix with two such sides still count in 64.
pub const SIDE_MAX: usize = 1 << 28;

/// The most layers: each has tensors with names, from a config of a few hundred bytes.
pub const LAYERS_MAX: u64 = 4096;

/// The most parameters: some hundred times those of the largest model, and sums of their bytes still count in 64 bits.
pub const PARAMETERS_MAX: u128 = 1 << 48;

/// Reads keys of one config and names them when they are wrong.
pub struct Keys<'a> {
    pub path: &'a Path,
    pub json: &'a Value,
}

impl Keys<'_> {
    pub fn refuse(&self, key: &str, reason: &str) -> Error {
        Error::Config {
            path: self.path.into(),
            key: key.into(),
            reason: reason.into(),
        }
    }

    pub fn beyond(&self, key: &str, value: &Value) -> Error {
        self.refuse(key, &format!("is {value}, which no model has"))
    }

    /// Models that no family here could be, by what their configs say beside the type.
    pub fn refuse_other_kinds(&self) -> Result<()> {
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
        let ahead = [("use_bidirectional_attention", true), ("is_causal", false)];
        for (key, looks) in ahead {
            if json[key].as_bool() == Some(looks) {
                let reason =
                    format!("is {looks}: the model looks ahead, and predicts no next token");
                return Err(self.refuse(key, &reason));
            }
        }
        Ok(())
    }

    /// What is read where it has the right type, and would be taken for missing where it has another.
    pub fn refuse_wrong_types(&self) -> Result<()> {
        type Kind = (&'static str, fn(&Value) -> bool, &'static [&'static str]);
        const TYPES: [Kind; 4] = [
            (
                "a number",
                Value::is_number,
                &[
                    "rope_theta",
                    "rotary_emb_base",
                    "partial_rotary_factor",
                    "rotary_pct",
                    "original_max_position_embeddings",
                    "factor",
                    "attention_factor",
                    "mscale",
                    "mscale_all_dim",
                ],
            ),
            (
                "true or false",
                Value::is_boolean,
                &[
                    "attention_bias",
                    "mlp_bias",
                    "tie_word_embeddings",
                    "use_sliding_window",
                    "use_parallel_residual",
                    "truncate",
                ],
            ),
            (
                "a text",
                Value::is_string,
                &["hidden_act", "hidden_activation", "rope_type", "type"],
            ),
            (
                "an object",
                Value::is_object,
                &[
                    "rope_scaling",
                    "rope_parameters",
                    "full_attention",
                    "sliding_attention",
                ],
            ),
        ];
        let mut objects = vec![(String::new(), self.json)];
        while let Some((path, object)) = objects.pop() {
            for (what, fits, keys) in TYPES {
                for key in keys {
                    let value = &object[key];
                    if !(value.is_null() || fits(value)) {
                        let key = format!("{path}{key}");
                        return Err(self.refuse(&key, &format!("is {value}, not {what}")));
                    }
                    // the keys of a rope lie in one of these
                    if value.is_object() {
                        objects.push((format!("{path}{key}."), value));
                    }
                }
            }
        }
        let ids = &self.json["eos_token_id"];
        let listed = ids.as_array();
        let are_tokens = listed.map_or(ids.is_number(), |ids| ids.iter().all(Value::is_number));
        if !ids.is_null() && !are_tokens {
            return Err(self.refuse(
                "eos_token_id",
                &format!("is {ids}, not a token or a list of them"),
            ));
        }
        Ok(())
    }

    /// The row that `model_type` names.
    pub fn family(&self) -> Result<&'static Family> {
        let found = match &self.json["model_type"] {
            Value::Null => return Err(self.refuse("model_type", "is missing: it names the family")),
            named => named.as_str().unwrap_or_default(),
        };
        if let Some(family) = FAMILIES.iter().find(|f| f.model_type == found) {
            return Ok(family);
        }
        if let Some((_, reason)) = KNOWN_TO_DIFFER.iter().find(|(name, _)| *name == found) {
            return Err(self.refuse("model_type", &format!("is `{found}`, which {reason}")));
        }
        let supported: Vec<&str> = FAMILIES.iter().map(|f| f.model_type).collect();
        Err(Error::Architecture {
            path: self.path.into(),
            found: found.into(),
            supported: supported.join(", "),
        })
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match &self.json[key] {
            Value::Null => Ok(None),
            value => match value.as_f64().filter(|x| x.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.refuse(key, &format!("is {value}, not a number"))),
            },
        }
    }

    pub fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(number) if number <= 0.0 => {
                Err(self.refuse(key, &format!("is {number}, not a positive number")))
            }
            number => Ok(number),
        }
    }

    pub fn not_negative(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(number) if number < 0.0 => Err(self.refuse(key, &format!("is {number}, below 0"))),
            number => Ok(number),
        }
    }

    pub fn cap(&self, key: &str, cap: &Cap) -> Result<Option<f64>> {
        match cap {
            Cap::Never => Ok(None),
            Cap::OrElse(usual) if self.json.get(key).is_none() => Ok(*usual),
            Cap::OrElse(_) => self.positive(key),
        }
    }

    /// Which layers have a window, where the config lists it.
    pub fn layer_types(&self, layers: usize) -> Result<Option<Vec<bool>>> {
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

    pub fn optional(&self, key: &str) -> Result<Option<usize>> {
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

    pub fn count(&self, key: &str) -> Result<usize> {
        self.optional(key)?
            .ok_or_else(|| self.refuse(key, "is missing"))
    }
}
