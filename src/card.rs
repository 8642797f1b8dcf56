//! The model card: facts of `report.json` in, Markdown with standard metadata out. Nothing is computed here.

use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::hub::PUBLIC_HUB;
use crate::kind::Kind;
use crate::sum::sha256_hex;
use crate::template::{self, Shown};

/// Begins a line in every card of ours. Behind it stands the sha256 of the card without that sum.
pub const MARK: &str = "<!-- rendered by svdhub from report.json, sha256 ";

/// One of these is in that line whichever of its bytes has changed.
const SIGNS: [&str; 2] = ["rendered by svdhub", "from report.json"];

/// Whose a card is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// As it was rendered.
    Rendered,
    /// Rendered once, and another since then.
    Changed,
    /// Somebody wrote it, or took the mark away to keep what they changed.
    Foreign,
}

/// Whether a card is ours, byte for byte.
pub fn state(text: &str) -> State {
    if !SIGNS.iter().any(|sign| text.contains(sign)) {
        return State::Foreign;
    }
    let sealed = sum_at(text).and_then(|at| {
        let (stated, rest) = text[at..].split_at_checked(64)?;
        Some(sha256_hex([&text[..at], rest].concat().as_bytes()) == stated)
    });
    match sealed {
        Some(true) => State::Rendered,
        _ => State::Changed,
    }
}

/// Where the sum stands in a card, or shall.
fn sum_at(text: &str) -> Option<usize> {
    let line = text.find(&format!("\n{MARK}"))?;
    Some(line + 1 + MARK.len())
}

const TEMPLATE: &str = include_str!("../templates/card.md");

/// The section that names the base: what was trained or merged may never have been decomposed.
pub fn origin(report: &Map<String, Value>) -> Option<&Value> {
    let sections = ["decompose", "merge", "train"].map(|section| report.get(section));
    let mut sections = sections.into_iter().flatten();
    sections.find(|facts| facts.get("base_card").is_some())
}

/// Renders the card of a directory that will be (or is) published as `repo`.
pub fn render(kind: Kind, repo: &str, report: &Map<String, Value>) -> Result<String> {
    let section = |name: &str| report.get(name).cloned().unwrap_or_default();
    let decompose = section("decompose");
    let train = section("train");
    let origin = origin(report).unwrap_or(&Value::Null);
    let base_card = &origin["base_card"];
    let base = &origin["base"];
    let base_text = match (base["repo"].as_str(), base["revision"].as_str()) {
        (Some(repo), Some(revision)) => format!("`{repo}` at commit `{revision}`"),
        _ => "a local model".into(),
    };
    let rank = &decompose["rank"];
    let value = &rank["value"];
    let rank_text = match rank["mode"].as_str() {
        Some("fraction") => format!("its min(m, n) · {value} largest singular triplets"),
        Some("energy") => {
            format!(
                "the fewest of its largest singular triplets that hold {value} of its energy Σσ²"
            )
        }
        Some("budget") => {
            let total = value.as_u64().map_or(value.to_string(), thousands);
            format!(
                "those of its singular triplets that are among the {total} largest of all weights"
            )
        }
        _ => format!("its {value} largest singular triplets"),
    };
    let decomposition = train["decomposition"].as_str();
    let decomposition_text = match (decomposition, train["decomposition_revision"].as_str()) {
        (Some(repo), Some(revision)) => format!("{repo}@{revision}"),
        (Some(repo), None) => repo.to_string(),
        (None, _) => "DECOMPOSITION".into(),
    };
    // the licence's own file lies with the base's other files, which an adapter does not carry
    let license_link = match (base_card["license_link"].as_str(), base["repo"].as_str()) {
        (Some(file), Some(repo))
            if !file.contains("://") && matches!(kind, Kind::Adapter | Kind::Lora) =>
        {
            let revision = base["revision"].as_str().unwrap_or("main");
            json!(format!("{PUBLIC_HUB}/{repo}/blob/{revision}/{file}"))
        }
        _ => base_card["license_link"].clone(),
    };
    // reports of older versions name no method
    let by_method = match train["method"].as_str() {
        Some("lora") => "by a LoRA",
        Some("lora-xs") => "by small matrices between its singular vectors (LoRA-XS)",
        Some("full") => "in all its linear weights",
        _ => "by its singular values",
    };
    let facts = json!({
        "by_method": by_method,
        "kind": kind.name(),
        "repo": repo,
        "title": repo.rsplit('/').next().unwrap_or(repo),
        "license": base_card["license"],
        "license_name": base_card["license_name"],
        "license_link": license_link,
        "language": base_card["language"],
        "pipeline_tag": base_card["pipeline_tag"].as_str().unwrap_or("text-generation"),
        "library_name": match kind {
            Kind::Model => "transformers",
            Kind::Lora => "peft",
            Kind::StateDict => "svd-training",
            Kind::Decomposition | Kind::Adapter => "svdhub",
        },
        "base_model": base["repo"],
        "base_revision": base["revision"],
        "relation": match kind {
            Kind::Model | Kind::StateDict => "finetune",
            Kind::Decomposition | Kind::Adapter | Kind::Lora => "adapter",
        },
        "base_text": base_text,
        "rank_text": rank_text,
        "decomposition_text": decomposition_text,
        "evaluations": shown_evaluations(kind, &section("evaluate")),
        "merge": non_null(section("merge"), kind == Kind::Model),
        "export": non_null(section("export"), matches!(kind, Kind::Lora | Kind::StateDict)),
        "train": non_null(train.clone(), kind != Kind::Decomposition),
        "tool": section("tool"),
        "decompose": non_null(decompose.clone(), true),
    });
    let mut card = template::page("card.md", TEMPLATE, &facts, |page| {
        page.add_filter("yaml", |value: Shown| {
            // JSON is YAML, and its quoting is beyond doubt
            serde_json::to_string(&value).unwrap_or_default()
        });
        page.add_filter("thousands", |n: u64| thousands(n));
        page.add_filter("bytes", |n: u64| bytes(n));
        page.add_filter("fixed", |x: f64, digits: usize| format!("{x:.digits$}"));
        // a file name must not end the table it stands in
        page.add_filter("cell", |text: String| {
            text.replace('|', "\\|").replace(['\n', '\r'], " ")
        });
    })?;
    let at = sum_at(&card).expect("the template has the mark in a line of its own");
    card.insert_str(at, &sha256_hex(card.as_bytes()));
    Ok(card)
}

