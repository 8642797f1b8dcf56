//! One clear error for each way input can be broken; nothing half-written is taken for finished work.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use svdhub::weights::{Checkpoint, Dtype, Layout};

use crate::world::{Run, World, arg, fixture};

struct Broken {
    world: World,
    base: PathBuf,
}

impl Broken {
    fn new(shard_bytes: u64) -> Self {
        let world = World::new();
        let base = world.model("base", Dtype::BF16, shard_bytes);
        Self { world, base }
    }

    fn config(&self, key: &str, value: Value) {
        let path = self.base.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(&path).expect("reads")).expect("JSON");
        config[key] = value;
        std::fs::write(path, config.to_string()).expect("writes");
    }

    fn index(&self, edit: impl Fn(&mut Value)) {
        let path = self.base.join("model.safetensors.index.json");
        let mut index: Value =
            serde_json::from_slice(&std::fs::read(&path).expect("reads")).expect("JSON");
        edit(&mut index);
        std::fs::write(path, index.to_string()).expect("writes");
    }

    fn edit_weights(&self, edit: impl Fn(&mut Vec<u8>)) {
        let path = self.base.join("model.safetensors");
        let mut bytes = std::fs::read(&path).expect("reads");
        edit(&mut bytes);
        std::fs::write(path, bytes).expect("writes");
    }

    /// decompose refuses with these words, and leaves nothing that opens.
    fn refuses(&self, words: &[&str]) {
        let out = self.world.path("svd");
        self.world
            .run(&["decompose", arg(&self.base), "--out", arg(&out)])
            .refuses(words);
        assert_unfinished(&out);
    }
}

fn assert_unfinished(out: &Path) {
    assert!(!out.join("svd.safetensors.index.json").exists());
}

#[test]
fn a_missing_shard() {
    let broken = Broken::new(600_000);
    std::fs::remove_file(broken.base.join("model-00002-of-00005.safetensors")).expect("removes");
    broken.refuses(&[
        "index",
        "model-00002-of-00005.safetensors",
        "not there",
        "again",
    ]);
}

#[test]
fn a_half_written_shard() {
    let broken = Broken::new(u64::MAX);
    broken.edit_weights(|bytes| bytes.truncate(1_000_000));
    broken.refuses(&[
        "model.safetensors",
        "cut short",
        "expected 2446",
        "found 1000000",
    ]);
    broken.edit_weights(|bytes| bytes.truncate(3));
    broken.refuses(&["model.safetensors", "cut short"]);
}

#[test]
fn what_came_instead_of_the_weights() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let weights = base.join("model.safetensors");
    for (found, words) in [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1044992\n",
            "git lfs pull",
        ),
        (
            "<!doctype html><html>no such page</html>",
            "a page of the web",
        ),
    ] {
        std::fs::write(&weights, found).expect("writes");
        world
            .run(&["plan", arg(&base)])
            .refuses(&["model.safetensors", words]);
    }
}

#[test]
fn nobody_has_to_listen() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    let ends_with = |arguments: &[&str], code| {
        let deaf = std::fs::OpenOptions::new().write(true).open("/dev/full");
        let mut command = world.command(arguments);
        let done = command.stderr(deaf.expect("Linux has it")).status();
        assert_eq!(done.expect("ends").code(), Some(code), "{arguments:?}");
    };
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    ends_with(&decompose, 0);
    ends_with(&decompose, 0);
    ends_with(&["decompose", "/nowhere", "--out", "x"], 1);
}

#[test]
fn an_index_with_a_tensor_that_is_not_there() {
    let broken = Broken::new(600_000);
    broken.index(|index| {
        index["weight_map"]["model.ghost.weight"] = "model-00001-of-00005.safetensors".into()
    });
    broken.refuses(&[
        "index",
        "model.ghost.weight",
        "model-00001-of-00005.safetensors",
    ]);
}

#[test]
fn an_index_that_leads_out_of_the_folder() {
    let broken = Broken::new(600_000);
    broken.index(|index| index["weight_map"]["model.norm.weight"] = "../secret.safetensors".into());
    broken.refuses(&["../secret.safetensors", "not a plain file name"]);
}

