//! How much may wait: predicted seconds of the workers' time, for all callers together and for each.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::caller::Caller;
use super::request::{Deadline, OnDeadline};
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
    /// Share of it for one caller that has no other.
    share: f64,
    workers: u64,
    /// Held for additions only.
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    all: u64,
    /// Canvases that have not ended.
    canvases: u64,
    /// Callers that have something waiting.
    callers: HashMap<Caller, Own>,
}

/// What waits of one caller.
#[derive(Debug, Default)]
struct Own {
    all: u64,
    /// The same by request.
    requests: HashMap<u64, Waits>,
}

/// What waits of one request.
#[derive(Clone, Copy, Debug)]
struct Waits {
    nanos: u64,
    canvases: u32,
    /// The deadline that must not be missed, if there is one.
    must: Option<Instant>,
}

/// What a request asks room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    /// The request, by order of arrival.
    pub(super) number: u64,
    /// Its canvases.
    pub(super) canvases: u32,
    /// Evaluations of each; where they differ, of the mean one.
    pub(super) evaluations: u64,
    /// Predicted nanoseconds of an evaluation of one canvas.
    pub(super) cost: u64,
    /// When it must be finished.
    pub(super) deadline: Option<Deadline>,
    /// Canvases that share a pass, where there are as many.
    pub(super) per_pass: u32,
}

impl Asked {
    fn waits(&self, evaluations: u64) -> Waits {
        Waits {
            nanos: self.nanos(evaluations),
            canvases: self.canvases,
            must: self
                .deadline
                .filter(|deadline| deadline.then == OnDeadline::Fail)
                .map(|deadline| deadline.at),
        }
    }

    fn nanos(&self, evaluations: u64) -> u64 {
        let canvas = evaluations.max(1).saturating_mul(self.cost);
        canvas.saturating_mul(self.canvases.into())
    }
}

/// A deadline that would be missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missed {
    /// Time to it.
    pub(super) left: Duration,
    /// Time that is needed, as predicted.
    pub(super) predicted: Duration,
}

impl Admission {
    /// Room for `limit` of work, `share` of it for one caller.
    pub(super) fn new(limit: Duration, share: f64, workers: usize) -> Self {
        let workers = workers.max(1) as u64;
        let limit = (limit.as_nanos() as u64).saturating_mul(workers);
        Self {
            limit,
            share,
            workers,
            waiting: Mutex::new(Waiting::default()),
        }
    }

