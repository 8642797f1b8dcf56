//! Our kernels on an NVIDIA GPU: what `fused` and `attention` are on the CPU, their twins.
//!
//! As there, `None` is the answer where a kernel does not apply. Sources are in `kernels/`, where each says its equation; they
//! are compiled to PTX when the feature `cuda` is built, for compute capability 8.0 and newer. Of this module only
//! `launch` calls CUDA; products are cuBLAS's, which [`crate::device`] calls.

use candle_core::{D, DType, Result, Tensor, bail};

use super::family::Activation;
use crate::device::{self, Reading};

#[cfg_attr(not(feature = "cuda"), path = "gpu/none.rs")]
#[cfg_attr(feature = "cuda", path = "gpu/launch.rs")]
mod launch;

mod attention;
mod heads;
mod step;

#[cfg(all(test, feature = "cuda"))]
mod twins;

pub use attention::Attention;
pub use heads::{joined_heads, rotate, split_heads};
use launch::launch;
pub use step::{AdamW, adamw, gather};

/// What a kernel is given.
#[derive(Clone, Copy)]
enum Arg<'a> {
    Tensor(&'a Tensor),
    /// A part of a tensor; how far apart its rows begin is told beside it.
    Part(&'a Tensor),
    /// A pointer to nothing: what would be written there is not wanted.
    Null,
    /// Of 32 bits.
    Count(usize),
    /// Of 64 bits.
    Size(usize),
    F32(f32),
    F64(f64),
}

/// How many threads run, and what memory each block shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    grid: [usize; 3],
    block: usize,
    shared_bytes: usize,
}

impl Geometry {
    /// So many blocks of the usual size.
    fn blocks(x: usize, y: usize) -> Self {
        Self {
            grid: [x, y, 1],
            block: BLOCK,
            shared_bytes: 0,
        }
    }

    /// Whether GPUs of compute capability 8.0 and newer take it (CUDA programming guide, technical specifications): every one
    /// of them this grid and block, but only the largest this much shared memory, of which a [`Card`] knows its own.
    fn fits(&self) -> bool {
        let [x, y, z] = self.grid;
        let grid =
            (1..1 << 31).contains(&x) && [y, z].iter().all(|side| (1..1 << 16).contains(side));
        grid && (1..=1024).contains(&self.block) && self.shared_bytes <= SHARED_BYTES_MAX
    }
}

/// What a block of an H100 may share, 227 KiB: none has more. An A100's has 163, that of smaller cards 99.
const SHARED_BYTES_MAX: usize = 227 << 10;

/// What decides on one GPU which kernels it is given.
#[derive(Debug, Clone, Copy)]
struct Card {
    /// The products of warpgroups: compute capability 9.0, and no other.
    has_warpgroups: bool,
    /// What a block may share if its kernel asks for it.
    shared_bytes_max: usize,
}

/// Runs a kernel whose arguments are what its signature says.
fn run(module: &str, name: &str, geometry: Geometry, args: &[Arg]) -> Result<()> {
    let fits = |arg: &Arg| match arg {
        Arg::Tensor(tensor) => tensor.is_contiguous(),
        Arg::Part(tensor) => tensor.elem_count() > 0,
        Arg::Null => true,
        Arg::Count(count) => u32::try_from(*count).is_ok(),
        Arg::Size(size) => *size > 0,
        Arg::F32(number) => number.is_finite(),
        Arg::F64(number) => number.is_finite(),
    };
    if !geometry.fits() || !args.iter().all(fits) {
        bail!("{name} cannot run on tensors of this size ({geometry:?})");
    }
    launch(module, name, geometry, args)
}

const WARP: usize = 32;
/// Threads of a block, unless a kernel says otherwise.
const BLOCK: usize = 256;
/// Blocks that share the rows of a sum between them: enough for the largest cards.
const BLOCKS: usize = 256;

/// The end of the names of the kernels for these tensors, if there are any.
fn kind(tensors: &[&Tensor]) -> Option<&'static str> {
    let dense = tensors.iter().all(|t| t.is_contiguous());
    kind_of_rows(tensors).filter(|_| dense)
}

