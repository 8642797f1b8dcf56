//! Text in, windows of token ids out.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, IoContext, Result};
use crate::event::Observer;
use crate::model::ModelConfig;
use crate::random::SplitMix;

/// A text as one stream of token ids, cut into windows.
#[derive(Debug, Clone)]
pub struct Corpus {
    pub path: PathBuf,
    pub ids: Vec<u32>,
    pub window: usize,
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

impl Corpus {
    /// Reads a text file as one document, or a `.jsonl` file as one document per line (its `text` field).
    ///
    /// Documents get the special tokens the tokenizer adds, and the model's end token between them.
    pub fn read(path: &Path, model: &Path, config: &ModelConfig, window: usize) -> Result<Self> {
        let tokenizer = tokenizer(model)?;
        let documents = documents(path)?;
        let mut ids = Vec::new();
        let several = documents.len() > 1;
        for document in &documents {
            let encoded = tokenizer
                .encode_fast(document.as_str(), true)
                .map_err(|e| Error::Tokenizer {
                    path: model.join("tokenizer.json"),
                    reason: e.to_string(),
                })?;
            ids.extend_from_slice(encoded.get_ids());
            if let (true, Some(&eos)) = (several, config.eos.first()) {
                ids.push(eos);
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
        })
    }

    /// Tells if windows are longer than what the model was made for.
    pub fn warn_of_length(&self, config: &ModelConfig, observer: &dyn Observer) {
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

fn documents(path: &Path) -> Result<Vec<String>> {
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
    let lines = path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
    if !lines {
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
