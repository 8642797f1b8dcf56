//! Every kernel beside its twin of plain operations in f64, on fresh random numbers: what is said of a GPU holds on this one.

use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::super::config::{Rope, Scaling};
use super::super::family::{Activation, Scores};
use super::super::ops;
use super::super::segments::{Segment, Segments};
use super::super::tape::record;
use super::{AdamW, adamw, add_product, cross_entropy, gather, scale_columns, sum_of_products};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A GPU, or a loud word that there is none.
fn gpu() -> Option<Device> {
    crate::device::open(0)
        .map_err(|error| eprintln!("SKIPPED, no GPU: {error}"))
        .ok()
}

/// Of the whole of a tensor, how far a result that is rounded to a dtype may be off.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        // half a unit in the last place is 2⁻¹¹, and 2⁻⁸
        DType::F16 => 2e-3,
        _ => 1.2e-2,
    }
}

fn random(shape: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).expect("random numbers")
}

/// ‖found − wanted‖ / ‖wanted‖, and infinite where a number is none.
fn distance(found: &Tensor, wanted: &Tensor) -> Result<f64> {
    let (found, wanted) = (found.to_device(&Device::Cpu)?.to_dtype(DType::F64)?, wanted);
    let norm = |x: &Tensor| -> Result<f64> { Ok(x.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt()) };
    // what is exactly zero, as where a query sees one key, is held against numbers of a usual size
    let least = 0.1 * (wanted.elem_count() as f64).sqrt();
    let far = norm(&(found - wanted)?)? / norm(wanted)?.max(least);
    Ok(if far.is_nan() { f64::INFINITY } else { far })
}

/// Holds the values and gradients of `f` on the GPU against those of `twin` on the CPU in f64.
fn hold(
    what: &str,
    shapes: &[&[usize]],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    twin: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let Some(gpu) = gpu() else { return };
    for dtype in DTYPES {
        let held = || -> Result<()> {
            let drawn: Vec<Tensor> = shapes.iter().map(|shape| random(shape)).collect();
            let rounded: Vec<Tensor> = (drawn.iter())
                .map(|x| x.to_dtype(dtype))
                .collect::<Result<_>>()?;
            let ours: Vec<Var> = (rounded.iter())
                .map(|x| Var::from_tensor(&x.to_device(&gpu)?))
                .collect::<Result<_>>()?;
            let theirs: Vec<Var> = (rounded.iter())
                .map(|x| Var::from_tensor(&x.to_dtype(DType::F64)?))
                .collect::<Result<_>>()?;
            let tensors = |vars: &[Var]| -> Vec<Tensor> {
                vars.iter().map(|var| var.as_tensor().clone()).collect()
            };
            let (y, tape) = record(&[], || f(&tensors(&ours)))?;
            let (wanted, twin_tape) = record(&[], || twin(&tensors(&theirs)))?;
            let check = |name: &str, found: &Tensor, wanted: &Tensor| -> Result<()> {
                let far = distance(found, wanted)?;
                assert!(
                    far <= tolerance(dtype),
                    "{what} of {dtype:?}, {name}: off by {far:.2e}"
                );
                Ok(())
            };
            check("y", &y, &wanted.detach())?;
            let g = random(y.dims()).to_dtype(dtype)?;
            let mut found = tape.back(&y, g.to_device(&gpu)?)?;
            let g = g.to_dtype(DType::F64)?;
            let wanted: Vec<Option<Tensor>> = if twin_tape.is_empty() {
                // of candle's own operations, which it differentiates
                let gradients = (wanted * g)?.sum_all()?.backward()?;
                theirs.iter().map(|x| gradients.get(x).cloned()).collect()
            } else {
                let mut gradients = twin_tape.back(&wanted, g)?;
                theirs.iter().map(|x| gradients.take(x)).collect()
            };
            for (at, (ours, wanted)) in ours.iter().zip(wanted).enumerate() {
                let (Some(found), Some(wanted)) = (found.take(ours), wanted) else {
                    panic!("{what}: input {at} has no gradient");
                };
                check(&format!("gradient {at}"), &found, &wanted)?;
            }
            Ok(())
        };
        held().unwrap_or_else(|error| panic!("{what} of {dtype:?}: {error}"));
    }
}

#[test]
fn rms_norm() {
    for n in [3, 63, 576, 3072, 3077] {
        let twin = |t: &[Tensor]| {
            let mean = (t[0].sqr()?.sum_keepdim(D::Minus1)? / n as f64)?;
            let normed = t[0].broadcast_div(&(mean + 1e-5)?.sqrt()?)?;
            normed.broadcast_mul(&t[1])
        };
        let f = |t: &[Tensor]| ops::rms_norm(&t[0], &t[1], 1e-5);
        hold("rms_norm", &[&[3, 37, n], &[n]], f, twin);
    }
}

