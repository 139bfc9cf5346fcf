//! Counts and times of what happens to requests, canvases and passes, for whoever watches over the server.

use std::hash::Hash;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::admission::NoRoom;
use super::{AdmitError, Failure, Timings};
use crate::network::NetworkError;

/// Why a request was refused.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Refusal {
    reason: &'static str,
}

/// Why a pass has failed.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Fault {
    reason: &'static str,
}

/// How a canvas has ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ending {
    outcome: &'static str,
}

/// Part of the time of a pass, or of a canvas.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Part {
    part: &'static str,
}

type Seconds = Family<Part, Histogram, fn() -> Histogram>;

/// Reasons why requests are refused.
const REFUSALS: [&str; 9] = [
    "server_full",
    "caller_share",
    "too_much",
    "running",
    "id_exists",
    "bad_state",
    "model_failed",
    "deadline",
    "draining",
];

/// Reasons why passes fail.
const FAULTS: [&str; 4] = ["error", "memory", "model", "hung"];

/// Outcomes of canvases.
const OUTCOMES: [&str; 10] = [
    "done",
    "finished_early",
    "scored",
    "cancelled",
    "nothing_allowed",
    "deadline",
    "shut_down",
    "abandoned",
    "model_failed",
    "failed",
];

/// A family that has a series of 0 for all of `values`: the first count of a series that is not there yet is no increase.
fn from_zero<L: Clone + Hash + Eq>(
    values: &[&'static str],
    label: impl Fn(&'static str) -> L,
) -> Family<L, Counter> {
    let family = Family::default();
    for value in values {
        drop(family.get_or_create(&label(value)));
    }
    family
}

/// From 0.25 ms to 16 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_25, 2.0, 17))
}

/// Numbers of one engine, which only grow.
#[derive(Debug)]
pub struct Counters {
    pass_seconds: Seconds,
    pass_canvases: Histogram,
    pass_rows: Histogram,
    passes_failed: Family<Fault, Counter>,
    canvas_seconds: Seconds,
    canvas_evaluations: Histogram,
    tokens: Counter,

    refused: Family<Refusal, Counter>,
    ended: Family<Ending, Counter>,
    evaluations: Counter,
    given_back: Counter,
    unread: Counter,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            pass_seconds: Family::new_with_constructor(seconds),
            pass_canvases: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            pass_rows: Histogram::new(exponential_buckets(1.0, 4.0, 9)),
            passes_failed: from_zero(&FAULTS, |reason| Fault { reason }),
            canvas_seconds: Family::new_with_constructor(seconds),
            canvas_evaluations: Histogram::new(exponential_buckets(1.0, 2.0, 13)),
            tokens: Counter::default(),
            refused: from_zero(&REFUSALS, |reason| Refusal { reason }),
            ended: from_zero(&OUTCOMES, |outcome| Ending { outcome }),
            evaluations: Counter::default(),
            given_back: Counter::default(),
            unread: Counter::default(),
        }
    }
}

