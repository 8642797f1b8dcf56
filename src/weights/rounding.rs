//! From the numbers of arithmetic to the numbers a tensor can hold.

use half::{bf16, f16};
use safetensors::Dtype;

use super::shard::sha256_hex;
use crate::random::SplitMix;

/// How a number that a dtype cannot hold becomes one that it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounding {
    /// To the nearest, ties to even.
    #[default]
    Nearest,
    /// To one of the two neighbours, each as likely as the number is near to it: small changes survive on average, at the
    /// price of noise. The same seed gives the same bytes.
    Stochastic { seed: u64 },
}

/// The rounding of one tensor: what an element becomes depends on nothing but its number, its place and the seed.
#[derive(Debug, Clone, Copy)]
pub struct Rounder {
    dtype: Dtype,
    /// Of stochastic rounding.
    key: Option<u64>,
}

impl Rounder {
    pub fn new(rounding: Rounding, dtype: Dtype, tensor: &str) -> Self {
        let key = match rounding {
            Rounding::Nearest => None,
            Rounding::Stochastic { seed } => {
                let name = sha256_hex(tensor.as_bytes());
                let name = u64::from_str_radix(&name[..16], 16).expect("sixteen hex digits");
                Some(SplitMix(seed).next_u64() ^ name)
            }
        };
        Self { dtype, key }
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Appends `x`, the element at position `at`, rounded once.
    pub fn push(&self, x: f64, at: usize, bytes: &mut Vec<u8>) {
        match self.key {
            None => push_rounded(self.dtype, x, bytes),
            Some(key) => push_either(self.dtype, x, uniform(key, at), bytes),
        }
    }
}

/// Uniform in [0, 1), by position.
fn uniform(key: u64, at: usize) -> f64 {
    // the stream of splitmix64 from a key of its own for each position: neighbours share nothing
    let mut random = SplitMix(key.wrapping_add((at as u64).wrapping_mul(0xD1B5_4A32_D192_ED03)));
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Appends the neighbour of `x` away from zero with the probability that x is near to it, else the one towards zero.
fn push_either(dtype: Dtype, x: f64, uniform: f64, bytes: &mut Vec<u8>) {
    let (width, sign) = match dtype {
        Dtype::F32 => (4, 1u32 << 31),
        _ => (2, 1 << 15),
    };
    let start = bytes.len();
    push_rounded(dtype, x, bytes);
    let mut word = [0u8; 4];
    word[..width].copy_from_slice(&bytes[start..]);
    let nearest = u32::from_le_bytes(word);
    let value = |bits: u32| match dtype {
        Dtype::F32 => f64::from(f32::from_bits(bits)),
        Dtype::F16 => f16::from_bits(bits as u16).to_f64(),
        _ => bf16::from_bits(bits as u16).to_f64(),
    };
    if value(nearest) == x || x.is_nan() {
        return;
    }
    // of one sign, the bit patterns are in the order of magnitude
    let beyond = value(nearest).abs() > x.abs();
    let inner = if beyond { nearest - 1 } else { nearest };
    debug_assert_eq!(inner & sign, nearest & sign);
    let (low, high) = (value(inner).abs(), value(inner + 1).abs());
    let share = (x.abs() - low) / (high - low);
    // beyond the largest number there is only infinity, which whoever merges refuses
    let up = uniform < share || (high.is_infinite() && beyond);
    let chosen = if up { inner + 1 } else { inner };
    bytes.truncate(start);
    bytes.extend_from_slice(&chosen.to_le_bytes()[..width]);
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
    use crate::weights::Elements;
    use proptest::prelude::*;

    fn one(dtype: Dtype, bytes: &[u8]) -> f64 {
        let stored = Elements {
            dtype,
            shape: vec![1],
            bytes: bytes.to_vec(),
        };
        f64::from(stored.to_f32()[0])
    }

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
    fn stochastic_rounding_keeps_the_mean_and_nearest_does_not() {
        // a quarter of the way from 1 to its neighbour
        for (dtype, step) in [(Dtype::BF16, 2f64.powi(-7)), (Dtype::F16, 2f64.powi(-10))] {
            for x in [1.0 + step / 4.0, -1.0 - step / 4.0] {
                let mean = |rounding| {
                    let rounder = Rounder::new(rounding, dtype, "tensor");
                    let mut bytes = Vec::new();
                    let n = 40_000;
                    (0..n).for_each(|at| rounder.push(x, at, &mut bytes));
                    bytes.chunks_exact(2).map(|b| one(dtype, b)).sum::<f64>() / f64::from(n as u32)
                };
                // the standard error of a mean of n draws is step·√(3/16)/√n: five of them
                let error = step * (3.0f64 / 16.0 / 40_000.0).sqrt();
                let found = mean(Rounding::Stochastic { seed: 5 });
                assert!((found - x).abs() < 5.0 * error, "{dtype:?} {x}: {found}");
                assert_eq!(mean(Rounding::Nearest), x.signum());
            }
        }
    }

    #[test]
    fn stochastic_rounding_depends_on_seed_tensor_and_place_alone() {
        let round = |seed, tensor: &str| {
            let rounder = Rounder::new(Rounding::Stochastic { seed }, Dtype::BF16, tensor);
            let mut bytes = Vec::new();
            (0..64).for_each(|at| rounder.push(1.003, at, &mut bytes));
            bytes
        };
        assert_eq!(round(1, "a"), round(1, "a"));
        assert_ne!(round(1, "a"), round(2, "a"));
        assert_ne!(round(1, "a"), round(1, "b"));
    }

    proptest! {
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

        #[test]
        fn stochastic_rounding_gives_a_neighbour_and_leaves_what_is_representable(
            x in -6e4f64..6e4, tiny in -1e-6f64..1e-6, bits: u16, seed: u64,
            dtype in prop_oneof![Just(Dtype::BF16), Just(Dtype::F16), Just(Dtype::F32)],
        ) {
            let rounder = Rounder::new(Rounding::Stochastic { seed }, dtype, "t");
            for x in [x, tiny, x * 0.0] {
                let mut bytes = Vec::new();
                rounder.push(x, 3, &mut bytes);
                let found = one(dtype, &bytes);
                // never farther than one step, which is twice the margin of the nearest on either side
                let mut nearest = Vec::new();
                push_rounded(dtype, x, &mut nearest);
                let nearest = one(dtype, &nearest);
                let step = 4.0 * rounding_margin(dtype, nearest as f32);
                prop_assert!((found - x).abs() < step || found == x, "{x}: {found}");
                prop_assert!(found == 0.0 || found.signum() == x.signum());
            }
            if dtype != Dtype::F32 {
                let stored = Elements { dtype, shape: vec![1], bytes: bits.to_le_bytes().to_vec() };
                prop_assume!(stored.first_not_finite().is_none());
                let mut bytes = Vec::new();
                rounder.push(f64::from(stored.to_f32()[0]), 9, &mut bytes);
                prop_assert_eq!(bytes, stored.bytes);
            }
        }
    }
}
