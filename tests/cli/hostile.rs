//! What strangers, accidents and half-finished work may hand us.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use svdhub::hub::server::{Effect, Fault};
use svdhub::weights::{Checkpoint, Dtype, Elements, Layout};

use crate::world::{Run, World, arg, fixture, tensors, wait_until, write_model};

fn decomposed(world: &World, options: &[&str]) -> PathBuf {
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    world
        .run(&[&["decompose", arg(&base), "--out", arg(&split)], options].concat())
        .succeeds();
    split
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value =
        serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("JSON");
    edit(&mut value);
    std::fs::write(path, value.to_string()).expect("writes");
}

#[test]
fn a_pin_cannot_name_files_elsewhere() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let good = std::fs::read(split.join("config.json")).expect("reads");
    let (out, victim) = (world.path("merged"), world.path("victim.safetensors"));
    std::fs::write(&victim, "precious").expect("writes");
    let sum = "0".repeat(64);
    for (key, value, word) in [
        (
            "sha256",
            json!({arg(&victim): sum}),
            "not a plain file name",
        ),
        (
            "sha256",
            json!({"../victim.safetensors": sum}),
            "not a plain file name",
        ),
        ("sha256", json!({"model.safetensors": "short"}), "sha256"),
        ("sha256", json!({}), "no file"),
        ("revision", json!("../../refs"), "not a commit"),
        ("repo", json!("../../etc"), "names the base"),
    ] {
        std::fs::write(split.join("config.json"), &good).expect("writes");
        edit_json(&split.join("config.json"), |c| {
            c["svd"]["base"][key] = value
        });
        world
            .run(&["merge", arg(&split), "--out", arg(&out)])
            .refuses(&["config.json", "svd", word]);
    }
    std::fs::write(split.join("config.json"), &good).expect("writes");
    edit_json(&split.join("svd.safetensors.index.json"), |i| {
        i["metadata"]["sha256"]["files"]["/dev/zero"] = sum.clone().into();
    });
    assert_eq!(world.run(&["verify", arg(&split)]).code, Some(1));
    assert_eq!(std::fs::read_to_string(&victim).expect("reads"), "precious");
}

/// Puts a file elsewhere and a link in its place.
fn move_behind_a_link(file: &Path, elsewhere: &Path) {
    std::fs::rename(file, elsewhere).expect("moves");
    std::os::unix::fs::symlink(elsewhere, file).expect("links");
}

#[test]
fn links_lead_nowhere_out_of_a_decomposition_or_an_adapter() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (adapter, data) = (world.path("adapter"), fixture("eighty-train.txt"));
    let (out, elsewhere) = (world.path("merged"), world.path("elsewhere"));
    let train = |out: &Path| {
        let (split, data, out) = (arg(&split), arg(&data), arg(out));
        let steps = ["--steps", "1", "--length", "32"];
        world.run(&[&["train", split, "--data", data, "--out", out], &steps[..]].concat())
    };
    train(&adapter).succeeds();
    let merge = || {
        let (split, adapter, out) = (arg(&split), arg(&adapter), arg(&out));
        world.run(&["merge", split, "--adapter", adapter, "--out", out])
    };
    for name in [
        "svd-00001-of-00001.safetensors",
        "svd.safetensors.index.json",
        "config.json",
        "base_config.json",
        "report.json",
        "LICENSE",
    ] {
        let file = split.join(name);
        move_behind_a_link(&file, &elsewhere);
        let words = [name, "link", arg(&elsewhere)];
        merge().refuses(&words);
        train(&world.path("another")).refuses(&words);
        world.run(&["inspect", arg(&split)]).refuses(&words);
        let publish = ["publish", arg(&split), "org/svd", "--dry-run"];
        world.run(&publish).refuses(&words);
        let verify = world.run(&["verify", arg(&split)]);
        assert_eq!(verify.code, Some(1));
        assert!(verify.stdout.contains("link"), "{}", verify.stdout);
        std::fs::rename(&elsewhere, &file).expect("moves back");
    }
    for name in ["adapter.safetensors", "svd_adapter.json", "report.json"] {
        let file = adapter.join(name);
        move_behind_a_link(&file, &elsewhere);
        merge().refuses(&[name, "link", arg(&elsewhere)]);
        std::fs::rename(&elsewhere, &file).expect("moves back");
    }
    assert!(!out.exists(), "nothing was begun");
    // a link that stays at home is a file like others, and a link of one's own model is one's own matter
    move_behind_a_link(&split.join("LICENSE"), &split.join("TERMS"));
    merge().succeeds();
    assert!(!out.join("LICENSE").is_symlink());
    let weights = world.path("base/model.safetensors");
    move_behind_a_link(&weights, &elsewhere);
    world.run(&["plan", arg(&world.path("base"))]).succeeds();
}

