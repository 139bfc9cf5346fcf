//! `training evaluate`, on the demo model's bundle, and the server's bound beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use denoised::bundle::Bundle;
use denoised::diffusion::likelihood::{Likelihood, ScoredText};
use denoised::diffusion::sampler::row::Scratch;
use denoised::diffusion::{Draws, Token};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, ScoreNetwork};
use serde_json::{Value, json};
use training::evaluate::bound::{Estimate, Served};
use training::export::{self, Storage, TrainedModel};
use training::import::{self, Choice};

fn evaluate(arguments: &[&str]) -> Output {
    let bundle = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo/world-english/1");
    Command::new(env!("CARGO_BIN_EXE_training"))
        .args(["evaluate", "--bundle"])
        .arg(bundle)
        .args(arguments)
        .output()
        .unwrap()
}

fn object(output: &Output) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn samples_are_drawn_and_measured_beside_text() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    fs::write(
        &text,
        "In the beginning God created the heavens and the earth. ".repeat(30),
    )
    .unwrap();
    let text = text.to_str().unwrap();
    let said = object(&evaluate(&[
        "--samples",
        "2",
        "--steps",
        "2",
        "--text",
        text,
        "--json",
    ]));
    assert_eq!((&said["steps"], &said["seed"]), (&json!(2), &json!(1)));
    assert_eq!(said["samples"]["sequences"], 2);
    // One sentence over and over has less variety than two steps' guesses.
    let entropy = |of: &str| said[of]["token_entropy_nats"]["mean"].as_f64().unwrap();
    assert!(entropy("held_out") < entropy("samples"), "{said}");
}

#[test]
fn several_temperatures_give_a_line_each() {
    let said = object(&evaluate(&[
        "--samples",
        "2",
        "--steps",
        "8",
        "--temperature",
        "0,1,1.5",
        "--json",
    ]));
    let frontier = said["frontier"].as_array().unwrap();
    let temperatures: Vec<f64> = frontier
        .iter()
        .map(|of| of["temperature"].as_f64().unwrap())
        .collect();
    assert_eq!(temperatures, [0.0, 1.0, 1.5]);
    let entropy = |of: &Value| of["samples"]["token_entropy_nats"]["mean"].as_f64().unwrap();
    assert!(
        frontier.is_sorted_by(|cold, warm| entropy(cold) < entropy(warm)),
        "{said}"
    );
}

#[test]
fn what_a_server_wrote_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("written.jsonl");
    let result = |first: u32, nfe: u32| {
        let tokens: Vec<u32> = (first..first + 128).collect();
        json!({"result": {"canvas": 0, "tokens": tokens, "nfe": nfe}}).to_string()
    };
    let lines = [
        json!({"accepted": {"seed": 1}}).to_string(),
        result(300, 4),
        json!({"frame": {"step": 1}}).to_string(),
        result(600, 7),
    ];
    fs::write(&file, lines.join("\n")).unwrap();
    let path = file.to_str().unwrap();
    let said = object(&evaluate(&["--written", path, "--json"]));
    assert_eq!((&said["nfe"], &said["held_out"]), (&json!(5.5), &Value::Null));
    assert_eq!(said["samples"]["sequences"], 2);
    // 128 tokens, each once.
    let entropy = said["samples"]["token_entropy_nats"]["mean"].as_f64().unwrap();
    assert!((entropy - 128.0_f64.ln()).abs() < 1e-6, "{said}");

    fs::write(&file, "{\"accepted\": {}}\nno JSON").unwrap();
    let output = evaluate(&["--written", path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("line 2"), "{said}");
}

/// A checkpoint of the reference as a bundle.
fn imported(root: &Path, name: &str) -> Bundle {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name);
    let checkpoint = import::read(&folder, Choice::Averaged).unwrap();
    let directory = root.join("tiny/1");
    let model = TrainedModel {
        name: "tiny",
        config: &checkpoint.network,
        weights: &checkpoint.weights,
        graph: checkpoint.graph,
        schedule: checkpoint.schedule,
        tokenizer: None,
        end_of_document: None,
        provenance: json!({}),
    };
    export::bundle(&directory, model, Storage::F32).unwrap();
    Bundle::open(&directory).unwrap()
}

