//! The documents of one file, one after the other. What is held is one document and a little more.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, Read};
use std::ops::Range;
use std::path::PathBuf;

use indicatif::ProgressBar;
use memchr::memmem::Finder;
use serde_json::value::RawValue;
use thiserror::Error;

use super::source::{Format, SourceFile};

/// Bytes that are read at a time.
const CHUNK: usize = 256 << 10;

/// A document that cannot be read.
#[derive(Debug, Error)]
#[error("{path}:{line}: {problem}", path = path.display())]
pub struct DocumentError {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1; of the unpacked text where the file is compressed.
    pub line: u64,
    /// What is wrong there.
    pub problem: DocumentProblem,
}

/// What is wrong with a document.
#[derive(Debug, Error)]
pub enum DocumentProblem {
    /// It cannot be read or unpacked.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is too long.
    #[error(
        "begins a document of more than {limit} bytes; separate its parts (--separator) \
         or allow more (--max-document-bytes)"
    )]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// It is not text.
    #[error("is not UTF-8")]
    NotUtf8,
    /// It is not a JSON object.
    #[error("is not a JSON object: {message} (column {column})")]
    NotJson {
        /// What the parser says.
        message: String,
        /// Where, from 1.
        column: usize,
    },
    /// It is an object without this field.
    #[error("has no field {field:?}")]
    NoField {
        /// The field.
        field: String,
    },
    /// It is an object whose field holds something else than text.
    #[error("field {field:?} holds no text: {message}")]
    NotText {
        /// The field.
        field: String,
        /// What the parser says.
        message: String,
    },
}

/// How files are cut into documents.
#[derive(Clone, Debug)]
pub(super) struct Cutting {
    /// Between the documents of a text file; without, it is one document.
    pub(super) separator: Option<String>,
    /// The field of a JSON object that is its document.
    pub(super) field: String,
    /// Most bytes of a document, or of the line that holds it.
    pub(super) limit: usize,
}

/// The documents of a file, blank ones of text files included.
pub(super) struct Reader {
    path: PathBuf,
    source: Box<dyn Read + Send>,
    delimiter: Option<Finder<'static>>,
    /// Of JSON lines.
    field: Option<String>,
    limit: usize,
    /// Bytes from `start` on are yet to be given out.
    buffer: Vec<u8>,
    start: usize,
    /// Line at `start`, from 1.
    line: u64,
    /// The source holds no more.
    ended: bool,
    failed: bool,
}

impl Reader {
    pub(super) fn open(
        file: SourceFile,
        cutting: &Cutting,
        bar: &ProgressBar,
    ) -> Result<Self, DocumentError> {
        let source = file.open(bar).map_err(|error| DocumentError {
            path: file.path.clone(),
            line: 1,
            problem: error.into(),
        })?;
        let (delimiter, field) = match file.format {
            Format::Text => (cutting.separator.as_deref(), None),
            Format::JsonLines => (Some("\n"), Some(cutting.field.clone())),
        };
        Ok(Self {
            path: file.path,
            source,
            delimiter: delimiter.map(|delimiter| Finder::new(delimiter).into_owned()),
            field,
            limit: cutting.limit,
            buffer: Vec::new(),
            start: 0,
            line: 1,
            ended: false,
            failed: false,
        })
    }

    /// Where the next record lies in the buffer, and where the one after it begins.
    fn record(&mut self) -> Result<Option<(Range<usize>, usize)>, DocumentProblem> {
        let width = self.delimiter.as_ref().map_or(1, |finder| finder.needle().len());
        let too_long = DocumentProblem::TooLong { limit: self.limit };
        let mut searched = self.start;
        loop {
            let found = self
                .delimiter
                .as_ref()
                .and_then(|finder| finder.find(&self.buffer[searched..]));
            let (end, next) = match found {
                Some(at) => (searched + at, searched + at + width),
                None if self.ended => (self.buffer.len(), self.buffer.len()),
                None => {
                    let held = self.buffer.len() - self.start;
                    // The last bytes may be the beginning of a delimiter.
                    let undecided = held.min(width - 1);
                    if held - undecided > self.limit {
                        return Err(too_long);
                    }
                    self.buffer.drain(..self.start);
                    self.start = 0;
                    searched = held - undecided;
                    let read = (&mut self.source)
                        .take(CHUNK as u64)
                        .read_to_end(&mut self.buffer)?;
                    self.ended = read < CHUNK;
                    continue;
                }
            };
            if self.start == next {
                return Ok(None);
            }
            if end - self.start > self.limit {
                return Err(too_long);
            }
            return Ok(Some((self.start..end, next)));
        }
    }

