//! Peak memory of `svdhub decompose`: measured, beside what `svdhub plan` says and what the project promises.
//!
//! `cargo bench --bench memory` (`-- --help` for the settings) writes a Llama of random numbers into a temporary directory
//! and decomposes parts of it in a process of its own, whose largest resident set the kernel reports. Exits with 1 where
//! a process takes more than promised, or the plan is off by more than a quarter.

mod process;
mod random;
mod start;
mod synthetic;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;
use process::output_and_peak;
use serde_json::{Value, json};
use start::benchmark;
use svdhub::weights::Dtype;
use synthetic::write_model;

/// A benchmark says what went wrong and stops: nobody handles its errors by kind.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Measure the peak memory of `svdhub decompose` on a synthetic checkpoint.
#[derive(Debug, Parser)]
struct Args {
    #[arg(long, value_name = "N", default_value_t = 2048)]
    hidden: usize,
    #[arg(long, value_name = "N", default_value_t = 8192)]
    intermediate: usize,
    #[arg(long, value_name = "N", default_value_t = 24)]
    layers: usize,
    #[arg(long, value_name = "N", default_value_t = 65536)]
    vocabulary: usize,
    /// Store the checkpoint as bf16, f16 or f32
    #[arg(long, value_name = "TYPE", value_delimiter = ',', default_value = "bf16", value_parser = stored)]
    dtype: Vec<Stored>,
    /// Give each matrix a singular value that dwarfs the rest, as many language models have
    #[arg(long)]
    outlier: bool,
    /// Measure on the model in DIR instead
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2")]
    threads: Vec<usize>,
    #[arg(
        long,
        value_name = "F",
        value_delimiter = ',',
        default_value = "0.1,0.5"
    )]
    rank_fraction: Vec<f64>,
    #[arg(
        long,
        value_name = "LAYOUT",
        value_delimiter = ',',
        default_value = "residual,sidecar"
    )]
    layout: Vec<String>,
    /// Decompose what matches one of these, separated by commas; given again, measured again
    #[arg(long, value_name = "PATTERN,…", default_values = ["lm_head,layers.0,layers.1"])]
    include: Vec<String>,
    /// What cargo passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy)]
struct Stored(Dtype);

fn stored(name: &str) -> std::result::Result<Stored, String> {
    match name {
        "bf16" => Ok(Stored(Dtype::BF16)),
        "f16" => Ok(Stored(Dtype::F16)),
        "f32" => Ok(Stored(Dtype::F32)),
        _ => Err("expected bf16, f16 or f32".into()),
    }
}

fn main() -> ExitCode {
    benchmark("memory", || run(&Args::parse()))
}

/// Whether all that was promised holds.
fn run(args: &Args) -> Result<bool> {
    let scratch = tempfile::Builder::new()
        .prefix("svdhub-memory-")
        .tempdir()?;
    println!("{HEADER}");
    let mut missed = 0;
    let dtypes = if args.model.is_some() {
        &args.dtype[..1]
    } else {
        &args.dtype
    };
    for &Stored(dtype) in dtypes {
        let written = scratch.path().join("model");
        let model = match &args.model {
            Some(model) => model,
            None => {
                write_model(&llama(args), dtype, args.outlier, &written)?;
                &written
            }
        };
        for setting in settings(args) {
            let row = measure(model, &scratch.path().join("out"), &setting)?;
            println!("{row}");
            missed += usize::from(!row.holds());
        }
        if args.model.is_none() {
            std::fs::remove_dir_all(&written)?;
        }
    }
    if missed > 0 {
        eprintln!("{missed} of the settings above miss a bound (*)");
    }
    Ok(missed == 0)
}

/// One run of `svdhub decompose`.
struct Setting {
    include: String,
    fraction: f64,
    layout: String,
    threads: usize,
}

fn settings(args: &Args) -> Vec<Setting> {
    let mut settings = Vec::new();
    for include in &args.include {
        for &fraction in &args.rank_fraction {
            for layout in &args.layout {
                settings.extend(args.threads.iter().map(|&threads| Setting {
                    include: include.clone(),
                    fraction,
                    layout: layout.clone(),
                    threads,
                }));
            }
        }
    }
    settings
}

