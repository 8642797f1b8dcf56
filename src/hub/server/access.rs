//! Who asks, and what they may do: tokens with their scopes, and the exchange of a job's identity for a short-lived one.

use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::header;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::reply::{Call, Refusal, Reply, refuse, text};
use super::repo::{RepoId, RepoKind};
use super::routes::{Hub, USER};
use crate::error::Error;
use crate::sum::hex;

/// A token, and what it opens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    pub token: String,
    pub scope: Scope,
}

/// What a token opens. Everybody reads what is public.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Reads everything.
    Read,
    /// Reads everything, and opens pull requests: what an account may do in a stranger's repository.
    Propose,
    /// Reads and writes everything.
    Write,
    /// Reads and writes this one repository, `owner/name` or `datasets/owner/name`.
    Repo(String),
}

impl FromStr for Grant {
    type Err = Error;

    /// `TOKEN` or `TOKEN=write`, `TOKEN=read`, `TOKEN=propose`, `TOKEN=owner/name`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let (token, scope) = text.split_once('=').unwrap_or((text, "write"));
        let scope = match scope {
            "write" => Scope::Write,
            "read" => Scope::Read,
            "propose" => Scope::Propose,
            repo if repo.contains('/') => Scope::Repo(repo.into()),
            other => {
                return Err(Error::Parse {
                    what: "the scope of a token",
                    value: other.into(),
                    reason: "expected write, read, propose or owner/name".into(),
                });
            }
        };
        Ok(Self {
            token: token.into(),
            scope,
        })
    }
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    Anonymous,
    /// An account without rights here: what is private or gated stays closed.
    Stranger,
    Holder(Scope),
}

impl Caller {
    pub fn is_anonymous(&self) -> bool {
        *self == Self::Anonymous
    }

    /// Whether what is private or gated in this repository is open.
    pub fn reads(&self, id: &RepoId) -> bool {
        match self {
            Self::Holder(Scope::Read | Scope::Propose | Scope::Write) => true,
            Self::Holder(Scope::Repo(repo)) => *repo == id.full_name(),
            _ => false,
        }
    }

    pub fn check_writes(&self, id: &RepoId) -> Result<(), Refusal> {
        match self {
            Self::Anonymous => refuse(401, "Invalid username or password."),
            Self::Holder(Scope::Write) => Ok(()),
            Self::Holder(Scope::Repo(repo)) if *repo == id.full_name() => Ok(()),
            Self::Holder(Scope::Repo(repo)) => refuse(
                403,
                format!("Forbidden: your token is for {repo} alone, not for {id}"),
            ),
            _ => refuse(403, "Forbidden: your token has no write permission"),
        }
    }

    /// Whether a change may be proposed, which lands when somebody else merges it.
    pub fn check_proposes(&self, id: &RepoId) -> Result<(), Refusal> {
        match self {
            Self::Holder(Scope::Propose) => Ok(()),
            _ => self.check_writes(id),
        }
    }
}

/// Reads who asks from the Authorization header.
pub fn caller(hub: &Hub, call: &Call) -> Result<Caller, Refusal> {
    let mut all = call.headers.get_all(header::AUTHORIZATION).iter();
    let Some(authorization) = all.next() else {
        return Ok(Caller::Anonymous);
    };
    if all.next().is_some() {
        return refuse(400, "Two Authorization headers");
    }
    let words = authorization.to_str().unwrap_or_default();
    let token = words.strip_prefix("Bearer ").unwrap_or_default();
    // The Python client reads this very sentence to tell a bad token from a missing repository.
    let invalid = || Refusal::new(401, "Invalid credentials in Authorization header");
    if let Some(ticket) = token.strip_prefix(SHORT_LIVED) {
        let claims = opened(hub, "access", ticket).ok_or_else(invalid)?;
        return Ok(Caller::Holder(match claims["repo"].as_str() {
            Some(repo) => Scope::Repo(repo.into()),
            None => Scope::Read,
        }));
    }
    if let Some(grant) = hub.grants.iter().find(|grant| grant.token == token) {
        return Ok(Caller::Holder(grant.scope.clone()));
    }
    match hub.grants.is_empty() {
        true if token.starts_with("hf_read") => Ok(Caller::Holder(Scope::Read)),
        true if token.starts_with("hf_") => Ok(Caller::Holder(Scope::Write)),
        false if token.starts_with("hf_read") => Ok(Caller::Stranger),
        _ => Err(invalid()),
    }
}

