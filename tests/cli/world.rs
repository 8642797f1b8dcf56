//! A temporary world for one test: a directory, the program, and, where wanted, a Hub.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Once;

use serde_json::Value;
use svdhub::hub::server::{Effect, Fault, Request, Server, ServerOptions};
use svdhub::linalg::single_threaded_blas;
use svdhub::model::ModelConfig;
use svdhub::weights::{Checkpoint, Dtype, Elements, Header, Layout, ShardWriter};
use tempfile::TempDir;

/// The only token that writes to a world's Hub.
pub const TOKEN: &str = "hf_a_secret_that_must_not_show";

pub struct World {
    dir: TempDir,
    pub server: Option<Server>,
}

/// What a run of the program left.
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name)
}

impl World {
    pub fn new() -> Self {
        // a fork waits for OpenBLAS's threads to end, and for ever where another test wakes them just then
        static ALONE: Once = Once::new();
        ALONE.call_once(single_threaded_blas);
        Self {
            dir: TempDir::new().expect("temporary directory"),
            server: None,
        }
    }

    /// A world with a Hub in it.
    pub fn with_hub() -> Self {
        Self::with_hub_of(ServerOptions::default())
    }

    /// A world with a Hub that serves like this, where `TOKEN` alone writes.
    pub fn with_hub_of(mut options: ServerOptions) -> Self {
        let mut world = Self::new();
        options.grants.push(TOKEN.parse().expect("a token"));
        world.server = Some(Server::start(&world.path("hub"), &options).expect("the Hub starts"));
        world
    }

    pub fn hub(&self) -> &Server {
        self.server.as_ref().expect("this world has a Hub")
    }

    /// What the Hub answers below `/api/models/`, asked with the token.
    pub fn api(&self, path: &str) -> Value {
        let url = format!("{}/api/models/{path}", self.hub().endpoint());
        let client = reqwest::blocking::Client::new();
        let answer = client.get(url).bearer_auth(TOKEN).send();
        answer.expect("an answer").json().expect("JSON")
    }

    /// The next requests that match go wrong.
    pub fn fault(&self, matching: &str, times: usize, effect: Effect) {
        self.hub().inject(Fault {
            matching: matching.into(),
            times,
            effect,
        });
    }

    /// What was asked of the Hub since the journal had `before` lines, as far as it matches `METHOD /path`.
    pub fn asked(&self, before: usize, matching: &str) -> Vec<Request> {
        let requests = self.hub().requests().into_iter().skip(before);
        requests
            .filter(|r| format!("{} {}", r.method, r.path).contains(matching))
            .collect()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The program with arguments, in this world's directory, with no environment but this world's.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_svdhub"));
        command
            .args(arguments)
            .current_dir(self.dir.path())
            .env_clear()
            .env("HOME", self.dir.path())
            .env("HF_HOME", self.path("hf"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(server) = &self.server {
            command
                .env("HF_ENDPOINT", server.endpoint())
                .env("HF_TOKEN", TOKEN);
        }
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Run {
        Run::of(
            self.command(arguments)
                .output()
                .expect("the program starts"),
        )
    }

    /// Runs and returns the JSON it prints.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let run = self.run(&[arguments, &["--json"]].concat()).succeeds();
        serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e} in {}", run.stdout))
    }

    /// A copy of the fixture model, every float tensor in `dtype`, in files of at most `shard_bytes`.
    pub fn model(&self, name: &str, dtype: Dtype, shard_bytes: u64) -> PathBuf {
        let source = fixture("shakespeare-1m");
        let checkpoint = Checkpoint::open(&source, Layout::Model).expect("the fixture opens");
        let tensors: BTreeMap<String, Elements> = checkpoint
            .inventory
            .entries()
            .map(|(_, e)| {
                (
                    e.name.clone(),
                    checkpoint.read(&e.name).expect("reads").cast(dtype),
                )
            })
            .collect();
        let dir = self.path(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        for file in [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "LICENSE",
            "README.md",
        ] {
            std::fs::copy(source.join(file), dir.join(file)).expect("copies");
        }
        write_model(&dir, &tensors, shard_bytes);
        dir
    }

    /// A model of any family, its shapes from the config, in bf16 with weights that repeat nothing and hold zeros of both signs.
    pub fn random_model(&self, name: &str, config: &Value) -> PathBuf {
        let dir = self.path(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        std::fs::write(dir.join("config.json"), config.to_string()).expect("writes");
        let parsed = ModelConfig::read(&dir).expect("parses");
        let mut state = 7u64;
        let tensors: BTreeMap<String, Elements> = parsed
            .tensors(parsed.prefix(|_| false))
            .into_iter()
            .map(|(name, shape)| {
                let values: Vec<f32> = (0..shape.iter().product::<usize>())
                    .map(|i| {
                        state = state
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        let x = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                        match i % 97 {
                            13 => 0.0,
                            29 => -0.0,
                            31 => x * 1e-6,
                            _ => x * x * x,
                        }
                    })
                    .collect();
                (name, Elements::from_f32(&shape, &values).cast(Dtype::BF16))
            })
            .collect();
        write_model(&dir, &tensors, u64::MAX);
        dir
    }
}

/// Writes weights as one file, or as shards with an index.
pub fn write_model(dir: &Path, tensors: &BTreeMap<String, Elements>, shard_bytes: u64) {
    let mut shards: Vec<Vec<(&String, &Elements)>> = vec![Vec::new()];
    let mut filled = 0;
    for (name, tensor) in tensors {
        let bytes = tensor.bytes.len() as u64;
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("a shard").push((name, tensor));
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = if count == 1 {
            Layout::Model.single_file()
        } else {
            Layout::Model.shard_file(number + 1, count)
        };
        let header = Header::compose(
            shard
                .iter()
                .map(|(n, t)| (n.as_str(), t.dtype, t.shape.as_slice())),
        );
        let mut writer =
            ShardWriter::create(&dir.join(&file), header.expect("composes")).expect("creates");
        for (name, tensor) in shard {
            writer.put(name, &tensor.bytes).expect("writes");
            weight_map.insert((*name).clone(), file.clone());
        }
        writer.finish().expect("finishes");
    }
    if count > 1 {
        let total: usize = tensors.values().map(|t| t.bytes.len()).sum();
        let index =
            serde_json::json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        let path = dir.join(Layout::Model.index_file());
        std::fs::write(path, serde_json::to_vec_pretty(&index).expect("JSON")).expect("writes");
    }
}

/// Waits until something is so; a test that waits in vain fails.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if is_so() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("waited in vain until {what}");
}

impl Run {
    pub fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
        let run = Self {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        };
        assert!(
            !run.stdout.contains(TOKEN) && !run.stderr.contains(TOKEN),
            "the token shows"
        );
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
        run
    }

    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// The program refuses, and its message holds all these words.
    pub fn refuses(self, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(1), "{}\n{}", self.stdout, self.stderr);
        for word in words {
            assert!(
                self.stderr.contains(word),
                "`{word}` is missing from\n{}",
                self.stderr
            );
        }
        self
    }
}

