//! Shows canvases while they denoise: in place on a terminal, as blocks of text in a pipe.

use std::io::{self, Write};
use std::time::Instant;

use crossterm::style::{Attribute, Color, Print, ResetColor, SetAttribute, SetForegroundColor};
use crossterm::terminal::{Clear, ClearType};
use crossterm::{cursor, queue};

use crate::proto::v1::Frame;
use crate::server::MASKED;

/// States that a pipe is shown of every canvas, about.
const BLOCKS: u32 = 8;
/// Lines that one canvas may take on a terminal that does not tell its size.
const FALLBACK: (u16, u16) = (80, 24);

/// Where intermediate states go.
#[derive(Debug)]
pub(super) enum View {
    /// Nowhere.
    Off,
    /// A few blocks of text.
    Blocks {
        /// The last block shown of every canvas.
        shown: Vec<Option<u32>>,
    },
    /// Redrawn in place.
    Terminal(Terminal),
}

impl View {
    pub(super) fn blocks() -> Self {
        Self::Blocks { shown: Vec::new() }
    }

    pub(super) fn terminal() -> Self {
        let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self::Terminal(Terminal {
            colour,
            lines: 0,
            canvases: Vec::new(),
            started: Instant::now(),
        })
    }

    pub(super) fn show(&mut self, frame: &Frame, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Off => Ok(()),
            Self::Blocks { shown } => {
                let canvas = frame.canvas as usize;
                shown.resize(shown.len().max(canvas + 1), None);
                let block = frame.step * BLOCKS / frame.total.max(1);
                if shown[canvas].replace(block) == Some(block) {
                    return Ok(());
                }
                writeln!(
                    out,
                    "--- step {}/{}  masked {}",
                    frame.step, frame.total, frame.masked
                )?;
                writeln!(out, "{}", frame.text.as_deref().unwrap_or_default())
            }
            Self::Terminal(terminal) => terminal.show(frame, out),
        }
    }

    /// Leaves the terminal as it was, without the live view.
    pub(super) fn clear(&mut self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Off | Self::Blocks { .. } => Ok(()),
            Self::Terminal(terminal) => terminal.clear(out),
        }
    }
}

/// A live view of all canvases of a request.
#[derive(Debug)]
pub(super) struct Terminal {
    colour: bool,
    /// Lines that the last drawing took.
    lines: u16,
    /// The newest frame of every canvas.
    canvases: Vec<Frame>,
    started: Instant,
}

impl Terminal {
    fn show(&mut self, frame: &Frame, out: &mut impl Write) -> io::Result<()> {
        let index = frame.canvas as usize;
        if self.canvases.len() <= index {
            self.canvases.resize(index + 1, Frame::default());
        }
        self.canvases[index] = frame.clone();
        let (columns, rows) = crossterm::terminal::size().unwrap_or(FALLBACK);
        self.rewind(out)?;
        // The last row stays free: the status line ends with a line break.
        let room = usize::from(rows).saturating_sub(2).max(1);
        let lines = self.canvases.iter().filter_map(|frame| frame.text.as_deref());
        let lines: Vec<Vec<char>> = lines
            .flat_map(|text| wrap(text, usize::from(columns).max(8)))
            .take(room)
            .collect();
        for line in &lines {
            self.line(line, out)?;
        }
        let sum = |of: fn(&Frame) -> u32| self.canvases.iter().map(of).sum::<u32>();
        let status = format!(
            "step {}/{}  masked {}  NFE {}  {:.1} s",
            sum(|f| f.step),
            sum(|f| f.total),
            sum(|f| f.masked),
            sum(|f| f.nfe),
            self.started.elapsed().as_secs_f64()
        );
        if self.colour {
            queue!(
                out,
                SetForegroundColor(Color::Cyan),
                Print(&status),
                ResetColor,
                Print("\n")
            )?;
        } else {
            queue!(out, Print(&status), Print("\n"))?;
        }
        self.lines = lines.len() as u16 + 1;
        out.flush()
    }

    fn line(&self, line: &[char], out: &mut impl Write) -> io::Result<()> {
        for run in line.chunk_by(|a, b| (*a == MASKED) == (*b == MASKED)) {
            let text: String = run.iter().collect();
            if self.colour && run.first() == Some(&MASKED) {
                queue!(
                    out,
                    SetAttribute(Attribute::Dim),
                    Print(text),
                    SetAttribute(Attribute::Reset)
                )?;
            } else {
                queue!(out, Print(text))?;
            }
        }
        queue!(out, Print("\n"))
    }

    fn rewind(&self, out: &mut impl Write) -> io::Result<()> {
        if self.lines > 0 {
            queue!(out, cursor::MoveToPreviousLine(self.lines))?;
        } else {
            queue!(out, cursor::Hide)?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))
    }

    fn clear(&mut self, out: &mut impl Write) -> io::Result<()> {
        if self.lines > 0 {
            self.rewind(out)?;
            queue!(out, cursor::Show)?;
            self.lines = 0;
        }
        out.flush()
    }
}

/// Lines of at most `columns` characters; control characters, which could move the cursor, become spaces.
fn wrap(text: &str, columns: usize) -> Vec<Vec<char>> {
    text.split('\n')
        .flat_map(|line| {
            let line: Vec<char> = line
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            if line.is_empty() {
                vec![line]
            } else {
                line.chunks(columns).map(<[char]>::to_vec).collect()
            }
        })
        .collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn frame(step: u32, text: &str) -> Frame {
        Frame {
            step,
            total: 64,
            masked: 64 - step,
            text: Some(text.to_owned()),
            ..Frame::default()
        }
    }

    #[test]
    fn a_pipe_sees_a_few_states() {
        let (mut view, mut out) = (View::blocks(), Vec::new());
        for step in 0..=64 {
            view.show(&frame(step, "a ░"), &mut out).unwrap();
        }
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.matches("--- step").count(), 9);
        assert!(out.starts_with("--- step 0/64  masked 64\na ░\n"));
    }

    #[test]
    fn a_redraw_goes_back_over_every_line_it_drew() {
        let mut terminal = Terminal {
            colour: false,
            lines: 0,
            canvases: Vec::new(),
            started: Instant::now(),
        };
        let mut out = Vec::new();
        terminal.show(&frame(1, "one\ntwo"), &mut out).unwrap();
        assert_eq!(terminal.lines, 3);
        out.clear();
        terminal.show(&frame(2, "one"), &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().starts_with("\u{1b}[3F"));
    }

    #[test]
    fn long_lines_wrap_and_control_characters_cannot_escape() {
        let wrapped: Vec<String> = wrap("abcdefghij\u{1b}[2J\n\nk", 8)
            .iter()
            .map(|l| l.iter().collect())
            .collect();
        assert_eq!(wrapped, ["abcdefgh", "ij [2J", "", "k"]);
    }
}
