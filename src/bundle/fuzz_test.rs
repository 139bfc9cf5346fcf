//! What a bundle's files may say, read as the files of strangers.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Cursor;

use super::external_data::{contents, tests::model_with_external_data};
use super::{Manifest, TextTokenizer, manifest_tests, tokenizer_tests};
use crate::mutants::{Target, fuzz};

#[test]
fn manifests() {
    let target = Target {
        name: "manifests",
        sound: vec![
            serde_json::to_vec(&manifest_tests::tiny()).unwrap(),
            include_bytes!("../../training/demo/world-english/1/manifest.json").to_vec(),
        ],
        words: &[
            b"\"uniform\"",
            b"\"geometric\"",
            b"\"sigma_min\":1e-4,\"sigma_max\":20,",
            b"\"mean\"",
            b"\"excluded_tokens\":[1,2],",
            b"\"frame\":{\"before\":[1],\"after\":[2]},",
            b"\"../model.onnx\"",
            b"[[[[",
            b"{\"",
        ],
    };
    fuzz!(target, |input: &[u8]| {
        let Ok(manifest) = Manifest::from_json(input) else {
            return;
        };
        // What is accepted can be served, and is the same when it is written.
        assert!(manifest.vocab_size >= 2 && manifest.max_length >= 1);
        assert!(
            manifest
                .mask_token
                .is_none_or(|mask| (mask as usize) < manifest.vocab_size)
        );
        assert!(manifest.sha256.keys().all(|file| !file.contains(['/', '\\'])));
        let process = manifest.process();
        for t in [0.0, 1e-3, 0.5, 1.0] {
            let sigma = process.schedule.total_noise(t);
            assert!(sigma.is_finite() && sigma >= 0.0, "{manifest:?}");
        }
        let written = serde_json::to_vec(&manifest).unwrap();
        assert_eq!(Manifest::from_json(&written).as_ref(), Ok(&manifest));
    });
}

#[test]
fn networks() {
    let target = Target {
        name: "networks",
        sound: vec![
            model_with_external_data("weights.bin"),
            include_bytes!("../../tests/fixtures/networks/float32.onnx").to_vec(),
            include_bytes!("../../tests/fixtures/networks/endless.onnx").to_vec(),
        ],
        words: &[
            b"location",
            b"../../etc/passwd",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\xff\xff\xff\xff\x0f",
            b"\x3a\x00",
            b"\x2a\x00",
        ],
    };
    fuzz!(target, |input: &[u8]| {
        if let Ok(contents) = contents(Cursor::new(input), input.len() as u64) {
            let named: usize = contents.files.iter().map(String::len).sum();
            assert!(named <= input.len(), "{contents:?}");
        }
    });
}

#[test]
fn tokenizers() {
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let words = tokenizer_tests::words(&tokenizer_tests::SEA);
    let mut bytes = words.clone();
    bytes["pre_tokenizer"] = byte_level.clone();
    bytes["decoder"] = byte_level;
    let mut pairs = words.clone();
    pairs["model"] = serde_json::json!({
        "type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "[UNK]": 3}, "merges": [["a", "b"]], "unk_token": "[UNK]",
    });
    let mut pieces = words.clone();
    pieces["model"] = serde_json::json!({
        "type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0], ["[UNK]", -9.0]], "unk_id": 2, "byte_fallback": false,
    });
    let target = Target {
        name: "tokenizers",
        sound: [words, bytes, pairs, pieces]
            .map(|file| serde_json::to_vec(&file).unwrap())
            .to_vec(),
        words: &[
            b"\"NFKC\"",
            b"{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"(a*)*b\"},\"content\":\"\"}",
            b"{\"type\":\"Sequence\",\"normalizers\":[]}",
            b"\"WordPiece\"",
            b"\"WordLevel\"",
            b"\"Unigram\"",
            b"\"BPE\"",
            b"[[\"\",0]]",
            b"[",
            b"{\"type\":",
        ],
    };
    let manifest = manifest_tests::tiny();
    fuzz!(target, |input: &[u8]| {
        let Ok(tokenizer) = TextTokenizer::from_json(input, &manifest) else {
            return;
        };
        for text in ["the sea was", "abab \u{1f30a}e\u{301} \0", ""] {
            if let Ok(tokens) = tokenizer.encode(text) {
                let known = tokens.iter().all(|token| (*token as usize) < manifest.vocab_size);
                assert!(known, "{tokens:?}");
                // Of either there may be none; but nothing ends the server.
                let _text = tokenizer.decode(&tokens);
            }
        }
        let all: Vec<u32> = (0..manifest.vocab_size as u32).collect();
        let _text = tokenizer.decode_after(&all[..3], &all);
    });
}
