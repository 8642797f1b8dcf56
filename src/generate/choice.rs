//! How the next token is chosen among all, and where a text ends.

use std::path::Path;

use serde_json::Value;

use crate::error::Result;
use crate::event::Observer;
use crate::json;
use crate::model::config::token_ids;
use crate::random::SplitMix;

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Whether tokens are drawn; else the most likely one is chosen.
    pub samples: bool,
    pub sampling: Sampling,
    /// Tokens that are there already: their logits are divided by it where positive, else multiplied (Keskar et al. 2019).
    pub repetition_penalty: f64,
    /// The tokens that end a text.
    pub ends: Vec<u32>,
}

/// A random choice, as transformers makes it: temperature, then the likeliest `top_k`, then the fewest that hold `top_p`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it.
    pub temperature: f64,
    /// The choice is among so many of the likeliest tokens; 0 lets all in.
    pub top_k: usize,
    /// The choice is among the fewest of the likeliest tokens that together have this probability.
    pub top_p: f64,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            // what transformers takes
            top_k: 50,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// Keys of `generation_config.json` that change what transformers chooses, and nothing here.
const UNHEEDED: [&str; 17] = [
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beams",
    "sequence_bias",
    "suppress_tokens",
    "typical_p",
];

impl Choice {
    /// What the `generation_config.json` of a model directory says, and `config.json` where that says nothing of the end.
    pub fn read(dir: &Path, observer: &dyn Observer) -> Result<Self> {
        let object = |name: &str| -> Result<Value> {
            let path = dir.join(name);
            match path.exists() {
                true => json::read(&path),
                false => Ok(Value::Null),
            }
        };
        let name = "generation_config.json";
        let config = object(name)?;
        let neutral = |key: &str| match (key, config[key].as_f64()) {
            (_, None) => config[key].is_null(),
            ("forced_bos_token_id" | "forced_eos_token_id", _) => false,
            ("min_length" | "min_new_tokens" | "no_repeat_ngram_size", Some(count)) => count == 0.0,
            (_, Some(x)) => x == 0.0 || x == 1.0,
        };
        for key in UNHEEDED.iter().filter(|key| !neutral(key)) {
            observer.warn(format!(
                "{name} asks for {key} = {}, which is not heeded here",
                config[*key]
            ));
        }
        let sensible = |key: &str| match (key, config[key].as_f64()) {
            (_, None) => config[key].is_null(),
            ("top_k", Some(_)) => config[key].is_u64(),
            ("top_p", Some(share)) => share > 0.0 && share <= 1.0,
            (_, Some(factor)) => factor > 0.0,
        };
        let numbers = ["temperature", "top_k", "top_p", "repetition_penalty"];
        for key in numbers.into_iter().filter(|key| !sensible(key)) {
            observer.warn(format!(
                "{name} says {key} = {}, which means nothing: what is usual is taken",
                config[key]
            ));
        }
        let positive = |key: &str| config[key].as_f64().filter(|x| *x > 0.0);
        let usual = Sampling::default();
        let sampling = Sampling {
            temperature: positive("temperature").unwrap_or(usual.temperature),
            top_k: match &config["top_k"] {
                Value::Null => usual.top_k,
                value => match value.as_u64() {
                    Some(count) => usize::try_from(count).unwrap_or(0),
                    None => usual.top_k,
                },
            },
            top_p: positive("top_p")
                .filter(|_| sensible("top_p"))
                .unwrap_or(usual.top_p),
            ..usual
        };
        let ends = match &config["eos_token_id"] {
            Value::Null => token_ids(&object("config.json")?["eos_token_id"]),
            ids => token_ids(ids),
        };
        Ok(Self {
            samples: config["do_sample"] == true,
            sampling,
            repetition_penalty: positive("repetition_penalty").unwrap_or(1.0),
            ends,
        })
    }

