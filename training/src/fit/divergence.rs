//! Whether a run still learns.
//!
//! The loss of single steps is noisy, so that a run is judged by its smoothed loss: an exponential
//! average over about the last 50 steps, divided by the sum of its weights. A run has **exploded**
//! when the smoothed loss stays above `run.explosion_factor` times its best for
//! `run.explosion_steps` steps on end; from the first of those steps on it is suspect, and a suspect
//! run writes no checkpoints.

use serde::{Deserialize, Serialize};

use crate::config::RunSection;

/// What the smoothed loss keeps of its past at every step.
const MEMORY: f64 = 0.98;
/// Steps before the smoothed loss is steady enough to be the best.
const SETTLED: u64 = 50;

/// The course of the loss so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DivergenceWatch {
    /// Average of losses, not yet divided by `weight`.
    sum: f64,
    weight: f64,
    steps: u64,
    /// Lowest smoothed loss.
    best: Option<f64>,
    /// Steps since the smoothed loss rose above the limit.
    high: u64,
}

impl DivergenceWatch {
    /// After one more loss.
    #[must_use]
    pub fn observe(self, loss: f64, run: &RunSection) -> Self {
        let mut next = Self {
            sum: MEMORY * self.sum + (1.0 - MEMORY) * loss,
            weight: MEMORY * self.weight + (1.0 - MEMORY),
            steps: self.steps + 1,
            ..self
        };
        let smoothed = next.smoothed();
        let limit = self.best.map(|best| run.explosion_factor * best);
        next.high = if limit.is_some_and(|limit| smoothed > limit) {
            self.high + 1
        } else {
            0
        };
        if next.steps >= SETTLED && self.best.is_none_or(|best| smoothed < best) {
            next.best = Some(smoothed);
        }
        next
    }

    /// The smoothed loss; 0 before the first.
    pub fn smoothed(&self) -> f64 {
        if self.weight > 0.0 {
            self.sum / self.weight
        } else {
            0.0
        }
    }

    /// The lowest smoothed loss, once there were enough losses.
    pub fn best(&self) -> Option<f64> {
        self.best
    }

    /// Whether the loss is too high to keep what was learned.
    pub fn is_suspect(&self) -> bool {
        self.high > 0
    }

    /// Whether the loss has been too high for too long.
    pub fn has_exploded(&self, run: &RunSection) -> bool {
        self.high >= run.explosion_steps
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn run() -> RunSection {
        toml::from_str(
            r#"
            seed = 1
            batch_size = 1
            steps = 1000
            checkpoint_every = 1
            validate_every = 1
            explosion_factor = 2.0
            explosion_steps = 20
            directory = "-"
            "#,
        )
        .unwrap()
    }

    fn after(watch: DivergenceWatch, losses: impl IntoIterator<Item = f64>) -> DivergenceWatch {
        losses
            .into_iter()
            .fold(watch, |watch, loss| watch.observe(loss, &run()))
    }

    #[test]
    fn a_constant_loss_is_its_own_average() {
        let watch = after(DivergenceWatch::default(), [5.0; 3]);
        assert!((watch.smoothed() - 5.0).abs() < 1e-12);
        assert_eq!(watch.best(), None, "three steps say little");
    }

    #[test]
    fn one_bad_step_is_forgiven_and_a_bad_course_is_not() {
        let good = after(DivergenceWatch::default(), [5.0; 100]);
        let blip = good.observe(100.0, &run());
        assert!(!blip.is_suspect(), "{blip:?}");

        let rising = after(good, [30.0; 25]);
        assert!(rising.is_suspect() && !rising.has_exploded(&run()), "{rising:?}");
        assert!(after(rising, [30.0; 15]).has_exploded(&run()));

        let recovered = after(rising, [5.0; 100]);
        assert!(!recovered.is_suspect(), "{recovered:?}");
    }
}
