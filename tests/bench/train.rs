//! A training step of ours beside PyTorch's, in one run, on the same model, tokens per step and threads.
//!
//! `cargo bench --bench train` (`-- --help` for the settings). Each side is a process of its own, started anew in every
//! round, that loads the model in f32 and makes some steps; the first warms up and is not counted. Rounds alternate (ours,
//! theirs, ours, theirs …), a ratio is taken within a round, and the median of the rounds is what counts. The floor is
//! 4 FLOP per weight and token, forward and back through frozen weights, at the rate of plain products of these shapes.
//!
//! With `--device cuda:0`, in a build with the feature `cuda`, all sides compute in bf16 on one GPU, whose memory is what
//! is compared, and `--shapes` makes a model of a known one's shapes from random numbers, so that nothing is carried along:
//! `.ci/cuda cargo bench --features cuda --bench train -- --device cuda:0 --shapes phi-3-mini --batch 8 --length 2048 --check`

mod blas;
mod gpu;
mod machine;
mod process;
mod python;
mod random;
mod shapes;
mod spread;
mod start;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::sync::Mutex;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use svdhub::adapter::Mixture;
use svdhub::artifact::Artifact;
use svdhub::base::Base;
use svdhub::event::{Event, Observer, Silent};
use svdhub::format::{Origin, Rank};
use svdhub::model::{Decoder, ModelConfig, Trained};
use svdhub::plan::PlanOptions;
use svdhub::source::Source;
use svdhub::text::Window;
use svdhub::train::{self, Duration, Run};
use svdhub::{decompose, heap, linalg};

use blas::HARMFUL;
use machine::{load, loudly};
use process::output_and_peak;
use python::{beside, environment};
use random::SplitMix;
use shapes::{Drawn, Shapes};
use spread::Spread;
use start::benchmark;

/// A benchmark says what went wrong and stops: nobody handles its errors by kind.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Compare a training step of svdhub with PEFT, svd-training and full fine-tuning.
#[derive(Debug, Parser)]
struct Args {
    /// The model: a directory
    #[arg(
        long,
        value_name = "DIR",
        default_value = "../shared/models/smollm2-135m"
    )]
    model: PathBuf,
    /// Make a model of these shapes from random numbers instead
    #[arg(long, value_name = "NAME")]
    shapes: Option<Shapes>,
    /// Of these shapes, only so many layers
    #[arg(long, value_name = "N", requires = "shapes")]
    layers: Option<usize>,
    /// cpu, in f32, or cuda:N, in bf16
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: Place,
    #[arg(long, value_name = "F", default_value_t = 0.1)]
    rank_fraction: f64,
    /// Windows per step
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch: usize,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = 256)]
    length: usize,
    /// Steps that count, in each process
    #[arg(long, value_name = "N", default_value_t = 4)]
    steps: usize,
    /// Alternate this often
    #[arg(long, value_name = "R", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Run the peers in this Python instead of an environment made for them
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Write all numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with the wanted ratios, and fail if one is missed
    #[arg(long)]
    check: bool,
    /// Make some steps, as one side of a round: of the decomposition there, or of random numbers by the config there
    #[arg(long, hide = true, value_name = "DIR")]
    ours: Option<PathBuf>,
    /// Measure the floor alone, for the config there
    #[arg(long, hide = true, value_name = "DIR")]
    floor: Option<PathBuf>,
    /// What cargo passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// The text that ours trains on; the peers draw random tokens, which cost the same.
const TEXT: &str = "fixtures/eighty-train.txt";

fn main() -> ExitCode {
    benchmark("train", || {
        let args = Args::parse();
        match (&args.ours, &args.floor) {
            (Some(dir), _) => ours_alone(dir, &args).map(|()| true),
            (_, Some(dir)) => {
                println!("{}", floor(&args, dir)?);
                Ok(true)
            }
            _ => run(&args),
        }
    })
}

impl Args {
    fn device_name(&self) -> String {
        self.device
            .gpu
            .map_or("cpu".into(), |number| format!("cuda:{number}"))
    }

    fn open(&self) -> Result<Device> {
        Ok(match self.device.gpu {
            None => Device::Cpu,
            Some(number) => svdhub::device::open(number)?,
        })
    }
}

