//! Writes a token file, document by document.

use std::io::{self, BufWriter, IntoInnerError, Seek, SeekFrom, Write};

use denoised::diffusion::Token;
use thiserror::Error;

use super::token_file::{Header, Preparation};

/// Bytes that are written at a time.
const BUFFER: usize = 1 << 20;

/// Tokens that are turned into bytes at a time.
const PART: usize = 1 << 14;

/// A token file that is being written. Nothing reads as one before [`Self::finish`].
#[derive(Debug)]
pub struct TokenWriter<W: Write + Seek> {
    out: BufWriter<W>,
    header: Header,
    crc: crc32fast::Hasher,
    /// Tokens as bytes, on their way.
    part: Vec<u8>,
}

/// Why tokens cannot be written.
#[derive(Debug, Error)]
pub enum TokenWriterError {
    /// The file takes them not.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The tokenizer gives a number that is none of its vocabulary's.
    #[error("token {token} is not below the vocabulary size {size}: the tokenizer's numbers have holes")]
    Token {
        /// The number.
        token: Token,
        /// Tokens of the vocabulary.
        size: u32,
    },
    /// The vocabulary is too large for a token file.
    #[error("a vocabulary of {0} tokens does not fit 32 bits")]
    Vocabulary(usize),
    /// What should be the hash of a tokenizer is none.
    #[error("{0:?} is no hexadecimal sha256")]
    Sha256(String),
}

impl<W: Write + Seek> TokenWriter<W> {
    /// Begins a file in `out` for the tokenizer with this vocabulary and sha256 (hexadecimal).
    pub fn new(
        out: W,
        vocab_size: usize,
        end_of_document: Token,
        tokenizer_sha256: &str,
    ) -> Result<Self, TokenWriterError> {
        let header = Header {
            vocab_size: u32::try_from(vocab_size).map_err(|_| TokenWriterError::Vocabulary(vocab_size))?,
            end_of_document,
            tokens: 0,
            documents: 0,
            bytes: 0,
            tokenizer_sha256: tokenizer_sha256.to_owned(),
            preparation: [0; 32],
            crc: 0,
        };
        if tokenizer_sha256.len() != 64 {
            return Err(TokenWriterError::Sha256(tokenizer_sha256.to_owned()));
        }
        let mut out = BufWriter::with_capacity(BUFFER, out);
        // The counts are known at the end.
        out.write_all(&vec![0; header.to_bytes().len()])?;
        Ok(Self {
            out,
            header,
            crc: crc32fast::Hasher::new(),
            part: Vec::new(),
        })
    }

    /// Adds a document of these tokens, without its end, and of so many bytes of text.
    pub fn document(&mut self, tokens: &[Token], bytes: usize) -> Result<(), TokenWriterError> {
        let width = self.header.width();
        for part in tokens
            .chunks(PART)
            .chain([[self.header.end_of_document].as_slice()])
        {
            self.part.clear();
            for &token in part {
                if token >= self.header.vocab_size {
                    let size = self.header.vocab_size;
                    return Err(TokenWriterError::Token { token, size });
                }
                self.part.extend(&token.to_le_bytes()[..width]);
            }
            self.crc.update(&self.part);
            self.out.write_all(&self.part)?;
        }
        self.header.tokens += tokens.len() as u64 + 1;
        self.header.documents += 1;
        self.header.bytes += bytes as u64;
        Ok(())
    }

    /// CRC-32 of the tokens so far.
    pub fn crc(&self) -> u32 {
        self.crc.clone().finalize()
    }

    /// Completes the file, one of those of a preparation.
    pub fn finish(mut self, preparation: Preparation) -> Result<W, TokenWriterError> {
        self.header.crc = self.crc();
        self.header.preparation = preparation;
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&self.header.to_bytes())?;
        self.out.seek(SeekFrom::End(0))?;
        Ok(self.out.into_inner().map_err(IntoInnerError::into_error)?)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use std::io::{self, Cursor, ErrorKind};

    /// A disk with room for so many bytes.
    struct Disk {
        written: Cursor<Vec<u8>>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let end = self.written.position() as usize + bytes.len();
            if end > self.room {
                return Err(ErrorKind::StorageFull.into());
            }
            self.written.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Disk {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.written.seek(to)
        }
    }

    fn write(room: usize, documents: usize) -> Result<Vec<u8>, TokenWriterError> {
        let disk = Disk {
            written: Cursor::default(),
            room,
        };
        let mut writer = TokenWriter::new(disk, 100, 0, &"0".repeat(64))?;
        for _ in 0..documents {
            writer.document(&[1; 999], 2000)?;
        }
        Ok(writer.finish([0; 32])?.written.into_inner())
    }

    #[test]
    fn a_full_disk_is_an_error_wherever_it_fills_up() {
        // More than the buffer holds, and less.
        for documents in [1000, 3] {
            let length = write(usize::MAX, documents).unwrap().len();
            assert_eq!(length, 144 + documents * 2000);
            for room in [0, 100, length / 2, length - 1] {
                let error = write(room, documents).unwrap_err();
                assert!(
                    matches!(&error, TokenWriterError::Io(error) if error.kind() == ErrorKind::StorageFull),
                    "room for {room} of {length}: {error}"
                );
            }
            write(length, documents).unwrap();
        }
    }

    #[test]
    fn tokens_beyond_the_vocabulary_are_refused() {
        let mut writer = TokenWriter::new(Cursor::new(Vec::new()), 100, 0, &"0".repeat(64)).unwrap();
        let error = writer.document(&[5, 100], 3).unwrap_err().to_string();
        assert!(
            error.contains("token 100") && error.contains("size 100"),
            "{error}"
        );
    }
}
