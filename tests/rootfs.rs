//! What an image holds, without a container engine: laid out by the script that the Containerfile runs, and started from
//! there with nothing else in sight.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::binary::denoised;
use crate::support::{may_mount, skipped};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/rootfs.sh");
/// Who runs it in an image.
const USER: &str = "65532";

/// Bytes of all files below `folder`.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                size(&entry.path())
            } else {
                entry.metadata().unwrap().size()
            }
        })
        .sum()
}

/// `denoised` with these arguments, in a root of its own that it cannot write to.
fn inside(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    let root = root.to_str().unwrap();
    // A mount of its own, so that nothing is left of it.
    let script = format!(
        "mount --bind -o ro '{root}' '{root}' && mount -o remount,ro,bind '{root}' && exec chroot --userspec={USER}:{USER} '{root}' \"$@\""
    );
    command
        .args(["--mount", "bash", "-c", &script, "bash", "/usr/bin/denoised"])
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .env("ORT_DYLIB_PATH", "/usr/lib/denoised/libonnxruntime.so");
    command
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn the_image_starts_serves_is_probed_and_drains() {
    if !may_mount() {
        skipped("no mounts of one's own are allowed here: what an image holds was not run");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let laid_out = |out: &str, with: &[&str]| {
        let out = folder.path().join(out);
        let output = Command::new(SCRIPT)
            .arg(env!("CARGO_BIN_EXE_denoised"))
            .arg(std::env::var_os("ORT_DYLIB_PATH").unwrap())
            .arg(&out)
            .args(with)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        out
    };
    let own = size(&laid_out("image", &[]));
    assert!(own < 120 << 20, "{} MB", own >> 20);

    let root = laid_out("root", &["--with-base"]);
    // As a container engine makes it: others may enter.
    Command::new("chmod")
        .arg("755")
        .arg(folder.path())
        .status()
        .unwrap();
    let mut child = inside(&root, &["serve", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let mut running = Running(child);
    let Some((_, url)) = line.trim().split_once("listening on ") else {
        let mut log = String::new();
        std::io::Read::read_to_string(&mut running.0.stderr.take().unwrap(), &mut log).unwrap();
        panic!("it did not start: {line} {log}");
    };
    let id = running.0.id();
    let uid = std::fs::metadata(format!("/proc/{id}")).unwrap().uid();
    assert_eq!(uid.to_string(), USER);

    let probe = |url: &str| {
        let output = inside(&root, &["probe", "--server", url]).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    // The demo model is loaded meanwhile, and stands for itself.
    let (code, error) = probe(url);
    assert_eq!(code, Some(0), "{error}");
    let written = denoised()
        .args([
            "generate",
            "--server",
            url,
            "--length",
            "24",
            "--steps",
            "8",
            "In the beginning",
        ])
        .output()
        .unwrap();
    assert!(
        written.status.success(),
        "{}",
        String::from_utf8_lossy(&written.stderr)
    );
    assert!(String::from_utf8_lossy(&written.stdout).contains("In the beginning"));

    Command::new("kill")
        .args(["-TERM", &id.to_string()])
        .status()
        .unwrap();
    assert_eq!(running.0.wait().unwrap().code(), Some(0));
    let (code, error) = probe(url);
    assert_eq!(code, Some(69), "{error}");
    // Where it listens, its own settings say.
    let own = inside(&root, &["probe"])
        .env(
            "DENOISED__SERVER__LISTEN",
            format!("0.0.0.0:{}", url.rsplit(':').next().unwrap()),
        )
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&own.stderr);
    assert!(own.status.code() == Some(69) && error.contains(url), "{error}");
}
