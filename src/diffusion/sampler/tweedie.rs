//! The Tweedie sampler (eq. 19 of arXiv 2310.16834), called "analytic" in the authors' code.
//!
//! With `dsigma = sigma(t) - sigma(t - dt)`, token `x` moves to `y` with weight
//! `(exp(-dsigma Q) s)_y * exp(dsigma Q)[x, y]`: optimal among samplers that denoise positions
//! independently, given exact scores.

use super::{Discretization, RowLaw};
use crate::diffusion::{Graph, GraphKind, Schedule};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Tweedie;

impl Discretization for Tweedie {
    fn step(&self, graph: &Graph, schedule: &Schedule, t: f64, dt: f64) -> RowLaw {
        law(graph, schedule.total_noise(t) - schedule.total_noise(t - dt))
    }
}

/// The law of removing `dsigma` of noise.
pub(super) fn law(graph: &Graph, dsigma: f64) -> RowLaw {
    let growth = dsigma.exp_m1();
    match graph.kind() {
        // Row of the mask: (e^dsigma s_y) (1 - e^-dsigma) = (e^dsigma - 1) s_y, and for the mask itself
        // (e^dsigma - (e^dsigma - 1)(1 + S)) * 1 = 1 - (e^dsigma - 1) S.
        GraphKind::Absorbing => RowLaw {
            gain: growth,
            spread: 0.0,
            stay: 1.0,
            stay_slope: growth,
        },
        // The staggered score is e^dsigma s_y - (e^dsigma - 1)/V (1 + S), the transition
        // (1 - e^-dsigma)/V off the diagonal and e^-dsigma more on it.
        GraphKind::Uniform => {
            let v = graph.states() as f64;
            let away = -(-dsigma).exp_m1() / v;
            let home = (-dsigma).exp() + away;
            let fall = growth / v;
            RowLaw {
                gain: dsigma.exp() * away,
                spread: fall * away,
                stay: (dsigma.exp() - fall) * home,
                stay_slope: fall * home,
            }
        }
    }
}
