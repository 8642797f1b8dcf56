//! The differentiable operations of a decoder block, each with its gradient written beside it.

use candle_core::shape::ShapeWithOneHole;
use candle_core::{D, DType, Result, Shape, Tensor, bail};
use candle_nn::ops::softmax_last_dim;

use super::attention;
use super::family::{Activation, Scores, TANH_GELU};
use super::fused;
use super::gpu;
use super::rope::Angles;
use super::segments::Sight;
use super::tape::{attach, attach_many, plus, tracked};

/// Rows in front of the last side: (…, n) → (rows, n).
pub fn rows(x: &Tensor) -> Result<Tensor> {
    let n = x.dim(D::Minus1)?;
    x.reshape(((), n))
}

/// The shape of `x` with another last side.
pub fn with_last(x: &Tensor, last: usize) -> Vec<usize> {
    let mut shape = x.dims().to_vec();
    if let Some(side) = shape.last_mut() {
        *side = last;
    }
    shape
}

/// What is computed where there is no kernel: 16 bits are widened, and the result is rounded once, as kernels do it.
pub fn wide(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(wider(x))
}

/// The dtype that [`wide`] computes in.
pub fn wider(x: &Tensor) -> DType {
    match x.dtype() {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}

/// a + b
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    attach(&[a, b], plus(a, b)?, |g| {
        Ok(vec![Some(g.clone()), Some(g.clone())])
    })
}

/// factor·x
pub fn scaled(x: &Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    attach(&[x], (x.detach() * factor)?, move |g| {
        Ok(vec![Some((g * factor)?)])
    })
}

/// x + constant
pub fn shifted(x: &Tensor, constant: f64) -> Result<Tensor> {
    attach(&[x], (x.detach() + constant)?, |g| {
        Ok(vec![Some(g.clone())])
    })
}

/// The same numbers in another dtype.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let from = x.dtype();
    if from == dtype {
        return Ok(x.clone());
    }
    attach(&[x], x.detach().to_dtype(dtype)?, move |g| {
        Ok(vec![Some(g.to_dtype(from)?)])
    })
}

/// The same numbers in another shape.
pub fn reshape(x: &Tensor, shape: impl ShapeWithOneHole) -> Result<Tensor> {
    let from = x.shape().clone();
    let y = x.detach().reshape(shape)?;
    if *y.shape() == from {
        return Ok(x.clone());
    }
    attach(&[x], y, move |g| Ok(vec![Some(g.reshape(from)?)]))
}

/// Parts of a side, one behind the other, each in memory of its own.
pub fn split(x: &Tensor, dim: usize, sides: &[usize]) -> Result<Vec<Tensor>> {
    let xd = x.detach();
    let parts = match gpu::split(&xd, dim, sides)? {
        Some(parts) => parts,
        None => {
            let ends = sides.iter().scan(0, |end, side| {
                *end += side;
                Some(*end)
            });
            let parts = ends.zip(sides);
            parts
                .map(|(end, &side)| xd.narrow(dim, end - side, side)?.contiguous())
                .collect::<Result<_>>()?
        }
    };
    let shapes: Vec<Shape> = parts.iter().map(|part| part.shape().clone()).collect();
    let (dtype, device) = (x.dtype(), x.device().clone());
    attach_many(&[x], parts, move |gradients| {
        let all = gradients.iter().zip(&shapes).map(|(g, shape)| match g {
            Some(g) => g.contiguous(),
            None => Tensor::zeros(shape, dtype, &device),
        });
        let all: Vec<Tensor> = all.collect::<Result<_>>()?;
        let joined = match gpu::joined(&all, dim)? {
            Some(joined) => joined,
            None => Tensor::cat(&all, dim)?,
        };
        Ok(vec![Some(joined)])
    })
}

/// The rows of x (count, n) that are named, each once.
pub fn selected(x: &Tensor, named: &Tensor) -> Result<Tensor> {
    let (like, ids) = (x.detach(), named.clone());
    attach(&[x], like.index_select(named, 0)?, move |g| {
        Ok(vec![Some(like.zeros_like()?.index_add(&ids, g, 0)?)])
    })
}

