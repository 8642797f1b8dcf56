//! CUDA: loading kernels, and running them on the stream of their tensors.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
};
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, Device, Tensor, bail};
use flate2::read::ZlibDecoder;

use super::{Arg, Card, Geometry};
use crate::device::address;

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

/// Where a tensor's first number lies, for a kernel that takes a table of addresses. Whoever makes one keeps the tensor until
/// the kernel is launched.
pub fn address_of(tensor: &Tensor) -> candle_core::Result<u64> {
    address(tensor, &tensor.device().as_cuda_device()?.cuda_stream())
}

/// The GPU of a tensor, which is asked once.
pub fn card(tensor: &Tensor) -> candle_core::Result<Card> {
    thread_local! {
        static KNOWN: RefCell<HashMap<DeviceId, Card>> = RefCell::default();
    }
    let device = tensor.device().as_cuda_device()?;
    KNOWN.with_borrow_mut(|known| {
        if let Some(card) = known.get(&device.id()) {
            return Ok(*card);
        }
        let stream = device.cuda_stream();
        let ask = |which| stream.context().attribute(which).w();
        let version = (
            ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let card = Card {
            has_warpgroups: version == (9, 0),
            shared_bytes_max: ask(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        };
        known.insert(device.id(), card);
        Ok(card)
    })
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
