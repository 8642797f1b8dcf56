//! Dense linear algebra for one weight at a time, behind safe, shape-checked functions.

mod certificate;
mod halves;
mod krylov;
mod lapack;
mod operand;
mod outliers;
mod product;
pub mod svd;

pub use certificate::{Certificate, certify, orthogonality};
pub use lapack::single_threaded_blas;
pub use operand::Backend;
pub use product::gemm;
pub use svd::{Algorithm, Route, Svd, Wanted, decompose, decompose_on, spectrum, usual_route};
