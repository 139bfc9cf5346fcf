//! Hitting times: when each masked position leaves the mask, drawn before the network has run once.
//!
//! On absorbing graphs the scores at a mask are `s_y = p(x0 = y | x) / (e^sigma - 1)`, so that normalised ones
//! sum to `S = 1 / (e^sigma - 1)` whatever the network says (RADD, arXiv 2406.03736, theorem 1). Whether a
//! position leaves in a step then depends on the noise alone. With all hitting times drawn first, the network is
//! needed only in steps in which something is hit, and only for the positions that are: the same law as step
//! by step, from fewer evaluations. What a position turns into is still the network's to say, in its step.

use super::evaluation::{Candidate, CanvasView, Commit, Evaluation, Law, Sampler, Uncertainty};
use super::{Discretization, FINAL_TIME, LEAVE, TimeGrid};
use crate::diffusion::{Draws, Graph, Process, Schedule, Token};

/// Chances of being masked still, over the steps of a time grid.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskSurvival(Vec<f64>);

impl MaskSurvival {
    /// Over the steps of `grid` and the final denoising, on an absorbing `graph`.
    pub fn new(
        discretization: &dyn Discretization,
        graph: &Graph,
        schedule: &Schedule,
        grid: TimeGrid,
    ) -> Self {
        let mut masked = 1.0;
        let after = |step| {
            let law = grid.law(discretization, graph, schedule, step);
            let total = 1.0 / schedule.total_noise(grid.time(step)).exp_m1();
            let (leaving, staying) = (law.gain * total, law.stay_weight(total).max(0.0));
            masked *= staying / (leaving + staying);
            masked
        };
        Self((0..grid.evaluations()).map(after).collect())
    }

    /// The steps in which the positions of a canvas are hit, those that are `masked`.
    fn hitting_times(&self, masked: &[bool], draws: &mut Draws) -> HittingTimes {
        let mut step = |(i, masked): (usize, &bool)| {
            if *masked { self.hit(draws.hit(i)) } else { NEVER }
        };
        HittingTimes::on_grid(masked.iter().enumerate().map(&mut step).collect())
    }

    /// The step in which a position leaves the mask, for a uniform `u` in `[0, 1)`.
    pub fn hit(&self, u: f64) -> u32 {
        self.0.partition_point(|masked| u < *masked) as u32
    }
}

/// The time at which a position leaves the mask in continuous time, for a uniform `u` in `[0, 1)`.
///
/// Of those that are masked at time `start`, `(1 - e^-sigma(t)) / (1 - e^-sigma(start))` still are at `t`
/// (first-hitting sampler, section 3.1 of arXiv 2409.02908, where `start` is 1).
pub fn hitting_time(schedule: &Schedule, start: f64, u: f64) -> f64 {
    let masked = u * -(-schedule.total_noise(start)).exp_m1();
    schedule.time(-(-masked).ln_1p()).min(start).max(FINAL_TIME)
}

/// When the positions of one canvas leave the mask; drawn at the start.
#[derive(Clone, Debug)]
pub struct HittingTimes {
    /// The step in which each position is hit; [`NEVER`] where it was not masked at the start.
    steps: Vec<u32>,
    hits: Hits,
}

/// The steps in which something is hit.
#[derive(Clone, Debug)]
enum Hits {
    /// These steps of a grid, ascending.
    Grid(Vec<u32>),
    /// Every step, at these times.
    Times(Vec<f64>),
}

const NEVER: u32 = u32::MAX;

impl HittingTimes {
    fn on_grid(steps: Vec<u32>) -> Self {
        let mut hits: Vec<u32> = steps.iter().copied().filter(|&hit| hit != NEVER).collect();
        hits.sort_unstable();
        hits.dedup();
        // Of many positions few steps may be hit.
        hits.shrink_to_fit();
        Self {
            steps,
            hits: Hits::Grid(hits),
        }
    }

    /// The first step from `step` on in which something is hit.
    fn next(&self, step: u32) -> Option<u32> {
        match &self.hits {
            Hits::Grid(hits) => hits.get(hits.partition_point(|&hit| hit < step)).copied(),
            Hits::Times(times) => ((step as usize) < times.len()).then_some(step),
        }
    }

    /// How many steps from `step` on something is hit in.
    fn left(&self, step: u32) -> usize {
        match &self.hits {
            Hits::Grid(hits) => hits.len() - hits.partition_point(|&hit| hit < step),
            Hits::Times(times) => times.len().saturating_sub(step as usize),
        }
    }

    /// The time of `step`, in continuous time.
    fn time(&self, step: u32) -> f64 {
        match &self.hits {
            Hits::Grid(_) => FINAL_TIME,
            Hits::Times(times) => times.get(step as usize).copied().unwrap_or(FINAL_TIME),
        }
    }
}

/// The evaluation of both samplers of hitting times: the rows of the positions that are hit next.
fn next_hits(canvas: &CanvasView<'_>, process: &Process, time: impl Fn(u32) -> f64) -> Evaluation {
    let hit = canvas.hitting_times.and_then(|hits| hits.next(canvas.step));
    let step = hit.unwrap_or(canvas.step);
    let t = time(step);
    let steps = canvas.hitting_times.map_or(&[][..], |hits| &hits.steps);
    Evaluation {
        step,
        draw: step,
        t,
        sigma: process.total_noise(t),
        law: Law::Affine(LEAVE),
        uncertainty: Uncertainty::None,
        finishes: false,
        positions: (0..steps.len()).filter(|&i| steps[i] == step).collect(),
    }
}

