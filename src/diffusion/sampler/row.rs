//! One token's draw from a row of log-scores.
//!
//! A row is read for its maximum and its sum, which decide whether the token leaves; only rows that leave are
//! looked into again, a block of 256 entries of them (`blocks.rs`). Exponentials are f32, sums and
//! decisions f64: the law is within a total variation of 1e-6 of the same in f64, which a test computes.

use super::blocks::{Row, Weight};
use std::cmp::Ordering;

use super::evaluation::Uncertainty;
use super::{Law, RowLaw};
use crate::diffusion::Token;
use crate::diffusion::draw::Uniforms;

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

/// Why no token can be drawn from a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// The network gave a log-score that is NaN or plus infinity, or nothing but zero scores to choose from.
    #[error("the network's log-scores hold NaN or +infinity, or leave no token to choose")]
    Scores,
    /// A position must leave, and none of the tokens that are allowed there has any weight.
    #[error("none of the tokens that are allowed at a position can stand there, says the network")]
    NothingAllowed,
}

/// Buffers of [`draw`], reused from row to row.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// One sum a block.
    sums: Vec<f64>,
    /// One weight a token, where the choice needs them all.
    weights: Vec<f64>,
    /// Of the row drawn last: its maximum, and the sum of `e^(l - maximum)`.
    read: Option<(f32, f64)>,
}

/// Draws what becomes of token `x`: the new token, or `None` when it stays.
///
/// `log_score` is the network's row over target tokens (length V; the entry at `x` is not read),
/// `offset` is added to every entry in f64.
///
/// # Errors
/// [`RowError`] when no law can be made of the row.
pub fn draw(
    law: &RowLaw,
    choice: &TokenChoice,
    x: Token,
    log_score: &[f32],
    offset: f64,
    u: Uniforms,
    scratch: &mut Scratch,
) -> Result<Option<Token>, RowError> {
    draw_among(
        law,
        Choice {
            choice,
            allowed: None,
        },
        x,
        log_score,
        offset,
        u,
        scratch,
    )
}

/// A choice, among all tokens or some.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// How the token is chosen.
    pub choice: &'a TokenChoice,
    /// The tokens that may be chosen, ascending; all of them where this is `None`.
    pub allowed: Option<&'a [Token]>,
}

/// The same with a choice among some tokens: leaving is decided by the whole row.
fn draw_among(
    law: &RowLaw,
    Choice { choice, allowed }: Choice<'_>,
    x: Token,
    log_score: &[f32],
    offset: f64,
    u: Uniforms,
    scratch: &mut Scratch,
) -> Result<Option<Token>, RowError> {
    let row = Row::new(log_score, x as usize);
    let Moves {
        weight,
        moving,
        staying,
        read,
    } = moves(law, &row, offset, &mut scratch.sums)?;
    scratch.read = Some(read);
    if u.leave * (moving + staying) >= moving {
        return Ok(None);
    }
    let Some(allowed) = allowed else {
        return pick(&row, weight, choice, u.token, scratch).map(Some);
    };
    let tokens: Vec<Token> = allowed.iter().copied().filter(|&token| token != x).collect();
    let of = |&token: &Token| f64::from(log_score[token as usize]);
    let top = tokens.iter().map(of).fold(f64::NEG_INFINITY, f64::max);
    let mut weights: Vec<f64> = tokens
        .iter()
        .map(|token| match weight.lost() {
            // Relative to the likeliest of them, which can be far below the row's.
            None => (of(token) - top).exp(),
            Some(lost) => ((of(token) - f64::from(row.maximum())).exp() - lost).max(0.0),
        })
        .collect();
    match pick_some(choice, &mut weights, u.token) {
        Some(index) => Ok(Some(tokens[index])),
        // It has to leave, and must not stay.
        None if law.stay == 0.0 && law.stay_slope == 0.0 => Err(RowError::NothingAllowed),
        None => Ok(None),
    }
}

