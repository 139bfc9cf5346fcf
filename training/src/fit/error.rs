//! Why a run does not begin, or ends before its time.

use std::path::PathBuf;

use thiserror::Error;

use super::beginning::BeginningError;
use super::checkpoint::CheckpointError;
use super::file::FileError;
use super::mirror::MirrorError;
use super::record::RecordError;
use crate::data::{DataError, TokenFileError};
use crate::model::NetworkError;
use crate::model::device::DeviceError;

/// Why a run does not begin, or ends before its time.
#[derive(Debug, Error)]
pub enum FitError {
    /// Settings have no JSON form.
    #[error(transparent)]
    Settings(#[from] serde_json::Error),
    /// A token file cannot be used.
    #[error(transparent)]
    TokenFile(#[from] TokenFileError),
    /// There is too little to train on.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Tokens that are mixed in mean something else.
    #[error(
        "data.mixture: {} was made with another tokenizer, or another end of documents, than {}",
        mixed.display(),
        train.display()
    )]
    Mixture {
        /// The file that is mixed in.
        mixed: PathBuf,
        /// The run's own.
        train: PathBuf,
    },
    /// `data.tokenizer` cannot be used.
    #[error("data.tokenizer {}: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// `data.tokenizer` has another vocabulary than the token files.
    #[error(
        "data.tokenizer {} has {size} tokens, {} was made for {needed}",
        tokenizer.display(),
        train.display()
    )]
    Vocabulary {
        /// The tokenizer's file.
        tokenizer: PathBuf,
        /// Its tokens.
        size: usize,
        /// The token file.
        train: PathBuf,
        /// Tokens that it was made for.
        needed: usize,
    },
    /// A device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A batch has fewer sequences than it has parts.
    #[error(
        "{devices} devices times run.accumulate {accumulate} is more than the {batch_size} sequences of run.batch_size"
    )]
    Parts {
        /// Devices that share a batch.
        devices: usize,
        /// `run.accumulate`.
        accumulate: usize,
        /// `run.batch_size`.
        batch_size: usize,
    },
    /// A run would begin where there is one.
    #[error(
        "{} already holds checkpoints: --resume goes on from them, another run.directory starts afresh",
        .0.display()
    )]
    Holds(PathBuf),
    /// A checkpoint cannot be written, found or used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The run's directory cannot be written to.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A file of the run fails.
    #[error(transparent)]
    File(#[from] FileError),
    /// The run's copy fails.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// All is done but the run's copy.
    #[error("all is in run.directory, but not in run.mirror")]
    NotCopied(#[source] MirrorError),
    /// The run has no network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// It cannot begin with the weights that it was given.
    #[error(transparent)]
    Beginning(#[from] BeginningError),
    /// The run would go on with tokens that mean something else.
    #[error("{} was trained with another {what} than {}", directory.display(), train.display())]
    OtherTokens {
        /// Directory of the run.
        directory: PathBuf,
        /// What differs.
        what: &'static str,
        /// The token file.
        train: PathBuf,
    },
    /// The checkpoint to go back to is the end of the run.
    #[error("there is nothing to do after step {step}: {why}")]
    NothingToDo {
        /// The step.
        step: u64,
        /// Why the run ends there.
        why: String,
    },
    /// Learning has gone wrong.
    #[error("the loss is {loss} and its gradient's norm {norm}; a lower optimizer.lr may help")]
    NotFinite {
        /// Loss of the batch.
        loss: f64,
        /// Norm of its gradient.
        norm: f64,
    },
    /// Learning has gone wrong.
    #[error("the validation bound is {0}; a lower optimizer.lr may help")]
    BoundNotFinite(f64),
    /// Learning has gone wrong.
    #[error(
        "the loss has exploded: it is {loss:.4} nats/token, its best was {best:.4} (both over about 50 steps), and \
         run.explosion_factor is {factor}; a lower optimizer.lr may help"
    )]
    Exploded {
        /// The smoothed loss.
        loss: f64,
        /// Its lowest.
        best: f64,
        /// `run.explosion_factor`.
        factor: f64,
    },
    /// What was drawn has no text.
    #[error("cannot decode samples: {0}")]
    Decode(String),
    /// It ended on the way; some of it is saved.
    #[error(
        "stopped after step {step}; the last good checkpoint is {}, and --resume goes on from it",
        last.display()
    )]
    Stopped {
        /// Steps done.
        step: u64,
        /// Folder of the latest checkpoint.
        last: PathBuf,
        /// Why.
        source: Box<FitError>,
    },
    /// It ended on the way; nothing of it is saved.
    #[error("stopped after step {step}, before the first checkpoint")]
    StoppedEarly {
        /// Steps done.
        step: u64,
        /// Why.
        source: Box<FitError>,
    },
}
