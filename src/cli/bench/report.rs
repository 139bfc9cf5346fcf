//! What is told of a load.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;
use tonic::Code;

use super::load::{Arrivals, Ended, Load, Outcome};

/// Bars of the histogram.
const BARS: usize = 12;
/// Characters of the longest bar.
const WIDEST: usize = 40;

/// Times in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Times {
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

/// Requests that took so many milliseconds.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Bar {
    from: f64,
    to: f64,
    requests: usize,
}

/// A load in numbers; `json.md` tells what they are.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    seconds: f64,
    rate: Option<f64>,
    streams: Option<u32>,
    /// Requests that were answered whole.
    requests: usize,
    requests_per_second: f64,
    tokens_per_second: f64,
    evaluations_per_canvas: f64,
    first_frame_ms: Option<Times>,
    whole_ms: Option<Times>,
    histogram_ms: Vec<Bar>,
    /// Of the others, how many ended with which code.
    failed: BTreeMap<String, usize>,
    not_sent: u64,
}

impl Report {
    pub(super) fn new(load: &Load, outcome: &Outcome) -> Self {
        let done: Vec<&Ended> = outcome.ended.iter().filter(|r| r.code == Code::Ok).collect();
        let mut failed = BTreeMap::new();
        for ended in outcome.ended.iter().filter(|r| r.code != Code::Ok) {
            *failed.entry(format!("{:?}", ended.code)).or_default() += 1;
        }
        let sum = |of: fn(&Ended) -> u64| done.iter().map(|ended| of(ended)).sum::<u64>() as f64;
        // What was due in time may end after it, and counts to the time that it took.
        let last = outcome.ended.iter().map(|ended| ended.due + ended.whole).max();
        let seconds = last.map_or(load.measured, |last| {
            last.saturating_sub(load.warm_up).max(load.measured)
        });
        let seconds = seconds.as_secs_f64();
        let whole = sorted(done.iter().map(|ended| ended.whole));
        Self {
            seconds,
            rate: match load.arrivals {
                Arrivals::Open { rate } => Some(rate),
                Arrivals::Closed { .. } => None,
            },
            streams: match load.arrivals {
                Arrivals::Closed { streams } => Some(streams),
                Arrivals::Open { .. } => None,
            },
            requests: done.len(),
            requests_per_second: done.len() as f64 / seconds,
            tokens_per_second: sum(|ended| ended.tokens) / seconds,
            evaluations_per_canvas: sum(|ended| ended.evaluations) / sum(|ended| ended.canvases).max(1.0),
            first_frame_ms: times(&sorted(done.iter().filter_map(|ended| ended.first_frame))),
            histogram_ms: histogram(&whole),
            whole_ms: times(&whole),
            failed,
            not_sent: outcome.not_sent,
        }
    }

    pub(super) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let load = match (self.rate, self.streams) {
            (Some(rate), _) => format!("{rate} requests a second"),
            (None, streams) => format!("{} at once", streams.unwrap_or(1)),
        };
        writeln!(
            out,
            "{} requests in {:.1} s, {load}: {:.1} requests and {:.0} tokens a second, {:.1} evaluations a canvas",
            self.requests,
            self.seconds,
            self.requests_per_second,
            self.tokens_per_second,
            self.evaluations_per_canvas
        )?;
        for (code, requests) in &self.failed {
            writeln!(out, "failed with {code}: {requests}")?;
        }
        if self.not_sent > 0 {
            writeln!(out, "not sent, because too many were open: {}", self.not_sent)?;
        }
        if let Some(whole) = &self.whole_ms {
            writeln!(
                out,
                "\n{:16}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
                "ms", "mean", "p50", "p90", "p99", "p99.9", "max"
            )?;
            let first = self.first_frame_ms.iter().map(|times| ("to first frame", times));
            for (name, times) in first.chain([("whole", whole)]) {
                let Times {
                    mean,
                    p50,
                    p90,
                    p99,
                    p999,
                    max,
                } = times;
                writeln!(
                    out,
                    "{name:16}{mean:10.1}{p50:10.1}{p90:10.1}{p99:10.1}{p999:10.1}{max:10.1}"
                )?;
            }
            writeln!(out)?;
            let most = self
                .histogram_ms
                .iter()
                .map(|bar| bar.requests)
                .max()
                .unwrap_or(1);
            for Bar { from, to, requests } in &self.histogram_ms {
                let bar = "#".repeat((requests * WIDEST).div_ceil(most.max(1)));
                writeln!(out, "{from:10.1} to {to:8.1} ms {requests:8} {bar}")?;
            }
        }
        out.flush()
    }
}

fn ms(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

fn sorted(times: impl Iterator<Item = Duration>) -> Vec<f64> {
    let mut times: Vec<f64> = times.map(ms).collect();
    times.sort_unstable_by(f64::total_cmp);
    times
}

/// Percentiles by the nearest rank, of times in order.
fn times(sorted: &[f64]) -> Option<Times> {
    let max = *sorted.last()?;
    let at = |share: f64| {
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(max)
    };
    Some(Times {
        mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p999: at(0.999),
        max,
    })
}

/// Bars whose ends grow by the same factor: what is rare and slow is seen beside what is common and fast.
fn histogram(sorted: &[f64]) -> Vec<Bar> {
    let (Some(least), Some(most)) = (sorted.first(), sorted.last()) else {
        return Vec::new();
    };
    let least = least.max(1e-3);
    let factor = (most / least).max(1.0 + 1e-9).powf(1.0 / BARS as f64);
    let end = |bar: usize| {
        if bar == BARS {
            *most
        } else {
            least * factor.powi(bar as i32)
        }
    };
    let mut before = 0;
    (1..=BARS)
        .map(|bar| {
            let up_to = if bar == BARS {
                sorted.len()
            } else {
                sorted.partition_point(|time| *time < end(bar))
            };
            let requests = up_to - before;
            before = up_to;
            Bar {
                from: end(bar - 1),
                to: end(bar),
                requests,
            }
        })
        .collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_ranks_and_every_request_has_its_bar() {
        let all: Vec<f64> = (1..=1000).map(f64::from).collect();
        let times = times(&all).unwrap();
        assert_eq!((times.p50, times.p90, times.p99), (500.0, 900.0, 990.0));
        assert_eq!((times.p999, times.max, times.mean), (999.0, 1000.0, 500.5));
        let bars = histogram(&all);
        assert_eq!(bars.iter().map(|bar| bar.requests).sum::<usize>(), 1000);
        assert!(bars.windows(2).all(|two| two[0].to == two[1].from));
        assert_eq!((bars[0].from, bars[BARS - 1].to), (1.0, 1000.0));
        for same in [vec![5.0], vec![5.0; 9], vec![0.0, 0.0]] {
            let bars = histogram(&same);
            assert_eq!(bars.iter().map(|bar| bar.requests).sum::<usize>(), same.len());
        }
        assert!(super::times(&[]).is_none() && histogram(&[]).is_empty());
    }
}
