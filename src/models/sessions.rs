//! Sessions: the networks of a model that passes run on, loaded by threads of their own.
//!
//! A worker checks a session out for a pass and in again. Where there is none, because the model is still being
//! loaded or because sessions were lost, the work is parked with the model and goes back to the queue when there
//! is one: loading is never waited for by a worker, nor by work of other models.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::loader::{Charge, Loader, Placed, Put, Room, Waiting};
use super::memory::Stay;
use super::{ModelState, ServedModel};
use crate::network::{NetworkError, ScoreNetwork};
use crate::sync::Mutex;

/// Pause after a failed load or pass, doubled with every further one in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE_OF_A_SESSION: Duration = Duration::from_secs(2);
const LONGEST_PAUSE_OF_A_MODEL: Duration = Duration::from_secs(60);

/// A network that one pass runs on, and the memory that it takes.
pub struct Session<W: Waiting> {
    network: Box<dyn ScoreNetwork>,
    // After the network: its memory is free when it is gone.
    charge: Charge<W>,
    /// While it is out for a pass.
    busy: Option<Busy>,
}

/// A pass that runs on a device, until this is dropped.
struct Busy {
    running: Arc<[AtomicUsize]>,
    device: usize,
}

impl Busy {
    fn new(running: &Arc<[AtomicUsize]>, device: usize) -> Self {
        running[device].fetch_add(1, Ordering::AcqRel);
        Self {
            running: Arc::clone(running),
            device,
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.running[self.device].fetch_sub(1, Ordering::AcqRel);
    }
}

impl<W: Waiting> Session<W> {
    /// The network.
    pub fn network(&mut self) -> &mut dyn ScoreNetwork {
        self.network.as_mut()
    }

    /// The number of its device.
    pub fn device(&self) -> usize {
        self.charge.device
    }
}

impl<W: Waiting> std::fmt::Debug for Session<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

/// The sessions of one model.
pub struct Sessions<W: Waiting> {
    pub(super) model: Arc<ServedModel>,
    /// How many there are on each device.
    pub(super) placed: Arc<[Placed]>,
    /// Guards what follows. Held for moves only, never while a session is loaded, run or dropped.
    held: Mutex<Held<W>>,
}

struct Held<W: Waiting> {
    idle: Vec<Session<W>>,
    /// Sessions that are idle or out for a pass.
    count: usize,
    /// Sessions out for a pass that are given up when they come back, to make room.
    leaving: usize,
    /// Whether the loader has been asked for more.
    loading: bool,
    /// Since when there are sessions, and when one was last asked for.
    since: Instant,
    used: Instant,
    /// Whether there has been a session at some time.
    was_ready: bool,
    /// Requests that use the model.
    users: usize,
    /// Whether the sessions are given up when no request uses them any more.
    aside: bool,
    /// Why the model has failed, and when it is tried again.
    failed: Option<(String, Instant)>,
    /// Failed loads or passes in a row.
    failures: u32,
    /// Until when nothing is loaded on a device, since that has failed.
    barred: Vec<Option<Instant>>,
    /// Work that waits for a session.
    parked: Vec<W>,
}

impl<W: Waiting> std::fmt::Debug for Sessions<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl<W: Waiting> Sessions<W> {
    pub(super) fn new(model: &Arc<ServedModel>, devices: usize) -> Self {
        let now = Instant::now();
        Self {
            model: Arc::clone(model),
            placed: (0..devices).map(|_| Placed::default()).collect(),
            held: Mutex::new(Held {
                idle: Vec::new(),
                count: 0,
                leaving: 0,
                loading: false,
                since: now,
                used: now,
                was_ready: false,
                users: 0,
                aside: false,
                failed: None,
                failures: 0,
                barred: vec![None; devices],
                parked: Vec::new(),
            }),
        }
    }

    pub(super) fn join(&self) {
        self.held.lock().users += 1;
    }

    /// Whether nobody uses the model any more.
    pub(super) fn leave(&self) -> bool {
        let mut held = self.held.lock();
        held.users = held.users.saturating_sub(1);
        held.users == 0
    }

    /// Has the sessions given up as soon as no request uses the model; who asks for it after that has it loaded again.
    pub(super) fn set_aside(&self) {
        self.held.lock().aside = true;
        self.go_aside();
    }

    /// Gives up the sessions if that is due.
    pub(super) fn go_aside(&self) {
        let mut held = self.held.lock();
        let is_due = held.aside && held.users == 0;
        held.aside &= !is_due;
        drop(held);
        if is_due {
            self.unload();
            tracing::info!(model = %self.model, "a model makes way for a newer version");
        }
    }

    pub(super) fn is_used(&self) -> bool {
        self.held.lock().users > 0
    }

    pub(super) fn was_ready(&self) -> bool {
        self.held.lock().was_ready
    }

