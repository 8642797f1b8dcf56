//! Several machines decompose, one assembles: the same bytes as from one machine, and no mixture is taken for a whole.

use std::path::{Path, PathBuf};

use serde_json::Value;
use svdhub::weights::{Dtype, Header};

use crate::world::{World, arg, files, fixture};

impl World {
    /// Part `number` of `of`, in a directory of its own.
    fn part(&self, base: &Path, number: usize, of: usize, options: &[&str]) -> PathBuf {
        let out = self.path(&format!("part-{number}-of-{of}"));
        let share = format!("{number}/{of}");
        let fixed = ["decompose", arg(base), "--out", arg(&out), "--part", &share];
        self.run(&[&fixed[..], options].concat()).succeeds();
        out
    }

    fn parts(&self, base: &Path, of: usize, options: &[&str]) -> Vec<PathBuf> {
        (1..=of)
            .map(|number| self.part(base, number, of, options))
            .collect()
    }

    fn assemble<'a>(&self, parts: &'a [PathBuf], out: &'a Path) -> Vec<&'a str> {
        let parts = parts.iter().map(|dir| arg(dir));
        ["assemble"]
            .into_iter()
            .chain(parts)
            .chain(["--out", arg(out)])
            .collect()
    }
}

/// Two decompositions are the same in every byte, but for the times in their reports.
pub fn assert_same(found: &Path, expected: &Path) {
    let report = |dir: &Path| {
        let report = std::fs::read(dir.join("report.json")).expect("reads");
        let mut report: Value = serde_json::from_slice(&report).expect("JSON");
        report["sha256"] = Value::Null;
        for own in ["seconds", "threads"] {
            report["decompose"][own] = Value::Null;
        }
        report
    };
    assert_eq!(report(found), report(expected));
    let (found, expected) = (files(found), files(expected));
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>()
    );
    for (name, bytes) in &found {
        assert!(*bytes == expected[name], "{name} differs");
    }
}

#[test]
fn any_number_of_parts_assembles_to_the_bytes_of_one_machine() {
    for (layout, dtype) in [
        ("residual", Dtype::F32),
        ("residual", Dtype::BF16),
        ("sidecar", Dtype::BF16),
    ] {
        let world = World::new();
        let base = world.model("base", dtype, 600_000);
        let options = ["--layout", layout, "--shard-size", "700kB"];
        let whole = world.path("whole");
        let fixed = ["decompose", arg(&base), "--out", arg(&whole)];
        world.run(&[&fixed[..], &options].concat()).succeeds();
        for of in [1, 3, 7] {
            let mut parts = world.parts(&base, of, &options);
            // the order of the names does not matter
            parts.rotate_left(of / 2);
            let out = world.path(&format!("from-{of}"));
            world.run(&world.assemble(&parts, &out)).succeeds();
            assert_same(&out, &whole);
            world
                .run(&["verify", arg(&out), "--against", arg(&base)])
                .succeeds();
            assert!(parts[0].join("part.json").exists(), "the parts stay");
            world.run(&world.assemble(&parts, &out)).succeeds();
        }
        // more machines than matrices: some have nothing to do
        if layout == "sidecar" {
            let out = world.path("from-50");
            let parts = world.parts(&base, 50, &options);
            world.run(&world.assemble(&parts, &out)).succeeds();
            assert_same(&out, &whole);
        }
    }
}

#[test]
fn parts_with_vectors_in_bf16_assemble_too_and_are_done_only_once() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let options = ["--factors-dtype", "bf16"];
    let whole = world.path("whole");
    let fixed = ["decompose", arg(&base), "--out", arg(&whole)];
    world.run(&[&fixed[..], &options].concat()).succeeds();
    let parts = world.parts(&base, 2, &options);
    let again = ["--part", "1/2", "--out", arg(&parts[0])];
    let again = [&["decompose", arg(&base)], &again[..], &options].concat();
    let again = world.run(&again).succeeds();
    assert!(
        again.stderr.contains("is complete already"),
        "{}",
        again.stderr
    );
    let out = world.path("out");
    world.run(&world.assemble(&parts, &out)).succeeds();
    assert_same(&out, &whole);
}

