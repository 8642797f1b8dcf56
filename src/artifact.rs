//! A decomposition on disk: the `svd` section of `config.json`, the shards, and how a weight comes back out of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::base::Base;
use crate::error::{Error, IoContext, Result};
use crate::event::Observer;
use crate::json::{self, Tool};
use crate::linalg::{Algorithm, Certificate, Route};
use crate::plan::Rank;
use crate::split::{Factors, Residual};
use crate::weights::checkpoint::{Index, is_plain_file_name};
use crate::weights::shard::sha256_hex;
use crate::weights::{Checkpoint, Dtype, Elements, Header, Layout, dtype_name};

/// The version of the `svd` section this build writes. Older ones are read, newer ones refused.
pub const SCHEMA: u32 = 1;

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

/// The `svd` section of `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SvdSection {
    pub schema: u32,
    pub layout: ArtifactLayout,
    pub base: Pin,
    pub rank: Rank,
    pub algorithm: Algorithm,
    pub modules: BTreeMap<String, ModuleRecord>,
    pub tool: Tool,
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

/// An opened decomposition.
#[derive(Debug)]
pub struct Artifact {
    pub dir: PathBuf,
    /// `config.json` as it stands, `svd` section included.
    pub config: Value,
    pub svd: SvdSection,
    pub checkpoint: Checkpoint,
    /// The sha256 of the index file, which names the sha256 of everything else: what an adapter pins.
    pub content_sha256: String,
    /// What the index says of every file and tensor.
    pub sums: Sums,
    /// Of a sidecar: where M and the other tensors come from.
    base: Option<Base>,
}

/// Whether a directory holds a decomposition (rather than a plain model).
pub fn is_artifact(dir: &Path) -> bool {
    dir.join(Layout::Decomposition.index_file()).exists()
}

/// What the index keeps beside the map: hashes of every file and every tensor.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sums {
    pub files: BTreeMap<String, String>,
    pub tensors: BTreeMap<String, String>,
}

impl Artifact {
    /// Opens a decomposition and checks headers, index and `svd` section against each other.
    ///
    /// A sidecar needs `base`; it is checked by its pinned hashes only when tensors are verified.
    pub fn open(dir: &Path, base: Option<Base>) -> Result<Self> {
        let index_path = dir.join(Layout::Decomposition.index_file());
        let config_path = dir.join("config.json");
        if !config_path.exists() {
            return Err(Error::NotAModel {
                path: dir.into(),
                missing: "config.json".into(),
            });
        }
        let config: Value = json::read(&config_path)?;
        if config["svd"].is_null() {
            return Err(Error::NotAnArtifact { path: dir.into() });
        }
        let svd = parse_section(&config_path, &config["svd"])?;
        if !index_path.exists() {
            return Err(Error::NotAModel {
                path: dir.into(),
                missing: Layout::Decomposition.index_file(),
            });
        }
        let checkpoint = Checkpoint::open(dir, Layout::Decomposition)?;
        let index = std::fs::read(&index_path).context("read", &index_path)?;
        let metadata = Index::parse(&index_path, &index)?.metadata;
        let sums: Sums = json::interpret(&index_path, metadata["sha256"].clone())?;
        let mut named = sums.files.keys();
        if let Some(name) = named.find(|name| !is_plain_name(name)) {
            return Err(Error::UnsafeName {
                index: index_path,
                name: name.clone(),
            });
        }
        let artifact = Self {
            dir: dir.into(),
            config,
            svd,
            checkpoint,
            content_sha256: sha256_hex(&index),
            sums,
            base,
        };
        artifact.check_shapes()?;
        Ok(artifact)
    }

