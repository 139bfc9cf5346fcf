//! One canvas and its next evaluation: the whole state of a generation.

use std::sync::Arc;

use super::ServedModel;
use crate::bundle::Parameterization;
use crate::diffusion::sampler::hits::{Survival, hitting_time};
use crate::diffusion::sampler::row::{self, BadScores, Scratch};
use crate::diffusion::sampler::{FINAL_TIME, LEAVE, Sampler, TimeGrid};
use crate::diffusion::{Draws, GraphKind, RowLaw, SamplerKind, Token, TokenChoice};

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
    /// Evaluations of a canvas with `gaps` positions to fill, at most.
    pub fn most_evaluations(&self, gaps: usize, model: &ServedModel) -> u64 {
        let gaps = gaps as u64;
        match self.sampler {
            SamplerKind::FirstHitting => gaps,
            SamplerKind::Tweedie | SamplerKind::Euler => {
                let evaluations = u64::from(self.grid.evaluations());
                if self.is_normalized(model) {
                    gaps.min(evaluations)
                } else {
                    evaluations
                }
            }
        }
    }

    /// Whether scores are normalised, asked for or not: hit times are then drawn at the start.
    pub fn is_normalized(&self, model: &ServedModel) -> bool {
        let manifest = model.manifest();
        manifest.graph == GraphKind::Absorbing
            && (self.normalize
                || self.sampler == SamplerKind::FirstHitting
                || manifest.parameterization == Parameterization::Mean)
    }
}

/// What the canvases of a request share.
#[derive(Debug)]
pub struct Course {
    model: Arc<ServedModel>,
    plan: Plan,
    departures: Departures,
}

