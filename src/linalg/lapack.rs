//! LAPACK on row-major arrays: with [`super::real`], which declares it, [`super::product`] and [`super::tiles`] the only unsafe
//! code of the linear algebra.
//!
//! A row-major (r, c) array is LAPACK's column-major (c, r); "upper" in one reading is "lower" in the other.

use std::ops::Range;

use libc::c_int;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, s};

use super::panel::{Panel, STRIDE};
use super::product::{add_square_lower, gemm, multiply, multiply_upper};
use super::real::{Real, UPPER, check, int, work_len, zeros};
use super::twisted;
use crate::error::{Error, Result};

unsafe extern "C" {
    fn openblas_set_num_threads(threads: c_int);
}

/// Makes every LAPACK call run on the thread that makes it.
///
/// Our workers are the parallelism: two levels of it starve each other (2–7 × slower on two shared cores,
/// OpenBLAS 0.3.21 and 0.3.34, 2026-11), and one thread per call makes the bytes independent of the machine's cores.
pub fn single_threaded_blas() {
    // SAFETY: the function takes any positive number and only sets a global of the library.
    unsafe { openblas_set_num_threads(1) }
}

/// A symmetric matrix as T = Qᵀ·A·Q with T tridiagonal and Q a product of Householder reflectors.
///
/// The blocked reduction of LAPACK's sytrd (Dongarra, Sorensen & Hammarling 1989), its panels, rank-2k updates and
/// back-transformation our own; half of its 4/3·s³ flops is matrix–vector work, bound by memory.
pub struct Tridiagonal<T> {
    diagonal: Vec<T>,
    off_diagonal: Vec<T>,
    /// Beyond its diagonal, row j of the reduced matrix is reflector j: these halves of the rows, one after another.
    reflectors: Vec<T>,
    tau: Vec<T>,
}

/// Columns reduced between two rank-2k updates.
const PANEL: usize = 32;

/// Reflectors applied at a time on the way back: more of them fill the kernels better, and cost more beside these.
const BLOCK: usize = 64;

/// Sides below which all eigenpairs cost nothing.
const SMALL: usize = 64;

impl<T: Real> Tridiagonal<T> {
    /// Reduces a symmetric matrix, of which the upper half is read.
    pub fn reduce(mut a: Array2<T>) -> Result<Self> {
        assert!(a.is_square() && a.is_standard_layout());
        let side = a.nrows();
        let (mut d, mut e) = (vec![T::default(); side], vec![T::default(); side]);
        let mut tau = vec![T::default(); side];
        let stride = side.next_multiple_of(STRIDE);
        let (mut v, mut w) = (zeros(2 * PANEL, stride), zeros(2 * PANEL, stride));
        let mut start = 0;
        while side - start > 1 {
            let rest = side - start;
            // the last panel is all that is left; LAPACK's own end of this reads memory that nobody has written, in OpenBLAS
            // 0.3.21 on processors it does not know (symv of its kernels for Prescott, 2026-11)
            let width = if rest > 2 * PANEL { PANEL } else { rest - 1 };
            Panel {
                a: a.as_slice_mut().expect("it was checked to be dense"),
                side,
                start,
                width,
                e: &mut e[start..],
                tau: &mut tau[start..],
                v: v.as_slice_mut().expect("a fresh array is dense"),
                w: w.as_slice_mut().expect("a fresh array is dense"),
                stride,
            }
            .reduce();
            let next = start + width;
            // A ← A − V·Wᵀ − W·Vᵀ on what is left: one product of twice the depth
            let there = s![..width, width..rest];
            let (v, w) = (v.slice(there), w.slice(there));
            let left = ndarray::concatenate![ndarray::Axis(0), v, w];
            let right = ndarray::concatenate![ndarray::Axis(0), w, v];
            multiply_upper(
                a.slice_mut(s![next.., next..]),
                left.t(),
                -T::ONE,
                right.view(),
            );
            for j in start..next {
                d[j] = a[(j, j)];
            }
            start = next;
        }
        if let Some(last) = d.last_mut() {
            *last = a[(side - 1, side - 1)];
        }
        // the half that was not read is no longer needed: the solver wants that room
        let mut reflectors = Vec::with_capacity(side * side.saturating_sub(1) / 2);
        for (j, row) in a.rows().into_iter().enumerate() {
            let row = row.to_slice().expect("it was checked to be dense");
            reflectors.extend_from_slice(&row[j + 1..]);
        }
        Ok(Self {
            diagonal: d,
            off_diagonal: e,
            reflectors,
            tau,
        })
    }

