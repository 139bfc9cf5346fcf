//! Weights by name on the host: what crosses between the network, checkpoints and files.
//!
//! Names and layouts are those of the reference implementation, so that published weights load and
//! ours can be read elsewhere: `blocks.0.attn_qkv.weight` is `[out, in]`, as PyTorch keeps it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use thiserror::Error;

/// A dense tensor in row-major order.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Length of each axis, outermost first.
    pub shape: Vec<usize>,
    /// The entries, last axis fastest.
    pub data: Vec<f32>,
}

/// Weights by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StateDict(pub BTreeMap<String, HostTensor>);

/// Why weights do not fit a network.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum StateDictError {
    /// The network has a parameter that the weights lack.
    #[error("tensor {name} is missing (expected shape {expected:?})")]
    Missing {
        /// Name of the parameter.
        name: String,
        /// Its shape in the network.
        expected: Vec<usize>,
    },
    /// The weights hold a tensor that the network lacks.
    #[error("tensor {name} belongs to no parameter of this network")]
    Extra {
        /// Name of the tensor.
        name: String,
    },
    /// Shape or number of entries disagree.
    #[error("tensor {name} has shape {found:?} and {entries} entries, expected shape {expected:?}")]
    Misshapen {
        /// Name of the tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// How many entries it holds.
        entries: usize,
        /// The shape of the network's parameter.
        expected: Vec<usize>,
    },
}

/// All reasons at once, one a line; none when the weights fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Misfits(pub Vec<StateDictError>);

/// How many reasons are printed: weights of another network fail in every tensor.
const MAX_PRINTED: usize = 20;

impl fmt::Display for Misfits {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for misfit in self.0.iter().take(MAX_PRINTED) {
            write!(formatter, "\n  {misfit}")?;
        }
        match self.0.len().saturating_sub(MAX_PRINTED) {
            0 => Ok(()),
            more => write!(formatter, "\n  and {more} more"),
        }
    }
}

impl HostTensor {
    /// Why this is not the tensor `name` of the `expected` shape, if it is not.
    fn misfit(&self, name: &str, expected: &[usize]) -> Option<StateDictError> {
        let fits = self.shape == expected && self.data.len() == expected.iter().product::<usize>();
        (!fits).then(|| StateDictError::Misshapen {
            name: name.to_owned(),
            found: self.shape.clone(),
            entries: self.data.len(),
            expected: expected.to_vec(),
        })
    }

    /// The transpose of a matrix `[rows, columns]`.
    #[must_use]
    pub fn transposed(&self) -> Self {
        let [rows, columns] = self.shape[..] else {
            return self.clone();
        };
        let data = (0..columns)
            .flat_map(|column| (0..rows).map(move |row| row * columns + column))
            .map(|index| self.data[index])
            .collect();
        Self {
            shape: vec![columns, rows],
            data,
        }
    }
}

impl StateDict {
    /// Adds a tensor under `name`, replacing an earlier one.
    pub fn insert(&mut self, name: impl Into<String>, shape: Vec<usize>, data: Vec<f32>) {
        self.0.insert(name.into(), HostTensor { shape, data });
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&HostTensor> {
        self.0.get(name)
    }

    /// How many numbers all tensors hold together.
    pub fn parameters(&self) -> usize {
        self.0.values().map(|tensor| tensor.data.len()).sum()
    }

    /// Everything that keeps these weights from being those of a network with `parameters`.
    pub fn misfits(&self, parameters: &[(String, Vec<usize>)]) -> Misfits {
        let mut misfits = Vec::new();
        for (name, expected) in parameters {
            match self.get(name) {
                None => misfits.push(StateDictError::Missing {
                    name: name.clone(),
                    expected: expected.clone(),
                }),
                Some(tensor) => misfits.extend(tensor.misfit(name, expected)),
            }
        }
        let known: BTreeSet<&str> = parameters.iter().map(|(name, _)| name.as_str()).collect();
        let extra = self.0.keys().filter(|name| !known.contains(name.as_str()));
        misfits.extend(extra.map(|name| StateDictError::Extra { name: name.clone() }));
        Misfits(misfits)
    }

    /// Takes the tensor `name` out, checked against the shape a network expects.
    pub(crate) fn take(&mut self, name: &str, expected: &[usize]) -> Result<HostTensor, StateDictError> {
        let tensor = self.0.remove(name).ok_or_else(|| StateDictError::Missing {
            name: name.to_owned(),
            expected: expected.to_vec(),
        })?;
        match tensor.misfit(name, expected) {
            Some(error) => Err(error),
            None => Ok(tensor),
        }
    }
}
