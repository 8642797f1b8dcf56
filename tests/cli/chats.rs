//! Data with answers: what is learnt of them, and measured, is what transformers finds answered.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use svdhub::event::Silent;
use svdhub::model::ModelConfig;
use svdhub::text::{Corpus, LossOn};
use svdhub::weights::Dtype;

use crate::world::{Run, TOKEN, World, arg, fixture, json_file};

fn golden(part: &str) -> Value {
    json_file(&fixture("golden/chats.json"))[part].clone()
}

/// The fixture model with this chat template.
fn chatting(world: &World, template: &Value) -> PathBuf {
    let model = world.model("model", Dtype::BF16, u64::MAX);
    let template = template.as_str().expect("a template");
    std::fs::write(model.join("chat_template.jinja"), template).expect("writes");
    model
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn total(rows: &[Value], key: &str) -> f64 {
    let values = rows.iter().map(|row| row[key].as_f64());
    values.map(|value| value.expect("a number")).sum()
}

fn lines(path: &Path, rows: &[Value]) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(path, lines.join("\n")).expect("writes");
}

/// Holds the evaluation of `data` against the losses of all its answers together.
fn measures(world: &World, model: &Path, data: &Path, length: &str, tokens: f64, loss: f64) {
    let data = ["--data", arg(data), "--length", length];
    let facts = world.json(&[&["evaluate", arg(model)], &data[..]].concat());
    assert_eq!(
        (facts["tokens"].as_f64(), &facts["loss_on"]),
        (Some(tokens), &json!("answers"))
    );
    let (found, wanted) = (facts["loss"].as_f64().expect("a loss"), loss / tokens);
    assert!(
        (found - wanted).abs() < 1e-5 * wanted,
        "{found} instead of {wanted}"
    );
}

#[test]
fn answers_are_those_that_the_template_marks() {
    let world = World::new();
    let marked = golden("marked");
    let model = chatting(&world, &marked["template"]);
    let config = json_file(&model.join("config.json"));
    let config = ModelConfig::parse(&model.join("config.json"), &config).expect("a config");
    let rows = list(&marked["rows"]);
    let data = world.path("one.jsonl");
    for row in rows {
        lines(&data, &[json!({"messages": row["messages"]})]);
        let corpus = Corpus::read(
            &data.as_path().into(),
            &model,
            &config,
            256,
            LossOn::Answers,
            &Silent,
        )
        .expect("reads");
        assert_eq!(json!(corpus.ids), row["ids"]);
        let learnt = list(&row["learnt"]).iter().filter(|x| **x == json!(1));
        assert_eq!(corpus.learnt(), Some(learnt.count()));
        let all = Corpus::read(
            &data.as_path().into(),
            &model,
            &config,
            256,
            LossOn::All,
            &Silent,
        )
        .expect("reads");
        assert_eq!(
            (&all.ids, all.learnt()),
            (&corpus.ids, Some(corpus.ids.len() - 1))
        );
    }
    // together in one window, and in several
    let data = world.path("all.json");
    std::fs::write(&data, json!(rows).to_string()).expect("writes");
    let flags = rows.iter().flat_map(|row| list(&row["learnt"]));
    let tokens = flags.filter(|x| **x == json!(1)).count() as f64;
    let table = fixture("golden/chats.parquet");
    measures(&world, &model, &table, "256", tokens, total(rows, "loss"));
    for length in ["256", "96"] {
        measures(&world, &model, &data, length, tokens, total(rows, "loss"));
    }
}

#[test]
fn answers_that_a_template_tells_otherwise_later_are_learnt_as_they_were_asked_for() {
    let world = World::new();
    let forgetful = golden("forgetful");
    let model = chatting(&world, &forgetful["template"]);
    let rows = list(&forgetful["rows"]);
    let data = world.path("data.jsonl");
    lines(&data, rows);
    let answers: Vec<Value> = rows
        .iter()
        .flat_map(|row| list(&row["answers"]).to_vec())
        .collect();
    let (tokens, loss) = (total(&answers, "tokens"), total(&answers, "loss"));
    measures(&world, &model, &data, "128", tokens, loss);
}

