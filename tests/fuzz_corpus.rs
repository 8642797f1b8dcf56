//! What fuzzing found, and where it began, through the functions that are fuzzed (fuzz/README.md).

#[path = "fuzz/limit.rs"]
mod limit;
#[path = "fuzz/seeds.rs"]
mod seeds;
#[path = "fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The targets share folders and the count of bytes.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Whether the target read the input, rather than refused it.
fn replay(target: &str, name: &str, bytes: &[u8]) -> bool {
    let found = targets::ALL.iter().find(|(known, _)| *known == target);
    let (_, run) = found.unwrap_or_else(|| panic!("there is no target {target}"));
    // libtest shows this beside a panic
    println!("{target}/{name}");
    let case = format!("{target}/{name}").leak();
    let mut read = false;
    limit::within(case, bytes.len(), || read = run(bytes));
    read
}

#[test]
fn what_was_found_stays_harmless() {
    let _alone = ONE_AT_A_TIME.lock().expect("the other passed");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/fuzz");
    let mut replayed = 0;
    for target in listed(&folder) {
        for file in listed(&target) {
            let bytes = fs::read(&file).expect("reads");
            assert!(bytes.len() < 64 << 10, "{} is not small", file.display());
            replay(&name_of(&target), &name_of(&file), &bytes);
            replayed += 1;
        }
    }
    assert!(replayed > 0, "the findings are where they were put");
}

#[test]
fn every_target_reads_its_seeds() {
    let _alone = ONE_AT_A_TIME.lock().expect("the other passed");
    let seeds = seeds::all();
    for (target, name, bytes) in &seeds {
        assert!(
            replay(target, name, bytes),
            "{target} refuses its seed {name}"
        );
    }
    for (target, _) in targets::ALL {
        assert!(
            seeds.iter().any(|(of, ..)| *of == target),
            "{target} has no seed"
        );
    }
}

fn listed(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("lists");
    let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    paths
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned()
}
