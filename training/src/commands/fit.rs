//! `training fit`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use training::config::RunConfig;
use training::fit::{FitOptions, fit};

/// Trains a network as a run's TOML file says.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's file, such as training/configs/demo.toml.
    config: PathBuf,
    /// Go on from the latest checkpoint in the run's directory.
    #[arg(long)]
    resume: bool,
    /// Complete the schedule within this wall-clock time, in fewer steps if need be.
    #[arg(long, value_name = "MINUTES")]
    until_minutes: Option<f64>,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        config,
        resume,
        until_minutes: minutes,
    } = arguments;
    let state = fit(RunConfig::read(&config)?, FitOptions { resume, minutes })?;
    println!("{} steps in {:.1} minutes", state.step, state.seconds / 60.0);
    Ok(())
}
