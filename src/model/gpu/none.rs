//! A build without CUDA.

use candle_core::{Tensor, bail};

use super::{Arg, Geometry};

pub fn launch(_: &str, name: &str, _: Geometry, _: &[Arg]) -> candle_core::Result<()> {
    bail!("no GPU runs {name} in a build without CUDA: its tensors lie elsewhere")
}

pub fn add_product(_: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<()> {
    bail!("a build without CUDA has no tensors on a GPU")
}
