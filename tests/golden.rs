//! Our decoder and training step against PyTorch's numbers (`fixtures/make_golden.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use svdhub::adapter::Mixture;
use svdhub::artifact::Artifact;
use svdhub::base::Base;
use svdhub::event::Silent;
use svdhub::model::{Decoder, Method, Trained, stacked};
use svdhub::source::{Source, load};
use svdhub::text::Window;
use svdhub::train::{Options, Run};
use svdhub::{decompose, evaluate};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name)
}

fn golden(name: &str) -> Value {
    let path = fixture("golden").join(name);
    serde_json::from_slice(&std::fs::read(path).expect("golden file")).expect("golden JSON")
}

fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn base() -> Base {
    Base::open(&fixture("shakespeare-1m"), None, None).expect("the fixture model opens")
}

/// Largest difference, relative to the largest value of `wanted`.
fn difference(got: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(got.len(), wanted.len());
    let scale = wanted.iter().fold(0f64, |m, x| m.max(x.abs()));
    let worst = got
        .iter()
        .zip(wanted)
        .fold(0f64, |m, (a, b)| m.max((a - b).abs()));
    worst / scale
}

#[test]
fn logits_match_pytorch() {
    let golden = golden("logits.json");
    let ids: Vec<u32> = numbers(&golden["input_ids"])
        .iter()
        .map(|&x| x as u32)
        .collect();
    let t = ids.len();
    let decoder = load(
        &Source::Model(base()),
        Trained::default(),
        &Device::Cpu,
        &Silent,
    )
    .expect("loads");
    let ids = Tensor::from_vec(ids, (1, t), &Device::Cpu).expect("ids");
    let logits = decoder.logits(&ids).expect("forward");
    let last = logits
        .get(0)
        .and_then(|l| l.get(t - 1))
        .and_then(|l| l.to_vec1::<f32>())
        .expect("last logits");
    let last: Vec<f64> = last.into_iter().map(f64::from).collect();
    let off = difference(&last, &numbers(&golden["logits_last"]));
    assert!(off < 1e-5, "logits are {off:.1e} off");
    let (sum, tokens) = decoder.loss(&ids).expect("loss");
    let loss = f64::from(
        sum.flatten_all()
            .and_then(|s| s.to_vec1::<f32>())
            .expect("scalar")[0],
    ) / tokens as f64;
    assert!((loss - golden["loss"].as_f64().expect("loss")).abs() < 1e-5);
}

#[test]
fn held_out_losses_match_pytorch() {
    let golden = golden("heldout.json");
    for text in ["shakespeare", "eighty"] {
        let golden = &golden[text];
        let data = fixture(&format!("{text}-heldout.txt"));
        let facts = evaluate::run(
            &Source::Model(base()),
            &data.as_path().into(),
            &evaluate::Options::default(),
            &Silent,
        )
        .expect("evaluates");
        assert_eq!(
            facts.tokens as u64,
            golden["predicted_tokens"].as_u64().expect("tokens")
        );
        let wanted = golden["loss"].as_f64().expect("loss");
        assert!(
            (facts.loss - wanted).abs() < 1e-5 * wanted,
            "{} instead of {wanted}",
            facts.loss
        );
    }
}

#[test]
fn first_ten_steps_match_pytorch() {
    let golden = golden("sigma_training.json");
    let out = tempfile::tempdir().expect("temporary directory");
    let out = out.path().join("decomposition");
    decompose::run(&base(), &out, &decompose::Options::default(), &Silent).expect("decomposes");
    let artifact = Artifact::open(&out, None).expect("opens");
    for (module, sigma) in golden["sigma"].as_object().expect("modules") {
        let ours: Vec<f64> = artifact
            .factors(module)
            .expect("factors")
            .sigma
            .iter()
            .map(|&x| x.into())
            .collect();
        let off = difference(&ours, &numbers(sigma));
        assert!(off < 1e-6, "σ of {module} are {off:.1e} off");
    }
    let source = Source::Decomposition {
        artifact,
        mixture: Mixture::default(),
    };
    let trained = Trained {
        linear: Some(Method::default()),
        norms: false,
        embeddings: false,
    };
    let decoder = load(&source, trained, &Device::Cpu, &Silent).expect("loads");
    let mut run = Run::new(&decoder, &Options::default());
    let learning_rate = golden["lr"].as_f64().expect("lr");
    for (step, batch) in golden["batches"]
        .as_array()
        .expect("batches")
        .iter()
        .enumerate()
    {
        let windows: Vec<Vec<u32>> = batch
            .as_array()
            .expect("windows")
            .iter()
            .map(|w| numbers(w).iter().map(|&x| x as u32).collect())
            .collect();
        let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        if step == 0 {
            // Adam hides a wrong factor on every gradient: they are compared themselves
            let ids = stacked(&windows, &Device::Cpu).expect("ids");
            let gradients = decoder.gradients(&ids, false).expect("gradients").tensors;
            for (module, wanted) in golden["grad_first"].as_object().expect("modules") {
                let gradient = gradients.get(&format!("{module}.delta"));
                let ours = gradient
                    .expect("a gradient")
                    .to_vec1::<f32>()
                    .expect("values");
                let ours: Vec<f64> = ours.into_iter().map(f64::from).collect();
                let off = difference(&ours, &numbers(wanted));
                assert!(off < 1e-4, "the gradient of {module} is {off:.1e} off");
            }
        }
        let windows: Vec<Window> = windows.into_iter().map(Window::from).collect();
        run.step(&windows, learning_rate, step == 0).expect("steps");
        assert!(run.silent.is_empty(), "every one receives a gradient");
    }
    let losses: Vec<f64> = run.losses.iter().map(|&x| x.into()).collect();
    let off = difference(&losses, &numbers(&golden["losses"]));
    assert!(off < 1e-5, "losses are {off:.1e} off: {losses:?}");
    for (module, wanted) in golden["delta_after"].as_object().expect("modules") {
        let variable = &decoder.variables[&format!("{module}.delta")];
        let ours: Vec<f64> = variable
            .to_vec1::<f32>()
            .expect("values")
            .into_iter()
            .map(f64::from)
            .collect();
        let off = difference(&ours, &numbers(wanted));
        // Adam divides by the root of tiny second moments: gradients that differ in the last bit move apart a little
        assert!(off < 1e-3, "Δσ of {module} are {off:.1e} off");
    }
}

