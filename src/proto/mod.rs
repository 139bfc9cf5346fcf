//! Types and services generated from `proto/denoised/v1`. They stay at the edge: `server` translates
//! them to domain types, `cli` speaks them as a client; nothing below knows them.

pub mod codec;

/// Package `denoised.v1`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::wildcard_enum_match_arm,
    reason = "generated"
)]
pub mod v1 {
    tonic::include_proto!("denoised.v1");
}

/// The compiled proto files, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
