//! What other programs load: by their own word where Python has them, by arithmetic and golden values everywhere.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use ndarray::Array2;
use serde_json::{Value, json};
use svdhub::adapter::{Adapter, AdapterConfig, SCHEMA};
use svdhub::artifact::Artifact;
use svdhub::base::Base;
use svdhub::event::Silent;
use svdhub::format::Origin;
use svdhub::json::Tool;
use svdhub::model::Trained;
use svdhub::plan::{Role, role};
use svdhub::source::{Source, load};
use svdhub::weights::{Checkpoint, Dtype, Elements, Header, ShardWriter};

use crate::python::{checked, python};
use crate::world::{World, arg, files, fixture, loss, write_model};

const LORA: &str = "adapter_model.safetensors";
const STATE: &str = "svd_training.safetensors";

/// Rounding to nearest in f32, relative.
const HALF_ULP: f64 = 5.97e-8;

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("JSON")
}

fn tensors(dir: &Path, file: &str) -> BTreeMap<String, Elements> {
    let checkpoint = Checkpoint::single(dir, file).expect("opens");
    let names = checkpoint.inventory.entries().map(|(_, e)| e.name.clone());
    let read = |name: String| {
        let elements = checkpoint.read(&name).expect("reads");
        (name, elements)
    };
    names.map(read).collect()
}

fn matrix(elements: &Elements) -> Array2<f64> {
    let sides = (elements.shape[0], elements.shape[1]);
    let values = Array2::from_shape_vec(sides, elements.to_f32()).expect("a matrix");
    values.mapv(f64::from)
}

fn norm(matrix: &Array2<f64>) -> f64 {
    matrix.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn decomposed(world: &World, base: &Path, name: &str, options: &[&str]) -> PathBuf {
    let split = world.path(name);
    world
        .run(&[&["decompose", arg(base), "--out", arg(&split)], options].concat())
        .succeeds();
    split
}

/// The adapter of `fixtures/make_peft_golden.py`: some Δσ are zero, of either sign, none the same as its neighbour.
fn delta(j: usize, i: usize) -> f32 {
    ((7 * i + 3 * j) % 11) as f32 / 8.0 - 5.0 / 8.0
}

/// An adapter by formula, of a self-contained decomposition: Δσ of every module, and norms if wanted.
fn crafted(
    split: &Path,
    out: PathBuf,
    delta: impl Fn(usize, usize) -> f32,
    norms: bool,
) -> PathBuf {
    let artifact = Artifact::open(split, None).expect("opens");
    let modules = artifact.svd.modules.iter().enumerate();
    let delta = modules.map(|(j, (module, record))| {
        (module.clone(), (0..record.q).map(|i| delta(j, i)).collect())
    });
    let mut tensors = BTreeMap::new();
    if norms {
        let entries = artifact.checkpoint.inventory.entries();
        let mut names: Vec<&String> = entries.map(|(_, e)| &e.name).collect();
        names.retain(|name| role(name) == Role::Norm);
        names.sort();
        for (t, name) in names.into_iter().enumerate() {
            let base = artifact.base_tensor(name).expect("reads");
            let values: Vec<f32> = base
                .to_f32()
                .into_iter()
                .enumerate()
                .map(|(e, x)| x * (1.0 + (((t + e) % 5) as f32 - 2.0) / 16.0))
                .collect();
            tensors.insert(name.clone(), Elements::from_f32(&base.shape, &values));
        }
    }
    std::fs::create_dir_all(&out).expect("a directory");
    let adapter = Adapter {
        dir: out.clone(),
        config: AdapterConfig {
            schema: SCHEMA,
            method: "sigma".into(),
            trained: vec!["sigma".into()],
            decomposition: Origin {
                repo: None,
                revision: None,
                content_sha256: artifact.content_sha256.clone(),
            },
            base: artifact.svd.base.clone(),
            weights_sha256: None,
            tool: Tool::this(),
            sha256: None,
        },
        delta: delta.collect(),
        core: BTreeMap::new(),
        tensors,
    };
    adapter.save().expect("saves");
    out
}

/// A world with the fixture decomposed, and adapters of it.
struct Fixture {
    world: World,
    base: PathBuf,
    split: PathBuf,
    a: PathBuf,
    b: PathBuf,
}

impl Fixture {
    fn new(options: &[&str]) -> Self {
        let world = World::new();
        let base = world.model("base", Dtype::BF16, u64::MAX);
        let split = decomposed(&world, &base, "svd", options);
        let a = crafted(&split, world.path("a"), delta, false);
        let b = crafted(&split, world.path("b"), |j, i| delta(i, j + 2), false);
        Self {
            world,
            base,
            split,
            a,
            b,
        }
    }

    fn arguments<'a>(&'a self, to: &'a str, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
        let fixed = ["export", arg(&self.split), "--to", to, "--out", arg(out)];
        [&fixed, more].concat()
    }

    fn lora(&self, name: &str, more: &[&str]) -> (PathBuf, Value) {
        let out = self.world.path(name);
        let facts = self.world.json(&self.arguments("peft-lora", &out, more));
        (out, facts)
    }
}

/// ΔW of a module, and B·A from the file, both in f64.
fn change_and_product(
    split: &Path,
    lora: &BTreeMap<String, Elements>,
    module: &str,
    delta: &[f64],
) -> (Array2<f64>, Array2<f64>) {
    let artifact = Artifact::open(split, None).expect("opens");
    let factors = artifact.factors(module).expect("factors");
    let mut left = factors.u.mapv(f64::from);
    for (mut row, d) in left.rows_mut().into_iter().zip(delta) {
        row *= *d;
    }
    let part = |which: &str| matrix(&lora[&format!("base_model.model.{module}.{which}.weight")]);
    let product = part("lora_B").dot(&part("lora_A"));
    (left.t().dot(&factors.v.mapv(f64::from)), product)
}

