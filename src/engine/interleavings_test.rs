//! Queue, admission, loading and cancellation under a scheduler that tries interleavings (`make test-interleavings`).
//!
//! Every test is run again and again, with another order of its threads each time: one thread runs at a time, and
//! which it is is drawn wherever a lock is taken or given back. A run that ends with a thread waiting for ever fails.
//! `DENOISED_INTERLEAVINGS` says how many are tried.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;

use shuttle::scheduler::RandomScheduler;
use shuttle::{Config, Runner, thread};
use tokio::sync::watch;

use super::admission::{Admission, Asked};
use super::tests::{manifest, model_with, options, request, sentences};
use super::*;
use crate::diffusion::{GraphKind, Token};
use crate::models::NetworkSource;
use crate::network::closed_form::ClosedForm;
use crate::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};

fn explore(test: impl Fn() + Send + Sync + 'static) {
    let asked = std::env::var("DENOISED_INTERLEAVINGS");
    let iterations = asked.map_or(100, |number| number.parse().unwrap());
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    config.max_steps = shuttle::MaxSteps::FailAfter(10_000_000);
    Runner::new(RandomScheduler::new_from_seed(7, iterations), config).run(test);
}

/// The last state of a canvas: a thread that waited for it outside of the scheduler would wait for ever.
fn end(receiver: &watch::Receiver<State>) -> State {
    loop {
        let state = receiver.borrow().clone();
        if !matches!(state.phase, Phase::Running) {
            return state;
        }
        thread::yield_now();
    }
}

fn sound() -> Arc<ServedModel> {
    let noise = manifest(GraphKind::Absorbing).graph();
    let network: NetworkSource = Box::new(move || Ok(Box::new(ClosedForm::new(noise, sentences()))));
    model_with(GraphKind::Absorbing, network)
}

/// What request `number` gives alone.
fn expected(number: usize) -> Vec<Token> {
    static EXPECTED: [OnceLock<Vec<Token>>; 8] = [const { OnceLock::new() }; 8];
    if let Some(tokens) = EXPECTED[number].get() {
        return tokens.clone();
    }
    let engine = Engine::start(options(1)).unwrap();
    let alone = engine.admit(request(&sound(), number as u32)).unwrap();
    let tokens = end(&alone.canvases[0]).tokens.to_vec();
    EXPECTED[number].get_or_init(|| tokens).clone()
}

fn is_as_expected(state: &State, number: usize) {
    assert!(matches!(state.phase, Phase::Done(_)), "{:?}", state.phase);
    assert_eq!(*state.tokens, *expected(number));
}

fn ends_empty(engine: &Engine) {
    while !engine.is_idle() {
        thread::yield_now();
    }
    engine.shut_down();
    assert!(engine.shared.running.is_empty() && engine.shared.queue.is_empty());
}

/// Two workers, requests that come from several threads, one of them cancelled and one dropped by others meanwhile.
#[test]
fn whatever_the_threads_do_requests_end_with_their_tokens() {
    explore(|| {
        let engine = Arc::new(Engine::start(options(2)).unwrap());
        let model = sound();
        let asks: Vec<_> = [0, 2]
            .map(|number| {
                let (engine, model) = (Arc::clone(&engine), Arc::clone(&model));
                thread::spawn(move || {
                    let generation = engine.admit(request(&model, number)).unwrap();
                    is_as_expected(&end(&generation.canvases[0]), number as usize);
                })
            })
            .into();
        let cancelled = engine.admit(request(&model, 4)).unwrap();
        let dropped = engine.admit(request(&model, 6)).unwrap();
        let canceller = {
            let engine = Arc::clone(&engine);
            thread::spawn(move || engine.cancel(&Caller::new("test"), "request-4"))
        };
        drop(dropped);
        match end(&cancelled.canvases[0]).phase {
            Phase::Failed(Failure::Cancelled) => {}
            // Before it was cancelled.
            Phase::Done(_) => {}
            phase @ (Phase::Running | Phase::Failed(_)) => panic!("{phase:?}"),
        }
        canceller.join().unwrap();
        asks.into_iter().for_each(|ask| ask.join().unwrap());
        ends_empty(&engine);
    });
}

