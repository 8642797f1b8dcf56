//! Killed anywhere, the rerun continues to the same bytes.

use std::time::Duration;

use svdhub::weights::Dtype;

use crate::world::{Run, World, arg, files, fixture};

#[test]
fn killed_decompose_continues_to_the_same_bytes() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let options = ["--rank-fraction", "1", "--shard-size", "1MB"];
    let decompose = |out: &str, threads: &str| {
        [
            &["decompose", arg(&base), "--out", out, "--threads", threads],
            &options[..],
        ]
        .concat()
        .into_iter()
        .map(String::from)
        .collect::<Vec<_>>()
    };
    let reference = world.path("undisturbed");
    let run = |arguments: Vec<String>| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        world.run(&arguments)
    };
    run(decompose(arg(&reference), "2")).succeeds();
    let reference = files(&reference);
    let mut interrupted = 0;
    for (attempt, milliseconds) in [3, 10, 20, 40, 60, 80, 100, 130, 160, 200, 250, 300]
        .into_iter()
        .enumerate()
    {
        let out = world.path(&format!("killed-{attempt}"));
        let arguments = decompose(arg(&out), "1");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = world.command(&arguments).spawn().expect("starts");
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().expect("kills");
        child.wait().expect("is gone");
        let index = out.join("svd.safetensors.index.json");
        interrupted += usize::from(!index.exists());
        run(decompose(arg(&out), "2")).succeeds();
        let continued = files(&out);
        assert_eq!(
            continued.keys().collect::<Vec<_>>(),
            reference.keys().collect::<Vec<_>>()
        );
        for (name, bytes) in &continued {
            assert!(
                *bytes == reference[name],
                "{name} differs after a kill at {milliseconds} ms"
            );
        }
        assert!(!out.join(".svdhub/parts").exists(), "no parts are left");
    }
    assert!(
        interrupted >= 3,
        "only {interrupted} runs were interrupted: the kills come too late"
    );
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
    let adapter =
        |dir: &std::path::Path| std::fs::read(dir.join("adapter.safetensors")).expect("an adapter");
    assert!(
        adapter(&out) == adapter(&undisturbed),
        "the resumed run gives other numbers"
    );
}
