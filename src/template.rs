//! The one door to the template engine: for pages of ours, and for the chat templates of models.

use std::fmt::Write as _;

use chrono::NaiveDateTime;
use chrono::format::{Fixed, Item, StrftimeItems};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, escape_formatter};
use serde_json::ser::{Formatter, PrettyFormatter};

pub use minijinja::Value as Shown;

use crate::error::{Error, Result};

/// Renders a page of ours: `prepare` adds its filters, and a name that ends in `.html` turns escaping on.
pub fn page(
    name: &'static str,
    template: &'static str,
    facts: &serde_json::Value,
    prepare: impl FnOnce(&mut Environment<'static>),
) -> Result<String> {
    let mut environment = Environment::new();
    prepare(&mut environment);
    let rendered = environment
        .add_template(name, template)
        .and_then(|()| environment.get_template(name)?.render(Serde(facts)));
    rendered.map_err(|source| Error::Template {
        name: name.into(),
        source,
    })
}

/// Instructions that a chat template may take: some hundred times what a long conversation needs.
const FUEL: u64 = 10_000_000;

/// A chat template as transformers compiles one (`_compile_jinja_template` of 4.57): Jinja with its blocks trimmed, Python's
/// methods and way to print, and four functions.
pub struct Jinja {
    environment: Environment<'static>,
    /// What stands for the template in errors.
    name: String,
}

const CHAT: &str = "chat";

impl Jinja {
    /// Reads the template; `now` is what it takes for the present.
    pub fn new(name: &str, template: &str, now: NaiveDateTime) -> Result<Self> {
        let mut environment = chat_environment(now);
        let added = environment.add_template_owned(CHAT, without_tracking(template));
        added.map_err(|source| Error::Template {
            name: name.into(),
            source,
        })?;
        let name = name.into();
        Ok(Self { environment, name })
    }

    pub fn render(&self, variables: &serde_json::Value) -> Result<String> {
        let template = self.environment.get_template(CHAT);
        let rendered = template.and_then(|template| template.render(Serde(variables)));
        rendered.map_err(|source| Error::Template {
            name: self.name.clone(),
            source,
        })
    }
}

fn chat_environment(now: NaiveDateTime) -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| {
        let python = match value.kind() {
            ValueKind::None => Some("None"),
            ValueKind::Bool if value.is_true() => Some("True"),
            ValueKind::Bool => Some("False"),
            _ => None,
        };
        match python {
            Some(word) => out.write_str(word).map_err(minijinja::Error::from),
            None => escape_formatter(out, state, value),
        }
    });
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| {
        Err::<Shown, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| {
        let items = StrftimeItems::new(&format);
        // a time without a zone has none to tell: Python leaves these empty
        let zone = |item: &Item| {
            matches!(
                item,
                Item::Fixed(Fixed::TimezoneName | Fixed::TimezoneOffset)
            )
        };
        let items: Vec<Item> = items.filter(|item| !zone(item)).collect();
        let mut text = String::new();
        match write!(text, "{}", now.format_with_items(items.into_iter())) {
            Ok(()) => Ok(text),
            Err(_) => {
                let message = format!("strftime_now does not know the format {format:?}");
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            }
        }
    });
    environment
}

/// `{% generation %}` marks what an assistant said, for training; here it is a block like another.
fn without_tracking(template: &str) -> String {
    let mut pieces = template.split("{%");
    let mut plain: String = pieces.next().unwrap_or_default().into();
    for piece in pieces {
        plain.push_str("{%");
        let tag = piece.split("%}").next().unwrap_or_default();
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => plain.push_str(&piece.replacen(word, "if true", 1)),
            "endgeneration" => plain.push_str(&piece.replacen(word, "endif", 1)),
            _ => plain.push_str(piece),
        }
    }
    plain
}

/// A template of a stranger may ask for any number.
const INDENT_MAX: usize = 64;

