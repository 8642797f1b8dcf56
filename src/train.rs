//! `train`: moves Σ, or what another method moves, on next-token loss.

mod kept;
pub mod optimizer;
mod room;
mod run;
mod state;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::base::Standing;
use crate::error::{Error, IoContext, Result};
use crate::event::{Event, Observer, Stage, Unit};
use crate::format::Origin;
use crate::model::{Lora, Method, ModelConfig, Parametrisation, Trained};
use crate::parallel::{Alone, Group, refuse_uneven};
use crate::report;
use crate::source::{Source, load};
use crate::text::{Corpus, Data, Dataset, LossOn, Window, shuffled};
use crate::workspace::{Claim, Workspace, check_free_space};
use kept::Kept;
use optimizer::Schedule;
use room::{refuse_too_large, with_plan};
use run::NOTHING_TO_DO;
pub use run::Run;
use state::STATE_FILE;

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
    /// Windows computed at a time by each process, if not all of its share; their gradients are added up.
    pub micro_batch: Option<usize>,
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
    /// Of data with answers.
    pub loss_on: LossOn,
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
            micro_batch: None,
            length: 256,
            learning_rate: Method::default().learning_rate(),
            schedule: Schedule::default(),
            warmup: 0,
            weight_decay: 0.0,
            method: Method::default(),
            norms: false,
            embeddings: false,
            seed: 0,
            loss_on: LossOn::default(),
            recompute: false,
            resume: false,
            save_every: 50,
            device: Device::Cpu,
            group: Arc::new(Alone),
        }
    }
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<Dataset>,
    pub data_tokens: usize,
    /// Those of answers, where the data have any: the loss is theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learnt_tokens: Option<usize>,
    pub steps: usize,
    pub batch: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
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
    data: &Data,
    out: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    refuse_uneven(options.batch, &*options.group)?;
    let kept = Kept::of(source, pin, options, observer)?;
    let (config, corpus) = read(source, data, options, observer)?;
    corpus.warn(&config, observer);
    corpus.note_rest(observer);
    let windows = corpus.full_windows();
    // all are as long as asked for, unless there is less text than that
    let length = windows[0].ids.len();
    refuse_too_large(source, options, length)?;
    if windows.len() < options.batch {
        observer.warn(format!(
            "{} has {} windows for a batch of {}: each step takes some of them more than once",
            data.name,
            windows.len(),
            options.batch
        ));
    }
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
            return Err(Error::UnfinishedTraining { path: out.into() });
        }
        Claim::Interrupted | Claim::Fresh => {}
    }

    let decoder = load(source, trained(options), &options.device, observer)
        .map_err(|error| with_plan(error, source, options))?;
    let mut run = Run::new(&decoder, options);
    run.resume(&workspace, observer)?;
    run.agree()?;
    let parameters = decoder.variables.values().map(|v| v.elem_count() as u64);
    let parameters: u64 = parameters.sum();
    // of the state, values and two moments, the old one is there until the new one is whole
    let state_bytes = 3 * NUMBER_BYTES * parameters;
    let saves = steps > options.save_every;
    let needed = if saves {
        2 * state_bytes
    } else {
        NUMBER_BYTES * parameters
    };
    let there = std::fs::metadata(workspace.state(STATE_FILE)).map_or(0, |state| state.len());
    check_free_space(out, needed.saturating_sub(there))?;
    let (started, before) = (Instant::now(), run.seconds);
    let mut saved = Saved::now();
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
        tokens += batch.iter().map(Window::tokens).sum::<usize>();
        observer.event(&Event::Stepped {
            step: step + 1,
            steps,
            loss,
            learning_rate,
            tokens_per_s: tokens as f64 / started.elapsed().as_secs_f64(),
        });
        observer.advance(Stage::Train, 1, "");
        run.seconds = before + started.elapsed().as_secs_f64();
        let is_due = (step + 1) % options.save_every.max(1) == 0 || saved.is_long_ago();
        // the last one too, where it took long to come there: a full disk may stand before the adapter
        let has_room = saves || check_free_space(out, state_bytes).is_ok();
        if is_due && has_room && (step + 1 < steps || saved.is_long_ago()) {
            saved = Saved::by(|| run.save(&workspace))?;
        }
    }
    observer.finish(Stage::Train);
    let seconds = run.seconds;
    // an earlier build kept no time of its steps
    let timed = if before > 0.0 { steps } else { steps - first };

    run.refuse_overflown()?;
    let (weights, adapter_sha256, sums) = kept.save(&run, out, options, observer)?;
    let facts = Facts {
        method: options.method.name().into(),
        parametrisation: match options.method {
            Method::Sigma(parametrisation) => Some(parametrisation),
            _ => None,
        },
        rank: match options.method {
            Method::Lora(Lora { rank, .. }) => Some(rank),
            Method::LoraXs { rank } => Some(rank.min(kept.largest_rank())),
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
        parameters,
        data: data.name.clone(),
        dataset: data.dataset.clone(),
        data_tokens: corpus.tokens(),
        learnt_tokens: corpus.learnt(),
        steps,
        batch: options.batch,
        micro_batch: options.micro_batch,
        length,
        learning_rate: options.learning_rate,
        schedule: options.schedule,
        warmup: options.warmup,
        weight_decay: options.weight_decay,
        seed: options.seed,
        recompute: options.recompute,
        device: device_name(&options.device),
        processes: options.group.size(),
        losses: run.losses.clone(),
        tokens_per_s: timed as f64 * tokens_a_step(&windows, options) / seconds.max(1e-9),
        seconds,
        adapter_sha256,
        adapter_bytes: std::fs::metadata(&weights).context("read", &weights)?.len(),
        sums,
    };
    report::add(out, source.inherited()?, "train", &facts)?;
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
    data: &Data,
    options: &Options,
    observer: &dyn Observer,
) -> Result<()> {
    let (_, corpus) = read(source, data, options, observer)?;
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

/// What the model is, and the data as it reads them.
fn read(
    source: &Source,
    data: &Data,
    options: &Options,
    observer: &dyn Observer,
) -> Result<(ModelConfig, Corpus)> {
    let config = source.config()?;
    let corpus = Corpus::read(
        data,
        source.dir(),
        &config,
        options.length,
        options.loss_on,
        observer,
    )?;
    Ok((config, corpus))
}

/// f32
const NUMBER_BYTES: u64 = 4;

/// When the state was saved last, and how long that took.
struct Saved {
    at: Instant,
    took: std::time::Duration,
}

impl Saved {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            took: std::time::Duration::ZERO,
        }
    }

    fn by(save: impl FnOnce() -> Result<()>) -> Result<Self> {
        let began = Instant::now();
        save()?;
        Ok(Self {
            took: began.elapsed(),
            ..Self::now()
        })
    }

    /// Whether a kill would cost more than a minute, and saving no more than a twentieth of the time.
    fn is_long_ago(&self) -> bool {
        const MINUTE: std::time::Duration = std::time::Duration::from_secs(60);
        self.at.elapsed() > MINUTE.max(20 * self.took)
    }
}

