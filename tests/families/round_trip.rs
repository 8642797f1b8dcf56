//! The verbs know every family: what is decomposed, that it comes back, and that training survives the merge.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;

use svdhub::adapter::{self, Adapter, AdapterConfig, Mixture};
use svdhub::artifact::Artifact;
use svdhub::base::Base;
use svdhub::event::Silent;
use svdhub::format::Origin;
use svdhub::generate::go_on;
use svdhub::json::Tool;
use svdhub::linalg::single_threaded_blas;
use svdhub::model::{ModelConfig, Trained};
use svdhub::plan::{Plan, PlanOptions, Role};
use svdhub::source::{Source, load};
use svdhub::weights::{Dtype, Elements, Header, ShardWriter};
use svdhub::{decompose, merge, verify};

use crate::generation::greedy;
use crate::transformers::{golden, model};

/// Writes the golden model of a family as a repository of one file.
fn write(dir: &Path, golden: &Value, dtype: Dtype) -> Base {
    std::fs::create_dir_all(dir).expect("a directory");
    std::fs::write(dir.join("config.json"), golden["config"].to_string()).expect("writes");
    let tensors: BTreeMap<String, Elements> = model(golden)
        .1
        .into_iter()
        .map(|(name, elements)| (name, elements.cast(dtype)))
        .collect();
    let header = Header::compose(
        tensors
            .iter()
            .map(|(name, e)| (name.as_str(), e.dtype, e.shape.as_slice())),
    )
    .expect("composes");
    let mut writer = ShardWriter::create(&dir.join("model.safetensors"), header).expect("creates");
    for (name, elements) in &tensors {
        writer.put(name, &elements.bytes).expect("writes");
    }
    writer.finish().expect("writes");
    Base::open(dir, None, None).expect("opens")
}

/// Every matrix that transformers has is decomposed, and every norm counted.
fn assert_plan(name: &str, base: &Base, golden: &Value) {
    let config = ModelConfig::read(&base.dir).expect("parses");
    let inventory = &base.checkpoint.inventory;
    let plan = Plan::new(&base.dir, &config, inventory, &PlanOptions::default()).expect("plans");
    let decomposed: BTreeSet<String> = plan.decomposed().map(|t| t.module().into()).collect();
    let wanted = golden["sigma"].as_object().expect("modules");
    assert_eq!(decomposed, wanted.keys().cloned().collect(), "{name}");
    let norms = golden["norms"].as_object().expect("norms");
    let numbers: usize = norms
        .values()
        .map(|n| n.as_array().expect("a list").len())
        .sum();
    assert_eq!(plan.trainable.norms, numbers as u64, "{name}");
    let embeddings = (config.vocabulary * config.hidden) as u64;
    assert_eq!(plan.trainable.embeddings, embeddings, "{name}");
    assert!(plan.tensors.iter().all(|t| t.role != Role::Other), "{name}");
}

/// An adapter that moves everything a little.
fn moved(dir: &Path, artifact: &Artifact) -> Adapter {
    let delta = artifact.svd.modules.iter().map(|(module, record)| {
        let sigma = artifact.factors(module).expect("factors").sigma;
        assert_eq!(sigma.len(), record.q);
        (module.clone(), sigma.iter().map(|s| -0.3 * s).collect())
    });
    let mut tensors = BTreeMap::new();
    let config = ModelConfig::read(&artifact.dir).expect("parses");
    for (name, shape) in config.tensors(config.names.prefix) {
        if name.contains("norm.weight") || name == config.embedding(config.names.prefix) {
            let stored = artifact.base_tensor(&name).expect("reads").to_f32();
            let values: Vec<f32> = stored.iter().map(|x| 0.9 * x + 0.02).collect();
            tensors.insert(name, Elements::from_f32(&shape, &values));
        }
    }
    std::fs::create_dir_all(dir).expect("a directory");
    let adapter = Adapter {
        dir: dir.into(),
        config: AdapterConfig {
            schema: adapter::SCHEMA,
            method: "sigma".into(),
            trained: ["sigma", "norms", "embeddings"].map(Into::into).into(),
            decomposition: Origin {
                repo: None,
                revision: None,
                content_sha256: artifact.content_sha256.clone(),
            },
            base: artifact.svd.base.clone(),
            weights_sha256: None,
            tool: Tool::this(),
            sha256: None,
        },
        delta: delta.collect(),
        core: BTreeMap::new(),
        tensors,
    };
    adapter.save().expect("saves");
    Adapter::open(dir, artifact).expect("opens")
}

