//! `denoised`: a server for score-based discrete diffusion language models.
pub mod bundle;
pub mod diffusion;
#[cfg(feature = "onnx")]
pub mod network;
#[cfg(feature = "serve")]
pub mod proto;
#[cfg(feature = "serve")]
pub mod engine;
#[cfg(feature = "serve")]
pub mod config;
#[cfg(feature = "serve")]
pub mod telemetry;
#[cfg(feature = "serve")]
pub mod server;
#[cfg(feature = "serve")]
pub mod cli;