#[test]
fn a_snapshot_in_the_cache_may_be_named_as_a_directory() {
    let world = World::with_hub();
    let split = decomposed(&world, &[]);
    world.run(&["publish", arg(&split), "org/svd"]).succeeds();
    world.run(&["verify", "org/svd"]).succeeds();
    let snapshots = world.path("hf/hub/models--org--svd/snapshots");
    let mut commits = std::fs::read_dir(snapshots).expect("lists");
    let snapshot = commits.next().expect("one").expect("an entry").path();
    assert!(snapshot.join("config.json").is_symlink());
    world.run(&["verify", arg(&snapshot)]).succeeds();
    // its neighbours are not its blobs
    let config = snapshot.join("config.json");
    std::fs::remove_file(&config).expect("removes");
    std::os::unix::fs::symlink("../../refs/main", &config).expect("links");
    let words = ["config.json", "link", "refs/main"];
    world.run(&["inspect", arg(&snapshot)]).refuses(&words);
}

#[test]
fn ids_in_a_listing_are_no_paths() {
    let world = World::with_hub();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    let listing = format!(
        r#"[{{"type":"file","oid":"{}","size":6,"path":"LICENSE"}}]"#,
        arg(&world.path("victim"))
    );
    world.hub().inject(Fault {
        matching: "/tree/".into(),
        times: 1,
        effect: Effect::Status {
            status: 200,
            headers: vec![("content-type".into(), "application/json".into())],
            body: listing,
        },
    });
    world.run(&["verify", "org/base"]).refuses(&["victim"]);
}

#[test]
fn changed_weights_are_another_job() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let weights = world.path("base/model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("reads");
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).expect("writes");
    let base = world.path("base");
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .refuses(&["content of the base model"]);
    let against = world.run(&["verify", arg(&split), "--against", arg(&base)]);
    assert!(
        against.code == Some(1) && against.stdout.contains("model.safetensors"),
        "{}",
        against.stdout
    );
}

#[test]
fn a_residual_needs_no_base() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    std::fs::remove_dir_all(world.path("base")).expect("removes");
    world.run(&["verify", arg(&split)]).succeeds();
    let merged = world.path("merged");
    assert_eq!(
        world.json(&["merge", arg(&split), "--out", arg(&merged)])["identical_to_base"],
        true
    );
}

#[test]
fn tensors_of_other_kinds_are_carried_along() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let mut all = tensors(&base);
    let ids = (0..6u8).flat_map(|i| u64::from(i).to_le_bytes()).collect();
    all.insert(
        "model.position_ids".into(),
        Elements {
            dtype: Dtype::I64,
            shape: vec![1, 6],
            bytes: ids,
        },
    );
    write_model(&base, &all, u64::MAX);
    let (split, merged) = (world.path("svd"), world.path("merged"));
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    assert_eq!(
        world.json(&["merge", arg(&split), "--out", arg(&merged)])["identical_to_base"],
        true
    );
    world
        .run(&[
            "merge",
            arg(&split),
            "--out",
            arg(&world.path("f32")),
            "--dtype",
            "f32",
        ])
        .succeeds();
    world.run(&["verify", arg(&world.path("f32"))]).succeeds();

    let clash = all["model.norm.weight"].clone();
    all.insert("model.layers.0.mlp.up_proj.u".into(), clash);
    write_model(&base, &all, u64::MAX);
    world
        .run(&["decompose", arg(&base), "--out", arg(&world.path("clash"))])
        .refuses(&["model.layers.0.mlp.up_proj.u", "name"]);
}

