//! Untrained means unchanged.

use std::path::Path;

use serde_json::{Value, json};
use svdhub::weights::Dtype;

use crate::world::{World, arg, files};

/// decompose → merge, and every file but the report is the base's own.
fn assert_round_trip(world: &World, base: &Path, options: &[&str]) {
    let name = format!(
        "{}-{}",
        base.file_name().expect("a name").to_string_lossy(),
        options.join("")
    );
    let (split, merged) = (
        world.path(&format!("{name}-svd")),
        world.path(&format!("{name}-merged")),
    );
    world
        .run(&[&["decompose", arg(base), "--out", arg(&split)], options].concat())
        .succeeds();
    world.run(&["verify", arg(&split)]).succeeds();
    let facts = world.json(&["merge", arg(&split), "--out", arg(&merged)]);
    assert_eq!(facts["identical_to_base"], true, "{name}");
    let (mut original, merged) = (files(base), files(&merged));
    original.remove("README.md");
    assert_eq!(
        original.keys().collect::<Vec<_>>(),
        merged.keys().collect::<Vec<_>>()
    );
    for (file, bytes) in original {
        assert!(merged[&file] == bytes, "{file} of {name} differs");
    }
}

#[test]
fn every_byte_returns_in_every_dtype_and_layout() {
    let world = World::new();
    for (dtype, shard_bytes) in [
        (Dtype::BF16, 600_000),
        (Dtype::F16, u64::MAX),
        (Dtype::F32, u64::MAX),
    ] {
        let base = world.model(&format!("{dtype:?}"), dtype, shard_bytes);
        for layout in ["residual", "sidecar"] {
            assert_round_trip(&world, &base, &["--layout", layout]);
        }
    }
}

#[test]
fn every_rank_and_selection_returns_every_byte() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    for options in [
        vec!["--rank-fraction", "1"],
        vec!["--rank-fraction", "0.001"],
        vec!["--rank", "7", "--threads", "1"],
        vec!["--fast"],
        vec!["--include", "q_proj", "--include", "layers.2"],
        vec!["--exclude", "mlp", "--shard-size", "300kB"],
    ] {
        assert_round_trip(&world, &base, &options);
    }
}

#[test]
fn fused_biased_and_untied_families_return_every_byte() {
    let world = World::new();
    let config = |family: &str, tied: bool| {
        json!({"model_type": family, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": tied, "head_dim": 6, "rms_norm_eps": 1e-6})
    };
    for (family, tied) in [
        ("phi3", false),
        ("qwen2", true),
        ("qwen3", true),
        ("mistral", false),
    ] {
        let base = world.random_model(family, &config(family, tied));
        assert_round_trip(&world, &base, &["--rank-fraction", "0.5"]);
        let plan = world.json(&["plan", arg(&base)]);
        let head: Vec<&Value> = plan["modules"]
            .as_array()
            .expect("modules")
            .iter()
            .filter(|m| m["name"] == "lm_head.weight")
            .collect();
        assert_eq!(head.len(), usize::from(!tied));
        assert!(head.iter().all(|m| m["action"] == "decompose"));
    }
}

#[test]
fn a_decomposition_holds_nothing_that_loads_as_a_model() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, 600_000);
    let split = world.path("svd");
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    for name in files(&split).keys() {
        assert!(
            !name.starts_with("model") && !name.starts_with("pytorch_model"),
            "{name}"
        );
    }
}

#[test]
fn one_flipped_byte_is_found_and_named() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    let shard = split.join("svd-00001-of-00001.safetensors");
    let whole = std::fs::read(&shard).expect("reads");
    let checkpoint =
        svdhub::weights::Checkpoint::open(&split, svdhub::weights::Layout::Decomposition)
            .expect("opens");
    for (_, entry) in checkpoint.inventory.entries().step_by(17) {
        let mut broken = whole.clone();
        broken[(entry.offset + entry.bytes / 2) as usize] ^= 1;
        std::fs::write(&shard, &broken).expect("writes");
        let run = world.run(&["verify", arg(&split), "--json"]);
        assert_eq!(run.code, Some(1));
        let facts: Value = serde_json::from_str(&run.stdout).expect("JSON");
        let named = facts["problems"]
            .as_array()
            .expect("problems")
            .iter()
            .any(|p| p["tensor"] == entry.name.as_str());
        assert!(named, "{} is not named in {facts}", entry.name);
    }
    std::fs::write(&shard, &whole).expect("writes");
    world.run(&["verify", arg(&split)]).succeeds();
    // the header and the small files count too
    let mut broken = whole.clone();
    broken[40] ^= 1;
    std::fs::write(&shard, &broken).expect("writes");
    assert_eq!(world.run(&["verify", arg(&split)]).code, Some(1));
    std::fs::write(&shard, &whole).expect("writes");
    let tokenizer = split.join("tokenizer.json");
    let text = std::fs::read_to_string(&tokenizer).expect("reads");
    std::fs::write(&tokenizer, text.replacen('1', "2", 1)).expect("writes");
    let run = world.run(&["verify", arg(&split)]);
    assert!(
        run.code == Some(1) && run.stdout.contains("tokenizer.json"),
        "{}",
        run.stdout
    );
}

#[test]
fn a_changed_base_is_refused_by_name() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    world
        .run(&[
            "decompose",
            arg(&base),
            "--out",
            arg(&split),
            "--layout",
            "sidecar",
        ])
        .succeeds();
    let weights = base.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("reads");
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).expect("writes");
    let merged = world.path("merged");
    world
        .run(&["merge", arg(&split), "--out", arg(&merged)])
        .refuses(&["model.safetensors", "not what was decomposed", "sha256"]);
    assert!(!merged.join("config.json").exists());
}

#[test]
fn a_device_that_is_not_there_is_refused_before_any_work() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let out = world.path("svd");
    let missing = [
        "decompose",
        arg(&base),
        "--out",
        arg(&out),
        "--device",
        "cuda:7",
    ];
    world.run(&missing).refuses(&["cuda:7", "--device cpu"]);
    assert!(!out.exists());
    // `auto` goes on without one
    let auto = [
        "decompose",
        arg(&base),
        "--out",
        arg(&out),
        "--device",
        "auto",
    ];
    world.run(&auto).succeeds();
}

#[test]
fn how_a_weight_was_decomposed_is_on_record() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let (exact, fast) = (world.path("exact"), world.path("fast"));
    for (out, options) in [(&exact, &[][..]), (&fast, &["--fast"])] {
        let decompose = ["decompose", arg(&base), "--out", arg(out)];
        world.run(&[&decompose, options].concat()).succeeds();
        let config = std::fs::read(out.join("config.json")).expect("reads");
        let config: Value = serde_json::from_slice(&config).expect("JSON");
        let svd = &config["svd"];
        assert_eq!(svd["algorithm"]["fast"] == true, out == &fast);
        for (module, record) in svd["modules"].as_object().expect("an object") {
            let certificate = &record["certificate"];
            let at_most = |key: &str, limit: f64| {
                let found = certificate[key].as_f64().expect("a number");
                assert!(found <= limit, "{module}: {key} {found}");
            };
            at_most("orthogonality", 1e-4);
            at_most("link", 1e-4);
            if out == &exact {
                at_most("residual", 5e-3);
                at_most("tail", 1.0001);
                assert_ne!(record["route"], "fast", "{module}");
            }
        }
    }
}
