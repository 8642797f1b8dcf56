//! The embedded Hub, judged by clients we did not write: huggingface_hub of today and of before Xet, transformers, and
//! huggingface.js, each with Xet and without. What one pushes, all others pull.
//!
//! `tests/clients/install DIR` brings them; `SVDHUB_CLIENTS=DIR` names where they are.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use svdhub::hub::server::ServerOptions;
use svdhub::sum::sha256_hex;
use svdhub::weights::Dtype;

use crate::world::{TOKEN, World, arg};

/// Somebody else's client.
#[derive(Clone)]
pub struct Client {
    pub name: &'static str,
    program: PathBuf,
    script: &'static str,
    /// Whether large files go by Xet, where the Hub has that.
    xet: bool,
}

impl Client {
    pub fn with_xet(self) -> Self {
        Self { xet: true, ..self }
    }

    fn called(&self) -> String {
        format!("{}{}", self.name, if self.xet { "-xet" } else { "" })
    }

    fn home(&self, world: &World) -> PathBuf {
        world.path(&format!("home-{}", self.called()))
    }

    /// Runs one verb of its script in a home of its own, and returns what it prints.
    fn run(&self, world: &World, verb: &str, repo: &str, folder: &Path) -> Value {
        self.run_with(world, verb, repo, folder, &[])
    }

    pub fn run_with(
        &self,
        world: &World,
        verb: &str,
        repo: &str,
        folder: &Path,
        variables: &[(&str, &str)],
    ) -> Value {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
        let home = self.home(world);
        std::fs::create_dir_all(&home).expect("creates");
        let output = Command::new(&self.program)
            .arg(script.join(self.script))
            .args([verb, repo, arg(folder)])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", &home)
            .env("HF_HOME", home.join("hf"))
            .env("HF_ENDPOINT", world.hub().endpoint())
            .env("HF_TOKEN", TOKEN)
            // of a Hub without Xet, today's client no longer asks
            .env("HF_HUB_DISABLE_XET", if self.xet { "0" } else { "1" })
            .env("HF_HUB_DISABLE_TELEMETRY", "1")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("SVDHUB_JS", home.join("../js"))
            .env("SVDHUB_XET", if self.xet { "1" } else { "" })
            .envs(variables.iter().copied())
            .output()
            .expect("the client starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (said, wrong) = (text(&output.stdout), text(&output.stderr));
        let who = format!("{} {verb} {repo}", self.name);
        assert!(output.status.success(), "{who}\n{said}{wrong}");
        let last = said.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|e| panic!("{who}: {e}\n{said}{wrong}"))
    }
}

/// The clients where they are installed, or a loud word that they are not.
pub fn clients(test: &str) -> Vec<Client> {
    let Some(dir) = std::env::var_os("SVDHUB_CLIENTS").map(PathBuf::from) else {
        // not eprintln: of a test that passes, that is not shown
        let how = "tests/clients/install DIR, then name DIR in SVDHUB_CLIENTS";
        writeln!(
            std::io::stderr(),
            "SKIPPED: {test} needs the Hub's clients ({how})"
        )
        .expect("standard error is open");
        return Vec::new();
    };
    let dir = std::fs::canonicalize(dir).expect("SVDHUB_CLIENTS is there");
    let python = |name, folder: &str| Client {
        name,
        program: dir.join(folder).join("bin/python"),
        script: "clients.py",
        xet: false,
    };
    let mut clients = vec![python("newest", "newest"), python("old", "old")];
    if dir.join("js/node_modules").is_dir() {
        clients.push(Client {
            name: "js",
            program: "node".into(),
            script: "clients.mjs",
            xet: false,
        });
    } else {
        writeln!(
            std::io::stderr(),
            "SKIPPED: {test} without npm's client: there is no {}/js",
            dir.display()
        )
        .expect("standard error is open");
    }
    clients
}

/// The sha256 of every published file by its path.
fn sums(dir: &Path) -> BTreeMap<String, String> {
    let names = svdhub::hub::published_files(dir).expect("lists");
    let sum = |name: &String| sha256_hex(&std::fs::read(dir.join(name)).expect("reads"));
    names.iter().map(|name| (name.clone(), sum(name))).collect()
}

