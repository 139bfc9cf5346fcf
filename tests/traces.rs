//! Spans arrive at a collector that nobody here wrote: rotel (`make test-tools`); without it this is said loudly to be
//! skipped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use denoised::proto::v1::GenerateRequest;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use tonic::{Code, Request};

use crate::binary::{Serving, denoised};
use crate::rolling::{free_address, packaged};
use crate::support::{prompt, skipped};

fn rotel() -> Option<PathBuf> {
    let found = packaged("rotel/rotel-agent");
    if found.is_none() {
        skipped("rotel is not installed (make test-tools): no collector was told of spans");
    }
    found
}

/// A running collector that writes down what it is told; killed if a test fails.
struct Collector {
    child: Child,
    address: String,
    lines: mpsc::Receiver<String>,
}

impl Collector {
    fn start(rotel: &Path) -> Self {
        let (address, other) = (free_address(), free_address());
        let mut child = Command::new(rotel)
            .args([
                "start",
                "--otlp-grpc-endpoint",
                &address,
                "--otlp-http-endpoint",
                &other,
            ])
            .args([
                "--exporter",
                "blackhole",
                "--debug-log",
                "traces",
                "--debug-log-verbosity",
                "detailed",
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (told, lines) = mpsc::sync_channel(1024);
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(out).map_while(Result::ok) {
                if told.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            address,
            lines,
        }
    }

    /// What it has written down until a line has `word`.
    fn until(&self, word: &str) -> String {
        let mut all = String::new();
        while !all.contains(word) {
            let line = self.lines.recv_timeout(Duration::from_secs(60));
            all += &line.unwrap_or_else(|_| panic!("no {word:?} in {all}"));
            all.push('\n');
        }
        all
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const UNWANTED: &str = "5bf92f3577b34da6a3ce929d0e0e4737";
const PARENT: &str = "00f067aa0ba902b7";

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_a_span_of_its_callers_trace() {
    let Some(rotel) = rotel() else { return };
    let collector = Collector::start(&rotel);
    let mut command = denoised();
    command
        .env(
            "DENOISED__TRACES__ENDPOINT",
            format!("http://{}", collector.address),
        )
        // Of those who do not say none.
        .env("DENOISED__TRACES__SHARE", "0")
        .env("OTEL_BSP_SCHEDULE_DELAY", "100");
    let server = Serving::start_with(&mut command);
    let mut client = DiffusionServiceClient::connect(format!("http://{}", server.address))
        .await
        .unwrap();
    let mut ask = async |context: Option<String>, text: &str, length: u32| {
        let mut request = Request::new(GenerateRequest {
            prompt_as: Some(prompt(text)),
            length: Some(length),
            ..GenerateRequest::default()
        });
        if let Some(context) = context {
            request
                .metadata_mut()
                .insert("traceparent", context.parse().unwrap());
        }
        let mut stream = client.generate(request).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok::<_, tonic::Status>(())
    };
    ask(None, "unsaid", 16).await.unwrap();
    ask(Some(format!("00-{UNWANTED}-{PARENT}-00")), "unwanted", 16)
        .await
        .unwrap();
    ask(Some(format!("00-{TRACE}-{PARENT}-01")), "And he said", 16)
        .await
        .unwrap();
    let refused = ask(Some(format!("00-{TRACE}-{PARENT}-01")), "too long", 1 << 20)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains(&format!("trace=\"{TRACE}\"")), "{log}");

    let told = collector.until("rpc.grpc.status_code: Int(3)");
    for wanted in [
        TRACE,
        PARENT,
        "denoised.v1.DiffusionService/Generate",
        "service.name: Str(denoised)",
        "denoised.model: Str(world-english@1)",
        "denoised.evaluations: Int(",
        "rpc.grpc.status_code: Int(0)",
        "evaluations",
    ] {
        assert!(told.contains(wanted), "no {wanted:?} in {told}");
    }
    for unwanted in [UNWANTED, "And he said"] {
        assert!(!told.contains(unwanted), "{unwanted:?} in {told}");
    }
}