    /// Returns how the sessions in memory stand when room is made; `None` where there are none.
    pub(super) fn stay(&self) -> Option<Stay> {
        let held = self.held.lock();
        (held.count > 0).then_some(Stay {
            since: held.since,
            used: held.used,
            leaving: held.leaving > 0,
        })
    }

    /// Gives up all sessions; those that are out for a pass when they come back.
    pub(super) fn unload(&self) {
        let mut held = self.held.lock();
        let idle = std::mem::take(&mut held.idle);
        held.count -= idle.len();
        held.leaving = held.count;
        drop(held);
        // Foreign code: whoever makes room must not fall with it.
        if catch_unwind(AssertUnwindSafe(|| drop(idle))).is_err() {
            tracing::error!(model = %self.model, "giving up sessions panicked");
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
            None if held.count > held.leaving => ModelState::Ready,
            None if held.loading => ModelState::Loading,
            None => ModelState::Unloaded,
        }
    }

    /// Has the first session loaded before a request asks for it.
    pub(super) fn prepare(self: &Arc<Self>, loader: &Loader<W>) {
        let mut held = self.held.lock();
        let ask = held.count == 0 && !std::mem::replace(&mut held.loading, true);
        drop(held);
        if ask {
            loader.ask(self, Duration::ZERO);
        }
    }

    /// A session for a pass of `batch`; without one the batch is parked, or ended where the model has failed.
    pub fn check_out(self: &Arc<Self>, batch: Vec<W>, loader: &Loader<W>) -> Option<(Session<W>, Vec<W>)> {
        let mut held = self.held.lock();
        held.used = Instant::now();
        // Of the device with the least to do.
        let running = |session: &Session<W>| loader.running()[session.device()].load(Ordering::Acquire);
        let least = held
            .idle
            .iter()
            .enumerate()
            .min_by_key(|(_, session)| running(session));
        if let Some(index) = least.map(|(index, _)| index) {
            let mut session = held.idle.swap_remove(index);
            session.busy = Some(Busy::new(loader.running(), session.device()));
            return Some((session, batch));
        }
        if held.failed.is_some() {
            drop(held);
            self.end(batch);
            return None;
        }
        held.parked.extend(batch);
        // With a session out for a pass there will be one; without any there will be none unless it is loaded.
        let ask = held.count == held.leaving && !std::mem::replace(&mut held.loading, true);
        drop(held);
        if ask {
            loader.ask(self, Duration::ZERO);
        }
        None
    }

    /// Takes a session back from a pass that went well.
    pub fn check_in(self: &Arc<Self>, mut session: Session<W>, loader: &Loader<W>, put: &Put<W>) {
        session.busy = None;
        let mut held = self.held.lock();
        held.failures = 0;
        let healed = held.failed.take().is_some();
        if held.leaving > 0 {
            held.leaving -= 1;
            held.count -= 1;
            // What is parked waits for a session that is loaded again.
            let ask =
                held.count == 0 && !held.parked.is_empty() && !std::mem::replace(&mut held.loading, true);
            drop(held);
            drop(session);
            if ask {
                loader.ask(self, Duration::ZERO);
            }
            return;
        }
        held.idle.push(session);
        let parked = std::mem::take(&mut held.parked);
        let ask = held.count < loader.per_model() && !std::mem::replace(&mut held.loading, true);
        drop(held);
        if healed {
            loader.tell();
        }
        if ask {
            loader.ask(self, Duration::ZERO);
        }
        put(parked);
    }