/// The same where rows may begin apart.
fn kind_of_rows(tensors: &[&Tensor]) -> Option<&'static str> {
    let dtype = tensors[0].dtype();
    let applies = |t: &&Tensor| {
        let fits = t.elem_count() > 0 && pitched(t).is_some();
        t.device().is_cuda() && t.dtype() == dtype && fits
    };
    if !tensors.iter().all(applies) {
        return None;
    }
    match dtype {
        DType::F32 => Some("f32"),
        DType::F16 => Some("f16"),
        DType::BF16 => Some("bf16"),
        _ => None,
    }
}

/// (rows, n) and how far apart rows begin, of a tensor (…, n) whose rows are dense and equally far apart.
fn pitched(tensor: &Tensor) -> Option<(usize, usize, usize)> {
    let n = tensor.dim(D::Minus1).ok()?;
    // asked first, because the stride of a side of 1 may be anything
    if tensor.is_contiguous() {
        return Some((tensor.elem_count() / n.max(1), n, n));
    }
    let (dims, strides) = (tensor.dims(), tensor.stride());
    let last = dims.len().checked_sub(2)?;
    let even = (0..last).all(|at| strides[at] == strides[at + 1] * dims[at + 1]);
    let dense = strides[last + 1] == 1 || n == 1;
    (even && dense).then(|| (tensor.elem_count() / n.max(1), n, strides[last]))
}

/// Room for a result; a kernel fills all of it.
fn room(shape: impl Into<candle_core::Shape>, dtype: DType, like: &Tensor) -> Result<Tensor> {
    // SAFETY: every kernel here writes each element of its outputs before anybody reads them.
    unsafe { Tensor::empty(shape, dtype, like.device()) }
}

/// Σ over the rows of partial sums (rows, n), in their order: the same bits each time.
fn sum_rows(partial: &Tensor) -> Result<Tensor> {
    let (rows, n) = partial.dims2()?;
    let sum = room(n, DType::F32, partial)?;
    run(
        "norm",
        "sum_rows",
        Geometry::blocks(n.div_ceil(WARP), 1),
        &[
            Arg::Tensor(partial),
            Arg::Tensor(&sum),
            Arg::Count(rows),
            Arg::Count(n),
        ],
    )?;
    Ok(sum)
}

/// a + b
pub fn add(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let Some(kind) = kind(&[a, b]).filter(|_| a.shape() == b.shape()) else {
        return Ok(None);
    };
    let y = room(a.shape(), a.dtype(), a)?;
    let count = a.elem_count();
    run(
        "columns",
        &format!("add_{kind}"),
        by_elements(count),
        &[
            Arg::Tensor(a),
            Arg::Tensor(b),
            Arg::Tensor(&y),
            Arg::Size(count),
        ],
    )?;
    Ok(Some(y))
}

/// s and s / √(mean s² + ε) ∘ w over the last side, where s = x + added, or x itself.
pub fn rms_norm(
    x: &Tensor,
    added: Option<&Tensor>,
    w: &Tensor,
    eps: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let (Some(kind), Some(_)) = (kind(&[x, w]), kind(&[x, added.unwrap_or(x)])) else {
        return Ok(None);
    };
    let n = x.dim(D::Minus1)?;
    let rows = x.elem_count() / n;
    let y = room(x.shape(), x.dtype(), x)?;
    let sum = match added {
        Some(_) => room(x.shape(), x.dtype(), x)?,
        None => x.clone(),
    };
    run(
        "norm",
        &format!("rms_norm_{kind}"),
        Geometry {
            block: threads_for(n),
            ..by_rows(rows)
        },
        &[
            Arg::Tensor(x),
            added.map_or(Arg::Null, Arg::Tensor),
            Arg::Tensor(w),
            added.map_or(Arg::Null, |_| Arg::Tensor(&sum)),
            Arg::Tensor(&y),
            Arg::Count(rows),
            Arg::Count(n),
            Arg::F32(eps as f32),
        ],
    )?;
    Ok(Some((sum, y)))
}

/// Blocks of kernels that go through their rows in strides.
const MOST_BLOCKS: usize = 1 << 16;

