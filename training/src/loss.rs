//! The objective: denoising score entropy, weighted by the rate (SEDD, arXiv 2310.16834, eq. 10-11).
//!
//! `loss = rate(t) * sum over positions of sum_{y != x} Q(x, y) (s_y - r_y ln s_y + K(r_y))`,
//! `r_y = p(y | x0) / p(x | x0)`, `K(a) = a (ln a - 1)`, mean over the batch. Ratios are taken on the
//! host in f64; a tensor sees `exp` of the head's output only, with the noise offset folded into
//! the weight of the row (`e^offset` is 1e6 and more at little noise).

use burn::Tensor;
use burn::tensor::{Int, TensorData};
use denoised::diffusion::{Graph, GraphKind, Schedule, Token, score_entropy, sigma_offset};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

use crate::kernels::{self, RowTerm, ScoreEntropy};
use crate::network::{Ddit, DropoutSource, token_tensor};

/// Times below this are neither trained nor evaluated: the rate is steep and nothing is left to learn.
pub const EARLIEST: f64 = 1e-3;

/// What is minimised, apart from the network.
#[derive(Debug, Clone, Copy)]
pub struct Objective {
    /// The noise process.
    pub graph: Graph,
    /// Total noise over time.
    pub schedule: Schedule,
    /// Whether the network's log-scores lack the offset `-ln(e^sigma - 1) - ln(states - 1)`.
    pub offset: bool,
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
    pub terms: Vec<RowTerm>,
}

/// A uniform draw from [0, 1) with 53 bits.
pub fn unit(generator: &mut ChaCha8Rng) -> f64 {
    (generator.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// `count` times that cover [`EARLIEST`, 1] evenly, all shifted by the same `u` in [0, 1): the loss
/// over a batch varies less than with independent times, and has the same mean.
pub fn stratified_times(count: usize, u: f64) -> impl Iterator<Item = f64> {
    (0..count).map(move |index| EARLIEST + (1.0 - EARLIEST) * (index as f64 + u) / count as f64)
}

/// `count` times as from [`stratified_times`], moved towards [`EARLIEST`] by raising a uniform to
/// `power`, each with the weight that keeps the mean of the loss.
pub fn weighted_times(count: usize, u: f64, power: f64) -> impl Iterator<Item = (f64, f64)> {
    stratified_times(count, u).map(move |u| (u.powf(power).max(EARLIEST), power * u.powf(power - 1.0)))
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
        let mut tokens = Vec::with_capacity(clean.len());
        for (sequence, &t) in clean.chunks_exact(length).zip(times) {
            let sigma = self.schedule.total_noise(t);
            tokens.extend(
                sequence
                    .iter()
                    .map(|&token| self.graph.sample_transition(token, sigma, unit(generator))),
            );
        }
        let weights: Vec<[f64; 2]> = times
            .iter()
            .map(|&t| [self.schedule.total_noise(t), self.schedule.rate(t)])
            .collect();
        self.terms(clean, tokens, length, &weights)
    }

    /// The loss of given `x_t` (`tokens`) for `clean`, with total noise and rate per sequence.
    pub fn terms(
        &self,
        clean: &[Token],
        tokens: Vec<Token>,
        length: usize,
        noise: &[[f64; 2]],
    ) -> NoisedBatch {
        let mut rows = Vec::with_capacity(tokens.len());
        let mut terms = Vec::with_capacity(tokens.len());
        for (index, (&current, &target)) in tokens.iter().zip(clean).enumerate() {
            let [sigma, rate] = noise[index / length];
            if let Some(term) = self.term(current, target, sigma, rate) {
                rows.push(index);
                terms.push(term);
            }
        }
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

impl NoisedBatch {
    /// Multiplies the loss of every sequence by its weight.
    pub fn weigh(&mut self, weights: &[f64]) {
        for (row, term) in self.rows.iter().zip(&mut self.terms) {
            let weight = weights[row / self.length] as f32;
            term.exponential *= weight;
            term.linear *= weight;
            term.target_weight *= weight;
            term.constant *= weight;
        }
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sigma.len()
    }

    /// The terms of this batch's rows under `network`, `[rows]`; empty batches have none.
    pub fn row_losses(&self, network: &Ddit, dropout: DropoutSource<'_>) -> Option<Tensor<1>> {
        if self.rows.is_empty() {
            return None;
        }
        let device = network.device();
        let tokens = token_tensor(&self.tokens, self.length, &device);
        let sigma: Vec<f32> = self.sigma.iter().map(|&sigma| sigma as f32).collect();
        let sigma = Tensor::from_data(TensorData::new(sigma, [self.sequences()]), &device);
        let rows = (self.rows.len() < self.tokens.len()).then(|| {
            let rows: Vec<i64> = self.rows.iter().map(|&row| row as i64).collect();
            Tensor::<1, Int>::from_data(TensorData::new(rows, [self.rows.len()]), &device)
        });
        let log_scores = network.forward_rows(tokens, sigma, rows, dropout); // [rows, states]
        Some(kernels::apply(
            ScoreEntropy {
                terms: self.terms.as_slice().into(),
            },
            [log_scores.into()],
        ))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::inference_device;
    use rand_chacha::rand_core::SeedableRng;

    /// Row terms on tensors equal `rate * score_entropy::denoising` on the host.
    fn check(kind: GraphKind, schedule: Schedule, offset: bool) {
        const STATES: usize = 13;
        let objective = Objective {
            graph: Graph::new(kind, STATES),
            schedule,
            offset,
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
            let log_scores =
                Tensor::<2>::from_data(TensorData::new(raw.clone(), [rows, STATES]), &inference_device());
            let kernel = ScoreEntropy {
                terms: batch.terms.as_slice().into(),
            };
            let losses: Tensor<1> = kernels::apply(kernel, [log_scores.into()]);
            let shift = if offset { sigma_offset(sigma, STATES) } else { 0.0 };
            for ((ours, raw), &row) in losses
                .into_data()
                .iter::<f32>()
                .zip(raw.chunks_exact(STATES))
                .zip(&batch.rows)
            {
                let log_score: Vec<f64> = raw.iter().map(|&raw| f64::from(raw) + shift).collect();
                let entropy = score_entropy::denoising(
                    &objective.graph,
                    &log_score,
                    batch.tokens[row],
                    clean[row],
                    sigma,
                );
                let expected = rate * entropy;
                let tolerance = 1e-4 * expected.abs().max(1.0);
                assert!(
                    (f64::from(ours) - expected).abs() < tolerance,
                    "{kind:?} at t = {t}: {ours} is not {expected}"
                );
            }
        }
    }

    #[test]
    fn tensor_score_entropy_is_the_scalar_one() {
        let geometric = Schedule::Geometric {
            sigma_min: 1e-3,
            sigma_max: 20.0,
        };
        for schedule in [Schedule::LogLinear { eps: 1e-3 }, geometric] {
            check(GraphKind::Absorbing, schedule, true);
            check(GraphKind::Absorbing, schedule, false);
            check(GraphKind::Uniform, schedule, false);
        }
    }

    #[test]
    fn weighted_times_keep_the_mean() {
        for power in [1.0, 2.0] {
            let count = 1000;
            let mean = |f: &dyn Fn(f64) -> f64| {
                weighted_times(count, 0.5, power)
                    .map(|(t, weight)| weight * f(t))
                    .sum::<f64>()
                    / count as f64
            };
            assert!((mean(&|_| 1.0) - 1.0).abs() < 2e-3);
            assert!((mean(&|t| t * t) - 1.0 / 3.0).abs() < 2e-3);
        }
    }
}
