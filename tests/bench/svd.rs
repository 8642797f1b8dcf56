//! Our decomposition beside the Python peers', in one run, on the same numbers and threads.
//!
//! `cargo bench --bench svd` (`-- --help` for the filters). What is computed is shared out as each side does it best:
//! the peers get all threads for one matrix; ours takes one matrix per thread with a single-threaded BLAS, and its time per
//! matrix is the wall time over their number. Rounds alternate (ours, theirs, ours, theirs …), so that whatever else the
//! machine does hits both; a ratio is taken within a round, and the median of the rounds is what counts.

mod blas;
mod machine;
mod matrix;
mod measure;
mod model;
mod peers;
mod python;
mod spread;
mod start;
mod table;
mod targets;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use ndarray::{Array2, ArrayView2};
use serde::Serialize;
use svdhub::linalg::{self, Algorithm, Wanted};

use machine::{load, loudly};
use matrix::{Kind, Matrix, Shape};
use measure::Accuracy;
use peers::{Peer, Peers};
use spread::Spread;
use start::benchmark;

/// A benchmark says what went wrong and stops: nobody handles its errors by kind.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Our fast mode.
fn fast() -> Option<Algorithm> {
    Some(Algorithm {
        fast: true,
        ..Algorithm::default()
    })
}

/// Compare svdhub's decomposition with torch, scikit-learn, scipy and svd-training.
#[derive(Debug, Parser)]
struct Args {
    /// Run only the cases whose name contains one of these (`llm-3072x3072-f0.1`, `model-f0.2`)
    filters: Vec<String>,
    /// Run the peers in this Python instead of an environment made for them
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Take real weights from DIR/smollm2-135m, or from DIR itself if it is a model
    #[arg(long, value_name = "DIR", default_value = "../shared/models")]
    models: PathBuf,
    /// Alternate this often
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Give each side this many threads
    #[arg(long, value_name = "N", default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Run the small shapes only, and no whole model
    #[arg(long)]
    quick: bool,
    /// Run these shapes only, and no whole model (3072x3072)
    #[arg(long, value_name = "MxN")]
    shape: Vec<Shape>,
    /// Run these rank fractions only
    #[arg(long = "f", value_name = "F", value_parser = fraction)]
    fractions: Vec<f64>,
    /// Run these kinds of matrix only
    #[arg(long, value_enum)]
    kind: Vec<Kind>,
    /// Write all numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with the wanted ratios, and fail if one is missed
    #[arg(long)]
    check: bool,
    /// What cargo passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn fraction(text: &str) -> std::result::Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|f| *f > 0.0 && *f <= 1.0);
    value.ok_or_else(|| "expected a number above 0, at most 1".into())
}

/// OpenMP's threads wait for more work on a core of their own for 200 ms: ours begin after that.
const SPINNING: Duration = Duration::from_millis(300);

const FRACTIONS: [f64; 4] = [0.1, 0.2, 0.5, 1.0];

/// Everything a run found.
#[derive(Debug, Serialize)]
struct Findings {
    threads: usize,
    rounds: u32,
    environment: Vec<String>,
    matrices: Vec<Case>,
    models: Vec<model::Case>,
    verdicts: Vec<targets::Verdict>,
}

/// One matrix at one rank fraction.
#[derive(Debug, Serialize)]
struct Case {
    name: String,
    shape: [usize; 2],
    f: f64,
    q: usize,
    /// σ₁/σ_q
    kappa: f64,
    reference: String,
    /// Of one product M·Mᵀ, per matrix, made as ours are: the unit of the floor.
    gemm_seconds: Spread,
    /// GEMMs that the Gram route cannot do without in f32.
    gemms_needed: f64,
    rows: Vec<Row>,
}

/// Who computed, and how it went.
#[derive(Debug, Serialize)]
struct Row {
    who: Who,
    /// The route of ours; how often, of theirs.
    remark: String,
    /// Per matrix.
    seconds: Spread,
    /// Time of ours over time of theirs; of our fast mode over its peer's in `fast_ratio`.
    ratio: Option<Spread>,
    fast_ratio: Option<Spread>,
    accuracy: Accuracy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Who {
    Ours,
    OursFast,
    #[serde(untagged)]
    Theirs(Peer),
}

impl std::fmt::Display for Who {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ours => formatter.pad("svdhub"),
            Self::OursFast => formatter.pad("svdhub, fast"),
            Self::Theirs(peer) => formatter.pad(peer.name()),
        }
    }
}

