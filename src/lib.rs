//! Fine-tune Hugging Face models by their singular values.
//!
//! Every linear weight is split once as `M = M′ + uᵀ·diag(σ)·v`; training moves σ alone; merging gives back an ordinary
//! model. Data flows one way, and a directory is the interface between two verbs:
//!
//! ```text
//! hub ─→ base ─→ plan ─→ decompose ─→ artifact ─→ train ─→ adapter ─→ merge ─→ card ─→ publish ─→ hub
//!                        (linalg, split, join)    (model)
//! ```
//!
//! `convert` stores an artifact in another way; `export` writes an adapter for programs that are not ours; `generate` lets
//! a model speak. Several machines divide the work: each decomposes its share (job), `assemble` joins them (join).
//! Several processes train together (parallel).

pub mod adapter;
pub mod artifact;
pub mod assemble;
pub mod base;
pub mod card;
pub mod chat;
pub mod contents;
pub mod convert;
pub mod decompose;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod event;
pub mod export;
pub mod format;
mod front_matter;
pub mod generate;
pub mod heap;
pub mod html;
pub mod hub;
pub mod inspect;
pub mod job;
pub mod join;
pub mod json;
pub mod kind;
mod lanes;
pub mod linalg;
mod lock;
pub mod merge;
pub mod model;
pub mod outlet;
pub mod page;
pub mod parallel;
pub mod part;
pub mod peft;
pub mod plan;
pub mod plot;
pub mod publish;
mod random;
pub mod ranks;
pub mod report;
pub mod source;
pub mod spectrum;
pub mod split;
pub mod sum;
mod template;
pub mod text;
pub mod train;
pub mod verify;
pub mod weights;
pub mod workers;
pub mod workspace;

pub use error::{Error, Result};

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    /// The rows of README's table of modules, the uppermost first.
    fn rows(readme: &str) -> Vec<Vec<String>> {
        let (_, table) = readme
            .split_once("imports point down this table")
            .expect("a table");
        let lines = table.lines().filter(|line| line.starts_with("| `"));
        let names = lines.map(|line| {
            line.split('|')
                .nth(1)
                .expect("a cell")
                .replace(['`', ','], " ")
        });
        names
            .map(|cell| cell.split_whitespace().map(String::from).collect())
            .collect()
    }

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("lists") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }

    /// The modules that a source names as `crate::…`, in its code and not in its tests.
    fn named(text: &str) -> Vec<String> {
        let code = text
            .split("#[cfg(test)]\nmod tests")
            .next()
            .unwrap_or_default();
        let mut names = Vec::new();
        for place in code.split("crate::").skip(1) {
            let group = place
                .strip_prefix('{')
                .and_then(|rest| rest.split('}').next());
            let list = group.unwrap_or(place).split(',');
            let words = list.map(|item| {
                let item = item.trim_start();
                let end = item.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                item[..end.unwrap_or(item.len())].to_string()
            });
            names.extend(words.take(if group.is_some() { usize::MAX } else { 1 }));
        }
        names
    }

    #[test]
    fn imports_point_down_the_table_of_the_readme() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let readme = std::fs::read_to_string(root.join("README.md")).expect("reads");
        let rows = rows(&readme);
        let row: BTreeMap<&str, usize> = (rows.iter().enumerate())
            .flat_map(|(row, names)| names.iter().map(move |name| (name.as_str(), row)))
            .collect();
        let mut files = Vec::new();
        sources(&root.join("src"), &mut files);
        let (mut upwards, mut seen) = (Vec::new(), 0);
        for file in files {
            let inside = file.strip_prefix(root.join("src")).expect("it lies there");
            let top = inside
                .iter()
                .next()
                .and_then(|part| part.to_str())
                .expect("a name");
            let top = top.trim_end_matches(".rs");
            // a test from end to end
            if top == "lib" || inside.ends_with("twins.rs") {
                continue;
            }
            let own = *row
                .get(top)
                .unwrap_or_else(|| panic!("`{top}` is not in the table"));
            for name in named(&std::fs::read_to_string(&file).expect("reads")) {
                let Some(other) = row.get(name.as_str()).filter(|_| name != top) else {
                    continue;
                };
                seen += 1;
                // row 1: the verbs, of which none calls another but the one that looks at what they wrote
                if *other < own || (*other == own && own == 1 && top != "verify") {
                    upwards.push(format!("{} names {name}", inside.display()));
                }
            }
        }
        assert!(seen > 300, "{seen} imports were found");
        assert!(upwards.is_empty(), "{upwards:#?}");
    }
}
