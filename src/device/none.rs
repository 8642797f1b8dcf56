//! A build without CUDA.

use candle_core::Device;

use crate::error::{Error, Result};

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

/// Whether products in double precision cost little more than in single.
pub fn multiplies_double(device: &Device) -> bool {
    device.is_cpu()
}
