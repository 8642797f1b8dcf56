//! `convert`: a decomposition in, the same in another layout, with vectors of another dtype, or its leading triplets only.
//!
//! A nested rank reads no more than it needs: of each u and v the first k rows, which lie side by side. So a published
//! sidecar with many triplets serves those who want few, by byte ranges of its files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ndarray::{Array1, ArrayView2, s};

use crate::artifact::Artifact;
use crate::base::remembered;
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{
    ArtifactLayout, BASE_CONFIG, BASE_INDEX, FactorsDtype, ModuleRecord, ModuleTensors, Origin,
    Rank, Storing, is_base_header,
};
use crate::join::{self, Facts, Frame, Item, Join, PARTS};
use crate::linalg::{self, Certificate, PROBE_SEED, certify, orthogonality};
use crate::part::{self, Part};
use crate::split::Factors;
use crate::weights::Elements;
use crate::workers::{self, Cost, Limits};
use crate::workspace::{Again, Workspace, bytes_in, check_free_space};
use crate::{ranks, report};

/// What to change; `None` leaves it as it is.
#[derive(Debug, Clone)]
pub struct Options {
    pub layout: Option<ArtifactLayout>,
    pub factors: Option<FactorsDtype>,
    pub rank: Option<Rank>,
    pub shard_bytes_max: u64,
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            layout: None,
            factors: None,
            rank: None,
            shard_bytes_max: crate::job::Options::default().shard_bytes_max,
            threads: workers::cores(),
        }
    }
}

impl Options {
    fn storing(&self, artifact: &Artifact) -> Storing {
        Storing {
            layout: self.layout.unwrap_or(artifact.svd.layout),
            factors: self.factors.unwrap_or(artifact.svd.factors),
        }
    }

    /// Whether M itself is read: for M′, and to look at rounded vectors anew.
    pub fn needs_matrices(&self, artifact: &Artifact) -> bool {
        let storing = self.storing(artifact);
        storing.layout == ArtifactLayout::Residual || storing.factors != artifact.svd.factors
    }
}

/// Converts `artifact`, which `origin` names, into the directory `out`.
///
/// # Errors
/// A rank beyond what the decomposition holds; f32 vectors wanted of bf16 ones; a sidecar without its base where M is
/// needed; bytes that are not what the index says; a full disk; an output directory that is not this job's.
pub fn run(
    artifact: &Artifact,
    origin: &Origin,
    out: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    let started = Instant::now();
    linalg::single_threaded_blas();
    let storing = options.storing(artifact);
    if storing.factors == FactorsDtype::F32 && artifact.svd.factors == FactorsDtype::Bf16 {
        return Err(Error::FactorsRounded {
            path: artifact.dir.clone(),
        });
    }
    let spectra = spectra(artifact)?;
    let kept = ranks_of(artifact, &spectra, options.rank)?;
    let settings = BTreeMap::from([
        ("decomposition".into(), artifact.content_sha256.clone()),
        (
            "rank".into(),
            options.rank.unwrap_or(artifact.svd.rank).to_string(),
        ),
        (
            "layout".into(),
            format!("{:?}", storing.layout).to_lowercase(),
        ),
        ("dtype of the factors".into(), storing.factors.to_string()),
        ("shard size".into(), options.shard_bytes_max.to_string()),
    ]);
    let (mut workspace, claim) = Workspace::claim(out, "convert", settings)?;
    if claim.is_finished(out, Again::GoesOn, observer) {
        join::clean_up(&workspace);
        return report::section(out, "decompose");
    }
    let frame = frame(artifact, origin, options, storing, &kept)?;
    let conversion = Conversion {
        artifact,
        storing,
        kept: &kept,
        spectra: &spectra,
        reads_matrices: options.needs_matrices(artifact),
    };
    let needed = conversion.disk_bytes(&frame, options.shard_bytes_max);
    check_free_space(out, needed.saturating_sub(bytes_in(out)))?;
    let join = Join {
        frame: &frame,
        carried: artifact.carried(),
        out,
        workspace: &workspace,
        observer,
        consumes: true,
        outlet: None,
    };
    let mut joined = join.resume()?;
    let folder = workspace.state(PARTS);
    std::fs::create_dir_all(&folder).context("create", &folder)?;
    let mut missing: Vec<&str> = frame.matrices().collect();
    let all: u64 = missing
        .iter()
        .map(|module| conversion.read_bytes(module))
        .sum();
    missing.retain(|module| !joined.parts.contains_key(*module));
    joined.parts.extend(part::left_by_earlier_run(
        &folder,
        missing.iter().copied(),
        storing.factors,
        |tensor| joined.holds(tensor),
        observer,
    ));
    missing.retain(|module| !joined.parts.contains_key(*module));
    if !joined.parts.is_empty() {
        observer.note(format!(
            "{} of {} matrices are done already",
            joined.parts.len(),
            joined.parts.len() + missing.len()
        ));
    }
    let left: u64 = missing
        .iter()
        .map(|module| conversion.read_bytes(module))
        .sum();
    observer.resume(Stage::Convert, all - left, all, Unit::Bytes);
    let waiting = AtomicUsize::new(missing.len());
    let joined = workers::run(
        &missing,
        Limits::threads(options.threads),
        |_| Cost::default(),
        |module| {
            let part = conversion.part(&folder, module)?;
            observer.advance(Stage::Convert, conversion.read_bytes(module), module);
            if waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
                observer.finish(Stage::Convert);
            }
            Ok(((*module).to_string(), part))
        },
        |arrivals| join.write_shards(joined, Some(arrivals)),
    )?
    .expect("no worker failed, so every part has arrived");
    let facts = join.complete(joined, options.threads, started.elapsed().as_secs_f64())?;
    workspace.finish()?;
    join::clean_up(&workspace);
    Ok(facts)
}

