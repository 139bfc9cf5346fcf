//! Documents as a stream, which of them are held out, and a bounded sample of the rest.

use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};
use std::vec;
use std::{fmt, fs};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use super::detokenize::{Benchmark, Detokenizer};
use super::error::DataError;
use super::progress::Progress;
use super::reader::{Cutting, DocumentError, Reader};
use super::source::{self, SourceFile};
use super::words;
use crate::say::say;

/// Most bytes of a document unless said otherwise.
pub const DEFAULT_MAX_DOCUMENT_BYTES: usize = 8 << 20;

/// A sample is drawn from pieces of about this many bytes, so that a few long documents neither crowd out
/// the others nor are lost.
const PIECE: usize = 64 << 10;

/// Least bytes of a sample.
pub const SMALLEST_SAMPLE: u64 = 16 * PIECE as u64;

/// Texts, and which of them are held out.
///
/// Both the tokenizer and the token files start from here, so that neither sees held-out text.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// Files, and directories of which every `.txt` and `.jsonl` file counts, packed or not. Files of other
    /// names are text.
    pub input: Vec<PathBuf>,
    /// What separates documents within a text file; without, a file is one document.
    pub separator: Option<String>,
    /// The field of a line of JSON that is its document.
    pub field: String,
    /// Most bytes of a document, or of a line of JSON: what bounds the memory.
    pub max_document_bytes: usize,
    /// The benchmark whose documents are put together again, where they are of one.
    pub detokenize: Option<Benchmark>,
    /// Leave out documents that cannot be read, with the rest of their file, and say so, instead of failing.
    pub skip_bad: bool,
    /// Files and directories as of `input`, all of which is held out, and nothing else then.
    pub validation: Vec<PathBuf>,
    /// Share of the documents that is held out where `validation` is empty. In `[0, 1)`.
    pub validation_fraction: f64,
    /// Chooses which documents those are, with their texts alone: other documents, added or gone, change nothing for
    /// a document, and one that is there twice is on one side.
    pub seed: u64,
}

impl Default for Corpus {
    fn default() -> Self {
        Self {
            input: Vec::new(),
            validation: Vec::new(),
            separator: None,
            field: "text".to_owned(),
            max_document_bytes: DEFAULT_MAX_DOCUMENT_BYTES,
            detokenize: None,
            skip_bad: false,
            validation_fraction: 0.05,
            seed: 1,
        }
    }
}

/// What a document is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// To train on.
    Train,
    /// Held out.
    Validation,
}

/// A document that is not blank.
#[derive(Clone, Debug)]
pub struct Document {
    /// What it is for.
    pub side: Side,
    /// Its text.
    pub text: String,
}

impl Corpus {
    /// All documents that are not blank, file after file.
    pub fn documents(&self) -> Result<Documents, DataError> {
        if !(0.0..1.0).contains(&self.validation_fraction) {
            return Err(DataError::Fraction(self.validation_fraction));
        }
        if self.separator.as_deref() == Some("") {
            return Err(DataError::Separator);
        }
        let detokenizer = self.detokenize.map(Detokenizer::new).transpose()?;
        let files = source::list(&self.input, &self.validation)?;
        Ok(Documents {
            progress: Progress::new(files.iter().map(|file| file.bytes).sum()),
            cutting: Cutting {
                separator: self.separator.clone(),
                field: self.field.clone(),
                limit: self.max_document_bytes,
            },
            detokenizer,
            count: files.len(),
            files: files.into_iter(),
            reader: None,
            is_validation: false,
            blank: 0,
            skip_bad: self.skip_bad,
            bad: 0,
            validation_fraction: if self.validation.is_empty() {
                self.validation_fraction
            } else {
                0.0
            },
            seed: self.seed,
        })
    }

    /// At most `limit` bytes of the documents to train on, in order; all of them where they fit.
    ///
    /// Every piece draws a number, and those with the smallest numbers stay: one pass and bounded memory
    /// give a sample that is even over the corpus and depends on the seed alone.
    pub fn sample(&self, limit: u64) -> Result<Vec<String>, DataError> {
        if limit < SMALLEST_SAMPLE {
            return Err(DataError::Sample {
                bytes: limit,
                least: SMALLEST_SAMPLE,
            });
        }
        let mut draw = ChaCha8Rng::seed_from_u64(self.seed);
        draw.set_stream(1);
        let mut kept = BinaryHeap::new();
        let (mut bytes, mut count, mut below) = (0, 0u64, u64::MAX);
        for document in self.documents()? {
            let document = document?;
            if document.side == Side::Validation {
                continue;
            }
            for piece in words::pieces(&document.text, PIECE) {
                count += 1;
                let key = draw.next_u64();
                if key >= below {
                    continue;
                }
                bytes += piece.len() as u64;
                kept.push((key, count, piece.to_owned()));
                while bytes > limit
                    && let Some((key, _, piece)) = kept.pop()
                {
                    bytes -= piece.len() as u64;
                    below = key;
                }
            }
        }
        if count == 0 {
            return Err(DataError::NoDocuments);
        }
        if kept.is_empty() {
            return Err(DataError::NoSpaces(limit));
        }
        let mut kept = kept.into_vec();
        kept.sort_unstable_by_key(|(_, place, _)| *place);
        Ok(kept.into_iter().map(|(.., piece)| piece).collect())
    }
}

