//! Who is next: virtual-time fair queueing over callers, and over the requests of a caller.
//!
//! Every caller and every request (a *flow*) has a virtual time: the predicted time of the evaluations that it
//! was given so far, of callers by their weight. The caller with the least of it is next, and of its requests the one with the least
//! (start-time fair queueing, Goyal et al. 1996; for language models the "virtual token counter" of arXiv
//! 2401.00588). What is charged is predicted time, so a short canvas is not charged as a long one. A new or
//! returning flow starts at the virtual time at which the running pass began: idle time earns nothing, and having
//! come a little too late for that pass costs nothing. Virtual time goes on with all that is given, shared by those
//! who wait, so that whoever waits is not passed by new ones for ever.
//!
//! Of a caller's requests the most urgent goes first ([`Urgency`]): that of the highest priority, and of those the
//! one whose deadline is nearest, and of those the one with the least virtual time. But half of a caller's time
//! goes to whichever of its patient requests, without priority and deadline, has been given least in all: a short
//! request beside long ones, whose evaluations cost little, waits for a pass and then goes on, as long as that pass
//! lasted. The other half goes by virtual time, so that an endless row of short ones does not starve a long one.
//! (Passes that both orders would have begun alike count for neither.)
//!
//! A pass is headed by whose turn it is and filled, in the same order, with others that can share it. Whoever
//! rides along is charged as well, so nobody gains by it, and no room of a pass is left empty. But where there are, or
//! lately were, several callers, a pass grows only as long as that makes evaluations cheaper: beyond, one caller's
//! passes would be long for nothing, and it is the others who wait for their end.
//!
//! Pure data, no clock and no lock. Every operation is logarithmic in what waits, but for re-listing a caller in a
//! lane that it has advanced in since, which happens at most once for each time that it was charged.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;

/// Nanoseconds of predicted evaluation time, from an arbitrary start.
type VirtualTime = u64;

/// A caller, by order of arrival: ties go to whoever came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct CallerNumber(u64);

/// Names a flow: what a request has of one length, or one canvas of it that has to run alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::engine) struct FlowKey {
    /// The request, by order of arrival.
    pub(in crate::engine) request: u64,
    /// Positions of its canvases: what shares a flow can share a pass.
    pub(in crate::engine) length: usize,
    /// The canvas that has to run alone, if one has.
    pub(in crate::engine) alone: Option<u32>,
}

/// How urgent a request is among those of its caller: the smaller, the more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::engine) struct Urgency {
    /// Higher priorities are more urgent.
    pub(in crate::engine) priority: Reverse<i32>,
    /// Nanoseconds of the deadline, from whatever start; the largest number without one.
    pub(in crate::engine) deadline: u64,
}

impl Urgency {
    /// Whether it has neither priority nor deadline to go by.
    fn is_patient(self) -> bool {
        self >= Self::default()
    }
}

impl Default for Urgency {
    fn default() -> Self {
        Self {
            priority: Reverse(0),
            deadline: u64::MAX,
        }
    }
}

/// Caller, lane and urgency of a flow.
#[derive(Clone, Debug)]
pub(in crate::engine) struct FlowDescription<C, L> {
    /// The caller.
    pub(in crate::engine) caller: C,
    /// Its share beside other callers, at least 1: with twice the weight it is given twice as much.
    pub(in crate::engine) weight: u32,
    /// Items of the same lane can share a pass.
    pub(in crate::engine) lane: L,
    /// How urgent it is among the flows of its caller.
    pub(in crate::engine) urgency: Urgency,
}

/// Share that an item takes of a pass.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Weight {
    /// Evaluations that it is charged for.
    pub(in crate::engine) evaluations: u64,
    /// Bytes that the network gives for it.
    pub(in crate::engine) output_bytes: usize,
}

/// Size and cost of a pass.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct Pass {
    /// Items; one always fits.
    pub(in crate::engine) items: usize,
    /// Items beyond which sharing saves next to nothing, while others wait for the pass to end.
    pub(in crate::engine) worthwhile: usize,
    /// Bytes that the network gives for all of them; the first item always fits.
    pub(in crate::engine) output_bytes: usize,
    /// Predicted time of an evaluation of one item.
    pub(in crate::engine) cost: u64,
}

