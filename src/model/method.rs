//! What training moves of the linear layers, under which names, and where it begins.

use candle_core::{DType, Device, Result, Tensor, Var};
use half::bf16;
use ndarray::{Array2, ArrayView2, s};
use serde::{Deserialize, Serialize};

use super::update::{Update, padded};
use crate::random::uniform;
use crate::split::{Change, Factors};
use crate::weights::{Dtype, Elements};

/// What moves of every linear layer of a model, its untied head included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The singular values of what is decomposed.
    Sigma(Parametrisation),
    /// B and A of M + (α/r)·B·A (Hu et al. 2021), initialised as PEFT does.
    Lora(Lora),
    /// R of M + uᵀ·R·v between the first `rank` rows of u and v (Bałazy et al. 2024), of what is decomposed.
    ///
    /// The paper's factor Σ is left out, so that R moves on the scale of σ as Δσ does; and R begins at zero, where the
    /// paper draws it from N(0, 10⁻¹⁰): its gradient is not zero there, and the model is the base to the bit.
    LoraXs { rank: usize },
    /// All of M.
    Full,
}

/// What is multiplied by u and v while σ moves. An adapter holds Δσ in either case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Parametrisation {
    /// σ + δ: each step moves all σ by about the same.
    #[default]
    Absolute,
    /// σ·(1 + ρ): each step moves all σ by about the same share of themselves.
    Relative,
}

/// The settings of a LoRA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lora {
    /// r
    pub rank: usize,
    /// α: B·A is multiplied by α/r.
    pub alpha: usize,
    /// Of A.
    pub seed: u64,
}

/// The weights of a LoRA that does not move: ΔW = s·B·A.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// A (r, n)
    pub a: Array2<f32>,
    /// B (m, r)
    pub b: Array2<f32>,
    /// s
    pub scale: f64,
}

impl Default for Method {
    fn default() -> Self {
        Self::Sigma(Parametrisation::default())
    }
}

/// The endings of the variables' names, behind the module's. Δσ, R and M end as in an adapter's file, A and B as in PEFT's.
pub const DELTA: &str = ".delta";
pub const RHO: &str = ".rho";
pub const CORE: &str = ".core";
pub const LORA_A: &str = ".lora_A.weight";
pub const LORA_B: &str = ".lora_B.weight";

impl Method {
    /// As it is called on the command line and in an adapter.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sigma(_) => "sigma",
            Self::Lora(_) => "lora",
            Self::LoraXs { .. } => "lora-xs",
            Self::Full => "full",
        }
    }

    /// Whether a variable of that name has a gradient of zero at its beginning: A is multiplied by B, which is zero.
    pub fn begins_still(self, variable: &str) -> bool {
        matches!(self, Self::Lora(_)) && variable.ends_with(LORA_A)
    }

    /// A learning rate to begin with: Adam moves every number by about this much per step.
    pub fn learning_rate(self) -> f64 {
        match self {
            // σ of real weights are 1 to 100
            Self::Sigma(Parametrisation::Absolute) => 1e-2,
            Self::Sigma(Parametrisation::Relative) | Self::LoraXs { .. } => 1e-3,
            // what PEFT's examples and most full fine-tunings take
            Self::Lora(_) => 2e-4,
            Self::Full => 1e-5,
        }
    }
}

/// What is added to the weight of a module, and what of that is a variable, by name.
#[derive(Default)]
pub(super) struct Updates {
    pub updates: Vec<Update>,
    pub variables: Vec<(String, Var)>,
}

/// Where tensors are put, and in which dtype is computed.
pub(super) struct Place<'a> {
    pub device: &'a Device,
    pub dtype: DType,
}

impl Place<'_> {
    /// Whether matrices in 16 bits stay so: products widen them as they go.
    fn widens(&self) -> bool {
        matches!(self.device, Device::Cpu) && self.dtype == DType::F32
    }

    /// A frozen matrix, in the dtype it is stored in where products read that.
    pub fn matrix(&self, elements: &Elements) -> Result<Tensor> {
        let shape = elements.shape.as_slice();
        let dtype = match elements.dtype {
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            _ => DType::F32,
        };
        if dtype == self.dtype || dtype != DType::F32 && self.widens() {
            return Tensor::from_raw_buffer(&elements.bytes, dtype, shape, self.device);
        }
        Tensor::from_vec(elements.to_f32(), shape, self.device)?.to_dtype(self.dtype)
    }

    fn frozen(&self, rows: ArrayView2<f32>) -> Result<Tensor> {
        let values: Vec<f32> = rows.iter().copied().collect();
        // vectors of a decomposition that stores them in bf16 are no longer
        if self.widens() && values.iter().all(|x| x.to_bits() & 0xFFFF == 0) {
            let short: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            return Tensor::from_vec(short, rows.dim(), self.device);
        }
        Tensor::from_vec(values, rows.dim(), self.device)?.to_dtype(self.dtype)
    }

    fn zeros(&self, shape: impl Into<candle_core::Shape>) -> Result<Var> {
        Var::zeros(shape, DType::F32, self.device)
    }
}

