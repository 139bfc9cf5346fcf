//! How canvases go from noise to text: what a request asks, and what its canvases share.

use std::sync::Arc;

use super::ServedModel;
use crate::bundle::Parameterization;
use crate::diffusion::sampler::hits::{Survival, hitting_time};
use crate::diffusion::sampler::{Euler, FINAL_TIME, Sampler, TimeGrid, Tweedie};
use crate::diffusion::{Draws, GraphKind, SamplerKind, TokenChoice};

/// How a canvas is denoised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// The times of the evaluations, where the sampler does not choose its own.
    pub grid: TimeGrid,
    /// How a step is taken.
    pub sampler: SamplerKind,
    /// How tokens are chosen.
    pub choice: TokenChoice,
    /// Whether scores are normalised, on absorbing graphs: the network then says where a position moves to,
    /// the noise alone says when. Networks that give probabilities are normalised as they are.
    pub normalize: bool,
}

impl Plan {
    /// Steps of a canvas with `gaps` positions to fill.
    pub fn steps(&self, gaps: usize) -> u32 {
        let gaps = u32::try_from(gaps).unwrap_or(u32::MAX);
        match self.sampler {
            SamplerKind::FirstHitting => gaps,
            SamplerKind::Confidence | SamplerKind::EntropyBounded { .. } => self.grid.steps.min(gaps),
            SamplerKind::Tweedie | SamplerKind::Euler | SamplerKind::Remask { .. } => self.grid.evaluations(),
        }
    }

    /// Evaluations of a canvas with `gaps` positions to fill, at most.
    pub fn most_evaluations(&self, gaps: usize, model: &ServedModel) -> u64 {
        let steps = u64::from(self.steps(gaps));
        let has_hit_times = self.is_normalized(model) && !self.sampler.normalizes();
        if has_hit_times {
            steps.min(gaps as u64)
        } else {
            steps
        }
    }

    /// Whether scores are normalised, asked for or not: the noise alone then says when a position leaves.
    pub fn is_normalized(&self, model: &ServedModel) -> bool {
        let manifest = model.manifest();
        manifest.graph == GraphKind::Absorbing
            && (self.normalize
                || self.sampler.normalizes()
                || manifest.parameterization == Parameterization::Mean)
    }
}

/// What the canvases of a request share.
#[derive(Debug)]
pub struct Course {
    pub(super) model: Arc<ServedModel>,
    pub(super) plan: Plan,
    pub(super) departures: Departures,
}

/// What decides when a position leaves the mask, or its token.
#[derive(Debug)]
pub(super) enum Departures {
    /// Its scores, in every step of the grid.
    Scores(&'static dyn Sampler),
    /// A hit time on the grid.
    Hits(Survival),
    /// A hit time between 1 and 0.
    ContinuousHits,
    /// How sure the network is of it, beside the other masked positions.
    Doubts(Doubts),
    /// Chance, in every step of the grid, with this rate of the way back.
    Chance {
        /// How often a token is masked again.
        remask: f64,
    },
}

/// How many positions are filled at once, the surest first.
#[derive(Clone, Copy, Debug)]
pub(super) enum Doubts {
    /// The same share in every step.
    Even,
    /// As many as keep to a bound on their entropies, in nats.
    Bounded(f64),
}

impl Course {
    /// The course of `plan` for canvases of `model`.
    pub fn new(model: &Arc<ServedModel>, plan: Plan) -> Self {
        let (graph, schedule) = (model.graph(), &model.manifest().schedule);
        let stepwise = |sampler: &'static dyn Sampler| {
            if plan.is_normalized(model) {
                Departures::Hits(Survival::new(sampler, &graph, schedule, plan.grid))
            } else {
                Departures::Scores(sampler)
            }
        };
        let departures = match plan.sampler {
            SamplerKind::Tweedie => stepwise(&Tweedie),
            SamplerKind::Euler => stepwise(&Euler),
            SamplerKind::FirstHitting => Departures::ContinuousHits,
            SamplerKind::Confidence => Departures::Doubts(Doubts::Even),
            SamplerKind::EntropyBounded { bound } => Departures::Doubts(Doubts::Bounded(bound)),
            SamplerKind::Remask { rate } => Departures::Chance { remask: rate },
        };
        Self {
            model: Arc::clone(model),
            plan,
            departures,
        }
    }
}

/// When the positions of one canvas leave the mask; drawn at the start.
#[derive(Clone, Debug)]
pub(super) struct Hits {
    /// The step in which each position is hit; [`NEVER`] where clamped.
    pub(super) steps: Vec<u32>,
    /// The time of every step, where they are not those of the grid.
    times: Option<Vec<f64>>,
    /// Steps in which something is hit.
    evaluations: u64,
}

const NEVER: u32 = u32::MAX;

impl Hits {
    /// Hit times of a canvas whose positions are `clamped` or not, where its course has any.
    pub(super) fn draw(course: &Course, clamped: &[bool], draws: &mut Draws) -> Option<Self> {
        match &course.departures {
            Departures::Scores(_) | Departures::Doubts(_) | Departures::Chance { .. } => None,
            Departures::Hits(survival) => {
                let step = |(i, clamped): (usize, &bool)| {
                    if *clamped {
                        NEVER
                    } else {
                        survival.hit(draws.hit(i))
                    }
                };
                Some(Self::new(clamped.iter().enumerate().map(step).collect(), None))
            }
            Departures::ContinuousHits => {
                let schedule = &course.model.manifest().schedule;
                let mut order: Vec<(f64, usize)> = (0..clamped.len())
                    .filter(|&i| !clamped[i])
                    .map(|i| (hitting_time(schedule, draws.hit(i)), i))
                    .collect();
                order.sort_by(|a, b| b.0.total_cmp(&a.0));
                let mut steps = vec![NEVER; clamped.len()];
                for (step, &(_, position)) in order.iter().enumerate() {
                    steps[position] = step as u32;
                }
                Some(Self::new(
                    steps,
                    Some(order.into_iter().map(|(t, _)| t).collect()),
                ))
            }
        }
    }

    /// The time of `step`, in continuous time.
    pub(super) fn time(&self, step: u32) -> f64 {
        let times = self.times.as_deref().unwrap_or_default();
        times.get(step as usize).copied().unwrap_or(FINAL_TIME)
    }

    /// The first step from `step` on in which something is hit.
    pub(super) fn next(&self, step: u32) -> Option<u32> {
        let hits = self.steps.iter().copied();
        hits.filter(|&hit| hit != NEVER && hit >= step).min()
    }

    fn new(steps: Vec<u32>, times: Option<Vec<f64>>) -> Self {
        let mut distinct: Vec<u32> = steps.iter().copied().filter(|&hit| hit != NEVER).collect();
        distinct.sort_unstable();
        distinct.dedup();
        Self {
            evaluations: distinct.len() as u64,
            steps,
            times,
        }
    }

    /// Steps in which something is hit.
    pub(super) fn evaluations(&self) -> u64 {
        self.evaluations
    }
}
