//! A repository in S3: what is published there is served, under load, and nobody notices what goes wrong with it.
//!
//! The server is moto's (`make test-tools`); without it, or without the feature `object-store`, this is said loudly to
//! be skipped.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::model_service_client::ModelServiceClient;
use denoised::proto::v1::{
    GenerateRequest, GetModelRequest, LoadModelRequest, ModelReference, ModelState, Sampling,
};
use tonic::Code;
use tonic::transport::Channel;

use crate::binary::{Serving, denoised};
use crate::support::{generate, publish, skipped};

const SOUND: &[u8] = include_bytes!("fixtures/networks/float32.onnx");
/// Has no input `sigma`, though its manifest will say that it has.
const ENDLESS: &[u8] = include_bytes!("fixtures/networks/endless.onnx");

/// A running S3 server; killed if a test fails.
pub(crate) struct Store {
    child: Child,
    address: String,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Store {
    pub(crate) fn start() -> Option<Self> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = here.join(".tools/python/bin/python");
        let has_moto = Command::new(&python)
            .args(["-c", "import moto.server, boto3"])
            .output();
        if !has_moto.is_ok_and(|output| output.status.success()) {
            skipped("moto is not installed (make test-tools): no repository in S3 was tried");
            return None;
        }
        let mut child = Command::new(python)
            .arg(here.join("tests/tools/s3_server.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Some(Self {
            address: answers.next().unwrap().unwrap(),
            orders: child.stdin.take().unwrap(),
            child,
            answers,
        })
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
        assert_eq!(self.answers.next().unwrap().unwrap(), "done", "{order}");
    }

    /// Has `command` find it.
    pub(crate) fn known_to<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("AWS_ENDPOINT", &self.address)
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "test")
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The binary that publishes, of the other package: where all of the workspace is tested it is built.
pub(crate) fn training() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_BIN_EXE_denoised")).with_file_name("training");
    if !beside.exists() {
        skipped(format_args!(
            "{} is not built (cargo test --workspace): nothing was published",
            beside.display()
        ));
        return None;
    }
    Some(beside)
}