/// The singular values of every module, checked against the index.
fn spectra(artifact: &Artifact) -> Result<BTreeMap<String, Vec<f32>>> {
    let modules = artifact.svd.modules.keys();
    modules
        .map(|module| {
            let sigma = artifact.stored(&ModuleTensors::of(module).sigma)?;
            Ok((module.clone(), sigma.to_f32()))
        })
        .collect()
}

/// How many triplets are kept of each module.
fn ranks_of(
    artifact: &Artifact,
    spectra: &BTreeMap<String, Vec<f32>>,
    rank: Option<Rank>,
) -> Result<BTreeMap<String, usize>> {
    let modules = &artifact.svd.modules;
    let beyond = |module: &str, wanted: String| Error::RankBeyond {
        path: artifact.dir.clone(),
        module: module.into(),
        wanted,
        stored: modules[module].q,
    };
    let spread = match rank {
        Some(Rank::Budget(budget)) => ranks::spread(budget, spectra),
        _ => BTreeMap::new(),
    };
    // the least value that the budget takes: a spectrum that ends above it may go on above it, unseen
    let least = spread
        .iter()
        .filter(|&(_, &k)| k > 1)
        .map(|(module, &k)| spectra[module][k - 1])
        .fold(f32::INFINITY, f32::min);
    let mut kept = BTreeMap::new();
    for (module, record) in modules {
        let short = record.shape[0].min(record.shape[1]);
        let whole = record.q == short;
        let k = match rank {
            None => record.q,
            Some(rank @ (Rank::Fraction(_) | Rank::Fixed(_))) => {
                let k = rank.known(short).expect("these need no spectrum");
                if k > record.q {
                    return Err(beyond(module, k.to_string()));
                }
                k
            }
            Some(Rank::Energy(share)) => {
                let k = energy_kept(record, &spectra[module], share);
                k.ok_or_else(|| beyond(module, format!("{share} of the energy")))?
            }
            Some(Rank::Budget(budget)) => {
                let k = spread[module];
                if k == record.q && !whole && record.sigma_min > least {
                    return Err(beyond(module, format!("its share of a budget of {budget}")));
                }
                k
            }
        };
        kept.insert(module.clone(), k);
    }
    Ok(kept)
}

/// The fewest of the stored triplets that hold a share of ‖M‖², if all of them hold it.
fn energy_kept(record: &ModuleRecord, sigma: &[f32], share: f64) -> Option<usize> {
    // of a full decomposition all hold everything, whatever the rounding of the sums says
    let whole = record.q == record.shape[0].min(record.shape[1]);
    let squares = || sigma.iter().map(|&x| f64::from(x).powi(2));
    let total = squares().sum::<f64>() / record.captured_energy.max(f64::MIN_POSITIVE);
    let mut sum = 0.0;
    for (at, square) in squares().enumerate() {
        sum += square;
        if sum >= share * total {
            return Some(at + 1);
        }
    }
    whole.then_some(record.q)
}

