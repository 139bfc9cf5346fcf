//! Bundles: what a served model is on disk.
//!
//! ```text
//! <repository>/<model>/<version>/      version: a positive integer, the highest wins unless asked
//!     manifest.json    model.onnx (+ external data)    tokenizer.json
//! ```
//!
//! The exporter of the training crate writes bundles ([`write()`]), the server reads them
//! ([`Bundle::look_at`], [`repository::scan`]). No file is used before its hash has been checked against the
//! manifest, and none beside those that it lists is ever opened.

mod embedded;
mod external_data;
mod longest_string;
mod manifest;
pub mod repository;
mod tokenizer;
mod writer;

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use embedded::demo;
#[cfg(test)]
mod fuzz_test;
#[cfg(test)]
pub(crate) use manifest::tests as manifest_tests;
pub use manifest::{Defaults, FORMAT, Frame, Manifest};
#[cfg(test)]
pub(crate) use tokenizer::tests as tokenizer_tests;
pub use tokenizer::{TextTokenizer, TokenizerError};
pub use writer::{BundleFile, BundleWriter, refuse_existing};

use sha2::{Digest, Sha256};

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// Largest manifest that is read, in bytes: all of it is kept, and told to whoever lists models.
pub(crate) const MAX_MANIFEST: u64 = 1 << 20;
/// File name of the network.
pub const MODEL: &str = "model.onnx";
/// File name of weights that do not lie in [`MODEL`] itself, which protobuf keeps below 2 GB.
pub const EXTERNAL_DATA: &str = "model.onnx.data";
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
        /// The system's error.
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
        /// The problem.
        problem: &'static str,
    },
    /// The network is not an ONNX file.
    #[error("{MODEL}: {0}")]
    Model(String),
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

/// The network of a bundle as it is run: the very bytes whose hashes were checked.
#[derive(Debug)]
pub struct ModelBytes {
    /// The contents of [`MODEL`].
    pub model: Cow<'static, [u8]>,
    /// Files that it names as external data, with their contents.
    pub external: Vec<(String, Arc<[u8]>)>,
}

/// A bundle.
#[derive(Clone, Debug)]
pub struct Bundle {
    manifest: Manifest,
    files: Files,
    weight_bytes: u64,
}

impl Bundle {
    /// Opens the bundle in `directory`, checking its manifest and every hash.
    pub fn open(directory: &Path) -> Result<Self, BundleError> {
        let manifest = Self::listed(directory)?;
        for (name, expected) in &manifest.sha256 {
            check_hash(name, expected, sha256_of_file(name, &directory.join(name))?)?;
        }
        Self::of_files(directory, manifest)
    }

    /// Opens the bundle in `directory` without reading its weights: their hashes are checked when the network is
    /// read, that of the tokenizer when it is.
    pub fn look_at(directory: &Path) -> Result<Self, BundleError> {
        Self::of_files(directory, Self::listed(directory)?)
    }

    /// The manifest of `directory`, if it lists all that lies there.
    fn listed(directory: &Path) -> Result<Manifest, BundleError> {
        let bytes = read_manifest(&directory.join(MANIFEST))?;
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
        Ok(manifest)
    }

