//! One TOML file per run: everything that decides what a run computes, and nothing else.
//!
//! Variables `TRAINING__SECTION__KEY` replace the file's values, for containers that share a file:
//! `TRAINING__RUN__DIRECTORY=/checkpoints`.
//!
//! Relative paths in a file start at the folder that it lies in, those of variables at the working directory.

mod changes;
mod checks;
mod error;
mod reading;

use std::path::PathBuf;

use denoised::diffusion::Parameterization;
use denoised::diffusion::{Graph, GraphKind, Schedule};
use serde::{Deserialize, Serialize};

pub use self::error::{ConfigError, Invalid};
use crate::loss::masking::Masking;
use crate::loss::times::TimeSampling;
use crate::model::NetworkConfig;
use crate::model::precision::Precision;

/// A training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// What to learn from.
    pub data: DataSection,
    /// The noise process.
    pub graph: GraphSection,
    /// Total noise over time.
    pub schedule: Schedule,
    /// Shape of the network.
    pub network: NetworkSection,
    /// How weights move.
    pub optimizer: OptimizerSection,
    /// How long, how much at once, where to.
    pub run: RunSection,
}

/// Packed token files and the tokenizer they were made with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Tokens to train on.
    pub train: PathBuf,
    /// Other tokens to train on, of the same tokenizer, and how much of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixture: Vec<MixturePart>,
    /// Held-out tokens.
    pub validation: PathBuf,
    /// The tokenizer, for export.
    pub tokenizer: PathBuf,
}

/// A token file that is mixed in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixturePart {
    /// The file.
    pub tokens: PathBuf,
    /// Share of the sequences that comes of it; what all shares leave comes of `train`.
    pub share: f64,
}

/// The noise process.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphSection {
    /// `absorbing` (tokens turn into a mask) or `uniform` (tokens turn into any other).
    pub kind: GraphKind,
}

/// Shape of the network; the number of states follows from vocabulary and graph.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSection {
    /// Tokens per sequence.
    pub length: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the noise condition.
    pub cond_dim: usize,
    /// Transformer blocks.
    pub blocks: usize,
    /// Attention heads per block.
    pub heads: usize,
    /// Chance to drop an entry of a branch while training.
    #[serde(default)]
    pub dropout: f64,
    /// Offset log-scores by the noise level (absorbing graphs only).
    #[serde(default)]
    pub scale_by_sigma: bool,
    /// `score` (SEDD): the network gives log-scores and learns by score entropy. `mean` (MDLM, RADD;
    /// absorbing graphs only): it gives probabilities of the clean token and learns by cross-entropy.
    #[serde(default = "default_parameterization")]
    pub parameterization: Parameterization,
    /// Whether the network sees the noise level. `mean` networks do as well without.
    #[serde(default = "default_time_conditioned")]
    pub time_conditioned: bool,
    /// Use the embedding as the head's matrix, too: fewer weights for small networks.
    #[serde(default)]
    pub tie_embeddings: bool,
    /// What the gates of attention and MLP start at. 0, as in the reference, makes every block start as
    /// the identity; 1 lets short runs of small networks learn from the first step on.
    #[serde(default)]
    pub initial_gate: f32,
}

/// AdamW and what surrounds it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// Peak learning rate.
    pub lr: f64,
    /// Decay of the first and second moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[serde(default = "default_epsilon")]
    pub epsilon: f64,
    /// Decoupled weight decay.
    #[serde(default)]
    pub weight_decay: f64,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup_steps: u64,
    /// What follows the warm-up.
    #[serde(default)]
    pub decay: Decay,
    /// Least learning rate after the warm-up, at most `lr`: where `decay` ends.
    #[serde(default)]
    pub min_lr: f64,
    /// Largest Euclidean norm of all gradients together.
    pub gradient_clip_norm: f64,
    /// Largest decay of the moving average of weights.
    pub ema_decay: f64,
    /// How the times of a step's sequences go together: `stratified` or `independent`.
    #[serde(default)]
    pub time_sampling: TimeSampling,
    /// Times are drawn as a uniform to this power, and weighted so that the loss has the same mean. 1 is
    /// the reference; more looks more often at little noise, where each masked position weighs most.
    #[serde(default = "default_time_power")]
    pub time_power: f64,
    /// Which tokens of a sequence are masked at its time: each `independent`ly, or a `fixed_count` of them.
    #[serde(default)]
    pub masking: Masking,
    /// Leave norms, biases and embeddings out of the weight decay.
    #[serde(default)]
    pub decay_matrices_only: bool,
    /// Muon for the matrices inside blocks, AdamW for the rest; without, AdamW for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonSection>,
}

