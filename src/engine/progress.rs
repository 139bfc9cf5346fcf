//! What the outside sees of a canvas.

use std::sync::Arc;
use std::time::Duration;

use super::canvas::Canvas;
use crate::diffusion::Token;

/// The newest state of a canvas.
#[derive(Clone, Debug)]
pub struct State {
    /// Token ids, masks included.
    pub tokens: Arc<[Token]>,
    /// Which positions never change.
    pub clamped: Arc<[bool]>,
    /// For every position, the number of steps after which it got its present token.
    pub committed_at: Arc<[u32]>,
    /// For every position, the log-probability of its token when it got it, in nats; 0 where it has not.
    pub log_probabilities: Arc<[f32]>,
    /// Steps taken.
    pub step: u32,
    /// Steps until done.
    pub total: u32,
    /// Time, from 1 down to 0.
    pub t: f64,
    /// Total noise.
    pub sigma: f64,
    /// Network evaluations spent.
    pub nfe: u32,
    /// Positions that are masked.
    pub masked: u32,
    /// Whether there is more to come.
    pub phase: Phase,
}

/// Whether there is more to come.
#[derive(Clone, Debug)]
pub enum Phase {
    /// Yes.
    Running,
    /// No: the canvas is finished.
    Done(Arc<Outcome>),
    /// No: the canvas was ended.
    Failed(Failure),
}

/// Facts of a finished canvas.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Seed of all random choices.
    pub seed: u64,
    /// Where the time went.
    pub timings: Timings,
    /// Whether the deadline made it end before its last step.
    pub early: bool,
}

/// Where the time of a canvas went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Waiting for a worker.
    pub queue: Duration,
    /// In the network, for whole batches.
    pub network: Duration,
    /// Drawing tokens, for whole batches.
    pub sampling: Duration,
    /// From admission to the last step.
    pub total: Duration,
}

/// Why a canvas was ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// `Cancel` was called.
    #[error("the request was cancelled")]
    Cancelled,
    /// A position had to leave the mask, and nothing that is allowed there has any weight.
    #[error("none of the tokens that are allowed at a position can stand there, says the network")]
    NothingAllowed,
    /// The deadline has passed before the canvas was finished.
    #[error("the deadline has passed before the canvas was finished")]
    Deadline,
    /// The server shut down before the canvas was finished.
    #[error("the server shut down before the canvas was finished")]
    ShutDown,
    /// Nobody follows the canvas any more.
    #[error("nobody follows the canvas any more")]
    Abandoned,
    /// The model cannot be loaded or run.
    #[error("model {model} has failed: {reason}")]
    Model {
        /// The model, with its version.
        model: String,
        /// Why.
        reason: String,
    },
    /// The worker failed, again and again; the log has the details under the request's id.
    #[error("the network failed; the server's log has the details under request id {request}")]
    Worker {
        /// The request's id.
        request: String,
    },
}

impl State {
    /// The state of a canvas between two steps.
    pub(super) fn running(canvas: &Canvas) -> Self {
        Self {
            tokens: Arc::clone(canvas.tokens()),
            clamped: Arc::clone(canvas.clamped()),
            committed_at: Arc::clone(canvas.committed_at()),
            log_probabilities: Arc::clone(canvas.log_probabilities()),
            step: canvas.step(),
            total: canvas.total(),
            t: canvas.time(),
            sigma: canvas.sigma(),
            nfe: canvas.nfe(),
            masked: canvas.masked() as u32,
            phase: Phase::Running,
        }
    }

    /// The last state of a canvas that was ended.
    pub(super) fn failed(canvas: &Canvas, failure: Failure) -> Self {
        Self {
            phase: Phase::Failed(failure),
            ..Self::running(canvas)
        }
    }

    /// The state of a finished canvas.
    pub(super) fn done(canvas: &Canvas, timings: Timings) -> Self {
        let phase = Phase::Done(Arc::new(Outcome {
            seed: canvas.seed(),
            timings,
            early: canvas.finished_early(),
        }));
        Self {
            phase,
            ..Self::running(canvas)
        }
    }
}
