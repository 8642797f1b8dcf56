//! Leading eigenpairs of M·Mᵀ on a device, by products of which hardly any has to be precise.
//!
//! Subspace iteration with Chebyshev filters (Zhou, Saad, Tiago & Chelikowsky 2006): a polynomial of the Gram matrix that is
//! small below the wanted values lifts a block of vectors towards theirs. A filter only proposes: rounding to the 11 bits that
//! tensor cores read is noise that the next filter takes out, and a pair counts by its residual in single precision, in the end
//! against M itself. The eigenproblem of the block's own size is solved on the CPU, while the device works for other matrices.

use candle_core::{DType, Tensor};
use ndarray::Array2;

use super::krylov::Pairs;
use super::lapack::{FIRST_PIVOT_MIN, Tridiagonal};
use super::operand::There;
use crate::device::{Reading, multiply};
use crate::error::Result;
use crate::random::random_signs;

/// Above this share of the full rank the block's own eigenproblem is as large as the whole one.
const SHARE_MAX: f64 = 0.3;

/// Products with the Gram matrix before the first look: they bring a random block near the leading values.
const BEGINNINGS: usize = 3;

/// Rounds after which another way is taken: a spectrum that falls by less than rounding where the block ends.
const ROUNDS: usize = 10;

/// How much more a filter may lift the first vector than the last wanted one: the rest of 2⁻²⁴ is what keeps them apart.
const LIFT_MAX: f64 = 1e4;

/// What is aimed at, of the residual that is good enough: a little more of it costs little.
const AIM: f64 = 0.3;

/// Rounded factors leave residuals of 2·10⁻⁴ to 8·10⁻⁴ (flat and falling spectra, 2026-11): below this, products are of whole
/// ones.
const ROUNDED_RESIDUAL: f64 = 1e-3;

/// Whether q pairs of a matrix (s, s) are few enough.
pub fn suits(side: usize, q: usize) -> bool {
    q as f64 <= SHARE_MAX * side as f64 && width(side, q) < side
}

/// Vectors in the block: those behind the wanted ones converge slowest, and need not.
fn width(side: usize, q: usize) -> usize {
    (q + (q / 4).max(16)).next_multiple_of(16).min(side)
}

/// The q largest eigenvalues, descending, and their eigenvectors, one per row, of M·Mᵀ for a matrix M (s, l), each with
/// ‖M·Mᵀ·x − λ·x‖ ≤ residual·λ.
///
/// Less, where values lie so close together that a residual does not tell them apart. `mean` is about that of all eigenvalues:
/// the squares of those of a matrix of tiny or huge numbers would not fit f32.
///
/// `None` if they do not converge, or M has too small a rank.
pub fn leading(m: &There, mean: f64, q: usize, residual: f64, seed: u64) -> Result<Option<Pairs>> {
    let reading = match AIM * residual < ROUNDED_RESIDUAL {
        true => Reading::Whole,
        false => Reading::Rounded,
    };
    let g = Gram::of(m, mean, reading)?;
    let mut x = m.upload(random_signs(width(g.side, q), g.side, seed).view())?;
    for _ in 1..BEGINNINGS {
        let Some((next, _)) = m.nearly_orthonormal(&g.times(&x)?, FIRST_PIVOT_MIN)? else {
            return Ok(None);
        };
        x = next;
    }
    let Some(x) = m.orthonormal(&g.times(&x)?)? else {
        return Ok(None);
    };
    let (mut ritz, mut worst) = (Ritz::of(&g, &x)?, f64::INFINITY);
    for _ in 0..ROUNDS {
        let excess = ritz.excess(q, residual)?;
        let before = worst;
        worst = excess.iter().fold(0f64, |worst, x| worst.max(*x));
        // a NaN is no convergence
        if excess.iter().all(|&x| x <= 1.0) {
            return confirmed(m, mean, &ritz, q, residual);
        }
        let locked = excess[..q - 1].iter().take_while(|&&x| x <= 1.0).count();
        let Some(degree) = ritz.degree(locked, q, worst) else {
            return Ok(None);
        };
        if worst > 0.95 * before {
            return Ok(None);
        }
        let Some(x) = m.orthonormal(&ritz.filtered(&g, locked, degree)?)? else {
            return Ok(None);
        };
        ritz = Ritz::of(&g, &x)?;
    }
    Ok(None)
}