/// The losses of ten steps, and Δσ by module after them.
type TenSteps = (Vec<f64>, BTreeMap<String, Vec<f64>>);

/// Ten steps on windows of equal length.
fn ten_steps(source: &Source, batches: &Value, device: &Device, dtype: DType) -> TenSteps {
    let golden = golden("sigma_training.json");
    let trained = Trained {
        linear: Some(Method::default()),
        ..Trained::default()
    };
    let config = source.config().expect("a config");
    let decoder = Decoder::load(&config, source, trained, device, dtype).expect("loads");
    let mut run = Run::new(&decoder, &Options::default());
    let batches = batches.as_array().expect("batches");
    for (step, batch) in batches.iter().enumerate() {
        let windows = batch.as_array().expect("windows").iter();
        let windows: Vec<Vec<u32>> = windows
            .map(|w| numbers(w).iter().map(|&x| x as u32).collect())
            .collect();
        let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        let learning_rate = golden["lr"].as_f64().expect("lr");
        let windows: Vec<Window> = windows.into_iter().map(Window::from).collect();
        run.step(&windows, learning_rate, step == 0).expect("steps");
        assert!(run.silent.is_empty(), "every one receives a gradient");
    }
    let moved = decoder.variables.iter().map(|(name, variable)| {
        let module = name.strip_suffix(".delta").expect("Δσ");
        let values = variable.to_vec1::<f32>().expect("values");
        (module.into(), values.into_iter().map(f64::from).collect())
    });
    (
        run.losses.iter().map(|&x| x.into()).collect(),
        moved.collect(),
    )
}

#[test]
fn steps_in_bf16_stray_no_further_than_those_of_pytorch() {
    let out = tempfile::tempdir().expect("temporary directory");
    let out = out.path().join("decomposition");
    decompose::run(&base(), &out, &decompose::Options::default(), &Silent).expect("decomposes");
    let source = Source::Decomposition {
        artifact: Artifact::open(&out, None).expect("opens"),
        mixture: Mixture::default(),
    };
    strays_no_further(&source, &Device::Cpu, "on the CPU");
    let gpu = match svdhub::device::open(0) {
        Ok(gpu) => gpu,
        Err(error) => return eprintln!("SKIPPED, no GPU: {error}"),
    };
    strays_no_further(&source, &gpu, "on the GPU");
    for run in golden("sigma_training_bf16.json").as_array().expect("runs") {
        let (losses, _) = ten_steps(&source, &run["batches"], &gpu, DType::F32);
        let off = difference(&losses, &numbers(&run["float32"]["losses"]));
        assert!(off < 1e-4, "in f32 on the GPU: {off:.1e} off");
    }
}

/// Losses and Δσ of six times ten steps in bf16, beside those of PyTorch's in bf16, both by their root mean square distance
/// from PyTorch's in f32: no further than the further of its two ways to attention.
fn strays_no_further(source: &Source, device: &Device, place: &str) {
    let runs = golden("sigma_training_bf16.json");
    let runs = runs.as_array().expect("runs");
    // of losses, and of Δσ
    let distance = |found: &dyn Fn(&Value) -> TenSteps| {
        let (mut off, mut all) = ([0.0; 2], [0.0; 2]);
        for run in runs {
            let (losses, moved) = found(run);
            let exact = &run["float32"];
            let mut add = |at: usize, found: &[f64], exact: &Value| {
                for (x, exact) in found.iter().zip(numbers(exact)) {
                    off[at] += (x - exact).powi(2);
                    all[at] += exact * exact;
                }
            };
            add(0, &losses, &exact["losses"]);
            for (module, exact) in exact["delta_after"].as_object().expect("modules") {
                add(1, &moved[module], exact);
            }
        }
        [0, 1].map(|at| f64::sqrt(off[at] / all[at]))
    };
    let ours = distance(&|run| ten_steps(source, &run["batches"], device, DType::BF16));
    let theirs = ["bfloat16", "bfloat16-sdpa"].map(|name| {
        distance(&|run| {
            let moved = run[name]["delta_after"].as_object().expect("modules");
            let moved = moved.iter().map(|(module, x)| (module.clone(), numbers(x)));
            (numbers(&run[name]["losses"]), moved.collect())
        })
    });
    for (at, what) in ["losses", "Δσ"].into_iter().enumerate() {
        let (ours, [eager, sdpa]) = (ours[at], theirs.map(|of| of[at]));
        eprintln!("{place}: {what} {ours:.2e} off, PyTorch {eager:.2e} and {sdpa:.2e}");
        assert!(ours > 0.0, "these are not steps in bf16");
        assert!(
            ours <= eager.max(sdpa),
            "{place}: {what} {ours:.2e} off, PyTorch {eager:.2e} and {sdpa:.2e}"
        );
    }
}
