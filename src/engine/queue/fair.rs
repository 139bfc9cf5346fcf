//! Who is next: virtual-time fair queueing over callers, and over the requests of a caller.
//!
//! Every caller and every request (a *flow*) has a virtual time: the predicted time of the evaluations that it
//! was given so far. The caller with the least of it is next, and of its requests the one with the least
//! (start-time fair queueing, Goyal et al. 1996; for language models the "virtual token counter" of arXiv
//! 2401.00588). What is charged is predicted time, so a short canvas is not charged as a long one. A new or
//! returning flow starts at the present virtual time, which goes on with all that is given, shared by those who
//! wait: idle time earns nothing, and whoever waits is not passed by new ones for ever.
//!
//! Of a caller's requests the most urgent goes first ([`Urgency`]): that of the highest priority, and of those the
//! one whose deadline is nearest, and of those the one with the least virtual time. But half of a caller's time
//! goes to whichever of its patient requests, without priority and deadline, has been given least in all: a short
//! request beside long ones, whose evaluations cost little, waits for one pass and then goes on, as long as that
//! pass lasted. The other half goes by virtual time, so that an endless row of short ones does not starve a long
//! one.
//!
//! A pass is headed by whose turn it is and filled, in the same order, with others that can share it. Whoever
//! rides along is charged as well, so nobody gains by it, and no room of a pass is left empty.
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
    /// Bytes that the network gives for all of them; the first item always fits.
    pub(in crate::engine) output_bytes: usize,
    /// Predicted time of an evaluation of one item.
    pub(in crate::engine) cost: u64,
}

