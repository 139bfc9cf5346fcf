//! x
use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use training::config::RunConfig;
use training::fit::{FitOptions, fit};

/// Trains score-based discrete diffusion language models.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Trains a network as a run's TOML file says.
    Fit {
        /// The run's file, such as training/configs/demo.toml.
        config: PathBuf,
        /// Go on from the latest checkpoint in the run's directory.
        #[arg(long)]
        resume: bool,
        /// Complete the schedule within this wall-clock time, in fewer steps if need be.
        #[arg(long, value_name = "MINUTES")]
        until_minutes: Option<f64>,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Fit { config, resume, until_minutes } => {
            let state = fit(RunConfig::read(&config)?, FitOptions { resume, minutes: until_minutes })?;
            println!("{} steps in {:.1} minutes", state.step, state.seconds / 60.0);
        }
    }
    Ok(())
}
