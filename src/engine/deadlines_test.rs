//! Deadlines: fewer steps instead of an error, or an error in time.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use statrs::distribution::{ChiSquared, ContinuousCDF};

use super::canvas::Canvas;
use super::plan::Sampling;
use super::tests::{end, fresh, manifest, model_with, options, request};
use super::*;
use crate::diffusion::sampler::TimeGrid;
use crate::diffusion::sampler::row::Scratch;
use crate::diffusion::{GraphKind, SamplerKind, TokenChoice};
use crate::network::closed_form::ClosedForm;
use crate::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};

const TOKEN_LAW: [f64; 4] = [0.4, 0.3, 0.2, 0.1];

/// All samplers that models of `graph` can be sampled with.
fn samplers(graph: GraphKind) -> impl Iterator<Item = SamplerKind> {
    [
        SamplerKind::Tweedie,
        SamplerKind::Euler,
        SamplerKind::ThetaTrapezoidal,
        SamplerKind::FirstHitting,
        SamplerKind::Confidence,
        SamplerKind::ProbabilityMargin,
        SamplerKind::EntropyBounded { bound: 0.1 },
        SamplerKind::Remask { rate: 0.1 },
    ]
    .into_iter()
    .filter(move |sampler| graph == GraphKind::Absorbing || !sampler.normalizes())
}

fn sampling(sampler: SamplerKind, steps: u32) -> Sampling {
    Sampling {
        grid: TimeGrid::new(steps),
        sampler,
        choice: TokenChoice::default(),
        normalize: false,
    }
}

/// One step of a canvas, or its last.
fn step(canvas: &mut Canvas, network: &mut ClosedForm, last: bool) {
    let evaluation = if last {
        canvas.finish()
    } else {
        canvas.evaluation()
    };
    let tokens: Vec<i64> = canvas.tokens().iter().map(|&token| token.into()).collect();
    let positions: Vec<i64> = evaluation.positions.iter().map(|&i| i as i64).collect();
    let batch = Batch {
        tokens: &tokens,
        length: tokens.len(),
        sigma: &[evaluation.sigma as f32],
        positions: &positions,
    };
    let mut moves = Vec::new();
    network
        .log_score(&batch, &mut |scores| {
            let (mut rows, mut scratch) = (canvas.rows(&evaluation), Scratch::default());
            for (row, &position) in evaluation.positions.iter().enumerate() {
                moves.extend(rows.draw(position, &scores.row(row), None, &mut scratch).unwrap());
            }
        })
        .unwrap();
    canvas.commit(&evaluation, moves, 1);
}

/// Null: tokens that are finished after some of their steps have the data's law, since positions are independent and
/// scores exact. Chi-square with 3 degrees of freedom at significance 1e-3, seeds fixed.
#[test]
fn what_is_finished_early_follows_the_data() {
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        let law: Vec<f64> = match graph {
            GraphKind::Absorbing => TOKEN_LAW.to_vec(),
            GraphKind::Uniform => TOKEN_LAW.iter().copied().chain([0.0]).collect(),
        };
        let mut network = ClosedForm::independent(manifest(graph).graph(), &law);
        let model = model_with(graph, Box::new(|| Err(NetworkError::Run("unused".to_owned()))));
        for after in [0, 5] {
            let plan = Arc::new(Plan::new(&model, sampling(SamplerKind::Tweedie, 16), None, None));
            let mut counts = [0f64; 5];
            for seed in 0..3000 {
                let mut canvas = fresh(&plan, &[None; 6], seed, 0);
                (0..after).for_each(|_| step(&mut canvas, &mut network, false));
                // One in a thousand has nothing left by then.
                if !canvas.is_done() {
                    step(&mut canvas, &mut network, true);
                    assert!(canvas.finished_early());
                }
                assert!(canvas.is_done());
                canvas
                    .tokens()
                    .iter()
                    .for_each(|&token| counts[token as usize] += 1.0);
            }
            let total: f64 = counts.iter().sum();
            let statistic: f64 = TOKEN_LAW
                .iter()
                .zip(counts)
                .map(|(p, count)| (count - p * total).powi(2) / (p * total))
                .sum();
            let limit = ChiSquared::new(3.0).unwrap().inverse_cdf(0.999);
            assert!(
                statistic < limit,
                "{graph:?} after {after} steps: {statistic} of {limit}, {counts:?}"
            );
            assert!(counts[4] < 2.0, "{counts:?}");
        }
    }
}

