//! `decompose`: a model in, a decomposition out, one matrix at a time.
//!
//! Each finished matrix becomes a small file of its own in the output's state folder; when all are there they are joined
//! into shards. Killed anywhere, the rerun keeps every finished matrix and every finished shard.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ndarray::Array2;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::{Base, REMEMBERED, card_facts, copy_side_files};
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{
    ArtifactLayout, BASE_CONFIG, BASE_INDEX, ModuleRecord, ModuleTensors, Pin, Rank, SCHEMA, Sums,
    SvdSection, base_header_tensor, stored_positions, untie,
};
use crate::json::Tool;
use crate::linalg::{self, Algorithm, Wanted, svd::energy};
use crate::model::ModelConfig;
use crate::plan::{Action, Plan, PlanOptions, PlannedTensor, Trainable};
use crate::spectrum::{self, Spectrum};
use crate::split::Factors;
use crate::weights::shard::{sha256_hex, write_atomically};
use crate::weights::{Checkpoint, Dtype, Elements, Header, Layout, ShardWriter, dtype_name};
use crate::workspace::{Claim, Workspace, bytes_in, check_free_space};
use crate::{json, ranks, report, workers};

/// How to decompose.
#[derive(Debug, Clone)]
pub struct Options {
    pub plan: PlanOptions,
    pub algorithm: Algorithm,
    pub shard_bytes_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            plan: PlanOptions::default(),
            algorithm: Algorithm::default(),
            shard_bytes_max: 5_000_000_000,
        }
    }
}

/// The facts of a decomposition, as `report.json` keeps them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub base: Pin,
    pub model_type: String,
    pub rank: Rank,
    pub layout: ArtifactLayout,
    pub algorithm: Algorithm,
    pub linear_layers: usize,
    pub parameters: u64,
    pub trainable: Trainable,
    /// The head was tied to the embedding and is now a weight of its own.
    #[serde(default)]
    pub untied_head: bool,
    /// Σσ² of all kept triplets over Σ‖M‖²
    pub captured_energy: f64,
    /// Elements of M stored exactly beside M′, and their share.
    pub exceptions: u64,
    pub exceptions_share: f64,
    /// Matrices for which single precision was not enough.
    pub double_precision: usize,
    pub bytes: u64,
    pub base_bytes: u64,
    pub threads: usize,
    pub seconds: f64,
    /// What the base's card says of itself (licence, language …).
    pub base_card: Value,
}

