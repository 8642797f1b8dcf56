//! Pages and pictures on the disk: whose they are, and which may be drawn again.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, IoContext, Result};
use crate::weights::shard::write_atomically;

/// In every picture and page of ours, and in no other: a file without it was written by somebody and is left alone.
pub const MARK: &str = "<!-- drawn by svdhub inspect -->";

/// Writes a page or a picture. One of ours may be drawn again; whatever else has that name is left alone.
pub fn write(path: &Path, text: &str) -> Result<()> {
    assert!(text.contains(MARK), "pages say whose they are");
    if path.file_name().is_none() {
        let source = std::io::ErrorKind::InvalidFilename.into();
        return Err(Error::io("write", path, source));
    }
    if path.symlink_metadata().is_ok() && !is_ours(path)? {
        return Err(Error::ForeignFile { path: path.into() });
    }
    write_atomically(path, text.as_bytes()).map(drop)
}

fn is_ours(path: &Path) -> Result<bool> {
    const BEGINNING: u64 = 1024;
    if !path.is_file() {
        return Ok(false);
    }
    let file = std::fs::File::open(path).context("open", path)?;
    let mut bytes = Vec::new();
    let mut beginning = file.take(BEGINNING);
    beginning.read_to_end(&mut bytes).context("read", path)?;
    Ok(String::from_utf8_lossy(&bytes).contains(MARK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_ours_are_drawn_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("page.html");
        let page = |text: &str| format!("<!doctype html>{MARK}{text}");
        write(&path, &page("first")).expect("a new file");
        write(&path, &page("second")).expect("our own");
        assert!(
            std::fs::read_to_string(&path)
                .expect("reads")
                .ends_with("second")
        );
        let thesis = "<!doctype html> six months of work";
        std::fs::write(&path, thesis).expect("writes");
        let error = write(&path, &page("third")).expect_err("refused");
        assert!(matches!(error, Error::ForeignFile { .. }), "{error}");
        assert_eq!(std::fs::read_to_string(&path).expect("reads"), thesis);
        let link = dir.path().join("dangling.html");
        std::os::unix::fs::symlink("nowhere", &link).expect("links");
        assert!(write(&link, &page("x")).is_err());
        assert!(write(dir.path(), &page("x")).is_err(), "a directory");
        assert!(write(Path::new(""), &page("x")).is_err(), "no name");
    }
}
