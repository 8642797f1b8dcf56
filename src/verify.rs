//! `verify`: reads a directory again, byte by byte, and says what is not as it should be.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::adapter::{self, Adapter};
use crate::artifact::{self, Artifact};
use crate::base::{self, Base};
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{ArtifactLayout, ModuleRecord};
use crate::linalg::{self, certify};
use crate::model::ModelConfig;
use crate::plan::check_shapes;
use crate::weights::shard::{sha256_file, sha256_hex};
use crate::weights::{Checkpoint, Layout, dtype_name};
use crate::{json, report, workers};

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Facts {
    pub ok: bool,
    /// `decomposition`, `adapter` or `model`
    pub kind: &'static str,
    pub files: usize,
    pub tensors: usize,
    pub bytes: u64,
    /// What was compared, in words.
    pub checks: Vec<String>,
    pub problems: Vec<Problem>,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, Serialize)]
pub struct Problem {
    pub file: String,
    pub tensor: Option<String>,
    pub expected: String,
    pub found: String,
}

impl Facts {
    fn problem(
        &mut self,
        file: &str,
        tensor: Option<&str>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) {
        self.problems.push(Problem {
            file: file.into(),
            tensor: tensor.map(str::to_string),
            expected: expected.into(),
            found: found.into(),
        });
    }
}

/// Verifies whatever `dir` holds; a model is also held against `against`.
///
/// Damage is an answer, not an error: it comes back in [`Facts::problems`].
pub fn run(dir: &Path, against: Option<&Base>, observer: &dyn Observer) -> Result<Facts> {
    linalg::single_threaded_blas();
    let mut facts = Facts::default();
    let looked = if artifact::is_artifact(dir) {
        facts.kind = "decomposition";
        decomposition(dir, against, observer, &mut facts)
    } else if adapter::is_adapter(dir) {
        facts.kind = "adapter";
        if against.is_some() {
            facts
                .checks
                .push("not compared with the base: an adapter pins a decomposition".into());
        }
        adapter(dir, &mut facts)
    } else {
        facts.kind = "model";
        model(dir, against, observer, &mut facts)
    };
    match looked {
        Ok(()) => {}
        // a file that cannot be understood is what verify is there to find
        Err(error) if tells_of_damage(&error) => {
            let (file, tensor, expected, found) = as_problem(dir, &error);
            facts.problem(&file, tensor.as_deref(), expected, found);
        }
        Err(error) => return Err(error),
    }
    facts.ok = facts.problems.is_empty();
    Ok(facts)
}

fn tells_of_damage(error: &Error) -> bool {
    !matches!(
        error,
        Error::Io { .. } | Error::BaseNeeded { .. } | Error::DiskFull { .. }
    ) && !matches!(error, Error::NotAModel { missing, .. } if missing.starts_with("the directory"))
}

fn as_problem(dir: &Path, error: &Error) -> (String, Option<String>, String, String) {
    let name = |path: &Path| path.strip_prefix(dir).unwrap_or(path).display().to_string();
    match error {
        Error::Header { path, reason } => (
            name(path),
            None,
            "a safetensors file".into(),
            reason.clone(),
        ),
        Error::Truncated {
            path,
            expected,
            found,
        } => (
            name(path),
            None,
            format!("{expected} bytes"),
            format!("{found} bytes"),
        ),
        Error::ShardMissing { index, file } => (
            file.clone(),
            None,
            format!("the file, as {} says", name(index)),
            "nothing".into(),
        ),
        Error::IndexedTensorMissing {
            index,
            tensor,
            file,
        } => (
            file.clone(),
            Some(tensor.clone()),
            format!("the tensor, as {} says", name(index)),
            "nothing".into(),
        ),
        Error::TensorNotIndexed { tensor, path } => (
            name(path),
            Some(tensor.clone()),
            "an index entry".into(),
            "none".into(),
        ),
        Error::TensorMissing { tensor, path } => (
            name(path),
            Some(tensor.clone()),
            "the tensor".into(),
            "nothing".into(),
        ),
        Error::Shape {
            tensor,
            path,
            expected,
            found,
        } => (
            name(path),
            Some(tensor.clone()),
            format!("{expected:?}"),
            format!("{found:?}"),
        ),
        Error::Dtype {
            tensor,
            path,
            expected,
            found,
        } => (
            name(path),
            Some(tensor.clone()),
            expected.clone(),
            found.clone(),
        ),
        Error::NotFinite {
            tensor,
            path,
            value,
            index,
        } => (
            name(path),
            Some(tensor.clone()),
            "finite numbers".into(),
            format!("{value} at {index:?}"),
        ),
        Error::Json { path, source } => (name(path), None, "valid JSON".into(), source.to_string()),
        Error::Checksum {
            what,
            path,
            expected,
            found,
        } => (
            name(path),
            what.split('`').nth(1).map(str::to_string),
            format!("sha256 {expected}"),
            format!("sha256 {found}"),
        ),
        Error::NotAModel { missing, .. } => {
            (missing.clone(), None, "the file".into(), "nothing".into())
        }
        Error::SvdSection { path, reason } => (
            name(path),
            None,
            "a valid `svd` section".into(),
            reason.clone(),
        ),
        other => (
            String::new(),
            None,
            "a sound directory".into(),
            other.to_string(),
        ),
    }
}