/// Decomposes `base` into the directory `out`.
///
/// # Errors
/// Whatever [`Plan::new`] refuses; NaN or Inf in a weight; a full disk; an output directory that is not this job's.
pub fn run(base: &Base, out: &Path, options: &Options, observer: &dyn Observer) -> Result<Facts> {
    let started = Instant::now();
    linalg::single_threaded_blas();
    let config = ModelConfig::read(&base.dir)?;
    let plan = Plan::new(
        &base.dir,
        &config,
        &base.checkpoint.inventory,
        &options.plan,
    )?;
    let sha256 = base.hash(observer)?;
    let settings = settings(base, &sha256, options);
    let (mut workspace, claim) = Workspace::claim(out, "decompose", settings)?;
    match claim {
        Claim::Finished => {
            observer.note(format!("{} is complete already", out.display()));
            return report::section(out, "decompose");
        }
        Claim::Interrupted => observer.note(format!("going on in {}", out.display())),
        Claim::Fresh => {}
    }
    refuse_another_head(&plan, &base.checkpoint)?;
    let room = |bytes: u64| check_free_space(out, bytes.saturating_sub(bytes_in(out)));
    room(plan.disk_bytes_min())?;
    let spectra = workspace.state("spectra");
    let plan = ranks::resolve(plan, &base.checkpoint, &spectra, observer)?;
    match room(plan.disk_bytes_peak(options.shard_bytes_max)) {
        Err(error) if !plan.ranks_known() => observer.warn(format!("at most, {error}")),
        result => result?,
    }
    let job = Job {
        base,
        out,
        options,
        workspace: &workspace,
        observer,
    };
    let parts = job.compute_parts(&plan)?;
    let (files, bytes) = job.join_parts(&plan, &parts)?;
    let records: BTreeMap<String, ModuleRecord> = parts
        .into_iter()
        .map(|(module, part)| (module, part.record))
        .collect();

    let spectrum = Spectrum::of(&records, |module| job.sigma(module, &files))?;
    let exceptions = records.values().map(|r| r.exceptions).sum();
    let elements: usize = records.values().map(|r| r.shape[0] * r.shape[1]).sum();
    let facts = Facts {
        base: Pin {
            repo: base.repo.clone(),
            revision: base.revision.clone(),
            sha256,
        },
        model_type: plan.model_type.clone(),
        rank: plan.rank,
        layout: plan.layout,
        algorithm: options.algorithm.clone(),
        linear_layers: plan.linear_layers,
        parameters: plan.parameters,
        trainable: Trainable {
            sigma: records.values().map(|r| r.q as u64).sum(),
            norms: plan.trainable.norms,
            embeddings: plan.trainable.embeddings,
        },
        untied_head: options.plan.untie_head,
        captured_energy: spectrum.captured_energy,
        exceptions,
        exceptions_share: exceptions as f64 / elements as f64,
        double_precision: records.values().filter(|r| !r.route.is_single()).count(),
        bytes,
        base_bytes: base.checkpoint.inventory.total_bytes(),
        threads: plan.threads,
        seconds: started.elapsed().as_secs_f64(),
        base_card: card_facts(&base.dir),
    };
    job.write_config(&facts, records)?;
    copy_side_files(&base.dir, out)?;
    // what was trained and measured before belongs to the base, not to what will be trained from here
    report::add(out, serde_json::Map::new(), "decompose", &facts)?;
    report::add(out, serde_json::Map::new(), spectrum::SECTION, &spectrum)?;
    job.write_index(files)?;
    if base.repo.is_none() {
        // a sidecar is merged beside its base: remember where that was
        let dir = std::fs::canonicalize(&base.dir).context("find", &base.dir)?;
        write_atomically(
            &workspace.state(REMEMBERED),
            dir.as_os_str().as_encoded_bytes(),
        )?;
    }
    workspace.finish()?;
    let _ = std::fs::remove_dir(workspace.state("parts"));
    let _ = std::fs::remove_dir_all(spectra);
    let _ = std::fs::remove_file(workspace.state("assembly.json"));
    Ok(facts)
}

/// What makes two runs the same job.
fn settings(
    base: &Base,
    sha256: &BTreeMap<String, String>,
    options: &Options,
) -> BTreeMap<String, String> {
    let files: String = sha256
        .iter()
        .map(|(file, sum)| format!("{sum} {file}\n"))
        .collect();
    let list = |patterns: &[crate::plan::Pattern]| {
        let names: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        names.join(",")
    };
    let mut settings = BTreeMap::from([
        (
            "base model".into(),
            match (&base.repo, &base.revision) {
                (Some(repo), Some(revision)) => format!("{repo}@{revision}"),
                _ => base.dir.display().to_string(),
            },
        ),
        (
            "content of the base model".into(),
            sha256_hex(files.as_bytes()),
        ),
        ("rank".into(), options.plan.rank.to_string()),
        (
            "layout".into(),
            format!("{:?}", options.plan.layout).to_lowercase(),
        ),
        ("include".into(), list(&options.plan.include)),
        ("exclude".into(), list(&options.plan.exclude)),
        ("tolerance".into(), options.algorithm.tolerance.to_string()),
        ("fast".into(), options.algorithm.fast.to_string()),
        ("shard size".into(), options.shard_bytes_max.to_string()),
    ]);
    if options.plan.untie_head {
        settings.insert("head".into(), "untied".into());
    }
    settings
}

/// Refuses to untie a head whose stored copy is not the embedding: nobody could say which of the two is the head.
fn refuse_another_head(plan: &Plan, checkpoint: &Checkpoint) -> Result<()> {
    let untied = plan.decomposed().find(|t| t.tied_to.is_some());
    let Some(head) = untied.filter(|t| checkpoint.inventory.contains(&t.name)) else {
        return Ok(());
    };
    let sum = |tensor: &str| Ok::<_, Error>(sha256_hex(&checkpoint.read(tensor)?.bytes));
    if sum(&head.name)? == sum(&head.stored_as())? {
        return Ok(());
    }
    Err(Error::HeadNotTied {
        path: checkpoint.dir.clone(),
        reason: format!(
            "the stored `{}` differs from `{}`, and the config says that they are one",
            head.name,
            head.stored_as()
        ),
    })
}

