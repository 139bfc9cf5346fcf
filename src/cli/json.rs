//! Events as JSON, one object a line, for machines.
//!
#![doc = include_str!("json.md")]

use serde::Serialize;
use serde_json::Value;

use crate::client;
use crate::proto::v1;
use crate::proto::v1::sampling::Sampler;
use crate::proto::v1::score_response::Event;
use crate::server::sampler;

/// One line.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Line<'a> {
    Accepted(Accepted<'a>),
    Frame(Frame<'a>),
    Result(Finished<'a>),
    Resumed(Resumed<'a>),
    Scoring(Scoring<'a>),
    Progress(Progress),
    Score(Score<'a>),
    Total(Total),
    Candidate(Candidate<'a>),
}

/// The server has gone away, and the request goes on.
#[derive(Debug, Serialize)]
pub(super) struct Resumed<'a> {
    attempt: u32,
    of: u32,
    after: &'a str,
}

/// The request as the server understood it.
#[derive(Debug, Serialize)]
pub(super) struct Accepted<'a> {
    request_id: &'a str,
    model: String,
    seed: u64,
    sampler: String,
    steps: Option<u32>,
    total: u32,
    length: u32,
    num_samples: u32,
    normalize: Option<bool>,
    temperature: f64,
    top_k: Option<u32>,
    top_p: Option<f64>,
    entropy_bound: Option<f64>,
    remask_rate: Option<f64>,
    start_time: Option<f64>,
    deadline_ms: Option<u64>,
    predicted_seconds: f64,
}

/// An intermediate state: all tokens, or those that changed and where.
#[derive(Debug, Serialize)]
pub(super) struct Frame<'a> {
    canvas: u32,
    step: u32,
    total: u32,
    t: f64,
    sigma: f64,
    nfe: u32,
    masked: u32,
    text: Option<&'a str>,
    keyframe: bool,
    content: Option<Content<'a>>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Keyframe {
        tokens: &'a [u32],
        committed_at: &'a [u32],
        log_probabilities: &'a [f32],
    },
    Delta {
        positions: &'a [u32],
        tokens: &'a [u32],
        committed_at: &'a [u32],
        log_probabilities: &'a [f32],
    },
}

/// A finished canvas.
#[derive(Debug, Serialize)]
pub(super) struct Finished<'a> {
    canvas: u32,
    text: Option<&'a str>,
    tokens: &'a [u32],
    committed_at: &'a [u32],
    log_probabilities: &'a [f32],
    nfe: u32,
    seed: u64,
    timings: Timings,
    finish_reason: String,
}

#[derive(Debug, Serialize)]
struct Timings {
    queue_ms: f64,
    network_ms: f64,
    sampling_ms: f64,
    total_ms: f64,
}

/// The request to score as the server understood it.
#[derive(Debug, Serialize)]
pub(super) struct Scoring<'a> {
    request_id: &'a str,
    model: String,
    exact: Option<String>,
    draws: Option<u32>,
    seed: Option<u64>,
    total: u64,
    deadline_ms: Option<u64>,
    predicted_seconds: f64,
}

/// How far the request to score is.
#[derive(Debug, Serialize)]
pub(super) struct Progress {
    done: u64,
    total: u64,
}

/// The score of a text.
#[derive(Debug, Serialize)]
pub(super) struct Score<'a> {
    text: u32,
    nats: f64,
    standard_error: f64,
    tokens: u32,
    bytes: Option<u64>,
    log_probabilities: &'a [f64],
    sequences: u32,
    nfe: u64,
}

/// All texts together.
#[derive(Debug, Serialize)]
pub(super) struct Total {
    tokens: u64,
    bytes: Option<u64>,
    nats: f64,
    nats_per_token: f64,
    standard_error: f64,
    bits_per_byte: Option<f64>,
    perplexity: f64,
}