/// How far from orthonormal the rows are: the largest element of w·wᵀ − 1.
fn skew(split: &Path, module: &str) -> f64 {
    let artifact = Artifact::open(split, None).expect("opens");
    let factors = artifact.factors(module).expect("factors");
    let off = |w: &Array2<f32>| {
        let w = w.mapv(f64::from);
        let gram = w.dot(&w.t()) - Array2::<f64>::eye(w.nrows());
        gram.iter().fold(0f64, |worst, x| worst.max(x.abs()))
    };
    off(&factors.u).max(off(&factors.v))
}

#[test]
fn the_product_is_the_weighted_sum_of_the_adapters() {
    let t = Fixture::new(&[]);
    let (a, b) = (format!("{}*0.7", arg(&t.a)), format!("{}*-0.4", arg(&t.b)));
    let (out, facts) = t.lora("lora", &["--adapter", &a, "--adapter", &b]);
    assert_eq!(
        (&facts["to"], &facts["rank"]),
        (&json!("peft-lora"), &json!(16))
    );
    assert_eq!(facts["predicted_error"], 0.0);
    let measured = facts["measured_error"].as_f64().expect("an error");
    assert!(
        measured > 0.0 && measured < 4.0 * HALF_ULP,
        "{measured:.1e}"
    );
    assert_eq!(json_file(&out.join("report.json"))["export"], facts);

    let lora = tensors(&out, LORA);
    let adapters =
        [(&t.a, 0.7), (&t.b, -0.4)].map(|(dir, w)| (Adapter::read(dir).expect("reads"), w));
    let modules = &adapters[0].0.delta;
    assert_eq!(lora.len(), 2 * modules.len());
    assert!(lora.values().all(|tensor| tensor.dtype == Dtype::F32));
    for (module, of_a) in modules {
        let sum: Vec<f64> = (0..of_a.len())
            .map(|i| {
                let sum: f64 = adapters
                    .iter()
                    .map(|(x, w)| w * f64::from(x.delta[module][i]))
                    .sum();
                f64::from(sum as f32)
            })
            .collect();
        assert!(sum.iter().any(|&d| d < 0.0) && sum.iter().any(|&d| d > 0.0));
        let (change, product) = change_and_product(&t.split, &lora, module, &sum);
        // q rank-one terms, each of two factors rounded once; |u|, |v| ≤ 1
        let allowed = sum.iter().map(|d| d.abs()).sum::<f64>() * 2.1 * HALF_ULP;
        let off = (&change - &product)
            .iter()
            .fold(0f64, |w, x| w.max(x.abs()));
        assert!(off <= allowed && norm(&change) > 0.5, "{module}: {off:.1e}");
        // rows that nothing fills are zero
        let name = |which: &str| format!("base_model.model.{module}.{which}.weight");
        let kept = facts["modules"][module]["kept"].as_u64().expect("a count") as usize;
        assert_eq!(kept, sum.iter().filter(|&&d| d != 0.0).count());
        let (b, a) = (
            matrix(&lora[&name("lora_B")]),
            matrix(&lora[&name("lora_A")]),
        );
        assert_eq!((b.ncols(), a.nrows()), (16, 16));
        for r in 0..16 {
            let (column, row) = (b.column(r), a.row(r));
            assert_eq!(column.iter().any(|&x| x != 0.0), r < kept, "{module} {r}");
            assert_eq!(row.iter().any(|&x| x != 0.0), r < kept, "{module} {r}");
        }
    }
}

#[test]
fn a_smaller_rank_keeps_the_largest_changes_and_foretells_its_error() {
    let t = Fixture::new(&["--rank-fraction", "0.3"]);
    let deltas = Adapter::read(&t.a).expect("reads").delta;
    for (wanted, rank) in [(5, 8), (8, 8), (20, 32), (64, 64)] {
        let text = wanted.to_string();
        let name = format!("lora-{wanted}");
        let (out, facts) = t.lora(&name, &["--adapter", arg(&t.a), "--rank", &text]);
        let lora = tensors(&out, LORA);
        assert_eq!(facts["rank"], rank);
        assert_eq!(json_file(&out.join("adapter_config.json"))["r"], rank);
        let (mut off_all, mut change_all, mut dropped_all, mut all) = (0.0, 0.0, 0.0, 0.0);
        for (module, delta) in &deltas {
            let exact: Vec<f64> = delta.iter().map(|&d| d.into()).collect();
            let mut squares: Vec<f64> = exact.iter().map(|d| d * d).collect();
            squares.sort_by(|x, y| y.total_cmp(x));
            let dropped: f64 = squares.iter().skip(wanted).sum();
            let total: f64 = squares.iter().sum();
            let record = &facts["modules"][module];
            let number = |key: &str| record[key].as_f64().expect("a number");
            assert!(
                (number("predicted_error") - (dropped / total).sqrt()).abs() < 1e-12,
                "{module}"
            );

            let (change, product) = change_and_product(&t.split, &lora, module, &exact);
            let error = norm(&(&change - &product)) / norm(&change);
            assert!((number("measured_error") - error).abs() < 1e-9, "{module}");
            // Vectors that are orthonormal up to s give ‖ΣΔσ·u·v‖² = Σδ²·(1 + 2s) + s²·(Σ|δ|)², in numerator and denominator;
            // B and A are rounded, as above.
            let (q, s) = (delta.len() as f64, skew(&t.split, module));
            let allowed = 2.0 * (2.0 * s + q * s * s) + 2.1 * HALF_ULP * q.sqrt();
            let found = number("measured_error") - number("predicted_error");
            assert!(
                found.abs() <= allowed,
                "{module}: {found:.1e}, allowed {allowed:.1e}"
            );
            off_all += norm(&(&change - &product)).powi(2);
            change_all += norm(&change).powi(2);
            dropped_all += dropped;
            all += total;
        }
        let total = |key: &str| facts[key].as_f64().expect("a number");
        assert!((total("predicted_error") - f64::sqrt(dropped_all / all)).abs() < 1e-12);
        assert!((total("measured_error") - f64::sqrt(off_all / change_all)).abs() < 1e-9);
        let lossless = wanted >= 38;
        assert_eq!(total("predicted_error") == 0.0, lossless, "rank {wanted}");
        assert!(lossless || total("predicted_error") > 0.1);
    }
}

