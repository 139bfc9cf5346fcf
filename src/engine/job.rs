//! What a worker moves on, evaluation by evaluation: a canvas that is denoised, or a text that is scored. Passes are
//! shared by both.

use std::sync::Arc;

use super::canvas::{self, Canvas};
use super::scoring::{ScoredRows, Scoring};
use crate::diffusion::Token;
use crate::diffusion::sampler::row::{RowError, Scratch};
use crate::diffusion::sampler::{Candidate, Evaluation, Second};
use crate::models::ServedModel;

/// See the module.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "the work that it is part of is as large"
)]
pub(super) enum Job {
    /// A canvas that is denoised.
    Denoising(Canvas),
    /// A part of a text that is scored.
    Scoring(Scoring),
}

impl Job {
    pub(super) fn model(&self) -> &Arc<ServedModel> {
        match self {
            Self::Denoising(canvas) => canvas.model(),
            Self::Scoring(scoring) => scoring.model(),
        }
    }

    /// The tokens that the network is shown next.
    pub(super) fn tokens(&self) -> &[Token] {
        match self {
            Self::Denoising(canvas) => canvas.tokens(),
            Self::Scoring(scoring) => scoring.canvas(),
        }
    }

    /// Returns the next evaluation, where there is one.
    pub(super) fn evaluation(&self) -> Evaluation {
        match self {
            Self::Denoising(canvas) => canvas.evaluation(),
            Self::Scoring(scoring) => scoring.evaluation(),
        }
    }

    /// Returns the evaluation that ends it at once, where one can.
    pub(super) fn finish(&self) -> Option<Evaluation> {
        match self {
            Self::Denoising(canvas) => Some(canvas.finish()),
            Self::Scoring(_) => None,
        }
    }

    /// Rows that `evaluation`, or the one that finishes in its place, needs at most.
    pub(super) fn most_rows(&self, evaluation: &Evaluation, may_finish: bool) -> usize {
        match self {
            Self::Denoising(canvas) if may_finish => canvas.movable(),
            Self::Denoising(_) | Self::Scoring(_) => evaluation.positions.len(),
        }
    }

    /// Evaluations of the step that begins with `first`, at most.
    pub(super) fn evaluations(&self, first: &Evaluation) -> u32 {
        match self {
            Self::Denoising(canvas) => canvas.evaluations(first),
            Self::Scoring(_) => 1,
        }
    }

    /// Evaluations that are left, at most; at least 1 of what is not done.
    pub(super) fn evaluations_left(&self) -> u64 {
        match self {
            Self::Denoising(canvas) => canvas.evaluations_left(),
            Self::Scoring(scoring) => scoring.evaluations_left(),
        }
    }

    pub(super) fn is_done(&self) -> bool {
        match self {
            Self::Denoising(canvas) => canvas.is_done(),
            Self::Scoring(scoring) => scoring.is_done(),
        }
    }

    /// Evaluations spent.
    pub(super) fn nfe(&self) -> u32 {
        match self {
            Self::Denoising(canvas) => canvas.nfe(),
            Self::Scoring(scoring) => scoring.nfe(),
        }
    }

    /// Returns the second evaluation of the step, where there is one, given the candidates of `first`.
    pub(super) fn second(&self, first: &Evaluation, candidates: &[Candidate]) -> Option<Second> {
        match self {
            Self::Denoising(canvas) => canvas.second(first, candidates),
            Self::Scoring(_) => None,
        }
    }

    /// Rows of `evaluation` to candidates, for threads to share.
    pub(super) fn rows<'a>(&'a self, evaluation: &'a Evaluation) -> Rows<'a> {
        match self {
            Self::Denoising(canvas) => Rows::Denoising(canvas.rows(evaluation)),
            Self::Scoring(scoring) => Rows::Scoring(scoring.rows()),
        }
    }

    /// Returns the offset that makes log-scores of the rows of `evaluation`.
    pub(super) fn offset(&self, evaluation: &Evaluation) -> f64 {
        match self {
            Self::Denoising(canvas) => canvas.rows(evaluation).offset(),
            Self::Scoring(scoring) => scoring.rows().offset(),
        }
    }

    /// Ends the step of `evaluation` with what its rows gave, and those of an evaluation before it; `evaluations` were
    /// spent.
    pub(super) fn commit(&mut self, evaluation: &Evaluation, candidates: Vec<Candidate>, evaluations: u32) {
        match self {
            Self::Denoising(canvas) => canvas.commit(evaluation, candidates, evaluations),
            Self::Scoring(scoring) => scoring.commit(&candidates),
        }
    }
}

/// One evaluation, position by position.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one on the stack for all rows of a job")]
pub(super) enum Rows<'a> {
    Denoising(canvas::Rows<'a>),
    Scoring(ScoredRows<'a>),
}

impl<'a> Rows<'a> {
    /// The same about `tokens` in place of the canvas's own.
    pub(super) fn about(self, tokens: &'a [Token]) -> Self {
        match self {
            Self::Denoising(rows) => Self::Denoising(rows.about(tokens)),
            Self::Scoring(rows) => Self::Scoring(rows),
        }
    }

    /// What becomes of `position`, given the network's row for it and what was kept of the step's first evaluation;
    /// `None` when it stays.
    pub(super) fn draw(
        &mut self,
        position: usize,
        log_score: &[f32],
        kept: Option<(&[f32], f64)>,
        scratch: &mut Scratch,
    ) -> Result<Option<Candidate>, RowError> {
        match self {
            Self::Denoising(rows) => rows.draw(position, log_score, kept, scratch),
            Self::Scoring(rows) => rows.read(position, log_score, scratch).map(Some),
        }
    }
}