impl Case {
    fn row(&self, who: Who) -> Option<&Row> {
        self.rows.iter().find(|row| row.who == who)
    }
}

fn main() -> ExitCode {
    benchmark("svd", || run(&Args::parse()))
}

/// Whether all that was asked for holds.
fn run(args: &Args) -> Result<bool> {
    // as the verbs do
    linalg::single_threaded_blas();
    svdhub::heap::keep_some();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = target.join("bench");
    std::fs::create_dir_all(&folder)?;

    let mut peers = match Peers::start(args.python.as_deref(), target, args.threads) {
        Ok(peers) => Some(peers),
        Err(error) => {
            loudly(&format!("NO PEERS, ours runs alone: {error}"));
            None
        }
    };
    let environment = environment(args, peers.as_ref());
    for line in &environment {
        println!("{line}");
    }

    let mut findings = Findings {
        threads: args.threads,
        rounds: args.rounds,
        environment,
        matrices: Vec::new(),
        models: Vec::new(),
        verdicts: Vec::new(),
    };
    for planned in plan(args)? {
        let matrix = planned.matrix.read(&folder)?;
        let cases = compare(&matrix, &planned.fractions, peers.as_mut(), args, &folder)?;
        print!("\n{}", table::matrix(&cases));
        findings.matrices.extend(cases);
    }
    if args.shape.is_empty() && args.kind.is_empty() && !args.quick {
        findings.models = whole_models(args, peers.as_mut(), target)?;
    }
    findings.verdicts = targets::judge(&findings.matrices, &findings.models);
    if !findings.verdicts.is_empty() {
        print!("\n{}", table::verdicts(&findings.verdicts));
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&findings)?)?;
    }
    if !args.check {
        return Ok(true);
    }
    let missed = findings.verdicts.iter().filter(|v| !v.met).count();
    match (missed, findings.verdicts.len()) {
        (_, 0) => eprintln!("--check: none of the cases that ran has a wanted ratio"),
        (0, all) => eprintln!("--check: all {all} wanted ratios hold"),
        (missed, all) => eprintln!("--check: {missed} of {all} wanted ratios missed"),
    }
    Ok(missed == 0 && !findings.verdicts.is_empty())
}

/// What ran, and under which circumstances.
fn environment(args: &Args, peers: Option<&Peers>) -> Vec<String> {
    let mut lines = vec![format!(
        "{} threads · {} rounds, alternating · ours: {} matrices at a time, one BLAS thread each, time per matrix = wall/{}",
        args.threads, args.rounds, args.threads, args.threads
    )];
    if let Some(peers) = peers {
        lines.push(format!(
            "theirs: one matrix on {} threads · {}",
            args.threads,
            peers.versions()
        ));
        lines.push(format!("their BLAS: {}", peers.blas()));
    }
    let set: Vec<String> = blas::HARMFUL
        .iter()
        .filter_map(|name| {
            let value = std::env::var(name).ok()?;
            Some(format!("{name}={value}"))
        })
        .collect();
    if !set.is_empty() {
        lines.push(format!(
            "{}: set for ours, removed for theirs",
            set.join(" ")
        ));
    }
    lines.push(
        "left = ‖M − uᵀσv‖ over the least possible (over ‖M‖ where nothing is left out) · orth = largest element of \
         wwᵀ − I · GEMMs = seconds over those of one M·Mᵀ · needed = the Gram route's work in f32 without the eigenvectors \
         of its tridiagonal matrix"
            .into(),
    );
    lines.extend(load(args.threads));
    lines
}

/// A matrix to come, and the rank fractions wanted of it.
struct Planned {
    matrix: matrix::Source,
    fractions: Vec<f64>,
}

