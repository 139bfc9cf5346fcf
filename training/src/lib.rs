//! x
#![allow(missing_docs)]
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod ema;
pub mod evaluate;
pub mod fit;
pub mod kernels;
pub mod loss;
pub mod network;
pub mod optimizer;
pub mod state_dict;
pub mod tokenizer;
pub mod trainer;

#[cfg(test)]
mod reference_test;
