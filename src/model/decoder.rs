//! The decoder: numbers from `config.json`, structure from the same table that checks a checkpoint's shapes.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor, Var};

use super::config::{Attention, ModelConfig, Scaling};
use super::family::{self, Activation, NormKind, QueryKeyNorm, Scores};
use super::head::{Head, Loss};
use super::linear::Linear;
use super::method::{self, LowRank, Method, Place, Updates};
use super::norm::Norm;
use super::ops;
use super::rope::Angles;
use super::segments::{Segments, Sight, reach};
use crate::error::{Error, Result};
use crate::split::{Change, Factors};
use crate::weights::element::is_float;
use crate::weights::{Elements, dtype_name};

/// Where a decoder's tensors come from.
pub trait Tensors: Sync {
    /// A tensor under its checkpoint name: M itself, for a decomposed weight.
    fn tensor(&self, name: &str) -> Result<Elements>;
    /// The triplets of a module and what stands between its vectors by now, if it is decomposed.
    fn spectrum(&self, module: &str) -> Result<Option<(Factors, Change)>>;
    /// LoRAs on a module.
    fn low_rank(&self, _module: &str) -> Vec<LowRank> {
        Vec::new()
    }
    /// Whether there is a tensor of this name.
    fn has(&self, name: &str) -> bool;
    /// The file a tensor lies in, for error messages.
    fn path_of(&self, name: &str) -> PathBuf;
}

/// What shall receive gradients.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Trained {
    pub linear: Option<Method>,
    pub norms: bool,
    /// The embedding; a head that is tied to it moves along.
    pub embeddings: bool,
}

/// A causal language model, ready for training and evaluation.
pub struct Decoder {
    pub config: ModelConfig,
    pub device: Device,
    pub dtype: DType,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    head: Head,
    /// Everything that training moves: of linear layers under the names of [`super::method`], norms and the embedding
    /// under their own. All f32.
    pub variables: BTreeMap<String, Var>,
    kept: Mutex<Option<(Segments, Arc<Pass>)>>,
}

struct Block {
    /// Before attention, after it, before the MLP, after it.
    norms: [Option<Norm>; 4],
    query_key_value: Projections,
    query_key_norms: Option<(Norm, Norm)>,
    output: Linear,
    gate_up: Projections,
    down: Linear,
    sees: Attention,
}

/// The layers of [`family::Projections`].
enum Projections {
    Apart(Vec<Linear>),
    Stacked(Linear),
    ByHead(Linear),
}

impl Projections {
    /// The outputs `(b, t, side)`, cut apart where they come out of one matrix.
    fn forward(
        &self,
        x: &Tensor,
        sides: &[usize],
        head_dim: usize,
    ) -> candle_core::Result<Vec<Tensor>> {
        match self {
            Self::Apart(layers) => layers.iter().map(|layer| layer.forward(x)).collect(),
            Self::Stacked(layer) => {
                let y = layer.forward(x)?;
                ops::split(&y, y.rank() - 1, sides)
            }
            Self::ByHead(layer) => {
                let (b, t, _) = x.dims3()?;
                let y = layer.forward(x)?;
                let y = ops::reshape(&y, (b, t, (), sides.len(), head_dim))?;
                let parts = ops::split(&y, 3, &vec![1; sides.len()])?;
                let parts = parts.iter().zip(sides);
                parts
                    .map(|(part, &side)| ops::reshape(part, (b, t, side)))
                    .collect()
            }
        }
    }
}

/// Windows of equal length as one (b, t) tensor.
pub fn stacked(batch: &[&[u32]], device: &Device) -> Result<Tensor> {
    let (b, t) = (batch.len(), batch[0].len());
    Ok(Tensor::from_vec(batch.concat(), (b, t), device)?)
}

