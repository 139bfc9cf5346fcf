//! Connections: accepted, bounded in what they hold, and ended gracefully.
//!
//! tonic's own server has no setting for what a stream may hold that its connection has not taken: here that is
//! [`SEND_BUFFER`] bytes in HTTP/2 and [`UNSENT`] in the kernel, two keyframes or so, so that events are made when
//! they can go out. The client's own window comes on top; the pace of frames bounds what waits there.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::TcpConnectInfo;
use tower::ServiceExt;

use crate::config::ServerConfig;

/// Bytes of a stream that HTTP/2 holds until the connection takes them.
const SEND_BUFFER: usize = 16 << 10;
/// Bytes of a connection that the kernel holds before it has sent them.
const UNSENT: u32 = 16 << 10;
/// Pause after a connection that could not be accepted: there may be no file descriptor for it.
const REFUSED: Duration = Duration::from_millis(50);
/// Time between two signs of life of a silent connection.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// What the client of an HTTP/2 connection says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Pause until more of it is looked for.
const MORE: Duration = Duration::from_millis(10);

/// Serves `routes` to whoever connects until `stop`, then lets open calls end.
pub(super) async fn serve(
    listener: TcpListener,
    routes: Routes,
    config: &ServerConfig,
    stop: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(config.max_connections));
    let handshake = Duration::from_secs(config.handshake_seconds);
    let mut builder = Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.max_concurrent_streams)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(KEEP_ALIVE);
    let routes = routes.prepare();
    let graceful = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let (stream, remote) = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(REFUSED).await;
                    continue;
                }
            },
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!(%remote, "a connection is closed: there are as many as may be (server.max_connections)");
            continue;
        };
        if let Err(error) = set_up(&stream) {
            tracing::debug!(%remote, %error, "a connection was gone before it was set up");
            continue;
        }
        let peer = TcpConnectInfo {
            local_addr: stream.local_addr().ok(),
            remote_addr: Some(remote),
        };
        let service = TowerToHyperService::new(seen_from(peer, routes.clone()));
        let (builder, watcher) = (builder.clone(), graceful.watcher());
        tokio::spawn(async move {
            let _place = place;
            match tokio::time::timeout(handshake, says_preface(&stream)).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false) | Err(_)) => return,
                Err(_) => {
                    tracing::debug!(%remote, "a connection is closed: it said nothing (server.handshake_seconds)");
                    return;
                }
            }
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            let connection = watcher.watch(connection.into_owned());
            if let Err(error) = connection.await {
                tracing::debug!(%remote, %error, "a connection ended with an error");
            }
        });
    }
    // Nobody new can connect while open calls end.
    drop(listener);
    graceful.shutdown().await;
}

/// Waits until all that a client has to say first is there; `false` where it is something else, or the end.
async fn says_preface(stream: &TcpStream) -> std::io::Result<bool> {
    let mut said = [0; PREFACE.len()];
    loop {
        let length = stream.peek(&mut said).await?;
        if length == 0 || !PREFACE.starts_with(&said[..length]) {
            return Ok(false);
        }
        if length == PREFACE.len() {
            return Ok(true);
        }
        tokio::time::sleep(MORE).await;
    }
}

fn set_up(stream: &TcpStream) -> std::io::Result<()> {
    // Frames are small and are waited for: none is held back to be sent with the next.
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT)?;
    Ok(())
}

/// The routes as one connection sees them: calls know whom they come from.
fn seen_from(
    peer: TcpConnectInfo,
    routes: Routes,
) -> impl tower::Service<
    http::Request<hyper::body::Incoming>,
    Response = http::Response<Body>,
    Error = std::convert::Infallible,
    Future: Send,
> + Clone {
    routes.map_request(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        request.map(Body::new)
    })
}
