//! Failures stay where they happen: injected into networks, sessions and threads.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::atomic::AtomicUsize;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::tests::{end, idle, manifest, model, model_with, options, request, sentences, tokens};
use super::*;
use crate::diffusion::{GraphKind, Token};
use crate::network::closed_form::ClosedForm;
use crate::network::{Batch, NetworkError, ScoreNetwork, ScoreRows, Stop};

/// A network that does to each evaluation what `fault` says, or evaluates.
struct Faulty<F> {
    network: ClosedForm,
    fault: F,
}

/// What goes wrong with an evaluation.
enum Fault {
    Run,
    Memory,
    Contract,
    Panic,
    /// The rows of this canvas of the batch are NaN.
    Nan(usize),
}

impl<F> ScoreNetwork for Faulty<F>
where
    F: FnMut(&Batch<'_>) -> Option<Fault> + Send,
{
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        match (self.fault)(batch) {
            None => self.network.log_score(batch, read),
            Some(Fault::Run) => Err(NetworkError::Run("injected".to_owned())),
            Some(Fault::Memory) => Err(NetworkError::Memory("injected".to_owned())),
            Some(Fault::Contract) => Err(NetworkError::Contract("injected".to_owned())),
            // Without the hook that prints where.
            Some(Fault::Panic) => std::panic::resume_unwind(Box::new("injected")),
            Some(Fault::Nan(canvas)) => self.network.log_score(batch, &mut |rows| {
                let bad = |position: i64| position as usize / batch.length == canvas;
                let data: Vec<f32> = (0..batch.positions.len())
                    .flat_map(|row| {
                        let bad = bad(batch.positions[row]);
                        let row = rows.row(row).into_owned();
                        row.into_iter().map(move |x| if bad { f32::NAN } else { x })
                    })
                    .collect();
                read(ScoreRows::packed(&data, rows.vocab()));
            }),
        }
    }
}

