//! The `svdhub` command: arguments in, exit code out.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    // a file that may not grow is an error with a name, as in Python, and no death without a word
    // SAFETY: nothing runs yet, and ignoring a signal calls no code of ours
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    cli::run()
}