/// Rows of an embedding `(vocabulary, n)` for `ids (count,)` → (count, n).
pub fn embed(embedding: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let rows = embedding.detach().index_select(ids, 0)?;
    let (like, ids) = (embedding.detach(), ids.clone());
    // a sum of its own: where a head is tied to it, the order of two sums decides no bit
    attach(&[embedding], rows, move |g| {
        let sum = like.zeros_like()?.index_add(&ids, &g.contiguous()?, 0)?;
        Ok(vec![Some(sum)])
    })
}

/// Root mean square norm over the last side (Zhang & Sennrich 2019): y = x / √(mean x² + ε) ∘ w.
///
/// `x (…, n), w (n,) → (…, n)`
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let (xd, wd) = (x.detach().contiguous()?, w.detach());
    let y = match gpu::rms_norm(&xd, None, &wd, eps)? {
        Some((_, y)) => y,
        // candle rounds the length of a row to the row's dtype
        None => {
            candle_nn::ops::rms_norm(&wide(&xd)?, &wide(&wd)?, eps as f32)?.to_dtype(xd.dtype())?
        }
    };
    let wants_weight = tracked(w);
    attach(&[x, w], y, move |g| {
        let g = &g.contiguous()?;
        if let Some((dx, dw)) = gpu::rms_norm_gradient(&xd, &wd, g, None, eps, wants_weight)? {
            return Ok(vec![Some(dx), dw]);
        }
        let dtype = xd.dtype();
        let (xd, wd, g) = (wide(&xd)?, wide(&wd)?, wide(g)?);
        if let Some((dx, dw)) = fused::rms_norm_gradient(&xd, &wd, &g, eps)? {
            let dw = wants_weight.then(|| dw.to_dtype(dtype)).transpose()?;
            return Ok(vec![Some(dx.to_dtype(dtype)?), dw]);
        }
        let n = xd.dim(D::Minus1)? as f64;
        let mean_square = (xd.sqr()?.sum_keepdim(D::Minus1)? / n)?;
        let inverse = (mean_square + eps)?.sqrt()?.recip()?;
        let normed = xd.broadcast_mul(&inverse)?;
        let dw = if wants_weight {
            Some(rows(&(&g * &normed)?)?.sum(0)?.to_dtype(dtype)?)
        } else {
            None
        };
        let gw = g.broadcast_mul(&wd)?;
        let along = ((&gw * &normed)?.sum_keepdim(D::Minus1)? / n)?;
        let dx = (gw - normed.broadcast_mul(&along)?)?.broadcast_mul(&inverse)?;
        Ok(vec![Some(dx.to_dtype(dtype)?), dw])
    })
}

/// s = x + added, or x itself, and the [`rms_norm`] of s: what a residual stream goes on with, and what is made of it.
///
/// On a GPU the sum costs no pass of its own, neither forward nor, where both come back, that of their gradients.
pub fn rms_norm_beside(
    x: &Tensor,
    added: Option<&Tensor>,
    w: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let (xd, wd) = (x.detach().contiguous()?, w.detach());
    let other = added.map(|added| added.detach().contiguous()).transpose()?;
    let Some((sum, y)) = gpu::rms_norm(&xd, other.as_ref(), &wd, eps)? else {
        let sum = match added {
            Some(added) => add(x, added)?,
            None => x.clone(),
        };
        let y = rms_norm(&sum, w, eps)?;
        return Ok((sum, y));
    };
    // another tensor of the same memory: x itself has a gradient already
    let sum = sum.reshape(x.shape())?;
    let (kept, wants_weight) = (sum.clone(), tracked(w));
    let inputs = [[x, w].as_slice(), added.as_slice()].concat();
    let mut both = attach_many(&inputs, vec![sum, y], move |gradients| {
        let along = gradients[0].as_ref().map(Tensor::contiguous);
        let along = along.transpose()?;
        let Some(g) = &gradients[1] else {
            return Ok(vec![along.clone(), None, along]);
        };
        let g = g.contiguous()?;
        let made = gpu::rms_norm_gradient(&kept, &wd, &g, along.as_ref(), eps, wants_weight)?;
        let (dx, dw) = made.expect("invariant: a kernel gave y");
        Ok(vec![Some(dx.clone()), dw, Some(dx)])
    })?;
    let y = both.remove(1);
    Ok((both.remove(0), y))
}

