//! CUDA: finding its libraries, opening a GPU, and its queues, which CUDA calls streams.

use std::ffi::CString;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType,
};
use candle_core::cuda_backend::cudarc::driver::sys::{
    self,
    CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    },
    CUevent_flags::CU_EVENT_BLOCKING_SYNC,
    CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DeviceRepr,
    DriverError, PinnedHostSlice, result,
};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor, bail};

use super::Reading;
use crate::error::{Error, Result};

/// What a computation on a GPU opens, and where each comes from.
const LIBRARIES: [(&str, &str); 4] = [
    ("libcuda.so.1", "the NVIDIA driver, 580 or newer"),
    ("libcublas.so.13", "the libraries of CUDA 13"),
    ("libcublasLt.so.13", "the libraries of CUDA 13"),
    ("libcurand.so.10", "the libraries of CUDA 13"),
];

/// Opens a library that is called later, or says that it is missing.
pub fn find_library(library: &str) -> std::result::Result<(), String> {
    let name = CString::new(library).expect("a name without a NUL");
    // SAFETY: a library that stays open, as those of CUDA do anyway.
    let opened = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    match opened.is_null() {
        true => Err(format!("{library} is missing")),
        false => Ok(()),
    }
}

/// How many GPUs this process sees: none without a driver, or where CUDA_VISIBLE_DEVICES hides all of them.
///
/// # Errors
/// A driver that does not start.
pub fn gpus() -> Result<usize> {
    if find_library("libcuda.so.1").is_err() {
        return Ok(0);
    }
    match CudaContext::device_count() {
        Ok(count) => Ok(count as usize),
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(Error::Device {
            device: "cuda".into(),
            reason: error.to_string(),
        }),
    }
}

/// Opens a GPU.
///
/// # Errors
/// A library that is not there, by name; no such GPU; one that is too old.
pub fn open(number: usize) -> Result<Device> {
    let refuse = |reason: String| Error::Device {
        device: format!("cuda:{number}"),
        reason,
    };
    for (library, origin) in LIBRARIES {
        find_library(library)
            .map_err(|missing| refuse(format!("{missing}: it comes with {origin}")))?;
    }
    let (major, minor) = capability(number).map_err(|error| refuse(error.to_string()))?;
    if major < CAPABILITY_MIN {
        return Err(refuse(format!(
            "its compute capability is {major}.{minor}, and {CAPABILITY_MIN}.0 is needed, that of Ampere, or more"
        )));
    }
    opened(number).map_err(|error| refuse(error.to_string()))
}

/// The major number of what candle's kernels and ours are compiled for; the minor one is 0.
const CAPABILITY_MIN: i32 = 8;

