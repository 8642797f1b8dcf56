//! A build without CUDA.

use candle_core::{Device, Tensor};

use super::Reading;
use crate::error::{Error, Result};

/// None that this build could open.
pub fn gpus() -> Result<usize> {
    Ok(0)
}

/// Always refused: this build has no GPU to open.
pub fn open(number: usize) -> Result<Device> {
    Err(Error::Device {
        device: format!("cuda:{number}"),
        reason: "this build has no CUDA support (cargo feature `cuda`)".into(),
    })
}

/// A CPU has no queues: it is the same device again.
pub(super) fn beside(device: &Device) -> candle_core::Result<Device> {
    Ok(device.clone())
}

/// Nothing is staged on the way to a CPU.
#[derive(Debug, Default)]
pub(super) struct Stage(());

impl Stage {
    pub fn upload(&mut self, _: &Device, _: &[f32]) -> candle_core::Result<Option<Tensor>> {
        Ok(None)
    }

    pub fn download(&mut self, _: &Tensor) -> candle_core::Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

pub(super) fn multiply(
    _: &Tensor,
    _: f32,
    _: &Tensor,
    _: &Tensor,
    _: f32,
    _: Reading,
) -> candle_core::Result<()> {
    unreachable!("this build opens no GPU")
}