    /// The bundle in `directory`, whose files `manifest` lists.
    fn of_files(directory: &Path, manifest: Manifest) -> Result<Self, BundleError> {
        let path = directory.join(MODEL);
        let file = open_file(MODEL, &path)?;
        let length = file.metadata().map_err(|e| io_error(&path, e))?.len();
        let weight_bytes = check_external_data(BufReader::new(file), length, |name| {
            // Names in the manifest are plain: what it lists lies in the bundle.
            if manifest.sha256.contains_key(name) {
                Ok(())
            } else {
                Err("is named by the network as external data, but not listed in the manifest")
            }
        })?;
        Ok(Self {
            manifest,
            files: Files::Directory(directory.to_owned()),
            weight_bytes,
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
            let bytes = find(name).ok_or_else(|| missing(name))?;
            check_hash(name, expected, sha256(bytes))?;
        }
        let model = find(MODEL).ok_or_else(|| missing(MODEL))?;
        let weight_bytes = check_external_data(Cursor::new(model), model.len() as u64, |_| {
            Err("is named by the network as external data, which an embedded bundle cannot have")
        })?;
        Ok(Self {
            manifest,
            files: Files::Embedded(files),
            weight_bytes,
        })
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes that the weights take in memory, about.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The network, read and checked now: what lies in the folder may have changed since it was opened, and may
    /// change while it is run.
    pub fn model(&self) -> Result<ModelBytes, BundleError> {
        let directory = match &self.files {
            Files::Directory(directory) => directory,
            Files::Embedded(files) => {
                let model = files.iter().find(|(name, _)| *name == MODEL);
                return Ok(ModelBytes {
                    model: Cow::Borrowed(model.map_or(&[], |(_, bytes)| *bytes)),
                    external: Vec::new(),
                });
            }
        };
        let model = self.read_checked(directory, MODEL)?;
        let contents = external_data::contents(Cursor::new(&model), model.len() as u64);
        let external = contents
            .map_err(BundleError::Model)?
            .files
            .into_iter()
            .map(|name| Ok((name.clone(), self.share_checked(directory, &name)?)))
            .collect::<Result<_, BundleError>>()?;
        Ok(ModelBytes {
            model: Cow::Owned(model),
            external,
        })
    }

    /// The contents of a file that the manifest lists, if they are what it says.
    fn read_checked(&self, directory: &Path, name: &str) -> Result<Vec<u8>, BundleError> {
        let expected = self.expected(name)?;
        let path = directory.join(name);
        let mut bytes = Vec::new();
        open_file(name, &path)?
            .read_to_end(&mut bytes)
            .map_err(|e| io_error(&path, e))?;
        check_hash(name, expected, sha256(&bytes))?;
        Ok(bytes)
    }

    /// The same in memory that is never copied: weights can be gigabytes.
    fn share_checked(&self, directory: &Path, name: &str) -> Result<Arc<[u8]>, BundleError> {
        let expected = self.expected(name)?;
        let path = directory.join(name);
        let mut file = open_file(name, &path)?;
        let length = file.metadata().map_err(|e| io_error(&path, e))?.len() as usize;
        let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, length).collect();
        if let Some(bytes) = Arc::get_mut(&mut bytes) {
            file.read_exact(bytes).map_err(|e| io_error(&path, e))?;
        }
        check_hash(name, expected, sha256(&bytes))?;
        Ok(bytes)
    }

    fn expected(&self, name: &str) -> Result<&str, BundleError> {
        let expected = self.manifest.sha256.get(name).map(String::as_str);
        expected.ok_or_else(|| BundleError::File {
            file: name.to_owned(),
            problem: "is not listed in the manifest",
        })
    }

    /// The tokenizer, if the bundle has one; without, it is served by token ids alone.
    pub fn tokenizer(&self) -> Result<Option<TextTokenizer>, BundleError> {
        if !self.manifest.sha256.contains_key(TOKENIZER) {
            return Ok(None);
        }
        let bytes = match &self.files {
            Files::Directory(directory) => self.read_checked(directory, TOKENIZER)?,
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
    refuse_existing(directory)?;
    let mut writer = BundleWriter::new(directory.parent().unwrap_or(Path::new("")))?;
    for (name, bytes) in files {
        writer.add(name, bytes)?;
    }
    writer.describe(manifest)?;
    writer.commit(directory)
}

/// Asks `allowed` about every file that the network wants to read beside itself. Returns the bytes of its weights.
fn check_external_data(
    model: impl BufRead + Seek,
    length: u64,
    allowed: impl Fn(&str) -> Result<(), &'static str>,
) -> Result<u64, BundleError> {
    let contents = external_data::contents(model, length).map_err(BundleError::Model)?;
    for file in contents.files {
        allowed(&file).map_err(|problem| BundleError::File { file, problem })?;
    }
    Ok(contents.weight_bytes)
}

/// An error where a file is not what the manifest says.
pub(crate) fn check_hash(file: &str, expected: &str, found: String) -> Result<(), BundleError> {
    if found == expected {
        return Ok(());
    }
    Err(BundleError::Hash {
        file: file.to_owned(),
        expected: brief(expected),
        found,
    })
}

/// Longest text of an error that repeats what somebody else has written, in characters.
const BRIEF: usize = 300;

/// The beginning of `error`: a file that is none can make it as long as itself.
fn brief(error: impl std::fmt::Display) -> String {
    error.to_string().chars().take(BRIEF).collect()
}

/// Lower-case hexadecimal sha256.
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// sha256 of a file, which may be larger than memory.
fn sha256_of_file(name: &str, path: &Path) -> Result<String, BundleError> {
    sha256_of(open_file(name, path)?).map_err(|e| io_error(path, e))
}

/// Opens a file. Looks first what it is: opening a pipe waits for whoever writes, and a device would never end.
fn open_file(name: &str, path: &Path) -> Result<File, BundleError> {
    let io = |e| io_error(path, e);
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(BundleError::File {
            file: name.to_owned(),
            problem: "is not a file",
        });
    }
    File::open(path).map_err(io)
}

/// [`sha256`] of everything that `reader` still holds, which may be larger than memory.
pub fn sha256_of(mut reader: impl Read) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 18];
    loop {
        match reader.read(&mut chunk)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            length => hash.update(&chunk[..length]),
        }
    }
}