    /// The logits of the next token, with those of tokens that were `read` made less likely.
    pub fn penalise(&self, logits: &mut [f32], read: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        let mut seen = read.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit < 0.0 {
                *logit * penalty
            } else {
                *logit / penalty
            };
        }
    }
}

/// The token of the largest logit; of equals the first.
pub fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

impl Sampling {
    /// The tokens that may come next, likeliest first, with their probabilities, whose sum is 1.
    pub fn distribution(&self, logits: &[f32]) -> Vec<(u32, f64)> {
        let mut tokens: Vec<(u32, f64)> = (0..)
            .zip(logits)
            .map(|(id, &logit)| (id, f64::from(logit)))
            .collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
        if self.top_k > 0 && self.top_k < tokens.len() {
            // who has the same logit as the last is in too
            let last = tokens[self.top_k - 1].1;
            tokens.retain(|(_, logit)| *logit >= last);
        }
        let largest = tokens[0].1;
        for (_, x) in &mut tokens {
            // the difference first: a tiny temperature makes logits infinite, but not this one
            *x = ((*x - largest) / self.temperature).exp();
        }
        normalise(&mut tokens);
        let mut before = 0.0;
        tokens.retain(|(_, p)| {
            let kept = before == 0.0 || before < self.top_p;
            before += p;
            kept
        });
        normalise(&mut tokens);
        tokens
    }

    /// One token of the distribution.
    pub(super) fn draw(&self, logits: &[f32], random: &mut SplitMix) -> u32 {
        let tokens = self.distribution(logits);
        let mut left = random.uniform();
        for (id, p) in &tokens {
            left -= p;
            if left <= 0.0 {
                return *id;
            }
        }
        // a sum that rounding left below 1
        tokens[tokens.len() - 1].0
    }
}

