//! Against transformers: logits, losses, the gradients of autograd, padded and packed rows, and steps of AdamW (`fixtures/make_families.py`).

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use svdhub::model::{Decoder, Method, ModelConfig, Segment, Segments, Trained};
use svdhub::split::Factors;
use svdhub::text::Window;
use svdhub::train::{Options, Run};
use svdhub::weights::Elements;

use crate::memory::Memory;

/// Logits and gradients, relative to the largest of their tensor.
const TOLERANCE: f64 = 1e-4;

/// Rows of u and v per linear weight.
const TRIPLETS: usize = 3;

/// `count` numbers of [−1, 1) that follow from a name, as the script makes them.
fn numbers(name: &str, count: usize) -> impl Iterator<Item = f64> + use<> {
    let mut state = name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
    });
    (0..count).map(move |_| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = state;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
        (x >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    })
}

/// A weight of the script's models.
fn weight(name: &str, shape: &[usize]) -> Elements {
    let matrix = shape.len() == 2;
    let embedding = name.contains("embed_tokens") || name.contains("embed_in");
    let norm = name.contains("norm") && name.ends_with(".weight");
    let values: Vec<f32> = numbers(name, shape.iter().product())
        .map(|x| {
            let x = match (matrix, embedding, norm) {
                (true, true, _) => 0.8 * x,
                (true, false, _) => 2.5 / (shape[1] as f64).sqrt() * x,
                (false, _, true) => 1.0 + 0.5 * x,
                (false, _, false) => 0.5 * x,
            };
            x as f32
        })
        .collect();
    Elements::from_f32(shape, &values)
}

/// Rows that are no singular vectors: ∂L/∂δᵢ = uᵢᵀ (∂L/∂M) vᵢ holds for all.
fn factors(module: &str, stored: &Elements) -> (Factors, Vec<f32>) {
    let rows = |factor: &str, n: usize| {
        let values = numbers(&format!("{module}.{factor}"), TRIPLETS * n).map(|x| x as f32);
        ndarray::Array2::from_shape_vec((TRIPLETS, n), values.collect()).expect("the shape fits")
    };
    let factors = Factors {
        u: rows("u", stored.shape[0]),
        sigma: vec![1.0; TRIPLETS].into(),
        v: rows("v", stored.shape[1]),
    };
    (factors, vec![0.0; TRIPLETS])
}

/// The numbers of a list.
pub fn list(value: &Value) -> Vec<f64> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let values = tensor.flatten_all().and_then(|t| t.to_vec1::<f32>());
    values.expect("values").into_iter().map(f64::from).collect()
}

fn assert_near(got: &[f64], wanted: &Value, what: &str) {
    let wanted = list(wanted);
    assert_eq!(got.len(), wanted.len(), "{what}");
    let scale = wanted.iter().fold(0f64, |m, x| m.max(x.abs()));
    let off = got
        .iter()
        .zip(&wanted)
        .fold(0f64, |m, (a, b)| m.max((a - b).abs()))
        / scale;
    assert!(off < TOLERANCE, "{what} is {off:.1e} off");
}

/// The script's file of a model.
pub fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/golden/families")
        .join(format!("{name}.json"));
    serde_json::from_slice(&std::fs::read(path).expect("golden file")).expect("golden JSON")
}

/// Its config, and the weights that the script computed too.
pub fn model(golden: &Value) -> (ModelConfig, BTreeMap<String, Elements>) {
    let config = ModelConfig::parse(Path::new("config.json"), &golden["config"]).expect("parses");
    let tensors = config
        .tensors(config.names.prefix)
        .into_iter()
        .map(|(name, shape)| {
            let elements = weight(&name, &shape);
            (name, elements)
        })
        .collect();
    (config, tensors)
}

/// The tokens it reads.
pub fn ids(golden: &Value) -> Tensor {
    let rows = golden["input_ids"].as_array().expect("rows");
    let ids: Vec<u32> = rows.iter().flat_map(list).map(|id| id as u32).collect();
    let length = ids.len() / rows.len();
    Tensor::from_vec(ids, (rows.len(), length), &Device::Cpu).expect("ids")
}

