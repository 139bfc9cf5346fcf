//! What a run says on the terminal: a bar where there is one, lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::record::StepRecord;
use crate::say::say;

/// Between two log lines where there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(20);

/// A bar on a terminal, lines elsewhere.
#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
    terminal: bool,
    start: Instant,
    first_share: f64,
    /// When a line was written last.
    logged: Option<Instant>,
}

impl Progress {
    /// For `steps` steps of which `step` are done, when `share` in [0, 1] of the run is over.
    pub(super) fn new(steps: u64, step: u64, share: f64) -> Self {
        let terminal = stderr().is_terminal();
        let bar = if terminal {
            ProgressBar::new(steps)
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}") {
            bar.set_style(style);
        }
        bar.set_position(step);
        // The first step can take a while.
        bar.tick();
        let now = Instant::now();
        Self {
            bar,
            terminal,
            start: now,
            first_share: share,
            logged: None,
        }
    }

    /// Says something that stays on the screen.
    pub(super) fn note(&self, line: &str) {
        if self.terminal {
            self.bar.println(line);
        } else {
            say(line);
        }
    }

    /// Shows a step, after which `share` of the run is over.
    pub(super) fn step(&mut self, step: &StepRecord, share: f64) {
        let done = (share - self.first_share).max(f64::MIN_POSITIVE);
        let left = self.start.elapsed().as_secs_f64() * (1.0 - share) / done;
        let line = format!(
            "loss {:.4} nats/token, {:.0} tokens/s, gradient {:.1}, lr {:.2e}, {:.1} min left",
            step.smoothed_loss,
            step.tokens_per_second,
            step.gradient_norm,
            step.learning_rate,
            left / 60.0
        );
        if self.terminal {
            self.bar.set_message(line);
            self.bar.set_position(step.step);
        } else if self.logged.is_none_or(|logged| logged.elapsed() >= LOG_EVERY) {
            self.logged = Some(Instant::now());
            say(&format!("step {}: {line}", step.step));
        }
    }

    /// Leaves the bar as it is.
    pub(super) fn finish(&self) {
        self.bar.abandon();
    }
}
