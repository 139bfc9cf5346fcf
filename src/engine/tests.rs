//! What callers of the engine rely on, with a closed-form network.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::atomic::AtomicUsize;

use tokio::sync::watch;

use super::plan::{Plan, Sampling};
use super::*;
use crate::bundle::{FORMAT, Frame, MODEL, Manifest};
use crate::diffusion::Parameterization;
use crate::diffusion::sampler::TimeGrid;
use crate::diffusion::{GraphKind, SamplerKind, Schedule, Token, TokenChoice};
use crate::models::NetworkSource;
use crate::network::closed_form::ClosedForm;
use crate::network::{Batch, NetworkError, Output, ScoreNetwork, ScoreRows};

const LENGTH: usize = 6;

pub(super) fn options(workers: usize) -> EngineOptions {
    EngineOptions {
        devices: 1,
        workers,
        threads: 2,
        batch_tokens: 8 * LENGTH,
        output_bytes: 1 << 20,
        max_queue: Duration::from_secs(1000),
        caller_share: 1.0,
        network_bytes: u64::MAX,
        max_running_requests: 64,
        max_pass: Duration::from_secs(60),
        last_chance: Duration::from_secs(60),
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
        excluded_tokens: Vec::new(),
        frame: Frame::default(),
        end_of_document: None,
        max_length: LENGTH,
        time_conditioned: true,
        two_stage: false,
        defaults: None,
        sha256: [(MODEL.to_owned(), String::new())].into(),
        provenance: serde_json::Value::Null,
    }
}

/// Three sentences that share tokens, so that positions depend on each other.
pub(super) fn sentences() -> Vec<(Vec<Token>, f64)> {
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

pub(super) fn model_with(graph: GraphKind, network: NetworkSource) -> Arc<ServedModel> {
    Arc::new(ServedModel::without_bundle(manifest(graph), 1, network))
}

pub(super) fn model(graph: GraphKind) -> Arc<ServedModel> {
    let noise = manifest(graph).graph();
    model_with(
        graph,
        Box::new(move || Ok(Box::new(ClosedForm::new(noise, sentences())))),
    )
}

/// The first canvas of a plan.
pub(super) fn fresh(plan: &Arc<Plan>, template: &[Option<Token>], seed: u64, index: u64) -> Canvas {
    Canvas::new(plan, &Beginning::new(plan, &template.into()), seed, index)
}

pub(super) fn request(model: &Arc<ServedModel>, number: u32) -> Request {
    Request {
        id: format!("request-{number}"),
        caller: Caller::new("test"),
        model: Arc::clone(model),
        template: vec![None; LENGTH].into(),
        sampling: Sampling {
            grid: TimeGrid::new(5 + 3 * (number % 7)),
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
        deadline: None,
        priority: 0,
        resume: Resume::default(),
        allowed: None,
        draft: None,
    }
}

/// The last state of a canvas.
pub(super) fn end(receiver: &mut watch::Receiver<State>) -> State {
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

pub(super) fn tokens(generation: &mut Generation) -> Vec<Vec<Token>> {
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

/// Notes how many bytes the largest evaluation gives.
struct Measured {
    network: ClosedForm,
    all_rows: bool,
    largest: Arc<AtomicUsize>,
}

impl ScoreNetwork for Measured {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let rows = if self.all_rows {
            batch.tokens.len()
        } else {
            batch.positions.len()
        };
        self.largest
            .fetch_max(rows * 5 * size_of::<f32>(), Ordering::AcqRel);
        self.network.log_score(batch, read)
    }

    fn output(&self) -> Output {
        Output {
            all_rows: self.all_rows,
            ..Output::default()
        }
    }
}

#[test]
fn passes_give_no_more_bytes_than_they_may() {
    let sound = model(GraphKind::Absorbing);
    let row = 5 * size_of::<f32>();
    for (all_rows, rows) in [(false, 15), (true, 15), (false, 2), (true, 2)] {
        let largest = Arc::new(AtomicUsize::new(0));
        let (noise, seen) = (manifest(GraphKind::Absorbing).graph(), Arc::clone(&largest));
        let measured = model_with(
            GraphKind::Absorbing,
            Box::new(move || {
                Ok(Box::new(Measured {
                    network: ClosedForm::new(noise, sentences()),
                    all_rows,
                    largest: Arc::clone(&seen),
                }))
            }),
        );
        let engine = Engine::start(EngineOptions {
            output_bytes: rows * row,
            ..options(1)
        })
        .unwrap();
        // What a network gives is known from then on.
        tokens(&mut engine.admit(request(&measured, 0)).unwrap());
        let mut many: Vec<_> = (1..16)
            .map(|n| engine.admit(request(&measured, n)).unwrap())
            .collect();
        for (number, generation) in (1..).zip(&mut many) {
            let alone = tokens(
                &mut Engine::start(options(1))
                    .unwrap()
                    .admit(request(&sound, number))
                    .unwrap(),
            );
            assert_eq!(tokens(generation), alone);
        }
        let (most, one) = (largest.load(Ordering::Acquire) / row, LENGTH);
        assert!(most <= rows.max(one), "{most} rows, {rows} allowed");
        assert!(most >= one.min(rows), "the budget is used: {most} of {rows}");
    }
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
    let Phase::Done(_) = state.phase else {
        panic!("not done")
    };
    for (clamped, committed) in state.clamped.iter().zip(state.committed_at.iter()) {
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
        // 40 evaluations, each of 5 ms as long as nothing is measured.
        max_queue: Duration::from_millis(200),
        ..options(1)
    })
    .unwrap();
    let (gate, model) = gated();
    let closed = gate.lock();
    let sampling = Sampling {
        grid: TimeGrid::new(29),
        ..request(&model, 0).sampling
    };
    let mut first = engine
        .admit(Request {
            sampling,
            ..request(&model, 0)
        })
        .unwrap();
    let refused = engine.admit(Request {
        sampling,
        ..request(&model, 2)
    });
    assert!(
        matches!(refused, Err(AdmitError::NoRoom(NoRoom::Server(room))) if room.waiting.as_millis() == 150 && room.limit.as_millis() == 200)
    );
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
                sampling,
                ..request(&model, 2)
            })
            .is_ok()
    );
}

