//! Chat templates: how a prompt becomes what a model was tuned to answer.

use std::path::{Path, PathBuf};

use chrono::NaiveDateTime;
use serde_json::{Map, Value, json};

use crate::error::{Error, IoContext, Result};
use crate::{json, template};

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

    /// The conversation that `prompt` opens, up to where the model has to answer.
    pub fn render(&self, prompt: &str, now: NaiveDateTime) -> Result<String> {
        let mut variables = self.tokens.clone();
        variables.insert(
            "messages".into(),
            json!([{"role": "user", "content": prompt}]),
        );
        variables.insert("add_generation_prompt".into(), true.into());
        // transformers hands them over, empty
        variables.insert("tools".into(), Value::Null);
        variables.insert("documents".into(), Value::Null);
        let name = self.path.display().to_string();
        template::chat(&name, &self.text, &variables.into(), now)
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
                .render("Hi", NaiveDateTime::default())
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