    /// Gives up a session that a pass has failed on, and loads another in its place.
    pub fn lost(self: &Arc<Self>, session: Session<W>, loader: &Loader<W>) {
        let mut held = self.held.lock();
        held.lose(1);
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
    pub fn lost_for_good(self: &Arc<Self>, loader: &Loader<W>) {
        let mut held = self.held.lock();
        held.lose(1);
        let ask = !std::mem::replace(&mut held.loading, true);
        drop(held);
        if ask {
            loader.ask(self, Duration::ZERO);
        }
        // Its memory may never be free: whoever waits for it has to look for other room.
        loader.look_again();
    }

    /// Gives up on the model: all its sessions, with the one it has failed on, and whatever waits for it. It is
    /// tried again after a while.
    pub fn fail(self: &Arc<Self>, session: Option<Session<W>>, error: &NetworkError, loader: &Loader<W>) {
        let mut held = self.held.lock();
        let mut sessions = std::mem::take(&mut held.idle);
        sessions.extend(session);
        // Sessions that are out come back one by one, and are used again if the model is.
        held.lose(sessions.len());
        let pause = held.pause(LONGEST_PAUSE_OF_A_MODEL);
        held.failed = Some((told(error), Instant::now() + pause));
        let parked = std::mem::take(&mut held.parked);
        let ask = !std::mem::replace(&mut held.loading, true);
        drop(held);
        tracing::error!(model = %self.model, %error, retry_in_ms = pause.as_millis() as u64, "a model has failed; what waits for it is ended");
        self.end(parked);
        loader.tell();
        if ask {
            loader.ask(self, pause);
        }
        drop(sessions);
    }

    /// Ends what cannot be evaluated.
    pub fn end(&self, work: Vec<W>) {
        let reason = match self.state() {
            ModelState::Failed { reason, .. } => reason,
            ModelState::Unloaded | ModelState::Loading | ModelState::Ready => String::new(),
        };
        for work in work {
            work.fail(&self.model, &reason);
        }
    }

    /// Takes out what waits for a session, of one request or of all.
    pub(super) fn withdraw(&self, request: Option<u64>) -> Vec<W> {
        let mut held = self.held.lock();
        let (taken, left) = std::mem::take(&mut held.parked)
            .into_iter()
            .partition(|work| request.is_none_or(|request| work.request() == request));
        held.parked = left;
        taken
    }

    /// Loads sessions until there are enough, or one cannot be loaded.
    pub(super) fn load(self: &Arc<Self>, loader: &Loader<W>, put: &Put<W>) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.load_one(loader, put))) {
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
    fn load_one(self: &Arc<Self>, loader: &Loader<W>, put: &Put<W>) -> bool {
        let mut held = self.held.lock();
        if self.model.is_retired() && held.users == 0 {
            held.loading = false;
            return false;
        }
        let is_first = held.count == held.leaving;
        let now = Instant::now();
        let free: Vec<usize> = (0..loader.devices())
            .filter(|&device| held.barred[device].is_none_or(|until| until <= now))
            .collect();
        drop(held);
        let charge = match loader.room(self, is_first, free.iter().copied()) {
            Room::Taken(charge) => charge,
            Room::Wait => return false,
            Room::None => {
                self.held.lock().loading = false;
                return false;
            }
            Room::Never(error) => {
                self.held.lock().loading = false;
                self.fail(None, &error, loader);
                return false;
            }
        };
        let began = Instant::now();
        let loaded = catch_unwind(AssertUnwindSafe(|| self.model.network(charge.device)))
            .unwrap_or_else(|_| Err(NetworkError::Load("loading it panicked".to_owned())));
        loader.counters().count(began.elapsed(), loaded.is_ok());
        match loaded {
            Ok(network) => {
                let session = Session {
                    network,
                    charge,
                    busy: None,
                };
                let goes_on = !loader.is_closed();
                let mut held = self.held.lock();
                if self.model.is_retired() && held.users == 0 {
                    held.loading = false;
                    drop(held);
                    drop(session);
                    return false;
                }
                if held.count == held.leaving {
                    held.since = Instant::now();
                }
                held.idle.push(session);
                held.count += 1;
                held.was_ready = true;
                held.failed = None;
                let more = held.count < loader.per_model() && goes_on;
                held.loading = more;
                let parked = std::mem::take(&mut held.parked);
                drop(held);
                loader.tell();
                put(parked);
                // Others may wait until this one has been there for long enough.
                loader.look_again();
                more
            }
            Err(error) => {
                let device = charge.device;
                drop(charge);
                let mut held = self.held.lock();
                // Another device may do.
                let others = free.len() > 1;
                if others || held.count > held.leaving {
                    let pause = held.pause(LONGEST_PAUSE_OF_A_MODEL);
                    held.barred[device] = Some(Instant::now() + pause);
                    held.loading = others;
                    drop(held);
                    tracing::error!(model = %self.model, device, %error, retry_in_ms = pause.as_millis() as u64, "a model cannot be loaded on a device");
                    return others;
                }
                held.barred.fill(None);
                held.loading = false;
                drop(held);
                self.fail(None, &error, loader);
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
        NetworkError::Contract(_) | NetworkError::Room { .. } => error.to_string(),
        NetworkError::Runtime(_) | NetworkError::Load(_) | NetworkError::Run(_) | NetworkError::Memory(_) => {
            "its network cannot be loaded; the server's log has the details".to_owned()
        }
    };
    let line: Vec<&str> = reason.split_whitespace().collect();
    line.join(" ").chars().take(MAX_REASON).collect()
}

impl<W: Waiting> Held<W> {
    /// Sessions are gone, first of all those that were to leave anyway.
    fn lose(&mut self, sessions: usize) {
        self.count = self.count.saturating_sub(sessions);
        self.leaving = self.leaving.saturating_sub(sessions);
    }

    fn pause(&mut self, longest: Duration) -> Duration {
        self.failures = (self.failures + 1).min(16);
        (FIRST_PAUSE * (1 << (self.failures - 1))).min(longest)
    }
}
