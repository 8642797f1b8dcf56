//! Eigenpairs of a tridiagonal matrix, each for itself, as many beside each other as the processor's vectors hold.
//!
//! Values by bisection on Sturm's sequence (Givens 1954), vectors by twisted factorisations (Fernando 1997; Parlett & Dhillon
//! 1997), all in f64. A pair of a matrix of side s costs some 60·s steps and nothing else, where divide and conquer needs
//! all vectors of both halves: 2 ms for half of the pairs of 576 and 25 ms of 2048, where that took 4 and 90 (Zen 4,
//! 2026-11). Vectors are orthogonal as far as their values lie apart; where they do not, it says so.

use std::ops::Range;

use ndarray::{Array2, ArrayViewMut2, Axis, s};

use super::real::{Real, zeros};
use crate::lanes::{Simd, WithSimd, widest_of};

/// Vectors of the processor beside each other: the chains of one fill the gaps of the other's.
const BESIDE: usize = 2;

/// Width to which values are bisected at first, relative to the matrix: one Rayleigh quotient makes rounding of it where
/// neighbours lie some 10⁻⁹ apart.
const WIDTH: f64 = 1e-11;

/// ‖T·x − λ·x‖ of an exact pair, relative to the matrix: some ten times what rounding makes of it at a side of 3072.
const RESIDUAL: f64 = 1e-14;

/// What two vectors of length 1 may have in common.
const LEAST_ANGLE: f64 = 1e-7;

/// More than this of a vector is not taken out of another: what would be left means nothing.
const MOST_IN_COMMON: f64 = 0.1;

/// An element beside the diagonal below this, relative to the matrix, is rounding: as large as this it keeps the halves it
/// joins from being told apart by a division by zero.
const LEAST_JOINT: f64 = 1e-18;

/// A pivot below this counts as this.
const LEAST_PIVOT: f64 = 1e-30;

/// What of a vector is below this counts as zero: no product of it is denormal.
const LEAST_ELEMENT: f64 = 1e-150;

/// Steps of Sturm's sequence without a look at its size: each makes it larger by 3 at most, smaller by LEAST_JOINT² at most.
const STEPS: usize = 8;

/// The eigenvalues, descending, at some places, of which 0 is the largest's, of the matrix T (s, s) with `d` on its diagonal
/// and the first s − 1 of `e` beside it; `None` if they are not finite.
pub fn values<T: Real>(d: &[T], e: &[T], places: Range<usize>) -> Option<Vec<T>> {
    let matrix = Scaled::of(d, e)?;
    Some(matrix.unscaled(&matrix.bisect(places, f64::EPSILON)))
}

/// As [`values`], with the eigenvectors.
pub fn pairs<T: Real>(d: &[T], e: &[T], places: Range<usize>) -> Option<Pairs<T>> {
    let matrix = Scaled::of(d, e)?;
    let pairs = matrix.pairs(places.clone(), WIDTH);
    if pairs.are_apart {
        return Some(pairs);
    }
    // one set of vectors at a time
    drop(pairs);
    Some(matrix.pairs(places, f64::EPSILON))
}

/// Takes out of each row of unit length what it has of those before it (Gram–Schmidt); says whether that was little.
fn orthogonalise<T: Real>(mut rows: ArrayViewMut2<T>) -> bool {
    let dot = |x: &[T], y: &[T]| -> f64 {
        let products = x.iter().zip(y).map(|(&x, &y)| x.into() * y.into());
        products.sum()
    };
    for i in 1..rows.nrows() {
        let (before, mut rest) = rows.view_mut().split_at(Axis(0), i);
        let row = rest.row_mut(0).into_slice().expect("rows are dense");
        for other in before.rows() {
            let other = other.to_slice().expect("rows are dense");
            let common = dot(row, other);
            if common.is_nan() || common.abs() > MOST_IN_COMMON {
                return false;
            }
            for (x, &y) in row.iter_mut().zip(other) {
                *x = T::from_f64((*x).into() - common * y.into());
            }
        }
        let scale = 1.0 / dot(row, row).sqrt();
        for x in row {
            *x = T::from_f64((*x).into() * scale);
        }
    }
    true
}

/// Some eigenvalues, descending, and their eigenvectors, one per row.
pub struct Pairs<T> {
    pub values: Vec<T>,
    pub vectors: Array2<T>,
    /// Whether they are exact, and the vectors orthogonal to single precision. Else some of them may be the same.
    pub are_apart: bool,
}

