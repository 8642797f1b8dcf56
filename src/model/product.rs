//! Products with the weight of a linear layer, and with what training adds to it.
//!
//! On the CPU they go tile by tile: a weight that is stored in 16 bits is widened, and what is added to it is formed, in
//! room for one tile, so that neither ever exists as a whole.

use std::ops::Range;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2, s};
use rayon::prelude::*;

use super::gpu;
use super::ops::{rows, with_last};
use crate::linalg::multiply;

/// What is added to a weight (m, n), between thin factors: ΔW = leftᵀ·diag(d)·right.
///
/// On a GPU a factor may have more rows than d has numbers, none but zeros: cuBLAS is slow where rows begin anywhere.
#[derive(Clone)]
pub struct Thin {
    /// (q, m)
    pub left: Tensor,
    /// (q, n)
    pub right: Tensor,
    /// d (q,), in f32 where the factors are in less; ones where there is none.
    pub diagonal: Option<Tensor>,
    /// What is multiplied by W, multiplied by the factor that faces it, where that is known already: (…, q).
    pub inner: Option<Tensor>,
}

impl Thin {
    /// The same with the diagonal in the left factor, and in the inner product where that is with the left one.
    fn without_diagonal(&self, direction: Direction) -> Result<Self> {
        let Some(diagonal) = &self.diagonal else {
            return Ok(self.clone());
        };
        let left = self.left.to_dtype(diagonal.dtype())?;
        let inner = match (&self.inner, direction) {
            (Some(inner), Direction::Back) => Some(through(inner, diagonal)?),
            (inner, _) => inner.clone(),
        };
        Ok(Self {
            left: left.broadcast_mul(&diagonal.unsqueeze(1)?)?,
            right: self.right.clone(),
            diagonal: None,
            inner,
        })
    }

    /// (x·facingᵀ)·diag(d), which the other factor is multiplied by.
    fn inner(&self, x: &Tensor, facing: &Tensor) -> Result<Tensor> {
        let inner = match &self.inner {
            Some(inner) => inner.clone(),
            None => times(x, &like(facing, x)?.t()?)?,
        };
        match &self.diagonal {
            Some(diagonal) => through(&inner, diagonal),
            None => Ok(inner),
        }
    }
}

/// x·W with W (k, p), and what thin products (…, q) · (q, p) add to it.
///
/// The thin ones come first: the large product then reads their sum while it computes, where they would read and write its
/// result and have little else to do; and what is rounded in between is the smaller part.
fn summed(x: &Tensor, weight: &Tensor, thin: Vec<(Tensor, Tensor)>) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    let whole = (x.clone(), weight.clone());
    for (a, b) in thin.into_iter().chain([whole]) {
        sum = Some(match sum {
            None => times(&a, &b)?,
            Some(y) if gpu::add_product(&rows(&y)?, &rows(&a)?, &b)? => y,
            Some(y) => (y + times(&a, &b)?)?,
        });
    }
    Ok(sum.expect("one product at least"))
}

/// x·diag(d)
fn through(x: &Tensor, diagonal: &Tensor) -> Result<Tensor> {
    match gpu::scale_columns(x, diagonal)? {
        Some(y) => Ok(y),
        None => x.broadcast_mul(&like(diagonal, x)?),
    }
}

/// x·Wᵀ + b with W = M + Σ ΔW: `x (…, n), M (m, n), b (m,) → (…, m)`. No gradient.
pub fn forward(
    x: &Tensor,
    weight: &Tensor,
    added: &[Thin],
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    if let Some(y) = tiled(x, weight, added, bias, Direction::Forward)? {
        return Ok(y);
    }
    let thin = (added.iter())
        .map(|thin| Ok((thin.inner(x, &thin.right)?, like(&thin.left, x)?)))
        .collect::<Result<_>>()?;
    let y = summed(x, &like(weight, x)?.t()?, thin)?;
    match bias {
        Some(bias) => y.broadcast_add(&like(bias, x)?),
        None => Ok(y),
    }
}

