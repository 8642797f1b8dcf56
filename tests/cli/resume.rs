//! Killed anywhere, the rerun continues to the same bytes.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use svdhub::base::Base;
use svdhub::decompose;
use svdhub::event::{Event, Observer, Silent, Stage};
use svdhub::weights::{Checkpoint, Dtype, Header};

use crate::parts::assert_same;
use crate::world::{Run, World, arg, files, fixture};

/// A siege: the command is killed at random moments, often again while it goes on, and then left to end.
///
/// Returns what it said each time it was left alone.
fn besiege(
    world: &World,
    seed: u64,
    expected: &Path,
    command: impl Fn(&Path) -> Vec<String>,
    check: impl Fn(&Path),
) -> Vec<String> {
    let start = |out: &Path| {
        let arguments = command(out);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        world.command(&arguments)
    };
    let started = Instant::now();
    let undisturbed = world.path("undisturbed");
    let run = Run::of(start(&undisturbed).output().expect("runs"));
    run.succeeds();
    assert_same(&undisturbed, expected);
    // the machine may be busy now and idle later: what is found to take less, or more, corrects it
    let mut whole = started.elapsed();
    let mut state = seed;
    let mut random = move || {
        // Knuth's constants; the high bits are the good ones
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    let (mut said, mut interrupted) = (Vec::new(), 0);
    for attempt in 0..25 {
        let out = world.path(&format!("killed-{attempt}"));
        let kills = 1 + attempt % 3;
        for _ in 0..kills {
            let mut child = start(&out).spawn().expect("starts");
            let moment = whole.mul_f64(random());
            std::thread::sleep(moment);
            let ended = child.try_wait().expect("asks").is_some();
            whole = if ended { moment } else { whole.mul_f64(1.05) };
            child.kill().expect("kills");
            child.wait().expect("is gone");
            check(&out);
        }
        interrupted += usize::from(!out.join("svd.safetensors.index.json").exists());
        let run = Run::of(start(&out).output().expect("runs")).succeeds();
        assert_same(&out, expected);
        for left in ["parts", "shards"] {
            let left = out.join(".svdhub").join(left);
            assert!(!left.exists(), "{} is left", left.display());
        }
        said.push(run.stderr);
    }
    assert!(
        interrupted >= 5,
        "only {interrupted} runs were interrupted: the kills come too late"
    );
    said
}

#[test]
fn killed_convert_continues_to_the_same_bytes() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, 700_000);
    let options = ["--rank-fraction", "1", "--layout", "sidecar"];
    let large = world.path("large");
    let decompose = ["decompose", arg(&base), "--out", arg(&large)];
    world.run(&[&decompose[..], &options].concat()).succeeds();
    let convert = |out: &Path| {
        let fixed = ["convert", arg(&large), "--out", arg(out)];
        let options = ["--layout", "residual", "--rank-fraction", "0.9"];
        let shards = ["--shard-size", "300kB"];
        let all = fixed.into_iter().chain(options).chain(shards);
        all.map(String::from).collect::<Vec<String>>()
    };
    let reference = world.path("reference");
    let arguments = convert(&reference);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    world.run(&arguments).succeeds();
    besiege(&world, 20_261_126, &reference, convert, |_| {});
}

#[test]
fn killed_decompose_continues_to_the_same_bytes() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, 700_000);
    let decompose = |out: &Path, threads: &str| {
        let fixed = [
            "decompose",
            arg(&base),
            "--out",
            arg(out),
            "--threads",
            threads,
        ];
        let options = ["--rank-fraction", "0.5", "--shard-size", "300kB"];
        let all = fixed.into_iter().chain(options).map(String::from);
        all.collect::<Vec<String>>()
    };
    let reference = world.path("reference");
    let arguments = decompose(&reference, "2");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    world.run(&arguments).succeeds();
    let early = AtomicUsize::new(0);
    let said = besiege(
        &world,
        20_261_125,
        &reference,
        |out| decompose(out, "1"),
        |out| {
            // a shard is finished, and not all of the 42 matrices are
            let state = out.join(".svdhub");
            let records = (1..).map(|k| state.join(format!("shards/{k:05}.json")));
            let records: Vec<Value> = records
                .map_while(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok())
                .collect();
            let joined = records
                .iter()
                .map(|r| r["parts"].as_object().expect("parts").len());
            let waiting = std::fs::read_dir(state.join("parts")).map_or(0, Iterator::count);
            if !records.is_empty() && joined.sum::<usize>() + waiting < 42 {
                early.fetch_add(1, Ordering::Relaxed);
            }
        },
    );
    let kept = said.iter().filter(|text| text.contains("are done already"));
    assert!(kept.count() >= 5, "finished matrices are kept: {said:?}");
    assert!(
        early.load(Ordering::Relaxed) > 0,
        "shards are written while matrices are computed"
    );
}

