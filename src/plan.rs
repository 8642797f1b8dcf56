//! What will be done with every tensor, known from `config.json` and the safetensors headers alone.

mod choice;
mod cost;
mod fits;
mod name;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::{FactorsDtype, Rank, Storing};
use crate::model::ModelConfig;
use crate::model::memory::{self, Matrix, Part, Step, Training};
use crate::weights::Inventory;
use crate::workers::{Limits, cores};
use choice::{planned, untied_head};
use fits::refuse_taken_names;
pub use fits::{check_shapes, expected_inventory};
pub use name::{Pattern, Role, glob, place, role};

/// What a plan depends on beside the model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlanOptions {
    pub rank: Rank,
    /// Modules to decompose; empty means all linear ones.
    pub include: Vec<Pattern>,
    pub exclude: Vec<Pattern>,
    /// Decompose a head that is tied to the embedding as a weight of its own.
    pub untie_head: bool,
    #[serde(flatten)]
    pub storing: Storing,
    /// Matrices at a time; no part of what makes the result, and so of no record.
    #[serde(skip, default = "cores")]
    pub threads: usize,
    /// Bytes of memory that the whole process may take, as far as it is planned.
    #[serde(skip)]
    pub memory: Option<u64>,
}

impl PlanOptions {
    /// How many matrices may be decomposed at once.
    pub fn limits(&self) -> Limits {
        Limits {
            threads: self.threads,
            memory: self
                .memory
                .map_or(u64::MAX, |memory| memory.saturating_sub(PROCESS_BYTES)),
            disk: u64::MAX,
        }
    }
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            rank: Rank::default(),
            include: Vec::new(),
            exclude: Vec::new(),
            untie_head: false,
            storing: Storing::default(),
            threads: cores(),
            memory: None,
        }
    }
}

/// What happens to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    Decompose,
    Copy,
}

/// One tensor of the plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: String,
    pub bytes: u64,
    pub role: Role,
    pub action: Action,
    /// Singular triplets to keep of a tensor that is decomposed; `None` as long as only its spectrum could tell.
    pub q: Option<usize>,
    /// The most that q can be; 0 of a tensor that is copied.
    pub q_max: usize,
    /// Of a head that is untied: the module whose weight it is a copy of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tied_to: Option<String>,
    pub reason: String,
}

impl PlannedTensor {
    /// The module of a weight: its name without `.weight`.
    pub fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }

    /// The tensor of the base that holds the numbers.
    pub fn stored_as(&self) -> String {
        match &self.tied_to {
            Some(module) => format!("{module}.weight"),
            None => self.name.clone(),
        }
    }

    pub fn is_decomposed(&self) -> bool {
        self.action == Action::Decompose
    }

    /// The most triplets that the plan keeps of it, if it is decomposed.
    pub fn kept_at_most(&self) -> Option<usize> {
        self.is_decomposed().then(|| self.q.unwrap_or(self.q_max))
    }

    /// (m, n) of a planned decomposition.
    fn sides(&self) -> (usize, usize) {
        (self.shape[0], self.shape[1])
    }
}

/// Numbers that training could move, by group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trainable {
    pub sigma: u64,
    pub norms: u64,
    pub embeddings: u64,
}

/// The same as far as a plan knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Foreseen {
    /// `None` as long as only the spectra could tell.
    pub sigma: Option<u64>,
    /// The most that `sigma` can be.
    pub sigma_max: u64,
    pub norms: u64,
    pub embeddings: u64,
}

/// The whole plan of one decomposition.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    pub model_type: String,
    pub rank: Rank,
    #[serde(flatten)]
    pub storing: Storing,
    /// Of the model that merging will give.
    pub parameters: u64,
    pub trainable: Foreseen,
    /// LoRA parameters by rank, on the same linear layers, for comparison.
    pub lora: BTreeMap<String, u64>,
    pub linear_layers: usize,
    /// These and the following are upper bounds where the ranks are not known yet.
    pub flops: u64,
    /// An estimate: the rate of a core is not measured here.
    pub seconds: f64,
    pub peak_bytes: u64,
    pub disk_bytes: u64,
    pub threads: usize,
    /// What training would take, where that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    /// What may be at work at once: that many threads, and as much memory as was allowed.
    #[serde(skip)]
    pub limits: Limits,
    #[serde(rename = "modules")]
    pub tensors: Vec<PlannedTensor>,
}

