//! The identity the project stands on: M = M′ + uᵀ·diag(σ)·v, and what follows from it.
//!
//! Nothing else computes M′, restores M, or merges a trained σ. All products are accumulated in f64: their error is some
//! 10⁻¹³ of the elements, far inside a 16- or 32-bit rounding interval, so that the order of summation (another BLAS,
//! another machine, more threads) cannot change a restored byte. The few elements for which this cannot be shown are
//! stored exactly.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use safetensors::Dtype;

use crate::lanes::widest;
use crate::linalg::{ExactSum, gemm, multiply};
use crate::weights::rounding::{round_sums, rounding_margin, usual_margin, value_of};
use crate::weights::{Elements, Rounder};

/// The frozen vectors and the original singular values of one weight M (m, n).
#[derive(Debug, Clone)]
pub struct Factors {
    /// (q, m)
    pub u: Array2<f32>,
    /// (q,)
    pub sigma: Array1<f32>,
    /// (q, n)
    pub v: Array2<f32>,
}

/// M′, and the elements that M′ + uᵀ·diag(σ)·v does not provably round to.
#[derive(Debug, Clone)]
pub struct Residual {
    /// (m, n), row-major
    pub values: Vec<f32>,
    /// Positions in row-major order, ascending.
    pub exact_at: Vec<u64>,
    /// Their bytes in M's own dtype.
    pub exact: Vec<u8>,
}

/// What training puts between the frozen vectors of a weight: ΔW = uᵀ·(diag(δ) + R)·v.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Δσ (q,)
    pub delta: Vec<f32>,
    /// R (r, r), r ≤ q, between the first r rows of u and v; (0, 0) where there is none.
    pub core: Array2<f32>,
}

impl Change {
    /// A change of the singular values alone.
    pub fn of_sigma(delta: Vec<f32>) -> Self {
        Self {
            delta,
            core: Array2::zeros((0, 0)),
        }
    }

    pub fn is_zero(&self) -> bool {
        self.delta.iter().chain(&self.core).all(|&x| x == 0.0)
    }
}

/// What rounding a merged weight to its dtype did to the training.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RoundingLoss {
    /// Σ (round(W) − W)²
    pub error: f64,
    /// Σ (W − M)²
    pub change: f64,
    /// Σ (round(W) − M)·(W − M)
    pub effect: f64,
    /// Elements that kept M's value although W differs from it.
    pub unchanged: u64,
    /// Elements of the weights that changed.
    pub elements: u64,
}

impl RoundingLoss {
    pub fn add(&mut self, other: &Self) {
        self.error += other.error;
        self.change += other.change;
        self.effect += other.effect;
        self.unchanged += other.unchanged;
        self.elements += other.elements;
    }

    /// ‖round(W) − W‖ / ‖W − M‖: 0 keeps the training, 1 and more erases it.
    pub fn relative(&self) -> f64 {
        if self.change > 0.0 {
            (self.error / self.change).sqrt()
        } else {
            0.0
        }
    }

    /// The share of the change that is there after rounding, in the change's own direction: 1 keeps it, 0 erases it.
    ///
    /// What rounding moves elsewhere does not count here, as the noise of stochastic rounding.
    pub fn kept(&self) -> f64 {
        if self.change > 0.0 {
            self.effect / self.change
        } else {
            1.0
        }
    }
}

/// Elements whose exactness is looked at together: a bit for each.
const GROUP: usize = 64;

/// Tiles of this side bound the f64 copies to some megabytes, whatever the matrix.
const TILE: usize = 1024;

impl Factors {
    /// Of a weight (m, n) that is not decomposed.
    pub fn none(m: usize, n: usize) -> Self {
        Self {
            u: Array2::zeros((0, m)),
            sigma: Array1::zeros(0),
            v: Array2::zeros((0, n)),
        }
    }

    /// With `b` (r, m) and `a` (r, n) behind the vectors, whatever they are, and zeros for their σ.
    pub fn followed_by(&self, b: ArrayView2<f32>, a: ArrayView2<f32>) -> Self {
        let together = |first: &Array2<f32>, second| {
            concatenate(Axis(0), &[first.view(), second]).expect("rows of one length")
        };
        let sigma = self.sigma.iter().copied();
        Self {
            u: together(&self.u, b),
            sigma: sigma.chain(std::iter::repeat_n(0.0, b.nrows())).collect(),
            v: together(&self.v, a),
        }
    }