/// g·W with W = M + Σ ΔW: `g (…, m), M (m, n) → (…, n)`. No gradient.
pub fn back(g: &Tensor, weight: &Tensor, added: &[Thin]) -> Result<Tensor> {
    if let Some(y) = tiled(g, weight, added, None, Direction::Back)? {
        return Ok(y);
    }
    let thin = (added.iter())
        .map(|thin| Ok((thin.inner(g, &thin.left)?, like(&thin.right, g)?)))
        .collect::<Result<_>>()?;
    summed(g, &like(weight, g)?, thin)
}

/// Σ over rows of gₜ·xₜᵀ: g (…, m), x (…, n) → (m, n).
pub fn outer(g: &Tensor, x: &Tensor) -> Result<Tensor> {
    rows(g)?.t()?.matmul(&rows(x)?)
}

/// A tensor in the dtype of another, without its graph; what is trained is kept in f32 beside a model in 16 bits.
pub fn like(tensor: &Tensor, x: &Tensor) -> Result<Tensor> {
    tensor.detach().to_dtype(x.dtype())
}

/// x·w with x (…, k), w (k, p) → (…, p).
pub fn times(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    rows(x)?.matmul(w)?.reshape(with_last(x, w.dim(1)?))
}

/// Which side of W (m, n) is summed over: n of x·Wᵀ, m of g·W.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Direction {
    Forward,
    Back,
}

/// Whether it takes fewer multiplications to form W = M + ΔW and multiply by it than to multiply by M and both factors.
///
/// With q rows in a factor, forming takes q·m·n of them, and the factors rows·q for each number of the side that is read
/// (unless that product is known) and of the side that comes out: q decides nothing.
fn forming_is_cheaper(rows: usize, read: usize, out: usize, known: bool) -> bool {
    let sides = if known { out } else { read + out };
    (read as u128) * (out as u128) < (rows as u128) * (sides as u128)
}

