//! The memory that training takes, foreseen: a count of the tensors that [`super::decoder`] and its layers hold.

use serde::Serialize;

use super::config::ModelConfig;
use super::family::{Projections, QueryKeyNorm};
use super::head::chunk_rows;
use super::method::Method;

/// What is trained, and how much at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    pub method: Method,
    pub norms: bool,
    pub embeddings: bool,
    /// Windows per step.
    pub batch: usize,
    /// Windows computed at a time.
    pub at_once: usize,
    /// Tokens per window.
    pub length: usize,
    pub recompute: bool,
    /// There, what is frozen and what is computed is bf16, whatever the checkpoint stores.
    pub on_gpu: bool,
}

impl Step {
    /// Windows that are in memory together.
    fn windows(&self) -> usize {
        self.at_once.min(self.batch)
    }

    /// Bytes of a frozen number that takes so many where it is stored.
    fn width(&self, stored: usize) -> u128 {
        match self.on_gpu {
            true => 2,
            false => stored as u128,
        }
    }

    /// Bytes of a number that is computed.
    fn number(&self) -> u128 {
        match self.on_gpu {
            true => 2,
            false => NUMBER,
        }
    }
}

/// A stored matrix of the model.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    pub m: usize,
    pub n: usize,
    /// Outputs of all layers that a GPU computes as one with this: its left vectors are as long there, and zero but for m.
    pub stacked: usize,
    /// Bytes of a stored number, and of one of its singular vectors.
    pub width: usize,
    pub vector_width: usize,
    pub part: Part,
}

/// What a matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A linear layer, with its singular triplets if it is decomposed.
    Linear {
        q: Option<usize>,
    },
    /// The same, and it makes the logits.
    Head {
        q: Option<usize>,
    },
    Embedding,
}

/// What training takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Training {
    pub method: &'static str,
    pub batch: usize,
    /// Windows computed at a time, if these are not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    pub length: usize,
    pub recompute: bool,
    /// Numbers that move.
    pub parameters: u64,
    /// Of all weights as they are stored or as a GPU holds them, those that move in f32, of the singular vectors that are
    /// needed, and of what a method adds.
    pub weights_bytes: u64,
    /// Of the two moments and the gradient of what moves, and of the gradients' sum in a step of several parts.
    pub moving_bytes: u64,
    /// Of what the backward pass reads again.
    pub activations_bytes: u64,
    /// Of what comes and goes beside these: a chunk of logits, or the gradients in one block.
    pub passing_bytes: u64,
    /// The largest resident set of the process.
    pub peak_bytes: u64,
}

/// f32
const NUMBER: u128 = 4;

/// Program, libraries, tokenizer and text (Linux, 2026-11: 16–20 MB with a text of 160 kB).
const PROCESS_BYTES: u128 = 18 << 20;

/// Freed memory that the allocator finds no use for is this share of the rest: one in so many bytes (glibc 2.36, kept as
/// the command keeps it, 2026-11: 2–5 %).
const KEPT_FREE: u128 = 32;

/// What training takes of a model with these matrices, and `others`, numbers of norms and biases of which `norms` are of
/// norms.
pub fn training(
    config: &ModelConfig,
    matrices: &[Matrix],
    norms: u64,
    others: u64,
    step: &Step,
) -> Training {
    let number = step.number();
    let mut moving: u128 = if step.norms { norms.into() } else { 0 };
    let mut weights = number * u128::from(others).saturating_sub(moving) + NUMBER * moving;
    // the largest that is loaded, and what it is loaded from
    let (mut loading, mut rows) = (0, 0);
    for matrix in matrices {
        let (m, n) = (matrix.m as u128, matrix.n as u128);
        let stored = matrix.width as u128 * m * n;
        let (whole, decomposed) = match matrix.part {
            Part::Embedding => {
                moving += if step.embeddings { m * n } else { 0 };
                (step.embeddings, None)
            }
            Part::Linear { q } | Part::Head { q } => {
                let (vectors, moves) = layer(step.method, m, n, q.map(|q| q as u128));
                let width = step.width(matrix.vector_width);
                weights += width * vectors;
                moving += moves;
                rows += vectors / (m + n);
                if step.on_gpu && matches!(step.method, Method::Sigma(_)) {
                    let zeros = vectors / (m + n) * (matrix.stacked as u128).saturating_sub(m);
                    weights += width * zeros;
                }
                let whole = step.method == Method::Full;
                weights += if whole { 0 } else { NUMBER * moves };
                (whole, q)
            }
        };
        weights += match whole {
            true => NUMBER * m * n,
            false => step.width(matrix.width) * m * n,
        };
        loading = loading.max(match decomposed {
            // M′ and M; of f32 weights the exact elements with their positions are as much again
            Some(_) if stored == NUMBER * m * n => 2 * stored,
            Some(_) => NUMBER * m * n + stored,
            None => stored,
        });
    }
    let at_once = Sizes::of(config, step);
    // x times the right factor of each layer, which a GPU keeps for the gradients
    let read = if step.on_gpu && !step.recompute {
        at_once.tokens * rows
    } else {
        0
    };
    let activations = number * (at_once.kept(config, step.recompute) + read);
    // of a step in parts, the sum of their gradients waits for the last
    let waiting = if step.windows() < step.batch {
        moving
    } else {
        0
    };
    let moments = NUMBER * (2 * moving + waiting);
    let logits = number * at_once.logits(config, matrices, step);
    let gradients = number * at_once.gradients(config, step);
    let at_end = logits.max(NUMBER * moving + gradients);
    let computing = weights + moments + activations + at_end;
    let peak = computing.max(weights + loading);
    Training {
        method: step.method.name(),
        batch: step.batch,
        micro_batch: (step.windows() < step.batch).then_some(step.at_once),
        length: step.length,
        recompute: step.recompute,
        parameters: shown(moving),
        weights_bytes: shown(weights),
        moving_bytes: shown(NUMBER * (3 * moving + waiting)),
        activations_bytes: shown(activations),
        passing_bytes: shown(logits.max(gradients)),
        peak_bytes: shown(PROCESS_BYTES + peak + peak / KEPT_FREE),
    }
}

