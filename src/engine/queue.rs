//! The ready queue: canvases that wait for their next evaluation, oldest first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::admission::Permit;
use super::canvas::Canvas;
use super::{Failure, Phase, Publish, State, Timings};

/// A canvas and what goes with it from worker to worker.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) canvas: Canvas,
    /// Id of the request, for the log.
    pub(super) request: String,
    /// Keeps the newest state only; closed when nobody listens any more.
    pub(super) progress: watch::Sender<State>,
    pub(super) publish: Publish,
    pub(super) cancelled: Arc<AtomicBool>,
    pub(super) permit: Permit,
    pub(super) admitted: Instant,
    /// Since when it has waited for its next step.
    pub(super) ready: Instant,
    pub(super) timings: Timings,
    /// Steps that failed in a row.
    pub(super) attempts: u32,
}

impl Work {
    /// Whether somebody still wants the next step; tells the listener if `Cancel` ended it.
    pub(super) fn is_wanted(&self) -> bool {
        if self.cancelled.load(Ordering::Acquire) {
            self.fail(Failure::Cancelled);
            return false;
        }
        !self.progress.is_closed()
    }

    /// Ends the canvas.
    pub(super) fn fail(&self, failure: Failure) {
        self.progress
            .send_modify(|state| state.phase = Phase::Failed(failure));
    }

    fn shares_a_pass_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.canvas.model(), other.canvas.model())
            && self.canvas.tokens().len() == other.canvas.tokens().len()
    }
}

#[derive(Debug, Default)]
struct Ready {
    work: VecDeque<Work>,
    closed: bool,
}

/// Length is bounded by admission: nothing enters that holds no permit.
#[derive(Debug)]
pub(super) struct Queue {
    /// Held for moves of work items only, never across a network run. Workers wait, callers signal.
    ready: Mutex<Ready>,
    arrived: Condvar,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            ready: Mutex::new(Ready::default()),
            arrived: Condvar::new(),
        }
    }

    /// Queues work; after [`Self::close`] it is ended instead.
    pub(super) fn put(&self, work: impl IntoIterator<Item = Work>) {
        let mut ready = self.ready.lock();
        if ready.closed {
            drop(ready);
            work.into_iter().for_each(|work| work.fail(Failure::ShutDown));
            return;
        }
        ready.work.extend(work);
        drop(ready);
        self.arrived.notify_all();
    }

    /// Waits for work and takes the oldest, with as many others as share a forward pass with it and fit
    /// into `batch_tokens`. `None` when closed.
    pub(super) fn take(&self, batch_tokens: usize) -> Option<Vec<Work>> {
        let mut ready = self.ready.lock();
        loop {
            if ready.closed {
                return None;
            }
            if let Some(first) = ready.work.pop_front() {
                let room = (batch_tokens / first.canvas.tokens().len().max(1)).max(1);
                let mut batch = vec![first];
                let mut index = 0;
                while batch.len() < room && index < ready.work.len() {
                    if ready.work[index].shares_a_pass_with(&batch[0]) {
                        batch.extend(ready.work.remove(index));
                    } else {
                        index += 1;
                    }
                }
                return Some(batch);
            }
            self.arrived.wait(&mut ready);
        }
    }

    /// Ends everything that waits and everything that comes.
    pub(super) fn close(&self) {
        let mut ready = self.ready.lock();
        ready.closed = true;
        let waiting = std::mem::take(&mut ready.work);
        drop(ready);
        waiting.iter().for_each(|work| work.fail(Failure::ShutDown));
        self.arrived.notify_all();
    }
}
