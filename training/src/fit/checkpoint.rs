//! A run's state on disk: enough to go on as if it had never stopped.
//!
//! `<run>/checkpoints/<step>/` holds `network`, `average` and `optimizer` as Burn records and
//! `state.json`, which has their hashes. A checkpoint is written under another name, made durable and
//! renamed when complete, so that one that is there is whole; what damages it later is found by its
//! hashes. One that is there is never written again. The last `run.keep` and the best remain.
//! Checkpoints that `--resume-from` went back behind become `abandoned-<step>`, for people to delete.

mod error;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use burn::Tensor;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::OptimizerRecord;
use denoised::diffusion::Token;
use serde::{Deserialize, Serialize};

pub use self::error::{CheckpointError, Damage};
use crate::config::RunConfig;
use crate::fit::divergence::DivergenceWatch;
use crate::fit::file::{FileError, sha256, write_durably};
use crate::fit::step::{Trainer, objective};
use crate::model::device::Devices;
use crate::model::{Ddit, NetworkConfig, inference_device};
use crate::optim::ema::Ema;

type Result<T, E = CheckpointError> = std::result::Result<T, E>;

const FORMAT: u32 = 1;
const NETWORK: &str = "network.bpk";
const AVERAGE: &str = "average.bpk";
const OPTIMIZER: &str = "optimizer.bpk";
pub(crate) const STATE: &str = "state.json";
const DRAFT: &str = "draft-";
const ABANDONED: &str = "abandoned-";

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this layout.
    pub format: u32,
    /// Name of the run, drawn when it began.
    #[serde(default)]
    pub run: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens learned from.
    #[serde(default)]
    pub tokens: u64,
    /// Updates of the moving average.
    pub average_updates: u64,
    /// Seconds of training so far, all sessions together.
    pub seconds: f64,
    /// Shape of the network.
    pub network: NetworkConfig,
    /// The run.
    pub config: RunConfig,
    /// sha256 of the tokenizer its tokens were made with.
    pub tokenizer_sha256: String,
    /// The token that ends its documents; checkpoints of older versions do not say.
    #[serde(default)]
    pub end_of_document: Option<Token>,
    /// Wall-clock budget that the schedule was squeezed into, where there was one.
    #[serde(default)]
    pub minutes: Option<f64>,
    /// Best validation bound so far, in nats per token, and its step.
    #[serde(default)]
    pub best: Option<(f64, u64)>,
    /// The course of the loss.
    #[serde(default)]
    pub watch: DivergenceWatch,
    /// sha256 of the files beside `state.json`.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

fn root(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

/// Steps of the complete checkpoints of a run, ascending.
pub fn steps(run: &Path) -> Vec<u64> {
    let mut steps: Vec<u64> = fs::read_dir(root(run))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    steps.sort_unstable();
    steps
}

/// Whether `folder` is that of a checkpoint.
pub fn is_checkpoint(folder: &Path) -> bool {
    folder.join(STATE).is_file() && folder.join(AVERAGE).is_file()
}

/// The folder of a run's latest checkpoint.
pub fn latest(run: &Path) -> Result<PathBuf> {
    let step = steps(run)
        .pop()
        .ok_or_else(|| CheckpointError::NoneYet(root(run)))?;
    Ok(folder(run, step))
}

/// One of a run's checkpoints, as one asks for it: `last`, `best` or the steps done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Which {
    /// The latest.
    #[default]
    Last,
    /// The one with the best validation bound.
    Best,
    /// The one after so many steps.
    After(u64),
}

impl Which {
    /// Its folder in the directory of `run`.
    pub fn folder(self, run: &Path) -> Result<PathBuf> {
        let last = latest(run)?;
        let step = match self {
            Self::Last => return Ok(last),
            Self::Best => {
                let best = read_state(&last)?.best;
                let (_, step) = best.ok_or_else(|| CheckpointError::NotValidated(run.to_owned()))?;
                step
            }
            Self::After(step) => step,
        };
        existing(run, step)
    }
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "last" => Ok(Self::Last),
            "best" => Ok(Self::Best),
            step => match step.parse() {
                Ok(step) => Ok(Self::After(step)),
                Err(_) => Err("must be last, best, or a number of steps".to_owned()),
            },
        }
    }
}

/// The folder of the checkpoint after `step` steps, if it is there.
fn existing(run: &Path, step: u64) -> Result<PathBuf> {
    let steps = steps(run);
    if !steps.contains(&step) {
        let run = run.to_owned();
        return Err(CheckpointError::NoSuchStep { run, step, steps });
    }
    Ok(folder(run, step))
}

/// The folder of the checkpoint after `step` steps.
pub fn folder(run: &Path, step: u64) -> PathBuf {
    root(run).join(format!("{step:08}"))
}

