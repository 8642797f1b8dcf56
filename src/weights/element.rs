//! The elements of a tensor: bytes as the checkpoint holds them, and as numbers.

use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;

use crate::error::{Error, Result};

/// One tensor's bytes in its stored dtype, little-endian and row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Elements {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A tensor's elements where they lie, to be written without a copy of the whole.
pub struct View<'a> {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    values: Values<'a>,
}

enum Values<'a> {
    Stored(&'a [u8]),
    F32(&'a [f32]),
}

impl<'a> View<'a> {
    /// Bytes in their stored form.
    pub fn stored(dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> Self {
        Self {
            dtype,
            shape: shape.to_vec(),
            values: Values::Stored(bytes),
        }
    }

    /// f32 values that will be stored as such.
    pub fn f32(shape: &[usize], values: &'a [f32]) -> Self {
        assert_eq!(
            shape.iter().product::<usize>(),
            values.len(),
            "the shape covers the values"
        );
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            values: Values::F32(values),
        }
    }

    /// Calls `visit` with the stored form, piece by piece.
    pub fn for_each_block(&self, mut visit: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self.values {
            Values::Stored(bytes) => visit(bytes),
            Values::F32(values) => {
                let mut block = [0u8; 1 << 14];
                for values in values.chunks(block.len() / 4) {
                    for (bytes, x) in block.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                        *bytes = x.to_le_bytes();
                    }
                    visit(&block[..4 * values.len()])?;
                }
                Ok(())
            }
        }
    }
}

/// The name of a dtype as safetensors headers write it (`BF16`).
pub fn dtype_name(dtype: Dtype) -> String {
    format!("{dtype:?}")
}

/// True for the three dtypes whose values convert to f32 without loss.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

impl Elements {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements without a copy.
    pub fn view(&self) -> View<'_> {
        View::stored(self.dtype, &self.shape, &self.bytes)
    }

    /// Wraps f32 values in their stored form.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(
            shape.iter().product::<usize>(),
            values.len(),
            "the shape covers the values"
        );
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// The values in f32; exact for f32, f16 and bf16.
    ///
    /// # Panics
    /// If the dtype is not one of these three: callers check with [`is_float`] and report the tensor's name.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0f32; self.len()];
        widen(self.dtype, &self.bytes, &mut values);
        values
    }

    /// Rounds every element to nearest-even in `dtype`.
    pub fn cast(&self, dtype: Dtype) -> Self {
        if dtype == self.dtype {
            return self.clone();
        }
        let mut bytes = Vec::with_capacity(self.len() * dtype.bitsize() / 8);
        for x in self.to_f32() {
            push_rounded(dtype, f64::from(x), &mut bytes);
        }
        Self {
            dtype,
            shape: self.shape.clone(),
            bytes,
        }
    }

    /// Refuses NaN and Inf; `tensor` and `path` name the place.
    pub fn refuse_not_finite(&self, tensor: &str, path: &Path) -> Result<()> {
        match self.first_not_finite() {
            None => Ok(()),
            Some((index, value)) => Err(Error::NotFinite {
                tensor: tensor.into(),
                path: path.into(),
                value,
                index,
            }),
        }
    }

    /// The first element that is NaN or infinite, with its index.
    pub fn first_not_finite(&self) -> Option<(Vec<usize>, f32)> {
        if !is_float(self.dtype) {
            return None;
        }
        let at = match self.dtype {
            Dtype::F32 => self
                .bytes
                .chunks_exact(4)
                .position(|b| !f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
            Dtype::F16 => self
                .bytes
                .chunks_exact(2)
                .position(|b| !f16::from_le_bytes([b[0], b[1]]).is_finite()),
            _ => self
                .bytes
                .chunks_exact(2)
                .position(|b| !bf16::from_le_bytes([b[0], b[1]]).is_finite()),
        }?;
        let width = self.dtype.bitsize() / 8;
        let mut value = [0f32];
        widen(
            self.dtype,
            &self.bytes[at * width..(at + 1) * width],
            &mut value,
        );
        let mut rest = at;
        let mut index = vec![0; self.shape.len()];
        for (i, &extent) in index.iter_mut().zip(&self.shape).rev() {
            *i = rest % extent;
            rest /= extent;
        }
        Some((index, value[0]))
    }
}

