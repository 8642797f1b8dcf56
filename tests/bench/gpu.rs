//! A GPU as `nvidia-smi` tells of it.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::{Result, process};

fn ask(number: usize, what: &str) -> Result<String> {
    let output = Command::new("nvidia-smi")
        .args(["--id", &number.to_string(), "--format=csv,noheader,nounits"])
        .arg(format!("--query-gpu={what}"))
        .output()
        .map_err(|error| format!("nvidia-smi: {error}"))?;
    if !output.status.success() {
        return Err(format!("nvidia-smi knows no GPU {number}").into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().into())
}

pub fn name(number: usize) -> Result<String> {
    ask(number, "name")
}

/// What a process that ended well wrote to standard output, and by how many bytes more of the GPU were taken meanwhile: its
/// context and what its allocator keeps are counted in, on every side.
pub fn output_and_peak(command: &mut Command, number: usize) -> Result<(String, u64)> {
    let taken = || -> Result<u64> { Ok(ask(number, "memory.used")?.parse::<u64>()? << 20) };
    let before = taken()?;
    let (most, looks, ended) = (
        AtomicU64::new(before),
        AtomicU64::new(0),
        AtomicBool::new(false),
    );
    let output = thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                if let Ok(taken) = taken() {
                    most.fetch_max(taken, Ordering::Relaxed);
                    looks.fetch_add(1, Ordering::Relaxed);
                }
                thread::sleep(Duration::from_millis(50));
            }
        });
        let output = process::output_and_peak(command);
        ended.store(true, Ordering::Relaxed);
        output
    });
    if looks.into_inner() == 0 {
        return Err("nvidia-smi did not say how much memory was taken".into());
    }
    Ok((output?.0, most.into_inner() - before))
}