impl Decoder {
    /// Loads every tensor the config asks for.
    ///
    /// # Errors
    /// A rope or an activation this decoder does not know, and whatever `tensors` reports.
    pub fn load(
        config: &ModelConfig,
        tensors: &dyn Tensors,
        trained: Trained,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        refuse_unknown(config)?;
        let prefix = config.prefix(|name| tensors.has(name));
        let names = config.names;
        let mut loader = Loader {
            tensors,
            trained,
            device,
            dtype,
            variables: BTreeMap::new(),
            config,
            shapes: config.tensors(prefix).into_iter().collect(),
        };
        let blocks = (config.attention.iter().enumerate())
            .map(|(layer, &sees)| loader.block(&format!("{prefix}layers.{layer}"), sees))
            .collect::<Result<_>>()?;
        let norm = loader.norm(&format!("{prefix}{}", names.norm))?;
        let embedding = loader.matrix(&config.embedding(prefix), trained.embeddings)?;
        let linear = if config.tied {
            let beside = tensors.low_rank(names.head);
            let place = loader.place();
            let made =
                method::updates(None, names.head, embedding.dims2()?, None, &beside, &place)?;
            Linear::new(embedding.clone(), None, made.updates)
        } else {
            loader.linear(names.head, false)?
        };
        let head = Head {
            linear,
            divisor: config.logits_divisor,
            cap: config.logits_cap,
        };
        Ok(Self {
            config: config.clone(),
            device: device.clone(),
            dtype,
            embedding,
            blocks,
            norm,
            head,
            variables: loader.variables,
            kept: Mutex::default(),
        })
    }

    /// `ids (b, t) → (b, t, hidden)`, what the first block reads.
    pub(super) fn embed(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let embedded = ops::embed(&self.embedding, &ids.flatten_all()?)?;
        let embedded = ops::reshape(&embedded, (b, t, self.config.hidden))?;
        ops::scaled(
            &ops::cast(&embedded, self.dtype)?,
            self.config.embedding_scale,
        )
    }

    /// The last hidden states: `ids (b, t) u32 → (b, t, hidden)`.
    fn hidden(&self, ids: &Tensor, segments: &Segments) -> candle_core::Result<Tensor> {
        let pass = self.pass(ids, segments)?;
        let mut x = self.embed(ids)?;
        for at in 0..self.blocks.len() {
            x = self.block(at, &x, &pass)?;
        }
        self.norm.forward(&x)
    }

