//! The Euler sampler, or tau-leaping (eq. 17 of arXiv 2310.16834).
//!
//! One explicit Euler step of the reverse process: identity plus `dt * rate(t) * reverse rate`.

use super::{Discretization, RowLaw};
use crate::diffusion::{Graph, GraphKind, Schedule};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Euler;

impl Discretization for Euler {
    fn step(&self, graph: &Graph, schedule: &Schedule, t: f64, dt: f64) -> RowLaw {
        let rate = dt * schedule.rate(t);
        let gain = match graph.kind() {
            GraphKind::Absorbing => rate,
            GraphKind::Uniform => rate / graph.states() as f64,
        };
        RowLaw {
            gain,
            spread: 0.0,
            stay: 1.0,
            stay_slope: gain,
        }
    }
}
