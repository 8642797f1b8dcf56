//! BLAS and LAPACK on row-major arrays: the only unsafe code of the linear algebra.
//!
//! A row-major (r, c) array is LAPACK's column-major (c, r); "lower" in one reading is "upper" in the other.

use cblas_sys::{
    CBLAS_DIAG, CBLAS_LAYOUT::CblasRowMajor, CBLAS_SIDE, CBLAS_TRANSPOSE, CBLAS_UPLO, cblas_dgemm,
    cblas_dsyrk, cblas_sgemm, cblas_ssyrk, cblas_strsm,
};
use libc::{c_char, c_int};
use ndarray::{Array2, ArrayView2};
// links the BLAS and LAPACK that the declarations above and below refer to
use openblas_src as _;

use crate::error::{Error, Result};

unsafe extern "C" {
    fn openblas_set_num_threads(threads: c_int);
}

/// Makes every BLAS call run on the thread that makes it.
///
/// Our workers are the parallelism: two levels of it starve each other (2–7 × slower on two shared cores,
/// OpenBLAS 0.3.21 and 0.3.34, 2026-11), and one thread per product makes the bytes independent of the machine's cores.
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

const LOWER: c_char = b'L' as c_char;

fn transpose(yes: bool) -> CBLAS_TRANSPOSE {
    if yes {
        CBLAS_TRANSPOSE::CblasTrans
    } else {
        CBLAS_TRANSPOSE::CblasNoTrans
    }
}