/// Layer norm over the last side (Ba, Kiros & Hinton 2016): y = (x − mean x) / √(var x + ε) ∘ w + b.
///
/// `x (…, n), w and b (n,) → (…, n)`; b gets no gradient.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let (xd, wd) = (x.detach().contiguous()?, w.detach());
    let (xw, ww, bw) = (wide(&xd)?, wide(&wd)?, wide(&b.detach())?);
    let y = candle_nn::ops::layer_norm(&xw, &ww, &bw, eps as f32)?.to_dtype(xd.dtype())?;
    let wants_weight = tracked(w);
    attach(&[x, w], y, move |g| {
        let dtype = xd.dtype();
        let (xd, wd, g) = (wide(&xd)?, wide(&wd)?, wide(g)?);
        let centred = xd.broadcast_sub(&xd.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let inverse = (variance + eps)?.sqrt()?.recip()?;
        let normed = centred.broadcast_mul(&inverse)?;
        let dw = if wants_weight {
            Some(rows(&(&g * &normed)?)?.sum(0)?.to_dtype(dtype)?)
        } else {
            None
        };
        let gw = g.broadcast_mul(&wd)?;
        let along = (&gw * &normed)?.mean_keepdim(D::Minus1)?;
        let dx = gw.broadcast_sub(&gw.mean_keepdim(D::Minus1)?)?;
        let dx = (dx - normed.broadcast_mul(&along)?)?.broadcast_mul(&inverse)?;
        Ok(vec![Some(dx.to_dtype(dtype)?), dw])
    })
}

/// Rotates pairs of elements by their position's angle (Su et al. 2021, half-split layout). `x (b, t, h, d)`
///
/// The gradient of a rotation is the rotation back.
pub fn rotate(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    let angles = angles.clone();
    let y = turned(&x.detach(), &angles, false)?;
    attach(&[x], y, move |g| Ok(vec![Some(turned(g, &angles, true)?)]))
}

fn turned(x: &Tensor, angles: &Angles, back: bool) -> Result<Tensor> {
    match gpu::rotate(&x.contiguous()?, &angles.cos, &angles.sin, back)? {
        Some(y) => Ok(y),
        None => angles.apply(&wide(x)?, back)?.to_dtype(x.dtype()),
    }
}

/// Queries, keys and values (b, t, heads, d) of `x (b, t, Σ heads·d)`, which holds so many heads of each one behind the other;
/// the first two rotated.
pub fn split_heads(x: &Tensor, heads: [usize; 3], angles: &Angles) -> Result<[Tensor; 3]> {
    let (b, t, width) = x.dims3()?;
    let d = width / heads.iter().sum::<usize>();
    let turns = [&angles.cos, &angles.sin];
    let Some(parts) = gpu::split_heads(&x.detach(), heads, turns)? else {
        let parts = split(x, 2, &heads.map(|heads| heads * d))?;
        let part = |at: usize| reshape(&parts[at], (b, t, heads[at], d));
        return Ok([
            rotate(&part(0)?, angles)?,
            rotate(&part(1)?, angles)?,
            part(2)?,
        ]);
    };
    let angles = angles.clone();
    let shapes = heads.map(|heads| (b, t, heads, d));
    let (dtype, device) = (x.dtype(), x.device().clone());
    let parts = attach_many(&[x], parts.into(), move |gradients| {
        let part = |at: usize| match &gradients[at] {
            Some(g) => g.contiguous(),
            None => Tensor::zeros(shapes[at], dtype, &device),
        };
        let parts = [part(0)?, part(1)?, part(2)?];
        let dx = gpu::joined_heads(&parts, [&angles.cos, &angles.sin])?;
        Ok(vec![Some(dx.expect("invariant: kernels gave the parts"))])
    })?;
    Ok(parts.try_into().expect("three parts"))
}

