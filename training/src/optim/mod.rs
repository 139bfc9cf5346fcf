//! How weights move: the sum of gradients ([`sums`]), clipping, AdamW and Muon ([`optimizer`]), and their running average
//! ([`ema`]).

pub mod ema;
pub mod optimizer;
pub mod sums;
