//! The gradients of everything that moves.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::decoder::Decoder;
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
    pub fn gradients(&self, ids: &Tensor) -> Result<Gradients> {
        let (sum, predicted) = self.loss(ids)?;
        let mean = (&sum / predicted as f64)?;
        let loss = mean.flatten_all()?.to_vec1::<f32>()?[0];
        let mut tensors = BTreeMap::new();
        if loss.is_finite() {
            let mut found = mean.backward()?;
            for (name, variable) in &self.variables {
                if let Some(gradient) = found.remove(variable) {
                    tensors.insert(name.clone(), gradient.detach());
                }
            }
        }
        Ok(Gradients { loss, tensors })
    }
}
