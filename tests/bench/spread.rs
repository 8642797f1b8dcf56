//! What several rounds gave.

use serde::Serialize;

/// Of several rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// In the order of the rounds.
    pub rounds: Vec<f64>,
}

impl Spread {
    pub fn of(rounds: &[f64]) -> Self {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        Self {
            median: (at(last / 2) + at(last.div_ceil(2))) / 2.0,
            min: at(0),
            max: at(last),
            rounds: rounds.to_vec(),
        }
    }

    /// Ours over theirs, round by round; a time that was taken once stands beside every round of the other.
    pub fn of_ratios(ours: &[f64], theirs: &[f64]) -> Self {
        let ratios: Vec<f64> = match theirs {
            [once] => ours.iter().map(|x| x / once).collect(),
            each => ours.iter().zip(each).map(|(x, y)| x / y).collect(),
        };
        Self::of(&ratios)
    }
}
