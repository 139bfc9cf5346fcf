//! Scores of texts, with a closed-form network whose likelihoods are known.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::AtomicUsize;

use super::tests::{idle, manifest, model, model_with, options, request, sentences, tokens};
use super::*;
use crate::diffusion::likelihood::{Estimate, Likelihood, Order};
use crate::diffusion::sampler::law_test::assert_follows;
use crate::diffusion::{GraphKind, Token};
use crate::network::closed_form::ClosedForm;
use crate::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};

const LEFT_TO_RIGHT: Likelihood = Likelihood::Exact(Order::LeftToRight);
const SUREST_FIRST: Likelihood = Likelihood::Exact(Order::SurestFirst);

fn whole(tokens: Vec<Token>) -> TextToScore {
    TextToScore {
        context: vec![false; tokens.len()],
        tokens,
    }
}

fn ask(model: &Arc<ServedModel>, likelihood: Likelihood, texts: Vec<TextToScore>) -> ScoreRequest {
    ScoreRequest {
        id: "score".to_owned(),
        caller: Caller::new("test"),
        model: Arc::clone(model),
        texts,
        likelihood,
        seed: 5,
        deadline: None,
        priority: 0,
    }
}

fn last(run: &mut ScoringRun) -> Scores {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(async {
            let ended = run
                .scores
                .wait_for(|scores| scores.is_done() || scores.failure.is_some());
            tokio::time::timeout(Duration::from_secs(60), ended)
                .await
                .unwrap()
                .unwrap()
                .clone()
        })
}

fn scores(engine: &Engine, request: &ScoreRequest) -> Vec<TextScore> {
    let scores = last(&mut engine.score(request).unwrap());
    assert_eq!((scores.failure, scores.done), (None, scores.total));
    scores
        .texts
        .into_iter()
        .map(|text| TextScore::clone(&text.unwrap()))
        .collect()
}

/// Every way says of every text what its law does: given nothing, and given its first half. The bound within five
/// standard errors.
#[test]
fn every_likelihood_is_that_of_the_law() {
    let engine = Engine::start(options(2)).unwrap();
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        let model = model(graph);
        let whole: Vec<_> = sentences().into_iter().map(|(tokens, _)| whole(tokens)).collect();
        // The third sentence alone begins with two zeros, the first with 0 and 1.
        let given: Vec<_> = whole
            .iter()
            .map(|text| TextToScore {
                context: vec![true, false, false, false, false, false],
                tokens: text.tokens.clone(),
            })
            .collect();
        let law = [0.5, 0.3, 0.2].map(f64::ln);
        let after_the_first = [0.5 / 0.7, 1.0, 0.2 / 0.7].map(f64::ln);
        let kinds: &[Likelihood] = match graph {
            GraphKind::Absorbing => &[LEFT_TO_RIGHT, SUREST_FIRST, Likelihood::Bound { draws: 256 }],
            GraphKind::Uniform => &[Likelihood::Bound { draws: 256 }],
        };
        for &likelihood in kinds {
            // On the uniform graph context is not what training has seen: nothing is known of it.
            let cases = [(&whole, law), (&given, after_the_first)];
            let cases = &cases[..if graph == GraphKind::Absorbing { 2 } else { 1 }];
            for (texts, expected) in cases {
                let found = scores(&engine, &ask(&model, likelihood, (*texts).clone()));
                for (score, expected) in found.iter().zip(expected) {
                    let Estimate { nats, standard_error } = score.estimate;
                    let off = (nats + expected).abs();
                    assert!(
                        off <= 5.0 * standard_error + 1e-4,
                        "{graph:?} {likelihood:?}: {nats} {expected}"
                    );
                    assert!(standard_error < 0.3, "{standard_error}");
                    if let Likelihood::Exact(_) = likelihood {
                        let sum: f64 = score.log_probabilities.iter().sum();
                        assert!(
                            (sum + nats).abs() < 1e-12
                                && score.log_probabilities.len() == score.scored as usize
                        );
                    }
                }
            }
        }
    }
    assert!(idle(&engine));
}

