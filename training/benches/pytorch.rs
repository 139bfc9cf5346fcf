//! Training steps here and in PyTorch eager: the same network from the same weights on the same batches,
//! with as many threads, in turns. Prints tokens per second and their ratios, and lays the loss curves
//! over each other: they must agree.
//!
//! `cargo bench -p training --bench pytorch -- --python PYTHON`, with a Python that has `torch`,
//! `safetensors` and `numpy`. Without one it says so and does nothing.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]

mod tensors;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use denoised::bundle::Bundle;
use denoised::diffusion::Parameterization;
use denoised::diffusion::Token;
use plotters::prelude::*;
use serde::Deserialize;
use serde_json::json;
use training::config::{Decay, RunConfig};
use training::fit::step::Trainer;
use training::loss::masking::Masking;
use training::model::NetworkConfig;
use training::model::device::Devices;

use tensors::Tensors;

const LANES: [&str; 2] = ["reference", "rows"];

#[derive(Parser)]
struct Arguments {
    /// A Python with torch, safetensors and numpy.
    #[arg(long, default_value = "python3", env = "BENCH_PYTHON")]
    python: PathBuf,
    /// Optimizer steps of each.
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Steps until it is the next one's turn.
    #[arg(long, default_value_t = 10)]
    turn: usize,
    /// Sequences per step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Threads of each.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Blocks of the network, in place of the demo model's.
    #[arg(long)]
    blocks: Option<usize>,
    /// Its width.
    #[arg(long)]
    hidden_size: Option<usize>,
    /// Its heads.
    #[arg(long)]
    heads: Option<usize>,
    /// Where numbers and the drawing go.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/pytorch"))]
    out: PathBuf,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(
        arguments.turn > 0 && arguments.steps.is_multiple_of(arguments.turn),
        "--steps must be a multiple of --turn"
    );
    let probe = Command::new(&arguments.python)
        .args(["-c", "import torch, safetensors, numpy"])
        .output();
    if !probe.is_ok_and(|output| output.status.success()) {
        eprintln!(
            "SKIPPED: {} has no torch, safetensors and numpy (--python, or BENCH_PYTHON)",
            arguments.python.display()
        );
        return Ok(());
    }
    fs::create_dir_all(&arguments.out)?;
    compare(&arguments)
}

fn compare(arguments: &Arguments) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (config, shape) = run(arguments, root)?;
    let batches = batches(root, arguments, shape.length)?;
    let mut trainer = Trainer::new(config.clone(), &shape, Devices::cpu(arguments.threads))?;
    write_inputs(&arguments.out, &config, &shape, &trainer, &batches)?;
    let mut torch = Torch::start(arguments, &root.join("benches/pytorch.py"))?;

    let tokens = (arguments.turn * arguments.batch * shape.length) as f64;
    let mut losses = vec![Vec::new(); 1 + LANES.len()];
    let mut speeds = vec![Vec::new(); 1 + LANES.len()];
    for turn in batches.chunks(arguments.turn) {
        let started = Instant::now();
        losses[0].extend(turn.iter().map(|batch| trainer.learn(batch, 0.0).loss));
        speeds[0].push(tokens / started.elapsed().as_secs_f64());
        for (index, lane) in LANES.iter().enumerate() {
            let steps = torch.steps(lane, turn.len())?;
            losses[1 + index].extend(steps.losses);
            speeds[1 + index].push(tokens / steps.seconds);
        }
        eprint!(".");
    }
    eprintln!();
    report(arguments, &shape, &torch.version, &losses, &speeds)
}

/// Tokens of the demo model, the mask left out.
const VOCABULARY: usize = 6655;

/// The demo model's run, with what the arguments change.
fn run(arguments: &Arguments, root: &Path) -> Result<(RunConfig, NetworkConfig)> {
    let mut config = RunConfig::read(&root.join("configs/demo.toml"))?;
    config.run.batch_size = arguments.batch;
    config.run.threads = arguments.threads;
    config.optimizer.decay = Decay::Constant;
    config.optimizer.warmup_steps = 20;
    config.optimizer.masking = Masking::Independent;
    config.optimizer.decay_matrices_only = false;
    let network = &mut config.network;
    // The reference architecture, which PyTorch's side is: it sees the noise and has a head of its own.
    network.parameterization = Parameterization::Score;
    network.scale_by_sigma = true;
    network.time_conditioned = true;
    network.tie_embeddings = false;
    network.blocks = arguments.blocks.unwrap_or(network.blocks);
    network.hidden_size = arguments.hidden_size.unwrap_or(network.hidden_size);
    network.heads = arguments.heads.unwrap_or(network.heads);
    config.validate()?;
    let shape = config.network_config(VOCABULARY);
    Ok((config, shape))
}

