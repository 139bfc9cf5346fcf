//! The model repository: a directory of bundles by name and version.

use std::fs;
use std::path::{Path, PathBuf};

use super::BundleError;
use super::manifest::is_name;

/// One bundle's place in the repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Name of the model.
    pub name: String,
    /// Version, from 1.
    pub version: u64,
    /// The bundle's directory.
    pub path: PathBuf,
}

/// All `<model>/<version>` directories below `root`, by name and then version.
///
/// What does not look like one (other files, versions that are not positive integers, half-written
/// bundles) is passed over; bundles are not opened here.
pub fn scan(root: &Path) -> Result<Vec<Entry>, BundleError> {
    let mut entries = Vec::new();
    for (name, model) in directories(root)? {
        if !is_name(&name) {
            continue;
        }
        for (version, path) in directories(&model)? {
            if let Some(version) = version.parse::<u64>().ok().filter(|v| *v > 0) {
                entries.push(Entry {
                    name: name.clone(),
                    version,
                    path,
                });
            }
        }
    }
    entries.sort();
    Ok(entries)
}

fn directories(path: &Path) -> Result<Vec<(String, PathBuf)>, BundleError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(|e| super::io_error(path, e))? {
        let entry = entry.map_err(|e| super::io_error(path, e))?;
        if let (true, Ok(name)) = (entry.path().is_dir(), entry.file_name().into_string()) {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn finds_models_by_name_and_version_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        for place in [
            "b/2",
            "b/10",
            "a/1",
            "a/1.partial",
            "a/0",
            "a/latest",
            ".hidden/1",
            "Upper/1",
        ] {
            fs::create_dir_all(root.path().join(place)).unwrap();
        }
        fs::write(root.path().join("README"), "not a model").unwrap();
        let found: Vec<(String, u64)> = scan(root.path())
            .unwrap()
            .into_iter()
            .map(|e| (e.name, e.version))
            .collect();
        assert_eq!(found, [("a".into(), 1), ("b".into(), 2), ("b".into(), 10)]);
    }
}
