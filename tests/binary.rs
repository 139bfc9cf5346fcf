//! The built binary: serve, its signals and errors, and the client commands.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

pub fn denoised() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_denoised"));
    command.env_remove("DENOISED_SERVER").env("NO_COLOR", "1");
    command
}

/// A running `denoised serve` on a free port; killed if a test fails.
pub struct Serving {
    child: Child,
    pub address: String,
}

impl Serving {
    pub fn start() -> Self {
        Self::start_with(&mut denoised())
    }

    pub fn start_with(command: &mut Command) -> Self {
        Self::start_at(command, "127.0.0.1:0")
    }

    pub fn start_at(command: &mut Command, address: &str) -> Self {
        let mut child = command
            .args(["serve", "--listen", address])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .split_once("://")
            .map(|(_, address)| address)
            .expect(&line)
            .to_owned();
        Self { child, address }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends the signal of this name.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// SIGTERM, then its exit code and log.
    pub fn stop(mut self) -> (Option<i32>, String) {
        self.terminate();
        let mut log = String::new();
        std::io::Read::read_to_string(&mut self.child.stderr.take().unwrap(), &mut log).unwrap();
        (self.child.wait().unwrap().code(), log)
    }

    /// SIGTERM, then its exit code, which must come within a minute though nobody reads its log.
    fn stop_unread(mut self) -> Option<i32> {
        self.terminate();
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("SIGTERM did not end the server");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[track_caller]
pub(crate) fn succeeds(output: &Output) -> String {
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{out}\n{err}");
    out.into_owned()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn serve_logs_one_line_generates_infills_and_exits_cleanly() {
    let server = Serving::start();
    let url = format!("http://{}", server.address);
    let run = |arguments: &[&str]| {
        let output = denoised()
            .args(arguments)
            .args(["--server", &url, "--steps", "8", "--seed", "1"])
            .output();
        succeeds(&output.unwrap())
    };
    let plain = run(&["generate", "--length", "24", "In the beginning"]);
    assert!(plain.starts_with("In the beginning") && !plain.contains('\u{2591}') && !plain.contains("---"));
    assert_eq!(
        run(&["generate", "--length", "24", "In the beginning"]),
        plain,
        "one seed, one text"
    );
    let live = run(&[
        "generate",
        "--length",
        "24",
        "--live",
        "always",
        "In the beginning",
    ]);
    assert!(live.contains("--- step 0/9  masked") && live.contains('\u{2591}') && live.ends_with(&plain));
    let infilled = run(&["infill", "My name is [[3]] and I am [[2]]."]);
    assert!(
        infilled.starts_with("My name is ") && infilled.contains(" and I am ") && infilled.ends_with(".\n")
    );
    let events = json_lines(&run(&[
        "generate",
        "--length",
        "16",
        "--num-samples",
        "2",
        "--json",
    ]));
    assert_eq!(events[0]["accepted"]["length"], 16);
    let results: Vec<&Value> = events.iter().filter_map(|event| event.get("result")).collect();
    assert_eq!(results.len(), 2);
    for result in results {
        assert_eq!(result["tokens"].as_array().unwrap().len(), 16);
        assert!(result["text"].is_string() && result["nfe"].as_u64().unwrap() <= 9 && result["seed"] == 1);
    }
    let models = denoised()
        .args(["models", "--server", &url, "--json"])
        .output()
        .unwrap();
    assert_eq!(json_lines(&succeeds(&models))[0]["default"], true);
    let refused = denoised()
        .args(["generate", "--length", "4096", "--server", &url])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(64));
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    // What was asked is told, a line a call.
    let ended = |call: &str| -> Vec<&str> {
        let lines = log.lines().filter(|line| line.contains("a call has ended"));
        lines.filter(|line| line.contains(call)).collect()
    };
    assert_eq!(ended("DiffusionService/Infill").len(), 1, "{log}");
    assert_eq!(ended("ModelService/ListModels").len(), 1, "{log}");
    let generated = ended("DiffusionService/Generate");
    assert_eq!(generated.len(), 5, "{log}");
    let told = |line: &str, name: &str| -> Option<String> {
        let rest = line.split(&format!(" {name}=")).nth(1)?;
        Some(rest.split_whitespace().next()?.trim_matches('"').to_owned())
    };
    let number = |name| told(generated[3], name).unwrap().parse::<u64>().unwrap();
    assert!(log.contains(&told(generated[3], "request").unwrap()));
    assert_eq!(told(generated[3], "model").unwrap(), "world-english@1");
    assert_eq!(told(generated[3], "caller").unwrap(), "127.0.0.1");
    assert_eq!(told(generated[3], "code").unwrap(), "OK");
    assert_eq!([number("canvases"), number("done")], [2, 2]);
    assert!((2..=18).contains(&number("evaluations")), "{log}");
    assert!(
        number("queue_ms") + number("network_ms") <= number("ms") && number("ms") > 0,
        "{log}"
    );
    // What was refused has a code, and took nothing.
    assert_eq!(told(generated[4], "code").unwrap(), "INVALID_ARGUMENT");
    assert_eq!(told(generated[4], "model").unwrap(), "world-english@1");
    assert_eq!(told(generated[4], "evaluations"), None);
    assert!(!log.contains("In the beginning"), "prompts are nobody's to read");
    let serving: Vec<&str> = log.lines().filter(|line| line.contains("serving on")).collect();
    assert_eq!(serving.len(), 1, "{log}");
    assert!(
        serving[0].contains(&url)
            && serving[0].contains("world-english@1 (default)")
            && serving[0].contains("on cpu")
    );
}

/// A log that cannot be written costs lines: no worker, no request, and not the end of the process.
#[test]
fn a_log_that_nobody_takes_holds_nothing_up() {
    for closed in [true, false] {
        // Everything is logged, from the frames of HTTP/2 on: far more than a pipe holds.
        let mut server = Serving::start_with(denoised().env("DENOISED__LOG__FILTER", "trace"));
        if closed {
            drop(server.child.stderr.take());
        }
        let url = format!("http://{}", server.address);
        for seed in 0..10 {
            let output = denoised()
                .args(["generate", "--server", &url, "--length", "16", "--steps", "8"])
                .args(["--seed", &seed.to_string(), "In the beginning"])
                .output();
            succeeds(&output.unwrap());
        }
        assert_eq!(server.stop_unread(), Some(0), "closed: {closed}");
    }
}

#[test]
fn an_error_that_cannot_be_printed_still_has_its_exit_code() {
    let full = std::fs::File::create("/dev/full").unwrap();
    let mut command = denoised();
    let status = command
        .args(["serve", "--config", "/nowhere.toml"])
        .stderr(full)
        .status();
    assert_eq!(status.unwrap().code(), Some(64));
}

#[test]
fn without_a_server_one_is_started() {
    let output = denoised()
        .args(["generate", "--length", "12", "--steps", "4", "And"])
        .output()
        .unwrap();
    assert!(succeeds(&output).starts_with("And"));
}

#[test]
fn mistakes_end_with_one_line_and_the_right_code() {
    for (arguments, code, says) in [
        (
            vec!["generate", "--server", "http://127.0.0.1:1"],
            69,
            "no server answers",
        ),
        (
            vec!["generate", "--temperature", "nan"],
            64,
            "sampling.temperature",
        ),
        (
            vec!["generate", "--server", "ftp://127.0.0.1:1"],
            64,
            "must begin with http:// or https://",
        ),
        (
            vec![
                "generate",
                "--server",
                "http://127.0.0.1:1",
                "--ca-certificate",
                "a",
            ],
            64,
            "certificates are for https://",
        ),
        (
            vec![
                "generate",
                "--server",
                "https://127.0.0.1:1",
                "--ca-certificate",
                "/nowhere.pem",
            ],
            64,
            "--ca-certificate /nowhere.pem",
        ),
        (vec!["infill", "no gap"], 64, "template"),
        (vec!["infill", "open [[gap"], 64, "not closed"),
        (vec!["generate", "--model", "a@b"], 64, "NAME@VERSION"),
        (vec!["generate", "--sampler", "magic"], 64, "tweedie"),
        (
            vec!["generate", "--sampler", "remask", "--normalize"],
            64,
            "tweedie or euler",
        ),
        (
            vec!["generate", "--temperature", "-1"],
            64,
            "is -1, must be 0 to 100",
        ),
        (
            vec!["generate", "--sampler", "first-hitting", "--steps", "5"],
            64,
            "sampling.steps",
        ),
        (vec!["generate", "--file", "/nowhere.txt"], 64, "/nowhere.txt"),
        (vec!["detokenize", "5", "five"], 64, "\"five\" is no token id"),
        (
            vec!["generate", "--model", "unheard-of"],
            70,
            "\"unheard-of\" is not known; there are world-english@1",
        ),
        (vec!["serve", "--config", "/nowhere.toml"], 64, "nowhere"),
        (vec!["serve", "--workers", "0"], 64, "engine.workers"),
        (
            vec!["serve", "--repository", "/nowhere"],
            64,
            "models.repository: /nowhere",
        ),
        (
            vec!["serve", "--repository", "training/demo/world-english"],
            64,
            "is the folder of one model",
        ),
        (
            vec!["serve", "--repository", "training/demo/world-english/1"],
            64,
            "is one version of a model",
        ),
        (vec!["dance"], 64, "dance"),
    ] {
        let output = denoised().args(&arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(says), "{arguments:?}: {error}");
        if arguments[0] != "dance" && says != "tweedie" {
            assert_eq!(error.trim().lines().count(), 1, "{error}");
        }
    }
}

#[test]
fn options_that_are_no_numbers_say_what_is_allowed() {
    for (arguments, says) in [
        (["--seed", "-1"], "0 to 18446744073709551615"),
        (["--seed", "x"], "0 to 18446744073709551615"),
        (["--deadline", "0"], "0.001 to"),
        (["--connect-timeout", "0"], "1..=3600"),
    ] {
        let output = denoised().arg("generate").args(arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{error}");
        assert!(error.contains(says) && error.contains(arguments[0]), "{error}");
    }
}

#[test]
fn prompts_and_tokens_come_from_standard_input_and_files_too() {
    let server = Serving::start();
    let url = format!("http://{}", server.address);
    let fed = |arguments: &[&str], input: &str| {
        let mut child = denoised()
            .args(arguments)
            .args(["--server", &url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        succeeds(&child.wait_with_output().unwrap())
    };
    let text = "And God said, Let there be light";
    let sampling = ["--length", "16", "--steps", "4", "--seed", "3"];
    let asked = fed(&[&["generate", text][..], &sampling].concat(), "");
    assert!(asked.starts_with(text));
    assert_eq!(
        fed(
            &[&["generate", "-"][..], &sampling].concat(),
            &format!("{text}\n")
        ),
        asked
    );
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(
        fed(&[&["generate", "--file", file][..], &sampling].concat(), ""),
        asked
    );
    let filled = fed(&["infill", "-", "--steps", "4"], "He said[[3]].\n");
    assert!(
        filled.starts_with("He said") && filled.ends_with(".\n"),
        "{filled}"
    );
    let ids = fed(&["tokenize", text], "");
    assert!(
        ids.split_whitespace().all(|id| id.parse::<u32>().is_ok()),
        "{ids}"
    );
    assert_eq!(fed(&["tokenize", "-"], text), ids);
    assert_eq!(fed(&["detokenize", "-"], &ids), format!("{text}\n"));
    let words: Vec<&str> = std::iter::once("detokenize")
        .chain(ids.split_whitespace())
        .collect();
    assert_eq!(fed(&words, ""), format!("{text}\n"));
}

#[test]
fn texts_are_scored_and_chosen_among() {
    let server = Serving::start();
    let run = |arguments: &[&str]| {
        let output = denoised()
            .args(arguments)
            .env("DENOISED_SERVER", format!("http://{}", server.address))
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let lines = |arguments: &[&str]| {
        let (code, out, error) = run(arguments);
        assert_eq!(code, Some(0), "{error}");
        out.lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .collect::<Vec<_>>()
    };
    let all = [
        "score",
        "--json",
        "--exact",
        "left-to-right",
        "--given",
        "And the king said to",
    ];
    let scores = lines(&[&all[..], &[" his servants.", " servants his."]].concat());
    assert_eq!(scores[0]["scoring"]["exact"], "left-to-right");
    let nats = |text: u64| {
        let score = scores.iter().find(|line| line["score"]["text"] == text);
        score.unwrap()["score"]["nats"].as_f64().unwrap()
    };
    assert!(nats(0) + 3.0 < nats(1));
    let total = &scores.last().unwrap()["total"];
    assert!((total["nats"].as_f64().unwrap() - nats(0) - nats(1)).abs() < 1e-9);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("texts");
    std::fs::write(&file, "And he said,\n\nGo up to the house.\n").unwrap();
    let read = lines(&[
        "score",
        "--json",
        "--lines",
        "--draws",
        "8",
        "--file",
        file.to_str().unwrap(),
    ]);
    assert_eq!(read.iter().filter(|line| line.get("score").is_some()).count(), 2);
    let (_, shown, _) = run(&["score", "--draws", "8", "--file", file.to_str().unwrap()]);
    assert!(
        shown.contains("And he said,…") && shown.contains(" bits/byte"),
        "{shown}"
    );

    let template = "And he went up to the [[]] of the king.";
    let chosen = lines(&["choose", "--json", template, "of", "house"]);
    assert_eq!(chosen[0]["candidate"]["text"], "house");
    assert_eq!(chosen[0]["candidate"]["index"], 1);
    let (_, shown, _) = run(&["choose", template, "of", "house"]);
    assert!(shown.lines().next().unwrap().ends_with(" nats  house"), "{shown}");

    for (arguments, code, told) in [
        (&["choose", "no slot", "a", "b"][..], 64, "[[]] once"),
        (&["choose", "[[]] [[]]", "a", "b"], 64, "[[]] once"),
        (&["choose", "[[]]", "a"], 64, "2 values"),
        (&["score"], 64, "TEXT"),
        (&["score", "--lines", ""], 64, "no text to score"),
        (&["score", "--seed", "-1", "a"], 64, "whole number"),
        (
            &["score", "--draws", "8", "--exact", "surest-first", "a"],
            64,
            "--exact",
        ),
        (
            &["score", "--draws", "3", "a"],
            64,
            "likelihood.bound.draws: is 3",
        ),
        (
            &["score", "--exact", "surest-first", "--seed", "1", "a"],
            64,
            "seed: is for bounds",
        ),
    ] {
        let (found, _, error) = run(arguments);
        assert!(
            found == Some(code) && error.contains(told),
            "{arguments:?}: {found:?} {error}"
        );
    }
}

/// Requests come when they are due, however long they take, and every one of them is told of.
#[test]
fn a_load_is_put_on_a_server_and_told() {
    let server = Serving::start();
    let url = format!("http://{}", server.address);
    let bench = |arguments: &[&str]| {
        let output = denoised()
            .args(["bench", "--server", &url, "--seconds", "1", "--warm-up", "0"])
            .args(arguments)
            .output()
            .unwrap();
        succeeds(&output)
    };
    let told = |arguments: &[&str]| {
        let line = bench(&[arguments, &["--json"]].concat());
        json_lines(&line).remove(0)["bench"].clone()
    };
    let closed = told(&[
        "--streams",
        "3",
        "--length",
        "16",
        "--steps",
        "4",
        "--num-samples",
        "2",
    ]);
    assert!(
        closed["requests"].as_u64().unwrap() >= 3 && closed["failed"] == json!({}),
        "{closed}"
    );
    let evaluations = closed["evaluations_per_canvas"].as_f64().unwrap();
    assert!(
        evaluations > 1.0 && evaluations <= 5.0,
        "four steps and the last denoising: {evaluations}"
    );
    assert!(
        closed["first_frame_ms"]["p50"].as_f64() <= closed["whole_ms"]["p50"].as_f64(),
        "{closed}"
    );
    assert!(told(&["--length", "16", "--no-frames"])["first_frame_ms"].is_null());

    let all = |told: &Value| {
        let failed = told["failed"].as_object().unwrap().values();
        let failed: u64 = failed.map(|requests| requests.as_u64().unwrap()).sum();
        told["requests"].as_u64().unwrap() + failed + told["not_sent"].as_u64().unwrap()
    };
    let quick = told(&["--rate", "30", "--length", "8", "--steps", "1"]);
    let slow = told(&["--rate", "30", "--length", "128", "--steps", "64"]);
    assert!(all(&quick) > 10, "{quick}");
    assert_eq!(all(&quick), all(&slow), "due at the same times");
    assert!(slow["seconds"].as_f64() > quick["seconds"].as_f64(), "{slow}");

    let folder = tempfile::tempdir().unwrap();
    let mix = folder.path().join("mix");
    let lines = [
        "1 --length 8 --steps 2 'In the'",
        "1 infill --steps 2 'In the [[4]]'",
        "1 --length 9999",
    ];
    std::fs::write(&mix, lines.join("\n")).unwrap();
    let mixed = bench(&["--rate", "50", "--mix", mix.to_str().unwrap()]);
    assert!(
        mixed.contains("failed with InvalidArgument: ") && mixed.contains(" p99.9"),
        "{mixed}"
    );
    assert_eq!(mixed.matches("failed with").count(), 1, "{mixed}");
    let refused = denoised()
        .args(["bench", "--length", "8", "--mix"])
        .arg(&mix)
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(64), "{refused:?}");
}

#[test]
fn what_speaks_no_grpc_is_said_to() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                .ok();
        }
    });
    for arguments in [&["generate", "--retries", "0"][..], &["models"]] {
        let output = denoised()
            .args(arguments)
            .args(["--server", &url])
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(69), "{error}");
        assert!(error.contains("speaks no gRPC"), "{error}");
        assert_eq!(error.trim().lines().count(), 1, "{error}");
    }
}

/// A server of the command's own has only just started: what it serves is told once it is loaded, or cannot be.
#[test]
fn what_an_own_server_serves_is_loaded_when_it_is_told() {
    let told = succeeds(&denoised().arg("models").output().unwrap());
    assert!(told.contains("  ready  ") && !told.contains("loading"), "{told}");
}

#[test]
fn a_missing_or_wrong_runtime_is_one_line_with_the_command_that_fixes_it() {
    let folder = tempfile::tempdir().unwrap();
    let wrong = folder.path().join("libonnxruntime.so");
    std::fs::write(&wrong, "not a library").unwrap();
    for path in [folder.path().join("missing.so"), wrong] {
        let output = denoised()
            .args(["serve", "--listen", "127.0.0.1:0"])
            .env("ORT_DYLIB_PATH", &path)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(70), "{error}");
        assert_eq!(error.trim().lines().count(), 1, "{error}");
        assert!(
            error.contains("make tools") && error.contains(path.to_str().unwrap()),
            "{error}"
        );
    }
}

#[test]
fn a_server_that_dies_is_said_to_have_gone_away() {
    let server = Serving::start();
    let url = format!("http://{}", server.address);
    let mut command = denoised();
    let mut client = command
        .args([
            "generate",
            "--server",
            &url,
            "--json",
            "--steps",
            "4096",
            "--num-samples",
            "64",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // In the middle of a request, which takes seconds: its first line says that it is accepted.
    let mut out = BufReader::new(client.stdout.take().unwrap());
    out.read_line(&mut String::new()).unwrap();
    drop(server);
    std::io::copy(&mut out, &mut std::io::sink()).unwrap();
    let output = client.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{error}");
    assert_eq!(error.trim().lines().count(), 1, "{error}");
}
