//! A linear layer with what training adds to its weight.

use candle_core::{Result, Tensor};

use super::product::{self, Thin, outer};
use super::tape::{attach, tracked};
use super::update::{Read, Update};

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
    pub(super) fn inputs<'a>(&'a self, x: &'a Tensor) -> Vec<&'a Tensor> {
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

    /// The layer without a gradient, and what [`Self::pull`] takes up again of each update.
    pub(super) fn apply(&self, x: &Tensor) -> Result<(Tensor, Vec<Read>)> {
        let read = self.updates.iter().map(|update| update.read(x));
        let read: Vec<Read> = read.collect::<Result<_>>()?;
        let updates = self.updates.iter().zip(&read);
        let added = updates.map(|(update, read)| update.thin(read, read.inner.clone()));
        let added: Vec<Thin> = added.collect::<Result<_>>()?;
        let y = product::forward(x, &self.weight, &added, self.bias.as_ref())?;
        Ok((y, read))
    }

    /// dL/dx and dL/d of each tensor that moves, from what [`Self::apply`] read and dL/dy: the first where it is wanted.
    pub(super) fn pull(
        &self,
        x: &Tensor,
        read: &[Read],
        g: &Tensor,
        wants_x: bool,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut gradients = vec![None];
        let mut added = Vec::new();
        for (update, read) in self.updates.iter().zip(read) {
            let (moved, inner) = update.pull(x, read, g)?;
            gradients.extend(moved.into_iter().map(Some));
            added.push(update.thin(read, inner)?);
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

#[cfg(test)]
mod tests {
    use super::super::ops::tests::{assert_gradient, random};
    use super::super::tape::record;
    use super::*;
    use candle_core::{DType, Var};

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
}
