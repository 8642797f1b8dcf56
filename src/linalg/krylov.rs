//! Leading eigenpairs of a Gram matrix from a block Krylov space, grown until they have converged.
//!
//! Block Lanczos with full reorthogonalisation (Golub & Underwood 1977; Musco & Musco 2015): all of it products. Worth it
//! where few pairs are wanted: the space needs 4 to 10 times as many vectors as there are pairs, more for flat spectra.

use ndarray::{Array2, ArrayView2, s};

use super::lapack::{Tridiagonal, cholesky_rows, orthonormalise_rows};
use super::product::{gemm, multiply};
use super::real::{row_major, zeros};
use super::rows;
use crate::error::Result;
use crate::random::normal;

/// Eigenvalues, descending, and their eigenvectors, one per row.
pub type Pairs = (Vec<f32>, Array2<f32>);

/// How the space grows, and when it is large enough.
#[derive(Debug, Clone, PartialEq)]
pub struct Growth {
    /// Vectors added at a time.
    pub block: usize,
    /// Vectors before the first look at the pairs.
    pub first: usize,
    /// Beyond this many another way is cheaper.
    pub last: usize,
    /// ‖G·x − λ·x‖ ≤ residual·λ for each pair; `None` accepts them as the first look finds them.
    pub residual: Option<f64>,
}

impl Growth {
    /// Whether two products with M (s, l) for every vector cost less than forming M·Mᵀ, and one with that.
    ///
    /// s²·l flops, and 2·s² for each vector, against 4·s·l for each; products with blocks of 32 run at two thirds of the speed
    /// of the others (Zen 5, 2026-11).
    pub fn is_cheaper_without_gram(&self, (side, length): (usize, usize)) -> bool {
        let slower = if self.block < 64 { 1.6 } else { 1.2 };
        let (s, l) = (side as f64, length as f64);
        self.first as f64 * (4.0 * l - 2.0 * s) * slower < s * l
    }
}

/// The q largest eigenvalues, descending, and their eigenvectors, one per row, of a positive semidefinite matrix G (s, s)
/// that is known by `apply`: x (b, s) → G·xᵀ (s, b).
///
/// `None` if the space would outgrow [`Growth::last`], or is exhausted before (G has too small a rank).
pub fn leading(
    apply: impl Fn(ArrayView2<f32>) -> Result<Array2<f32>>,
    side: usize,
    q: usize,
    growth: &Growth,
    seed: u64,
) -> Result<Option<Pairs>> {
    let block = growth.block;
    let Some(mut space) = Space::start(&apply, side, growth, seed)? else {
        return Ok(None);
    };
    let mut look_at = growth.first.max(q + block);
    loop {
        let Some(outside) = space.step(&apply)? else {
            return Ok(None);
        };
        if space.size >= look_at {
            let projected = Tridiagonal::reduce(space.projection())?;
            match growth.residual {
                None => {
                    let (pairs, _) = space.lift(&projected, q)?;
                    return Ok(Some(pairs).filter(|pairs| !fills(block, &pairs.0)));
                }
                Some(wanted) => {
                    // values closer together than that are not told apart by it
                    let beyond = (2 * q).min(space.size - 1);
                    let last = projected.values_from(q - 1..q)?[0];
                    let beyond = projected.values_from(beyond..beyond + 1)?[0];
                    let close = f64::from(last - beyond) < 4.0 * wanted * f64::from(last);
                    let wanted = if close { 4.0 * wanted * wanted } else { wanted };
                    let mut worst = glimpse(&projected, q, &outside)?;
                    if worst <= wanted {
                        let (pairs, vectors) = space.lift(&projected, q)?;
                        worst = largest_residual(&pairs.0, &vectors, &outside);
                        if worst <= wanted {
                            return Ok(Some(pairs).filter(|pairs| !fills(block, &pairs.0)));
                        }
                    }
                    look_at = space.size + steps_left(worst / wanted, side, block) * block;
                }
            }
        }
        if look_at > growth.last || space.size + block > growth.last {
            return Ok(None);
        }
        space.take(outside);
    }
}

/// Whether a value repeats as often as a block has rows. A space that such a block spans has no more copies of it, and no
/// residual tells of those that are missing.
fn fills(block: usize, values: &[f32]) -> bool {
    // Gaussian and power-law spectra have 2·10⁻² there at least
    let same = |run: &[f32]| run[0] - run[block - 1] <= 1e-5 * run[0] + 1e-6 * values[0];
    values.windows(block).any(same)
}

/// Blocks to add before the next look: near convergence the residual falls tenfold with every 0.06·s to 0.09·s vectors
/// (Gaussian and power-law spectra, q from 0.05·s to 0.2·s, 2026-11).
fn steps_left(excess: f64, side: usize, block: usize) -> usize {
    let vectors = 0.085 * side as f64 * excess.log10().max(0.1);
    ((vectors / block as f64).ceil() as usize).max(1)
}

