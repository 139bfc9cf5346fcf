//! `training evaluate`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use training::config::RunConfig;

use super::run::Run;

/// Bounds the negative log-likelihood of the run's held-out text.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's file.
    config: PathBuf,
    /// Times drawn for every sequence.
    #[arg(long, value_name = "N", default_value_t = 32)]
    draws: usize,
    /// Also measure a byte 4-gram and xz -9 on the same text, which `prepare` left beside the tokens.
    #[arg(long)]
    baselines: bool,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        config,
        draws,
        baselines,
    } = arguments;
    let run = Run::latest(&RunConfig::read(&config)?)?;
    let (bound, bytes_per_token) = run.evaluate(draws)?;
    let [bits, error] = bound.bits_per_byte(bytes_per_token);
    println!(
        "{bound}; {bits:.4} ± {error:.4} bits per byte ({} sequences, {draws} times each)",
        bound.sequences
    );
    if baselines {
        println!("{}", serde_json::to_string(&run.baselines()?)?);
    }
    Ok(())
}
