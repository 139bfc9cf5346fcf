//! The page for browsers, and the gRPC-Web that it speaks: by hand, and in Debian's Chromium.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use denoised::proto::v1::{GenerateRequest, GenerateResponse, Sampling, event};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::binary::succeeds;
use crate::plain_http::{ask, get, value};
use crate::support::{TestServer, closed_form, config, generate, skipped};
use crate::tokens::token;

const GENERATE: &str = "/denoised.v1.DiffusionService/Generate";

fn request() -> GenerateRequest {
    GenerateRequest {
        sampling: Some(Sampling {
            seed: Some(1),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// What a call over gRPC-Web is answered: the head, the messages, and the trailers.
#[derive(Debug)]
struct Answer {
    head: String,
    messages: Vec<Vec<u8>>,
    trailers: String,
}

/// Calls `path` as a browser does.
async fn call(url: &str, path: &str, header: &str, message: &[u8]) -> Answer {
    let mut body = vec![0];
    body.extend((message.len() as u32).to_be_bytes());
    body.extend(message);
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: here\r\ncontent-type: application/grpc-web+proto\r\n{header}content-length: {}\r\n\r\n",
        body.len()
    );
    let mut socket = TcpStream::connect(url.trim_start_matches("http://"))
        .await
        .unwrap();
    socket
        .write_all(&[head.as_bytes(), &body].concat())
        .await
        .unwrap();
    let mut answer = Vec::new();
    let read = socket.read_to_end(&mut answer);
    tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .unwrap()
        .unwrap();
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
    let head = String::from_utf8(answer[..end].to_vec()).unwrap().to_lowercase();
    let mut bytes = whole(&answer[end..], head.contains("transfer-encoding: chunked"));
    let (mut messages, mut trailers) = (Vec::new(), String::new());
    if !head.contains("content-type: application/grpc-web") {
        bytes.clear();
    }
    while let [kind, a, b, c, d, ..] = bytes[..] {
        let rest = bytes.split_off(5);
        let (frame, next) = rest.split_at(u32::from_be_bytes([a, b, c, d]) as usize);
        if kind & 0x80 == 0 {
            messages.push(frame.to_vec());
        } else {
            trailers = String::from_utf8(frame.to_vec()).unwrap();
        }
        bytes = next.to_vec();
    }
    Answer {
        head,
        messages,
        trailers,
    }
}

/// The body of an answer, without what tells where its chunks end.
fn whole(mut sent: &[u8], is_chunked: bool) -> Vec<u8> {
    if !is_chunked {
        return sent.to_vec();
    }
    let mut whole = Vec::new();
    loop {
        let end = sent.windows(2).position(|two| two == b"\r\n").unwrap();
        let length = usize::from_str_radix(std::str::from_utf8(&sent[..end]).unwrap(), 16).unwrap();
        if length == 0 {
            return whole;
        }
        whole.extend(&sent[end + 2..end + 2 + length]);
        sent = &sent[end + 4 + length..];
    }
}

/// The tokens of a whole stream, which began as streams do.
fn tokens(answer: &Answer) -> Vec<u32> {
    let events = answer.messages.iter().map(|message| {
        let response = GenerateResponse::decode(&message[..]).unwrap();
        response.event.unwrap().event.unwrap()
    });
    let events: Vec<event::Event> = events.collect();
    assert!(matches!(events[0], event::Event::Accepted(_)), "{events:?}");
    let result = events.iter().find_map(|event| match event {
        event::Event::Result(result) => Some(result.tokens.clone()),
        event::Event::Accepted(_) | event::Event::Frame(_) => None,
    });
    result.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_is_whole_may_talk_to_its_server_alone_and_is_sent_once() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let (status, head, body) = get(&server.url, path).await;
        assert_eq!(status, 200, "{path}");
        assert!(head.contains(&format!("content-type: {kind}")), "{head}");
        assert!(
            head.contains("default-src 'none'") && head.contains("connect-src 'self'"),
            "{head}"
        );
        assert!(
            head.contains("frame-ancestors 'none'") && head.contains("nosniff"),
            "{head}"
        );
        assert!(body.len() > 100, "{path}");
        let tag = head.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap();
        let again = format!("GET {path} HTTP/1.1\r\nhost: here\r\nif-none-match: \"other\", {tag}\r\n\r\n");
        let (status, _, body) = ask(&server.url, &again).await;
        assert_eq!((status, body.as_str()), (304, ""), "{path}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_web_gives_what_grpc_gives_and_is_counted_with_it() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let expected = generate(&mut server.client(), request()).await.unwrap();
    let answer = call(&server.url, GENERATE, "", &request().encode_to_vec()).await;
    assert_eq!(tokens(&answer), expected.tokens()[0]);
    assert!(
        answer.head.contains("content-type: application/grpc-web+proto"),
        "{}",
        answer.head
    );
    assert!(answer.trailers.contains("grpc-status:0"), "{}", answer.trailers);

    let bad = GenerateRequest {
        length: Some(9999),
        ..request()
    };
    let refused = call(&server.url, GENERATE, "", &bad.encode_to_vec()).await;
    let told = format!("{}{}", refused.head, refused.trailers);
    assert!(told.contains("grpc-status") && told.contains("length"), "{told}");
    let (_, _, metrics) = get(&server.url, "/metrics").await;
    for (code, calls) in [("OK", 2.0), ("INVALID_ARGUMENT", 1.0)] {
        let series = format!("denoised_calls_total{{method=\"Generate\",code=\"{code}\"}}");
        assert_eq!(value(&metrics, &series), Some(calls), "{metrics}");
    }
    // Other origins would have to ask first.
    let mut socket = TcpStream::connect(server.url.trim_start_matches("http://"))
        .await
        .unwrap();
    let asks = format!(
        "OPTIONS {GENERATE} HTTP/1.1\r\nhost: here\r\norigin: http://elsewhere\r\naccess-control-request-method: POST\r\n\r\n"
    );
    socket.write_all(asks.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let _reset = socket.read_to_string(&mut answer).await.is_err();
    assert!(!answer.contains("access-control-allow"), "{answer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_needs_no_token_and_its_calls_do() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let secret = token(&file, "alice", "");
    let mut config = config();
    config.server.tokens = Some(file);
    let server = TestServer::with_network(&config, closed_form()).await;
    assert_eq!(get(&server.url, "/").await.0, 200);
    let refused = call(&server.url, GENERATE, "", &request().encode_to_vec()).await;
    let told = format!("{}{}", refused.head, refused.trailers);
    assert!(
        told.contains("grpc-status: 16") || told.contains("grpc-status:16"),
        "{told}"
    );
    let header = format!("authorization: Bearer {secret}\r\n");
    let answer = call(&server.url, GENERATE, &header, &request().encode_to_vec()).await;
    assert!(!tokens(&answer).is_empty());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_page_there_is_no_grpc_web_either() {
    let mut config = config();
    config.server.page = false;
    let server = TestServer::with_network(&config, closed_form()).await;
    assert_eq!(get(&server.url, "/").await.0, 404);
    let answer = call(&server.url, GENERATE, "", &request().encode_to_vec()).await;
    assert!(answer.head.starts_with("http/1.1 404"), "{}", answer.head);
    assert!(
        !generate(&mut server.client(), request())
            .await
            .unwrap()
            .results
            .is_empty()
    );
    server.stop().await;
}

/// A command for node in `folder`, where it, what `folder` needs and `others` are installed.
fn node(folder: &str, others: &[&Path]) -> Option<Command> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let modules = folder.join("node_modules");
    if let Some(missing) = others
        .iter()
        .copied()
        .chain([modules.as_path()])
        .find(|path| !path.exists())
    {
        skipped(format!(
            "{} is missing (make test-tools): the page was not tried",
            missing.display()
        ));
        return None;
    }
    let mut node = Command::new("node");
    node.current_dir(folder);
    Some(node)
}

#[test]
fn the_page_works_in_a_browser() {
    let chromium = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/bin/chromium");
    let Some(mut node) = node("tests/page", &[&chromium]) else {
        return;
    };
    node.args(["--test", "page.test.mjs"])
        .env("DENOISED_BINARY", env!("CARGO_BIN_EXE_denoised"))
        .env("CHROMIUM", chromium);
    succeeds(&node.output().unwrap());
}

#[test]
fn what_is_served_is_what_the_sources_make() {
    let out = tempfile::tempdir().unwrap();
    let script = "npm run --silent generate && npm run --silent check && node build.mjs \"$0\"";
    if node("src/page", &[]).is_none() {
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/page");
    succeeds(
        &Command::new("sh")
            .args(["-c", script])
            .arg(out.path())
            .current_dir(&folder)
            .output()
            .unwrap(),
    );
    for file in ["page.css", "page.js"] {
        let (served, made) = (folder.join("built").join(file), out.path().join(file));
        let read = |path: &Path| std::fs::read(path).unwrap();
        assert!(
            read(&served) == read(&made),
            "src/page/built/{file} is not what src/page makes (make page)"
        );
    }
}
