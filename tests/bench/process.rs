//! A process, what it printed, and how much memory it took.

use std::io::Read;
use std::process::{Command, Stdio};

use crate::Result;

/// What a process that ended well wrote to standard output, and its largest resident set in bytes.
///
/// Linux counts in what this process held when it started the other, so that it must stay small itself: it does.
#[allow(clippy::zombie_processes)] // wait4 is what waits
pub fn output_and_peak(command: &mut Command) -> Result<(String, u64)> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut output = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut output)?;
    }
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: the child is ours and nobody else waits for it; both results are written to places of their type.
    let ended = unsafe { libc::wait4(child.id() as i32, &mut status, 0, usage.as_mut_ptr()) };
    if ended < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    if status != 0 {
        return Err(format!("{command:?} ended with {status}").into());
    }
    // SAFETY: wait4 filled it; zeros would be valid too.
    let peak = unsafe { usage.assume_init() }.ru_maxrss as u64;
    // kilobytes everywhere but on Apple's systems
    let peak = if cfg!(target_vendor = "apple") {
        peak
    } else {
        peak * 1024
    };
    Ok((output, peak))
}
