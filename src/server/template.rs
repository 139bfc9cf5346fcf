//! Templates: which positions are clamped, and how a canvas reads as text.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use crate::bundle::{TextTokenizer, TokenizerError};
use crate::diffusion::Token;
use crate::engine::plan::Draft;
use crate::proto::v1;
use crate::proto::v1::template_part::Part;

/// How a masked position reads in a frame.
pub const MASKED: char = '\u{2591}';

/// One piece of a template, as it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Clamped text and its tokens.
    Text(String, Vec<Token>),
    /// Clamped text whose last space belongs to the token that the gap after it begins with: what words are cut into
    /// begins with their space, so that a space of its own is followed by half a word. The tokens are without it.
    OpenText(String, Vec<Token>),
    /// Clamped tokens.
    Tokens(Vec<Token>),
    /// Positions to fill, and the name of the set of tokens that they may be filled with.
    Gap(usize, Option<String>),
    /// Positions to fill that begin with these tokens, and the text that they were given as.
    Draft(Option<String>, Vec<Token>),
}

impl Piece {
    /// Positions that it takes.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Text(_, tokens)
            | Self::OpenText(_, tokens)
            | Self::Tokens(tokens)
            | Self::Draft(_, tokens) => tokens.len(),
            Self::Gap(positions, _) => *positions,
        }
    }

    /// Whether its positions are to be filled.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Gap(..) | Self::Draft(..))
    }
}

/// A canvas to fill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template {
    /// The pieces from left to right, with the positions each one takes.
    pieces: Vec<(Piece, Range<usize>)>,
}

impl Template {
    /// Lays the pieces out from left to right.
    pub(super) fn new(pieces: impl IntoIterator<Item = Piece>) -> Self {
        let mut end = 0;
        let place = |piece: Piece| {
            let start = end;
            end += piece.len();
            (piece, start..end)
        };
        Self {
            pieces: pieces.into_iter().map(place).collect(),
        }
    }

    /// The pieces from left to right, with the positions that each one takes.
    pub(super) fn pieces(&self) -> impl Iterator<Item = &(Piece, Range<usize>)> {
        self.pieces.iter()
    }

    /// Positions of the canvas.
    pub(super) fn length(&self) -> usize {
        self.pieces.last().map_or(0, |(_, range)| range.end)
    }

    /// The pieces as a request may ask for them.
    pub(super) fn parts(&self) -> Vec<v1::TemplatePart> {
        let part = |piece: &Piece| match piece {
            Piece::Text(text, _) | Piece::OpenText(text, _) => Part::Text(text.clone()),
            Piece::Tokens(ids) => Part::Tokens(v1::TokenList { ids: ids.clone() }),
            Piece::Gap(positions, allowed) => Part::Gap(v1::Gap {
                positions: *positions as u32,
                allowed: allowed.clone(),
            }),
            Piece::Draft(text, ids) => Part::Draft(v1::Draft {
                content: Some(match text {
                    Some(text) => v1::draft::Content::Text(text.clone()),
                    None => v1::draft::Content::Tokens(v1::TokenList { ids: ids.clone() }),
                }),
            }),
        };
        let pieces = self.pieces.iter().filter(|(_, range)| !range.is_empty());
        pieces
            .map(|(piece, _)| v1::TemplatePart {
                part: Some(part(piece)),
            })
            .collect()
    }

    /// Positions to fill.
    pub(super) fn gaps(&self) -> usize {
        self.pieces
            .iter()
            .filter(|(piece, _)| piece.is_open())
            .map(|(_, range)| range.len())
            .sum()
    }

    /// Whether there are positions to fill of which nothing is known.
    pub(super) fn has_gap(&self) -> bool {
        self.pieces
            .iter()
            .any(|(piece, _)| matches!(piece, Piece::Gap(..)))
    }

    /// Whether there are positions to fill that begin with tokens.
    pub(super) fn has_draft(&self) -> bool {
        self.pieces
            .iter()
            .any(|(piece, _)| matches!(piece, Piece::Draft(..)))
    }

    /// What positions to fill begin with, where a piece says so.
    pub(super) fn draft(&self) -> Option<Draft> {
        if !self.has_draft() {
            return None;
        }
        let tokens = self.pieces.iter().flat_map(|(piece, range)| match piece {
            Piece::Draft(_, tokens) => tokens.iter().copied().map(Some).collect(),
            Piece::Text(..) | Piece::OpenText(..) | Piece::Tokens(_) | Piece::Gap(..) => {
                vec![None; range.len()]
            }
        });
        Some(Draft(tokens.collect()))
    }

    /// The canvas: tokens where clamped, `None` where to fill.
    pub(super) fn canvas(&self) -> Arc<[Option<Token>]> {
        self.pieces
            .iter()
            .flat_map(|(piece, _)| match piece {
                Piece::Text(_, tokens) | Piece::OpenText(_, tokens) | Piece::Tokens(tokens) => {
                    tokens.iter().copied().map(Some).collect::<Vec<_>>()
                }
                Piece::Gap(..) | Piece::Draft(..) => vec![None; piece.len()],
            })
            .collect()
    }