/// A matrix as it is stored.
enum Stored<'a> {
    F32(ArrayView2<'a, f32>),
    F16(ArrayView2<'a, f16>),
    Bf16(ArrayView2<'a, bf16>),
}

impl<'a> Stored<'a> {
    fn of(storage: &'a Storage, layout: &Layout) -> Option<Self> {
        let shape = layout.shape().dims2().ok()?;
        let (start, end) = layout.contiguous_offsets()?;
        fn view<T>(values: &[T], shape: (usize, usize)) -> ArrayView2<'_, T> {
            ArrayView2::from_shape(shape, values).expect("a contiguous layout covers its shape")
        }
        match storage {
            Storage::Cpu(CpuStorage::F32(v)) => Some(Self::F32(view(&v[start..end], shape))),
            Storage::Cpu(CpuStorage::F16(v)) => Some(Self::F16(view(&v[start..end], shape))),
            Storage::Cpu(CpuStorage::BF16(v)) => Some(Self::Bf16(view(&v[start..end], shape))),
            _ => None,
        }
    }

    fn dim(&self) -> (usize, usize) {
        match self {
            Self::F32(view) => view.dim(),
            Self::F16(view) => view.dim(),
            Self::Bf16(view) => view.dim(),
        }
    }

    /// All of it in f32.
    fn in_f32(&self) -> CowArray<'_, f32, Ix2> {
        if let Self::F32(view) = self {
            return view.view().into();
        }
        let (m, n) = self.dim();
        let mut wide = Array2::zeros((m, n));
        self.widen(0..m, 0..n, &mut wide.view_mut());
        wide.into()
    }

    /// A part of it in f32.
    fn widen(&self, i: Range<usize>, j: Range<usize>, to: &mut ArrayViewMut2<f32>) {
        let part = s![i, j];
        match self {
            Self::F32(view) => to.assign(&view.slice(part)),
            Self::F16(view) => by_row(view.slice(part), to, |from, to| {
                from.convert_to_f32_slice(to)
            }),
            Self::Bf16(view) => by_row(view.slice(part), to, |from, to| {
                for (to, x) in to.iter_mut().zip(from) {
                    // bf16 is the upper half of an f32
                    *to = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }),
        }
    }
}

fn by_row<T>(from: ArrayView2<T>, to: &mut ArrayViewMut2<f32>, widen: impl Fn(&[T], &mut [f32])) {
    for (from, mut to) in from.rows().into_iter().zip(to.rows_mut()) {
        let (Some(from), Some(to)) = (from.to_slice(), to.as_slice_mut()) else {
            unreachable!("rows are dense");
        };
        widen(from, to);
    }
}

/// Numbers that come out of one tile at most, and over which one tile sums: 1 MB in f32, a core's own cache.
const WIDTH: usize = 256;
const DEPTH: usize = 1024;

/// Nothing where it does not apply: on another device, or in another dtype than f32.
fn tiled(
    x: &Tensor,
    weight: &Tensor,
    added: &[Thin],
    bias: Option<&Tensor>,
    direction: Direction,
) -> Result<Option<Tensor>> {
    let fits = |t: &Tensor| {
        matches!(t.device(), Device::Cpu)
            && matches!(t.dtype(), DType::F32 | DType::F16 | DType::BF16)
    };
    let mut tensors = vec![rows(x)?.contiguous()?, weight.contiguous()?];
    if x.dtype() != DType::F32 || !fits(x) || !fits(weight) {
        return Ok(None);
    }
    let (m, n) = weight.dims2()?;
    let (read, out) = match direction {
        Direction::Forward => (n, m),
        Direction::Back => (m, n),
    };
    let count = tensors[0].dim(0)?;
    // of what is formed: left and right; of what stays apart: the product with what faces, and what it is multiplied by
    let (mut formed, mut apart) = (Vec::new(), Vec::new());
    for thin in added {
        let thin = thin.without_diagonal(direction)?;
        if forming_is_cheaper(count, read, out, thin.inner.is_some()) {
            formed.extend([thin.left.contiguous()?, thin.right.contiguous()?]);
            continue;
        }
        let (facing, away) = match direction {
            Direction::Forward => (&thin.right, &thin.left),
            Direction::Back => (&thin.left, &thin.right),
        };
        let inner = match &thin.inner {
            Some(inner) => rows(inner)?,
            None => forward(&tensors[0], facing, &[], None)?,
        };
        apart.extend([inner.contiguous()?, away.contiguous()?]);
    }
    let pairs = formed.len() / 2;
    tensors.extend(formed);
    tensors.extend(apart);
    let bias = match bias {
        Some(bias) => bias.to_dtype(DType::F32)?.to_vec1()?,
        None => Vec::new(),
    };
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let stored = guards
        .iter()
        .map(|(storage, layout)| Stored::of(storage, layout));
    let Some(mut stored) = stored.collect::<Option<Vec<_>>>() else {
        return Ok(None);
    };
    let thin = stored.split_off(2);
    let thin: Vec<_> = thin.iter().map(Stored::in_f32).collect();
    let thin: Vec<_> = thin
        .chunks_exact(2)
        .map(|pair| (pair[0].view(), pair[1].view()))
        .collect();
    let (formed, apart) = thin.split_at(pairs);
    let flat = stored[0].in_f32();
    let y = Product {
        x: flat.view(),
        weight: &stored[1],
        formed,
        apart,
        bias: &bias,
        direction,
        read,
    }
    .all(out);
    Ok(Some(Tensor::from_vec(y, with_last(x, out), &Device::Cpu)?))
}

/// x·(M + Σ leftᵀ·right)ᵀ + Σ inner·away + b, or the same of the transposed matrices.
struct Product<'a> {
    /// (rows, read)
    x: ArrayView2<'a, f32>,
    /// M (m, n)
    weight: &'a Stored<'a>,
    /// left (q, m) and right (q, n)
    formed: &'a [(ArrayView2<'a, f32>, ArrayView2<'a, f32>)],
    /// inner (rows, q) and away (q, out)
    apart: &'a [(ArrayView2<'a, f32>, ArrayView2<'a, f32>)],
    /// (out,), or empty
    bias: &'a [f32],
    direction: Direction,
    read: usize,
}

