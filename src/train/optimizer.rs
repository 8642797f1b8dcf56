//! AdamW on a few hundred thousand numbers, and the learning rate over time.

use std::collections::BTreeMap;
use std::str::FromStr;

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::model::gpu;

/// Loshchilov & Hutter 2019, in the order of operations of `torch.optim.AdamW`.
#[derive(Debug, Clone)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Pulls towards zero: for Δσ that is towards the pretrained spectrum.
    pub weight_decay: f64,
    pub state: BTreeMap<String, Moments>,
    pub steps: u32,
    /// The moments of what moves on a GPU, flat: those of one bundle under the name of its first parameter. What `state`
    /// says of them is old until [`AdamW::fetch`].
    there: BTreeMap<String, [Tensor; 2]>,
}

/// Running means of the gradient and its square.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            state: BTreeMap::new(),
            steps: 0,
            there: BTreeMap::new(),
        }
    }
}

impl AdamW {
    /// With the usual β and ε.
    pub fn new(weight_decay: f64) -> Self {
        Self {
            weight_decay,
            ..Self::default()
        }
    }

    /// Starts a step; every parameter is then updated once.
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// Updates one parameter vector in place.
    pub fn update(&mut self, name: &str, values: &mut [f32], gradient: &[f32], learning_rate: f64) {
        assert_eq!(
            values.len(),
            gradient.len(),
            "one gradient for each number of {name}"
        );
        let moments = self
            .state
            .entry(name.to_string())
            .or_insert_with(|| Moments {
                first: vec![0.0; values.len()],
                second: vec![0.0; values.len()],
            });
        let t = self.steps as i32;
        let (correction1, correction2) = (1.0 - self.beta1.powi(t), 1.0 - self.beta2.powi(t));
        let step = learning_rate / correction1;
        let root2 = correction2.sqrt();
        let moving = values.iter_mut().zip(gradient);
        let kept = moments.first.iter_mut().zip(&mut moments.second);
        for ((x, &g), (m, v)) in moving.zip(kept) {
            let g = f64::from(g);
            let decayed = f64::from(*x) * (1.0 - learning_rate * self.weight_decay);
            let first = f64::from(*m) + (g - f64::from(*m)) * (1.0 - self.beta1);
            let second = f64::from(*v) * self.beta2 + g * g * (1.0 - self.beta2);
            (*m, *v) = (first as f32, second as f32);
            *x = (decayed - step * first / (second.sqrt() / root2 + self.eps)) as f32;
        }
    }
}

/// Parameters that are updated together, and how many numbers each has.
pub type Bundle<'a> = [(&'a str, usize)];

impl AdamW {
    /// Updates the parameters of a bundle where they lie, if that is on a GPU, by their gradients one behind the other; says
    /// whether it did.
    pub fn update_there(
        &mut self,
        bundle: &Bundle,
        values: &[Tensor],
        gradient: &Tensor,
        learning_rate: f64,
    ) -> candle_core::Result<bool> {
        if !gradient.device().is_cuda() {
            return Ok(false);
        }
        let with = gpu::AdamW {
            learning_rate,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
            step: self.steps as usize,
        };
        let name = bundle[0].0;
        if !self.there.contains_key(name) {
            let moments = |of: fn(&Moments) -> &Vec<f32>| {
                let all = bundle.iter().flat_map(|(name, count)| {
                    let known = self.state.get(*name).map(of);
                    known.cloned().unwrap_or_else(|| vec![0.0; *count])
                });
                Tensor::from_iter(all, gradient.device())
            };
            let moments = [moments(|m| &m.first)?, moments(|m| &m.second)?];
            self.there.insert(name.into(), moments);
        }
        let [first, second] = &self.there[name];
        gpu::adamw(values, gradient, [first, second], with)
    }

    /// Brings the moments of a bundle back from where it is updated.
    pub fn fetch(&mut self, bundle: &Bundle) -> candle_core::Result<()> {
        let Some([first, second]) = self.there.get(bundle[0].0) else {
            return Ok(());
        };
        let (first, second) = (first.to_vec1::<f32>()?, second.to_vec1::<f32>()?);
        let mut start = 0;
        for (name, count) in bundle {
            let moments = Moments {
                first: first[start..start + count].to_vec(),
                second: second[start..start + count].to_vec(),
            };
            self.state.insert((*name).into(), moments);
            start += count;
        }
        Ok(())
    }
}

/// How the learning rate falls after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    Constant,
    /// Evenly, to zero behind the last step.
    #[default]
    Linear,
    /// To zero behind the last step, along half a cosine.
    Cosine,
}

impl FromStr for Schedule {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "constant" => Ok(Self::Constant),
            "linear" => Ok(Self::Linear),
            "cosine" => Ok(Self::Cosine),
            _ => Err(Error::Parse {
                what: "a schedule",
                value: text.into(),
                reason: "expected constant, linear or cosine".into(),
            }),
        }
    }
}

impl Schedule {
    /// The factor on the learning rate in step `step` (from 0) of `steps`, after `warmup` steps of linear growth.
    pub fn factor(self, step: usize, steps: usize, warmup: usize) -> f64 {
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        let share = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - share,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * share).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_has_the_size_of_the_learning_rate() {
        let mut adam = AdamW::default();
        let mut x = [1.0f32, -2.0];
        adam.begin_step();
        adam.update("x", &mut x, &[3.0, -1e-3], 0.1);
        assert!(
            (x[0] - 0.9).abs() < 1e-6 && (x[1] + 1.9).abs() < 1e-5,
            "{x:?}"
        );
    }

    #[test]
    fn weight_decay_pulls_towards_zero() {
        let mut adam = AdamW {
            weight_decay: 0.5,
            ..AdamW::default()
        };
        let mut x = [2.0f32];
        adam.begin_step();
        adam.update("x", &mut x, &[0.0], 0.1);
        assert!((x[0] - 1.9).abs() < 1e-6);
    }

    #[test]
    fn schedules_start_high_and_end_low() {
        for schedule in [Schedule::Linear, Schedule::Cosine] {
            assert_eq!(schedule.factor(0, 10, 0), 1.0);
            assert!(schedule.factor(9, 10, 0) < 0.11);
            assert_eq!(schedule.factor(0, 10, 4), 0.25);
            assert_eq!(schedule.factor(4, 10, 4), 1.0);
        }
        assert_eq!(Schedule::Constant.factor(9, 10, 0), 1.0);
        assert!((Schedule::Linear.factor(4, 16, 0) - 0.75).abs() < 1e-15);
        // ½·(1 + cos(π/4))
        assert!((Schedule::Cosine.factor(4, 16, 0) - 0.853_553_390_593_273_8).abs() < 1e-15);
    }
}
