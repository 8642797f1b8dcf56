//! The differentiable decoder: one definition for every family, with gradients that are written down.

mod attention;
mod backward;
pub mod config;
pub mod decoder;
pub mod family;
mod fused;
pub mod gpu;
mod head;
mod linear;
pub mod memory;
pub mod method;
mod norm;
pub mod ops;
mod product;
pub mod rope;
pub mod segments;
mod tape;
mod update;

pub use backward::Gradients;
pub use config::ModelConfig;
pub use decoder::{Cache, Decoder, Tensors, Trained, stacked};
pub use method::{Lora, LowRank, Method, Parametrisation};
pub use segments::{Segment, Segments};
