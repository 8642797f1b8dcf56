//! Publishing when something goes wrong: kills, lost answers, moved branches, expired links, and much to send.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use svdhub::hub::server::{Effect, ServerOptions};

use crate::world::{self, Run, TOKEN, World, arg, files, peak_bytes, wait_until};

/// A directory with files of these names and sizes, whose bytes differ.
fn folder(world: &World, name: &str, files: &[(&str, usize)]) -> PathBuf {
    let dir = world.path(name);
    for (file, size) in files {
        let path = dir.join(file);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("creates");
        let seed = file.bytes().map(usize::from).sum::<usize>();
        let bytes: Vec<u8> = (0..*size)
            .map(|i| ((i * i + seed * i) % 251) as u8)
            .collect();
        let bytes = match file.ends_with(".index.json") {
            true => br#"{"metadata": {}, "weight_map": {}}"#.to_vec(),
            false => bytes,
        };
        std::fs::write(path, bytes).expect("writes");
    }
    dir
}

fn answer(status: u16, headers: &[(&str, &str)]) -> Effect {
    world::answer(status, headers, "trouble")
}

/// The titles of a branch's commits, the newest first, without the first of all.
fn titles(world: &World, repo: &str, branch: &str) -> Vec<String> {
    let commits = world.api(&format!("{repo}/commits/{branch}"));
    let commits = commits.as_array().expect("a list");
    let titles = commits
        .iter()
        .map(|c| c["title"].as_str().expect("a title").to_string());
    titles.filter(|title| title != "initial commit").collect()
}

/// Fetches a repository, and holds it against a directory.
fn arrives_as(world: &World, repo: &str, dir: &Path) {
    let fetched = world.path("fetched");
    let _ = std::fs::remove_dir_all(&fetched);
    world
        .run(&["hub", "download", repo, "--out", arg(&fetched)])
        .succeeds();
    std::fs::remove_dir_all(fetched.join(".cache")).expect("its state");
    std::fs::remove_file(fetched.join(".gitattributes")).expect("the Hub's own");
    let differing = Command::new("diff")
        .args(["-r", arg(dir), arg(&fetched)])
        .output()
        .expect("diff runs");
    assert!(
        differing.status.success(),
        "{}",
        String::from_utf8_lossy(&differing.stdout)
    );
}

#[test]
fn a_large_file_goes_in_parts_and_each_is_repeated_by_itself() {
    let world = World::with_hub_of(ServerOptions {
        part_bytes: Some(100_000),
        ..ServerOptions::default()
    });
    let files = [
        ("model.safetensors", 950_000),
        ("small.bin", 100_000),
        ("config.json", 50),
    ];
    let dir = folder(&world, "model", &files);
    world.fault("/3?signature", 2, answer(503, &[]));
    world.fault("/5?signature", 1, answer(429, &[("Retry-After", "1")]));
    world.fault("/7?signature", 1, Effect::StatusAfter { status: 500 });
    let pushed = world.json(&["publish", arg(&dir), "org/model"]);
    assert_eq!(pushed["bytes_sent"], 1_050_000);
    let parts = world.asked(0, "PUT /parts/");
    assert_eq!(parts.len(), 10 + 2 + 1 + 1);
    assert!(
        parts
            .iter()
            .all(|part| part.received <= 100_000 && !part.authorized)
    );
    let wrong: usize = parts.iter().filter(|part| part.status != 200).count();
    assert_eq!(wrong, 4);
    // what fits one part goes in one piece
    assert_eq!(world.asked(0, "PUT /objects/").len(), 1);
    assert!(world.asked(0, "POST /api/models/org/model/commit")[0].received < 2000);
    arrives_as(&world, "org/model", &dir);
}

#[test]
fn a_transfer_holds_little_memory_however_large_the_file() {
    let parts = Some(64 << 20);
    for part_bytes in [None, parts] {
        let world = World::with_hub_of(ServerOptions {
            part_bytes,
            ..ServerOptions::default()
        });
        let dir = folder(&world, "model", &[("config.json", 10)]);
        let weights = std::fs::File::create(dir.join("model.safetensors")).expect("creates");
        weights.set_len(300 << 20).expect("grows");
        for arguments in [
            ["publish", arg(&dir), "org/model", "--quiet"],
            ["hub", "download", "org/model", "--out=fetched"],
        ] {
            let child = world.command(&arguments).spawn().expect("starts");
            let peak = peak_bytes(child);
            let expected = 1 << 20..100 << 20;
            assert!(expected.contains(&peak), "{arguments:?} took {peak} bytes");
        }
    }
}

