//! The files of PEFT's LoRA: W = M + B·A with B (m, r) and A (r, n), made of triplets that are at hand, without an SVD.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate};
use serde::{Deserialize, Serialize};

use super::{File, Job};
use crate::error::{Error, Result};
use crate::event::{Stage, Unit};
use crate::peft::LORA_CONFIG;
use crate::peft::{self, LORA_WEIGHTS, Names, SERVED_RANK_MAX, SERVED_RANKS, saved_name};
use crate::plan::{Role, role};
use crate::split::Factors;
use crate::weights::{Dtype, Elements, Header, ShardWriter};
use crate::workers;
use crate::workspace::{bytes_in, check_free_space};

/// The facts of a LoRA.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoraFacts {
    /// r of every module: rows that a module does not need are zero.
    pub rank: usize,
    /// Δσ that are in the file, of all modules.
    pub kept: usize,
    /// Δσ that are not zero.
    pub trained: usize,
    /// √(Σδ² of what was left out / Σδ²) over all modules: ‖ΔW − B·A‖ / ‖ΔW‖ as orthonormal vectors have it.
    pub predicted_error: f64,
    /// ‖ΔW − B·A‖ / ‖ΔW‖ over all modules, Frobenius, from the f32 numbers in the file.
    pub measured_error: f64,
    /// By their name in the model.
    pub modules: BTreeMap<String, LoraModule>,
    /// Trained norms, carried whole.
    pub modules_to_save: Vec<String>,
}

/// One weight of a LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraModule {
    pub kept: usize,
    pub trained: usize,
    pub predicted_error: f64,
    pub measured_error: f64,
}

/// What will be written: decided and checked before the first byte.
pub struct Plan {
    rank: usize,
    kept_max: usize,
    modules: Vec<Planned>,
    norms: Vec<Norm>,
    target_modules: Vec<String>,
}

struct Planned {
    /// In the decomposition.
    module: String,
    /// In the model.
    name: String,
    shape: [usize; 2],
    delta: Vec<f32>,
}

impl Planned {
    /// Of measuring ‖ΔW‖ and ‖ΔW − B·A‖; making B and A is nothing beside it.
    fn flops(&self, kept_max: usize) -> u64 {
        let [m, n] = self.shape.map(|side| side as u64);
        let trained = trained(&self.delta);
        2 * m * n * (2 * trained + trained.min(kept_max)) as u64
    }

    /// Factors can take a sum of adapters out of f32.
    fn refuse_not_finite(&self) -> Result<()> {
        let tensor = format!("{}.delta", self.module);
        let delta = Elements::from_f32(&[self.delta.len()], &self.delta);
        delta.refuse_overflow(&tensor)
    }
}

struct Norm {
    /// In the model.
    module: String,
    /// Its weight, and its bias where it has one.
    tensors: Vec<(String, Elements)>,
}

impl Plan {
    pub fn new(job: &Job, wanted: Option<NonZeroUsize>) -> Result<Self> {
        let modules: Vec<Planned> = job
            .artifact
            .svd
            .modules
            .iter()
            .map(|(module, record)| Planned {
                module: module.clone(),
                name: job.naming.in_model(module),
                shape: record.shape,
                delta: job.mixture.delta(module, record.q),
            })
            .collect();
        modules.iter().try_for_each(Planned::refuse_not_finite)?;
        let needed = modules.iter().map(|m| trained(&m.delta)).max().unwrap_or(0);
        let (kept_max, rank) = ranks(needed, wanted.map(NonZeroUsize::get));
        Ok(Self {
            rank,
            kept_max,
            target_modules: target_modules(job, &modules)?,
            norms: norms(job)?,
            modules,
        })
    }