/// Chooses among few tokens by their weights; `None` when none has any.
fn pick_some(choice: &TokenChoice, weights: &mut [f64], u: f64) -> Option<usize> {
    // What is not a number comes of rows that have no finite entry here.
    weights
        .iter_mut()
        .filter(|w| !w.is_finite())
        .for_each(|w| *w = 0.0);
    if choice.temperature == 0.0 {
        let order = likelier(weights);
        return (0..weights.len())
            .min_by(|a, b| order(a, b))
            .filter(|&best| weights[best] > 0.0);
    }
    if weights.iter().all(|weight| *weight == 0.0) {
        return None;
    }
    choose(choice, weights, u)
}

/// Draws what becomes of token `x` under any law: [`draw`] for affine ones. `kept` is the row of the step's
/// first evaluation with its offset, for laws that need it.
///
/// # Errors
/// [`RowError`] when no law can be made of the rows.
#[expect(
    clippy::too_many_arguments,
    reason = "the same as of `draw`, and one row more"
)]
pub fn draw_by(
    law: &Law,
    among: Choice<'_>,
    x: Token,
    log_score: &[f32],
    offset: f64,
    kept: Option<(&[f32], f64)>,
    u: Uniforms,
    scratch: &mut Scratch,
) -> Result<Option<Token>, RowError> {
    match law {
        Law::Affine(law) => draw_among(law, among, x, log_score, offset, u, scratch),
        Law::Given => Ok(None),
        Law::Jump { gain, kept: less } => {
            let bad = |row: &[f32]| Row::new(row, x as usize).maximum().is_infinite();
            if bad(log_score) || kept.is_some_and(|(row, _)| bad(row)) {
                return Err(RowError::Scores);
            }
            scratch.read = None;
            let weights = &mut scratch.weights;
            weights.clear();
            // exp(600) is far beyond where leaving is certain; the cap keeps what follows finite.
            let score = |log_score: f32, offset: f64| (f64::from(log_score) + offset).min(600.0).exp();
            weights.extend(log_score.iter().map(|&l| gain * score(l, offset)));
            if *less != 0.0 {
                let (kept, offset) = kept.ok_or(RowError::Scores)?;
                for (weight, &l) in weights.iter_mut().zip(kept) {
                    *weight -= less * score(l, offset);
                }
            }
            weights[x as usize] = 0.0;
            // Not `max`, which would hide NaN.
            weights.iter_mut().filter(|w| **w < 0.0).for_each(|w| *w = 0.0);
            let rate: f64 = weights.iter().sum();
            if !rate.is_finite() {
                return Err(RowError::Scores);
            }
            if u.leave >= -(-rate).exp_m1() {
                return Ok(None);
            }
            let Choice { choice, allowed } = among;
            if let Some(allowed) = allowed {
                let mut some: Vec<f64> = allowed.iter().map(|&y| weights[y as usize]).collect();
                let index = pick_some(choice, &mut some, u.token);
                return Ok(index.map(|index| allowed[index]));
            }
            if choice.temperature == 0.0 {
                let likeliest = |best: Option<usize>, y: usize| match best {
                    Some(best) if weights[best] >= weights[y] => Some(best),
                    _ => Some(y),
                };
                let best = (0..weights.len()).fold(None, likeliest);
                return best.map(|y| Some(y as Token)).ok_or(RowError::Scores);
            }
            choose(choice, weights, u.token)
                .map(|y| Some(y as Token))
                .ok_or(RowError::Scores)
        }
    }
}

/// Reads a row over target tokens of which nothing is drawn, for what is asked about it then.
///
/// # Errors
/// [`RowError`] when no law can be made of the row.
pub fn read(x: Token, log_score: &[f32], scratch: &mut Scratch) -> Result<(), RowError> {
    let row = Row::new(log_score, x as usize);
    let top = row.maximum();
    row.sums(&Weight::new(top), &mut scratch.sums);
    let sum: f64 = scratch.sums.iter().sum();
    if top.is_infinite() || sum.is_nan() {
        return Err(RowError::Scores);
    }
    scratch.read = Some((top, sum));
    Ok(())
}

/// The sum of the scores of the row that was [`read`] or drawn from last; `None` where there is none.
pub fn score_sum(offset: f64, scratch: &Scratch) -> Option<f64> {
    let (top, sum) = scratch.read?;
    Some((f64::from(top) + offset).exp() * sum)
}

