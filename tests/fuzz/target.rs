//! The program of every target: under the name of the file it runs as, a function is chosen. Texts are mutated as JSON
//! every other time.

#![no_main]

#[path = "json.rs"]
mod json;
#[path = "limit.rs"]
mod limit;
#[path = "targets.rs"]
mod targets;

use std::sync::OnceLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| {
    let (name, target) = chosen();
    limit::within(name, bytes.len(), || {
        target(bytes);
    });
});

fn chosen() -> &'static (&'static str, targets::Target) {
    static CHOSEN: OnceLock<&(&str, targets::Target)> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let program = std::env::current_exe().expect("a program has a file");
        let mut all = targets::ALL.iter();
        let named = all.find(|(name, _)| program.ends_with(name));
        named.expect("every program is called like a target")
    })
}

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed % 2 == 0
        && let Some(mutated) = json::mutated(&data[..size], seed)
        && mutated.len() <= max_size
    {
        data[..mutated.len()].copy_from_slice(&mutated);
        return mutated.len();
    }
    fuzzer_mutate(data, size, max_size)
});
