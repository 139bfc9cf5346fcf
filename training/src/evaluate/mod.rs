//! How good a model is: the [`bound`] on the likelihood of held-out text, beside [`baseline`]s; what is drawn from it
//! ([`samples`]), how that reads ([`quality`], and a language model as judge), and how much of it is quoted
//! ([`overlap`]).

pub mod baseline;
pub mod bound;
#[cfg(feature = "judge")]
pub mod judge;
pub mod overlap;
pub mod quality;
pub mod samples;