#[test]
fn what_no_engine_serves_is_cut_or_warned_of() {
    let world = World::new();
    let config = json!({"model_type": "llama", "hidden_size": 528, "intermediate_size": 530, "num_hidden_layers": 1,
        "num_attention_heads": 8, "vocab_size": 40, "tie_word_embeddings": true});
    let base = world.random_model("wide", &config);
    let split = decomposed(
        &world,
        &base,
        "svd",
        &["--rank-fraction", "1", "--include", "o_proj"],
    );
    let adapter = crafted(&split, world.path("a"), |_, i| 1.0 + i as f32, false);
    let export = |name: &str, more: &[&str]| {
        let out = world.path(name);
        let fixed = [
            "export",
            arg(&split),
            "--adapter",
            arg(&adapter),
            "--to",
            "peft-lora",
            "--out",
            arg(&out),
        ];
        let run = world.run(&[&fixed, more].concat()).succeeds();
        (json_file(&out.join("report.json"))["export"].clone(), run)
    };
    let (facts, run) = export("all", &[]);
    assert_eq!(
        (&facts["rank"], &facts["kept"], &facts["trained"]),
        (&json!(512), &json!(512), &json!(528))
    );
    // the sixteen smallest are left out: Σ 1..16 k² of Σ 1..528 k²
    let squares = |n: f64| n * (n + 1.0) * (2.0 * n + 1.0) / 6.0;
    let wanted = (squares(16.0) / squares(528.0)).sqrt();
    for key in ["predicted_error", "measured_error"] {
        let found = facts[key].as_f64().expect("an error");
        assert!(
            (found / wanted - 1.0).abs() < 1e-3,
            "{key}: {found} instead of {wanted}"
        );
    }
    let shown = format!("{wanted:.1e}");
    assert!(
        run.stdout.contains(&shown[..3]),
        "{} in {}",
        shown,
        run.stdout
    );
    assert!(!run.stderr.contains("serving"), "{}", run.stderr);

    let (facts, run) = export("more", &["--rank", "520"]);
    assert_eq!((&facts["rank"], &facts["kept"]), (&json!(520), &json!(520)));
    assert!(
        run.stderr.contains("520") && run.stderr.contains("serving engines"),
        "{}",
        run.stderr
    );
    let (facts, _) = export("beyond", &["--rank", "100000"]);
    assert_eq!(
        (&facts["rank"], &facts["predicted_error"]),
        (&json!(528), &json!(0.0))
    );
}

#[test]
fn short_names_are_used_only_where_they_mean_nothing_else() {
    let t = Fixture::new(&["--exclude", "layers.2.mlp", "--exclude", "o_proj"]);
    let (out, _) = t.lora("lora", &["--adapter", arg(&t.a)]);
    let config = json_file(&out.join("adapter_config.json"));
    let mut wanted: Vec<String> = ["q_proj", "k_proj", "v_proj"].map(String::from).into();
    for layer in [0, 1, 3, 4, 5] {
        for part in ["down", "gate", "up"] {
            wanted.push(format!("model.layers.{layer}.mlp.{part}_proj"));
        }
    }
    wanted.sort();
    assert_eq!(config["target_modules"], json!(wanted));
    assert_eq!(tensors(&out, LORA).len(), 2 * (5 * 3 + 6 * 3));
}

#[test]
fn a_checkpoint_of_the_inner_model_gives_the_names_of_the_whole() {
    let world = World::new();
    let (outer, inner) = (
        world.model("outer", Dtype::BF16, u64::MAX),
        without_prefix(&world),
    );
    let mut written = Vec::new();
    for (name, base) in [("outer", outer), ("inner", inner)] {
        let split = decomposed(
            &world,
            &base,
            &format!("{name}-svd"),
            &["--exclude", "layers.2.mlp"],
        );
        let adapter = crafted(&split, world.path(&format!("{name}-a")), delta, true);
        let [lora, state] = [("peft-lora", LORA), ("svd-training", STATE)].map(|(to, file)| {
            let out = world.path(&format!("{name}-{to}"));
            let fixed = [
                "export",
                arg(&split),
                "--adapter",
                arg(&adapter),
                "--to",
                to,
                "--out",
                arg(&out),
            ];
            world.run(&fixed).succeeds();
            (
                tensors(&out, file),
                files(&out).remove("adapter_config.json"),
            )
        });
        written.push((lora, state));
    }
    assert_eq!(written[0].0.0.len(), 2 * 39 + 13);
    assert!(written[0] == written[1]);
}

