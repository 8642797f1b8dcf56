//! Writing files that are either whole or not there.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::header::Header;
use crate::error::{Error, IoContext, Result};
use crate::lock;
use crate::sum::hex;

/// A file being written: a temporary sibling until [`FileSink::finish`] makes it durable and gives it its name.
///
/// Dropped unfinished, the temporary file is removed.
pub struct FileSink {
    /// `None` where only the sum is wanted.
    file: Option<File>,
    temporary: PathBuf,
    path: PathBuf,
    /// `None` where nobody asks for the sum.
    hash: Option<Sha256>,
    /// Whether it outlives a power cut from [`FileSink::finish`] on.
    durable: bool,
    finished: bool,
}

impl FileSink {
    pub fn create(path: &Path) -> Result<Self> {
        let name = path
            .file_name()
            .expect("a file to write has a name")
            .to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.partial"));
        let file = lock::create(&temporary)?;
        Ok(Self {
            file: Some(file),
            temporary,
            path: path.into(),
            hash: Some(Sha256::new()),
            durable: true,
            finished: false,
        })
    }

    /// Sums what would be in a file, and writes none.
    pub fn nowhere(path: &Path) -> Self {
        Self {
            file: None,
            temporary: PathBuf::new(),
            path: path.into(),
            hash: Some(Sha256::new()),
            durable: true,
            finished: false,
        }
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        match &mut self.file {
            Some(file) => file
                .write_all(bytes)
                .map_err(|source| Error::io("write", &self.path, source)),
            None => Ok(()),
        }
    }

    /// Flushes to disk, gives the file its name, and returns the sha256 of its contents in hex.
    pub fn finish(mut self) -> Result<String> {
        let hash = self.hash.take().expect("invariant: its sum is kept");
        self.close()?;
        Ok(hex(&hash.finalize()))
    }

    fn close(&mut self) -> Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        if self.durable {
            file.sync_all().context("flush", &self.path)?;
        }
        std::fs::rename(&self.temporary, &self.path).context("rename", &self.path)?;
        self.finished = true;
        if self.durable {
            sync_directory(&self.path)?;
        }
        Ok(())
    }
}

impl Drop for FileSink {
    fn drop(&mut self) {
        if self.file.is_some() && !self.finished {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a whole small file atomically and durably.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<String> {
    let mut sink = FileSink::create(path)?;
    sink.write(bytes)?;
    sink.finish()
}

/// Makes files durable that were written without being so.
pub fn flush<'p>(paths: impl IntoIterator<Item = &'p Path>) -> Result<()> {
    let mut last = None;
    for path in paths {
        let file = File::open(path).context("open", path)?;
        file.sync_all().context("flush", path)?;
        last = Some(path);
    }
    last.map_or(Ok(()), sync_directory)
}

/// Gives a finished file another name, durably.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).context("rename", from)?;
    sync_directory(to)
}

fn sync_directory(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|dir| dir.sync_all())
        .context("flush", parent)
}

/// Writes one safetensors file, tensor by tensor, in the order its header lays down.
pub struct ShardWriter {
    sink: FileSink,
    header: Header,
    next: usize,
    /// Bytes that the tensor begun last still lacks.
    missing: u64,
}

impl ShardWriter {
    pub fn create(path: &Path, header: Header) -> Result<Self> {
        Self::into(FileSink::create(path)?, header)
    }

    /// Sums what would be in the file, and writes none.
    pub fn nowhere(path: &Path, header: Header) -> Result<Self> {
        Self::into(FileSink::nowhere(path), header)
    }

    fn into(mut sink: FileSink, header: Header) -> Result<Self> {
        sink.write(&header.prefix)?;
        Ok(Self {
            sink,
            header,
            next: 0,
            missing: 0,
        })
    }

    /// For a file on its way into another: it is neither summed nor flushed. Whoever wrote it has summed its tensors one by
    /// one, and whoever reads it tells by them what a power cut has made of it.
    pub fn create_passing(path: &Path, header: Header) -> Result<Self> {
        let mut writer = Self::create(path, header)?;
        writer.sink.hash = None;
        writer.sink.durable = false;
        Ok(writer)
    }

    /// Writes the next tensor.
    ///
    /// # Panics
    /// If it is not the one the header announces: the caller iterates over that very header.
    pub fn put(&mut self, tensor: &str, bytes: &[u8]) -> Result<()> {
        self.begin(tensor);
        self.write(bytes)
    }

    /// Begins the next tensor, whose bytes [`ShardWriter::write`] then takes in pieces.
    ///
    /// # Panics
    /// If it is not the one the header announces, or the one before is not whole.
    pub fn begin(&mut self, tensor: &str) {
        self.check_whole();
        let entry = &self.header.entries[self.next];
        assert_eq!(entry.name, tensor, "tensors arrive in header order");
        self.missing = entry.bytes;
        self.next += 1;
    }

    /// Writes some more of the tensor begun last.
    ///
    /// # Panics
    /// If it grows longer than announced.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let left = self.missing.checked_sub(bytes.len() as u64);
        self.missing = left.expect("invariant: a tensor is as long as announced");
        self.sink.write(bytes)
    }

    fn check_whole(&self) {
        assert_eq!(self.missing, 0, "a tensor is as long as announced");
    }

    /// Completes a file created by [`ShardWriter::create_passing`].
    pub fn close(mut self) -> Result<()> {
        self.check_complete();
        self.sink.close()
    }

    /// Completes the file and returns its sha256 in hex.
    pub fn finish(self) -> Result<String> {
        self.check_complete();
        self.sink.finish()
    }

    fn check_complete(&self) {
        self.check_whole();
        assert_eq!(
            self.next,
            self.header.entries.len(),
            "every announced tensor was written"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_link_is_not_written_through() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let [victim, path] = ["victim", "README.md"].map(|name| dir.path().join(name));
        std::fs::write(&victim, "mine").expect("writes");
        let link = dir.path().join(".README.md.partial");
        std::os::unix::fs::symlink(&victim, link).expect("links");
        write_atomically(&path, b"card").expect("writes");
        assert_eq!(std::fs::read(&victim).expect("reads"), b"mine");
        assert!(!path.is_symlink());
        assert_eq!(std::fs::read(&path).expect("reads"), b"card");
    }
}
