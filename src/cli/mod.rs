//! The command line: `serve`, and a client for everything it serves.
//!
//! The client parts speak gRPC like any other client, to a server given by `--server` or to one that
//! they start within the process.

mod asked;
mod bench;
mod canvas;
mod connect;
mod generate;
mod input;
mod json;
mod layout;
mod live;
mod manual;
mod models;
mod pieces;
mod play;
mod probe;
mod record;
mod replay;
mod score;
mod screen;
mod serve;
mod svg;
mod template;
mod token;
mod tokens;
mod view;

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tonic::Status;
use tonic_types::StatusExt;

use crate::server::StartError;

/// Exit code for a bad command line or configuration (sysexits' EX_USAGE).
const USAGE: u8 = 64;
/// Exit code for a server that cannot be reached (EX_UNAVAILABLE).
const UNAVAILABLE: u8 = 69;
/// Exit code for everything else that fails (EX_SOFTWARE).
const SOFTWARE: u8 = 70;
/// Exit code after Ctrl-C.
const INTERRUPTED: u8 = 130;

const EXIT_CODES: &str = "Exit codes: 0 fine, 64 bad command line or configuration, 69 server unavailable, \
                          70 any other failure, 130 interrupted.";

/// Serves score-based discrete diffusion language models, and talks to such servers.
#[derive(Debug, Parser)]
#[command(name = "denoised", version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve models over gRPC.
    #[command(after_help = EXIT_CODES)]
    Serve(serve::Serve),
    /// Continue a prompt, watching the text come out of noise.
    #[command(after_help = EXIT_CODES)]
    Generate(generate::Generate),
    /// Fill the gaps of a template such as "My name is [[8]] and I am [[12]]."
    #[command(after_help = EXIT_CODES)]
    Infill(generate::Infill),
    /// Edit a canvas on the terminal, noise parts of it and denoise them again.
    #[command(after_help = EXIT_CODES)]
    Play(play::Play),
    /// Show a recorded run again, or turn it into an animated SVG.
    #[command(after_help = EXIT_CODES)]
    Replay(replay::Replay),
    /// Say how likely texts are.
    #[command(after_help = EXIT_CODES)]
    Score(score::Score),
    /// Say how likely each of some texts is where "My name is [[]]." has its slot.
    #[command(after_help = EXIT_CODES)]
    Choose(score::Choose),
    /// List what a server serves.
    #[command(after_help = EXIT_CODES)]
    Models(models::ListModels),
    /// Have a server load a model of its repository, and wait until it is ready.
    #[command(after_help = EXIT_CODES)]
    Load(models::Load),
    /// Have a server serve a model to nobody new.
    #[command(after_help = EXIT_CODES)]
    Unload(models::Unload),
    /// Turn text into a model's tokens.
    #[command(after_help = EXIT_CODES)]
    Tokenize(tokens::Tokenize),
    /// Turn a model's tokens into text.
    #[command(after_help = EXIT_CODES)]
    Detokenize(tokens::Detokenize),
    /// Put a server under load, and say how long it took.
    #[command(after_help = EXIT_CODES)]
    Bench(Box<bench::Bench>),
    /// Say whether a server takes requests, by the exit code.
    #[command(after_help = EXIT_CODES)]
    Probe(probe::Probe),
    /// Print what a shell completes commands and options with.
    #[command(after_help = EXIT_CODES)]
    Completions(manual::Completions),
    /// Write manual pages to a folder.
    #[command(after_help = EXIT_CODES)]
    Manual(manual::Manual),
    /// Make tokens for those who may call a server.
    #[command(after_help = EXIT_CODES)]
    Token(token::Token),
}

/// Why a command failed, with what the shell is told.
#[derive(Debug)]
struct Failed {
    code: u8,
    message: String,
}

impl Failed {
    fn usage(message: impl Display) -> Self {
        Self {
            code: USAGE,
            message: message.to_string(),
        }
    }

    fn unavailable(message: impl Display) -> Self {
        Self {
            code: UNAVAILABLE,
            message: message.to_string(),
        }
    }

    fn software(message: impl Display) -> Self {
        Self {
            code: SOFTWARE,
            message: message.to_string(),
        }
    }

    /// Output failed; a reader that has gone away, as `head` does, has seen enough.
    fn unless_closed(printed: io::Result<()>) -> Result<(), Self> {
        match printed {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Self::software(error)),
            _ => Ok(()),
        }
    }
}

impl From<StartError> for Failed {
    fn from(error: StartError) -> Self {
        match error {
            // The configuration names what is not there.
            StartError::Models(_) | StartError::Device(_) | StartError::Tls(_) | StartError::Tokens(_) => {
                Self::usage(error)
            }
            StartError::Bundle { .. } | StartError::Network(_) | StartError::System { .. } => {
                Self::software(error)
            }
        }
    }
}