/// The updates of a module with a weight (m, n): what `spectrum` and `beside` hold already, and what `method` moves.
///
/// σ in absolute terms moves from where it is; everything else begins at zero on top of what is there.
pub(super) fn updates(
    method: Option<Method>,
    module: &str,
    (m, n): (usize, usize),
    spectrum: Option<(Factors, Change)>,
    beside: &[LowRank],
    place: &Place,
) -> Result<Updates> {
    let mut made = Updates::default();
    for LowRank { a, b, scale } in beside {
        made.updates.push(Update::LowRank {
            b: place.frozen(b.view())?,
            a: place.frozen(a.view())?,
            scale: *scale,
        });
    }
    if let Some((factors, change)) = &spectrum {
        let absolute = method == Some(Method::Sigma(Parametrisation::Absolute));
        let vectors = |rows: usize| -> Result<(Tensor, Tensor)> {
            let (u, v) = (
                factors.u.slice(s![..rows, ..]),
                factors.v.slice(s![..rows, ..]),
            );
            Ok((place.frozen(u)?, place.frozen(v)?))
        };
        let numbers = |values: &[f32]| Tensor::new(values, place.device);
        let (q, r) = (factors.q(), change.core.nrows());
        if !absolute && change.delta.iter().any(|&d| d != 0.0) {
            let (u, v) = vectors(q)?;
            let (u, v) = (padded(u)?, padded(v)?);
            let delta = numbers(&change.delta)?;
            made.updates.push(Update::Diagonal {
                u,
                v,
                delta: vec![delta],
                scale: None,
            });
        }
        if r > 0 {
            let (u, v) = vectors(r)?;
            let core =
                numbers(change.core.as_slice().expect("a core is dense"))?.reshape((r, r))?;
            made.updates.push(Update::Core { u, v, core });
        }
        match method {
            Some(Method::Sigma(parametrisation)) => {
                let (u, v) = vectors(q)?;
                let (u, v) = (padded(u)?, padded(v)?);
                let (ending, delta, scale) = match parametrisation {
                    Parametrisation::Absolute => {
                        (DELTA, Var::from_tensor(&numbers(&change.delta)?)?, None)
                    }
                    Parametrisation::Relative => {
                        let sigma = numbers(&factors.sigma.to_vec())?;
                        (RHO, place.zeros(q)?, Some(sigma))
                    }
                };
                let moving = delta.as_tensor().clone();
                made.variables.push((format!("{module}{ending}"), delta));
                made.updates.push(Update::Diagonal {
                    u,
                    v,
                    delta: vec![moving],
                    scale,
                });
            }
            Some(Method::LoraXs { rank }) => {
                let r = rank.min(q);
                let (u, v) = vectors(r)?;
                let core = place.zeros((r, r))?;
                let moving = core.as_tensor().clone();
                made.variables.push((format!("{module}{CORE}"), core));
                made.updates.push(Update::Core { u, v, core: moving });
            }
            Some(Method::Lora(_) | Method::Full) | None => {}
        }
    }
    if let Some(Method::Lora(lora)) = method {
        let a = Var::from_vec(first_a(module, n, lora), (lora.rank, n), place.device)?;
        let b = place.zeros((m, lora.rank))?;
        made.updates.push(Update::LowRank {
            b: b.as_tensor().clone(),
            a: a.as_tensor().clone(),
            scale: lora.alpha as f64 / lora.rank as f64,
        });
        made.variables.push((format!("{module}{LORA_A}"), a));
        made.variables.push((format!("{module}{LORA_B}"), b));
    }
    Ok(made)
}

/// A (r, n) at its beginning: PEFT's `kaiming_uniform_(a=√5)`, that is uniform in ±1/√n, from the seed and the name.
fn first_a(module: &str, n: usize, lora: Lora) -> Vec<f32> {
    // FNV-1a: a module has its own numbers, in whatever order modules are loaded
    let seed = module
        .bytes()
        .fold(lora.seed ^ 0xCBF2_9CE4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3)
        });
    let bound = (n as f64).sqrt().recip();
    let drawn: Array2<f64> = uniform(lora.rank, n, seed);
    drawn
        .iter()
        .map(|x| (bound * (2.0 * x - 1.0)) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_begins_uniform_within_its_bound_and_b_at_zero() {
        let lora = Lora {
            rank: 64,
            alpha: 16,
            seed: 3,
        };
        let place = Place {
            device: &Device::Cpu,
            dtype: DType::F32,
        };
        let made = updates(
            Some(Method::Lora(lora)),
            "a.q_proj",
            (30, 400),
            None,
            &[],
            &place,
        );
        let variables = made.expect("makes").variables;
        let values = |at: usize| -> Vec<f32> {
            let flat = variables[at].1.flatten_all().and_then(|t| t.to_vec1());
            flat.expect("values")
        };
        let (a, b) = (values(0), values(1));
        assert_eq!(variables[0].0, "a.q_proj.lora_A.weight");
        assert!(b.len() == 30 * 64 && b.iter().all(|&x| x == 0.0));
        let bound = 1.0 / 20.0;
        assert!(a.iter().all(|x| x.abs() <= bound));
        // the variance of a uniform is bound²/3; its own standard error is √(4/5/n) of it
        let count = a.len() as f64;
        let variance = a.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / count;
        let wanted = f64::from(bound).powi(2) / 3.0;
        assert!((variance / wanted - 1.0).abs() < 5.0 * (0.8 / count).sqrt());
        assert!(first_a("a.q_proj", 400, lora) == a, "a seed repeats");
        assert!(first_a("a.k_proj", 400, lora) != a);
        assert!(first_a("a.q_proj", 400, Lora { seed: 4, ..lora }) != a);
    }
}