    pub fn q(&self) -> usize {
        self.sigma.len()
    }

    /// (m, n)
    pub fn shape(&self) -> (usize, usize) {
        (self.u.ncols(), self.v.ncols())
    }

    /// diag(weights)·u, some columns of it, in f64.
    fn scaled(&self, weights: &[f64], columns: Range<usize>) -> Array2<f64> {
        let mut scaled = self.u.slice(s![.., columns]).mapv(f64::from);
        for (mut row, &w) in scaled.rows_mut().into_iter().zip(weights) {
            row *= w;
        }
        scaled
    }

    /// (diag(δ) + Rᵀ)·u, some columns of it, in f64.
    fn changed(&self, change: &Change, columns: Range<usize>) -> Array2<f64> {
        let delta: Vec<f64> = change.delta.iter().map(|&d| d.into()).collect();
        let mut changed = self.scaled(&delta, columns.clone());
        let r = change.core.nrows();
        if r > 0 {
            let core = change.core.mapv(f64::from);
            let first = self.u.slice(s![..r, columns]).mapv(f64::from);
            let mut rows = changed.slice_mut(s![..r, ..]);
            rows += &gemm(core.view(), true, first.view(), false);
        }
        changed
    }

    /// Calls `visit(i, j, (uᵀ·diag(weights)·v)ᵢⱼ)` for every row i and range j of columns.
    fn for_each_product(&self, weights: &[f64], visit: impl FnMut(usize, Range<usize>, &[f64])) {
        self.for_each_row(|rows| self.scaled(weights, rows), visit);
    }

    /// Calls `visit(i, j, (leftᵀ·v)ᵢⱼ)` for every row i and range j of columns, tile by tile; `left` gives (q, columns).
    fn for_each_row(
        &self,
        left: impl Fn(Range<usize>) -> Array2<f64>,
        mut visit: impl FnMut(usize, Range<usize>, &[f64]),
    ) {
        let (m, n) = self.shape();
        let mut products = Array2::zeros((m.min(TILE), n.min(TILE)));
        for rows in tiles(m) {
            let left = left(rows.clone());
            for columns in tiles(n) {
                let right = self.v.slice(s![.., columns.clone()]).mapv(f64::from);
                let mut tile = products.slice_mut(s![..rows.len(), ..columns.len()]);
                multiply(&mut tile, 0.0, left.t(), 1.0, right.view());
                for (row, i) in tile.rows().into_iter().zip(rows.clone()) {
                    let row = row.to_slice().expect("rows of a tile are dense");
                    visit(i, columns.clone(), row);
                }
            }
        }
    }

    /// ‖uᵀ·diag(σ)·v‖, Frobenius, whatever the vectors: they need not be orthonormal.
    pub fn norm(&self) -> f64 {
        let mut sum = 0f64;
        self.for_each_product(&self.sigma_f64(), |_, _, p| {
            sum += p.iter().map(|p| p * p).sum::<f64>();
        });
        sum.sqrt()
    }

    fn sigma_f64(&self) -> Vec<f64> {
        self.sigma.iter().map(|&x| f64::from(x)).collect()
    }

    /// By Cauchy–Schwarz, bounds of Σₖ|uₖᵢ wₖ vₖⱼ|: the product of the i-th of the first and the j-th of the second.
    fn bounds(&self, weights: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let of = |vectors: &Array2<f32>| {
            let mut sums = vec![0f64; vectors.ncols()];
            for (row, weight) in vectors.rows().into_iter().zip(weights) {
                for (sum, &x) in sums.iter_mut().zip(row) {
                    *sum += weight.abs() * f64::from(x).powi(2);
                }
            }
            sums.into_iter().map(f64::sqrt).collect()
        };
        (of(&self.u), of(&self.v))
    }

    /// Any order of summing q products errs by at most γ·Σ|terms|, γ = q·ε/(1 − q·ε) (Higham 2002, §3.1); two more
    /// roundings scale and add, and the bounds are rounded themselves.
    fn gamma(&self) -> f64 {
        (self.q() as f64 + 4.0) * f64::EPSILON
    }