struct Job<'a> {
    base: &'a Base,
    out: &'a Path,
    options: &'a Options,
    workspace: &'a Workspace,
    observer: &'a dyn Observer,
}

/// One decomposed matrix: what is known of it, and what its file holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Part {
    record: ModuleRecord,
    tensors: Vec<PartTensor>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct PartTensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// Where a tensor of the artifact comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Source {
    Part(String),
    Base,
    BaseHeader(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Placed {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    source: Source,
}

impl Placed {
    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// What is known when all matrices are done: enough to go on although their files are being consumed.
#[derive(Serialize, Deserialize)]
struct Assembly {
    parts: BTreeMap<String, Part>,
    shards: Vec<Vec<Placed>>,
}

impl Job<'_> {
    fn part_path(&self, module: &str) -> PathBuf {
        self.workspace.state("parts").join(part_file(module))
    }

    fn assembly_path(&self) -> PathBuf {
        self.workspace.state("assembly.json")
    }

    /// Decomposes every planned matrix that has no file yet, the most expensive first.
    fn compute_parts(&self, plan: &Plan) -> Result<BTreeMap<String, Part>> {
        if self.assembly_path().exists() {
            return Ok(self.read_assembly()?.parts);
        }
        let folder = self.workspace.state("parts");
        std::fs::create_dir_all(&folder).context("create", &folder)?;
        let mut parts = BTreeMap::new();
        let mut missing = Vec::new();
        for tensor in plan.decomposed() {
            match self.read_part(tensor) {
                Some(part) => {
                    parts.insert(tensor.module().to_string(), part);
                }
                None => missing.push(tensor),
            }
        }
        if !parts.is_empty() {
            self.observer.note(format!(
                "{} of {} matrices are done already",
                parts.len(),
                plan.linear_layers
            ));
        }
        missing.sort_by_key(|tensor| std::cmp::Reverse(tensor.flops()));
        let total = missing.iter().map(|tensor| tensor.flops()).sum();
        self.observer.start(Stage::Decompose, total, Unit::Flops);
        let done = std::sync::Mutex::new(&mut parts);
        workers::for_each(&missing, self.options.plan.threads, |tensor| {
            let part = self.compute_part(tensor)?;
            done.lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .insert(tensor.module().to_string(), part);
            self.observer
                .advance(Stage::Decompose, tensor.flops(), tensor.module());
            Ok(())
        })?;
        self.observer.finish(Stage::Decompose);
        Ok(parts)
    }

    /// A part that an earlier run left, if it is whole.
    fn read_part(&self, tensor: &PlannedTensor) -> Option<Part> {
        let header = Header::read(&self.part_path(tensor.module())).ok()?;
        serde_json::from_str(&header.metadata("part")?).ok()
    }

    fn compute_part(&self, tensor: &PlannedTensor) -> Result<Part> {
        let (module, checkpoint) = (tensor.module(), &self.base.checkpoint);
        let stored = checkpoint.read_finite(&tensor.stored_as())?;
        let wanted = match self.options.plan.rank {
            Rank::Energy(share) => Wanted::Energy(share),
            _ => Wanted::Triplets(tensor.q.expect("every other rank was resolved before")),
        };
        let [m, n] = [stored.shape[0], stored.shape[1]];
        let (factors, mut record) = {
            let matrix = Array2::from_shape_vec((m, n), stored.to_f32())
                .expect("a tensor has as many values as its shape says");
            let svd = linalg::decompose(module, matrix.view(), wanted, &self.options.algorithm)?;
            let q = svd.sigma.len();
            if let Some(refused) = &svd.refused {
                self.observer.note(format!(
                    "{module}: {refused}; {} instead",
                    svd.route.describe()
                ));
            }
            let (captured_energy, residual_norm) = energy(matrix.view(), &svd.sigma);
            let record = ModuleRecord {
                q,
                shape: [m, n],
                dtype: dtype_name(stored.dtype),
                bias: checkpoint.inventory.contains(&format!("{module}.bias")),
                tied_to: tensor.tied_to.clone(),
                captured_energy,
                residual_norm,
                sigma_max: svd.sigma[0],
                sigma_min: svd.sigma[q - 1],
                route: svd.route,
                certificate: svd.certificate,
                exceptions: 0,
                sha256: sha256_hex(&stored.bytes),
            };
            let factors = Factors {
                u: svd.u,
                sigma: svd.sigma,
                v: svd.v,
            };
            (factors, record)
        };
        let names = ModuleTensors::of(module);
        let mut tensors: Vec<(String, Elements)> = Vec::new();
        if self.options.plan.layout == ArtifactLayout::Residual {
            let residual = factors.residual(&stored);
            tensors.push((
                names.residual,
                Elements::from_f32(&[m, n], &residual.values),
            ));
            record.exceptions = residual.exact_at.len() as u64;
            if record.exceptions > 0 {
                let at = stored_positions(&residual.exact_at, m * n);
                let exact = Elements {
                    dtype: stored.dtype,
                    shape: at.shape.clone(),
                    bytes: residual.exact,
                };
                tensors.push((names.exact_at, at));
                tensors.push((names.exact, exact));
            }
        }
        let dense = |a: &Array2<f32>| {
            let values = a.as_slice().expect("factors are dense and row-major");
            Elements::from_f32(&[a.nrows(), a.ncols()], values)
        };
        tensors.push((names.u, dense(&factors.u)));
        tensors.push((
            names.sigma,
            Elements::from_f32(&[record.q], &factors.sigma.to_vec()),
        ));
        tensors.push((names.v, dense(&factors.v)));
        self.write_part(module, record, &tensors)
    }

    fn write_part(
        &self,
        module: &str,
        record: ModuleRecord,
        tensors: &[(String, Elements)],
    ) -> Result<Part> {
        let part = Part {
            record,
            tensors: tensors
                .iter()
                .map(|(name, e)| PartTensor {
                    name: name.clone(),
                    dtype: e.dtype,
                    shape: e.shape.clone(),
                })
                .collect(),
        };
        let about = serde_json::to_string(&part).expect("a part's record serialises");
        let header = Header::compose_with(
            &[("part", &about)],
            tensors
                .iter()
                .map(|(name, e)| (name.as_str(), e.dtype, e.shape.as_slice())),
        )?;
        let mut writer = ShardWriter::create(&self.part_path(module), header)?;
        for (name, elements) in tensors {
            writer.put(name, &elements.bytes)?;
        }
        writer.finish()?;
        Ok(part)
    }

    fn read_assembly(&self) -> Result<Assembly> {
        let path = self.assembly_path();
        let json = json::read(&path)?;
        serde_json::from_value(json).map_err(|source| Error::Json { path, source })
    }

    /// Joins the parts, and what is copied, into shards. Returns the hashes for the index and the bytes written.
    fn join_parts(&self, plan: &Plan, parts: &BTreeMap<String, Part>) -> Result<(Index, u64)> {
        let assembly = if self.assembly_path().exists() {
            self.read_assembly()?
        } else {
            let assembly = Assembly {
                parts: parts.clone(),
                shards: into_shards(self.placed(plan, parts), self.options.shard_bytes_max),
            };
            let json = serde_json::to_vec(&assembly).expect("an assembly serialises");
            write_atomically(&self.assembly_path(), &json)?;
            assembly
        };
        let total: u64 = assembly.shards.iter().flatten().map(Placed::bytes).sum();
        self.observer.start(Stage::Write, total, Unit::Bytes);
        let mut index = Index::default();
        let count = assembly.shards.len();
        for (number, shard) in assembly.shards.iter().enumerate() {
            let name = Layout::Decomposition.shard_file(number + 1, count);
            self.write_shard(&name, shard, &mut index)?;
            // the shard is durable: its parts have done their duty
            for module in assembly.parts.keys() {
                let later = assembly.shards[number + 1..].iter().flatten();
                let mut needed =
                    later.filter(|t| matches!(&t.source, Source::Part(m) if m == module));
                let path = self.part_path(module);
                if needed.next().is_none() && path.exists() {
                    std::fs::remove_file(&path).context("remove", &path)?;
                }
            }
        }
        self.observer.finish(Stage::Write);
        Ok((index, total))
    }

    /// Every tensor of the artifact, in the order of the base's files.
    fn placed(&self, plan: &Plan, parts: &BTreeMap<String, Part>) -> Vec<Placed> {
        let mut placed = Vec::new();
        let sidecar = self.options.plan.layout == ArtifactLayout::Sidecar;
        for tensor in &plan.tensors {
            if let Some(part) = parts
                .get(tensor.module())
                .filter(|_| tensor.action == Action::Decompose)
            {
                placed.extend(part.tensors.iter().map(|t| Placed {
                    name: t.name.clone(),
                    dtype: t.dtype,
                    shape: t.shape.clone(),
                    source: Source::Part(tensor.module().into()),
                }));
            } else if !sidecar {
                let (_, entry) = self
                    .base
                    .checkpoint
                    .inventory
                    .get(&tensor.name)
                    .expect("a plan names tensors of its own inventory");
                placed.push(Placed {
                    name: entry.name.clone(),
                    dtype: entry.dtype,
                    shape: entry.shape.clone(),
                    source: Source::Base,
                });
            }
        }
        if !sidecar {
            for file in &self.base.checkpoint.inventory.files {
                placed.push(Placed {
                    name: base_header_tensor(&file.name),
                    dtype: Dtype::U8,
                    shape: vec![file.header.prefix.len()],
                    source: Source::BaseHeader(file.name.clone()),
                });
            }
        }
        placed
    }

    fn write_shard(&self, name: &str, shard: &[Placed], index: &mut Index) -> Result<()> {
        let path = self.out.join(name);
        let header = Header::compose(
            shard
                .iter()
                .map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())),
        )?;
        if path.exists() {
            // finished before a kill; its parts may be gone, so it is read back for its hashes
            if Header::read(&path)?.prefix != header.prefix {
                return Err(Error::OutputOccupied {
                    path: self.out.into(),
                    found: format!("another `{name}`"),
                });
            }
            let written = Checkpoint::single(self.out, name)?;
            for tensor in shard {
                let bytes = written.read(&tensor.name)?.bytes;
                index.add(tensor, name, &bytes);
                self.observer
                    .advance(Stage::Write, tensor.bytes(), &tensor.name);
            }
            let sum = crate::weights::shard::sha256_file(&path, |_| {})?;
            index.sums.files.insert(name.into(), sum);
            return Ok(());
        }
        let mut writer = ShardWriter::create(&path, header)?;
        let mut part: Option<(String, Checkpoint)> = None;
        for tensor in shard {
            let bytes = match &tensor.source {
                Source::Base => self.base.checkpoint.read_finite(&tensor.name)?.bytes,
                Source::BaseHeader(file) => self.base_header(file),
                Source::Part(module) => {
                    if part.as_ref().is_none_or(|(open, _)| open != module) {
                        part = Some((module.clone(), self.open_part(module)?));
                    }
                    let (_, open) = part.as_ref().expect("it was opened above");
                    open.read(&tensor.name)?.bytes
                }
            };
            writer.put(&tensor.name, &bytes)?;
            index.add(tensor, name, &bytes);
            self.observer
                .advance(Stage::Write, tensor.bytes(), &tensor.name);
        }
        let sum = writer.finish()?;
        index.sums.files.insert(name.into(), sum);
        Ok(())
    }

    fn open_part(&self, module: &str) -> Result<Checkpoint> {
        Checkpoint::single(&self.workspace.state("parts"), &part_file(module))
    }

    /// The singular values of a module, read back from its finished shard.
    fn sigma(&self, module: &str, index: &Index) -> Result<Vec<f32>> {
        let tensor = ModuleTensors::of(module).sigma;
        let file = index.weight_map.get(&tensor);
        let file = file.expect("every decomposed module was placed in a shard");
        Ok(Checkpoint::single(self.out, file)?.read(&tensor)?.to_f32())
    }

    fn base_header(&self, file: &str) -> Vec<u8> {
        let files = &self.base.checkpoint.inventory.files;
        let file = files.iter().find(|f| f.name == file);
        file.expect("headers are placed for files of the base")
            .header
            .prefix
            .clone()
    }

    fn write_config(&self, facts: &Facts, modules: BTreeMap<String, ModuleRecord>) -> Result<()> {
        let path = self.base.dir.join("config.json");
        let verbatim = std::fs::read(&path).context("read", &path)?;
        let mut config: Value = json::read(&path)?;
        if facts.untied_head {
            untie(&mut config);
        }
        let section = SvdSection {
            schema: SCHEMA,
            layout: facts.layout,
            base: facts.base.clone(),
            rank: facts.rank,
            algorithm: facts.algorithm.clone(),
            modules,
            tool: Tool::this(),
        };
        config["svd"] = serde_json::to_value(section).expect("a section serialises");
        write_atomically(&self.out.join(BASE_CONFIG), &verbatim)?;
        if self.base.checkpoint.indexed {
            let index = self.base.dir.join(Layout::Model.index_file());
            let verbatim = std::fs::read(&index).context("read", &index)?;
            write_atomically(&self.out.join(BASE_INDEX), &verbatim)?;
        }
        let json = serde_json::to_vec_pretty(&config).expect("a JSON value serialises");
        write_atomically(&self.out.join("config.json"), &json).map(drop)
    }

    /// Written last: with it, and only with it, the directory is a decomposition.
    fn write_index(&self, mut index: Index) -> Result<()> {
        let mut small = crate::base::side_files(self.out)?;
        small.push("config.json".into());
        small.push(BASE_CONFIG.into());
        if self.base.checkpoint.indexed {
            small.push(BASE_INDEX.into());
        }
        for name in small {
            let sum = crate::weights::shard::sha256_file(&self.out.join(&name), |_| {})?;
            index.sums.files.insert(name, sum);
        }
        let json = serde_json::json!({
            "metadata": {"total_size": index.total_size, "sha256": index.sums},
            "weight_map": index.weight_map,
        });
        let json = serde_json::to_vec_pretty(&json).expect("a JSON value serialises");
        write_atomically(&self.out.join(Layout::Decomposition.index_file()), &json).map(drop)
    }
}