    /// What all blocks read beside their input: that of the last segments is kept, because steps are most often alike.
    pub(super) fn pass(&self, ids: &Tensor, segments: &Segments) -> candle_core::Result<Arc<Pass>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, pass)) = &*kept
            && of == segments
        {
            return Ok(pass.clone());
        }
        let pass = Arc::new(self.new_pass(ids, segments)?);
        *kept = Some((segments.clone(), pass.clone()));
        Ok(pass)
    }

    fn new_pass(&self, ids: &Tensor, segments: &Segments) -> candle_core::Result<Pass> {
        let (_, t) = ids.dims2()?;
        let (positions, shape) = segments.positions();
        let angles = (self.config.ropes.iter())
            .map(|rope| rope.angles(&positions, &shape, &self.device))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let mut sights = Sights::default();
        for block in &self.blocks {
            let window = block.window(t);
            sights.of(window, || segments.sight(window, &self.device))?;
        }
        Ok(Pass { t, angles, sights })
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// One block: `x (b, t, hidden) → (b, t, hidden)`.
    pub(super) fn block(&self, at: usize, x: &Tensor, pass: &Pass) -> candle_core::Result<Tensor> {
        let block = &self.blocks[at];
        let sight = &pass.sights.0[&block.window(pass.t)];
        let angles = block.sees.rope.map(|rope| &pass.angles[rope]);
        block.forward(&self.config, x, angles, sight, None)
    }

    /// The logits of every position: `ids (b, t) → (b, t, vocabulary)`, without gradients.
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        self.logits_of(ids, &Segments::whole(b, t))
    }

    /// The same of rows that hold several sequences, or padding; the logits of padding mean nothing.
    pub fn logits_of(&self, ids: &Tensor, segments: &Segments) -> Result<Tensor> {
        Ok(self.head.logits(&self.hidden(ids, segments)?)?)
    }

    /// The logits of what follows `ids`, which go on where `cache` has read to: `ids (b, t) → (b, vocabulary)`, without
    /// gradients.
    ///
    /// They are those of the whole sequence read at once, with one exception, which is transformers' too: where θ grows
    /// with the sequence ([`Scaling::Dynamic`]), what was read keeps the angles it was read with.
    pub fn next_logits(&self, cache: &mut Cache, ids: &Tensor) -> Result<Tensor> {
        let (_, t) = ids.dims2()?;
        let before = cache.tokens();
        let turns_anew = (self.config.ropes.iter()).any(|rope| rope.turns_anew(before, before + t));
        if turns_anew && let Some(read) = cache.ids.take() {
            *cache = Cache::default();
            return Ok(self.read_on(cache, &Tensor::cat(&[&read, ids], 1)?)?);
        }
        Ok(self.read_on(cache, ids)?)
    }

    fn read_on(&self, cache: &mut Cache, ids: &Tensor) -> candle_core::Result<Tensor> {
        let (_, t) = ids.dims2()?;
        let (before, after) = (cache.tokens(), cache.tokens() + t);
        let positions: Vec<usize> = (before..after).collect();
        let angles = (self.config.ropes.iter())
            .map(|rope| rope.angles(&positions, &[t], &self.device))
            .collect::<candle_core::Result<Vec<_>>>()?;
        cache.layers.resize_with(self.blocks.len(), || None);
        let mut sights = Sights::default();
        let mut x = self.embed(ids)?;
        for (block, past) in self.blocks.iter().zip(&mut cache.layers) {
            let window = block.sees.window.filter(|&window| window < after);
            let first = reach(before, window);
            let seen = (before..after).map(|at| reach(at, window) - first..at + 1 - first);
            let keys = after - first;
            let sight = sights.of(window, || Sight::new(seen.collect(), t, keys, &self.device))?;
            let angles = block.sees.rope.map(|rope| &angles[rope]);
            x = block.forward(&self.config, &x, angles, &sight, Some(past))?;
        }
        cache.ids = Some(match cache.ids.take() {
            Some(read) => Tensor::cat(&[&read, ids], 1)?,
            None => ids.clone(),
        });
        let last = x.narrow(1, t - 1, 1)?.contiguous()?;
        self.head.logits(&self.norm.forward(&last)?)?.squeeze(1)
    }

    /// Σ of the next-token losses in nats, and how many tokens were predicted.
    ///
    /// `ids (b, t)`: each row predicts its tokens 1 … t − 1 from those before.
    pub fn loss(&self, ids: &Tensor) -> Result<(Tensor, usize)> {
        let (b, t) = ids.dims2()?;
        self.loss_of(ids, &Segments::whole(b, t))
    }

    /// The same of rows that hold several sequences, or padding: each token but the first of its sequence is predicted
    /// from those before it there.
    pub fn loss_of(&self, ids: &Tensor, segments: &Segments) -> Result<(Tensor, usize)> {
        let (predicting, targets) = self.predicting(&self.hidden(ids, segments)?, ids, segments)?;
        let sum = self.head.cross_entropy(&predicting, &targets, 1.0)?;
        Ok((sum.value, targets.elem_count()))
    }

    /// The mean of the losses from the stream behind the last block, `x (b, t, hidden)`.
    pub(super) fn mean_loss(
        &self,
        x: &Tensor,
        ids: &Tensor,
        segments: &Segments,
    ) -> candle_core::Result<Loss> {
        let (predicting, targets) = self.predicting(&self.norm.forward(x)?, ids, segments)?;
        let share = (targets.elem_count() as f64).recip();
        self.head.cross_entropy(&predicting, &targets, share)
    }

    /// The hidden states (rows, hidden) that predict a token each, and these tokens (rows,).
    fn predicting(
        &self,
        hidden: &Tensor,
        ids: &Tensor,
        segments: &Segments,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let (b, t) = ids.dims2()?;
        if segments.counts_whole() {
            let hidden = ops::split(hidden, 1, &[t - 1, 1])?.remove(0);
            let targets = ids.narrow(1, 1, t - 1)?.contiguous()?.flatten_all()?;
            let rows = (b * (t - 1), self.config.hidden);
            Ok((ops::reshape(&hidden, rows)?, targets))
        } else {
            let from = segments.predicting();
            let to: Vec<u32> = from.iter().map(|token| token + 1).collect();
            let from = Tensor::new(from, &self.device)?;
            let to = Tensor::new(to, &self.device)?;
            let hidden = ops::reshape(hidden, (b * t, self.config.hidden))?;
            let targets = ids.flatten_all()?.index_select(&to, 0)?;
            Ok((ops::selected(&hidden, &from)?, targets))
        }
    }
}

/// What the layers of one pass see, by window.
#[derive(Default)]
struct Sights(BTreeMap<Option<usize>, Sight>);