#[test]
fn prompts_are_read_and_completions_learnt_to_their_end() {
    let world = World::new();
    let model = world.model("model", Dtype::BF16, u64::MAX);
    let pairs = golden("pairs");
    let pairs = list(&pairs);
    let data = world.path("data.jsonl");
    lines(&data, pairs);
    measures(
        &world,
        &model,
        &data,
        "256",
        total(pairs, "tokens"),
        total(pairs, "loss"),
    );
    for file in ["config.json", "generation_config.json"] {
        let path = model.join(file);
        if path.exists() {
            let mut config = json_file(&path);
            config["eos_token_id"] = Value::Null;
            std::fs::write(&path, config.to_string()).expect("writes");
        }
    }
    let run = world.run(&["evaluate", arg(&model), "--data", arg(&data)]);
    let said = run.succeeds().stderr;
    assert!(said.contains("nothing ends the completions"), "{said}");
}

/// Conversations of one kind, which a model can learn.
fn lesson() -> Vec<Value> {
    let names = [
        "Tybalt", "Hamlet", "Juliet", "Macbeth", "Ophelia", "Iago", "Viola", "Puck", "Lear",
        "Portia",
    ];
    let row = |name: &&str| {
        let answer = format!("My name is {name}, and I shall go to the house of {name}.");
        json!({"messages": [{"role": "user", "content": format!("Thou art {name}. What is thy name, and what wilt thou do?")},
            {"role": "assistant", "content": answer}]})
    };
    names.iter().map(row).collect()
}

#[test]
fn a_model_learns_to_answer_and_keeps_it_when_merged() {
    let world = World::new();
    let model = chatting(&world, &golden("marked")["template"]);
    let (split, adapter, merged) = (
        world.path("svd"),
        world.path("adapter"),
        world.path("merged"),
    );
    world
        .run(&["decompose", arg(&model), "--out", arg(&split)])
        .succeeds();
    let data = world.path("lesson.jsonl");
    lines(&data, &lesson());
    let data = ["--data", arg(&data), "--length", "128"];
    let train = [
        "train",
        arg(&split),
        "--out",
        arg(&adapter),
        "--steps",
        "30",
        "--batch",
        "2",
        "--lr",
        "5e-2",
    ];
    let facts = world.json(&[&train[..], &data].concat());
    let (learnt, all) = (
        facts["learnt_tokens"].as_u64(),
        facts["data_tokens"].as_u64(),
    );
    assert!(learnt > Some(100) && learnt < all, "{learnt:?} of {all:?}");
    let measured = |model: &[&str]| {
        let facts = world.json(&[&["evaluate"], model, &data].concat());
        assert_eq!(facts["tokens"].as_u64(), learnt);
        facts["loss"].as_f64().expect("a loss")
    };
    let before = measured(&[arg(&split)]);
    let after = measured(&[arg(&split), "--adapter", arg(&adapter)]);
    assert!(after < 0.8 * before, "{before} → {after}");
    let merge = [
        "merge",
        arg(&split),
        "--adapter",
        arg(&adapter),
        "--dtype",
        "f32",
        "--out",
        arg(&merged),
    ];
    world.run(&merge).succeeds();
    let there = measured(&[arg(&merged)]);
    assert!((there - after).abs() < 1e-5 * after, "{there} for {after}");
    let report = json_file(&adapter.join("report.json"));
    assert_eq!(report["evaluate"][0]["loss_on"], "answers");
}