/// Waits in its third evaluation until a time has passed.
struct Late {
    network: ClosedForm,
    evaluations: u32,
    until: Instant,
}

impl ScoreNetwork for Late {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.evaluations += 1;
        // One more is the loader's.
        if self.evaluations == 4 {
            std::thread::sleep(self.until.saturating_duration_since(Instant::now()));
        }
        self.network.log_score(batch, read)
    }
}

fn late(graph: GraphKind, until: Instant) -> Arc<ServedModel> {
    let noise = manifest(graph).graph();
    model_with(
        graph,
        Box::new(move || {
            Ok(Box::new(Late {
                network: ClosedForm::independent(noise, &[0.25; 4]),
                evaluations: 0,
                until,
            }))
        }),
    )
}

#[test]
fn every_sampler_finishes_early_with_a_whole_text() {
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        for sampler in samplers(graph) {
            let at = Instant::now() + Duration::from_millis(300);
            let model = late(graph, at);
            let engine = Engine::start(options(1)).unwrap();
            let deadline = Deadline {
                at,
                then: OnDeadline::FinishEarly,
            };
            let mut generation = engine
                .admit(Request {
                    sampling: sampling(sampler, 5000),
                    template: vec![None; 6].into(),
                    canvases: 1,
                    deadline: Some(deadline),
                    ..request(&model, 0)
                })
                .unwrap();
            let state = end(&mut generation.canvases[0]);
            let Phase::Done(outcome) = state.phase else {
                panic!("{sampler:?}: {:?}", state.phase);
            };
            assert!(outcome.early, "{sampler:?}");
            assert_eq!((state.masked, state.step), (0, state.total), "{sampler:?}");
            let mask = manifest(graph).mask_token;
            assert!(state.tokens.iter().all(|token| Some(*token) != mask));
            // Two evaluations, the one that lasted, of theta-trapezoidal its second, and the last.
            assert!((3..=5).contains(&state.nfe), "{sampler:?}: {}", state.nfe);
            let last = state.committed_at.iter().max().unwrap();
            assert!(
                *last < 5000,
                "what is set last has the number of its step: {last}"
            );
        }
    }
}

#[test]
fn a_deadline_that_fails_ends_the_request_and_frees_its_room() {
    let at = Instant::now() + Duration::from_millis(200);
    let model = late(GraphKind::Absorbing, at);
    let engine = Engine::start(options(1)).unwrap();
    let mut generation = engine
        .admit(Request {
            sampling: sampling(SamplerKind::Tweedie, 100),
            deadline: Some(Deadline {
                at,
                then: OnDeadline::Fail,
            }),
            canvases: 2,
            ..request(&model, 0)
        })
        .unwrap();
    for canvas in &mut generation.canvases {
        assert!(matches!(end(canvas).phase, Phase::Failed(Failure::Deadline)));
    }
    assert!(engine.is_idle());
}

#[test]
fn a_deadline_that_cannot_be_met_is_refused_before_anything_is_built() {
    let model = late(GraphKind::Absorbing, Instant::now());
    let engine = Engine::start(options(1)).unwrap();
    let ask = |number, evaluations: u32, ms, then| {
        engine.admit(Request {
            sampling: sampling(SamplerKind::Tweedie, evaluations - 1),
            canvases: 1,
            deadline: Some(Deadline {
                at: Instant::now() + Duration::from_millis(ms),
                then,
            }),
            ..request(&model, number)
        })
    };
    // Known once something was measured.
    engine
        .shared
        .costs
        .measured(&model, 6, 1, Duration::from_millis(100));
    let refused = ask(1, 50, 3000, OnDeadline::Fail).unwrap_err();
    let AdmitError::Deadline { left, predicted, .. } = refused else {
        panic!("{refused:?}");
    };
    assert!(left <= Duration::from_secs(3) && predicted >= Duration::from_secs(5));
    assert!(engine.is_idle() && engine.shared.running.is_empty());
    let refused = ask(2, 50, 50, OnDeadline::FinishEarly).unwrap_err();
    assert!(
        matches!(refused, AdmitError::Deadline { .. }),
        "not one evaluation fits"
    );
    assert!(ask(3, 50, 600_000, OnDeadline::Fail).is_ok());
    let mut some = ask(4, 50, 30_000, OnDeadline::FinishEarly).unwrap();
    assert!(matches!(end(&mut some.canvases[0]).phase, Phase::Done(_)));
}
