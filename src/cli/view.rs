//! Shows canvases while they denoise: in place on a terminal, as blocks of text in a pipe.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};

use super::canvas::Snapshot;
use super::live::Live;
use crate::proto::v1::Frame;

/// Milliseconds that a state is shown for on a terminal: what eyes can follow.
pub(super) const PACE: u32 = 40;

/// Whether standard output is a terminal that can be drawn on.
pub(super) fn can_draw() -> bool {
    io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb")
}

/// States that a pipe is shown of every canvas, about.
const BLOCKS: u64 = 8;

/// Where intermediate states go.
#[derive(Debug)]
pub(super) enum View {
    /// Nowhere.
    Off,
    /// A few blocks of text.
    Blocks {
        /// Whether headings say which canvas they are about.
        many: bool,
        /// The last block shown of every canvas.
        shown: BTreeMap<u32, u64>,
    },
    /// Redrawn in place.
    Terminal(Live),
}

impl View {
    pub(super) fn blocks(many: bool) -> Self {
        Self::Blocks {
            many,
            shown: BTreeMap::new(),
        }
    }

    pub(super) fn terminal() -> Self {
        Self::Terminal(Live::new())
    }

    /// Tells a state, in a pipe.
    pub(super) fn show(&mut self, frame: &Frame, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Off => Ok(()),
            Self::Blocks { many, shown } => {
                let block = u64::from(frame.step) * BLOCKS / u64::from(frame.total.max(1));
                if shown.insert(frame.canvas, block) == Some(block) {
                    return Ok(());
                }
                let canvas = if *many {
                    format!("canvas {}  ", frame.canvas)
                } else {
                    String::new()
                };
                writeln!(
                    out,
                    "--- {canvas}step {}/{}  masked {}",
                    frame.step, frame.total, frame.masked
                )?;
                writeln!(out, "{}", frame.text.as_deref().unwrap_or_default())
            }
            Self::Terminal(_) => Ok(()),
        }
    }

    /// Draws a state, on a terminal.
    pub(super) fn draw(&mut self, snapshot: Snapshot, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Off | Self::Blocks { .. } => Ok(()),
            Self::Terminal(live) => live.show(snapshot, out),
        }
    }

    /// Leaves what is drawn where it is.
    pub(super) fn leave(&mut self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Off | Self::Blocks { .. } => Ok(()),
            Self::Terminal(live) => live.leave(out),
        }
    }

    /// Takes what is drawn away.
    pub(super) fn clear(&mut self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Off | Self::Blocks { .. } => Ok(()),
            Self::Terminal(live) => live.clear(out),
        }
    }
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
        let (mut view, mut out) = (View::blocks(false), Vec::new());
        for step in 0..=64 {
            view.show(&frame(step, "a ░\nb"), &mut out).unwrap();
        }
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.matches("--- step").count(), 9);
        assert!(out.starts_with("--- step 0/64  masked 64\na ░\nb\n"));
    }

    #[test]
    fn headings_tell_canvases_apart() {
        let (mut view, mut out) = (View::blocks(true), Vec::new());
        for canvas in [0, u32::MAX] {
            let frame = Frame {
                canvas,
                total: 0,
                ..frame(3, "x")
            };
            view.show(&frame, &mut out).unwrap();
        }
        let out = String::from_utf8(out).unwrap();
        assert!(out.starts_with("--- canvas 0  step 3/0"), "{out}");
        assert!(out.contains("--- canvas 4294967295  step 3/0"), "{out}");
    }
}