/// Program and libraries (Linux, 2026-11: 10–15 MB).
const PROCESS_BYTES: u64 = 12 << 20;

/// Sustained rate of one core in f32 products, flop/s (Zen 5, AVX-512, 2026-11, on a busy machine: 240 at best).
const FLOPS_PER_CORE: f64 = 120e9;

impl Plan {
    /// Plans the decomposition of the model in `root` (named in errors only).
    ///
    /// # Errors
    /// A tensor that the architecture needs is missing, has another shape, or a dtype that is not f32, f16 or bf16.
    pub fn new(
        root: &Path,
        config: &ModelConfig,
        inventory: &Inventory,
        options: &PlanOptions,
    ) -> Result<Self> {
        check_shapes(root, config, inventory)?;
        let mut tensors: Vec<PlannedTensor> = inventory
            .entries()
            .map(|(file, entry)| planned(root, file, entry, config, options))
            .collect::<Result<_>>()?;
        if options.untie_head {
            let head = untied_head(root, config, inventory, options)?;
            match tensors.iter_mut().find(|t| t.name == head.name) {
                Some(stored) => *stored = head,
                None => tensors.push(head),
            }
        }
        refuse_taken_names(root, inventory, &tensors)?;
        let matrices = tensors.iter().filter(|t| t.is_decomposed()).count();
        if matrices == 0 {
            return Err(Error::NothingToDecompose {
                path: root.into(),
                reason: "no linear weight matches the include and exclude patterns".into(),
            });
        }
        if let Rank::Budget(budget) = options.rank
            && budget < matrices as u64
        {
            return Err(Error::BudgetTooSmall {
                path: root.into(),
                budget,
                matrices,
            });
        }
        Ok(Self::add_up(
            config.model_type.clone(),
            options.rank,
            options.storing,
            options.limits(),
            tensors,
        ))
    }

    /// The totals of planned tensors.
    fn add_up(
        model_type: String,
        rank: Rank,
        storing: Storing,
        limits: Limits,
        tensors: Vec<PlannedTensor>,
    ) -> Self {
        let elements = |t: &PlannedTensor| t.shape.iter().product::<usize>() as u64;
        let count = |role: Role| -> u64 {
            let of_role = tensors.iter().filter(|t| t.role == role);
            of_role.map(elements).sum()
        };
        let decomposed = || tensors.iter().filter(|t| t.is_decomposed());
        let sides: u64 = decomposed().map(|t| (t.shape[0] + t.shape[1]) as u64).sum();
        let known: Option<u64> = decomposed().map(|t| t.q.map(|q| q as u64)).sum();
        let there_are = decomposed().map(|t| t.q_max as u64).sum();
        let sigma = match rank {
            Rank::Budget(total) => Some(total.min(there_are)),
            _ => known,
        };
        let costliest = costliest(&tensors, rank);
        let flops: u64 = costliest
            .iter()
            .map(|t| match t.q {
                // the spectrum decides on q, and the matrix is then decomposed
                None => t.flops().saturating_add(t.spectrum_flops()),
                Some(_) => t.flops(),
            })
            // s³ of a side that only a config needs to claim
            .fold(0, u64::saturating_add);
        Self {
            model_type,
            rank,
            storing,
            parameters: tensors.iter().map(elements).sum(),
            trainable: Foreseen {
                sigma,
                sigma_max: sigma.unwrap_or(there_are),
                norms: count(Role::Norm),
                embeddings: count(Role::Embedding),
            },
            lora: [8, 16, 32].map(|r: u64| (r.to_string(), r * sides)).into(),
            linear_layers: decomposed().count(),
            flops,
            seconds: flops as f64 / FLOPS_PER_CORE / limits.threads as f64,
            // what is copied, and joined, passes through a small buffer
            peak_bytes: PROCESS_BYTES + limits.peak(decomposed().map(|t| t.worker_bytes(storing))),
            disk_bytes: costliest
                .iter()
                .map(|t| t.artifact_bytes_max(storing))
                .sum(),
            threads: limits.threads,
            training: None,
            limits,
            tensors,
        }
    }

