//! One token's draw from a row of log-scores.

use super::RowLaw;
use crate::diffusion::Token;
use crate::diffusion::draw::Uniforms;

/// How the new token is chosen, once a token leaves.
///
/// These shape the choice alone, never the decision to leave: the noise process stays what it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenChoice {
    /// Weights are raised to `1 / temperature`; 0 takes the likeliest token. At least 0.
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

impl TokenChoice {
    fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// The network gave a log-score that is NaN or plus infinity, or nothing but zero scores to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the network's log-scores hold NaN or +infinity, or leave no token to choose")]
pub struct BadScores;

/// Draws what becomes of token `x`: the new token, or `None` when it stays.
///
/// `log_score` is the network's row over target tokens (length V; the entry at `x` is not read),
/// `offset` is added to every entry in f64. `weights` is scratch of any size.
///
/// # Errors
/// [`BadScores`] when no law can be made of the row.
pub fn draw(
    law: &RowLaw,
    choice: &TokenChoice,
    x: Token,
    log_score: &[f32],
    offset: f64,
    u: Uniforms,
    weights: &mut Vec<f64>,
) -> Result<Option<Token>, BadScores> {
    let x = x as usize;
    // Scores are kept relative to their maximum, so that no sum overflows.
    let top = log_score
        .iter()
        .enumerate()
        .filter(|&(y, _)| y != x)
        .fold(f32::NEG_INFINITY, |m, (_, &l)| m.max(l));
    if top == f32::INFINITY {
        return Err(BadScores);
    }
    let top = f64::from(top);
    weights.clear();
    weights.extend(log_score.iter().map(|&l| (f64::from(l) - top).exp()));
    weights[x] = 0.0;
    let relative: f64 = weights.iter().sum();
    if relative.is_nan() {
        return Err(BadScores);
    }
    // exp(600) is far beyond where leaving is certain; the cap keeps what follows finite.
    let scale = (top + offset).min(600.0).exp();
    let total = relative * scale;

    let moving = if law.spread == 0.0 {
        weights.iter_mut().for_each(|w| *w *= law.gain);
        law.gain * relative
    } else {
        let lost = law.spread * (1.0 + total) / scale;
        let mut sum = 0.0;
        for (y, w) in weights.iter_mut().enumerate() {
            *w = if y == x {
                0.0
            } else {
                (law.gain * *w - lost).max(0.0)
            };
            sum += *w;
        }
        sum
    } * scale;
    let staying = law.stay_weight(total).max(0.0);
    let whole = moving + staying;
    if whole.is_nan() || whole <= 0.0 {
        return Err(BadScores);
    }
    if u.leave * whole >= moving {
        return Ok(None);
    }
    if !choice.is_plain() {
        shape(choice, weights);
    }
    pick(weights, u.token).map(Some).ok_or(BadScores)
}

/// Inverse CDF of unnormalised `weights` at `u` in `[0, 1)`.
fn pick(weights: &[f64], u: f64) -> Option<Token> {
    let target = u * weights.iter().sum::<f64>();
    let mut below = 0.0;
    let mut last = None;
    for (y, &w) in weights.iter().enumerate() {
        if w > 0.0 {
            below += w;
            last = Some(y as Token);
            if target < below {
                break;
            }
        }
    }
    last
}

/// Applies top-k, temperature and top-p, in that order.
fn shape(choice: &TokenChoice, weights: &mut [f64]) {
    let top_k = if choice.temperature == 0.0 {
        Some(1)
    } else {
        choice.top_k
    };
    if top_k.is_none() && choice.top_p.is_none() {
        return temper(choice.temperature, weights);
    }
    let mut order: Vec<usize> = (0..weights.len()).filter(|&y| weights[y] > 0.0).collect();
    // Ties go to the lower id, so that the result is a function of the row alone.
    order.sort_unstable_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    let keep = top_k.map_or(order.len(), |k| order.len().min(k as usize));
    for &y in &order[keep..] {
        weights[y] = 0.0;
    }
    if choice.temperature > 0.0 {
        temper(choice.temperature, weights);
    }
    if let Some(p) = choice.top_p {
        let target = p * weights.iter().sum::<f64>();
        let mut below = 0.0;
        for &y in &order {
            if below >= target {
                weights[y] = 0.0;
            }
            below += weights[y];
        }
    }
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
    use super::*;
    use proptest::prelude::*;

    const LEAVE: RowLaw = RowLaw {
        gain: 1.0,
        spread: 0.0,
        stay: 0.0,
        stay_slope: 0.0,
    };

    fn drawn(choice: TokenChoice, row: &[f32], u: f64) -> Token {
        draw(
            &LEAVE,
            &choice,
            row.len() as Token - 1,
            row,
            0.0,
            Uniforms { leave: 0.5, token: u },
            &mut Vec::new(),
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
                draw(&LEAVE, &TokenChoice::default(), 2, &row, 0.0, u, &mut Vec::new()),
                Err(BadScores)
            );
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
            if let Ok(Some(y)) = draw(&law, &choice, x as Token, &row, offset, Uniforms { leave, token }, &mut Vec::new()) {
                prop_assert!(y as usize != x && row[y as usize] > f32::NEG_INFINITY);
            }
        }
    }
}