#[test]
fn a_finished_part_says_so_and_no_other_verb_takes_it_for_a_whole() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let part = world.part(&base, 2, 3, &[]);
    let before = files(&part);
    let again = world
        .run(&[
            "decompose",
            arg(&base),
            "--out",
            arg(&part),
            "--part",
            "2/3",
            "--json",
        ])
        .succeeds();
    assert!(
        again.stderr.contains("complete already"),
        "{}",
        again.stderr
    );
    assert_eq!(before, files(&part));

    let (out, data) = (world.path("out"), fixture("eighty-train.txt"));
    let verbs: [&[&str]; 8] = [
        &["merge", arg(&part), "--out", arg(&out)],
        &[
            "train",
            arg(&part),
            "--data",
            arg(&data),
            "--out",
            arg(&out),
        ],
        &["evaluate", arg(&part), "--data", arg(&data)],
        &["verify", arg(&part)],
        &["verify", arg(&base), "--against", arg(&part)],
        &["publish", arg(&part), "org/name"],
        &["decompose", arg(&part), "--out", arg(&out)],
        &[
            "merge",
            arg(&base),
            "--adapter",
            arg(&part),
            "--out",
            arg(&out),
        ],
    ];
    for verb in verbs {
        let run = world.run(verb);
        assert_ne!(run.code, Some(0), "{verb:?}");
        assert!(!out.exists(), "{verb:?}");
        if verb[0] != "merge" || verb[1] == arg(&part) {
            run.refuses(&["only part 2/3", "svdhub assemble"]);
        }
    }
    world
        .run(&["decompose", arg(&base), "--out", arg(&part)])
        .refuses(&["part was 2/3"]);
    for bad in ["0/3", "4/3", "3", "a/b"] {
        let share = ["--part", bad];
        let run = world.run(&[&["decompose", arg(&base), "--out", arg(&out)], &share[..]].concat());
        assert_eq!(run.code, Some(2), "{bad}: {}", run.stderr);
    }
}

#[test]
fn gaps_repetitions_and_mixtures_are_refused_by_name() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let out = world.path("out");
    let [one, two, three] = [1, 2, 3].map(|number| world.part(&base, number, 3, &[]));
    let assemble = |dirs: &[&Path]| {
        let dirs: Vec<PathBuf> = dirs.iter().map(|dir| dir.to_path_buf()).collect();
        world.run(&world.assemble(&dirs, &out))
    };
    assemble(&[&one, &three]).refuses(&["no part 2/3", "--part"]);
    assemble(&[&three]).refuses(&["no part 1/3", "no part 2/3"]);

    let copy = world.path("copy");
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .args([&two, &copy])
        .status();
    assert!(copied.expect("cp runs").success());
    assemble(&[&one, &two, &copy, &three]).refuses(&["part 2/3", arg(&two), arg(&copy), "once"]);

    // the same matrices under another number
    let record = std::fs::read_to_string(copy.join("part.json")).expect("reads");
    let record = record.replace("\"2/3\"", "\"3/3\"");
    std::fs::write(copy.join("part.json"), record).expect("writes");
    assemble(&[&one, &two, &copy]).refuses(&["the matrix `model.", arg(&two), arg(&copy)]);

    let other = world.path("other-rank");
    world
        .run(&[
            "decompose",
            arg(&base),
            "--out",
            arg(&other),
            "--part",
            "2/3",
            "--rank",
            "5",
        ])
        .succeeds();
    assemble(&[&one, &other, &three]).refuses(&[
        arg(&one),
        arg(&other),
        "rank is fraction 0.1",
        "rank 5",
    ]);
    let of_four = world.part(&base, 4, 4, &[]);
    assemble(&[&one, &two, &three, &of_four]).refuses(&["number of parts", arg(&of_four)]);
    let elsewhere = world.model("other-base", Dtype::F16, u64::MAX);
    let foreign = world.path("foreign");
    world
        .run(&[
            "decompose",
            arg(&elsewhere),
            "--out",
            arg(&foreign),
            "--part",
            "2/3",
        ])
        .succeeds();
    assemble(&[&one, &foreign, &three]).refuses(&["content of the base model", arg(&foreign)]);

    assemble(&[&one, &base, &three]).refuses(&["is not a part", "--part I/N"]);
    let job = two.join(".svdhub/job.json");
    let finished = std::fs::read_to_string(&job).expect("reads");
    std::fs::write(&job, finished.replace("true", "false")).expect("writes");
    assemble(&[&one, &two, &three]).refuses(&[arg(&two), "unfinished work", "run that command"]);
    std::fs::write(&job, finished).expect("writes");

    assert!(!out.exists(), "nothing was begun");
    assemble(&[&one, &two, &three]).succeeds();
    world
        .run(&world.assemble(&[one.clone(), two, three], &one))
        .refuses(&["svdhub decompose", "nothing there was touched"]);
}

