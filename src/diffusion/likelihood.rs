//! How likely a text is: the bound of diffusion models, and the exact likelihood of filling in one position after
//! another.
//!
//! - **The bound**: `-ln p(x0)` is at most the integral over time of the rate times the denoising score entropy, plus the
//!   divergence of the prior (theorem 3.6 of arXiv 2310.16834). Estimated at drawn times, of drawn noise.
//! - **Exact**: a sampler that fills one position at a time, in an order that depends on nothing but what it has filled,
//!   draws a text with the product of the probabilities of its choices (the chain rule; arXiv 2603.01367). On absorbing
//!   graphs.
//!
//! Either way some positions of a text are scored given the others, which stay as they are.

use super::sampler::confidence::{ascending, time_of_the_masked};
use super::sampler::row::{self, RowError, Scratch};
use super::sampler::{Candidate, CanvasView, Evaluation, Law, Uncertainty};
use super::score_entropy::normalizer;
use super::{Draws, GraphKind, Parameterization, Process, Token};

/// Times below this are neither trained nor drawn: the rate is steep there and tokens are easiest to guess.
pub const EARLIEST: f64 = 1e-3;

/// Relative error of what networks give in single precision.
const ROUNDING: f64 = 1e-5;

/// What is asked about a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Likelihood {
    /// The bound, from this many evaluations with noise that is drawn; at least 4.
    Bound {
        /// How many.
        draws: u32,
    },
    /// Exactly, of filling in this order. Absorbing graphs only.
    Exact(Order),
}

impl Likelihood {
    /// Whether its evaluations do not wait for each other.
    pub fn is_parallel(self) -> bool {
        self != Self::Exact(Order::SurestFirst)
    }
}

/// An order in which positions are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From left to right.
    LeftToRight,
    /// The position of lowest entropy first, as the entropy-bounded sampler does at bound 0.
    SurestFirst,
}

/// A number of nats, and how far off it may be.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Nats.
    pub nats: f64,
    /// Standard error of it; 0 where it is exact.
    pub standard_error: f64,
}

/// An evaluation, and the canvas that it is of.
#[derive(Clone, Debug)]
pub struct Question {
    /// What the network is shown.
    pub canvas: Vec<Token>,
    /// What it is asked.
    pub evaluation: Evaluation,
    /// What the score entropy of a row counts, for the bound.
    weight: f64,
}

/// Noise that is drawn for an evaluation of the bound.
#[derive(Clone, Copy, Debug, Default)]
struct Drawn {
    /// The share of tokens that it moves: those of lower uniforms.
    share: f64,
    /// The time at which the network is asked.
    t: f64,
    /// What a row's score entropy counts.
    weight: f64,
}

/// A text of which some positions are scored, on the canvas of a model.
#[derive(Clone, Debug)]
pub struct ScoredText {
    /// The noise process.
    pub process: Process,
    /// Meaning of the network's output.
    pub parameterization: Parameterization,
    /// What is asked.
    pub likelihood: Likelihood,
    /// The whole text.
    pub tokens: Vec<Token>,
    /// For every position, whether it is context: not scored, and seen by the network as it is.
    pub context: Vec<bool>,
    /// Random numbers of the bound.
    pub draws: Draws,
}

impl ScoredText {
    /// Positions that are scored.
    pub fn scored(&self) -> usize {
        self.context.iter().filter(|context| !**context).count()
    }

    /// Evaluations of the network that it takes, at most.
    pub fn evaluations(&self) -> u32 {
        match self.likelihood {
            Likelihood::Bound { draws } => draws,
            Likelihood::Exact(_) => u32::try_from(self.scored()).unwrap_or(u32::MAX),
        }
    }

    /// Evaluation `index`, from scratch: of those that wait for others, the first one alone.
    pub fn question(&self, index: u32) -> Question {
        let drawn = self.drawn(index);
        self.about(index, self.canvas(index, &drawn), &drawn)
    }

    fn canvas(&self, index: u32, drawn: &Drawn) -> Vec<Token> {
        let mask = self.process.graph.mask().unwrap_or_default();
        let (mut draws, mut filled) = (self.draws.clone(), 0);
        let mut seen = |position: usize, token: Token| match self.likelihood {
            Likelihood::Bound { .. } => {
                let u = draws.at(index, position);
                if u.token <= drawn.share {
                    self.process.graph.sample_limit(u.leave)
                } else {
                    token
                }
            }
            Likelihood::Exact(_) => {
                filled += 1;
                if filled <= index { token } else { mask }
            }
        };
        let places = self.tokens.iter().zip(&self.context).enumerate();
        places
            .map(|(position, (&token, &context))| if context { token } else { seen(position, token) })
            .collect()
    }

