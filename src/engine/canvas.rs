//! One canvas and its next evaluation: the whole state of a generation.

use std::sync::Arc;

use super::ServedModel;
use super::course::{Course, Departures, Doubts, Hits};
use crate::diffusion::sampler::parallel::{even_share, surest, within_entropy};
use crate::diffusion::sampler::remask::Remask;
use crate::diffusion::sampler::row::{self, BadScores, Doubt, Scratch};
use crate::diffusion::sampler::{FINAL_TIME, LEAVE};
use crate::diffusion::{Draws, GraphKind, RowLaw, Token, TokenChoice};

/// A row of tokens on its way from noise to text.
#[derive(Clone, Debug)]
pub struct Canvas {
    course: Arc<Course>,
    seed: u64,
    draws: Draws,
    tokens: Vec<Token>,
    clamped: Arc<[bool]>,
    /// Positions that are not clamped.
    gaps: usize,
    hits: Option<Hits>,
    /// For every position, the number of steps after which it got its present token.
    committed_at: Vec<u32>,
    step: u32,
    nfe: u32,
}

/// A token for a position, drawn from its row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Where it would go.
    pub position: usize,
    /// What would go there.
    pub token: Token,
    /// How unsure the network is, in nats; 0 for samplers that do not ask.
    pub doubt: f64,
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
        let mut canvas = Self {
            tokens,
            hits: Hits::draw(course, &clamped, &mut draws),
            gaps: clamped.iter().filter(|clamped| !**clamped).count(),
            clamped,
            committed_at: vec![0; template.len()],
            course: Arc::clone(course),
            seed,
            draws,
            step: 0,
            nfe: 0,
        };
        canvas.pass_over_steps_without_evaluation();
        canvas
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
        self.course.plan.steps(self.gaps)
    }

    /// Evaluations that are left, at most; at least 1.
    pub fn evaluations_left(&self) -> u64 {
        let left = match &self.hits {
            Some(hits) => hits.evaluations().saturating_sub(u64::from(self.nfe)),
            None => u64::from(self.total().saturating_sub(self.step)),
        };
        left.max(1)
    }

    /// Whether every step is taken.
    pub fn is_done(&self) -> bool {
        self.step >= self.total()
    }

    /// Time of the present state, from 1 down to 0.
    pub fn time(&self) -> f64 {
        match (&self.course.departures, &self.hits) {
            _ if self.is_done() => 0.0,
            // In continuous time a step ends where something is hit.
            (Departures::ContinuousHits, Some(hits)) => {
                let last = self.step.checked_sub(1);
                last.map_or(1.0, |last| hits.time(last))
            }
            (Departures::Doubts(_), _) => self.time_of_the_masked(),
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
        self.total_noise(match (&self.course.departures, &self.hits) {
            (Departures::ContinuousHits, Some(hits)) => hits.time(step),
            (Departures::Doubts(_), _) => self.time_of_the_masked(),
            _ => self.course.plan.grid.time(step),
        })
    }

    fn total_noise(&self, t: f64) -> f64 {
        self.model().manifest().schedule.total_noise(t)
    }

    /// The time at which as many positions are masked as are now.
    fn time_of_the_masked(&self) -> f64 {
        let share = self.masked() as f64 / self.gaps.max(1) as f64;
        let schedule = &self.model().manifest().schedule;
        let most = -(-schedule.total_noise(1.0)).exp_m1();
        schedule.time(-(-share.min(most)).ln_1p()).clamp(FINAL_TIME, 1.0)
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
        let mut draws = self.draws.clone();
        let leave = self.chances(step).map_or(1.0, |chances| chances.leave);
        (0..self.tokens.len()).filter(move |&i| match &self.hits {
            Some(hits) => hits.steps[i] == step,
            None => {
                let can_move = !self.clamped[i] && mask.is_none_or(|mask| self.tokens[i] == mask);
                can_move && (leave == 1.0 || draws.at(step, i).leave < leave)
            }
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
        let (law, doubt) = match departures {
            Departures::Scores(sampler) => {
                let law = plan.grid.law(*sampler, &graph, &manifest.schedule, self.step);
                (law, Doubt::None)
            }
            Departures::Hits(_) | Departures::ContinuousHits | Departures::Chance { .. } => {
                (LEAVE, Doubt::None)
            }
            Departures::Doubts(Doubts::Even) => (LEAVE, Doubt::OfToken),
            Departures::Doubts(Doubts::Bounded(_)) => (LEAVE, Doubt::OfRow),
        };
        Rows {
            law,
            doubt,
            offset: manifest.parameterization.log_score_offset(
                manifest.sigma_offset,
                self.sigma(),
                manifest.vocab_size,
            ),
            choice: plan.choice,
            step: self.next_step(),
            tokens: &self.tokens,
            draws: self.draws.clone(),
        }
    }

    /// Ends the step with what [`Rows::draw`] gave for the wanted positions.
    pub fn apply(&mut self, mut candidates: Vec<Candidate>) {
        if let Departures::Doubts(doubts) = &self.course.departures {
            candidates = self.take_the_surest(*doubts, &candidates);
        }
        self.step = self.next_step();
        let masked_again = self.masked_again();
        self.step += 1;
        self.nfe += 1;
        for Candidate { position, token, .. } in candidates {
            self.tokens[position] = token;
            self.committed_at[position] = self.step;
        }
        self.mask(&masked_again);
        self.pass_over_steps_without_evaluation();
        if self.nothing_is_left() {
            self.step = self.total();
        }
    }

    fn take_the_surest(&self, doubts: Doubts, candidates: &[Candidate]) -> Vec<Candidate> {
        let of: Vec<f64> = candidates.iter().map(|candidate| candidate.doubt).collect();
        let share = even_share(candidates.len(), self.total() - self.step);
        let taken = match doubts {
            Doubts::Even => surest(&of, share),
            Doubts::Bounded(bound) => within_entropy(&of, bound, share),
        };
        taken.into_iter().map(|index| candidates[index]).collect()
    }

    /// Chances to leave and to be masked again in `step`, where nothing but chance decides.
    fn chances(&self, step: u32) -> Option<Remask> {
        let Departures::Chance { remask } = self.course.departures else {
            return None;
        };
        let schedule = &self.model().manifest().schedule;
        Some(Remask::new(schedule, self.course.plan.grid, step, remask))
    }

    /// Positions that the present step masks again.
    fn masked_again(&self) -> Vec<usize> {
        let (Some(chances), Some(mask)) = (self.chances(self.step), self.model().graph().mask()) else {
            return Vec::new();
        };
        let mut draws = self.draws.clone();
        (0..self.tokens.len())
            .filter(|&i| !self.clamped[i] && self.tokens[i] != mask)
            .filter(|&i| draws.at(self.step, i).leave < chances.mask)
            .collect()
    }

    fn mask(&mut self, positions: &[usize]) {
        let Some(mask) = self.model().graph().mask() else {
            return;
        };
        for &position in positions {
            self.tokens[position] = mask;
            self.committed_at[position] = 0;
        }
    }

    /// Takes steps in which chance leaves every mask where it is.
    fn pass_over_steps_without_evaluation(&mut self) {
        while self.chances(self.step).is_some() && !self.is_done() && self.wanted().next().is_none() {
            let masked_again = self.masked_again();
            self.mask(&masked_again);
            self.step += 1;
        }
    }

    fn nothing_is_left(&self) -> bool {
        match (&self.course.departures, &self.hits) {
            (_, Some(hits)) => hits.next(self.step).is_none(),
            (Departures::Chance { .. }, None) => self.is_done(),
            (_, None) => {
                self.model().graph().kind() == GraphKind::Absorbing && self.wanted().next().is_none()
            }
        }
    }
}

/// One step of a canvas, position by position.
#[derive(Debug)]
pub struct Rows<'a> {
    law: RowLaw,
    doubt: Doubt,
    offset: f64,
    choice: TokenChoice,
    step: u32,
    tokens: &'a [Token],
    draws: Draws,
}

impl Rows<'_> {
    /// What becomes of `position`, given the network's row for it; `None` when it stays.
    pub fn draw(
        &mut self,
        position: usize,
        log_score: &[f32],
        scratch: &mut Scratch,
    ) -> Result<Option<Candidate>, BadScores> {
        let u = self.draws.at(self.step, position);
        let x = self.tokens[position];
        let token = row::draw(&self.law, &self.choice, x, log_score, self.offset, u, scratch)?;
        let candidate = |token| -> Result<Candidate, BadScores> {
            Ok(Candidate {
                position,
                token,
                doubt: row::doubt(self.doubt, x, token, log_score, scratch)?,
            })
        };
        token.map(candidate).transpose()
    }
}
