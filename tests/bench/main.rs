//! What a step and a generation cost, beside the reference algorithm in PyTorch, and the server under load.
//!
//! `make bench` prepares the models and runs this. Prints tables and writes one JSON file. Numbers are medians with
//! quartiles of turns that take turns with each other, so that what disturbs one disturbs its neighbours; ratios
//! mean more than seconds. Memory is read from `/proc`: Linux only.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a program"
)]

mod autoscaling;
mod balancing;
mod cached;
mod deadlines;
mod device;
mod engine;
mod fair;
mod load;
mod memory;
mod pytorch;
mod roofline;
mod rows;
mod scoring;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use denoised::network::onnx::{Device, OnnxOptions};
use engine::Times;
use serde_json::{Value, json};

/// What can be measured alone.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The drawing of tokens.
    Rows,
    /// Neighbours and a long queue.
    Fair,
    /// The server under load.
    Load,
    /// Deadlines under load.
    Deadlines,
    /// Batches on one device, a GPU say.
    Device,
    /// Texts that are scored.
    Scoring,
    /// Fine schedules, beside MDLM's cached sampler in PyTorch.
    Cached,
    /// Evaluations beside what the machine gives at most.
    Roofline,
    /// Simulated pods: what to scale them by.
    Autoscaling,
    /// Three servers behind a balancer.
    Balancing,
}

