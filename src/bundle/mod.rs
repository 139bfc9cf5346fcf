//! Bundles: what a served model is on disk.
//!
//! ```text
//! <repository>/<model>/<version>/      version: a positive integer, the highest wins unless asked
//!     manifest.json    model.onnx (+ external data)    tokenizer.json
//! ```
//!
//! The exporter of the training crate writes bundles ([`write()`]), the server reads them
//! ([`Bundle::open`], [`repository::scan`]). A bundle is trusted only after the hash of every file in it
//! has been checked against its manifest, and no file beside those is ever opened.

mod embedded;
mod manifest;
pub mod repository;
mod tokenizer;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use embedded::demo;
pub use manifest::{FORMAT, Manifest, Parameterization};
pub use tokenizer::{TextTokenizer, TokenizerError};

use sha2::{Digest, Sha256};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// File name of the network.
pub const MODEL: &str = "model.onnx";
/// File name of the tokenizer, in the format of Hugging Face `tokenizers`.
pub const TOKENIZER: &str = "tokenizer.json";

/// Why a bundle cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `manifest.json` is not what this program reads.
    #[error("{MANIFEST}: {0}")]
    Manifest(String),
    /// A file differs from what the manifest says of it.
    #[error("{file}: sha256 is {found}, the manifest says {expected}")]
    Hash {
        /// The file's name.
        file: String,
        /// Hash in the manifest.
        expected: String,
        /// Hash of the file.
        found: String,
    },
    /// A file lies in the bundle that the manifest does not list, or the reverse.
    #[error("{file}: {problem}")]
    File {
        /// The file's name.
        file: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The tokenizer does not fit.
    #[error("{TOKENIZER}: {0}")]
    Tokenizer(#[from] TokenizerError),
}

/// Where the bytes of a bundle are.
#[derive(Clone, Debug)]
enum Files {
    Directory(PathBuf),
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// The network of a bundle, as ONNX Runtime takes it.
#[derive(Debug)]
pub enum ModelSource<'a> {
    /// A file, beside which external data may lie.
    Path(PathBuf),
    /// The whole model in memory.
    Bytes(&'a [u8]),
}

/// A checked bundle.
#[derive(Clone, Debug)]
pub struct Bundle {
    manifest: Manifest,
    files: Files,
}

impl Bundle {
    /// Opens the bundle in `directory`, checking its manifest and every hash.
    pub fn open(directory: &Path) -> Result<Self, BundleError> {
        let bytes = read(&directory.join(MANIFEST))?;
        let manifest = Manifest::from_json(&bytes).map_err(BundleError::Manifest)?;
        for entry in fs::read_dir(directory).map_err(|e| io_error(directory, e))? {
            let name = entry
                .map_err(|e| io_error(directory, e))?
                .file_name()
                .to_string_lossy()
                .into_owned();
            if name != MANIFEST && !manifest.sha256.contains_key(&name) {
                return Err(BundleError::File {
                    file: name,
                    problem: "lies in the bundle but not in its manifest",
                });
            }
        }
        for (name, expected) in &manifest.sha256 {
            check_hash(name, expected, &read(&directory.join(name))?)?;
        }
        Ok(Self {
            manifest,
            files: Files::Directory(directory.to_owned()),
        })
    }

    /// A bundle compiled into the binary: manifest and files by name.
    pub fn embedded(files: &'static [(&'static str, &'static [u8])]) -> Result<Self, BundleError> {
        let find = |wanted: &str| {
            files
                .iter()
                .find(|(name, _)| *name == wanted)
                .map(|(_, bytes)| *bytes)
        };
        let missing = |file: &str| BundleError::File {
            file: file.to_owned(),
            problem: "is missing",
        };
        let manifest = Manifest::from_json(find(MANIFEST).ok_or_else(|| missing(MANIFEST))?)
            .map_err(BundleError::Manifest)?;
        for (name, expected) in &manifest.sha256 {
            check_hash(name, expected, find(name).ok_or_else(|| missing(name))?)?;
        }
        Ok(Self {
            manifest,
            files: Files::Embedded(files),
        })
    }

    /// What the manifest says.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The network.
    pub fn model(&self) -> ModelSource<'static> {
        match &self.files {
            Files::Directory(directory) => ModelSource::Path(directory.join(MODEL)),
            Files::Embedded(files) => ModelSource::Bytes(
                files
                    .iter()
                    .find(|(name, _)| *name == MODEL)
                    .map_or(&[], |(_, b)| *b),
            ),
        }
    }

    /// The tokenizer, if the bundle has one; without, it is served by token ids alone.
    pub fn tokenizer(&self) -> Result<Option<TextTokenizer>, BundleError> {
        if !self.manifest.sha256.contains_key(TOKENIZER) {
            return Ok(None);
        }
        let bytes = match &self.files {
            Files::Directory(directory) => read(&directory.join(TOKENIZER))?,
            Files::Embedded(files) => files
                .iter()
                .find(|(name, _)| *name == TOKENIZER)
                .map_or_else(Vec::new, |(_, b)| b.to_vec()),
        };
        Ok(Some(TextTokenizer::from_json(&bytes, &self.manifest)?))
    }
}

/// Writes a bundle into `directory`, which must not exist yet: all of it or nothing.
///
/// `files` are [`MODEL`] and, if there is one, [`TOKENIZER`]; their hashes are filled into `manifest`.
pub fn write(directory: &Path, manifest: &mut Manifest, files: &[(&str, &[u8])]) -> Result<(), BundleError> {
    manifest.sha256 = files
        .iter()
        .map(|(name, bytes)| ((*name).to_owned(), sha256(bytes)))
        .collect::<BTreeMap<_, _>>();
    manifest.check().map_err(BundleError::Manifest)?;
    if directory.exists() {
        let source = io::Error::new(io::ErrorKind::AlreadyExists, "exists already");
        return Err(io_error(directory, source));
    }
    // Written beside its final place and then renamed, so that a watching server never sees half of it.
    let mut partial = directory.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|e| io_error(&partial, e))?;
    }
    fs::create_dir_all(&partial).map_err(|e| io_error(&partial, e))?;
    let json = serde_json::to_vec_pretty(manifest).map_err(|e| BundleError::Manifest(e.to_string()))?;
    for (name, bytes) in files.iter().copied().chain([(MANIFEST, json.as_slice())]) {
        let path = partial.join(name);
        fs::write(&path, bytes).map_err(|e| io_error(&path, e))?;
    }
    fs::rename(&partial, directory).map_err(|e| io_error(directory, e))
}

