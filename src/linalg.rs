//! Dense linear algebra for one weight at a time: BLAS and LAPACK behind safe, shape-checked functions.

mod blas;
pub mod svd;

pub use blas::{gemm, single_threaded_blas};
pub use svd::{Algorithm, Certificate, Route, Svd, Wanted, decompose, spectrum};
