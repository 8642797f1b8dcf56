//! `decompose`: a model in, a decomposition out, one matrix at a time; or, of several machines, one machine's share of it.
//!
//! Each finished matrix becomes a small file of its own; shards are joined from them while others are still computed.
//! Killed anywhere, the rerun keeps every finished matrix and every finished shard.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ndarray::ArrayView2;

use crate::base::{Base, Seen, remember};
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{ArtifactLayout, FactorsDtype, ModuleRecord, Pin, Rank};
use crate::job::{Job, MATRICES, Share, ShareRecord};
use crate::join::{self, Frame, Join, PARTS};
use crate::json::Tool;
use crate::linalg::{self, Backend, PROBE_SEED, Wanted, certify};
use crate::model::ModelConfig;
use crate::outlet::Outlet;
use crate::part::{self, Part};
use crate::plan::{Plan, PlannedTensor, place};
use crate::split::Factors;
use crate::sum::sha256_hex;
use crate::weights::shard::{flush, write_atomically};
use crate::weights::{Checkpoint, Elements, dtype_name};
use crate::workers::{self, Arrivals, Cost, Limits};
use crate::workspace::{Again, Claim, PART_FILE, Workspace, bytes_in, check_free_space};
use crate::{heap, ranks, report};

pub use crate::job::Options;
pub use crate::join::Facts;

/// Decomposes `base` into the directory `out`.
///
/// # Errors
/// Whatever [`Plan::new`] refuses; NaN or Inf in a weight; a full disk; an output directory that is not this job's.
pub fn run(base: &Base, out: &Path, options: &Options, observer: &dyn Observer) -> Result<Facts> {
    run_to(base, out, None, options, observer)
}

/// The same, but finished shards go through `outlet`: unless it keeps them, no more than a few are ever in `out`, and
/// [`crate::outlet::Away`] says in the end which are not.
///
/// # Errors
/// As [`run`], and whatever `outlet` reports.
pub fn run_to(
    base: &Base,
    out: &Path,
    outlet: Option<&dyn Outlet>,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    let started = Instant::now();
    let Prepared {
        plan,
        job,
        base,
        seen,
    } = prepare(base, options, observer)?;
    let mut settings = job.settings();
    settings.extend(outlet.map(|outlet| ("shards go to".into(), outlet.place())));
    let (mut workspace, claim) = Workspace::claim(out, "decompose", settings)?;
    if claim.is_finished(out, Again::GoesOn, observer) {
        clean_up(&workspace);
        return report::section(out, "decompose");
    }
    let base = &base.checked(Some(&workspace.state(BASE_SUMS)), observer)?;
    refuse_another_head(&plan, &base.checkpoint)?;
    let passing = outlet.filter(|outlet| !outlet.keeps());
    if passing.is_none() {
        check_room(out, &plan, plan.disk_bytes_min(), observer)?;
    }
    let spectra = workspace.state(SPECTRA);
    let plan = ranks::resolve(plan, &base.checkpoint, &spectra, observer)?;
    let mut limits = options.plan.limits();
    let shard_bytes_max = options.shard_bytes_max;
    let order = match passing {
        None => {
            check_room(out, &plan, plan.disk_bytes_peak(shard_bytes_max), observer)?;
            plan.in_shard_order(shard_bytes_max)
        }
        Some(outlet) => {
            let needed = plan.disk_bytes_passing(shard_bytes_max);
            let room = workspace.room(outlet.room(), needed)?;
            limits.disk = room - plan.disk_bytes_carried(shard_bytes_max);
            // what is waited for comes first: nothing else could take its place on the disk
            plan.decomposed().collect()
        }
    };
    let join = Join {
        frame: &Frame::of(base, &job, &plan),
        carried: &base.checkpoint,
        out,
        workspace: &workspace,
        observer,
        consumes: true,
        outlet,
    };
    let mut joined = join.resume()?;
    let folder = workspace.state(PARTS);
    let compute = Compute {
        base,
        folder: &folder,
        options,
        limits,
        observer,
    };
    let (missing, kept) = compute.find_missing(order, &joined.parts, |tensor| joined.holds(tensor));
    joined.parts.extend(kept);
    let joined = compute
        .run(
            &plan.decomposed().collect::<Vec<_>>(),
            &missing,
            |arrivals| join.write_shards(joined, Some(arrivals)),
        )?
        .expect("no worker failed, so every part has arrived");
    seen.refuse_change()?;
    let facts = join.complete(joined, plan.threads, started.elapsed().as_secs_f64())?;
    workspace.finish()?;
    clean_up(&workspace);
    Ok(facts)
}

