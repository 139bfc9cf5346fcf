//! Why a checkpoint cannot be written, found or used.

use std::path::{Path, PathBuf};

use burn::store::RecordError;
use thiserror::Error;

use crate::fit::file::FileError;
use crate::model::{NetworkConfig, NetworkError};

/// Why a checkpoint cannot be written, found or used.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file or folder fails.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is none.
    #[error("{} holds no checkpoint", .0.display())]
    NoneYet(PathBuf),
    /// None is the best.
    #[error("{} has no best checkpoint: nothing was validated", .0.display())]
    NotValidated(PathBuf),
    /// There are others.
    #[error("{} has no checkpoint of step {step}, only of {steps:?}", run.display())]
    NoSuchStep {
        /// Directory of the run.
        run: PathBuf,
        /// The step that was asked for.
        step: u64,
        /// Those that there are.
        steps: Vec<u64>,
    },
    /// What is there is never written again.
    #[error("{} is there already", .0.display())]
    Exists(PathBuf),
    /// Weights that nothing can be done with.
    #[error("weights are no longer finite after step {0}")]
    NotFinite(u64),
    /// Tensors cannot be written.
    #[error("cannot write {}", path.display())]
    Tensors {
        /// The file.
        path: PathBuf,
        /// Why.
        source: RecordError,
    },
    /// What it holds besides tensors cannot be written.
    #[error("the state of a run has no JSON form")]
    State(#[source] serde_json::Error),
    /// A file is not what was written.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How one sees it.
        source: Damage,
    },
    /// A file has another hash than was written down.
    #[error("{} is damaged: its sha256 is {found}", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Its sha256.
        found: String,
    },
    /// Another version of this program wrote it.
    #[error("{} has format {format}, this program reads {reads}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
        /// The format that can be read.
        reads: u32,
    },
    /// Tensors are of another network than the state.
    #[error("{} does not fit its state.json", path.display())]
    Misfit {
        /// The file.
        path: PathBuf,
        /// Why.
        source: RecordError,
    },
    /// Its network cannot be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It is of another network.
    #[error("{} is of another network ({theirs:?}) than the run's ({ours:?})", folder.display())]
    OtherNetwork {
        /// Its folder.
        folder: PathBuf,
        /// Its network.
        theirs: Box<NetworkConfig>,
        /// The run's.
        ours: Box<NetworkConfig>,
    },
    /// It is of another course of chance.
    #[error("{} is of seed {theirs}, the run's is {ours}", folder.display())]
    OtherSeed {
        /// Its folder.
        folder: PathBuf,
        /// Its seed.
        theirs: u64,
        /// The run's.
        ours: u64,
    },
    /// It is damaged, but another one is not.
    #[error(
        "cannot go on from {}; {} is whole, and --resume-from {step} goes on from there",
        folder.display(),
        whole.display()
    )]
    GoBack {
        /// Its folder.
        folder: PathBuf,
        /// The folder of the latest that is whole.
        whole: PathBuf,
        /// Steps done there.
        step: u64,
        /// What is the matter.
        source: Box<CheckpointError>,
    },
    /// It is damaged, as all are.
    #[error("cannot go on from {}, and no other checkpoint is whole", folder.display())]
    NoneWhole {
        /// Its folder.
        folder: PathBuf,
        /// What is the matter.
        source: Box<CheckpointError>,
    },
}

/// How one sees that a file is damaged.
#[derive(Debug, Error)]
pub enum Damage {
    /// It is no JSON of a state.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// It names a network that there cannot be.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It holds no tensors.
    #[error(transparent)]
    Tensors(#[from] RecordError),
}

impl CheckpointError {
    /// That the file at `path` is damaged.
    pub(super) fn damaged<E: Into<Damage>>(path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |damage| Self::Damaged {
            path,
            source: damage.into(),
        }
    }
}