    /// The noise of evaluation `index` of the bound.
    ///
    /// In place of a time it can be drawn how many positions are noised, n of L, evenly: they are then those of the n
    /// lowest uniforms, and the share that noise moves at that time is the highest of these. What noised positions add
    /// to the integral is weighted by L / n then, and none is rare and large. On absorbing graphs no others add
    /// anything. On uniform ones every other evaluation draws a time all the same, and both kinds are weighted by their
    /// common density (the balance heuristic of multiple importance sampling).
    fn drawn(&self, index: u32) -> Drawn {
        let Likelihood::Bound { draws: count } = self.likelihood else {
            return Drawn::default();
        };
        let (mut draws, schedule) = (self.draws.clone(), &self.process.schedule);
        // Behind the last position nothing else is drawn.
        let u = draws.at(index, self.tokens.len()).leave;
        let positions = (0..self.tokens.len()).filter(|&position| !self.context[position]);
        let mut uniforms: Vec<f64> = positions
            .map(|position| draws.at(index, position).token)
            .collect();
        uniforms.sort_by(f64::total_cmp);
        let length = uniforms.len() as f64;
        let rank = |u: f64| {
            let rank = ((u * length) as usize).min(uniforms.len().saturating_sub(1));
            (uniforms.get(rank).copied().unwrap_or_default(), (rank + 1) as f64)
        };
        // Evenly from a stratum of its own.
        let stratum = |of: u32, among: u32| (f64::from(of) + u) / f64::from(among.max(1));
        match self.process.graph.kind() {
            GraphKind::Absorbing => {
                let (share, noised) = rank(stratum(index, count));
                let t = schedule.time(-(-share).ln_1p()).clamp(EARLIEST, 1.0);
                Drawn {
                    share,
                    t,
                    weight: length / noised * schedule.total_noise(t).exp_m1(),
                }
            }
            GraphKind::Uniform => {
                let ranks = count / 2;
                let (share, noised, t) = if index.is_multiple_of(2) {
                    let t = EARLIEST + (1.0 - EARLIEST) * stratum(index / 2, count - ranks);
                    let share = self.process.masked_share(t);
                    (share, uniforms.partition_point(|u| *u <= share) as f64, t)
                } else {
                    let (share, noised) = rank(stratum(index / 2, ranks));
                    (share, noised, schedule.time(-(-share).ln_1p()))
                };
                let rate = schedule.rate(t.clamp(EARLIEST, 1.0));
                let by_rank = noised / (length * share) * (1.0 - share) * rate * (1.0 - EARLIEST);
                let ranks = f64::from(ranks) / f64::from(count);
                Drawn {
                    share,
                    t: t.clamp(EARLIEST, 1.0),
                    // Times that are not drawn count nothing.
                    weight: if (EARLIEST..=1.0).contains(&t) {
                        rate / (1.0 - ranks + ranks * by_rank)
                    } else {
                        0.0
                    },
                }
            }
        }
    }

    /// What is asked about `canvas`; no positions where nothing is.
    fn about(&self, index: u32, canvas: Vec<Token>, drawn: &Drawn) -> Question {
        let view = CanvasView {
            tokens: &canvas,
            clamped: &self.context,
            gaps: self.scored(),
            step: index,
            nfe: index,
            hitting_times: None,
            draws: &self.draws,
        };
        let t = match self.likelihood {
            Likelihood::Bound { .. } => drawn.t,
            Likelihood::Exact(_) => time_of_the_masked(&self.process, &view),
        };
        let mut positions: Vec<usize> = view.movable(self.process.graph.mask()).collect();
        match self.likelihood {
            Likelihood::Exact(Order::LeftToRight) => positions.truncate(1),
            Likelihood::Bound { .. } if drawn.weight == 0.0 => positions.clear(),
            Likelihood::Exact(Order::SurestFirst) | Likelihood::Bound { .. } => {}
        }
        let evaluation = Evaluation {
            step: index,
            draw: index,
            t,
            sigma: self.process.total_noise(t),
            law: Law::Given,
            uncertainty: if self.likelihood.is_parallel() {
                Uncertainty::None
            } else {
                Uncertainty::Entropy
            },
            positions,
            finishes: false,
        };
        Question {
            canvas,
            evaluation,
            weight: drawn.weight,
        }
    }