#[test]
fn rms_norm_beside_a_sum() {
    for n in [63, 576, 3072] {
        let f = |t: &[Tensor]| {
            let (sum, y) = ops::rms_norm_beside(&t[0], Some(&t[1]), &t[2], 1e-5)?;
            let (sum, z) = ops::rms_norm_beside(&sum, None, &t[2], 1e-5)?;
            ops::add(&ops::add(&sum, &y)?, &z)
        };
        let twin = |t: &[Tensor]| {
            let sum = (&t[0] + &t[1])?;
            let mean = (sum.sqr()?.sum_keepdim(D::Minus1)? / n as f64)?;
            let normed = sum.broadcast_div(&(mean + 1e-5)?.sqrt()?)?;
            &sum + (normed.broadcast_mul(&t[2])? * 2.0)?
        };
        hold(
            "rms_norm_beside",
            &[&[3, 37, n], &[3, 37, n], &[n]],
            f,
            twin,
        );
    }
}

#[test]
fn gated() {
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        for n in [1, 61, 1536] {
            let f = |t: &[Tensor]| ops::gated(&t[0], &t[1], &activation);
            let shape = [5, 19, n];
            hold(&format!("{activation:?}"), &[&shape, &shape], f, f);
        }
    }
}

#[test]
fn gated_stacked() {
    let activation = Activation::Silu;
    for n in [1, 61, 1536] {
        let f = |t: &[Tensor]| ops::gated_stacked(&t[0], &activation);
        hold("gated_stacked", &[&[5, 19, 2 * n]], f, f);
    }
}

#[test]
fn split() {
    for (shape, dim, sides) in [
        ([2, 7, 96], 2, [64, 16, 16]),
        ([2, 7, 5], 2, [1, 3, 1]),
        ([3, 9, 8], 1, [7, 1, 1]),
    ] {
        // a part without a gradient has one of zeros
        let f = |t: &[Tensor]| {
            let parts = ops::split(&t[0], dim, &sides)?;
            let y = ops::split(&t[0], dim, &sides)?.remove(1);
            ops::add(&ops::scaled(&parts[1], 2.0)?, &y)
        };
        hold("split", &[&shape], f, f);
    }
}

#[test]
fn products_that_are_added() {
    let Some(gpu) = gpu() else { return };
    for dtype in DTYPES {
        for (rows, k, n) in [(1, 8, 65), (65, 8, 1), (37, 312, 129), (300, 16, 576)] {
            let held = || -> Result<()> {
                let drawn: Vec<Tensor> = ([[rows, n], [rows, k], [k, n]].iter())
                    .map(|shape| random(shape).to_dtype(dtype))
                    .collect::<Result<_>>()?;
                let (y, a) = (drawn[0].to_device(&gpu)?.copy()?, drawn[1].to_device(&gpu)?);
                let factors = random(&[k - 3]);
                let scaled = scale_columns(&a, &factors.to_device(&gpu)?)?.expect("a kernel");
                assert!(add_product(&y, &scaled, &drawn[2].to_device(&gpu)?)?);
                let wide: Vec<Tensor> = (drawn.iter())
                    .map(|x| x.to_dtype(DType::F64))
                    .collect::<Result<_>>()?;
                let zeros = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
                let factors = Tensor::cat(&[factors, zeros], 0)?.to_dtype(DType::F64)?;
                let product = wide[1].broadcast_mul(&factors)?.matmul(&wide[2])?;
                let far = distance(&y, &(&wide[0] + &product)?)?;
                assert!(far <= tolerance(dtype), "off by {far:.2e}");
                // and once more, of a factor that lies turned
                let turned = drawn[2].t()?.contiguous()?.to_device(&gpu)?;
                assert!(add_product(&y, &scaled, &turned.t()?)?);
                let far = distance(&y, &(&wide[0] + (product * 2.0)?)?)?;
                assert!(far <= 2.0 * tolerance(dtype), "turned: off by {far:.2e}");
                Ok(())
            };
            held().unwrap_or_else(|error| panic!("{dtype:?} {rows} × {k} × {n}: {error}"));
        }
    }
}