/// A model whose evaluations `fault` disturbs; every session has a copy of it.
fn faulty<F>(graph: GraphKind, fault: F) -> Arc<ServedModel>
where
    F: FnMut(&Batch<'_>) -> Option<Fault> + Clone + Send + Sync + 'static,
{
    let noise = manifest(graph).graph();
    model_with(
        graph,
        Box::new(move || {
            Ok(Box::new(Faulty {
                network: ClosedForm::new(noise, sentences()),
                fault: fault.clone(),
            }))
        }),
    )
}

/// Faults on the first `count` evaluations of all sessions together.
fn first(
    count: usize,
    fault: fn(usize) -> Fault,
) -> impl FnMut(&Batch<'_>) -> Option<Fault> + Clone + Send + Sync {
    let left = Arc::new(AtomicUsize::new(count));
    move |_| {
        let left = left.try_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        left.ok().map(fault)
    }
}

fn undisturbed(model: &Arc<ServedModel>, number: u32) -> Vec<Vec<Token>> {
    tokens(
        &mut Engine::start(options(1))
            .unwrap()
            .admit(request(model, number))
            .unwrap(),
    )
}

#[test]
fn failed_passes_are_tried_again_with_the_same_outcome() {
    let sound = model(GraphKind::Absorbing);
    let alternately = |n: usize| {
        if n.is_multiple_of(2) {
            Fault::Panic
        } else {
            Fault::Run
        }
    };
    let engine = Engine::start(options(1)).unwrap();
    let healing = faulty(GraphKind::Absorbing, first(2, alternately));
    // Two canvases: they fail together, then one of them alone.
    assert_eq!(
        tokens(&mut engine.admit(request(&healing, 5)).unwrap()),
        undisturbed(&sound, 5)
    );
    // One fault too many ends the canvas, names the request and leaves the worker alive.
    let lasting = faulty(GraphKind::Absorbing, first(3, alternately));
    let mut lost = engine.admit(request(&lasting, 4)).unwrap();
    let Phase::Failed(Failure::Worker { request: named }) = end(&mut lost.canvases[0]).phase else {
        panic!()
    };
    assert_eq!(named, "request-4");
    assert_eq!(
        tokens(&mut engine.admit(request(&lasting, 5)).unwrap()),
        undisturbed(&sound, 5)
    );
}

#[test]
fn a_model_that_cannot_be_loaded_fails_its_own_requests_alone() {
    let engine = Engine::start(options(1)).unwrap();
    let broken = model_with(
        GraphKind::Absorbing,
        Box::new(|| Err(NetworkError::Load("injected".to_owned()))),
    );
    let sound = model(GraphKind::Absorbing);
    let expected: Vec<_> = (0..8).map(|n| undisturbed(&sound, 2 * n + 1)).collect();
    let (mut good, mut refused) = (Vec::new(), 0);
    for n in 0..8 {
        match engine.admit(request(&broken, 2 * n)) {
            Ok(mut waits) => {
                let phase = end(&mut waits.canvases[0]).phase;
                assert!(matches!(phase, Phase::Failed(Failure::Model { .. })), "{phase:?}");
            }
            Err(AdmitError::Model { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        good.push(engine.admit(request(&sound, 2 * n + 1)).unwrap());
    }
    assert!(
        refused > 0,
        "once the model is known to fail, requests are refused"
    );
    for (generation, expected) in good.iter_mut().zip(expected) {
        assert_eq!(tokens(generation), expected);
    }
    assert!(idle(&engine));
}

#[test]
fn a_model_that_heals_is_served_again() {
    let engine = Engine::start(options(1)).unwrap();
    let left = AtomicUsize::new(3);
    let noise = manifest(GraphKind::Absorbing).graph();
    let healing = model_with(
        GraphKind::Absorbing,
        Box::new(move || {
            let fails = left.try_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
            match fails {
                Ok(_) => Err(NetworkError::Load("injected".to_owned())),
                Err(_) => Ok(Box::new(ClosedForm::new(noise, sentences()))),
            }
        }),
    );
    let phase = end(&mut engine.admit(request(&healing, 2)).unwrap().canvases[0]).phase;
    assert!(matches!(phase, Phase::Failed(Failure::Model { .. })), "{phase:?}");
    // It is tried again without being asked for.
    while matches!(engine.state(&healing), ModelState::Failed { .. }) {
        std::thread::yield_now();
    }
    let mut healed = engine.admit(request(&healing, 2)).unwrap();
    assert_eq!(tokens(&mut healed), undisturbed(&model(GraphKind::Absorbing), 2));
}

#[test]
fn loading_one_model_delays_no_other() {
    let engine = Engine::start(options(1)).unwrap();
    let gate = Arc::new(Mutex::new(()));
    let (noise, door) = (manifest(GraphKind::Absorbing).graph(), Arc::clone(&gate));
    let slow = model_with(
        GraphKind::Absorbing,
        Box::new(move || {
            drop(door.lock());
            Ok(Box::new(ClosedForm::new(noise, sentences())))
        }),
    );
    let closed = gate.lock();
    let sound = model(GraphKind::Absorbing);
    let mut waits = engine.admit(request(&slow, 0)).unwrap();
    let mut abandoned = engine.admit(request(&slow, 2)).unwrap();
    // All of these end while the other model is being loaded.
    for n in [1, 3, 5, 7] {
        let mut generation = engine.admit(request(&sound, n)).unwrap();
        assert_eq!(tokens(&mut generation), undisturbed(&sound, n));
    }
    // What waits for a load can be cancelled.
    assert!(engine.cancel(&Caller::new("test"), "request-2"));
    let phase = end(&mut abandoned.canvases[0]).phase;
    assert!(matches!(phase, Phase::Failed(Failure::Cancelled)), "{phase:?}");
    drop(closed);
    assert_eq!(tokens(&mut waits), undisturbed(&sound, 0));
    assert!(idle(&engine));
}

#[test]
fn a_network_that_breaks_its_contract_fails_its_model() {
    let engine = Engine::start(options(1)).unwrap();
    let broken = faulty(GraphKind::Absorbing, |_| Some(Fault::Contract));
    let mut both = engine.admit(request(&broken, 1)).unwrap();
    for receiver in &mut both.canvases {
        let phase = end(receiver).phase;
        assert!(matches!(phase, Phase::Failed(Failure::Model { .. })), "{phase:?}");
    }
    assert!(idle(&engine));
}

/// Whether a batch holds a canvas that begins with token 3, which no free canvas of the tests is clamped to.
fn poisoned(batch: &Batch<'_>) -> Option<usize> {
    batch
        .tokens
        .chunks(batch.length)
        .position(|canvas| canvas[0] == 3)
}

#[test]
fn a_poison_canvas_fails_alone() {
    let kinds: [fn(&Batch<'_>) -> Option<Fault>; 3] = [
        |batch| poisoned(batch).map(|_| Fault::Run),
        |batch| poisoned(batch).map(|_| Fault::Panic),
        |batch| poisoned(batch).map(Fault::Nan),
    ];
    // Sentences that begin with 0 go on unharmed.
    let template: Arc<[Option<Token>]> = [Some(0), None, None, None, None, None].into();
    let clamped = |model: &Arc<ServedModel>, number: u32| Request {
        template: Arc::clone(&template),
        ..request(model, number)
    };
    let sound = model(GraphKind::Absorbing);
    for fault in kinds {
        let engine = Engine::start(options(1)).unwrap();
        let model = faulty(GraphKind::Absorbing, fault);
        let mut poison = engine
            .admit(Request {
                id: "poison".to_owned(),
                template: [Some(3), None, None, None, None, None].into(),
                ..request(&model, 2)
            })
            .unwrap();
        let mut neighbours: Vec<_> = (0..8)
            .map(|n| engine.admit(clamped(&model, n)).unwrap())
            .collect();
        let phase = end(&mut poison.canvases[0]).phase;
        assert!(
            matches!(phase, Phase::Failed(Failure::Worker { .. })),
            "{phase:?}"
        );
        for (n, neighbour) in (0..8).zip(&mut neighbours) {
            let alone = tokens(
                &mut Engine::start(options(1))
                    .unwrap()
                    .admit(clamped(&sound, n))
                    .unwrap(),
            );
            assert_eq!(tokens(neighbour), alone);
        }
        assert!(idle(&engine));
    }
}

/// A network that fails, and takes its worker's thread with it when it is dropped.
struct Deadly;

impl ScoreNetwork for Deadly {
    fn log_score(&mut self, _: &Batch<'_>, _: &mut dyn FnMut(ScoreRows<'_>)) -> Result<(), NetworkError> {
        Err(NetworkError::Run("injected".to_owned()))
    }
}

impl Drop for Deadly {
    fn drop(&mut self) {
        let thread = std::thread::current();
        if thread.name().is_some_and(|name| name.starts_with("denoise-")) {
            std::panic::resume_unwind(Box::new("injected"));
        }
    }
}

#[test]
fn a_thread_that_dies_is_replaced_and_what_it_had_is_told() {
    let engine = Engine::start(options(1)).unwrap();
    let deadly = model_with(GraphKind::Absorbing, Box::new(|| Ok(Box::new(Deadly))));
    let sound = model(GraphKind::Absorbing);
    for round in 0..3 {
        let mut lost = engine.admit(request(&deadly, 2)).unwrap();
        let phase = end(&mut lost.canvases[0]).phase;
        assert!(
            matches!(phase, Phase::Failed(Failure::Worker { .. })),
            "{phase:?}"
        );
        drop(lost);
        let mut after = engine.admit(request(&sound, 2 * round + 1)).unwrap();
        assert_eq!(tokens(&mut after), undisturbed(&sound, 2 * round + 1));
    }
    assert!(idle(&engine) && engine.shared.running.is_empty());
}

/// Faults of the test below, on both graphs together.
const FAULTS: usize = 10_000;

/// Random faults on every third evaluation or so, seed fixed: nothing is lost, doubled or stuck, and whatever is
/// finished has the tokens of the undisturbed run.
#[test]
fn random_faults_lose_nothing() {
    let many = |workers| EngineOptions {
        max_running_requests: 500,
        ..options(workers)
    };
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        let random = Arc::new(Mutex::new(ChaCha8Rng::seed_from_u64(7)));
        let faults = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&faults);
        let model = faulty(graph, move |batch| {
            let fault = match random.lock().next_u32() % 240 {
                0..30 => Fault::Run,
                30..55 => Fault::Panic,
                55..60 => Fault::Memory,
                60 => Fault::Nan(batch.sigma.len() / 2),
                _ => return None,
            };
            count.fetch_add(1, Ordering::AcqRel);
            Some(fault)
        });
        let sound = super::tests::model(graph);
        let calm = Engine::start(many(1)).unwrap();
        let mut expected: Vec<_> = (0..500)
            .map(|n| calm.admit(request(&sound, n)).unwrap())
            .collect();
        let expected: Vec<_> = expected.iter_mut().map(tokens).collect();
        let engine = Engine::start(many(3)).unwrap();
        let (mut done, mut given_up) = (0, 0);
        while faults.load(Ordering::Acquire) < FAULTS / 2 {
            let mut generations: Vec<_> = (0..500)
                .map(|n| engine.admit(request(&model, n)).unwrap())
                .collect();
            for (generation, expected) in generations.iter_mut().zip(&expected) {
                for (receiver, expected) in generation.canvases.iter_mut().zip(expected) {
                    let state = end(receiver);
                    match state.phase {
                        Phase::Done(_) => {
                            assert_eq!(*state.tokens, **expected);
                            done += 1;
                        }
                        Phase::Failed(Failure::Worker { .. }) => given_up += 1,
                        phase @ (Phase::Running | Phase::Failed(_)) => panic!("{phase:?}"),
                    }
                }
            }
        }
        // With a quarter of its evaluations failing, alone, a canvas is given up now and then.
        assert!(done > given_up, "{done} done, {given_up} given up");
        assert!(idle(&engine) && engine.shared.running.is_empty() && engine.shared.queue.is_empty());
    }
}

/// A network that hangs on batches that hold a canvas which begins with token 3, until it is let go: by being
/// stopped, where it `obeys`.
struct Hanging {
    network: ClosedForm,
    obeys: bool,
    stopped: Arc<AtomicBool>,
    let_go: Arc<AtomicBool>,
}

struct SetStopped(Arc<AtomicBool>);

impl Stop for SetStopped {
    fn stop(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl ScoreNetwork for Hanging {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        if poisoned(batch).is_none() {
            return self.network.log_score(batch, read);
        }
        while !self.let_go.load(Ordering::Acquire) {
            if self.obeys && self.stopped.load(Ordering::Acquire) {
                return Err(NetworkError::Run("stopped".to_owned()));
            }
            std::thread::yield_now();
        }
        self.network.log_score(batch, read)
    }

    fn stop_handle(&self) -> Option<Arc<dyn Stop>> {
        Some(Arc::new(SetStopped(Arc::clone(&self.stopped))))
    }
}

fn hanging(obeys: bool, let_go: &Arc<AtomicBool>) -> Arc<ServedModel> {
    let (noise, let_go) = (manifest(GraphKind::Absorbing).graph(), Arc::clone(let_go));
    model_with(
        GraphKind::Absorbing,
        Box::new(move || {
            Ok(Box::new(Hanging {
                network: ClosedForm::new(noise, sentences()),
                obeys,
                stopped: Arc::default(),
                let_go: Arc::clone(&let_go),
            }))
        }),
    )
}

#[test]
fn a_pass_that_hangs_is_ended_and_its_neighbours_go_on() {
    for obeys in [true, false] {
        let let_go = Arc::new(AtomicBool::new(false));
        let (model, sound) = (hanging(obeys, &let_go), model(GraphKind::Absorbing));
        let engine = Engine::start(EngineOptions {
            max_pass: Duration::from_millis(50),
            last_chance: if obeys {
                Duration::from_secs(60)
            } else {
                Duration::from_millis(50)
            },
            ..options(1)
        })
        .unwrap();
        let mut hangs = engine
            .admit(Request {
                id: "hangs".to_owned(),
                template: [Some(3), None, None, None, None, None].into(),
                canvases: 1,
                ..request(&model, 2)
            })
            .unwrap();
        let mut neighbours: Vec<_> = [1, 3, 5, 7]
            .map(|n| engine.admit(request(&sound, n)).unwrap())
            .into();
        let phase = end(&mut hangs.canvases[0]).phase;
        assert!(
            matches!(phase, Phase::Failed(Failure::Worker { .. })),
            "obeys: {obeys}, {phase:?}"
        );
        for (n, neighbour) in [1, 3, 5, 7].into_iter().zip(&mut neighbours) {
            assert_eq!(tokens(neighbour), undisturbed(&sound, n));
        }
        // Its room and its id are free, though a thread may still be at it, and its model is served.
        assert!(idle(&engine), "obeys: {obeys}");
        assert!(engine.shared.running.is_empty());
        let free: Arc<[Option<Token>]> = [Some(0), None, None, None, None, None].into();
        let after = |model: &Arc<ServedModel>| Request {
            id: "hangs".to_owned(),
            template: Arc::clone(&free),
            ..request(model, 4)
        };
        let mut again = engine.admit(after(&model)).unwrap();
        let calm = Engine::start(options(1)).unwrap();
        let expected = tokens(&mut calm.admit(after(&sound)).unwrap());
        assert_eq!(tokens(&mut again), expected, "obeys: {obeys}");
        let_go.store(true, Ordering::Release);
    }
}

#[test]
fn shutting_down_stops_what_hangs() {
    let let_go = Arc::new(AtomicBool::new(false));
    let model = hanging(true, &let_go);
    let engine = Engine::start(options(1)).unwrap();
    let mut hangs = engine
        .admit(Request {
            template: [Some(3), None, None, None, None, None].into(),
            ..request(&model, 2)
        })
        .unwrap();
    engine.shut_down();
    let phase = end(&mut hangs.canvases[0]).phase;
    assert!(
        matches!(phase, Phase::Failed(Failure::ShutDown | Failure::Worker { .. })),
        "{phase:?}"
    );
    assert!(idle(&engine), "the thread has come back");
}

/// A device with room for two canvases: larger passes are halved until they fit, and nobody is harmed.
#[test]
fn a_device_without_memory_gets_smaller_passes() {
    let largest = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&largest);
    let model = faulty(GraphKind::Absorbing, move |batch| {
        let canvases = batch.tokens.len() / batch.length;
        if canvases > 2 {
            return Some(Fault::Memory);
        }
        seen.fetch_max(canvases, Ordering::AcqRel);
        None
    });
    let sound = super::tests::model(GraphKind::Absorbing);
    let engine = Engine::start(options(1)).unwrap();
    let mut generations: Vec<_> = (0..24)
        .map(|n| engine.admit(request(&model, n)).unwrap())
        .collect();
    for (n, generation) in (0..24).zip(&mut generations) {
        assert_eq!(tokens(generation), undisturbed(&sound, n));
    }
    assert_eq!(
        largest.load(Ordering::Acquire),
        2,
        "nor are they smaller than they must be"
    );
    assert!(idle(&engine));
}

#[test]
fn a_canvas_that_never_fits_into_memory_is_given_up() {
    let engine = Engine::start(options(1)).unwrap();
    let model = faulty(GraphKind::Absorbing, |_| Some(Fault::Memory));
    let mut lost = engine.admit(request(&model, 3)).unwrap();
    for receiver in &mut lost.canvases {
        let phase = end(receiver).phase;
        assert!(
            matches!(phase, Phase::Failed(Failure::Worker { .. })),
            "{phase:?}"
        );
    }
    assert!(idle(&engine));
}
