//! Row-wise operations in one pass on the CPU, in f32: what candle does in many passes, each with its own buffer.
//!
//! Every function answers `None` where it does not apply (another device, another dtype); the caller then composes the
//! same from tensor operations, which is also what the tests hold these loops against.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::family::{Activation, TANH_GELU};
use crate::lanes::{LANES, by_lane, dot, widest};

/// Rows are handed to threads in groups of about this many numbers: enough to pay for the hand-over.
const GROUP: usize = 16 << 10;

pub fn applies(tensors: &[&Tensor]) -> bool {
    tensors
        .iter()
        .all(|t| t.dtype() == DType::F32 && matches!(t.device(), Device::Cpu) && t.is_contiguous())
}

/// Calls `f` with the numbers of contiguous CPU tensors.
pub fn with_slices<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(CpuStorage::F32(values)) = &**storage else {
            bail!("a fused operation is for f32 on the CPU");
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a fused operation is for contiguous tensors");
        };
        *slice = &values[start..end];
    }
    f(slices)
}

/// Changes the numbers of a tensor that nobody else holds.
fn in_place(tensor: &Tensor, f: impl Fn(&mut [f32])) -> Result<()> {
    struct Change<F>(F);
    impl<F: Fn(&mut [f32])> InplaceOp1 for Change<F> {
        fn name(&self) -> &'static str {
            "fused"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            match (storage, layout.contiguous_offsets()) {
                (CpuStorage::F32(values), Some((start, end))) => {
                    (self.0)(&mut values[start..end]);
                    Ok(())
                }
                _ => bail!("a fused operation is for contiguous f32"),
            }
        }
    }
    tensor.inplace_op1(&Change(f))
}

fn rows_per_group(row: usize) -> usize {
    (GROUP / row.max(1)).max(1)
}

/// eˣ to some 10⁻⁷ of itself, without a branch: a loop over it is vectorised, over the library's it is not.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2, where a polynomial does; coefficients of expf in Moshier's Cephes. Beyond what f32
/// holds it stays at its ends.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// 1.5·2²³: added, it leaves a whole number in the last bits.
    const SHIFT: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = (x - n * (355.0 / 512.0)) + n * 2.121_944_4e-4;
    let coefficients = [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let p = (coefficients.iter()).fold(1.987_569_2e-4, |p, c| p * r + c);
    let power = (shifted
        .to_bits()
        .wrapping_sub(SHIFT.to_bits())
        .wrapping_add(127))
        << 23;
    (p * r * r + r + 1.0) * f32::from_bits(power)
}

/// activation(a) ∘ b
pub fn gated(a: &Tensor, b: &Tensor, activation: &Activation) -> Result<Option<Tensor>> {
    match activation {
        _ if !applies(&[a, b]) => Ok(None),
        Activation::Silu => forward(a, b, silu).map(Some),
        Activation::GeluTanh => forward(a, b, gelu_tanh).map(Some),
        Activation::Gelu | Activation::Unsupported(_) => Ok(None),
    }
}

/// (da, db) of [`gated`] from the gradient of its output.
pub fn gated_gradient(
    a: &Tensor,
    b: &Tensor,
    g: &Tensor,
    activation: &Activation,
) -> Result<Option<(Tensor, Tensor)>> {
    match activation {
        _ if !applies(&[a, b, g]) => Ok(None),
        Activation::Silu => backward(a, b, g, silu).map(Some),
        Activation::GeluTanh => backward(a, b, g, gelu_tanh).map(Some),
        Activation::Gelu | Activation::Unsupported(_) => Ok(None),
    }
}

/// An activation is a·sigmoid(z): z and dz/da.
#[inline(always)]
fn silu(a: f32) -> (f32, f32) {
    (a, 1.0)
}

#[inline(always)]
fn gelu_tanh(a: f32) -> (f32, f32) {
    const ROOT: f32 = TANH_GELU.0 as f32;
    const CUBE: f32 = (TANH_GELU.0 * TANH_GELU.1) as f32;
    (a * (ROOT + CUBE * a * a), ROOT + 3.0 * CUBE * a * a)
}

fn forward(a: &Tensor, b: &Tensor, inner: impl Fn(f32) -> (f32, f32) + Sync) -> Result<Tensor> {
    let y = with_slices([a, b], |[a, b]| {
        let mut y = vec![0f32; a.len()];
        y.par_chunks_mut(GROUP)
            .zip(a.par_chunks(GROUP).zip(b.par_chunks(GROUP)))
            .for_each(|(y, (a, b))| {
                widest(
                    #[inline(always)]
                    || {
                        for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                            *y = a / (1.0 + exp(-inner(a).0)) * b;
                        }
                    },
                )
            });
        Ok(y)
    })?;
    Tensor::from_vec(y, a.shape(), a.device())
}