    /// What the row of `position`, over target tokens, says of the text's token there: for the bound minus what it adds
    /// to the integral, and otherwise the token's log-probability.
    ///
    /// # Errors
    /// When no law can be made of the row.
    pub fn read(
        &self,
        question: &Question,
        position: usize,
        log_score: &[f32],
        offset: f64,
        scratch: &mut Scratch,
    ) -> Result<Candidate, RowError> {
        let evaluation = &question.evaluation;
        let (x, x0) = (question.canvas[position], self.tokens[position]);
        row::read(x, log_score, scratch)?;
        let log_probability = match self.likelihood {
            Likelihood::Exact(_) => row::log_probability(x, x0, log_score, scratch),
            Likelihood::Bound { .. } => {
                -question.weight
                    * self.score_entropy(evaluation.sigma, [x, x0], log_score, offset, scratch)?
            }
        };
        Ok(Candidate {
            position,
            token: x0,
            uncertainty: row::uncertainty(evaluation.uncertainty, x, x0, log_score, scratch)?,
            log_probability,
        })
    }

    /// The denoising score entropy of `x`, which was `x0` before the noise; the same as
    /// [`score_entropy::denoising`](super::score_entropy::denoising), of the last row that was read.
    fn score_entropy(
        &self,
        sigma: f64,
        [x, x0]: [Token; 2],
        log_score: &[f32],
        offset: f64,
        scratch: &mut Scratch,
    ) -> Result<f64, RowError> {
        let of = |y: Token| f64::from(log_score[y as usize]) + offset;
        let scores = || row::score_sum(offset, scratch).ok_or(RowError::Scores);
        Ok(match (self.process.graph.kind(), self.parameterization) {
            // Scores that sum to what they should: a cross-entropy is left.
            (GraphKind::Absorbing, Parameterization::Mean) => {
                -row::log_probability(x, x0, log_score, scratch) / sigma.exp_m1()
            }
            (GraphKind::Absorbing, Parameterization::Score) => {
                let ratio = 1.0 / sigma.exp_m1();
                scores()? - ratio * of(x0) + normalizer(ratio)
            }
            (GraphKind::Uniform, _) => {
                let states = self.process.graph.states() as f64;
                // Tokens that are neither have one ratio. What the row says of `x` itself is not read.
                let others = (0..).zip(log_score).filter(|(y, _)| *y != x && *y != x0);
                let log_scores: f64 = others.map(|(_, &l)| f64::from(l)).sum();
                let term = |count: f64, ratio: f64, log_scores: f64| {
                    count * normalizer(ratio) - ratio * (log_scores + count * offset)
                };
                let rest = if x == x0 {
                    let away = sigma.exp_m1() / (sigma.exp_m1() + states);
                    term(states - 1.0, away, log_scores)
                } else {
                    let back = self.process.graph.ratio(x0, x, x0, sigma);
                    term(states - 2.0, 1.0, log_scores) + term(1.0, back, of(x0) - offset)
                };
                (scores()? + rest) / states
            }
        })
    }

    /// Of an exact likelihood: puts the text's token where `candidates`, the rows of `question`, say that it comes next,
    /// says where that was, and goes on to the evaluation after it.
    pub fn fill(&self, question: &mut Question, candidates: &[Candidate]) -> Option<Candidate> {
        let uncertainties: Vec<f64> = candidates.iter().map(|candidate| candidate.uncertainty).collect();
        let filled = candidates[*ascending(&uncertainties).first()?];
        let mut canvas = std::mem::take(&mut question.canvas);
        canvas[filled.position] = filled.token;
        *question = self.about(question.evaluation.step + 1, canvas, &Drawn::default());
        Some(filled)
    }

