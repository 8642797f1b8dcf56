#![doc = include_str!("format/SPEC.md")]

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::Path;
use std::str::FromStr;

use ndarray::Array2;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::json::Tool;
use crate::linalg::{Algorithm, Certificate, Route, TOLERANCES};
use crate::sum::is_hex;
use crate::weights::checkpoint::is_plain_file_name;
use crate::weights::{Dtype, Elements};

/// The version of the `svd` section this build writes. Older ones are read, newer ones refused.
///
/// 1: ranks by `fraction` and `fixed`. 2: also by `energy` and `budget`; a module may be `tied_to` the weight it copies.
/// 3: `factors` names the dtype of u and v; `nested_in` the decomposition of which this one is the beginning.
pub const SCHEMA: u32 = 3;

/// The base's `config.json` and index, byte for byte: merging gives them back.
pub const BASE_CONFIG: &str = "base_config.json";
pub const BASE_INDEX: &str = "base_index.json";

/// Tensors of the artifact that hold the header of one base file, so that merging can write the very same file.
const BASE_HEADER: &str = "base_header/";

/// What an artifact stores of each weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArtifactLayout {
    /// M′, u, σ, v and all other tensors: self-contained.
    #[default]
    Residual,
    /// u, σ and v: small, M comes from the pinned base.
    Sidecar,
}

/// The dtype of u and v; σ is f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FactorsDtype {
    #[default]
    F32,
    /// Half the size; the vectors are orthonormal to some 2⁻⁹ then. M comes back exactly all the same.
    Bf16,
}

impl FactorsDtype {
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// Vectors as they come back once they were stored.
    pub fn round(self, vectors: Array2<f32>) -> Array2<f32> {
        match self {
            Self::F32 => vectors,
            Self::Bf16 => vectors.mapv_into(|x| half::bf16::from_f32(x).to_f32()),
        }
    }

    /// Of one element.
    pub fn bytes(self) -> u64 {
        (self.dtype().bitsize() / 8) as u64
    }
}

impl fmt::Display for FactorsDtype {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        out.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for FactorsDtype {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(Error::Parse {
                what: "a dtype of factors",
                value: text.into(),
                reason: "expected f32 or bf16".into(),
            }),
        }
    }
}

impl FromStr for ArtifactLayout {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "residual" => Ok(Self::Residual),
            "sidecar" => Ok(Self::Sidecar),
            _ => Err(Error::Parse {
                what: "a layout",
                value: text.into(),
                reason: "expected residual or sidecar".into(),
            }),
        }
    }
}

/// What an artifact stores of each weight, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Storing {
    pub layout: ArtifactLayout,
    #[serde(default)]
    pub factors: FactorsDtype,
}

/// The `svd` section of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SvdSection {
    pub schema: u32,
    pub layout: ArtifactLayout,
    #[serde(default)]
    pub factors: FactorsDtype,
    pub base: Pin,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_in: Option<Origin>,
    pub rank: Rank,
    pub algorithm: Algorithm,
    pub modules: BTreeMap<String, ModuleRecord>,
    pub tool: Tool,
}

/// Exactly which decomposition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    pub repo: Option<String>,
    pub revision: Option<String>,
    /// Of its index file, which names the sha256 of everything else.
    pub content_sha256: String,
}

/// What rounding the vectors to bf16 does to their lengths and angles, at most: 2⁻⁸ to each number, twice that to squares.
const BF16_TOLERANCE: f64 = 1.0 / 127.0;

impl SvdSection {
    /// Whether the stored triplets, looked at anew, are what this section promises.
    pub fn accepts(&self, certificate: &Certificate) -> bool {
        match self.factors {
            FactorsDtype::F32 => self.algorithm.accepts(certificate),
            FactorsDtype::Bf16 => {
                certificate.are_consistent(self.algorithm.tolerance + BF16_TOLERANCE)
            }
        }
    }

    /// Whether vectors that are so far from orthonormal are still what this section promises.
    pub fn are_orthonormal(&self, orthogonality: f64) -> bool {
        orthogonality
            <= match self.factors {
                FactorsDtype::F32 => self.algorithm.tolerance,
                FactorsDtype::Bf16 => self.algorithm.tolerance + BF16_TOLERANCE,
            }
    }
}

/// Exactly which model was decomposed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// `None` for a model that was a local directory.
    pub repo: Option<String>,
    /// The commit, 40 hex digits.
    pub revision: Option<String>,
    /// Of each weight file.
    pub sha256: BTreeMap<String, String>,
}

