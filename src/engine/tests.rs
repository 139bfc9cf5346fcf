//! What callers of the engine rely on, with a closed-form network.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::bundle::{FORMAT, MODEL, Manifest, Parameterization};
use crate::diffusion::sampler::TimeGrid;
use crate::diffusion::{GraphKind, SamplerKind, Schedule, TokenChoice};
use crate::network::closed_form::ClosedForm;
use crate::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};

const LENGTH: usize = 6;

fn options(workers: usize) -> EngineOptions {
    EngineOptions {
        workers,
        threads: 2,
        batch_tokens: 8 * LENGTH,
        max_queued_rows: 100_000,
        max_running_requests: 64,
    }
}

pub(super) fn manifest(graph: GraphKind) -> Manifest {
    let vocab_size = 5;
    Manifest {
        format: FORMAT,
        name: "closed-form".to_owned(),
        graph,
        schedule: match graph {
            GraphKind::Absorbing => Schedule::LogLinear { eps: 1e-3 },
            GraphKind::Uniform => Schedule::Geometric {
                sigma_min: 1e-4,
                sigma_max: 8.0,
            },
        },
        parameterization: Parameterization::Score,
        sigma_offset: false,
        vocab_size,
        mask_token: (graph == GraphKind::Absorbing).then_some(4),
        end_of_document: None,
        max_length: LENGTH,
        time_conditioned: true,
        two_stage: false,
        sha256: [(MODEL.to_owned(), String::new())].into(),
        provenance: serde_json::Value::Null,
    }
}

/// Three sentences that share tokens, so that positions depend on each other.
fn sentences() -> Vec<(Vec<Token>, f64)> {
    vec![
        (vec![0, 1, 2, 3, 0, 1], 0.5),
        (vec![3, 2, 1, 0, 3, 2], 0.3),
        (vec![0, 0, 2, 2, 1, 1], 0.2),
    ]
}

/// A model without a network.
pub(super) fn model_of(manifest: Manifest) -> Arc<ServedModel> {
    let none: NetworkSource = Box::new(|| Err(NetworkError::Run("there is none".to_owned())));
    Arc::new(ServedModel::without_bundle(manifest, 1, none))
}

fn model_with(graph: GraphKind, network: NetworkSource) -> Arc<ServedModel> {
    Arc::new(ServedModel::without_bundle(manifest(graph), 1, network))
}

fn model(graph: GraphKind) -> Arc<ServedModel> {
    let noise = manifest(graph).graph();
    model_with(
        graph,
        Box::new(move || Ok(Box::new(ClosedForm::new(noise, sentences())))),
    )
}

fn request(model: &Arc<ServedModel>, number: u32) -> Request {
    Request {
        id: format!("request-{number}"),
        model: Arc::clone(model),
        template: vec![None; LENGTH].into(),
        plan: Plan {
            grid: TimeGrid {
                steps: 5 + 3 * (number % 7),
            },
            sampler: if number.is_multiple_of(2) {
                SamplerKind::Tweedie
            } else {
                SamplerKind::Euler
            },
            choice: TokenChoice {
                temperature: 0.5 + f64::from(number % 3) * 0.5,
                ..TokenChoice::default()
            },
            normalize: number % 4 == 3,
        },
        seed: u64::from(number) * 17,
        canvases: 1 + number % 2,
        publish: Publish::Steps,
    }
}

/// The last state of a canvas.
fn end(receiver: &mut watch::Receiver<State>) -> State {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(async {
            let ended = receiver.wait_for(|state| !matches!(state.phase, Phase::Running));
            tokio::time::timeout(Duration::from_secs(60), ended)
                .await
                .unwrap()
                .unwrap()
                .clone()
        })
}

fn tokens(generation: &mut Generation) -> Vec<Vec<Token>> {
    generation
        .canvases
        .iter_mut()
        .map(|receiver| {
            let state = end(receiver);
            assert!(matches!(state.phase, Phase::Done(_)), "{:?}", state.phase);
            state.tokens.to_vec()
        })
        .collect()
}

#[test]
fn tokens_do_not_depend_on_company_or_workers() {
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        let model = model(graph);
        let alone: Vec<_> = (0..16)
            .map(|n| {
                tokens(
                    &mut Engine::start(options(1))
                        .unwrap()
                        .admit(request(&model, n))
                        .unwrap(),
                )
            })
            .collect();
        for workers in [1, 3] {
            let engine = Engine::start(options(workers)).unwrap();
            let mut together: Vec<_> = (0..16)
                .map(|n| engine.admit(request(&model, n)).unwrap())
                .collect();
            for (generation, alone) in together.iter_mut().zip(&alone) {
                assert_eq!(&tokens(generation), alone, "{graph:?} with {workers} workers");
            }
        }
        assert!(
            alone.iter().any(|t| t != &alone[0]),
            "different seeds give different tokens"
        );
    }
}