pub(super) fn idle(engine: &Engine) -> bool {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(engine.idle_within(Duration::from_secs(30)))
}

/// What the counters of `engine` say, as they are scraped.
fn scraped(engine: &Engine) -> String {
    let mut registry = prometheus_client::registry::Registry::default();
    engine.counters().register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

#[test]
fn every_refusal_and_every_ending_is_counted() {
    let engine = Engine::start(EngineOptions {
        max_queue: Duration::from_millis(400),
        caller_share: 0.5,
        max_running_requests: 4,
        ..options(1)
    })
    .unwrap();
    let (gate, model) = gated();
    let closed = gate.lock();
    // 30 evaluations, each of 5 ms as long as nothing is measured.
    let long = |number: u32, caller: &str, steps| Request {
        sampling: Sampling {
            grid: TimeGrid::new(steps),
            ..request(&model, 0).sampling
        },
        caller: Caller::new(caller),
        ..request(&model, number)
    };
    let mut cancelled = engine.admit(long(0, "a", 29)).unwrap();
    let refused = |request| drop(engine.admit(request).unwrap_err());
    refused(long(4, "a", 99));
    refused(long(4, "a", 29));
    let mut abandoned = engine.admit(long(2, "b", 29)).unwrap();
    refused(long(4, "c", 29));
    refused(long(0, "a", 1));
    assert!(engine.cancel(&Caller::new("a"), "request-0"));
    abandoned.canvases.clear();
    // One of them may be in a pass.
    drop(closed);
    end(&mut cancelled.canvases[0]);
    let mut done = engine.admit(long(6, "a", 3)).unwrap();
    let steps = end(&mut done.canvases[0]).nfe;
    assert!(idle(&engine));
    engine.drain();
    refused(long(8, "a", 1));
    let text = scraped(&engine);
    for line in [
        "requests_refused_total{reason=\"too_much\"} 1",
        "requests_refused_total{reason=\"caller_share\"} 1",
        "requests_refused_total{reason=\"server_full\"} 1",
        "requests_refused_total{reason=\"id_exists\"} 1",
        "requests_refused_total{reason=\"draining\"} 1",
        "canvases_ended_total{outcome=\"cancelled\"} 1",
        "canvases_ended_total{outcome=\"abandoned\"} 1",
        "canvases_ended_total{outcome=\"done\"} 1",
        "streams_unread_total 0",
    ] {
        assert!(
            text.lines().any(|other| other == line),
            "{line} is not in\n{text}"
        );
    }
    // Whatever was not spent was given back.
    let number = |name: &str| -> u32 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    };
    assert!(number("evaluations_total") >= steps);
    assert!(number("evaluations_given_back_total") <= 4 - steps);
}

#[test]
fn cancelled_and_abandoned_canvases_leave_at_once() {
    let engine = Engine::start(options(1)).unwrap();
    let (gate, model) = gated();
    let closed = gate.lock();
    // Of another length than what follows, so that the worker is busy with it and with nothing else.
    let mut busy = engine
        .admit(Request {
            template: vec![None; 3].into(),
            ..request(&model, 6)
        })
        .unwrap();
    let occupied = engine.shared.admission.waiting();
    let mut cancelled = engine.admit(request(&model, 1)).unwrap();
    let abandoned = engine.admit(request(&model, 3)).unwrap();
    assert!(engine.shared.admission.waiting() > occupied);
    assert!(engine.cancel(&Caller::new("test"), "request-1"));
    assert!(!engine.cancel(&Caller::new("test"), "request-77"));
    drop(abandoned);
    // No pass has ended yet.
    assert_eq!(engine.shared.admission.waiting(), occupied);
    assert_eq!(engine.shared.running.len(), 1);
    for receiver in &mut cancelled.canvases {
        assert!(matches!(end(receiver).phase, Phase::Failed(Failure::Cancelled)));
    }
    drop(closed);
    tokens(&mut busy);
    assert!(idle(&engine) && engine.shared.running.is_empty());
}

