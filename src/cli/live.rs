//! The live view: all canvases of a request, redrawn in place on a terminal.

use std::io::{self, Write};

use ratatui::backend::IntoCrossterm;
use ratatui::crossterm::style::{ContentStyle, PrintStyledContent, StyledContent};
use ratatui::crossterm::terminal::{Clear, ClearType};
use ratatui::crossterm::{cursor, queue, terminal};
use ratatui::text::Line;

use super::canvas::Snapshot;
use super::layout::Looks;
use super::screen::Screen;

/// Columns and rows of a terminal that does not tell its size.
const FALLBACK: (u16, u16) = (80, 24);
/// Narrower terminals are drawn as if they were this wide.
const LEAST_COLUMNS: u16 = 8;

/// A drawing, and what has to be gone over to draw it again.
#[derive(Debug)]
pub(super) struct Live {
    screen: Screen,
    /// Columns of the lines that the last drawing has; none when nothing is drawn and the cursor is shown.
    drawn: Vec<u16>,
}

impl Live {
    pub(super) fn new() -> Self {
        Self::with(Looks::wanted())
    }

    fn with(looks: Looks) -> Self {
        Self {
            screen: Screen::new(looks),
            drawn: Vec::new(),
        }
    }

    pub(super) fn show(&mut self, snapshot: Snapshot, out: &mut impl Write) -> io::Result<()> {
        self.screen.put(snapshot);
        let (columns, rows) = size();
        self.draw(columns, rows, out)
    }

    /// Takes the view away and gives the cursor back.
    pub(super) fn clear(&mut self, out: &mut impl Write) -> io::Result<()> {
        if !self.drawn.is_empty() {
            let (columns, _) = size();
            self.rewind(columns, out)?;
        }
        self.leave(out)
    }

    /// Leaves the view where it is and gives the cursor back.
    pub(super) fn leave(&mut self, out: &mut impl Write) -> io::Result<()> {
        if !self.drawn.is_empty() {
            queue!(out, cursor::Show)?;
            self.drawn.clear();
        }
        out.flush()
    }

    fn draw(&mut self, columns: u16, rows: u16, out: &mut impl Write) -> io::Result<()> {
        self.rewind(columns, out)?;
        let mut lines = self.screen.lines(columns.into());
        // One row for the progress, one for the cursor below it.
        let room = usize::from(rows).saturating_sub(2).max(1);
        let hidden = lines.len().saturating_sub(room);
        lines.truncate(room);
        lines.push(self.screen.progress(columns.into(), hidden));
        for line in &lines {
            print(line, out)?;
        }
        self.drawn = lines.iter().map(|line| line.width() as u16).collect();
        out.flush()
    }

    /// Goes back to where the drawing began; in a terminal that has become narrower its lines have wrapped.
    fn rewind(&self, columns: u16, out: &mut impl Write) -> io::Result<()> {
        let rows: u16 = self
            .drawn
            .iter()
            .map(|width| width.div_ceil(columns).max(1))
            .sum();
        if rows > 0 {
            queue!(out, cursor::MoveToPreviousLine(rows))?;
        } else {
            queue!(out, cursor::Hide)?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))
    }
}

/// Columns and rows of the terminal.
fn size() -> (u16, u16) {
    match terminal::size() {
        Ok((columns, rows)) if columns > 0 && rows > 0 => (columns.max(LEAST_COLUMNS), rows),
        _ => FALLBACK,
    }
}

fn print(line: &Line<'_>, out: &mut impl Write) -> io::Result<()> {
    for span in &line.spans {
        let style: ContentStyle = line.style.patch(span.style).into_crossterm();
        if style == ContentStyle::default() {
            write!(out, "{}", span.content)?;
        } else {
            queue!(out, PrintStyledContent(StyledContent::new(style, &span.content)))?;
        }
    }
    writeln!(out)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::canvas::{Held, Position};
    use super::*;

    /// A canvas of these texts, of which the empty ones are masked.
    fn snapshot(canvas: u32, texts: &[&str]) -> Snapshot {
        let position = |text: &&str| Position {
            text: (*text).to_owned(),
            held: if text.is_empty() {
                Held::Masked
            } else {
                Held::Given
            },
        };
        Snapshot {
            canvas,
            step: 1,
            total: 9,
            positions: texts.iter().map(position).collect(),
            ..Snapshot::default()
        }
    }

    fn shown(live: &mut Live, snapshot: Snapshot) -> String {
        let mut out = Vec::new();
        live.show(snapshot, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn drawn(live: &mut Live, columns: u16, rows: u16) -> String {
        let mut out = Vec::new();
        live.draw(columns, rows, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_redraw_goes_back_over_every_line_it_drew() {
        let mut live = Live::with(Looks::Plain);
        shown(&mut live, snapshot(0, &["one\ntwo"]));
        assert_eq!(live.drawn.len(), 3);
        let again = drawn(&mut live, 80, 24);
        assert!(again.starts_with("\u{1b}[3F\u{1b}[J"), "{again:?}");
        // Narrower, the line of progress has become several.
        let wide = live.drawn[2];
        let again = drawn(&mut live, 20, 24);
        let rows = 2 + wide.div_ceil(20);
        assert!(again.starts_with(&format!("\u{1b}[{rows}F\u{1b}[J")), "{again:?}");
        let mut out = Vec::new();
        live.clear(&mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out, "\u{1b}[3F\u{1b}[J\u{1b}[?25h", "the cursor is back");
    }

    #[test]
    fn masks_are_dim_and_nothing_has_colour_where_none_is_wanted() {
        let positions = ["a", ""];
        let coloured = shown(&mut Live::with(Looks::Coloured), snapshot(0, &positions));
        assert!(coloured.contains("a\u{1b}[2m ░░░░\u{1b}[0m\n"), "{coloured:?}");
        let plain = shown(&mut Live::with(Looks::Plain), snapshot(0, &positions));
        assert!(
            plain.contains("a ░░░░\nstep 1/9") && !plain.contains("[2m"),
            "{plain:?}"
        );
    }

    #[test]
    fn canvases_are_stacked_as_far_as_they_fit() {
        let mut live = Live::with(Looks::Plain);
        for canvas in 0..3 {
            shown(&mut live, snapshot(canvas, &["x\ny"]));
        }
        let all = drawn(&mut live, 80, 24);
        assert!(
            all.contains("--- canvas 2\nx\ny\nstep 3/27") && !all.contains("more"),
            "{all}"
        );
        let few = drawn(&mut live, 80, 8);
        assert!(
            few.contains("--- canvas 1\nx\ny\nstep") && few.contains("(3 more lines)"),
            "{few}"
        );
        assert_eq!(live.drawn.len(), 7);
    }

    #[test]
    fn the_progress_stays_in_its_row() {
        let mut live = Live::with(Looks::Plain);
        shown(&mut live, snapshot(0, &["x"]));
        let progress = drawn(&mut live, 8, 24).lines().last().unwrap().to_owned();
        assert_eq!(progress, "step 1/9");
    }
}
