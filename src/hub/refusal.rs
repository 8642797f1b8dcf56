//! What a Hub's refusals mean, in the terms of our errors.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hf_hub::HFError;
use reqwest::StatusCode;
use reqwest::blocking::Response;
use reqwest::header::{HeaderMap, RETRY_AFTER};

use super::client::{Asked, DOWNLOAD, Hub, LIST, READ, Token, is_same_origin};
use crate::error::Error;

/// Of a refusal, so much is read for its message.
const ERROR_BYTES_MAX: u64 = 64 << 10;
/// A text that stands in messages for other reasons is no secret.
const SECRET_BYTES_MIN: usize = 6;
/// What the Hub says of a token that it does not know.
const BAD_TOKEN: &str = "Invalid credentials in Authorization header";

impl Hub {
    /// What a refusal means.
    pub(super) fn refusal(&self, what: &Asked, response: Response) -> Error {
        let status = response.status();
        let header = |name: &str| {
            let value = response.headers().get(name)?.to_str().ok()?;
            Some(value.to_string())
        };
        let (code, message) = (header("x-error-code"), header("x-error-message"));
        let wait = wait_asked(response.headers());
        let elsewhere = !self.is_ours(response.url().as_str());
        let detail = match message {
            Some(message) => self.without_token(message),
            None => self.shortened(self.token().as_ref(), response),
        };
        if elsewhere && matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Error::LinkRefused {
                action: what.action.into(),
                detail,
            };
        }
        self.meaning(what, status.as_u16(), code.as_deref(), detail, wait)
    }

    fn meaning(
        &self,
        what: &Asked,
        status: u16,
        code: Option<&str>,
        detail: String,
        wait: Option<Duration>,
    ) -> Error {
        let (repo, revision) = (what.repo.clone(), what.revision.clone());
        let endpoint = self.endpoint().to_string();
        match (status, code) {
            (_, Some("GatedRepo")) => Error::Gated { repo, endpoint },
            (_, Some("RepoNotFound")) => Error::RepoNotFound { repo, endpoint },
            (_, Some("RevisionNotFound")) => Error::RevisionNotFound { repo, revision },
            (_, Some("EntryNotFound")) => Error::EntryNotFound {
                repo,
                revision,
                file: what.file.clone(),
            },
            // to the anonymous, so is what is private or not there; of a bad token the Hub says this sentence (huggingface_hub)
            (401, None)
                if self.is_of_a_repo(&what.url)
                    && detail != BAD_TOKEN
                    // it has expired, or the like
                    && !detail.starts_with("User Access Token") =>
            {
                Error::RepoNotFound { repo, endpoint }
            }
            (401, _) => Error::Unauthorized { detail },
            (403, _) => Error::Forbidden {
                action: what.action.into(),
                writes: ![READ, LIST, DOWNLOAD].contains(&what.action),
                detail,
            },
            (412, _) => Error::BranchMoved {
                repo,
                branch: revision,
                detail,
            },
            (429, _) => Error::RateLimited {
                retry_after_s: wait.map_or(60, |w| w.as_secs()),
            },
            _ => Error::HubStatus {
                status,
                request: what.action.into(),
                detail,
            },
        }
    }

    /// A text from outside, which may repeat what was sent.
    pub(super) fn without_token(&self, text: String) -> String {
        match self.token() {
            Some(token) => without(&token, &text),
            None => text,
        }
    }

    /// The beginning of an answer's text, for messages, without a secret that was sent.
    pub(super) fn shortened(&self, secret: Option<&Token>, response: Response) -> String {
        let status = response.status();
        // of a page without end, the beginning too
        let (text, _) = self.beginning(response, ERROR_BYTES_MAX);
        let text = String::from_utf8_lossy(&text).into_owned();
        let text = match secret {
            Some(secret) => without(secret, &text),
            None => text,
        };
        let error = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|json| {
                let told = json["error_description"]
                    .as_str()
                    .or(json["error"].as_str());
                told.map(str::to_string)
            });
        let text = error.unwrap_or_else(|| text.trim().chars().take(200).collect());
        if text.is_empty() {
            status.to_string()
        } else {
            text
        }
    }

    /// Whether an address is below one repository's.
    fn is_of_a_repo(&self, url: &str) -> bool {
        let path = url.strip_prefix(self.endpoint());
        let kinds = ["/api/models/", "/api/datasets/"];
        path.is_some_and(|path| {
            kinds.iter().any(|kind| path.starts_with(kind)) || path.contains("/resolve/")
        })
    }

    /// What an error of hf-hub means that was asked to do something, in our terms. Its own texts hold URLs, never tokens.
    pub(super) fn understand(
        &self,
        error: HFError,
        action: &'static str,
        repo: &str,
        revision: &str,
    ) -> Error {
        let asked = |url: &str| Asked::of(action, url.into(), repo, revision);
        // the type of hf-hub's context cannot be named, its fields can
        macro_rules! told {
            ($context:expr, $wait:expr) => {{
                let context = $context;
                let detail = context
                    .server_message
                    .clone()
                    .unwrap_or_else(|| context.status.to_string());
                let detail = self.without_token(detail);
                let code = context.error_code.as_deref();
                let what = asked(&context.url);
                self.meaning(&what, context.status.as_u16(), code, detail, $wait)
            }};
        }
        match error {
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::Conflict { context } => told!(context, None),
            HFError::RateLimited {
                retry_after,
                context,
            } => told!(context, retry_after),
            HFError::RepoNotFound { context, .. } => match context {
                Some(context) if context.status == StatusCode::UNAUTHORIZED => {
                    told!(context, None)
                }
                _ => Error::RepoNotFound {
                    repo: repo.into(),
                    endpoint: self.endpoint().into(),
                },
            },
            HFError::RevisionNotFound { .. } => Error::RevisionNotFound {
                repo: repo.into(),
                revision: revision.into(),
            },
            HFError::EntryNotFound { path, .. } => Error::EntryNotFound {
                repo: repo.into(),
                revision: revision.into(),
                file: path,
            },
            // what it found instead may be what was sent
            HFError::Request { source, .. } if source.is_decode() => Error::HubStatus {
                status: 200,
                request: action.into(),
                detail: "its answer is not what was asked for".into(),
            },
            HFError::Request { source, .. } => unreachable(self.endpoint(), source),
            other => Error::HubStatus {
                status: 0,
                request: action.into(),
                detail: other.to_string(),
            },
        }
    }
}