/// T in f64, divided so that no value is above 1.
struct Scaled {
    d: Vec<f64>,
    e: Vec<f64>,
    /// −e², behind a zero: as many as d.
    minus_e2: Vec<f64>,
    /// What T was divided by, a power of two.
    size: f64,
}

impl Scaled {
    fn of<T: Real>(d: &[T], e: &[T]) -> Option<Self> {
        let side = d.len();
        assert!(side > 0 && e.len() + 1 >= side, "s values, and s − 1");
        let wide = |values: &[T]| values.iter().map(|&x| x.into()).collect::<Vec<f64>>();
        let (mut d, mut e) = (wide(d), wide(&e[..side - 1]));
        // Gershgorin's bound
        let beside = |i: usize| e.get(i).map_or(0.0, |x| x.abs());
        let radius = |i: usize| beside(i) + beside(i.wrapping_sub(1));
        let bounds = d.iter().enumerate().map(|(i, x)| x.abs() + radius(i));
        let bound = bounds.fold(0.0, f64::max);
        let are_finite = d.iter().chain(&e).all(|x| x.is_finite());
        if !(are_finite && bound.is_finite()) {
            return None;
        }
        let size = if bound.is_normal() {
            bound.log2().ceil().exp2()
        } else {
            1.0
        };
        d.iter_mut().for_each(|x| *x /= size);
        for x in &mut e {
            *x /= size;
            if x.abs() < LEAST_JOINT {
                *x = LEAST_JOINT.copysign(*x);
            }
        }
        let minus_e2 = std::iter::once(0.0).chain(e.iter().map(|x| -x * x));
        Some(Self {
            minus_e2: minus_e2.collect(),
            d,
            e,
            size,
        })
    }

    fn unscaled<T: Real>(&self, values: &[f64]) -> Vec<T> {
        values.iter().map(|x| T::from_f64(x * self.size)).collect()
    }

    /// The pairs at some places, from values bisected to `width`.
    fn pairs<T: Real>(&self, places: Range<usize>, width: f64) -> Pairs<T> {
        let mut values = self.bisect(places, width);
        let mut vectors = zeros(values.len(), self.d.len());
        let mut residuals = vec![0.0; values.len()];
        widest_of(Twisted {
            matrix: self,
            values: &mut values,
            vectors: vectors.view_mut(),
            residuals: &mut residuals,
        });
        let are_exact = residuals.iter().all(|&residual| residual <= RESIDUAL);
        // (λ − μ)·xᵀy = rₓᵀy − xᵀr_y: bounded for neighbours, it is for all; those too close for that are made orthogonal
        let is_close =
            |i: usize| residuals[i - 1] + residuals[i] > LEAST_ANGLE * (values[i - 1] - values[i]);
        let mut are_apart = true;
        let mut first = 0;
        for i in 1..=values.len() {
            if i == values.len() || !is_close(i) {
                are_apart &= orthogonalise(vectors.slice_mut(s![first..i, ..]));
                first = i;
            }
        }
        Pairs {
            values: self.unscaled(&values),
            vectors,
            are_apart: are_apart && are_exact,
        }
    }

    /// Eigenvalues, descending, to `width`.
    fn bisect(&self, places: Range<usize>, width: f64) -> Vec<f64> {
        let side = self.d.len();
        assert!(places.start < places.end && places.end <= side);
        // a grid first: one count for each of its points serves all values
        let cells = places.len() + 1;
        let points: Vec<f64> = (0..=cells)
            .map(|i| 2.0 * i as f64 / cells as f64 - 1.0)
            .collect();
        let mut below = vec![0.0; cells - 1];
        self.count_below(&points[1..cells], &mut below);
        // as many values lie below the one that is looked for
        let wanted: Vec<f64> = places.map(|place| (side - 1 - place) as f64).collect();
        let cell = |&wanted: &f64| below.partition_point(|&count| count <= wanted);
        let (mut low, mut high): (Vec<f64>, Vec<f64>) = wanted
            .iter()
            .map(cell)
            .map(|cell| (points[cell], points[cell + 1]))
            .unzip();
        let middle = |low: &[f64], high: &[f64]| -> Vec<f64> {
            let ends = low.iter().zip(high);
            ends.map(|(low, high)| 0.5 * (low + high)).collect()
        };
        let mut at = middle(&low, &high);
        let mut wide = 2.0 / cells as f64;
        let mut below = vec![0.0; wanted.len()];
        while wide > width {
            self.count_below(&at, &mut below);
            for (i, at) in at.iter_mut().enumerate() {
                if below[i] <= wanted[i] {
                    low[i] = *at;
                } else {
                    high[i] = *at;
                }
                *at = 0.5 * (low[i] + high[i]);
            }
            wide *= 0.5;
        }
        at
    }

