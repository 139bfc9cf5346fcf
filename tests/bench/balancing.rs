//! Three servers on addresses of their own, behind a balancer: what three do of what one does, and what callers see of a
//! server that is killed, drained, hung or slowed.
//!
//! The network is a sleep, so that three fit on any machine. Servers are processes (this program again). Balancers: our
//! client's own, Envoy as a gateway would be configured (least request, health by gRPC), HAProxy (least connections, health
//! by `/readyz`). Callers resume, as clients should.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use denoised::bundle::{self, FORMAT, MODEL, Manifest};
use denoised::client::{Client, Event, Request, over, watched};
use denoised::config::Config;
use denoised::diffusion::{Graph, GraphKind, Parameterization, Schedule};
use denoised::models::{Models, ServedModel};
use denoised::network::closed_form::ClosedForm;
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::server::Server;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tonic::transport::Endpoint;

use crate::quartiles;

/// Milliseconds of a pass.
const PASS_MS: u64 = 4;
const STEPS: u32 = 16;
const LENGTH: u32 = 32;
/// Streams for each server.
const STREAMS: usize = 8;
/// Canvases that share a pass, so that a server is full before its streams are.
const PER_PASS: usize = 4;
const SECONDS: f64 = 5.0;
/// After something happens.
const AFTER: f64 = 12.0;

/// Sleeps for as many milliseconds as its file says.
struct Sleeping(ClosedForm, PathBuf);

impl ScoreNetwork for Sleeping {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let asked = std::fs::read_to_string(&self.1).ok();
        let ms = asked.and_then(|ms| ms.trim().parse().ok()).unwrap_or(PASS_MS);
        std::thread::sleep(Duration::from_millis(ms));
        self.0.log_score(batch, read)
    }
}

/// Serves a sleep at `address` until this process is told to end.
pub(crate) fn serve(address: &str, pace: &Path) -> Result<()> {
    let mut config = Config::default();
    config.server.listen = address.parse()?;
    config.engine.threads_per_worker = 1;
    config.engine.batch_tokens = PER_PASS * LENGTH as usize;
    config.server.drain_grace_seconds = 2;
    let manifest = Manifest {
        format: FORMAT,
        name: "sleep".to_owned(),
        graph: GraphKind::Absorbing,
        schedule: Schedule::LogLinear { eps: 1e-3 },
        parameterization: Parameterization::Score,
        sigma_offset: false,
        vocab_size: 6,
        mask_token: Some(5),
        excluded_tokens: Vec::new(),
        frame: bundle::Frame::default(),
        end_of_document: None,
        max_length: LENGTH as usize,
        time_conditioned: true,
        two_stage: false,
        defaults: None,
        sha256: [(MODEL.to_owned(), String::new())].into(),
        provenance: Value::Null,
    };
    let pace = pace.to_owned();
    let network = move || -> Result<Box<dyn ScoreNetwork>, NetworkError> {
        let known = ClosedForm::independent(Graph::new(GraphKind::Absorbing, 6), &[0.2; 5]);
        Ok(Box::new(Sleeping(known, pace.clone())))
    };
    let mut models = Models::default();
    models.insert(ServedModel::without_bundle(manifest, 1, Box::new(network)));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut ends = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let server = Server::with_models(&config, models).await?;
        println!("listening");
        server
            .run(async move {
                let _told = ends.recv().await;
            })
            .await;
        Ok(())
    })
}

/// A server in a process of its own.
struct Replica {
    child: Child,
    address: String,
    pace: PathBuf,
}

impl Replica {
    /// On the `number`th address of this machine.
    fn start(folder: &Path, number: usize) -> Result<Self> {
        let host = format!("127.0.0.{}", 1 + number);
        let port = TcpListener::bind((host.as_str(), 0))?.local_addr()?.port();
        let (address, pace) = (format!("{host}:{port}"), folder.join(format!("pace-{number}")));
        let mut replica = Self {
            child: Self::spawn(&address, &pace)?,
            address,
            pace,
        };
        replica.is_up()?;
        Ok(replica)
    }

