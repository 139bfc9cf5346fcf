//! The bound on -log p(x0) of held-out text: the time integral of the score entropy plus the KL of
//! the prior (SEDD, arXiv 2310.16834, theorem 3.6).

use std::convert::Infallible;
use std::f64::consts::LN_2;
use std::fmt;

use denoised::bundle::{Bundle, Manifest};
use denoised::diffusion::{GraphKind, Token};
use denoised::network::adapted::Adapted;
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, NetworkError, ScoreNetwork};
use serde::{Deserialize, Serialize};

use crate::evaluate::samples::HeadRows;
use crate::loss::times::stratified;
use crate::loss::{NoisedBatch, Objective};
use crate::model::Ddit;
use crate::model::device::DeviceName;
use crate::parallel;
use crate::random::unit;
use crate::random::{Purpose, generator};

/// Sequences per run of the network, at most.
const BATCH: usize = 16;
/// Numbers per run that the network gives, at most, but for one sequence: bounds memory.
const MAX_OUTPUTS: usize = 1 << 25;

/// An upper bound on the average -ln p of a token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Nats per token, the prior included.
    pub nats_per_token: f64,
    /// Standard error of that, over sequences, or over documents where these are known.
    pub standard_error: f64,
    /// Sequences it was estimated on.
    pub sequences: usize,
    /// Times drawn per sequence.
    pub draws: usize,
    /// What each quarter of the times adds to it, from nearly clean text to nearly all noise: together with the prior
    /// they are the whole.
    #[serde(default)]
    pub by_time: [f64; TIME_PARTS],
}

/// Parts of the times that are told apart.
pub const TIME_PARTS: usize = 4;

impl Bound {
    /// Bits per token.
    pub fn bits_per_token(&self) -> f64 {
        self.nats_per_token / LN_2
    }

    /// Perplexity of a token.
    pub fn perplexity(&self) -> f64 {
        self.nats_per_token.exp()
    }

    /// Bits per byte and their standard error, for text of this many bytes per token.
    pub fn bits_per_byte(&self, bytes_per_token: f64) -> [f64; 2] {
        [self.nats_per_token, self.standard_error].map(|nats| nats / LN_2 / bytes_per_token)
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            nats_per_token,
            standard_error,
            ..
        } = self;
        write!(
            formatter,
            "{nats_per_token:.4} ± {standard_error:.4} nats/token, {:.4} bits/token",
            self.bits_per_token()
        )
    }
}

/// Nats per token that describing `x_1` costs. The prior is uniform, or for absorbing graphs the
/// mask, with what the noise leaves unmasked spread evenly over the tokens: any prior gives a bound.
pub fn prior_nats(objective: &Objective) -> f64 {
    let states = objective.graph.states() as f64;
    let stay = (-objective.schedule.total_noise(1.0)).exp();
    match objective.graph.kind() {
        GraphKind::Absorbing => stay * (states - 1.0).ln(),
        GraphKind::Uniform => {
            let elsewhere = (1.0 - stay) / states;
            let here = stay + elsewhere;
            here * (here * states).ln() + (states - 1.0) * elsewhere * (elsewhere * states).ln()
        }
    }
}

/// Something that knows the losses of noised sequences.
pub trait Evaluator {
    /// Why it may fail.
    type Error: Send;

    /// The loss of each sequence.
    fn sequence_losses(&mut self, batch: &NoisedBatch) -> Result<Vec<f64>, Self::Error>;
}

impl Evaluator for &Ddit {
    type Error = Infallible;

    fn sequence_losses(&mut self, batch: &NoisedBatch) -> Result<Vec<f64>, Infallible> {
        Ok(batch.sequence_losses(self))
    }
}

/// How to estimate a bound.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    /// What is bounded.
    pub objective: Objective,
    /// Times drawn for every sequence.
    pub draws: usize,
    /// Decides times and noise.
    pub seed: u64,
    /// Threads that share the sequences; no part of the result.
    pub threads: usize,
    /// The token behind every document, where sequences follow each other in one text: those that begin in the same
    /// document are alike, and err together.
    pub end_of_document: Option<Token>,
}

/// The bound for `sequences` under `network`.
pub fn bound(
    network: &Ddit,
    objective: &Objective,
    sequences: &[Vec<Token>],
    draws: usize,
    seed: u64,
    threads: usize,
) -> Bound {
    let estimate = Estimate {
        objective: *objective,
        draws,
        seed,
        threads,
        end_of_document: None,
    };
    let Ok(bound) = estimate.bound(&|| Ok(network), sequences);
    bound
}