/// Counts how many canvases each pass had.
struct Counting<N> {
    network: N,
    largest: Arc<AtomicUsize>,
}

impl<N: ScoreNetwork> ScoreNetwork for Counting<N> {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.largest.fetch_max(batch.sigma.len(), Ordering::AcqRel);
        self.network.log_score(batch, read)
    }
}

#[test]
fn different_requests_share_a_forward_pass() {
    let (largest, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(())));
    let noise = manifest(GraphKind::Absorbing).graph();
    let (seen, door) = (Arc::clone(&largest), Arc::clone(&gate));
    let model = model_with(
        GraphKind::Absorbing,
        Box::new(move || {
            // Loading waits until all requests are queued.
            drop(door.lock());
            Ok(Box::new(Counting {
                network: ClosedForm::new(noise, sentences()),
                largest: Arc::clone(&seen),
            }))
        }),
    );
    let engine = Engine::start(options(1)).unwrap();
    let closed = gate.lock();
    let mut generations: Vec<_> = (0..8)
        .map(|n| engine.admit(request(&model, n)).unwrap())
        .collect();
    drop(closed);
    generations.iter_mut().for_each(|g| drop(tokens(g)));
    assert_eq!(largest.load(Ordering::Acquire), 8, "the batch's room is used");
}

#[test]
fn clamped_positions_never_change() {
    let engine = Engine::start(options(1)).unwrap();
    let model = model(GraphKind::Absorbing);
    let template: Arc<[Option<Token>]> = [Some(3), None, None, Some(0), None, None].into();
    let mut generation = engine
        .admit(Request {
            template,
            ..request(&model, 2)
        })
        .unwrap();
    // Only one sentence fits these clamps.
    assert_eq!(tokens(&mut generation), [[3, 2, 1, 0, 3, 2]]);
    let state = generation.canvases[0].borrow().clone();
    let Phase::Done(outcome) = state.phase else {
        panic!("not done")
    };
    for (clamped, committed) in state.clamped.iter().zip(&outcome.committed_at) {
        assert_eq!(*clamped, *committed == 0);
    }
    assert!(state.nfe >= 1 && state.masked == 0 && state.step == state.total && state.t == 0.0);
}

/// Waits at a gate in every evaluation.
struct Gated(ClosedForm, Arc<Mutex<()>>);

impl ScoreNetwork for Gated {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        drop(self.1.lock());
        self.0.log_score(batch, read)
    }
}

fn gated() -> (Arc<Mutex<()>>, Arc<ServedModel>) {
    let gate = Arc::new(Mutex::new(()));
    let (noise, door) = (manifest(GraphKind::Absorbing).graph(), Arc::clone(&gate));
    let network: NetworkSource = Box::new(move || {
        Ok(Box::new(Gated(
            ClosedForm::new(noise, sentences()),
            Arc::clone(&door),
        )))
    });
    (gate, model_with(GraphKind::Absorbing, network))
}

#[test]
fn admission_is_bounded_and_room_comes_back() {
    let engine = Engine::start(EngineOptions {
        max_queued_rows: 40,
        ..options(1)
    })
    .unwrap();
    let (gate, model) = gated();
    let closed = gate.lock();
    let plan = Plan {
        grid: TimeGrid { steps: 29 },
        ..request(&model, 0).plan
    };
    let mut first = engine
        .admit(Request {
            plan,
            ..request(&model, 0)
        })
        .unwrap();
    let refused = engine.admit(Request {
        plan,
        ..request(&model, 2)
    });
    assert!(matches!(refused, Err(AdmitError::Full(full)) if full.queued == 30 && full.limit == 40));
    let again = engine.admit(Request {
        id: "request-0".to_owned(),
        ..request(&model, 2)
    });
    assert!(matches!(again, Err(AdmitError::Exists(_))), "{again:?}");
    drop(closed);
    tokens(&mut first);
    assert!(
        engine
            .admit(Request {
                plan,
                ..request(&model, 2)
            })
            .is_ok()
    );
}

