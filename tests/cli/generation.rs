//! A prompt goes in, text comes out: as from transformers, by a chat template, with adapters, and with clear refusals.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use svdhub::weights::Dtype;

use crate::world::{World, arg, fixture, json_file};

fn golden() -> Value {
    json_file(&fixture("golden/generation.json"))
}

/// A copy of the fixture model whose JSON files are changed.
fn changed(world: &World, name: &str, changes: &[(&str, Value)]) -> PathBuf {
    let dir = world.model(name, Dtype::BF16, u64::MAX);
    let source = fixture("shakespeare-1m");
    std::fs::copy(
        source.join("generation_config.json"),
        dir.join("generation_config.json"),
    )
    .expect("copies");
    for (file, more) in changes {
        let path = dir.join(file);
        let mut value = json_file(&path);
        for (key, new) in more.as_object().expect("an object") {
            value[key] = new.clone();
        }
        std::fs::write(&path, value.to_string()).expect("writes");
    }
    dir
}

fn max_tokens(made: &Value) -> String {
    made["tokens_max"].to_string()
}

#[test]
fn greedy_text_is_that_of_transformers() {
    let world = World::new();
    for made in golden()["greedy"].as_array().expect("prompts") {
        let penalty = json!({"repetition_penalty": made["repetition_penalty"]});
        let model = changed(&world, "model", &[("generation_config.json", penalty)]);
        let prompt = made["prompt"].as_str().expect("a prompt");
        let tokens = max_tokens(made);
        let arguments = ["generate", arg(&model), prompt, "--max-tokens", &tokens];
        let facts = world.json(&arguments);
        for key in ["prompt", "prompt_tokens", "ids", "text"] {
            assert_eq!(facts[key], made[key], "{key}");
        }
        assert_eq!(facts["tokens"], made["tokens_max"]);
        assert_eq!(facts["stop"], "tokens");
        assert!(facts["tokens_per_s"].as_f64() > Some(0.0));
        let run = world.run(&arguments).succeeds();
        assert_eq!(
            run.stdout,
            format!("{}\n", made["text"].as_str().expect("a text"))
        );
        assert!(
            run.stderr.contains("as many as were asked for"),
            "{}",
            run.stderr
        );
    }
}

#[test]
fn a_chat_template_is_applied_where_there_is_one() {
    let world = World::new();
    let golden = golden();
    let made = &golden["chat"];
    let template = json!({"chat_template": made["template"]});
    let chatty = changed(&world, "chatty", &[("tokenizer_config.json", template)]);
    let plain = changed(&world, "plain", &[]);
    let (prompt, tokens) = (made["prompt"].as_str().expect("a prompt"), max_tokens(made));
    let generate = |model: &Path, more: &[&str]| {
        world.json(
            &[
                &["generate", arg(model), prompt, "--max-tokens", &tokens],
                more,
            ]
            .concat(),
        )
    };
    for more in [&[][..], &["--chat"], &["--no-chat", "--chat"]] {
        let facts = generate(&chatty, more);
        for key in ["prompt", "prompt_tokens", "ids", "text"] {
            assert_eq!(facts[key], made[key], "{key}");
        }
    }
    let unchatty = generate(&chatty, &["--no-chat"]);
    assert_ne!(unchatty["ids"], made["ids"]);
    assert_eq!(unchatty["ids"], generate(&plain, &[])["ids"]);
    world
        .run(&["generate", arg(&plain), prompt, "--chat"])
        .refuses(&["has no chat template", "leave out --chat"]);
    let strict = json!({"chat_template": "{{ raise_exception('only in verse') }}"});
    let strict = changed(&world, "strict", &[("tokenizer_config.json", strict)]);
    world
        .run(&["generate", arg(&strict), prompt])
        .refuses(&["tokenizer_config.json", "only in verse"]);
}

#[test]
fn a_text_ends_where_the_model_ends_it_or_reaches_no_further() {
    let world = World::new();
    let golden = golden();
    let made = &golden["greedy"][0];
    let prompt = made["prompt"].as_str().expect("a prompt");
    // one of several ends, and not the first
    let end = json!({"eos_token_id": [1000, made["ids"][9]]});
    let first = made["ids"]
        .as_array()
        .expect("ids")
        .iter()
        .position(|id| *id == made["ids"][9]);
    let model = changed(&world, "model", &[("generation_config.json", end)]);
    let facts = world.json(&["generate", arg(&model), prompt]);
    assert_eq!(facts["stop"], "end");
    assert_eq!(facts["tokens"].as_u64(), first.map(|at| at as u64 + 1));

    let narrow = json!({"max_position_embeddings": 24});
    let narrow = changed(&world, "narrow", &[("config.json", narrow)]);
    let run = world.run(&["generate", arg(&narrow), prompt]).succeeds();
    assert!(
        run.stderr.contains("warning: the text stops at 24 tokens"),
        "{}",
        run.stderr
    );
    let facts = world.json(&["generate", arg(&narrow), prompt]);
    assert_eq!(facts["stop"], "positions");
    let tokens = facts["tokens"]
        .as_u64()
        .zip(facts["prompt_tokens"].as_u64());
    assert_eq!(tokens.map(|(new, read)| new + read), Some(24));
}

