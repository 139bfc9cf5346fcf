//! Runs that are stopped, killed, starved of disk space or led astray: nothing that was learned is lost,
//! and what went wrong is said. These drive the program itself.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use crate::common::{config, config_file, prepared};
use training::fit::checkpoint::{self, Which};
use training::fit::record::{Line, read_provenance};

const PROGRAM: &str = env!("CARGO_BIN_EXE_training");

pub(crate) fn fit(config: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("fit").arg(config);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A run's file with some of its lines replaced.
pub(crate) fn changed(file: &Path, changes: &[(&str, &str)]) -> PathBuf {
    let mut text = fs::read_to_string(file).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    fs::write(file, text).unwrap();
    file.to_owned()
}

/// Starts a run and returns when it has written the checkpoint of `step`.
pub(crate) fn started_until(command: &mut Command, step: u64) -> Child {
    #[expect(
        clippy::zombie_processes,
        reason = "callers wait, and a test that fails ends anyway"
    )]
    let mut child = command.spawn().unwrap();
    let folder = format!("{step:08}");
    let lines = BufReader::new(child.stderr.take().unwrap());
    let mut all = String::new();
    for line in lines.lines() {
        let line = line.unwrap();
        if line.contains("wrote ") && line.ends_with(&folder) {
            return child;
        }
        all.push_str(&line);
        all.push('\n');
    }
    unreachable!("the run ended before step {step}: {all}");
}

pub(crate) fn signal(child: &Child, name: &str) {
    let id = child.id().to_string();
    let sent = Command::new("kill").args([name, &id]).status().unwrap();
    assert!(sent.success());
}

pub(crate) fn succeeded(output: &Output) {
    assert!(
        output.status.success(),
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What a run that must fail says.
pub(crate) fn failed(output: &Output) -> String {
    let says = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{says}");
    says
}

/// Moments are compared by the losses of the steps that they lead to.
pub(crate) fn same_weights(one: &Path, other: &Path, step: u64) {
    let [one, other] = [one, other].map(|run| {
        let folder = checkpoint::folder(run, step);
        let (network, state) = checkpoint::load_average(&folder).unwrap();
        let course = (state.watch, state.best, state.tokens);
        (network.state_dict(), course)
    });
    assert!(one.0 == other.0, "averaged weights differ");
    assert_eq!(one.1, other.1);
}

pub(crate) fn metrics(run: &Path) -> Vec<Line> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

const FREQUENT: [(&str, &str); 2] = [
    (
        "checkpoint_every = 10",
        "checkpoint_every = 5\nkeep = 100\nlog_every = 1",
    ),
    ("validate_every = 1000", "validate_every = 10\nsample_every = 20"),
];

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let whole = changed(&config_file(root, "whole", 40), &FREQUENT);
    succeeded(&fit(&whole).output().unwrap());

    let parts = changed(&config_file(root, "parts", 40), &FREQUENT);
    let mut child = started_until(fit(&parts).arg("--resume-if-any"), 20);
    child.kill().unwrap();
    child.wait().unwrap();
    let directory = config(root, "parts", 1).run.directory;
    let reached = *checkpoint::steps(&directory).last().unwrap();
    assert!((20..40).contains(&reached), "{reached}");
    succeeded(&fit(&parts).arg("--resume-if-any").output().unwrap());

    let original = config(root, "whole", 1).run.directory;
    same_weights(&original, &directory, 40);
    // Every step is recorded once, with the same numbers; only clocks differ.
    let recorded = |run: &Path| -> Vec<(u64, u64, f64)> {
        metrics(run)
            .iter()
            .map(|line| match line {
                Line::Step(line) => (line.step, line.tokens, line.loss),
                Line::Validation(line) => (line.step, line.tokens, line.bound),
            })
            .collect()
    };
    assert_eq!(recorded(&original), recorded(&directory));
    for step in [20, 40] {
        let [one, other] = [&original, &directory]
            .map(|run| fs::read_to_string(run.join(format!("samples/{step:08}.txt"))).unwrap());
        assert_eq!(one, other);
    }
    let sessions = read_provenance(&directory).unwrap().sessions;
    let starts: Vec<u64> = sessions.iter().map(|session| session.from_step).collect();
    assert_eq!(starts, [0, reached]);
}

#[test]
fn signals_save_and_end_well() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    // Too many steps to end by itself.
    let file = changed(
        &config_file(root, "long", 1_000_000),
        &[("checkpoint_every = 10", "checkpoint_every = 5")],
    );
    let directory = config(root, "long", 1).run.directory;
    let mut step = 0;
    for (name, resume) in [("-TERM", false), ("-INT", true)] {
        let mut command = fit(&file);
        if resume {
            command.arg("--resume");
        }
        let child = started_until(&mut command, step / 5 * 5 + 5);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{name}");
        step = *checkpoint::steps(&directory).last().unwrap();
        let says = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            says.contains(&format!("the checkpoint of step {step} ")),
            "{says}"
        );
        checkpoint::verify(&checkpoint::folder(&directory, step)).unwrap();
    }
}

