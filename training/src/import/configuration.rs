//! What is written down about a model. `config.json` and Hydra's `config.yaml` of SEDD and RADD hold the same keys; MDLM's
//! `config.json` is one of Hugging Face's `transformers`.

use std::fs;
use std::path::Path;

use denoised::diffusion::Parameterization;
use denoised::diffusion::{GraphKind, Schedule};
use serde::Deserialize;

use super::ImportError;
use crate::model::NetworkConfig;

/// Epsilon of the log-linear schedule, which the reference does not write down.
const LOG_LINEAR_EPSILON: f64 = 1e-3;

/// The keys that decide what a network computes; the files hold many more.
#[derive(Debug)]
pub(super) enum Configuration {
    /// Of SEDD, and of RADD, which weights alone tell apart.
    Reference(Reference),
    /// Of MDLM (arXiv 2406.07524).
    Mdlm(Mdlm),
}

/// What networks give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// Scores (arXiv 2310.16834).
    Sedd,
    /// Probabilities of the clean token, without seeing the noise (arXiv 2406.03736).
    Radd,
    /// Probabilities of the clean token (arXiv 2406.07524).
    Mdlm,
}

#[derive(Debug, Deserialize)]
pub(super) struct Reference {
    tokens: usize,
    /// RADD knows no other than absorbing ones, and names none.
    #[serde(default)]
    graph: Graph,
    noise: Noise,
    model: Model,
}

/// `MDLMConfig` of the authors' code.
#[derive(Debug, Deserialize)]
pub(super) struct Mdlm {
    /// The mask included, which is the last.
    vocab_size: usize,
    model_length: usize,
    hidden_dim: usize,
    cond_dim: usize,
    n_blocks: usize,
    n_heads: usize,
    #[serde(default)]
    dropout: f64,
    time_conditioning: bool,
}

/// What `transformers` calls the kind of a model.
#[derive(Debug, Deserialize)]
struct Kind {
    model_type: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Graph {
    r#type: GraphType,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum GraphType {
    #[default]
    #[serde(alias = "absorbing")]
    Absorb,
    Uniform,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Noise {
    LogLinear,
    Geometric { sigma_min: f64, sigma_max: f64 },
}

#[derive(Debug, Deserialize)]
struct Model {
    name: Option<String>,
    hidden_size: usize,
    cond_dim: usize,
    length: usize,
    n_blocks: usize,
    n_heads: usize,
    /// RADD has none.
    #[serde(default)]
    scale_by_sigma: bool,
    #[serde(default)]
    dropout: f64,
}

/// Reads a configuration in JSON or YAML, by its extension.
pub(super) fn read(path: &Path) -> Result<Configuration, ImportError> {
    let text = fs::read_to_string(path).map_err(|source| ImportError::Io {
        path: path.to_owned(),
        source,
    })?;
    let problem = |problem| ImportError::Configuration {
        path: path.to_owned(),
        problem,
    };
    let is_json = path.extension().is_some_and(|e| e == "json");
    let kind = serde_json::from_str::<Kind>(&text).ok().filter(|_| is_json);
    if let Some(kind) = kind.and_then(|kind| kind.model_type) {
        return match kind.as_str() {
            "mdlm" => json(&text).map(Configuration::Mdlm).map_err(problem),
            other => Err(problem(format!(
                "model_type is {other:?}; of transformers' models mdlm alone is read"
            ))),
        };
    }
    let parsed: Result<Reference, String> = if is_json {
        json(&text)
    } else {
        serde_saphyr::from_str(&text).map_err(|e| e.to_string())
    };
    let reference = parsed.map_err(problem)?;
    if reference.model.scale_by_sigma && reference.graph.r#type == GraphType::Uniform {
        return Err(problem(
            "model.scale_by_sigma is for graph.type \"absorb\"".to_owned(),
        ));
    }
    let configuration = Configuration::Reference(reference);
    configuration
        .schedule()
        .check()
        .map_err(|reason| problem(format!("noise: {reason}")))?;
    Ok(configuration)
}

fn json<T: for<'a> Deserialize<'a>>(text: &str) -> Result<T, String> {
    let json = &mut serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(json).map_err(|e| e.to_string())
}

impl Configuration {
    /// Which family a checkpoint is of, given whether its weights are those of RADD.
    pub(super) fn family(&self, is_radd: bool) -> Family {
        match self {
            Self::Mdlm(_) => Family::Mdlm,
            Self::Reference(_) if is_radd => Family::Radd,
            Self::Reference(_) => Family::Sedd,
        }
    }

    pub(super) fn network(&self, family: Family, path: &Path) -> Result<NetworkConfig, ImportError> {
        let network = match self {
            Self::Reference(Reference {
                tokens, graph, model, ..
            }) => {
                let mask = usize::from(graph.r#type == GraphType::Absorb);
                let is_radd = family == Family::Radd;
                NetworkConfig {
                    states: tokens.saturating_add(mask),
                    length: model.length,
                    hidden_size: model.hidden_size,
                    cond_dim: if is_radd { 1 } else { model.cond_dim },
                    blocks: model.n_blocks,
                    heads: model.n_heads,
                    dropout: model.dropout,
                    scale_by_sigma: model.scale_by_sigma && !is_radd,
                    parameterization: if is_radd {
                        Parameterization::Mean
                    } else {
                        Parameterization::Score
                    },
                    time_conditioned: !is_radd,
                    tie_embeddings: false,
                }
            }
            Self::Mdlm(model) => NetworkConfig {
                states: model.vocab_size,
                length: model.model_length,
                hidden_size: model.hidden_dim,
                cond_dim: model.cond_dim,
                blocks: model.n_blocks,
                heads: model.n_heads,
                dropout: model.dropout,
                scale_by_sigma: false,
                parameterization: Parameterization::Mean,
                time_conditioned: model.time_conditioning,
                tie_embeddings: false,
            },
        };
        network.validate().map_err(|source| ImportError::Network {
            path: path.to_owned(),
            source,
        })?;
        Ok(network)
    }

    pub(super) fn graph(&self) -> GraphKind {
        match self {
            Self::Reference(Reference { graph, .. }) if graph.r#type == GraphType::Uniform => {
                GraphKind::Uniform
            }
            Self::Reference(_) | Self::Mdlm(_) => GraphKind::Absorbing,
        }
    }

    pub(super) fn schedule(&self) -> Schedule {
        match self {
            Self::Reference(Reference {
                noise: Noise::Geometric { sigma_min, sigma_max },
                ..
            }) => Schedule::Geometric {
                sigma_min: *sigma_min,
                sigma_max: *sigma_max,
            },
            Self::Reference(_) | Self::Mdlm(_) => Schedule::LogLinear {
                eps: LOG_LINEAR_EPSILON,
            },
        }
    }

    pub(super) fn name(&self) -> Option<String> {
        match self {
            Self::Reference(reference) => reference.model.name.clone(),
            Self::Mdlm(_) => Some("mdlm".to_owned()),
        }
    }
}
