//! LAPACK on row-major arrays: with [`super::product`], the only unsafe code of the linear algebra.
//!
//! A row-major (r, c) array is LAPACK's column-major (c, r); "upper" in one reading is "lower" in the other.

use libc::{c_char, c_int};
use ndarray::{Array1, Array2, ArrayView2, CowArray, Ix2, LinalgScalar, ScalarOperand, s};
// links the BLAS and LAPACK that the declarations below refer to
use openblas_src as _;

use super::halves;
use super::product::{gemm, multiply, multiply_upper, row_major, zeros};
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

/// A LAPACK dimension. Every matrix side we hand over is far below 2³¹: its square would not fit in memory.
fn int(n: usize) -> c_int {
    c_int::try_from(n).expect("a matrix side fits 32 bits")
}

/// The workspace of a LAPACK call, whose length is a 32-bit number in its interface.
fn work_len(n: usize, routine: &'static str, side: usize) -> Result<c_int> {
    c_int::try_from(n).map_err(|_| Error::Lapack {
        routine,
        rows: side,
        columns: side,
        info: c_int::MIN,
    })
}

fn check(routine: &'static str, side: usize, info: c_int) -> Result<()> {
    if info == 0 {
        Ok(())
    } else {
        Err(Error::Lapack {
            routine,
            rows: side,
            columns: side,
            info,
        })
    }
}

const LOWER: c_char = b'L' as c_char;