#[test]
fn who_may_only_propose_can_propose_large_files() {
    for xet in [false, true] {
        let world = World::with_hub_of(ServerOptions {
            grants: vec!["hf_guest=propose".parse().expect("a token")],
            xet,
            ..ServerOptions::default()
        });
        let dir = folder(&world, "model", &[("config.json", 99)]);
        world.run(&["publish", arg(&dir), "org/model"]).succeeds();
        folder(&world, "model", &[("model.safetensors", 120_000)]);
        let as_guest = |options: &[&str]| {
            let arguments = [&["publish", arg(&dir), "org/model"][..], options].concat();
            let mut command = world.command(&arguments);
            command.env("HF_TOKEN", "hf_guest");
            Run::of(command.output().expect("runs"))
        };
        as_guest(&[]).refuses(&["no right to publish", "`write` role"]);
        as_guest(&["--pr"]).succeeds();
        arrives_as(&world, "org/model@refs/pr/1", &dir);
        // and to add to it by its name
        folder(&world, "model", &[("more.safetensors", 70_000)]);
        as_guest(&["--branch", "refs/pr/1"]).succeeds();
        assert_eq!(titles(&world, "org/model", "refs%2Fpr%2F1").len(), 3);
        assert_eq!(titles(&world, "org/model", "main").len(), 1);
        arrives_as(&world, "org/model@refs/pr/1", &dir);
        as_guest(&["--branch", "refs/pr/9"]).refuses(&["no revision `refs/pr/9`"]);
    }
}

#[test]
fn an_empty_file_travels_in_the_commit_whatever_its_name() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("empty.bin", 0), ("config.json", 99)]);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    assert!(world.asked(0, "/objects/batch").is_empty());
    arrives_as(&world, "org/model", &dir);
}

