//! What becomes of what moved: an adapter of a decomposition, or one of PEFT.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::run::{Run, numbers};
use super::{Options, Sums, groups};
use crate::adapter::{self, Adapter, AdapterConfig};
use crate::artifact::Artifact;
use crate::base::{Standing, card_facts, side_sums};
use crate::error::{Error, Result};
use crate::event::Observer;
use crate::format::{Origin, Pin};
use crate::json::Tool;
use crate::model::method::{LORA_A, LORA_B, RHO};
use crate::model::{Decoder, Lora, Method, Tensors};
use crate::peft::{self, LORA_CONFIG, LORA_WEIGHTS, Naming};
use crate::source::Source;
use crate::sum::sha256_hex;
use crate::weights::{Elements, Header, ShardWriter};

/// What becomes of what moved.
pub enum Kept<'a> {
    /// An adapter that belongs to a decomposition.
    Adapter {
        artifact: &'a Artifact,
        origin: Origin,
    },
    /// An adapter of PEFT, of whatever the base is.
    Lora {
        source: &'a Source,
        lora: Lora,
        base: Pin,
    },
}

impl<'a> Kept<'a> {
    /// Refuses a method that `source` cannot be trained by.
    pub fn of(
        source: &'a Source,
        pin: Option<Origin>,
        options: &Options,
        observer: &dyn Observer,
    ) -> Result<Self> {
        match (options.method, source) {
            (Method::Lora(_), _) if options.embeddings => Err(Error::Parse {
                what: "what --method lora moves",
                value: "embeddings".into(),
                reason: "a LoRA carries norms beside linear layers, and no trained embedding"
                    .into(),
            }),
            (_, Source::WithLoras { loras, .. }) => Err(Error::Adapter {
                path: loras[0].0.dir.clone(),
                reason: "what stands on a LoRA is not trained".into(),
            }),
            (Method::Lora(lora), _) => Ok(Self::Lora {
                source,
                lora,
                base: source.pin(observer)?,
            }),
            (_, Source::Decomposition { artifact, .. }) => Ok(Self::Adapter {
                artifact,
                origin: pin.unwrap_or(Origin {
                    repo: None,
                    revision: None,
                    content_sha256: artifact.content_sha256.clone(),
                }),
            }),
            (_, Source::Model(base)) => Err(Error::NotAnArtifact {
                path: base.dir.clone(),
            }),
        }
    }

    /// The decomposition that is needed to use what is written.
    pub fn decomposition(&self) -> Option<&Origin> {
        match self {
            Self::Adapter { origin, .. } => Some(origin),
            Self::Lora { .. } => None,
        }
    }

    /// The most triplets that a weight has.
    pub fn largest_rank(&self) -> usize {
        match self {
            Self::Adapter { artifact, .. } => {
                let ranks = artifact.svd.modules.values().map(|record| record.q);
                ranks.max().unwrap_or_default()
            }
            Self::Lora { .. } => usize::MAX,
        }
    }

    /// The plain model that is needed to use it.
    pub fn standing(&self) -> Option<Standing> {
        match self {
            Self::Lora {
                source: Source::Model(model),
                base,
                ..
            } => Some(Standing {
                base: base.clone(),
                base_card: card_facts(&model.dir),
            }),
            _ => None,
        }
    }

    /// Writes it to `out`. Returns the file of the weights, its sha256, and the sums that the report has to hold.
    pub fn save(
        &self,
        run: &Run,
        out: &Path,
        options: &Options,
        observer: &dyn Observer,
    ) -> Result<(PathBuf, String, Sums)> {
        match self {
            Self::Adapter { artifact, origin } => {
                let config = AdapterConfig {
                    schema: adapter::SCHEMA,
                    method: options.method.name().into(),
                    trained: groups(options),
                    decomposition: origin.clone(),
                    base: artifact.svd.base.clone(),
                    weights_sha256: None,
                    tool: Tool::this(),
                    sha256: None,
                };
                let sum = adapter(run.decoder, artifact, config, out)?.save()?;
                Ok((out.join(adapter::WEIGHTS_FILE), sum, Sums::default()))
            }
            Self::Lora { source, lora, base } => {
                let sums = save_lora(run.decoder, source, *lora, base, out, observer)?;
                Ok((
                    out.join(LORA_WEIGHTS),
                    sums.sha256[LORA_WEIGHTS].clone(),
                    sums,
                ))
            }
        }
    }
}

