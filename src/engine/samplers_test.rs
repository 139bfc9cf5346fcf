//! Canvases of normalised models: the law of what comes out, and what it costs.
//!
//! Space, scores and statistic are those of `diffusion::sampler::law_test`: two positions, exact scores, chi-square
//! at significance 1e-3, seeds fixed.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashSet;
use std::sync::Arc;

use super::canvas::Canvas;
use super::plan::{Plan, Sampling};
use super::tests::{end, fresh, manifest, model_of, options, request};
use super::{Engine, Phase, Request, ServedModel};
use crate::bundle::Manifest;
use crate::diffusion::Parameterization;
use crate::diffusion::sampler::law_test::{Chain, assert_follows};
use crate::diffusion::sampler::remask::Chances;
use crate::diffusion::sampler::row::Scratch;
use crate::diffusion::sampler::{Candidate, TimeGrid, theta_trapezoidal};
use crate::diffusion::{GraphKind, SamplerKind, Token, TokenChoice};
use crate::models::NetworkSource;
use crate::network::closed_form::ClosedForm;

fn sampling(sampler: SamplerKind, steps: u32) -> Sampling {
    Sampling {
        grid: TimeGrid::new(steps),
        sampler,
        choice: TokenChoice::default(),
        normalize: true,
    }
}

/// Canvases of a model of `parameterization` that was never asked to be normalised, or of one that was.
fn plan(chain: &Chain, parameterization: Parameterization, sampling: Sampling) -> Arc<Plan> {
    let states = chain.graph.states();
    let model = model_of(Manifest {
        schedule: chain.schedule,
        vocab_size: states,
        mask_token: chain.graph.mask(),
        parameterization,
        max_length: 2,
        ..manifest(GraphKind::Absorbing)
    });
    Arc::new(Plan::new(&model, sampling, None, None))
}

/// Runs a canvas to its end with the rows that `scores` gives at a total noise; returns its evaluations.
pub(super) fn run(canvas: &mut Canvas, mut scores: impl FnMut(&[Token], usize, f64) -> Vec<f32>) -> u32 {
    let mut scratch = Scratch::default();
    while !canvas.is_done() {
        let evaluation = canvas.evaluation();
        assert!(!evaluation.positions.is_empty(), "an evaluation without rows");
        let mut rows = canvas.rows(&evaluation);
        let mut moves = Vec::new();
        for &position in &evaluation.positions {
            let row = scores(canvas.tokens(), position, evaluation.sigma);
            moves.extend(rows.draw(position, &row, None, &mut scratch).unwrap());
        }
        canvas.commit(&evaluation, moves, 1);
    }
    canvas.nfe()
}

fn counts(chain: &Chain, plan: &Arc<Plan>) -> Vec<f64> {
    let canvases = chain.canvases();
    let mut counts = vec![0.0; canvases.len()];
    for seed in 20_000..60_000 {
        let mut canvas = fresh(plan, &[None, None], seed, 0);
        run(&mut canvas, |tokens, position, sigma| {
            let tokens = [tokens[0], tokens[1]];
            let mut row = chain.log_scores(tokens, position, sigma);
            // A network whose scores are off by a factor is put right.
            row.iter_mut()
                .for_each(|log_score| *log_score += 0.7 + position as f32);
            row
        });
        let drawn = canvases.iter().position(|c| *c == **canvas.tokens()).unwrap();
        counts[drawn] += 1.0;
    }
    counts
}

#[test]
fn hit_times_on_a_grid_draw_the_law_of_the_plain_sampler() {
    for (sampler, steps) in [
        (SamplerKind::Tweedie, 1),
        (SamplerKind::Tweedie, 2),
        (SamplerKind::Tweedie, 16),
        (SamplerKind::Euler, 3),
        (SamplerKind::Euler, 16),
    ] {
        let chain = Chain::new(GraphKind::Absorbing, sampler, steps);
        let plan = plan(&chain, Parameterization::Score, sampling(sampler, steps));
        let what = format!("{sampler:?} {steps} steps");
        assert_follows(&chain.exact(), &counts(&chain, &plan), &what);
    }
}

#[test]
fn first_hitting_draws_the_data_law() {
    let chain = Chain::new(GraphKind::Absorbing, SamplerKind::Tweedie, 1);
    let plan = plan(
        &chain,
        Parameterization::Score,
        sampling(SamplerKind::FirstHitting, 1),
    );
    assert_follows(&chain.data(), &counts(&chain, &plan), "first hitting");
}

