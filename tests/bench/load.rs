//! The server under concurrent streams of the demo model, through a real socket.

use std::time::Instant;

use anyhow::{Context, Result};
use denoised::config::Config;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::event::Event;
use denoised::proto::v1::{FramePolicy, GenerateRequest, Sampling};
use denoised::server::Server;
use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tonic::transport::Channel;

/// Streams at once.
const STREAMS: [usize; 4] = [1, 4, 16, 64];
/// Generations of each number of streams, at least one a stream.
const GENERATIONS: usize = 64;
const LENGTH: u32 = 64;
const STEPS: u32 = 16;

/// Seconds of one generation: to its first frame, and to its end.
struct Latency {
    first: f64,
    whole: f64,
}

pub(crate) fn run(threads: usize) -> Result<Value> {
    with_server(threads, async |url| under(&url).await)
}

/// Has the demo model served while `work` talks to the server at its URL.
pub(crate) fn with_server(threads: usize, work: impl AsyncFnOnce(String) -> Result<Value>) -> Result<Value> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut config = Config::default();
        config.server.listen = "127.0.0.1:0".parse()?;
        config.engine.threads_per_worker = threads;
        "error".clone_into(&mut config.log.filter);
        let server = Server::bind(&config)
            .await
            .context("the demo model is not served")?;
        let url = format!("http://{}", server.address());
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.run(async move { drop(stopped.await) }));
        let rows = work(url).await;
        drop(stop);
        serving.await?;
        rows
    })
}

async fn under(url: &str) -> Result<Value> {
    println!("\nthe server, demo model, {LENGTH} tokens in {STEPS} steps");
    println!("  streams   tokens/s   of one    first frame, ms: p50, p99    whole, ms: p50, p99");
    stream(url, 0, 2).await?;
    let (mut rows, mut one) = (Vec::new(), 0.0);
    for streams in STREAMS {
        let each = GENERATIONS.div_ceil(streams);
        let started = Instant::now();
        let all = try_join_all((0..streams).map(|number| stream(url, number as u64, each))).await?;
        let seconds = started.elapsed().as_secs_f64();
        let all: Vec<Latency> = all.into_iter().flatten().collect();
        let speed = (all.len() as u32 * LENGTH) as f64 / seconds;
        if streams == 1 {
            one = speed;
        }
        let percentiles = |of: fn(&Latency) -> f64| {
            let mut values: Vec<f64> = all.iter().map(|l| 1e3 * of(l)).collect();
            values.sort_by(f64::total_cmp);
            [0.5, 0.99].map(|share| values[((values.len() - 1) as f64 * share).round() as usize])
        };
        let (first, whole) = (percentiles(|l| l.first), percentiles(|l| l.whole));
        println!(
            "  {streams:7}   {speed:8.0}   {:6.2}    {:10.1}, {:10.1}       {:10.1}, {:10.1}",
            speed / one,
            first[0],
            first[1],
            whole[0],
            whole[1]
        );
        rows.push(json!({
            "streams": streams, "tokens_per_second": speed, "of_one": speed / one, "first_frame_ms": first, "whole_ms": whole,
        }));
    }
    Ok(Value::Array(rows))
}

/// One client that asks for one generation after another.
async fn stream(url: &str, number: u64, generations: usize) -> Result<Vec<Latency>> {
    let channel = Channel::from_shared(url.to_owned())?.connect().await?;
    let mut client = DiffusionServiceClient::new(channel);
    let mut latencies = Vec::new();
    for generation in 0..generations as u64 {
        let request = GenerateRequest {
            length: Some(LENGTH),
            sampling: Some(Sampling {
                steps: Some(STEPS),
                seed: Some(1000 * number + generation),
                ..Sampling::default()
            }),
            // Every state that the connection takes, with its text.
            frames: Some(FramePolicy {
                min_interval_ms: Some(0),
                ..FramePolicy::default()
            }),
            ..GenerateRequest::default()
        };
        let started = Instant::now();
        let mut first = None;
        let mut answers = client.generate(request).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            // The first frame is the noise that a canvas starts as; what is waited for is the next.
            if let Some(Event::Frame(frame)) = answer.event.and_then(|event| event.event)
                && frame.step > 0
            {
                first.get_or_insert_with(|| started.elapsed());
            }
        }
        let whole = started.elapsed();
        latencies.push(Latency {
            first: first.unwrap_or(whole).as_secs_f64(),
            whole: whole.as_secs_f64(),
        });
    }
    Ok(latencies)
}
