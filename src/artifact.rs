//! A decomposition on disk, opened: how a weight comes back out of it, checked.

use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2};
use serde_json::Value;

use crate::base::Base;
use crate::error::{Error, IoContext, Result, Summed};
use crate::event::Observer;
use crate::format::{
    ArtifactLayout, ModuleRecord, ModuleTensors, Sums, SvdSection, base_header_tensor,
    is_plain_name, parse_section, positions,
};
use crate::json;
use crate::split::{Factors, Residual};
use crate::sum::{sha256_file, sha256_hex};
use crate::weights::checkpoint::Index;
use crate::weights::place::refuse_links_outside;
use crate::weights::{Checkpoint, Dtype, Elements, Header, Layout, dtype_name};

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

fn dense(elements: &Elements) -> Array2<f32> {
    let (rows, columns) = (elements.shape[0], elements.shape[1]);
    Array2::from_shape_vec((rows, columns), elements.to_f32())
        .expect("shapes were checked on opening")
}

/// Whether a directory holds a decomposition (rather than a plain model).
pub fn is_artifact(dir: &Path) -> bool {
    dir.join(Layout::Decomposition.index_file()).exists()
}

impl Artifact {
    /// Opens a decomposition and checks headers, index and `svd` section against each other.
    ///
    /// A sidecar needs `base`; it is checked by its pinned hashes only when tensors are verified.
    pub fn open(dir: &Path, base: Option<Base>) -> Result<Self> {
        Self::open_with(dir, base, || Checkpoint::open(dir, Layout::Decomposition))
    }

    /// As [`Artifact::open`], with weights that lie elsewhere; `dir` holds the small files.
    pub fn open_stored(dir: &Path, checkpoint: Checkpoint, base: Option<Base>) -> Result<Self> {
        Self::open_with(dir, base, || Ok(checkpoint))
    }

    /// The same, which checks every tensor of its own whenever it is read: for weights that lie elsewhere.
    pub fn checked(mut self) -> Self {
        self.checkpoint = self.checkpoint.with_sums(self.sums.tensors.clone());
        self
    }

