//! Transfers of ours beside those of Python's `hf`, with the same loopback Hub, in one run.
//!
//! `cargo bench --bench hub` (`-- --help` for the settings). Rounds alternate; each transfer is a process of its own, with
//! an empty cache and new contents, so that nothing is there already. A ratio is taken within a round, and the median of
//! the rounds is what counts.

mod machine;
mod process;
mod python;
mod spread;
mod start;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use clap::Parser;
use serde::Serialize;
use svdhub::sum::sha256_file;
use svdhub::weights::{Dtype, Header, Layout, ShardWriter};

use machine::{load, loudly};
use process::output_and_peak;
use python::environment;
use spread::Spread;
use start::benchmark;

/// A benchmark says what went wrong and stops: nobody handles its errors by kind.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Compare svdhub's transfers with those of huggingface_hub's command.
#[derive(Debug, Parser)]
struct Args {
    /// Megabytes of each model
    #[arg(long, value_name = "MB", default_value_t = 1000)]
    megabytes: usize,
    /// Weight files of each model
    #[arg(long, value_name = "N", default_value_t = 4)]
    files: usize,
    /// The Hub takes larger files in parts of so many bytes
    #[arg(long, value_name = "BYTES")]
    part_bytes: Option<u64>,
    /// By Xet instead of LFS, both sides
    #[arg(long, conflicts_with = "part_bytes")]
    xet: bool,
    /// Alternate this often
    #[arg(long, value_name = "R", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The `hf` to compare with, instead of one in an environment made for it
    #[arg(long, value_name = "PATH")]
    hf: Option<PathBuf>,
    /// Write all numbers to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with what is wanted, and fail if it is missed
    #[arg(long)]
    check: bool,
    /// What cargo passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

/// Our time over theirs, at most.
const SLOWER_MAX: f64 = 1.1;
/// Of a transfer of ours, at most; by Xet with what its buffers may take beside, up and down.
const PEAK_BYTES_MAX: f64 = 200e6;
const XET_BUFFER_BYTES: [f64; 2] = [268e6, 128e6];

fn main() -> ExitCode {
    benchmark("hub", || run(&Args::parse()))
}

/// One direction, both sides over all rounds.
#[derive(Debug, Serialize)]
struct Direction {
    name: &'static str,
    ours_s: Spread,
    theirs_s: Spread,
    ratio: Spread,
    ours_peak_bytes: Spread,
    theirs_peak_bytes: Spread,
}

/// Seconds and peak memory of each transfer of one side.
#[derive(Default)]
struct Side {
    seconds: Vec<f64>,
    peaks: Vec<f64>,
}

/// Whether all that was asked for holds.
fn run(args: &Args) -> Result<bool> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "{} MB in {} files · {} · {} rounds, alternating",
        args.megabytes,
        args.files,
        match args.part_bytes {
            _ if args.xet => "Xet".into(),
            Some(bytes) => format!("LFS in parts of {bytes} bytes"),
            None => "LFS in one piece".into(),
        },
        args.rounds
    );
    if let Some(line) = load(threads) {
        println!("{line}");
    }
    let hf = match &args.hf {
        Some(hf) => hf.clone(),
        None => environment(
            None,
            &target.with_file_name("bench-hub-venv"),
            "requirements-hub.txt",
        )?
        .with_file_name("hf"),
    };
    let scratch = tempfile::tempdir_in(target)?;
    let server = Server::start(args, &scratch.path().join("hub"))?;
    let bench = Bench {
        args,
        scratch: scratch.path(),
        endpoint: &server.endpoint,
        hf,
    };
    let mut sides: [[Side; 2]; 2] = Default::default();
    for round in 1..=args.rounds {
        for (who, name) in ["svdhub", "hf"].into_iter().enumerate() {
            eprintln!("round {round} of {}: {name}", args.rounds);
            bench.there_and_back(who == 0, round, &mut sides, who)?;
        }
    }
    let [up, down] = sides;
    let directions = [direction("upload", &up), direction("download", &down)];
    print!("{}", table(&directions, args.megabytes as f64));
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&directions)?)?;
    }
    let mut holds = true;
    for (direction, buffers) in directions.iter().zip(XET_BUFFER_BYTES) {
        let most = PEAK_BYTES_MAX + if args.xet { buffers } else { 0.0 };
        if direction.ratio.median > SLOWER_MAX {
            loudly(&format!(
                "{}: {:.2} × their time, wanted at most {SLOWER_MAX}",
                direction.name, direction.ratio.median
            ));
            holds = false;
        }
        if direction.ours_peak_bytes.max > most {
            loudly(&format!(
                "{}: {:.0} MB, wanted at most {:.0}",
                direction.name,
                direction.ours_peak_bytes.max / 1e6,
                most / 1e6
            ));
            holds = false;
        }
    }
    Ok(!args.check || holds)
}

struct Bench<'a> {
    args: &'a Args,
    scratch: &'a Path,
    endpoint: &'a str,
    hf: PathBuf,
}

/// The Hub, a process of its own: what this one holds would be counted as its children's.
struct Server {
    endpoint: String,
    process: Child,
}