    /// Reflector j from its first element on, which stands for 1: s − 1 − j elements.
    fn reflector(&self, j: usize) -> &[T] {
        let side = self.side();
        // before it there are s − 1, s − 2, … s − j elements
        let start = j * (2 * side - 1 - j) / 2;
        &self.reflectors[start..][..side - 1 - j]
    }

    /// The side s of the matrix.
    pub fn side(&self) -> usize {
        self.diagonal.len()
    }

    /// All eigenvalues, descending.
    ///
    /// # Errors
    /// NaN or Inf in the matrix.
    pub fn eigenvalues(&self) -> Result<Vec<T>> {
        self.values_from(0..self.side())
    }

    /// Those of the eigenvalues, descending, whose places are in `range`: a few cost little beside all.
    pub fn values_from(&self, range: Range<usize>) -> Result<Vec<T>> {
        let values = twisted::values(&self.diagonal, &self.off_diagonal, range);
        values.ok_or_else(|| self.not_finite())
    }

    fn not_finite(&self) -> Error {
        Error::Lapack {
            routine: T::SOLVER,
            rows: self.side(),
            columns: self.side(),
            info: -1,
        }
    }

    /// The q largest eigenvalues, descending, and their eigenvectors, one per row, orthonormal to single precision.
    ///
    /// Each pair for itself where values lie apart, else all of them by divide and conquer; then the q vectors alone back
    /// through Q.
    pub fn leading(&self, q: usize) -> Result<(Vec<T>, Array2<T>)> {
        let side = self.side();
        assert!((1..=side).contains(&q), "q eigenpairs of an s × s matrix");
        let (d, e) = (&self.diagonal, &self.off_diagonal);
        if side >= SMALL {
            let pairs = twisted::pairs(d, e, 0..q).ok_or_else(|| self.not_finite())?;
            if pairs.are_apart {
                let mut vectors = pairs.vectors;
                self.rotate_back(&mut vectors);
                return Ok((pairs.values, vectors));
            }
        }
        let (values, all) = T::all_eigenpairs(d, e)?;
        let mut vectors = zeros(q, side);
        let largest_first = all.rows().into_iter().rev();
        for (mut to, from) in vectors.rows_mut().into_iter().zip(largest_first) {
            to.assign(&from);
        }
        drop(all);
        self.rotate_back(&mut vectors);
        Ok((values.into_iter().rev().take(q).collect(), vectors))
    }

    /// As [`Tridiagonal::leading`] for the places in `range`: good to look at, for neighbours too close to tell apart come out
    /// mixed.
    pub fn glimpse(&self, range: Range<usize>) -> Result<(Vec<T>, Array2<T>)> {
        let pairs = twisted::pairs(&self.diagonal, &self.off_diagonal, range);
        let mut pairs = pairs.ok_or_else(|| self.not_finite())?;
        self.rotate_back(&mut pairs.vectors);
        Ok((pairs.values, pairs.vectors))
    }

