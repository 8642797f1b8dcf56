//! Compiles the kernels beside this file to PTX, in a build with the feature `cuda`: for compute capability 8.0, from which
//! the driver makes the machine code of its own card. Attention comes once more, for 9.0 alone.

fn main() {
    println!("cargo::rerun-if-changed=src/model/kernels");
    #[cfg(feature = "cuda")]
    cuda::compile();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::process::{Command, exit};
    use std::{env, fs};

    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    const FOLDER: &str = "src/model/kernels";

    /// Of attention, one module for each width: the driver compiles what is used, and little more.
    const WIDTHS: [u32; 5] = [32, 64, 96, 128, 256];

    /// Of which some have products of warpgroups.
    const BY_WARPGROUPS: [u32; 3] = [64, 96, 128];

    /// What is compiled as what, and with which options.
    type Module = (String, &'static str, Vec<String>);

    pub fn compile() {
        println!("cargo::rerun-if-env-changed=CUDA_HOME");
        let everywhere = || vec!["-arch=compute_80".to_string()];
        let mut modules: Vec<Module> = [
            "attention_dots",
            "columns",
            "gated",
            "loss",
            "norm",
            "rope",
            "sigma",
        ]
        .map(|name| (name.to_string(), name, everywhere()))
        .into();
        let attention = |width: u32, by: &str, mut options: Vec<String>| {
            options.push(format!("-DATTENTION_WIDTH={width}"));
            (format!("attention_{width}{by}"), "attention", options)
        };
        modules.extend(WIDTHS.map(|width| attention(width, "", everywhere())));
        modules.extend(BY_WARPGROUPS.map(|width| {
            let options = ["-arch=compute_90a", "-DATTENTION_BY_WARPGROUPS"].map(String::from);
            attention(width, "_by_warpgroups", options.into())
        }));
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo says where to write"));
        let mut arms = String::new();
        for (module, source, options) in &modules {
            let packed = ptx(source, options, &out);
            fs::write(out.join(module), packed).expect("the folder is ours");
            arms += &format!(
                "{module:?} => Some(include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{module}\"))),\n"
            );
        }
        let found = format!("match module {{\n{arms}_ => None,\n}}\n");
        fs::write(out.join("modules.rs"), found).expect("the folder is ours");
    }

    /// The PTX of a source, packed: it shrinks to a twentieth.
    fn ptx(source: &str, options: &[String], out: &Path) -> Vec<u8> {
        let nvcc = match env::var_os("CUDA_HOME") {
            Some(home) => Path::new(&home).join("bin/nvcc"),
            None => "nvcc".into(),
        };
        let target = out.join("module.ptx");
        let status = Command::new(&nvcc)
            .args(["-ptx", "-O3", "-std=c++17", "-o"])
            .arg(&target)
            .args(options)
            .arg(format!("{FOLDER}/{source}.cu"))
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(_) => exit(1),
            Err(error) => {
                eprintln!(
                    "{} cannot be run ({error}): `.ci/cuda cargo …` fetches it",
                    nvcc.display()
                );
                exit(1);
            }
        }
        let text = fs::read(&target).expect("nvcc wrote it");
        let mut packer = ZlibEncoder::new(Vec::new(), Compression::best());
        packer.write_all(&text).expect("memory takes it");
        packer.finish().expect("memory takes it")
    }
}