#[test]
fn prompts_that_are_empty_or_too_long_are_refused() {
    let world = World::new();
    let model = fixture("shakespeare-1m");
    world
        .run(&["generate", arg(&model), ""])
        .refuses(&["the prompt is empty", "give some text"]);
    let long = "the king ".repeat(300);
    world.run(&["generate", arg(&model), &long]).refuses(&[
        "the prompt has",
        "reaches 256 positions",
        "give a shorter prompt",
    ]);
}

#[test]
fn a_random_choice_repeats_with_its_seed() {
    let world = World::new();
    let model = fixture("shakespeare-1m");
    let text = |more: &[&str]| {
        let facts = world.json(
            &[
                &["generate", arg(&model), "Speak,", "--max-tokens", "30"],
                more,
            ]
            .concat(),
        );
        facts["text"].as_str().expect("a text").to_string()
    };
    let greedy = text(&["--greedy"]);
    assert_eq!(text(&[]), greedy);
    let first = text(&["--temperature", "1.2", "--seed", "1"]);
    assert_eq!(text(&["--temperature", "1.2", "--seed", "1"]), first);
    assert_ne!(text(&["--temperature", "1.2", "--seed", "2"]), first);
    assert_ne!(first, greedy);
    // among one token there is no choice
    assert_eq!(text(&["--top-k", "1"]), greedy);
    assert_eq!(text(&["--top-p", "1e-9", "--seed", "5"]), greedy);
    // the model's own wish, which --greedy overrules
    let wish = json!({"do_sample": true, "temperature": 1.2});
    let wishful = changed(&world, "wishful", &[("generation_config.json", wish)]);
    let facts = |more: &[&str]| {
        world.json(
            &[
                &["generate", arg(&wishful), "Speak,", "--max-tokens", "30"],
                more,
            ]
            .concat(),
        )
    };
    assert_eq!(facts(&["--seed", "1"])["text"], first);
    assert_eq!(facts(&["--greedy"])["text"], greedy);
    // who asks for a draw where the model does not still draws by its temperature
    let reserved = json!({"do_sample": false, "temperature": 1.2, "top_k": 7});
    let reserved = changed(&world, "reserved", &[("generation_config.json", reserved)]);
    let both = ["--temperature", "1.2", "--top-k", "7", "--seed", "4"];
    let drawn = [
        "generate",
        arg(&reserved),
        "Speak,",
        "--max-tokens",
        "30",
        "--seed",
        "4",
    ];
    assert_eq!(world.json(&drawn)["text"], text(&both));
    let both = world.run(&["generate", arg(&model), "Speak,", "--greedy", "--seed", "1"]);
    assert_eq!(both.code, Some(2), "{}", both.stderr);
}

#[test]
fn a_decomposition_with_adapters_speaks_as_its_merged_model() {
    let world = World::new();
    let (split, merged) = (world.path("svd"), world.path("merged"));
    world
        .run(&[
            "decompose",
            arg(&fixture("shakespeare-1m")),
            "--out",
            arg(&split),
        ])
        .succeeds();
    let mut weighted = Vec::new();
    for (method, lr, weight) in [
        ("sigma", "0.1", "0.7"),
        ("lora-xs", "0.003", "0.8"),
        ("full", "0.003", "0.3"),
    ] {
        let (adapter, text) = (world.path(method), fixture("eighty-train.txt"));
        let train = [
            "train",
            arg(&split),
            "--data",
            arg(&text),
            "--out",
            arg(&adapter),
        ];
        let more = [
            "--steps", "12", "--lr", lr, "--length", "64", "--method", method,
        ];
        world.run(&[&train[..], &more].concat()).succeeds();
        weighted.push(format!("--adapter={}*{weight}", arg(&adapter)));
    }
    let adapters: Vec<&str> = weighted.iter().map(String::as_str).collect();
    let merge = [
        "merge",
        arg(&split),
        "--out",
        arg(&merged),
        "--dtype",
        "f32",
    ];
    world.run(&[&merge[..], &adapters].concat()).succeeds();
    let prompt = ["Mr. Fogg, the king", "--max-tokens", "40"];
    let ids = |model: &Path, more: &[&str]| {
        let facts = world.json(&[&["generate", arg(model)], &prompt[..], more].concat());
        facts["ids"].clone()
    };
    let trained = ids(&split, &adapters);
    assert_eq!(trained, ids(&merged, &[]));
    let base = ids(&split, &[]);
    assert_eq!(base, ids(&fixture("shakespeare-1m"), &[]));
    assert_ne!(trained, base);
}
