//! From short singular vectors to the whole: the values, the long vectors, and a look at what came out.

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::algorithm::{Route, Svd};
use super::certificate::certify_operand;
use super::lapack::orthonormalise_rows;
use super::operand::{Operand, pass};
use super::product::{gemm, multiply, short_side_first};
use super::rows;
use super::svd::Problem;
use crate::error::Result;
use crate::random::random_signs;

impl Problem<'_> {
    /// Of the values so small beside the first that f32 vectors cannot give them to the tolerance: ‖sᵢ·M‖ in f64,
    /// descending. They are the last ones.
    pub(super) fn small_values(&self, short: &Array2<f64>) -> Vec<f64> {
        // as many columns at a time as keep the copies in f64 small
        const COLUMNS: usize = 512;
        let matrix = short_side_first(self.matrix);
        let lengths = |rows: ArrayView2<f64>| {
            let mut squares = vec![0f64; rows.nrows()];
            for columns in matrix.axis_chunks_iter(Axis(1), COLUMNS) {
                let columns = columns.mapv(f64::from);
                let product = gemm(rows, false, columns.view(), false);
                for (square, row) in squares.iter_mut().zip(product.rows()) {
                    *square += row.dot(&row);
                }
            }
            squares.into_iter().map(f64::sqrt).collect::<Vec<f64>>()
        };
        let largest = lengths(short.slice(s![..1, ..]))[0];
        let least = largest * f64::from(f32::EPSILON) / self.algorithm.tolerance;
        // the values descend: the first too small one is found by halving
        let (mut low, mut high) = (0, short.nrows());
        while low < high {
            let middle = low + (high - low) / 2;
            if lengths(short.slice(s![middle..=middle, ..]))[0] < least {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        let mut small = lengths(short.slice(s![low.., ..]));
        small.sort_by(|a, b| b.total_cmp(a));
        small
    }

    /// σ and the long vectors from the short ones (q, s), and a look at the whole.
    pub(super) fn complete(&self, short: Array2<f32>, route: Route) -> Result<Svd> {
        let mut short = self.short.beside(short)?;
        // one exact pass over the matrix: σᵢ = ‖sᵢ·M‖ is a Rayleigh quotient, quadratically better than sᵢ
        let mut long = self.short.times(&short)?;
        let sigma = long.normalise()?;
        let sigma: Vec<f32> = sigma.into_iter().map(|x| x as f32).collect();
        // equal values may come out of order by a rounding error; the file promises that they descend
        let mut order: Vec<usize> = (0..sigma.len()).collect();
        order.sort_by(|&a, &b| sigma[b].total_cmp(&sigma[a]));
        if !order.is_sorted() {
            // one after the other, so that only one of them is there twice
            short.permute(&order)?;
            long.permute(&order)?;
        }
        let sigma: Array1<f32> = order.iter().map(|&i| sigma[i]).collect();
        // vᵢ = sᵢ·M/σᵢ are as orthonormal as the sᵢ, but for what rounding left of sⱼ in sᵢ, of which σⱼ/σᵢ are there
        let last = sigma[sigma.len() - 1];
        let large = sigma.iter().take_while(|&&x| x > 4.0 * last).count();
        match &mut long {
            // rough ones never are
            Operand::Host(x) if route != Route::Fast => {
                orthonormalise(x.view_mut(), large, self.algorithm.seed)?;
            }
            // on a device, this takes less time than to find out whether it is needed
            others => others.orthonormalise()?,
        }
        self.certified(short, sigma, long, route)
    }

    pub(super) fn certified(
        &self,
        short: Operand<'static>,
        sigma: Array1<f32>,
        long: Operand<'static>,
        route: Route,
    ) -> Result<Svd> {
        let certificate = certify_operand(&self.short, &short, &sigma, &long, self.algorithm.seed)?;
        let (short, long) = (short.into_host()?, long.into_host()?);
        let (u, v) = if self.is_wide() {
            (short, long)
        } else {
            (long, short)
        };
        let left_squared = self.left_squared(&u, &sigma, &v);
        Ok(Svd {
            u,
            sigma,
            v,
            norm_squared: self.norm_squared,
            left_squared,
            route,
            certificate,
            refused: None,
        })
    }

    /// ‖M − uᵀ·diag(σ)·v‖², Frobenius.
    fn left_squared(&self, u: &Array2<f32>, sigma: &Array1<f32>, v: &Array2<f32>) -> f64 {
        // rows at a time, so that the product is small beside M
        const ROWS: usize = 512;
        let kept: f64 = sigma.iter().map(|&x| f64::from(x).powi(2)).sum();
        let left = (self.norm_squared - kept).max(0.0);
        let (side, _) = self.short.dim();
        // σ in f32 tells its square to 2⁻²³; with all triplets nothing but rounding is left
        if left > 1e-3 * self.norm_squared || sigma.len() == side {
            return left;
        }
        let mut sum = 0.0;
        let sigma = sigma.view().insert_axis(Axis(1));
        for (rows, part) in
            (self.matrix.axis_chunks_iter(Axis(0), ROWS)).zip(u.axis_chunks_iter(Axis(1), ROWS))
        {
            let scaled = &part * &sigma;
            let off = &rows - &gemm(scaled.view(), true, v.view(), false);
            sum += off.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        }
        sum
    }

    pub(super) fn is_wide(&self) -> bool {
        self.matrix.nrows() <= self.matrix.ncols()
    }
}

/// As [`orthonormalise_rows`], unless the rows are orthonormal already, or are but for the first `large`.
fn orthonormalise(mut x: ArrayViewMut2<f32>, large: usize, seed: u64) -> Result<()> {
    // what is taken out of the others may cost a fraction of making all of them orthonormal
    const SHARE_MAX: usize = 8;
    if (1..=x.nrows() / SHARE_MAX).contains(&large) {
        take_out_first(x.view_mut(), large)?;
    }
    match are_orthonormal(x.view(), seed)? {
        true => Ok(()),
        false => orthonormalise_rows(x),
    }
}

/// Makes the first rows orthonormal, and takes them out of the others.
fn take_out_first(x: ArrayViewMut2<f32>, count: usize) -> Result<()> {
    let (mut first, mut rest) = x.split_at(Axis(0), count);
    orthonormalise_rows(first.view_mut())?;
    let inside = gemm(rest.view(), false, first.view(), true);
    multiply(&mut rest, 1.0, inside.view(), -1.0, first.view());
    Ok(())
}

/// Whether the rows (q, l) are orthonormal to single precision: the products of any one with all others are 4·ε·√l together at
/// most, and 10⁻⁵, root of the sum of squares.
///
/// For z of independent signs, E((x·xᵀ − 1)·z)ᵢ² is that sum; a single product shows as it is.
fn are_orthonormal(x: ArrayView2<f32>, seed: u64) -> Result<bool> {
    const PROBES: usize = 16;
    let off_max = (4.0 * f64::from(f32::EPSILON) * (x.ncols() as f64).sqrt()).min(1e-5);
    let z = random_signs(PROBES, x.nrows(), seed);
    let [back] = pass([(Operand::Host(x.into()), z.view())], |[there]| there)?;
    let off = back - z;
    let most = PROBES as f64 * off_max.powi(2);
    Ok((off.columns().into_iter()).all(|of_row| rows::norm_squared(of_row) <= most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;

    fn orthonormal() -> Array2<f32> {
        let mut rows = normal(40, 300, 1);
        orthonormalise_rows(rows.view_mut()).expect("orthonormal");
        rows
    }

    #[test]
    fn rows_are_left_alone_where_single_precision_tells_no_difference() {
        let rows = orthonormal();
        for off in [3e-6, 3e-5] {
            // one product of all
            let mut leaning = rows.clone();
            leaning.row_mut(30).scaled_add(off, &rows.row(20));
            let mut x = leaning.clone();
            orthonormalise(x.view_mut(), 0, 7).expect("orthonormal");
            assert_eq!(x == leaning, off < 1e-5);
            let product = x.row(30).dot(&x.row(20));
            assert!(product.abs() < 4e-6, "{product:e} of {off:e}");
        }
        // of each row with any other 3·10⁻⁶ at most, and 1.3·10⁻⁵ with all
        let mut leaning = rows.clone();
        leaning += &random_signs(40, 40, 3).dot(&rows).mapv(|x| 1.5e-6 * x);
        let mut x = leaning.clone();
        orthonormalise(x.view_mut(), 0, 7).expect("orthonormal");
        assert_ne!(x, leaning);
    }

    #[test]
    fn the_first_rows_are_taken_out_of_the_others() {
        let rows = orthonormal();
        let mut leaning = rows.clone();
        let along = &rows.row(0) * 0.01 - &rows.row(2) * 0.02;
        let others = leaning.rows_mut().into_iter().skip(1);
        others.for_each(|mut row| row += &along);
        let mut x = leaning.clone();
        take_out_first(x.view_mut(), 3).expect("multiplies");
        for ((i, j), product) in x.dot(&x.t()).indexed_iter() {
            let wanted = if i == j { 1.0 } else { 0.0 };
            // among themselves, the others are what they were
            let is_told = i.min(j) < 3;
            assert!(!is_told || (product - wanted).abs() < 2e-6, "({i}, {j})");
        }
        // and then, nothing but their lengths is off: 10⁻⁴
        orthonormalise(leaning.view_mut(), 3, 7).expect("orthonormal");
        let off = leaning.dot(&leaning.t()) - Array2::<f32>::eye(40);
        assert!(off.iter().all(|x| x.abs() < 2e-6));
    }
}
