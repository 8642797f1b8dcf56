//! The Python process that runs the peers, and the environment it runs in.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use ndarray::{Array1, Array2};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use svdhub::weights::Checkpoint;

use crate::Result;
use crate::blas::HARMFUL;
use crate::machine::loudly;
use crate::matrix::{Reference, matrix_of};
use crate::python::{beside, environment};

/// The peers of one matrix; their names are those of peers.py.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Peer {
    #[serde(rename = "torch.svd_lowrank")]
    Lowrank,
    #[serde(rename = "sklearn.randomized_svd")]
    Randomized,
    #[serde(rename = "torch.linalg.svd")]
    TorchFull,
    #[serde(rename = "scipy gesdd")]
    Gesdd,
}

impl Peer {
    pub const ALL: [Self; 4] = [
        Self::Lowrank,
        Self::Randomized,
        Self::TorchFull,
        Self::Gesdd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Lowrank => "torch.svd_lowrank",
            Self::Randomized => "sklearn.randomized_svd",
            Self::TorchFull => "torch.linalg.svd",
            Self::Gesdd => "scipy gesdd",
        }
    }

    /// Whether it computes every triplet, whatever is asked for.
    pub fn is_full(self) -> bool {
        matches!(self, Self::TorchFull | Self::Gesdd)
    }
}

/// The name of the whole-model peer in peers.py.
const MODEL: &str = "svd-training";

/// The resident process. It ends when this is dropped.
#[derive(Debug)]
pub struct Peers {
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    hello: Hello,
}

#[derive(Debug, Deserialize)]
struct Hello {
    versions: BTreeMap<String, String>,
    blas: Vec<String>,
    missing: BTreeMap<String, String>,
}

/// A peer's q leading triplets, vectors in rows.
pub struct Factors {
    pub u: Array2<f32>,
    pub sigma: Array1<f32>,
    pub v: Array2<f32>,
}

/// What svd-training's create_from_model did.
#[derive(Debug, Deserialize)]
pub struct ModelRun {
    pub how: String,
    pub seconds: f64,
    /// Of these, on the output head, which svd-training always decomposes.
    pub head_seconds: f64,
    pub linear_layers: usize,
}

impl Peers {
    /// Starts the process in `python`, or in an environment of its own beside `target`'s temporary folder.
    pub fn start(python: Option<&Path>, target: &Path, threads: usize) -> Result<Self> {
        let python = environment(
            python,
            &target.with_file_name("bench-venv"),
            "requirements.txt",
        )?;
        let script = beside("peers.py");
        let threads = threads.to_string();
        let mut command = Command::new(&python);
        command
            .arg(&script)
            .arg(&threads)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        for name in HARMFUL {
            command.env_remove(name);
        }
        for pool in ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"] {
            command.env(pool, &threads);
        }
        // transformers reads the model from its directory and asks nobody
        command.env("HF_HUB_OFFLINE", "1");
        let mut process = command
            .spawn()
            .map_err(|error| format!("{} does not start: {error}", python.display()))?;
        let (Some(questions), Some(answers)) = (process.stdin.take(), process.stdout.take()) else {
            return Err("the pipes asked for are there".into());
        };
        let mut peers = Self {
            process,
            questions,
            answers: BufReader::new(answers),
            hello: Hello {
                versions: BTreeMap::new(),
                blas: Vec::new(),
                missing: BTreeMap::new(),
            },
        };
        peers.hello = peers.ask(&json!({"do": "hello"}))?;
        for (peer, reason) in &peers.hello.missing {
            loudly(&format!("SKIPPED, {peer}: {reason}"));
        }
        Ok(peers)
    }

    pub fn versions(&self) -> String {
        let named = self.hello.versions.iter();
        let named: Vec<String> = named.map(|(name, v)| format!("{name} {v}")).collect();
        named.join(", ")
    }

    pub fn blas(&self) -> String {
        self.hello.blas.join(", ")
    }

    pub fn has(&self, peer: Peer) -> bool {
        !self.hello.missing.contains_key(peer.name())
    }

    pub fn has_model(&self) -> bool {
        !self.hello.missing.contains_key(MODEL)
    }

    /// Makes the matrix in this file the one that the next questions are about.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        self.ask::<Value>(&json!({"do": "load", "path": path}))
            .map(drop)
    }

    pub fn reference(&mut self, q: usize) -> Result<Reference> {
        self.ask(&json!({"do": "reference", "q": q}))
    }

    /// Seconds that `peer` takes for the matrix at hand; none if it fails, which takes it out of the run.
    pub fn run(&mut self, peer: Peer, q: usize) -> Option<f64> {
        #[derive(Deserialize)]
        struct Spent {
            seconds: f64,
        }
        let question = json!({"do": "run", "peer": peer.name(), "q": q});
        let spent: Spent = self.ask_or_leave_out(peer.name(), &question)?;
        Some(spent.seconds)
    }

    /// The q leading triplets of what `peer` computed last.
    pub fn factors(&mut self, peer: Peer, q: usize, folder: &Path) -> Result<Factors> {
        const FILE: &str = "factors.safetensors";
        let path = folder.join(FILE);
        self.ask::<Value>(&json!({"do": "keep", "peer": peer.name(), "q": q, "path": path}))?;
        let stored = Checkpoint::single(folder, FILE)?;
        Ok(Factors {
            u: matrix_of(&stored, "u")?,
            sigma: stored.read_finite("sigma")?.to_f32().into(),
            v: matrix_of(&stored, "v")?,
        })
    }

    /// svd-training on the model in `dir`; none if it fails, which takes it out of the run.
    pub fn model(&mut self, dir: &Path, f: f64) -> Option<ModelRun> {
        let question = json!({"do": "model", "directory": dir, "f": f});
        self.ask_or_leave_out(MODEL, &question)
    }

    fn ask_or_leave_out<T: DeserializeOwned>(&mut self, peer: &str, question: &Value) -> Option<T> {
        match self.ask(question) {
            Ok(answer) => Some(answer),
            Err(error) => {
                loudly(&format!("LEFT OUT from here, {peer}: {error}"));
                self.hello.missing.insert(peer.into(), error.to_string());
                None
            }
        }
    }

    fn ask<T: DeserializeOwned>(&mut self, question: &Value) -> Result<T> {
        // the pools of the side that ran last spin for some milliseconds before they sleep
        std::thread::sleep(Duration::from_millis(50));
        writeln!(self.questions, "{question}")?;
        self.questions.flush()?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(format!("the Python process ended at {question}").into());
        }
        std::thread::sleep(Duration::from_millis(50));
        let answer: Value = serde_json::from_str(&line)?;
        match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(format!("{question}: {error}").into()),
            None => Ok(serde_json::from_value(answer)?),
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // already gone is as good
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
