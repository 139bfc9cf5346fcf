//! The command line on a terminal: what a person sees, at every moment.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::binary::{Serving, succeeds};
use crate::support::{python, skipped};

/// What came of a command in a terminal of 80 columns.
#[derive(Debug)]
struct Seen {
    code: i64,
    screen: Vec<String>,
    screens: Vec<Vec<String>>,
    has_cursor: bool,
    raw: String,
}

/// Runs `denoised` with `arguments` in a terminal and does `steps` there.
fn seen(arguments: &[&str], environment: &[(&str, &str)], steps: &Value) -> Option<Seen> {
    let python = python("python", "pyte")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/terminal.py");
    let output = Command::new(python)
        .arg(script)
        .arg(steps.to_string())
        .arg(env!("CARGO_BIN_EXE_denoised"))
        .args(arguments)
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let report: Value = serde_json::from_str(&succeeds(&output)).unwrap();
    let lines = |lines: &Value| -> Vec<String> {
        let lines = lines.as_array().unwrap().iter();
        lines.map(|line| line.as_str().unwrap().to_owned()).collect()
    };
    Some(Seen {
        code: report["code"].as_i64().unwrap(),
        screen: lines(&report["screen"]),
        screens: report["screens"].as_array().unwrap().iter().map(lines).collect(),
        has_cursor: report["cursor"] == true,
        raw: report["raw"].as_str().unwrap().to_owned(),
    })
}

const GENERATE: [&str; 8] = [
    "generate",
    "--length",
    "64",
    "--steps",
    "24",
    "--seed",
    "14",
    "In the beginning",
];

fn with<'a>(server: &'a [&'a str], arguments: &[&'a str]) -> Vec<&'a str> {
    let (command, rest) = arguments.split_first().unwrap();
    [&[*command], server, rest].concat()
}

#[test]
fn text_denoises_in_place_and_its_lines_do_not_jump() {
    let server = Serving::start();
    let url = format!("http://{}", server.address);
    let at = ["--server", &url];
    let Some(live) = seen(&with(&at, &GENERATE), &[], &json!([])) else {
        return;
    };
    assert_eq!((live.code, live.has_cursor), (0, true), "{live:?}");
    let masks = |screen: &Vec<String>| screen.concat().matches('░').count();
    let states: Vec<&Vec<String>> = live
        .screens
        .iter()
        .filter(|screen| screen.concat().contains("step "))
        .collect();
    assert!(states.len() >= 10, "{} states", states.len());
    assert!(masks(states[0]) > 100 && masks(states[states.len() - 1]) < masks(states[0]) / 4);
    for screen in &states {
        let progress = screen.iter().filter(|line| line.contains("step ")).count();
        assert_eq!(progress, 1, "{screen:?}");
    }
    // What a line begins with is masked or stays, in nearly all of them.
    let begins = |screen: &Vec<String>, line: usize| -> Option<String> {
        let line = screen.get(line)?;
        let word = line.split_whitespace().next()?;
        (!word.contains('░') && word != "step").then(|| word.to_owned())
    };
    let (mut stays, mut jumps) = (0, 0);
    for pair in states.windows(2) {
        for line in 0..6 {
            if let (Some(before), Some(after)) = (begins(pair[0], line), begins(pair[1], line)) {
                *(if before == after { &mut stays } else { &mut jumps }) += 1;
            }
        }
    }
    assert!(stays > 20 * jumps, "{stays} stay, {jumps} jump");
    // In the end there is the text alone, as a pipe gets it.
    let piped = Command::new(env!("CARGO_BIN_EXE_denoised"))
        .args(with(&at, &GENERATE))
        .output()
        .unwrap();
    let text = String::from_utf8(piped.stdout).unwrap();
    let bare = |text: &str| text.replace(|c: char| c.is_whitespace(), "");
    assert_eq!(bare(&live.screen.concat()), bare(&text));
    assert!(
        live.raw.contains("\u{1b}[38;5;2m") && live.raw.contains("\u{1b}[38;5;1m"),
        "sure and unsure differ"
    );

    // Without colours, and on a terminal that cannot be drawn on.
    let plain = seen(&with(&at, &GENERATE), &[("NO_COLOR", "1")], &json!([])).unwrap();
    assert!(plain.raw.contains('░') && !plain.raw.contains("\u{1b}[38") && !plain.raw.contains("\u{1b}[1m"));
    let dumb = seen(&with(&at, &GENERATE), &[("TERM", "dumb")], &json!([])).unwrap();
    assert_eq!(dumb.raw.replace("\r\n", "\n"), text);
}

