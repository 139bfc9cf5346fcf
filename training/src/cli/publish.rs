//! `training publish`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use training::publish::{Same, publish};

/// Adds a bundle to a model repository as the next version of its model and prints the version.
///
/// The bundle's hashes are checked first. Readers see the new version whole or not at all, and two who
/// publish at once get different versions.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The bundle's folder, as `export` and `import` write it.
    bundle: PathBuf,
    /// A folder, or s3://, gs:// or az:// with bucket and path (needs the feature `object-store`).
    repository: String,
    /// Publish nothing where the newest version has the very same files, and print that one: for jobs that may be started
    /// again after they were done.
    #[arg(long)]
    unless_there: bool,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        bundle,
        repository,
        unless_there,
    } = arguments;
    let same = if unless_there { Same::Enough } else { Same::Again };
    let published = publish(&bundle, &repository, same)?;
    println!("{published}");
    Ok(())
}
