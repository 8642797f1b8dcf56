//! `merge`: a decomposition and adapters in, an ordinary model out, under the base's own names.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::adapter::Mixture;
use crate::artifact::Artifact;
use crate::base::{copy_side_files, side_sums};
use crate::contents::{Contents, Section};
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{BASE_CONFIG, BASE_INDEX, untie};

use crate::model::ModelConfig;
use crate::outlet::{Away, Finished, Outlet};
use crate::split::RoundingLoss;
use crate::sum::{hex, sha256_hex};
use crate::weights::element::is_float;
use crate::weights::shard::write_atomically;
use crate::weights::{
    Dtype, Elements, Entry, Header, Layout, Rounder, Rounding, ShardWriter, dtype_name,
};
use crate::workspace::{Again, Workspace, bytes_in, check_free_space};
use crate::{json, linalg, report, workers};

/// How to merge.
#[derive(Debug, Clone)]
pub struct Options {
    /// `None` keeps every tensor in the base's dtype.
    pub dtype: Option<Dtype>,
    pub rounding: Rounding,
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dtype: None,
            rounding: Rounding::default(),
            threads: workers::cores(),
        }
    }
}

/// The facts of a merge, as `report.json` keeps them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    /// `base`, or the dtype asked for.
    pub dtype: String,
    /// `nearest`, or `stochastic` and its seed.
    #[serde(default)]
    pub rounding: String,
    /// The sha256 of each adapter's weights, and its factor.
    pub adapters: Vec<(String, f64)>,
    /// The sha256 of each weight file written.
    pub sha256: BTreeMap<String, String>,
    /// Of each tensor: what is damaged later can be named.
    #[serde(default)]
    pub tensor_sha256: BTreeMap<String, String>,
    /// Of every other file but the card, which is the reader's to edit.
    #[serde(default)]
    pub side_sha256: BTreeMap<String, String>,
    /// Every weight file is the base's, byte for byte.
    pub identical_to_base: bool,
    /// Every tensor of the base is there, byte for byte; a head that was untied may stand beside them.
    #[serde(default)]
    pub tensors_identical_to_base: bool,
    /// ‖round(W) − W‖ / ‖W − M‖ over all changed weights: how much of the training rounding ate.
    pub rounding_loss: f64,
    /// The share of the training's effect on the weights that is there after rounding, in its own direction.
    #[serde(default)]
    pub kept_effect: f64,
    /// Share of the changed weights' elements that rounding put back on the base's value.
    pub unchanged_share: f64,
    pub bytes: u64,
    pub seconds: f64,
}

/// Below this, rounding took so much of what training changed that it is worth a warning (a choice).
const KEPT_EFFECT_WARNED: f64 = 0.75;

/// Merges `mixture` into the model of `artifact` and writes it to `out`.
///
/// An empty mixture, or one whose Δσ are all zero, gives back the base's files byte for byte; that is checked against
/// the pinned hashes.
pub fn run(
    artifact: &Artifact,
    mixture: &Mixture,
    out: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    run_to(artifact, mixture, out, None, options, observer)
}

