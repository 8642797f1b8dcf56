//! The gradients of everything that moves, from whole activations or from each block's computed again.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Result as CandleResult, Tensor, Var};

use super::decoder::Decoder;
use super::segments::Segments;
use super::vjp::attach;
use crate::error::Result;

/// What a backward pass gives.
pub struct Gradients {
    /// Mean next-token loss, in nats.
    pub loss: f32,
    /// Of that mean, by variable; nothing where the loss is not a number.
    pub tensors: BTreeMap<String, Tensor>,
}

impl Decoder {
    /// The mean loss of windows of equal length, `ids (b, t)`, and its gradients.
    ///
    /// With `recompute`, only what each block reads is kept in the forward pass, and the rest of a block is computed again
    /// when its gradients are due: the same gradients, to the bit, from far fewer activations (Chen et al. 2016).
    pub fn gradients(&self, ids: &Tensor, recompute: bool) -> Result<Gradients> {
        if recompute {
            return Ok(self.recomputed(ids)?);
        }
        let (sum, predicted) = self.loss(ids)?;
        let mean = (sum / predicted as f64)?;
        let mut found = Gradients::of(&mean)?;
        if found.loss.is_finite() {
            found.take(self, mean.backward()?)?;
        }
        Ok(found)
    }

    fn recomputed(&self, ids: &Tensor) -> CandleResult<Gradients> {
        let (b, t) = ids.dims2()?;
        let segments = Segments::whole(b, t);
        let pass = self.pass(ids, &segments)?;
        let embedded = self.embed(ids)?;
        let mut read = vec![embedded.detach()];
        for at in 0..self.blocks() {
            let y = self.block(at, &read[at], &pass)?.detach();
            read.push(y);
        }
        let mut next = || Var::from_tensor(&read.pop().expect("one for each block and the head"));
        let top = next()?;
        let (sum, predicted) = self.loss_from_blocks(&top, ids, &segments)?;
        let mean = (sum / predicted as f64)?;
        let mut found = Gradients::of(&mean)?;
        if !found.loss.is_finite() {
            return Ok(found);
        }
        let mut gradients = mean.backward()?;
        drop(mean);
        let mut due = gradients.remove(&top);
        found.take(self, gradients)?;
        for at in (0..self.blocks()).rev() {
            let x = next()?;
            // nothing before the first block wants its gradient unless the embedding moves
            let wanted = at > 0 || embedded.track_op();
            let input = if wanted {
                x.as_tensor().clone()
            } else {
                x.as_detached_tensor()
            };
            let y = self.block(at, &input, &pass)?;
            let mut gradients = backward_from(&y, due.take())?;
            due = gradients.remove(&x);
            found.take(self, gradients)?;
        }
        if embedded.track_op() {
            found.take(self, backward_from(&embedded, due)?)?;
        }
        Ok(found)
    }
}

impl Gradients {
    fn of(mean: &Tensor) -> CandleResult<Self> {
        Ok(Self {
            loss: mean.flatten_all()?.to_vec1::<f32>()?[0],
            tensors: BTreeMap::new(),
        })
    }

    /// Adds the gradients of variables.
    fn take(&mut self, decoder: &Decoder, mut gradients: GradStore) -> CandleResult<()> {
        for (name, variable) in &decoder.variables {
            if let Some(gradient) = gradients.remove(variable) {
                let gradient = match self.tensors.remove(name) {
                    Some(sum) => (sum + gradient)?,
                    None => gradient,
                };
                self.tensors.insert(name.clone(), gradient.detach());
            }
        }
        Ok(())
    }
}

/// The backward pass from a tensor whose own gradient is known.
fn backward_from(y: &Tensor, gradient: Option<Tensor>) -> CandleResult<GradStore> {
    let end = Tensor::zeros(1, y.dtype(), y.device())?;
    attach(&[y], end, move |_| Ok(vec![gradient.clone()]))?.backward()
}
