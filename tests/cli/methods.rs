//! What can move beside Σ in absolute terms: each method learns, survives a kill, and is merged as it was trained.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use svdhub::adapter::Adapter;
use svdhub::base::Base;
use svdhub::event::Silent;
use svdhub::model::{Decoder, Trained, stacked};
use svdhub::source::{Source, load};
use svdhub::text::{Corpus, LossOn, shuffled};
use svdhub::weights::{Checkpoint, Dtype, Elements};

use crate::python::{checked, python};
use crate::world::{Run, World, arg, files, fixture, json_file, loss, tensors};

const LORA_WEIGHTS: &str = "adapter_model.safetensors";

/// The fixture, and its decomposition.
fn decomposed(world: &World, dtype: Dtype, options: &[&str]) -> (PathBuf, PathBuf) {
    let base = world.model("base", dtype, u64::MAX);
    let split = world.path("svd");
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    world.run(&[&decompose, options].concat()).succeeds();
    (base, split)
}

fn command(model: &Path, out: &Path, options: &[&str]) -> Vec<String> {
    let data = fixture("eighty-train.txt");
    let fixed = ["train", arg(model), "--data", arg(&data), "--out", arg(out)];
    let all = fixed.iter().chain(options).map(ToString::to_string);
    all.collect()
}

fn trained(world: &World, model: &Path, name: &str, options: &[&str]) -> (PathBuf, Value) {
    let out = world.path(name);
    let length = ["--length", "64"];
    let all = command(model, &out, &[&length, options].concat());
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let facts = world.json(&all);
    (out, facts)
}

/// The methods that give an adapter of ours, with steps enough to be seen.
const OURS: [(&str, &[&str]); 5] = [
    (
        "relative",
        &["--parametrisation", "relative", "--lr", "3e-2"],
    ),
    (
        "lora-xs",
        &["--method", "lora-xs", "--lora-rank", "6", "--lr", "3e-2"],
    ),
    ("full", &["--method", "full", "--lr", "1e-3"]),
    ("embeddings", &["--train", "embeddings", "--lr", "3e-3"]),
    (
        "everything",
        &[
            "--method",
            "full",
            "--train",
            "norms,embeddings",
            "--lr",
            "1e-3",
        ],
    ),
];

#[test]
fn every_method_lowers_the_loss_and_merges_to_what_was_trained() {
    let world = World::new();
    let (_, split) = decomposed(&world, Dtype::BF16, &[]);
    let before = loss(&world, &[arg(&split)]);
    for (name, options) in OURS {
        let steps = ["--steps", "20"];
        let (adapter, facts) = trained(&world, &split, name, &[options, &steps].concat());
        let stored = Adapter::read(&adapter).expect("reads");
        let moved = facts["parameters"].as_u64();
        let cores = stored.core.values().map(Elements::len).sum::<usize>();
        let deltas = stored.delta.values().map(Vec::len).sum::<usize>();
        let whole = stored.tensors.values().map(Elements::len).sum::<usize>();
        assert_eq!(moved, Some((cores + deltas + whole) as u64), "{name}");
        assert_eq!(facts["trained"], json!(stored.config.trained), "{name}");
        let trained = loss(&world, &[arg(&split), "--adapter", arg(&adapter)]);
        assert!(
            trained < before - 0.1,
            "{name} moved the held-out loss from {before} to {trained}"
        );
        let merged = world.path(&format!("merged-{name}"));
        let merge = ["merge", arg(&split), "--adapter", arg(&adapter)];
        let options = ["--out", arg(&merged), "--dtype", "f32"];
        let facts = world.json(&[&merge[..], &options].concat());
        assert_eq!(facts["identical_to_base"], false, "{name}");
        let after = loss(&world, &[arg(&merged)]);
        // some hundred f32 roundings in each of two evaluation orders, averaged over ten thousand tokens
        assert!(
            (after - trained).abs() < 2e-6 * trained,
            "{name}: {after} instead of {trained}"
        );
        let verified = world.json(&["verify", arg(&adapter)]);
        assert_eq!(
            (&verified["ok"], &verified["kind"]),
            (&json!(true), &json!("adapter"))
        );
        world.run(&["verify", arg(&merged)]).succeeds();
        let cancelled = world.path(&format!("cancelled-{name}"));
        let minus = format!("{}*0", arg(&adapter));
        let merge = [
            "merge",
            arg(&split),
            "--adapter",
            &minus,
            "--out",
            arg(&cancelled),
        ];
        assert_eq!(world.json(&merge)["identical_to_base"], true, "{name}");
    }
}

