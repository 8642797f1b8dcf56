//! An allocator with a ceiling: what a small input makes the library hold at once must stay small.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// For inputs up to 64 kB; larger ones may take this much in proportion.
const BYTES_MAX: usize = 64 << 20;

struct Counted;

#[global_allocator]
static COUNTED: Counted = Counted;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static CEILING: AtomicUsize = AtomicUsize::new(usize::MAX);
static CASE: Mutex<&str> = Mutex::new("");

/// Runs `work` on an input of `length` bytes. Ends the process if it holds more than such an input may cost.
pub fn within(case: &'static str, length: usize, work: impl FnOnce()) {
    *CASE.lock().expect("nobody panics with it") = case;
    let allowed = BYTES_MAX.max(length.saturating_mul(1024));
    CEILING.store(LIVE.load(Relaxed) + allowed, Relaxed);
    work();
    CEILING.store(usize::MAX, Relaxed);
}

fn charge(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed).saturating_add(bytes);
    let ceiling = CEILING.load(Relaxed);
    if live > ceiling {
        // to unwind out of an allocator is undefined: say which case it was, and end
        CEILING.store(usize::MAX, Relaxed);
        let case = CASE.try_lock().map_or("?", |case| *case);
        let _ = writeln!(
            std::io::stderr(),
            "{case}: {bytes} bytes asked for, {live} held, {ceiling} allowed"
        );
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        charge(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        charge(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        charge(bytes);
        let moved = unsafe { System.realloc(place, layout, bytes) };
        // the old block is gone only if there is a new one
        let gone = if moved.is_null() {
            bytes
        } else {
            layout.size()
        };
        LIVE.fetch_sub(gone, Relaxed);
        moved
    }
}
