//! Text to packed token files, and token files to training sequences.
//!
//! A token file is little-endian:
//!
//! ```text
//! 8 bytes   magic "dnstok01"
//! u32       vocabulary size (without mask)
//! u32       end-of-document token
//! u64       number of tokens N
//! u64       bytes of text that they encode
//! 64 bytes  sha256 of tokenizer.json, hexadecimal
//! N x u16   tokens (N x u32 when the vocabulary does not fit)
//! ```
//!
//! Documents follow one another, each ended by the end-of-document token.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use denoised::diffusion::Token;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use thiserror::Error;
use tokenizers::Tokenizer;

use crate::tokenizer::END_OF_DOCUMENT;

const MAGIC: &[u8; 8] = b"dnstok01";

/// A token file that cannot be read.
#[derive(Debug, Error)]
#[error("{path}: {problem}", path = path.display())]
pub struct TokenFileError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: TokenFileProblem,
}

/// What is wrong with a token file.
#[derive(Debug, Error)]
pub enum TokenFileProblem {
    /// The file system said no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It does not begin as token files do.
    #[error("is not a token file; `training prepare` writes them")]
    Foreign,
    /// It is shorter or longer than its header says.
    #[error("is truncated: its header promises {promised} tokens, it holds {held}")]
    Length {
        /// Tokens the header counts.
        promised: u64,
        /// Tokens there are.
        held: usize,
    },
    /// A token that its vocabulary does not have.
    #[error("is corrupt: token {token} is not below the vocabulary size {vocab_size}")]
    Token {
        /// The token.
        token: Token,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
}

/// A packed token file, in memory.
#[derive(Clone, Debug)]
pub struct TokenFile {
    vocab_size: usize,
    end_of_document: Token,
    bytes: u64,
    tokenizer_sha256: String,
    tokens: Vec<Token>,
}

impl TokenFile {
    /// Reads the file at `path`.
    pub fn open(path: &Path) -> Result<Self, TokenFileError> {
        let read = || Self::parse(&fs::read(path)?);
        read().map_err(|problem| TokenFileError {
            path: path.to_owned(),
            problem,
        })
    }

