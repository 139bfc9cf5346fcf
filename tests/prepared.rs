//! Networks that ONNX Runtime has prepared and keeps in a folder: the same rows from one copy of the weights, and nothing
//! there is trusted that is not as it was made.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use denoised::bundle::{Bundle, demo};
use denoised::network::onnx::{OnnxNetwork, OnnxOptions, Prepared, PreparedError};
use denoised::network::{Batch, ScoreNetwork};
use denoised::proto::v1::{GenerateRequest, Sampling};

use crate::binary::{Serving, denoised, succeeds};
use crate::support::{TestServer, config, generate, may_mount, prompt, publish, skipped};

const ROOM: u64 = 1 << 30;

fn demo_bundle() -> Bundle {
    demo().unwrap().unwrap()
}

/// Bits of all rows of a few masked positions.
fn rows(network: &mut OnnxNetwork, bundle: &Bundle) -> Vec<u32> {
    let mask = i64::from(bundle.manifest().mask_token.unwrap_or(0));
    let tokens: Vec<i64> = (0..32).map(|i| if i % 3 == 0 { mask } else { i % 5 }).collect();
    let batch = Batch {
        tokens: &tokens,
        length: 32,
        sigma: &[0.7],
        positions: &[0, 3, 30],
    };
    let mut bits = Vec::new();
    network
        .log_score(&batch, &mut |rows| {
            bits = (0..3)
                .flat_map(|row| {
                    rows.row(row)
                        .iter()
                        .map(|score| score.to_bits())
                        .collect::<Vec<_>>()
                })
                .collect();
        })
        .unwrap();
    bits
}

fn load(bundle: &Bundle, prepared: &Prepared) -> OnnxNetwork {
    OnnxNetwork::load_prepared(bundle, &OnnxOptions::default(), prepared).unwrap()
}

/// The folders of prepared networks in `folder`.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.join("networks")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// How often this process has `file` mapped.
fn mappings(file: &Path) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let lines = maps.lines();
    lines
        .filter(|line| line.ends_with(&file.display().to_string()))
        .count()
}

#[test]
fn what_is_prepared_says_the_same_and_is_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = demo_bundle();
    let mut own = OnnxNetwork::load(&bundle, &OnnxOptions::default()).unwrap();
    assert!(!own.shares_weights());
    let expected = rows(&mut own, &bundle);
    let prepared = Prepared::open(folder.path(), ROOM).unwrap();
    let mut networks = [load(&bundle, &prepared), load(&bundle, &prepared)];
    let [entry] = &entries(folder.path())[..] else {
        unreachable!("one network is one entry")
    };
    let written = fs::metadata(entry.join("network.onnx.data"))
        .unwrap()
        .modified()
        .unwrap();
    // By another process that starts later, as well.
    let mut later = load(&bundle, &Prepared::open(folder.path(), ROOM).unwrap());
    for network in networks.iter_mut().chain([&mut later]) {
        assert!(network.shares_weights());
        assert_eq!(rows(network, &bundle), expected);
    }
    assert!(mappings(&entry.join("network.onnx.data")) >= 3);
    let still = fs::metadata(entry.join("network.onnx.data"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(written, still);
}

#[test]
fn what_is_not_as_it_was_made_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = demo_bundle();
    let expected = rows(
        &mut load(&bundle, &Prepared::open(folder.path(), ROOM).unwrap()),
        &bundle,
    );
    let entry = entries(folder.path()).remove(0);
    let damages: [&dyn Fn(); 4] = [
        &|| {
            let path = entry.join("network.onnx.data");
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::remove_file(&path).unwrap();
            fs::write(path, bytes).unwrap();
        },
        &|| fs::remove_file(entry.join("network.onnx.data")).unwrap(),
        &|| fs::write(entry.join("sha256.json"), "{").unwrap(),
        &|| fs::remove_file(entry.join("network.onnx")).unwrap(),
    ];
    for damage in damages {
        damage();
        let prepared = Prepared::open(folder.path(), ROOM).unwrap();
        let mut network = load(&bundle, &prepared);
        assert!(network.shares_weights());
        assert_eq!(rows(&mut network, &bundle), expected);
        assert_eq!(entries(folder.path()), [entry.as_path()]);
    }
}

#[test]
fn those_that_were_used_longest_ago_make_room() {
    let (folder, repository) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let bundle = demo_bundle();
    let bytes_of = |entry: &Path| -> u64 {
        let files = fs::read_dir(entry).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum()
    };
    let large = load(&bundle, &Prepared::open(folder.path(), ROOM).unwrap());
    let [first] = &entries(folder.path())[..] else {
        unreachable!("one network is one entry")
    };
    let budget = bytes_of(first);
    let list = fs::File::options()
        .append(true)
        .open(first.join("sha256.json"))
        .unwrap();
    list.set_modified(SystemTime::now() - Duration::from_secs(60))
        .unwrap();

    // Another network, beside which the first has no room any more.
    publish(
        repository.path(),
        ("small", 1),
        include_bytes!("fixtures/networks/float32.onnx"),
        false,
    );
    let small = Bundle::open(&repository.path().join("small/1")).unwrap();
    let prepared = Prepared::open(folder.path(), budget).unwrap();
    assert!(load(&small, &prepared).shares_weights());
    let left = entries(folder.path());
    assert!(left.len() == 1 && !left.contains(first), "{left:?}");

    // One that alone is too large is loaded as without, and not tried to prepare again.
    let prepared = Prepared::open(folder.path(), budget - 1).unwrap();
    let mut network = load(&bundle, &prepared);
    assert!(!network.shares_weights());
    assert_eq!(entries(folder.path()), left);
    let started = SystemTime::now();
    assert!(!load(&bundle, &prepared).shares_weights());
    let changed = fs::metadata(folder.path().join("networks"))
        .unwrap()
        .modified()
        .unwrap();
    assert!(changed < started, "it was prepared again");
    // What is removed stays with those who have it.
    let mut large = large;
    assert_eq!(rows(&mut network, &bundle), rows(&mut large, &bundle));
}

