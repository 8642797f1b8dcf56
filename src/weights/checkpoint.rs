//! A set of weight files that belong together: one file, or shards and their index.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::element::Elements;
use super::header::{Entry, Header};
use crate::contents::Section;
use crate::error::{Error, IoContext, Result, Summed};
use crate::json;
use crate::sum::{Sum, both, is_hex, sha256_file, sha256_hex};

/// How the files of a checkpoint are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `model.safetensors` or `model-0000i-of-0000N.safetensors`: what every Hugging Face tool loads.
    Model,
    /// `svd-0000i-of-0000N.safetensors`: a decomposition, which nothing may take for a model.
    Decomposition,
}

impl Layout {
    pub fn stem(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Decomposition => "svd",
        }
    }

    pub fn single_file(self) -> String {
        format!("{}.safetensors", self.stem())
    }

    pub fn index_file(self) -> String {
        format!("{}.safetensors.index.json", self.stem())
    }

    /// The name of shard `number` (from 1) of `count`.
    pub fn shard_file(self, number: usize, count: usize) -> String {
        format!("{}-{number:05}-of-{count:05}.safetensors", self.stem())
    }
}

/// One weight file and what its header says.
#[derive(Debug, Clone)]
pub struct WeightFile {
    pub name: String,
    pub header: Header,
}

/// What a checkpoint holds, known from its headers alone.
#[derive(Debug, Clone)]
pub struct Inventory {
    pub files: Vec<WeightFile>,
    places: BTreeMap<String, (usize, usize)>,
}

impl Inventory {
    /// Joins headers; a tensor that two files hold is refused.
    pub fn new(root: &Path, files: Vec<WeightFile>) -> Result<Self> {
        let mut places = BTreeMap::new();
        for (f, file) in files.iter().enumerate() {
            for (e, entry) in file.header.entries.iter().enumerate() {
                if let Some((other, _)) = places.insert(entry.name.clone(), (f, e)) {
                    let other: &WeightFile = &files[other];
                    return Err(Error::Header {
                        path: root.join(&file.name),
                        reason: format!("it repeats tensor `{}` of {}", entry.name, other.name),
                    });
                }
            }
        }
        Ok(Self { files, places })
    }

    pub fn get(&self, tensor: &str) -> Option<(&WeightFile, &Entry)> {
        let &(f, e) = self.places.get(tensor)?;
        Some((&self.files[f], &self.files[f].header.entries[e]))
    }

    pub fn contains(&self, tensor: &str) -> bool {
        self.places.contains_key(tensor)
    }

    /// Every tensor, in the order of the files and of the bytes in them.
    pub fn entries(&self) -> impl Iterator<Item = (&WeightFile, &Entry)> {
        self.files
            .iter()
            .flat_map(|file| file.header.entries.iter().map(move |entry| (file, entry)))
    }

    /// The bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.entries().map(|(_, entry)| entry.bytes).sum()
    }
}

/// The part of an index file that says where tensors are.
#[derive(Deserialize)]
pub struct Index {
    pub weight_map: BTreeMap<String, String>,
    #[serde(default)]
    pub metadata: serde_json::Value,
}

impl Index {
    /// Parses an index; file names that could lead out of the folder are refused.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let index: Self = json::parse(path, bytes)?;
        for name in index.weight_map.values() {
            if !is_plain_file_name(name) {
                return Err(Error::UnsafeName {
                    index: path.into(),
                    name: name.clone(),
                });
            }
        }
        Ok(index)
    }

    /// The files the index names, each once, in order.
    pub fn files(&self) -> Vec<String> {
        let mut files: Vec<String> = self.weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        files
    }

    /// Refuses headers that disagree with the index, in either direction.
    pub fn check(&self, path: &Path, inventory: &Inventory) -> Result<()> {
        for (tensor, file) in &self.weight_map {
            if inventory.get(tensor).is_none_or(|(f, _)| &f.name != file) {
                return Err(Error::IndexedTensorMissing {
                    index: path.into(),
                    tensor: tensor.clone(),
                    file: file.clone(),
                });
            }
        }
        for (file, entry) in inventory.entries() {
            if !self.weight_map.contains_key(&entry.name) {
                return Err(Error::TensorNotIndexed {
                    tensor: entry.name.clone(),
                    path: path.with_file_name(&file.name),
                });
            }
        }
        Ok(())
    }
}

