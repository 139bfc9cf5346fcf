//! The directory of a run: what happened, for people and programs to read while it happens.
//!
//! | file | what it holds |
//! |---|---|
//! | `config.toml` | the run's settings, every default written out |
//! | `metrics.jsonl` | a [`Line`] for every `run.log_every` steps and for every validation |
//! | `loss.svg`, `bound.svg` | curves, by `training fit` in the end and by `training report` |
//! | `samples/STEP.txt` | what the averaged network wrote after that many steps |
//! | `provenance.json` | [`Provenance`]: programs, data and machine, for each time it was started |
//! | `checkpoints/` | see [`checkpoint`](crate::fit::checkpoint) |
//! | `lock` | held while the run goes on, so that two cannot write here |
//! | `report.html` | all of that on one page, by `training report` |
//!
//! A resumed run drops what was recorded after the checkpoint it goes on from, so that every step is
//! recorded once.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::config::RunConfig;
pub use crate::evaluate::bound::TIME_PARTS;
use crate::fit::file::{FileError, replace, sha256};

/// Settings, every default written out.
pub const CONFIG: &str = "config.toml";
/// What was measured.
pub const METRICS: &str = "metrics.jsonl";
/// Programs, data and machine.
pub const PROVENANCE: &str = "provenance.json";
/// Folder of samples.
pub const SAMPLES: &str = "samples";
const LOCK: &str = "lock";
/// How many starts of a run are remembered.
const SESSIONS: usize = 100;

/// Why a run's directory cannot be written to.
#[derive(Debug, Error)]
pub enum RecordError {
    /// A file or folder fails.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process has it.
    #[error("another process trains in {}", .0.display())]
    Busy(PathBuf),
    /// Settings have no TOML form.
    #[error(transparent)]
    Toml(#[from] toml::ser::Error),
    /// What happened has no JSON form.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Line {
    /// An optimizer step.
    Step(StepRecord),
    /// An estimate of the bound on held-out text.
    Validation(ValidationRecord),
}

/// An optimizer step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Tokens learned from.
    pub tokens: u64,
    /// Seconds of training, all sessions together.
    pub seconds: f64,
    /// Loss of this step's batch, in nats per token.
    pub loss: f64,
    /// Exponential average over about the last 50 steps.
    pub smoothed_loss: f64,
    /// Euclidean norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Speed of training over the last steps, without validation and checkpoints.
    pub tokens_per_second: f64,
}

/// An estimate of the bound on held-out text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// Steps done.
    pub step: u64,
    /// Tokens learned from.
    pub tokens: u64,
    /// Seconds of training, all sessions together.
    pub seconds: f64,
    /// The bound, in nats per token.
    pub bound: f64,
    /// Its standard error.
    pub standard_error: f64,
    /// What each quarter of the times adds to it, from nearly clean text to nearly all noise; 0 where that was not
    /// recorded.
    #[serde(default)]
    pub by_time: [f64; TIME_PARTS],
}

impl Line {
    /// Steps done.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(line) => line.step,
            Self::Validation(line) => line.step,
        }
    }
}

/// What made a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The tokens to train on.
    pub train: DataFile,
    /// Other tokens that are mixed in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixture: Vec<DataFile>,
    /// The held-out tokens.
    pub validation: DataFile,
    /// sha256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// Numbers that the network learns.
    pub parameters: u64,
    /// Every start of the run, first to last.
    pub sessions: Vec<Session>,
}

/// A token file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataFile {
    /// Where it was.
    pub path: PathBuf,
    /// Its hash.
    pub sha256: String,
    /// Tokens in it.
    pub tokens: u64,
    /// Bytes of text that they encode.
    pub bytes: u64,
}

