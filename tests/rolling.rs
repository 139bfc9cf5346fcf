//! A rolling restart of three servers behind a proxy that asks them for their health: Envoy (`make test-tools`); without
//! it this is said loudly to be skipped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use denoised::client::{Client, Event, Request};
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::{GenerateRequest, Sampling, event, frame};
use tonic::Code;

use crate::binary::{Serving, denoised};
use crate::plain_http::ask;
use crate::support::{prompt, skipped};

const SERVERS: usize = 3;

/// The tool `name` among the Python packages of the tests.
pub fn packaged(name: &str) -> Option<PathBuf> {
    let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/python/lib");
    let versions = std::fs::read_dir(libraries).into_iter().flatten().flatten();
    versions
        .map(|version| version.path().join("site-packages").join(name))
        .find(|tool| tool.exists())
}

/// An address that nobody listens on now.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// A running Envoy; killed if a test fails.
struct Proxy {
    child: Child,
    address: String,
    admin: String,
}

impl Proxy {
    fn start(envoy: &Path, folder: &Path, servers: &[String]) -> Self {
        let (address, admin) = (free_address(), free_address());
        let place = |address: &str| {
            let (host, port) = address.split_once(':').unwrap();
            format!("{{socket_address: {{address: {host}, port_value: {port}}}}}")
        };
        let endpoints: String = servers
            .iter()
            .map(|server| format!("        - endpoint: {{address: {}}}\n", place(server)))
            .collect();
        let config = include_str!("fixtures/envoy.yaml")
            .replace("ADMIN", &place(&admin))
            .replace("LISTENER", &place(&address))
            .replace("        ENDPOINTS\n", &endpoints);
        let file = folder.join("envoy.yaml");
        std::fs::write(&file, config).unwrap();
        let child = Command::new(envoy)
            .arg("--config-path")
            .arg(file)
            .args([
                "--disable-hot-restart",
                "--concurrency",
                "1",
                "--log-level",
                "error",
            ])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            address: format!("http://{address}"),
            admin: format!("http://{admin}"),
        }
    }

    /// Waits until it takes `server` for healthy, or not.
    async fn takes_for(&self, server: &str, healthy: bool) {
        let line = format!("denoised::{server}::health_flags::");
        let waiting = async {
            loop {
                if std::net::TcpStream::connect(self.admin.trim_start_matches("http://")).is_ok() {
                    let clusters = "GET /clusters HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n";
                    let (_, _, clusters) = ask(&self.admin, clusters).await;
                    let flags = clusters.lines().find_map(|l| l.strip_prefix(&line));
                    if flags.is_some_and(|flags| (flags == "healthy") == healthy) {
                        return;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(60), waiting).await;
        waited.unwrap_or_else(|_| panic!("{server} is not healthy = {healthy}"));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn request(seed: u64) -> GenerateRequest {
    GenerateRequest {
        prompt_as: Some(prompt("In the beginning")),
        length: Some(96),
        sampling: Some(Sampling {
            steps: Some(48),
            seed: Some(seed),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// The text that a request ends with, whoever works on it.
async fn text(client: &Client, seed: u64) -> String {
    let mut events = client.run(Request::from(request(seed)));
    let mut text = None;
    while let Some(event) = events.next().await {
        if let Event::Result(result) = event.unwrap() {
            text = result.text;
        }
    }
    text.unwrap()
}

#[derive(Default)]
struct Counts {
    resuming: AtomicU64,
    plain: AtomicU64,
    refused: AtomicU64,
    cut: AtomicU64,
}

/// A call without resuming: whole, refused, or cut off with a state to go on from.
async fn plain(client: &mut DiffusionServiceClient<tonic::transport::Channel>, counts: &Counts) {
    let refused = |status: &tonic::Status| {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        counts.refused.fetch_add(1, Ordering::AcqRel);
    };
    let mut stream = match client.generate(request(1)).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return refused(&status),
    };
    let (mut accepted, mut has_state) = (false, false);
    loop {
        match stream.message().await {
            Ok(Some(message)) => match message.event.and_then(|event| event.event) {
                Some(event::Event::Accepted(_)) => accepted = true,
                Some(event::Event::Frame(frame)) => {
                    has_state = matches!(frame.content, Some(frame::Content::Keyframe(_)));
                }
                _ => {}
            },
            Ok(None) => {
                counts.plain.fetch_add(1, Ordering::AcqRel);
                return;
            }
            Err(status) if !accepted => return refused(&status),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                assert!(has_state, "the last frame is no keyframe: {status:?}");
                counts.cut.fetch_add(1, Ordering::AcqRel);
                return;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_is_lost_while_servers_are_restarted_one_by_one() {
    let Some(envoy) = packaged("envoy/_bin/envoy") else {
        skipped("Envoy is not installed (make test-tools): no rolling restart was tried");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let start = |address: &str| {
        let mut command = denoised();
        // What runs is cut off.
        command.env("DENOISED__SERVER__DRAIN_GRACE_SECONDS", "0");
        Serving::start_at(&mut command, address)
    };
    let addresses: Vec<String> = (0..SERVERS).map(|_| free_address()).collect();
    let mut servers: Vec<Option<Serving>> = addresses.iter().map(|address| Some(start(address))).collect();
    let proxy = Proxy::start(&envoy, folder.path(), &addresses);
    for address in &addresses {
        proxy.takes_for(address, true).await;
    }
    let client = Client::new([&proxy.address]).unwrap();
    let expected: Vec<String> = vec![
        text(&client, 0).await,
        text(&client, 1).await,
        text(&client, 2).await,
    ];
    let expected = Arc::new(expected);
    let (over, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
    let mut callers = Vec::new();
    for caller in 0..6_usize {
        let (over, counts, expected) = (Arc::clone(&over), Arc::clone(&counts), Arc::clone(&expected));
        // Connections of their own, as callers have.
        let client = Client::new([&proxy.address]).unwrap();
        callers.push(tokio::spawn(async move {
            while !over.load(Ordering::Acquire) {
                let seed = caller % expected.len();
                assert_eq!(text(&client, seed as u64).await, expected[seed]);
                counts.resuming.fetch_add(1, Ordering::AcqRel);
            }
        }));
    }
    for _ in 0..3 {
        let (over, counts) = (Arc::clone(&over), Arc::clone(&counts));
        let mut client = DiffusionServiceClient::connect(proxy.address.clone())
            .await
            .unwrap();
        callers.push(tokio::spawn(async move {
            while !over.load(Ordering::Acquire) {
                plain(&mut client, &counts).await;
            }
        }));
    }
    for (server, address) in servers.iter_mut().zip(&addresses) {
        let before = counts.resuming.load(Ordering::Acquire);
        while counts.resuming.load(Ordering::Acquire) < before + 4 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            assert!(
                callers.iter().all(|caller| !caller.is_finished()),
                "a call was lost"
            );
        }
        let (code, log) = server.take().unwrap().stop();
        assert_eq!(code, Some(0), "{log}");
        proxy.takes_for(address, false).await;
        *server = Some(start(address));
        proxy.takes_for(address, true).await;
    }
    over.store(true, Ordering::Release);
    for caller in callers {
        caller.await.unwrap();
    }
    let [resuming, plain, refused, cut] = [&counts.resuming, &counts.plain, &counts.refused, &counts.cut]
        .map(|count| count.load(Ordering::Acquire));
    eprintln!(
        "{resuming} with resuming; without {plain} whole, {refused} refused, {cut} cut off with a state"
    );
    assert!(resuming > 12 && plain > 0 && cut > 0);
}
