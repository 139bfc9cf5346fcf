//! The shape of a network.

use denoised::diffusion::{Parameterization, Token, sigma_offset};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::state_dict::StateDictError;

/// Width of an MLP over the width of the network.
pub const MLP_RATIO: usize = 4;
/// Cosines and sines that describe the total noise.
pub const NOISE_FEATURES: usize = 256;

/// The shape of a network.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Tokens the network tells apart, the mask included (absorbing graphs).
    pub states: usize,
    /// Longest sequence.
    pub length: usize,
    /// Width of the residual stream, a multiple of `2 * heads`.
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
    /// Whether log-scores are offset by `-ln(e^sigma - 1) - ln(states - 1)` (absorbing graphs only).
    pub scale_by_sigma: bool,
    /// What the head's output means: log-scores, or logits of the clean token.
    #[serde(default = "score")]
    pub parameterization: Parameterization,
    /// Whether the network sees the total noise; without, it sees 0 always.
    #[serde(default = "yes")]
    pub time_conditioned: bool,
    /// Whether the head's matrix is the embedding.
    #[serde(default)]
    pub tie_embeddings: bool,
}

fn score() -> Parameterization {
    Parameterization::Score
}

fn yes() -> bool {
    true
}

/// A network's shape that cannot be built.
#[derive(Debug, Error, PartialEq)]
pub enum NetworkError {
    /// A field that must be positive is zero.
    #[error("network.{0} must be at least 1")]
    Zero(&'static str),
    /// A score needs another token to move to.
    #[error("network.states is {0}, at least 2 are needed")]
    States(usize),
    /// Rotary attention halves each head.
    #[error("network.hidden_size {width} is no multiple of 2 * network.heads = {}", 2 * heads)]
    Heads {
        /// Width of the residual stream.
        width: usize,
        /// Attention heads.
        heads: usize,
    },
    /// Not a probability below one.
    #[error("network.dropout is {0}, expected 0 <= dropout < 1")]
    Dropout(f64),
    /// Probabilities know no offset.
    #[error("network.scale_by_sigma is for network.parameterization \"score\"")]
    Offset,
    /// Weights that do not fit.
    #[error(transparent)]
    Weights(#[from] StateDictError),
}

impl NetworkConfig {
    /// Whether a network of this shape can be built.
    pub fn validate(&self) -> Result<(), NetworkError> {
        for (name, value) in [
            ("length", self.length),
            ("hidden_size", self.hidden_size),
            ("cond_dim", self.cond_dim),
            ("blocks", self.blocks),
            ("heads", self.heads),
        ] {
            if value == 0 {
                return Err(NetworkError::Zero(name));
            }
        }
        if self.states < 2 {
            return Err(NetworkError::States(self.states));
        }
        if !self.hidden_size.is_multiple_of(2 * self.heads) {
            return Err(NetworkError::Heads {
                width: self.hidden_size,
                heads: self.heads,
            });
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(NetworkError::Dropout(self.dropout));
        }
        if self.scale_by_sigma && self.parameterization == Parameterization::Mean {
            return Err(NetworkError::Offset);
        }
        Ok(())
    }
}

#[cfg(test)]
impl NetworkConfig {
    /// The smallest shape that tests of other things than shapes need: five states, four positions.
    pub(crate) fn tiny() -> Self {
        Self {
            states: 5,
            length: 4,
            hidden_size: 8,
            cond_dim: 4,
            blocks: 1,
            heads: 2,
            dropout: 0.0,
            scale_by_sigma: true,
            parameterization: Parameterization::Score,
            time_conditioned: true,
            tie_embeddings: false,
        }
    }
}

/// Completes the log-scores of one sequence, `[length, states]` row by row: adds the offset of its
/// total noise (taken in f64, where `e^sigma - 1` near 0 keeps its digits) and zeroes each current
/// token's entry.
pub fn finish_log_scores(config: &NetworkConfig, log_scores: &mut [f32], tokens: &[Token], sigma: f64) {
    let offset = if config.scale_by_sigma {
        sigma_offset(sigma, config.states)
    } else {
        0.0
    };
    for (row, &token) in log_scores.chunks_exact_mut(config.states).zip(tokens) {
        for log_score in row.iter_mut() {
            *log_score = (f64::from(*log_score) + offset) as f32;
        }
        if let Some(current) = row.get_mut(token as usize) {
            *current = 0.0;
        }
    }
}