#[test]
fn a_tied_head_moves_along_with_the_embedding_and_whole_weights_leave_it_alone() {
    let world = World::new();
    let (base, split) = decomposed(&world, Dtype::F32, &[]);
    let steps = ["--steps", "3", "--lr", "1e-2"];
    let merged = |name: &str, options: &[&str]| {
        let (adapter, _) = trained(&world, &split, name, &[options, &steps].concat());
        let out = world.path(&format!("merged-{name}"));
        let merge = [
            "merge",
            arg(&split),
            "--adapter",
            arg(&adapter),
            "--out",
            arg(&out),
        ];
        world.run(&merge).succeeds();
        tensors(&out)
    };
    let original = tensors(&base);
    let embedding = "model.embed_tokens.weight";
    let moved = |found: &std::collections::BTreeMap<String, Elements>| {
        let names = original
            .keys()
            .filter(|&name| found[name] != original[name]);
        names.cloned().collect::<Vec<String>>()
    };
    let with_embedding = moved(&merged("a", &["--train", "embeddings"]));
    assert_eq!(with_embedding.len(), 42 + 1);
    assert!(with_embedding.iter().any(|name| name == embedding));
    let whole = moved(&merged("b", &["--method", "full"]));
    assert_eq!(whole.len(), 42);
    assert!(whole.iter().all(|name| name.ends_with("_proj.weight")));
}

#[test]
fn an_option_of_another_method_is_refused() {
    let world = World::new();
    let base = world.model("base", Dtype::F32, u64::MAX);
    let refused = |options: &[&str], words: &[&str]| {
        let plan = [&["plan", arg(&base)], options].concat();
        world.run(&plan).refuses(words);
        let train = ["train", arg(&base), "--data", "x", "--out", "y"];
        world.run(&[&train, options].concat()).refuses(words);
    };
    refused(
        &["--lora-rank", "4"],
        &["--lora-rank", "the method is sigma", "lora and lora-xs"],
    );
    refused(
        &["--method", "lora-xs", "--lora-alpha", "4"],
        &["--lora-alpha", "the method is lora-xs", "one of lora"],
    );
    refused(
        &["--method", "full", "--parametrisation", "relative"],
        &["--parametrisation", "the method is full", "one of sigma"],
    );
}

