//! The Python that the peers run in.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Result;

/// A file beside the benchmarks' sources.
pub fn beside(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/bench")
        .join(file)
}

/// The interpreter that was named, else that of a virtual environment in `dir` that holds what `requirements` pins; made on
/// the first run.
pub fn environment(named: Option<&Path>, dir: &Path, requirements: &str) -> Result<PathBuf> {
    if let Some(named) = named {
        return Ok(named.into());
    }
    let requirements = beside(requirements);
    let wanted = std::fs::read_to_string(&requirements)?;
    let installed = dir.join("installed.txt");
    let python = dir.join("bin").join("python");
    if std::fs::read_to_string(&installed).is_ok_and(|text| text == wanted) {
        return Ok(python);
    }
    eprintln!("Installing the peers with pip (once; PyTorch takes some 3 GB)");
    let succeed = |command: &mut Command| -> Result<()> {
        let status = command
            .stdout(Stdio::null())
            .status()
            .map_err(|error| format!("{:?} does not start: {error}", command.get_program()))?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("{command:?}: {status}").into())
        }
    };
    succeed(Command::new("python3").args(["-m", "venv"]).arg(dir))?;
    succeed(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet", "--no-deps"])
            .args(["--disable-pip-version-check", "--requirement"])
            .arg(&requirements),
    )?;
    std::fs::write(&installed, wanted)?;
    Ok(python)
}
