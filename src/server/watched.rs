//! Small files that are read again when they change: certificates, keys, tokens.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time between two looks at the files.
const LOOK: Duration = Duration::from_secs(2);
/// Bytes of one file, at most.
const LARGEST: u64 = 1 << 20;

/// Why a file cannot be used, in a line.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub(super) struct FileError {
    file: PathBuf,
    problem: String,
}

impl FileError {
    pub(super) fn new(file: &Path, problem: impl std::fmt::Display) -> Self {
        Self {
            file: file.to_owned(),
            problem: problem.to_string().replace('\n', "; "),
        }
    }
}

/// What comes from files.
pub(super) trait Watched: Send + 'static {
    /// Its name in the log.
    const NAME: &'static str;

    /// Reads the files, and takes over what has changed; an error changes nothing.
    fn look(&mut self) -> Result<(), FileError>;
}

/// Looks again and again; what is not there, never.
pub(super) async fn follow<W: Watched>(watched: Option<W>) {
    let Some(mut watched) = watched else {
        return std::future::pending().await;
    };
    let mut told = None;
    loop {
        tokio::time::sleep(LOOK).await;
        let looked = tokio::task::spawn_blocking(move || {
            let looked = watched.look();
            (watched, looked)
        });
        match looked.await {
            Ok((returned, looked)) => {
                watched = returned;
                // A problem that stays is told once.
                let problem = looked.err().map(|error| error.to_string());
                if let Some(problem) = problem.as_ref().filter(|problem| told.as_ref() != Some(*problem)) {
                    tracing::error!(problem, "the new {} is refused; what was before stays", W::NAME);
                }
                told = problem;
            }
            Err(error) => {
                tracing::error!(%error, "looking for a new {} failed; it is given up", W::NAME);
                return std::future::pending().await;
            }
        }
    }
}

/// The bytes of a small regular file.
pub(super) fn contents(file: &Path) -> Result<Vec<u8>, FileError> {
    let unreadable = |error: std::io::Error| FileError::new(file, error);
    // Opening a pipe would wait.
    if !std::fs::metadata(file).map_err(unreadable)?.is_file() {
        return Err(FileError::new(file, "is no file"));
    }
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file).map_err(unreadable)?;
    opened
        .take(LARGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > LARGEST {
        return Err(FileError::new(file, "is larger than a megabyte"));
    }
    Ok(bytes)
}