#[test]
fn evaluations_are_the_distinct_hit_steps() {
    let chain = Chain::new(GraphKind::Absorbing, SamplerKind::Tweedie, 1);
    let flat = |_: &[Token], _: usize, _: f64| vec![0.0; chain.graph.states()];
    // Networks that give probabilities need not be asked to be normalised.
    for (sampler, steps, least) in [
        (SamplerKind::Tweedie, 8, 8),
        (SamplerKind::Euler, 1024, 40),
        (SamplerKind::FirstHitting, 8, 57),
    ] {
        let asked = Sampling {
            normalize: false,
            ..sampling(sampler, steps)
        };
        let plan = plan(&chain, Parameterization::Mean, asked);
        let mut template = vec![None; 60];
        template[7..10].fill(Some(1));
        for seed in 0..20 {
            let mut canvas = fresh(&plan, &template, seed, 0);
            let admitted = canvas.evaluations_left();
            let nfe = run(&mut canvas, flat);
            let steps: HashSet<u32> = canvas
                .committed_at()
                .iter()
                .copied()
                .filter(|&step| step > 0)
                .collect();
            assert_eq!(u64::from(nfe), admitted);
            assert_eq!(nfe as usize, steps.len(), "{sampler:?}: {steps:?}");
            assert!((least..=57).contains(&nfe), "{sampler:?}: {nfe} evaluations");
            assert_eq!((canvas.masked(), canvas.time(), canvas.sigma()), (0, 0.0, 0.0));
            assert_eq!(&canvas.tokens()[7..10], [1; 3]);
        }
    }
}

/// Through the engine, where the second evaluation of a step has the rows of the first.
#[test]
fn theta_trapezoidal_follows_its_chain() {
    for (graph, steps) in [(GraphKind::Absorbing, 3), (GraphKind::Uniform, 4)] {
        let chain = Chain::new(graph, SamplerKind::Tweedie, steps);
        let canvases = chain.canvases();
        let data = canvases.iter().map(|canvas| canvas.to_vec()).zip(chain.data());
        let (noise, data) = (chain.graph, data.filter(|(_, p)| *p > 0.0).collect::<Vec<_>>());
        let network: NetworkSource = Box::new(move || Ok(Box::new(ClosedForm::new(noise, data.clone()))));
        let manifest = Manifest {
            schedule: chain.schedule,
            vocab_size: chain.graph.states(),
            mask_token: chain.graph.mask(),
            max_length: 2,
            ..manifest(graph)
        };
        let model = Arc::new(ServedModel::without_bundle(manifest, 1, network));
        let engine = Engine::start(options(2)).unwrap();
        let mut counts = vec![0.0; canvases.len()];
        for number in 0..400 {
            let sampling = Sampling {
                normalize: false,
                ..sampling(SamplerKind::ThetaTrapezoidal, steps)
            };
            let request = Request {
                id: format!("theta-{number}"),
                template: vec![None; 2].into(),
                sampling,
                seed: 70_000 + number,
                canvases: 64,
                ..request(&model, 0)
            };
            for receiver in &mut engine.admit(request).unwrap().canvases {
                let state = end(receiver);
                assert!(matches!(state.phase, Phase::Done(_)) && state.nfe <= 2 * steps + 1);
                counts[canvases.iter().position(|c| *c == *state.tokens).unwrap()] += 1.0;
            }
        }
        assert_follows(
            &theta_trapezoidal::tests::exact(&chain),
            &counts,
            &format!("{graph:?}"),
        );
    }
}

/// The state a client sees never goes back in time, and ends at 0.
#[test]
fn times_fall_from_one_to_zero() {
    let chain = Chain::new(GraphKind::Absorbing, SamplerKind::Tweedie, 1);
    for sampler in [SamplerKind::Tweedie, SamplerKind::FirstHitting] {
        let plan = plan(&chain, Parameterization::Score, sampling(sampler, 30));
        let mut canvas = fresh(&plan, &[None; 12], 3, 0);
        assert_eq!((canvas.time(), canvas.step()), (1.0, 0));
        let (mut scratch, row) = (Scratch::default(), vec![0.0; chain.graph.states()]);
        let mut before = 1.1;
        while !canvas.is_done() {
            let evaluation = canvas.evaluation();
            assert!(canvas.time() < before && evaluation.sigma <= canvas.sigma());
            before = canvas.time();
            let mut rows = canvas.rows(&evaluation);
            let candidates: Vec<Candidate> = evaluation
                .positions
                .iter()
                .map(|&position| rows.draw(position, &row, None, &mut scratch).unwrap().unwrap())
                .collect();
            canvas.commit(&evaluation, candidates, 1);
        }
    }
}

/// The exact law of remasking: every position leaves, stays or is masked again by chance alone.
fn remasked(chain: &Chain, steps: u32, rate: f64) -> Vec<f64> {
    let (canvases, mask) = (chain.canvases(), chain.graph.mask().unwrap());
    let grid = TimeGrid::new(steps);
    let mut law: Vec<f64> = canvases
        .iter()
        .map(|c| f64::from(u8::from(*c == [mask; 2])))
        .collect();
    for step in 0..=steps {
        let chances = Chances::new(&chain.schedule, grid, step, rate);
        let sigma = chain.schedule.total_noise(grid.time(step));
        let mut next = vec![0.0; canvases.len()];
        for (canvas, p) in canvases.iter().zip(&law).filter(|(_, p)| **p > 0.0) {
            let of = |position: usize| -> Vec<f64> {
                let mut chance = vec![0.0; chain.graph.states()];
                if canvas[position] == mask {
                    let scores = chain.log_scores(*canvas, position, sigma);
                    for (chance, score) in chance.iter_mut().zip(scores) {
                        *chance = f64::from(score).exp();
                    }
                    chance[mask as usize] = 0.0;
                    let whole: f64 = chance.iter().sum();
                    chance.iter_mut().for_each(|p| *p *= chances.leave / whole);
                    chance[mask as usize] = 1.0 - chances.leave;
                } else {
                    chance[mask as usize] = chances.mask;
                    chance[canvas[position] as usize] = 1.0 - chances.mask;
                }
                chance
            };
            let (first, second) = (of(0), of(1));
            for (to, next) in canvases.iter().zip(&mut next) {
                *next += p * first[to[0] as usize] * second[to[1] as usize];
            }
        }
        law = next;
    }
    law
}

