//! Dense linear algebra for one weight at a time, behind safe, shape-checked functions.

mod algorithm;
mod certificate;
mod complete;
mod exact;
mod filtered;
mod krylov;
mod lapack;
mod operand;
mod outliers;
mod panel;
mod product;
mod real;
mod route;
mod rows;
mod single;
pub mod svd;
mod tiles;
mod twisted;

pub use algorithm::{Algorithm, Refused, Route, Svd, TOLERANCES, Wanted};
pub use certificate::{Certificate, PROBE_SEED, certify, orthogonality};
pub use exact::ExactSum;
pub use lapack::single_threaded_blas;
pub use operand::Backend;
pub use product::{gemm, multiply};
pub use route::{Usual, usual_way};
pub use svd::{decompose, decompose_on, spectrum};
