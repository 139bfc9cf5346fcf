//! What goes into the engine, and what comes out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::admission::NoRoom;
use super::caller::{Caller, RequestName};
use super::canvas::{BadState, CanvasState};
use super::plan::{Allowed, Draft, Sampling};
use super::{Shared, State};
use crate::diffusion::Token;
use crate::models::ServedModel;

/// A request to denoise.
#[derive(Clone, Debug)]
pub struct Request {
    /// Names the request among those of its caller that run.
    pub id: String,
    /// The caller.
    pub caller: Caller,
    /// The model.
    pub model: Arc<ServedModel>,
    /// The canvas: tokens where clamped, `None` where to fill.
    pub template: Arc<[Option<Token>]>,
    /// How to denoise.
    pub sampling: Sampling,
    /// Tokens that may be chosen, where not all may.
    pub allowed: Option<Allowed>,
    /// Tokens that positions to fill begin with, noised up to the start of the sampling.
    pub draft: Option<Draft>,
    /// Seed of all random choices.
    pub seed: u64,
    /// Independent canvases; at least 1.
    pub canvases: u32,
    /// Whether intermediate states are wanted, or the end alone.
    pub publish: Publish,
    /// When all canvases must be finished, if at some time.
    pub deadline: Option<Deadline>,
    /// Of the requests of one caller, those of higher priority go first.
    pub priority: i32,
    /// Where its canvases go on that have been under way before.
    pub resume: Resume,
}

/// What is known of canvases that have been under way before, by number.
#[derive(Clone, Debug, Default)]
pub struct Resume {
    /// States to go on from; canvases without one begin anew.
    pub states: BTreeMap<u32, CanvasState>,
    /// Canvases that are not run, since their results are known.
    pub finished: BTreeSet<u32>,
}

/// When a request must be finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// The time.
    pub at: Instant,
    /// What happens when it is too near.
    pub then: OnDeadline,
}

/// What happens when a deadline is too near.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDeadline {
    /// The request is refused when it cannot be met, and ended when it has passed.
    Fail,
    /// The last evaluation that there is time for fills all that is left.
    FinishEarly,
}

/// Which states a canvas publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publish {
    /// Every step, for whoever looks in time.
    Steps,
    /// The end alone.
    End,
}

/// Why a request is not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    /// Too much work waits.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// As many requests run as may.
    #[error("{running} requests run, which is the limit (limits.max_running_requests)")]
    Running {
        /// Requests that run.
        running: usize,
    },
    /// A canvas can never be in the state that it is to go on from.
    #[error("canvas {canvas} cannot go on from there: {problem}")]
    State {
        /// Number of the canvas.
        canvas: u32,
        /// The problem.
        problem: BadState,
    },
    /// The deadline cannot be met.
    #[error(
        "the deadline is in {:.3} s and cannot be met: {} about {:.3} s",
        .left.as_secs_f64(),
        match .then { OnDeadline::Fail => "the request takes", OnDeadline::FinishEarly => "a first evaluation takes" },
        .predicted.as_secs_f64()
    )]
    Deadline {
        /// Time to the deadline.
        left: Duration,
        /// Time that is needed at least, as predicted.
        predicted: Duration,
        /// What was to happen at the deadline.
        then: OnDeadline,
    },
    /// A running request of the caller has this id.
    #[error("a request with id {0:?} is running")]
    Exists(String),
    /// The model cannot be loaded or run.
    #[error("model {model} has failed: {reason}")]
    Model {
        /// The model, with its version.
        model: String,
        /// Why.
        reason: String,
        /// When it will be tried again.
        retry_after: Duration,
    },
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    Draining,
}

/// A request that runs. Dropping it ends its canvases: those that wait at once, one in a pass after it.
#[derive(Debug)]
pub struct Generation {
    /// Number of every canvas that is run.
    pub numbers: Vec<u32>,
    /// The state in which every one of them began, however far it has come since.
    pub initial: Vec<State>,
    /// The newest state of every canvas.
    pub canvases: Vec<watch::Receiver<State>>,
    /// When the last canvas will be finished, as predicted.
    pub predicted: Duration,
    /// What it has taken so far.
    pub spent: Arc<super::Spent>,
    pub(super) name: RequestName,
    pub(super) number: u64,
    pub(super) shared: Arc<Shared>,
}

impl Drop for Generation {
    fn drop(&mut self) {
        // Nobody listens any more; what is dropped here gives its room back.
        self.canvases.clear();
        drop(self.shared.withdraw(self.number));
        self.shared.forget(&self.name, self.number);
    }
}