    pub fn write(self, job: &Job) -> Result<(LoraFacts, File)> {
        self.say_what_to_expect(job);
        let header = self.header()?;
        let bytes = header.file_bytes();
        check_free_space(job.out, bytes.saturating_sub(bytes_in(job.out)))?;
        let mut writer = ShardWriter::create(&job.out.join(LORA_WEIGHTS), header)?;
        let total = self.modules.iter().map(|m| m.flops(self.kept_max)).sum();
        job.observer.start(Stage::Export, total, Unit::Flops);
        let (mut facts, mut sums) = (BTreeMap::new(), Squares::default());
        workers::in_order(
            &self.modules,
            job.threads,
            |planned| {
                let factors = job.artifact.factors(&planned.module)?;
                Ok(Pair::of(&factors, &planned.delta, self.kept_max))
            },
            |planned, pair| {
                let names = Names::of(&planned.name);
                let [m, n] = planned.shape;
                pair.write_a(&mut writer, &names.a, self.rank, n)?;
                pair.write_b(&mut writer, &names.b, self.rank, m)?;
                sums.add(&pair.squares);
                facts.insert(
                    planned.name.clone(),
                    LoraModule {
                        kept: pair.a.nrows(),
                        trained: trained(&planned.delta),
                        predicted_error: pair.squares.predicted(),
                        measured_error: pair.squares.measured(),
                    },
                );
                let flops = planned.flops(self.kept_max);
                job.observer.advance(Stage::Export, flops, &planned.name);
                Ok(())
            },
        )?;
        job.observer.finish(Stage::Export);
        for norm in &self.norms {
            for (tensor, values) in &norm.tensors {
                writer.put(&saved_name(tensor), &values.bytes)?;
            }
        }
        let sha256 = writer.finish()?;
        let saved: Vec<String> = self.norms.into_iter().map(|norm| norm.module).collect();
        // the config last: without it the directory is no adapter
        peft::Config {
            base: &job.artifact.svd.base,
            rank: self.rank,
            alpha: self.rank,
            target_modules: &self.target_modules,
            modules_to_save: &saved,
        }
        .write(job.out)?;
        let facts = LoraFacts {
            rank: self.rank,
            kept: facts.values().map(|m: &LoraModule| m.kept).sum(),
            trained: facts.values().map(|m| m.trained).sum(),
            predicted_error: sums.predicted(),
            measured_error: sums.measured(),
            modules: facts,
            modules_to_save: saved,
        };
        let file = File {
            name: LORA_WEIGHTS,
            sha256,
            bytes,
            beside: vec![LORA_CONFIG.into()],
        };
        Ok((facts, file))
    }

    fn say_what_to_expect(&self, job: &Job) {
        if self.modules.iter().all(|m| trained(&m.delta) == 0) && self.norms.is_empty() {
            let said = "the adapters change nothing: B·A is zero everywhere";
            job.observer.warn(said.into());
        }
        peft::Expected {
            rank: self.rank,
            norms: self.norms.len(),
            untied: job.artifact.untied().next().map(|(head, _)| head),
            base: &job.artifact.svd.base,
        }
        .say(job.observer);
    }

    fn header(&self) -> Result<Header> {
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        for planned in &self.modules {
            let names = Names::of(&planned.name);
            let [m, n] = planned.shape;
            tensors.push((names.a, vec![self.rank, n]));
            tensors.push((names.b, vec![m, self.rank]));
        }
        for norm in &self.norms {
            for (tensor, values) in &norm.tensors {
                tensors.push((saved_name(tensor), values.shape.clone()));
            }
        }
        Header::compose(
            tensors
                .iter()
                .map(|(name, shape)| (name.as_str(), Dtype::F32, shape.as_slice())),
        )
    }
}

/// How many Δσ of a module are kept at most, and r of the file, where at most `needed` of a module are not zero.
fn ranks(needed: usize, wanted: Option<usize>) -> (usize, usize) {
    let served = |rank: usize| SERVED_RANKS.into_iter().find(|&s| s >= rank);
    match wanted {
        None => {
            let rank = served(needed).unwrap_or(SERVED_RANK_MAX);
            (rank, rank)
        }
        Some(wanted) => match served(wanted) {
            Some(rank) => (wanted, rank),
            // rows of zeros beyond what is served would help nobody
            None => {
                let kept = wanted.min(needed);
                (kept, served(kept).unwrap_or(kept))
            }
        },
    }
}

fn trained(delta: &[f32]) -> usize {
    delta.iter().filter(|&&d| d != 0.0).count()
}

/// The names by which PEFT finds exactly the decomposed modules.
fn target_modules(job: &Job, modules: &[Planned]) -> Result<Vec<String>> {
    let headers = job.artifact.base_headers()?;
    let entries = headers.iter().flat_map(|(_, header)| &header.entries);
    let names: Vec<(&str, &str)> = modules
        .iter()
        .map(|planned| (planned.module.as_str(), planned.name.as_str()))
        .collect();
    Ok(peft::target_modules(entries, &names))
}