fn decomposition(
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
    facts.files = inventory.files.len();
    facts.tensors = inventory.entries().count();
    facts.bytes = inventory.files.iter().map(|f| f.header.file_bytes()).sum();
    observer.start(Stage::Verify, facts.bytes, Unit::Bytes);

    for (file, expected) in &sums.files {
        let path = dir.join(file);
        if !path.exists() {
            facts.problem(file, None, "the file", "nothing");
            continue;
        }
        let found = sha256_file(&path, |_| {})?;
        compare_sum(file, None, expected, &found, facts);
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

/// A file that carries a sum of itself; before some version ours did not.
fn check_seal(dir: &Path, file: &str, sealed: bool, facts: &mut Facts) -> Result<()> {
    let path = dir.join(file);
    if !path.exists() {
        return Ok(());
    }
    match json::seal_of(&path)? {
        Some((stated, found)) => compare_sum(file, None, &stated, &found, facts),
        None if sealed => facts.problem(file, None, "a sum of itself", "none"),
        None => {}
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

fn adapter(dir: &Path, facts: &mut Facts) -> Result<()> {
    let adapter = Adapter::read(dir)?;
    facts.files = 1;
    facts.tensors = adapter.len();
    let path = dir.join(adapter::WEIGHTS_FILE);
    facts.bytes = std::fs::metadata(&path).map(|m| m.len()).unwrap_or(0);
    facts
        .checks
        .push("header, config and finite numbers".into());
    let sealed = adapter.config.schema >= 2;
    check_seal(dir, report::FILE, sealed, facts)?;
    check_seal(dir, adapter::CONFIG_FILE, sealed, facts)?;
    // schema 1 left it to the report
    let mut reported = report::read(dir)?.remove("train").unwrap_or_default();
    let reported = reported["adapter_sha256"].take();
    let stated = adapter.config.weights_sha256.clone();
    if let Some(expected) = stated.or(reported.as_str().map(String::from)) {
        let found = adapter.sha256()?;
        facts.checks.push("sha256 of the weights".into());
        if found != expected {
            let damaged = adapter.damaged_tensors()?;
            for tensor in &damaged {
                compare_sum(
                    adapter::WEIGHTS_FILE,
                    Some(tensor),
                    &expected,
                    &found,
                    facts,
                );
            }
            if damaged.is_empty() {
                compare_sum(adapter::WEIGHTS_FILE, None, &expected, &found, facts);
            }
        }
    }
    Ok(())
}

fn model(
    dir: &Path,
    against: Option<&Base>,
    observer: &dyn Observer,
    facts: &mut Facts,
) -> Result<()> {
    let base = Base::open(dir, None, None)?;
    let inventory = &base.checkpoint.inventory;
    facts.files = inventory.files.len();
    facts.tensors = inventory.entries().count();
    facts.bytes = inventory.files.iter().map(|f| f.header.file_bytes()).sum();
    let config = ModelConfig::read(dir)?;
    check_shapes(dir, &config, inventory)?;
    facts.checks.push("headers, index and config agree".into());
    observer.start(Stage::Verify, facts.bytes, Unit::Bytes);
    let merged = report::read(dir)?.remove("merge").unwrap_or_default();
    let sums = |key: &str| -> Result<BTreeMap<String, String>> {
        match &merged[key] {
            serde_json::Value::Null => Ok(BTreeMap::new()),
            sums => json::interpret(&dir.join(report::FILE), sums.clone()),
        }
    };
    let (tensor_sums, side_sums) = (sums("tensor_sha256")?, sums("side_sha256")?);
    for (file, entry) in inventory.entries() {
        let elements = base.checkpoint.read(&entry.name)?;
        if let Some(expected) = tensor_sums.get(&entry.name) {
            let found = sha256_hex(&elements.bytes);
            compare_sum(&file.name, Some(&entry.name), expected, &found, facts);
        }
        observer.advance(Stage::Verify, entry.bytes, &entry.name);
        if let Some((index, value)) = elements.first_not_finite() {
            facts.problem(
                &file.name,
                Some(&entry.name),
                "finite numbers",
                format!("{value} at {index:?}"),
            );
        }
    }
    observer.finish(Stage::Verify);
    facts.checks.push("every number is finite".into());
    check_seal(dir, report::FILE, !tensor_sums.is_empty(), facts)?;
    let file_sums = sums("sha256")?;
    if !file_sums.is_empty() {
        compare_sums(&file_sums, &base.hash(observer)?, facts);
        let found = side_sums.keys().filter(|name| dir.join(name).exists());
        let found = found.map(|name| Ok((name.clone(), sha256_file(&dir.join(name), |_| {})?)));
        compare_sums(&side_sums, &found.collect::<Result<_>>()?, facts);
        facts
            .checks
            .push("sha256 of every file that was merged".into());
    }
    if let Some(original) = against {
        let untied = !config.tied && ModelConfig::read(&original.dir)?.tied;
        same_tensors(original, &base.checkpoint, &config, untied, facts);
        facts.checks.push(match untied {
            false => "names, shapes and dtypes are the base's".into(),
            true => "names, shapes and dtypes are the base's, and those of its head, untied".into(),
        });
    }
    Ok(())
}

fn compare_sums(
    expected: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
    facts: &mut Facts,
) {
    for (file, sum) in expected {
        match found.get(file) {
            Some(other) => compare_sum(file, None, sum, other, facts),
            None => facts.problem(file, None, "the file", "nothing"),
        }
    }
}

fn compare_sum(file: &str, tensor: Option<&str>, expected: &str, found: &str, facts: &mut Facts) {
    if found != expected {
        facts.problem(
            file,
            tensor,
            format!("sha256 {expected}"),
            format!("sha256 {found}"),
        );
    }
}

/// `untied`: the merged model has a head of its own, which is the embedding in the original.
fn same_tensors(
    original: &Base,
    merged: &Checkpoint,
    config: &ModelConfig,
    untied: bool,
    facts: &mut Facts,
) {
    let describe = |dtype, shape: &[usize]| format!("{} {shape:?}", dtype_name(dtype));
    let head = format!("{}.weight", config.names.head);
    let inventory = &original.checkpoint.inventory;
    let embedding = config.embedding(config.prefix(|name| inventory.contains(name)));
    let embedding = inventory.get(&embedding);
    for (file, entry) in original.checkpoint.inventory.entries() {
        let expected = describe(entry.dtype, &entry.shape);
        match merged.inventory.get(&entry.name) {
            None => facts.problem(&file.name, Some(&entry.name), expected, "nothing"),
            Some((place, other)) => {
                let found = describe(other.dtype, &other.shape);
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
        let found = describe(entry.dtype, &entry.shape);
        let expected = match embedding.filter(|_| untied && entry.name == head) {
            Some((_, tied)) => describe(tied.dtype, &tied.shape),
            None => "no such tensor".into(),
        };
        if found != expected {
            facts.problem(&file.name, Some(&entry.name), expected, found);
        }
    }
}
