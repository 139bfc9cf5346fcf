//! Connections: accepted, bounded in what they hold, and ended gracefully. HTTP/2 for gRPC, HTTP/1 for plain requests,
//! both behind TLS where there is a certificate.
//!
//! tonic's own server has no setting for what a stream may hold that its connection has not taken: here that is
//! [`SEND_BUFFER`] bytes in HTTP/2 and [`UNSENT`] in the kernel, two keyframes or so, so that events are made when
//! they can go out. The client's own window comes on top; the pace of frames bounds what waits there.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::TcpConnectInfo;
use tower::ServiceExt;

use super::heard_out::HeardOut;
use super::peers::Peers;
use super::tls::Tls;
use crate::config::ServerConfig;

/// Bytes of a stream that HTTP/2 holds until the connection takes them.
const SEND_BUFFER: usize = 16 << 10;
/// Bytes of a connection that the kernel holds before it has sent them.
const UNSENT: u32 = 16 << 10;
/// Bytes of the headers of a call, at most.
const HEADERS: u32 = 16 << 10;
/// Pause after a connection that could not be accepted: there may be no file descriptor for it.
const REFUSED: Duration = Duration::from_millis(50);
/// Time between two signs of life of a silent connection.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// What the client of an HTTP/2 connection says first.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Pause until more of it is looked for.
const MORE: Duration = Duration::from_millis(10);

/// How plain requests begin that are answered.
const PLAIN: [&[u8]; 3] = [b"GET ", b"HEAD ", b"POST "];
/// Bytes of a plain request's head, at most.
const PLAIN_HEAD: usize = 16 << 10;

/// What a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoken {
    Http1,
    Http2,
    /// Something else, or nothing at all.
    Other,
}

/// Routes by what a client speaks.
#[derive(Clone, Debug)]
pub(super) struct ByProtocol {
    pub(super) http1: Router,
    pub(super) http2: Router,
}

/// Serves `routes` to whoever connects until `stop`, then lets open calls end.
pub(super) async fn serve(
    listener: TcpListener,
    routes: ByProtocol,
    config: &ServerConfig,
    tls: Option<Tls>,
    stop: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(config.max_connections));
    let peers = Peers::default();
    let handshake = Duration::from_secs(config.handshake_seconds);
    let mut http1 = Builder::new(TokioExecutor::new()).http1_only();
    // One request a connection: none is idle then.
    http1
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(handshake)
        .max_buf_size(PLAIN_HEAD)
        .keep_alive(false);
    let mut http2 = Builder::new(TokioExecutor::new()).http2_only();
    http2
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.max_concurrent_streams)
        .max_header_list_size(HEADERS)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(KEEP_ALIVE);
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
        let Some(place_of_peer) = peers.enter(remote.ip(), config.max_connections_per_peer) else {
            // Whoever tries again and again must not fill the log.
            tracing::debug!(%remote, "a connection is closed: its address has as many as it may (server.max_connections_per_peer)");
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
        let (http1, http2, routes) = (http1.clone(), http2.clone(), routes.clone());
        let watcher = graceful.watcher();
        let acceptor = tls.as_ref().map(Tls::acceptor);
        tokio::spawn(async move {
            let _places = (place, place_of_peer);
            let (spoken, stream) = match tokio::time::timeout(handshake, begin(stream, acceptor)).await {
                Ok(Ok(begun)) => begun,
                Ok(Err(error)) => {
                    tracing::debug!(%remote, %error, "a connection ended before it began");
                    return;
                }
                Err(_) => {
                    tracing::debug!(%remote, "a connection is closed: it said nothing (server.handshake_seconds)");
                    return;
                }
            };
            let (builder, routes) = match spoken {
                Spoken::Http1 => (http1, routes.http1),
                Spoken::Http2 => (http2, routes.http2),
                Spoken::Other => return,
            };
            let service = TowerToHyperService::new(seen_from(peer, routes));
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

/// Bytes that come and go, encrypted or not.
trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// What the client of a new connection speaks, behind TLS where there is an acceptor.
async fn begin(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
) -> std::io::Result<(Spoken, Box<dyn Bytes>)> {
    let Some(acceptor) = acceptor else {
        return Ok((speaks(&stream).await?, Box::new(stream)));
    };
    let stream = acceptor.accept(stream).await?;
    // Whoever speaks gRPC says so in the handshake.
    let spoken = match stream.get_ref().1.alpn_protocol() {
        Some(b"h2") => Spoken::Http2,
        _ => Spoken::Http1,
    };
    Ok((spoken, Box::new(stream)))
}

/// Waits until so much of what a client says first is there that it is clear what it speaks.
async fn speaks(stream: &TcpStream) -> std::io::Result<Spoken> {
    let mut said = [0; PREFACE.len()];
    loop {
        let length = stream.peek(&mut said).await?;
        let said = &said[..length];
        if said == PREFACE {
            return Ok(Spoken::Http2);
        }
        if PLAIN.iter().any(|plain| said.starts_with(plain)) {
            return Ok(Spoken::Http1);
        }
        let may_be = |whole: &[u8]| whole.starts_with(said);
        if said.is_empty() || !(may_be(PREFACE) || PLAIN.iter().any(|plain| may_be(plain))) {
            return Ok(Spoken::Other);
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
    routes: Router,
) -> impl tower::Service<
    http::Request<hyper::body::Incoming>,
    Response = http::Response<Body>,
    Error = std::convert::Infallible,
    Future: Send,
> + Clone {
    routes.map_request(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        request.map(|body| Body::new(HeardOut::new(body)))
    })
}
