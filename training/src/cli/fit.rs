//! `training fit`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use training::config::RunConfig;
use training::fit::{End, FitOptions, Start, fit, record};
use training::model::device::DeviceName;
use training::report;

use super::weights;

/// Trains a network as a run's TOML file says.
///
/// SIGINT (Ctrl-C) and SIGTERM end the run after the step at hand, with a checkpoint; a second one ends
/// it at once.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's file, such as training/configs/demo.toml.
    config: PathBuf,
    /// Go on from the latest checkpoint in the run's directory.
    #[arg(long)]
    resume: bool,
    /// Go on from the latest checkpoint if there is one: for jobs that are started again by themselves.
    #[arg(long, conflicts_with = "resume")]
    resume_if_any: bool,
    /// Go on from the checkpoint after STEP steps; later ones are put aside as `abandoned-*`.
    #[arg(long, value_name = "STEP", conflicts_with_all = ["resume", "resume_if_any"])]
    resume_from: Option<u64>,
    /// Begin with the averaged weights of another run (its file, directory or a checkpoint's folder), of a bundle or of a
    /// published checkpoint, rather than with random ones: fine-tuning. The network's shape and tokenizer must be theirs.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["resume", "resume_from"])]
    init_from: Option<PathBuf>,
    /// Replaces a setting of the run's file, such as `optimizer.lr=1e-3`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where to train: `cpu`, or `cuda:N`; several GPUs share every batch.
    #[arg(long, value_name = "DEVICE")]
    device: Vec<DeviceName>,
    /// Complete the schedule within this wall-clock time, in fewer steps if need be.
    #[arg(long, value_name = "MINUTES")]
    until_minutes: Option<f64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let config = RunConfig::read_and_set(&arguments.config, &arguments.set)?;
    let directory = config.run.directory.clone();
    let options = FitOptions {
        start: match arguments.resume_from {
            Some(step) => Start::ResumeFrom(step),
            None if arguments.resume => Start::Resume,
            None if arguments.resume_if_any => Start::ResumeIfAny,
            None => Start::Fresh,
        },
        minutes: arguments.until_minutes,
        devices: arguments.device.clone(),
        beginning: arguments
            .init_from
            .as_deref()
            .map(|place| weights::beginning(place, config.network.cond_dim))
            .transpose()?,
        folder: arguments
            .config
            .canonicalize()
            .ok()
            .and_then(|file| Some(file.parent()?.to_owned())),
        stop: stop_on_signals().context("cannot listen to signals")?,
    };
    let ended = fit(config, options);
    // Curves also of a run that has failed: they may show why. One that has recorded nothing has none.
    let drawn = if directory.join(record::METRICS).exists() {
        report::draw(&directory)
    } else {
        Ok(())
    };
    // Why a run has failed comes before why there is no drawing of it.
    let (state, end) = ended?;
    drawn?;
    let (step, minutes) = (state.step, state.seconds / 60.0);
    match end {
        End::Complete => println!("{step} steps in {minutes:.1} minutes"),
        End::Interrupted => println!(
            "stopped by a signal; the checkpoint of step {step} is in {}; `training fit {} --resume` goes \
             on from it",
            directory.display(),
            arguments.config.display()
        ),
    }
    Ok(())
}

/// A flag that the first signal sets; the second ends the process.
fn stop_on_signals() -> std::io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag unset, and sets it.
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}