    fn spawn(address: &str, pace: &Path) -> Result<Child> {
        let own = std::env::current_exe()?;
        let mut command = Command::new(own);
        command.args(["--serve", address, "--pace"]).arg(pace);
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?)
    }

    fn is_up(&mut self) -> Result<()> {
        let out = self.child.stdout.take().context("it has no output")?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line)?;
        ensure!(line.trim() == "listening", "a server did not start: {line}");
        Ok(())
    }

    fn signal(&self, name: &str) -> Result<()> {
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()?;
        ensure!(sent.success(), "{name} was not sent");
        Ok(())
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Who spreads the calls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Balancer {
    Own,
    Envoy,
    HaProxy,
}

const BALANCERS: [(&str, Balancer); 3] = [
    ("our client", Balancer::Own),
    ("Envoy", Balancer::Envoy),
    ("HAProxy", Balancer::HaProxy),
];

/// A proxy, where there is one; ends with this.
struct Front {
    child: Option<Child>,
    address: Option<String>,
}

impl Drop for Front {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn front(
    balancer: Balancer,
    program: Option<&Path>,
    folder: &Path,
    replicas: &[Replica],
) -> Result<Option<Front>> {
    let address = format!(
        "127.0.0.1:{}",
        TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()
    );
    let Some(program) = program else {
        return Ok((balancer == Balancer::Own).then_some(Front {
            child: None,
            address: None,
        }));
    };
    let parts: Vec<(&str, &str)> = replicas
        .iter()
        .filter_map(|replica| replica.address.split_once(':'))
        .collect();
    let mut command = Command::new(program);
    let file = folder.join("proxy.yaml");
    if balancer == Balancer::Envoy {
        let place =
            |host: &str, port: &str| format!("{{socket_address: {{address: {host}, port_value: {port}}}}}");
        let endpoints: String = parts
            .iter()
            .map(|(host, port)| format!("        - endpoint: {{address: {}}}\n", place(host, port)))
            .collect();
        let (host, port) = address.split_once(':').context("an address")?;
        let config = include_str!("../fixtures/envoy.yaml")
            .replace("ADMIN", &place("127.0.0.1", "0"))
            .replace("LISTENER", &place(host, port))
            .replace("        ENDPOINTS\n", &endpoints)
            .replace(
                "    connect_timeout: 1s\n",
                "    connect_timeout: 1s\n    lb_policy: LEAST_REQUEST\n",
            );
        std::fs::write(&file, config)?;
        command.arg("--config-path").arg(&file);
        command.args([
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "--log-level",
            "error",
        ]);
    } else {
        let servers: String = parts
            .iter()
            .enumerate()
            .map(|(number, (host, port))| format!("  server s{number} {host}:{port} proto h2 check inter 200ms fall 1 rise 1 on-marked-down shutdown-sessions\n"))
            .collect();
        let config = format!(
            "defaults\n  mode http\n  timeout connect 1s\n  timeout client 1h\n  timeout server 1h\n\
             frontend f\n  bind {address} proto h2\n  default_backend b\n\
             backend b\n  balance leastconn\n  option redispatch 1\n  retries 3\n  option httpchk GET /readyz\n  http-check connect proto h1\n  timeout check 1s\n{servers}"
        );
        std::fs::write(&file, config)?;
        command.arg("-f").arg(&file);
    }
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    Ok(Some(Front {
        child: Some(child),
        address: Some(address),
    }))
}

/// A client of the servers, through what is in front of them.
fn client(front: &Front, replicas: &[Replica]) -> Result<Client> {
    if let Some(address) = &front.address {
        return Ok(Client::new([format!("http://{address}")])?);
    }
    let addresses = replicas
        .iter()
        .map(|replica| Ok(replica.address.parse()?))
        .collect::<Result<Vec<_>>>()?;
    let (tell, addresses) = watch::channel(addresses);
    // They stay as they are until the process ends.
    std::mem::forget(tell);
    let to = |address| Ok(watched(Endpoint::from_shared(format!("http://{address}"))?));
    Ok(Client::of([over(addresses, to)]))
}

/// Waits until a request is answered: a proxy takes its time to find servers healthy.
async fn warm_up(front: &Front, replicas: &[Replica]) -> Result<()> {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(20) {
        let mut events = client(front, replicas)?.run(Request::continuing("").length(LENGTH).steps(1));
        let mut answered = false;
        while let Some(event) = events.next().await {
            answered = matches!(event, Ok(Event::Result(_)));
        }
        if answered {
            return Ok(());
        }
    }
    bail!("nobody answers")
}

/// A request that has ended: when, after how long, and how it failed.
struct Ended {
    at: f64,
    took: f64,
    failed: Option<String>,
}

/// How often requests failed, and how.
fn failures(ended: &[Ended]) -> BTreeMap<&str, u32> {
    let mut failures = BTreeMap::new();
    for failed in ended.iter().filter_map(|ended| ended.failed.as_deref()) {
        *failures.entry(failed).or_default() += 1;
    }
    failures
}

/// Has `streams` ask one after the other until `over`.
async fn ask(clients: Vec<Client>, over: Arc<AtomicBool>, started: Instant) -> Result<Vec<Ended>> {
    let all = Arc::new(Mutex::new(Vec::new()));
    let mut callers = Vec::new();
    for client in clients {
        let (over, all) = (Arc::clone(&over), Arc::clone(&all));
        callers.push(tokio::spawn(async move {
            while !over.load(Ordering::Acquire) {
                let asked = Instant::now();
                let mut events = client.run(Request::continuing("").length(LENGTH).steps(STEPS));
                let mut failed = Some("it had no result".to_owned());
                while let Some(event) = events.next().await {
                    failed = match event {
                        Ok(Event::Result(_)) => None,
                        Ok(Event::Accepted(_) | Event::Frame(_) | Event::Resumed(_)) => failed,
                        Err(status) => Some(format!("{:?}: {}", status.code(), status.message())),
                    };
                }
                all.lock().push(Ended {
                    at: started.elapsed().as_secs_f64(),
                    took: asked.elapsed().as_secs_f64(),
                    failed,
                });
            }
        }));
    }
    for caller in callers {
        caller.await?;
    }
    Ok(std::mem::take(&mut all.lock()))
}

/// Canvases that a server has finished.
async fn finished(address: &str) -> Result<f64> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nhost: here\r\n\r\n")
        .await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let series = "denoised_canvases_ended_total{outcome=\"done\"} ";
    let value = text.lines().find_map(|line| line.strip_prefix(series));
    Ok(value.and_then(|value| value.parse().ok()).unwrap_or(0.0))
}

/// Requests a second of so many servers, and how far the share of each is from even.
async fn throughput(
    balancer: Balancer,
    program: Option<&Path>,
    folder: &Path,
    servers: usize,
) -> Result<Option<(f64, f64)>> {
    let replicas = (0..servers)
        .map(|number| Replica::start(folder, number))
        .collect::<Result<Vec<_>>>()?;
    let Some(front) = front(balancer, program, folder, &replicas)? else {
        return Ok(None);
    };
    warm_up(&front, &replicas).await?;
    let clients = (0..STREAMS * servers)
        .map(|_| client(&front, &replicas))
        .collect::<Result<Vec<_>>>()?;
    let (over, started) = (Arc::new(AtomicBool::new(false)), Instant::now());
    let asking = tokio::spawn(ask(clients, Arc::clone(&over), started));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut before = Vec::new();
    for replica in &replicas {
        before.push(finished(&replica.address).await?);
    }
    let since = Instant::now();
    tokio::time::sleep(Duration::from_secs_f64(SECONDS)).await;
    let mut own = Vec::new();
    for (replica, before) in replicas.iter().zip(before) {
        own.push(finished(&replica.address).await? - before);
    }
    let seconds = since.elapsed().as_secs_f64();
    over.store(true, Ordering::Release);
    let ended = asking.await??;
    let failed = failures(&ended);
    ensure!(failed.is_empty(), "requests failed: {failed:?}");
    let all: f64 = own.iter().sum();
    let even = all / servers as f64;
    let uneven = own.iter().map(|own| (own / even - 1.0).abs()).fold(0.0, f64::max);
    Ok(Some((all / seconds, uneven)))
}

/// What happens to one of three servers.
#[derive(Clone, Copy)]
enum Happens {
    Killed,
    Drained,
    Hung,
    Slowed,
}

const FAULTS: [(&str, Happens); 4] = [
    ("killed", Happens::Killed),
    ("drained", Happens::Drained),
    ("hung", Happens::Hung),
    ("slowed tenfold", Happens::Slowed),
];

/// Failed requests, median before, longest after, and seconds until the median is back within a half more than two of
/// three servers owe.
async fn fault(
    balancer: Balancer,
    program: Option<&Path>,
    folder: &Path,
    happens: Happens,
) -> Result<Option<[f64; 4]>> {
    let replicas = (0..3)
        .map(|number| Replica::start(folder, number))
        .collect::<Result<Vec<_>>>()?;
    let Some(front) = front(balancer, program, folder, &replicas)? else {
        return Ok(None);
    };
    warm_up(&front, &replicas).await?;
    // Half of what they can.
    let clients = (0..3 * STREAMS / 2)
        .map(|_| client(&front, &replicas))
        .collect::<Result<Vec<_>>>()?;
    let (over, started) = (Arc::new(AtomicBool::new(false)), Instant::now());
    let asking = tokio::spawn(ask(clients, Arc::clone(&over), started));
    tokio::time::sleep(Duration::from_secs_f64(SECONDS)).await;
    let at = started.elapsed().as_secs_f64();
    match happens {
        Happens::Killed => replicas[0].signal("KILL")?,
        Happens::Drained => replicas[0].signal("TERM")?,
        Happens::Hung => replicas[0].signal("STOP")?,
        Happens::Slowed => std::fs::write(&replicas[0].pace, (10 * PASS_MS).to_string())?,
    }
    tokio::time::sleep(Duration::from_secs_f64(AFTER)).await;
    over.store(true, Ordering::Release);
    let ended = tokio::time::timeout(Duration::from_secs(120), asking).await;
    let Ok(ended) = ended else {
        bail!("requests never ended")
    };
    let ended = ended??;
    let failed = failures(&ended);
    if !failed.is_empty() {
        println!("    failed: {failed:?}");
    }
    let failed = failed.values().sum::<u32>().into();
    let median = |from: f64, to: f64| {
        let took: Vec<f64> = ended
            .iter()
            .filter(|e| e.at >= from && e.at < to)
            .map(|e| e.took)
            .collect();
        if took.is_empty() {
            f64::INFINITY
        } else {
            quartiles(took)[0]
        }
    };
    let before = median(1.0, at);
    let longest = ended
        .iter()
        .filter(|e| e.at >= at)
        .map(|e| e.took)
        .fold(0.0, f64::max);
    let windows = (0..(2.0 * AFTER) as usize).map(|half| at + 0.5 * half as f64);
    let mut windows = windows.rev();
    let late = windows.find(|from| median(*from, from + 0.5) > 1.5 * 1.5 * before);
    let back = late.map_or(0.0, |from| from + 0.5 - at);
    Ok(Some([failed, before, longest, back]))
}

/// Measures with each balancer that is there.
pub(crate) fn run(envoy: Option<&Path>, haproxy: Option<&Path>) -> Result<Value> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut rows = Vec::new();
    println!(
        "\nbalancing: a pass sleeps {PASS_MS} ms, {STREAMS} streams a server of {STEPS} steps, {PER_PASS} canvases a pass"
    );
    for (name, balancer) in BALANCERS {
        let program = match balancer {
            Balancer::Own => None,
            Balancer::Envoy => envoy,
            Balancer::HaProxy => haproxy,
        };
        let folder = tempfile::tempdir()?;
        let mut speeds = Vec::new();
        for servers in 1..=3 {
            let Some((speed, uneven)) =
                runtime.block_on(throughput(balancer, program, folder.path(), servers))?
            else {
                break;
            };
            speeds.push((speed, uneven));
        }
        let [(one, _), (two, _), (three, uneven)] = speeds[..] else {
            println!("  SKIPPED: {name} is not there (--envoy, --haproxy)");
            continue;
        };
        println!(
            "  {name}: {one:.0}, {two:.0}, {three:.0} requests/s of 1, 2, 3 servers: {:.2} of three times one; shares within {:.0} %",
            three / (3.0 * one),
            100.0 * uneven
        );
        let mut faults = serde_json::Map::new();
        for (what, happens) in FAULTS {
            let Some([failed, before, longest, back]) =
                runtime.block_on(fault(balancer, program, folder.path(), happens))?
            else {
                continue;
            };
            println!(
                "    one is {what}: {failed} failed; median before {:.0} ms, longest after {:.0} ms, back after {back:.1} s",
                1e3 * before,
                1e3 * longest
            );
            faults.insert(what.to_owned(), json!({"failed": failed, "median_ms": 1e3 * before, "longest_ms": 1e3 * longest, "back_seconds": back}));
        }
        rows.push(json!({"balancer": name, "requests_per_second": [one, two, three], "efficiency": three / (3.0 * one), "uneven": uneven, "faults": faults}));
    }
    Ok(Value::Array(rows))
}
