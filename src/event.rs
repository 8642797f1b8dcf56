//! What a running verb tells whoever watches: the library reports, the binary draws.

use std::sync::atomic::{AtomicU64, Ordering};

/// A part of a job that takes long enough to be watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Download,
    Hash,
    Spectra,
    Decompose,
    Convert,
    Write,
    Load,
    Read,
    Train,
    Evaluate,
    Merge,
    Export,
    Upload,
    Verify,
}

/// What the numbers of a stage count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Flops,
    Tokens,
    Steps,
    Rows,
}

/// One thing that happened.
#[derive(Debug, Clone)]
pub enum Event<'a> {
    Started {
        stage: Stage,
        /// Of the total, what an earlier run has done.
        done: u64,
        total: u64,
        unit: Unit,
    },
    Advanced {
        stage: Stage,
        by: u64,
        item: &'a str,
    },
    Finished {
        stage: Stage,
    },
    /// One optimizer step: `loss` is the mean over the step's tokens, before the update.
    Stepped {
        step: usize,
        steps: usize,
        loss: f32,
        learning_rate: f64,
        tokens_per_s: f64,
    },
    /// Something the user should know although the work goes on.
    Warned {
        message: String,
    },
    /// A decision worth a line: what is kept, resumed, or chosen.
    Noted {
        message: String,
    },
}

/// Watches a verb at work. Called from worker threads.
pub trait Observer: Sync {
    fn event(&self, event: &Event<'_>);

    fn start(&self, stage: Stage, total: u64, unit: Unit) {
        self.resume(stage, 0, total, unit);
    }
    fn resume(&self, stage: Stage, done: u64, total: u64, unit: Unit) {
        self.event(&Event::Started {
            stage,
            done,
            total,
            unit,
        });
    }
    fn advance(&self, stage: Stage, by: u64, item: &str) {
        self.event(&Event::Advanced { stage, by, item });
    }
    fn finish(&self, stage: Stage) {
        self.event(&Event::Finished { stage });
    }
    fn warn(&self, message: String) {
        self.event(&Event::Warned { message });
    }
    fn note(&self, message: String) {
        self.event(&Event::Noted { message });
    }
}

/// How far one item of a stage has come. What is done again, after a break, is not told again.
pub struct Gauge<'a> {
    observer: &'a dyn Observer,
    stage: Stage,
    item: &'a str,
    told: AtomicU64,
}

impl<'a> Gauge<'a> {
    /// Of an item of which so much was done, and counted, before.
    pub fn new(observer: &'a dyn Observer, stage: Stage, item: &'a str, done: u64) -> Self {
        Self {
            observer,
            stage,
            item,
            told: done.into(),
        }
    }

    /// So much of the item is done, whether or not for the first time.
    pub fn reach(&self, done: u64) {
        let before = self.told.fetch_max(done, Ordering::Relaxed);
        if done > before {
            self.observer.advance(self.stage, done - before, self.item);
        }
    }
}

/// Watches nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: &Event<'_>) {}
}