/// The documents of a corpus that are not blank, each with what it is for.
pub struct Documents {
    files: vec::IntoIter<SourceFile>,
    count: usize,
    cutting: Cutting,
    detokenizer: Option<Detokenizer>,
    reader: Option<Reader>,
    /// Whether all that the reader reads is held out.
    is_validation: bool,
    blank: u64,
    skip_bad: bool,
    bad: u64,
    validation_fraction: f64,
    seed: u64,
    progress: Progress,
}

impl fmt::Debug for Documents {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Documents")
            .field("files", &self.files.as_slice())
            .finish_non_exhaustive()
    }
}

impl Documents {
    /// Files there are.
    pub fn files(&self) -> usize {
        self.count
    }

    /// A file yet to be read that lies in `folder`, which must exist.
    pub(super) fn file_in(&self, folder: &Path) -> Result<Option<&Path>, DataError> {
        let folder = fs::canonicalize(folder).map_err(DataError::read(folder))?;
        for SourceFile { path, .. } in self.files.as_slice() {
            let real = fs::canonicalize(path).map_err(DataError::read(path))?;
            if real.parent() == Some(&folder) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Blank documents left out so far.
    pub fn blank(&self) -> u64 {
        self.blank
    }

    /// Files left out so far, whole or from a document on that cannot be read.
    pub fn bad(&self) -> u64 {
        self.bad
    }

    /// The next document that is not blank.
    fn text(&mut self) -> Result<Option<String>, DocumentError> {
        loop {
            match self.text_or_bad() {
                Err(error) if self.skip_bad => {
                    self.progress.bar().suspend(|| say(&format!("left out: {error}")));
                    self.bad += 1;
                    self.reader = None;
                }
                text => return text,
            }
        }
    }

    fn text_or_bad(&mut self) -> Result<Option<String>, DocumentError> {
        loop {
            if let Some(reader) = &mut self.reader {
                for text in reader {
                    let text = text?;
                    if !text.trim().is_empty() {
                        return Ok(Some(match &self.detokenizer {
                            Some(detokenizer) => detokenizer.apply(&text),
                            None => text,
                        }));
                    }
                    self.blank += 1;
                }
            }
            let Some(file) = self.files.next() else {
                return Ok(None);
            };
            self.is_validation = file.is_validation;
            self.reader = Some(Reader::open(file, &self.cutting, self.progress.bar())?);
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document, DocumentError>;

    fn next(&mut self) -> Option<Self::Item> {
        let text = self.text().transpose()?;
        Some(text.map(|text| {
            self.progress.document(text.len() as u64);
            let side = if self.is_validation || place(self.seed, &text) < self.validation_fraction {
                Side::Validation
            } else {
                Side::Train
            };
            Document { side, text }
        }))
    }
}

/// A number in `[0, 1)` that a text has, evenly spread over texts.
fn place(seed: u64, text: &str) -> f64 {
    let digest: [u8; 32] = Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(text)
        .finalize()
        .into();
    let (first, _) = digest.split_at(4);
    let number = first
        .iter()
        .fold(0, |number, byte| (number << 8) | u32::from(*byte));
    f64::from(number) / 2f64.powi(32)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn corpus(folder: &Path, content: &str) -> Corpus {
        let path = folder.join("texts.txt");
        fs::write(&path, content).unwrap();
        Corpus {
            input: vec![path],
            separator: Some("|".to_owned()),
            validation_fraction: 0.3,
            ..Corpus::default()
        }
    }

    /// Pinned: another rule would put held-out text of yesterday into today's training.
    #[test]
    fn documents_of_a_benchmark_are_put_together_again() {
        let folder = tempfile::tempdir().unwrap();
        let corpus = Corpus {
            detokenize: Some(Benchmark::Ptb),
            ..corpus(folder.path(), "does n't|the firm 's N")
        };
        let documents = corpus.documents().unwrap();
        let texts: Vec<String> = documents.map(|document| document.unwrap().text).collect();
        assert_eq!(texts, ["doesn't", "the firm's N"]);
    }

    #[test]
    fn held_out_documents_depend_on_seed_and_text_alone() {
        let folder = tempfile::tempdir().unwrap();
        let held_out = |seed, content| -> (String, u64) {
            let corpus = Corpus {
                seed,
                ..corpus(folder.path(), content)
            };
            let mut documents = corpus.documents().unwrap();
            let text = documents
                .by_ref()
                .map(Result::unwrap)
                .filter(|document| document.side == Side::Validation)
                .map(|document| document.text)
                .collect();
            (text, documents.blank())
        };
        assert_eq!(held_out(1, "a|b| \n |c|d|e||f|g|h|i|j"), ("bfi".to_owned(), 2));
        assert_eq!(held_out(2, "a|b|c|d|e|f|g|h|i|j"), ("ag".to_owned(), 0));
        // In another order, with others before and one of them again.
        assert_eq!(held_out(1, "new|j|i|b|a|h|g|f|e|d|c|b|a"), ("ibfb".to_owned(), 0));
    }

    #[test]
    fn files_can_be_held_out_whole() {
        let folder = tempfile::tempdir().unwrap();
        let held_out = folder.path().join("held out.txt");
        fs::write(&held_out, "x|y").unwrap();
        let corpus = Corpus {
            validation: vec![held_out],
            ..corpus(folder.path(), "a|b|c|d|e|f|g|h")
        };
        let sides = corpus.documents().unwrap().map(|document| {
            let Document { side, text } = document.unwrap();
            (text, side == Side::Validation)
        });
        let (held_out, others): (Vec<_>, Vec<_>) = sides.partition(|(_, is_held_out)| *is_held_out);
        let texts = |documents: Vec<(String, bool)>| -> String {
            documents.into_iter().map(|(text, _)| text).collect()
        };
        assert_eq!(
            (texts(held_out), texts(others)),
            ("xy".to_owned(), "abcdefgh".to_owned())
        );
    }

    #[test]
    fn samples_are_bounded_even_and_whole_where_they_fit() {
        let folder = tempfile::tempdir().unwrap();
        let words: String = (0..700_000).map(|i| format!("{i} ")).collect();
        let parts: Vec<&str> = words
            .as_bytes()
            .chunks(50_000)
            .map(|part| str::from_utf8(part).unwrap())
            .collect();
        let corpus = Corpus {
            validation_fraction: 0.0,
            ..corpus(folder.path(), &parts.join("|"))
        };
        assert_eq!(corpus.sample(1 << 30).unwrap().concat(), words);

        let limit = 2 << 20;
        let sample = corpus.sample(limit).unwrap();
        assert_eq!(sample, corpus.sample(limit).unwrap());
        let bytes = sample.iter().map(|piece| piece.len() as u64).sum::<u64>();
        assert!(bytes <= limit && bytes > limit - 2 * PIECE as u64, "{bytes}");
        let places: Vec<usize> = sample
            .iter()
            .map(|piece| words.find(piece.as_str()).unwrap())
            .collect();
        assert!(places.is_sorted());
        let late = places.iter().filter(|place| **place > words.len() / 2).count();
        assert!(
            (places.len() / 4..=3 * places.len() / 4).contains(&late),
            "{late} of {}",
            places.len()
        );
    }

    #[test]
    fn bad_files_are_left_out_where_one_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let files: [(&str, &[u8]); 4] = [
            ("a.txt", b"one"),
            ("b.txt", b"\xff"),
            ("c.jsonl", b"{\"text\": \"two\"}\n{\n{\"text\": \"after\"}\n"),
            ("d.txt", b"three"),
        ];
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let corpus = Corpus {
            input: vec![folder.path().to_owned()],
            validation_fraction: 0.0,
            ..Corpus::default()
        };
        let first = corpus.documents().unwrap().find_map(Result::err).unwrap();
        assert!(first.to_string().contains("b.txt:1: is not UTF-8"), "{first}");
        let corpus = Corpus {
            skip_bad: true,
            ..corpus
        };
        let mut documents = corpus.documents().unwrap();
        let texts: Vec<String> = documents
            .by_ref()
            .map(|document| document.unwrap().text)
            .collect();
        assert_eq!(
            (texts, documents.bad()),
            (["one", "two", "three"].map(str::to_owned).to_vec(), 2)
        );
    }

    #[test]
    fn nonsense_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let good = corpus(folder.path(), "x");
        let says = |corpus: Corpus| format!("{:#}", corpus.documents().map(drop).unwrap_err());
        let fraction = Corpus {
            validation_fraction: 1.0,
            ..good.clone()
        };
        assert!(says(fraction).contains("fraction is 1"));
        let separator = Corpus {
            separator: Some(String::new()),
            ..good.clone()
        };
        assert!(says(separator).contains("separator is empty"));
        assert!(good.sample(100).unwrap_err().to_string().contains("100 bytes"));
        let blank = corpus(folder.path(), " | ");
        assert!(
            blank
                .sample(1 << 20)
                .unwrap_err()
                .to_string()
                .contains("no document")
        );
    }
}
