//! Several processes that train together, as mpirun starts them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use svdhub::adapter::Adapter;
use svdhub::weights::Dtype;

use crate::world::{Run, World, arg, files, fixture, json_file, wait_until};

/// Whether there is an MPI; says loudly where there is none.
fn mpi(test: &str) -> bool {
    let there = Command::new("mpirun").arg("--version").output().is_ok();
    if !there {
        // not eprintln: of a test that passes, that is not shown
        writeln!(
            std::io::stderr(),
            "SKIPPED: {test} needs mpirun (Debian's openmpi-bin)"
        )
        .expect("standard error is open");
    }
    there
}

fn decomposed(world: &World) -> PathBuf {
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    let decompose = ["decompose", arg(&base), "--out", arg(&split)];
    world.run(&decompose).succeeds();
    split
}

/// The arguments of a run of 4 windows a step.
fn train(split: &Path, out: &Path, steps: &str) -> Vec<String> {
    let data = fixture("eighty-train.txt");
    let fixed = ["train", arg(split), "--data", arg(&data), "--out", arg(out)];
    let rest = [
        "--steps", steps, "--batch", "4", "--length", "48", "--lr", "3e-2",
    ];
    fixed.iter().chain(&rest).map(ToString::to_string).collect()
}

/// The program, started `processes` times by mpirun.
fn together(world: &World, processes: usize, arguments: &[String]) -> Command {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let alone = world.command(&arguments);
    let mut command = Command::new("mpirun");
    command
        .args(["--allow-run-as-root", "--oversubscribe", "-n"])
        .arg(processes.to_string())
        .arg(alone.get_program())
        .args(alone.get_args())
        .arg("--parallel");
    for (name, value) in alone.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

fn losses(out: &Path) -> Vec<f64> {
    let report: Value = json_file(&out.join("report.json"));
    let losses = report["train"]["losses"].as_array().expect("losses");
    losses
        .iter()
        .map(|x| x.as_f64().expect("a number"))
        .collect()
}

/// Δσ of an adapter.
fn moved(out: &Path) -> Vec<f32> {
    let adapter = Adapter::read(out).expect("an adapter");
    adapter.delta.into_values().flatten().collect()
}

#[test]
fn processes_together_train_like_one_alone() {
    if !mpi("processes_together_train_like_one_alone") {
        return;
    }
    let world = World::new();
    let split = decomposed(&world);
    let alone = world.path("alone");
    let steps = "8";
    let run = train(&split, &alone, steps);
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    world.run(&run).succeeds();
    for processes in [2, 4] {
        let out = world.path(&format!("of-{processes}"));
        let run = together(&world, processes, &train(&split, &out, steps)).output();
        let run = Run::of(run.expect("starts")).succeeds();
        // one of them tells
        assert_eq!(
            run.stderr.matches("step     8 of 8").count(),
            1,
            "{}",
            run.stderr
        );
        let report = json_file(&out.join("report.json"));
        assert_eq!(report["train"]["processes"], processes);
        // sums of f32 in another order; training carries the difference on, and lets it grow
        for (together, alone) in losses(&out).iter().zip(losses(&alone)) {
            assert!(
                (together - alone).abs() < 1e-5 * alone,
                "{together} for {alone}"
            );
        }
        let (together, alone) = (moved(&out), moved(&alone));
        assert_eq!(together.len(), alone.len());
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        let apart: Vec<f32> = together.iter().zip(&alone).map(|(a, b)| a - b).collect();
        assert!(
            norm(&apart) < 1e-3 * norm(&alone),
            "{} of {}",
            norm(&apart),
            norm(&alone)
        );
    }
}

#[test]
fn each_answer_weighs_the_same_whoever_computes_it() {
    if !mpi("each_answer_weighs_the_same_whoever_computes_it") {
        return;
    }
    let world = World::new();
    let split = decomposed(&world);
    let data = world.path("pairs.jsonl");
    let row = |at: usize| {
        let completion = " and so he did say it".repeat(1 + at % 4);
        json!({"prompt": format!("He said {at} times:"), "completion": completion}).to_string()
    };
    let rows: Vec<String> = (0..12).map(row).collect();
    std::fs::write(&data, rows.join("\n")).expect("writes");
    let run = |out: &Path| {
        let mut run = train(&split, out, "6");
        let at = run
            .iter()
            .position(|it| it == "--data")
            .expect("it is given");
        run[at + 1] = arg(&data).into();
        run
    };
    let (alone, shared) = (world.path("alone"), world.path("shared"));
    let arguments = run(&alone);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    world.run(&arguments).succeeds();
    let output = together(&world, 4, &run(&shared)).output();
    Run::of(output.expect("starts")).succeeds();
    for (together, alone) in losses(&shared).iter().zip(losses(&alone)) {
        assert!(
            (together - alone).abs() < 1e-5 * alone,
            "{together} for {alone}"
        );
    }
}

#[test]
fn a_share_of_the_windows_is_what_each_process_takes() {
    if !mpi("a_share_of_the_windows_is_what_each_process_takes") {
        return;
    }
    let world = World::new();
    let split = decomposed(&world);
    let out = world.path("out");
    let run = together(&world, 3, &train(&split, &out, "2")).output();
    let run = Run::of(run.expect("starts"));
    assert!(!run.stderr.is_empty() && !out.join("report.json").exists());
    assert!(run.stderr.contains("4 windows in a step"), "{}", run.stderr);
    assert!(run.stderr.contains("--batch"), "{}", run.stderr);
}

#[test]
fn killed_together_they_go_on_to_the_same_adapter() {
    if !mpi("killed_together_they_go_on_to_the_same_adapter") {
        return;
    }
    let world = World::new();
    let split = decomposed(&world);
    let (whole, cut) = (world.path("whole"), world.path("cut"));
    // the first state comes after 50: mpirun takes its time to die
    let steps = "300";
    let run = together(&world, 2, &train(&split, &whole, steps)).output();
    Run::of(run.expect("starts")).succeeds();
    let mut child = together(&world, 2, &train(&split, &cut, steps))
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    wait_until("a state is saved", || {
        cut.join(".svdhub/training.safetensors").exists()
    });
    // mpirun takes its processes along
    child.kill().expect("kills");
    child.wait().expect("is gone");
    wait_until("the others are gone", || {
        let lock = std::fs::File::open(cut.join(".svdhub/lock")).expect("a lock");
        lock.try_lock().is_ok()
    });
    assert!(!cut.join("report.json").exists(), "it was killed too late");
    let again = [&train(&split, &cut, steps)[..], &["--resume".into()]].concat();
    let run = together(&world, 2, &again).output();
    let run = Run::of(run.expect("starts")).succeeds();
    assert!(run.stderr.contains("going on after step"), "{}", run.stderr);
    assert_eq!(losses(&cut), losses(&whole));
    // what is complete is so for all of them: nobody waits for steps that are not made
    let mut done = together(&world, 2, &again).spawn().expect("starts");
    wait_until("nothing is left to do", || {
        done.try_wait().expect("asks").is_some()
    });
    assert!(done.wait().expect("ends").success());
    let weights = |dir: &Path| files(dir).remove("adapter.safetensors").expect("weights");
    assert!(weights(&cut) == weights(&whole));
}

#[test]
fn a_process_that_nobody_started_with_others_says_so() {
    let world = World::new();
    let split = decomposed(&world);
    let out = world.path("out");
    let arguments = [&train(&split, &out, "2")[..], &["--parallel".into()]].concat();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let words = [
        "none of mpirun, srun and torchrun has started",
        "mpirun -n N",
    ];
    world.run(&arguments).refuses(&words);
    // what torchrun tells its processes
    let mut command = world.command(&arguments);
    command.args(["--device", "cpu"]);
    let told = [
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ];
    let run = Run::of(command.envs(told).output().expect("runs"));
    run.refuses(&["on CPUs they find each other through MPI", "mpirun -n N"]);
    assert!(!out.exists());
}
