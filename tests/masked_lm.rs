//! Masked language models that others trained: a mask anywhere, tokens that are never drawn, a frame around every canvas.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use denoised::bundle::{Bundle, Manifest};
use denoised::diffusion::{Graph, GraphKind, Parameterization, Token};
use denoised::network::Batch;
use denoised::network::adapted::Adapted;
use denoised::network::closed_form::ClosedForm;
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::proto::v1::sampling::Sampler;
use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::{
    GenerateRequest, GetModelRequest, InfillRequest, ModelReference, Sampling, TemplatePart, TokenList,
    TokenSet,
};
use denoised::server::sampler::ALL;
use serde::Deserialize;
use statrs::distribution::{ChiSquared, ContinuousCDF};
use tempfile::TempDir;

use crate::support::{
    CLOSED_FORM_LENGTH, TestServer, closed_form_manifest, config, gap, generate, infill, prompt, skipped,
};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/masked-lm");
const RXNMAPPER: &str = "rxnmapper==0.4.3";
/// One token of a reaction, as rxnmapper cuts it.
const TOKEN_OF_A_REACTION: &str = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])";
const REACTION: &str = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F";

/// A canvas, and what PyTorch makes of it, position by position.
#[derive(Deserialize)]
struct Expected {
    tokens: Vec<Token>,
    logits: Vec<Vec<f32>>,
}

/// The rows of all positions of a canvas, as the server gets them; of the second of two in a batch.
fn rows(bundle: &Bundle, tokens: &[Token]) -> Vec<Vec<f32>> {
    let network = OnnxNetwork::load(bundle, &OnnxOptions::default()).unwrap();
    let mut network = Adapted::boxed(network, bundle.manifest());
    let ids: Vec<i64> = tokens.iter().map(|token| i64::from(*token)).collect();
    let positions: Vec<i64> = (ids.len() as i64..2 * ids.len() as i64).collect();
    let batch = Batch {
        tokens: &[vec![ids[0]; ids.len()], ids.clone()].concat(),
        length: ids.len(),
        sigma: &[1.0; 2],
        positions: &positions,
    };
    let mut all = Vec::new();
    let read = &mut |rows: denoised::network::ScoreRows<'_>| {
        all = (0..ids.len()).map(|index| rows.row(index).to_vec()).collect();
    };
    network.log_score(&batch, read).unwrap();
    all
}

/// Logits within 1e-4 of PyTorch's, but for tokens that are never drawn; returns how many masked positions have the
/// same likeliest token.
fn compare(bundle: &Bundle, expected: &Expected) -> usize {
    let Manifest {
        excluded_tokens,
        mask_token,
        ..
    } = bundle.manifest();
    let mask = mask_token.unwrap();
    let best = |row: &[f32]| {
        let drawn =
            (0..row.len() as Token).filter(|token| *token != mask && !excluded_tokens.contains(token));
        drawn.max_by(|a, b| row[*a as usize].total_cmp(&row[*b as usize]))
    };
    let mut masked = 0;
    for ((ours, theirs), &token) in rows(bundle, &expected.tokens)
        .iter()
        .zip(&expected.logits)
        .zip(&expected.tokens)
    {
        for (id, (a, b)) in ours.iter().zip(theirs).enumerate() {
            if excluded_tokens.contains(&(id as Token)) {
                assert_eq!(*a, f32::NEG_INFINITY, "{id}");
            } else {
                assert!((a - b).abs() < 1e-4, "{id}: {a}, PyTorch has {b}");
            }
        }
        assert_eq!(best(ours), best(theirs));
        masked += usize::from(token == mask);
    }
    masked
}