fn backward(
    a: &Tensor,
    b: &Tensor,
    g: &Tensor,
    inner: impl Fn(f32) -> (f32, f32) + Sync,
) -> Result<(Tensor, Tensor)> {
    let (da, db) = with_slices([a, b, g], |[a, b, g]| {
        let (mut da, mut db) = (vec![0f32; a.len()], vec![0f32; a.len()]);
        da.par_chunks_mut(GROUP)
            .zip(db.par_chunks_mut(GROUP))
            .zip(
                a.par_chunks(GROUP)
                    .zip(b.par_chunks(GROUP))
                    .zip(g.par_chunks(GROUP)),
            )
            .for_each(|((da, db), ((a, b), g))| {
                widest(
                    #[inline(always)]
                    || {
                        let outs = da.iter_mut().zip(db);
                        for ((da, db), ((&a, &b), &g)) in outs.zip(a.iter().zip(b).zip(g)) {
                            let (z, dz) = inner(a);
                            let s = 1.0 / (1.0 + exp(-z));
                            let value = a * s;
                            *db = g * value;
                            *da = g * b * (s + (value - value * s) * dz);
                        }
                    },
                )
            });
        Ok((da, db))
    })?;
    let tensor = |values| Tensor::from_vec(values, a.shape(), a.device());
    Ok((tensor(da)?, tensor(db)?))
}

/// (dx, dw) of the root mean square norm over the last side.
pub fn rms_norm_gradient(
    x: &Tensor,
    w: &Tensor,
    g: &Tensor,
    eps: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    if !applies(&[x, w, g]) {
        return Ok(None);
    }
    let n = w.elem_count();
    let (dx, dw) = with_slices([x, w, g], |[x, w, g]| {
        let mut dx = vec![0f32; x.len()];
        let group = n * rows_per_group(n);
        // partial sums are added in the order of the rows: the same bits for any number of threads
        let partial: Vec<Vec<f32>> = dx
            .par_chunks_mut(group)
            .zip(x.par_chunks(group).zip(g.par_chunks(group)))
            .map(|(dx, (x, g))| {
                let mut dw = vec![0f32; n];
                let rows = x.chunks_exact(n).zip(g.chunks_exact(n));
                for (dx, (x, g)) in dx.chunks_exact_mut(n).zip(rows) {
                    widest(
                        #[inline(always)]
                        || rms_norm_row(x, w, g, eps as f32, dx, &mut dw),
                    );
                }
                dw
            })
            .collect();
        let mut dw = vec![0f32; n];
        for part in partial {
            for (sum, x) in dw.iter_mut().zip(part) {
                *sum += x;
            }
        }
        Ok((dx, dw))
    })?;
    let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
    Ok(Some((dx, Tensor::from_vec(dw, n, x.device())?)))
}

/// dx of one row, and what it adds to dw.
#[inline(always)]
fn rms_norm_row(x: &[f32], w: &[f32], g: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32]) {
    let n = x.len() as f32;
    let inverse = 1.0 / (dot(x, x) / n + eps).sqrt();
    for ((dx, dw), ((x, w), g)) in dx.iter_mut().zip(dw).zip(x.iter().zip(w).zip(g)) {
        *dw += g * (x * inverse);
        *dx = g * w;
    }
    let along = dot(dx, x) * inverse / n;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = (*dx - x * inverse * along) * inverse;
    }
}

/// Softmax of one row in place; returns what was subtracted and the sum, for a logarithm.
pub fn softmax(row: &mut [f32]) -> (f32, f64) {
    widest(
        #[inline(always)]
        || {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            by_lane(row, &mut lanes, |&mut x, lane| {
                *lane = if x > *lane { x } else { *lane };
            });
            let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
            // a vocabulary of a hundred thousand summed in f32 would cost the loss its fifth digit
            let mut sum = 0f64;
            for part in row.chunks_mut(64 * LANES) {
                let mut lanes = [0f32; LANES];
                by_lane(part, &mut lanes, |x, lane| {
                    *x = exp(*x - largest);
                    *lane += *x;
                });
                sum += lanes.into_iter().map(f64::from).sum::<f64>();
            }
            let inverse = (1.0 / sum) as f32;
            for x in row.iter_mut() {
                *x *= inverse;
            }
            (largest, sum)
        },
    )
}