#[test]
fn rotate() {
    for (dim, d, h) in [(64, 64, 3), (96, 96, 2), (20, 30, 1)] {
        let rope = Rope {
            theta: 10_000.0,
            dim,
            scaling: Scaling::None,
        };
        let positions: Vec<usize> = (0..41).map(|at| at * 7).collect();
        let angles = |device: &Device| rope.angles(&positions, &[41], device);
        let f = |t: &[Tensor]| ops::rotate(&t[0], &angles(t[0].device())?);
        let twin = |t: &[Tensor]| {
            let angles = angles(&Device::Cpu)?;
            let wide = |x: &Tensor| x.to_dtype(DType::F64)?.unsqueeze(1);
            let (cos, sin, half) = (wide(&angles.cos)?, wide(&angles.sin)?, dim / 2);
            let (a, b) = (t[0].narrow(3, 0, half)?, t[0].narrow(3, half, half)?);
            let rest = t[0].narrow(3, dim, d - dim)?;
            let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
            let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
            match d > dim {
                true => Tensor::cat(&[first, second, rest], 3),
                false => Tensor::cat(&[first, second], 3),
            }
        };
        hold("rotate", &[&[2, 41, h, d]], f, twin);
        // and on the way out of one tensor, whose heads come back into it
        let together = |t: &[Tensor]| {
            let [q, k, v] = ops::split_heads(&t[0], [2, 1, 1], &angles(t[0].device())?)?;
            let q = ops::split(&q, 2, &[1, 1])?;
            let q = ops::add(&q[0], &ops::scaled(&q[1], 2.0)?)?;
            ops::add(
                &q,
                &ops::add(&ops::scaled(&k, 3.0)?, &ops::scaled(&v, 5.0)?)?,
            )
        };
        let apart = |t: &[Tensor]| {
            let x = t[0].reshape((2, 41, 4, d))?;
            let turned = twin(&[x.narrow(2, 0, 3)?])?;
            let part = |x: &Tensor, at: usize, times: f64| x.narrow(2, at, 1)? * times;
            let q = (part(&turned, 0, 1.0)? + part(&turned, 1, 2.0)?)?;
            q + (part(&turned, 2, 3.0)? + part(&x, 3, 5.0)?)?
        };
        hold("heads", &[&[2, 41, 4 * d]], together, apart);
    }
}

#[test]
fn attention() {
    // batch, tokens, heads, shared heads, width
    for (b, t, h, kv, d) in [
        (2, 37, 4, 2, 16),
        (1, 300, 3, 1, 64),
        (2, 129, 2, 2, 96),
        (1, 70, 2, 1, 80),
        (1, 200, 4, 1, 128),
        (2, 65, 1, 1, 31),
        (1, 90, 2, 2, 256),
        (3, 1, 2, 1, 64),
    ] {
        let mut rows = vec![Segments::whole(b, t)];
        if t > 30 {
            let row = |at: usize| {
                let padding = 3 * at;
                vec![
                    Segment::Sequence(20),
                    Segment::Padding(padding),
                    Segment::Sequence(t - 20 - padding),
                ]
            };
            rows.push(Segments::new((0..b).map(row).collect()));
        }
        for segments in &rows {
            for (window, cap) in [(None, None), (Some(11), None), (None, Some(1.5))] {
                let scores = Scores {
                    scale: (d as f64).sqrt().recip(),
                    cap,
                };
                let f = |tensors: &[Tensor]| {
                    let [q, k, v] = tensors else { unreachable!() };
                    let sight = segments.sight(window.filter(|&w| w < t), q.device())?;
                    ops::attention(q, k, v, &sight, scores)
                };
                let what = format!("attention {:?} {window:?} {cap:?}", (b, t, h, kv, d));
                hold(
                    &what,
                    &[&[b, t, h, d], &[b, t, kv, d], &[b, t, kv, d]],
                    f,
                    f,
                );
            }
        }
    }
}

