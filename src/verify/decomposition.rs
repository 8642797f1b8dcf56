//! What a decomposition must be.

use std::collections::BTreeSet;
use std::path::Path;

use ndarray::Array2;
use sha2::{Digest, Sha256};

use super::Facts;
use super::sums::{check_seal, compare_file, compare_sum, compare_sums};
use crate::artifact::Artifact;
use crate::base::{self, Base};
use crate::error::{IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{ArtifactLayout, BASE_CONFIG, ModuleRecord};
use crate::linalg::{Certificate, PROBE_SEED, certify, orthogonality};
use crate::sum::{hex, sha256_hex};
use crate::weights::{Elements, Layout};
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
    let shards = inventory.files.iter().map(|file| file.name.as_str());
    for file in shards.chain(["config.json", BASE_CONFIG]) {
        if !sums.files.contains_key(file) {
            facts.problem(file, None, "a sum in the index", "none");
        }
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
            return vectors(&artifact, facts);
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

/// Something of the base that comes back.
enum Item {
    /// A tensor of a file of the base, by their numbers.
    InFile(usize, usize),
    /// A weight that the base does not store, or keeps itself.
    Alone(String),
}

/// What was seen of one module.
struct Seen {
    sum: String,
    certificate: Certificate,
    sigma: Vec<f32>,
}

/// σ descends, the triplets belong to M, and M comes back byte for byte; of a residual, so do all files of the base.
fn modules(artifact: &Artifact, observer: &dyn Observer, facts: &mut Facts) -> Result<()> {
    let headers = match artifact.svd.layout {
        ArtifactLayout::Residual => artifact.base_headers()?,
        // of a sidecar they were compared by their sums
        ArtifactLayout::Sidecar => Vec::new(),
    };
    let mut items = Vec::new();
    let mut alone: BTreeSet<&str> = artifact.svd.modules.keys().map(String::as_str).collect();
    for (file, (name, header)) in headers.iter().enumerate() {
        if header.entries.is_empty() {
            let expected = &artifact.svd.base.sha256[name];
            compare_sum(name, None, expected, &sha256_hex(&header.prefix), facts);
        }
        for (number, entry) in header.entries.iter().enumerate() {
            if let Some((module, _)) = artifact.module_of(&entry.name) {
                alone.remove(module);
            }
            items.push(Item::InFile(file, number));
        }
    }
    items.extend(alone.into_iter().map(|module| Item::Alone(module.into())));
    let tensor = |item: &Item| match item {
        Item::InFile(file, number) => headers[*file].1.entries[*number].name.clone(),
        Item::Alone(module) => format!("{module}.weight"),
    };
    let elements = |record: &ModuleRecord| (record.shape[0] * record.shape[1]) as u64;
    let total: u64 = artifact.svd.modules.values().map(elements).sum();
    let threads = workers::cores();
    let mut hash: Option<Sha256> = None;
    observer.start(Stage::Verify, 4 * total, Unit::Bytes);
    workers::in_order(
        &items,
        threads,
        |item| {
            let tensor = tensor(item);
            match artifact.module_of(&tensor) {
                Some((module, record)) => {
                    let (seen, matrix) = looked_at(artifact, module, record)?;
                    Ok((Some((module.to_string(), record, seen)), matrix))
                }
                None => Ok((None, artifact.stored(&tensor)?)),
            }
        },
        |item, (module, matrix)| {
            if let Some((module, record, seen)) = module {
                observer.advance(Stage::Verify, 4 * elements(record), &module);
                judge(artifact, &module, record, &seen, facts);
            }
            let Item::InFile(file, number) = item else {
                return Ok(());
            };
            let (name, header) = &headers[*file];
            let hash = match number {
                0 => hash.insert(Sha256::new_with_prefix(&header.prefix)),
                _ => hash.as_mut().expect("a file begins with its first tensor"),
            };
            hash.update(&matrix.bytes);
            if number + 1 == header.entries.len() {
                let found = hex(&hash.finalize_reset());
                let expected = &artifact.svd.base.sha256[name];
                compare_sum(name, None, expected, &found, facts);
            }
            Ok(())
        },
    )?;
    observer.finish(Stage::Verify);
    if !headers.is_empty() {
        let check = "the files of the base come back, by their pinned sha256";
        facts.checks.push(check.into());
    }
    facts.checks.push(format!(
        "M = M′ + uᵀ·diag(σ)·v restores all {} weights byte for byte",
        artifact.svd.modules.len()
    ));
    facts
        .checks
        .push("σ descends, u and v are orthonormal triplets of M (random probes)".into());
    Ok(())
}

/// M of a module, and what there is to say of its triplets.
fn looked_at(artifact: &Artifact, module: &str, record: &ModuleRecord) -> Result<(Seen, Elements)> {
    let factors = artifact.factors(module)?;
    let matrix = artifact.restore(module, record, &factors)?;
    let [m, n] = record.shape;
    let values = Array2::from_shape_vec((m, n), matrix.to_f32())
        .expect("restored in the shape of its record");
    let sigma = &factors.sigma;
    let seen = Seen {
        sum: sha256_hex(&matrix.bytes),
        certificate: certify(values.view(), &factors.u, sigma, &factors.v, PROBE_SEED)?,
        sigma: sigma.to_vec(),
    };
    Ok((seen, matrix))
}

/// What there is to say of vectors where M is not here.
fn vectors(artifact: &Artifact, facts: &mut Facts) -> Result<()> {
    for (module, record) in &artifact.svd.modules {
        let factors = artifact.factors(module)?;
        judge_sigma(artifact, module, record, &factors.sigma.to_vec(), facts);
        let found = orthogonality(&factors.u, &factors.v, PROBE_SEED);
        if !artifact.svd.are_orthonormal(found) {
            let file = file_of(artifact, module);
            let found = format!("orthogonality {found:.1e}");
            facts.problem(&file, Some(module), "orthonormal vectors", found);
        }
    }
    let check = "σ descends, u and v are orthonormal (random probes)";
    facts.checks.push(check.into());
    Ok(())
}

fn file_of(artifact: &Artifact, module: &str) -> String {
    let file = artifact.checkpoint.path_of(&format!("{module}.u"));
    let name = file.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// σ descends, from one end that the record states to the other.
fn judge_sigma(
    artifact: &Artifact,
    module: &str,
    record: &ModuleRecord,
    found: &[f32],
    facts: &mut Facts,
) {
    let (file, sigma) = (file_of(artifact, module), format!("{module}.sigma"));
    if !found.is_sorted_by(|one, next| one >= next) {
        facts.problem(&file, Some(&sigma), "descending singular values", "others");
    }
    // a rank is above 0
    let (max, min) = (found[0], found[found.len() - 1]);
    let [first, last] = [record.sigma_max, record.sigma_min];
    if [first, last] != [max, min] {
        let expected = format!("from {first:e} to {last:e}, as config.json says");
        let found = format!("from {max:e} to {min:e}");
        facts.problem(&file, Some(&sigma), expected, found);
    }
}

fn judge(artifact: &Artifact, module: &str, record: &ModuleRecord, seen: &Seen, facts: &mut Facts) {
    let file = file_of(artifact, module);
    if seen.sum != record.sha256 {
        facts.problem(
            &file,
            Some(module),
            format!("M with sha256 {}", record.sha256),
            format!("M with sha256 {}", seen.sum),
        );
    }
    judge_sigma(artifact, module, record, &seen.sigma, facts);
    let tolerance = artifact.svd.algorithm.tolerance;
    let certificate = &seen.certificate;
    if !artifact.svd.accepts(certificate) {
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
}
