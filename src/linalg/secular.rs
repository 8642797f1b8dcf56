//! The roots of the secular equation 1/ρ + Σ zᵢ²/(dᵢ − λ) = 0: the eigenvalues of diag(d) + ρ·z·zᵀ.
//!
//! LAPACK's laed4 goes over the poles one by one, with a division for each. Here a whole vector of them is divided at a
//! time; between two poles, both sides' sums are replaced by what one pole each would make of them ("the middle way", Li
//! 1993), and a bracket keeps every step between them.

use super::real::Real;
use crate::lanes::{Simd, WithSimd, widest_of};

/// The eigenvalues λ of diag(d) + ρ·z·zᵀ, each as what it lies beyond a pole near to it.
pub struct Roots<T> {
    poles: Vec<T>,
    from: Vec<T>,
    distances: Vec<T>,
}

impl<T: Real> Roots<T> {
    /// d (n,) ascends strictly, ‖z‖ = 1 and no zᵢ is zero, ρ > 0.
    pub fn of(d: Vec<T>, z: &[T], rho: T) -> Self {
        /// A multiple of every processor's vectors.
        const WIDEST: usize = 32;
        let n = d.len();
        let padded = n.next_multiple_of(WIDEST);
        // weights of zero add nothing, and where the last pole is no other root comes
        let mut poles = d;
        poles.resize(padded, poles.last().copied().unwrap_or_default());
        let mut weights: Vec<T> = z.iter().map(|&z| z * z).collect();
        weights.resize(padded, T::default());
        let (from, distances) = widest_of(Equation {
            poles: &poles,
            weights: &weights,
            n,
            rho,
        });
        poles.truncate(n);
        Self {
            poles,
            from,
            distances,
        }
    }

    /// d, ascending.
    pub fn poles(&self) -> &[T] {
        &self.poles
    }

    /// λ, ascending.
    pub fn values(&self) -> impl Iterator<Item = T> {
        let pairs = self.from.iter().zip(&self.distances);
        pairs.map(|(&from, &distance)| from + distance)
    }

    /// dᵢ − λⱼ for all i, each to full relative precision.
    #[inline(always)]
    pub fn gaps(&self, j: usize) -> impl Iterator<Item = T> {
        let (from, distance) = (self.from[j], self.distances[j]);
        // from the nearer pole, so that the distance to it keeps all its digits
        self.poles.iter().map(move |&pole| (pole - from) - distance)
    }
}

struct Equation<'a, T> {
    poles: &'a [T],
    /// zᵢ²
    weights: &'a [T],
    n: usize,
    rho: T,
}

/// The equation's left side at one place: the sums over the poles before and behind it, and their slopes.
struct Sides {
    before: f64,
    behind: f64,
    slope_before: f64,
    slope_behind: f64,
}

impl<T: Real> WithSimd for Equation<'_, T> {
    /// For each root, a pole near to it and its distance from there.
    type Output = (Vec<T>, Vec<T>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let (mut from, mut distances) = (Vec::new(), Vec::new());
        for at in 0..self.n {
            let (origin, distance) = if at + 1 < self.n {
                self.between(simd, at)
            } else {
                (at, self.beyond(simd))
            };
            from.push(self.poles[origin]);
            distances.push(distance);
        }
        (from, distances)
    }
}