/// A model with a folder in it, and a large file that no other has.
fn model(world: &World, name: &str) -> PathBuf {
    let dir = world.model(name, Dtype::BF16, 600_000);
    std::fs::create_dir_all(dir.join("runs/one")).expect("creates");
    std::fs::write(dir.join("runs/one/notes.txt"), "a note\n").expect("writes");
    let own = (0..4000).map(|i| sha256_hex(format!("{name} {i}").as_bytes()));
    let own: String = own.collect();
    std::fs::write(dir.join("own.bin"), own).expect("writes");
    dir
}

/// In one piece, in parts, and in chunks.
fn modes() -> [ServerOptions; 3] {
    let parts = ServerOptions {
        part_bytes: Some(200_000),
        page_entries: 3,
        ..ServerOptions::default()
    };
    let chunks = ServerOptions {
        xet: true,
        ..ServerOptions::default()
    };
    [ServerOptions::default(), parts, chunks]
}

/// To a Hub with Xet they come with it, and without.
fn either_way(clients: &[Client], options: &ServerOptions) -> Vec<Client> {
    let with = |xet| {
        move |client: &Client| Client {
            xet,
            ..client.clone()
        }
    };
    let mut all: Vec<Client> = clients.iter().map(with(false)).collect();
    if options.xet {
        all.extend(clients.iter().map(with(true)));
    }
    all
}

fn with_js(world: &World) {
    if let Some(dir) = std::env::var_os("SVDHUB_CLIENTS") {
        let js = std::fs::canonicalize(Path::new(&dir).join("js"));
        if let Ok(js) = js {
            std::os::unix::fs::symlink(js, world.path("js")).expect("links");
        }
    }
}

#[test]
fn what_one_client_pushes_all_pull() {
    let clients = clients("what_one_client_pushes_all_pull");
    if clients.is_empty() {
        return;
    }
    for options in modes() {
        let clients = either_way(&clients, &options);
        let world = World::with_hub_of(options);
        with_js(&world);
        let ours = model(&world, "ours");
        let expected = |dir: &Path| serde_json::to_value(sums(dir)).expect("JSON");
        world.run(&["publish", arg(&ours), "local/ours"]).succeeds();
        let mut repos = vec![("local/ours".to_string(), expected(&ours))];
        for client in &clients {
            let repo = format!("local/{}", client.called());
            let dir = model(&world, &format!("of-{}", client.called()));
            let before = world.hub().requests().len();
            client.run(&world, "push", &repo, &dir);
            let by_lfs = !world.asked(before, "PUT ").is_empty();
            let by_xet = !world.asked(before, "xet-write-token").is_empty() || client.name == "js";
            assert!(
                by_lfs != client.xet && by_xet >= client.xet,
                "{repo} came another way"
            );
            repos.push((repo, expected(&dir)));
        }
        for (repo, expected) in &repos {
            for client in &clients {
                let into = world.path(&format!("{}-from-{repo}", client.called()));
                std::fs::create_dir_all(&into).expect("creates");
                let before = world.hub().requests().len();
                let pulled = client.run(&world, "pull", repo, &into);
                assert_eq!(&pulled["sums"], expected, "{} from {repo}", client.called());
                let by_xet = !world.asked(before, "xet-read-token").is_empty();
                // the shards are the same in all repositories, and ours came by Xet
                assert_eq!(by_xet, client.xet, "{} from {repo}", client.called());
            }
            let into = world.path(&format!("ours-from-{repo}"));
            world
                .run(&["hub", "download", repo, "--out", arg(&into)])
                .succeeds();
            assert_eq!(
                &serde_json::to_value(sums(&into)).expect("JSON"),
                expected,
                "{repo}"
            );
            world.run(&["verify", repo]).succeeds();
        }
    }
}