/// dx, plus what is `added` to it, and if wanted dw of [`rms_norm`] from the gradient of its output.
pub fn rms_norm_gradient(
    x: &Tensor,
    w: &Tensor,
    g: &Tensor,
    added: Option<&Tensor>,
    eps: f64,
    wants_weight: bool,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let (Some(kind), Some(_)) = (kind(&[x, w, g]), kind(&[x, added.unwrap_or(x)])) else {
        return Ok(None);
    };
    let n = x.dim(D::Minus1)?;
    let rows = x.elem_count() / n;
    // a sum of dw each, which are added up
    let blocks = rows.min(if wants_weight { BLOCKS } else { MOST_BLOCKS });
    let dx = room(x.shape(), x.dtype(), x)?;
    let partial = match wants_weight {
        true => Some(room((blocks, n), DType::F32, x)?),
        false => None,
    };
    run(
        "norm",
        &format!("rms_norm_back_{kind}"),
        Geometry {
            block: threads_for(n),
            shared_bytes: if wants_weight { 4 * n } else { 0 },
            ..Geometry::blocks(blocks, 1)
        },
        &[
            Arg::Tensor(x),
            Arg::Tensor(w),
            Arg::Tensor(g),
            added.map_or(Arg::Null, Arg::Tensor),
            Arg::Tensor(&dx),
            partial.as_ref().map_or(Arg::Null, Arg::Tensor),
            Arg::Count(rows),
            Arg::Count(n),
            Arg::F32(eps as f32),
        ],
    )?;
    let dw = match partial {
        Some(partial) => Some(sum_rows(&partial)?.to_dtype(w.dtype())?),
        None => None,
    };
    Ok(Some((dx, dw)))
}

fn gate(activation: &Activation) -> Option<&'static str> {
    match activation {
        Activation::Silu => Some("silu"),
        Activation::GeluTanh => Some("gelu_tanh"),
        Activation::Gelu => Some("gelu"),
        Activation::Unsupported(_) => None,
    }
}

/// activation(a) ∘ b, of a and b that may be halves of one tensor.
pub fn gated(a: &Tensor, b: &Tensor, activation: &Activation) -> Result<Option<Tensor>> {
    let (Some(kind), Some(gate)) = (kind_of_rows(&[a, b]), gate(activation)) else {
        return Ok(None);
    };
    let Some((rows, n, pitch)) = alike(&[a, b]) else {
        return Ok(None);
    };
    let y = room(a.shape(), a.dtype(), a)?;
    run(
        "gated",
        &format!("gated_{gate}_{kind}"),
        by_rows(rows),
        &[
            Arg::Part(a),
            Arg::Part(b),
            Arg::Tensor(&y),
            Arg::Count(rows),
            Arg::Count(n),
            Arg::Count(pitch),
        ],
    )?;
    Ok(Some(y))
}

/// (da, db) of [`gated`] from the gradient of its output.
pub fn gated_gradient(
    a: &Tensor,
    b: &Tensor,
    g: &Tensor,
    activation: &Activation,
) -> Result<Option<(Tensor, Tensor)>> {
    if kind(&[a, b]).is_none() {
        return Ok(None);
    }
    let like = |x: &Tensor| room(x.shape(), x.dtype(), x);
    let (da, db) = (like(a)?, like(b)?);
    let done = gated_back([a, b], g, activation, [&da, &db])?;
    Ok(done.then_some((da, db)))
}

/// The same where x (…, 2n) holds a and b, and its gradient theirs.
pub fn gated_stacked_gradient(
    x: &Tensor,
    g: &Tensor,
    activation: &Activation,
) -> Result<Option<Tensor>> {
    if kind(&[x]).is_none() {
        return Ok(None);
    }
    let dx = room(x.shape(), x.dtype(), x)?;
    let n = g.dim(D::Minus1)?;
    let half = |x: &Tensor, at: usize| x.narrow(D::Minus1, at * n, n);
    let (from, to) = ([half(x, 0)?, half(x, 1)?], [half(&dx, 0)?, half(&dx, 1)?]);
    let done = gated_back([&from[0], &from[1]], g, activation, [&to[0], &to[1]])?;
    Ok(done.then_some(dx))
}

fn gated_back(
    [a, b]: [&Tensor; 2],
    g: &Tensor,
    activation: &Activation,
    [da, db]: [&Tensor; 2],
) -> Result<bool> {
    let (Some(kind), Some(gate)) = (kind_of_rows(&[a, b, g]), gate(activation)) else {
        return Ok(false);
    };
    let Some((rows, n, pitch)) = alike(&[a, b, da, db]) else {
        return Ok(false);
    };
    run(
        "gated",
        &format!("gated_back_{gate}_{kind}"),
        by_rows(rows),
        &[
            Arg::Part(a),
            Arg::Part(b),
            Arg::Tensor(g),
            Arg::Part(da),
            Arg::Part(db),
            Arg::Count(rows),
            Arg::Count(n),
            Arg::Count(pitch),
        ],
    )?;
    Ok(true)
}

