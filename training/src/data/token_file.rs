//! A packed token file, mapped into memory. It is little-endian:
//!
//! ```text
//! 8 bytes   magic "dnstok03", the last two the version
//! u32       vocabulary size V (without mask)
//! u32       end-of-document token
//! u64       number of tokens N
//! u64       number of documents
//! u64       bytes of text that they encode
//! 64 bytes  sha256 of tokenizer.json, hexadecimal
//! 32 bytes  the preparation: what both files of one have in common, and no file of another
//! u32       CRC-32 of the tokens
//! u32       CRC-32 of everything before
//! N x u16   tokens (N x u32 when V is above 65536)
//! ```
//!
//! Documents follow one another, each ended by the end-of-document token, which nothing else becomes.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use denoised::diffusion::Token;
use memmap2::Mmap;
use thiserror::Error;
use tokenizers::Tokenizer;

use super::error::DataError;
use super::tokenizer::bytes_of;

const MAGIC: &[u8; 8] = b"dnstok03";
/// What the magics of all versions begin with.
const FAMILY: &[u8] = b"dnstok";
/// Length of a header; a multiple of a token's, so that tokens lie aligned.
const HEADER: usize = 144;
/// Bytes that are checked at a time.
const CHUNK: usize = 1 << 20;

/// A token file that cannot be used.
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
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It does not begin as token files do.
    #[error("is not a token file; `training prepare` writes them")]
    Foreign,
    /// It is of another version.
    #[error("is a token file of version {found}, not 03; `training prepare` writes it anew")]
    Version {
        /// Its version.
        found: String,
    },
    /// Its header is cut off, or not as it was written.
    #[error("is damaged: its header is incomplete or altered; `training prepare` writes it anew")]
    Header,
    /// It is shorter or longer than its header says.
    #[error(
        "is {}: its header promises {promised} tokens, it holds {held}; `training prepare` writes it anew",
        if held < promised { "truncated" } else { "damaged" }
    )]
    Length {
        /// Tokens the header counts.
        promised: u64,
        /// Tokens there are.
        held: u64,
    },
    /// Its tokens are not those that were written.
    #[error("is damaged: its tokens do not have their checksum; `training prepare` writes it anew")]
    Checksum,
    /// Another tokenizer made it.
    #[error(
        "was made with another tokenizer (sha256 {made_with}) than {tokenizer}; \
         `training prepare` makes tokens anew",
        tokenizer = tokenizer.display()
    )]
    Tokenizer {
        /// The tokenizer that is to decode it.
        tokenizer: PathBuf,
        /// sha256 of the one that made it.
        made_with: String,
    },
    /// It is not the other half of a file that it is to be used with.
    #[error(
        "comes of another preparation than {other}, so that one can hold text of the other; `training prepare` writes \
         both",
        other = other.display()
    )]
    Preparation {
        /// The other file.
        other: PathBuf,
    },
}

/// What the files that were written together have in common: a digest of what they hold and how it was chosen.
pub type Preparation = [u8; 32];

/// What a token file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) vocab_size: u32,
    pub(super) end_of_document: Token,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    pub(super) bytes: u64,
    pub(super) tokenizer_sha256: String,
    pub(super) preparation: Preparation,
    pub(super) crc: u32,
}

impl Header {
    /// Bytes of a token.
    pub(super) fn width(&self) -> usize {
        if self.vocab_size <= 1 << 16 { 2 } else { 4 }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.vocab_size.to_le_bytes());
        bytes.extend(self.end_of_document.to_le_bytes());
        for count in [self.tokens, self.documents, self.bytes] {
            bytes.extend(count.to_le_bytes());
        }
        bytes.extend(self.tokenizer_sha256.as_bytes());
        bytes.extend(self.preparation);
        bytes.extend(self.crc.to_le_bytes());
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER);
        bytes
    }

    fn parse(raw: &[u8]) -> Result<Self, TokenFileProblem> {
        let (magic, mut rest) = raw.split_first_chunk::<8>().ok_or(TokenFileProblem::Foreign)?;
        if magic != MAGIC {
            return Err(match magic.strip_prefix(FAMILY) {
                Some(version) => TokenFileProblem::Version {
                    found: String::from_utf8_lossy(version).into_owned(),
                },
                None => TokenFileProblem::Foreign,
            });
        }
        if raw.len() != HEADER || crc32fast::hash(&raw[..HEADER - 4]).to_le_bytes() != raw[HEADER - 4..] {
            return Err(TokenFileProblem::Header);
        }
        let header = Self {
            vocab_size: u32::from_le_bytes(field(&mut rest)?),
            end_of_document: u32::from_le_bytes(field(&mut rest)?),
            tokens: u64::from_le_bytes(field(&mut rest)?),
            documents: u64::from_le_bytes(field(&mut rest)?),
            bytes: u64::from_le_bytes(field(&mut rest)?),
            tokenizer_sha256: String::from_utf8_lossy(&field::<64>(&mut rest)?).into_owned(),
            preparation: field(&mut rest)?,
            crc: u32::from_le_bytes(field(&mut rest)?),
        };
        if header.end_of_document >= header.vocab_size {
            return Err(TokenFileProblem::Header);
        }
        Ok(header)
    }
}