#[derive(Parser)]
struct Arguments {
    /// Folder of `<name>/1` bundles and `<name>.checkpoint` folders that they were imported from.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/../bench"))]
    models: PathBuf,
    /// A python with torch and safetensors; without, nothing is compared.
    #[arg(long)]
    python: Option<PathBuf>,
    /// Threads of one evaluation, here and there.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Turns of each.
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// One part alone.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Of `--only device`: where the networks run.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Of `--only device`: the model, a folder of `--models`.
    #[arg(long, default_value = "small-shape")]
    model: String,
    /// Of `--only device`: tokens of a canvas.
    #[arg(long, default_value_t = 1024)]
    length: usize,
    /// Of `--only device`: workers of the device.
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// Of `--only device`: canvases at a time, at most.
    #[arg(long, default_value_t = 64)]
    largest_batch: usize,
    /// Of `--only device`: how PyTorch runs the network: float32, bfloat16, compiled.
    #[arg(long, value_delimiter = ',', default_value = "float32")]
    torch_modes: Vec<String>,
    /// Of `--only balancing`: the program Envoy.
    #[arg(long)]
    envoy: Option<PathBuf>,
    /// Of `--only balancing`: the program HAProxy.
    #[arg(long)]
    haproxy: Option<PathBuf>,
    /// What `--only balancing` starts.
    #[arg(long, hide = true, requires = "pace")]
    serve: Option<String>,
    #[arg(long, hide = true)]
    pace: Option<PathBuf>,
    /// Of `--only autoscaling`: where its plot goes.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Leave the server under load out.
    #[arg(long)]
    no_load: bool,
    /// Where the numbers go.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/../bench/bench.json"))]
    out: PathBuf,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Model, length and steps of a generation.
const SUBJECTS: [(&str, usize, u32); 3] = [
    ("demo-shape", 128, 32),
    ("small-shape", 128, 8),
    ("small-shape", 1024, 4),
];

/// A fine schedule, of which hit times leave few evaluations.
const HIT_TIME_STEPS: u32 = 1024;
/// Longer canvases would take minutes.
const LONGEST_WITH_HIT_TIMES: usize = 128;

/// Median and quartiles.
pub(crate) fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [0.5, 0.25, 0.75].map(|share| values[((values.len() - 1) as f64 * share).round() as usize])
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let (Some(address), Some(pace)) = (&arguments.serve, &arguments.pace) {
        return balancing::serve(address, pace);
    }
    if arguments.python.is_none() {
        eprintln!("SKIPPED: the comparison with PyTorch (--python names no python with torch)");
    }
    match arguments.only {
        Some(Part::Balancing) => {
            let rows = balancing::run(arguments.envoy.as_deref(), arguments.haproxy.as_deref())?;
            std::fs::write(&arguments.out, serde_json::to_vec_pretty(&rows)?)?;
            return Ok(());
        }
        Some(Part::Autoscaling) => return autoscaling::run(arguments.plot.as_deref()),
        Some(Part::Fair) => {
            fair::waiting(arguments.turns)?;
            fair::neighbours(arguments.threads, arguments.turns)?;
            return Ok(());
        }
        Some(Part::Load) => {
            load::run(arguments.threads)?;
            return Ok(());
        }
        Some(Part::Deadlines) => {
            deadlines::run(arguments.threads)?;
            return Ok(());
        }
        Some(Part::Scoring) => {
            scoring::run(arguments.threads, arguments.turns)?;
            return Ok(());
        }
        Some(Part::Cached) => {
            cached(&arguments)?;
            return Ok(());
        }
        Some(Part::Roofline) => {
            roofline::run(&arguments.models, arguments.threads, arguments.turns)?;
            return Ok(());
        }
        Some(Part::Device) => {
            let setting = device::Setting {
                options: OnnxOptions {
                    device: arguments.device,
                    threads: arguments.threads,
                },
                workers: arguments.workers,
                length: arguments.length,
                turns: arguments.turns,
                largest_batch: arguments.largest_batch,
                torch: arguments
                    .python
                    .as_deref()
                    .map(|python| (python, arguments.torch_modes.as_slice())),
            };
            let numbers = device::run(&arguments.models, &arguments.model, &setting)?;
            std::fs::write(&arguments.out, serde_json::to_vec_pretty(&numbers)?)?;
            return Ok(());
        }
        Some(Part::Rows) | None => {}
    }
    let rows = rows::run(arguments.turns);
    if arguments.only == Some(Part::Rows) {
        return Ok(());
    }
    let mut subjects = Vec::new();
    for (name, length, steps) in SUBJECTS {
        let bundle = arguments.models.join(name).join("1");
        if !bundle.is_dir() {
            eprintln!("SKIPPED: {} is not there (make bench)", bundle.display());
            continue;
        }
        subjects.push(subject(&arguments, name, length, steps).with_context(|| name.to_owned())?);
    }
    let load = if arguments.no_load {
        Value::Null
    } else {
        load::run(arguments.threads)?
    };
    let fair = json!({
        "waiting": fair::waiting(arguments.turns)?,
        "neighbours": fair::neighbours(arguments.threads, arguments.turns)?,
    });
    let deadlines = deadlines::run(arguments.threads)?;
    let scoring = scoring::run(arguments.threads, arguments.turns)?;
    let cached = cached(&arguments)?;
    let roofline = roofline::run(&arguments.models, arguments.threads, arguments.turns)?;
    let numbers = json!({
        "threads": arguments.threads, "rows": rows, "generation": subjects, "load": load, "fair": fair,
        "deadlines": deadlines, "scoring": scoring, "cached": cached, "roofline": roofline,
    });
    std::fs::write(&arguments.out, serde_json::to_vec_pretty(&numbers)?)?;
    println!("\nnumbers: {}", arguments.out.display());
    Ok(())
}

/// A turn takes minutes.
const CACHED_TURNS: usize = 3;

fn cached(arguments: &Arguments) -> Result<Value> {
    let turns = arguments.turns.min(CACHED_TURNS);
    cached::run(
        &arguments.models,
        arguments.python.as_deref(),
        arguments.threads,
        turns,
    )
}

