//! Why a run cannot be shown.

use std::path::PathBuf;

use thiserror::Error;

use crate::fit::FileError;

/// Why a run cannot be shown.
#[derive(Debug, Error)]
pub enum ReportError {
    /// Nothing was recorded there.
    #[error("{} is no directory of a run", directory.display())]
    NoRun {
        /// The directory.
        directory: PathBuf,
        /// Why.
        source: FileError,
    },
    /// A file of the run cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is nothing to compare.
    #[error("there is no run to compare")]
    NoRuns,
    /// A drawing fails.
    #[error("cannot draw {title}: {reason}")]
    Draw {
        /// The drawing.
        title: String,
        /// Why.
        reason: String,
    },
}

impl ReportError {
    /// That `directory` is none of a run.
    pub(super) fn no_run(directory: &std::path::Path) -> impl FnOnce(FileError) -> Self {
        let directory = directory.to_owned();
        move |source| Self::NoRun { directory, source }
    }
}
