//! `denoised token new`.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Failed;
use crate::server::tokens::NewToken;

/// Tokens of those who may call a server.
#[derive(Debug, Args)]
pub(super) struct Token {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Draw a token: it is printed once, and its hash is written into the file of server.tokens.
    New(New),
}

#[derive(Debug, Args)]
struct New {
    /// Who is to have it: the caller's name in the log.
    name: String,
    /// File of server.tokens that the hash is appended to; without, the lines for it go to standard error.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Let it read /metrics.
    #[arg(long)]
    admin: bool,
}

impl Token {
    pub(super) fn run(self) -> Result<(), Failed> {
        let Command::New(New { name, file, admin }) = self.command;
        let NewToken { token, mut entry } = NewToken::draw(&name).map_err(Failed::usage)?;
        if admin {
            entry.push_str("admin = true\n");
        }
        // Before the token is told: what is told must be known.
        let written = match &file {
            Some(file) => OpenOptions::new()
                .append(true)
                .create(true)
                .open(file)
                .and_then(|mut out| out.write_all(format!("\n{entry}").as_bytes()))
                .map_err(|error| Failed::usage(format!("--file {}: {error}", file.display()))),
            None => write!(io::stderr(), "{entry}").map_err(Failed::software),
        };
        written?;
        Failed::unless_closed(writeln!(io::stdout(), "{token}"))
    }
}