impl<T: Real> Equation<'_, T> {
    #[inline(always)]
    fn sides<S: Simd>(&self, simd: S, origin: T, distance: T) -> Sides {
        let (origin, distance) = (T::all(simd, origin), T::all(simd, distance));
        let (zero, one) = (T::all(simd, T::default()), T::all(simd, T::ONE));
        let (poles, _) = T::vectors::<S>(self.poles);
        let (weights, _) = T::vectors::<S>(self.weights);
        let (mut before, mut behind) = (zero, zero);
        let (mut slope_before, mut slope_behind) = (zero, zero);
        for (&pole, &weight) in poles.iter().zip(weights) {
            let gap = T::difference(simd, T::difference(simd, pole, origin), distance);
            let inverse = T::quotient(simd, one, gap);
            // the poles before have negative gaps
            let term = T::add_product(simd, weight, inverse, zero);
            let (below, above) = (T::smaller(simd, term, zero), T::larger(simd, term, zero));
            before = T::add_product(simd, below, one, before);
            behind = T::add_product(simd, above, one, behind);
            slope_before = T::add_product(simd, below, inverse, slope_before);
            slope_behind = T::add_product(simd, above, inverse, slope_behind);
        }
        Sides {
            before: T::total(simd, before).into(),
            behind: T::total(simd, behind).into(),
            slope_before: T::total(simd, slope_before).into(),
            slope_behind: T::total(simd, slope_behind).into(),
        }
    }

    /// The root between the poles `at` and `at` + 1: the nearer of them, and the distance from it.
    #[inline(always)]
    fn between<S: Simd>(&self, simd: S, at: usize) -> (usize, T) {
        let (left, right) = (self.poles[at], self.poles[at + 1]);
        let width: f64 = (right - left).into();
        let (mut low, mut high) = (0.0, width / 2.0);
        let middle = self.sides(simd, left, T::from_f64(high));
        let constant = 1.0 / self.rho.into();
        let value = constant + middle.before + middle.behind;
        let origin = if value < 0.0 {
            (low, high) = (-high, 0.0);
            at + 1
        } else {
            at
        };
        // the first guess: of the others, what they add in the middle
        let (near, far): (f64, f64) = (self.weights[at].into(), self.weights[at + 1].into());
        let others = value + (near - far) / (width / 2.0);
        let guess = if origin == at {
            root_of(others, others * width + near + far, near * width)
        } else {
            root_of(others, far + near - others * width, -far * width)
        };
        let from = self.poles[origin];
        // distances of the two poles from the one that distances are counted from
        let (left, right): (f64, f64) = ((left - from).into(), (right - from).into());
        let step = |distance: f64, sides: &Sides, value: f64| {
            let (a, b) = (left - distance, right - distance);
            let slope = sides.slope_before + sides.slope_behind;
            let rest = value - a * sides.slope_before - b * sides.slope_behind;
            distance + root_of(rest, (a + b) * value - a * b * slope, a * b * value)
        };
        (origin, self.converge(simd, from, (low, high), guess, step))
    }

    /// The distance of the last root from the last pole.
    #[inline(always)]
    fn beyond<S: Simd>(&self, simd: S) -> T {
        let from = self.poles[self.n - 1];
        let rho: f64 = self.rho.into();
        // ‖z‖ is 1 but for rounding
        let high = rho * (1.0 + 64.0 * T::UNIT);
        // all poles as one
        let step = |distance: f64, sides: &Sides, value: f64| {
            let slope = sides.slope_before + sides.slope_behind;
            distance - distance * value / (value + distance * slope)
        };
        let weight: f64 = self.weights[self.n - 1].into();
        self.converge(simd, from, (0.0, high), rho * weight.max(0.5), step)
    }

    /// Follows `step` from `guess` to where the equation holds to rounding, within a bracket that every look narrows.
    #[inline(always)]
    fn converge<S: Simd>(
        &self,
        simd: S,
        from: T,
        (mut low, mut high): (f64, f64),
        guess: f64,
        step: impl Fn(f64, &Sides, f64) -> f64,
    ) -> T {
        /// Steps after which every other one halves the bracket: more than any spectrum took.
        const PATIENCE: usize = 12;
        let constant = 1.0 / self.rho.into();
        let mut next = guess;
        let mut count = 0;
        loop {
            // a NaN lies nowhere
            if !(next > low && next < high) || (count > PATIENCE && count % 2 == 0) {
                next = (low + high) / 2.0;
            }
            let distance = T::from_f64(next);
            let wide: f64 = distance.into();
            let sides = self.sides(simd, from, distance);
            let value = constant + sides.before + sides.behind;
            let slope = sides.slope_before + sides.slope_behind;
            let noise = 8.0 * (sides.behind - sides.before) + constant + wide.abs() * slope.abs();
            let narrow = high - low <= 4.0 * T::UNIT * low.abs().max(high.abs());
            if value.abs() <= 2.0 * T::UNIT * noise || narrow || !value.is_finite() {
                return distance;
            }
            if value < 0.0 {
                low = wide;
            } else {
                high = wide;
            }
            next = step(wide, &sides, value);
            count += 1;
        }
    }
}