    /// Predicted time of what waits or runs.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> Duration {
        self.load().0
    }

    /// The same, and how many canvases that is.
    pub(super) fn load(&self) -> (Duration, u64) {
        let waiting = self.waiting.lock();
        (Duration::from_nanos(waiting.all / self.workers), waiting.canvases)
    }

    /// Whether nothing waits or runs.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.lock().all == 0
    }

    /// Takes room for the canvases of `request`: for all of them, or for none.
    pub(super) fn admit(self: &Arc<Self>, caller: &Caller, request: Asked) -> Result<Vec<Permit>, NoRoom> {
        let shares = vec![request.evaluations; request.canvases as usize];
        self.admit_shares(caller, request, &shares)
    }

    /// The same for canvases of these numbers of evaluations.
    pub(super) fn admit_shares(
        self: &Arc<Self>,
        caller: &Caller,
        request: Asked,
        shares: &[u64],
    ) -> Result<Vec<Permit>, NoRoom> {
        let nanos = |evaluations: &u64| evaluations.max(&1).saturating_mul(request.cost);
        let needed = shares.iter().map(nanos).fold(0, u64::saturating_add);
        let mut waiting = self.waiting.lock();
        let own = waiting.callers.get(caller).map_or(0, |own| own.all);
        let weights = waiting.callers.keys().filter(|name| *name != caller);
        let weights = weights.fold(u64::from(caller.weight()), |sum, name| {
            sum + u64::from(name.weight())
        });
        let caller_limit = (self.limit as f64 * caller.max_share().unwrap_or(self.share)) as u64;
        if needed > caller_limit {
            return Err(NoRoom::Request(self.room(needed, caller_limit, 0)));
        }
        let over = waiting.all.saturating_add(needed).saturating_sub(self.limit);
        let own_over = own.saturating_add(needed).saturating_sub(caller_limit);
        // Callers take turns, so that one's own work goes the slower the more others there are.
        let until_room =
            over.max((own_over.saturating_mul(weights) / u64::from(caller.weight())).min(waiting.all));
        if over > 0 {
            return Err(NoRoom::Server(self.room(waiting.all, self.limit, until_room)));
        }
        if own_over > 0 {
            return Err(NoRoom::Caller(self.room(own, caller_limit, until_room)));
        }
        waiting.all += needed;
        let own = waiting.callers.entry(caller.clone()).or_default();
        own.all += needed;
        let waits = Waits {
            nanos: needed,
            ..request.waits(request.evaluations)
        };
        own.requests.insert(request.number, waits);
        waiting.canvases += shares.len() as u64;
        drop(waiting);
        let permit = |evaluations: &u64| Permit {
            admission: Arc::clone(self),
            caller: caller.clone(),
            request: request.number,
            cost: request.cost,
            nanos: nanos(evaluations),
        };
        Ok(shares.iter().map(permit).collect())
    }

    /// How long `evaluations` evaluations of every canvas of `request` will take beside what waits now.
    ///
    /// Callers take turns, and so do the requests of one: whoever waits gets as much as this does until it is
    /// finished, or all that it wants. Nearer deadlines of the same caller go first.
    pub(super) fn predicted(&self, caller: &Caller, request: &Asked, evaluations: u64) -> Duration {
        let new = request.waits(evaluations);
        let waiting = self.waiting.lock();
        let own = waiting.callers.get(caller);
        let own = of_caller(&new, own.iter().flat_map(|own| own.requests.values()));
        self.predicted_beside(&waiting, caller, own, &new, request)
    }

    /// The first deadline that must not be missed and would be, were `request` admitted: its own, or a later one of
    /// the same caller. What is predicted may be wrong by a factor of `doubt`, and a pass that runs takes `pass`.
    pub(super) fn misses(
        &self,
        caller: &Caller,
        request: &Asked,
        doubt: f64,
        pass: Duration,
    ) -> Option<Missed> {
        let now = Instant::now();
        let new = request.waits(request.evaluations);
        let at = new.must?;
        let waiting = self.waiting.lock();
        let own = waiting.callers.get(caller);
        let running = own.iter().flat_map(|own| own.requests.values().copied());
        let (mut urgent, mut patient) = (Vec::new(), 0u64);
        for waits in running.chain([new]) {
            match waits.must {
                Some(must) => urgent.push((must, waits)),
                None => patient = patient.saturating_add(waits.nanos),
            }
        }
        // By deadline, so that what goes before each is a running sum: a caller may have a thousand of them, and workers wait
        // for the lock.
        urgent.sort_unstable_by_key(|(must, _)| *must);
        let mut first = 0u64;
        for of_one in urgent.chunk_by(|(must, _), (other, _)| must == other) {
            first = of_one
                .iter()
                .fold(first, |sum, (_, waits)| sum.saturating_add(waits.nanos));
            for (must, waits) in of_one.iter().filter(|(must, _)| *must >= at) {
                let own = with_patient(first, patient);
                let predicted = self.predicted_beside(&waiting, caller, own, waits, request);
                let predicted = predicted.mul_f64(doubt) + pass;
                let left = must.saturating_duration_since(now);
                if predicted > left {
                    return Some(Missed { left, predicted });
                }
            }
        }
        None
    }

    /// How long it takes until all that waits of a request is done, beside what others have, once `new` is admitted; its
    /// caller has `own` done until then.
    fn predicted_beside(
        &self,
        waiting: &Waiting,
        caller: &Caller,
        own: u64,
        waits: &Waits,
        new: &Asked,
    ) -> Duration {
        let callers = waiting.callers.iter().filter(|(name, _)| *name != caller);
        let all = callers.fold(own, |sum, (name, other)| {
            // While this takes its turns, others take theirs.
            let turns = own.saturating_mul(name.weight().into()) / u64::from(caller.weight());
            sum.saturating_add(other.all.min(turns))
        });
        // However urgent, its evaluations follow each other, and each takes as long as those that share its pass.
        let company = waiting
            .canvases
            .saturating_add(new.canvases.into())
            .min(new.per_pass.max(1).into());
        let chain = (waits.nanos / u64::from(waits.canvases.max(1))).saturating_mul(company);
        Duration::from_nanos((all / self.workers).max(chain))
    }

    fn room(&self, waiting: u64, limit: u64, until_room: u64) -> Room {
        let time = |nanos: u64| Duration::from_nanos(nanos / self.workers);
        Room {
            waiting: time(waiting),
            limit: time(limit),
            retry_after: time(until_room).clamp(Duration::from_millis(10), Duration::from_secs(600)),
        }
    }

    /// Gives back `nanos` of a request, of which `ended` canvases have ended.
    fn give_back(&self, caller: &Caller, request: u64, nanos: u64, ended: u64) {
        let mut waiting = self.waiting.lock();
        waiting.canvases = waiting.canvases.saturating_sub(ended);
        waiting.all = waiting.all.saturating_sub(nanos);
        if let Some(own) = waiting.callers.get_mut(caller) {
            own.all = own.all.saturating_sub(nanos);
            if let Some(left) = own.requests.get_mut(&request) {
                left.nanos = left.nanos.saturating_sub(nanos);
                if left.nanos == 0 {
                    own.requests.remove(&request);
                }
            }
            if own.all == 0 {
                waiting.callers.remove(caller);
            }
        }
    }
}