/// An orthonormal basis, and the matrix as it acts on it.
struct Space {
    /// (capacity, s), of which `size` rows are filled
    basis: Array2<f32>,
    /// (capacity, capacity), upper half: xᵢ·G·xⱼ
    projection: Array2<f32>,
    block: usize,
    size: usize,
}

/// What G makes of the last block that lies outside the space: rows = factor·directions.
struct Outside {
    factor: Array2<f32>,
    directions: Array2<f32>,
}

impl Space {
    fn start(
        apply: impl Fn(ArrayView2<f32>) -> Result<Array2<f32>>,
        side: usize,
        growth: &Growth,
        seed: u64,
    ) -> Result<Option<Self>> {
        let capacity = growth.last.min(side);
        let block = growth.block;
        if block > capacity {
            return Ok(None);
        }
        let mut first = in_rows(&apply(normal(block, side, seed).view())?);
        rows::to_unit_length(first.view_mut());
        // values that dwarf the rest make all rows nearly the same
        orthonormalise_rows(first.view_mut())?;
        let mut basis = zeros(capacity, side);
        basis.slice_mut(s![..block, ..]).assign(&first);
        Ok(Some(Self {
            basis,
            projection: zeros(capacity, capacity),
            block,
            size: block,
        }))
    }

    /// Applies G to the last block, notes how it acts within the space, and returns what lies outside.
    fn step(
        &mut self,
        apply: impl Fn(ArrayView2<f32>) -> Result<Array2<f32>>,
    ) -> Result<Option<Outside>> {
        let (block, size) = (self.block, self.size);
        let last = size - block;
        let known = self.basis.slice(s![..size, ..]);
        let mut beyond = apply(self.basis.slice(s![last..size, ..]))?;
        let large = frobenius(&beyond);
        let mut part_within = |of: ArrayView2<f32>| {
            let inside = gemm(of, false, beyond.view(), false);
            multiply(&mut beyond.view_mut(), 1.0, of.t(), -1.0, inside.view());
            inside
        };
        // first what is large: in exact arithmetic, all of it lies in the last two blocks …
        let near = last.saturating_sub(block);
        let inside = part_within(known.slice(s![near.., ..]));
        let own = inside.slice(s![last - near.., ..]);
        let own = (&own + &own.t()) * 0.5;
        self.projection
            .slice_mut(s![last..size, last..size])
            .assign(&own);
        // … then what rounding left of the space
        part_within(known);
        if frobenius(&beyond) <= EXHAUSTED * large {
            return Ok(None);
        }
        let mut directions = in_rows(&beyond);
        Ok(orthonormalise(&mut directions).map(|factor| Outside { factor, directions }))
    }

    /// Grows the space by what lay outside.
    fn take(&mut self, outside: Outside) {
        let (block, size) = (self.block, self.size);
        self.projection
            .slice_mut(s![size - block..size, size..size + block])
            .assign(&outside.factor);
        self.basis
            .slice_mut(s![size..size + block, ..])
            .assign(&outside.directions);
        self.size += block;
    }

    fn projection(&self) -> Array2<f32> {
        self.projection
            .slice(s![..self.size, ..self.size])
            .to_owned()
    }

    /// The leading pairs of G, and their eigenvectors within the space.
    fn lift(&self, projected: &Tridiagonal<f32>, q: usize) -> Result<(Pairs, Array2<f32>)> {
        let (values, inner) = projected.leading(q)?;
        let vectors = gemm(
            inner.view(),
            false,
            self.basis.slice(s![..self.size, ..]),
            false,
        );
        Ok(((values, vectors), inner))
    }
}

/// The largest residual among the last few of q pairs, which converge last, without computing the others.
fn glimpse(projected: &Tridiagonal<f32>, q: usize, outside: &Outside) -> Result<f64> {
    const LOOKED_AT: usize = 6;
    let (values, vectors) = projected.glimpse(q - q.min(LOOKED_AT)..q)?;
    Ok(largest_residual(&values, &vectors, outside))
}

/// max ‖G·x − λ·x‖/λ: G moves a vector of the space out of it through its last block alone.
fn largest_residual(values: &[f32], inner: &Array2<f32>, outside: &Outside) -> f64 {
    let block = outside.factor.nrows();
    let last = inner.slice(s![.., inner.ncols() - block..]);
    let escaping = gemm(last, false, outside.factor.view(), false);
    let mut worst = 0f64;
    for (row, &value) in escaping.rows().into_iter().zip(values) {
        worst = worst.max(rows::norm(row) / f64::from(value).max(f64::MIN_POSITIVE));
    }
    worst
}

fn in_rows(columns: &Array2<f32>) -> Array2<f32> {
    row_major::<f32, f32>(columns.t())
}

fn frobenius(x: &Array2<f32>) -> f64 {
    rows::norm(x.flatten().view())
}

