//! A build without CUDA.

use candle_core::{Tensor, bail};

use super::{Arg, Card, Geometry};

pub fn launch(_: &str, name: &str, _: Geometry, _: &[Arg]) -> candle_core::Result<()> {
    bail!("no GPU runs {name} in a build without CUDA: its tensors lie elsewhere")
}

pub fn address_of(_: &Tensor) -> candle_core::Result<u64> {
    bail!("no tensor lies on a GPU in a build without CUDA")
}

/// One that takes nothing.
pub fn card(_: &Tensor) -> candle_core::Result<Card> {
    Ok(Card {
        has_warpgroups: false,
        shared_bytes_max: 0,
    })
}
