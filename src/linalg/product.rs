//! Matrix products in any layout: the one door to the `gemm` crate.
//!
//! One thread per product: the workers above are the parallelism, and the bytes do not depend on the machine's cores.
//! On a core of Zen 5 these kernels (AVX-512) reach 240 Gflop/s in f32 where OpenBLAS 0.3.21 reaches 120 (2026-11).

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::real::{Real, row_major, zeros};
use super::tiles;

/// Blocks of a triangle that are computed whole: small enough to waste little, large enough for the kernels.
const TRIANGLE_BLOCK: usize = 96;

/// `c ← kept·c + factor·a·b`, each in any layout.
pub fn multiply<T: Real>(
    c: &mut ArrayViewMut2<T>,
    kept: T,
    a: ArrayView2<T>,
    factor: T,
    b: ArrayView2<T>,
) {
    let ((m, k), n) = (a.dim(), b.ncols());
    assert_eq!(b.nrows(), k, "the inner sides of a product agree");
    assert_eq!(c.dim(), (m, n), "a product has the outer sides");
    let zero = T::default();
    if m * n == 0 {
        return;
    }
    if k == 0 {
        if kept == zero {
            c.fill(zero);
        } else {
            c.mapv_inplace(|x| x * kept);
        }
        return;
    }
    // SAFETY: the views state their own sides and strides, and `c` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c.strides()[1],
            c.strides()[0],
            kept != zero,
            a.as_ptr(),
            a.strides()[1],
            a.strides()[0],
            b.as_ptr(),
            b.strides()[1],
            b.strides()[0],
            kept,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `op(a) · op(b)`, where `op` transposes if asked.
///
/// The kernels lay out one factor and stream the other as it lies, if it lies along the sum: a thin first factor is laid out
/// in a moment, a large second one at a quarter of their speed (64 × 3072 × 3072: 57 Gflop/s for 222, Zen 5, 2026-11).
pub fn gemm<T: Real>(
    a: ArrayView2<T>,
    transpose_a: bool,
    b: ArrayView2<T>,
    transpose_b: bool,
) -> Array2<T> {
    let a = if transpose_a { a.reversed_axes() } else { a };
    let b = if transpose_b { b.reversed_axes() } else { b };
    let (m, n) = (a.nrows(), b.ncols());
    if m < n && b.strides()[0] == 1 {
        let mut turned = zeros(n, m);
        multiply(
            &mut turned.view_mut().reversed_axes(),
            T::default(),
            a,
            T::ONE,
            b,
        );
        return row_major::<T, T>(turned.t());
    }
    let mut c = zeros(m, n);
    multiply(&mut c.view_mut(), T::default(), a, T::ONE, b);
    c
}

/// Adds `factor·a·b`, known to be symmetric, to the upper half of `c`: half the work of a product.
pub fn multiply_upper<T: Real>(
    mut c: ArrayViewMut2<T>,
    a: ArrayView2<T>,
    factor: T,
    b: ArrayView2<T>,
) {
    let side = c.nrows();
    if side <= TRIANGLE_BLOCK {
        multiply(&mut c, T::ONE, a, factor, b);
        return;
    }
    let half = (side / 2).next_multiple_of(16);
    let (top, bottom) = a.split_at(Axis(0), half);
    let (left, right) = b.split_at(Axis(1), half);
    multiply(
        &mut c.slice_mut(s![..half, half..]),
        T::ONE,
        top,
        factor,
        right,
    );
    multiply_upper(c.slice_mut(s![..half, ..half]), top, factor, left);
    multiply_upper(c.slice_mut(s![half.., half..]), bottom, factor, right);
}

/// M·Mᵀ of the short side, in `T`, both halves filled.
///
/// M (m, n) is widened and laid out for the kernels by panels, so that it is never held twice as a whole.
pub fn gram<T: Real>(matrix: ArrayView2<f32>) -> Array2<T> {
    let short = short_side_first(matrix);
    let mut gram = zeros(short.nrows(), short.nrows());
    for panel in short.axis_chunks_iter(Axis(1), T::PANEL) {
        T::add_square_lower(gram.view_mut(), panel);
    }
    mirror(&mut gram);
    gram
}

/// Σ x·xᵀ (s, s) over panels x (s, k), their rows dense; both halves filled.
pub fn gram_of_panels(side: usize, panels: impl Iterator<Item = Array2<f32>>) -> Array2<f32> {
    let mut gram = zeros(side, side);
    panels.for_each(|panel| add_square_lower(gram.view_mut(), panel.view()));
    mirror(&mut gram);
    gram
}

/// Adds x·xᵀ to the lower half of `c`, dense rows, for x (m, k) that lies by rows or by columns: half the work of a product.
pub fn add_square_lower(mut c: ArrayViewMut2<f32>, x: ArrayView2<f32>) {
    if tiles::add_square_lower(c.view_mut(), x) {
        return;
    }
    if x.strides()[1] == 1 {
        add_square_by_strips(c, x);
    } else {
        add_square_by_strips(c, row_major::<f32, f32>(x).view());
    }
}

/// As [`add_square_lower`], for x in dense rows.
///
/// By strips so thin that the kernels lay out the strip and stream x: 209 Gflop/s where halves of halves reached 160 (2048 ×
/// 8192, f32, Zen 5, 2026-11).
pub fn add_square_by_strips<T: Real>(mut c: ArrayViewMut2<T>, x: ArrayView2<T>) {
    const STRIP: usize = 64;
    for (strip, start) in x.axis_chunks_iter(Axis(0), STRIP).zip((0..).step_by(STRIP)) {
        let columns = start..start + strip.nrows();
        multiply(
            &mut c.slice_mut(s![start.., columns]),
            T::ONE,
            x.slice(s![start.., ..]),
            T::ONE,
            row_major::<T, T>(strip.t()).view(),
        );
    }
}

/// The matrix, turned so that its short side counts the rows.
pub fn short_side_first(matrix: ArrayView2<f32>) -> ArrayView2<f32> {
    if matrix.nrows() <= matrix.ncols() {
        matrix
    } else {
        matrix.reversed_axes()
    }
}

/// Copies the lower half to the upper, by tiles of one cache line by one.
pub fn mirror<T: Real>(a: &mut Array2<T>) {
    const TILE: usize = 16;
    let side = a.nrows();
    let values = a.as_slice_mut().expect("a Gram matrix is dense");
    let mut tile = [[T::default(); TILE]; TILE];
    for i0 in (0..side).step_by(TILE) {
        let rows = TILE.min(side - i0);
        for j0 in (0..=i0).step_by(TILE) {
            let columns = TILE.min(side - j0);
            for (line, i) in tile[..rows].iter_mut().zip(i0..) {
                line[..columns].copy_from_slice(&values[i * side + j0..][..columns]);
            }
            for (c, j) in (j0..j0 + columns).enumerate() {
                // on the diagonal, what lies below it stays
                let above = if i0 == j0 { c + 1 } else { 0 };
                let to = values[j * side + i0..][above..rows].iter_mut();
                for (to, line) in to.zip(&tile[above..]) {
                    *to = line[c];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;
    use ndarray::array;

    #[test]
    fn products_match_the_definition() {
        let a = array![[1f64, 2.0, 3.0], [4.0, 5.0, 6.0]];
        let b = array![[1f64, 0.5], [2.0, -1.0], [0.0, 7.0]];
        assert_eq!(gemm(a.view(), false, b.view(), false), a.dot(&b));
        assert_eq!(gemm(a.view(), true, a.view(), false), a.t().dot(&a));
        assert_eq!(gemm(b.view(), true, a.view(), true), b.t().dot(&a.t()));
        let mut c = array![[1f64, 1.0], [1.0, 1.0]];
        multiply(&mut c.view_mut(), 2.0, a.view(), -1.0, b.view());
        assert_eq!(c, 2.0 - a.dot(&b));
        let empty = Array2::<f64>::zeros((2, 0));
        multiply(&mut c.view_mut(), 0.0, empty.view(), 1.0, empty.t());
        assert_eq!(c, Array2::<f64>::zeros((2, 2)));
    }

    #[test]
    fn the_gram_matrix_is_that_of_the_short_side_whatever_the_layout() {
        for (m, n) in [(300, 1700), (1700, 300), (7, 5)] {
            let matrix = normal(m, n, 5);
            let short = short_side_first(matrix.view()).mapv(f64::from);
            let wanted = short.dot(&short.t());
            let found = gram::<f64>(matrix.view());
            let single = gram::<f32>(matrix.view());
            for ((at, &w), (&f, &s)) in wanted.indexed_iter().zip(found.iter().zip(&single)) {
                // n products, each rounded once, added in any order: n·ε·Σ|terms| at most
                let terms = m.max(n) as f64 * 9.0;
                assert!((f - w).abs() < terms * f64::EPSILON * 8.0, "{at:?}");
                assert!(
                    (f64::from(s) - w).abs() < terms * f64::from(f32::EPSILON),
                    "{at:?}"
                );
            }
        }
    }
}
