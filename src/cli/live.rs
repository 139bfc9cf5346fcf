//! The live view: all canvases of a request, redrawn in place on a terminal.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Instant;

use crossterm::style::{Attribute, Color, Print, ResetColor, SetAttribute, SetForegroundColor};
use crossterm::terminal::{Clear, ClearType};
use crossterm::{cursor, queue};

use super::cells::{Cell, Look, cells, wrap};
use crate::proto::v1::Frame;

/// Columns and rows of a terminal that does not tell its size.
const FALLBACK: (u16, u16) = (80, 24);
/// Narrower terminals are drawn as if they were this wide.
const LEAST_COLUMNS: u16 = 8;

/// A drawing, and what has to be gone over to draw it again.
#[derive(Debug)]
pub(super) struct Live {
    colour: bool,
    /// Lines that the last drawing took; 0 when nothing is drawn and the cursor is shown.
    drawn: u16,
    canvases: BTreeMap<u32, Canvas>,
    started: Instant,
}

/// The newest state of one canvas.
#[derive(Debug, Default)]
struct Canvas {
    text: String,
    cells: Vec<Cell>,
    step: u32,
    total: u32,
    masked: u32,
    nfe: u32,
}

impl Live {
    pub(super) fn new() -> Self {
        Self {
            // See no-color.org: any value but the empty one.
            colour: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
            drawn: 0,
            canvases: BTreeMap::new(),
            started: Instant::now(),
        }
    }

    pub(super) fn show(&mut self, frame: &Frame, out: &mut impl Write) -> io::Result<()> {
        let canvas = self.canvases.entry(frame.canvas).or_default();
        let text = frame.text.clone().unwrap_or_default();
        *canvas = Canvas {
            cells: cells(&text, &canvas.text),
            text,
            step: frame.step,
            total: frame.total,
            masked: frame.masked,
            nfe: frame.nfe,
        };
        let (columns, rows) = crossterm::terminal::size().unwrap_or(FALLBACK);
        self.draw(columns.max(LEAST_COLUMNS), rows, out)
    }

    /// Takes the view away and gives the cursor back.
    pub(super) fn clear(&mut self, out: &mut impl Write) -> io::Result<()> {
        if self.drawn > 0 {
            self.rewind(out)?;
            queue!(out, cursor::Show)?;
            self.drawn = 0;
        }
        out.flush()
    }

    fn draw(&mut self, columns: u16, rows: u16, out: &mut impl Write) -> io::Result<()> {
        self.rewind(out)?;
        let mut lines = Vec::new();
        for (number, canvas) in &self.canvases {
            if self.canvases.len() > 1 {
                lines.push(plain(&format!("--- canvas {number}")));
            }
            lines.extend(wrap(&canvas.cells, columns.into()));
        }
        // One row for the status line, one for the cursor below it.
        let room = usize::from(rows).saturating_sub(2).max(1);
        let hidden = lines.len().saturating_sub(room);
        lines.truncate(room);
        for line in &lines {
            self.line(line, out)?;
        }
        let mut status = plain(&self.status(hidden));
        // A status of two rows would not be gone over by the next drawing.
        status.truncate(columns.into());
        let status: String = status.iter().map(|(c, _)| c).collect();
        if self.colour {
            queue!(out, SetForegroundColor(Color::Cyan), Print(status), ResetColor)?;
        } else {
            queue!(out, Print(status))?;
        }
        queue!(out, Print("\n"))?;
        self.drawn = lines.len() as u16 + 1;
        out.flush()
    }

    fn status(&self, hidden: usize) -> String {
        let sum = |of: fn(&Canvas) -> u32| self.canvases.values().map(|c| u64::from(of(c))).sum::<u64>();
        let more = if hidden > 0 {
            format!("  ({hidden} more lines)")
        } else {
            String::new()
        };
        format!(
            "step {}/{}  masked {}  NFE {}  {:.1} s{more}",
            sum(|canvas| canvas.step),
            sum(|canvas| canvas.total),
            sum(|canvas| canvas.masked),
            sum(|canvas| canvas.nfe),
            self.started.elapsed().as_secs_f64()
        )
    }

    fn line(&self, line: &[Cell], out: &mut impl Write) -> io::Result<()> {
        for run in line.chunk_by(|a, b| a.1 == b.1) {
            let text: String = run.iter().map(|(c, _)| c).collect();
            let attribute = match run.first() {
                Some((_, Look::Masked)) if self.colour => Some(Attribute::Dim),
                Some((_, Look::Fresh)) if self.colour => Some(Attribute::Bold),
                _ => None,
            };
            match attribute {
                Some(attribute) => {
                    queue!(
                        out,
                        SetAttribute(attribute),
                        Print(text),
                        SetAttribute(Attribute::Reset)
                    )?;
                }
                None => queue!(out, Print(text))?,
            }
        }
        queue!(out, Print("\n"))
    }

    fn rewind(&self, out: &mut impl Write) -> io::Result<()> {
        if self.drawn > 0 {
            queue!(out, cursor::MoveToPreviousLine(self.drawn))?;
        } else {
            queue!(out, cursor::Hide)?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))
    }
}

fn plain(text: &str) -> Vec<Cell> {
    text.chars().map(|c| (c, Look::Plain)).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn live(colour: bool) -> Live {
        Live {
            colour,
            ..Live::new()
        }
    }

    fn frame(canvas: u32, text: &str) -> Frame {
        Frame {
            canvas,
            step: 1,
            total: 9,
            text: Some(text.to_owned()),
            ..Frame::default()
        }
    }

    fn drawn(live: &mut Live, columns: u16, rows: u16) -> String {
        let mut out = Vec::new();
        live.draw(columns, rows, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_redraw_goes_back_over_every_line_it_drew() {
        let mut live = live(false);
        live.show(&frame(0, "one\ntwo"), &mut Vec::new()).unwrap();
        assert_eq!(live.drawn, 3);
        let again = drawn(&mut live, 80, 24);
        assert!(again.starts_with("\u{1b}[3F\u{1b}[J"), "{again:?}");
        let mut out = Vec::new();
        live.clear(&mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out, "\u{1b}[3F\u{1b}[J\u{1b}[?25h", "the cursor is back");
    }

    #[test]
    fn masks_are_dim_fresh_text_is_bold_and_neither_without_colour() {
        let show = |colour| {
            let (mut live, mut out) = (live(colour), Vec::new());
            live.show(&frame(0, "a░░"), &mut Vec::new()).unwrap();
            live.show(&frame(0, "ab░"), &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert!(show(true).contains("a\u{1b}[1mb\u{1b}[0m\u{1b}[2m░\u{1b}[0m\n"));
        assert!(show(false).contains("ab░\n"));
    }

    #[test]
    fn canvases_are_stacked_as_far_as_they_fit() {
        let mut live = live(false);
        for canvas in 0..3 {
            live.show(&frame(canvas, "x\ny"), &mut Vec::new()).unwrap();
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
        assert_eq!(live.drawn, 7);
    }

    #[test]
    fn the_status_stays_in_its_row() {
        let mut live = live(false);
        live.show(&frame(0, "x"), &mut Vec::new()).unwrap();
        let status = drawn(&mut live, 8, 24).lines().last().unwrap().to_owned();
        assert_eq!(status, "step 1/9");
    }
}
