//! From a Hub and back to it.

use svdhub::hub::server::{Effect, Fault};
use svdhub::weights::Dtype;

use crate::world::{TOKEN, World, arg, files, fixture};

/// A world whose Hub holds the fixture model as `org/base`.
fn published_base(shard_bytes: u64) -> World {
    let world = World::with_hub();
    let base = world.model("base", Dtype::BF16, shard_bytes);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    world
}

fn fault(world: &World, matching: &str, times: usize, effect: Effect) {
    world.hub().inject(Fault {
        matching: matching.into(),
        times,
        effect,
    });
}

#[test]
fn the_whole_path_runs_by_repository_names() {
    let world = published_base(600_000);
    let split = world.path("svd");
    world
        .run(&["decompose", "org/base", "--out", arg(&split)])
        .succeeds();
    let published = world.json(&["publish", arg(&split), "org/base-svd", "--tag", "v1"]);
    let commit = published["commit"].as_str().expect("a commit").to_string();
    assert_eq!(commit.len(), 40);

    let (data, heldout) = (fixture("eighty-train.txt"), fixture("eighty-heldout.txt"));
    let adapter = world.path("adapter");
    world
        .run(&[
            "train",
            "org/base-svd@v1",
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
        ])
        .succeeds();
    let pin: serde_json::Value =
        serde_json::from_slice(&std::fs::read(adapter.join("svd_adapter.json")).expect("reads"))
            .expect("JSON");
    assert_eq!(pin["decomposition"]["repo"], "org/base-svd");
    assert_eq!(pin["decomposition"]["revision"], commit.as_str());
    assert_eq!(pin["base"]["repo"], "org/base");
    world
        .run(&["publish", arg(&adapter), "org/base-adapter", "--private"])
        .succeeds();

    let merged = world.path("merged");
    world
        .run(&[
            "merge",
            "org/base-svd",
            "--adapter",
            "org/base-adapter",
            "--out",
            arg(&merged),
        ])
        .succeeds();
    world
        .run(&[
            "evaluate",
            arg(&merged),
            "--data",
            arg(&heldout),
            "--length",
            "64",
        ])
        .succeeds();
    let published = world.json(&["publish", arg(&merged), "org/tuned"]);
    assert!(published["files"].as_u64() > Some(5));
    let card = std::fs::read_to_string(merged.join("README.md")).expect("a card");
    assert!(
        card.contains("base_model: \"org/base\"") && card.contains("license: \"apache-2.0\""),
        "{card}"
    );
    assert!(card.contains("| merged | eighty-heldout.txt |"), "{card}");

    // fetched by somebody else, into another cache
    let fetched = World::new();
    let mut command = fetched.command(&["verify", "org/tuned", "--against", "org/base", "--json"]);
    let run = command
        .env("HF_ENDPOINT", world.hub().endpoint())
        .output()
        .expect("runs");
    let facts: serde_json::Value = serde_json::from_slice(&run.stdout).expect("JSON");
    assert_eq!(facts["ok"], true, "{facts}");

    let again = world.json(&["publish", arg(&merged), "org/tuned"]);
    assert_eq!(again["unchanged"], again["files"], "nothing is sent twice");
    assert_eq!(again["commit"], published["commit"]);
}

#[test]
fn plan_reads_headers_by_range_and_no_weights() {
    let world = published_base(600_000);
    let before = world.hub().requests().len();
    let plan = world.json(&["plan", "org/base"]);
    assert_eq!(plan["trainable"]["sigma"], 432);
    assert_eq!(plan["linear_layers"], 42);
    let requests = world.hub().requests();
    let contents = requests[before..]
        .iter()
        .filter(|r| r.path.starts_with("/objects/"));
    let mut read = 0;
    for request in contents {
        let range = request.range.as_deref().expect("weights are read by range");
        let (start, end) = range
            .strip_prefix("bytes=")
            .and_then(|r| r.split_once('-'))
            .expect("a range");
        read += end.parse::<u64>().expect("an end") - start.parse::<u64>().expect("a start");
    }
    assert!(read > 0 && read < 5 * (64 << 10), "{read} bytes");
}

#[test]
fn a_cut_download_goes_on_and_ends_in_the_right_bytes() {
    let world = published_base(u64::MAX);
    fault(
        &world,
        "GET /objects/",
        2,
        Effect::CutBody {
            after_bytes: 700_000,
        },
    );
    world.run(&["verify", "org/base"]).succeeds();
    let resumed = world
        .hub()
        .requests()
        .into_iter()
        .filter(|r| r.path.starts_with("/objects/") && r.range.is_some());
    assert!(resumed.count() >= 2, "the rest is asked for by range");
}

#[test]
fn wrong_bytes_never_reach_the_cache() {
    let world = published_base(u64::MAX);
    fault(&world, "GET /objects/", 1, Effect::WrongBytes);
    world.run(&["verify", "org/base"]).refuses(&[
        "model.safetensors",
        "sha256",
        "expected",
        "found",
    ]);
    let blobs = world.path("hf/hub/models--org--base/blobs");
    let sums: Vec<String> = files(&blobs)
        .into_values()
        .map(|b| svdhub::sum::sha256_hex(&b))
        .collect();
    let checked = world.run(&["verify", "org/base"]).succeeds();
    assert!(checked.stdout.contains("as it should be"));
    for (name, _) in files(&blobs).iter().filter(|(name, _)| name.len() == 64) {
        assert!(
            !sums.contains(name),
            "the wrong bytes were not stored under the right name"
        );
    }
}

