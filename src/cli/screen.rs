//! All canvases of a request as lines of text, and how far they are.

use std::collections::BTreeMap;

use ratatui::style::{Color, Style};
use ratatui::text::Line;

use super::canvas::Snapshot;
use super::layout::{Layout, Looks};

/// Columns of the bar that fills.
const BAR: usize = 16;

/// The newest states of all canvases.
#[derive(Debug)]
pub(super) struct Screen {
    looks: Looks,
    canvases: BTreeMap<u32, (Snapshot, Layout)>,
}

impl Screen {
    pub(super) fn new(looks: Looks) -> Self {
        Self {
            looks,
            canvases: BTreeMap::new(),
        }
    }

    /// Puts the newest state of its canvas in place.
    pub(super) fn put(&mut self, snapshot: Snapshot) {
        let (newest, _) = self.canvases.entry(snapshot.canvas).or_default();
        *newest = snapshot;
    }

    /// The canvases, one below the other.
    pub(super) fn lines(&mut self, columns: usize) -> Vec<Line<'static>> {
        let many = self.canvases.len() > 1;
        let mut lines = Vec::new();
        for (number, (snapshot, layout)) in &mut self.canvases {
            if many {
                lines.push(Line::from(format!("--- canvas {number}")));
            }
            lines.extend(layout.lines(&snapshot.positions, columns, |_, position| {
                self.looks.of(position, snapshot.step)
            }));
        }
        lines
    }

    /// How far all of them are, in a line of at most `columns` columns.
    pub(super) fn progress(&self, columns: usize, hidden: usize) -> Line<'static> {
        let snapshots = || self.canvases.values().map(|(snapshot, _)| snapshot);
        let sum = |of: fn(&Snapshot) -> u64| snapshots().map(of).sum::<u64>();
        let (step, total) = (
            sum(|snapshot| snapshot.step.into()),
            sum(|snapshot| snapshot.total.into()),
        );
        let seconds = snapshots().map(|snapshot| snapshot.seconds).fold(0.0, f64::max);
        let share = step as f64 / total.max(1) as f64;
        let full = (share * BAR as f64) as usize;
        let bar = format!("{}{}", "█".repeat(full), " ".repeat(BAR - full));
        let mut told = format!(
            "step {step}/{total} ▕{bar}▏ masked {}  NFE {}",
            sum(|snapshot| snapshot.masked() as u64),
            sum(|snapshot| snapshot.nfe.into()),
        );
        let drawn = sum(|snapshot| snapshot.drawn() as u64);
        if drawn > 0 && seconds > 0.0 {
            told = format!("{told}  {:.0} tokens/s", drawn as f64 / seconds);
        }
        if step > 0 && step < total {
            told = format!("{told}  {:.1} s left", seconds * (1.0 / share - 1.0));
        }
        if hidden > 0 {
            told = format!("{told}  ({hidden} more lines)");
        }
        // A second row would not be gone over by the next drawing.
        let told: String = told.chars().take(columns).collect();
        let style = match self.looks {
            Looks::Coloured => Style::new().fg(Color::Cyan),
            Looks::Plain => Style::new(),
        };
        Line::styled(told, style)
    }
}
