//! The objective: denoising score entropy, weighted by the rate (SEDD, eqs. 10 and 11 of arXiv 2310.16834), or
//! for networks that give probabilities of the clean token what it then comes to, a weighted
//! cross-entropy (MDLM, eq. 10 of arXiv 2406.07524; RADD, arXiv 2406.03736, lambda-DCE).
//!
//! Score entropy: `loss = rate(t) * sum over positions of sum_{y != x} Q[x, y] (s_y - r_y ln s_y + K(r_y))`,
//! `r_y = p(y | x0) / p(x | x0)`, `K(a) = a (ln a - 1)`, mean over the batch. Ratios are taken on the
//! host in f64; a tensor sees `exp` of the head's output only, with the noise offset folded into
//! the weight of the row (`e^offset` is 1e6 and more at little noise).
//!
//! Cross-entropy: `loss = rate(t) / (e^sigma - 1) * sum over masked positions of -ln p(x0 | x)`, which
//! is score entropy at `s_y = p(y | x) / (e^sigma - 1)`; both bound `-ln p(x0)` alike.

pub mod masking;
pub mod times;

use burn::Tensor;
use burn::tensor::{Int, TensorData};
use denoised::diffusion::Parameterization;
use denoised::diffusion::{Graph, GraphKind, Schedule, Token, score_entropy, sigma_offset};
use rand_chacha::ChaCha8Rng;

use crate::model::kernels::{self, CrossEntropyTerm, RowTerm};
use crate::model::{Ddit, DropoutSource, token_tensor};
use crate::random::unit;

/// What is minimised, apart from the network.
#[derive(Debug, Clone, Copy)]
pub struct Objective {
    /// The noise process.
    pub graph: Graph,
    /// Total noise over time.
    pub schedule: Schedule,
    /// Whether the network's log-scores lack the offset `-ln(e^sigma - 1) - ln(states - 1)`.
    pub offset: bool,
    /// What the network gives.
    pub parameterization: Parameterization,
}

/// Sequences after the forward process, with what the loss needs to know about them.
#[derive(Debug, Clone, PartialEq)]
pub struct NoisedBatch {
    /// Tokens per sequence.
    pub length: usize,
    /// `[batch * length]`.
    pub tokens: Vec<Token>,
    /// Total noise, `[batch]`.
    pub sigma: Vec<f64>,
    /// Positions that the loss depends on, into `[batch * length]`, ascending.
    pub rows: Vec<usize>,
    /// One term per row.
    pub terms: Terms,
}

/// What rows add to the loss.
#[derive(Debug, Clone, PartialEq)]
pub enum Terms {
    /// Of networks that give log-scores.
    ScoreEntropy(Vec<RowTerm>),
    /// Of networks that give logits of the clean token.
    CrossEntropy(Vec<CrossEntropyTerm>),
}

impl Objective {
    /// Draws `x_t` for every token of `clean` (`[batch * length]`) at the sequences' `times`.
    pub fn noise(
        &self,
        clean: &[Token],
        length: usize,
        times: &[f64],
        generator: &mut ChaCha8Rng,
    ) -> NoisedBatch {
        let levels = self.levels(times);
        let tokens = self.transitions(clean, length, &levels, generator);
        self.terms(clean, tokens, length, &levels)
    }

    /// Total noise and rate at each of `times`.
    pub fn levels(&self, times: &[f64]) -> Vec<[f64; 2]> {
        let level = |&t: &f64| [self.schedule.total_noise(t), self.schedule.rate(t)];
        times.iter().map(level).collect()
    }

    /// Draws `x_t` for every token of `clean`, at the sequences' levels, without the loss of it.
    pub fn transitions(
        &self,
        clean: &[Token],
        length: usize,
        levels: &[[f64; 2]],
        generator: &mut ChaCha8Rng,
    ) -> Vec<Token> {
        let mut tokens = Vec::with_capacity(clean.len());
        for (sequence, &[sigma, _]) in clean.chunks_exact(length).zip(levels) {
            tokens.extend(
                sequence
                    .iter()
                    .map(|&token| self.graph.sample_transition(token, sigma, unit(generator))),
            );
        }
        tokens
    }

