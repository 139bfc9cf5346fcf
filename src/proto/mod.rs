//! Types and services generated from `proto/denoised/v1` and `proto/inference`. They stay at the edge: `server` translates
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

/// Package `inference`: the Open Inference Protocol of KServe and Triton.
#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::wildcard_enum_match_arm,
    reason = "generated"
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// The compiled files of [`inference`], for reflection.
pub const OPEN_INFERENCE_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/open_inference.bin"));

/// The compiled files of [`v1`], for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// One bit an entry, least significant first.
pub fn bits(flags: impl Iterator<Item = bool>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, flag) in flags.enumerate() {
        if i % 8 == 0 {
            bytes.push(0);
        }
        if let (true, Some(byte)) = (flag, bytes.last_mut()) {
            *byte |= 1 << (i % 8);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_least_significant_first() {
        let flags = [true, false, false, true, false, false, false, false, true];
        assert_eq!(bits(flags.into_iter()), [0b0000_1001, 1]);
    }
}