#[test]
fn a_run_that_goes_astray_names_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    for (name, rate, says) in [
        ("nan", "1e30", "the loss is "),
        ("exploded", "0.03", "the loss has exploded"),
    ] {
        let good = config_file(root, name, 60);
        succeeded(&fit(&good).output().unwrap());
        let directory = config(root, name, 1).run.directory;
        let before = checkpoint::verify(&checkpoint::folder(&directory, 60)).unwrap();
        let bad = changed(
            &config_file(root, name, 5000),
            &[
                ("lr = 3e-3", &format!("lr = {rate}")),
                (
                    "seed = 1",
                    "explosion_factor = 1.05\nexplosion_steps = 10\nseed = 1",
                ),
            ],
        );
        let error = failed(&fit(&bad).arg("--resume").output().unwrap());
        assert!(error.contains(says), "{error}");
        let last = *checkpoint::steps(&directory).last().unwrap();
        let named = checkpoint::folder(&directory, last).display().to_string();
        assert!(error.contains(&named), "{error}");
        if last == 60 {
            assert_eq!(
                checkpoint::verify(&checkpoint::folder(&directory, 60)).unwrap(),
                before
            );
        }
    }
}

/// A shell that lets no file grow beyond `blocks` of 512 bytes, as a full disk would.
fn on_a_full_disk(blocks: usize, config: &Path) -> Command {
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    command
        .args(["-c", &script, PROGRAM, "fit"])
        .arg(config)
        .arg("--resume");
    command
}

#[test]
fn a_full_disk_costs_no_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    succeeded(&fit(&config_file(root, "run", 10)).output().unwrap());
    let directory = config(root, "run", 1).run.directory;
    let longer = config_file(root, "run", 20);
    let error = failed(&on_a_full_disk(20, &longer).output().unwrap());
    let kept = checkpoint::folder(&directory, 10);
    assert!(
        error.contains("cannot write") && error.contains(&kept.display().to_string()),
        "{error}"
    );
    assert_eq!(checkpoint::steps(&directory), [10]);
    checkpoint::verify(&kept).unwrap();
    let left: Vec<_> = fs::read_dir(kept.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    // With space again it goes on.
    succeeded(&fit(&longer).arg("--resume").output().unwrap());
    assert_eq!(checkpoint::steps(&directory), [10, 20]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    succeeded(&fit(&config_file(root, "run", 20)).output().unwrap());
    let directory = config(root, "run", 1).run.directory;
    let longer = config_file(root, "run", 30);
    let latest = checkpoint::folder(&directory, 20);
    let path = latest.join("optimizer.bpk");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();

    let error = failed(&fit(&longer).arg("--resume").output().unwrap());
    for says in [
        "optimizer.bpk is damaged",
        "--resume-from 10",
        &latest.display().to_string(),
    ] {
        assert!(error.contains(says), "{error}");
    }
    succeeded(&fit(&longer).args(["--resume-from", "10"]).output().unwrap());
    assert_eq!(checkpoint::steps(&directory).last(), Some(&30));
    assert!(latest.with_file_name("abandoned-00000020").is_dir());
}

#[test]
fn data_that_does_not_fit_is_named_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let (tokenizer, _) = prepared(root);
    let file = config_file(root, "run", 10);
    let refused = |says: &str| {
        let error = failed(&fit(&file).output().unwrap());
        assert!(error.contains(says), "{error}");
        assert!(!config(root, "run", 1).run.directory.exists());
    };
    let train = root.join("data/train.tokens");
    let whole = fs::read(&train).unwrap();
    fs::write(&train, &whole[..whole.len() - 10]).unwrap();
    refused("train.tokens");
    fs::write(&train, whole).unwrap();

    let json = fs::read_to_string(&tokenizer).unwrap();
    fs::write(&tokenizer, format!("{json} ")).unwrap();
    refused("was made with another tokenizer");
}

