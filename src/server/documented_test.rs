//! Defaults and ranges are stated in the proto as the code has them.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::pace::{BURST, INTERVAL};
use super::request::{DEFAULT_STEPS, MAX_ID};
use super::sampler::{DEFAULT_ENTROPY_BOUND, DEFAULT_REMASK_RATE};
use crate::diffusion::SamplerKind;
use crate::diffusion::sampler::row::MAX_TEMPERATURE;

const PROTO: &str = include_str!("../../proto/denoised/v1/diffusion_service.proto");

/// The comment above `field` of `message`, in one line.
fn comment(message: &str, field: &str) -> String {
    let body = PROTO.split(&format!("message {message} {{")).nth(1).unwrap();
    let declared = format!(" {field} = ");
    let mut lines = Vec::new();
    for line in body.lines().map(str::trim) {
        if let Some(comment) = line.strip_prefix("//") {
            lines.push(comment.trim());
        } else if line.contains(&declared) {
            return lines.join(" ");
        } else {
            lines.clear();
        }
    }
    String::new()
}

#[test]
fn the_proto_states_the_defaults_and_ranges_of_the_code() {
    let default = super::sampler::told(SamplerKind::default()).sampler;
    let tweedie = default.as_str_name();
    let burst = ["seven", "eight", "nine"][BURST as usize - 7];
    for (message, field, stated) in [
        ("Sampling", "steps", format!("at most {DEFAULT_STEPS}.")),
        (
            "Sampling",
            "sampler",
            format!("Default: the model's, or {tweedie}."),
        ),
        (
            "Sampling",
            "temperature",
            format!("0 to {MAX_TEMPERATURE}. Default: the model's, or 1."),
        ),
        ("Sampling", "top_p", "Default: the model's, or 1.".to_owned()),
        (
            "Sampling",
            "entropy_bound",
            format!("Default: {DEFAULT_ENTROPY_BOUND}."),
        ),
        (
            "Sampling",
            "remask_rate",
            format!("0 to 1. Default: {DEFAULT_REMASK_RATE}."),
        ),
        (
            "FramePolicy",
            "min_interval_ms",
            format!(
                "Default: {burst} frames as they come, then one every {};",
                INTERVAL.as_millis()
            ),
        ),
        (
            "GenerateRequest",
            "request_id",
            format!("up to {MAX_ID} printable ASCII characters"),
        ),
    ] {
        let comment = comment(message, field);
        assert!(
            comment.contains(&stated),
            "{message}.{field} is not {stated:?} in {comment:?}"
        );
    }
}
