//! The fifteen defects that were measured in hf-hub 1.0.0: each must not be ours.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use svdhub::hub::server::{Effect, ServerOptions};
use svdhub::sum::sha256_hex;
use svdhub::weights::Dtype;

use crate::world::{Run, World, answer, arg, files, wait_until};

/// A world whose Hub holds the fixture model as `org/base`.
fn published(options: ServerOptions) -> World {
    let world = World::with_hub_of(options);
    let base = world.model("base", Dtype::BF16, 600_000);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    world
}

fn world() -> World {
    published(ServerOptions::default())
}

fn download(world: &World) -> Run {
    world.run(&[
        "hub",
        "download",
        "org/base",
        "--out",
        arg(&world.path("fetched")),
    ])
}

fn blobs(world: &World) -> PathBuf {
    world.path("hf/hub/models--org--base/blobs")
}

/// Everything in the cache with a hash for a name has that hash.
fn cache_is_right(world: &World) {
    for (name, bytes) in files(&blobs(world)) {
        if name.len() == 64 && !name.contains('.') {
            assert_eq!(sha256_hex(&bytes), name);
        }
        assert!(!bytes.starts_with(b"<html>"), "{name} is an error page");
    }
}

/// The fetched files are those that were published.
fn folder_is_right(world: &World) {
    let (fetched, base) = (files(&world.path("fetched")), files(&world.path("base")));
    for (name, bytes) in &base {
        assert!(fetched.get(name) == Some(bytes), "{name} differs");
    }
    assert_eq!(fetched.len(), base.len() + 1, "and .gitattributes");
}

#[test]
fn defect_1_an_error_page_is_never_kept_as_a_file() {
    let world = world();
    for status in [403, 404, 500] {
        world.fault(
            "GET /objects/",
            99,
            answer(status, &[], "<html>expired</html>"),
        );
        assert_ne!(world.run(&["verify", "org/base"]).code, Some(0));
        assert_ne!(download(&world).code, Some(0));
        world.hub().heal();
        cache_is_right(&world);
    }
    // an error page that calls itself a success is no file either
    world.fault(
        "GET /objects/",
        99,
        answer(200, &[], "<html>expired</html>"),
    );
    world
        .run(&["verify", "org/base"])
        .refuses(&["20 bytes, where", "were asked for"]);
    world.hub().heal();
    cache_is_right(&world);
    world.run(&["verify", "org/base"]).succeeds();
    download(&world).succeeds();
    folder_is_right(&world);
}

#[test]
fn defect_2_a_truncated_file_is_an_error_and_stays_one_until_it_is_whole() {
    let world = world();
    world.fault("GET /objects/", 99, Effect::CutBody { after_bytes: 1000 });
    for _ in 0..2 {
        download(&world).refuses(&["broke off at", "it goes on where it stopped"]);
        world
            .run(&["verify", "org/base"])
            .refuses(&["broke off at"]);
        let fetched = files(&world.path("fetched"));
        assert!(
            !fetched.keys().any(|name| name.ends_with(".safetensors")),
            "only under its final name when whole"
        );
        cache_is_right(&world);
    }
    world.hub().heal();
    download(&world).succeeds();
    folder_is_right(&world);
    world.run(&["verify", "org/base"]).succeeds();
    // one that was cut short afterwards is not taken for the whole
    let shard = first_shard(&world.path("fetched"));
    let bytes = std::fs::read(&shard).expect("reads");
    // nor is one of the same length with one wrong byte; either may be somebody's work, and is left to be removed
    let mut wrong = bytes.clone();
    wrong[bytes.len() / 2] ^= 1;
    for changed in [&bytes[..bytes.len() / 2], &wrong] {
        std::fs::write(&shard, changed).expect("writes");
        download(&world).refuses(&["did not write it as it is", "remove it"]);
        assert_eq!(std::fs::read(&shard).expect("reads"), changed);
    }
    std::fs::remove_file(&shard).expect("removes");
    let fetched = world.path("fetched");
    let again = world.json(&["hub", "download", "org/base", "--out", arg(&fetched)]);
    assert_eq!(again["bytes"], bytes.len());
    folder_is_right(&world);
}

fn first_shard(dir: &Path) -> PathBuf {
    let names = files(dir).into_keys();
    let mut shards = names.filter(|name| name.ends_with(".safetensors"));
    dir.join(shards.next().expect("a shard"))
}

#[test]
fn defect_3_no_path_of_a_repository_leads_out_of_the_folder() {
    let world = world();
    for path in [
        "../../escaped",
        "/etc/escaped",
        "a/../../escaped",
        "C:\\escaped",
        "a\\..\\escaped",
        "x\0",
    ] {
        let path = path.to_string();
        world.fault("/tree/", 1, Effect::ExtraFile { path: path.clone() });
        let shown = path.trim_end_matches('\0');
        download(&world).refuses(&[shown, "would leave the folder"]);
        assert!(!world.path("fetched").exists(), "nothing was begun");
    }
    assert!(!world.path("../escaped").exists());
}

