//! The command line goes on with a request when its server goes away, and ends with the same text.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use denoised::client::{Client, Event, Request, Retry};
use denoised::proto::v1::GenerateRequest;
use serde_json::Value;
use tonic::Code;

use crate::binary::{Serving, denoised};
use crate::support::{TestServer, closed_form, config};

/// How often a server is killed; `DENOISED_KILLS=50` for more.
fn kills() -> usize {
    let asked = std::env::var("DENOISED_KILLS").ok();
    asked.and_then(|kills| kills.parse().ok()).unwrap_or(3)
}

const ASKED: [&str; 9] = [
    "generate",
    "--json",
    "--length",
    "96",
    "--steps",
    "48",
    "--seed",
    "5",
    "In the beginning",
];

/// The events of one run, whose `servers` are told of every frame.
fn run(servers: &str, mut on_frame: impl FnMut(usize)) -> Vec<Value> {
    let mut child = denoised()
        .args(ASKED)
        .args(["--server", servers])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut events, mut frames) = (Vec::new(), 0);
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if event.get("frame").is_some() {
            frames += 1;
            on_frame(frames);
        }
        events.push(event);
    }
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    events
}

/// Tokens, steps and text of the only result.
fn result(events: &[Value]) -> [&Value; 3] {
    let results: Vec<&Value> = events.iter().filter_map(|event| event.get("result")).collect();
    assert_eq!(results.len(), 1, "{events:?}");
    ["tokens", "committed_at", "text"].map(|key| &results[0][key])
}

fn resumed(events: &[Value]) -> usize {
    events
        .iter()
        .filter(|event| event.get("resumed").is_some())
        .count()
}

#[test]
fn a_killed_server_costs_nothing_but_time() {
    let mut first = Some(Serving::start());
    let second = Serving::start();
    let url = |server: &Serving| format!("http://{}", server.address);
    let undisturbed = run(&url(&second), |_| {});
    assert_eq!(resumed(&undisturbed), 0);
    for kill in 0..kills() {
        let victim = first.take().unwrap_or_else(Serving::start);
        let servers = format!("{},{}", url(&victim), url(&second));
        // Early and late.
        let (mut victim, at) = (Some(victim), 1 + kill * 5 % 7);
        let events = run(&servers, |frames| {
            if frames == at {
                // Dropping kills.
                victim.take();
            }
        });
        assert_eq!(result(&events), result(&undisturbed), "killed at frame {at}");
        assert!(resumed(&events) >= 1, "{events:?}");
    }
}

/// SIGTERM and no grace.
#[test]
fn a_server_that_is_drained_hands_its_requests_on() {
    let mut command = denoised();
    command.env("DENOISED__SERVER__DRAIN_GRACE_SECONDS", "0");
    let (first, second) = (Serving::start_with(&mut command), Serving::start());
    let servers = format!("http://{},http://{}", first.address, second.address);
    let undisturbed = run(&format!("http://{}", second.address), |_| {});
    let events = run(&servers, |frames| {
        if frames == 2 {
            first.terminate();
        }
    });
    assert_eq!(result(&events), result(&undisturbed));
    let at = events
        .iter()
        .position(|event| event.get("resumed").is_some())
        .unwrap();
    let after = events[at]["resumed"]["after"].as_str().unwrap();
    assert!(after.contains("shut down"), "{after}");
}

/// A server that neither answers nor closes, as when its machine has vanished.
#[test]
fn a_server_that_falls_silent_is_left() {
    let (first, second) = (Serving::start(), Serving::start());
    let servers = format!("http://{},http://{}", first.address, second.address);
    let undisturbed = run(&format!("http://{}", second.address), |_| {});
    let events = run(&servers, |frames| {
        if frames == 2 {
            first.signal("STOP");
        }
    });
    assert_eq!(result(&events), result(&undisturbed));
    assert_eq!(resumed(&events), 1);
    first.signal("CONT");
}

/// A socket that takes connections, and nobody behind it.
#[tokio::test]
async fn a_socket_that_never_answers_is_no_server() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    let client = Client::new([url]).unwrap().with_retry(Retry::NEVER);
    let mut events = client.run(Request::continuing("In the beginning"));
    let answer = tokio::time::timeout(Duration::from_secs(120), events.next());
    let status = answer.await.expect("it is given up").unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

/// A proxy whose server has gone may end an answer without a last word (HAProxy does).
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_a_last_word_is_gone_on_with() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = format!("http://{}", listener.local_addr().unwrap());
    let proxying = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = hyper::service::service_fn(|_| async {
                let mut response = http::Response::new(axum::body::Body::empty());
                let grpc = http::HeaderValue::from_static("application/grpc");
                response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
                Ok::<_, std::convert::Infallible>(response)
            });
            let executor = hyper_util::rt::TokioExecutor::new();
            let builder = hyper_util::server::conn::auto::Builder::new(executor).http2_only();
            tokio::spawn(async move {
                let stream = hyper_util::rt::TokioIo::new(stream);
                builder.serve_connection(stream, service).await.ok();
            });
        }
    });
    let server = TestServer::with_network(&config(), closed_form()).await;
    let client = Client::new([&proxy, &server.url]).unwrap();
    let mut events = client.run(Request::from(GenerateRequest::default()));
    let (mut resumed, mut results) = (Vec::new(), 0);
    while let Some(event) = events.next().await {
        match event.unwrap() {
            Event::Resumed(after) => resumed.push(after.after.code()),
            Event::Result(_) => results += 1,
            _ => {}
        }
    }
    assert_eq!((resumed, results), (vec![Code::Unknown], 1));
    proxying.abort();
    server.stop().await;
}
