//! The mathematics of score-based discrete diffusion (SEDD, arXiv 2310.16834), and nothing else.
//!
//! Everything here is a pure function in f64: no async, no I/O, no ONNX, no gRPC. Data flows from
//! [`graph`] (what noise does) and [`schedule`] (how much of it at time t), together a [`process`], to [`sampler`]
//! (what the reverse steps do), whose random choices come from [`draw`]. [`score_entropy`] holds
//! the losses; its scalar versions are the oracle for the tensor versions of the training crate. [`likelihood`] says how
//! likely a text is.
//!
//! Matrices have the column convention of the paper and its authors' code: `Q[y, x]` is the rate from `x` to `y`, and
//! `exp(sigma Q)[y, x]` the probability `p(y | x)` of being at `y` after noise sigma. Equations are cited as eq. 9 of
//! arXiv 2310.16834; where a module names one paper, as eq. 9.

pub mod draw;
pub mod graph;
pub mod likelihood;
pub mod process;
pub mod sampler;
pub mod schedule;
pub mod score_entropy;

pub use draw::Draws;
pub use graph::{Graph, GraphKind};
pub use process::{Parameterization, Process};
pub use sampler::{RowLaw, SamplerKind, TokenChoice};
pub use schedule::{Schedule, sigma_offset};

/// A token id in `0..vocab`. The mask of an absorbing graph is one of them, the last unless a manifest says otherwise.
pub type Token = u32;

#[cfg(test)]
mod reference_test;
