//! Puts networks into memory: every load has a thread of its own, and all of them share a budget of bytes.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::counters::LoadCounters;
use super::memory::{Remedy, remedy};
use super::sessions::Sessions;
use super::{ModelState, ServedModel};
use crate::network::NetworkError;
use crate::sync::{self, Condvar, Mutex, Thread};

/// Something that waits for a network.
pub trait Waiting: Send + 'static {
    /// The request that it belongs to.
    fn request(&self) -> u64;

    /// Ends it: the network it waits for cannot be had.
    fn fail(self, model: &ServedModel, reason: &str);
}

/// Takes back what waited for a network, when there is one.
pub type Put<W> = Arc<dyn Fn(Vec<W>) + Send + Sync>;

/// Has networks loaded; knows those of all models that are in use.
#[derive(Debug)]
pub struct Loader<W: Waiting> {
    own: Weak<Self>,
    /// Networks of one model that are wanted for each device.
    per_device: usize,
    /// Passes that run on each device.
    running: Arc<[AtomicUsize]>,
    /// By address of the model, which its sessions keep alive.
    models: Mutex<HashMap<usize, Arc<Sessions<W>>>>,
    /// Guards the wishes; the loader waits, whoever asks signals. At most one wish a model.
    wishes: Mutex<Wishes<W>>,
    asked: Condvar,
    /// Guards what is taken of the budget. Locked before `models`, never while one's networks are.
    memory: Mutex<Memory<W>>,
    counters: LoadCounters,
    /// Tells that some model is ready, or has failed.
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Wishes<W: Waiting> {
    due: VecDeque<(Instant, Arc<Sessions<W>>)>,
    closed: bool,
}

#[derive(Debug)]
struct Memory<W: Waiting> {
    /// Bytes of each device.
    budget: u64,
    taken: Vec<u64>,
    /// Models that wait for room, the first that asked first.
    waiting: VecDeque<Arc<Sessions<W>>>,
}

/// Whether a network finds room.
pub(super) enum Room<W: Waiting> {
    /// It has it.
    Taken(Charge<W>),
    /// Not now; it is asked for again when there is.
    Wait,
    /// Not now, and nobody makes room for it.
    None,
    /// Never.
    Never(NetworkError),
}

/// Memory that a network takes on a device; given back when dropped.
#[derive(Debug)]
pub(super) struct Charge<W: Waiting> {
    loader: Weak<Loader<W>>,
    pub(super) device: usize,
    bytes: u64,
    model: Arc<ServedModel>,
    /// What its model has on each device.
    placed: Arc<[Placed]>,
}

/// What a model has on a device.
#[derive(Debug, Default)]
pub(super) struct Placed {
    /// Networks.
    pub(super) networks: AtomicUsize,
    /// Bytes of networks that are gone, while others have their weights still.
    left_behind: AtomicU64,
}

impl<W: Waiting> Drop for Charge<W> {
    fn drop(&mut self) {
        let placed = &self.placed[self.device];
        let Some(loader) = self.loader.upgrade() else {
            placed.networks.fetch_sub(1, Ordering::AcqRel);
            return;
        };
        let mut memory = loader.memory.lock();
        let is_last = placed.networks.fetch_sub(1, Ordering::AcqRel) == 1;
        if is_last || !self.model.shares_weights() {
            let left_behind = placed.left_behind.swap(0, Ordering::AcqRel);
            memory.taken[self.device] -= self.bytes + left_behind;
            drop(memory);
            loader.look_again();
        } else {
            placed.left_behind.fetch_add(self.bytes, Ordering::AcqRel);
        }
    }
}

impl<W: Waiting> Loader<W> {
    /// Loads up to `per_device` networks of every model for each of `devices` devices, at most `budget` bytes on each.
    pub fn new(devices: usize, per_device: usize, budget: u64) -> Arc<Self> {
        let devices = devices.max(1);
        Arc::new_cyclic(|own| Self {
            own: Weak::clone(own),
            per_device: per_device.max(1),
            running: (0..devices).map(|_| AtomicUsize::new(0)).collect(),
            models: Mutex::default(),
            wishes: Mutex::new(Wishes {
                due: VecDeque::new(),
                closed: false,
            }),
            asked: Condvar::new(),
            memory: Mutex::new(Memory {
                budget,
                taken: vec![0; devices],
                waiting: VecDeque::new(),
            }),
            counters: LoadCounters::default(),
            changed: watch::Sender::new(()),
        })
    }

