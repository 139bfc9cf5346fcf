//! What one canvas, stream or caller does harms no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use denoised::bundle::{MODEL, Manifest};
use denoised::diffusion::{Graph, GraphKind};
use denoised::models::{Models, ServedModel};
use denoised::network::closed_form::ClosedForm;
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::event::Event;
use denoised::proto::v1::{
    FramePolicy, GenerateRequest, GetModelRequest, ModelReference, ModelState, Sampling, frame_policy,
};
use denoised::server::Server;
use tonic::Code;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::{
    Gate, TestServer, closed_form, closed_form_manifest, config, generate, publish, slowly,
};

const ENDLESS: &[u8] = include_bytes!("fixtures/networks/endless.onnx");

/// Gives NaN for the first canvas of its first evaluation.
struct FirstIsNan {
    network: ClosedForm,
    fresh: Arc<AtomicBool>,
}

impl ScoreNetwork for FirstIsNan {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let spoilt = self.fresh.swap(false, Ordering::AcqRel);
        self.network.log_score(batch, &mut |rows| {
            let rows_of_first = batch
                .positions
                .iter()
                .filter(|p| (**p as usize) < batch.length)
                .count();
            let mut data: Vec<f32> = (0..batch.positions.len())
                .flat_map(|row| rows.row(row).to_vec())
                .collect();
            if spoilt {
                data[..rows_of_first * rows.vocab()].fill(f32::NAN);
            }
            read(ScoreRows::packed(&data, rows.vocab()));
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn siblings_of_a_failed_canvas_deliver_before_the_error_is_told() {
    let fresh = Arc::new(AtomicBool::new(true));
    let network = move || {
        Ok(Box::new(FirstIsNan {
            network: ClosedForm::independent(Graph::new(GraphKind::Absorbing, 6), &[0.2; 5]),
            fresh: Arc::clone(&fresh),
        }) as Box<dyn ScoreNetwork>)
    };
    let server = TestServer::with_network(&config(), Box::new(network)).await;
    let request = GenerateRequest {
        request_id: "siblings".into(),
        sampling: Some(Sampling {
            num_samples: Some(4),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let mut stream = server.client().generate(request).await.unwrap().into_inner();
    let mut results = Vec::new();
    let status = loop {
        match stream.message().await {
            Ok(Some(message)) => {
                if let Some(Event::Result(result)) = message.event.and_then(|event| event.event) {
                    results.push(result.canvas);
                }
            }
            Ok(None) => panic!("the failed canvas is not told"),
            Err(status) => break status,
        }
    };
    results.sort_unstable();
    assert_eq!(results, [1, 2, 3]);
    assert_eq!(status.code(), Code::Internal);
    assert!(status.message().contains("siblings"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_reads_is_ended_and_says_so() {
    let mut config = config();
    config.server.unread_seconds = 1;
    let server = TestServer::with_network(&config, slowly(20, closed_form())).await;
    // A window of a few bytes: not even the first event fits, and nothing is read in advance.
    let narrow = Endpoint::from_shared(server.url.clone())
        .unwrap()
        .initial_stream_window_size(8)
        .connect()
        .await
        .unwrap();
    // 80 s of work, with a frame after every step.
    let request = GenerateRequest {
        request_id: "unread".into(),
        sampling: Some(Sampling {
            steps: Some(4000),
            ..Sampling::default()
        }),
        frames: Some(FramePolicy {
            when: frame_policy::When::EverySteps.into(),
            ..FramePolicy::default()
        }),
        ..GenerateRequest::default()
    };
    let mut unread = DiffusionServiceClient::new(narrow)
        .generate(request.clone())
        .await
        .unwrap()
        .into_inner();
    // The id is taken until the server gives the stream up.
    let mut client = server.client();
    let freed = async {
        while let Err(status) = client.generate(request.clone()).await {
            assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), freed)
        .await
        .expect("the unread stream is ended");
    // Whoever comes to read after all is told.
    let status = loop {
        match unread.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended as if it were whole"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Aborted, "{status:?}");
    assert!(generate(&mut client, GenerateRequest::default()).await.is_ok());
    server.stop().await;
}

/// A bundle whose network counts to 2^50 once a token is not 0: ONNX Runtime ends it when told to.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_never_ends_is_ended_and_others_are_served() {
    let repository = tempfile::tempdir().unwrap();
    publish(repository.path(), ("endless", 1), ENDLESS, false);
    let mut config = config();
    config.models.repository = Some(repository.path().to_owned().into());
    config.models.default = Some("world-english".to_owned());
    config.engine.max_pass_seconds = 1;
    let server = TestServer::demo_with(&config).await;
    let endless = GenerateRequest {
        model: Some(ModelReference {
            name: "endless".to_owned(),
            version: 0,
        }),
        length: Some(8),
        ..GenerateRequest::default()
    };
    let mut client = server.client();
    let hangs = tokio::spawn(async move { generate(&mut client, endless).await });
    let sound = GenerateRequest {
        sampling: Some(Sampling {
            seed: Some(1),
            steps: Some(4),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let calm = TestServer::demo().await;
    let expected = generate(&mut calm.client(), sound.clone()).await.unwrap();
    while !hangs.is_finished() {
        let answer = generate(&mut server.client(), sound.clone()).await.unwrap();
        assert_eq!(answer.results[0].tokens, expected.results[0].tokens);
    }
    let status = hangs.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status}");
    calm.stop().await;
    server.stop().await;
}

async fn health(server: &TestServer) -> ServingStatus {
    let request = HealthCheckRequest::default();
    let answer = HealthClient::new(server.channel.clone()).check(request).await;
    answer.unwrap().into_inner().status()
}

/// A new version that cannot be run, published over one that can.
#[tokio::test(flavor = "multi_thread")]
async fn a_default_that_cannot_be_loaded_leaves_the_others_served() {
    let repository = tempfile::tempdir().unwrap();
    publish(repository.path(), ("world-english", 2), ENDLESS, true);
    let mut config = config();
    config.models.repository = Some(repository.path().to_owned().into());
    let server = TestServer::demo_with(&config).await;
    let version = |version| {
        Some(ModelReference {
            name: "world-english".to_owned(),
            version,
        })
    };
    // The newest version, until it is known to fail.
    let failed = loop {
        let model = GetModelRequest { model: version(2) };
        let model = server.models().get_model(model).await.unwrap().into_inner();
        let model = model.model.unwrap();
        if model.state() == ModelState::Failed {
            break model;
        }
        tokio::task::yield_now().await;
    };
    assert!(
        failed.is_default && failed.state_reason.contains("sigma"),
        "{failed:?}"
    );
    for model in [None, version(0), version(1)] {
        let request = GenerateRequest {
            model,
            ..GenerateRequest::default()
        };
        let answer = generate(&mut server.client(), request).await.unwrap();
        assert_eq!(answer.accepted.unwrap().model.unwrap().version, 1);
    }
    let request = GenerateRequest {
        model: version(2),
        ..GenerateRequest::default()
    };
    let status = generate(&mut server.client(), request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("sigma"), "{status}");
    assert_eq!(health(&server).await, ServingStatus::Serving);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_down_while_no_model_can_be_served() {
    let fails = Arc::new(AtomicBool::new(true));
    let broken = Arc::clone(&fails);
    let network = move || {
        if broken.load(Ordering::Acquire) {
            return Err(NetworkError::Load("injected".to_owned()));
        }
        let network = ClosedForm::independent(Graph::new(GraphKind::Absorbing, 6), &[0.2; 5]);
        Ok(Box::new(network) as Box<dyn ScoreNetwork>)
    };
    let server = TestServer::with_network(&config(), Box::new(network)).await;
    let becomes = async |wanted| {
        let reached = async {
            while health(&server).await != wanted {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reached)
            .await
            .unwrap();
    };
    becomes(ServingStatus::NotServing).await;
    // It is tried again without being asked for.
    fails.store(false, Ordering::Release);
    becomes(ServingStatus::Serving).await;
    server.stop().await;
}

/// The default model takes its time to be loaded: the server answers meanwhile, and serves another.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_takes_long_to_load_keeps_neither_health_nor_others_waiting() {
    let gate = Gate::default();
    let door = gate.clone();
    let network = move || {
        door.wait();
        let network = ClosedForm::independent(Graph::new(GraphKind::Absorbing, 6), &[0.2; 5]);
        Ok(Box::new(network) as Box<dyn ScoreNetwork>)
    };
    let named = |name: &str, network| {
        let manifest = Manifest {
            name: name.to_owned(),
            ..closed_form_manifest()
        };
        ServedModel::without_bundle(manifest, 1, network)
    };
    let mut models = Models::default();
    models.insert(named("slow", Box::new(network)));
    models.insert(named("quick", closed_form()));
    let server = TestServer::run(Server::with_models(&config(), models).await.unwrap()).await;
    let reference = |name: &str| {
        Some(ModelReference {
            name: name.to_owned(),
            version: 0,
        })
    };
    let request = move |name: &str| GenerateRequest {
        model: reference(name),
        ..GenerateRequest::default()
    };
    assert_eq!(health(&server).await, ServingStatus::Serving);
    let mut client = server.client();
    let waits = tokio::spawn(async move { generate(&mut client, request("slow")).await });
    for _ in 0..4 {
        generate(&mut server.client(), request("quick")).await.unwrap();
    }
    let slow = GetModelRequest {
        model: reference("slow"),
    };
    let slow = server.models().get_model(slow).await.unwrap().into_inner();
    let slow = slow.model.unwrap();
    assert!(slow.is_default && slow.state() == ModelState::Loading, "{slow:?}");
    gate.open();
    waits.await.unwrap().unwrap();
    server.stop().await;
}

/// Between the start and the first request that needs it.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_is_replaced_behind_the_manifest_is_not_run() {
    let repository = tempfile::tempdir().unwrap();
    publish(repository.path(), ("replaced", 1), ENDLESS, false);
    let mut config = config();
    config.models.repository = Some(repository.path().to_owned().into());
    config.models.default = Some("world-english".to_owned());
    let server = TestServer::demo_with(&config).await;
    let other = include_bytes!("fixtures/networks/write.py");
    std::fs::write(repository.path().join("replaced/1").join(MODEL), other).unwrap();
    let request = GenerateRequest {
        model: Some(ModelReference {
            name: "replaced".to_owned(),
            version: 0,
        }),
        length: Some(8),
        ..GenerateRequest::default()
    };
    let status = generate(&mut server.client(), request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    server.stop().await;
}
