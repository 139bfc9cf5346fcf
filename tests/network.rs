//! The embedded network keeps to the contract, and bundles are served from a repository.

use denoised::bundle::{Bundle, demo};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, ScoreNetwork};
use denoised::proto::v1::{GenerateRequest, ListModelsRequest, ModelReference, Sampling};

use crate::support::{TestServer, config, generate, publish};

#[test]
fn rows_come_in_the_order_of_positions() {
    let bundle: Bundle = demo().unwrap().unwrap();
    let mut network = OnnxNetwork::load(&bundle, &OnnxOptions::default()).unwrap();
    let mask = i64::from(bundle.manifest().mask_token.unwrap());
    let tokens: Vec<i64> = (0..32).map(|i| if i % 3 == 0 { mask } else { i * 7 }).collect();
    let sigma = [0.5f32, 2.0];
    let mut all = Vec::new();
    let every: Vec<i64> = (0..32).collect();
    let batch = Batch {
        tokens: &tokens,
        length: 16,
        sigma: &sigma,
        positions: &every,
    };
    network
        .log_score(&batch, &mut |rows| {
            all = (0..32).map(|i| rows.row(i).to_vec()).collect();
        })
        .unwrap();
    assert!(all.iter().flatten().all(|score| score.is_finite()));
    let some = [3i64, 15, 16, 30];
    let batch = Batch {
        positions: &some,
        ..batch
    };
    network
        .log_score(&batch, &mut |rows| {
            for (k, position) in some.iter().enumerate() {
                for (a, b) in rows.row(k).iter().zip(&all[*position as usize]) {
                    assert!((a - b).abs() < 1e-4, "{a} {b}");
                }
            }
        })
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_serves_its_good_bundles_and_refuses_the_bad_ones() {
    let folder = tempfile::tempdir().unwrap();
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("training/demo/world-english/1");
    for version in ["2", "10", "11"] {
        let to = folder.path().join("world-english").join(version);
        std::fs::create_dir_all(&to).unwrap();
        for file in ["manifest.json", "model.onnx", "tokenizer.json"] {
            std::fs::copy(demo.join(file), to.join(file)).unwrap();
        }
    }
    // Version 11 is damaged: it must not take the place of version 10.
    std::fs::write(folder.path().join("world-english/11/model.onnx"), "damaged").unwrap();
    let mut config = config();
    config.models.repository = Some(folder.path().to_owned().into());
    let server = TestServer::demo_with(&config).await;
    let listed = server
        .models()
        .list_models(ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(
        listed
            .iter()
            .map(|m| (m.version, m.is_default))
            .collect::<Vec<_>>(),
        [(1, false), (2, false), (10, true)]
    );
    for (asked, answers) in [(0, 10), (2, 2)] {
        let model = Some(ModelReference {
            name: "world-english".into(),
            version: asked,
        });
        let answer = generate(
            &mut server.client(),
            GenerateRequest {
                model,
                length: Some(8),
                ..GenerateRequest::default()
            },
        )
        .await
        .unwrap();
        assert_eq!(answer.accepted.unwrap().model.unwrap().version, answers);
    }
    server.stop().await;
}

/// The same row in both types: the same tokens, and in proportion to what the row says.
#[tokio::test(flavor = "multi_thread")]
async fn networks_may_answer_in_float16() {
    let repository = tempfile::tempdir().unwrap();
    for (name, network) in [
        ("single", &include_bytes!("fixtures/networks/float32.onnx")[..]),
        ("half", &include_bytes!("fixtures/networks/float16.onnx")[..]),
    ] {
        publish(repository.path(), (name, 1), network, false);
    }
    let mut config = config();
    config.models.repository = Some(repository.path().to_owned().into());
    let server = TestServer::demo_with(&config).await;
    let mut answers = Vec::new();
    for name in ["single", "half"] {
        let request = GenerateRequest {
            model: Some(ModelReference {
                name: name.to_owned(),
                version: 1,
            }),
            sampling: Some(Sampling {
                seed: Some(3),
                num_samples: Some(64),
                ..Sampling::default()
            }),
            ..GenerateRequest::default()
        };
        let answer = generate(&mut server.client(), request).await.unwrap();
        answers.push(answer.tokens());
    }
    assert_eq!(answers[0], answers[1]);
    let count = |token| answers[0].iter().flatten().filter(|t| **t == token).count();
    assert!(
        count(4) > 2 * count(2) && count(2) > count(0),
        "rows are read, not passed over"
    );
    server.stop().await;
}
