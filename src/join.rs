//! Finished matrices in, the files of a decomposition out.
//!
//! A shard is written as soon as its matrices are there, while others are still being computed. How many there will be is
//! not known before the end, because what a matrix takes is not: until then shards have numbers for names, in the state
//! folder. What is known of a shard is written beside it, and only then its parts go; so that a kill at any moment loses
//! no finished matrix.

mod frame;
mod shard;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::base::{copy_side_files, remember};
use crate::contents::{Joint, Section};
use crate::error::{Error, IoContext, Result, Summed};
use crate::event::{Observer, Stage, Unit};
use crate::format::{
    BASE_CONFIG, BASE_INDEX, ModuleRecord, ModuleTensors, SCHEMA, SvdSection, base_header_tensor,
    untie,
};
use crate::json::{self, Tool};
use crate::outlet::{Away, Finished, Outlet};
use crate::part::Part;
use crate::plan::Trainable;
use crate::report;
use crate::spectrum::{self, Spectrum};
use crate::sum::{Blake3, Sum, both, sha256_file, sha256_hex};
use crate::weights::shard::{flush, rename, write_atomically};
use crate::weights::{Checkpoint, Dtype, Header, Layout, ShardWriter};
use crate::workers::Arrivals;
use crate::workspace::{Workspace, forget_stretch, remove_if_there};
use shard::{Filling, Index, Placed, Shard, Source, Spool};

pub use frame::{Facts, Frame, Item};

/// A decomposition being put together in its directory.
pub struct Join<'a> {
    pub frame: &'a Frame,
    /// Holds what is carried along, under the same names.
    pub carried: &'a Checkpoint,
    pub out: &'a Path,
    pub workspace: &'a Workspace,
    pub observer: &'a dyn Observer,
    /// Whether a part is removed once it is in a shard: our own are, those of other directories are not.
    pub consumes: bool,
    /// Where finished shards go, if not only here. One that does not keep them is given each from the pieces it consists of:
    /// they never lie here as files.
    pub outlet: Option<&'a dyn Outlet>,
}

/// How far the joining is.
#[derive(Default)]
pub struct Joined {
    /// By module, every matrix that is finished.
    pub parts: BTreeMap<String, Part>,
    shards: Vec<Shard>,
    /// Whether the writing is what is shown to those who watch.
    shown: bool,
}

impl Joined {
    /// Whether a finished shard holds a tensor.
    pub fn holds(&self, tensor: &str) -> bool {
        self.shards.iter().any(|shard| shard.holds(tensor))
    }

    fn bytes(&self) -> u64 {
        let tensors = self.shards.iter().flat_map(|shard| &shard.tensors);
        tensors.map(|(placed, _)| placed.bytes()).sum()
    }
}

/// What is joined lies here in the state folder.
const SHARDS: &str = "shards";

