//! `train`: moves Σ on next-token loss.

pub mod data;
pub mod optimizer;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::adapter::{self, Adapter, AdapterConfig};
use crate::artifact::Artifact;
use crate::error::{Error, IoContext, Result};
use crate::event::{Event, Observer, Stage, Unit};
use crate::format::Origin;
use crate::json::Tool;
use crate::model::{Decoder, Trained, stacked};
use crate::report;
use crate::source::{Source, load};
use crate::weights::{Checkpoint, Elements, Header, ShardWriter};
use crate::workspace::{Claim, Workspace};
use data::{Corpus, shuffled};
use optimizer::{AdamW, Moments, Schedule};

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Duration {
    Steps(usize),
    Epochs(f64),
}

/// How to train.
#[derive(Debug, Clone)]
pub struct Options {
    pub duration: Duration,
    /// Windows per step.
    pub batch: usize,
    /// Tokens per window.
    pub length: usize,
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub warmup: usize,
    pub weight_decay: f64,
    pub norms: bool,
    pub seed: u64,
    /// Go on where an interrupted run of the same settings stopped.
    pub resume: bool,
    /// Steps between two saved states.
    pub save_every: usize,
    pub device: Device,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            duration: Duration::Epochs(1.0),
            batch: 4,
            length: 256,
            // Adam moves each σ by about this much per step; σ of real weights are 1 to 100
            learning_rate: 1e-2,
            schedule: Schedule::default(),
            warmup: 0,
            weight_decay: 0.0,
            norms: false,
            seed: 0,
            resume: false,
            save_every: 50,
            device: Device::Cpu,
        }
    }
}

/// The facts of a training run, as `report.json` keeps them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub method: String,
    pub trained: Vec<String>,
    /// Hub id of the decomposition, if it came from one.
    pub decomposition: Option<String>,
    /// Numbers that moved.
    pub parameters: u64,
    pub data: String,
    pub data_tokens: usize,
    pub steps: usize,
    pub batch: usize,
    pub length: usize,
    pub learning_rate: f64,
    pub schedule: Schedule,
    pub warmup: usize,
    pub weight_decay: f64,
    pub seed: u64,
    pub device: String,
    /// Mean loss of each step's tokens before its update, in nats.
    pub losses: Vec<f32>,
    pub tokens_per_s: f64,
    pub seconds: f64,
    pub adapter_sha256: String,
    pub adapter_bytes: u64,
}

/// Trains on the corpus at `data` and writes an adapter to `out`.
///
/// # Errors
/// An output directory of another job, or of this one interrupted without `resume`; a tensor that no gradient reaches;
/// a loss that is not a number.
pub fn run(
    source: &Source,
    pin: Origin,
    data: &Path,
    out: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    let Source::Decomposition { artifact, .. } = source else {
        return Err(Error::NotAnArtifact {
            path: source.dir().into(),
        });
    };
    let config = source.config()?;
    let corpus = Corpus::read(data, source.dir(), &config, options.length)?;
    corpus.warn_of_length(&config, observer);
    let windows = corpus.full_windows();
    let steps = match options.duration {
        Duration::Steps(steps) => steps,
        Duration::Epochs(epochs) => {
            ((epochs * windows.len() as f64 / options.batch as f64).ceil() as usize).max(1)
        }
    };
    let (mut workspace, claim) =
        Workspace::claim(out, "train", settings(artifact, &corpus, steps, options))?;
    match claim {
        Claim::Finished => {
            observer.note(format!("{} is complete already", out.display()));
            return report::section(out, "train");
        }
        Claim::Interrupted if !options.resume && workspace.state(STATE_FILE).exists() => {
            return Err(Error::OutputOccupied {
                path: out.into(),
                found: "an unfinished training run".into(),
            });
        }
        Claim::Interrupted | Claim::Fresh => {}
    }

    let trained = Trained {
        sigma: true,
        norms: options.norms,
        embeddings: false,
    };
    let decoder = load(source, trained, &options.device, observer)?;
    let mut run = Run {
        decoder: &decoder,
        optimizer: AdamW {
            weight_decay: options.weight_decay,
            ..AdamW::default()
        },
        losses: Vec::new(),
    };
    run.resume(&workspace, observer)?;
    let started = Instant::now();
    let mut tokens = 0;
    let first = run.losses.len();
    observer.resume(Stage::Train, first as u64, steps as u64, Unit::Steps);
    for step in first..steps {
        let batch = batch(&windows, step, options);
        let learning_rate =
            options.learning_rate * options.schedule.factor(step, steps, options.warmup);
        let loss = run.step(&batch, learning_rate, step == first)?;
        tokens += batch.iter().map(|window| window.len()).sum::<usize>();
        observer.event(&Event::Stepped {
            step: step + 1,
            steps,
            loss,
            learning_rate,
            tokens_per_s: tokens as f64 / started.elapsed().as_secs_f64(),
        });
        observer.advance(Stage::Train, 1, "");
        if (step + 1) % options.save_every.max(1) == 0 && step + 1 < steps {
            run.save(&workspace)?;
        }
    }
    observer.finish(Stage::Train);
    let seconds = started.elapsed().as_secs_f64();

    let adapter = run.adapter(out, artifact, pin, options)?;
    let adapter_sha256 = adapter.save()?;
    let weights = out.join(adapter::WEIGHTS_FILE);
    let facts = Facts {
        method: adapter.config.method.clone(),
        trained: adapter.config.trained.clone(),
        decomposition: adapter.config.decomposition.repo.clone(),
        parameters: decoder
            .variables
            .values()
            .map(|v| v.elem_count() as u64)
            .sum(),
        data: data
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        data_tokens: corpus.ids.len(),
        steps,
        batch: options.batch,
        length: options.length,
        learning_rate: options.learning_rate,
        schedule: options.schedule,
        warmup: options.warmup,
        weight_decay: options.weight_decay,
        seed: options.seed,
        device: device_name(&options.device),
        losses: run.losses.clone(),
        tokens_per_s: tokens as f64 / seconds.max(1e-9),
        seconds,
        adapter_sha256,
        adapter_bytes: std::fs::metadata(&weights).context("read", &weights)?.len(),
    };
    report::add(out, report::inherited(&artifact.dir)?, "train", &facts)?;
    workspace.finish()?;
    let _ = std::fs::remove_file(workspace.state(STATE_FILE));
    Ok(facts)
}

