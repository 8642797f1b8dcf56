//! An independent look at computed triplets: random probes, at the price of a few passes over the matrix.

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use super::operand::{Backend, Operand, pass};
use super::product::{gemm, short_side_first};
use super::rows;
use crate::error::Result;
use crate::random::{normal, random_signs};

/// What the probes found.
///
/// With orthonormal u and v, M = uᵀ·diag(σ)·v + M′ and both residuals zero, the singular values of M are σ and those of
/// M′ together; σ are the leading ones if ‖M′‖₂ ≤ σ_q. A residual r moves a value by r² (Kahan 1967), not by r, where
/// the other side's is zero; the `link` is the side that every route makes exact.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// ‖M·v − σ·u‖ and ‖Mᵀ·u − σ·v‖, relative to σ₁, root mean square over the triplets, the larger of the two.
    pub residual: f64,
    /// The smaller of the two. Not in schema 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<f64>,
    /// Distance of u·uᵀ and v·vᵀ from the identity, root mean square per row, the larger of the two.
    pub orthogonality: f64,
    /// ‖M′‖₂ over σ_q, from below, by power iteration: above 1, something larger was left out. Not in schema 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<f64>,
}

/// Probes of the residuals, and of M′.
const PROBES: usize = 4;

/// What of ‖M′‖₂ is single precision's noise, relative to σ₁: f32 factors cannot resolve less.
const NOISE: f64 = 64.0 * f32::EPSILON as f64;

impl Certificate {
    /// Whether triplets with this certificate are the leading ones to `tolerance`, relative, on each value.
    pub fn holds(&self, tolerance: f64) -> bool {
        // a NaN fails every comparison
        self.are_consistent(tolerance)
            // twice, for the value errs by its square over a gap that is a fraction of the value
            && self.residual <= 0.5 * tolerance.sqrt()
            && self.tail.unwrap_or(1.0) <= 1.0 + tolerance
    }

    /// Whether the factors belong to each other and are orthonormal, be they the leading ones or not.
    pub fn are_consistent(&self, tolerance: f64) -> bool {
        self.orthogonality <= tolerance && self.link.unwrap_or(self.residual) <= tolerance
    }
}

/// Of the probes that look at what is stored: whoever repeats a look sees the same.
pub const PROBE_SEED: u64 = 1;

/// Looks at the triplets of `matrix` (m, n): u (q, m), sigma (q,), v (q, n).
pub fn certify(
    matrix: ArrayView2<f32>,
    u: &Array2<f32>,
    sigma: &Array1<f32>,
    v: &Array2<f32>,
    seed: u64,
) -> Result<Certificate> {
    let operand = Operand::new(short_side_first(matrix), &Backend::Cpu)?;
    let (short, long) = if matrix.nrows() <= matrix.ncols() {
        (u, v)
    } else {
        (v, u)
    };
    let (short, long) = (Operand::here(short), Operand::here(long));
    certify_operand(&operand, &short, sigma, &long, seed)
}

/// Distance of u·uᵀ and v·vᵀ from the identity, root mean square per row, the larger of the two.
pub fn orthogonality(u: &Array2<f32>, v: &Array2<f32>, seed: u64) -> f64 {
    let z = random_signs(PROBES, u.nrows(), seed);
    let of = |w: &Array2<f32>| {
        let zw = gemm(z.view(), false, w.view(), false);
        let off = gemm(zw.view(), false, w.view(), true) - &z;
        (off.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / z.len() as f64).sqrt()
    };
    max(of(u), of(v))
}

