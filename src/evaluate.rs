//! `evaluate`: the next-token loss of a model, or of a decomposition with adapters, on a text.

use std::time::Instant;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::event::{Observer, Stage, Unit};
use crate::model::{Trained, stacked};
use crate::source::{Source, load};
use crate::text::{Corpus, Data, Dataset, LossOn, Window, segments};

/// How to evaluate.
#[derive(Debug, Clone)]
pub struct Options {
    /// Windows at a time.
    pub batch: usize,
    /// Tokens per window.
    pub length: usize,
    pub loss_on: LossOn,
    pub device: Device,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            batch: 4,
            length: 256,
            loss_on: LossOn::default(),
            device: Device::Cpu,
        }
    }
}

/// The facts of an evaluation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    /// Mean negative log likelihood per predicted token, in nats.
    pub loss: f64,
    /// exp(loss)
    pub perplexity: f64,
    /// Predicted tokens.
    pub tokens: usize,
    pub data: String,
    /// Of the text: files of one name may hold another.
    #[serde(default)]
    pub data_sha256: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<Dataset>,
    pub length: usize,
    /// What was measured, where the data have answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_on: Option<LossOn>,
    pub seconds: f64,
    pub tokens_per_s: f64,
}

/// Evaluates `source` on the data at `data`: a text in consecutive windows that share no context, answers each behind what
/// they answer.
pub fn run(
    source: &Source,
    data: &Data,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    let config = source.config()?;
    let corpus = Corpus::read(
        data,
        source.dir(),
        &config,
        options.length,
        options.loss_on,
        observer,
    )?;
    corpus.warn(&config, observer);
    let decoder = load(source, Trained::default(), &options.device, observer)?;
    let started = Instant::now();
    let windows = corpus.windows();
    let total: usize = windows.iter().map(Window::predicted).sum();
    observer.start(Stage::Evaluate, total as u64, Unit::Tokens);
    let (mut loss, mut tokens) = (0f64, 0usize);
    // the last window may be shorter and then makes a batch of its own
    for batch in windows.chunk_by(|a, b| a.ids.len() == b.ids.len()) {
        for batch in batch.chunks(options.batch.max(1)) {
            let rows: Vec<&[u32]> = batch.iter().map(|window| window.ids).collect();
            let ids = stacked(&rows, &options.device)?;
            let (sum, predicted) = decoder.loss_of(&ids, &segments(batch))?;
            loss += f64::from(sum.flatten_all()?.to_vec1::<f32>()?[0]);
            tokens += predicted;
            observer.advance(Stage::Evaluate, predicted as u64, "");
        }
    }
    observer.finish(Stage::Evaluate);
    let mean = loss / tokens as f64;
    if !mean.is_finite() {
        return Err(Error::BrokenLoss {
            data: data.name.clone(),
        });
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(Facts {
        loss: mean,
        perplexity: mean.exp(),
        tokens,
        data: data.name.clone(),
        data_sha256: data.sha256()?,
        dataset: data.dataset.clone(),
        length: options.length,
        loss_on: corpus.learnt().map(|_| options.loss_on),
        seconds,
        tokens_per_s: tokens as f64 / seconds.max(1e-9),
    })
}
