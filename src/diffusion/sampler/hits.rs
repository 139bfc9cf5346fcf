//! Hit times: when each masked position leaves the mask, drawn before the network has run once.
//!
//! On absorbing graphs the scores at a mask are `s_y = p(x0 = y | x) / (e^sigma - 1)`, so that normalised ones
//! sum to `S = 1 / (e^sigma - 1)` whatever the network says (RADD, arXiv 2406.03736, theorem 1). Whether a
//! position leaves in a step then depends on the noise alone. With all hit times drawn first, the network is
//! needed only in steps in which something is hit, and only for the positions that are: the same law as step
//! by step, from fewer evaluations. What a position turns into is still the network's to say, in its step.

use super::{Sampler, TimeGrid};
use crate::diffusion::{Graph, Schedule};

/// Chances of being masked still, over the steps of a time grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Survival(Vec<f64>);

impl Survival {
    /// Over the steps of `grid` and the final denoising, on an absorbing `graph`.
    pub fn new(sampler: &dyn Sampler, graph: &Graph, schedule: &Schedule, grid: TimeGrid) -> Self {
        let mut masked = 1.0;
        let after = |step| {
            let law = grid.law(sampler, graph, schedule, step);
            let total = 1.0 / schedule.total_noise(grid.time(step)).exp_m1();
            let (leaving, staying) = (law.gain * total, law.stay_weight(total).max(0.0));
            masked *= staying / (leaving + staying);
            masked
        };
        Self((0..grid.evaluations()).map(after).collect())
    }

    /// The step in which a position leaves the mask, for a uniform `u` in `[0, 1)`.
    pub fn hit(&self, u: f64) -> u32 {
        self.0.partition_point(|masked| u < *masked) as u32
    }
}

/// The time at which a position leaves the mask in continuous time, for a uniform `u` in `[0, 1)`.
///
/// All are masked at time 1; of those, `(1 - e^-sigma(t)) / (1 - e^-sigma(1))` still are at `t` (first-hitting
/// sampler, arXiv 2409.02908, section 3.1).
pub fn hitting_time(schedule: &Schedule, u: f64) -> f64 {
    let masked = u * -(-schedule.total_noise(1.0)).exp_m1();
    schedule.time(-(-masked).ln_1p()).clamp(super::FINAL_TIME, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::GraphKind;
    use crate::diffusion::sampler::{Euler, Tweedie};

    const SCHEDULES: [Schedule; 2] = [
        Schedule::LogLinear { eps: 1e-3 },
        Schedule::Geometric {
            sigma_min: 1e-3,
            sigma_max: 9.0,
        },
    ];

    /// Tweedie's steps are exact for single positions: survival is the ratio of chances to be masked.
    #[test]
    fn survival_under_tweedie_follows_the_noise() {
        let (graph, grid) = (Graph::new(GraphKind::Absorbing, 7), TimeGrid { steps: 40 });
        for schedule in SCHEDULES {
            let masked = |t: f64| -(-schedule.total_noise(t)).exp_m1();
            let Survival(survival) = Survival::new(&Tweedie, &graph, &schedule, grid);
            for (step, chance) in survival.iter().enumerate().take(40) {
                let left = 1.0 - (step + 1) as f64 * grid.dt();
                assert!((chance - masked(left) / masked(1.0)).abs() < 1e-9, "step {step}");
            }
            assert_eq!(survival[40], 0.0, "the final denoising leaves nothing masked");
        }
    }

    #[test]
    fn every_uniform_has_its_step() {
        let graph = Graph::new(GraphKind::Absorbing, 7);
        let survival = Survival::new(&Euler, &graph, &SCHEDULES[0], TimeGrid { steps: 3 });
        assert_eq!((survival.hit(0.0), survival.hit(0.999_999)), (3, 0));
        for step in 0..3 {
            assert_eq!(survival.hit(survival.0[step as usize]), step);
        }
    }

    #[test]
    fn hitting_times_follow_the_chance_to_be_masked() {
        for schedule in SCHEDULES {
            let masked = |t: f64| -(-schedule.total_noise(t)).exp_m1();
            for u in [0.01, 0.3, 0.9] {
                let t = hitting_time(&schedule, u);
                // The geometric schedule leaves noise at time 0: who should be hit below it is hit there.
                let at_the_end = t == super::super::FINAL_TIME;
                assert!(
                    at_the_end || (masked(t) / masked(1.0) - u).abs() < 1e-9,
                    "{u}: {t}"
                );
            }
        }
    }
}
