//! Recordings: what was seen of a request, in a file that can be played again without a server.
//!
//! A line of JSON that says what it is, then one for every state: what changed in its canvas since the state before.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Failed;
use super::canvas::{Position, Snapshot};

/// The form of recordings that is written and read.
const FORM: u32 = 1;
/// Bytes of a line, positions of a canvas, and canvases: more are not read.
const MAX_LINE: u64 = 64 << 20;
const MAX_LENGTH: usize = 1 << 20;
const MAX_CANVASES: usize = 1024;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    denoised_recording: u32,
}

/// A state, as it differs from the one before.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    seconds: f64,
    canvas: u32,
    step: u32,
    total: u32,
    nfe: u32,
    length: usize,
    changed: Vec<(usize, Position)>,
}

/// Writes a recording.
#[derive(Debug)]
pub(super) struct Recorder {
    file: BufWriter<File>,
    seen: BTreeMap<u32, Vec<Position>>,
    named: String,
}

impl Recorder {
    /// Begins a recording in a new file, or in place of an old one.
    pub(super) fn create(path: &Path) -> Result<Self, Failed> {
        let named = format!("--record {}", path.display());
        let file = File::create(path).map_err(|error| Failed::usage(format!("{named}: {error}")))?;
        let mut recorder = Self {
            file: BufWriter::new(file),
            seen: BTreeMap::new(),
            named,
        };
        recorder.line(&Head {
            denoised_recording: FORM,
        })?;
        Ok(recorder)
    }

    /// Records a state.
    pub(super) fn take(&mut self, snapshot: &Snapshot) -> Result<(), Failed> {
        let before = self.seen.get(&snapshot.canvas);
        let is_new = |(at, position): &(usize, &Position)| {
            before.and_then(|before| before.get(*at)) != Some(*position)
        };
        let changed = snapshot.positions.iter().enumerate().filter(is_new);
        let state = State {
            seconds: snapshot.seconds,
            canvas: snapshot.canvas,
            step: snapshot.step,
            total: snapshot.total,
            nfe: snapshot.nfe,
            length: snapshot.positions.len(),
            changed: changed.map(|(at, position)| (at, position.clone())).collect(),
        };
        self.seen.insert(snapshot.canvas, snapshot.positions.clone());
        self.line(&state)
    }

    /// Ends the recording: all of it is in the file then.
    pub(super) fn end(mut self) -> Result<(), Failed> {
        self.file
            .flush()
            .map_err(|error| Failed::software(format!("{}: {error}", self.named)))
    }

    fn line(&mut self, line: &impl Serialize) -> Result<(), Failed> {
        let written = serde_json::to_writer(&mut self.file, line)
            .map_err(std::io::Error::from)
            .and_then(|()| self.file.write_all(b"\n"));
        written.map_err(|error| Failed::software(format!("{}: {error}", self.named)))
    }
}

/// Reads a recording.
#[derive(Debug)]
pub(super) struct Recording {
    file: BufReader<File>,
    seen: BTreeMap<u32, Vec<Position>>,
    named: String,
    line: usize,
}

impl Recording {
    pub(super) fn open(path: &Path) -> Result<Self, Failed> {
        let named = path.display().to_string();
        let file = File::open(path).map_err(|error| Failed::usage(format!("{named}: {error}")))?;
        let mut recording = Self {
            file: BufReader::new(file),
            seen: BTreeMap::new(),
            named,
            line: 0,
        };
        match recording.read::<Head>()? {
            Some(Head {
                denoised_recording: FORM,
            }) => Ok(recording),
            Some(Head { denoised_recording }) => {
                let problem = format!("has form {denoised_recording}, this version reads form {FORM}");
                Err(recording.wrong(problem))
            }
            None => Err(recording.wrong("is empty")),
        }
    }

    /// The next state.
    pub(super) fn next(&mut self) -> Result<Option<Snapshot>, Failed> {
        let Some(state) = self.read::<State>()? else {
            return Ok(None);
        };
        if state.length > MAX_LENGTH {
            return Err(self.wrong(format!(
                "has {} positions, at most {MAX_LENGTH} are read",
                state.length
            )));
        }
        if self.seen.len() >= MAX_CANVASES && !self.seen.contains_key(&state.canvas) {
            return Err(self.wrong(format!("has more than {MAX_CANVASES} canvases")));
        }
        let positions = self.seen.entry(state.canvas).or_default();
        let outside = state.changed.iter().find(|(at, _)| *at >= state.length);
        if let Some((at, _)) = outside {
            let problem = format!("changes position {at} of {}", state.length);
            return Err(self.wrong(problem));
        }
        positions.truncate(state.length);
        for (at, position) in state.changed {
            let known = positions.len();
            match positions.get_mut(at) {
                Some(known) => *known = position,
                None if at == known => positions.push(position),
                None => return Err(self.wrong(format!("leaves out positions before {at}"))),
            }
        }
        if positions.len() != state.length {
            let problem = format!("has {} positions of {}", positions.len(), state.length);
            return Err(self.wrong(problem));
        }
        Ok(Some(Snapshot {
            seconds: state.seconds,
            canvas: state.canvas,
            step: state.step,
            total: state.total,
            nfe: state.nfe,
            positions: positions.clone(),
        }))
    }

