//! What a model must be, and one that we merged.

use std::path::Path;

use super::Facts;
use super::sums::Sums;
use crate::base::Base;
use crate::error::Result;
use crate::event::Observer;
use crate::model::ModelConfig;
use crate::plan::check_shapes;
use crate::report;
use crate::weights::element::is_float;
use crate::weights::{Checkpoint, dtype_name};

pub fn model(
    dir: &Path,
    against: Option<&Base>,
    observer: &dyn Observer,
    facts: &mut Facts,
) -> Result<()> {
    let base = Base::open(dir, None, None)?;
    let inventory = &base.checkpoint.inventory;
    facts.count(inventory);
    let config = ModelConfig::read(dir)?;
    check_shapes(dir, &config, inventory)?;
    facts.checks.push("headers, index and config agree".into());
    Sums::stated(dir, "merge")?.compare(dir, &base.checkpoint, observer, facts)?;
    if let Some(original) = against {
        let untied = !config.tied && ModelConfig::read(&original.dir)?.tied;
        let recast = recast(dir)?;
        same_tensors(
            original,
            &base.checkpoint,
            &config,
            untied,
            recast.as_deref(),
            facts,
        );
        let mut said = match recast {
            None => "names, shapes and dtypes are the base's".to_string(),
            Some(dtype) => format!("names and shapes are the base's, in {dtype} as merged"),
        };
        if untied {
            said += ", and those of its head, untied";
        }
        facts.checks.push(said);
    }
    Ok(())
}

/// The dtype that a model was merged to, if that is not the base's.
fn recast(dir: &Path) -> Result<Option<String>> {
    let report = report::read(dir)?;
    let dtype = report
        .get("merge")
        .and_then(|facts| facts["dtype"].as_str());
    Ok(dtype.filter(|&dtype| dtype != "base").map(String::from))
}

/// `untied`: the merged model has a head of its own, which is the embedding in the original. `recast`: its numbers are all in
/// this dtype.
fn same_tensors(
    original: &Base,
    merged: &Checkpoint,
    config: &ModelConfig,
    untied: bool,
    recast: Option<&str>,
    facts: &mut Facts,
) {
    let is = |dtype, shape: &[usize]| format!("{} {shape:?}", dtype_name(dtype));
    let describe = |dtype, shape: &[usize]| match recast {
        Some(name) if is_float(dtype) => format!("{name} {shape:?}"),
        _ => is(dtype, shape),
    };
    let head = format!("{}.weight", config.names.head);
    let inventory = &original.checkpoint.inventory;
    let embedding = config.embedding(config.prefix(|name| inventory.contains(name)));
    let embedding = inventory.get(&embedding);
    for (file, entry) in original.checkpoint.inventory.entries() {
        let expected = describe(entry.dtype, &entry.shape);
        match merged.inventory.get(&entry.name) {
            None => facts.problem(&file.name, Some(&entry.name), expected, "nothing"),
            Some((place, other)) => {
                let found = is(other.dtype, &other.shape);
                if found != expected {
                    facts.problem(&place.name, Some(&entry.name), expected, found);
                }
            }
        }
    }
    for (file, entry) in merged.inventory.entries() {
        if original.checkpoint.inventory.contains(&entry.name) {
            continue;
        }
        let found = is(entry.dtype, &entry.shape);
        let expected = match embedding.filter(|_| untied && entry.name == head) {
            Some((_, tied)) => describe(tied.dtype, &tied.shape),
            None => "no such tensor".into(),
        };
        if found != expected {
            facts.problem(&file.name, Some(&entry.name), expected, found);
        }
    }
}
