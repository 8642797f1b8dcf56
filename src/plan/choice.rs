//! Which tensors are decomposed, and why the others are not.

use std::path::Path;

use super::name::{Pattern, Role, role};
use super::{Action, PlanOptions, PlannedTensor};
use crate::error::{Error, Result};
use crate::format::Rank;
use crate::model::ModelConfig;
use crate::weights::checkpoint::WeightFile;
use crate::weights::element::is_float;
use crate::weights::{Entry, Inventory, dtype_name};

/// A tensor of a checkpoint, decomposed or copied.
pub(super) fn planned(
    root: &Path,
    file: &WeightFile,
    entry: &Entry,
    config: &ModelConfig,
    options: &PlanOptions,
) -> Result<PlannedTensor> {
    let role = role(&entry.name);
    let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
    let linear = matches!(role, Role::Linear | Role::Head) && entry.shape.len() == 2;
    let copied = if !linear {
        Some(match role {
            Role::Norm => "a norm, not a matrix",
            Role::Bias => "a bias, carried along",
            Role::Embedding if config.tied && !options.untie_head => {
                "the embedding, and the head tied to it"
            }
            Role::Embedding => "the embedding",
            _ => "not a linear weight",
        })
    } else if role == Role::Head && config.tied {
        Some("tied to the embedding: decomposing it would untie the model")
    } else {
        left_out(module, options)
    };
    let tensor = PlannedTensor {
        name: entry.name.clone(),
        shape: entry.shape.clone(),
        dtype: dtype_name(entry.dtype),
        bytes: entry.bytes,
        role,
        action: Action::Copy,
        q: None,
        q_max: 0,
        tied_to: None,
        reason: copied.unwrap_or("empty").into(),
    };
    if copied.is_some() || entry.elements() == 0 {
        return Ok(tensor);
    }
    refuse_other_dtypes(root, file, entry)?;
    Ok(decomposed(tensor, options.rank))
}

/// A matrix that was chosen, with what is known of its rank.
fn decomposed(tensor: PlannedTensor, rank: Rank) -> PlannedTensor {
    let short = tensor.shape[0].min(tensor.shape[1]);
    let kind = match &tensor.tied_to {
        Some(module) => format!("linear, untied from {module}"),
        None => "linear".into(),
    };
    let q = rank.known(short);
    let reason = match (q, rank) {
        (Some(q), _) => format!("{kind}, {q} of {short} triplets"),
        (None, Rank::Energy(share)) => {
            format!("{kind}, the fewest of {short} triplets that hold {share} of the energy")
        }
        (None, _) => format!("{kind}, up to {short} triplets of the budget"),
    };
    PlannedTensor {
        action: Action::Decompose,
        q,
        q_max: rank.at_most(short),
        reason,
        ..tensor
    }
}

/// Why the patterns leave a module out, if they do.
fn left_out(module: &str, options: &PlanOptions) -> Option<&'static str> {
    let any = |patterns: &[Pattern]| patterns.iter().any(|p| p.matches(module));
    if any(&options.exclude) {
        Some("excluded")
    } else if !options.include.is_empty() && !any(&options.include) {
        Some("not included")
    } else {
        None
    }
}

fn refuse_other_dtypes(root: &Path, file: &WeightFile, entry: &Entry) -> Result<()> {
    if is_float(entry.dtype) {
        return Ok(());
    }
    Err(Error::Dtype {
        tensor: entry.name.clone(),
        path: root.join(&file.name),
        expected: "F32, F16 or BF16".into(),
        found: dtype_name(entry.dtype),
    })
}

/// The head as a weight of its own: a copy of the embedding it was tied to.
pub(super) fn untied_head(
    root: &Path,
    config: &ModelConfig,
    inventory: &Inventory,
    options: &PlanOptions,
) -> Result<PlannedTensor> {
    let refuse = |reason: &str| Error::HeadNotTied {
        path: root.into(),
        reason: reason.into(),
    };
    if !config.tied {
        return Err(refuse(
            "it is a weight of its own already, and decomposed as such",
        ));
    }
    let prefix = config.prefix(|name| inventory.contains(name));
    if prefix.is_empty() {
        // transformers takes such a checkpoint for the inner model, and would look for the head inside it
        return Err(refuse(
            "the checkpoint holds the inner model alone (no `model.` before its names), which has no place for a head",
        ));
    }
    let head = config.names.head;
    if let Some(reason) = left_out(head, options) {
        return Err(refuse(&format!("`{head}` is {reason}")));
    }
    let embedding = format!("{prefix}{}", config.names.embedding);
    let source = config.embedding(prefix);
    let (file, entry) = inventory.get(&source).ok_or_else(|| Error::TensorMissing {
        tensor: source.clone(),
        path: root.into(),
    })?;
    refuse_other_dtypes(root, file, entry)?;
    let name = format!("{head}.weight");
    if let Some((_, stored)) = inventory.get(&name)
        && (stored.dtype, &stored.shape) != (entry.dtype, &entry.shape)
    {
        return Err(refuse(&format!(
            "the stored `{name}` ({} {:?}) is not a copy of `{source}` ({} {:?})",
            dtype_name(stored.dtype),
            stored.shape,
            dtype_name(entry.dtype),
            entry.shape
        )));
    }
    let head = PlannedTensor {
        name,
        shape: entry.shape.clone(),
        dtype: dtype_name(entry.dtype),
        bytes: entry.bytes,
        role: Role::Head,
        action: Action::Decompose,
        q: None,
        q_max: 0,
        tied_to: Some(embedding),
        reason: String::new(),
    };
    Ok(decomposed(head, options.rank))
}
