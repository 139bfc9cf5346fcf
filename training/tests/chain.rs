//! The straight line of a training run on a small text: tokenizer, token files, fit, resume, evaluate, export.

use std::fs;
use std::path::Path;
use std::process::Command;

use denoised::bundle::Bundle;
use denoised::diffusion::Parameterization;
use denoised::diffusion::{Token, TokenChoice};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, ScoreNetwork};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use tokenizers::Tokenizer;
use training::config::{MixturePart, RunConfig};
use training::data::mixture::Mixture;
use training::data::tokenizer::END_OF_DOCUMENT;
use training::data::{Corpus, TokenFile, prepare};
use training::evaluate::bound::{Estimate, Served, bound};
use training::evaluate::quality::Variety;
use training::evaluate::samples::Sampling;
use training::export::{self, Storage, TrainedModel};
use training::fit::checkpoint;
use training::fit::record;
use training::fit::step::objective;
use training::fit::{FitOptions, Start, fit};
use training::model::Ddit;

use crate::common::{config, config_file, denoised, prepared, prepared_with};

fn resumed() -> FitOptions {
    FitOptions {
        start: Start::Resume,
        ..FitOptions::default()
    }
}

/// What a server of the models in `repository` writes.
fn written(program: &Path, repository: &Path, model: &str, sampling: &Sampling<'_>) -> Vec<Vec<Token>> {
    let output = Command::new(program)
        .args(["generate", "--json", "--model", model, "--repository"])
        .arg(repository)
        .args(["--length", &sampling.length.to_string()])
        .args(["--num-samples", &sampling.count.to_string()])
        .args(["--steps", &sampling.steps.to_string()])
        .args(["--seed", &sampling.seed.to_string()])
        .output()
        .unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut texts = vec![Vec::new(); sampling.count];
    for line in told.lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        if let Some(result) = event.get("result") {
            let canvas = result.get("canvas").map_or(0, |canvas| canvas.as_u64().unwrap());
            texts[canvas as usize] = serde_json::from_value(result["tokens"].clone()).unwrap();
        }
    }
    texts
}

/// A network, its bundle in ONNX Runtime and a server of it give the same bound and the same samples, for the same noise.
fn agree(network: &Ddit, repository: &Path, bundle: &Bundle, sequences: &[Vec<Token>]) {
    let estimate = Estimate {
        objective: Served::objective(bundle.manifest()),
        draws: 4,
        seed: 3,
        threads: 2,
        end_of_document: None,
    };
    let Ok(ours) = estimate.bound(&|| Ok(network), sequences);
    let served = estimate.bound(&|| Served::load(bundle), sequences).unwrap();
    let difference = (served.nats_per_token / ours.nats_per_token - 1.0).abs();
    assert!(
        difference < 1e-5,
        "{served} from the bundle, {ours} from the network"
    );
    let sampling = Sampling {
        objective: estimate.objective,
        prompt: &[],
        length: 16,
        count: 3,
        steps: 8,
        choice: TokenChoice::default(),
        seed: 3,
        threads: 2,
    };
    let drawn = sampling.draw(&|| Served::load(bundle)).unwrap();
    assert_eq!(drawn, sampling.draw(&|| Ok(network)).unwrap());
    if let Some(program) = denoised() {
        let model = &bundle.manifest().name;
        assert_eq!(drawn, written(&program, repository, model, &sampling));
    }
    assert!(Variety::of(&drawn).unwrap().token_entropy_nats.mean > 1.0);
}

