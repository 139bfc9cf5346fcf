//! The ready queue: canvases that wait for their next evaluation, in fair order ([`fair`]).

mod fair;

use super::caller::Caller;
use super::cost::Costs;
use super::work::Work;
use crate::sync::{Condvar, Mutex};
use fair::Pass;
pub(super) use fair::{FlowDescription, FlowKey, Urgency, Weight};

/// Canvases that can share a pass: of one model and length, but for those that have to run alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Lane {
    /// Address of the model.
    pub(super) model: usize,
    /// Length of the canvases.
    pub(super) length: usize,
    /// The canvas that runs alone.
    pub(super) alone: Option<FlowKey>,
}

/// Size of one forward pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Canvases times length.
    pub(super) tokens: usize,
    /// Bytes of log-scores that the network gives at once.
    pub(super) output_bytes: usize,
}

#[derive(Debug)]
struct Ready {
    order: fair::FairOrder<Caller, Lane, Work>,
    /// Workers that wait for work.
    sleepers: usize,
    closed: bool,
}

/// Length is bounded by admission: nothing enters that holds no permit.
#[derive(Debug)]
pub(super) struct Queue {
    /// Guards the order. Held for moves only: work is made, told and dropped outside of it (dropping
    /// work takes the lock).
    ready: Mutex<Ready>,
    /// Workers wait, whoever puts signals.
    arrived: Condvar,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            ready: Mutex::new(Ready {
                order: fair::FairOrder::new(),
                sleepers: 0,
                closed: false,
            }),
            arrived: Condvar::new(),
        }
    }

    /// Makes room for one more member of a flow.
    pub(super) fn join(&self, key: FlowKey, description: &FlowDescription<Caller, Lane>) {
        self.ready.lock().order.join(key, description);
    }

    /// A member of a flow has ended.
    pub(super) fn leave(&self, key: FlowKey) {
        self.ready.lock().order.leave(key);
    }

    /// Lets work wait for its next evaluation; after [`Self::close`] gives it back.
    pub(super) fn put(&self, work: Vec<Work>) -> Vec<Work> {
        if work.is_empty() {
            return work;
        }
        let mut refused = Vec::new();
        let mut ready = self.ready.lock();
        if ready.closed {
            return work;
        }
        for item in work {
            let (key, index) = (item.flow(), item.index);
            refused.extend(ready.order.push(key, index, item).err());
        }
        drop(ready);
        self.arrived.notify_all();
        refused
    }

    /// Waits for work and takes what shares the next pass, within the limits but one canvas always; each canvas is
    /// charged what it is known to cost. `None` when closed.
    pub(super) fn take(&self, limits: Limits, costs: &Costs) -> Option<Vec<Work>> {
        let mut ready = self.ready.lock();
        loop {
            if ready.closed {
                return None;
            }
            let sleepers = ready.sleepers;
            let measure = |lane: &Lane| Pass {
                items: limits.tokens / lane.length.max(1),
                output_bytes: limits.output_bytes,
                worthwhile: costs.worthwhile(lane.model, lane.length),
                // A guess would weigh on flows long after costs are known.
                cost: costs.known(lane.model, lane.length).unwrap_or(1),
            };
            let batch = ready.order.take(sleepers, measure, Work::weight);
            if !batch.is_empty() {
                return Some(batch);
            }
            ready.sleepers += 1;
            self.arrived.wait(&mut ready);
            ready.sleepers -= 1;
        }
    }

    /// Whether nothing waits.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.ready.lock().order.len() == 0
    }

    /// Whether nothing is let in any more.
    #[cfg(test)]
    pub(super) fn is_closed(&self) -> bool {
        self.ready.lock().closed
    }

    /// Takes out what waits of a request.
    pub(super) fn withdraw(&self, request: u64) -> Vec<Work> {
        self.ready.lock().order.withdraw(request)
    }

    /// Lets nothing in any more and nobody wait; takes out everything.
    pub(super) fn close(&self) -> Vec<Work> {
        let mut ready = self.ready.lock();
        ready.closed = true;
        let waiting = ready.order.drain();
        drop(ready);
        self.arrived.notify_all();
        waiting
    }
}