/// What PEFT reads, read by ourselves: on the plain model it is the adapter on the decomposition.
#[test]
fn an_exported_lora_on_the_base_answers_like_the_adapter_it_was_made_of() {
    let world = World::new();
    let outer = world.model("outer", Dtype::BF16, u64::MAX);
    let inner = without_prefix(&world);
    for (name, base, options, norms) in [
        ("outer", &outer, &[][..], true),
        ("untied", &outer, &["--untie-head"], false),
        ("inner", &inner, &[], true),
        // of some layers only: their names are written whole
        ("some", &inner, &["--exclude", "layers.0"], false),
    ] {
        let path = |what: &str| world.path(&format!("{name}-{what}"));
        let split = decomposed(&world, base, &format!("{name}-svd"), options);
        let a = crafted(&split, path("a"), delta, norms);
        let b = crafted(&split, path("b"), |j, i| delta(j, i) * 2.0, false);
        let lora = |adapter: &Path, what: &str| {
            let out = path(what);
            let export = ["export", arg(&split), "--to", "peft-lora", "--adapter"];
            let to = [arg(adapter), "--out", arg(&out)];
            world.run(&[&export[..], &to].concat()).succeeds();
            out
        };
        let (lora_a, lora_b) = (lora(&a, "lora-a"), lora(&b, "lora-b"));
        let with = |model: &Path, adapters: &[&str]| {
            let adapters = adapters.iter().flat_map(|adapter| ["--adapter", adapter]);
            let model: Vec<&str> = [arg(model)].into_iter().chain(adapters).collect();
            loss(&world, &model)
        };
        let before = with(base, &[]);
        let (minus, nothing) = (
            format!("{}*-0.5", arg(&lora_b)),
            format!("{}*0", arg(&lora_a)),
        );
        assert_eq!(with(base, &[&nothing]), before, "{name}");
        let wanted = with(&split, &[arg(&a)]);
        assert!(
            (wanted - before).abs() > 1e-3 * before,
            "{name}: {wanted} and {before}"
        );
        for (model, adapters) in [
            (base, &[arg(&lora_a)][..]),
            (&split, &[arg(&lora_a)]),
            // b is twice a's Δσ
            (
                base,
                &[arg(&lora_a), arg(&lora_b), &format!("{}*-1", arg(&lora_b))],
            ),
            (&split, &[arg(&a), arg(&b), &minus, &minus]),
        ] {
            let found = with(model, adapters);
            // some hundred f32 roundings in each of two evaluation orders, averaged over ten thousand tokens
            assert!(
                (found - wanted).abs() < 2e-6 * wanted,
                "{name}, {adapters:?}: {found} instead of {wanted}"
            );
        }
        for (model, what) in [(base, "of-base"), (&split, "of-split")] {
            let merged = path(what);
            let merge = ["merge", arg(model), "--adapter", arg(&lora_a)];
            let to = ["--dtype", "f32", "--out", arg(&merged)];
            let run = world.run(&[&merge[..], &to].concat());
            if name == "untied" && model == base {
                run.refuses(&["`lm_head` alone", "--untie-head"]);
                continue;
            }
            run.succeeds();
            let found = loss(&world, &[arg(&merged)]);
            assert!(
                (found - wanted).abs() < 2e-6 * wanted,
                "{name}, merged {what}: {found} instead of {wanted}"
            );
        }
    }
}

#[test]
fn a_lora_that_would_be_computed_otherwise_or_does_not_fit_is_refused_by_name() {
    let t = Fixture::new(&[]);
    let (lora, _) = t.lora("lora", &["--adapter", arg(&t.a)]);
    let (config, weights) = (
        json_file(&lora.join("adapter_config.json")),
        tensors(&lora, LORA),
    );
    let refused = |words: &[&str]| {
        let data = fixture("eighty-heldout.txt");
        let evaluate = [
            "evaluate",
            arg(&t.base),
            "--adapter",
            arg(&lora),
            "--data",
            arg(&data),
        ];
        t.world.run(&evaluate).refuses(words);
    };
    let write = |config: &Value| {
        std::fs::write(lora.join("adapter_config.json"), config.to_string()).expect("writes");
    };
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("all")),
        ("alpha_pattern", json!({"q_proj": 3})),
    ] {
        let mut changed = config.clone();
        changed[key] = value;
        write(&changed);
        refused(&["adapter_config.json", key]);
    }
    // the same numbers, with the square root of r beneath α
    write(&config);
    let with = || loss(&t.world, &[arg(&t.base), "--adapter", arg(&lora)]);
    let (usual, rank) = (with(), config["r"].as_f64().expect("a number"));
    let mut stabilised = config.clone();
    stabilised["use_rslora"] = true.into();
    stabilised["lora_alpha"] = rank.sqrt().into();
    write(&stabilised);
    let found = with();
    assert!((found - usual).abs() < 2e-6 * usual, "{found} for {usual}");
    write(&config);
    let save = |weights: &BTreeMap<String, Elements>| {
        let layouts = weights.iter();
        let header =
            Header::compose(layouts.map(|(n, e)| (n.as_str(), e.dtype, e.shape.as_slice())));
        let mut writer =
            ShardWriter::create(&lora.join(LORA), header.expect("a header")).expect("creates");
        for (name, elements) in weights {
            writer.put(name, &elements.bytes).expect("writes");
        }
        writer.finish().expect("finishes");
    };
    let a = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight";
    let without = |name: &str| {
        let mut some = weights.clone();
        let tensor = some.remove(name).expect("is there");
        (some, tensor)
    };
    let (alone, stored) = without(a);
    save(&alone);
    refused(&["model.layers.0.mlp.down_proj", "both of lora_A and lora_B"]);
    let turned = Elements {
        shape: stored.shape.iter().rev().copied().collect(),
        ..stored.clone()
    };
    let embedding = tensors(&t.base, "model.safetensors")["model.embed_tokens.weight"].clone();
    for (name, tensor, words) in [
        (
            "unknown.lora_A.weight",
            stored.clone(),
            "does not begin with",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            stored.clone(),
            "nor a tensor",
        ),
        (a, turned, "does not fit"),
        (
            "base_model.model.model.embed_tokens.weight",
            embedding.clone(),
            "one weight for embedding and head",
        ),
        (
            "base_model.model.lm_head.weight",
            embedding,
            "one weight for embedding and head",
        ),
    ] {
        let mut changed = alone.clone();
        changed.insert(name.into(), tensor);
        save(&changed);
        refused(&[LORA, words]);
    }
}

