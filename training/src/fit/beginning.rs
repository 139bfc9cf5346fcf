//! Weights of another run, or of others, that a run begins with.

use thiserror::Error;

use super::step::Trainer;
use crate::model::state_dict::{Misfits, StateDict};
use crate::model::{NetworkConfig, NetworkError};

/// Weights, and what is known of where they come from.
#[derive(Debug, Clone)]
pub struct Beginning {
    /// What users know them as.
    pub name: String,
    /// Their network.
    pub network: NetworkConfig,
    /// The weights.
    pub weights: StateDict,
    /// sha256 of the tokenizer that they were trained with, where that is known.
    pub tokenizer_sha256: Option<String>,
}

/// Why a run cannot begin with them.
#[derive(Debug, Error)]
pub enum BeginningError {
    /// They are of a network that computes something else.
    #[error("{name} is of another network: network.{field} is {theirs} there and {ours} here")]
    Network {
        /// What the weights are known as.
        name: String,
        /// The setting.
        field: &'static str,
        /// Theirs.
        theirs: String,
        /// The run's.
        ours: String,
    },
    /// They are of another shape.
    #[error("the weights of {name} do not fit the run's network:{misfits}")]
    Misfits {
        /// What the weights are known as.
        name: String,
        /// Every tensor that is missing, left over or of another shape.
        misfits: Misfits,
    },
    /// Their tokens mean something else.
    #[error("{name} was trained with another tokenizer than data.tokenizer")]
    Tokenizer {
        /// What the weights are known as.
        name: String,
    },
    /// They cannot be loaded.
    #[error(transparent)]
    Load(#[from] NetworkError),
}

impl Beginning {
    /// Gives its weights to a run that has not begun, of this shape and tokenizer.
    pub(super) fn give(
        &self,
        trainer: &mut Trainer,
        shape: &NetworkConfig,
        tokenizer_sha256: &str,
    ) -> Result<(), BeginningError> {
        self.check(shape, tokenizer_sha256)?;
        Ok(trainer.begin_with(&self.weights)?)
    }

    /// Whether the weights are of a network of this shape, and of this tokenizer.
    ///
    /// # Errors
    /// What is other.
    pub fn check(&self, shape: &NetworkConfig, tokenizer_sha256: &str) -> Result<(), BeginningError> {
        let name = || self.name.clone();
        let misfits = self.weights.misfits(&shape.parameters());
        if !misfits.0.is_empty() {
            return Err(BeginningError::Misfits {
                name: name(),
                misfits,
            });
        }
        // What shapes do not tell. Positions are rotations, so that another length is fine.
        let theirs = &self.network;
        for (field, theirs, ours) in [
            ("heads", theirs.heads.to_string(), shape.heads.to_string()),
            (
                "parameterization",
                format!("{:?}", theirs.parameterization).to_lowercase(),
                format!("{:?}", shape.parameterization).to_lowercase(),
            ),
            (
                "time_conditioned",
                theirs.time_conditioned.to_string(),
                shape.time_conditioned.to_string(),
            ),
            (
                "scale_by_sigma",
                theirs.scale_by_sigma.to_string(),
                shape.scale_by_sigma.to_string(),
            ),
        ] {
            if theirs != ours {
                return Err(BeginningError::Network {
                    name: name(),
                    field,
                    theirs,
                    ours,
                });
            }
        }
        if self
            .tokenizer_sha256
            .as_ref()
            .is_some_and(|sha256| sha256 != tokenizer_sha256)
        {
            return Err(BeginningError::Tokenizer { name: name() });
        }
        Ok(())
    }
}
