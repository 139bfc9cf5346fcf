//! One token's draw from a row of log-scores.
//!
//! A row is read for its maximum and its sum, which decide whether the token leaves; only rows that leave are
//! looked into again, a block of 256 entries of them (`blocks.rs`). Exponentials are f32, sums and
//! decisions f64: the law is within a total variation of 1e-6 of the same in f64, which a test computes.

use super::blocks::{Row, Weight};
use super::choice::{TokenChoice, choose, likelier};
use super::evaluation::Uncertainty;
use super::{Law, RowLaw};
use crate::diffusion::Token;
use crate::diffusion::draw::Uniforms;

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

/// How unsure a row over target tokens is of `token` in place of `x`, in nats, of margins from 0 to 1; the row must be the
/// one that was [drawn](draw) from last, whose sums it goes on from.
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
    let row = Row::new(log_score, x as usize);
    let uncertainty = match of {
        Uncertainty::None => 0.0,
        Uncertainty::NegLogProb => sum.ln() - f64::from(log_score[token as usize] - top),
        Uncertainty::Entropy => sum.ln() - row.mean_exponent(top, &mut scratch.sums) / sum,
        // Of the likeliest, e^0 of the sum.
        Uncertainty::Margin => 1.0 - (1.0 - f64::from(row.second() - top).exp()) / sum,
    };
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