/// What surrounds the matrices, as the source has it.
fn frame(
    artifact: &Artifact,
    origin: &Origin,
    options: &Options,
    storing: Storing,
    kept: &BTreeMap<String, usize>,
) -> Result<Frame> {
    let svd = &artifact.svd;
    let before: Facts = report::section(&artifact.dir, "decompose")?;
    let nested =
        storing.factors != svd.factors || kept.iter().any(|(module, &k)| k < svd.modules[module].q);
    let index = artifact.dir.join(BASE_INDEX);
    let headers = match storing.layout {
        ArtifactLayout::Residual => artifact.base_headers()?,
        ArtifactLayout::Sidecar => Vec::new(),
    };
    Ok(Frame {
        pin: svd.base.clone(),
        model_type: before.model_type,
        rank: options.rank.unwrap_or(svd.rank),
        storing,
        nested_in: if nested {
            Some(origin.clone())
        } else {
            svd.nested_in.clone()
        },
        algorithm: svd.algorithm.clone(),
        shard_bytes_max: options.shard_bytes_max,
        items: items(artifact, storing.layout),
        carried_sha256: match svd.layout {
            ArtifactLayout::Residual => artifact.sums.tensors.clone(),
            // its base is pinned file by file
            ArtifactLayout::Sidecar => BTreeMap::new(),
        },
        headers: headers
            .into_iter()
            .map(|(file, header)| (file, header.prefix))
            .collect(),
        linear_layers: svd.modules.len(),
        parameters: before.parameters,
        norms: before.trainable.norms,
        embeddings: before.trainable.embeddings,
        untied_head: before.untied_head,
        base_bytes: before.base_bytes,
        base_card: before.base_card,
        base_config: artifact.dir.join(BASE_CONFIG),
        base_index: index.exists().then_some(index),
        side_files: artifact.dir.clone(),
        // one that has gone cannot be remembered, and a residual needs none
        local_base: remembered(&artifact.dir).filter(|dir| svd.base.repo.is_none() && dir.is_dir()),
    })
}

/// The order of a direct decomposition: the base's for the residual layout, where a head that the base does not store
/// comes last; for a sidecar the same without what is carried along.
fn items(artifact: &Artifact, layout: ArtifactLayout) -> Vec<Item> {
    let mut owners: BTreeMap<String, &str> = BTreeMap::new();
    for module in artifact.svd.modules.keys() {
        owners.insert(format!("{module}.weight"), module);
        for tensor in ModuleTensors::of(module).all() {
            owners.insert(tensor, module);
        }
    }
    let residual = layout == ArtifactLayout::Residual;
    let source = match (residual, artifact.svd.layout) {
        (true, ArtifactLayout::Sidecar) => artifact.carried(),
        _ => &artifact.checkpoint,
    };
    let (mut items, mut placed) = (Vec::new(), BTreeSet::new());
    for (_, entry) in source.inventory.entries() {
        if let Some(module) = owners.get(&entry.name) {
            if placed.insert(*module) {
                items.push(Item::Matrix((*module).into()));
            }
        } else if residual && !is_base_header(&entry.name) {
            items.push(Item::Carried(entry.clone()));
        }
    }
    let modules = artifact.svd.modules.keys();
    let unplaced = modules.filter(|module| !placed.contains(module.as_str()));
    items.extend(unplaced.map(|module| Item::Matrix(module.clone())));
    items
}

/// One conversion, matrix by matrix.
struct Conversion<'a> {
    artifact: &'a Artifact,
    storing: Storing,
    /// Triplets to keep, by module.
    kept: &'a BTreeMap<String, usize>,
    spectra: &'a BTreeMap<String, Vec<f32>>,
    reads_matrices: bool,
}