impl From<Status> for Failed {
    /// Code, message and whatever the details say of fields and delays, in one line.
    fn from(status: Status) -> Self {
        let mut message = format!("{:?}: {}", status.code(), status.message());
        let violations = status.get_details_bad_request().map(|bad| bad.field_violations);
        for violation in violations.into_iter().flatten() {
            // This project's server says it in the message already; others may not.
            if !message.contains(&violation.field) || !message.contains(&violation.description) {
                message = format!("{message}; {}: {}", violation.field, violation.description);
            }
        }
        if let Some(delay) = status.get_details_retry_info().and_then(|info| info.retry_delay) {
            message = format!("{message} (try again in {:.1} s)", delay.as_secs_f64());
        }
        // A connection that breaks off has a code of its own making, and a cause.
        let broken_off = std::error::Error::source(&status).is_some();
        if broken_off {
            Self::unavailable(format!(
                "the server has gone away, or it speaks no gRPC ({message})"
            ))
        } else if message.contains("grpc-status header missing") {
            // tonic's words for an answer that is plain HTTP.
            Self::unavailable(format!("what answers there speaks no gRPC ({message})"))
        } else if status.code() == tonic::Code::Unavailable {
            Self::unavailable(message)
        } else if status.code() == tonic::Code::InvalidArgument {
            Self::usage(message)
        } else {
            Self::software(message)
        }
    }
}

/// Runs the command line.
pub fn main() -> ExitCode {
    // SAFETY: the first thing that the program does: there are no other threads.
    #[expect(unsafe_code, reason = "what ONNX Runtime reads must be there before it")]
    unsafe {
        crate::network::onnx::disable_telemetry();
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // --help and --version arrive here too.
            let code = if error.use_stderr() { USAGE } else { 0 };
            return if error.print().is_ok() {
                code.into()
            } else {
                SOFTWARE.into()
            };
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // Work that blocks is bounded by whoever gives it: as many at once as there are cores for texts asked and for
        // texts told, and a few that look at files. Without a bound here too the pool starts another thread whenever
        // one has ended its work but not said so yet, and none that is busy now and then ever ends.
        .max_blocking_threads(2 * cores + 8)
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            return report(&Failed::software(format!(
                "cannot start the async runtime: {error}"
            )));
        }
    };
    let result = runtime.block_on(async {
        match arguments.command {
            Command::Serve(serve) => serve.run().await,
            Command::Generate(generate) => generate.run().await,
            Command::Infill(infill) => infill.run().await,
            Command::Play(play) => play.run().await,
            Command::Replay(replay) => replay.run().await,
            Command::Score(score) => score.run().await,
            Command::Choose(choose) => choose.run().await,
            Command::Models(models) => models.run().await,
            Command::Load(load) => load.run().await,
            Command::Unload(unload) => unload.run().await,
            Command::Tokenize(tokenize) => tokenize.run().await,
            Command::Detokenize(detokenize) => detokenize.run().await,
            Command::Bench(bench) => bench.run().await,
            Command::Probe(probe) => probe.run().await,
            Command::Completions(completions) => completions.run(),
            Command::Manual(manual) => manual.run(),
            Command::Token(token) => token.run(),
        }
    });
    // Text that never ends to be read must not keep the process from ending.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => report(&failed),
    }
}

fn report(failed: &Failed) -> ExitCode {
    if failed.code != INTERRUPTED {
        let lines: Vec<&str> = failed.message.lines().map(str::trim).collect();
        // The exit code is told even where nobody takes the message.
        let _told = writeln!(io::stderr(), "denoised: {}", lines.join(" "));
    }
    failed.code.into()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// The help states the defaults that the server has.
    #[test]
    fn the_help_states_the_servers_defaults() {
        use crate::server::request::DEFAULT_STEPS;
        use crate::server::sampler::{DEFAULT_ENTROPY_BOUND, DEFAULT_REMASK_RATE};
        let command = Arguments::command();
        let generate = command.find_subcommand("generate").unwrap();
        for (option, stated) in [
            ("steps", format!("at most {DEFAULT_STEPS}")),
            ("entropy_bound", format!("or {DEFAULT_ENTROPY_BOUND} otherwise")),
            ("remask_rate", format!("or {DEFAULT_REMASK_RATE} otherwise")),
        ] {
            let option = generate.get_arguments().find(|a| a.get_id() == option).unwrap();
            let help = option.get_help().unwrap().to_string();
            assert!(help.contains(&stated), "{help:?} does not say {stated:?}");
        }
    }
    use tonic::Code;
    use tonic_types::ErrorDetails;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn violations_that_the_message_leaves_out_are_added() {
        let details = ErrorDetails::with_bad_request_violation("sampling.steps", "must be at least 1");
        for (message, wanted) in [
            ("no", "InvalidArgument: no; sampling.steps: must be at least 1"),
            (
                "sampling.steps: must be at least 1",
                "InvalidArgument: sampling.steps: must be at least 1",
            ),
        ] {
            let failed = Failed::from(Status::with_error_details(
                Code::InvalidArgument,
                message,
                details.clone(),
            ));
            assert_eq!((failed.code, failed.message.as_str()), (USAGE, wanted));
        }
    }

    #[test]
    fn codes_tell_whose_fault_it_is() {
        for (code, exit) in [
            (Code::Unavailable, UNAVAILABLE),
            (Code::NotFound, SOFTWARE),
            (Code::Internal, SOFTWARE),
        ] {
            assert_eq!(Failed::from(Status::new(code, "x")).code, exit);
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        assert!(Failed::unless_closed(Err(io::ErrorKind::BrokenPipe.into())).is_ok());
        assert!(Failed::unless_closed(Err(io::ErrorKind::StorageFull.into())).is_err());
    }
}