    /// The loss of given `x_t` (`tokens`) for `clean`, with total noise and rate per sequence.
    pub fn terms(
        &self,
        clean: &[Token],
        tokens: Vec<Token>,
        length: usize,
        noise: &[[f64; 2]],
    ) -> NoisedBatch {
        let (rows, terms) = match (self.parameterization, self.graph.mask()) {
            (Parameterization::Mean, Some(mask)) => {
                let (rows, terms) = rows_of(&tokens, clean, |index, current, target| {
                    let [sigma, rate] = noise[index / length];
                    (current == mask).then(|| CrossEntropyTerm {
                        mask: mask as usize,
                        target: target as usize,
                        weight: (rate / sigma.exp_m1()) as f32,
                    })
                });
                (rows, Terms::CrossEntropy(terms))
            }
            _ => {
                let (rows, terms) = rows_of(&tokens, clean, |index, current, target| {
                    let [sigma, rate] = noise[index / length];
                    self.term(current, target, sigma, rate)
                });
                (rows, Terms::ScoreEntropy(terms))
            }
        };
        NoisedBatch {
            length,
            tokens,
            sigma: noise.iter().map(|&[sigma, _]| sigma).collect(),
            rows,
            terms,
        }
    }

    fn term(&self, current: Token, target: Token, sigma: f64, rate: f64) -> Option<RowTerm> {
        let states = self.graph.states() as f64;
        // K(0) = 0, K(a) = a (ln a - 1).
        let k = score_entropy::normalizer;
        let offset = if self.offset {
            sigma_offset(sigma, self.graph.states())
        } else {
            0.0
        };
        let [exponential, linear, target_weight, constant] = match self.graph.kind() {
            // Only a masked position can move, to the clean token alone.
            GraphKind::Absorbing => {
                if Some(current) != self.graph.mask() {
                    return None;
                }
                let ratio = 1.0 / sigma.exp_m1();
                [offset.exp(), 0.0, ratio, k(ratio) - ratio * offset]
            }
            // Columns of e^(sigma Q): e^-sigma + (1 - e^-sigma) / V at the clean token, the second
            // part elsewhere.
            GraphKind::Uniform => {
                let moved = sigma.exp_m1();
                let [linear, target_weight, constant] = if current == target {
                    let ratio = moved / (moved + states);
                    [ratio, 0.0, (states - 1.0) * k(ratio)]
                } else {
                    let excess = states / moved;
                    [1.0, excess, (states - 2.0) * k(1.0) + k(1.0 + excess)]
                };
                [1.0, linear, target_weight, constant].map(|weight| weight / states)
            }
        };
        Some(RowTerm {
            current: current as usize,
            target: target as usize,
            exponential: (rate * exponential) as f32,
            linear: (rate * linear) as f32,
            target_weight: (rate * target_weight) as f32,
            constant: (rate * constant) as f32,
        })
    }
}

/// The positions with a term, and their terms.
fn rows_of<T>(
    tokens: &[Token],
    clean: &[Token],
    term: impl Fn(usize, Token, Token) -> Option<T>,
) -> (Vec<usize>, Vec<T>) {
    tokens
        .iter()
        .zip(clean)
        .enumerate()
        .filter_map(|(index, (&current, &target))| Some((index, term(index, current, target)?)))
        .unzip()
}

impl NoisedBatch {
    /// Multiplies the loss of every sequence by its weight.
    pub fn weigh(&mut self, weights: &[f64]) {
        let weights = self.rows.iter().map(|row| weights[row / self.length] as f32);
        match &mut self.terms {
            Terms::ScoreEntropy(terms) => {
                for (weight, term) in weights.zip(terms) {
                    term.exponential *= weight;
                    term.linear *= weight;
                    term.target_weight *= weight;
                    term.constant *= weight;
                }
            }
            Terms::CrossEntropy(terms) => {
                for (weight, term) in weights.zip(terms) {
                    term.weight *= weight;
                }
            }
        }
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sigma.len()
    }