/// How unsure a row over target tokens is of `token` in place of `x`, in nats; the row must be the one that was
/// [drawn](draw) from last, whose sums it goes on from.
///
/// Before temperature, top-k and top-p; scores are taken as normalised.
///
/// # Errors
/// [`RowError`] when no law can be made of the row, or none was drawn from.
pub fn uncertainty(
    of: Uncertainty,
    x: Token,
    token: Token,
    log_score: &[f32],
    scratch: &mut Scratch,
) -> Result<f64, RowError> {
    if of == Uncertainty::None {
        return Ok(0.0);
    }
    let (top, sum) = scratch.read.ok_or(RowError::Scores)?;
    let mean = if of == Uncertainty::NegLogProb {
        f64::from(log_score[token as usize] - top)
    } else {
        Row::new(log_score, x as usize).mean_exponent(top, &mut scratch.sums) / sum
    };
    let uncertainty = sum.ln() - mean;
    if uncertainty.is_nan() {
        Err(RowError::Scores)
    } else {
        Ok(uncertainty.max(0.0))
    }
}

/// The log-probability that a row over target tokens gives `token` in place of `x`, in nats; the row must be the one
/// that was [drawn](draw_by) from last.
///
/// Before temperature, top-k, top-p and sets of allowed tokens; scores are taken as normalised.
pub fn log_probability(x: Token, token: Token, log_score: &[f32], scratch: &mut Scratch) -> f64 {
    let (top, sum) = scratch.read.unwrap_or_else(|| {
        let row = Row::new(log_score, x as usize);
        let top = row.maximum();
        row.sums(&Weight::new(top), &mut scratch.sums);
        (top, scratch.sums.iter().sum())
    });
    (f64::from(log_score[token as usize] - top) - sum.ln()).min(0.0)
}

/// Weights of leaving, by token.
#[derive(Clone, Copy, Debug)]
struct Moves {
    /// Weight of moving to each token, over a constant; its sums by block are in the scratch.
    weight: Weight,
    /// Weight of moving at all.
    moving: f64,
    /// Weight of staying.
    staying: f64,
    /// The row's maximum, and the sum of `e^(l - maximum)`.
    read: (f32, f64),
}

/// Weighs moving against staying.
fn moves(law: &RowLaw, row: &Row<'_>, offset: f64, sums: &mut Vec<f64>) -> Result<Moves, RowError> {
    // Scores are kept relative to their maximum, so that no sum overflows.
    let top = row.maximum();
    if top.is_infinite() {
        return Err(RowError::Scores);
    }
    let mut weight = Weight::new(top);
    row.sums(&weight, sums);
    let relative: f64 = sums.iter().sum();
    // exp(600) is far beyond where leaving is certain; the cap keeps what follows finite.
    let scale = (f64::from(top) + offset).min(600.0).exp();
    let total = relative * scale;
    let mut moving = relative;
    if law.spread > 0.0 && law.gain > 0.0 {
        weight = weight.less(law.spread * (1.0 + total) / (law.gain * scale));
        row.sums(&weight, sums);
        moving = sums.iter().sum();
    }
    moving *= law.gain * scale;
    let staying = law.stay_weight(total).max(0.0);
    let whole = moving + staying;
    if whole.is_nan() || whole <= 0.0 {
        return Err(RowError::Scores);
    }
    Ok(Moves {
        weight,
        moving,
        staying,
        read: (top, relative),
    })
}

