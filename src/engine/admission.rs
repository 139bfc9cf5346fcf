//! How much may wait: predicted seconds of the workers' time, for all callers together and for each.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::request::Caller;
use crate::sync::Mutex;

/// Why there is no room for a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// All callers together have enough waiting.
    #[error("the server is busy: {:.1} s of work wait, the limit is {:.1} s", .0.waiting.as_secs_f64(), .0.limit.as_secs_f64())]
    Server(Room),
    /// This caller has its share waiting; others still find room.
    #[error(
        "your share of the server is used: {:.1} s of your work wait, the limit for one caller is {:.1} s",
        .0.waiting.as_secs_f64(), .0.limit.as_secs_f64()
    )]
    Caller(Room),
    /// The request alone is more than may wait: trying again is of no use.
    #[error("takes about {:.1} s of the server's time, at most {:.1} s of one caller's work may wait", .0.waiting.as_secs_f64(), .0.limit.as_secs_f64())]
    Request(Room),
}

/// Numbers of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Predicted time of what waits, or is asked for.
    pub waiting: Duration,
    /// Predicted time that may wait.
    pub limit: Duration,
    /// When there will be room, as predicted.
    pub retry_after: Duration,
}

/// Counts predicted nanoseconds of work.
#[derive(Debug)]
pub(super) struct Admission {
    /// For all workers together.
    limit: u64,
    caller_limit: u64,
    workers: u64,
    /// Held for additions only.
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    all: u64,
    /// Callers that have something waiting.
    callers: HashMap<Caller, u64>,
}

impl Admission {
    /// Room for `limit` of work, `share` of it for one caller.
    pub(super) fn new(limit: Duration, share: f64, workers: usize) -> Self {
        let workers = workers.max(1) as u64;
        let limit = (limit.as_nanos() as u64).saturating_mul(workers);
        Self {
            limit,
            caller_limit: (limit as f64 * share) as u64,
            workers,
            waiting: Mutex::new(Waiting::default()),
        }
    }

    /// Predicted time of what waits or runs.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> Duration {
        Duration::from_nanos(self.waiting.lock().all / self.workers)
    }

    /// Whether nothing waits or runs.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.lock().all == 0
    }

    /// Takes room for `canvases` canvases of `evaluations` evaluations that cost `cost` nanoseconds each: for all of
    /// them, or for none.
    pub(super) fn admit(
        self: &Arc<Self>,
        caller: &Caller,
        canvases: u32,
        evaluations: u64,
        cost: u64,
    ) -> Result<Vec<Permit>, NoRoom> {
        let nanos = evaluations.max(1).saturating_mul(cost);
        let needed = nanos.saturating_mul(canvases.into());
        let mut waiting = self.waiting.lock();
        let own = waiting.callers.get(caller).copied().unwrap_or(0);
        let callers = waiting.callers.len().max(1) as u64;
        if needed > self.caller_limit {
            return Err(NoRoom::Request(self.room(needed, self.caller_limit, 0)));
        }
        let over = waiting.all.saturating_add(needed).saturating_sub(self.limit);
        let own_over = own.saturating_add(needed).saturating_sub(self.caller_limit);
        // Callers take turns, so that one's own work goes the slower the more there are.
        let until_room = over.max(own_over.saturating_mul(callers).min(waiting.all));
        if over > 0 {
            return Err(NoRoom::Server(self.room(waiting.all, self.limit, until_room)));
        }
        if own_over > 0 {
            return Err(NoRoom::Caller(self.room(own, self.caller_limit, until_room)));
        }
        waiting.all += needed;
        *waiting.callers.entry(caller.clone()).or_default() += needed;
        drop(waiting);
        let permit = |_| Permit {
            admission: Arc::clone(self),
            caller: caller.clone(),
            cost,
            nanos,
        };
        Ok((0..canvases).map(permit).collect())
    }

    fn room(&self, waiting: u64, limit: u64, until_room: u64) -> Room {
        let time = |nanos: u64| Duration::from_nanos(nanos / self.workers);
        Room {
            waiting: time(waiting),
            limit: time(limit),
            retry_after: time(until_room).clamp(Duration::from_millis(10), Duration::from_secs(600)),
        }
    }

    fn give_back(&self, caller: &Caller, nanos: u64) {
        let mut waiting = self.waiting.lock();
        waiting.all = waiting.all.saturating_sub(nanos);
        if let Some(own) = waiting.callers.get_mut(caller) {
            *own = own.saturating_sub(nanos);
            if *own == 0 {
                waiting.callers.remove(caller);
            }
        }
    }
}

