//! The walk of `training/README.md`, every command as it is written there, in a shell.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use crate::common::denoised;

const BEGIN: &str = "<!-- walkthrough";
const END: &str = "<!-- end of the walkthrough -->";

/// The commands of the marked part.
fn commands(readme: &str) -> Vec<&str> {
    let walk = readme.split_once(BEGIN).unwrap().1.split_once(END).unwrap().0;
    walk.lines().filter_map(|line| line.strip_prefix("$ ")).collect()
}

#[test]
fn every_command_works_as_written() {
    let training = Path::new(env!("CARGO_BIN_EXE_training"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let denoised = denoised();
    let readme = fs::read_to_string(root.join("training/README.md")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();

    // Programs are those of this build; the rest of the repository is as small as it may be.
    let programs = here.join("target/release");
    fs::create_dir_all(&programs).unwrap();
    symlink(training, programs.join("training")).unwrap();
    fs::create_dir_all(here.join("training/configs")).unwrap();
    fs::copy(
        root.join("training/configs/laptop.toml"),
        here.join("training/configs/laptop.toml"),
    )
    .unwrap();
    fs::create_dir(here.join("texts")).unwrap();
    // A few thousand bytes each of what is at hand.
    let source = [
        include_str!("fit.rs"),
        include_str!("mirror.rs"),
        include_str!("chain.rs"),
        include_str!("publish.rs"),
    ]
    .concat();
    // Enough of them for some to be held out.
    for index in 0..80 {
        let text: String = source.chars().skip(300 * index).take(3000).collect();
        fs::write(here.join(format!("texts/{index}.txt")), text).unwrap();
    }

    let mut script = "set -euo pipefail\n".to_owned();
    let mut run = 0;
    for command in commands(&readme) {
        // Already built, and there is no git here.
        if command.starts_with("cargo ") || command.contains("git ls-files") {
            continue;
        }
        if command.starts_with("denoised ") && denoised.is_none() {
            continue;
        }
        run += 1;
        script.push_str(command);
        script.push('\n');
    }
    if let Some(denoised) = denoised {
        symlink(denoised, programs.join("denoised")).unwrap();
    }
    assert!(run >= 8, "{script}");
    let output = Command::new("bash")
        .args(["-c", &script])
        .current_dir(here)
        // Seconds in place of minutes.
        .env("TRAINING__RUN__STEPS", "6")
        .env("TRAINING__RUN__BATCH_SIZE", "4")
        .env("TRAINING__RUN__LOG_EVERY", "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{script}\n{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    for made in [
        "runs/mine/report.html",
        "runs/mine/loss.svg",
        "models/mine/1/model.onnx",
    ] {
        assert!(here.join(made).is_file(), "{made}");
    }
}