/// Lower-case hexadecimal digits of `bytes`.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read_manifest(path: &Path) -> Result<Vec<u8>, BundleError> {
    let mut bytes = Vec::new();
    open_file(MANIFEST, path)?
        .take(MAX_MANIFEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| io_error(path, e))?;
    if bytes.len() as u64 > MAX_MANIFEST {
        let problem = format!("is larger than {MAX_MANIFEST} bytes");
        return Err(BundleError::Manifest(problem));
    }
    Ok(bytes)
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
        write(&directory, &mut manifest, &[(MODEL, b"")]).unwrap();
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
    fn what_is_run_is_what_was_checked() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("tiny/1");
        let model = external_data::tests::model_with_external_data(EXTERNAL_DATA);
        let files: [(&str, &[u8]); 2] = [(MODEL, &model), (EXTERNAL_DATA, b"weights")];
        write(&directory, &mut manifest::tests::tiny(), &files).unwrap();
        let bundle = Bundle::open(&directory).unwrap();
        let bytes = bundle.model().unwrap();
        assert_eq!((&*bytes.model, &*bytes.external[0].1), (&*model, &b"weights"[..]));
        fs::write(directory.join(EXTERNAL_DATA), b"heights").unwrap();
        let refused = bundle.model().unwrap_err();
        assert!(matches!(refused, BundleError::Hash { file, .. } if file == EXTERNAL_DATA));
        // What was read before is private to whoever read it.
        assert_eq!(&*bytes.external[0].1, b"weights");
    }

    #[test]
    fn a_pipe_or_a_huge_manifest_is_refused_without_waiting() {
        let root = tempfile::tempdir().unwrap();
        for name in [MANIFEST, MODEL] {
            let directory = written(root.path());
            fs::remove_file(directory.join(name)).unwrap();
            let made = std::process::Command::new("mkfifo")
                .arg(directory.join(name))
                .status();
            assert!(made.unwrap().success());
            let refused = Bundle::open(&directory).unwrap_err();
            assert!(refused.to_string().contains("is not a file"), "{refused}");
            fs::remove_dir_all(&directory).unwrap();
        }
        let directory = written(root.path());
        let manifest = directory.join(MANIFEST);
        let text = fs::read_to_string(&manifest).unwrap();
        fs::write(&manifest, text + &" ".repeat(MAX_MANIFEST as usize)).unwrap();
        let refused = Bundle::open(&directory).unwrap_err();
        assert!(refused.to_string().contains("1048576 bytes"), "{refused}");
    }

    #[test]
    fn external_data_must_be_listed() {
        let root = tempfile::tempdir().unwrap();
        let files = |location| {
            let model = external_data::tests::model_with_external_data(location);
            let directory = root.path().join("tiny/2");
            let files: [(&str, &[u8]); 2] = [(MODEL, &model), (EXTERNAL_DATA, b"weights")];
            write(&directory, &mut manifest::tests::tiny(), &files)?;
            Bundle::open(&directory)
        };
        for elsewhere in ["/etc/passwd", "../1/model.onnx", "./model.onnx.data", ""] {
            let refused = files(elsewhere).unwrap_err();
            assert!(
                matches!(&refused, BundleError::File { file, .. } if file == elsewhere),
                "{elsewhere}: {refused}"
            );
        }
        files(EXTERNAL_DATA).unwrap();
        // Damage there is found like damage anywhere.
        let data = root.path().join("tiny/2").join(EXTERNAL_DATA);
        fs::write(&data, b"Weights").unwrap();
        let refused = Bundle::open(&root.path().join("tiny/2")).unwrap_err();
        assert!(matches!(refused, BundleError::Hash { file, .. } if file == EXTERNAL_DATA));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("tiny/1");
        let refused = write(
            &directory,
            &mut manifest::tests::tiny(),
            &[(MODEL, b"not really a network")],
        );
        assert!(matches!(refused, Err(BundleError::Model(_))));
        assert!(!directory.exists());
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
