//! Steps: the gradient of each batch, and what it moves.

use std::sync::Arc;

use candle_core::{DType, Tensor, Var};

use super::Options;
use super::optimizer::{AdamW, Moments};
use crate::error::{Error, Result};
use crate::model::{Decoder, Gradients, Method, gpu, stacked};
use crate::parallel::{Group, share};
use crate::text::{Window, segments};

/// A training run between two steps.
pub struct Run<'a> {
    pub decoder: &'a Decoder,
    /// What the decoder was loaded to train.
    pub method: Method,
    /// As in [`Options::recompute`].
    pub recompute: bool,
    /// As in [`Options::micro_batch`].
    pub micro_batch: Option<usize>,
    pub optimizer: AdamW,
    /// One for each step done.
    pub losses: Vec<f32>,
    /// That these steps took, in all runs of them.
    pub seconds: f64,
    /// Those that share each step.
    pub group: Arc<dyn Group>,
    /// What the last checked step had only zeros for: weights of zeros around it let no gradient through.
    pub silent: Vec<String>,
}

/// Process 0 tells the others by this instead of a number of steps that the run ended before.
pub(super) const NOTHING_TO_DO: f32 = -1.0;

/// Numbers whose gradients are fetched, added up between processes and applied together: Σ of a whole model is one bundle,
/// and of what is larger little more than one tensor is alive.
const BUNDLE: usize = 4 << 20;

impl<'a> Run<'a> {
    /// A run that has not begun.
    pub fn new(decoder: &'a Decoder, options: &Options) -> Self {
        Self {
            decoder,
            method: options.method,
            recompute: options.recompute,
            micro_batch: options.micro_batch,
            optimizer: AdamW::new(options.weight_decay),
            losses: Vec::new(),
            seconds: 0.0,
            group: options.group.clone(),
            silent: Vec::new(),
        }
    }

    /// Refuses what the last update made of the numbers if f32 does not hold it: no loss tells of that any more.
    pub(super) fn refuse_overflown(&self) -> Result<()> {
        for (name, variable) in &self.decoder.variables {
            let values = numbers(variable)?;
            if let Some(&value) = values.iter().find(|x| !x.is_finite()) {
                let name = name.clone();
                return Err(Error::Overflown { name, value });
            }
        }
        Ok(())
    }

    /// What moves, in bundles.
    pub(super) fn bundles(&self) -> Vec<Vec<(&'a str, &'a Var)>> {
        let mut bundles: Vec<Vec<(&str, &Var)>> = Vec::new();
        let mut numbers = 0;
        for (name, variable) in &self.decoder.variables {
            let count = variable.elem_count();
            match bundles.last_mut().filter(|_| numbers + count <= BUNDLE) {
                Some(bundle) => bundle.push((name, variable)),
                None => {
                    numbers = 0;
                    bundles.push(vec![(name, variable)]);
                }
            }
            numbers += count;
        }
        bundles
    }

    /// Gives all processes the state of process 0, which may have resumed an earlier run; says whether there is anything to
    /// do.
    pub(super) fn agree(&mut self) -> Result<bool> {
        let group = self.group.clone();
        if group.size() == 1 {
            return Ok(true);
        }
        // whole numbers up to 2²⁴ are exact
        let mut done = [self.losses.len() as f32];
        group.spread(&mut done)?;
        if done == [NOTHING_TO_DO] {
            return Ok(false);
        }
        self.losses.resize(done[0] as usize, 0.0);
        group.spread(&mut self.losses)?;
        self.optimizer.steps = self.losses.len() as u32;
        for (name, variable) in &self.decoder.variables {
            let mut values = numbers(variable)?;
            group.spread(&mut values)?;
            let nothing = || vec![0.0; values.len()];
            let state = &mut self.optimizer.state;
            let moments = state.entry(name.clone()).or_insert_with(|| Moments {
                first: nothing(),
                second: nothing(),
            });
            group.spread(&mut moments.first)?;
            group.spread(&mut moments.second)?;
            set(variable, values)?;
        }
        Ok(true)
    }