/// dp → p ∘ (dp − Σ dp ∘ p) of one row of probabilities, in place.
pub fn through_softmax(p: &[f32], dp: &mut [f32]) {
    widest(
        #[inline(always)]
        || {
            let along = dot(dp, p);
            for (d, p) in dp.iter_mut().zip(p) {
                *d = p * (*d - along);
            }
        },
    )
}

/// Σ −log `softmax(row)[target]`, leaving factor·(softmax − onehot), its gradient times a factor, in place of the logits.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor, factor: f64) -> Result<Option<f64>> {
    if !applies(&[logits]) {
        return Ok(None);
    }
    let n = logits.dim(1)?;
    let targets = targets.flatten_all()?.to_vec1::<u32>()?;
    let losses = std::sync::Mutex::new(Vec::new());
    in_place(logits, |logits| {
        let each: Vec<f64> = logits
            .par_chunks_mut(n)
            .zip(&targets)
            .map(|(row, &target)| {
                let wanted = row[target as usize];
                let (largest, sum) = softmax(row);
                row[target as usize] -= 1.0;
                row.iter_mut().for_each(|x| *x *= factor as f32);
                f64::from(largest) - f64::from(wanted) + sum.ln()
            })
            .collect();
        *losses
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner()) = each;
    })?;
    let losses = losses
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    Ok(Some(losses.iter().sum()))
}

#[cfg(test)]
mod tests {
    use super::super::family::Scores;
    use super::super::ops;
    use super::super::segments::{Segment, Segments, Sight};
    use super::super::tape::record;
    use super::*;
    use candle_core::Var;

    fn random(shape: &[usize]) -> Tensor {
        Tensor::randn(0f32, 1f32, shape, &Device::Cpu).expect("random")
    }

    fn wide(t: &Tensor) -> Tensor {
        t.to_dtype(DType::F64).expect("f64")
    }

    /// `got` in f32 against `wanted` in f64, relative to the largest value.
    fn assert_near(got: &Tensor, wanted: &Tensor, what: &str) {
        let numbers = |t: &Tensor| {
            wide(t)
                .flatten_all()
                .and_then(|t| t.to_vec1::<f64>())
                .expect("numbers")
        };
        let (got, wanted) = (numbers(got), numbers(wanted));
        assert_eq!(got.len(), wanted.len());
        let scale = wanted.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
        for (a, b) in got.iter().zip(&wanted) {
            // a few roundings per number, a sum over at most some hundred, and y of some ten as the phase of a cosine
            assert!((a - b).abs() <= 4e-5 * scale, "{what}: {a} instead of {b}");
        }
    }

    /// Value and gradients of `f` in f32 (fused) against the same in f64 (composed of tensor operations).
    fn assert_twins(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>, what: &str) {
        let run = |inputs: Vec<Var>| {
            let tensors: Vec<Tensor> = inputs.iter().map(|v| v.as_tensor().clone()).collect();
            let (y, tape) = record(&[], || f(&tensors)).expect("forward");
            // those of Σ sin y, which are others everywhere
            let mut gradients = tape.back(&y, y.cos().expect("a cosine")).expect("backward");
            let gradients: Vec<Tensor> = inputs
                .iter()
                .map(|v| gradients.take(v).expect("a gradient"))
                .collect();
            (y, gradients)
        };
        let var = |t: &Tensor| Var::from_tensor(t).expect("variable");
        let (y, gradients) = run(inputs.iter().map(var).collect());
        let (wanted, wanted_gradients) = run(inputs.iter().map(|t| var(&wide(t))).collect());
        assert_near(&y, &wanted, what);
        for (i, (got, wanted)) in gradients.iter().zip(&wanted_gradients).enumerate() {
            assert_near(got, wanted, &format!("{what}, gradient {i}"));
        }
    }

    #[test]
    fn the_exponential_is_right_from_end_to_end() {
        for i in 0..=200_000 {
            let x = -87.3 + (87.3 + 88.3) * (i as f32 / 200_000.0);
            let (found, wanted) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - wanted).abs() < 2e-7 * wanted, "{x}: {found}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e9) < 2e-38 && exp(1e9) > 2e38);
    }