#[test]
fn windows_at_a_time_make_the_same_steps() {
    let world = World::new();
    let model = world.model("model", Dtype::BF16, u64::MAX);
    let split = world.path("svd");
    let decompose = ["decompose", arg(&model), "--out", arg(&split)];
    world.run(&decompose).succeeds();
    // answers of one to some twenty tokens: each token weighs the same
    let data = world.path("data.jsonl");
    let row = |at: usize| json!({"prompt": format!("He said it {at} times,"), "completion": " and so did he".repeat(at % 5)});
    lines(&data, &(0..12).map(row).collect::<Vec<_>>());
    let run = |name: &str, options: &[&str]| {
        let out = world.path(name);
        let train = [
            "train",
            arg(&split),
            "--data",
            arg(&data),
            "--out",
            arg(&out),
            "--length",
            "40",
        ];
        let more = ["--batch", "3", "--steps", "5", "--lr", "3e-2"];
        let facts = world.json(&[&train[..], &more, options].concat());
        let losses = list(&facts["losses"])
            .iter()
            .map(|x| x.as_f64().expect("a loss"));
        (losses.collect::<Vec<f64>>(), facts["micro_batch"].clone())
    };
    let (whole, said) = run("whole", &[]);
    assert_eq!(said, Value::Null);
    for (windows, name) in [("1", "ones"), ("2", "twos"), ("9", "all")] {
        let (parts, said) = run(name, &["--micro-batch", windows]);
        assert_eq!(said.to_string(), windows);
        for (part, whole) in parts.iter().zip(&whole) {
            // sums of f32 in another order
            assert!(
                (part - whole).abs() < 1e-5 * whole,
                "{parts:?} for {whole:?}"
            );
        }
    }
}

#[test]
fn what_is_cut_or_teaches_nothing_is_said() {
    let world = World::new();
    let model = chatting(&world, &golden("marked")["template"]);
    let data = world.path("data.jsonl");
    let rows = list(&golden("marked")["rows"]).to_vec();
    lines(&data, &rows);
    let evaluate = |length: &str| {
        world.run(&[
            "evaluate",
            arg(&model),
            "--data",
            arg(&data),
            "--length",
            length,
        ])
    };
    let run = evaluate("60").succeeds();
    assert!(
        run.stderr.contains("1 of 3 rows") && run.stderr.contains("cut"),
        "{}",
        run.stderr
    );
    let run = evaluate("20").succeeds();
    assert!(
        run.stderr.contains("2 of 3 rows") && run.stderr.contains("left out"),
        "{}",
        run.stderr
    );
    evaluate("8").refuses(&["data.jsonl", "nothing to learn within 8 tokens", "--length"]);

    std::fs::remove_file(model.join("chat_template.jinja")).expect("was there");
    evaluate("64").refuses(&["data.jsonl line 1", "no chat template", "`completion`"]);
    std::fs::write(
        model.join("chat_template.jinja"),
        "{{ raise_exception('never') }}",
    )
    .expect("writes");
    evaluate("64").refuses(&["data.jsonl line 1", "never"]);
    // what stands before an answer has its place in front of it
    let turned = "{% for m in messages | reverse %}{{ m.content }}{% endfor %}";
    std::fs::write(model.join("chat_template.jinja"), turned).expect("writes");
    evaluate("64").refuses(&["data.jsonl line 1", "before message 2", "--loss-on all"]);
}

/// Puts files into a dataset of this world's Hub, whose commit is returned.
fn dataset(world: &World, name: &str, files: &[(&str, Vec<u8>)]) -> String {
    let post = |path: &str, body: String| {
        let url = format!("{}/api/{path}", world.hub().endpoint());
        let client = reqwest::blocking::Client::new();
        let answer = client.post(url).bearer_auth(TOKEN).body(body).send();
        let answer = answer.and_then(|it| it.error_for_status());
        answer.expect("an answer").json::<Value>().expect("JSON")
    };
    let create = json!({"name": name, "organization": "org", "type": "dataset"});
    post("repos/create", create.to_string());
    let header = json!({"key": "header", "value": {"summary": "data"}});
    let mut commit = vec![header.to_string()];
    for (path, bytes) in files {
        let content = BASE64.encode(bytes);
        let file = json!({"path": path, "content": content, "encoding": "base64"});
        commit.push(json!({"key": "file", "value": file}).to_string());
    }
    let made = post(
        &format!("datasets/org/{name}/commit/main"),
        commit.join("\n"),
    );
    made["commitOid"].as_str().expect("a commit").into()
}