#[test]
fn a_file_of_which_the_hub_says_nothing_is_not_sent() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("config.json", 99)]);
    world.fault("/preupload/", 1, world::answer(200, &[], r#"{"files":[]}"#));
    world
        .run(&["publish", arg(&dir), "org/model"])
        .refuses(&["does not say how `config.json` travels"]);
    assert!(world.asked(0, "/commit/").is_empty());
}

#[test]
fn a_killed_upload_sends_nothing_again() {
    let world = World::with_hub();
    let files = [
        ("a.safetensors", 300_000),
        ("b.safetensors", 200_000),
        ("config.json", 99),
    ];
    let dir = folder(&world, "model", &files);
    // killed when all contents are there, and the commit is not
    world.fault("info/lfs/verify", 2, Effect::Slow { delay_ms: 60_000 });
    let mut child = world
        .command(&["publish", arg(&dir), "org/model"])
        .spawn()
        .expect("starts");
    wait_until("both are sent", || {
        let sent = world.asked(0, "PUT /objects/");
        sent.iter().filter(|r| r.status == 200).count() == 2
    });
    child.kill().expect("is killed");
    child.wait().expect("has ended");
    world.hub().heal();
    assert!(titles(&world, "org/model", "main").is_empty());
    let before = world.hub().requests().len();
    let pushed = world.json(&["publish", arg(&dir), "org/model"]);
    assert_eq!(pushed["bytes_sent"], 0);
    assert!(world.asked(before, "PUT ").is_empty());
    arrives_as(&world, "org/model", &dir);

    // one object arrives, the other does not: the next run sends the other alone
    let dir = folder(
        &world,
        "two",
        &[("c.safetensors", 300_000), ("d.safetensors", 200_000)],
    );
    let sha256 = |name: &str| svdhub::sum::sha256_file(&dir.join(name), |_| {});
    let second = sha256("d.safetensors").expect("reads");
    world.fault(&format!("PUT /objects/{second}"), 5, answer(503, &[]));
    world
        .run(&["publish", arg(&dir), "org/two"])
        .refuses(&["503", "upload a large file", "later"]);
    let pushed = world.json(&["publish", arg(&dir), "org/two"]);
    assert_eq!(pushed["bytes_sent"], 200_000);
    arrives_as(&world, "org/two", &dir);
}

#[test]
fn a_commit_whose_answer_is_lost_lands_once() {
    let world = World::with_hub();
    let dir = folder(
        &world,
        "model",
        &[("model.safetensors", 1000), ("config.json", 99)],
    );
    let change = |text: &str| std::fs::write(dir.join("NOTICE"), text).expect("writes");
    let commits = |before: usize| {
        world
            .asked(before, "POST /api/models/org/model/commit")
            .len()
    };
    // carried out, and answered with trouble
    world.fault("/commit/main", 1, Effect::StatusAfter { status: 500 });
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    assert_eq!(
        (commits(0), titles(&world, "org/model", "main").len()),
        (1, 1)
    );
    // not carried out: sent once more
    change("second");
    let before = world.hub().requests().len();
    world.fault("/commit/main", 1, answer(502, &[]));
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    assert_eq!(
        (commits(before), titles(&world, "org/model", "main").len()),
        (2, 2)
    );
    // limited: nothing has landed, and the wait is the Hub's
    change("third");
    let before = world.hub().requests().len();
    world.fault(
        "/commit/main",
        1,
        answer(429, &[("RateLimit", "\"api\";r=0;t=1")]),
    );
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    assert_eq!(
        (commits(before), titles(&world, "org/model", "main").len()),
        (2, 3)
    );
    // carried out, and never answered
    change("fourth");
    let before = world.hub().requests().len();
    world.fault("/commit/main", 1, Effect::Slow { delay_ms: 60_000 });
    let mut command = world.command(&["publish", arg(&dir), "org/model"]);
    command.env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    Run::of(command.output().expect("runs")).succeeds();
    // its line in the journal comes with its answer
    assert_eq!(
        (commits(before), titles(&world, "org/model", "main").len()),
        (0, 4)
    );
    // an answer that breaks off
    change("fifth");
    world.fault("/commit/main", 1, Effect::CutBody { after_bytes: 5 });
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    assert_eq!(titles(&world, "org/model", "main").len(), 5);
    // a pull request: there would be two
    change("sixth");
    world.fault("/commit/main", 1, Effect::StatusAfter { status: 504 });
    let pushed = world.json(&["publish", arg(&dir), "org/model", "--pr"]);
    let refs = world.api("org/model/refs?include_prs=1");
    assert_eq!(refs["pullRequests"].as_array().map(Vec::len), Some(1));
    assert_eq!(pushed["commit"], refs["pullRequests"][0]["targetCommit"]);
    let url = pushed["pull_request_url"].as_str().expect("an address");
    assert!(url.ends_with("/org/model/discussions/1"), "{url}");
    assert_eq!(titles(&world, "org/model", "main").len(), 5, "main stays");
    arrives_as(&world, "org/model@refs/pr/1", &dir);
    // trouble that lasts is said, and nothing has landed
    change("seventh");
    world.fault("/commit/main", 5, answer(500, &[]));
    world
        .run(&["publish", arg(&dir), "org/model"])
        .refuses(&["answered 500 to commit", "run the same command again later"]);
    assert_eq!(titles(&world, "org/model", "main").len(), 5);
}

#[test]
fn many_files_land_in_several_commits_with_the_card_in_the_last() {
    let world = World::with_hub();
    let names: Vec<String> = (0..110).map(|i| format!("part/{i:03}.txt")).collect();
    let mut files: Vec<(&str, usize)> = names.iter().map(|name| (name.as_str(), 100)).collect();
    files.extend([
        ("README.md", 10),
        ("config.json", 10),
        ("model.safetensors.index.json", 9),
    ]);
    let dir = folder(&world, "model", &files);
    std::fs::write(dir.join("README.md"), "---\nlicense: mit\n---\nmine").expect("writes");
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let expected = ["(3 of 3)", "(2 of 3)", "(1 of 3)"];
    let found = titles(&world, "org/model", "main");
    assert!(
        found
            .iter()
            .zip(expected)
            .all(|(title, end)| title.ends_with(end)),
        "{found:?}"
    );
    let commits = world.api("org/model/commits/main");
    let before_last = commits[1]["id"].as_str().expect("an id");
    let listed = world.api(&format!("org/model/tree/{before_last}?recursive=true"));
    let listed: Vec<&str> = listed
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|entry| entry["path"].as_str())
        .collect();
    assert!(listed.contains(&"part/099.txt"));
    assert!(
        !listed
            .iter()
            .any(|path| path.ends_with(".json") || path.ends_with(".md"))
    );
    arrives_as(&world, "org/model", &dir);

    // as a pull request, all go to the same one; and broken off between two commits, the next run adds what is missing
    world.fault("refs%2Fpr%2F1", 9, answer(500, &[]));
    let all = folder(&world, "other", &files);
    let publish = ["publish", arg(&all), "org/other"];
    std::fs::copy(dir.join("README.md"), all.join("README.md")).expect("copies");
    world
        .run(&[&publish[..], &["--pr"]].concat())
        .refuses(&["500"]);
    world.hub().heal();
    let pushed = world.json(&[&publish[..], &["--pr"]].concat());
    let number = pushed["pull_request_url"]
        .as_str()
        .and_then(|url| url.rsplit('/').next());
    assert_eq!(number, Some("1"));
    let main = titles(&world, "org/other", "main");
    assert!(main.is_empty(), "{main:?}");
    let found = titles(&world, "org/other", "refs%2Fpr%2F1");
    assert!(
        found.len() == 3
            && found
                .iter()
                .zip(expected)
                .all(|(title, end)| title.ends_with(end)),
        "{found:?}"
    );
    arrives_as(&world, "org/other@refs/pr/1", &all);

    // what is called the same and holds something else is not added to
    let files = [("part/000.txt", 7), ("part/001.txt", 100)];
    let theirs = folder(&world, "theirs", &files);
    let title = "Upload with svdhub (1 of 3)";
    let like_ours = ["publish", arg(&theirs), "org/third", "--pr", "--message"];
    world.run(&[&like_ours[..], &[title]].concat()).succeeds();
    let pushed = world.json(&["publish", arg(&all), "org/third", "--pr"]);
    let url = pushed["pull_request_url"].as_str().expect("an address");
    assert!(url.ends_with("/discussions/2"), "{url}");
    arrives_as(&world, "org/third@refs/pr/2", &all);
}

