//! A head that is tied to the embedding, split on its own.

use std::path::{Path, PathBuf};

use serde_json::json;
use svdhub::adapter::Adapter;
use svdhub::weights::{Dtype, Elements};

use crate::world::{
    World, arg, files, fixture, json_file, loss, modules, remake, tensors, write_model,
};

/// decompose --untie-head → merge: the base's tensors to the byte, and the embedding once more as the head.
fn assert_untied(world: &World, base: &Path, options: &[&str]) -> (PathBuf, PathBuf) {
    let name = format!(
        "{}{}",
        base.file_name().expect("a name").to_string_lossy(),
        options.join("")
    );
    let (split, merged) = (
        world.path(&format!("{name}-svd")),
        world.path(&format!("{name}-merged")),
    );
    let facts = world.json(
        &[
            &["decompose", arg(base), "--out", arg(&split), "--untie-head"],
            options,
        ]
        .concat(),
    );
    assert_eq!(facts["untied_head"], true);
    let record = &modules(&split)["lm_head"];
    assert_eq!(record["tied_to"], "model.embed_tokens");
    assert_eq!(
        json_file(&split.join("config.json"))["tie_word_embeddings"],
        false
    );
    world
        .run(&["verify", arg(&split), "--against", arg(base)])
        .succeeds();

    let facts = world.json(&["merge", arg(&split), "--out", arg(&merged)]);
    assert_eq!(facts["tensors_identical_to_base"], true);
    let mut expected = tensors(base);
    expected.insert(
        "lm_head.weight".into(),
        expected["model.embed_tokens.weight"].clone(),
    );
    let found = tensors(&merged);
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (tensor, elements) in expected {
        assert!(found[&tensor] == elements, "{tensor} of {name} differs");
    }
    let mut config = json_file(&base.join("config.json"));
    config["tie_word_embeddings"] = false.into();
    assert_eq!(json_file(&merged.join("config.json")), config);
    world
        .run(&["verify", arg(&merged), "--against", arg(base)])
        .succeeds();
    (split, merged)
}

#[test]
fn an_untied_head_begins_as_the_embedding() {
    let world = World::new();
    for (name, dtype, shard_bytes) in [
        ("single", Dtype::BF16, u64::MAX),
        ("shards", Dtype::F32, 1_500_000),
    ] {
        let base = world.model(name, dtype, shard_bytes);
        let before = loss(&world, &[arg(&base)]);
        for layout in ["residual", "sidecar"] {
            let (split, merged) = assert_untied(&world, &base, &["--layout", layout]);
            for model in [&split, &merged] {
                let after = loss(&world, &[arg(model)]);
                assert!(
                    (after - before).abs() < 1e-6,
                    "{after} instead of {before} in {}",
                    model.display()
                );
            }
        }
    }
    // the index counts the head
    let merged = world.path("shards--layoutresidual-merged");
    let index = json_file(&merged.join("model.safetensors.index.json"));
    let bytes: usize = tensors(&merged).values().map(|t| t.bytes.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
    let text = world
        .run(&[
            "merge",
            arg(&world.path("single--layoutsidecar-svd")),
            "--out",
            arg(&world.path("again")),
        ])
        .succeeds();
    assert!(
        text.stdout.contains("every tensor of the base") && text.stdout.contains("untied"),
        "{}",
        text.stdout
    );
}

#[test]
fn an_untied_head_is_trained_and_the_embedding_is_not() {
    let world = World::new();
    let base = world.model("base", Dtype::F32, u64::MAX);
    let data = fixture("eighty-train.txt");
    for layout in ["residual", "sidecar"] {
        let (split, adapter) = (
            world.path(&format!("svd-{layout}")),
            world.path(&format!("adapter-{layout}")),
        );
        let options = ["--untie-head", "--energy", "0.5", "--layout", layout];
        world
            .run(
                &[
                    &["decompose", arg(&base), "--out", arg(&split)],
                    &options[..],
                ]
                .concat(),
            )
            .succeeds();
        let before = loss(&world, &[arg(&split)]);
        let train = [
            "train",
            arg(&split),
            "--data",
            arg(&data),
            "--out",
            arg(&adapter),
            "--steps",
            "10",
            "--lr",
            "5e-2",
            "--length",
            "64",
        ];
        world.run(&train).succeeds();
        let moved = Adapter::read(&adapter).expect("reads").delta["lm_head"].clone();
        assert!(moved.iter().all(|&d| d != 0.0), "{moved:?}");
        let trained = loss(&world, &[arg(&split), "--adapter", arg(&adapter)]);
        assert!(
            trained < before - 0.1,
            "training moved the held-out loss from {before} to {trained}"
        );
        let merged = world.path(&format!("merged-{layout}"));
        let facts = world.json(&[
            "merge",
            arg(&split),
            "--adapter",
            arg(&adapter),
            "--out",
            arg(&merged),
        ]);
        assert_eq!(facts["tensors_identical_to_base"], false);
        let after = loss(&world, &[arg(&merged)]);
        // some hundred f32 roundings in each of two evaluation orders, averaged over ten thousand tokens
        assert!(
            (after - trained).abs() < 2e-6 * trained,
            "{after} instead of {trained}"
        );
        let (base, merged) = (tensors(&base), tensors(&merged));
        let embedding = "model.embed_tokens.weight";
        assert!(merged[embedding] == base[embedding], "the embedding moved");
        assert!(
            merged["lm_head.weight"] != base[embedding],
            "the head did not move"
        );
    }
}

#[test]
fn a_stored_copy_of_a_tied_head_is_untied_in_place() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let mut weights = tensors(&base);
    weights.insert(
        "lm_head.weight".into(),
        weights["model.embed_tokens.weight"].clone(),
    );
    write_model(&base, &weights, u64::MAX);
    for layout in ["residual", "sidecar"] {
        let (_, merged) = assert_untied(&world, &base, &["--layout", layout, "--budget", "300"]);
        // nothing had to be added: the weights are the base's file, the config alone says that the head is its own
        assert!(files(&merged)["model.safetensors"] == files(&base)["model.safetensors"]);
    }
    // without being asked the model stays as it is
    let plan = world.json(&["plan", arg(&base)]);
    let head = plan["modules"]
        .as_array()
        .expect("modules")
        .iter()
        .find(|m| m["name"] == "lm_head.weight")
        .cloned();
    assert_eq!(head.expect("the head")["action"], "copy");

    let other = world.path("other");
    let head = weights.get_mut("lm_head.weight").expect("the head");
    head.bytes[100] ^= 1;
    write_model(&base, &weights, u64::MAX);
    world
        .run(&[
            "decompose",
            arg(&base),
            "--out",
            arg(&other),
            "--untie-head",
        ])
        .refuses(&[
            "cannot be untied",
            "differs from `model.embed_tokens.weight`",
            "--untie-head",
        ]);
}

