//! Which documents there are, for every command that reads text.

use std::path::PathBuf;

use clap::Args;
use training::data::{Benchmark, Corpus, DEFAULT_MAX_DOCUMENT_BYTES};

/// Which documents there are, and which are held out. `tokenizer` and `prepare` must be given the same.
#[derive(Debug, Args)]
pub(super) struct CorpusArguments {
    /// Files of text or, where they end in .jsonl, of a JSON object per line; either may be packed (.gz,
    /// .zst). Of a directory, all .txt and .jsonl files below it, packed or not, sorted by name.
    #[arg(required = true, value_name = "FILE|DIR")]
    input: Vec<PathBuf>,
    /// What separates documents within a file of text, where \n, \r, \t and \\ are what they are in most languages;
    /// without, a file is one document.
    #[arg(long, value_name = "TEXT", value_parser = separator)]
    separator: Option<String>,
    /// The field of a JSON object that holds the document.
    #[arg(long, value_name = "NAME", default_value = "text")]
    field: String,
    /// Most bytes of a document, or of a line of JSON, which is what bounds the memory. A byte-level tokenizer
    /// needs some 10 bytes for each of them, other tokenizers some 130.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_DOCUMENT_BYTES)]
    max_document_bytes: usize,
    /// Put the text of a benchmark, which has spaces around its signs, together again, as published bounds have it.
    #[arg(long, value_enum, value_name = "BENCHMARK")]
    detokenize: Option<Benchmark>,
    /// Leave out documents that cannot be read (not UTF-8, too long, no JSON), with the rest of their file, instead of
    /// stopping at the first.
    #[arg(long)]
    skip_bad: bool,
    /// Files and directories, of the same kinds, that are held out, and nothing else then; may be given several times.
    #[arg(long, value_name = "FILE|DIR")]
    validation: Vec<PathBuf>,
    /// Share of the documents that is held out, where --validation names none.
    #[arg(long, value_name = "X", default_value_t = 0.05, conflicts_with = "validation")]
    validation_fraction: f64,
    /// Chooses which documents those are, together with their text: whatever is added or taken away, a document stays
    /// on its side, and so does each that is the same.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Text with its escapes resolved: shells hand them on as they are.
fn separator(text: &str) -> Result<String, String> {
    let mut resolved = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        resolved.push(match character {
            '\\' => match characters.next() {
                Some('n') => '\n',
                Some('r') => '\r',
                Some('t') => '\t',
                Some('\\') => '\\',
                _ => return Err("a \\ must be followed by n, r, t or another \\".to_owned()),
            },
            character => character,
        });
    }
    Ok(resolved)
}

impl From<CorpusArguments> for Corpus {
    fn from(arguments: CorpusArguments) -> Self {
        let CorpusArguments {
            input,
            separator,
            field,
            max_document_bytes,
            detokenize,
            skip_bad,
            validation,
            validation_fraction,
            seed,
        } = arguments;
        Self {
            input,
            validation,
            separator,
            field,
            max_document_bytes,
            detokenize,
            skip_bad,
            validation_fraction,
            seed,
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::separator;

    #[test]
    fn escapes_of_a_separator_are_resolved() {
        for (text, is) in [
            ("\n\n", "\n\n"),
            (r"\n\n", "\n\n"),
            (r"-\t\r\\n-", "-\t\r\\n-"),
            ("", ""),
        ] {
            assert_eq!(separator(text).unwrap(), is, "{text}");
        }
        assert!(separator(r"\x").is_err() && separator("\\").is_err());
    }
}
