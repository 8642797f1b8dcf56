//! How many triplets of what: by energy, by a budget for the whole model, by patterns.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use svdhub::linalg::{single_threaded_blas, spectrum};
use svdhub::weights::{Checkpoint, Dtype, Elements, Layout};

use crate::world::{World, arg, files, json_file, modules, remake, section, tensors};

/// The sum of squares of σ as it is stored: two roundings to f32, of σ and of the last Rayleigh quotient, doubled by
/// squaring.
const ENERGY_ERROR: f64 = 4.0 * 5.96e-8;

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
        remake(&split, "config.json", &config.to_string());
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