/// The server's bound, whose noise is drawn otherwise, is the one of `training evaluate`: within four standard errors of
/// both together, of noise alone, and a thousandth for what the noise leaves as it is at time 1.
#[test]
fn the_server_scores_by_the_same_bound() {
    let demo = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo");
    let root = tempfile::tempdir().unwrap();
    for bundle in [
        Bundle::open(&demo.join("world-english/1")).unwrap(),
        imported(&root.path().join("absorb"), "sedd-tiny-absorb"),
        imported(&root.path().join("uniform"), "sedd-tiny-uniform"),
    ] {
        let manifest = bundle.manifest();
        let (length, tokens) = (manifest.max_length, manifest.vocab_size as u32 - 1);
        let sequences: Vec<Vec<Token>> = match bundle.tokenizer().unwrap() {
            Some(tokenizer) => {
                let text = fs::read_to_string(demo.join("README.md")).unwrap();
                let tokens = tokenizer.encode(&text).unwrap();
                tokens.chunks_exact(length).take(2).map(<[_]>::to_vec).collect()
            }
            None => (0..8)
                .map(|sequence| {
                    (0..length as u32)
                        .map(|i| (sequence * 7 + i * i) % tokens)
                        .collect()
                })
                .collect(),
        };
        let estimate = |seed| {
            let estimate = Estimate {
                objective: Served::objective(manifest),
                draws: 16,
                seed,
                threads: 2,
                end_of_document: None,
            };
            let bound = estimate.bound(&|| Served::load(&bundle), &sequences);
            bound.unwrap().nats_per_token
        };
        let estimates: Vec<f64> = (0..8).map(estimate).collect();
        let mean = estimates.iter().sum::<f64>() / 8.0;
        let squares: f64 = estimates.iter().map(|bound| (bound - mean).powi(2)).sum();
        let error = (squares / 7.0 / 8.0).sqrt();

        let (scored, own_error) = scored(&bundle, &sequences);
        let (difference, errors) = ((scored - mean).abs(), error.hypot(own_error));
        assert!(
            difference <= 4.0 * errors + 1e-3 * mean && errors < 0.05 * mean,
            "{}: {scored} ± {own_error}, {mean} ± {error}",
            manifest.name
        );
    }
}

/// Nats per token of `sequences` as the server scores them, and their standard error.
fn scored(bundle: &Bundle, sequences: &[Vec<Token>]) -> (f64, f64) {
    let manifest = bundle.manifest();
    let mut network = OnnxNetwork::load(bundle, &OnnxOptions::default()).unwrap();
    let (mut nats, mut variance, mut scratch) = (0.0, 0.0, Scratch::default());
    for (sequence, tokens) in sequences.iter().enumerate() {
        let text = ScoredText {
            process: manifest.process(),
            parameterization: manifest.parameterization,
            likelihood: Likelihood::Bound { draws: 128 },
            tokens: tokens.clone(),
            context: vec![false; tokens.len()],
            draws: Draws::new(2, sequence as u64),
        };
        let mut sums = Vec::new();
        for index in 0..text.evaluations() {
            let question = text.question(index);
            let (canvas, evaluation) = (&question.canvas, &question.evaluation);
            let offset = manifest.parameterization.log_score_offset(
                manifest.sigma_offset,
                evaluation.sigma,
                manifest.vocab_size,
            );
            let ids: Vec<i64> = canvas.iter().map(|&token| i64::from(token)).collect();
            let positions: Vec<i64> = evaluation.positions.iter().map(|&i| i as i64).collect();
            let batch = Batch {
                tokens: &ids,
                length: ids.len(),
                sigma: &[evaluation.sigma as f32],
                positions: &positions,
            };
            let mut sum = 0.0;
            // Nothing is asked of draws without weight.
            if !positions.is_empty() {
                network
                    .log_score(&batch, &mut |rows| {
                        for (row, &position) in evaluation.positions.iter().enumerate() {
                            let row = rows.row(row);
                            let read = text.read(&question, position, &row, offset, &mut scratch);
                            sum -= read.unwrap().log_probability;
                        }
                    })
                    .unwrap();
            }
            sums.push(sum);
        }
        let estimate = text.bound(&sums);
        nats += estimate.nats;
        variance += estimate.standard_error.powi(2);
    }
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    (nats / tokens as f64, variance.sqrt() / tokens as f64)
}