/// What decides when a position leaves the mask, or its token.
#[derive(Debug)]
enum Departures {
    /// Its scores, in every step of the grid.
    Scores(&'static dyn Sampler),
    /// A hit time on the grid.
    Hits(Survival),
    /// A hit time between 1 and 0.
    ContinuousHits,
}

impl Course {
    /// The course of `plan` for canvases of `model`.
    pub fn new(model: &Arc<ServedModel>, plan: Plan) -> Self {
        let departures = match plan.sampler.discretisation() {
            None => Departures::ContinuousHits,
            Some(sampler) if plan.is_normalized(model) => Departures::Hits(Survival::new(
                sampler,
                &model.graph(),
                &model.manifest().schedule,
                plan.grid,
            )),
            Some(sampler) => Departures::Scores(sampler),
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
struct Hits {
    /// The step in which each position is hit; [`NEVER`] where clamped.
    steps: Vec<u32>,
    /// The time of every step, where they are not those of the grid.
    times: Option<Vec<f64>>,
}

const NEVER: u32 = u32::MAX;

impl Hits {
    fn draw(course: &Course, clamped: &[bool], draws: &mut Draws) -> Option<Self> {
        match &course.departures {
            Departures::Scores(_) => None,
            Departures::Hits(survival) => {
                let step = |(i, clamped): (usize, &bool)| {
                    if *clamped {
                        NEVER
                    } else {
                        survival.hit(draws.hit(i))
                    }
                };
                Some(Self {
                    steps: clamped.iter().enumerate().map(step).collect(),
                    times: None,
                })
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
                Some(Self {
                    steps,
                    times: Some(order.into_iter().map(|(t, _)| t).collect()),
                })
            }
        }
    }

    /// The first step from `step` on in which something is hit.
    fn next(&self, step: u32) -> Option<u32> {
        let hits = self.steps.iter().copied();
        hits.filter(|&hit| hit != NEVER && hit >= step).min()
    }

    /// Steps in which something is hit.
    fn evaluations(&self) -> u64 {
        let mut steps: Vec<u32> = self.steps.iter().copied().filter(|&hit| hit != NEVER).collect();
        steps.sort_unstable();
        steps.dedup();
        steps.len() as u64
    }
}

/// A row of tokens on its way from noise to text.
#[derive(Clone, Debug)]
pub struct Canvas {
    course: Arc<Course>,
    seed: u64,
    draws: Draws,
    tokens: Vec<Token>,
    clamped: Arc<[bool]>,
    hits: Option<Hits>,
    /// For every position, the number of steps after which it got its present token.
    committed_at: Vec<u32>,
    step: u32,
    nfe: u32,
}

impl Canvas {
    /// The initial canvas: clamped tokens from the template, the limit law everywhere else.
    pub fn new(course: &Arc<Course>, template: &[Option<Token>], seed: u64, index: u64) -> Self {
        let mut draws = Draws::new(seed, index);
        let graph = course.model.graph();
        let tokens = template
            .iter()
            .enumerate()
            .map(|(i, token)| token.unwrap_or_else(|| graph.sample_limit(draws.prior(i))))
            .collect();
        let clamped: Arc<[bool]> = template.iter().map(Option::is_some).collect();
        Self {
            tokens,
            hits: Hits::draw(course, &clamped, &mut draws),
            clamped,
            committed_at: vec![0; template.len()],
            course: Arc::clone(course),
            seed,
            draws,
            step: 0,
            nfe: 0,
        }
    }

    /// The model that denoises this canvas.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.course.model
    }

    /// The tokens as they are now.
    pub fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// Which positions never change.
    pub fn clamped(&self) -> &Arc<[bool]> {
        &self.clamped
    }

    /// For every position, the number of steps after which it got its present token.
    pub fn committed_at(&self) -> &[u32] {
        &self.committed_at
    }

    /// Seed of all random choices.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Evaluations spent.
    pub fn nfe(&self) -> u32 {
        self.nfe
    }

    /// Steps taken.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// Steps until done, final denoising included.
    pub fn total(&self) -> u32 {
        match &self.hits {
            Some(Hits {
                times: Some(times), ..
            }) => times.len() as u32,
            _ => self.course.plan.grid.evaluations(),
        }
    }

    /// Evaluations that are left, at most.
    pub fn evaluations_left(&self) -> u64 {
        match &self.hits {
            Some(hits) => hits.evaluations().saturating_sub(u64::from(self.nfe)).max(1),
            None => u64::from(self.total() - self.step),
        }
    }

    /// Whether every step is taken.
    pub fn is_done(&self) -> bool {
        self.step >= self.total()
    }

    /// Time of the present state, from 1 down to 0.
    pub fn time(&self) -> f64 {
        match &self.hits {
            _ if self.is_done() => 0.0,
            // In continuous time a step ends where something is hit.
            Some(Hits {
                times: Some(times), ..
            }) => self.step.checked_sub(1).map_or(1.0, |last| times[last as usize]),
            _ => self.course.plan.grid.time(self.step),
        }
    }

    /// Total noise of the present state; 0 when done.
    pub fn sigma(&self) -> f64 {
        if self.is_done() {
            0.0
        } else {
            self.total_noise(self.time())
        }
    }

    /// Total noise of the next evaluation.
    pub fn next_sigma(&self) -> f64 {
        let step = self.next_step();
        self.total_noise(match &self.hits {
            Some(Hits {
                times: Some(times), ..
            }) => times.get(step as usize).copied().unwrap_or(FINAL_TIME),
            _ => self.course.plan.grid.time(step),
        })
    }

    fn total_noise(&self, t: f64) -> f64 {
        self.model().manifest().schedule.total_noise(t)
    }

    /// The step of the next evaluation: the next one, or the next one in which something is hit.
    fn next_step(&self) -> u32 {
        let hit = self.hits.as_ref().and_then(|hits| hits.next(self.step));
        hit.unwrap_or(self.step)
    }

    /// Positions that are masked.
    pub fn masked(&self) -> usize {
        self.model()
            .graph()
            .mask()
            .map_or(0, |mask| self.tokens.iter().filter(|t| **t == mask).count())
    }

    /// Positions whose scores the next evaluation needs, ascending.
    pub fn wanted(&self) -> impl Iterator<Item = usize> + '_ {
        let (mask, step) = (self.model().graph().mask(), self.next_step());
        (0..self.tokens.len()).filter(move |&i| match &self.hits {
            Some(hits) => hits.steps[i] == step,
            None => !self.clamped[i] && mask.is_none_or(|mask| self.tokens[i] == mask),
        })
    }

    /// What the next evaluation does to single positions, for threads to share.
    pub fn rows(&self) -> Rows<'_> {
        let Course {
            model,
            plan,
            departures,
        } = &*self.course;
        let (graph, manifest) = (model.graph(), model.manifest());
        let (law, offset) = match departures {
            Departures::Scores(sampler) => {
                let law = plan.grid.law(*sampler, &graph, &manifest.schedule, self.step);
                let (offset, sigma) = (manifest.sigma_offset, self.sigma());
                let parameterization = manifest.parameterization;
                (
                    law,
                    parameterization.log_score_offset(offset, sigma, manifest.vocab_size),
                )
            }
            // Scores are compared with each other alone.
            Departures::Hits(_) | Departures::ContinuousHits => (LEAVE, 0.0),
        };
        Rows {
            law,
            offset,
            choice: plan.choice,
            step: self.next_step(),
            tokens: &self.tokens,
            draws: self.draws.clone(),
        }
    }

    /// Ends the step: tokens change to what [`Rows::draw`] gave for positions.
    pub fn apply(&mut self, moves: impl IntoIterator<Item = (usize, Token)>) {
        self.step = self.next_step() + 1;
        self.nfe += 1;
        for (position, token) in moves {
            self.tokens[position] = token;
            self.committed_at[position] = self.step;
        }
        let nothing_left = match &self.hits {
            Some(hits) => hits.next(self.step).is_none(),
            None => self.model().graph().kind() == GraphKind::Absorbing && self.wanted().next().is_none(),
        };
        if nothing_left {
            self.step = self.total();
        }
    }
}

/// One step of a canvas, position by position.
#[derive(Debug)]
pub struct Rows<'a> {
    law: RowLaw,
    offset: f64,
    choice: TokenChoice,
    step: u32,
    tokens: &'a [Token],
    draws: Draws,
}

impl Rows<'_> {
    /// What becomes of `position`, given the network's row for it: its new token, or `None` when it stays.
    pub fn draw(
        &mut self,
        position: usize,
        log_score: &[f32],
        scratch: &mut Scratch,
    ) -> Result<Option<Token>, BadScores> {
        let u = self.draws.at(self.step, position);
        let x = self.tokens[position];
        row::draw(&self.law, &self.choice, x, log_score, self.offset, u, scratch)
    }
}