#[test]
fn a_corrupt_part_is_refused_by_file_and_tensor_and_can_be_repaired() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let parts = world.parts(&base, 2, &["--shard-size", "500kB"]);
    let (whole, out) = (world.path("whole"), world.path("out"));
    world
        .run(&[
            "decompose",
            arg(&base),
            "--out",
            arg(&whole),
            "--shard-size",
            "500kB",
        ])
        .succeeds();
    // of a matrix in a later shard
    let mut matrices: Vec<PathBuf> = std::fs::read_dir(parts[0].join("matrices"))
        .expect("lists")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    matrices.sort_by_key(|path| Header::read(path).expect("reads").entries[0].name.clone());
    let victim = matrices.last().expect("a matrix");
    let name = victim.file_name().expect("a name").to_str().expect("UTF-8");
    let header = Header::read(victim).expect("reads");
    let sound = std::fs::read(victim).expect("reads");

    let mut flipped = sound.clone();
    let u = header.entries.iter().find(|e| e.name.ends_with(".u"));
    let u = u.expect("there is a u");
    flipped[u.offset as usize + 9] ^= 0x10;
    std::fs::write(victim, &flipped).expect("writes");
    world
        .run(&world.assemble(&parts, &out))
        .refuses(&[&u.name, name, "blake3", "copy it again"]);
    assert!(!out.join("svd.safetensors.index.json").exists());
    world
        .run(&["verify", arg(&out)])
        .refuses(&["unfinished work of `svdhub assemble`"]);

    // a header that says something else of the matrix
    let mut flipped = sound.clone();
    let at = sound
        .windows(9)
        .position(|w| w == b"sigma_max")
        .expect("is there");
    flipped[at] ^= 1;
    std::fs::write(victim, &flipped).expect("writes");
    world
        .run(&world.assemble(&parts, &out))
        .refuses(&[name, header.entries[0].name.trim_end_matches(".residual")]);
    std::fs::write(victim, &sound[..sound.len() - 5]).expect("writes");
    world
        .run(&world.assemble(&parts, &out))
        .refuses(&[name, "cut short"]);

    // as advised: without the file, its part is repeated where it is broken
    std::fs::remove_file(victim).expect("removes");
    world
        .run(&world.assemble(&parts, &out))
        .refuses(&[name, "cannot open"]);
    let run = world
        .run(&[
            "decompose",
            arg(&base),
            "--out",
            arg(&parts[0]),
            "--part",
            "1/2",
            "--shard-size",
            "500kB",
        ])
        .succeeds();
    assert!(
        run.stderr.contains("20 of 21 matrices are done already"),
        "{}",
        run.stderr
    );
    assert!(std::fs::read(victim).expect("reads") == sound);
    let run = world.run(&world.assemble(&parts, &out)).succeeds();
    assert!(run.stderr.contains("going on in"), "{}", run.stderr);
    assert_same(&out, &whole);
}

