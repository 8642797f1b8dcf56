//! A decomposition stored in another way is the one decomposed in that way.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use svdhub::hub::server::{Effect, Fault};
use svdhub::weights::{Checkpoint, Dtype, Layout};

use crate::parts::assert_same;
use crate::world::{World, arg, files, tensors, write_model};

fn decompose(world: &World, base: &Path, name: &str, options: &[&str]) -> PathBuf {
    let out = world.path(name);
    let fixed = ["decompose", arg(base), "--out", arg(&out)];
    world.run(&[&fixed, options].concat()).succeeds();
    out
}

fn convert(world: &World, from: &Path, name: &str, options: &[&str]) -> PathBuf {
    let out = world.path(name);
    let fixed = ["convert", arg(from), "--out", arg(&out)];
    world.run(&[&fixed, options].concat()).succeeds();
    out
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).expect("reads")).expect("JSON")
}

/// Merged without training, it is the base.
fn assert_restores(world: &World, artifact: &Path) {
    world.run(&["verify", arg(artifact)]).succeeds();
    let out = world.path(&format!(
        "{}-merged",
        artifact.file_name().expect("a name").to_string_lossy()
    ));
    let facts = world.json(&["merge", arg(artifact), "--out", arg(&out)]);
    assert_eq!(facts["tensors_identical_to_base"], true, "{facts}");
}

#[test]
fn a_converted_layout_is_the_one_decomposed_directly() {
    let world = World::new();
    let tied = json!({"model_type": "qwen2", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": true, "rms_norm_eps": 1e-6});
    let cases: [(&str, PathBuf, Vec<&str>); 4] = [
        (
            "sharded",
            world.model("sharded", Dtype::BF16, 600_000),
            vec!["--shard-size", "300kB"],
        ),
        ("f32", world.model("f32", Dtype::F32, u64::MAX), vec![]),
        (
            "untied",
            world.random_model("untied", &tied),
            vec!["--untie-head", "--rank", "5"],
        ),
        (
            "some",
            world.model("some", Dtype::F16, u64::MAX),
            vec!["--include", "mlp", "--fast"],
        ),
    ];
    for (name, base, options) in cases {
        let with = |layout| [&options[..], &["--layout", layout]].concat();
        let residual = decompose(&world, &base, &format!("{name}-r"), &with("residual"));
        let sidecar = decompose(&world, &base, &format!("{name}-s"), &with("sidecar"));
        let shards: Vec<&str> = options
            .windows(2)
            .filter(|pair| pair[0] == "--shard-size")
            .flatten()
            .copied()
            .collect();
        for (from, to, layout) in [
            (&residual, &sidecar, "sidecar"),
            (&sidecar, &residual, "residual"),
        ] {
            let options = [&shards[..], &["--layout", layout]].concat();
            let out = convert(&world, from, &format!("{name}-to-{layout}"), &options);
            assert_same(&out, to);
            assert_restores(&world, &out);
        }
    }
}

#[test]
fn a_residual_whose_base_has_gone_is_converted_all_the_same() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = decompose(&world, &base, "svd", &["--rank-fraction", "1"]);
    std::fs::rename(&base, world.path("elsewhere")).expect("moves");
    let sidecar = convert(
        &world,
        &split,
        "sidecar",
        &["--layout", "sidecar", "--energy", "1"],
    );
    world
        .run(&["merge", arg(&sidecar), "--out", arg(&world.path("model"))])
        .refuses(&["needs its base model"]);
}

#[test]
fn vectors_in_bf16_take_half_the_room_and_restore_every_byte() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let options = ["--rank-fraction", "0.5"];
    let wide = decompose(&world, &base, "wide", &options);
    let narrow = [&options[..], &["--factors-dtype", "bf16"]].concat();
    let narrow = decompose(&world, &base, "narrow", &narrow);
    let converted = convert(&world, &wide, "converted", &["--factors-dtype", "bf16"]);
    for artifact in [&narrow, &converted] {
        let checkpoint = Checkpoint::open(artifact, Layout::Decomposition).expect("opens");
        for (_, entry) in checkpoint.inventory.entries() {
            let vectors = entry.name.ends_with(".u") || entry.name.ends_with(".v");
            let rounded = entry.dtype == Dtype::BF16;
            assert!(!vectors || rounded, "{}", entry.name);
        }
        assert_restores(&world, artifact);
        let report: Value =
            serde_json::from_slice(&std::fs::read(artifact.join("report.json")).expect("reads"))
                .expect("JSON");
        // rounding to 8 bits turns each vector by up to 2⁻⁹, and the probes see it
        let off = report["decompose"]["orthogonality"].as_f64().expect("it");
        assert!((1e-4..4e-3).contains(&off), "{off}");
    }
    // the same shards; only the converted one says which decomposition its vectors were rounded from
    let mut sections = [config(&narrow), config(&converted)].map(|c| c["svd"].clone());
    let origin = sections[1]
        .as_object_mut()
        .expect("a section")
        .remove("nested_in")
        .expect("its origin");
    assert_eq!(origin["content_sha256"].as_str().map(str::len), Some(64));
    for module in sections[0]["modules"].as_object().expect("modules").keys() {
        let records = [0, 1].map(|i| &sections[i]["modules"][module]);
        assert_eq!(records[0], records[1], "{module}");
    }
    let shards = |dir: &Path| -> Vec<Vec<u8>> {
        let shards = files(dir).into_iter();
        let shards = shards.filter(|(name, _)| name.starts_with("svd-"));
        shards.map(|(_, bytes)| bytes).collect()
    };
    assert!(shards(&narrow) == shards(&converted));

    let back = world.path("back");
    let back = ["convert", arg(&narrow), "--out", arg(&back)];
    world
        .run(&[&back[..], &["--factors-dtype", "f32"]].concat())
        .refuses(&["bf16", "cannot become f32", "decompose the base again"]);
}

