//! A model to run: plain, or decomposed with any mixture of adapters on it; and either with LoRAs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use crate::adapter::Mixture;
use crate::artifact::Artifact;
use crate::base::Base;
use crate::error::Result;
use crate::event::{Observer, Stage, Unit};
use crate::model::{Decoder, LowRank, ModelConfig, Tensors, Trained};
use crate::peft::{LoraAdapter, Naming};
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
    /// Another one, and PEFT's LoRAs on it, each with its factor.
    WithLoras {
        source: Box<Source>,
        loras: Vec<(LoraAdapter, f64)>,
    },
}

impl Source {
    /// Puts the LoRA in `dir` on top, times `weight`.
    ///
    /// # Errors
    /// As [`LoraAdapter::open`].
    pub fn with_lora(self, dir: &Path, weight: f64) -> Result<Self> {
        let shapes: BTreeMap<String, Vec<usize>> = self
            .base_headers()?
            .into_iter()
            .flat_map(|(_, header)| header.entries)
            .map(|entry| (entry.name, entry.shape))
            .collect();
        let config = self.config()?;
        let naming = Naming::of(&config, |name| self.has(name));
        let embedding = config.embedding(config.prefix(|name| self.has(name)));
        let shape_of = |name: &str| {
            // of a head that is the embedding there is no tensor, and a LoRA on it is for the head alone
            let tied = name.strip_suffix(".weight") == Some(config.names.head);
            let of_tied = tied.then(|| shapes.get(&embedding)).flatten();
            shapes.get(name).or(of_tied).cloned()
        };
        let untied = self.untied_head().is_some();
        let is_tied = |name: &str| {
            let head = name.strip_suffix(".weight") == Some(config.names.head);
            config.tied && !untied && (head || name == embedding)
        };
        let lora = LoraAdapter::open(dir, naming, shape_of, is_tied)?;
        let (source, mut loras) = match self {
            Self::WithLoras { source, loras } => (source, loras),
            source => (Box::new(source), Vec::new()),
        };
        loras.push((lora, weight));
        Ok(Self::WithLoras { source, loras })
    }

    /// Where config and tokenizer lie.
    pub fn dir(&self) -> &Path {
        match self {
            Self::Model(base) => &base.dir,
            Self::Decomposition { artifact, .. } => &artifact.dir,
            Self::WithLoras { source, .. } => source.dir(),
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
            Self::WithLoras { source, .. } => source.base_headers(),
        }
    }

    /// A head that the base ties to its embedding, and the decomposition does not.
    pub fn untied_head(&self) -> Option<&str> {
        match self {
            Self::Model(_) => None,
            Self::Decomposition { artifact, .. } => artifact.untied().next().map(|(head, _)| head),
            Self::WithLoras { source, .. } => source.untied_head(),
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
            Self::WithLoras { source, loras } => {
                return with_whole(loras, name, source.tensor(name)?);
            }
        };
        Ok(mixture.tensor_f32(name, &elements).unwrap_or(elements))
    }

    fn spectrum(&self, module: &str) -> Result<Option<(Factors, Change)>> {
        match self {
            Self::Model(_) => Ok(None),
            Self::WithLoras { source, .. } => source.spectrum(module),
            Self::Decomposition { artifact, mixture } => match artifact.svd.modules.get(module) {
                None => Ok(None),
                Some(record) => Ok(Some((
                    artifact.factors(module)?,
                    mixture.change(module, record.q),
                ))),
            },
        }
    }

    fn low_rank(&self, module: &str) -> Vec<LowRank> {
        let Self::WithLoras { loras, .. } = self else {
            return Vec::new();
        };
        let on_it = loras
            .iter()
            .filter_map(|(lora, weight)| Some((lora.pairs.get(module)?, weight)));
        on_it
            .map(|(pair, weight)| LowRank {
                scale: weight * pair.scale,
                ..pair.clone()
            })
            .collect()
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Model(base) => base.checkpoint.inventory.contains(name),
            Self::Decomposition { artifact, .. } => artifact.base_entry(name).is_some(),
            Self::WithLoras { source, .. } => source.has(name),
        }
    }

    fn path_of(&self, name: &str) -> PathBuf {
        match self {
            Self::Model(base) => base.checkpoint.path_of(name),
            Self::Decomposition { artifact, .. } => artifact.dir.clone(),
            Self::WithLoras { source, .. } => source.path_of(name),
        }
    }
}

/// base + Σ weight·(carried − base), as PEFT has it for one LoRA: whole tensors take the base's place.
fn with_whole(loras: &[(LoraAdapter, f64)], name: &str, base: Elements) -> Result<Elements> {
    let carried: Vec<(Vec<f32>, f64)> = loras
        .iter()
        .filter_map(|(lora, weight)| Some((lora.whole.get(name)?.to_f32(), *weight)))
        .collect();
    if carried.is_empty() {
        return Ok(base);
    }
    let mut sums = base.to_f32();
    for (at, sum) in sums.iter_mut().enumerate() {
        let x = f64::from(*sum);
        let moved = carried
            .iter()
            .map(|(t, weight)| weight * (f64::from(t[at]) - x));
        *sum = (x + moved.sum::<f64>()) as f32;
    }
    Ok(Elements::from_f32(&base.shape, &sums))
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
