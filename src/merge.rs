//! `merge`: a decomposition and adapters in, or any model and LoRAs; an ordinary model out, under the base's own names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::adapter::moved;
use crate::base::{Base, Seen, Standing, card_facts, copy_side_files, side_files, side_sums};
use crate::contents::{Contents, Section};
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::format::{BASE_CONFIG, BASE_INDEX, Pin, untie};
use crate::model::{ModelConfig, Tensors};
use crate::outlet::{Away, Finished, Outlet};
use crate::source::{Source, base_of_lora};
use crate::split::{Change, Factors, RoundingLoss};
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
    /// The model that LoRAs were merged into, where no decomposition tells of it.
    #[serde(flatten)]
    pub on: Option<Standing>,
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

/// Merges what was trained into the model of `source` and writes it to `out`: the model that `evaluate` measures.
///
/// Nothing trained, or Δσ that are all zero, gives back the base's files byte for byte; that is checked against the
/// pinned hashes.
///
/// # Errors
/// A LoRA of a head that is the embedding too; bytes that are not what was pinned; a full disk; an output directory that is not
/// this job's.
pub fn run(
    source: &Source,
    out: &Path,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    run_to(source, out, None, options, observer)
}

/// The same, but each finished file goes through `outlet`: unless it keeps them, no more than one is ever in `out`, and
/// [`Away`] says in the end which are not.
///
/// # Errors
/// As [`run`], and whatever `outlet` reports.
pub fn run_to(
    source: &Source,
    out: &Path,
    outlet: Option<&dyn Outlet>,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Facts> {
    let started = Instant::now();
    linalg::single_threaded_blas();
    refuse_half_of_a_tied_weight(source)?;
    let base_headers = source.base_headers()?;
    let headers: Vec<(String, Header)> = with_untied_heads(source, &base_headers)?
        .into_iter()
        .map(|(file, header)| Ok((file, recast(header, options.dtype)?)))
        .collect::<Result<_>>()?;
    let adapters = adapters(source)?;
    let seen = source.model().map(|model| Seen::of(&model.checkpoint));
    let seen = seen.transpose()?;
    let base = source.pin(observer)?;
    let dtype = options.dtype.map_or("base".into(), dtype_name);
    let settings = BTreeMap::from([
        match source.decomposition() {
            Some((artifact, _)) => ("decomposition".into(), artifact.content_sha256.clone()),
            None => ("model".into(), format!("{:?}", base.sha256)),
        },
        ("adapters".into(), format!("{adapters:?}")),
        ("dtype".into(), dtype.clone()),
        ("rounding".into(), rounding_name(options.rounding)),
    ]);
    let place = outlet.map(|outlet| ("files go to".into(), outlet.place()));
    let scales = (!source.loras().is_empty()).then(|| ("scales of LoRAs".into(), scales(source)));
    let beside = source
        .model()
        .map(|model| name_and_side_files(model, &base));
    let beside = beside
        .transpose()?
        .map(|sum| ("the model's other files".into(), sum));
    let settings = settings
        .into_iter()
        .chain(place)
        .chain(scales)
        .chain(beside)
        .collect();
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
    let config: Map<String, Value> = json::read(&config_of_base(source))?;
    let config = Value::Object(config);

    observer.start(Stage::Merge, total, Unit::Bytes);
    let merge = Merge {
        source,
        options,
        observer,
        tied_head: tied_head(source, &base_headers)?,
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
    let identical = sha256 == base.sha256;
    let tensors_identical = sha256_of_base == base.sha256;
    if is_untrained(source) && options.dtype.is_none() && !tensors_identical {
        refuse_difference(&base, out, &sha256_of_base)?;
    }
    write_config(source, out, config, options.dtype)?;
    write_index(source, out, &headers, options.dtype)?;
    let beside = copy_side_files(source.dir(), out)?;
    let inherited = inherited(source, &base)?;
    if let Some(seen) = seen {
        seen.refuse_change()?;
    }
    let on = source.model().map(|model| Standing {
        base,
        base_card: card_facts(&model.dir),
    });
    let facts = Facts {
        dtype,
        rounding: rounding_name(options.rounding),
        adapters,
        on,
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
    report::add(out, inherited, "merge", &facts)?;
    workspace.finish()?;
    Ok(facts)
}

/// The sha256 of each adapter's weights, and its factor.
fn adapters(source: &Source) -> Result<Vec<(String, f64)>> {
    let mut sums = match source.decomposition() {
        Some((_, mixture)) => mixture.sums()?,
        None => Vec::new(),
    };
    for (lora, weight) in source.loras() {
        sums.push((lora.sha256()?, *weight));
    }
    Ok(sums)
}

/// What a LoRA's config multiplies its weights by.
fn scales(source: &Source) -> String {
    let loras = source.loras().iter();
    let scales = loras.map(|(lora, _)| {
        let scales = lora.pairs.iter().map(|(module, pair)| (module, pair.scale));
        scales.collect::<Vec<_>>()
    });
    sha256_hex(format!("{:?}", scales.collect::<Vec<_>>()).as_bytes())
}

/// Whether nothing moves any weight.
fn is_untrained(source: &Source) -> bool {
    let parts = source
        .decomposition()
        .map(|(_, mixture)| &mixture.parts[..]);
    let mut parts = parts.unwrap_or_default().iter();
    parts.all(|(adapter, weight)| *weight == 0.0 || adapter.moves_nothing())
        && source.loras().iter().all(|(_, weight)| *weight == 0.0)
}

/// What a plain model is besides its weights: another job, if it is another.
fn name_and_side_files(model: &Base, base: &Pin) -> Result<String> {
    let sums = side_sums(&model.dir, side_files(&model.dir)?)?;
    let name = (&base.repo, &base.revision);
    Ok(sha256_hex(format!("{name:?} {sums:?}").as_bytes()))
}

/// The sections of reports that tell of the merged model too.
fn inherited(source: &Source, base: &Pin) -> Result<Map<String, Value>> {
    let mut inherited = source.inherited()?;
    let parts = source
        .decomposition()
        .map(|(_, mixture)| &mixture.parts[..]);
    // what was trained and measured tells of this model only if it is one adapter, whole
    match (parts.unwrap_or_default(), source.loras()) {
        ([(adapter, 1.0)], []) => inherited.extend(report::read(&adapter.dir)?),
        ([], [(lora, 1.0)]) => {
            // a LoRA may be put on another base than its own, or on another decomposition of it
            let own = base_of_lora(&lora.dir)?;
            if own.is_some_and(|own| own == json!(base.sha256)) {
                let told = ["train", "evaluate"];
                let sections = report::read(&lora.dir)?.into_iter();
                inherited.extend(sections.filter(|(name, _)| told.contains(&name.as_str())));
            }
        }
        _ => {}
    }
    Ok(inherited)
}

/// Refuses a LoRA of a head alone that is the embedding in the base: there is no tensor to add it to.
fn refuse_half_of_a_tied_weight(source: &Source) -> Result<()> {
    let config = source.config()?;
    if !config.tied || source.untied_head().is_some() {
        return Ok(());
    }
    let head = config.names.head;
    let mut loras = source.loras().iter();
    match loras.find(|(lora, _)| lora.pairs.contains_key(head)) {
        None => Ok(()),
        Some((lora, _)) => Err(Error::Adapter {
            path: lora.dir.clone(),
            reason: format!(
                "moves `{head}` alone, and the base has one weight for it and the embedding: merge it into a decomposition \
                 made with --untie-head"
            ),
        }),
    }
}

/// Where the base's own config lies.
fn config_of_base(source: &Source) -> PathBuf {
    let name = source
        .decomposition()
        .map_or("config.json", |_| BASE_CONFIG);
    source.dir().join(name)
}

/// The base's headers, and behind the last tensor of the last file the heads that were untied.
fn with_untied_heads(source: &Source, base: &[(String, Header)]) -> Result<Vec<(String, Header)>> {
    let mut headers = base.to_vec();
    let Some((artifact, _)) = source.decomposition() else {
        return Ok(headers);
    };
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
fn tied_head(source: &Source, base: &[(String, Header)]) -> Result<Option<(String, String)>> {
    // no LoRA moves it as a whole
    let Some((artifact, mixture)) = source.decomposition() else {
        return Ok(None);
    };
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
    source: &'a Source,
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
        let source = self.source;
        let rounder = |name: &str| Rounder::new(self.options.rounding, entry.dtype, name);
        let module = entry.name.strip_suffix(".weight");
        let split = (source.decomposition())
            .filter(|(artifact, _)| artifact.module_of(&entry.name).is_some());
        let loras = module.map_or(Vec::new(), |module| source.low_rank(module));
        let (Some(module), true) = (module, split.is_some() || !loras.is_empty()) else {
            // a stored copy of a tied head goes along with the embedding, to the same bytes
            let name = match &self.tied_head {
                Some((head, embedding)) if *head == entry.name => embedding,
                _ => &entry.name,
            };
            let base = source.base_tensor(name)?;
            let cast = match self.whole(name, &base) {
                Some(trained) => rounded(&trained, &base.shape, &rounder(name)),
                None if is_float(base.dtype) => base.round(&rounder(name)),
                None => base,
            };
            cast.refuse_overflow(&entry.name)?;
            return Ok((cast, RoundingLoss::default()));
        };
        let (matrix, mut factors, mut change) = match split {
            Some((artifact, mixture)) => {
                let factors = artifact.factors(module)?;
                let record = &artifact.svd.modules[module];
                let matrix = artifact.restore(module, record, &factors)?;
                (matrix, factors, mixture.change(module, record.q))
            }
            None => {
                let matrix = source.base_tensor(&entry.name)?;
                let factors = Factors::none(matrix.shape[0], matrix.shape[1]);
                (matrix, factors, Change::of_sigma(Vec::new()))
            }
        };
        for lora in loras {
            // a factor of 53 digits is the sum of two of 24, but for its last five
            let near = lora.scale as f32;
            let rest = (lora.scale - f64::from(near)) as f32;
            for part in [near, rest].into_iter().filter(|&part| part != 0.0) {
                factors = factors.followed_by(lora.b.t(), lora.a.view());
                (change.delta).extend(std::iter::repeat_n(part, lora.a.nrows()));
            }
        }
        let whole = self.whole(&entry.name, &matrix);
        let rounder = rounder(&entry.name);
        let (merged, loss) = factors.merge(&matrix, whole.as_deref(), &change, &rounder);
        merged.refuse_overflow(&entry.name)?;
        Ok((merged, loss))
    }

    /// What became of a tensor that was trained, or is carried, as a whole.
    fn whole(&self, name: &str, base: &Elements) -> Option<Vec<f64>> {
        let mixture = self.source.decomposition().map(|(_, mixture)| mixture);
        let trained = mixture.and_then(|mixture| mixture.tensor(name, base));
        let carried = self.source.carried(name);
        match trained {
            trained if carried.is_empty() => trained,
            Some(trained) => Some(moved(trained.into_iter(), &carried)),
            None => Some(moved(base.to_f32().into_iter().map(f64::from), &carried)),
        }
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
fn refuse_difference(base: &Pin, out: &Path, sha256: &BTreeMap<String, String>) -> Result<()> {
    for (file, expected) in &base.sha256 {
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
    source: &Source,
    out: &Path,
    mut config: Value,
    dtype: Option<Dtype>,
) -> Result<()> {
    let kept = config_of_base(source);
    let verbatim = std::fs::read(&kept).context("read", &kept)?;
    let untied = source.untied_head().is_some();
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
    source: &Source,
    out: &Path,
    headers: &[(String, Header)],
    dtype: Option<Dtype>,
) -> Result<()> {
    let kept = match source.model() {
        None => source.dir().join(BASE_INDEX),
        Some(model) if model.checkpoint.indexed => model.dir.join(Layout::Model.index_file()),
        // one that lies beside a single file names others
        Some(_) => return Ok(()),
    };
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
