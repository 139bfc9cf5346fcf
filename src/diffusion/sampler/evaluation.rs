//! What a sampler decides: what is asked of the network next, and what becomes of the canvas then.

use super::{Discretization, HittingTimes, RowLaw, Tweedie};
use crate::diffusion::draw::FINISHING_STEP;
use crate::diffusion::{Draws, GraphKind, Process, Token};

/// A canvas between two steps, as samplers see it.
#[derive(Clone, Copy, Debug)]
pub struct CanvasView<'a> {
    /// The tokens as they are now.
    pub tokens: &'a [Token],
    /// Which of them never change.
    pub clamped: &'a [bool],
    /// How many of them may change.
    pub gaps: usize,
    /// Steps taken: the cursor.
    pub step: u32,
    /// Evaluations spent.
    pub nfe: u32,
    /// When its positions leave the mask, where that is drawn at the start.
    pub hitting_times: Option<&'a HittingTimes>,
    /// Its random numbers.
    pub draws: &'a Draws,
}

impl<'a> CanvasView<'a> {
    /// Positions that may still move: those that hold `mask`, or where there is none all that are not clamped.
    pub fn movable(self, mask: Option<Token>) -> impl Iterator<Item = usize> + 'a {
        let (tokens, clamped) = (self.tokens, self.clamped);
        (0..tokens.len()).filter(move |&i| !clamped[i] && mask.is_none_or(|mask| tokens[i] == mask))
    }
}

/// An evaluation of the network for one canvas.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// The step that it belongs to: the cursor before it, or the next step in which something happens.
    pub step: u32,
    /// The number under which its random choices are drawn.
    pub draw: u32,
    /// The time at which the network is asked.
    pub t: f64,
    /// Total noise at that time.
    pub sigma: f64,
    /// The law of a row.
    pub law: Law,
    /// The uncertainty that is computed of a row.
    pub uncertainty: Uncertainty,
    /// Positions whose rows are needed, ascending.
    pub positions: Vec<usize>,
    /// Whether it is the canvas's last, whatever its sampler has left to do: see [`finish`].
    pub finishes: bool,
}

/// The evaluation that finishes a canvas at once: all the noise that is left at time `t` is removed in one step, by
/// Tweedie's law, and on absorbing graphs nothing stays masked.
pub fn finish(canvas: &CanvasView<'_>, process: &Process, t: f64) -> Evaluation {
    Evaluation {
        step: canvas.step,
        draw: FINISHING_STEP,
        t,
        sigma: process.total_noise(t),
        law: Law::Affine(Tweedie.denoise(&process.graph, &process.schedule, t)),
        uncertainty: Uncertainty::None,
        positions: canvas.movable(process.graph.mask()).collect(),
        finishes: true,
    }
}

/// The law of a token's move, given its row of log-scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Law {
    /// An affine law of its scores.
    Affine(RowLaw),
    /// Jumps at a constant rate, `gain * s_y - kept * s'_y` to each `y` where that is positive, with `s'` the
    /// scores of the step's first evaluation: the token moves with probability `1 - exp(-sum of rates)`.
    Jump {
        /// Weight of a score.
        gain: f64,
        /// Weight of the first evaluation's score, which is subtracted.
        kept: f64,
    },
    /// None: nothing moves, the row is asked about a token that is known.
    Given,
}

/// How unsure the network is of a position, before temperature, top-k and top-p; scores are taken as normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Uncertainty {
    /// Not asked for.
    None,
    /// Minus the log-probability of the token that was drawn.
    NegLogProb,
    /// The entropy of the row.
    Entropy,
    /// One less the margin: how far the likeliest token's probability is above the second's.
    Margin,
}

/// A token for a position, drawn from its row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Where it would go.
    pub position: usize,
    /// The token.
    pub token: Token,
    /// How unsure the network is, in nats, of margins from 0 to 1; 0 for samplers that do not ask.
    pub uncertainty: f64,
    /// The log-probability that the network gives the token, in nats.
    pub log_probability: f64,
}

/// A change of the canvas. Tokens are set first, then masked; the cursor moves with them, so that what was
/// set has the new cursor's number.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Commit {
    /// Tokens that are set.
    pub set: Vec<Candidate>,
    /// Positions that are masked again.
    pub masked: Vec<usize>,
    /// The cursor after it.
    pub step: u32,
}

/// The second evaluation of a step: of a canvas in between, with the rows of the first at hand.
#[derive(Clone, Debug, PartialEq)]
pub struct Second {
    /// The canvas in between.
    pub tokens: Vec<Token>,
    /// Its evaluation; the positions are among those of the first.
    pub evaluation: Evaluation,
}

/// Whether there is something left to do for samplers that end with the last mask.
pub(super) fn something_is_left(process: &Process, canvas: &CanvasView<'_>) -> bool {
    process.graph.kind() == GraphKind::Uniform || canvas.movable(process.graph.mask()).next().is_some()
}

/// A way from noise to tokens: pure functions of a canvas. Made once for a request by
/// [`SamplerKind::build`](super::SamplerKind::build).
pub trait Sampler: std::fmt::Debug + Send + Sync {
    /// Steps of a canvas with `gaps` positions to fill.
    fn steps(&self, gaps: usize) -> u32;

    /// When the positions of a canvas leave the mask that are `masked` at the start, for samplers that draw it then.
    fn hitting_times(&self, _masked: &[bool], _draws: &mut Draws) -> Option<HittingTimes> {
        None
    }

    /// Returns the next evaluation of a canvas that is not done.
    fn evaluation(&self, canvas: &CanvasView<'_>) -> Evaluation;

    /// Evaluations of the step that begins with `first`, at most.
    fn evaluations(&self, _first: &Evaluation) -> u32 {
        1
    }

    /// Returns the second evaluation of the step, given the candidates of the first; `None` for samplers of one.
    fn second(
        &self,
        _canvas: &CanvasView<'_>,
        _first: &Evaluation,
        _candidates: &[Candidate],
    ) -> Option<Second> {
        None
    }

    /// Returns what is committed, given the candidates of the step's evaluations.
    fn commit(&self, canvas: &CanvasView<'_>, evaluation: &Evaluation, candidates: Vec<Candidate>) -> Commit;

    /// A step that needs no evaluation, if the next one is such.
    fn pass_over(&self, _canvas: &CanvasView<'_>) -> Option<Commit> {
        None
    }

    /// Evaluations that are left, at most.
    fn evaluations_left(&self, canvas: &CanvasView<'_>) -> u64 {
        u64::from(self.steps(canvas.gaps).saturating_sub(canvas.step))
    }

    /// Whether a canvas that is not done can have these tokens at its cursor: asked of states that come from outside.
    fn can_be(&self, canvas: &CanvasView<'_>) -> bool;

    /// The time of a canvas that is not done.
    fn time(&self, canvas: &CanvasView<'_>) -> f64;
}