/// On average.
fn tokens_a_step(windows: &[Window], options: &Options) -> f64 {
    let tokens: usize = windows.iter().map(Window::tokens).sum();
    tokens as f64 / windows.len() as f64 * options.batch as f64
}

fn steps(windows: &[Window], options: &Options) -> usize {
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
    let (what, content) = match kept {
        Kept::Adapter { artifact, .. } => ("decomposition", artifact.content_sha256.clone()),
        Kept::Lora { base, .. } => ("base", format!("{:?}", base.sha256)),
    };
    let mut settings = BTreeMap::from([
        (what.into(), content),
        ("method".into(), format!("{:?}", options.method)),
        ("data".into(), corpus.sha256()),
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
    ]);
    if let Some(windows) = options.micro_batch {
        settings.insert("micro-batch".into(), windows.to_string());
    }
    if corpus.learnt().is_some() {
        let loss_on = format!("{:?}", options.loss_on).to_lowercase();
        settings.insert("loss on".into(), loss_on);
    }
    settings
}

/// The windows of one step: each epoch is a new shuffle, and a step depends on nothing but its number.
fn batch<'a>(windows: &[Window<'a>], step: usize, options: &Options) -> Vec<Window<'a>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration as Time;

    #[test]
    fn a_kill_costs_a_minute_and_saving_a_twentieth_at_most() {
        let ago = |seconds, took| {
            let at = Instant::now().checked_sub(Time::from_secs(seconds));
            let saved = Saved {
                at: at.expect("this machine has run so long"),
                took: Time::from_secs(took),
            };
            saved.is_long_ago()
        };
        assert!(!Saved::now().is_long_ago());
        assert!(!ago(50, 0) && ago(61, 0) && ago(61, 3));
        assert!(!ago(61, 4) && ago(81, 4));
    }
}