    /// The plan with what a step of training would take, from a decomposition with vectors in `factors` that keeps of each
    /// tensor what `kept` says.
    pub fn with_training(
        mut self,
        config: &ModelConfig,
        step: &Step,
        factors: FactorsDtype,
        kept: impl Fn(&PlannedTensor) -> Option<usize>,
    ) -> Self {
        let mut others = 0;
        let mut matrices = Vec::new();
        for tensor in &self.tensors {
            let q = kept(tensor);
            let part = match (tensor.role, tensor.shape.len()) {
                (Role::Linear, 2) => Part::Linear { q },
                (Role::Head, 2) if config.tied && q.is_none() => continue,
                (Role::Head, 2) => Part::Head { q },
                (Role::Embedding, 2) => Part::Embedding,
                (Role::Norm | Role::Bias, _) => {
                    others += tensor.shape.iter().product::<usize>() as u64;
                    continue;
                }
                _ => continue,
            };
            let (m, n) = tensor.sides();
            let width = (tensor.bytes as usize) / (m * n).max(1);
            let stacked = (config.stacked_on_gpu())
                .find(|(parts, _)| parts.iter().any(|part| tensor.module().ends_with(part)))
                .map_or(m, |(_, side)| side);
            matrices.push(Matrix {
                m,
                n,
                stacked,
                width,
                vector_width: factors.bytes() as usize,
                part,
            });
        }
        let norms = self.trainable.norms;
        self.training = Some(memory::training(config, &matrices, norms, others, step));
        self
    }

    /// Whether every q is known.
    pub fn ranks_known(&self) -> bool {
        self.decomposed().all(|t| t.q.is_some())
    }

    /// The plan once the ranks are known, by module.
    pub fn with_ranks(mut self, ranks: &BTreeMap<String, usize>) -> Self {
        for tensor in self.tensors.iter_mut().filter(|t| t.is_decomposed()) {
            if let Some(&q) = ranks.get(tensor.module()) {
                tensor.q = Some(q);
                tensor.q_max = q;
            }
        }
        Self {
            training: self.training,
            ..Self::add_up(
                self.model_type,
                self.rank,
                self.storing,
                self.limits,
                self.tensors,
            )
        }
    }

    /// What to decompose, shard by shard as far as sizes are known before, so that shards can be written early; and of
    /// each the most expensive first, so that no worker is left with a large one at the end.
    pub fn in_shard_order(&self, shard_bytes_max: u64) -> Vec<&PlannedTensor> {
        let mut bytes = 0;
        let mut placed: Vec<(u64, &PlannedTensor)> = Vec::new();
        for tensor in &self.tensors {
            if tensor.is_decomposed() {
                placed.push((bytes / shard_bytes_max.max(1), tensor));
            }
            bytes += tensor.artifact_bytes_max(self.storing);
        }
        placed.sort_by_key(|&(shard, tensor)| (shard, std::cmp::Reverse(tensor.flops())));
        placed.into_iter().map(|(_, tensor)| tensor).collect()
    }

    /// The tensors to decompose, in checkpoint order.
    pub fn decomposed(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.tensors.iter().filter(|t| t.is_decomposed())
    }
}