    /// The bound's estimate of `-ln p`, given the sum of the rows of every evaluation, in their order.
    ///
    /// Evaluations come from strata, so that the error is estimated from how neighbours differ: their means are all but
    /// the same. Where few positions can be noised the means jump with their number, and those on either side of a jump
    /// are no neighbours.
    pub fn bound(&self, sums: &[f64]) -> Estimate {
        let count = sums.len().max(1) as f64;
        let nats = sums.iter().sum::<f64>() / count + self.scored() as f64 * prior_nats(&self.process);
        // Kinds of evaluations take turns.
        let kinds = match self.process.graph.kind() {
            GraphKind::Absorbing => 1,
            GraphKind::Uniform => 2,
        };
        let noised = |index: usize, among: usize| index * self.scored() / among;
        let variance = |kind: usize| {
            let of: Vec<f64> = sums.iter().skip(kind).step_by(kinds).copied().collect();
            let jumps = 4 * self.scored() <= of.len();
            let squares: Vec<f64> = (1..of.len())
                .filter(|&next| !jumps || noised(next - 1, of.len()) == noised(next, of.len()))
                .map(|next| (of[next] - of[next - 1]).powi(2))
                .collect();
            of.len() as f64 / 2.0 * squares.iter().sum::<f64>() / (squares.len() as f64).max(1.0)
        };
        let variance = (0..kinds).map(variance).sum::<f64>() / (count * count);
        Estimate {
            nats,
            standard_error: if nats.is_finite() {
                (variance + (ROUNDING * nats).powi(2)).sqrt()
            } else {
                // What cannot be is no better known for that.
                f64::INFINITY
            },
        }
    }
}