/// Takes `N` bytes off the front.
fn field<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TokenFileProblem> {
    let (field, after) = rest.split_first_chunk().ok_or(TokenFileProblem::Header)?;
    *rest = after;
    Ok(*field)
}

/// A packed token file. Its tokens are read from disk as they are needed; a clone shares them.
#[derive(Clone, Debug)]
pub struct TokenFile {
    path: PathBuf,
    header: Header,
    map: Arc<Mmap>,
}

impl TokenFile {
    /// Opens the file at `path`, all of which is checked.
    pub fn open(path: &Path) -> Result<Self, TokenFileError> {
        Self::map(path).map_err(|problem| TokenFileError {
            path: path.to_owned(),
            problem,
        })
    }

    fn map(path: &Path) -> Result<Self, TokenFileProblem> {
        let mut file = File::open(path)?;
        let mut raw = Vec::with_capacity(HEADER);
        file.by_ref().take(HEADER as u64).read_to_end(&mut raw)?;
        let header = Header::parse(&raw)?;
        let held = file.metadata()?.len() - HEADER as u64;
        let width = header.width() as u64;
        if header.tokens.checked_mul(width) != Some(held) {
            return Err(TokenFileProblem::Length {
                promised: header.tokens,
                held: held / width,
            });
        }
        // Read, not mapped: a disk that fails is an error here, where it would be a signal there.
        let (mut crc, mut chunk) = (crc32fast::Hasher::new(), vec![0; CHUNK]);
        loop {
            let read = file.read(&mut chunk)?;
            if read == 0 {
                break;
            }
            crc.update(&chunk[..read]);
        }
        if crc.finalize() != header.crc {
            return Err(TokenFileProblem::Checksum);
        }
        #[expect(unsafe_code, reason = "a file can be mapped in no other way")]
        // SAFETY: the map is read only, as plain bytes, of which any value will do. Nobody changes the file
        // under it: token files are written under another name and renamed, which leaves a file that is
        // mapped as it was.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self {
            path: path.to_owned(),
            header,
            map: Arc::new(map),
        })
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.header.tokens as usize
    }

    /// Number of documents.
    pub fn documents(&self) -> u64 {
        self.header.documents
    }

    /// Number of whole sequences of `length` tokens.
    pub fn sequences(&self, length: usize) -> usize {
        self.tokens() / length
    }

    /// Sequence `index` of those.
    ///
    /// # Panics
    /// When `index` is not below [`Self::sequences`].
    pub fn sequence(&self, index: usize, length: usize) -> Vec<Token> {
        self.range(index * length..(index + 1) * length)
    }

    /// At most `most` of those, from all over the file.
    pub fn spread(&self, length: usize, most: usize) -> Vec<Vec<Token>> {
        let count = self.sequences(length);
        let kept = count.min(most);
        (0..kept)
            .map(|index| self.sequence(index * count / kept, length))
            .collect()
    }

    /// The tokens in `range`.
    ///
    /// # Panics
    /// When it ends after the last one.
    pub fn range(&self, range: Range<usize>) -> Vec<Token> {
        let width = self.header.width();
        self.map[HEADER + range.start * width..HEADER + range.end * width]
            .chunks_exact(width)
            .map(little_endian)
            .collect()
    }

    /// Size of the vocabulary, without mask.
    pub fn vocab_size(&self) -> usize {
        self.header.vocab_size as usize
    }

    /// The token that ends documents.
    pub fn end_of_document(&self) -> Token {
        self.header.end_of_document
    }

    /// sha256 of the tokenizer that made this file.
    pub fn tokenizer_sha256(&self) -> &str {
        &self.header.tokenizer_sha256
    }

    /// An error unless `json`, the content of `tokenizer`, is the tokenizer that made this file.
    pub fn check_tokenizer(&self, tokenizer: &Path, json: &[u8]) -> Result<(), TokenFileError> {
        if denoised::bundle::sha256(json) == self.header.tokenizer_sha256 {
            return Ok(());
        }
        Err(TokenFileError {
            path: self.path.clone(),
            problem: TokenFileProblem::Tokenizer {
                tokenizer: tokenizer.to_owned(),
                made_with: self.header.tokenizer_sha256.clone(),
            },
        })
    }

    /// An error unless this file and the `other` were written together.
    pub fn check_preparation(&self, other: &Self) -> Result<(), TokenFileError> {
        if self.header.preparation == other.header.preparation {
            return Ok(());
        }
        Err(TokenFileError {
            path: self.path.clone(),
            problem: TokenFileProblem::Preparation {
                other: other.path.clone(),
            },
        })
    }

    /// Bytes of text that all tokens encode; document ends count as none.
    pub fn bytes(&self) -> u64 {
        self.header.bytes
    }

    /// Bytes of text that the first `tokens` tokens encode under the `tokenizer` that made this file.
    pub fn bytes_of_first(&self, tokens: usize, tokenizer: &Tokenizer) -> Result<u64, DataError> {
        let width = self.header.width();
        let rest = self.map.get(HEADER + tokens * width..).unwrap_or_default();
        let mut bytes = 0;
        for token in rest.chunks_exact(width).map(little_endian) {
            if token == self.end_of_document() {
                continue;
            }
            let text = tokenizer
                .id_to_token(token)
                .ok_or_else(|| DataError::Tokenizer(format!("it has no token {token}")))?;
            bytes += bytes_of(tokenizer, &text) as u64;
        }
        Ok(self.bytes().saturating_sub(bytes))
    }
}

