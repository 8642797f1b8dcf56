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
        self.render(&messages, &Map::new(), true)
    }

    /// A conversation, up to where the model has to answer if it `is_asked` to.
    ///
    /// `beside` is what the template is told beside the messages, such as `tools`.
    pub fn render(
        &self,
        messages: &[Value],
        beside: &Map<String, Value>,
        is_asked: bool,
    ) -> Result<String> {
        // transformers hands two over, empty
        let nothing = ["tools", "documents"].map(|name| (name.to_string(), Value::Null));
        let mut variables: Map<String, Value> = nothing.into_iter().collect();
        variables.extend(beside.clone());
        variables.extend(self.tokens.clone());
        variables.insert("messages".into(), messages.into());
        variables.insert("add_generation_prompt".into(), is_asked.into());
        self.jinja.render(&variables.into())
    }

    /// A conversation in which the messages `learnt` are answers: each is what follows where the model is asked, so that a
    /// model learns to write just what it will be asked for.
    ///
    /// Most often that is one text. Where a template writes an earlier message otherwise once others follow (many drop what
    /// was thought), each such answer comes in a text that ends with it. `ends` are the spellings of special tokens: the one
    /// behind an answer ends it.
    ///
    /// # Errors
    /// What the template refuses; an answer that has no place behind what it answers.
    pub fn told(
        &self,
        messages: &[Value],
        beside: &Map<String, Value>,
        learnt: &[usize],
        ends: &[String],
    ) -> Result<Vec<Told>> {
        let mut told: Vec<Told> = Vec::new();
        for &at in learnt.iter().rev() {
            let (text, answer) = self.answered(&messages[..=at], beside, ends)?;
            match told.iter_mut().find(|later| later.text.starts_with(&text)) {
                Some(later) => later.answers.insert(0, answer),
                None => told.push(Told {
                    text,
                    answers: vec![answer],
                }),
            }
        }
        told.reverse();
        Ok(told)
    }

    /// A conversation to the end of its last message, and where that is.
    fn answered(
        &self,
        messages: &[Value],
        beside: &Map<String, Value>,
        ends: &[String],
    ) -> Result<(String, Range<usize>)> {
        let (last, before) = messages.split_last().expect("an answer at least");
        let text = self.render(messages, beside, false)?;
        // few templates can ask before anything is said
        let asked = match before {
            [] => None,
            before => Some(self.render(before, beside, true)?),
        };
        let (mut text, start) = match asked {
            Some(asked) if text.starts_with(&asked) => (text, asked.len()),
            asked => self.placed(last, before, beside, text, asked)?,
        };
        let answer = &text[start..];
        let found = occurrences(answer, ends);
        let end = match found[..] {
            [end] if answer[end..].trim().is_empty() => end,
            [] => answer.len(),
            // some templates end what is not asked further with a token of their own, which is none of the answer
            _ => {
                let further = self.render(messages, beside, true)?;
                let shared = match further.get(start..) {
                    Some(further) => shared(answer, further),
                    None => answer.len(),
                };
                let last = *found
                    .last()
                    .expect("there are several, or one that text follows");
                let whole = match answer[last..].trim().is_empty() {
                    true => last,
                    false => answer.len(),
                };
                let within = found.iter().rev().find(|&&end| end <= shared);
                match within {
                    Some(&end) if shared < answer.len() => end,
                    _ => whole,
                }
            }
        };
        text.truncate(start + end);
        Ok((text, start..start + end))
    }

    /// The text of an answer and where the answer begins there, if it does not just follow what the model is `asked` with.
    fn placed(
        &self,
        last: &Value,
        before: &[Value],
        beside: &Map<String, Value>,
        text: String,
        asked: Option<String>,
    ) -> Result<(String, usize)> {
        // where another answer would make a difference
        let mut another = last.clone();
        another["content"] = "\u{e000}".into();
        let messages = [before, &[another]].concat();
        let start = shared(&text, &self.render(&messages, beside, false)?);
        let Some(asked) = asked else {
            return Ok((text, start));
        };
        // a model may be asked to go on from an opened thought that its template drops
        let head = &text[..start];
        if head.starts_with(&self.render(before, beside, false)?) {
            return Ok((text, start));
        }
        // or it is asked with what its template drops where an answer is there: a system message, say
        let unplaced = || Error::AnswerUnplaced {
            message: before.len() + 1,
        };
        let said = before
            .iter()
            .rev()
            .find_map(|message| message["content"].as_str());
        let said = said.unwrap_or_default().trim();
        if start == text.len() || !head.contains(said) || !asked.contains(said) {
            return Err(unplaced());
        }
        let behind = |text: &str| text.rfind(said).map(|at| at + said.len());
        let (in_head, in_asked) = (behind(head), behind(&asked));
        let (in_head, in_asked) = in_head.zip(in_asked).ok_or_else(unplaced)?;
        let bridge = shared(&head[in_head..], &asked[in_asked..]);
        if in_asked + bridge != asked.len() {
            return Err(unplaced());
        }
        let tail = &text[in_head + bridge..];
        Ok((format!("{asked}{tail}"), asked.len()))
    }
}

/// The bytes that two texts begin with alike, in whole characters.
fn shared(one: &str, other: &str) -> usize {
    let alike = one.chars().zip(other.chars());
    let alike = alike.take_while(|(a, b)| a == b);
    alike.map(|(c, _)| c.len_utf8()).sum()
}

