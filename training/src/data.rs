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
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use denoised::diffusion::Token;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tokenizers::Tokenizer;

use crate::tokenizer::END_OF_DOCUMENT;

const MAGIC: &[u8; 8] = b"dnstok01";
const HEADER: usize = 8 + 4 + 4 + 8 + 8 + 64;

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
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let raw = fs::read(path).with_context(|| path.display().to_string())?;
        Self::parse(&raw).with_context(|| path.display().to_string())
    }

    fn parse(raw: &[u8]) -> anyhow::Result<Self> {
        let Some((header, body)) = raw.split_at_checked(HEADER).filter(|(header, _)| header.starts_with(MAGIC))
        else {
            bail!("is not a token file; `training prepare` writes them");
        };
        let u32_at = |at: usize| -> anyhow::Result<u32> { Ok(u32::from_le_bytes(header[at..at + 4].try_into()?)) };
        let u64_at = |at: usize| -> anyhow::Result<u64> { Ok(u64::from_le_bytes(header[at..at + 8].try_into()?)) };
        let (vocab_size, count) = (u32_at(8)? as usize, u64_at(16)?);
        let width = token_width(vocab_size);
        if Some(body.len() as u64) != count.checked_mul(width as u64) {
            bail!("is truncated: its header promises {count} tokens, it holds {}", body.len() / width);
        }
        let tokens: Vec<Token> = body
            .chunks_exact(width)
            .map(|c| if width == 2 { u32::from(u16::from_le_bytes([c[0], c[1]])) } else { u32::from_le_bytes([c[0], c[1], c[2], c[3]]) })
            .collect();
        if let Some(token) = tokens.iter().find(|t| **t as usize >= vocab_size) {
            bail!("is corrupt: token {token} is not below the vocabulary size {vocab_size}");
        }
        Ok(Self {
            vocab_size,
            end_of_document: u32_at(12)?,
            bytes: u64_at(24)?,
            tokenizer_sha256: String::from_utf8(header[32..96].to_vec())?,
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

    /// Bytes of text that the first `tokens` tokens encode, exact if `tokenizer` is byte-level.
    pub fn bytes_of_first(&self, tokens: usize, tokenizer: &Tokenizer) -> anyhow::Result<u64> {
        if tokens >= self.tokens.len() {
            return Ok(self.bytes);
        }
        // The rest is short (less than a sequence): decode that.
        let rest = tokenizer.decode(&self.tokens[tokens..], true).map_err(|e| anyhow!("tokenizer: {e}"))?;
        Ok(self.bytes - (rest.len() as u64).min(self.bytes))
    }

    fn encode(documents: &[String], tokenizer: &Tokenizer, sha256: &str) -> anyhow::Result<Self> {
        let end_of_document = tokenizer
            .token_to_id(END_OF_DOCUMENT)
            .ok_or_else(|| anyhow!("the tokenizer has no token {END_OF_DOCUMENT}"))?;
        let mut tokens = Vec::new();
        for document in documents {
            let encoding = tokenizer.encode_fast(document.as_str(), false).map_err(|e| anyhow!("tokenizer: {e}"))?;
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
        let mut out = BufWriter::new(fs::File::create(&partial).with_context(|| partial.display().to_string())?);
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
            bail!("validation fraction is {}, must be at least 0 and below 1", self.validation_fraction);
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
                let side = if held_out { &mut documents.validation } else { &mut documents.train };
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
        let file = TokenFile::encode(documents, &model, &sha256)
            .with_context(|| tokenizer.display().to_string())?;
        file.write(&out.join(format!("{name}.tokens")))?;
        fs::write(out.join(format!("{name}.txt")), documents.concat())?;
        Ok(file)
    };
    Ok((pack("train", &documents.train)?, pack("validation", &documents.validation)?))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn prepared(folder: &Path) -> (TokenFile, TokenFile) {
        let input: Vec<PathBuf> = (0..40)
            .map(|i| {
                let path = folder.join(format!("{i}.txt"));
                fs::write(&path, format!("document {i} says: the cat sat on the mat.\n\u{1F431} ")).unwrap();
                path
            })
            .collect();
        let tokenizer = folder.join("tokenizer.json");
        let corpus = Corpus { input, separator: None, validation_fraction: 0.2, seed: 3 };
        let text = corpus.read().unwrap().train;
        crate::tokenizer::train(&text, 280).unwrap().save(&tokenizer, false).unwrap();
        prepare(&corpus, &tokenizer, &folder.join("out")).unwrap()
    }

    #[test]
    fn files_come_back_and_documents_are_split_whole() {
        let folder = tempfile::tempdir().unwrap();
        let (train, validation) = prepared(folder.path());
        let read = TokenFile::open(&folder.path().join("out/train.tokens")).unwrap();
        assert_eq!(read.tokens, train.tokens);
        assert_eq!(read.bytes(), train.bytes());
        let ends = |file: &TokenFile| file.tokens.iter().filter(|t| **t == file.end_of_document()).count();
        assert_eq!(ends(&train) + ends(&validation), 40);
        assert!(ends(&validation) > 0);
        let text = fs::read_to_string(folder.path().join("out/validation.txt")).unwrap();
        assert_eq!(text.len() as u64, validation.bytes());
        let tokenizer = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        let whole = validation.sequences(16) * 16;
        let decoded = tokenizer.decode(&validation.tokens[..whole], true).unwrap();
        assert_eq!(validation.bytes_of_first(whole, &tokenizer).unwrap(), decoded.len() as u64);
    }

    #[test]
    fn truncated_and_foreign_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        prepared(folder.path());
        let path = folder.path().join("out/train.tokens");
        let raw = fs::read(&path).unwrap();
        for (bytes, says) in [(&raw[..raw.len() - 3], "truncated"), (&raw[..50], "not a token file"), (b"text", "not a token file")] {
            assert!(TokenFile::parse(bytes).unwrap_err().to_string().contains(says));
        }
        let mut corrupt = raw.clone();
        let last = corrupt.len() - 1;
        corrupt[last] = 0xff;
        assert!(TokenFile::parse(&corrupt).unwrap_err().to_string().contains("corrupt"));
    }
}