/// A peer, and what is wanted of us beside it.
struct Peer {
    name: &'static str,
    shown: &'static str,
    /// `None` where it would be another one again.
    on_cpu: Option<Wanted>,
    on_gpu: Wanted,
}

/// What is wanted of us beside a peer.
#[derive(Clone, Copy)]
struct Wanted {
    /// Our tokens per second over theirs, at least.
    speed: Option<f64>,
    /// Our peak memory over theirs, at most; of a GPU's, u and v come on top.
    memory: Option<f64>,
}

impl Wanted {
    const NOTHING: Self = Self {
        speed: None,
        memory: None,
    };

    const fn both(speed: f64, memory: f64) -> Self {
        Self {
            speed: Some(speed),
            memory: Some(memory),
        }
    }
}

const PEERS: [Peer; 5] = [
    Peer {
        name: "peft-lora-8",
        shown: "PyTorch + PEFT, LoRA rank 8",
        on_cpu: Some(Wanted::both(1.3, 0.5)),
        on_gpu: Wanted::both(1.0, 1.0),
    },
    Peer {
        name: "peft-lora-8-16-bits",
        shown: "the same, B and A in bf16",
        on_cpu: None,
        on_gpu: Wanted::both(1.0, 1.0),
    },
    Peer {
        name: "peft-lora-8-checkpointing",
        shown: "the same, with checkpointing",
        on_cpu: Some(Wanted::NOTHING),
        on_gpu: Wanted::NOTHING,
    },
    Peer {
        name: "svd-training",
        shown: "svd-training, Σ",
        on_cpu: Some(Wanted::both(1.8, 0.5)),
        on_gpu: Wanted {
            speed: Some(3.0),
            memory: None,
        },
    },
    Peer {
        name: "full",
        shown: "PyTorch, all weights",
        on_cpu: Some(Wanted::NOTHING),
        on_gpu: Wanted::NOTHING,
    },
];

/// Where all sides compute.
#[derive(Debug, Clone, Copy)]
struct Place {
    gpu: Option<usize>,
}

impl FromStr for Place {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self { gpu: None }),
            (_, Some(Ok(number))) => Ok(Self { gpu: Some(number) }),
            _ => Err("expected cpu or cuda:N".into()),
        }
    }
}

/// What a side says.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Answer {
    Steps(Steps),
    Failed { error: String },
}

/// What a side says of its steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Steps {
    seconds: Vec<f64>,
    trained: u64,
    /// Where several sides share a process.
    #[serde(default)]
    peak_bytes: Option<u64>,
    #[serde(default)]
    versions: Value,
}

/// One side over all rounds.
#[derive(Debug, Serialize)]
struct Side {
    name: String,
    trained: u64,
    tokens_per_s: Spread,
    peak_bytes: Spread,
    /// Ours over this one's.
    speed_ratio: Option<Spread>,
    memory_ratio: Option<Spread>,
}

