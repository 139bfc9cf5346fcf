//! How weights move: clipping, AdamW and Muon ([`optimizer`]), and their running average ([`ema`]).

pub mod ema;
pub mod optimizer;
