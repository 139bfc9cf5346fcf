//! Files, variables and settings of a run.

use std::fs;
use std::path::Path;

use super::reading::within;
use super::*;

fn demo(variables: &[(&str, &str)]) -> anyhow::Result<RunConfig> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/demo.toml");
    let variables = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Ok(RunConfig::read_with(&path, &[], Some(variables.collect()))?)
}

#[test]
fn settings_replace_all_else() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/demo.toml");
    let variables = || {
        Some(
            [("TRAINING__RUN__SEED".to_owned(), "5".to_owned())]
                .into_iter()
                .collect(),
        )
    };
    let read = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|setting| (*setting).to_owned()).collect();
        RunConfig::read_with(&path, &settings, variables())
    };
    assert_eq!(read(&[]).unwrap().run.seed, 5);
    let run = read(&[
        "run.seed=7",
        "optimizer.betas=[0.8, 0.9]",
        "graph.kind=absorbing",
        "run.directory=runs/other=1",
    ])
    .unwrap();
    assert_eq!((run.run.seed, run.optimizer.betas), (7, [0.8, 0.9]));
    assert_eq!(run.run.directory, Path::new("runs/other=1"));
    for (setting, says) in [
        ("seed", "is no setting"),
        ("seed=1", "is no setting"),
        ("run.sed=1", "sed"),
        ("run.steps=many", "run.steps"),
    ] {
        let error = format!("{:#}", anyhow::Error::from(read(&[setting]).unwrap_err()));
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn variables_replace_what_the_file_says() {
    let file = demo(&[]).unwrap();
    assert_eq!((file.run.seed, file.run.checkpoint_minutes), (1, None));
    let changed = demo(&[
        ("TRAINING__RUN__DIRECTORY", "/checkpoints/007"),
        ("TRAINING__RUN__SEED", "18446744073709551615"),
        ("TRAINING__RUN__CHECKPOINT_MINUTES", "5"),
        ("TRAINING__OPTIMIZER__LR", "1e-4"),
        ("TRAINING__NETWORK__TIE_EMBEDDINGS", "true"),
        ("TRAINING_OTHER", "of no meaning"),
    ])
    .unwrap();
    assert_eq!(changed.run.directory, Path::new("/checkpoints/007"));
    assert_eq!((changed.run.seed, changed.optimizer.lr), (u64::MAX, 1e-4));
    assert_eq!(changed.run.checkpoint_minutes, Some(5.0));
    assert!(changed.network.tie_embeddings);
    assert_eq!(changed.schedule, file.schedule);
}

#[test]
fn paths_of_a_file_start_where_it_lies() {
    let root = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(root.path()).unwrap();
    let path = root.join("configs/run.toml");
    fs::create_dir(root.join("configs")).unwrap();
    let text = include_str!("../../configs/demo.toml");
    let lines = text
        .replace("[run]", "[run]\nmirror = \"s3://bucket/run\"")
        .replace("[graph]", "[[data.mixture]]\ntokens = \"../a.tokens\"\nshare = 0.25\n[[data.mixture]]\ntokens = \"b.tokens\"\nshare = 0.5\n[graph]");
    fs::write(&path, lines).unwrap();
    let variables = [("TRAINING__DATA__TOKENIZER".to_owned(), "here.json".to_owned())];
    let run = RunConfig::read_with(&path, &[], Some(variables.into_iter().collect())).unwrap();
    let place = root.parent().unwrap();
    assert_eq!(run.data.train, place.join(".corpus/demo/train.tokens"));
    assert_eq!(run.run.directory, place.join("runs/demo"));
    let mixed: Vec<_> = run
        .data
        .mixture
        .iter()
        .map(|part| (part.tokens.clone(), part.share))
        .collect();
    assert_eq!(
        mixed,
        [
            (root.join("a.tokens"), 0.25),
            (root.join("configs/b.tokens"), 0.5)
        ]
    );
    assert_eq!(run.data.tokenizer, Path::new("here.json"));
    assert_eq!(run.run.mirror.as_deref(), Some("s3://bucket/run"));
    assert_eq!(within(Path::new("/a/b"), Path::new("/c/./d")), Path::new("/c/d"));
}

#[test]
fn what_would_be_right_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.toml");
    let text = include_str!("../../configs/demo.toml");
    fs::write(&path, text.replace("\"absorbing\"", "\"absorb\"")).unwrap();
    let error = format!("{:#}", anyhow::Error::from(RunConfig::read(&path).unwrap_err()));
    for says in ["run.toml", "absorb", "expected `absorbing` or `uniform`", "line"] {
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (variable, value, says) in [
        ("TRAINING__RUN__STEP", "3", "step"),
        ("TRAINING__RUN__STEPS", "many", "run.steps"),
        ("TRAINING__RUN__STEPS", "0", "run.steps must be at least 1"),
    ] {
        let error = format!("{:#}", demo(&[(variable, value)]).unwrap_err());
        assert!(error.contains(says) && error.contains("demo.toml"), "{error}");
    }
}
