//! What is done with bytes from strangers, one function for each parser: nothing may panic, hang, or hold much more than
//! it was given; what is read is what is written again; and no name becomes a path.
//!
//! Where a target reads several files, its input is a text of pieces: a line `%% name`, then what the file holds. A file
//! `*.safetensors` may begin with its header as a line of JSON: the length prefix is added, and zeros that are missing. The
//! line break before `%%`, and at the end of the input, belongs to no file.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use serde_json::{Value, json};
use svdhub::adapter::{self, Adapter, Mixture};
use svdhub::artifact::Artifact;
use svdhub::assemble::{self, Shares};
use svdhub::base::{Base, card_facts};
use svdhub::card;
use svdhub::chat::ChatTemplate;
use svdhub::event::Silent;
use svdhub::format::{Rank, is_plain_name, parse_section};
use svdhub::hub::server::{Server, ServerOptions};
use svdhub::hub::{Hub, HubOptions, ModelRef};
use svdhub::job::{MATRICES, Options, Share, ShareRecord};
use svdhub::kind::Kind;
use svdhub::model::ModelConfig;
use svdhub::part::{self, Part};
use svdhub::plan::{Pattern, Plan, PlanOptions, expected_inventory};
use svdhub::source::Source;
use svdhub::split::Change;
use svdhub::sum::sha256_hex;
use svdhub::text::{Corpus, LossOn};
use svdhub::weights::checkpoint::{Index, WeightFile};
use svdhub::weights::{Checkpoint, Dtype, Header, Inventory, Layout, Rounder, Rounding};
use svdhub::{decompose, evaluate, generate, html, inspect, merge, plot, report, verify};

/// Whether the input is what the target reads, rather than refused.
pub type Target = fn(&[u8]) -> bool;

pub static ALL: [(&str, Target); 17] = [
    ("header", header),
    ("index", index),
    ("checkpoint", checkpoint),
    ("section", section),
    ("artifact", artifact),
    ("adapter", adapter),
    ("config", config),
    ("model", model),
    ("round_trip", round_trip),
    ("part", part),
    ("spectrum", spectrum),
    ("model_card", model_card),
    ("words", words),
    ("data", data),
    ("generation", generation),
    ("hub", hub),
    ("server", server),
];

// -- files ----------------------------------------------------------------------------------------------------------

/// The header of a weight file: as stored, or its JSON alone.
pub fn header(bytes: &[u8]) -> bool {
    let prefix = match bytes.first() {
        Some(b'{') => prefixed(bytes),
        _ => bytes.to_vec(),
    };
    let Ok(header) = Header::parse(Path::new("x.safetensors"), prefix) else {
        return false;
    };
    check_header(&header);
    true
}

fn check_header(header: &Header) {
    let mut end = header.prefix.len() as u64;
    for entry in &header.entries {
        assert_eq!(entry.offset, end, "tensors follow each other");
        let bits = entry.elements() * entry.dtype.bitsize();
        assert_eq!(entry.bytes as usize * 8, bits, "a tensor is its elements");
        end += entry.bytes;
    }
    assert_eq!(header.file_bytes(), end);
    let described = |h: &Header| -> Vec<_> {
        let entries = h.entries.iter();
        entries
            .map(|e| (e.name.clone(), e.dtype, e.shape.clone(), e.bytes))
            .collect()
    };
    let entries = header.entries.iter();
    let again = Header::compose(entries.map(|e| (e.name.as_str(), e.dtype, e.shape.as_slice())));
    let again = again.expect("what was read can be written");
    assert_eq!(described(&again), described(header));
    let parsed = Header::parse(Path::new("y"), again.prefix.clone()).expect("reads back");
    assert_eq!(parsed, again);
    let name = "added.by.nobody";
    if header.entries.iter().all(|e| e.name != name) {
        let longer = header.with_tensor(name, Dtype::BF16, &[2, 3]);
        let longer = longer.expect("one more tensor fits");
        let (last, before) = longer.entries.split_last().expect("it is there");
        assert_eq!((last.name.as_str(), last.bytes), (name, 12));
        assert_eq!(before.len(), header.entries.len());
        let metadata = ["part", "format", "made"].map(|key| header.metadata(key));
        let kept = ["part", "format", "made"].map(|key| longer.metadata(key));
        for (before, after) in metadata.iter().zip(kept) {
            assert!(before.is_none() || *before == after, "metadata is kept");
        }
    }
}

