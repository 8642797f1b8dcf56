//! The differentiable operations of a decoder block, each with its gradient written beside it.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::softmax_last_dim;

use super::layers::Linear;
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
    let y = (a.silu()? * &b)?;
    attach(&[gate, up], y, move |g| {
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
            let scores = scores.reshape((b * h, t, t))?.broadcast_add(&mask)?;
            softmax_last_dim(&scores)?.reshape((b, kv, shared * t, t))
        }
    };
    let y = probabilities()?.matmul(&vd)?.reshape((b, h, t, d))?;
    attach(&[q, k, v], y, move |g| {
        let g = g.contiguous()?.reshape(grouped)?;
        let p = probabilities()?;
        let dv = p.t()?.matmul(&g)?;
        let dp = g.matmul(&vd.t()?)?;
        // softmax: ds = p ∘ (dp − Σ dp ∘ p)
        let along = (&dp * &p)?.sum_keepdim(D::Minus1)?;
        let ds = (p * dp.broadcast_sub(&along)?)?;
        let dq = (ds.matmul(&kd)? * scale)?.reshape((b, h, t, d))?;
        let dk = (ds.t()?.matmul(&qd)? * scale)?;
        Ok(vec![Some(dq), Some(dk), Some(dv)])
    })
}

/// Rows of logits that are alive at once in [`cross_entropy`].
const CHUNK_ROWS: usize = 256;

/// Σ over rows of −log softmax(head(x)) at the row's target, without ever holding all logits.
///
/// `x (rows, n), targets (rows,) u32 → (1,)`. Gradients of x and of the head's Δσ are formed in the forward pass, chunk
/// by chunk, while the logits are there.
pub fn cross_entropy(x: &Tensor, head: &Linear, targets: &Tensor) -> Result<Tensor> {
    let total = x.dim(0)?;
    let delta = head.delta();
    let (wants_x, wants_delta) = (x.track_op(), delta.is_some_and(Tensor::track_op));
    let mut loss = 0f64;
    let mut dx = Vec::new();
    let mut d_delta: Option<Tensor> = None;
    for start in (0..total).step_by(CHUNK_ROWS) {
        let n = CHUNK_ROWS.min(total - start);
        let chunk = x.detach().narrow(0, start, n)?.contiguous()?;
        let wanted = targets.narrow(0, start, n)?.unsqueeze(1)?.contiguous()?;
        let logits = head.apply(&chunk)?.to_dtype(DType::F32)?;
        let largest = logits.max_keepdim(1)?;
        let shifted = logits.broadcast_sub(&largest)?;
        let exponentials = shifted.exp()?;
        let sums = exponentials.sum_keepdim(1)?;
        let losses = (sums.log()? - shifted.gather(&wanted, 1)?)?;
        loss += losses.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
        if wants_x || wants_delta {
            let minus_one = (wanted.zeros_like()?.to_dtype(DType::F32)? - 1.0)?;
            let d_logits = exponentials
                .broadcast_div(&sums)?
                .scatter_add(&wanted, &minus_one, 1)?
                .to_dtype(chunk.dtype())?;
            let (chunk_dx, chunk_delta) = head.pull(&chunk, &d_logits, wants_x)?;
            dx.extend(chunk_dx);
            d_delta = match (d_delta, chunk_delta) {
                (Some(sum), Some(more)) => Some((sum + more)?),
                (sum, more) => sum.or(more),
            };
        }
    }
    let loss = Tensor::new(&[loss as f32], x.device())?;
    if !wants_x && !wants_delta {
        return Ok(loss);
    }
    let dx = if wants_x {
        Some(Tensor::cat(&dx, 0)?)
    } else {
        None
    };
    let scale = |tensor: &Option<Tensor>, g: &Tensor| -> Result<Option<Tensor>> {
        tensor
            .as_ref()
            .map(|t| t.broadcast_mul(&g.to_dtype(t.dtype())?))
            .transpose()
    };
    match delta {
        Some(delta) => attach(&[x, delta], loss, move |g| {
            Ok(vec![scale(&dx, g)?, scale(&d_delta, g)?])
        }),
        None => attach(&[x], loss, move |g| Ok(vec![scale(&dx, g)?])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// Random projection of the output against central differences, in f64 where the op allows it.
    fn assert_gradient(
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
                (numeric - analytic).abs() <= tolerance * scale,
                "input {i}: {numeric} against {analytic}"
            );
        }
    }

    fn random(shape: &[usize], dtype: DType) -> Var {
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

    #[test]
    fn cross_entropy_gradient_reaches_input_and_delta_across_chunks() {
        let n = CHUNK_ROWS + 37;
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % 11).collect();
        let targets = Tensor::from_vec(targets, n, &Device::Cpu).expect("targets");
        let (w, u, v) = (
            random(&[11, 6], DType::F64),
            random(&[3, 11], DType::F64),
            random(&[3, 6], DType::F64),
        );
        let inputs = [random(&[n, 6], DType::F64), random(&[3], DType::F64)];
        let loss = |t: &[Tensor]| {
            let head = Linear::with_delta_tensor(
                w.as_detached_tensor(),
                u.as_detached_tensor(),
                v.as_detached_tensor(),
                t[1].clone(),
            );
            cross_entropy(&t[0], &head, &targets)
        };
        // the loss comes back in f32
        assert_gradient(&inputs, loss, 1e-2, 1e-3);
    }
}
