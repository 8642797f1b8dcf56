//! Safetensors on disk: the one place that reads and writes weight files.

pub mod checkpoint;
pub mod element;
pub mod header;
pub mod place;
pub mod rounding;
pub mod shard;

pub use checkpoint::{Checkpoint, Inventory, Layout, TensorSums};
pub use element::{Elements, dtype_name};
pub use header::{Entry, Header};
pub use rounding::{Rounder, Rounding};
pub use safetensors::Dtype;
pub use shard::{FileSink, ShardWriter};
