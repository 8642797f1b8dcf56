//! Sums without rounding, for the few numbers that lie so near to a rounding boundary that f64 cannot tell the side.

/// A sum of f64 kept exactly, as numbers that do not overlap, in ascending magnitude.
///
/// Source: Shewchuk (1997), "Adaptive precision floating-point arithmetic", §2.4; as in Python's `math.fsum`.
#[derive(Debug, Clone, Default)]
pub struct ExactSum {
    parts: Vec<f64>,
}

impl ExactSum {
    pub fn clear(&mut self) {
        self.parts.clear();
    }

    pub fn add(&mut self, x: f64) {
        let mut x = x;
        let mut kept = 0;
        for at in 0..self.parts.len() {
            let (sum, lost) = two_sum(x, self.parts[at]);
            if lost != 0.0 {
                self.parts[kept] = lost;
                kept += 1;
            }
            x = sum;
        }
        self.parts.truncate(kept);
        if x != 0.0 {
            self.parts.push(x);
        }
    }

    /// Adds a·b, exact unless it is below 2⁻¹⁰²².
    pub fn add_product(&mut self, a: f64, b: f64) {
        let product = a * b;
        self.add(product);
        self.add(a.mul_add(b, -product));
    }

    /// The sum rounded to odd: what it is not exactly ends in a 1, so that rounding it once more, to 51 digits or less,
    /// gives what rounding the sum itself gives (Boldo & Melquiond 2008).
    pub fn to_odd(&self) -> f64 {
        let mut parts = self.parts.iter().rev();
        let Some(&first) = parts.next() else {
            return 0.0;
        };
        let mut sum = first;
        for &part in parts {
            let (next, lost) = two_sum(sum, part);
            sum = next;
            if lost != 0.0 {
                let towards_zero = if (lost > 0.0) == (sum > 0.0) {
                    sum
                } else {
                    f64::from_bits(sum.to_bits() - 1)
                };
                return f64::from_bits(towards_zero.to_bits() | 1);
            }
        }
        sum
    }
}

/// The sum of two numbers, and what rounding it lost (Knuth).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let other = sum - a;
    (sum, (a - (sum - other)) + (b - other))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(terms: &[f64]) -> ExactSum {
        let mut sum = ExactSum::default();
        terms.iter().for_each(|&x| sum.add(x));
        sum
    }

    #[test]
    fn a_crumb_that_f64_loses_decides() {
        let crumb = 2f64.powi(-300);
        assert_eq!(sum(&[1.0, crumb]).to_odd(), 1.0 + f64::EPSILON);
        assert_eq!(sum(&[1.0, -crumb]).to_odd(), 1.0 - f64::EPSILON / 2.0);
        assert_eq!(sum(&[-1.0, crumb]).to_odd(), -1.0 + f64::EPSILON / 2.0);
        assert_eq!(sum(&[1e300, crumb, -1e300]).to_odd(), crumb);
        assert_eq!(sum(&[]).to_odd(), 0.0);
    }

    proptest! {
        #[test]
        fn the_order_of_the_terms_does_not_matter_and_opposites_cancel(
            terms in prop::collection::vec((-1.0f64..1.0, -200i32..200), 1..40), turn in 0usize..40,
        ) {
            let mut terms: Vec<f64> = terms.iter().map(|(x, e)| x * 2f64.powi(*e)).collect();
            let forth = sum(&terms).to_odd();
            let turn = turn % terms.len();
            terms.rotate_left(turn);
            terms.reverse();
            prop_assert_eq!(sum(&terms).to_odd(), forth);
            let opposites: Vec<f64> = terms.iter().map(|x| -x).collect();
            prop_assert_eq!(sum(&[terms, opposites].concat()).to_odd(), 0.0);
        }

        #[test]
        fn products_are_exact(a in -1f32..1.0, b in -1e-9f32..1e-9, c in -1e9f32..1e9) {
            let ab = f64::from(a) * f64::from(b);
            let mut found = ExactSum::default();
            found.add_product(ab, f64::from(c));
            // 48 digits by halves of 24, whose products with 24 more f64 holds
            let high = f64::from(ab as f32);
            found.add(-high * f64::from(c));
            found.add(-(ab - high) * f64::from(c));
            prop_assert_eq!(found.to_odd(), 0.0);
        }
    }
}
