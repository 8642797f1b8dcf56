//! The layers that own weights: a linear one with what training adds to it, and a norm.

use candle_core::{DType, Device, Result, Tensor};

use super::ops::{
    add, capped, cast, layer_norm, rms_norm, rms_norm_beside, rows, shifted, wide, wider,
};
use super::product::{self, Thin, like, outer, times};
use super::tape::{attach, tracked};
use super::{fused, gpu};

/// A linear layer: `y = x·Wᵀ + b` with `W = M + Σ ΔW`, where each [`Update`] gives one ΔW.
///
/// `x (…, n) → y (…, m)`. W is formed, tile by tile and in f32, where that is cheaper than the products with the factors of
/// ΔW; no gradient of its size ever is. Only a weight M that is a variable itself gets an m × n gradient: one that is
/// trained as a whole, or the trained embedding that a head is tied to.
#[derive(Debug, Clone)]
pub struct Linear {
    /// (m, n)
    weight: Tensor,
    /// (m,)
    bias: Option<Tensor>,
    updates: Vec<Update>,
}

impl Linear {
    pub fn new(weight: Tensor, bias: Option<Tensor>, updates: Vec<Update>) -> Self {
        Self {
            weight,
            bias,
            updates,
        }
    }

    /// Layers of the same input as one, whose outputs lie one behind the other: a GPU prefers few large products to many.
    ///
    /// Nothing where a weight moves, or where what is added to one of them is not like what is added to the others.
    pub fn stacked(layers: &[Self]) -> Result<Option<Self>> {
        if layers.iter().any(|layer| layer.weight.is_variable()) {
            return Ok(None);
        }
        let biases: Vec<&Tensor> = layers.iter().filter_map(|l| l.bias.as_ref()).collect();
        let bias = match biases.len() {
            0 => None,
            count if count == layers.len() => Some(Tensor::cat(&biases, 0)?),
            _ => return Ok(None),
        };
        let updates: Vec<&[Update]> = layers.iter().map(|layer| &layer.updates[..]).collect();
        let updates = if updates.iter().all(|updates| updates.is_empty()) {
            Vec::new()
        } else {
            match Update::stacked(&updates)? {
                Some(update) => vec![update],
                None => return Ok(None),
            }
        };
        let weights: Vec<&Tensor> = layers.iter().map(|layer| &layer.weight).collect();
        Ok(Some(Self::new(Tensor::cat(&weights, 0)?, bias, updates)))
    }

    /// What receives gradients, in the order of [`Self::pull`].
    fn inputs<'a>(&'a self, x: &'a Tensor) -> Vec<&'a Tensor> {
        let updates = self.updates.iter().flat_map(Update::tensors);
        let moving = updates.chain([&self.weight]).filter(|t| tracked(t));
        [x].into_iter().chain(moving).collect()
    }

    /// The layer with its gradient.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (y, read) = self.apply(&x.detach())?;
        let (layer, input, wants_x) = (self.clone(), x.detach(), tracked(x));
        attach(&self.inputs(x), y, move |g| {
            layer.pull(&input, &read, g, wants_x)
        })
    }

    /// The layer without a gradient, and x times the right factor of each update, where that was computed.
    fn apply(&self, x: &Tensor) -> Result<(Tensor, Vec<Option<Tensor>>)> {
        let read = self.updates.iter().map(|update| update.read(x));
        let read: Vec<Option<Tensor>> = read.collect::<Result<_>>()?;
        let updates = self.updates.iter().zip(&read);
        let added = updates.map(|(update, read)| update.thin(read.clone()));
        let added: Vec<Thin> = added.collect::<Result<_>>()?;
        let y = product::forward(x, &self.weight, &added, self.bias.as_ref())?;
        Ok((y, read))
    }

    /// dL/dx and dL/d of each tensor that moves, from what [`Self::apply`] read and dL/dy: the first where it is wanted.
    fn pull(
        &self,
        x: &Tensor,
        read: &[Option<Tensor>],
        g: &Tensor,
        wants_x: bool,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut gradients = vec![None];
        let mut added = Vec::new();
        for (update, read) in self.updates.iter().zip(read) {
            let (moved, inner) = update.pull(x, read.as_ref(), g)?;
            gradients.extend(moved.into_iter().map(Some));
            added.push(update.thin(inner)?);
        }
        if self.weight.is_variable() {
            gradients.push(Some(outer(g, x)?.to_dtype(self.weight.dtype())?));
        }
        if wants_x {
            gradients[0] = Some(product::back(g, &self.weight, &added)?);
        }
        Ok(gradients)
    }
}

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

