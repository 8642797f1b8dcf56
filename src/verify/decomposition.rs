//! What a decomposition must be.

use std::path::Path;

use super::Facts;
use super::sums::{check_seal, compare_file, compare_sum, compare_sums};
use crate::artifact::Artifact;
use crate::base::{self, Base};
use crate::error::{IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{ArtifactLayout, ModuleRecord};
use crate::linalg::certify;
use crate::sum::sha256_hex;
use crate::weights::Layout;
use crate::{json, report, workers};

pub fn decomposition(
    dir: &Path,
    against: Option<&Base>,
    observer: &dyn Observer,
    facts: &mut Facts,
) -> Result<()> {
    let mut artifact = Artifact::open(dir, None)?;
    let sidecar = artifact.svd.layout == ArtifactLayout::Sidecar;
    let remembered = || {
        let dir = base::remembered(dir)?;
        // a base that has gone, or is broken, is not here
        Base::open(&dir, None, None).ok()
    };
    let base = against
        .cloned()
        .or_else(|| if sidecar { remembered() } else { None });
    if sidecar && base.is_some() {
        artifact = Artifact::open(dir, base.clone())?;
    }
    let sums = artifact.sums.clone();
    let inventory = &artifact.checkpoint.inventory;
    facts.count(inventory);
    observer.start(Stage::Verify, facts.bytes, Unit::Bytes);

    for (file, expected) in &sums.files {
        compare_file(dir, file, expected, facts)?;
    }
    let mut total = 0;
    for (file, entry) in inventory.entries() {
        let elements = artifact.checkpoint.read(&entry.name)?;
        total += entry.bytes;
        observer.advance(Stage::Verify, entry.bytes, &entry.name);
        let found = sha256_hex(&elements.bytes);
        match sums.tensors.get(&entry.name) {
            Some(expected) => {
                compare_sum(&file.name, Some(&entry.name), expected, &found, facts);
            }
            None => facts.problem(&file.name, Some(&entry.name), "a hash in the index", "none"),
        }
        if let Some((index, value)) = elements.first_not_finite() {
            facts.problem(
                &file.name,
                Some(&entry.name),
                "finite numbers",
                format!("{value} at {index:?}"),
            );
        }
    }
    check_seal(dir, report::FILE, artifact.svd.schema >= 3, facts)?;
    check_index_form(&artifact, facts)?;
    let index_file = Layout::Decomposition.index_file();
    let stated =
        json::read::<serde_json::Value>(&dir.join(&index_file))?["metadata"]["total_size"].as_u64();
    if stated != Some(total) {
        facts.problem(
            &index_file,
            None,
            format!("total_size {total}"),
            format!("{stated:?}"),
        );
    }
    observer.finish(Stage::Verify);
    facts
        .checks
        .push("headers, index and `svd` section agree".into());
    facts.checks.push("sha256 of every file and tensor".into());
    if !facts.problems.is_empty() {
        // the arithmetic below would only repeat that the bytes are wrong
        return Ok(());
    }
    let Some(base) = base else {
        if sidecar {
            let base = artifact.svd.base.describe();
            facts.checks.push(format!(
                "not checked: M itself, the base {base} is not here"
            ));
            return Ok(());
        }
        return modules(&artifact, observer, facts);
    };
    compare_sums(&artifact.svd.base.sha256, &base.hash(observer)?, facts);
    facts
        .checks
        .push("the base is the pinned one, by sha256 of its files".into());
    if !facts.problems.is_empty() {
        return Ok(());
    }
    modules(&artifact, observer, facts)
}

/// The index names the sum of everything else, and nothing names its own: it must have the one form that we write.
fn check_index_form(artifact: &Artifact, facts: &mut Facts) -> Result<()> {
    let index_file = Layout::Decomposition.index_file();
    let path = artifact.dir.join(&index_file);
    let bytes = std::fs::read(&path).context("read", &path)?;
    let value: serde_json::Value = json::read(&path)?;
    let form = serde_json::to_vec_pretty(&value).expect("a JSON value serialises");
    let keys = |value: &serde_json::Value| -> Vec<String> {
        let object = value.as_object().into_iter().flatten();
        object.map(|(key, _)| key.clone()).collect()
    };
    let metadata = &value["metadata"];
    if form != bytes
        || keys(&value) != ["metadata", "weight_map"]
        || keys(metadata) != ["total_size", "sha256"]
        || keys(&metadata["sha256"]) != ["files", "tensors"]
    {
        facts.problem(&index_file, None, "the form svdhub writes", "another");
    }
    // a sum of something that is not there would go unseen
    let known = |name: &String| artifact.checkpoint.inventory.contains(name);
    for tensor in artifact.sums.tensors.keys().filter(|name| !known(name)) {
        facts.problem(&index_file, Some(tensor), "the tensor", "its hash only");
    }
    Ok(())
}

/// σ descends, the triplets belong to M, and M comes back byte for byte.
fn modules(artifact: &Artifact, observer: &dyn Observer, facts: &mut Facts) -> Result<()> {
    let modules: Vec<_> = artifact.svd.modules.iter().collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let elements = |record: &ModuleRecord| (record.shape[0] * record.shape[1]) as u64;
    let total = modules
        .iter()
        .map(|(_, record)| elements(record))
        .sum::<u64>();
    observer.start(Stage::Verify, 4 * total, Unit::Bytes);
    workers::in_order(
        &modules,
        threads,
        |(module, record)| {
            let factors = artifact.factors(module)?;
            let matrix = artifact.restore(module, record, &factors)?;
            let values = ndarray::Array2::from_shape_vec(
                (record.shape[0], record.shape[1]),
                matrix.to_f32(),
            )
            .expect("restored in the shape of its record");
            let certificate = certify(values.view(), &factors.u, &factors.sigma, &factors.v, 1)?;
            let descending = factors
                .sigma
                .windows(2)
                .into_iter()
                .all(|pair| pair[0] >= pair[1]);
            Ok((sha256_hex(&matrix.bytes), certificate, descending))
        },
        |(module, record), (sum, certificate, descending)| {
            let file = artifact.checkpoint.path_of(&format!("{module}.u"));
            let file = file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            observer.advance(Stage::Verify, 4 * elements(record), module);
            if sum != record.sha256 {
                facts.problem(
                    &file,
                    Some(module),
                    format!("M with sha256 {}", record.sha256),
                    format!("M with sha256 {sum}"),
                );
            }
            if !descending {
                facts.problem(
                    &file,
                    Some(&format!("{module}.sigma")),
                    "descending singular values",
                    "others",
                );
            }
            let tolerance = artifact.svd.algorithm.tolerance;
            if !artifact.svd.accepts(&certificate) {
                facts.problem(
                    &file,
                    Some(module),
                    format!("singular triplets of M to {tolerance:.0e}"),
                    format!(
                        "residual {:.1e}, orthogonality {:.1e}, ‖M′‖ {:.4} × the last value",
                        certificate.residual,
                        certificate.orthogonality,
                        certificate.tail.unwrap_or(f64::NAN),
                    ),
                );
            }
            Ok(())
        },
    )?;
    observer.finish(Stage::Verify);
    facts.checks.push(format!(
        "M = M′ + uᵀ·diag(σ)·v restores all {} weights byte for byte",
        modules.len()
    ));
    facts
        .checks
        .push("σ descends, u and v are orthonormal triplets of M (random probes)".into());
    Ok(())
}
