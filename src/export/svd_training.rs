//! The state dict of svd-training 0.0.2: `SVDLinear` computes `x @ (weight + U @ diag(sigma) @ V.T).T`.
//!
//! Its `create_from_model(model, rank_fraction)` puts one in the place of every projection of every layer and of the
//! head, all of q = int(rank_fraction · min(m, n)) triplets; `load_state_dict` then wants exactly these shapes. What our
//! decomposition has fewer of is filled up with zeros, which changes nothing.

use serde::{Deserialize, Serialize};

use super::{File, Job};
use crate::base::copy_side_files;
use crate::error::{Error, Result};
use crate::event::{Stage, Unit};
use crate::format::{BASE_CONFIG, ModuleRecord, Rank, untie};
use crate::json;
use crate::kind::SVD_TRAINING_WEIGHTS;
use crate::split::Factors;
use crate::weights::element::is_float;
use crate::weights::shard::write_atomically;
use crate::weights::{Dtype, Elements, Header, ShardWriter, dtype_name};
use crate::workers;
use crate::workspace::{bytes_in, check_free_space};

/// The layers that `create_from_model` replaces, beside the head (`get_mlp_names` in its `model_keys.py`).
const REPLACED: [&str; 9] = [
    "mlp.down_proj",
    "mlp.up_proj",
    "mlp.gate_proj",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_up_proj",
    "self_attn.qkv_proj",
];

/// The facts of a state dict.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SvdTrainingFacts {
    /// What `create_from_model` must be given so that its shapes are these.
    pub rank_fraction: f64,
    /// Triplets of the decomposition, of all layers.
    pub triplets: usize,
    /// Triplets of zeros beside them.
    pub zeros: usize,
    /// Layers of svd-training that the decomposition left whole: all their triplets are zeros, and stay so in training.
    pub whole: Vec<String>,
}

/// What will be written: decided and checked before the first byte.
pub struct Plan {
    rank_fraction: f64,
    items: Vec<Item>,
}

enum Item {
    Layer(Layer),
    /// By its name in the checkpoint, and in the model.
    Carried {
        tensor: String,
        name: String,
        shape: Vec<usize>,
    },
}

/// One `SVDLinear`.
struct Layer {
    /// The tensor that is M: of a tied head the embedding.
    tensor: String,
    name: String,
    shape: [usize; 2],
    /// In the decomposition, if it is in there.
    module: Option<String>,
    /// Triplets of the decomposition.
    held: usize,
    /// Zeros included.
    q: usize,
}

impl Plan {
    pub fn new(job: &Job) -> Result<Self> {
        let mut items = items(job)?;
        let rank_fraction = rank_fraction(job.artifact.svd.rank, &items);
        for item in &mut items {
            if let Item::Layer(layer) = item {
                layer.q = theirs(rank_fraction, layer.short());
            }
        }
        Ok(Self {
            rank_fraction,
            items,
        })
    }

    pub fn write(self, job: &Job) -> Result<(SvdTrainingFacts, File)> {
        let facts = self.facts();
        if !facts.whole.is_empty() {
            job.observer.warn(format!(
                "svd-training will not train {}: the decomposition holds no singular vectors of it",
                facts.whole.join(", ")
            ));
        }
        let header = self.header()?;
        let bytes = header.file_bytes();
        check_free_space(job.out, bytes.saturating_sub(bytes_in(job.out)))?;
        let config = config(&json::read(&job.artifact.dir.join(BASE_CONFIG))?);
        let mut writer = ShardWriter::create(&job.out.join(SVD_TRAINING_WEIGHTS), header)?;
        job.observer.start(Stage::Export, bytes, Unit::Bytes);
        workers::in_order(
            &self.items,
            job.threads,
            |item| item.tensors(job),
            |item, tensors| {
                for (name, values) in tensors {
                    writer.put(&name, &values.bytes)?;
                    let written = values.bytes.len() as u64;
                    job.observer.advance(Stage::Export, written, item.name());
                }
                Ok(())
            },
        )?;
        job.observer.finish(Stage::Export);
        let sha256 = writer.finish()?;
        let config = serde_json::to_vec_pretty(&config).expect("a JSON value serialises");
        write_atomically(&job.out.join("config.json"), &config)?;
        let file = File {
            name: SVD_TRAINING_WEIGHTS,
            sha256,
            bytes,
            beside: copy_side_files(&job.artifact.dir, job.out)?,
        };
        Ok((facts, file))
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.items.iter().filter_map(|item| match item {
            Item::Layer(layer) => Some(layer),
            Item::Carried { .. } => None,
        })
    }

