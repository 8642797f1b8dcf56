//! The files of a directory that go to the Hub: which ones, and what they were when they were read.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::cache::digests;
use crate::error::{Error, IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::sum::sha256_file;
use crate::weights::place::Home;
use crate::workers;

/// One file to push.
#[derive(Debug, Clone)]
pub(super) struct LocalFile {
    pub name: String,
    pub path: PathBuf,
    pub size: u64,
    pub sha256: String,
    /// The id git gives it, as long as it may travel in a commit.
    pub blob_id: Option<String>,
    pub lfs: bool,
    pub unchanged: bool,
    /// Before it was read.
    pub stamp: Stamp,
}

/// What of a file is another whenever its contents are: the kernel keeps it, nobody can set it back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Stamp {
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl Stamp {
    pub fn of(path: &Path) -> Result<Self> {
        let found = std::fs::metadata(path).context("read", path)?;
        Ok(Self {
            inode: found.ino(),
            bytes: found.len(),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// A larger file never travels in a commit, whatever the Hub says.
pub(super) const INLINE_BYTES_MAX: u64 = 10_000_000;

/// The files of a directory that are published, by their paths below it: all but hidden ones and what caches and
/// interpreters leave behind. Links are followed as long as they stay inside.
pub fn published_files(dir: &Path) -> Result<Vec<String>> {
    let home = Home::of(dir)?;
    let mut names = Vec::new();
    let mut above = vec![std::fs::canonicalize(dir).context("find", dir)?];
    walk(dir, "", &home, &mut above, &mut names)?;
    names.sort();
    Ok(names)
}

fn walk(
    dir: &Path,
    prefix: &str,
    home: &Home,
    above: &mut Vec<PathBuf>,
    names: &mut Vec<String>,
) -> Result<()> {
    for entry in std::fs::read_dir(dir).context("list", dir)? {
        let path = entry.context("list", dir)?.path();
        let text = path.file_name().and_then(|name| name.to_str());
        let Some(text) = text else {
            let reason = "its name is not UTF-8";
            return Err(Error::NotPublishable { path, reason });
        };
        if is_left_behind(text) {
            continue;
        }
        let name = format!("{prefix}{text}");
        let target = std::fs::canonicalize(&path).context("find", &path)?;
        if path.is_symlink() && !home.holds(&target) {
            return Err(Error::LinkOutside { path, target });
        }
        if target.is_file() {
            names.push(name);
        } else if target.is_dir() {
            // a link to a folder that holds it would never end
            if above.contains(&target) {
                let reason = "it is a link to a folder that holds it";
                return Err(Error::NotPublishable { path, reason });
            }
            above.push(target);
            walk(&path, &format!("{name}/"), home, above, names)?;
            above.pop();
        } else {
            let reason = "it is no file";
            return Err(Error::NotPublishable { path, reason });
        }
    }
    Ok(())
}

/// What is never published: `.git`, `.cache` and everything hidden, and the leavings of Python and of downloads.
fn is_left_behind(name: &str) -> bool {
    let endings = [".pyc", ".incomplete", ".lock", ".partial"];
    name.starts_with('.')
        || name == "__pycache__"
        || endings.iter().any(|ending| name.ends_with(ending))
}

impl LocalFile {
    /// The id under which the Hub keeps these contents.
    pub fn oid(&self) -> Option<&str> {
        if self.lfs {
            Some(&self.sha256)
        } else {
            self.blob_id.as_deref()
        }
    }

    /// Makes sure that the file still is what was read at first.
    pub fn check_unchanged(&self) -> Result<()> {
        if Stamp::of(&self.path)? == self.stamp {
            return Ok(());
        }
        let found = sha256_file(&self.path, |_| {})?;
        if found == self.sha256 {
            return Ok(());
        }
        Err(Error::Checksum {
            what: format!("`{}` changed while it was sent", self.name).into(),
            path: self.path.clone(),
            expected: self.sha256.clone(),
            found,
        })
    }

    /// How late it is sent: weights, then what names them, then the card.
    pub fn turn(&self) -> u8 {
        match self.name.as_str() {
            "README.md" => 2,
            name if name == "config.json" || name.ends_with(".index.json") => 1,
            _ => 0,
        }
    }
}

/// Reads every file of a directory that is published.
pub(super) fn local_files(dir: &Path, observer: &dyn Observer) -> Result<Vec<LocalFile>> {
    let names = published_files(dir)?;
    let size = |name: &String| std::fs::metadata(dir.join(name)).map_or(0, |m| m.len());
    observer.start(Stage::Hash, names.iter().map(size).sum(), Unit::Bytes);
    let threads = workers::cores();
    let mut files = Vec::new();
    workers::in_order(
        &names,
        threads,
        |name| {
            let path = dir.join(name);
            let stamp = Stamp::of(&path)?;
            Ok((digests(&path, INLINE_BYTES_MAX)?, stamp))
        },
        |name, (found, stamp)| {
            observer.advance(Stage::Hash, found.size, name);
            files.push(LocalFile {
                path: dir.join(name),
                name: name.clone(),
                size: found.size,
                sha256: found.sha256,
                blob_id: found.blob_id,
                lfs: false,
                unchanged: false,
                stamp,
            });
            Ok(())
        },
    )?;
    observer.finish(Stage::Hash);
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_what_lies_inside_and_is_not_hidden() {
        let room = tempfile::tempdir().expect("temporary directory");
        let dir = room.path().join("model");
        for folder in [
            ".git",
            ".cache/huggingface",
            "__pycache__",
            "runs/one",
            "shared",
        ] {
            std::fs::create_dir_all(dir.join(folder)).expect("creates");
        }
        for name in [
            ".git/config",
            ".cache/huggingface/x",
            ".env",
            "__pycache__/a.pyc",
            "model.safetensors.incomplete",
            "config.json",
            "runs/one/events",
            "shared/LICENSE",
        ] {
            std::fs::write(dir.join(name), name).expect("writes");
        }
        let link = |from: &str, to: &str| {
            std::os::unix::fs::symlink(to, dir.join(from)).expect("links");
        };
        link("LICENSE", "shared/LICENSE");
        link("also", "runs");
        let expected = [
            "LICENSE",
            "also/one/events",
            "config.json",
            "runs/one/events",
            "shared/LICENSE",
        ];
        assert_eq!(published_files(&dir).expect("lists"), expected);
        std::fs::write(room.path().join("secret"), "x").expect("writes");
        for (target, refused) in [
            ("../../secret", "LinkOutside"),
            ("../..", "LinkOutside"),
            ("..", "NotPublishable"),
            (".", "NotPublishable"),
            ("nowhere", "Io"),
        ] {
            link("runs/link", target);
            let error = published_files(&dir).expect_err(target);
            assert!(format!("{error:?}").starts_with(refused), "{error:?}");
            std::fs::remove_file(dir.join("runs/link")).expect("removes");
        }
        let _listener = std::os::unix::net::UnixListener::bind(dir.join("door")).expect("binds");
        let error = published_files(&dir).expect_err("a socket");
        assert!(matches!(error, Error::NotPublishable { .. }), "{error:?}");
    }
}
