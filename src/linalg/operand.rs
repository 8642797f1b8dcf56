//! A matrix where its products are computed: in this process's memory, or on a device through candle.
//!
//! What is as long as a weight stays on the device, and so does what is made of it. The small eigenproblems are solved on the
//! CPU, where they overlap with the next matrix.

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};
use ndarray::{Array2, ArrayView2, Axis, CowArray, Ix2, s};

use super::lapack::{
    EXACT_PIVOT_MIN, FIRST_PIVOT_MIN, SECOND_PIVOT_MIN, cholesky, orthonormalise_rows, solve_lower,
};
use super::product::{gemm, gram, gram_of_panels, multiply};
use super::real::row_major;
use super::rows;
use super::tiles::Lower;
use crate::device::{Queue, Queues};
use crate::error::Result;

/// Where products with a whole matrix are computed.
#[derive(Debug, Clone, Default)]
pub enum Backend {
    /// On the calling thread.
    #[default]
    Cpu,
    /// On a device of candle's, a GPU in practice.
    Device(Queues),
}

impl Backend {
    /// `cpu` or `cuda`, as the `svd` section records it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Device(queues) if queues.device().is_cuda() => "cuda",
            Self::Device(queues) if queues.device().is_metal() => "metal",
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
            Self::Device(Queues::of(device))
        }
    }
}

/// A matrix, here or on a device: a weight M (s, l) with s ≤ l, or rows that are made of it or multiplied with it.
pub enum Operand<'a> {
    Host(CowArray<'a, f32, Ix2>),
    Device(There),
}

/// A matrix on a device.
pub struct There {
    matrix: Tensor,
    /// What is made of a matrix is asked for through the same one, which is nobody else's as long as any of it is there.
    queue: Arc<Queue>,
}

/// M·Mᵀ (s, s) in f32, both halves filled.
pub enum Gram {
    Host(Array2<f32>),
    Device(There),
}

impl<'a> Operand<'a> {
    /// Takes a matrix to where its products are computed.
    pub fn new(short: ArrayView2<'a, f32>, backend: &Backend) -> Result<Self> {
        assert!(short.nrows() <= short.ncols());
        Ok(match backend {
            Backend::Cpu => Self::Host(short.into()),
            Backend::Device(queues) => {
                let queue = Arc::new(queues.take()?);
                // as it lies: a device reads either way as fast
                let matrix = match short.t().is_standard_layout() {
                    true => upload(short.t(), &queue)?.t()?,
                    false => upload(short, &queue)?,
                };
                Self::Device(There { matrix, queue })
            }
        })
    }

    /// A matrix that lies in this process's memory.
    pub fn here(matrix: &'a Array2<f32>) -> Self {
        Self::Host(matrix.view().into())
    }

    /// The same matrix, for as long as this one lives.
    pub fn borrowed(&self) -> Operand<'_> {
        match self {
            Self::Host(m) => Operand::Host(m.view().into()),
            Self::Device(m) => Operand::Device(m.beside(m.matrix.clone())),
        }
    }

    /// Takes rows to where this matrix is.
    pub fn beside(&self, rows: Array2<f32>) -> Result<Operand<'static>> {
        Ok(match self {
            Self::Host(_) => Operand::Host(rows.into()),
            Self::Device(m) => Operand::Device(m.beside(m.upload(rows.view())?)),
        })
    }

    /// (s, l)
    pub fn dim(&self) -> (usize, usize) {
        match self {
            Self::Host(m) => m.dim(),
            Self::Device(m) => m.matrix.dims2().expect("a matrix has two sides"),
        }
    }

    /// What is there, here.
    pub fn into_host(self) -> Result<Array2<f32>> {
        match self {
            Self::Host(m) => Ok(m.into_owned()),
            Self::Device(m) => m.download(&m.matrix),
        }
    }

    /// x (k, s) → x·M (k, l), where both are.
    pub fn times(&self, x: &Operand) -> Result<Operand<'static>> {
        Ok(match (self, x) {
            (Self::Host(m), Operand::Host(x)) => {
                Operand::Host(gemm(x.view(), false, m.view(), false).into())
            }
            (Self::Device(m), Operand::Device(x)) => {
                Operand::Device(m.beside(x.matrix.matmul(&m.matrix)?))
            }
            _ => unreachable!("rows are taken to where the matrix is"),
        })
    }

    /// x (k, s) → x·M (k, l)
    pub fn forward(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match self {
            Self::Host(m) => Ok(gemm(x, false, m.view(), false)),
            Self::Device(m) => m.download(&m.upload(x)?.matmul(&m.matrix)?),
        }
    }

    /// x (k, l) → x·Mᵀ (k, s)
    pub fn backward(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match self {
            Self::Host(m) => Ok(gemm(x, false, m.view(), true)),
            Self::Device(m) => m.download(&m.upload(x)?.matmul(&m.matrix.t()?)?),
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
                let there = m.upload(x)?.matmul(&m.matrix)?;
                m.download(&m.matrix.matmul(&there.t()?)?)
            }
        }
    }

    /// M·Mᵀ in f32.
    pub fn gram(&self) -> Result<Gram> {
        Ok(match self {
            Self::Host(m) => Gram::Host(gram(m.view())),
            Self::Device(m) => Gram::Device(m.beside(m.matrix.matmul(&m.matrix.t()?)?)),
        })
    }

    /// M·Mᵀ in f64.
    pub fn gram_f64(&self) -> Result<Array2<f64>> {
        match self {
            Self::Host(m) => Ok(gram(m.view())),
            Self::Device(m) => m.gram_f64(),
        }
    }

    /// M without the given left directions, x (k, s), which are orthonormal.
    pub fn without<'r>(&'r self, x: &'r Array2<f32>) -> Result<Rest<'r, 'a>> {
        // a GPU has no memory of no bytes
        let part = match x.is_empty() {
            true => Array2::zeros((0, self.dim().1)),
            false => self.forward(x.view())?,
        };
        Ok(Rest {
            whole: self,
            x,
            part,
            was_squared: Cell::new(false),
        })
    }
}

