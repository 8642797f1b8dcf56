//! Judged by programs that are not ours: PyPI's safetensors, transformers, peft and svd-training, where they are installed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use svdhub::weights::Dtype;

use crate::world::{World, arg};

/// A Python with these packages, or a loud word that it is not there.
pub fn python(packages: &str, test: &str) -> Option<PathBuf> {
    let asked = std::env::var_os("SVDHUB_PYTHON").map(PathBuf::from);
    let python = asked.clone().unwrap_or_else(|| "python3".into());
    let probe = Command::new(&python)
        .args(["-c", &format!("import {packages}")])
        .output();
    match probe {
        Ok(probe) if probe.status.success() => Some(python),
        found => {
            let why = match found {
                Ok(probe) => String::from_utf8_lossy(&probe.stderr)
                    .trim()
                    .lines()
                    .last()
                    .unwrap_or_default()
                    .to_string(),
                Err(error) => error.to_string(),
            };
            assert!(
                asked.is_none(),
                "SVDHUB_PYTHON cannot `import {packages}`: {why}"
            );
            // not eprintln: of a test that passes, that is not shown
            writeln!(
                std::io::stderr(),
                "SKIPPED: {test} needs a Python that can `import {packages}` ({why}); name one in SVDHUB_PYTHON"
            )
            .expect("standard error is open");
            None
        }
    }
}

/// Runs `tests/python/checks.py`, and returns the facts it prints.
pub fn checked(python: &Path, arguments: &[&str]) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/checks.py");
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(python)
        .arg(script)
        .args(arguments)
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("Python starts");
    let (stdout, stderr) = (
        String::from_utf8_lossy(&stdout),
        String::from_utf8_lossy(&stderr),
    );
    assert!(status.success(), "{arguments:?}\n{stdout}{stderr}");
    eprintln!("{} {stdout}", arguments.join(" "));
    serde_json::from_str(stdout.lines().last().unwrap_or_default()).expect("JSON")
}

#[test]
fn an_independent_reader_finds_what_the_specification_says() {
    let packages = "jsonschema, safetensors, torch, transformers";
    let test = "an_independent_reader_finds_what_the_specification_says";
    let Some(python) = python(packages, test) else {
        return;
    };
    let world = World::new();
    let tied = json!({"model_type": "qwen2", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": true,
        "rms_norm_eps": 1e-6, "architectures": ["Qwen2ForCausalLM"]});
    for (name, base, options) in [
        (
            "bf16",
            world.model("bf16", Dtype::BF16, 600_000),
            vec!["--rank-fraction", "0.5", "--shard-size", "1MB"],
        ),
        ("f16", world.model("f16", Dtype::F16, u64::MAX), vec![]),
        (
            "f32",
            world.model("f32", Dtype::F32, u64::MAX),
            vec!["--rank-fraction", "1"],
        ),
        (
            "sidecar",
            world.model("sidecar", Dtype::BF16, u64::MAX),
            vec!["--layout", "sidecar", "--energy", "0.7"],
        ),
        (
            "narrow",
            world.model("narrow", Dtype::BF16, u64::MAX),
            vec!["--factors-dtype", "bf16"],
        ),
        ("biased", world.random_model("biased", &tied), vec![]),
    ] {
        let (split, merged) = (
            world.path(&format!("{name}-svd")),
            world.path(&format!("{name}-merged")),
        );
        let decompose = ["decompose", arg(&base), "--out", arg(&split)];
        world.run(&[&decompose[..], &options].concat()).succeeds();
        world
            .run(&["merge", arg(&split), "--out", arg(&merged)])
            .succeeds();
        let facts = checked(
            &python,
            &["artifact", arg(&base), arg(&split), arg(&merged)],
        );
        assert!(facts["modules"].as_u64() > Some(0), "{facts}");
    }
}