impl Counters {
    /// Makes all of them part of `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "pass",
            "Time of a pass: in the network, and drawing tokens from what it gave",
            Unit::Seconds,
            self.pass_seconds.clone(),
        );
        registry.register(
            "pass_canvases",
            "Canvases, or parts of texts that are scored, that share a pass",
            self.pass_canvases.clone(),
        );
        registry.register(
            "pass_rows",
            "Positions of all its canvases that a pass is asked about",
            self.pass_rows.clone(),
        );
        registry.register(
            "passes_failed",
            "Passes that have failed: of a network that gave an error, ran out of memory, hung, or cannot be run at all",
            self.passes_failed.clone(),
        );
        registry.register_with_unit(
            "canvas",
            "Time of a finished canvas: waiting, in the network, drawing tokens (those of whole passes), and in all",
            Unit::Seconds,
            self.canvas_seconds.clone(),
        );
        registry.register(
            "canvas_evaluations",
            "Evaluations of a finished canvas",
            self.canvas_evaluations.clone(),
        );
        registry.register(
            "tokens",
            "Positions that finished canvases have filled",
            self.tokens.clone(),
        );
        let mut count = |name: &str, help: &str, counter: &Counter| {
            registry.register(name, help, counter.clone());
        };
        count(
            "evaluations",
            "Evaluations of canvases by networks",
            &self.evaluations,
        );
        count(
            "evaluations_given_back",
            "Evaluations that were admitted and turned out not to be needed",
            &self.given_back,
        );
        count(
            "streams_unread",
            "Streams that were ended because their client did not read them",
            &self.unread,
        );
        registry.register(
            "requests_refused",
            "Requests that were not admitted",
            self.refused.clone(),
        );
        registry.register("canvases_ended", "Canvases that have ended", self.ended.clone());
    }

    /// Counts a stream that was ended because its client did not read it.
    pub fn count_unread_stream(&self) {
        self.unread.inc();
    }

    pub(super) fn count_refusal(&self, error: &AdmitError) {
        let reason = match error {
            AdmitError::NoRoom(NoRoom::Server(_)) => "server_full",
            AdmitError::NoRoom(NoRoom::Caller(_)) => "caller_share",
            AdmitError::NoRoom(NoRoom::Request(_)) => "too_much",
            AdmitError::Running { .. } => "running",
            AdmitError::Exists(_) => "id_exists",
            AdmitError::State { .. } => "bad_state",
            AdmitError::Model { .. } => "model_failed",
            AdmitError::Deadline { .. } => "deadline",
            AdmitError::Draining => "draining",
        };
        self.refused.get_or_create(&Refusal { reason }).inc();
    }

    /// Counts a pass of `canvases` canvases and `rows` rows.
    pub(super) fn count_pass(&self, canvases: usize, rows: usize, [network, sampling]: [Duration; 2]) {
        for (part, time) in [("network", network), ("sampling", sampling)] {
            let seconds = self.pass_seconds.get_or_create(&Part { part });
            seconds.observe(time.as_secs_f64());
        }
        self.pass_canvases.observe(canvases as f64);
        self.pass_rows.observe(rows as f64);
    }

    /// Counts a pass that gave an error.
    pub(super) fn count_failed_pass(&self, error: &NetworkError) {
        self.count_fault(match error {
            NetworkError::Run(_) => "error",
            NetworkError::Memory(_) => "memory",
            NetworkError::Runtime(_)
            | NetworkError::Load(_)
            | NetworkError::Room { .. }
            | NetworkError::Contract(_) => "model",
        });
    }

    /// Counts a pass that does not stop.
    pub(super) fn count_hung_pass(&self) {
        self.count_fault("hung");
    }

    fn count_fault(&self, reason: &'static str) {
        self.passes_failed.get_or_create(&Fault { reason }).inc();
    }

    /// Counts a finished canvas that has filled `tokens` positions.
    pub(super) fn count_canvas(&self, evaluations: u32, tokens: usize, timings: &Timings) {
        for (part, time) in [
            ("queue", timings.queue),
            ("network", timings.network),
            ("sampling", timings.sampling),
            ("total", timings.total),
        ] {
            let seconds = self.canvas_seconds.get_or_create(&Part { part });
            seconds.observe(time.as_secs_f64());
        }
        self.canvas_evaluations.observe(f64::from(evaluations));
        self.tokens.inc_by(tokens as u64);
    }

    pub(super) fn count_done(&self, early: bool) {
        self.count_ending(if early { "finished_early" } else { "done" });
    }

    pub(super) fn count_failure(&self, failure: &Failure) {
        self.count_ending(match failure {
            Failure::Cancelled => "cancelled",
            Failure::NothingAllowed => "nothing_allowed",
            Failure::Deadline => "deadline",
            Failure::ShutDown => "shut_down",
            Failure::Abandoned => "abandoned",
            Failure::Model { .. } => "model_failed",
            Failure::Worker { .. } => "failed",
        });
    }

    pub(super) fn count_scored(&self) {
        self.count_ending("scored");
    }

    fn count_ending(&self, outcome: &'static str) {
        self.ended.get_or_create(&Ending { outcome }).inc();
    }

    /// Counts the evaluations of a step, and those that it made needless.
    pub(super) fn count_evaluations(&self, spent: u64, given_back: u64) {
        self.evaluations.inc_by(spent);
        self.given_back.inc_by(given_back);
    }
}