impl Estimate {
    /// Estimates the bound for `sequences`, all of one length, with an evaluator per thread. The same seed
    /// gives the same estimate, whatever the threads.
    ///
    /// Times before [`EARLIEST`](crate::loss::times::EARLIEST), a thousandth of the integral, count as the average
    /// of the rest, as in the reference. Tokens are easiest to guess there, so that this is no gain.
    pub fn bound<E: Evaluator>(
        &self,
        evaluator: &(impl Fn() -> Result<E, E::Error> + Sync),
        sequences: &[Vec<Token>],
    ) -> Result<Bound, E::Error> {
        let length = sequences.first().map_or(1, Vec::len);
        let size = (MAX_OUTPUTS / (length * self.objective.graph.states())).clamp(1, BATCH);
        let batches: Vec<&[Vec<Token>]> = sequences.chunks(size).collect();
        let losses = parallel::map(batches.len(), self.threads, evaluator, &|evaluator, index| {
            self.losses(evaluator, batches[index], index)
        })?;
        let (losses, by_time): (Vec<Vec<f64>>, Vec<[f64; TIME_PARTS]>) = losses.into_iter().unzip();
        let losses = losses.into_iter().flatten();
        let per_token: Vec<f64> = losses.map(|loss| loss / length as f64).collect();
        let count = per_token.len() as f64;
        let part = |part: usize| by_time.iter().map(|parts| parts[part]).sum::<f64>() / length as f64 / count;
        let mean = per_token.iter().sum::<f64>() / count;
        let residuals: Vec<f64> = per_token.iter().map(|loss| loss - mean).collect();
        let documents = self.documents(sequences);
        // The mean's variance over clusters; of one document it says nothing, and sequences have to do.
        let several = documents.last().is_some_and(|last| *last > 0);
        let clusters: Vec<f64> = if several {
            let same = |(one, _): &(usize, f64), (other, _): &(usize, f64)| one == other;
            let of: Vec<(usize, f64)> = documents.into_iter().zip(residuals).collect();
            of.chunk_by(same)
                .map(|cluster| cluster.iter().map(|(_, residual)| residual).sum())
                .collect()
        } else {
            residuals
        };
        let squares: f64 = clusters.iter().map(|cluster| cluster * cluster).sum();
        let clusters = clusters.len() as f64;
        Ok(Bound {
            nats_per_token: mean + prior_nats(&self.objective),
            standard_error: (squares * clusters / (clusters - 1.0).max(1.0)).sqrt() / count,
            sequences: per_token.len(),
            draws: self.draws,
            by_time: std::array::from_fn(part),
        })
    }

    /// The number of the document in which each sequence begins; of its own where that is not known.
    fn documents(&self, sequences: &[Vec<Token>]) -> Vec<usize> {
        let Some(end) = self.end_of_document else {
            return (0..sequences.len()).collect();
        };
        let mut document = 0;
        let begins = sequences.iter().map(|sequence| {
            let begins = document;
            document += sequence.iter().filter(|token| **token == end).count();
            begins
        });
        begins.collect()
    }

    /// The mean loss of each sequence of batch `index`, and what each part of the times adds to their sum.
    fn losses<E: Evaluator>(
        &self,
        evaluator: &mut E,
        batch: &[Vec<Token>],
        index: usize,
    ) -> Result<(Vec<f64>, [f64; TIME_PARTS]), E::Error> {
        let mut random = generator(self.seed, Purpose::Evaluation, index as u64);
        let times: Vec<Vec<f64>> = batch
            .iter()
            .map(|_| stratified(self.draws, unit(&mut random)).collect())
            .collect();
        let length = batch.first().map_or(1, Vec::len);
        let clean: Vec<Token> = batch.concat();
        let mut losses = vec![0.0; batch.len()];
        let mut by_time = [0.0; TIME_PARTS];
        for draw in 0..self.draws {
            let times: Vec<f64> = times.iter().map(|times| times[draw]).collect();
            let noised = self.objective.noise(&clean, length, &times, &mut random);
            let drawn = evaluator.sequence_losses(&noised)?;
            for ((loss, drawn), time) in losses.iter_mut().zip(drawn).zip(&times) {
                *loss += drawn / self.draws as f64;
                let part = (time * TIME_PARTS as f64) as usize;
                by_time[part.min(TIME_PARTS - 1)] += drawn / self.draws as f64;
            }
        }
        Ok((losses, by_time))
    }
}

/// A bundle's network in ONNX Runtime, as the server runs it.
#[derive(Debug)]
pub struct Served {
    network: Adapted<OnnxNetwork>,
}

