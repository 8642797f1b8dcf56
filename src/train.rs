//! `train`: moves Σ, or what another method moves, on next-token loss.

mod kept;
pub mod optimizer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, IoContext, Result};
use crate::event::{Event, Observer, Stage, Unit};
use crate::format::{Origin, Pin};
use crate::model::memory::{Step, Training};
use crate::model::{Decoder, Gradients, Lora, Method, Parametrisation, Trained, gpu, stacked};
use crate::parallel::{Alone, Group, refuse_uneven, share};
use crate::plan::{Plan, PlanOptions};
use crate::report;
use crate::source::{Source, load};
use crate::sum::{Blake3, sha256_hex};
use crate::text::{Corpus, shuffled};
use crate::weights::checkpoint::WeightFile;
use crate::weights::{Checkpoint, Dtype, Elements, Header, Inventory, ShardWriter};
use crate::workspace::{Claim, Workspace};
use kept::Kept;
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
    /// What moves of the linear layers.
    pub method: Method,
    /// Whether norms move too.
    pub norms: bool,
    /// Whether the embedding moves too, and a head that is tied to it along.
    pub embeddings: bool,
    pub seed: u64,
    /// Keep only what each block reads, and compute the rest again for the backward pass: the same numbers, slower, in
    /// less memory.
    pub recompute: bool,
    /// Go on where an interrupted run of the same settings stopped.
    pub resume: bool,
    /// Steps between two saved states.
    pub save_every: usize,
    pub device: Device,
    /// The processes that share each step; they take the same options.
    pub group: Arc<dyn Group>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            duration: Duration::Epochs(1.0),
            batch: 4,
            length: 256,
            learning_rate: Method::default().learning_rate(),
            schedule: Schedule::default(),
            warmup: 0,
            weight_decay: 0.0,
            method: Method::default(),
            norms: false,
            embeddings: false,
            seed: 0,
            recompute: false,
            resume: false,
            save_every: 50,
            device: Device::Cpu,
            group: Arc::new(Alone),
        }
    }
}

/// A model that was trained without being decomposed, and what its card says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Standing {
    pub base: Pin,
    pub base_card: Value,
}

/// The facts of a training run, as `report.json` keeps them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub method: String,
    /// Of `sigma`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parametrisation: Option<Parametrisation>,
    /// r of `lora` and `lora-xs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// α of `lora`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<usize>,
    pub trained: Vec<String>,
    /// Hub id of the decomposition, if it came from one, and its commit.
    pub decomposition: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decomposition_revision: Option<String>,
    /// The model that a LoRA stands on, where no decomposition tells of it.
    #[serde(flatten)]
    pub on: Option<Standing>,
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
    #[serde(default)]
    pub recompute: bool,
    pub device: String,
    /// Processes that shared the steps.
    #[serde(default = "one")]
    pub processes: usize,
    /// Mean loss of each step's tokens before its update, in nats.
    pub losses: Vec<f32>,
    pub tokens_per_s: f64,
    pub seconds: f64,
    pub adapter_sha256: String,
    pub adapter_bytes: u64,
    /// Of a LoRA, whose own files hold no sums: the file of weights, its tensors, and the files beside it.
    #[serde(flatten)]
    pub sums: Sums,
}

fn one() -> usize {
    1
}

/// The sha256 of what was written, each by its name.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Sums {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sha256: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tensor_sha256: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub side_sha256: BTreeMap<String, String>,
}

