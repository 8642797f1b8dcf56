//! The gradients of everything that moves, from whole activations or from each block's computed again.

use std::collections::BTreeMap;

use candle_core::{DType, Result as CandleResult, Tensor};

use super::decoder::Decoder;
use super::segments::Segments;
use super::tape::{self, record};
use crate::error::Result;

/// What a backward pass gives.
#[derive(Default)]
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
        let (b, t) = ids.dims2()?;
        self.gradients_of(ids, &Segments::whole(b, t), recompute)
    }

    /// The same of rows that hold several sequences, or padding.
    pub fn gradients_of(
        &self,
        ids: &Tensor,
        segments: &Segments,
        recompute: bool,
    ) -> Result<Gradients> {
        match recompute {
            true => Ok(self.recomputed(ids, segments)?),
            false => Ok(self.kept(ids, segments)?),
        }
    }

    fn kept(&self, ids: &Tensor, segments: &Segments) -> CandleResult<Gradients> {
        let (loss, tape) = record(&[], || {
            let pass = self.pass(ids, segments)?;
            let mut x = self.embed(ids)?;
            for at in 0..self.blocks() {
                x = self.block(at, &x, &pass)?;
            }
            self.mean_loss(&x, ids, segments)
        })?;
        // the loss is read when a GPU has all of its work
        let mut gradients = tape.back_from(loss.gradients)?;
        let mut found = Gradients::of(&loss.value)?;
        if found.loss.is_finite() {
            found.take(self, &mut gradients)?;
        }
        Ok(found)
    }

    fn recomputed(&self, ids: &Tensor, segments: &Segments) -> CandleResult<Gradients> {
        let pass = self.pass(ids, segments)?;
        let (embedded, embedding) = record(&[], || self.embed(ids))?;
        let mut read = vec![embedded.clone()];
        for at in 0..self.blocks() {
            read.push(self.block(at, &read[at], &pass)?);
        }
        let mut next = || read.pop().expect("one for each block and the head");
        let top = next();
        let (loss, tape) = record(&[&top], || self.mean_loss(&top, ids, segments))?;
        let mut found = Gradients::of(&loss.value)?;
        if !found.loss.is_finite() {
            return Ok(found);
        }
        let mut gradients = tape.back_from(loss.gradients)?;
        let mut due = gradients.take(&top);
        drop(top);
        found.take(self, &mut gradients)?;
        for at in (0..self.blocks()).rev() {
            let x = next();
            // nothing before the first block wants its gradient unless the embedding moves
            let wanted = at > 0 || !embedding.is_empty();
            let leaves: &[&Tensor] = if wanted { &[&x] } else { &[] };
            let (y, tape) = record(leaves, || self.block(at, &x, &pass))?;
            let Some(gradient) = due.take() else { break };
            let mut gradients = tape.back(&y, gradient)?;
            due = gradients.take(&x);
            found.take(self, &mut gradients)?;
        }
        if let Some(gradient) = due {
            found.take(self, &mut embedding.back(&embedded, gradient)?)?;
        }
        Ok(found)
    }
}

impl Gradients {
    /// Adds this share of others.
    pub fn add(&mut self, others: Self, share: f64) -> Result<()> {
        self.loss += (share * f64::from(others.loss)) as f32;
        for (name, tensor) in others.tensors {
            let tensor = (tensor.to_dtype(DType::F32)? * share)?;
            let sum = match self.tensors.remove(&name) {
                Some(sum) => (sum + tensor)?,
                None => tensor,
            };
            self.tensors.insert(name, sum);
        }
        Ok(())
    }

    fn of(mean: &Tensor) -> CandleResult<Self> {
        Ok(Self {
            loss: mean.flatten_all()?.to_vec1::<f32>()?[0],
            tensors: BTreeMap::new(),
        })
    }

    /// Adds the gradients of variables.
    fn take(&mut self, decoder: &Decoder, gradients: &mut tape::Gradients) -> CandleResult<()> {
        for (name, variable) in &decoder.variables {
            if let Some(gradient) = gradients.take(variable) {
                let gradient = match self.tensors.remove(name) {
                    Some(sum) => (sum + gradient)?,
                    None => gradient,
                };
                self.tensors.insert(name.clone(), gradient);
            }
        }
        Ok(())
    }
}
