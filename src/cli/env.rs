//! The environment, read in one place: the variables mean what they mean to Python's huggingface_hub.

use std::path::PathBuf;

use svdhub::hub::{HubOptions, Token};

const PUBLIC_HUB: &str = "https://huggingface.co";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn flag(name: &str) -> bool {
    variable(name).is_some_and(|value| {
        matches!(
            value.to_ascii_uppercase().as_str(),
            "1" | "ON" | "YES" | "TRUE"
        )
    })
}

/// `$HF_HOME`, or the usual place.
fn home() -> PathBuf {
    let cache = || match variable("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(variable("HOME").unwrap_or_else(|| ".".into())).join(".cache"),
    };
    variable("HF_HOME").map_or_else(|| cache().join("huggingface"), PathBuf::from)
}

fn token() -> Option<Token> {
    let file = variable("HF_TOKEN_PATH").map_or_else(|| home().join("token"), PathBuf::from);
    let text = variable("HF_TOKEN").or_else(|| std::fs::read_to_string(file).ok())?;
    let text = text.trim();
    (!text.is_empty()).then(|| Token::new(text))
}

/// Which Hub to talk to, as whom, and where its files are kept. A flag wins over the environment.
pub fn hub_options(endpoint: Option<&str>) -> HubOptions {
    let endpoint = endpoint
        .map(str::to_string)
        .or_else(|| variable("HF_ENDPOINT"))
        .unwrap_or_else(|| PUBLIC_HUB.into());
    HubOptions {
        endpoint,
        token: token(),
        cache: variable("HF_HUB_CACHE").map_or_else(|| home().join("hub"), PathBuf::from),
        offline: flag("HF_HUB_OFFLINE"),
    }
}

/// Logs for debugging, where `SVDHUB_LOG` asks for them.
pub fn start_logging() {
    if let Some(filter) = variable("SVDHUB_LOG") {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
    }
}