impl Conversion<'_> {
    /// The module in its new form.
    fn part(&self, folder: &Path, module: &str) -> Result<Part> {
        let (record, k) = (&self.artifact.svd.modules[module], self.kept[module]);
        let (factors, matrix) = if self.reads_matrices {
            let whole = self.artifact.factors(module)?;
            let matrix = self.artifact.restore(module, record, &whole)?;
            (leading(whole, k), Some(matrix))
        } else if k == record.q || !self.artifact.checkpoint.is_remote() {
            // whole, where that is near: only then there is a sum of it
            (leading(self.artifact.factors(module)?, k), None)
        } else {
            (self.prefix(module, k)?, None)
        };
        let dtype = self.storing.factors;
        let factors = Factors {
            u: dtype.round(factors.u),
            v: dtype.round(factors.v),
            ..factors
        };
        let record = self.record(module, record, &factors, matrix.as_ref())?;
        let matrix = matrix.filter(|_| self.storing.layout == ArtifactLayout::Residual);
        Part::of(folder, module, record, &factors, dtype, matrix.as_ref())
    }

    /// The first k triplets, read without the others. Their bytes have no sum of their own: what came must be orthonormal.
    fn prefix(&self, module: &str, k: usize) -> Result<Factors> {
        let names = ModuleTensors::of(module);
        let u = self.artifact.rows(&names.u, k)?;
        let v = self.artifact.rows(&names.v, k)?;
        let found = orthogonality(&u, &v, PROBE_SEED);
        if !self.artifact.svd.are_orthonormal(found) {
            return Err(Error::NotOrthonormal {
                tensor: names.u,
                path: self.artifact.dir.clone(),
                found,
            });
        }
        let sigma = Array1::from_iter(self.spectra[module][..k].iter().copied());
        Ok(Factors { u, sigma, v })
    }

    fn record(
        &self,
        module: &str,
        before: &ModuleRecord,
        factors: &Factors,
        matrix: Option<&Elements>,
    ) -> Result<ModuleRecord> {
        let (sigma, k) = (&self.spectra[module], factors.q());
        let same = k == before.q && self.storing.factors == self.artifact.svd.factors;
        if same {
            return Ok(before.clone());
        }
        let energy = |sigma: &[f32]| sigma.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        let (left, dropped) = (energy(&sigma[..k]), energy(&sigma[k..]));
        let certificate = match matrix {
            Some(matrix) => {
                let (m, n) = factors.shape();
                let values = matrix.to_f32();
                let view = ArrayView2::from_shape((m, n), &values)
                    .expect("restored in the shape of its record");
                certify(view, &factors.u, &factors.sigma, &factors.v, PROBE_SEED)?
            }
            None => nested(&before.certificate, sigma, factors),
        };
        Ok(ModuleRecord {
            q: k,
            // with nothing dropped, the very same numbers
            captured_energy: match left + dropped > 0.0 {
                true => before.captured_energy * (left / (left + dropped)),
                false => before.captured_energy,
            },
            residual_norm: before.residual_norm.hypot(dropped.sqrt()),
            sigma_max: sigma[0],
            sigma_min: sigma[k - 1],
            certificate,
            ..before.clone()
        })
    }

    /// Bytes that the module's conversion reads.
    fn read_bytes(&self, module: &str) -> u64 {
        let (record, k) = (&self.artifact.svd.modules[module], self.kept[module]);
        let [m, n] = record.shape;
        let rows = if self.reads_matrices { record.q } else { k };
        let matrix = if self.reads_matrices { 4 * m * n } else { 0 };
        self.artifact.svd.factors.bytes() * (rows * (m + n)) as u64 + matrix as u64
    }

    /// The most disk that is taken at any moment: everything, and a shard beside the parts it is written from.
    fn disk_bytes(&self, frame: &Frame, shard_bytes_max: u64) -> u64 {
        let bytes = |module: &str| {
            let (record, k) = (&self.artifact.svd.modules[module], self.kept[module]);
            let [m, n] = record.shape;
            let residual = match self.storing.layout {
                ArtifactLayout::Residual => 4 * (m * n) as u64 + 8 * record.exceptions,
                ArtifactLayout::Sidecar => 0,
            };
            self.storing.factors.bytes() * (k * (m + n)) as u64 + 4 * k as u64 + residual
        };
        let matrices: u64 = frame.matrices().map(bytes).sum();
        let largest = frame.matrices().map(bytes).max().unwrap_or(0);
        matrices
            + frame.carried_bytes()
            + matrices.min(shard_bytes_max.max(largest).saturating_add(largest))
    }
}

/// The first k triplets of factors.
fn leading(factors: Factors, k: usize) -> Factors {
    if k == factors.q() {
        return factors;
    }
    Factors {
        u: factors.u.slice(s![..k, ..]).to_owned(),
        sigma: factors.sigma.slice(s![..k]).to_owned(),
        v: factors.v.slice(s![..k, ..]).to_owned(),
    }
}

/// What is known of the first k triplets without M, from what the probes saw of all q.
///
/// Residuals are root mean squares: those of the first k are at most √(q/k) times those of all. What remains beside
/// exact triplets has the next singular value for its norm.
fn nested(before: &Certificate, sigma: &[f32], factors: &Factors) -> Certificate {
    let k = factors.q();
    let wider = (sigma.len() as f64 / k as f64).sqrt();
    let tail = sigma.get(k).map_or(before.tail, |&next| {
        let last = f64::from(sigma[k - 1]).max(f64::MIN_POSITIVE);
        Some((f64::from(next) / last).min(1.0))
    });
    Certificate {
        residual: before.residual * wider,
        link: before.link.map(|link| link * wider),
        orthogonality: orthogonality(&factors.u, &factors.v, PROBE_SEED),
        tail,
    }
}
