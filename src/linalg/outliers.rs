//! Singular values that dwarf the rest, taken out before single precision has to square them.

use ndarray::{Array2, s};

use super::lapack::{Tridiagonal, orthonormalise_rows};
use super::operand::{Operand, pass};
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

/// The largest few triplets of M (s, l) that stand out: `stands_out(σ², mean of the squares of all but these)`.
///
/// Those returned have ‖Mᵀ·(M·u) − σ²·u‖ ≤ tolerance·σ₁·σ: 3·10⁻⁶ leaves nothing of them above single precision. A matrix
/// without any costs two or three thin products.
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
    let [mut x] = pass(
        [(matrix.borrowed(), normal(width, side, seed).view())],
        |[y]| y,
    )?;
    // rows x = n·M·Mᵀ of normal n tell Σσ⁴ ≥ σ₁⁴, of which they show less than a tenth once in 500,000 times; and the first
    // sixteen σ² are at most 4·√Σσ⁴ together
    let fourths: f64 = x.rows().into_iter().map(rows::norm_squared).sum();
    let most = (10.0 * fourths / width as f64).sqrt();
    let rest = norm_squared - (width as f64).sqrt() * most;
    if width == LOOKED_FOR && rest > 0.0 && !stands_out(most, rest / (side - width) as f64) {
        return Ok(found);
    }
    for _ in 0..ROUNDS {
        rows::to_unit_length(x.view_mut());
        orthonormalise_rows(x.view_mut())?;
        let mut y = matrix.forward(x.view())?;
        // Rayleigh–Ritz on the rows of x
        let wide = y.mapv(f64::from);
        let projected = gemm(wide.view(), false, wide.view(), true);
        let (squares, inner) = Tridiagonal::reduce(projected)?.leading(x.nrows())?;
        let rest = (norm_squared - squares.iter().sum::<f64>()).max(0.0);
        let mean = rest / (side - x.nrows()) as f64;
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
        // those that stand out, and some more in case one of them comes to
        let kept = back.nrows().min(count + 4);
        x = back.slice_move(s![..kept, ..]);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::operand::Backend;

    /// In a later round more of them may stand out than in the one before, of a mean that became smaller.
    #[test]
    fn a_steep_spectrum_has_ever_more_of_them() {
        for seed in 0..8 {
            let side = 256;
            let (mut u, mut v) = (
                normal(side, side, 2 * seed),
                normal(side, side, 2 * seed + 1),
            );
            orthonormalise_rows(u.view_mut()).expect("independent rows");
            orthonormalise_rows(v.view_mut()).expect("independent rows");
            for (k, mut row) in v.rows_mut().into_iter().enumerate() {
                row *= (-0.15 * k as f32).exp();
            }
            let m = u.t().dot(&v);
            let norm_squared = m.rows().into_iter().map(rows::norm_squared).sum();
            let operand = Operand::new(m.view(), &Backend::Cpu).expect("short side first");
            // as `decompose` asks where 77 values are wanted
            let stands_out = |square: f64, mean: f64| square > 177.0 * mean;
            let found =
                outliers(&operand, norm_squared, stands_out, 3e-6, seed).expect("multiplies");
            for (k, sigma) in found.sigma.iter().enumerate() {
                let wanted = (-0.15 * k as f64).exp();
                assert!(
                    (sigma / wanted - 1.0).abs() < 1e-4,
                    "σ_{k}: {sigma} for {wanted}"
                );
            }
        }
    }

    #[test]
    fn what_stands_out_is_found_whatever_the_rest_looks_like() {
        for (side, length) in [(64, 80), (300, 400), (300, 1200)] {
            let along = (normal(1, side, 1), normal(1, length, 2));
            for size in [0.0, 0.3, 3.0, 30.0] {
                let m = normal(side, length, 3) + along.0.t().dot(&along.1) * size;
                let norm_squared = m.rows().into_iter().map(rows::norm_squared).sum();
                let operand = Operand::new(m.view(), &Backend::Cpu).expect("short side first");
                let stands_out = |square: f64, mean: f64| square > 50.0 * mean;
                for seed in 0..4 {
                    let found = outliers(&operand, norm_squared, stands_out, 3e-6, seed);
                    let found = found.expect("multiplies");
                    // σ of the outlier, and the mean square of the others
                    let lengths = rows::norm(along.0.row(0)) * rows::norm(along.1.row(0));
                    let first = f64::from(size) * lengths;
                    let is_one = first.powi(2) > 50.0 * length as f64;
                    assert_eq!(found.sigma.len(), usize::from(is_one), "{size}, {side}");
                    if let Some(sigma) = found.sigma.first() {
                        assert!((sigma / first - 1.0).abs() < 0.1 && found.left <= 3e-6);
                    }
                }
            }
        }
    }
}
