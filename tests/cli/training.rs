//! Training moves what it should, and merging keeps it.

use std::path::{Path, PathBuf};

use serde_json::Value;
use svdhub::weights::{Checkpoint, Dtype, Layout};

use crate::world::{World, arg, files, fixture, loss, tensors, write_model};

fn decomposed(world: &World, options: &[&str]) -> PathBuf {
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    world
        .run(&[&["decompose", arg(&base), "--out", arg(&split)], options].concat())
        .succeeds();
    split
}

fn trained(world: &World, split: &Path, name: &str, options: &[&str]) -> (PathBuf, Value) {
    let (out, data) = (world.path(name), fixture("eighty-train.txt"));
    let base = [
        "train",
        arg(split),
        "--data",
        arg(&data),
        "--out",
        arg(&out),
        "--lr",
        "5e-2",
        "--length",
        "64",
    ];
    let facts = world.json(&[&base, options].concat());
    (out, facts)
}

#[test]
fn merged_model_answers_like_the_trained_one() {
    let world = World::new();
    let split = decomposed(&world, &["--rank-fraction", "0.3"]);
    let (adapter, facts) = trained(
        &world,
        &split,
        "adapter",
        &["--steps", "25", "--train", "norms"],
    );
    assert_eq!(facts["trained"], serde_json::json!(["sigma", "norms"]));
    let base = loss(&world, &[arg(&split)]);
    let before = loss(&world, &[arg(&split), "--adapter", arg(&adapter)]);
    assert!(
        before < base - 0.2,
        "training moved the held-out loss from {base} to {before}"
    );

    let merged = world.path("merged-f32");
    let facts = world.json(&[
        "merge",
        arg(&split),
        "--adapter",
        arg(&adapter),
        "--out",
        arg(&merged),
        "--dtype",
        "f32",
    ]);
    assert_eq!(facts["identical_to_base"], false);
    let original = world.path("base");
    world
        .run(&["verify", arg(&merged), "--against", arg(&original)])
        .succeeds();
    let after = loss(&world, &[arg(&merged)]);
    // some hundred f32 roundings in each of two evaluation orders, averaged over ten thousand tokens
    assert!(
        (after - before).abs() < 2e-6 * before,
        "{after} instead of {before}"
    );

    let merged = world.path("merged");
    let facts = world.json(&[
        "merge",
        arg(&split),
        "--adapter",
        arg(&adapter),
        "--out",
        arg(&merged),
    ]);
    assert!(facts["rounding_loss"].as_f64().expect("a share") < 0.05);
    let after = loss(&world, &[arg(&merged)]);
    assert!(
        (after - before).abs() < 2e-3 * before,
        "{after} instead of {before} in bf16"
    );
    let base = world.path("base");
    world
        .run(&["verify", arg(&merged), "--against", arg(&base)])
        .succeeds();
}

#[test]
fn adapters_add_linearly_and_cancel() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (a, _) = trained(&world, &split, "a", &["--steps", "8"]);
    let (b, _) = trained(&world, &split, "b", &["--steps", "8", "--seed", "1"]);
    let with = |parts: &[String]| {
        let mut arguments = vec![arg(&split)];
        for part in parts {
            arguments.extend(["--adapter", part]);
        }
        loss(&world, &arguments)
    };
    let (a, b) = (arg(&a).to_string(), arg(&b).to_string());
    let base = with(&[]);
    let alone = with(std::slice::from_ref(&a));
    assert!((alone - base).abs() > 1e-2);
    assert_eq!(
        with(&[a.clone(), format!("{a}*-1")]),
        base,
        "an adapter and its negation cancel to the bit"
    );
    assert_eq!(with(&[format!("{a}*0.5"), format!("{a}*0.5")]), alone);
    let both = with(&[format!("{a}*0.5"), format!("{b}*0.5")]);
    assert!(both < base && both != alone);
    let merged = world.path("cancelled");
    let facts = world.json(&[
        "merge",
        arg(&split),
        "--adapter",
        &a,
        "--adapter",
        &format!("{a}*-1"),
        "--out",
        arg(&merged),
    ]);
    assert_eq!(facts["identical_to_base"], true);
}

