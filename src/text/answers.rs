//! Documents with answers, as sequences of token ids.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use chrono::{NaiveDate, NaiveDateTime};
use tokenizers::Tokenizer;

use super::rows::{Conversation, Row};
use super::{LossOn, TOKENIZER, attempt};
use crate::chat::{Chat, ChatTemplate, Told};
use crate::error::{Error, Result};

/// What a model reads in one go.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    pub ids: Vec<u32>,
    /// Whether each is learnt.
    pub learnt: Vec<bool>,
}

/// Makes sequences of rows.
pub struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    /// Of the tokenizer.
    path: PathBuf,
    /// If the model has a template.
    chat: Option<Chat>,
    /// Special tokens, and how they are spelled.
    special: HashSet<u32>,
    ends: Vec<String>,
    /// What ends a completion.
    end: Option<u32>,
    loss_on: LossOn,
}

/// The present for templates that ask for a date: a run is the same on every day. Those of Llama 3 take this one where nobody
/// tells them the time.
fn day() -> NaiveDateTime {
    let day = NaiveDate::from_ymd_opt(2024, 7, 26).expect("a day of the calendar");
    day.and_time(chrono::NaiveTime::MIN)
}

impl<'a> Reader<'a> {
    pub fn new(
        model: &Path,
        tokenizer: &'a Tokenizer,
        end: Option<u32>,
        loss_on: LossOn,
    ) -> Result<Self> {
        let chat = match ChatTemplate::read(model)? {
            Some(template) => Some(template.ready(day())?),
            None => None,
        };
        let added = tokenizer.get_added_tokens_decoder();
        let special = || added.iter().filter(|(_, token)| token.special);
        Ok(Self {
            tokenizer,
            path: model.join(TOKENIZER),
            chat,
            special: special().map(|(id, _)| *id).collect(),
            ends: special().map(|(_, token)| token.content.clone()).collect(),
            end,
            loss_on,
        })
    }

    /// What a row teaches: one sequence, or several where a template tells a conversation otherwise as it goes on.
    ///
    /// # Errors
    /// A conversation for a model without a template, and what the template or the tokenizer refuses.
    pub fn sequences(&self, row: &Row) -> Result<Vec<Sequence>> {
        match row {
            Row::Text(text) => {
                let all = 0..text.len();
                Ok(vec![self.encoded(text, &[all], true)?])
            }
            Row::Pair { prompt, completion } => Ok(vec![self.completed(prompt, completion)?]),
            Row::Chat(conversation) => {
                let told = self.told(conversation)?;
                let encoded = told
                    .iter()
                    .map(|told| self.encoded(&told.text, &told.answers, false));
                encoded.collect()
            }
        }
    }

    fn told(&self, conversation: &Conversation) -> Result<Vec<Told>> {
        let chat = self.chat.as_ref();
        let chat = chat.ok_or_else(|| Error::NoTemplateForChats {
            path: self.path.with_file_name(""),
        })?;
        let Conversation {
            messages,
            beside,
            learnt,
        } = conversation;
        match self.loss_on {
            LossOn::Answers => chat.told(messages, beside, learnt, &self.ends),
            LossOn::All => {
                let text = chat.render(messages, beside, false)?;
                let all = 0..text.len();
                Ok(vec![Told {
                    text,
                    answers: vec![all],
                }])
            }
        }
    }

    /// A prompt with what completes it, and the end token.
    fn completed(&self, prompt: &str, completion: &str) -> Result<Sequence> {
        let text = format!("{prompt}{completion}");
        let answer = match self.loss_on {
            LossOn::Answers => prompt.len()..text.len(),
            LossOn::All => 0..text.len(),
        };
        let mut sequence = self.encoded(&text, &[answer], true)?;
        if let Some(end) = self.end {
            if sequence.ids.last() != Some(&end) {
                sequence.ids.push(end);
                sequence.learnt.push(true);
            }
            // one that the tokenizer adds lies nowhere in the text
            *sequence.learnt.last_mut().expect("the end at least") = true;
        }
        Ok(sequence)
    }

    /// A text and its bytes that are learnt: a token with any of them is, a special one with its first.
    fn encoded(&self, text: &str, answers: &[Range<usize>], adds_tokens: bool) -> Result<Sequence> {
        let encoding = attempt(&self.path, || self.tokenizer.encode(text, adds_tokens))?;
        let offsets = encoding.get_ids().iter().zip(encoding.get_offsets());
        let learnt = offsets.map(|(id, &(start, end))| {
            // some special tokens take the blanks behind them, with which an answer may begin
            let first = if self.special.contains(id) {
                start + 1
            } else {
                end
            };
            let lies_in = |answer: &Range<usize>| first > answer.start && start < answer.end;
            answers.iter().any(lies_in)
        });
        Ok(Sequence {
            learnt: learnt.collect(),
            ids: encoding.get_ids().to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    #[test]
    fn a_special_token_that_takes_the_blanks_of_an_answer_is_not_learnt() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let added = |id: u32, content: &str, rstrip: bool| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": rstrip,
                "normalized": false, "special": true})
        };
        let words = json!({"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"},
            "added_tokens": [added(3, "<s>", true), added(4, "<e>", false)],
            "model": {"type": "WordLevel", "vocab": {"#": 0, "a": 1, "b": 2}, "unk_token": "#"}});
        let tokenizer: Tokenizer = words.to_string().parse().expect("a tokenizer");
        let template = "{% for m in messages %}<s>{{ m.content }}<e>{% endfor %}\
            {% if add_generation_prompt %}<s>{% endif %}";
        std::fs::write(dir.path().join("chat_template.jinja"), template).expect("writes");
        let reader = Reader::new(dir.path(), &tokenizer, None, LossOn::Answers).expect("a reader");
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let row = Row::Chat(Conversation {
            messages: vec![said("user", "a"), said("assistant", "  b")],
            beside: Map::new(),
            learnt: vec![1],
        });
        let sequences = reader.sequences(&row).expect("reads");
        let expected = Sequence {
            ids: vec![3, 1, 4, 3, 2, 4],
            learnt: vec![false, false, false, false, true, true],
        };
        assert_eq!(sequences, [expected]);
    }
}
