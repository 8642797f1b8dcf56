//! Whether a checkpoint is the one that its config describes.

use std::path::Path;

use super::PlannedTensor;
use crate::error::{Error, Result};
use crate::format::{ModuleTensors, base_header_tensor};
use crate::model::ModelConfig;
use crate::weights::checkpoint::WeightFile;
use crate::weights::element::is_float;
use crate::weights::{Dtype, Header, Inventory, dtype_name};

/// The headers a checkpoint of this config would have, for planning without one.
pub fn expected_inventory(config: &ModelConfig, dtype: Dtype) -> Result<Inventory> {
    let tensors = config.tensors(config.names.prefix);
    let header = Header::compose(
        tensors
            .iter()
            .map(|(name, shape)| (name.as_str(), dtype, shape.as_slice())),
    )?;
    let file = WeightFile {
        name: "model.safetensors".into(),
        header,
    };
    Inventory::new(&config.path, vec![file])
}

/// Refuses weights that are not those the config describes.
pub fn check_shapes(root: &Path, config: &ModelConfig, inventory: &Inventory) -> Result<()> {
    for (tensor, expected) in config.tensors(config.prefix(|name| inventory.contains(name))) {
        match inventory.get(&tensor) {
            None => {
                return Err(Error::TensorMissing {
                    tensor,
                    path: root.into(),
                });
            }
            Some((file, entry)) if entry.shape != expected => {
                return Err(Error::Shape {
                    tensor,
                    path: root.join(&file.name),
                    expected,
                    found: entry.shape.clone(),
                });
            }
            Some((file, entry)) if !is_float(entry.dtype) => {
                return Err(Error::Dtype {
                    tensor,
                    path: root.join(&file.name),
                    expected: "F32, F16 or BF16".into(),
                    found: dtype_name(entry.dtype),
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// A stranger's tensor must not be called like a part of the decomposition it is carried along in.
pub(super) fn refuse_taken_names(
    root: &Path,
    inventory: &Inventory,
    tensors: &[PlannedTensor],
) -> Result<()> {
    let modules = tensors.iter().filter(|t| t.is_decomposed());
    let parts = modules.flat_map(|t| ModuleTensors::of(t.module()).all());
    let headers = inventory
        .files
        .iter()
        .map(|file| base_header_tensor(&file.name));
    match parts.chain(headers).find(|name| inventory.contains(name)) {
        Some(tensor) => Err(Error::NameTaken {
            tensor,
            path: root.into(),
        }),
        None => Ok(()),
    }
}
