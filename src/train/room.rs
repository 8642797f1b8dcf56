//! What training takes of memory, and what is said where there is not so much.

use super::{Options, device_name};
use crate::error::{Error, Result};
use crate::format::FactorsDtype;
use crate::model::memory::{Step, Training};
use crate::plan::{Plan, PlanOptions, PlannedTensor};
use crate::source::Source;
use crate::weights::Inventory;
use crate::weights::checkpoint::WeightFile;

/// A device without room, in the plan's numbers.
pub(super) fn with_plan(error: Error, source: &Source, options: &Options) -> Error {
    if !error.is_out_of_device_memory() {
        return error;
    }
    let planned = planned(source, options, options.length);
    planned.map_or(error, |planned| no_room(&planned, options))
}

fn no_room(planned: &Training, options: &Options) -> Error {
    Error::DeviceMemory {
        device: device_name(&options.device),
        weights: planned.weights_bytes,
        moving: planned.moving_bytes,
        activations: planned.activations_bytes,
        passing: planned.passing_bytes,
    }
}

/// Refuses what this machine's memory cannot hold by far, before the kernel ends it without a word.
pub(super) fn refuse_too_large(source: &Source, options: &Options, length: usize) -> Result<()> {
    if !options.device.is_cpu() {
        return Ok(());
    }
    match (planned(source, options, length), machine_bytes()) {
        (Some(planned), Some(there)) if outgrows(&planned, there) => {
            Err(no_room(&planned, options))
        }
        _ => Ok(()),
    }
}

/// Whether all that is planned takes more than twice a memory.
fn outgrows(planned: &Training, there: u64) -> bool {
    let takes = [
        planned.weights_bytes,
        planned.moving_bytes,
        planned.activations_bytes,
        planned.passing_bytes,
    ];
    takes.into_iter().fold(0, u64::saturating_add) / 2 > there
}

/// This machine's memory (proc_meminfo(5)).
fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// What training takes of each kind, with windows of this length.
fn planned(source: &Source, options: &Options, length: usize) -> Option<Training> {
    let headers = source.base_headers().ok()?;
    let files = headers.into_iter();
    let files = files.map(|(name, header)| WeightFile { name, header });
    let inventory = Inventory::new(source.dir(), files.collect()).ok()?;
    let config = source.config().ok()?;
    let svd = match source {
        Source::Decomposition { artifact, .. } => Some(&artifact.svd),
        Source::Model(_) | Source::WithLoras { .. } => None,
    };
    let modules = svd.map(|svd| &svd.modules);
    let wanted = PlanOptions {
        untie_head: source.untied_head().is_some(),
        ..PlanOptions::default()
    };
    let plan = Plan::new(source.dir(), &config, &inventory, &wanted).ok()?;
    let step = Step {
        method: options.method,
        norms: options.norms,
        embeddings: options.embeddings,
        // of each process
        batch: options.batch / options.group.size(),
        at_once: options.micro_batch.unwrap_or(usize::MAX),
        length,
        recompute: options.recompute,
        on_gpu: options.device.is_cuda(),
    };
    let factors = svd.map_or(FactorsDtype::default(), |svd| svd.factors);
    // what was decomposed, and how far, may be a choice of some weights
    let kept = |tensor: &PlannedTensor| match modules {
        Some(modules) => modules.get(tensor.module()).map(|record| record.q),
        None => tensor.kept_at_most(),
    };
    plan.with_training(&config, &step, factors, kept).training
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Base;
    use crate::model::Method;
    use candle_core::Error::Msg;
    use std::path::Path;

    #[test]
    fn a_device_without_memory_is_told_from_other_failures() {
        // as cudarc words it
        let full = Msg(r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#.into());
        assert!(Error::Candle(full).is_out_of_device_memory());
        // a cuBLAS of its own for one more queue takes memory too
        let none = Msg("CublasError(CUBLAS_STATUS_ALLOC_FAILED)".into());
        assert!(Error::Candle(none).is_out_of_device_memory());
        let other = Msg(r#"DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal address")"#.into());
        assert!(!Error::Candle(other).is_out_of_device_memory());
    }

    #[test]
    fn what_takes_twice_a_memory_outgrows_it() {
        let planned = |weights_bytes, activations_bytes| Training {
            method: "sigma",
            batch: 1,
            micro_batch: None,
            length: 2,
            recompute: false,
            parameters: 1,
            weights_bytes,
            moving_bytes: 12,
            activations_bytes,
            passing_bytes: 8,
            peak_bytes: u64::MAX,
        };
        assert!(!outgrows(&planned(1000, 980), 1000));
        assert!(outgrows(&planned(1000, 982), 1000));
        assert!(outgrows(&planned(0, u64::MAX), u64::MAX / 4));
    }

    #[test]
    fn the_plan_of_what_does_not_fit_is_that_of_the_model() {
        let base = Base::open(Path::new("fixtures/shakespeare-1m"), None, None);
        let source = Source::Model(base.expect("the fixture"));
        let of = |batch| {
            let options = Options {
                method: Method::Full,
                batch,
                ..Options::default()
            };
            planned(&source, &options, options.length).expect("a plan")
        };
        let (one, two) = (of(1), of(2));
        let weights = source.base_headers().expect("headers");
        let bytes: u64 = weights.iter().map(|(_, header)| header.file_bytes()).sum();
        // what moves is f32, and the moments and the gradient are thrice that
        assert!(one.weights_bytes > bytes && one.moving_bytes > one.weights_bytes);
        assert_eq!(two.activations_bytes, 2 * one.activations_bytes);
        assert_eq!(two.moving_bytes, one.moving_bytes);
    }
}
