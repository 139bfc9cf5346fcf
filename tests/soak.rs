//! Load that does not end: twice what the server can do, with callers of every bad habit, models that come and go, and a
//! worker that hangs from time to time. What is accepted is answered, and nothing grows.
//!
//! `make test` has it run for a minute, `make soak` for twenty (`DENOISED_SOAK_SECONDS`).

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::event::Event;
use denoised::proto::v1::{
    FramePolicy, GenerateRequest, ModelReference, Sampling, ScoreRequest, TextOrTokens, frame_policy,
    text_or_tokens,
};
use parking_lot::Mutex;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::binary::{Serving, denoised};
use crate::plain_http::{get, value};
use crate::support::{prompt, publish};

const SOUND: &[u8] = include_bytes!("fixtures/networks/float32.onnx");
/// Hangs in the first pass.
const ENDLESS: &[u8] = include_bytes!("fixtures/networks/endless.onnx");

fn seconds() -> u64 {
    let asked = std::env::var("DENOISED_SOAK_SECONDS").ok();
    asked.and_then(|seconds| seconds.parse().ok()).unwrap_or(60)
}

/// How often something has come out so.
#[derive(Default)]
struct Outcomes {
    whole: AtomicU64,
    refused: AtomicU64,
    bad: AtomicU64,
    left: AtomicU64,
    hung: AtomicU64,
    /// When answers were whole, and how long they took.
    took: Mutex<Vec<(Instant, Duration)>>,
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Acquire)
}

/// What a caller does.
#[derive(Clone, Copy)]
enum Habit {
    Reads,
    ReadsSlowly,
    Leaves,
    AsksNonsense,
    Scores,
    ConnectsAnew,
    AsksTheNewest,
}

const HABITS: [Habit; 10] = [
    Habit::Reads,
    Habit::Leaves,
    Habit::Reads,
    Habit::AsksTheNewest,
    Habit::AsksNonsense,
    Habit::Reads,
    Habit::Scores,
    Habit::ReadsSlowly,
    Habit::ConnectsAnew,
    Habit::AsksTheNewest,
];