#[test]
fn the_first_triplets_are_those_of_a_smaller_decomposition() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let direct = decompose(&world, &base, "direct", &["--rank-fraction", "0.1"]);
    let records = config(&direct)["svd"]["modules"].clone();
    let direct = Checkpoint::open(&direct, Layout::Decomposition).expect("opens");
    for layout in ["residual", "sidecar"] {
        let options = ["--rank-fraction", "0.5", "--layout", layout];
        let large = decompose(&world, &base, &format!("{layout}-large"), &options);
        let nested = convert(&world, &large, layout, &["--rank-fraction", "0.1"]);
        let section = config(&nested)["svd"].clone();
        let whole = Checkpoint::open(&large, Layout::Decomposition).expect("opens");
        assert_eq!(section["rank"], json!({"mode": "fraction", "value": 0.1}));
        assert!(section["nested_in"]["content_sha256"].is_string());
        for (module, record) in section["modules"].as_object().expect("modules") {
            for key in ["captured_energy", "residual_norm", "sigma_max", "sigma_min"] {
                let of = |record: &Value| record[key].as_f64().expect("a number");
                let (found, expected) = (of(record), of(&records[module]));
                // σ² of both is right to twice the tolerance
                let off = (found / expected - 1.0).abs();
                assert!(off < 4e-4, "{module} {key}: {found} {expected}");
            }
            let tail = record["certificate"]["tail"].as_f64().expect("a tail");
            let sigma = whole
                .read(&format!("{module}.sigma"))
                .expect("reads")
                .to_f32();
            let k = record["q"].as_u64().expect("q") as usize;
            let exact = f64::from(sigma[k]) / f64::from(sigma[k - 1]);
            // with M at hand, a few steps of power iteration see it from well below
            let least = if layout == "sidecar" { 1.0 - 1e-6 } else { 0.7 };
            let share = tail / exact;
            assert!(
                share >= least && share < 1.0 + 1e-3,
                "{module}: {tail} {exact}"
            );
        }
        assert_restores(&world, &nested);
        let nested = Checkpoint::open(&nested, Layout::Decomposition).expect("opens");
        let mut compared = 0;
        for (_, entry) in nested.inventory.entries() {
            let bytes = nested.read(&entry.name).expect("reads").bytes;
            if entry.name.ends_with(".u") || entry.name.ends_with(".v") {
                let all = whole.read(&entry.name).expect("reads").bytes;
                assert!(all.starts_with(&bytes), "{}", entry.name);
            }
            if entry.name.ends_with(".sigma") {
                let found = nested.read(&entry.name).expect("reads").to_f32();
                let expected = direct.read(&entry.name).expect("reads").to_f32();
                assert_eq!(found.len(), expected.len(), "{}", entry.name);
                for (a, b) in found.iter().zip(&expected) {
                    // both are right to the tolerance of 1e-4
                    assert!((a - b).abs() <= 2e-4 * b, "{}: {a} {b}", entry.name);
                }
                compared += 1;
            }
        }
        assert_eq!(compared, 42);
    }
}

#[test]
fn ranks_are_taken_by_energy_and_budget_too_and_not_beyond_what_is_there() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let sidecar = ["--layout", "sidecar", "--rank-fraction"];
    let large = decompose(&world, &base, "large", &[&sidecar[..], &["1"]].concat());
    for (name, rank) in [
        ("energy", ["--energy", "0.6"]),
        ("budget", ["--budget", "300"]),
    ] {
        let direct = [&["--layout", "sidecar"], &rank[..]].concat();
        let direct = decompose(&world, &base, &format!("{name}-direct"), &direct);
        let nested = convert(&world, &large, name, &rank);
        let ranks = |dir: &Path| -> Vec<u64> {
            let section = config(dir)["svd"]["modules"].clone();
            let modules = section.as_object().expect("modules").values();
            modules.map(|m| m["q"].as_u64().expect("q")).collect()
        };
        assert_eq!(ranks(&nested), ranks(&direct), "{name}");
    }
    let small = decompose(&world, &base, "small", &[&sidecar[..], &["0.1"]].concat());
    let nowhere = world.path("nowhere");
    let refused = ["convert", arg(&small), "--out", arg(&nowhere)];
    for (rank, wanted) in [
        (["--rank-fraction", "0.2"], "25"),
        (["--rank", "13"], "13"),
        (["--energy", "0.99"], "0.99 of the energy"),
        (["--budget", "400"], "a budget of 400"),
    ] {
        world.run(&[&refused[..], &rank].concat()).refuses(&[
            "model.layers.0",
            wanted,
            "12 singular triplets",
            "ask for fewer",
        ]);
    }
    assert!(!nowhere.exists());
}

