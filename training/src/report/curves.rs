//! Curves of a run, in bounded memory however long it is, and as SVG.
//!
//! The drawings carry their colours twice: as attributes, which every program understands, and as a
//! style sheet, which follows the reader's light or dark theme.

use plotters::prelude::*;

use super::error::ReportError;
use crate::fit::record::{Line, StepRecord, TIME_PARTS, ValidationRecord};

/// Points of a curve; more are averaged in groups.
const POINTS: usize = 600;
const SIZE: (u32, u32) = (720, 300);
/// What runs from left to right in the drawings of one run.
const STEP: &str = "step";
const RAW: RGBColor = RGBColor(0x9C, 0xBF, 0xE0);
const MAIN: RGBColor = RGBColor(0x1F, 0x6F, 0xB2);
/// Black is ink, the others are above; what they are in either theme.
const STYLE: &str = "<style>\
    svg.curve{color:#24292f;background:#fff}\
    svg.curve [fill=\"#000000\"]{fill:currentColor}\
    svg.curve [stroke=\"#000000\"]{stroke:currentColor}\
    @media(prefers-color-scheme:dark){\
    svg.curve{color:#d0d7de;background:#161b22}\
    svg.curve [stroke=\"#9CBFE0\"]{stroke:#35506b}\
    svg.curve [stroke=\"#1F6FB2\"]{stroke:#6cb6ff}\
    svg.curve [fill=\"#1F6FB2\"]{fill:#6cb6ff}}\
    </style>";

/// A drawing: what it shows of the lines of `metrics.jsonl`.
#[derive(Debug, Clone, Copy)]
pub struct Panel {
    /// What a reader is told it is.
    pub title: &'static str,
    /// The file that it is drawn into, where it has one of its own.
    pub file: Option<&'static str>,
    unit: &'static str,
    of: Quantity,
}

/// Where the numbers of a drawing come from.
#[derive(Debug, Clone, Copy)]
enum Quantity {
    /// One number a step, and behind it perhaps the same before it was smoothed.
    Step(fn(&StepRecord) -> f64, Option<fn(&StepRecord) -> f64>),
    /// One number a validation, and its standard error.
    Validation(fn(&ValidationRecord) -> f64, fn(&ValidationRecord) -> f64),
    /// One number for each part of the times.
    ByTime(fn(&ValidationRecord) -> [f64; TIME_PARTS]),
}

/// All drawings, in the order of a page.
pub const PANELS: [Panel; 6] = [
    Panel {
        title: "Training loss",
        file: Some("loss.svg"),
        unit: "nats/token",
        of: Quantity::Step(|step| step.smoothed_loss, Some(|step| step.loss)),
    },
    Panel {
        title: "Bound on held-out text, with its 95 % interval",
        file: Some("bound.svg"),
        unit: "nats/token",
        of: Quantity::Validation(|line| line.bound, |line| line.standard_error),
    },
    Panel {
        title: "What the quarters of time add to the bound",
        file: None,
        unit: "nats/token",
        of: Quantity::ByTime(|line| line.by_time),
    },
    Panel {
        title: "Gradient norm before clipping",
        file: None,
        unit: "norm",
        of: Quantity::Step(|step| step.gradient_norm, None),
    },
    Panel {
        title: "Learning rate",
        file: None,
        unit: "rate",
        of: Quantity::Step(|step| step.learning_rate, None),
    },
    Panel {
        title: "Training speed",
        file: None,
        unit: "tokens/s",
        of: Quantity::Step(|step| step.tokens_per_second, None),
    },
];

