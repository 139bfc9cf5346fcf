//! The models while the server runs: the repository is looked at from time to time, and when somebody orders so.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::notified::{self, Notified};
use super::repository::{ControlError, Repository};
use super::{LAST_CHOICE, Service};
use crate::models::{Models, ServedModel};

/// Orders that wait at most; who gives another one waits.
const MAX_ORDERS: usize = 8;

/// A tenth more or less than `poll`: servers that were started together should not ask a store together for ever.
fn jittered(poll: Duration) -> Duration {
    let random = getrandom::u32().map_or(0.5, |bits| f64::from(bits) / f64::from(u32::MAX));
    poll.mul_f64(0.9 + 0.2 * random)
}

/// The versions that an order was about.
type Done = Result<Vec<Arc<ServedModel>>, ControlError>;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Serve a version, looking for it first.
    Load,
    /// Serve a version, or all of a model, to nobody new.
    Unload,
}

#[derive(Debug)]
struct Order {
    wish: Wish,
    name: String,
    version: Option<u64>,
    done: oneshot::Sender<Done>,
}

/// Where orders are given.
#[derive(Clone, Debug)]
pub(super) struct Control(mpsc::Sender<Order>);

/// Where they arrive.
#[derive(Debug)]
pub(super) struct Orders(mpsc::Receiver<Order>);

/// Both ends.
pub(super) fn control() -> (Control, Orders) {
    let (send, receive) = mpsc::channel(MAX_ORDERS);
    (Control(send), Orders(receive))
}

impl Control {
    /// Has `wish` done with the model `name`, or one version of it. Returns the versions that it was done with.
    pub(super) async fn order(&self, wish: Wish, name: String, version: Option<u64>) -> Done {
        let (done, is_done) = oneshot::channel();
        let order = Order {
            wish,
            name,
            version,
            done,
        };
        let sent = self.0.send(order).await;
        sent.map_err(|_| ControlError::NoRepository)?;
        is_done.await.map_err(|_| ControlError::NoRepository)?
    }
}

impl Service {
    /// Looks for other models every `poll`, and when the system tells that the repository's folder has changed, and
    /// carries out orders; at no interval only those.
    pub(super) async fn follow(&self, repository: Option<Repository>, poll: Duration, orders: Orders) {
        self.follow_until_it_fails(repository, poll, orders).await;
        // What is served goes on.
        std::future::pending::<()>().await;
    }

    /// Orders are refused when it ends.
    async fn follow_until_it_fails(
        &self,
        mut repository: Option<Repository>,
        poll: Duration,
        Orders(mut orders): Orders,
    ) {
        let folder = repository.as_ref().and_then(Repository::folder);
        let notified = folder.filter(|_| !poll.is_zero()).and_then(Notified::of);
        while let Some(mut here) = repository.take() {
            let polls = here.is_watched() && !poll.is_zero();
            let order = tokio::select! {
                Some(order) = orders.recv() => Some(order),
                () = tokio::time::sleep(jittered(poll)), if polls => None,
                () = notified::changed(notified.as_ref()), if polls => {
                    notified::settle().await;
                    None
                }
                // Nobody may give orders, and nothing is looked at by itself.
                else => return,
            };
            let engine = Arc::clone(&self.engine);
            // Reads files: not on the runtime's threads.
            let looked = tokio::task::spawn_blocking(move || {
                let Some(order) = order else {
                    return (here.changed(), None, here);
                };
                let (name, version) = (&order.name, order.version);
                let done = match order.wish {
                    Wish::Load => here.load(name, version, |model| engine.has_failed(model)),
                    Wish::Unload => here.unload(name, version),
                };
                let (models, done) = match done {
                    Ok((versions, models)) => (Some(models), Ok(versions)),
                    Err(error) => (None, Err(error)),
                };
                (models, Some((order.done, done)), here)
            });
            match looked.await {
                Ok((models, answer, here)) => {
                    repository = Some(here);
                    if let Some(models) = models {
                        self.replace_models(models);
                    }
                    if let Some((to, done)) = answer {
                        // Whoever has gone away need not know.
                        let _told = to.send(done).is_ok();
                    }
                }
                Err(error) => tracing::error!(%error, "looking for models failed; it is given up"),
            }
        }
    }

    /// Serves `models` from now on: what is not among them to nobody new, and new versions of what is in use as soon as
    /// they are loaded.
    fn replace_models(&self, models: Models) {
        let before = self.models.now();
        let (retired, engine) = (self.models.replace(models), Arc::clone(&self.engine));
        let models = self.models.now();
        // What is refused may have changed alone.
        if !retired.is_empty() || models.iter().count() != before.iter().count() {
            let served: Vec<String> = models.iter().map(ToString::to_string).collect();
            tracing::info!(models = served.join(", "), "the models have changed");
        }
        tokio::spawn(async move {
            // A request can have chosen one of them and not be admitted yet; what it names may not be on disk any more.
            tokio::time::sleep(LAST_CHOICE).await;
            retired.iter().for_each(|model| engine.retire(model));
        });
        for model in models.iter().filter(|model| !self.engine.was_ready(model)) {
            let older = models.candidates(Some(model.name()), None);
            let is_newest = older.first().is_some_and(|newest| Arc::ptr_eq(newest, model));
            if is_newest && older.iter().any(|older| self.engine.was_ready(older)) {
                self.engine.prepare(model);
                self.set_aside_when_ready(model, older);
            }
        }
    }

    /// Has the versions before `newest` leave memory once that is ready: they are there by number still, and loaded
    /// again for who asks so.
    fn set_aside_when_ready(&self, newest: &Arc<ServedModel>, versions: Vec<Arc<ServedModel>>) {
        let (newest, mut changes) = (Arc::clone(newest), self.engine.changes());
        let default = self.models.now().default_model();
        // Nobody waits for the end of what this waits for.
        let server_engine = Arc::downgrade(&self.engine);
        tokio::spawn(async move {
            loop {
                let Some(engine) = server_engine.upgrade().filter(|_| !newest.is_retired()) else {
                    return;
                };
                if engine.was_ready(&newest) {
                    drop(engine);
                    // One that was chosen before, and not admitted yet, would be loaded again and stay.
                    tokio::time::sleep(LAST_CHOICE).await;
                    let Some(engine) = server_engine.upgrade().filter(|_| !newest.is_retired()) else {
                        return;
                    };
                    let is_kept = |version: &Arc<ServedModel>| {
                        Arc::ptr_eq(version, &newest)
                            || default
                                .as_ref()
                                .is_some_and(|default| Arc::ptr_eq(version, default))
                    };
                    let older = versions.iter().filter(|version| !is_kept(version));
                    older.for_each(|version| engine.set_aside(version));
                    return;
                }
                drop(engine);
                if changes.changed().await.is_err() {
                    return;
                }
            }
        });
    }
}
