//! Remasking (ReMDM, arXiv 2503.00307): tokens once chosen can be masked and chosen again.
//!
//! With `alpha = e^-sigma` before a step and `alpha'` after it, a token is masked again with chance `r` and a
//! mask left with chance `(alpha' - (1 - r) alpha) / (1 - alpha)`, which keeps the share of masks that the noise
//! asks for (eq. 7). `r` is the rate asked for, where that keeps chances below one: the paper's "capped" schedule.
//! For absorbing graphs and normalised scores.

use super::evaluation::{Candidate, CanvasView, Commit, Evaluation, Law, Sampler, Uncertainty};
use super::{LEAVE, TimeGrid};
use crate::diffusion::{Process, Schedule};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Remask {
    /// The noise process that is reversed.
    pub process: Process,
    /// When steps are taken.
    pub grid: TimeGrid,
    /// Chance of a token to be masked again in a step, as far as the noise allows; in `[0, 1]`.
    pub rate: f64,
}

impl Remask {
    fn chances(&self, step: u32) -> Chances {
        Chances::new(&self.process.schedule, self.grid, step, self.rate)
    }

    /// Positions that leave the mask in the next step: chance alone decides.
    fn leaving<'a>(&self, canvas: &CanvasView<'a>) -> impl Iterator<Item = usize> + 'a {
        let (leave, step, mut draws) = (self.chances(canvas.step).leave, canvas.step, canvas.draws.clone());
        canvas
            .movable(self.process.graph.mask())
            .filter(move |&i| leave == 1.0 || draws.at(step, i).leave < leave)
    }

    /// Positions that the next step masks again.
    fn masked_again(&self, canvas: &CanvasView<'_>) -> Vec<usize> {
        let (mask, mut draws) = (self.process.graph.mask(), canvas.draws.clone());
        let chance = self.chances(canvas.step).mask;
        (0..canvas.tokens.len())
            .filter(|&i| !canvas.clamped[i] && Some(canvas.tokens[i]) != mask)
            .filter(|&i| draws.at(canvas.step, i).leave < chance)
            .collect()
    }
}

impl Sampler for Remask {
    fn steps(&self, _gaps: usize) -> u32 {
        self.grid.evaluations()
    }

    fn evaluation(&self, canvas: &CanvasView<'_>) -> Evaluation {
        let t = self.time(canvas);
        Evaluation {
            step: canvas.step,
            draw: canvas.step,
            t,
            sigma: self.process.total_noise(t),
            law: Law::Affine(LEAVE),
            uncertainty: Uncertainty::None,
            finishes: false,
            positions: self.leaving(canvas).collect(),
        }
    }

    fn commit(&self, canvas: &CanvasView<'_>, evaluation: &Evaluation, set: Vec<Candidate>) -> Commit {
        Commit {
            set,
            masked: self.masked_again(canvas),
            step: evaluation.step + 1,
        }
    }

    /// A step in which chance leaves every mask where it is.
    fn pass_over(&self, canvas: &CanvasView<'_>) -> Option<Commit> {
        let is_done = canvas.step >= self.steps(canvas.gaps);
        if is_done || self.leaving(canvas).next().is_some() {
            return None;
        }
        Some(Commit {
            set: Vec::new(),
            masked: self.masked_again(canvas),
            step: canvas.step + 1,
        })
    }

    /// Any tokens: what is masked again is chance, too.
    fn can_be(&self, _canvas: &CanvasView<'_>) -> bool {
        true
    }

    fn time(&self, canvas: &CanvasView<'_>) -> f64 {
        self.grid.time(canvas.step)
    }
}

/// Chances of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chances {
    /// That a mask is left.
    pub leave: f64,
    /// That a token is masked again.
    pub mask: f64,
}

impl Chances {
    /// The chances in `step` of `grid`; the final denoising leaves every mask and makes no new ones.
    pub fn new(schedule: &Schedule, grid: TimeGrid, step: u32, rate: f64) -> Self {
        if step >= grid.steps {
            return Self {
                leave: 1.0,
                mask: 0.0,
            };
        }
        let alpha = |step| (-schedule.total_noise(grid.time(step))).exp();
        let (before, after) = (alpha(step), alpha(step + 1));
        let mask = rate.min((1.0 - after) / before).max(0.0);
        Self {
            leave: ((after - (1.0 - mask) * before) / (1.0 - before)).clamp(0.0, 1.0),
            mask,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_masks_follows_the_noise() {
        let grid = TimeGrid::new(25);
        for schedule in [
            Schedule::LogLinear { eps: 1e-3 },
            Schedule::Geometric {
                sigma_min: 1e-3,
                sigma_max: 9.0,
            },
        ] {
            for rate in [0.0, 0.02, 0.3, 1.0] {
                let share = |step| -(-schedule.total_noise(grid.time(step))).exp_m1();
                let mut masked = share(0);
                for step in 0..25 {
                    let Chances { leave, mask } = Chances::new(&schedule, grid, step, rate);
                    masked = masked * (1.0 - leave) + (1.0 - masked) * mask;
                    assert!(
                        (masked - share(step + 1)).abs() < 1e-9,
                        "{rate}, step {step}: {masked}"
                    );
                }
            }
        }
    }
}
