//! Who is next: turns, shares and debts, over random arrivals on a simulated clock.

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
                weight: 1,
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
            weight: 1,
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
        worthwhile: usize::MAX,
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
fn passes_grow_for_nothing_only_where_nobody_else_waits_for_their_end() {
    let mut order = Order::new();
    let sizes = |order: &mut Order, passes: usize| -> Vec<usize> {
        let pass = |(_, cost): &Lane| Pass {
            worthwhile: 2,
            ..pass(8)(&(0, *cost))
        };
        (0..passes).map(|_| order.take(0, pass, light).len()).collect()
    };
    let cost = LATELY / 64;
    add(&mut order, 1, "greedy", 0, 200, cost);
    assert_eq!(sizes(&mut order, 2), [8, 8], "alone");
    add(&mut order, 2, "modest", 1, 3, cost);
    assert_eq!(
        sizes(&mut order, 3),
        [2, 1, 2],
        "two of one, one that is left of the other"
    );
    (0..3).for_each(|_| order.leave(key(2)));
    // One that asks again and again meets short passes at once, and long ones only after a while.
    assert_eq!(sizes(&mut order, 16), [2; 16]);
    assert!(sizes(&mut order, 20).ends_with(&[8, 8]));
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

/// Gives one evaluation, after which its canvas is done.
fn served_first(order: &mut Order) -> u64 {
    let request = take(order, 1)[0].0;
    order.leave(key(request));
    request
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
                served_first(&mut order) == 0
            })
            .count();
        assert!(long >= least, "a short one every {every}: {long}");
    }
}

/// Cost of a pass of the long requests, and of an evaluation of a short one, of which it needs four.
const LONG_PASS: u64 = 40;
const SHORT: u64 = 3;

/// One worker beside 32 long requests of "long": 500 short ones, each `idle` after the one before it has ended.
/// Gives how long each took, and the share of the time in which a short one was there that the long ones had.
fn short_requests_beside_long_ones(
    caller: impl Fn(u64) -> &'static str,
    idle: impl Fn(u64) -> u64,
) -> (Vec<u64>, f64) {
    let mut order = Order::new();
    for request in 0..32 {
        add(&mut order, request, "long", 0, 1, LONG_PASS / 4);
    }
    let (mut clock, mut arrives, mut left) = (0, 5 * LONG_PASS, 0);
    let (mut times, mut of_long, mut of_all) = (Vec::new(), 0, 0);
    let mut short = 100;
    while times.len() < 500 {
        let batch = take(&mut order, 4);
        let cost = if batch[0].0 == short { SHORT } else { LONG_PASS };
        let began = clock.max(arrives);
        clock += cost;
        if clock > arrives && left == 0 {
            add(&mut order, short, caller(short), 1, 1, SHORT);
            left = 4;
        }
        if left > 0 {
            of_all += clock - began;
            of_long += if cost == LONG_PASS { clock - began } else { 0 };
        }
        for (request, index) in batch {
            if request < 100 {
                order.push(key(request), index, (request, index)).unwrap();
                continue;
            }
            left -= 1;
            if left > 0 {
                order.push(key(request), index, (request, index)).unwrap();
            } else {
                order.leave(key(request));
                times.push(clock - arrives);
                short += 1;
                arrives = clock + idle(short);
            }
        }
    }
    (times, of_long as f64 / of_all as f64)
}

#[test]
fn callers_are_given_by_their_weight() {
    let mut order = Order::new();
    for (request, caller, weight) in [(1, "light", 1), (2, "heavy", 3)] {
        for index in 0..100 {
            let description = FlowDescription {
                caller,
                weight,
                lane: (request as u32, 30),
                urgency: Urgency::default(),
            };
            order.join(key(request), &description);
            order.push(key(request), index, (request, index)).unwrap();
        }
    }
    let heavy = (0..80).filter(|_| take(&mut order, 1)[0].0 == 2).count();
    assert_eq!(heavy, 60);
    // Whoever comes while both wait begins at the present, whatever their weights.
    add(&mut order, 3, "new", 3, 100, 30);
    let mut given = [0; 4];
    (0..50).for_each(|_| given[take(&mut order, 1)[0].0 as usize] += 1);
    assert_eq!(given, [0, 10, 30, 10]);
}

/// Alone a short request takes 12; a pass of the long ones, 40. That which runs when it comes has to end, one more may
/// come between, and with its own caller's two more.
#[test]
fn a_short_request_waits_for_the_pass_that_runs_and_long_ones_keep_their_share() {
    let back_to_back = |_: u64| 1u64;
    let scattered = |request: u64| 1 + request * 7919 % 1000;
    for (who, passes) in [("another", 2), ("new each time", 2), ("long", 4)] {
        let caller = |request: u64| -> &'static str {
            if who == "new each time" {
                request.to_string().leak()
            } else {
                who
            }
        };
        for idle in [&back_to_back as &dyn Fn(u64) -> u64, &scattered] {
            let (mut times, share_of_long) = short_requests_beside_long_ones(caller, idle);
            times.sort_unstable();
            let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
            assert!(median <= LONG_PASS + 4 * SHORT, "{who}: {median}");
            assert!(most <= passes * LONG_PASS + 4 * SHORT, "{who}: {most}");
            assert!(share_of_long >= 0.5, "{who}: {share_of_long}");
        }
    }
}

/// A caller who came first, beside a new one every turn: it is not passed by for ever.
#[test]
fn endless_newcomers_do_not_starve_who_waits() {
    let mut order = Order::new();
    add(&mut order, 0, "long", 0, 100, 10);
    let long = (1..=100u64)
        .filter(|turn| {
            add(&mut order, *turn, turn.to_string().leak(), 1, 1, 10);
            served_first(&mut order) == 0
        })
        .count();
    assert!(long >= 5, "{long}");
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
    let of = |batch: Vec<(u64, u32)>| -> Vec<u64> { batch.into_iter().map(|(request, _)| request).collect() };
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
            worthwhile: usize::MAX,
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
            weight: 1,
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
    /// Requests that have arrived.
    arrived: usize,
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

    fn arrivals(&mut self, requests: &[Arrival]) {
        while requests
            .get(self.arrived)
            .is_some_and(|request| request.0 <= self.clock)
        {
            self.arrive(self.arrived as u64, requests);
            self.arrived += 1;
        }
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
        let cost_of = |&(request, _): &(u64, u32)| requests[request as usize].4;
        self.clock += batch.iter().map(cost_of).sum::<u64>();
        // What arrives while the pass runs waits before what comes back from it.
        self.arrivals(requests);
        for &(request, index) in &batch {
            let (_, caller, _, _, cost) = requests[request as usize];
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
    /// than two passes and a half since the one that ran when both did began.
    #[test]
    fn arrivals_put_nobody_back_by_more_than_a_pass(
        mut requests in prop::collection::vec((0u64..3000, 0usize..4, 1u32..8, 1u32..12, 1u64..50), 1..20),
        room in 1usize..5,
    ) {
        requests.sort_unstable();
        let mut simulation = Simulation {
            order: Order::new(),
            clock: 0,
            arrived: 0,
            left: BTreeMap::new(),
            served: [0; 4],
            ahead: [[0; 4]; 4],
        };
        let most_of_a_pass = 50 * room as i64;
        let mut busy = 0;
        loop {
            simulation.arrivals(&requests);
            if simulation.left.is_empty() {
                let Some(next) = requests.get(simulation.arrived) else { break };
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
                    prop_assert!(ahead <= 5 * most_of_a_pass / 2, "{} is {ahead} ahead of {}", CALLERS[b], CALLERS[a]);
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
