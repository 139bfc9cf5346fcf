//! `denoised replay`: a recording once more, on the terminal or as an animated SVG.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::layout::Looks;
use super::record::Recording;
use super::screen::Screen;
use super::svg::Animation;
use super::view::{self, View};
use super::{Failed, INTERRUPTED};

/// States of a recording that become a picture, at most.
const MAX_STATES: usize = 20_000;

/// Options of `denoised replay`.
#[derive(Debug, Args)]
pub(super) struct Replay {
    /// The recording, as `generate --record` and `infill --record` write it.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Milliseconds that each state is shown for; 0 to 60000.
    #[arg(long, value_name = "MS", default_value_t = view::PACE, value_parser = clap::value_parser!(u32).range(..=60_000))]
    pace: u32,
    /// Write an animated SVG instead of showing it.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Columns of the SVG, 20 to 400.
    #[arg(long, value_name = "N", default_value_t = 80, value_parser = clap::value_parser!(u16).range(20..=400))]
    columns: u16,
}

impl Replay {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let recording = Recording::open(&self.file)?;
        match &self.svg {
            Some(path) => {
                let svg = self.animation(recording)?.svg();
                std::fs::write(path, svg)
                    .map_err(|error| Failed::usage(format!("--svg {}: {error}", path.display())))
            }
            None => self.show(recording).await,
        }
    }

    fn animation(&self, mut recording: Recording) -> Result<Animation, Failed> {
        let mut screen = Screen::new(Looks::Coloured);
        let mut animation = Animation::default();
        let seconds = f64::from(self.pace.max(1)) / 1e3;
        for _ in 0..MAX_STATES {
            let Some(snapshot) = recording.next()? else {
                return Ok(animation);
            };
            screen.put(snapshot);
            let columns = self.columns.into();
            let mut lines = screen.lines(columns);
            lines.push(screen.progress(columns, 0));
            animation.show(lines, seconds);
        }
        Err(Failed::usage(format!(
            "{}: has more than {MAX_STATES} states, which no picture should",
            self.file.display()
        )))
    }

    async fn show(&self, mut recording: Recording) -> Result<(), Failed> {
        let mut view = if view::can_draw() {
            View::terminal()
        } else {
            View::Off
        };
        let mut out = io::stdout();
        let mut last = BTreeMap::new();
        let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
        while let Some(snapshot) = recording.next()? {
            last.insert(snapshot.canvas, snapshot.text());
            let View::Terminal(live) = &mut view else {
                continue;
            };
            Failed::unless_closed(live.show(snapshot, &mut out))?;
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(self.pace.into())) => {}
                _ = &mut interrupted => {
                    Failed::unless_closed(view.leave(&mut out))?;
                    return Err(Failed { code: INTERRUPTED, message: String::new() });
                }
            }
        }
        Failed::unless_closed(view.clear(&mut out))?;
        let many = last.len() > 1;
        for (canvas, text) in last {
            let heading = if many {
                format!("=== sample {canvas}\n")
            } else {
                String::new()
            };
            Failed::unless_closed(writeln!(out, "{heading}{text}"))?;
        }
        Ok(())
    }
}