/// The same, but each finished file goes through `outlet`: unless it keeps them, no more than one is ever in `out`, and
/// [`Away`] says in the end which are not.
///
/// # Errors
/// As [`run`], and whatever `outlet` reports.
pub fn run_to(
    artifact: &Artifact,
    mixture: &Mixture,
    out: &Path,
    outlet: Option<&dyn Outlet>,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    let started = Instant::now();
    linalg::single_threaded_blas();
    let base_headers = artifact.base_headers()?;
    let headers: Vec<(String, Header)> = with_untied_heads(artifact, &base_headers)?
        .into_iter()
        .map(|(file, header)| Ok((file, recast(header, options.dtype)?)))
        .collect::<Result<_>>()?;
    let adapters = mixture.sums()?;
    let dtype = options.dtype.map_or("base".into(), dtype_name);
    let settings = BTreeMap::from([
        ("decomposition".into(), artifact.content_sha256.clone()),
        ("adapters".into(), format!("{adapters:?}")),
        ("dtype".into(), dtype.clone()),
        ("rounding".into(), rounding_name(options.rounding)),
    ]);
    let place = outlet.map(|outlet| ("files go to".into(), outlet.place()));
    let settings = settings.into_iter().chain(place).collect();
    let (mut workspace, claim) = Workspace::claim(out, "merge", settings)?;
    let total: u64 = headers.iter().map(|(_, header)| header.file_bytes()).sum();
    if claim.is_finished(out, Again::BeginsAnew, observer) {
        return report::section(out, "merge");
    }
    let passes_through = outlet.is_some_and(|outlet| !outlet.keeps());
    let room = match outlet {
        Some(outlet) if passes_through => workspace.room(outlet.room(), 0)?,
        _ => {
            // what an earlier try finished is replaced file by file: the old one is there until the new one is whole
            let there = headers.iter().filter(|(file, _)| out.join(file).exists());
            let more = there
                .map(|(_, header)| header.file_bytes())
                .max()
                .unwrap_or(0);
            check_free_space(
                out,
                total.saturating_sub(bytes_in(out)).saturating_add(more),
            )?;
            u64::MAX
        }
    };
    // read before hours of work, not after
    let config: Map<String, Value> = json::read(&artifact.dir.join(BASE_CONFIG))?;
    let config = Value::Object(config);

    observer.start(Stage::Merge, total, Unit::Bytes);
    let merge = Merge {
        artifact,
        mixture,
        options,
        observer,
        tied_head: tied_head(artifact, mixture, &base_headers)?,
    };
    let Written {
        sha256,
        sha256_of_base,
        loss,
        tensor_sha256,
        away,
    } = merge.files(&headers, &base_headers, out, outlet, room)?;
    away.save(&workspace)?;
    observer.finish(Stage::Merge);
    let untrained = mixture
        .parts
        .iter()
        .all(|(adapter, weight)| *weight == 0.0 || adapter.moves_nothing());
    let identical = sha256 == artifact.svd.base.sha256;
    let tensors_identical = sha256_of_base == artifact.svd.base.sha256;
    if untrained && options.dtype.is_none() && !tensors_identical {
        refuse_difference(artifact, out, &sha256_of_base)?;
    }
    write_config(artifact, out, config, options.dtype)?;
    write_index(artifact, out, &headers, options.dtype)?;
    let beside = copy_side_files(&artifact.dir, out)?;
    let facts = Facts {
        dtype,
        rounding: rounding_name(options.rounding),
        adapters,
        sha256,
        tensor_sha256,
        side_sha256: side_sums(out, beside)?,
        identical_to_base: identical,
        tensors_identical_to_base: tensors_identical,
        rounding_loss: loss.relative(),
        kept_effect: loss.kept(),
        unchanged_share: loss.unchanged as f64 / loss.elements.max(1) as f64,
        bytes: total,
        seconds: started.elapsed().as_secs_f64(),
    };
    if facts.kept_effect < KEPT_EFFECT_WARNED {
        observer.warn(what_was_lost(&facts, &headers));
    }
    let mut inherited = report::inherited(&artifact.dir)?;
    // what was trained and measured tells of this model only if it is one adapter, whole
    if let [(adapter, 1.0)] = mixture.parts.as_slice() {
        for (section, facts) in report::read(&adapter.dir)? {
            inherited.insert(section, facts);
        }
    }
    report::add(out, inherited, "merge", &facts)?;
    workspace.finish()?;
    Ok(facts)
}

/// The base's headers, and behind the last tensor of the last file the heads that were untied.
fn with_untied_heads(
    artifact: &Artifact,
    base: &[(String, Header)],
) -> Result<Vec<(String, Header)>> {
    let mut headers = base.to_vec();
    for (module, record) in artifact.untied() {
        let tensor = format!("{module}.weight");
        let mut stored = headers.iter().flat_map(|(_, header)| &header.entries);
        if stored.any(|entry| entry.name == tensor) {
            continue;
        }
        let dtype = artifact.dtype_of(module, record)?;
        if let Some((_, last)) = headers.last_mut() {
            *last = last.with_tensor(&tensor, dtype, &record.shape)?;
        }
    }
    Ok(headers)
}

