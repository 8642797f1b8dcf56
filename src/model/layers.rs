//! The layers that own weights: a linear one whose singular values may move, and a norm.

use candle_core::{Result, Tensor, Var};

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