/// Chooses where to move, by inverse CDF at `u` in `[0, 1)`.
fn pick(
    row: &Row<'_>,
    mut weight: Weight,
    choice: &TokenChoice,
    u: f64,
    scratch: &mut Scratch,
) -> Result<Token, RowError> {
    let Scratch { sums, weights, .. } = scratch;
    let found = if choice.temperature == 0.0 {
        row.likeliest()
    } else if choice.top_k.is_some() || choice.top_p.is_some() {
        let mut choice = *choice;
        if !weight.loses() {
            weight = weight.tempered(choice.temperature);
            choice.temperature = 1.0;
        }
        row.weights(&weight, weights);
        choose(&choice, weights, u)
    } else if choice.temperature == 1.0 {
        pick_by_blocks(row, &weight, sums, u)
    } else if !weight.loses() {
        weight = weight.tempered(choice.temperature);
        row.sums(&weight, sums);
        pick_by_blocks(row, &weight, sums, u)
    } else {
        row.weights(&weight, weights);
        choose(choice, weights, u)
    };
    found.map(|y| y as Token).ok_or(RowError::Scores)
}

/// Inverse CDF of a row whose block sums are known: looks into one block.
fn pick_by_blocks(row: &Row<'_>, weight: &Weight, sums: &[f64], u: f64) -> Option<usize> {
    let target = u * sums.iter().sum::<f64>();
    let (mut below, mut last) = (0.0, None);
    for (block, &sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        last = Some((block, target - below));
        below += sum;
        if target < below {
            break;
        }
    }
    let (block, target) = last?;
    row.find(block, weight, target)
}

/// Inverse CDF of the unnormalised `weights` of the tokens `among`, at `u` in `[0, 1)`.
fn inverse(among: impl Iterator<Item = usize> + Clone, weights: &[f64], u: f64) -> Option<usize> {
    let target = u * among.clone().map(|y| weights[y]).sum::<f64>();
    let (mut below, mut last) = (0.0, None);
    for y in among.filter(|&y| weights[y] > 0.0) {
        below += weights[y];
        last = Some(y);
        if target < below {
            break;
        }
    }
    last
}

/// Applies top-k, temperature and top-p, in that order, and chooses by inverse CDF at `u` in `[0, 1)`.
fn choose(choice: &TokenChoice, weights: &mut [f64], u: f64) -> Option<usize> {
    if let Some(k) = choice.top_k.map(|k| k as usize).filter(|k| *k < weights.len()) {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.select_nth_unstable_by(k, likelier(weights));
        let rest = order.split_off(k);
        rest.into_iter().for_each(|y| weights[y] = 0.0);
    }
    let Some(p) = choice.top_p.filter(|p| *p < 1.0) else {
        temper(choice.temperature, weights);
        return inverse(0..weights.len(), weights, u);
    };
    // Who is likelier is decided before tempering, which can round two weights to one.
    let untempered = (choice.temperature != 1.0).then(|| weights.to_vec());
    temper(choice.temperature, weights);
    let ranks = untempered.as_deref().unwrap_or(weights);
    let kept = top_p(p, ranks, weights);
    inverse(kept.into_iter(), weights, u)
}

/// Share of the largest weight above which tokens are looked at first, to find those that top-p keeps.
const CUT: f64 = 1.0 / 64.0;

/// The tokens that top-p keeps, ascending: the first in the order of `ranks` that hold `p` of the weight.
fn top_p(p: f64, ranks: &[f64], weights: &[f64]) -> Vec<usize> {
    let target = p * reduced(weights, 0.0, |sum, weight| sum + weight);
    let largest = reduced(
        ranks,
        0.0,
        |largest, rank| if rank > largest { rank } else { largest },
    );
    let (mut kept, mut cut) = (Vec::new(), largest);
    // The likeliest hold nearly all of the weight, as a rule.
    loop {
        let is_first = cut == largest;
        cut *= CUT;
        let is_above = |y: usize| ranks[y] >= cut && weights[y] > 0.0;
        if is_first {
            // Few, so that a branch is guessed right.
            kept.extend((0..weights.len()).filter(|&y| is_above(y)));
        } else {
            select(&mut kept, weights.len(), is_above);
        }
        let held: f64 = kept.iter().map(|&y| weights[y]).sum();
        if held >= target || cut < f64::MIN_POSITIVE {
            break;
        }
    }
    if let Some(last) = last_of_top_p(target, &kept, ranks, weights) {
        // As `likelier` has it.
        let of_last = ranks[last];
        let is_kept = |y: usize| ranks[y] > of_last || (ranks[y] == of_last && y <= last);
        let mut count = 0;
        for index in 0..kept.len() {
            let y = kept[index];
            kept[count] = y;
            count += usize::from(is_kept(y));
        }
        kept.truncate(count);
    }
    kept
}

