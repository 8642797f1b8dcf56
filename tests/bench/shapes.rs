//! Models of known shapes whose numbers are random: a step costs what theirs costs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use half::bf16;
use ndarray::{Array1, Array2};
use serde_json::{Value, json};
use svdhub::Error;
use svdhub::model::{ModelConfig, Tensors};
use svdhub::split::{Change, Factors};
use svdhub::weights::{Dtype, Elements};

use crate::Result;
use crate::random::SplitMix;

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shapes {
    #[value(name = "phi-3-mini")]
    Phi3Mini,
    #[value(name = "llama-3.2-1b")]
    Llama32,
    #[value(name = "smollm2-135m")]
    SmolLm2,
}

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

    /// Writes the config of these shapes, with so many of the layers: all that a model of random numbers needs.
    pub fn write(self, layers: Option<usize>, dir: &Path) -> Result<()> {
        let mut config = self.config();
        if let Some(layers) = layers {
            config["num_hidden_layers"] = layers.into();
        }
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
        Ok(())
    }
}

/// A decomposed model in bf16 whose numbers are drawn as they are asked for, so that nothing is read or decomposed.
pub struct Drawn {
    shapes: HashMap<String, Vec<usize>>,
    /// Normal numbers, of which every tensor takes a run: as vectors have them, and as weights do, in bf16.
    normal: Vec<f32>,
    weights: Vec<u8>,
    rank_fraction: f64,
    tied: bool,
}

/// The usual deviation of a weight before training.
const DEVIATION: f32 = 0.02;

impl Drawn {
    pub fn new(config: &ModelConfig, rank_fraction: f64) -> Self {
        let mut random = SplitMix(7);
        let normal: Vec<f32> = (0..1 << 20).map(|_| random.normal() as f32).collect();
        let weights = normal.iter().map(|x| bf16::from_f32(DEVIATION * x));
        Self {
            shapes: config.tensors("model.").into_iter().collect(),
            weights: weights.flat_map(bf16::to_le_bytes).collect(),
            normal,
            rank_fraction,
            tied: config.tied,
        }
    }

    fn shape(&self, name: &str) -> svdhub::Result<&Vec<usize>> {
        self.shapes.get(name).ok_or_else(|| Error::TensorMissing {
            tensor: name.into(),
            path: self.path_of(name),
        })
    }
}

/// So many numbers, from a place that the name decides on.
fn run<T: Clone>(name: &str, numbers: &[T], count: usize) -> Vec<T> {
    let hash = name
        .bytes()
        .fold(7, |at, byte| (at * 31 + usize::from(byte)) % 65_521);
    let mut run = Vec::with_capacity(count);
    run.extend_from_slice(&numbers[2 * hash..][..count.min(numbers.len() - 2 * hash)]);
    while run.len() < count {
        let left = count - run.len();
        run.extend_from_slice(&numbers[..left.min(numbers.len())]);
    }
    run
}

impl Tensors for Drawn {
    fn tensor(&self, name: &str) -> svdhub::Result<Elements> {
        let shape = self.shape(name)?.clone();
        let count: usize = shape.iter().product();
        let bytes = match shape.len() {
            1 => [bf16::ONE.to_le_bytes()].repeat(count).concat(),
            _ => run(name, &self.weights, 2 * count),
        };
        Ok(Elements {
            dtype: Dtype::BF16,
            shape,
            bytes,
        })
    }

    fn spectrum(&self, module: &str) -> svdhub::Result<Option<(Factors, Change)>> {
        if self.tied && module == "lm_head" {
            return Ok(None);
        }
        let &[m, n] = &self.shape(&format!("{module}.weight"))?[..] else {
            return Ok(None);
        };
        let q = (self.rank_fraction * m.min(n) as f64) as usize;
        let vectors = |side: &str, n: usize| {
            let numbers = run(&format!("{module}.{side}"), &self.normal, q * n);
            let rows = Array2::from_shape_vec((q, n), numbers).expect("q rows of n");
            rows / (n as f32).sqrt()
        };
        let factors = Factors {
            u: vectors("u", m),
            sigma: Array1::ones(q),
            v: vectors("v", n),
        };
        Ok(Some((factors, Change::of_sigma(vec![0.0; q]))))
    }

    fn has(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    fn path_of(&self, _name: &str) -> PathBuf {
        "random numbers".into()
    }
}
