//! The layers that own weights: a linear one whose singular values may move, and a norm.

use candle_core::{DType, Result, Tensor, Var};

use super::fused;
use super::ops::{rms_norm, rows, times, times_transposed};
use super::vjp::attach;

/// A linear layer whose singular values are trainable: `y = x·Mᵀ + ((x·vᵀ) ∘ δ)·u + b`.
///
/// `x (…, n) → y (…, m)`; only `delta` may be a variable, and no m × n gradient is ever formed:
/// `∂L/∂δᵢ = Σ_t (x_t·vᵢ)(dy_t·uᵢ)`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// (m, n)
    weight: Tensor,
    /// (m,)
    bias: Option<Tensor>,
    spectrum: Option<Spectrum>,
}

/// The trainable part of a [`Linear`].
#[derive(Debug, Clone)]
struct Spectrum {
    /// (q, m)
    u: Tensor,
    /// (q, n)
    v: Tensor,
    /// (q,), f32: Σ moves by less than a 16-bit unit in the last place
    delta: Tensor,
}

impl Linear {
    pub fn frozen(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            weight,
            bias,
            spectrum: None,
        }
    }

    /// Lets the singular values move: `u` (q, m), `v` (q, n), `delta` (q,).
    pub fn with_spectrum(mut self, u: Tensor, v: Tensor, delta: &Var) -> Self {
        let delta = delta.as_tensor().clone();
        self.spectrum = Some(Spectrum { u, v, delta });
        self
    }

    #[cfg(test)]
    pub fn with_delta_tensor(weight: Tensor, u: Tensor, v: Tensor, delta: Tensor) -> Self {
        Self {
            weight,
            bias: None,
            spectrum: Some(Spectrum { u, v, delta }),
        }
    }

    /// The trainable tensor, if the layer has one.
    pub fn delta(&self) -> Option<&Tensor> {
        self.spectrum.as_ref().map(|s| &s.delta)
    }

    /// The layer with its gradient.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.apply(&x.detach())?;
        let (layer, input, wants_x) = (self.clone(), x.detach(), x.track_op());
        match self.delta() {
            Some(delta) => attach(&[x, delta], y, move |g| {
                let (dx, d_delta) = layer.pull(&input, g, wants_x)?;
                Ok(vec![dx, d_delta])
            }),
            None => attach(&[x], y, move |g| {
                Ok(vec![layer.pull(&input, g, wants_x)?.0])
            }),
        }
    }

    /// The layer without a gradient.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = times_transposed(x, &self.weight)?;
        let y = match &self.spectrum {
            None => y,
            Some(s) => {
                let delta = s.delta.detach().to_dtype(x.dtype())?;
                let turned = times_transposed(x, &s.v)?.broadcast_mul(&delta)?;
                (y + times(&turned, &s.u)?)?
            }
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    /// (dL/dx, dL/dδ) from dL/dy; dL/dx only where it is wanted.
    pub fn pull(
        &self,
        x: &Tensor,
        g: &Tensor,
        wants_x: bool,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let through_u = match &self.spectrum {
            Some(s) => Some((s, times_transposed(g, &s.u)?)),
            None => None,
        };
        let d_delta = match &through_u {
            Some((s, gu)) => {
                let xv = times_transposed(x, &s.v)?;
                let products = rows(&(xv * gu)?)?.to_dtype(s.delta.dtype())?;
                Some(products.sum(0)?)
            }
            None => None,
        };
        if !wants_x {
            return Ok((None, d_delta));
        }
        let mut dx = times(g, &self.weight)?;
        if let Some((s, gu)) = through_u {
            let delta = s.delta.detach().to_dtype(g.dtype())?;
            dx = (dx + times(&gu.broadcast_mul(&delta)?, &s.v)?)?;
        }
        Ok((Some(dx), d_delta))
    }

    /// The layer as a language model's head: Σ over rows of −log softmax at the row's target, without ever holding
    /// all logits.
    ///
    /// `x (rows, n), targets (rows,) u32 → (1,)`. Gradients of x and of Δσ are formed in the forward pass, chunk
    /// by chunk, while the logits are there.
    pub fn cross_entropy(&self, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let total = x.dim(0)?;
        let delta = self.delta();
        let (wants_x, wants_delta) = (x.track_op(), delta.is_some_and(Tensor::track_op));
        let mut loss = 0f64;
        let mut dx = Vec::new();
        let mut d_delta: Option<Tensor> = None;
        for start in (0..total).step_by(CHUNK_ROWS) {
            let n = CHUNK_ROWS.min(total - start);
            let chunk = x.detach().narrow(0, start, n)?.contiguous()?;
            let wanted = targets.narrow(0, start, n)?.unsqueeze(1)?.contiguous()?;
            let logits = self.apply(&chunk)?.to_dtype(DType::F32)?;
            let ids = wanted.flatten_all()?.to_vec1::<u32>()?;
            let (sum, d_logits) = match fused::cross_entropy(&logits, &ids)? {
                Some(sum) => (sum, logits),
                None => composed_cross_entropy(&logits, &wanted)?,
            };
            loss += sum;
            if wants_x || wants_delta {
                let d_logits = d_logits.to_dtype(chunk.dtype())?;
                let (chunk_dx, chunk_delta) = self.pull(&chunk, &d_logits, wants_x)?;
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
}

/// Rows of logits that are alive at once in [`Linear::cross_entropy`].
const CHUNK_ROWS: usize = 256;

/// Σ −log softmax(logits) at `wanted (rows, 1)`, and its gradient, from tensor operations.
fn composed_cross_entropy(logits: &Tensor, wanted: &Tensor) -> Result<(f64, Tensor)> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    let exponentials = shifted.exp()?;
    let sums = exponentials.sum_keepdim(1)?;
    let losses = (sums.log()? - shifted.gather(wanted, 1)?)?;
    let loss = losses.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    let minus_one = (wanted.zeros_like()?.to_dtype(DType::F32)? - 1.0)?;
    let gradient = exponentials
        .broadcast_div(&sums)?
        .scatter_add(wanted, &minus_one, 1)?;
    Ok((loss, gradient))
}

/// Root mean square norm with a weight that may be trained.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    eps: f64,
}

impl Norm {
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // a trained norm is kept in f32 beside a model in 16 bits
        let weight = if self.weight.dtype() == x.dtype() {
            self.weight.clone()
        } else {
            self.weight.to_dtype(x.dtype())?
        };
        rms_norm(x, &weight, self.eps)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::tests::{assert_gradient, random};
    use super::*;
    use candle_core::Device;

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
            head.cross_entropy(&t[0], &targets)
        };
        // the loss comes back in f32
        assert_gradient(&inputs, loss, 1e-2, 1e-3);
    }
}