/// An index, and the headers it is held against.
pub fn index(bytes: &[u8]) -> bool {
    let path = Path::new("m.safetensors.index.json");
    let (mut parsed, mut files) = (None, Vec::new());
    for (name, content) in pieces(bytes) {
        if name == "index" {
            parsed = Index::parse(path, content).ok();
        } else if let Ok(header) = Header::parse(Path::new(name), prefixed(content)) {
            let name = name.into();
            files.push(WeightFile { name, header });
        }
    }
    let Some(index) = parsed else { return false };
    let names = index.files();
    assert!(
        names
            .iter()
            .all(|n| is_plain_name(n) && n.ends_with(".safetensors"))
    );
    assert!(names.is_sorted_by(|a, b| a < b), "each file once");
    let Ok(inventory) = Inventory::new(Path::new("."), files) else {
        return false;
    };
    let fits = index.check(path, &inventory).is_ok();
    if fits {
        assert_eq!(index.weight_map.len(), inventory.entries().count());
        for (file, entry) in inventory.entries() {
            assert_eq!(index.weight_map[&entry.name], file.name);
        }
    }
    fits
}

/// Weight files on disk, read to the last element.
pub fn checkpoint(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let mut opened = false;
    for layout in [Layout::Model, Layout::Decomposition] {
        let Ok(checkpoint) = Checkpoint::open(&dir, layout) else {
            continue;
        };
        for file in &checkpoint.inventory.files {
            assert!(is_plain_name(&file.name));
            opened = true;
            check_header(&file.header);
            let length = fs::metadata(dir.join(&file.name)).expect("is there").len();
            assert_eq!(length, file.header.file_bytes());
        }
        for (_, entry) in checkpoint.inventory.entries() {
            let whole = checkpoint.read(&entry.name).expect("its bytes are there");
            assert_eq!(whole.bytes.len() as u64, entry.bytes);
            let mut joined = Vec::new();
            let read = checkpoint.read_blocks(&entry.name, |block| {
                joined.extend_from_slice(&block.bytes);
                Ok(())
            });
            read.expect("its bytes are there");
            assert_eq!(joined, whole.bytes);
            let finite = checkpoint.read_finite(&entry.name).is_ok();
            assert_eq!(finite, whole.first_not_finite().is_none());
            if let Some((at, _)) = whole.first_not_finite() {
                assert!(at.iter().zip(&whole.shape).all(|(i, extent)| i < extent));
            }
        }
    }
    opened
}

/// The `svd` section of a config.
pub fn section(bytes: &[u8]) -> bool {
    let path = Path::new("config.json");
    let Some(value) = parsed(bytes) else {
        return false;
    };
    let Ok(section) = parse_section(path, &value) else {
        return false;
    };
    assert!(section.base.sha256.keys().all(|name| is_plain_name(name)));
    for record in section.modules.values() {
        assert!(record.q >= 1 && record.q <= record.shape[0].min(record.shape[1]));
    }
    let written = serde_json::to_value(&section).expect("serialises");
    let again = parse_section(path, &written).expect("what was read can be read again");
    assert_eq!(serde_json::to_value(&again).expect("serialises"), written);
    true
}