/// Looks at the triplets of M (s, l): short (q, s), sigma (q,), long (q, l).
///
/// For z of independent signs, E‖R·z‖² = ‖R‖²_F: a probe measures the whole residual, not a sample of it.
pub fn certify_operand(
    matrix: &Operand,
    u: &Operand,
    sigma: &Array1<f32>,
    v: &Operand,
    seed: u64,
) -> Result<Certificate> {
    let q = sigma.len();
    let z = random_signs(PROBES, q, seed);
    let scaled = &z * sigma;
    let per_row = |sum: f64| (sum / (PROBES * q) as f64).sqrt();
    let distance = |a: ArrayView2<f32>, b: &Array2<f32>| per_row(squares(&(&a - b)));
    // no square of a singular value has to fit f32
    let unit = sigma[0].max(f32::MIN_POSITIVE).recip();

    let there = u.forward(concatenate![Axis(0), z, scaled].view())?;
    let (zu, scaled_u) = there.view().split_at(Axis(0), PROBES);
    // the probes of M′ ride along: one pass over M and v serves all
    let mut x = normal(PROBES, u.dim().1, seed ^ 0x7a11);
    rows::to_unit_length(x.view_mut());
    let back = u.backward(concatenate![Axis(0), zu, x].view())?;
    let (zuu, inner) = back.view().split_at(Axis(0), PROBES);
    let mut left = 0.0;
    let [to_u, to_v] = pass(
        [
            (matrix.borrowed(), concatenate![Axis(0), zu, x].view()),
            (
                v.borrowed(),
                concatenate![Axis(0), z, scaled, &inner * sigma].view(),
            ),
        ],
        |[through_m, through_v]| {
            let (zum, xm) = through_m.view().split_at(Axis(0), PROBES);
            let (zv, others) = through_v.view().split_at(Axis(0), PROBES);
            let (scaled_v, kept) = others.split_at(Axis(0), PROBES);
            left += squares(&(&zum - &scaled_v));
            concatenate![Axis(0), zv, (&xm - &kept) * unit]
        },
    )?;
    let (right, zvv) = (to_u.slice(s![..PROBES, ..]), to_v.slice(s![..PROBES, ..]));
    let right = distance(right, &scaled_u.to_owned());
    let left = per_row(left);
    let orthogonality = max(distance(zuu, &z), distance(zvv, &z));
    let (to_u, to_v) = (to_u.slice(s![PROBES.., ..]), to_v.slice(s![PROBES.., ..]));
    let mut x = &to_u - &u.forward((&to_v * sigma).view())?;
    rows::to_unit_length(x.view_mut());

    let inner = u.backward(x.view())? * sigma;
    let mut lengths = vec![0.0; PROBES];
    let [to_u, to_v] = pass(
        [(matrix.borrowed(), x.view()), (v.borrowed(), inner.view())],
        |[xm, kept]| {
            let y = (xm - kept) * unit;
            for (length, y) in lengths.iter_mut().zip(y.rows()) {
                *length += rows::norm_squared(y);
            }
            y
        },
    )?;
    // ‖y·M′ᵀ‖/‖y‖ for y = x·M′
    let x = &to_u - &u.forward((&to_v * sigma).view())?;
    let tail_norm = (x.rows().into_iter().zip(lengths))
        .map(|(x, length)| match length {
            0.0 => 0.0,
            length => rows::norm(x) / length.sqrt(),
        })
        .fold(0.0, max);

    let largest = f64::from(sigma[0]).max(f64::MIN_POSITIVE);
    let smallest = f64::from(sigma[q - 1]);
    let tail = if tail_norm <= smallest + NOISE * largest {
        // within what f32 factors resolve: a zero σ_q must not make noise infinite
        (tail_norm / smallest.max(tail_norm).max(f64::MIN_POSITIVE)).min(1.0)
    } else {
        tail_norm / smallest.max(f64::MIN_POSITIVE)
    };
    Ok(Certificate {
        residual: max(right, left) / largest,
        link: Some(min(right, left) / largest),
        orthogonality,
        tail: Some(tail),
    })
}

/// Σ xᵢⱼ²
fn squares(x: &Array2<f32>) -> f64 {
    x.rows().into_iter().map(rows::norm_squared).sum()
}

/// The larger of two, and NaN if either is: a broken factor must not slip through a comparison.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else {
        a.max(b)
    }
}

fn min(a: f64, b: f64) -> f64 {
    -max(-a, -b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_can_refuse() {
        let good = Certificate {
            residual: 4e-3,
            link: Some(1e-6),
            orthogonality: 1e-6,
            tail: Some(0.9),
        };
        let broken: [fn(&mut Certificate, f64); 4] = [
            |c, bad| c.residual = bad,
            |c, bad| c.link = Some(bad),
            |c, bad| c.orthogonality = bad,
            |c, bad| c.tail = Some(bad),
        ];
        assert!(good.holds(1e-4) && good.are_consistent(1e-4));
        for (at, (spoil, bad)) in broken.iter().zip([6e-3, 2e-4, 2e-4, 1.001]).enumerate() {
            for bad in [bad, f64::NAN] {
                let mut certificate = good;
                spoil(&mut certificate, bad);
                assert!(!certificate.holds(1e-4), "{certificate:?}");
                // whether the factors are the leading ones shows in the first and the last
                assert_eq!(certificate.are_consistent(1e-4), at == 0 || at == 3);
            }
        }
        // schema 1 knows neither link nor tail, and asked for more
        let (link, tail) = (None, None);
        let old = |residual| Certificate {
            residual,
            link,
            tail,
            ..good
        };
        assert!(old(5e-5).holds(1e-4) && !old(4e-3).holds(1e-4));
    }
}
