//! What to scale by: a day of simulated pods under Kubernetes' autoscaler, which looks at the processor, at how many requests
//! a pod has, or at how many seconds of work.
//!
//! A pod shares its time evenly among its requests, as the engine does, and gets the next one where the least work waits. The
//! autoscaler is that of Kubernetes 1.31 (every 15 s, tolerance 10 %, at most twice as many or four more at once, down
//! only to the most of the last 300 s), with metrics that are a minute's means.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Seconds of one evaluation of the demo model, 128 positions on two cores.
const EVALUATION: f64 = 0.0084;
/// Seconds from the order for a pod to its start, and from there until its model is loaded.
const START: f64 = 20.0;
const LOAD: f64 = 10.0;
/// Between two looks of the autoscaler.
const LOOK: f64 = 15.0;
/// Looks whose mean a metric is.
const WINDOW: usize = 4;
/// Looks for which pods are kept.
const STABLE: usize = 20;
const TOLERANCE: f64 = 0.1;
const MIN_PODS: usize = 2;
const MAX_PODS: usize = 60;
/// Seconds of work that may wait on a pod; more is refused.
const MAX_QUEUE: f64 = 60.0;
const DAY: f64 = 86_400.0;

/// What a pod should have of each: the share of the time in which there is work, requests, and seconds of work. Where
/// several are looked at, the one decides that wants most pods.
type Targets = [Option<f64>; 3];

const TARGETS: [(&str, Targets); 9] = [
    ("processor 70 %", [Some(0.7), None, None]),
    ("processor 50 %", [Some(0.5), None, None]),
    ("2 requests", [None, Some(2.0), None]),
    ("8 requests", [None, Some(8.0), None]),
    ("2 s of work", [None, None, Some(2.0)]),
    ("10 s of work", [None, None, Some(10.0)]),
    ("70 %, 2 s of work", [Some(0.7), None, Some(2.0)]),
    ("70 %, 5 s of work", [Some(0.7), None, Some(5.0)]),
    ("70 %, 10 s of work", [Some(0.7), None, Some(10.0)]),
];

/// When requests come, and how long they are.
#[derive(Clone, Copy)]
enum Pattern {
    Steady,
    Daily,
    Bursty,
    HeavyTailed,
}

const PATTERNS: [(&str, Pattern); 4] = [
    ("steady", Pattern::Steady),
    ("daily", Pattern::Daily),
    ("bursty", Pattern::Bursty),
    ("heavy-tailed", Pattern::HeavyTailed),
];

struct Chance(ChaCha8Rng);

