//! Bundles that are almost right: whoever publishes one can have it refused, but not bring the server down.

use std::path::Path;

use denoised::bundle::{Bundle, Manifest, TextTokenizer, sha256};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::mutated::{corrupt, mutate, one_of};

const BERT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/masked-lm/bert/1");
const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/training/demo/world-english/1");

/// How many times as many bundles are tried as `make test` does.
fn times() -> u64 {
    let asked = std::env::var("DENOISED_HOSTILE_BUNDLES").ok();
    asked.and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// One thing about a JSON value made otherwise, at any depth.
fn mutate_json(value: &mut Value, random: &mut SmallRng) {
    let goes_deeper = random.random_ratio(4, 5);
    match value {
        Value::Object(map) if !map.is_empty() && goes_deeper => {
            let key = map.keys().nth(random.random_range(0..map.len())).unwrap().clone();
            match random.random_range(0..6) {
                0 => drop(map.remove(&key)),
                1 => {
                    let moved = map.remove(&key).unwrap();
                    map.insert(
                        one_of(&["", "..", "/etc/passwd", "model.onnx", "a\u{0}b"], random).to_owned(),
                        moved,
                    );
                }
                _ => mutate_json(&mut map[&key], random),
            }
        }
        Value::Array(list) if !list.is_empty() && goes_deeper => {
            let at = random.random_range(0..list.len());
            match random.random_range(0..6) {
                0 => drop(list.remove(at)),
                1 => {
                    let again = vec![list[at].clone(); one_of(&[1, 100], random)];
                    list.extend(again);
                }
                _ => mutate_json(&mut list[at], random),
            }
        }
        _ => {
            *value = match random.random_range(0..10) {
                0 => Value::Null,
                1 => json!(one_of(&[0, 1, 5, 1 << 31, i64::MAX, -1, i64::MIN], random)),
                2 => json!(u64::MAX),
                3 => json!(one_of(&[0.5, -0.5, 1e308, 1e-320], random)),
                4 => json!(true),
                5 => json!([]),
                6 => json!({}),
                7 => json!("x".repeat(1 << 16)),
                _ => json!(one_of(
                    &["", "../../etc/passwd", "\u{202e}", "[MASK]", "(a+)+$", "uniform"],
                    random
                )),
            }
        }
    }
}

fn mutated_json(text: &[u8], random: &mut SmallRng) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(text).unwrap();
    for _ in 0..random.random_range(1..3) {
        mutate_json(&mut value, random);
    }
    let mut written = serde_json::to_vec(&value).unwrap();
    if random.random_ratio(1, 10) {
        written = corrupt(&written, random);
    }
    written
}

/// Everything that the server does with a bundle before its network runs.
fn inspect(folder: &Path) -> Result<Bundle, String> {
    let bundle = Bundle::look_at(folder).map_err(|error| error.to_string())?;
    bundle.tokenizer().map_err(|error| error.to_string())?;
    bundle.model().map_err(|error| error.to_string())?;
    Ok(bundle)
}

#[test]
fn manifests_that_are_almost_right_are_refused_or_sound() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        Path::new(BERT).join("model.onnx"),
        folder.path().join("model.onnx"),
    )
    .unwrap();
    let right = std::fs::read(Path::new(BERT).join("manifest.json")).unwrap();
    let (mut sound, mut refused) = (0, 0);
    for seed in 0..3000 * times() {
        let mut random = SmallRng::seed_from_u64(seed);
        let manifest = mutated_json(&right, &mut random);
        std::fs::write(folder.path().join("manifest.json"), &manifest).unwrap();
        match inspect(folder.path()) {
            Ok(bundle) => {
                sound += 1;
                // What it says of the process is what is computed with.
                let manifest = bundle.manifest();
                let _total = manifest.schedule.total_noise(0.5);
                assert!(manifest.vocab_size > 0 && manifest.max_length > 0, "{seed}");
            }
            Err(error) => {
                assert!(!error.is_empty() && error.len() < 4096, "{seed}: {error}");
                refused += 1;
            }
        }
    }
    assert!(sound > 100 && refused > 1000, "{sound} {refused}");
}

#[test]
fn networks_that_are_almost_right_are_refused_or_run() {
    let folder = tempfile::tempdir().unwrap();
    let right = std::fs::read(Path::new(BERT).join("model.onnx")).unwrap();
    let manifest = std::fs::read(Path::new(BERT).join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    let (mut loaded, mut refused) = (0, 0);
    for seed in 0..400 * times() {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut network = right.clone();
        for _ in 0..random.random_range(1..3) {
            network = mutate(&network, &mut random);
        }
        let mut manifest = manifest.clone();
        manifest.sha256.insert("model.onnx".to_owned(), sha256(&network));
        std::fs::write(folder.path().join("model.onnx"), &network).unwrap();
        let written = serde_json::to_vec(&manifest).unwrap();
        std::fs::write(folder.path().join("manifest.json"), written).unwrap();
        let network = inspect(folder.path()).and_then(|bundle| {
            OnnxNetwork::load(&bundle, &OnnxOptions::default()).map_err(|e| e.to_string())
        });
        match network {
            Ok(_) => loaded += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(loaded > 20 && refused > 100, "{loaded} {refused}");
}

#[test]
fn tokenizers_that_are_almost_right_are_refused_or_cut_and_join() {
    let right = std::fs::read(Path::new(DEMO).join("tokenizer.json")).unwrap();
    let manifest = std::fs::read(Path::new(DEMO).join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    // With few words, so that changes hit what is not one, and quickly.
    let mut right: Value = serde_json::from_slice(&right).unwrap();
    let words = right["model"]["vocab"].as_object_mut().unwrap();
    words.retain(|_, id| id.as_u64().is_some_and(|id| id < 300));
    let words = words.clone();
    if let Some(merges) = right["model"]["merges"].as_array_mut() {
        let is_word = |part: &Value| part.as_str().is_some_and(|part| words.contains_key(part));
        merges.retain(|merge| match merge {
            Value::Array(parts) => {
                let joined: String = parts.iter().filter_map(Value::as_str).collect();
                parts.iter().all(is_word) && words.contains_key(&joined)
            }
            _ => false,
        });
    }
    let right = serde_json::to_vec(&right).unwrap();
    TextTokenizer::from_json(&right, &manifest).unwrap();
    let (mut sound, mut refused) = (0, 0);
    for seed in 0..1500 * times() {
        let mut random = SmallRng::seed_from_u64(seed);
        match TextTokenizer::from_json(&mutated_json(&right, &mut random), &manifest) {
            Ok(tokenizer) => {
                for text in ["In the beginning", "", "\u{1f600} \u{0301}", "a\n\n  b"] {
                    if let Ok(tokens) = tokenizer.encode(text) {
                        let _either = tokenizer.decode(&tokens).is_ok();
                    }
                }
                let _either = tokenizer.decode(&[0, 1, 299, 6654]).is_ok();
                sound += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert!(sound > 100 && refused > 100, "{sound} {refused}");
}
