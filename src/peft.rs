//! The files of a LoRA as PEFT reads and writes them: W = M + (α/r)·B·A with B (m, r) and A (r, n).

mod adapter;

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use crate::error::Result;
use crate::event::Observer;
use crate::format::Pin;
use crate::model::ModelConfig;
use crate::plan::place;
use crate::weights::Entry;
use crate::weights::shard::write_atomically;

pub use adapter::LoraAdapter;

/// What PEFT looks for in a directory: with these it is a LoRA adapter.
pub const LORA_CONFIG: &str = "adapter_config.json";
pub const LORA_WEIGHTS: &str = "adapter_model.safetensors";

/// What PEFT puts before every name in a model for generation.
const PREFIX: &str = "base_model.model.";

/// The names of A and B of a module, by its name in the model.
pub struct Names {
    pub a: String,
    pub b: String,
}

impl Names {
    pub fn of(module: &str) -> Self {
        Self {
            a: format!("{PREFIX}{module}.lora_A.weight"),
            b: format!("{PREFIX}{module}.lora_B.weight"),
        }
    }
}

/// The name of a tensor that is carried whole, by its name in the model.
pub fn saved_name(tensor: &str) -> String {
    format!("{PREFIX}{tensor}")
}

/// How the names of a checkpoint become those of a model for generation: some were saved from the model inside, and go
/// without its prefix.
#[derive(Debug, Clone, Copy)]
pub struct Naming {
    /// What the checkpoint leaves out, but for the head.
    left_out: &'static str,
    head: &'static str,
}

impl Naming {
    /// Of a checkpoint that `has` tensors.
    pub fn of(config: &ModelConfig, has: impl Fn(&str) -> bool) -> Self {
        let names = config.names;
        Self {
            left_out: match config.prefix(has) {
                "" => names.prefix,
                _ => "",
            },
            head: names.head,
        }
    }

    /// By a name in the checkpoint.
    pub fn in_model(&self, name: &str) -> String {
        match name.starts_with(self.head) {
            true => name.into(),
            false => format!("{}{name}", self.left_out),
        }
    }

    /// By a name in the model.
    pub fn in_checkpoint<'a>(&self, name: &'a str) -> &'a str {
        name.strip_prefix(self.left_out).unwrap_or(name)
    }
}

/// The ranks that vLLM's `--max-lora-rank` offers (`MaxLoRARanks` of its `config/lora.py`, 2026-11; its 1 is left out:
/// older releases begin at 8). An adapter of one of these fills what the engine sets aside for it.
pub const SERVED_RANKS: [usize; 8] = [8, 16, 32, 64, 128, 256, 320, 512];

pub const SERVED_RANK_MAX: usize = SERVED_RANKS[SERVED_RANKS.len() - 1];

/// What whoever loads a LoRA has to expect.
pub struct Expected<'a> {
    pub rank: usize,
    /// Trained norms that are carried whole.
    pub norms: usize,
    /// A head that has an update of its own, and is the embedding in the base.
    pub untied: Option<&'a str>,
    pub base: &'a Pin,
}

impl Expected<'_> {
    pub fn say(&self, observer: &dyn Observer) {
        if self.rank > SERVED_RANK_MAX {
            observer.warn(format!(
                "rank {} is more than serving engines take: vLLM's --max-lora-rank ends at {SERVED_RANK_MAX}",
                self.rank
            ));
        }
        if self.norms > 0 {
            observer.warn(format!(
                "{} trained norms are in modules_to_save: PEFT applies them, vLLM refuses such an adapter. \
                 Merge instead, or train without norms",
                self.norms
            ));
        }
        if let Some(head) = self.untied {
            observer.warn(format!(
                "`{head}` is the embedding in the base: PEFT adds B·A to the head alone as long as it is not merged, \
                 but its merge_and_unload() would move the embedding too. For a merged model use `svdhub merge`"
            ));
        }
        if self.base.repo.is_none() {
            observer.note(
                "the base was a local directory, so base_model_name_or_path is left empty: load it, then the adapter onto it"
                    .into(),
            );
        }
    }
}

/// The names by which PEFT finds exactly some modules, each given as (name in the checkpoint, name in the model): the last
/// part of a name where it means no other linear layer of the checkpoint, whole names otherwise.
pub fn target_modules<'a>(
    entries: impl Iterator<Item = &'a Entry>,
    modules: &[(&str, &str)],
) -> Vec<String> {
    let wanted: BTreeSet<&str> = modules.iter().map(|(module, _)| *module).collect();
    let elsewhere: BTreeSet<&str> = entries
        // whatever is a matrix may be a linear layer
        .filter(|entry| entry.shape.len() == 2)
        .filter_map(|entry| entry.name.strip_suffix(".weight"))
        .filter(|module| !wanted.contains(module))
        .map(|module| place(module).1)
        .collect();
    let targets: BTreeSet<&str> = modules
        .iter()
        .map(|&(module, name)| match place(module).1 {
            part if elsewhere.contains(part) => name,
            part => part,
        })
        .collect();
    targets.into_iter().map(String::from).collect()
}

/// What `adapter_config.json` says.
pub struct Config<'a> {
    /// Its repository and revision are named; a local directory is nobody else's business.
    pub base: &'a Pin,
    /// r
    pub rank: usize,
    /// PEFT multiplies by α/r.
    pub alpha: usize,
    pub target_modules: &'a [String],
    pub modules_to_save: &'a [String],
}

impl Config<'_> {
    /// Writes it, with keys that PEFT 0.11 knows: it refuses others.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let saved = Some(self.modules_to_save).filter(|saved| !saved.is_empty());
        let config = json!({
            "peft_type": "LORA",
            "auto_mapping": null,
            "base_model_name_or_path": self.base.repo,
            "revision": self.base.revision,
            "task_type": "CAUSAL_LM",
            "inference_mode": true,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": false,
            "use_dora": false,
            "init_lora_weights": true,
            "target_modules": self.target_modules,
            "modules_to_save": saved,
            "rank_pattern": {},
            "alpha_pattern": {},
            "layers_to_transform": null,
            "layers_pattern": null,
        });
        let config = serde_json::to_vec_pretty(&config).expect("a JSON value serialises");
        write_atomically(&dir.join(LORA_CONFIG), &config).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_of_the_inner_model_is_named_as_the_whole_one() {
        for (family, module, name, head) in [
            (
                "llama",
                "layers.0.mlp.up_proj",
                "model.layers.0.mlp.up_proj",
                "lm_head",
            ),
            (
                "gpt_neox",
                "layers.0.mlp.dense_h_to_4h",
                "gpt_neox.layers.0.mlp.dense_h_to_4h",
                "embed_out",
            ),
        ] {
            let config = json!({"model_type": family, "hidden_size": 8, "num_attention_heads": 2,
                "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8});
            let config = ModelConfig::parse(Path::new("config.json"), &config).expect("parses");
            let inner = Naming::of(&config, |tensor| tensor == config.embedding(""));
            assert_eq!(inner.in_model(module), name);
            assert_eq!(inner.in_checkpoint(name), module);
            assert_eq!(inner.in_model(head), head);
            let whole = Naming::of(&config, |tensor| {
                tensor == config.embedding(config.names.prefix)
            });
            assert_eq!(whole.in_model(name), name);
            assert_eq!(whole.in_checkpoint(name), name);
        }
    }
}
