//! Versions come and go while the server runs, and no request notices.

use std::time::Duration;

use denoised::proto::v1::{
    GenerateRequest, GetModelRequest, ListModelsRequest, ModelReference, ModelState, Sampling,
};
use denoised::server::Server;
use tonic::Code;

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

/// The pinned version stands for its name whatever else comes; others are there by number.
#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_version_stands_for_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for version in [1, 2] {
        publish(root, ("live", version), SOUND, false);
    }
    let mut config = config();
    config.models.repository = Some(root.to_owned());
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
    config.models.repository = Some(root.to_owned());
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
    std::fs::copy(root.join("live/5/model.onnx"), half.join("model.onnx")).unwrap();
    becomes("version 4 is listed", async || {
        assert_eq!(newest(&server).await, 5);
        listed().await.contains(&("live".to_owned(), 4))
    })
    .await;

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
