//! The exported network says what the trained one says.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use burn::Tensor;
use burn::tensor::TensorData;
use clap::ValueEnum;
use denoised::bundle::{Bundle, Defaults};
use denoised::diffusion::Parameterization;
use denoised::diffusion::{GraphKind, Schedule, Token, sigma_offset};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, ScoreNetwork};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;
use training::data::tokenizer;
use training::export::{self, ExportError, Options, Storage, TrainedModel};
use training::import::{self, Checkpoint, Choice};
use training::model::state_dict::StateDict;
use training::model::{Ddit, NetworkConfig, inference_device, token_tensor};

use crate::common::numbers::{fixture, numbers};
use crate::common::skipped;

const LOG_LINEAR: Schedule = Schedule::LogLinear { eps: 1e-3 };

fn model<'a>(config: &'a NetworkConfig, weights: &'a StateDict, graph: GraphKind) -> TrainedModel<'a> {
    TrainedModel {
        name: "tiny",
        config,
        weights,
        graph,
        schedule: LOG_LINEAR,
        tokenizer: None,
        end_of_document: None,
        provenance: json!({"steps": 1}),
    }
}

/// The network as a server would have it.
fn exported(config: &NetworkConfig, weights: &StateDict, graph: GraphKind, storage: Storage) -> OnnxNetwork {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("tiny/1");
    export::bundle(&directory, model(config, weights, graph), storage).unwrap();
    OnnxNetwork::load(&Bundle::open(&directory).unwrap(), &OnnxOptions::default()).unwrap()
}

/// Log-scores of `positions`, `[rows, states]`.
fn evaluate(network: &mut OnnxNetwork, batch: &Batch<'_>) -> Vec<f32> {
    let mut log_scores = Vec::new();
    let rows = batch.positions.len();
    let mut read = |scores: denoised::network::ScoreRows<'_>| {
        log_scores = (0..rows).flat_map(|row| scores.row(row).to_vec()).collect();
    };
    network.log_score(batch, &mut read).unwrap();
    log_scores
}