    /// The canvas as text: clamped text byte for byte, the tokens of gaps decoded between.
    ///
    /// With `mask`, masked positions read as [`MASKED`]. With `end`, text stops at that token where it
    /// stands in a gap.
    pub(super) fn text(
        &self,
        tokens: &[Token],
        tokenizer: &TextTokenizer,
        mask: Option<Token>,
        end: Option<Token>,
        written: &mut Written,
    ) -> Result<String, TokenizerError> {
        written.next_text();
        let mut text = String::new();
        let mut space_is_there = false;
        for (piece, range) in &self.pieces {
            let drawn = match piece {
                Piece::Text(clamped, _) | Piece::OpenText(clamped, _) => {
                    text.push_str(clamped);
                    space_is_there = matches!(piece, Piece::OpenText(..));
                    continue;
                }
                Piece::Tokens(_) | Piece::Gap(..) | Piece::Draft(..) => &tokens[range.clone()],
            };
            let ends = end
                .and_then(|end| drawn.iter().position(|t| *t == end))
                .filter(|_| piece.is_open());
            let drawn = &drawn[..ends.unwrap_or(drawn.len())];
            let mut at = range.start;
            for run in drawn.chunk_by(|a, b| (Some(*a) == mask) == (Some(*b) == mask)) {
                if mask.is_some() && run.first().copied() == mask {
                    text.extend(run.iter().map(|_| MASKED));
                } else {
                    let before = &tokens[..at];
                    let masked = mask.and_then(|mask| before.iter().rposition(|token| *token == mask));
                    let before = match masked {
                        // What stands there is not known, but something will: this is not the beginning.
                        Some(masked) if masked + 1 == at => &run[..1],
                        Some(masked) => &before[masked + 1..],
                        None => before,
                    };
                    let decoded = written.decode(before, run, tokenizer)?;
                    let rest = decoded.strip_prefix(' ').filter(|_| space_is_there);
                    text.push_str(rest.unwrap_or(decoded));
                }
                space_is_there = false;
                at += run.len();
            }
            if ends.is_some() {
                break;
            }
        }
        Ok(text)
    }
}

/// How the runs of tokens of a canvas's last text were written: from one frame to the next most of them stay.
#[derive(Debug, Default)]
pub(super) struct Written {
    last: HashMap<Run, String>,
    now: HashMap<Run, String>,
}

/// The tokens that decide how a run is written, and its own.
type Run = (Box<[Token]>, Box<[Token]>);

impl Written {
    /// Begins another text; forgets the one before the last.
    fn next_text(&mut self) {
        self.last = std::mem::take(&mut self.now);
    }

    fn decode(
        &mut self,
        before: &[Token],
        run: &[Token],
        tokenizer: &TextTokenizer,
    ) -> Result<&str, TokenizerError> {
        let key: Run = (TextTokenizer::context(before).into(), run.into());
        let text = match self.last.remove(&key) {
            Some(text) => text,
            None => tokenizer.decode_after(before, run)?,
        };
        Ok(self.now.entry(key).or_insert(text))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::bundle::tokenizer_tests::{SEA, of};

    const MASK: Token = 8;

    #[test]
    fn gaps_read_on_from_what_stands_before_them() {
        let tokenizer = of(&SEA).unwrap();
        let template = Template::new([
            Piece::Text("the".to_owned(), vec![0]),
            Piece::Gap(2, None),
            Piece::Tokens(vec![2]),
            Piece::Gap(1, None),
        ]);
        // One after the other, as frames are.
        let mut written = Written::default();
        let mut text = |tokens: &[Token], mask| {
            let text = template.text(tokens, &tokenizer, mask, None, &mut written);
            text.unwrap()
        };
        assert_eq!(text(&[0, 1, 2, 2, 1], None), "the sea was was sea");
        assert_eq!(
            text(&[0, MASK, 2, 2, MASK], Some(MASK)),
            format!("the{MASKED} was was{MASKED}")
        );
        assert_eq!(
            text(&[0, 1, MASK, 2, 1], Some(MASK)),
            format!("the sea{MASKED} was sea")
        );
    }

    #[test]
    fn a_space_before_a_gap_is_told_once() {
        let tokenizer = of(&SEA).unwrap();
        let template = Template::new([
            Piece::OpenText("the ".to_owned(), vec![0]),
            Piece::Gap(2, None),
            Piece::OpenText(" was ".to_owned(), vec![2]),
            Piece::Gap(1, None),
        ]);
        let text = |tokens: &[Token], mask| {
            let text = template.text(tokens, &tokenizer, mask, None, &mut Written::default());
            text.unwrap()
        };
        assert_eq!(text(&[0, 1, 2, 2, 1], None), "the sea was was sea");
        assert_eq!(
            text(&[0, MASK, 1, 2, MASK], Some(MASK)),
            format!("the {MASKED} sea was {MASKED}")
        );
    }

    #[test]
    fn text_ends_with_its_document_where_the_network_ended_it() {
        let tokenizer = of(&SEA).unwrap();
        let template = Template::new([
            Piece::Tokens(vec![0, 2]),
            Piece::Gap(3, None),
            Piece::Text(" was".to_owned(), vec![2]),
        ]);
        // Token 2 ends documents here: clamped it is text like any other.
        let text = |end| {
            let written = &mut Written::default();
            template
                .text(&[0, 2, 1, 2, 1, 2], &tokenizer, None, end, written)
                .unwrap()
        };
        assert_eq!(text(None), "the was sea was sea was");
        assert_eq!(text(Some(2)), "the was sea");
        assert_eq!(text(Some(7)), text(None));
    }
}
