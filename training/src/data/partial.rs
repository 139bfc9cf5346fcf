//! Files that nobody sees before they are complete.

use std::fs::{self, File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::error::DataError;
use crate::say::say;

/// A file under another name beside its own, until it is complete. When it is dropped before that, because
/// the disk is full for example, it is removed, and what was there before stays.
///
/// A process that is killed leaves it behind; the next one that writes the same file begins it anew.
#[derive(Debug)]
pub struct Partial {
    /// Locked: two processes that write the same file would mix their bytes.
    file: File,
    partial: PathBuf,
    path: PathBuf,
    complete: bool,
}

impl Partial {
    /// What is to be the file at `path`; its folder must exist.
    pub fn create(path: &Path) -> Result<Self, DataError> {
        let mut name = path.as_os_str().to_owned();
        name.push(".partial");
        let partial = PathBuf::from(name);
        // Emptied once it is locked.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&partial)
            .map_err(DataError::write(&partial))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DataError::Busy(partial)),
            Err(TryLockError::Error(error)) => return Err(DataError::write(&partial)(error)),
        }
        file.set_len(0).map_err(DataError::write(&partial))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            partial,
            complete: false,
        })
    }

    /// The name it gets when it is complete.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name, in place of what had it.
    pub fn complete(self) -> Result<(), DataError> {
        Self::complete_all(vec![self])
    }

    /// Gives all of them their names, once nothing that can be known before stands against it.
    pub fn complete_all(files: Vec<Self>) -> Result<(), DataError> {
        for Self { file, path, .. } in &files {
            file.sync_all().map_err(DataError::write(path))?;
            if path.is_dir() {
                return Err(DataError::write(path)(io::ErrorKind::IsADirectory.into()));
            }
        }
        for mut file in files {
            fs::rename(&file.partial, &file.path).map_err(DataError::write(&file.path))?;
            file.complete = true;
        }
        Ok(())
    }
}

impl Write for Partial {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Partial {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.complete
            && let Err(error) = fs::remove_file(&self.partial)
        {
            say(&format!("cannot remove {}: {error}", self.partial.display()));
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_stays_until_the_new_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tokens");
        fs::write(&path, "old").unwrap();
        fs::write(
            folder.path().join("x.tokens.partial"),
            "left by one that was killed",
        )
        .unwrap();
        let write = || {
            let mut partial = Partial::create(&path).unwrap();
            partial.write_all(b"new").unwrap();
            partial
        };
        let other = write();
        assert!(
            Partial::create(&path)
                .unwrap_err()
                .to_string()
                .contains("another process")
        );
        drop(other);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write().complete().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
