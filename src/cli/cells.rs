//! A canvas as characters on a terminal: how each one looks, and where lines break.

use std::ops::Range;

use unicode_width::UnicodeWidthChar;

use crate::server::MASKED;

/// How a character looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Clamped, or there already in the frame before.
    Plain,
    /// Still masked.
    Masked,
    /// Masked in the frame before.
    Fresh,
}

/// A character and its look.
pub(super) type Cell = (char, Look);

/// The characters of `text`, seen after `before`.
pub(super) fn cells(text: &str, before: &str) -> Vec<Cell> {
    let filled = filled(text, before).unwrap_or_default();
    let look = |at: usize, c: char| match c {
        MASKED => Look::Masked,
        _ if filled.iter().any(|range| range.contains(&at)) => Look::Fresh,
        _ => Look::Plain,
    };
    text.char_indices().map(|(at, c)| (c, look(at, c))).collect()
}

/// The bytes of `text` that stand where `before` was masked.
///
/// Every stretch of masks is followed by text that was there before and must be there still. Frames
/// carry no place of a token in the text, so this can be ambiguous; where the number of masks says
/// that the first match is not the right one, the answer is `None` and nothing is marked.
fn filled(text: &str, before: &str) -> Option<Vec<Range<usize>>> {
    let first = &before[..before.find(MASKED)?];
    let mut rest = &before[first.len()..];
    let mut at = first.len();
    if !text.starts_with(first) {
        return None;
    }
    let mut ranges = Vec::new();
    while !rest.is_empty() {
        let (masks, after) = rest.split_at(rest.find(|c| c != MASKED).unwrap_or(rest.len()));
        let (kept, next) = after.split_at(after.find(MASKED).unwrap_or(after.len()));
        let end = if next.is_empty() {
            at + text[at..].strip_suffix(kept)?.len()
        } else {
            at + text[at..].find(kept)?
        };
        let now = &text[at..end];
        let (was, is) = (masks.chars().count(), now.matches(MASKED).count());
        if is > was || (is == was && now != masks) {
            return None;
        }
        ranges.push(at..end);
        at = end + kept.len();
        rest = next;
    }
    Some(ranges)
}

/// Lines of at most `columns` columns; control characters, which could move the cursor, become spaces.
pub(super) fn wrap(cells: &[Cell], columns: usize) -> Vec<Vec<Cell>> {
    let mut lines = vec![Vec::new()];
    let mut used = 0;
    for &(c, look) in cells {
        let c = if c.is_control() && c != '\n' { ' ' } else { c };
        let width = c.width().unwrap_or(0);
        if c == '\n' || used + width > columns {
            lines.push(Vec::new());
            used = 0;
        }
        if let Some(line) = lines.last_mut().filter(|_| c != '\n') {
            line.push((c, look));
            used += width;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Plain characters as they are, fresh ones in capitals.
    fn shown(before: &str, text: &str) -> String {
        let show = |(c, look): Cell| match look {
            Look::Fresh => c.to_ascii_uppercase(),
            Look::Plain | Look::Masked => c,
        };
        cells(text, before).into_iter().map(show).collect()
    }

    #[test]
    fn what_was_masked_is_fresh() {
        for (before, text, wanted) in [
            ("a░░ b", "axy░ b", "aXY░ b"),
            ("a░░ b", "axyz b", "aXYZ b"),
            ("░ b ░", "x b ░", "X b ░"),
            ("░ b ░", "░ b y", "░ b Y"),
            ("░░", "xy", "XY"),
            // Nothing was masked, or all of it still is.
            ("ab", "ab", "ab"),
            ("", "░░", "░░"),
            ("a░", "a░", "a░"),
        ] {
            assert_eq!(shown(before, text), wanted, "{before} -> {text}");
        }
    }

    #[test]
    fn nothing_is_marked_where_the_place_is_in_doubt() {
        for (before, text) in [
            // The first `a` is new, the kept one comes later: the masks do not add up.
            ("░░a░░", "man░a░░"),
            // The text before the masks has changed: a character was made of several tokens.
            ("\u{fffd}░", "\u{e9}x"),
        ] {
            assert_eq!(shown(before, text), text, "{before} -> {text}");
        }
    }

    fn wrapped(text: &str, columns: usize) -> Vec<String> {
        let lines = wrap(&cells(text, ""), columns);
        lines
            .iter()
            .map(|line| line.iter().map(|(c, _)| c).collect())
            .collect()
    }

    #[test]
    fn long_lines_wrap_and_control_characters_cannot_escape() {
        assert_eq!(
            wrapped("abcdefghij\u{1b}[2J\n\nk", 8),
            ["abcdefgh", "ij [2J", "", "k"]
        );
        assert_eq!(wrapped("", 8), [""]);
    }

    #[test]
    fn lines_are_measured_in_columns() {
        assert_eq!(wrapped("漢字漢字漢", 8), ["漢字漢字", "漢"]);
        assert_eq!(wrapped("a漢字漢字", 8), ["a漢字漢", "字"]);
        // An accent of its own takes no column.
        assert_eq!(wrapped("abcdefge\u{301}h", 8), ["abcdefge\u{301}", "h"]);
    }

    proptest! {
        #[test]
        fn any_two_texts_can_follow_each_other(before in "[ab░é]{0,12}", text in "[ab░é]{0,12}") {
            let marked: String = cells(&text, &before).iter().map(|(c, _)| c).collect();
            prop_assert_eq!(marked, text);
        }

        #[test]
        fn wrapping_loses_nothing(text in "[a-z漢░\n ]{0,40}", columns in 2usize..9) {
            let joined: String = wrapped(&text, columns).concat();
            prop_assert_eq!(joined, text.replace('\n', ""));
        }
    }
}
