//! What drawing a token from its row costs, without a network.

use std::time::Instant;

use denoised::diffusion::sampler::row::{Scratch, draw, uncertainty};
use denoised::diffusion::sampler::{LEAVE, Uncertainty};
use denoised::diffusion::{Draws, Token, TokenChoice};
use denoised::network::ScoreRows;
use half::f16;
use serde_json::{Value, json};

use crate::{quartiles, show};

/// Rows of one turn.
const ROWS: usize = 64;

/// Times rows of peaked scores, as networks give them in the end, and of flat ones, as they do at first; microseconds a
/// row.
pub(crate) fn run(turns: usize) -> Value {
    println!("\na row, microseconds");
    let plain = TokenChoice::default();
    let top_p = TokenChoice {
        top_p: Some(0.95),
        temperature: 0.85,
        ..plain
    };
    let mut numbers = Vec::new();
    for states in [6_656, 50_258] {
        for (what, width, choice, of, is_half) in [
            ("temperature 1", 6.0, plain, Uncertainty::None, false),
            ("the same of float16", 6.0, plain, Uncertainty::None, true),
            (
                "temperature 0.85, top-p 0.95",
                6.0,
                top_p,
                Uncertainty::None,
                false,
            ),
            (
                "flat, temperature 0.85, top-p 0.95",
                1.5,
                top_p,
                Uncertainty::None,
                false,
            ),
            ("confidence", 6.0, plain, Uncertainty::NegLogProb, false),
            ("entropy-bounded", 6.0, plain, Uncertainty::Entropy, false),
        ] {
            let mut random = Draws::new(1, 0);
            let rows: Vec<Vec<f32>> = (0..ROWS)
                .map(|row| {
                    let score =
                        |y| width * (-2.0 * (1.0 - random.at(row as u32, y).leave).ln()).sqrt() as f32;
                    (0..states).map(score).collect()
                })
                .collect();
            let flat = rows.concat();
            let half: Vec<f16> = flat.iter().map(|score| f16::from_f32(*score)).collect();
            let scores = if is_half {
                ScoreRows::packed_half(&half, states)
            } else {
                ScoreRows::packed(&flat, states)
            };
            let (x, mut scratch, mut times) = (states as Token - 1, Scratch::default(), Vec::new());
            let mut buffer = Vec::new();
            for turn in 0..turns.max(5) {
                let started = Instant::now();
                for index in 0..ROWS {
                    let row = scores.row_in(index, &mut buffer);
                    let u = random.at(turn as u32, row.len());
                    let token = draw(&LEAVE, &choice, x, row, 0.0, u, &mut scratch).unwrap();
                    uncertainty(of, x, token.unwrap(), row, &mut scratch).unwrap();
                }
                times.push(1e6 * started.elapsed().as_secs_f64() / ROWS as f64);
            }
            let times = quartiles(times);
            println!("  {states} states, {what}: {}", show(times));
            numbers.push(json!({"states": states, "what": what, "microseconds": times}));
        }
    }
    Value::Array(numbers)
}
