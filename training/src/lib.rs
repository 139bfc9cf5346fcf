//! Trains, evaluates and exports score-based discrete diffusion language models.
//!
//! Whoever knows the command knows the folder: `tokenizer` and `prepare` are [`data`], and so on.
//!
//! # From a file to a gradient
//!
//! [`data::Corpus`] reads files as documents and says which are held out; [`data::prepare()`] packs their tokens into
//! [`data::TokenFile`]s. A run ([`fit::fit`]) takes batches of sequences from them in an order of its own for every epoch
//! ([`data::batches`], and [`data::mixture`] where there are several). [`fit::step`] gives each sequence of a batch a time ([`loss::times`]), noises it
//! ([`loss::Objective::noise`]) and asks the [network](model::Ddit) about the positions that the loss depends on: the
//! rate-weighted denoising score entropy, or the cross-entropy that it comes to ([`loss`]). Burn goes back through the
//! network, whose costly operations are [kernels](model::kernels) of ours on a CPU; gradients are clipped, move the weights
//! ([`optim::optimizer`]) and those their average ([`optim::ema`]). Every so often the average is held against held-out text
//! ([`evaluate::bound`]), and a [checkpoint](fit::checkpoint) is written.
//!
//! # From a checkpoint to a bundle
//!
//! [`fit::checkpoint`] gives back the averaged weights by the names that the reference has for them
//! ([`model::state_dict`]); [`import`] reads what the authors' own code wrote into the same. [`export`] writes them as an
//! ONNX graph with the manifest that the server goes by, measures what the storage costs, and [`publish`] puts the bundle
//! where a server looks. How good the weights are say [`evaluate::bound`], and about what is drawn with them
//! [`evaluate::samples`] and [`evaluate::quality`]; [`report`] shows how a run went.

pub mod config;
pub mod data;
pub mod evaluate;
pub mod export;
pub mod fit;
pub mod import;
pub mod loss;
pub mod model;
pub mod optim;
mod parallel;
pub mod publish;
mod random;
pub mod report;
mod say;
