//! What somebody who trains sees: one file a promise. One program of all, for each would be linked with Burn anew.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod chain;
mod common;
mod evaluate;
mod export_measures;
mod export_parity;
mod fine_tuning;
mod fit;
mod import;
mod mirror;
mod publish;
mod times;
mod walkthrough;
