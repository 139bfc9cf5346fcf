//! Score networks: anything that turns canvases into rows of log-scores.
//!
//! The engine talks to [`ScoreNetwork`] alone. [`onnx`] runs bundles on ONNX Runtime; [`closed_form`]
//! computes exact scores of a known data law, for tests of everything around the network.

pub mod adapted;
pub mod closed_form;
pub mod onnx;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::diffusion::Token;

/// Input of one evaluation: canvases of one length, and the rows that are wanted.
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

/// Log-scores as the network gives them.
#[derive(Clone, Copy, Debug)]
enum Scores<'a> {
    Single(&'a [f32]),
    Half(&'a [f16]),
}

/// Rows of log-scores, in the order of [`Batch::positions`].
#[derive(Clone, Copy, Debug)]
pub struct ScoreRows<'a> {
    data: Scores<'a>,
    vocab: usize,
    /// Where row i lies in `data`, when `data` holds every position; otherwise rows lie side by side.
    gather: Option<&'a [i64]>,
    /// Tokens that count as impossible.
    excluded: &'a [Token],
}

impl<'a> ScoreRows<'a> {
    /// `data` holds exactly the wanted rows: shape `[rows, vocab]`.
    pub fn packed(data: &'a [f32], vocab: usize) -> Self {
        Self {
            data: Scores::Single(data),
            vocab,
            gather: None,
            excluded: &[],
        }
    }

    /// [`Self::packed`] in float16.
    pub fn packed_half(data: &'a [f16], vocab: usize) -> Self {
        Self {
            data: Scores::Half(data),
            vocab,
            gather: None,
            excluded: &[],
        }
    }

    /// The rows of `positions` alone, where these rows are of all positions, shape `[batch, length, vocab]`.
    #[must_use]
    pub fn gathered(self, positions: &'a [i64]) -> Self {
        Self {
            gather: Some(positions),
            ..self
        }
    }

    /// The same with a score of zero for these tokens.
    #[must_use]
    pub fn excluding(self, excluded: &'a [Token]) -> Self {
        Self { excluded, ..self }
    }

    /// Length V of a row.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Log-scores of wanted row `index` over target tokens, length V.
    pub fn row(&self, index: usize) -> Cow<'a, [f32]> {
        let mut row = match self.data {
            Scores::Single(data) => Cow::Borrowed(&data[self.range(index)]),
            Scores::Half(data) => Cow::Owned(data[self.range(index)].iter().map(|x| x.to_f32()).collect()),
        };
        for &token in self.excluded {
            row.to_mut()[token as usize] = f32::NEG_INFINITY;
        }
        row
    }

    /// [`Self::row`], in `buffer` where it is not as the network gave it: in float16, or with tokens to exclude.
    pub fn row_in<'b>(&self, index: usize, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        match self.data {
            Scores::Single(data) if self.excluded.is_empty() => return &data[self.range(index)],
            Scores::Single(data) => {
                buffer.clear();
                buffer.extend_from_slice(&data[self.range(index)]);
            }
            Scores::Half(data) => {
                buffer.resize(self.vocab, 0.0);
                data[self.range(index)].convert_to_f32_slice(buffer);
            }
        }
        for &token in self.excluded {
            buffer[token as usize] = f32::NEG_INFINITY;
        }
        buffer
    }

    fn range(&self, index: usize) -> Range<usize> {
        let at = self.gather.map_or(index, |positions| positions[index] as usize);
        at * self.vocab..(at + 1) * self.vocab
    }
}

/// Shape of an evaluation's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Whether rows are computed for all positions, not for the wanted ones alone.
    pub all_rows: bool,
    /// Bytes of a log-score.
    pub entry_bytes: usize,
}

impl Default for Output {
    fn default() -> Self {
        Self {
            all_rows: false,
            entry_bytes: size_of::<f32>(),
        }
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
    /// It needs more memory than all networks together may have.
    #[error("its network takes {} MB of memory, all together may take {} MB (models.memory_megabytes)", needed.div_ceil(1 << 20), budget >> 20)]
    Room {
        /// Bytes that it takes.
        needed: u64,
        /// Bytes that all may take.
        budget: u64,
    },
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

    /// Returns the shape of evaluations' outputs.
    fn output(&self) -> Output {
        Output::default()
    }

    /// Whether it has its weights in common with the other networks of its model on its device.
    fn shares_weights(&self) -> bool {
        false
    }

    /// Returns what ends evaluations of this network that take too long, where something can.
    fn stop_handle(&self) -> Option<Arc<dyn Stop>> {
        None
    }
}