/// The compute capability of a GPU, before anything is opened there: the libraries of CUDA 13 refuse old ones in fewer words.
fn capability(number: usize) -> candle_core::Result<(i32, i32)> {
    result::init().w()?;
    let device = result::device::get(number as i32).w()?;
    // SAFETY: the driver has just named this device.
    let ask = |which| unsafe { result::device::get_attribute(device, which) }.w();
    Ok((
        ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// The same GPU through a queue of its own.
pub(super) fn beside(device: &Device) -> candle_core::Result<Device> {
    match device {
        Device::Cuda(device) => queue(device.cuda_stream().context().ordinal()),
        other => Ok(other.clone()),
    }
}

fn opened(number: usize) -> candle_core::Result<Device> {
    let device = queue(number)?;
    keep_freed_memory(&device)?;
    Ok(device)
}

/// With one stream for all threads, so that everything happens in the order in which it was asked for.
fn queue(number: usize) -> candle_core::Result<Device> {
    let device = CudaDevice::new_with_stream(number)?;
    // SAFETY: events order what several streams do with the same memory, and no tensor is used on two.
    unsafe { device.disable_event_tracking() };
    Ok(Device::Cuda(device))
}

/// What a step frees, the next one asks for again: left alone, the driver takes it back whenever the stream runs dry.
fn keep_freed_memory(device: &Device) -> candle_core::Result<()> {
    let device = device.as_cuda_device()?;
    let device = device.cuda_stream().context().cu_device();
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    // SAFETY: the device is open, and the attribute is a number of 64 bits that is read at once.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, device)
            .result()
            .w()?;
        let value = (&raw mut threshold).cast();
        sys::cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, value)
            .result()
            .w()
    }
}

/// Memory that the GPU reads and writes by itself, through which long copies go by halves: while one is on its way, the CPU
/// fills or empties the other. From ordinary memory, all threads' copies together make 7 to 10 GB/s, from this 54 (H100, driver
/// 580, by PyTorch's `copy_` of its own two kinds of memory, 2026-11).
#[derive(Debug, Default)]
pub(super) struct Stage(Option<[Half; 2]>);

#[derive(Debug)]
struct Half {
    memory: PinnedHostSlice<f32>,
    /// When the last copy from or to it has ended. Its own is kept only where events are tracked.
    free: CudaEvent,
}

impl Half {
    /// Numbers in it: 1 MB, which stays in a core's cache.
    const LENGTH: usize = 1 << 18;

    fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        Ok(Self {
            // SAFETY: any bits are numbers, and each is written before it is read.
            memory: unsafe { context.alloc_pinned_with_flags(Self::LENGTH, 0) }?,
            free: context.new_event(Some(CU_EVENT_BLOCKING_SYNC))?,
        })
    }

    /// Sends numbers, after those sent before have left.
    fn send(
        &mut self,
        values: &[f32; Self::LENGTH],
        there: &mut CudaViewMut<f32>,
        stream: &Arc<CudaStream>,
    ) -> std::result::Result<(), DriverError> {
        self.free.synchronize()?;
        self.memory.as_mut_slice()?.copy_from_slice(values);
        stream.memcpy_htod(&self.memory, there)?;
        self.free.record(stream)
    }

    /// Asks for numbers, which [`Half::arrived`] waits for.
    fn ask(
        &mut self,
        there: &CudaView<f32>,
        stream: &Arc<CudaStream>,
    ) -> std::result::Result<(), DriverError> {
        self.free.synchronize()?;
        stream.memcpy_dtoh(there, &mut self.memory)?;
        self.free.record(stream)
    }

    fn arrived(&self) -> std::result::Result<&[f32], DriverError> {
        self.free.synchronize()?;
        self.memory.as_slice()
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // nothing may be on its way when the memory goes; what fails here has failed before
        let _ = self.free.synchronize();
    }
}