/// What a device is called on the command line.
pub fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// What makes two runs the same job.
fn settings(
    artifact: &Artifact,
    corpus: &Corpus,
    steps: usize,
    options: &Options,
) -> BTreeMap<String, String> {
    let ids: Vec<u8> = corpus.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    BTreeMap::from([
        ("decomposition".into(), artifact.content_sha256.clone()),
        ("data".into(), crate::sum::sha256_hex(&ids)),
        ("steps".into(), steps.to_string()),
        ("batch".into(), options.batch.to_string()),
        ("length".into(), options.length.to_string()),
        ("learning rate".into(), options.learning_rate.to_string()),
        (
            "schedule".into(),
            format!("{:?}", options.schedule).to_lowercase(),
        ),
        ("warm-up".into(), options.warmup.to_string()),
        ("weight decay".into(), options.weight_decay.to_string()),
        ("norms".into(), options.norms.to_string()),
        ("seed".into(), options.seed.to_string()),
    ])
}

/// The windows of one step: each epoch is a new shuffle, and a step depends on nothing but its number.
fn batch<'a>(windows: &[&'a [u32]], step: usize, options: &Options) -> Vec<&'a [u32]> {
    let (start, n) = (step * options.batch, windows.len());
    let mut order: Option<(u64, Vec<usize>)> = None;
    (start..start + options.batch)
        .map(|at| {
            let epoch = (at / n) as u64;
            if order.as_ref().is_none_or(|(of, _)| *of != epoch) {
                order = Some((epoch, shuffled(n, options.seed, epoch)));
            }
            let (_, order) = order.as_ref().expect("it was set above");
            windows[order[at % n]]
        })
        .collect()
}

const STATE_FILE: &str = "training.safetensors";

/// A training run between two steps.
pub struct Run<'a> {
    pub decoder: &'a Decoder,
    pub optimizer: AdamW,
    /// One for each step done.
    pub losses: Vec<f32>,
}

