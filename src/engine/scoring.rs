//! Texts that are scored: what goes in, what comes out, and the parts that workers move on.
//!
//! The evaluations of most texts do not wait for each other, so that a text goes to the workers in several parts at
//! once: as many as make all passes full.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::watch;

use super::caller::RequestName;
use super::{Caller, Deadline, Failure, Shared};
use crate::diffusion::likelihood::{Estimate, Likelihood, Question, ScoredText};
use crate::diffusion::sampler::row::{RowError, Scratch};
use crate::diffusion::sampler::{Candidate, Evaluation};
use crate::diffusion::{Draws, Token};
use crate::models::ServedModel;

/// A request to score texts.
#[derive(Clone, Debug)]
pub struct ScoreRequest {
    /// Names the request among those of its caller that run.
    pub id: String,
    /// The caller.
    pub caller: Caller,
    /// The model.
    pub model: Arc<ServedModel>,
    /// The texts, each at most the model's longest canvas; at least one.
    pub texts: Vec<TextToScore>,
    /// What is asked about them.
    pub likelihood: Likelihood,
    /// Seed of all random choices.
    pub seed: u64,
    /// When all must be scored, if at some time; the request fails when it has passed.
    pub deadline: Option<Deadline>,
    /// Of the requests of one caller, those of higher priority go first.
    pub priority: i32,
}

/// A text to score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextToScore {
    /// Token ids, none of them the mask.
    pub tokens: Vec<Token>,
    /// For every position, whether it is context: seen as it is, and not scored. At least one is not.
    pub context: Vec<bool>,
}

impl TextToScore {
    /// Positions that are scored.
    fn scored(&self) -> u32 {
        let scored = self.context.iter().filter(|context| !**context).count();
        u32::try_from(scored).unwrap_or(u32::MAX)
    }
}

/// A text that has been scored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextScore {
    /// Minus the log-likelihood of what is scored, or a bound on it.
    pub estimate: Estimate,
    /// Positions that are scored.
    pub scored: u32,
    /// The log-probability of every one of them when it was filled, from left to right, where it is exact. Empty for a
    /// bound.
    pub log_probabilities: Vec<f64>,
    /// Evaluations spent.
    pub evaluations: u32,
}

/// How far a request is.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// Evaluations that are done.
    pub done: u64,
    /// Evaluations until all texts are scored, at most.
    pub total: u64,
    /// Text by text; `None` where there is more to come.
    pub texts: Vec<Option<Arc<TextScore>>>,
    /// Why the request was ended, if it was.
    pub failure: Option<Failure>,
    /// Texts whose parts are not all done.
    unfinished: Vec<Unfinished>,
}

impl Scores {
    /// Whether every text is scored.
    pub fn is_done(&self) -> bool {
        self.texts.iter().all(Option::is_some)
    }
}

/// A text of which some parts are done.
#[derive(Clone, Debug)]
struct Unfinished {
    parts_left: usize,
    /// Of every evaluation what its rows gave.
    sums: Vec<f64>,
    score: TextScore,
}

/// Scoring that runs. Dropping it ends what is left: what waits at once, what is in a pass after it.
#[derive(Debug)]
pub struct ScoringRun {
    /// How far it is.
    pub scores: watch::Receiver<Scores>,
    /// When the last text will be scored, as predicted.
    pub predicted: std::time::Duration,
    /// What it has taken so far.
    pub spent: Arc<super::Spent>,
    pub(super) name: RequestName,
    pub(super) number: u64,
    pub(super) shared: Arc<Shared>,
}

impl Drop for ScoringRun {
    fn drop(&mut self) {
        // Nobody listens any more; what is dropped here gives its room back.
        self.scores = watch::channel(Scores::default()).1;
        drop(self.shared.withdraw(self.number));
        self.shared.forget(&self.name, self.number);
    }
}

/// A text on the canvas of its model.
#[derive(Debug)]
struct Subject {
    model: Arc<ServedModel>,
    text: ScoredText,
    /// Number of the text in its request.
    index: usize,
}

/// How the evaluations of a request's texts are cut into parts.
#[derive(Debug)]
pub(super) struct Layout {
    /// Parts of every text.
    parts: Vec<u32>,
    /// Evaluations of every part, text by text.
    pub(super) shares: Vec<u64>,
    /// Evaluations of all texts.
    pub(super) evaluations: u64,
}