/// What is known of one decomposed weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleRecord {
    pub q: usize,
    /// (m, n) = (out, in)
    pub shape: [usize; 2],
    /// The base's dtype, which merging gives back.
    pub dtype: String,
    pub bias: bool,
    /// Of a head that was untied: the module whose weight in the base it is a copy of.
    pub tied_to: Option<String>,
    /// Σσ² of the kept triplets over ‖M‖²
    pub captured_energy: f64,
    /// ‖M′‖, Frobenius
    pub residual_norm: f64,
    pub sigma_max: f32,
    pub sigma_min: f32,
    pub route: Route,
    pub certificate: Certificate,
    /// Elements stored exactly beside M′.
    pub exceptions: u64,
    /// Of M's bytes.
    pub sha256: String,
}

/// Names of the tensors that hold one module.
pub struct ModuleTensors {
    pub residual: String,
    pub u: String,
    pub sigma: String,
    pub v: String,
    pub exact_at: String,
    pub exact: String,
}

impl ModuleTensors {
    pub fn of(module: &str) -> Self {
        Self {
            residual: format!("{module}.residual"),
            u: format!("{module}.u"),
            sigma: format!("{module}.sigma"),
            v: format!("{module}.v"),
            exact_at: format!("{module}.exact_index"),
            exact: format!("{module}.exact_value"),
        }
    }

    /// All of them.
    pub fn all(self) -> [String; 6] {
        [
            self.residual,
            self.u,
            self.sigma,
            self.v,
            self.exact_at,
            self.exact,
        ]
    }
}

/// The name under which the header of a base file is kept.
pub fn base_header_tensor(file: &str) -> String {
    format!("{BASE_HEADER}{file}")
}

/// Whether a tensor of an artifact is the header of a base file.
pub fn is_base_header(tensor: &str) -> bool {
    tensor.starts_with(BASE_HEADER)
}

/// Says in a model's config that its head is a weight of its own.
pub fn untie(config: &mut Value) {
    config["tie_word_embeddings"] = false.into();
}

/// How many singular triplets of each weight are kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mode", content = "value", rename_all = "kebab-case")]
pub enum Rank {
    /// q = ⌊f·min(m, n)⌋, at least 1
    Fraction(f64),
    /// q = min(r, min(m, n))
    Fixed(NonZeroUsize),
    /// The smallest q with Σσ² ≥ E·‖M‖²
    Energy(f64),
    /// The so many largest singular values of the whole model, at least one of each weight.
    Budget(u64),
}

impl Default for Rank {
    fn default() -> Self {
        Self::Fraction(0.1)
    }
}

impl Rank {
    /// q for a matrix whose shorter side is `short`; `None` where it depends on the numbers in the matrix.
    pub fn known(self, short: usize) -> Option<usize> {
        match self {
            Self::Fraction(f) => Some(((f * short as f64).floor() as usize).clamp(1, short)),
            Self::Fixed(r) => Some(r.get().min(short)),
            Self::Energy(_) | Self::Budget(_) => None,
        }
    }

    /// The most that q can be for a matrix whose shorter side is `short`.
    pub fn at_most(self, short: usize) -> usize {
        match self {
            Self::Fraction(_) | Self::Fixed(_) => self.known(short).unwrap_or(short),
            // the leading ⌈E·short⌉ of descending values hold no less than the mean share
            Self::Energy(share) => ((share * short as f64).ceil() as usize).clamp(1, short),
            Self::Budget(total) => usize::try_from(total).map_or(short, |total| total.min(short)),
        }
    }

    fn check(self) -> Result<(), String> {
        match self {
            Self::Fraction(share) | Self::Energy(share) if !is_share(share) => {
                Err(format!("gives `rank` the share {share}"))
            }
            _ => Ok(()),
        }
    }

    /// Parses a share of the full rank.
    pub fn fraction(text: &str) -> Result<Self> {
        share("a rank fraction", text).map(Self::Fraction)
    }

    /// Parses a share of ‖M‖².
    pub fn energy(text: &str) -> Result<Self> {
        share("a share of the energy", text).map(Self::Energy)
    }
}

fn is_share(share: f64) -> bool {
    share > 0.0 && share <= 1.0
}

/// A number above 0 and at most 1.
fn share(what: &'static str, text: &str) -> Result<f64> {
    let refuse = |reason: &str| Error::Parse {
        what,
        value: text.into(),
        reason: reason.into(),
    };
    let share: f64 = text.parse().map_err(|_| refuse("it is not a number"))?;
    if is_share(share) {
        Ok(share)
    } else {
        Err(refuse("it must be above 0 and at most 1"))
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Fraction(f) => write!(out, "fraction {f}"),
            Self::Fixed(r) => write!(out, "rank {r}"),
            Self::Energy(share) => write!(out, "energy {share}"),
            Self::Budget(total) => write!(out, "budget {total}"),
        }
    }
}

