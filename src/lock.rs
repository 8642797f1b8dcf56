//! Files that one process holds at a time.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{IoContext, Result};

/// Opens a file to hold, and makes it where there is none. What is in it stays, and a link is not followed: whoever made
/// the directory may have put one there.
pub fn open(path: &Path) -> Result<File> {
    open_itself(path).context("open", path)
}

/// Holds a file until it is dropped, and waits for whoever holds it.
pub fn hold(path: &Path) -> Result<File> {
    let file = open(path)?;
    wait_for(&file).context("lock", path)?;
    Ok(file)
}

/// Holds an open file until it is dropped; false if somebody else holds it.
pub fn try_hold(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) if has_no_locks(&error) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn wait_for(file: &File) -> io::Result<()> {
    match file.lock() {
        Err(error) if has_no_locks(&error) => Ok(()),
        locked => locked,
    }
}

/// A file system without locks: whoever works there works alone.
fn has_no_locks(error: &io::Error) -> bool {
    const CODES: [i32; 3] = [libc::ENOLCK, libc::ENOSYS, libc::EOPNOTSUPP];
    error
        .raw_os_error()
        .is_some_and(|code| CODES.contains(&code))
}

/// An empty file to write to, alone: what an earlier run left of it is gone, and another process that writes it now is
/// waited for.
pub fn create(path: &Path) -> Result<File> {
    loop {
        let file = match open_itself(path) {
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
                std::fs::remove_file(path).context("remove", path)?;
                continue;
            }
            opened => opened.context("create", path)?,
        };
        wait_for(&file).context("lock", path)?;
        let held = file.metadata().context("read", path)?;
        // whoever held it may have given it its name meanwhile
        if std::fs::symlink_metadata(path).is_ok_and(|found| found.ino() == held.ino()) {
            file.set_len(0).context("write", path)?;
            return Ok(file);
        }
    }
}

fn open_itself(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).write(true).truncate(false);
    options.custom_flags(libc::O_NOFOLLOW).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn writers_of_one_file_take_turns_and_each_gives_it_its_name() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let [temporary, path] = [".x.partial", "x"].map(|name| dir.path().join(name));
        std::thread::scope(|scope| {
            for byte in b'a'..b'i' {
                let (temporary, path) = (&temporary, &path);
                scope.spawn(move || {
                    for _ in 0..50 {
                        let mut file = create(temporary).expect("creates");
                        file.write_all(&[byte; 1000]).expect("writes");
                        std::fs::rename(temporary, path).expect("is still there");
                        let found = std::fs::read(path).expect("reads");
                        assert!(found.len() == 1000 && found.iter().all(|b| *b == found[0]));
                    }
                });
            }
        });
        assert!(!temporary.exists());
    }

    #[test]
    fn a_file_system_without_locks_is_worked_in_alone() {
        for (code, has_none) in [
            (libc::ENOLCK, true),
            (libc::ENOSYS, true),
            (libc::EIO, false),
        ] {
            let error = io::Error::from_raw_os_error(code);
            assert_eq!(has_no_locks(&error), has_none, "{error}");
        }
    }

    #[test]
    fn what_is_held_is_not_emptied_and_no_link_is_followed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let [mine, link] = ["mine", "lock"].map(|name| dir.path().join(name));
        std::fs::write(&mine, "mine").expect("writes");
        drop(hold(&mine).expect("holds"));
        std::os::unix::fs::symlink(&mine, &link).expect("links");
        assert!(hold(&link).is_err());
        create(&link).expect("in its place");
        assert_eq!(std::fs::read(&mine).expect("reads"), b"mine");
        assert!(!link.is_symlink());
    }
}
