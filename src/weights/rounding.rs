//! From the numbers of arithmetic to the numbers a tensor can hold.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::random::SplitMix;
use crate::sum::sha256_hex;

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

    /// The bit pattern that `x`, the element at position `at`, becomes. It never falls where `x` rises.
    pub fn round(&self, x: f64, at: usize) -> u32 {
        match self.key {
            None => nearest(self.dtype, x),
            Some(key) => either(self.dtype, x, uniform(key, at)),
        }
    }

    /// Appends `x`, the element at position `at`, rounded once.
    pub fn push(&self, x: f64, at: usize, bytes: &mut Vec<u8>) {
        push_bits(self.dtype, self.round(x, at), bytes);
    }
}

/// Uniform in [0, 1), by position.
fn uniform(key: u64, at: usize) -> f64 {
    // the stream of splitmix64 from a key of its own for each position: neighbours share nothing
    let mut random = SplitMix(key.wrapping_add((at as u64).wrapping_mul(0xD1B5_4A32_D192_ED03)));
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The neighbour of `x` away from zero with the probability that x is near to it, else the one towards zero.
fn either(dtype: Dtype, x: f64, uniform: f64) -> u32 {
    let nearest = nearest(dtype, x);
    let value = |bits| value_of(dtype, bits);
    if value(nearest) == x || x.is_nan() {
        return nearest;
    }
    // of one sign, the bit patterns are in the order of magnitude
    let beyond = value(nearest).abs() > x.abs();
    let inner = if beyond { nearest - 1 } else { nearest };
    let (low, high) = (value(inner).abs(), value(inner + 1).abs());
    let share = (x.abs() - low) / (high - low);
    // beyond the largest number there is only infinity, which whoever merges refuses
    let up = uniform < share || (high.is_infinite() && beyond);
    if up { inner + 1 } else { inner }
}

/// Appends `x`, rounded once to nearest-even in `dtype`.
pub fn push_rounded(dtype: Dtype, x: f64, bytes: &mut Vec<u8>) {
    push_bits(dtype, nearest(dtype, x), bytes);
}

fn push_bits(dtype: Dtype, bits: u32, bytes: &mut Vec<u8>) {
    bytes.extend_from_slice(&bits.to_le_bytes()[..dtype.bitsize() / 8]);
}

/// The bit pattern of the number nearest to `x`, ties to even.
///
/// From f64 at once: rounding to f32 first and then to 16 bits would round twice, and `f16::from_f64` does so, or cuts
/// digits off, as the processor has it.
#[inline(always)]
fn nearest(dtype: Dtype, x: f64) -> u32 {
    match dtype {
        Dtype::F32 => (x as f32).to_bits(),
        Dtype::F16 => f16::from_f32(f32_to_odd(x)).to_bits().into(),
        Dtype::BF16 => bf16::from_f32(f32_to_odd(x)).to_bits().into(),
        other => panic!("invariant: {other:?} is not a dtype a weight is rounded to"),
    }
}

/// The number of a bit pattern.
pub fn value_of(dtype: Dtype, bits: u32) -> f64 {
    match dtype {
        Dtype::F32 => f64::from(f32::from_bits(bits)),
        Dtype::F16 => f16::from_bits(bits as u16).to_f64(),
        Dtype::BF16 => bf16::from_bits(bits as u16).to_f64(),
        other => panic!("invariant: {other:?} is not a dtype a weight is rounded to"),
    }
}

/// `x` rounded to odd in f32: the last of 24 digits remembers what was cut, so that the second rounding, to 8 or 11 of
/// them, is exact (Boldo & Melquiond 2008).
#[inline(always)]
fn f32_to_odd(x: f64) -> f32 {
    let near = x as f32;
    if !near.is_finite() || f64::from(near) == x {
        return near;
    }
    let toward_zero = if f64::from(near).abs() > x.abs() {
        f32::from_bits(near.to_bits() - 1)
    } else {
        near
    };
    f32::from_bits(toward_zero.to_bits() | 1)
}

/// [`rounding_margin`] where it is told by the exponent alone; −1 of zero, of powers of two and of subnormal numbers.
#[inline(always)]
pub fn usual_margin(dtype: Dtype, x: f32) -> f64 {
    const fn two_to(exponent: i32) -> f64 {
        f64::from_bits(((exponent + 1023) as u64) << 52)
    }
    let (digits, normal_from) = match dtype {
        Dtype::F16 => (10, -14),
        Dtype::BF16 => (7, -126),
        _ => (23, -126),
    };
    // between two powers of two, all neighbours are as far apart; in f64, none of them is subnormal
    let bits = f64::from(x).to_bits();
    let power = f64::from_bits(bits & 0x7ff << 52);
    if (bits << 12 != 0) & (power >= two_to(normal_from)) {
        power * two_to(-digits - 1)
    } else {
        -1.0
    }
}

/// The numbers nearest to a + b, element by element, as bytes.
#[inline(always)]
pub fn round_sums(dtype: Dtype, a: &[f32], b: &[f64], bytes: &mut [u8]) {
    let sums = a.iter().zip(b).map(|(&a, &b)| f64::from(a) + b);
    if dtype == Dtype::F32 {
        for (bytes, sum) in bytes.chunks_exact_mut(4).zip(sums) {
            bytes.copy_from_slice(&(sum as f32).to_le_bytes());
        }
    } else {
        for (bytes, sum) in bytes.chunks_exact_mut(2).zip(sums) {
            bytes.copy_from_slice(&(nearest(dtype, sum) as u16).to_le_bytes());
        }
    }
}

/// The distance from the representable value `x` to the nearest value that would round elsewhere.
///
/// Half a unit in the last place on the narrower side; at the ends of the range, on the inner side.
pub fn rounding_margin(dtype: Dtype, x: f32) -> f64 {
    let usual = usual_margin(dtype, x);
    if usual > 0.0 {
        return usual;
    }
    let next = |step: i32| -> f64 {
        let shift = |bits: u32, width: u32| -> Option<u32> {
            // order the bit patterns of one sign by magnitude; `step` moves away from or towards zero
            let magnitude = bits & !(1 << (width - 1));
            let moved = i64::from(magnitude) + i64::from(step);
            (moved >= 0).then_some((bits & (1 << (width - 1))) | moved as u32)
        };
        let width = dtype.bitsize() as u32;
        let neighbour = shift(nearest(dtype, x.into()), width).map(|bits| value_of(dtype, bits));
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
    fn sixteen_bits_are_rounded_once_from_f64() {
        // a tie between 1 and its neighbour; a crumb beside it must win although f32 cannot see the crumb
        for (dtype, digits) in [(Dtype::BF16, 7), (Dtype::F16, 10)] {
            let step = 2f64.powi(-digits);
            for crumb in [2f64.powi(-40), 2f64.powi(-52)] {
                let rounded = |x| value_of(dtype, nearest(dtype, x));
                assert_eq!(rounded(1.0 + step / 2.0 + crumb), 1.0 + step, "{dtype:?}");
                assert_eq!(rounded(-1.0 - step / 2.0 - crumb), -1.0 - step);
                assert_eq!(rounded(1.0 + step / 2.0 - crumb), 1.0);
                assert_eq!(rounded(1.0 + step / 2.0), 1.0);
                assert_eq!(rounded(1.0 + 1.5 * step), 1.0 + 2.0 * step);
            }
            assert_eq!(nearest(dtype, -0.0), 0x8000);
            assert_eq!(value_of(dtype, nearest(dtype, 1e300)), f64::INFINITY);
        }
        // the largest f16 and the tie above it; the smallest and the tie below it
        assert_eq!(nearest(Dtype::F16, 65519.999), 0x7bff);
        assert_eq!(nearest(Dtype::F16, 65520.0), 0x7c00);
        assert_eq!(nearest(Dtype::F16, 2f64.powi(-25)), 0);
        assert_eq!(nearest(Dtype::F16, 2f64.powi(-25) * (1.0 + 1e-12)), 1);
    }

    /// Of every 16-bit number: a value just inside rounds back, and of one just outside on the narrower side at least one
    /// does not.
    #[test]
    fn the_margin_of_every_number_is_as_wide_as_can_be_and_no_wider() {
        for dtype in [Dtype::BF16, Dtype::F16] {
            for bits in 0..=u32::from(u16::MAX) {
                let x = value_of(dtype, bits);
                let margin = rounding_margin(dtype, x as f32);
                assert!(margin >= usual_margin(dtype, x as f32), "{dtype:?} {x}");
                if !x.is_finite() || !margin.is_finite() {
                    continue;
                }
                let back = |to: f64| value_of(dtype, nearest(dtype, to));
                let (inside, outside) = (0.999 * margin, 1.001 * margin);
                assert!(
                    back(x + inside) == x && back(x - inside) == x,
                    "{dtype:?} {x}"
                );
                assert!(
                    back(x + outside) != x || back(x - outside) != x,
                    "{dtype:?} {x}"
                );
            }
        }
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

    /// Where the nearest is infinity, so is whatever the draw; where it is not, no draw makes it so.
    #[test]
    fn stochastic_rounding_leaves_the_range_where_the_nearest_does() {
        // half a step above the largest number of each
        for (dtype, largest, half) in [
            (Dtype::F16, 65504.0, 16.0),
            (Dtype::BF16, f64::from(half::bf16::MAX), 2f64.powi(119)),
        ] {
            for (x, leaves) in [(largest + 1.5 * half, true), (largest + 0.5 * half, false)] {
                for uniform in [0.0, 0.3, 0.999] {
                    for x in [x, -x] {
                        let found = value_of(dtype, either(dtype, x, uniform));
                        assert_eq!(found.is_infinite(), leaves, "{dtype:?}, {x}: {found}");
                    }
                }
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
