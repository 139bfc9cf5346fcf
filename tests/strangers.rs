//! Whoever means harm takes neither memory nor places from those who do not, and nobody's call fails by it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::model_service_client::ModelServiceClient;
use denoised::proto::v1::{GenerateRequest, ListModelsRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tonic::transport::Channel;

use crate::binary::{Serving, denoised};
use crate::support::{TestServer, closed_form, config, generate};
use crate::tls;

/// Megabytes that a server may have more after all that than before: what allocators keep.
const KEPT: f64 = 16.0;

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// The headers of a call.
fn head() -> Vec<u8> {
    head_of("/denoised.v1.DiffusionService/Generate")
}

/// The headers of a call of `path` (RFC 7541): two indexed fields, two literal ones.
fn head_of(path: &str) -> Vec<u8> {
    let mut head = vec![0x83, 0x86];
    for (name, value) in [(0x04, path), (0x01, "here")] {
        head.extend([name, u8::try_from(value.len()).unwrap()]);
        head.extend(value.as_bytes());
    }
    head
}

/// A connection that has begun to speak HTTP/2.
async fn begun(address: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    socket.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    socket
}

/// Sends `frames` as long as the server takes them, and reads what it says; how many were taken.
async fn send(address: &str, frames: impl Iterator<Item = Vec<u8>>) -> usize {
    let (mut reader, mut writer) = begun(address).await.into_split();
    let closed = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&closed);
    let reading = tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 16];
        while reader.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        seen.store(true, Ordering::Release);
    });
    let mut sent = 0;
    for frame in frames {
        if closed.load(Ordering::Acquire) || writer.write_all(&frame).await.is_err() {
            break;
        }
        sent += 1;
    }
    drop(writer);
    reading.await.unwrap();
    sent
}

/// As many connections as `count` that begin to say something and then nothing, from five addresses.
async fn half_open(address: &str, count: u8, said: &[u8]) -> Vec<TcpStream> {
    let server: SocketAddr = address.parse().unwrap();
    let mut sockets = Vec::new();
    for (host, _) in (2..7).flat_map(|host| (0..count).map(move |number| (host, number))) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, host), 0).into()).unwrap();
        let mut socket = socket.connect(server).await.unwrap();
        // It may be closed already: there are as many as may be.
        let _refused = socket.write_all(said).await.is_err();
        sockets.push(socket);
    }
    sockets
}

async fn all_are_closed(sockets: Vec<TcpStream>) {
    for mut socket in sockets {
        let closed = async { while socket.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {} };
        tokio::time::timeout(Duration::from_secs(60), closed)
            .await
            .expect("who says nothing more is closed");
    }
}

fn megabytes(server: &Serving) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<f64>().unwrap() / 1024.0
}

fn files(server: &Serving) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", server.id()))
        .unwrap()
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn attacks_take_nothing_from_who_is_honest() {
    let server = Serving::start_with(
        denoised()
            // Nobody reads the log here, which waits in memory then, up to a number of lines.
            .env("DENOISED__LOG__FILTER", "warn")
            .env("DENOISED__SERVER__HANDSHAKE_SECONDS", "2")
            .env("DENOISED__SERVER__MAX_CONNECTIONS", "1100"),
    );
    let address = server.address.clone();
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut client = ModelServiceClient::new(channel.clone());
    // The model is in memory then.
    let mut first = DiffusionServiceClient::new(channel.clone());
    generate(&mut first, GenerateRequest::default()).await.unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let honest = tokio::spawn({
        let over = Arc::clone(&over);
        async move {
            let mut calls = 0;
            while !over.load(Ordering::Acquire) {
                client.list_models(ListModelsRequest {}).await.unwrap();
                calls += 1;
            }
            calls
        }
    });
    let (memory, descriptors) = (megabytes(&server), files(&server));

    // Calls that are taken back at once, 20,000 in all (CVE-2023-44487).
    let mut resets = 0;
    while resets < 20_000 {
        let frames = (0..1000u32).map(|number| {
            let stream = 2 * number + 1;
            let mut both = frame(HEADERS, END_HEADERS, stream, &head());
            both.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
            both
        });
        resets += send(&address, frames).await.max(1);
    }
    // Headers that never end (CVE-2024-27316): 64 megabytes, were they taken.
    let part = vec![0x40; 16 << 10];
    let endless = std::iter::once(frame(HEADERS, 0, 1, &head()))
        .chain((0..4096).map(|_| frame(CONTINUATION, 0, 1, &part)));
    let taken = send(&address, endless).await;
    assert!(taken < 4096, "headers of 64 megabytes are refused");
    // Sixteen kilobytes that say 64 megabytes: one field of 4,000 bytes, named again and again.
    for _ in 0..8 {
        let mut bomb = head();
        bomb.extend([0x40, 1, b'x', 0x7f]);
        // 4,000 as an integer of seven bits and more (RFC 7541, section 5.1).
        bomb.extend([0x80 | ((4000 - 127) & 0x7f) as u8, ((4000 - 127) >> 7) as u8]);
        bomb.extend(vec![b'a'; 4000]);
        bomb.extend(vec![0xbe; 12_000]);
        let again = std::iter::once(frame(HEADERS, END_HEADERS, 1, &bomb));
        send(&address, again).await;
    }
    // Questions whose answers nobody needs.
    send(&address, (0..100_000).map(|_| frame(PING, 0, 0, &[0; 8]))).await;
    // A thousand that begin to speak, and stop.
    drop(half_open(&address, 200, b"PRI * HTTP/2.0\r\n").await);
    all_are_closed(half_open(&address, 200, b"PRI * HTTP/2.0\r\n").await).await;

    over.store(true, Ordering::Release);
    assert!(honest.await.unwrap() > 0);
    let freed = async {
        while files(&server) > descriptors {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), freed)
        .await
        .expect("every connection is given back");
    let more = megabytes(&server) - memory;
    assert!(more < KEPT, "{more} MB more than before");
    drop(channel);
    let (code, log) = server.stop();
    assert_eq!(code, Some(0));
    assert!(!log.contains("panic"), "{log}");
}