/// The logits of `ids`, and the tokens that follow the first few of them.
fn answers(source: &Source, ids: &Tensor) -> (Vec<f32>, Vec<u32>) {
    let decoder = load(source, Trained::default(), &Device::Cpu, &Silent).expect("loads");
    let logits = decoder.logits(ids).expect("forward");
    let logits = logits.flatten_all().and_then(|l| l.to_vec1());
    let prompt: Vec<u32> = ids.get(0).and_then(|row| row.to_vec1()).expect("ids");
    let mut options = greedy(24);
    // a random model with a tied head says one thing again and again
    options.choice.repetition_penalty = 2.0;
    let (new, _) = go_on(&decoder, &prompt[..6], &options, &mut |_| Ok(())).expect("goes on");
    (logits.expect("logits"), new)
}

/// Largest difference, relative to the largest value.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    let scale = a.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    worst / scale
}

fn assert_round_trip(name: &str, dtype: Dtype) {
    single_threaded_blas();
    let golden = golden(name);
    let place = tempfile::tempdir().expect("temporary directory");
    let path = |part: &str| place.path().join(part);
    let base = write(&path("base"), &golden, dtype);
    assert_plan(name, &base, &golden);

    let options = decompose::Options::default();
    decompose::run(&base, &path("svd"), &options, &Silent).expect("decomposes");
    let artifact = || Artifact::open(&path("svd"), None).expect("opens");
    let untrained = Source::Decomposition {
        artifact: artifact(),
        mixture: Mixture::default(),
    };
    let facts = merge::run(
        &untrained,
        &path("untrained"),
        &merge::Options::default(),
        &Silent,
    )
    .expect("merges");
    assert!(facts.identical_to_base, "{name}");
    for file in ["model.safetensors", "config.json"] {
        let read = |dir: &str| std::fs::read(path(dir).join(file)).expect("reads");
        assert!(
            read("untrained") == read("base"),
            "{file} of {name} differs"
        );
    }
    for dir in ["svd", "untrained"] {
        let facts = verify::run(&path(dir), Some(&base), &Silent).expect("verifies");
        assert!(facts.ok, "{name}, {dir}: {:?}", facts.problems);
    }

    let ids: Vec<u32> = (0..30).map(|i| (i * i * 7 + i * 3 + 1) % 64).collect();
    let ids = Tensor::from_vec(ids, (1, 30), &Device::Cpu).expect("ids");
    let mixture = Mixture {
        parts: vec![(moved(&path("adapter"), &artifact()), 1.0)],
    };
    // the merge in f32: in 16 bits it rounds every weight
    let exact = merge::Options {
        dtype: Some(Dtype::F32),
        ..merge::Options::default()
    };
    let trained = Source::Decomposition {
        artifact: artifact(),
        mixture,
    };
    merge::run(&trained, &path("merged"), &exact, &Silent).expect("merges");
    let (before, untrained) = answers(&Source::Model(base), &ids);
    let (trained, new) = answers(&trained, &ids);
    let merged = Base::open(&path("merged"), None, None).expect("opens");
    let (merged, new_of_merged) = answers(&Source::Model(merged), &ids);
    assert!(difference(&before, &trained) > 0.05, "{name} moved");
    let off = difference(&trained, &merged);
    // two orders of summation in f32 through a few layers
    assert!(off < 1e-4, "{name}: merged logits are {off:.1e} off");
    assert_ne!(new, untrained, "{name} moved");
    assert_eq!(new, new_of_merged, "{name}");
}

macro_rules! round_trip {
    ($($test:ident: $name:literal in $dtype:ident;)*) => {
        $(#[test]
        fn $test() {
            assert_round_trip($name, Dtype::$dtype);
        })*
    };
}

round_trip! {
    llama_returns: "llama" in BF16;
    mistral_returns: "mistral" in F16;
    qwen2_returns: "qwen2" in BF16;
    qwen3_returns: "qwen3" in F32;
    phi3_returns: "phi3-longrope" in BF16;
    phi4_mini_returns: "phi4-mini" in BF16;
    gemma_returns: "gemma" in BF16;
    gemma2_returns: "gemma2" in F32;
    gemma3_returns: "gemma3" in BF16;
    smollm3_returns: "smollm3" in BF16;
    olmo2_returns: "olmo2" in F16;
    olmo3_returns: "olmo3" in BF16;
    granite_returns: "granite" in BF16;
    pythia_returns: "gpt-neox" in F16;
}
