//! The leading singular triplets of one weight.
//!
//! Eigenpairs of the Gram matrix on the short side, products for the long side. Single precision squares the condition
//! number: where κ = σ₁/σ_q is too large for the tolerance, the Gram matrix is formed and solved in double precision.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use serde::{Deserialize, Serialize};

use super::blas::{self, Real, add_gram, gemm, orthonormalise_rows, top_eigenpairs};
use crate::error::{Error, Result};
use crate::random::SplitMix;

/// How a matrix is decomposed, and what the result promises.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Algorithm {
    pub name: String,
    /// Largest relative error of each kept singular value.
    pub tolerance: f64,
    /// Seed of the random probes that check the result; no result depends on it.
    pub seed: u64,
    pub backend: String,
}

impl Default for Algorithm {
    fn default() -> Self {
        Self {
            name: "gram".into(),
            tolerance: 1e-4,
            seed: 0,
            backend: "openblas".into(),
        }
    }
}

/// Which way the triplets were computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// Gram matrix in f32.
    GramF32,
    /// Gram matrix in f64: the guaranteed route.
    GramF64,
    /// LAPACK's full decomposition in f64, should the certificate ever refuse the others.
    Full,
}

/// What an independent look at the factors found, with random probes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// ‖M·v − σ·u‖ and ‖Mᵀ·u − σ·v‖, relative to σ₁, root mean square over the triplets, the larger of the two.
    pub residual: f64,
    /// Distance of u·uᵀ and v·vᵀ from the identity, root mean square per row, the larger of the two.
    pub orthogonality: f64,
}

/// The q leading singular triplets of a matrix M (m, n), vectors in rows.
#[derive(Debug, Clone)]
pub struct Svd {
    /// (q, m)
    pub u: Array2<f32>,
    /// (q,), descending
    pub sigma: Array1<f32>,
    /// (q, n)
    pub v: Array2<f32>,
    pub route: Route,
    pub certificate: Certificate,
}

/// Single precision is accepted while 4·κ²·2⁻²⁴ stays under the tolerance (measured error: 0.8 to 2.1 κ²·2⁻²⁴).
const F32_ERROR_PER_KAPPA2: f64 = 4.0 * 5.96e-8;

/// Above this share of the full rank σ_q is small and single precision never passes: start in double.
const F64_SHARE: f64 = 0.9;

/// Below this side double precision costs nothing worth saving.
const F64_SIDE: usize = 192;

/// How many of the leading singular triplets are asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wanted {
    /// This many, 1 ≤ q ≤ min(m, n).
    Triplets(usize),
    /// As few as hold this share of ‖M‖², 0 < share ≤ 1.
    Energy(f64),
}

/// All min(m, n) singular values of `matrix` (m, n), descending.
///
/// # Errors
/// LAPACK does not converge: NaN or Inf in the matrix, in practice.
pub fn spectrum(matrix: ArrayView2<f32>) -> Result<Vec<f32>> {
    let wide = matrix.nrows() <= matrix.ncols();
    let gram = gram::<f64>(matrix, wide);
    let side = gram.nrows();
    let (values, _) = top_eigenpairs(gram, side)?;
    Ok(values.iter().map(|&x| x.max(0.0).sqrt() as f32).collect())
}

/// The fewest leading values that hold `share` of the sum of all squares, at least one.
fn rank_of_energy(sigma: &[f32], share: f64) -> usize {
    let squares = || sigma.iter().map(|&x| f64::from(x).powi(2));
    let wanted = share * squares().sum::<f64>();
    let mut kept = 0.0;
    let enough = squares().position(|x| {
        kept += x;
        kept >= wanted
    });
    enough.map_or(sigma.len(), |at| at + 1).max(1)
}

/// The leading singular triplets of `matrix` (m, n), to `algorithm.tolerance`.
///
/// # Errors
/// [`Error::Uncertified`] if even the guaranteed route fails the check: NaN or Inf in the matrix, in practice.
pub fn decompose(
    module: &str,
    matrix: ArrayView2<f32>,
    wanted: Wanted,
    algorithm: &Algorithm,
) -> Result<Svd> {
    let short = matrix.nrows().min(matrix.ncols());
    let q = match wanted {
        Wanted::Triplets(q) => q,
        Wanted::Energy(share) => rank_of_energy(&spectrum(matrix)?, share),
    };
    assert!(
        (1..=short).contains(&q),
        "1 ≤ q ≤ min(m, n), q = {q}, min = {short}"
    );
    let try_f32 = short > F64_SIDE && (q as f64) < F64_SHARE * short as f64;
    if try_f32 {
        let svd = by_gram::<f32>(matrix, q, Route::GramF32, algorithm)?;
        let kappa = f64::from(svd.sigma[0]) / f64::from(svd.sigma[q - 1]);
        if kappa * kappa * F32_ERROR_PER_KAPPA2 <= algorithm.tolerance
            && svd.certificate.holds(algorithm.tolerance)
        {
            return Ok(svd);
        }
    }
    let svd = by_gram::<f64>(matrix, q, Route::GramF64, algorithm)?;
    if svd.certificate.holds(algorithm.tolerance) {
        return Ok(svd);
    }
    if !matrix.iter().all(|x| x.is_finite()) {
        return Err(Error::Uncertified {
            module: module.into(),
            residual: f64::NAN,
            orthogonality: f64::NAN,
            tolerance: algorithm.tolerance,
        });
    }
    let svd = in_full(matrix, q, algorithm)?;
    if svd.certificate.holds(algorithm.tolerance) {
        return Ok(svd);
    }
    Err(Error::Uncertified {
        module: module.into(),
        residual: svd.certificate.residual,
        orthogonality: svd.certificate.orthogonality,
        tolerance: algorithm.tolerance,
    })
}

