//! What the decoder does not know is refused by name, before a tensor is read.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};
use serde_json::{Value, json};

use svdhub::model::{Decoder, ModelConfig, Trained};

use crate::memory::Memory;

#[test]
fn unknown_activations_and_ropes_are_named() {
    for (key, value, words) in [
        ("hidden_act", json!("relu2"), ["`hidden_act`", "relu2"]),
        (
            "rope_scaling",
            json!({"rope_type": "spiral", "factor": 4.0}),
            ["`rope_scaling`", "spiral"],
        ),
    ] {
        let mut config = json!({"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 8});
        let load = |config: &Value| {
            let config = ModelConfig::parse(Path::new("config.json"), config).expect("parses");
            let memory = Memory {
                tensors: BTreeMap::new(),
                factors: None,
            };
            let trained = Trained::default();
            let loaded = Decoder::load(&config, &memory, trained, &Device::Cpu, DType::F32);
            loaded.err().expect("refused").to_string()
        };
        assert!(load(&config).contains("embed_tokens") || load(&config).contains("_proj"));
        config[key] = value;
        let error = load(&config);
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}
