//! Leading eigenpairs of a Gram matrix on a device that multiplies in double precision about as fast as in single.
//!
//! Subspace iteration with Chebyshev filters (Zhou, Saad, Tiago & Chelikowsky 2006): a polynomial of the matrix that is small
//! below the wanted values lifts a block of vectors towards theirs. Nearly all of it are products with the matrix on the
//! device; the eigenproblem of the block's own size is solved here, while the device works for other matrices.

use candle_core::Tensor;
use ndarray::{Array2, Axis};
use ndarray_linalg::{Cholesky, UPLO};

use super::krylov::Pairs;
use super::lapack::{Tridiagonal, solve_lower};
use super::operand::{download, upload};
use crate::error::Result;
use crate::random::normal;

/// Above this share of the full rank the block's own eigenproblem is as large as the whole one.
const SHARE_MAX: f64 = 0.3;

/// Rounds after which another way is taken: a spectrum that falls by less than rounding where the block ends.
const ROUNDS: usize = 10;

/// How much more a filter may lift the first vector than the last wanted one: the rest of 2⁻⁵³ is what keeps them apart.
const LIFT_MAX: f64 = 1e10;

/// A pair of this residual is done with: it stays, and the others are kept away from it.
const LOCKED: f64 = 1e-6;

/// Whether q pairs of a matrix (s, s) are few enough.
pub fn suits(side: usize, q: usize) -> bool {
    q as f64 <= SHARE_MAX * side as f64 && width(side, q) < side
}

/// Vectors in the block: those behind the wanted ones converge slowest, and need not.
fn width(side: usize, q: usize) -> usize {
    (q + (q / 4).max(16)).next_multiple_of(16).min(side)
}

/// The q largest eigenvalues, descending, and their eigenvectors, one per row, of a positive semidefinite G (s, s) in f64,
/// each with ‖G·x − λ·x‖ ≤ residual·λ.
///
/// `None` if they do not converge, or G has too small a rank.
pub fn leading(g: &Tensor, q: usize, residual: f64, seed: u64) -> Result<Option<Pairs>> {
    let side = g.dim(0)?;
    let drawn = normal(width(side, q), side, seed).mapv(f64::from);
    let Some(x) = orthonormal(upload(drawn.view(), g.device())?.matmul(g)?)? else {
        return Ok(None);
    };
    let mut ritz = Ritz::of(g, &x)?;
    for _ in 0..ROUNDS {
        let residuals = ritz.residuals()?;
        // a NaN is no convergence
        if residuals[..q].iter().all(|&x| x <= residual) {
            return ritz.first(q).map(Some);
        }
        let worst = residuals[..q].iter().fold(0f64, |worst, x| worst.max(*x));
        let done = residuals[..q - 1].iter().take_while(|&&x| x <= LOCKED);
        let locked = done.count();
        let Some(degree) = ritz.degree(locked, q, worst / residual) else {
            return Ok(None);
        };
        let Some(x) = orthonormal(ritz.filtered(g, locked, degree)?)? else {
            return Ok(None);
        };
        ritz = Ritz::of(g, &x)?;
    }
    Ok(None)
}

/// What G makes of a block of vectors, by its own eigenpairs there (Rayleigh–Ritz).
struct Ritz {
    /// (p,), descending
    values: Vec<f64>,
    /// (p, s), orthonormal
    x: Tensor,
    /// x·G (p, s)
    gx: Tensor,
}

impl Ritz {
    fn of(g: &Tensor, x: &Tensor) -> Result<Self> {
        let gx = x.matmul(g)?;
        let inside: Array2<f64> = download(&gx.matmul(&x.t()?)?)?;
        let inside = (&inside + &inside.t()) * 0.5;
        let (values, turn) = Tridiagonal::reduce(inside)?.leading(x.dim(0)?)?;
        let turn = upload(turn.view(), g.device())?;
        Ok(Self {
            values,
            x: turn.matmul(x)?,
            gx: turn.matmul(&gx)?,
        })
    }

    /// ‖G·x − λ·x‖/λ of each pair.
    fn residuals(&self) -> Result<Vec<f64>> {
        let values = Tensor::from_slice(&self.values, (self.values.len(), 1), self.x.device())?;
        let off = (&self.gx - self.x.broadcast_mul(&values)?)?;
        let squares = off.sqr()?.sum(1)?.to_vec1::<f64>()?;
        let all = squares.iter().zip(&self.values);
        let relative = all.map(|(square, value)| square.sqrt() / value.max(f64::MIN_POSITIVE));
        Ok(relative.collect())
    }

    /// The degree of a filter that brings the residuals down by `excess`, or by as much as precision allows.
    ///
    /// On [0, c] the filter stays within ±1, and x = 2λ/c − 1 is lifted by T(x) ≈ ½·exp(degree·arcosh x).
    fn degree(&self, locked: usize, q: usize, excess: f64) -> Option<usize> {
        let lift = |value: f64| (2.0 * value / self.cut() - 1.0).acosh();
        let (first, last) = (lift(self.values[locked]), lift(self.values[q - 1]));
        if !(last > 1e-3 && first.is_finite() && excess.is_finite()) {
            return None;
        }
        let needed = (20.0 * excess).ln() / last;
        let allowed = LIFT_MAX.ln() / (first - last).max(1e-9);
        Some(needed.ceil().min(allowed.floor()).clamp(1.0, 60.0) as usize)
    }

