//! Tokens become text one by one: what is said is never taken back, and never half a character.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// A text that grows by tokens.
///
/// A token's text depends on those before it: a space in front, bytes that are one character together. So the last few are
/// always decoded along, and what ends in an unfinished character waits.
pub struct Spelling<'a> {
    tokenizer: &'a Tokenizer,
    path: &'a Path,
    ids: Vec<u32>,
    /// Decoding starts here.
    context: usize,
    /// What lies before is told.
    told: usize,
}

/// Tokens of the prompt that the first new one is decoded with.
const CONTEXT: usize = 5;

impl<'a> Spelling<'a> {
    /// A text that goes on behind `read`, whose own text is not told; `path` names the tokenizer in errors.
    pub fn behind(tokenizer: &'a Tokenizer, path: &'a Path, read: &[u32]) -> Self {
        Self {
            tokenizer,
            path,
            ids: read.to_vec(),
            context: read.len().saturating_sub(CONTEXT),
            told: read.len(),
        }
    }

    /// What can be said for sure with one token more: often nothing.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let new = self.untold()?;
        if new.is_empty() || new.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.context = self.told;
        self.told = self.ids.len();
        Ok(new)
    }

    /// What still waited: a character that was never finished shows as such.
    pub fn finish(self) -> Result<String> {
        self.untold()
    }

    fn untold(&self) -> Result<String> {
        let told = self.decoded(self.told)?;
        let all = self.decoded(self.ids.len())?;
        // a context that ends within a character tells less than it will
        let same = told.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let new = all.strip_prefix(&told).or(all.strip_prefix(same));
        Ok(new.map_or_else(|| beyond(&told, &all), String::from))
    }

    fn decoded(&self, end: usize) -> Result<String> {
        let ids = &self.ids[self.context..end];
        self.tokenizer
            .decode(ids, true)
            .map_err(|e| Error::Tokenizer {
                path: self.path.into(),
                reason: e.to_string(),
            })
    }
}

/// What `all` has behind `told`, of which the end now reads otherwise: where bytes stand for themselves, one that is a letter
/// is none any more beside one that belongs to no character. What is told stays told.
fn beyond(told: &str, all: &str) -> String {
    all.chars().skip(told.chars().count()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> (Tokenizer, std::path::PathBuf) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures")
            .join(name);
        let tokenizer = crate::text::tokenizer(&dir).expect("the fixture has one");
        (tokenizer, dir.join("tokenizer.json"))
    }

    #[test]
    fn pieces_join_to_the_text_and_hold_whole_characters() {
        let (tokenizer, path) = fixture("shakespeare-1m");
        let text = "Good morrow, naïve 😀 cousin — 中文!\n\nWhat news?  ";
        let ids = tokenizer
            .encode_fast(text, false)
            .expect("encodes")
            .get_ids()
            .to_vec();
        assert!(ids.len() > 30, "characters beyond ASCII are several tokens");
        for read in [0, 1, 7] {
            let mut spelling = Spelling::behind(&tokenizer, &path, &ids[..read]);
            let mut pieces = Vec::new();
            for &id in &ids[read..] {
                pieces.push(spelling.push(id).expect("decodes"));
            }
            pieces.push(spelling.finish().expect("decodes"));
            let before = tokenizer.decode(&ids[..read], true).expect("decodes");
            assert_eq!(before + &pieces.concat(), text);
            assert!(
                pieces.iter().any(String::is_empty),
                "some tokens wait for others"
            );
            assert!(
                pieces.iter().all(|piece| !piece.contains('\u{FFFD}')),
                "{pieces:?}"
            );
        }
    }

    #[test]
    fn a_byte_that_spoils_the_one_before_it_silences_nothing() {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "byte_fallback": true, "merges": [],
                "vocab": {"<0x0A>": 0, "<0xFF>": 1, "a": 2, "b": 3}}}"#;
        let tokenizer: Tokenizer = json.parse().expect("a tokenizer");
        let mut spelling = Spelling::behind(&tokenizer, Path::new("tokenizer.json"), &[2]);
        let mut said = Vec::new();
        for id in [2, 0, 1, 1, 2, 3, 0, 3] {
            said.push(spelling.push(id).expect("decodes"));
        }
        said.push(spelling.finish().expect("decodes"));
        assert_eq!(said.concat(), "a\n\u{FFFD}\u{FFFD}ab\nb", "{said:?}");
    }

    #[test]
    fn an_unfinished_character_shows_at_the_end_only() {
        let (tokenizer, path) = fixture("shakespeare-1m");
        let ids = tokenizer
            .encode_fast("so 😀", false)
            .expect("encodes")
            .get_ids()
            .to_vec();
        let mut spelling = Spelling::behind(&tokenizer, &path, &[]);
        let mut said = String::new();
        for &id in &ids[..ids.len() - 1] {
            said += &spelling.push(id).expect("decodes");
        }
        assert_eq!(said, "so ");
        assert!(spelling.finish().expect("decodes").starts_with('\u{FFFD}'));
    }
}