impl Stage {
    /// `None` if so few numbers are not worth it.
    pub fn upload(
        &mut self,
        device: &Device,
        values: &[f32],
    ) -> candle_core::Result<Option<Tensor>> {
        let (Device::Cuda(device), true) = (device, values.len() > Half::LENGTH) else {
            return Ok(None);
        };
        let (stream, halves) = (device.cuda_stream(), self.halves(device)?);
        // SAFETY: every element is written below.
        let mut there = unsafe { stream.alloc::<f32>(values.len()) }.w()?;
        let (whole, rest) = values.as_chunks();
        for (at, chunk) in whole.iter().enumerate() {
            let mut place = there.slice_mut(at * Half::LENGTH..(at + 1) * Half::LENGTH);
            halves[at % 2].send(chunk, &mut place, &stream).w()?;
        }
        if !rest.is_empty() {
            let mut place = there.slice_mut(values.len() - rest.len()..);
            stream.memcpy_htod(rest, &mut place).w()?;
        }
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(there, device.clone()));
        let none = BackpropOp::none();
        Ok(Some(Tensor::from_storage(
            storage,
            values.len(),
            none,
            false,
        )))
    }

    /// `None` if so few numbers are not worth it.
    pub fn download(&mut self, there: &Tensor) -> candle_core::Result<Option<Vec<f32>>> {
        let (storage, layout) = there.storage_and_layout();
        let (Storage::Cuda(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
        else {
            return Ok(None);
        };
        let count = end - start;
        if count <= Half::LENGTH {
            return Ok(None);
        }
        let stream = storage.device.cuda_stream();
        let halves = self.halves(&storage.device)?;
        let there = storage.as_cuda_slice::<f32>()?;
        let mut values = Vec::with_capacity(count);
        // each is asked for before the one ahead of it is taken
        let whole = count / Half::LENGTH;
        for at in 0..=whole {
            if at < whole {
                let from = start + at * Half::LENGTH;
                let part = there.slice(from..from + Half::LENGTH);
                halves[at % 2].ask(&part, &stream).w()?;
            }
            if let Some(before) = at.checked_sub(1) {
                values.extend_from_slice(halves[before % 2].arrived().w()?);
            }
        }
        let rest = start + whole * Half::LENGTH..end;
        if !rest.is_empty() {
            let last = stream.clone_dtoh(&there.slice(rest)).w()?;
            // a copy to ordinary memory may still be on its way ("API synchronization behavior" of the driver API), and cudarc
            // does not wait
            stream.synchronize().w()?;
            values.extend(last);
        }
        Ok(Some(values))
    }

    fn halves(&mut self, device: &CudaDevice) -> candle_core::Result<&mut [Half; 2]> {
        if self.0.is_none() {
            let stream = device.cuda_stream();
            let half = || Half::new(stream.context()).w();
            self.0 = Some([half()?, half()?]);
        }
        Ok(self.0.as_mut().expect("they were made above"))
    }
}

/// Where the first number of a tensor lies.
pub fn address(tensor: &Tensor, stream: &CudaStream) -> candle_core::Result<u64> {
    fn at<T: DeviceRepr>(slice: &CudaSlice<T>, offset: usize, stream: &CudaStream) -> u64 {
        let (start, _used) = slice.device_ptr(stream);
        start + (offset * size_of::<T>()) as u64
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a kernel takes tensors of its own GPU");
    };
    let offset = layout.start_offset();
    Ok(match &storage.slice {
        CudaStorageSlice::U32(slice) => at(slice, offset, stream),
        CudaStorageSlice::F16(slice) => at(slice, offset, stream),
        CudaStorageSlice::BF16(slice) => at(slice, offset, stream),
        CudaStorageSlice::F32(slice) => at(slice, offset, stream),
        _ => bail!(
            "kernels take u32, f16, bf16 and f32, not {:?}",
            tensor.dtype()
        ),
    })
}

/// By cuBLAS, which counts by columns: it multiplies the turned ones, bᵀ·aᵀ.
pub(super) fn multiply(
    y: &Tensor,
    alpha: f32,
    a: &Tensor,
    b: &Tensor,
    beta: f32,
    reading: Reading,
) -> candle_core::Result<()> {
    let device = y.device().as_cuda_device()?;
    let ((m, k), n) = (a.dims2()?, b.dim(1)?);
    let dtype = match y.dtype() {
        DType::F16 => cudaDataType::CUDA_R_16F,
        DType::BF16 => cudaDataType::CUDA_R_16BF,
        DType::F32 => cudaDataType::CUDA_R_32F,
        other => bail!("products are of f16, bf16 and f32, not {other:?}"),
    };
    if a.dtype() != y.dtype() || b.dtype() != y.dtype() || !y.is_contiguous() {
        bail!("a product is of one dtype, and dense");
    }
    let side = |side: usize| i32::try_from(side).map_err(candle_core::Error::wrap);
    let (plain, turned) = (
        cublasOperation_t::CUBLAS_OP_N,
        cublasOperation_t::CUBLAS_OP_T,
    );
    let lie = |x: &Tensor| -> candle_core::Result<_> {
        Ok(match (x.is_contiguous(), x.t()?.is_contiguous()) {
            (true, _) => (plain, side(x.dim(1)?)?),
            (_, true) => (turned, side(x.dim(0)?)?),
            _ => bail!("a factor lies neither by rows nor by columns"),
        })
    };
    let ((left_op, left_side), (right_op, right_side)) = (lie(a)?, lie(b)?);
    let stream = device.cuda_stream();
    let at = |tensor: &Tensor| address(tensor, &stream);
    let (to, left, right) = (at(y)?, at(a)?, at(b)?);
    let (m, n, k) = (side(m)?, side(n)?, side(k)?);
    let compute = match (reading, y.dtype()) {
        (Reading::Rounded, DType::F32) => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    // SAFETY: three tensors of the shapes that the caller checked, dense as they are said to lie.
    unsafe {
        gemm_ex(
            *device.cublas_handle().handle(),
            right_op,
            left_op,
            n,
            m,
            k,
            (&raw const alpha).cast(),
            right as *const _,
            dtype,
            right_side,
            left as *const _,
            dtype,
            left_side,
            (&raw const beta).cast(),
            to as *mut _,
            dtype,
            n,
            compute,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}
