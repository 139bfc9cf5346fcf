//! Which requests a load is made of.

use std::path::Path;

use clap::Parser;

use super::super::asked::Asked;
use super::super::{Failed, input};
use crate::client::Request;
use crate::proto::v1::{FramePolicy, frame_policy};

/// Requests of a mix, at most.
const MOST: usize = 10_000;

/// Requests with their weights.
#[derive(Clone, Debug)]
pub(super) struct Mix {
    /// Each with the sum of the weights up to its own.
    requests: Vec<(f64, Request)>,
}

/// A line of a mix.
#[derive(Debug, Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Line {
    /// How often it is chosen, beside the others.
    weight: f64,
    #[command(flatten)]
    asked: Asked,
    /// The prompt, or the template.
    text: Option<String>,
}

impl Line {
    fn request(self, what: What, no_frames: bool) -> Result<Request, Failed> {
        let (text, frames) = (self.text.unwrap_or_default(), frames(no_frames));
        Ok(match what {
            What::Generate => self.asked.continuing(text, frames)?.into(),
            What::Infill => self.asked.filling(&text, frames)?.into(),
        })
    }
}

/// The command that a line would be.
#[derive(Clone, Copy)]
enum What {
    Generate,
    Infill,
}

/// Takes the command out of the words of a line, where it stands after the weight.
fn what(words: &mut Vec<String>) -> What {
    let what = match words.get(1).map(String::as_str) {
        Some("generate") => What::Generate,
        Some("infill") => What::Infill,
        _ => return What::Generate,
    };
    words.remove(1);
    what
}

impl Mix {
    /// One request, always.
    pub(super) fn of(asked: &Asked, text: String, no_frames: bool) -> Result<Self, Failed> {
        let request = asked.continuing(text, frames(no_frames))?;
        Ok(Self {
            requests: vec![(1.0, request.into())],
        })
    }

    /// The requests of a file; empty lines and those that begin with # are none.
    pub(super) fn read(file: &Path, no_frames: bool) -> Result<Self, Failed> {
        let text = input::read(file)?;
        let mut requests = Vec::new();
        let mut sum = 0.0;
        for (line, number) in text.lines().zip(1..) {
            if line.trim().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            let wrong = |problem: String| {
                // The first line says what is wrong, those after it how the command is used.
                let problem = problem.lines().next().unwrap_or_default();
                let problem = problem.trim_start_matches("error: ").to_owned();
                Failed::usage(format!("--mix {}: line {number}: {problem}", file.display()))
            };
            let mut words = shlex::split(line).ok_or_else(|| wrong("a quotation does not end".to_owned()))?;
            let what = what(&mut words);
            let line = Line::try_parse_from(words).map_err(|e| wrong(e.to_string()))?;
            let weight = line.weight;
            if !(weight > 0.0 && weight <= 1e9) {
                return Err(wrong("the weight must be above 0, at most 1000000000".to_owned()));
            }
            let request = line.request(what, no_frames);
            sum += weight;
            requests.push((sum, request.map_err(|failed| wrong(failed.message))?));
            if requests.len() > MOST {
                return Err(wrong(format!("there are more than {MOST} requests")));
            }
        }
        if requests.is_empty() {
            return Err(Failed::usage(format!("--mix {}: has no request", file.display())));
        }
        Ok(Self { requests })
    }

    /// The request that `share`, in [0, 1), of all weights stands for, as the `number`th: seeds count on.
    pub(super) fn request(&self, share: f64, number: u64) -> Option<Request> {
        let (all, _) = self.requests.last()?;
        let index = self.requests.partition_point(|(sum, _)| *sum <= share * all);
        let (_, request) = self.requests.get(index).or(self.requests.last())?;
        let mut request = request.clone();
        let sampling = match &mut request {
            Request::Generate(asked) => &mut asked.sampling,
            Request::Infill(asked) => &mut asked.sampling,
        };
        if let Some(seed) = sampling.as_mut().and_then(|sampling| sampling.seed.as_mut()) {
            *seed = seed.wrapping_add(number);
        }
        Some(request)
    }
}

fn frames(no_frames: bool) -> FramePolicy {
    let when = if no_frames {
        frame_policy::When::Never
    } else {
        frame_policy::When::OnChange
    };
    FramePolicy {
        when: when.into(),
        ..FramePolicy::default()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Mix, Failed> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Mix::read(file.path(), true)
    }

    #[test]
    fn requests_are_chosen_by_weight_and_seeds_count_on() {
        let mix = "# three kinds\n\n1 --length 16 --seed 5 'a b'\n2 generate --length 64\n1 infill --seed 1 'a [[4]] b'\n";
        let mix = read(mix).unwrap();
        let chosen = |share| match mix.request(share, 2).unwrap() {
            Request::Generate(request) => (request.length, request.sampling.unwrap().seed),
            Request::Infill(request) => {
                assert_eq!(request.template.len(), 3);
                (None, request.sampling.unwrap().seed)
            }
        };
        assert_eq!(chosen(0.0), (Some(16), Some(7)));
        assert_eq!(chosen(0.24), (Some(16), Some(7)));
        assert_eq!(chosen(0.26), (Some(64), None));
        assert_eq!(chosen(0.74), (Some(64), None));
        assert_eq!(chosen(0.9999), (None, Some(3)));
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, says) in [
            ("", "has no request"),
            ("1\nx --length 4", "line 2"),
            ("1 --lenght 4", "--lenght"),
            ("0 --length 4", "the weight must be"),
            ("nan", "the weight must be"),
            ("1 'a", "does not end"),
            ("1 infill --length 4 'a [[4]]'", "--length: a template's"),
            ("1 infill 'a [[4'", "line 1: template: "),
            ("1 --entropy-bound 1 --sampler tweedie", "--entropy-bound is for"),
        ] {
            let problem = read(text).unwrap_err().message;
            assert!(
                problem.contains(says) && problem.lines().count() == 1,
                "{text}: {problem}"
            );
        }
    }
}
