//! What keeping weights in fewer bits costs: two exports of one network, run beside each other on the same
//! noised sequences.

use denoised::bundle::Manifest;
use denoised::diffusion::sampler::{Discretization, Tweedie};
use denoised::diffusion::{RowLaw, Token};
use denoised::network::{Batch, NetworkError, ScoreNetwork};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;

use crate::random::unit;

/// Times at which sequences are noised, from nearly clean to nearly all noise.
const TIMES: [f64; 6] = [0.05, 0.2, 0.4, 0.6, 0.8, 0.95];
/// Sequences that are noised at each time.
const SEQUENCES: usize = 4;
/// Steps of the generation of which one is looked at.
const STEPS: f64 = 64.0;
/// Longest part of a sequence that is used.
const MAX_LENGTH: usize = 256;
/// Most positions of a sequence that are compared, so that large vocabularies fit into memory.
const MAX_POSITIONS: usize = 64;
/// Where the noise and, without text, the tokens come from: the same for every export.
const SEED: u64 = 1;

/// Where the sequences of a [`Probe`] come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Text that the network was not trained on.
    HeldOutText,
    /// Tokens drawn evenly from the vocabulary.
    RandomTokens,
}

/// Noised sequences: always the same for the same model and text.
#[derive(Debug, Clone)]
pub struct Probe {
    source: Source,
    canvases: Vec<Canvas>,
}

/// One noised sequence, and where its scores matter.
#[derive(Debug, Clone)]
struct Canvas {
    tokens: Vec<i64>,
    sigma: f64,
    positions: Vec<i64>,
    /// Of the step that the server takes from there.
    law: RowLaw,
    /// What makes log-scores of what the network gives.
    offset: f64,
}

impl Probe {
    /// The first sequences of `text`, or random tokens, noised as the model's noise process does.
    pub fn new(manifest: &Manifest, text: &[Vec<Token>]) -> Self {
        let graph = manifest.graph();
        let random = &mut ChaCha8Rng::seed_from_u64(SEED);
        let length = manifest.max_length.min(MAX_LENGTH);
        let clean: Vec<Vec<Token>> = if text.is_empty() {
            let tokens = manifest.vocab_size - usize::from(graph.mask().is_some());
            let token = |random: &mut ChaCha8Rng| (random.next_u64() % tokens as u64) as Token;
            (0..SEQUENCES)
                .map(|_| (0..length).map(|_| token(random)).collect())
                .collect()
        } else {
            let parts = text.iter().take(SEQUENCES);
            parts
                .map(|tokens| tokens[..tokens.len().min(length)].to_vec())
                .collect()
        };
        let mut canvases = Vec::new();
        for t in TIMES {
            let sigma = manifest.schedule.total_noise(t);
            for clean in &clean {
                let noised: Vec<Token> = clean
                    .iter()
                    .map(|&token| graph.sample_transition(token, sigma, unit(random)))
                    .collect();
                // Where there are masks, only they are ever asked about.
                let asked: Vec<i64> = (0..noised.len())
                    .filter(|&at| graph.mask().is_none_or(|mask| noised[at] == mask))
                    .map(|at| at as i64)
                    .collect();
                let every = asked.len().div_ceil(MAX_POSITIONS).max(1);
                let positions: Vec<i64> = asked.into_iter().step_by(every).collect();
                if !positions.is_empty() {
                    canvases.push(Canvas {
                        tokens: noised.into_iter().map(i64::from).collect(),
                        sigma,
                        positions,
                        law: Tweedie.step(&graph, &manifest.schedule, t, (1.0 / STEPS).min(t)),
                        offset: manifest.parameterization.log_score_offset(
                            manifest.sigma_offset,
                            sigma,
                            manifest.vocab_size,
                        ),
                    });
                }
            }
        }
        Self {
            source: if text.is_empty() {
                Source::RandomTokens
            } else {
                Source::HeldOutText
            },
            canvases,
        }
    }
}

/// How far the log-scores of a network are from those of another, over tokens other than the current one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Largest absolute difference of a log-score.
    pub largest: f64,
    /// Mean absolute difference of a log-score.
    pub mean: f64,
    /// Mean total variation between the laws of what becomes of a position in one of 64 steps of Tweedie: the share of
    /// positions that one network would have draw another token, or leave at another time, than the other.
    pub total_variation: f64,
    /// Positions that were compared.
    pub positions: usize,
    /// Total noise of the sequences.
    pub sigma: Vec<f64>,
    /// Where the sequences come from.
    pub sequences: Source,
}

