//! What a request has taken so far, for whoever logs it.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sync::Mutex;

/// What a request has taken so far, over all its canvases or parts of texts.
#[derive(Debug, Default)]
pub struct Spent {
    canvases: AtomicU32,
    done: AtomicU32,
    evaluations: AtomicU64,
    queue: AtomicU64,
    network: AtomicU64,
    /// When the first evaluation was committed, the second, the fourth and so on.
    marks: Mutex<Vec<(u64, Instant)>>,
}

impl Spent {
    /// Canvases, or parts of texts, that the request has.
    pub fn canvases(&self) -> u32 {
        self.canvases.load(Ordering::Acquire)
    }

    /// Those of them that have been finished.
    pub fn done(&self) -> u32 {
        self.done.load(Ordering::Acquire)
    }

    /// Network evaluations that have been committed, of all canvases together.
    pub fn evaluations(&self) -> u64 {
        self.evaluations.load(Ordering::Acquire)
    }

    /// How long a canvas has waited for its passes, the mean of all.
    pub fn queue(&self) -> Duration {
        self.mean(&self.queue)
    }

    /// How long the network has run in the passes that a canvas took part in, the mean of all.
    pub fn network(&self) -> Duration {
        self.mean(&self.network)
    }

    /// When so many evaluations had been committed: the first, the second, the fourth and so on.
    pub fn marks(&self) -> Vec<(u64, Instant)> {
        self.marks.lock().clone()
    }

    fn mean(&self, nanoseconds: &AtomicU64) -> Duration {
        Duration::from_nanos(nanoseconds.load(Ordering::Acquire) / u64::from(self.canvases().max(1)))
    }

    pub(super) fn begin(&self, canvases: u32) {
        self.canvases.store(canvases, Ordering::Release);
    }

    pub(super) fn count_done(&self) {
        self.done.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn count_evaluations(&self, evaluations: u64) {
        let before = self.evaluations.fetch_add(evaluations, Ordering::AcqRel);
        let after = before + evaluations;
        if before.checked_ilog2() != after.checked_ilog2() {
            self.marks.lock().push((after, Instant::now()));
        }
    }

    /// A pass that a canvas waited for and took part in.
    pub(super) fn count_pass(&self, queue: Duration, network: Duration) {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.queue.fetch_add(nanoseconds(queue), Ordering::AcqRel);
        self.network.fetch_add(nanoseconds(network), Ordering::AcqRel);
    }
}