fn by_gram<T: Real>(
    matrix: ArrayView2<f32>,
    q: usize,
    route: Route,
    algorithm: &Algorithm,
) -> Result<Svd> {
    let (m, n) = matrix.dim();
    let wide = m <= n;
    let gram = gram::<T>(matrix, wide);
    let (_, short) = top_eigenpairs(gram, q)?;
    let short = short.mapv(|x| {
        let x: f64 = x.into();
        x as f32
    });
    // one exact pass over the matrix: σᵢ = ‖sᵢ·M‖ is a Rayleigh quotient, quadratically better than sᵢ
    let mut long = gemm(short.view(), false, matrix, !wide);
    let sigma: Vec<f32> = long
        .rows_mut()
        .into_iter()
        .map(|mut row| {
            let norm = row
                .iter()
                .map(|&x| f64::from(x).powi(2))
                .sum::<f64>()
                .sqrt();
            if norm > 0.0 {
                row.mapv_inplace(|x| (f64::from(x) / norm) as f32);
            }
            norm as f32
        })
        .collect();
    // equal values may come out of order by a rounding error; the file promises that they descend
    let mut order: Vec<usize> = (0..q).collect();
    order.sort_by(|&a, &b| sigma[b].total_cmp(&sigma[a]));
    let short = short.select(Axis(0), &order);
    let mut long = long.select(Axis(0), &order);
    let sigma: Array1<f32> = order.iter().map(|&i| sigma[i]).collect();
    orthonormalise_rows(&mut long)?;
    let (u, v) = if wide { (short, long) } else { (long, short) };
    let certificate = certify(matrix, &u, &sigma, &v, algorithm.seed);
    Ok(Svd {
        u,
        sigma,
        v,
        route,
        certificate,
    })
}

/// Every triplet by LAPACK's gesdd in f64, of which the first q are kept: some ten times the work.
fn in_full(matrix: ArrayView2<f32>, q: usize, algorithm: &Algorithm) -> Result<Svd> {
    use ndarray_linalg::{JobSvd, SVDDC};
    let (m, n) = matrix.dim();
    let failed = || Error::Lapack {
        routine: "dgesdd",
        rows: m,
        columns: n,
        info: -1,
    };
    // lax counts the factors' elements in 32 bits (0.18)
    if m.max(n) * m.min(n) > i32::MAX as usize {
        return Err(failed());
    }
    let (u, sigma, v) = matrix
        .mapv(f64::from)
        .svddc(JobSvd::Some)
        .map_err(|_| failed())?;
    let (u, v) = (u.ok_or_else(failed)?, v.ok_or_else(failed)?);
    let narrow = |rows: ArrayView2<f64>| rows.mapv(|x| x as f32).as_standard_layout().into_owned();
    let (u, v) = (
        narrow(u.slice(s![.., ..q]).t()),
        narrow(v.slice(s![..q, ..])),
    );
    let sigma: Array1<f32> = sigma.iter().take(q).map(|&x| x as f32).collect();
    let certificate = certify(matrix, &u, &sigma, &v, algorithm.seed);
    Ok(Svd {
        u,
        sigma,
        v,
        route: Route::Full,
        certificate,
    })
}

/// M·Mᵀ (or Mᵀ·M) in T, upper half, by panels so that the matrix is never held twice.
fn gram<T: Real>(matrix: ArrayView2<f32>, wide: bool) -> Array2<T> {
    const PANEL: usize = 512;
    let side = if wide { matrix.nrows() } else { matrix.ncols() };
    let mut gram = Array2::from_elem((side, side), T::default());
    let inner = if wide { Axis(1) } else { Axis(0) };
    for panel in matrix.axis_chunks_iter(inner, PANEL) {
        let panel = panel.mapv(T::from_f32);
        let panel = panel.as_standard_layout();
        add_gram(panel.view(), !wide, &mut gram);
    }
    gram
}