impl Served {
    /// The network of `bundle`, on the CPU with one thread.
    pub fn load(bundle: &Bundle) -> Result<Self, NetworkError> {
        Self::load_on(bundle, DeviceName::Cpu)
    }

    /// The same on any device.
    pub fn load_on(bundle: &Bundle, device: DeviceName) -> Result<Self, NetworkError> {
        let options = OnnxOptions {
            device,
            ..OnnxOptions::default()
        };
        Ok(Self {
            network: Adapted::new(OnnxNetwork::load(bundle, &options)?, bundle.manifest()),
        })
    }

    /// What its bundle was trained to bring down.
    pub fn objective(manifest: &Manifest) -> Objective {
        Objective {
            graph: manifest.graph(),
            schedule: manifest.schedule,
            offset: manifest.sigma_offset,
            parameterization: manifest.parameterization,
        }
    }
}

impl Evaluator for Served {
    type Error = NetworkError;

    fn sequence_losses(&mut self, noised: &NoisedBatch) -> Result<Vec<f64>, NetworkError> {
        let mut losses = vec![0.0; noised.sequences()];
        if noised.rows.is_empty() {
            return Ok(losses);
        }
        let tokens: Vec<i64> = noised.tokens.iter().map(|&token| i64::from(token)).collect();
        let sigma: Vec<f32> = noised.sigma.iter().map(|&sigma| sigma as f32).collect();
        let positions: Vec<i64> = noised.rows.iter().map(|&row| row as i64).collect();
        let batch = Batch {
            tokens: &tokens,
            length: noised.length,
            sigma: &sigma,
            positions: &positions,
        };
        self.network.log_score(&batch, &mut |rows| {
            for (index, &row) in noised.rows.iter().enumerate() {
                losses[row / noised.length] += noised.terms.of_served(index, &rows.row(index));
            }
        })?;
        Ok(losses)
    }
}

impl HeadRows for Served {
    type Error = NetworkError;

    fn head_rows(
        &mut self,
        tokens: &[Token],
        sigma: f64,
        wanted: &[usize],
        read: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), NetworkError> {
        let tokens: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let positions: Vec<i64> = wanted.iter().map(|&position| position as i64).collect();
        let batch = Batch {
            tokens: &tokens,
            length: tokens.len(),
            sigma: &[sigma as f32],
            positions: &positions,
        };
        self.network.log_score(&batch, &mut |rows| {
            (0..wanted.len()).for_each(|index| read(index, &rows.row(index)));
        })
    }
}

/// Text as sequences of a network's length.
#[derive(Debug, Clone)]
pub struct Text {
    /// Each of the same length; what is left over at the end is dropped.
    pub sequences: Vec<Vec<Token>>,
    /// Bytes of a token, on average over the whole text; document ends count as no bytes.
    pub bytes_per_token: f64,
}

