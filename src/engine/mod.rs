//! The engine: stateless workers, canvases as work items.
//!
//! ```text
//! admit -> ready queue -> worker: take -> run -> commit -> publish -> put back
//! ```
//!
//! A request becomes one or more [`canvas::Canvas`]es, or parts of texts that are scored (`scoring`): jobs that share
//! all that follows. The queue says who is next: callers take turns, and the
//! requests of a caller, by the predicted time of what they are given. A worker takes what is next, with others
//! that share a model and a length, evaluates the network once for all of them and puts them back, so requests
//! with other step counts, samplers or temperatures share forward passes, and new ones join at the next step.
//! Progress is published through one watch channel a canvas, which keeps the newest state only: a slow reader
//! slows nobody.
//!
//! Failures stay where they happen. A canvas with unusable scores ends alone; after a pass that failed its
//! canvases run one by one, and only the session that it ran on is replaced; a model that cannot be loaded
//! fails its own requests. A pass that hangs is stopped, or given up with its thread (`watchdog`); one that has no memory is made smaller (`budget`). However work ends, whoever follows it is told.
//!
//! The engine knows tokens, not text, and nothing of gRPC. Only workers touch a network; models are loaded by
//! [`crate::models`].

mod admission;
mod budget;
mod caller;
pub mod canvas;
mod cost;
mod counters;
mod drawing;
mod job;
mod pass;
pub mod plan;
mod progress;
mod queue;
mod request;
mod scoring;
mod spent;
mod watchdog;
mod work;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use dashmap::mapref::entry;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use admission::{Admission, Asked};
pub use admission::{NoRoom, Room};
use budget::Budget;
pub use caller::Caller;
use caller::RequestName;
pub use canvas::CanvasState;
use canvas::{Beginning, Canvas};
use cost::Costs;
pub use counters::Counters;
use plan::Plan;
pub use progress::{Failure, Outcome, Phase, State, Timings};
use queue::Queue;
pub use request::{AdmitError, Deadline, Generation, OnDeadline, Publish, Request, Resume};
pub use scoring::{ScoreRequest, Scores, ScoringRun, TextScore, TextToScore};
pub use spent::Spent;
use watchdog::Watchdog;
use work::{Origin, Place, Work};

use crate::models::{Loader, ModelState, Put, ServedModel};
use crate::sync::{self, Mutex, Thread};

/// How the engine is laid out.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Devices that networks are on; at least 1.
    pub devices: usize,
    /// Worker threads of each device, each with networks of its own; at least 1.
    pub workers: usize,
    /// Threads that share the drawing of tokens, where there is much to draw; at least 1.
    pub threads: usize,
    /// Tokens of one forward pass: canvases times length. One canvas always fits.
    pub batch_tokens: usize,
    /// Bytes of log-scores that one forward pass gives. One canvas always fits.
    pub output_bytes: usize,
    /// Work that may wait, as the time that the workers are predicted to need for it.
    pub max_queue: Duration,
    /// Share of it that one caller may have, in (0, 1].
    pub caller_share: f64,
    /// Bytes of memory that all networks of a device together may take; a model that needs more room has others unloaded.
    pub network_bytes: u64,
    /// Requests that may run.
    pub max_running_requests: usize,
    /// How long a pass may take before it is stopped.
    pub max_pass: Duration,
    /// How long it may go on then, before it is given up with its thread.
    pub last_chance: Duration,
}

/// How much waits or runs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Predicted time that the workers need for it.
    pub queued: Duration,
    /// Canvases, and parts of texts that are scored.
    pub canvases: u64,
    /// Requests.
    pub requests: usize,
    /// Those of them of which nothing has been evaluated yet.
    pub waiting: usize,
    /// Share that it has of the work that may wait or run.
    pub saturation: f64,
}

/// A request that has canvases left.
#[derive(Debug)]
struct Running {
    number: u64,
    cancelled: Arc<AtomicBool>,
    spent: Arc<Spent>,
}

/// What is kept of a request of any kind while it runs.
#[derive(Debug)]
struct Entry {
    id: String,
    caller: Caller,
    model: Arc<ServedModel>,
    publish: Publish,
    deadline: Option<Deadline>,
    priority: i32,
}

/// State that workers, loader, admission and callers share.
#[derive(Debug)]
struct Shared {
    options: EngineOptions,
    queue: Queue,
    admission: Arc<Admission>,
    costs: Costs,
    counters: Counters,
    budget: Budget,
    watchdog: Watchdog,
    loader: Arc<Loader<Work>>,
    /// Workers, loader and watchdog; taken by whoever shuts down first.
    threads: Mutex<Vec<Thread>>,
    /// Workers so far.
    workers: AtomicU64,
    /// Running requests by caller and id.
    running: DashMap<RequestName, Running>,
    /// Requests so far.
    requests: AtomicU64,
    started: Instant,
    draining: AtomicBool,
}

