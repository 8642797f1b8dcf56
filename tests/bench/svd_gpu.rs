//! Decomposition on a GPU beside torch.svd_lowrank on the same one, on the shapes of Phi-3-mini's weights.
//!
//! `.ci/cuda cargo bench --features cuda --bench svd_gpu -- --check` (`-- --help` for the settings). Ours are several
//! matrices at a time, each from this process's memory and back to it, as `svdhub decompose` makes them; the peer's lie on
//! the GPU before and stay there, one after the other, which leaves it no waiting (and once more from memory to memory, told
//! beside it). Both are held against eigenvalues in f64.

#![allow(dead_code)] // of the modules that other benchmarks share

mod blas;
mod machine;
mod matrix;
mod peers;
mod process;
mod python;
mod spread;
mod start;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use clap::Parser;
use ndarray::Array2;
use serde::Deserialize;
use svdhub::linalg::{Algorithm, Backend, Route, Wanted, decompose_on, single_threaded_blas};

use machine::loudly;
use matrix::{Kind, Shape, Source};
use process::output_and_peak;
use python::{beside, environment};
use spread::Spread;
use start::benchmark;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Compare a decomposition on a GPU with torch.svd_lowrank there.
#[derive(Debug, Parser)]
struct Args {
    #[arg(long, value_name = "N", default_value_t = 0)]
    gpu: usize,
    #[arg(long, value_name = "F", default_value_t = 0.1)]
    rank_fraction: f64,
    /// Matrices at a time
    #[arg(long, value_name = "N", default_value_t = thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Decompose each this often
    #[arg(long, value_name = "N", default_value_t = 48)]
    copies: usize,
    /// These kinds of matrix
    #[arg(long, value_enum, default_values_t = [Kind::Llm])]
    kind: Vec<Kind>,
    /// These shapes, Phi-3-mini's unless said otherwise
    #[arg(long, value_name = "MxN")]
    shape: Vec<Shape>,
    /// Run the peer in this Python instead of an environment made for it
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Compare with the wanted ratio and error, and fail if one is missed
    #[arg(long)]
    check: bool,
    /// What cargo passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// Ours over theirs, at most, and the largest error of a value.
const WANTED: (f64, f64) = (0.5, 1e-4);

/// What the peer says of a matrix.
#[derive(Debug, Deserialize)]
struct Peer {
    /// On the GPU before and after.
    seconds: Vec<f64>,
    seconds_from_memory: Vec<f64>,
    sigma: Vec<f64>,
    /// In f64.
    reference: Vec<f64>,
}

fn main() -> ExitCode {
    benchmark("svd_gpu", || run(&Args::parse()))
}

fn run(args: &Args) -> Result<bool> {
    single_threaded_blas();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let python = environment(
        args.python.as_deref(),
        &target.with_file_name("bench-train-venv"),
        "requirements-train.txt",
    )?;
    let phi = [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192)];
    let shapes: Vec<Shape> = match args.shape.is_empty() {
        true => phi.map(|(m, n)| Shape { m, n }).into(),
        false => args.shape.clone(),
    };
    let sources: Vec<Source> = (args.kind.iter())
        .flat_map(|&kind| shapes.iter().map(move |&shape| Source::Made(kind, shape)))
        .collect();
    let folder = tempfile::tempdir_in(target)?;
    thread::scope(|scope| {
        for source in &sources {
            scope.spawn(|| source.read(folder.path()).map(drop).ok());
        }
    });
    let mut command = Command::new(&python);
    command.arg(beside("svd_gpu_peer.py"));
    command.args([args.gpu.to_string(), args.rank_fraction.to_string()]);
    for source in &sources {
        command.arg(source.read(folder.path())?.path);
    }
    let (told, _) = output_and_peak(&mut command)?;

    let device = Backend::from(svdhub::device::open(args.gpu)?);
    println!(
        "f = {}, {} matrices at a time",
        args.rank_fraction, args.threads
    );
    println!(
        "{:<20} {:>9} {:>9} {:>9} {:>9} {:>10} {:>10}   route",
        "", "ours ms", "torch ms", "ratio", "w/ copies", "our error", "torch's"
    );
    let (mut ours_all, mut theirs_all, mut copied_all, mut right) = (0.0, 0.0, 0.0, true);
    if told.lines().count() != sources.len() {
        return Err("the peer did not answer for every matrix".into());
    }
    for (source, line) in sources.iter().zip(told.lines()) {
        let peer: Peer = serde_json::from_str(line)?;
        let matrix = source.read(folder.path())?.values;
        let (ours, sigma, route) = ours(args, &device, &matrix)?;
        let theirs = Spread::of(&peer.seconds).median;
        let copied = Spread::of(&peer.seconds_from_memory).median;
        let error = |sigma: &mut dyn Iterator<Item = f64>| {
            let off = sigma
                .zip(&peer.reference)
                .map(|(x, exact)| (x / exact - 1.0).abs());
            // a NaN is an error without a bound
            let bounded = off.map(|x| if x.is_nan() { f64::INFINITY } else { x });
            bounded.fold(0.0, f64::max)
        };
        let our_error = error(&mut sigma.iter().map(|&x| f64::from(x)));
        println!(
            "{:<20} {:>9.1} {:>9.1} {:>9.2} {:>9.1} {:>10.1e} {:>10.1e}   {route:?}",
            source.name(),
            1e3 * ours,
            1e3 * theirs,
            ours / theirs,
            1e3 * copied,
            our_error,
            error(&mut peer.sigma.iter().copied()),
        );
        ours_all += ours;
        theirs_all += theirs;
        copied_all += copied;
        right &= our_error <= WANTED.1;
    }
    let ratio = ours_all / theirs_all;
    println!(
        "all: {ratio:.2} × the time of torch.svd_lowrank, {:.2} × that from memory to memory",
        ours_all / copied_all
    );
    if ratio > WANTED.0 {
        loudly(&format!("{ratio:.2}, wanted at most {}", WANTED.0));
    }
    if !right {
        loudly(&format!("an error above {:.0e}", WANTED.1));
    }
    Ok(!args.check || ratio <= WANTED.0 && right)
}

/// Seconds per matrix where several are under way, σ, and the route.
fn ours(args: &Args, device: &Backend, matrix: &Array2<f32>) -> Result<(f64, Vec<f32>, Route)> {
    let q = (args.rank_fraction * matrix.nrows().min(matrix.ncols()) as f64) as usize;
    let one = || {
        let algorithm = Algorithm::default();
        decompose_on(device, "x", matrix.view(), Wanted::Triplets(q), &algorithm)
    };
    let first = one()?;
    if first.sigma.len() != q {
        return Err(format!("{} values of {q}", first.sigma.len()).into());
    }
    let failed = Mutex::new(None);
    let decompose = |count: usize| {
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..args.threads {
                scope.spawn(|| {
                    while next.fetch_add(1, Ordering::Relaxed) < count {
                        if let (Err(error), Ok(mut failed)) = (one(), failed.lock()) {
                            *failed = Some(error);
                        }
                    }
                });
            }
        });
    };
    // a queue of the GPU for each, with its kernels, which a model of hundreds of matrices makes once
    decompose(args.threads);
    let started = Instant::now();
    decompose(args.copies);
    let seconds = started.elapsed().as_secs_f64() / args.copies as f64;
    if let Some(error) = failed.into_inner()? {
        return Err(error.into());
    }
    Ok((seconds, first.sigma.to_vec(), first.route))
}