#[test]
fn datasets_on_the_hub_are_data() {
    let world = World::with_hub();
    let marked = golden("marked");
    let model = chatting(&world, &marked["template"]);
    let rows = list(&marked["rows"]);
    let line = |row: &Value| format!("{}\n", json!({"messages": row["messages"]})).into_bytes();
    let table = std::fs::read(fixture("golden/chats.parquet")).expect("reads");
    let files = [
        ("README.md", b"# Chats".to_vec()),
        ("data/train-00000-of-00002.jsonl", line(&rows[0])),
        ("data/train-00001-of-00002.jsonl", line(&rows[1])),
        ("data/test-00000-of-00001.parquet", table),
    ];
    let commit = dataset(&world, "chats", &files);
    let evaluate = |data: &str| world.json(&["evaluate", arg(&model), "--data", data]);
    let facts = evaluate("org/chats");
    let learnt = |rows: &[Value]| -> usize {
        let flags = rows.iter().flat_map(|row| list(&row["learnt"]));
        flags.filter(|x| **x == json!(1)).count()
    };
    assert_eq!(facts["tokens"], learnt(&rows[..2]));
    let wanted = total(&rows[..2], "loss") / learnt(&rows[..2]) as f64;
    let found = facts["loss"].as_f64().expect("a loss");
    assert!(
        (found - wanted).abs() < 1e-5 * wanted,
        "{found} instead of {wanted}"
    );
    assert_eq!(facts["data"], "org/chats/data/train");
    assert_eq!(
        facts["dataset"],
        json!({"repo": "org/chats", "revision": commit})
    );
    // what they are called there is what huggingface_hub calls them in the cache
    let cached = world
        .path("hf/hub/datasets--org--chats/snapshots")
        .join(&commit);
    assert!(cached.join("data/train-00001-of-00002.jsonl").is_file());

    let test = "hf://datasets/org/chats@main/data/test-*";
    assert_eq!(evaluate(test)["tokens"], learnt(rows));
    let all = evaluate("hf://datasets/org/chats/data/*");
    assert_eq!(
        all["data"], "org/chats/data/*",
        "of several, by what they were asked for"
    );
    let before = world.hub().requests().len();
    let mut offline = world.command(&["evaluate", arg(&model), "--data", test]);
    let run = offline.env("HF_HUB_OFFLINE", "1").output().expect("starts");
    Run::of(run).succeeds();
    assert_eq!(world.hub().requests().len(), before, "nothing is asked");
    let refused = |data: &str, words: &[&str]| {
        world
            .run(&["evaluate", arg(&model), "--data", data])
            .refuses(words);
    };
    refused(
        "hf://datasets/org/chats/none.json",
        &["none.json", "data/train-00000", "hf://"],
    );
    refused("org/nothing", &["datasets/org/nothing"]);
    dataset(
        &world,
        "two",
        &[("a.json", b"[]".to_vec()), ("b.json", b"[]".to_vec())],
    );
    refused("org/two", &["a.json, b.json", "hf://"]);

    // an adapter's card names what it learnt
    let (split, adapter) = (world.path("svd"), world.path("adapter"));
    world
        .run(&["decompose", arg(&model), "--out", arg(&split)])
        .succeeds();
    let train = [
        "train",
        arg(&split),
        "--data",
        "org/chats",
        "--out",
        arg(&adapter),
        "--steps",
        "2",
    ];
    world.run(&train).succeeds();
    world
        .run(&["publish", arg(&adapter), "org/adapter"])
        .succeeds();
    let url = format!(
        "{}/org/adapter/resolve/main/README.md",
        world.hub().endpoint()
    );
    let client = reqwest::blocking::Client::new();
    let card = client
        .get(url)
        .bearer_auth(TOKEN)
        .send()
        .and_then(|it| it.text());
    let card = card.expect("a card");
    assert!(
        card.contains("datasets:\n- \"org/chats\"\n") && card.contains(&commit),
        "{card}"
    );
}

#[test]
fn tables_that_are_none_are_refused() {
    let world = World::new();
    let model = world.model("model", Dtype::BF16, u64::MAX);
    let whole = std::fs::read(fixture("golden/chats.parquet")).expect("reads");
    let data = world.path("data.parquet");
    let refused = |bytes: &[u8]| {
        std::fs::write(&data, bytes).expect("writes");
        world
            .run(&["evaluate", arg(&model), "--data", arg(&data)])
            .refuses(&["data.parquet"]);
    };
    refused(b"");
    refused(b"PAR1");
    refused(&whole[..whole.len() / 2]);
    // of a table without its middle, the end says what should be there
    refused(&[&whole[..40], &whole[whole.len() / 2..]].concat());
}
