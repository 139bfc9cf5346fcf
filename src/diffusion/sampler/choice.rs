//! Which token a choice takes, given the weight of each.
//!
//! Nothing is sorted but the few around the last place: how much weight the tokens above some rank hold is a sum that
//! processors do many entries at a time, and some ten of these find the rank at which top-p ends.

use std::cmp::Ordering;
use std::ops::Range;

use super::blocks::{BLOCK, vectorised};

/// Highest temperature: far beyond, every token is equally likely.
pub const MAX_TEMPERATURE: f64 = 100.0;

/// How the new token is chosen, once a token leaves.
///
/// These shape the choice alone, never the decision to leave: the noise process stays what it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenChoice {
    /// Weights are raised to `1 / temperature`; 0 takes the likeliest token. 0 to [`MAX_TEMPERATURE`].
    pub temperature: f64,
    /// Keep only this many likeliest tokens. At least 1.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens until they hold this share of the weight. In `(0, 1]`.
    pub top_p: Option<f64>,
}

impl Default for TokenChoice {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
        }
    }
}

/// Applies top-k, temperature and top-p, in that order, and chooses by inverse CDF at `u` in `[0, 1)`; `None` when no
/// token has any weight.
pub(super) fn choose(choice: &TokenChoice, weights: &mut [f64], u: f64) -> Option<usize> {
    if let Some(k) = choice.top_k.map(|k| k as usize).filter(|k| *k < weights.len()) {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.select_nth_unstable_by(k, likelier(weights));
        let rest = order.split_off(k);
        rest.into_iter().for_each(|y| weights[y] = 0.0);
    }
    let Some(p) = choice.top_p.filter(|p| *p < 1.0) else {
        temper(choice.temperature, weights);
        return inverse(&Kept::all(weights), weights, weights, u);
    };
    // Who is likelier is decided before tempering, which can round two weights to one.
    let untempered = (choice.temperature != 1.0).then(|| weights.to_vec());
    temper(choice.temperature, weights);
    let ranks = untempered.as_deref().unwrap_or(weights);
    inverse(&Kept::top_p(p, ranks, weights)?, ranks, weights, u)
}

fn temper(temperature: f64, weights: &mut [f64]) {
    if temperature == 1.0 {
        return;
    }
    // Relative to the largest weight, so that a low temperature cannot underflow every entry.
    let top = largest(weights);
    for w in weights.iter_mut().filter(|w| **w > 0.0) {
        *w = ((*w / top).ln() / temperature).exp();
    }
}

/// Share of the largest weight that is the first guess of where top-p ends: the likeliest hold nearly all of the
/// weight, as a rule.
const GUESS: f64 = 1.0 / 64.0;
/// Tokens that are sorted rather than told apart by one more sum.
const FEW: f64 = 64.0;

/// The tokens that are chosen from: the first ones in the order of their ranks, as [`likelier`] has it.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// Rank of the last of them.
    rank: f64,
    /// The last of them.
    last: usize,
    /// What they weigh.
    weight: f64,
}

impl Kept {
    fn all(weights: &[f64]) -> Self {
        Self {
            rank: 0.0,
            last: weights.len(),
            weight: sum(weights, weights, 0.0),
        }
    }

    /// The first in the order of `ranks` that hold `p` of the weight; `None` when there is none.
    fn top_p(p: f64, ranks: &[f64], weights: &[f64]) -> Option<Self> {
        let all = sum(ranks, weights, 0.0);
        let target = p * all;
        // What has a rank of `above` holds less than the target, what has one of `from` holds it.
        let (mut above, mut held_above) = (f64::INFINITY, 0.0);
        let (mut from, mut held) = (0.0_f64, all);
        let mut guess = GUESS * largest(ranks);
        // Whoever lies between them has a rank of `from` at least, which bounds how many they are.
        while held - held_above > FEW * from {
            let holds = sum(ranks, weights, guess);
            if holds >= target {
                (from, held) = (guess, holds);
            } else {
                (above, held_above) = (guess, holds);
            }
            // Positive floats are ordered as their bits are.
            let half = (above.to_bits() - from.to_bits()) / 2;
            if half == 0 {
                break;
            }
            guess = if from == 0.0 && guess > f64::MIN_POSITIVE / GUESS {
                guess * GUESS
            } else {
                f64::from_bits(from.to_bits() + half)
            };
        }
        let mut order = within(&(from..above), ranks);
        order.retain(|&y| weights[y] > 0.0);
        order.sort_unstable_by(likelier(ranks));
        let mut weight = held_above;
        let reached = order.iter().find(|&&y| {
            weight += weights[y];
            weight >= target
        });
        // Rounding: they do not quite hold what they do when summed in another order.
        let last = *reached.or(order.last())?;
        Some(Self {
            rank: ranks[last],
            last,
            weight,
        })
    }

    fn has(&self, token: usize, rank: f64) -> bool {
        rank > self.rank || (rank == self.rank && token <= self.last)
    }

