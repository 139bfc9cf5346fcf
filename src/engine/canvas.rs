//! One canvas between its steps: the whole state of a generation.
//!
//! What a step is, its sampler says: see [`crate::diffusion::sampler`].

use std::sync::Arc;

use super::plan::Plan;
use crate::diffusion::sampler::row::{self, RowError, Scratch};
use crate::diffusion::sampler::{Candidate, CanvasView, Commit, Evaluation, HittingTimes, Second, finish};
use crate::diffusion::{Draws, Token};
use crate::models::ServedModel;

/// A canvas between two steps, as the outside keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct CanvasState {
    /// Token ids, masks included.
    pub tokens: Vec<Token>,
    /// For every position, the number of steps after which it got its present token.
    pub committed_at: Vec<u32>,
    /// For every position, the log-probability of its token when it got it; 0 where `committed_at` is.
    pub log_probabilities: Vec<f32>,
    /// Steps taken.
    pub step: u32,
    /// Evaluations spent.
    pub nfe: u32,
}

/// A state that a canvas can never be in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadState(String);

/// What the canvases of a request begin with. They have it in common, with each other and with their published states,
/// until they change it: a canvas that waits takes hardly more memory than its hitting times.
#[derive(Clone, Debug)]
pub struct Beginning {
    template: Arc<[Option<Token>]>,
    clamped: Arc<[bool]>,
    gaps: usize,
    /// The tokens, where none is drawn.
    tokens: Option<Arc<[Token]>>,
    committed_at: Arc<[u32]>,
    log_probabilities: Arc<[f32]>,
}

impl Beginning {
    /// The beginning of canvases of `template`.
    pub fn new(plan: &Plan, template: &Arc<[Option<Token>]>) -> Self {
        let clamped: Arc<[bool]> = template.iter().map(Option::is_some).collect();
        let token = |token: &Option<Token>| token.or_else(|| plan.certain_initial());
        Self {
            tokens: template.iter().map(token).collect(),
            gaps: clamped.iter().filter(|clamped| !**clamped).count(),
            clamped,
            committed_at: template.iter().map(|_| 0).collect(),
            log_probabilities: template.iter().map(|_| 0.0).collect(),
            template: Arc::clone(template),
        }
    }

    fn tokens(&self, plan: &Plan, draws: &mut Draws) -> Arc<[Token]> {
        if let Some(tokens) = &self.tokens {
            return Arc::clone(tokens);
        }
        let template = self.template.iter().enumerate();
        template
            .map(|(i, token)| token.unwrap_or_else(|| plan.initial(i, draws.prior(i))))
            .collect()
    }
}

/// A row of tokens on its way from noise to text.
#[derive(Clone, Debug)]
pub struct Canvas {
    plan: Arc<Plan>,
    seed: u64,
    draws: Draws,
    tokens: Arc<[Token]>,
    clamped: Arc<[bool]>,
    /// Positions that are not clamped.
    gaps: usize,
    hitting_times: Option<HittingTimes>,
    /// For every position, the number of steps after which it got its present token.
    committed_at: Arc<[u32]>,
    /// For every position, the log-probability of its token when it got it; 0 where it has not.
    log_probabilities: Arc<[f32]>,
    step: u32,
    nfe: u32,
    finished_early: bool,
}

impl Canvas {
    /// The initial canvas: clamped tokens from the template, what the plan says everywhere else.
    pub fn new(plan: &Arc<Plan>, beginning: &Beginning, seed: u64, index: u64) -> Self {
        let mut draws = Draws::new(seed, index);
        let tokens = beginning.tokens(plan, &mut draws);
        let mask = plan.model.graph().mask();
        let masked: Vec<bool> = tokens.iter().map(|token| Some(*token) == mask).collect();
        let mut canvas = Self {
            tokens,
            hitting_times: plan.sampler.hitting_times(&masked, &mut draws),
            gaps: beginning.gaps,
            clamped: Arc::clone(&beginning.clamped),
            committed_at: Arc::clone(&beginning.committed_at),
            log_probabilities: Arc::clone(&beginning.log_probabilities),
            plan: Arc::clone(plan),
            seed,
            draws,
            step: 0,
            nfe: 0,
            finished_early: false,
        };
        // Of a draft the noise may have left everything as it was.
        if !plan.sampler.can_be(&canvas.view()) {
            canvas.step = canvas.total();
        }
        canvas.pass_over_steps_without_evaluation();
        canvas
    }