fn normalise(tokens: &mut [(u32, f64)]) {
    let sum: f64 = tokens.iter().map(|(_, p)| p).sum();
    for (_, p) in tokens {
        *p /= sum;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::event::{Event, Silent};

    struct Heard(Mutex<Vec<String>>);

    impl Observer for Heard {
        fn event(&self, event: &Event<'_>) {
            if let Event::Warned { message } = event {
                self.0
                    .lock()
                    .expect("no test panicked")
                    .push(message.clone());
            }
        }
    }

    fn read(generation: Option<&str>, config: &str, observer: &dyn Observer) -> Choice {
        let dir = tempfile::tempdir().expect("temporary directory");
        if let Some(text) = generation {
            std::fs::write(dir.path().join("generation_config.json"), text).expect("writes");
        }
        std::fs::write(dir.path().join("config.json"), config).expect("writes");
        Choice::read(dir.path(), observer).expect("reads")
    }

    #[test]
    fn a_generation_config_says_how_and_where_to_end() {
        let config = r#"{"eos_token_id": 2}"#;
        let choice = read(None, config, &Silent);
        assert_eq!((choice.samples, choice.ends), (false, vec![2]));
        let choice = read(
            Some(r#"{"eos_token_id": [7, 9], "temperature": 0.6}"#),
            config,
            &Silent,
        );
        assert_eq!((choice.samples, choice.ends), (false, vec![7, 9]));
        let text =
            r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}"#;
        let choice = read(Some(text), config, &Silent);
        let sampling = choice.sampling;
        assert!(choice.samples);
        assert_eq!(
            (sampling.temperature, sampling.top_k, sampling.top_p),
            (0.6, 50, 0.9)
        );
        assert_eq!((choice.repetition_penalty, choice.ends), (1.1, vec![2]));
        let choice = read(Some(r#"{"do_sample": true, "top_k": 0}"#), config, &Silent);
        assert_eq!(choice.sampling.top_k, 0);
    }

    #[test]
    fn what_is_not_heeded_is_said() {
        let heard = Heard(Mutex::default());
        let text = r#"{"num_beams": 1, "min_p": 0.05, "suppress_tokens": [3], "typical_p": null}"#;
        read(Some(text), "{}", &heard);
        let heard = heard.0.into_inner().expect("no test panicked").join("; ");
        assert!(
            heard.contains("min_p = 0.05") && heard.contains("suppress_tokens = [3]"),
            "{heard}"
        );
        assert!(
            !heard.contains("num_beams") && !heard.contains("typical_p"),
            "{heard}"
        );
    }

    #[test]
    fn distributions_are_those_of_transformers() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/fixtures/golden/generation.json"
        );
        let golden: Value = json::read(path.as_ref()).expect("golden JSON");
        let golden = &golden["sampling"];
        let numbers = |value: &Value| -> Vec<f64> {
            let list = value.as_array().expect("a list");
            list.iter().map(|x| x.as_f64().expect("a number")).collect()
        };
        let logits: Vec<f32> = numbers(&golden["logits"])
            .iter()
            .map(|&x| x as f32)
            .collect();
        for case in golden["cases"].as_array().expect("cases") {
            let sampling = Sampling {
                temperature: case["temperature"].as_f64().expect("a temperature"),
                top_k: case["top_k"].as_u64().expect("a number") as usize,
                top_p: case["top_p"].as_f64().expect("a share"),
                seed: 0,
            };
            let mut found = sampling.distribution(&logits);
            let wanted = numbers(&case["ids"]).into_iter().map(|id| id as u32);
            let mut wanted: Vec<(u32, f64)> = wanted.zip(numbers(&case["p"])).collect();
            // equals come in any order
            found.sort_by_key(|(id, _)| *id);
            wanted.sort_by_key(|(id, _)| *id);
            let ids = |of: &[(u32, f64)]| of.iter().map(|(id, _)| *id).collect::<Vec<_>>();
            assert_eq!(ids(&found), ids(&wanted), "{sampling:?}");
            for ((id, p), (_, wanted)) in found.iter().zip(&wanted) {
                // its logits are divided and added up in f32
                assert!(
                    (p - wanted).abs() < 1e-6,
                    "{sampling:?}: {id} has {p}, not {wanted}"
                );
            }
        }
    }

    #[test]
    fn draws_follow_the_distribution_and_repeat_with_the_seed() {
        let logits = [0.3, 2.0, -1.0, 1.1, 0.9];
        let sampling = Sampling {
            temperature: 0.8,
            top_k: 4,
            top_p: 0.95,
            seed: 11,
        };
        let drawn = |n: usize| -> Vec<u32> {
            let mut random = SplitMix(sampling.seed);
            (0..n)
                .map(|_| sampling.draw(&logits, &mut random))
                .collect()
        };
        assert_eq!(drawn(50), drawn(50));
        let n = 20_000;
        let counted = drawn(n);
        let mut found = 0;
        for (id, p) in sampling.distribution(&logits) {
            let count = counted.iter().filter(|&&drawn| drawn == id).count();
            found += count;
            // five standard deviations of a binomial count
            let deviation = (n as f64 * p * (1.0 - p)).sqrt();
            assert!(
                (count as f64 - n as f64 * p).abs() < 5.0 * deviation,
                "{id}: {count} of {n}, {p}"
            );
        }
        assert_eq!(found, n);
    }

    #[test]
    fn extreme_temperatures_leave_a_distribution() {
        let logits = [0.3, 2.0, -1.0, 2.0];
        for (temperature, wanted) in [(1e-320, [0.0, 0.5, 0.0, 0.5]), (1e300, [0.25; 4])] {
            let sampling = Sampling {
                temperature,
                ..Sampling::default()
            };
            let mut found = [0.0; 4];
            for (id, p) in sampling.distribution(&logits) {
                found[id as usize] = p;
            }
            assert_eq!(found, wanted);
        }
    }

    #[test]
    fn of_equal_logits_the_first_is_chosen() {
        assert_eq!(likeliest(&[0.5, 1.5, 1.5, -3.0]), 1);
        assert_eq!(likeliest(&[-2.0, -3.0]), 0);
    }
}
