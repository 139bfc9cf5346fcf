//! Trains, evaluates and exports score-based discrete diffusion language models.
//!
//! Text becomes tokens ([`tokenizer`], [`data`]); [`network`] is the reference architecture in Burn, with
//! custom operations in [`kernels`]; [`loss`] is the rate-weighted denoising score entropy; [`trainer`]
//! takes one step, [`fit`] many, with [`checkpoint`]s and a [`journal`] that [`report`] renders;
//! [`evaluate`] bounds the likelihood of held-out text next to [`baseline`]s; [`samples`] are drawn and
//! their [`quality`] is measured; [`export`] writes the bundle that the server picks up, [`publish`] puts it where the server looks. [`import`] reads what
//! the authors' own code wrote.

pub mod baseline;
pub mod checkpoint;
pub mod config;
pub mod curves;
pub mod data;
pub mod device;
pub mod ema;
pub mod epochs;
pub mod evaluate;
pub mod export;
pub mod fit;
pub mod import;
pub mod journal;
#[cfg(feature = "judge")]
pub mod judge;
pub mod kernels;
pub mod loss;
pub mod masking;
pub mod mirror;
pub mod network;
pub mod optimizer;
pub mod overlap;
mod parallel;
pub mod precision;
pub mod progress;
pub mod publish;
pub mod quality;
pub mod report;
pub mod samples;
pub mod state_dict;
pub mod times;
pub mod tokenizer;
pub mod trainer;
pub mod watch;

#[cfg(test)]
mod reference_test;