/// A golden model whose Σ, norms and embedding are trained.
fn trained(golden: &Value) -> Decoder {
    let (config, tensors) = model(golden);
    let memory = Memory {
        tensors,
        factors: Some(Box::new(factors)),
    };
    let trained = Trained {
        linear: Some(Method::default()),
        norms: true,
        embeddings: true,
    };
    Decoder::load(&config, &memory, trained, &Device::Cpu, DType::F32).expect("loads")
}

/// Rows that are padded on either side, and rows of several sequences.
fn assert_layouts(name: &str) {
    let golden = golden(name);
    let decoder = trained(&golden);
    let layouts = golden["layouts"].as_object().expect("layouts");
    assert!(["left", "right", "packed"].iter().eq(layouts.keys()));
    for (layout, golden) in layouts {
        let what = |part: &str| format!("{name}, {layout}: {part}");
        let segment = |tokens: f64| match tokens < 0.0 {
            true => Segment::Padding(-tokens as usize),
            false => Segment::Sequence(tokens as usize),
        };
        let rows = golden["segments"].as_array().expect("rows");
        let rows = rows
            .iter()
            .map(|row| list(row).into_iter().map(segment).collect());
        let segments = Segments::new(rows.collect());
        let ids = ids(golden);
        let logits = decoder.logits_of(&ids, &segments).expect("forward");
        for place in golden["logits"].as_array().expect("places") {
            let at = list(&place["at"]);
            let row = logits
                .get(at[0] as usize)
                .and_then(|l| l.get(at[1] as usize));
            let every_fourth: Vec<f64> = values(&row.expect("a row"))
                .into_iter()
                .step_by(4)
                .collect();
            assert_near(
                &every_fourth,
                &place["values"],
                &what(&format!("the logits at {at:?}")),
            );
        }
        let (sum, predicted) = decoder.loss_of(&ids, &segments).expect("forward");
        let loss = (sum / predicted as f64).expect("a mean");
        assert_near(&values(&loss), &json!([golden["loss"]]), &what("the loss"));
        let gradients = decoder.gradients_of(&ids, &segments, false);
        let gradients = gradients.expect("gradients").tensors;
        for (module, wanted) in golden["sigma"].as_object().expect("modules") {
            let gradient = gradients.get(&format!("{module}.delta"));
            let gradient = gradient.expect("a gradient");
            assert_near(
                &values(gradient),
                wanted,
                &what(&format!("the gradient of Σ in {module}")),
            );
        }
    }
}

/// The losses of the script's steps, from the forward pass to AdamW.
fn assert_steps(name: &str) {
    let golden = golden(name);
    let (config, tensors) = model(&golden);
    let memory = Memory {
        tensors,
        factors: Some(Box::new(factors)),
    };
    let trained = Trained {
        linear: Some(Method::default()),
        ..Trained::default()
    };
    let decoder =
        Decoder::load(&config, &memory, trained, &Device::Cpu, DType::F32).expect("loads");
    let number = |key: &str| golden["steps"][key].as_f64().expect("a number");
    let options = Options {
        weight_decay: number("weight_decay"),
        ..Options::default()
    };
    let mut run = Run::new(&decoder, &options);
    let rows: Vec<Vec<u32>> = ids(&golden).to_vec2().expect("rows");
    let rows: Vec<Window> = rows.iter().map(|ids| Window::from(&ids[..])).collect();
    let wanted = list(&golden["steps"]["losses"]);
    for (step, wanted) in wanted.iter().enumerate() {
        let loss = run.step(&rows, number("lr"), step == 0).expect("steps");
        assert!(run.silent.is_empty(), "every one receives a gradient");
        let off = (f64::from(loss) - wanted).abs() / wanted;
        assert!(off < TOLERANCE, "{name}: loss {step} is {off:.1e} off");
    }
    assert_eq!(wanted.len(), 10);
}