fn request(turn: u64, model: &str) -> GenerateRequest {
    GenerateRequest {
        model: Some(ModelReference {
            name: model.to_owned(),
            version: 0,
        }),
        length: Some(if model == "live" {
            8
        } else {
            16 + (turn % 8 * 16) as u32
        }),
        prompt_as: (model != "live").then(|| prompt("And he said")),
        sampling: Some(Sampling {
            steps: Some(8 << (turn % 3)),
            num_samples: Some(1 + (turn % 2) as u32),
            seed: Some(turn),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// Asks and reads to the end, or until `leave` messages have come, with a pause after each.
async fn read(
    client: &mut DiffusionServiceClient<Channel>,
    request: GenerateRequest,
    leave: usize,
    pause: Duration,
    outcomes: &Outcomes,
) {
    let asked = Instant::now();
    let wanted = request
        .sampling
        .as_ref()
        .and_then(|sampling| sampling.num_samples);
    let stream = client.generate(request).await;
    let mut stream = match stream {
        Ok(stream) => stream.into_inner(),
        Err(status) => return refused(&status, outcomes),
    };
    let (mut results, mut messages) = (0, 0);
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                let event = message.event.and_then(|event| event.event);
                results += u32::from(matches!(event, Some(Event::Result(_))));
                messages += 1;
                if messages == leave {
                    outcomes.left.fetch_add(1, Ordering::AcqRel);
                    return;
                }
                tokio::time::sleep(pause).await;
            }
            Ok(None) => break,
            // What was accepted is never refused.
            Err(status) if messages == 0 => return refused(&status, outcomes),
            Err(status) => panic!("after {messages} messages: {status}"),
        }
    }
    assert_eq!(Some(results), wanted, "all canvases of what was accepted");
    if pause.is_zero() {
        outcomes.took.lock().push((Instant::now(), asked.elapsed()));
    }
    outcomes.whole.fetch_add(1, Ordering::AcqRel);
}

fn refused(status: &Status, outcomes: &Outcomes) {
    // On a slow machine one request alone may be more than may wait.
    let is_too_much = status.code() == Code::InvalidArgument && status.message().contains("may wait");
    assert!(
        status.code() == Code::ResourceExhausted || is_too_much,
        "{status}"
    );
    outcomes.refused.fetch_add(1, Ordering::AcqRel);
}

async fn act(
    habit: Habit,
    turn: u64,
    url: &str,
    client: &mut DiffusionServiceClient<Channel>,
    outcomes: &Outcomes,
) {
    let (all, at_once) = (usize::MAX, Duration::ZERO);
    match habit {
        Habit::Reads => read(client, request(turn, "world-english"), all, at_once, outcomes).await,
        Habit::AsksTheNewest => read(client, request(turn, "live"), all, at_once, outcomes).await,
        Habit::Leaves => read(client, request(turn, "world-english"), 2, at_once, outcomes).await,
        Habit::ReadsSlowly => {
            let pause = Duration::from_millis(150);
            let every = FramePolicy {
                when: frame_policy::When::EverySteps.into(),
                ..FramePolicy::default()
            };
            let request = GenerateRequest {
                frames: Some(every),
                ..request(turn, "world-english")
            };
            read(client, request, all, pause, outcomes).await;
        }
        Habit::AsksNonsense => {
            let nonsense = GenerateRequest {
                length: Some(1 << 20),
                ..request(turn, "world-english")
            };
            let status = client.generate(nonsense).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{status}");
            outcomes.bad.fetch_add(1, Ordering::AcqRel);
        }
        Habit::Scores => {
            let text = TextOrTokens {
                content: Some(text_or_tokens::Content::Text("And God said".to_owned())),
            };
            let scored = ScoreRequest {
                texts: vec![crate::scores::whole(text)],
                ..ScoreRequest::default()
            };
            match client.score(scored).await {
                Ok(answer) => {
                    let mut answer = answer.into_inner();
                    while answer.message().await.unwrap().is_some() {}
                    outcomes.whole.fetch_add(1, Ordering::AcqRel);
                }
                Err(status) => refused(&status, outcomes),
            }
        }
        Habit::ConnectsAnew => {
            let channel = Channel::from_shared(url.to_owned()).unwrap().connect().await;
            let mut client = DiffusionServiceClient::new(channel.unwrap());
            read(
                &mut client,
                request(turn, "world-english"),
                all,
                at_once,
                outcomes,
            )
            .await;
        }
    }
}

/// Publishes one version after the other and removes those before; every fourth cannot be loaded.
async fn swap_models(root: &Path, over: &AtomicBool) -> u64 {
    let mut version = 1;
    while !over.load(Ordering::Acquire) {
        tokio::time::sleep(Duration::from_secs(3)).await;
        version += 1;
        if version % 4 == 0 {
            // It has no input `sigma`, though its manifest says so.
            publish(root, ("live", version), ENDLESS, true);
        } else {
            publish(root, ("live", version), SOUND, false);
        }
        if version > 3 {
            std::fs::remove_dir_all(root.join(format!("live/{}", version - 3))).unwrap();
        }
    }
    version
}

/// Has a worker hang every twenty seconds, until the server stops its pass.
async fn hang(mut client: DiffusionServiceClient<Channel>, over: &AtomicBool, outcomes: &Outcomes) {
    while !over.load(Ordering::Acquire) {
        let request = GenerateRequest {
            prompt_as: None,
            length: Some(8),
            ..request(0, "hangs")
        };
        let ended = async {
            let mut stream = client.generate(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok::<_, Status>(())
        };
        let status = ended.await.unwrap_err();
        assert!(
            matches!(status.code(), Code::Internal | Code::ResourceExhausted),
            "{status}"
        );
        outcomes
            .hung
            .fetch_add(u64::from(status.code() == Code::Internal), Ordering::AcqRel);
        for _ in 0..20 {
            if over.load(Ordering::Acquire) {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// A look at the server: seconds since the start, megabytes, files, threads.
type Look = [f64; 4];

fn look(server: &Serving, begun: Instant) -> Look {
    let process = |what: &str| format!("/proc/{}/{what}", server.id());
    let status = std::fs::read_to_string(process("status")).unwrap();
    let number = |name: &str| -> f64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    let files = std::fs::read_dir(process("fd")).unwrap().count();
    [
        begun.elapsed().as_secs_f64(),
        number("VmRSS:") / 1024.0,
        files as f64,
        number("Threads:"),
    ]
}

fn median(looks: &[Look], what: usize) -> f64 {
    let mut values: Vec<f64> = looks.iter().map(|look| look[what]).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes all cores: `make test` has it run by itself, after the others"]
async fn load_that_does_not_end_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    publish(root, ("live", 1), SOUND, false);
    publish(root, ("hangs", 1), ENDLESS, false);
    let mut command = denoised();
    command
        .env("DENOISED__MODELS__REPOSITORY", root)
        .env("DENOISED__MODELS__DEFAULT", "world-english")
        .env("DENOISED__MODELS__POLL_SECONDS", "1")
        .env("DENOISED__ENGINE__WORKERS", "2")
        .env("DENOISED__ENGINE__MAX_PASS_SECONDS", "1")
        // Half of what the callers below want to have waiting.
        .env("DENOISED__ENGINE__MAX_QUEUE_SECONDS", "4")
        .env("DENOISED__ENGINE__MAX_CALLER_SHARE", "1")
        .env("DENOISED__LOG__FORMAT", "json")
        .env("DENOISED__LOG__FILTER", "error");
    let server = Serving::start_with(&mut command);
    let url = format!("http://{}", server.address);
    let channel = Channel::from_shared(url.clone())
        .unwrap()
        .connect()
        .await
        .unwrap();
    let (outcomes, over) = (Arc::new(Outcomes::default()), Arc::new(AtomicBool::new(false)));
    let turns = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..48)
        .map(|_| {
            let (url, over, turns) = (url.clone(), Arc::clone(&over), Arc::clone(&turns));
            let (mut client, outcomes) = (
                DiffusionServiceClient::new(channel.clone()),
                Arc::clone(&outcomes),
            );
            tokio::spawn(async move {
                while !over.load(Ordering::Acquire) {
                    let turn = turns.fetch_add(1, Ordering::AcqRel);
                    let habit = HABITS[turn as usize % HABITS.len()];
                    let before = count(&outcomes.refused);
                    act(habit, turn, &url, &mut client, &outcomes).await;
                    if count(&outcomes.refused) > before {
                        // As whoever is refused should; or nothing but refusals would be tried.
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            })
        })
        .collect();
    let swapping = {
        let (root, over) = (root.to_owned(), Arc::clone(&over));
        tokio::spawn(async move { swap_models(&root, &over).await })
    };
    let hanging = {
        let (client, over) = (DiffusionServiceClient::new(channel.clone()), Arc::clone(&over));
        let outcomes = Arc::clone(&outcomes);
        tokio::spawn(async move { hang(client, &over, &outcomes).await })
    };

    let (begun, mut looks) = (Instant::now(), Vec::new());
    while begun.elapsed() < Duration::from_secs(seconds()) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        looks.push(look(&server, begun));
        assert!(
            callers.iter().all(|caller| !caller.is_finished()),
            "a caller was treated badly"
        );
    }
    over.store(true, Ordering::Release);
    for caller in callers {
        caller.await.unwrap();
    }
    hanging.await.unwrap();
    let versions = swapping.await.unwrap();

    let [whole, refused, bad, left, hung] = [
        &outcomes.whole,
        &outcomes.refused,
        &outcomes.bad,
        &outcomes.left,
        &outcomes.hung,
    ]
    .map(count);
    let mut told = format!(
        "{whole} answered, {refused} refused, {bad} nonsense, {left} left, {hung} hung; {versions} versions\n\
         seconds  megabytes  files  threads  median answer, s\n"
    );
    let took = std::mem::take(&mut *outcomes.took.lock());
    for looks in looks.chunks(looks.len().div_ceil(20)) {
        let ([from, ..], [at, megabytes, files, threads]) = (looks[0], looks[looks.len() - 1]);
        let meanwhile = |(when, _): &&(Instant, Duration)| {
            (from..=at).contains(&when.duration_since(begun).as_secs_f64())
        };
        let mut seconds: Vec<f64> = took
            .iter()
            .filter(meanwhile)
            .map(|(_, took)| took.as_secs_f64())
            .collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN);
        writeln!(
            told,
            "{at:7.0}  {megabytes:9.1}  {files:5.0}  {threads:7.0}  {median:16.2}"
        )
        .unwrap();
    }
    eprintln!("{told}");
    assert!(
        whole > 20 && refused > 0 && bad > 0 && left > 0 && hung > 0 && versions > 4,
        "{told}"
    );
    // Nothing of it is still there.
    let idle = async {
        loop {
            let (_, _, metrics) = get(&url, "/metrics").await;
            let is_zero = |name| value(&metrics, name) == Some(0.0);
            if is_zero("denoised_running_requests") && is_zero("denoised_running_canvases") {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), idle).await.unwrap();
    let quarter = looks.len() / 4;
    let (early, late) = (&looks[quarter..2 * quarter], &looks[3 * quarter..]);
    // Allocators keep a little more for a while.
    let (before, after) = (median(early, 1), median(late, 1));
    assert!(after < 1.05 * before + 8.0, "megabytes: {told}");
    for what in [2, 3] {
        let (before, after) = (median(early, what), median(late, what));
        assert!(after < 1.1 * before + 4.0, "{told}");
    }
    drop(channel);
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("panicked"), "{log}");
    // Nobody writes there but the log, which waits for nobody: ONNX Runtime's own lines stopped all workers once nobody
    // read them.
    for line in log.lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
    }
    assert!(log.contains("onnxruntime"), "{log}");
}
