//! Rows against the laws in f64.

use proptest::prelude::*;

use super::super::{Discretization, Euler, LEAVE, Tweedie};
use super::*;
use crate::diffusion::{Draws, Graph, GraphKind, Schedule};

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
                        let distance: f64 = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs() / 2.0).sum();
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
    let mut descending = chances.clone();
    descending.sort_by(|a, b| b.total_cmp(a));
    let margin = (descending[0] - descending[1]) / whole;
    assert!((of(Uncertainty::Margin, 9) - (1.0 - margin)).abs() < 1e-6);
    assert_eq!(of(Uncertainty::None, 9), 0.0);
    let certain = [0.0, f32::NEG_INFINITY, f32::NEG_INFINITY];
    let [drawn, fresh] = &mut [after_drawing(&certain, 2), Scratch::default()];
    let of = |scratch| uncertainty(Uncertainty::Entropy, 2, 0, &certain, scratch);
    assert_eq!((of(drawn), of(fresh)), (Ok(0.0), Err(RowError::Scores)));
    // Two that are alike, in the same lane and in two; and what was never allowed does not count.
    for (row, x, expected) in [
        (vec![0.0, 0.0], 5, 1.0),
        (vec![0.0], 5, 0.0),
        (
            vec![0.0, f32::NAN, -1.0],
            1,
            1.0 - (1.0 - (-1.0f64).exp()) / (1.0 + (-1.0f64).exp()),
        ),
    ] {
        let mut whole = vec![f32::NEG_INFINITY; 40];
        whole[..row.len()].copy_from_slice(&row);
        let of = uncertainty(
            Uncertainty::Margin,
            x,
            0,
            &whole,
            &mut after_drawing(&whole, x as usize),
        );
        assert!((of.unwrap() - expected).abs() < 1e-6, "{row:?}: {of:?}");
    }
    let mut apart = vec![-3.0; 40];
    (apart[3], apart[19]) = (0.0, 0.0);
    let of = uncertainty(Uncertainty::Margin, 0, 3, &apart, &mut after_drawing(&apart, 0));
    assert_eq!(of, Ok(1.0));
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
