//! The watchdog: ends passes that take too long.
//!
//! At its limit a pass is asked to stop; ONNX Runtime does between two operators. A pass that goes on for all that is
//! given up with its thread: those who follow its canvases are told, their room is free again, and another worker
//! takes the thread's place. Whenever the thread comes back it finds itself dismissed, and ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::work::{Ticket, Work};
use super::{Failure, Shared, spawn_worker};
use crate::models::ServedModel;
use crate::network::{ScoreNetwork, Stop};
use crate::sync::{Condvar, Mutex, MutexGuard};

/// Watches over the passes that run.
#[derive(Debug)]
pub(super) struct Watchdog {
    limit: Duration,
    last_chance: Duration,
    /// Guards the passes. Held for moves only.
    watched: Mutex<Watched>,
    /// The watchdog waits, whoever adds a pass or closes signals.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Watched {
    passes: BTreeMap<u64, Running>,
    started: u64,
    /// When the watchdog looks again by itself, if it does.
    looks_at: Option<Instant>,
    closed: bool,
}

struct Running {
    due: Instant,
    asked_to_stop: bool,
    stop: Option<Arc<dyn Stop>>,
    model: Arc<ServedModel>,
    tickets: Vec<Arc<Ticket>>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("due", &self.due)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

/// A pass that is watched over until this is dropped.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    watchdog: &'a Watchdog,
    pass: u64,
}

impl Watch<'_> {
    /// Ends the watch; `false` where the pass was given up before, and its thread with it.
    pub(super) fn end(self) -> bool {
        self.watchdog.watched.lock().passes.remove(&self.pass).is_some()
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.watchdog.watched.lock().passes.remove(&self.pass);
    }
}

impl Watchdog {
    pub(super) fn new(limit: Duration, last_chance: Duration) -> Self {
        Self {
            limit,
            last_chance,
            watched: Mutex::new(Watched::default()),
            changed: Condvar::new(),
        }
    }

    /// Watches over a pass of `batch` on `network` that begins now.
    pub(super) fn watch(
        &self,
        network: &dyn ScoreNetwork,
        model: &Arc<ServedModel>,
        batch: &[Work],
    ) -> Watch<'_> {
        let running = Running {
            due: Instant::now() + self.limit,
            asked_to_stop: false,
            stop: network.stop_handle(),
            model: Arc::clone(model),
            tickets: batch.iter().map(|work| Arc::clone(work.ticket())).collect(),
        };
        let mut watched = self.watched.lock();
        watched.started += 1;
        let pass = watched.started;
        // It looks in time for a pass before this one, which has ended perhaps: no need to wake it for each.
        let is_in_time = watched.looks_at.is_some_and(|looks_at| looks_at <= running.due);
        watched.passes.insert(pass, running);
        drop(watched);
        if !is_in_time {
            self.changed.notify_one();
        }
        Watch { watchdog: self, pass }
    }

    /// Asks every pass to stop.
    pub(super) fn stop_all(&self) {
        let watched = self.watched.lock();
        let stops: Vec<_> = watched
            .passes
            .values()
            .filter_map(|pass| pass.stop.clone())
            .collect();
        drop(watched);
        for stop in stops {
            stop.stop();
        }
    }

    /// Lets the watchdog's thread end.
    pub(super) fn close(&self) {
        self.watched.lock().closed = true;
        self.changed.notify_all();
    }

    /// Watches until closed.
    pub(super) fn run(&self, shared: &Arc<Shared>) {
        let mut watched = self.watched.lock();
        while !watched.closed {
            let first = watched.passes.iter().min_by_key(|(_, pass)| pass.due);
            let first = first.map(|(&number, pass)| (number, pass.due));
            watched.looks_at = first.map(|(_, due)| due);
            match first {
                None => self.changed.wait(&mut watched),
                Some((_, due)) if due > Instant::now() => {
                    self.changed.wait_until(&mut watched, due);
                }
                Some((number, _)) => {
                    let overdue = self.overdue(&mut watched, number);
                    // Foreign code, logging and ending work have no place under the lock.
                    MutexGuard::unlocked(&mut watched, || match overdue {
                        Some(Overdue::Stop(stop, model)) => ask_to_stop(stop.as_deref(), &model, self.limit),
                        Some(Overdue::GiveUp(pass)) => give_up(&pass, shared),
                        None => {}
                    });
                }
            }
        }
    }

    fn overdue(&self, watched: &mut Watched, number: u64) -> Option<Overdue> {
        let pass = watched.passes.get_mut(&number)?;
        if pass.asked_to_stop {
            return watched.passes.remove(&number).map(Overdue::GiveUp);
        }
        pass.asked_to_stop = true;
        pass.due = Instant::now() + self.last_chance;
        Some(Overdue::Stop(pass.stop.clone(), Arc::clone(&pass.model)))
    }
}

enum Overdue {
    Stop(Option<Arc<dyn Stop>>, Arc<ServedModel>),
    GiveUp(Running),
}

fn ask_to_stop(stop: Option<&dyn Stop>, model: &ServedModel, limit: Duration) {
    tracing::error!(%model, limit_ms = limit.as_millis() as u64, "a pass takes too long (engine.max_pass_seconds) and is stopped");
    if let Some(stop) = stop {
        stop.stop();
    }
}

fn give_up(pass: &Running, shared: &Arc<Shared>) {
    shared.counters.count_hung_pass();
    tracing::error!(model = %pass.model, canvases = pass.tickets.len(), "a pass does not stop; its thread is given up and replaced");
    for ticket in &pass.tickets {
        let request = ticket.request().to_owned();
        ticket.end(Failure::Worker { request });
    }
    shared.loader.sessions(&pass.model).lost_for_good(&shared.loader);
    if let Err(error) = spawn_worker(shared) {
        tracing::error!(%error, "there is no thread to replace it");
    }
}