impl Sights {
    fn of(
        &mut self,
        window: Option<usize>,
        make: impl FnOnce() -> candle_core::Result<Sight>,
    ) -> candle_core::Result<Sight> {
        if let Some(sight) = self.0.get(&window) {
            return Ok(sight.clone());
        }
        let sight = make()?;
        self.0.insert(window, sight.clone());
        Ok(sight)
    }
}

/// What a decoder has read of a sequence, so that it can go on without reading it again.
#[derive(Debug, Default)]
pub struct Cache {
    /// (b, n) u32
    ids: Option<Tensor>,
    /// Keys and values of each layer, (b, n, kv, d): of one with a window only those that the next token sees.
    layers: Vec<Option<(Tensor, Tensor)>>,
}

impl Cache {
    /// Tokens read so far, of each row.
    pub fn tokens(&self) -> usize {
        self.ids.as_ref().map_or(0, |ids| ids.dims()[1])
    }
}

/// What the blocks of one pass over (b, t) tokens share: angles by rope, what is seen by window.
pub(super) struct Pass {
    t: usize,
    angles: Vec<Angles>,
    sights: Sights,
}

impl Block {
    /// The window of t tokens, if it hides any of them.
    fn window(&self, t: usize) -> Option<usize> {
        self.sees.window.filter(|&window| window < t)
    }

    /// `x (b, t, hidden) → (b, t, hidden)`; behind a `past` of keys and values it goes on, and leaves its own there.
    fn forward(
        &self,
        config: &ModelConfig,
        x: &Tensor,
        angles: Option<&Angles>,
        sight: &Sight,
        past: Option<&mut Option<(Tensor, Tensor)>>,
    ) -> candle_core::Result<Tensor> {
        let [before_attention, after_attention, before_mlp, after_mlp] = &self.norms;
        let (x, read) = beside(before_attention, x, None)?;
        let attended = self.attention(config, &read, angles, sight, past)?;
        let attended = normed(after_attention, &attended)?;
        let attended = ops::scaled(&attended, config.residual_scale)?;
        let (y, read) = match config.parallel {
            true => (ops::add(&x, &attended)?, normed(before_mlp, &x)?),
            false => beside(before_mlp, &x, Some(&attended))?,
        };
        let mixed = self.mlp(config, &read)?;
        let mixed = normed(after_mlp, &mixed)?;
        ops::add(&y, &ops::scaled(&mixed, config.residual_scale)?)
    }

    fn attention(
        &self,
        config: &ModelConfig,
        x: &Tensor,
        angles: Option<&Angles>,
        sight: &Sight,
        past: Option<&mut Option<(Tensor, Tensor)>>,
    ) -> candle_core::Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let (heads, kv, d) = (config.heads, config.kv_heads, config.head_dim);
        let [q, k, v] = match (&self.query_key_value, &self.query_key_norms, angles) {
            (Projections::Stacked(layer), None, Some(angles)) => {
                ops::split_heads(&layer.forward(x)?, [heads, kv, kv], angles)?
            }
            _ => self.heads(config, x, angles)?,
        };
        let (k, v) = match past {
            Some(past) => joined(past, k, v, self.sees.window)?,
            None => (k, v),
        };
        let scores = Scores {
            scale: config.attention_scale,
            cap: config.attention_cap,
        };
        let attended = ops::attention(&q, &k, &v, sight, scores)?;
        self.output
            .forward(&ops::reshape(&attended, (b, t, heads * d))?)
    }

    /// Queries and keys, rotated, and values: (b, t, heads, d).
    fn heads(
        &self,
        config: &ModelConfig,
        x: &Tensor,
        angles: Option<&Angles>,
    ) -> candle_core::Result<[Tensor; 3]> {
        let (b, t, _) = x.dims3()?;
        let (heads, kv, d) = (config.heads, config.kv_heads, config.head_dim);
        let projected = self
            .query_key_value
            .forward(x, &[heads * d, kv * d, kv * d], d)?;
        let [q, k, v] = &projected[..] else {
            candle_core::bail!("queries, keys and values are three");
        };
        let per_head = |y: &Tensor, n: usize| ops::reshape(y, (b, t, n, d));
        let (q, k) = match (&self.query_key_norms, config.query_key_norm) {
            (Some((query, key)), QueryKeyNorm::AllHeads) => {
                let (q, k) = (query.forward(q)?, key.forward(k)?);
                (per_head(&q, heads)?, per_head(&k, kv)?)
            }
            (Some((query, key)), _) => {
                let (q, k) = (per_head(q, heads)?, per_head(k, kv)?);
                (query.forward(&q)?, key.forward(&k)?)
            }
            (None, _) => (per_head(q, heads)?, per_head(k, kv)?),
        };
        let (q, k) = match angles {
            Some(angles) => (ops::rotate(&q, angles)?, ops::rotate(&k, angles)?),
            None => (q, k),
        };
        Ok([q, k, per_head(v, kv)?])
    }

    fn mlp(&self, config: &ModelConfig, x: &Tensor) -> candle_core::Result<Tensor> {
        let (i, d) = (config.intermediate, config.head_dim);
        if let (Projections::Stacked(layer), true) = (&self.gate_up, config.gated) {
            let mixed = ops::gated_stacked(&layer.forward(x)?, &config.activation)?;
            return self.down.forward(&mixed);
        }
        let wide = self.gate_up.forward(x, &[i, i], d)?;
        let mixed = match &wide[..] {
            [gate, up] if config.gated => ops::gated(gate, up, &config.activation)?,
            [alone] if !config.gated => ops::activated(alone, &config.activation)?,
            _ => candle_core::bail!("a gate is one projection more"),
        };
        self.down.forward(&mixed)
    }
}

