//! Memory, as the kernel counts it, in a process of its own: other tests would disturb it.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use denoised::bundle::{Bundle, EXTERNAL_DATA, MODEL, Manifest};
use denoised::diffusion::sampler::TimeGrid;
use denoised::diffusion::{GraphKind, SamplerKind, TokenChoice};
use denoised::engine::plan::Sampling as EngineSampling;
use denoised::engine::{Caller, Engine, EngineOptions, Publish, Request, Resume};
use denoised::models::{NetworkSource, ServedModel};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, NetworkError, ScoreNetwork};
use denoised::proto::v1::{GenerateRequest, ListModelsRequest, ModelReference, ModelState, Sampling};

use crate::support::{TestServer, closed_form_manifest, config, generate, publish_files, skipped};

const TABLE: &[u8] = include_bytes!("fixtures/networks/table.onnx");
/// Bytes of the table, by the fixture's making.
const TABLE_BYTES: usize = 5 * 1_310_720 * size_of::<f32>();
const MEGABYTE: f64 = (1 << 20) as f64;
const TABLE_MEGABYTES: f64 = TABLE_BYTES as f64 / MEGABYTE;

/// Set in the process that a test runs itself in.
const ALONE: &str = "DENOISED_TEST_ALONE";

/// Whether this is the process to measure; otherwise runs `test` of this file in one.
fn is_alone(test: &str) -> bool {
    if !cfg!(target_os = "linux") {
        skipped(format_args!("memory::{test}: there is no /proc"));
        return false;
    }
    if std::env::var_os(ALONE).is_some() {
        denoised::allocator::give_large_blocks_back();
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            &format!("memory::{test}"),
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ALONE, "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

/// Megabytes that this process has in memory, at present and at most.
fn megabytes() -> (f64, f64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| -> f64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap() / 1024.0
    };
    (field("VmRSS:"), field("VmHWM:"))
}

fn publish_table(repository: &Path, name: &str) {
    publish_table_as(repository, (name, 1));
}

fn publish_table_as(repository: &Path, (name, version): (&str, u64)) {
    // Numbers of its own, so that no two models could share memory.
    let seed = name.bytes().map(f32::from).sum::<f32>() + version as f32 / 16.0;
    let table: Vec<u8> = (0..TABLE_BYTES / size_of::<f32>())
        .flat_map(|i| ((i % 5) as f32 * 0.1 + seed * 1e-3).to_le_bytes())
        .collect();
    publish_files(
        repository,
        (name, version),
        &[(MODEL, TABLE), (EXTERNAL_DATA, &table)],
        false,
    );
}

fn request(model: Option<ModelReference>) -> GenerateRequest {
    GenerateRequest {
        model,
        length: Some(8),
        sampling: Some(Sampling {
            steps: Some(4),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// Three models of 25 MB, room for two, traffic that alternates: no request fails, and the resident set stays within
/// the budget, but for the files of those that are being loaded.
#[test]
fn the_resident_set_stays_within_the_budget_of_models() {
    if !is_alone("the_resident_set_stays_within_the_budget_of_models") {
        return;
    }
    let repository = tempfile::tempdir().unwrap();
    let names = ["a", "b", "c"];
    names
        .iter()
        .for_each(|name| publish_table(repository.path(), name));
    let budget = 60.0;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut config = config();
        config.models.repository = Some(repository.path().to_owned().into());
        config.models.demo = false;
        config.models.memory_megabytes = budget as u64;
        let server = TestServer::demo_with(&config).await;
        let ask = async |name: &str| {
            let model = ModelReference {
                name: name.to_owned(),
                version: 0,
            };
            let request = request(Some(model));
            generate(&mut server.client(), request).await.unwrap();
        };
        ask("a").await;
        let without = megabytes().0 - TABLE_MEGABYTES;
        let clients = names.map(|name| {
            let ask = &ask;
            async move {
                for _ in 0..4 {
                    ask(name).await;
                }
            }
        });
        futures_util::future::join_all(clients).await;
        let models = server.models().list_models(ListModelsRequest {}).await.unwrap();
        let models = models.into_inner().models;
        let ready = models.iter().filter(|model| model.state() == ModelState::Ready);
        assert!((1..=2).contains(&ready.count()), "one of them had to go");
        let (now, most) = megabytes();
        println!("without {without:.1} MB, now {now:.1} MB, at most {most:.1} MB");
        assert!(now - without < budget + 5.0, "{without} MB, then {now} MB");
        let files = 2.0 * TABLE_MEGABYTES;
        assert!(
            most - without < budget + files + 5.0,
            "{without} MB, at most {most} MB"
        );
        server.stop().await;
    });
}

/// A version that is fetched takes the place of the one before it in memory, too.
#[test]
fn versions_of_a_store_come_and_go_and_memory_stays() {
    if !is_alone("versions_of_a_store_come_and_go_and_memory_stays") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (store, cache) = (folder.path().join("store"), folder.path().join("cache"));
    publish_table_as(&store, ("live", 1));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut config = config();
        let place = serde_json::json!({"models": {
            "repository": format!("file://{}", store.display()), "cache": cache, "default": "live",
            "poll_seconds": 1, "demo": false,
        }});
        config.models = serde_json::from_value::<denoised::config::Config>(place)
            .unwrap()
            .models;
        let server = TestServer::demo_with(&config).await;
        let newest = async || {
            let request = request(None);
            let answer = generate(&mut server.client(), request).await.unwrap();
            answer.accepted.unwrap().model.unwrap().version
        };
        assert_eq!(newest().await, 1);
        // With what each of the runtime's own threads needs once.
        let mut first = megabytes().0;
        for version in 2..=6 {
            publish_table_as(&store, ("live", version));
            let swap = async {
                while newest().await != version {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                // Retired ones leave a moment after.
                while version > 2 && megabytes().0 > 1.05 * first {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let swapped = tokio::time::timeout(Duration::from_secs(60), swap).await;
            assert!(
                swapped.is_ok(),
                "version {version}: {first} MB, then {} MB",
                megabytes().0
            );
            if version == 2 {
                tokio::time::sleep(Duration::from_secs(4)).await;
                first = megabytes().0;
            }
        }
        server.stop().await;
    });
}

/// A network that is loaded and dropped leaves nothing behind, and takes about what its weights are counted as.
#[test]
fn a_network_takes_what_it_is_counted_as_and_gives_it_back() {
    if !is_alone("a_network_takes_what_it_is_counted_as_and_gives_it_back") {
        return;
    }
    let repository = tempfile::tempdir().unwrap();
    ["first", "second"]
        .iter()
        .for_each(|name| publish_table(repository.path(), name));
    let load = |name: &str| {
        let bundle = Bundle::look_at(&repository.path().join(name).join("1")).unwrap();
        let network = OnnxNetwork::load(&bundle, &OnnxOptions::default()).unwrap();
        (bundle, network)
    };
    // The runtime's own memory.
    drop(load("first"));
    let (before, _) = megabytes();
    let (bundle, mut network) = load("second");
    let batch = Batch {
        tokens: &[0; 8],
        length: 8,
        sigma: &[0.5],
        positions: &[0],
    };
    network.log_score(&batch, &mut |_| {}).unwrap();
    let (with, _) = megabytes();
    drop(network);
    let mut after = megabytes().0;
    for _ in 0..100 {
        if after <= 1.05 * before {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        after = megabytes().0;
    }
    let counted = bundle.weight_bytes() as f64 / MEGABYTE;
    println!("counted {counted:.1} MB; before {before:.1} MB, with {with:.1} MB, after {after:.1} MB");
    assert!(
        (with - before - counted).abs() < 0.2 * counted,
        "{counted} MB counted, {} MB taken",
        with - before
    );
    assert!(after <= 1.05 * before, "{before} MB, then {after} MB");
}

/// Positions of canvases that wait for their first evaluation take at most 16 bytes each, whatever the sampler.
#[test]
fn canvases_that_wait_are_small() {
    const LENGTH: usize = 4096;
    const REQUESTS: usize = 6;
    const CANVASES: u32 = 64;
    if !is_alone("canvases_that_wait_are_small") {
        return;
    }
    let sampling = |sampler, normalize| EngineSampling {
        grid: TimeGrid::new(256),
        sampler,
        choice: TokenChoice::default(),
        normalize,
    };
    let cases = [
        (
            "hit times",
            GraphKind::Absorbing,
            sampling(SamplerKind::Tweedie, true),
        ),
        (
            "steps",
            GraphKind::Absorbing,
            sampling(SamplerKind::Tweedie, false),
        ),
        (
            "first-hitting",
            GraphKind::Absorbing,
            sampling(SamplerKind::FirstHitting, false),
        ),
        (
            "confidence",
            GraphKind::Absorbing,
            sampling(SamplerKind::Confidence, false),
        ),
        (
            "uniform graph",
            GraphKind::Uniform,
            sampling(SamplerKind::Euler, false),
        ),
    ];
    for (name, graph, sampling) in cases {
        // Its network is never there.
        let (over, wait) = std::sync::mpsc::sync_channel::<()>(0);
        let wait = parking_lot::Mutex::new(wait);
        let network: NetworkSource = Box::new(move || {
            wait.lock().recv().ok();
            Err(NetworkError::Load("it was never there".to_owned()))
        });
        let manifest = Manifest {
            graph,
            mask_token: (graph == GraphKind::Absorbing).then_some(5),
            max_length: LENGTH,
            ..closed_form_manifest()
        };
        let model = Arc::new(ServedModel::without_bundle(manifest, 1, network));
        let engine = Engine::start(EngineOptions {
            devices: 1,
            workers: 1,
            threads: 1,
            batch_tokens: LENGTH,
            output_bytes: 1 << 30,
            max_queue: Duration::from_secs(86_400),
            caller_share: 1.0,
            network_bytes: u64::MAX,
            max_running_requests: 100,
            max_pass: Duration::from_secs(300),
            last_chance: Duration::from_secs(1),
        })
        .unwrap();
        let ask = |seed: usize| {
            let request = Request {
                id: format!("{seed}"),
                caller: Caller::new("test"),
                model: Arc::clone(&model),
                template: vec![None; LENGTH].into(),
                sampling,
                seed: seed as u64,
                canvases: CANVASES,
                publish: Publish::Steps,
                deadline: None,
                priority: 0,
                resume: Resume::default(),
                allowed: None,
                draft: None,
            };
            engine.admit(request).unwrap()
        };
        let first = ask(0);
        let (before, _) = megabytes();
        let waiting: Vec<_> = (1..=REQUESTS).map(ask).collect();
        let (with, _) = megabytes();
        let positions = REQUESTS * CANVASES as usize * LENGTH;
        let bytes = (with - before) * MEGABYTE / positions as f64;
        println!("{name}: {bytes:.1} bytes a position");
        assert!(bytes <= 16.0, "{name}: {bytes} bytes a position");
        drop((first, waiting, over));
    }
}