impl Layout {
    /// As many parts as keep passes of `at_once` canvases full, but no fewer than texts.
    pub(super) fn new(request: &ScoreRequest, at_once: usize) -> Self {
        let each = u32::try_from(at_once.div_ceil(request.texts.len().max(1))).unwrap_or(u32::MAX);
        let evaluations: Vec<u32> = request
            .texts
            .iter()
            .map(|text| match request.likelihood {
                Likelihood::Bound { draws } => draws,
                Likelihood::Exact(_) => text.scored(),
            })
            .collect();
        let parallel = request.likelihood.is_parallel();
        let parts: Vec<u32> = evaluations
            .iter()
            .map(|&all| if parallel { each.clamp(1, all.max(1)) } else { 1 })
            .collect();
        let shares = parts
            .iter()
            .zip(&evaluations)
            .flat_map(|(&parts, &all)| ranges(all, parts).map(|range| range.len() as u64));
        Self {
            shares: shares.collect(),
            evaluations: evaluations.iter().copied().map(u64::from).sum(),
            parts,
        }
    }

    /// What an evaluation costs on the mean, where `cost` says what it does by length.
    pub(super) fn mean_cost(&self, request: &ScoreRequest, cost: impl Fn(usize) -> u64) -> u64 {
        let mut shares = self.shares.iter();
        let of_text = |(text, &parts): (&TextToScore, &u32)| {
            let evaluations: u64 = shares.by_ref().take(parts as usize).sum();
            evaluations.saturating_mul(cost(text.tokens.len()))
        };
        let texts = request.texts.iter().zip(&self.parts);
        let all = texts.map(of_text).fold(0, u64::saturating_add);
        (all / self.evaluations.max(1)).max(1)
    }

    /// The parts of every text.
    pub(super) fn build(&self, request: &ScoreRequest) -> Vec<Vec<Scoring>> {
        let manifest = request.model.manifest();
        let of_text = |(index, (text, &parts)): (usize, (&TextToScore, &u32))| {
            let text = ScoredText {
                process: manifest.process(),
                parameterization: manifest.parameterization,
                likelihood: request.likelihood,
                tokens: text.tokens.clone(),
                context: text.context.clone(),
                draws: Draws::new(request.seed, index as u64),
            };
            let all = text.evaluations();
            let subject = Arc::new(Subject {
                model: Arc::clone(&request.model),
                text,
                index,
            });
            ranges(all, parts)
                .map(|range| Scoring::new(&subject, range))
                .collect()
        };
        request
            .texts
            .iter()
            .zip(&self.parts)
            .enumerate()
            .map(of_text)
            .collect()
    }
}

/// `all` evaluations in as many parts, as even as can be.
fn ranges(all: u32, parts: u32) -> impl Iterator<Item = Range<u32>> {
    let bound = move |part: u32| (u64::from(all) * u64::from(part) / u64::from(parts.max(1))) as u32;
    (0..parts).map(move |part| bound(part)..bound(part + 1))
}

/// Some evaluations of a text, one after another.
#[derive(Clone, Debug)]
pub(super) struct Scoring {
    subject: Arc<Subject>,
    range: Range<u32>,
    next: u32,
    question: Question,
    nfe: u32,
    /// Of every evaluation so far what its rows gave.
    sums: Vec<f64>,
    /// Positions that were filled, and the log-probabilities of that.
    filled: Vec<(usize, f64)>,
}

impl Scoring {
    fn new(subject: &Arc<Subject>, range: Range<u32>) -> Self {
        let mut scoring = Self {
            question: subject.text.question(range.start),
            subject: Arc::clone(subject),
            next: range.start,
            range,
            nfe: 0,
            sums: Vec::new(),
            filled: Vec::new(),
        };
        scoring.pass_over();
        scoring
    }

    pub(super) fn model(&self) -> &Arc<ServedModel> {
        &self.subject.model
    }

    /// The canvas of the next evaluation.
    pub(super) fn canvas(&self) -> &[Token] {
        &self.question.canvas
    }

    pub(super) fn evaluation(&self) -> Evaluation {
        self.question.evaluation.clone()
    }

    pub(super) fn evaluations_left(&self) -> u64 {
        u64::from(self.range.end - self.next)
    }

    pub(super) fn is_done(&self) -> bool {
        self.next >= self.range.end
    }

    pub(super) fn nfe(&self) -> u32 {
        self.nfe
    }