    /// The canvas that [`Self::new`] gives, at a later state of it.
    ///
    /// # Errors
    /// When such a canvas can never be in this state; what cannot be told from a state that was is harmless.
    pub fn resume(
        plan: &Arc<Plan>,
        beginning: &Beginning,
        seed: u64,
        index: u64,
        state: CanvasState,
    ) -> Result<Self, BadState> {
        let fresh = Self::new(plan, beginning, seed, index);
        let template = &beginning.template;
        let (length, total, graph) = (template.len(), fresh.total(), plan.model.graph());
        let most = plan.sampler.evaluations_left(&fresh.view()).max(1);
        let lengths = [
            state.tokens.len(),
            state.committed_at.len(),
            state.log_probabilities.len(),
        ];
        if lengths != [length; 3] {
            return Err(BadState(format!(
                "it has not the {length} positions of the canvas"
            )));
        }
        if state.step > total || u64::from(state.nfe) > most {
            let problem = format!("it is beyond the {total} steps or {most} evaluations of the canvas");
            return Err(BadState(problem));
        }
        for (position, (&token, clamped)) in state.tokens.iter().zip(template.iter()).enumerate() {
            if token as usize >= graph.states() {
                return Err(BadState(format!(
                    "token {token} at position {position} does not exist"
                )));
            }
            if clamped.is_some_and(|clamped| clamped != token) {
                return Err(BadState(format!(
                    "position {position} is clamped to another token"
                )));
            }
            let is_allowed = |allowed: &[Token]| Some(token) == graph.mask() || allowed.contains(&token);
            if clamped.is_none() && !plan.allowed_at(position).is_none_or(is_allowed) {
                return Err(BadState(format!(
                    "token {token} is not allowed at position {position}"
                )));
            }
            let log_probability = state.log_probabilities[position];
            if !(log_probability <= 0.0 && log_probability.is_finite()) {
                return Err(BadState(format!(
                    "the log-probability at position {position} is none"
                )));
            }
            let committed_at = state.committed_at[position];
            let never = clamped.is_some() || Some(token) == graph.mask();
            if committed_at > state.step || (never && committed_at > 0) {
                return Err(BadState(format!(
                    "position {position} cannot have got its token after {committed_at} steps"
                )));
            }
        }
        let mut canvas = Self {
            tokens: state.tokens.into(),
            committed_at: state.committed_at.into(),
            log_probabilities: state.log_probabilities.into(),
            step: state.step,
            nfe: state.nfe,
            ..fresh
        };
        let fits = if canvas.is_done() {
            canvas.masked() == 0
        } else {
            plan.sampler.can_be(&canvas.view())
        };
        if !fits {
            let problem = format!("what is masked cannot be so after {} steps", canvas.step);
            return Err(BadState(problem));
        }
        canvas.pass_over_steps_without_evaluation();
        Ok(canvas)
    }

