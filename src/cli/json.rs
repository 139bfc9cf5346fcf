//! Events as JSON, one object a line, for machines.

use serde_json::{Value, json};

use crate::proto::v1::{Accepted, Frame, Model, Result, Sampler, frame};

pub(super) fn accepted(accepted: &Accepted) -> Value {
    let model = accepted.model.clone().unwrap_or_default();
    json!({"accepted": {
        "request_id": accepted.request_id,
        "model": format!("{}@{}", model.name, model.version),
        "seed": accepted.seed,
        "sampler": accepted.sampler().as_str_name().trim_start_matches("SAMPLER_").to_lowercase(),
        "steps": accepted.steps,
        "length": accepted.length,
        "num_samples": accepted.num_samples,
    }})
}

pub(super) fn frame(frame: &Frame) -> Value {
    let content = match &frame.content {
        Some(frame::Content::Keyframe(key)) => json!({"tokens": key.tokens}),
        Some(frame::Content::Delta(delta)) => json!({"positions": delta.positions, "tokens": delta.tokens}),
        None => Value::Null,
    };
    json!({"frame": {
        "canvas": frame.canvas,
        "step": frame.step,
        "total": frame.total,
        "t": frame.t,
        "sigma": frame.sigma,
        "nfe": frame.nfe,
        "masked": frame.masked,
        "text": frame.text,
        "keyframe": matches!(frame.content, Some(frame::Content::Keyframe(_))),
        "content": content,
    }})
}

pub(super) fn result(result: &Result) -> Value {
    let timings = result.timings.unwrap_or_default();
    json!({"result": {
        "canvas": result.canvas,
        "text": result.text,
        "tokens": result.tokens,
        "committed_at": result.committed_at,
        "nfe": result.nfe,
        "seed": result.seed,
        "timings": {
            "queue_ms": timings.queue_ms,
            "network_ms": timings.network_ms,
            "sampling_ms": timings.sampling_ms,
            "total_ms": timings.total_ms,
        },
        "finish_reason": result.finish_reason().as_str_name().trim_start_matches("FINISH_REASON_").to_lowercase(),
    }})
}

pub(super) fn model(model: &Model) -> Value {
    let provenance: Value = serde_json::from_str(&model.provenance_json).unwrap_or_default();
    let limits = model.limits.unwrap_or_default();
    json!({
        "name": model.name,
        "version": model.version,
        "default": model.is_default,
        "graph": model.graph().as_str_name().trim_start_matches("GRAPH_").to_lowercase(),
        "vocab_size": model.vocab_size,
        "max_length": limits.max_length,
        "max_steps": limits.max_steps,
        "max_samples": limits.max_samples,
        "has_tokenizer": model.has_tokenizer,
        "provenance": provenance,
    })
}

/// The proto name of a sampler given on the command line.
pub(super) fn sampler(name: &str) -> std::result::Result<Sampler, String> {
    Sampler::from_str_name(&format!("SAMPLER_{}", name.to_uppercase().replace('-', "_")))
        .filter(|sampler| *sampler != Sampler::Unspecified)
        .ok_or_else(|| "must be tweedie or euler".to_owned())
}
