//! The `training` binary: from text to a bundle that the server picks up.

mod cli;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use cli::{evaluate, export, fit, import, prepare, publish, random, report, sample, tokenizer};

/// Trains score-based discrete diffusion language models and exports them for the server.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Tokenizer(tokenizer::Arguments),
    Prepare(prepare::Arguments),
    Fit(fit::Arguments),
    Report(report::Arguments),
    Sample(sample::Arguments),
    Evaluate(evaluate::Arguments),
    Export(export::Arguments),
    Import(import::Arguments),
    Publish(publish::Arguments),
    Random(random::Arguments),
}

fn main() -> ExitCode {
    // SAFETY: the first thing that the program does: there are no other threads.
    #[expect(unsafe_code, reason = "what ONNX Runtime reads must be there before it")]
    unsafe {
        denoised::network::onnx::disable_telemetry();
    }
    let done = match Arguments::parse().command {
        Command::Tokenizer(arguments) => tokenizer::run(arguments),
        Command::Prepare(arguments) => prepare::run(arguments),
        Command::Fit(arguments) => fit::run(&arguments),
        Command::Sample(arguments) => sample::run(&arguments),
        Command::Evaluate(arguments) => evaluate::run(&arguments),
        Command::Report(arguments) => report::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        Command::Import(arguments) => import::run(arguments),
        Command::Publish(arguments) => publish::run(arguments),
        Command::Random(arguments) => random::run(arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Its own form has a backtrace where RUST_BACKTRACE is set, which tells users nothing.
            let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
            eprintln!("Error: {}", causes.join("\n  because: "));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