impl Join<'_> {
    fn shard_path(&self, number: usize, ending: &str) -> PathBuf {
        let folder = self.workspace.state(SHARDS);
        folder.join(format!("{number:05}.{ending}"))
    }

    /// What an earlier run finished: its shards, and the matrices that are in them.
    pub fn resume(&self) -> Result<Joined> {
        let mut joined = Joined::default();
        loop {
            let record = self.shard_path(joined.shards.len() + 1, "json");
            if !record.exists() {
                return Ok(joined);
            }
            let shard: Shard = json::read(&record)?;
            let number = joined.shards.len() + 1;
            if !self.shard_path(number, "safetensors").exists()
                && !self.is_elsewhere(number, &shard)?
            {
                self.forget_from(number)?;
                return Ok(joined);
            }
            // the kill may have come between the record and these
            self.consume(&shard, &mut BTreeMap::new())?;
            self.let_go(number, &shard)?;
            joined.parts.extend(shard.parts.clone());
            joined.shards.push(shard);
        }
    }

    /// Whether a shard without its file was named already, or is where shards go.
    fn is_elsewhere(&self, number: usize, shard: &Shard) -> Result<bool> {
        match self.outlet {
            Some(outlet) => outlet.holds(&self.finished(number, shard)),
            // named before a kill: all shards were there
            None => Ok(true),
        }
    }

    /// Removes the records from a shard on that is nowhere any more: what was in them is made again.
    fn forget_from(&self, first: usize) -> Result<()> {
        self.observer.warn(format!(
            "shard {first} is not where it went any more: going on from there"
        ));
        for number in first.. {
            let mut left = 0;
            let record = self.shard_path(number, "json");
            if record.exists() {
                // of a part that lies across its end, what went with it is gone
                let shard: Shard = json::read(&record)?;
                for part in shard.sources() {
                    remove_if_there(&self.part_path(part))?;
                }
            }
            for ending in ["json", "safetensors"] {
                if remove_if_there(&self.shard_path(number, ending))? {
                    left += 1;
                }
            }
            if left == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Gives a finished shard, if it is a file, to where shards go.
    fn let_go(&self, number: usize, shard: &Shard) -> Result<()> {
        let Some(outlet) = self.outlet else {
            return Ok(());
        };
        let path = self.shard_path(number, "safetensors");
        if path.exists() {
            outlet.take(&self.finished(number, shard), &Section::whole(&path)?)?;
        }
        Ok(())
    }

    /// The outlet, if files do not stay.
    fn passing(&self) -> Option<&dyn Outlet> {
        self.outlet.filter(|outlet| !outlet.keeps())
    }

    fn finished(&self, number: usize, shard: &Shard) -> Finished {
        Finished {
            name: format!("{number:05}.safetensors"),
            bytes: shard.bytes,
            sha256: shard.sha256.clone(),
        }
    }

    fn part_path(&self, module: &str) -> PathBuf {
        crate::part::path_of(&self.workspace.state(PARTS), module)
    }

    /// Removes what a durable shard has made superfluous of its parts, and says how much less the disk holds.
    fn consume(&self, shard: &Shard, parts: &mut BTreeMap<String, Part>) -> Result<u64> {
        if !self.consumes {
            return Ok(0);
        }
        let mut released = 0;
        for module in shard.sources() {
            let file = parts.get_mut(module).and_then(|part| part.file.as_mut());
            let path = self.part_path(module);
            if shard.parts.contains_key(module) {
                remove_if_there(&path)?;
                released += file.map_or(0, |file| std::mem::take(&mut file.bytes));
            } else if self.passing().is_some() && path.exists() {
                let mut forgotten = 0;
                for entry in &Header::read(&path)?.entries {
                    if shard.holds(&entry.name) && forget_stretch(&path, entry.offset, entry.bytes)
                    {
                        forgotten += entry.bytes;
                    }
                }
                let bytes = file.map(|file| &mut file.bytes);
                if let Some(bytes) = bytes {
                    let less = forgotten.min(*bytes);
                    *bytes -= less;
                    released += less;
                }
            }
        }
        Ok(released)
    }

    /// Writes the shards that are not there yet, each as soon as its matrices have arrived.
    ///
    /// `None` if `arrivals` ended before all of them came.
    pub fn write_shards(
        &self,
        mut joined: Joined,
        arrivals: Option<&Arrivals<(String, Part)>>,
    ) -> Result<Option<Joined>> {
        if let Some(arrivals) = arrivals {
            let files = joined.parts.values().filter_map(|part| part.file.as_ref());
            arrivals.take_disk(files.map(|file| file.bytes).sum());
        }
        let folder = self.workspace.state(SHARDS);
        std::fs::create_dir_all(&folder).context("create", &folder)?;
        let written = joined.shards.iter().flat_map(|shard| &shard.tensors);
        let written: Vec<String> = written.map(|(placed, _)| placed.name.clone()).collect();
        let mut written = written.into_iter();
        let mut filling = Filling::new(self.frame.shard_bytes_max);
        let headers = self.base_headers();
        let items = self.frame.items.iter().map(Some).chain([None]);
        for item in items {
            let placed = match item {
                Some(Item::Matrix(module)) => {
                    while !joined.parts.contains_key(module) {
                        let Some((arrived, part)) = arrivals.and_then(Arrivals::recv) else {
                            return Ok(None);
                        };
                        joined.parts.insert(arrived, part);
                    }
                    Placed::of_part(module, &joined.parts[module])
                }
                Some(Item::Carried(entry)) => vec![Placed::carried(entry)],
                None => headers.clone(),
            };
            for tensor in placed {
                match written.next() {
                    Some(name) if name == tensor.name => {}
                    Some(name) => {
                        return Err(Error::OutputOccupied {
                            path: self.out.into(),
                            found: format!("a shard with `{name}` where `{}` belongs", tensor.name),
                        });
                    }
                    None => {
                        for full in filling.add(tensor) {
                            let released = self.write_shard(full, &mut joined)?;
                            if let Some(arrivals) = arrivals {
                                arrivals.release_disk(released);
                            }
                        }
                    }
                }
            }
        }
        if let Some(last) = filling.end() {
            self.write_shard(last, &mut joined)?;
        }
        self.observer.finish(Stage::Write);
        Ok(Some(joined))
    }

    fn base_headers(&self) -> Vec<Placed> {
        let headers = self.frame.headers.iter();
        headers
            .map(|(file, prefix)| Placed {
                name: base_header_tensor(file),
                dtype: Dtype::U8,
                shape: vec![prefix.len()],
                source: Source::BaseHeader(file.clone()),
            })
            .collect()
    }

    /// Shows the writing once nothing else is under way.
    fn show(&self, joined: &mut Joined) {
        if joined.shown || joined.parts.len() < self.frame.matrices().count() {
            return;
        }
        joined.shown = true;
        let all: u64 = self
            .frame
            .items
            .iter()
            .flat_map(|item| match item {
                Item::Matrix(module) => Placed::of_part(module, &joined.parts[module]),
                Item::Carried(entry) => vec![Placed::carried(entry)],
            })
            .chain(self.base_headers())
            .map(|placed| placed.bytes())
            .sum();
        let done = joined.bytes();
        self.observer
            .resume(Stage::Write, done, all.max(done), Unit::Bytes);
    }

    /// Makes a shard, and says how much less the disk holds of its parts.
    fn write_shard(&self, tensors: Vec<Placed>, joined: &mut Joined) -> Result<u64> {
        let number = joined.shards.len() + 1;
        self.show(joined);
        let header = Header::compose(
            tensors
                .iter()
                .map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice())),
        )?;
        let bytes = header.file_bytes();
        let path = self.shard_path(number, "safetensors");
        let mut contents = Joint::default();
        let mut writer = match self.passing() {
            Some(_) => {
                contents.push(header.prefix.len() as u64, header.prefix.clone());
                ShardWriter::nowhere(&path, header)?
            }
            None => ShardWriter::create(&path, header)?,
        };
        let mut spool = Spool::new(self.shard_path(number, "carried"));
        let mut open: Option<(String, Checkpoint)> = None;
        let mut shard = Shard {
            sha256: String::new(),
            bytes,
            tensors: Vec::new(),
            parts: BTreeMap::new(),
            sigma: BTreeMap::new(),
        };
        for tensor in tensors {
            let sum = match &tensor.source {
                Source::Part(module) => {
                    let part = &joined.parts[module];
                    let sum = copy_part(&mut writer, &tensor, module, part, &mut open)?;
                    let (_, stored) = open.as_ref().expect("it was just copied from");
                    if self.passing().is_some() {
                        contents.push(tensor.bytes(), stored.section(&tensor.name)?);
                    }
                    if tensor.name == ModuleTensors::of(module).sigma {
                        let sigma = stored.read(&tensor.name)?.to_f32();
                        shard.sigma.insert(module.clone(), sigma);
                    }
                    if part.tensors.last().is_some_and(|t| t.name == tensor.name) {
                        shard.parts.insert(module.clone(), part.clone());
                    }
                    sum
                }
                Source::Carried => match self.passing() {
                    Some(_) => {
                        let sum = self.copy_carried(&mut writer, &tensor, Some(&mut spool))?;
                        contents.push(tensor.bytes(), spool.last(tensor.bytes()));
                        sum
                    }
                    None => self.copy_carried(&mut writer, &tensor, None)?,
                },
                Source::BaseHeader(file) => {
                    let mut headers = self.frame.headers.iter();
                    let header = headers.find(|(name, _)| name == file);
                    let (_, prefix) = header.expect("headers are placed from this very list");
                    writer.put(&tensor.name, prefix)?;
                    if self.passing().is_some() {
                        contents.push(tensor.bytes(), prefix.clone());
                    }
                    sha256_hex(prefix)
                }
            };
            self.observer
                .advance(Stage::Write, tensor.bytes(), &tensor.name);
            shard.tensors.push((tensor, sum));
        }
        shard.sha256 = writer.finish()?;
        if self.consumes {
            // what is in this shard cannot be taken from them again: the rest of them is the only one that fits
            let across = shard.sources().into_iter();
            let across = across.filter(|module| !shard.parts.contains_key(*module));
            let paths: Vec<PathBuf> = across.map(|module| self.part_path(module)).collect();
            flush(paths.iter().map(PathBuf::as_path))?;
        }
        if let Some(outlet) = self.passing() {
            outlet.take(&self.finished(number, &shard), &contents)?;
            spool.remove()?;
        }
        let json = serde_json::to_vec(&shard).expect("a shard's record serialises");
        write_atomically(&self.shard_path(number, "json"), &json)?;
        let released = self.consume(&shard, &mut joined.parts)?;
        self.let_go(number, &shard)?;
        joined.shards.push(shard);
        Ok(released)
    }

    fn copy_carried(
        &self,
        writer: &mut ShardWriter,
        tensor: &Placed,
        mut spool: Option<&mut Spool>,
    ) -> Result<String> {
        let checkpoint = self.carried;
        let mut sum = Sum::default();
        writer.begin(&tensor.name);
        checkpoint.read_blocks(&tensor.name, |block| {
            if block.first_not_finite().is_some() {
                // read again as a whole: the error names the element's place in the tensor
                checkpoint.read_finite(&tensor.name)?;
            }
            if let Some(spool) = &mut spool {
                spool.write(&block.bytes)?;
            }
            let sums = |bytes: &[u8]| sum.update(bytes);
            both(&block.bytes, |bytes| writer.write(bytes), sums).0
        })?;
        let found = sum.finish();
        match self.frame.carried_sha256.get(&tensor.name) {
            Some(expected) if *expected != found => Err(Error::Checksum {
                what: Summed::Tensor(tensor.name.clone()),
                path: checkpoint.path_of(&tensor.name),
                expected: expected.clone(),
                found,
            }),
            _ => Ok(found),
        }
    }

    /// Gives the shards their names and writes everything else; the index last.
    ///
    /// The time is that of all machines, and the threads those of the largest.
    pub fn complete(&self, joined: Joined, threads: usize, seconds: f64) -> Result<Facts> {
        let Joined { parts, shards, .. } = joined;
        let records: BTreeMap<String, ModuleRecord> = parts
            .into_iter()
            .map(|(module, part)| (module, part.record))
            .collect();
        let mut index = Index::default();
        let mut away = Away::default();
        for (number, shard) in (1..).zip(&shards) {
            let name = Layout::Decomposition.shard_file(number, shards.len());
            if self.passing().is_some() {
                away.add(&name, shard.bytes, &shard.sha256);
            } else {
                self.name_shard(number, &name)?;
            }
            index.add(&name, shard);
        }
        away.save(self.workspace)?;
        let mut sigma: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        sigma.extend(shards.into_iter().flat_map(|shard| shard.sigma));
        let spectrum = Spectrum::of(&records, |module| {
            let sigma = sigma.remove(module);
            Ok(sigma.expect("every decomposed module was placed in a shard"))
        })?;
        let facts = self.facts(&records, &spectrum, index.total_size, threads, seconds);
        self.write_config(&facts, records)?;
        let beside = copy_side_files(&self.frame.side_files, self.out)?;
        // what was trained and measured before belongs to the base, not to what will be trained from here
        report::add(self.out, serde_json::Map::new(), "decompose", &facts)?;
        let nothing = serde_json::Map::new();
        report::add(self.out, nothing, spectrum::SECTION, &spectrum)?;
        self.write_index(index, beside)?;
        if let Some(dir) = &self.frame.local_base {
            // a sidecar is merged beside its base: remember where that was
            remember(dir, self.workspace)?;
        }
        Ok(facts)
    }

    fn name_shard(&self, number: usize, name: &str) -> Result<()> {
        let (from, to) = (self.shard_path(number, "safetensors"), self.out.join(name));
        match (from.exists(), to.exists()) {
            (true, true) => Err(Error::OutputOccupied {
                path: self.out.into(),
                found: format!("another `{name}`"),
            }),
            // named before a kill
            (false, true) => Ok(()),
            _ => rename(&from, &to),
        }
    }

    fn facts(
        &self,
        records: &BTreeMap<String, ModuleRecord>,
        spectrum: &Spectrum,
        bytes: u64,
        threads: usize,
        seconds: f64,
    ) -> Facts {
        let exceptions = records.values().map(|r| r.exceptions).sum();
        let elements: usize = records.values().map(|r| r.shape[0] * r.shape[1]).sum();
        let frame = self.frame;
        Facts {
            base: frame.pin.clone(),
            model_type: frame.model_type.clone(),
            rank: frame.rank,
            storing: frame.storing,
            nested_in: frame.nested_in.clone(),
            algorithm: frame.algorithm.clone(),
            linear_layers: frame.linear_layers,
            parameters: frame.parameters,
            trainable: Trainable {
                sigma: records.values().map(|r| r.q as u64).sum(),
                norms: frame.norms,
                embeddings: frame.embeddings,
            },
            untied_head: frame.untied_head,
            captured_energy: spectrum.captured_energy,
            exceptions,
            exceptions_share: exceptions as f64 / elements as f64,
            orthogonality: records
                .values()
                .map(|r| r.certificate.orthogonality)
                .fold(0.0, f64::max),
            double_precision: records.values().filter(|r| !r.route.is_single()).count(),
            bytes,
            base_bytes: frame.base_bytes,
            threads,
            seconds,
            base_card: frame.base_card.clone(),
        }
    }

    fn write_config(&self, facts: &Facts, modules: BTreeMap<String, ModuleRecord>) -> Result<()> {
        let path = &self.frame.base_config;
        let verbatim = std::fs::read(path).context("read", path)?;
        let mut config: Value = json::read(path)?;
        if facts.untied_head {
            untie(&mut config);
        }
        let section = SvdSection {
            schema: SCHEMA,
            layout: facts.storing.layout,
            factors: facts.storing.factors,
            base: facts.base.clone(),
            nested_in: facts.nested_in.clone(),
            rank: facts.rank,
            algorithm: facts.algorithm.clone(),
            modules,
            tool: Tool::this(),
        };
        config["svd"] = serde_json::to_value(section).expect("a section serialises");
        write_atomically(&self.out.join(BASE_CONFIG), &verbatim)?;
        if let Some(index) = &self.frame.base_index {
            let verbatim = std::fs::read(index).context("read", index)?;
            write_atomically(&self.out.join(BASE_INDEX), &verbatim)?;
        }
        let json = serde_json::to_vec_pretty(&config).expect("a JSON value serialises");
        write_atomically(&self.out.join("config.json"), &json).map(drop)
    }

    /// Written last: with it, and only with it, the directory is a decomposition.
    fn write_index(&self, mut index: Index, mut small: Vec<String>) -> Result<()> {
        small.push("config.json".into());
        small.push(BASE_CONFIG.into());
        if self.frame.base_index.is_some() {
            small.push(BASE_INDEX.into());
        }
        for name in small {
            let sum = sha256_file(&self.out.join(&name), |_| {})?;
            index.sums.files.insert(name, sum);
        }
        let json = serde_json::json!({
            "metadata": {"total_size": index.total_size, "sha256": index.sums},
            "weight_map": index.weight_map,
        });
        let json = serde_json::to_vec_pretty(&json).expect("a JSON value serialises");
        write_atomically(&self.out.join(Layout::Decomposition.index_file()), &json).map(drop)
    }
}

