//! CUDA: loading kernels, and running them on the stream of their tensors.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::result::gemm_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType,
};
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaStorageSlice, DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Device, Storage, Tensor, bail};
use flate2::read::ZlibDecoder;

use super::{Arg, Geometry};

/// The PTX of a module, unpacked once.
fn ptx(module: &str) -> candle_core::Result<Arc<str>> {
    static UNPACKED: Mutex<BTreeMap<String, Arc<str>>> = Mutex::new(BTreeMap::new());
    let mut unpacked = UNPACKED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(text) = unpacked.get(module) {
        return Ok(text.clone());
    }
    let packed: Option<&[u8]> = include!(concat!(env!("OUT_DIR"), "/modules.rs"));
    let Some(packed) = packed else {
        bail!("this build has no kernels named {module}");
    };
    let mut text = String::new();
    let read = ZlibDecoder::new(packed).read_to_string(&mut text);
    read.expect("the build script packed text");
    Ok(unpacked.entry(module.into()).or_insert(text.into()).clone())
}

/// Runs a kernel on the stream of its tensors, after what was put there before.
pub fn launch(
    module: &str,
    name: &str,
    geometry: Geometry,
    args: &[Arg],
) -> candle_core::Result<()> {
    let device = args.iter().find_map(|arg| match arg {
        Arg::Tensor(tensor) | Arg::Part(tensor) => Some(tensor.device()),
        _ => None,
    });
    let Some(Device::Cuda(device)) = device else {
        bail!("{name} runs on tensors of a GPU");
    };
    let stream = device.cuda_stream();
    let function = loaded(device, module, name, geometry.shared_bytes)?;
    let mut words = Vec::with_capacity(args.len());
    for arg in args {
        words.push(match arg {
            Arg::Tensor(tensor) | Arg::Part(tensor) => Word::Long(address(tensor, &stream)?),
            Arg::Null => Word::Long(0),
            Arg::Size(size) => Word::Long(*size as u64),
            Arg::Count(count) => Word::U32(*count as u32),
            Arg::F32(number) => Word::F32(*number),
            Arg::F64(number) => Word::F64(*number),
        });
    }
    let mut builder = stream.launch_builder(&function);
    for word in &words {
        match word {
            Word::Long(word) => builder.arg(word),
            Word::U32(word) => builder.arg(word),
            Word::F32(word) => builder.arg(word),
            Word::F64(word) => builder.arg(word),
        };
    }
    let config = LaunchConfig {
        grid_dim: geometry.grid.map(|side| side as u32).into(),
        block_dim: (geometry.block as u32, 1, 1),
        shared_mem_bytes: geometry.shared_bytes as u32,
    };
    // SAFETY: the arguments are those of the kernel's signature, each output as large as its shape says, and all of them
    // are used on one stream in order: a tensor that is dropped is freed behind the kernel.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// More than this, and a kernel has to ask for it.
const DEFAULT_SHARED_BYTES: usize = 48 << 10;

/// A kernel that may share so many bytes in a block: it is looked up once, because a small model's step launches thousands.
fn loaded(
    device: &CudaDevice,
    module: &str,
    name: &str,
    shared_bytes: usize,
) -> candle_core::Result<CudaFunction> {
    struct Loaded {
        device: DeviceId,
        function: CudaFunction,
        shared_bytes: usize,
    }
    thread_local! {
        static LOADED: RefCell<HashMap<String, Loaded>> = RefCell::default();
    }
    LOADED.with_borrow_mut(|all| {
        let known = all.get(name);
        let fits =
            |known: &&Loaded| known.device == device.id() && known.shared_bytes >= shared_bytes;
        if let Some(known) = known.filter(fits) {
            return Ok(known.function.clone());
        }
        let function = device.get_or_load_custom_func(name, module, &ptx(module)?)?;
        let function = function.into_cuda_function();
        if shared_bytes > DEFAULT_SHARED_BYTES {
            let most = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, shared_bytes as i32).w()?;
        }
        let loaded = Loaded {
            device: device.id(),
            function: function.clone(),
            shared_bytes: shared_bytes.max(DEFAULT_SHARED_BYTES),
        };
        all.insert(name.into(), loaded);
        Ok(function)
    })
}

/// An argument as the kernel takes it.
enum Word {
    Long(u64),
    U32(u32),
    F32(f32),
    F64(f64),
}

/// Where the first number of a tensor lies.
fn address(tensor: &Tensor, stream: &CudaStream) -> candle_core::Result<u64> {
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

/// y += a·b through cuBLAS, which sums in f32: y (rows, n), a (rows, k), b (k, n), all dense and of one dtype.
pub fn add_product(y: &Tensor, a: &Tensor, b: &Tensor) -> candle_core::Result<()> {
    let Device::Cuda(device) = y.device() else {
        bail!("cuBLAS multiplies tensors of a GPU");
    };
    let (rows, k) = a.dims2()?;
    let n = b.dim(1)?;
    if b.dim(0)? != k || y.dims() != [rows, n] {
        bail!(
            "{:?} is no product of {:?} and {:?}",
            y.shape(),
            a.shape(),
            b.shape()
        );
    }
    let dtype = match y.dtype() {
        DType::F16 => cudaDataType::CUDA_R_16F,
        DType::BF16 => cudaDataType::CUDA_R_16BF,
        _ => cudaDataType::CUDA_R_32F,
    };
    let stream = device.cuda_stream();
    let at = |tensor: &Tensor| address(tensor, &stream);
    let (to, left, right) = (at(y)?, at(a)?, at(b)?);
    let side = |side: usize| i32::try_from(side).map_err(candle_core::Error::wrap);
    let (rows, n, k) = (side(rows)?, side(n)?, side(k)?);
    let one = 1f32;
    let one = (&raw const one).cast();
    let plain = cublasOperation_t::CUBLAS_OP_N;
    // SAFETY: three tensors of the shapes checked above; cuBLAS counts by columns, and so multiplies the transposed ones.
    unsafe {
        gemm_ex(
            *device.cublas_handle().handle(),
            plain,
            plain,
            n,
            rows,
            k,
            one,
            right as *const _,
            dtype,
            n,
            left as *const _,
            dtype,
            k,
            one,
            to as *mut _,
            dtype,
            n,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}