/// Sequences of this program's own sources, in the demo model's tokens: text that is always there.
fn batches(root: &Path, arguments: &Arguments, length: usize) -> Result<Vec<Vec<Vec<Token>>>> {
    let bundle = Bundle::open(&root.join("demo/world-english/1"))?;
    let tokenizer = bundle.tokenizer()?.context("the demo model has a tokenizer")?;
    let mut sources: Vec<PathBuf> = fs::read_dir(root.join("src"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    sources.sort();
    let mut tokens = Vec::new();
    for path in sources {
        tokens.extend(tokenizer.encode(&fs::read_to_string(path)?)?);
    }
    let sequences: Vec<Vec<Token>> = tokens.chunks_exact(length).map(<[_]>::to_vec).collect();
    ensure!(!sequences.is_empty(), "the sources are shorter than a sequence");
    let mut endless = sequences.into_iter().cycle();
    Ok((0..arguments.steps)
        .map(|_| endless.by_ref().take(arguments.batch).collect())
        .collect())
}

/// What the other program starts from.
fn write_inputs(
    folder: &Path,
    config: &RunConfig,
    shape: &NetworkConfig,
    trainer: &Trainer,
    batches: &[Vec<Vec<Token>>],
) -> Result<()> {
    let optimizer = &config.optimizer;
    let description = json!({
        "network": {
            "states": shape.states, "length": shape.length, "hidden_size": shape.hidden_size,
            "cond_dim": shape.cond_dim, "blocks": shape.blocks, "heads": shape.heads,
        },
        "optimizer": {
            "lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.epsilon,
            "weight_decay": optimizer.weight_decay, "warmup_steps": optimizer.warmup_steps,
            "clip": optimizer.gradient_clip_norm, "ema_decay": optimizer.ema_decay,
        },
    });
    fs::write(
        folder.join("config.json"),
        serde_json::to_vec_pretty(&description)?,
    )?;

    let mut weights = Tensors::default();
    for (name, tensor) in shape
        .initial_weights(config.run.seed, config.network.initial_gate)
        .0
    {
        weights.f32(&name, tensor.shape, &tensor.data);
    }
    weights.write(&folder.join("weights.safetensors"))?;

    let (mut clean, mut tokens, mut sigma, mut rate) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (step, batch) in batches.iter().enumerate() {
        let noise = trainer.noise(step as u64, batch);
        clean.extend(batch.iter().flatten().map(|&token| i64::from(token)));
        tokens.extend(noise.tokens.iter().map(|&token| i64::from(token)));
        for ([total, change], weight) in noise.levels.into_iter().zip(noise.weights) {
            sigma.push(total as f32);
            rate.push((change * weight) as f32);
        }
    }
    let shape = vec![batches.len(), config.run.batch_size, shape.length];
    let mut inputs = Tensors::default();
    inputs.i64("clean", shape.clone(), &clean);
    inputs.i64("tokens", shape.clone(), &tokens);
    inputs.f32("sigma", shape[..2].to_vec(), &sigma);
    inputs.f32("rate", shape[..2].to_vec(), &rate);
    inputs.write(&folder.join("batches.safetensors"))
}

/// The other program.
struct Torch {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    version: String,
}

#[derive(Deserialize)]
struct Steps {
    seconds: f64,
    losses: Vec<f64>,
}

impl Torch {
    fn start(arguments: &Arguments, script: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Hello {
            version: String,
        }
        let mut child = Command::new(&arguments.python)
            .arg(script)
            .arg(&arguments.out)
            .arg(arguments.threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("no pipes to Python");
        };
        let mut torch = Self {
            child,
            input,
            output: BufReader::new(output),
            version: String::new(),
        };
        torch.version = torch.answer::<Hello>()?.version;
        Ok(torch)
    }

    fn steps(&mut self, lane: &str, count: usize) -> Result<Steps> {
        writeln!(self.input, "{lane} {count}")?;
        self.answer()
    }

    fn answer<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "Python ended early");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Torch {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

fn quantile(values: impl IntoIterator<Item = f64>, share: f64) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

fn report(
    arguments: &Arguments,
    shape: &NetworkConfig,
    version: &str,
    losses: &[Vec<f64>],
    speeds: &[Vec<f64>],
) -> Result<()> {
    let names = ["training", "PyTorch, reference", "PyTorch, masked rows"];
    println!(
        "{} parameters, {} sequences of {} tokens, {} threads, {} steps, PyTorch {version}\n",
        shape.initial_weights(1, 0.0).parameters(),
        arguments.batch,
        shape.length,
        arguments.threads,
        arguments.steps
    );
    println!(
        "{:22} {:>10} {:>17} {:>24}",
        "", "tokens/s", "quartiles", "training is faster by"
    );
    let mut lanes = Vec::new();
    for (index, name) in names.into_iter().enumerate() {
        let of = |share| quantile(speeds[index].iter().copied(), share);
        // Turns lie close together in time, so that what disturbs one disturbs its neighbours.
        let ratio = median(
            speeds[0]
                .iter()
                .zip(&speeds[index])
                .map(|(ours, theirs)| ours / theirs),
        );
        println!(
            "{name:22} {:>10.0} {:>8.0}-{:<8.0} {ratio:>24.3}",
            of(0.5),
            of(0.25),
            of(0.75)
        );
        lanes.push(json!({
            "name": name, "tokens_per_second": of(0.5), "quartiles": [of(0.25), of(0.75)],
            "training_is_faster_by": ratio, "losses": losses[index],
        }));
    }
    let difference = |lane: &[f64], steps: std::ops::Range<usize>| -> f64 {
        let pairs = losses[0][steps.clone()].iter().zip(&lane[steps]);
        pairs
            .map(|(ours, theirs)| (ours / theirs - 1.0).abs())
            .fold(0.0, f64::max)
    };
    let (all, early) = (arguments.steps, arguments.steps.min(20));
    let late = all.saturating_sub(50);
    let mean = |losses: &[f64]| losses[late..].iter().sum::<f64>() / (all - late) as f64;
    // Runs that are equal but for rounding part in time: PyTorch's two from each other as well.
    let noise = (mean(&losses[1]) / mean(&losses[2]) - 1.0).abs();
    println!();
    let mut agree = true;
    for (name, lane) in names.iter().zip(losses).skip(1) {
        let (first, start) = (difference(lane, 0..1), difference(lane, 0..early));
        let end = mean(&losses[0]) / mean(lane) - 1.0;
        println!(
            "losses against {name}: first step {first:.1e}, first {early} at most {start:.1e} relative; mean \
             of the last {} {:+.2} %",
            all - late,
            100.0 * end
        );
        agree &= first < 1e-4 && start < 1e-2 && end.abs() < 0.02 + noise;
    }
    println!(
        "the two runs of PyTorch against each other: mean of the last {} {:.2} %",
        all - late,
        100.0 * noise
    );
    let result = json!({
        "torch": version, "batch": arguments.batch, "length": shape.length, "threads": arguments.threads,
        "steps": all, "lanes": lanes, "noise": noise, "agree": agree,
    });
    fs::write(
        arguments.out.join("result.json"),
        serde_json::to_vec_pretty(&result)?,
    )?;
    draw(&arguments.out.join("losses.svg"), &names, losses)?;
    println!("numbers and curves are in {}", arguments.out.display());
    ensure!(agree, "the losses do not agree");
    Ok(())
}

fn draw(path: &Path, names: &[&str], losses: &[Vec<f64>]) -> Result<()> {
    let top = losses.iter().flatten().copied().fold(0.0, f64::max);
    let area = SVGBackend::new(path, (900, 500)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0..losses[0].len(), 0.0..1.05 * top)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("nats/token")
        .draw()?;
    for ((name, losses), color) in names.iter().zip(losses).zip([BLUE, RED, GREEN]) {
        chart
            .draw_series(LineSeries::new(losses.iter().copied().enumerate(), color))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
    }
    chart.configure_series_labels().background_style(WHITE).draw()?;
    area.present()?;
    Ok(())
}
