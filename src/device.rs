//! Devices of candle's, and the one place where a GPU is opened.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Device;

use crate::error::{Error, Result};

#[cfg_attr(not(feature = "cuda"), path = "device/none.rs")]
#[cfg_attr(feature = "cuda", path = "device/cuda.rs")]
mod cuda;

#[cfg(feature = "cuda")]
pub use cuda::find_library;
pub use cuda::{multiplies_double, open};

/// A device, and the queues of work on it.
///
/// What is asked of a GPU through one queue is done in the order in which it was asked for: a worker that waits there for a
/// number also waits for what others copy and multiply. Each has a queue of its own, and copies overlap with products.
#[derive(Debug, Clone)]
pub struct Queues {
    device: Device,
    idle: Arc<Mutex<Vec<Device>>>,
}

/// A queue, which nobody else uses until this is dropped. Tensors of different queues do not mix.
#[derive(Debug)]
pub struct Queue {
    device: Device,
    home: Arc<Mutex<Vec<Device>>>,
}

impl Queues {
    pub fn of(device: Device) -> Self {
        let idle = Arc::new(Mutex::new(vec![device.clone()]));
        Self { device, idle }
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
        let device = match idle {
            Some(device) => device,
            None => cuda::beside(&self.device).map_err(Error::from)?,
        };
        Ok(Queue {
            device,
            home: self.idle.clone(),
        })
    }
}

impl Queue {
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let mut idle = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(self.device.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
