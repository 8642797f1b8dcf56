//! A norm with its weight.

use candle_core::{Result, Tensor};

use super::ops::{add, cast, layer_norm, rms_norm, rms_norm_beside, shifted, wider};

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

    /// s = x + added, or x itself, and the norm of s.
    pub fn beside(&self, x: &Tensor, added: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        if self.offset == 0.0 && self.bias.is_none() {
            let weight = cast(&self.weight, x.dtype())?;
            return rms_norm_beside(x, added, &weight, self.eps);
        }
        let sum = match added {
            Some(added) => add(x, added)?,
            None => x.clone(),
        };
        let y = self.forward(&sum)?;
        Ok((sum, y))
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.offset != 0.0 {
            // a small distance from one would be lost in 16 bits
            let weight = shifted(&cast(&self.weight, wider(x))?, self.offset)?;
            return cast(
                &rms_norm(&cast(x, wider(x))?, &weight, self.eps)?,
                x.dtype(),
            );
        }
        // a trained norm is kept in f32 beside a model in 16 bits
        let weight = cast(&self.weight, x.dtype())?;
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
    use candle_core::DType;

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