/// Decomposes one share of `base` into the directory `out`, for `assemble` to join with the others.
///
/// # Errors
/// As [`run`].
pub fn run_share(
    base: &Base,
    out: &Path,
    share: Share,
    options: &Options,
    observer: &dyn Observer,
) -> Result<ShareRecord> {
    let started = Instant::now();
    let Prepared {
        plan,
        job,
        base,
        seen,
    } = prepare(base, options, observer)?;
    let mut settings = job.settings();
    settings.insert("part".into(), share.to_string());
    let (mut workspace, claim) = Workspace::claim(out, "decompose", settings)?;
    let folder = out.join(MATRICES);
    match claim {
        Claim::Finished => match ShareRecord::read(out) {
            Ok(record) if is_whole(&record, &folder) => {
                forget_what_was_read(&workspace);
                observer.note(format!("{} is complete already", out.display()));
                return Ok(record);
            }
            _ => observer.note(format!("{} has lost files: going on there", out.display())),
        },
        Claim::Interrupted => observer.note(format!("going on in {}", out.display())),
        Claim::Fresh => {}
    }
    let base = &base.checked(Some(&workspace.state(BASE_SUMS)), observer)?;
    refuse_another_head(&plan, &base.checkpoint)?;
    // divided before the ranks are known: what every machine foresees is the same, to the last bit
    let names: BTreeSet<String> = share.of(&plan).iter().map(|t| t.name.clone()).collect();
    let spectra = workspace.state(SPECTRA);
    let plan = ranks::resolve(plan, &base.checkpoint, &spectra, observer)?;
    let mut mine: Vec<&PlannedTensor> = plan.decomposed().collect();
    mine.retain(|tensor| names.contains(&tensor.name));
    mine.sort_by_key(|tensor| std::cmp::Reverse(tensor.flops()));
    check_room(out, &plan, plan.disk_bytes_of(&mine), observer)?;
    let compute = Compute {
        base,
        folder: &folder,
        options,
        limits: options.plan.limits(),
        observer,
    };
    let (missing, mut parts) = compute.find_missing(mine.clone(), &BTreeMap::new(), |_| false);
    let arrived: Vec<(String, Part)> = compute.run(&mine, &missing, |arrivals| {
        Ok(std::iter::from_fn(|| arrivals.recv()).collect())
    })?;
    parts.extend(arrived);
    seen.refuse_change()?;
    let files = parts.values().filter_map(|part| part.file.as_ref());
    flush(files.map(|file| file.path.as_path()))?;
    let modules = parts.into_iter().filter_map(|(module, part)| {
        let file = part.file?;
        Some((module, file.header_sha256))
    });
    let record = ShareRecord {
        part: share,
        job,
        modules: modules.collect(),
        flops: mine
            .iter()
            .map(|tensor| tensor.flops())
            .fold(0, u64::saturating_add),
        bytes: bytes_in(&folder),
        threads: plan.threads,
        seconds: started.elapsed().as_secs_f64(),
        tool: Tool::this(),
    };
    if base.repo.is_none() {
        // what is copied comes from the base when the parts are joined: remember where that was
        remember(&base.dir, &workspace)?;
    }
    let json = serde_json::to_vec_pretty(&record).expect("a record serialises");
    write_atomically(&out.join(PART_FILE), &json)?;
    workspace.finish()?;
    forget_what_was_read(&workspace);
    Ok(record)
}

/// The usual size of shards that only pass through.
///
/// With it, a model of 8 billion weights with a head of 128,256 rows needs 4 GB of disk, one of 405 billion 13 GB (a test
/// of `plan`).
pub const PASSING_SHARD_BYTES: u64 = 2_000_000_000;

/// Where the spectra that a budget needs are kept in the state folder.
const SPECTRA: &str = "spectra";

/// Where the sums of tensors are kept that are read over a network.
const BASE_SUMS: &str = "base-sums.json";

/// Removes what helps to go on: nothing is left to be done.
fn clean_up(workspace: &Workspace) {
    join::clean_up(workspace);
    forget_what_was_read(workspace);
}

fn forget_what_was_read(workspace: &Workspace) {
    let _ = std::fs::remove_dir_all(workspace.state(SPECTRA));
    let _ = std::fs::remove_file(workspace.state(BASE_SUMS));
}

