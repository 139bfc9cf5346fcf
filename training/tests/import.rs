//! Checkpoints of the reference implementation, in every layout it writes, become bundles that say what
//! it says.

use std::fs;
use std::path::Path;
use std::process::Command;

use denoised::bundle::{Bundle, Manifest};
use denoised::diffusion::{Graph, GraphKind, Token, score_entropy, sigma_offset};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, ScoreNetwork};
use serde_json::json;
use training::export::{self, Storage, TrainedModel};
use training::import::{self, Checkpoint, Choice};

use crate::common::numbers::{fixture, numbers};

/// The checkpoint as a server would have it.
fn served(checkpoint: &Checkpoint) -> (Manifest, OnnxNetwork) {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("tiny/1");
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
    let manifest = export::bundle(&directory, model, Storage::F32).unwrap();
    let network = OnnxNetwork::load(&Bundle::open(&directory).unwrap(), &OnnxOptions::default()).unwrap();
    (manifest, network)
}

fn served_numbers_are_the_references(name: &str) {
    let folder = fixture(name);
    let checkpoint = import::read(&folder, Choice::Averaged).unwrap();
    let (manifest, mut network) = served(&checkpoint);
    let io = numbers(&folder.join("io.safetensors"));
    let (tokens, clean): (Vec<i64>, Vec<Token>) = (io["tokens"].ids(), io["x0"].ids());
    let [sigma, expected, entropies] =
        ["sigma", "log_score", "score_entropy"].map(|name| io[name].data.as_slice());
    let length = io["tokens"].shape[1];
    let positions: Vec<i64> = (0..tokens.len() as i64).collect();
    let batch = Batch {
        tokens: &tokens,
        length,
        sigma,
        positions: &positions,
    };
    let states = manifest.vocab_size;
    let graph = Graph::new(checkpoint.graph, states);
    let mut rows_seen = 0;
    network
        .log_score(&batch, &mut |rows| {
            for index in 0..tokens.len() {
                let (sigma, current) = (f64::from(sigma[index / length]), tokens[index] as usize);
                let offset = if manifest.sigma_offset {
                    sigma_offset(sigma, states)
                } else {
                    0.0
                };
                let mut row: Vec<f64> = rows.row(index).iter().map(|s| f64::from(*s) + offset).collect();
                row[current] = 0.0;
                let theirs = &expected[index * states..][..states];
                for (ours, &theirs) in row.iter().zip(theirs) {
                    assert!((ours - f64::from(theirs)).abs() < 2e-4, "{ours} is not {theirs}");
                }
                let entropy = score_entropy::denoising(&graph, &row, current as Token, clean[index], sigma);
                let theirs = f64::from(entropies[index]);
                assert!(
                    (entropy - theirs).abs() <= 1e-3 * theirs.abs() + 1e-6,
                    "score entropy {entropy} is not {theirs}"
                );
                rows_seen += 1;
            }
        })
        .unwrap();
    assert_eq!(rows_seen, tokens.len());
}

#[test]
fn a_published_absorbing_model_is_served_as_it_was() {
    served_numbers_are_the_references("sedd-tiny-absorb");
}

#[test]
fn a_published_uniform_model_is_served_as_it_was() {
    served_numbers_are_the_references("sedd-tiny-uniform");
}

/// What the authors' networks give, by a forward pass that shares nothing with ours.
#[test]
fn relatives_of_sedd_are_served_as_they_were() {
    for name in ["families/radd", "families/mdlm", "families/mdlm-conditioned"] {
        let folder = fixture(name);
        let checkpoint = import::read(&folder, Choice::Averaged).unwrap();
        assert_eq!(checkpoint.graph, GraphKind::Absorbing, "{name}");
        let (manifest, mut network) = served(&checkpoint);
        let io = numbers(&folder.join("io.safetensors"));
        let (tokens, sigma): (Vec<i64>, _) = (io["tokens"].ids(), &io["sigma"].data);
        let expected = &io["log_probability"].data;
        let (length, mask) = (tokens.len() / sigma.len(), manifest.vocab_size - 1);
        let positions: Vec<i64> = (0..tokens.len() as i64)
            .filter(|at| tokens[*at as usize] == mask as i64)
            .collect();
        let batch = Batch {
            tokens: &tokens,
            length,
            sigma,
            positions: &positions,
        };
        network
            .log_score(&batch, &mut |rows| {
                for (index, &position) in positions.iter().enumerate() {
                    let theirs = &expected[position as usize * mask..][..mask];
                    let row = rows.row(index);
                    for (ours, theirs) in row.iter().zip(theirs) {
                        assert!((ours - theirs).abs() < 1e-5, "{name}: {ours} is not {theirs}");
                    }
                }
            })
            .unwrap();
        assert!(positions.len() >= 12);
    }
}

#[test]
fn kinds_of_transformers_that_are_not_known_are_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), r#"{"model_type": "bert"}"#).unwrap();
    let error = import::read(folder.path(), Choice::Averaged)
        .unwrap_err()
        .to_string();
    assert!(error.contains("model_type is \"bert\""), "{error}");
}

