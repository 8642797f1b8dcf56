//! Data in, windows of token ids out.

mod answers;
mod packing;
mod rows;
mod table;

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::{Encoding, Tokenizer};

use crate::error::{Error, Place, Result};
use crate::event::{Observer, Stage, Unit};
use crate::json;
use crate::model::{ModelConfig, Segment, Segments};
use crate::random::SplitMix;
use crate::sum::{sha256_file, sha256_hex};
use crate::workers::{cores, in_order};
use answers::Reader;
use packing::Packed;
use rows::Row;

pub use rows::ENDINGS;

/// Files of data: their rows are read one after the other.
#[derive(Debug, Clone)]
pub struct Data {
    /// What they are called in reports.
    pub name: String,
    pub files: Vec<PathBuf>,
    pub dataset: Option<Dataset>,
}

/// Where on the Hub data come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dataset {
    pub repo: String,
    /// 40 hex digits.
    pub revision: String,
}

impl From<&Path> for Data {
    fn from(file: &Path) -> Self {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        Self {
            name: name.into_owned(),
            files: vec![file.into()],
            dataset: None,
        }
    }
}

impl Data {
    /// The sum of the file, or of the sums of several.
    pub fn sha256(&self) -> Result<String> {
        let sums = self.files.iter().map(|file| sha256_file(file, |_| {}));
        let sums = sums.collect::<Result<Vec<_>>>()?;
        Ok(match &sums[..] {
            [one] => one.clone(),
            several => sha256_hex(several.concat().as_bytes()),
        })
    }
}

/// What a model learns from, or is measured on: token ids, cut into windows.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// Of the data.
    name: String,
    /// Of all windows, one after the other, with what fills them.
    pub ids: Vec<u32>,
    pub window: usize,
    pub documents: usize,
    /// What ends a document where there are several.
    pub end: Option<u32>,
    /// Where documents have answers: each is a sequence by itself.
    packed: Option<Packed>,
}

/// Which tokens of a document with answers are learnt, and measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    #[default]
    Answers,
    All,
}

impl FromStr for LossOn {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "answers" => Ok(Self::Answers),
            "all" => Ok(Self::All),
            _ => Err(Error::Parse {
                what: "what is learnt",
                value: text.into(),
                reason: "expected answers or all".into(),
            }),
        }
    }
}

/// A window of token ids.
#[derive(Debug, Clone, Copy)]
pub struct Window<'a> {
    pub ids: &'a [u32],
    packed: Option<packing::Row<'a>>,
}

impl<'a> From<&'a [u32]> for Window<'a> {
    /// One sequence, each token of which is learnt.
    fn from(ids: &'a [u32]) -> Self {
        Self { ids, packed: None }
    }
}

impl Window<'_> {
    /// Tokens that are read.
    pub fn tokens(&self) -> usize {
        match &self.packed {
            None => self.ids.len(),
            Some(row) => row.sequences.iter().sum(),
        }
    }

    /// Tokens that are predicted, and count in the loss.
    pub fn predicted(&self) -> usize {
        match &self.packed {
            None => self.ids.len() - 1,
            Some(row) => row.predicted(),
        }
    }
}

/// How windows of equal length divide into sequences, and what of them is learnt.
pub fn segments(windows: &[Window]) -> Segments {
    let length = windows[0].ids.len();
    let rows = windows.iter().map(|window| match &window.packed {
        None => vec![Segment::Sequence(length)],
        Some(row) => row.segments(),
    });
    let segments = Segments::new(rows.collect());
    if windows.iter().all(|window| window.packed.is_none()) {
        return segments;
    }
    let learnt = windows.iter().flat_map(|window| match &window.packed {
        None => vec![true; length],
        Some(row) => row.learnt.to_vec(),
    });
    segments.learning(learnt.collect())
}

const TOKENIZER: &str = "tokenizer.json";