fn check_hash(file: &str, expected: &str, bytes: &[u8]) -> Result<(), BundleError> {
    let found = sha256(bytes);
    if found == expected {
        return Ok(());
    }
    Err(BundleError::Hash {
        file: file.to_owned(),
        expected: expected.to_owned(),
        found,
    })
}

/// Lower-case hexadecimal sha256.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    fs::read(path).map_err(|e| io_error(path, e))
}

fn io_error(path: &Path, source: io::Error) -> BundleError {
    BundleError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn written(root: &Path) -> PathBuf {
        let directory = root.join("tiny/1");
        let mut manifest = manifest::tests::tiny();
        write(&directory, &mut manifest, &[(MODEL, b"not really a network")]).unwrap();
        directory
    }

    #[test]
    fn what_is_written_opens() {
        let root = tempfile::tempdir().unwrap();
        let bundle = Bundle::open(&written(root.path())).unwrap();
        assert_eq!(bundle.manifest().name, "tiny");
        assert!(bundle.tokenizer().unwrap().is_none());
    }

    #[test]
    fn a_changed_file_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = written(root.path());
        fs::write(directory.join(MODEL), b"another network").unwrap();
        assert!(matches!(Bundle::open(&directory), Err(BundleError::Hash { .. })));
    }

    #[test]
    fn an_unlisted_file_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = written(root.path());
        fs::write(directory.join("weights.bin"), b"external data nobody hashed").unwrap();
        assert!(matches!(Bundle::open(&directory), Err(BundleError::File { .. })));
    }

    #[test]
    fn nothing_is_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let directory = written(root.path());
        let again = write(&directory, &mut manifest::tests::tiny(), &[(MODEL, b"x")]);
        assert!(matches!(again, Err(BundleError::Io { .. })));
        assert!(Bundle::open(&directory).is_ok());
    }
}
