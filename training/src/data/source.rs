//! Which files a corpus has, in which order, and how their bytes are unpacked.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use indicatif::ProgressBar;
use walkdir::{DirEntry, WalkDir};

use super::error::DataError;

/// How documents lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Text; what separates documents is said elsewhere.
    Text,
    /// A JSON object on every line, a document in one of its fields.
    JsonLines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// A file of documents.
#[derive(Clone, Debug)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    /// On disk, as it is.
    pub(super) bytes: u64,
    pub(super) format: Format,
    /// Whether all of it is held out.
    pub(super) is_validation: bool,
    compression: Compression,
}

impl SourceFile {
    fn new(path: PathBuf, is_validation: bool) -> Result<Self, DataError> {
        let bytes = fs::metadata(&path).map_err(DataError::read(&path))?.len();
        let (format, compression) = kind(&path);
        Ok(Self {
            path,
            bytes,
            format: format.unwrap_or(Format::Text),
            is_validation,
            compression,
        })
    }

    /// Its unpacked bytes; `bar` counts those read from disk.
    pub(super) fn open(&self, bar: &ProgressBar) -> io::Result<Box<dyn Read + Send>> {
        let file = bar.wrap_read(File::open(&self.path)?);
        // Both decoders go on with the next member or frame, which is how parallel packers write.
        Ok(match self.compression {
            Compression::None => Box::new(file),
            Compression::Gzip => Box::new(MultiGzDecoder::new(file)),
            Compression::Zstd => Box::new(zstd::Decoder::new(file)?),
        })
    }
}

/// What a file's name says of it; no format where the name is none of text or JSON lines.
fn kind(path: &Path) -> (Option<Format>, Compression) {
    let extension = |path: &Path| {
        path.extension()
            .map_or(String::new(), |e| e.to_string_lossy().to_ascii_lowercase())
    };
    let compression = match extension(path).as_str() {
        "gz" => Compression::Gzip,
        "zst" => Compression::Zstd,
        _ => Compression::None,
    };
    let packed = match compression {
        Compression::None => path.to_owned(),
        Compression::Gzip | Compression::Zstd => path.with_extension(""),
    };
    let format = match extension(&packed).as_str() {
        "txt" => Some(Format::Text),
        "jsonl" => Some(Format::JsonLines),
        _ => None,
    };
    (format, compression)
}

/// The files that `inputs` and `validation` name, in that order, each directory's sorted by name within each level:
/// the order is that of the tokens, so that it must not depend on the file system.
pub(super) fn list(inputs: &[PathBuf], validation: &[PathBuf]) -> Result<Vec<SourceFile>, DataError> {
    let mut files = Vec::new();
    let sides = [(inputs, false), (validation, true)];
    let each = |(inputs, is_validation)| <[PathBuf]>::iter(inputs).map(move |input| (input, is_validation));
    for (input, is_validation) in sides.into_iter().flat_map(each) {
        if input.is_dir() {
            let before = files.len();
            let visible = |entry: &DirEntry| {
                entry.depth() == 0 || !entry.file_name().to_string_lossy().starts_with('.')
            };
            let walk = WalkDir::new(input).follow_links(true).sort_by_file_name();
            for entry in walk.into_iter().filter_entry(visible) {
                let entry = entry?;
                if entry.file_type().is_file() && kind(entry.path()).0.is_some() {
                    files.push(SourceFile::new(entry.into_path(), is_validation)?);
                }
            }
            if files.len() == before {
                return Err(DataError::NoFiles(input.clone()));
            }
        } else {
            files.push(SourceFile::new(input.clone(), is_validation)?);
        }
    }
    // The same text on both sides of the split would make held-out text easy.
    let mut seen = HashSet::new();
    for SourceFile { path, .. } in &files {
        let real = fs::canonicalize(path).map_err(DataError::read(path))?;
        if !seen.insert(real) {
            return Err(DataError::Twice(path.clone()));
        }
    }
    Ok(files)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn directories_are_walked_in_order_and_files_taken_as_given() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for directory in ["texts/b", "texts/.hidden", "empty"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        let names = [
            "texts/c.txt",
            "texts/a.jsonl.zst",
            "texts/b/2.TXT",
            "texts/b/10.txt.gz",
            "texts/notes.md",
            "texts/.hidden/x.txt",
            "texts/.y.txt",
            "last.md",
        ];
        for name in names {
            fs::write(root.join(name), "x").unwrap();
        }
        let names = |inputs: &[&str]| -> Result<Vec<String>, DataError> {
            let inputs: Vec<_> = inputs.iter().map(|input| root.join(input)).collect();
            let files = list(&inputs, &[])?;
            Ok(files
                .iter()
                .map(|file| file.path.strip_prefix(root).unwrap().display().to_string())
                .collect())
        };
        assert_eq!(
            names(&["last.md", "texts"]).unwrap(),
            [
                "last.md",
                "texts/a.jsonl.zst",
                "texts/b/10.txt.gz",
                "texts/b/2.TXT",
                "texts/c.txt"
            ]
        );
        let says = |inputs: &[&str]| format!("{:#}", names(inputs).unwrap_err());
        assert!(says(&["texts/c.txt", "texts"]).contains("c.txt is given twice"));
        assert!(says(&["empty"]).contains("empty holds no .txt or .jsonl"));
        assert!(says(&["absent.txt"]).contains("absent.txt"));
    }

    #[test]
    fn names_tell_format_and_compression() {
        for (name, expected) in [
            ("a.txt", (Some(Format::Text), Compression::None)),
            ("a.b.jsonl.gz", (Some(Format::JsonLines), Compression::Gzip)),
            ("a.txt.zst", (Some(Format::Text), Compression::Zstd)),
            ("a.md.gz", (None, Compression::Gzip)),
            ("README", (None, Compression::None)),
        ] {
            assert_eq!(kind(Path::new(name)), expected, "{name}");
        }
    }
}