#[test]
fn a_published_base_is_pinned_and_a_private_path_is_not_told() {
    let world = World::with_hub();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    for (name, model, repo) in [
        ("hub", "org/base", json!("org/base")),
        ("local", arg(&base), Value::Null),
    ] {
        let split = decomposed(&world, Path::new(model), &format!("svd-{name}"), &[]);
        let adapter = crafted(&split, world.path(&format!("a-{name}")), delta, false);
        let pin = json_file(&split.join("config.json"))["svd"]["base"]["revision"].clone();
        assert_eq!(pin.as_str().map(str::len), repo.as_str().map(|_| 40));
        for to in ["peft-lora", "svd-training"] {
            let out = world.path(&format!("{to}-{name}"));
            world
                .run(&[
                    "export",
                    arg(&split),
                    "--adapter",
                    arg(&adapter),
                    "--to",
                    to,
                    "--out",
                    arg(&out),
                ])
                .succeeds();
            if to == "peft-lora" {
                let config = json_file(&out.join("adapter_config.json"));
                assert_eq!(
                    (&config["base_model_name_or_path"], &config["revision"]),
                    (&repo, &pin)
                );
            }
            let here = world
                .path("")
                .to_string_lossy()
                .trim_end_matches('/')
                .to_string();
            let mut found = files(&out);
            found.insert(
                "report.json".into(),
                std::fs::read(out.join("report.json")).expect("reads"),
            );
            for (file, bytes) in found {
                let tells = bytes
                    .windows(here.len())
                    .any(|window| window == here.as_bytes());
                assert!(!tells, "{file} of {name} tells where the base lies");
            }
            // the card knows what it is
            let repo = format!("org/{to}-{name}");
            world.run(&["publish", arg(&out), &repo]).succeeds();
            let card = std::fs::read_to_string(out.join("README.md")).expect("reads");
            let words = if to == "peft-lora" {
                "library_name: peft"
            } else {
                "create_from_model(empty, rank_fraction=0.1)"
            };
            assert!(card.contains(words), "{card}");
        }
    }
}

