//! A job and what goes with it from worker to worker.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::admission::Permit;
use super::caller::{Caller, RequestName};
use super::canvas::Canvas;
use super::job::Job;
use super::queue::{FlowDescription, FlowKey, Lane, Urgency, Weight};
use super::request::{Deadline, OnDeadline};
use super::scoring::{Board, Scoring};
use super::spent::Spent;
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
    pub(super) spent: Arc<Spent>,
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
    pub(super) name: RequestName,
    pub(super) number: u64,
    pub(super) model: Arc<ServedModel>,
    pub(super) spent: Arc<Spent>,
    pub(super) shared: Arc<Shared>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.forget(&self.name, self.number);
        if self.shared.loader.release(&self.model) {
            self.shared.costs.forget(&self.model);
        }
        tracing::debug!(
            request = self.name.id,
            model = %self.model,
            done = self.spent.done(),
            evaluations = self.spent.evaluations(),
            "a request has left the engine"
        );
    }
}

/// Who follows a job.
#[derive(Debug)]
enum Follower {
    /// Of a canvas, by its newest state; closed when nobody listens any more.
    Canvas(watch::Sender<State>),
    /// Of a part of a scoring.
    Scoring(Arc<Board>),
}

impl Follower {
    fn is_gone(&self) -> bool {
        match self {
            Self::Canvas(progress) => progress.is_closed(),
            Self::Scoring(board) => board.is_closed(),
        }
    }

    /// Tells that the job has ended, where it is at hand in the state that it is in.
    fn fail(&self, job: Option<&Job>, failure: Failure) {
        match (self, job) {
            (Self::Scoring(board), _) => board.fail(failure),
            (Self::Canvas(progress), Some(Job::Denoising(canvas))) => {
                tell(progress, |state| *state = State::failed(canvas, failure));
            }
            (Self::Canvas(progress), _) => tell(progress, |state| state.phase = Phase::Failed(failure)),
        }
    }
}

/// Changes the newest state of a canvas that has not ended.
fn tell(progress: &watch::Sender<State>, change: impl FnOnce(&mut State)) {
    progress.send_if_modified(|state| {
        let running = matches!(state.phase, Phase::Running);
        if running {
            change(state);
        }
        running
    });
}

/// Room and place of a job that has not ended, and its followers. Apart from the job, so that it can be
/// ended while a thread that does not come back has the job.
#[derive(Debug)]
pub(super) struct Ticket {
    request: String,
    follower: Follower,
    /// Room and place; gone when the job has ended.
    held: Mutex<Option<(Permit, Arc<Place>)>>,
}

impl Ticket {
    /// The request's id.
    pub(super) fn request(&self) -> &str {
        &self.request
    }

    /// Ends the job with `failure`, unless it has ended before.
    pub(super) fn end(&self, failure: Failure) {
        self.end_at(None, failure);
    }

    fn end_at(&self, job: Option<&Job>, failure: Failure) {
        if self.let_go(|counters| counters.count_failure(&failure)) {
            self.follower.fail(job, failure);
        }
    }

    fn done(&self, job: &Job, timings: Timings) {
        if let Some((_, place)) = &*self.held.lock() {
            place.spent.count_done();
        }
        match (&self.follower, job) {
            (Follower::Canvas(progress), Job::Denoising(canvas)) => {
                self.let_go(|counters| {
                    counters.count_done(canvas.finished_early());
                    counters.count_canvas(canvas.nfe(), canvas.gaps(), &timings);
                });
                tell(progress, |state| *state = State::done(canvas, timings));
            }
            (Follower::Scoring(board), Job::Scoring(part)) => {
                self.let_go(Counters::count_scored);
                board.done(part);
            }
            // A job has a follower of its own kind.
            (Follower::Canvas(_), Job::Scoring(_)) | (Follower::Scoring(_), Job::Denoising(_)) => {
                self.let_go(|_| ());
            }
        }
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

    /// Frees what the job holds, once; first, so that whoever is told finds it free. Whether it still held it.
    fn let_go(&self, count: impl FnOnce(&Counters)) -> bool {
        // Giving room and place back takes locks of its own.
        let held = self.held.lock().take();
        if let Some((_, place)) = &held {
            count(&place.shared.counters);
        }
        held.is_some()
    }
}

/// A job on its way. However it ends, whoever follows it is told, and its room is free again.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) job: Job,
    /// The next evaluation.
    pub(super) evaluation: Evaluation,
    pub(super) origin: Arc<Origin>,
    /// Number of the job in its request.
    pub(super) index: u32,
    ticket: Arc<Ticket>,
    /// Set after a pass has failed that others shared: it may have been this job.
    alone: bool,
    /// Since when it has waited for its next step.
    pub(super) ready: Instant,
    /// How long it has waited for the last one.
    waited: Duration,
    pub(super) timings: Timings,
    /// Evaluations that have been counted.
    counted: u32,
    /// Passes that failed in a row with this job alone.
    pub(super) attempts: u32,
}

