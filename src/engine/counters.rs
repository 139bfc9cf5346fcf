//! Counts of what happens to requests and canvases, for whoever watches over the server.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::admission::NoRoom;
use super::{AdmitError, Failure};

/// Why a request was refused.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Refusal {
    reason: &'static str,
}

/// How a canvas has ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ending {
    outcome: &'static str,
}

/// Counters of one engine, which only grow.
#[derive(Debug, Default)]
pub struct Counters {
    refused: Family<Refusal, Counter>,
    ended: Family<Ending, Counter>,
    evaluations: Counter,
    given_back: Counter,
    unread: Counter,
}

impl Counters {
    /// Makes all counters part of `registry`.
    pub fn register(&self, registry: &mut Registry) {
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
