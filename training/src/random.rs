//! Where random numbers come from.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

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
    /// Which token file a sequence comes of.
    Mixture = 5,
}

/// A generator that no other (seed, purpose, index) shares.
pub(crate) fn generator(seed: u64, purpose: Purpose, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&index.to_le_bytes());
    key[16] = purpose as u8;
    ChaCha8Rng::from_seed(key)
}

/// A uniform draw from [0, 1) with 53 bits.
pub(crate) fn unit(generator: &mut ChaCha8Rng) -> f64 {
    (generator.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// A uniform draw from [0, 1) with 24 bits.
pub(crate) fn unit_f32(generator: &mut ChaCha8Rng) -> f32 {
    (generator.next_u32() >> 8) as f32 / (1_u32 << 24) as f32
}
