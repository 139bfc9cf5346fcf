//! Adds a bundle to a model repository as the next version of its model, all of it or nothing.
//!
//! A repository is a folder ([`directory`]) or a place in an object store ([`mod@object_store`]; clouds
//! need the feature `object-store`). Two who publish at once get different versions, and whoever reads
//! meanwhile sees a version whole or not at all.

pub mod directory;
pub mod object_store;

use std::fmt;
use std::path::{Path, PathBuf};

use denoised::bundle::{Bundle, BundleError};
use serde_json::Value;
use thiserror::Error;

/// Versions that are tried before giving up: each was taken by somebody else in between.
const TRIES: usize = 1000;

/// A version that readers of the repository see from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Name of the model.
    pub name: String,
    /// Its new version.
    pub version: u64,
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

/// Why a bundle is not published.
#[derive(Debug, Error)]
pub enum PublishError {
    /// The bundle is damaged, or the folder cannot be written.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Not a place that this program can write to.
    #[error("repository {place:?}: {problem}")]
    Place {
        /// What was asked for.
        place: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Others took every version that was tried.
    #[error("{name}: {TRIES} versions in a row were taken by others")]
    Crowded {
        /// Name of the model.
        name: String,
    },
    /// The object store said no.
    #[error(transparent)]
    Store(#[from] ::object_store::Error),
    /// A file of the bundle cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What becomes of a bundle whose model has the same files in its newest version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Same {
    /// It is published once more.
    Again,
    /// Nothing: that version is it. So a job that was killed after it had published may be started again.
    Enough,
}

/// Publishes the bundle in the folder `bundle` to `repository`, a folder or a URL.
pub fn publish(bundle: &Path, repository: &str, same: Same) -> Result<Published, PublishError> {
    let opened = Bundle::open(bundle)?;
    match repository.split_once("://") {
        None => directory::publish(&opened, bundle, Path::new(repository), same),
        Some(("file", path)) if path.starts_with('/') => {
            directory::publish(&opened, bundle, Path::new(path), same)
        }
        Some(("file", _)) => Err(PublishError::Place {
            place: repository.to_owned(),
            problem: "a file URL has three slashes, as in file:///models".to_owned(),
        }),
        Some(_) => object_store::publish_to_url(&opened, bundle, repository, same),
    }
}

/// Whether `manifest`, as it was published, is of the same files as `bundle`.
fn is_of(manifest: &[u8], bundle: &Bundle) -> bool {
    let published = serde_json::from_slice::<Value>(manifest);
    let own = serde_json::to_value(&bundle.manifest().sha256);
    published.is_ok_and(|published| own.is_ok_and(|own| published["sha256"] == own))
}
