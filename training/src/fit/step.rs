//! One optimizer step, and everything that a step leaves behind.
//!
//! A batch is split over the lanes of [`Devices`], threads of the CPU or GPUs, each with its own graph of
//! gradients; parts are summed in their order, so that the same lanes give the same bits. `run.accumulate` splits it further into parts
//! that follow one another, for batches whose activations do not fit into memory at once. Noise, times
//! and dropout of a step follow from (seed, step) alone, and so does its data: a resumed run goes on as
//! if it had never stopped.
//!
//! Weights, gradients, moments and averages are f32; `run.precision` is for the products of matrices.

use std::panic::resume_unwind;
use std::thread;

use burn::module::Module;
use burn::optim::{GradientsParams, ModuleOptimizer};
use denoised::diffusion::Token;
use rand_chacha::ChaCha8Rng;

use crate::config::RunConfig;
use crate::loss::masking::{self, MaskCount, Masking, mask_counts};
use crate::loss::{NoisedBatch, Objective};
use crate::model::device::Devices;
use crate::model::state_dict::StateDict;
use crate::model::{Ddit, NetworkConfig, NetworkError};
use crate::optim::ema::Ema;
use crate::optim::optimizer::clip;
use crate::optim::sums::Sums;
use crate::random::{Purpose, generator};

/// A network in training.
pub struct Trainer {
    pub(crate) config: RunConfig,
    pub(crate) devices: Devices,
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

/// A batch after the forward process.
#[derive(Debug, Clone, PartialEq)]
pub struct Noise {
    /// `[batch * length]`.
    pub tokens: Vec<Token>,
    /// Total noise and rate of each sequence.
    pub levels: Vec<[f64; 2]>,
    /// What each sequence's loss is multiplied by, for times that are not drawn evenly.
    pub weights: Vec<f64>,
}

/// What a batch teaches, before it is learned.
pub struct Gradient {
    /// Loss of the batch, in nats per token.
    pub loss: f64,
    /// Euclidean norm of all gradients before clipping.
    pub norm: f64,
    gradients: GradientsParams,
}

impl std::fmt::Debug for Gradient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Gradient")
            .field("loss", &self.loss)
            .field("norm", &self.norm)
            .finish_non_exhaustive()
    }
}

impl Trainer {
    /// A fresh run for a network of this shape on `devices`.
    pub fn new(config: RunConfig, shape: &NetworkConfig, devices: Devices) -> Result<Self, NetworkError> {
        let network = shape.init(config.run.seed, config.network.initial_gate, &devices.training())?;
        Ok(Self {
            objective: objective(&config, shape),
            optimizer: config.optimizer.build(),
            ema: Ema::new(config.optimizer.ema_decay, &network),
            network,
            config,
            devices,
            step: 0,
        })
    }

    /// Takes these weights in place of fresh ones, in a run that has not begun.
    pub(super) fn begin_with(&mut self, weights: &StateDict) -> Result<(), NetworkError> {
        self.network = self.network.load_state_dict(weights)?;
        self.ema = Ema::new(self.config.optimizer.ema_decay, &self.network);
        Ok(())
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
        let gradient = self.gradient(sequences);
        self.apply(gradient, progress)
    }

    /// What becomes of `sequences` in step `step`. Drawn before a batch is split, so that it is the same
    /// however the batch is split.
    pub fn noise(&self, step: u64, sequences: &[Vec<Token>]) -> Noise {
        let mut random = generator(self.config.run.seed, Purpose::Noise, step);
        let settings = &self.config.optimizer;
        let (sampling, power) = (settings.time_sampling, settings.time_power);
        let length = self.network.config().length;
        let mut tokens = sequences.concat();
        match (settings.masking, self.objective.graph.mask()) {
            (Masking::FixedCount, Some(mask)) => {
                let counts = mask_counts(sequences.len(), length, sampling, power, &mut random);
                for (sequence, drawn) in tokens.chunks_exact_mut(length).zip(&counts) {
                    masking::mask(sequence, drawn.count, mask, &mut random);
                }
                let level = |drawn: &MaskCount| drawn.level(length, &self.objective.schedule);
                Noise {
                    tokens,
                    levels: counts.iter().map(level).collect(),
                    weights: counts.iter().map(|drawn| drawn.weight).collect(),
                }
            }
            _ => {
                let times = sampling.times(sequences.len(), power, &mut random);
                let (times, weights): (Vec<f64>, Vec<f64>) = times.into_iter().unzip();
                let levels = self.objective.levels(&times);
                Noise {
                    tokens: self.objective.transitions(&tokens, length, &levels, &mut random),
                    levels,
                    weights,
                }
            }
        }
    }