/// The score of a candidate.
#[derive(Debug, Serialize)]
pub(super) struct Candidate<'a> {
    index: usize,
    text: &'a str,
    probability: f64,
    log_probability: f64,
    standard_error: f64,
    tokens: u32,
}

impl<'a> Line<'a> {
    /// The score of candidate `index`.
    pub(super) fn candidate(text: &'a str, index: usize, score: &v1::CandidateScore) -> Self {
        Self::Candidate(Candidate {
            index,
            text,
            probability: score.probability,
            log_probability: score.log_probability,
            standard_error: score.standard_error,
            tokens: score.tokens,
        })
    }
}

impl<'a> From<&'a Event> for Line<'a> {
    fn from(event: &'a Event) -> Self {
        match event {
            Event::Accepted(accepted) => {
                use v1::likelihood::Likelihood;
                let asked = accepted
                    .likelihood
                    .as_ref()
                    .and_then(|asked| asked.likelihood.as_ref());
                let (exact, draws) = match asked {
                    Some(Likelihood::Exact(exact)) => {
                        let order = plain(exact.order().as_str_name(), "ORDER_");
                        (Some(order.replace('_', "-")), None)
                    }
                    Some(Likelihood::Bound(bound)) => (None, bound.draws),
                    None => (None, None),
                };
                Self::Scoring(Scoring {
                    request_id: &accepted.request_id,
                    model: reference(accepted.model.as_ref()),
                    exact,
                    draws,
                    seed: accepted.seed,
                    total: accepted.total,
                    deadline_ms: accepted.deadline_ms,
                    predicted_seconds: accepted.predicted_seconds,
                })
            }
            Event::Progress(now) => Self::Progress(Progress {
                done: now.done,
                total: now.total,
            }),
            Event::Score(score) => Self::Score(Score {
                text: score.text,
                nats: score.nats,
                standard_error: score.standard_error,
                tokens: score.tokens,
                bytes: score.bytes,
                log_probabilities: &score.log_probabilities,
                sequences: score.sequences,
                nfe: score.nfe,
            }),
            Event::Total(total) => Self::Total(Total {
                tokens: total.tokens,
                bytes: total.bytes,
                nats: total.nats,
                nats_per_token: total.nats_per_token,
                standard_error: total.standard_error,
                bits_per_byte: total.bits_per_byte,
                perplexity: total.perplexity,
            }),
        }
    }
}

/// A served model.
#[derive(Debug, Serialize)]
pub(super) struct Model<'a> {
    name: &'a str,
    version: u64,
    default: bool,
    graph: String,
    vocab_size: u32,
    max_length: u32,
    max_steps: u32,
    max_samples: u32,
    has_tokenizer: bool,
    state: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    state_reason: &'a str,
    provenance: Value,
}

impl<'a> From<&'a v1::Accepted> for Line<'a> {
    fn from(accepted: &'a v1::Accepted) -> Self {
        let model = accepted.model.as_ref();
        let sampling = accepted.sampling.unwrap_or_default();
        let sampler = sampling.sampler;
        Self::Accepted(Accepted {
            request_id: &accepted.request_id,
            model: reference(model),
            seed: sampling.seed(),
            sampler: sampler
                .as_ref()
                .map(sampler::name)
                .unwrap_or_default()
                .replace('_', "-"),
            steps: sampling.steps,
            total: accepted.total,
            length: accepted.length,
            num_samples: sampling.num_samples(),
            normalize: match sampler {
                Some(
                    Sampler::Tweedie(v1::Tweedie { normalize }) | Sampler::Euler(v1::Euler { normalize }),
                ) => Some(normalize),
                _ => None,
            },
            temperature: sampling.temperature(),
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            entropy_bound: match sampler {
                Some(Sampler::EntropyBounded(v1::EntropyBounded { bound })) => bound,
                _ => None,
            },
            remask_rate: match sampler {
                Some(Sampler::Remask(v1::Remask { rate })) => rate,
                _ => None,
            },
            start_time: sampling.start_time,
            deadline_ms: accepted.deadline_ms,
            predicted_seconds: accepted.predicted_seconds,
        })
    }
}