#[test]
fn cancelled_and_abandoned_canvases_stop_and_free_their_room() {
    let engine = Engine::start(options(1)).unwrap();
    let (gate, model) = gated();
    let closed = gate.lock();
    let mut cancelled = engine.admit(request(&model, 1)).unwrap();
    let abandoned = engine.admit(request(&model, 3)).unwrap();
    assert!(engine.cancel("request-1"));
    assert!(!engine.cancel("request-77"));
    drop(abandoned);
    drop(closed);
    for receiver in &mut cancelled.canvases {
        assert!(matches!(
            end(receiver).phase,
            Phase::Failed(Failure::Cancelled) | Phase::Done(_)
        ));
    }
    // Both have given back their room once the queue has passed over them.
    let mut after = engine.admit(request(&model, 4)).unwrap();
    tokens(&mut after);
    let idle = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(engine.idle_within(Duration::from_secs(30)));
    assert!(idle);
}

#[test]
fn shutting_down_ends_what_waits() {
    let engine = Engine::start(options(1)).unwrap();
    let (gate, model) = gated();
    let closed = gate.lock();
    let mut generation = engine.admit(request(&model, 1)).unwrap();
    engine.drain();
    assert!(matches!(
        engine.admit(request(&model, 2)),
        Err(AdmitError::Draining)
    ));
    std::thread::scope(|scope| {
        scope.spawn(|| engine.shut_down());
        drop(closed);
    });
    for receiver in &mut generation.canvases {
        assert!(matches!(
            end(receiver).phase,
            Phase::Failed(Failure::ShutDown) | Phase::Done(_)
        ));
    }
}

/// Panics, fails or answers NaN on its first evaluations.
struct Faulty {
    network: ClosedForm,
    faults: Arc<AtomicUsize>,
}

impl ScoreNetwork for Faulty {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let left = self
            .faults
            .try_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        match left {
            Ok(n) if n.is_multiple_of(2) => panic!("injected"),
            Ok(_) => Err(NetworkError::Run("injected".to_owned())),
            Err(_) => self.network.log_score(batch, read),
        }
    }
}

fn faulty(faults: usize) -> Arc<ServedModel> {
    let (noise, left) = (
        manifest(GraphKind::Absorbing).graph(),
        Arc::new(AtomicUsize::new(faults)),
    );
    model_with(
        GraphKind::Absorbing,
        Box::new(move || {
            let network = ClosedForm::new(noise, sentences());
            Ok(Box::new(Faulty {
                network,
                faults: Arc::clone(&left),
            }))
        }),
    )
}

#[test]
fn failed_steps_are_tried_again_with_the_same_outcome() {
    let sound = tokens(
        &mut Engine::start(options(1))
            .unwrap()
            .admit(request(&model(GraphKind::Absorbing), 5))
            .unwrap(),
    );
    let engine = Engine::start(options(1)).unwrap();
    assert_eq!(tokens(&mut engine.admit(request(&faulty(2), 5)).unwrap()), sound);
    // One fault too many ends the canvas, names the request and leaves the worker alive.
    let mut lost = engine
        .admit(Request {
            canvases: 1,
            ..request(&faulty(3), 5)
        })
        .unwrap();
    let Phase::Failed(Failure::Worker { request: named }) = end(&mut lost.canvases[0]).phase else {
        panic!()
    };
    assert_eq!(named, "request-5");
    drop(lost);
    assert_eq!(
        tokens(&mut engine.admit(request(&model(GraphKind::Absorbing), 5)).unwrap()),
        sound
    );
}

/// Null: sentences come out with the data's probabilities. Chi-square, 2 degrees of freedom,
/// significance 1e-3, seeds fixed. 64 steps leave a discretisation bias far below this resolution.
#[test]
fn outputs_follow_the_data_law() {
    let engine = Engine::start(options(1)).unwrap();
    let model = model(GraphKind::Absorbing);
    let plan = Plan {
        grid: TimeGrid { steps: 64 },
        sampler: SamplerKind::Tweedie,
        choice: TokenChoice::default(),
        normalize: false,
    };
    let mut generation = engine
        .admit(Request {
            plan,
            canvases: 900,
            ..request(&model, 0)
        })
        .unwrap();
    let (mut counts, mut other) = ([0.0; 3], 0);
    for canvas in tokens(&mut generation) {
        match sentences().iter().position(|(sentence, _)| *sentence == canvas) {
            Some(i) => counts[i] += 1.0,
            None => other += 1,
        }
    }
    let total: f64 = counts.iter().sum();
    assert!(f64::from(other) < 0.1 * total, "{other} canvases are no sentence");
    let chi: f64 = sentences()
        .iter()
        .zip(counts)
        .map(|((_, p), c)| (c - p * total).powi(2) / (p * total))
        .sum();
    assert!(chi < 13.8, "{counts:?}: {chi}");
}
