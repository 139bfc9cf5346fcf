//! A canvas and what goes with it from worker to worker.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::admission::Permit;
use super::canvas::Canvas;
use super::queue::{FlowDescription, FlowKey, Lane, Urgency, Weight};
use super::request::{Caller, Deadline, OnDeadline};
use super::{Counters, Failure, Phase, Publish, Shared, State, Timings};
use crate::diffusion::sampler::Evaluation;
use crate::models::{ServedModel, Waiting};
use crate::sync::Mutex;

/// Passes that a canvas is taken to wait for at most, before it has had its first.
const FIRST_WAIT: u32 = 8;
/// What a wait and a pass may take, of what they took the last time.
const DOUBT: f64 = 1.25;
/// Time that is kept for telling the result.
const LAST_WORDS: Duration = Duration::from_millis(10);

/// The request that canvases come from.
#[derive(Debug)]
pub(super) struct Origin {
    /// The request's id, for the log.
    pub(super) id: String,
    /// The request, by order of arrival.
    pub(super) number: u64,
    pub(super) caller: Caller,
    pub(super) cancelled: Arc<AtomicBool>,
    pub(super) publish: Publish,
    pub(super) deadline: Option<Deadline>,
    pub(super) priority: i32,
    pub(super) admitted: Instant,
    pub(super) shared: Arc<Shared>,
}

impl Origin {
    fn urgency(&self) -> Urgency {
        let since_start = |deadline: Deadline| {
            let time = deadline.at.saturating_duration_since(self.shared.started);
            u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
        };
        Urgency {
            priority: Reverse(self.priority),
            // Whoever finishes early needs no turn before others but regular ones: what it gets before its deadline is
            // its share, and were the nearest deadline first, those behind it would have nothing until theirs is near.
            deadline: self
                .deadline
                .filter(|deadline| deadline.then == OnDeadline::Fail)
                .map_or(u64::MAX, since_start),
        }
    }

    /// The deadline by which canvases end with what they have.
    fn finish_by(&self) -> Option<Instant> {
        self.deadline
            .filter(|deadline| deadline.then == OnDeadline::FinishEarly)
            .map(|deadline| deadline.at)
    }
}

/// The place of a request among those that run; free again when the last of its canvases has ended, whether or
/// not its stream has been read.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) id: String,
    pub(super) number: u64,
    pub(super) caller: Caller,
    pub(super) model: Arc<ServedModel>,
    pub(super) canvases: u32,
    pub(super) admitted: Instant,
    pub(super) tally: Tally,
    pub(super) shared: Arc<Shared>,
}

/// How the canvases of a request have ended.
#[derive(Debug, Default)]
pub(super) struct Tally {
    done: AtomicU32,
    evaluations: AtomicU64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.forget(&self.id, self.number);
        if self.shared.loader.release(&self.model) {
            self.shared.costs.forget(&self.model);
        }
        let done = self.tally.done.load(Ordering::Acquire);
        // Requests that were refused after they had a place are told as refusals.
        if self.canvases > 0 {
            tracing::info!(
                request = self.id,
                caller = %self.caller,
                model = %self.model,
                canvases = self.canvases,
                done,
                evaluations = self.tally.evaluations.load(Ordering::Acquire),
                ms = self.admitted.elapsed().as_millis() as u64,
                "a request has ended"
            );
        }
    }
}

/// Room and place of a canvas that has not ended, and its followers. Apart from the canvas, so that it can be
/// ended while a thread that does not come back has the canvas.
#[derive(Debug)]
pub(super) struct Ticket {
    request: String,
    /// Keeps the newest state only; closed when nobody listens any more.
    progress: watch::Sender<State>,
    /// Room and place; gone when the canvas has ended.
    held: Mutex<Option<(Permit, Arc<Place>)>>,
}

impl Ticket {
    /// The request's id.
    pub(super) fn request(&self) -> &str {
        &self.request
    }

    /// Ends the canvas with `failure`, unless it has ended before.
    pub(super) fn end(&self, failure: Failure) {
        self.let_go(|counters| counters.count_failure(&failure));
        self.tell(|state| state.phase = Phase::Failed(failure));
    }