    /// The networks of a model.
    pub fn sessions(&self, model: &Arc<ServedModel>) -> Arc<Sessions<W>> {
        let mut models = self.models.lock();
        let sessions = models
            .entry(model.address())
            .or_insert_with(|| Arc::new(Sessions::new(model, self.devices())));
        Arc::clone(sessions)
    }

    fn find(&self, model: &ServedModel) -> Option<Arc<Sessions<W>>> {
        self.models.lock().get(&model.address()).cloned()
    }

    /// Where a model is on its way to being served.
    pub fn state(&self, model: &ServedModel) -> ModelState {
        self.find(model)
            .map_or(ModelState::Unloaded, |sessions| sessions.state())
    }

    /// Whether a model has been ready at some time.
    pub fn was_ready(&self, model: &ServedModel) -> bool {
        self.find(model).is_some_and(|sessions| sessions.was_ready())
    }

    /// Has a model loaded before a request asks for it.
    pub fn prepare(&self, model: &Arc<ServedModel>) {
        if !model.is_retired() {
            self.sessions(model).prepare(self);
        }
    }

    /// A request uses a model from now on, until it calls [`Self::release`].
    pub fn acquire(&self, model: &Arc<ServedModel>) {
        let mut models = self.models.lock();
        // Under the lock, so that a model that is being retired is not forgotten meanwhile.
        models
            .entry(model.address())
            .or_insert_with(|| Arc::new(Sessions::new(model, self.devices())))
            .join();
    }

    /// A request does not use a model any more. Whether nothing is left of it here.
    pub fn release(&self, model: &Arc<ServedModel>) -> bool {
        let Some(sessions) = self.find(model) else {
            return false;
        };
        let is_last = sessions.leave();
        if is_last {
            sessions.go_aside();
        }
        is_last && self.forget(&sessions)
    }

    /// Has the networks of a model leave memory as soon as no request uses it, as long as nobody asks for it again.
    pub fn set_aside(&self, model: &ServedModel) {
        if let Some(sessions) = self.find(model) {
            sessions.set_aside();
        }
    }

    /// Serves a model to nobody new: its networks leave memory as soon as no request uses it. Whether nothing is left
    /// of it here.
    pub fn retire(&self, model: &Arc<ServedModel>) -> bool {
        model.retire();
        self.find(model).is_none_or(|sessions| self.forget(&sessions))
    }

    /// Forgets a retired model that nobody uses. Whether it did.
    fn forget(&self, sessions: &Arc<Sessions<W>>) -> bool {
        let mut models = self.models.lock();
        if !sessions.model.is_retired() || sessions.is_used() {
            return false;
        }
        models.remove(&sessions.model.address());
        drop(models);
        self.memory
            .lock()
            .waiting
            .retain(|other| !Arc::ptr_eq(other, sessions));
        sessions.unload();
        tracing::info!(model = %sessions.model, "a model is retired");
        true
    }

    /// Tells when the state of some model has changed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Says that the state of some model may have changed.
    pub fn tell(&self) {
        self.changed.send_replace(());
    }

    /// Numbers of all loads.
    pub fn counters(&self) -> &LoadCounters {
        &self.counters
    }

    pub(super) fn devices(&self) -> usize {
        self.running.len()
    }

    /// Networks of one model that are wanted at once.
    pub(super) fn per_model(&self) -> usize {
        self.per_device * self.devices()
    }

    /// Passes that run on each device.
    pub(super) fn running(&self) -> &Arc<[AtomicUsize]> {
        &self.running
    }

    pub(super) fn ask(&self, sessions: &Arc<Sessions<W>>, after: Duration) {
        let mut wishes = self.wishes.lock();
        if wishes.closed {
            return;
        }
        wishes
            .due
            .push_back((Instant::now() + after, Arc::clone(sessions)));
        drop(wishes);
        self.asked.notify_one();
    }