fn little_endian(bytes: &[u8]) -> Token {
    bytes
        .iter()
        .rev()
        .fold(0, |token, byte| (token << 8) | Token::from(*byte))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::token_writer::TokenWriter;
    use super::*;
    use std::fs;
    use std::io::Cursor;

    fn written(vocab_size: usize) -> Vec<u8> {
        let mut writer = TokenWriter::new(Cursor::new(Vec::new()), vocab_size, 0, &"ab".repeat(32)).unwrap();
        writer.document(&[7, 8, 9], 11).unwrap();
        writer.document(&[vocab_size as Token - 1], 2).unwrap();
        writer.finish([0; 32]).unwrap().into_inner()
    }

    fn open(content: &[u8]) -> Result<TokenFile, TokenFileError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tokens");
        fs::write(&path, content).unwrap();
        TokenFile::open(&path)
    }

    #[test]
    fn what_was_written_comes_back() {
        for vocab_size in [10, 1 << 16, (1 << 16) + 1, 1 << 20] {
            let raw = written(vocab_size);
            let width = if vocab_size <= 1 << 16 { 2 } else { 4 };
            assert_eq!(raw.len(), HEADER + 6 * width);
            let file = open(&raw).unwrap();
            assert_eq!(file.vocab_size(), vocab_size);
            assert_eq!(file.end_of_document(), 0);
            assert_eq!(file.documents(), 2);
            assert_eq!(file.bytes(), 13);
            assert_eq!(file.tokenizer_sha256(), "ab".repeat(32));
            let last = vocab_size as Token - 1;
            assert_eq!(file.range(0..file.tokens()), [7, 8, 9, 0, last, 0]);
            assert_eq!(file.sequences(4), 1);
            assert_eq!(file.sequence(1, 2), [9, 0]);
        }
        let empty = TokenWriter::new(Cursor::new(Vec::new()), 10, 0, &"ab".repeat(32)).unwrap();
        assert_eq!(
            open(&empty.finish([0; 32]).unwrap().into_inner())
                .unwrap()
                .tokens(),
            0
        );
    }

    /// Wherever a file is cut, and whichever byte is altered.
    #[test]
    fn damaged_files_are_refused() {
        let raw = written(1 << 20);
        for length in 0..raw.len() {
            let error = open(&raw[..length]).unwrap_err().to_string();
            let says = match length {
                0..8 => "is not a token file",
                8..HEADER => "is damaged: its header",
                _ => "is truncated: its header promises 6 tokens",
            };
            assert!(
                error.contains(says) && error.contains("x.tokens: "),
                "{length}: {error}"
            );
        }
        for place in 0..raw.len() {
            let mut raw = raw.clone();
            raw[place] ^= 0x10;
            let problem = open(&raw).unwrap_err().problem;
            let named = match place {
                0..6 => matches!(problem, TokenFileProblem::Foreign),
                6..8 => matches!(problem, TokenFileProblem::Version { .. }),
                8..HEADER => matches!(problem, TokenFileProblem::Header),
                _ => matches!(problem, TokenFileProblem::Checksum),
            };
            assert!(named, "{place}: {problem}");
        }
        let longer = [raw.as_slice(), &[0; 4]].concat();
        let error = open(&longer).unwrap_err().to_string();
        assert!(
            error.contains("is damaged: its header promises 6 tokens, it holds 7"),
            "{error}"
        );
        let error = open(b"dnstok01 and so on").unwrap_err().to_string();
        assert!(
            error.contains("version 01") && error.contains("prepare"),
            "{error}"
        );
    }

    #[test]
    fn another_tokenizer_is_named() {
        let file = open(&written(10)).unwrap();
        let error = file
            .check_tokenizer(Path::new("mine.json"), b"{}")
            .unwrap_err()
            .to_string();
        for says in ["x.tokens", "mine.json", "abab"] {
            assert!(error.contains(says), "{error}");
        }
    }
}