fn plan(args: &Args) -> Result<Vec<Planned>> {
    const SHAPES: [Shape; 4] = [
        Shape { m: 576, n: 1536 },
        Shape { m: 1024, n: 1024 },
        Shape { m: 2048, n: 8192 },
        Shape { m: 3072, n: 3072 },
    ];
    const SMALL_SIDE: usize = 1536;
    let fractions: &[f64] = if args.fractions.is_empty() {
        &FRACTIONS
    } else {
        &args.fractions
    };
    let shapes: Vec<Shape> = if args.shape.is_empty() {
        let small = |s: &Shape| !args.quick || s.m.max(s.n) <= SMALL_SIDE;
        SHAPES.into_iter().filter(small).collect()
    } else {
        args.shape.clone()
    };
    let kinds: &[Kind] = if args.kind.is_empty() {
        &[Kind::Llm, Kind::Outlier, Kind::Gauss]
    } else {
        &args.kind
    };
    let mut sources = Vec::new();
    for &shape in &shapes {
        sources.extend(kinds.iter().map(|&kind| matrix::Source::Made(kind, shape)));
    }
    if args.kind.is_empty() && args.shape.is_empty() {
        match model::find(&args.models) {
            Some(dir) => sources.extend(matrix::Source::real(&dir)?),
            None => loudly(&format!(
                "NO REAL WEIGHTS, neither their matrices nor the whole model are compared: no {} in {} (--models DIR)",
                model::NAME,
                args.models.display()
            )),
        }
    }
    let planned = sources.into_iter().map(|matrix| {
        let wanted = |f: f64| {
            let sensible = f < 1.0 || matrix.shape().is_square();
            sensible && args.selects(&case_name(&matrix.name(), f))
        };
        let fractions = fractions.iter().copied().filter(|&f| wanted(f)).collect();
        Planned { matrix, fractions }
    });
    Ok(planned
        .filter(|planned| !planned.fractions.is_empty())
        .collect())
}

impl Args {
    fn selects(&self, case: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| case.contains(filter))
    }
}

fn case_name(of: &str, f: f64) -> String {
    // with its point: 1.0, not 1
    format!("{of}-f{f:?}")
}

/// Seconds until `work` is done on every copy, each on a thread of its own, and what came of the first.
fn at_once<R: Send>(
    copies: &[Array2<f32>],
    work: impl Fn(ArrayView2<f32>) -> svdhub::Result<R> + Sync,
) -> Result<(f64, R)> {
    let started = Instant::now();
    let results: Vec<svdhub::Result<R>> = std::thread::scope(|scope| {
        let running: Vec<_> = copies
            .iter()
            .map(|copy| scope.spawn(|| work(copy.view())))
            .collect();
        running
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    });
    let seconds = started.elapsed().as_secs_f64();
    let mut first = None;
    for result in results {
        let result = result?;
        first.get_or_insert(result);
    }
    Ok((seconds, first.ok_or("no matrix to work on")?))
}

