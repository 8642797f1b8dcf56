//! From numbers to places, and the round ones among them that are labelled.

use super::figure::{figure, figure_of_tick, raised};
use crate::card::thousands;

/// The least and the greatest; 0 and 0 of nothing.
pub fn range(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let lo = values.clone().fold(f64::INFINITY, f64::min);
    let hi = values.fold(f64::NEG_INFINITY, f64::max);
    if lo <= hi { (lo, hi) } else { (0.0, 0.0) }
}

/// Numbers beyond this are drawn at the edge: a stranger's report may hold any.
pub const EXTREME: f64 = 1e15;

/// A scale from numbers to 0 … 1, with the values that are labelled on it.
pub struct Scale {
    pub lo: f64,
    pub hi: f64,
    log: bool,
    pub ticks: Vec<(f64, String)>,
}

impl Scale {
    /// From `lo` to `hi` exactly.
    pub fn linear(lo: f64, hi: f64) -> Self {
        let mut scale = Self::rounded(lo, hi);
        (scale.lo, scale.hi) = (lo, hi);
        scale
            .ticks
            .retain(|(v, _)| (lo - 1e-9..=hi + 1e-9).contains(v));
        scale
    }

    /// From `lo` to `hi`, widened to round numbers.
    pub fn rounded(lo: f64, hi: f64) -> Self {
        let (lo, hi) = (lo.clamp(-EXTREME, EXTREME), hi.clamp(-EXTREME, EXTREME));
        // all the same, or nearly: any range around it will do
        let hi = hi.max(lo + lo.abs() * 1e-6).max(lo + 1e-6);
        let rough = (hi - lo) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0]
            .into_iter()
            .find(|m| m * power >= rough * 0.999);
        let step = step.unwrap_or(10.0) * power;
        let (first, last) = ((lo / step + 1e-6).floor(), (hi / step - 1e-6).ceil());
        let digits = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
        let label = |v: f64| {
            if hi.abs() >= 1e6 {
                figure(v)
            } else if step >= 1.0 {
                thousands(v.max(0.0).round() as u64)
            } else {
                format!("{v:.digits$}")
            }
        };
        let ticks = (0..=(last - first) as usize).map(|i| (first + i as f64) * step);
        Self {
            lo: first * step,
            hi: last * step,
            log: false,
            ticks: ticks.map(|v| (v, label(v))).collect(),
        }
    }

    /// From `lo` to `hi`, both positive, widened to their first digits.
    pub fn log(lo: f64, hi: f64) -> Self {
        let edge = |v: f64, round: fn(f64) -> f64| {
            let v = v.clamp(1.0 / EXTREME, EXTREME);
            let power = 10f64.powf(v.log10().floor());
            round(v / power) * power
        };
        // a hair inside, so that a round number stays what it is
        let hi = edge(hi * (1.0 - 1e-9), f64::ceil);
        let lo = edge(lo * (1.0 + 1e-9), f64::floor).min(hi / 2.0);
        let (first, last) = (lo.log10().floor() as i32, hi.log10().ceil() as i32);
        // whole powers of ten, every second or third of them where there are many; between those what room there is
        let every = (last - first) / 8 + 1;
        let powers = (first..=last).filter(|e| e % every == 0);
        let marks = |digits: &[i32]| -> Vec<(i32, i32)> {
            let all = powers
                .clone()
                .flat_map(|e| digits.iter().map(move |&m| (m, e)));
            let inside = |&(m, e): &(i32, i32)| {
                let v = f64::from(m) * 10f64.powi(e);
                (lo * (1.0 - 1e-9)..=hi * (1.0 + 1e-9)).contains(&v)
            };
            all.filter(inside).collect()
        };
        let choices = [&[1, 2, 3, 4, 5, 6, 7, 8, 9][..], &[1, 2, 5], &[1]].map(marks);
        let [.., sparse] = &choices;
        let kept = choices
            .iter()
            .find(|marks| marks.len() <= 9)
            .unwrap_or(sparse);
        let label = |&(m, e): &(i32, i32)| {
            let v = f64::from(m) * 10f64.powi(e);
            let text = match e {
                -2..=4 => figure_of_tick(v),
                _ if m == 1 => format!("10{}", raised(e)),
                _ => format!("{m}·10{}", raised(e)),
            };
            (v, text)
        };
        Self {
            lo,
            hi,
            log: true,
            ticks: kept.iter().map(label).collect(),
        }
    }

    pub fn at(&self, value: f64) -> f64 {
        let share = if !self.log {
            (value - self.lo) / (self.hi - self.lo)
        } else if value > 0.0 {
            (value / self.lo).ln() / (self.hi / self.lo).ln()
        } else {
            0.0
        };
        if share.is_finite() {
            share.clamp(0.0, 1.0)
        } else {
            0.0
        }
    }
}