/// What moved, as an adapter of `artifact`.
fn adapter(
    decoder: &Decoder,
    artifact: &Artifact,
    config: AdapterConfig,
    out: &Path,
) -> Result<Adapter> {
    let mut adapter = Adapter {
        dir: out.into(),
        config,
        delta: BTreeMap::new(),
        core: BTreeMap::new(),
        tensors: BTreeMap::new(),
    };
    for (name, variable) in &decoder.variables {
        let values = numbers(variable)?;
        match name.strip_suffix(RHO) {
            Some(module) => {
                // the very product that the layer formed
                let sigma = artifact.sigma(module)?;
                let delta = values.iter().zip(&sigma).map(|(rho, s)| rho * s).collect();
                adapter.delta.insert(module.into(), delta);
            }
            None => adapter.insert(name, Elements::from_f32(variable.dims(), &values)),
        }
    }
    Ok(adapter)
}

/// What moved, as PEFT loads it.
fn save_lora(
    decoder: &Decoder,
    source: &Source,
    lora: Lora,
    base: &Pin,
    out: &Path,
    observer: &dyn Observer,
) -> Result<Sums> {
    let naming = Naming::of(&source.config()?, |name| source.has(name));
    let in_model = |module: &str| naming.in_model(module);
    let (mut modules, mut saved) = (Vec::new(), Vec::new());
    let mut tensors: BTreeMap<String, Elements> = BTreeMap::new();
    for (variable_name, variable) in &decoder.variables {
        let stored = Elements::from_f32(variable.dims(), &numbers(variable)?);
        let name = if let Some(module) = variable_name.strip_suffix(LORA_A) {
            modules.push((module, in_model(module)));
            peft::Names::of(&in_model(module)).a
        } else if let Some(module) = variable_name.strip_suffix(LORA_B) {
            peft::Names::of(&in_model(module)).b
        } else {
            let weight = variable_name.strip_suffix(".weight");
            let module = weight.expect("what moves beside A and B is a norm's weight");
            // PEFT carries a module whole, and asks for all of it
            let bias = format!("{module}.bias");
            if source.has(&bias) {
                let bias = source.tensor(&bias)?.to_f32();
                let name = peft::saved_name(&format!("{}.bias", in_model(module)));
                tensors.insert(name, Elements::from_f32(&[bias.len()], &bias));
            }
            saved.push(in_model(module));
            peft::saved_name(&format!("{}.weight", in_model(module)))
        };
        tensors.insert(name, stored);
    }
    peft::Expected {
        rank: lora.rank,
        norms: saved.len(),
        untied: source.untied_head(),
        base,
    }
    .say(observer);
    let layouts = tensors.iter();
    let header =
        Header::compose(layouts.map(|(name, e)| (name.as_str(), e.dtype, e.shape.as_slice())))?;
    let mut writer = ShardWriter::create(&out.join(LORA_WEIGHTS), header)?;
    let mut tensor_sha256 = BTreeMap::new();
    for (name, elements) in &tensors {
        writer.put(name, &elements.bytes)?;
        tensor_sha256.insert(name.clone(), sha256_hex(&elements.bytes));
    }
    let sum = writer.finish()?;
    let headers = source.base_headers()?;
    let entries = headers.iter().flat_map(|(_, header)| &header.entries);
    let names: Vec<(&str, &str)> = modules
        .iter()
        .map(|(m, name)| (*m, name.as_str()))
        .collect();
    // the config last: without it the directory is no adapter
    peft::Config {
        base,
        rank: lora.rank,
        alpha: lora.alpha,
        target_modules: &peft::target_modules(entries, &names),
        modules_to_save: &saved,
    }
    .write(out)?;
    Ok(Sums {
        sha256: [(LORA_WEIGHTS.into(), sum)].into(),
        tensor_sha256,
        side_sha256: side_sums(out, vec![LORA_CONFIG.into()])?,
    })
}
