//! The ratios that are wanted, and whether they hold.

use serde::Serialize;

use crate::peers::Peer;
use crate::spread::Spread;
use crate::{Case, Who, model};

/// (f, at most this share of torch.svd_lowrank's time), for weights four times as long as wide.
const LONG: [(f64, f64); 3] = [(0.1, 0.9), (0.2, 0.45), (0.5, 0.2)];
/// The same for square weights of [`SQUARE_SIDE`].
const SQUARE: [(f64, f64); 4] = [(0.1, 1.6), (0.2, 1.0), (0.5, 0.4), (1.0, 0.35)];
const SQUARE_SIDE: usize = 3072;
/// The same for our fast mode, on both.
const FAST: [(f64, f64); 1] = [(0.1, 0.7)];
/// Against any full decomposition, of any matrix, up to [`FULL_F_MAX`].
const FULL: f64 = 1.0 / 3.0;
const FULL_F_MAX: f64 = 0.5;
/// Against svd-training's create_from_model.
const MODEL: [(f64, f64); 3] = [(0.1, 1.3), (0.2, 0.6), (0.5, 0.3)];

/// One wanted number and the one found.
#[derive(Debug, Serialize)]
pub struct Verdict {
    pub case: String,
    pub wanted: String,
    pub at_most: f64,
    /// The median of the rounds; none where a side did not run.
    pub found: Option<f64>,
    pub met: bool,
}

impl Verdict {
    fn new(case: &str, wanted: String, at_most: f64, found: Option<&Spread>) -> Self {
        let found = found.map(|spread| spread.median);
        Self {
            case: case.into(),
            wanted,
            at_most,
            found,
            met: found.is_some_and(|found| found <= at_most),
        }
    }
}

/// Judges every case that ran. What was filtered out is not judged; a peer that is missing is.
pub fn judge(cases: &[Case], models: &[model::Case]) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = cases.iter().flat_map(judge_matrix).collect();
    verdicts.extend(models.iter().flat_map(judge_model));
    verdicts
}

fn limit(wanted: &[(f64, f64)], f: f64) -> Option<f64> {
    let (_, limit) = wanted.iter().find(|(at, _)| *at == f)?;
    Some(*limit)
}

fn judge_matrix(case: &Case) -> Vec<Verdict> {
    let [m, n] = case.shape;
    let (short, long) = (m.min(n), m.max(n));
    let wanted: Option<&[(f64, f64)]> = match (short, long) {
        (SQUARE_SIDE, SQUARE_SIDE) => Some(&SQUARE),
        _ if long == 4 * short => Some(&LONG),
        _ => None,
    };
    let lowrank = case.row(Who::Theirs(Peer::Lowrank));
    let against = |who| format!("{who} / {}", Peer::Lowrank.name());
    let mut verdicts = Vec::new();
    if let Some(wanted) = wanted {
        if let Some(at_most) = limit(wanted, case.f) {
            let found = lowrank.and_then(|row| row.ratio.as_ref());
            verdicts.push(Verdict::new(&case.name, against(Who::Ours), at_most, found));
        }
        if let Some(at_most) = limit(&FAST, case.f) {
            let found = lowrank.and_then(|row| row.fast_ratio.as_ref());
            verdicts.push(Verdict::new(
                &case.name,
                against(Who::OursFast),
                at_most,
                found,
            ));
        }
    }
    if case.f <= FULL_F_MAX {
        for peer in Peer::ALL.into_iter().filter(|peer| peer.is_full()) {
            let found = case.row(Who::Theirs(peer));
            verdicts.push(Verdict::new(
                &case.name,
                format!("{} / {}", Who::Ours, peer.name()),
                FULL,
                found.and_then(|row| row.ratio.as_ref()),
            ));
        }
    }
    // a ratio counts for nothing if the numbers are wrong
    if let Some(row) = case.row(Who::Ours) {
        verdicts.push(Verdict {
            case: case.name.clone(),
            wanted: "svdhub's singular values within their tolerance".into(),
            at_most: svdhub::linalg::Algorithm::default().tolerance,
            found: Some(row.accuracy.sigma_worst),
            met: row.accuracy.within_tolerance,
        });
    }
    verdicts
}

fn judge_model(case: &model::Case) -> Option<Verdict> {
    // create_from_model as a whole: the head it always replaces is part of what it does
    let found = case.theirs.as_ref().map(|theirs| &theirs.ratio_of_total);
    limit(&MODEL, case.f).map(|at_most| {
        Verdict::new(
            &case.name,
            "svdhub / svd-training, all it does".into(),
            at_most,
            found,
        )
    })
}
