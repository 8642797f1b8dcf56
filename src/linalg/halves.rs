//! Leading eigenpairs of a tridiagonal matrix from those of its two halves.
//!
//! Divide and conquer (Cuppen 1981; Gu & Eisenstat 1995), whose last and dearest step is done for the wanted pairs alone:
//! LAPACK's stedc computes all of them. Small halves are LAPACK's.

use std::ops::Range;

use ndarray::{Array2, Axis, s};

use super::product::multiply;
use super::real::{Real, zeros};
use super::secular::Roots;
use crate::error::Result;
use crate::lanes::widest;

/// T = diag(T₁, T₂) + ρ·u·uᵀ, with T₁ = q₁ᵀ·diag(d₁)·q₁ and T₂ likewise: D + ρ·z·zᵀ in the basis of q₁ and q₂.
struct Halves<T> {
    /// Eigenvectors of each half, one per row.
    vectors: [Array2<T>; 2],
    /// The eigenvalues of both.
    d: Vec<T>,
    /// ‖z‖ = 1
    z: Vec<T>,
    rho: T,
}

/// What became of D + ρ·z·zᵀ after the entries that decouple were set aside.
struct Deflated<T> {
    d: Vec<T>,
    z: Vec<T>,
    /// Entries that stay coupled, by ascending d.
    coupled: Vec<usize>,
    /// Entries that are eigenpairs as they stand.
    alone: Vec<usize>,
    /// Rotations of two entries, in the order they were made.
    rotations: Vec<(usize, usize, T, T)>,
}

/// Vectors that are put together at a time.
const AT_ONCE: usize = 512;

/// Sides from which halves are worth their own step.
pub const WORTH_IT: usize = 128;

/// The q largest eigenvalues, descending, and their eigenvectors, one per row, of the tridiagonal matrix (d, e).
pub fn leading<T: Real>(d: &[T], e: &[T], q: usize) -> Result<(Vec<T>, Array2<T>)> {
    // what is negligible beside the unit vector z is told on a matrix of the size of 1; powers of two scale exactly
    let size = power_of_two(d.iter().chain(e));
    let scaled = |values: &[T]| values.iter().map(|&x| x / size).collect::<Vec<T>>();
    let halves = Halves::of(&scaled(d), &scaled(e))?;
    let side = d.len();
    let deflated = halves.deflate();
    let roots = deflated.roots(halves.rho);
    let z = deflated.rederived_z(&roots);

    // the q largest of both kinds, as (value, coupled?, position in its list)
    let mut pairs: Vec<(T, bool, usize)> = Vec::with_capacity(side);
    pairs.extend(
        roots
            .values()
            .enumerate()
            .map(|(at, root)| (root, true, at)),
    );
    let alone = deflated.alone.iter().enumerate();
    pairs.extend(alone.map(|(at, &entry)| (deflated.d[entry], false, at)));
    pairs.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal));
    pairs.truncate(q);

    let mut vectors = zeros::<T>(q, side);
    let mut inner = zeros::<T>(q.min(AT_ONCE), side);
    for (pairs, mut vectors) in pairs
        .chunks(AT_ONCE)
        .zip(vectors.axis_chunks_iter_mut(Axis(0), AT_ONCE))
    {
        let mut inner = inner.slice_mut(s![..pairs.len(), ..]);
        for (row, &(_, coupled, at)) in inner.rows_mut().into_iter().zip(pairs) {
            let row = row.into_slice().expect("rows of a fresh array are dense");
            row.fill(T::default());
            if coupled {
                deflated.vector(&roots, &z, at, row);
            } else {
                row[deflated.alone[at]] = T::ONE;
            }
            deflated.rotate(row);
        }
        for (half, basis) in halves.ranges().into_iter().zip(&halves.vectors) {
            multiply(
                &mut vectors.slice_mut(s![.., half.clone()]),
                T::default(),
                inner.slice(s![.., half]),
                T::ONE,
                basis.view(),
            );
        }
    }
    Ok((pairs.iter().map(|pair| pair.0 * size).collect(), vectors))
}

/// All eigenpairs of a tridiagonal matrix, in some order.
fn all<T: Real>(d: &[T], e: &[T]) -> Result<(Vec<T>, Array2<T>)> {
    if d.len() < WORTH_IT {
        T::all_eigenpairs(d, e)
    } else {
        leading(d, e, d.len())
    }
}

