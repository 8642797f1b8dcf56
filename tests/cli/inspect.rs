//! What a decomposition tells of its spectrum.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use svdhub::weights::{Checkpoint, Dtype, Layout};

use crate::world::{World, arg};

fn decomposed(world: &World, options: &[&str]) -> PathBuf {
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    world
        .run(&[&["decompose", arg(&base), "--out", arg(&split)], options].concat())
        .succeeds();
    split
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("JSON")
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    edit(&mut value);
    std::fs::write(path, value.to_string()).expect("writes");
}

/// As an earlier version would have left it.
fn without_spectrum(split: &Path) {
    let path = split.join("report.json");
    let mut report = read_json(&path);
    let sections = report.as_object_mut().expect("sections");
    sections.remove("spectrum").expect("a spectrum");
    std::fs::write(path, svdhub::json::seal(sections.clone())).expect("writes");
}

#[test]
fn facts_are_those_of_config_tensors_and_base() {
    let world = World::new();
    let split = decomposed(&world, &["--rank-fraction", "0.5"]);
    let facts = world.json(&["inspect", arg(&split)]);
    let config = read_json(&split.join("config.json"));
    let report = read_json(&split.join("report.json"));
    let base = Checkpoint::open(&world.path("base"), Layout::Model).expect("opens");
    let tensors = Checkpoint::open(&split, Layout::Decomposition).expect("opens");
    assert_eq!(facts["source"], "report");
    assert_eq!(
        (&facts["linear_layers"], &facts["layout"]),
        (&json!(42), &json!("residual"))
    );
    assert_eq!(facts["sigma"], report["decompose"]["trainable"]["sigma"]);
    assert_eq!(facts["rank"], config["svd"]["rank"]);
    let modules = facts["modules"].as_array().expect("modules");
    assert_eq!(modules.len(), 42);
    let (mut kept, mut whole) = (0.0, 0.0);
    for module in modules {
        let name = module["name"].as_str().expect("a name");
        let record = &config["svd"]["modules"][name];
        for key in ["q", "shape", "captured_energy", "route", "certificate"] {
            assert_eq!(module[key], record[key], "{key} of {name}");
        }
        let sigma = tensors.read(&format!("{name}.sigma")).expect("σ").to_f32();
        let ranks = module["ranks"].as_array().expect("ranks");
        assert!(ranks.len() <= 33 && ranks.len() == module["sigma"].as_array().expect("σ").len());
        for (rank, value) in ranks
            .iter()
            .zip(module["sigma"].as_array().into_iter().flatten())
        {
            let k = rank.as_u64().expect("a rank") as usize;
            assert_eq!(value.as_f64(), Some(sigma[k - 1].into()), "σ_{k} of {name}");
        }
        assert_eq!(ranks.last(), Some(&record["q"]));
        let weight = base.read(&format!("{name}.weight")).expect("M").to_f32();
        let norm2: f64 = weight.iter().map(|&x| f64::from(x).powi(2)).sum();
        // ‖M′‖² is a difference of sums of squares in f64, and nothing else is rounded
        let close = |key: &str, expected: f64| {
            let found = module[key].as_f64().expect("a number");
            assert!(
                (found / expected - 1.0).abs() < 1e-9,
                "{key} of {name}: {found} for {expected}"
            );
        };
        let first = f64::from(sigma[0]);
        close("norm", norm2.sqrt());
        close("stable_rank", norm2 / (first * first));
        close("condition", first / f64::from(sigma[sigma.len() - 1]));
        kept += sigma.iter().map(|&s| f64::from(s).powi(2)).sum::<f64>();
        whole += norm2;
    }
    let total = facts["captured_energy"].as_f64().expect("a share");
    assert!((total / (kept / whole) - 1.0).abs() < 1e-9);
    assert_eq!(
        report["decompose"]["captured_energy"],
        facts["captured_energy"]
    );
    for key in ["captured_energy", "roles", "modules"] {
        assert_eq!(facts[key], report["spectrum"][key], "{key} is the report's");
    }
}

#[test]
fn a_line_per_role_or_per_module() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let text = world.run(&["inspect", arg(&split)]).succeeds().stdout;
    for words in [
        "svd: fraction 0.1 of (a local directory), residual layout",
        "42 linear layers · 432 singular values",
        "largest certificates",
    ] {
        assert!(text.contains(words), "{words} is missing from\n{text}");
    }
    let facts = world.json(&["inspect", arg(&split)]);
    let role = &facts["roles"][0];
    assert_eq!(
        (&role["role"], &role["modules"]),
        (&json!("q_proj"), &json!(6))
    );
    let mut shares: Vec<f64> = facts["modules"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|m| m["role"] == "q_proj")
        .filter_map(|m| m["captured_energy"].as_f64())
        .collect();
    shares.sort_by(f64::total_cmp);
    let row = text
        .lines()
        .find(|l| l.starts_with("q_proj"))
        .expect("a row");
    let cells: Vec<&str> = row.split_whitespace().collect();
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let median = f64::midpoint(shares[2], shares[3]);
    assert_eq!(cells[1], "6");
    assert_eq!(cells[2..5], [shares[0], median, shares[5]].map(percent));
    let all = world
        .run(&["inspect", arg(&split), "--all"])
        .succeeds()
        .stdout;
    let rows = all.lines().filter(|l| l.starts_with("model.layers."));
    // and the three of the largest certificates
    assert_eq!(rows.count(), 42 + 3);
    let worst = text.lines().filter(|l| l.starts_with("model.layers."));
    assert_eq!(worst.count(), 3);
}