    /// Room for one more network of a model, its first or another, on the device of `devices` that has the fewest of
    /// them.
    pub(super) fn room(
        &self,
        sessions: &Arc<Sessions<W>>,
        is_first: bool,
        devices: impl Iterator<Item = usize>,
    ) -> Room<W> {
        let bytes = sessions.model.bytes();
        let mut memory = self.memory.lock();
        if bytes > memory.budget {
            return Room::Never(NetworkError::Room {
                needed: bytes,
                budget: memory.budget,
            });
        }
        let placed = |device: usize| sessions.placed[device].networks.load(Ordering::Acquire);
        let needed = |device: usize| {
            let has_weights = sessions.model.shares_weights() && placed(device) > 0;
            if has_weights { 0 } else { bytes }
        };
        let fits = |device: &usize| needed(*device) <= memory.budget.saturating_sub(memory.taken[*device]);
        let device = devices
            .filter(fits)
            .min_by_key(|&device| (placed(device), memory.taken[device]));
        if let Some(device) = device {
            let bytes = needed(device);
            memory.taken[device] += bytes;
            sessions.placed[device].networks.fetch_add(1, Ordering::AcqRel);
            return Room::Taken(Charge {
                loader: Weak::clone(&self.own),
                device,
                bytes,
                model: Arc::clone(&sessions.model),
                placed: Arc::clone(&sessions.placed),
            });
        }
        if !is_first {
            return Room::None;
        }
        let others: Vec<_> = self.models.lock().values().cloned().collect();
        let stays = others
            .iter()
            .filter(|other| !Arc::ptr_eq(other, sessions))
            .filter_map(|other| Some((other, other.stay()?)));
        match remedy(stays, Instant::now()) {
            Remedy::Unload(victim) => {
                memory.waiting.push_back(Arc::clone(sessions));
                drop(memory);
                tracing::info!(model = %victim.model, for_model = %sessions.model, "a model is unloaded to make room");
                victim.unload();
            }
            Remedy::At(then) => {
                drop(memory);
                self.ask(sessions, then.saturating_duration_since(Instant::now()));
            }
            Remedy::Wait => memory.waiting.push_back(Arc::clone(sessions)),
        }
        Room::Wait
    }

    /// There may be room by now for those that wait for it.
    pub(super) fn look_again(&self) {
        let waiting = std::mem::take(&mut self.memory.lock().waiting);
        waiting
            .iter()
            .for_each(|sessions| self.ask(sessions, Duration::ZERO));
    }

    /// Loads what is asked for, until closed. Every load has a thread of its own, and every model at most one
    /// load, so that none waits for another that takes long or never ends.
    pub fn run(self: &Arc<Self>, put: &Put<W>) {
        let mut loads: Vec<Thread> = Vec::new();
        while let Some(sessions) = self.next() {
            loads.retain(|load| !load.is_finished());
            let (loader, loading, put) = (Arc::clone(self), Arc::clone(&sessions), Arc::clone(put));
            let load = move || loading.load(&loader, &put);
            match sync::spawn(format!("load-{}", sessions.model), load) {
                Ok(load) => loads.push(load),
                Err(error) => {
                    let error = NetworkError::Load(format!("there is no thread for it: {error}"));
                    sessions.fail(None, &error, self);
                }
            }
        }
        for load in loads {
            if load.join().is_err() {
                tracing::error!("a thread that loads models panicked");
            }
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.wishes.lock().closed
    }

    /// Waits for the next wish that is due.
    fn next(&self) -> Option<Arc<Sessions<W>>> {
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

    /// Takes out what waits for networks, of one request or of all.
    pub fn withdraw(&self, request: Option<u64>) -> Vec<W> {
        let models: Vec<_> = self.models.lock().values().cloned().collect();
        models
            .iter()
            .flat_map(|sessions| sessions.withdraw(request))
            .collect()
    }

    /// Lets the loader's thread end after what it is loading.
    pub fn close(&self) {
        let mut wishes = self.wishes.lock();
        wishes.closed = true;
        wishes.due.clear();
        drop(wishes);
        self.asked.notify_all();
    }
}