/// Keys and values behind those of the `past`, which becomes what the next token sees of them.
fn joined(
    past: &mut Option<(Tensor, Tensor)>,
    k: Tensor,
    v: Tensor,
    window: Option<usize>,
) -> candle_core::Result<(Tensor, Tensor)> {
    let (k, v) = match past.take() {
        Some((keys, values)) => (Tensor::cat(&[keys, k], 1)?, Tensor::cat(&[values, v], 1)?),
        None => (k, v),
    };
    let keys = k.dim(1)?;
    let first = reach(keys, window);
    if first < keys {
        let seen = |all: &Tensor| all.narrow(1, first, keys - first);
        *past = Some((seen(&k)?, seen(&v)?));
    }
    Ok((k, v))
}

/// s = x + added, or x itself, and what a norm makes of s.
fn beside(
    norm: &Option<Norm>,
    x: &Tensor,
    added: Option<&Tensor>,
) -> candle_core::Result<(Tensor, Tensor)> {
    if let Some(norm) = norm {
        return norm.beside(x, added);
    }
    let sum = match added {
        Some(added) => ops::add(x, added)?,
        None => x.clone(),
    };
    Ok((sum.clone(), sum))
}

fn normed(norm: &Option<Norm>, x: &Tensor) -> candle_core::Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(x),
        None => Ok(x.clone()),
    }
}

fn refuse_unknown(config: &ModelConfig) -> Result<()> {
    let refuse = |key: &str, reason: String| Error::Config {
        path: config.path.clone(),
        key: key.into(),
        reason,
    };
    if let Activation::Unsupported(name) = &config.activation {
        return Err(refuse(
            "hidden_act",
            format!("is `{name}`, this decoder knows silu, gelu and gelu_pytorch_tanh"),
        ));
    }
    for rope in &config.ropes {
        if let Scaling::Unsupported(kind) = &rope.scaling {
            return Err(refuse(
                "rope_scaling",
                format!(
                    "is of the type `{kind}`, this decoder knows default, linear, dynamic, yarn, llama3 and longrope"
                ),
            ));
        }
    }
    Ok(())
}

/// Builds layers from stored tensors and collects what shall be trained.
struct Loader<'a> {
    tensors: &'a dyn Tensors,
    trained: Trained,
    device: &'a Device,
    dtype: DType,
    variables: BTreeMap<String, Var>,
    config: &'a ModelConfig,
    /// What the config says of every tensor.
    shapes: HashMap<String, Vec<usize>>,
}