/// A quantity over steps, or whatever grows with them, at most [`POINTS`] of it.
#[derive(Debug, Clone)]
pub(super) struct Series {
    /// Values per point.
    group: u64,
    points: Vec<Point>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Point {
    count: u64,
    steps: f64,
    values: f64,
}

impl Default for Series {
    fn default() -> Self {
        Self {
            group: 1,
            points: Vec::new(),
        }
    }
}

impl Series {
    pub(super) fn push(&mut self, x: f64, value: f64) {
        let one = Point {
            count: 1,
            steps: x,
            values: value,
        };
        if let Some(last) = self.points.last_mut()
            && last.count < self.group
        {
            *last = last.and(one);
            return;
        }
        if self.points.len() == POINTS {
            let pairs = self.points.chunks(2);
            self.points = pairs
                .map(|pair| pair.iter().fold(Point::default(), |a, b| a.and(*b)))
                .collect();
            self.group *= 2;
        }
        self.points.push(one);
    }

    /// Steps and values.
    fn points(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        self.points.iter().map(|point| {
            (
                point.steps / point.count as f64,
                point.values / point.count as f64,
            )
        })
    }
}

impl Point {
    fn and(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            steps: self.steps + other.steps,
            values: self.values + other.values,
        }
    }
}

/// The curves of a run so far: those of [`PANELS`], one by one.
#[derive(Debug, Clone, Default)]
pub struct Curves([Curve; PANELS.len()]);

/// A number and what goes with it: the same before it was smoothed, its standard error, or its parts.
#[derive(Debug, Clone, Default)]
struct Curve {
    main: Series,
    beside: Series,
    parts: [Series; TIME_PARTS],
}

impl Curves {
    /// Adds a line of `metrics.jsonl`.
    pub fn push(&mut self, line: &Line) {
        for (Panel { of, .. }, curve) in PANELS.iter().zip(&mut self.0) {
            match (line, of) {
                (Line::Step(step), Quantity::Step(main, beside)) => {
                    curve.main.push(step.step as f64, main(step));
                    if let Some(beside) = beside {
                        curve.beside.push(step.step as f64, beside(step));
                    }
                }
                (Line::Validation(validation), Quantity::Validation(main, error)) => {
                    curve.main.push(validation.step as f64, main(validation));
                    curve.beside.push(validation.step as f64, error(validation));
                }
                (Line::Validation(validation), Quantity::ByTime(parts)) => {
                    let parts = parts(validation);
                    // Earlier versions did not record them.
                    if parts.iter().any(|part| *part != 0.0) {
                        for (series, part) in curve.parts.iter_mut().zip(parts) {
                            series.push(validation.step as f64, part);
                        }
                    }
                }
                (Line::Step(_), Quantity::Validation(..) | Quantity::ByTime(_))
                | (Line::Validation(_), Quantity::Step(..)) => {}
            }
        }
    }

    /// The drawings, as SVG, of which there are points.
    pub fn drawings(&self) -> impl Iterator<Item = Result<(&'static Panel, String), ReportError>> + '_ {
        PANELS.iter().zip(&self.0).filter_map(|(panel, curve)| {
            let drawn = curve.draw(panel).transpose()?;
            Some(drawn.map(|svg| (panel, svg)))
        })
    }
}

impl Curve {
    /// One drawing as SVG; none where there are no points yet.
    fn draw(&self, panel: &Panel) -> Result<Option<String>, ReportError> {
        let mut drawing = Drawing {
            title: panel.title,
            x: STEP,
            y: panel.unit,
            lines: Vec::new(),
            bars: Vec::new(),
        };
        let main: Vec<(f64, f64)> = self.main.points().collect();
        match panel.of {
            Quantity::Step(_, None) => drawing.add("", MAIN, main),
            Quantity::Step(_, Some(_)) => {
                drawing.add("each step", RAW, self.beside.points().collect());
                drawing.add("smoothed", MAIN, main);
            }
            Quantity::Validation(..) => {
                let both = main.iter().zip(self.beside.points());
                drawing.bars = both
                    .map(|(&(step, bound), (_, error))| (step, [bound - 1.96 * error, bound + 1.96 * error]))
                    .collect();
                drawing.add("", MAIN, main);
            }
            Quantity::ByTime(_) => {
                for (part, series) in self.parts.iter().enumerate() {
                    let [from, to] = [part, part + 1].map(|end| end as f64 / TIME_PARTS as f64);
                    drawing.add(
                        &format!("t {from} to {to}"),
                        color(part),
                        series.points().collect(),
                    );
                }
            }
        }
        drawing.svg()
    }
}

/// Lines over one axis.
#[derive(Debug)]
pub(super) struct Drawing<'a> {
    /// What a reader is told it is.
    pub(super) title: &'a str,
    /// What runs from left to right.
    pub(super) x: &'a str,
    /// The unit of the values.
    pub(super) y: &'a str,
    lines: Vec<DrawnLine>,
    /// Intervals of single points.
    bars: Vec<(f64, [f64; 2])>,
}

