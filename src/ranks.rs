//! A budget of singular values, spread over the matrices of a model by energy.
//!
//! Needs every spectrum first: each is computed once and kept in the state folder, so that a kill loses none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;

use crate::error::{IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::Rank;
use crate::linalg;
use crate::plan::{Plan, PlannedTensor};
use crate::sum::sha256_hex;
use crate::weights::{Checkpoint, Elements, Header, ShardWriter};
use crate::workers::{self, Cost};

/// The plan with the ranks that a budget gives; any other plan as it is.
///
/// Spectra are read from `folder` where an earlier run left them, and written there where not.
pub fn resolve(
    plan: Plan,
    checkpoint: &Checkpoint,
    folder: &Path,
    observer: &dyn Observer,
) -> Result<Plan> {
    let Rank::Budget(budget) = plan.rank else {
        return Ok(plan);
    };
    let spectra = spectra(&plan, checkpoint, folder, observer)?;
    Ok(plan.with_ranks(&spread(budget, &spectra)))
}

/// How many of the `budget` largest singular values of all matrices belong to each: at least one.
///
/// Keeping the largest values of a block-diagonal matrix is Eckart and Young's optimum for all blocks together: no other
/// ranks of this sum leave less of Σ‖M′‖². Equal values go by the module's name, then by their place. `spectra` descend.
pub fn spread(budget: u64, spectra: &BTreeMap<String, Vec<f32>>) -> BTreeMap<String, usize> {
    let mut ranks: BTreeMap<String, usize> =
        spectra.keys().map(|module| (module.clone(), 1)).collect();
    let mut others: Vec<(f32, &String)> = spectra
        .iter()
        .flat_map(|(module, sigma)| sigma.iter().skip(1).map(move |&x| (x, module)))
        .collect();
    // stable: what is equal stays in the order of names and places
    others.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let left = budget.saturating_sub(ranks.len() as u64);
    let left = usize::try_from(left).unwrap_or(usize::MAX);
    for (_, module) in others.into_iter().take(left) {
        *ranks
            .get_mut(module)
            .expect("every module was given its first value above") += 1;
    }
    ranks
}

/// All singular values of every planned matrix, by module.
fn spectra(
    plan: &Plan,
    checkpoint: &Checkpoint,
    folder: &Path,
    observer: &dyn Observer,
) -> Result<BTreeMap<String, Vec<f32>>> {
    std::fs::create_dir_all(folder).context("create", folder)?;
    let mut spectra = BTreeMap::new();
    let mut missing = Vec::new();
    for tensor in plan.decomposed() {
        match read(folder, tensor) {
            Some(sigma) => {
                spectra.insert(tensor.module().to_string(), sigma);
            }
            None => missing.push(tensor),
        }
    }
    if !spectra.is_empty() {
        observer.note(format!(
            "{} of {} spectra are known already",
            spectra.len(),
            plan.linear_layers
        ));
    }
    missing.sort_by_key(|tensor| std::cmp::Reverse(tensor.spectrum_flops()));
    let flops = |t: &PlannedTensor| t.spectrum_flops();
    let total: u64 = plan.decomposed().map(flops).sum();
    let left: u64 = missing.iter().map(|tensor| flops(tensor)).sum();
    observer.resume(Stage::Spectra, total - left, total, Unit::Flops);
    let cost = |tensor: &&PlannedTensor| Cost {
        memory: tensor.worker_bytes(plan.storing),
        disk: 0,
    };
    let work = |tensor: &&PlannedTensor| {
        let stored = checkpoint.read_finite(&tensor.stored_as())?;
        let sides = (tensor.shape[0], tensor.shape[1]);
        let matrix = Array2::from_shape_vec(sides, stored.to_f32())
            .expect("a tensor has as many values as its shape says");
        let sigma = linalg::spectrum(matrix.view())?;
        write(folder, tensor, &sigma)?;
        observer.advance(Stage::Spectra, tensor.spectrum_flops(), tensor.module());
        Ok((tensor.module().to_string(), sigma))
    };
    // what decomposes a matrix has room enough for its spectrum
    let computed = workers::run(&missing, plan.limits, cost, work, |results| {
        Ok(std::iter::from_fn(|| results.recv()).collect::<Vec<_>>())
    })?;
    spectra.extend(computed);
    observer.finish(Stage::Spectra);
    Ok(spectra)
}

/// Hashed, because a module's name is what a stranger's checkpoint says it is.
fn file_name(tensor: &PlannedTensor) -> String {
    format!(
        "{}.safetensors",
        &sha256_hex(tensor.module().as_bytes())[..24]
    )
}

fn path(folder: &Path, tensor: &PlannedTensor) -> PathBuf {
    folder.join(file_name(tensor))
}

const SIGMA: &str = "sigma";

/// A spectrum that an earlier run left, if it is whole.
fn read(folder: &Path, tensor: &PlannedTensor) -> Option<Vec<f32>> {
    let kept = Checkpoint::single(folder, &file_name(tensor)).ok()?;
    let sigma = kept.read(SIGMA).ok()?.to_f32();
    let short = tensor.shape[0].min(tensor.shape[1]);
    (sigma.len() == short).then_some(sigma)
}

fn write(folder: &Path, tensor: &PlannedTensor, sigma: &[f32]) -> Result<()> {
    let elements = Elements::from_f32(&[sigma.len()], sigma);
    let header = Header::compose([(SIGMA, elements.dtype, elements.shape.as_slice())])?;
    let mut writer = ShardWriter::create(&path(folder, tensor), header)?;
    writer.put(SIGMA, &elements.bytes)?;
    writer.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn named(spectra: &[&[f32]]) -> BTreeMap<String, Vec<f32>> {
        let name = |(i, sigma): (usize, &&[f32])| (format!("m{i}"), sigma.to_vec());
        spectra.iter().enumerate().map(name).collect()
    }

    fn ranks(budget: u64, spectra: &[&[f32]]) -> Vec<usize> {
        spread(budget, &named(spectra)).into_values().collect()
    }

    #[test]
    fn the_largest_values_of_the_whole_model_are_kept() {
        let spectra: [&[f32]; 3] = [&[9.0, 8.0, 7.0, 0.5], &[1.0, 0.9], &[0.1, 0.05, 0.01]];
        assert_eq!(ranks(3, &spectra), [1, 1, 1]);
        assert_eq!(ranks(5, &spectra), [3, 1, 1]);
        assert_eq!(ranks(6, &spectra), [3, 2, 1]);
        assert_eq!(ranks(8, &spectra), [4, 2, 2]);
        assert_eq!(ranks(9, &spectra), [4, 2, 3]);
        assert_eq!(ranks(u64::MAX, &spectra), [4, 2, 3]);
    }

    #[test]
    fn equal_values_go_by_name() {
        let spectra: [&[f32]; 2] = [&[2.0, 1.0, 1.0], &[2.0, 1.0, 1.0]];
        assert_eq!(ranks(3, &spectra), [2, 1]);
        assert_eq!(ranks(4, &spectra), [3, 1]);
        assert_eq!(ranks(5, &spectra), [3, 2]);
    }

    proptest! {
        /// Every way to give out the budget, tried one by one.
        #[test]
        fn no_other_ranks_of_the_same_sum_leave_less(
            spectra in proptest::collection::vec(proptest::collection::vec(0f32..10.0, 1..5), 1..4), more in 0u64..12,
        ) {
            let spectra: Vec<Vec<f32>> = spectra.into_iter().map(|mut sigma| {
                sigma.sort_by(|a, b| b.total_cmp(a));
                sigma
            }).collect();
            let borrowed: Vec<&[f32]> = spectra.iter().map(Vec::as_slice).collect();
            let all: usize = spectra.iter().map(Vec::len).sum();
            let budget = spectra.len() as u64 + more;
            let found = ranks(budget, &borrowed);
            prop_assert_eq!(found.iter().sum::<usize>(), all.min(budget as usize));
            let kept = |ranks: &[usize]| -> f64 {
                let of = |(sigma, &q): (&Vec<f32>, &usize)| -> f64 {
                    sigma[..q].iter().map(|&x| f64::from(x).powi(2)).sum()
                };
                spectra.iter().zip(ranks).map(of).sum()
            };
            let mut ways: Vec<Vec<usize>> = vec![Vec::new()];
            for sigma in &spectra {
                ways = ways.iter().flat_map(|way| {
                    (1..=sigma.len()).map(move |q| [way.as_slice(), &[q]].concat())
                }).collect();
            }
            let sum = found.iter().sum::<usize>();
            for way in ways.iter().filter(|way| way.iter().sum::<usize>() == sum) {
                // sums of a dozen squares below 100, in two orders
                prop_assert!(kept(&found) >= kept(way) - 1e-9, "{:?} keeps more than {:?}", way, found);
            }
        }
    }
}
