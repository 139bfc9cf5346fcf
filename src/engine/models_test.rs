//! Several models in one engine: they share memory, come and go, and harm no request.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::atomic::AtomicUsize;

use super::tests::{end, idle, manifest, model, options, request, sentences, tokens};
use super::*;
use crate::diffusion::GraphKind;
use crate::models::{Catalogue, Models, NetworkSource};
use crate::network::closed_form::ClosedForm;
use crate::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};

/// Networks in memory, now and at most.
#[derive(Debug, Default)]
struct Alive {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// Counts itself among those that are in memory.
struct Counted {
    network: ClosedForm,
    alive: Arc<Alive>,
    shares_weights: bool,
}

impl Counted {
    fn new(alive: &Arc<Alive>) -> Self {
        let now = alive.now.fetch_add(1, Ordering::AcqRel) + 1;
        alive.most.fetch_max(now, Ordering::AcqRel);
        Self {
            network: ClosedForm::new(manifest(GraphKind::Absorbing).graph(), sentences()),
            alive: Arc::clone(alive),
            shares_weights: false,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.alive.now.fetch_sub(1, Ordering::AcqRel);
    }
}

impl ScoreNetwork for Counted {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.network.log_score(batch, read)
    }

    fn shares_weights(&self) -> bool {
        self.shares_weights
    }
}

/// A model whose networks take `bytes` and are counted.
fn counted(version: u64, bytes: u64, alive: &Arc<Alive>) -> ServedModel {
    let alive = Arc::clone(alive);
    let network: NetworkSource = Box::new(move || Ok(Box::new(Counted::new(&alive))));
    ServedModel::without_bundle(manifest(GraphKind::Absorbing), version, network).with_bytes(bytes)
}

/// Three models, room for two, requests that alternate, more workers than fit: none fails, and none is in memory that
/// has no room there.
#[test]
fn models_take_turns_in_a_memory_that_is_too_small_for_all() {
    let alive = Arc::new(Alive::default());
    let models = [1, 2, 3].map(|version| Arc::new(counted(version, 10, &alive)));
    let sound = model(GraphKind::Absorbing);
    let calm = Engine::start(options(1)).unwrap();
    let engine = Engine::start(EngineOptions {
        network_bytes: 29,
        ..options(2)
    })
    .unwrap();
    for round in 0..2 {
        let numbers = 12 * round..12 * (round + 1);
        let mut generations: Vec<_> = numbers
            .clone()
            .map(|n| engine.admit(request(&models[n as usize % 3], n)).unwrap())
            .collect();
        for (generation, n) in generations.iter_mut().zip(numbers) {
            assert_eq!(
                tokens(generation),
                tokens(&mut calm.admit(request(&sound, n)).unwrap())
            );
        }
    }
    assert_eq!(alive.most.load(Ordering::Acquire), 2);
    let ready = models
        .iter()
        .filter(|model| engine.state(model) == ModelState::Ready);
    assert!(ready.count() <= 2 && idle(&engine));
}

/// Networks that have their weights in common have room beside each other where one has, and take it as long as there is
/// one of them.
#[test]
fn common_weights_take_memory_once() {
    let alive = Arc::new(Alive::default());
    let sharing = |version| {
        let alive = Arc::clone(&alive);
        let network: NetworkSource = Box::new(move || {
            let mut network = Counted::new(&alive);
            network.shares_weights = true;
            Ok(Box::new(network))
        });
        let model = ServedModel::without_bundle(manifest(GraphKind::Absorbing), version, network);
        Arc::new(model.with_bytes(10))
    };
    let models = [1, 2].map(sharing);
    let engine = Engine::start(EngineOptions {
        network_bytes: 15,
        ..options(3)
    })
    .unwrap();
    let in_memory = |count| {
        let started = Instant::now();
        while alive.now.load(Ordering::Acquire) != count {
            assert!(started.elapsed() < Duration::from_secs(20), "{alive:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    // They take turns: one's networks all leave before the other's come.
    for round in 0..3 {
        for model in &models {
            tokens(&mut engine.admit(request(model, round)).unwrap());
            in_memory(3);
        }
    }
    assert!(alive.most.load(Ordering::Acquire) <= 3, "{alive:?}");
}

#[test]
fn a_model_that_never_fits_is_told_what_it_takes_and_harms_no_other() {
    let alive = Arc::new(Alive::default());
    let [small, large] =
        [(1, 10 << 20), (2, 21 << 20)].map(|(version, bytes)| Arc::new(counted(version, bytes, &alive)));
    let engine = Engine::start(EngineOptions {
        network_bytes: 20 << 20,
        ..options(1)
    })
    .unwrap();
    tokens(&mut engine.admit(request(&small, 0)).unwrap());
    let mut refused = engine.admit(request(&large, 2)).unwrap();
    let Phase::Failed(Failure::Model { reason, .. }) = end(&mut refused.canvases[0]).phase else {
        panic!("the model does not fit")
    };
    assert!(reason.contains("21 MB") && reason.contains("20 MB"), "{reason}");
    assert_eq!(engine.state(&small), ModelState::Ready);
    tokens(&mut engine.admit(request(&small, 4)).unwrap());
}

/// A network that waits at a gate in every evaluation.
struct Gated(Counted, Arc<Mutex<()>>);

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

/// A model is replaced while a request runs on it: that request goes on with it to the same end, others get the new
/// one, and then nothing of the old one is left in memory.
#[test]
fn a_retired_model_serves_who_has_it_and_leaves_memory_then() {
    let (alive, gate) = (Arc::new(Alive::default()), Arc::new(Mutex::new(())));
    let (counts, door) = (Arc::clone(&alive), Arc::clone(&gate));
    let network: NetworkSource =
        Box::new(move || Ok(Box::new(Gated(Counted::new(&counts), Arc::clone(&door)))));
    let mut before = Models::default();
    let old = before.insert(ServedModel::without_bundle(
        manifest(GraphKind::Absorbing),
        1,
        network,
    ));
    let engine = Engine::start(options(2)).unwrap();
    let catalogue = Catalogue::new(before);
    let closed = gate.lock();
    let mut runs = engine
        .admit(request(&catalogue.now().default_model().unwrap(), 4))
        .unwrap();
    let new_alive = Arc::new(Alive::default());
    let mut after = Models::default();
    let new = after.insert(counted(2, 0, &new_alive));
    let retired = catalogue.replace(after);
    assert!(retired.len() == 1 && Arc::ptr_eq(&retired[0], &old));
    engine.retire(&old);
    assert!(Arc::ptr_eq(&catalogue.now().default_model().unwrap(), &new));
    let sound = model(GraphKind::Absorbing);
    let expected = |number| {
        tokens(
            &mut Engine::start(options(1))
                .unwrap()
                .admit(request(&sound, number))
                .unwrap(),
        )
    };
    assert_eq!(tokens(&mut engine.admit(request(&new, 2)).unwrap()), expected(2));
    drop(closed);
    assert_eq!(tokens(&mut runs), expected(4));
    drop(runs);
    // The network is dropped by whoever ended the last canvas; nobody else has it.
    while alive.now.load(Ordering::Acquire) > 0 {
        std::thread::yield_now();
    }
    assert_eq!(engine.state(&old), ModelState::Unloaded);
    drop(retired);
    // A network that is being given up may still hold the model for a moment.
    while Arc::strong_count(&old) > 1 {
        std::thread::yield_now();
    }
    assert_eq!(engine.state(&new), ModelState::Ready);
}

/// Whoever looked at the models before they were replaced may ask for a retired one: it is served, and leaves again.
#[test]
fn a_retired_model_that_is_asked_for_once_more_leaves_again() {
    let alive = Arc::new(Alive::default());
    let old = Arc::new(counted(1, 0, &alive));
    let engine = Engine::start(options(1)).unwrap();
    engine.retire(&old);
    tokens(&mut engine.admit(request(&old, 2)).unwrap());
    while alive.now.load(Ordering::Acquire) > 0 || Arc::strong_count(&old) > 1 {
        std::thread::yield_now();
    }
    engine.prepare(&old);
    assert_eq!(engine.state(&old), ModelState::Unloaded);
}

/// A network that says which device it is on.
struct OnDevice {
    network: Counted,
    passes: Arc<[AtomicUsize; 2]>,
    device: usize,
}

impl ScoreNetwork for OnDevice {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.passes[self.device].fetch_add(1, Ordering::AcqRel);
        // Long enough for the other worker to take its share.
        std::thread::sleep(Duration::from_millis(1));
        self.network.log_score(batch, read)
    }
}

/// Two devices share the work of a model; when it cannot be loaded on one of them, the other does it all, and nobody
/// is told of it.
#[test]
fn devices_share_the_work_and_one_that_fails_leaves_it_to_the_other() {
    for broken in [false, true] {
        let alive = Arc::new(Alive::default());
        let passes: Arc<[AtomicUsize; 2]> = Arc::default();
        let on = |device: usize| -> NetworkSource {
            let (alive, passes) = (Arc::clone(&alive), Arc::clone(&passes));
            Box::new(move || {
                if broken && device == 0 {
                    return Err(NetworkError::Load("injected".to_owned()));
                }
                Ok(Box::new(OnDevice {
                    network: Counted::new(&alive),
                    passes: Arc::clone(&passes),
                    device,
                }))
            })
        };
        let model = ServedModel::without_bundle(manifest(GraphKind::Absorbing), 1, on(0));
        let model = Arc::new(model.with_devices([on(1)]));
        let engine = Engine::start(EngineOptions {
            devices: 2,
            ..options(1)
        })
        .unwrap();
        let sound = super::tests::model(GraphKind::Absorbing);
        let calm = Engine::start(options(1)).unwrap();
        let on = |device: usize| passes[device].load(Ordering::Acquire);
        // Until both have taken part: the second may take a while to be loaded.
        while on(1) == 0 || !broken && on(0) == 0 {
            let mut generations: Vec<_> = (0..24)
                .map(|n| engine.admit(request(&model, n)).unwrap())
                .collect();
            for (generation, n) in generations.iter_mut().zip(0..) {
                let alone = tokens(&mut calm.admit(request(&sound, n)).unwrap());
                assert_eq!(tokens(generation), alone);
            }
        }
        assert_eq!(on(0) == 0, broken);
        assert_eq!(engine.state(&model), ModelState::Ready);
        assert!(alive.most.load(Ordering::Acquire) <= 2 && idle(&engine));
    }
}