    /// Turns vectors of T, one per row, into vectors of the matrix: x ← x·Qᵀ.
    pub fn rotate_back(&self, vectors: &mut Array2<T>) {
        let count = self.side().saturating_sub(1);
        let starts: Vec<usize> = (0..count).step_by(BLOCK).collect();
        for &start in starts.iter().rev() {
            let block = start..(start + BLOCK).min(count);
            let width = block.len();
            let mut v = Array2::from_elem((width, count - start), T::default());
            let tau = &self.tau[block.clone()];
            for (at, (mut row, j)) in v.rows_mut().into_iter().zip(block).enumerate() {
                // one with τ = 0 turns nothing
                if tau[at] != T::default() {
                    let row = row.as_slice_mut().expect("a fresh array is dense");
                    row[at] = T::ONE;
                    row[at + 1..].copy_from_slice(&self.reflector(j)[1..]);
                }
            }
            // the product of the reflectors is I − vᵀ·t·v, and t⁻¹ is the lower half of v·vᵀ with 1/τ on its diagonal
            // (Puglisi 1992)
            let mut inverse = gemm(v.view(), false, v.view(), true);
            for (diagonal, &tau) in inverse.diag_mut().into_iter().zip(tau) {
                *diagonal = if tau == T::default() {
                    T::ONE
                } else {
                    T::ONE / tau
                };
            }
            let mut t = Array2::eye(width);
            solve_lower(inverse.view(), t.view_mut());
            let mut x = vectors.slice_mut(s![.., start + 1..]);
            let inner = gemm(x.view(), false, v.view(), true);
            let inner = gemm(inner.view(), false, t.view(), false);
            multiply(&mut x, T::ONE, inner.view(), -T::ONE, v.view());
        }
    }
}

/// A pivot below, near the rounding noise of the unit diagonal, is a direction made of noise.
pub const FIRST_PIVOT_MIN: f32 = 1e-2;

/// One below magnifies rounding, which a second pass takes out (CholeskyQR2: Yamamoto et al. 2015) …
pub const EXACT_PIVOT_MIN: f32 = 0.9;

/// … if it finds none below this.
pub const SECOND_PIVOT_MIN: f32 = 0.5;

/// Makes the rows orthonormal, each orthogonal to the ones before it: the first rows keep their direction.
///
/// Cholesky-QR; where the rows are too dependent for it, Householder QR. A symmetric (Löwdin) polish would let
/// badly determined last rows tilt the leading ones.
pub fn orthonormalise_rows(mut a: ArrayViewMut2<f32>) -> Result<()> {
    let pivots = cholesky_rows(a.view_mut(), FIRST_PIVOT_MIN);
    let least = pivots.map(|c| c.diag().iter().fold(1f32, |m, &p| m.min(p)));
    match least {
        Some(least) if least > EXACT_PIVOT_MIN => Ok(()),
        Some(_) if cholesky_rows(a.view_mut(), SECOND_PIVOT_MIN).is_some() => Ok(()),
        _ => householder_rows(a),
    }
}

/// Replaces the rows A by C⁻¹·A with C lower triangular and C·Cᵀ = A·Aᵀ, and returns C.
///
/// Nothing is changed and `None` returned if a pivot of C is not above `pivot_min`: the rows are too dependent.
pub fn cholesky_rows(a: ArrayViewMut2<f32>, pivot_min: f32) -> Option<Array2<f32>> {
    let mut products = Array2::zeros((a.nrows(), a.nrows()));
    add_square_lower(products.view_mut(), a.view());
    let factor = cholesky(products, pivot_min)?;
    solve_lower(factor.view(), a);
    Some(factor)
}

/// C, lower triangular, with C·Cᵀ = A for a symmetric A, of which the lower half is read.
///
/// `None` if a pivot of C is not above `pivot_min`.
pub fn cholesky(mut a: Array2<f32>, pivot_min: f32) -> Option<Array2<f32>> {
    assert!(a.is_square() && a.is_standard_layout());
    let (n, mut info) = (int(a.nrows()), 0);
    // SAFETY: a is square and dense. Row-major lower = column-major upper; potrf gives Cᵀ with C·Cᵀ = A there.
    unsafe { lapack_sys::spotrf_(&UPPER, &n, a.as_mut_ptr(), &n.max(1), &mut info) };
    let sound = info == 0 && a.diag().iter().all(|&pivot| pivot > pivot_min);
    if !sound {
        return None;
    }
    for i in 0..a.nrows() {
        a.slice_mut(s![i, i + 1..]).fill(0.0);
    }
    Some(a)
}