/// Sets whom a step hits; after the last one the canvas is done.
fn set_hits(canvas: &CanvasView<'_>, evaluation: &Evaluation, set: Vec<Candidate>, steps: u32) -> Commit {
    let next = evaluation.step + 1;
    let goes_on = canvas.hitting_times.is_some_and(|hits| hits.next(next).is_some());
    Commit {
        set,
        masked: Vec::new(),
        step: if goes_on { next } else { steps },
    }
}

fn hits_left(canvas: &CanvasView<'_>) -> u64 {
    canvas
        .hitting_times
        .map_or(0, |hits| hits.left(canvas.step) as u64)
}

/// Whether those are masked, and those alone, who are hit in a step to come.
fn masked_are_to_be_hit(canvas: &CanvasView<'_>, process: &Process) -> bool {
    let Some(hits) = canvas.hitting_times else {
        return false;
    };
    let (mask, now) = (process.graph.mask(), canvas.step);
    let is_right = |(&token, &hit): (&Token, &u32)| (Some(token) == mask) == (hit != NEVER && hit >= now);
    canvas.tokens.iter().zip(&hits.steps).all(is_right) && hits.next(now).is_some()
}

/// A discretisation's law for normalised scores, with evaluations only in the steps in which something is hit.
#[derive(Clone, Debug)]
pub struct GridHits {
    process: Process,
    grid: TimeGrid,
    survival: MaskSurvival,
}

impl GridHits {
    /// The steps of `discretization` on `grid`.
    pub fn new(discretization: &dyn Discretization, process: Process, grid: TimeGrid) -> Self {
        Self {
            survival: MaskSurvival::new(discretization, &process.graph, &process.schedule, grid),
            process,
            grid,
        }
    }
}

impl Sampler for GridHits {
    fn steps(&self, _gaps: usize) -> u32 {
        self.grid.evaluations()
    }

    fn hitting_times(&self, masked: &[bool], draws: &mut Draws) -> Option<HittingTimes> {
        Some(self.survival.hitting_times(masked, draws))
    }

    fn evaluation(&self, canvas: &CanvasView<'_>) -> Evaluation {
        next_hits(canvas, &self.process, |step| self.grid.time(step))
    }

    fn commit(&self, canvas: &CanvasView<'_>, evaluation: &Evaluation, set: Vec<Candidate>) -> Commit {
        set_hits(canvas, evaluation, set, self.steps(canvas.gaps))
    }

    fn evaluations_left(&self, canvas: &CanvasView<'_>) -> u64 {
        hits_left(canvas)
    }

    fn can_be(&self, canvas: &CanvasView<'_>) -> bool {
        masked_are_to_be_hit(canvas, &self.process)
    }

    fn time(&self, canvas: &CanvasView<'_>) -> f64 {
        self.grid.time(canvas.step)
    }
}

/// One position after the other, at the times of the continuous process: exact, where the network is
/// (arXiv 2409.02908).
#[derive(Clone, Copy, Debug)]
pub struct FirstHitting {
    /// The noise process that is reversed.
    pub process: Process,
    /// The time at which it begins.
    pub start: f64,
}

impl Sampler for FirstHitting {
    fn steps(&self, gaps: usize) -> u32 {
        u32::try_from(gaps).unwrap_or(u32::MAX)
    }

    fn hitting_times(&self, masked: &[bool], draws: &mut Draws) -> Option<HittingTimes> {
        let mut order: Vec<(f64, usize)> = (0..masked.len())
            .filter(|&i| masked[i])
            .map(|i| (hitting_time(&self.process.schedule, self.start, draws.hit(i)), i))
            .collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut steps = vec![NEVER; masked.len()];
        for (step, &(_, position)) in order.iter().enumerate() {
            steps[position] = step as u32;
        }
        // Not in the memory of what was sorted, which is twice as large.
        let times = order.iter().map(|(t, _)| *t).collect();
        Some(HittingTimes {
            steps,
            hits: Hits::Times(times),
        })
    }

    fn evaluation(&self, canvas: &CanvasView<'_>) -> Evaluation {
        next_hits(canvas, &self.process, |step| {
            canvas.hitting_times.map_or(FINAL_TIME, |hits| hits.time(step))
        })
    }

    fn commit(&self, canvas: &CanvasView<'_>, evaluation: &Evaluation, set: Vec<Candidate>) -> Commit {
        set_hits(canvas, evaluation, set, self.steps(canvas.gaps))
    }

    fn evaluations_left(&self, canvas: &CanvasView<'_>) -> u64 {
        hits_left(canvas)
    }

    fn can_be(&self, canvas: &CanvasView<'_>) -> bool {
        masked_are_to_be_hit(canvas, &self.process)
    }

    /// A step ends where something is hit.
    fn time(&self, canvas: &CanvasView<'_>) -> f64 {
        match (canvas.step.checked_sub(1), canvas.hitting_times) {
            (Some(last), Some(hits)) => hits.time(last),
            _ => self.start,
        }
    }
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
        let (graph, grid) = (Graph::new(GraphKind::Absorbing, 7), TimeGrid::new(40));
        for schedule in SCHEDULES {
            let masked = |t: f64| -(-schedule.total_noise(t)).exp_m1();
            let MaskSurvival(survival) = MaskSurvival::new(&Tweedie, &graph, &schedule, grid);
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
        let survival = MaskSurvival::new(&Euler, &graph, &SCHEDULES[0], TimeGrid::new(3));
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
                let t = hitting_time(&schedule, 1.0, u);
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