impl<'a> From<&'a client::Resumed> for Line<'a> {
    fn from(resumed: &'a client::Resumed) -> Self {
        Self::Resumed(Resumed {
            attempt: resumed.attempt,
            of: resumed.of,
            after: resumed.after.message(),
        })
    }
}

impl<'a> From<&'a v1::Frame> for Line<'a> {
    fn from(frame: &'a v1::Frame) -> Self {
        let content = match &frame.content {
            Some(v1::frame::Content::Keyframe(key)) => Some(Content::Keyframe {
                tokens: &key.tokens,
                committed_at: &key.committed_at,
                log_probabilities: &key.log_probabilities,
            }),
            Some(v1::frame::Content::Delta(delta)) => Some(Content::Delta {
                positions: &delta.positions,
                tokens: &delta.tokens,
                committed_at: &delta.committed_at,
                log_probabilities: &delta.log_probabilities,
            }),
            None => None,
        };
        Self::Frame(Frame {
            canvas: frame.canvas,
            step: frame.step,
            total: frame.total,
            t: frame.t,
            sigma: frame.sigma,
            nfe: frame.nfe,
            masked: frame.masked,
            text: frame.text.as_deref(),
            keyframe: matches!(content, Some(Content::Keyframe { .. })),
            content,
        })
    }
}

impl<'a> From<&'a v1::CanvasResult> for Line<'a> {
    fn from(result: &'a v1::CanvasResult) -> Self {
        let timings = result.timings.unwrap_or_default();
        Self::Result(Finished {
            canvas: result.canvas,
            text: result.text.as_deref(),
            tokens: &result.tokens,
            committed_at: &result.committed_at,
            log_probabilities: &result.log_probabilities,
            nfe: result.nfe,
            seed: result.seed,
            timings: Timings {
                queue_ms: timings.queue_ms,
                network_ms: timings.network_ms,
                sampling_ms: timings.sampling_ms,
                total_ms: timings.total_ms,
            },
            finish_reason: plain(result.finish_reason().as_str_name(), "FINISH_REASON_"),
        })
    }
}

impl<'a> From<&'a v1::Model> for Model<'a> {
    fn from(model: &'a v1::Model) -> Self {
        let limits = model.limits.unwrap_or_default();
        Self {
            name: &model.name,
            version: model.version,
            default: model.is_default,
            graph: graph(model),
            vocab_size: model.vocab_size,
            max_length: limits.max_length,
            max_steps: limits.max_steps,
            max_samples: limits.max_samples,
            has_tokenizer: model.has_tokenizer,
            state: state(model),
            state_reason: &model.state_reason,
            provenance: provenance(model),
        }
    }
}

/// The graph's name as people write it.
pub(super) fn graph(model: &v1::Model) -> String {
    plain(model.graph().as_str_name(), "GRAPH_")
}

/// Where the model is on its way to being served.
pub(super) fn state(model: &v1::Model) -> String {
    plain(model.state().as_str_name(), "MODEL_STATE_")
}

/// Origin of the model; null when the server tells no JSON.
pub(super) fn provenance(model: &v1::Model) -> Value {
    serde_json::from_str(&model.provenance_json).unwrap_or_default()
}

/// A model as `name@version`.
fn reference(model: Option<&v1::ModelReference>) -> String {
    model.map_or_else(String::new, |model| format!("{}@{}", model.name, model.version))
}

