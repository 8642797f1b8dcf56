//! A build without CUDA.

use candle_core::{Device, Tensor, bail};

use super::{Arg, Geometry};
use crate::error::{Error, Result};

/// Always refused: this build has no GPU to open.
pub fn open(number: usize) -> Result<Device> {
    Err(Error::Device {
        device: format!("cuda:{number}"),
        reason: "this build has no CUDA support (cargo feature `cuda`)".into(),
    })
}

pub fn launch(_: &str, name: &str, _: Geometry, _: &[Arg]) -> candle_core::Result<()> {
    bail!("no GPU runs {name} in a build without CUDA: its tensors lie elsewhere")
}

pub fn add_product(_: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<()> {
    bail!("a build without CUDA has no tensors on a GPU")
}
