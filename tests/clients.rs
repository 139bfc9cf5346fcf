//! The clients and examples of `tests/clients`, each used as it says that it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::binary::{Serving, succeeds};
use crate::support::{python, skipped};

fn clients() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// The package is built in its own folder, where there is room for one.
static INSTALLING: Mutex<()> = Mutex::new(());

/// A folder that the Python package is installed to, and a Python that finds it.
pub(crate) fn installed(modules: &str) -> Option<(tempfile::TempDir, Command)> {
    let python = python("python", modules)?;
    let folder = tempfile::tempdir().unwrap();
    let alone = INSTALLING.lock();
    let install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
    ];
    let installing = Command::new(&python)
        .args(install)
        .arg("--disable-pip-version-check")
        .arg("--target")
        .args([folder.path(), &clients().join("python")])
        .output();
    succeeds(&installing.unwrap());
    drop(alone);
    let mut command = Command::new(python);
    command.env("PYTHONPATH", folder.path());
    Some((folder, command))
}

#[test]
fn the_python_package_installs_and_does_what_its_readme_says() {
    let Some((folder, mut command)) = installed("grpc_tools, mypy") else {
        return;
    };
    let server = Serving::start();
    let script = clients().join("../tools/python_client.py");
    let told = succeeds(&command.arg(script).arg(&server.address).output().unwrap());
    let told: Value = serde_json::from_str(&told).unwrap();
    let kinds: Vec<&str> = told["kinds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kind| kind.as_str().unwrap())
        .collect();
    assert_eq!(kinds[0], "Accepted");
    assert_eq!(kinds.iter().filter(|kind| **kind == "Result").count(), 2);
    assert_eq!(
        (&told["model"], &told["seed"]),
        (&json!("world-english@1"), &json!(7))
    );
    let masked: Vec<f64> = told["masked"]
        .as_array()
        .unwrap()
        .iter()
        .map(|share| share.as_f64().unwrap())
        .collect();
    assert!(
        masked[0] == 1.0 && masked[masked.len() - 1] == 0.0 && masked.is_sorted_by(|a, b| a >= b),
        "{masked:?}"
    );
    let texts: Vec<&str> = told["texts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap())
        .collect();
    for text in &texts {
        assert!(text.starts_with("And the king said"), "{text}");
        assert!(
            text.ends_with(" to the people.") || text.ends_with(" to the priest."),
            "{text}"
        );
    }
    for truth in ["whole", "resumed", "likelier"] {
        assert_eq!(told[truth], true, "{truth}: {told}");
    }
    let mut sorted = texts.clone();
    sorted.sort_unstable();
    assert_eq!((&told["async"], &told["at_once"]), (&json!(sorted), &json!(8)));
    assert_eq!(told["quiet"], json!(["Accepted", "Result"]));
    assert!(
        told["generated"]
            .as_str()
            .unwrap()
            .starts_with("In the beginning")
    );
    let edited = told["edited"].as_str().unwrap();
    assert!(
        edited.starts_with("He went") && edited.ends_with(" the king."),
        "{edited}"
    );
    assert_eq!(told["chosen"], json!(["said", "elephant"]));
    assert_eq!(told["models"], json!(["world-english"]));
    assert_eq!(told["refused"][0], "INVALID_ARGUMENT");
    assert!(told["refused"][1].as_str().unwrap().contains("sampling.steps"));

    // What its README shows runs, and its types hold.
    let readme = std::fs::read_to_string(clients().join("python/README.md")).unwrap();
    let shown = readme
        .split("```python\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let shown = shown.replace("127.0.0.1:50051", &server.address);
    let (program, path) = (command.get_program().to_owned(), folder.path().to_owned());
    let run = || {
        let mut command = Command::new(&program);
        command.env("PYTHONPATH", &path).current_dir(&path);
        command
    };
    assert!(succeeds(&run().args(["-c", &shown]).output().unwrap()).contains("My name is"));
    let config = clients().join("python/pyproject.toml");
    let mut typed = run();
    typed
        .args(["-m", "mypy", "--cache-dir=/dev/null", "--config-file"])
        .arg(config)
        .args(["-p", "denoised_client"]);
    let typed = typed.output().unwrap();
    assert!(
        typed.status.success(),
        "{}",
        String::from_utf8_lossy(&typed.stdout)
    );
}

/// The first of two servers is killed in the middle of its answer.
#[test]
fn the_python_client_goes_on_when_a_server_goes_away() {
    let Some((_folder, mut command)) = installed("grpc_tools") else {
        return;
    };
    let (first, second) = (Serving::start(), Serving::start());
    let script = "
import os, signal, sys
from denoised_client import Client, Frame, Result, Resumed
first, second, pid = sys.argv[1:]
asked = dict(length=96, steps=200, sampler='theta_trapezoidal', seed=5)
with Client(second) as client:
    expected = [event.text for event in client.generate('And', **asked) if isinstance(event, Result)]
seen = []
with Client(first, second) as client:
    for event in client.generate('And', **asked):
        seen.append(event)
        if isinstance(event, Frame) and event.step > 3 and pid:
            os.kill(int(pid), signal.SIGKILL)
            pid = ''
assert any(isinstance(event, Resumed) for event in seen), seen
assert [event.text for event in seen if isinstance(event, Result)] == expected
steps = [event.step for event in seen if isinstance(event, Frame)]
print(steps == sorted(steps))
";
    let mut command = command.args([
        "-c",
        script,
        &first.address,
        &second.address,
        &first.id().to_string(),
    ]);
    command = command.env("GRPC_ENABLE_FORK_SUPPORT", "0");
    assert_eq!(succeeds(&command.output().unwrap()).trim(), "True");
}

#[test]
fn a_run_is_plotted() {
    let Some((folder, mut command)) = installed("grpc_tools, matplotlib") else {
        return;
    };
    let server = Serving::start();
    let picture = folder.path().join("run.png");
    let plotting = command
        .arg(clients().join("python/examples/plot.py"))
        .arg(&server.address)
        .arg(&picture);
    assert!(succeeds(&plotting.output().unwrap()).starts_with("In the beginning"));
    let bytes = std::fs::read(&picture).unwrap();
    assert!(
        bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000,
        "{} bytes",
        bytes.len()
    );
}

#[test]
fn the_example_for_node_watches() {
    let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/node/node_modules");
    if !modules.join("@grpc/grpc-js").exists() {
        skipped("the packages of Node are not installed (make test-tools): its example was not run");
        return;
    }
    let server = Serving::start();
    let watch = |parts: &[&str]| {
        let mut node = Command::new("node");
        node.arg(clients().join("node/watch.js"))
            .arg(&server.address)
            .args(parts)
            .env("NODE_PATH", &modules);
        node.output().unwrap()
    };
    let told = succeeds(&watch(&["My name is", "6", "."]));
    let lines: Vec<&str> = told.lines().collect();
    assert_eq!(lines[0], "world-english@1, seed 1");
    assert!(
        lines[1].contains("My name is░░░░░░.") && lines.len() > 4,
        "{told}"
    );
    let last = &told[told.rfind("My name is").unwrap()..];
    assert!(!last.contains('░') && last.ends_with(".\n"), "{told}");
    let refused = watch(&["No gap"]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        refused.status.code() == Some(1) && error.contains("INVALID_ARGUMENT: template"),
        "{error}"
    );
}

/// One of the examples of `tests/clients/rust`, which `cargo test` builds with the tests.
fn example(name: &str, arguments: &[&str]) -> Option<Command> {
    let folder = Path::new(env!("CARGO_BIN_EXE_denoised")).parent().unwrap();
    let built = folder.join("examples").join(name);
    if !built.exists() {
        skipped(format_args!(
            "the example {name} is not built (cargo build --examples): it was not run"
        ));
        return None;
    }
    let mut command = Command::new(built);
    command.args(arguments);
    Some(command)
}

#[test]
fn the_examples_in_rust_solve_what_they_say() {
    let server = Serving::start();
    let url = format!("http://{}", server.address);
    let run = |name: &str, arguments: &[&str]| {
        let arguments = [&[url.as_str()], arguments].concat();
        Some(succeeds(&example(name, &arguments)?.output().unwrap()))
    };
    let Some(form) = run("form", &[]) else { return };
    let form: Value = serde_json::from_str(&form).unwrap();
    assert!(
        ["David", "Moses", "Mary", "Joseph"].contains(&form["name"].as_str().unwrap()),
        "{form}"
    );
    assert!(
        form["is alive"].is_boolean() && !form["came from"].as_str().unwrap().is_empty(),
        "{form}"
    );

    let rewritten = run(
        "middle",
        &[
            "In the morning",
            " he went up to the house of the king",
            ", and came back.",
        ],
    )
    .unwrap();
    assert_eq!(rewritten.lines().count(), 3);
    for line in rewritten.lines() {
        assert!(
            line.starts_with("In the morning") && line.ends_with(", and came back."),
            "{line}"
        );
    }

    let ranked = run("definition", &["And the king", " to the people."]).unwrap();
    let shares: Vec<f64> = ranked
        .lines()
        .map(|line| line.split('%').next().unwrap().trim().parse().unwrap())
        .collect();
    assert!(shares.len() > 1 && shares.is_sorted_by(|a, b| a >= b), "{ranked}");
    assert!((shares.iter().sum::<f64>() - 100.0).abs() < 1.0, "{ranked}");

    let likelier = run(
        "likelier",
        &["He house to up went the.", "He went up to the house."],
    )
    .unwrap();
    assert!(
        likelier.starts_with("\"He went up to the house.\" is likelier, by "),
        "{likelier}"
    );

    let folder = tempfile::tempdir().unwrap();
    let typed = folder.path().join("typed");
    std::fs::write(&typed, "In the beginning\nAnd the king said\n").unwrap();
    let mut completing = example("complete", &[&url]).unwrap();
    completing.stdin(std::fs::File::open(&typed).unwrap());
    let completed = succeeds(&completing.output().unwrap());
    assert_eq!(completed.lines().count(), 2, "{completed}");
    assert!(completed.contains(" evaluations, "), "{completed}");
}
