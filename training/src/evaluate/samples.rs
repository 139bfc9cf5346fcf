//! What a network writes: the reverse process from pure noise, by the samplers that the server uses,
//! over a network in training or a bundle's.

use std::convert::Infallible;

use burn::Tensor;
use burn::tensor::{Int, TensorData};
use denoised::diffusion::sampler::row::{self, RowError, Scratch};
use denoised::diffusion::sampler::{
    Candidate, CanvasView, Commit, Evaluation, HittingTimes, Sampler, TimeGrid, normalized,
};
use denoised::diffusion::{Draws, Parameterization, Process, SamplerKind, Token, TokenChoice};
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

/// A sample on its way from noise to text.
struct Canvas {
    tokens: Vec<Token>,
    clamped: Vec<bool>,
    gaps: usize,
    step: u32,
    nfe: u32,
    hitting_times: Option<HittingTimes>,
    draws: Draws,
}

impl Canvas {
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
    /// whatever the network and the threads, so that samples of one run can be compared over its steps; a server of
    /// the exported network gives the same texts for it.
    pub fn draw<N: HeadRows>(
        &self,
        network: &(impl Fn() -> Result<N, N::Error> + Sync),
    ) -> Result<Vec<Vec<Token>>, SampleError<N::Error>> {
        let sampler = self.sampler();
        parallel::map(
            self.count,
            self.threads,
            &|| network().map_err(SampleError::Network),
            &|network, index| self.sequence(sampler.as_ref(), network, index as u64),
        )
    }

    /// The server's sampler for these samples.
    fn sampler(&self) -> Box<dyn Sampler> {
        let Objective {
            graph,
            schedule,
            parameterization,
            ..
        } = self.objective;
        let (kind, process) = (SamplerKind::Tweedie, Process { graph, schedule });
        let normalized = normalized(false, kind, &process, parameterization);
        kind.build(process, TimeGrid::new(self.steps), normalized)
    }

    fn sequence<N: HeadRows>(
        &self,
        sampler: &dyn Sampler,
        network: &mut N,
        index: u64,
    ) -> Result<Vec<Token>, SampleError<N::Error>> {
        let mut canvas = self.canvas(sampler, index);
        let mut scratch = Scratch::default();
        loop {
            while let Some(commit) = sampler.pass_over(&canvas.view()) {
                self.apply(&commit, &mut canvas);
            }
            if canvas.step >= sampler.steps(canvas.gaps) {
                return Ok(canvas.tokens);
            }
            let evaluation = sampler.evaluation(&canvas.view());
            let mut candidates = Vec::new();
            let mut read = |row: usize, scores: &[f32]| {
                let drawn = self.candidate(&canvas, &evaluation, row, scores, &mut scratch);
                candidates.extend(drawn.transpose());
            };
            // Not every framework is at home with empty tensors.
            if !evaluation.positions.is_empty() {
                network
                    .head_rows(&canvas.tokens, evaluation.sigma, &evaluation.positions, &mut read)
                    .map_err(SampleError::Network)?;
            }
            let candidates = candidates.into_iter().collect::<Result<Vec<_>, _>>()?;
            let commit = sampler.commit(&canvas.view(), &evaluation, candidates);
            canvas.nfe += 1;
            self.apply(&commit, &mut canvas);
        }
    }

    /// Noise behind the prompt.
    fn canvas(&self, sampler: &dyn Sampler, index: u64) -> Canvas {
        let graph = &self.objective.graph;
        let mut draws = Draws::new(self.seed, index);
        let token = |position: usize| {
            let given = self.prompt.get(position).copied();
            given.unwrap_or_else(|| graph.sample_limit(draws.prior(position)))
        };
        let tokens: Vec<Token> = (0..self.length).map(token).collect();
        let masked: Vec<bool> = tokens.iter().map(|token| Some(*token) == graph.mask()).collect();
        Canvas {
            tokens,
            clamped: (0..self.length)
                .map(|position| position < self.prompt.len())
                .collect(),
            gaps: self.length.saturating_sub(self.prompt.len()),
            step: 0,
            nfe: 0,
            hitting_times: sampler.hitting_times(&masked, &mut draws),
            draws,
        }
    }

    /// What the row number `row` of an evaluation makes of its position; `None` where it stays as it is.
    fn candidate(
        &self,
        canvas: &Canvas,
        evaluation: &Evaluation,
        row: usize,
        scores: &[f32],
        scratch: &mut Scratch,
    ) -> Result<Option<Candidate>, RowError> {
        let position = evaluation.positions[row];
        let token = canvas.tokens[position];
        let among = row::Choice {
            choice: &self.choice,
            allowed: None,
        };
        let offset = self.offset(evaluation.sigma, scores, token);
        let uniforms = canvas.draws.clone().at(evaluation.draw, position);
        let law = &evaluation.law;
        let drawn = row::draw_by(law, among, token, scores, offset, None, uniforms, scratch)?;
        Ok(drawn.map(|token| Candidate {
            position,
            token,
            // Tweedie's steps go by neither.
            uncertainty: 0.0,
            log_probability: 0.0,
        }))
    }

    fn apply(&self, commit: &Commit, canvas: &mut Canvas) {
        for candidate in &commit.set {
            canvas.tokens[candidate.position] = candidate.token;
        }
        if let Some(mask) = self.objective.graph.mask() {
            for &position in &commit.masked {
                canvas.tokens[position] = mask;
            }
        }
        canvas.step = commit.step;
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