/// A weight file's name without any path in it.
pub fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && name != "."
        && name != ".."
        && !name.contains(['/', '\\', '\0'])
        && name.ends_with(".safetensors")
}

/// Where the bytes of weight files are: on this machine's disk, or behind a Hub that answers byte ranges.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Fills `buffer` with a file's bytes from `offset` on.
    fn read_at(&self, file: &str, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// What whoever holds the file says its sha256 is.
    fn stated_sha256(&self, _file: &str) -> Option<String> {
        None
    }

    /// Whether every reading crosses a network, and may bring other bytes than the one before.
    fn is_remote(&self) -> bool {
        false
    }
}

/// Files in a directory of this machine.
#[derive(Debug)]
struct Disk(PathBuf);

impl Storage for Disk {
    fn read_at(&self, file: &str, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let path = self.0.join(file);
        let opened = File::open(&path).context("open", &path)?;
        opened.read_exact_at(buffer, offset).context("read", &path)
    }

    /// In the Hub's cache a file is a link to a blob whose name is the sha256 that the Hub stated.
    fn stated_sha256(&self, file: &str) -> Option<String> {
        let blob = std::fs::read_link(self.0.join(file)).ok()?;
        let name = blob.file_name()?.to_str()?;
        (is_hex(name, 64) && blob.parent()?.ends_with("blobs")).then(|| name.into())
    }
}

/// A checkpoint that can be read. Tensors come one at a time, by position: nothing is mapped or cached.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Its directory; of files behind a Hub, where the small ones lie.
    pub dir: PathBuf,
    pub inventory: Inventory,
    /// Whether an index file names the shards (a single file needs none).
    pub indexed: bool,
    storage: Arc<dyn Storage>,
    /// What each tensor is, if all of it was read before.
    sums: Option<Arc<TensorSums>>,
}

/// The sha256 of each tensor's bytes.
pub type TensorSums = BTreeMap<String, String>;

impl Checkpoint {
    /// Opens one file of `dir` on its own.
    pub fn single(dir: &Path, file: &str) -> Result<Self> {
        let header = Header::read(&dir.join(file))?;
        let files = vec![WeightFile {
            name: file.into(),
            header,
        }];
        Ok(Self {
            dir: dir.into(),
            inventory: Inventory::new(dir, files)?,
            indexed: false,
            storage: Arc::new(Disk(dir.into())),
            sums: None,
        })
    }

    /// A checkpoint whose headers are known and whose bytes lie elsewhere.
    pub fn stored(
        dir: &Path,
        inventory: Inventory,
        indexed: bool,
        storage: Arc<dyn Storage>,
    ) -> Self {
        Self {
            dir: dir.into(),
            inventory,
            indexed,
            storage,
            sums: None,
        }
    }

    /// The same, which knows what its tensors are. Over a network it refuses, from now on, one that is not what `sums` says.
    pub fn with_sums(&self, sums: TensorSums) -> Self {
        Self {
            sums: Some(Arc::new(sums)),
            ..self.clone()
        }
    }

    pub fn is_remote(&self) -> bool {
        self.storage.is_remote()
    }

    /// The sha256 of a file: of one that is elsewhere, as whoever holds it says; else of its bytes.
    ///
    /// # Errors
    /// A file in the Hub's cache that is not what the Hub said.
    pub fn file_sha256(&self, file: &WeightFile, progress: impl FnMut(u64)) -> Result<String> {
        match self.stated_sha256(file) {
            Some(stated) if self.is_remote() => Ok(stated),
            None if self.is_remote() => Ok(self.hash(file, progress)?.0),
            _ => {
                let found = sha256_file(&self.dir.join(&file.name), progress)?;
                self.refuse_damaged(file, found)
            }
        }
    }

    /// What whoever holds a file, or brought it into the Hub's cache, says its sha256 is.
    pub fn stated_sha256(&self, file: &WeightFile) -> Option<String> {
        self.storage.stated_sha256(&file.name)
    }

