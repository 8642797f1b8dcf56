//! The gradients of whole models against finite differences, with Δσ that are not zero.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use svdhub::linalg::{Algorithm, Wanted, decompose};
use svdhub::model::{Decoder, Lora, Method, ModelConfig, Parametrisation, Trained};
use svdhub::plan::{Role, role};
use svdhub::split::Factors;
use svdhub::weights::Elements;

use crate::memory::Memory;
use crate::transformers::{golden, ids, model};

/// Decomposes for real; Δσ is not zero, so that a forward pass that forgets it is seen.
pub fn decomposed(module: &str, stored: &Elements) -> (Factors, Vec<f32>) {
    let shape = (stored.shape[0], stored.shape[1]);
    let matrix = ndarray::Array2::from_shape_vec(shape, stored.to_f32()).expect("the shape fits");
    let q = ((0.4 * shape.0.min(shape.1) as f64) as usize).max(1);
    let svd = decompose(
        module,
        matrix.view(),
        Wanted::Triplets(q),
        &Algorithm::default(),
    )
    .expect("decomposes");
    let delta = svd.sigma.iter().map(|s| 0.1 * s).collect();
    let (u, sigma, v) = (svd.u, svd.sigma, svd.v);
    (Factors { u, sigma, v }, delta)
}

/// Every Δσ vector, the head's included, every norm and the embedding: each along its gradient.
pub fn assert_gradients(memory: Memory, config: &Value, ids: &Tensor) {
    assert_gradients_of(Method::default(), memory, config, ids);
}

/// The same of what another method moves.
fn assert_gradients_of(method: Method, mut memory: Memory, config: &Value, ids: &Tensor) {
    memory.factors = Some(Box::new(decomposed));
    let parsed = ModelConfig::parse(Path::new("config.json"), config).expect("parses");
    let trained = Trained {
        linear: Some(method),
        norms: true,
        embeddings: true,
    };
    let decoder =
        Decoder::load(&parsed, &memory, trained, &Device::Cpu, DType::F32).expect("loads");
    let linear = memory
        .tensors
        .keys()
        .filter(|n| matches!(role(n), Role::Linear | Role::Head))
        .count();
    let norms = memory
        .tensors
        .keys()
        .filter(|n| role(n) == Role::Norm)
        .count();
    let each = if matches!(method, Method::Lora(_)) {
        2
    } else {
        1
    };
    assert_eq!(decoder.variables.len(), each * linear + norms + 1);
    if method != Method::default() {
        move_from_zero(&decoder);
    }
    assert_recomputed(&decoder, ids);
    let loss = || -> f64 {
        let (sum, _) = decoder.loss(ids).expect("forward");
        f64::from(
            sum.flatten_all()
                .and_then(|s| s.to_vec1::<f32>())
                .expect("a loss")[0],
        )
    };
    // those of the mean, where `loss` is a sum
    let (_, predicted) = decoder.loss(ids).expect("forward");
    let gradients = decoder.gradients(ids, false).expect("gradients").tensors;
    for (name, variable) in &decoder.variables {
        let gradient: Vec<f32> = gradients
            .get(name)
            .unwrap_or_else(|| panic!("no gradient reaches {name}"))
            .flatten_all()
            .and_then(|g| (g * predicted as f64)?.to_vec1())
            .expect("values");
        let before: Vec<f32> = variable
            .flatten_all()
            .and_then(|v| v.to_vec1())
            .expect("values");
        let set = |values: Vec<f32>| {
            let values = Tensor::from_vec(values, variable.dims(), &Device::Cpu).expect("values");
            variable.set(&values).expect("sets");
        };
        // along the gradient the change is largest beside f32's rounding of the loss
        let length = gradient
            .iter()
            .map(|g| f64::from(*g).powi(2))
            .sum::<f64>()
            .sqrt();
        assert!(length > 0.0, "{name} has a gradient of zero");
        // a third of a nat at most: far beyond rounding, and curvature is small beside it
        let step = (0.3 / length).min(1e-2);
        let moved = |sign: f64| -> f64 {
            let along = before
                .iter()
                .zip(&gradient)
                .map(|(x, g)| x + (sign * step * f64::from(*g) / length) as f32);
            set(along.collect());
            loss()
        };
        let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * step);
        set(before.clone());
        // f32: a loss of some hundred nats carries 1e-5, over twice the step
        let allowed = 5e-3 * length + 5e-3;
        assert!(
            (numeric - length).abs() < allowed,
            "{name}: {numeric} by differences, {length} by backward"
        );
    }
}

