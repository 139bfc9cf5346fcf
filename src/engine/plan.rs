//! How canvases go from noise to text: what a request asks, and what its canvases share.

use std::sync::Arc;

use crate::diffusion::sampler::{Evaluation, Sampler, TimeGrid, normalized};
use crate::diffusion::{SamplerKind, Token, TokenChoice};
use crate::models::ServedModel;

/// How a canvas is denoised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
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

impl Sampling {
    /// Evaluations of a canvas with `gaps` positions to fill, at most.
    pub fn most_evaluations(&self, gaps: usize, model: &ServedModel) -> u64 {
        self.sampler
            .most_evaluations(self.grid, gaps, self.is_normalized(model))
    }

    /// Steps of a canvas with `gaps` positions to fill, the final denoising included.
    pub fn steps(&self, gaps: usize, model: &ServedModel) -> u32 {
        let process = model.manifest().process();
        let sampler = self.sampler.build(process, self.grid, self.is_normalized(model));
        sampler.steps(gaps)
    }

    /// Whether scores are normalised, asked for or not: the noise alone then says when a position leaves.
    pub fn is_normalized(&self, model: &ServedModel) -> bool {
        let manifest = model.manifest();
        normalized(
            self.normalize,
            self.sampler,
            &manifest.process(),
            manifest.parameterization,
        )
    }
}

/// How the canvases of a request are denoised: its sampling, resolved for its model.
#[derive(Debug)]
pub struct Plan {
    pub(super) model: Arc<ServedModel>,
    pub(super) sampler: Box<dyn Sampler>,
    pub(super) choice: TokenChoice,
    pub(super) allowed: Option<Allowed>,
    draft: Option<Draft>,
    /// Total noise at which canvases begin.
    start_sigma: f64,
}

/// Tokens that are there to begin with and may change: for every position one, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft(pub Vec<Option<Token>>);

/// Tokens that may be chosen, position by position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Sets of tokens, none empty, each ascending.
    pub sets: Vec<Vec<Token>>,
    /// For every position the set that holds there, or none.
    pub of: Vec<Option<usize>>,
}

impl Allowed {
    fn at(&self, position: usize) -> Option<&[Token]> {
        let set = (*self.of.get(position)?)?;
        self.sets.get(set).map(Vec::as_slice)
    }
}

impl Plan {
    /// The plan of `sampling` for canvases of `model`.
    pub fn new(
        model: &Arc<ServedModel>,
        sampling: Sampling,
        allowed: Option<Allowed>,
        draft: Option<Draft>,
    ) -> Self {
        let process = model.manifest().process();
        Self {
            start_sigma: process.total_noise(sampling.grid.start),
            sampler: sampling
                .sampler
                .build(process, sampling.grid, sampling.is_normalized(model)),
            model: Arc::clone(model),
            choice: sampling.choice,
            allowed,
            draft,
        }
    }

    /// The token that every open position begins with, where that is left to no chance.
    pub(super) fn certain_initial(&self) -> Option<Token> {
        let mask = self.model.graph().mask();
        mask.filter(|_| self.draft.is_none())
    }

    /// The token that an open position begins with, for a uniform `u`: its draft's, noised up to the start by the
    /// forward process, or else one of the limit law, among those that are allowed.
    pub(super) fn initial(&self, position: usize, u: f64) -> Token {
        let graph = self.model.graph();
        let draft = self
            .draft
            .as_ref()
            .and_then(|Draft(tokens)| *tokens.get(position)?);
        if let Some(token) = draft {
            return graph.sample_transition(token, self.start_sigma, u);
        }
        match self.allowed_at(position) {
            Some(allowed) if graph.mask().is_none() => {
                let index = (u * allowed.len() as f64) as usize;
                let token = allowed.get(index).or(allowed.last());
                token.copied().unwrap_or_else(|| graph.sample_limit(u))
            }
            _ => graph.sample_limit(u),
        }
    }

    /// The tokens that may be chosen at a position; all of them where this is `None`.
    pub(super) fn allowed_at(&self, position: usize) -> Option<&[Token]> {
        self.allowed.as_ref()?.at(position)
    }

    /// Returns the offset that makes log-scores of the network's output in `evaluation`.
    pub(super) fn offset(&self, evaluation: &Evaluation) -> f64 {
        let manifest = self.model.manifest();
        manifest.parameterization.log_score_offset(
            manifest.sigma_offset,
            evaluation.sigma,
            manifest.vocab_size,
        )
    }
}