impl Server {
    fn start(args: &Args, dir: &Path) -> Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_svdhub"));
        command.args(["hub", "serve", "--port", "0"]).arg(dir);
        if !args.xet {
            command.arg("--no-xet");
        }
        if let Some(bytes) = args.part_bytes {
            command.args(["--part-bytes", &bytes.to_string()]);
        }
        let mut process = command.stdout(Stdio::piped()).spawn()?;
        let mut endpoint = String::new();
        let told = process.stdout.take().ok_or("a pipe was asked for")?;
        BufReader::new(told).read_line(&mut endpoint)?;
        Ok(Self {
            endpoint: endpoint.trim().into(),
            process,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Bench<'_> {
    /// A new model to the Hub, and back into another folder.
    fn there_and_back(
        &self,
        ours: bool,
        round: u32,
        sides: &mut [[Side; 2]; 2],
        who: usize,
    ) -> Result<()> {
        let repo = format!("bench/{}-{round}", if ours { "ours" } else { "theirs" });
        let (model, back) = (self.scratch.join("model"), self.scratch.join("back"));
        self.write_model(&model, u64::from(round) * 2 + who as u64)?;
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let (there, again) = if ours {
            (
                vec!["publish".into(), path(&model), repo.clone()],
                vec![
                    "hub".into(),
                    "download".into(),
                    repo,
                    "--out".into(),
                    path(&back),
                ],
            )
        } else {
            (
                vec!["upload".into(), repo.clone(), path(&model)],
                vec!["download".into(), repo, "--local-dir".into(), path(&back)],
            )
        };
        for (direction, arguments) in [there, again].iter().enumerate() {
            let (seconds, peak) = self.transfer(ours, arguments)?;
            sides[direction][who].seconds.push(seconds);
            sides[direction][who].peaks.push(peak as f64);
        }
        for entry in std::fs::read_dir(&model)? {
            let entry = entry?;
            // by their sums: what this process holds would be counted as its children's
            let sum = |path: &Path| sha256_file(path, |_| {});
            let same = sum(&entry.path())? == sum(&back.join(entry.file_name()))?;
            assert!(same, "{:?} came back otherwise", entry.file_name());
        }
        std::fs::remove_dir_all(&model)?;
        std::fs::remove_dir_all(&back)?;
        Ok(())
    }

    fn transfer(&self, ours: bool, arguments: &[String]) -> Result<(f64, u64)> {
        let program = match ours {
            true => Path::new(env!("CARGO_BIN_EXE_svdhub")),
            false => &self.hf,
        };
        let home = tempfile::tempdir_in(self.scratch)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("HF_ENDPOINT", self.endpoint)
            .env("HF_HOME", home.path())
            .env("HF_TOKEN", "hf_bench")
            .env("HF_HUB_DISABLE_XET", if self.args.xet { "0" } else { "1" })
            .env("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            .stderr(Stdio::null());
        let started = Instant::now();
        let (_, peak) = output_and_peak(&mut command)?;
        Ok((started.elapsed().as_secs_f64(), peak))
    }

    /// A model whose numbers no other model of the run has.
    fn write_model(&self, dir: &Path, seed: u64) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        std::fs::write(dir.join("config.json"), format!("{{\"seed\": {seed}}}"))?;
        let bytes = self.args.megabytes * 1_000_000 / self.args.files;
        let mut state = seed;
        for number in 1..=self.args.files {
            let file = dir.join(Layout::Model.shard_file(number, self.args.files));
            let name = format!("weight-{number}");
            let header = Header::compose([(name.as_str(), Dtype::U8, [bytes].as_slice())])?;
            let mut writer = ShardWriter::create(&file, header)?;
            writer.begin(&name);
            let mut left = bytes;
            while left > 0 {
                let block: Vec<u8> = (0..left.min(8 << 20).div_ceil(8))
                    .flat_map(|_| {
                        // splitmix64
                        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                        let mut z = state;
                        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                        (z ^ (z >> 31)).to_le_bytes()
                    })
                    .collect();
                let block = &block[..block.len().min(left)];
                writer.write(block)?;
                left -= block.len();
            }
            writer.finish()?;
        }
        Ok(())
    }
}

fn direction(name: &'static str, [ours, theirs]: &[Side; 2]) -> Direction {
    Direction {
        name,
        ours_s: Spread::of(&ours.seconds),
        theirs_s: Spread::of(&theirs.seconds),
        ratio: Spread::of_ratios(&ours.seconds, &theirs.seconds),
        ours_peak_bytes: Spread::of(&ours.peaks),
        theirs_peak_bytes: Spread::of(&theirs.peaks),
    }
}

fn table(directions: &[Direction], megabytes: f64) -> String {
    let mut text = format!(
        "{:<10}{:>12}{:>12}{:>8}{:>14}{:>14}{:>14}{:>14}\n",
        "", "ours s", "hf s", "ratio", "ours MB/s", "hf MB/s", "ours peak MB", "hf peak MB"
    );
    for d in directions {
        text.push_str(&format!(
            "{:<10}{:>12.2}{:>12.2}{:>8.2}{:>14.0}{:>14.0}{:>14.0}{:>14.0}\n",
            d.name,
            d.ours_s.median,
            d.theirs_s.median,
            d.ratio.median,
            megabytes / d.ours_s.median,
            megabytes / d.theirs_s.median,
            d.ours_peak_bytes.max / 1e6,
            d.theirs_peak_bytes.max / 1e6
        ));
    }
    text
}