impl Loader<'_> {
    fn elements(&self, name: &str) -> Result<Elements> {
        let elements = self.tensors.tensor(name)?;
        let expected = &self.shapes[name];
        if elements.shape != *expected {
            return Err(Error::Shape {
                tensor: name.into(),
                path: self.tensors.path_of(name),
                expected: expected.clone(),
                found: elements.shape,
            });
        }
        if !is_float(elements.dtype) {
            return Err(Error::Dtype {
                tensor: name.into(),
                path: self.tensors.path_of(name),
                expected: "F32, F16 or BF16".into(),
                found: dtype_name(elements.dtype),
            });
        }
        elements.refuse_not_finite(name, &self.tensors.path_of(name))?;
        Ok(elements)
    }

    fn place(&self) -> Place<'_> {
        Place {
            device: self.device,
            dtype: self.dtype,
        }
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let elements = self.elements(name)?;
        let tensor = Tensor::from_vec(elements.to_f32(), elements.shape.as_slice(), self.device)?;
        Ok(tensor.to_dtype(self.dtype)?)
    }

    fn linear(&mut self, module: &str, bias: bool) -> Result<Linear> {
        let method = self.trained.linear;
        let name = format!("{module}.weight");
        let weight = self.matrix(&name, method == Some(Method::Full))?;
        let bias = if bias {
            Some(self.tensor(&format!("{module}.bias"))?)
        } else {
            None
        };
        let spectrum = self.tensors.spectrum(module)?;
        let beside = self.tensors.low_rank(module);
        let sides = weight.dims2()?;
        let Updates { updates, variables } =
            method::updates(method, module, sides, spectrum, &beside, &self.place())?;
        self.variables.extend(variables);
        Ok(Linear::new(weight, bias, updates))
    }

    /// A matrix that may be trained as it is; one that is frozen stays as it is stored, where products read that.
    fn matrix(&mut self, name: &str, trained: bool) -> Result<Tensor> {
        match trained {
            true => self.weight(name, true),
            false => Ok(self.place().matrix(&self.elements(name)?)?),
        }
    }

    /// A tensor that may be trained as it is: then in f32, whatever the model's dtype.
    fn weight(&mut self, name: &str, trained: bool) -> Result<Tensor> {
        if !trained {
            return self.tensor(name);
        }
        let elements = self.elements(name)?;
        let variable = Var::from_vec(elements.to_f32(), elements.shape.as_slice(), self.device)?;
        let weight = variable.as_tensor().clone();
        self.variables.insert(name.into(), variable);
        Ok(weight)
    }

    fn norm(&mut self, module: &str) -> Result<Norm> {
        let weight = self.weight(&format!("{module}.weight"), self.trained.norms)?;
        Ok(match self.config.norm {
            NormKind::RootMeanSquare => {
                Norm::root_mean_square(weight, self.config.norm_eps, self.config.norm_offset)
            }
            NormKind::Layer => {
                let bias = self.tensor(&format!("{module}.bias"))?;
                Norm::layer(weight, bias, self.config.norm_eps)
            }
        })
    }

    fn block(&mut self, name: &str, sees: Attention) -> Result<Block> {
        let config = self.config;
        let names = config.names;
        let on_gpu = self.device.is_cuda();
        let mut many = |projections: family::Projections, bias: bool| -> Result<Projections> {
            let mut one = |part: &str| self.linear(&format!("{name}.{part}"), bias);
            Ok(match projections {
                family::Projections::Apart(names) => {
                    let parts: Vec<_> =
                        names.iter().map(|part| one(part)).collect::<Result<_>>()?;
                    let stacks = on_gpu && config.stacked_on_gpu().any(|(of, _)| of == names);
                    match stacks.then(|| Linear::stacked(&parts)).transpose()? {
                        Some(Some(all)) => Projections::Stacked(all),
                        _ => Projections::Apart(parts),
                    }
                }
                family::Projections::Stacked(part) => Projections::Stacked(one(part)?),
                family::Projections::ByHead(part) => Projections::ByHead(one(part)?),
            })
        };
        let query_key_value = many(names.query_key_value, config.qkv_bias)?;
        let gate_up = many(names.gate_up, config.mlp_bias)?;
        let query_key_norms = match config.query_key_norm {
            QueryKeyNorm::None => None,
            QueryKeyNorm::EachHead | QueryKeyNorm::AllHeads => Some((
                self.norm(&format!("{name}.{}", names.query_norm))?,
                self.norm(&format!("{name}.{}", names.key_norm))?,
            )),
        };
        let mut norms = [const { None }; 4];
        for (norm, module) in norms.iter_mut().zip(config.norm_places.modules()) {
            if let Some(module) = module {
                *norm = Some(self.norm(&format!("{name}.{module}"))?);
            }
        }
        Ok(Block {
            norms,
            query_key_value,
            query_key_norms,
            output: self.linear(&format!("{name}.{}", names.output), config.output_bias)?,
            gate_up,
            down: self.linear(&format!("{name}.{}", names.down), config.mlp_bias)?,
            sees,
        })
    }
}