/// [`pitched`] of tensors that all lie alike.
fn alike(tensors: &[&Tensor]) -> Option<(usize, usize, usize)> {
    let first = pitched(tensors[0]);
    first.filter(|_| tensors.iter().all(|t| pitched(t) == first))
}

/// Of kernels whose threads take eight numbers at a time, in strides.
fn by_elements(count: usize) -> Geometry {
    Geometry::blocks(count.div_ceil(8 * BLOCK).min(MOST_BLOCKS), 1)
}

/// Threads for so many numbers, eight for each at once: no more than have work, in whole warps.
fn threads_for(numbers: usize) -> usize {
    numbers
        .div_ceil(8)
        .next_multiple_of(WARP)
        .clamp(WARP, BLOCK)
}

/// Of kernels whose blocks take a row at a time, in strides.
fn by_rows(rows: usize) -> Geometry {
    Geometry::blocks(rows.min(MOST_BLOCKS), 1)
}

/// Parts of a side of a dense x, each in memory of its own.
pub fn split(x: &Tensor, dim: usize, sides: &[usize]) -> Result<Option<Vec<Tensor>>> {
    let Some(kind) = kind(&[x]) else {
        return Ok(None);
    };
    if sides.contains(&0) {
        return Ok(None);
    }
    let mut start = 0;
    let mut parts = Vec::new();
    for &side in sides {
        let mut shape = x.dims().to_vec();
        shape[dim] = side;
        let part = room(shape, x.dtype(), x)?;
        let from = x.narrow(dim, start, side)?;
        copy_columns(kind, [&from, &part], dim, [x.dim(dim)?, side])?;
        parts.push(part);
        start += side;
    }
    Ok(Some(parts))
}

/// Dense tensors side by side: what [`split`] takes apart.
pub fn joined(parts: &[Tensor], dim: usize) -> Result<Option<Tensor>> {
    let all: Vec<&Tensor> = parts.iter().collect();
    let Some(kind) = kind(&all) else {
        return Ok(None);
    };
    let mut shape = parts[0].dims().to_vec();
    shape[dim] = parts.iter().map(|part| part.dims()[dim]).sum();
    let side = shape[dim];
    let joined = room(shape, parts[0].dtype(), &parts[0])?;
    let mut start = 0;
    for part in parts {
        let to = joined.narrow(dim, start, part.dims()[dim])?;
        copy_columns(kind, [part, &to], dim, [part.dims()[dim], side])?;
        start += part.dims()[dim];
    }
    Ok(Some(joined))
}

/// Copies between two tensors of one shape, of which either is a part of a whole with another side `dim`.
fn copy_columns(
    kind: &str,
    [from, to]: [&Tensor; 2],
    dim: usize,
    [from_side, to_side]: [usize; 2],
) -> Result<()> {
    let dims = from.dims();
    let (rows, behind): (usize, usize) = (
        dims[..dim].iter().product(),
        dims[dim + 1..].iter().product(),
    );
    run(
        "columns",
        &format!("copy_columns_{kind}"),
        Geometry::blocks(
            rows.min(MOST_BLOCKS),
            (dims[dim] * behind).div_ceil(8 * BLOCK).min(1 << 12),
        ),
        &[
            Arg::Part(from),
            Arg::Part(to),
            Arg::Count(rows),
            Arg::Count(dims[dim] * behind),
            Arg::Count(from_side * behind),
            Arg::Count(to_side * behind),
        ],
    )
}

/// x·diag(factors): x (rows, n), factors in f32, zero from where they end.
pub fn scale_columns(x: &Tensor, factors: &Tensor) -> Result<Option<Tensor>> {
    let (Some(kind), Some("f32")) = (kind(&[x]), kind(&[factors])) else {
        return Ok(None);
    };
    let n = x.dim(D::Minus1)?;
    let rows = x.elem_count() / n;
    let y = room(x.shape(), x.dtype(), x)?;
    run(
        "columns",
        &format!("scale_columns_{kind}"),
        by_elements(x.elem_count()),
        &[
            Arg::Tensor(x),
            Arg::Tensor(factors),
            Arg::Tensor(&y),
            Arg::Count(rows),
            Arg::Count(n),
            Arg::Count(factors.elem_count()),
        ],
    )?;
    Ok(Some(y))
}