/// The file of a part. Hashed, because a module's name is what a stranger's checkpoint says it is.
fn part_file(module: &str) -> String {
    format!("{}.safetensors", &sha256_hex(module.as_bytes())[..24])
}

/// The index as it grows.
#[derive(Default)]
struct Index {
    total_size: u64,
    weight_map: BTreeMap<String, String>,
    sums: Sums,
}

impl Index {
    fn add(&mut self, tensor: &Placed, file: &str, bytes: &[u8]) {
        self.total_size += bytes.len() as u64;
        self.weight_map.insert(tensor.name.clone(), file.into());
        self.sums
            .tensors
            .insert(tensor.name.clone(), sha256_hex(bytes));
    }
}

/// Fills shards in order; a tensor is never split.
fn into_shards(tensors: Vec<Placed>, bytes_max: u64) -> Vec<Vec<Placed>> {
    let mut shards: Vec<Vec<Placed>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        if filled > 0 && filled + tensor.bytes() > bytes_max {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += tensor.bytes();
        shards
            .last_mut()
            .expect("there is always a last shard")
            .push(tensor);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_filled_in_order_and_never_split_a_tensor() {
        let tensor = |name: &str, n: usize| Placed {
            name: name.into(),
            dtype: Dtype::U8,
            shape: vec![n],
            source: Source::Base,
        };
        let shards = into_shards(
            vec![
                tensor("a", 4),
                tensor("b", 4),
                tensor("c", 20),
                tensor("d", 1),
            ],
            10,
        );
        let names: Vec<Vec<&str>> = shards
            .iter()
            .map(|s| s.iter().map(|t| t.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["a", "b"], vec!["c"], vec!["d"]]);
    }
}