    /// x + (uᵀ·(diag(δ) + R)·v)ᵢⱼ as it is, for one more rounding.
    fn exact(&self, x: f64, change: &Change, (i, j): (usize, usize)) -> f64 {
        let (u, v) = (self.u.column(i), self.v.column(j));
        let mut sum = ExactSum::default();
        sum.add(x);
        // two factors have 48 digits: f64 holds them
        for ((&u, &delta), &v) in u.iter().zip(&change.delta).zip(v) {
            sum.add_product(f64::from(u) * f64::from(delta), f64::from(v));
        }
        for ((k, l), &between) in change.core.indexed_iter() {
            sum.add_product(f64::from(u[k]) * f64::from(between), f64::from(v[l]));
        }
        // a zero that does not change keeps its sign
        match sum.to_odd() {
            found if found == x => x,
            found => found,
        }
    }

    /// M′ = M − uᵀ·diag(σ)·v in f32, and the exceptions.
    pub fn residual(&self, matrix: &Elements) -> Residual {
        let (m, n) = self.shape();
        assert_eq!(matrix.shape, [m, n], "the factors belong to the matrix");
        let original = matrix.values();
        let width = matrix.dtype.bitsize() / 8;
        let weights = self.sigma_f64();
        let (rows, columns) = self.bounds(&weights);
        // ours and the reader's each err once
        let gamma = 2.0 * self.gamma();
        // a reader may round the product and the sum to f32 on the way to 16 bits, as PyTorch's conversion does
        let detour = match matrix.dtype {
            Dtype::F32 => 0.0,
            _ => 2.0 * f64::from(f32::EPSILON),
        };
        let mut values = vec![0f32; m * n];
        let mut unsafe_at = Vec::new();
        let dtype = matrix.dtype;
        self.for_each_product(&weights, |i, j, p| {
            let at = i * n + j.start..i * n + j.end;
            let (x, rest) = (&original[at.clone()], &mut values[at.clone()]);
            let (row, columns) = (rows[i], &columns[j]);
            let groups = x.chunks(GROUP).zip(rest.chunks_mut(GROUP));
            let groups = groups.zip(p.chunks(GROUP).zip(columns.chunks(GROUP)));
            let unsafe_at = &mut unsafe_at;
            widest(
                #[inline(always)]
                move || {
                    let mut error = [0f64; GROUP];
                    for (start, ((x, rest), (p, columns))) in
                        (at.start..).step_by(GROUP).zip(groups)
                    {
                        let mut doubtful = 0u64;
                        let outs = rest.iter_mut().zip(&mut error);
                        let ins = x.iter().zip(p.iter().zip(columns));
                        for (k, ((rest, error), (&x, (&p, &column)))) in outs.zip(ins).enumerate() {
                            let wide = f64::from(x);
                            *rest = (wide - p) as f32;
                            let off = (f64::from(*rest) + p - wide).abs();
                            let doubt = gamma * (row * column + wide.abs())
                                + detour * (wide.abs() + p.abs());
                            *error = off + doubt;
                            doubtful |= u64::from(*error >= usual_margin(dtype, x)) << k;
                        }
                        // of an f32 weight one in ten, at random places
                        while doubtful != 0 {
                            let k = doubtful.trailing_zeros() as usize;
                            doubtful &= doubtful - 1;
                            // a zero has a sign that arithmetic does not keep
                            if x[k] == 0.0 || error[k] >= rounding_margin(dtype, x[k]) {
                                unsafe_at.push((start + k) as u64);
                            }
                        }
                    }
                },
            );
        });
        // one run of each tile
        unsafe_at.sort();
        let exact = match width {
            2 => gather::<2>(&matrix.bytes, &unsafe_at),
            _ => gather::<4>(&matrix.bytes, &unsafe_at),
        };
        Residual {
            values,
            exact_at: unsafe_at,
            exact,
        }
    }

