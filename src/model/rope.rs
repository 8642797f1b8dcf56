//! Rotary position embedding: the angles of every position, and their application.

use candle_core::{D, Device, Result, Tensor};

use super::config::{Rope, Scaling};

/// cos and sin of each token's position: (t, dim/2) where all rows of a batch share them, else (b, t, dim/2). f32
#[derive(Debug, Clone)]
pub struct Angles {
    pub(super) cos: Tensor,
    pub(super) sin: Tensor,
    dim: usize,
}

impl Rope {
    /// The angles of tokens at `positions`; `shape` is (t) or (b, t). What depends on the length of a sequence goes by the
    /// last position of all.
    ///
    /// Computed in f64 from the config's numbers; stored in f32 whatever the model's dtype, because bf16 cannot tell
    /// position 257 from 256.
    pub fn angles(&self, positions: &[usize], shape: &[usize], device: &Device) -> Result<Angles> {
        let length = positions.iter().max().map_or(0, |last| last + 1);
        let frequencies = self.frequencies(length);
        let attention = match &self.scaling {
            Scaling::LongRope { attention, .. } | Scaling::Yarn { attention, .. } => *attention,
            _ => 1.0,
        };
        let half = frequencies.len();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for frequency in &frequencies {
                // the reference multiplies in f32: the angle of a late position carries its rounding
                let angle = f64::from(*position as f32 * *frequency as f32);
                cos.push((angle.cos() * attention) as f32);
                sin.push((angle.sin() * attention) as f32);
            }
        }
        let shape = [shape, &[half]].concat();
        Ok(Angles {
            cos: Tensor::from_vec(cos, shape.as_slice(), device)?,
            sin: Tensor::from_vec(sin, shape.as_slice(), device)?,
            dim: self.dim,
        })
    }

    /// Whether keys that were turned in a sequence of `before` positions must be turned anew in one of `after`.
    ///
    /// As transformers does with a cache: where LongRoPE changes its factors a sequence is read again, and where θ grows
    /// with the sequence each key keeps the angles of its own time.
    pub fn turns_anew(&self, before: usize, after: usize) -> bool {
        match &self.scaling {
            Scaling::LongRope { original, .. } => before <= *original && after > *original,
            _ => false,
        }
    }

    /// How many positions a model reaches that says it has `positions_max`: stretching by a factor multiplies them.
    pub fn positions_max(&self, positions_max: usize) -> usize {
        match &self.scaling {
            Scaling::Linear { factor } | Scaling::Dynamic { factor, .. } => {
                (positions_max as f64 * factor) as usize
            }
            Scaling::Yarn {
                factor, original, ..
            } => positions_max.max((original * factor) as usize),
            _ => positions_max,
        }
    }

    /// θ^(−2i/dim), stretched as the scaling says (transformers, `modeling_rope_utils`).
    fn frequencies(&self, length: usize) -> Vec<f64> {
        let (dim, half) = (self.dim as f64, self.dim / 2);
        let turning = |theta: f64| (0..half).map(move |i| theta.powf(-2.0 * i as f64 / dim));
        let plain = turning(self.theta);
        match &self.scaling {
            Scaling::None | Scaling::Unsupported(_) => plain.collect(),
            Scaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            Scaling::Llama3 {
                factor,
                low,
                high,
                original,
            } => plain
                .map(|f| {
                    let wavelength = std::f64::consts::TAU / f;
                    if wavelength < original / high {
                        f
                    } else if wavelength > original / low {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
            Scaling::Yarn {
                factor,
                fast,
                slow,
                original,
                truncate,
                ..
            } => {
                // the element that turns so many times within the original window
                let element = |turns: &f64| {
                    dim * (original / (turns * std::f64::consts::TAU)).ln()
                        / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (element(fast), element(slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let stretched = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain
                    .enumerate()
                    .map(|(i, f)| f / factor * stretched(i) + f * (1.0 - stretched(i)))
                    .collect()
            }
            Scaling::Dynamic { factor, original } => {
                let stretch = factor * (length as f64).max(*original) / original - (factor - 1.0);
                turning(self.theta * stretch.powf(dim / (dim - 2.0))).collect()
            }
            Scaling::LongRope {
                short,
                long,
                original,
                ..
            } => {
                let stretch = if length > *original { long } else { short };
                plain.zip(stretch).map(|(f, s)| f / s).collect()
            }
        }
    }
}

impl Angles {
    /// Rotates the leading `dim` elements of each head of `x (b, t, h, d)`; `back` rotates the other way.
    pub fn apply(&self, x: &Tensor, back: bool) -> Result<Tensor> {
        let d = x.dim(D::Minus1)?;
        let sin = if back {
            self.sin.neg()?
        } else {
            self.sin.clone()
        };
        let (cos, sin) = (self.cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
        if self.dim == d {
            return candle_nn::rotary_emb::rope_thd(&x.contiguous()?, &cos, &sin);
        }
        let turning = x.narrow(D::Minus1, 0, self.dim)?.contiguous()?;
        let still = x.narrow(D::Minus1, self.dim, d - self.dim)?.contiguous()?;
        let turned = candle_nn::rotary_emb::rope_thd(&turning, &cos, &sin)?;
        Tensor::cat(&[turned, still], D::Minus1)
    }
}