#[test]
fn a_tokenizer_that_truncates_does_not_shorten_the_text() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let data = fixture("eighty-heldout.txt");
    let tokens = |world: &World| {
        world.json(&["evaluate", arg(&base), "--data", arg(&data)])["tokens"].as_u64()
    };
    let whole = tokens(&world);
    edit_json(&base.join("tokenizer.json"), |t| {
        t["truncation"] = json!({"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0});
        t["padding"] = json!({"strategy": {"Fixed": 100000}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"});
    });
    assert_eq!(tokens(&world), whole);
}

#[test]
fn a_tokenizer_that_gives_up_is_an_error() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    edit_json(&base.join("tokenizer.json"), |t| {
        t["normalizer"] = Value::Null;
        t["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false});
    });
    let data = world.path("data.txt");
    std::fs::write(&data, "a".repeat(50) + "!").expect("writes");
    world
        .run(&["evaluate", arg(&base), "--data", arg(&data)])
        .refuses(&["tokenizer.json failed", "retry-limit"]);
}

#[test]
fn documents_end_in_one_end_token_wherever_the_model_names_it() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let data = world.path("data.jsonl");
    std::fs::write(&data, "{\"text\": \"one\"}\n{\"text\": \"two\"}\n").expect("writes");
    let evaluated = || {
        let run = world
            .run(&["evaluate", arg(&base), "--data", arg(&data), "--json"])
            .succeeds();
        let facts: Value = serde_json::from_str(&run.stdout).expect("JSON");
        (facts["tokens"].as_u64().expect("a count"), run.stderr)
    };
    let (tokens, _) = evaluated();
    // one that the tokenizer adds is not added again
    let end = crate::world::json_file(&base.join("config.json"))["eos_token_id"].as_u64();
    let end = end.expect("the fixture names its end");
    let sound = std::fs::read(base.join("tokenizer.json")).expect("reads");
    edit_json(&base.join("tokenizer.json"), |t| {
        let tokens = t["added_tokens"].as_array().expect("a list");
        let token = tokens
            .iter()
            .find(|token| token["id"].as_u64() == Some(end));
        let token = token.expect("the end is a token")["content"].clone();
        let (text, special) = (
            json!({"Sequence": {"id": "A", "type_id": 0}}),
            json!({"SpecialToken": {"id": token, "type_id": 0}}),
        );
        let name = token.as_str().expect("a text").to_string();
        t["post_processor"] = json!({"type": "TemplateProcessing", "single": [text, special], "pair": [],
            "special_tokens": {name: {"id": token, "ids": [end], "tokens": [token]}}});
    });
    assert_eq!(evaluated().0, tokens);
    std::fs::write(base.join("tokenizer.json"), sound).expect("writes");
    // the settings of its texts name it too, and where nothing does, that is said
    edit_json(&base.join("config.json"), |config| {
        config
            .as_object_mut()
            .expect("an object")
            .remove("eos_token_id");
    });
    let settings = base.join("generation_config.json");
    std::fs::write(&settings, format!("{{\"eos_token_id\": [{end}]}}")).expect("writes");
    assert_eq!(evaluated().0, tokens);
    std::fs::remove_file(&settings).expect("removes");
    let (without, said) = evaluated();
    assert!(
        without == tokens - 2 && said.contains("run into each other"),
        "{said}"
    );
}

#[test]
fn unfinished_work_is_not_passed_on() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let merged = world.path("merged");
    world
        .run(&["merge", arg(&split), "--out", arg(&merged)])
        .succeeds();
    edit_json(&merged.join(".svdhub/job.json"), |job| {
        job["finished"] = false.into()
    });
    let data = fixture("eighty-heldout.txt");
    let unfinished = &["unfinished work of `svdhub merge`", "again"];
    world.run(&["verify", arg(&merged)]).refuses(unfinished);
    world
        .run(&["publish", arg(&merged), "org/x", "--dry-run"])
        .refuses(unfinished);
    world
        .run(&["publish", arg(&merged), "org/x"])
        .refuses(unfinished);
    world
        .run(&["evaluate", arg(&merged), "--data", arg(&data)])
        .refuses(unfinished);
    world
        .run(&[
            "decompose",
            arg(&merged),
            "--out",
            arg(&world.path("again")),
        ])
        .refuses(unfinished);
}

#[test]
fn damage_is_found_before_it_is_merged_or_trained() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (data, adapter) = (fixture("eighty-train.txt"), world.path("adapter"));
    world
        .run(&[
            "train",
            arg(&split),
            "--data",
            arg(&data),
            "--out",
            arg(&adapter),
            "--steps",
            "2",
            "--length",
            "32",
        ])
        .succeeds();
    let checkpoint = Checkpoint::open(&split, Layout::Decomposition).expect("opens");
    let shard = split.join("svd-00001-of-00001.safetensors");
    let whole = std::fs::read(&shard).expect("reads");
    for (tensor, named) in [
        (
            "model.layers.2.mlp.up_proj.residual",
            "model.layers.2.mlp.up_proj.weight",
        ),
        ("model.norm.weight", "model.norm.weight"),
    ] {
        let (_, entry) = checkpoint.inventory.get(tensor).expect("is there");
        let mut broken = whole.clone();
        // the top byte of a number: visible in every dtype, and never a NaN
        broken[(entry.offset + entry.bytes - 1) as usize] ^= 0x80;
        std::fs::write(&shard, broken).expect("writes");
        let out = world.path("merged");
        world
            .run(&[
                "merge",
                arg(&split),
                "--adapter",
                arg(&adapter),
                "--out",
                arg(&out),
            ])
            .refuses(&[named, "sha256"]);
        assert!(!out.join("model.safetensors").exists());
        world
            .run(&[
                "train",
                arg(&split),
                "--data",
                arg(&data),
                "--out",
                arg(&world.path("a2")),
                "--steps",
                "1",
            ])
            .refuses(&[named, "sha256"]);
    }
}

