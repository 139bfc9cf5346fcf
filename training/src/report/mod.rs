//! A run as one HTML page that needs nothing else: no script, no network, no other file.
//!
//! It is made of the files that [`record`] lists, while the run goes on or later.
//! Everything on it is escaped by its template, but for the drawings, which [`curves`]
//! makes of numbers alone.

mod comparison;
pub mod curves;
mod error;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::SystemTime;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::fit::FileError;
use crate::fit::record::{
    self, CONFIG, DataFile, Line, Provenance, SAMPLES, StepRecord, ValidationRecord, read_provenance,
    sample_name, sample_steps,
};
pub use comparison::compare;
use curves::{Curves, Panel};
pub use error::ReportError;

/// The page's name in a run's directory.
pub const FILE: &str = "report.html";
/// Files of samples on a page; of more, those that are evenly spread.
const SAMPLE_FILES: usize = 24;
/// Bytes of each.
const SAMPLE_BYTES: u64 = 32 << 10;

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#24292f;--dim:#5b6570;--page:#f6f8fa;--panel:#fff;--edge:#d8dee4}
@media(prefers-color-scheme:dark){:root{--ink:#d0d7de;--dim:#8b96a1;--page:#0d1117;--panel:#161b22;--edge:#30363d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.5rem 0 .75rem}
h3{font-size:.9rem;font-weight:600;margin:0 0 .5rem}
p{margin:0;color:var(--dim)}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.75rem;margin:1.25rem 0 0}
dl.facts div,figure,pre,details,.table{background:var(--panel);border:1px solid var(--edge);border-radius:6px}
dl.facts div{padding:.6rem .8rem}
dt{color:var(--dim);font-size:.8rem}
dd{margin:0;font-size:1.05rem;font-variant-numeric:tabular-nums}
figure{margin:0 0 1rem;padding:.8rem}
svg.curve{display:block;width:100%;height:auto}
pre{margin:0;padding:.8rem;overflow-x:auto;font:13px/1.5 ui-monospace,monospace}
pre.text{white-space:pre-wrap;overflow-wrap:anywhere}
details{margin-bottom:.5rem}
summary{padding:.5rem .8rem;cursor:pointer}
details pre{border:0;border-top:1px solid var(--edge);border-radius:0}
.table{overflow-x:auto;margin-bottom:1rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{padding:.4rem .8rem;text-align:left;border-bottom:1px solid var(--edge);vertical-align:top}
tr:last-child>*{border-bottom:0}
th{color:var(--dim);font-weight:500;white-space:nowrap}
td{overflow-wrap:anywhere}
";

/// The page of the run in `directory`.
pub fn render(directory: &Path) -> Result<String, ReportError> {
    let (mut curves, mut step, mut validation) = (Curves::default(), None, None);
    record::read(directory, |line| {
        curves.push(&line);
        match line {
            Line::Step(line) => step = Some(line),
            Line::Validation(line) => validation = Some(line),
        }
    })
    .map_err(ReportError::no_run(directory))?;
    let path = directory.join(CONFIG);
    let config = fs::read_to_string(&path).map_err(FileError::cannot("read", &path))?;
    let title = format!("Training run {}", name_of(directory));
    let panels = panels(&curves)?;
    let samples = samples(directory)?;
    let provenance = read_provenance(directory);
    let body = html! {
        (facts(step, validation, provenance.as_ref()))
        h2 { "Curves" }
        (panels)
        h2 { "Samples over time" }
        (samples)
        h2 { "Configuration" }
        pre { (printable(&config)) }
        h2 { "Provenance" }
        @match &provenance {
            Some(provenance) => (origin(provenance)),
            None => p { "Not recorded." },
        }
    };
    Ok(page(&title, &body).into_string())
}

/// What a run is called: the name of its directory.
fn name_of(directory: &Path) -> String {
    let whole = directory.canonicalize().ok();
    let name = whole.as_deref().and_then(Path::file_name);
    name.unwrap_or(directory.as_os_str())
        .to_string_lossy()
        .into_owned()
}

fn page(title: &str, body: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { (title) }
                    p { "As of " (humantime::format_rfc3339_seconds(SystemTime::now())) }
                    (body)
                }
            }
        }
    }
}

/// Draws the curves that have files of their own into the run's directory.
pub fn draw(directory: &Path) -> Result<(), ReportError> {
    let mut curves = Curves::default();
    record::read(directory, |line| curves.push(&line))?;
    for drawing in curves.drawings() {
        let (panel, svg) = drawing?;
        if let Some(file) = panel.file {
            crate::fit::replace(&directory.join(file), svg.as_bytes())?;
        }
    }
    Ok(())
}

/// The numbers that a reader looks for first.
fn facts(
    step: Option<StepRecord>,
    validation: Option<ValidationRecord>,
    provenance: Option<&Provenance>,
) -> Markup {
    let mut facts: Vec<(&str, String)> = Vec::new();
    if let Some(step) = step {
        facts.extend([
            ("Steps", grouped(step.step)),
            ("Tokens", grouped(step.tokens)),
            ("Time", time(step.seconds)),
            (
                "Speed",
                format!("{} tokens/s", grouped(step.tokens_per_second as u64)),
            ),
            ("Smoothed loss", format!("{:.4} nats/token", step.smoothed_loss)),
        ]);
    }
    if let Some(line) = validation {
        let bound = format!("{:.4} ± {:.4} nats/token", line.bound, line.standard_error);
        facts.push(("Last bound", bound));
    }
    if let Some(provenance) = provenance {
        facts.push(("Parameters", grouped(provenance.parameters)));
    }
    html! {
        dl.facts {
            @for (name, value) in &facts {
                div { dt { (name) } dd { (value) } }
            }
        }
    }
}

