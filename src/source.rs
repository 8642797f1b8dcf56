//! A model to run: plain, or decomposed with any mixture of adapters on it; and either with LoRAs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Map, Value};

use crate::adapter::{Mixture, moved};
use crate::artifact::Artifact;
use crate::base::Base;
use crate::error::{Error, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::Pin;
use crate::model::{Decoder, LowRank, ModelConfig, Tensors, Trained};
use crate::peft::{LoraAdapter, Naming};
use crate::report;
use crate::split::{Change, Factors};
use crate::weights::element::is_float;
use crate::weights::{Elements, Entry, Header, dtype_name};

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
        let entries: Vec<Entry> = (self.base_headers()?.into_iter())
            .flat_map(|(_, header)| header.entries)
            .collect();
        let shapes: BTreeMap<String, Vec<usize>> = (entries.iter())
            .map(|entry| (entry.name.clone(), entry.shape.clone()))
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
        for entry in entries.iter().filter(|entry| !is_float(entry.dtype)) {
            let module = entry.name.strip_suffix(".weight").unwrap_or_default();
            if lora.pairs.contains_key(module) || lora.whole.contains_key(&entry.name) {
                return Err(Error::Dtype {
                    tensor: entry.name.clone(),
                    path: self.path_of(&entry.name),
                    expected: "F32, F16 or BF16".into(),
                    found: dtype_name(entry.dtype),
                });
            }
        }
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

    /// The base, and what its files are.
    pub fn pin(&self, observer: &dyn Observer) -> Result<Pin> {
        match self {
            Self::Model(base) => base.pin(observer),
            Self::Decomposition { artifact, .. } => Ok(artifact.svd.base.clone()),
            Self::WithLoras { source, .. } => source.pin(observer),
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

    /// The decomposition, if it is one, and its adapters.
    pub fn decomposition(&self) -> Option<(&Artifact, &Mixture)> {
        match self {
            Self::Model(_) => None,
            Self::Decomposition { artifact, mixture } => Some((artifact, mixture)),
            Self::WithLoras { source, .. } => source.decomposition(),
        }
    }

    /// The model, if it was never decomposed.
    pub fn model(&self) -> Option<&Base> {
        match self {
            Self::Model(base) => Some(base),
            Self::Decomposition { .. } => None,
            Self::WithLoras { source, .. } => source.model(),
        }
    }

    /// PEFT's LoRAs on it, each with its factor.
    pub fn loras(&self) -> &[(LoraAdapter, f64)] {
        match self {
            Self::WithLoras { loras, .. } => loras,
            _ => &[],
        }
    }

    /// The base's tensor of that name, byte for byte.
    pub fn base_tensor(&self, name: &str) -> Result<Elements> {
        match self {
            Self::Model(base) => base.checkpoint.read_finite(name),
            Self::Decomposition { artifact, .. } => artifact.base_tensor(name),
            Self::WithLoras { source, .. } => source.base_tensor(name),
        }
    }

    /// The LoRAs' own of a tensor that they carry whole, each with its factor: x + Σ factor·(carried − x) is what PEFT makes of
    /// one, whose tensor takes the base's place.
    pub fn carried(&self, name: &str) -> Vec<(f64, Vec<f32>)> {
        let loras = self.loras().iter();
        let carried =
            loras.filter_map(|(lora, weight)| Some((*weight, lora.whole.get(name)?.to_f32())));
        carried.collect()
    }

    /// The sections of its report that tell of what is made from it too.
    pub fn inherited(&self) -> Result<Map<String, Value>> {
        match self.decomposition() {
            Some(_) => report::inherited(self.dir()),
            // how a model was made that is now a base is that model's story
            None => Ok(Map::new()),
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
            Self::WithLoras { source, .. } => {
                let elements = source.tensor(name)?;
                let carried = self.carried(name);
                if carried.is_empty() {
                    return Ok(elements);
                }
                let moved = moved(elements.to_f32().into_iter().map(f64::from), &carried);
                let moved: Vec<f32> = moved.into_iter().map(|x| x as f32).collect();
                return Ok(Elements::from_f32(&elements.shape, &moved));
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
        let on_it = (self.loras().iter())
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

/// The sha256 of the weight files that a LoRA was made for, if its report tells.
pub fn base_of_lora(lora: &Path) -> Result<Option<Value>> {
    let report = report::read(lora)?;
    let bases = ["train", "decompose"].map(|section| report.get(section)?.pointer("/base/sha256"));
    Ok(bases.into_iter().flatten().next().cloned())
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