#[test]
fn an_index_that_is_not_json() {
    let broken = Broken::new(600_000);
    std::fs::write(
        broken.base.join("model.safetensors.index.json"),
        "{\"weight_map\":",
    )
    .expect("writes");
    broken.refuses(&["model.safetensors.index.json", "not valid JSON"]);
}

#[test]
fn json_that_names_a_key_twice() {
    let broken = Broken::new(400_000);
    for (file, twice) in [
        ("model.safetensors.index.json", "\"weight_map\""),
        ("config.json", "\"hidden_size\""),
    ] {
        let path = broken.base.join(file);
        let sound = std::fs::read_to_string(&path).expect("reads");
        let repeated = sound.replacen(twice, &format!("{twice}: {{}}, {twice}"), 1);
        assert_ne!(sound, repeated);
        std::fs::write(&path, repeated).expect("writes");
        let key = twice.trim_matches('"');
        broken.refuses(&[file, &format!("names `{key}` twice")]);
        std::fs::write(&path, sound).expect("writes");
    }
}

#[test]
fn an_unknown_architecture() {
    let broken = Broken::new(u64::MAX);
    broken.config("model_type", json!("mamba"));
    broken.refuses(&["config.json", "mamba", "llama"]);
}

#[test]
fn a_quantised_checkpoint() {
    let broken = Broken::new(u64::MAX);
    broken.config("quantization_config", json!({"quant_method": "gptq"}));
    broken.refuses(&["quantization_config", "original checkpoint"]);
}

#[test]
fn a_tensor_of_the_wrong_shape() {
    let broken = Broken::new(u64::MAX);
    broken.config("intermediate_size", json!(345));
    broken.refuses(&[
        "model.layers.0.mlp.gate_proj.weight",
        "model.safetensors",
        "expected shape [345, 128]",
        "found [344, 128]",
    ]);
}

#[test]
fn a_missing_tensor() {
    let broken = Broken::new(u64::MAX);
    broken.config("num_hidden_layers", json!(7));
    broken.refuses(&["model.layers.6.", "missing"]);
}

#[test]
fn a_tensor_of_the_wrong_dtype() {
    let broken = Broken::new(u64::MAX);
    // same width, other meaning: the header stays consistent
    broken.edit_weights(|bytes| {
        let text = String::from_utf8_lossy(&bytes[8..9000]).into_owned();
        let at = text
            .find("model.layers.1.mlp.up_proj.weight")
            .expect("is there");
        let dtype = 8 + at + text[at..].find("BF16").expect("a dtype");
        bytes[dtype..dtype + 4].copy_from_slice(b"I16\"");
        // one character fewer: the closing quote moved forward, a blank takes its place
        bytes[dtype + 4] = b' ';
    });
    broken.refuses(&[
        "model.layers.1.mlp.up_proj.weight",
        "expected dtype F32, F16 or BF16",
        "found I16",
    ]);
}

#[test]
fn nan_and_infinity_in_weights() {
    let broken = Broken::new(u64::MAX);
    let checkpoint = Checkpoint::open(&broken.base, Layout::Model).expect("opens");
    for (tensor, bits, word, place) in [
        (
            "model.layers.3.self_attn.v_proj.weight",
            0x7fc0u16,
            "NaN",
            "at element [0, 100]",
        ),
        ("model.norm.weight", 0x7f80, "inf", "at element [100]"),
    ] {
        let (_, entry) = checkpoint.inventory.get(tensor).expect("is there");
        let offset = entry.offset as usize + 2 * 100;
        let kept = std::fs::read(broken.base.join("model.safetensors")).expect("reads");
        broken.edit_weights(|bytes| bytes[offset..offset + 2].copy_from_slice(&bits.to_le_bytes()));
        broken.refuses(&[tensor, word, "model.safetensors", place]);
        std::fs::write(broken.base.join("model.safetensors"), kept).expect("writes");
        std::fs::remove_dir_all(broken.world.path("svd")).expect("removes");
    }
}