    /// The same of a canvas that is at hand, in the state that it is in.
    fn end_at(&self, canvas: &Canvas, failure: Failure) {
        self.let_go(|counters| counters.count_failure(&failure));
        self.tell(|state| *state = State::failed(canvas, failure));
    }

    /// Changes the newest state of a canvas that has not ended.
    fn tell(&self, change: impl FnOnce(&mut State)) {
        self.progress.send_if_modified(|state| {
            let running = matches!(state.phase, Phase::Running);
            if running {
                change(state);
            }
            running
        });
    }

    fn done(&self, state: State) {
        if let Some((_, place)) = &*self.held.lock() {
            place.tally.done.fetch_add(1, Ordering::AcqRel);
            place
                .tally
                .evaluations
                .fetch_add(state.nfe.into(), Ordering::AcqRel);
        }
        let early = matches!(&state.phase, Phase::Done(outcome) if outcome.early);
        self.let_go(|counters| counters.count_done(early));
        self.tell(|newest| *newest = state);
    }

    /// Gives room back after `spent` evaluations, of which `left` are left.
    fn keep(&self, spent: u64, left: u64) {
        if let Some((permit, place)) = &mut *self.held.lock() {
            let back = permit.keep(left);
            place
                .shared
                .counters
                .count_evaluations(spent, back.saturating_sub(spent));
        }
    }

    /// Frees what the canvas holds, once; first, so that whoever is told finds it free.
    fn let_go(&self, count: impl FnOnce(&Counters)) {
        // Giving room and place back takes locks of its own.
        let held = self.held.lock().take();
        if let Some((_, place)) = &held {
            count(&place.shared.counters);
        }
        drop(held);
    }
}

/// A canvas on its way. However it ends, whoever follows it is told, and its room is free again.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) canvas: Canvas,
    /// The next evaluation.
    pub(super) evaluation: Evaluation,
    pub(super) origin: Arc<Origin>,
    /// Number of the canvas in its request.
    pub(super) index: u32,
    ticket: Arc<Ticket>,
    /// Set after a pass has failed that others shared: it may have been this canvas.
    alone: bool,
    /// Since when it has waited for its next step.
    pub(super) ready: Instant,
    /// How long it has waited for the last one.
    waited: Duration,
    pub(super) timings: Timings,
    /// Evaluations that have been counted.
    counted: u32,
    /// Passes that failed in a row with this canvas alone.
    pub(super) attempts: u32,
}

impl Work {
    /// Work that takes part in the queue, and the newest state of its canvas.
    pub(super) fn new(
        canvas: Canvas,
        origin: &Arc<Origin>,
        index: u32,
        permit: Permit,
        place: &Arc<Place>,
    ) -> (Self, watch::Receiver<State>) {
        let (progress, receiver) = watch::channel(State::running(&canvas));
        let ticket = Ticket {
            request: origin.id.clone(),
            progress,
            held: Mutex::new(Some((permit, Arc::clone(place)))),
        };
        let work = Self {
            evaluation: canvas.evaluation(),
            canvas,
            origin: Arc::clone(origin),
            index,
            ticket: Arc::new(ticket),
            alone: false,
            ready: origin.admitted,
            waited: Duration::ZERO,
            timings: Timings::default(),
            counted: 0,
            attempts: 0,
        };
        // The number of evaluations was an upper bound as long as hitting times were not drawn.
        work.ticket.keep(0, work.canvas.evaluations_left());
        work.join();
        (work, receiver)
    }

    /// Returns the ticket, which ends the canvas wherever it is.
    pub(super) fn ticket(&self) -> &Arc<Ticket> {
        &self.ticket
    }

    /// The flow that this waits in.
    pub(super) fn flow(&self) -> FlowKey {
        FlowKey {
            request: self.origin.number,
            alone: self.alone.then_some(self.index),
        }
    }

