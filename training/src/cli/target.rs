//! What is wrong with a bundle to come, found before the work.

use std::path::Path;

use anyhow::{Result, ensure};
use denoised::bundle::repository::is_name;

/// Refuses a name that no model can have, and a folder that is there.
pub(super) fn check(name: &str, out: &Path) -> Result<()> {
    ensure!(
        is_name(name),
        "--name is {name:?}, must be at most 128 of a to z, 0 to 9, '.', '_' and '-', and begin with a letter or a digit"
    );
    ensure!(!out.exists(), "--out {}: is there already", out.display());
    Ok(())
}
