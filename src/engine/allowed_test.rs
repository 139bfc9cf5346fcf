//! Tokens that gaps may be filled with: the law of the choice among them.
#![expect(clippy::unwrap_used, reason = "tests")]

use statrs::distribution::{ChiSquared, ContinuousCDF};

use super::plan::{Allowed, Sampling};
use super::tests::{manifest, model_with, options, request, tokens};
use super::*;
use crate::diffusion::sampler::TimeGrid;
use crate::diffusion::{GraphKind, SamplerKind, Token, TokenChoice};
use crate::network::closed_form::ClosedForm;

const TOKEN_LAW: [f64; 4] = [0.4, 0.3, 0.2, 0.1];

fn allowed() -> Allowed {
    Allowed {
        sets: vec![vec![0, 2], vec![1, 2, 3]],
        of: vec![Some(0), Some(0), None, Some(1), Some(1), Some(1)],
    }
}

/// Canvases of six positions, of which the third may be filled with any token.
fn drawn(graph: GraphKind, sampler: SamplerKind, temperature: f64, canvases: u32) -> Vec<Vec<Token>> {
    let noise = manifest(graph).graph();
    let law: Vec<f64> = TOKEN_LAW
        .iter()
        .copied()
        .chain((graph == GraphKind::Uniform).then_some(0.0))
        .collect();
    let model = model_with(
        graph,
        Box::new(move || Ok(Box::new(ClosedForm::independent(noise, &law)))),
    );
    let engine = Engine::start(options(1)).unwrap();
    let mut generation = engine
        .admit(Request {
            sampling: Sampling {
                grid: TimeGrid::new(8),
                sampler,
                choice: TokenChoice {
                    temperature,
                    ..TokenChoice::default()
                },
                normalize: false,
            },
            allowed: Some(allowed()),
            canvases,
            publish: Publish::End,
            ..request(&model, 0)
        })
        .unwrap();
    tokens(&mut generation)
}

/// Null: a position has the weights of the tokens that are allowed there, raised to 1 / temperature, and the free one
/// those of all. Exact for these samplers, since positions are independent and scores exact. Chi-square at
/// significance 1e-3, seeds fixed.
#[test]
fn the_choice_among_allowed_tokens_has_their_weights() {
    for (sampler, temperature) in [
        (SamplerKind::Tweedie, 1.0),
        (SamplerKind::Tweedie, 0.5),
        (SamplerKind::Euler, 1.0),
        (SamplerKind::FirstHitting, 1.0),
        (SamplerKind::Remask { rate: 0.1 }, 2.0),
        (SamplerKind::ThetaTrapezoidal, 1.0),
    ] {
        let canvases = drawn(GraphKind::Absorbing, sampler, temperature, 2000);
        for (positions, set) in [(0..2, &[0, 2][..]), (2..3, &[0, 1, 2, 3]), (3..6, &[1, 2, 3])] {
            let weight = |token: Token| TOKEN_LAW[token as usize].powf(1.0 / temperature);
            let whole: f64 = set.iter().map(|token| weight(*token)).sum();
            let seen: Vec<Token> = canvases
                .iter()
                .flat_map(|canvas| canvas[positions.clone()].to_vec())
                .collect();
            assert!(seen.iter().all(|token| set.contains(token)), "{sampler:?}");
            let statistic: f64 = set
                .iter()
                .map(|token| {
                    let expected = seen.len() as f64 * weight(*token) / whole;
                    let count = seen.iter().filter(|seen| *seen == token).count() as f64;
                    (count - expected).powi(2) / expected
                })
                .sum();
            let limit = ChiSquared::new(set.len() as f64 - 1.0)
                .unwrap()
                .inverse_cdf(0.999);
            assert!(
                statistic < limit,
                "{sampler:?} at {temperature}, {set:?}: {statistic} of {limit}"
            );
        }
    }
}

#[test]
fn nothing_else_comes_out_of_any_sampler_on_either_graph() {
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        for sampler in [
            SamplerKind::Tweedie,
            SamplerKind::Euler,
            SamplerKind::ThetaTrapezoidal,
            SamplerKind::Confidence,
            SamplerKind::ProbabilityMargin,
            SamplerKind::EntropyBounded { bound: 0.3 },
        ] {
            if graph == GraphKind::Uniform && sampler.normalizes() {
                continue;
            }
            for temperature in [0.0, 1.0] {
                for canvas in drawn(graph, sampler, temperature, 100) {
                    for (position, set) in allowed().of.iter().enumerate() {
                        let is_allowed =
                            set.is_none_or(|set| allowed().sets[set].contains(&canvas[position]));
                        assert!(is_allowed, "{graph:?}, {sampler:?}: {canvas:?}");
                    }
                }
            }
        }
    }
}
