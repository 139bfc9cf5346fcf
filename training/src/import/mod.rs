//! Published and foreign checkpoints, as weights of our network: of SEDD, of RADD, whose code goes back to SEDD's, and of
//! MDLM, whose network is the same under names that begin with `backbone.`.
//!
//! Two layouts are read, told apart by their files:
//!
//! ```text
//! config.json, model.safetensors | pytorch_model.bin      as on the Hugging Face hub
//! .hydra/config.yaml, checkpoints-meta/checkpoint.pth     a run of the training code of SEDD or RADD
//! ```
//!
//! A run holds weights twice, as they were trained and averaged; the averaged ones are meant to be used
//! ([`Choice::Averaged`]). Every tensor's name and shape is checked against what the configuration asks for.

mod configuration;
mod radd;
mod weights;

use std::fs::File;
use std::path::{Path, PathBuf};

use denoised::bundle::sha256_of;
use denoised::diffusion::{GraphKind, Schedule};
use thiserror::Error;

use configuration::Family;

use crate::model::state_dict::{Misfits, StateDict};
use crate::model::{NetworkConfig, NetworkError};

/// A checkpoint, checked.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What its configuration calls it.
    pub name: Option<String>,
    /// Shape of the network.
    pub network: NetworkConfig,
    /// The noise process it was trained on.
    pub graph: GraphKind,
    /// The noise schedule it was trained with.
    pub schedule: Schedule,
    /// Its weights; each fits, and none is left over.
    pub weights: StateDict,
    /// The file that the weights come from.
    pub file: PathBuf,
}

/// Which weights of a training run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// The moving average (`ema.shadow_params`).
    #[default]
    Averaged,
    /// The last ones (`model`).
    Last,
}

/// A checkpoint that cannot be used.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The file system said no.
    #[error("cannot read {path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Neither of the two layouts.
    #[error(
        "{path} is no checkpoint: expected config.json with model.safetensors or pytorch_model.bin, or \
         .hydra/config.yaml with checkpoints-meta/checkpoint.pth",
        path = path.display()
    )]
    Layout {
        /// The folder.
        path: PathBuf,
    },
    /// A configuration that cannot be understood.
    #[error("{path}: {problem}", path = path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of weights that cannot be understood.
    #[error("{path}: {problem}", path = path.display())]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A shape that cannot be built.
    #[error("{path}: {source}", path = path.display())]
    Network {
        /// The configuration.
        path: PathBuf,
        /// What is wrong with the shape.
        source: NetworkError,
    },
    /// Weights of another network.
    #[error("{path} does not fit {configuration}:{misfits}",
        path = path.display(), configuration = configuration.display())]
    Misfits {
        /// The file of weights.
        path: PathBuf,
        /// The configuration they should fit.
        configuration: PathBuf,
        /// Every tensor that is missing, left over or of another shape.
        misfits: Misfits,
    },
}

/// Reads the checkpoint in `directory`.
pub fn read(directory: &Path, choice: Choice) -> Result<Checkpoint, ImportError> {
    let published = directory.join("config.json");
    let run = directory.join(".hydra/config.yaml");
    let (path, layout) = if published.is_file() {
        (published, Layout::Published)
    } else if run.is_file() {
        (run, Layout::Run)
    } else {
        return Err(ImportError::Layout {
            path: directory.to_owned(),
        });
    };
    let configuration = configuration::read(&path)?;
    let source = weights::Source::open(directory, layout)?;
    let last = source.read()?;
    let family = configuration.family(radd::is_one(&last));
    let network = configuration.network(family, &path)?;
    let parameters = match family {
        Family::Radd => radd::parameters(&network),
        Family::Sedd | Family::Mdlm => network.parameters(),
    };
    let (file, weights) = source.chosen(choice, last, &parameters)?;
    let misfits = weights.misfits(&parameters);
    if !misfits.0.is_empty() {
        return Err(ImportError::Misfits {
            path: file,
            configuration: path,
            misfits,
        });
    }
    let weights = match family {
        Family::Radd => radd::converted(weights, &network),
        Family::Sedd | Family::Mdlm => weights,
    };
    Ok(Checkpoint {
        name: configuration.name(),
        graph: configuration.graph(),
        schedule: configuration.schedule(),
        network,
        weights,
        file,
    })
}

/// sha256 of a file, hexadecimal, without holding it in memory.
pub fn sha256(path: &Path) -> Result<String, ImportError> {
    File::open(path)
        .and_then(sha256_of)
        .map_err(|source| ImportError::Io {
            path: path.to_owned(),
            source,
        })
}

#[derive(Clone, Copy)]
enum Layout {
    Published,
    Run,
}