fn largest_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    // A NaN must not get lost in a maximum.
    assert!(ours.iter().chain(theirs).all(|x| x.is_finite()));
    ours.iter()
        .zip(theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

fn below(generator: &mut ChaCha8Rng, bound: usize) -> usize {
    generator.next_u32() as usize % bound
}

fn uniform(generator: &mut ChaCha8Rng) -> f32 {
    generator.next_u32() as f32 / u32::MAX as f32
}

/// A shape of the given width and weights of a size at which every parameter shows in the output.
fn random_network(seed: u64) -> (NetworkConfig, StateDict) {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let heads = 1 + below(&mut generator, 4);
    let config = NetworkConfig {
        states: 2 + below(&mut generator, 70),
        length: 16 + below(&mut generator, 20),
        hidden_size: 2 * heads * (1 + below(&mut generator, 12)),
        cond_dim: 1 + below(&mut generator, 40),
        blocks: 1 + below(&mut generator, 3),
        heads,
        dropout: 0.1,
        scale_by_sigma: false,
        parameterization: if seed.is_multiple_of(2) {
            Parameterization::Score
        } else {
            Parameterization::Mean
        },
        time_conditioned: seed % 4 < 2,
        tie_embeddings: seed % 8 >= 4,
    };
    let mut weights = StateDict::default();
    for (name, shape) in config.parameters() {
        let (center, bound) = match shape[..] {
            _ if name.contains("norm") => (1.0, 0.5),
            [_, inputs] if !name.contains("embedding") => (0.0, 1.5 / (inputs as f32).sqrt()),
            _ => (0.0, 0.5),
        };
        let data = (0..shape.iter().product())
            .map(|_| center + bound * (2.0 * uniform(&mut generator) - 1.0))
            .collect();
        weights.insert(name, shape, data);
    }
    (config, weights)
}

/// What is read back is exported to the same bytes, whatever was folded or rounded on the way.
#[test]
fn a_bundle_gives_its_weights_back() {
    let root = tempfile::tempdir().unwrap();
    for seed in 0..8 {
        let (config, weights) = random_network(seed);
        for (storage, external_above) in [
            (Storage::F32, 0),
            (Storage::F32, 1 << 30),
            (Storage::F16, 1 << 30),
        ] {
            let export = |to: &str, config: &NetworkConfig, weights: &StateDict| {
                let directory = root
                    .path()
                    .join(format!("{seed}-{storage}-{external_above}-{to}/1"));
                let options = Options {
                    storage,
                    external_above,
                    ..Options::default()
                };
                let model = model(config, weights, GraphKind::Absorbing);
                export::bundle_with(&directory, model, &options).unwrap();
                directory
            };
            let first = export("first", &config, &weights);
            let back = export::weights::read(&first, config.cond_dim).unwrap();
            let same_shape = NetworkConfig {
                dropout: 0.0,
                ..config
            };
            assert_eq!(back.network, same_shape);
            if config.time_conditioned && storage == Storage::F32 {
                assert_eq!(back.weights, weights);
            }
            let second = export("second", &back.network, &back.weights);
            let bytes = |directory: &Path| fs::read(directory.join("model.onnx")).unwrap();
            assert!(bytes(&first) == bytes(&second), "{config:?}, {storage}");
        }
    }
    let (config, weights) = random_network(8);
    let whole = root.path().join("whole/1");
    export::bundle(
        &whole,
        model(&config, &weights, GraphKind::Absorbing),
        Storage::Int8,
    )
    .unwrap();
    let refused = export::weights::read(&whole, config.cond_dim);
    assert!(matches!(refused, Err(export::weights::ExportedError::Int8)));
}

/// Logits to log-probabilities, the last state, the mask, left out and marked by 0.
fn log_softmax_without_last(row: &mut [f32]) {
    let tokens = row.len() - 1;
    let total: f64 = row[..tokens].iter().map(|&logit| f64::from(logit).exp()).sum();
    row.iter_mut().for_each(|logit| *logit -= total.ln() as f32);
    row[tokens] = 0.0;
}

/// Largest difference between network and export over batches of several shapes.
fn largest_difference_of_export(seed: u64, storage: Storage) -> f32 {
    let (config, weights) = random_network(seed);
    let device = inference_device();
    let network = Ddit::from_weights(&config, weights.clone(), &device).unwrap();
    let mut exported = exported(&config, &weights, GraphKind::Absorbing, storage);
    let generator = &mut ChaCha8Rng::seed_from_u64(seed + 1000);
    let mut largest = 0.0_f32;
    for (count, length) in [(1, 1), (1, config.length), (3, 7), (5, config.length - 1)] {
        let tokens: Vec<Token> = (0..count * length)
            .map(|_| below(generator, config.states) as Token)
            .collect();
        let sigma: Vec<f32> = (0..count).map(|_| 7.0 * uniform(generator)).collect();
        let noise = Tensor::from_data(TensorData::new(sigma.clone(), [count]), &device);
        let whole = network.forward(token_tensor(&tokens, length, &device), noise);
        let mut whole: Vec<f32> = whole.into_data().iter().collect();
        if config.parameterization == Parameterization::Mean {
            whole
                .chunks_exact_mut(config.states)
                .for_each(log_softmax_without_last);
        }

        let every: Vec<i64> = (0..(count * length) as i64).collect();
        let some: Vec<i64> = every
            .iter()
            .copied()
            .filter(|_| below(generator, 3) == 0)
            .collect();
        let last = vec![(count * length) as i64 - 1];
        for positions in [every, some, last] {
            let tokens: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
            let batch = Batch {
                tokens: &tokens,
                length,
                sigma: &sigma,
                positions: &positions,
            };
            let mut ours = evaluate(&mut exported, &batch);
            if config.parameterization == Parameterization::Mean {
                for row in ours.chunks_exact_mut(config.states) {
                    let mask = std::mem::take(&mut row[config.states - 1]);
                    assert_eq!(mask.exp(), 0.0, "the mask is no clean token");
                }
            }
            let rows = positions.iter().map(|&at| at as usize * config.states);
            let expected: Vec<f32> = rows
                .flat_map(|at| whole[at..at + config.states].to_vec())
                .collect();
            largest = largest.max(largest_difference(&ours, &expected));
        }
    }
    largest
}

#[test]
fn any_shape_says_what_the_network_says() {
    for seed in 0..12 {
        let difference = largest_difference_of_export(seed, Storage::F32);
        assert!(difference < 1e-4, "seed {seed}: off by {difference}");
    }
}

#[test]
fn half_precision_matrices_stay_close() {
    for seed in 0..12 {
        let difference = largest_difference_of_export(seed, Storage::F16);
        assert!(difference < 1e-2, "seed {seed}: off by {difference}");
    }
}

#[test]
fn eight_bits_stay_close() {
    let mut differences: Vec<f32> = (0..12)
        .map(|seed| largest_difference_of_export(seed, Storage::Int8))
        .collect();
    differences.sort_by(f32::total_cmp);
    // Largest of all log-scores; some of these networks amplify what goes in.
    assert!(differences[6] < 0.08 && differences[11] < 0.3, "{differences:?}");
}

/// A sequence's scores do not depend on what else is in the batch, although steps follow the data.
#[test]
fn eight_bits_of_one_canvas_do_not_depend_on_the_others() {
    let (config, weights) = random_network(2);
    let mut network = exported(&config, &weights, GraphKind::Absorbing, Storage::Int8);
    let generator = &mut ChaCha8Rng::seed_from_u64(9);
    let length = config.length;
    let tokens: Vec<i64> = (0..3 * length)
        .map(|_| below(generator, config.states) as i64)
        .collect();
    let sigma = [0.1, 3.0, 6.0];
    let mut scores = |from: usize, to: usize| {
        let positions: Vec<i64> = (0..((to - from) * length) as i64).collect();
        let batch = Batch {
            tokens: &tokens[from * length..to * length],
            length,
            sigma: &sigma[from..to],
            positions: &positions,
        };
        evaluate(&mut network, &batch)
    };
    let together = scores(0, 3);
    let alone = [scores(0, 1), scores(1, 2), scores(2, 3)].concat();
    let difference = largest_difference(&together, &alone);
    assert!(difference < 1e-5, "off by {difference}");
}

/// Weights beside the graph are the same weights.
#[test]
fn external_data_says_what_the_whole_file_says() {
    let config = NetworkConfig { length: 24, ..wide() };
    let weights = config.initial_weights(1, 0.3);
    let root = tempfile::tempdir().unwrap();
    let tokens: Vec<i64> = (0..24).map(|i| i * 17 % 499).collect();
    let batch = Batch {
        tokens: &tokens,
        length: 24,
        sigma: &[0.7],
        positions: &(0..24).collect::<Vec<_>>(),
    };
    for storage in [Storage::F32, Storage::F16, Storage::Int8] {
        let scores = |above: u64| {
            let directory = root.path().join(format!("{storage}-{above}"));
            let options = Options {
                storage,
                external_above: above,
                ..Options::default()
            };
            export::bundle_with(
                &directory,
                model(&config, &weights, GraphKind::Absorbing),
                &options,
            )
            .unwrap();
            let bundle = Bundle::open(&directory).unwrap();
            let files: Vec<_> = bundle.manifest().sha256.keys().cloned().collect();
            let size = fs::metadata(directory.join(denoised::bundle::MODEL))
                .unwrap()
                .len();
            let mut network = OnnxNetwork::load(&bundle, &OnnxOptions::default()).unwrap();
            (files, size, evaluate(&mut network, &batch))
        };
        let (files, whole_size, whole) = scores(u64::MAX);
        assert_eq!(files, ["model.onnx"]);
        let (files, graph_size, beside) = scores(0);
        assert_eq!(files, ["model.onnx", "model.onnx.data"]);
        assert_eq!(whole, beside, "{storage}");
        assert!(
            graph_size < whole_size / 4,
            "{graph_size} bytes beside {whole_size}"
        );
    }
}

#[test]
fn a_manifest_says_what_its_storage_costs() {
    let (config, weights) = random_network(4);
    let root = tempfile::tempdir().unwrap();
    let text: Vec<Vec<Token>> = vec![vec![1; config.length]; 4];
    let export = |storage, text| {
        let options = Options {
            storage,
            text,
            ..Options::default()
        };
        let directory = root.path().join(storage.to_string());
        let model = model(&config, &weights, GraphKind::Absorbing);
        export::bundle_with(&directory, model, &options).unwrap();
        let bundle = Bundle::open(&directory).unwrap();
        bundle.manifest().provenance["export"].clone()
    };
    assert_eq!(export(Storage::F32, &[]), json!({"storage": "f32"}));
    let half = export(Storage::F16, &text);
    let eight_bits = export(Storage::Int8, &[]);
    for (name, export, source, most) in [
        ("f16", half, "held_out_text", 1e-2),
        ("int8", eight_bits, "random_tokens", 0.2),
    ] {
        assert_eq!(export["storage"], name);
        let difference = &export["difference_from_f32"];
        assert_eq!(difference["sequences"], source);
        let of = |key: &str| difference[key].as_f64().unwrap();
        assert!(
            of("largest") > 0.0 && of("largest") < most,
            "{name}: {difference}"
        );
        assert!(of("mean") < of("largest") / 2.0, "{name}: {difference}");
        assert!(
            of("total_variation") > 0.0 && of("total_variation") < most / 10.0,
            "{difference}"
        );
    }
    // Nothing is left of the networks that were only compared with.
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3);
}

