//! Files of a run, whole or not there, and errors that name them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use denoised::bundle::sha256_of;
use thiserror::Error;

/// Why something cannot be done with a file or folder.
#[derive(Debug, Error)]
#[error("cannot {action} {}", path.display())]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl FileError {
    /// That one cannot do `action` with `path`.
    pub(crate) fn cannot(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { action, path, source }
    }
}

/// Writes a file that readers see whole, before or after.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    fs::write(&partial, bytes)
        .and_then(|()| fs::rename(&partial, path))
        .map_err(FileError::cannot("write", path))
}

/// Writes a file and waits until the disk has it.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(FileError::cannot("write", path))
}

/// sha256 of a file of any size, hexadecimal.
pub(super) fn sha256(path: &Path) -> Result<String, FileError> {
    File::open(path)
        .and_then(sha256_of)
        .map_err(FileError::cannot("read", path))
}
