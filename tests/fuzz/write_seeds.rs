//! Writes the seeds to where cargo-fuzz looks for them.

#[path = "seeds.rs"]
mod seeds;

use std::fs;
use std::path::Path;

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, name, bytes) in seeds::all() {
        fs::create_dir_all(folder.join(target)).expect("creates");
        fs::write(folder.join(target).join(name), bytes).expect("writes");
    }
}
