//! The layers that own weights: a linear one whose singular values may move, and a norm.

use candle_core::{DType, Result, Tensor, Var};

use super::fused;
use super::ops::{capped, layer_norm, rms_norm, rows, times, times_transposed};
use super::vjp::attach;

/// A linear layer whose singular values are trainable: `y = x·Mᵀ + ((x·vᵀ) ∘ δ)·u + b`.
///
/// `x (…, n) → y (…, m)`. For `delta` no m × n gradient is ever formed: `∂L/∂δᵢ = Σ_t (x_t·vᵢ)(dy_t·uᵢ)`. Only a
/// weight that is a variable itself, the trained embedding that a head is tied to, gets one.
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

    /// What receives gradients, in the order of [`Self::pull`].
    fn inputs<'a>(&'a self, x: &'a Tensor) -> Vec<&'a Tensor> {
        let weight = Some(&self.weight).filter(|w| w.track_op());
        [Some(x), self.delta(), weight]
            .into_iter()
            .flatten()
            .collect()
    }

    /// The layer with its gradient.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.apply(&x.detach())?;
        let (layer, input, wants_x) = (self.clone(), x.detach(), x.track_op());
        attach(&self.inputs(x), y, move |g| layer.pull(&input, g, wants_x))
    }

    /// The weight for an input, without its graph; one that is trained is kept in f32 beside a model in 16 bits.
    fn weight(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.detach().to_dtype(x.dtype())
    }

    /// The layer without a gradient.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = times_transposed(x, &self.weight(x)?)?;
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

    /// dL/dx, dL/dδ and dL/dM from dL/dy: the first where it is wanted, the others where the layer has them to train.
    fn pull(&self, x: &Tensor, g: &Tensor, wants_x: bool) -> Result<Vec<Option<Tensor>>> {
        let through_u = match &self.spectrum {
            Some(s) => Some((s, times_transposed(g, &s.u)?)),
            None => None,
        };
        let mut gradients = vec![None];
        if let Some((s, gu)) = &through_u {
            let xv = times_transposed(x, &s.v)?;
            let products = rows(&(xv * gu)?)?.to_dtype(s.delta.dtype())?;
            gradients.push(Some(products.sum(0)?));
        }
        if self.weight.track_op() {
            let product = rows(g)?.t()?.matmul(&rows(x)?)?;
            gradients.push(Some(product.to_dtype(self.weight.dtype())?));
        }
        if wants_x {
            let mut dx = times(g, &self.weight(g)?)?;
            if let Some((s, gu)) = through_u {
                let delta = s.delta.detach().to_dtype(g.dtype())?;
                dx = (dx + times(&gu.broadcast_mul(&delta)?, &s.v)?)?;
            }
            gradients[0] = Some(dx);
        }
        Ok(gradients)
    }
}

/// What makes logits of the last hidden states: `cap·tanh(linear(x) / divisor / cap)`, the cap where there is one.
#[derive(Debug, Clone)]
pub struct Head {
    pub linear: Linear,
    pub divisor: f64,
    pub cap: Option<f64>,
}

impl Head {
    /// Logits without a gradient, and the slope of the cap.
    fn apply(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let logits = self.linear.apply(x)?.to_dtype(DType::F32)?;
        let logits = if self.divisor == 1.0 {
            logits
        } else {
            (logits / self.divisor)?
        };
        match self.cap {
            None => Ok((logits, None)),
            Some(cap) => {
                let (logits, slope) = capped(&logits, cap)?;
                Ok((logits, Some(slope)))
            }
        }
    }

    /// `x (…, n) → (…, vocabulary)` in f32, without a gradient.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.apply(x)?.0)
    }

    /// Σ over rows of −log softmax at the row's target, without ever holding all logits.
    ///
    /// `x (rows, n), targets (rows,) u32 → (1,)`. Gradients are formed in the forward pass, chunk by chunk, while the
    /// logits are there.
    pub fn cross_entropy(&self, x: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let total = x.dim(0)?;
        let inputs = self.linear.inputs(x);
        let wanted: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
        let mut loss = 0f64;
        let mut dx = Vec::new();
        // of what is trained in the layer: sums over the chunks
        let mut sums: Vec<Option<Tensor>> = vec![None; inputs.len()];
        for start in (0..total).step_by(CHUNK_ROWS) {
            let n = CHUNK_ROWS.min(total - start);
            let chunk = x.detach().narrow(0, start, n)?.contiguous()?;
            let target = targets.narrow(0, start, n)?.unsqueeze(1)?.contiguous()?;
            let (logits, slope) = self.apply(&chunk)?;
            let ids = target.flatten_all()?.to_vec1::<u32>()?;
            let (sum, d_logits) = match fused::cross_entropy(&logits, &ids)? {
                Some(sum) => (sum, logits),
                None => composed_cross_entropy(&logits, &target)?,
            };
            loss += sum;
            if !wanted.contains(&true) {
                continue;
            }
            let d_logits = match slope {
                Some(slope) => (d_logits * slope)?,
                None => d_logits,
            };
            let d_linear = if self.divisor == 1.0 {
                d_logits
            } else {
                (d_logits / self.divisor)?
            };
            let d_linear = d_linear.to_dtype(chunk.dtype())?;
            let gradients = self.linear.pull(&chunk, &d_linear, wanted[0])?;
            for (at, gradient) in gradients.into_iter().enumerate() {
                match (gradient, &mut sums[at]) {
                    (None, _) => {}
                    (Some(gradient), _) if at == 0 => dx.push(gradient),
                    (Some(gradient), Some(sum)) => *sum = (&*sum + gradient)?,
                    (Some(gradient), sum) => *sum = Some(gradient),
                }
            }
        }
        let loss = Tensor::new(&[loss as f32], x.device())?;
        if wanted[0] {
            sums[0] = Some(Tensor::cat(&dx, 0)?);
        }
        attach(&inputs, loss, move |g| {
            let scaled = |gradient: &Option<Tensor>| -> Result<Option<Tensor>> {
                gradient
                    .as_ref()
                    .map(|t| t.broadcast_mul(&g.to_dtype(t.dtype())?))
                    .transpose()
            };
            sums.iter().map(scaled).collect()
        })
    }
}