    /// Returns what the next step takes of a pass.
    pub(super) fn weight(&self) -> Weight {
        let model = self.canvas.model();
        let output = model.output();
        let rows = if output.all_rows {
            self.canvas.tokens().len()
        } else if self.origin.finish_by().is_some() {
            // Its deadline can make it ask for all that is left.
            self.canvas.movable()
        } else {
            self.evaluation.positions.len()
        };
        let evaluations = self.canvas.evaluations(&self.evaluation) as usize;
        Weight {
            evaluations: evaluations as u64,
            // Rows of a first evaluation are kept for the second.
            output_bytes: evaluations * rows * model.manifest().vocab_size * output.entry_bytes,
        }
    }

    /// Runs alone from now on, or with others again.
    pub(super) fn set_alone(&mut self, alone: bool) {
        if self.alone != alone {
            let before = self.flow();
            self.alone = alone;
            self.join();
            self.origin.shared.queue.leave(before);
        }
    }

    fn join(&self) {
        let key = self.flow();
        let lane = Lane {
            model: self.canvas.model().address(),
            length: self.canvas.tokens().len(),
            alone: key.alone.map(|_| key),
        };
        let description = FlowDescription {
            caller: self.origin.caller.clone(),
            lane,
            urgency: self.origin.urgency(),
        };
        self.origin.shared.queue.join(key, &description);
    }

    /// Takes note that a pass has taken this, which will last `pass` as predicted. Where the deadline leaves no time
    /// for another one after it, its evaluation becomes the last.
    pub(super) fn taken(&mut self, pass: Duration) {
        let now = Instant::now();
        let waited = now.saturating_duration_since(self.ready);
        let longest = if self.canvas.nfe() > 0 {
            waited.max(self.waited)
        } else {
            // Its model may have been loaded meanwhile: that says nothing of the next wait.
            waited.min(pass * FIRST_WAIT)
        };
        self.waited = waited;
        let Some(deadline) = self.origin.finish_by() else {
            return;
        };
        let next = (longest + pass).mul_f64(DOUBT) + LAST_WORDS;
        if now + pass + next > deadline && self.canvas.evaluations_left() > 1 {
            self.evaluation = self.canvas.finish();
        }
    }

    /// Why this should not go on, if it should not.
    pub(super) fn is_over(&self) -> Option<Failure> {
        let too_late =
            |deadline: Deadline| deadline.then == OnDeadline::Fail && Instant::now() >= deadline.at;
        if self.origin.cancelled.load(Ordering::Acquire) {
            Some(Failure::Cancelled)
        } else if self.origin.deadline.is_some_and(too_late) {
            Some(Failure::Deadline)
        } else if self.ticket.progress.is_closed() {
            Some(Failure::Abandoned)
        } else {
            None
        }
    }

    /// Tells what a pass has made of the canvas; gives back what is not finished.
    pub(super) fn publish(mut self) -> Option<Self> {
        self.attempts = 0;
        self.set_alone(false);
        let left = if self.canvas.is_done() {
            0
        } else {
            self.canvas.evaluations_left()
        };
        let spent = self.canvas.nfe() - std::mem::replace(&mut self.counted, self.canvas.nfe());
        self.ticket.keep(spent.into(), left);
        if self.canvas.is_done() {
            self.timings.total = self.origin.admitted.elapsed();
            let done = State::done(&self.canvas, self.timings);
            self.ticket.done(done);
            return None;
        }
        if let Some(failure) = self.is_over() {
            self.end(failure);
            return None;
        }
        self.evaluation = self.canvas.evaluation();
        if self.origin.publish == Publish::Steps {
            let running = State::running(&self.canvas);
            self.ticket.tell(|state| *state = running);
        }
        self.ready = Instant::now();
        Some(self)
    }

    /// Ends the canvas.
    pub(super) fn end(self, failure: Failure) {
        // Whoever goes on elsewhere goes on from here.
        self.ticket.end_at(&self.canvas, failure);
    }
}

impl Waiting for Work {
    fn request(&self) -> u64 {
        self.origin.number
    }

    fn fail(self, model: &ServedModel, reason: &str) {
        self.end(Failure::Model {
            model: model.to_string(),
            reason: reason.to_owned(),
        });
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Nothing is left saying that it runs, whatever became of the thread that had it.
        self.ticket.end(Failure::Worker {
            request: self.origin.id.clone(),
        });
        self.origin.shared.queue.leave(self.flow());
    }
}
