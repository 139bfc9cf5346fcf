//! Why a file is no run.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::model::NetworkError;

/// Why a run's file cannot be read.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// There is nothing to read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file, or its folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What replaces a value names none.
    #[error("{0:?} is no setting such as optimizer.lr=1e-3")]
    Setting(String),
    /// What the file, the variables and the settings say together is no run.
    #[error("{} is no run", path.display())]
    NoRun {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<Invalid>,
    },
}

/// What is wrong with a run's settings.
#[derive(Debug, Error)]
pub enum Invalid {
    /// The file's text, and where.
    #[error(transparent)]
    Text(#[from] toml::de::Error),
    /// A value, a key, or that one is missing.
    #[error(transparent)]
    Value(#[from] config::ConfigError),
    /// A value that no run can use.
    #[error("{field} {problem}")]
    Field {
        /// The setting.
        field: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A network that there cannot be.
    #[error(transparent)]
    Network(#[from] NetworkError),
}