/// One start of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// When, in UTC (RFC 3339).
    pub started: String,
    /// Steps that were done before.
    pub from_step: u64,
    /// Version of this program.
    pub training: String,
    /// Version of Burn, which does the arithmetic.
    pub burn: String,
    /// Operating system and processor.
    pub machine: String,
    /// Processors that the run could use.
    pub cpus: usize,
    /// What was asked for.
    #[serde(default)]
    pub command: Vec<String>,
    /// The commit of the repository that the run's file lies in, with `-dirty` behind it where files were changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
}

impl Session {
    /// One that starts now, of a run whose file lies in `folder`, where it has one.
    pub fn now(from_step: u64, folder: Option<&Path>) -> Self {
        Self {
            started: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            from_step,
            training: env!("CARGO_PKG_VERSION").to_owned(),
            burn: burn_version().unwrap_or_default(),
            machine: machine(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            command: std::env::args_os()
                .map(|argument| argument.to_string_lossy().into_owned())
                .collect(),
            commit: folder.and_then(commit),
        }
    }
}

/// Operating system, architecture and, where Linux tells it, the processor.
fn machine() -> String {
    let [system, architecture] = [std::env::consts::OS, std::env::consts::ARCH];
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpus.lines().find_map(|line| line.strip_prefix("model name"));
    match name.and_then(|name| Some(name.split_once(':')?.1.trim())) {
        Some(name) => format!("{system} {architecture}, {name}"),
        None => format!("{system} {architecture}"),
    }
}

/// The commit that git has checked out around `folder`; none without git or a repository.
fn commit(folder: &Path) -> Option<String> {
    let describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"];
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(describe)
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let commit = String::from_utf8(output.stdout)
        .ok()
        .filter(|_| output.status.success())?;
    Some(commit.trim().to_owned())
}

/// Burn's version is pinned in the manifest and told nowhere else.
fn burn_version() -> Option<String> {
    let manifest: toml::Table = include_str!("../../Cargo.toml").parse().ok()?;
    let burn = manifest.get("dependencies")?.get("burn")?;
    Some(burn.get("version")?.as_str()?.trim_start_matches('=').to_owned())
}

impl DataFile {
    /// The token file at `path`.
    pub fn of(path: &Path, tokens: usize, bytes: u64) -> Result<Self, FileError> {
        Ok(Self {
            path: path.to_owned(),
            sha256: sha256(path)?,
            tokens: tokens as u64,
            bytes,
        })
    }
}

/// Keeps a run's directory to one process, until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Creates `directory` where it is missing.
    pub fn acquire(directory: &Path) -> Result<Self, RecordError> {
        fs::create_dir_all(directory).map_err(FileError::cannot("create", directory))?;
        let path = directory.join(LOCK);
        let file = File::create(&path).map_err(FileError::cannot("create", &path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(RecordError::Busy(directory.to_owned())),
            // Not every file system has locks, and a run can do without.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
        }
    }
}

/// Writes into a run's directory.
#[derive(Debug)]
pub struct Recorder {
    directory: PathBuf,
    metrics: File,
    _lock: Lock,
}

impl Recorder {
    /// Goes on after `step` steps; what was recorded later is dropped.
    pub fn open(lock: Lock, config: &RunConfig, step: u64) -> Result<Self, RecordError> {
        let directory = config.run.directory.clone();
        replace(
            &directory.join(CONFIG),
            toml::to_string_pretty(config)?.as_bytes(),
        )?;
        let path = directory.join(METRICS);
        let mut metrics = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(FileError::cannot("write", &path))?;
        let end = kept(&metrics, step).map_err(FileError::cannot("read", &path))?;
        metrics
            .set_len(end)
            .and_then(|()| metrics.seek(SeekFrom::End(0)))
            .map_err(FileError::cannot("write", &path))?;

        let samples = directory.join(SAMPLES);
        for later in sample_steps(&directory).into_iter().filter(|later| *later > step) {
            let path = samples.join(sample_name(later));
            fs::remove_file(&path).map_err(FileError::cannot("remove", &path))?;
        }
        Ok(Self {
            directory,
            metrics,
            _lock: lock,
        })
    }