#[test]
fn what_runs_is_cancelled_after_its_pass() {
    let engine = Engine::start(options(1)).unwrap();
    let (gate, model) = gated();
    let closed = gate.lock();
    let mut running = engine.admit(request(&model, 4)).unwrap();
    while !engine.shared.queue.is_empty() {
        std::thread::yield_now();
    }
    assert!(engine.cancel(&Caller::new("test"), "request-4"));
    drop(closed);
    let state = end(&mut running.canvases[0]);
    assert!(
        matches!(state.phase, Phase::Failed(Failure::Cancelled)),
        "{state:?}"
    );
    assert!(idle(&engine) && engine.shared.running.is_empty());
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
        while !engine.shared.queue.is_closed() {
            std::thread::yield_now();
        }
        drop(closed);
    });
    for receiver in &mut generation.canvases {
        let state = end(receiver);
        assert!(
            matches!(state.phase, Phase::Failed(Failure::ShutDown)),
            "{state:?}"
        );
    }
}

/// A reader that never comes keeps neither the id nor a place among the running requests.
#[test]
fn a_request_ends_with_its_last_canvas_not_with_its_reader() {
    let engine = Engine::start(EngineOptions {
        max_running_requests: 1,
        ..options(1)
    })
    .unwrap();
    let model = model(GraphKind::Absorbing);
    let mut unread = Vec::new();
    for _ in 0..3 {
        let mut generation = engine.admit(request(&model, 1)).unwrap();
        tokens(&mut generation);
        // The canvas is told before its place is free.
        while !engine.shared.running.is_empty() {
            std::thread::yield_now();
        }
        unread.push(generation);
    }
}

/// Counts passes, and notes the number of the last one with short canvases.
struct Numbered {
    network: ClosedForm,
    passes: Arc<AtomicUsize>,
    last_short: Arc<AtomicUsize>,
    door: Arc<Mutex<()>>,
}

impl ScoreNetwork for Numbered {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        drop(self.door.lock());
        let number = self.passes.fetch_add(1, Ordering::AcqRel) + 1;
        if batch.length < LENGTH {
            self.last_short.store(number, Ordering::Release);
        }
        // So that a pass costs by its tokens, as real ones do, and not by what the machine is about.
        std::thread::sleep(Duration::from_micros(50) * batch.tokens.len() as u32);
        self.network.log_score(batch, read)
    }
}

/// A short request waits for at most one pass of others for each of its evaluations, whoever else asks for
/// however much, be it the same caller or another.
#[test]
fn a_short_request_is_not_held_up_by_long_ones() {
    for caller in ["test", "somebody else"] {
        let (passes, door) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(())));
        let noise = manifest(GraphKind::Absorbing).graph();
        let last_short = Arc::new(AtomicUsize::new(0));
        let (counter, last, gate) = (Arc::clone(&passes), Arc::clone(&last_short), Arc::clone(&door));
        let model = model_with(
            GraphKind::Absorbing,
            Box::new(move || {
                Ok(Box::new(Numbered {
                    network: ClosedForm::independent(noise, &[0.4, 0.3, 0.2, 0.1]),
                    passes: Arc::clone(&counter),
                    last_short: Arc::clone(&last),
                    door: Arc::clone(&gate),
                }))
            }),
        );
        let engine = Engine::start(options(1)).unwrap();
        let long = Sampling {
            grid: TimeGrid::new(4000),
            ..request(&model, 0).sampling
        };
        let long: Vec<_> = (0..32)
            .map(|number| {
                engine
                    .admit(Request {
                        sampling: long,
                        ..request(&model, 2 * number)
                    })
                    .unwrap()
            })
            .collect();
        while passes.load(Ordering::Acquire) < 10 {
            std::thread::yield_now();
        }
        let closed = door.lock();
        let before = passes.load(Ordering::Acquire);
        let mut short = engine
            .admit(Request {
                id: "short".to_owned(),
                caller: Caller::new(caller),
                template: vec![None; 2].into(),
                sampling: Sampling {
                    grid: TimeGrid::new(3),
                    ..request(&model, 0).sampling
                },
                ..request(&model, 0)
            })
            .unwrap();
        drop(closed);
        tokens(&mut short);
        let took = last_short.load(Ordering::Acquire) - before;
        assert!(took <= 2 * 4 + 2, "{caller}: 4 evaluations took {took} passes");
        drop(long);
    }
}

/// Null: sentences come out with the data's probabilities. Chi-square, 2 degrees of freedom,
/// significance 1e-3, seeds fixed. 64 steps leave a discretisation bias far below this resolution.
#[test]
fn outputs_follow_the_data_law() {
    let engine = Engine::start(options(1)).unwrap();
    let model = model(GraphKind::Absorbing);
    let sampling = Sampling {
        grid: TimeGrid::new(64),
        sampler: SamplerKind::Tweedie,
        choice: TokenChoice::default(),
        normalize: false,
    };
    let mut generation = engine
        .admit(Request {
            sampling,
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
