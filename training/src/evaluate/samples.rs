//! What a network writes: the reverse process from pure noise, by the samplers that the server uses,
//! over a network in training or a bundle's.

use std::convert::Infallible;

use burn::Tensor;
use burn::tensor::{Int, TensorData};
use denoised::diffusion::Parameterization;
use denoised::diffusion::sampler::row::{self, RowError, Scratch};
use denoised::diffusion::sampler::{TimeGrid, Tweedie};
use denoised::diffusion::{Draws, Token, TokenChoice};
use thiserror::Error;

use crate::loss::Objective;
use crate::model::{Ddit, token_tensor};
use crate::parallel;

/// Steps of a sample of a network in training.
pub const STEPS: u32 = 64;

/// Something that knows what the head of a network gives: log-scores, or logits of the clean token.
pub trait HeadRows {
    /// Why it may fail.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Hands the rows at the `wanted` positions of one canvas to `read`, with their index in `wanted`.
    fn head_rows(
        &mut self,
        tokens: &[Token],
        sigma: f64,
        wanted: &[usize],
        read: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Self::Error>;
}

/// Why there is no sample.
#[derive(Debug, Error)]
pub enum SampleError<E: std::error::Error + 'static> {
    /// The network ran, but nothing can be drawn from what it gave.
    #[error(transparent)]
    Scores(#[from] RowError),
    /// The network did not run.
    #[error(transparent)]
    Network(E),
}

/// How to draw samples.
#[derive(Debug, Clone, Copy)]
pub struct Sampling<'a> {
    /// What the network was trained to bring down.
    pub objective: Objective,
    /// What every sample begins with; shorter than a sample.
    pub prompt: &'a [Token],
    /// Tokens of a sample, the prompt included.
    pub length: usize,
    /// Samples.
    pub count: usize,
    /// Steps of each, before the final denoising; at least 1.
    pub steps: u32,
    /// How a new token is chosen.
    pub choice: TokenChoice,
    /// Decides noise and choices.
    pub seed: u64,
    /// Threads that share the samples, at least 1; no part of the result.
    pub threads: usize,
}

/// `count` sequences of the length of `network`, a network in training.
pub fn draw(
    network: &Ddit,
    objective: &Objective,
    count: usize,
    seed: u64,
    threads: usize,
) -> Result<Vec<Vec<Token>>, SampleError<Infallible>> {
    let sampling = Sampling {
        objective: *objective,
        prompt: &[],
        length: network.config().length,
        count,
        steps: STEPS,
        choice: TokenChoice::default(),
        seed,
        threads,
    };
    sampling.draw(&|| Ok(network))
}

impl Sampling<'_> {
    /// Draws the samples, with a network per thread. The same seed gives the same noise and choices
    /// whatever the network and the threads, so that samples of one run can be compared over its steps.
    pub fn draw<N: HeadRows>(
        &self,
        network: &(impl Fn() -> Result<N, N::Error> + Sync),
    ) -> Result<Vec<Vec<Token>>, SampleError<N::Error>> {
        parallel::map(
            self.count,
            self.threads,
            &|| network().map_err(SampleError::Network),
            &|network, index| self.sequence(network, index as u64),
        )
    }

    fn sequence<N: HeadRows>(
        &self,
        network: &mut N,
        index: u64,
    ) -> Result<Vec<Token>, SampleError<N::Error>> {
        let (graph, schedule) = (&self.objective.graph, &self.objective.schedule);
        let grid = TimeGrid::new(self.steps);
        let mut draws = Draws::new(self.seed, index);
        let mut tokens: Vec<Token> = (0..self.length)
            .map(|position| graph.sample_limit(draws.prior(position)))
            .collect();
        let given = self.prompt.len().min(self.length);
        tokens[..given].copy_from_slice(&self.prompt[..given]);
        let mut moved = Vec::new();
        let mut scratch = Scratch::default();
        for step in 0..grid.evaluations() {
            let mask = graph.mask();
            let wanted: Vec<usize> = (given..self.length)
                .filter(|&position| mask.is_none_or(|mask| tokens[position] == mask))
                .collect();
            if wanted.is_empty() {
                break;
            }
            let sigma = schedule.total_noise(grid.time(step));
            let law = grid.law(&Tweedie, graph, schedule, step);
            moved.clear();
            network
                .head_rows(&tokens, sigma, &wanted, &mut |row, scores| {
                    let position = wanted[row];
                    let offset = self.offset(sigma, scores, tokens[position]);
                    let uniforms = draws.at(step, position);
                    let token = tokens[position];
                    let drawn = row::draw(&law, &self.choice, token, scores, offset, uniforms, &mut scratch);
                    moved.push(drawn.map(|token| (position, token)));
                })
                .map_err(SampleError::Network)?;
            for moved in moved.drain(..) {
                if let (position, Some(token)) = moved? {
                    tokens[position] = token;
                }
            }
        }
        Ok(tokens)
    }

    /// What turns a row of the head into log-scores of the token at its position.
    fn offset(&self, sigma: f64, row: &[f32], token: Token) -> f64 {
        let Objective {
            graph,
            offset,
            parameterization,
            ..
        } = self.objective;
        let served = parameterization.log_score_offset(offset, sigma, graph.states());
        match parameterization {
            // Logits have yet to become log-probabilities.
            Parameterization::Mean => served - log_sum_exp(row, token),
            Parameterization::Score => served,
        }
    }
}