/// Whether all that was asked for holds.
fn run(args: &Args) -> Result<bool> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let scratch = tempfile::tempdir_in(target)?;
    let model = match args.shapes {
        Some(shapes) => {
            let dir = scratch.path().join("model");
            shapes.write(args.layers, &dir)?;
            dir
        }
        None => args.model.clone(),
    };
    if !model.join("config.json").is_file() {
        return Err(format!("no model in {} (--model DIR)", model.display()).into());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{} × {} tokens · f = {} · {} · {} rounds of {} steps, alternating",
        args.batch,
        args.length,
        args.rank_fraction,
        match args.device.gpu {
            None => format!("f32 · {threads} threads"),
            Some(number) => format!("bf16 · {}", gpu::name(number)?),
        },
        args.rounds,
        args.steps
    );
    if let Some(line) = load(threads) {
        println!("{line}");
    }
    let python = environment(
        args.python.as_deref(),
        &target.with_file_name("bench-train-venv"),
        "requirements-train.txt",
    )?;
    let artifact = match args.shapes {
        Some(_) => model.clone(),
        None => decomposed(&model, args.rank_fraction, &scratch.path().join("svd"))?,
    };
    // in a process of its own, which gives back what it took
    let (floor, _) = output_and_peak(&mut alone(args, "--floor", &model)?)?;
    let floor: f64 = floor.trim().parse()?;

    // of a GPU the peers share a process, which tells the memory of each: a start takes longer than the steps
    let at_once: Vec<Vec<&Peer>> = match args.device.gpu {
        None => {
            let peers = PEERS.iter().filter(|peer| peer.on_cpu.is_some());
            peers.map(|peer| vec![peer]).collect()
        }
        Some(_) => vec![PEERS.iter().collect()],
    };
    let mut commands = vec![(vec!["svdhub, Σ"], alone(args, "--ours", &artifact)?)];
    for peers in &at_once {
        let shown = peers.iter().map(|peer| peer.shown).collect();
        commands.push((shown, theirs(peers, args, &model, &python, threads)?));
    }
    let mut measured: Vec<Vec<(Steps, u64)>> = vec![Vec::new(); 1 + PEERS.len()];
    for round in 1..=args.rounds {
        let mut at = 0;
        for (names, command) in &mut commands {
            eprintln!("round {round} of {}: {}", args.rounds, names.join("; "));
            let answered = match args.device.gpu {
                None => output_and_peak(command),
                Some(number) => gpu::output_and_peak(command, number),
            };
            let (output, peak) = match answered {
                Ok(answered) => answered,
                Err(error) => {
                    loudly(&format!("LEFT OUT, {}: {error}", names.join("; ")));
                    at += names.len();
                    continue;
                }
            };
            for (name, line) in names.iter().zip(output.lines()) {
                match serde_json::from_str(line)? {
                    Answer::Steps(steps) => {
                        let peak = steps.peak_bytes.unwrap_or(peak);
                        measured[at].push((steps, peak));
                    }
                    Answer::Failed { error } => loudly(&format!("LEFT OUT, {name}: {error}")),
                }
                at += 1;
            }
        }
    }
    let names: Vec<&str> = commands
        .iter()
        .flat_map(|(names, _)| names.clone())
        .collect();
    let sides = sides(args, &names, &measured);
    print!("{}", table(&sides, floor));
    if let Some((steps, _)) = measured.get(1).and_then(|rounds| rounds.first()) {
        println!("versions: {}", steps.versions);
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&sides)?)?;
    }
    let missed = missed(args, &sides);
    for line in &missed {
        loudly(line);
    }
    Ok(!args.check || missed.is_empty())
}

/// This program with a part of its work.
fn alone(args: &Args, part: &str, dir: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--bench").arg(part).arg(dir);
    // as `svdhub train` sets its own allocator: what a step frees, the next one asks for again
    let kept = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=67108864";
    command.env("GLIBC_TUNABLES", kept);
    command.env("CANDLE_BARRIER_POOL_SPIN_LIMIT", "100");
    command.args(["--batch", &args.batch.to_string()]);
    command.args(["--length", &args.length.to_string()]);
    command.args(["--steps", &args.steps.to_string()]);
    command.args(["--device", &args.device_name()]);
    command.args(["--rank-fraction", &args.rank_fraction.to_string()]);
    Ok(command)
}

fn theirs(
    peers: &[&Peer],
    args: &Args,
    model: &Path,
    python: &Path,
    threads: usize,
) -> Result<Command> {
    let mut command = Command::new(python);
    let names: Vec<&str> = peers.iter().map(|peer| peer.name).collect();
    command.arg(beside("train_peers.py")).arg(names.join(","));
    command.arg(std::fs::canonicalize(model)?);
    command.arg(args.rank_fraction.to_string());
    command.args([args.batch, args.length, args.steps, threads].map(|n| n.to_string()));
    command.arg(args.device_name());
    for name in HARMFUL {
        command.env_remove(name);
    }
    // transformers reads the model from its directory and asks nobody
    command.env("HF_HUB_OFFLINE", "1");
    Ok(command)
}

fn decomposed(model: &Path, rank_fraction: f64, to: &Path) -> Result<PathBuf> {
    let options = decompose::Options {
        plan: PlanOptions {
            rank: Rank::Fraction(rank_fraction),
            ..PlanOptions::default()
        },
        ..decompose::Options::default()
    };
    decompose::run(&Base::open(model, None, None)?, to, &options, &Silent)?;
    Ok(to.into())
}

