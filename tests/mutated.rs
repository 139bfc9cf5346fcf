//! Requests that are almost right, thousands of them, at every method: each is answered, none with an error of the
//! server's, and whoever asks beside them gets the same text as ever.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use denoised::client::Bearer;
use denoised::proto::DESCRIPTORS;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::likelihood::Likelihood as Kind;
use denoised::proto::v1::sampling::Sampler;
use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::text_or_tokens::Content;
use denoised::proto::v1::{
    Bound, CancelRequest, ChooseRequest, Confidence, Deadline, DetokenizeRequest, Draft, EntropyBounded,
    Euler, Exact, FirstHitting, FramePolicy, GenerateRequest, GetModelRequest, InfillRequest, Likelihood,
    LoadModelRequest, ModelReference, Order, PartToScore, Remask, Resume, Sampling, ScoreRequest,
    TemplatePart, TextOrTokens, TextToScore, ThetaTrapezoidal, TokenList, TokenSet, TokenizeRequest, Tweedie,
    UnloadModelRequest, draft,
};
use futures_util::StreamExt;
use prost::Message;
use prost_types::FileDescriptorSet;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::binary::{Serving, denoised};
use crate::errors::Raw;
use crate::support::{Answer, gap, generate, infill, prompt};
use crate::tokens::{Showing, token};

/// How many requests are sent; `DENOISED_MUTATIONS=1000000` for more.
fn mutations() -> u64 {
    let asked = std::env::var("DENOISED_MUTATIONS").ok();
    asked.and_then(|count| count.parse().ok()).unwrap_or(6000)
}

/// Requests under way at once.
const AT_ONCE: usize = 32;

/// A field of a message as it is written (protobuf.dev/programming-guides/encoding).
#[derive(Clone)]
struct Field {
    number: u64,
    value: Value,
}

#[derive(Clone)]
enum Value {
    Varint(u64),
    Eight([u8; 8]),
    Bytes(Vec<u8>),
    Four([u8; 4]),
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(bytes).ok()
}

fn fields(mut bytes: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let value = match key & 7 {
            0 => Value::Varint(varint(&mut bytes)?),
            1 => Value::Eight(bytes.split_off(..8)?.try_into().ok()?),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                Value::Bytes(bytes.split_off(..length)?.to_vec())
            }
            5 => Value::Four(bytes.split_off(..4)?.try_into().ok()?),
            _ => return None,
        };
        fields.push(Field {
            number: key >> 3,
            value,
        });
    }
    Some(fields)
}

fn written(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Field { number, value } in fields {
        let key = |wire| number << 3 | wire;
        match value {
            Value::Varint(value) => {
                prost::encoding::encode_varint(key(0), &mut bytes);
                prost::encoding::encode_varint(*value, &mut bytes);
            }
            Value::Eight(value) => {
                prost::encoding::encode_varint(key(1), &mut bytes);
                bytes.extend(value);
            }
            Value::Bytes(value) => {
                prost::encoding::encode_varint(key(2), &mut bytes);
                prost::encoding::encode_varint(value.len() as u64, &mut bytes);
                bytes.extend(value);
            }
            Value::Four(value) => {
                prost::encoding::encode_varint(key(5), &mut bytes);
                bytes.extend(value);
            }
        }
    }
    bytes
}

pub(crate) fn one_of<T: Copy>(values: &[T], random: &mut SmallRng) -> T {
    values[random.random_range(0..values.len())]
}

const INTEGERS: [u64; 14] = [
    0,
    1,
    2,
    7,
    64,
    127,
    128,
    129,
    4097,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    i64::MAX as u64,
    u64::MAX,
];
const DOUBLES: [f64; 10] = [
    0.0,
    -0.0,
    -1.0,
    1.0,
    0.5,
    1e-310,
    1e308,
    f64::NAN,
    f64::INFINITY,
    f64::NEG_INFINITY,
];
const TEXTS: [&str; 8] = [
    "",
    "\0",
    "[[8]]",
    "\u{202e}\u{feff}",
    "\u{1f600}\u{1f600}",
    "[MASK]",
    "  \n\t ",
    "In the beginning",
];