    fn count_below(&self, at: &[f64], counts: &mut [f64]) {
        let matrix = self;
        widest_of(Below { matrix, at, counts });
    }
}

/// How many eigenvalues lie below each of some numbers: the changes of sign of Sturm's sequence.
struct Below<'a> {
    matrix: &'a Scaled,
    at: &'a [f64],
    counts: &'a mut [f64],
}

impl WithSimd for Below<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = BESIDE * S::F64_LANES;
        let mut counts = self.counts.chunks_mut(width);
        for at in self.at.chunks(width) {
            let counts = counts.next().expect("one for each");
            store(simd, counts, changes(simd, self.matrix, load(simd, at)));
        }
    }
}

/// pᵢ₊₁ = (dᵢ − x)·pᵢ − eᵢ₋₁²·pᵢ₋₁, without divisions: how often its sign changes.
#[inline(always)]
fn changes<S: Simd>(simd: S, matrix: &Scaled, at: Beside<S>) -> Beside<S> {
    let (zero, one) = (simd.splat_f64s(0.0), simd.splat_f64s(1.0));
    let sign = simd.splat_f64s(-0.0);
    let exponent = simd.splat_u64s(0x7ff0_0000_0000_0000);
    let twice_one = simd.splat_u64s(0x7fe0_0000_0000_0000);
    let (mut before, mut p) = ([zero; BESIDE], [one; BESIDE]);
    // 1 for each sign that stays, −1 for each that changes
    let mut signs = [zero; BESIDE];
    let steps = matrix.d.chunks(STEPS).zip(matrix.minus_e2.chunks(STEPS));
    for (d, minus_e2) in steps {
        for (&d, &minus_e2) in d.iter().zip(minus_e2) {
            let (d, minus_e2) = (simd.splat_f64s(d), simd.splat_f64s(minus_e2));
            for v in 0..BESIDE {
                let others = simd.mul_f64s(minus_e2, before[v]);
                let next = simd.mul_add_e_f64s(simd.sub_f64s(d, at[v]), p[v], others);
                let turned = simd.and_f64s(simd.xor_f64s(next, p[v]), sign);
                signs[v] = simd.add_f64s(signs[v], simd.or_f64s(turned, one));
                before[v] = p[v];
                p[v] = next;
            }
        }
        for v in 0..BESIDE {
            // divided by the power of two in the larger one
            let larger = simd.max_f64s(simd.abs_f64s(p[v]), simd.abs_f64s(before[v]));
            let power = simd.and_u64s(simd.transmute_u64s_f64s(larger), exponent);
            let inverse = simd.transmute_f64s_u64s(simd.sub_u64s(twice_one, power));
            p[v] = simd.mul_f64s(p[v], inverse);
            before[v] = simd.mul_f64s(before[v], inverse);
        }
    }
    let (side, half) = (simd.splat_f64s(matrix.d.len() as f64), simd.splat_f64s(0.5));
    let mut counts = [zero; BESIDE];
    for v in 0..BESIDE {
        counts[v] = simd.mul_f64s(half, simd.sub_f64s(side, signs[v]));
    }
    counts
}

/// The vector of each value, which it makes better on the way.
struct Twisted<'a, T> {
    matrix: &'a Scaled,
    values: &'a mut [f64],
    /// (values, s)
    vectors: ArrayViewMut2<'a, T>,
    /// ‖T·x − λ·x‖ of each.
    residuals: &'a mut [f64],
}