/// x ← l⁻¹·x for a lower triangular l: halves solved in turn down to blocks of which the inverse is at hand, so that nearly
/// all of it is products.
pub fn solve_lower<T: Real>(l: ArrayView2<T>, mut x: ArrayViewMut2<T>) {
    const DIRECT: usize = 32;
    let side = l.nrows();
    if side <= DIRECT {
        let right = x.to_owned();
        let inverse = inverse_lower(l);
        multiply(&mut x, T::default(), inverse.view(), T::ONE, right.view());
        return;
    }
    let half = (side / 2).next_multiple_of(DIRECT);
    let (mut top, mut bottom) = x.split_at(ndarray::Axis(0), half);
    solve_lower(l.slice(s![..half, ..half]), top.view_mut());
    multiply(
        &mut bottom,
        T::ONE,
        l.slice(s![half.., ..half]),
        -T::ONE,
        top.view(),
    );
    solve_lower(l.slice(s![half.., half..]), bottom);
}

/// l⁻¹ of a small lower triangular l, row by row.
fn inverse_lower<T: Real>(l: ArrayView2<T>) -> Array2<T> {
    let side = l.nrows();
    let mut inverse = Array2::eye(side);
    for i in 0..side {
        let (done, mut rest) = inverse.view_mut().split_at(ndarray::Axis(0), i);
        let mut row = rest.row_mut(0);
        for (j, solved) in done.rows().into_iter().enumerate() {
            row.scaled_add(-l[(i, j)], &solved);
        }
        let pivot = l[(i, i)];
        row.mapv_inplace(|x| x / pivot);
    }
    inverse
}