/// Writes `trainer`'s state and drops checkpoints that are neither among the last nor the best.
pub fn save(trainer: &Trainer, state: &State) -> Result<PathBuf> {
    let run = &state.config.run.directory;
    let target = folder(run, state.step);
    if target.exists() {
        return Err(CheckpointError::Exists(target));
    }
    if !is_finite(&trainer.network) || !is_finite(trainer.ema.network()) {
        return Err(CheckpointError::NotFinite(state.step));
    }
    let draft = draft(run, state.step);
    if let Err(error) = write(trainer, state, &draft, &target) {
        // Half a checkpoint is of no use, and what is left may be all the room there is.
        drop(fs::remove_dir_all(&draft));
        return Err(error);
    }
    let steps = steps(run);
    let best = state.best.map(|(_, step)| step);
    let kept = state.config.run.keep;
    for &step in &steps[..steps.len().saturating_sub(kept)] {
        if Some(step) != best {
            remove(run, step)?;
        }
    }
    Ok(target)
}

/// Takes a checkpoint away before it is no longer whole.
fn remove(run: &Path, step: u64) -> Result<(), FileError> {
    let (old, draft) = (folder(run, step), draft(run, step));
    fs::rename(&old, &draft)
        .and_then(|()| fs::remove_dir_all(&draft))
        .map_err(FileError::cannot("remove", &old))
}

/// Where a checkpoint lies until it is complete.
pub(crate) fn draft(run: &Path, step: u64) -> PathBuf {
    root(run).join(format!("{DRAFT}{step}"))
}

fn write(trainer: &Trainer, state: &State, draft: &Path, target: &Path) -> Result<()> {
    if draft.exists() {
        fs::remove_dir_all(draft).map_err(FileError::cannot("clear", draft))?;
    }
    fs::create_dir_all(draft).map_err(FileError::cannot("create", draft))?;
    let average = trainer.ema.network().clone().into_record();
    // Burn makes each of its files durable.
    for (name, written) in [
        (
            NETWORK,
            trainer.network.valid().into_record().save(draft.join(NETWORK)),
        ),
        (AVERAGE, average.save(draft.join(AVERAGE))),
        (
            OPTIMIZER,
            trainer.optimizer.to_record().save(draft.join(OPTIMIZER)),
        ),
    ] {
        let path = draft.join(name);
        written.map_err(|source| CheckpointError::Tensors { path, source })?;
    }
    let mut state = state.clone();
    state.files = [NETWORK, AVERAGE, OPTIMIZER]
        .into_iter()
        .map(|name| Ok((name.to_owned(), sha256(&draft.join(name))?)))
        .collect::<Result<_>>()?;
    let json = serde_json::to_vec_pretty(&state).map_err(CheckpointError::State)?;
    write_durably(&draft.join(STATE), &json)?;
    File::open(draft)
        .and_then(|folder| folder.sync_all())
        .map_err(FileError::cannot("write", draft))?;
    fs::rename(draft, target)
        .and_then(|()| File::open(target.parent().unwrap_or(target))?.sync_all())
        .map_err(FileError::cannot("rename", draft))?;
    Ok(())
}

fn is_finite(network: &Ddit) -> bool {
    let mut entries = Entries(Vec::new());
    network.visit(&mut entries);
    // What is finite times 0 is 0, all else NaN.
    let sums = Tensor::cat(entries.0, 0).into_data();
    sums.iter::<f32>().all(|sum| sum == 0.0)
}

struct Entries(Vec<Tensor<1>>);

impl ModuleVisitor for Entries {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.val().detach().mul_scalar(0.0).sum());
    }
}

/// Reads the `state.json` of a checkpoint.
pub fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join(STATE);
    let text = fs::read(&path).map_err(FileError::cannot("read", &path))?;
    let state: State = serde_json::from_slice(&text).map_err(CheckpointError::damaged(&path))?;
    if state.format != FORMAT {
        return Err(CheckpointError::Format {
            path,
            format: state.format,
            reads: FORMAT,
        });
    }
    state
        .network
        .validate()
        .map_err(CheckpointError::damaged(&path))?;
    Ok(state)
}

/// Whether a checkpoint's files are what was written.
pub fn verify(folder: &Path) -> Result<State> {
    let state = read_state(folder)?;
    for name in [NETWORK, AVERAGE, OPTIMIZER] {
        check(folder, &state, name)?;
    }
    Ok(state)
}

fn check(folder: &Path, state: &State, name: &str) -> Result<()> {
    let path = folder.join(name);
    let found = sha256(&path)?;
    // The first checkpoints of this format had no hashes.
    if state.files.get(name).is_some_and(|written| *written != found) {
        return Err(CheckpointError::Hash { path, found });
    }
    Ok(())
}