    /// The terms of this batch's rows under `network`, `[rows]`; empty batches have none. Sequences without a row are
    /// left out: nothing depends on them.
    pub fn row_losses(&self, network: &Ddit, dropout: DropoutSource<'_>) -> Option<Tensor<1>> {
        if self.rows.is_empty() {
            return None;
        }
        let device = network.device();
        let (sequences, rows) = self.asked();
        let tokens: Vec<Token> = sequences
            .iter()
            .flat_map(|&index| &self.tokens[index * self.length..(index + 1) * self.length])
            .copied()
            .collect();
        let sigma: Vec<f32> = sequences.iter().map(|&index| self.sigma[index] as f32).collect();
        let sigma = Tensor::from_data(TensorData::new(sigma, [sequences.len()]), &device);
        let rows = (rows.len() < tokens.len()).then(|| {
            let count = rows.len();
            Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &device)
        });
        let tokens = token_tensor(&tokens, self.length, &device);
        let output = network.forward_rows(tokens, sigma, rows, dropout); // [rows, states]
        Some(self.terms.of(output))
    }

    /// The sequences that have rows, and the rows counted among theirs.
    fn asked(&self) -> (Vec<usize>, Vec<i64>) {
        let mut sequences: Vec<usize> = Vec::new();
        let mut rows = Vec::with_capacity(self.rows.len());
        for &row in &self.rows {
            let [sequence, position] = [row / self.length, row % self.length];
            if sequences.last() != Some(&sequence) {
                sequences.push(sequence);
            }
            rows.push(((sequences.len() - 1) * self.length + position) as i64);
        }
        (sequences, rows)
    }

    /// The loss of each sequence under `network`, without gradients.
    pub fn sequence_losses(&self, network: &Ddit) -> Vec<f64> {
        let mut losses = vec![0.0; self.sequences()];
        if let Some(rows) = self.row_losses(network, None) {
            for (loss, row) in rows.into_data().iter::<f32>().zip(&self.rows) {
                losses[row / self.length] += f64::from(loss);
            }
        }
        losses
    }
}

impl Terms {
    /// The loss of row `index` given what a bundle's network says of it, `[states]`.
    pub(crate) fn of_served(&self, index: usize, row: &[f32]) -> f64 {
        match self {
            Self::ScoreEntropy(terms) => terms[index].loss(row),
            // Bundles hold log-probabilities, not logits.
            Self::CrossEntropy(terms) => {
                let term = terms[index];
                -f64::from(term.weight) * f64::from(row[term.target])
            }
        }
    }

