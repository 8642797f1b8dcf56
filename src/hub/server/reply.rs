//! A request and a reply without a network: addresses taken apart, ranges, entity tags, error headers.

use std::ops::Range;
use std::path::PathBuf;

use axum::body::Bytes;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, Method, header};
use serde_json::{Value, json};

use super::repo::Refused;

/// A request whose body, if it matters here, is small enough to be in memory.
pub struct Call {
    /// `HEAD` has become `GET`: the body is left out on the way.
    pub method: Method,
    /// The path between slashes, percent-decoded after it was split.
    pub segments: Vec<String>,
    /// The path as it came, to point to the next page of the same list.
    path: String,
    parameters: Vec<(String, String)>,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// The origin under which the client reached us.
    pub base: String,
}

/// A reply; its headers do not yet say the length.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub content: Content,
}

#[derive(Debug)]
pub enum Content {
    Bytes(Vec<u8>),
    /// Part of a file, to be sent in pieces.
    File(PathBuf, Range<u64>),
}

impl Content {
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, range) => range.end - range.start,
        }
    }
}

/// A reply that ends the work early: an error as the public Hub words it.
#[derive(Debug)]
pub struct Refusal(pub Reply);

impl Call {
    pub fn new(parts: &Parts, body: Bytes, endpoint: &str) -> Call {
        let (headers, path) = (parts.headers.clone(), parts.uri.path().to_owned());
        let parts_of_path = path.split('/').filter(|part| !part.is_empty());
        let host = header_text(&headers, header::HOST);
        let base = host.map_or_else(|| endpoint.to_owned(), |host| format!("http://{host}"));
        let method = match parts.method {
            Method::HEAD => Method::GET,
            ref method => method.clone(),
        };
        Call {
            method,
            segments: parts_of_path.map(decode).collect(),
            path,
            parameters: pairs(parts.uri.query().unwrap_or_default()),
            headers,
            body,
            base,
        }
    }

    pub fn json(&self) -> Result<Value, Refusal> {
        if self.body.is_empty() {
            return Ok(json!({}));
        }
        let invalid = |error| Refusal::new(400, format!("Invalid body: {error}"));
        serde_json::from_slice(&self.body).map_err(invalid)
    }

    /// The list `paths` of the body: hf-hub sends JSON, the Python client a form.
    pub fn paths(&self) -> Result<Vec<String>, Refusal> {
        let kind = header_text(&self.headers, header::CONTENT_TYPE).unwrap_or_default();
        if kind.starts_with("application/json") {
            let body = self.json()?;
            let paths = list(&body, "paths")?.iter().filter_map(Value::as_str);
            return Ok(paths.map(str::to_owned).collect());
        }
        let form = pairs(&String::from_utf8_lossy(&self.body));
        let paths = form.into_iter().filter(|(key, _)| key == "paths");
        Ok(paths.map(|(_, path)| path).collect())
    }

    pub fn parameter(&self, name: &str) -> Option<&str> {
        let mut pairs = self.parameters.iter();
        pairs
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn flag(&self, name: &str) -> bool {
        matches!(self.parameter(name), Some("1" | "true" | "True"))
    }

    /// Entries per page.
    pub fn limit(&self, most: usize) -> usize {
        let limit = self.parameter("limit").and_then(|limit| limit.parse().ok());
        limit.unwrap_or(most).clamp(1, most)
    }

    /// The `Link` header to this list with one parameter replaced.
    pub fn next_page(&self, name: &str, value: &str) -> String {
        let mut query = String::new();
        for (key, value) in self.parameters.iter().filter(|(key, _)| key != name) {
            query += &format!("{}={}&", encode(key), encode(value));
        }
        let (base, path, value) = (&self.base, &self.path, encode(value));
        format!("<{base}{path}?{query}{name}={value}>; rel=\"next\"")
    }

    /// Whether the client has the content with this entity tag already.
    pub fn knows(&self, etag: &str) -> bool {
        let known = header_text(&self.headers, header::IF_NONE_MATCH).unwrap_or_default();
        known
            .split(',')
            .any(|tag| tag.trim().trim_start_matches("W/").trim_matches('"') == etag)
    }
}

impl Reply {
    pub fn json(value: Value) -> Reply {
        Reply {
            status: 200,
            headers: vec![("content-type", "application/json; charset=utf-8".to_owned())],
            content: Content::Bytes(value.to_string().into_bytes()),
        }
    }

    pub fn text(text: String) -> Reply {
        Reply {
            status: 200,
            headers: vec![("content-type", "text/plain; charset=utf-8".to_owned())],
            content: Content::Bytes(text.into_bytes()),
        }
    }

    /// The answer to a change about which there is nothing to say.
    pub fn done() -> Reply {
        Reply::json(json!({}))
    }

    pub fn empty(status: u16) -> Reply {
        Reply {
            status,
            headers: Vec::new(),
            content: Content::Bytes(Vec::new()),
        }
    }

    /// A file, or the part of it that was asked for, or 304 if the client has it.
    pub fn file(path: PathBuf, size: u64, etag: &str, call: &Call) -> Reply {
        let tag = format!("\"{etag}\"");
        if call.knows(etag) {
            return Reply::empty(304).header("etag", tag);
        }
        let range = header_text(&call.headers, header::RANGE).and_then(|range| part(range, size));
        let mut reply = Reply::empty(200)
            .header("etag", tag)
            .header("accept-ranges", "bytes")
            .header("content-type", "application/octet-stream");
        if let Some(part) = &range {
            if part.is_empty() {
                return Reply::empty(416).header("content-range", format!("bytes */{size}"));
            }
            let (first, last) = (part.start, part.end - 1);
            let said = format!("bytes {first}-{last}/{size}");
            reply = reply.status(206).header("content-range", said);
        }
        reply.content = Content::File(path, range.unwrap_or(0..size));
        reply
    }

