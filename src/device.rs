//! Devices of candle's, and the one place where a GPU is opened.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

#[cfg_attr(not(feature = "cuda"), path = "device/none.rs")]
#[cfg_attr(feature = "cuda", path = "device/cuda.rs")]
mod cuda;

#[cfg(feature = "cuda")]
pub use cuda::{address, find_library};
pub use cuda::{gpus, open};

/// A device, and the queues of work on it.
///
/// What is asked of a GPU through one queue is done in the order in which it was asked for: a worker that waits there for a
/// number also waits for what others copy and multiply. Each has a queue of its own, and copies overlap with products.
#[derive(Debug, Clone)]
pub struct Queues {
    device: Device,
    idle: Arc<Mutex<Vec<Lane>>>,
}

/// A queue, which nobody else uses until this is dropped. Tensors of different queues do not mix.
#[derive(Debug)]
pub struct Queue {
    device: Device,
    stage: Mutex<cuda::Stage>,
    home: Arc<Mutex<Vec<Lane>>>,
}

/// What a queue leaves to the next one.
#[derive(Debug)]
struct Lane {
    device: Device,
    stage: cuda::Stage,
}

impl Queues {
    pub fn of(device: Device) -> Self {
        let first = Lane {
            device: device.clone(),
            stage: cuda::Stage::default(),
        };
        Self {
            device,
            idle: Arc::new(Mutex::new(vec![first])),
        }
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// One that is idle, or another.
    ///
    /// # Errors
    /// The GPU has no room for another.
    pub fn take(&self) -> Result<Queue> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let Lane { device, stage } = match idle {
            Some(lane) => lane,
            None => Lane {
                device: cuda::beside(&self.device).map_err(Error::from)?,
                stage: cuda::Stage::default(),
            },
        };
        Ok(Queue {
            device,
            stage: Mutex::new(stage),
            home: self.idle.clone(),
        })
    }
}

impl Queue {
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Numbers of this process's memory on the device, by rows of `columns`.
    pub fn upload(&self, values: &[f32], (rows, columns): (usize, usize)) -> Result<Tensor> {
        assert_eq!(values.len(), rows * columns);
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match stage.upload(&self.device, values)? {
            Some(there) => there.reshape((rows, columns))?,
            None => Tensor::from_slice(values, (rows, columns), &self.device)?,
        })
    }

    /// The numbers of a tensor of this queue, by rows.
    pub fn download(&self, there: &Tensor) -> Result<Vec<f32>> {
        let there = there.flatten_all()?;
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match stage.download(&there)? {
            Some(values) => values,
            None => there.to_vec1()?,
        })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let stage = self.stage.get_mut().unwrap_or_else(PoisonError::into_inner);
        let lane = Lane {
            device: self.device.clone(),
            stage: std::mem::take(stage),
        };
        let mut idle = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(lane);
    }
}

/// How a product reads factors in f32; others are read as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// All of their 24 bits.
    Whole,
    /// The first 11 bits, as tensor cores do (TF32): some ten times as fast on a GPU.
    Rounded,
}

/// y ← α·a·b + β·y, summed in f32: a (m, k) and b (k, n), each dense as it lies or turned, y (m, n) dense, all of one dtype.
/// Nobody else may hold y.
pub fn multiply(
    y: &Tensor,
    alpha: f32,
    a: &Tensor,
    b: &Tensor,
    beta: f32,
    reading: Reading,
) -> candle_core::Result<()> {
    let ((m, k), (_, n)) = (a.dims2()?, b.dims2()?);
    assert!(b.dim(0)? == k && y.dims() == [m, n], "a product's shapes");
    assert!(k > 0, "a sum of something");
    if y.device().is_cuda() {
        return cuda::multiply(y, alpha, a, b, beta, reading);
    }
    let read = |x: &Tensor| match reading {
        Reading::Rounded if x.dtype() == DType::F32 => rounded(x),
        _ => Ok(x.clone()),
    };
    let mut sum = (read(a)?.matmul(&read(b)?)? * f64::from(alpha))?;
    if beta != 0.0 {
        sum = (sum + (y * f64::from(beta))?)?;
    }
    y.slice_set(&sum.contiguous()?, 0, 0)
}

