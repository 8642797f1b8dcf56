//! A weight where its products are computed: in this process's memory, or on a device through candle.
//!
//! Only products run on a device. The small eigenproblems stay on the CPU, where they overlap with the next matrix: a worker
//! that waits for the device leaves its core to the others.

use candle_core::{DType, Device, Tensor};
use ndarray::{Array2, ArrayView2, Axis, CowArray, Ix2};

use super::product::{gemm, gram, gram_of_panels, multiply};
use super::real::row_major;
use crate::error::Result;

/// Where products with a whole matrix are computed.
#[derive(Debug, Clone, Default)]
pub enum Backend {
    /// On the calling thread.
    #[default]
    Cpu,
    /// On a device of candle's, a GPU in practice.
    Device(Device),
}

impl Backend {
    /// `cpu` or `cuda`, as the `svd` section records it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Device(device) if device.is_cuda() => "cuda",
            Self::Device(device) if device.is_metal() => "metal",
            Self::Device(_) | Self::Cpu => "cpu",
        }
    }
}

impl From<Device> for Backend {
    /// candle's own CPU products take every core for one matrix: there, ours run, one matrix for each core.
    fn from(device: Device) -> Self {
        if device.is_cpu() {
            Self::Cpu
        } else {
            Self::Device(device)
        }
    }
}

/// M (s, l), s ≤ l.
pub enum Operand<'a> {
    Host(CowArray<'a, f32, Ix2>),
    Device(Tensor),
}

/// M·Mᵀ (s, s) in f32, both halves filled.
pub enum Gram {
    Host(Array2<f32>),
    Device(Tensor),
}

impl<'a> Operand<'a> {
    /// Takes a matrix to where its products are computed.
    pub fn new(short: ArrayView2<'a, f32>, backend: &Backend) -> Result<Self> {
        assert!(short.nrows() <= short.ncols());
        Ok(match backend {
            Backend::Cpu => Self::Host(short.into()),
            Backend::Device(device) => Self::Device(upload(short, device)?),
        })
    }

    /// (s, l)
    pub fn dim(&self) -> (usize, usize) {
        match self {
            Self::Host(m) => m.dim(),
            Self::Device(m) => m.dims2().expect("a matrix has two sides"),
        }
    }

    /// x (k, s) → x·M (k, l)
    pub fn forward(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match self {
            Self::Host(m) => Ok(gemm(x, false, m.view(), false)),
            Self::Device(m) => download(&upload(x, m.device())?.matmul(m)?),
        }
    }

    /// x (k, l) → x·Mᵀ (k, s)
    pub fn backward(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match self {
            Self::Host(m) => Ok(gemm(x, false, m.view(), true)),
            Self::Device(m) => download(&upload(x, m.device())?.matmul(&m.t()?)?),
        }
    }

    /// x (k, s) → M·Mᵀ·xᵀ (s, k)
    pub fn square(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match self {
            Self::Host(m) => {
                let there = gemm(m.view(), true, x, true);
                Ok(gemm(m.view(), false, there.view(), false))
            }
            Self::Device(m) => {
                let there = upload(x, m.device())?.matmul(m)?;
                download(&m.matmul(&there.t()?)?)
            }
        }
    }

    /// M·Mᵀ in f32.
    pub fn gram(&self) -> Result<Gram> {
        Ok(match self {
            Self::Host(m) => Gram::Host(gram(m.view())),
            Self::Device(m) => Gram::Device(m.matmul(&m.t()?)?),
        })
    }

    /// M·Mᵀ in f64 where it was computed, on a device that multiplies it fast.
    pub fn gram_f64_there(&self) -> Result<Option<Tensor>> {
        // as many columns at a time as keep the copies in f64 small
        const COLUMNS: usize = 4096;
        let Self::Device(m) = self else {
            return Ok(None);
        };
        if !multiplies_double(m.device()) {
            return Ok(None);
        }
        let (side, length) = m.dims2()?;
        let mut sum = Tensor::zeros((side, side), DType::F64, m.device())?;
        for start in (0..length).step_by(COLUMNS) {
            let columns = m.narrow(1, start, COLUMNS.min(length - start))?;
            let columns = columns.contiguous()?.to_dtype(DType::F64)?;
            sum = (sum + columns.matmul(&columns.t()?)?)?;
        }
        Ok(Some(sum))
    }

    /// M·Mᵀ in f64.
    pub fn gram_f64(&self) -> Result<Array2<f64>> {
        match self {
            Self::Host(m) => Ok(gram(m.view())),
            Self::Device(m) => {
                let m = m.to_dtype(DType::F64)?;
                let rows = m.matmul(&m.t()?)?.to_vec2::<f64>()?;
                let side = rows.len();
                Ok(Array2::from_shape_vec((side, side), rows.concat()).expect("s rows of s"))
            }
        }
    }

    /// M without the given left directions, x (k, s), which are orthonormal.
    pub fn without<'r>(&'r self, x: &'r Array2<f32>) -> Result<Rest<'r, 'a>> {
        let part = self.forward(x.view())?;
        Ok(Rest {
            whole: self,
            x,
            part,
        })
    }
}

/// M − xᵀ·(x·M), never formed as a whole in this process's memory.
pub struct Rest<'r, 'a> {
    whole: &'r Operand<'a>,
    /// (k, s)
    x: &'r Array2<f32>,
    /// x·M (k, l)
    part: Array2<f32>,
}

impl Rest<'_, '_> {
    /// (s, l)
    pub fn dim(&self) -> (usize, usize) {
        self.whole.dim()
    }