fn assert_parity(name: &str) {
    let golden = golden(name);
    let decoder = trained(&golden);
    let ids = ids(&golden);
    let logits = decoder.logits(&ids).expect("forward");
    for place in golden["logits"].as_array().expect("places") {
        let at = list(&place["at"]);
        let row = logits
            .get(at[0] as usize)
            .and_then(|l| l.get(at[1] as usize))
            .expect("a row");
        let what = format!("{name}: the row of logits at {at:?}");
        assert_near(&values(&row), &place["values"], &what);
    }

    let (sum, predicted) = decoder.loss(&ids).expect("forward");
    let loss = (sum / predicted as f64).expect("a mean");
    let wanted = golden["loss"].as_f64().expect("a loss");
    let off = (values(&loss)[0] - wanted).abs() / wanted;
    assert!(off < 1e-5, "{name}: the loss is {off:.1e} off");

    let gradients = decoder.gradients(&ids, false).expect("gradients").tensors;
    let gradient = |variable: &str| values(gradients.get(variable).expect("a gradient"));
    let (sigma, norms) = (golden["sigma"].as_object(), golden["norms"].as_object());
    let (sigma, norms) = (sigma.expect("modules"), norms.expect("norms"));
    let embeddings = golden["embedding"].as_object().expect("embeddings");
    let trained = sigma.len() + norms.len() + embeddings.len();
    assert_eq!(decoder.variables.len(), trained);
    for (module, wanted) in sigma {
        let what = format!("{name}: the gradient of Σ in {module}");
        assert_near(&gradient(&format!("{module}.delta")), wanted, &what);
    }
    for (norm, wanted) in norms {
        let what = format!("{name}: the gradient of {norm}");
        assert_near(&gradient(norm), wanted, &what);
    }
    for (embedding, wanted) in embeddings {
        let shape = decoder.variables[embedding].dims();
        let gradient = ndarray::Array2::from_shape_vec((shape[0], shape[1]), gradient(embedding))
            .expect("the shape fits");
        let along = |side: &str, n: usize| -> ndarray::Array1<f64> {
            numbers(&format!("{embedding}.{side}"), n).collect()
        };
        let what = |side: &str| format!("{name}: the gradient of {embedding}, from the {side}");
        let right = gradient.dot(&along("r", shape[1]));
        assert_near(&right.to_vec(), &wanted["right"], &what("right"));
        let left = gradient.t().dot(&along("l", shape[0]));
        assert_near(&left.to_vec(), &wanted["left"], &what("left"));
    }
}

macro_rules! parity {
    ($($test:ident: $name:literal;)*) => {
        $(#[test]
        fn $test() {
            assert_parity($name);
            assert_layouts($name);
            assert_steps($name);
        })*
    };
}

parity! {
    llama_with_biases_and_wide_heads: "llama";
    llama_3_beyond_its_original_window: "llama3";
    llama_with_linear_rope_scaling: "llama-linear";
    llama_with_a_rope_that_grows_with_the_sequence: "llama-dynamic";
    llama_with_yarn: "llama-yarn";
    mistral_beyond_its_window: "mistral";
    qwen2_with_windows_in_later_layers: "qwen2";
    qwen3_with_query_and_key_norms: "qwen3";
    phi3_with_longrope: "phi3-longrope";
    phi4_mini_with_partial_rotary: "phi4-mini";
    gemma_with_scaled_embeddings: "gemma";
    gemma_2_with_soft_caps_and_alternating_windows: "gemma2";
    gemma_3_with_local_and_global_ropes: "gemma3";
    smollm3_with_layers_without_rope: "smollm3";
    smollm3_with_windows: "smollm3-windows";
    olmo2_with_norms_behind: "olmo2";
    olmo3_with_a_rope_stretched_in_full_layers_only: "olmo3";
    granite_with_multipliers: "granite";
    pythia_with_attention_beside_the_mlp: "gpt-neox";
    pythia_with_attention_before_the_mlp: "gpt-neox-serial";
}