pub fn whoami(caller: &Caller) -> Result<Reply, Refusal> {
    let role = match caller {
        Caller::Anonymous => return refuse(401, "Invalid username or password."),
        Caller::Holder(Scope::Write) => "write",
        Caller::Holder(Scope::Repo(_)) => "fineGrained",
        _ => "read",
    };
    let since = "2026-01-01T00:00:00.000Z";
    let token = json!({"displayName": "token", "role": role, "createdAt": since});
    Ok(Reply::json(json!({
        "type": "user", "id": "1", "name": USER, "fullname": USER, "email": null,
        "isPro": false, "canPay": false, "periodEnd": null, "avatarUrl": "", "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    })))
}

/// How the tokens that an exchange gives begin.
const SHORT_LIVED: &str = "hf_jwt_";
/// Seconds that a job's identity holds.
const IDENTITY_SECONDS: u64 = 300;
const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ID_TOKEN: &str = "urn:ietf:params:oauth:token-type:id_token";
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";

/// The identity of a job, as the runners of a CI system hand it out: the stand-in for theirs.
///
/// Whoever holds a token that writes is a job here: `ACTIONS_ID_TOKEN_REQUEST_URL` is `<endpoint>/oidc/token?job=1`,
/// and `ACTIONS_ID_TOKEN_REQUEST_TOKEN` that token.
pub fn identity(hub: &Hub, call: &Call, caller: &Caller) -> Result<Reply, Refusal> {
    if *caller != Caller::Holder(Scope::Write) {
        return refuse(401, "This is no job");
    }
    let audience = call.parameter("audience").unwrap_or_default();
    let claims = json!({"aud": audience, "sub": "repo:local/job", "exp": now() + IDENTITY_SECONDS});
    Ok(Reply::json(
        json!({"value": sealed(hub, "identity", &claims)}),
    ))
}

/// RFC 8693: a job's identity for a token that opens one repository for a while, or reads what is gated.
pub fn exchange(hub: &Hub, call: &Call) -> Result<Reply, Refusal> {
    let asked = call.json()?;
    let invalid = |error: &str, why: &str| {
        let answer = json!({"error": error, "error_description": why});
        Err(Refusal(
            Reply::json(answer)
                .status(400)
                .header("x-error-message", why),
        ))
    };
    if asked["grant_type"] != EXCHANGE || asked["subject_token_type"] != ID_TOKEN {
        return invalid(
            "unsupported_grant_type",
            "Only id tokens are exchanged here",
        );
    }
    let Some(claims) = opened(hub, "identity", text(&asked, "subject_token")?) else {
        return invalid("invalid_grant", "The id token is not valid, or no longer");
    };
    if claims["aud"].as_str().map(|a| a.trim_end_matches('/')) != Some(&call.base) {
        return invalid("invalid_grant", "The id token is meant for somebody else");
    }
    let resource = text(&asked, "resource")?;
    let mut token = json!({"exp": now() + hub.login_seconds});
    if let Some((kind, name)) = named(resource) {
        let trusts =
            RepoId::new(kind, name.0, name.1).is_some_and(|id| hub.store.repo(&id).is_ok());
        if !trusts {
            return invalid("invalid_grant", "No repository there trusts this publisher");
        }
        token["repo"] = json!(resource);
    }
    let token = format!("{SHORT_LIVED}{}", sealed(hub, "access", &token));
    Ok(Reply::json(json!({
        "access_token": token, "token_type": "bearer", "expires_in": hub.login_seconds,
        "issued_token_type": ACCESS_TOKEN,
    })))
}

/// `owner/name` or `datasets/owner/name`; anything else is an account.
fn named(resource: &str) -> Option<(RepoKind, (&str, &str))> {
    let (kind, name) = match resource.strip_prefix("datasets/") {
        Some(name) => (RepoKind::Dataset, name),
        None => (RepoKind::Model, resource),
    };
    Some((kind, name.split_once('/')?))
}

/// Claims that nobody else can have written.
fn sealed(hub: &Hub, kind: &str, claims: &Value) -> String {
    let claims = BASE64URL.encode(claims.to_string());
    let seal = seal(hub, kind, &claims);
    format!("{claims}.{seal}")
}

/// The claims of a ticket of this Hub that still holds.
fn opened(hub: &Hub, kind: &str, ticket: &str) -> Option<Value> {
    let (claims, given) = ticket.split_once('.')?;
    if given != seal(hub, kind, claims) {
        return None;
    }
    let claims: Value = serde_json::from_slice(&BASE64URL.decode(claims).ok()?).ok()?;
    (claims["exp"].as_u64()? > now()).then_some(claims)
}

/// What nobody else can put under claims.
pub fn seal(hub: &Hub, kind: &str, claims: &str) -> String {
    // the secret at both ends: a digest of what begins with it could be continued
    let secret = &hub.secret;
    hex(&Sha256::digest(format!(
        "{secret} {kind} {claims} {secret}"
    )))
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_scope() {
        let scope = |text: &str| {
            text.parse::<Grant>()
                .map(|grant| (grant.token, grant.scope))
        };
        let token = "hf_a".to_string();
        assert_eq!(scope("hf_a").unwrap(), (token.clone(), Scope::Write));
        assert_eq!(scope("hf_a=read").unwrap(), (token.clone(), Scope::Read));
        let propose = scope("hf_a=propose").unwrap();
        assert_eq!(propose, (token.clone(), Scope::Propose));
        let repo = Scope::Repo("ada/engine".into());
        assert_eq!(scope("hf_a=ada/engine").unwrap(), (token, repo));
        assert!(scope("hf_a=all").is_err());
    }
}
