//! Runs whose checkpoints are copied elsewhere: they survive their machine, and so do the copies.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{config, config_file, prepared};
use crate::fit::{changed, failed, fit, metrics, same_weights, signal, started_until, succeeded};
use training::fit::checkpoint;
use training::fit::mirror::Mirror;
use training::fit::record::{Line, read_provenance};

#[test]
fn a_run_survives_its_machine() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let mirrored = |steps: u64| {
        let file = config_file(root, "run", steps);
        let setting = format!("mirror = \"{}\"\nseed = 1", root.join("mirror").display());
        changed(
            &file,
            &[
                ("seed = 1", &setting),
                ("checkpoint_every = 10", "checkpoint_every = 5"),
                (
                    "validate_every = 1000",
                    "validate_every = 1000\nsample_every = 10",
                ),
            ],
        )
    };
    let directory = config(root, "run", 1).run.directory;
    succeeded(&fit(&mirrored(20)).output().unwrap());
    let mirror = Mirror::open(root.join("mirror").to_str().unwrap()).unwrap();
    let copies = || mirror.steps().unwrap();
    assert_eq!(copies(), [15, 20]);
    // Half of a copy, which was never finished.
    fs::create_dir(root.join("mirror/checkpoints/00000099")).unwrap();
    fs::write(root.join("mirror/checkpoints/00000099/network.bpk"), "half").unwrap();

    fs::remove_dir_all(&directory).unwrap();
    let error = failed(&fit(&mirrored(40)).output().unwrap());
    assert!(
        error.contains("run.mirror") && error.contains("--resume fetches it"),
        "{error}"
    );
    assert_eq!(
        copies(),
        [15, 20],
        "a run that begins removes no other's checkpoints"
    );
    fs::remove_dir_all(&directory).unwrap();
    succeeded(&fit(&mirrored(40)).arg("--resume-if-any").output().unwrap());
    assert_eq!(copies(), [35, 40]);
    let provenance = read_provenance(&root.join("mirror")).unwrap();
    let from: Vec<u64> = provenance
        .sessions
        .iter()
        .map(|session| session.from_step)
        .collect();
    assert_eq!(from, [0, 20], "both machines are known");
    for place in [directory.join("samples"), root.join("mirror/samples")] {
        for sample in ["00000010.txt", "00000030.txt"] {
            assert!(place.join(sample).exists(), "{sample} in {}", place.display());
        }
    }
    assert!(root.join("mirror/config.toml").exists());
    let steps: Vec<u64> = metrics(&directory).iter().map(Line::step).collect();
    assert!(steps.contains(&10) && steps.contains(&40), "{steps:?}");

    succeeded(
        &fit(&changed(&config_file(root, "whole", 40), &[]))
            .output()
            .unwrap(),
    );
    same_weights(&config(root, "whole", 1).run.directory, &directory, 40);

    // Where there is nothing to do, that is said, and nothing is given up.
    let idle = fit(&mirrored(40)).arg("--resume").output().unwrap();
    succeeded(&idle);
    let said = String::from_utf8(idle.stderr).unwrap();
    assert!(said.contains("nothing to do: 40 of 40 steps are done"), "{said}");
    for arguments in [["--resume-from", "40"], ["--until-minutes", "0.0001"]] {
        let mut command = fit(&mirrored(40));
        command.args(arguments);
        if arguments[0] == "--until-minutes" {
            command.args(["--resume-from", "35"]);
        }
        let error = failed(&command.output().unwrap());
        assert!(error.contains("nothing to do after step"), "{error}");
        assert_eq!(checkpoint::steps(&directory), [35, 40]);
    }
    // To go back is to give up what came later, here as there.
    succeeded(&fit(&mirrored(40)).args(["--resume-from", "35"]).output().unwrap());
    assert_eq!(copies(), [35, 40]);
    // Another run, which never was here.
    let setting = format!("seed = 1\nmirror = \"{}\"", root.join("mirror").display());
    let other = changed(&config_file(root, "whole", 50), &[("seed = 1", &setting)]);
    let error = failed(&fit(&other).arg("--resume").output().unwrap());
    assert!(error.contains("of another run"), "{error}");
    assert_eq!(copies(), [35, 40]);
}

#[test]
fn a_damaged_copy_is_passed_over_and_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let place = root.join("mirror");
    let mirror = Mirror::open(place.to_str().unwrap()).unwrap();
    let setting = format!("mirror = \"{}\"\nseed = 1", place.display());
    let mirrored = |steps| {
        let keep = ("checkpoint_every = 10", "checkpoint_every = 5\nkeep = 2");
        changed(&config_file(root, "run", steps), &[("seed = 1", &setting), keep])
    };
    succeeded(&fit(&mirrored(10)).output().unwrap());
    let state = |step: u64| place.join(format!("checkpoints/{step:08}/state.json"));
    fs::write(state(10), "{").unwrap();
    assert_eq!(mirror.steps().unwrap(), [5]);
    fs::remove_dir_all(config(root, "run", 1).run.directory).unwrap();
    let resumed = fit(&mirrored(15)).arg("--resume").output().unwrap();
    succeeded(&resumed);
    let said = String::from_utf8(resumed.stderr).unwrap();
    assert!(said.contains("state.json is damaged and passed over"), "{said}");
    assert_eq!(mirror.steps().unwrap(), [10, 15]);

    // Where nothing else is, it is still somebody's.
    for step in [10, 15] {
        fs::write(state(step), "{").unwrap();
    }
    fs::remove_dir_all(config(root, "run", 1).run.directory).unwrap();
    let error = failed(&fit(&mirrored(20)).output().unwrap());
    assert!(
        error.contains("already holds checkpoints, the last of step 15"),
        "{error}"
    );
}

#[test]
fn a_mirror_that_is_away_ends_no_run_and_catches_up() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let (disk, unplugged) = (root.join("disk"), root.join("unplugged"));
    let place = disk.join("mirror");
    let setting = format!("mirror = \"{}\"\nseed = 1", place.display());
    let file = changed(
        &config_file(root, "run", 1_000_000),
        &[
            ("seed = 1", &setting),
            ("checkpoint_every = 10", "checkpoint_every = 5\nkeep = 1"),
        ],
    );
    let mut child = started_until(&mut fit(&file), 10);
    let directory = config(root, "run", 1).run.directory;
    let mirror = Mirror::open(place.to_str().unwrap()).unwrap();
    let last = |steps: Vec<u64>| steps.last().copied().unwrap_or_default();
    let mut wait = |reached: &dyn Fn() -> bool| {
        let started = Instant::now();
        while !reached() {
            assert!(started.elapsed() < Duration::from_secs(60), "nothing comes of it");
            assert!(child.try_wait().unwrap().is_none(), "the run has ended");
            thread::sleep(Duration::from_millis(20));
        }
    };
    wait(&|| place.join("checkpoints").exists());
    fs::rename(&disk, &unplugged).unwrap();
    // Nothing can be made here.
    fs::write(&disk, "no folder").unwrap();
    let before = last(checkpoint::steps(&directory));
    wait(&|| last(checkpoint::steps(&directory)) >= before + 10);
    fs::remove_file(&disk).unwrap();
    fs::rename(&unplugged, &disk).unwrap();
    wait(&|| last(mirror.steps().unwrap()) > before);
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success());
    assert_eq!(mirror.steps().unwrap(), checkpoint::steps(&directory));
}