impl Run<'_> {
    /// One step on windows of equal length. Returns the mean loss before the update.
    ///
    /// `check` refuses tensors that no gradient reaches.
    pub fn step(&mut self, batch: &[&[u32]], learning_rate: f64, check: bool) -> Result<f32> {
        let ids = stacked(batch, &self.decoder.device)?;
        let (sum, predicted) = self.decoder.loss(&ids)?;
        let mean = (&sum / predicted as f64)?;
        let loss = mean.flatten_all()?.to_vec1::<f32>()?[0];
        if !loss.is_finite() {
            return Err(Error::Diverged {
                step: self.losses.len() + 1,
                loss,
            });
        }
        let gradients = mean.backward()?;
        let mut collected = Vec::with_capacity(self.decoder.variables.len());
        let mut dead = Vec::new();
        for (name, variable) in &self.decoder.variables {
            let gradient = match gradients.get(variable) {
                Some(gradient) => gradient
                    .to_dtype(DType::F32)?
                    .flatten_all()?
                    .to_vec1::<f32>()?,
                None => Vec::new(),
            };
            if let Some(&value) = gradient.iter().find(|g| !g.is_finite()) {
                return Err(Error::BrokenGradient {
                    tensor: name.clone(),
                    step: self.losses.len() + 1,
                    value,
                });
            }
            if check && gradient.iter().all(|&g| g == 0.0) {
                dead.push(name.clone());
            }
            collected.push(gradient);
        }
        if !dead.is_empty() {
            return Err(Error::DeadGradient { dead });
        }
        self.optimizer.begin_step();
        for ((name, variable), gradient) in self.decoder.variables.iter().zip(collected) {
            if gradient.is_empty() {
                continue;
            }
            let mut values = variable.flatten_all()?.to_vec1::<f32>()?;
            self.optimizer
                .update(name, &mut values, &gradient, learning_rate);
            set(variable, values)?;
        }
        self.losses.push(loss);
        Ok(loss)
    }

    /// The state as tensors: values, moments, losses. What `resume` reads.
    fn save(&self, workspace: &Workspace) -> Result<()> {
        let mut tensors: BTreeMap<String, Elements> = BTreeMap::new();
        for (name, variable) in &self.decoder.variables {
            let values = variable.flatten_all()?.to_vec1::<f32>()?;
            tensors.insert(
                format!("value/{name}"),
                Elements::from_f32(variable.dims(), &values),
            );
        }
        for (name, moments) in &self.optimizer.state {
            let shape = [moments.first.len()];
            tensors.insert(
                format!("first/{name}"),
                Elements::from_f32(&shape, &moments.first),
            );
            tensors.insert(
                format!("second/{name}"),
                Elements::from_f32(&shape, &moments.second),
            );
        }
        tensors.insert(
            "losses".into(),
            Elements::from_f32(&[self.losses.len()], &self.losses),
        );
        let header = Header::compose(
            tensors
                .iter()
                .map(|(name, e)| (name.as_str(), e.dtype, e.shape.as_slice())),
        )?;
        let mut writer = ShardWriter::create(&workspace.state(STATE_FILE), header)?;
        for (name, elements) in &tensors {
            writer.put(name, &elements.bytes)?;
        }
        writer.finish().map(drop)
    }

    fn resume(&mut self, workspace: &Workspace, observer: &dyn Observer) -> Result<()> {
        let path = workspace.state(STATE_FILE);
        if !path.exists() {
            return Ok(());
        }
        let dir = path.parent().expect("a state file lies in a folder");
        let state = Checkpoint::single(dir, STATE_FILE)?;
        for (name, variable) in &self.decoder.variables {
            let read = |kind: &str| Ok::<_, Error>(state.read(&format!("{kind}/{name}"))?.to_f32());
            let moments = Moments {
                first: read("first")?,
                second: read("second")?,
            };
            set(variable, read("value")?)?;
            self.optimizer.state.insert(name.clone(), moments);
        }
        self.losses = state.read("losses")?.to_f32();
        self.optimizer.steps = self.losses.len() as u32;
        observer.note(format!("going on after step {}", self.losses.len()));
        Ok(())
    }

    fn adapter(
        &self,
        out: &Path,
        artifact: &Artifact,
        pin: Origin,
        options: &Options,
    ) -> Result<Adapter> {
        let (mut delta, mut tensors) = (BTreeMap::new(), BTreeMap::new());
        for (name, variable) in &self.decoder.variables {
            let values = variable.flatten_all()?.to_vec1::<f32>()?;
            match name.strip_suffix(".delta") {
                Some(module) => {
                    delta.insert(module.to_string(), values);
                }
                None => {
                    tensors.insert(name.clone(), Elements::from_f32(variable.dims(), &values));
                }
            }
        }
        let mut trained = vec!["sigma".to_string()];
        trained.extend(options.norms.then(|| "norms".to_string()));
        Ok(Adapter {
            dir: out.into(),
            config: AdapterConfig {
                schema: adapter::SCHEMA,
                method: "sigma".into(),
                trained,
                decomposition: pin,
                base: artifact.svd.base.clone(),
                weights_sha256: None,
                tool: Tool::this(),
                sha256: None,
            },
            delta,
            tensors,
        })
    }
}

fn set(variable: &Var, values: Vec<f32>) -> Result<()> {
    let tensor = Tensor::from_vec(values, variable.dims(), variable.device())?;
    Ok(variable.set(&tensor)?)
}
