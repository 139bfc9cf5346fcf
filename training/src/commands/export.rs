//! `training export`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use training::config::RunConfig;
use training::export::{self, Storage, TrainedModel};

use super::run::Run;

/// Writes the averaged weights of the latest checkpoint as a bundle.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's file.
    config: PathBuf,
    /// Name to serve the model under.
    #[arg(long)]
    name: String,
    /// The bundle's folder, <repository>/<name>/<version>; must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep matrices as float16: half the size, rounded to 11 bits.
    #[arg(long)]
    half: bool,
    /// What the model was trained on, for the bundle's provenance.
    #[arg(long, default_value = "")]
    corpus: String,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        config,
        name,
        out,
        half,
        corpus,
    } = arguments;
    let config = RunConfig::read(&config)?;
    let run = Run::latest(&config)?;
    let storage = if half { Storage::F16 } else { Storage::F32 };
    let tokenizer =
        std::fs::read(&config.data.tokenizer).with_context(|| config.data.tokenizer.display().to_string())?;
    let model = TrainedModel {
        name: &name,
        config: run.network.config(),
        weights: &run.network.state_dict(),
        graph: config.graph.kind,
        schedule: config.schedule,
        tokenizer: Some(&tokenizer),
        provenance: run.provenance(&corpus)?,
    };
    let manifest = export::bundle(&out, model, storage)?;
    println!(
        "{}: {}, {} states, length {}",
        out.display(),
        manifest.name,
        manifest.vocab_size,
        manifest.max_length
    );
    Ok(())
}