/// What a text scores does not depend on workers, on other texts, or on canvases that are denoised beside it.
#[test]
fn scores_do_not_depend_on_company_or_workers() {
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        let model = model(graph);
        let texts: Vec<_> = sentences().into_iter().map(|(tokens, _)| whole(tokens)).collect();
        for likelihood in [Likelihood::Bound { draws: 37 }, LEFT_TO_RIGHT] {
            if likelihood == LEFT_TO_RIGHT && graph == GraphKind::Uniform {
                continue;
            }
            let first = ask(&model, likelihood, texts[..1].to_vec());
            let alone = scores(&Engine::start(options(1)).unwrap(), &first);
            let engine = Engine::start(options(3)).unwrap();
            let mut others: Vec<_> = (0..8)
                .map(|n| engine.admit(request(&model, n)).unwrap())
                .collect();
            let found = scores(&engine, &ask(&model, likelihood, texts.clone()));
            assert_eq!(found[..1], alone, "{graph:?} {likelihood:?}");
            others.iter_mut().for_each(|other| drop(tokens(other)));
        }
    }
}

/// Counts passes, and canvases of all passes together.
struct Counting {
    network: ClosedForm,
    counts: Arc<[AtomicUsize; 2]>,
}

impl ScoreNetwork for Counting {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.counts[0].fetch_add(1, Ordering::AcqRel);
        self.counts[1].fetch_add(batch.sigma.len(), Ordering::AcqRel);
        self.network.log_score(batch, read)
    }
}

/// However many texts there are, and however long each is by itself, passes are full: eight canvases fit.
#[test]
fn evaluations_of_a_text_share_passes() {
    for (texts, likelihood, evaluations) in [
        (1, Likelihood::Bound { draws: 64 }, 64),
        (1, LEFT_TO_RIGHT, 6),
        (24, LEFT_TO_RIGHT, 144),
        (16, SUREST_FIRST, 96),
        (100, Likelihood::Bound { draws: 8 }, 800),
    ] {
        let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let (noise, seen) = (manifest(GraphKind::Absorbing).graph(), Arc::clone(&counts));
        let model = model_with(
            GraphKind::Absorbing,
            Box::new(move || {
                Ok(Box::new(Counting {
                    network: ClosedForm::new(noise, sentences()),
                    counts: Arc::clone(&seen),
                }))
            }),
        );
        let engine = Engine::start(options(1)).unwrap();
        let text = whole(sentences()[0].0.clone());
        let found = scores(&engine, &ask(&model, likelihood, vec![text; texts]));
        let [passes, canvases] = [0, 1].map(|index: usize| counts[index].load(Ordering::Acquire));
        assert_eq!(canvases, evaluations);
        assert_eq!(
            found
                .iter()
                .map(|score| score.evaluations as usize)
                .sum::<usize>(),
            evaluations
        );
        // Passes are full but for a few at the end of each text.
        assert!(
            10 * passes <= 11 * evaluations.div_ceil(8) + 10,
            "{texts} {likelihood:?}: {passes} passes"
        );
    }
}

/// Scores that no law has: what stands where says nothing that fits together.
struct Arbitrary(Vec<f32>);

impl ScoreNetwork for Arbitrary {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.0.clear();
        for &flat in batch.positions {
            let canvas = flat as usize / batch.length * batch.length;
            let seen = batch.tokens[canvas..canvas + batch.length].iter();
            let seed = seen.fold(flat as u64 - canvas as u64, |seed, &token| {
                seed * 31 + token as u64
            });
            let mut draws = crate::diffusion::Draws::new(seed, 0);
            self.0.extend((0..5).map(|y| 3.0 * draws.prior(y) as f32));
        }
        read(ScoreRows::packed(&self.0, 5));
        Ok(())
    }
}