impl Work {
    /// Denoising that takes part in the queue, and the newest state of its canvas.
    pub(super) fn denoising(
        canvas: Canvas,
        origin: &Arc<Origin>,
        index: u32,
        permit: Permit,
        place: &Arc<Place>,
    ) -> (Self, watch::Receiver<State>) {
        let (progress, receiver) = watch::channel(State::running(&canvas));
        let follower = Follower::Canvas(progress);
        let work = Self::new(Job::Denoising(canvas), follower, origin, index, permit, place);
        (work, receiver)
    }

    /// A part of a scoring that takes part in the queue.
    pub(super) fn scoring(
        part: Scoring,
        board: &Arc<Board>,
        origin: &Arc<Origin>,
        index: u32,
        permit: Permit,
        place: &Arc<Place>,
    ) -> Self {
        let follower = Follower::Scoring(Arc::clone(board));
        Self::new(Job::Scoring(part), follower, origin, index, permit, place)
    }

    fn new(
        job: Job,
        follower: Follower,
        origin: &Arc<Origin>,
        index: u32,
        permit: Permit,
        place: &Arc<Place>,
    ) -> Self {
        let ticket = Ticket {
            request: origin.id.clone(),
            follower,
            held: Mutex::new(Some((permit, Arc::clone(place)))),
        };
        let work = Self {
            evaluation: job.evaluation(),
            job,
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
        work.ticket.keep(0, work.job.evaluations_left());
        work.join();
        work
    }

    /// Returns the ticket, which ends the job wherever it is.
    pub(super) fn ticket(&self) -> &Arc<Ticket> {
        &self.ticket
    }

    /// The flow that this waits in.
    pub(super) fn flow(&self) -> FlowKey {
        FlowKey {
            request: self.origin.number,
            length: self.job.tokens().len(),
            alone: self.alone.then_some(self.index),
        }
    }

    /// Returns what the next step takes of a pass.
    pub(super) fn weight(&self) -> Weight {
        let model = self.job.model();
        let output = model.output();
        let rows = if output.all_rows {
            self.job.tokens().len()
        } else {
            // Its deadline can make it ask for all that is left.
            self.job
                .most_rows(&self.evaluation, self.origin.finish_by().is_some())
        };
        let evaluations = self.job.evaluations(&self.evaluation) as usize;
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
            model: self.job.model().address(),
            length: self.job.tokens().len(),
            alone: key.alone.map(|_| key),
        };
        let description = FlowDescription {
            caller: self.origin.caller.clone(),
            weight: self.origin.caller.weight(),
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
        let longest = if self.job.nfe() > 0 {
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
        if now + pass + next > deadline
            && self.job.evaluations_left() > 1
            && let Some(last) = self.job.finish()
        {
            self.evaluation = last;
        }
    }

    /// Takes note of a pass that this took part in since `started`.
    pub(super) fn count_pass(&mut self, started: Instant, network: Duration, sampling: Duration) {
        let queue = started.saturating_duration_since(self.ready);
        self.timings.queue += queue;
        self.timings.network += network;
        self.timings.sampling += sampling;
        self.origin.spent.count_pass(queue, network);
    }

    /// Why this should not go on, if it should not.
    pub(super) fn is_over(&self) -> Option<Failure> {
        let too_late =
            |deadline: Deadline| deadline.then == OnDeadline::Fail && Instant::now() >= deadline.at;
        if self.origin.cancelled.load(Ordering::Acquire) {
            Some(Failure::Cancelled)
        } else if self.origin.deadline.is_some_and(too_late) {
            Some(Failure::Deadline)
        } else if self.ticket.follower.is_gone() {
            Some(Failure::Abandoned)
        } else {
            None
        }
    }

    /// Tells what a pass has made of the job; gives back what is not finished.
    pub(super) fn publish(mut self) -> Option<Self> {
        self.attempts = 0;
        self.set_alone(false);
        let left = if self.job.is_done() {
            0
        } else {
            self.job.evaluations_left()
        };
        let spent = self.job.nfe() - std::mem::replace(&mut self.counted, self.job.nfe());
        self.origin.spent.count_evaluations(spent.into());
        self.ticket.keep(spent.into(), left);
        if let Follower::Scoring(board) = &self.ticket.follower {
            board.advance(spent.into());
        }
        if self.job.is_done() {
            self.timings.total = self.origin.admitted.elapsed();
            self.ticket.done(&self.job, self.timings);
            return None;
        }
        if let Some(failure) = self.is_over() {
            self.end(failure);
            return None;
        }
        self.evaluation = self.job.evaluation();
        if self.origin.publish == Publish::Steps
            && let (Follower::Canvas(progress), Job::Denoising(canvas)) = (&self.ticket.follower, &self.job)
        {
            let running = State::running(canvas);
            tell(progress, |state| *state = running);
        }
        self.ready = Instant::now();
        Some(self)
    }

    /// Ends the job.
    pub(super) fn end(self, failure: Failure) {
        // Whoever goes on elsewhere goes on from here.
        self.ticket.end_at(Some(&self.job), failure);
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
