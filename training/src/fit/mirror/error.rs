//! Why a run cannot be copied elsewhere, or fetched from there.

use std::path::PathBuf;

use thiserror::Error;

use crate::fit::checkpoint::CheckpointError;
use crate::fit::file::FileError;
use crate::publish::PublishError;

/// Why a run cannot be copied elsewhere, or fetched from there.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// Not a place that this program can write to.
    #[error("run.mirror {place:?} cannot be used: {problem}")]
    Place {
        /// What was asked for.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A run would begin where there is one.
    #[error(
        "run.mirror {name} already holds checkpoints, the last of step {last}: --resume fetches it and goes on, \
         another run.mirror starts afresh"
    )]
    Holds {
        /// The mirror.
        name: String,
        /// Its newest step.
        last: u64,
    },
    /// A run would go back behind what it does not know.
    #[error(
        "run.mirror {name} holds a checkpoint of step {step}, which is not in {}: --resume fetches it",
        run.display()
    )]
    Newer {
        /// The mirror.
        name: String,
        /// The step.
        step: u64,
        /// Directory of the run.
        run: PathBuf,
    },
    /// The checkpoints of two runs would be mixed.
    #[error(
        "run.mirror {name} holds a checkpoint, of step {step}, of another run than the one in {}",
        directory.display()
    )]
    OtherRun {
        /// The mirror.
        name: String,
        /// The step.
        step: u64,
        /// Directory of the run.
        directory: PathBuf,
    },
    /// What is there cannot be told.
    #[error("cannot list run.mirror {name}")]
    List {
        /// The mirror.
        name: String,
        /// Why.
        source: Box<TransferError>,
    },
    /// A copy fails.
    #[error("cannot copy {} to run.mirror {name}", directory.display())]
    Copy {
        /// Directory of the run.
        directory: PathBuf,
        /// The mirror.
        name: String,
        /// Why.
        source: Box<TransferError>,
    },
    /// A copy cannot be had back.
    #[error("cannot fetch the checkpoint of step {step} from {name}")]
    Fetch {
        /// The step.
        step: u64,
        /// The mirror.
        name: String,
        /// Why.
        source: Box<TransferError>,
    },
    /// What is in the run's directory cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Why something does not come from or to a store.
#[derive(Debug, Error)]
pub enum TransferError {
    /// The store said no.
    #[error(transparent)]
    Store(#[from] object_store::Error),
    /// A file of the run cannot be sent.
    #[error(transparent)]
    Send(#[from] PublishError),
    /// A file of the run cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A `state.json` is none.
    #[error("{place} is damaged")]
    State {
        /// Where it lies.
        place: String,
        /// How one sees it.
        source: serde_json::Error,
    },
    /// What came is no checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}