    fn refuse_damaged(&self, file: &WeightFile, found: String) -> Result<String> {
        let path = self.dir.join(&file.name);
        match self.stated_sha256(file) {
            Some(stated) if stated != found => Err(Error::Checksum {
                what: format!("`{}` as it was read", file.name).into(),
                path: std::fs::canonicalize(&path).unwrap_or(path),
                expected: stated,
                found,
            }),
            _ => Ok(found),
        }
    }

    /// Reads a file from end to end: its sha256, and that of each of its tensors. `progress` is told the bytes read.
    ///
    /// # Errors
    /// A file that is not what whoever holds it says it is.
    pub fn hash(
        &self,
        file: &WeightFile,
        mut progress: impl FnMut(u64),
    ) -> Result<(String, TensorSums)> {
        let (mut whole, mut sums) = (Sum::default(), TensorSums::new());
        let prefix = file.header.prefix.len() as u64;
        whole.update(&file.header.prefix);
        progress(prefix);
        let mut at = prefix;
        for entry in &file.header.entries {
            let mut sum = Sum::default();
            self.blocks(&file.name, entry, |block| {
                let sums = |bytes: &[u8]| sum.update(bytes);
                both(&block.bytes, |bytes| whole.update(bytes), sums);
                progress(block.bytes.len() as u64);
                Ok(())
            })?;
            at += entry.bytes;
            sums.insert(entry.name.clone(), sum.finish());
        }
        assert_eq!(at, file.header.file_bytes(), "tensors cover their file");
        Ok((self.refuse_damaged(file, whole.finish())?, sums))
    }

    /// Reads index and headers, and checks them against each other and against the files' lengths.
    ///
    /// A single file wins over an index beside it, as in transformers.
    pub fn open(dir: &Path, layout: Layout) -> Result<Self> {
        if dir.join(layout.single_file()).exists() {
            return Self::single(dir, &layout.single_file());
        }
        let path = dir.join(layout.index_file());
        if !path.exists() {
            let missing = format!("{} (or {})", layout.single_file(), layout.index_file());
            let other = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let mut other = other.filter_map(|entry| entry.file_name().into_string().ok());
            let other = other.find(|name| {
                [".bin", ".gguf", ".pth"]
                    .iter()
                    .any(|end| name.ends_with(end))
            });
            let path = dir.into();
            return Err(match other {
                Some(found) => Error::OtherFormat {
                    path,
                    missing,
                    found,
                },
                None => Error::NotAModel { path, missing },
            });
        }
        let bytes = std::fs::read(&path).context("read", &path)?;
        let index = Index::parse(&path, &bytes)?;
        let files = index
            .files()
            .into_iter()
            .map(|name| {
                let file = dir.join(&name);
                if !file.exists() {
                    return Err(Error::ShardMissing {
                        index: path.clone(),
                        file: name,
                    });
                }
                let header = Header::read(&file)?;
                Ok(WeightFile { name, header })
            })
            .collect::<Result<Vec<_>>>()?;
        let inventory = Inventory::new(dir, files)?;
        index.check(&path, &inventory)?;
        Ok(Self {
            dir: dir.into(),
            inventory,
            indexed: true,
            storage: Arc::new(Disk(dir.into())),
            sums: None,
        })
    }

    /// Reads a tensor that must not hold NaN or Inf.
    pub fn read_finite(&self, tensor: &str) -> Result<Elements> {
        let elements = self.read(tensor)?;
        elements.refuse_not_finite(tensor, &self.path_of(tensor))?;
        Ok(elements)
    }

    /// The bytes of one tensor where they lie on the disk.
    pub fn section(&self, tensor: &str) -> Result<Section> {
        let (file, entry) = self.locate(tensor)?;
        Ok(Section::of(&self.dir.join(file), entry.offset, entry.bytes))
    }

    /// Reads one tensor piece by piece, so that its size does not matter; `visit` sees the pieces in order.
    pub fn read_blocks(
        &self,
        tensor: &str,
        mut visit: impl FnMut(&Elements) -> Result<()>,
    ) -> Result<()> {
        let (file, entry) = self.locate(tensor)?;
        let Some(expected) = self.expected(tensor) else {
            return self.blocks(file, entry, visit);
        };
        let mut sum = Sum::default();
        self.blocks(file, entry, |block| {
            sum.update(&block.bytes);
            visit(block)
        })?;
        self.refuse_other(tensor, expected, sum.finish())
    }