/// A whole decomposition, and an adapter and a base in the same folder: opened, restored, merged, verified.
pub fn artifact(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let base = || Base::open(&dir, None, None).ok();
    let _ = verify::run(&dir, base().as_ref(), &Silent);
    let Ok(artifact) = Artifact::open(&dir, base()) else {
        return false;
    };
    for (module, record) in &artifact.svd.modules {
        let factors = artifact.factors(module).expect("its shapes were checked");
        assert_eq!(factors.q(), record.q);
        assert_eq!(factors.shape(), (record.shape[0], record.shape[1]));
        if let Ok(matrix) = artifact.restore(module, record, &factors) {
            assert_eq!(matrix.shape, record.shape);
            assert_eq!(sha256_hex(&matrix.bytes), record.sha256);
            let nothing = Change::of_sigma(vec![0.0; record.q]);
            let rounder = Rounder::new(Rounding::Nearest, matrix.dtype, module);
            let (merged, _) = factors.merge(&matrix, None, &nothing, &rounder);
            assert_eq!(merged.bytes, matrix.bytes);
        }
    }
    let Ok(headers) = artifact.base_headers() else {
        return false;
    };
    assert!(headers.iter().all(|(file, _)| is_plain_name(file)));
    let parts = Adapter::open(&dir, &artifact).map(|a| (a, 1.0));
    let mixture = Mixture {
        parts: parts.into_iter().collect(),
    };
    let trained = !mixture.parts.is_empty();
    let source = Source::Decomposition { artifact, mixture };
    let mut merged_all = true;
    for dtype in [None, Some(Dtype::F16)] {
        let options = merge::Options {
            dtype,
            threads: 1,
            ..merge::Options::default()
        };
        let out = emptied("out");
        let merged = merge::run(&source, &out, &options, &Silent);
        merged_all &= merged.is_ok();
        if merged.is_ok() {
            for (file, header) in &headers {
                let merged = Header::read(&out.join(file)).expect("a weight file");
                assert!(merged.entries.len() >= header.entries.len());
            }
        }
    }
    check_rooms();
    merged_all && trained
}

/// An adapter on its own.
pub fn adapter(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let _ = verify::run(&dir, None, &Silent);
    let Ok(read) = Adapter::read(&dir) else {
        return false;
    };
    let copy = Adapter {
        dir: emptied("out"),
        ..read.clone()
    };
    copy.save().expect("what was read can be written");
    let mut again = Adapter::read(&copy.dir).expect("and read again");
    // another order of the same tensors has other sums
    again.config.weights_sha256 = copy.config.weights_sha256.clone();
    again.config.sha256 = copy.config.sha256.clone();
    assert_eq!(again, copy);
    assert!(adapter::is_adapter(&copy.dir));
    true
}

/// A model's config and the options of a plan.
pub fn config(bytes: &[u8]) -> bool {
    let path = Path::new("config.json");
    let (mut model, mut options) = (None, PlanOptions::default());
    for (name, content) in pieces(bytes) {
        match (name, parsed(content)) {
            ("config", Some(value)) => model = ModelConfig::parse(path, &value).ok(),
            ("plan", Some(value)) => {
                options = serde_json::from_value(value).unwrap_or_default();
            }
            _ => {}
        }
    }
    let Some(config) = model else { return false };
    let inventory =
        expected_inventory(&config, Dtype::BF16).expect("what is parsed can be laid out");
    check_header(&inventory.files[0].header);
    let Ok(plan) = Plan::new(path, &config, &inventory, &options) else {
        return false;
    };
    let stored = inventory.entries().count();
    assert!(plan.tensors.len() == stored || plan.tensors.len() == stored + 1);
    for tensor in plan.decomposed() {
        assert!(tensor.q_max >= 1 && tensor.q_max <= tensor.shape[0].min(tensor.shape[1]));
        assert!(tensor.q.is_none_or(|q| q <= tensor.q_max));
    }
    serde_json::to_string(&plan).expect("a plan is printed as JSON");
    true
}

/// A model's config and weights: loaded, and run on a few tokens.
pub fn model(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    fs::write(dir.join("tokenizer.json"), TOKENIZER).expect("writes");
    let data = dir.join("data.txt");
    fs::write(&data, "a b a a b c a a b a").expect("writes");
    let Ok(base) = Base::open(&dir, None, None) else {
        return false;
    };
    let options = evaluate::Options {
        length: 6,
        ..evaluate::Options::default()
    };
    let facts = evaluate::run(
        &Source::Model(base),
        &data.as_path().into(),
        &options,
        &Silent,
    );
    if let Ok(facts) = &facts {
        assert!(facts.loss.is_finite() && facts.tokens == 8);
    }
    facts.is_ok()
}

