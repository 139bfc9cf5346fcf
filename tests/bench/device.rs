//! Steps of batches on one device: from one canvas to sixty-four, beside PyTorch on the same device.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use denoised::engine::EngineOptions;
use denoised::network::onnx::OnnxOptions;
use serde_json::{Value, json};

use crate::engine::{self, Subject};
use crate::pytorch::Loop;
use crate::{quartiles, show};

/// Canvases at a time.
const BATCHES: [usize; 3] = [1, 8, 64];
/// Steps of a generation that is measured, and of one as users ask for it.
const STEPS: u32 = 16;
const USUAL_STEPS: u32 = 64;

/// How it is measured.
pub(crate) struct Setting<'a> {
    pub(crate) options: OnnxOptions,
    pub(crate) workers: usize,
    pub(crate) length: usize,
    pub(crate) turns: usize,
    pub(crate) largest_batch: usize,
    /// A python with torch, and how it is to run the network.
    pub(crate) torch: Option<(&'a Path, &'a [String])>,
}

/// Measures the bundle `<models>/<name>/1`.
pub(crate) fn run(models: &Path, name: &str, setting: &Setting<'_>) -> Result<Value> {
    let Setting {
        options,
        workers,
        length,
        ..
    } = setting;
    println!(
        "\n{name} on {}, {length} tokens, {workers} workers of {} threads; medians, quartiles",
        options.device, options.threads
    );
    let mut numbers = Vec::new();
    {
        let subject = Subject::load_with(
            &models.join(name).join("1"),
            options,
            EngineOptions {
                workers: *workers,
                batch_tokens: 64 * length,
                output_bytes: 4 << 30,
                ..engine::options(options.threads)
            },
        )?;
        for canvases in batches(setting) {
            subject.generate_many(*length, 2, false, 0, canvases)?;
            for normalize in [false, true] {
                let mut times = Vec::new();
                for turn in 1..=setting.turns as u64 {
                    let started = Instant::now();
                    let of = subject.generate_many(*length, STEPS, normalize, turn, canvases)?;
                    times.push((started.elapsed().as_secs_f64(), of));
                }
                let nfe = quartiles(times.iter().map(|(_, of)| f64::from(of.nfe)).collect())[0];
                let step = quartiles(
                    times
                        .iter()
                        .map(|(total, of)| 1e3 * total / f64::from(of.nfe))
                        .collect(),
                );
                let network = quartiles(
                    times
                        .iter()
                        .map(|(_, of)| 1e3 * of.network / f64::from(of.nfe))
                        .collect(),
                );
                let rate = (canvases * length) as f64 / (step[0] / 1e3 * f64::from(USUAL_STEPS));
                let how = if normalize { "hit times" } else { "all rows " };
                println!(
                    "  {canvases:2} canvases, {how}: a step {} ms, of a pass {} ms in the network; {rate:.0} tokens/s at {USUAL_STEPS} evaluations",
                    show(step),
                    show(network)
                );
                numbers.push(json!({
                    "canvases": canvases, "hit_times": normalize, "nfe": nfe, "step_ms": step, "network_ms": network,
                    "tokens_per_second": rate,
                }));
            }
        }
    }
    let mut reference = Vec::new();
    if let Some((python, modes)) = setting.torch {
        for mode in modes {
            let mut torch = Loop::start_as(
                python,
                &models.join(format!("{name}.checkpoint")),
                options.threads,
                &options.device.to_string(),
                mode,
            )?;
            for canvases in batches(setting) {
                torch.generate_many(*length, 2, canvases)?;
                let mut seconds = Vec::new();
                for _ in 0..setting.turns {
                    seconds.push(1e3 * torch.generate_many(*length, STEPS, canvases)? / f64::from(STEPS + 1));
                }
                let step = quartiles(seconds);
                println!(
                    "  {canvases:2} canvases, PyTorch, {mode}: a step {} ms",
                    show(step)
                );
                reference.push(json!({"canvases": canvases, "mode": mode, "step_ms": step}));
            }
        }
    }
    Ok(json!({
        "model": name, "device": options.device.to_string(), "workers": workers, "length": length, "engine": numbers,
        "pytorch": reference,
    }))
}

fn batches(setting: &Setting<'_>) -> impl Iterator<Item = usize> {
    BATCHES
        .into_iter()
        .filter(|&batch| batch <= setting.largest_batch)
}