/// Orthonormalises independent rows; returns the factor C of rows = C·directions.
fn orthonormalise(directions: &mut Array2<f32>) -> Option<Array2<f32>> {
    // relative to the largest row, so that a matrix of tiny numbers is not mistaken for one of small rank
    let scale = rows::longest(directions) as f32;
    if !scale.is_normal() {
        return None;
    }
    *directions /= scale;
    let first = cholesky_rows(directions.view_mut(), 1e-3)?;
    let second = cholesky_rows(directions.view_mut(), 0.5)?;
    Some(first.dot(&second) * scale)
}

/// What is left of a block below this share of it is rounding: G maps the space into itself. A value 40,000 times the others
/// would leave some 3·10⁻⁵.
const EXHAUSTED: f64 = 1e-5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::operand::{Backend, Operand};
    use crate::linalg::product::short_side_first;

    /// For spaces of a side of 200 to 300.
    fn growth(residual: f64) -> Growth {
        Growth {
            block: 20,
            first: 100,
            last: 180,
            residual: Some(residual),
        }
    }

    #[test]
    fn pairs_are_those_of_the_gram_matrix_whether_it_is_formed_or_not() {
        let (q, growth) = (9, growth(1e-3));
        for (m, n) in [(200, 333), (333, 200), (200, 200)] {
            let matrix = normal(m, n, 3);
            let short = Operand::new(short_side_first(matrix.view()), &Backend::Cpu).expect("m");
            let side = short.dim().0;
            let gram = short.gram().expect("multiplies");
            let formed = leading(|x| gram.apply(x), side, q, &growth, 7);
            let unformed = leading(|x| short.square(x), side, q, &growth, 7);
            let gram = gram.into_host().expect("it is there");
            let (truth, _) = Tridiagonal::reduce(gram.mapv(f64::from))
                .and_then(|reduced| reduced.leading(q))
                .expect("converges");
            for found in [formed, unformed] {
                let (values, vectors) = found.expect("runs").expect("converges");
                for ((x, &value), &wanted) in vectors.rows().into_iter().zip(&values).zip(&truth) {
                    // the square of the residual, over a gap of some hundredths
                    assert!(
                        (f64::from(value) / wanted - 1.0).abs() < 1e-4,
                        "{value} for {wanted}"
                    );
                    let off = gram.dot(&x) - &x * value;
                    // twice what was asked for: rounding, 200 terms of 6e-8 beside it, is small
                    assert!(rows::norm(off.view()) < 2e-3 * f64::from(value));
                }
            }
        }
    }

    #[test]
    fn values_closer_together_than_the_residual_are_found_or_left_to_another_way() {
        let growth = growth(5e-3);
        for width in [0.0f32, 1e-3, 3e-3, 1e-2] {
            let values: Vec<f32> = (0..300)
                .map(|i| 1.0 + width * (1.0 - i as f32 / 300.0))
                .collect();
            let diagonal = ndarray::Array1::from(values.clone());
            let apply = |x: ArrayView2<f32>| Ok((&x * &diagonal).reversed_axes());
            let Some((found, _)) = leading(apply, 300, 20, &growth, 7).expect("runs") else {
                continue;
            };
            for (found, value) in found.iter().zip(&values) {
                // 1e-4 on σ
                let off = (found / value - 1.0).abs();
                assert!(off < 2e-4, "{width}: {off:.1e} off");
            }
        }
    }

    #[test]
    fn too_small_a_rank_is_left_to_another_way_at_once() {
        let growth = growth(1e-3);
        // two blocks are all there is; what comes out of the second, or out of that, is rounding
        let (left, right) = (normal(200, 40, 1), normal(40, 300, 2));
        let matrix = gemm(left.view(), false, right.view(), false);
        let short = Operand::new(matrix.view(), &Backend::Cpu).expect("m");
        let applied = std::cell::Cell::new(0);
        let apply = |x: ArrayView2<f32>| {
            applied.set(applied.get() + 1);
            short.square(x)
        };
        let found = leading(apply, 200, 9, &growth, 7).expect("runs");
        assert!(found.is_none() && applied.get() <= 4, "{}", applied.get());
    }

    #[test]
    fn the_gram_matrix_is_formed_where_that_costs_less() {
        let growth = |block, first| Growth {
            block,
            first,
            last: first,
            residual: None,
        };
        // of a square, two products with M cost what two with the Gram matrix do and forming it, at half the side
        let square = (3072, 3072);
        assert!(growth(64, 704).is_cheaper_without_gram(square));
        assert!(!growth(64, 1472).is_cheaper_without_gram(square));
        // of a long one, four with it against one
        assert!(growth(64, 384).is_cheaper_without_gram((2048, 8192)));
        assert!(!growth(64, 512).is_cheaper_without_gram((2048, 8192)));
        assert!(!growth(32, 384).is_cheaper_without_gram((2048, 8192)));
    }
}