/// A copy of a fixture that a test may damage.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        let raw = fs::read(fixture(name).join(file)).unwrap();
        fs::write(folder.path().join(file), raw).unwrap();
    }
    folder
}

fn edit(folder: &Path, from: &str, to: &str) {
    let path = folder.join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in the configuration");
    fs::write(path, text.replace(from, to)).unwrap();
}

fn refusal(folder: &Path) -> String {
    import::read(folder, Choice::Averaged).unwrap_err().to_string()
}

#[test]
fn every_tensor_that_does_not_fit_is_named() {
    let folder = copy("sedd-tiny-absorb");
    edit(folder.path(), "\"cond_dim\": 32", "\"cond_dim\": 16");
    let says = refusal(folder.path());
    assert!(says.contains("model.safetensors does not fit"), "{says}");
    assert!(
        says.contains("sigma_map.mlp.0.weight has shape [32, 256]") && says.contains("[16, 256]"),
        "{says}"
    );

    let folder = copy("sedd-tiny-absorb");
    edit(folder.path(), "\"n_blocks\": 2", "\"n_blocks\": 1");
    let says = refusal(folder.path());
    assert!(
        says.contains("blocks.1.attn_qkv.weight belongs to no parameter"),
        "{says}"
    );

    let folder = copy("sedd-tiny-absorb");
    edit(folder.path(), "\"n_blocks\": 2", "\"n_blocks\": 3");
    let says = refusal(folder.path());
    assert!(says.contains("blocks.2.attn_qkv.weight is missing"), "{says}");
}

#[test]
fn configurations_that_make_no_sense_are_named() {
    for (from, to, expected) in [
        ("\"n_heads\": 4", "\"n_heads\": 0", "network.heads"),
        ("\"n_heads\": 4", "\"n_heads\": 5", "no multiple"),
        ("\"tokens\": 61", "\"tokens\": \"many\"", "tokens"),
        ("\"absorb\"", "\"other\"", "other"),
        ("\"absorb\"", "\"uniform\"", "scale_by_sigma"),
        ("\"hidden_size\": 64,", "", "hidden_size"),
    ] {
        let folder = copy("sedd-tiny-absorb");
        edit(folder.path(), from, to);
        let says = refusal(folder.path());
        assert!(
            says.contains("config.json") && says.contains(expected),
            "{to}: {says}"
        );
    }
}

#[test]
fn files_that_are_no_checkpoint_are_named() {
    let empty = tempfile::tempdir().unwrap();
    assert!(refusal(empty.path()).contains("is no checkpoint"));

    let folder = copy("sedd-tiny-absorb");
    let weights = folder.path().join("model.safetensors");
    let raw = fs::read(&weights).unwrap();
    fs::write(&weights, &raw[..raw.len() / 2]).unwrap();
    assert!(refusal(folder.path()).contains("model.safetensors"));
    fs::remove_file(&weights).unwrap();
    assert!(refusal(folder.path()).contains("is no checkpoint"));
    fs::write(folder.path().join("pytorch_model.bin"), b"not a pickle").unwrap();
    assert!(refusal(folder.path()).contains("pytorch_model.bin"));
}

/// `tests/fixtures/torch` was written by `torch.save`: the same tiny network as a hub folder, and as a
/// training run whose averaged weights are its last ones plus a half.
#[test]
fn files_of_torch_are_read_in_both_layouts() {
    let root = fixture("torch");
    let hub = import::read(&root.join("hub"), Choice::Averaged).unwrap();
    let last = import::read(&root.join("run"), Choice::Last).unwrap();
    let averaged = import::read(&root.join("run"), Choice::Averaged).unwrap();
    assert_eq!(hub.graph, GraphKind::Absorbing);
    assert_eq!(hub.network, last.network);
    assert!(hub.weights == last.weights, "the weights differ");
    assert_eq!(averaged.weights.0.len(), last.weights.0.len());
    for (name, tensor) in &averaged.weights.0 {
        let last = last.weights.get(name).unwrap();
        assert_eq!(tensor.shape, last.shape, "{name}");
        for (averaged, last) in tensor.data.iter().zip(&last.data) {
            assert_eq!(*averaged, last + 0.5, "{name}");
        }
    }
}

#[test]
fn random_checkpoints_import_and_tell_tokens_apart() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("random");
    let random = || {
        Command::new(env!("CARGO_BIN_EXE_training"))
            .arg("random")
            .arg(&folder)
            .args(["--vocab-size", "20", "--length", "8", "--hidden-size", "16"])
            .args(["--cond-dim", "8", "--blocks", "1", "--heads", "2"])
            .output()
            .unwrap()
    };
    assert!(random().status.success());
    assert!(!random().status.success(), "nothing is written over");
    let (manifest, mut network) = served(&import::read(&folder, Choice::Averaged).unwrap());
    assert_eq!((manifest.vocab_size, manifest.max_length), (21, 8));
    let batch = Batch {
        tokens: &[20; 8],
        length: 8,
        sigma: &[0.7],
        positions: &[3],
    };
    network
        .log_score(&batch, &mut |rows| {
            let row = rows.row(0);
            assert!(row.iter().all(|score| score.is_finite()) && row[0] != row[1]);
        })
        .unwrap();
}
