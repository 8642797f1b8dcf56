//! Processes that train one model together: each takes its share of every step, and what they find is added up.
//!
//! The bytes are moved by an engine that is there already: MPI, or between GPUs NCCL.

mod meeting;
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::Device;

use crate::error::{Clash, Error, Result};

pub use meeting::Meeting;
pub use mpi::{Flavour, Mpi};

/// Who started these processes, and how they find each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Started {
    /// mpirun or srun, so many of them.
    ByMpi { flavour: Flavour, size: usize },
    /// torchrun, or whoever sets the variables that it does.
    ByTorchrun(Meeting),
}

/// Joins the processes that were started with this one, each of which computes on its `device`.
///
/// # Errors
/// An engine that is not there, or that joins others than were started; GPUs and CPUs among them.
pub fn join(started: &Started, device: &Device) -> Result<Arc<dyn Group>> {
    match started {
        Started::ByMpi { flavour, size } => {
            let mpi = Mpi::join(*flavour)?;
            if mpi.size() != *size {
                let joined = mpi.size();
                return Err(refuse(format!(
                    "{size} were started, and MPI joins {joined} of them"
                )));
            }
            // before any other call: each kind would wait for the others in calls of its own
            let mut on_gpus = [if device.is_cpu() { 0.0 } else { 1.0 }];
            mpi.sum(&mut on_gpus)?;
            let on_gpus = on_gpus[0] as usize;
            if on_gpus == 0 {
                return Ok(Arc::new(mpi));
            }
            if on_gpus < *size {
                return Err(Error::Clash(Clash::Mixed {
                    on_gpus,
                    processes: *size,
                }));
            }
            let gpus = between_gpus(device, mpi.rank(), mpi.size(), &|bytes| {
                // as numbers that nobody calculates with
                let words = bytes.chunks_exact(4);
                let mut words: Vec<f32> = words
                    .map(|word| f32::from_le_bytes(word.try_into().expect("four bytes")))
                    .collect();
                mpi.spread(&mut words)?;
                for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
                    bytes.copy_from_slice(&word.to_le_bytes());
                }
                Ok(())
            })?;
            Ok(Arc::new(Kept { gpus, mpi }))
        }
        Started::ByTorchrun(_) if device.is_cpu() => Err(refuse(
            "on CPUs they find each other through MPI, and torchrun starts none",
        )),
        Started::ByTorchrun(meeting) => {
            between_gpus(device, meeting.rank, meeting.size, &|bytes| {
                meeting.share(bytes)
            })
        }
    }
}

#[cfg(feature = "cuda")]
fn between_gpus(
    device: &Device,
    rank: usize,
    size: usize,
    meet: &dyn Fn(&mut [u8]) -> Result<()>,
) -> Result<Arc<dyn Group>> {
    Ok(Arc::new(nccl::Nccl::join(device, rank, size, meet)?))
}

#[cfg(not(feature = "cuda"))]
fn between_gpus(
    _: &Device,
    _: usize,
    _: usize,
    _: &dyn Fn(&mut [u8]) -> Result<()>,
) -> Result<Arc<dyn Group>> {
    Err(refuse("this build has no CUDA support"))
}

fn refuse(reason: impl Into<String>) -> Error {
    Error::Parallel {
        reason: reason.into(),
    }
}

/// The processes that belong together. All of them make the same calls in the same order.
pub trait Group: Debug + Send + Sync {
    /// Counted from 0; it is 0 that tells and writes.
    fn rank(&self) -> usize;

    fn size(&self) -> usize;

    /// Adds up over all processes; every one of them gets the same bits.
    fn sum(&self, values: &mut [f32]) -> Result<()>;

    /// Gives all what process 0 has.
    fn spread(&self, values: &mut [f32]) -> Result<()>;

    /// Waits until all have come here. One that fails does not: what started it then ends the others.
    fn finish(&self) -> Result<()>;
}

/// Processes whose GPUs add up, and which MPI keeps together to the end: whoever leaves it before has failed, and is seen to.
#[derive(Debug)]
struct Kept {
    gpus: Arc<dyn Group>,
    mpi: Mpi,
}

impl Group for Kept {
    fn rank(&self) -> usize {
        self.gpus.rank()
    }

    fn size(&self) -> usize {
        self.gpus.size()
    }

    fn sum(&self, values: &mut [f32]) -> Result<()> {
        self.gpus.sum(values)
    }

    fn spread(&self, values: &mut [f32]) -> Result<()> {
        self.gpus.spread(values)
    }

    fn finish(&self) -> Result<()> {
        self.gpus.finish()?;
        self.mpi.finish()
    }
}

/// One process by itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn spread(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

/// The share that one of a group's processes takes of what is divided between them.
///
/// # Errors
/// What cannot be divided evenly: the mean over all would not be the mean of the shares'.
pub fn share<'a, T>(all: &'a [T], group: &dyn Group) -> Result<&'a [T]> {
    refuse_uneven(all.len(), group)?;
    let each = all.len() / group.size();
    Ok(&all[group.rank() * each..][..each])
}

/// Refuses a number of windows that [`share`] cannot divide.
pub fn refuse_uneven(windows: usize, group: &dyn Group) -> Result<()> {
    let size = group.size();
    if windows.is_multiple_of(size) {
        return Ok(());
    }
    Err(Error::Clash(Clash::Uneven {
        windows,
        processes: size,
    }))
}
