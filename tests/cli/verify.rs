//! What `verify` finds.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use svdhub::event::Silent;
use svdhub::weights::{Checkpoint, Dtype, Header, ShardWriter};

use crate::world::{World, arg, files, fixture, tensors, write_model};

/// Verifies as the program does, without starting it anew each time.
fn problems(dir: &Path) -> Vec<svdhub::verify::Problem> {
    match svdhub::verify::run(dir, None, &Silent) {
        Ok(facts) => facts.problems,
        Err(error) => panic!("verify gave up: {error}"),
    }
}

/// Changes bytes all over a directory, one at a time: each change is found, and in a tensor, the tensor is named.
fn assert_every_byte_matters(dir: &Path) {
    assert!(problems(dir).is_empty(), "{:?}", problems(dir));
    svdhub::publish::write_card(dir, "org/name", &Silent).expect("a card");
    let mut all = files(dir);
    for name in ["report.json", "README.md"] {
        all.insert(name.into(), std::fs::read(dir.join(name)).expect("reads"));
    }
    for (name, sound) in all {
        let path = dir.join(&name);
        let tensors = name.ends_with(".safetensors").then(|| {
            let checkpoint = Checkpoint::single(dir, &name).expect("opens");
            checkpoint.inventory.files[0].header.entries.clone()
        });
        // a few hundred places, the ends among them, and in every tensor at least one
        let stride = (sound.len() / 150).max(1) | 1;
        let mut places: Vec<usize> = (0..sound.len()).step_by(stride).collect();
        places.push(sound.len() - 1);
        places.extend(
            tensors
                .iter()
                .flatten()
                .filter(|e| e.bytes > 0)
                .map(|e| (e.offset + e.bytes / 2) as usize),
        );
        for at in places {
            let mut damaged = sound.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, &damaged).expect("writes");
            let found = problems(dir);
            assert!(!found.is_empty(), "byte {at} of {name} goes unseen");
            let hit = tensors.iter().flatten().find(|entry| {
                let range = entry.offset as usize..(entry.offset + entry.bytes) as usize;
                range.contains(&at)
            });
            if let Some(entry) = hit {
                let named = |p: &svdhub::verify::Problem| p.tensor.as_deref() == Some(&entry.name);
                assert!(found.iter().any(named), "{at}: {} in {found:?}", entry.name);
                assert!(found.iter().all(|p| p.file == name), "{found:?}");
            }
        }
        std::fs::write(&path, &sound).expect("writes");
    }
}

