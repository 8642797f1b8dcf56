//! One panel of the reduction to tridiagonal form, LAPACK's latrd (Dongarra, Sorensen & Hammarling 1989).
//!
//! Half of the whole reduction's work is one product A·v for every column, and each element of A serves two terms of it.
//! Eight rows are read at a time, once for both, by vectors that begin at the same columns in all of them, zeros filling up
//! what is shorter: some 50 Gflop/s of a matrix that fits a core's own cache (side 576, f32, Zen 4, 2026-11), and of one that
//! fits none (side 2048).

use super::real::Real;
use crate::lanes::{Simd, WithSimd, widest_of};

/// A symmetric matrix of which some rows are to be reduced. Its upper half lies in rows of `side` elements.
pub struct Panel<'a, T> {
    /// The whole matrix.
    pub a: &'a mut [T],
    pub side: usize,
    /// The rows before are reduced: `rest` = side − start are left.
    pub start: usize,
    /// How many rows to reduce.
    pub width: usize,
    /// Elements beside the diagonal and factors of the reflectors, from `start` on.
    pub e: &'a mut [T],
    pub tau: &'a mut [T],
    /// (width, stride) each, where stride is a multiple of [`STRIDE`], and not less than the side.
    pub v: &'a mut [T],
    pub w: &'a mut [T],
    pub stride: usize,
}

/// Any vector of a processor divides it.
pub const STRIDE: usize = 64;

impl<T: Real> Panel<'_, T> {
    /// Turns each row of A into its reflector v behind the diagonal, whose first element, 1, is in its place, and fills the
    /// first `rest` elements of each row of V, with zeros before the 1, and of W, of which those before it mean nothing:
    /// A − Vᵀ·W − Wᵀ·V is what is left to reduce.
    pub fn reduce(self) {
        assert!(self.start + self.width < self.side, "a row is left");
        assert!(self.stride.is_multiple_of(STRIDE) && self.stride >= self.side);
        widest_of(self);
    }

    #[inline(always)]
    fn reduce_row<S: Simd>(&mut self, simd: S, i: usize) {
        let rest = self.side - self.start;
        let padded = rest.next_multiple_of(T::lanes::<S>());
        let (v_before, v) = self.v.split_at_mut(i * self.stride);
        let (w_before, w) = self.w.split_at_mut(i * self.stride);
        let (v, w) = (&mut v[..padded], &mut w[..padded]);
        let row = &mut self.a[(self.start + i) * self.side + self.start..][..rest];
        v[..rest].copy_from_slice(row);
        v[rest..].fill(T::default());
        // what the rows before leave of this one, from the vector on that holds its first element
        let mut before = Before {
            v: v_before,
            w: w_before,
            stride: self.stride,
            from: i / T::lanes::<S>() * T::lanes::<S>(),
        };
        let mut factors: Vec<(T, T)> = (0..i).map(|k| before.column(k, i)).collect();
        v[..i].fill(T::default());
        before.subtract(simd, v, &factors);
        (row[i], v[i]) = (v[i], T::default());
        v[..i].fill(T::default());
        let (tau, e) = reflector(&mut v[i + 1..rest]);
        (self.tau[i], self.e[i]) = (tau, e);
        row[i + 1..].copy_from_slice(&v[i + 1..rest]);

        w.fill(T::default());
        Left {
            a: &self.a[self.start * self.side + self.start..],
            side: self.side,
            rows: i + 1..rest,
        }
        .multiply(simd, v, w);
        before.from = (i + 1) / T::lanes::<S>() * T::lanes::<S>();
        before.products(simd, v, &mut factors);
        before.subtract(simd, w, &factors);
        let (w, v) = (&mut w[before.from..], &v[before.from..]);
        let along = T::from_f64(-0.5) * tau * tau * dot(simd, w, v);
        for (w, &v) in w.iter_mut().zip(v) {
            *w = *w * tau + along * v;
        }
    }
}

impl<T: Real> WithSimd for Panel<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for i in 0..self.width {
            self.reduce_row(simd, i);
        }
    }
}

