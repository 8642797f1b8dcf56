//! x·xᵀ by tiles that fill the registers of AVX-512, of numbers in f32 or of such as bf16 holds, as most models have their
//! weights.
//!
//! Processors with AVX512-BF16 (Zen 4, Sapphire Rapids and newer) multiply those by pairs and add in f32, at twice the rate
//! of products in f32: 190 Gflop/s a core where those make 95 (2048 × 8192, Zen 4, 2026-11). Each product is exact, and
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
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // made there alone
pub struct Lower {
    side: usize,
    /// Columns that are summed in f32, and how many such sums, before f64 takes over.
    summed: [usize; 2],
    /// Block after block of [`Lower::ROWS`] rows, each row as long as the last of its block, zeros behind the matrix.
    values: Array2<f64>,
}

impl Lower {
    /// Rows that lie together.
    const ROWS: usize = 48;

    /// As [`Lower::summed`]: with a third of the noise, or a sixth faster.
    const fn summing(fast: bool) -> [usize; 2] {
        if fast { [256, 1] } else { [32, 4] }
    }

    /// x·xᵀ for an x (s, k), as exact as [`Lower::noise`] tells, where this is faster than other ways: of numbers that bf16 holds,
    /// on processors that multiply these.
    pub fn square(x: ArrayView2<f32>, fast: bool) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if avx512::is_there() && avx512::has_halves() && are_halves(x) {
            let blocks = x.nrows().div_ceil(Self::ROWS);
            let mut square = Self {
                side: x.nrows(),
                summed: Self::summing(fast),
                values: zeros(1, Self::place(blocks).start),
            };
            avx512::add_square::<avx512::Halves>(&mut square, x);
            return Some(square);
        }
        let _ = (x, fast);
        None
    }

    /// Standard deviation of an element of x·xᵀ for x (s, k), relative to it, where all its terms have the same sign.
    ///
    /// Adding to a sum rounds it by ε/√12 of itself. One of a part p of the whole, made in n steps, errs by p·ε·√(n/36); c of these
    /// in one after the other by c·p·ε·√(c/36 + 1/24) more; and k/(c·columns) of those are added in f64.
    pub fn noise(length: usize, fast: bool) -> f64 {
        let [columns, sums] = Self::summing(fast).map(|x| x as f64);
        let whole = (length as f64 / (columns * sums)).max(1.0);
        // two products a step
        let variance = columns / 2.0 / 36.0 / sums + sums / 36.0 + 1.0 / 24.0;
        f64::from(f32::EPSILON) * (variance / whole).sqrt()
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
        __m512, __m512bh, __m512d, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_and_si512,
        _mm512_castpd_ps, _mm512_castps_pd, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_or_si512, _mm512_permutex2var_epi32,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
        _mm512_srli_epi32, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
        _mm512_unpacklo_pd, _mm512_unpacklo_ps,
    };
    use std::mem::transmute;

    use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

    use super::{Lower, zeros};

    /// What a lane of a vector holds, 32 bits of some columns of a row.
    pub trait Lane {
        /// Columns it holds.
        const COLUMNS: usize;
        fn of(columns: [f32; 2]) -> f32;
        /// A vector of them, on a processor that has what it takes.
        unsafe fn vector_of(columns: &[f32]) -> __m512;
        /// Adds to a tile the products of the first `vectors` vectors of a sliver and [`WIDE`] rows of another, from `at`, on
        /// a processor that has what it takes.
        unsafe fn add(tall: &[Step], wide: &[Step], at: usize, vectors: usize, tile: &mut Tile);
    }

    pub struct Singles;

    impl Lane for Singles {
        const COLUMNS: usize = 1;

        #[inline(always)]
        fn of([a, _]: [f32; 2]) -> f32 {
            a
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn vector_of(columns: &[f32]) -> __m512 {
            assert!(columns.len() >= LANES);
            // SAFETY: so many are there.
            unsafe { _mm512_loadu_ps(columns.as_ptr()) }
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn add(tall: &[Step], wide: &[Step], at: usize, vectors: usize, tile: &mut Tile) {
            let add = |sum, a, b| _mm512_fmadd_ps(a, b, sum);
            // SAFETY: the function has the instructions.
            unsafe {
                match vectors {
                    1 => add_products::<1>(tall, wide, at, tile, add),
                    2 => add_products::<2>(tall, wide, at, tile, add),
                    _ => add_products::<TALL>(tall, wide, at, tile, add),
                }
            }
        }
    }

    pub struct Halves;

    impl Lane for Halves {
        const COLUMNS: usize = 2;

        #[inline(always)]
        fn of([a, b]: [f32; 2]) -> f32 {
            f32::from_bits(a.to_bits() >> 16 | b.to_bits() & 0xffff_0000)
        }

        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn vector_of(columns: &[f32]) -> __m512 {
            const FIRST: [i32; LANES] = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30];
            assert!(columns.len() >= 2 * LANES);
            // SAFETY: so many are there, and FIRST fills a vector.
            let (a, b, first) = unsafe {
                (
                    _mm512_loadu_si512(columns.as_ptr().cast()),
                    _mm512_loadu_si512(columns.as_ptr().add(LANES).cast()),
                    _mm512_loadu_si512(FIRST.as_ptr().cast()),
                )
            };
            let second = _mm512_or_si512(first, _mm512_set1_epi32(1));
            let firsts = _mm512_permutex2var_epi32(a, first, b);
            let seconds = _mm512_permutex2var_epi32(a, second, b);
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_or_si512(
                _mm512_srli_epi32::<16>(firsts),
                _mm512_and_si512(seconds, upper),
            ))
        }

        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn add(tall: &[Step], wide: &[Step], at: usize, vectors: usize, tile: &mut Tile) {
            // SAFETY: the types are 512 bits of any kind.
            let pairs = |x| unsafe { transmute::<__m512, __m512bh>(x) };
            let add = |sum, a, b| _mm512_dpbf16_ps(sum, pairs(a), pairs(b));
            // SAFETY: the function has the instructions.
            unsafe {
                match vectors {
                    1 => add_products::<1>(tall, wide, at, tile, add),
                    2 => add_products::<2>(tall, wide, at, tile, add),
                    _ => add_products::<TALL>(tall, wide, at, tile, add),
                }
            }
        }
    }

    /// Where a tile lies: WIDE rows of `stride` numbers each, of the last one as many as the tile is wide.
    pub struct Tile<'a> {
        values: &'a mut [f32],
        stride: usize,
    }

    #[inline(always)]
    unsafe fn add_products<const VECTORS: usize>(
        tall: &[Step],
        wide: &[Step],
        at: usize,
        tile: &mut Tile,
        add: impl Fn(__m512, __m512, __m512) -> __m512,
    ) {
        assert!(at + WIDE <= SLIVER && tall.len() == wide.len());
        assert!((WIDE - 1) * tile.stride + VECTORS * LANES <= tile.values.len());
        let to = tile.values.as_mut_ptr();
        // SAFETY: VECTORS of LANES are in a step, and in each row of a tile; at + j < SLIVER.
        unsafe {
            let place = |j: usize, v: usize| to.add(j * tile.stride + v * LANES);
            for j in 0..WIDE {
                for v in 0..VECTORS {
                    _mm_prefetch::<_MM_HINT_T0>(place(j, v).cast());
                }
            }
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; WIDE];
            for (tall, wide) in tall.iter().zip(wide) {
                let mut vectors = [_mm512_setzero_ps(); VECTORS];
                for (v, vector) in vectors.iter_mut().enumerate() {
                    *vector = _mm512_loadu_ps(tall.as_ptr().add(v * LANES));
                }
                for (j, sums) in sums.iter_mut().enumerate() {
                    let wide = _mm512_set1_ps(*wide.get_unchecked(at + j));
                    for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                        *sum = add(*sum, vector, wide);
                    }
                }
            }
            for (j, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    let to = place(j, v);
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
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

    /// Lanes of a row that are laid out at a time: 2 MB of 2048 rows.
    const LAID_OUT: usize = 256;

    /// Slivers that stay in the second cache while others pass by.
    const NEAR: usize = 8;

    /// A lane of each row of a sliver.
    pub type Step = [f32; SLIVER];

    pub fn is_there() -> bool {
        is_x86_feature_detected!("avx512f")
    }

    pub fn has_halves() -> bool {
        is_x86_feature_detected!("avx512bf16")
    }

    /// What takes the sums of tiles.
    pub trait Target {
        /// Columns of x that are summed one after the other in f32, longer sums round more; and such sums that are added in f32.
        fn summed(&self) -> [usize; 2];
        /// Whether it wants the tiles on the diagonal as a whole, or their lower half will do.
        const WHOLE_DIAGONAL: bool;
        /// The tile at a row and a column, if all of it is there and in f32.
        fn tile(&mut self, row: usize, column: usize) -> Option<Tile<'_>>;
        /// Adds sums to the rows from `row` on and the columns from `column` on, as far as they are there.
        unsafe fn add(&mut self, row: usize, column: usize, sums: &[Step; WIDE]);
    }

    /// (s, s)
    impl Target for ArrayViewMut2<'_, f32> {
        const WHOLE_DIAGONAL: bool = false;

        #[inline(always)]
        fn summed(&self) -> [usize; 2] {
            [256, 1]
        }

        #[inline(always)]
        fn tile(&mut self, row: usize, column: usize) -> Option<Tile<'_>> {
            let side = self.ncols();
            let is_whole = row + WIDE <= side && column + SLIVER <= side;
            let c = self.as_slice_mut().expect("its rows are dense");
            is_whole.then(|| Tile {
                values: &mut c[row * side + column..],
                stride: side,
            })
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn add(&mut self, row: usize, column: usize, sums: &[Step; WIDE]) {
            let side = self.ncols();
            let c = self.as_slice_mut().expect("its rows are dense");
            for (row, sums) in (row..side).zip(sums) {
                let to = &mut c[row * side..][column..side.min(column + SLIVER)];
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to += sum);
            }
        }
    }

    impl Target for Lower {
        const WHOLE_DIAGONAL: bool = true;

        #[inline(always)]
        fn summed(&self) -> [usize; 2] {
            self.summed
        }

        #[inline(always)]
        fn tile(&mut self, _: usize, _: usize) -> Option<Tile<'_>> {
            None
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn add(&mut self, row: usize, column: usize, sums: &[Step; WIDE]) {
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
                // SAFETY: the processor has the instructions: it was asked.
                unsafe { lay_out::<L>(rows, sliver) };
            }
            add_tiles::<L, _>(c, side, laid_out, steps);
        }
    }

    /// The lanes of up to [`SLIVER`] rows; other rows are zeros.
    #[target_feature(enable = "avx512f")]
    unsafe fn lay_out<L: Lane>(rows: ArrayView2<f32>, to: &mut [Step]) {
        let (count, length) = rows.dim();
        if count < SLIVER {
            to.fill([0.0; SLIVER]);
        }
        let whole = length / L::COLUMNS;
        let lane = |columns: &[f32]| L::of([columns[0], columns[L::COLUMNS - 1]]);
        if rows.strides()[1] == 1 {
            let row = |r: usize| rows.row(r).to_slice().expect("its stride is 1");
            // squares of lanes, turned; and what does not fill one
            let (turned_rows, turned) = (count / LANES * LANES, whole / LANES * LANES);
            for first in (0..turned_rows).step_by(LANES) {
                let rows: [&[f32]; LANES] = std::array::from_fn(|r| row(first + r));
                for start in (0..turned).step_by(LANES) {
                    let column = L::COLUMNS * start;
                    // SAFETY: the function has the instructions.
                    unsafe {
                        let square = rows.map(|row| L::vector_of(&row[column..]));
                        let lanes = turn(square);
                        for (to, lane) in to[start..start + LANES].iter_mut().zip(lanes) {
                            _mm512_storeu_ps(to[first..first + LANES].as_mut_ptr(), lane);
                        }
                    }
                }
            }
            for r in 0..count {
                let start = if r < turned_rows { turned } else { 0 };
                let columns = row(r)[L::COLUMNS * start..].chunks_exact(L::COLUMNS);
                for (to, columns) in to[start..whole].iter_mut().zip(columns) {
                    to[r] = lane(columns);
                }
            }
        } else {
            let column = |j: usize| rows.column(j).to_slice().expect("its other stride is 1");
            for (p, to) in to[..whole].iter_mut().enumerate() {
                let first = L::COLUMNS * p;
                let (a, b) = (column(first), column(first + L::COLUMNS - 1));
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

    /// Columns for rows: of numbers, then of pairs of them, then of quarters of vectors.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn turn(rows: [__m512; LANES]) -> [__m512; LANES] {
        let mut pairs = rows;
        for i in (0..LANES).step_by(2) {
            pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
            pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        }
        let wide: [__m512d; LANES] = pairs.map(|x| _mm512_castps_pd(x));
        // of rows i to i + 3, columns c, c + 4, c + 8 and c + 12 in vector i + c
        let mut fours = rows;
        for i in (0..LANES).step_by(4) {
            for half in 0..2 {
                let (a, b) = (wide[i + half], wide[i + half + 2]);
                fours[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                fours[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        let mut columns = rows;
        for c in 0..4 {
            let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
            // even and odd quarters
            let (ab, de) = (
                _mm512_shuffle_f32x4::<0x88>(a, b),
                _mm512_shuffle_f32x4::<0x88>(d, e),
            );
            columns[c] = _mm512_shuffle_f32x4::<0x88>(ab, de);
            columns[c + 8] = _mm512_shuffle_f32x4::<0xdd>(ab, de);
            let (ab, de) = (
                _mm512_shuffle_f32x4::<0xdd>(a, b),
                _mm512_shuffle_f32x4::<0xdd>(d, e),
            );
            columns[c + 4] = _mm512_shuffle_f32x4::<0x88>(ab, de);
            columns[c + 12] = _mm512_shuffle_f32x4::<0xdd>(ab, de);
        }
        columns
    }

    /// All tiles on and below the diagonal.
    fn add_tiles<L: Lane, T: Target>(c: &mut T, side: usize, laid_out: &[Step], steps: usize) {
        let slivers: Vec<&[Step]> = laid_out.chunks_exact(steps).collect();
        for (near, start) in slivers.chunks(NEAR).zip((0..).step_by(NEAR)) {
            for (i, wide) in slivers.iter().enumerate().skip(start) {
                for (j, tall) in (start..=i).zip(near) {
                    for at in (0..SLIVER.min(side - SLIVER * i)).step_by(WIDE) {
                        let vectors = match i == j && !T::WHOLE_DIAGONAL {
                            true => (at + WIDE).div_ceil(LANES),
                            false => TALL,
                        };
                        // SAFETY: the processor has the instructions: it was asked.
                        unsafe {
                            add_tile::<L, T>(c, [SLIVER * i, SLIVER * j], tall, wide, at, vectors)
                        };
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn add_tile<L: Lane, T: Target>(
        c: &mut T,
        [row, column]: [usize; 2],
        tall: &[Step],
        wide: &[Step],
        at: usize,
        vectors: usize,
    ) {
        let [columns, sums] = c.summed();
        let summed = columns / L::COLUMNS;
        let parts = tall.chunks(sums * summed).zip(wide.chunks(sums * summed));
        for (tall, wide) in parts {
            let mut aside = [[0f32; SLIVER]; WIDE];
            let there = c.tile(row + at, column);
            let is_aside = there.is_none();
            let mut tile = there.unwrap_or(Tile {
                values: aside.as_flattened_mut(),
                stride: SLIVER,
            });
            for (tall, wide) in tall.chunks(summed).zip(wide.chunks(summed)) {
                // SAFETY: the caller promised the instructions.
                unsafe { L::add(tall, wide, at, vectors, &mut tile) };
            }
            if is_aside {
                // SAFETY: as above.
                unsafe { c.add(row + at, column, &aside) };
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
        for (side, length, fast) in [
            (5, 9, false),
            (48, 300, true),
            (130, 1500, true),
            (130, 1500, false),
        ] {
            // one direction in all of it, 300 times as long as the others
            let (mut x, along) = (normal(1, side, 1), normal(1, length, 2));
            orthonormalise_rows(x.view_mut()).expect("orthonormal");
            let matrix = normal(side, length, 3) + x.t().dot(&along) * 300.0;
            let matrix = matrix.mapv(|x| half::bf16::from_f32(x).to_f32());
            let Some(square) = Lower::square(matrix.view(), fast) else {
                return eprintln!("SKIPPED: this processor has no AVX512-BF16");
            };
            let found = square.without(x.view());
            let wide = (matrix.mapv(f64::from), x.mapv(f64::from));
            let rest = &wide.0 - &wide.1.t().dot(&wide.1.dot(&wide.0));
            let truth = rest.dot(&rest.t());
            // x·A·xᵀ, spread over the elements as x is
            let first = wide.1.dot(&wide.0).mapv(|x| x * x).sum();
            let largest = wide.1.fold(0f64, |most, x| most.max(x.abs())).powi(2);
            let noise = Lower::noise(length, fast) * first * largest;
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
