//! Counts what is loaded.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Numbers of all loads of networks, which only grow.
#[derive(Debug)]
pub struct LoadCounters {
    seconds: Histogram,
    failed: Counter,
}

impl Default for LoadCounters {
    fn default() -> Self {
        Self {
            // From 10 ms to 5 minutes.
            seconds: Histogram::new(exponential_buckets(0.01, 2.0, 16)),
            failed: Counter::default(),
        }
    }
}

impl LoadCounters {
    /// Makes all of them part of `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "model_load",
            "Time in which a network of a model was loaded",
            Unit::Seconds,
            self.seconds.clone(),
        );
        registry.register(
            "model_loads_failed",
            "Networks of models that could not be loaded",
            self.failed.clone(),
        );
    }

    /// Counts a load that took `time`.
    pub(super) fn count(&self, time: Duration, went_well: bool) {
        if went_well {
            self.seconds.observe(time.as_secs_f64());
        } else {
            self.failed.inc();
        }
    }
}