/// What the index keeps beside the map: hashes of every file and every tensor.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sums {
    pub files: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, String>,
}

/// Reads the `svd` section of the `config.json` at `path`.
pub fn parse_section(path: &Path, section: &Value) -> Result<SvdSection> {
    let refuse = |reason: String| Error::SvdSection {
        path: path.into(),
        reason,
    };
    match section["schema"].as_u64() {
        Some(schema) if schema > u64::from(SCHEMA) => {
            return Err(refuse(format!(
                "has schema {schema}, this build reads up to {SCHEMA}: a newer svdhub wrote it"
            )));
        }
        Some(_) => {}
        None => return Err(refuse("has no `schema` number".into())),
    }
    let section: SvdSection =
        serde_json::from_value(section.clone()).map_err(|e| refuse(e.to_string()))?;
    section.base.check().map_err(&refuse)?;
    section.rank.check().map_err(&refuse)?;
    let tolerance = section.algorithm.tolerance;
    if !TOLERANCES.contains(&tolerance) {
        return Err(refuse(format!("promises values to {tolerance:e}")));
    }
    if let Some(origin) = &section.nested_in {
        check_origin(origin).map_err(&refuse)?;
    }
    for (module, record) in &section.modules {
        record.check(module).map_err(&refuse)?;
    }
    Ok(section)
}

impl ModuleRecord {
    /// Refuses a shape that no weight has, a rank that its shape has not, and singular values that are none.
    pub fn check(&self, module: &str) -> Result<(), String> {
        let [m, n] = self.shape;
        if m.checked_mul(n).is_none_or(|elements| elements >= 1 << 48) {
            return Err(format!("gives module `{module}` the shape {m} × {n}"));
        }
        if self.q == 0 || self.q > m.min(n) {
            let q = self.q;
            return Err(format!("gives module `{module}` ({m} × {n}) the rank {q}"));
        }
        if !is_hex(&self.sha256, 64) {
            let sum = &self.sha256;
            return Err(format!("gives module `{module}` the sha256 `{sum}`"));
        }
        // 1e300 is a number in JSON, and infinite in 32 bits
        let mut sigma = [self.sigma_max, self.sigma_min].into_iter();
        if let Some(beyond) = sigma.find(|sigma| !sigma.is_finite()) {
            return Err(format!(
                "gives module `{module}` the singular value {beyond}"
            ));
        }
        Ok(())
    }
}

impl Pin {
    /// The base in words.
    pub fn describe(&self) -> String {
        match (&self.repo, &self.revision) {
            (Some(repo), Some(revision)) => format!("{repo}@{revision}"),
            (Some(repo), None) => repo.clone(),
            _ => "(a local directory)".into(),
        }
    }

    /// A pin comes from strangers: its file names become files, its repository a request.
    pub fn check(&self) -> Result<(), String> {
        if self.sha256.is_empty() {
            return Err("names no file of its base".into());
        }
        for (file, sum) in &self.sha256 {
            if !is_plain_file_name(file) {
                return Err(format!(
                    "names the base file `{file}`, which is not a plain file name"
                ));
            }
            if !is_hex(sum, 64) {
                return Err(format!("gives `{file}` the sha256 `{sum}`"));
            }
        }
        if let Some(revision) = self.revision.as_ref().filter(|r| !is_hex(r, 40)) {
            return Err(format!(
                "pins its base at `{revision}`, which is not a commit"
            ));
        }
        match &self.repo {
            Some(repo) if !is_repo_id(repo) => Err(format!("names the base `{repo}`")),
            _ => Ok(()),
        }
    }
}

fn check_origin(origin: &Origin) -> Result<(), String> {
    if !is_hex(&origin.content_sha256, 64) {
        return Err(format!(
            "is nested in a decomposition with the sha256 `{}`",
            origin.content_sha256
        ));
    }
    if let Some(revision) = origin.revision.as_ref().filter(|r| !is_hex(r, 40)) {
        return Err(format!(
            "is nested in a decomposition at `{revision}`, which is not a commit"
        ));
    }
    match &origin.repo {
        Some(repo) if !is_repo_id(repo) => Err(format!("is nested in `{repo}`")),
        _ => Ok(()),
    }
}

