//! Why text does not become tokens.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::reader::DocumentError;
use super::token_file::TokenFileError;
use super::token_writer::TokenWriterError;

/// Why text does not become tokens.
#[derive(Debug, Error)]
pub enum DataError {
    /// A file cannot be read.
    #[error("{}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {error}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another process writes a file.
    #[error("{}: another process writes it", .0.display())]
    Busy(PathBuf),
    /// What a folder is given for is written there.
    #[error("{} lies in {}, which is for what prepare writes", file.display(), folder.display())]
    Within {
        /// A file of the text.
        file: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// The share of text that is held out is none.
    #[error("validation fraction is {0}, must be at least 0 and below 1")]
    Fraction(f64),
    /// Documents cannot be told from each other.
    #[error("the separator is empty; without one, a file is one document")]
    Separator,
    /// A folder without text.
    #[error("{} holds no .txt or .jsonl file, packed (.gz, .zst) or not", .0.display())]
    NoFiles(PathBuf),
    /// A file counts twice.
    #[error("{} is given twice", .0.display())]
    Twice(PathBuf),
    /// A document cannot be read.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// All documents are blank, or held out.
    #[error("there is no document to train on")]
    NoDocuments,
    /// The sample that a tokenizer is made of is too small.
    #[error("the sample is {bytes} bytes, must be at least {least}")]
    Sample {
        /// Its bytes.
        bytes: u64,
        /// The fewest bytes that will do.
        least: u64,
    },
    /// Nothing can be cut into samples.
    #[error("text without spaces is longer than the sample of {0} bytes")]
    NoSpaces(u64),
    /// A vocabulary without room for all bytes.
    #[error("vocabulary size is {size}, at least {least} (all bytes) are needed")]
    Vocabulary {
        /// Its tokens.
        size: usize,
        /// The fewest tokens that will do.
        least: usize,
    },
    /// The tokenizer does not do what is asked of it.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A `tokenizer.json` cannot be used.
    #[error("{}: {reason}", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The tokenizer has no such token.
    #[error("the tokenizer has no token {end:?} to end documents with (--end-token): {others}")]
    NoEnd {
        /// The token.
        end: String,
        /// Which it has.
        others: String,
    },
    /// A folder cannot be looked through.
    #[error(transparent)]
    Folder(#[from] walkdir::Error),
    /// Words cannot be told from each other.
    #[error(transparent)]
    Words(#[from] regex::Error),
    /// Token files cannot be written.
    #[error("cannot write token files into {}: {error}", folder.display())]
    Tokens {
        /// Their folder.
        folder: PathBuf,
        /// Why.
        error: TokenWriterError,
    },
    /// A token file cannot be used.
    #[error(transparent)]
    TokenFile(#[from] TokenFileError),
    /// There are too few tokens to train on.
    #[error("the training data has {tokens} tokens, at least two sequences of {length} are needed")]
    Short {
        /// Tokens of the file.
        tokens: usize,
        /// Tokens of a sequence.
        length: usize,
    },
}

impl DataError {
    /// That `path` cannot be read.
    pub(super) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Read { path, error }
    }

    /// That `path` cannot be written.
    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Write { path, error }
    }

    /// The same, of the tokenizer in `path` where a tokenizer says it.
    pub(super) fn of_tokenizer(self, path: &Path) -> Self {
        let Self::Tokenizer(reason) = self else {
            return self;
        };
        let path = path.to_owned();
        Self::TokenizerFile { path, reason }
    }

    /// What a tokenizer has to say.
    pub(super) fn tokenizer(error: impl std::fmt::Display) -> Self {
        Self::Tokenizer(error.to_string())
    }
}
