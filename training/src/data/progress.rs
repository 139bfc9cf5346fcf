//! How far the reading of a corpus is: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::say::say;

/// Between two lines where there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(20);

/// Bytes of the files that were read.
#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
    terminal: bool,
    start: Instant,
    logged: Instant,
    /// Of text, unpacked.
    text: u64,
}

impl Progress {
    /// Until `bytes` are read from disk.
    pub(super) fn new(bytes: u64) -> Self {
        let terminal = stderr().is_terminal();
        let bar = if terminal {
            ProgressBar::new(bytes)
        } else {
            ProgressBar::hidden()
        };
        bar.set_length(bytes);
        if let Ok(style) =
            ProgressStyle::with_template("{bar:30} {bytes} of {total_bytes}, {msg}, {eta} left")
        {
            bar.set_style(style);
        }
        let now = Instant::now();
        Self {
            bar,
            terminal,
            start: now,
            logged: now,
            text: 0,
        }
    }

    /// Counts what is read from disk.
    pub(super) fn bar(&self) -> &ProgressBar {
        &self.bar
    }

    /// Counts a document of `bytes` bytes.
    pub(super) fn document(&mut self, bytes: u64) {
        self.text += bytes;
        let every = if self.terminal {
            Duration::from_millis(200)
        } else {
            LOG_EVERY
        };
        if self.logged.elapsed() < every {
            return;
        }
        self.logged = Instant::now();
        let speed = self.text as f64 / 1e6 / self.start.elapsed().as_secs_f64();
        let line = format!("{speed:.1} MB/s of text");
        if self.terminal {
            self.bar.set_message(line);
        } else {
            let done = HumanBytes(self.bar.position());
            let all = HumanBytes(self.bar.length().unwrap_or_default());
            say(&format!("{done} of {all}, {line}"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