/// Fills `chosen` with the numbers below `end` that are wanted, ascending: without a branch for each, which would be
/// guessed wrong as often as not.
fn select(chosen: &mut Vec<usize>, end: usize, is_wanted: impl Fn(usize) -> bool) {
    chosen.resize(end + 1, 0);
    let mut count = 0;
    for y in 0..end {
        chosen[count] = y;
        count += usize::from(is_wanted(y));
    }
    chosen.truncate(count);
}

/// Bits of a weight that do not say which bucket it is in: all but its exponent and 3 of its mantissa.
const BUCKET_SHIFT: u32 = f64::MANTISSA_DIGITS - 1 - 3;
/// Down to 2^-32 of the largest weight; the last one has all that is less.
const BUCKETS: usize = 257;
/// Sums of the same bucket, which need not wait for each other.
const SUMS: usize = 4;

/// The last of the tokens `among` that top-p keeps, in the order of `ranks`: the first at which they hold `target`.
///
/// Weights are summed by buckets of almost the same rank, so that one bucket is sorted and not the vocabulary: rows
/// early in a generation have thousands of tokens of some weight.
fn last_of_top_p(target: f64, among: &[usize], ranks: &[f64], weights: &[f64]) -> Option<usize> {
    // Positive floats are ordered as their bits are.
    let key = |y: usize| ranks[y].to_bits() >> BUCKET_SHIFT;
    let top = among.iter().map(|&y| key(y)).max()?;
    let bucket = |y: usize| ((top - key(y)) as usize).min(BUCKETS - 1);
    let mut sums = [[0.0; SUMS]; BUCKETS];
    for some in among.chunks(SUMS) {
        for (index, &y) in some.iter().enumerate() {
            sums[bucket(y)][index] += weights[y];
        }
    }
    let mut below = 0.0;
    let crossed = sums.iter().position(|sums| {
        let sum: f64 = sums.iter().sum();
        let reached = below + sum >= target;
        if !reached {
            below += sum;
        }
        reached
    })?;
    let mut order: Vec<usize> = among.iter().copied().filter(|&y| bucket(y) == crossed).collect();
    order.sort_unstable_by(likelier(ranks));
    let reached = order.iter().find(|&&y| {
        below += weights[y];
        below >= target
    });
    // Rounding: a bucket is not quite what it sums to in another order.
    reached.or(order.last()).copied()
}

/// Reduces `values` in eight lanes, which processors do at once.
fn reduced(values: &[f64], start: f64, step: impl Fn(f64, f64) -> f64) -> f64 {
    let mut lanes = [start; 8];
    let chunks = values.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, value);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(start, |all, &value| step(all, value))
}

/// Orders tokens by weight, the largest first. Ties go to the lower id, so that the result is a function of the
/// row alone.
fn likelier(weights: &[f64]) -> impl Fn(&usize, &usize) -> Ordering + '_ {
    |a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b))
}

