//! `training report`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use training::report;

/// Renders a run's directory as one HTML page: curves, samples, settings, provenance. Of several runs, their losses and
/// bounds over each other.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's directory (`run.directory` in its file), or several.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// Where the page goes [default: report.html in the run's directory; of several runs comparison.html].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments { runs, out } = arguments;
    let (page, place) = match runs.as_slice() {
        [run] => {
            report::draw(run)?;
            (report::render(run)?, run.join(report::FILE))
        }
        several => (report::compare(several)?, PathBuf::from("comparison.html")),
    };
    let out = out.unwrap_or(place);
    fs::write(&out, page).with_context(|| format!("cannot write {}", out.display()))?;
    println!("wrote {}", out.display());
    Ok(())
}