    /// M, byte for byte.
    pub fn restore(&self, residual: &Residual, dtype: Dtype) -> Elements {
        let (m, n) = self.shape();
        let width = dtype.bitsize() / 8;
        let mut bytes = vec![0u8; m * n * width];
        self.for_each_product(&self.sigma_f64(), |i, j, p| {
            let at = i * n + j.start..i * n + j.end;
            let rest = &residual.values[at.clone()];
            let bytes = &mut bytes[at.start * width..at.end * width];
            widest(
                #[inline(always)]
                || round_sums(dtype, rest, p, bytes),
            );
        });
        for (&at, value) in residual
            .exact_at
            .iter()
            .zip(residual.exact.chunks_exact(width))
        {
            bytes[at as usize * width..][..width].copy_from_slice(value);
        }
        Elements {
            dtype,
            shape: vec![m, n],
            bytes,
        }
    }

    /// W = T + uᵀ·(diag(Δσ) + R)·v, each element what the exact sum rounds to. With a change of zero, T itself.
    ///
    /// T is M, or where M was trained as a whole, `whole`: what became of it, row-major. No order of summation and no
    /// machine can give another W: where f64 could, the terms are summed exactly.
    pub fn merge(
        &self,
        matrix: &Elements,
        whole: Option<&[f64]>,
        change: &Change,
        rounder: &Rounder,
    ) -> (Elements, RoundingLoss) {
        assert_eq!(change.delta.len(), self.q(), "one Δσ for each triplet");
        let mut loss = RoundingLoss::default();
        if change.is_zero() && whole.is_none() {
            return (matrix.round(rounder), loss);
        }
        let original = matrix.values();
        let dtype = rounder.dtype();
        let width = dtype.bitsize() / 8;
        let mut bytes = vec![0u8; original.len() * width];
        let weights: Vec<f64> = change.delta.iter().map(|&d| d.into()).collect();
        let (rows, columns) = self.bounds(&weights);
        // the same for Σₖₗ|uₖᵢ Rₖₗ vₗⱼ|, of which two sums are taken, one in the other
        let norm = change
            .core
            .iter()
            .map(|&x| f64::from(x).powi(2))
            .sum::<f64>();
        let (core_rows, core_columns) = self.bounds(&vec![norm.sqrt(); change.core.nrows()]);
        let gamma = self.gamma();
        let (_, n) = self.shape();
        let left = |rows| self.changed(change, rows);
        let mut visit = |i: usize, j: usize, p: f64| {
            let at = i * n + j;
            let x = f64::from(original[at]);
            let start = whole.map_or(x, |whole| whole[at]);
            let terms = rows[i] * columns[j] + 2.0 * core_rows[i] * core_columns[j];
            let doubt = gamma * terms + 2.0 * f64::EPSILON * (start.abs() + p.abs());
            // a zero of terms that are all zero may have either sign
            let sum = if p == 0.0 { start } else { start + p };
            let low = rounder.round(sum - doubt, at);
            let bits = if low == rounder.round(sum + doubt, at) {
                low
            } else {
                rounder.round(self.exact(start, change, (i, j)), at)
            };
            let stored = value_of(dtype, bits);
            let p = start - x + p;
            loss.error += (stored - (x + p)).powi(2);
            loss.change += p * p;
            loss.effect += (stored - x) * p;
            loss.unchanged += u64::from(p != 0.0 && stored == x);
            loss.elements += 1;
            bytes[at * width..(at + 1) * width].copy_from_slice(&bits.to_le_bytes()[..width]);
        };
        self.for_each_row(left, |i, j, row| {
            j.zip(row).for_each(|(j, &p)| visit(i, j, p));
        });
        let merged = Elements {
            dtype,
            shape: matrix.shape.clone(),
            bytes,
        };
        (merged, loss)
    }
}

/// The elements of W bytes at some positions.
fn gather<const W: usize>(bytes: &[u8], at: &[u64]) -> Vec<u8> {
    let (elements, _) = bytes.as_chunks::<W>();
    let found: Vec<[u8; W]> = at.iter().map(|&at| elements[at as usize]).collect();
    found.into_flattened()
}

