//! Deadlines of the field and of the call: fewer steps instead of an error, or an error in time.

use std::time::Duration;

use denoised::proto::v1::{Deadline, FinishReason, GenerateRequest, OnDeadline, Sampling};
use tonic::{Code, Request};
use tonic_types::StatusExt;

use crate::support::{TestServer, closed_form, config, generate, slowly};

async fn slow_server() -> TestServer {
    let server = TestServer::with_network(&config(), slowly(10, closed_form())).await;
    // Costs are known once something has run.
    let few = request(4, None);
    assert_eq!(
        generate(&mut server.client(), few).await.unwrap().results.len(),
        1
    );
    server
}

fn request(steps: u32, deadline: Option<(Option<u64>, OnDeadline)>) -> GenerateRequest {
    GenerateRequest {
        sampling: Some(Sampling {
            steps: Some(steps),
            ..Sampling::default()
        }),
        deadline: deadline.map(|(ms, on_deadline)| Deadline {
            ms,
            on_deadline: on_deadline.into(),
        }),
        ..GenerateRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_buys_fewer_steps() {
    let server = slow_server().await;
    let early = request(4000, Some((Some(400), OnDeadline::FinishEarly)));
    let answer = generate(&mut server.client(), early).await.unwrap();
    let (accepted, result) = (answer.accepted.unwrap(), &answer.results[0]);
    assert!(accepted.deadline_ms.is_some_and(|ms| ms <= 400));
    assert!(
        accepted.predicted_seconds > 10.0,
        "{}",
        accepted.predicted_seconds
    );
    assert_eq!(result.finish_reason(), FinishReason::Deadline);
    assert!(result.tokens.iter().all(|&token| token < 5));
    // No evaluation takes less than 10 ms.
    assert!((1..=40).contains(&result.nfe), "{}", result.nfe);
    let last = answer.frames.last().unwrap();
    assert_eq!((last.masked, last.step), (0, last.total));
    // With time enough nothing changes.
    let whole = request(4, Some((Some(60_000), OnDeadline::FinishEarly)));
    let answer = generate(&mut server.client(), whole).await.unwrap();
    assert_eq!(answer.results[0].finish_reason(), FinishReason::Done);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_of_the_call_is_one() {
    let server = slow_server().await;
    let call = |on_deadline, steps| {
        let mut call = Request::new(request(steps, Some((None, on_deadline))));
        call.set_timeout(Duration::from_millis(500));
        call
    };
    let mut client = server.client();
    let early = call(OnDeadline::FinishEarly, 4000);
    let mut stream = client.generate(early).await.unwrap().into_inner();
    let mut finished = None;
    while let Some(message) = stream.message().await.unwrap() {
        use denoised::proto::v1::event::Event;
        if let Some(Event::Result(result)) = message.event.and_then(|event| event.event) {
            finished = Some(result.finish_reason());
        }
    }
    assert_eq!(finished, Some(FinishReason::Deadline));
    let refused = client.generate(call(OnDeadline::Fail, 4000)).await.unwrap_err();
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "DEADLINE_TOO_NEAR"
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_met_is_refused_and_what_is_missed_ends() {
    let server = slow_server().await;
    let mut client = server.client();
    let infeasible = request(1000, Some((Some(2000), OnDeadline::Fail)));
    let status = generate(&mut client, infeasible).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, "DEADLINE_TOO_NEAR");
    assert!(info.metadata["predicted_seconds"].parse::<f64>().unwrap() > 2.0);
    for (field, deadline) in [
        (
            "deadline.ms",
            Deadline {
                ms: Some(0),
                on_deadline: 0,
            },
        ),
        (
            "deadline.ms",
            Deadline {
                ms: None,
                on_deadline: 2,
            },
        ),
        (
            "deadline.on_deadline",
            Deadline {
                ms: Some(9),
                on_deadline: 9,
            },
        ),
    ] {
        let request = GenerateRequest {
            deadline: Some(deadline),
            ..GenerateRequest::default()
        };
        let status = generate(&mut client, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(field), "{}", status.message());
    }
    server.stop().await;
}

/// A network that has not answered yet: nothing is known of its times, so the request is accepted.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_passes_ends_the_stream() {
    let gate = crate::support::Gate::default();
    let (door, source) = (gate.clone(), crate::support::closed_form());
    let network = move || {
        door.wait();
        source()
    };
    let server = TestServer::with_network(&config(), Box::new(network)).await;
    let missed = request(10, Some((Some(100), OnDeadline::Fail)));
    let status = generate(&mut server.client(), missed).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_eq!(status.get_details_error_info().unwrap().reason, "DEADLINE_PASSED");
    gate.open();
    server.stop().await;
}