fn panels(curves: &Curves) -> Result<Markup, ReportError> {
    let drawn: Vec<(&Panel, String)> = curves.drawings().collect::<Result<_, _>>()?;
    Ok(html! {
        @if drawn.is_empty() { p { "Nothing was recorded yet." } }
        @for (panel, svg) in &drawn {
            figure { h3 { (panel.title) } (PreEscaped(svg)) }
        }
    })
}

/// The latest samples in view, earlier ones folded.
fn samples(directory: &Path) -> Result<Markup, FileError> {
    let steps = sample_steps(directory);
    let count = steps.len();
    let shown = count.min(SAMPLE_FILES);
    let mut texts = Vec::with_capacity(shown);
    for index in (0..shown).rev() {
        // The first and the last are among them.
        let step = steps[index * (count - 1) / (shown - 1).max(1)];
        let path = directory.join(SAMPLES).join(sample_name(step));
        let mut bytes = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(SAMPLE_BYTES).read_to_end(&mut bytes))
            .map_err(FileError::cannot("read", &path))?;
        texts.push((step, printable(&String::from_utf8_lossy(&bytes))));
    }
    Ok(html! {
        @if texts.is_empty() { p { "None; run.sample_every asks for them." } }
        @for (index, (step, text)) in texts.iter().enumerate() {
            details open[index == 0] {
                summary { "After " (grouped(*step)) " steps" }
                pre.text { (text) }
            }
        }
        @if shown < count { p { (count - shown) " more are in the run's directory." } }
    })
}

fn origin(provenance: &Provenance) -> Markup {
    let file = |name: &str, file: &DataFile| {
        html! {
            tr { th { (name) } td { (printable(&file.path.to_string_lossy())) } }
            tr { th { "Size" } td { (grouped(file.tokens)) " tokens, " (grouped(file.bytes)) " bytes of text" } }
            tr { th { "sha256" } td { (printable(&file.sha256)) } }
        }
    };
    html! {
        div.table {
            table {
                (file("Training tokens", &provenance.train))
                @for mixed in &provenance.mixture { (file("Mixed in", mixed)) }
                (file("Held-out tokens", &provenance.validation))
                tr { th { "Tokenizer's sha256" } td { (printable(&provenance.tokenizer_sha256)) } }
            }
        }
        div.table {
            table {
                tr { th { "Started" } th { "From step" } th { "training" } th { "Burn" } th { "Machine" } th { "CPUs" } th { "Command" } th { "Commit" } }
                @for session in &provenance.sessions {
                    tr {
                        td { (printable(&session.started)) }
                        td { (grouped(session.from_step)) }
                        td { (printable(&session.training)) }
                        td { (printable(&session.burn)) }
                        td { (printable(&session.machine)) }
                        td { (session.cpus) }
                        td { (printable(&session.command.join(" "))) }
                        td { (printable(session.commit.as_deref().unwrap_or_default())) }
                    }
                }
            }
        }
    }
}

/// Control characters, which HTML does not allow, made visible.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        })
        .collect()
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn time(seconds: f64) -> String {
    let minutes = seconds / 60.0;
    if minutes < 1.0 {
        format!("{seconds:.0} s")
    } else if minutes < 120.0 {
        format!("{minutes:.1} min")
    } else {
        format!("{:.1} h", minutes / 60.0)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::curves::PANELS;
    use super::*;

    const EVIL: &str = "<script>alert('\u{1}')</script>&\"</pre>";

    #[test]
    fn everything_on_the_page_is_escaped_and_nothing_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("a <b>run</b>");
        fs::create_dir_all(run.join("samples")).unwrap();
        let lines = concat!(
            r#"{"kind":"step","step":10,"tokens":1280,"seconds":2.0,"loss":5.1,"smoothed_loss":5.2,"#,
            r#""gradient_norm":1.0,"learning_rate":0.001,"tokens_per_second":640.0}"#,
            "\n",
            r#"{"kind":"validation","step":10,"tokens":1280,"seconds":2.1,"bound":5.0,"standard_error":0.1,"by_time":[2,1,1,1]}"#,
            "\n{\"kind\":\"step\",\"st",
        );
        fs::write(run.join("metrics.jsonl"), lines).unwrap();
        fs::write(run.join("config.toml"), EVIL).unwrap();
        fs::write(run.join("samples/00000010.txt"), EVIL).unwrap();
        let provenance = serde_json::to_vec(&Provenance {
            tokenizer_sha256: EVIL.to_owned(),
            ..Provenance::default()
        });
        fs::write(run.join("provenance.json"), provenance.unwrap()).unwrap();

        let page = render(&run).unwrap();
        for absent in [
            "<script", "<b>", "</pre>\"", "\u{1}", "http://", "https://", "src=", "href=",
        ] {
            // The name space of SVG is a name, not an address that is loaded.
            let page = page.replace("http://www.w3.org/2000/svg", "");
            assert!(!page.contains(absent), "{absent} in {page}");
        }
        assert_eq!(page.matches("&lt;script&gt;").count(), 3, "{page}");
        assert_eq!(page.matches("<svg ").count(), PANELS.len());
        assert!(page.contains("prefers-color-scheme:dark"));
        assert!(page.contains("1,280"), "{page}");
    }

    #[test]
    fn a_directory_without_a_run_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = render(folder.path()).unwrap_err();
        assert!(
            format!("{error:#}").contains("no directory of a run"),
            "{error:#}"
        );
    }
}