    fn document(&mut self) -> Result<Option<String>, DocumentProblem> {
        while let Some((record, next)) = self.record()? {
            let text = match str::from_utf8(&self.buffer[record.clone()]) {
                Ok(text) => text,
                Err(error) => {
                    let valid = &self.buffer[record.start..record.start + error.valid_up_to()];
                    self.line += newlines(valid);
                    return Err(DocumentProblem::NotUtf8);
                }
            };
            let document = match &self.field {
                None => Some(text.to_owned()),
                Some(_) if text.trim().is_empty() => None,
                Some(field) => Some(text_in(text, field)?),
            };
            self.line += newlines(&self.buffer[record.start..next]);
            self.start = next;
            if document.is_some() {
                return Ok(document);
            }
        }
        Ok(None)
    }
}

impl Iterator for Reader {
    type Item = Result<String, DocumentError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let document = self.document().map_err(|problem| {
            self.failed = true;
            DocumentError {
                path: self.path.clone(),
                line: self.line,
                problem,
            }
        });
        document.transpose()
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

/// The text that an object's `field` holds. The other fields are skipped, not built.
fn text_in(line: &str, field: &str) -> Result<String, DocumentProblem> {
    // serde_json counts lines from the beginning of what it was given: here there is one.
    let message = |error: &serde_json::Error| {
        let message = error.to_string();
        message
            .rsplit_once(" at line ")
            .map_or(message.clone(), |(before, _)| before.to_owned())
    };
    let object: HashMap<Cow<'_, str>, &RawValue> =
        serde_json::from_str(line).map_err(|error| DocumentProblem::NotJson {
            message: message(&error),
            column: error.column(),
        })?;
    let value = object.get(field).ok_or_else(|| DocumentProblem::NoField {
        field: field.to_owned(),
    })?;
    serde_json::from_str(value.get()).map_err(|error| DocumentProblem::NotText {
        field: field.to_owned(),
        message: message(&error),
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use std::fs;
    use std::io::Write;
    use std::path::Path;

    fn cutting(separator: Option<&str>) -> Cutting {
        Cutting {
            separator: separator.map(str::to_owned),
            field: "text".to_owned(),
            limit: 1000,
        }
    }

    fn read(path: &Path, cutting: &Cutting) -> Result<Vec<String>, DocumentError> {
        let file = super::super::source::list(&[path.to_owned()], &[])
            .unwrap()
            .remove(0);
        Reader::open(file, cutting, &ProgressBar::hidden())?.collect()
    }

    fn documents(name: &str, content: &[u8], cutting: &Cutting) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        read(&path, cutting).map_err(|error| {
            error
                .to_string()
                .strip_prefix(&format!("{}/", folder.path().display()))
                .unwrap()
                .to_owned()
        })
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut packed = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(text).unwrap();
        packed.finish().unwrap()
    }

    #[test]
    fn formats_and_compressions_give_the_same_documents() {
        let text = "first\nline two<>second \u{1F431}".as_bytes();
        let lines = concat!(
            r#"{"id": 1, "text": "first\nline two", "meta": {"text": [1e999, null]}}"#,
            "\r\n\n",
            r#"{"text": "second \ud83d\udc31"}"#
        )
        .as_bytes();
        let expected = ["first\nline two", "second \u{1F431}"];
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        // Packed in two parts each, as parallel packers do.
        let twice =
            |pack: &dyn Fn(&[u8]) -> Vec<u8>, bytes: &[u8]| [pack(&bytes[..9]), pack(&bytes[9..])].concat();
        for (name, content) in [
            ("a.txt", text.to_vec()),
            ("a.md", text.to_vec()),
            ("a.txt.gz", twice(&gzip, text)),
            ("a.txt.zst", twice(&zstd, text)),
            ("a.jsonl", lines.to_vec()),
            ("a.jsonl.gz", twice(&gzip, lines)),
            ("a.jsonl.zst", twice(&zstd, lines)),
        ] {
            assert_eq!(
                documents(name, &content, &cutting(Some("<>"))).unwrap(),
                expected,
                "{name}"
            );
        }
    }

    #[test]
    fn another_field_can_be_named() {
        let cutting = Cutting {
            field: "body".to_owned(),
            ..cutting(None)
        };
        let content = br#"{"text": 3, "body": "it"}"#;
        assert_eq!(documents("a.jsonl", content, &cutting).unwrap(), ["it"]);
    }

    #[test]
    fn problems_are_named_with_file_and_line() {
        let long = "x".repeat(1001);
        for (name, content, says) in [
            ("a.txt", b"one\ntwo<>\n\xff".as_slice(), "a.txt:3: is not UTF-8"),
            (
                "a.txt",
                format!("\n\n<>{long}").as_bytes(),
                "a.txt:3: begins a document of more than 1000 bytes",
            ),
            (
                "a.txt",
                format!("{long}<>").as_bytes(),
                "a.txt:1: begins a document of more than 1000 bytes",
            ),
            (
                "a.jsonl",
                b"{\"text\": \"\"}\n\n{\"text\": \"\xff\"}",
                "a.jsonl:3: is not UTF-8",
            ),
            (
                "a.jsonl",
                b"{\"text\": \"\"}\n{\"text\": }",
                "a.jsonl:2: is not a JSON object: expected value (column 10)",
            ),
            (
                "a.jsonl",
                b"[1]",
                "a.jsonl:1: is not a JSON object: invalid type: sequence, expected a map",
            ),
            ("a.jsonl", b"{\"body\": \"\"}", "a.jsonl:1: has no field \"text\""),
            (
                "a.jsonl",
                b"{\"text\": null}",
                "a.jsonl:1: field \"text\" holds no text: invalid type: null",
            ),
            ("a.txt.gz", &gzip(b"text")[..20], "a.txt.gz:1: cannot be read"),
            ("a.txt.gz", b"no gzip", "a.txt.gz:1: cannot be read"),
            ("a.txt.zst", b"no zstd", "a.txt.zst:1: cannot be read"),
        ] {
            let error = documents(name, content, &cutting(Some("<>"))).unwrap_err();
            assert!(error.starts_with(says), "{error:?}, not {says:?}");
        }
    }

    /// Delimiters across the borders of what is read at a time, and documents of just the limit.
    #[test]
    fn long_files_are_cut_as_str_split_cuts() {
        let limit = CHUNK + 10;
        let cutting = Cutting {
            limit,
            ..cutting(Some("<-->"))
        };
        for shift in 0..6 {
            let text = [
                "a".repeat(CHUNK - shift),
                "b".repeat(limit),
                "c".repeat(2 * CHUNK - limit),
            ]
            .join("<-->");
            let expected: Vec<&str> = text.split("<-->").collect();
            assert_eq!(documents("a.txt", text.as_bytes(), &cutting).unwrap(), expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn separators_cut_as_str_split_does(text in "[ab\u{e9}]{0,40}", separator in "[ab]{1,3}") {
            let mut expected: Vec<&str> = text.split(&separator).collect();
            // Nothing after the last separator is no document.
            expected.pop_if(|last| last.is_empty());
            let read = documents("a.txt", text.as_bytes(), &cutting(Some(&separator))).unwrap();
            prop_assert_eq!(read, expected);
        }
    }
}