    fn open_with(
        dir: &Path,
        base: Option<Base>,
        checkpoint: impl FnOnce() -> Result<Checkpoint>,
    ) -> Result<Self> {
        let index_path = dir.join(Layout::Decomposition.index_file());
        let config_path = dir.join("config.json");
        if !config_path.exists() {
            return Err(Error::NotAModel {
                path: dir.into(),
                missing: "config.json".into(),
            });
        }
        refuse_links_outside(dir)?;
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
        let checkpoint = checkpoint()?;
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

    /// Refuses small files that are not what was written: config, tokenizer and their like, as far as they are here.
    ///
    /// Weights are checked as they are read.
    pub fn check_small_files(&self) -> Result<()> {
        for (name, expected) in &self.sums.files {
            let path = self.dir.join(name);
            if name.ends_with(".safetensors") || !path.exists() {
                continue;
            }
            let found = sha256_file(&path, |_| {})?;
            if found != *expected {
                return Err(Error::Checksum {
                    what: format!("`{name}` of the decomposition").into(),
                    path,
                    expected: expected.clone(),
                    found,
                });
            }
        }
        Ok(())
    }

    fn check_shapes(&self) -> Result<()> {
        for (module, record) in &self.svd.modules {
            let names = ModuleTensors::of(module);
            let [m, n] = record.shape;
            let factors = self.svd.factors.dtype();
            let mut expected = vec![
                (names.u, vec![record.q, m], factors),
                (names.sigma, vec![record.q], Dtype::F32),
                (names.v, vec![record.q, n], factors),
            ];
            if self.svd.layout == ArtifactLayout::Residual {
                expected.push((names.residual, vec![m, n], Dtype::F32));
            }
            for (tensor, shape, dtype) in expected {
                let path = self.checkpoint.path_of(&tensor);
                match self.checkpoint.inventory.get(&tensor) {
                    None => return Err(Error::TensorMissing { tensor, path }),
                    Some((_, entry)) if entry.shape != shape => {
                        return Err(Error::Shape {
                            tensor,
                            path,
                            expected: shape,
                            found: entry.shape.clone(),
                        });
                    }
                    Some((_, entry)) if entry.dtype != dtype => {
                        return Err(Error::Dtype {
                            tensor,
                            path,
                            expected: dtype_name(dtype),
                            found: dtype_name(entry.dtype),
                        });
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    /// The singular triplets of a module; bytes that are not what the index says are refused.
    pub fn factors(&self, module: &str) -> Result<Factors> {
        let names = ModuleTensors::of(module);
        Ok(Factors {
            u: dense(&self.stored(&names.u)?),
            sigma: Array1::from_vec(self.sigma(module)?),
            v: dense(&self.stored(&names.v)?),
        })
    }

    /// The singular values of a module, descending; checked as the triplets are.
    pub fn sigma(&self, module: &str) -> Result<Vec<f32>> {
        Ok(self.stored(&ModuleTensors::of(module).sigma)?.to_f32())
    }

    /// A tensor of the artifact itself; bytes that are not what the index says are refused.
    pub fn stored(&self, tensor: &str) -> Result<Elements> {
        let elements = self.checkpoint.read_finite(tensor)?;
        let expected = self.sums.tensors.get(tensor);
        self.check_sum(tensor, &elements, expected.map(String::as_str))?;
        Ok(elements)
    }

    /// The first rows of u or v, read without the others.
    pub fn rows(&self, tensor: &str, rows: usize) -> Result<Array2<f32>> {
        Ok(dense(&self.checkpoint.read_rows(tensor, rows)?))
    }

    /// Where the tensors are that are carried along, and in a sidecar M too: `base` if it has one.
    pub fn carried(&self) -> &Checkpoint {
        match &self.base {
            Some(base) => &base.checkpoint,
            None => &self.checkpoint,
        }
    }

    /// The base's tensor of that name, byte for byte: M of a module, or a tensor that was carried along.
    pub fn base_tensor(&self, tensor: &str) -> Result<Elements> {
        if self.svd.layout == ArtifactLayout::Sidecar {
            let stored = self.stored_in_base(tensor);
            let elements = self.need_base()?.checkpoint.read_finite(&stored)?;
            // the base is pinned as a whole, but which of its weights a head copies is this artifact's word alone
            if let Some((_, record)) = self.module_of(tensor).filter(|_| stored != tensor) {
                self.check_sum(tensor, &elements, Some(&record.sha256))?;
            }
            return Ok(elements);
        }
        match self.module_of(tensor) {
            Some((module, record)) => self.restore(module, record, &self.factors(module)?),
            None => self.stored(tensor),
        }
    }

    fn check_sum(&self, tensor: &str, elements: &Elements, expected: Option<&str>) -> Result<()> {
        let found = sha256_hex(&elements.bytes);
        if expected == Some(found.as_str()) {
            return Ok(());
        }
        Err(Error::Checksum {
            what: Summed::Tensor(tensor.into()),
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

    /// The base's name of a tensor: an untied head is the embedding there.
    fn stored_in_base(&self, tensor: &str) -> String {
        let record = self.module_of(tensor).map(|(_, record)| record);
        match record.and_then(|record| record.tied_to.as_ref()) {
            Some(module) => format!("{module}.weight"),
            None => tensor.into(),
        }
    }

    /// The weights that the base does not have under their own name or takes for another's: untied heads.
    pub fn untied(&self) -> impl Iterator<Item = (&str, &ModuleRecord)> {
        let modules = self.svd.modules.iter();
        modules.filter_map(|(module, record)| {
            record.tied_to.as_ref()?;
            Some((module.as_str(), record))
        })
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
            let stored = self.stored_in_base(&tensor);
            self.need_base()?.checkpoint.read(&stored)?
        } else {
            self.recompose(module, record, factors)?
        };
        self.check_sum(&tensor, &matrix, Some(&record.sha256))?;
        let dtype = self.dtype_of(module, record)?;
        if matrix.dtype != dtype {
            return Err(Error::Dtype {
                path: self.need_base()?.checkpoint.path_of(&tensor),
                tensor,
                expected: dtype_name(dtype),
                found: dtype_name(matrix.dtype),
            });
        }
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
        self.need_base()?.check(&self.svd.base, observer)
    }

    fn need_base(&self) -> Result<&Base> {
        self.base.as_ref().ok_or_else(|| Error::BaseNeeded {
            artifact: self.dir.clone(),
            base: self.svd.base.describe(),
        })
    }

    /// The dtype of M.
    pub fn dtype_of(&self, module: &str, record: &ModuleRecord) -> Result<Dtype> {
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