fn small_base(world: &World) -> PathBuf {
    let config = json!({"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256, "tie_word_embeddings": false, "rms_norm_eps": 1e-6});
    let base = world.random_model("base", &config);
    std::fs::write(base.join("generation_config.json"), "{\"eos_token_id\": 2}").expect("writes");
    base
}

#[test]
fn a_model_merged_to_another_dtype_is_held_to_that_one() {
    let world = World::new();
    let base = small_base(&world);
    let (split, merged) = (world.path("split"), world.path("merged"));
    world.json(&["decompose", arg(&base), "--out", arg(&split)]);
    world.json(&[
        "merge",
        arg(&split),
        "--out",
        arg(&merged),
        "--dtype",
        "f16",
    ]);
    let verify = ["verify", arg(&merged), "--against", arg(&base)];
    let facts = world.json(&verify);
    assert_eq!(facts["problems"], json!([]));
    let checks = facts["checks"].to_string();
    assert!(checks.contains("in F16 as merged"), "{checks}");

    // one tensor is the base's own
    let mut all = tensors(&merged);
    let name = "model.norm.weight";
    all.insert(name.into(), tensors(&base).remove(name).expect("a norm"));
    write_model(&merged, &all, u64::MAX);
    let run = world.run(&[&verify[..], &["--json"]].concat());
    let facts: Value = serde_json::from_str(&run.stdout).expect("facts");
    let problems = facts["problems"].as_array().expect("a list");
    let told = |p: &&Value| {
        p["tensor"] == name && p["expected"] == "F16 [16]" && p["found"] == "BF16 [16]"
    };
    assert_eq!(problems.iter().filter(told).count(), 1, "{problems:?}");
}

#[test]
fn one_changed_byte_anywhere_in_a_decomposition_is_found() {
    let world = World::new();
    let base = small_base(&world);
    for (name, options) in [
        ("residual", vec!["--layout", "residual"]),
        ("sidecar", vec!["--layout", "sidecar"]),
        (
            "shards",
            vec![
                "--shard-size",
                "6kB",
                "--factors-dtype",
                "bf16",
                "--rank",
                "4",
            ],
        ),
    ] {
        let out = world.path(name);
        let fixed = ["decompose", arg(&base), "--out", arg(&out)];
        world.run(&[&fixed[..], &options].concat()).succeeds();
        assert_every_byte_matters(&out);
    }
}

#[test]
fn one_changed_byte_anywhere_in_a_merged_model_an_adapter_or_an_export_is_found() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, 600_000);
    let (split, adapter, merged) = (
        world.path("svd"),
        world.path("adapter"),
        world.path("model"),
    );
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    world
        .run(&[&decompose[..], &["--include", "layers.0"]].concat())
        .succeeds();
    let data = fixture("eighty-heldout.txt");
    let train = [
        "train",
        arg(&split),
        "--data",
        arg(&data),
        "--out",
        arg(&adapter),
    ];
    let options = ["--steps", "2", "--length", "32", "--train", "norms"];
    world.run(&[&train[..], &options].concat()).succeeds();
    assert_every_byte_matters(&adapter);
    let merge = [
        "merge",
        arg(&split),
        "--adapter",
        arg(&adapter),
        "--out",
        arg(&merged),
    ];
    world.run(&merge).succeeds();
    assert_every_byte_matters(&merged);
    for target in ["peft-lora", "svd-training"] {
        let out = world.path(target);
        let fixed = ["export", arg(&split), "--adapter", arg(&adapter)];
        let options = ["--to", target, "--out", arg(&out)];
        world.run(&[&fixed[..], &options].concat()).succeeds();
        assert_every_byte_matters(&out);
    }
}

#[test]
fn a_foreign_lora_without_a_report_is_read_as_far_as_it_speaks_for_itself() {
    let world = World::new();
    let dir = world.path("lora");
    std::fs::create_dir(&dir).expect("creates");
    std::fs::write(dir.join("adapter_config.json"), "{\"peft_type\": \"LORA\"}").expect("writes");
    let save = |rank_of_b: usize| {
        let module = "base_model.model.model.layers.0.mlp.up_proj";
        let (a, b) = (
            format!("{module}.lora_A.weight"),
            format!("{module}.lora_B.weight"),
        );
        let shapes = [(a.as_str(), [2, 3]), (b.as_str(), [4, rank_of_b])];
        let header = Header::compose(shapes.iter().map(|(n, s)| (*n, Dtype::F32, &s[..])))
            .expect("a header");
        let mut writer =
            ShardWriter::create(&dir.join("adapter_model.safetensors"), header).expect("creates");
        for (name, shape) in shapes {
            let bytes: Vec<u8> = (0..shape[0] * shape[1])
                .flat_map(|i| (i as f32).to_le_bytes())
                .collect();
            writer.put(name, &bytes).expect("writes");
        }
        writer.finish().expect("finishes");
    };
    save(2);
    assert!(problems(&dir).is_empty(), "{:?}", problems(&dir));
    save(1);
    let found = problems(&dir);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].expected.contains("one rank"), "{found:?}");
}

/// Changes the section of a decomposition, and seals it as its author would.
fn reseal(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let config = dir.join("config.json");
    let mut value: Value =
        serde_json::from_slice(&std::fs::read(&config).expect("reads")).expect("JSON");
    edit(&mut value);
    let bytes = serde_json::to_vec_pretty(&value).expect("serialises");
    std::fs::write(&config, &bytes).expect("writes");
    let index = dir.join("svd.safetensors.index.json");
    let mut value: Value =
        serde_json::from_slice(&std::fs::read(&index).expect("reads")).expect("JSON");
    value["metadata"]["sha256"]["files"]["config.json"] = svdhub::sum::sha256_hex(&bytes).into();
    std::fs::write(
        &index,
        serde_json::to_vec_pretty(&value).expect("serialises"),
    )
    .expect("writes");
}

