//! From a Hub and back to it.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use svdhub::event::{Event, Observer, Stage};
use svdhub::hub::server::{Effect, ServerOptions};
use svdhub::hub::{Claims, Hub, HubOptions, PushOptions, Token};
use svdhub::weights::Dtype;

use crate::world::{TOKEN, World, answer, arg, files, fixture};

/// A world whose Hub holds the fixture model as `org/base`.
fn published_base(shard_bytes: u64) -> World {
    let world = World::with_hub();
    let base = world.model("base", Dtype::BF16, shard_bytes);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    world
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
    world.fault(
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

/// What it was told of transfers.
#[derive(Default)]
struct Tally {
    before: AtomicU64,
    total: AtomicU64,
    steps: AtomicU64,
    moved: AtomicU64,
}

impl Observer for Tally {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Started {
                stage: Stage::Download | Stage::Upload,
                done,
                total,
                ..
            } => {
                self.before.store(*done, Ordering::Relaxed);
                self.total.store(*total, Ordering::Relaxed);
            }
            Event::Advanced {
                stage: Stage::Download | Stage::Upload,
                by,
                ..
            } => {
                self.steps.fetch_add(1, Ordering::Relaxed);
                self.moved.fetch_add(*by, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

#[test]
fn progress_begins_where_a_transfer_goes_on_and_counts_no_byte_twice() {
    let world = World::with_hub_of(ServerOptions {
        part_bytes: Some(600_000),
        ..ServerOptions::default()
    });
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let weights = std::fs::read(base.join("model.safetensors")).expect("reads");
    let cache = world.path("cache/hub");
    let hub = Hub::new(HubOptions {
        token: Some(Token::new(TOKEN)),
        ..HubOptions::new(world.hub().endpoint(), &cache)
    })
    .expect("a client");

    // two parts go twice
    world.fault("PUT /parts/", 2, Effect::StatusAfter { status: 500 });
    let up = Tally::default();
    let options = PushOptions::default();
    hub.push(&base, "org/base", &Claims::default(), &options, &up)
        .expect("arrives");
    let size = weights.len() as u64;
    let (total, moved) = (up.total.into_inner(), up.moved.into_inner());
    assert_eq!((up.before.into_inner(), total, moved), (0, size, size));
    // not once for all of it, nor once for each part
    assert!(up.steps.into_inner() > size.div_ceil(600_000));

    // a part is there; what follows breaks off, and then comes from the beginning
    let blobs = cache.join("models--org--base/blobs");
    std::fs::create_dir_all(&blobs).expect("creates");
    let partial = format!("{}.incomplete", svdhub::sum::sha256_hex(&weights));
    std::fs::write(blobs.join(partial), &weights[..500_000]).expect("writes");
    let after_bytes = 200_000;
    world.fault("GET /objects/", 1, Effect::CutBody { after_bytes });
    world.fault("GET /objects/", 1, Effect::IgnoreRange);
    let down = Tally::default();
    hub.snapshot("org/base", "main", &down).expect("arrives");
    let (before, moved) = (down.before.into_inner(), down.moved.into_inner());
    assert_eq!(before, 500_000);
    assert_eq!(before + moved, down.total.into_inner());
    assert_eq!(world.asked(0, "GET /objects/").len(), 2);
}

#[test]
fn wrong_bytes_never_reach_the_cache() {
    let world = published_base(u64::MAX);
    world.fault("GET /objects/", 1, Effect::WrongBytes);
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
fn what_changed_in_the_cache_is_not_decomposed_as_what_the_hub_has() {
    let world = published_base(u64::MAX);
    world.run(&["verify", "org/base"]).succeeds();
    let blobs = world.path("hf/hub/models--org--base/blobs");
    let all = files(&blobs);
    let (name, bytes) = all
        .iter()
        .find(|(name, _)| name.len() == 64)
        .expect("a large file");
    let mut damaged = bytes.clone();
    *damaged.last_mut().expect("not empty") ^= 1;
    std::fs::write(blobs.join(name), damaged).expect("writes");

    let found = world.run(&["verify", "org/base"]);
    assert!(
        found.code == Some(1) && found.stdout.contains(name.as_str()),
        "{}",
        found.stdout
    );
    world
        .run(&["decompose", "org/base", "--out", "svd"])
        .refuses(&[
            "model.safetensors",
            name,
            "sha256",
            "cache",
            "remove that file",
        ]);

    std::fs::remove_file(blobs.join(name)).expect("removes");
    world
        .run(&["decompose", "org/base", "--out", "svd"])
        .succeeds();
}

#[test]
fn server_trouble_passes_and_error_pages_are_no_files() {
    let world = published_base(u64::MAX);
    let page = |status| Effect::Status {
        status,
        headers: vec![],
        body: "<html>expired</html>".into(),
    };
    world.fault("/tree/", 1, page(503));
    world.fault("GET /objects/", 1, page(500));
    world.run(&["verify", "org/base"]).succeeds();
    // a link of the other origin that expired is asked for anew
    let other = World::new();
    let verify = || {
        let run = other
            .command(&["verify", "org/base"])
            .env("HF_ENDPOINT", world.hub().endpoint())
            .output()
            .expect("runs");
        crate::world::Run::of(run)
    };
    world.fault("GET /objects/", 9, page(403));
    verify().refuses(&["link", "opens nothing", "expired", "again"]);
    world.hub().heal();
    verify().succeeds();
}

#[test]
fn a_file_with_a_hostile_name_is_refused_where_it_would_be_fetched() {
    let world = published_base(u64::MAX);
    let hostile = |path: &str| {
        let path = path.to_string();
        world.fault("/tree/", 1, Effect::ExtraFile { path });
    };
    hostile("../../escaped.json");
    world
        .run(&["hub", "download", "org/base", "--out", "fetched"])
        .refuses(&["../../escaped.json"]);
    // what a model needs is what lies at its top
    hostile("esc\\aped.json");
    world
        .run(&["verify", "org/base"])
        .refuses(&["esc\\aped.json"]);
    hostile("../../escaped.json");
    world.run(&["verify", "org/base"]).succeeds();
    // nor does it keep anybody from publishing
    hostile("../../escaped.json");
    world
        .run(&["publish", arg(&world.path("base")), "org/base"])
        .succeeds();
    let mut offline = world.command(&["verify", "org/base"]);
    offline.env("HF_HUB_OFFLINE", "1");
    crate::world::Run::of(offline.output().expect("runs")).succeeds();
    for below in ["", "hf", "hf/hub", "hf/hub/models--org--base"] {
        assert!(!world.path(below).join("escaped.json").exists());
    }
}

#[test]
fn a_colon_in_a_name_is_one_character_of_it() {
    let world = World::with_hub();
    let dir = world.path("model");
    std::fs::create_dir_all(&dir).expect("creates");
    std::fs::write(dir.join("12:30.txt"), "noon").expect("writes");
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let fetch = ["hub", "download", "org/model", "--out", "fetched"];
    world.run(&fetch).succeeds();
    let fetched = std::fs::read_to_string(world.path("fetched/12:30.txt"));
    assert_eq!(fetched.expect("reads"), "noon");
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
fn a_long_listing_is_read_to_its_end() {
    let world = World::with_hub_of(ServerOptions {
        page_entries: 2,
        ..ServerOptions::default()
    });
    let base = world.model("base", Dtype::BF16, 300_000);
    let pushed = world.json(&["publish", arg(&base), "org/base"]);
    let fetch = ["hub", "download", "org/base", "--out", "fetched"];
    let fetched = world.json(&fetch);
    let all = pushed["files"].as_u64().expect("a number") + 1;
    assert!(all > 6 && fetched["files"] == all, "{fetched}");
    // a next page that is not this Hub's is not asked for, and the rest is not taken for all
    let link = "<http://127.0.0.1:9/next>; rel=\"next\"";
    world.fault(
        "/tree/",
        1,
        Effect::Status {
            status: 200,
            headers: vec![("Link".into(), link.into())],
            body: "[]".into(),
        },
    );
    world.run(&fetch).refuses(&["leads elsewhere"]);
}

#[test]
fn a_mirror_is_asked_where_its_answers_name_the_public_hub() {
    let world = World::with_hub_of(ServerOptions {
        page_entries: 2,
        part_bytes: Some(100_000),
        ..ServerOptions::default()
    });
    let base = world.model("base", Dtype::BF16, 300_000);
    world.fault("/objects/batch", 9, Effect::PublicNames);
    world.fault("/tree/", 99, Effect::PublicNames);
    let pushed = world.json(&["publish", arg(&base), "org/base"]);
    for asked in ["complete_multipart", "/lfs/verify"] {
        let asked = world.asked(0, asked);
        assert!(!asked.is_empty() && asked.iter().all(|r| r.authorized));
    }
    let fetched = world.json(&["hub", "download", "org/base", "--out", "fetched"]);
    let all = pushed["files"].as_u64().expect("a number") + 1;
    assert_eq!(fetched["files"], all);
}

#[test]
fn a_download_replaces_what_a_download_brought_and_nothing_else() {
    let world = published_base(u64::MAX);
    let fetch = ["hub", "download", "org/base", "--out", "fetched"];
    std::fs::create_dir_all(world.path("fetched")).expect("creates");
    let config = world.path("fetched/config.json");
    std::fs::write(&config, "mine").expect("writes");
    world
        .run(&fetch)
        .refuses(&["fetched/config.json is there already", "did not write it"]);
    assert_eq!(files(&world.path("fetched")).len(), 1, "nothing was begun");
    std::fs::remove_file(&config).expect("removes");
    world.run(&fetch).succeeds();

    // the next commit's takes the place of this one's
    let base = world.path("base");
    let mut text = std::fs::read_to_string(base.join("config.json")).expect("reads");
    text.push('\n');
    std::fs::write(base.join("config.json"), &text).expect("writes");
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    world.run(&fetch).succeeds();
    assert_eq!(std::fs::read_to_string(&config).expect("reads"), text);

    // what was changed since is somebody's work
    std::fs::write(&config, "changed").expect("writes");
    world
        .run(&fetch)
        .refuses(&["fetched/config.json is there already", "as it is"]);
    std::fs::write(&config, &text).expect("writes");
    // one that grows so much that it travels as a large file is a download's all the same
    let notes = base.join("notes.txt");
    for bytes in [10, 11_000_000] {
        std::fs::write(&notes, vec![b'a'; bytes]).expect("writes");
        world.run(&["publish", arg(&base), "org/base"]).succeeds();
        world.run(&fetch).succeeds();
        let fetched = std::fs::metadata(world.path("fetched/notes.txt")).expect("is there");
        assert_eq!(fetched.len(), bytes as u64);
    }
    let weights = world.path("fetched/model.safetensors");
    let brought = std::fs::read(&weights).expect("reads");
    std::fs::write(&weights, "tuned").expect("writes");
    world
        .run(&fetch)
        .refuses(&["fetched/model.safetensors is there already"]);
    assert_eq!(std::fs::read(&weights).expect("reads"), b"tuned");
    std::fs::write(&weights, brought).expect("writes");
    world.run(&fetch).succeeds();
}

#[test]
fn a_hub_is_not_made_of_a_folder_that_holds_something() {
    let world = World::new();
    let parts = world.path("home/parts");
    std::fs::create_dir_all(&parts).expect("creates");
    std::fs::write(parts.join("mine"), "mine").expect("writes");
    let home = world.path("home");
    let serve = ["hub", "serve", arg(&home), "--port", "0"];
    world
        .run(&serve)
        .refuses(&["home", "no Hub of svdhub's wrote"]);
    assert!(parts.join("mine").exists() && !home.join("incoming").exists());
}

#[test]
fn processes_that_ask_for_one_repository_at_the_same_moment_share_the_cache() {
    let world = published_base(600_000);
    for round in 0..4 {
        let cache = world.path(&format!("cache-{round}"));
        let children: Vec<_> = (0..4)
            .map(|_| {
                let mut command = world.command(&["verify", "org/base"]);
                command.env("HF_HUB_CACHE", &cache);
                command.spawn().expect("starts")
            })
            .collect();
        for child in children {
            let done = child.wait_with_output().expect("ends");
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "{said}");
        }
        for (name, _) in files(&cache) {
            assert!(
                !name.contains(".partial") && !name.ends_with(".link"),
                "{name}"
            );
        }
    }
}

#[test]
fn a_repository_larger_than_the_disk_is_refused_before_it_starts() {
    let world = published_base(u64::MAX);
    let listing = |size: u64| {
        let sha256 = "0".repeat(64);
        let blob = "ce013625030ba8dba906f756967f9e9ca394464a";
        let file = json!([{"type": "file", "oid": blob, "size": size, "path": "model.safetensors",
            "lfs": {"oid": sha256, "size": size, "pointerSize": 130}}]);
        Effect::Status {
            status: 200,
            headers: vec![],
            body: file.to_string(),
        }
    };
    for arguments in [
        vec!["verify", "org/base"],
        vec!["hub", "download", "org/base", "--out", "fetched"],
    ] {
        world.fault("/tree/", 1, listing(1 << 60));
        world
            .run(&arguments)
            .refuses(&["needs 1152921504606846976 bytes", "free", "another disk"]);
    }
    assert!(world.asked(0, "/resolve/").is_empty(), "nothing was begun");
    assert!(!world.path("fetched").exists());
}

#[test]
fn the_variables_of_python_are_heeded() {
    let world = published_base(u64::MAX);
    world
        .run(&[
            "publish",
            arg(&world.path("base")),
            "org/secret",
            "--private",
        ])
        .succeeds();
    std::fs::write(world.path("login"), format!("{TOKEN}\n")).expect("writes");
    std::fs::create_dir_all(world.path("home")).expect("creates");
    std::fs::write(world.path("home/token"), TOKEN).expect("writes");
    let verify = |variables: &[(&str, &str)]| {
        let mut command = world.command(&["verify", "org/secret"]);
        command
            .env_remove("HF_TOKEN")
            .envs(variables.iter().copied());
        crate::world::Run::of(command.output().expect("runs"))
    };
    verify(&[]).refuses(&["no repository `org/secret`"]);
    verify(&[("HF_TOKEN_PATH", "login")]).succeeds();
    assert!(world.path("hf/hub/models--org--secret").is_dir());
    verify(&[("HF_HOME", "home")]).succeeds();
    assert!(world.path("home/hub/models--org--secret").is_dir());
    let quiet = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
    verify(&[("HF_HOME", "home"), quiet]).refuses(&["no repository"]);
    verify(&[("HF_TOKEN", TOKEN), ("HF_HUB_CACHE", "cache")]).succeeds();
    assert!(world.path("cache/models--org--secret").is_dir());
    // Xet is never used here, whether or not it is turned off
    verify(&[("HF_TOKEN", TOKEN), ("HF_HUB_DISABLE_XET", "1")]).succeeds();
    // a flag wins over the variable
    let endpoint = world.hub().endpoint();
    let mut command = world.command(&["verify", "org/base", "--endpoint", &endpoint]);
    command.env("HF_ENDPOINT", "http://127.0.0.1:9");
    crate::world::Run::of(command.output().expect("runs")).succeeds();
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
    with(None, &["publish", arg(&base), "org/new"])
        .refuses(&["does not accept the token", "HF_TOKEN"]);
    // to the anonymous a Hub may say the same of what is private, missing or mistyped, without a code
    let unnamed = |message| answer(401, &[("X-Error-Message", message)], "");
    world.fault("/revision/", 1, unnamed("Invalid username or password."));
    with(None, &["verify", "org/private"]).refuses(&["no repository `org/private`", "HF_TOKEN"]);
    let bad = "Invalid credentials in Authorization header";
    world.fault("/revision/", 1, unnamed(bad));
    with(Some("hf_x"), &["verify", "org/base"]).refuses(&["does not accept the token", bad]);
    // a right to read that is missing is not one to write
    world.fault(
        "/revision/",
        1,
        answer(403, &[], "enable gated repositories"),
    );
    let run = with(Some(TOKEN), &["verify", "org/base"]);
    let run = run.refuses(&["no right to read", "enable gated", "allowed to read"]);
    assert!(!run.stderr.contains("`write`"), "{}", run.stderr);
    world.fault(
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
fn a_token_that_expired_is_not_a_missing_repository() {
    let world = published_base(u64::MAX);
    let told = r#"User Access Token \"work\" is expired"#;
    let body = format!(r#"{{"error": "{told}"}}"#);
    world.fault("/api/models/", 9, answer(401, &[], &body));
    world.run(&["plan", "org/base"]).refuses(&[
        "does not accept the token",
        "is expired",
        "HF_TOKEN",
    ]);
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
fn an_address_without_its_scheme_is_none() {
    let world = World::new();
    for (address, shown) in [
        ("localhost:80", "localhost:80"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("hub.example", "hub.example"),
        ("ftp://hub.example", "ftp://hub.example"),
        ("me:secret@hub.example", "…@hub.example"),
    ] {
        let run = world
            .command(&["plan", "org/base"])
            .env("HF_ENDPOINT", address)
            .output()
            .expect("runs");
        let run = crate::world::Run::of(run);
        let run = run.refuses(&[&format!("\"{shown}\""), "https://host or http://host:port"]);
        assert!(!run.stderr.contains("secret"), "{}", run.stderr);
    }
}

#[test]
fn a_branch_that_moved_is_a_conflict() {
    let world = published_base(u64::MAX);
    let base = world.path("base");
    std::fs::write(base.join("NOTICE"), "new").expect("writes");
    world.fault(
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
    world
        .run(&["publish", arg(&world.path("base")), "no-name", "--dry-run"])
        .refuses(&["no-name", "org/name"]);
}
