//! The decoder: numbers from `config.json`, structure from the same table that checks a checkpoint's shapes.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{D, DType, Device, Tensor, Var};

use super::config::{ModelConfig, Scaling};
use super::layers::{Linear, Norm};
use super::ops;
use super::rope::Angles;
use crate::error::{Error, Result};
use crate::split::Factors;
use crate::weights::element::is_float;
use crate::weights::{Elements, dtype_name};

/// Where a decoder's tensors come from.
pub trait Tensors: Sync {
    /// A tensor under its checkpoint name: M itself, for a decomposed weight.
    fn tensor(&self, name: &str) -> Result<Elements>;
    /// The triplets of a module and its current Δσ, if it is decomposed.
    fn spectrum(&self, module: &str) -> Result<Option<(Factors, Vec<f32>)>>;
    /// `model.` or nothing.
    fn prefix(&self) -> &'static str;
    /// The file a tensor lies in, for error messages.
    fn path_of(&self, name: &str) -> PathBuf;
}

/// What shall receive gradients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trained {
    pub sigma: bool,
    pub norms: bool,
}

/// A causal language model, ready for training and evaluation.
pub struct Decoder {
    pub config: ModelConfig,
    pub device: Device,
    pub dtype: DType,
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    head: Linear,
    /// Everything that training moves: `<module>.delta`, and norm weights under their own name. All f32.
    pub variables: BTreeMap<String, Var>,
}

struct Block {
    attention_norm: Norm,
    query_key_value: Projections,
    query_key_norms: Option<(Norm, Norm)>,
    output: Linear,
    mlp_norm: Norm,
    gate_up: Projections,
    down: Linear,
    window: Option<usize>,
}

/// Several projections of one input, stored apart or fused into one matrix.
enum Projections {
    Apart(Vec<Linear>),
    Fused(Linear),
}

impl Projections {
    /// The outputs, split to `sides` where they are fused.
    fn forward(&self, x: &Tensor, sides: &[usize]) -> candle_core::Result<Vec<Tensor>> {
        match self {
            Self::Apart(layers) => layers.iter().map(|layer| layer.forward(x)).collect(),
            Self::Fused(layer) => {
                let y = layer.forward(x)?;
                let mut start = 0;
                sides
                    .iter()
                    .map(|&side| {
                        let part = y.narrow(D::Minus1, start, side)?.contiguous();
                        start += side;
                        part
                    })
                    .collect()
            }
        }
    }
}

/// 0 where position i may look at j, −∞ elsewhere. (t, t)
pub fn causal_mask(
    t: usize,
    window: Option<usize>,
    dtype: DType,
    device: &Device,
) -> candle_core::Result<Tensor> {
    let reach = window.unwrap_or(usize::MAX);
    let visible = |i: usize, j: usize| j <= i && i - j < reach;
    let mask: Vec<f32> = (0..t * t)
        .map(|at| {
            if visible(at / t, at % t) {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    Tensor::from_vec(mask, (t, t), device)?.to_dtype(dtype)
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
        let mut loader = Loader {
            tensors,
            trained,
            device,
            dtype,
            variables: BTreeMap::new(),
            config,
            shapes: config.tensors(tensors.prefix()).into_iter().collect(),
        };
        let prefix = tensors.prefix();
        let blocks = (0..config.layers)
            .map(|layer| loader.block(&format!("{prefix}layers.{layer}"), config.window(layer)))
            .collect::<Result<_>>()?;
        let norm = loader.norm(&format!("{prefix}norm"))?;
        let embedding = loader.tensor(&format!("{prefix}embed_tokens.weight"))?;
        let head = if config.tied {
            Linear::frozen(embedding.clone(), None)
        } else {
            loader.linear("lm_head", false)?
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
        })
    }

    /// The last hidden states: `ids (b, t) u32 → (b, t, hidden)`.
    pub fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.hidden_states(ids)?)
    }

    fn hidden_states(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let angles = self.config.rope.angles(t, &self.device)?;
        let mut masks: BTreeMap<Option<usize>, Tensor> = BTreeMap::new();
        let mut x = self
            .embedding
            .index_select(&ids.flatten_all()?, 0)?
            .reshape((b, t, self.config.hidden))?;
        for block in &self.blocks {
            let window = block.window.filter(|&window| window < t);
            let mask = match masks.get(&window) {
                Some(mask) => mask.clone(),
                None => {
                    let mask = causal_mask(t, window, self.dtype, &self.device)?;
                    masks.insert(window, mask.clone());
                    mask
                }
            };
            x = block.forward(&self.config, &x, &angles, &mask)?;
        }
        self.norm.forward(&x)
    }

    /// The logits of every position: `ids (b, t) → (b, t, vocabulary)`, without gradients.
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden_states(ids)?.detach();
        Ok(self.head.apply(&hidden)?)
    }

    /// Σ of the next-token losses in nats, and how many tokens were predicted.
    ///
    /// `ids (b, t)`: each row predicts its tokens 1 … t − 1 from those before.
    pub fn loss(&self, ids: &Tensor) -> Result<(Tensor, usize)> {
        let (b, t) = ids.dims2()?;
        let hidden = self.hidden_states(ids)?;
        let predicting = hidden
            .narrow(1, 0, t - 1)?
            .contiguous()?
            .reshape((b * (t - 1), self.config.hidden))?;
        let targets = ids.narrow(1, 1, t - 1)?.contiguous()?.flatten_all()?;
        let loss = self.head.cross_entropy(&predicting, &targets)?;
        Ok((loss, b * (t - 1)))
    }
}