#[test]
fn a_weight_of_zeros_is_converted_too() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let mut weights = tensors(&base);
    let name = "model.layers.0.mlp.up_proj.weight";
    weights.get_mut(name).expect("a weight").bytes.fill(0);
    write_model(&base, &weights, u64::MAX);
    for layout in ["residual", "sidecar"] {
        let split = decompose(
            &world,
            &base,
            &format!("svd-{layout}"),
            &["--layout", layout],
        );
        let small = convert(&world, &split, &format!("small-{layout}"), &["--rank", "2"]);
        let verify = ["verify", arg(&small), "--against", arg(&base)];
        world.run(&verify).succeeds();
        assert_restores(&world, &small);
    }
}

#[test]
fn damage_in_the_source_is_named_and_nothing_is_written() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = decompose(&world, &base, "svd", &["--rank-fraction", "0.5"]);
    let checkpoint = Checkpoint::open(&split, Layout::Decomposition).expect("opens");
    for (tensor, options) in [
        ("model.layers.1.mlp.up_proj.u", vec!["--layout", "sidecar"]),
        ("model.layers.1.mlp.up_proj.sigma", vec!["--rank", "2"]),
        ("model.layers.1.mlp.up_proj.residual", vec!["--rank", "2"]),
        ("model.norm.weight", vec!["--factors-dtype", "bf16"]),
    ] {
        let (file, entry) = checkpoint.inventory.get(tensor).expect("it is there");
        let path = split.join(&file.name);
        let sound = std::fs::read(&path).expect("reads");
        let mut damaged = sound.clone();
        // the exponent of an f32, and of every other bf16
        damaged[entry.offset as usize + 3] ^= 0x10;
        std::fs::write(&path, damaged).expect("writes");
        let out = world.path(tensor);
        let fixed = ["convert", arg(&split), "--out", arg(&out)];
        let named = tensor.trim_end_matches(".residual");
        world
            .run(&[&fixed[..], &options].concat())
            .refuses(&[named, "expected sha256"]);
        assert!(!out.join("svd.safetensors.index.json").exists());
        std::fs::write(&path, sound).expect("writes");
    }
}

#[test]
fn a_nested_rank_fetches_its_byte_ranges_and_little_else() {
    let world = World::with_hub();
    let config = json!({"model_type": "llama", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100, "tie_word_embeddings": true, "rms_norm_eps": 1e-6});
    let base = world.random_model("base", &config);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    let large = world.path("large");
    let decompose = [
        "decompose",
        "org/base",
        "--layout",
        "sidecar",
        "--out",
        arg(&large),
    ];
    world
        .run(&[&decompose[..], &["--rank-fraction", "0.5"]].concat())
        .succeeds();
    world.run(&["publish", arg(&large), "org/svd"]).succeeds();
    let before = world.hub().requests().len();
    let nested = world.path("nested");
    world
        .run(&[
            "convert",
            "org/svd",
            "--rank-fraction",
            "0.1",
            "--out",
            arg(&nested),
        ])
        .succeeds();

    // q = 25 of 128: u and v in f32 of 4 + 3 matrices in each of 3 layers
    let ideal = 3 * 4 * 25 * (4 * (256 + 256) + 3 * (256 + 640));
    let requests = world.hub().requests().split_off(before);
    let fetched: u64 = requests
        .iter()
        .filter(|r| r.path.starts_with("/objects/") || r.path.contains("/resolve/"))
        .filter(|r| r.status == 200 || r.status == 206)
        .map(|r| r.bytes)
        .sum();
    assert!(
        fetched > ideal && fetched < ideal * 11 / 10,
        "{fetched} bytes where {ideal} are needed"
    );
    // transfers that break off go on from where they stopped
    world.hub().inject(Fault {
        matching: "GET /objects/".into(),
        times: 5,
        effect: Effect::CutBody { after_bytes: 3000 },
    });
    let again = world.path("again");
    let command = ["convert", "org/svd", "--rank-fraction", "0.1"];
    world
        .run(&[&command[..], &["--out", arg(&again)]].concat())
        .succeeds();
    assert_same(&again, &nested);
    let from_disk = convert(&world, &large, "from-disk", &["--rank-fraction", "0.1"]);
    let without_origin = |dir: &Path| {
        let mut section = self::config(dir)["svd"].clone();
        let origin = section["nested_in"].take();
        (section, origin["content_sha256"].clone())
    };
    assert_eq!(without_origin(&nested), without_origin(&from_disk));
    assert_eq!(self::config(&nested)["svd"]["nested_in"]["repo"], "org/svd");
    let shard = "svd-00001-of-00001.safetensors";
    assert!(files(&nested)[shard] == files(&from_disk)[shard]);
    assert_restores(&world, &nested);
}