#[test]
fn changed_small_files_are_found_before_they_decide_numbers() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let data = fixture("eighty-train.txt");
    for (name, old, new) in [
        ("config.json", "\"rms_norm_eps\": ", "\"rms_norm_eps\": 1"),
        (
            "base_config.json",
            "\"rms_norm_eps\": ",
            "\"rms_norm_eps\": 1",
        ),
        ("tokenizer.json", "\"version\"", "\"Version\""),
    ] {
        let path = split.join(name);
        let whole = std::fs::read_to_string(&path).expect("reads");
        let changed = whole.replacen(old, new, 1);
        assert_ne!(whole, changed);
        std::fs::write(&path, changed).expect("writes");
        for verb in ["evaluate", "train", "merge", "convert"] {
            let mut arguments = vec![verb, arg(&split)];
            if ["evaluate", "train"].contains(&verb) {
                arguments.extend(["--data", arg(&data)]);
            }
            if verb != "evaluate" {
                arguments.extend(["--out", "nothing"]);
            }
            world.run(&arguments).refuses(&[name, "sha256", "expected"]);
            assert!(!world.path("nothing").exists());
        }
        let found = world.run(&["verify", arg(&split)]);
        assert!(
            found.code == Some(1) && found.stdout.contains(name),
            "{}",
            found.stdout
        );
        std::fs::write(&path, whole).expect("writes");
    }
}

