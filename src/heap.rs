//! What the allocator keeps of freed memory for whoever asks next: giving it back costs page faults.
//!
//! glibc alone is told; other allocators have their own ways.

/// Keeps up to 64 MB for each thread: for matrix after matrix of the same sizes.
///
/// A fifth of the time of SmolLM2's decomposition went into page faults, at 8 MB less of memory (2 cores, glibc 2.36,
/// 2026-11). What is larger than 32 MB goes back to the system at once.
pub fn keep_some() {
    // SAFETY: mallopt takes any integers and only sets thresholds of the allocator.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 20);
    }
}

/// Keeps everything: for training, whose every step asks for what the one before has freed.
///
/// candle allocates a fresh buffer for every operation; giving each back to the system cost a third of a step's CPU time
/// (2 cores, glibc 2.36, 2026-11).
pub fn keep_all() {
    // SAFETY: as above.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe {
        // the threshold alone cannot be raised above 32 MB, and one chunk of logits is larger
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
