//! One optimizer step, and everything that a step leaves behind.
//!
//! A batch is split over threads, each with its own graph of gradients; parts are summed in their
//! order, so that the same threads give the same bits. Noise, times and dropout of a step follow from
//! (seed, step) alone, and so does its data: a resumed run goes on as if it had never stopped.

use std::panic::resume_unwind;
use std::thread;

use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};
use denoised::diffusion::Token;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::config::RunConfig;
use crate::ema::Ema;
use crate::loss::{NoisedBatch, Objective, unit, weighted_times};
use crate::network::{Ddit, NetworkConfig, NetworkError, training_device};
use crate::optimizer::combine;

/// What a seed is used for besides the network's first weights.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    /// Times and noise of a step.
    Noise = 1,
    /// Dropout of one part of a step's batch.
    Dropout = 2,
    /// Order of sequences in an epoch.
    Order = 3,
    /// Times and noise of an evaluation.
    Evaluation = 4,
}

/// A generator that no other (seed, purpose, index) shares.
pub(crate) fn generator(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&index.to_le_bytes());
    key[16] = purpose as u8;
    ChaCha8Rng::from_seed(key)
}

/// A network in training.
pub struct Trainer {
    pub(crate) config: RunConfig,
    pub(crate) objective: Objective,
    pub(crate) network: Ddit,
    pub(crate) optimizer: ModuleOptimizer,
    pub(crate) ema: Ema,
    pub(crate) step: u64,
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Trainer")
            .field("config", &self.config)
            .field("step", &self.step)
            .finish_non_exhaustive()
    }
}

/// What a step reports.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Loss of the batch, in nats per token.
    pub loss: f64,
    /// Euclidean norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
}

impl Trainer {
    /// A fresh run for a network of this shape.
    pub fn new(config: RunConfig, shape: &NetworkConfig) -> Result<Self, NetworkError> {
        let network = shape.init(config.run.seed, config.network.initial_gate, &training_device())?;
        Ok(Self {
            objective: objective(&config, shape),
            optimizer: config.optimizer.adamw(),
            ema: Ema::new(config.optimizer.ema_decay, &network),
            network,
            config,
            step: 0,
        })
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The averaged network.
    pub fn averaged(&self) -> &Ddit {
        self.ema.network()
    }

    /// The loss whose gradients are followed.
    pub fn objective(&self) -> &Objective {
        &self.objective
    }

    /// Learns from `sequences` when `progress` in [0, 1] of the run is over.
    pub fn learn(&mut self, sequences: &[Vec<Token>], progress: f64) -> StepReport {
        let run = &self.config.run;
        let length = self.network.config().length;
        let mut noise = generator(run.seed, Purpose::Noise, self.step);
        let count = sequences.len();
        let power = self.config.optimizer.time_power;
        let times: Vec<(f64, f64)> = weighted_times(count, unit(&mut noise), power).collect();
        // Round robin, so that every thread gets early and late times, that is, equal work.
        let parts: Vec<NoisedBatch> = (0..run.threads)
            .map(|part| {
                let mine = || (part..count).step_by(run.threads);
                let clean: Vec<Token> = mine()
                    .flat_map(|index| sequences[index].iter().copied())
                    .collect();
                let (times, weights): (Vec<f64>, Vec<f64>) = mine().map(|index| times[index]).unzip();
                let mut batch = self.objective.noise(&clean, length, &times, &mut noise);
                batch.weigh(&weights);
                batch
            })
            .collect();

        let (network, step) = (&self.network, self.step);
        let results: Vec<(f64, GradientsParams)> = thread::scope(|scope| {
            let handles: Vec<_> = parts
                .iter()
                .enumerate()
                .map(|(part, batch)| {
                    let mut dropout = generator(
                        run.seed,
                        Purpose::Dropout,
                        step * run.threads as u64 + part as u64,
                    );
                    // Its own leaves: two threads must not meet in one graph of gradients.
                    let network = network.clone().fork(&network.device());
                    scope.spawn(move || gradients(&network, batch, sequences.len(), &mut dropout))
                })
                .collect();
            handles
                .into_iter()
                // A part that is missing would pass for a smaller gradient.
                .map(|handle| handle.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        });

        let loss = results.iter().map(|(loss, _)| loss).sum::<f64>() / length as f64;
        let parts = results.into_iter().map(|(_, gradients)| gradients).collect();
        let settings = &self.config.optimizer;
        let (gradients, gradient_norm) = combine(&self.network, parts, settings.gradient_clip_norm);
        let learning_rate = settings.learning_rate(self.step, progress);
        self.network = self
            .optimizer
            .step(learning_rate, self.network.clone(), gradients);
        self.ema.update(&self.network);
        self.step += 1;
        StepReport {
            loss,
            gradient_norm,
            learning_rate,
        }
    }
}

/// The objective of a run.
pub fn objective(config: &RunConfig, shape: &NetworkConfig) -> Objective {
    Objective {
        graph: config.graph(shape),
        schedule: config.schedule,
        offset: shape.scale_by_sigma,
        parameterization: shape.parameterization,
    }
}

/// This part's share of the loss of a batch of `sequences`, and its gradients.
pub(crate) fn gradients(
    network: &Ddit,
    part: &NoisedBatch,
    sequences: usize,
    dropout: &mut ChaCha8Rng,
) -> (f64, GradientsParams) {
    let Some(rows) = part.row_losses(network, Some(dropout)) else {
        return (0.0, GradientsParams::new());
    };
    let loss = rows.sum().div_scalar(sequences as f64);
    let value = f64::from(loss.clone().into_scalar::<f32>());
    (value, GradientsParams::from_grads(loss.backward(), network))
}
