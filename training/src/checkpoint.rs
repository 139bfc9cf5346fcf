//! A run's state on disk: enough to go on as if it had never stopped.
//!
//! `<run>/checkpoints/<step>/` holds `network`, `average` and `optimizer` as Burn records and
//! `state.json`. A checkpoint is written under another name and renamed when complete, so that one
//! that is there is whole. The last [`KEPT`] and the best remain.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use burn::module::Module;
use burn::optim::OptimizerRecord;
use serde::{Deserialize, Serialize};

use crate::config::RunConfig;
use crate::ema::Ema;
use crate::network::{Ddit, NetworkConfig, inference_device, training_device};
use crate::trainer::{Trainer, objective};

/// How many of the latest checkpoints stay.
pub const KEPT: usize = 2;

const FORMAT: u32 = 1;
const NETWORK: &str = "network.bpk";
const AVERAGE: &str = "average.bpk";
const OPTIMIZER: &str = "optimizer.bpk";
const STATE: &str = "state.json";

/// What a checkpoint holds besides tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this layout.
    pub format: u32,
    /// Optimizer steps done.
    pub step: u64,
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
    /// Wall-clock budget that the schedule was squeezed into, where there was one.
    #[serde(default)]
    pub minutes: Option<f64>,
    /// Best validation bound so far, in nats per token, and its step.
    #[serde(default)]
    pub best: Option<(f64, u64)>,
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

/// The folder of a run's latest checkpoint.
pub fn latest(run: &Path) -> Result<PathBuf> {
    let step = steps(run)
        .pop()
        .with_context(|| format!("{} holds no checkpoint", root(run).display()))?;
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
    let draft = root(run).join(format!("draft-{}", state.step));
    if draft.exists() {
        fs::remove_dir_all(&draft).with_context(|| format!("cannot clear {}", draft.display()))?;
    }
    fs::create_dir_all(&draft).with_context(|| format!("cannot create {}", draft.display()))?;
    let context = || format!("cannot write {}", draft.display());
    trainer
        .network
        .valid()
        .into_record()
        .save(draft.join(NETWORK))
        .with_context(context)?;
    trainer
        .ema
        .network()
        .clone()
        .into_record()
        .save(draft.join(AVERAGE))
        .with_context(context)?;
    trainer
        .optimizer
        .to_record()
        .save(draft.join(OPTIMIZER))
        .with_context(context)?;
    fs::write(draft.join(STATE), serde_json::to_vec_pretty(state)?).with_context(context)?;
    if target.exists() {
        fs::remove_dir_all(&target).with_context(|| format!("cannot replace {}", target.display()))?;
    }
    fs::rename(&draft, &target).with_context(|| format!("cannot rename {}", draft.display()))?;

    let steps = steps(run);
    let best = state.best.map(|(_, step)| step);
    for &step in &steps[..steps.len().saturating_sub(KEPT)] {
        if Some(step) != best {
            let old = folder(run, step);
            fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
        }
    }
    Ok(target)
}

/// Reads the `state.json` of a checkpoint.
pub fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join(STATE);
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let state: State =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
    ensure!(
        state.format == FORMAT,
        "{} has format {}, this program reads {FORMAT}",
        path.display(),
        state.format
    );
    state
        .network
        .validate()
        .with_context(|| format!("{} is damaged", path.display()))?;
    Ok(state)
}

/// The averaged network of a checkpoint, for evaluation and export.
pub fn load_average(folder: &Path) -> Result<(Ddit, State)> {
    let state = read_state(folder)?;
    Ok((
        load_network(
            &folder.join(AVERAGE),
            state.network.init(0, 0.0, &inference_device())?,
        )?,
        state,
    ))
}

/// The run that a checkpoint belongs to, ready to go on under `config`.
pub fn resume(folder: &Path, config: RunConfig, shape: &NetworkConfig) -> Result<(Trainer, State)> {
    let state = read_state(folder)?;
    ensure!(
        &state.network == shape,
        "{} is of another network ({:?}) than the run's ({shape:?})",
        folder.display(),
        state.network
    );
    ensure!(
        state.config.run.seed == config.run.seed,
        "{} is of seed {}, the run's is {}",
        folder.display(),
        state.config.run.seed,
        config.run.seed
    );
    let network = load_network(&folder.join(NETWORK), shape.init(0, 0.0, &training_device())?)?;
    let average = load_network(&folder.join(AVERAGE), shape.init(0, 0.0, &inference_device())?)?;
    let path = folder.join(OPTIMIZER);
    let record = OptimizerRecord::load(&path).with_context(|| format!("{} is damaged", path.display()))?;
    let trainer = Trainer {
        objective: objective(&config, shape),
        optimizer: config.optimizer.adamw().load_record(record),
        ema: Ema::resume(config.optimizer.ema_decay, state.average_updates, average),
        network,
        config,
        step: state.step,
    };
    Ok((trainer, state))
}

fn load_network(path: &Path, network: Ddit) -> Result<Ddit> {
    let record =
        burn::store::ModuleRecord::load(path).with_context(|| format!("{} is damaged", path.display()))?;
    network
        .try_load_record(record)
        .with_context(|| format!("{} does not fit its state.json", path.display()))
}

impl State {
    /// The state of `trainer` after `seconds` of training.
    pub fn of(trainer: &Trainer, tokenizer_sha256: &str, seconds: f64) -> Self {
        Self {
            format: FORMAT,
            step: trainer.step,
            average_updates: trainer.ema.updates(),
            seconds,
            network: *trainer.network.config(),
            config: trainer.config.clone(),
            tokenizer_sha256: tokenizer_sha256.to_owned(),
            minutes: None,
            best: None,
        }
    }
}