#[test]
fn defect_4_weights_never_travel_inside_a_commit() {
    let world = world();
    let largest = world
        .asked(0, "POST ")
        .into_iter()
        .map(|r| r.received)
        .max();
    let sent: u64 = world
        .asked(0, "PUT /objects/")
        .iter()
        .map(|r| r.received)
        .sum();
    let weights: usize = files(&world.path("base"))
        .iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .map(|(_, bytes)| bytes.len())
        .sum();
    assert_eq!(sent, weights as u64);
    assert!(largest < Some(weights as u64 / 2), "{largest:?}");
    // even if the Hub says so: what is large goes where large files go
    let big = world.path("big");
    std::fs::create_dir_all(&big).expect("creates");
    std::fs::write(big.join("notes.txt"), vec![b'x'; 10_000_001]).expect("writes");
    let regular = r#"{"files":[{"path":"notes.txt","uploadMode":"regular","shouldIgnore":false}]}"#;
    world.fault("/preupload/", 1, answer(200, &[], regular));
    let before = world.hub().requests().len();
    world.run(&["publish", arg(&big), "org/big"]).succeeds();
    assert!(world.asked(before, "/commit/")[0].received < 1000);
}

#[test]
fn defect_5_git_stays_at_home_and_links_are_followed_or_refused() {
    let world = World::with_hub();
    let dir = world.path("model");
    std::fs::create_dir_all(dir.join(".git")).expect("creates");
    std::fs::write(dir.join(".git/config"), "password").expect("writes");
    std::fs::write(dir.join("config.json"), "{}").expect("writes");
    std::fs::write(dir.join("kept.json"), "[1]").expect("writes");
    std::os::unix::fs::symlink("kept.json", dir.join("linked.json")).expect("links");
    let pushed = world.json(&["publish", arg(&dir), "org/model"]);
    assert_eq!(pushed["files"], 3);
    let listed = world.api("org/model/tree/main?recursive=true").to_string();
    assert!(
        listed.contains("linked.json") && !listed.contains(".git/"),
        "{listed}"
    );
    std::os::unix::fs::symlink("../elsewhere", dir.join("lost.json")).expect("links");
    std::fs::write(world.path("elsewhere"), "x").expect("writes");
    world
        .run(&["publish", arg(&dir), "org/model"])
        .refuses(&["lost.json", "leads out"]);
}

#[test]
fn defect_6_a_download_goes_on_where_it_broke_off() {
    let world = world();
    let total: usize = files(&world.path("base")).values().map(Vec::len).sum();
    world.fault(
        "GET /objects/",
        3,
        Effect::CutBody {
            after_bytes: 300_000,
        },
    );
    download(&world).succeeds();
    folder_is_right(&world);
    let contents = world.asked(0, "GET /objects/");
    assert!(contents.iter().filter(|r| r.range.is_some()).count() >= 3);
    // and after a kill, in another process
    std::fs::remove_dir_all(world.path("fetched")).expect("removes");
    let shard = first_shard(&world.path("base"));
    let oid = sha256_hex(&std::fs::read(&shard).expect("reads"));
    world.fault(
        &format!("GET /objects/{oid}"),
        1,
        Effect::SlowBody { delay_ms: 300 },
    );
    let before = world.hub().requests().len();
    let mut child = world
        .command(&["hub", "download", "org/base", "--out", "fetched"])
        .spawn()
        .expect("starts");
    let state = world.path("fetched/.cache/svdhub");
    wait_until("a part is there", || {
        let parts = std::fs::read_dir(&state).into_iter().flatten().flatten();
        let name = |p: &std::fs::DirEntry| p.file_name().to_string_lossy().into_owned();
        let mut parts =
            parts.filter(|p| name(p).contains(&oid) && name(p).ends_with(".incomplete"));
        parts.any(|p| p.metadata().is_ok_and(|m| m.len() > 100_000))
    });
    child.kill().expect("is killed");
    child.wait().expect("has ended");
    download(&world).succeeds();
    folder_is_right(&world);
    let asked = world.asked(before, &format!("GET /objects/{oid}"));
    let rest = asked
        .last()
        .and_then(|r| r.range.clone())
        .expect("the rest alone");
    let start: usize = rest
        .trim_start_matches("bytes=")
        .trim_end_matches('-')
        .parse()
        .expect("a number");
    assert!(start > 100_000 && start < total, "{rest}");
}

