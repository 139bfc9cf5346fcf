//! Entropy-bounded: as many of the surest positions at once as their entropies allow (arXiv 2505.24857).
//!
//! The sum of entropies less the largest bounds what is lost by taking the positions for independent. A heuristic
//! like [`confidence`](super::confidence), for absorbing graphs.

use super::TimeGrid;
use super::confidence::{
    all_masked, ascending, even_share, set_some, steps, time_of_the_masked, uncertainties,
};
use super::evaluation::{Candidate, CanvasView, Commit, Evaluation, Sampler, Uncertainty, something_is_left};
use crate::diffusion::Process;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct EntropyBounded {
    /// The noise process that is reversed.
    pub process: Process,
    /// How many steps there are at most; their times are those of the share that is masked.
    pub grid: TimeGrid,
    /// Bound on the sum of a step's entropies, the largest left out; in nats, from 0.
    pub bound: f64,
}

impl Sampler for EntropyBounded {
    fn steps(&self, gaps: usize) -> u32 {
        steps(self.grid, gaps)
    }

    fn evaluation(&self, canvas: &CanvasView<'_>) -> Evaluation {
        all_masked(&self.process, canvas, Uncertainty::Entropy)
    }

    fn commit(&self, canvas: &CanvasView<'_>, evaluation: &Evaluation, candidates: Vec<Candidate>) -> Commit {
        let steps = self.steps(canvas.gaps);
        // Few steps overrule the bound.
        let least = even_share(candidates.len(), steps.saturating_sub(canvas.step));
        let taken = within_entropy(&uncertainties(&candidates), self.bound, least);
        set_some(evaluation, &candidates, &taken, steps)
    }

    /// Every one fills a position.
    fn evaluations_left(&self, canvas: &CanvasView<'_>) -> u64 {
        let steps = self.steps(canvas.gaps).saturating_sub(canvas.step);
        let masked = canvas.movable(self.process.graph.mask()).count() as u64;
        masked.min(steps.into())
    }

    fn can_be(&self, canvas: &CanvasView<'_>) -> bool {
        something_is_left(&self.process, canvas)
    }

    fn time(&self, canvas: &CanvasView<'_>) -> f64 {
        time_of_the_masked(&self.process, canvas)
    }
}

/// Indices into `entropies` of as many of the surest positions as keep `sum - maximum` of their entropies within
/// `bound` nats, and of `least` at least (entropy-bounded sampler, algorithm 1 of arXiv 2505.24857).
///
/// The sum less the maximum bounds what is lost by taking the positions for independent.
fn within_entropy(entropies: &[f64], bound: f64, least: usize) -> Vec<usize> {
    let mut order = ascending(entropies);
    let mut sum = 0.0;
    let fit = order
        .iter()
        .take_while(|&&index| {
            // In ascending order the newest is the maximum.
            let without_maximum = sum;
            sum += entropies[index];
            without_maximum <= bound
        })
        .count();
    order.truncate(fit.max(least));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn entropy_is_spent_but_not_the_largest() {
        let entropies = [1.0, 0.2, 0.3, 5.0];
        // 0.2 | 0.2 + 0.3 less 0.3 | 1.5 less 1.0 | 6.5 less 5.0
        assert_eq!(within_entropy(&entropies, 0.1, 1), [1]);
        assert_eq!(within_entropy(&entropies, 0.2, 1), [1, 2]);
        assert_eq!(within_entropy(&entropies, 0.5, 1), [1, 2, 0]);
        assert_eq!(within_entropy(&entropies, 1.5, 1), [1, 2, 0, 3]);
        assert_eq!(within_entropy(&entropies, 0.1, 3), [1, 2, 0]);
    }

    proptest! {
        #[test]
        fn someone_is_always_within(entropies in prop::collection::vec(0.0f64..9.0, 1..40), bound in 0.0f64..20.0) {
            let chosen = within_entropy(&entropies, bound, 1);
            let of = |i: &usize| entropies[*i];
            let (sum, most) = (chosen.iter().map(of).sum::<f64>(), chosen.iter().map(of).fold(0.0, f64::max));
            prop_assert!(!chosen.is_empty() && sum - most <= bound + 1e-9);
        }
    }
}