/// Trains on the corpus at `data` and writes what moved to `out`: an adapter of the decomposition, or with
/// [`Method::Lora`] one of PEFT, for which `source` may be a plain model too. `pin` tells where a decomposition is from.
///
/// # Errors
/// An output directory of another job, or of this one interrupted without `resume`; a tensor that no gradient reaches;
/// a loss that is not a number.
pub fn run(
    source: &Source,
    pin: Option<Origin>,
    data: &Path,
    out: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    refuse_uneven(options.batch, &*options.group)?;
    let kept = Kept::of(source, pin, options, observer)?;
    let config = source.config()?;
    let corpus = Corpus::read(data, source.dir(), &config, options.length)?;
    corpus.warn_of_length(&config, observer);
    let windows = corpus.full_windows();
    let longest = windows.iter().map(|window| window.len()).max();
    refuse_too_large(source, options, longest.unwrap_or_default())?;
    let steps = steps(&windows, options);
    let (mut workspace, claim) =
        Workspace::claim(out, "train", settings(&kept, &corpus, steps, options))?;
    match claim {
        Claim::Finished => {
            // the others wait for what is to be done
            options.group.spread(&mut [NOTHING_TO_DO])?;
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

    let decoder = load(source, trained(options), &options.device, observer)
        .map_err(|error| with_plan(error, source, options))?;
    let mut run = Run::new(&decoder, options);
    run.resume(&workspace, observer)?;
    run.agree()?;
    let started = Instant::now();
    let mut tokens = 0;
    let first = run.losses.len();
    observer.resume(Stage::Train, first as u64, steps as u64, Unit::Steps);
    for step in first..steps {
        let batch = batch(&windows, step, options);
        let learning_rate = learning_rate(step, steps, options);
        let loss = run
            .step(&batch, learning_rate, is_checked(step, first))
            .map_err(|error| with_plan(error, source, options))?;
        if is_checked(step, first) && (!is_checked(step + 1, first) || step + 1 == steps) {
            warn_of_silence(&run.silent, observer);
        }
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

    run.refuse_overflown()?;
    let (weights, adapter_sha256, sums) = kept.save(&run, out, options, observer)?;
    let facts = Facts {
        method: options.method.name().into(),
        parametrisation: match options.method {
            Method::Sigma(parametrisation) => Some(parametrisation),
            _ => None,
        },
        rank: match options.method {
            Method::Lora(Lora { rank, .. }) | Method::LoraXs { rank } => Some(rank),
            Method::Sigma(_) | Method::Full => None,
        },
        alpha: match options.method {
            Method::Lora(lora) => Some(lora.alpha),
            _ => None,
        },
        trained: groups(options),
        decomposition: kept.decomposition().and_then(|origin| origin.repo.clone()),
        decomposition_revision: (kept.decomposition()).and_then(|origin| origin.revision.clone()),
        on: kept.standing(),
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
        recompute: options.recompute,
        device: device_name(&options.device),
        processes: options.group.size(),
        losses: run.losses.clone(),
        tokens_per_s: tokens as f64 / seconds.max(1e-9),
        seconds,
        adapter_sha256,
        adapter_bytes: std::fs::metadata(&weights).context("read", &weights)?.len(),
        sums,
    };
    report::add(out, report::inherited(source.dir())?, "train", &facts)?;
    workspace.finish()?;
    let _ = std::fs::remove_file(workspace.state(STATE_FILE));
    Ok(facts)
}

/// Takes part in a run that process 0 of the group makes with [`run`]: its share of each step, and nothing else.
///
/// # Errors
/// As [`run`].
pub fn assist(
    source: &Source,
    data: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<()> {
    let config = source.config()?;
    let corpus = Corpus::read(data, source.dir(), &config, options.length)?;
    let windows = corpus.full_windows();
    let steps = steps(&windows, options);
    let decoder = load(source, trained(options), &options.device, observer)
        .map_err(|error| with_plan(error, source, options))?;
    let mut run = Run::new(&decoder, options);
    if !run.agree()? {
        return Ok(());
    }
    let first = run.losses.len();
    for step in first..steps {
        let batch = batch(&windows, step, options);
        let learning_rate = learning_rate(step, steps, options);
        run.step(&batch, learning_rate, is_checked(step, first))
            .map_err(|error| with_plan(error, source, options))?;
    }
    Ok(())
}

/// A device without room, in the plan's numbers.
fn with_plan(error: Error, source: &Source, options: &Options) -> Error {
    if !error.is_out_of_device_memory() {
        return error;
    }
    let planned = planned(source, options, options.length);
    planned.map_or(error, |planned| no_room(&planned, options))
}

fn no_room(planned: &Training, options: &Options) -> Error {
    Error::DeviceMemory {
        device: device_name(&options.device),
        weights: planned.weights_bytes,
        moving: planned.moving_bytes,
        activations: planned.activations_bytes,
        passing: planned.passing_bytes,
    }
}

/// Refuses what this machine's memory cannot hold by far, before the kernel ends it without a word.
fn refuse_too_large(source: &Source, options: &Options, length: usize) -> Result<()> {
    if !options.device.is_cpu() {
        return Ok(());
    }
    match (planned(source, options, length), machine_bytes()) {
        (Some(planned), Some(there)) if planned.peak_bytes / 2 > there => {
            Err(no_room(&planned, options))
        }
        _ => Ok(()),
    }
}

/// This machine's memory (proc_meminfo(5)).
fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// What training takes of each kind, with windows of this length.
fn planned(source: &Source, options: &Options, length: usize) -> Option<Training> {
    let headers = source.base_headers().ok()?;
    let files = headers.into_iter();
    let files = files.map(|(name, header)| WeightFile { name, header });
    let inventory = Inventory::new(source.dir(), files.collect()).ok()?;
    let config = source.config().ok()?;
    let mut wanted = PlanOptions::default();
    if let Source::Decomposition { artifact, .. } = source {
        wanted.rank = artifact.svd.rank;
        wanted.storing.factors = artifact.svd.factors;
    }
    let plan = Plan::new(source.dir(), &config, &inventory, &wanted).ok()?;
    let step = Step {
        method: options.method,
        norms: options.norms,
        embeddings: options.embeddings,
        // of each process
        batch: options.batch / options.group.size(),
        length,
        recompute: options.recompute,
        on_gpu: options.device.is_cuda(),
    };
    plan.with_training(&config, &step, wanted.storing.factors)
        .training
}

fn steps(windows: &[&[u32]], options: &Options) -> usize {
    match options.duration {
        Duration::Steps(steps) => steps,
        Duration::Epochs(epochs) => {
            ((epochs * windows.len() as f64 / options.batch as f64).ceil() as usize).max(1)
        }
    }
}

fn trained(options: &Options) -> Trained {
    Trained {
        linear: Some(options.method),
        norms: options.norms,
        embeddings: options.embeddings,
    }
}

fn learning_rate(step: usize, steps: usize, options: &Options) -> f64 {
    options.learning_rate * options.schedule.factor(step, steps, options.warmup)
}

/// Tells of what does not move, which is no error where weights are zero, or windows too short for attention.
fn warn_of_silence(silent: &[String], observer: &dyn Observer) {
    const NAMED: usize = 3;
    if silent.is_empty() {
        return;
    }
    let named = silent[..silent.len().min(NAMED)].join(", ");
    let more = match silent.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    observer.warn(format!(
        "only zeros reach {named}{more}: weights of zeros beside them, or windows of two tokens, let no gradient through"
    ));
}

/// Whether a gradient is demanded for everything: twice, because what begins still moves from the second step on.
fn is_checked(step: usize, first: usize) -> bool {
    step < first + 2
}

/// What a device is called on the command line.
pub fn device_name(device: &Device) -> String {
    match device.location() {
        candle_core::DeviceLocation::Cpu => "cpu".into(),
        candle_core::DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        candle_core::DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// The groups of numbers that move, the method's own first.
fn groups(options: &Options) -> Vec<String> {
    let mut groups = vec![options.method.name().to_string()];
    groups.extend(options.norms.then(|| "norms".into()));
    groups.extend(options.embeddings.then(|| "embeddings".into()));
    groups
}

/// What makes two runs the same job.
fn settings(
    kept: &Kept,
    corpus: &Corpus,
    steps: usize,
    options: &Options,
) -> BTreeMap<String, String> {
    let ids: Vec<u8> = corpus.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let (what, content) = match kept {
        Kept::Adapter { artifact, .. } => ("decomposition", artifact.content_sha256.clone()),
        Kept::Lora { base, .. } => ("base", format!("{:?}", base.sha256)),
    };
    BTreeMap::from([
        (what.into(), content),
        ("method".into(), format!("{:?}", options.method)),
        ("data".into(), sha256_hex(&ids)),
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
        ("embeddings".into(), options.embeddings.to_string()),
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
/// Its last tensor: the BLAKE3 of the bytes of all others, in hex.
const STATE_SUM: &str = "blake3";

/// A training run between two steps.
pub struct Run<'a> {
    pub decoder: &'a Decoder,
    /// What the decoder was loaded to train.
    pub method: Method,
    /// As in [`Options::recompute`].
    pub recompute: bool,
    pub optimizer: AdamW,
    /// One for each step done.
    pub losses: Vec<f32>,
    /// Those that share each step.
    pub group: Arc<dyn Group>,
    /// What the last checked step had only zeros for: weights of zeros around it let no gradient through.
    pub silent: Vec<String>,
}

/// Process 0 tells the others by this instead of a number of steps that the run ended before.
const NOTHING_TO_DO: f32 = -1.0;

/// Numbers whose gradients are fetched, added up between processes and applied together: Σ of a whole model is one bundle,
/// and of what is larger little more than one tensor is alive.
const BUNDLE: usize = 4 << 20;

impl<'a> Run<'a> {
    /// A run that has not begun.
    pub fn new(decoder: &'a Decoder, options: &Options) -> Self {
        Self {
            decoder,
            method: options.method,
            recompute: options.recompute,
            optimizer: AdamW::new(options.weight_decay),
            losses: Vec::new(),
            group: options.group.clone(),
            silent: Vec::new(),
        }
    }

    /// Refuses what the last update made of the numbers if f32 does not hold it: no loss tells of that any more.
    fn refuse_overflown(&self) -> Result<()> {
        for (name, variable) in &self.decoder.variables {
            let values = numbers(variable)?;
            if let Some(&value) = values.iter().find(|x| !x.is_finite()) {
                let name = name.clone();
                return Err(Error::Overflown { name, value });
            }
        }
        Ok(())
    }

    /// What moves, in bundles.
    fn bundles(&self) -> Vec<Vec<(&'a str, &'a Var)>> {
        let mut bundles: Vec<Vec<(&str, &Var)>> = Vec::new();
        let mut numbers = 0;
        for (name, variable) in &self.decoder.variables {
            let count = variable.elem_count();
            match bundles.last_mut().filter(|_| numbers + count <= BUNDLE) {
                Some(bundle) => bundle.push((name, variable)),
                None => {
                    numbers = 0;
                    bundles.push(vec![(name, variable)]);
                }
            }
            numbers += count;
        }
        bundles
    }

    /// Gives all processes the state of process 0, which may have resumed an earlier run; says whether there is anything to
    /// do.
    fn agree(&mut self) -> Result<bool> {
        let group = self.group.clone();
        if group.size() == 1 {
            return Ok(true);
        }
        // whole numbers up to 2²⁴ are exact
        let mut done = [self.losses.len() as f32];
        group.spread(&mut done)?;
        if done == [NOTHING_TO_DO] {
            return Ok(false);
        }
        self.losses.resize(done[0] as usize, 0.0);
        group.spread(&mut self.losses)?;
        self.optimizer.steps = self.losses.len() as u32;
        for (name, variable) in &self.decoder.variables {
            let mut values = numbers(variable)?;
            group.spread(&mut values)?;
            let nothing = || vec![0.0; values.len()];
            let state = &mut self.optimizer.state;
            let moments = state.entry(name.clone()).or_insert_with(|| Moments {
                first: nothing(),
                second: nothing(),
            });
            group.spread(&mut moments.first)?;
            group.spread(&mut moments.second)?;
            set(variable, values)?;
        }
        Ok(true)
    }

    /// One step on windows of equal length, of which this process takes its share. Returns the mean loss of all before the
    /// update.
    ///
    /// `check` refuses tensors that no gradient reaches, and notes those that only zeros do.
    pub fn step(&mut self, batch: &[&[u32]], learning_rate: f64, check: bool) -> Result<f32> {
        let group = self.group.clone();
        let mine = share(batch, &*group)?;
        let ids = stacked(mine, &self.decoder.device)?;
        let Gradients { loss, mut tensors } = self.decoder.gradients(&ids, self.recompute)?;
        let all = group.size() as f32;
        let mut losses = [loss];
        group.sum(&mut losses)?;
        let loss = losses[0] / all;
        let step = self.losses.len() + 1;
        if !loss.is_finite() {
            return Err(Error::Diverged { step, loss });
        }
        let unreached = self.decoder.variables.keys();
        let unreached = unreached.filter(|name| check && !tensors.contains_key(*name));
        let dead: Vec<String> = unreached.cloned().collect();
        // the run ends with this: nothing of the step is kept
        if !dead.is_empty() {
            return Err(Error::DeadGradient { dead });
        }
        let mut silent = Vec::new();
        self.optimizer.begin_step();
        for bundle in self.bundles() {
            // freed one by one: where whole weights move, all of them are a second model
            let gradients = bundle
                .iter()
                .map(|(name, variable)| match tensors.remove(*name) {
                    Some(gradient) => gradient.to_dtype(DType::F32)?.flatten_all()?.contiguous(),
                    None => Tensor::zeros(variable.elem_count(), DType::F32, variable.device()),
                });
            let gradients = gradients.collect::<candle_core::Result<Vec<_>>>()?;
            let mut there = match gpu::gather(&gradients)? {
                Some(there) => there,
                None => Tensor::cat(&gradients, 0)?,
            };
            drop(gradients);
            // of a GPU one number comes here instead of all, if nothing more is asked of them
            let stays = there.device().is_cuda() && !check && group.size() == 1;
            if stays && all_finite(&there)? && self.update_there(&bundle, &there, learning_rate)? {
                continue;
            }
            let mut gradient = there.to_vec1::<f32>()?;
            if group.size() > 1 {
                group.sum(&mut gradient)?;
                gradient.iter_mut().for_each(|g| *g /= all);
                there = Tensor::new(gradient.as_slice(), there.device())?;
            }
            let mut left = &gradient[..];
            for (name, variable) in &bundle {
                let (gradient, rest) = left.split_at(variable.elem_count());
                left = rest;
                if let Some(&value) = gradient.iter().find(|g| !g.is_finite()) {
                    return Err(Error::BrokenGradient {
                        tensor: (*name).into(),
                        step,
                        value,
                    });
                }
                let still = step == 1 && self.method.begins_still(name);
                if check && !still && gradient.iter().all(|&g| g == 0.0) {
                    silent.push((*name).into());
                }
            }
            if !self.update_there(&bundle, &there, learning_rate)? {
                self.update_here(&bundle, &gradient, learning_rate)?;
            }
        }
        if check {
            self.silent = silent;
        }
        self.losses.push(loss);
        Ok(loss)
    }

    /// Moves a bundle by its gradient where both lie, if that is on a GPU; says whether it did.
    fn update_there(
        &mut self,
        bundle: &[(&str, &Var)],
        gradient: &Tensor,
        learning_rate: f64,
    ) -> Result<bool> {
        if !gradient.device().is_cuda() {
            return Ok(false);
        }
        let values = bundle.iter().map(|(_, variable)| variable.flatten_all());
        let values = values.collect::<candle_core::Result<Vec<_>>>()?;
        let optimizer = &mut self.optimizer;
        Ok(optimizer.update_there(&counts(bundle), &values, gradient, learning_rate)?)
    }

    /// Moves a bundle by its gradient in this process's memory.
    fn update_here(
        &mut self,
        bundle: &[(&str, &Var)],
        gradient: &[f32],
        learning_rate: f64,
    ) -> Result<()> {
        let mut left = gradient;
        for (name, variable) in bundle {
            let (gradient, rest) = left.split_at(variable.elem_count());
            left = rest;
            let mut values = numbers(variable)?;
            self.optimizer
                .update(name, &mut values, gradient, learning_rate);
            set(variable, values)?;
        }
        Ok(())
    }

    /// The state as tensors: values, moments, losses, and a sum of all these. What `resume` reads.
    fn save(&mut self, workspace: &Workspace) -> Result<()> {
        for bundle in self.bundles() {
            self.optimizer.fetch(&counts(&bundle))?;
        }
        let mut names: Vec<(String, Vec<usize>)> = Vec::new();
        for (name, variable) in &self.decoder.variables {
            names.push((format!("value/{name}"), variable.dims().to_vec()));
            for moment in ["first", "second"] {
                names.push((format!("{moment}/{name}"), vec![variable.elem_count()]));
            }
        }
        names.push(("losses".into(), vec![self.losses.len()]));
        let tensors = names.iter();
        let tensors = tensors.map(|(name, shape)| (name.as_str(), Dtype::F32, shape.as_slice()));
        let header = Header::compose(tensors.chain([(STATE_SUM, Dtype::U8, &[64][..])]))?;
        let mut writer = ShardWriter::create(&workspace.state(STATE_FILE), header)?;
        let mut sum = Blake3::default();
        for (name, variable) in &self.decoder.variables {
            let moments = &self.optimizer.state[name];
            for (kind, values) in [
                ("value", &numbers(variable)?),
                ("first", &moments.first),
                ("second", &moments.second),
            ] {
                let stored = Elements::from_f32(&[values.len()], values);
                sum.update(&stored.bytes);
                writer.put(&format!("{kind}/{name}"), &stored.bytes)?;
            }
        }
        let losses = Elements::from_f32(&[self.losses.len()], &self.losses);
        sum.update(&losses.bytes);
        writer.put("losses", &losses.bytes)?;
        writer.put(STATE_SUM, sum.finish().as_bytes())?;
        writer.finish().map(drop)
    }

    fn resume(&mut self, workspace: &Workspace, observer: &dyn Observer) -> Result<()> {
        let path = workspace.state(STATE_FILE);
        if !path.exists() {
            return Ok(());
        }
        let dir = path.parent().expect("a state file lies in a folder");
        let state = Checkpoint::single(dir, STATE_FILE)?;
        let mut sum = Blake3::default();
        let mut read = |name: &str| -> Result<Vec<f32>> {
            let stored = state.read(name)?;
            sum.update(&stored.bytes);
            Ok(stored.to_f32())
        };
        for (name, variable) in &self.decoder.variables {
            let value = read(&format!("value/{name}"))?;
            let moments = Moments {
                first: read(&format!("first/{name}"))?,
                second: read(&format!("second/{name}"))?,
            };
            set(variable, value)?;
            self.optimizer.state.insert(name.clone(), moments);
        }
        self.losses = read("losses")?;
        // earlier builds wrote none
        if state.inventory.contains(STATE_SUM) {
            let expected = state.read(STATE_SUM)?.bytes;
            let expected = String::from_utf8_lossy(&expected).into_owned();
            let found = sum.finish();
            if found != expected {
                return Err(Error::PartChanged {
                    tensor: "the state".into(),
                    path,
                    expected,
                    found,
                });
            }
        }
        self.optimizer.steps = self.losses.len() as u32;
        observer.note(format!("going on after step {}", self.losses.len()));
        Ok(())
    }
}

/// Whether none of many numbers (n,) is infinite or NaN: their sum is then neither. One that overflows says no, too.
fn all_finite(numbers: &Tensor) -> Result<bool> {
    // by rows first: candle sums what becomes one number in one block of a GPU
    const ROW: usize = 1024;
    let count = numbers.elem_count();
    let missing = count.next_multiple_of(ROW) - count;
    let rows = numbers.pad_with_zeros(0, 0, missing)?;
    let sums = rows.reshape((rows.elem_count() / ROW, ROW))?.sum(1)?;
    Ok(sums.sum_all()?.to_scalar::<f32>()?.is_finite())
}

fn counts<'a>(bundle: &[(&'a str, &Var)]) -> Vec<(&'a str, usize)> {
    let counts = bundle
        .iter()
        .map(|(name, variable)| (*name, variable.elem_count()));
    counts.collect()
}

/// A tensor's numbers in f32, row-major.
fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn set(variable: &Var, values: Vec<f32>) -> Result<()> {
    let tensor = Tensor::from_vec(values, variable.dims(), variable.device())?;
    Ok(variable.set(&tensor)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Base;
    use candle_core::Error::Msg;

    #[test]
    fn a_device_without_memory_is_told_from_other_failures() {
        // as cudarc words it
        let full = Msg(r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#.into());
        assert!(Error::Candle(full).is_out_of_device_memory());
        // a cuBLAS of its own for one more queue takes memory too
        let none = Msg("CublasError(CUBLAS_STATUS_ALLOC_FAILED)".into());
        assert!(Error::Candle(none).is_out_of_device_memory());
        let other = Msg(r#"DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal address")"#.into());
        assert!(!Error::Candle(other).is_out_of_device_memory());
    }

    #[test]
    fn a_number_that_is_none_is_found_among_many() {
        let mut numbers: Vec<f32> = (0..100_000).map(|i| (i as f32 - 5e4) * 1e20).collect();
        let finite = |numbers: &[f32]| {
            let there = Tensor::new(numbers, &Device::Cpu).expect("numbers");
            all_finite(&there).expect("asks")
        };
        assert!(finite(&numbers) && finite(&numbers[..1024]) && finite(&[0.0]));
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 77_777, 99_999] {
                let kept = std::mem::replace(&mut numbers[at], broken);
                assert!(!finite(&numbers), "{broken} at {at}");
                numbers[at] = kept;
            }
        }
    }

    #[test]
    fn the_plan_of_what_does_not_fit_is_that_of_the_model() {
        let base = Base::open(Path::new("fixtures/shakespeare-1m"), None, None);
        let source = Source::Model(base.expect("the fixture"));
        let of = |batch| {
            let options = Options {
                method: Method::Full,
                batch,
                ..Options::default()
            };
            planned(&source, &options, options.length).expect("a plan")
        };
        let (one, two) = (of(1), of(2));
        let weights = source.base_headers().expect("headers");
        let bytes: u64 = weights.iter().map(|(_, header)| header.file_bytes()).sum();
        // what moves is f32, and the moments and the gradient are thrice that
        assert!(one.weights_bytes > bytes && one.moving_bytes > one.weights_bytes);
        assert_eq!(two.activations_bytes, 2 * one.activations_bytes);
        assert_eq!(two.moving_bytes, one.moving_bytes);
    }
}
