//! Where lines break: between words, and in the same places while tokens come, so that nothing jumps that is being read.

use std::collections::BTreeSet;

use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use unicode_width::UnicodeWidthChar;

use super::canvas::{Held, Position};

/// How a mask looks: as wide as most tokens are, so that lines need no more room when they are filled.
const MASK: &str = " ░░░░";
/// Log-probabilities above which a token was sure, and above which it was likely: one in two, one in eight.
const SURE: f32 = -0.693;
const LIKELY: f32 = -2.079;

/// How positions look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looks {
    Coloured,
    Plain,
}

impl Looks {
    /// What the environment wants (no-color.org: any value but the empty one).
    pub(super) fn wanted() -> Self {
        if std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) {
            Self::Coloured
        } else {
            Self::Plain
        }
    }

    /// How `position` looks after `step` steps.
    pub(super) fn of(self, position: &Position, step: u32) -> Style {
        let style = Style::new();
        match position.held {
            _ if self == Self::Plain => style,
            Held::Masked => style.add_modifier(Modifier::DIM),
            Held::Given => style,
            Held::Drawn {
                step: drawn,
                log_probability,
            } => {
                let colour = if log_probability >= SURE {
                    Color::Green
                } else if log_probability >= LIKELY {
                    Color::Yellow
                } else {
                    Color::Red
                };
                let style = style.fg(colour);
                if drawn == step {
                    style.add_modifier(Modifier::BOLD)
                } else {
                    style
                }
            }
        }
    }
}

/// The places where the lines of a canvas begin.
#[derive(Debug, Default)]
pub(super) struct Layout {
    columns: usize,
    length: usize,
    starts: BTreeSet<usize>,
}

/// Text that no line breaks: a word, of one position or more.
#[derive(Debug, Default)]
struct Word {
    /// Its first position.
    first: usize,
    pieces: Vec<(String, Style)>,
    /// Whether a line ends after it, whatever its length.
    ends_line: bool,
}

impl Word {
    fn width(&self) -> usize {
        self.pieces.iter().map(|(text, _)| width(text)).sum()
    }

    /// Leaves out the space that it begins with.
    fn trim(&mut self) {
        if let Some((text, _)) = self.pieces.first_mut() {
            *text = text.trim_start().to_owned();
        }
    }
}

fn width(text: &str) -> usize {
    text.chars().map(|c| c.width().unwrap_or(0)).sum()
}

impl Layout {
    /// Lines of at most `columns` columns, of `positions` that look as `style` says. Control characters, which could
    /// move the cursor, become spaces.
    pub(super) fn lines(
        &mut self,
        positions: &[Position],
        columns: usize,
        style: impl Fn(usize, &Position) -> Style,
    ) -> Vec<Line<'static>> {
        if (self.columns, self.length) != (columns, positions.len()) {
            *self = Self {
                columns,
                length: positions.len(),
                starts: BTreeSet::new(),
            };
        }
        let (mut lines, mut used) = (vec![Vec::new()], 0);
        // Whether the line is there because the one before it was too long.
        let mut is_rest = false;
        for mut word in words(positions, style) {
            let overflows = used + word.width() > columns;
            let mut begins = self.starts.contains(&word.first);
            if begins && is_rest && used < columns / 2 && !overflows {
                // A rest of a few words would stand alone.
                self.starts.remove(&word.first);
                begins = false;
            }
            if used > 0 && (begins || overflows) {
                is_rest = !begins;
                self.starts.insert(word.first);
                lines.push(Vec::new());
                used = 0;
                word.trim();
            }
            for (text, style) in &word.pieces {
                for piece in pieces(text, used, columns) {
                    match piece {
                        Piece::Here(text) => {
                            used += width(&text);
                            push(&mut lines, text, *style);
                        }
                        Piece::Below(text) => {
                            used = width(&text);
                            lines.push(Vec::new());
                            push(&mut lines, text, *style);
                        }
                    }
                }
            }
            if word.ends_line {
                lines.push(Vec::new());
                used = 0;
                is_rest = false;
            }
        }
        lines.into_iter().map(Line::from).collect()
    }

    /// Positions that lines begin with, but for those after line feeds.
    pub(super) fn starts(&self) -> impl Iterator<Item = usize> {
        std::iter::once(0).chain(self.starts.iter().copied())
    }
}

