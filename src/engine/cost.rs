//! What an evaluation costs: measured, per model and length, and predicted from that.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::models::ServedModel;
use crate::sync::Mutex;

/// Before anything is measured: what an evaluation of one canvas is taken to cost.
const UNKNOWN: Duration = Duration::from_millis(5);

/// How much slower than the mean a pass is taken to be, at most.
const SLOWER: f64 = 2.0;
/// How long a mean is believed by which requests are refused and nothing is measured, and what is left of it then.
const BELIEVED: Duration = Duration::from_secs(1);
const DOUBTED: f64 = 0.9;

/// Measured times, kept for lengths up to each power of two: a caller cannot make this grow.
#[derive(Debug, Default)]
pub(super) struct Costs {
    measured: Mutex<HashMap<(usize, u32), Mean>>,
}

#[derive(Clone, Copy, Debug)]
struct Mean {
    /// Nanoseconds per token of a canvas.
    per_token: f64,
    /// When it was last measured, or doubted.
    at: Instant,
}

impl Costs {
    /// Takes note of a pass of `canvases` canvases of `length`.
    pub(super) fn measured(&self, model: &ServedModel, length: usize, canvases: usize, pass: Duration) {
        let per_token = pass.as_nanos() as f64 / (canvases.max(1) * length.max(1)) as f64;
        let mut measured = self.measured.lock();
        measured
            .entry((model.address(), bucket(length)))
            // A pass that the system kept waiting says little of the next one: what counts is how many are slower,
            // not by how much.
            .and_modify(|mean| {
                mean.per_token += (per_token.min(SLOWER * mean.per_token) - mean.per_token) / 8.0;
                mean.at = Instant::now();
            })
            .or_insert(Mean {
                per_token,
                at: Instant::now(),
            });
    }

    /// Takes note that a request was refused on a prediction, `now`: as long as nothing runs nothing is measured, and
    /// one bad spell would be believed for ever.
    pub(super) fn doubt(&self, model: &ServedModel, length: usize, now: Instant) {
        let mut measured = self.measured.lock();
        let mean = measured.get_mut(&(model.address(), bucket(length)));
        if let Some(mean) = mean.filter(|mean| now.saturating_duration_since(mean.at) >= BELIEVED) {
            mean.per_token *= DOUBTED;
            mean.at = now;
        }
    }

    /// Nanoseconds that an evaluation of one canvas of `length` will take, at least 1; a guess where nothing of
    /// the model is measured.
    pub(super) fn predicted(&self, model: &ServedModel, length: usize) -> u64 {
        self.known(model.address(), length)
            .unwrap_or(UNKNOWN.as_nanos() as u64)
    }

    /// Forgets a model that is not served any more: another can come to lie at its address.
    pub(super) fn forget(&self, model: &ServedModel) {
        let address = model.address();
        self.measured.lock().retain(|(of, _), _| *of != address);
    }

    /// The same for the model at this address, where anything of it is measured.
    pub(super) fn known(&self, model: usize, length: usize) -> Option<u64> {
        let measured = self.measured.lock();
        let bucket = bucket(length);
        // Of other lengths the nearest is the best guess that there is.
        let nearest = measured
            .iter()
            .filter(|((of, _), _)| *of == model)
            .min_by_key(|((_, at), _)| (at.abs_diff(bucket), *at))
            .map(|(_, mean)| mean.per_token * length as f64);
        // Nor does a canvas cost more than a longer one, which few slow passes could make it seem.
        let longer = measured
            .iter()
            .filter(|((of, at), _)| *of == model && *at > bucket)
            .map(|((_, at), mean)| mean.per_token * (1u64 << at) as f64);
        let nanos = longer.chain(nearest).reduce(f64::min)?;
        Some((nanos as u64).max(1))
    }
}

fn bucket(length: usize) -> u32 {
    length.max(1).next_power_of_two().ilog2()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{manifest, model_of};
    use super::*;
    use crate::diffusion::GraphKind;

    #[test]
    fn predictions_follow_what_was_measured_by_model_and_length() {
        let costs = Costs::default();
        let [fast, slow] = [(); 2].map(|()| model_of(manifest(GraphKind::Absorbing)));
        assert_eq!(
            costs.predicted(&fast, 128),
            5_000_000,
            "a guess before the first pass"
        );
        for _ in 0..64 {
            costs.measured(&fast, 128, 4, Duration::from_micros(512));
            costs.measured(&slow, 128, 1, Duration::from_millis(128));
        }
        assert_eq!(costs.predicted(&fast, 128), 128_000);
        assert_eq!(
            costs.predicted(&fast, 16),
            16_000,
            "by length, where nothing nearer is known"
        );
        assert_eq!(costs.predicted(&slow, 64), 64_000_000);
        costs.measured(&fast, 16, 1, Duration::from_micros(64));
        assert_eq!(
            costs.predicted(&fast, 16),
            64_000,
            "short canvases cost more a token"
        );
        assert_eq!(costs.predicted(&fast, 128), 128_000);
        let later = Instant::now() + BELIEVED;
        costs.doubt(&fast, 128, Instant::now() + BELIEVED / 2);
        assert_eq!(costs.predicted(&fast, 128), 128_000, "measured a moment ago");
        costs.doubt(&fast, 128, later);
        costs.doubt(&fast, 128, later);
        assert_eq!(costs.predicted(&fast, 128), 115_200, "doubted once a second");
        for _ in 0..64 {
            costs.measured(&fast, 128, 4, Duration::from_micros(512));
        }
        costs.measured(&fast, 32, 1, Duration::from_secs(1));
        assert!(
            costs.predicted(&fast, 32).abs_diff(128_000) < 100,
            "no more than a longer one"
        );
    }
}