/// y += a·b in place, with y (rows, n), a (rows, k), b (k, n) dense as it lies or turned: nobody else may hold y. Says whether
/// it did.
pub fn add_product(y: &Tensor, a: &Tensor, b: &Tensor) -> Result<bool> {
    let dense = if b.is_contiguous() { b } else { &b.t()? };
    if kind(&[y, a, dense]).is_none() {
        return Ok(false);
    }
    device::multiply(y, 1.0, a, b, 1.0, Reading::Whole)?;
    Ok(true)
}

/// −log softmax(row) at each row's target (rows,), over rows of logits, which become factor·(softmax − onehot), the gradient
/// of their sum times a factor.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, factor: f64) -> Result<Option<Tensor>> {
    let Some(kind) = kind(&[logits]) else {
        return Ok(None);
    };
    let (rows, n) = logits.dims2()?;
    let losses = room(rows, DType::F32, logits)?;
    run(
        "loss",
        &format!("cross_entropy_{kind}"),
        Geometry {
            block: 512,
            ..Geometry::blocks(rows, 1)
        },
        &[
            Arg::Tensor(logits),
            Arg::Tensor(targets),
            Arg::Tensor(&losses),
            Arg::Count(rows),
            Arg::Count(n),
            Arg::F32(factor as f32),
        ],
    )?;
    Ok(Some(losses))
}

/// Σ over the rows of a ∘ b, both (rows, q), in f32 whatever their dtype: ∂L/∂σ of a layer.
pub fn sum_of_products(a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let Some(kind) = kind(&[a, b]) else {
        return Ok(None);
    };
    let (rows, q) = a.dims2()?;
    const COLUMNS: usize = 128;
    let blocks = rows.min(BLOCKS);
    let partial = room((blocks, q), DType::F32, a)?;
    run(
        "sigma",
        &format!("sigma_products_{kind}"),
        Geometry {
            block: COLUMNS,
            ..Geometry::blocks(q.div_ceil(COLUMNS), blocks)
        },
        &[
            Arg::Tensor(a),
            Arg::Tensor(b),
            Arg::Tensor(&partial),
            Arg::Count(rows),
            Arg::Count(q),
        ],
    )?;
    Ok(Some(sum_rows(&partial)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_over_many_rows_are_within_what_a_gpu_takes() {
        let rows = 1 << 24;
        assert!(by_rows(rows).fits() && by_elements(rows * 8192).fits());
        assert!(Geometry::blocks(rows, 1).fits());
        assert_eq!([1, 576, 3072].map(threads_for), [32, 96, 256]);
        assert!(!Geometry::blocks(0, 1).fits() && !Geometry::blocks(1, 1 << 16).fits());
    }

    #[test]
    fn rows_are_found_whatever_the_strides_of_sides_of_one_say() {
        let x = Tensor::zeros((6, 4, 8), DType::F32, &candle_core::Device::Cpu).expect("zeros");
        // a row whose next would lie elsewhere
        let row = x
            .narrow(0, 1, 1)
            .and_then(|x| x.narrow(1, 2, 1))
            .expect("a row");
        assert_eq!(row.stride(), [32, 8, 1]);
        assert_eq!(pitched(&row), Some((1, 8, 8)));
        let half = x.narrow(2, 4, 4).expect("halves of rows");
        assert_eq!(pitched(&half), Some((24, 4, 8)));
        assert_eq!(pitched(&x.narrow(1, 1, 2).expect("some rows")), None);
        assert_eq!(pitched(&x.transpose(1, 2).expect("columns")), None);
        let nothing = Tensor::zeros((4, 0), DType::F32, x.device()).expect("zeros");
        assert_eq!(pitched(&nothing), Some((0, 0, 0)));
    }

    #[test]
    fn tensors_that_lie_elsewhere_are_left_to_others() {
        let x = Tensor::zeros((2, 8), DType::F32, &candle_core::Device::Cpu).expect("zeros");
        let nothing = gated(&x, &x, &Activation::Silu).expect("asks");
        assert!(nothing.is_none());
        assert!(run("gated", "gated_silu_f32", by_rows(2), &[Arg::Tensor(&x)]).is_err());
    }
}