#[derive(Debug)]
struct Flow<L, T> {
    caller: CallerNumber,
    lane: L,
    urgency: Urgency,
    time: VirtualTime,
    /// Predicted time of all that was taken.
    given: u64,
    /// The last charge.
    last: u64,
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
    time: VirtualTime,
    /// The present virtual time of its requests.
    now: VirtualTime,
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
    /// The present virtual time of callers.
    now: VirtualTime,
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
            now: 0,
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
        let (now, arrivals) = (self.now, &mut self.arrivals);
        let number = *self.numbers.entry(description.caller.clone()).or_insert_with(|| {
            *arrivals += 1;
            CallerNumber(*arrivals)
        });
        let caller = self.callers.entry(number).or_insert_with(|| CallerFlow {
            name: description.caller.clone(),
            time: now,
            now: 0,
            waiting: BTreeSet::new(),
            patient: BTreeSet::new(),
            ahead_of_turns: 0,
            lanes: HashMap::new(),
            flows: 0,
        });
        self.ahead.remove(&(caller.time, number));
        caller.flows += 1;
        let flow = Flow {
            caller: number,
            lane: description.lane,
            urgency: description.urgency,
            time: caller.now,
            given: 0,
            last: 0,
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
            self.ahead.insert((caller.time, number));
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
            // Whose last evaluation has only just come back was not idle.
            flow.time = flow.time.max(caller.now.saturating_sub(flow.last));
            if caller.waiting.is_empty() {
                caller.time = caller.time.max(self.now.saturating_sub(flow.last));
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
        self.now = self.now.max(time);
        self.forget_who_is_not_ahead();
        let Some(caller) = self.callers.get_mut(&number) else {
            return Vec::new();
        };
        let least_given = caller.patient.first().filter(|_| caller.ahead_of_turns <= 0);
        let to_least_given = least_given.is_some();
        let first = least_given
            .map(|(_, key)| *key)
            .or(caller.waiting.first().map(|(_, _, key)| *key));
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
        let room = pass.items.clamp(1, waiting.div_ceil(sleepers + 1).max(1));
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
        if let Some(caller) = self
            .callers
            .get_mut(&number)
            .filter(|caller| !caller.patient.is_empty() || to_least_given)
        {
            let time = i64::try_from(time_of_pass).unwrap_or(i64::MAX);
            let turn = if to_least_given {
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
        flow.last = cost;
        let again = !flow.items.is_empty();
        self.count_out(lane, 1);
        if let Some(caller) = self.callers.get_mut(&number) {
            let share = |of: usize| cost / of.max(1) as u64;
            caller.now = caller.now.max(before.time) + share(caller.waiting.len());
            self.now += share(self.backlogged.len());
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

    /// Forgets callers that are gone and have had no more than their share.
    fn forget_who_is_not_ahead(&mut self) {
        while let Some(&(time, number)) = self.ahead.first() {
            // With nobody left there is nobody to be ahead of.
            if time > self.now && self.ahead.len() < self.callers.len() {
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A lane and what its items cost.
    type Lane = (u32, u64);
    type Order = FairOrder<&'static str, Lane, (u64, u32)>;

    fn key(request: u64) -> FlowKey {
        FlowKey {
            request,
            length: 10,
            alone: None,
        }
    }

    /// Adds `items` items of `cost` each.
    fn add(order: &mut Order, request: u64, caller: &'static str, lane: u32, items: u32, cost: u64) {
        for index in 0..items {
            let lane = (lane, cost);
            let urgency = Urgency::default();
            order.join(
                key(request),
                &FlowDescription {
                    caller,
                    lane,
                    urgency,
                },
            );
            order.push(key(request), index, (request, index)).unwrap();
        }
    }

    fn add_urgent(order: &mut Order, request: u64, lane: Lane, urgency: Urgency, items: u32) {
        for index in 0..items {
            let description = FlowDescription {
                caller: "one",
                lane,
                urgency,
            };
            order.join(key(request), &description);
            order.push(key(request), index, (request, index)).unwrap();
        }
    }

    fn urgency(priority: i32, deadline: u64) -> Urgency {
        Urgency {
            priority: Reverse(priority),
            deadline,
        }
    }

    #[test]
    fn priority_comes_before_deadline_and_deadline_before_the_rest() {
        let mut order = Order::new();
        for (request, urgency) in [
            (2, urgency(0, 900)),
            (3, urgency(0, 500)),
            (4, urgency(1, u64::MAX)),
            (5, urgency(1, 800)),
        ] {
            add_urgent(&mut order, request, (0, 10), urgency, 4);
        }
        let taken: Vec<u64> = (0..8)
            .flat_map(|_| take(&mut order, 2))
            .map(|(request, _)| request)
            .collect();
        assert_eq!(taken, [5, 5, 5, 5, 4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2]);
    }

    #[test]
    fn half_of_the_time_is_for_who_has_neither() {
        let mut order = Order::new();
        add_urgent(&mut order, 1, (0, 10), urgency(0, 500), 10);
        add_urgent(&mut order, 2, (1, 10), Urgency::default(), 5);
        add_urgent(&mut order, 3, (2, 10), urgency(-1, 100), 5);
        let taken: Vec<u64> = (0..20).map(|_| take(&mut order, 1)[0].0).collect();
        let of = |request| taken[..10].iter().filter(|taken| **taken == request).count();
        assert_eq!(of(1), 5, "{taken:?}");
        assert!(of(2) >= 2 && of(3) >= 2, "{taken:?}");
    }

    fn take(order: &mut Order, room: usize) -> Vec<(u64, u32)> {
        order.take(0, pass(room), light)
    }

    fn pass(items: usize) -> impl Fn(&Lane) -> Pass {
        move |(_, cost)| Pass {
            items,
            output_bytes: 0,
            cost: *cost,
        }
    }

    fn light(_: &(u64, u32)) -> Weight {
        Weight {
            evaluations: 1,
            output_bytes: 0,
        }
    }

    #[test]
    fn callers_take_turns_whatever_they_queue() {
        let mut order = Order::new();
        add(&mut order, 1, "greedy", 0, 100, 10);
        add(&mut order, 2, "modest", 1, 3, 10);
        let taken: Vec<u64> = (0..6).map(|_| take(&mut order, 1)[0].0).collect();
        assert_eq!(taken, [1, 2, 1, 2, 1, 2]);
    }

    #[test]
    fn requests_of_a_caller_take_turns_and_cost_counts() {
        let mut order = Order::new();
        add(&mut order, 1, "one", 0, 100, 40);
        add(&mut order, 2, "one", 1, 100, 10);
        let short = (0..50).filter(|_| take(&mut order, 1)[0].0 == 2).count();
        assert_eq!(short, 40, "four short evaluations for every long one");
    }

    #[test]
    fn a_short_request_passes_by_long_ones_of_its_caller_for_half_of_the_time() {
        let mut order = Order::new();
        for request in 1..=32 {
            add(&mut order, request, "one", 0, 20, 10);
        }
        (0..100).for_each(|_| drop(take(&mut order, 4)));
        add(&mut order, 33, "one", 1, 1, 10);
        // One at a time, as evaluations of one canvas come: a pass of the long ones takes as long as four of them.
        let turns: Vec<bool> = (0..12)
            .map(|_| {
                let short = take(&mut order, 4)[0].0 == 33;
                if short {
                    order.push(key(33), 0, (33, 0)).unwrap();
                }
                short
            })
            .collect();
        let passes = turns.chunk_by(|a, b| a == b);
        let short: Vec<usize> = passes.filter(|turns| turns[0]).map(<[bool]>::len).collect();
        assert!(short.iter().skip(1).all(|turns| *turns >= 4), "{turns:?}");
        assert!(turns.iter().filter(|short| !**short).count() >= 2, "{turns:?}");
    }

    /// Beside an endless row of short requests a long one has its share, be it half of the turns or, where more
    /// comes than can be served, that of one among many.
    #[test]
    fn short_requests_do_not_starve_long_ones_of_their_caller() {
        for (every, least) in [(2, 45), (1, 5)] {
            let mut order = Order::new();
            add(&mut order, 0, "one", 0, 100, 10);
            let long = (1..=100u64)
                .filter(|turn| {
                    if turn.is_multiple_of(every) {
                        add(&mut order, *turn, "one", 1, 1, 10);
                    }
                    take(&mut order, 1)[0].0 == 0
                })
                .count();
            assert!(long >= least, "a short one every {every}: {long}");
        }
    }

    #[test]
    fn canvases_of_a_request_go_in_their_order() {
        let mut order = Order::new();
        add(&mut order, 1, "one", 0, 5, 10);
        let batch = take(&mut order, 3);
        assert_eq!(batch, [(1, 0), (1, 1), (1, 2)]);
        for item in batch {
            order.push(key(1), item.1, item).unwrap();
        }
        assert_eq!(
            take(&mut order, 3),
            [(1, 0), (1, 1), (1, 2)],
            "the oldest first, again"
        );
    }

    #[test]
    fn a_pass_is_filled_in_turn_with_those_who_can_share_it() {
        let mut order = Order::new();
        add(&mut order, 1, "one", 7, 10, 10);
        add(&mut order, 2, "two", 8, 10, 10);
        add(&mut order, 3, "three", 7, 10, 10);
        let of =
            |batch: Vec<(u64, u32)>| -> Vec<u64> { batch.into_iter().map(|(request, _)| request).collect() };
        assert_eq!(of(take(&mut order, 4)), [1, 3, 1, 3]);
        assert_eq!(of(take(&mut order, 4)), [2, 2, 2, 2]);
    }

    #[test]
    fn who_sleeps_gets_a_share() {
        let mut order = Order::new();
        add(&mut order, 1, "one", 0, 8, 10);
        assert_eq!(order.take(1, pass(8), light).len(), 4);
        assert_eq!(order.take(0, pass(8), light).len(), 4);
        assert_eq!(order.take(3, pass(8), light).len(), 0);
    }

    #[test]
    fn a_pass_gives_no_more_bytes_than_it_may_but_for_one_item() {
        let mut order = Order::new();
        add(&mut order, 1, "one", 0, 8, 10);
        let pass = |output_bytes| {
            move |_: &Lane| Pass {
                items: 8,
                output_bytes,
                cost: 10,
            }
        };
        // The later a canvas, the more it takes.
        let weigh = |&(_, index): &(u64, u32)| Weight {
            evaluations: 1,
            output_bytes: 100 * index as usize,
        };
        assert_eq!(order.take(0, pass(300), weigh).len(), 3, "0 + 100 + 200");
        assert_eq!(
            order.take(0, pass(299), weigh),
            [(1, 3)],
            "more than it may: alone"
        );
        assert_eq!(order.take(0, pass(900), weigh), [(1, 4), (1, 5)]);
    }

    #[test]
    fn two_evaluations_are_charged_twice() {
        let mut order = Order::new();
        add(&mut order, 1, "two evaluations", 0, 60, 10);
        add(&mut order, 2, "one evaluation", 1, 60, 10);
        let weigh = |&(request, _): &(u64, u32)| Weight {
            evaluations: 3 - request,
            output_bytes: 0,
        };
        let double = (0..30)
            .filter(|_| order.take(0, pass(1), weigh)[0].0 == 1)
            .count();
        assert_eq!(double, 10);
    }

    #[test]
    fn idle_time_earns_nothing() {
        let mut order = Order::new();
        add(&mut order, 1, "steady", 0, 1000, 10);
        add(&mut order, 2, "returning", 1, 1, 10);
        (0..101).for_each(|_| drop(take(&mut order, 1)));
        add(&mut order, 3, "returning", 1, 50, 10);
        let returning = (0..20).filter(|_| take(&mut order, 1)[0].0 == 3).count();
        assert!(
            (9..=11).contains(&returning),
            "half, not all that it has missed: {returning}"
        );
    }

    #[test]
    fn leaving_and_coming_back_erases_no_debt() {
        let mut order = Order::new();
        add(&mut order, 1, "steady", 0, 100, 10);
        add(&mut order, 2, "hopping", 1, 1, 100);
        let first: Vec<u64> = (0..2).map(|_| take(&mut order, 1)[0].0).collect();
        assert_eq!(first, [1, 2]);
        order.leave(key(2));
        add(&mut order, 3, "hopping", 1, 1, 100);
        let steady = (0..9).filter(|_| take(&mut order, 1)[0].0 == 1).count();
        assert_eq!(steady, 9, "what it had is charged still");
    }

    #[test]
    fn withdrawn_items_are_gone_and_flows_without_members_forgotten() {
        let mut order = Order::new();
        add(&mut order, 1, "one", 0, 3, 10);
        let alone = FlowKey {
            request: 1,
            length: 10,
            alone: Some(2),
        };
        order.join(
            alone,
            &FlowDescription {
                caller: "one",
                lane: (9, 10),
                urgency: Urgency::default(),
            },
        );
        order.push(alone, 2, (1, 2)).unwrap();
        add(&mut order, 2, "two", 0, 1, 10);
        assert_eq!(order.withdraw(1).len(), 4);
        assert_eq!(order.len(), 1);
        assert_eq!(take(&mut order, 4), [(2, 0)]);
        for key in [key(1), key(1), key(1), alone, key(2)] {
            order.leave(key);
        }
        assert!(order.callers.is_empty() && order.numbers.is_empty() && order.flows.is_empty());
        assert!(order.lanes.is_empty() && order.backlogged.is_empty() && order.ahead.is_empty());
    }

    const CALLERS: [&str; 4] = ["a", "b", "c", "d"];

    /// One worker on a simulated clock, with requests that arrive while it works.
    struct Simulation {
        order: Order,
        clock: u64,
        /// Evaluations that the canvases of a request need still.
        left: BTreeMap<u64, Vec<u32>>,
        /// Time that every caller was given.
        served: [u64; 4],
        /// For every two callers, how far the second was ahead when both began to wait.
        ahead: [[i64; 4]; 4],
    }

    /// Arrival time, caller, canvases, evaluations of each and what one costs.
    type Arrival = (u64, usize, u32, u32, u64);

    impl Simulation {
        fn waits(&self, caller: usize, requests: &[Arrival]) -> bool {
            self.left
                .keys()
                .any(|request| requests[*request as usize].1 == caller)
        }

        fn arrive(&mut self, number: u64, requests: &[Arrival]) {
            let (_, caller, canvases, evaluations, cost) = requests[number as usize];
            if !self.waits(caller, requests) {
                for other in 0..4 {
                    let ahead = self.served[other] as i64 - self.served[caller] as i64;
                    (self.ahead[caller][other], self.ahead[other][caller]) = (ahead, -ahead);
                }
            }
            self.left.insert(number, vec![evaluations; canvases as usize]);
            // Nobody shares a pass with another.
            add(
                &mut self.order,
                number,
                CALLERS[caller],
                number as u32,
                canvases,
                cost,
            );
        }

        /// One pass.
        fn pass(&mut self, room: usize, requests: &[Arrival]) -> Vec<(u64, u32)> {
            let batch = take(&mut self.order, room);
            for &(request, index) in &batch {
                let (_, caller, _, _, cost) = requests[request as usize];
                self.clock += cost;
                self.served[caller] += cost;
                let left = self.left.get_mut(&request).unwrap();
                left[index as usize] -= 1;
                if left[index as usize] > 0 {
                    self.order.push(key(request), index, (request, index)).unwrap();
                } else {
                    self.order.leave(key(request));
                }
                if left.iter().all(|left| *left == 0) {
                    self.left.remove(&request);
                }
            }
            batch
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Over random arrivals, on a simulated clock: the worker is never idle while something waits, canvases of a
        /// request go in their order, and of any two callers who both wait neither gets ahead of the other by more
        /// than a pass of each since both do.
        #[test]
        fn arrivals_put_nobody_back_by_more_than_a_pass(
            mut requests in prop::collection::vec((0u64..3000, 0usize..4, 1u32..8, 1u32..12, 1u64..50), 1..20),
            room in 1usize..5,
        ) {
            requests.sort_unstable();
            let mut simulation = Simulation {
                order: Order::new(),
                clock: 0,
                left: BTreeMap::new(),
                served: [0; 4],
                ahead: [[0; 4]; 4],
            };
            let most_of_a_pass = 50 * room as i64;
            let (mut arrived, mut busy) = (0, 0);
            loop {
                while arrived < requests.len() && requests[arrived].0 <= simulation.clock {
                    simulation.arrive(arrived as u64, &requests);
                    arrived += 1;
                }
                if simulation.left.is_empty() {
                    let Some(next) = requests.get(arrived) else { break };
                    simulation.clock = next.0;
                    continue;
                }
                let before: BTreeMap<u64, Vec<u32>> = simulation.left.clone();
                let started = simulation.clock;
                let batch = simulation.pass(room, &requests);
                busy += simulation.clock - started;
                prop_assert!(!batch.is_empty(), "idle while something waits");
                let waiting = before[&batch[0].0].iter().filter(|left| **left > 0).count();
                prop_assert_eq!(batch.len(), room.min(waiting), "room is left while canvases wait");
                for (request, index) in &batch {
                    let oldest = before[request].iter().position(|left| *left > 0).unwrap();
                    prop_assert!((*index as usize) < oldest + room, "an older canvas was passed by");
                }
                for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
                    if a != b && simulation.waits(a, &requests) && simulation.waits(b, &requests) {
                        let ahead = simulation.served[b] as i64 - simulation.served[a] as i64;
                        let ahead = ahead - simulation.ahead[a][b];
                        prop_assert!(ahead <= 2 * most_of_a_pass, "{} is {ahead} ahead of {}", CALLERS[b], CALLERS[a]);
                    }
                }
            }
            let all: u64 = requests.iter().map(|r| u64::from(r.2) * u64::from(r.3) * r.4).sum();
            prop_assert_eq!(busy, all);
            prop_assert!(simulation.order.flows.is_empty() && simulation.order.backlogged.is_empty());
        }

        /// Over random arrivals: a pass is never empty while something waits, and full while its lane has more;
        /// nothing is lost or doubled. Where no two callers can share a pass, none that waits falls behind
        /// another by more than one pass. (Who rides along in room that would be empty gets more, and is charged.)
        #[test]
        fn nobody_who_waits_falls_behind_by_more_than_a_pass(
            requests in prop::collection::vec((0usize..4, 0u32..3, 1u32..30, 1u64..50), 1..20),
            room in 1usize..6,
            shared: bool,
        ) {
            let mut order = Order::new();
            let mut waiting = [0usize; 4];
            let lane_of = |caller: usize, lane: u32| if shared { lane } else { 3 * caller as u32 + lane };
            for (number, &(caller, lane, items, cost)) in requests.iter().enumerate() {
                add(&mut order, number as u64, CALLERS[caller], lane_of(caller, lane), items, cost);
                waiting[caller] += items as usize;
            }
            let most_of_a_pass = 50 * room as u64;
            let mut served = [0u64; 4];
            let mut seen = BTreeSet::new();
            while order.len() > 0 {
                let before = order.len();
                let batch = take(&mut order, room);
                prop_assert!(!batch.is_empty() && before - order.len() == batch.len());
                let lane = |request: u64| {
                    let (caller, lane, _, cost) = requests[request as usize];
                    (lane_of(caller, lane), cost)
                };
                let passed = lane(batch[0].0);
                prop_assert!(batch.iter().all(|(request, _)| lane(*request) == passed));
                if batch.len() < room {
                    prop_assert!(!order.lanes.contains_key(&passed), "room is left while the lane has more");
                }
                for &(request, index) in &batch {
                    prop_assert!(seen.insert((request, index)));
                    let (caller, _, _, cost) = requests[request as usize];
                    served[caller] += cost;
                    waiting[caller] -= 1;
                }
                for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
                    if !shared && waiting[a] > 0 {
                        prop_assert!(served[b] <= served[a] + most_of_a_pass, "{served:?}");
                    }
                }
            }
            prop_assert_eq!(seen.len() as u32, requests.iter().map(|r| r.2).sum::<u32>());
        }
    }
}