    fn read<T: for<'de> Deserialize<'de>>(&mut self) -> Result<Option<T>, Failed> {
        self.line += 1;
        let mut line = Vec::new();
        let mut bounded = (&mut self.file).take(MAX_LINE);
        if let Err(error) = bounded.read_until(b'\n', &mut line) {
            return Err(self.wrong(error));
        }
        if line.is_empty() {
            return Ok(None);
        }
        // The last line of a recording that was broken off.
        if line.last() != Some(&b'\n') {
            let problem = if line.len() as u64 == MAX_LINE {
                format!("is longer than {MAX_LINE} bytes")
            } else {
                "has no end".to_owned()
            };
            return Err(self.wrong(problem));
        }
        serde_json::from_slice(&line)
            .map(Some)
            .map_err(|error| self.wrong(error))
    }

    fn wrong(&self, problem: impl std::fmt::Display) -> Failed {
        Failed::usage(format!(
            "{}: line {} is no state of a recording (denoised generate --record): {problem}",
            self.named, self.line
        ))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::canvas::Held;
    use super::*;

    fn snapshot(canvas: u32, step: u32, texts: &[&str]) -> Snapshot {
        let position = |text: &&str| Position {
            text: (*text).to_owned(),
            held: match *text {
                "" => Held::Masked,
                "given" => Held::Given,
                _ => Held::Drawn {
                    step,
                    log_probability: -0.25,
                },
            },
        };
        Snapshot {
            seconds: f64::from(step) / 8.0,
            canvas,
            step,
            total: 2,
            nfe: step,
            positions: texts.iter().map(position).collect(),
        }
    }

    #[test]
    fn what_was_recorded_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let states = [
            snapshot(0, 0, &["given", "", ""]),
            snapshot(1, 0, &["", ""]),
            snapshot(0, 1, &["given", "a", ""]),
            snapshot(0, 2, &["given", "a", "\u{1b}"]),
            snapshot(1, 2, &["b", "c"]),
        ];
        let mut recorder = Recorder::create(&path).unwrap();
        states.iter().for_each(|state| recorder.take(state).unwrap());
        recorder.end().unwrap();
        // Only what changed is written.
        let written = std::fs::read_to_string(&path).unwrap();
        assert_eq!(written.matches("given\"").count(), 2, "{written}");
        let mut recording = Recording::open(&path).unwrap();
        for state in &states {
            assert_eq!(recording.next().unwrap().as_ref(), Some(state));
        }
        assert_eq!(recording.next().unwrap(), None);
    }

    #[test]
    fn what_is_no_recording_is_refused_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let state = |length: usize, changed: &str| {
            format!(
                "{{\"denoised_recording\":1}}\n{{\"seconds\":0,\"canvas\":0,\"step\":0,\"total\":1,\"nfe\":0,\"length\":{length},\"changed\":{changed}}}\n"
            )
        };
        let masked = |at: usize| format!("[{at},{{\"text\":\"\",\"held\":\"masked\"}}]");
        for (text, says) in [
            (
                String::new(),
                "line 1 is no state of a recording (denoised generate --record): is empty",
            ),
            ("{\"denoised_recording\":9}\n".to_owned(), "has form 9"),
            ("{}\n".to_owned(), "denoised_recording"),
            (state(2, &format!("[{}]", masked(0))), "has 1 positions of 2"),
            (state(2, &format!("[{}]", masked(5))), "changes position 5 of 2"),
            (
                state(2, &format!("[{}]", masked(1))),
                "leaves out positions before 1",
            ),
            (state(usize::MAX, "[]"), "at most 1048576"),
            (
                state(0, "[]").trim_end().to_owned(),
                "line 2 is no state of a recording (denoised generate --record): has no end",
            ),
        ] {
            std::fs::write(&path, &text).unwrap();
            let failed = Recording::open(&path)
                .and_then(|mut recording| recording.next())
                .unwrap_err();
            assert!(failed.message.contains(says), "{text}: {}", failed.message);
            assert_eq!(failed.code, super::super::USAGE);
        }
    }
}
