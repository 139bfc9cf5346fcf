//! The book (`deploy/docs`): what it shows runs, what it links to is there, and what is written from the code is as written.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::binary::Serving;
use crate::clients::installed;
use crate::readme;
use crate::support::{python, skipped};

fn book() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/docs")
}

/// The chapters by name, with their text.
fn chapters() -> Vec<(String, String)> {
    let files = std::fs::read_dir(book().join("src"))
        .unwrap()
        .map(|file| file.unwrap().path());
    let mut chapters: Vec<(String, String)> = files
        .filter(|path| path.extension().is_some_and(|kind| kind == "md"))
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read_to_string(path).unwrap())
        })
        .collect();
    chapters.sort();
    chapters
}

/// The blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let opens = format!("```{language}\n");
    let blocks = text.split(opens.as_str()).skip(1);
    blocks.filter_map(|rest| rest.split("```").next()).collect()
}

/// The anchors of a chapter's headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let words = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = words
            .chars()
            .filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-');
        kept.collect::<String>().replace(' ', "-")
    };
    headings.map(anchor).collect()
}

#[test]
fn every_chapter_is_in_the_contents_and_every_link_leads_somewhere() {
    let chapters = chapters();
    let contents = &chapters.iter().find(|(name, _)| name == "SUMMARY.md").unwrap().1;
    for (name, text) in &chapters {
        assert!(
            name == "SUMMARY.md" || contents.contains(&format!("({name})")),
            "{name} is not in SUMMARY.md"
        );
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.starts_with("http")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let file = if file.is_empty() { name } else { file };
            assert!(book().join("src").join(file).exists(), "{name}: {link}");
            if !anchor.is_empty() {
                let (_, linked) = chapters.iter().find(|(other, _)| other == file).unwrap();
                assert!(anchors(linked).contains(anchor), "{name}: {link}");
            }
        }
    }
}

#[test]
fn every_command_of_the_book_runs() {
    let server = Serving::start();
    let mut ran = 0;
    for (name, text) in chapters() {
        let folder = readme::folder();
        for block in blocks(&text, "console") {
            for command in block.lines().filter_map(|line| line.strip_prefix("$ ")) {
                // What builds and trains is run by other tests, and a server stays.
                let others = ["make ", "cargo build ", "training ", "denoised serve"];
                let is_call = command.starts_with("grpcurl ");
                if others.iter().any(|start| command.starts_with(start))
                    || (is_call && crate::foreign_client::grpcurl().is_none())
                {
                    continue;
                }
                assert!(is_call || command.starts_with("denoised "), "{name}: {command}");
                let output = readme::run(command, &server, &folder);
                let error = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{name}: {command}: {error}");
                ran += 1;
            }
        }
    }
    assert!(ran >= 20, "{ran}");
}

#[test]
fn the_python_of_the_book_runs() {
    let Some((_folder, command)) = installed("grpc_tools") else {
        return;
    };
    let server = Serving::start();
    for (name, text) in chapters() {
        for block in blocks(&text, "python") {
            let block = block.replace("127.0.0.1:50051", &server.address);
            let mut run = if block.contains("import OpenAI") {
                match python("openai", "openai") {
                    Some(python) => Command::new(python),
                    None => continue,
                }
            } else {
                let mut run = Command::new(command.get_program());
                run.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
                run
            };
            let output = run.args(["-c", &block]).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(
                output.status.success() && output.stdout.len() > 10,
                "{name}: {block}: {error}"
            );
        }
    }
}

#[test]
fn what_is_made_is_as_it_is_made() {
    let read = |path: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    assert!(
        read("deploy/docs/src/measured.svg") == read("src/diffusion/sampler/measured.svg"),
        "deploy/docs/src/measured.svg is an old one"
    );
    let api = Command::new("python3")
        .arg(book().join("api.py"))
        .arg("proto")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    match api {
        Ok(api) if api.status.success() => assert!(
            api.stdout == read("deploy/docs/src/api.md"),
            "deploy/docs/src/api.md is not what the protos say (make docs)"
        ),
        Ok(api) => panic!("{}", String::from_utf8_lossy(&api.stderr)),
        Err(error) => skipped(format_args!(
            "python3: {error}: the chapter on the API was not written again"
        )),
    }
}
