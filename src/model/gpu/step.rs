//! A step of what moves, which lies in many small tensors: one launch takes them all.

use candle_core::{DType, Result, Tensor, bail};

use super::launch::address_of;
use super::{Arg, Geometry, MOST_BLOCKS, kind, room, run};

/// The numbers of a step of AdamW, as the trainer's optimiser has them.
#[derive(Debug, Clone, Copy)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    /// From 1.
    pub step: usize,
}

/// Threads of the kernels that take a table of parts.
const PART_BLOCK: usize = 128;

/// A table of the tensors that lie one behind the other in a long one, and the launch that takes them all; all f32.
fn parts(tensors: &[Tensor]) -> Result<Option<(Tensor, Geometry)>> {
    let all: Vec<&Tensor> = tensors.iter().collect();
    let Some("f32") = kind(&all) else {
        return Ok(None);
    };
    let mut table = Vec::with_capacity(4 * tensors.len());
    let (mut start, mut longest) = (0u32, 0);
    for tensor in tensors {
        let address = address_of(tensor)?;
        let length = u32::try_from(tensor.elem_count()).map_err(candle_core::Error::wrap)?;
        table.extend([address as u32, (address >> 32) as u32, start, length]);
        start = match start.checked_add(length) {
            Some(end) => end,
            None => bail!("more than 2³² numbers at once"),
        };
        longest = longest.max(tensor.elem_count());
    }
    let table = Tensor::from_vec(table, (tensors.len(), 4), tensors[0].device())?;
    let geometry = Geometry {
        grid: [
            longest.div_ceil(PART_BLOCK).min(MOST_BLOCKS),
            tensors.len(),
            1,
        ],
        block: PART_BLOCK,
        shared_bytes: 0,
    };
    Ok(Some((table, geometry)))
}

/// The numbers of many tensors, one behind the other: f32.
pub fn gather(tensors: &[Tensor]) -> Result<Option<Tensor>> {
    let Some((table, geometry)) = parts(tensors)? else {
        return Ok(None);
    };
    let count: usize = tensors.iter().map(Tensor::elem_count).sum();
    let all = room(count, DType::F32, &tensors[0])?;
    run(
        "sigma",
        "gather",
        geometry,
        &[Arg::Tensor(&table), Arg::Tensor(&all)],
    )?;
    Ok(Some(all))
}

/// One step on the numbers of some tensors, in place, whose gradients and moments lie one behind the other; all f32, and the
/// same bits as on the CPU.
pub fn adamw(
    values: &[Tensor],
    gradient: &Tensor,
    moments: [&Tensor; 2],
    with: AdamW,
) -> Result<bool> {
    let [first, second] = moments;
    let (Some("f32"), Some((table, geometry))) = (kind(&[gradient, first, second]), parts(values)?)
    else {
        return Ok(false);
    };
    run(
        "sigma",
        "adamw",
        geometry,
        &[
            Arg::Tensor(&table),
            Arg::Tensor(gradient),
            Arg::Tensor(first),
            Arg::Tensor(second),
            Arg::F64(with.learning_rate),
            Arg::F64(with.beta1),
            Arg::F64(with.beta2),
            Arg::F64(with.eps),
            Arg::F64(with.weight_decay),
            Arg::Count(with.step),
        ],
    )?;
    Ok(true)
}