/// A model with any numbers in it: decomposed, and merged back to the same bytes.
pub fn round_trip(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let Ok(base) = Base::open(&dir, None, None) else {
        return false;
    };
    let options = Options {
        plan: PlanOptions {
            rank: Rank::Fixed(NonZeroUsize::MIN.saturating_add(1)),
            threads: 1,
            ..PlanOptions::default()
        },
        ..Options::default()
    };
    let (split, out) = (emptied("cache"), emptied("out"));
    if decompose::run(&base, &split, &options, &Silent).is_err() {
        return false;
    }
    let artifact = Artifact::open(&split, None).expect("what was written opens");
    let untrained = Source::Decomposition {
        artifact,
        mixture: Mixture::default(),
    };
    let merged = merge::run(&untrained, &out, &merge::Options::default(), &Silent);
    let merged = merged.expect("an untrained decomposition merges");
    assert!(merged.identical_to_base);
    for file in &base.checkpoint.inventory.files {
        let before = fs::read(dir.join(&file.name)).expect("reads");
        assert_eq!(fs::read(out.join(&file.name)).expect("reads"), before);
    }
    true
}

/// A part of a decomposition (`part.json`, `matrices/MODULE`, and the base): read, and assembled.
pub fn part(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let Ok(record) = ShareRecord::read(&dir) else {
        return false;
    };
    assert!((1..=record.part.of).contains(&record.part.number));
    let dtype = record.job.options.plan.storing.factors;
    for module in record.modules.keys() {
        if let Ok(part) = Part::read(&dir.join(MATRICES), module, dtype) {
            let written = serde_json::to_value(&part).expect("serialises");
            let again: Part = serde_json::from_value(written.clone()).expect("reads back");
            assert_eq!(serde_json::to_value(&again).expect("serialises"), written);
        }
    }
    let Ok(shares) = Shares::open(std::slice::from_ref(&dir)) else {
        return false;
    };
    let Ok(base) = Base::open(&dir.join("base"), None, None) else {
        return false;
    };
    let out = emptied("out");
    let assembled = assemble::run(&shares, &base, &out, &Silent).is_ok();
    if assembled {
        Artifact::open(&out, Some(base)).expect("what was assembled opens");
    }
    check_rooms();
    assembled
}

// -- facts and texts ------------------------------------------------------------------------------------------------

/// `config.json` and `report.json` of a decomposition: inspected and drawn.
pub fn spectrum(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let Ok(facts) = inspect::run(&dir, &Silent) else {
        return false;
    };
    let of = &facts.spectrum;
    let page = html::page("x", &facts).expect("whatever is well-formed is drawn");
    for picture in [
        plot::curves(of),
        plot::energy(of),
        plot::stable_rank(of),
        page,
    ] {
        assert!(!picture.contains("<script") && !picture.contains("javascript:"));
        for broken in ["\"NaN", "NaN\"", "\"inf", "inf\"", ",NaN", ",inf"] {
            assert!(!picture.contains(broken), "{broken}");
        }
        assert!(
            picture.len() < (64 << 10) + 64 * bytes.len(),
            "{}",
            picture.len()
        );
    }
    true
}

/// `README.md` of a base and `report.json`: the card that is made from them.
pub fn model_card(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let facts = card_facts(&dir);
    let Ok(mut sections) = report::inherited(&dir) else {
        return false;
    };
    if let Some(Value::Object(decompose)) = sections.get_mut("decompose") {
        decompose.insert("base_card".into(), facts);
    }
    let out = emptied("out");
    report::add(&out, sections.clone(), "fuzzed", &json!([1])).expect("writes");
    let written = report::read(&out).expect("what was written is read");
    for (name, facts) in &sections {
        assert!(
            name == "fuzzed" || name == "tool" || written[name] == *facts,
            "{name}"
        );
    }
    let mut rendered = false;
    for kind in [Kind::Decomposition, Kind::Adapter, Kind::Model] {
        if let Ok(text) = card::render(kind, "me/it", &sections) {
            check_card(&text);
            rendered = true;
        }
    }
    rendered
}