/// The pairs by M itself, if they are what was asked for.
fn confirmed(m: &There, mean: f64, ritz: &Ritz, q: usize, residual: f64) -> Result<Option<Pairs>> {
    let x = ritz.x.narrow(0, 0, q)?;
    let there = x.matmul(m.matrix())?;
    let back = (there.matmul(&m.matrix().t()?)? / mean)?;
    let values: Vec<f32> = (&x * &back)?.sum(1)?.to_vec1()?;
    let off = off(&back, &x, &values)?;
    let mut all = off.iter().zip(&values);
    if !all.all(|(&off, &value)| off <= residual * told_apart(value, ritz.cut(), residual)) {
        return Ok(None);
    }
    let values = values.into_iter().map(|x| (f64::from(x) * mean) as f32);
    Ok(Some((values.collect(), m.download(&x)?)))
}

/// What share of the residual may be left of a pair, where values from `cut` down are not wanted.
///
/// A residual r·λ moves a value by r²·λ² over its distance from the others (Kahan 1967), and by r·λ at most: where values lie
/// closer together than r, vectors of any of them would pass for all.
fn told_apart(value: f32, cut: f64, residual: f64) -> f64 {
    let gap = 1.0 - cut / f64::from(value);
    gap.max(0.0).sqrt().clamp(4.0 * residual, 1.0)
}

/// ‖gx − λ·x‖/λ of each row.
fn off(gx: &Tensor, x: &Tensor, values: &[f32]) -> Result<Vec<f64>> {
    let scale = Tensor::from_slice(values, (values.len(), 1), x.device())?;
    let squares = (gx - x.broadcast_mul(&scale)?)?.sqr()?.sum(1)?;
    let squares: Vec<f32> = squares.to_vec1()?;
    let all = squares.iter().zip(values);
    let relative = all.map(|(square, value)| square.sqrt() / value.max(f32::MIN_POSITIVE));
    Ok(relative.map(f64::from).collect())
}

/// M·Mᵀ over the mean of its eigenvalues, and how it is multiplied.
struct Gram<'a> {
    m: &'a There,
    side: usize,
    /// (s, s)
    whole: Tensor,
    /// (s, 1): where each row crosses the diagonal.
    diagonal: Tensor,
    reading: Reading,
}

impl<'a> Gram<'a> {
    fn of(m: &'a There, mean: f64, reading: Reading) -> Result<Self> {
        let matrix = m.matrix();
        let side = matrix.dim(0)?;
        let whole = Tensor::zeros((side, side), DType::F32, matrix.device())?;
        let factor = (1.0 / mean) as f32;
        multiply(&whole, factor, matrix, &matrix.t()?, 0.0, reading)?;
        Ok(Self {
            m,
            side,
            whole,
            diagonal: Tensor::arange(0, side as u32, matrix.device())?.unsqueeze(1)?,
            reading,
        })
    }

    /// x·G
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.zeros_like()?;
        multiply(&y, 1.0, x, &self.whole, 0.0, self.reading)?;
        Ok(y)
    }

    /// G − shift·I
    fn shifted(&self, shift: f64) -> Result<Tensor> {
        let shifts = Tensor::full(-shift as f32, (self.side, 1), self.whole.device())?;
        Ok(self.whole.scatter_add(&self.diagonal, &shifts, 1)?)
    }
}

/// What G makes of a block of vectors, by its own eigenpairs there (Rayleigh–Ritz).
struct Ritz {
    /// (p,), descending
    values: Vec<f32>,
    /// (p, s), orthonormal
    x: Tensor,
    /// x·G (p, s)
    gx: Tensor,
}

impl Ritz {
    fn of(g: &Gram, x: &Tensor) -> Result<Self> {
        let gx = x.matmul(&g.whole)?;
        let inside: Array2<f32> = g.m.download(&gx.matmul(&x.t()?)?)?;
        let inside = (&inside + &inside.t()) * 0.5;
        let (values, turn) = Tridiagonal::reduce(inside)?.leading(x.dim(0)?)?;
        let turn = g.m.upload(turn.view())?;
        Ok(Self {
            values,
            x: turn.matmul(x)?,
            gx: turn.matmul(&gx)?,
        })
    }