#[test]
fn families_with_their_mask_in_mid_vocabulary_have_pytorchs_logits() {
    for family in ["bert", "modernbert"] {
        let bundle = Bundle::open(&Path::new(FIXTURE).join(family).join("1")).unwrap();
        assert_eq!(bundle.manifest().mask_token, Some(10));
        let expected = std::fs::read(Path::new(FIXTURE).join(family).with_extension("json")).unwrap();
        assert_eq!(compare(&bundle, &serde_json::from_slice(&expected).unwrap()), 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bert_is_served_with_every_sampler() {
    let mut config = config();
    config.models.repository = Some(std::path::PathBuf::from(FIXTURE).into());
    config.models.default = Some("bert".into());
    let server = TestServer::demo_with(&config).await;
    let asked = GetModelRequest { model: None };
    let told = server
        .models()
        .get_model(asked)
        .await
        .unwrap()
        .into_inner()
        .model
        .unwrap();
    assert_eq!(
        (told.mask_token, told.excluded_tokens),
        (Some(10), vec![0, 4, 6, 8])
    );
    for (name, sampler) in ALL {
        let request = GenerateRequest {
            sampling: Some(Sampling {
                sampler: Some(sampler),
                steps: (name != "first_hitting").then_some(5),
                num_samples: Some(40),
                seed: Some(5),
                ..Sampling::default()
            }),
            ..GenerateRequest::default()
        };
        let answer = generate(&mut server.client(), request).await.unwrap();
        for tokens in answer.tokens() {
            assert_eq!(tokens.len(), 12, "the frame is no part of it");
            let never = tokens.iter().find(|token| [0, 4, 6, 8, 10].contains(*token));
            assert_eq!(never, None, "{name}: {tokens:?}");
        }
    }
    // What is never drawn can stand there, but not be asked for; the mask can do neither.
    let part = |part| TemplatePart { part: Some(part) };
    let with = |ids: &[u32], set: Option<&[u32]>| InfillRequest {
        template: vec![
            part(Part::Tokens(TokenList { ids: ids.to_vec() })),
            part(match set {
                Some(_) => denoised::client::gap_of(2, "set"),
                None => gap(2),
            }),
        ],
        token_sets: set
            .map(|ids| TokenSet {
                name: "set".into(),
                ids: ids.to_vec(),
                texts: Vec::new(),
            })
            .into_iter()
            .collect(),
        ..InfillRequest::default()
    };
    assert!(infill(&mut server.client(), with(&[6, 23], None)).await.is_ok());
    assert!(
        infill(&mut server.client(), with(&[6], Some(&[4, 5])))
            .await
            .is_ok()
    );
    for (request, field) in [
        (with(&[1, 10], None), "template[0].tokens.ids[1]"),
        (with(&[24], None), "template[0].tokens.ids[0]"),
        (with(&[1], Some(&[10])), "token_sets[0].ids[0]"),
        (with(&[1], Some(&[0, 4])), "token_sets[0]"),
    ] {
        let status = infill(&mut server.client(), request).await.unwrap_err();
        assert!(status.message().starts_with(field), "{}", status.message());
    }
    server.stop().await;
}

/// Null: tokens have the law of the network without those that are never drawn. Chi-square at significance 1e-3,
/// seeds fixed.
#[tokio::test(flavor = "multi_thread")]
async fn the_law_is_that_of_the_tokens_that_may_be_drawn() {
    const LAW: [f64; 6] = [0.2, 0.3, 0.0, 0.1, 0.25, 0.15];
    const EXCLUDED: Token = 4;
    for parameterization in [Parameterization::Score, Parameterization::Mean] {
        let graph = Graph::new(GraphKind::Absorbing, LAW.len()).with_mask(2);
        let manifest = Manifest {
            vocab_size: LAW.len(),
            mask_token: Some(2),
            excluded_tokens: vec![EXCLUDED],
            parameterization,
            ..closed_form_manifest()
        };
        let adapted = manifest.clone();
        let network = Box::new(move || Ok(Adapted::boxed(ClosedForm::independent(graph, &LAW), &adapted)));
        let server = TestServer::with_manifest(&config(), manifest, network).await;
        let tweedie = denoised::proto::v1::Tweedie { normalize: true };
        let request = GenerateRequest {
            length: Some(CLOSED_FORM_LENGTH as u32),
            sampling: Some(Sampling {
                sampler: Some(Sampler::Tweedie(tweedie)),
                num_samples: Some(60),
                steps: Some(4),
                seed: Some(11),
                ..Sampling::default()
            }),
            ..GenerateRequest::default()
        };
        let mut counts = [0.0; LAW.len()];
        for token in generate(&mut server.client(), request)
            .await
            .unwrap()
            .tokens()
            .concat()
        {
            counts[token as usize] += 1.0;
        }
        assert_eq!((counts[2], counts[EXCLUDED as usize]), (0.0, 0.0));
        let all: f64 = counts.iter().sum();
        let statistic: f64 = [0, 1, 3, 5]
            .map(|token| {
                let expected = all * LAW[token] / (1.0 - LAW[EXCLUDED as usize]);
                (counts[token] - expected).powi(2) / expected
            })
            .iter()
            .sum();
        let limit = ChiSquared::new(3.0).unwrap().inverse_cdf(0.999);
        assert!(
            statistic < limit,
            "{parameterization:?}: {counts:?}, {statistic} above {limit}"
        );
        server.stop().await;
    }
}

/// A Python that can export, and the folder of rxnmapper's network; `None`, said loudly, where either is missing.
fn rxnmapper(folder: &TempDir) -> Option<(String, PathBuf)> {
    let python = std::env::var("TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let run = |arguments: &[&str]| {
        let output = Command::new(&python)
            .args(arguments)
            .current_dir(folder.path())
            .output();
        output.is_ok_and(|output| output.status.success())
    };
    if !run(&["-c", "import torch, transformers, onnx, onnxscript, tokenizers"]) {
        skipped(
            "no Python with torch, transformers, onnx, onnxscript and tokenizers (TEST_PYTHON): no published \
             masked language model was exported",
        );
        return None;
    }
    let fetched = run(&[
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        "wheel",
        RXNMAPPER,
    ]) && run(&[
        "-c",
        "import glob, zipfile; zipfile.ZipFile(*glob.glob('wheel/*.whl')).extractall('.')",
    ]);
    if !fetched {
        skipped(format_args!(
            "{RXNMAPPER} could not be fetched: no published masked language model was exported"
        ));
        return None;
    }
    let model = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k";
    Some((python, folder.path().join(model)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_masked_language_model_is_exported_and_served() {
    let folder = tempfile::tempdir().unwrap();
    let Some((python, model)) = rxnmapper(&folder) else {
        return;
    };
    let repository = folder.path().join("models");
    let directory = repository.join("rxnmapper/1");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("training/examples/export_masked_lm.py");
    let output = Command::new(&python)
        .arg(script)
        .args([&model, &directory])
        .args(["--split", TOKEN_OF_A_REACTION])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let bundle = Bundle::open(&directory).unwrap();
    let manifest = bundle.manifest();
    assert_eq!(
        (manifest.vocab_size, manifest.mask_token, manifest.max_length),
        (591, Some(14), 510)
    );

    // Every second token masked.
    let tokenizer = bundle.tokenizer().unwrap().unwrap();
    let mut tokens = tokenizer.encode(REACTION).unwrap();
    assert_eq!(tokenizer.decode(&tokens).unwrap(), REACTION);
    tokens.iter_mut().step_by(2).for_each(|token| *token = 14);
    let ids: Vec<String> = tokens.iter().map(ToString::to_string).collect();
    let mut reference = Command::new(&python)
        .args([&Path::new(FIXTURE).join("write.py"), &model])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    writeln!(reference.stdin.take().unwrap(), "{}", ids.join(" ")).unwrap();
    let output = reference.wait_with_output().unwrap();
    let expected: Expected = serde_json::from_slice(&output.stdout).unwrap();
    assert!(compare(&bundle, &expected) >= 20);

    let mut config = config();
    config.models.repository = Some(repository.into());
    let server = TestServer::demo_with(&config).await;
    let request = GenerateRequest {
        model: Some(ModelReference {
            name: "rxnmapper".to_owned(),
            version: 0,
        }),
        prompt_as: Some(prompt("CC(C)S.Fc1cccnc1F>>")),
        length: Some(30),
        ..GenerateRequest::default()
    };
    let answer = generate(&mut server.client(), request).await.unwrap();
    let text = answer.results[0].text.clone().unwrap();
    assert!(
        text.starts_with("CC(C)S.Fc1cccnc1F>>") && text.len() > 20,
        "{text}"
    );
    server.stop().await;
}
