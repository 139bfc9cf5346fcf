//! Which tokens of a sequence are masked in training (absorbing graphs).
//!
//! The bound of a network that does not see the time is a mean over how many of the `L` tokens are masked,
//! `k` uniform on `1..=L`, and over which: `L / k` times the sum of `-ln p(x0 | x)` over the masked (the
//! any-order form; arXiv 2406.03736, theorem 1). Drawing `k` tokens, rather than each with probability `t`, takes
//! the noise of `k` out of the loss, and no sequence is without a mask.

use denoised::diffusion::{Schedule, Token};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;
use serde::{Deserialize, Serialize};

use crate::loss::times::TimeSampling;

/// How the masked tokens of a sequence are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Masking {
    /// Each with the probability of its time: the forward process.
    #[default]
    Independent,
    /// As many as the time asks for, all sets of that size alike.
    FixedCount,
}

/// How many tokens of a sequence are masked, and what its loss is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaskCount {
    /// From 1 to the sequence's length.
    pub count: usize,
    /// One over `length` times the probability of this count: keeps the mean of the loss.
    pub weight: f64,
}

/// A count for each of `sequences`: that of the time `u ^ power`, rounded up, for `u` as `sampling` draws it.
pub fn mask_counts(
    sequences: usize,
    length: usize,
    sampling: TimeSampling,
    power: f64,
    generator: &mut ChaCha8Rng,
) -> Vec<MaskCount> {
    let whole = length as f64;
    let below = |count: usize| (count as f64 / whole).powf(1.0 / power);
    sampling
        .uniforms(sequences, generator)
        .into_iter()
        .map(|u| {
            let count = ((u.powf(power) * whole).ceil() as usize).clamp(1, length);
            MaskCount {
                count,
                weight: 1.0 / (whole * (below(count) - below(count - 1))),
            }
        })
        .collect()
}

impl MaskCount {
    /// Total noise and rate at which the weight of a masked token, `rate / (e^sigma - 1)`, is `length / count`.
    pub fn level(&self, length: usize, schedule: &Schedule) -> [f64; 2] {
        let masked = self.count as f64 / length as f64;
        // All masked is more noise than any schedule ends with.
        let sigma = (-(-masked).ln_1p()).min(schedule.total_noise(1.0));
        [sigma, sigma.exp_m1() / masked]
    }
}

/// Masks `count` tokens of `sequence`, every set of so many with the same probability.
pub fn mask(sequence: &mut [Token], count: usize, mask: Token, generator: &mut ChaCha8Rng) {
    let mut positions: Vec<usize> = (0..sequence.len()).collect();
    for chosen in 0..count.min(positions.len()) {
        // Lemire's reduction; 64 bits over at most a few thousand positions leave no bias to be seen.
        let left = (positions.len() - chosen) as u128;
        let other = chosen + ((u128::from(generator.next_u64()) * left) >> 64) as usize;
        positions.swap(chosen, other);
        if let Some(token) = sequence.get_mut(positions[chosen]) {
            *token = mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::rand_core::SeedableRng;

    const MASK: Token = 99;

    #[test]
    fn weighted_counts_are_uniform_in_the_mean() {
        let (batches, sequences, length) = (4000, 16, 8);
        for power in [1.0, 2.0, 3.0] {
            let mut random = ChaCha8Rng::seed_from_u64(3);
            let mut sums = vec![0.0; length];
            for _ in 0..batches {
                for drawn in mask_counts(sequences, length, TimeSampling::Independent, power, &mut random) {
                    sums[drawn.count - 1] += drawn.weight;
                }
            }
            for (index, sum) in sums.iter().enumerate() {
                let share = sum / f64::from(batches * sequences as i32);
                let expected = 1.0 / length as f64;
                let rarest = 1.0 - (1.0 - 1.0 / length as f64).powf(1.0 / power);
                // Five standard errors of a count that is drawn with the rarest's probability.
                let error = 5.0 * expected / (rarest * f64::from(batches * sequences as i32)).sqrt();
                assert!(
                    (share - expected).abs() < error,
                    "{power}: {} is {share}",
                    index + 1
                );
            }
        }
    }

    #[test]
    fn every_set_of_so_many_is_masked_alike() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut seen = std::collections::BTreeMap::new();
        let draws = 20_000;
        for _ in 0..draws {
            let mut sequence = [0, 1, 2, 3, 4];
            mask(&mut sequence, 2, MASK, &mut random);
            let masked: Vec<usize> = (0..5).filter(|&index| sequence[index] == MASK).collect();
            assert_eq!(masked.len(), 2);
            assert!((0..5).all(|index| sequence[index] == MASK || sequence[index] == index as Token));
            *seen.entry(masked).or_insert(0) += 1;
        }
        assert_eq!(seen.len(), 10);
        let expected = f64::from(draws) / 10.0;
        let chi_squared: f64 = seen
            .values()
            .map(|&count| (f64::from(count) - expected).powi(2) / expected)
            .sum();
        // 1e-3 of nine degrees of freedom.
        assert!(chi_squared < 27.9, "{chi_squared}");
    }

    #[test]
    fn the_level_gives_the_weight_of_the_any_order_bound() {
        let schedule = Schedule::LogLinear { eps: 1e-3 };
        for count in [1, 3, 128] {
            let drawn = MaskCount { count, weight: 1.0 };
            let [sigma, rate] = drawn.level(128, &schedule);
            let weight = rate / sigma.exp_m1();
            assert!(
                (weight * count as f64 / 128.0 - 1.0).abs() < 1e-12,
                "{count}: {weight}"
            );
        }
    }
}