    fn check_shapes(&self) -> Result<()> {
        for (module, record) in &self.svd.modules {
            let names = ModuleTensors::of(module);
            let [m, n] = record.shape;
            let mut expected = vec![
                (names.u, vec![record.q, m]),
                (names.sigma, vec![record.q]),
                (names.v, vec![record.q, n]),
            ];
            if self.svd.layout == ArtifactLayout::Residual {
                expected.push((names.residual, vec![m, n]));
            }
            for (tensor, expected) in expected {
                let path = self.checkpoint.path_of(&tensor);
                match self.checkpoint.inventory.get(&tensor) {
                    None => return Err(Error::TensorMissing { tensor, path }),
                    Some((_, entry)) if entry.shape != expected => {
                        return Err(Error::Shape {
                            tensor,
                            path,
                            expected,
                            found: entry.shape.clone(),
                        });
                    }
                    Some((_, entry)) if entry.dtype != Dtype::F32 => {
                        return Err(Error::Dtype {
                            tensor,
                            path,
                            expected: "F32".into(),
                            found: dtype_name(entry.dtype),
                        });
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    /// The singular triplets of a module.
    pub fn factors(&self, module: &str) -> Result<Factors> {
        let names = ModuleTensors::of(module);
        let (u, v) = (self.matrix(&names.u)?, self.matrix(&names.v)?);
        let sigma = Array1::from_vec(self.checkpoint.read(&names.sigma)?.to_f32());
        Ok(Factors { u, sigma, v })
    }

    fn matrix(&self, tensor: &str) -> Result<Array2<f32>> {
        let elements = self.checkpoint.read(tensor)?;
        let (rows, columns) = (elements.shape[0], elements.shape[1]);
        Ok(Array2::from_shape_vec((rows, columns), elements.to_f32())
            .expect("shapes were checked on opening"))
    }

    /// The base's tensor of that name, byte for byte: M of a module, or a tensor that was carried along.
    pub fn base_tensor(&self, tensor: &str) -> Result<Elements> {
        if self.svd.layout == ArtifactLayout::Sidecar {
            return self.need_base()?.checkpoint.read_finite(tensor);
        }
        match self.module_of(tensor) {
            Some((module, record)) => self.restore(module, record, &self.factors(module)?),
            None => {
                let elements = self.checkpoint.read_finite(tensor)?;
                let expected = self.sums.tensors.get(tensor);
                self.check_sum(tensor, &elements, expected.map(String::as_str))?;
                Ok(elements)
            }
        }
    }

    fn check_sum(&self, tensor: &str, elements: &Elements, expected: Option<&str>) -> Result<()> {
        let found = sha256_hex(&elements.bytes);
        if expected == Some(found.as_str()) {
            return Ok(());
        }
        Err(Error::Checksum {
            what: format!("tensor `{tensor}`"),
            path: self.checkpoint.path_of(tensor),
            expected: expected.unwrap_or("(none in the index)").into(),
            found,
        })
    }

    /// The module whose weight a tensor is, if it is decomposed.
    pub fn module_of<'a>(&self, tensor: &'a str) -> Option<(&'a str, &ModuleRecord)> {
        let module = tensor.strip_suffix(".weight")?;
        Some((module, self.svd.modules.get(module)?))
    }

    /// M of a module, byte for byte, with factors that are at hand already.
    pub fn restore(
        &self,
        module: &str,
        record: &ModuleRecord,
        factors: &Factors,
    ) -> Result<Elements> {
        let tensor = format!("{module}.weight");
        let matrix = if self.svd.layout == ArtifactLayout::Sidecar {
            self.need_base()?.checkpoint.read(&tensor)?
        } else {
            self.recompose(module, record, factors)?
        };
        self.check_sum(&tensor, &matrix, Some(&record.sha256))?;
        if matrix.shape != record.shape {
            return Err(Error::Shape {
                tensor,
                path: self.checkpoint.path_of(&format!("{module}.u")),
                expected: record.shape.to_vec(),
                found: matrix.shape,
            });
        }
        Ok(matrix)
    }

    /// M from M′, u, σ and v.
    fn recompose(
        &self,
        module: &str,
        record: &ModuleRecord,
        factors: &Factors,
    ) -> Result<Elements> {
        let names = ModuleTensors::of(module);
        let dtype = self.dtype_of(module, record)?;
        let width = dtype.bitsize() / 8;
        let (mut exact_at, mut exact) = (Vec::new(), Vec::new());
        if record.exceptions > 0 {
            exact_at = positions(&self.checkpoint.read(&names.exact_at)?);
            exact = self.checkpoint.read(&names.exact)?.bytes;
            let elements = (record.shape[0] * record.shape[1]) as u64;
            let sound = exact_at.len() * width == exact.len()
                && exact_at.last().is_none_or(|&at| at < elements)
                && exact_at.is_sorted()
                && exact_at.len() as u64 == record.exceptions;
            if !sound {
                return Err(Error::SvdSection {
                    path: self.checkpoint.path_of(&names.exact_at),
                    reason: format!(
                        "does not fit the tensors `{}` and `{}`",
                        names.exact_at, names.exact
                    ),
                });
            }
        }
        let residual = Residual {
            values: self.checkpoint.read(&names.residual)?.to_f32(),
            exact_at,
            exact,
        };
        Ok(factors.restore(&residual, dtype))
    }

    /// The header of every base file, in the base's order of files.
    pub fn base_headers(&self) -> Result<Vec<(String, Header)>> {
        if self.svd.layout == ArtifactLayout::Sidecar {
            let base = self.need_base()?;
            return Ok(base
                .checkpoint
                .inventory
                .files
                .iter()
                .map(|file| (file.name.clone(), file.header.clone()))
                .collect());
        }
        self.svd
            .base
            .sha256
            .keys()
            .map(|file| {
                let name = base_header_tensor(file);
                let stored = self.checkpoint.read(&name)?;
                let header = Header::parse(&self.checkpoint.path_of(&name), stored.bytes)?;
                self.check_base_header(&name, &header)?;
                Ok((file.clone(), header))
            })
            .collect()
    }

    /// Refuses a kept header that does not describe the tensors that are here.
    fn check_base_header(&self, name: &str, header: &Header) -> Result<()> {
        for entry in &header.entries {
            let described = (dtype_name(entry.dtype), entry.shape.clone());
            let here = match self.module_of(&entry.name) {
                Some((_, record)) => Some((record.dtype.clone(), record.shape.to_vec())),
                None => {
                    let found = self.checkpoint.inventory.get(&entry.name);
                    found.map(|(_, e)| (dtype_name(e.dtype), e.shape.clone()))
                }
            };
            if here.as_ref() != Some(&described) {
                return Err(Error::Header {
                    path: self.checkpoint.path_of(name),
                    reason: format!(
                        "the kept `{name}` describes `{}` as {described:?}, here it is {here:?}",
                        entry.name
                    ),
                });
            }
        }
        Ok(())
    }

    /// Dtype and shape of a tensor that is carried along.
    pub fn base_entry(&self, tensor: &str) -> Option<(Dtype, Vec<usize>)> {
        let inventory = match &self.base {
            Some(base) => &base.checkpoint.inventory,
            None => &self.checkpoint.inventory,
        };
        let (_, entry) = inventory.get(tensor)?;
        Some((entry.dtype, entry.shape.clone()))
    }

    /// Refuses a base whose files are not the pinned ones.
    pub fn check_base(&self, observer: &dyn Observer) -> Result<()> {
        let base = self.need_base()?;
        let found = base.hash(observer)?;
        for (file, expected) in &self.svd.base.sha256 {
            match found.get(file) {
                Some(sum) if sum == expected => {}
                Some(sum) => {
                    return Err(Error::Checksum {
                        what: format!("`{file}` of the base is not what was decomposed"),
                        path: base.dir.join(file),
                        expected: expected.clone(),
                        found: sum.clone(),
                    });
                }
                None => {
                    return Err(Error::NotAModel {
                        path: base.dir.clone(),
                        missing: file.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    fn need_base(&self) -> Result<&Base> {
        self.base.as_ref().ok_or_else(|| Error::BaseNeeded {
            artifact: self.dir.clone(),
            base: self.svd.base.describe(),
        })
    }

    fn dtype_of(&self, module: &str, record: &ModuleRecord) -> Result<Dtype> {
        match record.dtype.as_str() {
            "F32" => Ok(Dtype::F32),
            "F16" => Ok(Dtype::F16),
            "BF16" => Ok(Dtype::BF16),
            other => Err(Error::SvdSection {
                path: self.dir.join("config.json"),
                reason: format!("gives module `{module}` the dtype {other}"),
            }),
        }
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
        let bytes = positions
            .iter()
            .flat_map(|&at| (at as u32).to_le_bytes())
            .collect();
        Elements {
            dtype: Dtype::U32,
            shape,
            bytes,
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

/// A pin comes from strangers: its file names become files, its repository a request.
fn check_pin(pin: &Pin) -> Result<(), String> {
    let hex = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
    };
    if pin.sha256.is_empty() {
        return Err("names no file of its base".into());
    }
    for (file, sum) in &pin.sha256 {
        if !is_plain_file_name(file) {
            return Err(format!(
                "names the base file `{file}`, which is not a plain file name"
            ));
        }
        if !hex(sum, 64) {
            return Err(format!("gives `{file}` the sha256 `{sum}`"));
        }
    }
    if let Some(revision) = pin.revision.as_ref().filter(|r| !hex(r, 40)) {
        return Err(format!(
            "pins its base at `{revision}`, which is not a commit"
        ));
    }
    match &pin.repo {
        Some(repo) if !is_repo_id(repo) => Err(format!("names the base `{repo}`")),
        _ => Ok(()),
    }
}

/// A file name without any path in it.
fn is_plain_name(name: &str) -> bool {
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

fn parse_section(path: &Path, section: &Value) -> Result<SvdSection> {
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
    check_pin(&section.base).map_err(&refuse)?;
    for (module, record) in &section.modules {
        let [m, n] = record.shape;
        if m.checked_mul(n).is_none_or(|elements| elements >= 1 << 48) {
            return Err(refuse(format!(
                "gives module `{module}` the shape {m} × {n}"
            )));
        }
        if record.q == 0 || record.q > m.min(n) {
            return Err(refuse(format!(
                "gives module `{module}` ({m} × {n}) the rank {}",
                record.q
            )));
        }
    }
    Ok(section)
}