#[test]
fn no_weights_and_no_config() {
    let broken = Broken::new(u64::MAX);
    std::fs::remove_file(broken.base.join("model.safetensors")).expect("removes");
    broken.refuses(&["model.safetensors", "missing"]);
    std::fs::remove_file(broken.base.join("config.json")).expect("removes");
    let out = broken.world.path("svd");
    broken
        .world
        .run(&["plan", arg(&broken.base)])
        .refuses(&["config.json", "missing"]);
    broken
        .world
        .run(&["decompose", "./nowhere", "--out", arg(&out)])
        .refuses(&["nowhere"]);
}

#[test]
fn broken_training_data() {
    let broken = Broken::new(u64::MAX);
    let (world, split) = (&broken.world, broken.world.path("svd"));
    world
        .run(&["decompose", arg(&broken.base), "--out", arg(&split)])
        .succeeds();
    let (data, out) = (world.path("data.jsonl"), world.path("adapter"));
    let train = |words: &[&str]| {
        world
            .run(&[
                "train",
                arg(&split),
                "--data",
                arg(&data),
                "--out",
                arg(&out),
            ])
            .refuses(words);
        assert!(!out.join("adapter.safetensors").exists());
    };
    std::fs::write(&data, "{\"text\": \"good\"}\n{\"text\": \n").expect("writes");
    train(&["data.jsonl line 2", "not JSON"]);
    std::fs::write(&data, "{\"prompt\": \"a\"}").expect("writes");
    train(&["line 1", "`text`", "prompt"]);
    std::fs::write(&data, "").expect("writes");
    train(&["data.jsonl", "0 tokens"]);
    std::fs::write(&data, [0xff, 0xfe]).expect("writes");
    train(&["data.jsonl", "UTF-8"]);
    std::fs::remove_file(&data).expect("removes");
    train(&["data.jsonl", "No such file"]);
}

#[test]
fn a_model_without_tokenizer() {
    let broken = Broken::new(u64::MAX);
    std::fs::remove_file(broken.base.join("tokenizer.json")).expect("removes");
    let data = fixture("eighty-heldout.txt");
    broken
        .world
        .run(&["evaluate", arg(&broken.base), "--data", arg(&data)])
        .refuses(&["tokenizer.json"]);
}

#[test]
fn a_learning_rate_that_breaks_the_model() {
    let broken = Broken::new(u64::MAX);
    let (world, split) = (&broken.world, broken.world.path("svd"));
    world
        .run(&["decompose", arg(&broken.base), "--out", arg(&split)])
        .succeeds();
    let (data, out) = (fixture("eighty-train.txt"), world.path("adapter"));
    world
        .run(&[
            "train",
            arg(&split),
            "--data",
            arg(&data),
            "--out",
            arg(&out),
            "--lr",
            "1e30",
            "--steps",
            "5",
            "--length",
            "16",
        ])
        .refuses(&["loss became", "step", "lower --lr"]);
    assert!(!out.join("adapter.safetensors").exists());
}