#[test]
fn defect_6_and_a_wrong_beginning_is_not_gone_on_with() {
    let world = world();
    let shard = std::fs::read(first_shard(&world.path("base"))).expect("reads");
    let partial = blobs(&world).join(format!("{}.incomplete", sha256_hex(&shard)));
    std::fs::create_dir_all(blobs(&world)).expect("creates");
    for wrong in [
        vec![b'x'; 1000],
        vec![b'x'; shard.len()],
        vec![b'x'; shard.len() + 1],
    ] {
        let _ = std::fs::remove_dir_all(world.path("hf/hub/models--org--base/snapshots"));
        let _ = std::fs::remove_file(blobs(&world).join(sha256_hex(&shard)));
        std::fs::write(&partial, wrong).expect("writes");
        world.run(&["verify", "org/base"]).succeeds();
        cache_is_right(&world);
        assert!(!partial.exists());
    }
}

#[test]
fn defect_7_the_wait_is_what_the_hub_asks_for() {
    let world = world();
    for header in [("Retry-After", "2"), ("RateLimit", "\"resolvers\";r=0;t=2")] {
        world.fault("/tree/", 1, answer(429, &[header], ""));
        let start = Instant::now();
        world.run(&["verify", "org/base"]).succeeds();
        assert!(start.elapsed() >= Duration::from_secs(2), "{header:?}");
    }
    // more than anybody waits for: said at once, with the time
    world.fault("/tree/", 1, answer(429, &[("Retry-After", "3000")], ""));
    world
        .run(&["verify", "org/base"])
        .refuses(&["rate limit", "next try in 3000 s"]);
    assert_eq!(
        world
            .asked(0, "/tree/")
            .iter()
            .filter(|r| r.status == 429)
            .count(),
        3
    );
}

#[test]
fn defect_8_one_push_makes_one_commit() {
    let world = world();
    std::fs::write(world.path("base/NOTICE"), "new").expect("writes");
    world.fault("/commit/main", 1, Effect::StatusAfter { status: 500 });
    world
        .run(&["publish", arg(&world.path("base")), "org/base"])
        .succeeds();
    let commits = world.api("org/base/commits/main");
    assert_eq!(commits.as_array().map(Vec::len), Some(3), "{commits}");
}

#[test]
fn defect_9_what_is_missing_is_said() {
    let world = world();
    let fetch = |name: &str| world.run(&["hub", "download", name, "--out", "x"]);
    fetch("org/none").refuses(&["no repository `org/none`"]);
    fetch("org/base@none").refuses(&["no revision `none` in `org/base`"]);
    let missing = |code: &'static str| answer(404, &[("X-Error-Code", code)], "");
    world.fault("/resolve/", 1, missing("EntryNotFound"));
    fetch("org/base").refuses(&["no file `", "in `org/base` at"]);
    world.fault("/resolve/", 1, missing("RepoNotFound"));
    fetch("org/base").refuses(&["no repository `org/base`"]);
    world.fault("/resolve/", 1, missing("RevisionNotFound"));
    fetch("org/base").refuses(&["no revision"]);
    world.fault(
        "/resolve/",
        1,
        answer(403, &[("X-Error-Code", "GatedRepo")], ""),
    );
    fetch("org/base").refuses(&["gated", "org/base", "accept the terms"]);
}

#[test]
fn defect_10_a_second_process_waits_for_the_first_as_long_as_it_takes() {
    let world = world();
    std::fs::create_dir_all(world.path("hf/hub/.locks/models--org--base")).expect("creates");
    let shard = std::fs::read(first_shard(&world.path("base"))).expect("reads");
    let name = format!(
        "hf/hub/.locks/models--org--base/{}.lock",
        sha256_hex(&shard)
    );
    // as Python's filelock takes it
    let lock = std::fs::File::create(world.path(&name)).expect("creates");
    lock.lock().expect("locks");
    let mut child = world
        .command(&["verify", "org/base"])
        .spawn()
        .expect("starts");
    std::thread::sleep(Duration::from_secs(11));
    assert!(child.try_wait().expect("is asked").is_none(), "it waits");
    drop(lock);
    Run::of(child.wait_with_output().expect("ends")).succeeds();
}