#[test]
fn what_stands_there_stays_when_one_interrupts() {
    let server = Serving::start();
    let url = format!("http://{}", server.address);
    let at = ["--server", &url];
    let arguments = with(
        &at,
        &["generate", "--pace", "200", "--seed", "3", "And it happened"],
    );
    let steps = json!([
        ["wait", "step 5/"],
        ["size", 100, 30],
        ["wait", "step 8"],
        ["interrupt"]
    ]);
    let Some(seen) = seen(&arguments, &[], &steps) else {
        return;
    };
    assert_eq!((seen.code, seen.has_cursor), (130, true));
    let screen = seen.screen.join("\n");
    assert!(
        screen.starts_with("And it happened") && screen.contains('░'),
        "{screen}"
    );
    assert_eq!(screen.matches("step ").count(), 1, "{screen}");
    let (_, log) = server.stop();
    assert!(log.contains("a call has ended"), "{log}");
}

#[test]
fn a_recording_is_replayed_without_a_server_and_becomes_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let (recording, picture) = (folder.path().join("run"), folder.path().join("run.svg"));
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_denoised"))
            .args(arguments)
            .output()
            .unwrap();
        succeeds(&output)
    };
    let file = recording.to_str().unwrap();
    let text = run(&[
        "infill",
        "--seed",
        "1",
        "--num-samples",
        "2",
        "--record",
        file,
        "The king[[5]] went[[3]].",
    ]);
    let texts = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with("=== "));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(texts(&run(&["replay", file])), texts(&text));
    run(&[
        "replay",
        file,
        "--svg",
        picture.to_str().unwrap(),
        "--columns",
        "60",
    ]);
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(
        svg.starts_with("<svg ") && svg.contains('░') && svg.contains("king") && svg.contains("<animate ")
    );
    let refused = Command::new(env!("CARGO_BIN_EXE_denoised"))
        .args(["replay", "Cargo.toml"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(64));
    let Some(seen) = seen(&["replay", file, "--pace", "20"], &[], &json!([])) else {
        return;
    };
    assert!(seen.screens.len() > 5 && seen.has_cursor, "{seen:?}");
    let bare = |text: &str| text.replace(|c: char| c.is_whitespace(), "");
    assert!(
        bare(&seen.screen.concat()).contains(&bare(&texts(&text)[0])),
        "{seen:?}"
    );
}

#[test]
fn one_plays_with_a_canvas() {
    let steps = json!([
        ["wait", "evaluations, seed 7"],
        // "king" becomes a gap, and what follows is noised again.
        ["send", "\u{1b}[C\u{1b}[Cg"],
        ["wait", "1 of"],
        ["send", "\u{1b}[Cn"],
        ["wait", "2 of"],
        ["send", "\r"],
        ["wait", "evaluations, seed 7"],
        ["send", "e"],
        ["wait", "the template"],
        ["send", "[[3]]!\r"],
        ["wait", "evaluations, seed 7"],
        ["send", "q"],
    ]);
    let arguments = [
        "play",
        "--seed",
        "7",
        "--pace",
        "5",
        "And the king said[[4]] to them.",
    ];
    let Some(seen) = seen(&arguments, &[], &steps) else {
        return;
    };
    assert_eq!((seen.code, seen.has_cursor), (0, true), "{seen:?}");
    // The screen is given back, and the text is left on it.
    let (_, last) = seen.raw.rsplit_once("\u{1b}[?1049l").unwrap();
    let last = last.trim().trim_end_matches("\u{1b}[?25h").trim();
    assert!(
        last.starts_with("And the") && last.contains(" to them.") && last.ends_with('!'),
        "{last:?}"
    );
    let piped = Command::new(env!("CARGO_BIN_EXE_denoised"))
        .arg("play")
        .output()
        .unwrap();
    assert_eq!(piped.status.code(), Some(64));
}

#[test]
fn shells_and_man_are_told_of_every_command() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_denoised"))
            .args(arguments)
            .output()
            .unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(run(&["completions", shell]).stdout).unwrap();
        assert!(
            script.contains("entropy-bound") && script.contains("replay"),
            "{shell}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(run(&["manual", folder.path().to_str().unwrap()]).status.success());
    let page = std::fs::read_to_string(folder.path().join("denoised-generate.1")).unwrap();
    assert!(
        page.contains("Exit codes: 0 fine, 64 bad command line") && page.contains("\\-\\-record"),
        "{page}"
    );
    let script = run(&["completions", "bash"]).stdout;
    let file = folder.path().join("completions");
    std::fs::write(&file, script).unwrap();
    let complete = format!(
        "source {}; COMP_WORDS=(denoised gen); COMP_CWORD=1; _denoised denoised gen denoised; echo ${{COMPREPLY[@]}}",
        file.display()
    );
    match Command::new("bash").args(["-c", &complete]).output() {
        Ok(output) => assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "generate"),
        Err(error) => skipped(format_args!("bash: {error}: its completions were not tried")),
    }
}