#[test]
fn killed_parts_and_assemblies_continue_to_the_same_bytes() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, 700_000);
    let options = ["--rank-fraction", "0.5", "--shard-size", "300kB"];
    let run = |out: &Path, more: &[&str]| {
        let fixed = ["decompose", arg(&base), "--out", arg(out)];
        let all = [&fixed[..], &options, more].concat();
        world.command(&all)
    };
    let reference = world.path("reference");
    Run::of(run(&reference, &[]).output().expect("runs")).succeeds();
    let parts: Vec<PathBuf> = ["1/2", "2/2"]
        .into_iter()
        .enumerate()
        .map(|(number, share)| {
            let out = world.path(&format!("part-{number}"));
            let more = ["--part", share, "--threads", "1"];
            for milliseconds in [20, 60, 60] {
                let mut child = run(&out, &more).spawn().expect("starts");
                std::thread::sleep(Duration::from_millis(milliseconds));
                child.kill().expect("kills");
                child.wait().expect("is gone");
            }
            Run::of(run(&out, &more).output().expect("runs")).succeeds();
            out
        })
        .collect();
    let matrices = |dir: &PathBuf| files(&dir.join("matrices"));
    let before: Vec<_> = parts.iter().map(matrices).collect();
    besiege(
        &world,
        42,
        &reference,
        |out| {
            let [one, two] = [arg(&parts[0]), arg(&parts[1])];
            ["assemble", one, two, "--out", arg(out)]
                .map(String::from)
                .to_vec()
        },
        |_| {},
    );
    let after: Vec<_> = parts.iter().map(matrices).collect();
    assert!(before == after, "the parts stay as they were");
}

#[test]
fn a_matrix_that_a_power_cut_has_spoilt_is_computed_again() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let part = world.path("part");
    let decompose = [
        "decompose",
        arg(&base),
        "--out",
        arg(&part),
        "--part",
        "1/2",
    ];
    world.run(&decompose).succeeds();
    let matrices = || files(&part.join("matrices"));
    let before = matrices();
    // as if the cut had come before the end: written back are neither the last bytes of one file nor any of another
    let job = part.join(".svdhub/job.json");
    let finished = std::fs::read_to_string(&job).expect("reads");
    std::fs::write(&job, finished.replace("true", "false")).expect("writes");
    let spoilt: Vec<PathBuf> = before
        .keys()
        .take(2)
        .map(|name| part.join("matrices").join(name))
        .collect();
    let mut holes = std::fs::read(&spoilt[0]).expect("reads");
    let length = holes.len();
    holes[length - 4096..].fill(0);
    std::fs::write(&spoilt[0], holes).expect("writes");
    std::fs::write(&spoilt[1], "").expect("writes");
    let again = world.run(&decompose).succeeds();
    let done = format!(
        "{} of {} matrices are done already",
        before.len() - 2,
        before.len()
    );
    assert!(again.stderr.contains(&done), "{}", again.stderr);
    assert!(matrices() == before, "the same bytes again");
}

