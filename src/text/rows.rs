//! The rows of a data file: texts, conversations, prompts with what completes them.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::table;
use crate::error::{Error, IoContext, Place, Result};
use crate::json;

/// One row.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    /// `text`, or a file that is all one text.
    Text(String),
    /// `prompt` and `completion`, where both are texts: the second is the answer.
    Pair {
        prompt: String,
        completion: String,
    },
    Chat(Conversation),
}

/// `messages`, and what is written otherwise and means the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Each an object with a `role` and a `content`, and what else a template may look for.
    pub messages: Vec<Value>,
    /// What the template is told beside them: `tools`, and what is in `chat_template_kwargs`.
    pub beside: Map<String, Value>,
    /// The messages that are answers to learn.
    pub learnt: Vec<usize>,
}

/// The endings of files that are read.
pub const ENDINGS: [&str; 5] = ["jsonl", "ndjson", "json", "parquet", "txt"];

/// Those of tables and archives, whose text this would not find.
const REFUSED: [&str; 7] = ["csv", "tsv", "arrow", "gz", "zst", "zip", "xz"];

/// What rows are read by; the rest of a table stays where it is.
pub(super) const FIELDS: [&str; 12] = [
    "text",
    "messages",
    "conversations",
    "tools",
    "chat_template_kwargs",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "history",
];

/// Reads files: `.jsonl` and `.ndjson` have a row in each line, `.json` too if it is no list of them, `.parquet` is a table, and
/// everything else is one text.
///
/// # Errors
/// What is read neither way; a row of no known form; a text without roles among conversations, or the other way round.
pub fn read(files: &[PathBuf]) -> Result<Vec<(&Path, Place, Row)>> {
    let mut rows: Vec<(&Path, Place, Row)> = Vec::new();
    for path in files {
        for row in file(path)? {
            let (place, row) = row?;
            let is_text = |row: &Row| matches!(row, Row::Text(_));
            if let Some((_, first, other)) = rows.first()
                && is_text(other) != is_text(&row)
            {
                let (found, other) = match is_text(&row) {
                    true => ("a plain text", "what has answers"),
                    false => ("what has answers", "a plain text"),
                };
                return Err(Error::DataField {
                    path: path.into(),
                    place,
                    found: format!("{found}, where {first} is {other}"),
                });
            }
            rows.push((path, place, row));
        }
    }
    Ok(rows)
}

type Rows<'a> = Box<dyn Iterator<Item = Result<(Place, Row)>> + 'a>;

/// The rows of one file.
fn file(path: &Path) -> Result<Rows<'_>> {
    let ending = path.extension().unwrap_or_default().to_ascii_lowercase();
    let ending = ending.to_str().unwrap_or_default();
    let parsed = move |place: Place, value: Value| {
        let row = row(value).map_err(|found| Error::DataField {
            path: path.into(),
            place,
            found,
        })?;
        Ok((place, row))
    };
    if REFUSED.contains(&ending) {
        return Err(Error::DataFormat { path: path.into() });
    }
    if ending == "parquet" {
        let rows = (1..).map(Place::Row).zip(table::read(path)?);
        return Ok(Box::new(rows.map(move |(place, row)| parsed(place, row))));
    }
    let text = text(path)?;
    // much that is called .json has its rows in lines
    if ending == "json" && text.trim_start().starts_with('[') {
        let items: Vec<Value> = json::parse(path, text.as_bytes())?;
        let items = (1..).map(Place::Item).zip(items);
        return Ok(Box::new(
            items.map(move |(place, item)| parsed(place, item)),
        ));
    }
    if !["json", "jsonl", "ndjson"].contains(&ending) {
        let all = (Place::Item(1), Row::Text(text));
        return Ok(Box::new(std::iter::once(Ok(all))));
    }
    let lines: Vec<(usize, String)> = (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| (number, line.into()))
        .collect();
    let rows = lines.into_iter().map(move |(line, text)| {
        let value = json::refuse_repeated_keys(text.as_bytes())
            .and_then(|()| serde_json::from_str(&text))
            .map_err(|source| Error::DataLine {
                path: path.into(),
                line,
                source,
            })?;
        parsed(Place::Line(line), value)
    });
    Ok(Box::new(rows))
}