#[test]
fn cross_entropy_and_its_gradient() {
    let Some(gpu) = gpu() else { return };
    for dtype in DTYPES {
        for (rows, n) in [(1, 1), (7, 100), (33, 49_153), (5, 49_152)] {
            let held = || -> Result<()> {
                let logits = (random(&[rows, n]) * 4.0)?.to_dtype(dtype)?;
                let targets: Vec<u32> = (0..rows).map(|row| (row * 7919 % n) as u32).collect();
                let targets = Tensor::from_vec(targets, (rows, 1), &Device::Cpu)?;
                let there = logits.to_device(&gpu)?.copy()?;
                let loss = cross_entropy(&there, &targets.to_device(&gpu)?, 0.25)?;
                let loss = loss.expect("a kernel").to_vec1::<f32>()?;
                let loss: f64 = loss.into_iter().map(f64::from).sum();
                let logits = Var::from_tensor(&logits.to_dtype(DType::F64)?)?;
                let highest = logits.detach().max_keepdim(1)?;
                let sums = logits.broadcast_sub(&highest)?.exp()?.sum_keepdim(1)?;
                let each = ((sums.log()? + highest)? - logits.gather(&targets, 1)?)?;
                let wanted = each.sum_all()?;
                let gradients = wanted.backward()?;
                let wanted = wanted.to_scalar::<f64>()?;
                assert!(
                    (loss - wanted).abs() <= 1e-5 * wanted.abs() + 1e-6,
                    "{loss} for {wanted}"
                );
                if n > 1 {
                    // of p beside the target's 1 − p: numbers of another size, held apart
                    let wanted = (gradients.get(&logits).expect("a gradient") * 0.25)?;
                    let zeros = wanted.zeros_like()?;
                    let others = wanted.ge(0.0)?;
                    for part in [others.clone(), others.eq(0u8)?] {
                        let found = there.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                        let found = part.where_cond(&found, &zeros)?;
                        let wanted = part.where_cond(&wanted, &zeros)?;
                        let norm = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>();
                        let far = (norm(&(found - &wanted)?)? / norm(&wanted)?).sqrt();
                        assert!(far <= tolerance(dtype), "gradient: off by {far:.2e}");
                    }
                }
                Ok(())
            };
            held().unwrap_or_else(|error| panic!("{dtype:?} {rows} × {n}: {error}"));
        }
    }
}

#[test]
fn sums_of_products() {
    let Some(gpu) = gpu() else { return };
    for dtype in DTYPES {
        for (rows, q) in [(1, 1), (1000, 57), (4096, 307), (300, 1024)] {
            let held = || -> Result<()> {
                let (a, b) = (
                    random(&[rows, q]).to_dtype(dtype)?,
                    random(&[rows, q]).to_dtype(dtype)?,
                );
                let sum = sum_of_products(&a.to_device(&gpu)?, &b.to_device(&gpu)?)?;
                let wanted = (a.to_dtype(DType::F64)? * b.to_dtype(DType::F64)?)?.sum(0)?;
                let far = distance(&sum.expect("a kernel"), &wanted)?;
                assert!(far <= 1e-5, "{dtype:?} {rows} × {q}: off by {far:.2e}");
                Ok(())
            };
            held().unwrap_or_else(|error| panic!("{dtype:?} {rows} × {q}: {error}"));
        }
    }
}

/// Not near: to the bit, so that a run may move between a GPU and a CPU.
#[test]
fn adamw_has_the_bits_of_the_cpu_whatever_the_parts() {
    let Some(gpu) = gpu() else { return };
    let counts = [1usize, 1003, 300, 129];
    let upload = |x: &Vec<f32>| Tensor::new(x.as_slice(), &gpu).expect("uploads");
    let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
    let drawn = || -> Vec<Vec<f32>> {
        let part = |count: &usize| random(&[*count]).to_vec1().expect("numbers");
        counts.iter().map(part).collect()
    };
    let mut on_cpu = crate::train::optimizer::AdamW::new(0.01);
    let mut values = drawn();
    let there: Vec<Tensor> = values.iter().map(upload).collect();
    let zeros = || Tensor::zeros(counts.iter().sum::<usize>(), DType::F32, &gpu).expect("zeros");
    let (first, second) = (zeros(), zeros());
    for step in 1..=5 {
        let gradients = drawn();
        on_cpu.begin_step();
        for (part, (values, gradient)) in values.iter_mut().zip(&gradients).enumerate() {
            on_cpu.update(&part.to_string(), values, gradient, 1e-2);
        }
        let parts: Vec<Tensor> = gradients.iter().map(upload).collect();
        let gradient = gather(&parts).expect("runs").expect("a kernel");
        let gathered = gradient.to_vec1::<f32>().expect("downloads");
        assert_eq!(bits(&gathered), bits(&gradients.concat()));
        let with = AdamW {
            learning_rate: 1e-2,
            beta1: on_cpu.beta1,
            beta2: on_cpu.beta2,
            eps: on_cpu.eps,
            weight_decay: on_cpu.weight_decay,
            step,
        };
        assert!(adamw(&there, &gradient, [&first, &second], with).expect("runs"));
        for (there, values) in there.iter().zip(&values) {
            let moved = there.to_vec1::<f32>().expect("downloads");
            assert_eq!(bits(&moved), bits(values), "after step {step}");
        }
    }
}