/// The kind, flags and stream of the next frame that the server sends.
async fn next_frame(socket: &mut TcpStream) -> Option<(u8, u8, u32)> {
    let mut head = [0; 9];
    socket.read_exact(&mut head).await.ok()?;
    let [a, b, c, kind, flags, stream @ ..] = head;
    let (length, stream) = (u32::from_be_bytes([0, a, b, c]), u32::from_be_bytes(stream));
    let mut payload = vec![0; length as usize];
    socket.read_exact(&mut payload).await.ok()?;
    Some((kind, flags, stream))
}

/// A gateway's connection carries the calls of many. Some are answered before they have said all, and what they had
/// left to say comes when the answer is out: that must not end the calls of the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_survives_calls_that_are_answered_before_they_have_ended() {
    const TOGETHER: u32 = 50;
    let server = Serving::start();
    let mut socket = begun(&server.address).await;
    for first in (0..40).map(|wave| 1 + 2 * TOGETHER * wave) {
        let streams = || (0..TOGETHER).map(move |number| first + 2 * number);
        for stream in streams() {
            let head = head_of("/denoised.v1.DiffusionService/Nothing");
            let call = frame(HEADERS, END_HEADERS, stream, &head);
            socket.write_all(&call).await.unwrap();
        }
        let mut answered = 0;
        while answered < TOGETHER {
            let (kind, flags, stream) = next_frame(&mut socket).await.unwrap();
            assert_ne!(kind, GOAWAY, "at stream {stream} of wave {first}");
            answered += u32::from(kind == HEADERS && flags & END_STREAM > 0);
        }
        for stream in streams() {
            let rest = frame(DATA, END_STREAM, stream, b"late");
            socket.write_all(&rest).await.unwrap();
        }
    }
    socket.write_all(&frame(PING, 0, 0, &[7; 8])).await.unwrap();
    loop {
        let (kind, flags, _) = next_frame(&mut socket).await.unwrap();
        assert_ne!(kind, GOAWAY);
        if kind == PING && flags > 0 {
            break;
        }
    }
}

/// A thousand handshakes that stop in their first message, or before it.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_stop_keep_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let seconds = [
        ("DENOISED__SERVER__HANDSHAKE_SECONDS", Path::new("2")),
        ("DENOISED__SERVER__MAX_CONNECTIONS", Path::new("1100")),
    ];
    let server = tls::serve(folder.path(), &seconds);
    let half = half_open(&server.address, 100, &[0x16, 3, 1, 2]).await;
    let silent = half_open(&server.address, 100, &[]).await;
    let channel = tls::connect(&server, tls::trusting()).await.unwrap();
    assert_eq!(tls::lists(channel.clone()).await.unwrap(), 1);
    all_are_closed(half).await;
    all_are_closed(silent).await;
    assert_eq!(tls::lists(channel).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_address_cannot_take_all_connections() {
    let mut config = config();
    config.server.max_connections_per_peer = 3;
    let server = TestServer::with_network(&config, closed_form()).await;
    let address = server.url.trim_start_matches("http://").to_owned();
    let connections = half_open(&address, 5, b"PRI").await;
    // Three of each address stay open, two are closed.
    let mut open = Vec::new();
    for (number, mut socket) in connections.into_iter().enumerate() {
        let closed = async { socket.read(&mut [0; 64]).await.is_ok_and(|read| read == 0) };
        let first_three = number % 5 < 3;
        if first_three {
            open.push(socket);
        } else {
            let closed = tokio::time::timeout(Duration::from_secs(20), closed);
            closed.await.expect("it is one too many");
        }
    }
    server.models().list_models(ListModelsRequest {}).await.unwrap();
    // Those that were let in may go on.
    for socket in &mut open {
        let rest = b" * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        socket.write_all(rest).await.unwrap();
        socket.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        let mut said = [0; 64];
        let answered = tokio::time::timeout(Duration::from_secs(20), socket.read(&mut said));
        assert!(answered.await.unwrap().unwrap() > 0, "the server's settings");
    }
    drop(open);
    server.stop().await;
}