impl Product<'_> {
    /// (rows, out), the tiles shared out among the threads.
    fn all(&self, out: usize) -> Vec<f32> {
        let count = self.x.nrows();
        let mut y = vec![0f32; count * out];
        let threads = rayon::current_num_threads();
        let wide = out.div_ceil(WIDTH).next_multiple_of(threads);
        let width = out.div_ceil(wide).next_multiple_of(16);
        // of a narrow matrix, whose parts would be slivers, each thread takes some of the rows instead
        let (width, height) = match width < 64 && count >= 64 * threads {
            true => (WIDTH, count.div_ceil(threads).next_multiple_of(16)),
            false => (width, count),
        };
        let whole = ArrayViewMut2::from_shape((count, out), &mut y).expect("as many as asked for");
        let mut parts = Vec::new();
        for (rows, band) in split(whole, Axis(0), height) {
            for (outs, part) in split(band, Axis(1), width) {
                parts.push((rows.clone(), outs, part));
            }
        }
        parts
            .into_par_iter()
            .for_each_init(Vec::new, |room, (rows, outs, part)| {
                self.part(rows, outs, part, room)
            });
        y
    }

    /// Those of some rows and some of the numbers that come out.
    fn part(
        &self,
        rows: Range<usize>,
        outs: Range<usize>,
        mut y: ArrayViewMut2<f32>,
        room: &mut Vec<f32>,
    ) {
        let mut kept = 0.0;
        if let Some(bias) = self.bias.get(outs.clone()) {
            for mut row in y.rows_mut() {
                row.as_slice_mut()
                    .expect("a row is dense")
                    .copy_from_slice(bias);
            }
            kept = 1.0;
        }
        let (x, forward) = (
            self.x.slice(s![rows.clone(), ..]),
            self.direction == Direction::Forward,
        );
        let as_it_lies = match self.weight {
            Stored::F32(weight) if self.formed.is_empty() => Some(weight),
            _ => None,
        };
        let depth = if as_it_lies.is_some() {
            self.read
        } else {
            DEPTH
        };
        for start in (0..self.read).step_by(depth) {
            let over = start..(start + depth).min(self.read);
            let x = x.slice(s![.., over.clone()]);
            let (i, j) = match forward {
                true => (outs.clone(), over),
                false => (over, outs.clone()),
            };
            let tile = match as_it_lies {
                Some(weight) => weight.slice(s![i, j]),
                None => self.tile(i, j, room),
            };
            multiply(
                &mut y,
                kept,
                x,
                1.0,
                if forward { tile.reversed_axes() } else { tile },
            );
            kept = 1.0;
        }
        for (inner, away) in self.apart {
            let (inner, away) = (
                inner.slice(s![rows.clone(), ..]),
                away.slice(s![.., outs.clone()]),
            );
            multiply(&mut y, 1.0, inner, 1.0, away);
        }
    }

    /// A part of M + Σ leftᵀ·right.
    fn tile<'r>(
        &self,
        i: Range<usize>,
        j: Range<usize>,
        room: &'r mut Vec<f32>,
    ) -> ArrayView2<'r, f32> {
        let shape = (i.len(), j.len());
        if room.len() < shape.0 * shape.1 {
            room.resize(shape.0 * shape.1, 0.0);
        }
        let room = &mut room[..shape.0 * shape.1];
        let mut tile = ArrayViewMut2::from_shape(shape, &mut *room).expect("room for a tile");
        self.weight.widen(i.clone(), j.clone(), &mut tile);
        for (left, right) in self.formed {
            let (left, right) = (
                left.slice(s![.., i.clone()]),
                right.slice(s![.., j.clone()]),
            );
            multiply(&mut tile, 1.0, left.reversed_axes(), 1.0, right);
        }
        ArrayView2::from_shape(shape, room).expect("room for a tile")
    }
}

