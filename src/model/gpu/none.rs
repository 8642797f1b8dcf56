//! A build without CUDA.

use candle_core::bail;

use super::{Arg, Geometry};

pub fn launch(_: &str, name: &str, _: Geometry, _: &[Arg]) -> candle_core::Result<()> {
    bail!("no GPU runs {name} in a build without CUDA: its tensors lie elsewhere")
}
