//! What keeps a server from starting is one line and a code that says whose it is to mend, and a second signal ends one
//! at once.

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::binary::{Serving, denoised};
use crate::plain_http::get;
use crate::support::{publish, publish_files, skipped};

/// `denoised` with mounts of its own, which the shell makes by `mounting`; none, said loudly, where it may not.
fn mounted(mounting: &str) -> Option<Command> {
    let within = |program: &str| {
        let mut command = Command::new("unshare");
        let script = format!("{mounting} && exec \"$0\" \"$@\"");
        command.args(["--map-root-user", "--mount", "sh", "-c", &script, program]);
        command
    };
    let may = within("true").stderr(Stdio::null()).status();
    if !may.is_ok_and(|status| status.success()) {
        skipped(format_args!(
            "nothing may be mounted here (unshare, user namespaces): {mounting} was not tried"
        ));
        return None;
    }
    Some(within(env!("CARGO_BIN_EXE_denoised")))
}

/// As with `readOnlyRootFilesystem` in Kubernetes.
const READ_ONLY: &str = "mount -o remount,bind,ro /";

/// Starts a server, has it write a text, and ends it; its log.
fn served(command: &mut Command) -> String {
    let server = Serving::start_with(command);
    let url = format!("http://{}", server.address);
    let output = denoised()
        .args(["generate", "--server", &url, "--length", "8", "--steps", "2"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    log
}

#[test]
fn a_server_needs_no_disk_that_can_be_written() {
    if let Some(mut command) = mounted(READ_ONLY) {
        let log = served(&mut command);
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }
}

/// ONNX Runtime would leave an identifier below the home folder, and send a report of the machine, while it starts.
#[test]
fn nothing_is_told_to_the_makers_of_a_library() {
    let home = tempfile::tempdir().unwrap();
    let mut command = denoised();
    // Where it is known to be tested the library is silent by itself.
    command.env_clear().env("HOME", home.path());
    if let Some(library) = std::env::var_os("ORT_DYLIB_PATH") {
        command.env("ORT_DYLIB_PATH", library);
    }
    served(&mut command);
    let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_cache_on_a_read_only_disk_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut command) = mounted(READ_ONLY) else {
        return;
    };
    let output = command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .env(
            "DENOISED__MODELS__REPOSITORY",
            format!("file://{}", folder.path().display()),
        )
        .env("DENOISED__MODELS__CACHE", folder.path().join("cache"))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{error}");
    assert!(error.contains("Read-only file system"), "{error}");
    assert_eq!(error.trim().lines().count(), 1, "{error}");
}

/// What fits is served, and what does not is told where one looks for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_finds_the_disk_full_harms_no_other() {
    let network = include_bytes!("fixtures/networks/float32.onnx");
    let folder = tempfile::tempdir().unwrap();
    let (store, cache) = (folder.path().join("store"), folder.path().join("cache"));
    std::fs::create_dir(&cache).unwrap();
    publish(&store, ("fits", 1), network, false);
    let large = vec![0; 4 << 20];
    publish_files(
        &store,
        ("large", 1),
        &[("model.onnx", network), ("weights", &large)],
        false,
    );
    let mounting = format!("mount -t tmpfs -o size=1m tmpfs '{}'", cache.display());
    let Some(mut command) = mounted(&mounting) else {
        return;
    };
    command
        .env(
            "DENOISED__MODELS__REPOSITORY",
            format!("file://{}", store.display()),
        )
        .env("DENOISED__MODELS__CACHE", &cache);
    let server = Serving::start_with(&mut command);
    let url = format!("http://{}", server.address);
    let output = denoised()
        .args(["generate", "--server", &url, "--model", "fits"])
        .args(["--length", "8", "--steps", "2", "--json"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    let models = denoised().args(["models", "--server", &url]).output().unwrap();
    let models = String::from_utf8_lossy(&models.stdout).into_owned();
    let refused = models.lines().find(|line| line.contains("large")).unwrap();
    assert!(refused.contains("No space left on device"), "{models}");
    let (_, _, metrics) = get(&url, "/metrics").await;
    assert!(metrics.contains("denoised_refused_versions 1"), "{metrics}");
    let (code, log) = server.stop();
    assert_eq!(code, Some(0), "{log}");
    let told = log
        .lines()
        .filter(|line| line.contains("No space left on device"));
    assert_eq!(told.count(), 1, "{log}");
}

#[test]
fn a_taken_port_is_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = denoised().args(["serve", "--listen", &address]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(70), "{error}");
    assert!(
        error.contains(&address) && error.contains("in use") && error.trim().lines().count() == 1,
        "{error}"
    );
}

/// It would start, and every request would fail.
#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_the_binary_cannot_use_is_one_line() {
    let output = denoised()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--device",
            "cpu",
            "--device",
            "cuda:1",
        ])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64), "{error}");
    assert!(
        error.contains("engine.devices has cuda:1") && error.trim().lines().count() == 1,
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_server_that_drains() {
    let mut command = denoised();
    command
        .env("DENOISED__SERVER__DRAIN_GRACE_SECONDS", "600")
        .env("DENOISED__SERVER__MODEL_CONTROL", "admins");
    let server = Serving::start_with(&mut command);
    let url = format!("http://{}", server.address);
    let mut asking = denoised()
        .args(["generate", "--server", &url, "--retries", "0", "--json"])
        .args(["--steps", "4096", "--num-samples", "64"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = async |reached: &dyn Fn(u16, &str) -> bool, path: &str| {
        let reaching = async {
            loop {
                let (status, _, body) = get(&url, path).await;
                if reached(status, &body) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reaching)
            .await
            .unwrap();
    };
    until(
        &|_, metrics| metrics.contains("denoised_running_requests 1"),
        "/metrics",
    )
    .await;
    server.terminate();
    until(&|status, _| status == 503, "/readyz").await;
    let load = denoised()
        .args(["load", "world-english", "--server", &url])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&load.stderr).into_owned();
    assert_eq!(load.status.code(), Some(69), "{error}");
    assert!(error.contains("shutting down"), "{error}");
    // It would go on for as long as the request takes, which is many minutes.
    let (code, _) = server.stop();
    assert_eq!(code, Some(130));
    assert!(!asking.wait().unwrap().success());
}

/// A store that is a folder, so that nothing but the cache is in the way.
#[test]
fn a_cache_that_cannot_be_used_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (store, file) = (folder.path().join("store"), folder.path().join("file"));
    std::fs::create_dir(&store).unwrap();
    std::fs::write(&file, "no folder").unwrap();
    for (cache, says) in [
        (file.clone(), "file"),
        (file.join("below"), "below"),
        ("/proc/denoised".into(), "/proc/denoised"),
    ] {
        let output = denoised()
            .args(["serve", "--listen", "127.0.0.1:0"])
            .env(
                "DENOISED__MODELS__REPOSITORY",
                format!("file://{}", store.display()),
            )
            .env("DENOISED__MODELS__CACHE", cache)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{error}");
        assert!(
            error.contains("models.repository: ") && error.contains(says),
            "{error}"
        );
        assert_eq!(error.trim().lines().count(), 1, "{error}");
    }
}

/// Hundredths of a second that processors have worked for a server, and for the system on its behalf (proc(5)).
#[cfg(target_os = "linux")]
fn ticks(server: &Serving) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.id())).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    fields[11..13]
        .iter()
        .map(|ticks| ticks.parse::<u64>().unwrap())
        .sum()
}

/// With a repository to look at and without one, whose models may be ordered to come and go or not.
#[cfg(target_os = "linux")]
#[test]
fn a_server_that_has_nothing_to_do_does_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for (repository, control) in [
        ("", "nobody"),
        ("", "admins"),
        (folder.path().to_str().unwrap(), "nobody"),
    ] {
        let mut command = denoised();
        command
            .env("DENOISED__MODELS__REPOSITORY", repository)
            .env("DENOISED__MODELS__POLL_SECONDS", "1")
            .env("DENOISED__SERVER__MODEL_CONTROL", control);
        let server = Serving::start_with(&mut command);
        // It has its model to load first.
        let is_quiet = (0..30).any(|_| {
            let before = ticks(&server);
            std::thread::sleep(Duration::from_secs(1));
            ticks(&server) - before < 10
        });
        assert!(
            is_quiet,
            "it works without end, with repository {repository:?} and control {control}"
        );
    }
}