fn tiles(side: usize) -> impl Iterator<Item = Range<usize>> {
    (0..side)
        .step_by(TILE)
        .map(move |start| start..(start + TILE).min(side))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{Algorithm, Wanted, decompose};
    use crate::weights::Rounding;
    use crate::weights::rounding::push_rounded;
    use proptest::prelude::*;

    fn nearest(dtype: Dtype) -> Rounder {
        Rounder::new(Rounding::Nearest, dtype, "m")
    }

    fn random(m: usize, n: usize, dtype: Dtype, seed: u64) -> Elements {
        let mut state = seed;
        let values: Vec<f32> = (0..m * n)
            .map(|_| {
                // a product of two uniforms has many small elements, the hard ones
                let mut uniform = || {
                    state = state
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
                };
                uniform() * uniform() * uniform()
            })
            .collect();
        Elements::from_f32(&[m, n], &values).cast(dtype)
    }

    fn factors(matrix: &Elements, q: usize) -> Factors {
        let a = Array2::from_shape_vec((matrix.shape[0], matrix.shape[1]), matrix.to_f32())
            .expect("the shape fits");
        let svd = decompose("test", a.view(), Wanted::Triplets(q), &Algorithm::default())
            .expect("decomposes");
        Factors {
            u: svd.u,
            sigma: svd.sigma,
            v: svd.v,
        }
    }

    /// The sum of two numbers and what rounding it lost (Knuth's two-sum).
    fn two_sum(a: f64, b: f64) -> (f64, f64) {
        let sum = a + b;
        let other = sum - a;
        (sum, (a - (sum - other)) + (b - other))
    }

    /// Ways to read M: in f64, terms in order, in reverse, in blocks; with fused operations; in twice the precision; and,
    /// of 16 bits, through f32 for the product, the sum or both.
    const WAYS: usize = 8;

    /// A reader with another arithmetic.
    fn restore_differently(
        factors: &Factors,
        residual: &Residual,
        dtype: Dtype,
        way: usize,
    ) -> Vec<u8> {
        let (m, n) = factors.shape();
        let width = dtype.bitsize() / 8;
        let mut bytes = Vec::new();
        for i in 0..m {
            for j in 0..n {
                let mut terms: Vec<f64> = (0..factors.q())
                    .map(|k| {
                        let (u, s, v) = (
                            f64::from(factors.u[(k, i)]),
                            f64::from(factors.sigma[k]),
                            f64::from(factors.v[(k, j)]),
                        );
                        match way {
                            0 => u * s * v,
                            1 => u * (s * v),
                            _ => (u * v) * s,
                        }
                    })
                    .collect();
                if way == 1 {
                    terms.reverse();
                }
                let sum = match way {
                    2 => {
                        let blocks = terms.chunks(3).map(|c| c.iter().sum::<f64>());
                        blocks.rev().sum::<f64>()
                    }
                    3 => (0..factors.q()).fold(0.0, |sum, k| {
                        let left = f64::from(factors.u[(k, i)]) * f64::from(factors.sigma[k]);
                        left.mul_add(f64::from(factors.v[(k, j)]), sum)
                    }),
                    4 => {
                        let (sum, lost) = terms.iter().fold((0.0, 0.0), |(sum, lost), &term| {
                            let (sum, error) = two_sum(sum, term);
                            (sum, lost + error)
                        });
                        sum + lost
                    }
                    _ => terms.iter().sum(),
                };
                let rest = residual.values[i * n + j];
                // 5: the product in f32; 6: the sum; 7: both
                let sum = if [5, 7].contains(&way) {
                    f64::from(sum as f32)
                } else {
                    sum
                };
                let restored = match way {
                    6 => f64::from((f64::from(rest) + sum) as f32),
                    7 => f64::from(rest + sum as f32),
                    _ => f64::from(rest) + sum,
                };
                push_rounded(dtype, restored, &mut bytes);
            }
        }
        for (&at, value) in residual
            .exact_at
            .iter()
            .zip(residual.exact.chunks_exact(width))
        {
            bytes[at as usize * width..][..width].copy_from_slice(value);
        }
        bytes
    }

    #[test]
    fn small_elements_beside_large_products_return_by_way_of_f32_too() {
        for dtype in [Dtype::BF16, Dtype::F16] {
            // products near 1, and weights 2¹⁴ times smaller: half a step of theirs is less than a step of f32 there
            let factors = factors(&random(24, 32, Dtype::F32, 9), 6);
            let small: Vec<f32> = random(24, 32, Dtype::F32, 8)
                .to_f32()
                .iter()
                .map(|x| x * 2f32.powi(-14))
                .collect();
            let matrix = Elements::from_f32(&[24, 32], &small).cast(dtype);
            let residual = factors.residual(&matrix);
            for way in 0..WAYS {
                let found = restore_differently(&factors, &residual, dtype, way);
                assert!(found == matrix.bytes, "{dtype:?}, way {way}");
            }
        }
    }

    /// Another order of summing, or a fused product, gives another sum there, by more than a step of the element.
    #[test]
    fn elements_whose_products_cancel_are_exceptions() {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            // 3·2⁴⁰ − 2⁴⁰ − 2⁴¹
            let factors = Factors {
                u: Array2::ones((3, 8)),
                sigma: Array1::from_vec([3.0, 1.0, 2.0].map(|x| x * 2f32.powi(40)).to_vec()),
                v: Array2::from_shape_fn((3, 9), |(k, _)| if k == 0 { 1.0 } else { -1.0 }),
            };
            let matrix = random(8, 9, dtype, 4);
            let residual = factors.residual(&matrix);
            assert!(
                residual
                    .values
                    .iter()
                    .zip(matrix.to_f32())
                    .all(|(r, x)| *r == x)
            );
            assert_eq!(residual.exact_at.len(), 8 * 9, "{dtype:?}");
        }
    }

    /// As the format wants them, which tiles do not give them.
    #[test]
    fn exceptions_of_a_wide_weight_are_in_order_and_return() {
        let matrix = random(5, 2 * TILE + 70, Dtype::F32, 3);
        let factors = factors(&matrix, 2);
        let residual = factors.residual(&matrix);
        let rows = residual
            .exact_at
            .iter()
            .map(|at| at / (2 * TILE as u64 + 70));
        assert!(rows.collect::<std::collections::BTreeSet<_>>().len() > 1);
        assert!(residual.exact_at.is_sorted_by(|a, b| a < b));
        assert_eq!(factors.restore(&residual, Dtype::F32).bytes, matrix.bytes);
    }

    #[test]
    fn exceptions_of_sixteen_bit_weights_are_few() {
        let matrix = random(200, 300, Dtype::BF16, 7);
        let factors = factors(&matrix, 20);
        let residual = factors.residual(&matrix);
        let share = residual.exact_at.len() as f64 / matrix.len() as f64;
        assert!(share < 2e-3, "{share} of the elements are stored exactly");
        assert_eq!(factors.restore(&residual, Dtype::BF16), matrix);
    }

    fn merge_sigma(
        factors: &Factors,
        matrix: &Elements,
        delta: &[f32],
        rounder: &Rounder,
    ) -> (Elements, RoundingLoss) {
        factors.merge(matrix, None, &Change::of_sigma(delta.into()), rounder)
    }

    #[test]
    fn merging_adds_a_core_and_what_became_of_the_whole() {
        let matrix = random(30, 40, Dtype::F32, 3);
        let factors = factors(&matrix, 6);
        // no symmetry: a transposed R would be seen
        let core = Array2::from_shape_fn((4, 4), |(k, l)| 0.5 * k as f32 - 0.2 * l as f32 + 0.1);
        let change = Change {
            delta: vec![0.5, -0.25, 0.125, 1.0, -1.0, 0.75],
            core,
        };
        let whole: Vec<f64> = (0..30 * 40).map(|at| f64::from(at) * 1e-3 - 0.3).collect();
        for whole in [None, Some(&whole[..])] {
            let (merged, _) = factors.merge(&matrix, whole, &change, &nearest(Dtype::F32));
            let (merged, original) = (merged.to_f32(), matrix.to_f32());
            for i in 0..30 {
                for j in 0..40 {
                    let mut wanted = match whole {
                        Some(whole) => whole[i * 40 + j],
                        None => f64::from(original[i * 40 + j]),
                    };
                    for k in 0..6 {
                        for l in 0..6 {
                            let diagonal = if k == l { change.delta[k] } else { 0.0 };
                            let between = diagonal + change.core.get((k, l)).unwrap_or(&0.0);
                            wanted += f64::from(factors.u[(k, i)])
                                * f64::from(between)
                                * f64::from(factors.v[(l, j)]);
                        }
                    }
                    let off = (f64::from(merged[i * 40 + j]) - wanted).abs();
                    // the test adds δ and R in f32; one more rounding is the merge's own
                    assert!(off <= 1e-6 * (1.0 + wanted.abs()), "({i}, {j}): {off}");
                }
            }
        }
    }

    #[test]
    fn merging_moves_every_element_by_the_rank_q_change() {
        let matrix = random(30, 40, Dtype::F32, 3);
        let factors = factors(&matrix, 6);
        let delta = [0.5f32, -0.25, 0.125, 1.0, -1.0, 0.75];
        let (merged, loss) = merge_sigma(&factors, &matrix, &delta, &nearest(Dtype::F32));
        let (merged, original) = (merged.to_f32(), matrix.to_f32());
        for i in 0..30 {
            for j in 0..40 {
                let change: f64 = (0..6)
                    .map(|k| {
                        f64::from(factors.u[(k, i)])
                            * f64::from(delta[k])
                            * f64::from(factors.v[(k, j)])
                    })
                    .sum();
                let wanted = (f64::from(original[i * 40 + j]) + change) as f32;
                assert!((merged[i * 40 + j] - wanted).abs() <= wanted.abs() * f32::EPSILON);
            }
        }
        assert!(loss.relative() < 1e-6 && loss.change > 0.0);
        // ‖uᵀ·diag(Δσ)·v‖² = Σ Δσ² for orthonormal vectors
        let wanted: f64 = delta.iter().map(|&d| f64::from(d).powi(2)).sum();
        assert!((loss.change / wanted - 1.0).abs() < 1e-5);
    }

    /// Terms that f64 cannot add: a tie of the dtype and a crumb 70 digits below it.
    #[test]
    fn a_merged_element_is_the_rounded_exact_sum() {
        for (dtype, digits) in [(Dtype::BF16, 7), (Dtype::F16, 10), (Dtype::F32, 23)] {
            let step = 2f32.powi(-digits);
            let matrix = Elements::from_f32(&[1, 2], &[1.0, 1.0]).cast(dtype);
            let two = |a, b| ndarray::arr2(&[[a], [b]]);
            let factors = Factors {
                u: two(1.0, 2f32.powi(-30)),
                sigma: ndarray::arr1(&[1.0, 1.0]),
                v: ndarray::arr2(&[[1.0, 1.0], [2f32.powi(-30), -(2f32.powi(-30))]]),
            };
            let delta = [step / 2.0, 2f32.powi(-30)];
            let core = Array2::from_diag(&Array1::from(delta.to_vec()));
            for change in [
                Change::of_sigma(delta.into()),
                Change {
                    delta: vec![0.0, 0.0],
                    core,
                },
            ] {
                let (merged, _) = factors.merge(&matrix, None, &change, &nearest(dtype));
                assert_eq!(merged.to_f32(), [1.0 + step, 1.0], "{dtype:?}");
            }
        }
    }

    /// In whatever order its terms are added.
    #[test]
    fn a_zero_that_nothing_reaches_keeps_its_sign() {
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            let matrix = Elements::from_f32(&[1, 4], &[-0.0, 0.0, -0.0, -0.0]).cast(dtype);
            let two = |a: [f32; 4], b: [f32; 4]| ndarray::arr2(&[a, b]);
            let factors = Factors {
                u: ndarray::arr2(&[[1.0], [1.0]]),
                sigma: ndarray::arr1(&[1.0, 1.0]),
                v: two([0.0, 0.0, -0.0, 1.0], [-0.0, -0.0, -0.0, -1.0]),
            };
            let (merged, _) = merge_sigma(&factors, &matrix, &[0.5, 0.5], &nearest(dtype));
            let bits: Vec<u32> = merged.to_f32().iter().map(|x| x.to_bits()).collect();
            let negative = (-0f32).to_bits();
            assert_eq!(bits, [negative, 0, negative, negative], "{dtype:?}");
        }
    }

    #[test]
    fn a_small_change_is_reported_as_lost_in_bf16() {
        let matrix = random(64, 64, Dtype::BF16, 5);
        let factors = factors(&matrix, 6);
        let delta: Vec<f32> = factors.sigma.iter().map(|s| s * 1e-4).collect();
        let (_, loss) = merge_sigma(&factors, &matrix, &delta, &nearest(Dtype::BF16));
        assert!(loss.relative() > 0.8, "{loss:?}");
        assert!(loss.kept() < 0.2, "{loss:?}");
        let stochastic = Rounder::new(Rounding::Stochastic { seed: 1 }, Dtype::BF16, "m");
        let (_, noisy) = merge_sigma(&factors, &matrix, &delta, &stochastic);
        // without bias: the effect is there, within five standard errors of its estimate
        let error = (noisy.error / noisy.change / noisy.elements as f64).sqrt();
        assert!((noisy.kept() - 1.0).abs() < 5.0 * error, "{noisy:?}");
        let (_, kept) = merge_sigma(&factors, &matrix, &delta, &nearest(Dtype::F32));
        assert!(kept.relative() < 1e-2, "{kept:?}");
    }

    proptest! {
        #[test]
        fn merging_equals_arithmetic_on_whole_numbers(
            terms in prop::collection::vec((-127i32..128, -127i32..128, -127i32..128, 0i32..12), 1..9), base: u16, half: bool,
        ) {
            // few digits: sums are whole multiples of 2⁻⁴⁸ that fall on ties again and again
            let dtype = if half { Dtype::F16 } else { Dtype::BF16 };
            let matrix = Elements { dtype, shape: vec![1, 1], bytes: base.to_le_bytes().to_vec() };
            let x = matrix.to_f32()[0];
            prop_assume!(x.is_finite() && (x == 0.0 || (2f32.powi(-20)..2f32.powi(12)).contains(&x.abs())));
            let scaled = |n: i32, e: i32| n as f32 * 2f32.powi(-e);
            let column = |at: fn(&(i32, i32, i32, i32)) -> f32| {
                Array2::from_shape_vec((terms.len(), 1), terms.iter().map(at).collect()).expect("a column")
            };
            let factors = Factors {
                u: column(|t| t.0 as f32 * 2f32.powi(-t.3)),
                sigma: Array1::ones(terms.len()),
                v: column(|t| t.1 as f32 * 2f32.powi(-t.3)),
            };
            let delta: Vec<f32> = terms.iter().map(|t| scaled(t.2, t.3)).collect();
            prop_assume!(delta.iter().any(|&d| d != 0.0));
            let (merged, _) = merge_sigma(&factors, &matrix, &delta, &nearest(dtype));

            let unit = 48;
            let mut exact = (f64::from(x) * 2f64.powi(unit)) as i128;
            for (a, b, c, e) in &terms {
                exact += i128::from(a * b * c) << (unit - 3 * e);
            }
            // the nearest of three candidates, by exact distance; of two equally near, the even one
            let found = merged.to_f32()[0];
            prop_assume!(exact != 0 && found.is_finite());
            let bits = u16::from_le_bytes([merged.bytes[0], merged.bytes[1]]);
            let distance = |bits: u16| {
                let value = value_of(dtype, bits.into()) * 2f64.powi(unit + 20);
                (value as i128 - (exact << 20)).abs()
            };
            for other in [bits.wrapping_sub(1), bits + 1] {
                let nearer = distance(bits) < distance(other)
                    || (distance(bits) == distance(other) && bits % 2 == 0);
                prop_assert!(nearer, "{exact} became {found}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn every_byte_returns_whatever_the_order_and_precision_of_the_sum(
            m in 1usize..40, n in 1usize..40, share in 0.05f64..1.0, seed: u64,
            dtype in prop_oneof![Just(Dtype::BF16), Just(Dtype::F16), Just(Dtype::F32)],
        ) {
            let matrix = random(m, n, dtype, seed);
            let factors = factors(&matrix, ((m.min(n) as f64 * share) as usize).max(1));
            let residual = factors.residual(&matrix);
            prop_assert_eq!(&factors.restore(&residual, dtype).bytes, &matrix.bytes);
            // f32 weights promise every bit to readers in f64 alone
            let ways = if dtype == Dtype::F32 { 5 } else { WAYS };
            for way in 0..ways {
                prop_assert_eq!(&restore_differently(&factors, &residual, dtype, way), &matrix.bytes);
            }
            let zero = vec![0f32; factors.q()];
            prop_assert_eq!(&merge_sigma(&factors, &matrix, &zero, &nearest(dtype)).0.bytes, &matrix.bytes);
        }
    }
}