    /// What those of a block weigh whose first token is `first`.
    fn weight_in(&self, first: usize, ranks: &[f64], weights: &[f64]) -> f64 {
        if self.last < first {
            return sum(ranks, weights, self.rank.next_up());
        }
        if self.last >= first + ranks.len() {
            return sum(ranks, weights, self.rank);
        }
        let both = ranks.iter().zip(weights).zip(first..);
        let kept = both.filter(|((rank, _), token)| self.has(*token, **rank));
        kept.map(|((_, weight), _)| weight).sum()
    }
}

/// Inverse CDF of the unnormalised `weights` of the tokens that are kept, at `u` in `[0, 1)`: looks into one block of
/// them.
fn inverse(kept: &Kept, ranks: &[f64], weights: &[f64], u: f64) -> Option<usize> {
    let target = u * kept.weight;
    let blocks = ranks.chunks(BLOCK).zip(weights.chunks(BLOCK));
    let (mut below, mut chosen) = (0.0, None);
    for ((ranks, weights), first) in blocks.zip((0..).step_by(BLOCK)) {
        let weight = kept.weight_in(first, ranks, weights);
        if weight > 0.0 {
            chosen = Some((first, target - below));
            below += weight;
            if target < below {
                break;
            }
        }
    }
    let (first, target) = chosen?;
    let (mut below, mut last) = (0.0, None);
    let block = first..weights.len().min(first + BLOCK);
    for y in block.filter(|&y| weights[y] > 0.0 && kept.has(y, ranks[y])) {
        below += weights[y];
        last = Some(y);
        if target < below {
            break;
        }
    }
    last
}

/// Orders tokens by weight, the largest first. Ties go to the lower id, so that the result is a function of the
/// row alone.
pub(super) fn likelier(weights: &[f64]) -> impl Fn(&usize, &usize) -> Ordering + '_ {
    |a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b))
}

/// Numbers that run side by side.
const LANES: usize = 8;

/// The sum of the weights whose rank is `from` or more.
fn sum(ranks: &[f64], weights: &[f64], from: f64) -> f64 {
    let counted = |rank, weight| if rank >= from { weight } else { 0.0 };
    vectorised(
        #[inline(always)]
        || {
            let (ranks, last_ranks) = ranks.as_chunks::<LANES>();
            let (weights, last_weights) = weights.as_chunks::<LANES>();
            let mut lanes = [0.0; LANES];
            for (ranks, weights) in ranks.iter().zip(weights) {
                for ((lane, &rank), &weight) in lanes.iter_mut().zip(ranks).zip(weights) {
                    *lane += counted(rank, weight);
                }
            }
            let last = last_ranks.iter().zip(last_weights);
            last.fold(lanes.iter().sum(), |sum, (&rank, &weight)| {
                sum + counted(rank, weight)
            })
        },
    )
}

/// Indices of the values within a range that holds few of them, ascending.
fn within(range: &Range<f64>, values: &[f64]) -> Vec<usize> {
    let mut indices = Vec::new();
    vectorised(
        #[inline(always)]
        || {
            for (values, first) in values.chunks(LANES).zip((0..).step_by(LANES)) {
                // One look at all of them, without a branch for each.
                let count: u64 = values.iter().map(|value| u64::from(range.contains(value))).sum();
                if count > 0 {
                    let each = values.iter().zip(first..);
                    let inside = each.filter(|(value, _)| range.contains(*value));
                    indices.extend(inside.map(|(_, index)| index));
                }
            }
        },
    );
    indices
}

/// The largest of `values`, at least 0.
fn largest(values: &[f64]) -> f64 {
    let larger = |a: f64, b: f64| if b > a { b } else { a };
    vectorised(
        #[inline(always)]
        || {
            let (chunks, last) = values.as_chunks::<LANES>();
            let mut lanes = [0.0; LANES];
            for chunk in chunks {
                for (lane, &value) in lanes.iter_mut().zip(chunk) {
                    *lane = larger(*lane, value);
                }
            }
            lanes.iter().chain(last).copied().fold(0.0, larger)
        },
    )
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::diffusion::Draws;

    /// Against sorting all: the same entries, to the last bit, also among ties.
    #[test]
    fn top_p_keeps_what_sorting_all_keeps() {
        let mut random = Draws::new(9, 0);
        for (step, states) in [3, 64, 65, 700, 5000].into_iter().enumerate() {
            for p in [0.1, 0.5, 0.9, 0.999] {
                for temperature in [1.0, 0.7, 3.0] {
                    let weights: Vec<f64> = (0..states)
                        // Coarse, so that there are ties.
                        .map(|y| (random.at(step as u32, y).token * 40.0).floor() / 8.0)
                        .map(f64::exp)
                        .collect();
                    let mut order: Vec<usize> = (0..states).collect();
                    order.sort_by(likelier(&weights));
                    let mut expected = weights.clone();
                    temper(temperature, &mut expected);
                    let (target, mut below) = (p * expected.iter().sum::<f64>(), 0.0);
                    let mut kept = Vec::new();
                    for y in order {
                        if below < target {
                            kept.push(y);
                        }
                        below += expected[y];
                    }
                    kept.sort_unstable();
                    let shaped = Kept::top_p(p, &weights, &expected).unwrap();
                    let ours: Vec<usize> = (0..states).filter(|&y| shaped.has(y, weights[y])).collect();
                    assert_eq!(ours, kept, "{states} states, p {p}, temperature {temperature}");
                }
            }
        }
    }
}
