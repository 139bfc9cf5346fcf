//! Text to packed token files, and token files to training sequences.
//!
//! [`Corpus`] lists files (`source`), reads them as a stream of documents (`reader`) and says which are held
//! out; [`prepare`] turns that stream into tokens (`encoder`) and writes them ([`TokenWriter`]) where nobody
//! sees them before they are complete ([`Partial`]). [`TokenFile`] maps the result into memory and describes
//! its layout; [`batches`] take sequences from it in the order of a run, and a [`mixture`] from several.
//!
//! Nothing here grows with the corpus: what is held is one document, at most of the permitted size, and a
//! cache of words.

pub mod batches;
mod corpus;
mod detokenize;
mod encoder;
mod error;
pub mod mixture;
mod partial;
mod prepare;
mod progress;
mod reader;
mod source;
mod token_file;
mod token_writer;
pub mod tokenizer;
mod words;

pub use corpus::{Corpus, DEFAULT_MAX_DOCUMENT_BYTES, Document, Documents, SMALLEST_SAMPLE, Side};
pub use detokenize::{Benchmark, Detokenizer};
pub use error::DataError;
pub use partial::Partial;
pub use prepare::{Prepared, SideStatistics, Statistics, prepare};
pub use reader::{DocumentError, DocumentProblem};
pub use token_file::{Preparation, TokenFile, TokenFileError, TokenFileProblem};
pub use token_writer::{TokenWriter, TokenWriterError};