impl Shared {
    /// Lets work wait for its next evaluation, or ends it where nothing waits any more.
    fn put(&self, work: Vec<Work>) {
        end_all(self.queue.put(work), &Failure::ShutDown);
    }

    /// A request has ended: its id and its place are free.
    fn forget(&self, name: &RequestName, number: u64) {
        // Another may have the id by now.
        self.running
            .remove_if(name, |_, running| running.number == number);
    }

    /// Takes out what waits of a request, wherever it does.
    fn withdraw(&self, request: u64) -> Vec<Work> {
        let mut work = self.queue.withdraw(request);
        work.extend(self.loader.withdraw(Some(request)));
        work
    }
}

fn end_all(work: Vec<Work>, failure: &Failure) {
    work.into_iter().for_each(|work| work.end(failure.clone()));
}

/// What a request may take that must be whole by its deadline, of what is predicted.
const DOUBT: f64 = 1.3;

/// How long shutting down waits for threads in the middle of a pass or a load.
const LAST_PASS: Duration = Duration::from_secs(5);

/// A pool of workers and the queue before them.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// Starts a thread of the engine.
fn spawn(shared: &Shared, name: String, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let thread = sync::spawn(name, run)?;
    shared.threads.lock().push(thread);
    Ok(())
}

/// Builds the canvases of these numbers, each from its state where one is known.
fn build(numbers: &[u32], request: &mut Request) -> Result<Vec<Canvas>, AdmitError> {
    let plan = Arc::new(Plan::new(
        &request.model,
        request.sampling,
        request.allowed.take(),
        request.draft.take(),
    ));
    let (beginning, seed) = (Beginning::new(&plan, &request.template), request.seed);
    let states = &mut request.resume.states;
    let canvas = |&canvas: &u32| match states.remove(&canvas) {
        None => Ok(Canvas::new(&plan, &beginning, seed, canvas.into())),
        Some(state) => Canvas::resume(&plan, &beginning, seed, canvas.into(), state)
            .map_err(|problem| AdmitError::State { canvas, problem }),
    };
    numbers.iter().map(canvas).collect()
}

/// Lets work wait again that has waited for something else.
fn put_into(shared: &Arc<Shared>) -> Put<Work> {
    let shared = Arc::clone(shared);
    Arc::new(move |work| shared.put(work))
}

/// Starts one more worker.
fn spawn_worker(shared: &Arc<Shared>) -> std::io::Result<()> {
    let index = shared.workers.fetch_add(1, Ordering::AcqRel) as usize;
    let own = Arc::clone(shared);
    spawn(shared, format!("denoise-{index}"), move || {
        worker::run(&own, index);
    })
}

