//! Runs that begin with the weights of another, and what a checkpoint writes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::{config, config_file, prepared};
use training::fit::record::{Line, read_provenance};

fn training(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_training"))
        .args(arguments)
        .output()
        .unwrap()
}

fn succeeded(output: &Output) -> String {
    let says = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{says}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn failed(output: &Output, says: &str) {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains(says), "{told}");
}

/// The loss of a run's first step.
fn first_loss(run: &Path) -> f64 {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    match serde_json::from_str(text.lines().next().unwrap()).unwrap() {
        Line::Step(step) => step.loss,
        Line::Validation(line) => unreachable!("{line:?} comes before any step"),
    }
}

#[test]
fn a_run_begins_where_another_ended() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let at = |name: &str| root.join(name).display().to_string();
    let first = config_file(root, "first", 60).display().to_string();
    let directory = config(root, "first", 60).run.directory.display().to_string();
    let second = config_file(root, "second", 60).display().to_string();
    let every = ["--set", "run.log_every=1", "--set", "run.steps=2"];
    succeeded(&training(&["fit", &first, "--set", "run.log_every=1"]));

    let fresh = format!("run.directory={}", at("fresh"));
    succeeded(&training(
        &[&["fit", &second, "--set", &fresh], every.as_slice()].concat(),
    ));
    let tuned = format!("run.directory={}", at("tuned"));
    let from = ["--init-from", &directory, "--set", &tuned];
    succeeded(&training(
        &[&["fit", &second], from.as_slice(), every.as_slice()].concat(),
    ));
    let [before, after] = ["fresh", "tuned"].map(|run| first_loss(&root.join(run)));
    assert!(after < 0.7 * before, "{after} and {before}");
    let provenance = read_provenance(&root.join("tuned")).unwrap();
    assert!(provenance.sessions[0].command.contains(&"--init-from".to_owned()));
    // By a checkpoint's folder: the very same beginning.
    let again = format!("run.directory={}", at("again"));
    let checkpoint = at("first/checkpoints/00000060");
    let from = ["--init-from", &checkpoint, "--set", &again];
    succeeded(&training(
        &[&["fit", &second], from.as_slice(), every.as_slice()].concat(),
    ));
    assert_eq!(first_loss(&root.join("again")), after);

    let refused = |setting: &str, says: &str| {
        let other = format!("run.directory={}", at("refused"));
        let from = ["--init-from", &at("first"), "--set", &other, "--set", setting];
        failed(&training(&[&["fit", &second], from.as_slice()].concat()), says);
    };
    refused("network.hidden_size=64", "attn_qkv.weight");
    refused("network.heads=4", "network.heads is 2 there and 4 here");
    let bundle = at("models/mine/1");
    succeeded(&training(&["export", &first, "--name", "mine", "--out", &bundle]));
    // From what is served: the same weights once more.
    let served = format!("run.directory={}", at("served"));
    let from = ["--init-from", &bundle, "--set", &served];
    succeeded(&training(
        &[&["fit", &second], from.as_slice(), every.as_slice()].concat(),
    ));
    assert_eq!(first_loss(&root.join("served")), after);
    let whole = at("models/whole/1");
    succeeded(&training(&[
        "export",
        &first,
        "--name",
        "whole",
        "--out",
        &whole,
        "--storage",
        "int8",
    ]));
    failed(
        &training(&["fit", &second, "--init-from", &whole]),
        "holds whole numbers in place of its weights",
    );

    // What it writes: the prompt first, and the same for the same seed.
    let sample = |more: &[&str]| succeeded(&training(&[&["sample", &first, "--count", "2"], more].concat()));
    let texts = sample(&["--prompt", "The dog", "--seed", "5"]);
    assert_eq!(texts.matches("---\nThe dog").count(), 2, "{texts}");
    assert_eq!(texts, sample(&["--prompt", "The dog", "--seed", "5"]));
    assert_ne!(texts, sample(&["--prompt", "The dog", "--seed", "6"]));
    failed(
        &training(&["sample", &first, "--length", "17"]),
        "at most the network's 16",
    );

    // Both runs on one page.
    let page = at("comparison.html");
    succeeded(&training(&["report", &at("first"), &at("tuned"), "--out", &page]));
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("first") && page.contains("tuned"));
}
