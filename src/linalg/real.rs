//! The two precisions, each with its routines of LAPACK, and matrices of them.

use libc::{c_char, c_int};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, LinalgScalar, ScalarOperand, s};
// links the BLAS and LAPACK that the declarations below refer to
use openblas_src as _;

use super::product::{self, add_square_by_strips};
use crate::error::{Error, Result};
use crate::lanes::Vectors;

/// A LAPACK dimension. Every matrix side we hand over is far below 2³¹: its square would not fit in memory.
pub(super) fn int(n: usize) -> c_int {
    c_int::try_from(n).expect("a matrix side fits 32 bits")
}

/// The workspace of a LAPACK call, whose length is a 32-bit number in its interface.
pub(super) fn work_len(n: usize, routine: &'static str, side: usize) -> Result<c_int> {
    c_int::try_from(n).map_err(|_| Error::Lapack {
        routine,
        rows: side,
        columns: side,
        info: c_int::MIN,
    })
}

pub(super) fn check(routine: &'static str, side: usize, info: c_int) -> Result<()> {
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

pub(super) const UPPER: c_char = b'U' as c_char;

/// f32 and f64, each with its LAPACK routines.
pub trait Real:
    LinalgScalar
    + ScalarOperand
    + Default
    + PartialOrd
    + Into<f64>
    + std::ops::Neg<Output = Self>
    + Vectors
{
    const ONE: Self;
    const SOLVER: &'static str;
    fn from_f64(x: f64) -> Self;
    /// Columns of an f32 matrix to lay out at a time.
    const PANEL: usize;
    /// Adds x·xᵀ to the lower half of c (s, s), dense rows, for such a panel x (s, k).
    fn add_square_lower(c: ArrayViewMut2<Self>, panel: ArrayView2<f32>);
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
                work_len(work.len(), Self::SOLVER, side)?,
                iwork.as_mut_ptr(),
                int(iwork.len()),
            )
        };
        check(Self::SOLVER, side, info)?;
        Ok((d, z))
    }
}

macro_rules! real {
    ($t:ty, $solver:expr, $panel:expr, $square:expr, $stedc:ident) => {
        impl Real for $t {
            const ONE: Self = 1.0;
            const SOLVER: &'static str = $solver;
            fn from_f64(x: f64) -> Self {
                x as Self
            }
            const PANEL: usize = $panel;
            fn add_square_lower(c: ArrayViewMut2<Self>, panel: ArrayView2<f32>) {
                $square(c, panel)
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
        }
    };
}
real!(f32, "sstedc", 2048, product::add_square_lower, sstedc_);
real!(
    f64,
    "dstedc",
    512,
    |c, panel| add_square_by_strips(c, row_major::<f32, f64>(panel).view()),
    dstedc_
);

/// (rows, columns) of zeros, from the start of a cache line on; large ones on huge pages.
///
/// With small pages, every fresh Gram matrix costs thousands of page faults, for which the workers of a process queue: a
/// tenth of the time of one worker, a third of that of two (Linux 6, glibc 2.36, 2026-11). Vectors that lie across two lines
/// cost the reduction to tridiagonal form a tenth of its time.
pub fn zeros<T: Real>(rows: usize, columns: usize) -> Array2<T> {
    const LINE: usize = 64;
    const HUGE: usize = 2 << 20;
    let (count, spare) = (rows * columns, LINE / size_of::<T>());
    let longer = Array1::from_elem(count + spare, T::default());
    let start = longer.as_ptr().align_offset(LINE).min(spare);
    let mut zeros = longer.slice_move(s![start..start + count]);
    let bytes = std::mem::size_of_val(zeros.as_slice().expect("a part of one is dense"));
    #[cfg(target_os = "linux")]
    if bytes >= 2 * HUGE {
        let start = (zeros.as_mut_ptr() as usize).next_multiple_of(HUGE);
        let end = (zeros.as_ptr() as usize + bytes) / HUGE * HUGE;
        // SAFETY: the range lies within the array, and the advice changes no content. Should it be refused, pages are small
        unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_HUGEPAGE) };
    }
    (zeros.into_shape_with_order((rows, columns))).expect("as many, one after the other")
}

/// A copy in row-major order, in another precision if asked.
///
/// Tiles of one cache line by one: a transposed source is read, and the copy written, by whole lines.
pub fn row_major<S: Copy + Into<T>, T: Real>(a: ArrayView2<S>) -> Array2<T> {
    const TILE: usize = 16;
    let (rows, columns) = a.dim();
    let mut copy = zeros(rows, columns);
    let whole = |side: usize| side / TILE * TILE;
    // what no tile covers
    let (mut below, mut right) = (whole(rows), whole(columns));
    let turned = a.t();
    if turned.strides()[1] != 1 {
        (below, right) = (0, 0);
    }
    let target = copy.as_slice_mut().expect("it was made dense");
    for j in (0..right).step_by(TILE) {
        let mut lines = [&[][..]; TILE];
        let sources = turned.slice_move(s![j..j + TILE, ..]);
        for (line, source) in lines.iter_mut().zip(sources.rows()) {
            *line = source.to_slice().expect("its stride is 1");
        }
        for i in (0..below).step_by(TILE) {
            let tile: [&[S; TILE]; TILE] =
                lines.map(|line| line[i..i + TILE].try_into().expect("as long as a tile"));
            for r in 0..TILE {
                let to = &mut target[(i + r) * columns + j..][..TILE];
                for (to, line) in to.iter_mut().zip(&tile) {
                    *to = line[r].into();
                }
            }
        }
    }
    for (rows, columns) in [(below..rows, 0..columns), (0..below, right..columns)] {
        let edge = s![rows, columns];
        let mut to = copy.slice_mut(edge);
        to.zip_mut_with(&a.slice(edge), |to, &x| *to = x.into());
    }
    copy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;

    #[test]
    fn a_copy_in_row_major_order_has_the_same_elements() {
        for (rows, columns) in [(48, 32), (48, 33), (37, 64), (7, 5)] {
            let a = normal(columns, rows, 5);
            for a in [a.t(), a.view()] {
                let copy = row_major::<f32, f64>(a);
                assert!(copy.is_standard_layout());
                assert_eq!(copy, a.mapv(f64::from));
            }
        }
    }
}