/// Where the spellings of special tokens end in a text, in order.
fn occurrences(text: &str, ends: &[String]) -> Vec<usize> {
    let of = |end: &String| {
        let length = end.len();
        let found: Vec<usize> = text
            .match_indices(end.as_str())
            .map(|(at, _)| at + length)
            .collect();
        found
    };
    let ends = ends.iter().filter(|end| !end.is_empty());
    let mut found: Vec<usize> = ends.flat_map(of).collect();
    found.sort_unstable();
    found.dedup();
    found
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

    /// What is told of messages, the user's and the assistant's in turn behind a system message if it is not empty, with the
    /// answers in «».
    fn told(template: &str, system: &str, said: &[&str]) -> Vec<String> {
        let chat = ChatTemplate {
            path: "t".into(),
            text: template.into(),
            tokens: Map::new(),
        };
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let mut messages: Vec<Value> = Vec::new();
        if !system.is_empty() {
            messages.push(message("system", system));
        }
        for (at, said) in said.iter().enumerate() {
            let role = if at % 2 == 0 { "user" } else { "assistant" };
            messages.extend((!said.is_empty()).then(|| message(role, said)));
        }
        let learnt: Vec<usize> = (0..messages.len())
            .filter(|&at| messages[at]["role"] == "assistant")
            .collect();
        let ends = ["<e>", "<|end|>", "<|endoftext|>"].map(String::from);
        let chat = chat.ready(NaiveDateTime::default()).expect("compiles");
        let told = chat
            .told(&messages, &Map::new(), &learnt, &ends)
            .expect("tells");
        let marked = |told: Told| {
            let mut text = told.text;
            for answer in told.answers.iter().rev() {
                text.insert(answer.end, '»');
                text.insert(answer.start, '«');
            }
            text
        };
        told.into_iter().map(marked).collect()
    }

    #[test]
    fn answers_are_what_follows_where_the_model_is_asked_to_their_end() {
        const PLAIN: &str = "{% for m in messages %}<s>{{ m.role[:1] }}:{{ m.content | trim }}<e>\n{% endfor %}\
            {% if add_generation_prompt %}<s>a:{% endif %}";
        let turns = ["Hi", " Ho ", "And?", "So."];
        assert_eq!(
            told(PLAIN, "", &turns),
            ["<s>u:Hi<e>\n<s>a:«Ho<e>»\n<s>u:And?<e>\n<s>a:«So.<e>»"]
        );
        // what an answer quotes does not end it, and what greets is an answer too
        assert_eq!(
            told(PLAIN, "", &["Hi", "Say <e>, not <e>"]),
            ["<s>u:Hi<e>\n<s>a:«Say <e>, not <e><e>»"]
        );
        assert_eq!(told(PLAIN, "", &["", "Hello"]), ["<s>a:«Hello<e>»"]);
        assert_eq!(told(PLAIN, "Be", &["Hi"]), [""; 0]);
        // in the manner of Phi: what is not asked further is closed once more
        let closed = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}\
            {% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}";
        assert_eq!(
            told(closed, "", &["a", "b", "c", "d"]),
            [
                "<|user|>\na<|end|>\n<|assistant|>\n«b<|end|>»\n<|user|>\nc<|end|>\n<|assistant|>\n«d<|end|>»"
            ]
        );
        // of Zephyr without an end, and of a token that is only closed with
        let endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
            {% if add_generation_prompt %}assistant: {% endif %}";
        assert_eq!(
            told(endless, "", &["a", "b"]),
            ["user: a\nassistant: «b\n»"]
        );
        let last = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}\
            {% if add_generation_prompt %}assistant: {% else %}<e>{% endif %}";
        assert_eq!(told(last, "", &["a", "b"]), ["user: aassistant: «b<e>»"]);
    }

    #[test]
    fn answers_whose_surroundings_change_are_told_as_they_were_asked_for() {
        // in the manner of Qwen 3: of earlier answers the thoughts are dropped
        let forgets = "{% for m in messages %}<s>{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('>')[-1] }}{% endif %}\
            <e>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}";
        assert_eq!(
            told(forgets, "", &["a", "(why>b", "c", "(how>d"]),
            [
                "<s>a<e><s>«(why>b<e>»",
                "<s>a<e><s>b<e><s>c<e><s>«(how>d<e>»"
            ]
        );
        // of DeepSeek-R1: the model is asked with an opened thought, and its answers have none
        let opened = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}\
            {% if add_generation_prompt %}<assistant><think>{% endif %}";
        assert_eq!(
            told(opened, "", &["a", "<table>"]),
            ["<user>a<e><assistant>«<table><e>»"]
        );
        // of Mistral: the system message stands in the last turn of a user who waits for an answer, and nowhere else
        let inlaid = "{% for m in messages %}{% if m.role == 'user' %}[I]{% if loop.last %}{{ messages[0].content }}|{% endif %}\
            {{ m.content }}[/I]{% elif m.role == 'assistant' %} {{ m.content }}<e>{% endif %}{% endfor %}";
        assert_eq!(
            told(inlaid, "Be", &["a", "b", "c", "d"]),
            ["[I]Be|a[/I]« b<e>»", "[I]a[/I] b<e>[I]Be|c[/I]« d<e>»"]
        );
    }
}
