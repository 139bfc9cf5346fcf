//! Where bundles are.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de};
use url::Url;

use crate::store;

/// A repository of models: a folder, or a place in an object store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepositoryPlace {
    /// A folder.
    Folder(PathBuf),
    /// A place that is mirrored to a folder.
    Store(Url),
}

impl fmt::Display for RepositoryPlace {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(to, "{}", folder.display()),
            Self::Store(url) => write!(to, "{url}"),
        }
    }
}

impl From<PathBuf> for RepositoryPlace {
    fn from(folder: PathBuf) -> Self {
        Self::Folder(folder)
    }
}

/// Reads what is empty where there is none.
pub(super) fn place_or_none<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<RepositoryPlace>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    if !text.contains("://") {
        return Ok(Some(RepositoryPlace::Folder(text.into())));
    }
    let url = store::parse(&text).map_err(de::Error::custom)?;
    Ok(Some(RepositoryPlace::Store(url)))
}
