//! Score networks: anything that turns canvases into rows of log-scores.
//!
//! The engine talks to [`ScoreNetwork`] alone. [`onnx`] runs bundles on ONNX Runtime; [`closed_form`]
//! computes exact scores of a known data law, for tests of everything around the network.

pub mod closed_form;
pub mod onnx;

use std::sync::Arc;

/// What one evaluation is asked: canvases of one length, and the rows that are wanted.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token ids, shape `[batch, length]` in row-major order.
    pub tokens: &'a [i64],
    /// Length of every canvas.
    pub length: usize,
    /// Total noise of every canvas, shape `[batch]`.
    pub sigma: &'a [f32],
    /// Wanted rows, as flat indices `b * length + i`, ascending; shape `[rows]`.
    pub positions: &'a [i64],
}

/// Rows of log-scores, in the order of [`Batch::positions`].
#[derive(Clone, Copy, Debug)]
pub struct ScoreRows<'a> {
    data: &'a [f32],
    vocab: usize,
    /// Where row i lies in `data`, when `data` holds every position; otherwise rows lie side by side.
    gather: Option<&'a [i64]>,
}

impl<'a> ScoreRows<'a> {
    /// `data` holds exactly the wanted rows: shape `[rows, vocab]`.
    pub fn packed(data: &'a [f32], vocab: usize) -> Self {
        Self {
            data,
            vocab,
            gather: None,
        }
    }

    /// `data` holds all positions, shape `[batch, length, vocab]`, of which `positions` are wanted.
    pub fn gathered(data: &'a [f32], vocab: usize, positions: &'a [i64]) -> Self {
        Self {
            data,
            vocab,
            gather: Some(positions),
        }
    }

    /// Length V of a row.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Log-scores of wanted row `index` over target tokens, length V.
    pub fn row(&self, index: usize) -> &'a [f32] {
        let at = self.gather.map_or(index, |positions| positions[index] as usize);
        &self.data[at * self.vocab..(at + 1) * self.vocab]
    }
}

/// Why an evaluation gave no scores.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// ONNX Runtime's shared library could not be loaded.
    #[error("{0}")]
    Runtime(String),
    /// The model file was refused.
    #[error("the network cannot be loaded: {0}")]
    Load(String),
    /// The model does not keep to the contract between bundles and server.
    #[error("the network does not keep to the bundle's contract: {0}")]
    Contract(String),
    /// An evaluation failed.
    #[error("evaluating the network failed: {0}")]
    Run(String),
    /// The device has no memory for an evaluation of this size.
    #[error("there is no memory for the evaluation: {0}")]
    Memory(String),
}

/// Ends an evaluation from another thread.
pub trait Stop: Send + Sync {
    /// The evaluation that runs returns an error as soon as it can, and so may every later one.
    fn stop(&self);
}

/// A network that one worker thread owns.
pub trait ScoreNetwork: Send {
    /// Evaluates `batch` and hands the wanted rows to `read`.
    ///
    /// Rows are lent, not returned, because they can be hundreds of megabytes that the runtime owns.
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError>;

    /// What ends evaluations of this network that take too long, where something can.
    fn stop_handle(&self) -> Option<Arc<dyn Stop>> {
        None
    }
}