#[test]
fn what_is_proposed_already_is_not_proposed_again() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("config.json", 99)]);
    let propose = ["publish", arg(&dir), "org/model", "--pr"];
    let first = world.json(&propose);
    let again = world.json(&propose);
    assert_eq!(again["pull_request_url"], first["pull_request_url"]);
    assert_eq!(again["commit"], first["commit"]);
    // other files are another proposal
    std::fs::write(dir.join("NOTICE"), "more").expect("writes");
    let other = world.json(&propose);
    assert_ne!(other["pull_request_url"], first["pull_request_url"]);
    // and what was landed meanwhile needs none
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let nothing = world.json(&propose);
    assert!(nothing["pull_request_url"].is_null(), "{nothing}");
}

#[test]
fn a_branch_that_moves_meanwhile_is_not_overwritten() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("config.json", 99)]);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    std::fs::write(dir.join("NOTICE"), "mine").expect("writes");
    let before = world.hub().requests().len();
    world.fault("/preupload/", 1, Effect::Slow { delay_ms: 1500 });
    let child = world
        .command(&["publish", arg(&dir), "org/model"])
        .spawn()
        .expect("starts");
    wait_until("the parent is known", || {
        !world
            .asked(before, "GET /api/models/org/model/revision/main")
            .is_empty()
    });
    let theirs = folder(&world, "theirs", &[("THEIRS", 9)]);
    world
        .run(&["publish", arg(&theirs), "org/model"])
        .succeeds();
    Run::of(child.wait_with_output().expect("ends")).refuses(&[
        "`main` of `org/model` moved while publishing",
        "run the same command again",
    ]);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    assert_eq!(titles(&world, "org/model", "main").len(), 3);
}

#[test]
fn private_stays_private() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("config.json", 99)]);
    world
        .run(&["publish", arg(&dir), "org/secret", "--private"])
        .succeeds();
    assert_eq!(world.api("org/secret")["private"], true);
    let mut stranger = world.command(&["hub", "download", "org/secret", "--out", "x"]);
    stranger.env_remove("HF_TOKEN");
    Run::of(stranger.output().expect("runs")).refuses(&["no repository", "private", "HF_TOKEN"]);
    // what is public already does not become private by itself
    world.run(&["publish", arg(&dir), "org/open"]).succeeds();
    std::fs::write(dir.join("weights.bin"), "secret").expect("writes");
    let before = world.hub().requests().len();
    world
        .run(&["publish", arg(&dir), "org/open", "--private"])
        .refuses(&["everybody can read it", "--private"]);
    assert!(world.asked(before, "PUT ").is_empty());
    assert!(world.asked(before, "/commit/").is_empty());
}