    /// The model that denoises this canvas.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.plan.model
    }

    /// The tokens as they are now.
    pub fn tokens(&self) -> &Arc<[Token]> {
        &self.tokens
    }

    /// Which positions never change.
    pub fn clamped(&self) -> &Arc<[bool]> {
        &self.clamped
    }

    /// Positions that are not clamped.
    pub fn gaps(&self) -> usize {
        self.gaps
    }

    /// For every position, the number of steps after which it got its present token.
    pub fn committed_at(&self) -> &Arc<[u32]> {
        &self.committed_at
    }

    /// For every position, the log-probability of its token when it got it; 0 where it has not.
    pub fn log_probabilities(&self) -> &Arc<[f32]> {
        &self.log_probabilities
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
        self.plan.sampler.steps(self.gaps)
    }

    /// Evaluations that are left, at most; at least 1.
    pub fn evaluations_left(&self) -> u64 {
        self.plan.sampler.evaluations_left(&self.view()).max(1)
    }

    /// Whether its last step was taken in place of several.
    pub fn finished_early(&self) -> bool {
        self.finished_early
    }

    /// Whether every step is taken.
    pub fn is_done(&self) -> bool {
        self.step >= self.total()
    }

    /// Time of the present state, from 1 down to 0.
    pub fn time(&self) -> f64 {
        if self.is_done() {
            0.0
        } else {
            self.plan.sampler.time(&self.view())
        }
    }

    /// Total noise of the present state; 0 when done.
    pub fn sigma(&self) -> f64 {
        if self.is_done() {
            0.0
        } else {
            self.model().manifest().schedule.total_noise(self.time())
        }
    }

    /// Positions that are masked.
    pub fn masked(&self) -> usize {
        self.model()
            .graph()
            .mask()
            .map_or(0, |mask| self.tokens.iter().filter(|t| **t == mask).count())
    }

    /// Returns the next evaluation of a canvas that is not done.
    pub fn evaluation(&self) -> Evaluation {
        self.plan.sampler.evaluation(&self.view())
    }

    /// Returns the evaluation that finishes a canvas that is not done at once.
    pub fn finish(&self) -> Evaluation {
        finish(&self.view(), &self.model().manifest().process(), self.time())
    }

    /// Positions that may still change, whichever the next evaluation is about.
    pub fn movable(&self) -> usize {
        self.view().movable(self.model().graph().mask()).count()
    }

    /// Evaluations of the step that begins with `first`, at most.
    pub fn evaluations(&self, first: &Evaluation) -> u32 {
        if first.finishes {
            return 1;
        }
        self.plan.sampler.evaluations(first)
    }

    /// Returns the second evaluation of the step, where the sampler has one, given the candidates of `first`.
    pub fn second(&self, first: &Evaluation, candidates: &[Candidate]) -> Option<Second> {
        if first.finishes {
            return None;
        }
        self.plan.sampler.second(&self.view(), first, candidates)
    }

    /// Rows of `evaluation` to tokens, for threads to share.
    pub fn rows<'a>(&'a self, evaluation: &'a Evaluation) -> Rows<'a> {
        Rows {
            evaluation,
            offset: self.plan.offset(evaluation),
            plan: &self.plan,
            tokens: &self.tokens,
            draws: self.draws.clone(),
        }
    }

    /// Ends the step of `evaluation`, its last, with what its rows and those of an evaluation before it gave, in
    /// this order; `evaluations` were spent.
    pub fn commit(&mut self, evaluation: &Evaluation, candidates: Vec<Candidate>, evaluations: u32) {
        let commit = if evaluation.finishes {
            Commit {
                set: candidates,
                masked: Vec::new(),
                step: self.total(),
            }
        } else {
            self.plan.sampler.commit(&self.view(), evaluation, candidates)
        };
        self.finished_early |= evaluation.finishes;
        self.nfe += evaluations;
        // What is set in a step carries its number, also where the canvas is done early.
        self.apply(&commit, evaluation.step + 1);
        self.pass_over_steps_without_evaluation();
    }

    fn apply(&mut self, commit: &Commit, number: u32) {
        self.step = commit.step;
        if commit.set.is_empty() && commit.masked.is_empty() {
            return;
        }
        let mask = self.model().graph().mask();
        let tokens = Arc::make_mut(&mut self.tokens);
        let committed_at = Arc::make_mut(&mut self.committed_at);
        let log_probabilities = Arc::make_mut(&mut self.log_probabilities);
        for candidate in &commit.set {
            tokens[candidate.position] = candidate.token;
            committed_at[candidate.position] = number;
            // What comes back must be finite, and be read back as it was.
            let log_probability = (candidate.log_probability as f32).max(f32::MIN);
            log_probabilities[candidate.position] = log_probability;
        }
        if let Some(mask) = mask {
            for &position in &commit.masked {
                tokens[position] = mask;
                committed_at[position] = 0;
                log_probabilities[position] = 0.0;
            }
        }
    }

    fn pass_over_steps_without_evaluation(&mut self) {
        while let Some(commit) = self.plan.sampler.pass_over(&self.view()) {
            self.apply(&commit, commit.step);
        }
    }

    fn view(&self) -> CanvasView<'_> {
        CanvasView {
            tokens: &self.tokens,
            clamped: &self.clamped,
            gaps: self.gaps,
            step: self.step,
            nfe: self.nfe,
            hitting_times: self.hitting_times.as_ref(),
            draws: &self.draws,
        }
    }
}

/// One evaluation of a canvas, position by position.
#[derive(Debug)]
pub struct Rows<'a> {
    evaluation: &'a Evaluation,
    plan: &'a Plan,
    offset: f64,
    tokens: &'a [Token],
    draws: Draws,
}

impl<'a> Rows<'a> {
    /// The same about `tokens` in place of the canvas's own.
    #[must_use]
    pub fn about(self, tokens: &'a [Token]) -> Self {
        Self { tokens, ..self }
    }

    /// Draws what becomes of `position`, given the network's row for it, and where the evaluation is a second one also
    /// the first one's, with its offset; `None` when it stays.
    pub fn draw(
        &mut self,
        position: usize,
        log_score: &[f32],
        kept: Option<(&[f32], f64)>,
        scratch: &mut Scratch,
    ) -> Result<Option<Candidate>, RowError> {
        let Evaluation {
            law,
            uncertainty,
            draw,
            ..
        } = self.evaluation;
        let u = self.draws.at(*draw, position);
        let (x, choice) = (self.tokens[position], &self.plan.choice);
        let allowed = self.plan.allowed_at(position);
        let among = row::Choice { choice, allowed };
        let token = row::draw_by(law, among, x, log_score, self.offset, kept, u, scratch)?;
        let candidate = |token| -> Result<Candidate, RowError> {
            Ok(Candidate {
                position,
                token,
                uncertainty: row::uncertainty(*uncertainty, x, token, log_score, scratch)?,
                log_probability: row::log_probability(x, token, log_score, scratch),
            })
        };
        token.map(candidate).transpose()
    }

    /// Returns the offset that makes log-scores of this evaluation's rows.
    pub fn offset(&self) -> f64 {
        self.offset
    }
}