/// Rows of logits that are alive at once in [`Head::cross_entropy`].
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

/// A norm with a weight that may be trained.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    eps: f64,
    /// Added to the weight: 1 where a checkpoint stores the distance from one.
    offset: f64,
    /// Of a layer norm; without one it is by the root mean square.
    bias: Option<Tensor>,
}

impl Norm {
    pub fn root_mean_square(weight: Tensor, eps: f64, offset: f64) -> Self {
        Self {
            weight,
            eps,
            offset,
            bias: None,
        }
    }

    pub fn layer(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self {
            weight,
            eps,
            offset: 0.0,
            bias: Some(bias),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.offset != 0.0 {
            // a small distance from one would be lost in 16 bits
            let wide = |t: &Tensor| match t.dtype() {
                DType::F16 | DType::BF16 => t.to_dtype(DType::F32),
                _ => Ok(t.clone()),
            };
            let weight = (wide(&self.weight)? + self.offset)?;
            return rms_norm(&wide(x)?, &weight, self.eps)?.to_dtype(x.dtype());
        }
        // a trained norm is kept in f32 beside a model in 16 bits
        let weight = self.weight.to_dtype(x.dtype())?;
        match &self.bias {
            Some(bias) => layer_norm(x, &weight, bias, self.eps),
            None => rms_norm(x, &weight, self.eps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::tests::{assert_gradient, random};
    use super::*;
    use candle_core::Device;

    #[test]
    fn cross_entropy_gradient_reaches_input_delta_and_weight_across_chunks() {
        let n = CHUNK_ROWS + 37;
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % 11).collect();
        let targets = Tensor::from_vec(targets, n, &Device::Cpu).expect("targets");
        let (u, v) = (random(&[3, 11], DType::F64), random(&[3, 6], DType::F64));
        let inputs = [
            random(&[n, 6], DType::F64),
            random(&[3], DType::F64),
            random(&[11, 6], DType::F64),
        ];
        for (divisor, cap) in [(1.0, None), (1.7, None), (1.0, Some(2.0)), (0.6, Some(3.0))] {
            let loss = |t: &[Tensor]| {
                let linear = Linear::with_delta_tensor(
                    t[2].clone(),
                    u.as_detached_tensor(),
                    v.as_detached_tensor(),
                    t[1].clone(),
                );
                let head = Head {
                    linear,
                    divisor,
                    cap,
                };
                head.cross_entropy(&t[0], &targets)
            };
            // the loss comes back in f32
            assert_gradient(&inputs, loss, 1e-2, 1e-3);
        }
    }

    #[test]
    fn linear_gradient_reaches_input_delta_and_weight() {
        let (u, v) = (random(&[3, 5], DType::F64), random(&[3, 7], DType::F64));
        let inputs = [
            random(&[2, 4, 7], DType::F64),
            random(&[3], DType::F64),
            random(&[5, 7], DType::F64),
        ];
        let f = |t: &[Tensor]| {
            let (u, v) = (u.as_detached_tensor(), v.as_detached_tensor());
            Linear::with_delta_tensor(t[2].clone(), u, v, t[1].clone()).forward(&t[0])
        };
        assert_gradient(&inputs, f, 1e-5, 1e-6);
    }

    #[test]
    fn norm_gradient_with_and_without_an_offset() {
        for offset in [0.0, 1.0] {
            let inputs = [random(&[3, 5, 8], DType::F32), random(&[8], DType::F32)];
            let f =
                |t: &[Tensor]| Norm::root_mean_square(t[1].clone(), 1e-5, offset).forward(&t[0]);
            assert_gradient(&inputs, f, 1e-2, 1e-2);
        }
    }
}