    #[test]
    fn gated_is_its_composition() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            for shape in [vec![3, 7], vec![2, 130, 257]] {
                let inputs = [random(&shape), (random(&shape) * 3.0).expect("scaled")];
                let f = |t: &[Tensor]| ops::gated(&t[0], &t[1], &activation);
                assert_twins(&inputs, f, &format!("{activation:?}"));
            }
        }
    }

    #[test]
    fn attention_is_its_composition() {
        for (t, window, cap) in [
            (1, None, None),
            (9, None, Some(0.8)),
            (67, Some(5), Some(2.0)),
            (130, None, None),
        ] {
            let scores = Scores { scale: 0.3, cap };
            let inputs = [
                random(&[2, t, 6, 8]),
                random(&[2, t, 3, 8]),
                random(&[2, t, 3, 8]),
            ];
            let halves = vec![Segment::Sequence(t / 2), Segment::Sequence(t - t / 2)];
            let padded = vec![Segment::Padding(t / 3), Segment::Sequence(t - t / 3)];
            for segments in [
                Segments::whole(2, t),
                Segments::new(vec![halves.clone(), padded]),
            ] {
                let f = |x: &[Tensor]| {
                    let sight = segments.sight(window, &Device::Cpu)?;
                    ops::attention(&x[0], &x[1], &x[2], &sight, scores)
                };
                assert_twins(&inputs, f, "attention");
            }
        }
    }

    #[test]
    fn attention_over_more_keys_than_queries_is_its_composition() {
        let scores = Scores {
            scale: 0.3,
            cap: None,
        };
        let inputs = [
            random(&[2, 3, 6, 8]),
            random(&[2, 11, 3, 8]),
            random(&[2, 11, 3, 8]),
        ];
        let f = |x: &[Tensor]| {
            let sight = Sight::new(vec![2..9, 3..10, 4..11], 3, 11, &Device::Cpu)?;
            ops::attention(&x[0], &x[1], &x[2], &sight, scores)
        };
        assert_twins(&inputs, f, "attention");
    }

    #[test]
    fn rms_norm_gradient_is_its_formula() {
        for (rows, n) in [(1, 5), (300, 129)] {
            let (x, w, g) = (random(&[rows, n]), random(&[n]), random(&[rows, n]));
            let (dx, dw) = rms_norm_gradient(&x, &w, &g, 1e-5)
                .map(|r| r.expect("applies"))
                .expect("fused");
            let vars = [
                Var::from_tensor(&wide(&x)).expect("x"),
                Var::from_tensor(&wide(&w)).expect("w"),
            ];
            let composed = || -> Result<Tensor> {
                let mean = (vars[0].sqr()?.sum_keepdim(1)? / n as f64)?;
                let y = vars[0]
                    .broadcast_div(&(mean + 1e-5)?.sqrt()?)?
                    .broadcast_mul(&vars[1])?;
                (y * wide(&g))?.sum_all()
            };
            let gradients = composed().and_then(|y| y.backward()).expect("backward");
            assert_near(&dx, gradients.get(&vars[0]).expect("dx"), "dx");
            assert_near(&dw, gradients.get(&vars[1]).expect("dw"), "dw");
        }
    }

    #[test]
    fn cross_entropy_is_its_composition() {
        let (rows, n) = (37, 301);
        let logits = (random(&[rows, n]) * 4.0).expect("scaled");
        let targets: Vec<u32> = (0..rows as u32).map(|i| i * 37 % n as u32).collect();
        let wanted = Tensor::from_vec(targets, (rows, 1), &Device::Cpu).expect("targets");
        let p = candle_nn::ops::softmax(&wide(&logits), 1).expect("softmax");
        let loss: f64 = p
            .gather(&wanted, 1)
            .and_then(|p| p.log()?.neg()?.sum_all()?.to_scalar())
            .expect("loss");
        let onehot = Tensor::ones((rows, 1), DType::F64, &Device::Cpu).expect("ones");
        let gradient = p
            .scatter_add(&wanted, &onehot.neg().expect("minus"), 1)
            .expect("gradient");
        let fused = cross_entropy(&logits, &wanted, 0.25)
            .expect("fused")
            .expect("applies");
        let gradient = (gradient * 0.25).expect("a quarter");
        assert!(
            (fused - loss).abs() < 1e-6 * loss,
            "{fused} instead of {loss}"
        );
        assert_near(&logits, &gradient, "gradient");
    }

    #[test]
    fn other_dtypes_are_left_to_tensor_operations() {
        let x = wide(&random(&[2, 3]));
        assert!(gated(&x, &x, &Activation::Silu).expect("asks").is_none());
    }
}