/// The present virtual time: at least that of whose turn it is, and what was given, shared by those who are there.
#[derive(Clone, Copy, Debug, Default)]
struct VirtualClock {
    now: VirtualTime,
    /// The newest pass.
    pass: u64,
    /// What that pass costs. It is shared when the next one begins, for whoever comes until then waits for it as well.
    pending: VirtualTime,
}

/// For how long a caller who was alone since counts as one of several: virtual time, which goes on as time does as long
/// as there is work.
const LATELY: VirtualTime = 1_000_000_000;

impl VirtualClock {
    /// A pass begins with something of virtual time `time`, while those who are there have weights of `present` in all.
    fn pass_begins(&mut self, pass: u64, time: VirtualTime, present: u64) {
        if self.pass == pass {
            return;
        }
        let shared = std::mem::take(&mut self.pending) / present.max(1);
        self.now = self.now.saturating_add(shared).max(time);
        self.pass = pass;
    }

    fn charge(&mut self, cost: u64) {
        self.pending = self.pending.saturating_add(cost);
    }

    /// Nobody is there: whoever comes next waits for nothing.
    fn stop(&mut self) {
        self.pending = 0;
    }
}

#[derive(Debug)]
struct Flow<L, T> {
    caller: CallerNumber,
    lane: L,
    urgency: Urgency,
    time: VirtualTime,
    /// Predicted time of all that was taken.
    given: u64,
    /// The last charge, or how far behind the present it was then, if that is more: what it may be behind when it is
    /// back, for it was not idle.
    may_lag: u64,
    /// Items that wait, by number of the canvas: the first canvases of a request are finished first.
    items: BTreeMap<u32, T>,
    /// Members that have not left, waiting or not.
    members: usize,
}

/// Where a flow stands in the orders.
#[derive(Clone, Copy, Debug)]
struct Place {
    time: VirtualTime,
    urgency: Urgency,
    given: u64,
}

#[derive(Debug)]
struct CallerFlow<C, L> {
    name: C,
    weight: u64,
    time: VirtualTime,
    /// As of a flow.
    may_lag: u64,
    /// Of its requests.
    clock: VirtualClock,
    /// Flows with items that wait.
    waiting: BTreeSet<(Urgency, VirtualTime, FlowKey)>,
    /// The patient ones by what they were given.
    patient: BTreeSet<(u64, FlowKey)>,
    /// Predicted time of the passes that went to whoever was given least, less that of the others.
    ahead_of_turns: i64,
    lanes: HashMap<L, CallerInLane>,
    /// Flows that have members.
    flows: usize,
}

#[derive(Debug, Default)]
struct CallerInLane {
    waiting: BTreeSet<(Urgency, VirtualTime, FlowKey)>,
    /// The time under which the lane lists the caller; never later than the caller's own.
    listed: VirtualTime,
}

#[derive(Debug, Default)]
struct Lane {
    callers: BTreeSet<(VirtualTime, CallerNumber)>,
    items: usize,
}

/// Items of flows of callers `C`, in lanes `L`.
#[derive(Debug)]
pub(in crate::engine) struct FairOrder<C, L, T> {
    numbers: HashMap<C, CallerNumber>,
    callers: HashMap<CallerNumber, CallerFlow<C, L>>,
    flows: BTreeMap<FlowKey, Flow<L, T>>,
    lanes: HashMap<L, Lane>,
    /// Callers with items that wait.
    backlogged: BTreeSet<(VirtualTime, CallerNumber)>,
    /// Callers without members that are ahead of `now` still: what they had is not forgotten before.
    ahead: BTreeSet<(VirtualTime, CallerNumber)>,
    /// Of callers.
    clock: VirtualClock,
    /// When there were several callers the last time.
    several_at: Option<VirtualTime>,
    passes: u64,
    /// Weights of the callers that have members.
    present: u64,
    arrivals: u64,
    items: usize,
}

