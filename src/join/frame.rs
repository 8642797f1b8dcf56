//! What surrounds the matrices of a decomposition: known before they are.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::{Base, card_facts};
use crate::format::{ArtifactLayout, Origin, Pin, Rank, Storing};
use crate::job::Job;
use crate::linalg::Algorithm;
use crate::plan::{Plan, PlannedTensor, Trainable};
use crate::weights::{Entry, Layout};

/// The facts of a decomposition, as `report.json` keeps them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    pub base: Pin,
    pub model_type: String,
    pub rank: Rank,
    #[serde(flatten)]
    pub storing: Storing,
    /// The decomposition of which this one holds the leading triplets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_in: Option<Origin>,
    pub algorithm: Algorithm,
    pub linear_layers: usize,
    pub parameters: u64,
    pub trainable: Trainable,
    /// The head was tied to the embedding and is now a weight of its own.
    #[serde(default)]
    pub untied_head: bool,
    /// Σσ² of all kept triplets over Σ‖M‖²
    pub captured_energy: f64,
    /// Elements of M stored exactly beside M′, and their share.
    pub exceptions: u64,
    pub exceptions_share: f64,
    /// Distance of the stored vectors from orthonormal ones, root mean square per row, of the worst matrix.
    #[serde(default)]
    pub orthogonality: f64,
    /// Matrices for which single precision was not enough.
    pub double_precision: usize,
    pub bytes: u64,
    pub base_bytes: u64,
    pub threads: usize,
    /// Of all machines together.
    pub seconds: f64,
    /// What the base's card says of itself (licence, language …).
    pub base_card: Value,
}

/// Everything of a decomposition but its matrices: known before they are.
pub struct Frame {
    pub pin: Pin,
    pub model_type: String,
    pub rank: Rank,
    pub storing: Storing,
    /// The decomposition of which this one holds the leading triplets.
    pub nested_in: Option<Origin>,
    pub algorithm: Algorithm,
    pub shard_bytes_max: u64,
    /// What the shards hold, in their order.
    pub items: Vec<Item>,
    /// What is known of the bytes that are carried along; others are believed.
    pub carried_sha256: BTreeMap<String, String>,
    /// The header of each base file, in the residual layout.
    pub headers: Vec<(String, Vec<u8>)>,
    pub linear_layers: usize,
    pub parameters: u64,
    pub norms: u64,
    pub embeddings: u64,
    pub untied_head: bool,
    pub base_bytes: u64,
    pub base_card: Value,
    /// The base's own `config.json` and, if it has one, its index.
    pub base_config: PathBuf,
    pub base_index: Option<PathBuf>,
    /// Where tokenizer, templates and licences come from.
    pub side_files: PathBuf,
    /// A base that no Hub has: where it lies.
    pub local_base: Option<PathBuf>,
}

/// One thing that the shards hold.
pub enum Item {
    /// A decomposed module.
    Matrix(String),
    /// A tensor that is carried along.
    Carried(Entry),
}

impl Frame {
    /// The frame of a base that is decomposed as planned.
    pub fn of(base: &Base, job: &Job, plan: &Plan) -> Self {
        let residual = plan.storing.layout == ArtifactLayout::Residual;
        let inventory = &base.checkpoint.inventory;
        let carried = |tensor: &PlannedTensor| {
            let (_, entry) = inventory
                .get(&tensor.name)
                .expect("a plan names tensors of its own inventory");
            Item::Carried(entry.clone())
        };
        let items = plan.tensors.iter().filter_map(|tensor| {
            if tensor.is_decomposed() {
                Some(Item::Matrix(tensor.module().into()))
            } else {
                residual.then(|| carried(tensor))
            }
        });
        let headers = inventory.files.iter().filter(|_| residual);
        let index = base.dir.join(Layout::Model.index_file());
        Self {
            pin: job.base.clone(),
            model_type: plan.model_type.clone(),
            rank: plan.rank,
            storing: plan.storing,
            nested_in: None,
            algorithm: job.options.algorithm.clone(),
            shard_bytes_max: job.options.shard_bytes_max,
            items: items.collect(),
            carried_sha256: BTreeMap::new(),
            headers: headers
                .map(|file| (file.name.clone(), file.header.prefix.clone()))
                .collect(),
            linear_layers: plan.linear_layers,
            parameters: plan.parameters,
            norms: plan.trainable.norms,
            embeddings: plan.trainable.embeddings,
            untied_head: job.options.plan.untie_head,
            base_bytes: inventory.total_bytes(),
            base_card: card_facts(&base.dir),
            base_config: base.dir.join("config.json"),
            base_index: base.checkpoint.indexed.then_some(index),
            side_files: base.dir.clone(),
            local_base: job.base.repo.is_none().then(|| base.dir.clone()),
        }
    }

    /// The modules, in the order of the shards.
    pub fn matrices(&self) -> impl Iterator<Item = &str> {
        self.items.iter().filter_map(|item| match item {
            Item::Matrix(module) => Some(module.as_str()),
            Item::Carried(_) => None,
        })
    }

    /// Bytes of what is carried along.
    pub fn carried_bytes(&self) -> u64 {
        let carried = self.items.iter().map(|item| match item {
            Item::Matrix(_) => 0,
            Item::Carried(entry) => entry.bytes,
        });
        carried.sum()
    }
}