/// The tensors with the ranks that would cost most: a budget spent on the widest matrices, the largest bound elsewhere.
fn costliest(tensors: &[PlannedTensor], rank: Rank) -> Vec<PlannedTensor> {
    let mut tensors = tensors.to_vec();
    let Rank::Budget(total) = rank else {
        return tensors;
    };
    let mut open: Vec<&mut PlannedTensor> = tensors
        .iter_mut()
        .filter(|t| t.is_decomposed() && t.q.is_none())
        .collect();
    open.sort_by_key(|t| std::cmp::Reverse(t.shape[0] + t.shape[1]));
    // one is for each matrix, whatever it is worth
    let mut left = total.saturating_sub(open.len() as u64);
    for tensor in open {
        let more = left.min(tensor.q_max as u64 - 1);
        left -= more;
        tensor.q_max = 1 + more as usize;
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::cost::KERNEL_BYTES;
    use super::*;
    use crate::decompose::PASSING_SHARD_BYTES;
    use crate::format::ArtifactLayout;
    use crate::model::Method;
    use crate::weights::Dtype;
    use serde_json::{Value, json};
    use std::num::NonZeroUsize;

    fn plan(config: Value, rank: Rank) -> Plan {
        let options = PlanOptions {
            rank,
            ..PlanOptions::default()
        };
        try_plan(config, &options).expect("plans")
    }

    fn try_plan(config: Value, options: &PlanOptions) -> Result<Plan> {
        let config = ModelConfig::parse(Path::new("config.json"), &config).expect("parses");
        let inventory = expected_inventory(&config, Dtype::BF16).expect("composes");
        Plan::new(Path::new("."), &config, &inventory, options)
    }

    /// Two layers of 7 matrices, whose shorter side is 24 except in k_proj and v_proj, where it is 12; tied.
    fn small() -> Value {
        json!({"model_type": "qwen2", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": true})
    }

    #[test]
    fn models_of_any_size_pass_through_a_disk_of_14_gb() {
        let llama = |hidden: u64, inner: u64, layers: u64, heads: u64| {
            let config = json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
                "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256,
                "tie_word_embeddings": false});
            plan(config, Rank::Fraction(0.1))
        };
        let gigabytes = |plan: Plan| plan.disk_bytes_passing(PASSING_SHARD_BYTES) / 1_000_000_000;
        // a shard, and the head, whose M′ takes 2.1 GB, and u and v 0.2
        assert_eq!(gigabytes(llama(4096, 14_336, 32, 32)), 4);
        // the embedding of 2.1 GB, and a head of 4.6
        assert_eq!(gigabytes(llama(8192, 28_672, 80, 64)), 6);
        // of 405 billion weights, 4.2 and 9.3
        assert_eq!(gigabytes(llama(16_384, 53_248, 126, 128)), 13);
    }

    /// Bytes of the weights of `small`, its σ trained at a rank of 4.
    fn weights_bytes(stored: Dtype, factors: FactorsDtype, on_gpu: bool) -> u64 {
        let config = ModelConfig::parse(Path::new("config.json"), &small()).expect("parses");
        let rank = Rank::Fixed(NonZeroUsize::new(4).expect("four"));
        let step = Step {
            method: Method::default(),
            norms: false,
            embeddings: false,
            batch: 1,
            at_once: 1,
            length: 8,
            recompute: false,
            on_gpu,
        };
        let options = PlanOptions {
            rank,
            ..PlanOptions::default()
        };
        let inventory = expected_inventory(&config, stored).expect("composes");
        let planned = Plan::new(Path::new("."), &config, &inventory, &options).expect("plans");
        let planned = planned.with_training(&config, &step, factors, PlannedTensor::kept_at_most);
        planned.training.expect("a step").weights_bytes
    }

    #[test]
    fn a_gpu_holds_what_is_frozen_in_bf16_whatever_is_stored() {
        // the embedding; q, k, v and o, gate, up and down of two layers
        let matrices = 50 * 24 + 2 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 40);
        // five norms, and biases of q, k and v
        let others = 5 * 24 + 2 * (24 + 2 * 12);
        // m + n of each
        let sides = 2 * 48 + 2 * 36 + 3 * 64;
        // left vectors of layers that a GPU stacks are as long as all their outputs: of q, k and v 48, of gate and up 80
        let zeros = (48 - 24) + 2 * (48 - 12) + 2 * (80 - 40);
        let (vectors, sigma) = (2 * 4, 2 * 7 * 4);
        let frozen = matrices + others + vectors * (sides + zeros);
        for stored in [Dtype::F32, Dtype::BF16] {
            for factors in [FactorsDtype::F32, FactorsDtype::Bf16] {
                let found = weights_bytes(stored, factors, true);
                assert_eq!(found, 2 * frozen + 4 * sigma);
            }
        }
        let frozen = 2 * matrices + 4 * (others + vectors * sides);
        let found = weights_bytes(Dtype::BF16, FactorsDtype::F32, false);
        assert_eq!(found, frozen + 4 * sigma);
    }

    #[test]
    fn ranks_that_only_the_weights_know_are_not_guessed() {
        for (rank, sigma, sigma_max) in [
            // ⌈0.3·24⌉ = 8, ⌈0.3·12⌉ = 4: 2 · (5·8 + 2·4)
            (Rank::Energy(0.3), None, 96),
            (Rank::Budget(100), Some(100), 100),
            // 2 · (5·24 + 2·12) are all there are
            (Rank::Budget(1_000_000), Some(288), 288),
        ] {
            let plan = plan(small(), rank);
            assert_eq!(
                (plan.trainable.sigma, plan.trainable.sigma_max),
                (sigma, sigma_max)
            );
            assert!(!plan.ranks_known());
            assert_eq!(plan.linear_layers, 14);
            assert!(plan.decomposed().all(|t| t.q.is_none() && t.q_max > 0));
            assert!(plan.disk_bytes_min() < plan.disk_bytes);
        }
    }

    #[test]
    fn resolved_ranks_cost_no_more_than_was_planned() {
        let planned = plan(small(), Rank::Budget(60));
        let bound = (planned.disk_bytes, planned.flops, planned.peak_bytes);
        // the widest matrices, gate_proj, up_proj and down_proj, take what they can
        let ranks = |wide: usize| -> BTreeMap<String, usize> {
            let q = |t: &PlannedTensor| {
                if t.module().ends_with("up_proj") {
                    wide
                } else {
                    1
                }
            };
            let named = |t: &PlannedTensor| (t.module().to_string(), q(t));
            planned.decomposed().map(named).collect()
        };
        let resolved = planned.clone().with_ranks(&ranks(24));
        assert!(resolved.ranks_known());
        assert_eq!(resolved.trainable.sigma, Some(60));
        assert_eq!(resolved.disk_bytes, bound.0);
        assert!(resolved.flops <= bound.1 && resolved.peak_bytes <= bound.2);
        let narrow = planned.clone().with_ranks(&ranks(2));
        // 22 triplets less in each of two matrices of 24 × 40
        assert_eq!(resolved.disk_bytes - narrow.disk_bytes, 4 * 44 * 65);
    }

    #[test]
    fn a_budget_below_one_for_each_matrix_is_refused() {
        let options = |total| PlanOptions {
            rank: Rank::Budget(total),
            ..PlanOptions::default()
        };
        let error = try_plan(small(), &options(13)).expect_err("refused");
        assert!(
            matches!(
                error,
                Error::BudgetTooSmall {
                    budget: 13,
                    matrices: 14,
                    ..
                }
            ),
            "{error}"
        );
        try_plan(small(), &options(14)).expect("plans");
    }

    #[test]
    fn a_tied_head_is_untied_only_when_asked() {
        let mut options = PlanOptions::default();
        let tied = try_plan(small(), &options).expect("plans");
        assert!(tied.tensors.iter().all(|t| t.role != Role::Head));
        options.untie_head = true;
        let untied = try_plan(small(), &options).expect("plans");
        let head = untied
            .decomposed()
            .find(|t| t.role == Role::Head)
            .expect("a head");
        assert_eq!((head.module(), head.q), ("lm_head", Some(2)));
        assert_eq!(head.shape, [50, 24]);
        assert_eq!(head.tied_to.as_deref(), Some("model.embed_tokens"));
        assert_eq!(head.stored_as(), "model.embed_tokens.weight");
        assert_eq!(untied.parameters, tied.parameters + 50 * 24);
        assert_eq!(untied.linear_layers, tied.linear_layers + 1);
        let mut not_tied = small();
        not_tied["tie_word_embeddings"] = false.into();
        options.exclude = vec!["lm_head".parse().expect("any text")];
        for (config, reason) in [(not_tied, "own already"), (small(), "excluded")] {
            let error = try_plan(config, &options).expect_err("refused").to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_head_of_two_billion_elements_is_counted_in_full() {
        // 2³¹ elements in the embedding and in the head, more than i32 counts; 2³³ bytes of M′, more than u32
        let giant = json!({"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 1,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 262_144, "tie_word_embeddings": false});
        let plan = plan(giant, Rank::Fraction(0.5));
        let head = plan
            .decomposed()
            .find(|t| t.role == Role::Head)
            .expect("a head");
        let (m, n, q) = (262_144u64, 8_192u64, 4_096u64);
        assert_eq!((head.q, head.bytes), (Some(4_096), 2 * m * n));
        assert_eq!(
            head.artifact_bytes(Storing::default(), 4_096),
            4 * m * n + 4 * q * (m + n + 1)
        );
        let sidecar = Storing {
            layout: ArtifactLayout::Sidecar,
            ..Storing::default()
        };
        assert!(head.worker_bytes(sidecar) > 6 * m * n);
        let (s, l) = (n as f64, m as f64);
        assert!(head.flops() as f64 > s * s * l && head.flops() < u64::MAX / 1000);
        assert!(plan.parameters > 2 * m * n && plan.disk_bytes > 4 * m * n);
        assert_eq!(plan.trainable.embeddings, m * n);
    }

    #[test]
    fn the_memory_of_a_worker_is_that_of_its_largest_moment() {
        let llama = json!({"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100, "tie_word_embeddings": true});
        let bytes = |part: &str, f: f64, layout| {
            let plan = plan(llama.clone(), Rank::Fraction(f));
            let found = plan.decomposed().find(|t| t.module().ends_with(part));
            found.expect("it is there").worker_bytes(Storing {
                layout,
                ..Storing::default()
            }) - KERNEL_BYTES
        };
        let (square, wide) = (1 << 22, 1 << 24);
        // solving: M in f32, and of the short side a Krylov space of 1040 vectors, 4·1.5 in f32, 8·1.5 in f64
        let sidecar = |f| bytes("q_proj", f, ArtifactLayout::Sidecar);
        let space = 4 * 1040 * 2048 + 11 * 1040 * 1040;
        assert_eq!(sidecar(0.1), (4 + 4) * square + space);
        assert_eq!(sidecar(0.5), (4 + 6) * square);
        assert_eq!(sidecar(1.0), (4 + 12) * square);
        // completing: M, both factors, half of the long one again
        assert_eq!(
            bytes("up_proj", 0.5, ArtifactLayout::Sidecar),
            4 * (wide + 1024 * (2048 + 8192)) + 2 * 1024 * 8192
        );
        // splitting: M in bf16 and f32, M′, both factors, and a tile in f64 with its share of both
        assert_eq!(
            bytes("up_proj", 0.5, ArtifactLayout::Residual),
            (2 + 4 + 4) * wide + 4 * 1024 * (2048 + 8192) + 8 * (1024 * 1024 + 1024 * 2048)
        );
    }

    #[test]
    fn the_published_parameter_table_comes_out_exactly() {
        let phi3 = json!({"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": false});
        for (f, sigma, with_norms) in [
            (0.1, 39_603, 239_283),
            (0.2, 79_206, 278_886),
            (0.5, 198_144, 397_824),
        ] {
            let plan = plan(phi3.clone(), Rank::Fraction(f));
            assert_eq!(plan.trainable.sigma, Some(sigma));
            assert_eq!(sigma + plan.trainable.norms, with_norms);
            assert_eq!(plan.trainable.embeddings, 98_500_608);
            assert_eq!(plan.linear_layers, 129);
            let lora: Vec<u64> = ["8", "16", "32"].map(|r| plan.lora[r]).to_vec();
            assert_eq!(lora, [12_864_000, 25_728_000, 51_456_000]);
        }
        let mistral = json!({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": false});
        let plan = plan(mistral, Rank::Fraction(0.25));
        assert_eq!(
            plan.trainable,
            Foreseen {
                sigma: Some(181_248),
                sigma_max: 181_248,
                norms: 266_240,
                embeddings: 131_072_000
            }
        );
    }

    #[test]
    fn work_goes_shard_by_shard_and_in_each_the_largest_first() {
        let llama = json!({"model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12,
            "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": true});
        let plan = plan(llama, Rank::default());
        let layer = |t: &PlannedTensor| t.name.split('.').nth(2).map(str::to_string);
        let order = plan.in_shard_order(plan.disk_bytes / 6);
        assert_eq!(order.len(), plan.decomposed().count());
        let first: Vec<_> = order[..7].iter().map(|t| layer(t)).collect();
        let last: Vec<_> = order[order.len() - 7..].iter().map(|t| layer(t)).collect();
        assert!(
            first.iter().all(|l| !last.contains(l)),
            "{first:?} {last:?}"
        );
        assert!(order[0].name.contains("mlp") && order[1].name.contains("mlp"));
        let single = plan.in_shard_order(u64::MAX);
        assert!(single.is_sorted_by_key(|t| std::cmp::Reverse(t.flops())));
    }

    #[test]
    fn the_smallest_rank_is_one() {
        assert_eq!(Rank::Fraction(0.1).known(5), Some(1));
        assert_eq!(Rank::Fraction(1.0).known(5), Some(5));
        assert_eq!(Rank::fraction("0.5").expect("parses").known(7), Some(3));
        assert!(
            Rank::fraction("0").is_err()
                && Rank::fraction("1.5").is_err()
                && Rank::fraction("nan").is_err()
        );
    }
}
