//! Compiles the kernels beside this file to PTX, in a build with the feature `cuda`: for compute capability 8.0, from which
//! the driver makes the machine code of its own card.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

const FOLDER: &str = "src/model/kernels";

fn main() {
    println!("cargo::rerun-if-changed={FOLDER}");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where to write"));
    for entry in fs::read_dir(FOLDER).expect("the kernels are there") {
        let source = entry.expect("an entry").path();
        if source.extension().is_some_and(|ending| ending == "cu") {
            compile(&source, &out);
        }
    }
}

fn compile(source: &Path, out: &Path) {
    let nvcc = match env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => "nvcc".into(),
    };
    let name = source.file_stem().expect("a source has a name");
    let status = Command::new(&nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "-arch=compute_80", "-o"])
        .arg(out.join(name).with_extension("ptx"))
        .arg(source)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => exit(1),
        Err(error) => {
            eprintln!(
                "{} cannot be run ({error}): `. .ci/cuda` fetches it",
                nvcc.display()
            );
            exit(1);
        }
    }
}