/// An enum value's proto name without its prefix, in lower case.
pub(super) fn plain(name: &str, prefix: &str) -> String {
    name.trim_start_matches(prefix).to_lowercase()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use serde_json::json;

    fn value<'a>(event: impl Into<Line<'a>>) -> Value {
        serde_json::to_value(event.into()).unwrap()
    }

    #[test]
    fn every_event_is_named_by_its_only_key() {
        let accepted = v1::Accepted {
            model: Some(v1::ModelReference {
                name: "m".to_owned(),
                version: 2,
            }),
            sampling: Some(v1::Sampling {
                seed: Some(u64::MAX),
                sampler: Some(Sampler::Euler(v1::Euler { normalize: true })),
                ..v1::Sampling::default()
            }),
            ..v1::Accepted::default()
        };
        let line = value(&accepted);
        assert_eq!(line["accepted"]["model"], "m@2");
        assert_eq!(line["accepted"]["sampler"], "euler");
        assert_eq!(line["accepted"]["normalize"], true);
        assert_eq!(line["accepted"]["seed"], u64::MAX);
        let result = v1::CanvasResult {
            tokens: vec![1, 2],
            committed_at: vec![0, 7],
            finish_reason: v1::FinishReason::Done.into(),
            ..v1::CanvasResult::default()
        };
        let line = value(&result);
        assert_eq!(line["result"]["committed_at"], json!([0, 7]));
        assert_eq!(line["result"]["text"], Value::Null);
        assert_eq!(line["result"]["finish_reason"], "done");
    }

    /// The keys that the tables of `json.md` tell of, by event.
    fn documented() -> BTreeMap<String, BTreeSet<String>> {
        let mut events = BTreeMap::new();
        for section in include_str!("json.md").split("\n## ").skip(1) {
            let (event, table) = section.split_once('\n').unwrap();
            let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
            let keys = rows.map(|row| row.split('`').next().unwrap().to_owned());
            events.insert(event.to_owned(), keys.collect());
        }
        events
    }

    #[test]
    fn every_key_is_documented_and_nothing_else() {
        let resumed = client::Resumed {
            attempt: 1,
            of: 5,
            after: tonic::Status::unavailable("gone"),
        };
        let lines = [
            value(&v1::Accepted::default()),
            value(&v1::Frame::default()),
            value(&v1::CanvasResult::default()),
            value(&resumed),
            value(&Event::Accepted(v1::ScoreAccepted::default())),
            value(&Event::Progress(v1::ScoreProgress::default())),
            value(&Event::Score(v1::TextScore::default())),
            value(&Event::Total(v1::ScoreTotal::default())),
            value(Line::candidate("", 0, &v1::CandidateScore::default())),
            crate::cli::bench::told_of_nothing(),
        ];
        let told: BTreeMap<String, BTreeSet<String>> = lines
            .iter()
            .flat_map(|line| line.as_object().unwrap())
            .map(|(event, facts)| {
                (
                    event.clone(),
                    facts.as_object().unwrap().keys().cloned().collect(),
                )
            })
            .collect();
        assert_eq!(told, documented());
    }

    #[test]
    fn a_frame_holds_all_tokens_or_the_changed_ones() {
        let keyframe = v1::Keyframe {
            tokens: vec![3, 4],
            committed_at: vec![0, 9],
            log_probabilities: vec![0.0, -0.5],
            ..v1::Keyframe::default()
        };
        let delta = v1::Delta {
            positions: vec![1],
            tokens: vec![5],
            committed_at: vec![2],
            log_probabilities: vec![-0.25],
        };
        for (content, keyframe, wanted) in [
            (
                v1::frame::Content::Keyframe(keyframe),
                true,
                json!({"tokens": [3, 4], "committed_at": [0, 9], "log_probabilities": [0.0, -0.5]}),
            ),
            (
                v1::frame::Content::Delta(delta),
                false,
                json!({"positions": [1], "tokens": [5], "committed_at": [2], "log_probabilities": [-0.25]}),
            ),
        ] {
            let frame = v1::Frame {
                content: Some(content),
                ..v1::Frame::default()
            };
            let line = value(&frame);
            assert_eq!(line["frame"]["keyframe"], keyframe);
            assert_eq!(line["frame"]["content"], wanted);
        }
    }
}