#[test]
fn the_learning_rate_grows_and_falls_as_it_was_asked_to() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let data = fixture("eighty-train.txt");
    let arguments =
        "--out a --steps 4 --warmup 2 --lr 1e-2 --schedule linear --length 32 --batch 1";
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let train = ["train", arg(&split), "--data", arg(&data)];
    let run = world.run(&[&train[..], &arguments].concat()).succeeds();
    for (step, rate) in [(1, "5.0e-3"), (2, "1.0e-2"), (3, "1.0e-2"), (4, "5.0e-3")] {
        let mut lines = run.stderr.lines();
        let line = lines.find(|line| line.starts_with(&format!("step     {step} of 4")));
        let line = line.unwrap_or_else(|| panic!("{}", run.stderr));
        assert!(line.contains(&format!("lr {rate} ")), "{line}");
    }
}

#[test]
fn numbers_that_leave_f32_in_the_last_update_are_no_adapter() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let data = fixture("eighty-train.txt");
    let train = ["train", arg(&split), "--data", arg(&data), "--out"];
    let broken = ["broken", "--batch", "1", "--steps", "1", "--lr", "1e308"];
    let run = world.run(&[&train[..], &broken].concat());
    run.refuses(&["became", "in training", "lower --lr"]);
    assert!(!world.path("broken/svd_adapter.json").exists());
    // and what no machine holds is not begun
    for (option, word) in [
        (["--batch", "18446744073709551615"], "a count"),
        (["--batch", "1000000"], "no room"),
    ] {
        let run = world.run(&[&train[..], &["large"], &option].concat());
        assert!(
            run.code != Some(0) && run.stderr.contains(word),
            "{}",
            run.stderr
        );
    }
    let lora = ["large", "--method", "lora", "--lora-rank", "1000000"];
    world
        .run(&[&train[..], &lora].concat())
        .refuses(&["no room", "--batch"]);
    assert!(!world.path("large").exists());
}

#[test]
fn what_has_no_room_is_planned_as_it_was_decomposed() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let data = fixture("eighty-train.txt");
    let weights = |options: &[&str]| -> u64 {
        let split = world.path(&format!("svd{}", options.len()));
        let decompose = ["decompose", arg(&base), "--out", arg(&split)];
        world.run(&[&decompose[..], options].concat()).succeeds();
        let large = ["--out", "a", "--batch", "1000000"];
        let train = ["train", arg(&split), "--data", arg(&data)];
        let run = world.run(&[&train[..], &large].concat());
        let run = run.refuses(&["no room", "bytes for weights"]);
        let (before, _) = run.stderr.split_once(" bytes for weights").expect("said");
        let digits = before.rsplit(' ').next().expect("a number");
        digits.parse().expect("a number")
    };
    let (all, one) = (weights(&[]), weights(&["--include", "*.0.mlp.up_proj"]));
    let plan = world.json(&["plan", arg(&base)]);
    let left_out = |module: &&Value| {
        module["action"] == "decompose" && module["name"] != "model.layers.0.mlp.up_proj.weight"
    };
    let modules = plan["modules"].as_array().expect("a list");
    // f32: u, v and what moves
    let kept = modules.iter().filter(left_out).map(|module| {
        let sides = [0, 1].map(|at| module["shape"][at].as_u64().expect("a side"));
        4 * module["q"].as_u64().expect("a rank") * (sides[0] + sides[1] + 1)
    });
    assert_eq!(all - one, kept.sum::<u64>());
}

#[test]
fn a_stored_copy_of_a_tied_head_moves_with_the_embedding() {
    let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let mut weights = tensors(&base);
    weights.insert(head.into(), weights[embedding].clone());
    write_model(&base, &weights, u64::MAX);
    let split = world.path("svd");
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    world.run(&decompose).succeeds();
    let moving = ["--train", "embeddings", "--steps", "2"];
    let (adapter, _) = trained(&world, &split, "adapter", &moving);
    for (name, rounding) in [("nearest", "nearest"), ("stochastic", "stochastic")] {
        let merged = world.path(name);
        let merge = [
            "merge",
            arg(&split),
            "--adapter",
            arg(&adapter),
            "--out",
            arg(&merged),
            "--rounding",
            rounding,
        ];
        world.run(&merge).succeeds();
        let merged = tensors(&merged);
        assert!(merged[head] == merged[embedding], "one weight, {rounding}");
        assert!(merged[head] != weights[head], "it moved");
    }
}

