//! Versions come and go while the server runs, and no request notices.

use std::time::Duration;

use denoised::config::Who;
use denoised::proto::v1::event::Event;
use denoised::proto::v1::{
    GenerateRequest, GetModelRequest, ListModelsRequest, LoadModelRequest, ModelReference, ModelState,
    Sampling, UnloadModelRequest,
};
use denoised::server::Server;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::binary::denoised;
use crate::plain_http::{get, value};
use crate::support::{TestServer, config, generate, publish};

const SOUND: &[u8] = include_bytes!("fixtures/networks/float32.onnx");
/// Has no input `sigma`, though its manifest will say that it has.
const ENDLESS: &[u8] = include_bytes!("fixtures/networks/endless.onnx");

fn request(version: u64) -> GenerateRequest {
    GenerateRequest {
        model: Some(ModelReference {
            name: "live".to_owned(),
            version,
        }),
        length: Some(8),
        sampling: Some(Sampling {
            steps: Some(2),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    }
}

/// The version that a request gets which names none.
async fn newest(server: &TestServer) -> u64 {
    let answer = generate(&mut server.client(), request(0)).await.unwrap();
    assert_eq!(answer.results.len(), 1);
    answer.accepted.unwrap().model.unwrap().version
}

/// Asks on and on until `reached`; every request has to be answered.
async fn becomes(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !reached().await {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}"));
}

/// Nobody waits for the next look where the system tells what has changed.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_folder_is_seen_when_it_happens() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    publish(root, ("live", 1), SOUND, false);
    let mut config = config();
    config.models.repository = Some(root.to_owned().into());
    config.models.default = Some("live".to_owned());
    config.models.poll_seconds = 86_400;
    let server = TestServer::demo_with(&config).await;
    assert_eq!(newest(&server).await, 1);
    publish(root, ("live", 2), SOUND, false);
    becomes("version 2 is served", async || newest(&server).await == 2).await;
    std::fs::remove_dir_all(root.join("live/2")).unwrap();
    becomes("version 1 is served again", async || newest(&server).await == 1).await;
    // Written file by file, as `cp -r` does: it is sound when the last one is there.
    let (whole, copy) = (root.join("live/1"), root.join("live/3"));
    std::fs::create_dir(&copy).unwrap();
    for file in ["manifest.json", "model.onnx"] {
        std::fs::copy(whole.join(file), copy.join(file)).unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    becomes("version 3 is served", async || newest(&server).await == 3).await;
}

/// The pinned version stands for its name whatever else comes; others are there by number.
#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_version_stands_for_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for version in [1, 2] {
        publish(root, ("live", version), SOUND, false);
    }
    let mut config = config();
    config.models.repository = Some(root.to_owned().into());
    config.models.default = Some("live".to_owned());
    config.models.poll_seconds = 1;
    config.models.pin = vec!["live@1".to_owned()];
    let server = TestServer::demo_with(&config).await;
    assert_eq!(newest(&server).await, 1);
    publish(root, ("live", 3), SOUND, false);
    let by_number = async || {
        let answer = generate(&mut server.client(), request(3)).await;
        answer.is_ok()
    };
    becomes("version 3 is served", by_number).await;
    assert_eq!(newest(&server).await, 1);
    let unnamed = GenerateRequest {
        model: None,
        ..request(0)
    };
    let answer = generate(&mut server.client(), unnamed).await.unwrap();
    assert_eq!(
        answer.accepted.unwrap().model.unwrap().version,
        1,
        "the default is pinned too"
    );
    let listed = server.models().list_models(ListModelsRequest {}).await.unwrap();
    let listed = listed.into_inner().models;
    let of = |version| {
        listed
            .iter()
            .find(|model| model.name == "live" && model.version == version)
    };
    assert_eq!(
        of(2).unwrap().state(),
        ModelState::Unloaded,
        "nobody has asked for it"
    );
    // The version is gone: another is not what was wanted.
    std::fs::remove_dir_all(root.join("live/1")).unwrap();
    let refused = async || {
        let answer = generate(&mut server.client(), request(0)).await;
        answer.is_err_and(|status| status.code() == Code::NotFound)
    };
    becomes("the pinned version is gone", refused).await;
    server.stop().await;

    for (pin, says) in [
        ("live@1", "live@1, which is not served"),
        ("live", "must be a list of name@version"),
        ("live@x", "must be a list of name@version"),
    ] {
        config.models.pin = vec![pin.to_owned()];
        let error = Server::bind(&config).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    config.models.pin = vec!["live@2".to_owned(), "live@3".to_owned()];
    let error = Server::bind(&config).await.unwrap_err().to_string();
    assert!(error.contains("twice"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_come_and_go_and_every_request_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    publish(root, ("live", 1), SOUND, false);
    let mut config = config();
    config.models.repository = Some(root.to_owned().into());
    config.models.poll_seconds = 1;
    let server = TestServer::demo_with(&config).await;
    let listed = async || -> Vec<(String, u64)> {
        let models = server.models().list_models(ListModelsRequest {}).await.unwrap();
        let models = models.into_inner().models.into_iter();
        models.map(|model| (model.name, model.version)).collect()
    };
    assert_eq!(newest(&server).await, 1);

    publish(root, ("live", 2), SOUND, false);
    becomes("version 2 is served", async || newest(&server).await == 2).await;

    // One that cannot be run is told as such, and changes nothing.
    publish(root, ("live", 3), ENDLESS, true);
    becomes("version 3 has failed", async || {
        assert_eq!(newest(&server).await, 2);
        let model = GetModelRequest {
            model: request(3).model,
        };
        match server.models().get_model(model).await {
            Ok(model) => model.into_inner().model.unwrap().state() == ModelState::Failed,
            Err(status) => {
                assert_eq!(status.code(), Code::NotFound, "{status}");
                false
            }
        }
    })
    .await;

    // What is half written is refused, until it is whole.
    let half = root.join("live/4");
    publish(root, ("live", 5), SOUND, false);
    std::fs::create_dir(&half).unwrap();
    std::fs::copy(root.join("live/5/manifest.json"), half.join("manifest.json")).unwrap();
    becomes("version 5 is served", async || newest(&server).await == 5).await;
    assert!(!listed().await.contains(&("live".to_owned(), 4)));
    let half_refused = refused(&server, named("live", 4)).await;
    assert!(half_refused.is_some_and(|why| why.contains("model.onnx")));
    let named_by_number = generate(&mut server.client(), request(4)).await.unwrap_err();
    assert!(
        named_by_number.message().contains("GetModel tells why"),
        "{named_by_number}"
    );
    std::fs::copy(root.join("live/5/model.onnx"), half.join("model.onnx")).unwrap();
    becomes("version 4 is listed", async || {
        assert_eq!(newest(&server).await, 5);
        listed().await.contains(&("live".to_owned(), 4))
    })
    .await;
    assert_eq!(refused(&server, named("live", 4)).await, None);

    // What is gone is served to nobody; the version before it takes its place.
    std::fs::remove_dir_all(root.join("live/5")).unwrap();
    becomes("version 4 is served", async || newest(&server).await == 4).await;
    let gone = generate(&mut server.client(), request(5)).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert_eq!(
        generate(&mut server.client(), request(1))
            .await
            .unwrap()
            .results
            .len(),
        1,
        "an older version by its number"
    );

    // The folder goes away for a while: what is served stays.
    let away = folder.path().with_extension("away");
    std::fs::rename(root, &away).unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(newest(&server).await, 4);
    std::fs::rename(&away, root).unwrap();
    publish(root, ("live", 6), SOUND, false);
    becomes("version 6 is served", async || newest(&server).await == 6).await;
    server.stop().await;
}

/// Why a version is refused, where it is; all who tell say the same.
async fn refused(server: &TestServer, version: ModelReference) -> Option<String> {
    let listed = server.models().list_models(ListModelsRequest {}).await.unwrap();
    let mut listed = listed.into_inner().refused.into_iter();
    let listed = listed.find(|model| model.name == version.name && model.version == version.version);
    let model = Some(version);
    let got = server
        .models()
        .get_model(GetModelRequest { model })
        .await
        .unwrap();
    let got = got.into_inner().model.unwrap();
    let is_refused = got.state() == ModelState::Refused;
    assert_eq!(listed, is_refused.then(|| got.clone()));
    let (_, _, metrics) = get(&server.url, "/metrics").await;
    let counted = value(&metrics, "denoised_refused_versions");
    assert_eq!(counted, Some(f64::from(u8::from(is_refused))));
    is_refused.then_some(got.state_reason)
}

fn named(name: &str, version: u64) -> ModelReference {
    ModelReference {
        name: name.to_owned(),
        version,
    }
}

/// Models come and go by order alone; what runs is not disturbed by it.
#[tokio::test(flavor = "multi_thread")]
async fn models_are_loaded_and_unloaded_by_order() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    publish(root, ("live", 1), SOUND, false);
    publish(root, ("other", 1), SOUND, false);
    let mut config = config();
    config.models.repository = Some(root.to_owned().into());
    config.models.default = Some("other".to_owned());
    config.models.poll_seconds = 0;
    config.server.model_control = Who::Admins;
    let server = TestServer::demo_with(&config).await;
    let load = async |name: &str, version| {
        let asked = LoadModelRequest {
            model: Some(named(name, version)),
        };
        let loaded = server.models().load_model(asked).await?;
        Ok::<_, Status>(loaded.into_inner().model.unwrap())
    };
    let unload = async |name: &str, version| {
        let asked = UnloadModelRequest {
            model: Some(named(name, version)),
        };
        let unloaded = server.models().unload_model(asked).await?.into_inner().unloaded;
        Ok::<_, Status>(
            unloaded
                .into_iter()
                .map(|model| model.version)
                .collect::<Vec<_>>(),
        )
    };
    let reason = |status: &Status| status.get_details_error_info().unwrap().reason;

    // Loaded before anybody asks for it.
    let loaded = load("live", 0).await.unwrap();
    assert_eq!((loaded.version, loaded.state()), (1, ModelState::Ready));
    // Nobody looks by himself.
    publish(root, ("live", 2), SOUND, false);
    assert_eq!(newest(&server).await, 1);
    assert_eq!(load("live", 0).await.unwrap().version, 2);
    assert_eq!(newest(&server).await, 2);

    // A request that runs goes on while its model is unloaded.
    let long = GenerateRequest {
        sampling: Some(Sampling {
            steps: Some(2000),
            ..Sampling::default()
        }),
        ..request(2)
    };
    let mut running = server.client().generate(long).await.unwrap().into_inner();
    running.message().await.unwrap().unwrap();
    assert_eq!(unload("live", 2).await.unwrap(), [2]);
    assert_eq!(newest(&server).await, 1);
    let gone = generate(&mut server.client(), request(2)).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    let mut results = 0;
    while let Some(message) = running.message().await.unwrap() {
        let event = message.event.and_then(|event| event.event);
        results += usize::from(matches!(event, Some(Event::Result(_))));
    }
    assert_eq!(results, 1);

    // All versions, those to come included, until one is wanted again.
    assert_eq!(unload("live", 0).await.unwrap(), [1]);
    assert_eq!(
        unload("live", 0).await.unwrap(),
        [] as [u64; 0],
        "once more is no error"
    );
    publish(root, ("live", 3), SOUND, false);
    assert_eq!(load("other", 1).await.unwrap().version, 1);
    let gone = generate(&mut server.client(), request(0)).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert_eq!(load("live", 1).await.unwrap().version, 1);
    assert_eq!(newest(&server).await, 1, "the others stay away");
    assert_eq!(load("live", 0).await.unwrap().version, 3);
    assert_eq!(newest(&server).await, 3);
    // The model in the binary, too.
    let demo = server
        .models()
        .list_models(ListModelsRequest {})
        .await
        .unwrap()
        .into_inner();
    let demo = demo
        .models
        .into_iter()
        .find(|model| model.has_tokenizer)
        .unwrap()
        .name;
    assert_eq!(unload(&demo, 0).await.unwrap(), [1]);
    assert_eq!(load(&demo, 1).await.unwrap().state(), ModelState::Ready);

    // What cannot be done changes nothing.
    let unknown = load("nobody", 0).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let unknown = unload("live", 9).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    let default = unload("other", 0).await.unwrap_err();
    assert_eq!(
        (default.code(), reason(&default).as_str()),
        (Code::FailedPrecondition, "MODEL_IS_DEFAULT")
    );
    let unnamed = server.models().load_model(LoadModelRequest::default()).await;
    assert_eq!(unnamed.unwrap_err().code(), Code::InvalidArgument);
    std::fs::create_dir(root.join("live/4")).unwrap();
    std::fs::write(root.join("live/4/manifest.json"), "{}").unwrap();
    let refused = load("live", 4).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::FailedPrecondition, "BUNDLE_REFUSED"),
        "{refused}"
    );
    // One that cannot be run is told as such, and is tried anew when it is loaded again.
    publish(root, ("live", 5), ENDLESS, true);
    for _ in 0..2 {
        let failed = load("live", 5).await.unwrap_err();
        assert_eq!(failed.code(), Code::Unavailable, "{failed}");
    }
    std::fs::remove_dir_all(root.join("live/5")).unwrap();
    publish(root, ("live", 5), SOUND, false);
    assert_eq!(load("live", 5).await.unwrap().state(), ModelState::Ready);
    assert_eq!(newest(&server).await, 5);

    // From the command line.
    for (arguments, says) in [
        (["unload", "live"], "live@1\nlive@2\nlive@3\nlive@5\n"),
        (["load", "live@5"], "live@5\n"),
    ] {
        let output = denoised()
            .args(arguments)
            .args(["--server", &server.url])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), says, "{output:?}");
    }
    assert_eq!(newest(&server).await, 5);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_loads_or_unloads_unless_that_is_switched_on() {
    let server = TestServer::demo().await;
    let asked = UnloadModelRequest {
        model: Some(named("demo", 0)),
    };
    let denied = server.models().unload_model(asked).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert!(denied.message().contains("server.model_control"), "{denied}");
    server.stop().await;
}
