//! Several runs over each other, on one HTML page.

use std::path::Path;

use super::curves::{Drawing, Series};
use super::error::ReportError;
use super::{name_of, page};
use crate::fit::record::{self, Line};
use maud::{Markup, PreEscaped, html};

/// What runs are held against each other by: what is drawn, over what.
const DRAWINGS: [(&str, &str); 4] = [
    ("Smoothed training loss over tokens", "million tokens"),
    ("Smoothed training loss over time", "minutes"),
    ("Bound on held-out text over tokens", "million tokens"),
    ("Bound on held-out text over time", "minutes"),
];

/// The page of the runs in `directories`, at least one.
///
/// Losses of different objectives, and bounds of different tokenizers or texts, say nothing about each other.
pub fn compare<P: AsRef<Path>>(directories: &[P]) -> Result<String, ReportError> {
    if directories.is_empty() {
        return Err(ReportError::NoRuns);
    }
    let mut lines: [Vec<(String, Series)>; DRAWINGS.len()] = Default::default();
    for directory in directories {
        let directory = directory.as_ref();
        let name = name_of(directory);
        let mut series: [Series; DRAWINGS.len()] = Default::default();
        record::read(directory, |line| {
            let (first, tokens, seconds, value) = match line {
                Line::Step(line) => (0, line.tokens, line.seconds, line.smoothed_loss),
                Line::Validation(line) => (2, line.tokens, line.seconds, line.bound),
            };
            series[first].push(tokens as f64 / 1e6, value);
            series[first + 1].push(seconds / 60.0, value);
        })
        .map_err(ReportError::no_run(directory))?;
        for (lines, series) in lines.iter_mut().zip(series) {
            lines.push((name.clone(), series));
        }
    }
    let drawn: Vec<(&str, Option<String>)> = DRAWINGS
        .into_iter()
        .zip(lines)
        .map(|((title, x), lines)| Ok((title, Drawing::of_lines(title, x, "nats/token", lines).svg()?)))
        .collect::<Result<_, ReportError>>()?;
    let title = format!("{} training runs", directories.len());
    let body: Markup = html! {
        @for (title, svg) in &drawn {
            @if let Some(svg) = svg {
                figure { h3 { (title) } (PreEscaped(svg)) }
            }
        }
    };
    Ok(page(&title, &body).into_string())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn runs_share_their_drawings_and_names_are_escaped() {
        let folder = tempfile::tempdir().unwrap();
        let run = |name: &str, loss: f64| {
            let run = folder.path().join(name);
            fs::create_dir(&run).unwrap();
            let step = |step: u64| {
                format!(
                    "{{\"kind\":\"step\",\"step\":{step},\"tokens\":{},\"seconds\":{step},\"loss\":{loss},\"smoothed_loss\":{loss},\
                     \"gradient_norm\":1,\"learning_rate\":0.1,\"tokens_per_second\":9}}\n",
                    1000 * step
                )
            };
            fs::write(run.join("metrics.jsonl"), (1..20).map(step).collect::<String>()).unwrap();
            run
        };
        let runs = [run("a <b>", 3.0), run("other", 2.0)];
        let page = compare(&runs).unwrap();
        // Of the loss, over tokens and over time: nothing was validated.
        assert_eq!(page.matches("<svg ").count(), 2, "{page}");
        assert!(page.contains("a &lt;b&gt;") && !page.contains("a <b>"), "{page}");
        assert_eq!(page.matches("other").count(), 2);
        assert!(page.contains("million tokens") && page.contains("minutes"));
        let error = compare(&[folder.path()]).unwrap_err();
        assert!(
            format!("{error:#}").contains("no directory of a run"),
            "{error:#}"
        );
    }
}
