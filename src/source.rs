//! A model to run: plain, or decomposed with any mixture of adapters on it.

use std::path::Path;

use crate::adapter::Mixture;
use crate::artifact::Artifact;
use crate::base::Base;
use crate::error::Result;
use crate::model::{ModelConfig, Tensors};
use crate::plan;
use crate::split::Factors;
use crate::weights::Elements;

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
        Ok(mixture.tensor(name, &elements).unwrap_or(elements))
    }

    fn spectrum(&self, module: &str) -> Result<Option<(Factors, Vec<f32>)>> {
        match self {
            Self::Model(_) => Ok(None),
            Self::Decomposition { artifact, mixture } => match artifact.svd.modules.get(module) {
                None => Ok(None),
                Some(record) => Ok(Some((
                    artifact.factors(module)?,
                    mixture.delta(module, record.q),
                ))),
            },
        }
    }

    fn prefix(&self) -> &'static str {
        match self {
            Self::Model(base) => plan::prefix(&base.checkpoint.inventory),
            Self::Decomposition { artifact, .. } => {
                if artifact.holds("embed_tokens.weight") {
                    ""
                } else {
                    "model."
                }
            }
        }
    }
}
