//! How many triplets of what: by energy, by a budget for the whole model, by patterns, and of a head that was tied.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use svdhub::adapter::Adapter;
use svdhub::linalg::{single_threaded_blas, spectrum};
use svdhub::weights::{Checkpoint, Dtype, Elements, Layout};

use crate::world::{World, arg, files, fixture, write_model};

/// The sum of squares of σ as it is stored: two roundings to f32, of σ and of the last Rayleigh quotient, doubled by
/// squaring.
const ENERGY_ERROR: f64 = 4.0 * 5.96e-8;

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("JSON")
}

/// The `svd` section of a decomposition.
fn section(split: &Path) -> Value {
    json_file(&split.join("config.json"))["svd"].clone()
}

fn modules(split: &Path) -> BTreeMap<String, Value> {
    let section = section(split);
    let modules = section["modules"].as_object().expect("modules");
    modules
        .iter()
        .map(|(m, r)| (m.clone(), r.clone()))
        .collect()
}

fn tensors(dir: &Path) -> BTreeMap<String, Elements> {
    let checkpoint = Checkpoint::open(dir, Layout::Model).expect("opens");
    let names = checkpoint.inventory.entries().map(|(_, e)| e.name.clone());
    names
        .map(|name| {
            let elements = checkpoint.read(&name).expect("reads");
            (name, elements)
        })
        .collect()
}

/// σ of a stored weight, all of them.
fn sigma_of(weight: &Elements) -> Vec<f32> {
    single_threaded_blas();
    let sides = (weight.shape[0], weight.shape[1]);
    let matrix = ndarray::Array2::from_shape_vec(sides, weight.to_f32()).expect("a matrix");
    spectrum(matrix.view()).expect("LAPACK converges")
}

fn energy(values: impl IntoIterator<Item = f32>) -> f64 {
    values.into_iter().map(|x| f64::from(x).powi(2)).sum()
}

#[test]
fn energy_keeps_the_fewest_triplets_that_hold_the_share() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let weights = tensors(&base);
    let mut totals = Vec::new();
    for share in [0.3, 0.9, 0.999] {
        let split = world.path(&format!("svd-{share}"));
        let text = share.to_string();
        let options = ["--energy", &text, "--layout", "sidecar"];
        let facts = world.json(
            &[
                &["decompose", arg(&base), "--out", arg(&split)],
                &options[..],
            ]
            .concat(),
        );
        let stored = section(&split);
        assert_eq!(stored["schema"], 3);
        assert_eq!(stored["rank"], json!({"mode": "energy", "value": share}));
        let mut total = 0;
        for (module, record) in modules(&split) {
            let weight = &weights[&format!("{module}.weight")];
            let q = record["q"].as_u64().expect("a rank") as usize;
            let sigma = sigma_of(weight);
            // ‖M‖² from the elements, not from σ
            let wanted = share * energy(weight.to_f32());
            let held = energy(sigma[..q].iter().copied());
            let less = energy(sigma[..q - 1].iter().copied());
            assert!(
                held >= wanted * (1.0 - ENERGY_ERROR),
                "{module}: {q} are too few"
            );
            assert!(
                less < wanted * (1.0 + ENERGY_ERROR),
                "{module}: {q} are too many"
            );
            let captured = record["captured_energy"].as_f64().expect("a share");
            assert!(
                (captured - held / (wanted / share)).abs() < 1e-5,
                "{module}: {captured}"
            );
            total += q;
        }
        assert_eq!(facts["trainable"]["sigma"], total);
        totals.push(total);
        world
            .run(&["verify", arg(&split), "--against", arg(&base)])
            .succeeds();
    }
    assert!(totals.is_sorted() && totals[0] < totals[2], "{totals:?}");
}