/// One model at one length: the plain sampler, the one with hit times, and PyTorch, in turns.
fn subject(arguments: &Arguments, name: &str, length: usize, steps: u32) -> Result<Value> {
    println!(
        "\n{name}, {length} tokens, {steps} steps, {} threads",
        arguments.threads
    );
    let bundle = arguments.models.join(name).join("1");
    let engine = engine::Subject::load(&bundle, arguments.threads)?;
    let mut torch = match &arguments.python {
        Some(python) => {
            let checkpoint = arguments.models.join(format!("{name}.checkpoint"));
            Some(pytorch::Loop::start(python, &checkpoint, arguments.threads)?)
        }
        None => None,
    };
    // The first of each warms it up.
    engine.generate(length, steps, false, 0)?;
    let session = memory::resident();
    memory::forget_peak();
    if let Some(torch) = &mut torch {
        torch.generate(length, 1)?;
    }
    let (mut plain, mut hits, mut reference) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 1..=arguments.turns as u64 {
        plain.push(engine.generate(length, steps, false, turn)?);
        if length <= LONGEST_WITH_HIT_TIMES {
            hits.push(engine.generate(length, HIT_TIME_STEPS, true, turn)?);
        }
        if let Some(torch) = &mut torch {
            reference.push(torch.generate(length, steps)?);
        }
    }
    let peak = memory::peak();
    let per_step = |of: fn(&Times) -> f64| {
        let milliseconds = plain
            .iter()
            .map(|times| 1e3 * of(times) / f64::from(times.nfe))
            .collect();
        quartiles(milliseconds)
    };
    let (network, sampling, other) = (
        per_step(|t| t.network),
        per_step(|t| t.sampling),
        per_step(|t| t.total - t.network - t.sampling),
    );
    let outside = quartiles(plain.iter().map(|t| 1.0 - t.network / t.total).collect());
    let total = quartiles(plain.iter().map(|t| t.total).collect());
    println!(
        "  a step, ms: network {}, sampling {}, else {}",
        show(network),
        show(sampling),
        show(other)
    );
    println!(
        "  a generation: {} s, of which {:.2} % outside of the network",
        show(total),
        100.0 * outside[0]
    );
    println!("  memory, MB: {session:.0} after the first generation, {peak:.0} at most after that");
    let mut numbers = json!({
        "model": name, "length": length, "steps": steps, "turns": arguments.turns,
        "step_ms": {"network": network, "sampling": sampling, "other": other},
        "outside_of_the_network": outside, "generation_seconds": total,
        "memory_mb": {"after_first": session, "peak": peak},
    });
    if !hits.is_empty() {
        let seconds = quartiles(hits.iter().map(|t| t.total).collect());
        let nfe = quartiles(hits.iter().map(|t| f64::from(t.nfe)).collect());
        println!(
            "  {HIT_TIME_STEPS} steps with hit times: {} s, {:.0} evaluations",
            show(seconds),
            nfe[0]
        );
        numbers["hit_times"] = json!({"steps": HIT_TIME_STEPS, "seconds": seconds, "nfe": nfe});
    }
    if !reference.is_empty() {
        let seconds = quartiles(reference.clone());
        let ratios = quartiles(reference.iter().zip(&plain).map(|(r, p)| r / p.total).collect());
        println!("  PyTorch: {} s, {} times as long", show(seconds), show(ratios));
        numbers["pytorch"] = json!({"seconds": seconds, "times_as_long": ratios});
        if !hits.is_empty() {
            // All steps cost the same there.
            let whole = f64::from(HIT_TIME_STEPS + 1) / f64::from(steps + 1);
            let ratios = quartiles(
                reference
                    .iter()
                    .zip(&hits)
                    .map(|(r, h)| r * whole / h.total)
                    .collect(),
            );
            println!(
                "  {HIT_TIME_STEPS} steps in PyTorch, by its time for {steps}: {} times as long",
                show(ratios)
            );
            numbers["pytorch"]["times_as_long_with_hit_times"] = json!(ratios);
        }
    }
    Ok(numbers)
}

fn show([median, low, high]: [f64; 3]) -> String {
    format!("{median:.3} ({low:.3} to {high:.3})")
}