/// activation(gate) ∘ up (Shazeer 2020).
pub fn gated(gate: &Tensor, up: &Tensor, activation: &Activation) -> Result<Tensor> {
    let (a, b, activation) = (gate.detach(), up.detach(), activation.clone());
    let dtype = a.dtype();
    let y = match gpu::gated(&a, &b, &activation)? {
        Some(y) => y,
        None => {
            let (a, b) = (wide(&a)?, wide(&b)?);
            let y = match fused::gated(&a, &b, &activation)? {
                Some(y) => y,
                None => (value_and_slope(&a, &activation)?.0 * &b)?,
            };
            y.to_dtype(dtype)?
        }
    };
    attach(&[gate, up], y, move |g| {
        let g = &g.contiguous()?;
        if let Some((da, db)) = gpu::gated_gradient(&a, &b, g, &activation)? {
            return Ok(vec![Some(da), Some(db)]);
        }
        let (a, b, g) = (wide(&a)?, wide(&b)?, wide(g)?);
        let (da, db) = match fused::gated_gradient(&a, &b, &g, &activation)? {
            Some(gradients) => gradients,
            None => {
                let (value, slope) = value_and_slope(&a, &activation)?;
                (((&g * &b)? * slope)?, (&g * value)?)
            }
        };
        Ok(vec![Some(da.to_dtype(dtype)?), Some(db.to_dtype(dtype)?)])
    })
}

/// The same of x (…, 2n) that holds the gate and behind it what is gated → (…, n).
pub fn gated_stacked(x: &Tensor, activation: &Activation) -> Result<Tensor> {
    let (last, side) = (x.rank() - 1, x.dim(D::Minus1)? / 2);
    let xd = x.detach();
    let halves = (xd.narrow(last, 0, side)?, xd.narrow(last, side, side)?);
    let Some(y) = gpu::gated(&halves.0, &halves.1, activation)? else {
        let halves = split(x, last, &[side, side])?;
        return gated(&halves[0], &halves[1], activation);
    };
    let activation = activation.clone();
    attach(&[x], y, move |g| {
        let dx = gpu::gated_stacked_gradient(&xd, &g.contiguous()?, &activation)?;
        Ok(vec![Some(dx.expect("invariant: a kernel gave y"))])
    })
}

/// The activation alone, of an MLP without a gate.
pub fn activated(x: &Tensor, activation: &Activation) -> Result<Tensor> {
    let (xd, activation, dtype) = (x.detach(), activation.clone(), x.dtype());
    let (y, _) = value_and_slope(&wide(&xd)?, &activation)?;
    attach(&[x], y.to_dtype(dtype)?, move |g| {
        let (_, slope) = value_and_slope(&wide(&xd)?, &activation)?;
        Ok(vec![Some((wide(g)? * slope)?.to_dtype(dtype)?)])
    })
}