#[test]
fn a_tag_names_one_commit_for_good() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("config.json", 99)]);
    let tag = || world.run(&["publish", arg(&dir), "org/model", "--tag", "v1"]);
    // the answer to the tag is lost, then it is there already: both times it names what it should
    world.fault("/tag/", 1, Effect::StatusAfter { status: 500 });
    tag().succeeds();
    tag().succeeds();
    std::fs::write(dir.join("config.json"), "{}").expect("writes");
    tag().refuses(&["the tag `v1` of `org/model` names another commit", "--tag"]);
}

#[test]
fn weights_that_a_loader_would_take_for_these_are_refused_or_replaced() {
    let world = World::with_hub();
    let one = folder(
        &world,
        "one",
        &[("config.json", 9), ("model.safetensors", 999)],
    );
    let shards = [
        ("config.json", 9),
        ("model.safetensors.index.json", 50),
        ("model-00001-of-00002.safetensors", 600),
        ("model-00002-of-00002.safetensors", 700),
    ];
    let two = folder(&world, "two", &shards);
    world.run(&["publish", arg(&one), "org/model"]).succeeds();
    let publish = ["publish", arg(&two), "org/model"];
    world.run(&publish).refuses(&[
        "`org/model` holds other weights: model.safetensors",
        "--replace",
    ]);
    let replace = [&publish[..], &["--replace"]].concat();
    // the answer is lost: what has landed is found, its deletions too
    world.fault("/commit/", 1, Effect::StatusAfter { status: 504 });
    world.run(&replace).succeeds();
    arrives_as(&world, "org/model", &two);
    assert_eq!(titles(&world, "org/model", "main").len(), 2);
    // back again, where every file of it is there already but for what must go
    let both = folder(&world, "both", &[("README.md", 5)]);
    for (name, _) in shards {
        std::fs::copy(two.join(name), both.join(name)).expect("copies");
    }
    std::fs::remove_file(both.join("README.md")).expect("removes");
    std::fs::remove_file(both.join(shards[3].0)).expect("removes");
    world
        .run(&["publish", arg(&both), "org/model"])
        .refuses(&["model-00002-of-00002"]);
    world
        .run(&["publish", arg(&both), "org/model", "--replace"])
        .succeeds();
    arrives_as(&world, "org/model", &both);
    // what no loader takes for a model's weights stays
    let lora = folder(
        &world,
        "lora",
        &[
            ("adapter_config.json", 9),
            ("adapter_model.safetensors", 99),
        ],
    );
    world.run(&["publish", arg(&lora), "org/model"]).succeeds();
    let pull_request = ["publish", arg(&one), "org/model", "--pr", "--replace"];
    world.run(&pull_request).succeeds();
    world
        .run(&[
            "hub",
            "download",
            "org/model@refs/pr/1",
            "--out",
            "proposed",
        ])
        .succeeds();
    let proposed = files(&world.path("proposed"));
    let weights: Vec<&String> = proposed
        .keys()
        .filter(|name| name.ends_with("safetensors"))
        .collect();
    assert_eq!(weights, ["adapter_model.safetensors", "model.safetensors"]);
    assert!(!proposed.contains_key("model.safetensors.index.json"));
}

#[test]
fn nobodys_proposal_is_taken_for_ours_because_it_changes_nothing_of_ours() {
    let world = World::with_hub();
    let shard = "model-00001-of-00001.safetensors";
    let all = [("config.json", 9), ("model.safetensors", 99), (shard, 77)];
    let dir = folder(&world, "model", &all);
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    let idea = folder(&world, "idea", &[("notes.txt", 5)]);
    let pull_request =
        |dir: &Path| world.json(&["publish", arg(dir), "org/model", "--pr", "--replace"]);
    let theirs = pull_request(&idea)["pull_request_url"].clone();
    std::fs::remove_file(dir.join(shard)).expect("removes");
    let ours = pull_request(&dir)["pull_request_url"].clone();
    assert_ne!(ours, theirs);
    // what it proposes is there: it is not proposed twice
    assert_eq!(pull_request(&dir)["pull_request_url"], ours);
    for (number, is_there) in [(1, true), (2, false)] {
        let (out, from) = (
            format!("pr-{number}"),
            format!("org/model@refs/pr/{number}"),
        );
        world
            .run(&["hub", "download", &from, "--out", &out])
            .succeeds();
        assert_eq!(world.path(&out).join(shard).exists(), is_there, "{number}");
    }
}

