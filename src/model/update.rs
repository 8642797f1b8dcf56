//! What training adds to a weight, between thin factors.

use candle_core::{Result, Tensor};

use super::gpu;
use super::ops::{rows, wide};
use super::product::{self, Thin, like, outer, times};

/// What is added to a weight M (m, n): between thin factors, so that it is never formed.
///
/// What moves is f32 whatever the model's dtype: it changes by less than a 16-bit unit in the last place.
#[derive(Debug, Clone)]
pub enum Update {
    /// ΔW = uᵀ·diag(s ∘ δ)·v: the singular values move.
    ///
    /// On a GPU u and v may have rows of zeros behind those of δ.
    Diagonal {
        /// (q, m)
        u: Tensor,
        /// (q, n)
        v: Tensor,
        /// δ (q,); of stacked layers in as many parts.
        delta: Vec<Tensor>,
        /// s (q,); one where δ is absolute, σ where it is relative.
        scale: Option<Tensor>,
    },
    /// ΔW = uᵀ·R·v: LoRA-XS.
    Core {
        /// (r, m)
        u: Tensor,
        /// (r, n)
        v: Tensor,
        /// R (r, r)
        core: Tensor,
    },
    /// ΔW = s·B·A: LoRA.
    LowRank {
        /// B (m, r)
        b: Tensor,
        /// A (r, n)
        a: Tensor,
        /// s = α/r
        scale: f64,
    },
}

/// What both passes need of an update, computed in the first.
#[derive(Debug, Clone)]
pub(super) struct Read {
    /// x times the right factor, on a GPU: on a CPU W may be formed instead.
    pub inner: Option<Tensor>,
    /// s ∘ δ, which a GPU gathers from the parts of stacked layers.
    diagonal: Option<Tensor>,
}

