//! Our client, judged by a Hub we did not write: shardline, which takes and gives large files by Xet and by LFS.
//!
//! `tests/clients/install DIR shardline` builds it; `SVDHUB_CLIENTS=DIR` names where it is.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use svdhub::weights::Dtype;

use crate::clients::clients;
use crate::world::{Run, World, arg, files, wait_until};
use crate::xet::noise;

/// A running shardline; it stops when this value is dropped.
struct Shardline {
    program: PathBuf,
    /// Where it keeps its files, and the key that makes tokens.
    room: PathBuf,
    endpoint: String,
    server: Child,
}

impl Drop for Shardline {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Shardline {
    fn start(program: PathBuf, room: PathBuf) -> Self {
        std::fs::create_dir_all(room.join("data")).expect("creates");
        let setup = Command::new(&program)
            .args(["providerless", "setup"])
            .current_dir(&room)
            .output();
        assert!(setup.expect("runs").status.success());
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = free.local_addr().expect("an address").to_string();
        drop(free);
        let endpoint = format!("http://{address}");
        let frontends = ["xet", "lfs", "hub"].map(|name| ["--frontend", name]);
        let server = Command::new(&program)
            .arg("serve")
            .args(frontends.concat())
            .current_dir(&room)
            .env("SHARDLINE_DEPLOYMENT_MODE", "insecure")
            .env("SHARDLINE_BIND_ADDR", &address)
            .env("SHARDLINE_PUBLIC_BASE_URL", &endpoint)
            .env("SHARDLINE_ROOT_DIR", room.join("data"))
            .env("SHARDLINE_SERVER_ROLE", "all")
            .env("SHARDLINE_OBJECT_STORAGE_ADAPTER", "local")
            .env(
                "SHARDLINE_TOKEN_SIGNING_KEY_FILE",
                room.join(".shardline/token-signing-key"),
            )
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        wait_until("it listens", || {
            std::net::TcpStream::connect(&address).is_ok()
        });
        Self {
            program,
            room,
            endpoint,
            server,
        }
    }

    /// A token for one repository of alice's.
    fn token(&self, name: &str) -> String {
        let made = Command::new(&self.program)
            .args(["admin", "token", "--issuer", "local", "--subject", "alice"])
            .args(["--scope", "write", "--provider", "generic"])
            .args(["--owner", "alice", "--repo", name])
            .args(["--key-file", ".shardline/token-signing-key"])
            .current_dir(&self.room)
            .output()
            .expect("runs");
        assert!(made.status.success());
        let text = String::from_utf8(made.stdout).expect("UTF-8");
        text.lines().last().expect("a token").to_string()
    }