#[test]
fn what_others_put_into_an_unfinished_directory_is_not_the_decompositions() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let index = |dir: &Path| dir.join("svd.safetensors.index.json");
    let clean = std::fs::read(index(&split)).expect("reads");
    let base = world.path("base");
    let decompose = |out: &Path| {
        let arguments = ["decompose", arg(&base), "--out", arg(out)];
        world.command(&arguments)
    };
    // a busy machine may kill too late
    let mut attempts = (0..20).map(|attempt| world.path(&format!("killed-{attempt}")));
    let killed = attempts.find(|out| {
        let mut child = decompose(out).spawn().expect("starts");
        wait_until("the work has begun", || {
            out.join(".svdhub/job.json").exists()
        });
        child.kill().expect("kills");
        child.wait().expect("is gone");
        !index(out).exists()
    });
    let out = killed.expect("one of them was killed at work");
    std::fs::write(out.join("run.log"), "notes").expect("writes");
    Run::of(decompose(&out).output().expect("runs")).succeeds();
    assert!(std::fs::read(index(&out)).expect("reads") == clean);
    std::fs::remove_file(out.join("run.log")).expect("it is left alone");
    world.run(&["verify", arg(&out)]).succeeds();
}

#[test]
fn a_plain_model_is_checked_before_it_is_run() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let good = tensors(&base);
    let data = fixture("eighty-heldout.txt");
    let up = "model.layers.1.mlp.up_proj.weight";
    let with = |change: &dyn Fn(&mut BTreeMap<String, Elements>), words: &[&str]| {
        let mut all = good.clone();
        change(&mut all);
        write_model(&base, &all, u64::MAX);
        world
            .run(&["evaluate", arg(&base), "--data", arg(&data)])
            .refuses(words);
        assert_eq!(world.run(&["verify", arg(&base)]).code, Some(1));
    };
    with(
        &|all| all.get_mut(up).expect("is there").shape = vec![128, 344],
        &[up, "expected shape [344, 128]", "found [128, 344]"],
    );
    with(
        &|all| {
            let norm = all.get_mut("model.norm.weight").expect("is there");
            norm.bytes = norm
                .to_f32()
                .iter()
                .flat_map(|&x| f64::from(x).to_le_bytes())
                .collect();
            norm.dtype = Dtype::F64;
        },
        &["model.norm.weight", "found F64"],
    );
    with(
        &|all| {
            all.get_mut(up).expect("is there").bytes[2..4].copy_from_slice(&0x7fc0u16.to_le_bytes())
        },
        &[up, "NaN", "[0, 1]"],
    );
    with(&|all| drop(all.remove(up)), &[up, "missing"]);
}

#[test]
fn a_sidecar_with_another_base_is_a_problem_not_a_crash() {
    let world = World::new();
    let split = decomposed(&world, &["--layout", "sidecar"]);
    let other = world.model("other", Dtype::BF16, u64::MAX);
    let mut all = tensors(&other);
    let up = all
        .get_mut("model.layers.1.mlp.up_proj.weight")
        .expect("is there");
    up.shape = vec![100, 128];
    up.bytes.truncate(100 * 128 * 2);
    write_model(&other, &all, u64::MAX);
    let run = world.run(&["verify", arg(&split), "--against", arg(&other)]);
    assert!(
        run.code == Some(1) && run.stdout.contains("model.safetensors"),
        "{}{}",
        run.stdout,
        run.stderr
    );
}

