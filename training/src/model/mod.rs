//! The network that is trained, and its weights.
//!
//! [`Ddit`] is the forward pass of the reference architecture, [`NetworkConfig`] its shape, and `parameters` gives every
//! parameter its name: that of the reference, under which a [`state_dict`] holds it. [`kernels`] are the operations that
//! take the time, [`precision`] in which numbers matrices are multiplied, [`device`] where.

mod ddit;
pub mod device;
pub mod kernels;
mod parameters;
pub mod precision;
mod shape;
pub mod state_dict;

#[cfg(test)]
mod reference_test;

pub use ddit::{Ddit, DropoutSource, token_tensor};
pub use device::{inference_device, training_device};
pub use shape::{MLP_RATIO, NOISE_FEATURES, NetworkConfig, NetworkError, finish_log_scores};

pub(crate) use parameters::{EMBEDDING, OUTPUT_WEIGHT};