#[test]
fn from_text_to_a_bundle_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let (tokenizer, validation) = prepared(root);

    // Twenty steps at once are the same as ten and ten more.
    let whole = config(root, "whole", 20);
    fit(whole.clone(), FitOptions::default()).unwrap();
    fit(config(root, "parts", 10), FitOptions::default()).unwrap();
    let parts = config(root, "parts", 20);
    fit(parts.clone(), resumed()).unwrap();
    let average = |config: &RunConfig| {
        checkpoint::load_average(&checkpoint::latest(&config.run.directory).unwrap()).unwrap()
    };
    let (network, state) = average(&whole);
    assert_eq!(state.step, 20);
    assert_eq!(
        network.state_dict(),
        average(&parts).0.state_dict(),
        "resuming changes nothing"
    );

    // More steps learn more, held-out text included.
    let longer = config(root, "longer", 120);
    fit(longer.clone(), FitOptions::default()).unwrap();
    let (network, _) = average(&longer);
    let sequences: Vec<_> = (0..validation.sequences(16))
        .map(|i| validation.sequence(i, 16))
        .collect();
    let bits = |config: &RunConfig| {
        let (network, _) = average(config);
        bound(
            &network,
            &objective(config, network.config()),
            &sequences,
            8,
            1,
            2,
        )
        .nats_per_token
    };
    let (early, late) = (bits(&whole), bits(&longer));
    assert!(
        late < 0.97 * early,
        "{early} nats per token after 20 steps, {late} after 120"
    );

    // What is exported is what the server opens.
    let bundle = root.join("models/tiny/1");
    let json = fs::read(&tokenizer).unwrap();
    let model = TrainedModel {
        name: "tiny",
        config: network.config(),
        weights: &network.state_dict(),
        graph: longer.graph.kind,
        schedule: longer.schedule,
        tokenizer: Some(&json),
        end_of_document: None,
        provenance: serde_json::json!({"steps": 120}),
    };
    export::bundle(&bundle, model, Storage::F32).unwrap();
    let bundle = Bundle::open(&bundle).unwrap();
    assert_eq!(bundle.manifest().end_of_document, Some(0));
    assert_eq!(
        bundle.tokenizer().unwrap().unwrap().decode(&[5]).unwrap().len(),
        1
    );
    agree(&network, &root.join("models"), &bundle, &sequences);
    let mut served = OnnxNetwork::load(&bundle, &OnnxOptions::default()).unwrap();
    let mask = i64::from(bundle.manifest().mask_token.unwrap());
    let batch = Batch {
        tokens: &[mask; 16],
        length: 16,
        sigma: &[3.0],
        positions: &[0, 15],
    };
    served
        .log_score(&batch, &mut |rows| {
            assert!(rows.row(1).iter().all(|s| s.is_finite()));
        })
        .unwrap();
}

/// Probabilities of the clean token that never see the time (RADD), with tied embeddings: trained,
/// bounded, exported, and the served network bounds the same text alike.
#[test]
fn a_network_of_probabilities_goes_the_whole_way() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let (_, validation) = prepared(root);
    let mean = |steps| {
        let mut config = config(root, "mean", steps);
        config.network.parameterization = Parameterization::Mean;
        config.network.scale_by_sigma = false;
        config.network.time_conditioned = false;
        config.network.tie_embeddings = true;
        config.validate().unwrap();
        config
    };
    let sequences: Vec<_> = (0..validation.sequences(16))
        .map(|i| validation.sequence(i, 16))
        .collect();
    let trained = |steps, resume| {
        let config = mean(steps);
        let start = if resume { Start::Resume } else { Start::Fresh };
        let options = FitOptions {
            start,
            ..FitOptions::default()
        };
        fit(config.clone(), options).unwrap();
        let (network, _) =
            checkpoint::load_average(&checkpoint::latest(&config.run.directory).unwrap()).unwrap();
        let objective = objective(&config, network.config());
        let bound = bound(&network, &objective, &sequences, 8, 1, 2);
        (network, config, bound)
    };
    let (_, _, early) = trained(20, false);
    let (network, config, late) = trained(120, true);
    assert!(
        late.nats_per_token < 0.97 * early.nats_per_token,
        "{early} after 20 steps, {late} after 120"
    );

    let bundle = root.join("models/mean/1");
    let model = TrainedModel {
        name: "mean",
        config: network.config(),
        weights: &network.state_dict(),
        graph: config.graph.kind,
        schedule: config.schedule,
        tokenizer: None,
        end_of_document: None,
        provenance: serde_json::json!({}),
    };
    let manifest = export::bundle(&bundle, model, Storage::F32).unwrap();
    assert_eq!(manifest.parameterization, Parameterization::Mean);
    assert!(!manifest.time_conditioned && !manifest.sigma_offset);
    let bundle = Bundle::open(&bundle).unwrap();
    let mut served = OnnxNetwork::load(&bundle, &OnnxOptions::default()).unwrap();
    // The same noise as in the network's own loss; -ln p of the clean tokens, weighted, is that loss.
    let (t, mask) = (0.5, manifest.mask_token.unwrap());
    let objective = objective(&config, network.config());
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let noised = objective.noise(&sequences[0], 16, &[t], &mut random);
    let expected = noised.sequence_losses(&network)[0];
    let tokens: Vec<i64> = noised.tokens.iter().map(|&token| i64::from(token)).collect();
    let positions: Vec<i64> = (0..16)
        .filter(|&i| tokens[i as usize] == i64::from(mask))
        .collect();
    assert!(positions.len() > 3, "half of the tokens are masked");
    let sigma = config.schedule.total_noise(t);
    let batch = Batch {
        tokens: &tokens,
        length: 16,
        sigma: &[sigma as f32],
        positions: &positions,
    };
    let mut loss = 0.0;
    served
        .log_score(&batch, &mut |rows| {
            for (row, &position) in positions.iter().enumerate() {
                let row = rows.row(row);
                let total: f64 = row.iter().map(|&log| f64::from(log).exp()).sum();
                assert!((total - 1.0).abs() < 1e-5, "probabilities sum to {total}");
                loss -= f64::from(row[sequences[0][position as usize] as usize]);
            }
        })
        .unwrap();
    loss *= config.schedule.rate(t) / sigma.exp_m1();
    assert!((loss / expected - 1.0).abs() < 1e-4, "{loss} is not {expected}");

    agree(&network, &root.join("models"), &bundle, &sequences);
}