/// What the budget must give, by sorting everything.
fn by_sorting(
    weights: &BTreeMap<String, Elements>,
    modules: &BTreeMap<String, Value>,
    budget: usize,
) -> BTreeMap<String, usize> {
    let spectra: Vec<(&String, Vec<f32>)> = modules
        .keys()
        .map(|module| (module, sigma_of(&weights[&format!("{module}.weight")])))
        .collect();
    let mut all: Vec<(bool, f32, &String, usize)> = Vec::new();
    for (module, sigma) in &spectra {
        all.extend(
            sigma
                .iter()
                .enumerate()
                .map(|(i, &x)| (i > 0, x, *module, i)),
        );
    }
    // the first of each, then the largest of all
    all.sort_by(|a, b| {
        (a.0, -a.1, a.2, a.3)
            .partial_cmp(&(b.0, -b.1, b.2, b.3))
            .expect("numbers")
    });
    let mut ranks = BTreeMap::new();
    for (_, _, module, _) in all.into_iter().take(budget) {
        *ranks.entry(module.clone()).or_insert(0) += 1;
    }
    ranks
}

#[test]
fn a_budget_keeps_the_largest_singular_values_of_the_whole_model() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let weights = tensors(&base);
    // 42 matrices of 128 × 128 and the like; 42 gives one to each, 4,608 is all there are
    for (budget, expected) in [
        (42, 42),
        (43, 43),
        (700, 700),
        (4_608, 4_608),
        (10_000, 4_608),
    ] {
        let split = world.path(&format!("svd-{budget}"));
        let text = budget.to_string();
        let options = ["--budget", &text, "--layout", "sidecar"];
        let facts = world.json(
            &[
                &["decompose", arg(&base), "--out", arg(&split)],
                &options[..],
            ]
            .concat(),
        );
        let modules = modules(&split);
        let found: BTreeMap<String, usize> = modules
            .iter()
            .map(|(module, record)| {
                (
                    module.clone(),
                    record["q"].as_u64().expect("a rank") as usize,
                )
            })
            .collect();
        assert_eq!(
            found,
            by_sorting(&weights, &modules, budget),
            "budget {budget}"
        );
        assert_eq!(found.values().sum::<usize>(), expected);
        assert_eq!(facts["trainable"]["sigma"], expected);
        assert_eq!(
            section(&split)["rank"],
            json!({"mode": "budget", "value": budget})
        );
        assert!(
            !split.join(".svdhub/spectra").exists(),
            "no spectra are left"
        );
    }
    let uneven = modules(&world.path("svd-700"));
    let ranks: Vec<u64> = uneven.values().filter_map(|r| r["q"].as_u64()).collect();
    assert!(
        ranks.iter().max() > Some(&(4 * ranks.iter().min().expect("ranks"))),
        "{ranks:?}"
    );
    // the same number of values by a fixed rank leaves more
    let fixed = world.path("fixed");
    let options = ["--rank", "17", "--layout", "sidecar"];
    let spread = world.json(&[
        "decompose",
        arg(&base),
        "--out",
        arg(&world.path("svd-714")),
        "--budget",
        "714",
        "--layout",
        "sidecar",
    ]);
    let fixed = world.json(
        &[
            &["decompose", arg(&base), "--out", arg(&fixed)],
            &options[..],
        ]
        .concat(),
    );
    assert_eq!(fixed["trainable"]["sigma"], 714);
    let captured = |facts: &Value| facts["captured_energy"].as_f64().expect("a share");
    assert!(
        captured(&spread) > captured(&fixed) + 0.01,
        "{} and {}",
        captured(&spread),
        captured(&fixed)
    );
}