/// Every file of a directory by name, our own folder and the report aside.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("lists") {
        let path = entry.expect("an entry").path();
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        if path.is_file() && name != "report.json" {
            files.insert(name, std::fs::read(&path).expect("reads"));
        }
    }
    files
}

/// Any answer instead of the right one.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Effect {
    let headers = headers.iter();
    Effect::Status {
        status,
        headers: headers
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect(),
        body: body.into(),
    }
}

/// Writes a small file of a decomposition anew, and its sum into the index: as if it had been made so.
pub fn remake(split: &Path, file: &str, contents: &str) {
    std::fs::write(split.join(file), contents).expect("writes");
    let index = split.join("svd.safetensors.index.json");
    let mut json = json_file(&index);
    json["metadata"]["sha256"]["files"][file] = svdhub::sum::sha256_hex(contents.as_bytes()).into();
    std::fs::write(index, json.to_string()).expect("writes");
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// What a JSON file holds.
pub fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("reads")).expect("JSON")
}

/// The `svd` section of a decomposition.
pub fn section(split: &Path) -> Value {
    json_file(&split.join("config.json"))["svd"].clone()
}

/// The records of its modules.
pub fn modules(split: &Path) -> BTreeMap<String, Value> {
    let section = section(split);
    let modules = section["modules"].as_object().expect("modules");
    modules
        .iter()
        .map(|(m, r)| (m.clone(), r.clone()))
        .collect()
}

/// Every tensor of a model.
pub fn tensors(dir: &Path) -> BTreeMap<String, Elements> {
    let checkpoint = Checkpoint::open(dir, Layout::Model).expect("opens");
    let names = checkpoint.inventory.entries().map(|(_, e)| e.name.clone());
    names
        .map(|name| {
            let elements = checkpoint.read(&name).expect("reads");
            (name, elements)
        })
        .collect()
}

/// The held-out loss of a model, or of a decomposition with an adapter.
pub fn loss(world: &World, model: &[&str]) -> f64 {
    let data = fixture("eighty-heldout.txt");
    let facts = world.json(
        &[
            &["evaluate"],
            model,
            &["--data", arg(&data), "--length", "64"],
        ]
        .concat(),
    );
    facts["loss"].as_f64().expect("a loss")
}

/// Waits for a child to succeed, and says how much memory it took at most.
///
/// Not by rusage, which counts in what this process held when it started the child: the tests beside hold more.
pub fn peak_bytes(mut child: std::process::Child) -> u64 {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        if let Some(ended) = child.try_wait().expect("it is our child") {
            assert!(ended.success(), "the program fails: {ended}");
            return peak;
        }
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let high = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = high.and_then(|high| high.trim().strip_suffix(" kB")?.parse().ok());
        peak = peak.max(1024 * kilobytes.unwrap_or(0));
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
