//! A checkpoint of the published small shape (12 blocks, 768 wide, vocabulary 50258, length 1024), with random
//! weights, through import, export and one served generation: seconds and peak memory of each program.
//!
//! `cargo build --release && cargo bench -p training --bench import`. Linux only: peak memory is read from
//! `/proc`. Needs 3 GB of memory and 3 GB of disk below the target folder.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

#[derive(Parser)]
struct Arguments {
    /// The server's binary.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/../release/denoised"))]
    denoised: PathBuf,
    /// Denoising steps of the generation.
    #[arg(long, default_value_t = 8)]
    steps: u32,
    /// Where the checkpoint and the bundle go.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/import"))]
    out: PathBuf,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if !arguments.denoised.is_file() {
        eprintln!(
            "SKIPPED: {} is not there (cargo build --release, or --denoised)",
            arguments.denoised.display()
        );
        return Ok(());
    }
    let (checkpoint, repository) = (arguments.out.join("checkpoint"), arguments.out.join("models"));
    drop(fs::remove_dir_all(&arguments.out));
    println!("{:40} {:>9} {:>14}", "", "seconds", "peak memory");
    let mut random = Command::new(env!("CARGO_BIN_EXE_training"));
    measure("random weights", random.arg("random").arg(&checkpoint))?;

    let mut import = Command::new(env!("CARGO_BIN_EXE_training"));
    import.arg("import").arg(&checkpoint);
    import
        .args(["--name", "small", "--out"])
        .arg(repository.join("small/1"));
    measure("import and export", &mut import)?;

    let mut generate = Command::new(&arguments.denoised);
    generate.args([
        "generate", "--model", "small", "--length", "1024", "--seed", "1", "--json",
    ]);
    generate.args(["--steps", &arguments.steps.to_string()]);
    generate.arg("--repository").arg(&repository);
    let name = format!("serve and generate 1024 tokens, {} steps", arguments.steps);
    let answer = measure(&name, &mut generate)?;
    let result = answer.lines().last().context("the server answered nothing")?;
    let result: serde_json::Value = serde_json::from_str(result)?;
    ensure!(
        result.to_string().contains("\"tokens\""),
        "the last event is no result: {result}"
    );
    fs::remove_dir_all(&arguments.out)?;
    Ok(())
}

/// Runs a program to its end, prints what it took, and returns what it said.
fn measure(name: &str, command: &mut Command) -> Result<String> {
    let started = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let output = child.stdout.take().context("no pipe")?;
    let reader = thread::spawn(move || std::io::read_to_string(output));
    let mut peak = 0.0_f64;
    let ended = loop {
        if let Some(kilobytes) = peak_memory(&status) {
            peak = peak.max(kilobytes);
        }
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        thread::sleep(Duration::from_millis(20));
    };
    ensure!(ended.success(), "{name}: {ended}");
    println!(
        "{name:40} {:>9.1} {:>11.2} GB",
        started.elapsed().as_secs_f64(),
        peak / 1e6
    );
    reader
        .join()
        .map_or_else(|_| unreachable!("reading does not panic"), |text| Ok(text?))
}

/// In kilobytes, as the kernel counts it.
fn peak_memory(status: &Path) -> Option<f64> {
    let status = fs::read_to_string(status).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}
