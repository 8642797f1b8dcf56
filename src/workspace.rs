//! An output directory while a verb works in it: whose it is, how far the work is, who else is there.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Result};
use crate::event::Observer;
use crate::json;
use crate::lock;
use crate::weights::shard::write_atomically;

/// Our folder inside an output directory. It is never published.
pub const STATE_DIR: &str = ".svdhub";

/// With this file a directory is one machine's share of a decomposition, for `assemble`.
pub const PART_FILE: &str = "part.json";

/// What may wait on the disk, where nothing is to stay there and more is free.
const PASSING_BYTES: u64 = 10_000_000_000;

/// What the directory was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// New or empty.
    Fresh,
    /// The same job was interrupted here.
    Interrupted,
    /// The same job ended here.
    Finished,
}

/// What becomes of interrupted work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    GoesOn,
    BeginsAnew,
}

impl Claim {
    /// Says what was found in `dir`, if anything was; and whether nothing is left to do.
    pub fn is_finished(self, dir: &Path, again: Again, observer: &dyn Observer) -> bool {
        let dir = dir.display();
        match (self, again) {
            (Self::Fresh, _) => {}
            (Self::Interrupted, Again::GoesOn) => observer.note(format!("going on in {dir}")),
            (Self::Interrupted, Again::BeginsAnew) => {
                observer.note(format!("beginning anew in {dir}"));
            }
            (Self::Finished, _) => observer.note(format!("{dir} is complete already")),
        }
        self == Self::Finished
    }
}

/// An output directory held by this process until dropped.
#[derive(Debug)]
pub struct Workspace {
    dir: PathBuf,
    job: Job,
    _lock: File,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Job {
    verb: String,
    finished: bool,
    settings: BTreeMap<String, String>,
    /// The bytes of what lay in the directory when it was finished, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    files: BTreeMap<String, u64>,
}

impl Workspace {
    /// Takes `dir` for a job. The same job, interrupted, may go on; anything else in there is refused.
    pub fn claim(
        dir: &Path,
        verb: &str,
        settings: BTreeMap<String, String>,
    ) -> Result<(Self, Claim)> {
        let occupied = |found: String| Error::OutputOccupied {
            path: dir.into(),
            found,
        };
        if dir.exists() && !dir.is_dir() {
            return Err(occupied("a file of that name".into()));
        }
        let state = dir.join(STATE_DIR);
        let job_file = state.join("job.json");
        if !job_file.exists() && dir.exists() {
            let entries = std::fs::read_dir(dir).context("list", dir)?;
            for entry in entries {
                let name = entry.context("list", dir)?.file_name();
                if name != STATE_DIR {
                    return Err(occupied(format!(
                        "files of something else ({})",
                        name.to_string_lossy()
                    )));
                }
            }
        }
        std::fs::create_dir_all(&state).context("create", &state)?;
        let lock_file = state.join("lock");
        let lock = lock::open(&lock_file)?;
        if !lock::try_hold(&lock).context("lock", &lock_file)? {
            return Err(Error::OutputLocked { path: dir.into() });
        }
        let job = Job {
            verb: verb.into(),
            finished: false,
            settings,
            files: BTreeMap::new(),
        };
        let claim = if job_file.exists() {
            let before: Job = json::read(&job_file)?;
            if before.verb != job.verb {
                return Err(occupied(format!("the work of `svdhub {}`", before.verb)));
            }
            same_settings(dir, &before, &job.settings)?;
            match before.finished && before.lost(dir).is_none() {
                true => Claim::Finished,
                false => Claim::Interrupted,
            }
        } else {
            Claim::Fresh
        };
        let workspace = Self {
            dir: dir.into(),
            job,
            _lock: lock,
        };
        if claim != Claim::Finished {
            workspace.save()?;
        }
        Ok((workspace, claim))
    }

    /// A path in our own folder of the directory.
    pub fn state(&self, name: &str) -> PathBuf {
        self.dir.join(STATE_DIR).join(name)
    }

    /// What work that passes through may take of the disk in all: what is allowed, else what is usual, as far as it is free.
    ///
    /// # Errors
    /// Less than is needed.
    pub fn room(&self, allowed: Option<u64>, needed: u64) -> Result<u64> {
        let there = bytes_in(&self.dir);
        let free = free_bytes(&self.dir).map_or(u64::MAX, |free| free.saturating_add(there));
        let room = allowed.unwrap_or(needed.max(PASSING_BYTES)).min(free);
        if room < needed {
            return Err(match allowed {
                Some(allowed) if allowed <= free => Error::RoomTooSmall {
                    path: self.dir.clone(),
                    needed,
                    allowed,
                },
                _ => Error::DiskTooSmall {
                    path: self.dir.clone(),
                    needed,
                    free,
                },
            });
        }
        Ok(room)
    }

    /// Notes that the job is complete. What helped to resume it is removed after this, not before.
    pub fn finish(&mut self) -> Result<()> {
        self.job.finished = true;
        self.job.files = files(&self.dir)?;
        self.save()
    }

    fn save(&self) -> Result<()> {
        let json = serde_json::to_vec_pretty(&self.job).expect("a job serialises");
        write_atomically(&self.state("job.json"), &json).map(drop)
    }
}

impl Job {
    /// A file of a finished directory that is no longer what it was.
    fn lost(&self, dir: &Path) -> Option<&str> {
        let lost = |name: &str, bytes: u64| {
            let found = std::fs::metadata(dir.join(name)).map(|found| found.len());
            // reports gather sections, and cards are their readers' to edit: weights are nobody's
            let grows = !name.ends_with(".safetensors");
            !found.is_ok_and(|found| found == bytes || grows)
        };
        let mut files = self.files.iter();
        let (name, _) = files.find(|(name, bytes)| lost(name, **bytes))?;
        Some(name)
    }
}

/// The files at the top of a directory, but those that only help to read it.
fn files(dir: &Path) -> Result<BTreeMap<String, u64>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).context("list", dir)? {
        let entry = entry.context("list", dir)?;
        let metadata = entry.metadata().context("read", entry.path())?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if metadata.is_file() && !name.ends_with(".md") {
            files.insert(name, metadata.len());
        }
    }
    Ok(files)
}

