//! Models of known shapes whose numbers are random: a step costs what theirs costs.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::{Value, json};
use svdhub::weights::Dtype;

use crate::Result;
use crate::synthetic::write_model;

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shapes {
    #[value(name = "phi-3-mini")]
    Phi3Mini,
    #[value(name = "llama-3.2-1b")]
    Llama32,
    #[value(name = "smollm2-135m")]
    SmolLm2,
}

/// Whose tokenizer reads the text: its ids are in every vocabulary.
const TOKENIZER: &str = "fixtures/shakespeare-1m";

impl Shapes {
    /// As the models' own `config.json` say.
    fn config(self) -> Value {
        match self {
            Self::Phi3Mini => json!({
                "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072,
                "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": false,
                "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096, "sliding_window": 2047, "pad_token_id": 32000,
            }),
            Self::Llama32 => json!({
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048,
                "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": true,
                "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 131_072,
            }),
            Self::SmolLm2 => json!({
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576,
                "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": true,
                "rms_norm_eps": 1e-5, "rope_theta": 100_000.0, "max_position_embeddings": 8192,
            }),
        }
    }

    /// Writes a model of these shapes in bf16, with so many of its layers.
    pub fn write(self, layers: Option<usize>, dir: &Path) -> Result<PathBuf> {
        let mut config = self.config();
        if let Some(layers) = layers {
            config["num_hidden_layers"] = layers.into();
        }
        write_model(&config, Dtype::BF16, false, dir)?;
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let from = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join(TOKENIZER)
                .join(file);
            if from.exists() {
                std::fs::copy(from, dir.join(file))?;
            }
        }
        Ok(dir.into())
    }
}