/// The size of the largest of some numbers; 1 if all are zero.
fn power_of_two<'a, T: Real>(values: impl Iterator<Item = &'a T>) -> T {
    let largest = values.map(|&x| x.into().abs()).fold(0.0, f64::max);
    if largest.is_normal() {
        T::from_f64(largest.log2().floor().exp2())
    } else {
        T::ONE
    }
}

impl<T: Real> Halves<T> {
    fn of(d: &[T], e: &[T]) -> Result<Self> {
        let (side, cut) = (d.len(), d.len() / 2);
        let between = e[cut - 1];
        let magnitude = if between < T::default() {
            -between
        } else {
            between
        };
        let mut d = d.to_vec();
        d[cut - 1] = d[cut - 1] - magnitude;
        d[cut] = d[cut] - magnitude;
        let first = all(&d[..cut], &e[..cut - 1])?;
        let second = all(&d[cut..], &e[cut..side - 1])?;
        // u has 1 at the end of the first half and the sign of what lay between at the start of the second
        let half = T::from_f64(std::f64::consts::FRAC_1_SQRT_2);
        let sign = if between < T::default() { -half } else { half };
        let ends = first.1.column(cut - 1);
        let starts = second.1.column(0);
        let z = ends
            .iter()
            .map(|&x| x * half)
            .chain(starts.iter().map(|&x| x * sign));
        Ok(Self {
            z: z.collect(),
            d: [first.0, second.0].concat(),
            rho: magnitude + magnitude,
            vectors: [first.1, second.1],
        })
    }

    fn ranges(&self) -> [Range<usize>; 2] {
        let cut = self.vectors[0].nrows();
        [0..cut, cut..self.d.len()]
    }

    /// Sets aside what decouples to working precision: a negligible z, or two equal d, of which a rotation frees one
    /// (LAPACK laed2).
    fn deflate(&self) -> Deflated<T> {
        let (mut d, mut z) = (self.d.clone(), self.z.clone());
        let size = |x: T| -> f64 {
            let x: f64 = x.into();
            x.abs()
        };
        let largest = |values: &[T]| values.iter().map(|&x| size(x)).fold(0.0, f64::max);
        let tolerance = 8.0 * T::UNIT * largest(&d).max(largest(&z));
        let mut order: Vec<usize> = (0..d.len()).collect();
        order.sort_by(|&a, &b| d[a].partial_cmp(&d[b]).unwrap_or(std::cmp::Ordering::Equal));
        let (mut coupled, mut alone, mut rotations) = (Vec::new(), Vec::new(), Vec::new());
        let mut before: Option<usize> = None;
        for j in order {
            if size(self.rho) * size(z[j]) <= tolerance {
                alone.push(j);
                continue;
            }
            if let Some(p) = before {
                let (zp, zj): (f64, f64) = (z[p].into(), z[j].into());
                let length = zp.hypot(zj);
                let (c, s) = (zj / length, -zp / length);
                let (dp, dj): (f64, f64) = (d[p].into(), d[j].into());
                if ((dj - dp) * c * s).abs() <= tolerance {
                    z[j] = T::from_f64(length);
                    z[p] = T::default();
                    d[p] = T::from_f64(dp * c * c + dj * s * s);
                    d[j] = T::from_f64(dp * s * s + dj * c * c);
                    rotations.push((p, j, T::from_f64(c), T::from_f64(s)));
                    alone.push(p);
                } else {
                    coupled.push(p);
                }
            }
            before = Some(j);
        }
        coupled.extend(before);
        Deflated {
            d,
            z,
            coupled,
            alone,
            rotations,
        }
    }
}

impl<T: Real> Deflated<T> {
    /// The eigenvalues of the coupled part.
    fn roots(&self, rho: T) -> Roots<T> {
        let pick = |from: &[T]| -> Vec<T> { self.coupled.iter().map(|&i| from[i]).collect() };
        Roots::of(pick(&self.d), &pick(&self.z), rho)
    }