/// How Muon moves the matrices inside blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MuonSection {
    /// Peak learning rate; warm-up and decay are AdamW's.
    pub lr: f64,
    /// Decay of the sum of gradients.
    #[serde(default = "default_momentum")]
    pub momentum: f64,
}

/// The learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// Stays at its peak.
    #[default]
    Constant,
    /// Falls to 0 along half a cosine by the end of the run.
    Cosine,
    /// Stays at its peak for four fifths of the run, then falls to 0 on a line: how long the run is need not be
    /// known before (arXiv 2405.18392).
    LinearEnd,
}

/// Size and place of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// Decides initial weights, data order and noise.
    pub seed: u64,
    /// Sequences per step.
    pub batch_size: usize,
    /// Parts that a step's sequences are learned from one after another, with their gradients summed:
    /// the same step in less memory.
    #[serde(default = "default_accumulate")]
    pub accumulate: usize,
    /// Optimizer steps.
    pub steps: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Minutes after which there is a checkpoint, whatever the steps; without, steps alone decide.
    #[serde(default)]
    pub checkpoint_minutes: Option<f64>,
    /// How many of the latest checkpoints stay; the one with the best bound stays as well.
    #[serde(default = "default_keep")]
    pub keep: usize,
    /// Steps between estimates of the validation bound.
    pub validate_every: u64,
    /// Held-out sequences that it is estimated on, from all over the file; `training evaluate` takes all.
    #[serde(default = "default_validation_sequences")]
    pub validation_sequences: usize,
    /// Steps between samples of the averaged network; without, there are none.
    #[serde(default)]
    pub sample_every: Option<u64>,
    /// Steps between lines of `metrics.jsonl`.
    #[serde(default = "default_log_every")]
    pub log_every: u64,
    /// A run whose smoothed loss (over about 50 steps) stays above this multiple of its best...
    #[serde(default = "default_explosion_factor")]
    pub explosion_factor: f64,
    /// ... for this many steps on end has exploded, and stops.
    #[serde(default = "default_explosion_steps")]
    pub explosion_steps: u64,
    /// Threads that share a batch; part of the arithmetic, since it fixes the order of sums.
    #[serde(default = "default_threads")]
    pub threads: usize,
    /// In which numbers matrices are multiplied: `f32`, or `bf16`, which GPUs are faster at.
    #[serde(default)]
    pub precision: Precision,
    /// Where checkpoints, metrics, curves and samples go.
    pub directory: PathBuf,
    /// Where copies of checkpoints and metrics go, for machines that may be gone tomorrow: a folder, or
    /// a URL such as `s3://bucket/run`. `--resume` fetches what the directory lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
}

fn default_epsilon() -> f64 {
    1e-8
}

fn default_momentum() -> f64 {
    0.95
}

fn default_time_power() -> f64 {
    1.0
}

fn default_parameterization() -> Parameterization {
    Parameterization::Score
}

fn default_time_conditioned() -> bool {
    true
}

fn default_threads() -> usize {
    1
}

fn default_accumulate() -> usize {
    1
}

fn default_keep() -> usize {
    2
}

fn default_validation_sequences() -> usize {
    128
}

fn default_log_every() -> u64 {
    10
}

fn default_explosion_factor() -> f64 {
    3.0
}

fn default_explosion_steps() -> u64 {
    100
}

impl RunConfig {
    /// The network's shape for a tokenizer of `vocab_size` tokens.
    pub fn network_config(&self, vocab_size: usize) -> NetworkConfig {
        let mask = usize::from(self.graph.kind == GraphKind::Absorbing);
        let NetworkSection {
            length,
            hidden_size,
            cond_dim,
            blocks,
            heads,
            dropout,
            scale_by_sigma,
            parameterization,
            time_conditioned,
            tie_embeddings,
            initial_gate: _,
        } = self.network;
        let states = vocab_size + mask;
        NetworkConfig {
            states,
            length,
            hidden_size,
            cond_dim,
            blocks,
            heads,
            dropout,
            scale_by_sigma,
            parameterization,
            time_conditioned,
            tie_embeddings,
        }
    }

    /// The noise process over the states of `network`.
    pub fn graph(&self, network: &NetworkConfig) -> Graph {
        Graph::new(self.graph.kind, network.states)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
