//! `training evaluate --samples` and `--written`, on the demo model's bundle.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};

fn evaluate(arguments: &[&str]) -> Output {
    let bundle = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo/world-english/1");
    Command::new(env!("CARGO_BIN_EXE_training"))
        .args(["evaluate", "--bundle"])
        .arg(bundle)
        .args(arguments)
        .output()
        .unwrap()
}

fn object(output: &Output) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn samples_are_drawn_and_measured_beside_text() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    fs::write(
        &text,
        "In the beginning God created the heavens and the earth. ".repeat(30),
    )
    .unwrap();
    let text = text.to_str().unwrap();
    let said = object(&evaluate(&[
        "--samples",
        "2",
        "--steps",
        "2",
        "--text",
        text,
        "--json",
    ]));
    assert_eq!((&said["steps"], &said["seed"]), (&json!(2), &json!(1)));
    assert_eq!(said["samples"]["sequences"], 2);
    // One sentence over and over has less variety than two steps' guesses.
    let entropy = |of: &str| said[of]["token_entropy_nats"]["mean"].as_f64().unwrap();
    assert!(entropy("held_out") < entropy("samples"), "{said}");
}

#[test]
fn what_a_server_wrote_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("written.jsonl");
    let result = |first: u32, nfe: u32| {
        let tokens: Vec<u32> = (first..first + 128).collect();
        json!({"result": {"canvas": 0, "tokens": tokens, "nfe": nfe}}).to_string()
    };
    let lines = [
        json!({"accepted": {"seed": 1}}).to_string(),
        result(300, 4),
        json!({"frame": {"step": 1}}).to_string(),
        result(600, 7),
    ];
    fs::write(&file, lines.join("\n")).unwrap();
    let path = file.to_str().unwrap();
    let said = object(&evaluate(&["--written", path, "--json"]));
    assert_eq!((&said["nfe"], &said["held_out"]), (&json!(5.5), &Value::Null));
    assert_eq!(said["samples"]["sequences"], 2);
    // 128 tokens, each once.
    let entropy = said["samples"]["token_entropy_nats"]["mean"].as_f64().unwrap();
    assert!((entropy - 128.0_f64.ln()).abs() < 1e-6, "{said}");

    fs::write(&file, "{\"accepted\": {}}\nno JSON").unwrap();
    let output = evaluate(&["--written", path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("line 2"), "{said}");
}