/// What strangers said of their model stays within the lines it was put in.
fn check_card(text: &str) {
    const KEYS: [&str; 11] = [
        "license: ",
        "license_name: ",
        "license_link: ",
        "language: ",
        "library_name: ",
        "pipeline_tag: ",
        "base_model: ",
        "base_model_relation: ",
        "tags:",
        "- ",
        "---",
    ];
    let mut lines = text.split('\n');
    assert_eq!(lines.next(), Some("---"));
    for line in lines.by_ref().take_while(|&line| line != "---") {
        assert!(KEYS.iter().any(|key| line.starts_with(key)), "{line:?}");
        assert!(!line.contains('\r'));
    }
    assert!(
        lines
            .next()
            .is_some_and(|line| line.starts_with(card::MARK))
    );
    assert_eq!(card::state(text), card::State::Rendered);
}

/// Texts of the command line: a pattern, and the name it is held against in the second line.
pub fn words(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let (text, name) = text
        .split_once('\n')
        .unwrap_or((&text, "model.layers.0.mlp.up_proj"));
    for rank in [Rank::fraction(text), Rank::energy(text)]
        .into_iter()
        .flatten()
    {
        for short in [1, 2, 3, 4096] {
            assert!((1..=short).contains(&rank.at_most(short)));
        }
        let stored = serde_json::to_string(&rank).expect("serialises");
        let again: Rank = serde_json::from_str(&stored).expect("reads back");
        assert_eq!(again, rank);
    }
    if let Ok(share) = text.parse::<Share>() {
        assert!((1..=share.of).contains(&share.number));
        assert_eq!(
            share.to_string().parse::<Share>().expect("reads back"),
            share
        );
    }
    if let Ok(model) = text.parse::<ModelRef>() {
        let again: ModelRef = model.to_string().parse().expect("reads back");
        assert_eq!(again, model);
        if let ModelRef::Repo { id, .. } = model {
            assert!(!id.contains("..") && id.matches('/').count() == 1);
        }
    }
    let pattern: Pattern = text.parse().expect("any text is a pattern");
    if text.len() + name.len() < 400 {
        let inside = format!(".{name}.").contains(&format!(".{text}."));
        assert_eq!(
            pattern.matches(name),
            inside || stars(text.as_bytes(), name.as_bytes())
        );
    } else {
        pattern.matches(name);
    }
    true
}

/// Whether `pattern`, whose `*` is any run, is `name`: by the table of all beginnings.
fn stars(pattern: &[u8], name: &[u8]) -> bool {
    let mut fits = vec![false; name.len() + 1];
    fits[0] = true;
    for &p in pattern {
        let mut next = vec![false; name.len() + 1];
        next[0] = p == b'*' && fits[0];
        for (i, &c) in name.iter().enumerate() {
            next[i + 1] = if p == b'*' {
                next[i] || fits[i + 1]
            } else {
                fits[i] && p == c
            };
        }
        fits = next;
    }
    fits[name.len()]
}

/// Every word but `a` is the same.
const TOKENIZER: &str = r##"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
    "pre_tokenizer":{"type":"Whitespace"},"post_processor":null,"decoder":null,
    "model":{"type":"WordLevel","vocab":{"#":0,"a":1},"unk_token":"#"}}"##;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }} {{ m.content }}#{% endfor %}\
    {% if add_generation_prompt %}assistant {% endif %}";

/// Training data: the ending of its name in the first line, then the text.
pub fn data(bytes: &[u8]) -> bool {
    let (ending, text) = match bytes.iter().position(|&b| b == b'\n') {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (&b"txt"[..], bytes),
    };
    let ending = match ending {
        b"jsonl" => "jsonl",
        b"json" => "json",
        _ => "txt",
    };
    let dir = emptied("in");
    let path = dir.join(format!("data.{ending}"));
    fs::write(&path, text).expect("writes");
    fs::write(dir.join("tokenizer.json"), TOKENIZER).expect("writes");
    let config = json!({"model_type": "llama", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 3, "eos_token_id": 2});
    let config = ModelConfig::parse(&path, &config).expect("a config");
    fs::write(dir.join("chat_template.jinja"), TEMPLATE).expect("writes");
    let corpus = Corpus::read(
        &path.as_path().into(),
        &dir,
        &config,
        8,
        LossOn::Answers,
        &Silent,
    );
    if let Ok(corpus) = &corpus {
        assert!(corpus.ids.len() >= 2 && corpus.ids.iter().all(|&id| id < 3));
        let windows = corpus.windows();
        assert!(
            windows
                .iter()
                .all(|w| (2..=8).contains(&w.ids.len()) && w.predicted() > 0)
        );
        assert!(
            windows
                .iter()
                .all(|w| w.predicted() < w.tokens() && w.tokens() <= w.ids.len())
        );
        let full: usize = corpus.full_windows().iter().map(|w| w.ids.len()).sum();
        assert!(full > 0 && full <= corpus.ids.len());
    }
    corpus.is_ok()
}

