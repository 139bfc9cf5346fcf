//! The page for operators says what is so: every setting, every metric, every alert.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use denoised::proto::v1::GenerateRequest;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tonic::transport::Channel;

use crate::binary::Serving;
use crate::plain_http::{ask, get};
use crate::support::{TestServer, closed_form, config, generate, skipped};

const PAGE: &str = include_str!("../deploy/OPERATIONS.md");
const EXAMPLE: &str = include_str!("../deploy/denoised.example.toml");
const ALERTS: &str = include_str!("../deploy/alerts.yaml");
const DASHBOARD: &str = include_str!("../deploy/dashboard.json");
const ADAPTER: &str = include_str!("../deploy/prometheus-adapter.yaml");
const SCALED_OBJECT: &str = include_str!("../deploy/chart/templates/scaledobject.yaml");
const INFERENCE_POOL: &str = include_str!("../deploy/chart/templates/inferencepool.yaml");
const DEPLOYMENT: &str = include_str!("../deploy/chart/templates/deployment.yaml");
const GPU_VALUES: &str = include_str!("../deploy/chart/values-gpu.yaml");
const KSERVE: &str = include_str!("../deploy/kserve.yaml");

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

/// What charts and manifests set can be set.
#[test]
fn every_variable_of_the_chart_is_a_setting() {
    let told = settings();
    let known: BTreeSet<String> = told
        .iter()
        .map(|row| row.split('`').nth(1).unwrap().replace('.', "__").to_uppercase())
        .collect();
    let mut all = 0;
    for manifest in [DEPLOYMENT, GPU_VALUES, KSERVE] {
        let words = manifest.split(|c: char| !c.is_ascii_uppercase() && c != '_');
        for name in words.filter_map(|word| word.strip_prefix("DENOISED__")) {
            assert!(known.contains(name), "{name} is no setting");
            all += 1;
        }
    }
    assert!(all > 15, "{all}");
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
    let watching = [ALERTS, ADAPTER, SCALED_OBJECT, INFERENCE_POOL].map(|text| {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let own = words.filter(|word| word.starts_with("denoised_"));
        assert!(own.count() > 0, "watches nothing: {text}");
        text
    });
    let words = watching
        .iter()
        .flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    let watched: BTreeSet<&str> = words
        .filter(|word| word.starts_with("denoised_") || word.starts_with("process_"))
        .map(|word| word.trim_end_matches("_bucket").trim_end_matches("_sum"))
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

/// The queries of the dashboard, by panel.
fn panels() -> Vec<(String, Vec<String>)> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let query = |target: &Value| target["expr"].as_str().unwrap().to_owned();
    panels
        .filter(|panel| panel["type"] != "row")
        .map(|panel| {
            let targets = panel["targets"].as_array().unwrap();
            let title = panel["title"].as_str().unwrap();
            (title.to_owned(), targets.iter().map(query).collect())
        })
        .collect()
}

/// A Prometheus that scrapes the server at `address` every second as the job `denoised`.
struct Prometheus {
    child: Child,
    url: String,
    _folder: TempDir,
}

impl Prometheus {
    fn start(address: &str) -> Option<Self> {
        let program = fetched("prometheus")?;
        let folder = tempfile::tempdir().unwrap();
        let scrapes = format!(
            "global: {{scrape_interval: 1s}}\n\
             scrape_configs: [{{job_name: denoised, static_configs: [{{targets: ['{address}']}}]}}]\n"
        );
        let settings = folder.path().join("prometheus.yaml");
        std::fs::write(&settings, scrapes).unwrap();
        // It tells nobody which port it took of its own.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let listens = format!("127.0.0.1:{port}");
        let child = Command::new(program)
            .arg(format!("--config.file={}", settings.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={listens}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Some(Self {
            child,
            url: format!("http://{listens}"),
            _folder: folder,
        })
    }

    /// What it answers; `None` as long as nobody does.
    async fn query(&self, query: &str) -> Option<Value> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let request = format!("GET /api/v1/query?query={encoded} HTTP/1.0\r\nHost: here\r\n\r\n");
        TcpStream::connect(self.url.trim_start_matches("http://"))
            .await
            .ok()?;
        let (_, _, body) = ask(&self.url, &request).await;
        serde_json::from_str(&body).ok()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Every panel of the dashboard shows something when a Prometheus has looked at a server that works, and every metric is in
/// some panel.
#[tokio::test(flavor = "multi_thread")]
async fn every_panel_of_the_dashboard_has_something_to_show() {
    let panels = panels();
    let drawn: String = panels
        .iter()
        .flat_map(|(_, queries)| queries.concat().chars().collect::<Vec<_>>())
        .collect();
    for row in rows("| metric |") {
        let name = row.split('`').nth(1).unwrap();
        assert!(drawn.contains(name), "{name} is in no panel");
    }
    let server = Serving::start();
    let Some(prometheus) = Prometheus::start(&server.address) else {
        return;
    };
    let channel = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    let mut client = DiffusionServiceClient::new(channel.connect().await.unwrap());
    for (title, queries) in panels {
        for query in queries {
            let query = query.replace("$__rate_interval", "30s");
            let shows = async {
                loop {
                    let short = GenerateRequest {
                        length: Some(8),
                        ..GenerateRequest::default()
                    };
                    generate(&mut client, short).await.unwrap();
                    if let Some(answer) = prometheus.query(&query).await {
                        assert_eq!(answer["status"], "success", "{title}: {query}: {answer}");
                        let result = answer["data"]["result"].as_array().unwrap();
                        let is_number = |series: &Value| series["value"][1].as_str().unwrap() != "NaN";
                        if result.iter().any(is_number) {
                            return;
                        }
                    }
                    // It looks once a second.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            };
            let shown = tokio::time::timeout(Duration::from_secs(60), shows).await;
            shown.unwrap_or_else(|_| panic!("{title} shows nothing: {query}"));
        }
    }
}

/// A program of the test tools.
fn fetched(name: &str) -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(".tools/bin")
        .join(name);
    if !program.exists() {
        skipped(format_args!(
            "{name} is not installed (make test-tools): it was not asked"
        ));
        return None;
    }
    Some(program)
}

fn promtool(arguments: &[&str], input: &str) -> Option<Output> {
    let mut child = Command::new(fetched("promtool")?)
        .args(arguments)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}