    /// The loss of each row of a network's output `[rows, states]`: `[rows]`.
    fn of(&self, output: Tensor<2>) -> Tensor<1> {
        match self {
            Self::ScoreEntropy(terms) => kernels::score_entropy(terms, output),
            Self::CrossEntropy(terms) => kernels::cross_entropy(terms, output),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::loss::times::EARLIEST;
    use crate::model::{NetworkConfig, inference_device, training_device};
    use rand_chacha::rand_core::SeedableRng;

    const STATES: usize = 13;

    /// Losses of rows and their gradients on tensors, against `rate * score_entropy::denoising` in f64 and
    /// its central differences.
    fn check(kind: GraphKind, schedule: Schedule, offset: bool, parameterization: Parameterization) {
        let objective = Objective {
            graph: Graph::new(kind, STATES),
            schedule,
            offset,
            parameterization,
        };
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let clean: Vec<Token> = (0..24).map(|index| index % (STATES as Token - 1)).collect();
        for t in [EARLIEST, 0.1, 0.6, 1.0] {
            let (sigma, rate) = (schedule.total_noise(t), schedule.rate(t));
            let batch = objective.noise(&clean, clean.len(), &[t], &mut random);
            if batch.rows.is_empty() {
                continue;
            }
            let rows = batch.rows.len();
            let raw: Vec<f32> = (0..rows * STATES)
                .map(|_| 4.0 * unit(&mut random) as f32 - 2.0)
                .collect();
            let output =
                Tensor::<2>::from_data(TensorData::new(raw.clone(), [rows, STATES]), &training_device())
                    .require_grad();
            let losses = batch.terms.of(output.clone());
            let gradients = losses.clone().sum().backward();
            let slopes: Vec<f32> = output.grad(&gradients).unwrap().into_data().iter().collect();
            for (index, (ours, raw)) in losses
                .into_data()
                .iter::<f32>()
                .zip(raw.chunks_exact(STATES))
                .enumerate()
            {
                let row = batch.rows[index];
                let raw: Vec<f64> = raw.iter().map(|&raw| f64::from(raw)).collect();
                let loss = |output: &[f64]| {
                    rate * score_entropy::denoising(
                        &objective.graph,
                        &log_scores(&objective, output, sigma),
                        batch.tokens[row],
                        clean[row],
                        sigma,
                    )
                };
                let expected = loss(&raw);
                assert!(
                    (f64::from(ours) - expected).abs() < 1e-5 * rate * expected.abs().max(1.0),
                    "{kind:?} {parameterization:?} at t = {t}: {ours} is not {expected}"
                );
                for y in 0..STATES {
                    let shifted = |by: f64| {
                        let mut raw = raw.clone();
                        raw[y] += by;
                        loss(&raw)
                    };
                    let h = 1e-4;
                    // Fourth order: the error of the differences stays below that of f32.
                    let slope = (8.0 * (shifted(h) - shifted(-h)) - (shifted(2.0 * h) - shifted(-2.0 * h)))
                        / (12.0 * h);
                    let ours = f64::from(slopes[index * STATES + y]);
                    assert!(
                        (ours - slope).abs() < 2e-6 * (rate + slope.abs() + expected.abs()),
                        "{kind:?} {parameterization:?} at t = {t}: slope {ours} by {y} is not {slope}"
                    );
                }
            }
        }
    }

    /// What the server makes of a network's output.
    fn log_scores(objective: &Objective, output: &[f64], sigma: f64) -> Vec<f64> {
        match objective.parameterization {
            Parameterization::Score => {
                let offset = if objective.offset {
                    sigma_offset(sigma, STATES)
                } else {
                    0.0
                };
                output.iter().map(|log_score| log_score + offset).collect()
            }
            Parameterization::Mean => {
                let tokens = &output[..STATES - 1];
                let total: f64 = tokens.iter().map(|logit| logit.exp()).sum();
                let shift = total.ln() + sigma.exp_m1().ln();
                let mut log_scores: Vec<f64> = tokens.iter().map(|logit| logit - shift).collect();
                log_scores.push(0.0);
                log_scores
            }
        }
    }

    #[test]
    fn sequences_without_a_mask_are_left_out_and_change_nothing() {
        let config = NetworkConfig {
            states: STATES,
            scale_by_sigma: false,
            parameterization: Parameterization::Mean,
            ..NetworkConfig::tiny()
        };
        let network = config.init(3, 0.5, &inference_device()).unwrap();
        let objective = Objective {
            graph: Graph::new(GraphKind::Absorbing, STATES),
            schedule: Schedule::LogLinear { eps: 1e-3 },
            offset: false,
            parameterization: Parameterization::Mean,
        };
        let clean: Vec<Token> = (0..12).collect();
        let mask = objective.graph.mask().unwrap();
        let noised: Vec<Token> = (0..12)
            .map(|at| if [1, 8, 11].contains(&at) { mask } else { at })
            .collect();
        let levels = objective.levels(&[0.3, 0.1, 0.6]);
        let losses = |sequences: std::ops::Range<usize>| {
            let tokens = 4 * sequences.start..4 * sequences.end;
            let batch = objective.terms(
                &clean[tokens.clone()],
                noised[tokens].to_vec(),
                4,
                &levels[sequences],
            );
            (batch.asked(), batch.sequence_losses(&network))
        };
        let (asked, together) = losses(0..3);
        assert_eq!(asked, (vec![0, 2], vec![1, 4, 7]));
        let alone = [losses(0..1).1, losses(1..2).1, losses(2..3).1].concat();
        assert!(alone[0] > 0.0 && alone[1] == 0.0 && alone[2] > 0.0);
        for (together, alone) in together.iter().zip(&alone) {
            assert!(
                (together - alone).abs() <= 1e-5 * alone.abs(),
                "{together} and {alone}"
            );
        }
    }

    #[test]
    fn tensor_losses_and_gradients_are_the_scalar_ones() {
        let geometric = Schedule::Geometric {
            sigma_min: 1e-3,
            sigma_max: 20.0,
        };
        for schedule in [Schedule::LogLinear { eps: 1e-3 }, geometric] {
            check(GraphKind::Absorbing, schedule, true, Parameterization::Score);
            check(GraphKind::Absorbing, schedule, false, Parameterization::Score);
            check(GraphKind::Absorbing, schedule, false, Parameterization::Mean);
            check(GraphKind::Uniform, schedule, false, Parameterization::Score);
        }
    }
}