/// Refuses a disk without the bytes needed; where ranks are open these are an upper bound, and worth a warning only.
fn check_room(out: &Path, plan: &Plan, bytes: u64, observer: &dyn Observer) -> Result<()> {
    match check_free_space(out, bytes.saturating_sub(bytes_in(out))) {
        Err(error) if !plan.ranks_known() && bytes > plan.disk_bytes_min() => {
            observer.warn(format!("should all ranks be as high as they may: {error}"));
            Ok(())
        }
        result => result,
    }
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

/// Whether the files are there that the record tells of.
fn is_whole(record: &ShareRecord, folder: &Path) -> bool {
    let dtype = record.job.options.plan.storing.factors;
    record.modules.iter().all(|(module, header_sha256)| {
        let file = Part::read(folder, module, dtype)
            .ok()
            .and_then(|part| part.file);
        file.is_some_and(|file| file.header_sha256 == *header_sha256)
    })
}

/// What will be done, and what makes it this job and no other.
struct Prepared {
    plan: Plan,
    job: Job,
    /// Knows the sums of its tensors, if it lies here.
    base: Base,
    /// Its files, when their sums were taken.
    seen: Seen,
}

fn prepare(base: &Base, options: &Options, observer: &dyn Observer) -> Result<Prepared> {
    linalg::single_threaded_blas();
    heap::keep_some();
    let config = ModelConfig::read(&base.dir)?;
    let plan = Plan::new(
        &base.dir,
        &config,
        &base.checkpoint.inventory,
        &options.plan,
    )?;
    let names = base.checkpoint.inventory.entries();
    let layers = names.filter_map(|(_, entry)| place(&entry.name).0);
    if let Some(last) = layers.max().filter(|&last| last as usize >= config.layers) {
        observer.warn(format!(
            "config.json knows {} layers, and there are weights of layer {last}: they are carried along, and nobody uses them",
            config.layers
        ));
    }
    let seen = Seen::of(&base.checkpoint)?;
    let (sha256, base) = base.summed(observer)?;
    let job = Job {
        base: Pin {
            repo: base.repo.clone(),
            revision: base.revision.clone(),
            sha256,
        },
        options: options.clone(),
    };
    Ok(Prepared {
        plan,
        job,
        base,
        seen,
    })
}

/// Decomposes matrices into files of their own.
struct Compute<'a> {
    base: &'a Base,
    folder: &'a Path,
    options: &'a Options,
    limits: Limits,
    observer: &'a dyn Observer,
}

