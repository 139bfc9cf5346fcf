//! Steps of a time grid in which every position is decided by its scores, raw as they are.
//!
//! Where a network's scores are not normalised they have a say in when a position leaves, so that every position
//! that may move is evaluated in every step.

use super::evaluation::{
    Candidate, CanvasView, Commit, Evaluation, Law, Sampler, Uncertainty, something_is_left,
};
use super::{Discretization, TimeGrid};
use crate::diffusion::{GraphKind, Process};

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Stepwise {
    /// The law of a step.
    pub discretization: &'static dyn Discretization,
    /// The noise process that is reversed.
    pub process: Process,
    /// When steps are taken.
    pub grid: TimeGrid,
}

impl Sampler for Stepwise {
    fn steps(&self, _gaps: usize) -> u32 {
        self.grid.evaluations()
    }

    fn evaluation(&self, canvas: &CanvasView<'_>) -> Evaluation {
        let Process { graph, schedule } = &self.process;
        let t = self.time(canvas);
        Evaluation {
            step: canvas.step,
            draw: canvas.step,
            t,
            sigma: schedule.total_noise(t),
            law: Law::Affine(self.grid.law(self.discretization, graph, schedule, canvas.step)),
            uncertainty: Uncertainty::None,
            finishes: false,
            positions: canvas.movable(graph.mask()).collect(),
        }
    }

    fn commit(&self, canvas: &CanvasView<'_>, evaluation: &Evaluation, set: Vec<Candidate>) -> Commit {
        let absorbing = self.process.graph.kind() == GraphKind::Absorbing;
        let nothing_is_left = absorbing && set.len() == evaluation.positions.len();
        Commit {
            step: if nothing_is_left {
                self.steps(canvas.gaps)
            } else {
                evaluation.step + 1
            },
            set,
            masked: Vec::new(),
        }
    }

    fn can_be(&self, canvas: &CanvasView<'_>) -> bool {
        something_is_left(&self.process, canvas)
    }

    fn time(&self, canvas: &CanvasView<'_>) -> f64 {
        self.grid.time(canvas.step)
    }
}
