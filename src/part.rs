//! One decomposed matrix in a file of its own, on its way into a decomposition.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{FactorsDtype, ModuleRecord, ModuleTensors, stored_positions};
use crate::split::Factors;
use crate::sum::{Blake3, sha256_hex};
use crate::weights::element::View;
use crate::weights::{Checkpoint, Dtype, Elements, Header, ShardWriter, dtype_name};

/// A finished matrix: what is known of it, and what its file holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Part {
    pub record: ModuleRecord,
    pub tensors: Vec<PartTensor>,
    /// `None` once the tensors are in a shard.
    #[serde(skip)]
    pub file: Option<PartFile>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub blake3: String,
}

/// Where a part lies.
#[derive(Debug, Clone)]
pub struct PartFile {
    pub path: PathBuf,
    /// The header names the sum of every tensor: this one stands for the whole file.
    pub header_sha256: String,
    /// What the disk is thought to hold of it: all of it at first.
    pub bytes: u64,
}

impl PartTensor {
    /// Refuses what is not what was written.
    pub fn check(&self, blake3: &str, path: &Path) -> Result<()> {
        if self.blake3 == blake3 {
            return Ok(());
        }
        Err(Error::PartChanged {
            tensor: self.name.clone(),
            path: path.into(),
            expected: self.blake3.clone(),
            found: blake3.into(),
        })
    }
}

impl PartFile {
    /// Its tensors.
    pub fn open(&self) -> Result<Checkpoint> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        Checkpoint::single(folder, &name)
    }
}

/// The path of a module's part. Hashed, because a module's name is what a stranger's checkpoint says it is.
pub fn path_of(folder: &Path, module: &str) -> PathBuf {
    folder.join(format!(
        "{}.safetensors",
        &sha256_hex(module.as_bytes())[..24]
    ))
}

/// Of `modules`, those whose parts an earlier run left whole in `folder`. Tensors that are `elsewhere` by now may be gone.
///
/// One that is not whole is left to be made again: it was not flushed, and a power cut may have come.
pub fn left_by_earlier_run<'m>(
    folder: &Path,
    modules: impl Iterator<Item = &'m str>,
    dtype: FactorsDtype,
    elsewhere: impl Fn(&str) -> bool,
    observer: &dyn Observer,
) -> BTreeMap<String, Part> {
    let left = modules.filter_map(|module| Some((module, Part::read(folder, module, dtype).ok()?)));
    let mut left: BTreeMap<String, Part> =
        left.map(|(module, part)| (module.into(), part)).collect();
    if left.is_empty() {
        return left;
    }
    let size = |part: &Part| part.file.as_ref().map_or(0, |file| file.bytes);
    observer.start(Stage::Verify, left.values().map(size).sum(), Unit::Bytes);
    left.retain(|module, part| {
        let is_whole = part.check_tensors(&elsewhere).is_ok();
        observer.advance(Stage::Verify, size(part), module);
        is_whole
    });
    observer.finish(Stage::Verify);
    left
}