    fn blocks(
        &self,
        file: &str,
        entry: &Entry,
        mut visit: impl FnMut(&Elements) -> Result<()>,
    ) -> Result<()> {
        // a multiple of every width, and large beside the cost of a call, or of a request
        const BLOCK_BYTES: u64 = 4 << 20;
        const REMOTE_BLOCK_BYTES: u64 = 32 << 20;
        let most = match self.is_remote() {
            true => REMOTE_BLOCK_BYTES,
            false => BLOCK_BYTES,
        };
        let mut block = Elements {
            dtype: entry.dtype,
            shape: vec![0],
            bytes: Vec::new(),
        };
        let mut read = 0;
        while read < entry.bytes {
            let length = most.min(entry.bytes - read) as usize;
            block.bytes.resize(length, 0);
            block.shape[0] = 8 * length / entry.dtype.bitsize();
            self.storage
                .read_at(file, entry.offset + read, &mut block.bytes)?;
            visit(&block)?;
            read += length as u64;
        }
        Ok(())
    }

    /// The file that holds `tensor`, for error messages.
    pub fn path_of(&self, tensor: &str) -> PathBuf {
        match self.inventory.get(tensor) {
            Some((file, _)) => self.dir.join(&file.name),
            None => self.dir.clone(),
        }
    }

    /// Reads one tensor.
    pub fn read(&self, tensor: &str) -> Result<Elements> {
        let (file, entry) = self.locate(tensor)?;
        let elements = self.read_bytes(file, entry, entry.shape.clone(), entry.bytes)?;
        if let Some(expected) = self.expected(tensor) {
            self.refuse_other(tensor, expected, sha256_hex(&elements.bytes))?;
        }
        Ok(elements)
    }

    /// The sha256 of a tensor that was read before.
    pub fn known_sha256(&self, tensor: &str) -> Option<&str> {
        self.sums.as_ref()?.get(tensor).map(String::as_str)
    }

    /// What a tensor must be whenever it is read: files of this machine are not hashed at each reading.
    fn expected(&self, tensor: &str) -> Option<&str> {
        self.known_sha256(tensor).filter(|_| self.is_remote())
    }

    fn refuse_other(&self, tensor: &str, expected: &str, found: String) -> Result<()> {
        if found == expected {
            return Ok(());
        }
        Err(Error::Checksum {
            what: Summed::Tensor(tensor.into()),
            path: self.path_of(tensor),
            expected: expected.into(),
            found,
        })
    }

    /// Reads the first rows of a tensor, and nothing of the others.
    ///
    /// # Panics
    /// If it has not so many rows: callers know its shape.
    pub fn read_rows(&self, tensor: &str, rows: usize) -> Result<Elements> {
        let (file, entry) = self.locate(tensor)?;
        assert!(
            entry.shape.first().is_some_and(|&all| rows <= all),
            "`{tensor}` {:?} has {rows} rows",
            entry.shape
        );
        let mut shape = entry.shape.clone();
        shape[0] = rows;
        let bytes = (shape.iter().product::<usize>() * entry.dtype.bitsize() / 8) as u64;
        self.read_bytes(file, entry, shape, bytes)
    }

    fn read_bytes(
        &self,
        file: &str,
        entry: &Entry,
        shape: Vec<usize>,
        count: u64,
    ) -> Result<Elements> {
        let mut bytes = vec![0u8; count as usize];
        self.storage.read_at(file, entry.offset, &mut bytes)?;
        Ok(Elements {
            dtype: entry.dtype,
            shape,
            bytes,
        })
    }

    fn locate(&self, tensor: &str) -> Result<(&str, &Entry)> {
        match self.inventory.get(tensor) {
            Some((file, entry)) => Ok((&file.name, entry)),
            None => Err(Error::TensorMissing {
                tensor: tensor.into(),
                path: self.dir.clone(),
            }),
        }
    }
}