#[test]
fn a_conversion_or_bf16_decomposition_goes_on_from_what_is_whole() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let source = world.path("source");
    let decompose = ["decompose", arg(&base), "--layout", "sidecar", "--out"];
    world
        .run(&[&decompose[..], &[arg(&source)]].concat())
        .succeeds();
    let convert = ["convert", arg(&source), "--layout", "residual", "--out"];
    let in_bf16 = ["--factors-dtype", "bf16"];
    let rounded = ["decompose", arg(&base), in_bf16[0], in_bf16[1], "--out"];
    for (name, verb) in [("convert", &convert[..]), ("decompose", &rounded)] {
        let reference = world.path(name);
        world.run(&[verb, &[arg(&reference)]].concat()).succeeds();
        // killed before there is a shard, as soon as two matrices are finished
        let killed = (0..50).find_map(|attempt| {
            let out = world.path(&format!("{name}-{attempt}"));
            let mut command = world.command(&[verb, &[arg(&out)]].concat());
            let mut child = command.spawn().expect("starts");
            let finished = || {
                let listed = std::fs::read_dir(out.join(".svdhub/parts"));
                let paths = listed.into_iter().flatten().flatten();
                let mut paths: Vec<PathBuf> = paths.map(|entry| entry.path()).collect();
                paths.retain(|path| path.extension().is_some_and(|it| it == "safetensors"));
                paths
            };
            while finished().len() < 2 && child.try_wait().expect("runs").is_none() {}
            child.kill().expect("kills");
            child.wait().expect("is gone");
            let left = finished();
            (left.len() >= 2).then_some((out, left))
        });
        let (out, left) = killed.expect("one of fifty kills comes in time");
        // as if a power cut had come before the data of one were written
        let header = Header::read(&left[0]).expect("reads");
        let mut bytes = std::fs::read(&left[0]).expect("reads");
        bytes[header.prefix.len()..].fill(0);
        std::fs::write(&left[0], bytes).expect("writes");
        let run = world.run(&[verb, &[arg(&out)]].concat()).succeeds();
        assert!(run.stderr.contains("going on in"), "{}", run.stderr);
        let done = format!("{} of 42 matrices are done already", left.len() - 1);
        assert!(run.stderr.contains(&done), "{name}: {}", run.stderr);
        assert_same(&out, &reference);
    }
}

/// Writes to a file as soon as matrices are decomposed.
struct Meddler(PathBuf);

impl Observer for Meddler {
    fn event(&self, event: &Event<'_>) {
        let stage = Stage::Decompose;
        if matches!(event, Event::Started { stage: begun, .. } if *begun == stage) {
            // a later time, however coarse the clock of the file system is
            std::thread::sleep(Duration::from_millis(20));
            let bytes = std::fs::read(&self.0).expect("reads");
            std::fs::write(&self.0, bytes).expect("writes");
        }
    }
}

#[test]
fn a_base_that_is_written_to_meanwhile_is_refused() {
    let world = World::new();
    let (dir, out) = (
        world.model("base", Dtype::BF16, u64::MAX),
        world.path("svd"),
    );
    let base = Base::open(&dir, None, None).expect("opens");
    let weights = dir.join("model.safetensors");
    let decompose = |observer: &dyn Observer| {
        decompose::run(&base, &out, &decompose::Options::default(), observer)
    };
    let refused = decompose(&Meddler(weights.clone())).expect_err("it was written to");
    assert!(
        refused
            .to_string()
            .contains("model.safetensors was written to"),
        "{refused}"
    );
    assert!(!out.join("svd.safetensors.index.json").exists());
    // the bytes were the same: nothing is lost
    decompose(&Silent).expect("goes on");
}

#[test]
fn a_finished_directory_that_lost_its_weights_is_made_again() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let (split, adapter) = (world.path("svd"), world.path("adapter"));
    let (merged, lora) = (world.path("merged"), world.path("lora"));
    let data = fixture("eighty-train.txt");
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    let train = ["train", arg(&split), "--data", arg(&data), "--out"];
    let train = [
        &train[..],
        &[arg(&adapter), "--steps", "2", "--length", "32"],
    ]
    .concat();
    let merge = ["merge", arg(&split), "--adapter", arg(&adapter), "--out"];
    let merge = [&merge[..], &[arg(&merged)]].concat();
    let export = ["export", arg(&split), "--adapter", arg(&adapter), "--out"];
    let export = [&export[..], &[arg(&lora), "--to", "peft-lora"]].concat();
    for (out, command) in [
        (&split, &decompose[..]),
        (&adapter, &train),
        (&merged, &merge),
        (&lora, &export),
    ] {
        world.run(command).succeeds();
        let weights = |dir: &Path| {
            let mut files = files(dir);
            files.retain(|name, _| name.ends_with(".safetensors"));
            files
        };
        let whole = weights(out);
        let run = world.run(command).succeeds();
        assert!(run.stderr.contains("is complete already"), "{}", run.stderr);
        let lost = out.join(whole.keys().next_back().expect("a file of weights"));
        std::fs::remove_file(&lost).expect("removes");
        let run = world.run(command).succeeds();
        assert!(!run.stderr.contains("complete already"), "{}", run.stderr);
        assert!(weights(out) == whole, "{}", lost.display());
        // cut short is lost too; what goes on, and does not begin anew, leaves alone what it does not know
        std::fs::write(&lost, "short").expect("writes");
        let run = world.run(command);
        if command == decompose {
            run.refuses(&["already holds another `svd-00001"]);
            std::fs::remove_file(&lost).expect("removes");
            world.run(command).succeeds();
        } else {
            run.succeeds();
        }
        assert!(weights(out) == whole, "{}", lost.display());
    }
    // and one that says nothing of itself
    std::fs::remove_file(merged.join("report.json")).expect("removes");
    world.run(&merge).succeeds();
    assert!(merged.join("report.json").exists());
}

