//! x·xᵀ by tiles that fill the registers of AVX-512, of numbers in f32 or of such as bf16 holds, as most models have their
//! weights.
//!
//! Processors with AVX512-BF16 (Zen 4, Sapphire Rapids and newer) multiply those by pairs and add in f32, at twice the rate
//! of products in f32: 185 Gflop/s a core where those make 95 (2048 × 8192, Zen 4, 2026-11). Each product is exact, and
//! the sums round as f32's own do; denormal numbers count as zeros.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, concatenate, s};

use super::product::{gemm, mirror, multiply};
use super::real::zeros;
use crate::lanes::widest;

/// Adds x·xᵀ to the lower half of c (s, s), dense rows, for x (s, k) that lies by rows or by columns; what is above the
/// diagonal of c is spoilt.
///
/// Says whether it did: not on other processors.
pub fn add_square_lower(mut c: ArrayViewMut2<f32>, x: ArrayView2<f32>) -> bool {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_there() {
        assert_eq!(c.dim(), (x.nrows(), x.nrows()), "the rows are its sides");
        if avx512::has_halves() && are_halves(x) {
            avx512::add_square::<avx512::Halves>(&mut c, x);
        } else {
            avx512::add_square::<avx512::Singles>(&mut c, x);
        }
        return true;
    }
    let _ = (&mut c, x);
    false
}

/// The lower half of a symmetric matrix (s, s) in f64.
pub struct Lower {
    side: usize,
    /// Block after block of [`Lower::ROWS`] rows, each row as long as the last of its block, zeros behind the matrix.
    values: Array2<f64>,
}

impl Lower {
    /// Rows that lie together.
    const ROWS: usize = 48;

    /// Whether [`Lower::square`] is there and faster than other ways: for numbers that bf16 holds, on processors that multiply
    /// these.
    pub fn suits(x: ArrayView2<f32>) -> bool {
        #[cfg(target_arch = "x86_64")]
        if avx512::is_there() && avx512::has_halves() {
            return are_halves(x);
        }
        let _ = x;
        false
    }