impl Update {
    /// What may be a variable, in the order of [`Self::pull`].
    pub(super) fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Self::Diagonal { delta, .. } => delta.iter().collect(),
            Self::Core { core, .. } => vec![core],
            Self::LowRank { a, b, .. } => vec![a, b],
        }
    }

    /// The updates of layers that become one: all of them diagonal, one of each layer. u has a block for each.
    pub(super) fn stacked(updates: &[&[Self]]) -> Result<Option<Self>> {
        let (mut us, mut vs, mut deltas, mut scales) = (vec![], vec![], vec![], vec![]);
        for updates in updates {
            let [Self::Diagonal { u, v, delta, scale }] = updates else {
                return Ok(None);
            };
            let q = delta.iter().map(Tensor::elem_count).sum();
            us.push(u.narrow(0, 0, q)?);
            vs.push(v.narrow(0, 0, q)?);
            deltas.extend(delta.iter().cloned());
            scales.extend(scale.iter().cloned());
        }
        let scale = match scales.len() {
            0 => None,
            count if count == updates.len() => Some(Tensor::cat(&scales, 0)?),
            _ => return Ok(None),
        };
        let sides = us.iter().map(|u| u.dim(1)).collect::<Result<Vec<_>>>()?;
        let all: usize = sides.iter().sum();
        let mut before = 0;
        for (u, side) in us.iter_mut().zip(sides) {
            *u = u.pad_with_zeros(1, before, all - before - side)?;
            before += side;
        }
        Ok(Some(Self::Diagonal {
            u: padded(Tensor::cat(&us, 0)?)?,
            v: padded(Tensor::cat(&vs, 0)?)?,
            delta: deltas,
            scale,
        }))
    }

    /// s ∘ δ
    fn diagonal(delta: &[Tensor], scale: &Option<Tensor>) -> Result<Tensor> {
        let delta = match delta {
            [all] => all.detach(),
            parts => match gpu::gather(parts)? {
                Some(all) => all,
                None => Tensor::cat(parts, 0)?.detach(),
            },
        };
        match scale {
            Some(scale) => delta * scale,
            None => Ok(delta),
        }
    }

    /// What is computed of x (…, n) for both passes.
    pub(super) fn read(&self, x: &Tensor) -> Result<Read> {
        let (right, diagonal) = match self {
            Self::Diagonal {
                v, delta, scale, ..
            } => (v, Some(Self::diagonal(delta, scale)?)),
            Self::Core { v, .. } => (v, None),
            Self::LowRank { a, .. } => (a, None),
        };
        let through = || product::forward(x, right, &[], None);
        Ok(Read {
            inner: x.device().is_cuda().then(through).transpose()?,
            diagonal,
        })
    }

    /// ΔW between its factors; `inner` is what is multiplied by W times the one that faces it, if that is known.
    pub(super) fn thin(&self, read: &Read, inner: Option<Tensor>) -> Result<Thin> {
        let (left, right) = match self {
            Self::Diagonal { u, v, .. } => (u.clone(), v.clone()),
            Self::Core { u, v, core } => {
                let core = core.detach();
                let left = core.t()?.matmul(&u.to_dtype(core.dtype())?)?;
                (left, v.clone())
            }
            Self::LowRank { b, a, scale } => ((b.detach().t()? * *scale)?, a.detach()),
        };
        Ok(Thin {
            left,
            right,
            diagonal: read.diagonal.clone(),
            inner,
        })
    }

    /// The gradients of those of [`Self::tensors`] that are variables, and what they make known: dL/dy times the left
    /// factor of ΔW.
    pub(super) fn pull(
        &self,
        x: &Tensor,
        read: &Read,
        g: &Tensor,
    ) -> Result<(Vec<Tensor>, Option<Tensor>)> {
        if !self.tensors().into_iter().any(Tensor::is_variable) {
            return Ok((Vec::new(), None));
        }
        let through = |t: &Tensor, factor: &Tensor| product::forward(t, factor, &[], None);
        let through_right = |factor: &Tensor| match &read.inner {
            Some(inner) => Ok(inner.clone()),
            None => through(x, factor),
        };
        match self {
            Self::Diagonal { u, v, delta, scale } => {
                let (xv, gu) = (through_right(v)?, through(g, u)?);
                let q = delta.iter().map(Tensor::elem_count).sum();
                let sum = match gpu::sum_of_products(&rows(&xv)?, &rows(&gu)?)? {
                    Some(sum) => sum.narrow(0, 0, q)?,
                    None => rows(&(wide(&xv)? * wide(&gu)?)?)?
                        .to_dtype(delta[0].dtype())?
                        .sum(0)?
                        .narrow(0, 0, q)?,
                };
                let gradient = match scale {
                    Some(scale) => (sum * scale)?,
                    None => sum,
                };
                let mut start = 0;
                let parts = delta.iter().map(|part| {
                    let count = part.elem_count();
                    start += count;
                    gradient.narrow(0, start - count, count)
                });
                Ok((parts.collect::<Result<_>>()?, Some(gu)))
            }
            Self::Core { u, v, core } => {
                let gu = through(g, u)?;
                let gradient = outer(&gu, &through_right(v)?)?.to_dtype(core.dtype())?;
                let inner = times(&gu, &like(core, g)?)?;
                Ok((vec![gradient], Some(inner)))
            }
            Self::LowRank { b, a, scale } => {
                let inner = (times(g, &like(b, g)?)? * *scale)?;
                let xa = (through_right(a)? * *scale)?;
                let da = outer(&inner, x)?.to_dtype(a.dtype())?;
                let db = outer(g, &xa)?.to_dtype(b.dtype())?;
                Ok((vec![da, db], Some(inner)))
            }
        }
    }
}

/// Vectors by rows; on a GPU with rows of zeros behind them, up to a multiple of what cuBLAS reads at once, 16 bytes.
pub(super) fn padded(vectors: Tensor) -> Result<Tensor> {
    let missing = vectors.dim(0)?.next_multiple_of(8) - vectors.dim(0)?;
    match vectors.device().is_cuda() {
        true => vectors.pad_with_zeros(0, 0, missing),
        false => Ok(vectors),
    }
}
