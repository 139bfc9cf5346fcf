//! Documents to token files, as a stream.

use std::fs;
use std::io::{BufWriter, IntoInnerError, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use denoised::diffusion::Token;
use sha2::{Digest, Sha256};

use super::corpus::{Corpus, Side};
use super::encoder::Encoder;
use super::error::DataError;
use super::partial::Partial;
use super::token_file::{Preparation, TokenFile};
use super::token_writer::{TokenWriter, TokenWriterError};

/// What [`prepare`] wrote.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// To train on.
    pub train: TokenFile,
    /// Held out.
    pub validation: TokenFile,
    /// What was counted on the way.
    pub statistics: Statistics,
}

/// What is known of a corpus once it is prepared.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Files read.
    pub files: usize,
    /// Blank documents, which are left out.
    pub blank: u64,
    /// Files left out, whole or from a document on that cannot be read.
    pub bad: u64,
    /// Of the documents to train on.
    pub train: SideStatistics,
    /// Of those held out.
    pub validation: SideStatistics,
    /// How long all of it took.
    pub elapsed: Duration,
}

/// What is known of one side of the split.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideStatistics {
    /// Documents.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Their tokens, an end for each included.
    pub tokens: u64,
    /// Tokens that stand for something the tokenizer does not know.
    pub unknown: u64,
    /// Tokens of the longest.
    pub longest: u64,
}

impl SideStatistics {
    /// Bytes that a token stands for, on average.
    pub fn bytes_per_token(&self) -> f64 {
        self.bytes as f64 / self.tokens.max(1) as f64
    }

    /// Share of the tokens that the tokenizer does not know.
    pub fn unknown_share(&self) -> f64 {
        self.unknown as f64 / self.tokens.max(1) as f64
    }
}

impl Statistics {
    /// Text per second, in megabytes.
    pub fn megabytes_per_second(&self) -> f64 {
        (self.train.bytes + self.validation.bytes) as f64 / 1e6 / self.elapsed.as_secs_f64()
    }
}

/// The two files of one side, unfinished.
struct Output {
    tokens: TokenWriter<Partial>,
    text: BufWriter<Partial>,
    statistics: SideStatistics,
}

impl Output {
    fn create(folder: &Path, name: &str, encoder: &Encoder) -> Result<Self, DataError> {
        let tokens = Partial::create(&folder.join(format!("{name}.tokens")))?;
        let text = Partial::create(&folder.join(format!("{name}.txt")))?;
        Ok(Self {
            tokens: TokenWriter::new(
                tokens,
                encoder.vocab_size,
                encoder.end_of_document,
                &encoder.sha256,
            )
            .map_err(cannot_write(folder))?,
            text: BufWriter::new(text),
            statistics: SideStatistics::default(),
        })
    }

    fn document(
        &mut self,
        text: &str,
        tokens: &[Token],
        unknown: Option<Token>,
    ) -> Result<(), TokenWriterError> {
        self.tokens.document(tokens, text.len())?;
        self.text.write_all(text.as_bytes())?;
        let of_document = tokens.len() as u64;
        let counts = &mut self.statistics;
        counts.documents += 1;
        counts.bytes += text.len() as u64;
        counts.tokens += of_document + 1;
        counts.longest = counts.longest.max(of_document);
        if let Some(unknown) = unknown {
            counts.unknown += tokens.iter().filter(|token| **token == unknown).count() as u64;
        }
        Ok(())
    }

    fn finish(self, preparation: Preparation) -> Result<([Partial; 2], SideStatistics), TokenWriterError> {
        let text = self.text.into_inner().map_err(IntoInnerError::into_error)?;
        Ok(([text, self.tokens.finish(preparation)?], self.statistics))
    }
}

/// That token files cannot be written into `folder`.
fn cannot_write(folder: &Path) -> impl Fn(TokenWriterError) -> DataError {
    let folder = folder.to_owned();
    move |error| DataError::Tokens {
        folder: folder.clone(),
        error,
    }
}

/// What `train` and `validation` have in common: what they hold, and what decided which of them has it.
fn preparation(corpus: &Corpus, encoder: &Encoder, train: &Output, validation: &Output) -> Preparation {
    let mut digest = Sha256::new_with_prefix(&encoder.sha256);
    digest.update(corpus.seed.to_le_bytes());
    digest.update(corpus.validation_fraction.to_le_bytes());
    for Output {
        tokens, statistics, ..
    } in [train, validation]
    {
        digest.update(tokens.crc().to_le_bytes());
        digest.update(statistics.tokens.to_le_bytes());
        digest.update(statistics.bytes.to_le_bytes());
    }
    digest.finalize().into()
}