impl<T: Real> WithSimd for Twisted<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (side, width) = (self.matrix.d.len(), BESIDE * S::F64_LANES);
        let count = self.values.len();
        let zeros = [simd.splat_f64s(0.0); BESIDE];
        let mut room = Room::<S>::of(zeros, side);
        let vectors = self.vectors.as_slice_mut().expect("fresh and dense");
        let mut lanes = vec![0.0; width];
        for start in (0..count).step_by(width) {
            let end = count.min(start + width);
            let mut at = load(simd, &self.values[start..end]);
            let (off, square) = room.solve(simd, self.matrix, at);
            for v in 0..BESIDE {
                // the Rayleigh quotient of x
                at[v] = simd.add_f64s(at[v], simd.div_f64s(off[v], square[v]));
            }
            let (_, square) = room.solve(simd, self.matrix, at);
            let mut scale = square;
            for v in 0..BESIDE {
                scale[v] = simd.div_f64s(simd.splat_f64s(1.0), simd.sqrt_f64s(square[v]));
            }
            let residual = room.residual(simd, self.matrix, at, scale);
            store(simd, &mut self.values[start..end], at);
            store(simd, &mut self.residuals[start..end], residual);
            let vectors = &mut vectors[start * side..end * side];
            for (i, &x) in room.x.iter().enumerate() {
                let mut scaled = x;
                for v in 0..BESIDE {
                    scaled[v] = simd.mul_f64s(x[v], scale[v]);
                }
                store(simd, &mut lanes, scaled);
                let column = vectors[i..].iter_mut().step_by(side);
                for (to, &x) in column.zip(&lanes) {
                    *to = T::from_f64(x);
                }
            }
        }
    }
}

/// A number of each of the matrices T − λ that are looked at beside each other.
type Beside<S> = [<S as Simd>::f64s; BESIDE];

/// What the vectors of some values are made of, each of them s times.
struct Room<S: Simd> {
    /// Factors of the elimination from the top, e/pivot, and of that from the bottom.
    down: Vec<Beside<S>>,
    up: Vec<Beside<S>>,
    /// The pivots from the top.
    pivots: Vec<Beside<S>>,
    x: Vec<Beside<S>>,
}

impl<S: Simd> Room<S> {
    fn of(zeros: Beside<S>, side: usize) -> Self {
        Self {
            down: vec![zeros; side],
            up: vec![zeros; side],
            pivots: vec![zeros; side],
            x: vec![zeros; side],
        }
    }

    /// The x with (T − λ)·x = γₖ·eₖ and xₖ = 1, for the k of which |γₖ| is the least: γₖ and ‖x‖².
    ///
    /// From the top and from the bottom, T − λ is eliminated up to k, where γₖ is the pivot that is left.
    #[inline(always)]
    fn solve(&mut self, simd: S, matrix: &Scaled, at: Beside<S>) -> (Beside<S>, Beside<S>) {
        let side = matrix.d.len();
        let (d, e) = (&matrix.d[..side], &matrix.e[..side - 1]);
        let (down, up) = (&mut self.down[..side], &mut self.up[..side]);
        let (pivots, x) = (&mut self.pivots[..side], &mut self.x[..side]);
        let (zero, one) = (simd.splat_f64s(0.0), simd.splat_f64s(1.0));

        let mut pivot = at;
        for v in 0..BESIDE {
            pivot[v] = not_zero(simd, simd.sub_f64s(simd.splat_f64s(d[0]), at[v]));
        }
        pivots[0] = pivot;
        for i in 1..side {
            let (d, e) = (simd.splat_f64s(d[i]), simd.splat_f64s(e[i - 1]));
            for v in 0..BESIDE {
                let factor = simd.div_f64s(e, pivot[v]);
                down[i - 1][v] = factor;
                let taken = simd.mul_f64s(e, factor);
                pivot[v] = not_zero(simd, simd.sub_f64s(simd.sub_f64s(d, at[v]), taken));
            }
            pivots[i] = pivot;
        }
        let mut least = pivot;
        let mut place = [simd.splat_f64s((side - 1) as f64); BESIDE];
        for v in 0..BESIDE {
            pivot[v] = not_zero(simd, simd.sub_f64s(simd.splat_f64s(d[side - 1]), at[v]));
        }
        for i in (0..side - 1).rev() {
            let (d, e) = (simd.splat_f64s(d[i]), simd.splat_f64s(e[i]));
            let here = simd.splat_f64s(i as f64);
            for v in 0..BESIDE {
                let factor = simd.div_f64s(e, pivot[v]);
                up[i][v] = factor;
                let taken = simd.mul_f64s(e, factor);
                pivot[v] = not_zero(simd, simd.sub_f64s(simd.sub_f64s(d, at[v]), taken));
                let left = simd.sub_f64s(pivots[i][v], taken);
                let less = simd.less_than_f64s(simd.abs_f64s(left), simd.abs_f64s(least[v]));
                least[v] = simd.select_f64s(less, left, least[v]);
                place[v] = simd.select_f64s(less, here, place[v]);
            }
        }

        // below k …
        let mut element = at;
        for v in 0..BESIDE {
            element[v] = simd.select_f64s(simd.equal_f64s(place[v], zero), one, zero);
        }
        x[0] = element;
        for i in 1..side {
            let here = simd.splat_f64s(i as f64);
            for v in 0..BESIDE {
                let next = not_denormal(simd, simd.mul_f64s(up[i - 1][v], element[v]));
                let first = simd.equal_f64s(here, place[v]);
                element[v] = simd.select_f64s(first, one, simd.neg_f64s(next));
            }
            x[i] = element;
        }
        // … and above it
        let mut square = element;
        for v in 0..BESIDE {
            square[v] = simd.mul_f64s(element[v], element[v]);
        }
        for i in (0..side - 1).rev() {
            let here = simd.splat_f64s(i as f64);
            for v in 0..BESIDE {
                let next = not_denormal(simd, simd.mul_f64s(down[i][v], element[v]));
                let above = simd.less_than_f64s(here, place[v]);
                element[v] = simd.select_f64s(above, simd.neg_f64s(next), x[i][v]);
                square[v] = simd.mul_add_e_f64s(element[v], element[v], square[v]);
            }
            x[i] = element;
        }
        (least, square)
    }