impl Certificate {
    /// Whether factors with this certificate may be published under `tolerance`.
    pub fn holds(&self, tolerance: f64) -> bool {
        // a NaN fails both comparisons
        self.residual <= tolerance && self.orthogonality <= tolerance
    }
}

/// Looks at the factors with random probes, at the price of a few matrix–vector products.
///
/// For z of independent signs, E‖R·z‖² = ‖R‖²_F: the probe measures the whole residual, not a sample of it.
pub fn certify(
    matrix: ArrayView2<f32>,
    u: &Array2<f32>,
    sigma: &Array1<f32>,
    v: &Array2<f32>,
    seed: u64,
) -> Certificate {
    const PROBES: usize = 4;
    let q = sigma.len();
    let z = random_signs(PROBES, q, seed);
    let scaled = &z * sigma;
    let per_row = |difference: Array2<f32>| -> f64 {
        let sum: f64 = difference.iter().map(|&x| f64::from(x).powi(2)).sum();
        (sum / (PROBES * q) as f64).sqrt()
    };
    let (zu, zv) = (
        blas::gemm(z.view(), false, u.view(), false),
        blas::gemm(z.view(), false, v.view(), false),
    );
    let (su, sv) = (
        blas::gemm(scaled.view(), false, u.view(), false),
        blas::gemm(scaled.view(), false, v.view(), false),
    );
    let right = per_row(blas::gemm(zv.view(), false, matrix, true) - su);
    let left = per_row(blas::gemm(zu.view(), false, matrix, false) - sv);
    let largest = f64::from(sigma[0]).max(f64::MIN_POSITIVE);
    let orthogonality = |w: &Array2<f32>, zw: &Array2<f32>| {
        per_row(blas::gemm(zw.view(), false, w.view(), true) - &z)
    };
    Certificate {
        residual: max(right, left) / largest,
        orthogonality: max(orthogonality(u, &zu), orthogonality(v, &zv)),
    }
}

/// The larger of two, and NaN if either is: a broken factor must not slip through a comparison.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else {
        a.max(b)
    }
}

/// (rows, columns) of ±1.
fn random_signs(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut random = SplitMix(seed);
    Array2::from_shape_simple_fn((rows, columns), || {
        if random.next_u64() & 1 == 0 {
            1.0
        } else {
            -1.0
        }
    })
}

