//! Fine-tune Hugging Face models by their singular values.
//!
//! Every linear weight is split once as `M = M′ + uᵀ·diag(σ)·v`; training moves σ alone; merging gives back an ordinary
//! model. Data flows one way, and a directory is the interface between two verbs:
//!
//! ```text
//! hub ─→ base ─→ plan ─→ decompose ─→ artifact ─→ train ─→ adapter ─→ merge ─→ card ─→ publish ─→ hub
//!                        (linalg, split, join)    (model)
//! ```
//!
//! `convert` stores an artifact in another way; `export` writes an adapter for programs that are not ours; `generate` lets
//! a model speak. Several machines divide the work: each decomposes its share (job), `assemble` joins them (join).
//! Several processes train together (parallel).

pub mod adapter;
pub mod artifact;
pub mod assemble;
pub mod base;
pub mod card;
pub mod contents;
pub mod convert;
pub mod decompose;
pub mod device;
pub mod error;
pub mod evaluate;
pub mod event;
pub mod export;
pub mod format;
mod front_matter;
pub mod generate;
pub mod heap;
pub mod html;
pub mod hub;
pub mod inspect;
pub mod job;
pub mod join;
pub mod json;
pub mod kind;
mod lanes;
pub mod linalg;
pub mod merge;
pub mod model;
pub mod outlet;
pub mod parallel;
pub mod part;
pub mod peft;
pub mod plan;
pub mod plot;
pub mod publish;
mod random;
pub mod ranks;
pub mod report;
pub mod source;
pub mod spectrum;
pub mod split;
pub mod sum;
mod template;
pub mod train;
pub mod verify;
pub mod weights;
pub mod workers;
pub mod workspace;

pub use error::{Error, Result};