#[test]
fn changed_bytes_of_an_adapter_or_of_its_vectors_are_used_by_nobody() {
    let world = World::with_hub();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let (split, adapter) = (world.path("svd"), world.path("adapter"));
    let data = fixture("eighty-train.txt");
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    world.run(&decompose).succeeds();
    let train = ["train", arg(&split), "--data", arg(&data), "--out"];
    let more = [arg(&adapter), "--steps", "2", "--length", "32"];
    world.run(&[&train[..], &more].concat()).succeeds();
    let shard = split.join("svd-00001-of-00001.safetensors");
    let out = world.path("out");
    let flip = |path: &Path, at: usize| {
        let mut bytes = std::fs::read(path).expect("reads");
        bytes[at] ^= 0x40;
        std::fs::write(path, bytes).expect("writes");
    };
    let weights = adapter.join("adapter.safetensors");
    let last = std::fs::metadata(&weights).expect("is there").len() as usize - 1;
    flip(&weights, last);
    let with = ["--adapter", arg(&adapter)];
    let to = ["--out", arg(&out)];
    for verb in [
        &["merge", arg(&split), with[0], with[1], to[0], to[1]][..],
        &[
            "evaluate",
            arg(&split),
            with[0],
            with[1],
            "--data",
            arg(&data),
        ],
        &["publish", arg(&adapter), "org/adapter"],
    ] {
        world.run(verb).refuses(&["adapter.safetensors", "sha256"]);
    }
    flip(&weights, last);
    let vector = "model.layers.5.self_attn.v_proj.v";
    let flip_vector = |shard: &Path| {
        let header = Header::read(shard).expect("reads");
        let entry = header.entries.iter().find(|entry| entry.name == vector);
        flip(shard, entry.expect("is there").offset as usize + 5);
    };
    // of a sidecar, no sum of M tells of its vectors
    let sidecar = world.path("sidecar");
    let decompose = ["decompose", arg(&base), "--layout", "sidecar", "--out"];
    world
        .run(&[&decompose[..], &[arg(&sidecar)]].concat())
        .succeeds();
    let other = world.path("other");
    let more = [arg(&other), "--steps", "2", "--length", "32"];
    let train = ["train", arg(&sidecar), "--data", arg(&data), "--out"];
    world.run(&[&train[..], &more].concat()).succeeds();
    flip_vector(&sidecar.join("svd-00001-of-00001.safetensors"));
    let to_convert = world.path("c");
    let convert = [
        "convert",
        arg(&sidecar),
        "--rank",
        "1",
        "--out",
        arg(&to_convert),
    ];
    world.run(&convert).refuses(&[vector, "sha256"]);
    let [to_merge, to_export, to_train] = ["m", "e", "t"].map(|name| world.path(name));
    let text = ["--data", arg(&data)];
    for (verb, more) in [
        ("merge", &["--out", arg(&to_merge)][..]),
        ("evaluate", &text),
        (
            "export",
            &["--to", "svd-training", "--out", arg(&to_export)],
        ),
    ] {
        let fixed = [verb, arg(&sidecar), "--adapter", arg(&other)];
        world
            .run(&[&fixed[..], more].concat())
            .refuses(&[vector, "sha256"]);
    }
    let relative = ["--parametrisation", "relative", "--out", arg(&to_train)];
    world
        .run(&[&["train", arg(&sidecar)], &text[..], &relative].concat())
        .refuses(&[vector, "sha256"]);
    flip_vector(&shard);
    let export = ["export", arg(&split), with[0], with[1], "--to", "peft-lora"];
    world
        .run(&[&export[..], &to].concat())
        .refuses(&["model.layers.5", "sha256"]);
    world
        .run(&["publish", arg(&split), "org/svd"])
        .refuses(&["svd-00001-of-00001.safetensors", "sha256"]);
}