const HEADER: &str = "| matrices | dtype | f | layout | threads | largest, f32 | planned | measured | planned/measured | \
                      measured/promised | routes | planned s | s |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|";

/// What a run took. Memory in MB of 10⁶ bytes.
struct Row {
    setting: Setting,
    dtype: String,
    largest: f64,
    workers: usize,
    planned: f64,
    measured: f64,
    routes: Vec<String>,
    planned_seconds: f64,
    /// With everything around the matrices: hashes of the base, copies, the final join.
    seconds: f64,
}

impl Row {
    /// What the project promises: 6 times the largest matrix in f32 per worker, and 300 MB.
    fn promised(&self) -> f64 {
        6.0 * self.largest * self.workers as f64 + 300.0
    }

    fn holds(&self) -> bool {
        let off = self.planned / self.measured;
        self.measured <= self.promised() && (0.75..=1.25).contains(&off)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setting {
            include,
            fraction,
            layout,
            threads,
        } = &self.setting;
        write!(
            out,
            "| {include} | {} | {fraction} | {layout} | {threads} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2}{} | {} | {:.1} | {:.1} |",
            self.dtype,
            self.largest,
            self.planned,
            self.measured,
            self.planned / self.measured,
            self.measured / self.promised(),
            if self.holds() { "" } else { " *" },
            self.routes.join(", "),
            self.planned_seconds,
            self.seconds
        )
    }
}

fn measure(model: &Path, out: &Path, setting: &Setting) -> Result<Row> {
    let options = || {
        let mut options = vec![
            "--threads".to_string(),
            setting.threads.to_string(),
            "--rank-fraction".into(),
            setting.fraction.to_string(),
            "--layout".into(),
            setting.layout.clone(),
        ];
        for pattern in setting.include.split(',').filter(|p| !p.is_empty()) {
            options.extend(["--include".into(), pattern.into()]);
        }
        options
    };
    let program = env!("CARGO_BIN_EXE_svdhub");
    let mut plan = Command::new(program);
    let plan = plan.args(["plan", "--json"]).arg(model).args(options());
    let plan: Value = serde_json::from_slice(&plan.output()?.stdout)?;
    let modules = plan["modules"].as_array().ok_or("a plan lists modules")?;
    let chosen = modules.iter().filter(|m| m["action"] == "decompose");
    let elements = |m: &Value| -> u64 {
        let shape = m["shape"].as_array();
        shape.map_or(0, |s| s.iter().filter_map(Value::as_u64).product())
    };
    let largest = chosen.clone().map(elements).max().ok_or("no matrix")?;

    let started = Instant::now();
    let mut command = Command::new(program);
    command.args(["decompose", "--quiet"]).arg(model);
    command.arg("--out").arg(out).args(options());
    let (_, measured) = output_and_peak(&mut command)?;
    let seconds = started.elapsed().as_secs_f64();
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json"))?)?;
    let records = config["svd"]["modules"].as_object().ok_or("no modules")?;
    let routes = records.values().filter_map(|m| m["route"].as_str());
    let mut routes: Vec<String> = routes.map(str::to_string).collect();
    routes.sort();
    routes.dedup();
    std::fs::remove_dir_all(out)?;

    let first = chosen.clone().next().ok_or("no matrix")?;
    Ok(Row {
        dtype: first["dtype"].as_str().unwrap_or_default().into(),
        largest: 4.0 * largest as f64 / 1e6,
        workers: setting.threads.min(chosen.count()),
        planned: plan["peak_bytes"].as_f64().ok_or("no peak")? / 1e6,
        measured: measured as f64 / 1e6,
        routes,
        planned_seconds: plan["seconds"].as_f64().ok_or("no seconds")?,
        seconds,
        setting: Setting {
            include: setting.include.clone(),
            layout: setting.layout.clone(),
            ..*setting
        },
    })
}

/// A Llama of the sizes that are asked for.
fn llama(args: &Args) -> Value {
    let heads = (args.hidden / 64).max(1);
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "hidden_size": args.hidden, "intermediate_size": args.intermediate, "num_hidden_layers": args.layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": args.vocabulary,
        "tie_word_embeddings": false, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    })
}