/// As far as a plan can say it: sizes that nobody has are asked for without harm.
fn shown(count: u128) -> u64 {
    count.try_into().unwrap_or(u64::MAX)
}

/// Numbers of frozen vectors that a layer holds beside M, and numbers of it that move.
fn layer(method: Method, m: u128, n: u128, q: Option<u128>) -> (u128, u128) {
    let q = q.unwrap_or(0);
    match method {
        Method::Sigma(_) => (q * (m + n), q),
        Method::LoraXs { rank } => {
            let r = q.min(rank as u128);
            (r * (m + n), r * r)
        }
        Method::Lora(lora) => (0, lora.rank as u128 * (m + n)),
        Method::Full => (0, m * n),
    }
}

/// The sides of what is computed, as numbers.
struct Sizes {
    /// Tokens of a step.
    tokens: u128,
    hidden: u128,
    intermediate: u128,
    /// Of all query heads, and of all key heads.
    query: u128,
    key: u128,
}

impl Sizes {
    fn of(config: &ModelConfig, step: &Step) -> Self {
        let (windows, length) = (step.windows() as u128, step.length as u128);
        Self {
            tokens: windows * length,
            hidden: config.hidden as u128,
            intermediate: config.intermediate as u128,
            query: (config.heads * config.head_dim) as u128,
            key: (config.kv_heads * config.head_dim) as u128,
        }
    }

    /// Numbers that live until the backward pass has read them.
    fn kept(&self, config: &ModelConfig, recompute: bool) -> u128 {
        let layers = config.layers as u128;
        let block = self.block(config);
        let stream = self.tokens * self.hidden;
        // behind the last block: its norm, the rows that predict, their gradient in chunks and as one
        let end = 4 * stream;
        end + if recompute {
            // what each block reads; one of them is computed again
            layers * stream + block
        } else {
            layers * block
        }
    }

    /// Numbers of one block: every tensor that a pullback of it reads.
    fn block(&self, config: &ModelConfig) -> u128 {
        let (h, i, q, k) = (self.hidden, self.intermediate, self.query, self.key);
        let norms = config.norm_places.modules().into_iter().flatten().count() as u128;
        // what norms read, and what attention and MLP do
        let mut each = (norms + 2) * h;
        // turned queries and keys, values, and what was attended
        each += 2 * q + 2 * k;
        if config.query_key_norm != QueryKeyNorm::None {
            each += q + k;
        }
        each += if config.gated { 3 * i } else { 2 * i };
        self.tokens * each
    }

    /// Numbers that the head computes for one chunk of rows, with the gradient of what moves in it.
    fn logits(&self, config: &ModelConfig, matrices: &[Matrix], step: &Step) -> u128 {
        let bent = config.logits_cap.is_some() || config.logits_divisor != 1.0;
        let most = chunk_rows(step.on_gpu, !bent);
        let rows = self.tokens.min(most as u128);
        let vocabulary = config.vocabulary as u128;
        let head = matrices.iter().find_map(|matrix| match matrix.part {
            Part::Head { q } => Some(q),
            _ => None,
        });
        let mut alive = 1;
        if config.logits_cap.is_some() {
            alive += 3;
        }
        if bent && step.on_gpu {
            // all but the first in f32
            alive = 1 + 2 * alive;
        }
        let whole = match head {
            Some(_) => step.method == Method::Full,
            None => step.embeddings,
        };
        // the gradient of a whole weight: its sum, scaled, and twice while it is stored
        let gradient = if whole {
            4 * vocabulary * self.hidden
        } else {
            0
        };
        (alive * rows * vocabulary).max(gradient)
    }

    /// Numbers of the gradients that are alive at once, beside those of what moves: in one block, or of the embedding.
    fn gradients(&self, config: &ModelConfig, step: &Step) -> u128 {
        let (h, i, q, k) = (self.hidden, self.intermediate, self.query, self.key);
        // cut out of one matrix, both gradients are put together again
        let joined = match config.names.gate_up {
            Projections::Apart(_) => 0,
            _ if config.gated => 2 * i,
            _ => 0,
        };
        let mlp = self.tokens * (3 * i + 3 * h + joined);
        // each query head has gradients of its own keys and values before they are added; scores are a few at a time
        let attention = self.tokens * (5 * q + 2 * k + 2 * h);
        // a sum that is added to another, or the copies that the optimiser reads and writes
        let embedding = match step.embeddings {
            true => 2 * config.vocabulary as u128 * h,
            false => 0,
        };
        mlp.max(attention).max(embedding)
    }
}
