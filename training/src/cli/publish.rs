//! `training publish`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use training::publish::publish;

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
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments { bundle, repository } = arguments;
    let published = publish(&bundle, &repository)?;
    println!("{published}");
    Ok(())
}