/// The head and the embedding, where the base stores both as one weight and training moves it.
fn tied_head(
    artifact: &Artifact,
    mixture: &Mixture,
    base: &[(String, Header)],
) -> Result<Option<(String, String)>> {
    let stored = |name: &str| {
        let mut entries = base.iter().flat_map(|(_, header)| &header.entries);
        entries.any(|entry| entry.name == name)
    };
    let config = ModelConfig::parse(&artifact.dir.join("config.json"), &artifact.config)?;
    let head = format!("{}.weight", config.names.head);
    let embedding = config.embedding(config.prefix(stored));
    let is_one = config.tied && artifact.untied().next().is_none();
    if !is_one || !stored(&head) || !mixture.trains(&embedding) {
        return Ok(None);
    }
    // which of two different ones is the head, nobody can say: both stay what they are
    let same = artifact.base_tensor(&head)?.bytes == artifact.base_tensor(&embedding)?.bytes;
    Ok(same.then_some((head, embedding)))
}

/// The header with every float tensor in another dtype.
fn recast(header: Header, dtype: Option<Dtype>) -> Result<Header> {
    let Some(dtype) = dtype else {
        return Ok(header);
    };
    Header::compose(header.entries.iter().map(|entry| {
        let dtype = if is_float(entry.dtype) {
            dtype
        } else {
            entry.dtype
        };
        (entry.name.as_str(), dtype, entry.shape.as_slice())
    }))
}

/// A merge under way.
struct Merge<'a> {
    artifact: &'a Artifact,
    mixture: &'a Mixture,
    options: &'a Options,
    observer: &'a dyn Observer,
    /// (head, embedding), where both are stored, are the same, and the embedding was trained.
    tied_head: Option<(String, String)>,
}

/// What was written.
#[derive(Default)]
struct Written {
    /// By file.
    sha256: BTreeMap<String, String>,
    /// The same of the base's files, if they held these tensors.
    sha256_of_base: BTreeMap<String, String>,
    tensor_sha256: BTreeMap<String, String>,
    /// Over all tensors.
    loss: RoundingLoss,
    /// The files that are not in the directory any more.
    away: Away,
}

