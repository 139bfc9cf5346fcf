//! One canvas and its next evaluation: the whole state of a generation.

use std::sync::Arc;

use super::ServedModel;
use crate::diffusion::sampler::TimeGrid;
use crate::diffusion::sampler::row::{self, BadScores};
use crate::diffusion::{Draws, GraphKind, SamplerKind, Token, TokenChoice};

/// How a canvas is denoised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// The times of the evaluations.
    pub grid: TimeGrid,
    /// The discretisation.
    pub sampler: SamplerKind,
    /// How tokens are chosen.
    pub choice: TokenChoice,
}

/// A row of tokens on its way from noise to text.
#[derive(Clone, Debug)]
pub struct Canvas {
    model: Arc<ServedModel>,
    plan: Plan,
    seed: u64,
    draws: Draws,
    tokens: Vec<Token>,
    clamped: Arc<[bool]>,
    /// For every position, the number of steps after which it got its present token.
    committed_at: Vec<u32>,
    step: u32,
    nfe: u32,
}

impl Canvas {
    /// The initial canvas: clamped tokens from the template, the limit law everywhere else.
    pub fn new(
        model: &Arc<ServedModel>,
        template: &[Option<Token>],
        plan: Plan,
        seed: u64,
        index: u64,
    ) -> Self {
        let mut draws = Draws::new(seed, index);
        let graph = model.graph();
        let tokens = template
            .iter()
            .enumerate()
            .map(|(i, token)| token.unwrap_or_else(|| graph.sample_limit(draws.prior(i))));
        Self {
            tokens: tokens.collect(),
            clamped: template.iter().map(Option::is_some).collect(),
            committed_at: vec![0; template.len()],
            model: Arc::clone(model),
            plan,
            seed,
            draws,
            step: 0,
            nfe: 0,
        }
    }

    /// The model that denoises this canvas.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.model
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
        self.plan.grid.evaluations()
    }

    /// Time of the present state, from 1 down to 0.
    pub fn time(&self) -> f64 {
        if self.is_done() {
            0.0
        } else {
            self.plan.grid.time(self.step)
        }
    }

    /// Total noise of the present state; 0 when done.
    pub fn sigma(&self) -> f64 {
        if self.is_done() {
            0.0
        } else {
            self.model.manifest().schedule.total_noise(self.time())
        }
    }

    /// Whether every step is taken.
    pub fn is_done(&self) -> bool {
        self.step >= self.total()
    }

    /// Positions that are masked.
    pub fn masked(&self) -> usize {
        self.model
            .graph()
            .mask()
            .map_or(0, |mask| self.tokens.iter().filter(|t| **t == mask).count())
    }

    /// Positions whose scores the next evaluation needs, ascending.
    pub fn wanted(&self) -> impl Iterator<Item = usize> + '_ {
        let mask = self.model.graph().mask();
        (0..self.tokens.len())
            .filter(move |&i| !self.clamped[i] && mask.is_none_or(|mask| self.tokens[i] == mask))
    }

    /// Takes one step: `scores[k]` is the network's row for the k-th of `positions`, which are what
    /// [`Self::wanted`] gave.
    ///
    /// Returns how many tokens changed. On an error the canvas is as it was.
    pub fn advance<'a>(
        &mut self,
        positions: &[usize],
        scores: impl Fn(usize) -> &'a [f32],
        weights: &mut Vec<f64>,
    ) -> Result<usize, BadScores> {
        let (graph, schedule) = (self.model.graph(), &self.model.manifest().schedule);
        let law = self
            .plan
            .grid
            .law(self.plan.sampler.sampler(), &graph, schedule, self.step);
        let offset = self.offset();
        let mut moves = Vec::new();
        for (k, &position) in positions.iter().enumerate() {
            let u = self.draws.at(self.step, position);
            let x = self.tokens[position];
            if let Some(y) = row::draw(&law, &self.plan.choice, x, scores(k), offset, u, weights)? {
                moves.push((position, y));
            }
        }
        self.step += 1;
        self.nfe += 1;
        for &(position, y) in &moves {
            self.tokens[position] = y;
            self.committed_at[position] = self.step;
        }
        if graph.kind() == GraphKind::Absorbing && self.wanted().next().is_none() {
            // Nothing is left that could change.
            self.step = self.total();
        }
        Ok(moves.len())
    }

    /// What turns the network's output into log-scores at the present noise.
    fn offset(&self) -> f64 {
        let (manifest, sigma) = (self.model.manifest(), self.sigma());
        manifest
            .parameterization
            .log_score_offset(manifest.sigma_offset, sigma, manifest.vocab_size)
    }
}
