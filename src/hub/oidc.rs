//! Keyless login: a job of a CI system proves who it is, and gets a token that opens one repository for a while.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Asked, Hub, Token, segment};
use crate::error::{Error, Result};

/// Who a job is, and what it wants to open.
#[derive(Debug, Clone)]
pub struct Login {
    /// `org/name` or `datasets/org/name` to write there; the name of an account to read what is gated.
    pub resource: String,
    pub identity: Identity,
}

/// How a job proves who it is.
#[derive(Debug, Clone)]
pub enum Identity {
    /// An id token that the CI system made.
    Token(Token),
    /// The address that makes one, and what opens it.
    Runner { url: String, token: Token },
}

/// A token that was exchanged for an identity.
#[derive(Debug)]
pub struct Minted {
    token: Token,
    renew: Instant,
}

/// A token is renewed so long before it expires, or in the middle of its life if that is shorter.
const MARGIN: Duration = Duration::from_secs(300);

/// A day: what an answer claims beyond that is not relied on.
const LIFE_MAX_S: u64 = 24 * 3600;

impl Hub {
    /// The token to show to the Hub.
    pub(super) fn token(&self) -> Option<Token> {
        if self.options.login.is_none() {
            return self.options.token.clone();
        }
        let minted = self.minted();
        minted.as_ref().map(|minted| minted.token.clone())
    }

    /// Makes sure that a job has a token that holds.
    pub(super) fn sign_in(&self) -> Result<()> {
        let Some(login) = &self.options.login else {
            return Ok(());
        };
        let mut minted = self.minted();
        if minted.as_ref().is_some_and(|it| Instant::now() < it.renew) {
            return Ok(());
        }
        let identity = match &login.identity {
            Identity::Token(token) => token.clone(),
            Identity::Runner { url, token } => self.identity(url, token)?,
        };
        *minted = Some(self.exchange(&login.resource, &identity)?);
        Ok(())
    }

    /// Forgets the token of a login, if there is one: the next request signs in again.
    pub(super) fn forget_login(&self) -> bool {
        self.options.login.is_some() && self.minted().take().is_some()
    }

    fn minted(&self) -> std::sync::MutexGuard<'_, Option<Minted>> {
        // it is replaced whole: a panic elsewhere spoils nothing
        let lock = self.minted.lock();
        lock.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Asks the runner for an id token that is meant for this Hub.
    fn identity(&self, url: &str, token: &Token) -> Result<Token> {
        let and = if url.contains('?') { '&' } else { '?' };
        let url = format!("{url}{and}audience={}", segment(self.endpoint()));
        let what = Asked::of("ask for the job's identity", url, "", "");
        let request = self.foreign(Method::GET, &what.url, token);
        let response = request
            .send()
            .map_err(|e| super::refusal::unreachable("the runner's address", e))?;
        if !response.status().is_success() {
            return Err(Error::LoginRefused {
                endpoint: "the runner".into(),
                resource: self.resource(),
                detail: response.status().to_string(),
            });
        }
        let told: Value = self.json_without(Some(token), &what, response)?;
        match told["value"].as_str() {
            Some(value) => Ok(Token::new(value)),
            None => Err(Error::LoginRefused {
                endpoint: "the runner".into(),
                resource: self.resource(),
                detail: "its answer holds no token".into(),
            }),
        }
    }

    fn exchange(&self, resource: &str, identity: &Token) -> Result<Minted> {
        let url = format!("{}/oauth/token", self.endpoint());
        let what = Asked::of("exchange the job's identity for a token", url, "", "");
        let body = json!({
            "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
            "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
            "subject_token": identity.reveal(),
            "resource": resource,
        });
        let response = self
            .anonymous(Method::POST, &what.url)
            .json(&body)
            .send()
            .map_err(|e| super::refusal::unreachable(self.endpoint(), e))?;
        if !response.status().is_success() {
            let detail = self.shortened(Some(identity), response);
            return Err(Error::LoginRefused {
                endpoint: self.endpoint().into(),
                resource: resource.into(),
                detail,
            });
        }
        let told: Value = self.json_without(Some(identity), &what, response)?;
        let life = told["expires_in"].as_u64().unwrap_or(3600);
        let life = Duration::from_secs(life.min(LIFE_MAX_S));
        match told["access_token"].as_str() {
            Some(token) => Ok(Minted {
                token: Token::new(token),
                renew: Instant::now() + life - MARGIN.min(life / 2),
            }),
            None => Err(Error::LoginRefused {
                endpoint: self.endpoint().into(),
                resource: resource.into(),
                detail: "its answer holds no token".into(),
            }),
        }
    }

    fn resource(&self) -> String {
        let login = self.options.login.as_ref();
        login.map_or_else(String::new, |login| login.resource.clone())
    }
}
