//! CUDA: finding its libraries, opening a GPU, and its queues, which CUDA calls streams.

use std::ffi::CString;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
};
use candle_core::{CudaDevice, Device};

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

/// Opens a GPU.
///
/// # Errors
/// A library that is not there, by name; no such GPU.
pub fn open(number: usize) -> Result<Device> {
    let refuse = |reason: String| Error::Device {
        device: format!("cuda:{number}"),
        reason,
    };
    for (library, origin) in LIBRARIES {
        find_library(library)
            .map_err(|missing| refuse(format!("{missing}: it comes with {origin}")))?;
    }
    opened(number).map_err(|error| refuse(error.to_string()))
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

/// Whether products in double precision cost little more than in single: of NVIDIA's, the data centres' chips have units for
/// them (compute capability 8.0, 9.0 and 10.0), and all others a sixty-fourth of the rate.
pub fn multiplies_double(device: &Device) -> bool {
    match device {
        Device::Cuda(device) => {
            let capability = device.cuda_stream().context().compute_capability();
            matches!(capability, Ok((8..=10, 0)))
        }
        other => other.is_cpu(),
    }
}
