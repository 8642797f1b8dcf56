//! x·xᵀ of numbers that bf16 holds, as most models have their weights.
//!
//! Processors with AVX512-BF16 (Zen 4, Sapphire Rapids and newer) multiply such numbers by pairs and add in f32, at twice the rate
//! of products in f32: 190 Gflop/s a core where those make 92 (2048 × 8192, Zen 4, 2026-11). Each product is exact, and
//! the sums round as f32's own do; denormal numbers count as zeros.

use ndarray::{ArrayView2, ArrayViewMut2};

/// Adds x·xᵀ to the lower half of c (s, s), dense rows, for x (s, k) that lies by rows or by columns; what is above the
/// diagonal of c is spoilt.
///
/// Says whether it did: not on other processors, and not with other numbers.
pub fn add_square_lower(c: ArrayViewMut2<f32>, x: ArrayView2<f32>) -> bool {
    #[cfg(target_arch = "x86_64")]
    if avx512::is_there() && are_held(x) {
        avx512::add_square_lower(c, x);
        return true;
    }
    let _ = (c, x);
    false
}

/// Whether bf16 holds the numbers: it is the first half of their bits.
#[cfg(target_arch = "x86_64")]
fn are_held(x: ArrayView2<f32>) -> bool {
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
        __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_si512,
        _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_setzero_ps,
    };
    use std::mem::transmute;

    use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

    /// Numbers in a vector of f32, and pairs in one of bf16.
    const LANES: usize = 16;

    /// A tile of c is TALL vectors of its columns by WIDE of its rows: 24 of the 32 registers.
    const TALL: usize = 3;
    const WIDE: usize = 8;

    /// Rows of x that are laid out together, pair by pair.
    const SLIVER: usize = TALL * LANES;

    /// Pairs of columns that are laid out at a time: 4 MB of 2048 rows.
    const LAID_OUT: usize = 512;

    /// Pairs that are summed before they are added to c: longer sums round more.
    const SUMMED: usize = 128;

    /// A pair of each row of a sliver.
    type Pairs = [u32; SLIVER];

    pub fn is_there() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
    }

    pub fn add_square_lower(mut c: ArrayViewMut2<f32>, x: ArrayView2<f32>) {
        let side = x.nrows();
        assert_eq!(c.dim(), (side, side), "a square has the rows for sides");
        assert!(is_there(), "somebody asked first");
        let c = c.as_slice_mut().expect("its rows are dense");
        let mut laid_out: Vec<Pairs> = Vec::new();
        for columns in x.axis_chunks_iter(Axis(1), 2 * LAID_OUT) {
            let pairs = columns.ncols().div_ceil(2);
            laid_out.resize(side.div_ceil(SLIVER) * pairs, [0; SLIVER]);
            for (sliver, rows) in laid_out
                .chunks_exact_mut(pairs)
                .zip(columns.axis_chunks_iter(Axis(0), SLIVER))
            {
                lay_out(rows, sliver);
            }
            // SAFETY: the processor has the instructions.
            unsafe { add_products(c, side, &laid_out, pairs) }
        }
    }

    /// The pairs of up to [`SLIVER`] rows; other rows are zeros.
    fn lay_out(rows: ArrayView2<f32>, to: &mut [Pairs]) {
        let pair = |a: f32, b: f32| a.to_bits() >> 16 | b.to_bits() & 0xffff_0000;
        let (count, length) = rows.dim();
        if count < SLIVER {
            to.fill([0; SLIVER]);
        }
        let whole = length / 2;
        if rows.strides()[1] == 1 {
            // as many pairs at a time as keep what is written in the nearest cache
            const NEAR: usize = 64;
            for start in (0..whole).step_by(NEAR) {
                let end = whole.min(start + NEAR);
                for (r, row) in rows.rows().into_iter().enumerate() {
                    let row = row.to_slice().expect("its stride is 1");
                    let (twos, _) = row[2 * start..2 * end].as_chunks::<2>();
                    for (to, &[a, b]) in to[start..end].iter_mut().zip(twos) {
                        to[r] = pair(a, b);
                    }
                }
            }
        } else {
            for (p, to) in to[..whole].iter_mut().enumerate() {
                let (a, b) = (rows.column(2 * p), rows.column(2 * p + 1));
                for ((to, &a), &b) in to.iter_mut().zip(a).zip(b) {
                    *to = pair(a, b);
                }
            }
        }
        if whole < to.len() {
            let last = rows.slice(s![.., length - 1]);
            to[whole] = [0; SLIVER];
            for (to, &a) in to[whole].iter_mut().zip(last) {
                *to = pair(a, 0.0);
            }
        }
    }

    /// All tiles on and below the diagonal.
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn add_products(c: &mut [f32], side: usize, laid_out: &[Pairs], pairs: usize) {
        let slivers = || (0..).step_by(SLIVER).zip(laid_out.chunks_exact(pairs));
        for (column, tall) in slivers() {
            for (first, wide) in slivers().skip(column / SLIVER) {
                for at in (0..SLIVER).step_by(WIDE) {
                    let row = first + at;
                    if row >= side {
                        break;
                    }
                    let tile = &mut c[row * side + column..];
                    let (rows, columns) = (WIDE.min(side - row), SLIVER.min(side - column));
                    for (tall, wide) in tall.chunks(SUMMED).zip(wide.chunks(SUMMED)) {
                        add_tile(tile, side, rows, columns, tall, wide, at);
                    }
                }
            }
        }
    }

    /// Adds to `rows` by `columns` of c, which begins with the tile, the products of a sliver and WIDE rows of another, from `at`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn add_tile(
        c: &mut [f32],
        side: usize,
        rows: usize,
        columns: usize,
        tall: &[Pairs],
        wide: &[Pairs],
        at: usize,
    ) {
        assert!(at + WIDE <= SLIVER && tall.len() == wide.len());
        let mut sums = [[_mm512_setzero_ps(); TALL]; WIDE];
        for (tall, wide) in tall.iter().zip(wide) {
            let vector = |v: usize| -> __m512bh {
                // SAFETY: TALL vectors of LANES pairs are a sliver's; both types are 512 bits of any kind.
                unsafe {
                    transmute(_mm512_loadu_si512(
                        tall.as_ptr().add(v * LANES).cast::<__m512i>(),
                    ))
                }
            };
            let tall = [vector(0), vector(1), vector(2)];
            for (j, sums) in sums.iter_mut().enumerate() {
                // SAFETY: at + j < SLIVER; both types are 512 bits of any kind.
                let wide: __m512bh =
                    unsafe { transmute(_mm512_set1_epi32(*wide.get_unchecked(at + j) as i32)) };
                for (sum, &tall) in sums.iter_mut().zip(&tall) {
                    *sum = _mm512_dpbf16_ps(*sum, tall, wide);
                }
            }
        }
        for (j, sums) in sums.iter().enumerate().take(rows) {
            let row = &mut c[j * side..][..columns];
            for (part, &sum) in row.chunks_mut(LANES).zip(sums) {
                let mask = (u32::MAX >> (u32::BITS as usize - part.len())) as u16;
                // SAFETY: the mask leaves out what lies behind the part.
                unsafe {
                    let before = _mm512_maskz_loadu_ps(mask, part.as_ptr());
                    _mm512_mask_storeu_ps(part.as_mut_ptr(), mask, _mm512_add_ps(before, sum));
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::random::normal;
    use ndarray::Array2;

    fn held(rows: usize, columns: usize) -> Array2<f32> {
        normal(rows, columns, 7).mapv(|x| half::bf16::from_f32(x).to_f32())
    }

    #[test]
    fn squares_are_those_of_double_precision_to_the_rounding_of_single() {
        if !avx512::is_there() {
            return eprintln!("SKIPPED: this processor has no AVX512-BF16");
        }
        // around tiles, slivers, and what is laid out and summed at a time
        for (side, length) in [(1, 1), (7, 2), (48, 3), (49, 255), (100, 257), (131, 2051)] {
            let x = held(side, length);
            let turned = x.t().as_standard_layout().into_owned();
            for x in [x.view(), turned.t()] {
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
    fn other_numbers_are_left_to_others() {
        let mut x = held(60, 90);
        x[(59, 89)] = f32::from_bits(x[(59, 89)].to_bits() | 1);
        let mut c = Array2::zeros((60, 60));
        assert!(!add_square_lower(c.view_mut(), x.view()));
        assert!(c.iter().all(|&x| x == 0.0));
    }
}