/// The trained norms, as they are after training. Anything else that was trained has no place in a LoRA.
fn norms(job: &Job) -> Result<Vec<Norm>> {
    let (norms, others): (Vec<&str>, Vec<&str>) = job
        .trained_tensors()
        .into_iter()
        .partition(|tensor| role(tensor) == Role::Norm);
    if !others.is_empty() {
        return Err(Error::NotExpressible {
            what: others
                .iter()
                .map(|t| format!("`{t}`"))
                .collect::<Vec<_>>()
                .join(", "),
            target: "peft-lora",
            reason: "beside linear layers, only norms can be carried".into(),
        });
    }
    norms
        .into_iter()
        .map(|tensor| {
            let base = job.artifact.base_tensor(tensor)?;
            let values = job
                .mixture
                .tensor_f32(tensor, &base)
                .expect("a trained tensor is in the mixture");
            values.refuse_overflow(tensor)?;
            let module = tensor.strip_suffix(".weight").expect("a norm is a weight");
            let name = job.naming.in_model(module);
            let mut tensors = vec![(format!("{name}.weight"), values)];
            // PEFT carries a module whole, and asks for all of it
            let bias = format!("{module}.bias");
            if job.artifact.base_entry(&bias).is_some() {
                let bias = job.artifact.base_tensor(&bias)?.to_f32();
                let bias = Elements::from_f32(&[bias.len()], &bias);
                tensors.push((format!("{name}.bias"), bias));
            }
            Ok(Norm {
                module: name,
                tensors,
            })
        })
        .collect()
}

/// B and A of one module without their rows of zeros, both with one vector per row.
struct Pair {
    /// (k, n): √|δ|·v
    a: Array2<f32>,
    /// (k, m): √|δ|·sign(δ)·u
    b: Array2<f32>,
    squares: Squares,
}

/// Squared Frobenius norms, which add over modules.
#[derive(Default)]
struct Squares {
    /// Σδ² of what was left out.
    dropped: f64,
    /// Σδ²
    all: f64,
    /// ‖ΔW − B·A‖²
    off: f64,
    /// ‖ΔW‖²
    change: f64,
}

impl Squares {
    fn add(&mut self, other: &Self) {
        self.dropped += other.dropped;
        self.all += other.all;
        self.off += other.off;
        self.change += other.change;
    }

    fn predicted(&self) -> f64 {
        relative(self.dropped, self.all)
    }

    fn measured(&self) -> f64 {
        relative(self.off, self.change)
    }
}

fn relative(part: f64, whole: f64) -> f64 {
    if whole > 0.0 {
        // a sum of nothing is −0
        (part.abs() / whole).sqrt()
    } else {
        0.0
    }
}

impl Pair {
    /// The `kept_max` largest |δ|: of all matrices of that rank none is nearer to ΔW, whose singular values they are
    /// (Eckart and Young).
    fn of(factors: &Factors, delta: &[f32], kept_max: usize) -> Self {
        let mut order: Vec<usize> = (0..delta.len()).filter(|&i| delta[i] != 0.0).collect();
        order.sort_by(|&i, &j| delta[j].abs().total_cmp(&delta[i].abs()));
        let kept = &order[..order.len().min(kept_max)];
        let half = |vectors: &Array2<f32>, signed: bool| {
            let mut rows = vectors.select(Axis(0), kept);
            for (mut row, &i) in rows.rows_mut().into_iter().zip(kept) {
                let root = f64::from(delta[i]).abs().sqrt();
                let factor = if signed {
                    root.copysign(delta[i].into())
                } else {
                    root
                };
                row.mapv_inplace(|x| (factor * f64::from(x)) as f32);
            }
            rows
        };
        let (a, b) = (half(&factors.v, false), half(&factors.u, true));
        let square = |i: &usize| f64::from(delta[*i]).powi(2);
        let squares = Squares {
            dropped: order[kept.len()..].iter().map(square).sum(),
            all: order.iter().map(square).sum(),
            off: difference(factors, delta, &order, b.view(), a.view())
                .norm()
                .powi(2),
            change: triplets(factors, delta, &order).norm().powi(2),
        };
        Self { a, b, squares }
    }

    fn write_a(&self, writer: &mut ShardWriter, name: &str, rank: usize, n: usize) -> Result<()> {
        writer.begin(name);
        for row in self.a.rows() {
            writer.write(&bytes(row.iter()))?;
        }
        let zeros = vec![0u8; 4 * n];
        (self.a.nrows()..rank).try_for_each(|_| writer.write(&zeros))
    }

    fn write_b(&self, writer: &mut ShardWriter, name: &str, rank: usize, m: usize) -> Result<()> {
        writer.begin(name);
        let zeros = vec![0u8; 4 * (rank - self.b.nrows())];
        (0..m).try_for_each(|i| {
            writer.write(&bytes(self.b.column(i).iter()))?;
            writer.write(&zeros)
        })
    }
}

fn bytes<'a>(values: impl Iterator<Item = &'a f32>) -> Vec<u8> {
    values.flat_map(|x| x.to_le_bytes()).collect()
}

/// ΔW = uᵀ·diag(δ)·v, of the triplets named.
fn triplets(factors: &Factors, delta: &[f32], which: &[usize]) -> Factors {
    Factors {
        u: factors.u.select(Axis(0), which),
        sigma: which.iter().map(|&i| delta[i]).collect(),
        v: factors.v.select(Axis(0), which),
    }
}

