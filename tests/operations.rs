//! The page for operators says what is so: every setting, every metric, every alert.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use denoised::proto::v1::GenerateRequest;

use crate::plain_http::get;
use crate::support::{TestServer, closed_form, config, generate};

const PAGE: &str = include_str!("../deploy/OPERATIONS.md");
const EXAMPLE: &str = include_str!("../deploy/denoised.example.toml");
const ALERTS: &str = include_str!("../deploy/alerts.yaml");

/// The rows of the page's table that begins with `heading`, as far as their third cell; the fourth, which must say
/// something, is for people.
fn rows(heading: &str) -> Vec<String> {
    let (_, table) = PAGE.split_once(heading).unwrap();
    let lines = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let facts = |line: &str| {
        let (facts, advice) = line.trim_end_matches(" |").rsplit_once(" | ").unwrap();
        assert!(advice.len() > 10, "{line}: when, or what to do?");
        facts.to_owned()
    };
    lines.map(facts).collect()
}

/// The settings as the example file has them, which other tests hold to the server's.
fn settings() -> Vec<String> {
    let (mut settings, mut section, mut comment) = (Vec::new(), "", Vec::new());
    for line in EXAMPLE.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
            comment.clear();
        } else if let Some(text) = line.strip_prefix('#') {
            comment.push(text.trim());
        } else if let Some((key, default)) = line.split_once(" = ") {
            let text = comment.join(" ");
            let (text, _variable) = text.rsplit_once(" DENOISED__").unwrap();
            let text = text
                .trim_end_matches(" In a variable with commas:")
                .replace('<', "&lt;");
            settings.push(format!("| `{section}.{key}` | `{default}` | {text}"));
            comment.clear();
        }
    }
    settings
}

#[test]
fn every_setting_is_there_with_what_the_example_says_of_it() {
    let told = rows("| setting |");
    let settings = settings();
    assert!(settings.len() > 30);
    assert_eq!(told, settings);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_there_and_alerts_watch_nothing_else() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    generate(&mut server.client(), GenerateRequest::default())
        .await
        .unwrap();
    // The call is counted when its connection has seen its end.
    let counted = async {
        loop {
            let (_, head, metrics) = get(&server.url, "/metrics").await;
            assert!(head.contains("content-type: text/plain; version=0.0.4"), "{head}");
            if metrics.contains("denoised_calls_total{") {
                return metrics;
            }
        }
    };
    let metrics = tokio::time::timeout(Duration::from_secs(20), counted)
        .await
        .unwrap();
    server.stop().await;
    let told: BTreeSet<String> = rows("| metric |").into_iter().collect();
    let kind = |name: &str| {
        let kind = metrics
            .lines()
            .find_map(|line| line.strip_prefix(&format!("# TYPE {name} ")));
        kind.unwrap().to_owned()
    };
    let described = metrics.lines().filter_map(|line| line.strip_prefix("# HELP "));
    let families: BTreeSet<String> = described
        .map(|line| {
            let (name, help) = line.split_once(' ').unwrap();
            format!("| `{name}` | {} | {help}", kind(name))
        })
        .collect();
    assert!(families.len() > 20);
    assert_eq!(told, families);

    let names: BTreeSet<&str> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next())
        .collect();
    let words = ALERTS.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let watched: BTreeSet<&str> = words
        .filter(|word| word.starts_with("denoised_") || word.starts_with("process_"))
        .map(|word| word.trim_end_matches("_bucket"))
        .collect();
    assert!(
        watched.len() > 5 && watched.is_subset(&names),
        "{watched:?} {names:?}"
    );
    if let Some(output) = promtool(&["check", "metrics"], &metrics) {
        assert!(
            output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(),
            "{output:?}"
        );
    }
}

#[test]
fn every_alert_is_there_and_fires_when_it_should() {
    let named = |text: &'static str, before: &'static str| -> Vec<&str> {
        let lines = text.lines();
        lines
            .filter_map(|line| line.trim_start().strip_prefix(before))
            .collect()
    };
    let alerts = named(ALERTS, "- alert: ");
    let (_, page) = PAGE.split_once("## Alerts").unwrap();
    let (page, _) = page.split_once("\n## ").unwrap();
    assert!(alerts.len() > 5);
    assert_eq!(named(page, "### "), alerts);
    for arguments in [
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    ] {
        if let Some(output) = promtool(&arguments, "") {
            assert!(output.status.success(), "{output:?}");
        }
    }
    let tests = include_str!("../deploy/alerts.test.yaml");
    for alert in alerts {
        let fires = format!("alertname: {alert}\n        exp_alerts");
        assert!(tests.contains(&fires), "no test has {alert} fire");
        let stays = format!("alertname: {alert}}}");
        assert!(tests.contains(&stays), "no test has {alert} keep still");
    }
}

fn promtool(arguments: &[&str], input: &str) -> Option<Output> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fetched: PathBuf = root.join(".tools/bin/promtool");
    if !fetched.exists() {
        eprintln!(
            "SKIPPED: promtool is not installed (make test-tools): {} was not run",
            arguments.join(" ")
        );
        return None;
    }
    let mut child = Command::new(fetched)
        .args(arguments)
        .current_dir(root.join("deploy"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}
