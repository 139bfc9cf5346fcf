//! Curves of a run, in bounded memory however long it is, and as SVG.
//!
//! The drawings carry their colours twice: as attributes, which every program understands, and as a
//! style sheet, which follows the reader's light or dark theme.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::journal::Line;

/// Points of a curve; more are averaged in groups.
const POINTS: usize = 600;
const SIZE: (u32, u32) = (720, 300);
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

/// What a drawing shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Panel {
    /// Loss of single steps and smoothed.
    Loss,
    /// Bound on held-out text, with its error.
    Bound,
    /// Norm of the gradient before clipping.
    Gradient,
    /// Learning rate.
    LearningRate,
    /// Tokens per second.
    Speed,
}

impl Panel {
    /// All of them, in the order of a page.
    pub const ALL: [Self; 5] = [
        Self::Loss,
        Self::Bound,
        Self::Gradient,
        Self::LearningRate,
        Self::Speed,
    ];

    /// What a reader is told it is.
    pub fn title(self) -> &'static str {
        match self {
            Self::Loss => "Training loss",
            Self::Bound => "Bound on held-out text, with its 95 % interval",
            Self::Gradient => "Gradient norm before clipping",
            Self::LearningRate => "Learning rate",
            Self::Speed => "Training speed",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Loss | Self::Bound => "nats/token",
            Self::Gradient => "norm",
            Self::LearningRate => "rate",
            Self::Speed => "tokens/s",
        }
    }
}

/// A quantity over steps, at most [`POINTS`] of it.
#[derive(Debug, Clone)]
struct Series {
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
    fn push(&mut self, step: u64, value: f64) {
        let one = Point {
            count: 1,
            steps: step as f64,
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

/// The curves of a run so far.
#[derive(Debug, Clone, Default)]
pub struct Curves {
    loss: Series,
    smoothed: Series,
    gradient: Series,
    learning_rate: Series,
    speed: Series,
    bound: Series,
    bound_error: Series,
}

impl Curves {
    /// Adds a line of `metrics.jsonl`.
    pub fn push(&mut self, line: &Line) {
        match line {
            Line::Step(line) => {
                self.loss.push(line.step, line.loss);
                self.smoothed.push(line.step, line.smoothed_loss);
                self.gradient.push(line.step, line.gradient_norm);
                self.learning_rate.push(line.step, line.learning_rate);
                self.speed.push(line.step, line.tokens_per_second);
            }
            Line::Validation(line) => {
                self.bound.push(line.step, line.bound);
                self.bound_error.push(line.step, line.standard_error);
            }
        }
    }

    /// One drawing as SVG; none where there are no points yet.
    pub fn draw(&self, panel: Panel) -> Result<Option<String>> {
        let (raw, main) = match panel {
            Panel::Loss => (Some(&self.loss), &self.smoothed),
            Panel::Bound => (None, &self.bound),
            Panel::Gradient => (None, &self.gradient),
            Panel::LearningRate => (None, &self.learning_rate),
            Panel::Speed => (None, &self.speed),
        };
        let main: Vec<(f64, f64)> = main.points().collect();
        let raw: Vec<(f64, f64)> = raw.into_iter().flat_map(Series::points).collect();
        let bars: Vec<(f64, [f64; 2])> = if panel == Panel::Bound {
            main.iter()
                .zip(self.bound_error.points())
                .map(|(&(step, bound), (_, error))| (step, [bound - 1.96 * error, bound + 1.96 * error]))
                .collect()
        } else {
            Vec::new()
        };
        let (Some(&(first, _)), Some(&(last, _))) = (main.first(), main.last()) else {
            return Ok(None);
        };
        let ends = bars.iter().flat_map(|(_, ends)| *ends);
        let [low, high] = extent(main.iter().chain(&raw).map(|(_, value)| *value).chain(ends));
        let mut svg = String::new();
        plot(
            &mut svg,
            panel,
            [first, last.max(first + 1.0)],
            [low, high],
            &Drawn { main, raw, bars },
        )
        .map_err(|error| anyhow!("cannot draw {}: {error}", panel.title()))?;
        Ok(Some(styled(&svg, panel.title())))
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

struct Drawn {
    main: Vec<(f64, f64)>,
    raw: Vec<(f64, f64)>,
    bars: Vec<(f64, [f64; 2])>,
}

fn plot(
    svg: &mut String,
    panel: Panel,
    [first, last]: [f64; 2],
    [low, high]: [f64; 2],
    drawn: &Drawn,
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
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| label(*value, high - low))
        .x_desc("step")
        .y_desc(panel.unit())
        .draw()?;
    let inside = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().map(|&(x, y)| (x, y.clamp(low, high))).collect()
    };
    if !drawn.raw.is_empty() {
        chart
            .draw_series(LineSeries::new(inside(&drawn.raw), &RAW))?
            .label("each step")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], RAW));
    }
    for &(step, ends) in &drawn.bars {
        let ends = ends.map(|end| (step, end.clamp(low, high)));
        chart.draw_series([PathElement::new(ends, MAIN.stroke_width(1))])?;
    }
    let line = chart.draw_series(LineSeries::new(inside(&drawn.main), MAIN.stroke_width(2)))?;
    if !drawn.raw.is_empty() {
        line.label("smoothed")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], MAIN.stroke_width(2)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 13))
            .draw()?;
    }
    // A curve of few points shows which it has.
    if drawn.main.len() <= 60 && panel == Panel::Bound {
        chart.draw_series(
            inside(&drawn.main)
                .into_iter()
                .map(|point| Circle::new(point, 3, MAIN.filled())),
        )?;
    }
    area.present()
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
    use crate::journal::{StepLine, ValidationLine};

    fn step(step: u64, loss: f64) -> Line {
        Line::Step(StepLine {
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
            series.push(step, step as f64);
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
        assert_eq!(curves.draw(Panel::Loss).unwrap(), None);
        curves.push(&step(1, 5.0));
        curves.push(&Line::Validation(ValidationLine {
            step: 1,
            tokens: 10,
            seconds: 1.0,
            bound: 5.0,
            standard_error: 0.1,
        }));
        for panel in Panel::ALL {
            let svg = curves.draw(panel).unwrap().unwrap();
            assert!(
                svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"),
                "{svg}"
            );
            assert!(svg.contains(panel.title()), "{svg}");
            assert!(!svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn an_outlier_does_not_flatten_the_curve() {
        let [low, high] = extent((0..1000).map(|i| if i == 7 { 1e9 } else { f64::from(i % 10) }));
        assert!(low > -1.0 && high < 11.0, "{low}..{high}");
    }
}