    /// x·xᵀ for an x (s, k) that suits, as exact as [`Lower::noise`] tells.
    pub fn square(x: ArrayView2<f32>) -> Self {
        let blocks = x.nrows().div_ceil(Self::ROWS);
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut))]
        let mut square = Self {
            side: x.nrows(),
            values: zeros(1, Self::place(blocks).start),
        };
        #[cfg(target_arch = "x86_64")]
        if Self::suits(x) {
            avx512::add_square::<avx512::Halves>(&mut square, x);
            return square;
        }
        unreachable!("it was asked whether the {} rows suit", square.side)
    }

    /// Standard deviation of an element of x·xᵀ for x (s, k), relative to it, where all its terms have the same sign: of 256
    /// sums in f32 each rounds by ε/√12 of itself, and k/256 of these are added in f64.
    pub fn noise(length: usize) -> f64 {
        2.4e-7 / (length as f64 / 256.0).max(1.0).sqrt()
    }

    /// Where block i lies, whose rows are ROWS·(i + 1) long.
    fn place(i: usize) -> Range<usize> {
        let square = Self::ROWS * Self::ROWS;
        let start = square * i * (i + 1) / 2;
        start..start + square * (i + 1)
    }

    /// The rows of each block, and their numbers.
    fn blocks(&self) -> impl Iterator<Item = (Range<usize>, ArrayView2<'_, f64>)> {
        let values = self.values.as_slice().expect("made dense");
        let starts = (0..self.side).step_by(Self::ROWS).enumerate();
        starts.map(move |(i, start)| {
            let rows = start..self.side.min(start + Self::ROWS);
            let shape = (Self::ROWS, start + Self::ROWS);
            let block = ArrayView2::from_shape(shape, &values[Self::place(i)]);
            let block = block.expect("a block has as many");
            (rows.clone(), block.slice_move(s![..rows.len(), ..]))
        })
    }

    /// P·A·P (s, s) in f32, both halves filled, for P = 1 − xᵀ·x that takes out the orthonormal rows x (k, s).
    pub fn without(&self, x: ArrayView2<f32>) -> Array2<f32> {
        let x = x.mapv(f64::from);
        let taken = self.times(x.view());
        // A − xᵀ·(x·A) − (x·A − (x·A·xᵀ)·x)ᵀ·x
        let inside = gemm(taken.view(), false, x.view(), true);
        let others = &taken - &inside.dot(&x);
        let (left, right) = (
            concatenate![Axis(0), x, others],
            concatenate![Axis(0), taken, x],
        );
        let mut rest = zeros::<f32>(self.side, self.side);
        let mut row = vec![0.0; self.side];
        for (rows, block) in self.blocks() {
            let row = &mut row[..rows.end];
            for (i, from) in rows.zip(block.rows()) {
                row.copy_from_slice(&from.to_slice().expect("made dense")[..row.len()]);
                let mut to = rest.slice_mut(s![i, ..row.len()]);
                let to = to.as_slice_mut().expect("a row");
                let factors = left.column(i);
                widest(
                    #[inline(always)]
                    || {
                        for (&factor, by) in factors.iter().zip(right.rows()) {
                            let by = by.to_slice().expect("dense rows");
                            for (x, &by) in row.iter_mut().zip(by) {
                                *x -= factor * by;
                            }
                        }
                        for (to, &x) in to.iter_mut().zip(&*row) {
                            *to = x as f32;
                        }
                    },
                );
            }
        }
        mirror(&mut rest);
        rest
    }

    /// x·A (k, s) for x (k, s).
    fn times(&self, x: ArrayView2<f64>) -> Array2<f64> {
        let mut product = Array2::zeros((x.nrows(), self.side));
        for (rows, block) in self.blocks() {
            let own = x.slice(s![.., rows.clone()]);
            let mut to = product.slice_mut(s![.., ..rows.end]);
            multiply(&mut to, 1.0, own, 1.0, block.slice(s![.., ..rows.end]));
            // the half that mirrors it; on the diagonal a block is whole
            let (before, mirrored) = (
                x.slice(s![.., ..rows.start]),
                block.slice(s![.., ..rows.start]),
            );
            let mut to = product.slice_mut(s![.., rows]);
            multiply(&mut to, 1.0, before, 1.0, mirrored.t());
        }
        product
    }
}