/// The side of a round that is ours: prints [`Steps`].
fn ours_alone(dir: &Path, args: &Args) -> Result<()> {
    linalg::single_threaded_blas();
    // as the program does
    heap::keep_all();
    let options = train::Options {
        duration: Duration::Steps(args.steps + 1),
        batch: args.batch,
        length: args.length,
        device: args.open()?,
        ..train::Options::default()
    };
    let steps = match Artifact::open(dir, None) {
        Ok(artifact) => steps_of_decomposition(artifact, &options)?,
        Err(_) => steps_of_random(dir, args, &options)?,
    };
    println!("{}", serde_json::to_string(&steps)?);
    Ok(())
}

fn steps_of_decomposition(artifact: Artifact, options: &train::Options) -> Result<Steps> {
    let pin = Origin {
        repo: None,
        revision: None,
        content_sha256: artifact.content_sha256.clone(),
    };
    let source = Source::Decomposition {
        artifact,
        mixture: Mixture::default(),
    };
    let out = tempfile::tempdir()?;
    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join(TEXT);
    let watch = StepWatch::default();
    let facts = train::run(
        &source,
        Some(pin),
        &text.as_path().into(),
        &out.path().join("adapter"),
        options,
        &watch,
    )?;
    let times = watch.times.into_inner()?;
    let seconds = times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64());
    Ok(Steps {
        seconds: seconds.collect(),
        trained: facts.parameters,
        peak_bytes: None,
        versions: Value::Null,
    })
}

/// Steps of a model of random numbers on random tokens, in the dtype that its device computes best in.
fn steps_of_random(dir: &Path, args: &Args, options: &train::Options) -> Result<Steps> {
    let config = ModelConfig::read(dir)?;
    let trained = Trained {
        linear: Some(options.method),
        ..Trained::default()
    };
    let drawn = Drawn::new(&config, args.rank_fraction);
    let dtype = dtype_on(&options.device);
    let started = Instant::now();
    let decoder = Decoder::load(&config, &drawn, trained, &options.device, dtype)?;
    eprintln!("loaded in {:.1} s", started.elapsed().as_secs_f64());
    let mut run = Run::new(&decoder, options);
    let mut random = SplitMix(11);
    let mut seconds = Vec::new();
    for step in 0..=args.steps {
        let windows: Vec<Vec<u32>> = (0..options.batch)
            .map(|_| {
                (0..options.length)
                    .map(|_| (random.next() % config.vocabulary as u64) as u32)
                    .collect()
            })
            .collect();
        let windows: Vec<Window> = windows.iter().map(|ids| Window::from(&ids[..])).collect();
        let started = Instant::now();
        let loss = run.step(&windows, 1e-4, false)?;
        options.device.synchronize()?;
        seconds.push(started.elapsed().as_secs_f64());
        eprintln!(
            "step {step}: loss {loss}, {:.4} s",
            started.elapsed().as_secs_f64()
        );
    }
    Ok(Steps {
        seconds: seconds.split_off(1),
        trained: decoder
            .variables
            .values()
            .map(|v| v.elem_count() as u64)
            .sum(),
        peak_bytes: None,
        versions: Value::Null,
    })
}

fn dtype_on(device: &Device) -> DType {
    match device.is_cuda() {
        true => DType::BF16,
        false => DType::F32,
    }
}

/// Takes the time at the end of each step.
#[derive(Debug, Default)]
struct StepWatch {
    times: Mutex<Vec<Instant>>,
}

impl Observer for StepWatch {
    fn event(&self, event: &Event<'_>) {
        if let (Event::Stepped { .. }, Ok(mut times)) = (event, self.times.lock()) {
            times.push(Instant::now());
        }
    }
}

/// Tokens per second of nothing but the products of a step: x·Mᵀ and dy·M of every linear layer and the head.
fn floor(args: &Args, model: &Path) -> Result<f64> {
    let config = ModelConfig::read(model)?;
    let tokens = args.batch * args.length;
    let device = args.open()?;
    let dtype = dtype_on(&device);
    let mut shapes: Vec<(usize, usize)> = Vec::new();
    for (name, shape) in config.tensors("model.") {
        // a tied head multiplies by the embedding
        let counts = config.tied || !name.contains("embed");
        if let ([m, n], true) = (&shape[..], counts) {
            shapes.push((*m, *n));
        }
    }
    let mut seconds = Vec::new();
    for _ in 0..3 {
        let mut sum = 0.0;
        for &(m, n) in &shapes {
            // not ones: numbers that toggle no bits are multiplied faster
            let drawn = |rows| Tensor::randn(0f32, 1.0, (rows, n), &device)?.to_dtype(dtype);
            let (x, w) = (drawn(tokens)?, drawn(m)?);
            // several, so that a GPU is not waited for after each
            const TIMES: usize = 4;
            device.synchronize()?;
            let started = Instant::now();
            for _ in 0..TIMES {
                let y = x.matmul(&w.t()?)?;
                y.matmul(&w)?;
            }
            device.synchronize()?;
            sum += started.elapsed().as_secs_f64() / TIMES as f64;
        }
        seconds.push(sum);
    }
    Ok(tokens as f64 / Spread::of(&seconds).min)
}

