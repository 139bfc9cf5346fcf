//! The bound on -log p(x0) of held-out text: the time integral of the score entropy plus the KL of
//! the prior (SEDD, arXiv 2310.16834, theorem 3.6).

use std::f64::consts::LN_2;
use std::fmt;
use std::panic::resume_unwind;
use std::thread;

use denoised::diffusion::{GraphKind, Token};
use serde::{Deserialize, Serialize};

use crate::loss::{Objective, stratified_times, unit};
use crate::network::Ddit;
use crate::trainer::{Purpose, generator};

/// Sequences per run of the network.
const BATCH: usize = 16;

/// An upper bound on the average -ln p of a token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Nats per token, the prior included.
    pub nats_per_token: f64,
    /// Standard error of that, over sequences.
    pub standard_error: f64,
    /// Sequences it was estimated on.
    pub sequences: usize,
    /// Times drawn per sequence.
    pub draws: usize,
}

impl Bound {
    /// Bits per token.
    pub fn bits_per_token(&self) -> f64 {
        self.nats_per_token / LN_2
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

/// Estimates the bound for `sequences` with `draws` times each, spread evenly over time. The same
/// seed gives the same estimate, whatever the threads.
///
/// Times before [`EARLIEST`](crate::loss::EARLIEST), a thousandth of the integral, count as the average
/// of the rest, as in the reference. Tokens are easiest to guess there, so that this is no gain.
pub fn bound(
    network: &Ddit,
    objective: &Objective,
    sequences: &[Vec<Token>],
    draws: usize,
    seed: u64,
    threads: usize,
) -> Bound {
    let mut losses: Vec<Vec<f64>> = Vec::new();
    thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|part| {
                scope.spawn(move || {
                    let batches = sequences.chunks(BATCH).enumerate().skip(part).step_by(threads);
                    batches
                        .map(|(index, batch)| {
                            (index, batch_losses(network, objective, batch, draws, seed, index))
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let mut parts: Vec<_> = handles
            .into_iter()
            // Sequences that are missing would pass for a better bound.
            .flat_map(|handle| handle.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect();
        parts.sort_by_key(|(index, _)| *index);
        losses.extend(parts.into_iter().map(|(_, losses)| losses));
    });
    let length = network.config().length as f64;
    let per_token: Vec<f64> = losses.into_iter().flatten().map(|loss| loss / length).collect();
    let count = per_token.len() as f64;
    let mean = per_token.iter().sum::<f64>() / count;
    let squares: f64 = per_token.iter().map(|loss| (loss - mean) * (loss - mean)).sum();
    Bound {
        nats_per_token: mean + prior_nats(objective),
        standard_error: (squares / (count - 1.0).max(1.0) / count).sqrt(),
        sequences: per_token.len(),
        draws,
    }
}

/// The mean loss of each sequence of one batch.
fn batch_losses(
    network: &Ddit,
    objective: &Objective,
    batch: &[Vec<Token>],
    draws: usize,
    seed: u64,
    index: usize,
) -> Vec<f64> {
    let mut random = generator(seed, Purpose::Evaluation, index as u64);
    let times: Vec<Vec<f64>> = batch
        .iter()
        .map(|_| stratified_times(draws, unit(&mut random)).collect())
        .collect();
    let clean: Vec<Token> = batch.concat();
    let mut losses = vec![0.0; batch.len()];
    for draw in 0..draws {
        let times: Vec<f64> = times.iter().map(|times| times[draw]).collect();
        let noised = objective.noise(&clean, network.config().length, &times, &mut random);
        for (loss, drawn) in losses.iter_mut().zip(noised.sequence_losses(network)) {
            *loss += drawn / draws as f64;
        }
    }
    losses
}