/// One matrix at all its rank fractions, against everybody.
fn compare(
    matrix: &Matrix,
    fractions: &[f64],
    mut peers: Option<&mut Peers>,
    args: &Args,
    folder: &Path,
) -> Result<Vec<Case>> {
    let (m, n) = matrix.values.dim();
    let short = m.min(n);
    let rank = |f: f64| ((f * short as f64).floor() as usize).max(1);
    let q_max = fractions.iter().map(|&f| rank(f)).max().unwrap_or(short);
    if let Some(peers) = peers.as_deref_mut() {
        peers.load(&matrix.path)?;
    }
    let reference = matrix.reference(q_max, peers.as_deref_mut())?;
    // each worker its own numbers, as with a model's matrices: no cache serves two of them
    let copies = vec![matrix.values.clone(); args.threads.max(1)];
    let per_matrix = |wall: f64| wall / copies.len() as f64;

    // every singular value, whatever is kept: once per matrix, for the minute that it takes
    let mut full = Vec::new();
    for peer in [Peer::TorchFull, Peer::Gesdd] {
        if let Some(peers) = peers.as_deref_mut().filter(|peers| peers.has(peer)) {
            eprintln!("{}: {}", matrix.name, peer.name());
            full.extend(peers.run(peer, short).map(|spent| (peer, spent)));
        }
    }

    let mut cases = Vec::new();
    for &f in fractions {
        let q = rank(f);
        let name = case_name(&matrix.name, f);
        let ours = |algorithm: &Algorithm| {
            at_once(&copies, |copy| {
                linalg::decompose(&name, copy, Wanted::Triplets(q), algorithm)
            })
        };
        let (mut gemm, mut seconds, mut fast_seconds) = (Vec::new(), Vec::new(), Vec::new());
        let (mut svd, mut fast_svd) = (None, None);
        let contenders: Vec<Peer> = [Peer::Lowrank, Peer::Randomized]
            .into_iter()
            .filter(|&peer| peers.as_deref().is_some_and(|peers| peers.has(peer)))
            .collect();
        let mut theirs = vec![Vec::new(); contenders.len()];
        for round in 1..=args.rounds {
            eprintln!("{name}: round {round} of {}", args.rounds);
            std::thread::sleep(SPINNING);
            let (wall, _) = at_once(&copies, |copy| Ok(linalg::gemm(copy, m > n, copy, m <= n)))?;
            gemm.push(per_matrix(wall));
            let (wall, found) = ours(&Algorithm::default())?;
            seconds.push(per_matrix(wall));
            svd.get_or_insert(found);
            for (peer, times) in contenders.iter().zip(&mut theirs) {
                if let Some(peers) = peers.as_deref_mut().filter(|peers| peers.has(*peer)) {
                    times.extend(peers.run(*peer, q));
                }
            }
            if let Some(algorithm) = fast() {
                std::thread::sleep(SPINNING);
                let (wall, found) = ours(&algorithm)?;
                fast_seconds.push(per_matrix(wall));
                fast_svd.get_or_insert(found);
            }
        }

        let mut rows = Vec::new();
        for (who, seconds, svd) in [
            (Who::Ours, &seconds, svd),
            (Who::OursFast, &fast_seconds, fast_svd),
        ] {
            if let Some(svd) = svd {
                rows.push(Row {
                    who,
                    remark: serde_json::to_value(svd.route)?
                        .as_str()
                        .unwrap_or_default()
                        .into(),
                    seconds: Spread::of(seconds),
                    ratio: None,
                    fast_ratio: None,
                    accuracy: measure::accuracy(
                        &matrix.values,
                        &svd.u,
                        &svd.sigma,
                        &svd.v,
                        &reference,
                    ),
                });
            }
        }
        let once = full.iter().map(|(peer, spent)| (*peer, vec![*spent]));
        for (peer, spent) in contenders.iter().copied().zip(theirs).chain(once) {
            let Some(peers) = peers.as_deref_mut().filter(|peers| peers.has(peer)) else {
                continue;
            };
            let factors = peers.factors(peer, q, folder)?;
            rows.push(Row {
                who: Who::Theirs(peer),
                remark: if peer.is_full() { "once" } else { "" }.into(),
                seconds: Spread::of(&spent),
                ratio: Some(Spread::of_ratios(&seconds, &spent)),
                fast_ratio: (!fast_seconds.is_empty())
                    .then(|| Spread::of_ratios(&fast_seconds, &spent)),
                accuracy: measure::accuracy(
                    &matrix.values,
                    &factors.u,
                    &factors.sigma,
                    &factors.v,
                    &reference,
                ),
            });
        }
        cases.push(Case {
            name,
            shape: [m, n],
            f,
            q,
            kappa: reference.sigma[0] / reference.sigma[q - 1],
            reference: reference.how.clone(),
            gemm_seconds: Spread::of(&gemm),
            gemms_needed: gemms_needed(m, n, q),
            rows,
        });
    }
    Ok(cases)
}

/// The work of the Gram route in products M·Mᵀ (2·s²·l operations, s the short side, l the long one).
///
/// Half a product for the Gram matrix, 4/3·s³ for its tridiagonal form, 2·q·s² to bring q vectors back from there, 2·q·s·l
/// for the long side and 2·q²·l to polish it. The eigenvectors of the tridiagonal matrix are not counted: what they cost
/// depends on the numbers.
fn gemms_needed(m: usize, n: usize, q: usize) -> f64 {
    let (s, l, q) = (m.min(n) as f64, m.max(n) as f64, q as f64);
    let (a, f) = (s / l, q / s);
    0.5 + 2.0 / 3.0 * a + f * a + f + f * f
}

fn whole_models(
    args: &Args,
    mut peers: Option<&mut Peers>,
    target: &Path,
) -> Result<Vec<model::Case>> {
    // that there is no model was said when the matrices were planned
    let Some(dir) = model::find(&args.models) else {
        return Ok(Vec::new());
    };
    // keeping all of every matrix is nobody's plan for a whole model
    let fractions = FRACTIONS.into_iter().filter(|&f| {
        let asked = args.fractions.is_empty() || args.fractions.contains(&f);
        f < 1.0 && asked && args.selects(&case_name("model", f))
    });
    let mut cases = Vec::new();
    for f in fractions {
        cases.push(model::compare(
            &dir,
            f,
            peers.as_deref_mut(),
            args.rounds,
            args.threads,
            target,
        )?);
    }
    if !cases.is_empty() {
        print!("\n{}", table::models(&cases));
    }
    Ok(cases)
}