/// A network that is wide enough for its matrices to outweigh the rest.
fn wide() -> NetworkConfig {
    NetworkConfig {
        states: 500,
        length: 16,
        hidden_size: 128,
        cond_dim: 32,
        blocks: 2,
        heads: 4,
        dropout: 0.0,
        scale_by_sigma: true,
        parameterization: Parameterization::Score,
        time_conditioned: true,
        tie_embeddings: false,
    }
}

#[test]
fn half_precision_takes_about_half_the_space() {
    let config = wide();
    let weights = config.initial_weights(1, 0.0);
    let bytes = |storage| export::onnx_model(&config, &weights, storage).unwrap().len() as f64;
    let ratio = bytes(Storage::F16) / bytes(Storage::F32);
    assert!((0.5..0.53).contains(&ratio), "{ratio}");
}

#[test]
fn the_same_weights_give_the_same_file() {
    let (config, weights) = random_network(3);
    let model = || export::onnx_model(&config, &weights, Storage::F16).unwrap();
    assert_eq!(model(), model());
}

/// Whether the messages are those of the format, and the operators are used as they may be: ONNX Runtime is lenient.
#[test]
fn the_makers_of_the_format_find_no_fault() {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/python/bin/python");
    let python = env::var_os("TEST_PYTHON").unwrap_or_else(|| fetched.into());
    let has_onnx = Command::new(&python).args(["-c", "import onnx"]).output();
    if !has_onnx.is_ok_and(|output| output.status.success()) {
        skipped("no Python with onnx (make test-tools, or TEST_PYTHON): no exported graph was checked by it");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let models = Storage::value_variants().iter().map(|&storage| {
        let (config, weights) = random_network(3);
        let path = folder.path().join(format!("{storage}.onnx"));
        fs::write(&path, export::onnx_model(&config, &weights, storage).unwrap()).unwrap();
        path
    });
    let output = Command::new(&python)
        .args([
            "-c",
            "import onnx, sys; [onnx.checker.check_model(onnx.load(path), full_check=True) for path in sys.argv[1:]]",
        ])
        .args(models)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// How far log-scores of an export may be from the reference's.
const TOLERANCES: [(Storage, f32); 3] = [(Storage::F32, 2e-5), (Storage::F16, 2e-3), (Storage::Int8, 5e-2)];

/// Exports a checkpoint of the authors' implementation and compares with what that computed.
fn check_reference(name: &str, graph: GraphKind, storage: Storage, tolerance: f32) {
    let folder = fixture(name);
    let Checkpoint {
        network: config,
        weights,
        ..
    } = import::read(&folder, Choice::Averaged).unwrap();
    let mut network = exported(&config, &weights, graph, storage);

    let io = numbers(&folder.join("io.safetensors"));
    let (tokens, sigma): (Vec<i64>, _) = (io["tokens"].ids(), &io["sigma"].data);
    let positions: Vec<i64> = (0..tokens.len() as i64).collect();
    let batch = Batch {
        tokens: &tokens,
        length: config.length,
        sigma,
        positions: &positions,
    };
    let mut log_scores = evaluate(&mut network, &batch);
    for (at, row) in log_scores.chunks_exact_mut(config.states).enumerate() {
        if config.scale_by_sigma {
            let offset = sigma_offset(f64::from(sigma[at / config.length]), config.states);
            row.iter_mut().for_each(|x| *x = (f64::from(*x) + offset) as f32);
        }
        row[tokens[at] as usize] = 0.0;
    }
    let difference = largest_difference(&log_scores, &io["log_score"].data);
    assert!(difference < tolerance, "{storage}: off by {difference}");
}

#[test]
fn an_absorbing_checkpoint_says_what_the_reference_says() {
    for (storage, tolerance) in TOLERANCES {
        check_reference("sedd-tiny-absorb", GraphKind::Absorbing, storage, tolerance);
    }
}

#[test]
fn a_uniform_checkpoint_says_what_the_reference_says() {
    for (storage, tolerance) in TOLERANCES {
        check_reference("sedd-tiny-uniform", GraphKind::Uniform, storage, tolerance);
    }
}

#[test]
fn a_bundle_says_what_was_trained() {
    let trained = tokenizer::train(&["the cat sat on the mat ".repeat(20)], 270).unwrap();
    let tokenizer = trained.to_string(false).unwrap();
    let config = NetworkConfig {
        states: trained.get_vocab_size(true) + 1,
        length: 8,
        hidden_size: 8,
        cond_dim: 4,
        blocks: 1,
        heads: 2,
        dropout: 0.0,
        scale_by_sigma: true,
        parameterization: Parameterization::Score,
        time_conditioned: true,
        tie_embeddings: false,
    };
    let weights = config.initial_weights(1, 0.0);
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("1");
    let with_tokenizer = |config| TrainedModel {
        tokenizer: Some(tokenizer.as_bytes()),
        ..model(config, &weights, GraphKind::Absorbing)
    };
    export::bundle(&directory, with_tokenizer(&config), Storage::F16).unwrap();

    let bundle = Bundle::open(&directory).unwrap();
    let manifest = bundle.manifest();
    assert_eq!(manifest.vocab_size, config.states);
    assert_eq!(manifest.mask_token, Some(config.states as Token - 1));
    assert_eq!(
        manifest.end_of_document,
        trained.token_to_id(tokenizer::END_OF_DOCUMENT)
    );
    assert!(manifest.end_of_document.is_some());
    assert_eq!((manifest.max_length, manifest.schedule), (8, LOG_LINEAR));
    assert!(manifest.sigma_offset && manifest.time_conditioned);
    assert_eq!(manifest.provenance["steps"], 1);
    assert!(bundle.tokenizer().unwrap().is_some());

    let narrow = NetworkConfig {
        states: config.states - 1,
        ..config
    };
    let refused = export::bundle(&root.path().join("2"), with_tokenizer(&narrow), Storage::F16);
    assert!(refused.unwrap_err().to_string().contains("token id"));
    assert!(!root.path().join("2").exists());

    // How it is sampled goes into the manifest, unless it cannot be.
    for (length, fits) in [(8, true), (9, false)] {
        let defaults = Defaults {
            length: Some(length),
            temperature: Some(0.9),
            ..Defaults::default()
        };
        let options = Options {
            defaults: Some(defaults),
            ..Options::default()
        };
        let directory = root.path().join(format!("of-{length}"));
        let written = export::bundle_with(&directory, with_tokenizer(&config), &options);
        assert_eq!(written.is_ok(), fits, "{written:?}");
        assert_eq!(directory.exists(), fits);
        if fits {
            assert_eq!(
                Bundle::open(&directory).unwrap().manifest().defaults,
                Some(defaults)
            );
        }
    }
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let (config, weights) = random_network(1);
    let error = |storage, change: &dyn Fn(&mut StateDict)| {
        let mut weights = weights.clone();
        change(&mut weights);
        export::onnx_model(&config, &weights, storage).unwrap_err()
    };
    let missing = error(Storage::F32, &|weights| {
        drop(weights.0.remove("blocks.0.mlp.0.bias"));
    });
    assert!(
        missing.to_string().contains("blocks.0.mlp.0.bias is missing"),
        "{missing}"
    );
    let extra = error(Storage::F32, &|weights| {
        weights.insert("teapot", vec![1], vec![0.0]);
    });
    assert!(
        extra.to_string().contains("teapot belongs to no parameter"),
        "{extra}"
    );
    let misshapen = error(Storage::F32, &|weights| {
        weights.insert("sigma_map.mlp.0.bias", vec![99], vec![0.0; 99]);
    });
    assert!(
        misshapen
            .to_string()
            .contains("sigma_map.mlp.0.bias has shape [99]"),
        "{misshapen}"
    );
    let set = |value| {
        move |weights: &mut StateDict| {
            weights.0.get_mut("output_layer.linear.weight").unwrap().data[3] = value;
        }
    };
    let broken = error(Storage::F32, &set(f32::NAN));
    assert!(
        matches!(&broken, ExportError::Entry { name, .. } if name == "output_layer.linear.weight"),
        "{broken}"
    );
    let large = error(Storage::F16, &set(1e5));
    assert!(
        matches!(&large, ExportError::Entry { name, .. } if name == "output_layer.linear.weight"),
        "{large}"
    );
}