/// Nats per token that describing the text at time 1 costs, where sampling begins: with the mask, or with any token alike.
fn prior_nats(process: &Process) -> f64 {
    let states = process.graph.states() as f64;
    let stay = (-process.total_noise(1.0)).exp();
    match process.graph.kind() {
        GraphKind::Absorbing => 0.0,
        GraphKind::Uniform => {
            let elsewhere = (1.0 - stay) / states;
            let here = stay + elsewhere;
            here * (here * states).ln() + (states - 1.0) * elsewhere * (elsewhere * states).ln()
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::{Graph, Schedule, score_entropy};
    use super::*;
    use crate::network::closed_form::ClosedForm;
    use crate::network::{Batch, ScoreNetwork};

    /// Two positions that depend on each other, over three tokens.
    const LAW: [([Token; 2], f64); 4] = [([0, 1], 0.4), ([1, 0], 0.3), ([0, 0], 0.1), ([2, 2], 0.2)];

    fn process(kind: GraphKind) -> Process {
        let (graph, schedule) = match kind {
            GraphKind::Absorbing => (Graph::new(kind, 4), Schedule::LogLinear { eps: 1e-4 }),
            GraphKind::Uniform => (
                Graph::new(kind, 3),
                Schedule::Geometric {
                    sigma_min: 1e-4,
                    sigma_max: 9.0,
                },
            ),
        };
        Process { graph, schedule }
    }

    fn text(kind: GraphKind, likelihood: Likelihood, tokens: &[Token], seed: u64) -> ScoredText {
        ScoredText {
            process: process(kind),
            parameterization: Parameterization::Score,
            likelihood,
            tokens: tokens.to_vec(),
            context: vec![false; tokens.len()],
            draws: Draws::new(seed, 0),
        }
    }

    /// The rows of an evaluation, of the exact scores of a law.
    fn rows(law: &[([Token; 2], f64)], text: &ScoredText, question: &Question) -> Vec<Candidate> {
        let Question {
            canvas, evaluation, ..
        } = question;
        let law = law.iter().map(|(tokens, p)| (tokens.to_vec(), *p)).collect();
        let mut network = ClosedForm::new(text.process.graph, law);
        let tokens: Vec<i64> = canvas.iter().map(|&token| token.into()).collect();
        let positions: Vec<i64> = evaluation.positions.iter().map(|&i| i as i64).collect();
        let batch = Batch {
            tokens: &tokens,
            length: tokens.len(),
            sigma: &[evaluation.sigma as f32],
            positions: &positions,
        };
        let mut read = Vec::new();
        network
            .log_score(&batch, &mut |rows| {
                for (index, &position) in evaluation.positions.iter().enumerate() {
                    let row = rows.row(index);
                    let candidate = text
                        .read(question, position, &row, 0.0, &mut Scratch::default())
                        .unwrap();
                    read.push(candidate);
                }
            })
            .unwrap();
        read
    }

    fn bound(text: &ScoredText) -> Estimate {
        let sums: Vec<f64> = (0..text.evaluations())
            .map(|index| {
                let rows = rows(&LAW, text, &text.question(index));
                rows.iter().map(|row| -row.log_probability).sum()
            })
            .collect();
        text.bound(&sums)
    }

    fn exact(law: &[([Token; 2], f64)], order: Order, tokens: &[Token]) -> f64 {
        let text = text(GraphKind::Absorbing, Likelihood::Exact(order), tokens, 0);
        let mut question = text.question(0);
        let mut sum = 0.0;
        for index in 0..text.evaluations() {
            if text.likelihood.is_parallel() {
                assert_eq!(question.canvas, text.question(index).canvas);
            }
            let rows = rows(law, &text, &question);
            sum += text.fill(&mut question, &rows).unwrap().log_probability;
        }
        assert_eq!(question.canvas, tokens);
        sum
    }

    /// At exact scores the bound is tight for every single text, and 95 % intervals cover its likelihood about as often.
    /// Not quite, since what such short texts add is not normal: 90 % of 600 would be 4 standard errors away from the
    /// 95 % of the absorbing graph. Seeds fixed.
    #[test]
    fn intervals_of_the_bound_cover_the_likelihood() {
        for kind in [GraphKind::Absorbing, GraphKind::Uniform] {
            let mut covered = 0;
            for seed in 0..200 {
                // The fourth text is the same however it is masked: its interval is no wider than what is rounded.
                for (tokens, probability) in &LAW[..3] {
                    let text = text(kind, Likelihood::Bound { draws: 128 }, tokens, seed);
                    let Estimate { nats, standard_error } = bound(&text);
                    covered += usize::from((nats + probability.ln()).abs() <= 1.96 * standard_error);
                }
            }
            assert!((540..=594).contains(&covered), "{kind:?}: {covered}");
        }
        let text = text(GraphKind::Absorbing, Likelihood::Bound { draws: 8 }, &[2, 2], 1);
        let Estimate { nats, standard_error } = bound(&text);
        let off = (nats + 0.2_f64.ln()).abs();
        assert!(
            off <= 3.0 * standard_error && standard_error < 1e-4,
            "{off} {standard_error}"
        );
    }

    /// Of a law that is none of two independent positions, every order gives every text its own probability; of scores
    /// that no law has, orders differ, but what they give sums to 1.
    #[test]
    fn exact_likelihoods_are_a_law_in_every_order() {
        for order in [Order::LeftToRight, Order::SurestFirst] {
            let mut sum = 0.0;
            for tokens in (0..9).map(|index| [index / 3, index % 3]) {
                let likelihood = exact(&LAW, order, &tokens).exp();
                sum += likelihood;
                let probability = LAW
                    .iter()
                    .find(|(text, _)| *text == tokens)
                    .map_or(0.0, |(_, p)| *p);
                assert!(
                    (likelihood - probability).abs() < 1e-5,
                    "{order:?} {tokens:?}: {likelihood}"
                );
            }
            assert!((sum - 1.0).abs() < 1e-5, "{order:?}: {sum}");
        }
    }

    #[test]
    fn rows_of_the_bound_are_the_diffusion_weighted_score_entropy() {
        for kind in [GraphKind::Absorbing, GraphKind::Uniform] {
            let text = text(kind, Likelihood::Bound { draws: 8 }, &[2, 1], 3);
            let states = text.process.graph.states();
            let mut log_score: Vec<f32> = (0..states).map(|y| 0.7 - 0.9 * y as f32).collect();
            for (offset, index) in [(0.0, 1), (-0.8, 6)] {
                let mut question = text.question(index);
                let sigma = question.evaluation.sigma;
                for x in 0..states as Token {
                    // What is not masked does not move on absorbing graphs, and is not asked about.
                    if text.process.graph.mask().is_some_and(|mask| mask != x) {
                        continue;
                    }
                    question.canvas = vec![x, x];
                    // What a network says of the token itself means nothing.
                    let own = std::mem::replace(&mut log_score[x as usize], f32::NAN);
                    let read = text.read(&question, 0, &log_score, offset, &mut Scratch::default());
                    let exact: Vec<f64> = log_score.iter().map(|&l| f64::from(l) + offset).collect();
                    let graph = &text.process.graph;
                    let expected = score_entropy::denoising(graph, &exact, x, 2, sigma)
                        * match kind {
                            GraphKind::Uniform => text.drawn(index).weight,
                            // One of two positions is masked, or both are.
                            GraphKind::Absorbing => sigma.exp_m1() * if index < 4 { 2.0 } else { 1.0 },
                        };
                    log_score[x as usize] = own;
                    let loss = -read.unwrap().log_probability;
                    assert!(
                        (loss - expected).abs() < 1e-6 * expected.abs(),
                        "{kind:?} {x}: {loss} {expected}"
                    );
                }
            }
        }
    }
}