#[test]
fn what_only_zeros_reach_is_told_and_the_rest_is_trained() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    // a block as it is put into a model to be trained later: it adds nothing yet
    let mut weights = tensors(&base);
    for module in ["self_attn.o_proj", "mlp.down_proj"] {
        let weight = weights.get_mut(&format!("model.layers.1.{module}.weight"));
        weight.expect("a weight").bytes.fill(0);
    }
    write_model(&base, &weights, u64::MAX);
    let (split, out) = (world.path("svd"), world.path("adapter"));
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    world.run(&decompose).succeeds();
    let data = fixture("eighty-train.txt");
    let train = |out: &Path, length: &str| {
        let train = ["train", arg(&split), "--data", arg(&data)];
        let more = ["--out", arg(out), "--steps", "3", "--length", length];
        world.run(&[&train[..], &more].concat()).succeeds().stderr
    };
    // from the second step on, what moved in the first lets gradients through
    let said = train(&out, "64");
    assert!(!said.contains("only zeros"), "{said}");
    // one token sees nothing but itself
    let said = train(&world.path("short"), "2");
    assert!(
        said.contains("only zeros reach model.layers.0.") && said.contains("more"),
        "{said}"
    );
}

#[test]
fn an_adapter_of_another_decomposition_is_refused() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (adapter, _) = trained(&world, &split, "adapter", &["--steps", "2"]);
    let other = world.path("other");
    world
        .run(&[
            "decompose",
            arg(&world.path("base")),
            "--out",
            arg(&other),
            "--rank",
            "5",
        ])
        .succeeds();
    let out = world.path("merged");
    world
        .run(&[
            "merge",
            arg(&other),
            "--adapter",
            arg(&adapter),
            "--out",
            arg(&out),
        ])
        .refuses(&[
            "another decomposition",
            "expected",
            "found",
            "svd_adapter.json",
        ]);
    assert!(!out.exists());
}

#[test]
fn a_sidecar_trains_like_a_residual() {
    let world = World::new();
    let residual = decomposed(&world, &[]);
    let sidecar = world.path("sidecar");
    world
        .run(&[
            "decompose",
            arg(&world.path("base")),
            "--out",
            arg(&sidecar),
            "--layout",
            "sidecar",
        ])
        .succeeds();
    let (_, a) = trained(&world, &residual, "a", &["--steps", "5"]);
    let (_, b) = trained(&world, &sidecar, "b", &["--steps", "5"]);
    assert_eq!(a["losses"], b["losses"], "M is the same to the bit");
    let size = |dir: &Path| {
        std::fs::metadata(dir.join("svd-00001-of-00001.safetensors"))
            .expect("a shard")
            .len()
    };
    assert!(size(&sidecar) < size(&residual) / 4);
}

#[test]
fn jsonl_trains_like_text_documents() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let data = world.path("data.jsonl");
    let text = std::fs::read_to_string(fixture("eighty-train.txt")).expect("reads");
    let lines: Vec<String> = text
        .split("\n\n")
        .map(|p| serde_json::json!({"text": p}).to_string())
        .collect();
    std::fs::write(&data, lines.join("\n")).expect("writes");
    let out = world.path("adapter");
    let facts = world.json(&[
        "train",
        arg(&split),
        "--data",
        arg(&data),
        "--out",
        arg(&out),
        "--steps",
        "3",
        "--length",
        "32",
    ]);
    assert_eq!(facts["losses"].as_array().map(Vec::len), Some(3));
    assert!(facts["data_tokens"].as_u64() > Some(60_000));
}

