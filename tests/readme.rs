//! The README's commands do what they are there for.

use std::process::{Command, Output};

use tempfile::TempDir;

use crate::binary::{Serving, denoised};
use crate::support::skipped;

/// The commands of the README's console blocks, without their comments.
fn commands() -> Vec<String> {
    let readme = include_str!("../README.md");
    let blocks = readme
        .split("```console\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next());
    let lines = blocks
        .flat_map(str::lines)
        .filter_map(|line| line.strip_prefix("$ "));
    let command = |line: &str| line.split("  #").next().unwrap_or_default().trim().to_owned();
    lines.map(command).collect()
}

/// A folder with a letter to fill.
pub(crate) fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("letter.txt"), "Dear[[3]], I am[[4]].\n").unwrap();
    folder
}

/// Runs a command line as a shell does.
pub(crate) fn run(command: &str, server: &Serving, folder: &TempDir) -> Output {
    let bin = std::path::Path::new(env!("CARGO_BIN_EXE_denoised"))
        .parent()
        .unwrap();
    let tools = concat!(env!("CARGO_MANIFEST_DIR"), "/.tools/bin");
    let path = format!("{}:{tools}:{}", bin.display(), std::env::var("PATH").unwrap());
    let command = command.replace("127.0.0.1:50051", &server.address);
    Command::new("bash")
        .args(["-o", "pipefail", "-c", &command])
        .env("PATH", path)
        .env("DENOISED_SERVER", format!("http://{}", server.address))
        .current_dir(folder.path())
        .output()
        .unwrap()
}

#[test]
fn every_command_of_the_readme_for_the_server_runs() {
    let server = Serving::start();
    let (folder, mut ran, mut others) = (folder(), 0, Vec::new());
    for command in commands() {
        let is_call = command.starts_with("grpcurl ");
        if is_call && crate::foreign_client::grpcurl().is_none() {
            continue;
        }
        if !is_call && (!command.starts_with("denoised ") || command.starts_with("denoised serve")) {
            others.push(command);
            continue;
        }
        let output = run(&command, &server, &folder);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {error}");
        let writes = command.contains("--svg");
        assert!(writes || !output.stdout.is_empty(), "{command} says nothing");
        ran += 1;
    }
    assert!(ran >= 7, "{ran}");
    // What builds, serves, trains and tests is not for a test to run.
    for command in &others {
        let known = ["make ", "cargo build ", "denoised serve", "training "];
        assert!(known.iter().any(|start| command.starts_with(start)), "{command}");
    }
}

/// The run that the README shows, with its seed.
#[test]
fn the_run_that_is_shown_begins_and_ends_as_shown() {
    let server = Serving::start();
    let shown = commands()
        .into_iter()
        .find(|command| command.contains("--live always"))
        .unwrap();
    let text = String::from_utf8(run(&shown, &server, &folder()).stdout).unwrap();
    let readme = include_str!("../README.md");
    let block = readme
        .split(&format!("$ {shown}\n"))
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let first: Vec<&str> = block.lines().take(2).collect();
    assert!(text.starts_with(&first.join("\n")), "{text}");
    // Sums of the network can differ in the last bit between processors, and once in a while flip a token.
    let words: Vec<&str> = text.split_whitespace().collect();
    let told: Vec<&str> = block
        .rsplit("masked 0\n")
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let kept = told.iter().filter(|word| words.contains(word)).count();
    assert!(2 * kept > told.len(), "{text}");
}

/// The documents' Python, each block with the environment that has its client.
#[test]
fn the_python_of_the_documents_runs() {
    let server = Serving::start_with(denoised().env("DENOISED__SERVER__OPEN_INFERENCE", "true"));
    for (document, environment) in [
        (include_str!("../README.md"), "openai"),
        (include_str!("../deploy/README.md"), "python"),
    ] {
        let python = format!("{}/.tools/{environment}/bin/python", env!("CARGO_MANIFEST_DIR"));
        let blocks: Vec<&str> = document
            .split("```python\n")
            .skip(1)
            .filter_map(|rest| rest.split("```").next())
            .collect();
        assert_eq!(blocks.len(), 1);
        if !std::path::Path::new(&python).exists() {
            skipped(format_args!(
                "{environment} is not installed (make test-tools): its block was not run"
            ));
            continue;
        }
        for block in blocks {
            let block = block
                .replace("127.0.0.1:50051", &server.address)
                .replace("localhost:50051", &server.address);
            let output = Command::new(&python).args(["-c", &block]).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && output.stdout.len() > 10,
                "{block}: {error}"
            );
        }
    }
}