/// Nobody answered, or not in the words of HTTP: the Hub at `endpoint`, or where its redirect led.
pub(super) fn unreachable(endpoint: &str, error: reqwest::Error) -> Error {
    let asked = error.url().map(|url| url.origin().ascii_serialization());
    let elsewhere = asked.filter(|asked| !is_same_origin(asked, endpoint));
    Error::HubUnreachable {
        endpoint: elsewhere.unwrap_or_else(|| endpoint.into()),
        // a URL may carry a signature
        source: Box::new(error.without_url()),
    }
}

/// `Retry-After` is seconds, or a date (RFC 9110, 10.2.3).
fn seconds_until(named: &str) -> Option<u64> {
    let named = named.trim();
    named.parse().ok().or_else(|| {
        let date = chrono::DateTime::parse_from_rfc2822(named).ok()?;
        let wait = date.signed_duration_since(chrono::Utc::now());
        // a part of a second is one
        Some(wait.num_milliseconds().max(0).unsigned_abs().div_ceil(1000))
    })
}

/// How long the Hub asks to wait: in `Retry-After`, or where a limit is used up, until its window ends:
/// `RateLimit: "api";r=0;t=55`.
pub(super) fn wait_asked(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let named = text(RETRY_AFTER.as_str()).and_then(seconds_until);
    let until_reset = || {
        let limits = text("ratelimit")?.split(',');
        let reset = |limit: &str| {
            let value = |name: &str| {
                let mut fields = limit
                    .split(';')
                    .filter_map(|field| field.trim().split_once('='));
                let (_, value) = fields.find(|(key, _)| key.trim() == name)?;
                value.trim().parse::<u64>().ok()
            };
            value("t").filter(|_| value("r") == Some(0))
        };
        limits.filter_map(reset).max()
    };
    named.or_else(until_reset).map(Duration::from_secs)
}

/// A text from outside in which a secret does not stand, as it is or in base64.
pub(super) fn without(secret: &Token, text: &str) -> String {
    let secret = secret.reveal();
    // what is shorter opens nothing, and may stand in any text
    if secret.len() < SECRET_BYTES_MIN {
        return text.into();
    }
    let text = text.replace(secret, "(the token)");
    text.replace(&STANDARD.encode(secret), "(the token)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_is_read_from_either_header() {
        let asked = |pairs: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.insert(*name, value.parse().expect("a value"));
            }
            wait_asked(&headers).map(|wait| wait.as_secs())
        };
        assert_eq!(asked(&[("retry-after", "7")]), Some(7));
        assert_eq!(asked(&[("ratelimit", "\"api\";r=0;t=55")]), Some(55));
        assert_eq!(
            asked(&[("ratelimit", "\"api\"; r=0; t=55, \"pages\"; r=0; t=80")]),
            Some(80)
        );
        assert_eq!(asked(&[("ratelimit", "\"api\";r=3;t=55")]), None);
        assert_eq!(
            asked(&[("retry-after", "7"), ("ratelimit", "\"api\";r=0;t=55")]),
            Some(7)
        );
        assert_eq!(asked(&[("retry-after", "soon")]), None);
        let past = asked(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]);
        assert_eq!(past, Some(0));
        let then = chrono::Utc::now() + chrono::TimeDelta::seconds(60);
        let then = then.format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let mut headers = HeaderMap::new();
        headers.insert("retry-after", then.parse().expect("a value"));
        let wait = wait_asked(&headers).expect("a wait").as_secs();
        assert!((58..=60).contains(&wait), "{wait}");
    }
}