fn householder_rows(mut a: ArrayViewMut2<f32>) -> Result<()> {
    assert!(a.is_standard_layout());
    let (q, l) = a.dim();
    let (n, m) = (int(q), int(l));
    let mut tau = vec![0f32; q];
    let mut work = vec![0f32; 64 * q];
    let lwork = work_len(work.len(), "sgeqrf", q)?;
    let mut info = 0;
    // SAFETY: row-major (q, l) is column-major l × q with leading side l; tau q, work 64 q.
    unsafe {
        lapack_sys::sgeqrf_(
            &m,
            &n,
            a.as_mut_ptr(),
            &m,
            tau.as_mut_ptr(),
            work.as_mut_ptr(),
            &lwork,
            &mut info,
        )
    };
    check("sgeqrf", l, info)?;
    // R's diagonal lies on ours; a negative entry means that the direction was flipped
    let flipped: Vec<bool> = a.diag().iter().map(|&r| r < 0.0).collect();
    // SAFETY: as above.
    unsafe {
        lapack_sys::sorgqr_(
            &m,
            &n,
            &n,
            a.as_mut_ptr(),
            &m,
            tau.as_ptr(),
            work.as_mut_ptr(),
            &lwork,
            &mut info,
        )
    };
    check("sorgqr", l, info)?;
    for (mut row, flip) in a.rows_mut().into_iter().zip(flipped) {
        if flip {
            row.mapv_inplace(|x| -x);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::product::gram;
    use crate::random::normal;
    use ndarray::array;

    #[test]
    fn eigenpairs_come_largest_first() {
        let a = array![[2f64, 1.0, 0.0], [9.9, 2.0, 0.0], [9.9, 9.9, 5.0]];
        let (values, vectors) = Tridiagonal::reduce(a)
            .and_then(|t| t.leading(2))
            .expect("converges");
        assert!((values[0] - 5.0).abs() < 1e-14 && (values[1] - 3.0).abs() < 1e-14);
        assert!((vectors[(0, 2)].abs() - 1.0).abs() < 1e-14);
        assert!((vectors[(1, 0)] - vectors[(1, 1)]).abs() < 1e-14);
    }

    #[test]
    fn some_of_the_eigenvalues_are_those_of_all() {
        for side in [1, 2, 70, 200] {
            let a = normal(side, side, 3);
            let reduced = Tridiagonal::reduce(&a + &a.t()).expect("reduces");
            let (d, e) = (&reduced.diagonal, &reduced.off_diagonal);
            let mut all = f32::all_eigenpairs(d, e).expect("converges").0;
            all.reverse();
            assert_eq!(reduced.eigenvalues().expect("finite").len(), side);
            for range in [0..1, side - 1..side, 0..side, side / 3..side.div_ceil(2)] {
                let some = reduced.values_from(range.clone()).expect("converges");
                assert_eq!(some.len(), range.len());
                for (found, wanted) in some.iter().zip(&all[range]) {
                    // LAPACK's own in f32 err by some units of the largest, which is about 2·√(2·side)
                    let unit = f32::EPSILON * (8.0 * side as f32).sqrt();
                    assert!((found - wanted).abs() < 16.0 * unit, "{found} {wanted}");
                }
            }
        }
    }

    #[test]
    fn eigenpairs_satisfy_their_equation_whatever_the_side() {
        // around the panel and block sides, where an index would be off by one
        for side in [1, 2, 31, 32, 33, 64, 65, 66, 96, 97, 98, 130, 257] {
            let a = gram::<f64>(normal(side, side + 40, 11).view());
            let t = Tridiagonal::reduce(a.clone()).expect("reduces");
            let all = t.eigenvalues().expect("converges");
            let q = side.div_ceil(2);
            let (values, vectors) = t.leading(q).expect("converges");
            let scale = all[0];
            for (i, (&value, x)) in values.iter().zip(vectors.rows()).enumerate() {
                assert!((value - all[i]).abs() < 1e-12 * scale, "side {side}");
                let off = &a.dot(&x) - &(&x * value);
                assert!(
                    off.dot(&off).sqrt() < 1e-13 * side as f64 * scale,
                    "side {side}, pair {i}"
                );
            }
            let unit = vectors.dot(&vectors.t()) - Array2::<f64>::eye(q);
            assert!(unit.iter().all(|x| x.abs() < 1e-12), "side {side}");
        }
    }

    #[test]
    fn a_glimpse_shows_the_eigenvector() {
        let a = gram::<f32>(normal(150, 400, 3).view());
        let t = Tridiagonal::reduce(a).expect("reduces");
        let (values, vectors) = t.leading(4).expect("converges");
        let seen = t.glimpse(1..4).expect("finite");
        assert_eq!(seen.0, values[1..]);
        for (x, y) in seen
            .1
            .rows()
            .into_iter()
            .zip(vectors.rows().into_iter().skip(1))
        {
            assert!(x.dot(&y).abs() > 1.0 - 1e-4);
        }
    }

    #[test]
    fn dependent_rows_become_orthonormal_too() {
        let mut a = array![
            [0.6f32, 0.8, 0.0, 0.0],
            [0.6, 0.8, 1e-9, 0.0],
            [0.0, 0.0, 0.0, 0.0]
        ];
        orthonormalise_rows(a.view_mut()).expect("orthonormal");
        let gram = a.dot(&a.t());
        for ((i, j), g) in gram.indexed_iter() {
            let wanted = if i == j { 1.0 } else { 0.0 };
            assert!((g - wanted).abs() < 1e-6, "{gram:?}");
        }
        let along = a.row(0).dot(&array![0.6, 0.8, 0.0, 0.0]);
        assert!(along > 0.999, "the first row keeps its direction");
    }

    #[test]
    fn cholesky_rows_factor_the_rows() {
        for q in [1, 15, 16, 17, 70] {
            let before = normal(q, 200, q as u64);
            let mut a = before.clone();
            let lower = cholesky_rows(a.view_mut(), 1e-3).expect("independent");
            let unit = a.dot(&a.t()) - Array2::<f32>::eye(q);
            assert!(unit.iter().all(|x| x.abs() < 1e-5), "q {q}");
            let off = lower.dot(&a) - before;
            assert!(off.iter().all(|x| x.abs() < 1e-4), "q {q}");
        }
    }
}
