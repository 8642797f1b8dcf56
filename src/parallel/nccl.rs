//! NCCL between GPUs, one for each process.

use std::fmt;
use std::sync::Mutex;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::cudarc::nccl::sys::ncclResult_t;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp, result::NcclError};
use candle_core::cuda_backend::{CudaDevice, WrapErr};

use super::{Group, refuse};
use crate::device;
use crate::error::{Clash, Error, Result};

pub struct Nccl {
    comm: Mutex<Channel>,
    device: CudaDevice,
    rank: usize,
    size: usize,
}

/// What NCCL's calls go through.
struct Channel(Comm);

// SAFETY: any thread may call, one at a time (NCCL's user guide): the mutex sees to that.
unsafe impl Send for Channel {}

impl fmt::Debug for Nccl {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        write!(out, "Nccl({} of {})", self.rank, self.size)
    }
}

fn failed(error: NcclError) -> crate::Error {
    refuse(format!("NCCL fails: {:?}", error.0))
}

impl Nccl {
    /// Joins the processes of a group, of which this is number `rank`; `meet` gives all what process 0 has.
    ///
    /// # Errors
    /// A device that is no GPU; no NCCL on this machine.
    pub fn join(
        device: &Device,
        rank: usize,
        size: usize,
        meet: &dyn Fn(&mut [u8]) -> Result<()>,
    ) -> Result<Self> {
        let Device::Cuda(device) = device else {
            return Err(refuse("NCCL is for GPUs"));
        };
        device::find_library("libnccl.so.2").map_err(refuse)?;
        let mut name = [0u8; 128];
        if rank == 0 {
            let id = Id::new().map_err(failed)?;
            name = id.internal().map(|byte| byte as u8);
        }
        meet(&mut name)?;
        let id = Id::uninit(name.map(|byte| byte as _));
        let comm = Comm::from_rank(device.cuda_stream(), rank, size, id);
        let comm = comm.map_err(|error| match error.0 {
            ncclResult_t::ncclInvalidUsage => Error::Clash(Clash::SharedGpu),
            _ => failed(error),
        })?;
        Ok(Self {
            comm: Mutex::new(Channel(comm)),
            device: device.clone(),
            rank,
            size,
        })
    }

    /// Takes numbers to the GPU, lets them be changed there, and brings them back.
    fn there_and_back(
        &self,
        values: &mut [f32],
        change: impl FnOnce(&Comm, &mut CudaSlice<f32>) -> std::result::Result<(), NcclError>,
    ) -> Result<()> {
        // CUDA has no room of no bytes
        if values.is_empty() {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        let mut there = stream.clone_htod(values).w()?;
        let comm = self.comm.lock();
        let comm = comm.unwrap_or_else(|poisoned| poisoned.into_inner());
        change(&comm.0, &mut there).map_err(failed)?;
        let back = stream.clone_dtoh(&there).w()?;
        // a copy to ordinary memory may still be on its way ("API synchronization behavior" of the driver API), and cudarc
        // does not wait
        stream.synchronize().w()?;
        values.copy_from_slice(&back);
        Ok(())
    }
}

impl Group for Nccl {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        self.there_and_back(values, |comm, there| {
            comm.all_reduce_in_place(there, &ReduceOp::Sum).map(drop)
        })
    }

    fn spread(&self, values: &mut [f32]) -> Result<()> {
        self.there_and_back(values, |comm, there| {
            comm.broadcast_in_place(there, 0).map(drop)
        })
    }

    fn finish(&self) -> Result<()> {
        // all have come here once each has the others' share of this
        self.sum(&mut [0.0])
    }
}