fn temper(temperature: f64, weights: &mut [f64]) {
    if temperature == 1.0 {
        return;
    }
    // Relative to the largest weight, so that a low temperature cannot underflow every entry.
    let top = weights.iter().copied().fold(0.0, f64::max);
    for w in weights.iter_mut().filter(|w| **w > 0.0) {
        *w = ((*w / top).ln() / temperature).exp();
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::{Discretization, Euler, LEAVE, Tweedie};
    use super::*;
    use crate::diffusion::{Draws, Graph, GraphKind, Schedule};
    use proptest::prelude::*;

    fn drawn(choice: TokenChoice, row: &[f32], u: f64) -> Token {
        draw(
            &LEAVE,
            &choice,
            row.len() as Token - 1,
            row,
            0.0,
            Uniforms { leave: 0.5, token: u },
            &mut Scratch::default(),
        )
        .unwrap()
        .unwrap()
    }

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        let choice = TokenChoice {
            temperature: 0.0,
            ..TokenChoice::default()
        };
        for u in [0.0, 0.5, 0.999_999] {
            assert_eq!(drawn(choice, &[0.1, 2.0, 1.9, 9.0], u), 1);
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let row = [3.0f32, 2.0, 1.0, 0.0, 0.0];
        let k = TokenChoice {
            top_k: Some(2),
            ..TokenChoice::default()
        };
        let p = TokenChoice {
            top_p: Some(0.5),
            ..TokenChoice::default()
        };
        assert_eq!(drawn(k, &row, 0.999_999), 1);
        assert_eq!(drawn(p, &row, 0.999_999), 0);
    }

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
                    let shaped = top_p(p, &weights, &expected);
                    assert_eq!(shaped, kept, "{states} states, p {p}, temperature {temperature}");
                }
            }
        }
    }

    #[test]
    fn bad_rows_are_errors() {
        let u = Uniforms {
            leave: 0.5,
            token: 0.5,
        };
        for row in [
            [f32::NAN, 0.0, 0.0],
            [f32::INFINITY, 0.0, 0.0],
            [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0],
        ] {
            assert_eq!(
                draw(
                    &LEAVE,
                    &TokenChoice::default(),
                    2,
                    &row,
                    0.0,
                    u,
                    &mut Scratch::default()
                ),
                Err(RowError::Scores)
            );
        }
    }

    /// Chances of every outcome, as [`draw`] draws them: of moving to each token, and of staying at `x`.
    fn outcomes(law: &RowLaw, row: &[f32], x: usize, offset: f64) -> Vec<f64> {
        let (row, mut sums) = (Row::new(row, x), Vec::new());
        let Moves {
            weight,
            moving,
            staying,
            read: _,
        } = moves(law, &row, offset, &mut sums).unwrap();
        let mut chances = Vec::new();
        row.weights(&weight, &mut chances);
        let whole: f64 = sums.iter().sum();
        // A block is chosen by its sum, an entry by its share of the block's entries.
        for (block, sum) in chances.chunks_mut(256).zip(&sums) {
            let entries: f64 = block.iter().sum();
            let leave = moving / (moving + staying);
            let share = if entries > 0.0 {
                leave * sum / whole / entries
            } else {
                0.0
            };
            block.iter_mut().for_each(|p| *p *= share);
        }
        chances[x] = staying / (moving + staying);
        chances
    }

    /// The same, from the definition, all in f64.
    fn exact(law: &RowLaw, row: &[f32], x: usize, offset: f64) -> Vec<f64> {
        let mut scores: Vec<f64> = row.iter().map(|&l| (f64::from(l) + offset).exp()).collect();
        scores[x] = 0.0;
        let total: f64 = scores.iter().sum();
        let mut chances: Vec<f64> = scores
            .iter()
            .map(|&s| law.move_weight(s, total).max(0.0))
            .collect();
        chances[x] = law.stay_weight(total).max(0.0);
        let whole: f64 = chances.iter().sum();
        chances.iter_mut().for_each(|p| *p /= whole);
        chances
    }

    #[test]
    fn laws_are_within_a_millionth_of_the_exact_ones() {
        let mut random = Draws::new(5, 0);
        for states in [3, 256, 1536, 50_258] {
            for kind in [GraphKind::Absorbing, GraphKind::Uniform] {
                let graph = Graph::new(kind, states);
                // Flat rows, rows with few likely tokens, and rows that span the range of f32's exponential.
                for (round, width) in [0.0, 0.1, 1.0, 3.0, 10.0, 60.0].into_iter().enumerate() {
                    let row: Vec<f32> = (0..states)
                        .map(|y| {
                            let u = random.at(round as u32, y);
                            (width * (-2.0 * (1.0 - u.leave).ln()).sqrt() * (6.3 * u.token).cos()) as f32
                        })
                        .collect();
                    let (x, offset) = (states - 1, -(states as f64).ln());
                    for (t, dt) in [(1.0, 0.1), (0.5, 0.01), (0.01, 0.001)] {
                        for sampler in [&Tweedie as &dyn Discretization, &Euler] {
                            let schedule = Schedule::LogLinear { eps: 1e-3 };
                            let law = sampler.step(&graph, &schedule, t, dt);
                            let ours = outcomes(&law, &row, x, offset);
                            let theirs = exact(&law, &row, x, offset);
                            let distance: f64 =
                                ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs() / 2.0).sum();
                            assert!(
                                distance < 1e-6,
                                "{states} states, {kind:?}, width {width}, t {t}: {distance}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn uncertainties_are_surprise_and_entropy() {
        let row: Vec<f32> = (0..700)
            .map(|y| ((y * 7919 % 700) as f32 / 70.0).sin() * 8.0)
            .collect();
        let x = 5;
        let mut chances: Vec<f64> = row.iter().map(|&l| f64::from(l).exp()).collect();
        chances[x] = 0.0;
        let whole: f64 = chances.iter().sum();
        let entropy: f64 = chances
            .iter()
            .filter(|&&p| p > 0.0)
            .map(|p| -(p / whole) * (p / whole).ln())
            .sum();
        let after_drawing = |row: &[f32], x: usize| {
            let mut scratch = Scratch::default();
            let u = Uniforms {
                leave: 0.5,
                token: 0.5,
            };
            let choice = TokenChoice {
                temperature: 0.5,
                ..TokenChoice::default()
            };
            draw(&LEAVE, &choice, x as Token, row, 0.0, u, &mut scratch).unwrap();
            scratch
        };
        let of =
            |of, token: Token| uncertainty(of, x as Token, token, &row, &mut after_drawing(&row, x)).unwrap();
        assert!((of(Uncertainty::Entropy, 0) - entropy).abs() < 1e-5);
        assert!((of(Uncertainty::NegLogProb, 9) + (chances[9] / whole).ln()).abs() < 1e-5);
        assert_eq!(of(Uncertainty::None, 9), 0.0);
        let certain = [0.0, f32::NEG_INFINITY, f32::NEG_INFINITY];
        let [drawn, fresh] = &mut [after_drawing(&certain, 2), Scratch::default()];
        let of = |scratch| uncertainty(Uncertainty::Entropy, 2, 0, &certain, scratch);
        assert_eq!((of(drawn), of(fresh)), (Ok(0.0), Err(RowError::Scores)));
    }

    #[test]
    fn uniforms_find_tokens_by_the_inverse_of_the_exact_law() {
        let row: Vec<f32> = (0..2000).map(|y| (y * 7919 % 2000) as f32 / 500.0).collect();
        for temperature in [1.0, 0.5] {
            let choice = TokenChoice {
                temperature,
                ..TokenChoice::default()
            };
            let weight = |y: usize| (f64::from(row[y]) / temperature).exp();
            let whole: f64 = (0..1999).map(weight).sum();
            let mut below = 0.0;
            for y in 0..1999 {
                // The middle of the token's share, far from where rounding could decide.
                let u = (below + weight(y) / 2.0) / whole;
                assert_eq!(drawn(choice, &row, u), y as Token);
                below += weight(y);
            }
        }
    }

    proptest! {
        #[test]
        fn never_the_current_token_nor_an_impossible_one(
            row in prop::collection::vec(prop_oneof![Just(f32::NEG_INFINITY), -80.0f32..80.0], 2..30),
            x in 0usize..30, leave in 0.0f64..1.0, token in 0.0f64..1.0, offset in -900.0f64..900.0,
            temperature in prop_oneof![Just(0.0), 0.01f64..4.0], top_p in 0.01f64..=1.0, top_k in 1u32..40,
        ) {
            let x = x % row.len();
            let choice = TokenChoice { temperature, top_k: Some(top_k), top_p: Some(top_p) };
            let law = RowLaw { gain: 0.5, spread: 0.0, stay: 1.0, stay_slope: 0.5 };
            if let Ok(Some(y)) = draw(&law, &choice, x as Token, &row, offset, Uniforms { leave, token }, &mut Scratch::default()) {
                prop_assert!(y as usize != x && row[y as usize] > f32::NEG_INFINITY);
            }
        }
    }
}