#[test]
fn remasking_follows_its_chain_and_without_a_rate_the_plain_one() {
    for (rate, steps) in [(0.0, 5), (0.3, 3), (1.0, 6)] {
        let chain = Chain::new(GraphKind::Absorbing, SamplerKind::Tweedie, steps);
        let plan = plan(
            &chain,
            Parameterization::Score,
            sampling(SamplerKind::Remask { rate }, steps),
        );
        let counts = counts(&chain, &plan);
        assert_follows(&remasked(&chain, steps, rate), &counts, &format!("rate {rate}"));
        if rate == 0.0 {
            assert_follows(&chain.exact(), &counts, "rate 0");
        }
    }
}

/// One position an evaluation, whatever the order, is the chain rule: the data law.
#[test]
fn no_entropy_at_all_draws_the_data_law() {
    let chain = Chain::new(GraphKind::Absorbing, SamplerKind::Tweedie, 1);
    let sampler = SamplerKind::EntropyBounded { bound: 0.0 };
    let plan = plan(&chain, Parameterization::Score, sampling(sampler, 2));
    assert_follows(&chain.data(), &counts(&chain, &plan), "bound 0");
}

/// The further right, the likelier the likeliest token, and the closer the second comes to it.
fn closer_to_the_right(_: &[Token], position: usize, _: f64) -> Vec<f32> {
    let (first, second) = (0.5 + 0.005 * position as f32, 0.26 + 0.02 * position as f32);
    // The last is the mask's own, which is not read.
    [second, 1.0 - first - second, first, 1.0].map(f32::ln).to_vec()
}

#[test]
fn a_position_that_two_tokens_share_waits_for_a_margin_and_not_for_confidence() {
    let (at, nfe) = committed_by(SamplerKind::ProbabilityMargin, 5, closer_to_the_right);
    assert_eq!((at, nfe), (vec![1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 5));
    let (at, nfe) = committed_by(SamplerKind::Confidence, 5, closer_to_the_right);
    assert_eq!((at, nfe), (vec![5, 5, 4, 4, 3, 3, 2, 2, 1, 1], 5));
}

/// The surer, the further right: rows whose first token is likelier by `position` nats.
fn surer_to_the_right(_: &[Token], position: usize, _: f64) -> Vec<f32> {
    vec![position as f32, 0.0, 0.0, 0.0]
}

fn committed(sampler: SamplerKind, steps: u32) -> (Vec<u32>, u32) {
    committed_by(sampler, steps, surer_to_the_right)
}

/// When each of ten positions is filled by networks of these rows, and what it takes.
fn committed_by(
    sampler: SamplerKind,
    steps: u32,
    rows: impl FnMut(&[Token], usize, f64) -> Vec<f32>,
) -> (Vec<u32>, u32) {
    let chain = Chain::new(GraphKind::Absorbing, SamplerKind::Tweedie, 1);
    let mut sampling = sampling(sampler, steps);
    sampling.choice.temperature = 0.0;
    let plan = plan(&chain, Parameterization::Mean, sampling);
    let mut canvas = fresh(&plan, &[None; 10], 1, 0);
    let nfe = run(&mut canvas, rows);
    (canvas.committed_at().to_vec(), nfe)
}

#[test]
fn the_surest_positions_are_filled_first() {
    let (at, nfe) = committed(SamplerKind::Confidence, 4);
    assert_eq!((at, nfe), (vec![4, 4, 3, 3, 2, 2, 2, 1, 1, 1], 4));
    let (at, nfe) = committed(SamplerKind::Confidence, 64);
    assert_eq!((at, nfe), ((1..=10).rev().collect(), 10));
    // A generous bound fills all that are nearly certain at once.
    let (at, nfe) = committed(SamplerKind::EntropyBounded { bound: 0.3 }, 64);
    assert!(nfe < 10 && at.is_sorted_by(|a, b| a >= b), "{at:?}");
    assert!(at[6..].iter().all(|&step| step == 1), "{at:?}");
    let (_, nfe) = committed(SamplerKind::EntropyBounded { bound: 1e9 }, 64);
    assert_eq!(nfe, 1);
    // Few steps overrule the bound.
    let (at, nfe) = committed(SamplerKind::EntropyBounded { bound: 0.0 }, 3);
    assert_eq!((at, nfe), (vec![3, 3, 3, 2, 2, 2, 1, 1, 1, 1], 3));
}
