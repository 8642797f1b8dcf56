//! The differentiable operations of a decoder block, each with its gradient written beside it.

use candle_core::{D, Result, Tensor};
use candle_nn::ops::softmax_last_dim;

use super::fused;
use super::rope::Angles;
use super::vjp::attach;

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

/// x·wᵀ with x (…, n), w (m, n) → (…, m). No gradient: for use inside pullbacks and frozen layers.
pub fn times_transposed(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    rows(x)?.matmul(&w.t()?)?.reshape(with_last(x, w.dim(0)?))
}

/// x·w with x (…, m), w (m, n) → (…, n).
pub fn times(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    rows(x)?.matmul(w)?.reshape(with_last(x, w.dim(1)?))
}

/// Root mean square norm over the last side (Zhang & Sennrich 2019): y = x / √(mean x² + ε) ∘ w.
///
/// `x (…, n), w (n,) → (…, n)`
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let (xd, wd) = (x.detach().contiguous()?, w.detach());
    let y = candle_nn::ops::rms_norm(&xd, &wd, eps as f32)?;
    let wants_weight = w.track_op();
    attach(&[x, w], y, move |g| {
        if let Some((dx, dw)) = fused::rms_norm_gradient(&xd, &wd, &g.contiguous()?, eps)? {
            return Ok(vec![Some(dx), wants_weight.then_some(dw)]);
        }
        let n = xd.dim(D::Minus1)? as f64;
        let mean_square = (xd.sqr()?.sum_keepdim(D::Minus1)? / n)?;
        let inverse = (mean_square + eps)?.sqrt()?.recip()?;
        let normed = xd.broadcast_mul(&inverse)?;
        let dw = if wants_weight {
            Some(rows(&(g * &normed)?)?.sum(0)?)
        } else {
            None
        };
        let gw = g.broadcast_mul(&wd)?;
        let along = ((&gw * &normed)?.sum_keepdim(D::Minus1)? / n)?;
        let dx = (gw - normed.broadcast_mul(&along)?)?.broadcast_mul(&inverse)?;
        Ok(vec![Some(dx), dw])
    })
}

/// Rotates pairs of elements by their position's angle (Su et al. 2021, half-split layout). `x (b, h, t, d)`
///
/// The gradient of a rotation is the rotation back.
pub fn rotate(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    let forward = angles.clone();
    let y = forward.apply(&x.detach(), false)?;
    attach(&[x], y, move |g| Ok(vec![Some(forward.apply(g, true)?)]))
}

/// silu(gate) ∘ up (Shazeer 2020).
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (a, b) = (gate.detach(), up.detach());
    let y = match fused::swiglu(&a, &b)? {
        Some(y) => y,
        None => (a.silu()? * &b)?,
    };
    attach(&[gate, up], y, move |g| {
        if let Some((da, db)) = fused::swiglu_gradient(&a, &b, &g.contiguous()?)? {
            return Ok(vec![Some(da), Some(db)]);
        }
        let s = candle_nn::ops::sigmoid(&a)?;
        let silu = (&a * &s)?;
        let db = (g * &silu)?;
        // d silu(a)/da = s·(1 + a·(1 − s)) = s + silu − silu·s
        let slope = ((&s + &silu)? - (&silu * &s)?)?;
        let da = ((g * &b)? * slope)?;
        Ok(vec![Some(da), Some(db)])
    })
}

/// Scaled dot-product attention with shared key–value heads.
///
/// `q (b, h, t, d), k and v (b, kv, t, d), mask (t, t) of 0 and −∞ → (b, h, t, d)`; h is a multiple of kv, and no key or
/// value is repeated. The probabilities are computed again in the pullback, not kept.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, scale: f64) -> Result<Tensor> {
    let (b, h, t, d) = q.dims4()?;
    let kv = k.dim(1)?;
    let shared = h / kv;
    let grouped = (b, kv, shared * t, d);
    let (qd, kd, vd) = (
        q.detach().contiguous()?.reshape(grouped)?,
        k.detach().contiguous()?,
        v.detach().contiguous()?,
    );
    let mask = mask.clone();
    let probabilities = {
        let (qd, kd) = (qd.clone(), kd.clone());
        move || -> Result<Tensor> {
            let scores = (&qd * scale)?.matmul(&kd.t()?)?;
            let scores = scores.reshape((b * h, t, t))?;
            let p = if fused::masked_softmax(&scores, &mask)? {
                scores
            } else {
                softmax_last_dim(&scores.broadcast_add(&mask)?)?
            };
            p.reshape((b, kv, shared * t, t))
        }
    };
    let y = probabilities()?.matmul(&vd)?.reshape((b, h, t, d))?;
    attach(&[q, k, v], y, move |g| {
        let g = g.contiguous()?.reshape(grouped)?;
        let p = probabilities()?;
        let dv = p.t()?.matmul(&g)?;
        let dp = g.matmul(&vd.t()?)?;
        // softmax: ds = p ∘ (dp − Σ dp ∘ p)
        let ds = if fused::softmax_gradient(&p, &dp)? {
            dp
        } else {
            let along = (&dp * &p)?.sum_keepdim(D::Minus1)?;
            (p * dp.broadcast_sub(&along)?)?
        };
        let dq = (ds.matmul(&kd)? * scale)?.reshape((b, h, t, d))?;
        let dk = (ds.t()?.matmul(&qd)? * scale)?;
        Ok(vec![Some(dq), Some(dk), Some(dv)])
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use candle_core::{DType, Device, Var};

    /// Random projection of the output against central differences, in f64 where the op allows it.
    pub fn assert_gradient(
        inputs: &[Var],
        f: impl Fn(&[Tensor]) -> Result<Tensor>,
        step: f64,
        tolerance: f64,
    ) {
        let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors).expect("forward");
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
        let gradients = (&y * &weights)
            .expect("product")
            .sum_all()
            .expect("sum")
            .backward()
            .expect("backward");
        // an f32 result is rounded before the two values are subtracted
        let rounding = match y.dtype() {
            DType::F32 => f64::from(f32::EPSILON) * magnitude(&y) / step,
            _ => 0.0,
        };
        for (i, input) in inputs.iter().enumerate() {
            let gradient = gradients
                .get(input)
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
    fn rms_norm_gradient() {
        assert_gradient(
            &[random(&[3, 5, 8], DType::F32), random(&[8], DType::F32)],
            |t| rms_norm(&t[0], &t[1], 1e-5),
            1e-2,
            1e-2,
        );
    }

    #[test]
    fn swiglu_gradient() {
        let inputs = [random(&[4, 7], DType::F64), random(&[4, 7], DType::F64)];
        assert_gradient(&inputs, |t| swiglu(&t[0], &t[1]), 1e-5, 1e-6);
    }

    #[test]
    fn attention_gradient_with_shared_heads_and_a_window() {
        let inputs = [
            random(&[2, 6, 5, 4], DType::F64),
            random(&[2, 2, 5, 4], DType::F64),
            random(&[2, 2, 5, 4], DType::F64),
        ];
        let mask =
            super::super::decoder::causal_mask(5, Some(3), DType::F64, &Device::Cpu).expect("mask");
        assert_gradient(
            &inputs,
            |t| attention(&t[0], &t[1], &t[2], &mask, 0.5),
            1e-5,
            1e-6,
        );
    }
}