#[test]
fn impossible_configs_are_refused_without_being_built() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let good = std::fs::read(base.join("config.json")).expect("reads");
    for (key, value) in [
        ("num_hidden_layers", json!(1u64 << 39)),
        ("head_dim", json!(1u64 << 38)),
        ("vocab_size", json!(u64::MAX)),
        ("partial_rotary_factor", json!(3)),
        ("partial_rotary_factor", json!(0.001)),
        ("num_attention_heads", json!(0)),
    ] {
        std::fs::write(base.join("config.json"), &good).expect("writes");
        edit_json(&base.join("config.json"), |c| c[key] = value);
        world
            .run(&["plan", arg(&base)])
            .refuses(&["config.json", key]);
    }
}

#[test]
fn links_of_a_plain_model_take_nobodys_files_along() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let secret = world.path("secret");
    std::fs::write(&secret, "hf_secret").expect("writes");
    std::os::unix::fs::symlink(&secret, base.join("notes.json")).expect("links");
    let out = world.path("svd");
    let decompose = ["decompose", arg(&base), "--out", arg(&out)];
    world
        .run(&decompose)
        .refuses(&["base/notes.json", "secret"]);
    assert!(!out.join("notes.json").exists());
}

/// A LoRA of a plain model, trained for a step.
fn lora_on(world: &World, base: &Path) -> PathBuf {
    let (lora, data) = (world.path("lora"), fixture("eighty-train.txt"));
    let train = ["train", arg(base), "--method", "lora", "--steps", "1"];
    let more = ["--length", "32", "--data", arg(&data), "--out", arg(&lora)];
    world.run(&[&train[..], &more].concat()).succeeds();
    lora
}

#[test]
fn what_is_not_an_adapter_of_peft_to_the_letter_is_refused() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let (lora, data) = (lora_on(&world, &base), fixture("eighty-train.txt"));
    let config = lora.join("adapter_config.json");
    let good = std::fs::read(&config).expect("reads");
    let evaluate = [
        "evaluate",
        arg(&base),
        "--adapter",
        arg(&lora),
        "--data",
        arg(&data),
    ];
    for (key, value, word) in [
        ("r", json!(16), "`r`"),
        ("r", json!("x"), "`r`"),
        ("target_modules", json!(["q_proj"]), "target_modules"),
        ("exclude_modules", json!(["q_proj"]), "exclude_modules"),
        ("layers_to_transform", json!([0]), "layers_to_transform"),
    ] {
        std::fs::write(&config, &good).expect("writes");
        edit_json(&config, |c| c[key] = value);
        world
            .run(&evaluate)
            .refuses(&["adapter_model.safetensors", word]);
    }
    std::fs::write(&config, &good).expect("writes");
    edit_json(&config, |c| {
        c["layers_to_transform"] = json!((0..6).collect::<Vec<_>>())
    });
    world.run(&evaluate).succeeds();
}

#[test]
fn a_lora_is_not_said_to_be_better_on_a_model_it_was_not_trained_on() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let other = world.model("other", Dtype::F32, u64::MAX);
    let (lora, data) = (lora_on(&world, &base), fixture("eighty-train.txt"));
    let recorded = || crate::world::json_file(&lora.join("report.json"))["evaluate"].clone();
    let evaluate = |model: &Path, data: &Path| {
        let arguments = [
            "evaluate",
            arg(model),
            "--adapter",
            arg(&lora),
            "--data",
            arg(data),
        ];
        world.run(&arguments).succeeds().stderr
    };
    let said = evaluate(&other, &data);
    assert!(
        said.contains("other weight files") && recorded().is_null(),
        "{said}"
    );
    evaluate(&base, &data);
    assert_eq!(recorded().as_array().map(Vec::len), Some(1));
    // another text of the same name does not take its place, and is told apart on the card
    let namesake = world.path("eighty-train.txt");
    std::fs::write(
        &namesake,
        "Another text, of which the name is all they share.",
    )
    .expect("writes");
    evaluate(&base, &namesake);
    evaluate(&base, &data);
    assert_eq!(recorded().as_array().map(Vec::len), Some(2));
    world
        .run(&["publish", arg(&lora), "org/lora", "--dry-run"])
        .succeeds();
    let card = std::fs::read_to_string(lora.join("README.md")).expect("a card");
    assert_eq!(
        card.matches("| eighty-train.txt (sha256 ").count(),
        2,
        "{card}"
    );
}