impl Update {
    /// What may be a variable, in the order of [`Self::pull`].
    fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Self::Diagonal { delta, .. } => delta.iter().collect(),
            Self::Core { core, .. } => vec![core],
            Self::LowRank { a, b, .. } => vec![a, b],
        }
    }

    /// The updates of layers that become one: all of them diagonal, one of each layer. u has a block for each.
    fn stacked(updates: &[&[Self]]) -> Result<Option<Self>> {
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

    /// x times the right factor, on a GPU: on a CPU W may be formed instead.
    fn read(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let right = match self {
            Self::Diagonal { v, .. } | Self::Core { v, .. } => v,
            Self::LowRank { a, .. } => a,
        };
        let through = || product::forward(x, right, &[], None);
        x.device().is_cuda().then(through).transpose()
    }

    /// ΔW between its factors; `inner` is what is multiplied by W times the one that faces it, if that is known.
    fn thin(&self, inner: Option<Tensor>) -> Result<Thin> {
        let (left, right, diagonal) = match self {
            Self::Diagonal { u, v, delta, scale } => {
                (u.clone(), v.clone(), Some(Self::diagonal(delta, scale)?))
            }
            Self::Core { u, v, core } => {
                let core = core.detach();
                let left = core.t()?.matmul(&u.to_dtype(core.dtype())?)?;
                (left, v.clone(), None)
            }
            Self::LowRank { b, a, scale } => ((b.detach().t()? * *scale)?, a.detach(), None),
        };
        Ok(Thin {
            left,
            right,
            diagonal,
            inner,
        })
    }

    /// The gradients of those of [`Self::tensors`] that are variables, and what they make known: dL/dy times the left
    /// factor of ΔW. `read` is x times the right one, if that is known.
    fn pull(
        &self,
        x: &Tensor,
        read: Option<&Tensor>,
        g: &Tensor,
    ) -> Result<(Vec<Tensor>, Option<Tensor>)> {
        if !self.tensors().into_iter().any(Tensor::is_variable) {
            return Ok((Vec::new(), None));
        }
        let through = |t: &Tensor, factor: &Tensor| product::forward(t, factor, &[], None);
        let through_right = |factor: &Tensor| match read {
            Some(read) => Ok(read.clone()),
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

/// What makes logits of the last hidden states: `cap·tanh(linear(x) / divisor / cap)`, the cap where there is one.
#[derive(Debug, Clone)]
pub struct Head {
    pub linear: Linear,
    pub divisor: f64,
    pub cap: Option<f64>,
}

impl Head {
    /// Logits in f32 of what the layer gave, and the slope of the cap.
    fn bent(&self, y: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let logits = y.to_dtype(DType::F32)?;
        let logits = if self.divisor == 1.0 {
            logits
        } else {
            (logits / self.divisor)?
        };
        match self.cap {
            None => Ok((logits, None)),
            Some(cap) => {
                let (logits, slope) = capped(&logits, cap)?;
                Ok((logits, Some(slope)))
            }
        }
    }

    /// `x (…, n) → (…, vocabulary)` in f32, without a gradient.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.bent(&self.linear.apply(x)?.0)?.0)
    }

    /// A factor times Σ over rows of −log softmax at the row's target, without ever holding all logits.
    ///
    /// `x (rows, n), targets (rows,) u32`. Gradients are formed in the forward pass, chunk by chunk, while the logits are
    /// there.
    pub fn cross_entropy(&self, x: &Tensor, targets: &Tensor, factor: f64) -> Result<Loss> {
        let total = x.dim(0)?;
        let inputs = self.linear.inputs(x);
        let wanted: Vec<bool> = inputs.iter().map(|input| tracked(input)).collect();
        let mut losses = Vec::new();
        let mut dx = Vec::new();
        // of what is trained in the layer: sums over the chunks
        let mut sums: Vec<Option<Tensor>> = vec![None; inputs.len()];
        let most = chunk_rows(x.device().is_cuda(), self.is_straight());
        for start in (0..total).step_by(most) {
            let n = most.min(total - start);
            let chunk = x.detach().narrow(0, start, n)?.contiguous()?;
            let target = targets.narrow(0, start, n)?.unsqueeze(1)?.contiguous()?;
            let (y, read) = self.linear.apply(&chunk)?;
            let (sum, d_linear) = self.loss_and_gradient(y, &target, factor)?;
            losses.push(sum);
            if !wanted.contains(&true) {
                continue;
            }
            let gradients = self.linear.pull(&chunk, &read, &d_linear, wanted[0])?;
            for (at, gradient) in gradients.into_iter().enumerate() {
                match (gradient, &mut sums[at]) {
                    (None, _) => {}
                    (Some(gradient), _) if at == 0 => dx.push(gradient),
                    (Some(gradient), Some(sum)) => *sum = (&*sum + gradient)?,
                    (Some(gradient), sum) => *sum = Some(gradient),
                }
            }
        }
        if wanted[0] {
            sums[0] = Some(Tensor::cat(&dx, 0)?);
        }
        let found = inputs.into_iter().zip(sums);
        Ok(Loss {
            value: Losses::total(losses, factor, x.device())?,
            gradients: found
                .filter_map(|(input, gradient)| Some((input.clone(), gradient?)))
                .collect(),
        })
    }

    /// Whether logits are what the layer gives.
    fn is_straight(&self) -> bool {
        self.cap.is_none() && self.divisor == 1.0
    }
}

/// A loss, the end of a computation, and its gradients with respect to what it was made of and is tracked.
pub struct Loss {
    /// (1,)
    pub value: Tensor,
    pub gradients: Vec<(Tensor, Tensor)>,
}

/// Losses of rows, where they were computed: a GPU is not asked for them before it has all its work.
enum Losses {
    Sum(f64),
    Each(Tensor),
}

impl Losses {
    /// factor·Σ, (1,)
    fn total(all: Vec<Self>, factor: f64, device: &Device) -> Result<Tensor> {
        let mut sum = 0.0;
        let mut each = Vec::new();
        for losses in all {
            match losses {
                Self::Sum(of_rows) => sum += of_rows,
                Self::Each(of_rows) => each.push(of_rows),
            }
        }
        match each.is_empty() {
            true => Tensor::new(&[(factor * sum) as f32], device),
            false => Tensor::cat(&each, 0)?.sum_keepdim(0)? * factor,
        }
    }
}

impl Head {
    /// The losses of what the layer gave, and the gradient of a factor times their sum, in its place where that goes.
    fn loss_and_gradient(
        &self,
        y: Tensor,
        targets: &Tensor,
        factor: f64,
    ) -> Result<(Losses, Tensor)> {
        if self.is_straight()
            && let Some(each) = gpu::cross_entropy(&y, targets, factor)?
        {
            return Ok((Losses::Each(each), y));
        }
        let dtype = y.dtype();
        let (logits, slope) = self.bent(&y)?;
        drop(y);
        let factor = factor / self.divisor;
        let (sum, gradient) = if let Some(sum) = fused::cross_entropy(&logits, targets, factor)? {
            (Losses::Sum(sum), logits)
        } else if let Some(each) = gpu::cross_entropy(&logits, targets, factor)? {
            (Losses::Each(each), logits)
        } else {
            let (sum, gradient) = composed_cross_entropy(&logits, targets)?;
            (Losses::Sum(sum), (gradient * factor)?)
        };
        let gradient = match slope {
            Some(slope) => (gradient * slope)?,
            None => gradient,
        };
        Ok((sum, gradient.to_dtype(dtype)?))
    }
}

/// Rows of logits that are alive at once in [`Head::cross_entropy`].
///
/// A GPU wants many; where the logits are bent, some of them in f32.
pub fn chunk_rows(on_gpu: bool, is_straight: bool) -> usize {
    match (on_gpu, is_straight) {
        (true, true) => 16 * CHUNK_ROWS,
        (true, false) => 4 * CHUNK_ROWS,
        (false, _) => CHUNK_ROWS,
    }
}

const CHUNK_ROWS: usize = 256;

/// Σ −log softmax(logits) at `wanted (rows, 1)`, and its gradient, from tensor operations.
fn composed_cross_entropy(logits: &Tensor, wanted: &Tensor) -> Result<(f64, Tensor)> {
    let shifted = logits.broadcast_sub(&logits.max_keepdim(1)?)?;
    let exponentials = shifted.exp()?;
    let sums = exponentials.sum_keepdim(1)?;
    let losses = (sums.log()? - shifted.gather(wanted, 1)?)?;
    let loss = losses.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    let minus_one = (wanted.zeros_like()?.to_dtype(DType::F32)? - 1.0)?;
    let gradient = exponentials
        .broadcast_div(&sums)?
        .scatter_add(wanted, &minus_one, 1)?;
    Ok((loss, gradient))
}

/// A norm with a weight that may be trained.
#[derive(Debug, Clone)]
pub struct Norm {
    weight: Tensor,
    eps: f64,
    /// Added to the weight: 1 where a checkpoint stores the distance from one.
    offset: f64,
    /// Of a layer norm; without one it is by the root mean square.
    bias: Option<Tensor>,
}

impl Norm {
    pub fn root_mean_square(weight: Tensor, eps: f64, offset: f64) -> Self {
        Self {
            weight,
            eps,
            offset,
            bias: None,
        }
    }

    pub fn layer(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self {
            weight,
            eps,
            offset: 0.0,
            bias: Some(bias),
        }
    }

    /// s = x + added, or x itself, and the norm of s.
    pub fn beside(&self, x: &Tensor, added: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        if self.offset == 0.0 && self.bias.is_none() {
            let weight = cast(&self.weight, x.dtype())?;
            return rms_norm_beside(x, added, &weight, self.eps);
        }
        let sum = match added {
            Some(added) => add(x, added)?,
            None => x.clone(),
        };
        let y = self.forward(&sum)?;
        Ok((sum, y))
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.offset != 0.0 {
            // a small distance from one would be lost in 16 bits
            let weight = shifted(&cast(&self.weight, wider(x))?, self.offset)?;
            return cast(
                &rms_norm(&cast(x, wider(x))?, &weight, self.eps)?,
                x.dtype(),
            );
        }
        // a trained norm is kept in f32 beside a model in 16 bits
        let weight = cast(&self.weight, x.dtype())?;
        match &self.bias {
            Some(bias) => layer_norm(x, &weight, bias, self.eps),
            None => rms_norm(x, &weight, self.eps),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::tests::{assert_gradient, random};
    use super::super::tape::record;
    use super::*;
    use candle_core::{Device, Var};

    /// Makes an update of what moves.
    type Make = Box<dyn Fn(&[Tensor]) -> Update>;

    /// Every kind of update, by the shapes of what moves, for m = 11 and n = 6; what is frozen is random.
    fn updates() -> Vec<(Vec<Vec<usize>>, Make)> {
        let frozen = |shape: &[usize]| random(shape, DType::F64).as_detached_tensor();
        let (u, v, scale) = (frozen(&[3, 11]), frozen(&[3, 6]), frozen(&[3]));
        let diagonal = |scale: Option<Tensor>| -> Make {
            let (u, v) = (u.clone(), v.clone());
            Box::new(move |t| Update::Diagonal {
                u: u.clone(),
                v: v.clone(),
                delta: vec![t[0].clone()],
                scale: scale.clone(),
            })
        };
        let (first, second) = (u.clone(), v.clone());
        vec![
            (vec![vec![3]], diagonal(None)),
            (vec![vec![3]], diagonal(Some(scale))),
            (
                vec![vec![3, 3]],
                Box::new(move |t| Update::Core {
                    u: first.clone(),
                    v: second.clone(),
                    core: t[0].clone(),
                }),
            ),
            (
                vec![vec![2, 6], vec![11, 2]],
                Box::new(|t| Update::LowRank {
                    a: t[0].clone(),
                    b: t[1].clone(),
                    scale: 1.7,
                }),
            ),
        ]
    }

    #[test]
    fn linear_gradient_reaches_input_and_what_moves_of_every_update() {
        let weight = random(&[11, 6], DType::F64).as_detached_tensor();
        for (shapes, update) in updates() {
            let mut inputs = vec![random(&[2, 4, 6], DType::F64)];
            inputs.extend(shapes.iter().map(|shape| random(shape, DType::F64)));
            let f = |t: &[Tensor]| {
                Linear::new(weight.clone(), None, vec![update(&t[1..])]).forward(&t[0])
            };
            assert_gradient(&inputs, f, 1e-5, 1e-6);
        }
    }

    /// Above some rows W is formed (11·6 < 40·17); in f64 it never is.
    #[test]
    fn a_formed_weight_gives_the_values_and_gradients_of_its_factors() {
        let weight = random(&[11, 6], DType::F64).as_detached_tensor();
        for (shapes, update) in updates() {
            let mut inputs = vec![random(&[40, 6], DType::F64)];
            inputs.extend(shapes.iter().map(|shape| random(shape, DType::F64)));
            let run = |dtype: DType| -> Result<Vec<Vec<f64>>> {
                let cast = |t: &Tensor| t.detach().to_dtype(dtype);
                let inputs = inputs.iter().map(|t| Var::from_tensor(&cast(t)?));
                let inputs: Vec<Var> = inputs.collect::<Result<_>>()?;
                let moving: Vec<Tensor> =
                    inputs[1..].iter().map(|v| v.as_tensor().clone()).collect();
                let update = match update(&moving) {
                    Update::Diagonal { u, v, delta, scale } => Update::Diagonal {
                        u: cast(&u)?,
                        v: cast(&v)?,
                        delta,
                        scale: scale.map(|scale| cast(&scale)).transpose()?,
                    },
                    Update::Core { u, v, core } => Update::Core {
                        u: cast(&u)?,
                        v: cast(&v)?,
                        core,
                    },
                    other => other,
                };
                let layer = Linear::new(cast(&weight)?, None, vec![update]);
                let (y, tape) = record(&[], || layer.forward(&inputs[0]))?;
                let mut gradients = tape.back(&y, y.cos()?)?;
                let found = inputs
                    .iter()
                    .map(|v| gradients.take(v).expect("a gradient"));
                let numbers = |t: Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1();
                [y].into_iter().chain(found).map(numbers).collect()
            };
            let (single, double) = (
                run(DType::F32).expect("computes"),
                run(DType::F64).expect("computes"),
            );
            for (found, wanted) in single.iter().zip(&double) {
                let scale = wanted.iter().fold(1f64, |m, x| m.max(x.abs()));
                for (found, wanted) in found.iter().zip(wanted) {
                    // y reaches some tens and is the phase of a cosine, which errs by 10⁻⁶ of that, in each of 40 terms
                    // that are larger than their sum
                    assert!(
                        (found - wanted).abs() < 1e-3 * scale,
                        "{found} for {wanted}"
                    );
                }
            }
        }
    }

    /// A layer of m outputs whose q values move, in f64.
    fn moving(m: usize, q: usize, delta: &Tensor, relative: bool) -> Linear {
        let frozen = |shape: &[usize]| random(shape, DType::F64).as_detached_tensor();
        let update = Update::Diagonal {
            u: frozen(&[q, m]),
            v: frozen(&[q, 6]),
            delta: vec![delta.clone()],
            scale: relative.then(|| frozen(&[q])),
        };
        Linear::new(frozen(&[m, 6]), Some(frozen(&[m])), vec![update])
    }

    #[test]
    fn stacked_layers_give_the_values_and_gradients_of_each() {
        for relative in [false, true] {
            let deltas = [3, 2, 4].map(|q| random(&[q], DType::F64));
            let layers: Vec<Linear> = (deltas.iter().zip([11, 4, 5]))
                .map(|(delta, m)| moving(m, delta.elem_count(), delta, relative))
                .collect();
            let stacked = Linear::stacked(&layers).expect("computes");
            let stacked = stacked.expect("they are alike");
            let x = random(&[2, 7, 6], DType::F64);
            let weights = random(&[2, 7, 20], DType::F64);
            let run = |f: &dyn Fn() -> Result<Vec<Tensor>>| -> Result<Vec<Vec<f64>>> {
                let (parts, tape) = record(&[], f)?;
                let mut start = 0;
                let mut known = Vec::new();
                for part in &parts {
                    let side = part.dim(2)?;
                    known.push((part.clone(), weights.narrow(2, start, side)?.contiguous()?));
                    start += side;
                }
                let mut gradients = tape.back_from(known)?;
                let inputs = [&x].into_iter().chain(&deltas);
                let found = inputs.map(|input| gradients.take(input).expect("a gradient"));
                let found = [Tensor::cat(&parts, 2)?].into_iter().chain(found);
                found.map(|t| t.flatten_all()?.to_vec1()).collect()
            };
            let apart = run(&|| layers.iter().map(|layer| layer.forward(&x)).collect());
            let at_once = run(&|| Ok(vec![stacked.forward(&x)?]));
            let (apart, at_once) = (apart.expect("computes"), at_once.expect("computes"));
            for (found, wanted) in at_once.iter().flatten().zip(apart.iter().flatten()) {
                // sums of some tens of products of normal numbers, in another order
                assert!((found - wanted).abs() < 1e-11, "{found} for {wanted}");
            }
        }
    }

    #[test]
    fn layers_of_different_kinds_are_not_stacked() {
        let delta = random(&[2], DType::F64);
        let plain = moving(4, 2, &delta, false);
        let mut others = vec![moving(4, 2, &delta, true), plain.clone(), plain.clone()];
        others[1].updates.clear();
        others[2].bias = None;
        let moves = random(&[4, 6], DType::F64);
        others.push(Linear::new(moves.as_tensor().clone(), None, vec![]));
        for other in others {
            let pair = [plain.clone(), other];
            assert!(Linear::stacked(&pair).expect("asks").is_none());
        }
        let bare = |m: usize| Linear::new(random(&[m, 6], DType::F64).detach(), None, vec![]);
        let stacked = Linear::stacked(&[bare(3), bare(2)]).expect("asks");
        assert_eq!(stacked.expect("both are bare").weight.dims(), [5, 6]);
    }

    #[test]
    fn linear_gradient_reaches_a_weight_under_frozen_updates_and_a_moving_one() {
        let frozen: Vec<Update> = updates()
            .iter()
            .map(|(shapes, update)| {
                let tensors = shapes.iter().map(|shape| random(shape, DType::F64));
                let tensors: Vec<Tensor> = tensors.map(|t| t.as_detached_tensor()).collect();
                update(&tensors)
            })
            .collect();
        let (_, moving) = updates().remove(0);
        let inputs = [
            random(&[2, 4, 6], DType::F64),
            random(&[3], DType::F64),
            random(&[11, 6], DType::F64),
        ];
        let f = |t: &[Tensor]| {
            let mut updates = frozen.clone();
            updates.insert(2, moving(&t[1..2]));
            Linear::new(t[2].clone(), None, updates).forward(&t[0])
        };
        assert_gradient(&inputs, f, 1e-5, 1e-6);
    }

    #[test]
    fn cross_entropy_gradient_reaches_input_update_and_weight_across_chunks() {
        let n = CHUNK_ROWS + 37;
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % 11).collect();
        let targets = Tensor::from_vec(targets, n, &Device::Cpu).expect("targets");
        let (shapes, update) = updates().remove(0);
        let inputs = [
            random(&[n, 6], DType::F64),
            random(&shapes[0], DType::F64),
            random(&[11, 6], DType::F64),
        ];
        for (divisor, cap) in [(1.0, None), (1.7, None), (1.0, Some(2.0)), (0.6, Some(3.0))] {
            let loss = |t: &[Tensor]| {
                let head = Head {
                    linear: Linear::new(t[2].clone(), None, vec![update(&t[1..2])]),
                    divisor,
                    cap,
                };
                let Loss { value, gradients } = head.cross_entropy(&t[0], &targets, 0.3)?;
                let (inputs, gradients): (Vec<_>, Vec<_>) = gradients.into_iter().unzip();
                let inputs: Vec<&Tensor> = inputs.iter().collect();
                attach(&inputs, value, move |g| {
                    let g = f64::from(g.to_vec1::<f32>()?[0]);
                    gradients.into_iter().map(|t| Ok(Some((t * g)?))).collect()
                })
            };
            // the loss comes back in f32, and bends: a wider step errs by more than its rounding
            assert_gradient(&inputs, loss, 4e-3, 1e-3);
        }
    }

    #[test]
    fn norm_gradient_with_and_without_an_offset() {
        for offset in [0.0, 1.0] {
            let inputs = [random(&[3, 5, 8], DType::F32), random(&[8], DType::F32)];
            let f =
                |t: &[Tensor]| Norm::root_mean_square(t[1].clone(), 1e-5, offset).forward(&t[0]);
            assert_gradient(&inputs, f, 1e-2, 1e-2);
        }
    }
}