    /// The loss of `sequences` in this step and its clipped gradient; nothing is learned yet.
    pub fn gradient(&self, sequences: &[Vec<Token>]) -> Gradient {
        let run = &self.config.run;
        let length = self.network.config().length;
        let count = sequences.len();
        let Noise {
            tokens: noised,
            levels,
            weights,
        } = self.noise(self.step, sequences);
        let lanes = self.devices.lanes().len();
        let parts = lanes * run.accumulate;
        // Round robin, so that every part gets early and late times, that is, equal work.
        let part = |part: usize| {
            let mine = || (part..count).step_by(parts);
            let clean: Vec<Token> = mine().flat_map(|i| sequences[i].iter().copied()).collect();
            let tokens = mine().flat_map(|i| noised[i * length..(i + 1) * length].iter().copied());
            let levels: Vec<[f64; 2]> = mine().map(|i| levels[i]).collect();
            let weights: Vec<f64> = mine().map(|i| weights[i]).collect();
            let mut batch = self.objective.terms(&clean, tokens.collect(), length, &levels);
            batch.weigh(&weights);
            batch
        };

        let mut loss = 0.0;
        let mut sums = match self.devices.apart() {
            Some(lanes) => Sums::apart(&self.network, lanes),
            None => Sums::shared(&self.network),
        };
        for first in (0..parts).step_by(lanes) {
            let batches: Vec<NoisedBatch> = (first..first + lanes).map(part).collect();
            let (losses, gradients): (Vec<f64>, Vec<GradientsParams>) =
                self.gradients_of(&batches, first, count).into_iter().unzip();
            loss += losses.iter().sum::<f64>();
            sums.add(gradients);
        }
        let largest = self.config.optimizer.gradient_clip_norm;
        let (gradients, norm) = clip(&self.network, sums.finish(), largest);
        Gradient {
            loss: loss / length as f64,
            norm,
            gradients,
        }
    }