fn text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).context("read", path)?;
    let text = String::from_utf8(bytes).map_err(|e| Error::DataEncoding {
        path: path.into(),
        offset: e.utf8_error().valid_up_to(),
    })?;
    // editors of Windows begin texts with a mark that is none of their letters
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_string(),
        None => text,
    })
}

/// What a row is, or what was found instead.
fn row(value: Value) -> Result<Row, String> {
    let Value::Object(mut row) = value else {
        return Err(match value {
            Value::Array(_) => "a list".into(),
            Value::String(_) => "a string".into(),
            other => other.to_string(),
        });
    };
    // tables have every column in every row
    row.retain(|_, value| !value.is_null());
    for key in ["messages", "conversations"] {
        if let Some(messages) = row.remove(key) {
            let Value::Array(messages) = messages else {
                return Err(format!("`{key}`: {}", shown(&messages)));
            };
            return conversation(messages, 0, &row);
        }
    }
    if let (Some(prompt), Some(completion)) = (row.get("prompt"), row.get("completion")) {
        return match (prompt.clone(), completion.clone()) {
            (Value::String(_), Value::String(_)) if row.contains_key("system") => {
                Err("a `system`, which only conversations have".into())
            }
            (Value::String(prompt), Value::String(completion)) => {
                Ok(Row::Pair { prompt, completion })
            }
            (Value::Array(mut messages), Value::Array(answers)) => {
                let first = messages.len();
                messages.extend(answers);
                conversation(messages, first, &row)
            }
            _ => Err("`prompt` and `completion` that are neither two texts nor two lists".into()),
        };
    }
    if let Some(text) = row.remove("text") {
        return match text {
            Value::String(text) => Ok(Row::Text(text)),
            other => Err(format!("`text`: {}", shown(&other))),
        };
    }
    if row.contains_key("instruction") && row.contains_key("output") {
        return conversation(instructed(&row)?, 0, &row);
    }
    let keys: Vec<String> = row.keys().map(|key| shown(&key.as_str().into())).collect();
    let keys: Vec<&str> = keys.iter().map(|key| key.trim_matches('"')).collect();
    Err(format!("the fields {}", keys.join(", ")))
}

/// The beginning of a value as JSON.
fn shown(value: &Value) -> String {
    const CHARS: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The conversation of Alpaca's fields: `instruction`, with `input` below it, and `output`.
fn instructed(row: &Map<String, Value>) -> Result<Vec<Value>, String> {
    let text = |key: &str| match row.get(key) {
        None => Ok(""),
        Some(Value::String(text)) => Ok(text.as_str()),
        Some(other) => Err(format!("`{key}`: {}", shown(other))),
    };
    match row.get("history") {
        None => {}
        Some(Value::Array(turns)) if turns.is_empty() => {}
        Some(_) => return Err("a `history`, which is read as `messages` only".into()),
    }
    let asked = match text("input")? {
        "" => text("instruction")?.to_string(),
        input => format!("{}\n\n{input}", text("instruction")?),
    };
    Ok(vec![
        json!({"role": "user", "content": asked}),
        json!({"role": "assistant", "content": text("output")?}),
    ])
}

/// A conversation whose answers, from message `first` on, are learnt, but for those that have a weight of 0; `row` is what else
/// there is.
fn conversation(
    messages: Vec<Value>,
    mut first: usize,
    row: &Map<String, Value>,
) -> Result<Row, String> {
    let mut all = messages;
    match row.get("system") {
        None => {}
        Some(Value::String(system)) if system.is_empty() => {}
        Some(Value::String(_)) if all.first().is_some_and(|it| it["role"] == "system") => {
            return Err("a `system` beside a message of that role".into());
        }
        Some(Value::String(system)) => {
            all.insert(0, json!({"role": "system", "content": system}));
            first += 1;
        }
        Some(other) => return Err(format!("`system`: {}", shown(other))),
    }
    let (mut read, mut learnt) = (Vec::new(), Vec::new());
    for (at, message) in all.into_iter().enumerate() {
        let named = |what: String| format!("message {} with {what}", at + 1);
        let (message, is_learnt) = one(message).map_err(named)?;
        if is_learnt && at >= first {
            learnt.push(at);
        }
        read.push(message);
    }
    Ok(Row::Chat(Conversation {
        messages: read,
        beside: beside(row)?,
        learnt,
    }))
}

/// What a template is told beside the messages.
fn beside(row: &Map<String, Value>) -> Result<Map<String, Value>, String> {
    let mut beside = match row.get("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(more)) => more.clone(),
        Some(other) => return Err(format!("`chat_template_kwargs`: {}", shown(other))),
    };
    let Some(tools) = row.get("tools") else {
        return Ok(beside);
    };
    // tables keep what has no one shape as its JSON
    let tools = match tools {
        Value::String(text) if text.is_empty() => Value::Null,
        Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| tools.clone()),
        tools => tools.clone(),
    };
    let are_tools = match &tools {
        Value::Null => true,
        Value::Array(tools) => tools.iter().all(Value::is_object),
        _ => false,
    };
    if !are_tools {
        return Err(format!("`tools`: {}", shown(&tools)));
    }
    beside.insert("tools".into(), tools);
    Ok(beside)
}