#[test]
fn a_budget_and_patterns_go_together() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let weights = tensors(&base);
    let split = world.path("svd");
    let options = [
        "--budget",
        "50",
        "--include",
        "self_attn",
        "--exclude",
        "layers.3",
        "--exclude",
        "*.o_proj",
    ];
    world
        .run(
            &[
                &["decompose", arg(&base), "--out", arg(&split)],
                &options[..],
            ]
            .concat(),
        )
        .succeeds();
    let modules = modules(&split);
    assert_eq!(modules.len(), 5 * 3);
    for module in modules.keys() {
        assert!(
            module.contains("self_attn")
                && !module.contains("layers.3.")
                && !module.contains("o_proj"),
            "{module}"
        );
    }
    let found: BTreeMap<String, usize> = modules
        .iter()
        .map(|(module, record)| {
            (
                module.clone(),
                record["q"].as_u64().expect("a rank") as usize,
            )
        })
        .collect();
    assert_eq!(found, by_sorting(&weights, &modules, 50));
    // what is not decomposed is carried: the untrained merge is the base
    let facts = world.json(&["merge", arg(&split), "--out", arg(&world.path("merged"))]);
    assert_eq!(facts["identical_to_base"], true);
    // fewer than one for each of the fifteen is refused before anything is begun
    let too_small = world.path("too-small");
    let options = [
        "--budget",
        "14",
        "--include",
        "self_attn",
        "--exclude",
        "layers.3",
        "--exclude",
        "*.o_proj",
    ];
    world
        .run(
            &[
                &["decompose", arg(&base), "--out", arg(&too_small)],
                &options[..],
            ]
            .concat(),
        )
        .refuses(&["14 singular values", "15 matrices", "--budget", "--include"]);
    assert!(!too_small.exists());
}

#[test]
fn one_way_to_say_the_rank() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let ways = [
        ["--rank-fraction", "0.5"],
        ["--rank", "4"],
        ["--energy", "0.9"],
        ["--budget", "100"],
    ];
    for (i, first) in ways.iter().enumerate() {
        for second in &ways[i + 1..] {
            let run = world.run(&[&["plan", arg(&base)], &first[..], &second[..]].concat());
            assert_eq!(run.code, Some(2), "{first:?} {second:?}");
            assert!(run.stderr.contains("cannot be used with"), "{}", run.stderr);
        }
    }
    for bad in [
        ["--energy", "0"],
        ["--energy", "1.2"],
        ["--energy", "nan"],
        ["--budget", "0"],
        ["--budget", "-3"],
    ] {
        assert_eq!(
            world.run(&[&["plan", arg(&base)], &bad[..]].concat()).code,
            Some(2),
            "{bad:?}"
        );
    }
}

#[test]
fn a_plan_says_what_headers_cannot_know() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let plan = |options: &[&str]| world.json(&[&["plan", arg(&base)], options].concat());
    let decomposed = |plan: &Value| -> Vec<Value> {
        let modules = plan["modules"].as_array().expect("modules").iter();
        modules
            .filter(|m| m["action"] == "decompose")
            .cloned()
            .collect()
    };
    let energy = plan(&["--energy", "0.5"]);
    assert_eq!(energy["trainable"]["sigma"], Value::Null);
    let split = world.path("svd");
    let found = world.json(&[
        "decompose",
        arg(&base),
        "--out",
        arg(&split),
        "--energy",
        "0.5",
    ]);
    let (found, most) = (
        found["trainable"]["sigma"].as_u64(),
        energy["trainable"]["sigma_max"].as_u64(),
    );
    assert!(
        found.is_some() && found <= most,
        "{found:?} of at most {most:?}"
    );
    let budget = plan(&["--budget", "700"]);
    assert_eq!(budget["trainable"]["sigma"], 700);
    for plan in [&energy, &budget] {
        let modules = decomposed(plan);
        assert_eq!(modules.len(), 42);
        assert!(
            modules
                .iter()
                .all(|m| m["q"].is_null() && m["q_max"].as_u64() > Some(0))
        );
    }
    let known = plan(&["--rank", "5"]);
    assert_eq!(known["trainable"]["sigma"], 42 * 5);
    assert!(decomposed(&known).iter().all(|m| m["q"] == 5));
    let text = world
        .run(&["plan", arg(&base), "--energy", "0.5"])
        .succeeds()
        .stdout;
    for words in [
        "at most 2,304",
        "cost of decomposing, at most",
        "energy 0.5",
        "0.5 of the energy",
    ] {
        assert!(text.contains(words), "`{words}` is missing from\n{text}");
    }
    let text = world
        .run(&["plan", arg(&base), "--budget", "700", "--all"])
        .succeeds()
        .stdout;
    for words in ["700", "≤ 128", "triplets of the budget"] {
        assert!(text.contains(words), "`{words}` is missing from\n{text}");
    }
}