#[test]
fn defect_11_a_range_is_the_range_that_was_asked_for() {
    let world = world();
    let plan = || world.json(&["plan", "org/base"]);
    let expected = plan();
    // a server that ignores ranges sends the file from its beginning
    world.fault("GET /objects/", 99, Effect::IgnoreRange);
    assert_eq!(plan(), expected);
    world.hub().heal();
    // the rest of a file that begins elsewhere is not appended
    world.fault("GET /objects/", 2, Effect::CutBody { after_bytes: 1000 });
    let shifted = answer(206, &[("Content-Range", "bytes 0-9/999999")], "0123456789");
    world.fault("GET /objects/", 1, shifted);
    download(&world).succeeds();
    folder_is_right(&world);
    // and a file with one wrong byte is none
    std::fs::remove_dir_all(world.path("fetched")).expect("removes");
    world.fault("GET /objects/", 1, Effect::WrongBytes);
    download(&world).refuses(&["sha256", "expected", "found"]);
    download(&world).succeeds();
    folder_is_right(&world);
    world.fault("/api/resolve-cache/", 1, Effect::WrongBytes);
    std::fs::remove_dir_all(world.path("fetched")).expect("removes");
    download(&world).refuses(&["expected", "found"]);
}

#[test]
fn defect_12_a_pull_request_is_told_with_its_address() {
    let world = world();
    std::fs::write(world.path("base/NOTICE"), "new").expect("writes");
    let before = world.hub().requests().len();
    let pushed = world.json(&["publish", arg(&world.path("base")), "org/base", "--pr"]);
    let expected = format!("{}/org/base/discussions/1", world.hub().endpoint());
    assert_eq!(pushed["pull_request_url"], expected.as_str());
    for asked in ["/preupload/main", "/commit/main"] {
        let asked = world.asked(before, asked);
        assert!(!asked.is_empty() && asked.iter().all(|r| r.path.ends_with("?create_pr=1")));
    }
}

#[test]
fn defect_13_half_a_snapshot_is_not_taken_for_a_whole_one() {
    let world = world();
    let offline = || {
        let mut command = world.command(&["verify", "org/base"]);
        command.env("HF_HUB_OFFLINE", "1");
        Run::of(command.output().expect("runs"))
    };
    let unreachable = || {
        let mut command = world.command(&["verify", "org/base"]);
        command.env("HF_ENDPOINT", "http://127.0.0.1:9");
        Run::of(command.output().expect("runs"))
    };
    unreachable().refuses(&["cannot be reached"]);
    world.run(&["verify", "org/base"]).succeeds();
    offline().succeeds();
    let said = unreachable().succeeds();
    assert!(said.stderr.contains("from the cache"), "{}", said.stderr);
    // one shard is gone
    let shard = std::fs::read(first_shard(&world.path("base"))).expect("reads");
    std::fs::remove_file(blobs(&world).join(sha256_hex(&shard))).expect("removes");
    let words = ["not whole", ".safetensors is missing"];
    offline().refuses(&words);
    unreachable().refuses(&["cannot be reached"]);
    // without the listing, the index tells
    std::fs::remove_dir_all(world.path("hf/hub/models--org--base/trees")).expect("removes");
    offline().refuses(&words);
    world.run(&["verify", "org/base"]).succeeds();
    offline().succeeds();
}

#[test]
fn defect_14_silence_ends() {
    let world = world();
    for (matching, effect) in [
        ("/revision/", Effect::Slow { delay_ms: 60_000 }),
        ("GET /objects/", Effect::Slow { delay_ms: 60_000 }),
        ("GET /objects/", Effect::SlowBody { delay_ms: 60_000 }),
    ] {
        // whoever does not answer is asked once more
        world.fault(matching, 1, effect);
        let mut command = world.command(&["hub", "download", "org/base", "--out", "fetched"]);
        command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
        Run::of(command.output().expect("runs")).succeeds();
        folder_is_right(&world);
        std::fs::remove_dir_all(world.path("fetched")).expect("removes");
    }
    world.fault("/repos/create", 9, Effect::Slow { delay_ms: 60_000 });
    let mut command = world.command(&["publish", "base", "org/other"]);
    command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    Run::of(command.output().expect("runs")).refuses(&["cannot be reached"]);
}

#[test]
fn defect_15_a_snapshot_costs_one_request_per_file_and_origin() {
    let world = world();
    let before = world.hub().requests().len();
    world.run(&["verify", "org/base"]).succeeds();
    let asked = world.asked(before, "");
    assert!(asked.iter().all(|r| r.method == "GET"), "no HEAD");
    let count = |matching: &str| world.asked(before, matching).len();
    assert_eq!((count("/revision/"), count("/tree/")), (1, 1));
    let contents = count("GET /objects/") + count("/api/resolve-cache/");
    let indices = 1; // read once to know the shards, once to keep it
    let all = files(&world.path("base")).len() + 1; // the Hub's .gitattributes
    assert_eq!(
        (count("/resolve/"), contents),
        (all + indices, all + indices)
    );
    // again: two questions, no file
    let before = world.hub().requests().len();
    world.run(&["verify", "org/base"]).succeeds();
    assert!(world.asked(before, "GET /objects/").is_empty());
    assert!(world.asked(before, "").len() <= 2 + 2 * indices);
}
