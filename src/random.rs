//! Random numbers that are the same everywhere, for ever.

use ndarray::Array2;

/// splitmix64 (Steele, Lea & Flood 2014).
pub struct SplitMix(pub u64);

impl SplitMix {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Uniform in (0, 1].
    pub fn uniform(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }
}

/// (rows, columns) of numbers that are uniform in (0, 1].
pub fn uniform(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut random = SplitMix(seed);
    Array2::from_shape_simple_fn((rows, columns), || random.uniform())
}

/// (rows, columns) of normal numbers, by Box and Muller.
pub fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut random = SplitMix(seed);
    let mut spare = None;
    Array2::from_shape_simple_fn((rows, columns), || {
        if let Some(x) = spare.take() {
            return x;
        }
        let radius = (-2.0 * random.uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * random.uniform()).sin_cos();
        spare = Some((radius * sin) as f32);
        (radius * cos) as f32
    })
}

/// (rows, columns) of ±1.
pub fn random_signs(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut random = SplitMix(seed);
    Array2::from_shape_simple_fn((rows, columns), || {
        if random.next_u64() & 1 == 0 {
            1.0
        } else {
            -1.0
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_published_one() {
        // the first numbers from seed 1234567, as in the reference implementation's test vectors
        let mut random = SplitMix(1_234_567);
        let stream = [random.next_u64(), random.next_u64(), random.next_u64()];
        assert_eq!(
            stream,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let x = normal(100, 1001, 7).mapv(f64::from);
        let count = x.len() as f64;
        let variance = x.iter().map(|x| x * x).sum::<f64>() / count;
        // five standard errors of each
        assert!(x.sum().abs() / count < 5.0 / count.sqrt());
        assert!((variance - 1.0).abs() < 5.0 * (2.0 / count).sqrt());
    }
}