impl Compute<'_> {
    /// Of `wanted`, what is neither in `joined` nor left by an earlier run, and what was left: see
    /// [`part::left_by_earlier_run`].
    fn find_missing<'t>(
        &self,
        wanted: Vec<&'t PlannedTensor>,
        joined: &BTreeMap<String, Part>,
        elsewhere: impl Fn(&str) -> bool,
    ) -> (Vec<&'t PlannedTensor>, BTreeMap<String, Part>) {
        let count = wanted.len();
        let mut missing = wanted;
        missing.retain(|tensor| !joined.contains_key(tensor.module()));
        let modules = missing.iter().map(|tensor| tensor.module());
        let dtype = self.options.plan.storing.factors;
        let kept = part::left_by_earlier_run(self.folder, modules, dtype, elsewhere, self.observer);
        missing.retain(|tensor| !kept.contains_key(tensor.module()));
        if missing.len() < count {
            self.observer.note(format!(
                "{} of {count} matrices are done already",
                count - missing.len()
            ));
        }
        (missing, kept)
    }

    /// Decomposes what is `missing` of `wanted`, in that order, while `consume` takes what is finished.
    fn run<C>(
        &self,
        wanted: &[&PlannedTensor],
        missing: &[&PlannedTensor],
        consume: impl FnOnce(&Arrivals<(String, Part)>) -> Result<C>,
    ) -> Result<C> {
        std::fs::create_dir_all(self.folder).context("create", self.folder)?;
        let flops = |tensors: &[&PlannedTensor]| {
            let each = tensors.iter().map(|t| t.flops());
            each.fold(0, u64::saturating_add)
        };
        let (all, to_do) = (flops(wanted), flops(missing));
        let (observer, plan) = (self.observer, &self.options.plan);
        let bytes = |tensor: &PlannedTensor| tensor.worker_bytes(plan.storing);
        let limits = self.limits;
        let largest = missing.iter().max_by_key(|tensor| bytes(tensor));
        if let Some(largest) = largest.filter(|tensor| bytes(tensor) > limits.memory) {
            observer.warn(format!(
                "`{}` takes some {} bytes of memory, more than there is for the matrices ({}): such matrices run alone",
                largest.module(),
                bytes(largest),
                limits.memory
            ));
        }
        if !missing.is_empty() {
            observer.resume(Stage::Decompose, all - to_do, all, Unit::Flops);
        }
        let left = AtomicUsize::new(missing.len());
        let cost = |tensor: &&PlannedTensor| Cost {
            memory: bytes(tensor),
            disk: tensor.artifact_bytes_max(plan.storing),
        };
        let work = |tensor: &&PlannedTensor| {
            let mut part = self.compute_part(tensor)?;
            if let Some(file) = &mut part.file {
                // as it was counted when it began
                file.bytes = cost(tensor).disk;
            }
            observer.advance(Stage::Decompose, tensor.flops(), tensor.module());
            if left.fetch_sub(1, Ordering::Relaxed) == 1 {
                observer.finish(Stage::Decompose);
            }
            Ok((tensor.module().to_string(), part))
        };
        workers::run(missing, limits, cost, work, consume)
    }

    fn compute_part(&self, tensor: &PlannedTensor) -> Result<Part> {
        let (module, checkpoint) = (tensor.module(), &self.base.checkpoint);
        let stored = checkpoint.read_finite(&tensor.stored_as())?;
        let (dtype, shape) = (stored.dtype, [stored.shape[0], stored.shape[1]]);
        let sha256 = match checkpoint.known_sha256(&tensor.stored_as()) {
            Some(known) => known.to_string(),
            None => sha256_hex(&stored.bytes),
        };
        let wanted = match self.options.plan.rank {
            Rank::Energy(share) => Wanted::Energy(share),
            _ => Wanted::Triplets(tensor.q.expect("every other rank was resolved before")),
        };
        // M once, not twice, while it is decomposed: M′ reads it again if these are not its numbers
        let widened = match stored.as_f32() {
            Some(_) => Vec::new(),
            None => stored.to_f32(),
        };
        let stored = widened.is_empty().then_some(stored);
        let (factors, record) = {
            let lying = stored.as_ref().and_then(Elements::as_f32);
            let matrix = ArrayView2::from_shape(shape, lying.unwrap_or(&widened))
                .expect("a tensor has as many values as its shape says");
            let algorithm = &self.options.algorithm;
            let on = |backend| linalg::decompose_on(backend, module, matrix, wanted, algorithm);
            let svd = match on(&self.options.backend) {
                Err(error) if error.is_out_of_device_memory() => {
                    self.observer.note(format!(
                        "{module}: the device has no memory left; on the CPU instead"
                    ));
                    on(&Backend::Cpu)?
                }
                tried => tried?,
            };
            let q = svd.sigma.len();
            if let Some(refused) = &svd.refused {
                self.observer.note(format!(
                    "{module}: {refused}; {} instead",
                    svd.route.describe()
                ));
            }
            let (captured_energy, residual_norm) = svd.energy();
            let dtype_of_factors = self.options.plan.storing.factors;
            let (route, sigma) = (svd.route, svd.sigma);
            let (u, v) = (dtype_of_factors.round(svd.u), dtype_of_factors.round(svd.v));
            let certificate = match dtype_of_factors {
                FactorsDtype::F32 => svd.certificate,
                // of what is stored
                FactorsDtype::Bf16 => certify(matrix, &u, &sigma, &v, PROBE_SEED)?,
            };
            let record = ModuleRecord {
                q,
                shape,
                dtype: dtype_name(dtype),
                bias: checkpoint.inventory.contains(&format!("{module}.bias")),
                tied_to: tensor.tied_to.clone(),
                captured_energy,
                residual_norm,
                sigma_max: sigma[0],
                sigma_min: sigma[q - 1],
                route,
                certificate,
                exceptions: 0,
                sha256,
            };
            (Factors { u, sigma, v }, record)
        };
        drop(widened);
        let matrix = match (self.options.plan.storing.layout, stored) {
            (ArtifactLayout::Sidecar, _) => None,
            (ArtifactLayout::Residual, Some(stored)) => Some(stored),
            (ArtifactLayout::Residual, None) => Some(checkpoint.read(&tensor.stored_as())?),
        };
        Part::of(
            self.folder,
            module,
            record,
            &factors,
            self.options.plan.storing.factors,
            matrix.as_ref(),
        )
    }
}
