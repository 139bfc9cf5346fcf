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

/// Passes of up to 1, 2, 4 canvases and so on are told apart, and those beyond taken for the largest.
const SIZES: usize = 16;
/// A pass is worth its length as long as a larger one saves more than the tenth part of an evaluation.
const WORTH: f64 = 1.1;
/// How long it is believed what passes of a size cost, if there were none since.
const KNOWN: Duration = Duration::from_secs(30);

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
    /// The same by the size of the pass.
    by_size: [Option<OfSize>; SIZES],
}

/// What passes of about one size cost.
#[derive(Clone, Copy, Debug)]
struct OfSize {
    /// Nanoseconds per token of a canvas.
    per_token: f64,
    measured: Instant,
}

/// The next mean after `measured`. A pass that the system kept waiting says little of the next one: what counts is
/// how many are slower, not by how much.
fn follow(mean: f64, measured: f64) -> f64 {
    mean + (measured.min(SLOWER * mean) - mean) / 8.0
}

impl Mean {
    fn new(now: Instant) -> Self {
        Self {
            per_token: 0.0,
            at: now,
            by_size: [None; SIZES],
        }
    }

    fn measure(&mut self, canvases: usize, per_token: f64, now: Instant) {
        self.per_token = if self.per_token > 0.0 {
            follow(self.per_token, per_token)
        } else {
            per_token
        };
        self.at = now;
        let size = (bucket(canvases) as usize).min(SIZES - 1);
        let before = self.by_size[size].filter(|of_size| of_size.is_known(now));
        self.by_size[size] = Some(OfSize {
            per_token: before.map_or(per_token, |before| follow(before.per_token, per_token)),
            measured: now,
        });
    }

    /// The smallest size beyond which sharing saves next to nothing; on the way there, the first that is yet to be tried.
    fn worthwhile(&self, now: Instant) -> usize {
        let known = |of_size: &Option<OfSize>| of_size.filter(|of_size| of_size.is_known(now));
        let least = self
            .by_size
            .iter()
            .filter_map(known)
            .map(|of_size| of_size.per_token);
        let least = least.fold(f64::INFINITY, f64::min);
        let mut sizes = self.by_size.iter().map(known).enumerate().peekable();
        while let Some((size, own)) = sizes.next() {
            let Some(own) = own else {
                return 1 << size;
            };
            match sizes.peek() {
                Some((next, None)) => return 1 << next,
                Some((_, Some(_))) if own.per_token > WORTH * least => {}
                Some((_, Some(_))) | None => return 1 << size,
            }
        }
        1
    }
}

impl OfSize {
    fn is_known(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.measured) < KNOWN
    }
}

impl Costs {
    /// Takes note of a pass of `canvases` canvases of `length`.
    pub(super) fn measured(&self, model: &ServedModel, length: usize, canvases: usize, pass: Duration) {
        let per_token = pass.as_nanos() as f64 / (canvases.max(1) * length.max(1)) as f64;
        let now = Instant::now();
        let mut measured = self.measured.lock();
        measured
            .entry((model.address(), bucket(length)))
            .or_insert_with(|| Mean::new(now))
            .measure(canvases, per_token, now);
    }

    /// How many canvases of `length` a pass of the model at this address is worth sharing among: with more of them an
    /// evaluation is hardly cheaper, and all of them wait for it longer.
    pub(super) fn worthwhile(&self, model: usize, length: usize) -> usize {
        let measured = self.measured.lock();
        let mean = measured.get(&(model, bucket(length)));
        mean.map_or(1, |mean| mean.worthwhile(Instant::now()))
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
    fn a_pass_is_worth_sharing_as_long_as_evaluations_get_cheaper() {
        let costs = Costs::default();
        let [flat, steep] = [(); 2].map(|()| model_of(manifest(GraphKind::Absorbing)));
        let passes = |model: &ServedModel, first: u64, more: u64| {
            let mut tried = Vec::new();
            for _ in 0..12 {
                let canvases = costs.worthwhile(model.address(), 128);
                let pass = Duration::from_micros(first + more * (canvases as u64 - 1));
                costs.measured(model, 128, canvases, pass);
                tried.push(canvases);
            }
            tried
        };
        // A processor's: what 4 share is 4 times as long. One and two are tried once.
        costs.measured(&flat, 128, 4, Duration::from_millis(40));
        assert_eq!(passes(&flat, 10_500, 9_900), [1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        // A GPU's, as far as it goes: each size is tried once, until they get no cheaper.
        let tried = passes(&steep, 5_000, 100);
        assert_eq!(tried, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 256, 256]);
        assert_eq!(costs.worthwhile(flat.address(), 16), 1, "nothing is known of it");
    }

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
