//! What a file holds, or would hold, wherever its bytes come from.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// The bytes of a file, wherever they come from. They are read in order, and again where a transfer is repeated.
pub trait Contents: Sync {
    /// Reads some bytes from a position on: at least one before the end.
    fn read_at(&self, position: u64, buffer: &mut [u8]) -> Result<usize>;
}

/// Part of a file on the disk, which is opened for each reading: a shard may lie in more files than can be open at once.
pub struct Section {
    path: PathBuf,
    start: u64,
    bytes: u64,
}

impl Section {
    pub fn of(path: &Path, start: u64, bytes: u64) -> Self {
        Self {
            path: path.into(),
            start,
            bytes,
        }
    }

    /// All of a file.
    pub fn whole(path: &Path) -> Result<Self> {
        let bytes = std::fs::metadata(path).context("read", path)?.len();
        Ok(Self::of(path, 0, bytes))
    }
}

impl Contents for Section {
    fn read_at(&self, position: u64, buffer: &mut [u8]) -> Result<usize> {
        let left = self.bytes.saturating_sub(position);
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        File::open(&self.path)
            .context("open", &self.path)?
            .read_at(&mut buffer[..most], self.start + position)
            .context("read", &self.path)
    }
}

/// One after another: a file that lies in pieces.
#[derive(Default)]
pub struct Joint<'a> {
    pieces: Vec<(u64, Box<dyn Contents + 'a>)>,
    bytes: u64,
}

impl<'a> Joint<'a> {
    pub fn push(&mut self, bytes: u64, piece: impl Contents + 'a) {
        if bytes > 0 {
            self.pieces.push((self.bytes, Box::new(piece)));
            self.bytes += bytes;
        }
    }
}

impl Contents for Joint<'_> {
    fn read_at(&self, position: u64, buffer: &mut [u8]) -> Result<usize> {
        if position >= self.bytes {
            return Ok(0);
        }
        let behind = self.pieces.partition_point(|(start, _)| *start <= position);
        let (start, piece) = &self.pieces[behind - 1];
        let end = self.pieces.get(behind).map_or(self.bytes, |next| next.0);
        let most = usize::try_from(end - position).unwrap_or(usize::MAX);
        let most = most.min(buffer.len());
        piece.read_at(position - start, &mut buffer[..most])
    }
}

impl Contents for Vec<u8> {
    fn read_at(&self, position: u64, buffer: &mut [u8]) -> Result<usize> {
        let start = usize::try_from(position).map_or(self.len(), |at| at.min(self.len()));
        let n = buffer.len().min(self.len() - start);
        buffer[..n].copy_from_slice(&self[start..start + n]);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_pieces_reads_like_a_whole_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("middle");
        std::fs::write(&path, b"..3456..").expect("writes");
        let mut joint = Joint::default();
        joint.push(3, b"012".to_vec());
        joint.push(0, Vec::new());
        let section = Section::of(&path, 2, 4);
        let mut buffer = [0; 8];
        assert_eq!(section.read_at(2, &mut buffer).expect("reads"), 2);
        assert_eq!(section.read_at(4, &mut buffer).expect("reads"), 0);
        joint.push(4, section);
        joint.push(3, b"789".to_vec());
        for step in 1..=11 {
            for start in 0..=10 {
                let (mut text, mut at) = (Vec::<u8>::new(), start as u64);
                let mut buffer = vec![0; step];
                loop {
                    let n = joint.read_at(at, &mut buffer).expect("reads");
                    if n == 0 {
                        break;
                    }
                    text.extend(&buffer[..n]);
                    at += n as u64;
                }
                assert_eq!(text, b"0123456789"[start..], "in steps of {step}");
            }
        }
        let whole = Section::whole(&path).expect("opens");
        assert_eq!(whole.read_at(0, &mut buffer).expect("reads"), 8);
    }
}