impl Engine {
    /// Starts the workers and the loader.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(options: EngineOptions) -> std::io::Result<Self> {
        let options = EngineOptions {
            // Whoever is free takes the next pass to whichever device has the least to do.
            workers: options.workers.max(1) * options.devices.max(1),
            ..options
        };
        let shared = Arc::new(Shared {
            options,
            queue: Queue::new(),
            admission: Arc::new(Admission::new(
                options.max_queue,
                options.caller_share,
                options.workers,
            )),
            costs: Costs::default(),
            counters: Counters::default(),
            budget: Budget::new(options.batch_tokens),
            watchdog: Watchdog::new(options.max_pass, options.last_chance),
            loader: Loader::new(
                options.devices,
                options.workers / options.devices.max(1),
                options.network_bytes,
            ),
            threads: Mutex::new(Vec::new()),
            workers: AtomicU64::new(0),
            running: DashMap::new(),
            requests: AtomicU64::new(0),
            started: Instant::now(),
            draining: AtomicBool::new(false),
        });
        // Its drop ends the threads that there are, where the system does not give all.
        let engine = Self {
            shared: Arc::clone(&shared),
        };
        for _ in 0..options.workers {
            spawn_worker(&shared)?;
        }
        let own = Arc::clone(&shared);
        spawn(&shared, "load".to_owned(), move || {
            own.loader.run(&put_into(&own));
        })?;
        let own = Arc::clone(&shared);
        spawn(&shared, "watchdog".to_owned(), move || own.watchdog.run(&own))?;
        Ok(engine)
    }

    /// Queues a request's canvases. Refusals come before anything is built or drawn.
    pub fn admit(&self, request: Request) -> Result<Generation, AdmitError> {
        let admitted = self.try_admit(request);
        if let Err(refusal) = &admitted {
            self.shared.counters.count_refusal(refusal);
        }
        admitted
    }

    fn try_admit(&self, mut request: Request) -> Result<Generation, AdmitError> {
        let shared = &self.shared;
        self.check_open(&request.model)?;
        let gaps = request.template.iter().filter(|token| token.is_none()).count();
        let evaluations = request.sampling.most_evaluations(gaps, &request.model);
        let numbers: Vec<u32> = (0..request.canvases)
            .filter(|number| !request.resume.finished.contains(number))
            .collect();
        let asked = Asked {
            number: shared.requests.fetch_add(1, Ordering::AcqRel),
            canvases: numbers.len() as u32,
            evaluations,
            cost: shared.costs.predicted(&request.model, request.template.len()),
            deadline: request.deadline,
            per_pass: u32::try_from(shared.options.batch_tokens / request.template.len().max(1))
                .unwrap_or(u32::MAX),
        };
        let predicted = shared.admission.predicted(&request.caller, &asked, evaluations);
        let entry = Entry {
            id: request.id.clone(),
            caller: request.caller.clone(),
            model: Arc::clone(&request.model),
            publish: request.publish,
            deadline: request.deadline,
            priority: request.priority,
        };
        self.check_deadline(&entry, &asked, request.template.len())?;
        let (origin, place) = self.register(entry, asked.number)?;
        let permits = if numbers.is_empty() {
            Vec::new()
        } else {
            shared.admission.admit(&request.caller, asked)?
        };
        let built = build(&numbers, &mut request)?;
        place.spent.begin(asked.canvases);
        let place = Arc::new(place);
        let (mut canvases, mut work) = (Vec::with_capacity(numbers.len()), Vec::new());
        for ((permit, canvas), &number) in permits.into_iter().zip(built).zip(&numbers) {
            if canvas.is_done() {
                canvases.push(watch::channel(State::done(&canvas, Timings::default())).1);
                continue;
            }
            let (item, receiver) = Work::denoising(canvas, &origin, number, permit, &place);
            canvases.push(receiver);
            work.push(item);
        }
        let initial = canvases.iter().map(|newest| newest.borrow().clone()).collect();
        shared.put(work);
        Ok(Generation {
            numbers,
            initial,
            canvases,
            predicted,
            spent: Arc::clone(&origin.spent),
            name: RequestName {
                caller: origin.caller.clone(),
                id: request.id,
            },
            number: origin.number,
            shared: Arc::clone(shared),
        })
    }

    /// Queues the texts of a request to be scored. Refusals come before anything is built or drawn.
    pub fn score(&self, request: &ScoreRequest) -> Result<ScoringRun, AdmitError> {
        let admitted = self.try_score(request);
        if let Err(refusal) = &admitted {
            self.shared.counters.count_refusal(refusal);
        }
        admitted
    }

    fn try_score(&self, request: &ScoreRequest) -> Result<ScoringRun, AdmitError> {
        let shared = &self.shared;
        self.check_open(&request.model)?;
        let longest = request
            .texts
            .iter()
            .map(|text| text.tokens.len())
            .max()
            .unwrap_or(0);
        let per_pass = shared.options.batch_tokens / longest.max(1);
        let layout = scoring::Layout::new(request, per_pass * shared.options.workers);
        // Evaluations of texts of all lengths, at what they cost on the mean.
        let cost = |length| shared.costs.predicted(&request.model, length);
        let cost = layout.mean_cost(request, cost);
        let asked = Asked {
            number: shared.requests.fetch_add(1, Ordering::AcqRel),
            canvases: u32::try_from(layout.shares.len()).unwrap_or(u32::MAX),
            evaluations: layout.evaluations.div_ceil(layout.shares.len().max(1) as u64),
            cost,
            deadline: request.deadline,
            per_pass: u32::try_from(per_pass).unwrap_or(u32::MAX),
        };
        let predicted = shared
            .admission
            .predicted(&request.caller, &asked, asked.evaluations);
        let entry = Entry {
            id: request.id.clone(),
            caller: request.caller.clone(),
            model: Arc::clone(&request.model),
            publish: Publish::End,
            deadline: request.deadline,
            priority: request.priority,
        };
        self.check_deadline(&entry, &asked, longest)?;
        let (origin, place) = self.register(entry, asked.number)?;
        let permits = shared
            .admission
            .admit_shares(&request.caller, asked, &layout.shares)?;
        place.spent.begin(asked.canvases);
        let place = Arc::new(place);
        let texts = layout.build(request);
        let (board, scores) = scoring::Board::new(&texts);
        let mut work = Vec::with_capacity(permits.len());
        for ((number, permit), part) in (0..).zip(permits).zip(texts.into_iter().flatten()) {
            if part.is_done() {
                board.done(&part);
            } else {
                work.push(Work::scoring(part, &board, &origin, number, permit, &place));
            }
        }
        shared.put(work);
        Ok(ScoringRun {
            scores,
            predicted,
            spent: Arc::clone(&origin.spent),
            name: RequestName {
                caller: origin.caller.clone(),
                id: request.id.clone(),
            },
            number: origin.number,
            shared: Arc::clone(shared),
        })
    }

    /// Refuses what nothing can be done about now.
    fn check_open(&self, model: &Arc<ServedModel>) -> Result<(), AdmitError> {
        let shared = &self.shared;
        if shared.draining.load(Ordering::Acquire) {
            return Err(AdmitError::Draining);
        }
        if let ModelState::Failed { reason, retry_at } = self.state(model) {
            return Err(AdmitError::Model {
                model: model.to_string(),
                reason,
                retry_after: retry_at.saturating_duration_since(Instant::now()),
            });
        }
        let running = shared.running.len();
        if running >= shared.options.max_running_requests {
            return Err(AdmitError::Running { running });
        }
        Ok(())
    }

    /// Refuses what cannot be done in time, as far as times are known.
    fn check_deadline(&self, request: &Entry, asked: &Asked, length: usize) -> Result<(), AdmitError> {
        let Some(deadline) = request.deadline else {
            return Ok(());
        };
        let shared = &self.shared;
        let is_known = shared.costs.known(request.model.address(), length).is_some();
        let left = deadline.at.saturating_duration_since(Instant::now());
        let running = if shared.admission.is_idle() {
            1
        } else {
            asked.per_pass.max(1)
        };
        let pass = Duration::from_nanos(asked.cost.saturating_mul(running.into()));
        let missed = if left.is_zero() {
            Some((left, pass))
        } else if !is_known {
            None
        } else {
            match deadline.then {
                OnDeadline::Fail => {
                    let missed = shared.admission.misses(&request.caller, asked, DOUBT, pass);
                    // Of another one, what it would come too late counts.
                    missed.map(|missed| (left, left + missed.predicted.saturating_sub(missed.left)))
                }
                OnDeadline::FinishEarly => {
                    let first = shared.admission.predicted(&request.caller, asked, 1) + pass;
                    (first > left).then_some((left, first))
                }
            }
        };
        let refusal = |(left, predicted)| AdmitError::Deadline {
            left,
            predicted,
            then: deadline.then,
        };
        let Some(missed) = missed else { return Ok(()) };
        shared.costs.doubt(&request.model, length, Instant::now());
        Err(refusal(missed))
    }

    /// Enters a request under its id, for as long as the place lives.
    fn register(&self, request: Entry, number: u64) -> Result<(Arc<Origin>, Place), AdmitError> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let spent = Arc::new(Spent::default());
        let name = RequestName {
            caller: request.caller.clone(),
            id: request.id.clone(),
        };
        match self.shared.running.entry(name.clone()) {
            entry::Entry::Occupied(_) => return Err(AdmitError::Exists(request.id)),
            entry::Entry::Vacant(place) => place.insert(Running {
                number,
                cancelled: Arc::clone(&cancelled),
                spent: Arc::clone(&spent),
            }),
        };
        self.shared.loader.acquire(&request.model);
        let place = Place {
            name,
            number,
            model: request.model,
            spent: Arc::clone(&spent),
            shared: Arc::clone(&self.shared),
        };
        let origin = Origin {
            id: request.id,
            number,
            caller: request.caller,
            cancelled,
            publish: request.publish,
            deadline: request.deadline,
            priority: request.priority,
            admitted: Instant::now(),
            spent,
            shared: Arc::clone(&self.shared),
        };
        Ok((Arc::new(origin), place))
    }

    /// Ends a running request: canvases that wait at once, those in a pass after it; `false` when none of the caller
    /// has this id.
    pub fn cancel(&self, caller: &Caller, id: &str) -> bool {
        let name = RequestName {
            caller: caller.clone(),
            id: id.to_owned(),
        };
        let found = self.shared.running.get(&name).map(|running| {
            running.cancelled.store(true, Ordering::Release);
            running.number
        });
        if let Some(number) = found {
            end_all(self.shared.withdraw(number), &Failure::Cancelled);
        }
        found.is_some()
    }

    /// How much waits or runs now.
    pub fn load(&self) -> Load {
        let (queued, canvases) = self.shared.admission.load();
        let waits = |running: &Running| running.spent.evaluations() == 0;
        Load {
            queued,
            canvases,
            requests: self.shared.running.len(),
            waiting: self
                .shared
                .running
                .iter()
                .filter(|running| waits(running))
                .count(),
            saturation: queued.div_duration_f64(self.shared.options.max_queue),
        }
    }

    /// Counts of what has happened so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Makes all numbers of the engine and its models part of `registry`.
    pub fn register_metrics(&self, registry: &mut Registry) {
        self.shared.counters.register(registry);
        self.shared.loader.counters().register(registry);
    }

    /// Has a model loaded before a request asks for it.
    pub fn prepare(&self, model: &Arc<ServedModel>) {
        self.shared.loader.prepare(model);
    }

    /// Where a model is on its way to being served.
    pub fn state(&self, model: &Arc<ServedModel>) -> ModelState {
        self.shared.loader.state(model)
    }

    /// Whether a model cannot be loaded or run now.
    pub fn has_failed(&self, model: &Arc<ServedModel>) -> bool {
        matches!(self.state(model), ModelState::Failed { .. })
    }

    /// Whether a model has been served at some time, however it is now.
    pub fn was_ready(&self, model: &Arc<ServedModel>) -> bool {
        self.shared.loader.was_ready(model)
    }

    /// Has a model leave memory when the requests that use it have ended; who asks for it after that has it loaded
    /// again.
    pub fn set_aside(&self, model: &Arc<ServedModel>) {
        self.shared.loader.set_aside(model);
        self.shared.loader.tell();
    }

    /// Serves a model to nobody new: requests that run go on, and when the last of them has ended nothing of it stays
    /// in memory.
    pub fn retire(&self, model: &Arc<ServedModel>) {
        if self.shared.loader.retire(model) {
            self.shared.costs.forget(model);
        }
        self.shared.loader.tell();
    }

    /// Tells when the state of some model has changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.shared.loader.changes()
    }

    /// Stops admission; what runs goes on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// Whether admission has been stopped.
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Acquire)
    }

    /// Whether no canvas waits or runs.
    pub fn is_idle(&self) -> bool {
        self.shared.admission.is_idle()
    }

    /// Ends what still runs, joins the threads.
    ///
    /// Blocks for at most one pass of every worker, and for no longer than 5 seconds: passes that take longer than
    /// half of that are stopped, and a thread that is not back by then is left behind.
    pub fn shut_down(&self) {
        self.drain();
        end_all(self.shared.queue.close(), &Failure::ShutDown);
        self.shared.loader.close();
        end_all(self.shared.loader.withdraw(None), &Failure::ShutDown);
        self.shared.watchdog.close();
        let (end, mut stop_at) = (Instant::now() + LAST_PASS, Some(Instant::now() + LAST_PASS / 2));
        let threads = std::mem::take(&mut *self.shared.threads.lock());
        for thread in threads {
            while !thread.is_finished() && Instant::now() < end {
                if stop_at.take_if(|at| Instant::now() >= *at).is_some() {
                    self.shared.watchdog.stop_all();
                }
                sync::sleep(Duration::from_millis(1));
            }
            if !thread.is_finished() {
                tracing::error!(
                    thread = thread.thread().name(),
                    "a thread did not end in time and is left behind"
                );
            } else if thread.join().is_err() {
                tracing::error!("a thread of the engine panicked");
            }
        }
        // A worker can have parked what it took before the queue was closed.
        end_all(self.shared.loader.withdraw(None), &Failure::ShutDown);
    }

    /// Waits until nothing runs, at most `grace`.
    pub async fn idle_within(&self, grace: Duration) -> bool {
        let end = tokio::time::Instant::now() + grace;
        while !self.is_idle() {
            if tokio::time::Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        true
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shut_down();
    }
}

#[cfg(test)]
mod allowed_test;
#[cfg(test)]
mod deadlines_test;
#[cfg(test)]
mod draft_test;
#[cfg(test)]
mod failures_test;
#[cfg(all(test, feature = "shuttle"))]
mod interleavings_test;
#[cfg(test)]
mod models_test;
#[cfg(test)]
mod pinned_test;
#[cfg(test)]
mod samplers_test;
#[cfg(test)]
mod scoring_test;
#[cfg(test)]
mod tests;