#[test]
fn what_is_given_in_the_wrong_place_is_told_where_it_belongs() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (data, adapter) = (fixture("eighty-train.txt"), world.path("adapter"));
    let train = [
        "train",
        arg(&split),
        "--steps",
        "1",
        "--length",
        "32",
        "--data",
        arg(&data),
    ];
    world
        .run(&[&train[..], &["--out", arg(&adapter)]].concat())
        .succeeds();
    for verb in [
        &["evaluate", arg(&adapter), "--data", arg(&data)][..],
        &["plan", arg(&adapter)],
    ] {
        world.run(verb).refuses(&["it is an adapter", "--adapter"]);
    }
    world
        .run(&["decompose", arg(&split), "--out", "x"])
        .refuses(&["it is a decomposition"]);
    let table = world.path("texts.csv");
    std::fs::write(&table, "text\n").expect("writes");
    world
        .run(&["evaluate", arg(&split), "--data", arg(&table)])
        .refuses(&["texts.csv", ".jsonl"]);
    let other = ["--method", "full", "--resume", "--out", arg(&adapter)];
    world
        .run(&[&train[..], &other].concat())
        .refuses(&["method was Sigma"]);
}

#[test]
fn promises_that_hold_for_anything_are_none() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let config = split.join("config.json");
    let good = std::fs::read(&config).expect("reads");
    for (path, value) in [
        ("/svd/algorithm/tolerance", json!(1e300)),
        ("/svd/algorithm/tolerance", json!(-1e-4)),
        ("/svd/rank/value", json!(-3.0)),
    ] {
        std::fs::write(&config, &good).expect("writes");
        edit_json(&config, |c| *c.pointer_mut(path).expect("is there") = value);
        let said = world.run(&["verify", arg(&split), "--json"]);
        assert_eq!(said.code, Some(1), "{}", said.stdout);
        let word = if path.ends_with("tolerance") {
            "promises"
        } else {
            "share"
        };
        assert!(said.stdout.contains(word), "{}", said.stdout);
        world
            .run(&["inspect", arg(&split)])
            .refuses(&["config.json", word]);
    }
}

#[test]
fn a_merge_that_leaves_the_range_is_refused() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (data, adapter) = (fixture("eighty-train.txt"), world.path("adapter"));
    world
        .run(&[
            "train",
            arg(&split),
            "--data",
            arg(&data),
            "--out",
            arg(&adapter),
            "--steps",
            "2",
            "--length",
            "32",
        ])
        .succeeds();
    let out = world.path("merged");
    let huge = format!("{}*1e30", arg(&adapter));
    world
        .run(&[
            "merge",
            arg(&split),
            "--adapter",
            &huge,
            "--out",
            arg(&out),
            "--dtype",
            "f16",
        ])
        .refuses(&["inf", "smaller factor"]);
    assert!(!out.join("model.safetensors").exists());
}

#[test]
fn plan_knows_the_published_table_from_a_config_alone() {
    let world = World::new();
    let dir = world.path("phi3");
    std::fs::create_dir_all(&dir).expect("a directory");
    let config = json!({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": false, "max_position_embeddings": 131072});
    std::fs::write(dir.join("config.json"), config.to_string()).expect("writes");
    let run = world
        .run(&["plan", arg(&dir), "--rank-fraction", "0.1"])
        .succeeds();
    for number in [
        "39,603",
        "239,283",
        "12,864,000",
        "25,728,000",
        "51,456,000",
        "98,500,608",
        "129",
    ] {
        assert!(
            run.stdout.contains(number),
            "{number} is missing from\n{}",
            run.stdout
        );
    }
}