/// Converts stored bytes to f32, exactly.
pub fn widen(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (x, b) in values.iter_mut().zip(bytes.chunks_exact(4)) {
                *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Dtype::F16 => {
            for (x, b) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Dtype::BF16 => {
            for (x, b) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                *x = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        other => panic!("invariant: {other:?} was refused before its values were asked for"),
    }
}

/// Appends `x`, rounded once to nearest-even in `dtype`.
///
/// From f64 directly: rounding to f32 first and then to 16 bits would round twice.
pub fn push_rounded(dtype: Dtype, x: f64, bytes: &mut Vec<u8>) {
    match dtype {
        Dtype::F32 => bytes.extend_from_slice(&(x as f32).to_le_bytes()),
        Dtype::F16 => bytes.extend_from_slice(&f16::from_f64(x).to_le_bytes()),
        Dtype::BF16 => bytes.extend_from_slice(&bf16_from_f64(x).to_le_bytes()),
        other => panic!("invariant: {other:?} is not a dtype a weight is rounded to"),
    }
}

/// bf16 nearest to `x`, ties to even.
///
/// Rounds to odd in f32 first (the last bit remembers what was cut), so that the second rounding is exact;
/// bf16 has 8 significant bits, f32 24, which leaves room enough for the sticky bit.
fn bf16_from_f64(x: f64) -> bf16 {
    let near = x as f32;
    if !near.is_finite() || f64::from(near) == x {
        return bf16::from_f32(near);
    }
    let toward_zero = if f64::from(near).abs() > x.abs() {
        f32::from_bits(near.to_bits() - 1)
    } else {
        near
    };
    bf16::from_f32(f32::from_bits(toward_zero.to_bits() | 1))
}

/// The distance from the representable value `x` to the nearest value that would round elsewhere.
///
/// Half a unit in the last place on the narrower side; at the ends of the range, on the inner side.
pub fn rounding_margin(dtype: Dtype, x: f32) -> f64 {
    // between two powers of two, all neighbours are as far apart: half of 2^(exponent − digits)
    let (digits, normal_from) = match dtype {
        Dtype::F16 => (10, -14),
        Dtype::BF16 => (7, -126),
        _ => (23, -126),
    };
    let bits = x.to_bits();
    let exponent = (bits >> 23 & 0xff) as i32 - 127;
    if bits << 9 != 0 && (normal_from..128).contains(&exponent) {
        return f64::from_bits(((exponent - digits - 1 + 1023) as u64) << 52);
    }
    let next = |step: i32| -> f64 {
        let shift = |bits: u32, width: u32| -> Option<u32> {
            // order the bit patterns of one sign by magnitude; `step` moves away from or towards zero
            let magnitude = bits & !(1 << (width - 1));
            let moved = i64::from(magnitude) + i64::from(step);
            (moved >= 0).then_some((bits & (1 << (width - 1))) | moved as u32)
        };
        let neighbour = match dtype {
            Dtype::F32 => shift(x.to_bits(), 32).map(|b| f64::from(f32::from_bits(b))),
            Dtype::F16 => shift(f16::from_f32(x).to_bits().into(), 16)
                .map(|b| f16::from_bits(b as u16).to_f64()),
            Dtype::BF16 => shift(bf16::from_f32(x).to_bits().into(), 16)
                .map(|b| bf16::from_bits(b as u16).to_f64()),
            other => panic!("invariant: {other:?} is not a dtype a weight is rounded to"),
        };
        match neighbour {
            Some(y) if y.is_finite() => (y - f64::from(x)).abs(),
            _ => f64::INFINITY,
        }
    };
    let away = next(1);
    let towards = if x == 0.0 { away } else { next(-1) };
    away.min(towards) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bf16_is_rounded_once_from_f64() {
        // 1 + 2^-8 is a tie between 1 and 1 + 2^-7; a crumb above it must win although f32 cannot see the crumb
        let x = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
        assert_eq!(bf16_from_f64(x), bf16::from_f32(1.0 + 2f32.powi(-7)));
        assert_eq!(bf16_from_f64(-x), bf16::from_f32(-1.0 - 2f32.powi(-7)));
        let x = 1.0 + 2f64.powi(-8) - 2f64.powi(-40);
        assert_eq!(bf16_from_f64(x), bf16::from_f32(1.0));
        assert_eq!(bf16_from_f64(-0.0).to_bits(), 0x8000);
        assert_eq!(bf16_from_f64(1e300), bf16::INFINITY);
    }

    #[test]
    fn a_view_of_f32_gives_the_stored_bytes() {
        let values: Vec<f32> = (0..10_000).map(|i| i as f32 * -0.37).collect();
        let mut bytes = Vec::new();
        View::f32(&[100, 100], &values)
            .for_each_block(|block| {
                bytes.extend_from_slice(block);
                Ok(())
            })
            .expect("visits");
        assert_eq!(bytes, Elements::from_f32(&[100, 100], &values).bytes);
    }

    #[test]
    fn the_first_not_finite_element_is_located() {
        let mut values = vec![1f32; 12];
        values[7] = f32::NAN;
        let elements = Elements::from_f32(&[3, 4], &values).cast(Dtype::BF16);
        let (index, value) = elements.first_not_finite().expect("there is a NaN");
        assert_eq!(index, [1, 3]);
        assert!(value.is_nan());
    }

    proptest! {
        #[test]
        fn sixteen_bit_values_survive_the_way_through_f32(bits: u16, brain: bool) {
            let dtype = if brain { Dtype::BF16 } else { Dtype::F16 };
            let stored = Elements { dtype, shape: vec![1], bytes: bits.to_le_bytes().to_vec() };
            prop_assume!(stored.first_not_finite().is_none());
            let wide = Elements::from_f32(&[1], &stored.to_f32());
            prop_assert_eq!(wide.cast(dtype).bytes, stored.bytes);
        }

        #[test]
        fn inside_the_margin_rounding_returns_the_value(bits: u16, brain: bool, t in -0.999f64..0.999) {
            let dtype = if brain { Dtype::BF16 } else { Dtype::F16 };
            let stored = Elements { dtype, shape: vec![1], bytes: bits.to_le_bytes().to_vec() };
            prop_assume!(stored.first_not_finite().is_none());
            let x = stored.to_f32()[0];
            let margin = rounding_margin(dtype, x);
            prop_assume!(margin.is_finite());
            let mut bytes = Vec::new();
            push_rounded(dtype, f64::from(x) + t * margin, &mut bytes);
            let back = Elements { dtype, shape: vec![1], bytes };
            prop_assert_eq!(back.to_f32()[0], x);
        }
    }
}
