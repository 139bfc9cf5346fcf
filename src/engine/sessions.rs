//! Sessions: the networks of a model that passes run on, loaded by threads of their own.
//!
//! A worker checks a session out for a pass and in again. Where there is none, because the model is still being
//! loaded or because sessions were lost, the work is parked with the model and goes back to the queue when there
//! is one: loading is never waited for by a worker, nor by work of other models.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::cost::address;
use super::work::Work;
use super::{Failure, ModelState, ServedModel, Shared};
use crate::network::{NetworkError, ScoreNetwork};

/// Pause after a failed load or pass, doubled with every further one in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE_OF_A_SESSION: Duration = Duration::from_secs(2);
const LONGEST_PAUSE_OF_A_MODEL: Duration = Duration::from_secs(60);

/// A network that one pass runs on.
pub(super) type Session = Box<dyn ScoreNetwork>;

/// The sessions of one model.
pub(super) struct Sessions {
    pub(super) model: Arc<ServedModel>,
    /// Guards what follows. Held for moves only, never while a session is loaded, run or dropped.
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    idle: Vec<Session>,
    /// Sessions that are idle or out for a pass.
    count: usize,
    /// Whether the loader has been asked for more.
    loading: bool,
    /// Why the model has failed, and when it is tried again.
    failed: Option<(String, Instant)>,
    /// Failed loads or passes in a row.
    failures: u32,
    /// Work that waits for a session.
    parked: Vec<Work>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl Sessions {
    fn new(model: &Arc<ServedModel>) -> Self {
        Self {
            model: Arc::clone(model),
            held: Mutex::new(Held::default()),
        }
    }

    /// Where the model is on its way to being served.
    pub(super) fn state(&self) -> ModelState {
        let held = self.held.lock();
        match &held.failed {
            Some((reason, retry_at)) => ModelState::Failed {
                reason: reason.clone(),
                retry_at: *retry_at,
            },
            None if held.count > 0 => ModelState::Ready,
            None if held.loading => ModelState::Loading,
            None => ModelState::Unloaded,
        }
    }

    /// Has the first session loaded before a request asks for it.
    pub(super) fn prepare(self: &Arc<Self>, loader: &Loader) {
        let mut held = self.held.lock();
        let ask = held.count == 0 && !std::mem::replace(&mut held.loading, true);
        drop(held);
        if ask {
            loader.ask(self, Duration::ZERO);
        }
    }

    /// A session for a pass of `batch`; without one the batch is parked, or ended where the model has failed.
    pub(super) fn check_out(
        self: &Arc<Self>,
        batch: Vec<Work>,
        loader: &Loader,
    ) -> Option<(Session, Vec<Work>)> {
        let mut held = self.held.lock();
        if let Some(session) = held.idle.pop() {
            return Some((session, batch));
        }
        if held.failed.is_some() {
            drop(held);
            self.end(batch);
            return None;
        }
        held.parked.extend(batch);
        // With a session out for a pass there will be one; without any there will be none unless it is loaded.
        let ask = held.count == 0 && !std::mem::replace(&mut held.loading, true);
        drop(held);
        if ask {
            loader.ask(self, Duration::ZERO);
        }
        None
    }

    /// Takes a session back from a pass that went well.
    pub(super) fn check_in(self: &Arc<Self>, session: Session, shared: &Shared) {
        let mut held = self.held.lock();
        held.idle.push(session);
        held.failures = 0;
        let healed = held.failed.take().is_some();
        let parked = std::mem::take(&mut held.parked);
        let ask = held.count < shared.options.workers && !std::mem::replace(&mut held.loading, true);
        drop(held);
        if healed {
            shared.loader.changed.send_replace(());
        }
        if ask {
            shared.loader.ask(self, Duration::ZERO);
        }
        shared.put(parked);
    }

    /// Gives up a session that a pass has failed on, and loads another in its place.
    pub(super) fn lost(self: &Arc<Self>, session: Session, loader: &Loader) {
        let mut held = self.held.lock();
        held.count = held.count.saturating_sub(1);
        let pause = held.pause(LONGEST_PAUSE_OF_A_SESSION);
        let ask = !std::mem::replace(&mut held.loading, true);
        drop(held);
        if ask {
            loader.ask(self, pause);
        }
        // Last: it is foreign code, and may panic.
        drop(session);
    }

    /// A session will not come back from its pass: another is loaded in its place.
    pub(super) fn lost_for_good(self: &Arc<Self>, loader: &Loader) {
        let mut held = self.held.lock();
        held.count = held.count.saturating_sub(1);
        let ask = !std::mem::replace(&mut held.loading, true);
        drop(held);
        if ask {
            loader.ask(self, Duration::ZERO);
        }
    }

    /// Gives up on the model: all its sessions, with the one it has failed on, and whatever waits for it. It is
    /// tried again after a while.
    pub(super) fn fail(self: &Arc<Self>, session: Option<Session>, error: &NetworkError, loader: &Loader) {
        let mut held = self.held.lock();
        let mut sessions = std::mem::take(&mut held.idle);
        sessions.extend(session);
        // Sessions that are out come back one by one, and are used again if the model is.
        held.count = held.count.saturating_sub(sessions.len());
        let pause = held.pause(LONGEST_PAUSE_OF_A_MODEL);
        held.failed = Some((told(error), Instant::now() + pause));
        let parked = std::mem::take(&mut held.parked);
        let ask = !std::mem::replace(&mut held.loading, true);
        drop(held);
        tracing::error!(model = %self.model, %error, retry_in_ms = pause.as_millis() as u64, "a model has failed; what waits for it is ended");
        self.end(parked);
        loader.changed.send_replace(());
        if ask {
            loader.ask(self, pause);
        }
        drop(sessions);
    }

    /// Ends `work`: it cannot be evaluated.
    pub(super) fn end(&self, work: Vec<Work>) {
        let reason = match self.state() {
            ModelState::Failed { reason, .. } => reason,
            ModelState::Unloaded | ModelState::Loading | ModelState::Ready => String::new(),
        };
        for work in work {
            work.end(Failure::Model {
                model: self.model.to_string(),
                reason: reason.clone(),
            });
        }
    }

    /// Takes out what waits for a session, of one request or of all.
    fn withdraw(&self, request: Option<u64>) -> Vec<Work> {
        let mut held = self.held.lock();
        let (taken, left) = std::mem::take(&mut held.parked)
            .into_iter()
            .partition(|work| request.is_none_or(|request| work.origin.number == request));
        held.parked = left;
        taken
    }

    /// Loads sessions until there are enough, or one cannot be loaded.
    fn load(self: &Arc<Self>, shared: &Shared) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.load_one(shared))) {
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => {
                    tracing::error!(model = %self.model, "giving up sessions panicked");
                    return;
                }
            }
        }
    }

    /// Loads one session. Whether more are wanted.
    fn load_one(self: &Arc<Self>, shared: &Shared) -> bool {
        let loaded = catch_unwind(AssertUnwindSafe(|| self.model.network()))
            .unwrap_or_else(|_| Err(NetworkError::Load("loading it panicked".to_owned())));
        match loaded {
            Ok(session) => {
                let goes_on = !shared.loader.is_closed();
                let mut held = self.held.lock();
                held.idle.push(session);
                held.count += 1;
                held.failed = None;
                let more = held.count < shared.options.workers && goes_on;
                held.loading = more;
                let parked = std::mem::take(&mut held.parked);
                drop(held);
                shared.loader.changed.send_replace(());
                shared.put(parked);
                more
            }
            Err(error) => {
                self.held.lock().loading = false;
                self.fail(None, &error, &shared.loader);
                false
            }
        }
    }
}

