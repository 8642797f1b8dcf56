//! The elements of a tensor: bytes as the checkpoint holds them, and as numbers.

use std::borrow::Cow;
use std::path::Path;

use half::f16;
use safetensors::Dtype;

use super::rounding::{Rounder, push_rounded};
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

    /// The stored form.
    pub fn bytes(&self) -> &'a [u8] {
        match self.values {
            Values::Stored(bytes) => bytes,
            Values::F32(values) => bytemuck::cast_slice(values),
        }
    }
}

// tensors are stored little-endian, and their numbers are read and written where they lie
const _: () = assert!(cfg!(target_endian = "little"));

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
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes: bytemuck::cast_slice(values).to_vec(),
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

    /// The values where they lie, if they are stored in f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        let lies = self.dtype == Dtype::F32;
        lies.then(|| bytemuck::try_cast_slice(&self.bytes).ok())?
    }

    /// The values in f32, copied only if they must be.
    ///
    /// # Panics
    /// As [`Elements::to_f32`].
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self.as_f32() {
            Some(values) => values.into(),
            None => self.to_f32().into(),
        }
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

    /// Rounds every element; what the dtype can hold stays as it is.
    pub fn round(&self, rounder: &Rounder) -> Self {
        if rounder.dtype() == self.dtype {
            return self.clone();
        }
        let mut bytes = Vec::with_capacity(self.len() * rounder.dtype().bitsize() / 8);
        for (at, x) in self.to_f32().into_iter().enumerate() {
            rounder.push(f64::from(x), at, &mut bytes);
        }
        Self {
            dtype: rounder.dtype(),
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

    /// The same of a tensor that was merged, and lies in no file yet.
    pub fn refuse_overflow(&self, tensor: &str) -> Result<()> {
        match self.first_not_finite() {
            None => Ok(()),
            Some((index, value)) => Err(Error::MergedNotFinite {
                tensor: tensor.into(),
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
            Dtype::F32 => first_beyond(&self.bytes, |b| u32::from_le_bytes(b) << 1 >= 0xff << 24),
            Dtype::F16 => first_beyond(&self.bytes, |b| u16::from_le_bytes(b) << 1 >= 0x1f << 11),
            _ => first_beyond(&self.bytes, |b| u16::from_le_bytes(b) << 1 >= 0xff << 8),
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

/// The first element of W bytes with the exponent of infinity. A block at a time: none is what is usual.
fn first_beyond<const W: usize>(
    bytes: &[u8],
    is_beyond: impl Fn([u8; W]) -> bool,
) -> Option<usize> {
    const BLOCK: usize = 1 << 10;
    let elements = bytes.as_chunks::<W>().0;
    let mut blocks = elements.chunks(BLOCK).zip((0..).step_by(BLOCK));
    blocks.find_map(|(block, start)| {
        // every one is looked at: that is a loop over whole vectors
        let any = block.iter().fold(false, |any, &b| any | is_beyond(b));
        let at = any.then(|| block.iter().position(|&b| is_beyond(b)))?;
        at.map(|at| start + at)
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_view_of_f32_gives_the_stored_bytes() {
        let values: Vec<f32> = (0..10_000).map(|i| i as f32 * -0.37).collect();
        let view = View::f32(&[100, 100], &values);
        let stored = Elements::from_f32(&[100, 100], &values);
        assert_eq!(view.bytes(), stored.bytes);
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

    #[test]
    fn whatever_is_not_finite_is_found_and_nothing_else() {
        // every pattern of 16 bits, and with them as the upper half those of 32
        for bits in 0..=u16::MAX {
            let wide = u32::from(bits) << 16;
            let cases = [
                (
                    Dtype::F16,
                    bits.to_le_bytes().to_vec(),
                    f16::from_bits(bits).is_finite(),
                ),
                (
                    Dtype::BF16,
                    bits.to_le_bytes().to_vec(),
                    f32::from_bits(wide).is_finite(),
                ),
                (
                    Dtype::F32,
                    wide.to_le_bytes().to_vec(),
                    f32::from_bits(wide).is_finite(),
                ),
                (
                    Dtype::F32,
                    (wide | 1).to_le_bytes().to_vec(),
                    f32::from_bits(wide | 1).is_finite(),
                ),
            ];
            for (dtype, bytes, finite) in cases {
                let shape = vec![1];
                let found = Elements {
                    dtype,
                    shape,
                    bytes,
                }
                .first_not_finite();
                assert_eq!(found.is_none(), finite, "{dtype:?} {bits:#x}");
            }
        }
        // at the ends of the blocks that are looked at together
        for at in [0, 1023, 1024, 2047, 2500] {
            let mut values = vec![-1f32; 2501];
            values[at] = f32::NEG_INFINITY;
            let found = Elements::from_f32(&[2501], &values).first_not_finite();
            assert_eq!(found, Some((vec![at], f32::NEG_INFINITY)));
        }
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
    }
}
