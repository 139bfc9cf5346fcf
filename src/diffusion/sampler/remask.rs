//! Remasking (ReMDM, arXiv 2503.00307): tokens once chosen can be masked and chosen again.
//!
//! With `alpha = e^-sigma` before a step and `alpha'` after it, a token is masked again with chance `r` and a
//! mask left with chance `(alpha' - (1 - r) alpha) / (1 - alpha)`, which keeps the share of masks that the noise
//! asks for (eq. 7). `r` is the rate asked for, where that keeps chances below one: the paper's "capped" schedule.
//! For absorbing graphs and normalised scores.

use super::TimeGrid;
use crate::diffusion::Schedule;

/// Chances of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remask {
    /// That a mask is left.
    pub leave: f64,
    /// That a token is masked again.
    pub mask: f64,
}

impl Remask {
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
        let grid = TimeGrid { steps: 25 };
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
                    let Remask { leave, mask } = Remask::new(&schedule, grid, step, rate);
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