#[test]
fn server_trouble_passes_and_error_pages_are_no_files() {
    let world = published_base(u64::MAX);
    let page = |status| Effect::Status {
        status,
        headers: vec![],
        body: "<html>expired</html>".into(),
    };
    fault(&world, "/tree/", 1, page(503));
    fault(&world, "GET /objects/", 1, page(500));
    world.run(&["verify", "org/base"]).succeeds();
    let other = World::new();
    fault(&world, "GET /objects/", 1, page(403));
    let run = other
        .command(&["verify", "org/base"])
        .env("HF_ENDPOINT", world.hub().endpoint())
        .output()
        .expect("runs");
    crate::world::Run::of(run).refuses(&["no right to download"]);
}

#[test]
fn a_hostile_file_name_is_refused() {
    let world = published_base(u64::MAX);
    let listing = r#"[{"type":"file","oid":"ce013625030ba8dba906f756967f9e9ca394464a","size":6,"path":"../../escaped.json"}]"#;
    let headers = vec![("content-type".to_string(), "application/json".to_string())];
    fault(
        &world,
        "/tree/",
        1,
        Effect::Status {
            status: 200,
            headers,
            body: listing.into(),
        },
    );
    world
        .run(&["verify", "org/base"])
        .refuses(&["../../escaped.json"]);
}

#[test]
fn the_token_is_sent_to_the_hub_alone() {
    let world = published_base(u64::MAX);
    world.run(&["verify", "org/base"]).succeeds();
    for request in world.hub().requests() {
        if request.path.starts_with("/objects/") {
            assert!(
                !request.authorized,
                "{} {} carries the token",
                request.method, request.path
            );
        }
    }
    for (name, bytes) in files(&world.path("base")) {
        assert!(!String::from_utf8_lossy(&bytes).contains(TOKEN), "{name}");
    }
}

#[test]
fn offline_means_the_cache_alone() {
    let world = published_base(u64::MAX);
    let offline = |model: &str| {
        let run = world
            .command(&["verify", model])
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .expect("runs");
        crate::world::Run::of(run)
    };
    offline("org/base").refuses(&["not in the cache", "HF_HUB_OFFLINE"]);
    world.run(&["verify", "org/base"]).succeeds();
    offline("org/base").succeeds();
}

#[test]
fn refusals_say_what_helps() {
    let world = published_base(u64::MAX);
    let base = world.path("base");
    let with = |token: Option<&str>, arguments: &[&str]| {
        let mut command = world.command(arguments);
        match token {
            Some(token) => command.env("HF_TOKEN", token),
            None => command.env_remove("HF_TOKEN"),
        };
        crate::world::Run::of(command.output().expect("runs"))
    };
    with(Some(TOKEN), &["verify", "org/missing"]).refuses(&[
        "no repository `org/missing`",
        "private",
        "HF_TOKEN",
    ]);
    with(Some(TOKEN), &["verify", "org/base@v9"]).refuses(&["no revision `v9`", "branch"]);
    with(Some("hf_wrong"), &["publish", arg(&base), "org/new"])
        .refuses(&["does not accept the token", "HF_TOKEN"]);
    with(Some("hf_read_only"), &["publish", arg(&base), "org/new"]).refuses(&["write"]);
    with(None, &["publish", arg(&base), "org/new"]).refuses(&["HF_TOKEN"]);
    fault(
        &world,
        "/api/models/org/base",
        9,
        Effect::Status {
            status: 403,
            headers: vec![("X-Error-Code".into(), "GatedRepo".into())],
            body: String::new(),
        },
    );
    with(Some(TOKEN), &["verify", "org/base"]).refuses(&["gated", "accept the terms"]);
}

#[test]
fn an_unreachable_hub_is_said_in_one_sentence() {
    let world = World::new();
    let run = world
        .command(&["plan", "org/base"])
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .expect("runs");
    crate::world::Run::of(run).refuses(&["http://127.0.0.1:9 cannot be reached", "HF_HUB_OFFLINE"]);
}

#[test]
fn a_branch_that_moved_is_a_conflict() {
    let world = published_base(u64::MAX);
    let base = world.path("base");
    std::fs::write(base.join("NOTICE"), "new").expect("writes");
    fault(
        &world,
        "/commit/main",
        1,
        Effect::Status {
            status: 412,
            headers: vec![],
            body: r#"{"error":"A commit has happened since"}"#.into(),
        },
    );
    world
        .run(&["publish", arg(&base), "org/base"])
        .refuses(&["moved while publishing", "run the same command again"]);
    let pushed = world.json(&["publish", arg(&base), "org/base", "--pr"]);
    assert!(pushed["pull_request_url"].as_str().is_some());
    let pushed = world.json(&["publish", arg(&base), "org/base", "--branch", "dev/x"]);
    assert_eq!(pushed["branch"], "dev/x");
}

#[test]
fn a_dry_run_sends_nothing() {
    let world = published_base(u64::MAX);
    let before = world.hub().requests().len();
    let run = world
        .run(&[
            "publish",
            arg(&world.path("base")),
            "org/other",
            "--dry-run",
        ])
        .succeeds();
    assert!(run.stdout.contains("model.safetensors"));
    assert_eq!(world.hub().requests().len(), before);
}
