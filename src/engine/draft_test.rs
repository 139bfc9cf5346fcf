//! Drafts: noised as training noises text, and denoised from there.
//!
//! Space, scores and statistic are those of `diffusion::sampler::law_test`: two positions, exact scores, chi-square
//! at significance 1e-3, seeds fixed.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use super::plan::{Draft, Plan, Sampling};
use super::samplers_test::run;
use super::tests::{end, fresh, manifest, model, model_of, options, request};
use super::{Engine, Phase, Request};
use crate::bundle::Manifest;
use crate::diffusion::sampler::TimeGrid;
use crate::diffusion::sampler::law_test::{Chain, assert_follows};
use crate::diffusion::{Draws, GraphKind, SamplerKind, Token, TokenChoice};

const START: f64 = 0.6;
const CANVASES: u64 = 40_000;

fn plan(chain: &Chain, graph: GraphKind, sampler: SamplerKind, steps: u32, draft: &[Token]) -> Arc<Plan> {
    let model = model_of(Manifest {
        graph,
        schedule: chain.schedule,
        vocab_size: chain.graph.states(),
        mask_token: chain.graph.mask(),
        max_length: 2,
        ..manifest(graph)
    });
    let sampling = Sampling {
        grid: TimeGrid { steps, start: START },
        sampler,
        choice: TokenChoice::default(),
        normalize: false,
    };
    let draft = Draft(draft.iter().copied().map(Some).collect());
    Arc::new(Plan::new(&model, sampling, None, Some(draft)))
}

/// Drafts of the data law, one for every seed.
fn drafts(chain: &Chain) -> impl Iterator<Item = (u64, usize)> {
    let law = chain.data();
    (0..CANVASES).map(move |seed| {
        let mut u = Draws::new(seed, 1 << 40).prior(0);
        let drawn = law.iter().position(|p| {
            u -= p;
            u < 0.0
        });
        (seed, drawn.unwrap_or(0))
    })
}

/// Null: what comes of drafts of the data law has the data law, since noising and denoising undo each other. Exact for
/// the first-hitting sampler, and for Tweedie's steps where positions are independent.
#[test]
fn drafts_of_the_data_law_end_in_it() {
    let absorbing = Chain::new(GraphKind::Absorbing, SamplerKind::FirstHitting, 1);
    let mut uniform = Chain::new(GraphKind::Uniform, SamplerKind::Tweedie, 5);
    let of = |chain: &Chain, position: usize, token: usize| -> f64 {
        let law = chain.data;
        if position == 0 {
            law[token].iter().sum()
        } else {
            law.iter().map(|row| row[token]).sum()
        }
    };
    let marginals = [0, 1].map(|position| [0, 1, 2].map(|token| of(&uniform, position, token)));
    for (a, row) in uniform.data.iter_mut().enumerate() {
        for (b, p) in row.iter_mut().enumerate() {
            *p = marginals[0][a] * marginals[1][b];
        }
    }
    for (chain, graph, sampler, steps) in [
        (&absorbing, GraphKind::Absorbing, SamplerKind::FirstHitting, 1),
        (&uniform, GraphKind::Uniform, SamplerKind::Tweedie, 5),
    ] {
        let canvases = chain.canvases();
        let plans: Vec<Arc<Plan>> = canvases
            .iter()
            .map(|canvas| plan(chain, graph, sampler, steps, canvas))
            .collect();
        let (mut counts, mut kept) = (vec![0.0; canvases.len()], 0.0);
        for (seed, draft) in drafts(chain) {
            let mut canvas = fresh(&plans[draft], &[None, None], seed, 0);
            kept += (0..2)
                .filter(|&i| canvas.tokens()[i] == canvases[draft][i])
                .count() as f64;
            run(&mut canvas, |tokens, position, sigma| {
                chain.log_scores([tokens[0], tokens[1]], position, sigma)
            });
            let drawn = canvases.iter().position(|c| *c == **canvas.tokens()).unwrap();
            counts[drawn] += 1.0;
        }
        assert_follows(&chain.data(), &counts, &format!("{graph:?}"));
        // The share that the noise leaves as it was: five standard deviations at most.
        let stay = (-chain.schedule.total_noise(START)).exp();
        let stay = if graph == GraphKind::Uniform {
            stay + (1.0 - stay) / 3.0
        } else {
            stay
        };
        let positions = 2.0 * CANVASES as f64;
        let off = (kept - positions * stay) / (positions * stay * (1.0 - stay)).sqrt();
        assert!(off.abs() < 5.0, "{graph:?}: {off}");
    }
}

/// Every sampler ends, with nothing masked, also where the noise has left all or nothing of the draft.
#[test]
fn every_sampler_ends_whatever_the_noise_has_left() {
    let engine = Engine::start(options(1)).unwrap();
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        let model = model(graph);
        for sampler in [
            SamplerKind::Tweedie,
            SamplerKind::Euler,
            SamplerKind::FirstHitting,
            SamplerKind::Confidence,
            SamplerKind::ProbabilityMargin,
            SamplerKind::EntropyBounded { bound: 0.3 },
            SamplerKind::Remask { rate: 0.1 },
            SamplerKind::ThetaTrapezoidal,
        ] {
            if graph == GraphKind::Uniform && sampler.normalizes() {
                continue;
            }
            for (number, start) in [2e-5, 0.3, 1.0].into_iter().enumerate() {
                let mut generation = engine
                    .admit(Request {
                        sampling: Sampling {
                            grid: TimeGrid { steps: 7, start },
                            sampler,
                            choice: TokenChoice::default(),
                            normalize: false,
                        },
                        draft: Some(Draft(vec![Some(1); 6])),
                        canvases: 20,
                        ..request(&model, number as u32)
                    })
                    .unwrap();
                for receiver in &mut generation.canvases {
                    let state = end(receiver);
                    assert!(
                        matches!(state.phase, Phase::Done(_)),
                        "{sampler:?} {start}: {:?}",
                        state.phase
                    );
                    assert_eq!(state.masked, 0, "{sampler:?} from {start}");
                    if start < 1e-4 && graph == GraphKind::Absorbing {
                        assert_eq!(*state.tokens, [1; 6], "{sampler:?} from {start}");
                    }
                }
            }
        }
    }
}