#[derive(Debug)]
struct DrawnLine {
    /// Empty where there is but one.
    label: String,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

/// The colour of line `index` of several.
fn color(index: usize) -> RGBColor {
    const COLORS: [RGBColor; 6] = [
        MAIN,
        RGBColor(0xC8, 0x5A, 0x11),
        RGBColor(0x2E, 0x8B, 0x57),
        RGBColor(0x8E, 0x5B, 0xB5),
        RGBColor(0xB0, 0x8A, 0x1E),
        RGBColor(0xC2, 0x3B, 0x5E),
    ];
    COLORS[index % COLORS.len()]
}

impl<'a> Drawing<'a> {
    /// Of lines that are named, one for each run or part.
    pub(super) fn of_lines(title: &'a str, x: &'a str, y: &'a str, lines: Vec<(String, Series)>) -> Self {
        let lines = lines
            .into_iter()
            .enumerate()
            .map(|(index, (label, series))| DrawnLine {
                label,
                color: color(index),
                points: series.points().collect(),
            });
        Self {
            title,
            x,
            y,
            lines: lines.collect(),
            bars: Vec::new(),
        }
    }

    fn add(&mut self, label: &str, color: RGBColor, points: Vec<(f64, f64)>) {
        self.lines.push(DrawnLine {
            label: label.to_owned(),
            color,
            points,
        });
    }

    /// As SVG; none where there are no points.
    pub(super) fn svg(&self) -> Result<Option<String>, ReportError> {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let [first, last] = points().fold([f64::INFINITY, f64::NEG_INFINITY], |[first, last], (x, _)| {
            [first.min(*x), last.max(*x)]
        });
        if first > last {
            return Ok(None);
        }
        let ends = self.bars.iter().flat_map(|(_, ends)| *ends);
        let [low, high] = extent(points().map(|(_, value)| *value).chain(ends));
        let mut svg = String::new();
        let last = if last > first { last } else { first + 1.0 };
        self.plot(&mut svg, [first, last], [low, high])
            .map_err(|error| ReportError::Draw {
                title: self.title.to_owned(),
                reason: error.to_string(),
            })?;
        Ok(Some(styled(&svg, self.title)))
    }

