//! `denoised serve`.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Failed, INTERRUPTED};
use crate::allocator;
use crate::config::Config;
use crate::network::onnx::Device;
use crate::server::Server;
use crate::telemetry;

/// Options of a server; flags win over variables, variables over the file.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// TOML file with settings; deploy/denoised.example.toml documents them all.
    #[arg(long, value_name = "FILE", env = "DENOISED_CONFIG")]
    config: Option<PathBuf>,
    /// Folder of <model>/<version> bundles, or a place in an object store such as s3://bucket/models.
    #[arg(long, value_name = "DIR")]
    repository: Option<String>,
    /// Address and port to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Worker threads, each with a network of its own.
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Where networks run: cpu or cuda:N; several for several devices.
    #[arg(long, value_name = "DEVICE")]
    device: Vec<Device>,
}

impl Serve {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let devices: Vec<String> = self.device.iter().map(ToString::to_string).collect();
        let flags = [
            ("models.repository", self.repository),
            ("server.listen", self.listen.map(|address| address.to_string())),
            ("engine.workers", self.workers.map(|workers| workers.to_string())),
            ("engine.devices", (!devices.is_empty()).then(|| devices.join(","))),
        ];
        let flags: Vec<(&str, String)> = flags.into_iter().filter_map(|(k, v)| Some((k, v?))).collect();
        let config = Config::load(self.config.as_deref(), &flags).map_err(Failed::usage)?;
        allocator::give_large_blocks_back();
        let log = telemetry::init(&config.log)
            .map_err(|e| Failed::usage(format!("log.filter {:?}: {e}", config.log.filter)))?;
        let traces = telemetry::traces::init(&config.traces)
            .map_err(|e| Failed::usage(format!("traces.endpoint: {e}")))?;
        // Before the socket is bound: whoever sees the port may send the signal.
        let shutdown = shutdown_signal().map_err(Failed::software)?;
        let server = Server::bind(&config).await?;
        let url = server.url();
        tracing::info!("serving on {url}: {}", server.summary());
        let mut out = std::io::stdout();
        writeln!(out, "listening on {url}")
            .and_then(|()| out.flush())
            .map_err(Failed::software)?;
        server.run(shutdown).await;
        // A thread's work that waits for a collector; should it be gone the spans are, too.
        let _ended = tokio::task::spawn_blocking(|| traces.end()).await.is_ok();
        match log.dropped_lines() {
            0 => tracing::info!("bye"),
            lines => tracing::warn!(
                "bye; {lines} lines of this log were dropped: standard error was not read in time"
            ),
        }
        Ok(())
    }
}

/// Completes on SIGTERM or SIGINT; a second one ends the process at once. SIGHUP, on which others read their files
/// again, is no reason to go: certificates and tokens are read again by themselves.
fn shutdown_signal() -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hang_up.recv().await.is_some() {
            tracing::info!("SIGHUP: certificates, tokens and models are looked at all the time");
        }
    });
    let (told, tells) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        if told.send(()).is_err() {
            return;
        }
        tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        // Nothing is tidied up: passes that run would fall over what ONNX Runtime destroys at an exit.
        signal_hook::low_level::exit(INTERRUPTED.into());
    });
    Ok(async {
        // An error means that the task above is gone, and with it the runtime.
        let _gone = tells.await.is_err();
    })
}
