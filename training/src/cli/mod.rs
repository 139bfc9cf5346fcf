//! One file per command: its arguments and what it prints. The work is the library's.

mod corpus;
pub(crate) mod evaluate;
pub(crate) mod export;
pub(crate) mod fit;
pub(crate) mod import;
pub(crate) mod prepare;
pub(crate) mod publish;
mod quality;
pub(crate) mod random;
mod readers;
pub(crate) mod report;
mod run;
pub(crate) mod sample;
mod target;
pub(crate) mod tokenizer;
mod weights;