impl Text {
    /// Encodes `documents` one after another, each with `end` behind it where there is one.
    pub fn encode<E>(
        documents: &[String],
        length: usize,
        end: Option<Token>,
        encode: impl Fn(&str) -> Result<Vec<Token>, E>,
    ) -> Result<Self, E> {
        let mut tokens = Vec::new();
        for document in documents {
            tokens.extend(encode(document)?);
            tokens.extend(end);
        }
        let bytes: usize = documents.iter().map(String::len).sum();
        Ok(Self {
            sequences: tokens.chunks_exact(length).map(<[_]>::to_vec).collect(),
            bytes_per_token: bytes as f64 / tokens.len().max(1) as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use denoised::diffusion::{Graph, GraphKind, Parameterization, Schedule};

    /// Loses 1, 1, 3 and 3 nats a token.
    struct Told;

    impl Evaluator for Told {
        type Error = Infallible;

        fn sequence_losses(&mut self, batch: &NoisedBatch) -> Result<Vec<f64>, Infallible> {
            Ok([1.0, 1.0, 3.0, 3.0]
                .map(|nats| nats * batch.length as f64)
                .to_vec())
        }
    }

    /// Loses as many nats as the rows of a sequence have in sum: all of the loss comes of late times where few rows do.
    struct Masks;

    impl Evaluator for Masks {
        type Error = Infallible;

        fn sequence_losses(&mut self, batch: &NoisedBatch) -> Result<Vec<f64>, Infallible> {
            let mut losses = vec![0.0; batch.sequences()];
            batch
                .rows
                .iter()
                .for_each(|row| losses[row / batch.length] += 1.0);
            Ok(losses)
        }
    }

    #[test]
    fn parts_of_the_times_add_up() {
        let objective = Objective {
            graph: Graph::new(GraphKind::Absorbing, 10),
            schedule: Schedule::LogLinear { eps: 1e-3 },
            offset: false,
            parameterization: Parameterization::Score,
        };
        let estimate = Estimate {
            objective,
            draws: 8,
            seed: 1,
            threads: 2,
            end_of_document: None,
        };
        let sequences = vec![vec![3; 50]; 40];
        let Ok(bound) = estimate.bound(&|| Ok(Masks), &sequences);
        let whole: f64 = bound.by_time.iter().sum();
        assert!((whole + prior_nats(&objective) - bound.nats_per_token).abs() < 1e-12);
        // At time t a share t of the tokens is masked: quarters of its integral, within five standard errors.
        for (part, nats) in bound.by_time.into_iter().enumerate() {
            let expected = (2 * part + 1) as f64 / 32.0;
            assert!((nats - expected).abs() < 0.01, "{part}: {nats}, not {expected}");
        }
    }

    /// Knows the law of tokens that are independent, one in four of them 1 and the others 0.
    struct Independent;

    impl Evaluator for Independent {
        type Error = Infallible;

        fn sequence_losses(&mut self, batch: &NoisedBatch) -> Result<Vec<f64>, Infallible> {
            let row = [0.75_f32.ln(), 0.25_f32.ln(), f32::NEG_INFINITY];
            let mut losses = vec![0.0; batch.sequences()];
            for (index, place) in batch.rows.iter().enumerate() {
                losses[place / batch.length] += batch.terms.of_served(index, &row);
            }
            Ok(losses)
        }
    }

    /// With the exact law the bound is the likelihood: its interval of 95 % holds the true value in 95 of 100 cases.
    #[test]
    fn intervals_hold_a_known_likelihood_as_often_as_they_say() {
        let objective = Objective {
            graph: Graph::new(GraphKind::Absorbing, 3),
            schedule: Schedule::LogLinear { eps: 1e-3 },
            offset: false,
            parameterization: Parameterization::Mean,
        };
        let entropy = -(0.75 * 0.75_f64.ln() + 0.25 * 0.25_f64.ln());
        // What the noise leaves unmasked is the prior's to describe.
        let truth = (1.0 - 1e-3) * entropy + prior_nats(&objective);
        let cases = 400;
        let held = (0..cases).filter(|&case| {
            let mut random = generator(case, Purpose::Order, 0);
            let token = |random: &mut _| Token::from(unit(random) < 0.25);
            let sequences: Vec<Vec<Token>> = (0..60)
                .map(|_| (0..8).map(|_| token(&mut random)).collect())
                .collect();
            let estimate = Estimate {
                objective,
                draws: 2,
                seed: case,
                threads: 1,
                end_of_document: None,
            };
            let Ok(bound) = estimate.bound(&|| Ok(Independent), &sequences);
            (bound.nats_per_token - truth).abs() < 1.96 * bound.standard_error
        });
        let held = held.count();
        // 380 are expected, with a standard deviation of 4.4; five of these, and what few sequences take.
        assert!((354..=400).contains(&held), "{held} of {cases}");
    }

    #[test]
    fn sequences_of_one_document_err_together() {
        let objective = Objective {
            graph: Graph::new(GraphKind::Uniform, 10),
            schedule: Schedule::LogLinear { eps: 1e-3 },
            offset: false,
            parameterization: Parameterization::Score,
        };
        let error = |sequences: &[[Token; 2]], end_of_document: Option<Token>| {
            let estimate = Estimate {
                objective,
                draws: 1,
                seed: 1,
                threads: 1,
                end_of_document,
            };
            let sequences: Vec<Vec<Token>> = sequences.iter().map(|s| s.to_vec()).collect();
            let Ok(bound) = estimate.bound(&|| Ok(Told), &sequences);
            bound.standard_error
        };
        // Two documents, of which all sequences are the same: two values are known, not four.
        let alike = [[0, 5], [0, 9], [0, 5], [0, 9]];
        let of_two = (2.0_f64 / 2.0).sqrt();
        assert!((error(&alike, Some(9)) - of_two).abs() < 1e-12);
        assert!((error(&alike, None) - (4.0_f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        // Each a document, or all one: then nothing is known of documents.
        assert!((error(&[[0, 9]; 4], Some(9)) - error(&alike, None)).abs() < 1e-12);
        assert!((error(&[[0, 5]; 4], Some(9)) - error(&alike, None)).abs() < 1e-12);
    }
}