#[test]
fn every_client_can_do_all_that_publishers_do() {
    let clients = clients("every_client_can_do_all_that_publishers_do");
    for options in modes() {
        for client in either_way(&clients, &options) {
            let world = World::with_hub_of(options.clone());
            with_js(&world);
            let dir = model(&world, "model");
            // the old client asks the public Hub about cards, whatever the endpoint
            let elsewhere = [("SVDHUB_CARDS_GO_ELSEWHERE", "1")];
            let variables = if client.name == "old" {
                &elsewhere[..]
            } else {
                &[]
            };
            client.run_with(&world, "operations", "local/all", &dir, variables);
        }
    }
}

#[test]
fn the_cache_is_shared_with_python_in_both_orders() {
    let xet = ServerOptions {
        xet: true,
        ..ServerOptions::default()
    };
    let clients = clients("the_cache_is_shared_with_python_in_both_orders");
    for client in either_way(&clients, &xet) {
        if client.script != "clients.py" {
            continue;
        }
        let world = World::with_hub_of(ServerOptions {
            xet: client.xet,
            ..ServerOptions::default()
        });
        let dir = model(&world, "model");
        world.run(&["publish", arg(&dir), "local/one"]).succeeds();
        world.run(&["publish", arg(&dir), "local/two"]).succeeds();
        let home = client.home(&world).join("hf");
        let verify = |repo: &str| {
            let mut command = world.command(&["verify", repo]);
            crate::world::Run::of(command.env("HF_HOME", &home).output().expect("runs"))
        };
        // Python first: nothing is sent again to us
        client.run(&world, "pull", "local/one", &world.path("into-one"));
        let before = world.hub().requests().len();
        verify("local/one").succeeds();
        let shards = |before: usize| {
            let contents = world.asked(before, "GET /objects/");
            contents.into_iter().filter(|r| r.bytes > 100_000).count()
        };
        assert_eq!(shards(before), 0);
        // and offline
        let mut command = world.command(&["verify", "local/one"]);
        command.env("HF_HOME", &home).env("HF_HUB_OFFLINE", "1");
        crate::world::Run::of(command.output().expect("runs")).succeeds();
        // we first, then Python: into its folder, and from our cache offline
        verify("local/two").succeeds();
        let before = world.hub().requests().len();
        client.run(&world, "pull", "local/two", &world.path("into-two"));
        let count = svdhub::hub::published_files(&dir).expect("lists");
        let count = count
            .iter()
            .filter(|name| name.ends_with(".safetensors"))
            .count();
        assert!(shards(before) <= count, "at most once, for the folder");
    }
}

#[test]
fn transformers_loads_by_name_what_we_published() {
    let mut clients = clients("transformers_loads_by_name_what_we_published");
    clients.truncate(1);
    // weights too, where there is a Python with PyTorch
    let torch = std::env::var_os("SVDHUB_PYTHON").filter(|_| !clients.is_empty());
    clients.extend(torch.map(|program| Client {
        name: "torch",
        program: program.into(),
        script: "clients.py",
        xet: false,
    }));
    for client in &clients {
        let world = World::with_hub();
        let dir = model(&world, "model");
        world.run(&["publish", arg(&dir), "local/model"]).succeeds();
        let facts = client.run(&world, "transformers", "local/model", &dir);
        assert_eq!(facts["model_type"], "llama");
        assert!(facts["ids"].as_array().is_some_and(|ids| ids.len() > 3));
        assert!(facts["loaded"] == true || client.name != "torch");
    }
}

#[test]
fn python_logs_in_by_the_identity_of_its_job() {
    let clients = clients("python_logs_in_by_the_identity_of_its_job");
    if let Some(client) = clients.first() {
        let world = World::with_hub();
        let dir = model(&world, "model");
        world.run(&["publish", arg(&dir), "local/model"]).succeeds();
        let url = format!("{}/oidc/token?job=1", world.hub().endpoint());
        let job = [
            ("GITHUB_ACTIONS", "true"),
            ("HF_OIDC_RESOURCE", "local/model"),
            ("ACTIONS_ID_TOKEN_REQUEST_URL", url.as_str()),
            ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", TOKEN),
        ];
        client.run_with(&world, "keyless", "local/model", &dir, &job);
        let commits = world.api("local/model/commits/main");
        assert_eq!(commits.as_array().map(Vec::len), Some(3));
    }
}