/// What a model's files say of generation, by their names. Its chat template is read and not run: it is a program.
pub fn generation(bytes: &[u8]) -> bool {
    let dir = laid_out(bytes);
    let template = ChatTemplate::read(&dir);
    let Ok(options) = generate::Options::read(&dir, &Silent) else {
        return false;
    };
    let mut logits = [0.5, -2.0, 3.0, 0.5];
    options.choice.penalise(&mut logits, &[0, 1, 0]);
    let sampling = &options.choice.sampling;
    if logits.iter().all(|logit| logit.is_finite()) {
        let next = sampling.distribution(&logits);
        let sum: f64 = next.iter().map(|(_, p)| p).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sampling:?} makes {next:?}");
        assert!(next.iter().all(|(id, p)| *id < 4 && *p >= 0.0));
    }
    template.is_ok()
}

// -- the Hub --------------------------------------------------------------------------------------------------------

/// What a Hub answers: pieces `revision`, `tree` and `link` (of the listing's next page), and files by their paths.
pub fn hub(bytes: &[u8]) -> bool {
    static CLIENT: OnceLock<Hub> = OnceLock::new();
    let client = CLIENT.get_or_init(|| {
        Hub::new(HubOptions::new(strange_hub(), room().join("cache"))).expect("a client")
    });
    let answers = pieces(bytes).into_iter();
    let answers = answers.map(|(name, content)| (name.to_string(), stored(name, content)));
    *ANSWERS.lock().expect("whole") = answers.collect();
    let cache = emptied("cache");
    if let Ok((_, inventory, commit)) = client.headers("org/name", "main") {
        assert!(commit.len() == 40);
        assert!(inventory.files.iter().all(|file| is_plain_name(&file.name)));
    }
    let found = client.snapshot("org/name", "main", &Silent);
    if let Ok(found) = &found {
        for entry in fs::read_dir(&found.dir).expect("a folder") {
            let path = entry.expect("an entry").path();
            let target = fs::read_link(&path).expect("a link");
            let blob = target.strip_prefix("../../blobs").expect("to a blob");
            let name = blob.to_str().expect("text");
            assert!(name.bytes().all(|b| b.is_ascii_hexdigit()));
            assert!(cache.join("models--org--name/blobs").join(name).is_file());
        }
    }
    check_rooms();
    found.is_ok()
}

static ANSWERS: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::new(BTreeMap::new());

/// A server of [`ANSWERS`]; its address.
fn strange_hub() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(stream));
        }
    });
    format!("http://{address}")
}

