//! How right the factors of each side are.

use ndarray::{Array1, Array2, ArrayView2};
use serde::Serialize;
use svdhub::linalg::{Algorithm, gemm};

use crate::matrix::Reference;

/// How right factors are, all of it in f64.
#[derive(Debug, Clone, Serialize)]
pub struct Accuracy {
    /// Largest relative error of the q singular values.
    pub sigma_worst: f64,
    /// ‖M − uᵀ·diag(σ)·v‖ over the least possible; where all values are kept, over ‖M‖.
    pub left: f64,
    pub left_of_whole: bool,
    /// Largest element of u·uᵀ − I, and of v·vᵀ − I.
    pub orthogonality_u: f64,
    pub orthogonality_v: f64,
    /// Whether each value is as right as we promise: our default tolerance, down to what f32 factors resolve beside σ₁.
    pub within_tolerance: bool,
}

/// Holds u (q, m), sigma (q,), v (q, n) against the matrix (m, n) and its true singular values.
pub fn accuracy(
    matrix: &Array2<f32>,
    u: &Array2<f32>,
    sigma: &Array1<f32>,
    v: &Array2<f32>,
    reference: &Reference,
) -> Accuracy {
    let q = sigma.len();
    let tolerance = Algorithm::default().tolerance;
    let floor = reference.sigma[0] * f64::from(f32::EPSILON) * 8.0;
    let errors = || {
        let pairs = sigma.iter().zip(&reference.sigma);
        pairs.map(|(&found, &truth)| ((f64::from(found) - truth).abs(), truth))
    };
    let wide = |a: &Array2<f32>| a.mapv(f64::from);
    let (u, v) = (wide(u), wide(v));
    let mut scaled = u.clone();
    for (mut row, &s) in scaled.rows_mut().into_iter().zip(sigma) {
        row *= f64::from(s);
    }
    let kept = gemm(scaled.view(), true, v.view(), false);
    let left = norm(matrix.iter().zip(&kept).map(|(&x, k)| f64::from(x) - k));
    let left_of_whole = q == reference.sigma.len();
    let tail = if left_of_whole {
        &reference.sigma[..]
    } else {
        &reference.sigma[q..]
    };
    Accuracy {
        sigma_worst: errors()
            .map(|(error, truth)| error / truth)
            .fold(0.0, f64::max),
        left: left / norm(tail.iter().copied()),
        left_of_whole,
        orthogonality_u: orthogonality(u.view()),
        orthogonality_v: orthogonality(v.view()),
        within_tolerance: errors().all(|(error, truth)| error <= tolerance * truth + floor),
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn orthogonality(rows: ArrayView2<f64>) -> f64 {
    let gram = gemm(rows, false, rows, true);
    let off = |((i, j), &g): ((usize, usize), &f64)| (g - f64::from(u8::from(i == j))).abs();
    gram.indexed_iter().map(off).fold(0.0, f64::max)
}