    fn facts(&self) -> SvdTrainingFacts {
        let triplets = self.layers().map(|layer| layer.held).sum();
        SvdTrainingFacts {
            rank_fraction: self.rank_fraction,
            triplets,
            zeros: self.layers().map(|layer| layer.q).sum::<usize>() - triplets,
            whole: self
                .layers()
                .filter(|layer| layer.module.is_none())
                .map(|layer| layer.name.clone())
                .collect(),
        }
    }

    fn header(&self) -> Result<Header> {
        let mut tensors: Vec<(String, Vec<usize>)> = Vec::new();
        for item in &self.items {
            match item {
                Item::Carried { name, shape, .. } => tensors.push((name.clone(), shape.clone())),
                Item::Layer(Layer { name, shape, q, .. }) => tensors.extend([
                    (format!("{name}.U"), vec![shape[0], *q]),
                    (format!("{name}.sigma"), vec![*q]),
                    (format!("{name}.V"), vec![shape[1], *q]),
                    (format!("{name}.weight"), shape.to_vec()),
                ]),
            }
        }
        Header::compose(
            tensors
                .iter()
                .map(|(name, shape)| (name.as_str(), Dtype::F32, shape.as_slice())),
        )
    }
}

impl Item {
    fn name(&self) -> &str {
        match self {
            Self::Layer(layer) => &layer.name,
            Self::Carried { name, .. } => name,
        }
    }

    /// Its tensors, in the order of the header.
    fn tensors(&self, job: &Job) -> Result<Vec<(String, Elements)>> {
        let tensors = match self {
            Self::Layer(layer) => layer.tensors(job)?,
            Self::Carried { tensor, name, .. } => vec![(name.clone(), current(job, tensor)?)],
        };
        for (name, values) in &tensors {
            values.refuse_overflow(name)?;
        }
        Ok(tensors)
    }
}

/// A tensor that is not decomposed, as it is after training.
fn current(job: &Job, tensor: &str) -> Result<Elements> {
    let base = job.artifact.base_tensor(tensor)?;
    let trained = job.mixture.tensor_f32(tensor, &base);
    Ok(trained.unwrap_or(base).cast(Dtype::F32))
}

impl Layer {
    fn short(&self) -> usize {
        self.shape[0].min(self.shape[1])
    }

    fn tensors(&self, job: &Job) -> Result<Vec<(String, Elements)>> {
        let [m, n] = self.shape;
        let (factors, sigma, rest) = match &self.module {
            Some(module) => {
                let record = &job.artifact.svd.modules[module];
                let factors = job.artifact.factors(module)?;
                let matrix = job.artifact.restore(module, record, &factors)?;
                let delta = job.mixture.delta(module, record.q);
                let sigma = factors.sigma.iter().zip(delta);
                let sigma = sigma.map(|(&s, d)| (f64::from(s) + f64::from(d)) as f32);
                let sigma = sigma.collect();
                let rest = factors.residual(&matrix).values;
                (Some(factors), sigma, Elements::from_f32(&[m, n], &rest))
            }
            None => (None, Vec::new(), current(job, &self.tensor)?),
        };
        let column_wise = |side: usize, pick: fn(&Factors) -> &ndarray::Array2<f32>| {
            let mut values = vec![0f32; side * self.q];
            if let Some(factors) = &factors {
                for (k, row) in pick(factors).rows().into_iter().enumerate() {
                    for (i, &x) in row.iter().enumerate() {
                        values[i * self.q + k] = x;
                    }
                }
            }
            Elements::from_f32(&[side, self.q], &values)
        };
        let mut padded: Vec<f32> = sigma;
        padded.resize(self.q, 0.0);
        let name = &self.name;
        Ok(vec![
            (format!("{name}.U"), column_wise(m, |f| &f.u)),
            (
                format!("{name}.sigma"),
                Elements::from_f32(&[self.q], &padded),
            ),
            (format!("{name}.V"), column_wise(n, |f| &f.v)),
            (format!("{name}.weight"), rest),
        ])
    }
}

