//! Clients that nobody here wrote: grpcurl, which learns everything from reflection, and those of Python, Node and Go,
//! made from the protos.
//!
//! `make test-tools` fetches them; what is missing is said loudly to be skipped.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use crate::binary::Serving;

use crate::support::skipped;

pub fn grpcurl() -> Option<PathBuf> {
    let fetched = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".tools/bin/grpcurl");
    if fetched.exists() {
        return Some(fetched);
    }
    skipped("grpcurl is not installed (make test-tools): the foreign client was not run");
    None
}

#[test]
fn grpcurl_generates_infills_reflects_and_is_told_its_mistakes() {
    let Some(grpcurl) = grpcurl() else { return };
    let server = Serving::start();
    let call = |data: &str, method: &str| -> Output {
        let mut command = Command::new(&grpcurl);
        command.args(["-plaintext", "-max-time", "60"]);
        if !data.is_empty() {
            command.args(["-d", data]);
        }
        command
            .arg(&server.address)
            .args(method.split(' '))
            .output()
            .unwrap()
    };
    let fine = |data: &str, method: &str| {
        let output = call(data, method);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{method}: {error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let services = fine("", "list");
    for service in [
        "denoised.v1.DiffusionService",
        "denoised.v1.ModelService",
        "denoised.v1.ServerService",
        "grpc.health.v1.Health",
    ] {
        assert!(services.contains(service), "{services}");
    }
    assert!(fine("", "describe denoised.v1.GenerateRequest").contains("prompt"));
    for service in ["", "denoised.v1.DiffusionService"] {
        let health = fine(
            &format!(r#"{{"service": "{service}"}}"#),
            "grpc.health.v1.Health/Check",
        );
        assert!(health.contains("SERVING"), "{health}");
    }
    let generated = fine(
        r#"{"prompt": "In the beginning", "length": 24, "sampling": {"steps": 8, "seed": "1"}}"#,
        "denoised.v1.DiffusionService/Generate",
    );
    for word in [
        "accepted",
        "keyframe",
        "delta",
        "result",
        "FINISH_REASON_DONE",
        "In the beginning",
    ] {
        assert!(generated.contains(word), "{word}: {generated}");
    }
    // Defaults are such that nothing but a prompt is needed.
    assert!(
        fine(r#"{"prompt": "And"}"#, "denoised.v1.DiffusionService/Generate").contains("FINISH_REASON_DONE")
    );
    let infilled = fine(
        r#"{"template": [{"text": "The son of"}, {"gap": {"positions": 4}}, {"text": " went up."}]}"#,
        "denoised.v1.DiffusionService/Infill",
    );
    assert!(infilled.contains("The son of") && infilled.contains(" went up."));
    assert!(fine("", "denoised.v1.ModelService/ListModels").contains("world-english"));
    let about = fine("", "denoised.v1.ServerService/GetServer");
    assert!(
        about.contains(env!("CARGO_PKG_VERSION")) && about.contains("maxSteps"),
        "{about}"
    );
    for (data, method, says) in [
        (
            r#"{"sampling": {"steps": 0}}"#,
            "denoised.v1.DiffusionService/Generate",
            "sampling.steps",
        ),
        (
            r#"{"model": {"name": "nobody"}}"#,
            "denoised.v1.DiffusionService/Generate",
            "NotFound",
        ),
        ("{}", "denoised.v1.DiffusionService/Infill", "template"),
    ] {
        let output = call(data, method);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(says), "{error}");
    }
    // Details of errors are shown by name, since their types are reflected.
    let refused = call(
        r#"{"sampling": {"steps": 0}}"#,
        "denoised.v1.DiffusionService/Generate",
    );
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        error.contains("google.rpc.BadRequest") && error.contains("fieldViolations"),
        "{error}"
    );
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
}

/// What a client of another language printed.
fn printed(mut command: Command, client: &str, server: &Serving) -> Value {
    let root = env!("CARGO_MANIFEST_DIR");
    let output = command
        .arg(format!("{root}/tests/tools/{client}"))
        .args([&format!("{root}/proto"), &server.address])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn clients_of_other_languages_are_made_from_the_protos_and_get_the_same_text() {
    let server = Serving::start();
    let tools = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".tools");
    let mut answers = Vec::new();
    let python = tools.join("python/bin/python");
    let has_grpc = |python: &PathBuf| {
        let import = Command::new(python).args(["-c", "import grpc_tools"]).output();
        import.is_ok_and(|output| output.status.success())
    };
    if has_grpc(&python) {
        answers.push(printed(Command::new(&python), "client.py", &server));
    } else {
        skipped("grpcio-tools is not installed (make test-tools): no client of Python was made");
    }
    let modules = tools.join("node/node_modules");
    if modules.join("@grpc/grpc-js").is_dir() {
        let mut node = Command::new("node");
        node.env("NODE_PATH", &modules);
        answers.push(printed(node, "client.js", &server));
    } else {
        skipped("the packages of Node are not installed (make test-tools): no client of Node was made");
    }
    if std::env::var_os("DENOISED_TEST_GO").is_some() {
        answers.push(printed(Command::new("bash"), "client_go.sh", &server));
    } else {
        skipped("no client of Go was made (make test-go)");
    }
    for answer in &answers {
        assert_eq!(
            (&answer["normalize"], &answer["steps"]),
            (&true.into(), &4096.into()),
            "{answer}"
        );
        let kinds: Vec<&str> = answer["kinds"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert_eq!(
            (kinds[0], *kinds.last().unwrap()),
            ("accepted", "result"),
            "{answer}"
        );
        assert!(kinds.contains(&"frame"), "{answer}");
        assert_eq!(answer["text"], answers[0]["text"]);
        assert!(answer["text"].as_str().unwrap().starts_with("In the beginning"));
    }
}
