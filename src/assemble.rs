//! `assemble`: the parts that several machines decomposed in, one decomposition out.
//!
//! The result is, byte for byte, what one machine would have written. The parts are read only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::base::Base;
use crate::error::{Error, Result};
use crate::event::Observer;
use crate::format::{ArtifactLayout, FactorsDtype, ModuleTensors};
use crate::job::{Job, MATRICES, ShareRecord};
use crate::join::{self, Facts, Frame, Join};
use crate::model::ModelConfig;
use crate::part::Part;
use crate::plan::Plan;
use crate::report;
use crate::sum::sha256_hex;
use crate::workspace::{Again, Workspace, bytes_in, check_free_space};

/// All parts of one job: each number once, all of the same settings.
#[derive(Debug)]
pub struct Shares {
    shares: Vec<(PathBuf, ShareRecord)>,
}

impl Shares {
    /// Reads the records of part directories and checks that they make a whole.
    ///
    /// # Errors
    /// A directory that is no finished part, a part that is missing or there twice, parts of different jobs.
    pub fn open(dirs: &[PathBuf]) -> Result<Self> {
        let mut shares: Vec<(PathBuf, ShareRecord)> = Vec::new();
        for dir in dirs {
            let record = ShareRecord::read(dir)?;
            if let Some((first, before)) = shares.first() {
                refuse_difference((first, before), (dir, &record))?;
            }
            let same = shares.iter().find(|(_, other)| other.part == record.part);
            if let Some((first, _)) = same {
                return Err(Error::PartTwice {
                    what: format!("part {}", record.part),
                    first: first.clone(),
                    second: dir.clone(),
                });
            }
            shares.push((dir.clone(), record));
        }
        shares.sort_by_key(|(_, record)| record.part.number);
        let of = shares.first().map_or(1, |(_, record)| record.part.of);
        let here = |number: &usize| shares.iter().any(|(_, r)| r.part.number == *number);
        let missing: Vec<String> = (1..=of)
            .filter(|number| !here(number))
            .map(|number| format!("part {number}/{of}"))
            .collect();
        if missing.is_empty() {
            Ok(Self { shares })
        } else {
            Err(Error::PartsMissing { missing })
        }
    }

    /// The job that all of them are shares of.
    pub fn job(&self) -> &Job {
        let (_, record) = self.shares.first().expect("there is at least one share");
        &record.job
    }

    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        self.shares.iter().map(|(dir, _)| dir.as_path())
    }

    /// Every matrix of the plan, from the one directory that holds it.
    fn parts(&self, plan: &Plan) -> Result<BTreeMap<String, Part>> {
        let mut places: BTreeMap<&str, (&Path, &str)> = BTreeMap::new();
        for (dir, record) in &self.shares {
            for (module, header_sha256) in &record.modules {
                if let Some((first, _)) = places.insert(module, (dir, header_sha256)) {
                    return Err(Error::PartTwice {
                        what: format!("the matrix `{module}`"),
                        first: first.into(),
                        second: dir.clone(),
                    });
                }
            }
        }
        let dtype = plan.storing.factors;
        let mut parts = BTreeMap::new();
        let mut missing = Vec::new();
        for tensor in plan.decomposed() {
            let module = tensor.module();
            match places.get(module) {
                Some((dir, header_sha256)) => {
                    let part = read_part(&dir.join(MATRICES), module, dtype, header_sha256)?;
                    if part.record.shape != *tensor.shape {
                        return Err(Error::Shape {
                            tensor: tensor.name.clone(),
                            path: crate::part::path_of(&dir.join(MATRICES), module),
                            expected: tensor.shape.clone(),
                            found: part.record.shape.to_vec(),
                        });
                    }
                    let residual = ModuleTensors::of(module).residual;
                    let holds = part.tensors.iter().any(|t| t.name == residual);
                    if plan.storing.layout == ArtifactLayout::Residual && !holds {
                        return Err(Error::TensorMissing {
                            tensor: residual,
                            path: crate::part::path_of(&dir.join(MATRICES), module),
                        });
                    }
                    parts.insert(module.to_string(), part);
                }
                None => missing.push(format!("the matrix `{module}`")),
            }
        }
        if missing.is_empty() {
            Ok(parts)
        } else {
            Err(Error::PartsMissing { missing })
        }
    }
}

