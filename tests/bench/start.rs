//! How every benchmark begins and ends.

use std::process::ExitCode;

use crate::Result;

/// Runs a benchmark, which says whether all that was asked for holds.
pub fn benchmark(name: &str, run: impl FnOnce() -> Result<bool>) -> ExitCode {
    // cargo passes --bench when it benchmarks; without, it is a test run that only wants to see this start
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("not a benchmark run: cargo bench --bench {name}");
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