/// Cuts a matrix across one axis into parts of `size`, the last one smaller, each with its range there.
fn split(
    whole: ArrayViewMut2<f32>,
    axis: Axis,
    size: usize,
) -> Vec<(Range<usize>, ArrayViewMut2<f32>)> {
    let total = whole.len_of(axis);
    let mut parts = Vec::new();
    let mut rest = whole;
    for start in (0..total).step_by(size) {
        let end = (start + size).min(total);
        let (part, behind) = rest.split_at(axis, end - start);
        parts.push((start..end, part));
        rest = behind;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1f32, shape, &Device::Cpu).expect("random")
    }

    fn numbers(t: &Tensor) -> Vec<f64> {
        let flat = t.to_dtype(DType::F64).and_then(|t| t.flatten_all());
        flat.and_then(|t| t.to_vec1()).expect("numbers")
    }

    /// In f32 by tiles, and composed of operations in f64, of the same numbers.
    fn both(
        x: &Tensor,
        weight: &Tensor,
        added: &[Thin],
        bias: Option<&Tensor>,
        direction: Direction,
    ) -> (Tensor, Tensor) {
        let wide = |t: &Tensor| t.to_dtype(DType::F64).expect("f64");
        let wide_added: Vec<Thin> = added
            .iter()
            .map(|thin| Thin {
                left: wide(&thin.left),
                right: wide(&thin.right),
                diagonal: thin.diagonal.as_ref().map(wide),
                inner: None,
            })
            .collect();
        let tiled = tiled(x, weight, added, bias, direction).expect("computes");
        let composed = match direction {
            Direction::Forward => forward(&wide(x), &wide(weight), &wide_added, bias),
            Direction::Back => back(&wide(x), &wide(weight), &wide_added),
        };
        (tiled.expect("applies"), composed.expect("computes"))
    }

    #[test]
    fn tiles_give_the_product_in_every_dtype_direction_and_order_of_evaluation() {
        // one tile and less, several of both kinds, slivers whose rows are shared out; few rows and many
        let shapes = [(3, 5), (17, 1100), (300, 70), (530, 1030), (20, 40)];
        for (m, n) in shapes {
            for (rows, direction) in [1, 7, 400]
                .into_iter()
                .flat_map(|rows| [(rows, Direction::Forward), (rows, Direction::Back)])
            {
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    for known in [false, true] {
                        let q = 6;
                        let weight = random(&[m, n]).to_dtype(dtype).expect("dtype");
                        let (read, out) = match direction {
                            Direction::Forward => (n, m),
                            Direction::Back => (m, n),
                        };
                        let x = random(&[rows, read]);
                        let (left, right) = (random(&[q, m]), random(&[q, n]));
                        let right = right.to_dtype(dtype).expect("dtype");
                        let facing = match direction {
                            Direction::Forward => &right,
                            Direction::Back => &left,
                        };
                        let inner = known.then(|| forward(&x, facing, &[], None).expect("inner"));
                        let added = [Thin {
                            left,
                            right,
                            diagonal: (rows == 7).then(|| random(&[q])),
                            inner,
                        }];
                        let bias = random(&[m]);
                        let bias = (direction == Direction::Forward).then_some(&bias);
                        let (y, wanted) = both(&x, &weight, &added, bias, direction);
                        assert_eq!(y.dims(), [rows, out]);
                        // sums of `read` products of normal numbers with a weight of variance 1 + q
                        let scale = ((read * (1 + q)) as f64).sqrt();
                        let tolerance =
                            f64::from(f32::EPSILON) * scale * 8.0 * (read as f64).sqrt();
                        for (got, wanted) in numbers(&y).iter().zip(numbers(&wanted)) {
                            assert!(
                                (got - wanted).abs() < tolerance,
                                "{m} × {n}, {rows} rows, {direction:?}, {dtype:?}, {known}: {got} for {wanted}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_weight_is_formed_for_many_rows_and_not_for_few() {
        // 2·m·n·q to form it; each row costs 2·q·(m + n) forward, and 2·q·n back where gᵀ·left is known
        assert!(!forming_is_cheaper(1, 576, 576, false));
        assert!(!forming_is_cheaper(288, 576, 576, false));
        assert!(forming_is_cheaper(289, 576, 576, false));
        assert!(!forming_is_cheaper(576, 576, 1536, true));
        assert!(forming_is_cheaper(577, 576, 1536, true));
    }
}
