//! A run: many steps ([`step`]), what they are held against, and everything that outlives the process.
//!
//! [`fit()`] is the loop; [`Beginning`] has weights of others to begin with. [`record`] writes down what happened,
//! [`checkpoint`] what a run goes on from, [`mirror`] a copy of both elsewhere; [`divergence`] says when to stop.

mod beginning;
pub mod checkpoint;
pub mod divergence;
mod error;
mod file;
pub mod mirror;
pub mod record;
pub mod step;
mod terminal;
mod tokens;
mod train;

pub use beginning::{Beginning, BeginningError};
pub use error::FitError;
pub use file::FileError;
pub(crate) use file::replace;
pub use train::{End, FitOptions, Start, fit};
