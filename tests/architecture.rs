//! Who may know whom: the arrows of the README's table, read off the sources of both packages.

use std::fs;
use std::path::{Path, PathBuf};

/// A part of a package, the parts that it may name, and words that none of its files may hold.
struct Part {
    folder: &'static str,
    may_use: &'static [&'static str],
    never: &'static [&'static str],
}

const ASYNC_AND_WIRE: [&str; 5] = ["tokio::", "tonic::", "tonic_health::", "prost::", "hyper::"];

const ROOT: [Part; 15] = [
    Part {
        folder: "diffusion",
        may_use: &[],
        never: &[
            "tokio::",
            "tonic::",
            "tonic_health::",
            "prost::",
            "ort::",
            "tracing::",
            "std::fs",
            "std::thread",
            "std::time",
        ],
    },
    Part {
        folder: "bundle",
        may_use: &["diffusion"],
        never: &["tokio::", "tonic::", "tonic_health::", "prost::", "ort::"],
    },
    Part {
        folder: "network",
        may_use: &["diffusion", "bundle"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "store.rs",
        may_use: &[],
        never: &["tonic::", "tonic_health::", "prost::", "hyper::"],
    },
    Part {
        folder: "sync.rs",
        may_use: &[],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "allocator.rs",
        may_use: &[],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "models",
        may_use: &["diffusion", "bundle", "network", "sync"],
        // `tokio::sync::watch` is how the outside hears of states.
        never: &[
            "tonic::",
            "tonic_health::",
            "prost::",
            "ort::",
            "tokenizers::",
            "tokio::spawn",
            "tokio::net",
        ],
    },
    Part {
        folder: "engine",
        may_use: &["diffusion", "bundle", "network", "models", "sync"],
        // `tokio::sync::watch` is how the outside sees progress.
        never: &[
            "tonic::",
            "tonic_health::",
            "prost::",
            "ort::",
            "tokenizers::",
            "tokio::spawn",
            "tokio::net",
        ],
    },
    Part {
        folder: "client",
        may_use: &["proto"],
        never: &["ort::", "tracing::"],
    },
    Part {
        folder: "proto",
        may_use: &[],
        never: &["tokio::", "ort::"],
    },
    Part {
        folder: "telemetry.rs",
        may_use: &["config"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "telemetry",
        may_use: &["config"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "config.rs",
        may_use: &["network", "store"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "server",
        may_use: &[
            "proto",
            "engine",
            "models",
            "diffusion",
            "bundle",
            "network",
            "config",
            "store",
        ],
        never: &["ort::", "std::process"],
    },
    Part {
        folder: "cli",
        may_use: &[
            "client",
            "proto",
            "server",
            "config",
            "telemetry",
            "network",
            "allocator",
        ],
        never: &["ort::"],
    },
];

/// As above, for `training`; what the commands are made of may know all of it.
const TRAINING: [Part; 11] = [
    Part {
        folder: "model",
        may_use: &["random"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "loss",
        may_use: &["model", "random"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "data",
        may_use: &["random", "say"],
        never: &["tokio::", "burn::"],
    },
    Part {
        folder: "optim",
        may_use: &["model", "config"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "evaluate",
        may_use: &["data", "loss", "model", "parallel", "random"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "fit",
        // A mirror is written as bundles are published.
        may_use: &[
            "config", "data", "loss", "model", "optim", "evaluate", "publish", "random", "say",
        ],
        never: &["tonic::", "prost::", "ort::"],
    },
    Part {
        folder: "export",
        may_use: &["data", "model", "random"],
        never: &["tokio::", "tonic::", "ort::"],
    },
    Part {
        folder: "import",
        may_use: &["model"],
        never: &ASYNC_AND_WIRE,
    },
    Part {
        folder: "publish",
        may_use: &[],
        never: &["tonic::", "prost::", "ort::", "burn::"],
    },
    Part {
        folder: "report",
        may_use: &["fit"],
        never: &["tokio::", "burn::"],
    },
    Part {
        folder: "config.rs",
        may_use: &["loss", "model"],
        never: &ASYNC_AND_WIRE,
    },
];

/// The code of a file, without comments, strings' worth of trouble and its tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let before_tests = text.split("#[cfg(test)]\n").next().unwrap_or_default();
    let is_code = |line: &&str| !line.trim_start().starts_with("//");
    before_tests
        .lines()
        .filter(is_code)
        .collect::<Vec<_>>()
        .join("\n")
}

fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap();
    let mut files: Vec<PathBuf> = entries.flat_map(|entry| files(&entry.unwrap().path())).collect();
    files.retain(|file| {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        file.extension().is_some_and(|e| e == "rs") && name != "tests" && !name.ends_with("_test")
    });
    files
}

/// The parts that `code` names after `prefix`, such as `crate::`.
fn named<'a>(code: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    code.match_indices(prefix)
        // Not the end of a longer path or word.
        .filter(|(at, _)| !code[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'))
        .map(move |(at, _)| {
            let rest = &code[at + prefix.len()..];
            let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
            &rest[..end.unwrap_or(rest.len())]
        })
}

fn holds(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        word.starts_with('.') || !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
    })
}

/// Adds to `wrong` whom the files of `parts` in `folder` name and must not; returns how many files were read.
fn read(parts: &[Part], folder: &str, wrong: &mut Vec<String>) -> usize {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = 0;
    for part in parts {
        let own = part.folder.trim_end_matches(".rs");
        for file in files(&root.join(folder).join(part.folder)) {
            seen += 1;
            let (code, file) = (
                code(&file),
                file.strip_prefix(root).unwrap().display().to_string(),
            );
            for other in named(&code, "crate::") {
                if other != own && !part.may_use.contains(&other) {
                    wrong.push(format!("{file} uses crate::{other}"));
                }
            }
            for word in part.never.iter().filter(|word| holds(&code, word)) {
                wrong.push(format!("{file} uses {word}"));
            }
        }
    }
    seen
}

#[test]
fn nobody_knows_whom_the_readme_says_it_does_not() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    let seen = read(&ROOT, "src", &mut wrong);
    assert!(seen > 60, "{seen} files were read");
    let seen = read(&TRAINING, "training/src", &mut wrong);
    assert!(seen > 50, "{seen} files were read");
    for file in files(&root.join("training/src")) {
        let (code, file) = (
            code(&file),
            file.strip_prefix(root).unwrap().display().to_string(),
        );
        for other in named(&code, "denoised::") {
            if !["diffusion", "bundle", "network", "store"].contains(&other) {
                wrong.push(format!("{file} uses denoised::{other}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Networks are run where passes are, and made where models are loaded; proto types end at the server.
#[test]
fn few_files_touch_networks_and_the_proto() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let who = |folder: &str, word: &str| -> Vec<String> {
        let all = files(&root.join(folder)).into_iter();
        let mut who: Vec<String> = all
            .filter(|file| holds(&code(file), word))
            .map(|file| file.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        who.sort();
        who
    };
    assert_eq!(who("engine", ".log_score("), ["pass"]);
    assert_eq!(who("engine", ".network()"), ["worker"]);
    assert_eq!(who("models", ".network("), ["sessions"]);
    assert_eq!(who("network", "ort::"), ["onnx", "prepared", "runtime"]);
    assert_eq!(
        who("engine", "SamplerKind::"),
        Vec::<String>::new(),
        "the engine knows no sampler by name"
    );
}
