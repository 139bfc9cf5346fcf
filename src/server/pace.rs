//! How fast frames of a canvas may follow each other.
//!
//! A frame that has gone out cannot be taken back: a client that reads slower than frames come finds them in the
//! buffers of its own connection, seconds old, and its result behind them. No window of HTTP/2 prevents that, since
//! frames are small. So frames come at a pace that an eye can follow, after a few at once for short runs (the generic
//! cell rate algorithm, ITU-T I.371).

use std::time::Duration;

use tokio::time::Instant;

/// Pace of clients that ask for no interval: the first frames as fast as they come.
pub(super) const BURST: u32 = 8;
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

/// When the next frame may go out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    interval: Duration,
    burst: u32,
    /// When all frames so far would have gone out, had each waited for its interval.
    spent_until: Option<Instant>,
}

impl Pace {
    /// At least `interval` between two frames; without one, a few frames at once and then ten a second.
    pub(super) fn new(interval: Option<Duration>) -> Self {
        Self {
            interval: interval.unwrap_or(INTERVAL),
            burst: if interval.is_some() { 1 } else { BURST },
            spent_until: None,
        }
    }

    /// The time before which no frame may go out, if there is one.
    pub(super) fn due(&self) -> Option<Instant> {
        self.spent_until?.checked_sub(self.interval * (self.burst - 1))
    }

    /// A frame has gone out.
    pub(super) fn sent(&mut self, now: Instant) {
        self.spent_until = Some(self.spent_until.map_or(now, |until| until.max(now)) + self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds at which frames go out, of a canvas with a new state every 5 ms.
    fn times(interval: Option<u64>, until: u64) -> Vec<u64> {
        let start = Instant::now() + Duration::from_secs(60);
        let mut pace = Pace::new(interval.map(Duration::from_millis));
        let mut times = Vec::new();
        for at in (0..until).step_by(5) {
            let now = start + Duration::from_millis(at);
            if pace.due().is_none_or(|due| due <= now) {
                pace.sent(now);
                times.push(at);
            }
        }
        times
    }

    #[test]
    fn frames_come_at_once_and_then_ten_a_second() {
        let times = times(None, 2000);
        assert_eq!(times[..10], [0, 5, 10, 15, 20, 25, 30, 35, 100, 200]);
        assert_eq!(times.len(), 27);
    }

    #[test]
    fn an_interval_that_is_asked_for_is_kept_from_the_first_frame_on() {
        assert_eq!(times(Some(30), 100), [0, 30, 60, 90]);
        assert_eq!(times(Some(0), 100).len(), 20, "every state");
    }
}