#[test]
fn the_best_checkpoint_remains_and_can_be_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    // No validation falls on a step whose checkpoint is due.
    let of = |steps: u64, lr: &str| {
        changed(
            &config_file(root, "run", steps),
            &[
                ("validate_every = 1000", "validate_every = 7"),
                ("checkpoint_every = 10", "checkpoint_every = 1000\nkeep = 1"),
                ("lr = 3e-3", lr),
            ],
        )
    };
    let first = fit(&of(20, "lr = 3e-3")).output().unwrap();
    succeeded(&first);
    let said = String::from_utf8(first.stderr).unwrap();
    for step in [7, 14, 20] {
        assert!(said.contains(&format!("step {step}: wrote")), "{said}");
    }
    // Of the weights nothing is left.
    let file = of(30, "lr = 1e-1\nweight_decay = 9.0");
    succeeded(&fit(&file).arg("--resume").output().unwrap());
    let directory = config(root, "run", 1).run.directory;
    let validations = metrics(&directory).into_iter().filter_map(|line| match line {
        Line::Validation(line) => Some((line.bound, line.step)),
        Line::Step(_) => None,
    });
    let (bound, step) = validations
        .min_by(|one, other| one.0.total_cmp(&other.0))
        .unwrap();
    assert_ne!(step, 30, "the last is not the best");
    assert_eq!(checkpoint::steps(&directory), [step, 30]);
    for (which, found) in [(Which::Best, step), (Which::Last, 30), (Which::After(step), step)] {
        let state = checkpoint::read_state(&which.folder(&directory).unwrap()).unwrap();
        assert_eq!(state.step, found, "{which:?}");
    }
    let state = checkpoint::read_state(&Which::Last.folder(&directory).unwrap()).unwrap();
    assert_eq!(state.best, Some((bound, step)));
    let measured = |which: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(["evaluate", "--json", "--draws", "2", "--checkpoint", which]);
        let output = command.arg(&file).output().unwrap();
        succeeded(&output);
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(measured("best"), measured(&step.to_string()));
    assert_ne!(measured("best"), measured("last"));
    assert!(Which::After(1).folder(&directory).is_err());
}

/// A bundle of other noise, or with the tokens of another tokenizer, would write gibberish.
#[test]
fn what_a_checkpoint_was_trained_with_decides() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let (tokenizer, _) = prepared(root);
    let file = config_file(root, "run", 10);
    succeeded(&fit(&file).output().unwrap());
    let out = root.join("bundle");
    let told = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(arguments).arg(&file);
        if arguments == ["export"] {
            command.args(["--name", "tiny"]).arg("--out").arg(&out);
        }
        command.output().unwrap()
    };
    let whole = fs::read_to_string(&file).unwrap();
    for (from, to, says) in [
        (
            "kind = \"absorbing\"",
            "kind = \"uniform\"",
            "graph.kind: \"absorbing\" -> \"uniform\"",
        ),
        ("eps = 1e-3", "eps = 1e-4", "schedule.eps: 0.001 -> 0.0001"),
        ("heads = 2", "heads = 4", "network.heads: 2 -> 4"),
        (
            "scale_by_sigma = true",
            "scale_by_sigma = false",
            "network.scale_by_sigma: ",
        ),
    ] {
        changed(&file, &[(from, to)]);
        // Scores of uniform noise cannot be scaled.
        if to.contains("uniform") {
            changed(&file, &[("scale_by_sigma = true", "scale_by_sigma = false")]);
        }
        for command in [&["export"][..], &["evaluate", "--draws", "1"]] {
            let error = failed(&told(command));
            assert!(error.contains(says), "{command:?}: {error}");
        }
        fs::write(&file, &whole).unwrap();
    }
    let json = fs::read_to_string(&tokenizer).unwrap();
    fs::write(&tokenizer, format!("{json} ")).unwrap();
    let error = failed(&told(&["export"]));
    assert!(
        error.contains("data.tokenizer") && error.contains("not the one"),
        "{error}"
    );
    fs::write(&tokenizer, json).unwrap();
    assert!(!out.exists());

    // How it is trained from here on is another matter; and nothing but the checkpoint and the tokenizer is needed.
    changed(&file, &[("lr = 3e-3", "lr = 1e-3"), ("steps = 10", "steps = 20")]);
    fs::remove_dir_all(root.join("data")).unwrap();
    succeeded(&told(&["export"]));
    let manifest = fs::read_to_string(out.join("manifest.json")).unwrap();
    let root = root.to_str().unwrap();
    assert!(!manifest.contains(root), "a path of this machine: {manifest}");
    let error = failed(&told(&["export"]));
    assert!(error.contains("is there already"), "{error}");
}

#[test]
fn two_runs_do_not_share_a_directory() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let file = config_file(root, "run", 1_000_000);
    let mut child = started_until(&mut fit(&file), 10);
    let error = failed(&fit(&file).arg("--resume").output().unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(error.contains("another process trains in"), "{error}");
}

#[test]
fn a_report_is_one_page_of_a_real_run() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    succeeded(
        &fit(&changed(&config_file(root, "run", 20), &FREQUENT))
            .output()
            .unwrap(),
    );
    let directory = config(root, "run", 1).run.directory;
    let output = Command::new(PROGRAM)
        .arg("report")
        .arg(&directory)
        .output()
        .unwrap();
    succeeded(&output);
    let page = fs::read_to_string(directory.join("report.html")).unwrap();
    for part in [
        "Training loss",
        "Bound on held-out text",
        "After 20 steps",
        "batch_size = 8",
        "sha256",
    ] {
        assert!(page.contains(part), "{part}");
    }
    for name in ["loss.svg", "bound.svg", "config.toml", "provenance.json"] {
        assert!(directory.join(name).is_file(), "{name}");
    }
    let resolved = training::config::RunConfig::read(&directory.join("config.toml")).unwrap();
    assert_eq!(
        resolved,
        training::config::RunConfig::read(&root.join("run-20.toml")).unwrap()
    );
}