#[test]
fn trained_norms_are_carried_whole_and_other_tensors_refused_by_name() {
    let t = Fixture::new(&[]);
    let adapter = crafted(&t.split, t.world.path("norms"), delta, true);
    let out = t.world.path("lora");
    let half = format!("{}*0.5", arg(&adapter));
    let run = t
        .world
        .run(&t.arguments("peft-lora", &out, &["--adapter", &half]))
        .succeeds();
    assert!(
        run.stderr.contains("13 trained norms") && run.stderr.contains("vLLM"),
        "{}",
        run.stderr
    );
    let config = json_file(&out.join("adapter_config.json"));
    let saved = config["modules_to_save"].as_array().expect("modules");
    assert_eq!(saved.len(), 13);
    let base = tensors(&t.base, "model.safetensors");
    let lora = tensors(&out, LORA);
    let trained = Adapter::read(&adapter).expect("reads").tensors;
    for module in saved {
        let tensor = format!("{}.weight", module.as_str().expect("a name"));
        let found = lora[&format!("base_model.model.{tensor}")].to_f32();
        let (base, trained) = (base[&tensor].to_f32(), trained[&tensor].to_f32());
        let halfway: Vec<f32> = base
            .iter()
            .zip(&trained)
            .map(|(x, y)| (x + y) / 2.0)
            .collect();
        assert!(found == halfway && found != base, "{tensor}");
    }

    // a norm that has a bias is carried with it: PEFT asks for all of a module
    let neox = json!({"intermediate_size": 96, "num_key_value_heads": 4, "layer_norm_eps": 1e-5,
        "rotary_pct": 1.0, "use_parallel_residual": true, "hidden_act": "gelu", "attention_bias": true});
    let base_of_neox = t.world.random_model("neox", &small("gpt_neox", neox));
    let split = decomposed(&t.world, &base_of_neox, "neox-svd", &[]);
    let of_neox = crafted(&split, t.world.path("neox-adapter"), delta, true);
    let out = t.world.path("neox-lora");
    let export = ["export", arg(&split), "--adapter", arg(&of_neox)];
    let to = ["--to", "peft-lora", "--out", arg(&out)];
    t.world.run(&[export, to].concat()).succeeds();
    let (lora, stored) = (
        tensors(&out, LORA),
        tensors(&base_of_neox, "model.safetensors"),
    );
    for module in json_file(&out.join("adapter_config.json"))["modules_to_save"]
        .as_array()
        .expect("modules")
    {
        let bias = format!("{}.bias", module.as_str().expect("a name"));
        let found = lora[&format!("base_model.model.{bias}")].to_f32();
        assert_eq!(found, stored[&bias].to_f32(), "{bias}");
    }

    let mut with_embedding = Adapter::read(&adapter).expect("reads");
    let embedding = "model.embed_tokens.weight";
    let values = base[embedding].cast(Dtype::F32);
    with_embedding.tensors.insert(embedding.into(), values);
    with_embedding.dir = t.world.path("embedding");
    std::fs::create_dir(&with_embedding.dir).expect("a directory");
    with_embedding.save().expect("saves");
    let (dir, out) = (with_embedding.dir, t.world.path("refused"));
    t.world
        .run(&t.arguments("peft-lora", &out, &["--adapter", arg(&dir)]))
        .refuses(&[embedding, "peft-lora", "svdhub merge"]);
    assert!(!out.exists());
    // a state dict holds every tensor
    let out = t.world.path("state");
    t.world
        .run(&t.arguments("svd-training", &out, &["--adapter", arg(&dir)]))
        .succeeds();
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_foreign_touched() {
    let t = Fixture::new(&[]);
    let out = t.world.path("lora");
    let with = |adapter: &str| {
        t.world
            .run(&t.arguments("peft-lora", &out, &["--adapter", adapter]))
    };
    with(&format!("{}*1e39", arg(&t.a))).refuses(&[".delta", "inf", "smaller factor"]);
    let other = decomposed(&t.world, &t.base, "other", &["--rank", "5"]);
    let foreign = crafted(&other, t.world.path("foreign"), delta, false);
    with(arg(&foreign)).refuses(&["another decomposition", "expected", "found"]);
    with(arg(&t.base)).refuses(&["no adapter is here", "svd_adapter.json"]);
    with("./nowhere").refuses(&["nowhere", "no adapter is here"]);
    let run = with(&format!("{}*much", arg(&t.a)));
    assert!(
        run.code == Some(2) && run.stderr.contains("factor"),
        "{}",
        run.stderr
    );
    assert_eq!(
        t.world.run(&t.arguments("peft-lora", &out, &[])).code,
        Some(2)
    );
    let none = t.arguments("peft-lora", &out, &["--adapter", arg(&t.a), "--rank", "0"]);
    let run = t.world.run(&none);
    assert!(
        run.code == Some(2) && run.stderr.contains("--rank"),
        "{}",
        run.stderr
    );
    t.world
        .run(&t.arguments(
            "svd-training",
            &out,
            &["--adapter", arg(&t.a), "--rank", "4"],
        ))
        .refuses(&["--rank", "LoRA"]);
    assert!(!out.exists());

    std::fs::create_dir(&out).expect("a directory");
    std::fs::write(out.join("thesis.tex"), "precious").expect("writes");
    with(arg(&t.a)).refuses(&["thesis.tex", "--out"]);
    assert_eq!(files(&out).len(), 1);

    // the same again is done already; another job does not take its place
    let (out, facts) = t.lora("mine", &["--adapter", arg(&t.a)]);
    let before = files(&out);
    let again = t
        .world
        .json(&t.arguments("peft-lora", &out, &["--adapter", arg(&t.a)]));
    assert_eq!(again, facts);
    let less = ["--adapter", arg(&t.a), "--rank", "3"];
    t.world
        .run(&t.arguments("peft-lora", &out, &less))
        .refuses(&["target", "rank"]);
    assert!(files(&out) == before);
}

#[test]
fn a_killed_export_is_refused_and_begun_anew() {
    let t = Fixture::new(&[]);
    let (whole, _) = t.lora("whole", &["--adapter", arg(&t.a)]);
    let (out, _) = t.lora("killed", &["--adapter", arg(&t.a)]);
    let job = out.join(".svdhub").join("job.json");
    let mut state = json_file(&job);
    state["finished"] = false.into();
    std::fs::write(&job, state.to_string()).expect("writes");
    std::fs::remove_file(out.join("adapter_config.json")).expect("removes");
    t.world
        .run(&["publish", arg(&out), "org/x", "--dry-run"])
        .refuses(&["unfinished", "export"]);
    t.lora("killed", &["--adapter", arg(&t.a)]);
    assert!(files(&out) == files(&whole));
}

#[test]
fn the_state_dict_is_the_merged_model_in_parts() {
    let t = Fixture::new(&["--exclude", "layers.3.mlp.up_proj"]);
    let sidecar = decomposed(
        &t.world,
        &t.base,
        "sidecar",
        &["--exclude", "layers.3.mlp.up_proj", "--layout", "sidecar"],
    );
    let adapter = crafted(&t.split, t.world.path("norms"), delta, true);
    let (out, merged) = (t.world.path("state"), t.world.path("merged"));
    let arguments = t.arguments("svd-training", &out, &["--adapter", arg(&adapter)]);
    let facts = t.world.json(&arguments);
    assert_eq!(
        (&facts["rank_fraction"], &facts["triplets"]),
        (&json!(0.1), &json!(432 - 12))
    );
    // of the layer that was left out, and of the head, which is the embedding
    assert_eq!(
        facts["whole"],
        json!(["model.layers.3.mlp.up_proj", "lm_head"])
    );
    assert_eq!(facts["zeros"], 2 * 12);
    t.world
        .run(&[
            "merge",
            arg(&t.split),
            "--adapter",
            arg(&adapter),
            "--out",
            arg(&merged),
            "--dtype",
            "f32",
        ])
        .succeeds();
    assert_eq!(
        json_file(&out.join("config.json"))["tie_word_embeddings"],
        false
    );
    assert!(files(&out).keys().all(|name| !name.starts_with("model")));

    let (state, mut merged) = (tensors(&out, STATE), tensors(&merged, "model.safetensors"));
    merged.insert(
        "lm_head.weight".into(),
        merged["model.embed_tokens.weight"].clone(),
    );
    assert_eq!(state.len(), merged.len() + 3 * 43);
    for (tensor, wanted) in merged {
        let module = tensor.strip_suffix(".weight").expect("a weight");
        let Some(u) = state.get(&format!("{module}.U")) else {
            assert!(state[&tensor] == wanted, "{tensor}");
            continue;
        };
        let part = |name: &str| &state[&format!("{module}.{name}")];
        let (u, v, sigma) = (matrix(u), matrix(part("V")), part("sigma").to_f32());
        let (rest, wanted) = (matrix(part("weight")), matrix(&wanted));
        assert_eq!(
            (u.ncols(), v.ncols(), sigma.len()),
            (sigma.len(), sigma.len(), sigma.len())
        );
        let mut left = u;
        for (mut column, &s) in left.columns_mut().into_iter().zip(&sigma) {
            column *= f64::from(s);
        }
        let sum = left.dot(&v.t()) + &rest;
        // M′, σ + Δσ and the merged weight are each rounded once
        let scale = rest.iter().chain(&wanted).fold(0f64, |m, x| m.max(x.abs()));
        let sigma_max = sigma.iter().fold(0f64, |m, &s| m.max(s.abs().into()));
        let allowed = HALF_ULP * (2.0 * scale + sigma.len() as f64 * sigma_max);
        let off = (&sum - &wanted).iter().fold(0f64, |w, x| w.max(x.abs()));
        assert!(off <= allowed, "{module}: {off:.1e}, allowed {allowed:.1e}");
    }

    // a sidecar gives the same bytes: M′ is the same, wherever M comes from
    let mut same = Adapter::read(&adapter).expect("reads");
    same.config.decomposition.content_sha256 = Artifact::open(&sidecar, None)
        .expect("opens")
        .content_sha256;
    same.dir = t.world.path("norms-sidecar");
    std::fs::create_dir(&same.dir).expect("a directory");
    same.save().expect("saves");
    let other = t.world.path("state-sidecar");
    t.world
        .run(&[
            "export",
            arg(&sidecar),
            "--adapter",
            arg(&same.dir),
            "--to",
            "svd-training",
            "--out",
            arg(&other),
        ])
        .succeeds();
    assert!(files(&other)[STATE] == files(&out)[STATE]);
}

fn small(family: &str, more: Value) -> Value {
    let mut config = json!({"model_type": family, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": false, "head_dim": 6,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "original_max_position_embeddings": 64, "hidden_act": "silu",
        "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": null, "sliding_window": null,
        "torch_dtype": "bfloat16"});
    for (key, value) in more.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

#[test]
fn layers_that_svd_training_has_not_are_refused_by_name() {
    let world = World::new();
    let base = world.random_model("qwen2", &small("qwen2", json!({})));
    let split = decomposed(&world, &base, "svd", &[]);
    let adapter = crafted(&split, world.path("a"), delta, false);
    let out = world.path("state");
    world
        .run(&[
            "export",
            arg(&split),
            "--adapter",
            arg(&adapter),
            "--to",
            "svd-training",
            "--out",
            arg(&out),
        ])
        .refuses(&["model.layers.0.self_attn.k_proj", "no bias", "svd-training"]);
    assert!(!out.exists());
}

#[test]
fn the_head_of_a_tied_base_is_warned_of() {
    let t = Fixture::new(&["--untie-head"]);
    let out = t.world.path("lora");
    let run = t
        .world
        .run(&t.arguments("peft-lora", &out, &["--adapter", arg(&t.a)]))
        .succeeds();
    assert!(
        run.stderr.contains("lm_head") && run.stderr.contains("merge_and_unload"),
        "{}",
        run.stderr
    );
    let targets = json_file(&out.join("adapter_config.json"))["target_modules"].clone();
    assert!(
        targets
            .as_array()
            .expect("a list")
            .contains(&json!("lm_head"))
    );
}

/// Names, shapes, config and numbers are those of PEFT's own files; the model they make answers as PEFT's does.
#[test]
fn files_and_answers_are_those_that_peft_gives() {
    let golden = json_file(&fixture("golden").join("peft.json"));
    let t = Fixture::new(&[]);
    let adapter = crafted(&t.split, t.world.path("golden"), delta, true);
    let (out, _) = t.lora("lora", &["--adapter", arg(&adapter)]);
    let lora = tensors(&out, LORA);
    let shapes: serde_json::Map<String, Value> = lora
        .iter()
        .map(|(name, tensor)| (name.clone(), json!(tensor.shape)))
        .collect();
    assert_eq!(Value::from(shapes), golden["tensors"]);
    let config = json_file(&out.join("adapter_config.json"));
    let sorted = |value: &Value| {
        let mut names: Vec<String> = serde_json::from_value(value.clone()).expect("names");
        names.sort();
        names
    };
    for (key, value) in config.as_object().expect("an object") {
        match key.as_str() {
            "base_model_name_or_path" => assert_eq!(*value, Value::Null),
            "target_modules" | "modules_to_save" => {
                assert_eq!(sorted(value), sorted(&golden["config"][key]))
            }
            _ => assert_eq!(*value, golden["config"][key], "{key}"),
        }
    }

    // W = M + B·A, and the norms of the adapter
    let mut model = tensors(&t.base, "model.safetensors");
    for (name, wanted) in golden["change"].as_object().expect("modules") {
        let part = |which: &str| matrix(&lora[&format!("base_model.model.{name}.{which}.weight")]);
        let change = part("lora_B").dot(&part("lora_A"));
        let (m, n) = change.dim();
        let found = [(0, 0), (m / 2, n / 3), (m - 1, n - 1)].map(|at| change[at]);
        for (found, wanted) in found.iter().zip(wanted.as_array().expect("numbers")) {
            let wanted = wanted.as_f64().expect("a number");
            // singular vectors of f32 against f64, turned by close neighbours, times Δσ below 1
            assert!(
                (found - wanted).abs() < GOLDEN_CHANGE,
                "{name}: {found} instead of {wanted}"
            );
        }
        let weight = model.get_mut(&format!("{name}.weight")).expect("a weight");
        let merged = (matrix(weight) + change).mapv(|x| x as f32);
        *weight = Elements::from_f32(&[m, n], merged.as_slice().expect("contiguous"));
    }
    for (name, tensor) in &lora {
        if let Some(norm) = name
            .strip_prefix("base_model.model.")
            .filter(|n| role(n) == Role::Norm)
        {
            model.insert(norm.into(), tensor.clone());
        }
    }
    let merged = t.world.path("by-hand");
    std::fs::create_dir(&merged).expect("a directory");
    std::fs::copy(t.base.join("config.json"), merged.join("config.json")).expect("copies");
    write_model(&merged, &model, u64::MAX);
    let base = Base::open(&merged, None, None).expect("opens");
    let decoder = load(
        &Source::Model(base),
        Trained::default(),
        &Device::Cpu,
        &Silent,
    )
    .expect("loads");
    let ids: Vec<u32> = serde_json::from_value(golden["input_ids"].clone()).expect("ids");
    let length = ids.len();
    let ids = Tensor::from_vec(ids, (1, length), &Device::Cpu).expect("ids");
    let logits = decoder
        .logits(&ids)
        .and_then(|l| Ok(l.get(0)?.get(length - 1)?.to_vec1::<f32>()?))
        .expect("forward");
    let wanted: Vec<f64> = serde_json::from_value(golden["logits_last"].clone()).expect("logits");
    let scale = wanted.iter().fold(0f64, |m, x| m.max(x.abs()));
    let off = logits
        .iter()
        .zip(&wanted)
        .fold(0f64, |w, (&x, y)| w.max((f64::from(x) - y).abs()));
    assert!(off < 1e-5 * scale, "logits are {:.1e} off", off / scale);
}

/// 1.6e-7 was seen on 2026-11-25.
const GOLDEN_CHANGE: f64 = 1e-6;

/// decompose, export, merge in f32: for the script.
struct Case {
    base: PathBuf,
    split: PathBuf,
    adapter: PathBuf,
    merged: PathBuf,
}

impl Case {
    fn new(world: &World, base: PathBuf, name: &str, options: &[&str], norms: bool) -> Self {
        let split = decomposed(world, &base, &format!("{name}-svd"), options);
        let adapter = crafted(&split, world.path(&format!("{name}-adapter")), delta, norms);
        let merged = world.path(&format!("{name}-merged"));
        world
            .run(&[
                "merge",
                arg(&split),
                "--adapter",
                arg(&adapter),
                "--out",
                arg(&merged),
                "--dtype",
                "f32",
            ])
            .succeeds();
        Self {
            base,
            split,
            adapter,
            merged,
        }
    }

    fn export(&self, world: &World, to: &str, more: &[&str]) -> PathBuf {
        let out = self.merged.with_file_name(format!(
            "{}-{to}{}",
            self.merged.file_name().expect("a name").to_string_lossy(),
            more.join("")
        ));
        let fixed = [
            "export",
            arg(&self.split),
            "--adapter",
            arg(&self.adapter),
            "--to",
            to,
            "--out",
            arg(&out),
        ];
        world.run(&[&fixed, more].concat()).succeeds();
        out
    }
}

/// The fixture, its names without `model.`: saved from the model inside.
fn without_prefix(world: &World) -> PathBuf {
    let base = world.model("inner", Dtype::BF16, u64::MAX);
    let renamed = tensors(&base, "model.safetensors")
        .into_iter()
        .map(|(name, tensor)| (name.trim_start_matches("model.").to_string(), tensor))
        .collect();
    write_model(&base, &renamed, u64::MAX);
    base
}

#[test]
fn peft_answers_like_the_merged_model() {
    let Some(python) = python(
        "peft, transformers, torch",
        "peft_answers_like_the_merged_model",
    ) else {
        return;
    };
    let world = World::new();
    let model = |name: &str| world.model(name, Dtype::BF16, u64::MAX);
    let family = |name: &str, more| world.random_model(name, &small(name, more));
    let cases = [
        Case::new(&world, model("llama"), "llama", &[], false),
        Case::new(
            &world,
            model("llama-norms"),
            "norms",
            &["--exclude", "layers.2.mlp", "--rank", "20"],
            true,
        ),
        Case::new(&world, without_prefix(&world), "inner", &[], true),
        Case::new(
            &world,
            family("phi3", json!({})),
            "phi3",
            &["--rank-fraction", "0.5"],
            true,
        ),
        Case::new(
            &world,
            family("qwen2", json!({})),
            "qwen2",
            &["--rank-fraction", "1"],
            false,
        ),
        Case::new(
            &world,
            family("qwen3", json!({"tie_word_embeddings": true})),
            "qwen3",
            &["--rank", "5"],
            true,
        ),
    ];
    for case in &cases {
        let out = case.export(&world, "peft-lora", &[]);
        let facts = checked(
            &python,
            &["peft", arg(&case.base), arg(&out), arg(&case.merged)],
        );
        assert!(facts["logits"].is_number() && facts["weights_merged"].is_number());
    }
    // cut: the error in the space of weights is the one foretold, by the script
    let out = cases[0].export(&world, "peft-lora", &["--rank", "3"]);
    let facts = checked(
        &python,
        &[
            "peft",
            arg(&cases[0].base),
            arg(&out),
            arg(&cases[0].merged),
        ],
    );
    assert!(facts["weight_error"].as_f64() > Some(0.1));
    let untied = Case::new(&world, model("tied"), "tied", &["--untie-head"], false);
    let out = untied.export(&world, "peft-lora", &[]);
    checked(
        &python,
        &[
            "peft",
            arg(&untied.base),
            arg(&out),
            arg(&untied.merged),
            "--tied-head",
        ],
    );
}

#[test]
fn svd_training_answers_like_the_merged_model() {
    let packages = "svd_training, transformers, torch";
    let Some(python) = python(packages, "svd_training_answers_like_the_merged_model") else {
        return;
    };
    let world = World::new();
    let model = |name: &str| world.model(name, Dtype::BF16, u64::MAX);
    let family = |name: &str, more| world.random_model(name, &small(name, more));
    for case in [
        Case::new(
            &world,
            model("llama"),
            "llama",
            &["--exclude", "layers.2.mlp", "--energy", "0.5"],
            true,
        ),
        Case::new(&world, model("tied"), "tied", &["--untie-head"], false),
        Case::new(
            &world,
            family("phi3", json!({})),
            "phi3",
            &["--rank-fraction", "0.5"],
            true,
        ),
        Case::new(
            &world,
            family("mistral", json!({})),
            "mistral",
            &["--rank", "5"],
            false,
        ),
    ] {
        let out = case.export(&world, "svd-training", &[]);
        let facts = checked(&python, &["svd-training", arg(&out), arg(&case.merged)]);
        assert!(facts["logits_saved"].is_number());
    }
}