#[test]
fn the_base_is_found_given_or_asked_for_and_must_be_the_one_decomposed() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let parts = world.parts(&base, 2, &[]);
    let whole = world.path("whole");
    world
        .run(&["decompose", arg(&base), "--out", arg(&whole)])
        .succeeds();
    let moved = world.path("moved");
    std::fs::rename(&base, &moved).expect("moves");
    let out = world.path("out");
    world
        .run(&world.assemble(&parts, &out))
        .refuses(&["needs its base model", "--base"]);
    let other = world.model("other", Dtype::F16, u64::MAX);
    let with = |base: &Path| {
        let given = ["--base", arg(base)];
        world.run(&[&world.assemble(&parts, &out)[..], &given].concat())
    };
    with(&other).refuses(&["model.safetensors", "not what was decomposed", "sha256"]);
    with(&moved).succeeds();
    assert_same(&out, &whole);
}

#[test]
fn parts_of_a_hub_model_fetch_their_base_from_the_hub() {
    let world = World::with_hub();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    world.run(&["publish", arg(&base), "org/base"]).succeeds();
    let repo = Path::new("org/base");
    let whole = world.path("whole");
    world
        .run(&["decompose", arg(repo), "--out", arg(&whole)])
        .succeeds();
    let parts = world.parts(repo, 2, &[]);
    let out = world.path("out");
    world.run(&world.assemble(&parts, &out)).succeeds();
    assert_same(&out, &whole);
}

#[test]
fn a_tight_memory_budget_gives_the_same_bytes() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    let decompose = |out: &Path, more: &[&str]| {
        let fixed = ["decompose", arg(&base), "--threads", "3", "--out", arg(out)];
        world.run(&[&fixed[..], more].concat()).succeeds()
    };
    let peak = |limits: &[&str]| {
        let plan = world.json(&[&["plan", arg(&base)][..], limits].concat());
        plan["peak_bytes"].as_u64().expect("a number")
    };
    let (three, one) = (peak(&["--threads", "3"]), peak(&["--threads", "1"]));
    let memory = ((three + one) / 2).to_string();
    let planned = |memory| peak(&["--threads", "3", "--memory", memory]);
    assert_eq!(planned(&memory).to_string(), memory);
    assert_eq!(planned("1kB"), one, "a matrix too large for it runs alone");

    let (free, tight, tiny) = (world.path("free"), world.path("tight"), world.path("tiny"));
    decompose(&free, &[]);
    let run = decompose(&tight, &["--memory", &memory]);
    assert!(!run.stderr.contains("run alone"), "{}", run.stderr);
    assert_same(&tight, &free);
    let run = decompose(&tiny, &["--memory", "1kB"]);
    assert!(run.stderr.contains("run alone"), "{}", run.stderr);
    assert_same(&tiny, &free);
}

#[test]
fn parts_agree_on_ranks_that_only_the_weights_know() {
    let world = World::new();
    let base = world.model("base", Dtype::BF16, u64::MAX);
    for (name, options) in [
        ("energy", ["--energy", "0.6", "--untie-head"]),
        ("budget", ["--budget", "900", "--untie-head"]),
    ] {
        let (whole, out) = (world.path(name), world.path(&format!("{name}-assembled")));
        let fixed = ["decompose", arg(&base), "--out", arg(&whole)];
        world.run(&[&fixed[..], &options].concat()).succeeds();
        let parts: Vec<PathBuf> = (1..=3)
            .map(|number| {
                let part = world.path(&format!("{name}-{number}"));
                let share = format!("{number}/3");
                let fixed = ["decompose", arg(&base), "--out", arg(&part)];
                let all = [&fixed[..], &["--part", &share], &options].concat();
                world.run(&all).succeeds();
                assert!(!part.join(".svdhub/spectra").exists(), "spectra are left");
                part
            })
            .collect();
        world.run(&world.assemble(&parts, &out)).succeeds();
        assert_same(&out, &whole);
    }
}
