//! Where fuzzing begins: a tiny model, what the library makes of it, and the formats of everything else.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use serde_json::{Value, json};
use svdhub::adapter::{Adapter, AdapterConfig};
use svdhub::artifact::Artifact;
use svdhub::base::Base;
use svdhub::decompose;
use svdhub::event::Silent;
use svdhub::format::{ArtifactLayout, Origin, Rank, Storing};
use svdhub::job::{MATRICES, Options, Share};
use svdhub::json::Tool;
use svdhub::model::ModelConfig;
use svdhub::plan::PlanOptions;
use svdhub::weights::{Dtype, Elements, Header, ShardWriter};

/// Inputs by target and name.
pub fn all() -> Vec<(&'static str, String, Vec<u8>)> {
    let room = tempfile::tempdir().expect("a temporary directory");
    let mut seeds = Seeds::default();
    for (name, dtype, tied) in [("bf16", Dtype::BF16, false), ("f32", Dtype::F32, true)] {
        let dir = room.path().join(name);
        let config = json!({"model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 5, "tie_word_embeddings": tied, "torch_dtype": "bfloat16"});
        model(&dir, &config, dtype);
        seeds.model(name, &dir);
        for layout in [ArtifactLayout::Residual, ArtifactLayout::Sidecar] {
            seeds.decomposition(&format!("{name}-{layout:?}"), &dir, layout, tied);
        }
    }
    seeds.texts();
    seeds.0
}

/// Writes a model of a few hundred numbers.
fn model(dir: &Path, config: &Value, dtype: Dtype) {
    fs::create_dir_all(dir).expect("creates");
    fs::write(dir.join("config.json"), config.to_string()).expect("writes");
    fs::write(dir.join("README.md"), README).expect("writes");
    fs::write(dir.join("LICENSE"), "free").expect("writes");
    let mut state = 7u32;
    let parsed = ModelConfig::read(dir).expect("parses");
    let tensors: Vec<(String, Elements)> = parsed
        .tensors("model.")
        .into_iter()
        .map(|(name, shape)| {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
            (name, Elements::from_f32(&shape, &values).cast(dtype))
        })
        .collect();
    let header = tensors
        .iter()
        .map(|(n, t)| (n.as_str(), t.dtype, t.shape.as_slice()));
    let header = Header::compose(header).expect("composes");
    let path = dir.join("model.safetensors");
    let mut writer = ShardWriter::create(&path, header).expect("creates");
    for (name, tensor) in &tensors {
        writer.put(name, &tensor.bytes).expect("writes");
    }
    writer.finish().expect("finishes");
}

const README: &str = "---\nlicense: other\nlicense_name: \"it's odd\"\nlanguage:\n- en\n- 'no'\npipeline_tag: text-generation\n---\n# A model\n";

#[derive(Default)]
struct Seeds(Vec<(&'static str, String, Vec<u8>)>);

impl Seeds {
    fn add(&mut self, target: &'static str, name: &str, bytes: impl AsRef<[u8]>) {
        self.0.push((target, name.into(), bytes.as_ref().to_vec()));
    }

    fn model(&mut self, name: &str, dir: &Path) {
        let weights = fs::read(dir.join("model.safetensors")).expect("reads");
        let length = u64::from_le_bytes(*weights.first_chunk().expect("a prefix")) as usize;
        self.add("header", name, &weights[..8 + length]);
        self.add("header", &format!("{name}-json"), &weights[8..8 + length]);
        self.add("checkpoint", name, piece("model.safetensors", &weights));
        self.add("model", name, folder(dir, ""));
        self.add("round_trip", name, folder(dir, ""));
        let header: Value = serde_json::from_slice(&weights[8..8 + length]).expect("JSON");
        let names = header.as_object().expect("an object").keys();
        let names: Vec<&String> = names.filter(|n| *n != "__metadata__").collect();
        let map: serde_json::Map<String, Value> = names
            .iter()
            .map(|n| ((*n).clone(), json!("a.safetensors")))
            .collect();
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        let both = [
            piece("index", &index),
            piece("a.safetensors", &weights[8..8 + length]),
        ];
        self.add("index", name, both.concat());
        let sharded = [
            piece("model.safetensors.index.json", &index),
            piece("a.safetensors", &weights),
        ];
        self.add("checkpoint", &format!("{name}-sharded"), sharded.concat());
        let config = fs::read(dir.join("config.json")).expect("reads");
        self.add("config", name, piece("config", config));
    }

    fn decomposition(
        &mut self,
        name: &str,
        model: &Path,
        layout: ArtifactLayout,
        untie_head: bool,
    ) {
        let base = Base::open(model, None, None).expect("opens");
        let room = tempfile::tempdir().expect("a temporary directory");
        let options = Options {
            plan: PlanOptions {
                rank: Rank::Fixed(NonZeroUsize::new(2).expect("not zero")),
                include: vec![
                    "o_proj".parse().expect("a pattern"),
                    "lm_head".parse().expect("a pattern"),
                ],
                storing: Storing {
                    layout,
                    ..Storing::default()
                },
                threads: 1,
                untie_head,
                ..PlanOptions::default()
            },
            ..Options::default()
        };
        let out = room.path().join("svd");
        decompose::run(&base, &out, &options, &Silent).expect("decomposes");
        let artifact = Artifact::open(&out, Some(base.clone())).expect("opens");
        let adapter = Adapter {
            dir: room.path().join("adapter"),
            config: AdapterConfig {
                schema: svdhub::adapter::SCHEMA,
                method: "sigma".into(),
                trained: vec!["sigma".into(), "norms".into()],
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
            delta: [("model.layers.0.self_attn.o_proj".into(), vec![0.5, -0.25])].into(),
            core: [(
                "model.layers.0.self_attn.o_proj".into(),
                Elements::from_f32(&[2, 2], &[0.5, 0.25, -0.25, 0.125]),
            )]
            .into(),
            tensors: [(
                "model.norm.weight".into(),
                Elements::from_f32(&[4], &[1.0, 2.0, 3.0, 4.0]),
            )]
            .into(),
        };
        fs::create_dir_all(&adapter.dir).expect("creates");
        adapter.save().expect("saves");
        let (split, trained) = (folder(&out, ""), folder(&adapter.dir, ""));
        self.add("adapter", name, &trained);
        let mut whole = [split, trained].concat();
        if layout == ArtifactLayout::Sidecar {
            let weights = fs::read(model.join("model.safetensors")).expect("reads");
            whole.extend(piece("model.safetensors", weights));
        }
        self.add("artifact", name, &whole);
        let report = fs::read(out.join("report.json")).expect("reads");
        let config = fs::read(out.join("config.json")).expect("reads");
        let both = [piece("config.json", &config), piece("report.json", &report)];
        self.add("spectrum", name, both.concat());
        let both = [piece("README.md", README), piece("report.json", &report)];
        self.add("model_card", name, both.concat());
        let config: Value = serde_json::from_slice(&config).expect("JSON");
        self.add("section", name, config["svd"].to_string());

        let part = room.path().join("part");
        let share = Share { number: 1, of: 1 };
        let record = decompose::run_share(&base, &part, share, &options, &Silent);
        let record = record.expect("decomposes");
        let mut whole = [folder(&part, ""), folder(model, "base/")].concat();
        for module in record.modules.keys() {
            let path = svdhub::part::path_of(&part.join(MATRICES), module);
            whole.extend(piece(
                &format!("{MATRICES}/{module}"),
                fs::read(path).expect("reads"),
            ));
        }
        self.add("part", name, whole);
        let plan = serde_json::to_string(&options.plan).expect("serialises");
        let config = fs::read(model.join("config.json")).expect("reads");
        let both = [piece("config", config), piece("plan", plan)];
        self.add("config", name, both.concat());
    }

    fn texts(&mut self) {
        for (name, text) in [
            ("share", "2/4"),
            ("fraction", "0.25"),
            ("repository", "org/name@v1"),
            ("folder", "./there"),
            ("pattern", "*.layers.*_proj\nmodel.layers.0.mlp.up_proj"),
            ("part-of-a-name", "q_proj\nmodel.layers.0.self_attn.q_proj"),
        ] {
            self.add("words", name, text);
        }
        for (name, text) in [
            (
                "lines",
                "jsonl\n{\"text\": \"a b a\"}\n\n{\"text\": \"ü\", \"more\": [1]}\n",
            ),
            ("text", "txt\na b c a a a a a a a a"),
            (
                "chats",
                "jsonl\n{\"messages\": [{\"role\": \"user\", \"content\": \"a b\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}",
            ),
            (
                "conversations",
                "json\n[{\"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", \"value\": \"a a\"}]}]",
            ),
            (
                "pairs",
                "json\n[{\"prompt\": \"a\", \"completion\": \"a\"}, {\"instruction\": \"a\", \"input\": \"b\", \"output\": \"a\"}]",
            ),
        ] {
            self.add("data", name, text);
        }
        let chat = [
            piece(
                "tokenizer_config.json",
                r#"{"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}"}]}"#,
            ),
            piece(
                "generation_config.json",
                r#"{"do_sample": true, "temperature": 0.6, "top_k": 2, "top_p": 0.9, "repetition_penalty": 1.1, "eos_token_id": [1, 2]}"#,
            ),
        ];
        self.add("generation", "chat", chat.concat());
        let alone = [
            piece(
                "chat_template.jinja",
                "{% for m in messages %}{{ m.content }}{% endfor %}",
            ),
            piece("special_tokens_map.json", r#"{"eos_token": "</s>"}"#),
            piece("config.json", r#"{"eos_token_id": 2}"#),
            piece("generation_config.json", r#"{"min_p": 0.1}"#),
        ];
        self.add("generation", "alone", alone.concat());
        let longrope = json!({"model_type": "phi3", "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 5, "max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_theta": 1e4, "sliding_window": 4,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}, "eos_token_id": [1, 2]});
        let llama3 = json!({"model_type": "qwen3", "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 4, "vocab_size": 5, "use_sliding_window": true, "max_window_layers": 1, "sliding_window": 4, "attention_bias": true,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16}});
        let budget = json!({"rank": {"mode": "budget", "value": 40}, "include": [], "exclude": ["*down*"], "untie_head": false, "layout": "sidecar"});
        let room = tempfile::tempdir().expect("a temporary directory");
        for (name, config) in [("longrope", longrope), ("llama3", llama3)] {
            let both = [
                piece("config", config.to_string()),
                piece("plan", budget.to_string()),
            ];
            self.add("config", name, both.concat());
            let dir = room.path().join(name);
            model(&dir, &config, Dtype::F16);
            self.add("model", name, folder(&dir, ""));
            self.add("round_trip", name, folder(&dir, ""));
        }
        self.hub();
        self.server();
    }

    fn hub(&mut self) {
        use svdhub::sum::sha256_hex;
        let commit = "0123456789012345678901234567890123456789";
        let config = "{\"model_type\": \"llama\"}";
        // printf … | git hash-object --stdin
        let oid = "230d5f4da0da586aad26ead694ea67cd15bd6df1";
        let header = Header::compose([("a", Dtype::F32, &[2usize][..])]).expect("composes");
        let weights = [header.prefix.as_slice(), &[0; 8]].concat();
        let sum = sha256_hex(&weights);
        let tree = json!([
            {"type": "directory", "path": "sub", "oid": commit, "size": 0},
            {"type": "file", "path": "config.json", "oid": oid, "size": config.len()},
            {"type": "file", "path": "model.safetensors", "oid": commit, "size": weights.len(), "lfs": {"oid": sum, "size": weights.len()}}
        ]);
        let answers = [
            piece("revision", json!({"sha": commit}).to_string()),
            piece("tree", tree.to_string()),
            piece("config.json", config),
            piece("model.safetensors", &weights),
        ];
        self.add("hub", "single-file", answers.concat());
        let index = json!({"metadata": {}, "weight_map": {"a": "w.safetensors"}}).to_string();
        let tree = json!([
            {"type": "file", "path": "model.safetensors.index.json", "oid": "20873a4b86067e150dd8837e2282bb1667876bbe", "size": index.len()},
            {"type": "file", "path": "config.json", "oid": oid, "size": config.len()},
            {"type": "file", "path": "w.safetensors", "oid": commit, "size": weights.len(), "lfs": {"oid": sum}}
        ]);
        let answers = [
            piece("revision", json!({"sha": commit}).to_string()),
            piece("tree", tree.to_string()),
            piece(
                "link",
                format!("<http://HUB/api/models/org/name/tree/{commit}?cursor=2>; rel=\"next\""),
            ),
            piece("config.json", config),
            piece("model.safetensors.index.json", index),
            piece("w.safetensors", &weights),
        ];
        self.add("hub", "shards", answers.concat());
    }

    fn server(&mut self) {
        let commit = "{\"key\":\"header\",\"value\":{\"summary\":\"s\",\"description\":\"d\"}}\n\
            {\"key\":\"file\",\"value\":{\"path\":\"a/b.txt\",\"content\":\"aGk=\",\"encoding\":\"base64\"}}\n\
            {\"key\":\"file\",\"value\":{\"path\":\"c\",\"content\":\"hi\",\"encoding\":\"utf-8\"}}\n\
            {\"key\":\"lfsFile\",\"value\":{\"path\":\"w\",\"algo\":\"sha256\",\"oid\":\"63a6708cbda2d2817d827ab880bc7653017d89d47df9c5591868ec95c079a4eb\",\"size\":396}}\n\
            {\"key\":\"deletedFile\",\"value\":{\"path\":\".gitattributes\"}}\n";
        let short: Vec<&str> = commit.lines().take(3).collect();
        let preupload = r#"{"files":[{"path":"x/y.bin","size":5,"sample":"aGk="},{"path":".gitattributes","size":3}],"gitAttributes":"*.bin filter=lfs -text\n/x/*y* -filter\n"}"#;
        let batch = r#"{"operation":"upload","objects":[{"oid":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":5}]}"#;
        for (name, line, body) in [
            ("commit", "POST /api/models/ada/engine/commit/main", commit),
            (
                "commit-short",
                "POST /api/models/ada/engine/commit/main?create_pr=1",
                short.join("\n").as_str(),
            ),
            (
                "preupload",
                "POST /api/models/ada/engine/preupload/main",
                preupload,
            ),
            (
                "batch",
                "POST /ada/engine.git/info/lfs/objects/batch",
                batch,
            ),
            (
                "verify",
                "POST /ada/engine.git/info/lfs/verify",
                r#"{"oid":"63a6708cbda2d2817d827ab880bc7653017d89d47df9c5591868ec95c079a4eb","size":396}"#,
            ),
            (
                "settings",
                "PUT /api/models/ada/engine/settings",
                r#"{"private":false,"gated":"auto"}"#,
            ),
            (
                "branch",
                "POST /api/models/ada/engine/branch/dev%2Fx",
                r#"{"startingPoint":"main"}"#,
            ),
            (
                "tag",
                "POST /api/models/ada/engine/tag/main",
                r#"{"tag":"v1"}"#,
            ),
            (
                "paths",
                "POST /api/models/ada/engine/paths-info/main",
                "paths=.gitattributes&expand=True",
            ),
            (
                "tree",
                "GET /api/models/ada/engine/tree/main?recursive=true&limit=1&cursor=x",
                "",
            ),
            ("resolve", "GET /ada/engine/resolve/main/.gitattributes", ""),
            (
                "commits",
                "GET /api/models/ada/engine/commits/main?limit=2&p=0",
                "",
            ),
            (
                "yaml",
                "POST /api/validate-yaml",
                r#"{"content":"---\na: b\n---\n"}"#,
            ),
        ] {
            self.add("server", name, format!("{line}\n{body}"));
        }
    }
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors") || name.starts_with(MATRICES)
}

/// One piece of an input.
fn piece(name: &str, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    let mut text = format!("%% {name}\n").into_bytes();
    match content.first_chunk::<8>() {
        // a weight file: its header as a line, to be changed as JSON
        Some(length) if is_weights(name) && content[8..].starts_with(b"{") => {
            let end = 8 + u64::from_le_bytes(*length) as usize;
            text.extend_from_slice(&content[8..end]);
            text.push(b'\n');
            text.extend_from_slice(&content[end..]);
        }
        _ => text.extend_from_slice(content),
    }
    text.push(b'\n');
    text
}

/// The files of a folder as pieces.
fn folder(dir: &Path, before: &str) -> Vec<u8> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .expect("lists")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_file())
        .map(|path| {
            path.file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    let pieces = names.iter().map(|name| {
        let content = fs::read(dir.join(name)).expect("reads");
        piece(&format!("{before}{name}"), content)
    });
    pieces.collect::<Vec<_>>().concat()
}