#[test]
fn what_sixteen_bits_would_erase_is_warned_of_and_survives_stochastic_rounding() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (adapter, _) = trained(&world, &split, "adapter", &["--steps", "3"]);
    // a thousandth of what was trained: far below half a step of bf16
    let faint = format!("{}*0.001", arg(&adapter));
    let merge = |name: &str, options: &[&str]| {
        let out = world.path(name);
        let fixed = [
            "merge",
            arg(&split),
            "--adapter",
            &faint,
            "--out",
            arg(&out),
        ];
        let run = world
            .run(&[&fixed, options, &["--json"]].concat())
            .succeeds();
        let facts: Value = serde_json::from_str(&run.stdout).expect("JSON");
        (run.stderr, facts, files(&out))
    };
    let kept = |facts: &Value| facts["kept_effect"].as_f64().expect("a share");
    let (said, nearest, _) = merge("nearest", &[]);
    assert!(kept(&nearest) < 0.5, "{nearest}");
    for word in ["erased", "--rounding stochastic", "--dtype f32"] {
        assert!(said.contains(word), "{said}");
    }
    let stochastic = ["--rounding", "stochastic", "--seed", "7"];
    let (said, facts, once) = merge("stochastic", &stochastic);
    assert!((kept(&facts) - 1.0).abs() < 0.2, "{}", facts["kept_effect"]);
    assert!(!said.contains("erased"), "{said}");
    let (_, _, again) = merge("again", &stochastic);
    assert!(once == again, "the same seed gives the same bytes");
    let (_, _, other) = merge("other", &["--rounding", "stochastic", "--seed", "8"]);
    assert!(once["model.safetensors"] != other["model.safetensors"]);
    let (_, wide, _) = merge("wide", &["--dtype", "f32"]);
    assert!((kept(&wide) - 1.0).abs() < 1e-3, "{}", wide["kept_effect"]);
}

#[test]
fn a_mixture_is_the_weighted_sum_of_the_merged_weights() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    world.run(&decompose).succeeds();
    let norms = ["--steps", "4", "--train", "norms"];
    let (a, _) = trained(&world, &split, "a", &norms);
    let (b, _) = trained(
        &world,
        &split,
        "b",
        &[&norms[..], &["--seed", "1"]].concat(),
    );
    let merged = |name: &str, adapters: &[String]| {
        let out = world.path(name);
        let mut arguments = vec!["merge", arg(&split), "--dtype", "f32", "--out", arg(&out)];
        adapters
            .iter()
            .for_each(|adapter| arguments.extend(["--adapter", adapter]));
        world.run(&arguments).succeeds();
        Checkpoint::open(&out, Layout::Model).expect("opens")
    };
    let (a, b) = (arg(&a).to_string(), arg(&b).to_string());
    let (wa, wb) = (
        merged("wa", std::slice::from_ref(&a)),
        merged("wb", std::slice::from_ref(&b)),
    );
    let mixture = merged("mixture", &[format!("{a}*0.7"), format!("{b}*-0.3")]);
    let original = Checkpoint::open(&base, Layout::Model).expect("opens");
    let mut moved = 0;
    for (_, entry) in original.inventory.entries() {
        let of = |model: &Checkpoint| model.read(&entry.name).expect("reads").to_f32();
        let (m, wa, wb, found) = (of(&original), of(&wa), of(&wb), of(&mixture));
        for i in 0..m.len() {
            let [x, a, b] = [m[i], wa[i], wb[i]].map(f64::from);
            let expected = x + 0.7 * (a - x) - 0.3 * (b - x);
            // each of the three was rounded once to f32, and Δσ of the mixture once: half a unit each
            let scale = x.abs().max(a.abs()).max(b.abs());
            let error = 2.0 * f64::from(f32::EPSILON) * scale;
            let change = (a - x).abs() + (b - x).abs();
            let allowed = error + change * 1e-5;
            let off = (f64::from(found[i]) - expected).abs();
            assert!(off <= allowed, "{} {i}: {off} > {allowed}", entry.name);
            moved += usize::from(a != x);
        }
    }
    assert!(moved > 100_000, "{moved} elements moved");
}
