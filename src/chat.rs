//! Chat templates: how a conversation becomes what a model was tuned on, and where in it the answers are.

use std::ops::Range;
use std::path::{Path, PathBuf};

use chrono::NaiveDateTime;
use serde_json::{Map, Value, json};

use crate::error::{Error, IoContext, Result};
use crate::json;
use crate::template::Jinja;

/// The template of a model, and the special tokens that it may name.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatTemplate {
    /// The file it comes from.
    pub path: PathBuf,
    text: String,
    tokens: Map<String, Value>,
}

const CONFIG: &str = "tokenizer_config.json";

/// The names under which a template finds special tokens.
const TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl ChatTemplate {
    /// The template in a model directory, if it has one: a file of its own before the tokenizer's config; of several the
    /// one called `default`.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let object = |name: &str| -> Result<Map<String, Value>> {
            let path = dir.join(name);
            match path.exists() {
                true => json::read(&path),
                false => Ok(Map::new()),
            }
        };
        let config = object(CONFIG)?;
        let alone = dir.join("chat_template.jinja");
        let (path, text) = if alone.exists() {
            let text = std::fs::read_to_string(&alone).context("read", &alone)?;
            (alone, text)
        } else {
            let named = |of: &Value| (of["name"] == "default").then(|| of["template"].clone());
            let template = match config.get("chat_template") {
                Some(Value::Array(several)) => several.iter().find_map(named),
                other => other.cloned(),
            };
            match template {
                Some(Value::String(text)) => (dir.join(CONFIG), text),
                _ => return Ok(None),
            }
        };
        let others = object("special_tokens_map.json")?;
        let token = |name: &str| {
            let spelled = |value: &Value| {
                value
                    .as_str()
                    .or(value["content"].as_str())
                    .map(Value::from)
            };
            config
                .get(name)
                .and_then(spelled)
                .or(others.get(name).and_then(spelled))
        };
        let tokens = TOKENS
            .iter()
            .filter_map(|&name| Some((name.to_string(), token(name)?)))
            .collect();
        Ok(Some(Self { path, text, tokens }))
    }

    /// The same, where there must be one.
    pub fn required(dir: &Path) -> Result<Self> {
        Self::read(dir)?.ok_or_else(|| Error::NoChatTemplate { path: dir.into() })
    }

    /// The template compiled; `now` is what it takes for the present.
    pub fn ready(&self, now: NaiveDateTime) -> Result<Chat> {
        let jinja = Jinja::new(&self.path.display().to_string(), &self.text, now)?;
        Ok(Chat {
            jinja,
            tokens: self.tokens.clone(),
        })
    }
}

/// A template that is ready to write conversations.
pub struct Chat {
    jinja: Jinja,
    tokens: Map<String, Value>,
}

/// A conversation as the model reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    pub text: String,
    /// The bytes of `text` that are answers, each to its end token.
    pub answers: Vec<Range<usize>>,
}

impl Chat {
    /// The conversation that `prompt` opens, up to where the model has to answer.
    pub fn opened_by(&self, prompt: &str) -> Result<String> {
        let messages = [json!({"role": "user", "content": prompt})];
        self.render(&messages, &Value::Null, true)
    }

    /// A conversation, up to where the model has to answer if it `is_asked` to.
    ///
    /// `tools` are what the template is told of functions, or null.
    pub fn render(&self, messages: &[Value], tools: &Value, is_asked: bool) -> Result<String> {
        let mut variables = self.tokens.clone();
        variables.insert("messages".into(), messages.into());
        variables.insert("add_generation_prompt".into(), is_asked.into());
        // transformers hands them over, empty
        variables.insert("tools".into(), tools.clone());
        variables.insert("documents".into(), Value::Null);
        self.jinja.render(&variables.into())
    }