/// Longest reason that callers are told, in characters.
const MAX_REASON: usize = 300;

/// The reason as callers are told it. What the runtime and the system say stays in the log: it can hold paths.
fn told(error: &NetworkError) -> String {
    let reason = match error {
        NetworkError::Contract(_) => error.to_string(),
        NetworkError::Runtime(_) | NetworkError::Load(_) | NetworkError::Run(_) | NetworkError::Memory(_) => {
            "its network cannot be loaded; the server's log has the details".to_owned()
        }
    };
    let line: Vec<&str> = reason.split_whitespace().collect();
    line.join(" ").chars().take(MAX_REASON).collect()
}

impl Held {
    fn pause(&mut self, longest: Duration) -> Duration {
        self.failures = (self.failures + 1).min(16);
        (FIRST_PAUSE * (1 << (self.failures - 1))).min(longest)
    }
}

/// Has sessions loaded; knows those of all models.
#[derive(Debug)]
pub(super) struct Loader {
    /// By address of the model, which the sessions keep alive.
    models: Mutex<HashMap<usize, Arc<Sessions>>>,
    /// Guards the wishes; the loader waits, whoever asks signals. At most one wish a model.
    wishes: Mutex<Wishes>,
    asked: Condvar,
    /// Tells that some model is ready, or has failed.
    pub(super) changed: watch::Sender<()>,
}

