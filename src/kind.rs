//! What a directory holds.

use std::path::Path;

use crate::{adapter, artifact, peft};

/// Not `model.safetensors`: `AutoModel.from_pretrained` would take M′ for the model.
pub const SVD_TRAINING_WEIGHTS: &str = "svd_training.safetensors";

/// The weights of what has neither an index nor a model's names: adapters, and exports.
pub const SINGLE_FILES: [&str; 3] = [
    adapter::WEIGHTS_FILE,
    peft::LORA_WEIGHTS,
    SVD_TRAINING_WEIGHTS,
];

/// What a directory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Decomposition,
    Adapter,
    Model,
    /// For PEFT: an export, or trained as one.
    Lora,
    /// An export for svd-training.
    StateDict,
}

impl Kind {
    /// By the file that only it has; a directory with none of them is taken for a model.
    pub fn of(dir: &Path) -> Self {
        if artifact::is_artifact(dir) {
            Self::Decomposition
        } else if adapter::is_adapter(dir) {
            Self::Adapter
        } else if dir.join(peft::LORA_CONFIG).exists() {
            Self::Lora
        } else if dir.join(SVD_TRAINING_WEIGHTS).exists() {
            Self::StateDict
        } else {
            Self::Model
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Decomposition => "decomposition",
            Self::Adapter => "adapter",
            Self::Model => "model",
            Self::Lora => "lora",
            Self::StateDict => "state-dict",
        }
    }
}