    fn plot(
        &self,
        svg: &mut String,
        [first, last]: [f64; 2],
        [low, high]: [f64; 2],
    ) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(10)
            .margin_right(18)
            .x_label_area_size(38)
            .y_label_area_size(64)
            .build_cartesian_2d(first..last, low..high)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_style(BLACK.mix(0.5))
            .label_style(("sans-serif", 13))
            .x_labels(8)
            .y_labels(6)
            .x_label_formatter(&|x| {
                // Steps are whole.
                let range = if self.x == STEP {
                    f64::INFINITY
                } else {
                    last - first
                };
                label(*x, range)
            })
            .y_label_formatter(&|value| label(*value, high - low))
            .x_desc(self.x)
            .y_desc(self.y)
            .draw()?;
        let inside = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            points.iter().map(|&(x, y)| (x, y.clamp(low, high))).collect()
        };
        for &(step, ends) in &self.bars {
            let ends = ends.map(|end| (step, end.clamp(low, high)));
            chart.draw_series([PathElement::new(ends, MAIN.stroke_width(1))])?;
        }
        for DrawnLine { label, color, points } in &self.lines {
            let color = *color;
            let width = if color == RAW { 1 } else { 2 };
            let line = chart.draw_series(LineSeries::new(inside(points), color.stroke_width(width)))?;
            if !label.is_empty() {
                line.label(label)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(width)));
            }
            // A curve of few points shows which it has.
            if points.len() <= 60 && !self.bars.is_empty() {
                let dots = inside(points).into_iter();
                chart.draw_series(dots.map(|point| Circle::new(point, 3, color.filled())))?;
            }
        }
        if self.lines.iter().any(|line| !line.label.is_empty()) {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .label_font(("sans-serif", 13))
                .draw()?;
        }
        area.present()
    }
}

/// The range that holds all but the most extreme values, with a margin.
fn extent(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let index = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
        sorted.get(index).copied().unwrap_or(0.0)
    };
    // Single outliers would flatten all else; curves are cut where they leave the range.
    let [low, high] = [at(0.005), at(0.995)];
    let margin = (0.06 * (high - low)).max(1e-3 * high.abs()).max(1e-12);
    [low - margin, high + margin]
}

/// As many digits as tell the labels of a range apart.
fn label(value: f64, range: f64) -> String {
    if range < 1e-2 {
        format!("{value:.1e}")
    } else if range < 1.0 {
        format!("{value:.2}")
    } else if range < 20.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

/// Adds what the drawing is called and its themes.
fn styled(svg: &str, title: &str) -> String {
    match svg.split_once('>') {
        Some((open, rest)) => {
            let open = open.replacen("<svg ", "<svg class=\"curve\" role=\"img\" ", 1);
            format!("{open}>\n<title>{title}</title>\n{STYLE}{rest}")
        }
        None => svg.to_owned(),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn step(step: u64, loss: f64) -> Line {
        Line::Step(StepRecord {
            step,
            tokens: 10 * step,
            seconds: step as f64,
            loss,
            smoothed_loss: loss,
            gradient_norm: 1.0,
            learning_rate: 1e-3,
            tokens_per_second: 100.0,
        })
    }

    #[test]
    fn long_series_stay_small_and_keep_their_mean() {
        let mut series = Series::default();
        let count = 50_000;
        for step in 1..=count {
            series.push(step as f64, step as f64);
        }
        assert!(series.points.len() <= POINTS, "{}", series.points.len());
        assert!(series.points.len() > POINTS / 2 - 1);
        assert_eq!(series.points.iter().map(|point| point.count).sum::<u64>(), count);
        for (step, value) in series.points() {
            assert_eq!(step, value);
        }
    }

    #[test]
    fn nothing_is_drawn_of_nothing_and_one_point_is_enough() {
        let mut curves = Curves::default();
        assert_eq!(curves.drawings().count(), 0);
        curves.push(&step(1, 5.0));
        curves.push(&Line::Validation(ValidationRecord {
            step: 1,
            tokens: 10,
            seconds: 1.0,
            bound: 5.0,
            standard_error: 0.1,
            by_time: [2.0, 1.5, 1.0, 0.5],
        }));
        assert_eq!(curves.drawings().count(), PANELS.len());
        for drawing in curves.drawings() {
            let (panel, svg) = drawing.unwrap();
            assert!(
                svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"),
                "{svg}"
            );
            assert!(svg.contains(panel.title), "{svg}");
            assert!(!svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn an_outlier_does_not_flatten_the_curve() {
        let [low, high] = extent((0..1000).map(|i| if i == 7 { 1e9 } else { f64::from(i % 10) }));
        assert!(low > -1.0 && high < 11.0, "{low}..{high}");
    }
}
