//! A base model on this machine, and where it came from.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::Pin;
use crate::front_matter;
use crate::json;
use crate::sum::sha256_file;
use crate::weights::checkpoint::WeightFile;
use crate::weights::place::Home;
use crate::weights::shard::write_atomically;
use crate::weights::{Checkpoint, Layout, TensorSums};
use crate::workspace::{STATE_DIR, Workspace};

/// A model directory whose headers have been read and checked.
#[derive(Debug, Clone)]
pub struct Base {
    pub dir: PathBuf,
    pub checkpoint: Checkpoint,
    /// Hub id and commit, if it came from a Hub.
    pub repo: Option<String>,
    pub revision: Option<String>,
}

impl Base {
    /// Opens a model directory.
    pub fn open(dir: &Path, repo: Option<String>, revision: Option<String>) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::NotAModel {
                path: dir.into(),
                missing: "the directory itself".into(),
            });
        }
        Ok(Self {
            dir: dir.into(),
            checkpoint: Checkpoint::open(dir, Layout::Model)?,
            repo,
            revision,
        })
    }

    /// The sha256 of every weight file; of files that stay on the Hub, as the Hub says.
    pub fn hash(&self, observer: &dyn Observer) -> Result<BTreeMap<String, String>> {
        let sums = self.of_each_file(observer, |file, progress| {
            self.checkpoint.file_sha256(file, progress)
        })?;
        Ok(sums.into_iter().collect())
    }

    /// The same; of files in the Hub's cache as it says, unread.
    pub fn sums(&self, observer: &dyn Observer) -> Result<BTreeMap<String, String>> {
        let files = self.checkpoint.inventory.files.iter();
        let stated =
            files.map(|file| Some((file.name.clone(), self.checkpoint.stated_sha256(file)?)));
        match stated.collect() {
            Some(stated) => Ok(stated),
            None => self.hash(observer),
        }
    }

    /// The same sums, and the same base, which knows those of its tensors from now on if its files lie here.
    pub fn summed(&self, observer: &dyn Observer) -> Result<(BTreeMap<String, String>, Self)> {
        if self.checkpoint.is_remote() {
            return Ok((self.hash(observer)?, self.clone()));
        }
        let sums = self.of_each_file(observer, |file, progress| {
            self.checkpoint.hash(file, progress)
        })?;
        let (mut files, mut tensors) = (BTreeMap::new(), TensorSums::new());
        for (name, (whole, parts)) in sums {
            files.insert(name, whole);
            tensors.extend(parts);
        }
        let base = Self {
            checkpoint: self.checkpoint.with_sums(tensors),
            ..self.clone()
        };
        Ok((files, base))
    }

    /// Goes over every weight file, several at a time; `sum` tells its observer of the bytes it has read.
    fn of_each_file<R: Send>(
        &self,
        observer: &dyn Observer,
        sum: impl Fn(&WeightFile, &mut dyn FnMut(u64)) -> Result<R> + Sync,
    ) -> Result<Vec<(String, R)>> {
        let files = &self.checkpoint.inventory.files;
        let total = files.iter().map(|f| f.header.file_bytes()).sum();
        observer.start(Stage::Hash, total, Unit::Bytes);
        // each takes a block of memory, which over a network is a large one
        let one_after_another = match self.checkpoint.is_remote() {
            true => files.len().max(1),
            false => 1,
        };
        let sums = files
            .par_iter()
            .with_min_len(one_after_another)
            .map(|file| {
                let sum = sum(file, &mut |bytes| {
                    observer.advance(Stage::Hash, bytes, &file.name);
                })?;
                Ok((file.name.clone(), sum))
            });
        let sums = sums.collect();
        observer.finish(Stage::Hash);
        sums
    }

    /// The same base; if its files stay on the Hub, with every tensor checked whenever it is read.
    ///
    /// For that, each file is read once from end to end and refused unless it has the sha256 that the Hub states. The sums
    /// of its tensors go to `kept`, if there is a place for them: with them a later run need not read it all again.
    pub fn checked(&self, kept: Option<&Path>, observer: &dyn Observer) -> Result<Self> {
        if !self.checkpoint.is_remote() {
            return Ok(self.clone());
        }
        let sums: TensorSums = if let Some(kept) = kept.filter(|kept| kept.exists()) {
            json::read(kept)?
        } else {
            let sums = self.of_each_file(observer, |file, progress| {
                self.checkpoint.hash(file, progress)
            })?;
            let all: TensorSums = sums.into_iter().flat_map(|(_, (_, sums))| sums).collect();
            if let Some(kept) = kept {
                let json = serde_json::to_vec(&all).expect("sums serialise");
                write_atomically(kept, &json)?;
            }
            all
        };
        Ok(Self {
            checkpoint: self.checkpoint.with_sums(sums),
            ..self.clone()
        })
    }

    /// Its name, and what its files are now.
    pub fn pin(&self, observer: &dyn Observer) -> Result<Pin> {
        Ok(Pin {
            repo: self.repo.clone(),
            revision: self.revision.clone(),
            sha256: self.hash(observer)?,
        })
    }

    /// Refuses a base whose files are not the pinned ones.
    pub fn check(&self, pin: &Pin, observer: &dyn Observer) -> Result<()> {
        let found = self.hash(observer)?;
        for (file, expected) in &pin.sha256 {
            match found.get(file) {
                Some(sum) if sum == expected => {}
                Some(sum) => {
                    return Err(Error::Checksum {
                        what: format!("`{file}` of the base is not what was decomposed").into(),
                        path: self.dir.join(file),
                        expected: expected.clone(),
                        found: sum.clone(),
                    });
                }
                None => {
                    return Err(Error::NotAModel {
                        path: self.dir.clone(),
                        missing: file.clone(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The plain model that something was made of, and what its card says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Standing {
    pub base: Pin,
    pub base_card: Value,
}

/// The weight files of a base as they were at a certain moment.
pub struct Seen(Vec<(PathBuf, Stamp)>);

/// Bytes and time of the last change.
type Stamp = (u64, SystemTime);

impl Seen {
    /// Looks at the files of a checkpoint that lie here.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let files = checkpoint.inventory.files.iter();
        let files = files.filter(|_| !checkpoint.is_remote());
        let stamps = files.map(|file| {
            let path = checkpoint.dir.join(&file.name);
            let stamp = stamp(&path)?;
            Ok((path, stamp))
        });
        Ok(Self(stamps.collect::<Result<_>>()?))
    }

    /// Refuses files that have been written to since.
    pub fn refuse_change(&self) -> Result<()> {
        for (path, before) in &self.0 {
            if stamp(path)? != *before {
                return Err(Error::BaseChanged { path: path.clone() });
            }
        }
        Ok(())
    }
}

fn stamp(path: &Path) -> Result<Stamp> {
    let metadata = std::fs::metadata(path).context("read", path)?;
    let changed = metadata.modified().context("read", path)?;
    Ok((metadata.len(), changed))
}

/// Where a decomposition remembers its local base: in the folder that is never published.
const REMEMBERED: &str = "base";

/// Notes in a decomposition, or a part of one, where its local base lies.
pub fn remember(base: &Path, workspace: &Workspace) -> Result<()> {
    let dir = std::fs::canonicalize(base).context("find", base)?;
    let path = workspace.state(REMEMBERED);
    write_atomically(&path, dir.as_os_str().as_encoded_bytes()).map(drop)
}

/// The local directory a decomposition was made from, if it was one.
pub fn remembered(artifact: &Path) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let bytes = std::fs::read(artifact.join(STATE_DIR).join(REMEMBERED)).ok()?;
    Some(PathBuf::from(std::ffi::OsString::from_vec(bytes)))
}

/// A tokenizer of 260,000 words takes 35 MB; what is larger is data, or weights of some other kind.
const SIDE_BYTES_MAX: u64 = 100_000_000;

/// Whether a file travels along with the weights: not what is weights in whatever format, an index, or media, nor what is
/// too large to carry along unasked.
pub fn travels(name: &str, bytes: u64) -> bool {
    const ENDINGS: [&str; 20] = [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".onnx",
        ".h5",
        ".msgpack",
        ".tflite",
        ".index.json",
        ".partial",
        ".png",
        ".jpg",
        ".jpeg",
        ".gif",
        ".webp",
        ".mp4",
        ".zip",
        ".gz",
    ];
    bytes <= SIDE_BYTES_MAX && !ENDINGS.iter().any(|end| name.ends_with(end))
}

/// Files that are neither weights nor ours: tokenizer, templates, licences. They travel along unchanged.
pub fn side_files(dir: &Path) -> Result<Vec<String>> {
    const OURS: [&str; 6] = [
        "config.json",
        "README.md",
        "report.json",
        ".gitattributes",
        crate::format::BASE_CONFIG,
        crate::format::BASE_INDEX,
    ];
    let home = Home::of(dir)?;
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).context("list", dir)? {
        let entry = entry.context("list", dir)?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        // a file, or a link to one: snapshots in the Hub's cache consist of links
        let found = std::fs::metadata(entry.path()).ok();
        let Some(file) = found.filter(|found| found.is_file()) else {
            continue;
        };
        let is_ours = OURS.contains(&name.as_str());
        if !is_ours && !name.starts_with('.') && travels(&name, file.len()) {
            // what a stranger's link names would be copied, and published as if it were the stranger's
            home.refuse_outside(&entry.path())?;
            files.push(name);
        }
    }
    files.sort();
    Ok(files)
}

/// The sha256 of config, index, and the files of these names, which were written to a directory. What others put there
/// meanwhile is none of them.
pub fn side_sums(dir: &Path, mut names: Vec<String>) -> Result<BTreeMap<String, String>> {
    let more = ["config.json".into(), Layout::Model.index_file()];
    names.extend(more.into_iter().filter(|name| dir.join(name).exists()));
    let sums = names.into_iter().map(|name| {
        let sum = sha256_file(&dir.join(&name), |_| {})?;
        Ok((name, sum))
    });
    sums.collect()
}

/// Copies side files from one directory to another, and returns their names.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<Vec<String>> {
    let names = side_files(from)?;
    for name in &names {
        let bytes = std::fs::read(from.join(name)).context("read", from.join(name))?;
        write_atomically(&to.join(name), &bytes)?;
    }
    Ok(names)
}

/// The metadata of a model's card, to inherit a licence and languages; null where it has none that can be read.
pub fn card_facts(dir: &Path) -> Value {
    let Ok(text) = std::fs::read_to_string(dir.join("README.md")) else {
        return Value::Null;
    };
    front_matter::read(&text).unwrap_or_default()
}