    /// Adds `session` to what is known of the run's making. Returns what it said of the data before.
    pub fn provenance(
        &self,
        mut now: Provenance,
        session: Session,
    ) -> Result<Option<Provenance>, RecordError> {
        let before = read_provenance(&self.directory).filter(|_| session.from_step > 0);
        now.sessions = before
            .as_ref()
            .map(|before| before.sessions.clone())
            .unwrap_or_default();
        now.sessions.push(session);
        let excess = now.sessions.len().saturating_sub(SESSIONS);
        now.sessions.drain(..excess);
        replace(
            &self.directory.join(PROVENANCE),
            &serde_json::to_vec_pretty(&now)?,
        )?;
        Ok(before)
    }

    /// Appends a line, in one piece.
    pub fn record(&mut self, line: Line) -> Result<(), RecordError> {
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        self.metrics
            .write_all(&text)
            .map_err(FileError::cannot("write", &self.directory.join(METRICS)))?;
        Ok(())
    }

    /// Leaves what the network wrote after `step` steps.
    pub fn sample(&self, step: u64, texts: &[String]) -> Result<(), FileError> {
        let folder = self.directory.join(SAMPLES);
        fs::create_dir_all(&folder).map_err(FileError::cannot("create", &folder))?;
        let count = texts.len();
        let numbered: String = texts
            .iter()
            .enumerate()
            .map(|(index, text)| format!("--- {} of {count} ---\n{text}\n", index + 1))
            .collect();
        replace(&folder.join(sample_name(step)), numbered.as_bytes())
    }

    /// Waits until the disk has all lines, so that no checkpoint is ahead of them.
    pub fn sync(&self) -> Result<(), FileError> {
        self.metrics
            .sync_data()
            .map_err(FileError::cannot("write", &self.directory.join(METRICS)))
    }
}

/// Where the last line of up to `step` steps ends.
fn kept(metrics: &File, step: u64) -> io::Result<u64> {
    let (mut place, mut end) = (0, 0);
    // A run that starts afresh has not recorded anything.
    if step > 0 {
        read_lines(metrics, |line, length| {
            place += length;
            if line.is_some_and(|line| line.step() <= step) {
                end = place;
            }
        })?;
    }
    Ok(end)
}

/// Hands every line of `metrics.jsonl` and its length to `each`; lines cut short are `None`.
fn read_lines(metrics: &File, mut each: impl FnMut(Option<Line>, u64)) -> io::Result<()> {
    let mut reader = BufReader::new(metrics);
    let mut text = Vec::new();
    loop {
        text.clear();
        let length = reader.read_until(b'\n', &mut text)?;
        if length == 0 {
            return Ok(());
        }
        let whole = text.ends_with(b"\n");
        let line = serde_json::from_slice(&text).ok().filter(|_| whole);
        each(line, length as u64);
    }
}

/// Hands every line that the run in `directory` has recorded to `each`, in order.
pub fn read(directory: &Path, mut each: impl FnMut(Line)) -> Result<(), FileError> {
    let path = directory.join(METRICS);
    File::open(&path)
        .and_then(|metrics| read_lines(&metrics, |line, _| line.into_iter().for_each(&mut each)))
        .map_err(FileError::cannot("read", &path))
}

/// What made a run, where that is recorded.
pub fn read_provenance(directory: &Path) -> Option<Provenance> {
    serde_json::from_slice(&fs::read(directory.join(PROVENANCE)).ok()?).ok()
}

/// Steps after which there are samples, ascending.
pub fn sample_steps(directory: &Path) -> Vec<u64> {
    let mut steps: Vec<u64> = fs::read_dir(directory.join(SAMPLES))
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_suffix(".txt")?.parse().ok()
        })
        .collect();
    steps.sort_unstable();
    steps
}

/// Name of the file of samples after `step` steps.
pub fn sample_name(step: u64) -> String {
    format!("{step:08}.txt")
}
