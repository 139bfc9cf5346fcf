//! Plain HTTP on the port of gRPC: health, and metrics that tell what has happened.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use denoised::config::Who;
use denoised::diffusion::{Graph, GraphKind};
use denoised::network::closed_form::ClosedForm;
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::proto::v1::{CancelRequest, GenerateRequest, ListModelsRequest, Sampling};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{TestServer, closed_form, config, generate};

/// Status, head and body of what a server answers.
pub(crate) async fn ask(url: &str, request: &str) -> (u16, String, String) {
    let address = url.trim_start_matches("http://");
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = socket.read_to_string(&mut answer);
    tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("the connection is closed after the answer")
        .unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

pub(crate) async fn get(url: &str, path: &str) -> (u16, String, String) {
    ask(url, &format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n")).await
}

/// The number that `series` has in `metrics`.
pub(crate) fn value(metrics: &str, series: &str) -> Option<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix(series))?;
    line.strip_prefix(' ')?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_has_happened() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let request = || GenerateRequest {
        sampling: Some(Sampling {
            seed: Some(1),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    for _ in 0..3 {
        generate(&mut server.client(), request()).await.unwrap();
    }
    let bad = GenerateRequest {
        length: Some(9999),
        ..request()
    };
    generate(&mut server.client(), bad).await.unwrap_err();
    let nobody = CancelRequest {
        request_id: "nobody".to_owned(),
    };
    server.client().cancel(nobody).await.unwrap_err();
    server.models().list_models(ListModelsRequest {}).await.unwrap();
    // A name that someone has made up is no label.
    let made_up =
        tonic::codegen::http::uri::PathAndQuery::from_static("/denoised.v1.DiffusionService/MadeUp");
    let mut client = tonic::client::Grpc::new(server.channel.clone());
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<CancelRequest, CancelRequest>::default();
    let call = tonic::Request::new(CancelRequest::default());
    client.unary(call, made_up, codec).await.unwrap_err();

    // Calls are counted when their connection has seen their end, which can be after their client has.
    let told = async {
        loop {
            let asked = "GET /metrics HTTP/1.1\r\nHost: here\r\nAccept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3\r\n\r\n";
            let (status, head, metrics) = ask(&server.url, asked).await;
            assert_eq!(status, 200);
            assert!(
                head.contains("content-type: application/openmetrics-text"),
                "{head}"
            );
            let ended = [
                ("denoised_calls_total{method=\"Generate\",code=\"OK\"}", 3.0),
                (
                    "denoised_calls_total{method=\"Generate\",code=\"INVALID_ARGUMENT\"}",
                    1.0,
                ),
                ("denoised_calls_total{method=\"Cancel\",code=\"NOT_FOUND\"}", 1.0),
                ("denoised_calls_total{method=\"ListModels\",code=\"OK\"}", 1.0),
                (
                    "denoised_calls_total{method=\"unknown\",code=\"UNIMPLEMENTED\"}",
                    1.0,
                ),
            ];
            if ended
                .iter()
                .all(|(series, count)| value(&metrics, series) == Some(*count))
            {
                return metrics;
            }
            assert!(!metrics.contains("MadeUp"));
        }
    };
    let metrics = tokio::time::timeout(Duration::from_secs(20), told).await.unwrap();
    for (series, count) in [
        ("denoised_canvases_ended_total{outcome=\"done\"}", 3.0),
        ("denoised_call_seconds_count{method=\"Generate\"}", 4.0),
        (
            "denoised_call_first_message_seconds_count{method=\"Generate\"}",
            3.0,
        ),
        ("denoised_canvas_seconds_count{part=\"total\"}", 3.0),
        ("denoised_tokens_total", 36.0),
        ("denoised_running_requests", 0.0),
        ("denoised_running_canvases", 0.0),
        ("denoised_waiting_requests", 0.0),
        ("denoised_saturation_ratio", 0.0),
        ("denoised_queued_seconds", 0.0),
        (
            "denoised_model_state{model=\"closed-form\",version=\"1\",state=\"ready\"}",
            1.0,
        ),
    ] {
        assert_eq!(value(&metrics, series), Some(count), "{series} in\n{metrics}");
    }
    let number = |series| value(&metrics, series).unwrap();
    let (passes, canvases) = ("denoised_pass_canvases_count", "denoised_pass_canvases_sum");
    assert_eq!(
        number("denoised_pass_seconds_count{part=\"network\"}"),
        number(passes)
    );
    assert_eq!(number("denoised_evaluations_total"), number(canvases));
    assert_eq!(number("denoised_canvas_evaluations_sum"), number(canvases));
    assert!(number("process_resident_memory_bytes") > 1e6);
    // By the conventions: a prefix, base units, totals of counters, and each family described once.
    let described: Vec<&str> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(described.len(), described.iter().collect::<BTreeSet<_>>().len());
    for family in &described {
        assert!(
            family.starts_with("denoised_") || family.starts_with("process_"),
            "{family}"
        );
        assert!(metrics.contains(&format!("# HELP {family} ")), "{family}");
    }
    let counters: Vec<&str> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    for family in &counters {
        let bare = [format!("{family} "), format!("{family}{{")];
        let is_bare = |line: &str| bare.iter().any(|bare| line.starts_with(bare));
        assert!(
            !metrics.lines().any(is_bare),
            "{family} has a sample that is no total"
        );
    }
    assert!(counters.len() >= 5);
    assert!(metrics.ends_with("# EOF\n"));
    server.stop().await;
}

/// A network that evaluates when it may.
struct Gated(ClosedForm, Arc<AtomicBool>);

impl ScoreNetwork for Gated {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        while !self.1.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        self.0.log_score(batch, read)
    }
}

/// What runs is told while it runs, and who goes away has cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn what_runs_is_told() {
    let is_open = Arc::new(AtomicBool::new(false));
    let door = Arc::clone(&is_open);
    let server = TestServer::with_network(
        &config(),
        Box::new(move || {
            let network = ClosedForm::independent(Graph::new(GraphKind::Absorbing, 6), &[0.2; 5]);
            Ok(Box::new(Gated(network, Arc::clone(&door))))
        }),
    )
    .await;
    let mut client = server.client();
    let mut stream = client
        .generate(GenerateRequest::default())
        .await
        .unwrap()
        .into_inner();
    stream.message().await.unwrap();
    let (_, _, metrics) = get(&server.url, "/metrics").await;
    assert_eq!(value(&metrics, "denoised_running_requests"), Some(1.0));
    assert_eq!(value(&metrics, "denoised_running_canvases"), Some(1.0));
    assert_eq!(value(&metrics, "denoised_waiting_requests"), Some(1.0));
    let queued = value(&metrics, "denoised_queued_seconds").unwrap();
    let saturation = value(&metrics, "denoised_saturation_ratio").unwrap();
    assert!(
        queued > 0.0 && (saturation * 3600.0 / queued - 1.0).abs() < 1e-6,
        "{saturation} of {queued}"
    );
    drop(stream);
    let cancelled = "denoised_calls_total{method=\"Generate\",code=\"CANCELLED\"}";
    let told = async { while value(&get(&server.url, "/metrics").await.2, cancelled) != Some(1.0) {} };
    tokio::time::timeout(Duration::from_secs(20), told).await.unwrap();
    // Not before: it could be finished, and told so, before the server has seen that nobody listens.
    is_open.store(true, Ordering::Release);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_without_grpc() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    assert_eq!(get(&server.url, "/healthz").await.0, 200);
    assert_eq!(get(&server.url, "/readyz").await.0, 200);
    let head = ask(&server.url, "HEAD /healthz HTTP/1.1\r\nHost: here\r\n\r\n").await;
    assert_eq!((head.0, head.2.as_str()), (200, ""));
    let (status, _, body) = get(&server.url, "/denoised.v1.DiffusionService/Generate").await;
    assert_eq!(status, 404);
    assert!(body.contains("gRPC over HTTP/2"), "{body}");
    server.stop().await;

    let mut off = config();
    off.server.metrics = Who::Nobody;
    let server = TestServer::with_network(&off, closed_form()).await;
    let (status, _, body) = get(&server.url, "/metrics").await;
    assert_eq!(status, 404);
    assert!(body.contains("server.metrics"), "{body}");
    server.stop().await;
}

/// A plain request that never ends is not waited for, nor one whose head is too long.
#[tokio::test(flavor = "multi_thread")]
async fn slow_and_long_requests_are_ended() {
    let mut config = config();
    config.server.handshake_seconds = 1;
    let server = TestServer::with_network(&config, closed_form()).await;
    for request in [
        "GET /metrics HTTP/1.1\r\nHost: here\r\nX: ".to_owned(),
        format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 20)),
    ] {
        let address = server.url.trim_start_matches("http://");
        let mut socket = TcpStream::connect(address).await.unwrap();
        // The server may be gone before all of it is written.
        socket.write_all(request.as_bytes()).await.ok();
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(20), socket.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "{}", request.len());
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    server.models().list_models(ListModelsRequest {}).await.unwrap();
    server.stop().await;
}