#[test]
fn what_cannot_be_pushed_beside_what_is_there_is_not_begun() {
    let world = World::with_hub();
    let base = world.model("base", svdhub::weights::Dtype::BF16, u64::MAX);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    let decompose = [
        "decompose",
        arg(&base),
        "--push",
        "org/base",
        "--out",
        "svd",
    ];
    world
        .run(&decompose)
        .refuses(&["holds other weights: model.safetensors", "--replace"]);
    assert!(!world.path("svd").exists(), "not begun");
    // a sidecar may stand beside its base
    world
        .run(&[&decompose[..], &["--layout", "sidecar"]].concat())
        .succeeds();
    let split = world.path("split");
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    let merge = [
        "merge",
        arg(&split),
        "--push",
        "org/base",
        "--out",
        "merged",
    ];
    world.run(&merge).refuses(&["holds other weights: svd-"]);
    world.run(&[&merge[..], &["--replace"]].concat()).succeeds();
}

#[test]
fn what_has_lost_its_weights_is_not_published() {
    let world = World::with_hub();
    let base = world.model("base", svdhub::weights::Dtype::BF16, u64::MAX);
    let (split, merged) = (world.path("svd"), world.path("merged"));
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    world
        .run(&["merge", arg(&split), "--out", arg(&merged)])
        .succeeds();
    for (dir, file) in [
        (&merged, "model.safetensors"),
        (&split, "svd-00001-of-00001.safetensors"),
        (&split, "svd.safetensors.index.json"),
    ] {
        let (there, away) = (dir.join(file), world.path("away"));
        std::fs::rename(&there, &away).expect("moves");
        world
            .run(&["publish", arg(dir), "org/less"])
            .refuses(&[file, "is gone"]);
        std::fs::rename(&away, &there).expect("moves");
    }
    world.run(&["publish", arg(&split), "org/svd"]).succeeds();
    // nor a plain model that its own index, or the names of its shards, tell to be less than whole
    let sharded = world.model("sharded", svdhub::weights::Dtype::BF16, 700_000);
    let mut shards = files(&sharded).into_keys();
    let shard = shards.find(|name| name.contains("-of-")).expect("a shard");
    for file in [&shard[..], "model.safetensors.index.json"] {
        let (there, away) = (sharded.join(file), world.path("away"));
        std::fs::rename(&there, &away).expect("moves");
        world
            .run(&["publish", arg(&sharded), "org/less"])
            .refuses(&[file, "is gone"]);
        std::fs::rename(&away, &there).expect("moves");
    }
}

#[test]
fn folders_and_links_arrive_and_secrets_do_not() {
    let world = World::with_hub();
    let files = [
        ("config.json", 9),
        ("runs/one/events.out.tfevents.1", 500),
        ("LICENSE", 20),
    ];
    let dir = folder(&world, "model", &files);
    std::os::unix::fs::symlink("LICENSE", dir.join("COPYING")).expect("links");
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    arrives_as(&world, "org/model", &dir);
    for hidden in [
        ".git/config",
        ".env",
        ".cache/huggingface/x",
        "__pycache__/x.pyc",
    ] {
        let path = dir.join(hidden);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("creates");
        std::fs::write(path, "secret").expect("writes");
    }
    let again = world.json(&["publish", arg(&dir), "org/model"]);
    assert_eq!(
        (&again["unchanged"], &again["files"]),
        (&Value::from(4), &Value::from(4))
    );
    // a link that leads out is refused before anything is asked of the Hub
    std::os::unix::fs::symlink("/etc/passwd", dir.join("runs/link")).expect("links");
    let before = world.hub().requests().len();
    world.run(&["publish", arg(&dir), "org/other"]).refuses(&[
        "runs/link",
        "leads out",
        "/etc/passwd",
    ]);
    assert_eq!(world.hub().requests().len(), before);
}

