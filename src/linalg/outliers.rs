//! Singular values that dwarf the rest, taken out before single precision has to square them.

use ndarray::{Array2, s};

use super::lapack::{Tridiagonal, orthonormalise_rows};
use super::operand::Operand;
use super::product::gemm;
use super::rows;
use crate::error::Result;
use crate::random::normal;

/// The leading singular values and left vectors of M (s, l) that stand out, found by subspace iteration.
pub struct Outliers {
    /// (k, s), orthonormal
    pub vectors: Array2<f32>,
    /// σ, descending
    pub sigma: Vec<f64>,
    /// What of them may be left in M without them, relative to the first.
    pub left: f64,
}

impl Outliers {
    /// The first `count` of them.
    pub fn at_most(mut self, count: usize) -> Self {
        if self.sigma.len() > count {
            self.sigma.truncate(count);
            self.vectors = self.vectors.slice(s![..count, ..]).to_owned();
        }
        self
    }
}

/// The largest few triplets of M (s, l) that stand out: `stands_out(σ², mean of the squares of all but sixteen)`.
///
/// Those returned have ‖Mᵀ·(M·u) − σ²·u‖ ≤ tolerance·σ₁·σ: 3·10⁻⁶ leaves nothing of them above single precision. A matrix
/// without any costs three thin products.
pub fn outliers(
    matrix: &Operand,
    norm_squared: f64,
    stands_out: impl Fn(f64, f64) -> bool,
    tolerance: f64,
    seed: u64,
) -> Result<Outliers> {
    const LOOKED_FOR: usize = 16;
    const ROUNDS: usize = 12;
    let (side, _) = matrix.dim();
    let width = LOOKED_FOR.min(side / 4).max(1);
    let mut found = Outliers {
        vectors: Array2::zeros((0, side)),
        sigma: Vec::new(),
        left: 0.0,
    };
    let start = matrix.forward(normal(width, side, seed).view())?;
    let mut x = matrix.backward(start.view())?;
    for _ in 0..ROUNDS {
        rows::to_unit_length(x.view_mut());
        orthonormalise_rows(x.view_mut())?;
        let mut y = matrix.forward(x.view())?;
        // Rayleigh–Ritz on the rows of x
        let wide = y.mapv(f64::from);
        let projected = gemm(wide.view(), false, wide.view(), true);
        let (squares, inner) = Tridiagonal::reduce(projected)?.leading(width)?;
        let rest = (norm_squared - squares.iter().sum::<f64>()).max(0.0);
        let mean = rest / (side - width) as f64;
        let count = squares
            .iter()
            .take_while(|&&square| stands_out(square, mean))
            .count();
        if count == 0 {
            break;
        }
        let inner = inner.mapv(|a| a as f32);
        x = gemm(inner.view(), false, x.view(), false);
        y = gemm(inner.view(), false, y.view(), false);
        // looked at now, and where the next round starts
        let back = matrix.backward(y.view())?;
        let off = (0..count).map(|i| {
            let off = &back.row(i) - &(&x.row(i) * (squares[i] as f32));
            rows::norm(off.view()) / (squares[0] * squares[i]).sqrt()
        });
        let off: Vec<f64> = off.take_while(|&off| off <= tolerance).collect();
        let converged = off.len();
        found = Outliers {
            vectors: x.slice(s![..converged, ..]).to_owned(),
            sigma: squares[..converged].iter().map(|s| s.sqrt()).collect(),
            left: off.into_iter().fold(0.0, f64::max),
        };
        if converged == count {
            break;
        }
        x = back;
    }
    Ok(found)
}
