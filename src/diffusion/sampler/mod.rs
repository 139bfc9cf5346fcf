//! From noise to tokens: what a step does to single positions, and which of them it is about.
//!
//! Every discretisation here reduces to the same affine row law ([`RowLaw`]): the weight of moving to `y` is
//! `gain * s_y - spread * (1 + S)` and the weight of staying `stay - stay_slope * S`, with `S` the sum of
//! the scores over `y != x` (the score at `x` itself is 1). A [`Discretization`] only computes those four numbers from the
//! noise on both sides of the step; [`row::draw`] turns a row of log-scores into a token.
//!
//! A [`Sampler`] decides twice a step: what is asked of the network next ([`Evaluation`]), and what becomes of the
//! canvas given what the rows gave ([`Commit`]). Both are values; who runs the network does not know whose they are.
//!
//! On absorbing graphs normalised scores leave the network out of the decision *when* a position moves, so that
//! fewer rows and fewer evaluations are needed: [`hitting_times`] draws the times first, [`remask`] adds a way back,
//! [`confidence`] (by probability or margin) and [`entropy_bounded`] fill the surest positions first. Raw scores keep
//! the exact rule of the outflow: every masked row is evaluated in every step ([`stepwise`]).
//!
//! To add a sampler: a file with its [`Sampler`], an arm in [`SamplerKind`], a line in `server/sampler.rs`, a value
//! in the proto, a test of its law.
//!
//! # Measured
//!
#![doc = include_str!("measured.md")]

mod blocks;
pub mod choice;
pub mod confidence;
pub mod entropy_bounded;
mod euler;
pub mod evaluation;
pub mod hitting_times;
pub mod remask;
pub mod row;
pub mod stepwise;
pub mod theta_trapezoidal;
mod tweedie;

pub use choice::TokenChoice;
pub use euler::Euler;
pub use evaluation::{Candidate, CanvasView, Commit, Evaluation, Law, Sampler, Second, Uncertainty, finish};
pub use hitting_times::HittingTimes;
pub use tweedie::Tweedie;

use serde::{Deserialize, Serialize};

use super::{Graph, GraphKind, Parameterization, Process, Schedule};
use confidence::Confidence;
use entropy_bounded::EntropyBounded;
use hitting_times::{FirstHitting, GridHits};
use remask::Remask;
use stepwise::Stepwise;
use theta_trapezoidal::ThetaTrapezoidal;

/// The end of the time grid: what noise is left there is removed by one denoising step.
pub const FINAL_TIME: f64 = 1e-5;

/// The law of one token in one step, as an affine function of its scores.
///
/// Weights are not normalised; negative ones count as zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowLaw {
    /// Weight of moving to `y` per unit of `s_y`.
    pub gain: f64,
    /// Loss of every `y` per unit of the whole score sum `1 + S`.
    pub spread: f64,
    /// Weight of staying, at `S = 0`.
    pub stay: f64,
    /// Loss of staying per unit of the score sum `S`.
    pub stay_slope: f64,
}

impl RowLaw {
    /// Weight of moving to a token with score `s`, where all scores `y != x` sum to `total`.
    pub fn move_weight(&self, s: f64, total: f64) -> f64 {
        self.gain * s - self.spread * (1.0 + total)
    }

    /// Weight of staying, where all scores `y != x` sum to `total`.
    pub fn stay_weight(&self, total: f64) -> f64 {
        self.stay - self.stay_slope * total
    }
}

/// A discretisation of the reverse process.
pub trait Discretization: std::fmt::Debug + Send + Sync {
    /// The law of the step from time `t` to `t - dt`, for tokens that can still move.
    fn step(&self, graph: &Graph, schedule: &Schedule, t: f64, dt: f64) -> RowLaw;

    /// The law of the final denoising step from `t` to no noise at all.
    ///
    /// Tweedie's step over the whole remaining noise; on absorbing graphs staying masked is excluded.
    fn denoise(&self, graph: &Graph, schedule: &Schedule, t: f64) -> RowLaw {
        let law = tweedie::law(graph, schedule.total_noise(t));
        match graph.kind() {
            GraphKind::Absorbing => RowLaw {
                stay: 0.0,
                stay_slope: 0.0,
                ..law
            },
            GraphKind::Uniform => law,
        }
    }
}

/// The law of a token that leaves the mask whatever its scores say: only where to is open.
pub const LEAVE: RowLaw = RowLaw {
    gain: 1.0,
    spread: 0.0,
    stay: 0.0,
    stay_slope: 0.0,
};

/// The samplers by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SamplerKind {
    /// The paper's "analytic" sampler.
    #[default]
    Tweedie,
    /// Tau-leaping.
    Euler,
    /// One token per evaluation, in continuous time (arXiv 2409.02908): exact, for absorbing graphs.
    FirstHitting,
    /// The same number of tokens in every step, the likeliest first (arXiv 2202.04200); a heuristic, for
    /// absorbing graphs.
    Confidence,
    /// As many of the surest tokens at once as their entropies allow (arXiv 2505.24857); a heuristic, for
    /// absorbing graphs.
    EntropyBounded {
        /// Bound on the sum of a step's entropies, the largest left out; in nats, from 0.
        bound: f64,
    },
    /// Tweedie's steps, which also mask tokens again (ReMDM, arXiv 2503.00307); for absorbing graphs.
    Remask {
        /// Chance of a token to be masked again in a step, as far as the noise allows; in `[0, 1]`.
        rate: f64,
    },
    /// Two evaluations a step, second order in its length (arXiv 2502.00234).
    ThetaTrapezoidal,
    /// The same number of tokens in every step, those first that are furthest ahead of the second likeliest (arXiv
    /// 2502.06768); a heuristic, for absorbing graphs.
    ProbabilityMargin,
}

