//! Text in, windows of token ids out.

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, IoContext, Result};
use crate::event::Observer;
use crate::json;
use crate::model::ModelConfig;
use crate::random::SplitMix;

/// A text as one stream of token ids, cut into windows.
#[derive(Debug, Clone)]
pub struct Corpus {
    pub path: PathBuf,
    pub ids: Vec<u32>,
    pub window: usize,
    pub documents: usize,
    /// What ends a document where there are several.
    pub end: Option<u32>,
}

/// The tokenizer that came with a model.
pub fn tokenizer(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    if !path.exists() {
        return Err(Error::NotAModel {
            path: dir.into(),
            missing: "tokenizer.json".into(),
        });
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
    let failed = |reason: String| Error::Tokenizer {
        path: path.into(),
        reason,
    };
    let encode = AssertUnwindSafe(|| tokenizer.encode_fast(text, adds_tokens));
    match std::panic::catch_unwind(encode) {
        Ok(Ok(encoded)) => Ok(encoded.get_ids().to_vec()),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or(panic.downcast_ref::<&str>().copied());
            Err(failed(said.unwrap_or("it gave up").into()))
        }
    }
}

impl Corpus {
    /// Reads a text file as one document, or a `.jsonl` (or `.ndjson`) file as one document per line (its `text` field).
    ///
    /// Documents get the special tokens the tokenizer adds, and where there are several, each ends in the model's end token.
    pub fn read(path: &Path, model: &Path, config: &ModelConfig, window: usize) -> Result<Self> {
        let tokenizer = tokenizer(model)?;
        let file = model.join("tokenizer.json");
        let documents = documents(path)?;
        let mut ids = Vec::new();
        let several = documents.len() > 1;
        let end = end_of_documents(model, config);
        for document in &documents {
            ids.extend(encode(&tokenizer, &file, document, true)?);
            if let (true, Some(end)) = (several, end)
                && ids.last() != Some(&end)
            {
                ids.push(end);
            }
        }
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= config.vocabulary) {
            return Err(Error::TokenOutside {
                path: model.join("tokenizer.json"),
                id,
                vocabulary: config.vocabulary,
            });
        }
        if ids.len() < 2 {
            return Err(Error::DataTooSmall {
                path: path.into(),
                found: ids.len(),
                needed: 2,
            });
        }
        Ok(Self {
            path: path.into(),
            ids,
            window,
            documents: documents.len(),
            end,
        })
    }

    /// Tells of documents that nothing separates, and of windows longer than what the model was made for.
    pub fn warn(&self, config: &ModelConfig, observer: &dyn Observer) {
        if self.documents > 1 && self.end.is_none() {
            observer.warn(format!(
                "the {} documents of {} run into each other: neither config.json nor generation_config.json names an \
                 eos_token_id",
                self.documents,
                self.path.display()
            ));
        }
        if self.window > config.positions_max {
            observer.warn(format!(
                "windows of {} tokens are longer than the {} positions the model was made for",
                self.window, config.positions_max
            ));
        }
    }

    /// All windows in order; the last may be shorter, and is dropped if it predicts nothing.
    pub fn windows(&self) -> impl Iterator<Item = &[u32]> {
        self.ids.chunks(self.window).filter(|w| w.len() >= 2)
    }

    /// Tells how much of the text fills no window of full length, if it is not little.
    pub fn note_rest(&self, observer: &dyn Observer) {
        let (all, rest) = (self.ids.len(), self.ids.len() % self.window);
        if all > self.window && rest * 100 > all {
            observer.note(format!(
                "the last {rest} of {all} tokens fill no window of {} and are left out",
                self.window
            ));
        }
    }

    /// Windows of full length; a text shorter than one window is one window of its own length.
    pub fn full_windows(&self) -> Vec<&[u32]> {
        let full: Vec<&[u32]> = self.ids.chunks_exact(self.window).collect();
        if full.is_empty() {
            vec![&self.ids]
        } else {
            full
        }
    }
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

fn documents(path: &Path) -> Result<Vec<String>> {
    let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
    if ["json", "csv", "tsv", "parquet", "arrow"]
        .iter()
        .any(|it| ending == *it)
    {
        return Err(Error::DataFormat { path: path.into() });
    }
    let bytes = std::fs::read(path).context("read", path)?;
    let text = String::from_utf8(bytes).map_err(|e| Error::DataEncoding {
        path: path.into(),
        offset: e.utf8_error().valid_up_to(),
    })?;
    // editors of Windows begin texts with a mark that is none of their letters
    let text = match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_string(),
        None => text,
    };
    if ending != "jsonl" && ending != "ndjson" {
        return Ok(vec![text]);
    }
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            let line_number = number + 1;
            let value: Value = serde_json::from_str(line).map_err(|source| Error::DataLine {
                path: path.into(),
                line: line_number,
                source,
            })?;
            match value["text"].as_str() {
                Some(text) => Ok(text.to_string()),
                None => Err(Error::DataField {
                    path: path.into(),
                    line: line_number,
                    found: found_instead(&value),
                }),
            }
        })
        .collect()
}

fn found_instead(value: &Value) -> String {
    match value {
        Value::Object(map) if map.contains_key("text") => format!("`text`: {}", map["text"]),
        Value::Object(map) => {
            let keys: Vec<&str> = map.keys().map(String::as_str).collect();
            format!("the fields {}", keys.join(", "))
        }
        Value::Array(_) => "a list".into(),
        Value::String(_) => "a string".into(),
        other => other.to_string(),
    }
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

    #[test]
    fn broken_lines_are_named() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("d.jsonl");
        std::fs::write(
            &path,
            "{\"text\": \"a\"}\n\n{\"prompt\": \"b\", \"answer\": \"c\"}\n",
        )
        .expect("writes");
        let error = documents(&path).expect_err("no text field").to_string();
        assert!(
            error.contains("line 3") && error.contains("prompt, answer"),
            "{error}"
        );
        std::fs::write(&path, "{\"text\": \"a\"}\nnot json\n").expect("writes");
        assert!(
            documents(&path)
                .expect_err("not JSON")
                .to_string()
                .contains("line 2")
        );
        for ending in ["json", "CSV", "parquet"] {
            let table = dir.path().join(format!("d.{ending}"));
            std::fs::write(&table, "[]").expect("writes");
            assert!(matches!(documents(&table), Err(Error::DataFormat { .. })));
        }
        let text = dir.path().join("d.txt");
        std::fs::write(&text, [b'a', 0xff]).expect("writes");
        assert!(
            documents(&text)
                .expect_err("not UTF-8")
                .to_string()
                .contains("byte 1")
        );
    }
}