/// An activation and its derivative, from tensor operations. All are a·s(a), of slope s + a·s′.
fn value_and_slope(a: &Tensor, activation: &Activation) -> Result<(Tensor, Tensor)> {
    let (s, rest) = match activation {
        Activation::Silu => {
            let s = candle_nn::ops::sigmoid(a)?;
            // s′ = s·(1 − s)
            let value = (a * &s)?;
            let rest = (&value - (&value * &s)?)?;
            (s, rest)
        }
        Activation::GeluTanh => {
            // (1 + tanh z)/2 = sigmoid(2z)
            let square = a.sqr()?;
            let z = (a * ((&square * (TANH_GELU.0 * TANH_GELU.1))? + TANH_GELU.0)?)?;
            let dz = ((square * (3.0 * TANH_GELU.0 * TANH_GELU.1))? + TANH_GELU.0)?;
            let s = candle_nn::ops::sigmoid(&z)?;
            let value = (a * &s)?;
            let rest = ((&value - (&value * &s)?)? * dz)?;
            (s, rest)
        }
        Activation::Gelu => {
            let s = (((a * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
            let density = (a.sqr()? * -0.5)?.exp()?;
            let rest = ((a * density)? * std::f64::consts::TAU.sqrt().recip())?;
            (s, rest)
        }
        Activation::Unsupported(name) => bail!("the activation {name} is refused at loading"),
    };
    Ok(((a * &s)?, (s + rest)?))
}

/// cap·tanh(x / cap), and its derivative: 1 − tanh². No gradient: for use inside pullbacks.
pub fn capped(x: &Tensor, cap: f64) -> Result<(Tensor, Tensor)> {
    let bent = (x / cap)?.tanh()?;
    let slope = bent.sqr()?.affine(-1.0, 1.0)?;
    Ok(((bent * cap)?, slope))
}

/// Scaled dot-product attention with shared key–value heads.
///
/// `q (b, t, h, d), k and v (b, s, kv, d) → (b, t, h, d)`. h is a multiple of kv, and no key or value is repeated. The
/// probabilities are computed again in the pullback, not kept.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sight: &Sight,
    scores: Scores,
) -> Result<Tensor> {
    let (qd, kd, vd) = (
        q.detach().contiguous()?,
        k.detach().contiguous()?,
        v.detach().contiguous()?,
    );
    let (sight, dtype) = (sight.clone(), q.dtype());
    // of a GPU, what the gradients go on from
    let mut kept = None;
    let y = if let Some(kernels) = gpu::Attention::of(&qd, &kd, &vd, &sight, scores)? {
        let (y, lse) = kernels.forward()?;
        kept = Some(lse);
        y
    } else {
        let (q, k, v) = (wide(&qd)?, wide(&kd)?, wide(&vd)?);
        let y = match attention::forward(&q, &k, &v, &sight, scores)? {
            Some(y) => y,
            None => Composed::of(&q, &k, &sight, scores)?.times(&v)?,
        };
        y.to_dtype(dtype)?
    };
    let kept_y = y.clone();
    attach(&[q, k, v], y, move |g| {
        let g = g.contiguous()?;
        if let Some(lse) = &kept {
            let kernels = gpu::Attention::of(&qd, &kd, &vd, &sight, scores)?;
            let kernels = kernels.expect("invariant: kernels gave y");
            return Ok(kernels.gradients(&kept_y, lse, &g)?.map(Some).into());
        }
        let (q, k, v, g) = (wide(&qd)?, wide(&kd)?, wide(&vd)?, wide(&g)?);
        let gradients = match attention::gradients(&q, &k, &v, &sight, scores, &g)? {
            Some(gradients) => gradients,
            None => Composed::of(&q, &k, &sight, scores)?.gradients(&q, &k, &v, &g)?,
        };
        let rounded = gradients.iter().map(|x| x.to_dtype(dtype).map(Some));
        rounded.collect()
    })
}

/// Attention from tensor operations. Heads that share keys are rows of one matrix, so that no key is repeated.
struct Composed {
    heads: usize,
    /// (b, kv, h/kv·t, s)
    p: Tensor,
    /// Of a cap, in the same shape.
    slope: Option<Tensor>,
    scale: f64,
}

impl Composed {
    fn of(q: &Tensor, k: &Tensor, sight: &Sight, Scores { scale, cap }: Scores) -> Result<Self> {
        let (b, t, heads, _) = q.dims4()?;
        let (_, s, kv, _) = k.dims4()?;
        let scores = (grouped(q, kv)? * scale)?.matmul(&by_head(k)?.t()?)?;
        let (scores, slope) = match cap {
            Some(cap) => {
                let (scores, slope) = capped(&scores, cap)?;
                (scores, Some(slope))
            }
            None => (scores, None),
        };
        let scores = scores.reshape((b, heads, t, s))?;
        let p = softmax_last_dim(&scores.broadcast_add(&sight.mask(q)?)?)?;
        let p = p.reshape((b, kv, heads / kv * t, s))?;
        Ok(Self {
            heads,
            p,
            slope,
            scale,
        })
    }

    /// p·v as (b, t, h, d)
    fn times(&self, v: &Tensor) -> Result<Tensor> {
        self.by_position(&self.p.matmul(&by_head(v)?)?)
    }

    /// (b, kv, h/kv·t, d) → (b, t, h, d)
    fn by_position(&self, y: &Tensor) -> Result<Tensor> {
        let (b, kv, rows, d) = y.dims4()?;
        by_head(&y.reshape((b, self.heads, kv * rows / self.heads, d))?)
    }

    fn gradients(&self, q: &Tensor, k: &Tensor, v: &Tensor, g: &Tensor) -> Result<[Tensor; 3]> {
        let kv = k.dim(2)?;
        let g = grouped(g, kv)?;
        let dv = self.p.t()?.matmul(&g)?;
        let dp = g.matmul(&by_head(v)?.t()?)?;
        // softmax: ds = p ∘ (dp − Σ dp ∘ p)
        let along = (&dp * &self.p)?.sum_keepdim(D::Minus1)?;
        let mut ds = (&self.p * dp.broadcast_sub(&along)?)?;
        if let Some(slope) = &self.slope {
            ds = (ds * slope)?;
        }
        let dq = (ds.matmul(&by_head(k)?)? * self.scale)?;
        let dk = (ds.t()?.matmul(&grouped(q, kv)?)? * self.scale)?;
        Ok([self.by_position(&dq)?, by_head(&dk)?, by_head(&dv)?])
    }
}

/// (b, t, h, d) → (b, h, t, d), and back.
fn by_head(x: &Tensor) -> Result<Tensor> {
    x.transpose(1, 2)?.contiguous()
}

/// (b, t, h, d) → (b, kv, h/kv·t, d)
fn grouped(x: &Tensor, kv: usize) -> Result<Tensor> {
    let (b, t, h, d) = x.dims4()?;
    by_head(x)?.reshape((b, kv, h / kv * t, d))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::segments::{Segment, Segments};
    use super::super::tape::record;
    use super::*;
    use candle_core::{Device, Var};

    /// Random projection of the output against central differences, in f64 where the op allows it.
    pub fn assert_gradient(
        inputs: &[Var],
        f: impl Fn(&[Tensor]) -> Result<Tensor>,
        step: f64,
        tolerance: f64,
    ) {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let (y, tape) = record(&[], || f(&tensors)).expect("forward");
        let weights = Tensor::rand(-1f32, 1f32, y.dims(), &Device::Cpu)
            .expect("random")
            .to_dtype(y.dtype())
            .expect("dtype");
        let value = |tensors: &[Tensor]| -> f64 {
            let y = f(tensors).expect("forward");
            (y * &weights)
                .expect("product")
                .to_dtype(DType::F64)
                .expect("f64")
                .sum_all()
                .expect("sum")
                .to_scalar()
                .expect("scalar")
        };
        let mut gradients = tape.back(&y, weights.clone()).expect("backward");
        // an f32 result is rounded before the two values are subtracted
        let rounding = match y.dtype() {
            DType::F32 => f64::from(f32::EPSILON) * magnitude(&y) / step,
            _ => 0.0,
        };
        for (i, input) in inputs.iter().enumerate() {
            let gradient = gradients
                .take(input)
                .unwrap_or_else(|| panic!("input {i} has no gradient"));
            let direction = Tensor::rand(-1f32, 1f32, input.dims(), &Device::Cpu)
                .expect("random")
                .to_dtype(input.dtype())
                .expect("dtype");
            let moved = |sign: f64| {
                let mut tensors: Vec<Tensor> = tensors.iter().map(Tensor::detach).collect();
                tensors[i] =
                    (&tensors[i] + (&direction * (sign * step)).expect("scaled")).expect("moved");
                value(&tensors)
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * step);
            let analytic: f64 = (gradient * &direction)
                .expect("product")
                .to_dtype(DType::F64)
                .expect("f64")
                .sum_all()
                .expect("sum")
                .to_scalar()
                .expect("scalar");
            let scale = numeric.abs().max(analytic.abs()).max(1e-2);
            assert!(
                (numeric - analytic).abs() <= tolerance * scale + rounding,
                "input {i}: {numeric} against {analytic}"
            );
        }
    }

    fn magnitude(y: &Tensor) -> f64 {
        let sum = y.to_dtype(DType::F64).and_then(|y| y.abs()?.sum_all());
        sum.and_then(|sum| sum.to_scalar()).expect("a sum")
    }

    pub fn random(shape: &[usize], dtype: DType) -> Var {
        let t = Tensor::randn(0f32, 1f32, shape, &Device::Cpu)
            .expect("random")
            .to_dtype(dtype)
            .expect("dtype");
        Var::from_tensor(&t).expect("variable")
    }

    // f32 central differences err by ε/step in the function's scale: hence 1e-2 there, 1e-6 in f64

    #[test]
    fn embed_gradient_adds_up_where_an_id_repeats() {
        let ids = Tensor::new(&[3u32, 0, 3, 1, 3], &Device::Cpu).expect("ids");
        let f = |t: &[Tensor]| embed(&t[0], &ids);
        assert_gradient(&[random(&[5, 4], DType::F64)], f, 1e-5, 1e-6);
    }

    #[test]
    fn rms_norm_gradient() {
        assert_gradient(
            &[random(&[3, 5, 8], DType::F32), random(&[8], DType::F32)],
            |t| rms_norm(&t[0], &t[1], 1e-5),
            1e-2,
            1e-2,
        );
    }

    #[test]
    fn layer_norm_gradient() {
        let bias = random(&[8], DType::F32);
        assert_gradient(
            &[random(&[3, 5, 8], DType::F32), random(&[8], DType::F32)],
            |t| layer_norm(&t[0], &t[1], &bias, 1e-5),
            1e-2,
            1e-2,
        );
    }

    #[test]
    fn gated_gradient() {
        for (activation, tolerance) in [
            (Activation::Silu, 1e-6),
            (Activation::GeluTanh, 1e-6),
            (Activation::Gelu, 1e-6),
        ] {
            let inputs = [random(&[4, 7], DType::F64), random(&[4, 7], DType::F64)];
            let f = |t: &[Tensor]| gated(&t[0], &t[1], &activation);
            assert_gradient(&inputs, f, 1e-5, tolerance);
            let f = |t: &[Tensor]| activated(&t[0], &activation);
            assert_gradient(&inputs[..1], f, 1e-5, tolerance);
        }
    }

    const SILU: [f64; 4] = [
        -0.2736382857095345,
        -0.1276672449565023,
        0.46773144051771626,
        1.7615941559557646,
    ];
    const GELU_TANH: [f64; 4] = [
        -0.10042842301976707,
        -0.11462907645724074,
        0.5305701347051167,
        1.954597694087775,
    ];
    const GELU: [f64; 4] = [
        -0.10021080190328704,
        -0.1146265733433142,
        0.5306254434438489,
        1.9544997361036416,
    ];

    #[test]
    fn activations_have_their_published_values() {
        // torch 2.9.1, f64: silu, gelu(approximate="tanh"), gelu at −1.5, −0.3, 0.7, 2
        let x = Tensor::new(&[-1.5f64, -0.3, 0.7, 2.0], &Device::Cpu).expect("x");
        for (activation, wanted) in [
            (Activation::Silu, SILU),
            (Activation::GeluTanh, GELU_TANH),
            (Activation::Gelu, GELU),
        ] {
            let (y, _) = value_and_slope(&x, &activation).expect("computes");
            for (y, wanted) in y.to_vec1::<f64>().expect("values").iter().zip(wanted) {
                assert!(
                    (y - wanted).abs() < 1e-12,
                    "{activation:?}: {y} for {wanted}"
                );
            }
        }
    }

    #[test]
    fn attention_gradient_with_shared_heads_a_window_and_a_cap() {
        let inputs = [
            random(&[2, 5, 6, 4], DType::F64),
            random(&[2, 5, 2, 4], DType::F64),
            random(&[2, 5, 2, 4], DType::F64),
        ];
        let whole = Segments::whole(2, 5).sight(Some(3), &Device::Cpu);
        let packed = Segments::new(vec![
            vec![Segment::Sequence(2), Segment::Sequence(3)],
            vec![Segment::Padding(1), Segment::Sequence(4)],
        ])
        .sight(Some(3), &Device::Cpu);
        for sight in [whole.expect("sight"), packed.expect("sight")] {
            for cap in [None, Some(0.7)] {
                let scores = Scores { scale: 0.5, cap };
                let f = |t: &[Tensor]| attention(&t[0], &t[1], &t[2], &sight, scores);
                assert_gradient(&inputs, f, 1e-5, 1e-6);
            }
        }
    }
}
