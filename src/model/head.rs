//! The head: logits of the last hidden states, and their loss chunk by chunk.

use candle_core::{DType, Device, Result, Tensor};

use super::linear::Linear;
use super::ops::capped;
use super::tape::tracked;
use super::{fused, gpu};

/// What makes logits of the last hidden states: `cap·tanh(linear(x) / divisor / cap)`, the cap where there is one.
#[derive(Debug, Clone)]
pub struct Head {
    pub linear: Linear,
    pub divisor: f64,
    pub cap: Option<f64>,
}

/// A loss, the end of a computation, and its gradients with respect to what it was made of and is tracked.
pub struct Loss {
    /// (1,)
    pub value: Tensor,
    pub gradients: Vec<(Tensor, Tensor)>,
}

impl Head {
    /// `x (…, n) → (…, vocabulary)` in f32, without a gradient.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.bent(&self.linear.apply(x)?.0)?.0)
    }

    /// A factor times Σ over rows of −log softmax at the row's target, without ever holding all logits.
    ///
    /// `x (rows, n), targets (rows,) u32`. Gradients are formed in the forward pass, chunk by chunk, while the logits are
    /// there.
    pub fn cross_entropy(&self, x: &Tensor, targets: &Tensor, factor: f64) -> Result<Loss> {
        let total = x.dim(0)?;
        let inputs = self.linear.inputs(x);
        let wanted: Vec<bool> = inputs.iter().map(|input| tracked(input)).collect();
        let mut losses = Vec::new();
        let mut dx = Vec::new();
        // of what is trained in the layer: sums over the chunks
        let mut sums: Vec<Option<Tensor>> = vec![None; inputs.len()];
        let most = chunk_rows(x.device().is_cuda(), self.is_straight());
        for start in (0..total).step_by(most) {
            let n = most.min(total - start);
            let chunk = x.detach().narrow(0, start, n)?.contiguous()?;
            let target = targets.narrow(0, start, n)?.unsqueeze(1)?.contiguous()?;
            let (y, read) = self.linear.apply(&chunk)?;
            let (sum, d_linear) = self.loss_and_gradient(y, &target, factor)?;
            losses.push(sum);
            if !wanted.contains(&true) {
                continue;
            }
            let gradients = self.linear.pull(&chunk, &read, &d_linear, wanted[0])?;
            for (at, gradient) in gradients.into_iter().enumerate() {
                match (gradient, &mut sums[at]) {
                    (None, _) => {}
                    (Some(gradient), _) if at == 0 => dx.push(gradient),
                    (Some(gradient), Some(sum)) => *sum = (&*sum + gradient)?,
                    (Some(gradient), sum) => *sum = Some(gradient),
                }
            }
        }
        if wanted[0] {
            sums[0] = Some(Tensor::cat(&dx, 0)?);
        }
        let found = inputs.into_iter().zip(sums);
        Ok(Loss {
            value: Losses::total(losses, factor, x.device())?,
            gradients: found
                .filter_map(|(input, gradient)| Some((input.clone(), gradient?)))
                .collect(),
        })
    }

    /// The losses of what the layer gave, and the gradient of a factor times their sum, in its place where that goes.
    fn loss_and_gradient(
        &self,
        y: Tensor,
        targets: &Tensor,
        factor: f64,
    ) -> Result<(Losses, Tensor)> {
        if self.is_straight()
            && let Some(each) = gpu::cross_entropy(&y, targets, factor)?
        {
            return Ok((Losses::Each(each), y));
        }
        let dtype = y.dtype();
        let (logits, slope) = self.bent(&y)?;
        drop(y);
        let factor = factor / self.divisor;
        let (sum, gradient) = if let Some(sum) = fused::cross_entropy(&logits, targets, factor)? {
            (Losses::Sum(sum), logits)
        } else if let Some(each) = gpu::cross_entropy(&logits, targets, factor)? {
            (Losses::Each(each), logits)
        } else {
            let (sum, gradient) = composed_cross_entropy(&logits, targets)?;
            (Losses::Sum(sum), (gradient * factor)?)
        };
        let gradient = match slope {
            Some(slope) => (gradient * slope)?,
            None => gradient,
        };
        Ok((sum, gradient.to_dtype(dtype)?))
    }

    /// Logits in f32 of what the layer gave, and the slope of the cap.
    fn bent(&self, y: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let logits = y.to_dtype(DType::F32)?;
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

    /// Whether logits are what the layer gives.
    fn is_straight(&self) -> bool {
        self.cap.is_none() && self.divisor == 1.0
    }
}

/// Losses of rows, where they were computed: a GPU is not asked for them before it has all its work.
enum Losses {
    Sum(f64),
    Each(Tensor),
}

impl Losses {
    /// factor·Σ, (1,)
    fn total(all: Vec<Self>, factor: f64, device: &Device) -> Result<Tensor> {
        let mut sum = 0.0;
        let mut each = Vec::new();
        for losses in all {
            match losses {
                Self::Sum(of_rows) => sum += of_rows,
                Self::Each(of_rows) => each.push(of_rows),
            }
        }
        match each.is_empty() {
            true => Tensor::new(&[(factor * sum) as f32], device),
            false => Tensor::cat(&each, 0)?.sum_keepdim(0)? * factor,
        }
    }
}

/// Rows of logits that are alive at once in [`Head::cross_entropy`].
///
/// A GPU wants many; where the logits are bent, some of them in f32.
pub fn chunk_rows(on_gpu: bool, is_straight: bool) -> usize {
    match (on_gpu, is_straight) {
        (true, true) => 16 * CHUNK_ROWS,
        (true, false) => 4 * CHUNK_ROWS,
        (false, _) => CHUNK_ROWS,
    }
}

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

#[cfg(test)]
mod tests {
    use super::super::ops::tests::{assert_gradient, random};
    use super::super::tape::attach;
    use super::super::update::Update;
    use super::*;

    #[test]
    fn cross_entropy_gradient_reaches_input_update_and_weight_across_chunks() {
        let n = CHUNK_ROWS + 37;
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % 11).collect();
        let targets = Tensor::from_vec(targets, n, &Device::Cpu).expect("targets");
        let [u, v] = [11, 6].map(|side| random(&[3, side], DType::F64).as_detached_tensor());
        let update = |delta: &Tensor| Update::Diagonal {
            u: u.clone(),
            v: v.clone(),
            delta: vec![delta.clone()],
            scale: None,
        };
        let inputs = [
            random(&[n, 6], DType::F64),
            random(&[3], DType::F64),
            random(&[11, 6], DType::F64),
        ];
        for (divisor, cap) in [(1.0, None), (1.7, None), (1.0, Some(2.0)), (0.6, Some(3.0))] {
            let loss = |t: &[Tensor]| {
                let head = Head {
                    linear: Linear::new(t[2].clone(), None, vec![update(&t[1])]),
                    divisor,
                    cap,
                };
                let Loss { value, gradients } = head.cross_entropy(&t[0], &targets, 0.3)?;
                let (inputs, gradients): (Vec<_>, Vec<_>) = gradients.into_iter().unzip();
                let inputs: Vec<&Tensor> = inputs.iter().collect();
                attach(&inputs, value, move |g| {
                    let g = f64::from(g.to_vec1::<f32>()?[0]);
                    gradients.into_iter().map(|t| Ok(Some((t * g)?))).collect()
                })
            };
            // the loss comes back in f32, and bends: a wider step errs by more than its rounding
            assert_gradient(&inputs, loss, 4e-3, 1e-3);
        }
    }
}