/// Everything the model holds, layer by layer as svd-training sees it.
fn items(job: &Job) -> Result<Vec<Item>> {
    let artifact = job.artifact;
    let refuse = |what: String, reason: &str| Error::NotExpressible {
        what,
        target: "svd-training",
        reason: reason.into(),
    };
    let mut items = Vec::new();
    let (mut seen, mut biases) = (Vec::new(), Vec::new());
    let mut head = None;
    let headers = artifact.base_headers()?;
    for entry in headers.iter().flat_map(|(_, header)| &header.entries) {
        // a constant that old checkpoints hold and models compute themselves
        if entry.name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        if !is_float(entry.dtype) {
            let reason = format!(
                "its state dict is f32, and this is {}",
                dtype_name(entry.dtype)
            );
            return Err(refuse(format!("`{}`", entry.name), &reason));
        }
        let name = job.naming.in_model(&entry.name);
        let replaced = entry
            .name
            .strip_suffix(".weight")
            .filter(|_| is_replaced(&name));
        match replaced {
            Some(HEAD) => head = Some(entry.name.clone()),
            Some(module) => {
                let &[m, n] = entry.shape.as_slice() else {
                    return Err(refuse(format!("`{module}`"), "its layers are matrices"));
                };
                seen.push(module.to_string());
                let record = artifact.svd.modules.get(module);
                items.push(Item::Layer(Layer {
                    tensor: entry.name.clone(),
                    name: job.naming.in_model(module),
                    shape: [m, n],
                    module: record.map(|_| module.to_string()),
                    held: record.map_or(0, |record| record.q),
                    q: 0,
                }));
            }
            None => {
                if let Some(module) = entry.name.strip_suffix(".bias") {
                    biases.push(module.to_string());
                }
                items.push(Item::Carried {
                    tensor: entry.name.clone(),
                    name,
                    shape: entry.shape.clone(),
                });
            }
        }
    }
    items.push(Item::Layer(head_layer(job, head)?));
    seen.push(HEAD.into());
    if let Some(module) = biases.iter().find(|module| seen.contains(module)) {
        return Err(refuse(
            format!("`{module}`"),
            "its layers have no bias, and this one has: a model of this kind would answer nonsense there",
        ));
    }
    if let Some(module) = artifact
        .svd
        .modules
        .keys()
        .find(|module| !seen.contains(module))
    {
        return Err(refuse(
            format!("`{module}`"),
            "it has no layer of that name",
        ));
    }
    Ok(items)
}

/// What the models are called whose layers svd-training replaces, of their heads.
const HEAD: &str = "lm_head";

/// Whether a tensor of the model is the weight of a layer that svd-training replaces.
fn is_replaced(tensor: &str) -> bool {
    let Some(module) = tensor.strip_suffix(".weight") else {
        return false;
    };
    let in_layer = |module: &str| {
        let (number, part) = module.strip_prefix("model.layers.")?.split_once('.')?;
        Some(number.parse::<usize>().is_ok() && REPLACED.contains(&part))
    };
    module == HEAD || in_layer(module).unwrap_or(false)
}