fn same_settings(dir: &Path, job: &Job, now: &BTreeMap<String, String>) -> Result<()> {
    let before = &job.settings;
    let none = String::from("(not set)");
    // what others follow from comes first
    let first = String::from("method");
    for what in [&first].into_iter().chain(before.keys()).chain(now.keys()) {
        let (a, b) = (
            before.get(what).unwrap_or(&none),
            now.get(what).unwrap_or(&none),
        );
        if a != b {
            return Err(Error::OutputMismatch {
                path: dir.into(),
                finished: job.finished,
                what: what.clone(),
                before: a.clone(),
                now: b.clone(),
            });
        }
    }
    Ok(())
}

/// Refuses a directory that holds less than a whole: unfinished work, or a part of a decomposition.
pub fn refuse_unfinished(dir: &Path) -> Result<()> {
    refuse_interrupted(dir)?;
    let part_file = dir.join(PART_FILE);
    if !part_file.exists() {
        return Ok(());
    }
    let record: serde_json::Value = json::read(&part_file)?;
    Err(Error::OnlyAPart {
        path: dir.into(),
        part: record["part"].as_str().unwrap_or("?").into(),
    })
}

/// Refuses a directory in which a job of ours was begun and has not ended.
pub fn refuse_interrupted(dir: &Path) -> Result<()> {
    let job_file = dir.join(STATE_DIR).join("job.json");
    if !job_file.exists() {
        return Ok(());
    }
    let job: Job = json::read(&job_file)?;
    if job.finished {
        Ok(())
    } else {
        Err(Error::Unfinished {
            path: dir.into(),
            verb: job.verb,
        })
    }
}

/// The bytes of the files in a directory and its folders.
pub fn bytes_in(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: std::fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_in(&entry.path()),
        _ => entry.metadata().map_or(0, |m| m.len()),
    };
    entries.map(size).sum()
}

/// Refuses a disk that cannot hold `needed` more bytes.
pub fn check_free_space(dir: &Path, needed: u64) -> Result<()> {
    match free_bytes(dir) {
        Some(free) if free < needed => Err(Error::DiskTooSmall {
            path: dir.into(),
            needed,
            free,
        }),
        _ => Ok(()),
    }
}

/// What is free on the disk of a directory that may not be there yet, if that can be told.
pub fn free_bytes(dir: &Path) -> Option<u64> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let existing = dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("."));
    let path = CString::new(existing.as_os_str().as_bytes()).ok()?;
    // SAFETY: statvfs fills the zeroed struct for a NUL-terminated path.
    unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        let told = libc::statvfs(path.as_ptr(), &mut stat) == 0;
        told.then(|| stat.f_bavail as u64 * stat.f_frsize as u64)
    }
}

/// Removes a file, and says whether there was one.
pub fn remove_if_there(path: &Path) -> Result<bool> {
    let there = path.exists();
    if there {
        std::fs::remove_file(path).context("remove", path)?;
    }
    Ok(there)
}

/// Gives the disk back what a stretch of a file takes, where the file system can: it reads as zeros then. Says whether.
pub fn forget_stretch(path: &Path, start: u64, bytes: u64) -> bool {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let stretch = (i64::try_from(start), i64::try_from(bytes));
        let (Ok(file), (Ok(start), Ok(bytes))) = (File::options().write(true).open(path), stretch)
        else {
            return false;
        };
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a system call on a descriptor that stays open during it.
        unsafe { libc::fallocate(file.as_raw_fd(), how, start, bytes) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (path, start, bytes);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(rank: &str) -> BTreeMap<String, String> {
        [("rank".to_string(), rank.to_string())].into()
    }

    #[test]
    fn a_directory_belongs_to_one_job() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let out = dir.path().join("out");
        let (held, claim) = Workspace::claim(&out, "decompose", settings("8")).expect("fresh");
        assert_eq!(claim, Claim::Fresh);
        assert!(matches!(
            Workspace::claim(&out, "decompose", settings("8")),
            Err(Error::OutputLocked { .. })
        ));
        drop(held);
        let (mut again, claim) =
            Workspace::claim(&out, "decompose", settings("8")).expect("resumes");
        assert_eq!(claim, Claim::Interrupted);
        assert!(matches!(
            refuse_unfinished(&out),
            Err(Error::Unfinished { .. })
        ));
        again.finish().expect("finishes");
        refuse_unfinished(&out).expect("finished");
        drop(again);
        assert_eq!(
            Workspace::claim(&out, "decompose", settings("8"))
                .expect("done")
                .1,
            Claim::Finished
        );
        assert!(matches!(
            Workspace::claim(&out, "decompose", settings("9")),
            Err(Error::OutputMismatch { .. })
        ));
        assert!(matches!(
            Workspace::claim(&out, "merge", settings("8")),
            Err(Error::OutputOccupied { .. })
        ));
    }

    #[test]
    fn foreign_files_are_left_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("thesis.tex"), "precious").expect("writes");
        let error = Workspace::claim(dir.path(), "merge", settings("8")).expect_err("refused");
        assert!(error.to_string().contains("thesis.tex"), "{error}");
        assert!(!dir.path().join(STATE_DIR).exists());
    }
}