/// Null: the entropy-bounded sampler at bound 0 draws a text with its exact likelihood; chi-square. In either order likelihoods sum to 1, and they differ: a network's need not agree.
#[test]
fn exact_likelihoods_are_those_of_the_sampler() {
    let model = model_with(
        GraphKind::Absorbing,
        Box::new(|| Ok(Box::new(Arbitrary(Vec::new())))),
    );
    let engine = Engine::start(EngineOptions {
        batch_tokens: 3 * 512,
        ..options(1)
    })
    .unwrap();
    let all: Vec<Vec<Token>> = (0..64).map(|n| vec![n / 16, n / 4 % 4, n % 4]).collect();
    let likelihoods = |order| {
        let texts = all.iter().cloned().map(whole).collect();
        let found = scores(&engine, &ask(&model, Likelihood::Exact(order), texts));
        let law: Vec<f64> = found.iter().map(|score| (-score.estimate.nats).exp()).collect();
        assert!((law.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{order:?}");
        law
    };
    let surest = likelihoods(Order::SurestFirst);
    let difference: f64 = likelihoods(Order::LeftToRight)
        .iter()
        .zip(&surest)
        .map(|(one, other)| (one - other).abs())
        .sum();
    assert!(difference > 0.05, "{difference}");

    let (mut counts, count) = ([0.0; 64], 20_000);
    for batch in 0..count / 500 {
        let mut generation = engine
            .admit(Request {
                template: vec![None; 3].into(),
                sampling: plan::Sampling {
                    grid: crate::diffusion::sampler::TimeGrid::new(3),
                    sampler: crate::diffusion::SamplerKind::EntropyBounded { bound: 0.0 },
                    choice: crate::diffusion::TokenChoice::default(),
                    normalize: false,
                },
                seed: batch,
                canvases: 500,
                publish: Publish::End,
                ..request(&model, 0)
            })
            .unwrap();
        for tokens in tokens(&mut generation) {
            counts[(16 * tokens[0] + 4 * tokens[1] + tokens[2]) as usize] += 1.0;
        }
    }
    assert_follows(&surest, &counts, "surest first");
}

/// Texts of different lengths never share a pass, which would fail, and are scored as if each were alone.
#[test]
fn texts_may_differ_in_length() {
    let calls = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let (graph, counts) = (manifest(GraphKind::Absorbing).graph(), Arc::clone(&calls));
    let model = model_with(
        GraphKind::Absorbing,
        Box::new(move || {
            Ok(Box::new(Counting {
                network: ClosedForm::independent(graph, &[0.4, 0.3, 0.2, 0.1]),
                counts: Arc::clone(&counts),
            }))
        }),
    );
    let engine = Engine::start(options(2)).unwrap();
    let texts: Vec<_> = (1..=6)
        .flat_map(|length| [whole(vec![0; length]), whole(vec![3; length])])
        .collect();
    for likelihood in [LEFT_TO_RIGHT, SUREST_FIRST, Likelihood::Bound { draws: 4 }] {
        let found = scores(&engine, &ask(&model, likelihood, texts.clone()));
        for (text, score) in texts.iter().zip(found) {
            let expected = -[0.4_f64, 0.3, 0.2, 0.1][text.tokens[0] as usize].ln() * text.tokens.len() as f64;
            assert!(
                (score.estimate.nats - expected).abs() < 1e-3,
                "{likelihood:?} {text:?}"
            );
        }
    }
    let canvases = calls[1].load(Ordering::Acquire);
    assert_eq!(canvases, 42 + 42 + 48, "no pass was run twice");
}

#[test]
fn a_failure_is_told_and_harms_nobody_else() {
    let model = model(GraphKind::Absorbing);
    let broken = model_with(
        GraphKind::Absorbing,
        Box::new(|| Err(NetworkError::Load("injected".to_owned()))),
    );
    let engine = Engine::start(options(1)).unwrap();
    let text = whole(sentences()[0].0.clone());
    let mut run = engine
        .score(&ask(&broken, LEFT_TO_RIGHT, vec![text.clone()]))
        .unwrap();
    assert!(matches!(last(&mut run).failure, Some(Failure::Model { .. })));
    let mut other = engine.admit(request(&model, 3)).unwrap();
    drop(tokens(&mut other));
    assert!(idle(&engine));
}

/// Cancelled, dropped, or refused: nothing is left behind.
#[test]
fn what_ends_early_gives_everything_back() {
    let model = model(GraphKind::Absorbing);
    let engine = Engine::start(options(1)).unwrap();
    let texts = vec![whole(sentences()[0].0.clone()); 50];
    let long = ask(&model, Likelihood::Bound { draws: 2000 }, texts);
    let mut cancelled = engine.score(&long).unwrap();
    assert!(matches!(engine.score(&long), Err(AdmitError::Exists(_))));
    assert!(engine.cancel(&Caller::new("test"), "score"));
    assert_eq!(last(&mut cancelled).failure, Some(Failure::Cancelled));
    drop(cancelled);
    drop(engine.score(&long).unwrap());
    assert!(idle(&engine));
    let late = ScoreRequest {
        deadline: Some(Deadline {
            at: Instant::now(),
            then: OnDeadline::Fail,
        }),
        ..long
    };
    assert!(matches!(engine.score(&late), Err(AdmitError::Deadline { .. })));
    assert!(idle(&engine));
}