    /// The residuals of the first q pairs over what is aimed at.
    fn excess(&self, q: usize, residual: f64) -> Result<Vec<f64>> {
        let off = off(&self.gx, &self.x, &self.values)?;
        let pairs = off.iter().zip(&self.values).take(q);
        let aim = |value| AIM.min(0.8 * told_apart(value, self.cut(), residual));
        Ok(pairs
            .map(|(off, &value)| off / (residual * aim(value)))
            .collect())
    }

    /// The degree of a filter that brings the residuals down by `excess`, or by as much as precision allows.
    ///
    /// On [0, c] the filter stays within ±1, and x = 2λ/c − 1 is lifted by T(x) ≈ ½·exp(degree·arcosh x).
    fn degree(&self, locked: usize, q: usize, excess: f64) -> Option<usize> {
        let lift = |value: f32| (2.0 * f64::from(value) / self.cut() - 1.0).acosh();
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
        f64::from(*self.values.last().expect("a block has vectors"))
    }

    /// The locked vectors, and T(2G/c − 1) of the others over the same of the first among them, by the recurrence of
    /// Chebyshev's polynomials.
    fn filtered(&self, g: &Gram, locked: usize, degree: usize) -> Result<Tensor> {
        let count = self.values.len() - locked;
        let known = (locked > 0).then(|| self.x.narrow(0, 0, locked));
        let known = known.transpose()?;
        // what rounding leaves of a locked vector would be lifted more than anything else
        let keep_apart = |y: &Tensor| -> Result<()> {
            if let Some(known) = &known {
                let along = Tensor::zeros((count, locked), DType::F32, y.device())?;
                multiply(&along, 1.0, y, &known.t()?, 0.0, g.reading)?;
                multiply(y, -1.0, &along, known, 1.0, g.reading)?;
            }
            Ok(())
        };
        let half = 0.5 * self.cut();
        let shifted = g.shifted(half)?;
        let first = half / (f64::from(self.values[locked]) - half);
        let mut scale = first;
        let mut before = self.x.narrow(0, locked, count)?.copy()?;
        let mut last = before.zeros_like()?;
        let factor = (scale / half) as f32;
        multiply(&last, factor, &before, &shifted, 0.0, g.reading)?;
        keep_apart(&last)?;
        for _ in 1..degree {
            let next = (2.0 / first - scale).recip();
            let (factor, less) = ((2.0 * next / half) as f32, -(scale * next) as f32);
            // the next one takes the place of the one before the last
            multiply(&before, factor, &last, &shifted, less, g.reading)?;
            keep_apart(&before)?;
            (before, last, scale) = (last, before, next);
        }
        match known {
            Some(known) => Ok(Tensor::cat(&[known, last], 0)?),
            None => Ok(last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Queues;
    use crate::linalg::Backend;
    use crate::linalg::lapack::orthonormalise_rows;
    use crate::linalg::operand::Operand;
    use crate::random::normal;
    use candle_core::Device;
    use ndarray::{Array1, Axis};

    /// Orthogonal vectors in rows, and M = Σ √λ·xᵀ·z of given λ, for others z.
    fn with_values(values: &[f64]) -> (Array2<f32>, Array2<f32>) {
        let side = values.len();
        let basis = |length, seed| {
            let mut x = normal(side, length, seed);
            orthonormalise_rows(x.view_mut()).expect("independent rows");
            x
        };
        let (x, z) = (basis(side, 5), basis(side + side / 2, 6));
        let sigma = Array1::from_iter(values.iter().map(|x| x.sqrt() as f32));
        ((&x.t() * &sigma).dot(&z), x)
    }

    fn found(matrix: &Array2<f32>, q: usize, residual: f64) -> Option<Pairs> {
        let backend = Backend::Device(Queues::of(Device::Cpu));
        let whole = Operand::new(matrix.view(), &backend).expect("uploads");
        let nothing = Array2::zeros((0, matrix.nrows()));
        let rest = whole.without(&nothing).expect("it is the whole");
        let there = rest.there().expect("it is there").expect("on a device");
        let mean = matrix.mapv(f64::from).mapv(|x| x * x).sum() / matrix.nrows() as f64;
        leading(&there, mean, q, residual, 1).expect("runs")
    }

    #[test]
    fn pairs_of_flat_and_falling_spectra_are_found_by_rounded_and_by_whole_products() {
        let side = 300;
        let flat = |i: usize| 2.0 - i as f64 / side as f64;
        let falling = |i: usize| 50.0 / (1.0 + i as f64);
        for spectrum in [&flat as &dyn Fn(usize) -> f64, &falling] {
            let values: Vec<f64> = (0..side).map(spectrum).collect();
            let (matrix, x) = with_values(&values);
            for (q, residual) in [(1, 5e-3), (30, 5e-3), (75, 5e-3), (30, 1e-3)] {
                assert!(suits(side, q));
                let (found, vectors) = found(&matrix, q, residual).expect("converges");
                for (at, (&found, &value)) in found.iter().zip(&values).enumerate() {
                    let off = (f64::from(found) / value - 1.0).abs();
                    // the square of the residual, over a gap of some hundredths of a value
                    let most = 4.0 * residual.powi(2);
                    assert!(off < most, "λ{at} of {q}: {off:.1e} off");
                }
                // a vector may lean on its neighbours where values are close: together they span the same
                let along = vectors.dot(&x.slice(ndarray::s![..q, ..]).t());
                let kept = along.iter().map(|c| c * c).sum::<f32>() / q as f32;
                assert!(kept > 1.0 - 3e-3, "{kept} of the span of {q}");
            }
        }
    }

    #[test]
    fn vectors_are_orthonormal_and_their_residuals_in_double_precision_are_what_was_asked_for() {
        let (matrix, q) = (normal(400, 700, 3), 40);
        let (values, vectors) = found(&matrix, q, 5e-3).expect("converges");
        let (wide, x) = (matrix.mapv(f64::from), vectors.mapv(f64::from));
        let off = x.dot(&x.t()) - Array2::<f64>::eye(q);
        assert!(off.iter().all(|x| x.abs() < 1e-5));
        let values = Array1::from_iter(values.into_iter().map(f64::from)).insert_axis(Axis(1));
        let off = (x.dot(&wide).dot(&wide.t()) - &x * &values) / &values;
        for row in off.rows() {
            assert!(row.dot(&row).sqrt() < 5e-3);
        }
    }

    #[test]
    fn values_closer_together_than_the_residual_are_found_or_left_to_another_way() {
        let (side, q) = (300, 30);
        for width in [0.0, 5e-4, 1e-3, 5e-3, 1e-2, 3e-2] {
            // all of them close, and the last ones behind others
            for leading in [0, q / 2] {
                let value = |i: usize| match i < leading {
                    true => 25.0 - 24.0 * i as f64 / leading as f64,
                    false => (1.0 + width * (side - i) as f64 / side as f64).powi(2),
                };
                let values: Vec<f64> = (0..side).map(value).collect();
                let (matrix, _) = with_values(&values);
                let Some((found, _)) = found(&matrix, q, 5e-3) else {
                    continue;
                };
                for (&found, &value) in found.iter().zip(&values) {
                    // 1e-4 on σ
                    let off = (f64::from(found) / value - 1.0).abs();
                    assert!(off < 2e-4, "{width}: {off:.1e} off");
                }
            }
        }
    }

    #[test]
    fn tiny_and_huge_numbers_make_no_difference() {
        let (matrix, q) = (normal(120, 150, 3), 12);
        let (values, vectors) = found(&matrix, q, 5e-3).expect("converges");
        // powers of two, within which M·Mᵀ fits f32, and not its square
        for power in [-40, 40] {
            let factor = 2f32.powi(power);
            let (scaled, same) = found(&(&matrix * factor), q, 5e-3).expect("converges");
            assert_eq!(same, vectors);
            assert!(
                values
                    .iter()
                    .zip(scaled)
                    .all(|(x, y)| x * factor * factor == y)
            );
        }
    }

    #[test]
    fn too_small_a_rank_is_left_to_another_way() {
        let matrix = normal(100, 5, 1).dot(&normal(5, 150, 2));
        assert!(found(&matrix, 10, 5e-3).is_none());
        assert!(!suits(100, 31) && !suits(24, 7));
    }
}