/// As a tensor core reads it.
fn rounded(x: &Tensor) -> candle_core::Result<Tensor> {
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    // the other 13 bits of the mantissa, to the nearest
    let round = |x: f32| {
        f32::from_bits(x.to_bits().wrapping_add(0xfff + (x.to_bits() >> 13 & 1)) & !0x1fff)
    };
    Tensor::from_iter(values.into_iter().map(round), x.device())?.reshape(x.shape())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_scaled_and_added_however_their_factors_lie() {
        let values = |count: usize, seed: u64| -> Vec<f32> {
            // eight bits, which every reading keeps
            (0..count)
                .map(|i| ((i as u64 * 37 + seed) % 19) as f32 - 9.0)
                .collect()
        };
        let (m, k, n) = (5, 7, 3);
        let of = |rows, columns, seed| {
            Tensor::from_vec(values(rows * columns, seed), (rows, columns), &Device::Cpu)
                .expect("a")
        };
        let turned = |x: &Tensor| x.t().and_then(|x| x.contiguous()).and_then(|x| x.t());
        let (a, b) = (of(m, k, 1), of(k, n, 5));
        for a in [a.clone(), turned(&a).expect("turns")] {
            for b in [b.clone(), turned(&b).expect("turns")] {
                for reading in [Reading::Whole, Reading::Rounded] {
                    let y = of(m, n, 11);
                    multiply(&y, 2.0, &a, &b, -3.0, reading).expect("multiplies");
                    let (x, z, before) = (values(m * k, 1), values(k * n, 5), values(m * n, 11));
                    let found = y.flatten_all().and_then(|y| y.to_vec1::<f32>());
                    for (at, found) in found.expect("y").into_iter().enumerate() {
                        let (i, j) = (at / n, at % n);
                        let sum: f32 = (0..k).map(|p| x[i * k + p] * z[p * n + j]).sum();
                        assert_eq!(found, 2.0 * sum - 3.0 * before[at]);
                    }
                }
            }
        }
    }

    #[test]
    fn tensor_cores_read_eleven_bits_to_the_nearest() {
        let fine = 1.0 + 2f32.powi(-10);
        let x = [
            fine,
            1.0 + 2f32.powi(-11),
            1.0 + 1.5 * 2f32.powi(-10),
            -3.3e-20,
        ];
        let x = Tensor::new(&x, &Device::Cpu).expect("x");
        let read = rounded(&x).and_then(|x| x.to_vec1::<f32>()).expect("reads");
        // what lies in the middle goes to the even one
        assert_eq!(read[..3], [fine, 1.0, 1.0 + 2.0 * 2f32.powi(-10)]);
        assert!((read[3] / -3.3e-20 - 1.0).abs() <= 2f32.powi(-11));
    }

    #[test]
    fn numbers_come_back_from_a_gpu_as_they_went() {
        let gpu = match open(0) {
            Ok(gpu) => Queues::of(gpu),
            Err(error) => return eprintln!("SKIPPED, no GPU: {error}"),
        };
        let queue = gpu.take().expect("a queue");
        // around what is copied at a time, 2¹⁸ numbers, and the second time through the same memory
        for count in [
            1,
            (1 << 18) - 1,
            1 << 18,
            (1 << 18) + 1,
            3 << 18,
            (5 << 18) + 7,
        ] {
            let values: Vec<f32> = (0..count).map(|i| i as f32 * 0.5).collect();
            let there = queue.upload(&values, (1, count)).expect("uploads");
            assert!(
                queue.download(&there).expect("downloads") == values,
                "{count}"
            );
            let part = there
                .narrow(1, count / 3, count - count / 3)
                .expect("a part");
            assert!(
                queue.download(&part).expect("downloads") == values[count / 3..],
                "{count}"
            );
        }
    }

    #[test]
    fn queues_are_used_again_and_never_by_two_at_a_time() {
        let queues = Queues::of(Device::Cpu);
        let idle = |queues: &Queues| queues.idle.lock().expect("no panic").len();
        let first = queues.take().expect("the device itself");
        let second = queues.clone().take().expect("another");
        assert_eq!(idle(&queues), 0);
        drop((first, second));
        assert_eq!(idle(&queues), 2);
        let _again = queues.take().expect("an idle one");
        assert_eq!(idle(&queues), 1);
    }
}