impl Difference {
    /// Runs both networks over `probe`.
    ///
    /// # Errors
    /// A network cannot be run, or gives log-scores that are not finite.
    pub fn measure(
        mut reference: impl ScoreNetwork,
        mut candidate: impl ScoreNetwork,
        probe: &Probe,
    ) -> Result<Self, NetworkError> {
        let (mut largest, mut total, mut entries) = (0.0_f64, 0.0, 0_usize);
        let (mut variation, mut positions) = (0.0, 0);
        let mut expected: Vec<Vec<f32>> = Vec::new();
        for canvas in &probe.canvases {
            let batch = Batch {
                tokens: &canvas.tokens,
                length: canvas.tokens.len(),
                sigma: &[canvas.sigma as f32],
                positions: &canvas.positions,
            };
            let rows = canvas.positions.len();
            reference.log_score(&batch, &mut |scores| {
                expected = (0..rows).map(|row| scores.row(row).to_vec()).collect();
            })?;
            candidate.log_score(&batch, &mut |scores| {
                for (row, expected) in expected.iter().enumerate() {
                    let current = canvas.tokens[canvas.positions[row] as usize] as usize;
                    let scores = &scores.row(row);
                    for (_, [a, b]) in pairs(expected, scores, current) {
                        let difference = (a - b).abs();
                        largest = largest.max(difference);
                        total += difference;
                        entries += 1;
                    }
                    let laws = [expected.as_slice(), scores.as_ref()]
                        .map(|scores| law(&canvas.law, scores, current, canvas.offset));
                    variation += total_variation(&laws);
                }
            })?;
            positions += rows;
        }
        // In a maximum, something that is no number would get lost.
        if !(total + variation).is_finite() {
            return Err(NetworkError::Run("some log-scores are not finite".to_owned()));
        }
        let mut sigma: Vec<f64> = probe.canvases.iter().map(|canvas| canvas.sigma).collect();
        sigma.dedup();
        Ok(Self {
            largest,
            mean: total / entries.max(1) as f64,
            total_variation: variation / positions.max(1) as f64,
            positions,
            sigma,
            sequences: probe.source,
        })
    }
}

/// Entries of two rows in f64, but for the one at `current`.
fn pairs<'a>(a: &'a [f32], b: &'a [f32], current: usize) -> impl Iterator<Item = (usize, [f64; 2])> {
    let both = a.iter().zip(b).map(|(&a, &b)| [f64::from(a), f64::from(b)]);
    both.enumerate().filter(move |(token, _)| *token != current)
}

/// Chances of what becomes of token `current` in a step: of each token, its own entry that of staying.
fn law(law: &RowLaw, log_scores: &[f32], current: usize, offset: f64) -> Vec<f64> {
    let mut scores: Vec<f64> = log_scores
        .iter()
        .map(|&log_score| (f64::from(log_score) + offset).exp())
        .collect();
    scores[current] = 0.0;
    let total: f64 = scores.iter().sum();
    let mut chances: Vec<f64> = scores
        .iter()
        .map(|&score| law.move_weight(score, total).max(0.0))
        .collect();
    chances[current] = law.stay_weight(total).max(0.0);
    let whole: f64 = chances.iter().sum();
    chances.iter_mut().for_each(|chance| *chance /= whole);
    chances
}

fn total_variation([a, b]: &[Vec<f64>; 2]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / 2.0).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use denoised::diffusion::{Graph, GraphKind, Schedule};

    #[test]
    fn the_variation_is_that_of_a_step() {
        let schedule = Schedule::LogLinear { eps: 1e-3 };
        let graph = Graph::new(GraphKind::Absorbing, 3);
        let step = Tweedie.step(&graph, &schedule, 0.5, 0.1);
        // Scores that are normalised as those of the true law are: staying has what time alone gives it.
        let sigma = schedule.total_noise(0.5);
        let offset = -sigma.exp_m1().ln();
        let row = |p: [f32; 3]| law(&step, &p.map(f32::ln), 2, offset);
        let (a, b) = (row([0.5, 0.5, 99.0]), row([0.25, 0.75, 1e-9]));
        let leaves = 1.0 - a[2];
        assert!((leaves - 0.1 / 0.5).abs() < 1e-3, "{leaves}");
        assert!((a[2] - b[2]).abs() < 1e-7);
        let variation = total_variation(&[a.clone(), b]);
        assert!((variation - leaves * 0.25).abs() < 1e-7, "{variation}");
        // Twice the scores leave twice as often, which their normalised law would not tell.
        let variation = total_variation(&[a, row([1.0, 1.0, 99.0])]);
        assert!((variation - leaves).abs() < 1e-7, "{variation}");
    }
}
