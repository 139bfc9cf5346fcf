//! Deadlines under load: who is late, who is refused, and how many evaluations the time buys.

use std::time::{Duration, Instant};

use anyhow::Result;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::event::Event;
use denoised::proto::v1::{
    Deadline, FinishReason, FramePolicy, GenerateRequest, OnDeadline, Sampling, frame_policy,
};
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tonic::Code;
use tonic::transport::Channel;

use crate::{load, quartiles};

/// Streams that ask at once, one request after the other.
const STREAMS: [usize; 2] = [1, 16];
const REQUESTS: u32 = 300;
const LENGTH: u32 = 64;
const STEPS: u32 = 16;
/// How late an answer may be, in milliseconds, or one pass.
const GRACE: f64 = 50.0;

pub(crate) fn run(threads: usize) -> Result<Value> {
    load::with_server(threads, async |url| {
        println!(
            "\ndeadlines of 0.1 to 2 times the need of {LENGTH} tokens in {STEPS} steps, {REQUESTS} of each"
        );
        println!(
            "  streams  then          need, ms  refused (of those in time)  whole  early  failed  late  latest, ms  evaluations"
        );
        let mut rows = Vec::new();
        for streams in STREAMS {
            for then in [OnDeadline::FinishEarly, OnDeadline::Fail] {
                rows.push(row(&url, streams, then).await?);
            }
        }
        Ok(Value::Array(rows))
    })
}

fn request(seed: u64, deadline: Option<Deadline>) -> GenerateRequest {
    GenerateRequest {
        length: Some(LENGTH),
        sampling: Some(Sampling {
            steps: Some(STEPS),
            seed: Some(seed),
            ..Sampling::default()
        }),
        frames: Some(FramePolicy {
            when: frame_policy::When::Never.into(),
            ..FramePolicy::default()
        }),
        deadline,
        ..GenerateRequest::default()
    }
}

/// Evaluations of a request and whether its deadline cut it short.
async fn ask(
    client: &mut DiffusionServiceClient<Channel>,
    request: GenerateRequest,
) -> Result<(u32, bool), tonic::Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut answer = (0, false);
    while let Some(message) = stream.message().await? {
        if let Some(Event::Result(result)) = message.event.and_then(|event| event.event) {
            answer = (result.nfe, result.finish_reason() == FinishReason::Deadline);
        }
    }
    Ok(answer)
}

/// How requests ended that had a deadline.
#[derive(Default)]
struct Endings {
    refused: u32,
    /// Those of them whose deadline was no nearer than the need.
    refused_in_time: u32,
    whole: u32,
    early: u32,
    failed: u32,
    late: u32,
    /// Milliseconds from the deadline to the end, of those that were not refused.
    over: Vec<f64>,
    evaluations: u32,
}

/// One stream of requests with deadlines, by number; without `then` they have none and take their time.
async fn stream(
    url: &str,
    numbers: impl Iterator<Item = u32>,
    then: Option<OnDeadline>,
    need: f64,
) -> Result<Endings> {
    let channel = Channel::from_shared(url.to_owned())?.connect().await?;
    let (mut client, mut endings) = (DiffusionServiceClient::new(channel), Endings::default());
    for number in numbers {
        // In an order that mixes near and far ones.
        let share = f64::from(number * 7 % REQUESTS) / f64::from(REQUESTS - 1);
        let ms = (need * (0.1 + 1.9 * share)).max(1.0).floor();
        let deadline = then.map(|then| Deadline {
            ms: Some(ms as u64),
            on_deadline: then.into(),
        });
        let started = Instant::now();
        let answer = ask(&mut client, request(number.into(), deadline)).await;
        let over = 1e3 * started.elapsed().as_secs_f64() - if then.is_some() { ms } else { 0.0 };
        match answer {
            Ok((nfe, cut)) => {
                endings.early += u32::from(cut);
                endings.whole += u32::from(!cut);
                endings.evaluations += nfe;
                endings.late += u32::from(over > GRACE);
                endings.over.push(over);
            }
            Err(status)
                if status.code() == Code::DeadlineExceeded && status.message().contains("cannot be met") =>
            {
                endings.refused += 1;
                endings.refused_in_time += u32::from(ms >= need);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(status) if status.code() == Code::DeadlineExceeded => endings.failed += 1,
            Err(status) => return Err(status.into()),
        }
    }
    Ok(endings)
}

async fn row(url: &str, streams: usize, then: OnDeadline) -> Result<Value> {
    let all = async |requests: u32, then, need| {
        let of = |first: usize| (first as u32..requests).step_by(streams);
        try_join_all((0..streams).map(|first| stream(url, of(first), then, need))).await
    };
    let alone: Vec<f64> = all(24.max(2 * streams as u32), None, 0.0)
        .await?
        .into_iter()
        .flat_map(|endings| endings.over)
        .collect();
    let need = quartiles(alone)[0];
    let mut sum = Endings::default();
    for endings in all(REQUESTS, Some(then), need).await? {
        sum.refused += endings.refused;
        sum.refused_in_time += endings.refused_in_time;
        sum.whole += endings.whole;
        sum.early += endings.early;
        sum.failed += endings.failed;
        sum.late += endings.late;
        sum.over.extend(endings.over);
        sum.evaluations += endings.evaluations;
    }
    let finished = sum.whole + sum.early;
    let mean = f64::from(sum.evaluations) / f64::from(finished.max(1));
    let latest = sum.over.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    println!(
        "  {streams:7}  {:<12}  {need:8.1}  {:7} ({:3})              {:5}  {:5}  {:6}  {:4}  {latest:10.1}  {mean:11.1}",
        if then == OnDeadline::Fail {
            "fail"
        } else {
            "finish early"
        },
        sum.refused,
        sum.refused_in_time,
        sum.whole,
        sum.early,
        sum.failed,
        sum.late,
    );
    Ok(json!({
        "streams": streams, "then": then.as_str_name(), "need_ms": need, "refused": sum.refused,
        "refused_in_time": sum.refused_in_time, "whole": sum.whole, "early": sum.early, "failed": sum.failed,
        "late": sum.late, "latest_ms": latest, "evaluations": mean,
    }))
}