    /// Runs our program on one of alice's repositories.
    fn run(&self, world: &World, name: &str, xet: bool, arguments: &[&str]) -> Run {
        let token = self.token(name);
        let mut command = world.command(arguments);
        command
            .env("HF_ENDPOINT", &self.endpoint)
            .env("HF_TOKEN", &token)
            .env("SVDHUB_LOG", "xet=info")
            .env("HF_HUB_DISABLE_XET", if xet { "0" } else { "1" });
        let run = Run::of(command.output().expect("runs")).succeeds();
        assert!(!run.stderr.contains(&token) && !run.stdout.contains(&token));
        assert!(!run.stderr.contains("Xet fails"), "{}", run.stderr);
        run
    }
}

fn shardline(world: &World, test: &str) -> Option<Shardline> {
    let dir = std::env::var_os("SVDHUB_CLIENTS").map(PathBuf::from);
    let program = dir.map(|dir| dir.join("shardline/bin/shardline"));
    if let Some(program) = program.filter(|program| program.exists()) {
        let program = std::fs::canonicalize(program).expect("it is there");
        return Some(Shardline::start(program, world.path("shardline")));
    }
    // not eprintln: of a test that passes, that is not shown
    let how = "tests/clients/install DIR shardline, then name DIR in SVDHUB_CLIENTS";
    writeln!(std::io::stderr(), "SKIPPED: {test} needs shardline ({how})")
        .expect("standard error is open");
    None
}

/// Weights that are so large that nobody takes them inside a commit, and that a download asks for their name in the store.
fn model(world: &World, name: &str, seed: u64) -> PathBuf {
    let dir = world.path(name);
    std::fs::create_dir_all(&dir).expect("creates");
    std::fs::write(dir.join("model.safetensors"), noise(seed, 40_000_000)).expect("writes");
    std::fs::write(dir.join("config.json"), "{}").expect("writes");
    dir
}

fn same(out: &Path, dir: &Path, what: &str) {
    // not by the assertion itself, which would print them
    assert!(files(out) == files(dir), "{what} brought other files");
}

#[test]
fn what_we_push_to_shardline_we_pull_from_it() {
    let world = World::new();
    let Some(hub) = shardline(&world, "what_we_push_to_shardline_we_pull_from_it") else {
        return;
    };
    for xet in [true, false] {
        let name = if xet { "by-xet" } else { "by-lfs" };
        let repo = format!("alice/{name}");
        let dir = model(&world, name, xet as u64);
        let publish = ["publish", arg(&dir), &repo, "--json"];
        let sent = |run: Run| -> u64 {
            let facts: Value = serde_json::from_str(&run.stdout).expect("JSON");
            facts["bytes_sent"].as_u64().expect("a number")
        };
        assert!(sent(hub.run(&world, name, xet, &publish)) >= 40_000_000);
        // the same again, and to a branch: nothing is sent
        assert_eq!(sent(hub.run(&world, name, xet, &publish)), 0);
        let branch = [&publish[..], &["--branch", "dev"]].concat();
        assert_eq!(sent(hub.run(&world, name, xet, &branch)), 0);
        // either way brings what came either way
        for back in [true, false] {
            let out = world.path(&format!("{name}-{back}"));
            let download = ["hub", "download", &repo, "--out", arg(&out)];
            let run = hub.run(&world, name, back, &download);
            let in_chunks = run.stderr.contains("New download stream group");
            assert_eq!(in_chunks, back && xet, "{}", run.stderr);
            same(&out, &dir, name);
        }
    }
}

#[test]
fn what_passes_through_to_shardline_is_what_is_made_here() {
    let world = World::new();
    let test = "what_passes_through_to_shardline_is_what_is_made_here";
    let Some(hub) = shardline(&world, test) else {
        return;
    };
    let base = world.model("base", Dtype::BF16, 700_000);
    let decompose = |out: &Path| {
        let fixed = ["decompose", arg(&base), "--shard-size", "300kB"];
        let out = ["--out", arg(out)];
        fixed.iter().chain(&out).map(ToString::to_string).collect()
    };
    let here = world.path("here");
    let made: Vec<String> = decompose(&here);
    let made: Vec<&str> = made.iter().map(String::as_str).collect();
    world.run(&made).succeeds();
    for (name, xet) in [("passed-by-xet", true), ("passed-by-lfs", false)] {
        let (out, back) = (world.path(name), world.path(&format!("{name}-back")));
        let repo = format!("alice/{name}");
        let passing: Vec<String> = decompose(&out);
        let mut passing: Vec<&str> = passing.iter().map(String::as_str).collect();
        passing.extend(["--push", &repo]);
        hub.run(&world, name, xet, &passing);
        let download = ["hub", "download", &repo, "--out", arg(&back)];
        hub.run(&world, name, xet, &download);
        let (mut there, mut made) = (files(&back), files(&here));
        for told_otherwise in ["README.md", ".gitattributes", "report.json"] {
            there.remove(told_otherwise);
            made.remove(told_otherwise);
        }
        assert!(there == made, "{name}: other files than those made here");
    }
}

#[test]
fn through_shardline_we_and_python_understand_each_other() {
    let world = World::with_hub();
    let test = "through_shardline_we_and_python_understand_each_other";
    let Some(hub) = shardline(&world, test) else {
        return;
    };
    let python = clients(test).into_iter().find(|c| c.name == "newest");
    let python = python.expect("the clients are installed").with_xet();
    let ours = model(&world, "ours", 7);
    hub.run(&world, "ours", true, &["publish", arg(&ours), "alice/ours"]);
    let theirs = model(&world, "theirs", 8);
    let (token, their_token) = (hub.token("ours"), hub.token("theirs"));
    let at = |token| [("HF_ENDPOINT", hub.endpoint.as_str()), ("HF_TOKEN", token)];
    let out = world.path("theirs-from-ours");
    python.run_with(&world, "pull", "alice/ours", &out, &at(token.as_str()));
    same(&out, &ours, "Python");
    python.run_with(&world, "push", "alice/theirs", &theirs, &at(&their_token));
    let out = world.path("ours-from-theirs");
    let download = ["hub", "download", "alice/theirs", "--out", arg(&out)];
    hub.run(&world, "theirs", true, &download);
    same(&out, &theirs, "our client");
}
