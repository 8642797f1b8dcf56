//! A build without CUDA.

use candle_core::{Tensor, bail};

use super::{Arg, Geometry};

pub fn launch(_: &str, name: &str, _: Geometry, _: &[Arg]) -> candle_core::Result<()> {
    bail!("no GPU runs {name} in a build without CUDA: its tensors lie elsewhere")
}

pub fn address_of(_: &Tensor) -> candle_core::Result<u64> {
    bail!("no tensor lies on a GPU in a build without CUDA")
}

pub fn has_warpgroups(_: &Tensor) -> candle_core::Result<bool> {
    Ok(false)
}