impl Part {
    /// Writes what an artifact holds of one matrix into `folder`: its factors, and M′ if M is given.
    pub fn of(
        folder: &Path,
        module: &str,
        mut record: ModuleRecord,
        factors: &Factors,
        dtype: FactorsDtype,
        matrix: Option<&Elements>,
    ) -> Result<Self> {
        let names = ModuleTensors::of(module);
        let residual = matrix.map(|matrix| (factors.residual(matrix), matrix));
        let exact_at = OnceCell::new();
        let mut tensors: Vec<(String, View<'_>)> = Vec::new();
        record.exceptions = 0;
        if let Some((residual, matrix)) = &residual {
            let values = View::f32(&matrix.shape, &residual.values);
            tensors.push((names.residual, values));
            record.exceptions = residual.exact_at.len() as u64;
            if record.exceptions > 0 {
                let at = || stored_positions(&residual.exact_at, matrix.len());
                let at = exact_at.get_or_init(at);
                let exact = View::stored(matrix.dtype, &at.shape, &residual.exact);
                tensors.push((names.exact_at, at.view()));
                tensors.push((names.exact, exact));
            }
        }
        let rounded = (OnceCell::new(), OnceCell::new());
        tensors.push((names.u, stored(&factors.u, dtype, &rounded.0)));
        let sigma = factors.sigma.to_vec();
        tensors.push((names.sigma, View::f32(&[record.q], &sigma)));
        tensors.push((names.v, stored(&factors.v, dtype, &rounded.1)));
        Self::write(folder, module, record, &tensors)
    }

    /// Writes a finished matrix into `folder`.
    fn write(
        folder: &Path,
        module: &str,
        record: ModuleRecord,
        tensors: &[(String, View<'_>)],
    ) -> Result<Self> {
        let described = tensors.iter().map(|(name, view)| {
            let mut sum = Blake3::default();
            sum.update(view.bytes());
            PartTensor {
                name: name.clone(),
                dtype: view.dtype,
                shape: view.shape.clone(),
                blake3: sum.finish(),
            }
        });
        let mut part = Self {
            record,
            tensors: described.collect(),
            file: None,
        };
        let about = serde_json::to_string(&part).expect("a part's record serialises");
        let header = Header::compose_with(
            &[("part", &about)],
            part.tensors
                .iter()
                .map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())),
        )?;
        let path = path_of(folder, module);
        let header_sha256 = sha256_hex(&header.prefix);
        let bytes = header.file_bytes();
        let mut writer = ShardWriter::create_passing(&path, header)?;
        for (name, view) in tensors {
            writer.put(name, view.bytes())?;
        }
        writer.close()?;
        part.file = Some(PartFile {
            path,
            header_sha256,
            bytes,
        });
        Ok(part)
    }

    /// What a stranger's part must be, if it is to stand among others with vectors in `dtype`: the tensors of this module, and
    /// none but these.
    fn check(&self, module: &str, dtype: FactorsDtype) -> Result<(), String> {
        self.record.check(module)?;
        let (q, [m, n]) = (self.record.q, self.record.shape);
        let names = ModuleTensors::of(module);
        let factors = [
            (names.u, dtype.dtype(), vec![q, m]),
            (names.sigma, Dtype::F32, vec![q]),
            (names.v, dtype.dtype(), vec![q, n]),
        ];
        let holds = |(name, dtype, shape): &(String, Dtype, Vec<usize>)| {
            let mut tensors = self.tensors.iter();
            tensors.any(|t| (&t.name, &t.dtype, &t.shape) == (name, dtype, shape))
        };
        if let Some((missing, dtype, shape)) = factors.iter().find(|factor| !holds(factor)) {
            let dtype = dtype_name(*dtype);
            return Err(format!(
                "it holds no {dtype} tensor `{missing}` of {shape:?}"
            ));
        }
        let residual = (names.residual, Dtype::F32, vec![m, n]);
        let belongs = |t: &PartTensor| {
            if t.name == residual.0 {
                return holds(&residual);
            }
            let exact = t.name == names.exact_at || t.name == names.exact;
            let counted = matches!(t.shape[..], [count] if count as u64 == self.record.exceptions);
            (exact && counted) || factors.iter().any(|(name, ..)| t.name == *name)
        };
        match self.tensors.iter().find(|t| !belongs(t)) {
            Some(tensor) => Err(format!(
                "it holds `{}`, which does not belong there",
                tensor.name
            )),
            None => Ok(()),
        }
    }

    /// Refuses a file in which a tensor is not what was written, those aside that are `elsewhere` by now.
    fn check_tensors(&self, elsewhere: impl Fn(&str) -> bool) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let tensors = file.open()?;
        for tensor in self.tensors.iter().filter(|t| !elsewhere(&t.name)) {
            let mut sum = Blake3::default();
            tensors.read_blocks(&tensor.name, |block| {
                sum.update(&block.bytes);
                Ok(())
            })?;
            tensor.check(&sum.finish(), &file.path)?;
        }
        Ok(())
    }

    /// Reads the header of the part of a module, with vectors in `dtype`; the tensors are checked when they are read.
    pub fn read(folder: &Path, module: &str, dtype: FactorsDtype) -> Result<Self> {
        let path = path_of(folder, module);
        let refuse = |reason: &str| Error::Header {
            path: path.clone(),
            reason: format!("as the part `{module}`, {reason}"),
        };
        let header = Header::read(&path)?;
        let about = header.metadata("part");
        let about = about.ok_or_else(|| refuse("it tells nothing of the matrix"))?;
        let mut part: Self = serde_json::from_str(&about)
            .map_err(|_| refuse("it tells nothing readable of the matrix"))?;
        let same = part.tensors.len() == header.entries.len()
            && part
                .tensors
                .iter()
                .zip(&header.entries)
                .all(|(t, e)| (&t.name, t.dtype, &t.shape) == (&e.name, e.dtype, &e.shape));
        if !same {
            return Err(refuse("it holds other tensors than it tells of"));
        }
        part.check(module, dtype)
            .map_err(|reason| refuse(&reason))?;
        part.file = Some(PartFile {
            path,
            header_sha256: sha256_hex(&header.prefix),
            bytes: header.file_bytes(),
        });
        Ok(part)
    }
}

/// Vectors in the form they are stored in; `rounded` keeps them if it is another than they have.
fn stored<'a>(
    vectors: &'a Array2<f32>,
    dtype: FactorsDtype,
    rounded: &'a OnceCell<Elements>,
) -> View<'a> {
    let values = vectors.as_slice().expect("factors are dense and row-major");
    match dtype {
        FactorsDtype::F32 => View::f32(vectors.shape(), values),
        FactorsDtype::Bf16 => rounded
            .get_or_init(|| Elements::from_f32(vectors.shape(), values).cast(dtype.dtype()))
            .view(),
    }
}
