//! A whole model: svd-training's create_from_model beside our `decompose`.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use serde::Serialize;
use svdhub::base::Base;
use svdhub::decompose::{self, Options};
use svdhub::event::{Event, Observer, Stage};
use svdhub::format::Rank;
use svdhub::linalg::Algorithm;
use svdhub::plan::PlanOptions;

use crate::peers::Peers;
use crate::spread::Spread;
use crate::{Result, case_name, fast};

/// The model that the wanted ratios are about.
pub const NAME: &str = "smollm2-135m";

/// One model at one rank fraction.
#[derive(Debug, Serialize)]
pub struct Case {
    pub name: String,
    pub f: f64,
    pub linear_layers: usize,
    /// Reading, factors, M′ with the proof that it restores M, and one file per matrix: all but hashing and the final join.
    pub ours: Spread,
    /// The same with the hashing of the base and the joined files of the artifact.
    pub ours_total: Spread,
    pub ours_fast: Option<Spread>,
    pub theirs: Option<Theirs>,
}

#[derive(Debug, Serialize)]
pub struct Theirs {
    pub how: String,
    pub linear_layers: usize,
    /// Factors and M′ in memory, nothing written.
    pub total: Spread,
    /// The same for the matrices that ours decomposes: without the head, where it is tied to the embedding.
    pub same_matrices: Spread,
    /// Ours over theirs, same matrices.
    pub ratio: Spread,
    /// Ours over theirs with everything svd-training does.
    pub ratio_of_total: Spread,
    pub fast_ratio: Option<Spread>,
}

/// The model in `models`, which may be the model itself.
pub fn find(models: &Path) -> Option<PathBuf> {
    let candidates = [models.join(NAME), models.to_path_buf()];
    candidates
        .into_iter()
        .find(|dir| dir.join("config.json").is_file())
}

pub fn compare(
    dir: &Path,
    f: f64,
    mut peers: Option<&mut Peers>,
    rounds: u32,
    threads: usize,
    scratch: &Path,
) -> Result<Case> {
    let name = case_name("model", f);
    let dir = std::fs::canonicalize(dir)?;
    let (mut stage, mut total, mut quick) = (Vec::new(), Vec::new(), Vec::new());
    let (mut theirs_total, mut theirs_same) = (Vec::new(), Vec::new());
    let (mut linear_layers, mut last) = (0, None);
    for round in 1..=rounds {
        eprintln!("{name}: round {round} of {rounds}");
        let ours = decomposed(&dir, f, Algorithm::default(), threads, scratch)?;
        linear_layers = ours.linear_layers;
        stage.push(ours.stage);
        total.push(ours.total);
        let asked = peers.as_deref_mut().filter(|peers| peers.has_model());
        if let Some(run) = asked.and_then(|peers| peers.model(&dir, f)) {
            let same = if run.linear_layers > ours.linear_layers {
                run.seconds - run.head_seconds
            } else {
                run.seconds
            };
            theirs_total.push(run.seconds);
            theirs_same.push(same);
            last = Some(run);
        }
        if let Some(algorithm) = fast() {
            quick.push(decomposed(&dir, f, algorithm, threads, scratch)?.stage);
        }
    }
    let measured = !quick.is_empty();
    // a peer that failed on the way has no pair for each round
    let last = last.filter(|_| theirs_same.len() == stage.len());
    Ok(Case {
        name,
        f,
        linear_layers,
        ours: Spread::of(&stage),
        ours_total: Spread::of(&total),
        ours_fast: measured.then(|| Spread::of(&quick)),
        theirs: last.map(|run| Theirs {
            how: run.how,
            linear_layers: run.linear_layers,
            total: Spread::of(&theirs_total),
            same_matrices: Spread::of(&theirs_same),
            ratio: Spread::of_ratios(&stage, &theirs_same),
            ratio_of_total: Spread::of_ratios(&stage, &theirs_total),
            fast_ratio: measured.then(|| Spread::of_ratios(&quick, &theirs_same)),
        }),
    })
}

struct Decomposed {
    linear_layers: usize,
    /// Seconds of [`Stage::Decompose`], and of everything.
    stage: f64,
    total: f64,
}

fn decomposed(
    dir: &Path,
    f: f64,
    algorithm: Algorithm,
    threads: usize,
    scratch: &Path,
) -> Result<Decomposed> {
    let out = tempfile::tempdir_in(scratch)?;
    let options = Options {
        plan: PlanOptions {
            rank: Rank::Fraction(f),
            threads,
            ..PlanOptions::default()
        },
        algorithm,
        ..Options::default()
    };
    let watch = StageWatch::default();
    let started = Instant::now();
    let base = Base::open(dir, None, None)?;
    let facts = decompose::run(&base, &out.path().join("svd"), &options, &watch)?;
    Ok(Decomposed {
        linear_layers: facts.linear_layers,
        stage: watch.seconds().ok_or("decompose tells of its stage")?,
        total: started.elapsed().as_secs_f64(),
    })
}

/// Takes the time from the start of [`Stage::Decompose`] to its end.
#[derive(Debug, Default)]
struct StageWatch {
    started_and_finished: Mutex<(Option<Instant>, Option<Instant>)>,
}

impl StageWatch {
    fn seconds(&self) -> Option<f64> {
        let times = self.started_and_finished.lock().ok()?;
        Some((times.1? - times.0?).as_secs_f64())
    }
}

impl Observer for StageWatch {
    fn event(&self, event: &Event<'_>) {
        let Ok(mut times) = self.started_and_finished.lock() else {
            return;
        };
        match event {
            Event::Started {
                stage: Stage::Decompose,
                ..
            } => times.0 = Some(Instant::now()),
            Event::Finished {
                stage: Stage::Decompose,
            } => times.1 = Some(Instant::now()),
            _ => {}
        }
    }
}