/// ΔW − B·A as one product, whose norm needs no matrix of that size.
fn difference(
    factors: &Factors,
    delta: &[f32],
    which: &[usize],
    b: ArrayView2<f32>,
    a: ArrayView2<f32>,
) -> Factors {
    let change = triplets(factors, delta, which);
    let minus = Array1::from_elem(a.nrows(), -1.0);
    let stacked = |above: ArrayView2<f32>, below| {
        concatenate(Axis(0), &[above, below]).expect("invariant: both have the weight's sides")
    };
    Factors {
        u: stacked(change.u.view(), b),
        sigma: concatenate(Axis(0), &[change.sigma.view(), minus.view()])
            .expect("vectors have one side"),
        v: stacked(change.v.view(), a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{Algorithm, Wanted, decompose};

    #[test]
    fn ranks_are_those_that_are_served() {
        // everything: up to the next, and no further than the last
        assert_eq!(ranks(12, None), (16, 16));
        assert_eq!(ranks(0, None), (8, 8));
        assert_eq!(ranks(307, None), (320, 320));
        assert_eq!(ranks(513, None), (512, 512));
        // so many as asked, in a file of the next
        assert_eq!(ranks(12, Some(5)), (5, 8));
        assert_eq!(ranks(12, Some(64)), (64, 64));
        assert_eq!(ranks(900, Some(321)), (321, 512));
        // more than is served: as asked, but without rows that nothing fills
        assert_eq!(ranks(900, Some(600)), (600, 600));
        assert_eq!(ranks(550, Some(600)), (550, 550));
        assert_eq!(ranks(12, Some(600)), (12, 16));
    }

    fn factors(m: usize, n: usize, q: usize) -> Factors {
        let mut state = 5u64;
        let matrix = Array2::from_shape_fn((m, n), |_| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        });
        let svd = decompose(
            "test",
            matrix.view(),
            Wanted::Triplets(q),
            &Algorithm::default(),
        )
        .expect("decomposes");
        Factors {
            u: svd.u,
            sigma: svd.sigma,
            v: svd.v,
        }
    }

    #[test]
    fn the_product_is_the_change_of_the_largest_deltas() {
        let factors = factors(37, 52, 6);
        let delta = [0.5f32, -3.0, 0.0, 0.75, -0.125, 2.0];
        for (kept_max, kept) in [(9, vec![1, 5, 3, 0, 4]), (2, vec![1, 5])] {
            let pair = Pair::of(&factors, &delta, kept_max);
            assert_eq!(pair.a.dim(), (kept.len(), 52));
            assert_eq!(pair.b.dim(), (kept.len(), 37));
            for i in 0..37 {
                for j in 0..52 {
                    let term = |k: &usize| {
                        f64::from(factors.u[(*k, i)])
                            * f64::from(delta[*k])
                            * f64::from(factors.v[(*k, j)])
                    };
                    let wanted: f64 = kept.iter().map(term).sum();
                    let sum_abs: f64 = kept.iter().map(|k| term(k).abs()).sum();
                    let found: f64 = (0..kept.len())
                        .map(|r| f64::from(pair.b[(r, i)]) * f64::from(pair.a[(r, j)]))
                        .sum();
                    // each factor is rounded once
                    assert!(
                        (found - wanted).abs() <= sum_abs * 2f64.powi(-22),
                        "({i}, {j})"
                    );
                }
            }
        }
    }

    #[test]
    fn the_error_is_foretold_by_what_is_left_out() {
        let factors = factors(37, 52, 6);
        let delta = [0.5f32, -3.0, 0.0, 0.75, -0.125, 2.0];
        let pair = Pair::of(&factors, &delta, 2);
        let left: f64 = 0.5f64.powi(2) + 0.75f64.powi(2) + 0.125f64.powi(2);
        let wanted = (left / (left + 9.0 + 4.0)).sqrt();
        assert!((pair.squares.predicted() - wanted).abs() < 1e-15);
        assert!(
            (pair.squares.measured() - wanted).abs() < 1e-6,
            "{}",
            pair.squares.measured()
        );
        // whole, only the rounding of B and A is left: 2⁻²⁴ each
        let whole = Pair::of(&factors, &delta, 6).squares;
        assert_eq!(whole.predicted(), 0.0);
        assert!(
            whole.measured() > 1e-9 && whole.measured() < 2f64.powi(-22),
            "{}",
            whole.measured()
        );
        let nothing = Pair::of(&factors, &[0.0; 6], 6).squares;
        assert_eq!((nothing.predicted(), nothing.measured()), (0.0, 0.0));
    }
}