#[test]
fn a_folder_that_others_may_write_is_refused_and_one_that_is_gone_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let prepared = Prepared::open(folder.path(), ROOM).unwrap();
    let networks = folder.path().join("networks");
    let mode = |mode| fs::set_permissions(&networks, fs::Permissions::from_mode(mode)).unwrap();
    assert_eq!(
        fs::metadata(&networks).unwrap().permissions().mode() & 0o777,
        0o700
    );
    mode(0o770);
    let error = Prepared::open(folder.path(), ROOM).unwrap_err();
    assert!(matches!(error, PreparedError::Shared(_)), "{error}");
    fs::remove_dir_all(&networks).unwrap();
    std::os::unix::fs::symlink("/tmp", &networks).unwrap();
    let error = Prepared::open(folder.path(), ROOM).unwrap_err();
    assert!(matches!(error, PreparedError::Shared(_)), "{error}");
    fs::remove_file(&networks).unwrap();
    fs::write(&networks, "no folder").unwrap();
    let error = Prepared::open(folder.path(), ROOM).unwrap_err();
    assert!(
        matches!(&error, PreparedError::Io { path, .. } if *path == networks),
        "{error}"
    );

    let bundle = demo_bundle();
    let mut own = load(&bundle, &prepared);
    assert!(!own.shares_weights());
    assert!(!rows(&mut own, &bundle).is_empty());
}

#[test]
fn what_was_never_finished_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    drop(Prepared::open(folder.path(), ROOM).unwrap());
    let partial = |name: &str, hours: u64| {
        let path = folder.path().join("networks").join(name);
        fs::create_dir(&path).unwrap();
        let when = SystemTime::now() - Duration::from_secs(3600 * hours);
        fs::File::open(&path).unwrap().set_modified(when).unwrap();
        path
    };
    let (old, young) = (partial(".new-1-0", 2), partial(".new-2-0", 0));
    drop(Prepared::open(folder.path(), ROOM).unwrap());
    assert!(!old.exists() && young.exists());
}

/// An image or a volume may come with what was prepared for its machines.
#[test]
fn a_folder_that_is_mounted_read_only_serves_what_it_has() {
    if !may_mount() {
        skipped("no mounts of one's own are allowed here: a folder that is read-only was not tried");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let bundle = demo_bundle();
    drop(load(&bundle, &Prepared::open(folder.path(), ROOM).unwrap()));
    let before = entries(folder.path());
    let mut command = Command::new("unshare");
    // The script's own process becomes the server.
    let script =
        format!("mount --bind '{path}' '{path}' && mount -o remount,ro,bind '{path}' && exec \"$@\"");
    command
        .args(["--mount", "bash", "-c", &script, "bash"])
        .arg(denoised().get_program())
        .env_remove("DENOISED_SERVER")
        .env("DENOISED__MODELS__PREPARED", path);
    let server = Serving::start_with(&mut command);
    let answered = denoised()
        .args(["generate", "--length", "24", "--steps", "4", "--server"])
        .arg(format!("http://{}", server.address))
        .output()
        .unwrap();
    succeeds(&answered);
    let maps = fs::read_to_string(format!("/proc/{}/maps", server.id())).unwrap();
    assert!(maps.contains("network.onnx.data"), "{maps}");
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("prepared"), "{log}");
    assert_eq!(entries(folder.path()), before);
}

/// Memory for one network is enough for all workers' then.
#[tokio::test(flavor = "multi_thread")]
async fn workers_have_one_copy_between_them_and_say_what_they_say_without() {
    let folder = tempfile::tempdir().unwrap();
    let request = GenerateRequest {
        prompt_as: Some(prompt("In the beginning")),
        length: Some(32),
        sampling: Some(Sampling {
            seed: Some(7),
            steps: Some(8),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let plain = TestServer::demo().await;
    let expected = generate(&mut plain.client(), request.clone()).await.unwrap();
    plain.stop().await;

    let mut config = config();
    config.models.prepared = Some(folder.path().to_owned());
    config.models.memory_megabytes = demo_bundle().weight_bytes().div_ceil(1 << 20);
    config.engine.workers = 3;
    let server = TestServer::demo_with(&config).await;
    let got = generate(&mut server.client(), request).await.unwrap();
    assert_eq!(got.results[0].tokens, expected.results[0].tokens);
    let weights = entries(folder.path()).remove(0).join("network.onnx.data");
    let started = std::time::Instant::now();
    while mappings(&weights) < 3 {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "{} of 3 workers have it",
            mappings(&weights)
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    server.stop().await;

    let mut config = crate::support::config();
    fs::set_permissions(folder.path().join("networks"), fs::Permissions::from_mode(0o777)).unwrap();
    config.models.prepared = Some(folder.path().to_owned());
    let error = denoised::server::Server::bind(&config).await.unwrap_err();
    assert!(error.to_string().contains("models.prepared: "), "{error}");
}
