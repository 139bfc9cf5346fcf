//! Bad requests get the right code, name their field and harm nobody else.

use bytes::{Buf, BufMut};
use denoised::proto::v1::generate_request::PromptAs;
use denoised::proto::v1::sampling::Sampler;
use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::{
    CancelRequest, DetokenizeRequest, EntropyBounded, FirstHitting, FramePolicy, GenerateRequest,
    InfillRequest, ModelReference, Remask, Sampling, TemplatePart, TokenList, TokenizeRequest,
};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::support::{Gate, TestServer, closed_form, config, gap, generate, infill, prompt};

fn sampling(change: impl FnOnce(&mut Sampling)) -> GenerateRequest {
    let mut sampling = Sampling::default();
    change(&mut sampling);
    GenerateRequest {
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

fn entropy_bounded(bound: f64) -> Sampler {
    Sampler::EntropyBounded(EntropyBounded { bound: Some(bound) })
}

#[track_caller]
fn names_field(status: &Status, field: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().starts_with(field), "{}", status.message());
    let details = status.get_details_bad_request().expect("BadRequest details");
    assert_eq!(details.field_violations[0].field, field);
    assert_eq!(status.get_details_error_info().unwrap().domain, "denoised.v1");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_generate_is_checked() {
    let server = TestServer::demo().await;
    let mut client = server.client();
    let default = GenerateRequest::default;
    let cases = vec![
        ("sampling.steps", sampling(|s| s.steps = Some(0))),
        ("sampling.steps", sampling(|s| s.steps = Some(u32::MAX))),
        (
            "sampling.temperature",
            sampling(|s| s.temperature = Some(f64::NAN)),
        ),
        ("sampling.temperature", sampling(|s| s.temperature = Some(-1.0))),
        (
            "sampling.temperature",
            sampling(|s| s.temperature = Some(f64::INFINITY)),
        ),
        ("sampling.top_k", sampling(|s| s.top_k = Some(0))),
        ("sampling.top_p", sampling(|s| s.top_p = Some(0.0))),
        ("sampling.top_p", sampling(|s| s.top_p = Some(f64::NAN))),
        ("sampling.num_samples", sampling(|s| s.num_samples = Some(0))),
        (
            "sampling.num_samples",
            sampling(|s| s.num_samples = Some(1_000_000)),
        ),
        (
            "sampling.entropy_bounded.bound",
            sampling(|s| s.sampler = Some(entropy_bounded(f64::NAN))),
        ),
        (
            "sampling.entropy_bounded.bound",
            sampling(|s| s.sampler = Some(entropy_bounded(-0.1))),
        ),
        (
            "sampling.remask.rate",
            sampling(|s| s.sampler = Some(Sampler::Remask(Remask { rate: Some(1.1) }))),
        ),
        // What a sampler does not take is not ignored.
        (
            "sampling.steps",
            sampling(|s| (s.sampler, s.steps) = (Some(Sampler::FirstHitting(FirstHitting {})), Some(8))),
        ),
        (
            "prompt_tokens.ids[1]",
            GenerateRequest {
                prompt_as: Some(PromptAs::PromptTokens(TokenList {
                    ids: vec![0, 4_000_000],
                })),
                ..default()
            },
        ),
        (
            "prompt_tokens",
            GenerateRequest {
                prompt_as: Some(PromptAs::PromptTokens(TokenList { ids: vec![0; 200] })),
                ..default()
            },
        ),
        (
            "frames.text",
            GenerateRequest {
                frames: Some(FramePolicy {
                    text: 9,
                    ..FramePolicy::default()
                }),
                ..default()
            },
        ),
        (
            "length",
            GenerateRequest {
                length: Some(0),
                ..default()
            },
        ),
        (
            "length",
            GenerateRequest {
                length: Some(1_000_000),
                ..default()
            },
        ),
        (
            "prompt",
            GenerateRequest {
                prompt_as: Some(prompt(&"word ".repeat(200))),
                ..default()
            },
        ),
        (
            "prompt",
            GenerateRequest {
                prompt_as: Some(prompt("In the beginning")),
                length: Some(1),
                ..default()
            },
        ),
        (
            "frames.when",
            GenerateRequest {
                frames: Some(FramePolicy {
                    when: 77,
                    ..FramePolicy::default()
                }),
                ..default()
            },
        ),
        (
            "frames.every_steps",
            GenerateRequest {
                frames: Some(FramePolicy {
                    when: 3,
                    every_steps: Some(0),
                    ..FramePolicy::default()
                }),
                ..default()
            },
        ),
        (
            "request_id",
            GenerateRequest {
                request_id: "with space".into(),
                ..default()
            },
        ),
        (
            "request_id",
            GenerateRequest {
                request_id: "x".repeat(200),
                ..default()
            },
        ),
        (
            "model.name",
            GenerateRequest {
                model: Some(ModelReference {
                    version: 1,
                    ..ModelReference::default()
                }),
                ..default()
            },
        ),
    ];
    for (field, request) in cases {
        names_field(&generate(&mut client, request).await.unwrap_err(), field);
    }
    // Nobody was harmed.
    assert_eq!(
        generate(
            &mut client,
            GenerateRequest {
                length: Some(8),
                ..default()
            }
        )
        .await
        .unwrap()
        .results
        .len(),
        1
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_of_infill_is_checked() {
    let server = TestServer::demo().await;
    let ask = |parts: Vec<Option<Part>>| InfillRequest {
        template: parts.into_iter().map(|part| TemplatePart { part }).collect(),
        ..InfillRequest::default()
    };
    let gap = |n| Some(gap(n));
    let cases = [
        ("template", ask(vec![])),
        ("template", ask(vec![Some(Part::Text("no gap".into()))])),
        ("template", ask(vec![gap(u32::MAX), gap(u32::MAX)])),
        ("template", ask(vec![gap(1); 2000])),
        (
            "template",
            ask(vec![Some(Part::Text("x".repeat(2_000_000))), gap(1)]),
        ),
        ("template[1].gap.positions", ask(vec![gap(1), gap(0)])),
        ("template[1]", ask(vec![gap(1), None])),
        (
            "template[0].tokens.ids[1]",
            ask(vec![
                Some(Part::Tokens(TokenList {
                    ids: vec![3, 4_000_000],
                })),
                gap(1),
            ]),
        ),
    ];
    for (field, request) in cases {
        names_field(&infill(&mut server.client(), request).await.unwrap_err(), field);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_things_are_not_found() {
    let server = TestServer::demo().await;
    let model = |name: &str, version| {
        Some(ModelReference {
            name: name.into(),
            version,
        })
    };
    for (name, version) in [("gpt-17", 0), ("world-english", 999)] {
        let request = GenerateRequest {
            model: model(name, version),
            ..GenerateRequest::default()
        };
        let status = generate(&mut server.client(), request).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
        assert!(
            status
                .get_details_resource_info()
                .unwrap()
                .resource_name
                .starts_with(name)
        );
    }
    let status = server
        .client()
        .cancel(CancelRequest {
            request_id: "nobody".into(),
        })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let empty = server
        .client()
        .cancel(CancelRequest::default())
        .await
        .unwrap_err();
    names_field(&empty, "request_id");
    let tokens = DetokenizeRequest {
        tokens: vec![u32::MAX],
        pieces: true,
        model: None,
    };
    names_field(
        &server.client().detokenize(tokens).await.unwrap_err(),
        "tokens[0]",
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_of_a_model_without_tokenizer_is_refused_and_tokens_work() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let status = server
        .client()
        .tokenize(TokenizeRequest {
            text: "hello".into(),
            model: None,
        })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let request = GenerateRequest {
        prompt_as: Some(prompt("hello")),
        ..GenerateRequest::default()
    };
    assert_eq!(
        generate(&mut server.client(), request).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    let answer = generate(&mut server.client(), GenerateRequest::default())
        .await
        .unwrap();
    assert_eq!(
        (answer.results[0].text.as_ref(), answer.results[0].tokens.len()),
        (None, 12)
    );
    server.stop().await;
}

/// A server on which one request of 149 steps fills most of a second: nothing is measured yet, so each of its
/// evaluations is taken to cost 5 ms.
pub(crate) async fn busy_server(max_queue_seconds: u64, max_caller_share: f64) -> (TestServer, Gate) {
    let mut config = config();
    config.engine.max_queue_seconds = max_queue_seconds;
    config.engine.max_caller_share = max_caller_share;
    let (gate, source) = (Gate::default(), closed_form());
    let door = gate.clone();
    let network = move || {
        door.wait();
        source()
    };
    (TestServer::with_network(&config, Box::new(network)).await, gate)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_and_a_used_share_say_so_and_when_to_come_back() {
    for (seconds, share, reason) in [(1, 1.0, "QUEUE_FULL"), (2, 0.5, "CALLER_SHARE_USED")] {
        let (server, gate) = busy_server(seconds, share).await;
        let mut client = server.client();
        let request = sampling(|s| s.steps = Some(149));
        let mut first = client.generate(request.clone()).await.unwrap().into_inner();
        let status = client.generate(request.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        let retry = status.get_details_retry_info().unwrap().retry_delay.unwrap();
        // 0.75 s and 0.75 s again are half a second more than there is room for.
        assert_eq!(retry.as_millis(), 500);
        assert_eq!(status.get_details_error_info().unwrap().reason, reason);
        let quota = status.get_details_quota_failure().is_some();
        assert_eq!(quota, reason == "CALLER_SHARE_USED");
        gate.open();
        while first.message().await.unwrap().is_some() {}
        assert_eq!(generate(&mut client, request).await.unwrap().results.len(), 1);
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_wait_is_refused_for_good() {
    let (server, gate) = busy_server(1, 1.0).await;
    let request = sampling(|s| (s.steps, s.num_samples) = (Some(149), Some(3)));
    let status = generate(&mut server.client(), request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(
        status.get_details_bad_request().unwrap().field_violations[0].field,
        "sampling"
    );
    assert!(status.message().contains("2.2 s"), "{}", status.message());
    assert!(status.get_details_retry_info().is_none());
    gate.open();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_cannot_be_loaded_is_unavailable_and_tells_callers_no_secrets() {
    let server = TestServer::with_network(
        &config(),
        Box::new(|| Err(denoised::network::NetworkError::Load("secret path".into()))),
    )
    .await;
    // While it is being loaded, and when it is known to fail.
    for _ in 0..2 {
        let status = generate(&mut server.client(), GenerateRequest::default())
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(status.get_details_error_info().unwrap().reason, "MODEL_FAILED");
        assert!(status.get_details_retry_info().is_some());
        assert!(status.message().contains("closed-form@1") && !status.message().contains("secret"));
    }
    server.stop().await;
}

/// Sends bytes as they are, as no generated client would.
#[derive(Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(source.copy_to_bytes(source.remaining()).to_vec()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_utf8_and_garbage_are_the_callers_fault() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    // Field 2 of GenerateRequest is the prompt.
    for (bytes, says) in [(vec![0x12, 2, 0xff, 0xfe], "prompt"), (vec![0xff; 9], "")] {
        let mut raw = tonic::client::Grpc::new(server.channel.clone());
        raw.ready().await.unwrap();
        let path = "/denoised.v1.DiffusionService/Generate".parse().unwrap();
        let status = raw
            .server_streaming(tonic::Request::new(bytes), path, Raw)
            .await
            .map(|_| ())
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(says), "{}", status.message());
    }
    server.stop().await;
}
