//! What is in a shard, and how shards are filled.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::contents::Section;
use crate::error::{Error, IoContext, Result};
use crate::format::Sums;
use crate::part::Part;
use crate::weights::{Dtype, Entry};
use crate::workspace::remove_if_there;

/// A finished shard, as its record tells of it.
#[derive(Serialize, Deserialize)]
pub struct Shard {
    pub sha256: String,
    pub bytes: u64,
    /// In the order of the file, each with the sha256 of its bytes.
    pub tensors: Vec<(Placed, String)>,
    /// Matrices of which nothing is left outside of this shard and those before it.
    pub parts: BTreeMap<String, Part>,
    /// The singular values in it, by module: the shard itself may be gone by the time they are told.
    pub sigma: BTreeMap<String, Vec<f32>>,
}

/// A tensor of the artifact, placed in a shard.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Placed {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub source: Source,
}

/// Where a tensor of the artifact comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Source {
    /// The part of this module.
    Part(String),
    Carried,
    BaseHeader(String),
}

impl Placed {
    /// A tensor of the base that goes along as it is.
    pub fn carried(entry: &Entry) -> Self {
        Self {
            name: entry.name.clone(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            source: Source::Carried,
        }
    }

    /// The tensors of a finished matrix.
    pub fn of_part(module: &str, part: &Part) -> Vec<Self> {
        let tensors = part.tensors.iter().map(|tensor| Self {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            source: Source::Part(module.into()),
        });
        tensors.collect()
    }

    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

impl Shard {
    /// The modules of which it holds something.
    pub fn sources(&self) -> BTreeSet<&str> {
        let sources = self.tensors.iter().map(|(placed, _)| &placed.source);
        let modules = sources.filter_map(|source| match source {
            Source::Part(module) => Some(module.as_str()),
            _ => None,
        });
        modules.collect()
    }

    pub fn holds(&self, tensor: &str) -> bool {
        self.tensors.iter().any(|(placed, _)| placed.name == tensor)
    }
}

/// The index as it grows.
#[derive(Default)]
pub struct Index {
    pub total_size: u64,
    pub weight_map: BTreeMap<String, String>,
    pub sums: Sums,
}

impl Index {
    pub fn add(&mut self, file: &str, shard: &Shard) {
        self.sums.files.insert(file.into(), shard.sha256.clone());
        for (tensor, sha256) in &shard.tensors {
            self.total_size += tensor.bytes();
            self.weight_map.insert(tensor.name.clone(), file.into());
            let sums = &mut self.sums.tensors;
            sums.insert(tensor.name.clone(), sha256.clone());
        }
    }
}

/// Fills shards in order; a tensor is never split.
pub struct Filling {
    shard: Vec<Placed>,
    bytes: u64,
    bytes_max: u64,
}

impl Filling {
    pub fn new(bytes_max: u64) -> Self {
        Self {
            shard: Vec::new(),
            bytes: 0,
            bytes_max,
        }
    }

    /// Adds a tensor; returns the shard that was full without it, and the one that is full with it.
    pub fn add(&mut self, tensor: Placed) -> Vec<Vec<Placed>> {
        let mut full = Vec::new();
        if self.bytes > 0 && self.bytes + tensor.bytes() > self.bytes_max {
            full.push(self.take());
        }
        self.bytes += tensor.bytes();
        self.shard.push(tensor);
        // what is larger than a shard stays alone
        if self.bytes > self.bytes_max {
            full.push(self.take());
        }
        full
    }

    fn take(&mut self) -> Vec<Placed> {
        self.bytes = 0;
        std::mem::take(&mut self.shard)
    }

    /// The last shard, which no other tensor has filled.
    pub fn end(self) -> Option<Vec<Placed>> {
        Some(self.shard).filter(|shard| !shard.is_empty())
    }
}

/// What is carried along with a shard that never lies here as a file.
pub struct Spool {
    path: PathBuf,
    file: Option<File>,
    bytes: u64,
}

impl Spool {
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            bytes: 0,
        }
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let made = File::create(&self.path).context("create", &self.path)?;
                self.file.insert(made)
            }
        };
        self.bytes += bytes.len() as u64;
        file.write_all(bytes)
            .map_err(|source| Error::io("write", &self.path, source))
    }

    /// The bytes that were written last.
    pub fn last(&self, bytes: u64) -> Section {
        Section::of(&self.path, self.bytes - bytes, bytes)
    }

    pub fn remove(self) -> Result<()> {
        remove_if_there(&self.path).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_filled_in_order_and_never_split_a_tensor() {
        let tensors = [("a", 4), ("b", 4), ("c", 20), ("d", 1)];
        let mut filling = Filling::new(10);
        let mut shards: Vec<Vec<Placed>> = Vec::new();
        for (name, n) in tensors {
            shards.extend(filling.add(Placed {
                name: name.into(),
                dtype: Dtype::U8,
                shape: vec![n],
                source: Source::Carried,
            }));
        }
        shards.extend(filling.end());
        let names: Vec<Vec<&str>> = shards
            .iter()
            .map(|s| s.iter().map(|t| t.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["a", "b"], vec!["c"], vec!["d"]]);
    }
}