/// The checkpoint of a run to go on from: the latest, or the one after `step` steps. Where it is
/// damaged, the error names the latest one that is whole.
pub fn choose(run: &Path, step: Option<u64>) -> Result<PathBuf> {
    let chosen = match step {
        None => latest(run)?,
        Some(step) => existing(run, step)?,
    };
    let Err(damage) = verify(&chosen) else {
        return Ok(chosen);
    };
    let whole = steps(run)
        .into_iter()
        .rev()
        .find(|&step| folder(run, step) != chosen && verify(&folder(run, step)).is_ok());
    let source = Box::new(damage);
    Err(match whole {
        Some(step) => CheckpointError::GoBack {
            folder: chosen,
            whole: folder(run, step),
            step,
            source,
        },
        None => CheckpointError::NoneWhole {
            folder: chosen,
            source,
        },
    })
}

/// Takes the checkpoints after `step` steps out of the run, and keeps them under another name.
pub fn abandon_after(run: &Path, step: u64) -> Result<(), FileError> {
    for later in steps(run).into_iter().filter(|later| *later > step) {
        let (from, to) = (
            folder(run, later),
            root(run).join(format!("{ABANDONED}{later:08}")),
        );
        if to.exists() {
            fs::remove_dir_all(&to).map_err(FileError::cannot("remove", &to))?;
        }
        fs::rename(&from, &to).map_err(FileError::cannot("rename", &from))?;
    }
    Ok(())
}

/// Removes what saves that were cut short left behind.
pub fn clear_drafts(run: &Path) -> Result<(), FileError> {
    for entry in fs::read_dir(root(run)).into_iter().flatten() {
        let path = entry.map_err(FileError::cannot("read", &root(run)))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(DRAFT) {
            fs::remove_dir_all(&path).map_err(FileError::cannot("remove", &path))?;
        }
    }
    Ok(())
}

/// The averaged network of a checkpoint, for evaluation and export.
pub fn load_average(folder: &Path) -> Result<(Ddit, State)> {
    let state = read_state(folder)?;
    check(folder, &state, AVERAGE)?;
    Ok((
        load_network(
            &folder.join(AVERAGE),
            state.network.init(0, 0.0, &inference_device())?,
        )?,
        state,
    ))
}

/// The run that a checkpoint belongs to, ready to go on under `config`.
pub fn resume(
    folder: &Path,
    config: RunConfig,
    shape: &NetworkConfig,
    devices: Devices,
) -> Result<(Trainer, State)> {
    let state = read_state(folder)?;
    if &state.network != shape {
        return Err(CheckpointError::OtherNetwork {
            folder: folder.to_owned(),
            theirs: Box::new(state.network),
            ours: Box::new(*shape),
        });
    }
    let (theirs, ours) = (state.config.run.seed, config.run.seed);
    if theirs != ours {
        return Err(CheckpointError::OtherSeed {
            folder: folder.to_owned(),
            theirs,
            ours,
        });
    }
    let network = load_network(&folder.join(NETWORK), shape.init(0, 0.0, &devices.training())?)?;
    let average = load_network(&folder.join(AVERAGE), shape.init(0, 0.0, &devices.inference())?)?;
    let path = folder.join(OPTIMIZER);
    let record = OptimizerRecord::load(&path).map_err(CheckpointError::damaged(&path))?;
    let trainer = Trainer {
        objective: objective(&config, shape),
        optimizer: config.optimizer.build().load_record(record),
        ema: Ema::resume(config.optimizer.ema_decay, state.average_updates, average),
        network,
        config,
        devices,
        step: state.step,
    };
    Ok((trainer, state))
}

fn load_network(path: &Path, network: Ddit) -> Result<Ddit> {
    let record = burn::store::ModuleRecord::load(path).map_err(CheckpointError::damaged(path))?;
    network
        .try_load_record(record)
        .map_err(|source| CheckpointError::Misfit {
            path: path.to_owned(),
            source,
        })
}

impl State {
    /// The state of `trainer`, in the run of that name, after `seconds` of training.
    pub fn of(trainer: &Trainer, run: &str, tokenizer_sha256: &str, seconds: f64) -> Self {
        Self {
            format: FORMAT,
            run: run.to_owned(),
            step: trainer.step,
            tokens: 0,
            average_updates: trainer.ema.updates(),
            seconds,
            network: *trainer.network.config(),
            config: trainer.config.clone(),
            tokenizer_sha256: tokenizer_sha256.to_owned(),
            end_of_document: None,
            minutes: None,
            best: None,
            watch: DivergenceWatch::default(),
            files: BTreeMap::new(),
        }
    }
}
