//! Admission: how much work may wait, measured in evaluations rather than requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server is busy: {queued} evaluations wait, the limit is {limit}")]
pub struct Full {
    /// Evaluations that wait.
    pub queued: u64,
    /// Evaluations that may wait.
    pub limit: u64,
    /// When it may be worth trying again, from measured step times.
    pub retry_after: Duration,
}

/// Counts queued evaluations and measures how fast they go.
#[derive(Debug)]
pub(super) struct Admission {
    queued: AtomicU64,
    limit: u64,
    workers: u64,
    /// Running mean of nanoseconds per evaluation of one canvas; 0 before the first.
    nanos_per_row: AtomicU64,
}

impl Admission {
    pub(super) fn new(limit: u64, workers: usize) -> Self {
        Self {
            queued: AtomicU64::new(0),
            limit,
            workers: workers.max(1) as u64,
            nanos_per_row: AtomicU64::new(0),
        }
    }

    /// Evaluations that wait or run.
    pub(super) fn queued(&self) -> u64 {
        self.queued.load(Ordering::Acquire)
    }

    /// Takes room for one canvas of each number of `evaluations`, all or nothing.
    pub(super) fn admit(self: &Arc<Self>, evaluations: &[u64]) -> Result<Vec<Permit>, Full> {
        let wanted = evaluations.iter().sum::<u64>();
        self.queued
            .try_update(Ordering::AcqRel, Ordering::Acquire, |queued| {
                queued.checked_add(wanted).filter(|sum| *sum <= self.limit)
            })
            .map_err(|_| self.full())?;
        Ok(evaluations
            .iter()
            .map(|&rows| Permit {
                admission: Arc::clone(self),
                rows,
            })
            .collect())
    }

    /// What to tell those who find no room.
    pub(super) fn full(&self) -> Full {
        let queued = self.queued();
        let nanos = self.nanos_per_row.load(Ordering::Relaxed).max(1_000_000);
        // Half of the queue gone is a good time to come back.
        let wait = Duration::from_nanos((queued / 2).saturating_mul(nanos) / self.workers);
        let retry_after = wait.clamp(Duration::from_millis(50), Duration::from_secs(60));
        Full {
            queued,
            limit: self.limit,
            retry_after,
        }
    }

    /// Takes note of a step of `rows` canvases.
    pub(super) fn measured(&self, step: Duration, rows: usize) {
        let nanos = step.as_nanos() as u64 / rows.max(1) as u64;
        let old = self.nanos_per_row.load(Ordering::Relaxed);
        let mean = if old == 0 { nanos } else { (old * 7 + nanos) / 8 };
        self.nanos_per_row.store(mean, Ordering::Relaxed);
    }
}

/// Room for the evaluations that a canvas still needs; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    admission: Arc<Admission>,
    rows: u64,
}

impl Permit {
    /// Gives back the room of one evaluation.
    pub(super) fn spend(&mut self) {
        if self.rows > 1 {
            self.rows -= 1;
            self.admission.queued.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.queued.fetch_sub(self.rows, Ordering::AcqRel);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_whole_and_given_back() {
        let admission = Arc::new(Admission::new(100, 1));
        let mut permits = admission.admit(&[40, 40]).unwrap();
        assert_eq!(admission.queued(), 80);
        let full = admission.admit(&[10; 3]).unwrap_err();
        assert_eq!((full.queued, full.limit), (80, 100));
        assert_eq!(admission.queued(), 80, "a refused request takes nothing");
        permits[0].spend();
        assert_eq!(admission.queued(), 79);
        drop(permits);
        assert_eq!(admission.queued(), 0);
    }

    #[test]
    fn retry_delay_follows_the_measured_step_time() {
        let admission = Arc::new(Admission::new(1000, 2));
        let _permits = admission.admit(&[1000]).unwrap();
        admission.measured(Duration::from_millis(80), 8);
        assert_eq!(admission.full().retry_after, Duration::from_millis(2500));
    }
}