/// Of what is mixed in, as much as was asked for is learned from; a run goes on where it was, and says what it was fed.
#[test]
fn token_files_are_mixed_by_their_shares() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let (tokenizer, _) = prepared(root);
    let of = |name: &str, tokenizer: &Path| {
        let text = root.join(format!("{name}.txt"));
        fs::write(&text, "ZZZZ QQQQ\n\n".repeat(300)).unwrap();
        let corpus = Corpus {
            input: vec![text],
            separator: Some("\n\n".to_owned()),
            ..Corpus::default()
        };
        prepare(&corpus, tokenizer, END_OF_DOCUMENT, &root.join(name)).map(|prepared| prepared.train)
    };
    let other = of("other", &tokenizer).unwrap();
    let mark = other.range(0..1)[0];
    let train = TokenFile::open(&root.join("data/train.tokens")).unwrap();
    assert!(!train.range(0..train.tokens()).contains(&mark));
    let mut mixture = Mixture::new(train, vec![(other, 0.25)], 16, 1).unwrap();
    let sequences: Vec<_> = (0..8).flat_map(|step| mixture.batch(step, 128)).collect();
    let mixed = sequences.iter().filter(|tokens| tokens.contains(&mark)).count();
    assert_eq!((sequences.len(), mixed), (1024, 256));

    let mixed = |run: &str, steps: u64| {
        let mut config = config(root, run, steps);
        config.data.mixture = vec![MixturePart {
            tokens: root.join("other/train.tokens"),
            share: 0.25,
        }];
        config
    };
    fit(mixed("whole", 20), FitOptions::default()).unwrap();
    fit(mixed("parts", 10), FitOptions::default()).unwrap();
    fit(mixed("parts", 20), resumed()).unwrap();
    fit(config(root, "alone", 20), FitOptions::default()).unwrap();
    let learned = |run: &str| {
        let folder = checkpoint::latest(&root.join(run)).unwrap();
        checkpoint::load_average(&folder).unwrap().0.state_dict()
    };
    assert_eq!(learned("whole"), learned("parts"));
    assert_ne!(learned("whole"), learned("alone"));
    let provenance = record::read_provenance(&root.join("whole")).unwrap();
    assert_eq!(provenance.mixture.len(), 1);

    // Tokens of another tokenizer are others' words.
    let foreign = root.join("foreign.json");
    training::data::tokenizer::train(&["other words".to_owned()], 270)
        .unwrap()
        .save(&foreign, true)
        .unwrap();
    of("other", &foreign).unwrap();
    let error = fit(mixed("foreign", 2), FitOptions::default()).unwrap_err();
    assert!(format!("{error:#}").contains("another tokenizer"), "{error:#}");
}

#[test]
fn documents_end_with_the_token_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let error = prepared_with(root, "[SEP]").unwrap_err();
    let says = format!("{error:#}");
    assert!(
        says.contains("its special tokens are <|endoftext|> </s>"),
        "{says}"
    );

    let (tokenizer, validation) = prepared_with(root, "</s>").unwrap();
    let tokenizer = Tokenizer::from_file(tokenizer).unwrap();
    let end = tokenizer.token_to_id("</s>").unwrap();
    assert_eq!(validation.end_of_document(), end);
    let config = config_file(root, "run", 2);
    fit(RunConfig::read(&config).unwrap(), FitOptions::default()).unwrap();
    let bundle = root.join("models/run/1");
    let exported = Command::new(env!("CARGO_BIN_EXE_training"))
        .arg("export")
        .arg(config)
        .args(["--name", "run", "--out"])
        .arg(&bundle)
        .output()
        .unwrap();
    assert!(exported.status.success(), "{exported:?}");
    let manifest = Bundle::open(&bundle).unwrap().manifest().clone();
    assert_eq!(manifest.end_of_document, Some(end));
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let config = config(root, "run", 10);
    fit(config.clone(), FitOptions::default()).unwrap();
    let latest = checkpoint::latest(&config.run.directory).unwrap();
    for file in fs::read_dir(&latest).unwrap() {
        let path = file.unwrap().path();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    }
    let error = fit(config, resumed())
        .map(drop)
        .expect_err("half a checkpoint is not resumed");
    assert!(
        format!("{error:#}").contains(latest.to_str().unwrap()),
        "{error:#}"
    );
}