/// A message by its usual names, and whether it is an answer to learn.
fn one(message: Value) -> Result<(Value, bool), String> {
    let Value::Object(mut message) = message else {
        return Err(format!("no fields: {}", shown(&message)));
    };
    // tables have every column in every row, and templates ask whether there is one
    message.retain(|_, value| !value.is_null());
    // ShareGPT's words
    for (theirs, ours) in [("from", "role"), ("value", "content")] {
        if !message.contains_key(ours)
            && let Some(value) = message.remove(theirs)
        {
            message.insert(ours.into(), value);
        }
    }
    let role = match message.get("role") {
        Some(Value::String(role)) => match role.as_str() {
            "human" => "user",
            "gpt" => "assistant",
            role if ROLES.contains(&role) => role,
            other => {
                return Err(format!(
                    "the role {}: known are {}",
                    shown(&other.into()),
                    ROLES.join(", ")
                ));
            }
        },
        Some(other) => return Err(format!("the role {}", shown(other))),
        None => return Err("no `role`".into()),
    };
    let role = role.to_string();
    let calls = message.get("tool_calls").and_then(Value::as_array);
    let content = match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        // where functions are called, nothing may be said
        None if calls.is_some_and(|calls| !calls.is_empty()) => String::new(),
        Some(Value::Array(parts)) => parts.iter().map(part).collect::<Result<_, _>>()?,
        Some(other) => return Err(format!("`content`: {}", shown(other))),
        None => return Err("no `content`".into()),
    };
    let mut is_learnt = role == "assistant";
    message.insert("role".into(), role.into());
    message.insert("content".into(), content.into());
    // OpenAI's word, and LLaMA-Factory's
    for key in ["weight", "loss_weight"] {
        match message.remove(key).map(|weight| weight.as_f64()) {
            None | Some(Some(1.0)) => {}
            Some(Some(0.0)) => is_learnt = false,
            Some(_) => return Err(format!("a `{key}` that is neither 0 nor 1")),
        }
    }
    Ok((message.into(), is_learnt))
}

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The text of a part of a message.
fn part(part: &Value) -> Result<&str, String> {
    let text = part["text"].as_str().or(part["value"].as_str());
    match text.filter(|_| part["type"] == "text") {
        Some(text) => Ok(text),
        None => Err(format!("a part that is no text, of type {}", part["type"])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(value: Value) -> Conversation {
        match row(value) {
            Ok(Row::Chat(chat)) => chat,
            other => panic!("no conversation: {other:?}"),
        }
    }

    fn said(role: &str, content: &str) -> Value {
        json!({"role": role, "content": content})
    }

    #[test]
    fn conversations_are_known_in_each_manner_of_writing() {
        let expected = vec![said("user", "Hi"), said("assistant", "Ho")];
        let of_parts = json!([{"type": "text", "text": "H"}, {"type": "text", "value": "o"}]);
        for row in [
            json!({"messages": [said("user", "Hi"), said("assistant", "Ho")], "text": "not this"}),
            json!({"messages": [said("user", "Hi"), {"role": "assistant", "content": of_parts}]}),
            json!({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}),
            json!({"prompt": [said("user", "Hi")], "completion": [said("assistant", "Ho")]}),
            json!({"instruction": "Hi", "input": "", "output": "Ho"}),
        ] {
            let found = chat(row.clone());
            assert_eq!(
                (found.messages, found.learnt),
                (expected.clone(), vec![1]),
                "{row}"
            );
        }
        let asked = json!({"instruction": "Add", "input": "1 1", "output": "2", "system": "Be brief", "history": []});
        let expected = [
            said("system", "Be brief"),
            said("user", "Add\n\n1 1"),
            said("assistant", "2"),
        ];
        assert_eq!(chat(asked).messages, expected);
        let pair = json!({"prompt": "1 + 1 =", "completion": " 2"});
        let (prompt, completion) = ("1 + 1 =".into(), " 2".into());
        assert_eq!(row(pair), Ok(Row::Pair { prompt, completion }));
    }

    #[test]
    fn answers_are_learnt_unless_their_weight_is_0_or_they_belong_to_the_prompt() {
        let weighted = |weight: Value| {
            chat(
                json!({"messages": [said("user", "a"), {"role": "assistant", "content": "b", "weight": weight},
                said("user", "c"), {"role": "assistant", "content": "d", "loss_weight": 1.0}]}),
            )
        };
        assert_eq!(weighted(json!(0)).learnt, [3]);
        assert_eq!(weighted(json!(1)).learnt, [1, 3]);
        assert_eq!(weighted(json!(0)).messages[1], said("assistant", "b"));
        let prompt = [said("user", "a"), said("assistant", "b"), said("user", "c")];
        let found = chat(json!({"prompt": prompt, "completion": [said("assistant", "d")]}));
        assert_eq!(found.learnt, [3]);
        let called =
            json!({"role": "assistant", "content": null, "weight": null, "tool_calls": [{}]});
        let found = chat(json!({"messages": [said("user", "a"), called]}));
        let whole = json!({"role": "assistant", "content": "", "tool_calls": [{}]});
        assert_eq!((&found.messages[1], &found.learnt[..]), (&whole, &[1][..]));
    }

    #[test]
    fn what_stands_beside_the_messages_is_told_too() {
        let messages = json!([{"from": "human", "content": "a"}, {"role": "gpt", "value": "b"}]);
        let with = |key: &str, value: Value| {
            chat(json!({"conversations": messages, key: value, "id": null}))
        };
        let found = with("system", json!("Be brief"));
        assert_eq!(found.messages[0], said("system", "Be brief"));
        assert_eq!(found.learnt, [2]);
        assert_eq!(with("system", json!("")).messages.len(), 2);
        let tools = json!([{"name": "f"}]);
        for tools in [json!(tools.to_string()), tools.clone()] {
            assert_eq!(with("tools", tools).beside["tools"], json!([{"name": "f"}]));
        }
        let found = with("chat_template_kwargs", json!({"enable_thinking": false}));
        assert_eq!(found.beside["enable_thinking"], false);
        for (key, value) in [
            ("tools", json!("f")),
            ("tools", json!([7])),
            ("system", json!(7)),
            ("chat_template_kwargs", json!([])),
        ] {
            let found = row(json!({"messages": messages, key: value})).expect_err("is refused");
            assert!(found.contains(key), "{found}");
        }
        // to where the answers begin, one message more is counted
        let prompt = json!({"prompt": [said("assistant", "a")], "completion": [said("assistant", "b")], "system": "c"});
        assert_eq!(chat(prompt).learnt, [2]);
    }

    #[test]
    fn what_is_no_row_is_named() {
        for (value, words) in [
            (json!([]), "a list"),
            (json!("a"), "a string"),
            (json!(7), "7"),
            (json!({"text": [7]}), "`text`: [7]"),
            (
                json!({"prompt": "b", "chosen": "c"}),
                "the fields prompt, chosen",
            ),
            (
                json!({"prompt": "b", "completion": []}),
                "neither two texts",
            ),
            (json!({"messages": "a"}), "`messages`: \"a\""),
            (json!({"messages": ["a"]}), "message 1 with no fields"),
            (
                json!({"messages": [said("user\n", &"a".repeat(99))]}),
                "the role \"user\\n\"",
            ),
            (
                json!({"messages": [{"role": "user", "content": {"a": "b".repeat(99)}}]}),
                "bbb…",
            ),
            (
                json!({"prompt": "a", "completion": "b", "system": "c"}),
                "a `system`",
            ),
            (
                json!({"instruction": "a", "output": null}),
                "the fields instruction",
            ),
            (
                json!({"messages": [said("system", "a")], "system": "b"}),
                "beside a message",
            ),
            (
                json!({"messages": [said("user", "a"), {"role": "assistant", "content": null, "tool_calls": []}]}),
                "no `content`",
            ),
            (
                json!({"messages": [{"content": "a"}]}),
                "message 1 with no `role`",
            ),
            (
                json!({"messages": [said("user", "a"), said("bot", "a")]}),
                "message 2 with the role \"bot\": known are system, ",
            ),
            (json!({"messages": [{"role": "user"}]}), "no `content`"),
            (
                json!({"messages": [{"role": "user", "content": 7}]}),
                "`content`: 7",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
                "no text, of type \"image\"",
            ),
            (
                json!({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}),
                "neither 0 nor 1",
            ),
            (json!({"instruction": 7, "output": "a"}), "`instruction`: 7"),
            (
                json!({"instruction": "a", "output": "b", "history": [["c", "d"]]}),
                "`history`",
            ),
        ] {
            let found = row(value.clone()).expect_err("is no row");
            assert!(found.contains(words), "{value}: {found}");
        }
    }

    #[test]
    fn broken_files_are_named_with_the_place() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let found = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).expect("writes");
            let rows = read(std::slice::from_ref(&path))?;
            let rows = rows.into_iter().map(|(_, place, row)| (place, row));
            Ok::<_, Error>(rows.collect::<Vec<_>>())
        };
        let refused = |name: &str, bytes: &[u8], words: &str| {
            let error = found(name, bytes).expect_err("is refused").to_string();
            assert!(error.contains(words), "{name}: {error}");
        };
        let text = "{\"text\": \"a\"}";
        refused(
            "d.jsonl",
            format!("{text}\n\n{{\"answer\": 1}}").as_bytes(),
            "line 3",
        );
        refused(
            "d.jsonl",
            format!("{text}\nnot json").as_bytes(),
            "line 2 is not JSON",
        );
        refused(
            "d.jsonl",
            b"{\"text\": \"a\", \"text\": \"b\"}",
            "line 1 is not JSON",
        );
        let pair = "{\"prompt\": \"b\", \"completion\": \"c\"}";
        refused(
            "d.jsonl",
            format!("{text}\n{pair}").as_bytes(),
            "what has answers, where line 1 is a plain text",
        );
        refused("d.json", format!("[{pair},{text}]").as_bytes(), "item 2");
        refused("d.json", b"[", "not valid JSON");
        refused("d.txt", b"a\xff", "byte 1");
        for (name, bytes) in [("d.CSV", "a"), ("d.jsonl.gz", "")] {
            let error = found(name, bytes.as_bytes()).expect_err("is refused");
            assert!(matches!(error, Error::DataFormat { .. }), "{name}: {error}");
        }
        let rows = found("d.json", format!("[{pair}]").as_bytes()).expect("a list");
        assert_eq!(rows[0].0, Place::Item(1));
        // rows in lines, as much that is called .json
        let rows = found("d.json", format!("{pair}\n{pair}").as_bytes()).expect("two rows");
        assert_eq!(rows[1].0, Place::Line(2));
        let marked = found("d.jsonl", format!("\u{feff}{text}\n").as_bytes()).expect("a row");
        assert_eq!(marked, [(Place::Line(1), Row::Text("a".into()))]);
    }
}