#[test]
fn pages_are_drawn_again_but_never_over_something_else() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let (page, figures) = (world.path("page.html"), world.path("figures"));
    let arguments = [
        "inspect",
        arg(&split),
        "--html",
        arg(&page),
        "--svg",
        arg(&figures),
    ];
    for _ in 0..2 {
        let run = world.run(&arguments).succeeds();
        assert!(
            run.stdout.ends_with("figures/stable_rank.svg\n"),
            "{}",
            run.stdout
        );
    }
    let html = std::fs::read_to_string(&page).expect("a page");
    assert_eq!(html.matches("<svg").count(), 3);
    assert!(html.contains("model.layers.5.mlp.down_proj"));
    for name in ["curves.svg", "energy.svg", "stable_rank.svg"] {
        let svg = std::fs::read_to_string(figures.join(name)).expect("a picture");
        roxmltree::Document::parse(&svg).expect("well-formed");
        assert!(html.contains(svg.trim()), "the page shows {name}");
    }
    for path in [&page, &figures.join("energy.svg")] {
        std::fs::write(path, "six months of work").expect("writes");
        let name = path.file_name().and_then(|n| n.to_str()).expect("a name");
        world
            .run(&arguments)
            .refuses(&[name, "svdhub did not write it", "choose another place"]);
        assert_eq!(
            std::fs::read_to_string(path).expect("reads"),
            "six months of work"
        );
        std::fs::remove_file(path).expect("removes");
    }
}

#[test]
fn what_is_no_decomposition_is_refused() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    world
        .run(&["inspect", arg(&base)])
        .refuses(&["is not a decomposition", "svdhub decompose"]);
    world
        .run(&["inspect", "./missing"])
        .refuses(&["config.json is missing"]);
}

#[test]
fn a_repository_is_inspected_without_its_weights() {
    let world = World::with_hub();
    let split = decomposed(&world, &[]);
    world
        .run(&["publish", arg(&split), "org/base-svd"])
        .succeeds();
    let before = world.hub().requests().len();
    let facts = world.json(&["inspect", "org/base-svd"]);
    let requests = world.hub().requests().split_off(before);
    for request in &requests {
        let weights =
            request.path.starts_with("/objects/") || request.path.contains(".safetensors");
        assert!(!weights, "{} {}", request.method, request.path);
    }
    assert!(requests.iter().any(|r| r.path.ends_with("/report.json")));
    assert_eq!(facts, world.json(&["inspect", arg(&split)]));
    // what was brought is a beginning, to which the rest can be added
    world.run(&["verify", "org/base-svd"]).succeeds();
}

#[test]
fn an_earlier_decomposition_tells_its_spectrum_by_its_tensors() {
    let world = World::with_hub();
    let split = decomposed(&world, &[]);
    let mut expected = world.json(&["inspect", arg(&split)]);
    expected["source"] = "tensors".into();
    without_spectrum(&split);
    let run = world.run(&["inspect", arg(&split), "--json"]).succeeds();
    assert!(run.stderr.contains("holds no spectrum"), "{}", run.stderr);
    let found: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!(found, expected, "both ways to the same numbers");
    world
        .run(&["publish", arg(&split), "org/old-svd"])
        .succeeds();
    world
        .run(&["inspect", "org/old-svd"])
        .refuses(&["holds no spectrum", "svdhub verify"]);
    world.run(&["verify", "org/old-svd"]).succeeds();
    assert_eq!(world.json(&["inspect", "org/old-svd"]), expected);
}

#[test]
fn what_a_stranger_says_is_checked_and_escaped() {
    let world = World::new();
    let split = decomposed(&world, &["--include", "layers.0.self_attn.q_proj"]);
    let (config, report) = (split.join("config.json"), split.join("report.json"));
    let name = "layers.0.\u{1b}[2J<script>alert(1)</script>";
    edit_json(&report, |r| {
        r["spectrum"]["modules"][0]["name"] = name.into()
    });
    world
        .run(&["inspect", arg(&split)])
        .refuses(&["report.json", "names the module"]);
    edit_json(&config, |c| {
        let modules = c["svd"]["modules"].as_object_mut().expect("modules");
        let (_, record) = modules.clone().into_iter().next().expect("a module");
        modules.clear();
        modules.insert(name.into(), record);
    });
    let page = world.path("page.html");
    let run = world
        .run(&["inspect", arg(&split), "--all", "--html", arg(&page)])
        .succeeds();
    assert!(!run.stdout.contains('\u{1b}'), "a name steers no terminal");
    let html = std::fs::read_to_string(&page).expect("a page");
    assert!(html.contains("&lt;script&gt;") && !html.contains("<script"));
    edit_json(&report, |r| {
        r["spectrum"]["modules"][0]["sigma"][0] = json!(-1.0)
    });
    world
        .run(&["inspect", arg(&split)])
        .refuses(&["report.json", "a curve that is none"]);
}

#[test]
fn the_spectrum_stays_with_its_decomposition() {
    let world = World::new();
    let split = decomposed(&world, &[]);
    let merged = world.path("merged");
    world
        .run(&["merge", arg(&split), "--out", arg(&merged)])
        .succeeds();
    let report = read_json(&merged.join("report.json"));
    assert!(report["decompose"].is_object() && report["spectrum"].is_null());
}