#[test]
fn an_artifact_from_the_future_or_with_unknown_keys() {
    let broken = Broken::new(u64::MAX);
    let (world, split) = (&broken.world, broken.world.path("svd"));
    world
        .run(&["decompose", arg(&broken.base), "--out", arg(&split)])
        .succeeds();
    let path = split.join("config.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&path).expect("reads")).expect("JSON");
    let out = world.path("merged");
    for (key, value, word) in [
        ("schema", json!(99), "newer svdhub"),
        ("surprise", json!(1), "surprise"),
        ("layout", json!("magic"), "magic"),
    ] {
        let mut config = good.clone();
        config["svd"][key] = value;
        std::fs::write(&path, config.to_string()).expect("writes");
        world
            .run(&["merge", arg(&split), "--out", arg(&out)])
            .refuses(&["config.json", "svd", word]);
    }
    let data = fixture("eighty-heldout.txt");
    world
        .run(&[
            "train",
            arg(&broken.base),
            "--data",
            arg(&data),
            "--out",
            arg(&out),
        ])
        .refuses(&["not a decomposition", "svdhub decompose"]);
}

#[test]
fn a_disk_without_room() {
    let broken = Broken::new(u64::MAX);
    let mount = broken.world.path("tiny");
    std::fs::create_dir_all(&mount).expect("a directory");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs", arg(&mount)])
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        // past the test runner, which keeps what a passing test prints
        let said = b"\nSKIPPED a_disk_without_room: mounting a small file system needs root\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), said);
        return;
    }
    let (world, base) = (&broken.world, arg(&broken.base));
    let split = world.path("svd");
    world
        .run(&["decompose", base, "--out", arg(&split)])
        .succeeds();
    // known before the work begins
    let (no_split, no_model) = (mount.join("svd"), mount.join("merged"));
    let decomposed = world.run(&["decompose", base, "--out", arg(&no_split)]);
    let merge = ["merge", arg(&split), "--out", arg(&no_model)];
    let (merged, again) = (world.run(&merge), world.run(&merge));
    let (data, no_adapter) = (fixture("eighty-train.txt"), mount.join("full"));
    let full = [
        "--method", "full", "--steps", "1", "--length", "16", "--out",
    ];
    let train = ["train", arg(&split), "--data", arg(&data)];
    let moved = world.run(&[&train[..], &full, &[arg(&no_adapter)]].concat());
    // found out in the middle: the last block is gone
    let stuffing = std::fs::File::create(mount.join("stuffing")).expect("creates");
    while std::io::Write::write_all(&mut &stuffing, &[1; 4096]).is_ok() {}
    let adapter = mount.join("adapter");
    let train = [
        "train",
        arg(&split),
        "--data",
        arg(&data),
        "--steps",
        "2",
        "--length",
        "16",
    ];
    let trained = world.run(&[&train[..], &["--out", arg(&adapter)]].concat());
    let nothing = !no_split.join("svd.safetensors.index.json").exists()
        && !no_model.join("model.safetensors").exists()
        && !adapter.join("adapter.safetensors").exists();
    drop(stuffing);
    let _ = std::process::Command::new("umount").arg(&mount).status();
    decomposed.refuses(&["needs", "free", "choose another disk"]);
    let needs = |run: &Run| {
        let mut words = run.stderr.split("needs ").nth(1).expect("said").split(' ');
        words.next().map(String::from)
    };
    moved.refuses(&["needs", "free"]);
    // nothing is there that a second try would have to keep
    assert_eq!(needs(&merged), needs(&again));
    merged.refuses(&["needs", "free"]);
    trained.refuses(&["no space left", "adapter", "free some space"]);
    assert!(nothing);
}

#[test]
fn a_file_that_may_not_grow_is_an_error() {
    let broken = Broken::new(u64::MAX);
    let (world, out) = (&broken.world, broken.world.path("svd"));
    let decompose = ["decompose", arg(&broken.base), "--out", arg(&out)];
    let mut limited = std::process::Command::new("sh");
    let program = env!("CARGO_BIN_EXE_svdhub");
    limited
        .args(["-c", r#"ulimit -f 100; exec "$@""#, "sh", program])
        .args(decompose);
    limited.env_clear().env("HOME", world.path("home"));
    Run::of(limited.output().expect("runs")).refuses(&["svd", "File too large"]);
    world.run(&decompose).succeeds();
}

#[test]
fn options_that_make_no_sense() {
    let world = World::new();
    for arguments in [
        vec!["plan", "x/y", "--rank-fraction", "0"],
        vec!["plan", "x/y", "--rank-fraction", "0.1", "--rank", "3"],
        vec!["plan", "not a model"],
        vec!["merge", "x/y", "--out", "o", "--dtype", "int8"],
        vec![
            "train", "x/y", "--data", "d", "--out", "o", "--device", "tpu",
        ],
        vec!["train", "x/y", "--data", "d", "--out", "o", "--length", "1"],
        vec!["frobnicate"],
    ] {
        let run = world.run(&arguments);
        assert_eq!(run.code, Some(2), "{arguments:?}: {}", run.stderr);
    }
}
