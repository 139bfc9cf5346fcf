//! `denoised`: a server for score-based discrete diffusion language models.
#[cfg(feature = "serve")]
pub mod allocator;
pub mod bundle;
#[cfg(feature = "serve")]
pub mod cli;
#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "serve")]
pub mod config;
pub mod diffusion;
#[cfg(feature = "serve")]
pub mod engine;
#[cfg(feature = "serve")]
pub mod models;
#[cfg(test)]
mod mutants;
#[cfg(feature = "onnx")]
pub mod network;
#[cfg(feature = "client")]
pub mod proto;
#[cfg(feature = "serve")]
pub mod server;
#[cfg(feature = "store")]
pub mod store;
#[cfg(feature = "serve")]
mod sync;
#[cfg(feature = "serve")]
pub mod telemetry;
