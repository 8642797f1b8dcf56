//! Against candle-transformers' decoders.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models as theirs;
use serde_json::{Value, json};

use svdhub::generate::choice::likeliest;
use svdhub::generate::go_on;
use svdhub::model::{Decoder, ModelConfig, Trained};
use svdhub::plan::{Role, role};
use svdhub::weights::Elements;

use crate::differences::assert_gradients;
use crate::generation::greedy;
use crate::memory::Memory;

const LENGTH: usize = 24;

fn config(family: &str, more: Value) -> Value {
    let mut config = json!({"model_type": family, "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false});
    for (key, value) in more.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

fn ids() -> Tensor {
    let ids: Vec<u32> = (0..LENGTH as u32)
        .map(|i| (i * i * 7 + i * 3 + 1) % 32)
        .collect();
    Tensor::from_vec(ids, (1, LENGTH), &Device::Cpu).expect("ids")
}

/// The logits of the last of some tokens, read at once.
type Theirs = Box<dyn FnMut(&Tensor) -> candle_core::Result<Tensor>>;

/// Builds the other decoder on random weights, and ours on the same ones.
fn against(
    config: &Value,
    build: impl FnOnce(VarBuilder, &VarMap) -> candle_core::Result<Theirs>,
) -> (Memory, Vec<f32>) {
    let variables = VarMap::new();
    let mut theirs = build(
        VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu),
        &variables,
    )
    .expect("their decoder builds");
    let mut their_logits = |ids: &Tensor| -> Vec<f32> {
        let logits = theirs(ids).and_then(|l| l.flatten_all()?.to_vec1());
        logits.expect("their decoder runs")
    };
    let logits = their_logits(&ids());
    let tensors = variables
        .data()
        .lock()
        .expect("variables")
        .iter()
        .map(|(name, v)| {
            let values: Vec<f32> = v.flatten_all().and_then(|t| t.to_vec1()).expect("values");
            (name.clone(), Elements::from_f32(v.dims(), &values))
        })
        .collect();
    let memory = Memory {
        tensors,
        factors: None,
    };
    let parsed = ModelConfig::parse(Path::new("config.json"), config).expect("parses");
    let decoder = Decoder::load(
        &parsed,
        &memory,
        Trained::default(),
        &Device::Cpu,
        DType::F32,
    )
    .expect("loads");
    let ours = decoder
        .logits(&ids())
        .and_then(|l| Ok(l.get(0)?.get(LENGTH - 1)?.to_vec1::<f32>()?))
        .expect("our decoder runs");
    let last = &logits[logits.len() - 32..];
    let worst = ours
        .iter()
        .zip(last)
        .fold(0f32, |w, (a, b)| w.max((a - b).abs()));
    assert!(last.iter().any(|x| x.abs() > 0.1), "the logits are alive");
    assert!(worst < 2e-5, "{} is {worst:.1e} off", config["model_type"]);

    // ours goes on from what it has read, theirs reads everything again for each token
    let mut all: Vec<u32> = ids().flatten_all().and_then(|i| i.to_vec1()).expect("ids");
    let (new, _) = go_on(&decoder, &all, &greedy(12), &mut |_| Ok(())).expect("goes on");
    for id in &new {
        let read = Tensor::new(&all[..], &Device::Cpu).and_then(|i| i.unsqueeze(0));
        let logits = their_logits(&read.expect("ids"));
        let chosen = likeliest(&logits[logits.len() - 32..]);
        assert_eq!(chosen, *id, "{} goes on from {all:?}", config["model_type"]);
        all.push(chosen);
    }
    (memory, ours)
}

/// Weights that repeat nothing; norms around one.
fn randomise(variables: &VarMap) {
    let mut state = 3u64;
    let data = variables.data().lock().expect("variables");
    let mut names: Vec<&String> = data.keys().collect();
    names.sort();
    for name in names {
        let variable = &data[name];
        let values: Vec<f32> = (0..variable.elem_count())
            .map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                let x = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                if role(name) == Role::Norm {
                    1.0 + 0.2 * x
                } else {
                    0.25 * x
                }
            })
            .collect();
        variable
            .set(&Tensor::from_vec(values, variable.dims(), &Device::Cpu).expect("values"))
            .expect("sets");
    }
}

macro_rules! theirs {
    ($config:expr, $model:path, $($first:expr)?) => {
        against(&$config, |vb, variables| {
            let parsed = serde_json::from_value($config.clone()).expect("their config parses");
            let mut model = <$model>::new($($first,)? &parsed, vb)?;
            randomise(variables);
            Ok(Box::new(move |ids: &Tensor| {
                model.clear_kv_cache();
                model.forward(ids, 0)
            }))
        })
    };
}

#[test]
fn llama_with_stretched_rope() {
    let config = config(
        "llama",
        json!({"rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_type": "llama3"}}),
    );
    let (memory, _) = against(&config, |vb, variables| {
        let parsed: theirs::llama::LlamaConfig =
            serde_json::from_value(config.clone()).expect("their config parses");
        let parsed = parsed.into_config(false);
        let model = theirs::llama::Llama::load(vb, &parsed)?;
        randomise(variables);
        Ok(Box::new(move |ids: &Tensor| {
            let mut cache = theirs::llama::Cache::new(false, DType::F32, &parsed, &Device::Cpu)?;
            model.forward(ids, 0, &mut cache)
        }))
    });
    assert_gradients(memory, &config, &ids());
}

#[test]
fn qwen2_with_biases_and_tied_head() {
    let config = config(
        "qwen2",
        json!({"sliding_window": 64, "max_window_layers": 2, "tie_word_embeddings": true, "use_sliding_window": false}),
    );
    let (memory, _) = theirs!(config, theirs::qwen2::ModelForCausalLM,);
    assert_gradients(memory, &config, &ids());
}

#[test]
fn qwen3_with_query_and_key_norms() {
    let config = config(
        "qwen3",
        json!({"head_dim": 16, "attention_bias": false, "max_window_layers": 2, "use_sliding_window": false, "sliding_window": null}),
    );
    let (memory, _) = theirs!(config, theirs::qwen3::ModelForCausalLM,);
    assert_gradients(memory, &config, &ids());
}

#[test]
fn phi3_with_fused_projections_and_partial_rotary() {
    let config = config("phi3", json!({"partial_rotary_factor": 0.5}));
    let (memory, _) = theirs!(config, theirs::phi3::Model,);
    assert_gradients(memory, &config, &ids());
}

#[test]
fn mistral_with_a_sliding_window() {
    let ours = config("mistral", json!({"head_dim": 16, "sliding_window": 7}));
    let mut other = ours.clone();
    // their window counts the positions before the own one, transformers' counts the own one too
    other["sliding_window"] = 6.into();
    let (memory, _) = against(&ours, |vb, variables| {
        let parsed = serde_json::from_value(other).expect("their config parses");
        let mut model = theirs::mistral::Model::new(&parsed, vb)?;
        randomise(variables);
        Ok(Box::new(move |ids: &Tensor| {
            model.clear_kv_cache();
            model.forward(ids, 0)
        }))
    });
    assert_gradients(memory, &ours, &ids());
}