#[test]
fn other_settings_do_not_continue_a_job() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let out = world.path("svd");
    world
        .run(&["decompose", arg(&base), "--out", arg(&out)])
        .succeeds();
    let again = world
        .run(&["decompose", arg(&base), "--out", arg(&out)])
        .succeeds();
    assert!(
        again.stderr.contains("complete already"),
        "{}",
        again.stderr
    );
    world
        .run(&["decompose", arg(&base), "--out", arg(&out), "--rank", "3"])
        .refuses(&["rank", "fraction 0.1", "rank 3"]);
    world
        .run(&["merge", arg(&out), "--out", arg(&base)])
        .refuses(&["already holds", "nothing there was touched"]);
}

#[test]
fn killed_training_resumes_to_the_same_numbers() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let (split, data) = (world.path("svd"), fixture("eighty-train.txt"));
    world
        .run(&["decompose", arg(&base), "--out", arg(&split)])
        .succeeds();
    let train = |out: &str, more: &[&'static str]| {
        let fixed = [
            "train",
            arg(&split),
            "--data",
            arg(&data),
            "--steps",
            "120",
            "--length",
            "16",
            "--batch",
            "2",
            "--out",
            out,
        ];
        let all: Vec<String> = fixed.iter().chain(more).map(ToString::to_string).collect();
        all
    };
    let command = |arguments: &[String]| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        world.command(&arguments)
    };
    let undisturbed = world.path("undisturbed");
    Run::of(
        command(&train(arg(&undisturbed), &[]))
            .output()
            .expect("runs"),
    )
    .succeeds();

    let out = world.path("killed");
    let mut child = command(&train(arg(&out), &[])).spawn().expect("starts");
    let state = out.join(".svdhub/training.safetensors");
    for _ in 0..12_000 {
        if state.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("kills");
    child.wait().expect("is gone");
    assert!(
        state.exists() && !out.join("adapter.safetensors").exists(),
        "killed in the middle"
    );

    Run::of(command(&train(arg(&out), &[])).output().expect("runs"))
        .refuses(&["unfinished training", "--resume"]);
    // a changed byte would make another run of it
    let whole = std::fs::read(&state).expect("reads");
    let mut changed = whole.clone();
    let losses = changed.len() - 64 - 2;
    changed[losses] ^= 1;
    std::fs::write(&state, changed).expect("writes");
    Run::of(
        command(&train(arg(&out), &["--resume"]))
            .output()
            .expect("runs"),
    )
    .refuses(&["the state", "is not what was written", "begin anew"]);
    std::fs::write(&state, whole).expect("writes");
    let saved = Checkpoint::single(&out.join(".svdhub"), "training.safetensors").expect("opens");
    let taken = saved
        .read("seconds")
        .expect("the time of its steps")
        .to_f32()[0];
    let resumed = Run::of(
        command(&train(arg(&out), &["--resume"]))
            .output()
            .expect("runs"),
    )
    .succeeds();
    assert!(
        resumed.stderr.contains("going on after step"),
        "{}",
        resumed.stderr
    );
    let report = |dir: &Path| crate::world::json_file(&dir.join("report.json"))["train"].clone();
    let facts = report(&out);
    let number = |key: &str| facts[key].as_f64().expect("a number");
    // of both runs together
    assert!(
        taken > 0.0 && number("seconds") > f64::from(taken),
        "{facts}"
    );
    let tokens = number("seconds") * number("tokens_per_s");
    assert!((tokens - 120.0 * 2.0 * 16.0).abs() < 1.0, "{tokens}");
    let adapter =
        |dir: &std::path::Path| std::fs::read(dir.join("adapter.safetensors")).expect("an adapter");
    assert!(
        adapter(&out) == adapter(&undisturbed),
        "the resumed run gives other numbers"
    );
}