/// One thing about a message made otherwise, at any depth.
pub(crate) fn mutate(message: &[u8], random: &mut SmallRng) -> Vec<u8> {
    let Some(mut fields) = fields(message).filter(|fields| !fields.is_empty() && random.random_ratio(9, 10))
    else {
        return corrupt(message, random);
    };
    let at = random.random_range(0..fields.len());
    match random.random_range(0..10) {
        0 => drop(fields.remove(at)),
        1 => {
            let times = one_of(&[1, 3, 70, 1100], random);
            let again = vec![fields[at].clone(); times];
            fields.extend(again);
        }
        2 => fields[at].number = random.random_range(1..13),
        _ => match &mut fields[at].value {
            Value::Varint(value) => *value = one_of(&INTEGERS, random),
            Value::Eight(value) => *value = one_of(&DOUBLES, random).to_le_bytes(),
            Value::Four(value) => *value = (one_of(&DOUBLES, random) as f32).to_le_bytes(),
            Value::Bytes(bytes) => {
                *bytes = if random.random_ratio(1, 5) {
                    let text = one_of(&TEXTS, random);
                    text.repeat(one_of(&[1, 1, 1, 40, 5000], random)).into_bytes()
                } else {
                    mutate(bytes, random)
                }
            }
        },
    }
    written(&fields)
}

/// Bytes made otherwise, whatever they mean.
pub(crate) fn corrupt(bytes: &[u8], random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if bytes.is_empty() {
        return vec![random.random()];
    }
    let at = random.random_range(0..bytes.len());
    match random.random_range(0..4) {
        0 => bytes[at] ^= 1 << random.random_range(0..8),
        1 => bytes[at] = one_of(&[0, 0x7f, 0x80, 0xff], random),
        2 => bytes.truncate(at),
        _ => bytes.insert(at, random.random()),
    }
    bytes
}

fn samplers() -> [Sampler; 7] {
    [
        Sampler::Tweedie(Tweedie::default()),
        Sampler::Euler(Euler::default()),
        Sampler::FirstHitting(FirstHitting {}),
        Sampler::Confidence(Confidence {}),
        Sampler::EntropyBounded(EntropyBounded { bound: Some(0.5) }),
        Sampler::Remask(Remask { rate: Some(0.1) }),
        Sampler::ThetaTrapezoidal(ThetaTrapezoidal {}),
    ]
}

fn sampling(sampler: Sampler) -> Sampling {
    Sampling {
        steps: (!matches!(sampler, Sampler::FirstHitting(_))).then_some(4),
        sampler: Some(sampler),
        seed: Some(7),
        num_samples: Some(2),
        temperature: Some(0.9),
        top_p: Some(0.95),
        ..Sampling::default()
    }
}

fn model() -> ModelReference {
    ModelReference {
        name: "world-english".to_owned(),
        version: 1,
    }
}

fn template() -> InfillRequest {
    let part = |part| TemplatePart { part: Some(part) };
    let mut slot = gap(3);
    if let Part::Gap(gap) = &mut slot {
        gap.allowed = Some("some".to_owned());
    }
    let draft = Part::Draft(Draft {
        content: Some(draft::Content::Text("and he said".to_owned())),
    });
    InfillRequest {
        model: Some(model()),
        template: vec![
            part(Part::Text("In the".to_owned())),
            part(gap(4)),
            part(Part::Tokens(TokenList { ids: vec![5, 6, 7] })),
            part(draft),
            part(slot),
        ],
        token_sets: vec![TokenSet {
            name: "some".to_owned(),
            ids: vec![1, 2, 3],
            ..TokenSet::default()
        }],
        sampling: Some(Sampling {
            start_time: Some(0.7),
            ..sampling(Sampler::Tweedie(Tweedie::default()))
        }),
        frames: Some(FramePolicy {
            keyframes_only: true,
            ..FramePolicy::default()
        }),
        deadline: Some(Deadline {
            ms: Some(60_000),
            ..Deadline::default()
        }),
        request_id: "one".to_owned(),
        ..InfillRequest::default()
    }
}

