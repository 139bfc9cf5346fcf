//! Networks that others trained: probabilities of the clean token are served as such, and the example
//! of an exporter in PyTorch writes what the server reads.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use denoised::bundle::{Bundle, Manifest};
use denoised::diffusion::Parameterization;
use denoised::models::{Models, ServedModel};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::proto::v1::{GenerateRequest, ModelReference, Sampling};
use denoised::server::Server;
use statrs::distribution::{ChiSquared, ContinuousCDF};

use crate::support::{CLOSED_FORM_LENGTH, TestServer, closed_form_manifest, config, generate, skipped};

const LAW: [f64; 5] = [0.4, 0.3, 0.15, 0.1, 0.05];

/// Says `ln p(x0 = y)` everywhere, whatever the noise.
struct Probabilities;

impl ScoreNetwork for Probabilities {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let row = LAW.iter().map(|p| p.ln() as f32).chain([-1e6]);
        let rows: Vec<f32> = batch.positions.iter().flat_map(|_| row.clone()).collect();
        read(ScoreRows::packed(&rows, LAW.len() + 1));
        Ok(())
    }
}

/// Chi-square over the tokens of 500 canvases, each sampler and number of steps at a significance of 0.001.
#[tokio::test(flavor = "multi_thread")]
async fn probabilities_are_drawn_from_as_they_are() {
    let manifest = Manifest {
        parameterization: Parameterization::Mean,
        time_conditioned: false,
        ..closed_form_manifest()
    };
    let mut models = Models::default();
    let network = Box::new(|| Ok(Box::new(Probabilities) as Box<dyn ScoreNetwork>));
    models.insert(ServedModel::without_bundle(manifest, 1, network));
    let server = TestServer::run(Server::with_models(&config(), models).await.unwrap()).await;
    for steps in [1, 4, 32] {
        let mut counts = [0_u32; LAW.len()];
        for seed in 0..20 {
            let request = GenerateRequest {
                length: Some(CLOSED_FORM_LENGTH as u32),
                sampling: Some(Sampling {
                    num_samples: Some(25),
                    steps: Some(steps),
                    seed: Some(seed),
                    ..Sampling::default()
                }),
                ..Default::default()
            };
            for token in generate(&mut server.client(), request)
                .await
                .unwrap()
                .tokens()
                .concat()
            {
                counts[token as usize] += 1;
            }
        }
        let all = f64::from(counts.iter().sum::<u32>());
        assert_eq!(all, (20 * 25 * CLOSED_FORM_LENGTH) as f64);
        let statistic: f64 = counts
            .iter()
            .zip(LAW)
            .map(|(&count, p)| (f64::from(count) - all * p).powi(2) / (all * p))
            .sum();
        let limit = ChiSquared::new(4.0).unwrap().inverse_cdf(0.999);
        assert!(
            statistic < limit,
            "{steps} steps: {counts:?}, {statistic} above {limit}"
        );
    }
    server.stop().await;
}

/// A Python that can export; `TEST_PYTHON` names one that is not on the path.
fn python_with_torch() -> Option<String> {
    let python = std::env::var("TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let probe = Command::new(&python)
        .args(["-c", "import torch, onnx, onnxscript"])
        .output();
    probe
        .is_ok_and(|output| output.status.success())
        .then_some(python)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pytorch_example_writes_a_bundle_that_is_served() {
    let Some(python) = python_with_torch() else {
        skipped("no Python with torch, onnx and onnxscript (TEST_PYTHON): the export example was not run");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("stand-in/1");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("training/examples/export_pytorch.py");
    let output = Command::new(python).arg(script).arg(&directory).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    // Sizes other than those that it was exported with.
    let bundle = Bundle::open(&directory).unwrap();
    let mut network = OnnxNetwork::load(&bundle, &OnnxOptions::default()).unwrap();
    let positions = [1, 12, 20, 38];
    let batch = Batch {
        tokens: &[256; 39],
        length: 13,
        sigma: &[1.0; 3],
        positions: &positions,
    };
    let mut totals = BTreeMap::new();
    network
        .log_score(&batch, &mut |rows| {
            for (index, position) in positions.into_iter().enumerate() {
                let row = rows.row(index);
                assert_eq!(row.len(), 257);
                totals.insert(position, row.iter().map(|p| f64::from(*p).exp()).sum::<f64>());
            }
        })
        .unwrap();
    assert!(
        totals.values().all(|total| (total - 1.0).abs() < 1e-5),
        "{totals:?}"
    );

    let mut config = config();
    config.models.repository = Some(folder.path().to_owned().into());
    let server = TestServer::demo_with(&config).await;
    let request = GenerateRequest {
        model: Some(ModelReference {
            name: "stand-in".to_owned(),
            version: 0,
        }),
        length: Some(64),
        sampling: Some(Sampling {
            steps: Some(8),
            seed: Some(1),
            ..Sampling::default()
        }),
        ..Default::default()
    };
    let tokens = generate(&mut server.client(), request)
        .await
        .unwrap()
        .tokens()
        .concat();
    assert_eq!(tokens.len(), 64);
    assert!(tokens.iter().all(|token| *token < 256), "{tokens:?}");
    server.stop().await;
}