/// Python's `json.dumps`, which unlike the engine's own filter escapes nothing for HTML.
fn to_json(value: Shown, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if let Some(spaces) = indent.filter(|&spaces| spaces > INDENT_MAX) {
        let message = format!("tojson indents by {INDENT_MAX} at most, not by {spaces}");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    }
    let json = match indent {
        Some(spaces) => written(
            &value,
            PrettyFormatter::with_indent(" ".repeat(spaces).as_bytes()),
        ),
        None => written(&value, OneLine),
    }?;
    if !ascii.unwrap_or(false) {
        return Ok(json);
    }
    let mut escaped = String::new();
    for c in json.chars() {
        match c.is_ascii() {
            true => escaped.push(c),
            false => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    escaped.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    Ok(escaped)
}

fn written(value: &Shown, formatter: impl Formatter) -> Result<String, minijinja::Error> {
    let mut json = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, formatter);
    let done = serde::Serialize::serialize(value, &mut serializer);
    done.map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(String::from_utf8(json).expect("JSON is UTF-8"))
}

/// One line of JSON with the spaces that Python leaves.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
    ) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(template: &str) -> Result<String> {
        let now = chrono::NaiveDate::from_ymd_opt(2026, 3, 7)
            .and_then(|day| day.and_hms_opt(14, 5, 9))
            .expect("a date");
        let variables =
            json!({"messages": [{"role": "user", "content": "a <b> \"é\" 😀"}], "tools": null});
        let chat = Jinja::new("model/chat_template.jinja", template, now)?;
        chat.render(&variables)
    }

    #[test]
    fn templates_in_the_manner_of_published_ones_render_as_in_transformers() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/fixtures/golden/generation.json"
        );
        let golden: serde_json::Value = crate::json::read(path.as_ref()).expect("golden JSON");
        for made in golden["templates"].as_array().expect("templates") {
            let template = made["template"].as_str().expect("a template");
            for case in made["cases"].as_array().expect("cases") {
                let variables = json!({"messages": case["messages"], "tools": case["tools"], "documents": null,
                    "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": true});
                let chat = Jinja::new("golden", template, NaiveDateTime::default());
                let rendered = chat.and_then(|chat| chat.render(&variables));
                match (rendered, case["refused"].as_str()) {
                    (Ok(rendered), None) => assert_eq!(rendered, case["rendered"], "{template}"),
                    (Err(error), Some(words)) => {
                        assert!(chain(&error).contains(words), "{}", chain(&error))
                    }
                    (Ok(rendered), Some(words)) => panic!("{rendered:?} where it refuses: {words}"),
                    (Err(error), None) => panic!("{} in {template}", chain(&error)),
                }
            }
        }
    }

    #[test]
    fn the_present_is_what_it_is_told() {
        let rendered = render("{{ strftime_now('%d %b %Y, %A %H:%M:%S') }}").expect("renders");
        assert_eq!(rendered, "07 Mar 2026, Saturday 14:05:09");
        let rendered = render("{{ strftime_now('%H%z%Z:%M') }}").expect("renders");
        assert_eq!(rendered, "14:05");
        for format in ["%Q", "%+", "%"] {
            let error = render(&format!("{{{{ strftime_now('{format}') }}}}"));
            let text = chain(&error.expect_err("no format"));
            assert!(text.contains(format), "{text}");
        }
    }

    #[test]
    fn what_a_template_refuses_is_its_own_words() {
        let error = render("{{ raise_exception('roles must alternate') }}").expect_err("refuses");
        assert!(error.to_string().contains("model/chat_template.jinja"));
        assert!(chain(&error).contains("roles must alternate"));
        let error =
            render("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}");
        assert!(chain(&error.expect_err("without end")).contains("fuel"));
        render("{% if %}").expect_err("no template");
        let error = render("{{ messages | tojson(indent=9999999999999999) }}");
        let text = chain(&error.expect_err("too wide"));
        assert!(text.contains("indent"), "{text}");
    }

    #[test]
    fn json_is_pythons() {
        for (template, wanted) in [
            (
                "{{ messages | tojson }}",
                r#"[{"role": "user", "content": "a <b> \"é\" 😀"}]"#,
            ),
            (
                "{{ messages[0].content | tojson(ensure_ascii=true) }}",
                r#""a <b> \"\u00e9\" \ud83d\ude00""#,
            ),
            (
                "{{ {'b': [1, 2.5, none], 'a': true} | tojson(indent=1) }}",
                "{\n \"b\": [\n  1,\n  2.5,\n  null\n ],\n \"a\": true\n}",
            ),
            (
                "{{ true }} {{ none }} {{ tools is none }}",
                "True None True",
            ),
        ] {
            assert_eq!(render(template).expect(template), wanted);
        }
    }

    #[test]
    fn tracked_blocks_are_blocks() {
        let template = "{% for m in messages %}\n  {%- generation -%}\n [{{ m.role }}]\n{% endgeneration %}\n{% endfor %}generation";
        assert_eq!(render(template).expect("renders"), "[user]\ngeneration");
    }

    fn chain(error: &Error) -> String {
        let source = std::error::Error::source(error).map(ToString::to_string);
        format!("{error}: {}", source.unwrap_or_default())
    }
}