/// The tokenizer that came with a model.
pub fn tokenizer(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join(TOKENIZER);
    if !path.exists() {
        return Err(Error::NoTokenizer { path: dir.into() });
    }
    let refuse = |e: tokenizers::Error| Error::Tokenizer {
        path: path.clone(),
        reason: e.to_string(),
    };
    let mut tokenizer = Tokenizer::from_file(&path).map_err(refuse)?;
    // settings for sentences in a batch, which many repositories ship: a text would be cut to its beginning
    tokenizer.with_truncation(None).map_err(refuse)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// The ids of a text, with the special tokens that the tokenizer adds if `adds_tokens`.
///
/// # Errors
/// What the tokenizer of a stranger refuses, or gives up: the engine of its regular expressions panics at those that take it
/// too long.
pub fn encode(
    tokenizer: &Tokenizer,
    path: &Path,
    text: &str,
    adds_tokens: bool,
) -> Result<Vec<u32>> {
    let encoding = attempt(path, || tokenizer.encode_fast(text, adds_tokens))?;
    Ok(encoding.get_ids().to_vec())
}

/// The encoding that the tokenizer at `path` makes, if it does.
fn attempt(path: &Path, encode: impl FnOnce() -> tokenizers::Result<Encoding>) -> Result<Encoding> {
    let failed = |reason: String| Error::Tokenizer {
        path: path.into(),
        reason,
    };
    match std::panic::catch_unwind(AssertUnwindSafe(encode)) {
        Ok(Ok(encoded)) => Ok(encoded),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or(panic.downcast_ref::<&str>().copied());
            Err(failed(said.unwrap_or("it gave up").into()))
        }
    }
}

impl Corpus {
    /// Reads a data file: a text, or rows of texts, of conversations, or of prompts with what completes them.
    ///
    /// Texts are one stream: they get the special tokens that the tokenizer adds, and where there are several, each ends in
    /// the model's end token. Conversations go through the model's chat template, and stand, like completed prompts, each
    /// by itself in a window that it may share with others; with [`LossOn::Answers`] only what is answered there is learnt.
    pub fn read(
        data: &Data,
        model: &Path,
        config: &ModelConfig,
        window: usize,
        loss_on: LossOn,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let tokenizer = tokenizer(model)?;
        let rows = rows::read(&data.files)?;
        let documents = rows.len();
        let end = end_of_documents(model, config);
        let (ids, packed) = match rows.first() {
            Some((.., Row::Text(_))) | None => {
                let end = end.filter(|_| documents > 1);
                let file = model.join(TOKENIZER);
                let texts = each(&rows, observer, |row| match row {
                    Row::Text(text) => encode(&tokenizer, &file, text, true),
                    Row::Pair { .. } | Row::Chat(_) => unreachable!("rows are of one kind"),
                })?;
                (stream(texts, end), None)
            }
            Some(_) => {
                let has_pairs = rows.iter().any(|(.., row)| matches!(row, Row::Pair { .. }));
                if has_pairs && end.is_none() {
                    observer.warn(format!(
                        "nothing ends the completions of {}: neither config.json nor generation_config.json names an \
                         eos_token_id",
                        data.name
                    ));
                }
                let reader = Reader::new(model, &tokenizer, end, loss_on)?;
                let sequences = each(&rows, observer, |row| reader.sequences(row))?;
                let (ids, packed) = Packed::of(sequences, window);
                if packed.is_empty() {
                    return Err(Error::NothingLearnt {
                        data: data.name.clone(),
                        window,
                    });
                }
                (ids, Some(packed))
            }
        };
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= config.vocabulary) {
            return Err(Error::TokenOutside {
                path: model.join(TOKENIZER),
                id,
                vocabulary: config.vocabulary,
            });
        }
        if ids.len() < 2 {
            return Err(Error::DataTooSmall {
                data: data.name.clone(),
                found: ids.len(),
                needed: 2,
            });
        }
        Ok(Self {
            name: data.name.clone(),
            ids,
            window,
            documents,
            end,
            packed,
        })
    }

    /// Tokens that are read, without what fills windows.
    pub fn tokens(&self) -> usize {
        match &self.packed {
            None => self.ids.len(),
            Some(packed) => packed.tokens(),
        }
    }

    /// Of documents with answers, the tokens that are learnt.
    pub fn learnt(&self) -> Option<usize> {
        let packed = self.packed.as_ref()?;
        Some(packed.rows().map(|row| row.predicted()).sum())
    }

    /// The sum of all ids, and of how they are divided.
    pub fn sha256(&self) -> String {
        let mut bytes: Vec<u8> = self.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        if let Some(packed) = &self.packed {
            for row in packed.rows() {
                bytes.extend(row.sequences.iter().flat_map(|n| n.to_le_bytes()));
                bytes.extend(row.learnt.iter().map(|&learnt| u8::from(learnt)));
            }
        }
        sha256_hex(&bytes)
    }

    /// Tells of documents that nothing separates, of those that are cut or left out, and of windows longer than what
    /// the model was made for.
    pub fn warn(&self, config: &ModelConfig, observer: &dyn Observer) {
        let name = &self.name;
        match &self.packed {
            None if self.documents > 1 && self.end.is_none() => observer.warn(format!(
                "the {} documents of {name} run into each other: neither config.json nor generation_config.json names an \
                 eos_token_id",
                self.documents,
            )),
            None => {}
            Some(packed) => {
                if packed.cut > 0 {
                    observer.warn(format!(
                        "{} of {} rows of {name} are longer than {} tokens, and cut there: --length takes more",
                        packed.cut, self.documents, self.window
                    ));
                }
                if packed.left_out > 0 {
                    observer.warn(format!(
                        "{} of {} rows of {name} are left out: they hold nothing to learn within {} tokens",
                        packed.left_out, self.documents, self.window
                    ));
                }
            }
        }
        if self.window > config.positions_max {
            observer.warn(format!(
                "windows of {} tokens are longer than the {} positions the model was made for",
                self.window, config.positions_max
            ));
        }
    }

    /// All windows in order; the last may be shorter, and is dropped if it predicts nothing.
    pub fn windows(&self) -> Vec<Window<'_>> {
        match &self.packed {
            Some(packed) => packed.windows(&self.ids),
            None => {
                let windows = self.ids.chunks(self.window).filter(|ids| ids.len() >= 2);
                windows.map(Window::from).collect()
            }
        }
    }

    /// Tells how much of the text fills no window of full length, if it is not little.
    pub fn note_rest(&self, observer: &dyn Observer) {
        let (all, rest) = (self.ids.len(), self.ids.len() % self.window);
        if self.packed.is_none() && all > self.window && rest * 100 > all {
            observer.note(format!(
                "the last {rest} of {all} tokens fill no window of {} and are left out",
                self.window
            ));
        }
    }

    /// Windows of full length; a text shorter than one window is one window of its own length.
    pub fn full_windows(&self) -> Vec<Window<'_>> {
        if self.packed.is_some() {
            return self.windows();
        }
        let full: Vec<Window> = self
            .ids
            .chunks_exact(self.window)
            .map(Window::from)
            .collect();
        if full.is_empty() {
            vec![Window::from(&self.ids[..])]
        } else {
            full
        }
    }
}