/// Writes `train.tokens`, `validation.tokens` and the texts that they encode (`train.txt`,
/// `validation.txt`) into `out`. Where that fails, what was there before stays; where the process ends between one
/// file and the next, the token files do not fit each other and are refused.
///
/// Every document is followed by the token `end` of the tokenizer.
pub fn prepare(corpus: &Corpus, tokenizer: &Path, end: &str, out: &Path) -> Result<Prepared, DataError> {
    let start = Instant::now();
    let mut encoder = Encoder::open(tokenizer, end)?;
    let mut documents = corpus.documents()?;
    fs::create_dir_all(out).map_err(DataError::write(out))?;
    // The next time, the texts that are written there would be read as well, held-out ones among them.
    if let Some(file) = documents.file_in(out)? {
        return Err(DataError::Within {
            file: file.to_owned(),
            folder: out.to_owned(),
        });
    }
    let mut train = Output::create(out, "train", &encoder)?;
    let mut validation = Output::create(out, "validation", &encoder)?;
    let mut tokens = Vec::new();
    for document in documents.by_ref() {
        let document = document?;
        tokens.clear();
        encoder
            .encode(&document.text, &mut tokens)
            .map_err(|error| error.of_tokenizer(tokenizer))?;
        let output = match document.side {
            Side::Train => &mut train,
            Side::Validation => &mut validation,
        };
        output
            .document(&document.text, &tokens, encoder.unknown)
            .map_err(cannot_write(out))?;
    }
    let preparation = preparation(corpus, &encoder, &train, &validation);
    let (train_files, train) = train.finish(preparation).map_err(cannot_write(out))?;
    let (validation_files, validation) = validation.finish(preparation).map_err(cannot_write(out))?;
    if train.documents == 0 {
        return Err(DataError::NoDocuments);
    }
    Partial::complete_all(train_files.into_iter().chain(validation_files).collect())?;
    Ok(Prepared {
        train: TokenFile::open(&out.join("train.tokens"))?,
        validation: TokenFile::open(&out.join("validation.tokens"))?,
        statistics: Statistics {
            files: documents.files(),
            blank: documents.blank(),
            bad: documents.bad(),
            train,
            validation,
            elapsed: start.elapsed(),
        },
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::data::tokenizer::END_OF_DOCUMENT;
    use std::path::PathBuf;
    use tokenizers::Tokenizer;

    const SEPARATOR: &str = "\n<>\n";

    fn texts() -> Vec<String> {
        let text = |i: u32| format!("document {i} says: \"the cat sat on the mat\".\n  \u{1F431} ");
        (0..40).map(|i| text(i).repeat(i as usize % 5 + 1)).collect()
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(text).unwrap();
        packed.finish().unwrap()
    }

    /// Ten documents in each of four files, and a tokenizer.
    fn corpus(folder: &Path) -> (Corpus, PathBuf) {
        let texts = texts();
        let lines = |texts: &[String]| -> String {
            let line = |text| format!("{}\n", serde_json::json!({"id": 7, "body": text}));
            texts.iter().map(line).collect()
        };
        let input = folder.join("texts");
        fs::create_dir(&input).unwrap();
        let write = |name: &str, content: &[u8]| fs::write(input.join(name), content).unwrap();
        write("1.txt", texts[..10].join(SEPARATOR).as_bytes());
        write("2.jsonl", lines(&texts[10..20]).as_bytes());
        write("3.txt.gz", &gzip(texts[20..30].join(SEPARATOR).as_bytes()));
        write(
            "4.jsonl.zst",
            &zstd::encode_all(lines(&texts[30..]).as_bytes(), 3).unwrap(),
        );
        let tokenizer = folder.join("tokenizer.json");
        crate::data::tokenizer::train(&texts, 280)
            .unwrap()
            .save(&tokenizer, false)
            .unwrap();
        let corpus = Corpus {
            input: vec![input],
            separator: Some(SEPARATOR.to_owned()),
            field: "body".to_owned(),
            validation_fraction: 0.2,
            seed: 3,
            ..Corpus::default()
        };
        (corpus, tokenizer)
    }

    /// The documents of a token file, as text.
    fn decoded(file: &TokenFile, tokenizer: &Tokenizer) -> Vec<String> {
        let tokens = file.range(0..file.tokens());
        let parts = tokens.split_inclusive(|token| *token == file.end_of_document());
        parts
            .map(|part| tokenizer.decode(&part[..part.len() - 1], false).unwrap())
            .collect()
    }

    #[test]
    fn all_formats_give_the_tokens_that_memory_gives() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, path) = corpus(folder.path());
        let out = folder.path().join("out");
        let Prepared {
            train,
            validation,
            statistics,
        } = prepare(&corpus, &path, END_OF_DOCUMENT, &out).unwrap();
        let tokenizer = Tokenizer::from_file(&path).unwrap();

        // Every document whole, on one side, and in order.
        let (learned, held_out) = (decoded(&train, &tokenizer), decoded(&validation, &tokenizer));
        let (mut learn, mut hold) = (learned.iter().peekable(), held_out.iter().peekable());
        for text in texts() {
            assert!(learn.next_if_eq(&&text).is_some() != hold.next_if_eq(&&text).is_some());
        }
        assert!(learn.next().is_none() && hold.next().is_none());
        assert!((3..20).contains(&held_out.len()));

        let sides = [
            ("train", &train, &statistics.train, &learned),
            ("validation", &validation, &statistics.validation, &held_out),
        ];
        for (name, file, counts, texts) in sides {
            let encode = |text: &String| {
                let encoding = tokenizer.encode_fast(text.as_str(), false).unwrap();
                [encoding.get_ids(), &[file.end_of_document()]].concat()
            };
            let expected: Vec<Vec<Token>> = texts.iter().map(encode).collect();
            assert_eq!(file.range(0..file.tokens()), expected.concat());
            file.check_tokenizer(&path, &fs::read(&path).unwrap()).unwrap();
            let text = fs::read_to_string(out.join(name).with_extension("txt")).unwrap();
            assert_eq!(text, texts.concat());
            let expected = SideStatistics {
                documents: texts.len() as u64,
                bytes: text.len() as u64,
                tokens: file.tokens() as u64,
                unknown: 0,
                longest: expected
                    .iter()
                    .map(|tokens| tokens.len() as u64 - 1)
                    .max()
                    .unwrap(),
            };
            assert_eq!(*counts, expected);
            assert_eq!((file.documents(), file.bytes()), (counts.documents, counts.bytes));
        }
        assert_eq!((statistics.files, statistics.blank), (4, 0));
    }

    #[test]
    fn halves_of_two_preparations_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, path) = corpus(folder.path());
        let prepared = |name: &str, corpus: &Corpus| {
            prepare(corpus, &path, END_OF_DOCUMENT, &folder.path().join(name)).unwrap()
        };
        let one = prepared("one", &corpus);
        let same = prepared("same", &corpus);
        same.validation.check_preparation(&one.train).unwrap();
        let other = prepared("other", &Corpus { seed: 4, ..corpus });
        let error = other
            .validation
            .check_preparation(&one.train)
            .unwrap_err()
            .to_string();
        for says in [
            "other/validation.tokens",
            "one/train.tokens",
            "another preparation",
        ] {
            assert!(error.contains(says), "{error}");
        }
    }

    /// However a file is cut into sequences, through a character too.
    #[test]
    fn bytes_of_any_beginning_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, path) = corpus(folder.path());
        let out = folder.path().join("out");
        let file = prepare(&corpus, &path, END_OF_DOCUMENT, &out).unwrap().validation;
        let tokenizer = Tokenizer::from_file(&path).unwrap();
        let text = fs::read_to_string(out.join("validation.txt")).unwrap();
        for cut in 0..=file.tokens() {
            let bytes = file.bytes_of_first(cut, &tokenizer).unwrap() as usize;
            if let Some(text) = text.get(..bytes) {
                assert_eq!(tokenizer.decode(&file.range(0..cut), true).unwrap(), text);
            }
        }
    }

    #[test]
    fn what_fails_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let (corpus, path) = corpus(folder.path());
        let out = folder.path().join("out");
        let before = prepare(&corpus, &path, END_OF_DOCUMENT, &out).unwrap();
        let refused = |corpus: &Corpus, says: &str| {
            let error = format!("{:#}", prepare(corpus, &path, END_OF_DOCUMENT, &out).unwrap_err());
            assert!(error.contains(says), "{error}");
            assert_eq!(fs::read_dir(&out).unwrap().count(), 4, "partial files are left");
            let after = TokenFile::open(&out.join("train.tokens")).unwrap();
            let all = 0..after.tokens();
            assert_eq!(after.range(all.clone()), before.train.range(all));
        };
        // Found once most of the corpus is written.
        let broken = corpus.input[0].join("5.txt.gz");
        fs::write(&broken, &gzip(b"cut off")[..15]).unwrap();
        refused(&corpus, "5.txt.gz:1: cannot be read");
        fs::remove_file(&broken).unwrap();
        let too_long = Corpus {
            max_document_bytes: 100,
            ..corpus.clone()
        };
        refused(&too_long, "1.txt:8: begins a document of more than 100 bytes");
        let blank = folder.path().join("blank.txt");
        fs::write(&blank, " \n").unwrap();
        let nothing = Corpus {
            input: vec![blank],
            ..corpus.clone()
        };
        refused(&nothing, "no document to train on");
        let own = Corpus {
            input: vec![out.clone()],
            ..corpus.clone()
        };
        refused(&own, "train.txt lies in ");
        // Nothing is replaced where the last file cannot be.
        let text = out.join("validation.txt");
        fs::remove_file(&text).unwrap();
        fs::create_dir(&text).unwrap();
        let other = Corpus { seed: 4, ..corpus };
        refused(&other, "validation.txt");
    }
}