    /// ‖T·x − λ·x‖ for `scale` times what was solved.
    #[inline(always)]
    fn residual(&self, simd: S, matrix: &Scaled, at: Beside<S>, scale: Beside<S>) -> Beside<S> {
        let zero = simd.splat_f64s(0.0);
        let (mut before, mut sum) = ([zero; BESIDE], [zero; BESIDE]);
        // T has no first row's left neighbour, nor a last row's right one
        let mut left = zero;
        for (i, (&d, x)) in matrix.d.iter().zip(&self.x).enumerate() {
            let d = simd.splat_f64s(d);
            let right = simd.splat_f64s(matrix.e.get(i).copied().unwrap_or(0.0));
            let after = self.x.get(i + 1).unwrap_or(x);
            for v in 0..BESIDE {
                let own = simd.mul_f64s(simd.sub_f64s(d, at[v]), x[v]);
                let off = simd.mul_add_e_f64s(right, after[v], own);
                let off = simd.mul_add_e_f64s(left, before[v], off);
                let off = simd.mul_f64s(off, scale[v]);
                sum[v] = simd.mul_add_e_f64s(off, off, sum[v]);
            }
            (before, left) = (*x, right);
        }
        for sum in &mut sum {
            *sum = simd.sqrt_f64s(*sum);
        }
        sum
    }
}

#[inline(always)]
fn not_zero<S: Simd>(simd: S, pivot: S::f64s) -> S::f64s {
    let least = simd.splat_f64s(LEAST_PIVOT);
    let is_less = simd.less_than_f64s(simd.abs_f64s(pivot), least);
    simd.select_f64s(is_less, least, pivot)
}

#[inline(always)]
fn not_denormal<S: Simd>(simd: S, element: S::f64s) -> S::f64s {
    let least = simd.splat_f64s(LEAST_ELEMENT);
    let is_less = simd.less_than_f64s(simd.abs_f64s(element), least);
    simd.select_f64s(is_less, simd.splat_f64s(0.0), element)
}

/// Numbers for the vectors of the processor, zeros behind them.
#[inline(always)]
fn load<S: Simd>(simd: S, from: &[f64]) -> Beside<S> {
    let mut to = [simd.splat_f64s(0.0); BESIDE];
    for (to, from) in to.iter_mut().zip(from.chunks(S::F64_LANES)) {
        *to = simd.partial_load_f64s(from);
    }
    to
}