#[test]
fn a_snapshot_of_the_cache_is_published_whole() {
    let world = World::with_hub();
    let base = world.model("base", svdhub::weights::Dtype::BF16, u64::MAX);
    let pushed = world.json(&["publish", arg(&base), "org/base"]);
    world.run(&["verify", "org/base"]).succeeds();
    let commit = pushed["commit"].as_str().expect("a commit");
    let snapshot = world
        .path("hf/hub/models--org--base/snapshots")
        .join(commit);
    assert!(snapshot.join("model.safetensors").is_symlink());
    let copied = world.json(&["publish", arg(&snapshot), "org/copy"]);
    assert_eq!(copied["files"], pushed["files"]);
    arrives_as(&world, "org/copy", &base);
}

#[test]
fn an_upload_link_that_expired_is_asked_for_anew() {
    for part_bytes in [None, Some(50_000)] {
        let world = World::with_hub_of(ServerOptions {
            part_bytes,
            ..ServerOptions::default()
        });
        let dir = folder(&world, "model", &[("model.safetensors", 120_000)]);
        world.fault("/objects/batch", 2, Effect::ExpiredLink);
        world.run(&["publish", arg(&dir), "org/model"]).succeeds();
        assert_eq!(world.asked(0, "/objects/batch").len(), 3);
        arrives_as(&world, "org/model", &dir);
    }
}

#[test]
fn what_arrived_otherwise_is_named() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("config.json", 99), ("LICENSE", 9)]);
    let listing = r#"[{"type":"file","oid":"ce013625030ba8dba906f756967f9e9ca394464a","size":9,"path":"LICENSE"}]"#;
    let effect = Effect::Status {
        status: 200,
        headers: vec![],
        body: listing.into(),
    };
    world.fault("/tree/", 1, effect);
    world
        .run(&["publish", arg(&dir), "org/model"])
        .refuses(&["differs from the local files: LICENSE, config.json"]);
    let said = world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    assert!(
        said.stdout
            .contains("the remote files are the local ones, by hash")
    );
}

#[test]
fn a_job_publishes_without_a_stored_token() {
    let world = World::with_hub();
    let dir = folder(
        &world,
        "model",
        &[("config.json", 99), ("model.safetensors", 999)],
    );
    world.run(&["publish", arg(&dir), "org/model"]).succeeds();
    std::fs::write(dir.join("NOTICE"), "by a job").expect("writes");
    let job = |resource: &str, secret: &str, repo: &str| {
        let mut command = world.command(&["publish", arg(&dir), repo]);
        let url = format!("{}/oidc/token?job=1", world.hub().endpoint());
        command
            .env("HF_TOKEN", "hf_wrong")
            .env("HF_OIDC_RESOURCE", resource)
            .env("ACTIONS_ID_TOKEN_REQUEST_URL", url)
            .env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", secret)
            .env("SVDHUB_LOG", "trace");
        let run = Run::of(command.output().expect("runs"));
        let shown = run.stdout.contains("hf_jwt_") || run.stderr.contains("hf_jwt_");
        assert!(!shown, "the exchanged token shows");
        run
    };
    // it expires on the way: the job signs in once more
    world.fault("/preupload/", 1, answer(401, &[]));
    job("org/model", TOKEN, "org/model").succeeds();
    assert_eq!(world.asked(0, "POST /oauth/token").len(), 2);
    assert_eq!(titles(&world, "org/model", "main").len(), 2);
    // a token for one repository opens no other
    job("org/model", TOKEN, "org/other").refuses(&["no right"]);
    job("org/none", TOKEN, "org/none").refuses(&["no token for `org/none`", "trusted publishers"]);
    job("org/model", "wrong", "org/model").refuses(&["the runner gives this job no token"]);
    let mut command = world.command(&["publish", arg(&dir), "org/model"]);
    command.env("HF_OIDC_RESOURCE", "org/model");
    Run::of(command.output().expect("runs")).refuses(&["no identity", "id-token: write"]);
}