/// One pass over matrices Mₙ (sₙ, l): for as many columns at a time as a cache holds, rows (k, columns) made of
/// xₙ·Mₙ, of which the sums of rows·Mₙᵀ (k, sₙ) come back.
pub fn pass<'m, const N: usize>(
    over: [(Operand<'m>, ArrayView2<f32>); N],
    mut rows_of: impl FnMut([Array2<f32>; N]) -> Array2<f32>,
) -> Result<[Array2<f32>; N]> {
    const BYTES: usize = 2 << 20;
    let (_, length) = over[0].0.dim();
    let is_here = |(m, _): &(Operand<'m>, _)| matches!(m, Operand::Host(_));
    // a device takes them all
    let columns = if over.iter().all(is_here) {
        let sides: usize = over.iter().map(|(m, _)| m.dim().0).sum();
        (BYTES / size_of::<f32>() / sides).next_multiple_of(16)
    } else {
        length
    };
    let mut back: [Option<Array2<f32>>; N] = [const { None }; N];
    for start in (0..length).step_by(columns) {
        let end = length.min(start + columns);
        let mut there = [const { None }; N];
        for (there, (m, x)) in there.iter_mut().zip(&over) {
            *there = Some(match m {
                Operand::Host(m) => gemm(*x, false, m.slice(s![.., start..end]), false),
                Operand::Device(_) => m.forward(*x)?,
            });
        }
        let rows = rows_of(there.map(|there| there.expect("one for each")));
        for (back, (m, _)) in back.iter_mut().zip(&over) {
            let more = match m {
                Operand::Host(m) => gemm(rows.view(), false, m.slice(s![.., start..end]), true),
                Operand::Device(_) => m.backward(rows.view())?,
            };
            match back {
                Some(sum) => *sum += &more,
                none => *none = Some(more),
            }
        }
    }
    Ok(back.map(|back| back.expect("a matrix has columns")))
}

/// M − xᵀ·(x·M), never formed as a whole in this process's memory.
pub struct Rest<'r, 'a> {
    whole: &'r Operand<'a>,
    /// (k, s)
    x: &'r Array2<f32>,
    /// x·M (k, l)
    part: Array2<f32>,
    was_squared: Cell<bool>,
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

    /// Whether [`Rest::gram`] went by M·Mᵀ.
    pub fn was_squared(&self) -> bool {
        self.was_squared.get()
    }

    /// R·Rᵀ in f32; from M·Mᵀ if `squared`, where that is faster, with the noise of [`Lower::noise`] for that `fast`.
    pub fn gram(&self, squared: Option<bool>) -> Result<Gram> {
        // as many columns at a time as keep the copies small
        const COLUMNS: usize = 1024;
        Ok(match self.whole {
            whole if self.x.is_empty() => return whole.gram(),
            Operand::Host(m) => {
                let square = squared.and_then(|fast| Lower::square(m.view(), fast));
                self.was_squared.set(square.is_some());
                if let Some(square) = square {
                    return Ok(Gram::Host(square.without(self.x.view())));
                }
                let columns = m.axis_chunks_iter(Axis(1), COLUMNS);
                let parts = self.part.axis_chunks_iter(Axis(1), COLUMNS);
                let panels = columns.zip(parts).map(|(columns, part)| {
                    let mut panel = row_major::<f32, f32>(columns);
                    multiply(&mut panel.view_mut(), 1.0, self.x.t(), -1.0, part);
                    panel
                });
                Gram::Host(gram_of_panels(self.dim().0, panels))
            }
            Operand::Device(m) => {
                let rest = self.on_device(m)?;
                Gram::Device(m.beside(rest.matmul(&rest.t()?)?))
            }
        })
    }

    /// What is left, as a whole, where that is on a device.
    pub fn there(&self) -> Result<Option<There>> {
        match self.whole {
            Operand::Host(_) => Ok(None),
            Operand::Device(m) if self.x.is_empty() => Ok(Some(m.beside(m.matrix.clone()))),
            Operand::Device(m) => self.on_device(m).map(|rest| Some(m.beside(rest))),
        }
    }

    fn on_device(&self, m: &There) -> Result<Tensor> {
        let (x, part) = (m.upload(self.x.view())?, m.upload(self.part.view())?);
        Ok(m.matrix.sub(&x.t()?.matmul(&part)?)?)
    }
}

impl There {
    /// What was made of it.
    fn beside(&self, made: Tensor) -> Self {
        Self {
            matrix: made,
            queue: self.queue.clone(),
        }
    }

    /// (s, l)
    pub fn matrix(&self) -> &Tensor {
        &self.matrix
    }

    pub fn upload(&self, rows: ArrayView2<f32>) -> Result<Tensor> {
        upload(rows, &self.queue)
    }

    pub fn download(&self, x: &Tensor) -> Result<Array2<f32>> {
        let values = self.queue.download(x)?;
        Ok(Array2::from_shape_vec(x.dims2()?, values)
            .expect("a tensor has the elements of its shape"))
    }

    /// Makes rows x (k, l) orthonormal, each to those before it (Cholesky-QR, twice where once is not exact: Yamamoto et al. 2015).
    ///
    /// `None` if they are too dependent for it.
    pub fn orthonormal(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match self.nearly_orthonormal(x, FIRST_PIVOT_MIN)? {
            Some((x, least)) if least <= EXACT_PIVOT_MIN => {
                let again = self.nearly_orthonormal(&x, SECOND_PIVOT_MIN)?;
                Ok(again.map(|(x, _)| x))
            }
            once => Ok(once.map(|(x, _)| x)),
        }
    }

    /// C⁻¹·x with C·Cᵀ = x·xᵀ, as if the rows of x had unit length, and the least pivot of C, above `pivot_min`.
    pub fn nearly_orthonormal(&self, x: &Tensor, pivot_min: f32) -> Result<Option<(Tensor, f32)>> {
        let mut products = self.download(&x.matmul(&x.t()?)?)?;
        let units = products.diag().mapv(|square| square.sqrt().recip());
        if !units.iter().all(|x| x.is_finite()) {
            return Ok(None);
        }
        products *= &units;
        products *= &units.view().insert_axis(Axis(1));
        let Some(factor) = cholesky(products, pivot_min) else {
            return Ok(None);
        };
        let mut turn = Array2::from_diag(&units);
        solve_lower(factor.view(), turn.view_mut());
        let least = factor.diag().iter().fold(1f32, |least, &x| least.min(x));
        Ok(Some((self.upload(turn.view())?.matmul(x)?, least)))
    }

    /// M·Mᵀ in f64.
    fn gram_f64(&self) -> Result<Array2<f64>> {
        // as many columns at a time as keep the copies in f64 small
        const COLUMNS: usize = 4096;
        let m = &self.matrix;
        let (side, length) = m.dims2()?;
        let mut sum = Tensor::zeros((side, side), DType::F64, m.device())?;
        for start in (0..length).step_by(COLUMNS) {
            let columns = m.narrow(1, start, COLUMNS.min(length - start))?;
            // cast as they lie, which is dense either way once the lie of M is followed
            let columns = match columns.t()?.is_contiguous() {
                true => columns.t()?.to_dtype(DType::F64)?.t()?,
                false => columns.contiguous()?.to_dtype(DType::F64)?,
            };
            sum = (sum + columns.matmul(&columns.t()?)?)?;
        }
        let values = sum.flatten_all()?.to_vec1()?;
        Ok(
            Array2::from_shape_vec((side, side), values)
                .expect("a product has a square's elements"),
        )
    }
}

/// Rows that are worked on where they are.
impl Operand<'static> {
    /// Gives each row unit length, and returns the lengths that they had; zero rows stay.
    pub fn normalise(&mut self) -> Result<Vec<f64>> {
        match self {
            Self::Host(x) => Ok(rows::to_unit_length(x.view_mut())),
            Self::Device(There { matrix: x, .. }) => {
                // as many at a time as keep the copies in f64 small
                const ROWS: usize = 256;
                let (count, _) = x.dims2()?;
                let (units, mut lengths) = (x.zeros_like()?, Vec::with_capacity(count));
                for start in (0..count).step_by(ROWS) {
                    let wide = x.narrow(0, start, ROWS.min(count - start))?;
                    let wide = wide.to_dtype(DType::F64)?;
                    let squares = wide.sqr()?.sum(D::Minus1)?;
                    let known: Vec<f64> = squares.sqrt()?.to_vec1()?;
                    let factors = known.iter().map(|&x| if x > 0.0 { 1.0 / x } else { 1.0 });
                    let factors = Tensor::from_iter(factors, x.device())?.unsqueeze(1)?;
                    let unit = wide.broadcast_mul(&factors)?.to_dtype(DType::F32)?;
                    units.slice_set(&unit, 0, start)?;
                    lengths.extend(known);
                }
                *x = units;
                Ok(lengths)
            }
        }
    }

    /// Puts row `order[i]` in place `i`.
    pub fn permute(&mut self, order: &[usize]) -> Result<()> {
        match self {
            Self::Host(x) => *x = x.select(Axis(0), order).into(),
            Self::Device(There { matrix: x, .. }) => {
                let order = order.iter().map(|&i| i as u32);
                *x = x.index_select(&Tensor::from_iter(order, x.device())?, 0)?;
            }
        }
        Ok(())
    }

    /// As [`orthonormalise_rows`].
    pub fn orthonormalise(&mut self) -> Result<()> {
        let there = match self {
            Self::Host(x) => return orthonormalise_rows(x.view_mut()),
            Self::Device(there) => there,
        };
        there.matrix = match there.orthonormal(&there.matrix)? {
            Some(x) => x,
            None => {
                let mut here = there.download(&there.matrix)?;
                orthonormalise_rows(here.view_mut())?;
                there.upload(here.view())?
            }
        };
        Ok(())
    }
}

impl Gram {
    /// x (k, s) → M·Mᵀ·xᵀ (s, k)
    pub fn apply(&self, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        match self {
            Self::Host(g) => Ok(gemm(g.view(), false, x, true)),
            Self::Device(g) => g.download(&g.matrix.matmul(&g.upload(x)?.t()?)?),
        }
    }

    pub fn into_host(self) -> Result<Array2<f32>> {
        match self {
            Self::Host(g) => Ok(g),
            Self::Device(g) => g.download(&g.matrix),
        }
    }
}

fn upload(a: ArrayView2<f32>, queue: &Queue) -> Result<Tensor> {
    let dense = a.as_standard_layout();
    let values = dense.as_slice().expect("it was made dense");
    queue.upload(values, a.dim())
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
        orthonormalise_rows(x.view_mut()).expect("orthonormal");
        let left = &matrix - &x.t().dot(&x.dot(&matrix));
        let truth = left.dot(&left.t());
        // rows of the matrix are some 3·10⁴ long; two sums of 1060 roundings, each of them some ε·√1060
        let noise = 2.0 * 6e-8 * 33.0 * 9e8 * 3.0;
        let y = normal(5, 40, 3);
        for backend in [Backend::Cpu, Backend::Device(Queues::of(Device::Cpu))] {
            let whole = Operand::new(matrix.view(), &backend).expect("uploads");
            let rest = whole.without(&x).expect("multiplies");
            let gram = rest.gram(None).expect("multiplies");
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
            if let Some(there) = rest.there().expect("multiplies") {
                let formed = there.download(there.matrix()).expect("it is there");
                let off = formed.dot(&formed.t()) - &truth;
                assert!(off.iter().all(|x| x.abs() < noise));
            }
        }
    }

    #[test]
    fn one_pass_gives_the_products_there_and_back() {
        // more columns than are taken at a time, and not a multiple of these
        let (m, v) = (normal(700, 1003, 1), normal(9, 1003, 2));
        let (x, y) = (normal(3, 700, 3), normal(3, 9, 4));
        let there = x.dot(&m) - y.dot(&v);
        let (to_m, to_v) = (there.dot(&m.t()), there.dot(&v.t()));
        for backend in [Backend::Cpu, Backend::Device(Queues::of(Device::Cpu))] {
            let whole = Operand::new(m.view(), &backend).expect("uploads");
            let beside = whole.beside(v.clone()).expect("uploads");
            let mut columns = 0;
            let [found_m, found_v] = pass(
                [(whole.borrowed(), x.view()), (beside.borrowed(), y.view())],
                |[xm, yv]| {
                    columns += xm.ncols();
                    xm - yv
                },
            )
            .expect("multiplies");
            assert_eq!(columns, 1003);
            for (found, wanted) in [(found_m, &to_m), (found_v, &to_v)] {
                // sums of 1003 products by up to 4 standard deviations of √709
                let off = (found - wanted).fold(0f32, |most, x| most.max(x.abs()));
                assert!(off <= 6e-8 * 1003.0 * 4.0 * 27.0, "{off:e}");
            }
        }
    }

    #[test]
    fn a_matrix_that_lies_turned_gives_what_its_copy_gives() {
        let turned = normal(1060, 40, 4);
        let straight = turned.t().as_standard_layout().into_owned();
        let there = Backend::Device(Queues::of(Device::Cpu));
        let all = |matrix: ArrayView2<f32>, backend: &Backend| {
            let m = Operand::new(matrix, backend).expect("uploads");
            let (x, y) = (normal(3, 40, 5), normal(3, 1060, 6));
            let wide = m.gram_f64().expect("multiplies");
            [
                m.forward(x.view()).expect("multiplies"),
                m.backward(y.view()).expect("multiplies"),
                m.square(x.view()).expect("multiplies"),
                m.gram().and_then(Gram::into_host).expect("multiplies"),
                wide.mapv(|x| x as f32),
                m.into_host().expect("it is there"),
            ]
        };
        let exact = all(straight.view(), &Backend::Cpu);
        for found in [
            all(turned.t(), &Backend::Cpu),
            all(turned.t(), &there),
            all(straight.view(), &there),
        ] {
            for (found, exact) in found.iter().zip(&exact) {
                let size = exact.fold(0f32, |most, x| most.max(x.abs()));
                // sums of at most 1060 products, of which none is larger than some tenths of the largest sum
                assert!((found - exact).iter().all(|x| x.abs() <= 1e-5 * size));
            }
        }
    }

    #[test]
    fn rows_on_a_device_are_made_orthonormal_as_here() {
        let there = Backend::Device(Queues::of(Device::Cpu));
        let place = normal(30, 200, 1);
        let independent = normal(20, 200, 2);
        // two rows that all but agree need more than one pass, and equal ones another way
        let mut close = independent.clone();
        let near = &close.row(3) + &(&close.row(4) * 0.05);
        close.row_mut(7).assign(&near);
        let mut dependent = independent.clone();
        dependent.row_mut(7).assign(&independent.row(3));
        for rows in [independent, close, dependent] {
            let made = |backend: &Backend| {
                let place = Operand::new(place.view(), backend).expect("uploads");
                let mut x = place.beside(rows.clone()).expect("uploads");
                let order: Vec<usize> = (0..20).rev().collect();
                x.permute(&order).expect("permutes");
                let lengths = x.normalise().expect("divides");
                x.orthonormalise().expect("orthonormal");
                (lengths, x.into_host().expect("it is there"))
            };
            let (here, there) = (made(&Backend::Cpu), made(&there));
            for (at, (a, b)) in here.0.iter().zip(&there.0).enumerate() {
                let length = rows::norm(rows.row(19 - at));
                assert!((a - length).abs() < 1e-12 * length && (b - length).abs() < 1e-12 * length);
            }
            for found in [&here.1, &there.1] {
                let off = found.dot(&found.t()) - Array2::<f32>::eye(20);
                assert!(off.iter().all(|x| x.abs() < 2e-6), "{off:?}");
            }
            // what equal rows leave is any direction; those before it are determined, to 1/0.05 roundings
            let off = &here.1 - &there.1;
            let known = off.slice(ndarray::s![..12, ..]);
            assert!(known.iter().all(|x| x.abs() < 1e-4));
        }
    }
}
