//! Large files by Xet, both ways: against the store of chunks beside the embedded Hub.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use svdhub::hub::server::{Effect, ServerOptions};
use svdhub::sum::sha256_hex;
use xet::xet_session::{Sha256Policy, XetSessionBuilder};

use crate::world::{Run, TOKEN, World, arg, files, peak_bytes, wait_until};

/// Where nobody listens.
const NOWHERE: &str = "http://127.0.0.1:9";

fn world() -> World {
    World::with_hub_of(ServerOptions {
        xet: true,
        ..ServerOptions::default()
    })
}

/// Bytes in which no chunk comes twice (xorshift64).
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}

/// A directory with weights of these names and sizes, and a small file.
fn model(world: &World, name: &str, weights: &[(&str, usize)]) -> PathBuf {
    let dir = world.path(name);
    std::fs::create_dir_all(&dir).expect("creates");
    std::fs::write(dir.join("config.json"), "{}").expect("writes");
    for (number, (file, bytes)) in weights.iter().enumerate() {
        let seed = name.len() as u64 * 100 + number as u64;
        std::fs::write(dir.join(file), noise(seed, *bytes)).expect("writes");
    }
    dir
}

/// Runs the program with Xet switched off.
fn without_xet(world: &World, arguments: &[&str]) -> Run {
    let mut command = world.command(arguments);
    Run::of(
        command
            .env("HF_HUB_DISABLE_XET", "1")
            .output()
            .expect("runs"),
    )
}

fn download<'a>(repo: &'a str, out: &'a Path) -> [&'a str; 5] {
    ["hub", "download", repo, "--out", arg(out)]
}

/// The files of a download, without what the Hub and the download itself add.
fn fetched(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = files(dir);
    files.remove(".gitattributes");
    files
}

/// What went through the Hub itself since the journal had `before` lines: uploads and downloads of large files.
fn by_http(world: &World, before: usize) -> usize {
    world.asked(before, " /objects/").len() + world.asked(before, " /parts/").len()
}

fn xet_hashes(world: &World, repo: &str) -> BTreeMap<String, String> {
    let listed = world.api(&format!("{repo}/tree/main"));
    let entries = listed.as_array().expect("a list").iter();
    let hash = |entry: &Value| {
        let hash = entry["xetHash"].as_str()?;
        Some((entry["path"].as_str()?.to_string(), hash.to_string()))
    };
    entries.filter_map(hash).collect()
}

/// The store is gone: the Hub still tells where it was.
fn cas_is_down(world: &World, token: &str, times: usize) {
    let told = json!({"casUrl": NOWHERE, "accessToken": "xet_x", "exp": 4_000_000_000u64});
    let effect = Effect::Status {
        status: 200,
        headers: vec![],
        body: told.to_string(),
    };
    world.fault(token, times, effect);
}

