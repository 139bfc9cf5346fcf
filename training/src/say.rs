//! What people are told on the terminal.

use std::io::{Write, stderr};

/// Says `line`. A run outlives the terminal or pipe that nobody reads any more, where `eprintln!` would panic.
pub(crate) fn say(line: &str) {
    drop(writeln!(stderr(), "{line}"));
}