fn sides(args: &Args, names: &[&str], measured: &[Vec<(Steps, u64)>]) -> Vec<Side> {
    let tokens = (args.batch * args.length) as f64;
    let per_step = |(steps, _): &(Steps, u64)| Spread::of(&steps.seconds).median;
    let times = |rounds: &[(Steps, u64)]| -> Vec<f64> { rounds.iter().map(per_step).collect() };
    let peaks = |rounds: &[(Steps, u64)]| -> Vec<f64> {
        rounds.iter().map(|(_, peak)| *peak as f64).collect()
    };
    let (our_times, our_peaks) = (times(&measured[0]), peaks(&measured[0]));
    let mut sides = Vec::new();
    for (at, (name, rounds)) in names.iter().zip(measured).enumerate() {
        let Some((first, _)) = rounds.first() else {
            continue;
        };
        let (times, peaks) = (times(rounds), peaks(rounds));
        let speeds: Vec<f64> = times.iter().map(|t| tokens / t).collect();
        // a side that failed on the way has no pair for each round
        let paired = at > 0 && times.len() == our_times.len();
        sides.push(Side {
            name: (*name).into(),
            trained: first.trained,
            tokens_per_s: Spread::of(&speeds),
            peak_bytes: Spread::of(&peaks),
            speed_ratio: paired.then(|| Spread::of_ratios(&times, &our_times)),
            memory_ratio: paired.then(|| Spread::of_ratios(&our_peaks, &peaks)),
        });
    }
    sides
}

fn table(sides: &[Side], floor: f64) -> String {
    let mut text = format!(
        "{:<30} {:>11} {:>9} {:>13} {:>9} {:>11} {:>11}\n",
        "", "trained", "tokens/s", "(min–max)", "peak GB", "ours/theirs", "memory"
    );
    let ratio = |ratio: &Option<Spread>| match ratio {
        Some(ratio) => format!("{:.2} ×", ratio.median),
        None => String::new(),
    };
    for side in sides {
        let speed = &side.tokens_per_s;
        text.push_str(&format!(
            "{:<30} {:>11} {:>9.0} {:>13} {:>9.2} {:>11} {:>11}\n",
            side.name,
            side.trained,
            speed.median,
            format!("{:.0}–{:.0}", speed.min, speed.max),
            side.peak_bytes.median / 1e9,
            ratio(&side.speed_ratio),
            ratio(&side.memory_ratio),
        ));
    }
    text.push_str(&format!(
        "{:<30} {:>11} {floor:>9.0}   the products of frozen weights alone\n",
        "floor", ""
    ));
    text
}

/// What was wanted and is not there.
fn missed(args: &Args, sides: &[Side]) -> Vec<String> {
    let mut missed = Vec::new();
    for peer in &PEERS {
        let wanted = match args.device.gpu {
            None => peer.on_cpu,
            Some(_) => Some(peer.on_gpu),
        };
        let Some(wanted) = wanted else { continue };
        let side = sides.iter().find(|side| side.name == peer.shown);
        let speed = side
            .and_then(|side| side.speed_ratio.as_ref())
            .map(|r| r.median);
        let memory = side
            .and_then(|side| side.memory_ratio.as_ref())
            .map(|r| r.median);
        if let Some(wanted) = wanted
            .speed
            .filter(|wanted| speed.is_none_or(|found| found < *wanted))
        {
            missed.push(format!(
                "{}: speed {speed:?}, wanted at least {wanted}",
                peer.shown
            ));
        }
        if let Some(wanted) = wanted
            .memory
            .filter(|wanted| memory.is_none_or(|found| found > *wanted))
        {
            missed.push(format!(
                "{}: memory {memory:?}, wanted at most {wanted}",
                peer.shown
            ));
        }
    }
    missed
}
