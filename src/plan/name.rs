//! What tensor names mean: the one place that reads it into them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A module name pattern: `*` stands for any run of characters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pattern(String);

impl FromStr for Pattern {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl Pattern {
    /// Whether the pattern matches the whole name, or a run of its dot-separated parts (`q_proj`, `layers.3`).
    pub fn matches(&self, name: &str) -> bool {
        let whole = if self.0.contains('*') {
            glob(&self.0, name)
        } else {
            self.0 == name
        };
        whole || format!(".{name}.").contains(&format!(".{}.", self.0))
    }
}

/// Whether a name is the pattern, in which `*` stands for any run of characters.
pub fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    // greedy with one step back: linear in practice, no recursion to blow up
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && pattern[p] == name[n] {
            p += 1;
            n += 1;
        } else if let Some((at, from)) = star {
            p = at + 1;
            n = from + 1;
            star = Some((at, from + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Linear,
    Head,
    Embedding,
    Norm,
    Bias,
    Other,
}

/// The role that a tensor's name tells.
pub fn role(tensor: &str) -> Role {
    let parts: Vec<&str> = tensor.rsplit('.').collect();
    match parts.as_slice() {
        ["bias", ..] => Role::Bias,
        ["weight", "lm_head" | "embed_out", ..] => Role::Head,
        ["weight", "embed_tokens" | "embed_in", ..] => Role::Embedding,
        ["weight", module, ..] if module.ends_with("_proj") => Role::Linear,
        [
            "weight",
            "query_key_value" | "dense" | "dense_h_to_4h" | "dense_4h_to_h",
            ..,
        ] => Role::Linear,
        ["weight", module, ..] if module.contains("norm") => Role::Norm,
        _ => Role::Other,
    }
}

/// Where a module stands: the number of its layer, if it is in one, and its part there (`q_proj`, `lm_head`).
pub fn place(module: &str) -> (Option<u32>, &str) {
    let layer = module.split('.').find_map(|part| part.parse().ok());
    let part = module.rsplit('.').next().unwrap_or(module);
    (layer, part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_names_and_parts() {
        let name = "model.layers.12.self_attn.q_proj";
        for yes in [
            "q_proj",
            "layers.12",
            "model.layers.*.q_proj",
            "*q_proj",
            "self_attn",
            name,
        ] {
            assert!(Pattern(yes.into()).matches(name), "{yes}");
        }
        for no in ["proj", "layers.1", "q_proj*x", "layers.*", "k_proj"] {
            assert!(!Pattern(no.into()).matches(name), "{no}");
        }
    }
}