impl Default for Loader {
    fn default() -> Self {
        Self {
            models: Mutex::default(),
            wishes: Mutex::default(),
            asked: Condvar::new(),
            changed: watch::Sender::new(()),
        }
    }
}

#[derive(Debug, Default)]
struct Wishes {
    due: VecDeque<(Instant, Arc<Sessions>)>,
    closed: bool,
}

impl Loader {
    /// The sessions of a model.
    pub(super) fn sessions(&self, model: &Arc<ServedModel>) -> Arc<Sessions> {
        let mut models = self.models.lock();
        let sessions = models
            .entry(address(model))
            .or_insert_with(|| Arc::new(Sessions::new(model)));
        Arc::clone(sessions)
    }

    fn ask(&self, sessions: &Arc<Sessions>, after: Duration) {
        let mut wishes = self.wishes.lock();
        wishes
            .due
            .push_back((Instant::now() + after, Arc::clone(sessions)));
        drop(wishes);
        self.asked.notify_one();
    }

    /// Loads what is asked for, until closed. Every load has a thread of its own, and every model at most one
    /// load, so that none waits for another that takes long or never ends.
    pub(super) fn run(&self, shared: &Shared) {
        std::thread::scope(|scope| {
            while let Some(sessions) = self.next() {
                let thread = std::thread::Builder::new().name(format!("load-{}", sessions.model));
                let loading = Arc::clone(&sessions);
                if let Err(error) = thread.spawn_scoped(scope, move || loading.load(shared)) {
                    let error = NetworkError::Load(format!("there is no thread for it: {error}"));
                    sessions.fail(None, &error, self);
                }
            }
        });
    }

    fn is_closed(&self) -> bool {
        self.wishes.lock().closed
    }

    /// Waits for the next wish that is due.
    fn next(&self) -> Option<Arc<Sessions>> {
        let mut wishes = self.wishes.lock();
        loop {
            if wishes.closed {
                return None;
            }
            let now = Instant::now();
            let first = wishes.due.iter().enumerate().min_by_key(|(_, (due, _))| *due);
            match first.map(|(index, (due, _))| (index, *due)) {
                Some((index, due)) if due <= now => {
                    return wishes.due.remove(index).map(|(_, sessions)| sessions);
                }
                Some((_, due)) => {
                    self.asked.wait_until(&mut wishes, due);
                }
                None => self.asked.wait(&mut wishes),
            }
        }
    }

    /// Takes out what waits for sessions, of one request or of all.
    pub(super) fn withdraw(&self, request: Option<u64>) -> Vec<Work> {
        let models: Vec<_> = self.models.lock().values().cloned().collect();
        models
            .iter()
            .flat_map(|sessions| sessions.withdraw(request))
            .collect()
    }

    /// Lets the loader's thread end after what it is loading.
    pub(super) fn close(&self) {
        let mut wishes = self.wishes.lock();
        wishes.closed = true;
        wishes.due.clear();
        drop(wishes);
        self.asked.notify_all();
    }
}