#[test]
fn what_goes_by_xet_comes_back_by_xet_and_by_http() {
    let world = world();
    let dir = model(
        &world,
        "model",
        &[("a.safetensors", 3_000_000), ("b.safetensors", 70_000)],
    );
    let pushed = world.json(&["publish", arg(&dir), "org/model"]);
    assert!(pushed["bytes_sent"].as_u64() >= Some(3_070_000), "{pushed}");
    assert_eq!(by_http(&world, 0), 0, "nothing by LFS");
    let hashes = xet_hashes(&world, "org/model");
    assert_eq!(
        hashes.keys().collect::<Vec<_>>(),
        ["a.safetensors", "b.safetensors"]
    );
    // by Xet
    let out = world.path("by-xet");
    let run = world.run(&download("org/model", &out)).succeeds();
    assert!(!run.stderr.contains("Xet fails"), "{}", run.stderr);
    assert_eq!(fetched(&out), files(&dir));
    assert_eq!(by_http(&world, 0), 0, "nothing by HTTP");
    // by HTTP, and the Hub is not even asked
    let out = world.path("by-http");
    let before = world.hub().requests().len();
    without_xet(&world, &download("org/model", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
    assert_eq!(by_http(&world, before), 2);
    assert!(world.asked(before, "xet-read-token").is_empty());
    // sent by LFS, such files have no chunks, and come by HTTP for all
    let other = model(&world, "other", &[("c.safetensors", 500_000)]);
    let before = world.hub().requests().len();
    without_xet(&world, &["publish", arg(&other), "org/other"]).succeeds();
    assert_eq!(world.asked(before, "PUT /objects/").len(), 1);
    assert!(xet_hashes(&world, "org/other").is_empty());
    let out = world.path("other-fetched");
    world.run(&download("org/other", &out)).succeeds();
    assert_eq!(fetched(&out), files(&other));
    // until somebody brings the same content in chunks
    world.run(&["publish", arg(&other), "org/again"]).succeeds();
    assert_eq!(xet_hashes(&world, "org/again").len(), 1);
    assert_eq!(xet_hashes(&world, "org/other").len(), 1);
}

#[test]
fn one_changed_shard_sends_its_changed_chunks_alone() {
    let world = world();
    let dir = model(&world, "model", &[("a.safetensors", 20_000_000)]);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let path = dir.join("a.safetensors");
    let mut bytes = std::fs::read(&path).expect("reads");
    bytes[11_000_000] ^= 1;
    std::fs::write(&path, bytes).expect("writes");
    let pushed = world.json(&["publish", arg(&dir), "org/model"]);
    let sent = pushed["bytes_sent"].as_u64().expect("a number");
    // a chunk has at most 128 KiB, and few found again beside it may not be worth a reference
    assert!((1..2_000_000).contains(&sent), "{sent}");
    let out = world.path("out");
    world.run(&download("org/model", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
}

#[test]
fn a_name_in_the_headers_of_a_large_file_is_enough() {
    let world = world();
    let weights = [("a.safetensors", 40_000_000), ("b.safetensors", 100_000)];
    let dir = model(&world, "model", &weights);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let mut listed = world.api("org/model/tree/main?recursive=true");
    for entry in listed.as_array_mut().expect("a list") {
        entry.as_object_mut().expect("an entry").remove("xetHash");
    }
    let without = Effect::Status {
        status: 200,
        headers: vec![],
        body: listed.to_string(),
    };
    world.fault("/tree/", 1, without);
    let out = world.path("out");
    let before = world.hub().requests().len();
    world.run(&download("org/model", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
    assert_eq!(by_http(&world, before), 1, "the small one");
    assert_eq!(world.asked(before, "HEAD ").len(), 1);
}

#[test]
fn the_cache_is_the_same_whichever_way_the_bytes_came() {
    let world = world();
    let dir = world.model("base", svdhub::weights::Dtype::BF16, 600_000);
    world.run(&["publish", arg(&dir), "org/base"]).succeeds();
    let before = world.hub().requests().len();
    world.run(&["verify", "org/base"]).succeeds();
    let contents = world.asked(before, "GET /objects/");
    // the index, maybe headers; no shard
    assert!(contents.iter().all(|r| r.bytes < 100_000), "{contents:?}");
    let blobs = world.path("hf/hub/models--org--base/blobs");
    for (name, bytes) in files(&blobs) {
        assert!(name.len() != 64 || sha256_hex(&bytes) == name, "{name}");
    }
    // complete for the other way, and offline
    let before = world.hub().requests().len();
    without_xet(&world, &["verify", "org/base"]).succeeds();
    assert!(world.asked(before, "GET /objects/").is_empty());
    let mut offline = world.command(&["verify", "org/base"]);
    offline.env("HF_HUB_OFFLINE", "1");
    Run::of(offline.output().expect("runs")).succeeds();
}

#[test]
fn a_killed_upload_by_xet_sends_nothing_again() {
    let world = world();
    let dir = model(&world, "model", &[("a.safetensors", 5_000_000)]);
    // killed when all chunks are there, and the commit is not
    world.fault(
        "POST /api/models/org/model/commit",
        1,
        Effect::Status {
            status: 429,
            headers: vec![("Retry-After".into(), "60".into())],
            body: String::new(),
        },
    );
    let mut child = world
        .command(&["publish", arg(&dir), "org/model"])
        .spawn()
        .expect("starts");
    wait_until("the commit is tried", || {
        !world
            .asked(0, "POST /api/models/org/model/commit")
            .is_empty()
    });
    child.kill().expect("is killed");
    child.wait().expect("has ended");
    assert!(xet_hashes(&world, "org/model").is_empty());
    let pushed = world.json(&["publish", arg(&dir), "org/model"]);
    assert_eq!(pushed["bytes_sent"], 0);
    let out = world.path("out");
    world.run(&download("org/model", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
}

#[test]
fn a_file_that_changes_while_it_is_sent_is_not_committed() {
    let world = world();
    let dir = model(&world, "model", &[("a.safetensors", 300_000)]);
    let path = dir.join("a.safetensors");
    world.fault("/preupload/", 1, Effect::Slow { delay_ms: 1500 });
    let child = world
        .command(&["publish", arg(&dir), "org/model"])
        .spawn()
        .expect("starts");
    wait_until("it has been read", || {
        !world
            .asked(0, "GET /api/models/org/model/revision/main")
            .is_empty()
    });
    std::fs::write(&path, noise(99, 300_000)).expect("writes");
    Run::of(child.wait_with_output().expect("ends"))
        .refuses(&["`a.safetensors` changed while it was sent"]);
    assert!(xet_hashes(&world, "org/model").is_empty());
    // what was told of it then spoils nothing now
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let out = world.path("out");
    world.run(&download("org/model", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
}

#[test]
fn branches_and_pull_requests_take_chunks_too() {
    let world = world();
    let dir = model(&world, "model", &[("a.safetensors", 300_000)]);
    let branch = ["publish", arg(&dir), "org/model", "--branch", "dev/x"];
    world.run(&branch).succeeds();
    std::fs::write(dir.join("b.safetensors"), noise(5, 200_000)).expect("writes");
    world
        .run(&["publish", arg(&dir), "org/model", "--pr"])
        .succeeds();
    assert_eq!(by_http(&world, 0), 0);
    let out = world.path("out");
    world.run(&download("org/model@refs/pr/1", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
    assert_eq!(by_http(&world, 0), 0);
}

#[test]
fn a_killed_download_by_xet_goes_on() {
    let world = world();
    let size = 150_000_000;
    let dir = model(&world, "model", &[("a.safetensors", size)]);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let out = world.path("out");
    let begun = || -> Option<PathBuf> {
        let mut entries = std::fs::read_dir(out.join(".cache/svdhub")).ok()?;
        entries.find_map(|entry| {
            let path = entry.ok()?.path();
            let large = path.metadata().ok()?.len() > 1_000_000;
            (large && path.extension()? == "incomplete").then_some(path)
        })
    };
    let killed = || {
        let mut child = world
            .command(&download("org/model", &out))
            .spawn()
            .expect("starts");
        wait_until("some of it is there", || begun().is_some());
        child.kill().expect("is killed");
        child.wait().expect("has ended");
        let partial = begun().expect("the file has not its name yet");
        let came = partial.metadata().expect("is there").len();
        assert!(came < size as u64, "killed too late");
        partial
    };
    killed();
    let before = world.hub().requests().len();
    world.run(&download("org/model", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
    assert_eq!(by_http(&world, before), 0);
    // where that beginning is wrong, all of it is fetched once more, and nobody is to blame who did not bring it
    std::fs::remove_file(out.join("a.safetensors")).expect("removes");
    let partial = killed();
    let mut bytes = std::fs::read(&partial).expect("reads");
    bytes[1000] ^= 1;
    std::fs::write(&partial, bytes).expect("writes");
    let before = world.hub().requests().len();
    let run = world.run(&download("org/model", &out)).succeeds();
    assert!(!run.stderr.contains("another sha256"), "{}", run.stderr);
    assert_eq!((fetched(&out), by_http(&world, before)), (files(&dir), 0));
    // and what HTTP began, Xet ends
    std::fs::remove_file(out.join("a.safetensors")).expect("removes");
    std::fs::write(&partial, &files(&dir)["a.safetensors"][..99_999_999]).expect("writes");
    let before = world.hub().requests().len();
    world.run(&download("org/model", &out)).succeeds();
    assert_eq!((fetched(&out), by_http(&world, before)), (files(&dir), 0));
}

#[test]
fn a_store_that_is_down_costs_a_download_a_note_and_an_upload_one_error() {
    let world = world();
    let weights = [("a.safetensors", 300_000), ("b.safetensors", 200_000)];
    let dir = model(&world, "model", &weights);
    cas_is_down(&world, "xet-write-token", 9);
    world.run(&["publish", arg(&dir), "org/model"]).refuses(&[
        "the Hub's Xet store does not take the large files",
        "because: ",
        "HF_HUB_DISABLE_XET=1",
    ]);
    world.hub().heal();
    assert!(xet_hashes(&world, "org/model").is_empty());
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();

    let out = world.path("out");
    cas_is_down(&world, "xet-read-token", 9);
    let run = world.run(&download("org/model", &out)).succeeds();
    let notes = run.stderr.matches("fetching by HTTP instead").count();
    assert_eq!(notes, 1, "{}", run.stderr);
    assert_eq!(fetched(&out), files(&dir));
    world.hub().heal();
    // nor does it matter that the Hub gives no token
    let out = world.path("again");
    world.fault(
        "xet-read-token",
        9,
        Effect::Status {
            status: 403,
            headers: vec![],
            body: "no".into(),
        },
    );
    let run = world.run(&download("org/model", &out)).succeeds();
    assert!(
        run.stderr.contains("fetching by HTTP instead"),
        "{}",
        run.stderr
    );
    assert_eq!(fetched(&out), files(&dir));
}

#[test]
fn wrong_bytes_from_the_store_are_refused() {
    let world = world();
    let weights = [("a.safetensors", 300_000), ("b.safetensors", 300_000)];
    let dir = model(&world, "model", &weights);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let [a, b] = ["a", "b"].map(|name| {
        let bytes = std::fs::read(dir.join(format!("{name}.safetensors"))).expect("reads");
        let sum = sha256_hex(&bytes);
        world.path(&format!("hub/objects/{}/{sum}.xet", &sum[..2]))
    });
    let [of_a, of_b] = [&a, &b].map(|path| std::fs::read(path).expect("a name"));
    std::fs::write(&a, of_b).expect("writes");
    std::fs::write(&b, of_a).expect("writes");
    // the right ones come by HTTP
    let out = world.path("out");
    let run = world.run(&download("org/model", &out)).succeeds();
    assert!(run.stderr.contains("another sha256"), "{}", run.stderr);
    assert_eq!(fetched(&out), files(&dir));
    // and where that errs too, nothing gets its name
    world.fault("GET /objects/", 9, Effect::WrongBytes);
    let out = world.path("none");
    let sums = ["expected sha256"];
    world.run(&download("org/model", &out)).refuses(&sums);
    assert!(!out.join("a.safetensors").exists() && !out.join("b.safetensors").exists());
}

#[test]
fn a_lie_about_a_sha256_reaches_nobody() {
    let world = world();
    let dir = model(&world, "model", &[("a.safetensors", 300_000)]);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let truth = noise(77, 300_000);
    let promised = sha256_hex(&truth);
    let pass = world.api("org/model/xet-write-token/main");
    let text = |key: &str| pass[key].as_str().expect("a text").to_string();
    let session = XetSessionBuilder::new().with_cache_dir(world.path("xet"));
    let session = session.build().expect("starts");
    let commit = session.new_upload_commit().expect("begins");
    let commit = commit
        .with_endpoint(text("casUrl"))
        .with_token_info(text("accessToken"), 4_000_000_000);
    let commit = commit.build_blocking().expect("begins");
    let lie = Sha256Policy::from_hex(&promised);
    commit
        .upload_bytes_blocking(noise(78, 300_000), lie, None)
        .expect("takes it");
    commit.commit_blocking().expect("lands");
    let lines = [
        json!({"key": "header", "value": {"summary": "a lie"}}),
        json!({"key": "lfsFile", "value":
            {"path": "b.safetensors", "algo": "sha256", "oid": promised, "size": 300_000}}),
    ];
    let url = format!(
        "{}/api/models/org/model/commit/main",
        world.hub().endpoint()
    );
    let answer = reqwest::blocking::Client::new()
        .post(url)
        .bearer_auth(TOKEN)
        .body(format!("{}\n{}", lines[0], lines[1]))
        .send()
        .expect("an answer");
    assert_eq!(answer.status(), 400);
    // who has the content can still bring it
    std::fs::write(dir.join("b.safetensors"), truth).expect("writes");
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let out = world.path("out");
    world.run(&download("org/model", &out)).succeeds();
    assert_eq!(fetched(&out), files(&dir));
}

#[test]
fn a_transfer_by_xet_holds_little_memory_beside_its_blocks() {
    let world = world();
    let dir = model(&world, "model", &[("model.safetensors", 300 << 20)]);
    // beside them 200 MB, as for every transfer
    let (packed, decoded) = (4 * (64 << 20), 128_000_000);
    let out = world.path("out");
    let download = download("org/model", &out);
    let publish = ["publish", arg(&dir), "org/model", "--quiet"];
    for (arguments, blocks) in [(&publish[..], packed), (&download[..], decoded)] {
        let child = world.command(arguments).spawn().expect("starts");
        let peak = peak_bytes(child);
        eprintln!("{} took {peak} bytes", arguments[0]);
        let expected = 1 << 20..200_000_000 + blocks;
        assert!(expected.contains(&peak), "{arguments:?} took {peak} bytes");
    }
    assert_eq!(by_http(&world, 0), 0);
}

#[test]
fn no_log_tells_a_token_of_the_store() {
    let world = world();
    let dir = model(&world, "model", &[("a.safetensors", 300_000)]);
    let out = world.path("out");
    let publish = ["publish", arg(&dir), "org/model"];
    for arguments in [&publish[..], &download("org/model", &out)] {
        let mut command = world.command(arguments);
        command.env("SVDHUB_LOG", "trace");
        // which looks for the Hub's
        let run = Run::of(command.output().expect("runs")).succeeds();
        assert!(run.stderr.contains("xet"), "it logs what Xet does");
        for right in ["read", "write"] {
            let pass = world.api(&format!("org/model/xet-{right}-token/main"));
            let token = pass["accessToken"].as_str().expect("a token");
            assert!(!run.stderr.contains(token), "the token to {right} shows");
        }
    }
}

#[test]
fn the_store_opens_to_those_who_may_read_or_write() {
    let world = world();
    let dir = model(&world, "model", &[("a.safetensors", 300_000)]);
    let publish = ["publish", arg(&dir), "org/model", "--private"];
    world.run(&publish).succeeds();
    let status = |right: &str, token: Option<&str>| {
        let endpoint = world.hub().endpoint();
        let url = format!("{endpoint}/api/models/org/model/xet-{right}-token/main");
        let mut request = reqwest::blocking::Client::new().get(url);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request.send().expect("an answer").status().as_u16()
    };
    assert_eq!(status("read", None), 401);
    assert_eq!(status("read", Some("hf_read_stranger")), 404);
    assert_eq!(status("read", Some(TOKEN)), 200);
    assert_eq!(status("write", Some(TOKEN)), 200);
    let url = format!("{}/api/models/org/model/settings", world.hub().endpoint());
    let client = reqwest::blocking::Client::new();
    let open = client.put(url).bearer_auth(TOKEN);
    let open = open.json(&json!({"private": false, "gated": "auto"}));
    assert!(open.send().expect("an answer").status().is_success());
    assert_eq!(status("read", Some("hf_read_stranger")), 403);
    assert_eq!(status("write", Some("hf_read_stranger")), 403);
    assert_eq!(status("write", None), 401);
    // a Hub without a store says so
    let plain = World::with_hub();
    plain.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let told = plain.api("org/model/xet-write-token/main");
    assert_eq!(told["error"], "This Hub has no Xet storage");
}