    pub fn status(mut self, status: u16) -> Reply {
        self.status = status;
        self
    }

    /// Sets a header; one of the same name is replaced.
    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Reply {
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value.into()));
        self
    }

    pub fn bytes(&self) -> u64 {
        match &self.content {
            Content::Bytes(content) => content.len() as u64,
            Content::File(_, part) => part.end - part.start,
        }
    }
}

impl Refusal {
    pub fn new(status: u16, message: impl Into<String>) -> Refusal {
        let message = message.into();
        let reply = Reply::json(json!({"error": message})).status(status);
        // A header is one line.
        let line = message.replace(char::is_control, " ");
        Refusal(reply.header("x-error-message", line))
    }

    /// The word by which clients choose their error type.
    pub fn code(self, code: &str) -> Refusal {
        Refusal(self.0.header("x-error-code", code))
    }

    /// The commit in which something was not found.
    pub fn commit(self, id: &str) -> Refusal {
        Refusal(self.0.header("x-repo-commit", id))
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Refusal {
        let refusal = |status| Refusal::new(status, refused.to_string());
        match &refused {
            Refused::NoRepo => refusal(404).code("RepoNotFound"),
            Refused::NoRevision(_) => refusal(404).code("RevisionNotFound"),
            Refused::NoFile(_) => refusal(404).code("EntryNotFound"),
            Refused::RepoExists(_) | Refused::RefExists(_) => refusal(409),
            Refused::Stale => refusal(412),
            Refused::Lost(_) => refusal(500),
            Refused::Disk(error) => Refusal::new(500, format!("{refused}: {error}")),
            Refused::Cas(error) => Refusal::new(500, format!("{refused}: {error}")),
            _ => refusal(400),
        }
    }
}

pub fn refuse<T>(status: u16, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal::new(status, message))
}

/// A text that a body must have.
pub fn text<'a>(body: &'a Value, key: &str) -> Result<&'a str, Refusal> {
    let missing = || Refusal::new(400, format!("`{key}` must be a string"));
    body[key].as_str().ok_or_else(missing)
}

/// A list that a body must have.
pub fn list<'a>(body: &'a Value, key: &str) -> Result<&'a [Value], Refusal> {
    let missing = || Refusal::new(400, format!("`{key}` must be a list"));
    body[key].as_array().map(Vec::as_slice).ok_or_else(missing)
}

pub fn header_text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// The bytes of one range, none if it lies outside the file.
///
/// `None` for anything else, which is answered with the whole file, as the standard allows.
fn part(range: &str, size: u64) -> Option<Range<u64>> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    if first.is_empty() {
        let bytes: u64 = last.parse().ok()?;
        return Some(size.saturating_sub(bytes)..size);
    }
    let first: u64 = first.parse().ok()?;
    let last = match last {
        "" => u64::MAX,
        last => last.parse().ok()?,
    };
    (first <= last).then(|| first.min(size)..last.saturating_add(1).min(size))
}

fn pairs(text: &str) -> Vec<(String, String)> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let text = |part: &str| decode(&part.replace('+', " "));
        (text(key), text(value))
    };
    let pieces = text.split('&').filter(|piece| !piece.is_empty());
    pieces.map(pair).collect()
}

fn decode(text: &str) -> String {
    let mut pieces = text.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let digits = piece.get(..2).map(|digits| u8::from_str_radix(digits, 16));
        let (byte, rest) = match digits {
            Some(Ok(byte)) => (byte, &piece[2..]),
            _ => (b'%', piece),
        };
        bytes.push(byte);
        bytes.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

pub fn encode(text: &str) -> String {
    let byte = |byte: u8| match char::from(byte) {
        plain if plain.is_ascii_alphanumeric() || "-_.~".contains(plain) => plain.to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_the_file() {
        let cases = [
            ("bytes=0-9", Some(0..10)),
            ("bytes=90-", Some(90..100)),
            ("bytes=95-200", Some(95..100)),
            ("bytes=-7", Some(93..100)),
            ("bytes=-700", Some(0..100)),
            ("bytes=99-99", Some(99..100)),
            ("bytes=100-", Some(100..100)),
            ("bytes=-0", Some(100..100)),
            ("bytes=9-3", None),
            ("bytes=0-1,5-6", None),
            ("lines=1-2", None),
        ];
        for (range, expected) in cases {
            assert_eq!(part(range, 100), expected, "{range}");
        }
        assert_eq!(part("bytes=0-", 0), Some(0..0));
    }

    #[test]
    fn percent_codes_are_undone_after_the_path_is_split() {
        assert_eq!(decode("refs%2Fpr%2F1"), "refs/pr/1");
        assert_eq!(decode("100%"), "100%");
        assert_eq!(decode("%e4%B8%ad"), "中");
        assert_eq!(decode(&encode("a b/ü&=")), "a b/ü&=");
        assert_eq!(
            pairs("paths=a+b&paths=%2Fc&x"),
            [("paths", "a b"), ("paths", "/c"), ("x", "")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
    }
}
