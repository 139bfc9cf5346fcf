//! A recording as an animated SVG, which browsers play by themselves, in README files too.

use std::fmt::Write as _;

use ratatui::style::{Color, Modifier};
use ratatui::text::Line;

/// Pixels of a column, a row and the margin; of the font in [`STYLE`].
const COLUMN: f64 = 8.4;
const ROW: f64 = 20.0;
const MARGIN: f64 = 14.0;
/// Seconds that the last state stays.
const REST: f64 = 3.0;

/// What is drawn, and until when.
#[derive(Debug)]
struct Row {
    line: Line<'static>,
    from: f64,
    to: f64,
}

/// States that follow each other, each a screen of lines.
#[derive(Debug, Default)]
pub(super) struct Animation {
    /// The rows of every screen row, oldest first.
    rows: Vec<Vec<Row>>,
    seconds: f64,
    columns: usize,
}

impl Animation {
    /// Shows `lines` for so many seconds.
    pub(super) fn show(&mut self, lines: Vec<Line<'static>>, seconds: f64) {
        let (from, to) = (self.seconds, self.seconds + seconds);
        self.seconds = to;
        if self.rows.len() < lines.len() {
            self.rows.resize_with(lines.len(), Vec::new);
        }
        for (row, line) in self.rows.iter_mut().zip(lines) {
            self.columns = self.columns.max(line.width());
            match row.last_mut() {
                Some(last) if last.line == line && last.to == from => last.to = to,
                _ => row.push(Row { line, from, to }),
            }
        }
    }

    /// The picture, which plays again and again.
    pub(super) fn svg(&self) -> String {
        let whole = self.seconds + REST;
        let width = self.columns as f64 * COLUMN + 2.0 * MARGIN;
        let height = self.rows.len() as f64 * ROW + 2.0 * MARGIN;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\" \
             role=\"img\" aria-label=\"Text that is denoised step by step\">\n<style>{STYLE}</style>\n\
             <rect class=\"ground\" width=\"100%\" height=\"100%\" rx=\"8\"><animate id=\"loop\" attributeName=\"x\" \
             from=\"0\" to=\"0\" begin=\"0s;loop.end\" dur=\"{whole:.2}s\"/></rect>\n"
        );
        for (number, rows) in self.rows.iter().enumerate() {
            let y = MARGIN + (number as f64 + 0.75) * ROW;
            for row in rows {
                let last = row.to == self.seconds;
                let to = if last { whole } else { row.to };
                // What never changes needs no animation, and what is there at the end is there where nothing moves.
                let visibility = if last { "" } else { " visibility=\"hidden\"" };
                let animated = row.from > 0.0 || !last;
                let _written = write!(svg, "<text x=\"{MARGIN}\" y=\"{y:.0}\"{visibility}>");
                spans(&row.line, &mut svg);
                if animated {
                    let _written = write!(
                        svg,
                        "<animate attributeName=\"visibility\" values=\"hidden;visible;hidden\" keyTimes=\"0;{:.4};{:.4}\" \
                         calcMode=\"discrete\" begin=\"loop.begin\" dur=\"{whole:.2}s\"/>",
                        row.from / whole,
                        to / whole,
                    );
                }
                svg.push_str("</text>\n");
            }
        }
        svg.push_str("</svg>\n");
        svg
    }
}

/// Colours of both themes.
const STYLE: &str = "text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;fill:#1c1f23}\
.ground{fill:#f6f5f2}.d{fill:#8b9198}.b{font-weight:700}.g{fill:#1a6b35}.y{fill:#8a5a00}.r{fill:#a3261b}.c{fill:#1f5c8c}\
@media(prefers-color-scheme:dark){text{fill:#e7e9ec}.ground{fill:#15181c}.d{fill:#767e88}.g{fill:#7ed69a}.y{fill:#e9c46a}\
.r{fill:#ff9d92}.c{fill:#8ec5f0}}";

fn spans(line: &Line<'_>, svg: &mut String) {
    let mut column = 0;
    for span in &line.spans {
        let style = line.style.patch(span.style);
        let mut classes = Vec::new();
        match style.fg {
            Some(Color::Green) => classes.push("g"),
            Some(Color::Yellow) => classes.push("y"),
            Some(Color::Red) => classes.push("r"),
            Some(Color::Cyan) => classes.push("c"),
            Some(_) | None => {}
        }
        if style.add_modifier.contains(Modifier::DIM) {
            classes.push("d");
        }
        if style.add_modifier.contains(Modifier::BOLD) {
            classes.push("b");
        }
        let class = if classes.is_empty() {
            String::new()
        } else {
            format!(" class=\"{}\"", classes.join(" "))
        };
        // Each at its own column, however wide the font is that there is.
        let x = MARGIN + column as f64 * COLUMN;
        let _written = write!(
            svg,
            "<tspan x=\"{x:.1}\" textLength=\"{:.1}\"{class}>{}</tspan>",
            span.width() as f64 * COLUMN,
            escaped(&span.content)
        );
        column += span.width();
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::style::Style;
    use ratatui::text::Span;

    #[test]
    fn rows_that_stay_are_drawn_once_and_the_end_stands_without_animation() {
        let line = |text: &'static str| Line::from(text);
        let mut animation = Animation::default();
        animation.show(vec![line("first"), line("a ░")], 0.5);
        animation.show(vec![line("first"), line("a <b>")], 0.5);
        let svg = animation.svg();
        assert_eq!(svg.matches("first").count(), 1);
        assert_eq!(svg.matches("<text").count(), 3);
        // One hidden at first, which is shown from the beginning to an eighth of four seconds.
        assert_eq!(svg.matches("visibility=\"hidden\"").count(), 1);
        assert!(svg.contains("keyTimes=\"0;0.0000;0.1250\""), "{svg}");
        assert!(svg.contains("keyTimes=\"0;0.1250;1.0000\""), "{svg}");
        assert!(svg.contains("a &lt;b&gt;") && !svg.contains("<b>"));
    }

    #[test]
    fn looks_are_classes_and_columns_are_kept() {
        let dim = Span::styled("ab", Style::new().add_modifier(Modifier::DIM));
        let green = Span::styled("cd", Style::new().fg(Color::Green));
        let mut svg = String::new();
        spans(&Line::from(vec![dim, green]), &mut svg);
        assert_eq!(
            svg,
            "<tspan x=\"14.0\" textLength=\"16.8\" class=\"d\">ab</tspan><tspan x=\"30.8\" textLength=\"16.8\" class=\"g\">cd</tspan>"
        );
    }
}