/// What `work` makes of each row, in order.
fn each<T: Send>(
    rows: &[(&Path, Place, Row)],
    observer: &dyn Observer,
    work: impl Fn(&Row) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    /// Rows that a thread reads before it waits for the others.
    const AT_ONCE: usize = 256;
    let read = |rows: &&[(&Path, Place, Row)]| {
        let read = rows.iter().map(|(path, place, row)| {
            work(row).map_err(|source| match row {
                Row::Text(_) => source,
                Row::Pair { .. } | Row::Chat(_) => Error::DataRow {
                    path: (*path).into(),
                    place: *place,
                    source: Box::new(source),
                },
            })
        });
        read.collect::<Result<Vec<T>>>()
    };
    // what another thread allocates and frees stays with it: some 20 MB for a text of 160 kB (glibc 2.36, 2026-11)
    if rows.len() <= AT_ONCE {
        return read(&rows);
    }
    observer.start(Stage::Read, rows.len() as u64, Unit::Rows);
    let parts: Vec<&[(&Path, Place, Row)]> = rows.chunks(AT_ONCE).collect();
    let mut all = Vec::with_capacity(rows.len());
    in_order(&parts, cores(), read, |part, read| {
        all.extend(read);
        observer.advance(Stage::Read, part.len() as u64, "");
        Ok(())
    })?;
    observer.finish(Stage::Read);
    Ok(all)
}

/// The ids of texts one after the other, each ended if there is an `end`.
fn stream(texts: Vec<Vec<u32>>, end: Option<u32>) -> Vec<u32> {
    let mut ids = Vec::new();
    for text in texts {
        ids.extend(text);
        if let Some(end) = end
            && ids.last() != Some(&end)
        {
            ids.push(end);
        }
    }
    ids
}

/// The model's end token, or that of its texts.
fn end_of_documents(model: &Path, config: &ModelConfig) -> Option<u32> {
    let own = config.eos.first().copied();
    own.or_else(|| {
        let settings: Value = json::read(&model.join("generation_config.json")).ok()?;
        let ids = &settings["eos_token_id"];
        let id = ids.as_u64().or_else(|| ids[0].as_u64())?;
        u32::try_from(id).ok()
    })
}

/// A shuffled order of `n` items, the same for the same seed and epoch (Fisher & Yates).
pub fn shuffled(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut random = SplitMix(seed ^ epoch.wrapping_mul(0xD1B5_4A32_D192_ED03));
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffles_repeat_and_differ_by_epoch() {
        assert_eq!(shuffled(50, 1, 0), shuffled(50, 1, 0));
        assert_ne!(shuffled(50, 1, 0), shuffled(50, 1, 1));
        let mut order = shuffled(50, 1, 7);
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