/// The same loss and gradients, to the bit, where each block is computed again.
fn assert_recomputed(decoder: &Decoder, ids: &Tensor) {
    let [kept, again] = [false, true].map(|recompute| {
        let found = decoder.gradients(ids, recompute).expect("computes");
        let bits = found.tensors.into_iter().map(|(name, gradient)| {
            let values = gradient.flatten_all().and_then(|g| g.to_vec1::<f32>());
            let bits = values.expect("values").into_iter().map(f32::to_bits);
            (name, bits.collect::<Vec<u32>>())
        });
        (found.loss.to_bits(), bits.collect::<Vec<_>>())
    });
    assert_eq!(kept.0, again.0);
    assert_eq!(kept.1.len(), decoder.variables.len());
    for ((name, kept), (_, again)) in kept.1.iter().zip(&again.1) {
        assert!(kept == again, "the gradient of {name} has other bits");
    }
}

/// Moves what begins at zero, where a gradient is not seen or a factor forgotten.
pub fn move_from_zero(decoder: &Decoder) {
    for (at, variable) in decoder.variables.values().enumerate() {
        let values = variable.flatten_all().and_then(|v| v.to_vec1::<f32>());
        let values = values.expect("values").into_iter().enumerate();
        // up to 0.15, and no two neighbours alike
        let moved = values.map(|(i, x)| x + 0.05 * (((7 * i + 3 * at) % 13) as f32 / 2.0 - 3.0));
        let moved = Tensor::from_vec(moved.collect(), variable.dims(), variable.device());
        variable.set(&moved.expect("values")).expect("sets");
    }
}

macro_rules! methods {
    ($($test:ident: $name:literal, $method:expr;)*) => {
        $(#[test]
        fn $test() {
            let golden = golden($name);
            let (_, tensors) = model(&golden);
            let memory = Memory { tensors, factors: None };
            assert_gradients_of($method, memory, &golden["config"], &ids(&golden));
        })*
    };
}

const LORA: Lora = Lora {
    rank: 3,
    alpha: 5,
    seed: 1,
};

// an untied head; a tied one, and biases; a tied one under a cap
methods! {
    relative_sigma_has_the_gradients_of_its_loss: "llama", Method::Sigma(Parametrisation::Relative);
    lora_has_the_gradients_of_its_loss: "llama", Method::Lora(LORA);
    lora_has_them_beside_a_tied_head: "qwen2", Method::Lora(LORA);
    lora_xs_has_the_gradients_of_its_loss: "llama", Method::LoraXs { rank: 4 };
    lora_xs_has_them_beside_a_tied_head: "gemma2", Method::LoraXs { rank: 4 };
    full_has_the_gradients_of_its_loss: "llama", Method::Full;
    full_has_them_beside_a_tied_head: "gemma2", Method::Full;
}

macro_rules! differences {
    ($($test:ident: $name:literal;)*) => {
        $(#[test]
        fn $test() {
            let golden = golden($name);
            let (_, tensors) = model(&golden);
            let memory = Memory { tensors, factors: None };
            assert_gradients(memory, &golden["config"], &ids(&golden));
        })*
    };
}

differences! {
    gemma_has_the_gradients_of_its_loss: "gemma";
    gemma2_has_the_gradients_of_its_loss: "gemma2";
    gemma3_has_the_gradients_of_its_loss: "gemma3";
    smollm3_has_the_gradients_of_its_loss: "smollm3";
    olmo3_has_the_gradients_of_its_loss: "olmo3";
    granite_has_the_gradients_of_its_loss: "granite";
    pythia_has_the_gradients_of_its_loss: "gpt-neox";
}