    /// A conversation up to the last of the messages `learnt`, in which these are answers: what follows where the model is
    /// asked, so that a model learns to write just what it will be asked for.
    ///
    /// Most often that is one text. Where a template writes an earlier message otherwise once others follow (many drop what
    /// was thought), each such answer comes in a text that ends with it. `ends` are the spellings of special tokens: what a
    /// template writes behind the one that ends an answer is not part of it.
    ///
    /// # Errors
    /// What the template refuses; one that rewrites what comes before an answer when the answer is there.
    pub fn told(
        &self,
        messages: &[Value],
        tools: &Value,
        learnt: &[usize],
        ends: &[String],
    ) -> Result<Vec<Told>> {
        let Some(&last) = learnt.last() else {
            return Ok(Vec::new());
        };
        let text = self.render(&messages[..=last], tools, false)?;
        let (mut told, mut answers) = (Vec::new(), Vec::new());
        for &at in learnt {
            let asked = self.render(&messages[..at], tools, true)?;
            let up_to_here = match at == last {
                true => text.clone(),
                false => self.render(&messages[..=at], tools, false)?,
            };
            let start = match up_to_here.starts_with(&asked) {
                true => asked.len(),
                false => self.start(&messages[..at], tools, &asked, &up_to_here)?,
            };
            let end = start + without_rest(&up_to_here[start..], ends).len();
            let answer = start..end;
            if text.starts_with(&up_to_here[..end]) {
                answers.push(answer);
            } else {
                told.push(Told {
                    text: up_to_here,
                    answers: vec![answer],
                });
            }
        }
        told.push(Told { text, answers });
        Ok(told)
    }

    /// Where the answer to `messages` begins in `text`, which is not what the model is `asked` with something behind it: a
    /// model may be asked to go on from an opened thought that its template drops.
    fn start(&self, messages: &[Value], tools: &Value, asked: &str, text: &str) -> Result<usize> {
        let before = self.render(messages, tools, false)?;
        if !text.starts_with(&before) || !asked.starts_with(&before) {
            return Err(Error::AnswerUnplaced {
                message: messages.len() + 1,
            });
        }
        let alike = text.chars().zip(asked.chars()).take_while(|(a, b)| a == b);
        Ok(alike.map(|(c, _)| c.len_utf8()).sum())
    }
}

/// An answer up to the special token that ends it, where only blanks follow that.
fn without_rest<'a>(answer: &'a str, ends: &[String]) -> &'a str {
    let trimmed = answer.trim_end();
    match ends.iter().any(|end| trimmed.ends_with(end.as_str())) {
        true => trimmed,
        false => answer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(files: &[(&str, &str)]) -> Option<String> {
        let dir = tempfile::tempdir().expect("temporary directory");
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).expect("writes");
        }
        let template = ChatTemplate::read(dir.path()).expect("reads")?;
        Some(
            template
                .ready(NaiveDateTime::default())
                .and_then(|chat| chat.opened_by("Hi"))
                .expect("renders"),
        )
    }

    #[test]
    fn a_template_is_found_where_it_may_lie() {
        let config = r#"{"chat_template": "{{ bos_token }}{{ messages[0]['content'] }}", "bos_token": {"content": "<s>"}}"#;
        assert_eq!(rendered(&[(CONFIG, config)]).as_deref(), Some("<s>Hi"));
        let alone = (
            "chat_template.jinja",
            "{{ bos_token }}!{% if add_generation_prompt %}>{% endif %}\n",
        );
        assert_eq!(
            rendered(&[(CONFIG, config), alone]).as_deref(),
            Some("<s>!>")
        );
        let map = ("special_tokens_map.json", r#"{"bos_token": "<b>"}"#);
        assert_eq!(rendered(&[map, alone]).as_deref(), Some("<b>!>"));
        let several = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(rendered(&[(CONFIG, several)]).as_deref(), Some("d"));
        for without in [
            "{}",
            r#"{"chat_template": null}"#,
            r#"{"chat_template": []}"#,
        ] {
            assert_eq!(rendered(&[(CONFIG, without)]), None);
        }
        assert_eq!(rendered(&[]), None);
    }
}
