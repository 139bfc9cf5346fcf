//! The model repository: a directory of bundles by name and version.

use std::fs;
use std::path::{Path, PathBuf};

pub use super::manifest::is_name;
use super::{BundleError, MANIFEST};

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
/// Anything else (other files, hidden folders, versions that are not positive integers,
/// versions without manifest, which are still being written) is passed over; bundles are not opened here.
pub fn scan(root: &Path) -> Result<Vec<Entry>, BundleError> {
    let mut entries = Vec::new();
    for (name, model) in directories(root)? {
        if !is_name(&name) {
            continue;
        }
        for (version, path) in directories(&model)? {
            // The manifest comes last, where a folder cannot be renamed into place.
            if let Some(version) = parse_version(&version)
                && path.join(MANIFEST).is_file()
            {
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

/// The version that a folder of this name holds: a positive integer as people write it.
pub fn parse_version(name: &str) -> Option<u64> {
    name.parse()
        .ok()
        .filter(|v: &u64| *v > 0 && v.to_string() == name)
}

/// The version after all that the folder `model` of a repository holds, finished or not; 1 if there is none.
pub fn next_version(model: &Path) -> Result<u64, BundleError> {
    if !model.exists() {
        return Ok(1);
    }
    let taken = directories(model)?;
    let versions = taken.iter().filter_map(|(name, _)| parse_version(name));
    Ok(versions.max().map_or(1, |version| version.saturating_add(1)))
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
            "a/01",
            "a/+2",
            "a/.partial-17-0",
            ".hidden/1",
            "Upper/1",
        ] {
            let place = root.path().join(place);
            fs::create_dir_all(&place).unwrap();
            fs::write(place.join(MANIFEST), "").unwrap();
        }
        // Its manifest is yet to come.
        fs::create_dir_all(root.path().join("a/3")).unwrap();
        fs::write(root.path().join("README"), "not a model").unwrap();
        let found: Vec<(String, u64)> = scan(root.path())
            .unwrap()
            .into_iter()
            .map(|e| (e.name, e.version))
            .collect();
        assert_eq!(found, [("a".into(), 1), ("b".into(), 2), ("b".into(), 10)]);
        let next = ["a", "b", "c"].map(|model| next_version(&root.path().join(model)).unwrap());
        assert_eq!(next, [4, 11, 1]);
    }
}