impl Block {
    fn forward(
        &self,
        config: &ModelConfig,
        x: &Tensor,
        angles: &Angles,
        mask: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let (heads, kv, d) = (config.heads, config.kv_heads, config.head_dim);
        let normed = self.attention_norm.forward(x)?;
        let projected = self
            .query_key_value
            .forward(&normed, &[heads * d, kv * d, kv * d])?;
        let per_head = |y: &Tensor, n: usize| y.reshape((b, t, n, d));
        let (mut q, mut k) = (
            per_head(&projected[0], heads)?,
            per_head(&projected[1], kv)?,
        );
        let v = per_head(&projected[2], kv)?.transpose(1, 2)?.contiguous()?;
        if let Some((query_norm, key_norm)) = &self.query_key_norms {
            q = query_norm.forward(&q)?;
            k = key_norm.forward(&k)?;
        }
        let q = ops::rotate(&q.transpose(1, 2)?.contiguous()?, angles)?;
        let k = ops::rotate(&k.transpose(1, 2)?.contiguous()?, angles)?;
        let scale = 1.0 / (d as f64).sqrt();
        let attended = ops::attention(&q, &k, &v, mask, scale)?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((b, t, heads * d))?;
        let x = (x + self.output.forward(&attended)?)?;
        let normed = self.mlp_norm.forward(&x)?;
        let wide = self
            .gate_up
            .forward(&normed, &[config.intermediate, config.intermediate])?;
        let mixed = ops::swiglu(&wide[0], &wide[1])?;
        x + self.down.forward(&mixed)?
    }
}

fn refuse_unknown(config: &ModelConfig) -> Result<()> {
    let refuse = |key: &str, reason: String| Error::Config {
        path: config.path.clone(),
        key: key.into(),
        reason,
    };
    if config.activation != "silu" {
        return Err(refuse(
            "hidden_act",
            format!("is `{}`, this decoder knows `silu`", config.activation),
        ));
    }
    if let Scaling::Unsupported(kind) = &config.rope.scaling {
        return Err(refuse(
            "rope_scaling",
            format!(
                "is of the type `{kind}`, this decoder knows default, linear, llama3 and longrope"
            ),
        ));
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

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let elements = self.elements(name)?;
        let tensor = Tensor::from_vec(elements.to_f32(), elements.shape.as_slice(), self.device)?;
        Ok(tensor.to_dtype(self.dtype)?)
    }

    fn linear(&mut self, module: &str, bias: bool) -> Result<Linear> {
        let weight = self.tensor(&format!("{module}.weight"))?;
        let bias = if bias {
            Some(self.tensor(&format!("{module}.bias"))?)
        } else {
            None
        };
        let layer = Linear::frozen(weight, bias);
        let Some((factors, delta)) = self.tensors.spectrum(module)? else {
            return Ok(layer);
        };
        if !self.trained.sigma && delta.iter().all(|&d| d == 0.0) {
            return Ok(layer);
        }
        let matrix = |a: &ndarray::Array2<f32>| -> Result<Tensor> {
            let values = a.iter().copied().collect::<Vec<f32>>();
            Ok(Tensor::from_vec(values, a.dim(), self.device)?.to_dtype(self.dtype)?)
        };
        let (u, v) = (matrix(&factors.u)?, matrix(&factors.v)?);
        let q = delta.len();
        let delta = Var::from_vec(delta, q, self.device)?;
        let layer = layer.with_spectrum(u, v, &delta);
        self.variables.insert(format!("{module}.delta"), delta);
        Ok(layer)
    }

    fn norm(&mut self, module: &str) -> Result<Norm> {
        let name = format!("{module}.weight");
        let elements = self.elements(&name)?;
        let values = Tensor::from_vec(elements.to_f32(), elements.shape.as_slice(), self.device)?;
        let weight = if self.trained.norms {
            let variable = Var::from_tensor(&values)?;
            let weight = variable.as_tensor().clone();
            self.variables.insert(name, variable);
            weight
        } else {
            values.to_dtype(self.dtype)?
        };
        Ok(Norm::new(weight, self.config.norm_eps))
    }

    fn block(&mut self, name: &str, window: Option<usize>) -> Result<Block> {
        let config = self.config;
        let mut many = |modules: &[&str], bias: bool| -> Result<Projections> {
            let mut layers = modules
                .iter()
                .map(|module| self.linear(&format!("{name}.{module}"), bias))
                .collect::<Result<Vec<_>>>()?;
            Ok(match layers.len() {
                1 => Projections::Fused(layers.remove(0)),
                _ => Projections::Apart(layers),
            })
        };
        let (query_key_value, gate_up) = if config.fused {
            (
                many(&["self_attn.qkv_proj"], config.qkv_bias)?,
                many(&["mlp.gate_up_proj"], config.mlp_bias)?,
            )
        } else {
            let separate = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
            (
                many(&separate, config.qkv_bias)?,
                many(&["mlp.gate_proj", "mlp.up_proj"], config.mlp_bias)?,
            )
        };
        let query_key_norms = if config.qk_norm {
            Some((
                self.norm(&format!("{name}.self_attn.q_norm"))?,
                self.norm(&format!("{name}.self_attn.k_norm"))?,
            ))
        } else {
            None
        };
        Ok(Block {
            attention_norm: self.norm(&format!("{name}.input_layernorm"))?,
            query_key_value,
            query_key_norms,
            output: self.linear(&format!("{name}.self_attn.o_proj"), config.output_bias)?,
            mlp_norm: self.norm(&format!("{name}.post_attention_layernorm"))?,
            gate_up,
            down: self.linear(&format!("{name}.mlp.down_proj"), config.mlp_bias)?,
            window,
        })
    }
}