    fn parse(raw: &[u8]) -> Result<Self, TokenFileProblem> {
        let (magic, rest) = field::<8>(raw)?;
        if &magic != MAGIC {
            return Err(TokenFileProblem::Foreign);
        }
        let (vocab_size, rest) = field(rest)?;
        let (end_of_document, rest) = field(rest)?;
        let (count, rest) = field(rest)?;
        let (bytes, rest) = field(rest)?;
        let (tokenizer_sha256, body) = field::<64>(rest)?;
        let vocab_size = u32::from_le_bytes(vocab_size) as usize;
        let end_of_document = u32::from_le_bytes(end_of_document);
        let promised = u64::from_le_bytes(count);
        let width = token_width(vocab_size);
        if Some(body.len() as u64) != promised.checked_mul(width as u64) {
            return Err(TokenFileProblem::Length {
                promised,
                held: body.len() / width,
            });
        }
        let little_endian = |bytes: &[u8]| {
            bytes
                .iter()
                .rev()
                .fold(0, |token, byte| (token << 8) | Token::from(*byte))
        };
        let tokens: Vec<Token> = body.chunks_exact(width).map(little_endian).collect();
        let foreign = |token: &&Token| **token as usize >= vocab_size;
        if let Some(&token) = tokens.iter().chain([&end_of_document]).find(foreign) {
            return Err(TokenFileProblem::Token { token, vocab_size });
        }
        Ok(Self {
            vocab_size,
            end_of_document,
            bytes: u64::from_le_bytes(bytes),
            tokenizer_sha256: String::from_utf8_lossy(&tokenizer_sha256).into_owned(),
            tokens,
        })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Number of whole sequences of `length` tokens.
    pub fn sequences(&self, length: usize) -> usize {
        self.tokens.len() / length
    }

    /// Sequence `index` of those.
    ///
    /// # Panics
    /// When `index` is not below [`Self::sequences`].
    pub fn sequence(&self, index: usize, length: usize) -> Vec<Token> {
        self.tokens[index * length..(index + 1) * length].to_vec()
    }

    /// Size of the vocabulary, without mask.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends documents.
    pub fn end_of_document(&self) -> Token {
        self.end_of_document
    }

    /// sha256 of the tokenizer that made this file.
    pub fn tokenizer_sha256(&self) -> &str {
        &self.tokenizer_sha256
    }

    /// Bytes of text that all tokens encode; document ends count as none.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of text that the first `tokens` tokens encode under the `tokenizer` that made this file.
    pub fn bytes_of_first(&self, tokens: usize, tokenizer: &Tokenizer) -> anyhow::Result<u64> {
        let rest = self.tokens.get(tokens..).unwrap_or_default();
        let mut bytes = 0;
        for &token in rest.iter().filter(|token| **token != self.end_of_document) {
            let text = tokenizer
                .id_to_token(token)
                .ok_or_else(|| anyhow!("the tokenizer has no token {token}"))?;
            // Each character of a byte-level token stands for one byte. Decoded text would not do: where
            // the cut goes through a character, it has a replacement of another length.
            bytes += text.chars().count() as u64;
        }
        Ok(self.bytes.saturating_sub(bytes))
    }

    fn encode(documents: &[String], tokenizer: &Tokenizer, sha256: &str) -> anyhow::Result<Self> {
        let end_of_document = tokenizer
            .token_to_id(END_OF_DOCUMENT)
            .ok_or_else(|| anyhow!("the tokenizer has no token {END_OF_DOCUMENT}"))?;
        let mut tokens = Vec::new();
        for document in documents {
            let encoding = tokenizer
                .encode_fast(document.as_str(), false)
                .map_err(|e| anyhow!("tokenizer: {e}"))?;
            tokens.extend(encoding.get_ids());
            tokens.push(end_of_document);
        }
        Ok(Self {
            vocab_size: tokenizer.get_vocab_size(true),
            end_of_document,
            bytes: documents.iter().map(|d| d.len() as u64).sum(),
            tokenizer_sha256: sha256.to_owned(),
            tokens,
        })
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let partial = path.with_extension("partial");
        let mut out =
            BufWriter::new(fs::File::create(&partial).with_context(|| partial.display().to_string())?);
        out.write_all(MAGIC)?;
        out.write_all(&(self.vocab_size as u32).to_le_bytes())?;
        out.write_all(&self.end_of_document.to_le_bytes())?;
        out.write_all(&(self.tokens.len() as u64).to_le_bytes())?;
        out.write_all(&self.bytes.to_le_bytes())?;
        out.write_all(self.tokenizer_sha256.as_bytes())?;
        for token in &self.tokens {
            out.write_all(&token.to_le_bytes()[..token_width(self.vocab_size)])?;
        }
        out.flush()?;
        fs::rename(&partial, path).with_context(|| path.display().to_string())
    }
}

/// The first `N` bytes, and what follows them.
fn field<const N: usize>(raw: &[u8]) -> Result<([u8; N], &[u8]), TokenFileProblem> {
    raw.split_first_chunk()
        .map(|(field, rest)| (*field, rest))
        .ok_or(TokenFileProblem::Foreign)
}

fn token_width(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Texts, and which of them are held out.
///
/// Both the tokenizer and the token files start from here, so that neither sees held-out text.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// Text files.
    pub input: Vec<PathBuf>,
    /// What separates documents within a file; without, a file is one document.
    pub separator: Option<String>,
    /// Share of the documents that is held out. In `[0, 1)`.
    pub validation_fraction: f64,
    /// Chooses which documents those are.
    pub seed: u64,
}

/// Documents in the order of their files, each to train on or held out.
#[derive(Clone, Debug, Default)]
pub struct Documents {
    /// To train on.
    pub train: Vec<String>,
    /// Held out.
    pub validation: Vec<String>,
}

impl Corpus {
    /// Reads all documents that are not blank.
    pub fn read(&self) -> anyhow::Result<Documents> {
        if !(0.0..1.0).contains(&self.validation_fraction) {
            bail!(
                "validation fraction is {}, must be at least 0 and below 1",
                self.validation_fraction
            );
        }
        let mut choose = ChaCha8Rng::seed_from_u64(self.seed);
        let mut documents = Documents::default();
        for path in &self.input {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let parts: Vec<&str> = match &self.separator {
                Some(separator) => text.split(separator.as_str()).collect(),
                None => vec![text.as_str()],
            };
            for document in parts.into_iter().filter(|d| !d.trim().is_empty()) {
                let held_out = f64::from(choose.next_u32()) / 2f64.powi(32) < self.validation_fraction;
                let side = if held_out {
                    &mut documents.validation
                } else {
                    &mut documents.train
                };
                side.push(document.to_owned());
            }
        }
        Ok(documents)
    }
}

/// Writes `train.tokens`, `validation.tokens` and the texts that they encode (`train.txt`,
/// `validation.txt`) into `out`; returns both token files.
pub fn prepare(corpus: &Corpus, tokenizer: &Path, out: &Path) -> anyhow::Result<(TokenFile, TokenFile)> {
    let json = fs::read(tokenizer).with_context(|| tokenizer.display().to_string())?;
    let model = Tokenizer::from_bytes(&json).map_err(|e| anyhow!("{}: {e}", tokenizer.display()))?;
    let sha256 = denoised::bundle::sha256(&json);
    let documents = corpus.read()?;
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let pack = |name: &str, documents: &[String]| -> anyhow::Result<TokenFile> {
        let file =
            TokenFile::encode(documents, &model, &sha256).with_context(|| tokenizer.display().to_string())?;
        file.write(&out.join(format!("{name}.tokens")))?;
        fs::write(out.join(format!("{name}.txt")), documents.concat())?;
        Ok(file)
    };
    Ok((
        pack("train", &documents.train)?,
        pack("validation", &documents.validation)?,
    ))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn prepared(folder: &Path) -> (TokenFile, TokenFile) {
        let input: Vec<PathBuf> = (0..40)
            .map(|i| {
                let path = folder.join(format!("{i}.txt"));
                fs::write(
                    &path,
                    format!("document {i} says: the cat sat on the mat.\n\u{1F431} "),
                )
                .unwrap();
                path
            })
            .collect();
        let tokenizer = folder.join("tokenizer.json");
        let corpus = Corpus {
            input,
            separator: None,
            validation_fraction: 0.2,
            seed: 3,
        };
        let text = corpus.read().unwrap().train;
        crate::tokenizer::train(&text, 280)
            .unwrap()
            .save(&tokenizer, false)
            .unwrap();
        prepare(&corpus, &tokenizer, &folder.join("out")).unwrap()
    }

    #[test]
    fn files_come_back_and_documents_are_split_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (train, validation) = prepared(folder.path());
        let read = TokenFile::open(&folder.path().join("out/train.tokens")).unwrap();
        assert_eq!(read.tokens, train.tokens);
        assert_eq!(read.bytes(), train.bytes());
        let ends = |file: &TokenFile| {
            file.tokens
                .iter()
                .filter(|t| **t == file.end_of_document())
                .count()
        };
        assert_eq!(ends(&train) + ends(&validation), 40);
        assert!(ends(&validation) > 0);
        let text = fs::read_to_string(folder.path().join("out/validation.txt")).unwrap();
        assert_eq!(text.len() as u64, validation.bytes());
        let tokenizer = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        // However the cut falls, through a character too.
        for cut in 0..=validation.tokens() {
            let bytes = validation.bytes_of_first(cut, &tokenizer).unwrap() as usize;
            if let Some(text) = text.get(..bytes) {
                assert_eq!(tokenizer.decode(&validation.tokens[..cut], true).unwrap(), text);
            }
        }
    }

    #[test]
    fn truncated_and_foreign_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        prepared(folder.path());
        let path = folder.path().join("out/train.tokens");
        let raw = fs::read(&path).unwrap();
        for (bytes, says) in [
            (&raw[..raw.len() - 3], "truncated"),
            (&raw[..50], "not a token file"),
            (b"text", "not a token file"),
        ] {
            assert!(TokenFile::parse(bytes).unwrap_err().to_string().contains(says));
        }
        let mut corrupt = raw.clone();
        let last = corrupt.len() - 1;
        corrupt[last] = 0xff;
        assert!(
            TokenFile::parse(&corrupt)
                .unwrap_err()
                .to_string()
                .contains("corrupt")
        );
    }
}