    /// y (k, s) → R·Rᵀ·yᵀ (s, k) of what is left, R.
    pub fn square(&self, y: ArrayView2<f32>) -> Result<Array2<f32>> {
        if self.x.is_empty() {
            return self.whole.square(y);
        }
        let x = self.x.view();
        let mut apart = y.to_owned();
        let inside = gemm(y, false, x, true);
        multiply(&mut apart.view_mut(), 1.0, inside.view(), -1.0, x);
        let mut squared = self.whole.square(apart.view())?;
        let inside = gemm(x, false, squared.view(), false);
        multiply(&mut squared.view_mut(), 1.0, x.t(), -1.0, inside.view());
        Ok(squared)
    }

    /// R·Rᵀ in f32.
    pub fn gram(&self) -> Result<Gram> {
        // as many columns at a time as keep the copies small
        const COLUMNS: usize = 1024;
        Ok(match self.whole {
            whole if self.x.is_empty() => return whole.gram(),
            Operand::Host(m) => {
                let columns = m.axis_chunks_iter(Axis(1), COLUMNS);
                let parts = self.part.axis_chunks_iter(Axis(1), COLUMNS);
                let panels = columns.zip(parts).map(|(columns, part)| {
                    let mut panel = row_major::<f32, f32>(columns);
                    multiply(&mut panel.view_mut(), 1.0, self.x.t(), -1.0, part);
                    panel.into()
                });
                Gram::Host(gram_of_panels(self.dim().0, panels))
            }
            Operand::Device(m) => {
                let rest = self.on_device(m)?;
                Gram::Device(rest.matmul(&rest.t()?)?)
            }
        })
    }

    /// R·Rᵀ in f64 where it was computed, on a device that multiplies it fast.
    pub fn gram_f64_there(&self) -> Result<Option<Tensor>> {
        match self.whole {
            Operand::Device(m) if !self.x.is_empty() => {
                Operand::Device(self.on_device(m)?).gram_f64_there()
            }
            whole => whole.gram_f64_there(),
        }
    }

    fn on_device(&self, m: &Tensor) -> Result<Tensor> {
        let x = upload(self.x.view(), m.device())?;
        let part = upload(self.part.view(), m.device())?;
        Ok(m.sub(&x.t()?.matmul(&part)?)?)
    }
}

impl Gram {
    /// x (k, s) → M·Mᵀ·xᵀ (s, k)
    pub fn apply(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match self {
            Self::Host(g) => Ok(gemm(g.view(), false, x, true)),
            Self::Device(g) => download(&g.matmul(&upload(x, g.device())?.t()?)?),
        }
    }

    pub fn into_host(self) -> Result<Array2<f32>> {
        match self {
            Self::Host(g) => Ok(g),
            Self::Device(g) => download(&g),
        }
    }
}

/// Whether products in double precision cost little more than in single: of NVIDIA's, the data centres' chips have units for
/// them (compute capability 8.0, 9.0 and 10.0), and all others a sixty-fourth of the rate.
fn multiplies_double(device: &Device) -> bool {
    match device {
        Device::Cpu => true,
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let capability = device.cuda_stream().context().compute_capability();
            matches!(capability, Ok((8..=10, 0)))
        }
        _ => false,
    }
}

fn upload(a: ArrayView2<f32>, device: &Device) -> Result<Tensor> {
    let dense = a.as_standard_layout();
    let values = dense.as_slice().expect("it was made dense");
    Ok(Tensor::from_slice(values, a.dim(), device)?)
}

fn download(tensor: &Tensor) -> Result<Array2<f32>> {
    let sides = tensor.dims2()?;
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    Ok(Array2::from_shape_vec(sides, values).expect("a tensor has the elements of its shape"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::lapack::orthonormalise_rows;
    use crate::random::normal;

    #[test]
    fn nothing_of_the_directions_taken_out_is_left() {
        let matrix = normal(40, 1060, 1) * 1e3;
        let mut x = normal(3, 40, 2);
        orthonormalise_rows(&mut x).expect("orthonormal");
        let left = &matrix - &x.t().dot(&x.dot(&matrix));
        let truth = left.dot(&left.t());
        // rows of the matrix are some 3·10⁴ long; two sums of 1060 roundings, each of them some ε·√1060
        let noise = 2.0 * 6e-8 * 33.0 * 9e8 * 3.0;
        let y = normal(5, 40, 3);
        for backend in [Backend::Cpu, Backend::Device(Device::Cpu)] {
            let whole = Operand::new(matrix.view(), &backend).expect("uploads");
            let rest = whole.without(&x).expect("multiplies");
            let gram = rest.gram().expect("multiplies");
            let squared = rest.square(y.view()).expect("multiplies");
            let applied = gram.apply(y.view()).expect("multiplies");
            let gram = gram.into_host().expect("it is there");
            let off = (&gram - &truth).fold(0f32, |most, x| most.max(x.abs()));
            assert!(off < noise, "{off:e} of {noise:e}");
            for found in [squared, applied] {
                let off = (found - truth.dot(&y.t())).fold(0f32, |most, x| most.max(x.abs()));
                // of 40 elements of some standard deviations
                assert!(off < 15.0 * noise, "{off:e} of {noise:e}");
            }
            if let Some(double) = rest.gram_f64_there().expect("multiplies") {
                let double = double.to_dtype(DType::F32).expect("narrows");
                let off = download(&double).expect("it is there") - &truth;
                assert!(off.iter().all(|x| x.abs() < noise));
            }
        }
    }
}