    pub(super) fn rows(&self) -> ScoredRows<'_> {
        let manifest = self.model().manifest();
        ScoredRows {
            scoring: self,
            offset: manifest.parameterization.log_score_offset(
                manifest.sigma_offset,
                self.question.evaluation.sigma,
                manifest.vocab_size,
            ),
        }
    }

    /// Takes in what the rows of an evaluation gave.
    pub(super) fn commit(&mut self, candidates: &[Candidate]) {
        self.nfe += 1;
        self.take_in(candidates);
        self.pass_over();
    }

    fn take_in(&mut self, candidates: &[Candidate]) {
        let text = &self.subject.text;
        match text.likelihood {
            Likelihood::Bound { .. } => {
                let sum: f64 = candidates.iter().map(|row| row.log_probability).sum();
                self.sums.push(-sum);
                self.next += 1;
                if self.next < self.range.end {
                    self.question = text.question(self.next);
                }
            }
            Likelihood::Exact(_) => {
                if let Some(filled) = text.fill(&mut self.question, candidates) {
                    self.sums.push(-filled.log_probability);
                    self.filled.push((filled.position, filled.log_probability));
                }
                self.next += 1;
            }
        }
    }

    /// Noise that is drawn can be of no weight.
    fn pass_over(&mut self) {
        while !self.is_done() && self.question.evaluation.positions.is_empty() {
            self.take_in(&[]);
        }
    }
}

/// One evaluation of a scored text, position by position.
#[derive(Debug)]
pub(super) struct ScoredRows<'a> {
    scoring: &'a Scoring,
    offset: f64,
}

impl ScoredRows<'_> {
    /// Returns the offset that makes log-scores of the rows.
    pub(super) fn offset(&self) -> f64 {
        self.offset
    }

    pub(super) fn read(
        &self,
        position: usize,
        log_score: &[f32],
        scratch: &mut Scratch,
    ) -> Result<Candidate, RowError> {
        let Scoring {
            subject, question, ..
        } = self.scoring;
        subject
            .text
            .read(question, position, log_score, self.offset, scratch)
    }
}

/// Where the parts of a request report.
#[derive(Debug)]
pub(super) struct Board(watch::Sender<Scores>);

impl Board {
    /// A board for texts of so many evaluations and parts.
    pub(super) fn new(texts: &[Vec<Scoring>]) -> (Arc<Self>, watch::Receiver<Scores>) {
        let unfinished: Vec<Unfinished> = texts
            .iter()
            .map(|parts| {
                let text = parts.first().map(|part| &part.subject.text);
                let evaluations = text.map_or(0, ScoredText::evaluations) as usize;
                let scored = text.map_or(0, ScoredText::scored);
                let exact = text.filter(|text| matches!(text.likelihood, Likelihood::Exact(_)));
                Unfinished {
                    parts_left: parts.len(),
                    sums: vec![0.0; evaluations],
                    score: TextScore {
                        scored: scored as u32,
                        log_probabilities: vec![0.0; exact.map_or(0, |text| text.tokens.len())],
                        ..TextScore::default()
                    },
                }
            })
            .collect();
        let (sender, receiver) = watch::channel(Scores {
            done: 0,
            total: unfinished.iter().map(|text| text.sums.len() as u64).sum(),
            texts: vec![None; texts.len()],
            failure: None,
            unfinished,
        });
        (Arc::new(Self(sender)), receiver)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Takes note of `spent` evaluations.
    pub(super) fn advance(&self, spent: u64) {
        if spent > 0 {
            self.0.send_modify(|scores| scores.done += spent);
        }
    }

    pub(super) fn done(&self, part: &Scoring) {
        let text = &part.subject.text;
        self.0.send_modify(|scores| {
            let Some(unfinished) = scores.unfinished.get_mut(part.subject.index) else {
                return;
            };
            for (at, sum) in (part.range.start as usize..).zip(&part.sums) {
                unfinished.sums[at] = *sum;
            }
            for &(position, log_probability) in &part.filled {
                unfinished.score.log_probabilities[position] = log_probability;
            }
            unfinished.score.evaluations += part.nfe;
            scores.done += (part.range.len() as u64).saturating_sub(part.nfe.into());
            unfinished.parts_left -= 1;
            if unfinished.parts_left == 0 {
                let mut score = std::mem::take(&mut unfinished.score);
                let sums = std::mem::take(&mut unfinished.sums);
                let mut given = text.context.iter();
                score.log_probabilities.retain(|_| given.next() == Some(&false));
                score.estimate = match text.likelihood {
                    Likelihood::Bound { .. } => text.bound(&sums),
                    Likelihood::Exact(_) => Estimate {
                        nats: sums.iter().sum(),
                        standard_error: 0.0,
                    },
                };
                scores.texts[part.subject.index] = Some(Arc::new(score));
            }
        });
    }

    pub(super) fn fail(&self, failure: Failure) {
        self.0.send_if_modified(|scores| {
            let runs = scores.failure.is_none() && !scores.is_done();
            if runs {
                scores.failure = Some(failure);
            }
            runs
        });
    }
}
