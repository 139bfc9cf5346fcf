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
mod tests;
