//! A training job whose machines go away again and again: it publishes what an undisturbed one does, and a server that
//! watches serves it.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use denoised::bundle::Bundle;
use denoised::proto::v1::GenerateRequest;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;

use crate::binary::{Serving, denoised};
use crate::object_store::{Store, training};
use crate::support::{generate, skipped};

/// How often the job is killed.
const KILLS: u64 = 20;
/// Steps from one checkpoint to the next.
const EVERY: u64 = 2;

/// A text, and the file of a run on it.
fn prepared(root: &Path) {
    let text = root.join("text");
    std::fs::create_dir(&text).unwrap();
    for i in 0..24 {
        let line = format!(
            "The cat number {i} sat on the mat. The dog saw the cat and ran to mat {}.\n",
            i % 7
        );
        std::fs::write(text.join(format!("{i}.txt")), line.repeat(4)).unwrap();
    }
    // Each machine gets two checkpoints further at most.
    let steps = 2 * EVERY * (KILLS + 4);
    let run = format!(
        r#"
        [data]
        train = "none"
        validation = "none"
        tokenizer = "none"
        [graph]
        kind = "absorbing"
        [schedule]
        type = "loglinear"
        eps = 1e-3
        [network]
        length = 16
        hidden_size = 16
        cond_dim = 8
        blocks = 1
        heads = 2
        initial_gate = 1.0
        [optimizer]
        lr = 3e-3
        betas = [0.9, 0.99]
        warmup_steps = 4
        gradient_clip_norm = 1.0
        ema_decay = 0.9
        [run]
        seed = 1
        batch_size = 4
        steps = {steps}
        checkpoint_every = {EVERY}
        keep = 2
        validate_every = 1000
        threads = 1
        directory = "none"
        "#
    );
    std::fs::write(root.join("run.toml"), run).unwrap();
}

/// The job, on a machine whose disk is `work`, which is empty.
fn job(
    root: &Path,
    work: &str,
    mirror: &str,
    repository: &str,
    training: &Path,
    store: Option<&Store>,
) -> Command {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/train.sh"));
    command
        .arg(root.join("run.toml"))
        .args(["text", repository])
        .arg(root.join("text"));
    let path = format!(
        "{}:{}",
        training.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    if let Some(store) = store {
        store.known_to(&mut command);
    }
    command
        .env("PATH", path)
        .env("WORK", root.join(work))
        .env("VOCABULARY", "280")
        .env("TRAINING__RUN__MIRROR", mirror)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // All that it starts goes with it.
        .process_group(0);
    command
}

/// Kills all that belongs to the job.
fn kill(child: &mut Child) {
    let group = format!("-{}", child.id());
    Command::new("kill")
        .args(["-KILL", "--", &group])
        .status()
        .unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_killed_twenty_times_publishes_what_an_undisturbed_one_does() {
    if cfg!(not(feature = "object-store")) {
        skipped("built without the feature object-store: no training job was tried");
        return;
    }
    let (Some(store), Some(training)) = (Store::start(), training()) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);

    let undisturbed = root.join("undisturbed");
    let mirror = root.join("mirror");
    let output = job(
        root,
        "whole",
        mirror.to_str().unwrap(),
        undisturbed.to_str().unwrap(),
        &training,
        Some(&store),
    )
    .output()
    .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let mut watching = denoised();
    watching
        .env("DENOISED__MODELS__REPOSITORY", "s3://bucket/models")
        .env("DENOISED__MODELS__CACHE", root.join("cache"))
        .env("DENOISED__MODELS__POLL_SECONDS", "1");
    let server = Serving::start_with(store.known_to(&mut watching));

    let (mut kills, mut machine) = (0, 0);
    let mut resumed = Vec::new();
    loop {
        machine += 1;
        let mut child = job(
            root,
            &format!("machine-{machine}"),
            "s3://bucket/run",
            "s3://bucket/models",
            &training,
            Some(&store),
        )
        .spawn()
        .unwrap();
        // Killed when it has written a checkpoint more than it began with, which may be on its way to the mirror.
        let mut lines = BufReader::new(child.stderr.take().unwrap())
            .lines()
            .map(Result::unwrap);
        let mut said = Vec::new();
        let wrote = lines.by_ref().any(|line| {
            let is_checkpoint = line.contains("wrote ") && line.contains("/run/");
            said.push(line);
            kills < KILLS && is_checkpoint && said.iter().filter(|line| line.contains("wrote ")).count() == 2
        });
        resumed.extend(said.iter().filter(|line| line.contains("resum")).cloned());
        if wrote {
            kill(&mut child);
            kills += 1;
            continue;
        }
        let status = child.wait().unwrap();
        assert!(status.success(), "{said:?}");
        break;
    }
    assert_eq!(kills, KILLS, "{resumed:?}");

    // Started once more, as after a kill at the very end, it publishes nothing new.
    let output = job(
        root,
        "last",
        "s3://bucket/run",
        "s3://bucket/models",
        &training,
        Some(&store),
    )
    .output()
    .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("text@1"),
        "{output:?}"
    );

    let mut client = DiffusionServiceClient::connect(format!("http://{}", server.address))
        .await
        .unwrap();
    let served = async {
        loop {
            let asked = GenerateRequest {
                model: Some(denoised::proto::v1::ModelReference {
                    name: "text".to_owned(),
                    version: 0,
                }),
                ..GenerateRequest::default()
            };
            match generate(&mut client, asked).await {
                Ok(answer) => return answer,
                Err(status) => assert_eq!(status.code(), tonic::Code::NotFound, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(60), served)
        .await
        .unwrap();
    assert!(answer.results[0].text.is_some());

    // Byte for byte.
    let [whole, broken] =
        ["undisturbed/text/1", "cache/text/1"].map(|place| Bundle::open(&root.join(place)).unwrap());
    assert_eq!(whole.manifest().sha256, broken.manifest().sha256);
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
}

/// What is not trained to its end is not published, although `fit` ends well when it is told to stop.
#[test]
fn a_job_that_is_told_to_stop_publishes_nothing_and_goes_on_later() {
    let Some(training) = training() else { return };
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let [mirror, models] = ["mirror", "models"].map(|name| root.join(name).to_str().unwrap().to_owned());
    let start = |work: &str| job(root, work, &mirror, &models, &training, None);
    let mut child = start("first").spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap);
    assert!(lines.any(|line| line.contains("wrote ") && line.contains("/run/")));
    // As an engine of containers does: the first process alone is told.
    let told = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(told.unwrap().success());
    let said: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(143), "{said:?}");
    assert!(
        said.iter()
            .any(|line| line.contains("train.sh: stopped by a signal")),
        "{said:?}"
    );
    assert!(!Path::new(&models).exists());
    let output = start("second").output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(Path::new(&models).join("text/1/manifest.json").is_file());
}