/// The head, which svd-training always makes a layer of its own.
fn head_layer(job: &Job, stored: Option<String>) -> Result<Layer> {
    let artifact = job.artifact;
    let layer = |tensor: String, shape: [usize; 2], record: Option<&ModuleRecord>| Layer {
        tensor,
        name: HEAD.into(),
        shape,
        module: record.map(|_| HEAD.to_string()),
        held: record.map_or(0, |record| record.q),
        q: 0,
    };
    if let Some(record) = artifact.svd.modules.get(HEAD) {
        return Ok(layer(format!("{HEAD}.weight"), record.shape, Some(record)));
    }
    let tied = artifact.config["tie_word_embeddings"].as_bool() == Some(true);
    let candidates = [
        stored.filter(|_| !tied),
        Some("model.embed_tokens.weight".into()),
        Some("embed_tokens.weight".into()),
    ];
    for tensor in candidates.into_iter().flatten() {
        if let Some((_, shape)) = artifact.base_entry(&tensor)
            && let &[m, n] = shape.as_slice()
        {
            return Ok(layer(tensor, [m, n], None));
        }
    }
    Err(Error::TensorMissing {
        tensor: format!("{HEAD}.weight"),
        path: artifact.dir.clone(),
    })
}

/// q as svd-training computes it from a fraction, in the same arithmetic.
fn theirs(fraction: f64, short: usize) -> usize {
    (short as f64 * fraction) as usize
}

/// A fraction with which every layer has room for its triplets, and each for one: the decomposition's own if it will do,
/// else the smallest.
fn rank_fraction(rank: Rank, items: &[Item]) -> f64 {
    let needed: Vec<(usize, usize)> = items
        .iter()
        .filter_map(|item| match item {
            Item::Layer(layer) => Some((layer.held.max(1), layer.short())),
            Item::Carried { .. } => None,
        })
        .collect();
    let enough = |f: f64| needed.iter().all(|&(q, short)| theirs(f, short) >= q);
    match rank {
        Rank::Fraction(f) if enough(f) => f,
        _ => needed
            .iter()
            .map(|&(q, short)| {
                let f = q as f64 / short as f64;
                // the quotient may have been rounded down
                if theirs(f, short) >= q {
                    f
                } else {
                    f.next_up()
                }
            })
            .fold(0.0, f64::max),
    }
}

/// The base's config with a head of its own, which svd-training makes, in f32, in which it computes.
fn config(base: &serde_json::Value) -> serde_json::Value {
    let mut config = base.clone();
    untie(&mut config);
    // transformers 5 writes `dtype`, older ones `torch_dtype`
    let key = if config["dtype"].is_null() {
        "torch_dtype"
    } else {
        "dtype"
    };
    config[key] = "float32".into();
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(short: usize, held: usize) -> Item {
        Item::Layer(Layer {
            tensor: "t".into(),
            name: "t".into(),
            shape: [short, short + 3],
            module: (held > 0).then(|| "t".into()),
            held,
            q: 0,
        })
    }

    #[test]
    fn the_fraction_gives_every_layer_room_for_its_triplets() {
        let tenth = rank_fraction(
            Rank::Fraction(0.1),
            &[layer(128, 12), layer(64, 6), layer(128, 0)],
        );
        assert_eq!(tenth, 0.1);
        // ⌊0.1 · 5⌋ is none, and ours is one
        let fifth = rank_fraction(Rank::Fraction(0.1), &[layer(128, 12), layer(5, 1)]);
        assert_eq!(fifth, 0.2);
        // every quotient, whichever way it is rounded
        for short in 1..600 {
            for q in 1..=short {
                let f = rank_fraction(Rank::Budget(9), &[layer(short, q)]);
                assert_eq!((theirs(f, short), f <= 1.0), (q, true), "{q} of {short}");
            }
        }
    }

    #[test]
    fn the_layers_are_those_of_get_mlp_names() {
        for tensor in [
            "lm_head.weight",
            "model.layers.11.mlp.down_proj.weight",
            "model.layers.0.self_attn.qkv_proj.weight",
        ] {
            assert!(is_replaced(tensor), "{tensor}");
        }
        for tensor in [
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.0.self_attn.q_norm.weight",
            "model.embed_tokens.weight",
            "layers.0.mlp.down_proj.weight",
            "model.layers.x.mlp.down_proj.weight",
        ] {
            assert!(!is_replaced(tensor), "{tensor}");
        }
    }
}