impl SamplerKind {
    /// Whether it takes scores as normalised always, which absorbing graphs alone allow.
    pub fn normalizes(self) -> bool {
        match self {
            Self::Tweedie | Self::Euler | Self::ThetaTrapezoidal => false,
            Self::FirstHitting
            | Self::Confidence
            | Self::ProbabilityMargin
            | Self::EntropyBounded { .. }
            | Self::Remask { .. } => true,
        }
    }

    /// Whether its option, where it has one, is a value that it can take.
    pub fn option_fits(self) -> bool {
        match self {
            Self::EntropyBounded { bound } => bound >= 0.0 && bound.is_finite(),
            Self::Remask { rate } => (0.0..=1.0).contains(&rate),
            Self::Tweedie
            | Self::Euler
            | Self::FirstHitting
            | Self::Confidence
            | Self::ProbabilityMargin
            | Self::ThetaTrapezoidal => true,
        }
    }

    /// Whether it can take scores as normalised.
    pub fn may_normalize(self) -> bool {
        self != Self::ThetaTrapezoidal
    }

    /// Whether the number of steps is the request's to choose.
    pub fn has_steps(self) -> bool {
        self != Self::FirstHitting
    }

    /// The sampler for canvases of `process`, with steps on `grid`; `normalized` as [`normalized`] tells.
    pub fn build(self, process: Process, grid: TimeGrid, normalized: bool) -> Box<dyn Sampler> {
        let discretized = |discretization: &'static dyn Discretization| -> Box<dyn Sampler> {
            if normalized {
                Box::new(GridHits::new(discretization, process, grid))
            } else {
                Box::new(Stepwise {
                    discretization,
                    process,
                    grid,
                })
            }
        };
        match self {
            Self::Tweedie => discretized(&Tweedie),
            Self::Euler => discretized(&Euler),
            Self::FirstHitting => Box::new(FirstHitting {
                process,
                start: grid.start,
            }),
            Self::Confidence => Box::new(Confidence {
                process,
                grid,
                by: Uncertainty::NegLogProb,
            }),
            Self::ProbabilityMargin => Box::new(Confidence {
                process,
                grid,
                by: Uncertainty::Margin,
            }),
            Self::EntropyBounded { bound } => Box::new(EntropyBounded { process, grid, bound }),
            Self::Remask { rate } => Box::new(Remask { process, grid, rate }),
            Self::ThetaTrapezoidal => Box::new(ThetaTrapezoidal { process, grid }),
        }
    }

    /// Evaluations of a canvas with `gaps` positions to fill, at most: known before anything is built.
    pub fn most_evaluations(self, grid: TimeGrid, gaps: usize, normalized: bool) -> u64 {
        let (steps, gaps) = (u64::from(grid.steps), gaps as u64);
        match self {
            Self::Tweedie | Self::Euler if normalized => (steps + 1).min(gaps),
            Self::Tweedie | Self::Euler | Self::Remask { .. } => steps + 1,
            Self::FirstHitting => gaps,
            Self::Confidence | Self::ProbabilityMargin | Self::EntropyBounded { .. } => steps.min(gaps),
            Self::ThetaTrapezoidal => 2 * steps + 1,
        }
    }
}

/// Whether scores count as normalised, asked for or not: on absorbing graphs the noise alone then says when a
/// position leaves. Networks that give probabilities are normalised as they are.
pub fn normalized(
    asked: bool,
    sampler: SamplerKind,
    process: &Process,
    parameterization: Parameterization,
) -> bool {
    process.graph.kind() == GraphKind::Absorbing
        && (asked || sampler.normalizes() || parameterization == Parameterization::Mean)
}

/// The time grid of a generation with `steps` steps: `steps + 1` even points from `start` to [`FINAL_TIME`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimeGrid {
    /// Number of steps before the final denoising; at least 1.
    pub steps: u32,
    /// The time at which it begins, above [`FINAL_TIME`]: 1, unless something is there to begin with.
    pub start: f64,
}

impl TimeGrid {
    /// From pure noise.
    pub fn new(steps: u32) -> Self {
        Self { steps, start: 1.0 }
    }

    /// Length of one step.
    pub fn dt(&self) -> f64 {
        (self.start - FINAL_TIME) / f64::from(self.steps)
    }

    /// The time at which evaluation `step` of `0..=steps` takes place.
    pub fn time(&self, step: u32) -> f64 {
        if step >= self.steps {
            FINAL_TIME
        } else {
            self.start - f64::from(step) * self.dt()
        }
    }

    /// Evaluations of a whole generation: the steps and the final denoising.
    pub fn evaluations(&self) -> u32 {
        self.steps + 1
    }

    /// The law of evaluation `step` of `0..=steps`.
    pub fn law(
        &self,
        discretization: &dyn Discretization,
        graph: &Graph,
        schedule: &Schedule,
        step: u32,
    ) -> RowLaw {
        let t = self.time(step);
        if step >= self.steps {
            discretization.denoise(graph, schedule, t)
        } else {
            discretization.step(graph, schedule, t, self.dt())
        }
    }
}

#[cfg(test)]
pub(crate) mod law_test;
