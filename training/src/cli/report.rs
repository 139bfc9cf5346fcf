//! `training report`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use training::report;

/// Renders a run's directory as one HTML page: curves, samples, settings, provenance.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's directory (`run.directory` in its file).
    run: PathBuf,
    /// Where the page goes [default: report.html in the run's directory].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let page = report::render(&arguments.run)?;
    report::draw(&arguments.run)?;
    let out = arguments.out.unwrap_or_else(|| arguments.run.join(report::FILE));
    fs::write(&out, page).with_context(|| format!("cannot write {}", out.display()))?;
    println!("wrote {}", out.display());
    Ok(())
}