    /// One step on windows of equal length, of which this process takes its share. Returns the mean loss of all before the
    /// update.
    ///
    /// `check` refuses tensors that no gradient reaches, and notes those that only zeros do.
    pub fn step(&mut self, batch: &[Window], learning_rate: f64, check: bool) -> Result<f32> {
        let group = self.group.clone();
        let mine = share(batch, &*group)?;
        let Gradients { loss, mut tensors } = self.gradients(mine)?;
        let all = group.size() as f32;
        // the mean is of all tokens: a process with more of them weighs more than the others
        let weight = predicted(mine) as f32 * all / predicted(batch) as f32;
        let mut losses = [loss * weight];
        group.sum(&mut losses)?;
        let loss = losses[0] / all;
        let step = self.losses.len() + 1;
        if !loss.is_finite() {
            return Err(Error::Diverged { step, loss });
        }
        let unreached = self.decoder.variables.keys();
        let unreached = unreached.filter(|name| check && !tensors.contains_key(*name));
        let dead: Vec<String> = unreached.cloned().collect();
        // the run ends with this: nothing of the step is kept
        if !dead.is_empty() {
            return Err(Error::DeadGradient { dead });
        }
        let mut silent = Vec::new();
        self.optimizer.begin_step();
        for bundle in self.bundles() {
            // freed one by one: where whole weights move, all of them are a second model
            let gradients = bundle
                .iter()
                .map(|(name, variable)| match tensors.remove(*name) {
                    Some(gradient) => gradient.to_dtype(DType::F32)?.flatten_all()?.contiguous(),
                    None => Tensor::zeros(variable.elem_count(), DType::F32, variable.device()),
                });
            let gradients = gradients.collect::<candle_core::Result<Vec<_>>>()?;
            let mut there = match gpu::gather(&gradients)? {
                Some(there) => there,
                None => Tensor::cat(&gradients, 0)?,
            };
            drop(gradients);
            // of a GPU one number comes here instead of all, if nothing more is asked of them
            let stays = there.device().is_cuda() && !check && group.size() == 1;
            if stays && all_finite(&there)? && self.update_there(&bundle, &there, learning_rate)? {
                continue;
            }
            let mut gradient = there.to_vec1::<f32>()?;
            if group.size() > 1 {
                if weight != 1.0 {
                    gradient.iter_mut().for_each(|g| *g *= weight);
                }
                group.sum(&mut gradient)?;
                gradient.iter_mut().for_each(|g| *g /= all);
                there = Tensor::new(gradient.as_slice(), there.device())?;
            }
            let mut left = &gradient[..];
            for (name, variable) in &bundle {
                let (gradient, rest) = left.split_at(variable.elem_count());
                left = rest;
                if let Some(&value) = gradient.iter().find(|g| !g.is_finite()) {
                    return Err(Error::BrokenGradient {
                        tensor: (*name).into(),
                        step,
                        value,
                    });
                }
                let still = step == 1 && self.method.begins_still(name);
                if check && !still && gradient.iter().all(|&g| g == 0.0) {
                    silent.push((*name).into());
                }
            }
            if !self.update_there(&bundle, &there, learning_rate)? {
                self.update_here(&bundle, &gradient, learning_rate)?;
            }
        }
        if check {
            self.silent = silent;
        }
        self.losses.push(loss);
        Ok(loss)
    }

    /// The mean loss of windows and its gradients, of as many at a time as were asked for.
    fn gradients(&self, windows: &[Window]) -> Result<Gradients> {
        let mut sum = Gradients::default();
        for part in windows.chunks(self.micro_batch.unwrap_or(windows.len())) {
            let rows: Vec<&[u32]> = part.iter().map(|window| window.ids).collect();
            let ids = stacked(&rows, &self.decoder.device)?;
            let found = (self.decoder).gradients_of(&ids, &segments(part), self.recompute)?;
            if part.len() == windows.len() {
                return Ok(found);
            }
            // the mean is of all tokens
            sum.add(found, predicted(part) as f64 / predicted(windows) as f64)?;
            if !sum.loss.is_finite() {
                break;
            }
        }
        Ok(sum)
    }

    /// Moves a bundle by its gradient where both lie, if that is on a GPU; says whether it did.
    fn update_there(
        &mut self,
        bundle: &[(&str, &Var)],
        gradient: &Tensor,
        learning_rate: f64,
    ) -> Result<bool> {
        if !gradient.device().is_cuda() {
            return Ok(false);
        }
        let values = bundle.iter().map(|(_, variable)| variable.flatten_all());
        let values = values.collect::<candle_core::Result<Vec<_>>>()?;
        let optimizer = &mut self.optimizer;
        Ok(optimizer.update_there(&counts(bundle), &values, gradient, learning_rate)?)
    }

    /// Moves a bundle by its gradient in this process's memory.
    fn update_here(
        &mut self,
        bundle: &[(&str, &Var)],
        gradient: &[f32],
        learning_rate: f64,
    ) -> Result<()> {
        let mut left = gradient;
        for (name, variable) in bundle {
            let (gradient, rest) = left.split_at(variable.elem_count());
            left = rest;
            let mut values = numbers(variable)?;
            self.optimizer
                .update(name, &mut values, gradient, learning_rate);
            set(variable, values)?;
        }
        Ok(())
    }
}

/// Tokens that count in the loss.
fn predicted(windows: &[Window]) -> usize {
    windows.iter().map(Window::predicted).sum()
}

/// Whether none of many numbers (n,) is infinite or NaN: their sum is then neither. One that overflows says no, too.
fn all_finite(numbers: &Tensor) -> Result<bool> {
    // by rows first: candle sums what becomes one number in one block of a GPU
    const ROW: usize = 1024;
    let count = numbers.elem_count();
    let missing = count.next_multiple_of(ROW) - count;
    let rows = numbers.pad_with_zeros(0, 0, missing)?;
    let sums = rows.reshape((rows.elem_count() / ROW, ROW))?.sum(1)?;
    Ok(sums.sum_all()?.to_scalar::<f32>()?.is_finite())
}

pub(super) fn counts<'a>(bundle: &[(&'a str, &Var)]) -> Vec<(&'a str, usize)> {
    let counts = bundle
        .iter()
        .map(|(name, variable)| (*name, variable.elem_count()));
    counts.collect()
}

/// A tensor's numbers in f32, row-major.
pub(super) fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

pub(super) fn set(variable: &Var, values: Vec<f32>) -> Result<()> {
    let tensor = Tensor::from_vec(values, variable.dims(), variable.device())?;
    Ok(variable.set(&tensor)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_number_that_is_none_is_found_among_many() {
        let mut numbers: Vec<f32> = (0..100_000).map(|i| (i as f32 - 5e4) * 1e20).collect();
        let finite = |numbers: &[f32]| {
            let there = Tensor::new(numbers, &Device::Cpu).expect("numbers");
            all_finite(&there).expect("asks")
        };
        assert!(finite(&numbers) && finite(&numbers[..1024]) && finite(&[0.0]));
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 77_777, 99_999] {
                let kept = std::mem::replace(&mut numbers[at], broken);
                assert!(!finite(&numbers), "{broken} at {at}");
                numbers[at] = kept;
            }
        }
    }
}
