//! Processes that train one model together: each takes its share of every step, and what they find is added up.
//!
//! The bytes are moved by an engine that is there already: MPI, as `mpirun` or `srun` starts it.

mod mpi;

use std::fmt::Debug;

use crate::error::{Error, Result};

pub use mpi::{Flavour, Mpi};

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
    Err(Error::Parallel {
        reason: format!(
            "{windows} windows in a step cannot be divided evenly among {size} processes"
        ),
    })
}
