//! A model to run: plain, or decomposed with any mixture of adapters on it.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use crate::adapter::Mixture;
use crate::artifact::Artifact;
use crate::base::Base;
use crate::error::Result;
use crate::event::{Observer, Stage, Unit};
use crate::model::{Decoder, ModelConfig, Tensors, Trained};
use crate::split::{Change, Factors};
use crate::weights::{Elements, Header};

/// What `evaluate` and `train` load a decoder from.
#[allow(clippy::large_enum_variant)] // there is one of them in a process
pub enum Source {
    Model(Base),
    Decomposition {
        artifact: Artifact,
        mixture: Mixture,
    },
}

impl Source {
    /// Where config and tokenizer lie.
    pub fn dir(&self) -> &Path {
        match self {
            Self::Model(base) => &base.dir,
            Self::Decomposition { artifact, .. } => &artifact.dir,
        }
    }

    /// The headers of the base's files.
    pub fn base_headers(&self) -> Result<Vec<(String, Header)>> {
        match self {
            Self::Model(base) => {
                let files = base.checkpoint.inventory.files.iter();
                Ok(files.map(|f| (f.name.clone(), f.header.clone())).collect())
            }
            Self::Decomposition { artifact, .. } => artifact.base_headers(),
        }
    }

    pub fn config(&self) -> Result<ModelConfig> {
        ModelConfig::read(self.dir())
    }
}

impl Tensors for Source {
    fn tensor(&self, name: &str) -> Result<Elements> {
        let (elements, mixture) = match self {
            Self::Model(base) => return base.checkpoint.read(name),
            Self::Decomposition { artifact, mixture } => (artifact.base_tensor(name)?, mixture),
        };
        Ok(mixture.tensor_f32(name, &elements).unwrap_or(elements))
    }

    fn spectrum(&self, module: &str) -> Result<Option<(Factors, Change)>> {
        match self {
            Self::Model(_) => Ok(None),
            Self::Decomposition { artifact, mixture } => match artifact.svd.modules.get(module) {
                None => Ok(None),
                Some(record) => Ok(Some((
                    artifact.factors(module)?,
                    mixture.change(module, record.q),
                ))),
            },
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Model(base) => base.checkpoint.inventory.contains(name),
            Self::Decomposition { artifact, .. } => artifact.base_entry(name).is_some(),
        }
    }

    fn path_of(&self, name: &str) -> PathBuf {
        match self {
            Self::Model(base) => base.checkpoint.path_of(name),
            Self::Decomposition { artifact, .. } => artifact.dir.clone(),
        }
    }
}

/// Loads the decoder of a source, on one device, in the dtype it computes best in.
pub fn load(
    source: &Source,
    trained: Trained,
    device: &Device,
    observer: &dyn Observer,
) -> Result<Decoder> {
    crate::linalg::single_threaded_blas();
    observer.start(Stage::Load, 1, Unit::Steps);
    // bf16 on a CPU is emulated and slower than f32 (2026-11); a GPU has it in hardware
    let dtype = if device.is_cuda() {
        DType::BF16
    } else {
        DType::F32
    };
    let decoder = Decoder::load(&source.config()?, source, trained, device, dtype)?;
    observer.finish(Stage::Load);
    Ok(decoder)
}