/// f32 and f64, each with its BLAS and LAPACK routines.
pub trait Real: Copy + Default + PartialOrd + Into<f64> + 'static {
    const ROUTINES: [&'static str; 3];
    fn from_f32(x: f32) -> Self;
    /// c (m, n) = op(a)·op(b), dense row-major
    #[allow(clippy::too_many_arguments)]
    unsafe fn raw_gemm(
        ta: bool,
        tb: bool,
        m: c_int,
        n: c_int,
        k: c_int,
        a: *const Self,
        lda: c_int,
        b: *const Self,
        ldb: c_int,
        c: *mut Self,
    );
    /// c (n, n), upper half in row-major order, += a·aᵀ or aᵀ·a
    unsafe fn raw_syrk(ta: bool, n: c_int, k: c_int, a: *const Self, lda: c_int, c: *mut Self);
    unsafe fn raw_sytrd(
        n: c_int,
        a: *mut Self,
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
    #[allow(clippy::too_many_arguments)]
    unsafe fn raw_ormtr(
        n: c_int,
        q: c_int,
        a: *const Self,
        tau: *const Self,
        c: *mut Self,
        work: *mut Self,
        lwork: c_int,
    ) -> c_int;
}

macro_rules! real {
    ($t:ty, $names:expr, $gemm:ident, $syrk:ident, $sytrd:ident, $stedc:ident, $ormtr:ident) => {
        impl Real for $t {
            const ROUTINES: [&'static str; 3] = $names;
            fn from_f32(x: f32) -> Self {
                x.into()
            }
            unsafe fn raw_gemm(
                ta: bool,
                tb: bool,
                m: c_int,
                n: c_int,
                k: c_int,
                a: *const Self,
                lda: c_int,
                b: *const Self,
                ldb: c_int,
                c: *mut Self,
            ) {
                unsafe {
                    $gemm(
                        CblasRowMajor,
                        transpose(ta),
                        transpose(tb),
                        m,
                        n,
                        k,
                        1.0,
                        a,
                        lda,
                        b,
                        ldb,
                        0.0,
                        c,
                        n,
                    );
                }
            }
            unsafe fn raw_syrk(
                ta: bool,
                n: c_int,
                k: c_int,
                a: *const Self,
                lda: c_int,
                c: *mut Self,
            ) {
                unsafe {
                    $syrk(
                        CblasRowMajor,
                        CBLAS_UPLO::CblasUpper,
                        transpose(ta),
                        n,
                        k,
                        1.0,
                        a,
                        lda,
                        1.0,
                        c,
                        n,
                    );
                }
            }
            unsafe fn raw_sytrd(
                n: c_int,
                a: *mut Self,
                d: *mut Self,
                e: *mut Self,
                tau: *mut Self,
                work: *mut Self,
                lwork: c_int,
            ) -> c_int {
                let mut info = 0;
                unsafe {
                    lapack_sys::$sytrd(&LOWER, &n, a, &n, d, e, tau, work, &lwork, &mut info)
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
                let mut info = 0;
                unsafe {
                    lapack_sys::$stedc(
                        &(b'I' as c_char),
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
            unsafe fn raw_ormtr(
                n: c_int,
                q: c_int,
                a: *const Self,
                tau: *const Self,
                c: *mut Self,
                work: *mut Self,
                lwork: c_int,
            ) -> c_int {
                let mut info = 0;
                unsafe {
                    lapack_sys::$ormtr(
                        &(b'L' as c_char),
                        &LOWER,
                        &(b'N' as c_char),
                        &n,
                        &q,
                        a,
                        &n,
                        tau,
                        c,
                        &n,
                        work,
                        &lwork,
                        &mut info,
                    )
                };
                info
            }
        }
    };
}
real!(
    f32,
    ["ssytrd", "sstedc", "sormtr"],
    cblas_sgemm,
    cblas_ssyrk,
    ssytrd_,
    sstedc_,
    sormtr_
);
real!(
    f64,
    ["dsytrd", "dstedc", "dormtr"],
    cblas_dgemm,
    cblas_dsyrk,
    dsytrd_,
    dstedc_,
    dormtr_
);

/// A view's elements, which must lie row-major and dense.
fn dense<'a, T>(a: &'a ArrayView2<'_, T>) -> &'a [T] {
    a.as_slice().expect("matrices are dense and row-major")
}

/// `op(a) · op(b)`, where `op` transposes if asked.
pub fn gemm<T: Real>(
    a: ArrayView2<T>,
    transpose_a: bool,
    b: ArrayView2<T>,
    transpose_b: bool,
) -> Array2<T> {
    let (m, k) = if transpose_a {
        (a.ncols(), a.nrows())
    } else {
        a.dim()
    };
    let (kb, n) = if transpose_b {
        (b.ncols(), b.nrows())
    } else {
        b.dim()
    };
    assert_eq!(k, kb, "the inner sides of a product agree");
    let mut c = Array2::from_elem((m, n), T::default());
    if m * n * k > 0 {
        // SAFETY: both inputs are dense row-major with leading sides as stated, the output has m·n elements.
        unsafe {
            T::raw_gemm(
                transpose_a,
                transpose_b,
                int(m),
                int(n),
                int(k),
                dense(&a).as_ptr(),
                int(a.ncols()),
                dense(&b).as_ptr(),
                int(b.ncols()),
                c.as_mut_ptr(),
            );
        }
    }
    c
}

/// Adds `a·aᵀ` (or `aᵀ·a`) to the upper half of `gram`.
pub fn add_gram<T: Real>(a: ArrayView2<T>, transpose_a: bool, gram: &mut Array2<T>) {
    let (s, k) = if transpose_a {
        (a.ncols(), a.nrows())
    } else {
        a.dim()
    };
    assert_eq!(
        gram.dim(),
        (s, s),
        "the Gram matrix has the side of its matrix"
    );
    // SAFETY: `a` is dense row-major with `a.ncols()` as leading side, `gram` has s·s elements.
    unsafe {
        T::raw_syrk(
            transpose_a,
            int(s),
            int(k),
            dense(&a).as_ptr(),
            int(a.ncols()),
            gram.as_mut_ptr(),
        );
    }
}

/// The q largest eigenvalues, descending, and their eigenvectors, one per row, of a symmetric matrix.
///
/// Takes the upper half (row-major). Householder tridiagonalisation, divide and conquer, and a back-transformation of
/// the q vectors alone (LAPACK sytrd, stedc, ormtr; Cuppen 1981, Gu & Eisenstat 1995).
pub fn top_eigenpairs<T: Real>(mut matrix: Array2<T>, q: usize) -> Result<(Vec<T>, Array2<T>)> {
    let s = matrix.nrows();
    assert!(
        q <= s && matrix.is_square(),
        "q eigenpairs of an s × s matrix"
    );
    let n = int(s);
    let [sytrd, stedc, ormtr] = T::ROUTINES;
    let check = |routine: &'static str, info: c_int| {
        if info == 0 {
            Ok(())
        } else {
            Err(Error::Lapack {
                routine,
                rows: s,
                columns: s,
                info,
            })
        }
    };
    let zeros = |len: usize| vec![T::default(); len];
    let (mut d, mut e, mut tau) = (zeros(s), zeros(s), zeros(s));

    let mut work = zeros(64 * s);
    // SAFETY: lengths as LAPACK's sytrd asks: a n², d and tau n (n − 1 used), e n − 1, work 64 n.
    let info = unsafe {
        T::raw_sytrd(
            n,
            matrix.as_mut_ptr(),
            d.as_mut_ptr(),
            e.as_mut_ptr(),
            tau.as_mut_ptr(),
            work.as_mut_ptr(),
            work_len(work.len(), sytrd, s)?,
        )
    };
    check(sytrd, info)?;

    let mut z = zeros(s * s);
    let mut work = zeros(1 + 4 * s + s * s);
    let mut iwork = vec![0; 3 + 5 * s];
    // SAFETY: z n², work 1 + 4n + n² and iwork 3 + 5n for compz = 'I'.
    let info = unsafe {
        T::raw_stedc(
            n,
            d.as_mut_ptr(),
            e.as_mut_ptr(),
            z.as_mut_ptr(),
            work.as_mut_ptr(),
            work_len(work.len(), stedc, s)?,
            iwork.as_mut_ptr(),
            int(iwork.len()),
        )
    };
    check(stedc, info)?;
    drop(work);

    // eigenvalues ascend: the leading vectors are the last q columns (LAPACK) = rows (ours)
    let mut leading = z.split_off((s - q) * s);
    drop(z);
    let mut work = zeros(64 * q.max(1));
    // SAFETY: the reflectors lie in the lower half (column-major) of `matrix`; c is n × q, work 64 q.
    let info = unsafe {
        T::raw_ormtr(
            n,
            int(q),
            matrix.as_ptr(),
            tau.as_ptr(),
            leading.as_mut_ptr(),
            work.as_mut_ptr(),
            work_len(work.len(), ormtr, s)?,
        )
    };
    check(ormtr, info)?;

    let ascending = Array2::from_shape_vec((q, s), leading).expect("q vectors of length s");
    let mut vectors = Array2::from_elem((q, s), T::default());
    for (mut to, from) in vectors
        .rows_mut()
        .into_iter()
        .zip(ascending.rows().into_iter().rev())
    {
        to.assign(&from);
    }
    Ok((d.into_iter().rev().take(q).collect(), vectors))
}

/// Makes the rows orthonormal, each orthogonal to the ones before it: the first rows keep their direction.
///
/// Cholesky-QR; where the rows are too dependent for it, Householder QR. A symmetric (Löwdin) polish would let
/// badly determined last rows tilt the leading ones.
pub fn orthonormalise_rows(a: &mut Array2<f32>) -> Result<()> {
    let (q, l) = a.dim();
    if q == 0 {
        return Ok(());
    }
    let mut gram = Array2::<f32>::zeros((q, q));
    add_gram(a.view(), false, &mut gram);
    let mut info = 0;
    let n = int(q);
    // SAFETY: gram is q × q. Row-major upper = column-major lower; potrf gives the factor C with C·Cᵀ = gram there.
    unsafe { lapack_sys::spotrf_(&LOWER, &n, gram.as_mut_ptr(), &n, &mut info) };
    // a pivot near the rounding noise of the unit diagonal means a direction made of noise
    let well = info == 0 && gram.diag().iter().all(|&pivot| pivot > 1e-2);
    if well {
        // SAFETY: column-major lower C is row-major upper Cᵀ: solve C·X = A, that is (row-major, upper, transposed).
        unsafe {
            cblas_strsm(
                CblasRowMajor,
                CBLAS_SIDE::CblasLeft,
                CBLAS_UPLO::CblasUpper,
                CBLAS_TRANSPOSE::CblasTrans,
                CBLAS_DIAG::CblasNonUnit,
                n,
                int(l),
                1.0,
                gram.as_ptr(),
                n,
                a.as_mut_ptr(),
                int(l),
            );
        }
        return Ok(());
    }
    householder_rows(a)
}

fn householder_rows(a: &mut Array2<f32>) -> Result<()> {
    let (q, l) = a.dim();
    let (n, m) = (int(q), int(l));
    let mut tau = vec![0f32; q];
    let mut work = vec![0f32; 64 * q];
    let lwork = work_len(work.len(), "sgeqrf", q)?;
    let mut info = 0;
    let check = |routine, info| {
        if info == 0 {
            Ok(())
        } else {
            Err(Error::Lapack {
                routine,
                rows: l,
                columns: q,
                info,
            })
        }
    };
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
    check("sgeqrf", info)?;
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
    check("sorgqr", info)?;
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
    use ndarray::array;

    #[test]
    fn products_match_the_definition() {
        let a = array![[1f64, 2.0, 3.0], [4.0, 5.0, 6.0]];
        let b = array![[1f64, 0.5], [2.0, -1.0], [0.0, 7.0]];
        assert_eq!(gemm(a.view(), false, b.view(), false), a.dot(&b));
        assert_eq!(gemm(a.view(), true, a.view(), false), a.t().dot(&a));
        assert_eq!(gemm(b.view(), true, a.view(), true), b.t().dot(&a.t()));
    }

    #[test]
    fn eigenpairs_come_largest_first() {
        let (values, vectors) = top_eigenpairs(
            array![[2f64, 1.0, 0.0], [9.9, 2.0, 0.0], [9.9, 9.9, 5.0]],
            2,
        )
        .expect("converges");
        assert!((values[0] - 5.0).abs() < 1e-14 && (values[1] - 3.0).abs() < 1e-14);
        assert!((vectors[(0, 2)].abs() - 1.0).abs() < 1e-14);
        assert!((vectors[(1, 0)] - vectors[(1, 1)]).abs() < 1e-14);
    }

    #[test]
    fn dependent_rows_become_orthonormal_too() {
        let mut a = array![
            [1f32, 0.0, 0.0, 0.0],
            [1.0, 1e-9, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0]
        ];
        orthonormalise_rows(&mut a).expect("orthonormal");
        let gram = a.dot(&a.t());
        for ((i, j), g) in gram.indexed_iter() {
            let wanted = if i == j { 1.0 } else { 0.0 };
            assert!((g - wanted).abs() < 1e-6, "{gram:?}");
        }
        assert!(a[(0, 0)] > 0.999, "the first row keeps its direction");
    }
}
