//! What is asked of a decomposition, and what it answers.

use std::fmt;
use std::ops::RangeInclusive;

use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};

use super::certificate::Certificate;

/// How a matrix is decomposed, and what the result promises.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Algorithm {
    pub name: String,
    /// Largest relative error of each kept singular value, down to some millionths of the largest: the square of that is lost
    /// in the Gram matrix even in double precision.
    pub tolerance: f64,
    /// Seed of the starting vectors and of the probes that check the result.
    pub seed: u64,
    pub backend: String,
    /// Rather fast than exact: the values err by up to 15 %, as those of `torch.svd_lowrank` do. Not in schema 1.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fast: bool,
}

/// The tolerances there are: f32 factors hold no more digits than the first, and the last leaves nothing that is called one.
pub const TOLERANCES: RangeInclusive<f64> = 1e-6..=0.1;

/// What [`Algorithm::fast`] may leave of one triplet in another, relative to σ₁: little beside the errors of its values.
pub(super) const FAST_RESIDUAL: f64 = 1e-3;

/// What [`Algorithm::fast`] may leave beside σ_q: its values err by some 15 % at most.
const FAST_TAIL_MAX: f64 = 1.25;

impl Default for Algorithm {
    fn default() -> Self {
        Self {
            name: "gram".into(),
            tolerance: 1e-4,
            seed: 0,
            backend: "cpu".into(),
            fast: false,
        }
    }
}

impl Algorithm {
    /// ‖G·x − λ·x‖/λ of eigenpairs of M·Mᵀ that are good enough: the values err by 0.8 to 2 times the square (2026-11), half of
    /// the tolerance at most.
    pub(super) fn residual(&self) -> f64 {
        0.5 * self.tolerance.sqrt()
    }

    /// Whether triplets with this certificate are what was asked for.
    pub fn accepts(&self, certificate: &Certificate) -> bool {
        if self.fast {
            // a NaN is no bound
            let leads = certificate.tail.is_none_or(|tail| tail <= FAST_TAIL_MAX);
            leads && certificate.are_consistent(self.tolerance.max(FAST_RESIDUAL))
        } else {
            certificate.holds(self.tolerance)
        }
    }
}

/// Which way the triplets were computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// A block Krylov space of the Gram matrix, not grown until convergence: asked for by [`Algorithm::fast`].
    Fast,
    /// A block Krylov space of the Gram matrix in f32, or on a GPU a block filtered by polynomials of it, proposed by rounded
    /// products and confirmed in f32.
    Krylov,
    /// The same, after the values that dwarf the rest were taken out.
    DeflatedKrylov,
    /// The whole Gram matrix in f32.
    GramF32,
    /// The same, after the values that dwarf the rest were taken out.
    DeflatedGramF32,
    /// The whole Gram matrix in f64: the guaranteed route.
    GramF64,
    /// LAPACK's full decomposition in f64: for small matrices, and should the certificate ever refuse the others.
    Full,
}

impl Route {
    /// The route in words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Fast => "a small Krylov space",
            Self::Krylov => "a Krylov space",
            Self::DeflatedKrylov => "a Krylov space without the largest values",
            Self::GramF32 => "the Gram matrix in f32",
            Self::DeflatedGramF32 => "the Gram matrix in f32 without the largest values",
            Self::GramF64 => "the Gram matrix in f64",
            Self::Full => "a full decomposition in f64",
        }
    }

    /// Whether nothing but small sides was computed in double precision.
    pub fn is_single(self) -> bool {
        !matches!(self, Self::GramF64 | Self::Full)
    }
}

/// The q leading singular triplets of a matrix M (m, n), vectors in rows.
#[derive(Debug, Clone)]
pub struct Svd {
    /// (q, m)
    pub u: Array2<f32>,
    /// (q,), descending
    pub sigma: Array1<f32>,
    /// (q, n)
    pub v: Array2<f32>,
    /// ‖M‖², Frobenius
    pub norm_squared: f64,
    /// ‖M′‖², Frobenius
    pub left_squared: f64,
    pub route: Route,
    pub certificate: Certificate,
    /// A cheaper route whose result was not good enough, if one was tried.
    pub refused: Option<Refused>,
}

impl Svd {
    /// Share of ‖M‖² in the triplets, and the norm of what is left.
    pub fn energy(&self) -> (f64, f64) {
        let (total, left) = (self.norm_squared, self.left_squared);
        let share = if total > 0.0 { 1.0 - left / total } else { 1.0 };
        (share.max(0.0), left.sqrt())
    }
}

/// A route that was tried and left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Refused {
    pub route: Route,
    /// σ₁/σ_q of the matrix that was squared in f32.
    pub kappa: f64,
    /// `None` if κ alone decided.
    pub certificate: Option<Certificate>,
}

impl fmt::Display for Refused {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        let (route, kappa) = (self.route.describe(), self.kappa);
        match self.certificate {
            None => write!(out, "{route} is not precise enough at κ = {kappa:.0}"),
            Some(c) => write!(
                out,
                "the certificate refused {route} (residual {:.1e}, orthogonality {:.1e}, ‖M′‖ {:.4} × σ_q)",
                c.residual,
                c.orthogonality,
                c.tail.unwrap_or(f64::NAN)
            ),
        }
    }
}

/// How many of the leading singular triplets are asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wanted {
    /// This many, 1 ≤ q ≤ min(m, n).
    Triplets(usize),
    /// As few as hold this share of ‖M‖², 0 < share ≤ 1.
    Energy(f64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_asks_less_of_its_factors_and_not_nothing() {
        let certificate = |link| Certificate {
            residual: 1e-2,
            link: Some(link),
            orthogonality: 1e-6,
            tail: Some(1.2),
        };
        let fast = Algorithm {
            fast: true,
            ..Algorithm::default()
        };
        assert!(fast.accepts(&certificate(5e-4)) && !fast.accepts(&certificate(2e-3)));
        let small = Certificate {
            residual: 1e-3,
            tail: Some(0.9),
            ..certificate(5e-5)
        };
        let exact = Algorithm::default();
        assert!(exact.accepts(&small) && !exact.accepts(&certificate(5e-5)));
        let link = Some(5e-4);
        assert!(!exact.accepts(&Certificate { link, ..small }));
    }
}