/// Answers the requests of one connection until it ends.
fn serve(mut stream: TcpStream) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    loop {
        let request = head(&mut stream)?;
        let path = request.split(' ').nth(1)?;
        let answers = ANSWERS.lock().expect("whole").clone();
        let piece = match path.strip_prefix("/api/models/org/name/") {
            Some(asked) => asked.split('/').next()?.to_string(),
            None => decoded(path.splitn(6, '/').nth(5)?),
        };
        let mut answer = String::new();
        let link = answers.get("link").map(|l| String::from_utf8_lossy(l));
        // each page but the last says where the next one is
        let goes_on = |link: &str| !link.contains(char::is_control) && !link.contains(path);
        if let Some(link) = link.filter(|link| piece == "tree" && goes_on(link)) {
            answer += &format!("link: {}\r\n", link.replace("HUB", request_host(&request)));
        }
        let body = match answers.get(&piece) {
            None => {
                let refused =
                    "HTTP/1.1 404 no\r\nx-error-code: EntryNotFound\r\ncontent-length: 0\r\n\r\n";
                stream.write_all(refused.as_bytes()).ok()?;
                continue;
            }
            Some(body) => body,
        };
        let range = request.split("range: bytes=").nth(1).and_then(|r| {
            let (first, last) = r.split("\r\n").next()?.split_once('-')?;
            let (first, end) = (first.parse().ok()?, body.len());
            let last = last
                .parse()
                .unwrap_or(usize::MAX)
                .min(end.saturating_sub(1));
            let said = format!("content-range: bytes {first}-{last}/{end}\r\n");
            Some((said, body.get(first..=last)?))
        });
        let (status, said, body) = match range {
            Some((said, part)) => (206, said, part),
            None => (200, String::new(), body.as_slice()),
        };
        answer = format!(
            "HTTP/1.1 {status} ok\r\ncontent-length: {}\r\n{said}{answer}\r\n",
            body.len()
        );
        stream.write_all(answer.as_bytes()).ok()?;
        stream.write_all(body).ok()?;
    }
}

fn request_host(request: &str) -> &str {
    let host = request.split("host: ").nth(1).unwrap_or_default();
    host.split("\r\n").next().unwrap_or_default()
}

/// The beginning of an HTTP message, up to its empty line; names of headers in lower case.
fn head(stream: &mut TcpStream) -> Option<String> {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        text.push(byte[0]);
    }
    let text = String::from_utf8(text).ok()?;
    let lines = text.split("\r\n").map(|line| match line.split_once(": ") {
        Some((name, value)) => format!("{}: {value}", name.to_lowercase()),
        None => line.into(),
    });
    Some(lines.collect::<Vec<_>>().join("\r\n"))
}

fn decoded(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match code.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a client asks of the embedded Hub: `METHOD /path` in the first line, then the body.
pub fn server(bytes: &[u8]) -> bool {
    static SERVER: OnceLock<Server> = OnceLock::new();
    let server = SERVER.get_or_init(|| {
        let server = Server::start(&room().join("served"), &ServerOptions::default());
        server.expect("the Hub starts")
    });
    let (line, body) = match bytes.iter().position(|&b| b == b'\n') {
        Some(at) => (&bytes[..at], &bytes[at + 1..]),
        None => (bytes, &b""[..]),
    };
    let words = std::str::from_utf8(line)
        .ok()
        .and_then(|l| l.split_once(' '));
    let Some((method @ ("GET" | "POST" | "PUT" | "DELETE"), path)) = words else {
        return false;
    };
    // what is no address never arrives
    if !path.starts_with('/') || !path.bytes().all(|b| b.is_ascii_graphic()) || path.contains('#') {
        return false;
    }
    let name = br#"{"name": "ada/engine"}"#;
    asked(server, "POST", "/api/repos/create", name);
    let status = asked(server, method, path, body);
    assert!(status != 500, "the Hub refuses, it does not fail");
    if method != "GET" && status < 300 {
        asked(server, "DELETE", "/api/repos/delete", name);
    }
    // small files are where a redirect leads
    status < 400
}

/// Sends a request and returns the answer's status.
fn asked(server: &Server, method: &str, path: &str, body: &[u8]) -> u16 {
    static CONNECTION: Mutex<Option<TcpStream>> = Mutex::new(None);
    let endpoint = server.endpoint();
    let host = endpoint.strip_prefix("http://").expect("an address");
    let mut held = CONNECTION.lock().expect("whole");
    let mut stream = held.take().unwrap_or_else(|| {
        let stream = TcpStream::connect(host).expect("the Hub listens");
        stream.set_nodelay(true).expect("a socket");
        stream
    });
    let length = body.len();
    let kind = if path.contains("paths-info") {
        "application/x-www-form-urlencoded"
    } else {
        "application/json"
    };
    let asked = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer hf_fuzz\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(asked.as_bytes()).expect("the Hub reads");
    stream.write_all(body).expect("the Hub reads");
    let answer = head(&mut stream).expect("every request is answered");
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok());
    let length = answer.split("content-length: ").nth(1);
    let length = length.and_then(|l| l.split("\r\n").next()?.parse().ok());
    let mut content = vec![0; length.expect("answers tell their length")];
    stream
        .read_exact(&mut content)
        .expect("the answer is whole");
    if !answer.contains("connection: close") {
        *held = Some(stream);
    }
    status.expect("a status")
}