/// A file name without any path in it.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

/// Whether a text has the form `org/name` of a Hub id.
pub fn is_repo_id(text: &str) -> bool {
    let part = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && !s.contains("..")
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/')
        .is_some_and(|(org, name)| part(org) && part(name))
}

/// Positions as stored: u32 where they fit, u64 beyond.
pub fn positions(stored: &Elements) -> Vec<u64> {
    match stored.dtype {
        Dtype::U64 => stored
            .bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&b| u64::from_le_bytes(b))
            .collect(),
        _ => stored
            .bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&b| u32::from_le_bytes(b).into())
            .collect(),
    }
}

/// The inverse of [`positions`].
pub fn stored_positions(positions: &[u64], elements: usize) -> Elements {
    let shape = vec![positions.len()];
    if u32::try_from(elements).is_ok() {
        // every position is below `elements`, which fits
        let bytes: Vec<[u8; 4]> = positions
            .iter()
            .map(|&at| (at as u32).to_le_bytes())
            .collect();
        Elements {
            dtype: Dtype::U32,
            shape,
            bytes: bytes.into_flattened(),
        }
    } else {
        let bytes = positions.iter().flat_map(|at| at.to_le_bytes()).collect();
        Elements {
            dtype: Dtype::U64,
            shape,
            bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(section: &Value) -> Result<SvdSection> {
        parse_section(Path::new("config.json"), section)
    }

    #[test]
    fn a_section_of_the_first_schema_is_still_read() {
        // as version 0.1.0 wrote it for one matrix of the fixture model
        let section: Value =
            serde_json::from_str(include_str!("../fixtures/svd-section-schema-1.json"))
                .expect("JSON");
        assert_eq!(section["schema"], 1);
        let read = parse(&section).expect("reads");
        assert_eq!(
            read.rank,
            Rank::Fixed(NonZeroUsize::new(2).expect("not zero"))
        );
        let record = &read.modules["model.layers.0.self_attn.k_proj"];
        assert_eq!((record.q, record.shape), (2, [64, 128]));
        assert_eq!(record.tied_to, None);
    }

    #[test]
    fn a_section_of_the_second_schema_is_still_read() {
        // as schema 2 wrote it: --energy 0.6 --untie-head, of one matrix and the head
        let section: Value =
            serde_json::from_str(include_str!("../fixtures/svd-section-schema-2.json"))
                .expect("JSON");
        assert_eq!(section["schema"], 2);
        let read = parse(&section).expect("reads");
        assert_eq!(
            (read.rank, read.factors),
            (Rank::Energy(0.6), FactorsDtype::F32)
        );
        let head = &read.modules["lm_head"];
        assert_eq!(head.tied_to.as_deref(), Some("model.embed_tokens"));
        assert!(head.certificate.tail.is_some());
    }

    /// What the published schema says of a section.
    fn schema_accepts(section: &Value) -> bool {
        let schema: Value =
            serde_json::from_str(include_str!("format/svd-section.schema.json")).expect("JSON");
        jsonschema::draft202012::new(&schema)
            .expect("a schema")
            .is_valid(section)
    }

    #[test]
    fn the_published_schema_accepts_what_is_read_and_refuses_what_is_refused() {
        let mut third: Value =
            serde_json::from_str(include_str!("../fixtures/svd-section-schema-2.json"))
                .expect("JSON");
        third["schema"] = 3.into();
        third["factors"] = "bf16".into();
        third["nested_in"] =
            json!({"repo": "a/b", "revision": "0".repeat(40), "content_sha256": "1".repeat(64)});
        third["algorithm"]["fast"] = true.into();
        let first = serde_json::from_str(include_str!("../fixtures/svd-section-schema-1.json"));
        let second = serde_json::from_str(include_str!("../fixtures/svd-section-schema-2.json"));
        for section in [first.expect("JSON"), second.expect("JSON"), third.clone()] {
            assert!(
                parse(&section).is_ok() && schema_accepts(&section),
                "{section}"
            );
            // what is written back is what the schema says too
            let written = serde_json::to_value(parse(&section).expect("reads")).expect("JSON");
            assert!(schema_accepts(&written), "{written}");
        }
        let module = "/modules/model.layers.0.self_attn.k_proj";
        for (at, key, value) in [
            ("", "another", json!(1)),
            ("", "schema", json!(4)),
            ("", "schema", json!("3")),
            ("", "layout", json!("sideways")),
            ("", "factors", json!("f16")),
            ("", "nested_in", json!({"repo": null})),
            (
                "",
                "nested_in",
                json!({"repo": null, "revision": null, "content_sha256": "short"}),
            ),
            ("", "modules", json!([])),
            ("/base", "sha256", json!({})),
            (
                "/base",
                "sha256",
                json!({"../x.safetensors": "1".repeat(64)}),
            ),
            (
                "/base",
                "sha256",
                json!({"model.safetensors": "1".repeat(63)}),
            ),
            ("/base", "revision", json!("main")),
            ("/base", "repo", json!("../../etc")),
            ("/base", "branch", json!("main")),
            ("/rank", "mode", json!("some")),
            ("/rank", "value", json!("0.1")),
            ("/algorithm", "tolerance", json!(null)),
            ("/algorithm", "magic", json!(1)),
            ("/tool", "name", json!(7)),
            (module, "q", json!(0)),
            (module, "q", json!(-1)),
            (module, "shape", json!([64])),
            (module, "shape", json!([64, 128, 1])),
            (module, "dtype", json!(16)),
            (module, "bias", json!("no")),
            (module, "route", json!("guess")),
            (module, "exceptions", json!(-1)),
            (module, "sha256", json!("")),
            (module, "certificate", json!({})),
            (
                module,
                "certificate",
                json!({"residual": 0.0, "orthogonality": 0.0, "x": 0.0}),
            ),
        ] {
            let mut section = third.clone();
            section.pointer_mut(at).expect("a place")[key] = value.clone();
            assert!(
                !schema_accepts(&section),
                "the schema accepts {key}: {value}"
            );
            assert!(
                parse(&section).is_err(),
                "the parser accepts {key}: {value}"
            );
        }
        for missing in [
            "schema",
            "layout",
            "base",
            "rank",
            "algorithm",
            "modules",
            "tool",
        ] {
            let mut section = third.clone();
            section.as_object_mut().expect("an object").remove(missing);
            assert!(
                !schema_accepts(&section) && parse(&section).is_err(),
                "{missing}"
            );
        }
    }

    #[test]
    fn every_mode_of_rank_is_written_and_read_and_a_newer_schema_refused() {
        let mut section: Value =
            serde_json::from_str(include_str!("../fixtures/svd-section-schema-1.json"))
                .expect("JSON");
        for (rank, stored) in [
            (
                Rank::Fraction(0.25),
                json!({"mode": "fraction", "value": 0.25}),
            ),
            (Rank::Energy(0.9), json!({"mode": "energy", "value": 0.9})),
            (
                Rank::Budget(5_000_000_000),
                json!({"mode": "budget", "value": 5_000_000_000u64}),
            ),
        ] {
            assert_eq!(serde_json::to_value(rank).expect("serialises"), stored);
            section["schema"] = SCHEMA.into();
            section["rank"] = stored;
            assert_eq!(parse(&section).expect("reads").rank, rank);
        }
        section["schema"] = (SCHEMA + 1).into();
        let error = parse(&section).expect_err("refused").to_string();
        assert!(error.contains("newer"), "{error}");
    }

    #[test]
    fn positions_beyond_thirty_two_bits_come_back() {
        // of a 1,048,576 × 8,192 head: 2³³ elements, its last position beyond u32
        let elements = 1_048_576usize * 8_192;
        let at = [0, u64::from(u32::MAX), 1 << 32, (1 << 33) - 1];
        let stored = stored_positions(&at, elements);
        assert_eq!((stored.dtype, stored.bytes.len()), (Dtype::U64, 4 * 8));
        assert_eq!(positions(&stored), at);
        // of a 262,144 × 8,192 head: beyond i32, within u32
        let at = [1 << 31, (1 << 31) + 7];
        let stored = stored_positions(&at, (1 << 31) + 8);
        assert_eq!((stored.dtype, stored.bytes.len()), (Dtype::U32, 2 * 4));
        assert_eq!(positions(&stored), at);
    }

    #[test]
    fn a_share_of_the_energy_bounds_the_rank() {
        let energy = Rank::energy("0.5").expect("parses");
        assert_eq!(
            (energy.known(7), energy.at_most(7), energy.at_most(1)),
            (None, 4, 1)
        );
        assert_eq!(Rank::Energy(1.0).at_most(7), 7);
        assert_eq!(Rank::Budget(5).at_most(7), 5);
        assert_eq!(Rank::Budget(u64::MAX).at_most(7), 7);
        for bad in ["0", "1.01", "nan", "-1", "much"] {
            assert!(Rank::energy(bad).is_err(), "{bad}");
        }
    }
}