impl<C, L, T> FairOrder<C, L, T>
where
    C: Clone + Eq + Hash,
    L: Copy + Eq + Hash,
{
    pub(in crate::engine) fn new() -> Self {
        Self {
            numbers: HashMap::new(),
            callers: HashMap::new(),
            flows: BTreeMap::new(),
            lanes: HashMap::new(),
            backlogged: BTreeSet::new(),
            ahead: BTreeSet::new(),
            clock: VirtualClock::default(),
            several_at: None,
            passes: 0,
            present: 0,
            arrivals: 0,
            items: 0,
        }
    }

    /// Items that wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.items
    }

    /// Makes room for one more member of a flow, which begins if it is new.
    pub(in crate::engine) fn join(&mut self, key: FlowKey, description: &FlowDescription<C, L>) {
        if let Some(flow) = self.flows.get_mut(&key) {
            flow.members += 1;
            return;
        }
        let (now, arrivals) = (self.clock.now, &mut self.arrivals);
        let number = *self.numbers.entry(description.caller.clone()).or_insert_with(|| {
            *arrivals += 1;
            CallerNumber(*arrivals)
        });
        let caller = self.callers.entry(number).or_insert_with(|| CallerFlow {
            name: description.caller.clone(),
            weight: description.weight.max(1).into(),
            time: now,
            may_lag: 0,
            clock: VirtualClock::default(),
            waiting: BTreeSet::new(),
            patient: BTreeSet::new(),
            ahead_of_turns: 0,
            lanes: HashMap::new(),
            flows: 0,
        });
        self.ahead.remove(&(caller.time, number));
        if caller.flows == 0 {
            caller.weight = description.weight.max(1).into();
            self.present += caller.weight;
        }
        caller.flows += 1;
        let flow = Flow {
            caller: number,
            lane: description.lane,
            urgency: description.urgency,
            time: caller.clock.now,
            given: 0,
            may_lag: 0,
            items: BTreeMap::new(),
            members: 1,
        };
        self.flows.insert(key, flow);
    }

    /// A member of a flow has ended; it must not wait.
    pub(in crate::engine) fn leave(&mut self, key: FlowKey) {
        let Some(flow) = self.flows.get_mut(&key) else {
            return;
        };
        flow.members = flow.members.saturating_sub(1);
        if flow.members > 0 {
            return;
        }
        let number = flow.caller;
        self.flows.remove(&key);
        let Some(caller) = self.callers.get_mut(&number) else {
            return;
        };
        caller.flows = caller.flows.saturating_sub(1);
        if caller.flows == 0 {
            caller.clock.stop();
            self.present -= caller.weight;
            self.ahead.insert((caller.time, number));
            if self.ahead.len() == self.callers.len() {
                self.clock.stop();
            }
            self.forget_who_is_not_ahead();
        }
    }

    /// Lets item number `index` of a flow wait; gives it back when the flow is not known.
    pub(in crate::engine) fn push(&mut self, key: FlowKey, index: u32, item: T) -> Result<(), T> {
        let Some(flow) = self.flows.get_mut(&key) else {
            return Err(item);
        };
        let Some(caller) = self.callers.get_mut(&flow.caller) else {
            return Err(item);
        };
        if flow.items.is_empty() {
            flow.time = flow.time.max(caller.clock.now.saturating_sub(flow.may_lag));
            if caller.waiting.is_empty() {
                caller.time = caller.time.max(self.clock.now.saturating_sub(caller.may_lag));
                self.backlogged.insert((caller.time, flow.caller));
            }
            caller.waiting.insert((flow.urgency, flow.time, key));
            if flow.urgency.is_patient() {
                caller.patient.insert((flow.given, key));
            }
            let lane = self.lanes.entry(flow.lane).or_default();
            let here = caller.lanes.entry(flow.lane).or_insert_with(|| {
                lane.callers.insert((caller.time, flow.caller));
                CallerInLane {
                    waiting: BTreeSet::new(),
                    listed: caller.time,
                }
            });
            here.waiting.insert((flow.urgency, flow.time, key));
        }
        flow.items.insert(index, item);
        self.lanes.entry(flow.lane).or_default().items += 1;
        self.items += 1;
        Ok(())
    }

    /// Takes the items of one pass: whose turn it is, and others of its lane in the same order.
    ///
    /// `measure` says of a lane what a pass holds, `weigh` what an item takes of it. Items are shared with as many
    /// others that wait for work as there are `sleepers`, so that none is idle while another has too much.
    pub(in crate::engine) fn take(
        &mut self,
        sleepers: usize,
        measure: impl FnOnce(&L) -> Pass,
        weigh: impl Fn(&T) -> Weight,
    ) -> Vec<T> {
        let Some(&(time, number)) = self.backlogged.first() else {
            return Vec::new();
        };
        self.passes += 1;
        self.clock.pass_begins(self.passes, time, self.present);
        self.forget_who_is_not_ahead();
        let several = self.were_several_lately();
        let Some(caller) = self.callers.get_mut(&number) else {
            return Vec::new();
        };
        let in_turn = caller.waiting.first().map(|(_, _, key)| *key);
        let least_given = caller.patient.first().map(|(_, key)| *key);
        let to_least_given = least_given.filter(|_| caller.ahead_of_turns <= 0);
        // Where both agree, neither gains a turn.
        let counts = least_given.is_some() && least_given != in_turn;
        let first = to_least_given.or(in_turn);
        let Some(key) = first else {
            return Vec::new();
        };
        let Some((lane, waiting)) = self
            .flows
            .get(&key)
            .map(|flow| (flow.lane, self.lanes.get(&flow.lane).map_or(0, |lane| lane.items)))
        else {
            return Vec::new();
        };
        let pass = measure(&lane);
        let most = if several {
            pass.items.min(pass.worthwhile)
        } else {
            pass.items
        };
        let room = most.clamp(1, waiting.div_ceil(sleepers + 1).max(1));
        let (mut batch, mut bytes_left, mut time_of_pass) = (Vec::new(), pass.output_bytes, 0u64);
        let mut next = Some(key);
        while let Some(key) = next {
            let Some(weight) = self.first_of(key).map(&weigh) else {
                break;
            };
            if weight.output_bytes > bytes_left && !batch.is_empty() {
                break;
            }
            bytes_left = bytes_left.saturating_sub(weight.output_bytes);
            let cost = pass.cost.saturating_mul(weight.evaluations);
            time_of_pass = time_of_pass.saturating_add(cost);
            batch.extend(self.pop(key, cost));
            next = if batch.len() < room {
                self.next_in(lane)
            } else {
                None
            };
        }
        if let Some(caller) = self.callers.get_mut(&number).filter(|_| counts) {
            let time = i64::try_from(time_of_pass).unwrap_or(i64::MAX);
            let turn = if to_least_given.is_some() {
                time
            } else {
                time.saturating_neg()
            };
            caller.ahead_of_turns = caller.ahead_of_turns.saturating_add(turn);
        }
        batch
    }

    /// Takes out everything of a request that waits; its members have not left.
    pub(in crate::engine) fn withdraw(&mut self, request: u64) -> Vec<T> {
        let all = FlowKey {
            request,
            length: 0,
            alone: None,
        }..=FlowKey {
            request,
            length: usize::MAX,
            alone: Some(u32::MAX),
        };
        let keys: Vec<FlowKey> = self.flows.range(all).map(|(key, _)| *key).collect();
        keys.into_iter().flat_map(|key| self.empty(key)).collect()
    }

    /// Takes out everything that waits.
    pub(in crate::engine) fn drain(&mut self) -> Vec<T> {
        let keys: Vec<FlowKey> = self.flows.keys().copied().collect();
        keys.into_iter().flat_map(|key| self.empty(key)).collect()
    }

    fn empty(&mut self, key: FlowKey) -> Vec<T> {
        let Some(flow) = self.flows.get_mut(&key) else {
            return Vec::new();
        };
        let items: Vec<T> = std::mem::take(&mut flow.items).into_values().collect();
        if !items.is_empty() {
            let (number, lane) = (flow.caller, flow.lane);
            let place = Place {
                time: flow.time,
                urgency: flow.urgency,
                given: flow.given,
            };
            self.count_out(lane, items.len());
            self.unlist(key, number, place, lane);
        }
        items
    }

    fn first_of(&self, key: FlowKey) -> Option<&T> {
        self.flows
            .get(&key)?
            .items
            .first_key_value()
            .map(|(_, item)| item)
    }

    /// Takes the first item of a flow and charges it `cost`.
    fn pop(&mut self, key: FlowKey, cost: u64) -> Option<T> {
        let flow = self.flows.get_mut(&key)?;
        let (_, item) = flow.items.pop_first()?;
        let (number, lane, urgency) = (flow.caller, flow.lane, flow.urgency);
        let before = Place {
            time: flow.time,
            urgency,
            given: flow.given,
        };
        flow.time = flow.time.saturating_add(cost);
        flow.given = flow.given.saturating_add(cost);
        let (time, given) = (flow.time, flow.given);
        let again = !flow.items.is_empty();
        if let Some(caller) = self.callers.get_mut(&number) {
            // Who goes first by urgency, or by what it was given, says nothing of the others' time.
            let least = caller
                .waiting
                .first()
                .filter(|(urgency, ..)| urgency.is_patient());
            let least = least.map_or(0, |(_, time, _)| *time);
            caller.clock.pass_begins(self.passes, least, caller.flows as u64);
            caller.clock.charge(cost);
            self.clock.charge(cost);
            flow.may_lag = cost.max(caller.clock.now.saturating_sub(before.time));
            let cost = (cost / caller.weight).max(1);
            caller.may_lag = cost.max(self.clock.now.saturating_sub(caller.time));
            self.backlogged.remove(&(caller.time, number));
            caller.time = caller.time.saturating_add(cost);
            self.backlogged.insert((caller.time, number));
            if again {
                caller.waiting.remove(&(urgency, before.time, key));
                caller.waiting.insert((urgency, time, key));
                if caller.patient.remove(&(before.given, key)) {
                    caller.patient.insert((given, key));
                }
                if let Some(here) = caller.lanes.get_mut(&lane) {
                    here.waiting.remove(&(urgency, before.time, key));
                    here.waiting.insert((urgency, time, key));
                }
            }
        }
        self.count_out(lane, 1);
        if !again {
            self.unlist(key, number, before, lane);
        }
        Some(item)
    }

    fn count_out(&mut self, lane: L, items: usize) {
        self.items -= items;
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.items -= items;
        }
    }

    /// Takes a flow that has nothing left to wait out of the orders, and its caller where this was its last.
    fn unlist(&mut self, key: FlowKey, number: CallerNumber, place: Place, lane: L) {
        let Place { time, urgency, given } = place;
        let Some(caller) = self.callers.get_mut(&number) else {
            return;
        };
        caller.waiting.remove(&(urgency, time, key));
        caller.patient.remove(&(given, key));
        if caller.waiting.is_empty() {
            self.backlogged.remove(&(caller.time, number));
        }
        let Some(here) = caller.lanes.get_mut(&lane) else {
            return;
        };
        here.waiting.remove(&(urgency, time, key));
        if here.waiting.is_empty() {
            let listed = here.listed;
            caller.lanes.remove(&lane);
            if let Some(callers) = self.lanes.get_mut(&lane) {
                callers.callers.remove(&(listed, number));
                if callers.callers.is_empty() {
                    self.lanes.remove(&lane);
                }
            }
        }
    }

    /// The flow that is next in `lane`.
    fn next_in(&mut self, lane: L) -> Option<FlowKey> {
        let callers = &mut self.lanes.get_mut(&lane)?.callers;
        loop {
            let &(listed, number) = callers.first()?;
            let caller = self.callers.get_mut(&number)?;
            let here = caller.lanes.get_mut(&lane)?;
            if caller.time == listed {
                return here.waiting.first().map(|(_, _, key)| *key);
            }
            // Times only grow, so whoever was listed earlier is at its place after this.
            callers.remove(&(listed, number));
            callers.insert((caller.time, number));
            here.listed = caller.time;
        }
    }

    /// Whether somebody else than the one caller that there is waits for the pass, or may be back before it ends.
    fn were_several_lately(&mut self) -> bool {
        if self.callers.len() - self.ahead.len() > 1 {
            self.several_at = Some(self.clock.now);
        }
        self.several_at
            .is_some_and(|at| self.clock.now.saturating_sub(at) < LATELY)
    }

    /// Forgets callers that are gone and have had no more than their share.
    fn forget_who_is_not_ahead(&mut self) {
        while let Some(&(time, number)) = self.ahead.first() {
            // With nobody left there is nobody to be ahead of.
            if time > self.clock.now && self.ahead.len() < self.callers.len() {
                return;
            }
            self.ahead.remove(&(time, number));
            if let Some(caller) = self.callers.remove(&number) {
                self.numbers.remove(&caller.name);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