    /// Loss and gradients of every batch, each on a thread of its own; the first is part `first` of the
    /// step's `sequences`.
    fn gradients_of(
        &self,
        batches: &[NoisedBatch],
        first: usize,
        sequences: usize,
    ) -> Vec<(f64, GradientsParams)> {
        let run = &self.config.run;
        let parts = (self.devices.lanes().len() * run.accumulate) as u64;
        thread::scope(|scope| {
            let handles: Vec<_> = batches
                .iter()
                .zip(first as u64..)
                .zip(self.devices.lanes())
                .map(|((batch, part), device)| {
                    let mut dropout = generator(run.seed, Purpose::Dropout, self.step * parts + part);
                    // Its own leaves: two threads must not meet in one graph of gradients.
                    let network = self.network.clone().fork(&device).multiplied_in(run.precision);
                    scope.spawn(move || gradients(&network, batch, sequences, &mut dropout))
                })
                .collect();
            handles
                .into_iter()
                // A part that is missing would pass for a smaller gradient.
                .map(|handle| handle.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        })
    }

    /// Follows `gradient` when `progress` in [0, 1] of the run is over: the end of a step.
    pub fn apply(&mut self, gradient: Gradient, progress: f64) -> StepReport {
        let learning_rate = self.config.optimizer.learning_rate(self.step, progress);
        let rates = self.config.optimizer.learning_rates(learning_rate);
        self.network = self
            .optimizer
            .step(rates, self.network.clone(), gradient.gradients);
        self.ema.update(&self.network);
        self.step += 1;
        StepReport {
            loss: gradient.loss,
            gradient_norm: gradient.norm,
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::evaluate::bound::bound;
    use crate::model::inference_device;
    use crate::model::precision::Precision;

    fn config(seed: u64, dropout: f64, threads: usize, accumulate: usize) -> RunConfig {
        let text = format!(
            r#"
            data = {{ train = "-", validation = "-", tokenizer = "-" }}
            graph = {{ kind = "absorbing" }}
            schedule = {{ type = "loglinear", eps = 1e-3 }}
            [network]
            length = 8
            hidden_size = 16
            cond_dim = 8
            blocks = 2
            heads = 2
            dropout = {dropout}
            scale_by_sigma = true
            initial_gate = 1.0
            [optimizer]
            lr = 3e-3
            betas = [0.9, 0.99]
            # Gradients that are nothing but rounding must not make whole steps.
            epsilon = 1e-4
            warmup_steps = 1
            gradient_clip_norm = 1.0
            ema_decay = 0.9
            [run]
            seed = {seed}
            batch_size = 10
            accumulate = {accumulate}
            steps = 4
            checkpoint_every = 4
            validate_every = 4
            threads = {threads}
            directory = "-"
            "#
        );
        let config: RunConfig = toml::from_str(&text).unwrap();
        config.validate().unwrap();
        config
    }

    fn sequences() -> Vec<Vec<Token>> {
        (0..10)
            .map(|sequence| {
                (0..8)
                    .map(|position| (sequence + position * position) % 11)
                    .collect()
            })
            .collect()
    }

    /// Losses of four steps, and the weights after them.
    fn trained(config: RunConfig) -> (Vec<f64>, StateDict) {
        let (shape, devices) = (config.network_config(11), Devices::cpu(config.run.threads));
        let mut trainer = Trainer::new(config, &shape, devices).unwrap();
        let losses = (0..4).map(|_| trainer.learn(&sequences(), 0.0).loss).collect();
        (losses, trainer.network.valid().state_dict())
    }

    #[test]
    fn accumulated_parts_make_the_same_step_as_the_whole_batch() {
        let (losses, weights) = trained(config(1, 0.0, 1, 1));
        // Ten sequences do not divide evenly into four parts.
        for (threads, accumulate) in [(1, 4), (2, 2), (2, 5), (1, 10)] {
            let (split_losses, split_weights) = trained(config(1, 0.0, threads, accumulate));
            for (whole, split) in losses.iter().zip(&split_losses) {
                assert!((whole / split - 1.0).abs() < 1e-5, "{losses:?}, {split_losses:?}");
            }
            for (name, whole) in &weights.0 {
                let split = &split_weights.0[name].data;
                for (whole, split) in whole.data.iter().zip(split) {
                    assert!((whole - split).abs() < 1e-5, "{name}: {whole} became {split}");
                }
            }
            assert_eq!(
                trained(config(1, 0.0, threads, accumulate)),
                (split_losses, split_weights),
                "the same parts give the same bits"
            );
        }
    }

    #[test]
    fn bf16_rounds_products_and_keeps_weights_whole() {
        let (losses, _) = trained(config(1, 0.0, 2, 1));
        let mut config = config(1, 0.0, 2, 1);
        config.run.precision = Precision::Bf16;
        let (rounded, weights) = trained(config);
        assert_ne!(losses, rounded);
        for (exact, rounded) in losses.iter().zip(&rounded) {
            assert!((exact / rounded - 1.0).abs() < 0.02, "{exact} and {rounded}");
        }
        for (name, weights) in &weights.0 {
            let whole = |x: &f32| *x != half::bf16::from_f32(*x).to_f32();
            let zero = |x: &f32| *x == 0.0;
            assert!(
                weights.data.iter().any(whole) || weights.data.iter().all(zero),
                "{name}"
            );
        }
    }

    #[test]
    fn dropout_follows_from_the_seed() {
        let dropped = trained(config(1, 0.5, 2, 2));
        assert_eq!(dropped, trained(config(1, 0.5, 2, 2)));
        assert_ne!(dropped, trained(config(1, 0.0, 2, 2)));
        assert_ne!(dropped, trained(config(2, 0.5, 2, 2)));
    }

    #[test]
    fn dropout_is_for_training_only() {
        let (_, weights) = trained(config(1, 0.0, 1, 1));
        let loss_and_bound = |dropout| {
            let config = config(1, dropout, 1, 1);
            let (shape, devices) = (config.network_config(11), Devices::cpu(config.run.threads));
            let mut trainer = Trainer::new(config, &shape, devices).unwrap();
            trainer.network = trainer.network.load_state_dict(&weights).unwrap();
            let evaluated = Ddit::from_weights(&shape, weights.clone(), &inference_device()).unwrap();
            (
                trainer.gradient(&sequences()).loss,
                bound(&evaluated, &trainer.objective, &sequences(), 2, 1, 1),
            )
        };
        let (loss, bound) = loss_and_bound(0.0);
        let (dropped_loss, dropped_bound) = loss_and_bound(0.5);
        assert_ne!(loss, dropped_loss);
        assert_eq!(bound, dropped_bound);
    }
}