impl Chance {
    fn uniform(&mut self) -> f64 {
        // Above 0, for logarithms.
        ((self.0.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.uniform().ln()
    }
}

/// Times and seconds of work of a day's requests.
fn requests(pattern: Pattern) -> Vec<(f64, f64)> {
    let mut chance = Chance(ChaCha8Rng::seed_from_u64(1));
    // Bursts: a few minutes of ten times as much.
    let mut bursts = Vec::new();
    let mut at = 0.0;
    while at < DAY {
        at += chance.exponential(1800.0);
        let end = at + chance.exponential(180.0);
        bursts.push((at, end));
        at = end;
    }
    let rate = |time: f64| match pattern {
        Pattern::Steady | Pattern::HeavyTailed => 20.0,
        // From 4 at night to 36 at noon.
        Pattern::Daily => 20.0 - 16.0 * (time / DAY * std::f64::consts::TAU).cos(),
        Pattern::Bursty if bursts.iter().any(|(from, to)| (*from..*to).contains(&time)) => 60.0,
        Pattern::Bursty => 6.0,
    };
    let (mut all, mut time) = (Vec::new(), 0.0);
    while time < DAY {
        // Thinned from the highest rate.
        time += chance.exponential(1.0 / 60.0);
        if chance.uniform() > rate(time) / 60.0 {
            continue;
        }
        let evaluations = match pattern {
            // Pareto from 12 evaluations, of index 1.3: a third of the work is in one request of a hundred.
            Pattern::HeavyTailed => (12.0 * chance.uniform().powf(-1.0 / 1.3)).min(4096.0),
            Pattern::Steady | Pattern::Daily | Pattern::Bursty => match chance.uniform() {
                u if u < 0.3 => 16.0,
                u if u < 0.8 => 32.0,
                _ => 128.0,
            },
        };
        all.push((time, evaluations * EVALUATION));
    }
    all
}

/// A pod; times are on a clock of its own that goes slower the more requests share it.
#[derive(Default)]
struct Pod {
    ready_at: f64,
    drains: bool,
    clock: f64,
    now: f64,
    /// When each request is done on the pod's clock, in nanoseconds, and when it came.
    running: BinaryHeap<Reverse<(u64, u64)>>,
    work: f64,
    busy: f64,
}

impl Pod {
    /// Goes on until `time`; tells how long each request took that is done.
    fn advance(&mut self, time: f64, done: &mut Vec<f64>) {
        while let Some(Reverse((due, came))) = self.running.peek().copied() {
            let due = due as f64 * 1e-9;
            let at = self.now + (due - self.clock).max(0.0) * self.running.len() as f64;
            if at > time {
                break;
            }
            self.pass(at);
            self.clock = due;
            self.running.pop();
            done.push(at - came as f64 * 1e-9);
        }
        self.pass(time);
    }

    fn pass(&mut self, time: f64) {
        let passed = (time - self.now).max(0.0);
        if !self.running.is_empty() {
            self.clock += passed / self.running.len() as f64;
            self.work = (self.work - passed).max(0.0);
            self.busy += passed;
        }
        self.now = self.now.max(time);
    }

    fn take(&mut self, time: f64, work: f64) {
        let due = ((self.clock + work) * 1e9) as u64;
        self.running.push(Reverse((due, (time * 1e9) as u64)));
        self.work += work;
    }
}

/// How a day went.
struct Outcome {
    median: f64,
    tail: f64,
    refused: f64,
    pod_hours: f64,
}

fn simulate(requests: &[(f64, f64)], targets: Targets) -> Outcome {
    let mut pods: Vec<Pod> = (0..MIN_PODS).map(|_| Pod::default()).collect();
    let (mut done, mut refused, mut pod_seconds) = (Vec::new(), 0usize, 0.0);
    let (mut seen, mut wanted) = (VecDeque::<[f64; 3]>::new(), VecDeque::new());
    let mut look = LOOK;
    for &(time, work) in requests {
        while look <= time {
            for pod in &mut pods {
                pod.advance(look, &mut done);
            }
            pod_seconds += LOOK * pods.len() as f64;
            pods.retain(|pod| !pod.drains || !pod.running.is_empty());
            let ready = pods.iter().filter(|pod| !pod.drains && pod.ready_at <= look);
            let number = ready.clone().count().max(1) as f64;
            let mut means = [0.0; 3];
            for pod in ready {
                let own = [pod.busy / LOOK, pod.running.len() as f64, pod.work];
                for (mean, own) in means.iter_mut().zip(own) {
                    *mean += own / number;
                }
            }
            seen.push_front(means);
            seen.truncate(WINDOW);
            let current = pods.iter().filter(|pod| !pod.drains).count();
            let asked = targets.iter().enumerate().filter_map(|(metric, target)| {
                let mean = seen.iter().map(|seen| seen[metric]).sum::<f64>() / seen.len() as f64;
                let ratio = mean / (*target)?;
                let as_many = (ratio - 1.0).abs() <= TOLERANCE;
                Some(if as_many {
                    current
                } else {
                    (number * ratio).ceil() as usize
                })
            });
            let asked = asked.max().unwrap_or(current);
            let most = (2 * current).max(current + 4).min(MAX_PODS);
            wanted.push_front(asked.clamp(MIN_PODS, most));
            wanted.truncate(STABLE);
            let next = wanted.iter().copied().max().unwrap_or(current).min(most);
            for _ in current..next {
                pods.push(Pod {
                    ready_at: look + START + LOAD,
                    now: look,
                    ..Pod::default()
                });
            }
            for _ in next..current {
                // Those that have not begun go first, then those with the least to do.
                let least = pods.iter_mut().filter(|pod| !pod.drains).min_by(|a, b| {
                    (a.ready_at <= look, a.work)
                        .partial_cmp(&(b.ready_at <= look, b.work))
                        .unwrap()
                });
                if let Some(pod) = least {
                    pod.drains = true;
                }
            }
            for pod in &mut pods {
                pod.busy = 0.0;
            }
            look += LOOK;
        }
        for pod in &mut pods {
            pod.advance(time, &mut done);
        }
        let open = pods.iter_mut().filter(|pod| !pod.drains && pod.ready_at <= time);
        match open.min_by(|a, b| a.work.total_cmp(&b.work)) {
            Some(pod) if pod.work + work <= MAX_QUEUE => pod.take(time, work),
            _ => refused += 1,
        }
    }
    done.sort_by(f64::total_cmp);
    let at = |share: f64| done[((done.len() - 1) as f64 * share) as usize];
    Outcome {
        median: at(0.5),
        tail: at(0.99),
        refused: refused as f64 / requests.len() as f64,
        pod_hours: pod_seconds / 3600.0,
    }
}

/// Simulates all patterns with all metrics; prints the table, and draws it where `plot` says.
pub(crate) fn run(plot: Option<&Path>) -> Result<()> {
    let mut all = Vec::new();
    println!("| arrivals | scaled by | median, s | 99th percentile, s | refused | pod hours |");
    println!("|---|---|---|---|---|---|");
    for (pattern, arrivals) in PATTERNS {
        let requests = requests(arrivals);
        let work: f64 = requests.iter().map(|(_, work)| work).sum();
        println!(
            "| {pattern}, {} requests | nothing idle | | | | {:.0} |",
            requests.len(),
            work / 3600.0
        );
        let mut outcomes = Vec::new();
        for (name, targets) in TARGETS {
            let outcome = simulate(&requests, targets);
            println!(
                "| {pattern} | {name} | {:.2} | {:.2} | {:.2} % | {:.0} |",
                outcome.median,
                outcome.tail,
                100.0 * outcome.refused,
                outcome.pod_hours
            );
            outcomes.push(outcome);
        }
        all.push((pattern, outcomes));
    }
    match plot {
        Some(path) => draw(path, &all),
        None => Ok(()),
    }
}

/// Tail latency over what it costs, a panel for each pattern.
fn draw(path: &Path, all: &[(&str, Vec<Outcome>)]) -> Result<()> {
    let area = SVGBackend::new(path, (900, 720)).into_drawing_area();
    area.fill(&WHITE)?;
    for (panel, (pattern, outcomes)) in area.split_evenly((2, 2)).iter().zip(all) {
        let ends = |of: fn(&Outcome) -> f64| {
            let values = outcomes.iter().map(of);
            let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(l, h), v| (l.min(v), h.max(v)));
            (0.85 * low, 1.15 * high)
        };
        let (hours, tails) = (ends(|o| o.pod_hours), ends(|o| o.tail));
        let mut chart = ChartBuilder::on(panel)
            .caption(pattern, ("sans-serif", 16))
            .margin(12)
            .x_label_area_size(32)
            .y_label_area_size(46)
            .build_cartesian_2d(hours.0..hours.1, (tails.0..tails.1).log_scale())?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("pod hours in a day")
            .y_desc("99th percentile, s")
            .draw()?;
        for (index, (outcome, (name, targets))) in outcomes.iter().zip(TARGETS).enumerate() {
            let looked_at = targets.map(|target| target.is_some());
            let color = Palette99::pick(match looked_at {
                [true, _, true] => 3,
                [true, ..] => 0,
                [_, true, _] => 1,
                [..] => 2,
            });
            let at = (outcome.pod_hours, outcome.tail);
            chart.draw_series([Circle::new(at, 4, color.filled())])?;
            // Labels of points that coincide stand above each other.
            let place = |o: &Outcome| {
                [
                    o.pod_hours / (hours.1 - hours.0),
                    (o.tail.ln()) / (tails.1 / tails.0).ln(),
                ]
            };
            let near = |other: &&Outcome| {
                let (one, other) = (place(outcome), place(other));
                (one[0] - other[0]).abs() < 0.2 && (one[1] - other[1]).abs() < 0.06
            };
            let above = outcomes[..index].iter().filter(near).count() as i32;
            let below = -11 * above - 14;
            chart.draw_series([EmptyElement::at(at) + Text::new(name, (6, below), ("sans-serif", 11))])?;
        }
    }
    area.present()?;
    Ok(())
}
