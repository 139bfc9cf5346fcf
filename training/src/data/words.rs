//! Where text can be cut so that a byte-level tokenizer does not notice.

use std::iter;

use regex::Regex;

/// What GPT-2's tokenizer, and every tokenizer made like it, takes for a word, except that whitespace is
/// looked at in [`words`]: `\s+(?!\S)` leaves its last character to the word behind it.
const WORD: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

/// The pattern for [`words`].
pub(super) fn pattern() -> Result<Regex, regex::Error> {
    Regex::new(WORD)
}

/// The words of `text`, spaces included: joined, they are the text.
///
/// A tokenizer takes each of them, alone, for a single word again.
pub(super) fn words<'t>(pattern: &Regex, text: &'t str) -> impl Iterator<Item = &'t str> {
    let mut start = 0;
    iter::from_fn(move || {
        let found = pattern.find_at(text, start)?;
        debug_assert_eq!(found.start(), start, "every character begins some word");
        let word = found.as_str();
        let mut end = found.end();
        if let Some(last) = word.chars().next_back()
            && last.is_whitespace()
            && word.len() > last.len_utf8()
            && end < text.len()
        {
            end -= last.len_utf8();
        }
        let word = &text[start..end];
        start = end;
        Some(word)
    })
}

/// `text` in pieces of `size` bytes or somewhat more, cut where words begin: before whitespace that follows
/// something else. Where there is no such place, a piece is as long as it takes.
pub(super) fn pieces(text: &str, size: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = cut_after(rest, size).unwrap_or(rest.len());
        let (piece, after) = rest.split_at(end);
        rest = after;
        Some(piece)
    })
}

fn cut_after(text: &str, size: usize) -> Option<usize> {
    let mut from = text.ceil_char_boundary(size);
    loop {
        let space = from + text[from..].find(char::is_whitespace)?;
        let before = text[..space].chars().next_back();
        if before.is_some_and(|before| !before.is_whitespace()) {
            return Some(space);
        }
        from = space + text[space..].chars().next().map_or(1, char::len_utf8);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    /// As `tokenizers` itself cuts.
    fn expected(text: &str) -> Vec<&str> {
        let mut cut = PreTokenizedString::from(text);
        ByteLevel::default()
            .add_prefix_space(false)
            .pre_tokenize(&mut cut)
            .unwrap();
        cut.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| &text[start..end])
            .collect()
    }

    #[test]
    fn whitespace_before_a_word_leaves_it_one_character() {
        let pattern = pattern().unwrap();
        let cut = |text| words(&pattern, text).collect::<Vec<_>>();
        assert_eq!(
            cut("it's   a\n\n test "),
            ["it", "'s", "  ", " a", "\n\n", " test", " "]
        );
        assert_eq!(cut("\n"), ["\n"]);
        assert_eq!(
            cut("a\nb\u{3000}\u{3000}c"),
            ["a", "\n", "b", "\u{3000}", "\u{3000}", "c"]
        );
    }

    proptest! {
        #[test]
        fn words_are_those_of_tokenizers(
            text in "([ \t\r\n\u{a0}\u{3000}]{0,3}('s|'ll|'S|''|[a-zA-Z\u{e9}\u{4e2d}\u{301}]{1,3}|[0-9\u{b2}]{1,2}|[.!?<|_\u{1F431}]{1,3}|\\PC)){0,12}[ \n]{0,3}"
        ) {
            let pattern = pattern().unwrap();
            let words: Vec<&str> = words(&pattern, &text).collect();
            prop_assert_eq!(&words, &expected(&text));
            for word in words {
                prop_assert_eq!(expected(word), [word]);
            }
        }

        #[test]
        fn words_of_pieces_are_those_of_the_whole(text in "([ \n\u{3000}]{0,3}[a'\u{e9}1!]{0,4}){0,20}", size in 0usize..9) {
            let pieces: Vec<&str> = pieces(&text, size).collect();
            prop_assert_eq!(pieces.concat(), text.as_str());
            for piece in pieces.iter().rev().skip(1) {
                prop_assert!(piece.len() >= size);
            }
            let pattern = pattern().unwrap();
            let cut: Vec<&str> = pieces.into_iter().flat_map(|piece| words(&pattern, piece)).collect();
            prop_assert_eq!(cut, words(&pattern, &text).collect::<Vec<_>>());
        }
    }
}
