//! Cancelled and dropped streams end their canvases; shutdown is clean.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use denoised::config::Config;
use denoised::diffusion::{Graph, GraphKind};
use denoised::network::closed_form::ClosedForm;
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::event::Event;
use denoised::proto::v1::{CancelRequest, GenerateRequest, Resume, Sampling, frame};
use tonic::Code;
use tonic::transport::Endpoint;

use crate::support::{Gate, TestServer, config, generate};

/// Counts evaluations, and waits at a gate in the first one.
struct Watched {
    network: ClosedForm,
    evaluations: Arc<AtomicUsize>,
    gate: Gate,
}

impl ScoreNetwork for Watched {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.evaluations.fetch_add(1, Ordering::AcqRel);
        self.gate.wait();
        self.network.log_score(batch, read)
    }
}

async fn watched() -> (TestServer, Arc<AtomicUsize>, Gate) {
    watched_with(&config()).await
}

async fn watched_with(config: &Config) -> (TestServer, Arc<AtomicUsize>, Gate) {
    let (evaluations, gate) = (Arc::new(AtomicUsize::new(0)), Gate::default());
    let (count, door) = (Arc::clone(&evaluations), gate.clone());
    let server = TestServer::with_network(
        config,
        Box::new(move || {
            let graph = Graph::new(GraphKind::Absorbing, 6);
            let network = ClosedForm::independent(graph, &[0.2; 5]);
            Ok(Box::new(Watched {
                network,
                evaluations: Arc::clone(&count),
                gate: door.clone(),
            }))
        }),
    )
    .await;
    (server, evaluations, gate)
}

fn long(id: &str) -> GenerateRequest {
    let sampling = Some(Sampling {
        steps: Some(4000),
        ..Sampling::default()
    });
    GenerateRequest {
        request_id: id.into(),
        sampling,
        ..GenerateRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_ends_a_running_request() {
    let (server, evaluations, gate) = watched().await;
    let mut stream = server.client().generate(long("mine")).await.unwrap().into_inner();
    let again = server.client().generate(long("mine")).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    server
        .client()
        .cancel(CancelRequest {
            request_id: "mine".into(),
        })
        .await
        .unwrap();
    gate.open();
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the request finished"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Cancelled);
    assert!(evaluations.load(Ordering::Acquire) <= 1);
    server.stop().await;
}

/// Another caller can neither end nor find a request, and may have one of the same id.
#[tokio::test(flavor = "multi_thread")]
async fn ids_belong_to_their_callers() {
    let (server, _, gate) = watched().await;
    let own = server.client().generate(long("mine")).await.unwrap();
    let elsewhere = Endpoint::from_shared(server.url.clone())
        .unwrap()
        .local_address(Some([127, 0, 0, 2].into()))
        .connect()
        .await
        .unwrap();
    let mut stranger = DiffusionServiceClient::new(elsewhere);
    let cancel = || CancelRequest {
        request_id: "mine".into(),
    };
    let refused = stranger.cancel(cancel()).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let theirs = stranger.generate(long("mine")).await.unwrap();
    stranger.cancel(cancel()).await.unwrap();
    drop(theirs);
    server.client().cancel(cancel()).await.unwrap();
    gate.open();
    drop(own);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_stops_the_work() {
    let (server, evaluations, gate) = watched().await;
    let stream = server.client().generate(long("dropped")).await.unwrap();
    drop(stream);
    // The id is free again once the server has noticed.
    let mut client = server.client();
    let freed = async {
        while client
            .cancel(CancelRequest {
                request_id: "dropped".into(),
            })
            .await
            .is_ok()
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), freed)
        .await
        .expect("the server notices");
    gate.open();
    let answer = generate(&mut client, GenerateRequest::default()).await.unwrap();
    assert_eq!(answer.results.len(), 1);
    let spent = evaluations.load(Ordering::Acquire);
    assert!(
        spent < 100,
        "{spent} evaluations: the dropped request was not carried on"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_lets_running_requests_finish_and_refuses_new_ones() {
    let (server, _, gate) = watched().await;
    let mut client = server.client();
    let mut stream = client
        .generate(GenerateRequest::default())
        .await
        .unwrap()
        .into_inner();
    let stopping = tokio::spawn(server.stop());
    let refused = async {
        loop {
            match client.generate(long("late")).await {
                Err(status) if status.code() == Code::Unavailable => break,
                Err(status) if status.code() == Code::AlreadyExists => {}
                Err(status) => panic!("{status:?}"),
                // Not draining yet: drop it and look again.
                Ok(early) => drop(early),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), refused)
        .await
        .expect("admission stops");
    gate.open();
    let mut results = 0;
    while let Some(message) = stream.message().await.unwrap() {
        results += usize::from(matches!(
            message.event.and_then(|event| event.event),
            Some(denoised::proto::v1::event::Event::Result(_))
        ));
    }
    assert_eq!(results, 1);
    stopping.await.unwrap();
}

/// No grace at all, and a request in the middle of an evaluation.
#[tokio::test(flavor = "multi_thread")]
async fn what_still_runs_when_the_grace_is_over_is_told() {
    let mut config = config();
    config.server.drain_grace_seconds = 0;
    let (server, evaluations, gate) = watched_with(&config).await;
    let mut client = server.client();
    let mut stream = client.generate(long("late")).await.unwrap().into_inner();
    let stopping = tokio::spawn(server.stop());
    while !matches!(client.generate(long("refused")).await, Err(status) if status.code() == Code::Unavailable)
    {
        tokio::task::yield_now().await;
    }
    gate.open();
    let (mut accepted, mut last) = (None, None);
    let status = loop {
        match stream.message().await {
            Ok(Some(message)) => match message.event.and_then(|event| event.event) {
                Some(Event::Accepted(first)) => accepted = Some(first),
                Some(Event::Frame(frame)) => last = Some(frame),
                other => panic!("{other:?}"),
            },
            Ok(None) => panic!("the request finished"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(evaluations.load(Ordering::Acquire) < 4000);
    stopping.await.unwrap();
    // The last word is a state from which another server goes on to the same end.
    let (accepted, last) = (accepted.unwrap(), last.unwrap());
    assert!(
        matches!(last.content, Some(frame::Content::Keyframe(_))),
        "{last:?}"
    );
    let (other, _, gate) = watched_with(&config).await;
    gate.open();
    let ask = |frames| GenerateRequest {
        resume: Some(Resume {
            accepted: Some(accepted.clone()),
            frames,
            finished: Vec::new(),
        }),
        ..GenerateRequest::default()
    };
    let resumed = generate(&mut other.client(), ask(vec![last])).await.unwrap();
    let undisturbed = generate(&mut other.client(), ask(Vec::new())).await.unwrap();
    assert_eq!(resumed.tokens(), undisturbed.tokens());
    assert_eq!(resumed.results[0].nfe, undisturbed.results[0].nfe);
    other.stop().await;
}