/// Waits until a folder holds this many finished files, or the process has ended.
fn wait_for_files(child: &mut std::process::Child, folder: &Path, count: usize) {
    for _ in 0..20_000 {
        let finished = std::fs::read_dir(folder).map_or(0, |entries| {
            let names = entries.flatten().map(|e| e.file_name());
            names
                .filter(|n| !n.to_string_lossy().starts_with('.'))
                .count()
        });
        if finished >= count || child.try_wait().expect("asks").is_some() {
            return;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

#[test]
fn killed_by_energy_or_budget_it_continues_to_the_same_bytes() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    for options in [["--energy", "0.95"], ["--budget", "2000"]] {
        let decompose = |out: &Path, threads: &str| -> Vec<String> {
            let fixed = [
                "decompose",
                arg(&base),
                "--out",
                arg(out),
                "--threads",
                threads,
            ];
            fixed
                .iter()
                .chain(&options)
                .map(ToString::to_string)
                .collect()
        };
        let run = |arguments: Vec<String>| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            world.run(&arguments).succeeds()
        };
        let reference = world.path(&format!("undisturbed{}", options[0]));
        run(decompose(&reference, "2"));
        let reference = files(&reference);
        let mut interrupted = 0;
        let mut reread = 0;
        // one shard: the parts wait for the last of them
        for (folder, count) in [("spectra", 1), ("spectra", 25), ("parts", 1), ("parts", 30)] {
            let out = world.path(&format!("killed{}-{folder}-{count}", options[0]));
            let arguments = decompose(&out, "1");
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let mut child = world.command(&arguments).spawn().expect("starts");
            wait_for_files(&mut child, &out.join(".svdhub").join(folder), count);
            child.kill().expect("kills");
            child.wait().expect("is gone");
            interrupted += usize::from(!out.join("svd.safetensors.index.json").exists());
            let again = run(decompose(&out, "2"));
            reread += usize::from(again.stderr.contains("spectra are known already"));
            let continued = files(&out);
            assert!(continued.keys().eq(reference.keys()));
            for (name, bytes) in &continued {
                assert!(
                    *bytes == reference[name],
                    "{name} differs after a kill at {folder} {count}, {options:?}"
                );
            }
            for left in ["parts", "spectra"] {
                assert!(
                    !out.join(".svdhub").join(left).exists(),
                    "no {left} are left"
                );
            }
        }
        assert!(
            interrupted >= 2,
            "only {interrupted} runs were interrupted: the kills come too late"
        );
        assert_eq!(
            reread >= 2,
            options[0] == "--budget",
            "{reread} runs found spectra"
        );
    }
}

fn loss(world: &World, model: &[&str]) -> f64 {
    let data = fixture("eighty-heldout.txt");
    let facts = world.json(
        &[
            &["evaluate"],
            model,
            &["--data", arg(&data), "--length", "64"],
        ]
        .concat(),
    );
    facts["loss"].as_f64().expect("a loss")
}

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
        std::fs::write(split.join("config.json"), config.to_string()).expect("writes");
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

fn family(family: &str, tied: bool) -> Value {
    json!({"model_type": family, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": tied, "head_dim": 6, "rms_norm_eps": 1e-6})
}

#[test]
fn biases_are_carried_beside_the_decomposed_weights() {
    let world = World::new();
    let base = world.random_model("qwen2", &family("qwen2", true));
    let split = world.path("svd");
    world
        .run(&[
            "decompose",
            arg(&base),
            "--out",
            arg(&split),
            "--energy",
            "0.8",
        ])
        .succeeds();
    let modules = modules(&split);
    assert_eq!(modules.len(), 2 * 7);
    for (module, record) in &modules {
        let biased = ["q_proj", "k_proj", "v_proj"]
            .iter()
            .any(|p| module.ends_with(p));
        assert_eq!(record["bias"], biased, "{module}");
    }
    let weights = tensors(&base);
    let biases: Vec<&String> = weights
        .keys()
        .filter(|name| name.ends_with(".bias"))
        .collect();
    assert_eq!(biases.len(), 2 * 3);
    let inside = Checkpoint::open(&split, Layout::Decomposition).expect("opens");
    let merged = world.path("merged");
    world
        .run(&["merge", arg(&split), "--out", arg(&merged)])
        .succeeds();
    let merged = tensors(&merged);
    for bias in biases {
        assert!(
            weights[bias].to_f32().iter().any(|&x| x != 0.0),
            "{bias} is zero"
        );
        assert!(
            inside.read(bias).expect("is carried") == weights[bias],
            "{bias} changed on the way in"
        );
        assert!(
            merged[bias] == weights[bias],
            "{bias} changed on the way out"
        );
    }
}

#[test]
fn fused_projections_are_decomposed_as_they_are_stored() {
    let world = World::new();
    let base = world.random_model("phi3", &family("phi3", false));
    let split = world.path("svd");
    world
        .run(&["decompose", arg(&base), "--out", arg(&split), "--rank", "3"])
        .succeeds();
    let modules = modules(&split);
    // 4 heads and 2 × 2 of keys and values of 6 each; gate and up of 40 each
    for (part, shape) in [
        ("self_attn.qkv_proj", json!([48, 24])),
        ("mlp.gate_up_proj", json!([80, 24])),
    ] {
        for layer in 0..2 {
            let record = &modules[&format!("model.layers.{layer}.{part}")];
            assert_eq!(
                (&record["shape"], &record["q"]),
                (&shape, &json!(3)),
                "{part}"
            );
        }
    }
    assert_eq!(modules.len(), 2 * 4 + 1, "{:?}", modules.keys());
    let merged = world.path("merged");
    let facts = world.json(&["merge", arg(&split), "--out", arg(&merged)]);
    assert_eq!(facts["identical_to_base"], true);
}

#[test]
fn a_decomposition_of_the_first_schema_still_merges() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    let mut config = json_file(&split.join("config.json"));
    for (schema, readable) in [(1, true), (2, true), (3, true), (4, false)] {
        config["svd"]["schema"] = schema.into();
        std::fs::write(split.join("config.json"), config.to_string()).expect("writes");
        let run = world.run(&[
            "merge",
            arg(&split),
            "--out",
            arg(&world.path(&format!("merged-{schema}"))),
        ]);
        assert_eq!(run.code == Some(0), readable, "{}", run.stderr);
        assert!(
            readable || run.stderr.contains("newer svdhub"),
            "{}",
            run.stderr
        );
    }
}

#[test]
fn a_plan_counts_a_head_beyond_thirty_two_bits() {
    let world = World::new();
    let giant = world.path("giant");
    std::fs::create_dir_all(&giant).expect("a directory");
    let config = json!({"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 1_048_576, "tie_word_embeddings": true});
    std::fs::write(giant.join("config.json"), config.to_string()).expect("writes");
    let elements = 1_048_576u64 * 8_192;
    for rank in [
        ["--rank-fraction", "1"],
        ["--energy", "1"],
        ["--budget", "5000000000"],
    ] {
        let plan = world.json(&[&["plan", arg(&giant), "--untie-head"], &rank[..]].concat());
        let modules = plan["modules"].as_array().expect("modules");
        let head = modules
            .iter()
            .find(|m| m["name"] == "lm_head.weight")
            .expect("the head");
        assert_eq!(head["bytes"], 2 * elements);
        assert_eq!(head["q_max"], 8_192);
        // M′ and both sides' vectors in f32
        let head_bytes = 4 * elements + 4 * 8_192 * (1_048_576 + 8_192 + 1);
        let number = |key: &str| plan[key].as_u64().expect("a number");
        assert!(
            number("disk_bytes") > head_bytes && number("peak_bytes") > 4 * elements,
            "{rank:?}"
        );
        assert!(number("parameters") > 2 * elements);
    }
}