/// Logarithm of the sum of the exponentials of a row, but for the entry at `mask`.
fn log_sum_exp(row: &[f32], mask: Token) -> f64 {
    let others = || {
        let entries = row.iter().enumerate();
        entries
            .filter(move |(token, _)| *token != mask as usize)
            .map(|(_, logit)| f64::from(*logit))
    };
    let top = others().fold(f64::NEG_INFINITY, f64::max);
    top + others().map(|logit| (logit - top).exp()).sum::<f64>().ln()
}

impl HeadRows for &Ddit {
    type Error = Infallible;

    fn head_rows(
        &mut self,
        tokens: &[Token],
        sigma: f64,
        wanted: &[usize],
        read: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), Infallible> {
        let device = self.device();
        let rows: Vec<i64> = wanted.iter().map(|&position| position as i64).collect();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [wanted.len()]), &device);
        let sigma = Tensor::from_data(TensorData::new(vec![sigma as f32], [1]), &device);
        let tokens = token_tensor(tokens, tokens.len(), &device);
        let output: Vec<f32> = self
            .forward_rows(tokens, sigma, Some(rows), None)
            .into_data()
            .iter::<f32>()
            .collect();
        for (index, row) in output.chunks_exact(self.config().states).enumerate() {
            read(index, row);
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::model::{NetworkConfig, inference_device};
    use denoised::diffusion::{Graph, GraphKind, Schedule};

    /// Sure of one token at every position, another at each; of two first tokens it is not.
    struct Sure;

    impl HeadRows for Sure {
        type Error = Infallible;

        fn head_rows(
            &mut self,
            tokens: &[Token],
            _: f64,
            wanted: &[usize],
            read: &mut dyn FnMut(usize, &[f32]),
        ) -> Result<(), Infallible> {
            for (index, &position) in wanted.iter().enumerate() {
                let mut row = [-40.0_f32; 7];
                match (position, tokens[0]) {
                    (0, _) => {
                        row[0] = 0.25_f32.ln();
                        row[1] = 0.75_f32.ln();
                    }
                    // What follows depends on the first where that is known.
                    (_, 1) => row[(position * 5 + 1) % 6] = 0.0,
                    (_, _) => row[(position * 5) % 6] = 0.0,
                }
                read(index, &row);
            }
            Ok(())
        }
    }

    #[test]
    fn positions_get_what_their_own_rows_say() {
        let sampling = Sampling {
            objective: Objective {
                graph: Graph::new(GraphKind::Absorbing, 7),
                schedule: Schedule::LogLinear { eps: 1e-3 },
                offset: false,
                parameterization: Parameterization::Mean,
            },
            prompt: &[],
            length: 9,
            count: 400,
            steps: 16,
            choice: TokenChoice::default(),
            seed: 1,
            threads: 2,
        };
        let texts = sampling.draw(&|| Ok(Sure)).unwrap();
        let expected =
            |add: usize| -> Vec<Token> { (1..9).map(|at| ((at * 5 + add) % 6) as Token).collect() };
        let firsts = texts.iter().filter(|text| text[0] == 1).count();
        // Of 400 with chance 3/4, within five standard deviations.
        assert!((257..=343).contains(&firsts), "{firsts}");
        for text in &texts {
            for (at, token) in text.iter().enumerate().skip(1) {
                let may_be = [expected(0)[at - 1], expected(1)[at - 1]];
                assert!(may_be.contains(token), "{text:?}");
            }
        }
        // After a prompt there is one way to go on.
        for first in [0, 1] {
            let prompt = [first];
            let texts = Sampling {
                prompt: &prompt,
                count: 3,
                ..sampling
            }
            .draw(&|| Ok(Sure))
            .unwrap();
            for text in texts {
                assert_eq!(
                    (text[0], &text[1..]),
                    (first, expected(first as usize).as_slice())
                );
            }
        }
    }

    #[test]
    fn samples_are_whole_and_do_not_depend_on_threads() {
        for (kind, parameterization) in [
            (GraphKind::Absorbing, Parameterization::Score),
            (GraphKind::Absorbing, Parameterization::Mean),
            (GraphKind::Uniform, Parameterization::Score),
        ] {
            let config = NetworkConfig {
                states: 7,
                length: 12,
                scale_by_sigma: kind == GraphKind::Absorbing && parameterization == Parameterization::Score,
                parameterization,
                ..NetworkConfig::tiny()
            };
            // Fresh weights have a head of zeros: every row would be the same.
            let mut weights = config.initial_weights(1, 1.0);
            let head = weights.get("output_layer.linear.weight").unwrap().clone();
            let entries = (0..head.data.len()).map(|index| ((index * 37 % 101) as f32 - 50.0) / 10.0);
            weights.insert("output_layer.linear.weight", head.shape, entries.collect());
            let network = Ddit::from_weights(&config, weights, &inference_device()).unwrap();
            let objective = Objective {
                graph: Graph::new(kind, 7),
                schedule: Schedule::LogLinear { eps: 1e-3 },
                offset: config.scale_by_sigma,
                parameterization,
            };
            let one = draw(&network, &objective, 3, 5, 1).unwrap();
            assert_eq!(one, draw(&network, &objective, 3, 5, 2).unwrap());
            assert_ne!(one, draw(&network, &objective, 3, 6, 1).unwrap());
            assert_eq!(one.len(), 3);
            let mask = objective.graph.mask();
            for token in one.iter().flatten() {
                assert!(*token < 7 && Some(*token) != mask, "{one:?}");
            }
        }
    }
}
