//! Tokens: who is let in, whose requests are whose, and a file of tokens that changes.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use denoised::bundle::Manifest;
use denoised::client::{Bearer, Client, Event, Request};
use denoised::config::{Config, Who};
use denoised::models::{Models, ServedModel};
use denoised::proto::DESCRIPTORS;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::model_service_client::ModelServiceClient;
use denoised::proto::v1::server_service_client::ServerServiceClient;
use denoised::proto::v1::{
    CancelRequest, GenerateRequest, GetModelRequest, GetServerRequest, ListModelsRequest, ModelReference,
    Sampling,
};
use denoised::server::Server;
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::binary::{Serving, denoised};
use crate::plain_http::{ask, get};
use crate::support::{TestServer, closed_form, closed_form_manifest, config};

/// A token that `denoised token new` makes; its hash is in `file` then, and `rights` behind it.
pub(crate) fn token(file: &Path, name: &str, rights: &str) -> String {
    let output = denoised()
        .args(["token", "new", name, "--file"])
        .arg(file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let mut written = std::fs::read_to_string(file).unwrap();
    writeln!(written, "{rights}").unwrap();
    std::fs::write(file, written).unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(crate) type Showing = InterceptedService<Channel, Bearer>;

fn showing(channel: &Channel, token: &str) -> Showing {
    InterceptedService::new(channel.clone(), Bearer::new(token).unwrap())
}

/// Two models, of which the first is the default, for those whose tokens are in `file`.
async fn serve(file: &Path) -> TestServer {
    serve_with(config(), file).await
}

/// The same with other settings.
async fn serve_with(mut config: Config, file: &Path) -> TestServer {
    config.server.tokens = Some(file.to_owned());
    let mut models = Models::default();
    for name in ["everybodys", "secret"] {
        let manifest = Manifest {
            name: name.to_owned(),
            ..closed_form_manifest()
        };
        models.insert(ServedModel::without_bundle(manifest, 1, closed_form()));
    }
    TestServer::run(Server::with_models(&config, models).await.unwrap()).await
}

/// What is no request has rules of its own, each from nobody to everybody.
#[tokio::test(flavor = "multi_thread")]
async fn who_may_ask_for_what_is_said_one_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let (own, admin) = (token(&file, "own", ""), token(&file, "admin", "admin = true"));
    let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let load = "/denoised.v1.ModelService/LoadModel";
    for (who, passes) in [
        (Who::Nobody, [false, false, false]),
        (Who::Admins, [false, false, true]),
        (Who::Callers, [false, true, true]),
        (Who::Everybody, [true, true, true]),
    ] {
        let mut config = config();
        config.server.metrics = who;
        config.server.reflection = who;
        if who != Who::Everybody {
            config.server.model_control = who;
        }
        let server = serve_with(config, &file).await;
        let asks = [None, Some(&own), Some(&admin)];
        for (token, passes) in asks.into_iter().zip(passes) {
            let header = token.map_or(String::new(), |token| {
                format!("authorization: Bearer {token}\r\n")
            });
            let (status, _, _) = ask(
                &server.url,
                &format!("GET /metrics HTTP/1.1\r\nhost: here\r\n{header}\r\n"),
            )
            .await;
            assert_eq!(status == 200, passes, "{who:?}: {status} for {token:?}");
            let bearer = token.map_or(Bearer::default(), |token| Bearer::new(token).unwrap());
            for path in [reflection, load] {
                let service = InterceptedService::new(server.channel.clone(), bearer.clone());
                let told = call(service, path).await;
                let refused = told.is_err_and(|status| {
                    [Code::Unauthenticated, Code::PermissionDenied, Code::Unimplemented]
                        .contains(&status.code())
                });
                let passes = passes && !(who == Who::Everybody && path == load);
                assert_eq!(!refused, passes, "{who:?}: {path} for {token:?}");
            }
        }
        server.stop().await;
    }
}

/// Calls `path` without a word of a request.
async fn call(service: Showing, path: &str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(service);
    grpc.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let path = path.parse().unwrap();
    grpc.unary(tonic::Request::new(()), path, codec).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_health_is_answered_without_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let (own, admin) = (token(&file, "own", ""), token(&file, "admin", "admin = true"));
    let server = serve(&file).await;
    let anonymous = InterceptedService::new(server.channel.clone(), Bearer::default());
    let described = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    let methods = described.file.iter().flat_map(|file| {
        let services = file.service.iter();
        services.flat_map(|service| {
            let methods = service.method.iter();
            methods.map(|method| format!("/{}.{}/{}", file.package(), service.name(), method.name()))
        })
    });
    let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let paths: Vec<String> = methods
        .chain([reflection.to_owned(), "/no.Service/Method".to_owned()])
        .collect();
    assert!(paths.len() > 10, "{paths:?}");
    for path in &paths {
        for service in [anonymous.clone(), showing(&server.channel, &format!("{own}0"))] {
            let refused = call(service, path).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unauthenticated, "{path}: {refused}");
            let reason = refused.get_details_error_info().unwrap().reason;
            assert_eq!(reason, "TOKEN_NEEDED", "{path}");
        }
        let known = call(showing(&server.channel, &own), path).await;
        assert!(
            known.is_ok() || known.unwrap_err().code() != Code::Unauthenticated,
            "{path}"
        );
    }
    // Models are for admins to load, and for them only where that is switched on.
    for (token, says) in [(&own, "admin"), (&admin, "model_control")] {
        for method in ["LoadModel", "UnloadModel"] {
            let path = format!("/denoised.v1.ModelService/{method}");
            let denied = call(showing(&server.channel, token), &path).await.unwrap_err();
            assert_eq!(denied.code(), Code::PermissionDenied, "{denied}");
            assert!(denied.message().contains(says), "{denied}");
        }
    }
    call(anonymous, "/grpc.health.v1.Health/Check").await.unwrap();

    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(&server.url, path).await.0, 200);
    }
    let metrics = async |token: &str| {
        let head = format!("GET /metrics HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {token}\r\n\r\n");
        ask(&server.url, &head).await
    };
    let (status, head, _) = get(&server.url, "/metrics").await;
    assert!(
        status == 401 && head.contains("www-authenticate: bearer"),
        "{head}"
    );
    assert_eq!(metrics("wrong").await.0, 401);
    assert_eq!(metrics(&own).await.0, 403);
    let (status, _, told) = metrics(&admin).await;
    assert_eq!(status, 200);
    assert!(told.contains("code=\"UNAUTHENTICATED\""), "refusals are counted");
    for secret in [&own, &admin] {
        assert!(!told.contains(secret.as_str()));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn principals_have_requests_models_and_shares_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let first = token(&file, "first", "max_share = 0.25");
    let second = token(&file, "second", "models = [\"secret\"]\nweight = 2");
    let server = serve(&file).await;
    let client = |token: &str| DiffusionServiceClient::new(showing(&server.channel, token));
    let models = |token: &str| ModelServiceClient::new(showing(&server.channel, token));

    let secret = || {
        Some(ModelReference {
            name: "secret".into(),
            version: 0,
        })
    };
    let long = |samples| GenerateRequest {
        model: secret(),
        request_id: "mine".into(),
        sampling: Some(Sampling {
            steps: Some(4096),
            num_samples: Some(samples),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let cancel = || CancelRequest {
        request_id: "mine".into(),
    };
    // Shares: told, and held to, at 5 ms an evaluation as long as nothing is measured.
    let share = async |token: &str| {
        let mut client = ServerServiceClient::new(showing(&server.channel, token));
        let told = client.get_server(GetServerRequest {}).await.unwrap();
        told.into_inner().limits.unwrap().max_caller_seconds
    };
    assert_eq!((share(&first).await, share(&second).await), (900.0, 1800.0));
    let refused = client(&first).generate(long(64)).await.unwrap_err();
    assert!(refused.message().contains("at most 900.0 s"), "{refused}");
    drop(client(&second).generate(long(64)).await.unwrap());
    // Its id is free once the server has seen that nobody follows it.
    let gone = async { while client(&second).cancel(cancel()).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap();

    // Ids: both come from the same address.
    let running = client(&first).generate(long(16)).await.unwrap();
    let stranger = client(&second).cancel(cancel()).await.unwrap_err();
    assert_eq!(stranger.code(), Code::NotFound);
    let of_second = client(&second).generate(long(16)).await.unwrap();
    client(&first).cancel(cancel()).await.unwrap();
    client(&second).cancel(cancel()).await.unwrap();
    drop((running, of_second));

    // Models: what is not theirs does not exist.
    let listed = async |token: &str| -> Vec<String> {
        let listed = models(token).list_models(ListModelsRequest {}).await.unwrap();
        listed
            .into_inner()
            .models
            .into_iter()
            .map(|model| model.name)
            .collect()
    };
    assert_eq!(listed(&first).await, ["everybodys", "secret"]);
    assert_eq!(listed(&second).await, ["secret"]);
    let get = |name: &str| GetModelRequest {
        model: Some(ModelReference {
            name: name.into(),
            version: 0,
        }),
    };
    models(&second).get_model(get("secret")).await.unwrap();
    let hidden = models(&second).get_model(get("everybodys")).await.unwrap_err();
    let nowhere = models(&second).get_model(get("nowhere")).await.unwrap_err();
    assert_eq!(hidden.code(), Code::NotFound);
    assert_eq!(
        hidden.message().replace("everybodys", "nowhere"),
        nowhere.message()
    );
    let default = client(&second)
        .generate(GenerateRequest::default())
        .await
        .unwrap_err();
    assert_eq!(default.code(), Code::NotFound, "{default}");
    assert!(default.message().contains("secret"), "{default}");
    let paths = [
        "/denoised.v1.DiffusionService/Infill",
        "/denoised.v1.DiffusionService/Score",
        "/denoised.v1.DiffusionService/Choose",
        "/denoised.v1.DiffusionService/Tokenize",
        "/denoised.v1.DiffusionService/Detokenize",
    ];
    for path in paths {
        let refused = call(showing(&server.channel, &second), path).await.unwrap_err();
        assert_eq!(
            refused.code(),
            Code::NotFound,
            "{path}: the default model is not theirs"
        );
    }
    server.stop().await;
}

/// The file changes while the server runs: a new token is let in, one that is gone no more, and a broken file changes
/// nothing. SIGHUP ends nobody.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_come_and_go_while_the_server_runs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.toml");
    let first = token(&file, "first", "");
    let server = Serving::start_with(denoised().env("DENOISED__SERVER__TOKENS", &file));
    let url = format!("http://{}", server.address);
    let channel = Channel::from_shared(url.clone())
        .unwrap()
        .connect()
        .await
        .unwrap();
    let lists = async |token: &str| {
        let mut client = ModelServiceClient::new(showing(&channel, token));
        let answer = client.list_models(ListModelsRequest {}).await;
        answer.map(drop).map_err(|refused| refused.code())
    };
    let becomes = async |token: &str, wanted: Result<(), Code>| {
        let waiting = async {
            while lists(token).await != wanted {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waiting)
            .await
            .unwrap();
    };
    assert_eq!(lists(&first).await, Ok(()));
    let only_first = std::fs::read_to_string(&file).unwrap();
    let second = token(&file, "second", "");
    becomes(&second, Ok(())).await;
    assert_eq!(lists(&first).await, Ok(()));
    let hung_up = Command::new("kill")
        .args(["-HUP", &server.id().to_string()])
        .status()
        .unwrap();
    assert!(hung_up.success());
    std::fs::write(&file, only_first.replace("[[token]]", "[[tokens]]")).unwrap();
    // For longer than between two looks of the server: it has seen it.
    let broken = std::time::Instant::now();
    while broken.elapsed() < Duration::from_secs(5) {
        assert_eq!(lists(&second).await, Ok(()));
    }
    std::fs::write(&file, only_first).unwrap();
    becomes(&second, Err(Code::Unauthenticated)).await;
    assert_eq!(lists(&first).await, Ok(()));

    // The command line and the client for Rust show tokens as well.
    let models = |token: Option<&str>| {
        let mut command = denoised();
        command.args(["models", "--server", &url]);
        if let Some(token) = token {
            command.env("DENOISED_TOKEN", token);
        }
        command.output().unwrap()
    };
    assert!(models(Some(&first)).status.success());
    let refused = models(None);
    assert_eq!(refused.status.code(), Some(70));
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("asks for a token"),
        "{refused:?}"
    );
    let client = Client::new([&url]).unwrap().with_token(&first).unwrap();
    let mut events = client.run(Request::continuing("And").length(8));
    let mut results = 0;
    while let Some(event) = events.next().await {
        results += usize::from(matches!(event.unwrap(), Event::Result(_)));
    }
    assert_eq!(results, 1);

    let (code, log) = server.stop();
    assert_eq!(code, Some(0));
    assert!(
        log.contains("caller=first") && log.contains("UNAUTHENTICATED"),
        "{log}"
    );
    for secret in [&first, &second] {
        assert!(!log.contains(secret.as_str()));
    }
}

#[test]
fn a_file_that_is_none_is_named_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let run = |file: PathBuf| {
        let output = denoised()
            .args(["serve", "--listen", "127.0.0.1:0"])
            .env("DENOISED__SERVER__TOKENS", &file)
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{error}");
        assert_eq!(error.trim().lines().count(), 1, "{error}");
        assert!(
            error.contains("server.tokens") && error.contains(file.to_str().unwrap()),
            "{error}"
        );
        error
    };
    assert!(run(folder.path().join("nowhere.toml")).contains("No such file"));
    let empty = folder.path().join("empty.toml");
    std::fs::write(&empty, "").unwrap();
    assert!(run(empty).contains("no [[token]]"));
}