fn request() -> GenerateRequest {
    GenerateRequest {
        model: Some(ModelReference {
            name: "live".to_owned(),
            version: 0,
        }),
        length: Some(8),
        sampling: Some(Sampling {
            steps: Some(2),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// How long the store is away at least; `DENOISED_STORE_AWAY_SECONDS=60` for longer.
fn away() -> Duration {
    let asked = std::env::var("DENOISED_STORE_AWAY_SECONDS").ok();
    Duration::from_secs(asked.and_then(|seconds| seconds.parse().ok()).unwrap_or(0))
}

/// The version that answers on a connection of its own.
async fn first_answer(server: &Serving) -> u64 {
    let url = format!("http://{}", server.address);
    let mut client = DiffusionServiceClient::connect(url).await.unwrap();
    let answer = generate(&mut client, request()).await.unwrap();
    answer.accepted.unwrap().model.unwrap().version
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_to_a_bucket_is_served_and_no_request_fails() {
    if cfg!(not(feature = "object-store")) {
        skipped("built without the feature object-store: no repository in S3 was tried");
        return;
    }
    let (Some(mut store), Some(training)) = (Store::start(), training()) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut published = 0;
    // Returns the version that it has become.
    let mut publish_one = |store: &Store, is_sound: bool| -> u64 {
        published += 1;
        if is_sound {
            publish(folder.path(), ("live", published), SOUND, false);
        } else {
            publish(folder.path(), ("live", published), ENDLESS, true);
        }
        let bundle = folder.path().join(format!("live/{published}"));
        let output = store
            .known_to(Command::new(&training).arg("publish"))
            .arg(bundle)
            .arg("s3://bucket/team/models")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let printed = String::from_utf8(output.stdout).unwrap();
        printed
            .trim()
            .strip_prefix("live@")
            .expect(&printed)
            .parse()
            .unwrap()
    };
    assert_eq!(publish_one(&store, true), 1);
    let cache = folder.path().join("cache");
    let serve = |store: &Store| {
        let mut command = denoised();
        store
            .known_to(&mut command)
            .env("DENOISED__MODELS__REPOSITORY", "s3://bucket/team/models")
            .env("DENOISED__MODELS__CACHE", &cache)
            .env("DENOISED__MODELS__DEFAULT", "live")
            .env("DENOISED__MODELS__POLL_SECONDS", "1")
            .env("DENOISED__SERVER__MODEL_CONTROL", "admins");
        Serving::start_with(&mut command)
    };
    let server = serve(&store);
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    let channel = channel.connect().await.unwrap();
    let client = DiffusionServiceClient::new(channel.clone());
    let mut models = ModelServiceClient::new(channel.clone());
    let over = Arc::new(AtomicBool::new(false));
    let answered = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..4)
        .map(|_| {
            let (mut client, over, answered) = (client.clone(), Arc::clone(&over), Arc::clone(&answered));
            tokio::spawn(async move {
                while !over.load(Ordering::Acquire) {
                    let answer = generate(&mut client, request()).await.unwrap();
                    assert_eq!(answer.results.len(), 1);
                    answered.fetch_add(1, Ordering::AcqRel);
                }
            })
        })
        .collect();
    let mut newest = client.clone();
    let mut newest = async || {
        let answer = generate(&mut newest, request()).await.unwrap();
        answer.accepted.unwrap().model.unwrap().version
    };
    let named = |version| {
        Some(ModelReference {
            name: "live".to_owned(),
            version,
        })
    };

    // Twenty that are sound, after every fourth one that is not. All but two of the sound ones are ordered, which is
    // faster than waiting for the server to look.
    for swap in 1..=20 {
        let version = publish_one(&store, true);
        if swap > 2 {
            models
                .load_model(LoadModelRequest { model: named(0) })
                .await
                .unwrap();
        }
        while newest().await != version {
            tokio::task::yield_now().await;
        }
        if swap % 4 == 0 {
            let bad = publish_one(&store, false);
            let wanted = LoadModelRequest { model: named(bad) };
            let refused = models.load_model(wanted).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused}");
            assert_eq!(newest().await, version, "the one before goes on");
            let told = models.get_model(GetModelRequest { model: named(bad) }).await;
            let told = told.unwrap().into_inner().model.unwrap();
            assert_eq!(told.state(), ModelState::Failed);
            assert!(!told.state_reason.is_empty());
        }
    }

    // The store goes away: what is served stays. It comes back with ten thousand objects that are no models.
    let before = newest().await;
    store.order("stop");
    let (asked, stopped) = (answered.load(Ordering::Acquire), Instant::now());
    while answered.load(Ordering::Acquire) < asked + 100 || stopped.elapsed() < away() {
        tokio::task::yield_now().await;
    }
    assert_eq!(newest().await, before);
    store.order("start");
    store.order("fill team/models/rubbish/ 10000");
    let version = publish_one(&store, true);
    while newest().await != version {
        tokio::task::yield_now().await;
    }
    store.order("clear team/models/rubbish/");

    // An upload that was cut in half is no version.
    let cut = publish_one(&store, true);
    over.store(true, Ordering::Release);
    for caller in callers {
        caller.await.unwrap();
    }
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("panicked"), "{log}");
    std::fs::remove_dir_all(&cache).unwrap();
    store.order(&format!("cut team/models/live/{cut}/model.onnx"));
    let server = serve(&store);
    assert_eq!(first_answer(&server).await, version);
    let mut models = ModelServiceClient::connect(format!("http://{}", server.address))
        .await
        .unwrap();
    let told = models.get_model(GetModelRequest { model: named(cut) }).await;
    let told = told.unwrap().into_inner().model.unwrap();
    assert_eq!(told.state(), ModelState::Refused);
    assert!(told.state_reason.contains("model.onnx"), "{}", told.state_reason);
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("sha256"), "{log}");

    // Nothing but the cache is needed to start while the store is away.
    store.order("stop");
    let server = serve(&store);
    assert_eq!(first_answer(&server).await, version);
    let (_, log) = server.stop();
    assert!(log.contains("what was fetched before is served"), "{log}");
}
