//! What scoring texts costs beyond its forward passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use denoised::bundle::demo;
use denoised::diffusion::likelihood::{Likelihood, Order};
use denoised::engine::{Caller, Engine, EngineOptions, ScoreRequest, TextToScore};
use denoised::models::ServedModel;
use denoised::network::onnx::{Device, OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use serde_json::{Value, json};

use crate::quartiles;

const LENGTH: usize = 128;

/// Adds up the time until rows are there.
struct Clocked {
    network: OnnxNetwork,
    nanos: Arc<AtomicU64>,
    passes: Arc<AtomicU64>,
}

impl ScoreNetwork for Clocked {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let started = Instant::now();
        self.passes.fetch_add(1, Ordering::Relaxed);
        self.network.log_score(batch, &mut |rows| {
            self.nanos
                .fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
            read(rows);
        })
    }
}

/// Texts of the demo model's length, scored through the engine: the whole time over that of the network.
pub(crate) fn run(threads: usize, turns: usize) -> Result<Value> {
    let bundle = Arc::new(demo().context("this was built without the demo model")??);
    let (nanos, passes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (clock, counter, source) = (Arc::clone(&nanos), Arc::clone(&passes), Arc::clone(&bundle));
    let model = Arc::new(ServedModel::new(
        &bundle,
        1,
        Box::new(move || {
            let options = OnnxOptions {
                device: Device::Cpu,
                threads,
            };
            Ok(Box::new(Clocked {
                network: OnnxNetwork::load(&source, &options)?,
                nanos: Arc::clone(&clock),
                passes: Arc::clone(&counter),
            }))
        }),
    )?);
    let engine = Engine::start(EngineOptions {
        devices: 1,
        workers: 1,
        threads,
        batch_tokens: 64 * LENGTH,
        output_bytes: 1 << 30,
        max_queue: Duration::from_secs(86_400),
        caller_share: 1.0,
        network_bytes: u64::MAX,
        max_running_requests: 8,
        max_pass: Duration::from_secs(300),
        last_chance: Duration::from_secs(5),
    })?;
    let texts = |count: usize| -> Vec<TextToScore> {
        let text = |seed: usize| TextToScore {
            tokens: (0..LENGTH)
                .map(|i| ((seed * 131 + i * 29) % 5000) as u32)
                .collect(),
            context: vec![false; LENGTH],
        };
        (0..count).map(text).collect()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let mut numbers = Vec::new();
    println!("\nscoring texts of {LENGTH} tokens: the whole time over its forward passes");
    for (name, count, likelihood) in [
        (
            "bound of 16 draws, 100 texts",
            100,
            Likelihood::Bound { draws: 16 },
        ),
        (
            "left to right, 10 texts",
            10,
            Likelihood::Exact(Order::LeftToRight),
        ),
        (
            "surest first, 32 texts of 32",
            32,
            Likelihood::Exact(Order::SurestFirst),
        ),
    ] {
        let (mut ratios, mut seconds) = (Vec::new(), Vec::new());
        for turn in 0..=turns {
            let mut texts = texts(count);
            if likelihood == Likelihood::Exact(Order::SurestFirst) {
                for text in &mut texts {
                    text.tokens.truncate(32);
                    text.context.truncate(32);
                }
            }
            nanos.store(0, Ordering::Relaxed);
            passes.store(0, Ordering::Relaxed);
            let started = Instant::now();
            let mut run = engine.score(&ScoreRequest {
                id: "bench".to_owned(),
                caller: Caller::new("bench"),
                model: Arc::clone(&model),
                texts,
                likelihood,
                seed: 1,
                deadline: None,
                priority: 0,
            })?;
            let ended = run
                .scores
                .wait_for(|scores| scores.is_done() || scores.failure.is_some());
            if let Some(failure) = runtime.block_on(ended)?.failure.clone() {
                bail!(failure);
            }
            let whole = started.elapsed().as_secs_f64();
            drop(run);
            // The first loads the model.
            if turn > 0 {
                ratios.push(whole / (nanos.load(Ordering::Relaxed) as f64 * 1e-9));
                seconds.push(whole);
            }
        }
        let (ratio, whole) = (quartiles(ratios), quartiles(seconds));
        let passes = passes.load(Ordering::Relaxed);
        println!(
            "{name:<30} {:.3} ({:.3}..{:.3}), {:.2} s, {passes} passes",
            ratio[0], ratio[1], ratio[2], whole[0]
        );
        numbers.push(json!({"name": name, "ratio": ratio, "seconds": whole, "passes": passes}));
    }
    Ok(json!(numbers))
}
