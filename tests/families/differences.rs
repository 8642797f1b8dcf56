//! The gradients of whole models against finite differences, with Δσ that are not zero.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use svdhub::linalg::{Algorithm, Wanted, decompose};
use svdhub::model::{Decoder, ModelConfig, Trained};
use svdhub::plan::{Role, role};
use svdhub::split::Factors;
use svdhub::weights::Elements;

use crate::memory::Memory;
use crate::transformers::{golden, ids, model};

/// Decomposes for real; Δσ is not zero, so that a forward pass that forgets it is seen.
fn decomposed(module: &str, stored: &Elements) -> (Factors, Vec<f32>) {
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
pub fn assert_gradients(mut memory: Memory, config: &Value, ids: &Tensor) {
    memory.factors = Some(Box::new(decomposed));
    let parsed = ModelConfig::parse(Path::new("config.json"), config).expect("parses");
    let trained = Trained {
        sigma: true,
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
    assert_eq!(decoder.variables.len(), linear + norms + 1);
    let loss = || -> f64 {
        let (sum, _) = decoder.loss(ids).expect("forward");
        f64::from(
            sum.flatten_all()
                .and_then(|s| s.to_vec1::<f32>())
                .expect("a loss")[0],
        )
    };
    let (sum, _) = decoder.loss(ids).expect("forward");
    let gradients = sum.backward().expect("backward");
    for (name, variable) in &decoder.variables {
        let gradient: Vec<f32> = gradients
            .get(variable)
            .unwrap_or_else(|| panic!("no gradient reaches {name}"))
            .flatten_all()
            .and_then(|g| g.to_vec1())
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