    /// Coupled eigenvector `at` in the basis of the halves' own: ẑᵢ/(dᵢ − λ), of unit length, before the rotations.
    fn vector(&self, roots: &Roots<T>, z: &[T], at: usize, row: &mut [T]) {
        let mut square = 0f64;
        for ((&entry, &z), gap) in self.coupled.iter().zip(z).zip(roots.gaps(at)) {
            let x = z / gap;
            row[entry] = x;
            let wide: f64 = x.into();
            square += wide * wide;
        }
        let scale = T::from_f64(1.0 / square.sqrt());
        row.iter_mut().for_each(|x| *x = *x * scale);
    }

    /// Undoes the rotations that set entries aside.
    fn rotate(&self, row: &mut [T]) {
        for &(p, j, c, s) in self.rotations.iter().rev() {
            let (xp, xj) = (row[p], row[j]);
            row[p] = c * xp - s * xj;
            row[j] = s * xp + c * xj;
        }
    }

    /// The z for which the computed roots are the exact eigenvalues: with it, the vectors are orthogonal (Gu & Eisenstat).
    fn rederived_z(&self, roots: &Roots<T>) -> Vec<T> {
        let d = roots.poles();
        let mut products = vec![T::ONE; d.len()];
        widest(
            #[inline(always)]
            || {
                for (j, &pole) in d.iter().enumerate() {
                    // of its own root, a pole takes the gap alone
                    for (i, ((product, &d), gap)) in
                        products.iter_mut().zip(d).zip(roots.gaps(j)).enumerate()
                    {
                        let apart = if i == j { T::ONE } else { d - pole };
                        *product = *product * (gap / apart);
                    }
                }
            },
        );
        products
            .into_iter()
            .zip(&self.coupled)
            .map(|(product, &entry)| {
                let product: f64 = product.into();
                let sign: f64 = self.z[entry].into();
                T::from_f64((-product).max(0.0).sqrt().copysign(sign))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;

    /// ‖T·x − λ·x‖, orthogonality and values against LAPACK's own, for the q largest.
    fn assert_pairs(d: &[f64], e: &[f64]) {
        let side = d.len();
        let all = f64::all_eigenpairs(d, e).expect("converges").0;
        for q in [1, side / 5, side] {
            let (values, vectors) = leading(d, e, q).expect("converges");
            let scale = all.iter().fold(1e-300, |m: f64, x| m.max(x.abs()));
            for (i, (&value, x)) in values.iter().zip(vectors.rows()).enumerate() {
                assert!((value - all[side - 1 - i]).abs() < 1e-13 * scale * side as f64);
                let tx = |k: usize| {
                    let below = if k > 0 { e[k - 1] * x[k - 1] } else { 0.0 };
                    let above = if k + 1 < side { e[k] * x[k + 1] } else { 0.0 };
                    below + d[k] * x[k] + above
                };
                let off: f64 = (0..side).map(|k| (tx(k) - value * x[k]).powi(2)).sum();
                assert!(
                    off.sqrt() < 1e-13 * scale * side as f64,
                    "pair {i} of {side}"
                );
            }
            let unit = vectors.dot(&vectors.t()) - Array2::<f64>::eye(q);
            assert!(unit.iter().all(|x| x.abs() < 1e-12), "{q} of {side}");
        }
    }

    #[test]
    fn pairs_of_a_tridiagonal_matrix_come_from_its_halves() {
        for side in [5, 16, 61, 200] {
            let random = normal(2, side, side as u64).mapv(f64::from);
            assert_pairs(
                random.row(0).as_slice().expect("dense"),
                &random.row(1).to_vec()[..side - 1],
            );
        }
    }

    #[test]
    fn equal_values_and_decoupled_halves_deflate() {
        let side = 64;
        // the second difference, a multiple of the identity, Wilkinson's matrix of close pairs, and zero
        assert_pairs(&vec![2.0; side], &vec![-1.0; side - 1]);
        assert_pairs(&vec![3.0; side], &vec![0.0; side - 1]);
        let wilkinson: Vec<f64> = (0..side).map(|i| (i as f64 - 31.5).abs()).collect();
        assert_pairs(&wilkinson, &vec![1.0; side - 1]);
        assert_pairs(&vec![0.0; side], &vec![0.0; side - 1]);
        let glued: Vec<f64> = (0..side).map(|i| (i % 16) as f64).collect();
        let weak: Vec<f64> = (1..side)
            .map(|i| if i % 16 == 0 { 1e-14 } else { 0.3 })
            .collect();
        assert_pairs(&glued, &weak);
    }
}