/// What a caller has done of its own until `request` is finished beside its other `requests`.
fn of_caller<'a>(request: &Waits, requests: impl Iterator<Item = &'a Waits>) -> u64 {
    let (mut first, mut patient) = (request.nanos, 0u64);
    for other in requests {
        match (request.must, other.must) {
            (Some(own), Some(must)) if must <= own => first = first.saturating_add(other.nanos),
            (Some(_), Some(_)) => {}
            (Some(_), None) => patient = patient.saturating_add(other.nanos),
            (None, _) => patient = patient.saturating_add(other.nanos.min(request.nanos)),
        }
    }
    if request.must.is_some() {
        with_patient(first, patient)
    } else {
        first.saturating_add(patient)
    }
}

/// What is done until the `first` of those with deadlines are: half of the time is for who is patient, so that those who
/// are not take as much at most.
fn with_patient(first: u64, patient: u64) -> u64 {
    first.saturating_add(patient.min(first))
}

/// Room for the evaluations that a canvas still needs; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    admission: Arc<Admission>,
    caller: Caller,
    request: u64,
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
            self.admission.give_back(&self.caller, self.request, back, 0);
            self.nanos = left;
        }
        back / self.cost.max(1)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission
            .give_back(&self.caller, self.request, self.nanos, 1);
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

    /// Canvases of a request of its own.
    fn wants(canvases: u32, evaluations: u64, cost: u64) -> Asked {
        static REQUESTS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        Asked {
            number: REQUESTS.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            canvases,
            evaluations,
            cost,
            deadline: None,
            per_pass: 1,
        }
    }

    #[test]
    fn predictions_share_the_time_with_who_waits() {
        let admission = admission();
        let second = 1_000 * MILLISECOND;
        let predicted = |name: &str, seconds| {
            let request = wants(1, seconds, second);
            admission.predicted(&caller(name), &request, seconds).as_secs()
        };
        assert_eq!(predicted("a", 2), 2, "alone");
        let _of_a = admission.admit(&caller("a"), wants(1, 3, second)).unwrap();
        let _of_b = admission.admit(&caller("b"), wants(1, 4, second)).unwrap();
        assert_eq!(predicted("c", 1), 3, "a turn of each");
        assert_eq!(predicted("c", 10), 17, "until all is done");
        let heavy = caller("c").with_weight(2);
        let predicted_heavy = admission.predicted(&heavy, &wants(1, 4, second), 4);
        assert_eq!(predicted_heavy.as_secs(), 8, "two turns for one of each");
        let wide = Asked {
            per_pass: 8,
            ..wants(1, 10, second)
        };
        let chain = admission.predicted(&caller("c"), &wide, 10).as_secs();
        assert_eq!(chain, 30, "three canvases share each of its passes");
        // Until "a" has had two for this request and two for the other one, "b" has had its four.
        assert_eq!(predicted("a", 2), 8);
    }

    #[test]
    fn a_nearer_deadline_is_refused_where_it_would_break_a_later_one() {
        let admission = admission();
        let (now, second) = (Instant::now(), 1_000 * MILLISECOND);
        let within = |seconds, of| Asked {
            deadline: Some(Deadline {
                at: now + Duration::from_secs(seconds),
                then: OnDeadline::Fail,
            }),
            ..wants(1, of, second)
        };
        let misses = |request: Asked| {
            let missed = admission.misses(&caller("a"), &request, 1.0, Duration::ZERO)?;
            Some((missed.left.as_secs_f64().round(), missed.predicted.as_secs()))
        };
        assert_eq!(misses(within(4, 5)), Some((4.0, 5)), "its own");
        assert_eq!(misses(within(6, 3)), None);
        let _later = admission.admit(&caller("a"), within(6, 3)).unwrap();
        assert_eq!(misses(within(4, 2)), None, "there is room before it");
        assert_eq!(
            misses(within(5, 4)),
            Some((6.0, 7)),
            "it would push the later one out"
        );
        assert_eq!(misses(within(60, 4)), None, "later ones wait");
        let early = Deadline {
            at: now + Duration::from_secs(1),
            then: OnDeadline::FinishEarly,
        };
        let early = Asked {
            deadline: Some(early),
            ..wants(1, 2, second)
        };
        assert_eq!(misses(early), None);
        // Without a deadline half of the time is enough.
        let _patient = admission.admit(&caller("a"), wants(1, 2, second)).unwrap();
        assert_eq!(misses(within(5, 2)), Some((6.0, 7)));
    }

    proptest::proptest! {
        /// The running sums, against asking for each of the caller's requests what it is predicted to take.
        #[test]
        fn what_is_missed_is_the_first_that_is_predicted_to_be(
            running in proptest::collection::vec((0u64..6, 1u64..400, 1u32..3), 0..12),
            (seconds, evaluations, others) in (1u64..6, 1u64..400, 0u64..300),
        ) {
            let admission = Admission::new(Duration::from_secs(1_000_000), 1.0, 2);
            let admission = Arc::new(admission);
            let now = Instant::now();
            let within = |seconds: u64, evaluations, canvases| Asked {
                deadline: (seconds > 0).then(|| Deadline {
                    // Far apart, so that what this takes itself does not matter.
                    at: now + Duration::from_secs(1000 * seconds),
                    then: OnDeadline::Fail,
                }),
                ..wants(canvases, evaluations, 10_000 * MILLISECOND)
            };
            let mut permits = Vec::new();
            let mut all = Vec::new();
            for (seconds, evaluations, canvases) in running {
                let request = within(seconds, evaluations, canvases);
                permits.extend(admission.admit(&caller("a"), request).unwrap());
                all.push(request.waits(evaluations));
            }
            permits.extend(admission.admit(&caller("b"), within(0, others + 1, 1)).unwrap());
            let new = within(seconds, evaluations, 1);
            let found = admission.misses(&caller("a"), &new, 1.3, Duration::ZERO);

            let waits = new.waits(evaluations);
            all.push(waits);
            let waiting = admission.waiting.lock();
            let mut missed: Vec<(Instant, Duration)> = Vec::new();
            for (index, one) in all.iter().enumerate() {
                let Some(must) = one.must.filter(|must| *must >= waits.must.unwrap()) else {
                    continue;
                };
                let rest = all.iter().enumerate().filter(|(other, _)| *other != index);
                let own = of_caller(one, rest.map(|(_, waits)| waits));
                let predicted = admission.predicted_beside(&waiting, &caller("a"), own, one, &new).mul_f64(1.3);
                if now + predicted > must {
                    missed.push((must, predicted));
                }
            }
            let first = missed.iter().map(|(must, _)| *must).min();
            let of_first = missed.iter().filter(|(must, _)| Some(*must) == first);
            let of_first: Vec<Duration> = of_first.map(|(_, predicted)| *predicted).collect();
            proptest::prop_assert_eq!(found.is_some(), first.is_some());
            proptest::prop_assert!(found.is_none_or(|found| of_first.contains(&found.predicted)));
        }
    }

    #[test]
    fn room_is_taken_whole_and_given_back() {
        let admission = admission();
        let mut permits = admission
            .admit(&caller("a"), wants(2, 40, 50 * MILLISECOND))
            .unwrap();
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
        let ask =
            |name: &str, seconds: u64| admission.admit(&caller(name), wants(1, seconds, 1_000 * MILLISECOND));
        let first = ask("a", 5).unwrap();
        assert!(matches!(ask("a", 7), Err(NoRoom::Request(room)) if room.waiting == Duration::from_secs(7)));
        assert!(matches!(ask("a", 3), Err(NoRoom::Caller(room)) if room.waiting == Duration::from_secs(5)));
        let second = ask("b", 4).unwrap();
        assert!(matches!(ask("c", 2), Err(NoRoom::Server(room)) if room.limit == Duration::from_secs(10)));
        assert_eq!(
            admission.waiting(),
            Duration::from_secs(9),
            "a refused request takes nothing"
        );
        let third = ask("c", 1).unwrap();
        drop((first, second, third));
        let small = caller("d").with_max_share(Some(0.2));
        let refused = admission.admit(&small, wants(1, 3, 1_000 * MILLISECOND));
        assert!(matches!(refused, Err(NoRoom::Request(room)) if room.limit == Duration::from_secs(2)));
    }

    /// On a simulated clock: work goes at the predicted pace, callers in turns; when it is time to come back, there
    /// is room, and half of that time is too early.
    #[test]
    fn retry_delays_are_right_within_a_factor_of_two() {
        for (own, others, asked) in [(5, 0, 3), (5, 4, 3), (6, 1, 2), (2, 6, 5), (3, 6, 4)] {
            let admission = admission();
            let second = 1_000 * MILLISECOND;
            let mut mine = admission
                .admit(&caller("a"), wants(1, own, second))
                .unwrap()
                .remove(0);
            let mut theirs = (others > 0).then(|| {
                admission
                    .admit(&caller("b"), wants(1, others, second))
                    .unwrap()
                    .remove(0)
            });
            let refused = admission
                .admit(&caller("a"), wants(1, asked, second))
                .unwrap_err();
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
                if admission.admit(&caller("a"), wants(1, asked, second)).is_ok() {
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
