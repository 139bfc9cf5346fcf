//! What the reference implementation writes down about a model: `config.json` and Hydra's
//! `config.yaml` hold the same keys.

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
#[derive(Debug, Deserialize)]
pub(super) struct Configuration {
    tokens: usize,
    graph: Graph,
    noise: Noise,
    model: Model,
}

#[derive(Debug, Deserialize)]
struct Graph {
    r#type: GraphType,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum GraphType {
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
    let parsed: Result<Configuration, String> = if path.extension().is_some_and(|e| e == "json") {
        let json = &mut serde_json::Deserializer::from_str(&text);
        serde_path_to_error::deserialize(json).map_err(|e| e.to_string())
    } else {
        serde_saphyr::from_str(&text).map_err(|e| e.to_string())
    };
    let problem = |problem| ImportError::Configuration {
        path: path.to_owned(),
        problem,
    };
    let configuration = parsed.map_err(problem)?;
    configuration
        .schedule()
        .check()
        .map_err(|reason| problem(format!("noise: {reason}")))?;
    if configuration.model.scale_by_sigma && configuration.graph.r#type == GraphType::Uniform {
        return Err(problem(
            "model.scale_by_sigma is for graph.type \"absorb\"".to_owned(),
        ));
    }
    Ok(configuration)
}

impl Configuration {
    pub(super) fn network(&self, path: &Path) -> Result<NetworkConfig, ImportError> {
        let model = &self.model;
        let mask = usize::from(self.graph.r#type == GraphType::Absorb);
        let network = NetworkConfig {
            states: self.tokens.saturating_add(mask),
            length: model.length,
            hidden_size: model.hidden_size,
            cond_dim: model.cond_dim,
            blocks: model.n_blocks,
            heads: model.n_heads,
            dropout: model.dropout,
            scale_by_sigma: model.scale_by_sigma,
            parameterization: Parameterization::Score,
            time_conditioned: true,
            tie_embeddings: false,
        };
        network.validate().map_err(|source| ImportError::Network {
            path: path.to_owned(),
            source,
        })?;
        Ok(network)
    }

    pub(super) fn graph(&self) -> GraphKind {
        match self.graph.r#type {
            GraphType::Absorb => GraphKind::Absorbing,
            GraphType::Uniform => GraphKind::Uniform,
        }
    }

    pub(super) fn schedule(&self) -> Schedule {
        match self.noise {
            Noise::LogLinear => Schedule::LogLinear {
                eps: LOG_LINEAR_EPSILON,
            },
            Noise::Geometric { sigma_min, sigma_max } => Schedule::Geometric { sigma_min, sigma_max },
        }
    }

    pub(super) fn name(&self) -> Option<String> {
        self.model.name.clone()
    }
}