#[test]
fn a_head_that_cannot_be_untied_is_refused_with_the_reason() {
    let world = World::new();
    let config = |tied: bool| {
        json!({"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": tied})
    };
    let own = world.random_model("own", &config(false));
    let inner = world.random_model("inner", &config(true));
    let named = |(name, tensor): (String, Elements)| (name.replacen("model.", "", 1), tensor);
    let weights = tensors(&inner).into_iter().map(named).collect();
    write_model(&inner, &weights, u64::MAX);
    for (model, options, words) in [
        (&own, vec![], "a weight of its own already"),
        (&inner, vec![], "no `model.` before its names"),
    ] {
        for verb in [vec!["plan"], vec!["decompose", "--out", "never"]] {
            let arguments = [&verb[..], &[arg(model), "--untie-head"], &options[..]].concat();
            world
                .run(&arguments)
                .refuses(&["cannot be untied", words, "leave out --untie-head"]);
        }
    }
    assert!(!world.path("never").exists());
    let tied = world.random_model("tied", &config(true));
    for (options, words) in [
        (["--exclude", "lm_head"], "`lm_head` is excluded"),
        (["--include", "mlp"], "`lm_head` is not included"),
    ] {
        world
            .run(&[&["plan", arg(&tied), "--untie-head"], &options[..]].concat())
            .refuses(&["cannot be untied", words]);
    }
    assert_untied(&world, &tied, &["--include", "lm_head"]);
}

#[test]
fn a_head_said_to_copy_another_weight_is_refused() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    let options = ["--untie-head", "--layout", "sidecar"];
    world
        .run(
            &[
                &["decompose", arg(&base), "--out", arg(&split)],
                &options[..],
            ]
            .concat(),
        )
        .succeeds();
    let data = fixture("eighty-heldout.txt");
    let mut config = json_file(&split.join("config.json"));
    for (i, (other, word)) in [
        ("model.layers.0.mlp.down_proj", "sha256"),
        ("model.nothing", "missing"),
    ]
    .into_iter()
    .enumerate()
    {
        config["svd"]["modules"]["lm_head"]["tied_to"] = other.into();
        remake(&split, "config.json", &config.to_string());
        let merged = world.path(&format!("merged-{i}"));
        world
            .run(&["merge", arg(&split), "--out", arg(&merged)])
            .refuses(&[word]);
        assert!(!merged.join("config.json").exists());
        world
            .run(&["evaluate", arg(&split), "--data", arg(&data)])
            .refuses(&[word]);
    }
}