    /// What lies below is not wanted.
    fn cut(&self) -> f64 {
        *self.values.last().expect("a block has vectors")
    }

    /// The locked vectors, and T(2G/c − 1) of the others over the same of the first among them, by the recurrence of
    /// Chebyshev's polynomials.
    fn filtered(&self, g: &Tensor, locked: usize, degree: usize) -> Result<Tensor> {
        let count = self.values.len() - locked;
        let known = (locked > 0).then(|| self.x.narrow(0, 0, locked));
        let known = known.transpose()?;
        // what rounding leaves of a locked vector would be lifted more than anything else
        let apart = |y: Tensor| -> Result<Tensor> {
            match &known {
                Some(known) => Ok((&y - y.matmul(&known.t()?)?.matmul(known)?)?),
                None => Ok(y),
            }
        };
        let half = 0.5 * self.cut();
        let first = half / (self.values[locked] - half);
        let mut scale = first;
        let mut before = self.x.narrow(0, locked, count)?;
        let gx = self.gx.narrow(0, locked, count)?;
        let mut last = apart(((gx - (&before * half)?)? * (scale / half))?)?;
        for _ in 1..degree {
            let next = (2.0 / first - scale).recip();
            let moved = ((last.matmul(g)? - (&last * half)?)? * (2.0 * next / half))?;
            let lifted = apart((moved - (before * (scale * next))?)?)?;
            (before, last, scale) = (last, lifted, next);
        }
        match known {
            Some(known) => Ok(Tensor::cat(&[known, last], 0)?),
            None => Ok(last),
        }
    }

    fn first(&self, q: usize) -> Result<Pairs> {
        let values = self.values[..q].iter().map(|&x| x as f32).collect();
        let vectors: Array2<f64> = download(&self.x.narrow(0, 0, q)?.contiguous()?)?;
        Ok((values, vectors.mapv(|x| x as f32)))
    }
}

/// An orthonormal basis of independent rows, in their order (Cholesky-QR, twice: Yamamoto et al. 2015).
fn orthonormal(mut x: Tensor) -> Result<Option<Tensor>> {
    for _ in 0..2 {
        let mut products: Array2<f64> = download(&x.matmul(&x.t()?)?)?;
        let lengths = products.diag().mapv(|square| square.sqrt().recip());
        if !lengths.iter().all(|x| x.is_finite()) {
            return Ok(None);
        }
        products *= &lengths;
        products *= &lengths.view().insert_axis(Axis(1));
        let Ok(factor) = products.cholesky(UPLO::Lower) else {
            return Ok(None);
        };
        let mut turn = Array2::from_diag(&lengths);
        solve_lower(factor.view(), turn.view_mut());
        x = upload(turn.view(), x.device())?.matmul(&x)?;
    }
    Ok(Some(x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Orthogonal vectors in rows, and G = Σ λ·x·xᵀ of given values.
    fn with_values(values: &[f64]) -> (Tensor, Array2<f64>) {
        let side = values.len();
        let drawn = normal(side, side, 5).mapv(f64::from);
        let x = orthonormal(upload(drawn.view(), &Device::Cpu).expect("x")).expect("a basis");
        let x: Array2<f64> = download(&x.expect("independent rows")).expect("x");
        let scaled = &x * &ndarray::Array1::from(values.to_vec()).insert_axis(Axis(1));
        let g = x.t().dot(&scaled);
        (upload(g.view(), &Device::Cpu).expect("g"), x)
    }

    #[test]
    fn pairs_of_flat_falling_and_outlying_spectra_are_found() {
        let side = 300;
        let flat = |i: usize| 2.0 - i as f64 / side as f64;
        let falling = |i: usize| 50.0 / (1.0 + i as f64);
        let outlying = |i: usize| if i < 2 { 4e4 / (1 + i) as f64 } else { flat(i) };
        for spectrum in [&flat as &dyn Fn(usize) -> f64, &falling, &outlying] {
            let values: Vec<f64> = (0..side).map(spectrum).collect();
            let (g, x) = with_values(&values);
            for q in [1, 30, 75] {
                assert!(suits(side, q));
                let (found, vectors) = leading(&g, q, 1e-4, 1).expect("runs").expect("converges");
                for (at, (&found, &value)) in found.iter().zip(&values).enumerate() {
                    let off = (f64::from(found) / value - 1.0).abs();
                    assert!(off < 1e-6, "λ{at} of {q}: {off:.1e} off");
                }
                // a vector may lean on its neighbours where values are close: together they span the same
                let along = vectors
                    .mapv(f64::from)
                    .dot(&x.slice(ndarray::s![..q, ..]).t());
                let kept = along.iter().map(|c| c * c).sum::<f64>() / q as f64;
                assert!(kept > 1.0 - 1e-3, "{kept} of the span of {q}");
            }
        }
    }

    #[test]
    fn too_small_a_rank_is_left_to_another_way() {
        let values: Vec<f64> = (0..100).map(|i| if i < 5 { 1.0 } else { 0.0 }).collect();
        let (g, _) = with_values(&values);
        assert!(leading(&g, 10, 1e-4, 1).expect("runs").is_none());
        assert!(!suits(100, 31) && !suits(24, 7));
    }
}
