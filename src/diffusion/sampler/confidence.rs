//! Confidence: the same number of positions in every step, the surest first: those whose drawn tokens are likeliest
//! (MaskGIT, arXiv 2202.04200), or at which the likeliest token is furthest ahead of the second (the probability margin,
//! arXiv 2502.06768, section 4.1).
//!
//! Filling several positions from one evaluation takes them for independent; the surer the network is of them,
//! the less that costs. What comes out is not the law of the reverse process but likelier and less varied text:
//! a heuristic for few evaluations, on absorbing graphs.

use super::FINAL_TIME;
use super::evaluation::{
    Candidate, CanvasView, Commit, Evaluation, Law, Sampler, Uncertainty, something_is_left,
};
use super::{LEAVE, TimeGrid};
use crate::diffusion::Process;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Confidence {
    /// The noise process that is reversed.
    pub process: Process,
    /// How many steps there are; their times are those of the share that is masked.
    pub grid: TimeGrid,
    /// What "the surest" is said by.
    pub by: Uncertainty,
}

impl Sampler for Confidence {
    fn steps(&self, gaps: usize) -> u32 {
        steps(self.grid, gaps)
    }

    fn evaluation(&self, canvas: &CanvasView<'_>) -> Evaluation {
        all_masked(&self.process, canvas, self.by)
    }

    fn commit(&self, canvas: &CanvasView<'_>, evaluation: &Evaluation, candidates: Vec<Candidate>) -> Commit {
        let steps = self.steps(canvas.gaps);
        let share = even_share(candidates.len(), steps.saturating_sub(canvas.step));
        set_some(
            evaluation,
            &candidates,
            &surest(&uncertainties(&candidates), share),
            steps,
        )
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

/// Steps of a canvas with `gaps` positions: never more than there are positions.
pub(super) fn steps(grid: TimeGrid, gaps: usize) -> u32 {
    grid.steps.min(u32::try_from(gaps).unwrap_or(u32::MAX))
}

/// Asks for every masked position where it goes, and how unsure the network is of it.
pub(super) fn all_masked(process: &Process, canvas: &CanvasView<'_>, uncertainty: Uncertainty) -> Evaluation {
    let t = time_of_the_masked(process, canvas);
    Evaluation {
        step: canvas.step,
        draw: canvas.step,
        t,
        sigma: process.total_noise(t),
        law: Law::Affine(LEAVE),
        uncertainty,
        finishes: false,
        positions: canvas.movable(process.graph.mask()).collect(),
    }
}

/// Sets the candidates of these indices; with the last of them the canvas is done.
pub(super) fn set_some(
    evaluation: &Evaluation,
    candidates: &[Candidate],
    indices: &[usize],
    steps: u32,
) -> Commit {
    let all = indices.len() == evaluation.positions.len();
    Commit {
        set: indices.iter().map(|&index| candidates[index]).collect(),
        masked: Vec::new(),
        step: if all { steps } else { evaluation.step + 1 },
    }
}

pub(super) fn uncertainties(candidates: &[Candidate]) -> Vec<f64> {
    candidates.iter().map(|candidate| candidate.uncertainty).collect()
}

/// The time at which as many positions are masked as are now.
pub(in crate::diffusion) fn time_of_the_masked(process: &Process, canvas: &CanvasView<'_>) -> f64 {
    let masked = canvas.movable(process.graph.mask()).count();
    let share = masked as f64 / canvas.gaps.max(1) as f64;
    let most = process.masked_share(1.0);
    let t = process.schedule.time(-(-share.min(most)).ln_1p());
    t.clamp(FINAL_TIME, 1.0)
}

/// Indices into `uncertainties` of the `count` surest; ties go to the lower index.
fn surest(uncertainties: &[f64], count: usize) -> Vec<usize> {
    let mut order = ascending(uncertainties);
    order.truncate(count);
    order
}

/// How many of `masked` positions are to be filled now, that all be by the last of `evaluations` even ones.
pub(super) fn even_share(masked: usize, evaluations: u32) -> usize {
    masked.div_ceil(evaluations.max(1) as usize)
}

pub(in crate::diffusion) fn ascending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]).then(a.cmp(&b)));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_surest_come_first() {
        assert_eq!(surest(&[0.3, 0.1, 0.3, 0.0], 3), [3, 1, 0]);
        assert!(surest(&[0.3], 0).is_empty());
    }

    proptest! {
        #[test]
        fn even_shares_end_in_time(masked in 0usize..500, evaluations in 1u32..600) {
            let mut left = masked;
            for remaining in (1..=evaluations).rev() {
                left -= even_share(left, remaining);
            }
            prop_assert_eq!(left, 0);
        }
    }
}
