//! Where the files of a stranger's directory lie: in it, and nowhere else.

use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};
use crate::sum::is_hex;

/// Refuses a directory in which a file is a link that leads out of it.
///
/// Whoever clones a repository gets its links too; what they lead to would be read as weights or settings, copied beside
/// a merged model, and published with it. A snapshot in the Hub's cache consists of links to the `blobs` of its own
/// repository: these are where they belong.
pub fn refuse_links_outside(dir: &Path) -> Result<()> {
    let home = Home::of(dir)?;
    for entry in std::fs::read_dir(dir).context("list", dir)? {
        home.refuse_outside(&entry.context("list", dir)?.path())?;
    }
    Ok(())
}

/// A directory, and what belongs to it wherever it lies.
pub struct Home {
    dir: PathBuf,
    blobs: Option<PathBuf>,
}

impl Home {
    pub fn of(dir: &Path) -> Result<Self> {
        let dir = std::fs::canonicalize(dir).context("find", dir)?;
        let blobs = blobs_of(&dir);
        Ok(Self { dir, blobs })
    }

    /// Refuses a link that leads out of it.
    pub fn refuse_outside(&self, path: &Path) -> Result<()> {
        if !path.is_symlink() {
            return Ok(());
        }
        // a link to nothing is a missing file, and says so where it is opened; below a folder nothing is read
        match std::fs::canonicalize(path) {
            Ok(target) if !self.holds(&target) && !target.is_dir() => Err(Error::LinkOutside {
                path: path.into(),
                target,
            }),
            _ => Ok(()),
        }
    }

    /// Whether the canonical path `target` lies in the directory, or among the blobs beside a snapshot.
    pub fn holds(&self, target: &Path) -> bool {
        target.starts_with(&self.dir)
            || (self.blobs.is_some() && target.parent() == self.blobs.as_deref())
    }
}

/// Of `<repository>/snapshots/<commit>`: `<repository>/blobs`.
fn blobs_of(home: &Path) -> Option<PathBuf> {
    let commit = home.file_name()?.to_str()?;
    let is_commit = is_hex(commit, 40);
    let snapshots = home.parent().filter(|_| is_commit)?;
    let is_cache = snapshots.file_name()? == "snapshots";
    Some(snapshots.parent().filter(|_| is_cache)?.join("blobs"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_is_followed_inside_a_directory_and_to_the_blobs_beside_a_snapshot() {
        let room = tempfile::tempdir().expect("temporary directory");
        let root = fs::canonicalize(room.path()).expect("is there");
        let repo = root.join("models--org--name");
        let snapshot = repo.join("snapshots").join("0".repeat(40));
        fs::create_dir_all(&snapshot).expect("creates");
        fs::create_dir_all(repo.join("blobs")).expect("creates");
        fs::create_dir_all(root.join("folder")).expect("creates");
        for file in [
            repo.join("blobs/abc"),
            repo.join("secret"),
            root.join("secret"),
        ] {
            fs::write(file, "x").expect("writes");
        }
        fs::write(snapshot.join("config.json"), "{}").expect("writes");
        for fine in [
            "config.json",
            "../../blobs/abc",
            "nowhere",
            "../../../folder",
        ] {
            let link = snapshot.join("link");
            symlink(fine, &link).expect("links");
            refuse_links_outside(&snapshot).unwrap_or_else(|e| panic!("{fine}: {e}"));
            fs::remove_file(&link).expect("removes");
        }
        for outside in [
            "../../secret",
            "../../../secret",
            "/dev/zero",
            "../../blobs/../secret",
        ] {
            let link = snapshot.join("link");
            symlink(outside, &link).expect("links");
            match refuse_links_outside(&snapshot) {
                Err(Error::LinkOutside { path, .. }) => assert_eq!(path, link),
                other => panic!("{outside}: {other:?}"),
            }
            fs::remove_file(&link).expect("removes");
        }
        // blobs that are elsewhere are not the repository's own
        fs::remove_dir_all(repo.join("blobs")).expect("removes");
        symlink("..", repo.join("blobs")).expect("links");
        symlink("../../blobs/secret", snapshot.join("link")).expect("links");
        assert!(refuse_links_outside(&snapshot).is_err());
        // and beside a folder of another name there are none
        let plain = root.join("decomposition/snapshot/x");
        fs::create_dir_all(&plain).expect("creates");
        fs::create_dir_all(root.join("decomposition/blobs")).expect("creates");
        fs::write(root.join("decomposition/blobs/abc"), "x").expect("writes");
        symlink("../../blobs/abc", plain.join("link")).expect("links");
        assert!(refuse_links_outside(&plain).is_err());
    }
}
