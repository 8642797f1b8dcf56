//! Single precision: the cheapest way that κ allows, after the values that dwarf the rest were taken out.

use std::ops::Range;

use ndarray::{Array2, Axis, concatenate, s};

use super::algorithm::{Refused, Route, Svd, Wanted};
use super::filtered;
use super::krylov::{self, Pairs};
use super::lapack::Tridiagonal;
use super::operand::Rest;
use super::outliers::{Outliers, outliers};
use super::product::{gemm, multiply};
use super::rows;
use super::svd::{Problem, rank_of_energy};
use super::tiles::Lower;
use crate::error::Result;

/// Single precision is accepted while 4·κ²·2⁻²⁴ stays under the tolerance (measured error: 0.8 to 2.1 κ²·2⁻²⁴).
const F32_ERROR_PER_KAPPA2: f64 = 4.0 * 5.96e-8;

/// What single precision may add to the errors of [`Algorithm::fast`], which are ten times as large.
const FAST_TOLERANCE: f64 = 1e-2;

/// How well outliers are known with [`Algorithm::fast`]: well enough for those some 3,000 times σ_q.
const FAST_OUTLIERS: f64 = 1e-4;

/// What of the outliers may be left beside σ_q² with [`Algorithm::fast`]: a twentieth of σ_q at most.
const FAST_LEFT: f64 = 0.1;

/// What the noise of a Gram matrix may add to ‖M′‖², relative, for 10: within the promised 10⁻⁶ of ‖M′‖.
const NOISE_EXCESS: f64 = 1e-7;

/// ‖M‖² within which f32 holds M·Mᵀ, and what is made of it, with room to spare.
const F32_SQUARES: Range<f64> = 1e-20..1e30;

/// Above this share of the energy the tail that decides q is below single precision's noise.
const F64_ENERGY: f64 = 0.9999;

/// How well outliers are known, so that nothing of them is left above single precision.
const OUTLIERS: f64 = 3e-6;

/// What came of single precision.
#[allow(clippy::large_enum_variant)] // there is one of them at a time
pub(super) enum Attempt {
    Accepted(Svd),
    Refused(Refused),
    Unsuitable,
}

/// The triplets of a matrix in single precision.
pub(super) fn attempt(problem: &Problem, wanted: Wanted) -> Result<Attempt> {
    if !may_be_enough(problem, wanted) {
        return Ok(Attempt::Unsuitable);
    }
    let single = Single::of(problem, wanted)?;
    let Some((route, (values, vectors))) = single.pairs()? else {
        return Ok(Attempt::Unsuitable);
    };
    let last = f64::from(*values.last().expect("at least one pair is computed"));
    let kappa = (f64::from(values[0]) / last).sqrt();
    let refused = |certificate| {
        Attempt::Refused(Refused {
            route,
            kappa,
            certificate,
        })
    };
    // a NaN, from a negative or zero last value, is refused too
    let holds_kappa = kappa.powi(2) * F32_ERROR_PER_KAPPA2 <= single.tolerance;
    if !(holds_kappa || route == Route::Fast) || single.left_squared() > single.bound() * last {
        return Ok(refused(None));
    }
    let svd = problem.complete(single.all(&values, vectors), route)?;
    Ok(if problem.algorithm.accepts(&svd.certificate) {
        Attempt::Accepted(svd)
    } else {
        refused(Some(svd.certificate))
    })
}

/// Whether the shape, what is wanted and the size of the numbers leave single precision a chance.
fn may_be_enough(problem: &Problem, wanted: Wanted) -> bool {
    let (side, _) = problem.short.dim();
    let thresholds = problem.thresholds;
    let needs_double = match wanted {
        Wanted::Triplets(q) => thresholds.needs_double(side, q),
        Wanted::Energy(share) => share > F64_ENERGY || side <= thresholds.f64_side,
    };
    !needs_double && F32_SQUARES.contains(&problem.norm_squared)
}