/// Share of ‖M‖² in the kept triplets, and the norm of what is left.
pub fn energy(matrix: ArrayView2<f32>, sigma: &Array1<f32>) -> (f64, f64) {
    let total: f64 = matrix.iter().map(|&x| f64::from(x).powi(2)).sum();
    let kept: f64 = sigma
        .slice(s![..])
        .iter()
        .map(|&x| f64::from(x).powi(2))
        .sum();
    let share = if total > 0.0 {
        (kept / total).min(1.0)
    } else {
        1.0
    };
    (share, (total - kept).max(0.0).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Normal numbers by Box–Muller from a splitmix stream.
    pub fn normal(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut random = SplitMix(seed);
        let mut uniform = move || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        Array2::from_shape_simple_fn((rows, columns), || {
            let (a, b) = (uniform().max(1e-300), uniform());
            ((-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()) as f32
        })
    }

    /// Singular values in f64 from LAPACK's gesdd: the truth the routes are held against.
    fn truth(matrix: &Array2<f32>) -> Vec<f64> {
        use ndarray_linalg::{JobSvd, SVDDC};
        let (_, sigma, _) = matrix
            .mapv(f64::from)
            .svddc(JobSvd::None)
            .expect("gesdd converges");
        sigma.to_vec()
    }

    fn assert_triplets(matrix: &Array2<f32>, q: usize) -> Svd {
        let algorithm = Algorithm::default();
        let svd =
            decompose("test", matrix.view(), Wanted::Triplets(q), &algorithm).expect("certified");
        let truth = truth(matrix);
        // the tolerance is relative to each value, down to what f32 factors can resolve beside σ₁
        let floor = truth[0] * f64::from(f32::EPSILON) * 8.0;
        for (i, (&got, &wanted)) in svd.sigma.iter().zip(&truth).enumerate() {
            let allowed = algorithm.tolerance * wanted + floor;
            assert!(
                (f64::from(got) - wanted).abs() <= allowed,
                "σ_{i}: {got} instead of {wanted} by {:?}",
                svd.route
            );
        }
        assert!(
            svd.sigma
                .windows(2)
                .into_iter()
                .all(|pair| pair[0] >= pair[1])
        );
        // Eckart–Young: what is left is as small as it can be
        let kept = (&svd.u.t() * &svd.sigma).dot(&svd.v);
        let left: f64 = (matrix - &kept)
            .iter()
            .map(|&x| f64::from(x).powi(2))
            .sum::<f64>()
            .sqrt();
        let optimum: f64 = truth[q..].iter().map(|x| x * x).sum::<f64>().sqrt();
        let side = matrix.nrows().max(matrix.ncols()) as f64;
        let noise = f64::from(f32::EPSILON)
            * (8.0 * side).sqrt()
            * truth.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(
            left <= optimum * (1.0 + 1e-6) + noise,
            "residual {left}, optimum {optimum}"
        );
        svd
    }

    #[test]
    fn tall_wide_square_and_tiny_matrices_decompose() {
        for (m, n, q) in [
            (40, 17, 5),
            (17, 40, 17),
            (64, 64, 6),
            (1, 1, 1),
            (1, 9, 1),
            (9, 1, 1),
            (300, 260, 26),
            (260, 300, 130),
        ] {
            assert_triplets(&normal(m, n, (m * n) as u64), q);
        }
    }

    #[test]
    fn strong_outliers_take_the_guaranteed_route() {
        let mut matrix = normal(256, 320, 3);
        let (a, b) = (normal(256, 1, 4), normal(1, 320, 5));
        matrix += &(a.dot(&b) * 40.0);
        let svd = assert_triplets(&matrix, 128);
        assert_eq!(svd.route, Route::GramF64);
        let calm = assert_triplets(&normal(256, 320, 3), 25);
        assert_eq!(calm.route, Route::GramF32);
    }

    #[test]
    fn rank_deficient_zero_and_repeated_spectra_decompose() {
        let low = normal(50, 3, 1).dot(&normal(3, 70, 2));
        assert_triplets(&low, 10);
        assert_triplets(&Array2::zeros((12, 30)), 4);
        assert_triplets(&Array2::eye(24), 24);
    }

    #[test]
    fn a_broken_factor_fails_its_certificate() {
        let matrix = normal(48, 80, 9);
        let algorithm = Algorithm::default();
        let svd =
            decompose("test", matrix.view(), Wanted::Triplets(8), &algorithm).expect("certified");
        let look = |u: &Array2<f32>, sigma: &Array1<f32>, v: &Array2<f32>| {
            certify(matrix.view(), u, sigma, v, 0).holds(algorithm.tolerance)
        };
        assert!(look(&svd.u, &svd.sigma, &svd.v));
        let mut v = svd.v.clone();
        v[(7, 3)] += 1e-2;
        assert!(!look(&svd.u, &svd.sigma, &v), "one wrong element of v");
        let mut sigma = svd.sigma.clone();
        sigma[5] *= 1.01;
        assert!(!look(&svd.u, &sigma, &svd.v), "one wrong singular value");
        let swapped = svd.u.select(Axis(0), &[1, 0, 2, 3, 4, 5, 6, 7]);
        assert!(!look(&swapped, &svd.sigma, &svd.v), "two swapped vectors");
        let mut nan = svd.u.clone();
        nan[(0, 0)] = f32::NAN;
        assert!(!look(&nan, &svd.sigma, &svd.v), "a NaN");
    }

    #[test]
    fn the_full_route_gives_the_same_triplets() {
        for (m, n, q) in [(40, 17, 5), (17, 40, 17), (64, 64, 6)] {
            let matrix = normal(m, n, 77);
            let algorithm = Algorithm::default();
            let gram = decompose("test", matrix.view(), Wanted::Triplets(q), &algorithm)
                .expect("certified");
            let full = in_full(matrix.view(), q, &algorithm).expect("converges");
            assert!(full.certificate.holds(1e-6), "{:?}", full.certificate);
            for (i, (a, b)) in full.sigma.iter().zip(&gram.sigma).enumerate() {
                assert!((a - b).abs() < 1e-5 * b, "σ_{i}");
            }
            // vectors agree up to a common sign
            for i in 0..q {
                let (u, v) = (
                    full.u.row(i).dot(&gram.u.row(i)),
                    full.v.row(i).dot(&gram.v.row(i)),
                );
                assert!((u * v - 1.0).abs() < 1e-3, "triplet {i}");
            }
        }
    }

    #[test]
    fn a_matrix_with_nan_is_refused() {
        let mut matrix = normal(8, 8, 1);
        matrix[(2, 2)] = f32::NAN;
        assert!(
            decompose(
                "bad",
                matrix.view(),
                Wanted::Triplets(2),
                &Algorithm::default()
            )
            .is_err()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_shape_any_scale(m in 1usize..60, n in 1usize..60, seed: u64, exponent in -12i32..12, share in 0.01f64..1.0) {
            let matrix = normal(m, n, seed) * 2f32.powi(exponent);
            let q = ((share * m.min(n) as f64) as usize).max(1);
            assert_triplets(&matrix, q);
        }
    }
}