/// Whether bf16 holds the numbers: it is the first half of their bits.
#[cfg(target_arch = "x86_64")]
fn are_halves(x: ArrayView2<f32>) -> bool {
    let along = match x.strides()[1] {
        1 => x,
        _ => x.reversed_axes(),
    };
    along.rows().into_iter().all(|row| match row.as_slice() {
        Some(row) => row.iter().fold(0, |bits, x| bits | x.to_bits()) & 0xffff == 0,
        None => false,
    })
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, __m512bh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };
    use std::mem::transmute;

    use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

    use super::{Lower, zeros};

    /// What a lane of a vector holds, 32 bits of some columns of a row.
    pub trait Lane {
        /// Columns it holds.
        const COLUMNS: usize;
        fn of(columns: [f32; 2]) -> f32;
        /// The products of a sliver and [`WIDE`] rows of another, from `at`, on a processor that has what it takes.
        unsafe fn products(tall: &[Step], wide: &[Step], at: usize, sums: &mut Tile);
    }

    pub struct Singles;

    impl Lane for Singles {
        const COLUMNS: usize = 1;

        #[inline(always)]
        fn of([a, _]: [f32; 2]) -> f32 {
            a
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn products(tall: &[Step], wide: &[Step], at: usize, sums: &mut Tile) {
            let add = |sum, a, b| _mm512_fmadd_ps(a, b, sum);
            // SAFETY: the function has the instructions.
            unsafe { add_products(tall, wide, at, sums, add) }
        }
    }

    pub struct Halves;

    impl Lane for Halves {
        const COLUMNS: usize = 2;

        #[inline(always)]
        fn of([a, b]: [f32; 2]) -> f32 {
            f32::from_bits(a.to_bits() >> 16 | b.to_bits() & 0xffff_0000)
        }

        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn products(tall: &[Step], wide: &[Step], at: usize, sums: &mut Tile) {
            // SAFETY: the types are 512 bits of any kind.
            let pairs = |x| unsafe { transmute::<__m512, __m512bh>(x) };
            let add = |sum, a, b| _mm512_dpbf16_ps(sum, pairs(a), pairs(b));
            // SAFETY: the function has the instructions.
            unsafe { add_products(tall, wide, at, sums, add) }
        }
    }

    #[inline(always)]
    unsafe fn add_products(
        tall: &[Step],
        wide: &[Step],
        at: usize,
        to: &mut Tile,
        add: impl Fn(__m512, __m512, __m512) -> __m512,
    ) {
        assert!(at + WIDE <= SLIVER && tall.len() == wide.len());
        // SAFETY: TALL vectors of LANES are a step's, and a row's of a tile; at + j < SLIVER.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); TALL]; WIDE];
            for (tall, wide) in tall.iter().zip(wide) {
                let tall = [
                    _mm512_loadu_ps(tall.as_ptr()),
                    _mm512_loadu_ps(tall.as_ptr().add(LANES)),
                    _mm512_loadu_ps(tall.as_ptr().add(2 * LANES)),
                ];
                for (j, sums) in sums.iter_mut().enumerate() {
                    let wide = _mm512_set1_ps(*wide.get_unchecked(at + j));
                    for (sum, &tall) in sums.iter_mut().zip(&tall) {
                        *sum = add(*sum, tall, wide);
                    }
                }
            }
            for (to, sums) in to.iter_mut().zip(sums) {
                for (v, sum) in sums.into_iter().enumerate() {
                    _mm512_storeu_ps(to.as_mut_ptr().add(v * LANES), sum);
                }
            }
        }
    }

    /// Lanes of a vector.
    const LANES: usize = 16;

    /// A tile of c is TALL vectors of its columns by WIDE of its rows: 24 of the 32 registers.
    const TALL: usize = 3;
    const WIDE: usize = 8;

    /// Rows of x that are laid out together.
    const SLIVER: usize = TALL * LANES;
    const _: () = assert!(SLIVER == Lower::ROWS);

    /// Lanes of a row that are laid out at a time: 4 MB of 2048 rows.
    const LAID_OUT: usize = 512;

    /// Lanes of a row that are summed before they are added to c: longer sums round more.
    const SUMMED: usize = 128;

    /// A lane of each row of a sliver.
    pub type Step = [f32; SLIVER];

    /// Sums of WIDE rows.
    pub type Tile = [Step; WIDE];

    pub fn is_there() -> bool {
        is_x86_feature_detected!("avx512f")
    }

    pub fn has_halves() -> bool {
        is_x86_feature_detected!("avx512bf16")
    }

    /// What takes the sums of tiles.
    pub trait Target {
        /// Adds those of a tile to the rows from `row` on and the columns from `column` on, as far as they are there.
        unsafe fn add(&mut self, row: usize, column: usize, sums: &Tile);
    }

    /// (s, s)
    impl Target for ArrayViewMut2<'_, f32> {
        #[target_feature(enable = "avx512f")]
        unsafe fn add(&mut self, row: usize, column: usize, sums: &Tile) {
            let side = self.ncols();
            let c = self.as_slice_mut().expect("its rows are dense");
            for (row, sums) in (row..side).zip(sums) {
                let to = &mut c[row * side..][column..side.min(column + SLIVER)];
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
            }
        }
    }

    impl Target for Lower {
        #[target_feature(enable = "avx512f")]
        unsafe fn add(&mut self, row: usize, column: usize, sums: &Tile) {
            let (block, length) = (row / SLIVER, (row / SLIVER + 1) * SLIVER);
            let values = self.values.as_slice_mut().expect("made dense");
            let block = &mut values[Self::place(block)];
            for (row, sums) in (row % SLIVER..).zip(sums) {
                let to = &mut block[row * length + column..][..SLIVER];
                (to.iter_mut().zip(sums)).for_each(|(to, &sum)| *to += f64::from(sum));
            }
        }
    }

    pub fn add_square<L: Lane>(c: &mut impl Target, x: ArrayView2<f32>) {
        let side = x.nrows();
        assert!(
            is_there() && (L::COLUMNS == 1 || has_halves()),
            "it was asked"
        );
        let slivers = side.div_ceil(SLIVER);
        let steps_most = x.ncols().div_ceil(L::COLUMNS).min(LAID_OUT);
        let mut room = zeros::<f32>(slivers * steps_most, SLIVER);
        let (room, _) = room.as_slice_mut().expect("made dense").as_chunks_mut();
        for columns in x.axis_chunks_iter(Axis(1), L::COLUMNS * LAID_OUT) {
            let steps = columns.ncols().div_ceil(L::COLUMNS);
            let laid_out: &mut [Step] = &mut room[..slivers * steps];
            for (sliver, rows) in laid_out
                .chunks_exact_mut(steps)
                .zip(columns.axis_chunks_iter(Axis(0), SLIVER))
            {
                lay_out::<L>(rows, sliver);
            }
            add_tiles::<L>(c, side, laid_out, steps);
        }
    }

    /// The lanes of up to [`SLIVER`] rows; other rows are zeros.
    fn lay_out<L: Lane>(rows: ArrayView2<f32>, to: &mut [Step]) {
        let (count, length) = rows.dim();
        if count < SLIVER {
            to.fill([0.0; SLIVER]);
        }
        let whole = length / L::COLUMNS;
        if rows.strides()[1] == 1 {
            // as many lanes at a time as keep what is written in the nearest cache
            const NEAR: usize = 64;
            for start in (0..whole).step_by(NEAR) {
                let end = whole.min(start + NEAR);
                for (r, row) in rows.rows().into_iter().enumerate() {
                    let row = row.to_slice().expect("its stride is 1");
                    let columns =
                        row[L::COLUMNS * start..L::COLUMNS * end].chunks_exact(L::COLUMNS);
                    for (to, columns) in to[start..end].iter_mut().zip(columns) {
                        to[r] = L::of([columns[0], columns[L::COLUMNS - 1]]);
                    }
                }
            }
        } else {
            for (p, to) in to[..whole].iter_mut().enumerate() {
                let first = L::COLUMNS * p;
                let (a, b) = (rows.column(first), rows.column(first + L::COLUMNS - 1));
                for ((to, &a), &b) in to.iter_mut().zip(a).zip(b) {
                    *to = L::of([a, b]);
                }
            }
        }
        if whole < to.len() {
            let last = rows.slice(s![.., length - 1]);
            to[whole] = [0.0; SLIVER];
            for (to, &a) in to[whole].iter_mut().zip(last) {
                *to = L::of([a, 0.0]);
            }
        }
    }

    /// All tiles on and below the diagonal.
    fn add_tiles<L: Lane>(c: &mut impl Target, side: usize, laid_out: &[Step], steps: usize) {
        let mut sums = [[0.0; SLIVER]; WIDE];
        let slivers = || (0..).step_by(SLIVER).zip(laid_out.chunks_exact(steps));
        for (column, tall) in slivers() {
            for (first, wide) in slivers().skip(column / SLIVER) {
                for (tall, wide) in tall.chunks(SUMMED).zip(wide.chunks(SUMMED)) {
                    for at in (0..SLIVER.min(side - first)).step_by(WIDE) {
                        // SAFETY: the processor has the instructions: it was asked.
                        unsafe {
                            L::products(tall, wide, at, &mut sums);
                            c.add(first + at, column, &sums);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::linalg::lapack::orthonormalise_rows;
    use crate::random::normal;

    fn held(rows: usize, columns: usize) -> Array2<f32> {
        normal(rows, columns, 7).mapv(|x| half::bf16::from_f32(x).to_f32())
    }

    #[test]
    fn squares_are_those_of_double_precision_to_the_rounding_of_single() {
        if !avx512::is_there() || !avx512::has_halves() {
            return eprintln!("SKIPPED: this processor has no AVX512-BF16");
        }
        // around tiles, slivers, and what is laid out and summed at a time
        for (side, length) in [(1, 1), (7, 2), (48, 3), (49, 255), (100, 257), (131, 2051)] {
            let (x, other) = (held(side, length), normal(side, length, 8));
            let turned = x.t().as_standard_layout().into_owned();
            let other_turned = other.t().as_standard_layout().into_owned();
            for x in [x.view(), turned.t(), other.view(), other_turned.t()] {
                let before = normal(side, side, 3);
                let mut c = before.clone();
                assert!(add_square_lower(c.view_mut(), x));
                let wide = x.mapv(f64::from);
                let truth = &before.mapv(f64::from) + wide.dot(&wide.t());
                let sizes = wide.mapv(f64::abs);
                let sizes = sizes.dot(&sizes.t());
                for i in 0..side {
                    for j in 0..=i {
                        let off = (f64::from(c[(i, j)]) - truth[(i, j)]).abs();
                        // sums of 256 terms round some √256 times by half of 2⁻²³ of themselves; and so does c
                        let most = 16.0 * 6e-8 * (sizes[(i, j)] + before[(i, j)].abs() as f64);
                        assert!(off <= most, "({i}, {j}) of {side} × {length}: {off:.1e}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_taken_out_of_a_square_leaves_little_of_its_rounding() {
        for (side, length) in [(5, 9), (48, 300), (130, 1500)] {
            // one direction in all of it, 300 times as long as the others
            let (mut x, along) = (normal(1, side, 1), normal(1, length, 2));
            orthonormalise_rows(x.view_mut()).expect("orthonormal");
            let matrix = normal(side, length, 3) + x.t().dot(&along) * 300.0;
            let matrix = matrix.mapv(|x| half::bf16::from_f32(x).to_f32());
            if !Lower::suits(matrix.view()) {
                return eprintln!("SKIPPED: this processor has no AVX512-BF16");
            }
            let found = Lower::square(matrix.view()).without(x.view());
            let wide = (matrix.mapv(f64::from), x.mapv(f64::from));
            let rest = &wide.0 - &wide.1.t().dot(&wide.1.dot(&wide.0));
            let truth = rest.dot(&rest.t());
            // x·A·xᵀ, spread over the elements as x is
            let first = wide.1.dot(&wide.0).mapv(|x| x * x).sum();
            let largest = wide.1.fold(0f64, |most, x| most.max(x.abs())).powi(2);
            let noise = Lower::noise(length) * first * largest;
            for (&found, &truth) in found.iter().zip(&truth) {
                let off = (f64::from(found) - truth).abs();
                // five standard deviations, and the rounding to f32
                assert!(
                    off <= 5.0 * noise + 6e-8 * truth.abs(),
                    "{side} × {length}: {off:e}, {noise:e}"
                );
            }
        }
    }

    #[test]
    fn only_numbers_that_bf16_holds_are_taken_for_such() {
        let mut x = held(60, 90);
        assert!(are_halves(x.view()) && are_halves(x.t()));
        x[(59, 89)] = f32::from_bits(x[(59, 89)].to_bits() | 1);
        assert!(!are_halves(x.view()) && !are_halves(x.t()));
        // neither by rows nor by columns
        assert!(!are_halves(held(60, 90).slice(ndarray::s![..;2, ..;2])));
    }
}
