//! OpenAI's API of completions, spoken by its own client, by litellm, and by hand.

use denoised::proto::v1::{GenerateRequest, Sampling};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::binary::Serving;
use crate::plain_http::{ask, get, value};
use crate::support::{TestServer, closed_form, config, generate, printed_by, prompt, python};

/// Posts `body` to `path` and returns status, head and body of the answer.
async fn post(server: &TestServer, path: &str, body: &str, header: &str) -> (u16, String, String) {
    let length = body.len();
    let request =
        format!("POST {path} HTTP/1.1\r\nhost: here\r\n{header}content-length: {length}\r\n\r\n{body}");
    ask(&server.url, &request).await
}

#[test]
fn openais_client_and_litellm_are_served_and_told_their_mistakes() {
    let Some(python) = python("openai", "litellm, openai") else {
        return;
    };
    let server = Serving::start();
    let told = printed_by(&python, "openai_clients.py", &server.address);
    assert_eq!(told["models"], json!(["world-english"]));
    assert_eq!(told["model"], "world-english@1");

    let choice = |answer: &str, index: usize| told[answer]["choices"][index].clone();
    let text = |choice: &Value| choice["text"].as_str().unwrap().to_owned();
    let first = text(&choice("whole", 0));
    assert!(first.len() > 20 && first != text(&choice("whole", 1)), "{told}");
    assert_eq!(told["whole"]["object"], "text_completion");
    assert_eq!(told["whole"]["seed"], 7);
    let prompt_tokens = told["whole"]["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(
        told["whole"]["usage"],
        json!({
            "prompt_tokens": prompt_tokens, "completion_tokens": 48, "total_tokens": prompt_tokens + 48,
            "completion_tokens_details": null, "prompt_tokens_details": null,
        })
    );
    // The tokens, put together, are the text.
    let logprobs = &choice("whole", 0)["logprobs"];
    let tokens: Vec<&str> = logprobs["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    assert_eq!(tokens.concat(), first);
    let values = logprobs["token_logprobs"].as_array().unwrap();
    assert!(values.len() == tokens.len() && values.iter().all(|value| value.as_f64().unwrap() <= 0.0));
    assert_eq!(logprobs["text_offset"][0], 0);
    assert_eq!(
        logprobs["text_offset"][1].as_u64().unwrap() as usize,
        tokens[0].chars().count()
    );
    // One seed, one text: alone or beside others, whole or streamed, from either client.
    assert_eq!(text(&choice("again", 0)), first);
    assert_eq!(told["streamed"], json!([first, text(&choice("whole", 1))]));
    assert_eq!(told["lite"], json!(first));
    assert_eq!(told["lite_streamed"], json!(first));
    assert_eq!(text(&told["several"][0]), first);
    assert_eq!(told["several"][1]["index"], 1);
    assert_ne!(text(&told["several"][1]), first);
    assert_eq!(told["echoed"], json!(format!("In the beginning{first}")));
    assert_eq!(told["reasons"].as_array().unwrap().len(), 2);
    assert_eq!(told["usage"].as_array().unwrap().len(), 1);
    // It came in pieces.
    let pieces = told["chunks"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|chunk| chunk.as_array().unwrap());
    assert!(
        pieces.filter(|text| *text != "").count() > 2,
        "{}",
        told["chunks"]
    );

    let frames = told["frames"].as_array().unwrap();
    let canvases: Vec<&Value> = frames
        .iter()
        .map(|frame| &frame["canvas"])
        .filter(|c| c.is_object())
        .collect();
    assert!(canvases.len() > 3, "{frames:?}");
    assert!(
        canvases[0]["text"]
            .as_str()
            .unwrap()
            .starts_with("In the beginning\u{2591}")
    );
    let masked: Vec<u64> = canvases
        .iter()
        .map(|canvas| canvas["masked"].as_u64().unwrap())
        .collect();
    assert!(
        masked[0] == 24 && masked.is_sorted_by(|a, b| a >= b),
        "{masked:?}"
    );

    let infilled = told["infilled"].as_str().unwrap();
    assert!(
        !infilled.is_empty() && !infilled.contains("went away"),
        "{infilled}"
    );
    let stop = &first[5..9];
    let stopped = text(&told["stopped"]);
    assert_eq!(stopped, first[..first.find(stop).unwrap()]);
    assert_eq!(told["stopped"]["finish_reason"], "stop");
    // Of tokens that are not told nothing is told.
    let offsets = told["stopped"]["logprobs"]["text_offset"].as_array().unwrap();
    let offsets: Vec<usize> = offsets
        .iter()
        .map(|offset| offset.as_u64().unwrap() as usize)
        .collect();
    assert!(
        !offsets.is_empty() && offsets.iter().all(|offset| *offset < stopped.chars().count()),
        "{offsets:?}"
    );
    assert!(told["early"].as_str().unwrap().len() > 100);

    for (what, says) in [
        ("model", "NotFoundError 404 None: "),
        ("temperature", "BadRequestError 400 temperature: "),
        ("long", "BadRequestError 400 max_tokens: "),
        ("tokens", "BadRequestError 400 prompt: "),
        ("penalty", "BadRequestError 400 presence_penalty: "),
        ("bias", "BadRequestError 400 logit_bias: "),
        ("logprobs", "BadRequestError 400 logprobs: "),
        ("best_of", "BadRequestError 400 best_of: "),
        ("n", "BadRequestError 400 prompt: "),
        ("none", "BadRequestError 400 n: "),
        ("stops", "BadRequestError 400 stop: "),
        ("unknown", "BadRequestError 400 body: "),
        ("sampler", "BadRequestError 400 sampler: "),
        ("steps", "BadRequestError 400 steps: "),
        ("deadline", "InternalServerError 504 None: "),
    ] {
        let refusal = told["refused"][what].as_str().unwrap();
        assert!(refusal.starts_with(says), "{what}: {refusal}");
    }
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    let line = log
        .lines()
        .find(|line| line.contains("path=\"/v1/completions\""))
        .expect(&log);
    assert!(
        line.contains("code=\"OK\"") && line.contains("canvases=2 done=2"),
        "{line}"
    );
}

/// Another form of the same requests, and nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_is_the_text_of_generate() {
    let server = TestServer::demo().await;
    let length = 20;
    let own = generate(
        &mut server.client(),
        GenerateRequest {
            prompt_as: Some(prompt("And he went")),
            length: Some(length),
            sampling: Some(Sampling {
                steps: Some(6),
                seed: Some(3),
                ..Sampling::default()
            }),
            ..GenerateRequest::default()
        },
    )
    .await
    .unwrap();
    let taken = length
        - own
            .accepted
            .unwrap()
            .template
            .iter()
            .map(crate::openai::positions)
            .sum::<u32>();
    let body = json!({"prompt": "And he went", "max_tokens": length - taken, "steps": 6, "seed": 3});
    let (status, head, answer) = post(&server, "/v1/completions", &body.to_string(), "").await;
    assert_eq!(status, 200, "{answer}");
    assert!(head.contains("content-type: application/json"), "{head}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let text = format!("And he went{}", answer["choices"][0]["text"].as_str().unwrap());
    assert_eq!(Some(text), own.results[0].text);
    assert_eq!(answer["model"], "world-english");

    // Who asks for nothing gets text as well, and what was drawn for him is told.
    let (status, _, answer) = post(&server, "/v1/completions", "{}", "").await;
    assert_eq!(status, 200, "{answer}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let body = json!({"seed": answer["seed"]}).to_string();
    let (_, _, again) = post(&server, "/v1/completions", &body, "").await;
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(answer["choices"], again["choices"]);

    let (_, _, metrics) = get(&server.url, "/metrics").await;
    let counted = "denoised_calls_total{method=\"completions\",code=\"OK\"}";
    assert_eq!(value(&metrics, counted), Some(3.0), "{metrics}");
    server.stop().await;
}

fn positions(part: &denoised::proto::v1::TemplatePart) -> u32 {
    match &part.part {
        Some(denoised::proto::v1::template_part::Part::Gap(gap)) => gap.positions,
        _ => 0,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_openais_shape() {
    let mut config = config();
    config.server.max_message_bytes = 1000;
    let server = TestServer::with_network(&config, closed_form()).await;
    let long = format!("{{\"prompt\": \"{}\"}}", "a".repeat(1000));
    for (path, body, status, param, says) in [
        ("/v1/completions", "{", 400, json!("body"), "EOF"),
        ("/v1/completions", "[]", 400, json!("body"), "struct"),
        ("/v1/completions", long.as_str(), 400, json!("body"), "1000 bytes"),
        (
            "/v1/completions",
            "{\"prompt\": \"a\"}",
            400,
            Value::Null,
            "tokenizer",
        ),
        (
            "/v1/completions",
            "{\"model\": \"a@b\"}",
            400,
            json!("model"),
            "NAME@VERSION",
        ),
        (
            "/v1/completions",
            "{\"model\": \"other\"}",
            404,
            Value::Null,
            "other",
        ),
        ("/v1/chat/completions", "{}", 404, Value::Null, "/v1/completions"),
    ] {
        let (told, head, answer) = post(&server, path, body, "").await;
        assert_eq!(told, status, "{path} {body}: {answer}");
        assert!(head.contains("content-type: application/json"), "{head}");
        let error = serde_json::from_str::<Value>(&answer).unwrap()["error"].clone();
        assert_eq!(error["param"], param, "{answer}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().unwrap().contains(says), "{answer}");
    }
    let (status, _, models) = get(&server.url, "/v1/models").await;
    assert!(
        status == 200 && models.contains("\"id\":\"closed-form\""),
        "{models}"
    );
    assert_eq!(get(&server.url, "/v1/models/nobody").await.0, 404);
    server.stop().await;

    let mut config = crate::support::config();
    config.server.openai = false;
    let server = TestServer::with_network(&config, closed_form()).await;
    let (status, _, answer) = post(&server, "/v1/completions", "{}", "").await;
    assert_eq!(status, 404, "{answer}");
    server.stop().await;
}

/// Tokens are asked for here as everywhere, and a body that never comes holds nothing for long.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_time_hold_here_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let own = crate::tokens::token(&file, "own", "models = [\"another\"]");
    let mut config = config();
    config.server.tokens = Some(file);
    config.server.handshake_seconds = 1;
    let server = TestServer::with_network(&config, closed_form()).await;
    let (status, head, answer) = post(&server, "/v1/completions", "{}", "").await;
    assert_eq!(status, 401, "{head}");
    assert!(answer.contains("\"type\":\"authentication_error\""), "{answer}");
    let bearer = format!("authorization: Bearer {own}\r\n");
    let (status, _, answer) = post(
        &server,
        "/v1/completions",
        "{\"model\": \"closed-form\"}",
        &bearer,
    )
    .await;
    assert_eq!(status, 404, "{answer}");

    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://"))
        .await
        .unwrap();
    let half = format!("POST /v1/completions HTTP/1.1\r\nhost: here\r\n{bearer}content-length: 10\r\n\r\n{{");
    stream.write_all(half.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    tokio::time::timeout(std::time::Duration::from_secs(20), read)
        .await
        .unwrap()
        .unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("did not come in time"),
        "{answer}"
    );
    server.stop().await;
}

/// Whoever goes away in the middle of a stream has cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_has_cancelled() {
    let server = TestServer::demo().await;
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://"))
        .await
        .unwrap();
    let body = json!({"steps": 4096, "stream": true, "frames": true}).to_string();
    let length = body.len();
    let request =
        format!("POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut said = [0; 256];
    assert!(stream.read(&mut said).await.unwrap() > 0);
    drop(stream);
    let cancelled = "denoised_calls_total{method=\"completions\",code=\"CANCELLED\"}";
    let told = async { while value(&get(&server.url, "/metrics").await.2, cancelled) != Some(1.0) {} };
    tokio::time::timeout(std::time::Duration::from_secs(30), told)
        .await
        .unwrap();
    let idle = async {
        while value(&get(&server.url, "/metrics").await.2, "denoised_running_requests") != Some(0.0) {}
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), idle)
        .await
        .unwrap();
    server.stop().await;
}