// -- pieces ---------------------------------------------------------------------------------------------------------

/// The pieces of an input: their names and contents.
fn pieces(bytes: &[u8]) -> Vec<(&str, &[u8])> {
    const MARK: &[u8] = b"\n%% ";
    let mut pieces = Vec::new();
    let mut rest = bytes.strip_prefix(&MARK[1..]);
    while let Some(piece) = rest {
        let end = piece.windows(MARK.len()).position(|w| w == MARK);
        let (piece, after) = match end {
            Some(end) => (&piece[..end], Some(&piece[end + MARK.len()..])),
            None => (piece.strip_suffix(b"\n").unwrap_or(piece), None),
        };
        if let Some(at) = piece.iter().position(|&b| b == b'\n')
            && let Ok(name) = std::str::from_utf8(&piece[..at])
        {
            pieces.push((name, &piece[at + 1..]));
        }
        rest = after;
    }
    pieces
}

/// Writes the pieces of an input as files.
fn laid_out(bytes: &[u8]) -> PathBuf {
    let dir = emptied("in");
    for (name, content) in pieces(bytes) {
        let path = match name.split_once('/') {
            None => dir.join(name),
            Some((MATRICES, module)) => part::path_of(&dir.join(MATRICES), module),
            Some(("base", file)) => dir.join("base").join(file),
            Some(_) => continue,
        };
        let file = path
            .file_name()
            .and_then(|f| f.to_str())
            .unwrap_or_default();
        // the harness itself must not write elsewhere
        let plain = file
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        let below = path.parent().is_some_and(|folder| {
            folder == dir || folder == dir.join(MATRICES) || folder == dir.join("base")
        });
        if !plain || !below || file.is_empty() || file.len() > 100 {
            continue;
        }
        let content = stored(file, content);
        // a piece may have the name of a folder
        let _ = fs::create_dir_all(path.parent().expect("a folder"));
        let _ = fs::write(&path, content);
    }
    dir
}

/// What a file of this name holds.
fn stored(name: &str, content: &[u8]) -> Vec<u8> {
    match content.first() {
        Some(b'{') if name.ends_with(".safetensors") => weight_file(content),
        _ => content.to_vec(),
    }
}

/// A weight file from its header in a line of JSON and its tensors, of which zeros may be missing.
fn weight_file(content: &[u8]) -> Vec<u8> {
    const PADDING_MAX: u64 = 1 << 20;
    let end = content
        .iter()
        .position(|&b| b == b'\n')
        .unwrap_or(content.len());
    let mut file = prefixed(&content[..end]);
    let wanted = Header::parse(Path::new("x"), file.clone()).map_or(0, |h| h.file_bytes());
    file.extend_from_slice(content.get(end + 1..).unwrap_or_default());
    if (file.len() as u64..PADDING_MAX).contains(&wanted) {
        file.resize(wanted as usize, 0);
    }
    file
}

fn prefixed(json: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json].concat()
}

fn parsed(bytes: &[u8]) -> Option<Value> {
    serde_json::from_slice(bytes).ok()
}

/// Where the targets work.
fn room() -> &'static Path {
    static ROOM: OnceLock<PathBuf> = OnceLock::new();
    ROOM.get_or_init(|| {
        let room = std::env::temp_dir().join(format!("svdhub-fuzz-{}", std::process::id()));
        fs::create_dir_all(&room).expect("creates");
        room
    })
}

const ROOMS: [&str; 4] = ["in", "out", "cache", "served"];

/// An empty folder in [`room`].
fn emptied(name: &str) -> PathBuf {
    let dir = room().join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).expect("creates");
    dir
}

/// Nothing was written beside the folders that were given.
fn check_rooms() {
    for entry in fs::read_dir(room()).expect("lists") {
        let name = entry.expect("an entry").file_name();
        assert!(ROOMS.iter().any(|room| name == *room), "{name:?}");
    }
}