#[inline(always)]
fn store<S: Simd>(simd: S, to: &mut [f64], from: Beside<S>) {
    for (to, from) in to.chunks_mut(S::F64_LANES).zip(from) {
        simd.partial_store_f64s(to, from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;

    /// ‖T·x − λ·x‖, orthogonality and values against LAPACK's own, for pairs at some places.
    fn assert_pairs(d: &[f64], e: &[f64], places: Range<usize>) {
        let side = d.len();
        let all = f64::all_eigenpairs(d, e).expect("converges").0;
        let pairs = pairs(d, e, places.clone()).expect("finite");
        assert!(pairs.are_apart, "{places:?} of {side}");
        assert_eq!(pairs.vectors.dim(), (places.len(), side));
        let alone = values(d, e, places.clone()).expect("finite");
        let scale = all.iter().fold(0f64, |most, x| most.max(x.abs()));
        // as far as rounding moves the values of T, some ε·‖T‖ for each row that a vector reaches over
        let unit = 8.0 * f64::EPSILON * scale * (side as f64).sqrt();
        for (i, (place, x)) in places.zip(pairs.vectors.rows()).enumerate() {
            let value = pairs.values[i];
            let wanted = all[side - 1 - place];
            assert!((value - wanted).abs() <= unit, "value {place} of {side}");
            assert!((alone[i] - wanted).abs() <= unit, "value {place} of {side}");
            let tx = |k: usize| {
                let below = if k > 0 { e[k - 1] * x[k - 1] } else { 0.0 };
                let above = if k + 1 < side { e[k] * x[k + 1] } else { 0.0 };
                below + d[k] * x[k] + above
            };
            let off = (0..side).map(|k| (tx(k) - value * x[k]).abs());
            let off = off.fold(0.0, f64::max);
            assert!(off <= unit, "pair {place} of {side}: {off:e}");
        }
        let unit = pairs.vectors.dot(&pairs.vectors.t()) - Array2::<f64>::eye(pairs.values.len());
        assert!(unit.iter().all(|x| x.abs() <= LEAST_ANGLE), "{side}");
    }

    #[test]
    fn pairs_are_those_of_divide_and_conquer() {
        // around the widths of the processor's vectors
        for side in [1, 2, 5, 16, 17, 61, 200] {
            let random = normal(2, side, side as u64).mapv(f64::from);
            let (d, e) = (random.row(0).to_vec(), random.row(1).to_vec());
            for places in [0..1, 0..side, side - 1..side, side / 3..side.div_ceil(2)] {
                if !places.is_empty() {
                    assert_pairs(&d, &e[..side - 1], places);
                }
            }
        }
    }

    #[test]
    fn pairs_of_any_size_and_spread_are_exact() {
        let side = 64;
        let second_difference = (vec![2.0; side], vec![-1.0; side - 1]);
        let diagonal = (
            (0..side).map(|i| (29 * i % 67) as f64 - 9.0).collect(),
            vec![0.0; side - 1],
        );
        let graded: (Vec<f64>, Vec<f64>) = (
            (0..side).map(|i| 0.8f64.powi(i as i32)).collect(),
            (1..side).map(|i| 0.3 * 0.8f64.powi(i as i32)).collect(),
        );
        let glued = (
            (0..side)
                .map(|i| (i % 16) as f64 + 1e-3 * i as f64)
                .collect(),
            (1..side)
                .map(|i| if i % 16 == 0 { 1e-14 } else { 0.3 })
                .collect(),
        );
        // pairs down to 10⁻¹² of the matrix apart, of which one Rayleigh quotient and each vector for itself are not exact enough
        let gap = |i: usize| 10f64.powf(-(i as f64) / 6.0);
        let close = (
            (0..side)
                .map(|i| (i / 2) as f64 + (i % 2) as f64 * gap(i))
                .collect(),
            (1..side)
                .map(|i| if i % 2 == 1 { 0.4 * gap(i) } else { 1e-9 })
                .collect(),
        );
        for (d, e) in [second_difference, diagonal, graded, glued, close] {
            for size in [1.0, 1e-200, -1e200] {
                let scaled = |x: &[f64]| x.iter().map(|x| x * size).collect::<Vec<f64>>();
                assert_pairs(&scaled(&d), &scaled(&e), 0..side);
            }
        }
    }

    #[test]
    fn values_that_are_too_close_are_told() {
        let side = 64;
        let wilkinson: Vec<f64> = (0..side).map(|i| (i as f64 - 31.5).abs()).collect();
        for (d, e) in [
            (vec![3.0; side], vec![0.0; side - 1]),
            (vec![0.0; side], vec![0.0; side - 1]),
            (wilkinson, vec![1.0; side - 1]),
        ] {
            let all = f64::all_eigenpairs(&d, &e).expect("converges").0;
            let pairs = pairs(&d, &e, 0..side).expect("finite");
            assert!(!pairs.are_apart);
            for (found, wanted) in pairs.values.iter().zip(all.iter().rev()) {
                assert!((found - wanted).abs() < 1e-10 * all[side - 1].max(1e-8));
            }
            let finite = |x: &f64| x.is_finite();
            assert!(pairs.vectors.iter().all(finite), "something to look at");
        }
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        for broken in [f64::NAN, f64::INFINITY] {
            let (mut d, mut e) = (vec![1.0; 9], vec![0.5; 8]);
            d[4] = broken;
            assert!(values(&d, &e, 0..9).is_none());
            d[4] = 1.0;
            e[7] = broken;
            assert!(pairs(&d, &e, 0..1).is_none());
        }
    }
}
