//! The engine: stateless workers, canvases as work items.
//!
//! ```text
//! admit -> ready queue -> worker: take -> run -> apply -> publish -> put back
//! ```
//!
//! A request becomes one or more [`canvas::Canvas`]es. A worker takes the oldest ready ones that share
//! a model and a length, evaluates its network once for all of them and puts them back, so requests with
//! other step counts, samplers or temperatures share forward passes, and new ones join at the next step.
//! Progress is published through one watch channel a canvas, which keeps the newest state only: a slow
//! reader slows nobody.
//!
//! The engine knows tokens, not text, and nothing of gRPC. Only worker threads touch a network.

mod admission;
pub mod canvas;
pub mod course;
mod drawing;
mod models;
mod progress;
mod queue;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::diffusion::Token;
use admission::Admission;
pub use admission::Full;
use canvas::Canvas;
use course::{Course, Plan};
pub use models::{Models, NetworkSource, ServedModel};
pub use progress::{Failure, Outcome, Phase, State, Timings};
use queue::{Queue, Work};

/// How the engine is laid out.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Worker threads, each with networks of its own; at least 1.
    pub workers: usize,
    /// Threads that share the drawing of tokens, where there is much to draw; at least 1.
    pub threads: usize,
    /// Tokens of one forward pass: canvases times length. One canvas always fits.
    pub batch_tokens: usize,
    /// Evaluations (canvases times remaining steps) that may wait.
    pub max_queued_rows: u64,
    /// Requests that may run.
    pub max_running_requests: usize,
}

/// What to denoise.
#[derive(Clone, Debug)]
pub struct Request {
    /// Names the request among the running ones.
    pub id: String,
    /// The model.
    pub model: Arc<ServedModel>,
    /// The canvas: tokens where clamped, `None` where to fill.
    pub template: Arc<[Option<Token>]>,
    /// How to denoise.
    pub plan: Plan,
    /// Seed of all random choices.
    pub seed: u64,
    /// Independent canvases; at least 1.
    pub canvases: u32,
    /// Whether intermediate states are wanted, or the end alone.
    pub publish: Publish,
}

/// Which states a canvas publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publish {
    /// Every step, for whoever looks in time.
    Steps,
    /// The end alone.
    End,
}

/// Why a request is not admitted.
#[derive(Debug, thiserror::Error)]
pub enum AdmitError {
    /// Too much work waits.
    #[error(transparent)]
    Full(#[from] Full),
    /// A running request has this id.
    #[error("a request with id {0:?} is running")]
    Exists(String),
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    Draining,
}

/// A request that runs. Dropping it ends its canvases at their next step.
#[derive(Debug)]
pub struct Generation {
    /// The state in which every canvas began, however far it has come since.
    pub initial: Vec<State>,
    /// The newest state of every canvas.
    pub canvases: Vec<watch::Receiver<State>>,
    _running: Running,
}

/// Keeps a request's id taken while it runs.
#[derive(Debug)]
struct Running {
    id: String,
    shared: Arc<Shared>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.running.remove(&self.id);
    }
}

/// What workers, admission and callers share.
#[derive(Debug)]
struct Shared {
    options: EngineOptions,
    queue: Queue,
    admission: Arc<Admission>,
    /// Cancel flags of running requests, by id.
    running: DashMap<String, Arc<AtomicBool>>,
    draining: AtomicBool,
}

/// A pool of workers and the queue before them.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    /// Taken by whoever shuts down first.
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(options: EngineOptions) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            options,
            queue: Queue::new(),
            admission: Arc::new(Admission::new(options.max_queued_rows, options.workers)),
            running: DashMap::new(),
            draining: AtomicBool::new(false),
        });
        let workers = (0..options.workers.max(1))
            .map(|index| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("denoise-{index}"))
                    .spawn(move || worker::run(&shared, index))
            })
            .collect::<std::io::Result<Vec<_>>>()?;
        Ok(Self {
            shared,
            workers: Mutex::new(workers),
        })
    }

    /// Queues a request's canvases.
    pub fn admit(&self, request: Request) -> Result<Generation, AdmitError> {
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(AdmitError::Draining);
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        if self.shared.running.len() >= self.shared.options.max_running_requests {
            return Err(self.shared.admission.full().into());
        }
        match self.shared.running.entry(request.id.clone()) {
            Entry::Occupied(_) => return Err(AdmitError::Exists(request.id)),
            Entry::Vacant(place) => place.insert(Arc::clone(&cancelled)),
        };
        let running = Running {
            id: request.id.clone(),
            shared: Arc::clone(&self.shared),
        };
        let course = Arc::new(Course::new(&request.model, request.plan));
        let canvases: Vec<Canvas> = (0..u64::from(request.canvases))
            .map(|index| Canvas::new(&course, &request.template, request.seed, index))
            .collect();
        let evaluations: Vec<u64> = canvases.iter().map(Canvas::evaluations_left).collect();
        let permits = self.shared.admission.admit(&evaluations)?;
        let now = Instant::now();
        let (canvases, work): (Vec<_>, Vec<Work>) = canvases
            .into_iter()
            .zip(permits)
            .map(|(canvas, permit)| {
                let (progress, receiver) = watch::channel(State::running(&canvas));
                let work = Work {
                    canvas,
                    request: request.id.clone(),
                    progress,
                    publish: request.publish,
                    cancelled: Arc::clone(&cancelled),
                    permit,
                    admitted: now,
                    ready: now,
                    timings: Timings::default(),
                    attempts: 0,
                };
                (receiver, work)
            })
            .unzip();
        let initial = work.iter().map(|work| work.progress.borrow().clone()).collect();
        self.shared.queue.put(work);
        Ok(Generation {
            initial,
            canvases,
            _running: running,
        })
    }

    /// Ends a running request at its next step; `false` when none has this id.
    pub fn cancel(&self, id: &str) -> bool {
        self.shared
            .running
            .get(id)
            .map(|flag| flag.store(true, Ordering::Release))
            .is_some()
    }

    /// Stops admission; what runs goes on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// Whether no canvas waits or runs.
    pub fn is_idle(&self) -> bool {
        self.shared.admission.queued() == 0
    }

    /// Ends what still runs, joins the workers.
    ///
    /// Blocks for at most one step of every worker.
    pub fn shut_down(&self) {
        self.drain();
        self.shared.queue.close();
        for worker in self.workers.lock().drain(..) {
            if worker.join().is_err() {
                tracing::error!("a worker panicked outside of a step");
            }
        }
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
mod samplers_test;
#[cfg(test)]
mod tests;