impl Merge<'_> {
    /// Writes all files into `out`, of which a file may take `room` bytes, and gives each to the outlet.
    fn files(
        &self,
        headers: &[(String, Header)],
        base_headers: &[(String, Header)],
        out: &Path,
        outlet: Option<&dyn Outlet>,
        room: u64,
    ) -> Result<Written> {
        let mut written = Written::default();
        for ((file, header), (_, base_header)) in headers.iter().zip(base_headers) {
            let path = out.join(file);
            let fits = header.file_bytes() <= room;
            let writer = match fits {
                true => ShardWriter::create(&path, header.clone())?,
                false => {
                    self.observer.note(format!(
                        "{file} is larger than the {room} bytes of disk there are: made once for its sum, and again on its way"
                    ));
                    ShardWriter::nowhere(&path, header.clone())?
                }
            };
            let (sha256, of_base) = self.write(writer, header, base_header, &mut written)?;
            if let Some(outlet) = outlet {
                let finished = Finished {
                    name: file.clone(),
                    bytes: header.file_bytes(),
                    sha256: sha256.clone(),
                };
                if fits {
                    outlet.take(&finished, &Section::whole(&path)?)?;
                } else {
                    outlet.take(&finished, &Remade::new(self, header))?;
                }
                if !outlet.keeps() {
                    if fits {
                        std::fs::remove_file(&path).context("remove", &path)?;
                    }
                    written.away.add(file, finished.bytes, &sha256);
                }
            }
            written.sha256.insert(file.clone(), sha256);
            written.sha256_of_base.insert(file.clone(), of_base);
        }
        Ok(written)
    }

    /// Writes one file. Returns its sha256, and the sha256 of the base's file if it held these tensors: the same unless a
    /// head stands behind them.
    fn write(
        &self,
        mut writer: ShardWriter,
        header: &Header,
        base_header: &Header,
        all: &mut Written,
    ) -> Result<(String, String)> {
        // hashed a second time only where the file is not the base's from end to end
        let base_tensors = base_header.entries.len();
        let longer = header.entries.len() > base_tensors;
        let mut base_hash = longer.then(|| Sha256::new_with_prefix(&base_header.prefix));
        let mut written = 0;
        workers::in_order(
            &header.entries,
            self.options.threads,
            |entry| {
                let (elements, eaten) = self.tensor(entry)?;
                let sum = sha256_hex(&elements.bytes);
                Ok((elements, eaten, sum))
            },
            |entry, (elements, eaten, sum)| {
                all.loss.add(&eaten);
                all.tensor_sha256.insert(entry.name.clone(), sum);
                self.observer
                    .advance(Stage::Merge, entry.bytes, &entry.name);
                if let Some(hash) = base_hash.as_mut().filter(|_| written < base_tensors) {
                    hash.update(&elements.bytes);
                }
                written += 1;
                writer.put(&entry.name, &elements.bytes)
            },
        )?;
        let sum = writer.finish()?;
        let base_sum = base_hash.map_or(sum.clone(), |hash| hex(&hash.finalize()));
        Ok((sum, base_sum))
    }

    /// One tensor of the merged model, in the dtype its entry announces.
    fn tensor(&self, entry: &Entry) -> Result<(Elements, RoundingLoss)> {
        let (artifact, mixture) = (self.artifact, self.mixture);
        let rounder = |name: &str| Rounder::new(self.options.rounding, entry.dtype, name);
        let Some((module, record)) = artifact.module_of(&entry.name) else {
            // a stored copy of a tied head goes along with the embedding, to the same bytes
            let name = match &self.tied_head {
                Some((head, embedding)) if *head == entry.name => embedding,
                _ => &entry.name,
            };
            let base = artifact.base_tensor(name)?;
            let cast = match mixture.tensor(name, &base) {
                Some(trained) => rounded(&trained, &base.shape, &rounder(name)),
                None if is_float(base.dtype) => base.round(&rounder(name)),
                None => base,
            };
            cast.refuse_overflow(&entry.name)?;
            return Ok((cast, RoundingLoss::default()));
        };
        let factors = artifact.factors(module)?;
        let matrix = artifact.restore(module, record, &factors)?;
        let whole = mixture.tensor(&entry.name, &matrix);
        let change = mixture.change(module, record.q);
        let (merged, loss) =
            factors.merge(&matrix, whole.as_deref(), &change, &rounder(&entry.name));
        merged.refuse_overflow(&entry.name)?;
        Ok((merged, loss))
    }
}

/// A merged file that is made as it is read, tensor by tensor: no disk has to hold it.
struct Remade<'a> {
    merge: &'a Merge<'a>,
    header: &'a Header,
    /// The tensor that was read last, by its number.
    made: Mutex<Option<(usize, Vec<u8>)>>,
}

impl<'a> Remade<'a> {
    fn new(merge: &'a Merge, header: &'a Header) -> Self {
        Self {
            merge,
            header,
            made: Mutex::default(),
        }
    }
}

impl Contents for Remade<'_> {
    fn read_at(&self, position: u64, buffer: &mut [u8]) -> Result<usize> {
        let entries = &self.header.entries;
        let begun = entries.partition_point(|entry| entry.offset <= position);
        let Some(number) = begun.checked_sub(1) else {
            return self.header.prefix.read_at(position, buffer);
        };
        let entry = &entries[number];
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = match made.take() {
            Some((there, bytes)) if there == number => bytes,
            _ => self.merge.tensor(entry)?.0.bytes,
        };
        let (_, bytes) = made.insert((number, bytes));
        bytes.read_at(position - entry.offset, buffer)
    }
}

fn rounded(values: &[f64], shape: &[usize], rounder: &Rounder) -> Elements {
    let mut bytes = Vec::with_capacity(values.len() * rounder.dtype().bitsize() / 8);
    for (at, &x) in values.iter().enumerate() {
        rounder.push(x, at, &mut bytes);
    }
    Elements {
        dtype: rounder.dtype(),
        shape: shape.to_vec(),
        bytes,
    }
}