/// Method and message of requests that are right.
async fn right_ones(channel: &Showing) -> Vec<(&'static str, Vec<u8>)> {
    let mut client = DiffusionServiceClient::new(channel.clone());
    let Answer { accepted, frames, .. } = infill(&mut client, template()).await.unwrap();
    let resumed = InfillRequest {
        resume: Some(Resume {
            accepted,
            frames: frames.into_iter().take(2).collect(),
            finished: vec![],
        }),
        ..InfillRequest::default()
    };
    let text = |text: &str| TextOrTokens {
        content: Some(Content::Text(text.to_owned())),
    };
    let scored = |likelihood| ScoreRequest {
        model: Some(model()),
        texts: vec![TextToScore {
            parts: vec![
                PartToScore {
                    content: Some(text("In the")),
                    context: true,
                },
                PartToScore {
                    content: Some(text(" beginning")),
                    context: false,
                },
            ],
        }],
        likelihood: Some(Likelihood {
            likelihood: Some(likelihood),
        }),
        seed: Some(3),
        ..ScoreRequest::default()
    };
    let bound = Kind::Bound(Bound { draws: Some(4) });
    let exact = Kind::Exact(Exact {
        order: Order::LeftToRight.into(),
    });
    let choose = ChooseRequest {
        model: Some(model()),
        before: Some(text("And God")),
        candidates: vec![text(" said"), text(" saw")],
        likelihood: Some(Likelihood {
            likelihood: Some(exact),
        }),
        ..ChooseRequest::default()
    };
    let mut right: Vec<(&'static str, Vec<u8>)> = samplers()
        .map(|sampler| GenerateRequest {
            model: Some(model()),
            prompt_as: Some(prompt("In the beginning")),
            length: Some(24),
            sampling: Some(sampling(sampler)),
            request_id: "two".to_owned(),
            ..GenerateRequest::default()
        })
        .map(|request| ("/denoised.v1.DiffusionService/Generate", request.encode_to_vec()))
        .into();
    right.extend([
        ("/denoised.v1.DiffusionService/Infill", template().encode_to_vec()),
        ("/denoised.v1.DiffusionService/Infill", resumed.encode_to_vec()),
        (
            "/denoised.v1.DiffusionService/Score",
            scored(bound).encode_to_vec(),
        ),
        (
            "/denoised.v1.DiffusionService/Score",
            scored(exact).encode_to_vec(),
        ),
        ("/denoised.v1.DiffusionService/Choose", choose.encode_to_vec()),
        (
            "/denoised.v1.DiffusionService/Cancel",
            CancelRequest {
                request_id: "one".to_owned(),
            }
            .encode_to_vec(),
        ),
        (
            "/denoised.v1.DiffusionService/Tokenize",
            TokenizeRequest {
                model: Some(model()),
                text: "In the beginning".to_owned(),
            }
            .encode_to_vec(),
        ),
        (
            "/denoised.v1.DiffusionService/Detokenize",
            DetokenizeRequest {
                model: Some(model()),
                tokens: vec![5, 6, 7, 8],
                pieces: true,
            }
            .encode_to_vec(),
        ),
        (
            "/denoised.v1.ModelService/GetModel",
            GetModelRequest { model: Some(model()) }.encode_to_vec(),
        ),
        ("/denoised.v1.ModelService/ListModels", Vec::new()),
        (
            "/denoised.v1.ModelService/LoadModel",
            LoadModelRequest { model: Some(model()) }.encode_to_vec(),
        ),
        (
            "/denoised.v1.ModelService/UnloadModel",
            UnloadModelRequest { model: Some(model()) }.encode_to_vec(),
        ),
        ("/denoised.v1.ServerService/GetServer", Vec::new()),
    ]);
    right
}

/// Sends `message` to `method`, and reads a little of the answer. Streams are left then.
async fn call(channel: &Showing, method: &'static str, message: Vec<u8>) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready()
        .await
        .map_err(|error| Status::unknown(error.to_string()))?;
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(method);
    let answer = grpc.server_streaming(tonic::Request::new(message), path, Raw);
    let mut answer = answer.await?.into_inner();
    for _ in 0..3 {
        if answer.message().await?.is_none() {
            break;
        }
    }
    Ok(())
}

/// A connection from an address of its own: another caller, also where neither has a token.
async fn connect(url: &str, host: u8, bearer: Bearer) -> Showing {
    let address = IpAddr::V4(Ipv4Addr::new(127, 0, 0, host));
    let endpoint = Channel::from_shared(url.to_owned()).unwrap();
    let endpoint = endpoint.local_address(Some(address));
    let endpoint = if url.starts_with("https://") {
        endpoint.tls_config(crate::tls::trusting()).unwrap()
    } else {
        endpoint
    };
    InterceptedService::new(endpoint.connect().await.unwrap(), bearer)
}

/// Times of calls, one after the other until `is_over`, each of which gets `tokens`.
async fn times(
    client: &mut DiffusionServiceClient<Showing>,
    request: impl Fn() -> GenerateRequest,
    is_over: impl Fn(usize) -> bool,
    tokens: &[Vec<u32>],
) -> Vec<Duration> {
    let mut times = Vec::new();
    while !is_over(times.len()) {
        let begun = Instant::now();
        let answer = generate(client, request()).await.unwrap();
        assert_eq!(answer.tokens(), tokens);
        times.push(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    times
}

fn median(times: &[Duration]) -> Option<Duration> {
    let mut times = times.to_vec();
    times.sort();
    times.get(times.len() / 2).copied()
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_almost_right_are_answered_and_harm_nobody() {
    answers_and_harms_nobody(
        denoised(),
        "http",
        mutations(),
        Bearer::default(),
        Bearer::default(),
    )
    .await;
}

/// Where a caller is known as one whose work comes first: four turns for each of the other's.
#[tokio::test(flavor = "multi_thread")]
async fn least_of_all_a_caller_of_weight() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let [honest, hostile] = ["weight = 4", "admin = true"].map(|rights| {
        let name = rights.split(' ').next().unwrap();
        Bearer::new(&token(&file, name, rights)).unwrap()
    });
    let mut command = denoised();
    command.env("DENOISED__SERVER__TOKENS", &file);
    answers_and_harms_nobody(command, "http", mutations() / 3, honest, hostile).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_do_they_over_tls() {
    let mut command = denoised();
    command
        .env(
            "DENOISED__SERVER__TLS_CERTIFICATE",
            crate::tls::fixture("first.pem"),
        )
        .env("DENOISED__SERVER__TLS_KEY", crate::tls::fixture("first.key"));
    let nobody = Bearer::default();
    answers_and_harms_nobody(command, "https", mutations() / 3, nobody.clone(), nobody).await;
}

async fn answers_and_harms_nobody(
    mut command: std::process::Command,
    scheme: &str,
    mutations: u64,
    honest: Bearer,
    hostile: Bearer,
) {
    command.env("DENOISED__SERVER__MODEL_CONTROL", "callers");
    // What would take long is refused: all that is accepted has to be answered soon.
    command.env("DENOISED__ENGINE__MAX_QUEUE_SECONDS", "10");
    command.env("DENOISED__LOG__FILTER", "warn");
    let server = Serving::start_with(&mut command);
    let url = format!("{scheme}://{}", server.address);
    let right = right_ones(&connect(&url, 2, hostile.clone()).await).await;
    let described = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    for file in &described.file {
        for (service, method) in file
            .service
            .iter()
            .flat_map(|service| service.method.iter().map(move |method| (service, method)))
        {
            let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
            assert!(right.iter().any(|(of, _)| *of == path), "{path} is not tried");
        }
    }

    let asked = || GenerateRequest {
        prompt_as: Some(prompt("In the beginning")),
        length: Some(16),
        sampling: Some(sampling(Sampler::Tweedie(Tweedie::default()))),
        ..GenerateRequest::default()
    };
    let channel = connect(&url, 3, honest).await;
    let mut honest = DiffusionServiceClient::new(channel);
    let undisturbed = generate(&mut honest, asked()).await.unwrap().tokens();
    let alone = times(&mut honest, asked, |done| done == 50, &undisturbed).await;
    let over = Arc::new(AtomicBool::new(false));
    let is_over = Arc::clone(&over);
    let beside = tokio::spawn(async move {
        let is_over = |_| is_over.load(Ordering::Acquire);
        times(&mut honest, asked, is_over, &undisturbed).await
    });

    let hostile = connect(&url, 4, hostile).await;
    let answers = futures_util::stream::iter(0..mutations)
        .map(|index| {
            let mut random = SmallRng::seed_from_u64(index);
            let (method, message) = &right[random.random_range(0..right.len())];
            let mut message = message.clone();
            for _ in 0..random.random_range(1..4) {
                message = mutate(&message, &mut random);
            }
            let hostile = hostile.clone();
            async move {
                let sent = message.clone();
                let called = call(&hostile, method, message);
                let answer = tokio::time::timeout(Duration::from_secs(120), called).await;
                let answer = answer.unwrap_or_else(|_| panic!("{index}: {method} does not answer {sent:x?}"));
                let code = answer.as_ref().map_or_else(Status::code, |()| Code::Ok);
                assert!(
                    matches!(
                        code,
                        Code::Ok
                            | Code::InvalidArgument
                            | Code::NotFound
                            | Code::AlreadyExists
                            | Code::FailedPrecondition
                            | Code::ResourceExhausted
                            | Code::DeadlineExceeded
                            // By another of them.
                            | Code::Cancelled
                            // More than server.max_message_bytes, as tonic has it.
                            | Code::OutOfRange
                    ),
                    "{index}: {method} answers {answer:?} to {sent:x?}"
                );
                code
            }
        })
        .buffer_unordered(AT_ONCE);
    let codes: Vec<Code> = answers.collect().await;
    over.store(true, Ordering::Release);
    let beside = beside.await.unwrap();
    eprintln!(
        "{} mutated requests; the honest caller's median of {} calls {:?}, alone {:?}",
        codes.len(),
        beside.len(),
        median(&beside),
        median(&alone)
    );
    let count = |code| codes.iter().filter(|other| **other == code).count();
    // They are almost right: some get past every check, and most do not.
    assert!(count(Code::Ok) > codes.len() / 20, "{}", count(Code::Ok));
    assert!(count(Code::InvalidArgument) > codes.len() / 4);
    let (code, log) = server.stop();
    assert_eq!(code, Some(0));
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
}
