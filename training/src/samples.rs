//! What a network in training writes: the reverse process from pure noise, by the samplers that the
//! server uses.

use std::panic::resume_unwind;
use std::thread;

use burn::Tensor;
use burn::tensor::{Int, TensorData};
use denoised::bundle::Parameterization;
use denoised::diffusion::sampler::TimeGrid;
use denoised::diffusion::sampler::row::{self, BadScores};
use denoised::diffusion::{Draws, SamplerKind, Token, TokenChoice, sigma_offset};

use crate::loss::Objective;
use crate::network::{Ddit, token_tensor};

/// Steps of a sample.
pub const STEPS: u32 = 64;

/// `count` sequences of the network's length. The same seed gives the same noise and choices whatever
/// the network and the threads, so that samples of one run can be compared over its steps.
pub fn draw(
    network: &Ddit,
    objective: &Objective,
    count: usize,
    seed: u64,
    threads: usize,
) -> Result<Vec<Vec<Token>>, BadScores> {
    let mut drawn: Vec<(usize, Result<Vec<Token>, BadScores>)> = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.min(count))
            .map(|part| {
                scope.spawn(move || -> Vec<_> {
                    (part..count)
                        .step_by(threads)
                        .map(|index| (index, sequence(network, objective, seed, index as u64)))
                        .collect()
                })
            })
            .collect();
        handles
            .into_iter()
            .flat_map(|handle| handle.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    drawn.sort_by_key(|(index, _)| *index);
    drawn.into_iter().map(|(_, sequence)| sequence).collect()
}

fn sequence(network: &Ddit, objective: &Objective, seed: u64, index: u64) -> Result<Vec<Token>, BadScores> {
    let (graph, schedule) = (&objective.graph, &objective.schedule);
    let length = network.config().length;
    let grid = TimeGrid { steps: STEPS };
    let sampler = SamplerKind::Tweedie.sampler();
    let mut draws = Draws::new(seed, index);
    let mut tokens: Vec<Token> = (0..length)
        .map(|position| graph.sample_limit(draws.prior(position)))
        .collect();
    let mut weights = Vec::new();
    for step in 0..grid.evaluations() {
        let mask = graph.mask();
        let wanted: Vec<usize> = (0..length)
            .filter(|&position| mask.is_none_or(|mask| tokens[position] == mask))
            .collect();
        if wanted.is_empty() {
            break;
        }
        let sigma = schedule.total_noise(grid.time(step));
        let law = grid.law(sampler, graph, schedule, step);
        let scores = log_scores(network, &tokens, sigma, &wanted);
        for (&position, scores) in wanted.iter().zip(scores.chunks_exact(graph.states())) {
            let offset = match objective.parameterization {
                Parameterization::Mean => -sigma.exp_m1().ln() - log_sum_exp(scores, tokens[position]),
                Parameterization::Score if objective.offset => sigma_offset(sigma, graph.states()),
                Parameterization::Score => 0.0,
            };
            let uniforms = draws.at(step, position);
            let choice = TokenChoice::default();
            let moved = row::draw(
                &law,
                &choice,
                tokens[position],
                scores,
                offset,
                uniforms,
                &mut weights,
            )?;
            tokens[position] = moved.unwrap_or(tokens[position]);
        }
    }
    Ok(tokens)
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

/// Rows of the head's output: log-scores, or logits of the clean token, at the `wanted` positions of `tokens`, one after another.
fn log_scores(network: &Ddit, tokens: &[Token], sigma: f64, wanted: &[usize]) -> Vec<f32> {
    let device = network.device();
    let rows: Vec<i64> = wanted.iter().map(|&position| position as i64).collect();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [wanted.len()]), &device);
    let sigma = Tensor::from_data(TensorData::new(vec![sigma as f32], [1]), &device);
    let tokens = token_tensor(tokens, tokens.len(), &device);
    network
        .forward_rows(tokens, sigma, Some(rows), None)
        .into_data()
        .iter::<f32>()
        .collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::network::{NetworkConfig, inference_device};
    use denoised::diffusion::{Graph, GraphKind, Schedule};

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
                hidden_size: 8,
                cond_dim: 4,
                blocks: 1,
                heads: 2,
                dropout: 0.0,
                scale_by_sigma: kind == GraphKind::Absorbing && parameterization == Parameterization::Score,
                parameterization,
                time_conditioned: true,
                tie_embeddings: false,
            };
            let network = config.init(1, 1.0, &inference_device()).unwrap();
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