fn rounding_name(rounding: Rounding) -> String {
    match rounding {
        Rounding::Nearest => "nearest".into(),
        Rounding::Stochastic { seed } => format!("stochastic, seed {seed}"),
    }
}

/// What rounding took, and what would keep it.
fn what_was_lost(facts: &Facts, headers: &[(String, Header)]) -> String {
    let mut entries = headers.iter().flat_map(|(_, header)| &header.entries);
    let is_short = |entry: &Entry| is_float(entry.dtype) && entry.dtype.bitsize() < 32;
    let (bits, finer) = match entries.any(is_short) {
        true => (
            16,
            "Merge with --rounding stochastic or --dtype f32, or publish",
        ),
        false => (32, "Publish"),
    };
    format!(
        "rounding to {bits} bits erased {:.0} % of the training: {:.0} % of the elements are back on the base's values. \
         {finer} the adapter, which loses nothing",
        100.0 * (1.0 - facts.kept_effect),
        100.0 * facts.unchanged_share
    )
}

/// Names the tensor or file in which an untrained merge differs from the pinned base.
fn refuse_difference(
    artifact: &Artifact,
    out: &Path,
    sha256: &BTreeMap<String, String>,
) -> Result<()> {
    for (file, expected) in &artifact.svd.base.sha256 {
        if sha256.get(file) != Some(expected) {
            return Err(Error::Checksum {
                what: format!("the untrained merge `{file}` is not the pinned base file").into(),
                path: out.join(file),
                expected: expected.clone(),
                found: sha256.get(file).cloned().unwrap_or("(no such file)".into()),
            });
        }
    }
    Ok(())
}

fn write_config(
    artifact: &Artifact,
    out: &Path,
    mut config: Value,
    dtype: Option<Dtype>,
) -> Result<()> {
    let kept = artifact.dir.join(BASE_CONFIG);
    let verbatim = std::fs::read(&kept).context("read", &kept)?;
    let untied = artifact.untied().next().is_some();
    if dtype.is_none() && !untied {
        return write_atomically(&out.join("config.json"), &verbatim).map(drop);
    }
    if untied {
        untie(&mut config);
    }
    if let Some(dtype) = dtype {
        let name = match dtype {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            _ => "float32",
        };
        // transformers 5 writes `dtype`, older ones `torch_dtype`
        let key = if config["dtype"].is_null() {
            "torch_dtype"
        } else {
            "dtype"
        };
        config[key] = Value::from(name);
    }
    let json = serde_json::to_vec_pretty(&config).expect("a JSON value serialises");
    write_atomically(&out.join("config.json"), &json).map(drop)
}

fn write_index(
    artifact: &Artifact,
    out: &Path,
    headers: &[(String, Header)],
    dtype: Option<Dtype>,
) -> Result<()> {
    let kept = artifact.dir.join(BASE_INDEX);
    if !kept.exists() {
        return Ok(());
    }
    let path = out.join(Layout::Model.index_file());
    let mut index: Map<String, Value> = json::read(&kept)?;
    let mut added = 0;
    if let Some(Value::Object(map)) = index.get_mut("weight_map") {
        for (file, header) in headers {
            for entry in &header.entries {
                if !map.contains_key(&entry.name) {
                    map.insert(entry.name.clone(), file.as_str().into());
                    added += entry.elements() as u64;
                }
            }
        }
    }
    if dtype.is_none() && added == 0 {
        let verbatim = std::fs::read(&kept).context("read", &kept)?;
        return write_atomically(&path, &verbatim).map(drop);
    }
    let entries = headers.iter().flat_map(|(_, header)| &header.entries);
    let total: u64 = entries.map(|entry| entry.bytes).sum();
    if let Some(Value::Object(metadata)) = index.get_mut("metadata") {
        metadata.insert("total_size".into(), total.into());
        // newer indices count these too
        if let Some(parameters) = metadata.get("total_parameters").and_then(Value::as_u64) {
            let parameters = parameters.saturating_add(added);
            metadata.insert("total_parameters".into(), parameters.into());
        }
    }
    let json = serde_json::to_vec_pretty(&index).expect("a JSON value serialises");
    write_atomically(&path, &json).map(drop)
}