#[test]
fn a_hub_killed_at_any_moment_keeps_what_it_promised() {
    let world = World::new();
    let serve = || {
        let arguments = [
            "hub",
            "serve",
            "hub",
            "--port",
            "0",
            "--token",
            TOKEN,
            "--part-bytes=70000",
        ];
        let mut hub = world.command(&arguments).spawn().expect("starts");
        let mut endpoint = String::new();
        let stdout = hub.stdout.as_mut().expect("its output");
        BufReader::new(stdout)
            .read_line(&mut endpoint)
            .expect("reads");
        (hub, endpoint.trim().to_string())
    };
    let command = |endpoint: &str, arguments: &[&str]| {
        let mut command = world.command(arguments);
        command.env("HF_ENDPOINT", endpoint).env("HF_TOKEN", TOKEN);
        command
    };
    let run = |endpoint: &str, arguments: &[&str]| {
        Run::of(command(endpoint, arguments).output().expect("runs"))
    };
    let mut killed_at_work = 0;
    for round in 0..10u64 {
        let name = format!("model-{round}");
        let dir = folder(
            &world,
            &name,
            &[("model.safetensors", 400_000), ("config.json", 99)],
        );
        std::fs::write(dir.join("config.json"), &name).expect("writes");
        let repo = format!("org/{name}");
        let publish = ["publish", arg(&dir), &repo];
        let (mut hub, endpoint) = serve();
        let child = command(&endpoint, &publish).spawn().expect("starts");
        std::thread::sleep(Duration::from_millis(15 + 8 * round));
        hub.kill().expect("is killed");
        hub.wait().expect("has ended");
        let ended = Run::of(child.wait_with_output().expect("ends"));
        // a new one serves the same folder
        let (mut hub, endpoint) = serve();
        if ended.code == Some(0) {
            let again = run(&endpoint, &[&publish[..], &["--json"]].concat()).succeeds();
            let again: Value = serde_json::from_str(&again.stdout).expect("JSON");
            assert_eq!(
                again["unchanged"], again["files"],
                "what was promised is there"
            );
        } else {
            ended.refuses(&["error: "]);
            killed_at_work += 1;
            run(&endpoint, &publish).succeeds();
        }
        let into = format!("fetched-{round}");
        run(&endpoint, &["hub", "download", &repo, "--out", &into]).succeeds();
        for file in ["model.safetensors", "config.json"] {
            let same = std::fs::read(dir.join(file)).expect("reads")
                == std::fs::read(world.path(&into).join(file)).expect("reads");
            assert!(same, "{file} of {repo}");
        }
        hub.kill().expect("is killed");
        hub.wait().expect("has ended");
    }
    assert!(killed_at_work > 0, "every push was faster than the kill");
}

#[test]
fn a_hub_that_repeats_the_token_is_not_quoted() {
    let world = World::with_hub();
    let dir = folder(&world, "model", &[("config.json", 10)]);
    for status in [400, 401, 500] {
        let told = format!("bad token Bearer {TOKEN}");
        for effect in [
            answer(
                status,
                &[("x-error-message", &told), ("x-error-code", "Odd")],
            ),
            world::answer(status, &[], &json!({"error": told}).to_string()),
        ] {
            world.fault("/api/", 99, effect);
            for verb in [&["publish", arg(&dir), "org/m"][..], &["plan", "org/m"]] {
                let run = world.run(verb);
                assert!(
                    run.code != Some(0) && !run.stderr.contains(TOKEN),
                    "{}",
                    run.stderr
                );
            }
            world.hub().heal();
        }
    }
}

#[test]
fn no_log_shows_the_token() {
    let world = World::with_hub();
    let dir = folder(
        &world,
        "model",
        &[("config.json", 99), ("model.safetensors", 999)],
    );
    // hf-hub, hyper and reqwest log too; `Run::of` looks for the token
    for arguments in [
        vec!["publish", arg(&dir), "org/model", "--pr"],
        vec!["hub", "download", "org/model@refs/pr/1", "--out", "fetched"],
        vec![
            "publish",
            arg(&dir),
            "org/model",
            "--branch",
            "b",
            "--tag",
            "t",
        ],
    ] {
        let mut command = world.command(&arguments);
        command.env("SVDHUB_LOG", "trace");
        world.fault("/resolve/", 1, answer(503, &[]));
        let run = Run::of(command.output().expect("runs")).succeeds();
        assert!(run.stderr.contains("TRACE"), "{}", run.stderr);
    }
    let journal = format!("{:?}", world.hub().requests());
    assert!(!journal.contains(TOKEN), "the journal shows the token");
}