/// A matrix of which the values that dwarf the rest are known by themselves.
struct Single<'p, 'a> {
    problem: &'p Problem<'a>,
    wanted: Wanted,
    /// What single precision may add to the values' relative errors.
    tolerance: f64,
    /// What σ_q² is taken for, before it is known: so much of the mean square of the values that were not taken out.
    guess: f64,
    large: Outliers,
}

impl<'p, 'a> Single<'p, 'a> {
    fn of(problem: &'p Problem<'a>, wanted: Wanted) -> Result<Self> {
        let ((side, _), algorithm) = (problem.short.dim(), problem.algorithm);
        let (tolerance, known) = if algorithm.fast {
            (algorithm.tolerance.max(FAST_TOLERANCE), FAST_OUTLIERS)
        } else {
            (algorithm.tolerance, OUTLIERS)
        };
        // spectra without a gap have σ_q a fifth above the root mean square up to an eighth of the rank, above it up to a
        // quarter, and above two thirds of it up to a half; a guess that fails is caught by κ as it is measured
        let guess: f64 = match wanted {
            Wanted::Triplets(q) if 8 * q <= side && !algorithm.fast => 1.2,
            Wanted::Triplets(q) if 4 * q <= side => 1.0,
            Wanted::Triplets(q) if 2 * q <= side => 0.65,
            _ => 0.35,
        };
        let limit = (tolerance / F32_ERROR_PER_KAPPA2).sqrt();
        let stands_out = |square: f64, mean: f64| square > (guess * limit).powi(2) * mean;
        let total = problem.norm_squared;
        let large = outliers(&problem.short, total, stands_out, known, algorithm.seed)?;
        let most = match wanted {
            Wanted::Triplets(q) => q - 1,
            Wanted::Energy(_) => side,
        };
        Ok(Self {
            problem,
            wanted,
            tolerance,
            guess: guess.powi(2),
            large: large.at_most(most),
        })
    }

    /// The largest σ that was taken out, or 0.
    fn first(&self) -> f64 {
        self.large.sigma.first().copied().unwrap_or_default()
    }

    /// ‖R‖² of what is left without them (s, l), as the difference of two sums.
    fn rest_squared(&self) -> f64 {
        let apart: f64 = self.large.sigma.iter().map(|s| s * s).sum();
        self.problem.norm_squared - apart
    }

    /// What is left of those taken out, and what rounding brings back of them: σ_q² grows by this at most, which no probe
    /// relative to σ₁ sees.
    fn left_squared(&self) -> f64 {
        (self.first() * self.large.left.max(f64::from(f32::EPSILON))).powi(2)
    }

    /// The share of σ_q² that may be left of them.
    fn bound(&self) -> f64 {
        if self.problem.algorithm.fast {
            FAST_LEFT
        } else {
            self.tolerance
        }
    }

    /// How many values lie in all these squares' sum, those taken out among them.
    fn rank_of_energy(&self, rest: &[f32], share: f64) -> usize {
        let squares = self.large.sigma.iter().map(|s| s * s);
        let squares = squares.chain(rest.iter().map(|&x| f64::from(x)));
        rank_of_energy(squares, share * self.problem.norm_squared)
    }

    /// Eigenpairs of R·Rᵀ of what is left, R, and the way to them; `None` where single precision cannot tell them.
    fn pairs(&self) -> Result<Option<(Route, Pairs)>> {
        let (side, length) = self.problem.short.dim();
        // noise ‖E‖ in the Gram matrix costs the leading vectors some 10·‖E‖²/(s·σ_q⁴) of what is left without them
        let noise = Lower::noise(length, self.problem.algorithm.fast) * self.first().powi(2);
        let noise_max = (NOISE_EXCESS * side as f64).sqrt();
        let mean = self.rest_squared().max(0.0) / side as f64;
        let rest = self.problem.short.without(&self.large.vectors)?;
        let mut found = self.pairs_of(&rest, noise <= noise_max * self.guess * mean)?;
        let last = |pairs: &Pairs| f64::from(*pairs.0.last().expect("at least one is computed"));
        let is_noisy = |(_, found): &(Route, Pairs)| noise > 2.0 * noise_max * last(found);
        if rest.was_squared() && found.as_ref().is_some_and(is_noisy) {
            // σ_q is less than was guessed
            found = self.pairs_of(&rest, false)?;
        }
        let deflated = |route| match route {
            _ if self.large.sigma.is_empty() => route,
            Route::Krylov => Route::DeflatedKrylov,
            Route::GramF32 => Route::DeflatedGramF32,
            other => other,
        };
        Ok(found.map(|(route, pairs)| (deflated(route), pairs)))
    }