/// f32 and f64, each with its LAPACK routines.
pub trait Real:
    LinalgScalar + ScalarOperand + Default + PartialOrd + Into<f64> + std::ops::Neg<Output = Self>
{
    const ONE: Self;
    const ROUTINES: [&'static str; 4];
    /// Half the distance from 1 to the next number: the unit roundoff.
    const UNIT: f64;
    fn from_f32(x: f32) -> Self;
    fn from_f64(x: f64) -> Self;
    /// Columns of an f32 matrix to lay out at a time.
    const PANEL: usize;
    /// A panel in this precision and row-major order, copied only if it must be.
    fn laid_out(panel: ArrayView2<'_, f32>) -> CowArray<'_, Self, Ix2>;
    /// Reduces the first `width` columns of a symmetric matrix (lower half) of side n, leading side lda.
    #[allow(clippy::too_many_arguments)]
    unsafe fn raw_latrd(
        n: c_int,
        width: c_int,
        a: *mut Self,
        lda: c_int,
        e: *mut Self,
        tau: *mut Self,
        w: *mut Self,
        ldw: c_int,
    );
    #[allow(clippy::too_many_arguments)]
    unsafe fn raw_sytrd(
        n: c_int,
        a: *mut Self,
        lda: c_int,
        d: *mut Self,
        e: *mut Self,
        tau: *mut Self,
        work: *mut Self,
        lwork: c_int,
    ) -> c_int;
    #[allow(clippy::too_many_arguments)]
    unsafe fn raw_stedc(
        n: c_int,
        d: *mut Self,
        e: *mut Self,
        z: *mut Self,
        work: *mut Self,
        lwork: c_int,
        iwork: *mut c_int,
        liwork: c_int,
    ) -> c_int;
    unsafe fn raw_sterf(n: c_int, d: *mut Self, e: *mut Self) -> c_int;
    unsafe fn raw_larft(n: c_int, k: c_int, v: *const Self, tau: *const Self, t: *mut Self);
    #[allow(clippy::too_many_arguments)]
    unsafe fn raw_laed4(
        n: c_int,
        at: c_int,
        d: *const Self,
        z: *const Self,
        gaps: *mut Self,
        rho: Self,
        root: *mut Self,
    ) -> c_int;

    /// All eigenvalues, ascending, and eigenvectors, one per row, of the tridiagonal matrix (d, e), by LAPACK's stedc.
    fn all_eigenpairs(d: &[Self], e: &[Self]) -> Result<(Vec<Self>, Array2<Self>)> {
        let side = d.len();
        let (mut d, mut e) = (d.to_vec(), e.to_vec());
        let mut z = zeros::<Self>(side, side);
        // (s + 5)·s is never less than the 1 + 4s + s² asked for
        let mut work = zeros::<Self>(side + 5, side.max(1));
        let mut iwork = vec![0; 3 + 5 * side];
        // SAFETY: d has s values, e at least s − 1; z s², work 1 + 4s + s² and iwork 3 + 5s for compz = 'I'.
        let info = unsafe {
            Self::raw_stedc(
                int(side),
                d.as_mut_ptr(),
                e.as_mut_ptr(),
                z.as_mut_ptr(),
                work.as_mut_ptr(),
                work_len(work.len(), Self::ROUTINES[1], side)?,
                iwork.as_mut_ptr(),
                int(iwork.len()),
            )
        };
        check(Self::ROUTINES[1], side, info)?;
        Ok((d, z))
    }

    /// Eigenvalue `at` (ascending) of diag(d) + ρ·z·zᵀ, d ascending, ρ > 0; `gaps` receives dᵢ − λ for all i, or the
    /// eigenvector itself if there are two d at most.
    fn secular_root(
        at: usize,
        d: &[Self],
        z: &[Self],
        rho: Self,
        gaps: &mut [Self],
    ) -> Result<Self> {
        let side = d.len();
        assert!(at < side && z.len() == side && gaps.len() == side);
        let mut root = Self::default();
        // SAFETY: d, z and gaps have `side` values, `at` + 1 is from 1 to `side`.
        let info = unsafe {
            Self::raw_laed4(
                int(side),
                int(at + 1),
                d.as_ptr(),
                z.as_ptr(),
                gaps.as_mut_ptr(),
                rho,
                &mut root,
            )
        };
        check(Self::ROUTINES[3], side, info)?;
        Ok(root)
    }
}

fn borrowed_or_row_major(panel: ArrayView2<'_, f32>) -> CowArray<'_, f32, Ix2> {
    if panel.is_standard_layout() {
        panel.into()
    } else {
        row_major(panel).into()
    }
}

macro_rules! real {
    ($t:ty, $names:expr, $unit:expr, $panel:expr, $laid_out:expr, $latrd:ident, $sytrd:ident, $stedc:ident, $sterf:ident, $larft:ident, $laed4:ident) => {
        unsafe extern "C" {
            fn $latrd(
                uplo: *const c_char,
                n: *const c_int,
                nb: *const c_int,
                a: *mut $t,
                lda: *const c_int,
                e: *mut $t,
                tau: *mut $t,
                w: *mut $t,
                ldw: *const c_int,
            );
            fn $laed4(
                n: *const c_int,
                i: *const c_int,
                d: *const $t,
                z: *const $t,
                delta: *mut $t,
                rho: *const $t,
                dlam: *mut $t,
                info: *mut c_int,
            );
        }
        impl Real for $t {
            const ONE: Self = 1.0;
            const ROUTINES: [&'static str; 4] = $names;
            const UNIT: f64 = $unit;
            fn from_f64(x: f64) -> Self {
                x as Self
            }
            const PANEL: usize = $panel;
            fn from_f32(x: f32) -> Self {
                x.into()
            }
            fn laid_out(panel: ArrayView2<'_, f32>) -> CowArray<'_, Self, Ix2> {
                $laid_out(panel)
            }
            unsafe fn raw_latrd(
                n: c_int,
                width: c_int,
                a: *mut Self,
                lda: c_int,
                e: *mut Self,
                tau: *mut Self,
                w: *mut Self,
                ldw: c_int,
            ) {
                unsafe { $latrd(&LOWER, &n, &width, a, &lda, e, tau, w, &ldw) }
            }
            unsafe fn raw_sytrd(
                n: c_int,
                a: *mut Self,
                lda: c_int,
                d: *mut Self,
                e: *mut Self,
                tau: *mut Self,
                work: *mut Self,
                lwork: c_int,
            ) -> c_int {
                let mut info = 0;
                unsafe {
                    lapack_sys::$sytrd(&LOWER, &n, a, &lda, d, e, tau, work, &lwork, &mut info)
                };
                info
            }
            unsafe fn raw_stedc(
                n: c_int,
                d: *mut Self,
                e: *mut Self,
                z: *mut Self,
                work: *mut Self,
                lwork: c_int,
                iwork: *mut c_int,
                liwork: c_int,
            ) -> c_int {
                let (with_vectors, mut info) = (b'I' as c_char, 0);
                unsafe {
                    lapack_sys::$stedc(
                        &with_vectors,
                        &n,
                        d,
                        e,
                        z,
                        &n,
                        work,
                        &lwork,
                        iwork,
                        &liwork,
                        &mut info,
                    )
                };
                info
            }
            unsafe fn raw_sterf(n: c_int, d: *mut Self, e: *mut Self) -> c_int {
                let mut info = 0;
                unsafe { lapack_sys::$sterf(&n, d, e, &mut info) };
                info
            }
            unsafe fn raw_laed4(
                n: c_int,
                at: c_int,
                d: *const Self,
                z: *const Self,
                gaps: *mut Self,
                rho: Self,
                root: *mut Self,
            ) -> c_int {
                let mut info = 0;
                unsafe { $laed4(&n, &at, d, z, gaps, &rho, root, &mut info) };
                info
            }
            unsafe fn raw_larft(
                n: c_int,
                k: c_int,
                v: *const Self,
                tau: *const Self,
                t: *mut Self,
            ) {
                let (forward, columns) = (b'F' as c_char, b'C' as c_char);
                unsafe {
                    lapack_sys::$larft(&forward, &columns, &n, &k, v.cast_mut(), &n, tau, t, &k)
                };
            }
        }
    };
}
real!(
    f32,
    ["ssytrd", "sstedc", "ssterf", "slaed4"],
    f32::EPSILON as f64 / 2.0,
    2048,
    borrowed_or_row_major,
    slatrd_,
    ssytrd_,
    sstedc_,
    ssterf_,
    slarft_,
    slaed4_
);
real!(
    f64,
    ["dsytrd", "dstedc", "dsterf", "dlaed4"],
    f64::EPSILON / 2.0,
    512,
    |panel| CowArray::from(row_major(panel)),
    dlatrd_,
    dsytrd_,
    dstedc_,
    dsterf_,
    dlarft_,
    dlaed4_
);

/// A symmetric matrix as T = Qᵀ·A·Q with T tridiagonal and Q a product of Householder reflectors.
///
/// LAPACK's blocked reduction (sytrd: Dongarra, Sorensen & Hammarling 1989) with the rank-2k updates, half of its
/// 4/3·s³ flops, and the back-transformation as products of ours; the other half is matrix–vector work, bound by memory.
pub struct Tridiagonal<T> {
    diagonal: Vec<T>,
    off_diagonal: Vec<T>,
    /// Beyond its diagonal, row j of the reduced matrix is reflector j: these halves of the rows, one after another.
    reflectors: Vec<T>,
    tau: Vec<T>,
}

/// Columns reduced between two rank-2k updates.
const PANEL: usize = 32;

/// Reflectors applied at a time on the way back.
const BLOCK: usize = 96;

impl<T: Real> Tridiagonal<T> {
    /// Reduces a symmetric matrix, of which the upper half is read.
    pub fn reduce(mut a: Array2<T>) -> Result<Self> {
        assert!(a.is_square() && a.is_standard_layout());
        let side = a.nrows();
        let (mut d, mut e) = (vec![T::default(); side], vec![T::default(); side]);
        let mut tau = vec![T::default(); side];
        let mut w = Array2::from_elem((PANEL, side), T::default());
        let mut start = 0;
        while side - start > 2 * PANEL {
            let rest = side - start;
            // SAFETY: the trailing matrix of side `rest` starts at (start, start), leading side `side`; e and tau have
            // `rest` places left, w holds PANEL columns of leading side `side`.
            unsafe {
                T::raw_latrd(
                    int(rest),
                    int(PANEL),
                    a.as_mut_ptr().add(start * side + start),
                    int(side),
                    e.as_mut_ptr().add(start),
                    tau.as_mut_ptr().add(start),
                    w.as_mut_ptr(),
                    int(side),
                );
            }
            let next = start + PANEL;
            // A ← A − V·Wᵀ − W·Vᵀ on what is left: one product of twice the depth
            let v = a.slice(s![start..next, next..]);
            let w = w.slice(s![.., PANEL..rest]);
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
        let rest = side - start;
        let mut work = vec![T::default(); PANEL * rest.max(1)];
        // SAFETY: as above; d, e and tau have `rest` places left, work has PANEL·rest.
        let info = unsafe {
            T::raw_sytrd(
                int(rest),
                a.as_mut_ptr().add(start * side + start),
                int(side),
                d.as_mut_ptr().add(start),
                e.as_mut_ptr().add(start),
                tau.as_mut_ptr().add(start),
                work.as_mut_ptr(),
                work_len(work.len(), T::ROUTINES[0], side)?,
            )
        };
        check(T::ROUTINES[0], side, info)?;
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
    pub fn eigenvalues(&self) -> Result<Vec<T>> {
        let (mut d, mut e) = (self.diagonal.clone(), self.off_diagonal.clone());
        // SAFETY: d has s values, e at least s − 1.
        let info = unsafe { T::raw_sterf(int(d.len()), d.as_mut_ptr(), e.as_mut_ptr()) };
        check(T::ROUTINES[2], d.len(), info)?;
        d.reverse();
        Ok(d)
    }

    /// The q largest eigenvalues, descending, and their eigenvectors, one per row.
    ///
    /// Divide and conquer, then the q vectors alone back through Q.
    pub fn leading(&self, q: usize) -> Result<(Vec<T>, Array2<T>)> {
        let side = self.side();
        assert!(q <= side, "q eigenpairs of an s × s matrix");
        let (d, e) = (&self.diagonal, &self.off_diagonal);
        let (values, mut vectors) = if side >= halves::WORTH_IT {
            halves::leading(d, e, q)?
        } else {
            let (values, all) = T::all_eigenpairs(d, e)?;
            let mut vectors = zeros(q, side);
            for (mut to, from) in vectors
                .rows_mut()
                .into_iter()
                .zip(all.rows().into_iter().rev())
            {
                to.assign(&from);
            }
            (values.into_iter().rev().take(q).collect(), vectors)
        };
        self.rotate_back(&mut vectors);
        Ok((values, vectors))
    }

    /// Turns vectors of T, one per row, into vectors of the matrix: x ← x·Qᵀ.
    pub fn rotate_back(&self, vectors: &mut Array2<T>) {
        let count = self.side().saturating_sub(1);
        let starts: Vec<usize> = (0..count).step_by(BLOCK).collect();
        for &start in starts.iter().rev() {
            let block = start..(start + BLOCK).min(count);
            // H = I − vᵀ·t·v, the compact WY form (Schreiber & Van Loan 1989)
            let width = block.len();
            let mut v = Array2::from_elem((width, count - start), T::default());
            for (at, (mut row, j)) in v.rows_mut().into_iter().zip(block).enumerate() {
                let row = row.as_slice_mut().expect("a fresh array is dense");
                row[at] = T::ONE;
                row[at + 1..].copy_from_slice(&self.reflector(j)[1..]);
            }
            let mut t = Array2::from_elem((width, width), T::default());
            // SAFETY: row-major (width, length) is column-major length × width; t is width × width.
            unsafe {
                T::raw_larft(
                    int(v.ncols()),
                    int(width),
                    v.as_ptr(),
                    self.tau.as_ptr().add(start),
                    t.as_mut_ptr(),
                );
            }
            let mut x = vectors.slice_mut(s![.., start + 1..]);
            let inner = gemm(x.view(), false, v.view(), true);
            let inner = gemm(inner.view(), false, t.view(), false);
            multiply(&mut x, T::ONE, inner.view(), -T::ONE, v.view());
        }
    }
}

impl Tridiagonal<f32> {
    /// Approximate eigenvectors for the eigenvalues `at`, one per row, by two steps of inverse iteration in f64.
    ///
    /// Good to look at: neighbours closer than rounding come out mixed.
    pub fn glimpse(&self, at: &[f32]) -> Array2<f32> {
        let side = self.side();
        let scale = self
            .diagonal
            .iter()
            .fold(0f64, |m, &x| m.max(f64::from(x).abs()));
        let mut vectors = Array2::zeros((at.len(), side));
        for (mut row, &value) in vectors.rows_mut().into_iter().zip(at) {
            // a shift a little off, so that the system is not singular to the last bit
            let shift = f64::from(value) + scale * 1e-9;
            let mut x = vec![1.0; side];
            for _ in 0..2 {
                let mut low: Vec<f64> = self.off_diagonal.iter().map(|&x| x.into()).collect();
                let mut high = low.clone();
                let mut d: Vec<f64> = self
                    .diagonal
                    .iter()
                    .map(|&x| f64::from(x) - shift)
                    .collect();
                let mut info = 0;
                // SAFETY: d and x have s values, the others at least s − 1.
                unsafe {
                    lapack_sys::dgtsv_(
                        &int(side),
                        &1,
                        low.as_mut_ptr(),
                        d.as_mut_ptr(),
                        high.as_mut_ptr(),
                        x.as_mut_ptr(),
                        &int(side),
                        &mut info,
                    );
                }
                let norm = x.iter().map(|y| y * y).sum::<f64>().sqrt();
                x.iter_mut().for_each(|y| *y /= norm);
            }
            row.assign(&Array1::from_iter(x.iter().map(|&y| y as f32)));
        }
        self.rotate_back(&mut vectors);
        vectors
    }
}

/// Makes the rows orthonormal, each orthogonal to the ones before it: the first rows keep their direction.
///
/// Cholesky-QR; where the rows are too dependent for it, Householder QR. A symmetric (Löwdin) polish would let
/// badly determined last rows tilt the leading ones.
pub fn orthonormalise_rows(a: &mut Array2<f32>) -> Result<()> {
    // a pivot near the rounding noise of the unit diagonal means a direction made of noise; one far from 1 magnifies
    // rounding, which a second pass takes out (CholeskyQR2: Yamamoto et al. 2015)
    let pivots = cholesky_rows(a, 1e-2).map(|c| c.diag().iter().fold(1f32, |m, &p| m.min(p)));
    match pivots {
        Some(least) if least > 0.9 => Ok(()),
        Some(_) if cholesky_rows(a, 0.5).is_some() => Ok(()),
        _ => householder_rows(a),
    }
}

/// Replaces the rows A by C⁻¹·A with C lower triangular and C·Cᵀ = A·Aᵀ, and returns C.
///
/// Nothing is changed and `None` returned if a pivot of C is not above `pivot_min`: the rows are too dependent.
pub fn cholesky_rows(a: &mut Array2<f32>, pivot_min: f32) -> Option<Array2<f32>> {
    let q = a.nrows();
    if q == 0 {
        return Some(Array2::zeros((0, 0)));
    }
    let mut factor = Array2::<f32>::zeros((q, q));
    multiply_upper(factor.view_mut(), a.view(), 1.0, a.t());
    let (n, mut info) = (int(q), 0);
    // SAFETY: factor is q × q. Row-major upper = column-major lower; potrf gives C with C·Cᵀ = gram there.
    unsafe { lapack_sys::spotrf_(&LOWER, &n, factor.as_mut_ptr(), &n, &mut info) };
    let sound = info == 0 && factor.diag().iter().all(|&pivot| pivot > pivot_min);
    if !sound {
        return None;
    }
    let mut lower = factor.reversed_axes();
    for i in 0..q {
        lower.slice_mut(s![i, i + 1..]).fill(0.0);
    }
    solve_lower(lower.view(), a.view_mut());
    Some(lower)
}

/// x ← l⁻¹·x for a lower triangular l: halves solved in turn, so that nearly all of it is products.
pub fn solve_lower<T: Real>(l: ArrayView2<T>, mut x: ndarray::ArrayViewMut2<T>) {
    const DIRECT: usize = 16;
    let side = l.nrows();
    if side <= DIRECT {
        for i in 0..side {
            let (done, mut rest) = x.view_mut().split_at(ndarray::Axis(0), i);
            let mut row = rest.row_mut(0);
            for (j, solved) in done.rows().into_iter().enumerate() {
                row.scaled_add(-l[(i, j)], &solved);
            }
            let pivot = l[(i, i)];
            row.mapv_inplace(|x| x / pivot);
        }
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

fn householder_rows(a: &mut Array2<f32>) -> Result<()> {
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
        let seen = t.glimpse(&values);
        for (x, y) in seen.rows().into_iter().zip(vectors.rows()) {
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
        orthonormalise_rows(&mut a).expect("orthonormal");
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
            let lower = cholesky_rows(&mut a, 1e-3).expect("independent");
            let unit = a.dot(&a.t()) - Array2::<f32>::eye(q);
            assert!(unit.iter().all(|x| x.abs() < 1e-5), "q {q}");
            let off = lower.dot(&a) - before;
            assert!(off.iter().all(|x| x.abs() < 1e-4), "q {q}");
        }
    }
}