#[test]
fn methods_mix_linearly() {
    let world = World::new();
    let (base, split) = decomposed(&world, Dtype::F32, &[]);
    let steps = |options: &[&'static str]| [options, &["--steps", "4", "--lr", "5e-3"]].concat();
    let adapters = [
        trained(&world, &split, "sigma", &steps(&[])).0,
        trained(
            &world,
            &split,
            "xs",
            &steps(&["--method", "lora-xs", "--lora-rank", "3"]),
        )
        .0,
        trained(
            &world,
            &split,
            "xs4",
            &steps(&["--method", "lora-xs", "--lora-rank", "4"]),
        )
        .0,
        trained(&world, &split, "full", &steps(&["--method", "full"])).0,
    ];
    let weights = [0.5, -0.75, 1.25, 0.3];
    let merged = |name: &str, parts: &[String]| {
        let out = world.path(name);
        let mut merge = vec!["merge", arg(&split), "--out", arg(&out)];
        parts
            .iter()
            .for_each(|part| merge.extend(["--adapter", part]));
        world.run(&merge).succeeds();
        tensors(&out)
    };
    let alone: Vec<_> = adapters
        .iter()
        .map(|adapter| {
            merged(
                &format!("only-{}", arg(adapter).len()),
                &[arg(adapter).into()],
            )
        })
        .collect();
    let all: Vec<String> = adapters
        .iter()
        .zip(weights)
        .map(|(adapter, weight)| format!("{}*{weight}", arg(adapter)))
        .collect();
    let mixture = merged("mixture", &all);
    let mut moved = 0;
    for (name, stored) in tensors(&base) {
        let (stored, found) = (stored.to_f32(), mixture[&name].to_f32());
        let alone: Vec<Vec<f32>> = alone.iter().map(|model| model[&name].to_f32()).collect();
        for i in 0..stored.len() {
            let x = f64::from(stored[i]);
            let changes = alone
                .iter()
                .zip(weights)
                .map(|(w, c)| c * (f64::from(w[i]) - x));
            let (change, size) =
                changes.fold((0.0, 0.0), |(sum, size), c| (sum + c, size + c.abs()));
            // five merges round once to f32 each, and Δσ and R of the mixture once
            let allowed = 2.0 * f64::from(f32::EPSILON) * (x.abs() + size) + 1e-5 * size;
            let off = (f64::from(found[i]) - x - change).abs();
            assert!(off <= allowed, "{name} {i}: {off} > {allowed}");
            moved += usize::from(size > 0.0);
        }
    }
    assert!(moved > 100_000, "{moved} elements moved");
}

#[test]
fn killed_training_of_every_method_resumes_to_the_same_bytes() {
    let world = World::new();
    let (_, split) = decomposed(&world, Dtype::BF16, &[]);
    let lora: (&str, &[&str]) = ("lora", &["--method", "lora", "--lora-rank", "4"]);
    for (name, options) in OURS.into_iter().chain([lora]) {
        let size = ["--steps", "101", "--length", "16", "--batch", "2"];
        let options = [options, &size].concat();
        let run = |out: &Path, more: &[&'static str]| {
            let all = command(&split, out, &[&options, more].concat());
            let all: Vec<&str> = all.iter().map(String::as_str).collect();
            world.command(&all)
        };
        let undisturbed = world.path(&format!("undisturbed-{name}"));
        Run::of(run(&undisturbed, &[]).output().expect("runs")).succeeds();
        let out = world.path(&format!("killed-{name}"));
        let mut child = run(&out, &[]).spawn().expect("starts");
        let state = out.join(".svdhub/training.safetensors");
        for _ in 0..12_000 {
            if state.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().expect("kills");
        child.wait().expect("is gone");
        assert!(
            state.exists() && files(&out).is_empty(),
            "{name} was killed in the middle"
        );
        Run::of(run(&out, &["--resume"]).output().expect("runs")).succeeds();
        assert!(files(&out) == files(&undisturbed), "{name}: other bytes");
    }
}

#[test]
fn computing_blocks_again_changes_no_byte() {
    let world = World::new();
    let (_, split) = decomposed(&world, Dtype::BF16, &[]);
    for groups in ["norms", "norms,embeddings"] {
        let options = ["--train", groups, "--steps", "6"];
        let name = |how: &str| format!("{groups}-{how}");
        let (kept, _) = trained(&world, &split, &name("kept"), &options);
        let again = [&options[..], &["--recompute"]].concat();
        let (again, facts) = trained(&world, &split, &name("again"), &again);
        assert_eq!(facts["recompute"], true);
        assert!(files(&kept) == files(&again), "{groups}");
    }
}

/// The decoder of a plain model with a LoRA on it.
fn with_lora(base: &Path, adapter: &Path) -> Decoder {
    let source = Source::Model(Base::open(base, None, None).expect("opens"));
    let source = source.with_lora(adapter, 1.0).expect("fits");
    load(&source, Trained::default(), &Device::Cpu, &Silent).expect("loads")
}

const AS_LORA: [&str; 6] = ["--method", "lora", "--lora-rank", "4", "--lora-alpha", "6"];

#[test]
fn a_lora_of_a_plain_model_or_of_its_decomposition_is_the_one_that_was_trained() {
    let world = World::new();
    let (base, split) = decomposed(&world, Dtype::BF16, &[]);
    let options = [
        &AS_LORA[..],
        &["--lr", "1e-2", "--schedule", "constant", "--steps"],
    ]
    .concat();
    let (short, long) = (
        [&options[..], &["12"]].concat(),
        [&options[..], &["13"]].concat(),
    );
    let (plain, facts) = trained(&world, &base, "plain", &short);
    let (from_split, _) = trained(&world, &split, "from-split", &short);
    let weights = |dir: &Path| std::fs::read(dir.join(LORA_WEIGHTS)).expect("reads");
    assert!(
        weights(&plain) == weights(&from_split),
        "M is the same to the bit"
    );
    let losses = |facts: &Value| {
        let losses = facts["losses"].as_array().expect("losses").iter();
        losses
            .map(|x| x.as_f64().expect("a loss"))
            .collect::<Vec<f64>>()
    };
    let first = losses(&facts);
    assert!(first[11] < first[0] - 0.2, "{first:?}");
    // r·(m + n) for each of the 42 matrices
    let sides: usize = tensors(&base)
        .iter()
        .filter(|(name, _)| name.ends_with("_proj.weight"))
        .map(|(_, e)| e.shape[0] + e.shape[1])
        .sum();
    assert_eq!(facts["parameters"], 4 * sides);
    let config = json_file(&plain.join("adapter_config.json"));
    assert_eq!(
        (&config["r"], &config["lora_alpha"]),
        (&json!(4), &json!(6))
    );
    assert_eq!(config["target_modules"].as_array().map(Vec::len), Some(7));
    let verified = world.json(&["verify", arg(&plain)]);
    assert_eq!(
        (&verified["ok"], &verified["kind"]),
        (&json!(true), &json!("lora"))
    );
    let mut bytes = weights(&from_split);
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(from_split.join(LORA_WEIGHTS), bytes).expect("writes");
    let damaged = world.run(&["verify", arg(&from_split)]);
    assert!(
        damaged.code == Some(1) && damaged.stdout.contains("lora_"),
        "{}",
        damaged.stdout
    );

    // one step more begins with the loss of what the shorter run saved
    let (_, facts) = trained(&world, &base, "longer", &long);
    let decoder = with_lora(&base, &plain);
    let (text, answers) = (fixture("eighty-train.txt"), LossOn::Answers);
    let corpus = Corpus::read(
        &text.as_path().into(),
        &base,
        &decoder.config,
        64,
        answers,
        &Silent,
    );
    let corpus = corpus.expect("reads");
    let (windows, order) = (corpus.full_windows(), 12 * 4..13 * 4);
    let shuffled = shuffled(windows.len(), 0, 0);
    let batch: Vec<&[u32]> = order.map(|at| windows[shuffled[at]].ids).collect();
    let ids = stacked(&batch, &Device::Cpu).expect("ids");
    let (sum, predicted) = decoder.loss(&ids).expect("computes");
    let sum = sum.to_vec1::<f32>().expect("a number")[0];
    let found = f64::from(sum) / predicted as f64;
    let wanted = losses(&facts)[12];
    assert!(
        (found - wanted).abs() < 1e-6 * wanted,
        "{found} instead of {wanted}"
    );
}

#[test]
fn what_peft_and_others_load_is_read_from_a_hub_too() {
    let world = World::with_hub();
    let (base, split) = decomposed(&world, Dtype::F32, &[]);
    let options = [&AS_LORA[..], &["--steps", "2"]].concat();
    let (lora, _) = trained(&world, &base, "lora", &options);
    let (adapter, _) = trained(&world, &split, "adapter", &["--steps", "2"]);
    let text = fixture("eighty-heldout.txt");
    for (target, out) in [("peft-lora", "exported"), ("svd-training", "state")] {
        let export = [
            "export",
            arg(&split),
            "--adapter",
            arg(&adapter),
            "--to",
            target,
            "--out",
            out,
        ];
        world.run(&export).succeeds();
    }
    for (dir, repo) in [
        (&lora, "org/lora"),
        (&world.path("exported"), "org/exported"),
        (&world.path("state"), "org/state"),
    ] {
        world.run(&["publish", arg(dir), repo]).succeeds();
        world.run(&["verify", repo]).succeeds();
    }
    for (dir, repo) in [
        (&lora, "org/lora"),
        (&world.path("exported"), "org/exported"),
    ] {
        let loss = |adapter: &str| {
            let evaluate = [
                "evaluate",
                arg(&base),
                "--adapter",
                adapter,
                "--data",
                arg(&text),
            ];
            world.json(&evaluate)["loss"].clone()
        };
        assert_eq!(loss(repo), loss(arg(dir)));
    }
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    let merged = [
        ("here", arg(&base), arg(&lora), &[][..]),
        ("there", "org/base", "org/lora", &["--stream"]),
    ]
    .map(|(name, model, lora, more)| {
        let out = world.path(name);
        let merge = ["merge", model, "--adapter", lora, "--out", arg(&out)];
        world.run(&[&merge, more].concat()).succeeds();
        files(&out).remove("model.safetensors").expect("is there")
    });
    assert!(merged[0] == merged[1]);
}

fn lora_tensors(lora: &Path) -> BTreeMap<String, Elements> {
    let checkpoint = Checkpoint::single(lora, LORA_WEIGHTS).expect("opens");
    let names = checkpoint.inventory.entries().map(|(_, e)| e.name.clone());
    let read = |name: String| (name.clone(), checkpoint.read(&name).expect("reads"));
    names.map(read).collect()
}

/// The nearest to a number among those of bf16 or f32, and how far the number is from the middle between two of them.
fn nearest(dtype: Dtype, x: f64) -> (f32, f64) {
    let near = match dtype {
        Dtype::BF16 => half::bf16::from_f32(x as f32).to_f32(),
        _ => x as f32,
    };
    if near == 0.0 {
        return (near, f64::INFINITY);
    }
    let digits = if dtype == Dtype::BF16 { 8 } else { 24 };
    let half_step = 2f64.powi(f64::from(near).abs().log2().floor() as i32 - digits);
    (near, (half_step - (x - f64::from(near)).abs()).abs())
}

#[test]
fn a_merged_lora_is_the_exact_sum_whatever_it_is_merged_into() {
    let world = World::new();
    let (base, split) = decomposed(&world, Dtype::BF16, &[]);
    let options = ["--steps", "6", "--lr", "3e-2", "--train", "norms"];
    let (lora, _) = trained(&world, &base, "lora", &[&AS_LORA[..], &options].concat());
    let less = format!("{}*0.7", arg(&lora));
    let (before, moved) = (tensors(&base), lora_tensors(&lora));
    let merge = |model: &Path, adapters: &[&str], name: &str, more: &[&str]| {
        let out = world.path(name);
        let adapters = adapters.iter().flat_map(|adapter| ["--adapter", adapter]);
        let fixed = ["merge", arg(model), "--out", arg(&out)];
        let all: Vec<&str> = fixed
            .into_iter()
            .chain(adapters)
            .chain(more.iter().copied())
            .collect();
        let facts = world.json(&all);
        (out, facts)
    };
    let (merged, facts) = merge(&base, &[arg(&lora)], "merged", &[]);
    assert_eq!(facts["identical_to_base"], json!(false));
    let (wide, _) = merge(&base, &[arg(&lora)], "wide", &["--dtype", "f32"]);
    let (less, _) = merge(&base, &[&less], "less", &["--dtype", "f32"]);
    for (dir, weight, dtype) in [
        (&merged, 1.0, Dtype::BF16),
        (&wide, 1.0, Dtype::F32),
        (&less, 0.7, Dtype::F32),
    ] {
        let mut seen = 0;
        for (name, found) in tensors(dir) {
            let was = before[&name].to_f32();
            let module = name
                .strip_suffix(".weight")
                .expect("there are weights alone");
            let half = |side| moved.get(&format!("base_model.model.{module}.lora_{side}.weight"));
            let wanted: Vec<f64> = match (half("A"), half("B")) {
                (Some(a), Some(b)) => {
                    let (r, n) = (a.shape[0], a.shape[1]);
                    let (a, b) = (a.to_f32(), b.to_f32());
                    let product = |i: usize, j: usize| -> f64 {
                        (0..r)
                            .map(|k| f64::from(b[i * r + k]) * f64::from(a[k * n + j]))
                            .sum()
                    };
                    // α/r
                    let scale = weight * 6.0 / 4.0;
                    let each = was.iter().enumerate();
                    each.map(|(at, &x)| f64::from(x) + scale * product(at / n, at % n))
                        .collect()
                }
                _ => match moved.get(&format!("base_model.model.{name}")) {
                    Some(whole) => was
                        .iter()
                        .zip(whole.to_f32())
                        .map(|(&x, t)| f64::from(x) + weight * f64::from(t - x))
                        .collect(),
                    None => was.iter().copied().map(f64::from).collect(),
                },
            };
            seen += usize::from(wanted.iter().zip(&was).any(|(w, &x)| *w != f64::from(x)));
            for (&found, wanted) in found.to_f32().iter().zip(wanted) {
                let (near, from_middle) = nearest(dtype, wanted);
                // beside the middle, `nearest` by way of f32, and the sum in f64, decide nothing
                let doubt = if dtype == Dtype::BF16 { 1e-7 } else { 1e-9 };
                assert!(
                    found == near || from_middle < doubt * wanted.abs(),
                    "{name}: {found} for {wanted}"
                );
            }
        }
        let pairs = moved
            .keys()
            .filter(|name| name.contains(".lora_A."))
            .count();
        assert!(
            pairs > 0 && moved.len() > 2 * pairs,
            "linear layers and norms"
        );
        assert_eq!(seen, moved.len() - pairs, "what moved of {}", arg(dir));
    }
    let (measured, wanted) = (
        loss(&world, &[arg(&wide)]),
        loss(&world, &[arg(&base), "--adapter", arg(&lora)]),
    );
    assert!(
        (measured - wanted).abs() < 2e-6 * wanted,
        "{measured} for {wanted}"
    );
    // the same into the decomposition, and not at all
    let (of_split, _) = merge(&split, &[arg(&lora)], "of-split", &[]);
    let (merged, of_split) = (files(&merged), files(&of_split));
    assert!(merged["model.safetensors"] == of_split["model.safetensors"]);
    let nothing = format!("{}*0", arg(&lora));
    let (untrained, facts) = merge(&base, &[&nothing], "untrained", &[]);
    assert_eq!(facts["identical_to_base"], json!(true));
    for (name, bytes) in files(&base) {
        assert!(
            name == "README.md" || files(&untrained)[&name] == bytes,
            "{name}"
        );
    }
    let verified = world.json(&[
        "verify",
        arg(&world.path("merged")),
        "--against",
        arg(&base),
    ]);
    assert_eq!(verified["ok"], json!(true), "{verified}");
    // on its own base it brings what is told of it; another base, though of our making, begins anew
    let report = |dir: &Path| json_file(&dir.join("report.json"));
    let own = report(&world.path("merged"));
    assert_eq!(own["train"]["method"], json!("lora"));
    let (again, _) = merge(&world.path("merged"), &[arg(&lora)], "again", &[]);
    let again = report(&again);
    assert!(again["train"].is_null() && again["evaluate"].is_null());
    let sum = &again["merge"]["base"]["sha256"]["model.safetensors"];
    assert_eq!(*sum, own["merge"]["sha256"]["model.safetensors"]);
    let options = [&AS_LORA[..], &["--steps", "1"]].concat();
    let (second, _) = trained(&world, &world.path("merged"), "second", &options);
    assert!(report(&second)["merge"].is_null());
    // what is not a LoRA stays with decompositions
    let out = world.path("refused");
    for adapters in [&[][..], &["--adapter", arg(&split)]] {
        let fixed = ["merge", arg(&base), "--out", arg(&out)];
        let run = world.run(&[&fixed, adapters].concat());
        run.refuses(&["is not a decomposition"]);
    }
    assert!(!out.exists());
}

#[test]
fn a_lora_that_changes_the_base_is_refused_by_key() {
    let world = World::new();
    let (base, _) = decomposed(&world, Dtype::F32, &[]);
    let options = [&AS_LORA[..], &["--steps", "1"]].concat();
    let (adapter, _) = trained(&world, &base, "lora", &options);
    let evaluate = ["evaluate", arg(&base), "--adapter", arg(&adapter), "--data"];
    let text = fixture("eighty-train.txt");
    let evaluate = [&evaluate[..], &[arg(&text)]].concat();
    let path = adapter.join("adapter_config.json");
    let plain = json_file(&path);
    for (key, value, fine) in [
        ("init_lora_weights", json!("pissa_niter_4"), false),
        ("init_lora_weights", json!("olora"), false),
        ("init_lora_weights", json!("gaussian"), true),
        ("init_lora_weights", json!(false), true),
        ("use_qalora", json!(true), false),
        ("alora_invocation_tokens", json!([1, 2]), false),
        ("layer_replication", json!([[0, 1], [0, 1]]), false),
        ("target_parameters", json!(["mlp.experts.w"]), false),
        ("target_parameters", json!([]), true),
    ] {
        let mut config = plain.clone();
        config[key] = value.clone();
        std::fs::write(&path, config.to_string()).expect("writes");
        let run = world.run(&evaluate);
        match fine {
            true => run.succeeds(),
            false => run.refuses(&["adapter_config.json", key]),
        };
    }
}

#[test]
fn peft_answers_like_the_decoder_that_trained() {
    let packages = "peft, transformers, torch";
    let Some(python) = python(packages, "peft_answers_like_the_decoder_that_trained") else {
        return;
    };
    let world = World::new();
    let (tied, _) = decomposed(&world, Dtype::F32, &[]);
    let mut untied = json_file(&tied.join("config.json"));
    untied["tie_word_embeddings"] = false.into();
    let untied = world.random_model("untied", &untied);
    std::fs::copy(tied.join("tokenizer.json"), untied.join("tokenizer.json")).expect("copies");
    for (base, more) in [(tied, &["--train", "norms"][..]), (untied, &[])] {
        let options = [&AS_LORA[..], more, &["--steps", "8", "--lr", "2e-2"]].concat();
        let name = format!("lora-{}", more.len());
        let (adapter, _) = trained(&world, &base, &name, &options);
        let decoder = with_lora(&base, &adapter);
        let ids: Vec<u32> = (0..40).map(|i| (i * i * 7 + i * 3 + 1) % 512).collect();
        let row = Tensor::from_vec(ids.clone(), (1, 40), &Device::Cpu).expect("ids");
        let logits = decoder.logits(&row).expect("forward");
        let logits = logits
            .get(0)
            .and_then(|l| l.to_dtype(DType::F32)?.to_vec2::<f32>());
        let asked = json!({"ids": ids, "logits": logits.expect("logits")});
        let file = world.path(&format!("{name}.json"));
        std::fs::write(&file, asked.to_string()).expect("writes");
        let facts = checked(&python, &["lora", arg(&base), arg(&adapter), arg(&file)]);
        assert_eq!(facts["alpha"], 6);
        assert_eq!(facts["saved"], if more.is_empty() { 0 } else { 13 });
    }
}

#[test]
fn what_a_method_needs_and_an_export_cannot_hold_is_refused_by_name() {
    let world = World::new();
    let (base, split) = decomposed(&world, Dtype::BF16, &[]);
    let run = |model: &Path, out: &str, options: &[&str]| {
        let all = command(model, &world.path(out), options);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        world.run(&all)
    };
    for method in ["sigma", "lora-xs", "full"] {
        run(&base, "plain", &["--method", method]).refuses(&["not a decomposition", "decompose"]);
    }
    let lora = ["--method", "lora", "--train", "embeddings"];
    run(&split, "lora", &lora).refuses(&["trained embedding", "--method lora"]);
    assert!(!world.path("plain").exists() && !world.path("lora").exists());
    for (method, word) in [
        ("lora-xs", "R of `model.layers.0"),
        ("full", "`model.layers.0"),
    ] {
        let (adapter, _) = trained(
            &world,
            &split,
            method,
            &["--method", method, "--steps", "1"],
        );
        for target in ["peft-lora", "svd-training"] {
            let out = world.path("exported");
            let export = [
                "export",
                arg(&split),
                "--adapter",
                arg(&adapter),
                "--to",
                target,
            ];
            world
                .run(&[&export[..], &["--out", arg(&out)]].concat())
                .refuses(&[word, target, "svdhub merge"]);
            assert!(!out.exists());
        }
    }
}