fn read_part(
    folder: &Path,
    module: &str,
    dtype: FactorsDtype,
    header_sha256: &str,
) -> Result<Part> {
    let part = Part::read(folder, module, dtype)?;
    match &part.file {
        Some(file) if file.header_sha256 != header_sha256 => Err(Error::Checksum {
            what: format!("the header of the matrix `{module}`").into(),
            path: file.path.clone(),
            expected: header_sha256.into(),
            found: file.header_sha256.clone(),
        }),
        _ => Ok(part),
    }
}

/// Refuses two shares that differ in what must be equal.
fn refuse_difference(
    (first, before): (&Path, &ShareRecord),
    (second, now): (&Path, &ShareRecord),
) -> Result<()> {
    let (before, now) = (before.settings(), now.settings());
    match before.iter().find(|&(what, value)| now[what] != *value) {
        None => Ok(()),
        Some((what, value)) => Err(Error::PartsDiffer {
            what: what.clone(),
            dirs: Box::new([first.into(), second.into()]),
            before: value.clone(),
            now: now[what].clone(),
        }),
    }
}

/// Joins the parts of a decomposition of `base` into the directory `out`.
///
/// # Errors
/// A base that is not the one decomposed; a part that is not what was written; a full disk; an output directory that is
/// not this job's.
pub fn run(shares: &Shares, base: &Base, out: &Path, observer: &dyn Observer) -> Result<Facts> {
    let started = Instant::now();
    let job = shares.job();
    let config = ModelConfig::read(&base.dir)?;
    let plan = Plan::new(
        &base.dir,
        &config,
        &base.checkpoint.inventory,
        &job.options.plan,
    )?;
    let parts = shares.parts(&plan)?;
    let mut settings = job.settings();
    settings.insert("content of the parts".into(), content(&parts));
    let (mut workspace, claim) = Workspace::claim(out, "assemble", settings)?;
    if claim.is_finished(out, Again::GoesOn, observer) {
        join::clean_up(&workspace);
        return report::section(out, "decompose");
    }
    base.check(&job.base, observer)?;
    // a record may claim any number
    let claimed = shares.shares.iter().map(|(_, record)| record.bytes);
    let needed = claimed.fold(plan.disk_bytes_copied(), u64::saturating_add);
    check_free_space(out, needed.saturating_sub(bytes_in(out)))?;
    let join = Join {
        frame: &Frame::of(base, job, &plan),
        carried: &base.checkpoint,
        out,
        workspace: &workspace,
        observer,
        consumes: false,
        outlet: None,
    };
    let mut joined = join.resume()?;
    joined.parts.extend(parts);
    let joined = join.write_shards(joined, None)?;
    let joined = joined.expect("every part of the plan was read above");
    let records = || shares.shares.iter().map(|(_, record)| record);
    let facts = join.complete(
        joined,
        records().map(|r| r.threads).max().unwrap_or(1),
        records().map(|r| r.seconds).sum::<f64>() + started.elapsed().as_secs_f64(),
    )?;
    workspace.finish()?;
    join::clean_up(&workspace);
    Ok(facts)
}

/// One sum over all parts: an interrupted run must not go on with others.
fn content(parts: &BTreeMap<String, Part>) -> String {
    let files = parts.iter().filter_map(|(module, part)| {
        let file = part.file.as_ref()?;
        Some(format!("{} {module}\n", file.header_sha256))
    });
    sha256_hex(files.collect::<String>().as_bytes())
}
