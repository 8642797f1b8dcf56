//! One panel of the reduction to tridiagonal form, LAPACK's latrd (Dongarra, Sorensen & Hammarling 1989).
//!
//! Half of the whole reduction's work is one product A·v for every column, and each element of A serves two terms of it.
//! Four rows are read at a time, once for both: 90 Gflop/s where OpenBLAS 0.3.21 does 55, of a matrix that fits a core's own
//! cache (side 576, f32, Zen 5, 2026-11), and 34 for 25 of one that fits none (side 3072).

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
    /// (width, side)
    pub w: &'a mut [T],
}

impl<T: Real> Panel<'_, T> {
    /// Turns each row into its reflector v behind the diagonal, whose first element, 1, is in its place, and fills the first
    /// `rest` elements of each row of w: A − Vᵀ·W − Wᵀ·V is what is left to reduce.
    pub fn reduce(self) {
        assert!(self.start + self.width < self.side, "a row is left");
        widest_of(self);
    }

    #[inline(always)]
    fn reduce_row<S: Simd>(&mut self, simd: S, i: usize) {
        let (side, r) = (self.side, self.start + i);
        let rest = side - self.start;
        let (above, below) = self.a.split_at_mut(r * side);
        let (row, below) = below.split_at_mut(side);
        let row = &mut row[r..];
        let (w_above, w) = self.w.split_at_mut(i * side);
        let v_of = |k: usize| &above[(self.start + k) * side..][..side];
        let w_of = |k: usize| &w_above[k * side..][..rest];
        // what the rows before leave of this one
        for k in 0..i {
            let (v, w) = (v_of(k), w_of(k));
            subtract(simd, row, (&v[r..], w[i]), (&w[i..], v[r]));
        }
        (self.tau[i], self.e[i]) = reflector(&mut row[1..]);
        let (v, tau) = (&row[1..], self.tau[i]);
        let w = &mut w[i + 1..rest];
        w.fill(T::default());
        symmetric_product(simd, &below[r + 1..], side, v, w);
        for k in 0..i {
            let (v_before, w_before) = (&v_of(k)[r + 1..], &w_of(k)[i + 1..]);
            let [by_w, by_v] = dots(simd, v, w_before, v_before);
            subtract(simd, w, (v_before, by_w), (w_before, by_v));
        }
        let [along, _] = dots(simd, v, w, v);
        let along = T::from_f64(-0.5) * tau * tau * along;
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

/// x ← x − f·a − g·b
#[inline(always)]
fn subtract<T: Real, S: Simd>(simd: S, x: &mut [T], (a, f): (&[T], T), (b, g): (&[T], T)) {
    let (f, g) = (T::all(simd, -f), T::all(simd, -g));
    let (x, x_tail) = T::vectors_mut::<S>(x);
    let ((a, a_tail), (b, b_tail)) = (T::vectors::<S>(a), T::vectors::<S>(b));
    for ((x, &a), &b) in x.iter_mut().zip(a).zip(b) {
        *x = T::add_product(simd, a, f, T::add_product(simd, b, g, *x));
    }
    let (a, b) = (T::part(simd, a_tail), T::part(simd, b_tail));
    let x = T::add_product(simd, b, g, T::part(simd, x_tail));
    T::store_part(simd, x_tail, T::add_product(simd, a, f, x));
}

/// x·a and x·b
#[inline(always)]
fn dots<T: Real, S: Simd>(simd: S, x: &[T], a: &[T], b: &[T]) -> [T; 2] {
    let zero = T::all(simd, T::default());
    let (x, x_tail) = T::vectors::<S>(x);
    let ((a, a_tail), (b, b_tail)) = (T::vectors::<S>(a), T::vectors::<S>(b));
    let (mut by_a, mut by_b) = (zero, zero);
    for ((&x, &a), &b) in x.iter().zip(a).zip(b) {
        by_a = T::add_product(simd, x, a, by_a);
        by_b = T::add_product(simd, x, b, by_b);
    }
    let x = T::part(simd, x_tail);
    by_a = T::add_product(simd, x, T::part(simd, a_tail), by_a);
    by_b = T::add_product(simd, x, T::part(simd, b_tail), by_b);
    [T::total(simd, by_a), T::total(simd, by_b)]
}

/// Rows that are read together.
const ROWS: usize = 4;

/// y ← y + A·x for the symmetric matrix A whose upper half lies in rows of `side` elements, A's first element first.
#[inline(always)]
fn symmetric_product<T: Real, S: Simd>(simd: S, a: &[T], side: usize, x: &[T], y: &mut [T]) {
    let n = x.len();
    for i in (0..n).step_by(ROWS) {
        // the corner on the diagonal
        let rows = ROWS.min(n - i);
        for p in 0..rows {
            let row = &a[(i + p) * side + i..][..rows];
            y[i + p] = y[i + p] + row[p] * x[i + p];
            for q in p + 1..rows {
                y[i + p] = y[i + p] + row[q] * x[i + q];
                y[i + q] = y[i + q] + row[q] * x[i + p];
            }
        }
        if rows < ROWS {
            break;
        }
        let beyond = i + ROWS;
        let rows = std::array::from_fn(|p| &a[(i + p) * side + beyond..][..n - beyond]);
        let factors = std::array::from_fn(|p| x[i + p]);
        let (y, y_beyond) = y.split_at_mut(beyond);
        let sums = both_ways(simd, rows, factors, &x[beyond..], y_beyond);
        for (y, sum) in y[i..].iter_mut().zip(sums) {
            *y = *y + sum;
        }
    }
}

/// y ← y + Σ factor·row; returns row·x for each.
#[inline(always)]
fn both_ways<T: Real, S: Simd>(
    simd: S,
    rows: [&[T]; ROWS],
    factors: [T; ROWS],
    x: &[T],
    y: &mut [T],
) -> [T; ROWS] {
    // no closures: what they call is not compiled for the vectors of this function
    let [f, g, h, k] = factors;
    let factors = [
        T::all(simd, f),
        T::all(simd, g),
        T::all(simd, h),
        T::all(simd, k),
    ];
    let zero = T::all(simd, T::default());
    let (x, x_tail) = T::vectors::<S>(x);
    let (y, y_tail) = T::vectors_mut::<S>(y);
    let [a, b, c, d] = rows;
    let ((a, a_tail), (b, b_tail)) = (T::vectors::<S>(a), T::vectors::<S>(b));
    let ((c, c_tail), (d, d_tail)) = (T::vectors::<S>(c), T::vectors::<S>(d));
    let mut sums = [zero; ROWS];
    for (((y, &x), (&a, &b)), (&c, &d)) in y
        .iter_mut()
        .zip(x)
        .zip(a.iter().zip(b))
        .zip(c.iter().zip(d))
    {
        *y = both_ways_of::<T, S>(simd, [a, b, c, d], factors, x, *y, &mut sums);
    }
    let (a, b) = (T::part(simd, a_tail), T::part(simd, b_tail));
    let tails = [a, b, T::part(simd, c_tail), T::part(simd, d_tail)];
    let (x, y) = (T::part(simd, x_tail), T::part(simd, y_tail));
    let last = both_ways_of::<T, S>(simd, tails, factors, x, y, &mut sums);
    T::store_part(simd, y_tail, last);
    let [a, b, c, d] = sums;
    let (a, b) = (T::total(simd, a), T::total(simd, b));
    [a, b, T::total(simd, c), T::total(simd, d)]
}

/// The same of one vector of each row: returns the new y, and adds to the sums.
#[inline(always)]
fn both_ways_of<T: Real, S: Simd>(
    simd: S,
    [a, b, c, d]: [T::Vector<S>; ROWS],
    [f, g, h, k]: [T::Vector<S>; ROWS],
    x: T::Vector<S>,
    y: T::Vector<S>,
    [ax, bx, cx, dx]: &mut [T::Vector<S>; ROWS],
) -> T::Vector<S> {
    *ax = T::add_product(simd, a, x, *ax);
    *bx = T::add_product(simd, b, x, *bx);
    *cx = T::add_product(simd, c, x, *cx);
    *dx = T::add_product(simd, d, x, *dx);
    let near = T::add_product(simd, a, f, T::add_product(simd, b, g, y));
    T::add_product(simd, c, h, T::add_product(simd, d, k, near))
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
        let mut w = vec![T::default(); width * side];
        let panel = Panel {
            a: a.as_slice_mut().expect("dense"),
            side,
            start,
            width,
            e: &mut e,
            tau: &mut tau,
            w: &mut w,
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
                    let v = |k: usize| wide(a[(start + i, start + k)]);
                    let w = |k: usize| wide(w[i * side + k]);
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
