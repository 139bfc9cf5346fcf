//! What a user of the service sees, over real sockets: one file a promise.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::wildcard_enum_match_arm,
    unreachable_pub,
    reason = "tests"
)]

mod allowed;
mod architecture;
mod balanced;
mod binary;
mod cancelling;
mod clients;
mod connections;
mod deadlines;
mod defaults;
mod determinism;
mod docs;
mod drafts;
mod errors;
mod foreign_client;
mod foreign_network;
mod frames;
mod from_text_to_served;
mod going_on;
mod hostile_bundles;
mod infill;
mod masked_lm;
mod memory;
mod mutated;
mod neighbours;
mod network;
mod object_store;
mod open_inference;
mod openai;
mod operations;
mod page;
mod picker;
mod plain_http;
mod prepared;
mod readme;
mod repository;
mod resume;
mod rolling;
mod rootfs;
mod samplers;
mod scores;
mod soak;
mod starting;
mod strangers;
mod support;
mod terminal;
mod tls;
mod tokens;
mod traces;