/// Turns x into the v of H = I − τ·vᵀ·v with x·H = (β, 0, …) and v₀ = 1; returns τ and β (LAPACK's larfg).
#[inline(always)]
fn reflector<T: Real>(x: &mut [T]) -> (T, T) {
    let first: f64 = x[0].into();
    x[0] = T::ONE;
    let rest = &mut x[1..];
    // in double precision, in which the squares of single ones neither overflow nor vanish
    let mut sums = [0f64; 16];
    let (chunks, tail) = rest.as_chunks::<16>();
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            let x: f64 = x.into();
            *sum += x * x;
        }
    }
    for (sum, &x) in sums.iter_mut().zip(tail) {
        let x: f64 = x.into();
        *sum += x * x;
    }
    let others: f64 = sums.iter().sum();
    let beta = T::from_f64(-(first * first + others).sqrt().copysign(first));
    let wide: f64 = beta.into();
    if others == 0.0 || wide == 0.0 {
        rest.fill(T::default());
        return (T::default(), T::from_f64(first));
    }
    let scale = 1.0 / (first - wide);
    for x in rest {
        *x = T::from_f64((*x).into() * scale);
    }
    (T::from_f64((wide - first) / wide), beta)
}

/// x·y of whole vectors.
#[inline(always)]
fn dot<T: Real, S: Simd>(simd: S, x: &[T], y: &[T]) -> T {
    let ((x, _), (y, _)) = (T::vectors::<S>(x), T::vectors::<S>(y));
    let mut sum = T::all(simd, T::default());
    for (&x, &y) in x.iter().zip(y) {
        sum = T::add_product(simd, x, y, sum);
    }
    T::total(simd, sum)
}

/// The rows of V and W that are there: of them and of what they meet, whole vectors from `from` on.
struct Before<'a, T> {
    v: &'a [T],
    w: &'a [T],
    stride: usize,
    from: usize,
}

impl<T: Real> Before<'_, T> {
    /// Elements j of row k of W and of V.
    fn column(&self, k: usize, j: usize) -> (T, T) {
        let at = k * self.stride + j;
        (self.w[at], self.v[at])
    }

    /// Row k of V or W.
    #[inline(always)]
    fn row<'a, S: Simd>(&self, of: &'a [T], k: usize) -> &'a [T::Vector<S>] {
        T::vectors::<S>(&of[k * self.stride + self.from..(k + 1) * self.stride]).0
    }

    /// x ← x − Σ f·vₖ + g·wₖ for the factors (f, g).
    #[inline(always)]
    fn subtract<S: Simd>(&self, simd: S, x: &mut [T], factors: &[(T, T)]) {
        /// Vectors of x that are finished at a time.
        const BESIDE: usize = 4;
        let (x, _) = T::vectors_mut::<S>(&mut x[self.from..]);
        let (fours, others) = x.as_chunks_mut::<BESIDE>();
        let whole = fours.len() * BESIDE;
        for (c, x) in fours.iter_mut().enumerate() {
            let mut left = *x;
            for (k, &(f, g)) in factors.iter().enumerate() {
                let v = &self.row::<S>(self.v, k)[c * BESIDE..][..BESIDE];
                let w = &self.row::<S>(self.w, k)[c * BESIDE..][..BESIDE];
                let (f, g) = (T::all(simd, -f), T::all(simd, -g));
                for b in 0..BESIDE {
                    left[b] = T::add_product(simd, v[b], f, left[b]);
                    left[b] = T::add_product(simd, w[b], g, left[b]);
                }
            }
            *x = left;
        }
        for (x, c) in others.iter_mut().zip(whole..) {
            for (k, &(f, g)) in factors.iter().enumerate() {
                let (v, w) = (self.row::<S>(self.v, k)[c], self.row::<S>(self.w, k)[c]);
                *x = T::add_product(simd, v, T::all(simd, -f), *x);
                *x = T::add_product(simd, w, T::all(simd, -g), *x);
            }
        }
    }

    /// x·wₖ and x·vₖ for each row.
    #[inline(always)]
    fn products<S: Simd>(&self, simd: S, x: &[T], to: &mut [(T, T)]) {
        /// Rows that are read at a time.
        const BESIDE: usize = 4;
        let (x, _) = T::vectors::<S>(&x[self.from..]);
        let zero = T::all(simd, T::default());
        let count = to.len();
        for (four, to) in to.chunks_mut(BESIDE).enumerate() {
            let (mut v, mut w) = ([x; BESIDE], [x; BESIDE]);
            let (mut by_v, mut by_w) = ([zero; BESIDE], [zero; BESIDE]);
            for (b, (v, w)) in v.iter_mut().zip(&mut w).enumerate() {
                // the last one again where there are fewer
                let k = (four * BESIDE + b).min(count - 1);
                *v = &self.row::<S>(self.v, k)[..x.len()];
                *w = &self.row::<S>(self.w, k)[..x.len()];
            }
            for (c, &x) in x.iter().enumerate() {
                for b in 0..BESIDE {
                    by_w[b] = T::add_product(simd, w[b][c], x, by_w[b]);
                    by_v[b] = T::add_product(simd, v[b][c], x, by_v[b]);
                }
            }
            for ((to, by_w), by_v) in to.iter_mut().zip(by_w).zip(by_v) {
                *to = (T::total(simd, by_w), T::total(simd, by_v));
            }
        }
    }
}