fn non_null(value: Value, wanted: bool) -> Option<Value> {
    (wanted && !value.is_null()).then_some(value)
}

/// A decomposition is evaluated as the base it restores; what was trained later is not its matter.
fn shown_evaluations(kind: Kind, evaluations: &Value) -> Vec<Value> {
    let shown = evaluations.as_array().into_iter().flatten();
    let shown = shown.filter(|e| kind != Kind::Decomposition || e["subject"] == "base");
    let shown: Vec<&Value> = shown.collect();
    let named = |e: &&Value| {
        let mut named = Value::clone(e);
        // texts of one name are told apart
        let is_another = |other: &&Value| other["data_sha256"] != e["data_sha256"];
        let same_name = shown.iter().filter(|other| other["data"] == e["data"]);
        if let (Some(name), Some(sum)) = (e["data"].as_str(), e["data_sha256"].as_str())
            && same_name.copied().any(|other| is_another(&other))
        {
            named["data"] = format!("{name} (sha256 {:.8}…)", sum).into();
        }
        named
    };
    shown.iter().map(named).collect()
}

/// 1234567 → 1,234,567
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the unit a person would use (powers of 1000, as disks and the Hub count).
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else if value < 9.95 {
        format!("{value:.1} {}", UNITS[unit])
    } else {
        format!("{value:.0} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report() -> Map<String, Value> {
        let report = json!({
            "tool": {"name": "svdhub", "version": "0.1.0"},
            "decompose": {
                "base": {"repo": "org/base", "revision": "0123456789012345678901234567890123456789"},
                "base_card": {"license": "other", "license_name": "it's: \"odd\"", "license_link": "LICENSE", "language": ["en", "no"]},
                "rank": {"mode": "fraction", "value": 0.1}, "linear_layers": 42, "parameters": 1_220_224,
                "trainable": {"sigma": 432, "norms": 1664, "embeddings": 0}, "captured_energy": 0.5,
                "algorithm": {"tolerance": 1e-4}, "layout": "residual", "exceptions": 12
            },
            "train": {"trained": ["sigma"], "parameters": 432, "data": "a|b.txt", "data_tokens": 1000, "steps": 3, "batch": 4,
                "length": 256, "learning_rate": 0.05, "schedule": "linear", "weight_decay": 0.0, "seed": 0,
                "losses": [5.0, 4.0, 3.0], "tokens_per_s": 100.0, "device": "cpu", "adapter_bytes": 1728},
            "evaluate": [{"subject": "base", "data": "h.txt", "loss": 5.0, "perplexity": 148.4, "tokens": 9, "length": 256},
                {"subject": "merged", "data": "h.txt", "loss": 4.0, "perplexity": 54.6, "tokens": 9, "length": 256}],
            "merge": {"dtype": "base", "identical_to_base": false, "rounding_loss": 0.125, "unchanged_share": 0.3}
        });
        report.as_object().expect("an object").clone()
    }

    #[test]
    fn a_merged_models_card_says_what_it_is() {
        let card = render(Kind::Model, "me/tuned", &report()).expect("renders");
        for fact in [
            "base_model: \"org/base\"",
            "base_model_relation: finetune",
            "library_name: transformers",
            "license: \"other\"",
            "license_name: \"it's: \\\"odd\\\"\"",
            "language: [\"en\",\"no\"]",
            "432 of 1,220,224",
            "| merged | h.txt | 256 | 4.0000 |",
            "a\\|b.txt",
            "12.5 %",
            "0123456789012345678901234567890123456789",
        ] {
            assert!(card.contains(fact), "{fact} is missing from\n{card}");
        }
        assert!(card.starts_with("---\n"));
    }

    #[test]
    fn what_was_learnt_and_measured_of_answers_is_told() {
        let mut report = report();
        let card = render(Kind::Model, "me/tuned", &report).expect("renders");
        assert!(
            !card.contains("learnt") && !card.contains("each row"),
            "{card}"
        );
        report["train"]["learnt_tokens"] = 400.into();
        report["evaluate"][1]["loss_on"] = "answers".into();
        let card = render(Kind::Model, "me/tuned", &report).expect("renders");
        for fact in [
            "1,000 tokens, 400 of them learnt",
            "| base | h.txt | 256",
            "| merged | h.txt, its answers | 256",
            "each row is read by itself",
        ] {
            assert!(card.contains(fact), "{fact} is missing from\n{card}");
        }
    }

    #[test]
    fn a_card_tells_whether_it_was_changed_and_whose_it_is() {
        let card = render(Kind::Model, "me/tuned", &report()).expect("renders");
        assert_eq!(state(&card), State::Rendered);
        for at in 0..card.len() {
            let mut changed = card.clone().into_bytes();
            changed[at] ^= 1;
            assert_ne!(state(&String::from_utf8_lossy(&changed)), State::Rendered);
            assert_ne!(state(&String::from_utf8_lossy(&changed)), State::Foreign);
        }
        let own: String = card
            .lines()
            .filter(|line| !line.starts_with(MARK))
            .collect();
        assert_eq!(state(&own), State::Foreign);
        assert_eq!(state("# A model of mine"), State::Foreign);
    }

    #[test]
    fn an_exports_card_names_the_program_that_loads_it() {
        let mut report = report();
        report.insert(
            "export".into(),
            json!({"to": "peft-lora", "rank": 8, "kept": 300, "trained": 1432, "predicted_error": 0.4277, "measured_error": 0.42771,
                "modules": {"a": {}, "b": {}}, "modules_to_save": ["model.norm"]}),
        );
        let card = render(Kind::Lora, "me/lora", &report).expect("renders");
        for fact in [
            "library_name: peft",
            "base_model_relation: adapter",
            "PeftModel.from_pretrained(base, \"me/lora\")",
            "from_pretrained(\"org/base\", revision=\"0123456789012345678901234567890123456789\")",
            "300 of 1,432 in 2 weights",
            "0.42770 foretold, 0.42771 measured",
            "| norms | 1, whole",
        ] {
            assert!(card.contains(fact), "{fact} is missing from\n{card}");
        }
        report["export"] = json!({"to": "svd-training", "rank_fraction": 0.1, "triplets": 9, "zeros": 0, "whole": []});
        let card = render(Kind::StateDict, "me/state", &report).expect("renders");
        for fact in ["library_name: svd-training", "rank_fraction=0.1"] {
            assert!(card.contains(fact), "{fact} is missing from\n{card}");
        }
        assert!(
            !card.contains("AutoModelForCausalLM.from_pretrained"),
            "{card}"
        );
    }

    #[test]
    fn a_card_tells_what_moved_by_which_method() {
        for (kind, method, words) in [
            (Kind::Adapter, "lora-xs", "fine-tuned by small matrices"),
            (Kind::Model, "full", "fine-tuned in all its linear weights"),
            (Kind::Lora, "lora", "fine-tuned by a LoRA of rank 16."),
        ] {
            let mut report = report();
            report["train"]["method"] = method.into();
            report["train"]["rank"] = 16.into();
            report["train"]["alpha"] = 32.into();
            let card = render(kind, "me/tuned", &report).expect("renders");
            let link = match kind {
                Kind::Model => "license_link: \"LICENSE\"",
                _ => "blob/0123456789012345678901234567890123456789/LICENSE\"",
            };
            for words in [words, link, "| method | sigma, rank 16, α 32 |"] {
                assert!(card.contains(words), "{words} is missing from\n{card}");
            }
            assert!(!card.contains("## Export"), "{card}");
        }
    }

    #[test]
    fn the_card_of_a_lora_on_a_plain_model_names_that_model() {
        let mut report = report();
        let mut decompose = report.remove("decompose").expect("is there");
        for key in ["base", "base_card"] {
            report["train"][key] = decompose[key].take();
        }
        report["train"]["method"] = "lora".into();
        let card = render(Kind::Lora, "me/lora", &report).expect("renders");
        for fact in [
            "base_model: \"org/base\"",
            "license: \"other\"",
            "| numbers moved | 432 |",
        ] {
            assert!(card.contains(fact), "{fact} is missing from\n{card}");
        }
        assert!(!card.contains("## Decomposition"), "{card}");
    }

    #[test]
    fn the_card_of_a_model_with_a_lora_names_what_it_was_merged_into() {
        let mut report = report();
        let mut decompose = report.remove("decompose").expect("is there");
        report["train"]["base"] = json!({"repo": "org/another"});
        report["train"]["base_card"] = json!({"license": "mit"});
        for key in ["base", "base_card"] {
            report["merge"][key] = decompose[key].take();
        }
        report["train"]["method"] = "lora".into();
        let card = render(Kind::Model, "me/tuned", &report).expect("renders");
        for fact in [
            "base_model: \"org/base\"",
            "license: \"other\"",
            "by a LoRA",
        ] {
            assert!(card.contains(fact), "{fact} is missing from\n{card}");
        }
        for not in ["org/another", "singular-values", "## Decomposition"] {
            assert!(!card.contains(not), "{not} is in\n{card}");
        }
    }

    #[test]
    fn the_card_of_a_mixture_tells_its_factors() {
        let mut report = report();
        report.remove("train");
        report["merge"]["adapters"] = json!([["aa", 0.7], ["bb", -0.5]]);
        let card = render(Kind::Model, "me/mix", &report).expect("renders");
        let words = "with 2 adapters, times 0.7, -0.5. An ordinary model";
        assert!(card.contains(words), "{card}");
    }

    #[test]
    fn a_decompositions_card_tells_nothing_of_training() {
        let card = render(Kind::Decomposition, "me/svd", &report()).expect("renders");
        assert!(!card.contains("## Training") && !card.contains("| merged |"));
        assert!(card.contains("svdhub train me/svd") && card.contains("library_name: svdhub"));
    }

    #[test]
    fn a_card_tells_how_the_rank_was_chosen_and_whether_the_head_was_untied() {
        for (rank, words) in [
            (
                json!({"mode": "fraction", "value": 0.1}),
                "with its min(m, n) · 0.1 largest",
            ),
            (json!({"mode": "fixed", "value": 8}), "with its 8 largest"),
            (
                json!({"mode": "energy", "value": 0.9}),
                "that hold 0.9 of its energy",
            ),
            (
                json!({"mode": "budget", "value": 40_000}),
                "among the 40,000 largest of all weights",
            ),
        ] {
            let mut report = report();
            report["decompose"]["rank"] = rank;
            let card = render(Kind::Decomposition, "me/svd", &report).expect("renders");
            assert!(card.contains(words), "{words} is missing from\n{card}");
            assert!(!card.contains("untied"));
        }
        let mut report = report();
        report["decompose"]["untied_head"] = true.into();
        report["merge"]["tensors_identical_to_base"] = true.into();
        let card = render(Kind::Model, "me/same", &report).expect("renders");
        for words in [
            "| head | untied from the embedding",
            "Every tensor of the base is here byte for byte",
        ] {
            assert!(card.contains(words), "{words} is missing from\n{card}");
        }
        assert!(!card.contains("Rounding error"));
    }

    #[test]
    fn sizes_read_naturally() {
        assert_eq!(
            [
                bytes(999),
                bytes(1000),
                bytes(5_000_000_000),
                bytes(12_345_678)
            ],
            ["999 B", "1.0 kB", "5.0 GB", "12 MB"]
        );
        assert_eq!(
            [thousands(1), thousands(1000), thousands(98_500_608)],
            ["1", "1,000", "98,500,608"]
        );
    }
}