/// Shutting down while work waits, is loaded for and runs.
#[test]
fn whenever_an_engine_shuts_down_everybody_is_told() {
    explore(|| {
        let engine = Arc::new(Engine::start(options(2)).unwrap());
        let model = sound();
        let generations: Vec<_> = [0, 2]
            .map(|number| engine.admit(request(&model, number)).unwrap())
            .into();
        let ending = {
            let engine = Arc::clone(&engine);
            thread::spawn(move || engine.shut_down())
        };
        for (generation, number) in generations.iter().zip([0, 2]) {
            let state = end(&generation.canvases[0]);
            if !matches!(state.phase, Phase::Failed(Failure::ShutDown)) {
                is_as_expected(&state, number);
            }
        }
        ending.join().unwrap();
        drop(generations);
        ends_empty(&engine);
    });
}

/// Counts networks in memory.
struct Counted(ClosedForm, Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::AcqRel);
    }
}

impl ScoreNetwork for Counted {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.0.log_score(batch, read)
    }
}

fn counted(alive: &Arc<AtomicUsize>, most: usize) -> Arc<ServedModel> {
    let alive = Arc::clone(alive);
    let noise = manifest(GraphKind::Absorbing).graph();
    let network: NetworkSource = Box::new(move || {
        assert!(
            alive.fetch_add(1, Ordering::AcqRel) < most,
            "more than there is room for"
        );
        let network = ClosedForm::new(noise, sentences());
        Ok(Box::new(Counted(network, Arc::clone(&alive))))
    });
    let model = ServedModel::without_bundle(manifest(GraphKind::Absorbing), 1, network);
    Arc::new(model.with_bytes(10))
}

/// A model is retired while it is loaded, used and asked for: what has it ends, and then it is gone.
#[test]
fn whenever_a_model_is_retired_it_is_served_to_its_end_and_leaves() {
    explore(|| {
        let engine = Arc::new(Engine::start(options(2)).unwrap());
        let alive = Arc::new(AtomicUsize::new(0));
        let model = counted(&alive, 2);
        let retiring = {
            let (engine, model) = (Arc::clone(&engine), Arc::clone(&model));
            thread::spawn(move || engine.retire(&model))
        };
        for number in [0, 2] {
            let generation = engine.admit(request(&model, number)).unwrap();
            is_as_expected(&end(&generation.canvases[0]), number as usize);
        }
        retiring.join().unwrap();
        while alive.load(Ordering::Acquire) > 0 || engine.state(&model) != ModelState::Unloaded {
            thread::yield_now();
        }
        ends_empty(&engine);
    });
}

/// Room for one of two models that two threads ask for: both are served, and never are both in memory.
#[test]
fn two_models_take_turns_in_the_room_of_one() {
    explore(|| {
        let engine = Arc::new(
            Engine::start(EngineOptions {
                network_bytes: 10,
                ..options(1)
            })
            .unwrap(),
        );
        let alive = Arc::new(AtomicUsize::new(0));
        let asks: Vec<_> = [0, 2]
            .map(|number| {
                let (engine, model) = (Arc::clone(&engine), counted(&alive, 1));
                thread::spawn(move || {
                    let generation = engine.admit(request(&model, number)).unwrap();
                    is_as_expected(&end(&generation.canvases[0]), number as usize);
                })
            })
            .into();
        asks.into_iter().for_each(|ask| ask.join().unwrap());
        ends_empty(&engine);
    });
}

/// Room is taken and given back by several threads: never more than there is, and in the end none.
#[test]
fn admission_neither_loses_room_nor_gives_too_much() {
    explore(|| {
        let admission = Arc::new(Admission::new(Duration::from_secs(10), 0.6, 1));
        let taken = Arc::new(AtomicUsize::new(0));
        let callers: Vec<_> = [(0, "a"), (1, "a"), (2, "b")]
            .map(|(number, caller)| {
                let (admission, taken) = (Arc::clone(&admission), Arc::clone(&taken));
                thread::spawn(move || {
                    for turn in 0..2 {
                        let asked = Asked {
                            number: 2 * number + turn,
                            canvases: 2,
                            evaluations: 2,
                            cost: 1_000_000_000,
                            deadline: None,
                            per_pass: 1,
                        };
                        let Ok(permits) = admission.admit(&Caller::new(caller), asked) else {
                            continue;
                        };
                        assert!(taken.fetch_add(4, Ordering::AcqRel) + 4 <= 10);
                        thread::yield_now();
                        for mut permit in permits {
                            // Before the room is, so that it is never counted as free here and taken there.
                            taken.fetch_sub(2, Ordering::AcqRel);
                            permit.keep(1);
                        }
                    }
                })
            })
            .into();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        assert!(admission.is_idle());
    });
}