/// What is left of a symmetric matrix A: the rows, and columns, in a range, of the upper half in rows of `side` elements.
struct Left<'a, T> {
    a: &'a [T],
    side: usize,
    rows: std::ops::Range<usize>,
}

/// Rows that are read together.
const ROWS: usize = 8;

impl<T: Real> Left<'_, T> {
    /// y ← y + A·x, for an x that is zero before the rows, and behind them.
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, x: &[T], y: &mut [T]) {
        let mut i = self.rows.start;
        while i + ROWS <= self.rows.end {
            self.multiply_rows(simd, i, x, y);
            i += ROWS;
        }
        for p in i..self.rows.end {
            let row = &self.a[p * self.side..][..self.rows.end];
            y[p] = y[p] + row[p] * x[p];
            for q in p + 1..self.rows.end {
                y[p] = y[p] + row[q] * x[q];
                y[q] = y[q] + row[q] * x[p];
            }
        }
    }

    /// Adds what rows i … i + 7 give, behind the diagonal for themselves and for the rows that mirror them.
    #[inline(always)]
    fn multiply_rows<S: Simd>(&self, simd: S, i: usize, x: &[T], y: &mut [T]) {
        let (lanes, end) = (T::lanes::<S>(), self.rows.end);
        let whole = end / lanes;
        // vectors that hold an element on the diagonal or before it
        let corner = i / lanes..(i + ROWS).div_ceil(lanes).min(whole);
        let (x_vectors, _) = T::vectors::<S>(x);
        let mut sums = [T::all(simd, T::default()); ROWS];
        let mut factors = sums;
        let mut rows = [self.a; ROWS];
        let mut vectors = [x_vectors; ROWS];
        for p in 0..ROWS {
            factors[p] = T::all(simd, x[i + p]);
            rows[p] = &self.a[(i + p) * self.side..][..end];
            vectors[p] = &T::vectors::<S>(rows[p]).0[..whole];
        }
        // no closures: what they call is not compiled for the vectors of this function
        let (y_vectors, _) = T::vectors_mut::<S>(y);
        for c in corner.clone() {
            let mut new = y_vectors[c];
            for p in 0..ROWS {
                let row = T::behind(simd, vectors[p][c], (i + p + 1).saturating_sub(c * lanes));
                sums[p] = T::add_product(simd, row, x_vectors[c], sums[p]);
                new = T::add_product(simd, row, factors[p], new);
            }
            y_vectors[c] = new;
        }
        let (x_whole, y_whole) = (&x_vectors[..whole], &mut y_vectors[..whole]);
        for c in corner.end..whole {
            let mut new = y_whole[c];
            for p in 0..ROWS {
                sums[p] = T::add_product(simd, vectors[p][c], x_whole[c], sums[p]);
                new = T::add_product(simd, vectors[p][c], factors[p], new);
            }
            y_whole[c] = new;
        }
        if whole * lanes < end {
            let mut new = y_vectors[whole];
            for p in 0..ROWS {
                let row = T::part(simd, &rows[p][whole * lanes..]);
                let before = (i + p + 1).saturating_sub(whole * lanes);
                let row = T::behind(simd, row, before);
                sums[p] = T::add_product(simd, row, x_vectors[whole], sums[p]);
                new = T::add_product(simd, row, factors[p], new);
            }
            y_vectors[whole] = new;
        }
        for p in 0..ROWS {
            let own = rows[p][i + p] * x[i + p] + T::total(simd, sums[p]);
            y[i + p] = y[i + p] + own;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::product::gram;
    use crate::random::normal;
    use ndarray::{Array2, s};

    /// Reduces `width` rows behind `start` and compares with the reflectors applied to the whole matrix.
    fn assert_reduces<T: Real>(side: usize, start: usize, width: usize, unit: f64) {
        let whole = gram::<T>(normal(side, side + 9, (side + width) as u64).view());
        let mut a = whole.clone();
        // nothing below the diagonal may be read
        for i in 0..side {
            a.slice_mut(s![i, ..i]).fill(T::from_f64(f64::NAN));
        }
        let (mut e, mut tau) = (vec![T::default(); side], vec![T::default(); side]);
        let stride = side.next_multiple_of(STRIDE);
        // what was there before must not matter
        let stale = T::from_f64(f64::NAN);
        let (mut v, mut w) = (vec![stale; width * stride], vec![stale; width * stride]);
        let panel = Panel {
            a: a.as_slice_mut().expect("dense"),
            side,
            start,
            width,
            e: &mut e,
            tau: &mut tau,
            v: &mut v,
            w: &mut w,
            stride,
        };
        panel.reduce();
        let rest = side - start;
        let wide = |x: T| -> f64 { x.into() };
        let mut expected = whole.slice(s![start.., start..]).mapv(wide);
        let scale = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
        for i in 0..width {
            let mut v = ndarray::Array1::<f64>::zeros(rest);
            for k in i + 1..rest {
                v[k] = wide(a[(start + i, start + k)]);
            }
            assert_eq!(v[i + 1], 1.0, "the first element is in its place");
            let column = v.view().insert_axis(ndarray::Axis(1)).to_owned();
            let h = Array2::eye(rest) - column.dot(&column.t()) * wide(tau[i]);
            expected = h.dot(&expected).dot(&h);
            let off = expected[(i, i + 1)] - wide(e[i]);
            assert!(off.abs() < unit * scale * side as f64, "row {i}: {off}");
            let left = expected.slice(s![i, i + 2..]);
            assert!(left.iter().all(|x| x.abs() < unit * scale * side as f64));
            let diagonal = wide(a[(start + i, start + i)]) - expected[(i, i)];
            assert!(diagonal.abs() < unit * scale * side as f64, "row {i}");
        }
        // V and W take the same from what is left
        for p in width..rest {
            for q in p..rest {
                let mut left = wide(whole[(start + p, start + q)]);
                for i in 0..width {
                    let v = |k: usize| wide(v[i * stride + k]);
                    let w = |k: usize| wide(w[i * stride + k]);
                    left -= v(p) * w(q) + w(p) * v(q);
                }
                let off = left - expected[(p, q)];
                assert!(
                    off.abs() < 4.0 * unit * scale * side as f64,
                    "({p}, {q}): {off}"
                );
            }
        }
    }

    #[test]
    fn a_panel_is_what_its_reflectors_make_of_the_matrix() {
        // around whole vectors and groups of rows, at the start and further in
        for (side, start, width) in [(9, 0, 3), (40, 0, 8), (41, 5, 4), (71, 33, 32), (98, 1, 32)] {
            assert_reduces::<f32>(side, start, width, f32::EPSILON.into());
            assert_reduces::<f64>(side, start, width, f64::EPSILON);
        }
    }

    #[test]
    fn a_row_with_nothing_to_reduce_stays() {
        for x in [[3.0f32, 0.0, 0.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 0.0]] {
            let mut v = x;
            assert_eq!(reflector(&mut v), (0.0, x[0]));
            assert_eq!(v, [1.0, 0.0, 0.0]);
        }
        // squares that f32 cannot hold
        for size in [1e-30f32, 1e30] {
            let mut v = [3.0 * size, 0.0, 4.0 * size];
            let (tau, beta) = reflector(&mut v);
            assert!((beta / size + 5.0).abs() < 1e-5 && (tau - 1.6).abs() < 1e-6);
            assert!((v[2] - 0.5).abs() < 1e-6);
        }
    }
}