/// Where an undivided decomposition keeps its parts in the state folder.
pub const PARTS: &str = "parts";

/// Removes what helped to resume a job that is complete now.
pub fn clean_up(workspace: &Workspace) {
    let records = std::fs::read_dir(workspace.state(SHARDS));
    for record in records.into_iter().flatten().flatten() {
        let path = record.path();
        if path
            .extension()
            .is_some_and(|ending| ending == "json" || ending == "carried")
        {
            let _ = std::fs::remove_file(path);
        }
    }
    // both are empty, or hold what is not ours
    let _ = std::fs::remove_dir(workspace.state(SHARDS));
    let _ = std::fs::remove_dir(workspace.state(PARTS));
}

/// Copies a tensor of a part, and refuses one that is not what was written. `open` keeps the part for its next tensor.
fn copy_part(
    writer: &mut ShardWriter,
    tensor: &Placed,
    module: &str,
    part: &Part,
    open: &mut Option<(String, Checkpoint)>,
) -> Result<String> {
    let file = part.file.as_ref();
    let file = file.expect("a part stays until all of it is in shards");
    if open.as_ref().is_none_or(|(opened, _)| opened != module) {
        *open = Some((module.into(), file.open()?));
    }
    let (_, checkpoint) = open.as_ref().expect("it was opened above");
    let (mut sum, mut as_written) = (Sum::default(), Blake3::default());
    writer.begin(&tensor.name);
    checkpoint.read_blocks(&tensor.name, |block| {
        let sums = |bytes: &[u8]| {
            as_written.update(bytes);
            sum.update(bytes);
        };
        both(&block.bytes, |bytes| writer.write(bytes), sums).0
    })?;
    let mut written = part.tensors.iter();
    let written = written.find(|t| t.name == tensor.name);
    let written = written.expect("tensors are placed from this very list");
    written.check(&as_written.finish(), &file.path)?;
    Ok(sum.finish())
}