/// (a − √(a² − 4·b·c))/(2·c), a root of c·x² − a·x + b, by the formula that keeps its digits.
#[inline(always)]
fn root_of(c: f64, a: f64, b: f64) -> f64 {
    let root = (a * a - 4.0 * b * c).abs().sqrt();
    if a <= 0.0 {
        (a - root) / (2.0 * c)
    } else {
        2.0 * b / (a + root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;
    use ndarray::Array2;

    /// Poles that ascend strictly, by gaps as far apart as `spread` powers of ten, and a unit vector without zeros.
    fn problem<T: Real>(n: usize, spread: f64, seed: u64) -> (Vec<T>, Vec<T>) {
        let random = normal(2, n, seed).mapv(f64::from);
        let mut at = -0.3;
        let mut poles = Vec::new();
        for x in random.row(0) {
            at += 10f64.powf(-spread * (0.5 + x / 6.0).clamp(0.0, 1.0)) / n as f64;
            poles.push(T::from_f64(at));
        }
        let z = random.row(1).mapv(|x| x.signum() * (0.05 + x.abs()));
        let length = z.dot(&z).sqrt();
        (poles, z.iter().map(|&z| T::from_f64(z / length)).collect())
    }

    /// The eigenpairs are those of the matrix, with the vectors zᵢ/(dᵢ − λ).
    fn assert_eigenpairs<T: Real>(poles: &[T], z: &[T], rho: f64, tolerance: f64) {
        let n = poles.len();
        let roots = Roots::of(poles.to_vec(), z, T::from_f64(rho));
        let wide = |x: T| -> f64 { x.into() };
        let scale = poles.iter().fold(rho, |m, &d| m.max(wide(d).abs()));
        let mut vectors = Array2::<f64>::zeros((n, n));
        for (j, root) in roots.values().enumerate() {
            let root = wide(root);
            assert!(
                root > wide(poles[j]) - 1e-6 * scale,
                "root {j} is behind its pole"
            );
            for (i, gap) in roots.gaps(j).map(wide).enumerate() {
                assert_eq!(gap > 0.0, i > j, "gap {i} of root {j}: {gap}");
                let off = gap - (wide(poles[i]) - root);
                assert!(off.abs() < tolerance * scale, "gap {i} of root {j}");
                vectors[(j, i)] = wide(z[i]) / gap;
            }
            let mut row = vectors.row_mut(j);
            let length = row.dot(&row).sqrt();
            row /= length;
            // (D + ρ·z·zᵀ)·x = λ·x
            let along: f64 = (0..n).map(|i| wide(z[i]) * vectors[(j, i)]).sum();
            for i in 0..n {
                let x = vectors[(j, i)];
                let off = (wide(poles[i]) - root) * x + rho * wide(z[i]) * along;
                assert!(
                    off.abs() < tolerance * scale,
                    "pair {j}, element {i}: {off}"
                );
            }
        }
        let trace: f64 = roots.values().map(wide).sum();
        let norm: f64 = z.iter().map(|&z| wide(z).powi(2)).sum();
        let expected: f64 = poles.iter().map(|&d| wide(d)).sum::<f64>() + rho * norm;
        assert!(
            (trace - expected).abs() < tolerance * scale * n as f64,
            "trace"
        );
    }

    #[test]
    fn roots_are_eigenvalues_wherever_the_poles_are() {
        for n in [1, 2, 3, 15, 16, 17, 33, 150] {
            for rho in [1e-3, 0.7, 30.0] {
                for (seed, spread) in [(1, 0.0), (2, 2.0), (3, 4.0)] {
                    let (poles, z) = problem::<f64>(n, spread, seed * n as u64);
                    assert_eigenpairs(&poles, &z, rho, 1e-13 * (n as f64 + 9.0));
                    let (poles, z) = problem::<f32>(n, spread.min(2.0), seed * n as u64);
                    assert_eigenpairs(&poles, &z, rho, 1e-6 * (n as f64 + 9.0).sqrt());
                }
            }
        }
    }

    #[test]
    fn tiny_weights_leave_their_poles_where_they_are() {
        let poles = [0.0f64, 1e-9, 0.5, 0.5 + 1e-12, 1.0];
        let z: [f64; 5] = [1e-13, 0.6, 1e-10, 0.8, 1e-15];
        assert_eigenpairs(&poles, &z, 1.0, 1e-14 * 14.0);
    }
}