fn push(lines: &mut [Vec<Span<'static>>], text: String, style: Style) {
    if let Some(line) = lines.last_mut().filter(|_| !text.is_empty()) {
        line.push(Span::styled(text, style));
    }
}

/// A piece of a word that is longer than a line.
enum Piece {
    Here(String),
    Below(String),
}

/// `text` cut where it would cross the margin, having begun at column `used`.
fn pieces(text: &str, used: usize, columns: usize) -> Vec<Piece> {
    let (mut cut, mut part, mut at) = (Vec::new(), String::new(), used);
    for c in text.chars() {
        let wide = c.width().unwrap_or(0);
        if at + wide > columns && at > 0 {
            cut.push(std::mem::take(&mut part));
            at = 0;
        }
        part.push(c);
        at += wide;
    }
    cut.push(part);
    let mut cut = cut.into_iter();
    let first = cut.next().map(Piece::Here);
    first.into_iter().chain(cut.map(Piece::Below)).collect()
}

/// The positions' text, cut before spaces and after line feeds.
fn words(positions: &[Position], style: impl Fn(usize, &Position) -> Style) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    for (at, position) in positions.iter().enumerate() {
        let text = match position.held {
            Held::Masked => MASK,
            Held::Given | Held::Drawn { .. } => &position.text,
        };
        let style = style(at, position);
        for (number, part) in text.split_inclusive('\n').enumerate() {
            let ends_line = part.ends_with('\n');
            let shown: String = part
                .trim_end_matches('\n')
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            let begins =
                number > 0 || shown.starts_with(' ') || words.last().is_none_or(|word: &Word| word.ends_line);
            if begins {
                words.push(Word {
                    first: at,
                    ..Word::default()
                });
            }
            if let Some(word) = words.last_mut() {
                word.pieces.push((shown, style));
                word.ends_line = ends_line;
            }
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn given(text: &str) -> Position {
        Position {
            text: text.to_owned(),
            held: Held::Given,
        }
    }

    fn masked() -> Position {
        Position {
            text: String::new(),
            held: Held::Masked,
        }
    }

    fn plain(_: usize, _: &Position) -> Style {
        Style::new()
    }

    fn text(lines: &[Line<'_>]) -> Vec<String> {
        lines.iter().map(ToString::to_string).collect()
    }

    fn laid_out(positions: &[Position], columns: usize) -> Vec<String> {
        text(&Layout::default().lines(positions, columns, plain))
    }

    #[test]
    fn words_stay_whole_and_long_ones_are_cut() {
        let positions = [
            given("one"),
            given(" tw"),
            given("o"),
            given(" three"),
            given(","),
        ];
        assert_eq!(laid_out(&positions, 8), ["one two", "three,"]);
        assert_eq!(
            laid_out(&[given("abcdefghij"), given("kl m")], 4),
            ["abcd", "efgh", "ijkl", " m"]
        );
        assert_eq!(laid_out(&[given("漢字漢字漢")], 8), ["漢字漢字", "漢"]);
        assert_eq!(laid_out(&[], 8), [""]);
    }

    #[test]
    fn control_characters_cannot_escape_and_line_feeds_end_lines() {
        let positions = [given("a\u{1b}[2J\nb"), given("\n\nc")];
        assert_eq!(laid_out(&positions, 20), ["a [2J", "b", "", "c"]);
    }

    #[test]
    fn lines_do_not_jump_while_they_are_filled() {
        let mut positions = vec![masked(); 12];
        let mut layout = Layout::default();
        let starts = |positions: &[Position], layout: &mut Layout| {
            layout.lines(positions, 22, plain);
            layout.starts.clone()
        };
        let before = starts(&positions, &mut layout);
        assert_eq!(before, BTreeSet::from([4, 8]));
        for at in [9, 0, 5, 2, 1, 3, 4, 6, 7, 8, 10, 11] {
            positions[at] = given([" a", " lamb", " ewes"][at % 3]);
            assert_eq!(starts(&positions, &mut layout), before);
        }
        // One that is much longer pushes the rest of its line to the next, and no further.
        positions[1] = given(" the kingdom of");
        assert_eq!(starts(&positions, &mut layout), BTreeSet::from([3, 8]));
        // Another width begins anew.
        layout.lines(&positions, 60, plain);
        assert!(layout.starts.len() <= 1);
    }

    #[test]
    fn certainty_and_news_are_seen() {
        let drawn = |step, log_probability| Position {
            text: "x".to_owned(),
            held: Held::Drawn {
                step,
                log_probability,
            },
        };
        let style = |position: &Position| Looks::Coloured.of(position, 3);
        assert_eq!(style(&drawn(1, -0.1)).fg, Some(Color::Green));
        assert_eq!(style(&drawn(1, -1.0)).fg, Some(Color::Yellow));
        assert_eq!(style(&drawn(1, -5.0)).fg, Some(Color::Red));
        assert!(style(&drawn(3, -5.0)).add_modifier.contains(Modifier::BOLD));
        assert!(!style(&drawn(1, -5.0)).add_modifier.contains(Modifier::BOLD));
        assert_eq!(Looks::Plain.of(&drawn(3, -5.0), 3), Style::new());
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_line_is_too_long(
            texts in prop::collection::vec("[a-z漢 ]{0,7}", 0..30), columns in 2usize..20,
        ) {
            let positions: Vec<Position> = texts.iter().map(|text| given(text)).collect();
            let lines = laid_out(&positions, columns);
            let bare = |text: &str| text.replace(' ', "");
            prop_assert_eq!(bare(&lines.concat()), bare(&texts.concat()));
            for line in lines {
                prop_assert!(width(&line) <= columns, "{:?}", line);
            }
        }
    }
}