/// Room for the evaluations that a canvas still needs; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    admission: Arc<Admission>,
    caller: Caller,
    /// Predicted nanoseconds of one evaluation.
    cost: u64,
    nanos: u64,
}

impl Permit {
    /// Gives back all but the room of the `evaluations` that are left. Returns of how many it was.
    pub(super) fn keep(&mut self, evaluations: u64) -> u64 {
        let left = evaluations.saturating_mul(self.cost);
        let back = self.nanos.saturating_sub(left);
        if back > 0 {
            self.admission.give_back(&self.caller, back);
            self.nanos = left;
        }
        back / self.cost.max(1)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.give_back(&self.caller, self.nanos);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const MILLISECOND: u64 = 1_000_000;

    fn caller(name: &str) -> Caller {
        Caller::new(name)
    }

    /// One worker, ten seconds for all, six for one caller.
    fn admission() -> Arc<Admission> {
        Arc::new(Admission::new(Duration::from_secs(10), 0.6, 1))
    }

    #[test]
    fn room_is_taken_whole_and_given_back() {
        let admission = admission();
        let mut permits = admission.admit(&caller("a"), 2, 40, 50 * MILLISECOND).unwrap();
        assert_eq!(admission.waiting(), Duration::from_secs(4));
        permits[0].keep(39);
        assert_eq!(admission.waiting(), Duration::from_millis(3950));
        permits[0].keep(10);
        permits[0].keep(40);
        assert_eq!(
            admission.waiting(),
            Duration::from_millis(2500),
            "never taken again"
        );
        drop(permits);
        assert!(admission.is_idle() && admission.waiting.lock().callers.is_empty());
    }

    #[test]
    fn the_three_refusals_are_told_apart() {
        let admission = admission();
        let ask = |name: &str, seconds: u64| admission.admit(&caller(name), 1, seconds, 1_000 * MILLISECOND);
        let _first = ask("a", 5).unwrap();
        assert!(matches!(ask("a", 7), Err(NoRoom::Request(room)) if room.waiting == Duration::from_secs(7)));
        assert!(matches!(ask("a", 3), Err(NoRoom::Caller(room)) if room.waiting == Duration::from_secs(5)));
        let _second = ask("b", 4).unwrap();
        assert!(matches!(ask("c", 2), Err(NoRoom::Server(room)) if room.limit == Duration::from_secs(10)));
        assert_eq!(
            admission.waiting(),
            Duration::from_secs(9),
            "a refused request takes nothing"
        );
        let _third = ask("c", 1).unwrap();
    }

    /// On a simulated clock: work goes at the predicted pace, callers in turns; when it is time to come back, there
    /// is room, and half of that time is too early.
    #[test]
    fn retry_delays_are_right_within_a_factor_of_two() {
        for (own, others, asked) in [(5, 0, 3), (5, 4, 3), (6, 1, 2), (2, 6, 5), (3, 6, 4)] {
            let admission = admission();
            let second = 1_000 * MILLISECOND;
            let mut mine = admission.admit(&caller("a"), 1, own, second).unwrap().remove(0);
            let mut theirs = (others > 0).then(|| {
                admission
                    .admit(&caller("b"), 1, others, second)
                    .unwrap()
                    .remove(0)
            });
            let refused = admission.admit(&caller("a"), 1, asked, second).unwrap_err();
            let (NoRoom::Server(room) | NoRoom::Caller(room) | NoRoom::Request(room)) = refused;
            let promised = room.retry_after.as_secs();
            let (mut mine_left, mut theirs_left, mut clock) = (own, others, 0);
            loop {
                let turn_is_mine = mine_left > 0 && (clock % 2 == 1 || theirs_left == 0);
                if turn_is_mine {
                    mine_left -= 1;
                    mine.keep(mine_left);
                } else {
                    theirs_left -= 1;
                    theirs.as_mut().unwrap().keep(theirs_left);
                }
                clock += 1;
                if admission.admit(&caller("a"), 1, asked, second).is_ok() {
                    break;
                }
            }
            assert!(
                promised <= 2 * clock && clock <= 2 * promised,
                "{own} own, {others} of others, {asked} asked: promised {promised}, was {clock}"
            );
        }
    }
}