#[test]
fn what_its_author_sealed_must_be_a_decomposition_all_the_same() {
    let world = World::new();
    let base = small_base(&world);
    let whole = world.path("whole");
    world
        .run(&["decompose", arg(&base), "--out", arg(&whole)])
        .succeeds();
    let check = |name: &str, edit: fn(&mut Value)| {
        let dir = world.path(name);
        std::fs::create_dir(&dir).expect("creates");
        for (name, bytes) in files(&whole) {
            std::fs::write(dir.join(name), bytes).expect("writes");
        }
        reseal(&dir, edit);
        problems(&dir)
    };
    assert!(check("same", |_| {}).is_empty());
    let found = check("none", |config| config["svd"]["modules"] = json!({}));
    assert!(!found.is_empty(), "no weight comes back");
    let found = check("sigma", |config| {
        let modules = config["svd"]["modules"].as_object_mut().expect("modules");
        modules.values_mut().next().expect("one")["sigma_max"] = json!(1e9);
    });
    assert!(
        found.iter().any(|it| it.expected.contains("1e9")),
        "{found:?}"
    );
    let found = check("pin", |config| {
        let sums = config["svd"]["base"]["sha256"]
            .as_object_mut()
            .expect("sums");
        *sums.values_mut().next().expect("one") = "0".repeat(64).into();
    });
    assert!(
        found.iter().any(|it| it.file.starts_with("model")),
        "{found:?}"
    );
    // σ of a sidecar is held to what is said of it, its base gone
    let sidecar = world.path("sidecar");
    let decompose = ["decompose", arg(&base), "--layout", "sidecar", "--out"];
    world
        .run(&[&decompose[..], &[arg(&sidecar)]].concat())
        .succeeds();
    std::fs::remove_dir_all(sidecar.join(".svdhub")).expect("removes");
    assert!(problems(&sidecar).is_empty());
    reseal(&sidecar, |config| {
        let modules = config["svd"]["modules"].as_object_mut().expect("modules");
        modules.values_mut().next().expect("one")["sigma_min"] = json!(1e-9);
    });
    assert!(
        problems(&sidecar)
            .iter()
            .any(|it| it.expected.contains("1e-9"))
    );
    let dir = world.path("files");
    std::fs::create_dir(&dir).expect("creates");
    for (name, bytes) in files(&whole) {
        std::fs::write(dir.join(name), bytes).expect("writes");
    }
    let index = dir.join("svd.safetensors.index.json");
    let mut value: Value =
        serde_json::from_slice(&std::fs::read(&index).expect("reads")).expect("JSON");
    value["metadata"]["sha256"]["files"] = json!({});
    std::fs::write(
        &index,
        serde_json::to_vec_pretty(&value).expect("serialises"),
    )
    .expect("writes");
    assert!(
        problems(&dir).iter().any(|it| it.file == "config.json"),
        "no sum of any file"
    );
}

#[test]
fn an_index_in_another_form_or_with_more_in_it_is_found() {
    let world = World::new();
    let (base, split) = (small_base(&world), world.path("svd"));
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    let path = split.join("svd.safetensors.index.json");
    let sound = std::fs::read(&path).expect("reads");
    let parsed = || -> Value { serde_json::from_slice(&sound).expect("JSON") };
    let pretty = |value: &Value| serde_json::to_vec_pretty(value).expect("JSON");
    assert_eq!(pretty(&parsed()), sound);
    let mut more = parsed();
    more["metadata"]["author"] = "somebody".into();
    let mut orphan = parsed();
    orphan["metadata"]["sha256"]["tensors"]["nowhere"] = "0".repeat(64).into();
    let mut elsewhere = parsed();
    elsewhere["metadata"]["sha256"]["files"]["nowhere.txt"] = "0".repeat(64).into();
    for (what, bytes) in [
        ("compact", parsed().to_string().into_bytes()),
        ("another key", pretty(&more)),
        ("the sum of no tensor", pretty(&orphan)),
        ("the sum of no file", pretty(&elsewhere)),
    ] {
        std::fs::write(&path, bytes).expect("writes");
        let found = problems(&split);
        assert_eq!(found.len(), 1, "{what}: {found:?}");
    }
}