    /// The same, from M·Mᵀ if `squared` and that is faster.
    fn pairs_of(&self, rest: &Rest, squared: bool) -> Result<Option<(Route, Pairs)>> {
        let Problem {
            algorithm,
            thresholds,
            ..
        } = self.problem;
        let (side, _) = rest.dim();
        let squared = squared.then_some(algorithm.fast);
        let mut at_hand = None;
        if let Wanted::Triplets(q) = self.wanted {
            let q = q - self.large.sigma.len();
            let route = match algorithm.fast {
                true => Route::Fast,
                false => Route::Krylov,
            };
            if let Some(pairs) = self.filtered(rest, q)? {
                return Ok(Some((route, pairs)));
            }
            if let Some(growth) = thresholds.growth(rest.dim(), q, algorithm) {
                let pairs = if growth.is_cheaper_without_gram(rest.dim()) {
                    krylov::leading(|x| rest.square(x), side, q, &growth, algorithm.seed)?
                } else {
                    let gram = at_hand.insert(rest.gram(squared)?);
                    krylov::leading(|x| gram.apply(x), side, q, &growth, algorithm.seed)?
                };
                if let Some(pairs) = pairs {
                    return Ok(Some((route, pairs)));
                }
            }
        }
        let reduced = Tridiagonal::reduce(match at_hand {
            Some(gram) => gram.into_host()?,
            None => rest.gram(squared)?.into_host()?,
        })?;
        let q = match self.wanted {
            Wanted::Triplets(q) => q,
            Wanted::Energy(share) => {
                let q = self.rank_of_energy(&reduced.eigenvalues()?, share);
                if thresholds.needs_double(side, q) {
                    return Ok(None);
                }
                q
            }
        };
        // at least one more than those taken out: κ is measured on it
        let q = q.saturating_sub(self.large.sigma.len()).max(1);
        Ok(Some((Route::GramF32, reduced.leading(q)?)))
    }

    /// Pairs from a device, where it has room for the Gram matrix.
    fn filtered(&self, rest: &Rest, q: usize) -> Result<Option<Pairs>> {
        let ((side, _), algorithm) = (rest.dim(), self.problem.algorithm);
        if !filtered::suits(side, q) {
            return Ok(None);
        }
        // rounding, at least, is left of what was taken out
        let left = self.rest_squared().max(1e-12 * self.problem.norm_squared);
        let (mean, residual) = (left / side as f64, algorithm.residual());
        let found = rest.there().and_then(|there| match there {
            Some(there) => filtered::leading(&there, mean, q, residual, algorithm.seed),
            None => Ok(None),
        });
        match found {
            Err(error) if error.is_out_of_device_memory() => Ok(None),
            found => found,
        }
    }

    /// All vectors (q, s), those taken out first, from the eigenpairs of what is left.
    fn all(&self, values: &[f32], mut vectors: Array2<f32>) -> Array2<f32> {
        if !self.large.sigma.is_empty() {
            // orthonormal among themselves; of the others, they hold what rounding brought back
            let out = self.large.vectors.view();
            let inside = gemm(vectors.view(), false, out, true);
            multiply(&mut vectors.view_mut(), 1.0, inside.view(), -1.0, out);
            rows::to_unit_length(vectors.view_mut());
            vectors = concatenate![Axis(0), self.large.vectors, vectors];
        }
        match self.wanted {
            Wanted::Triplets(_) => vectors,
            // the extra one, where those taken out were enough
            Wanted::Energy(share) => {
                let q = self.rank_of_energy(values, share);
                vectors.slice(s![..q, ..]).to_owned()
            }
        }
    }
}
