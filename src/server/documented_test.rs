//! Defaults and ranges are stated in the proto as the code has them.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::pace::{BURST, INTERVAL};
use super::request::{DEFAULT_STEPS, MAX_ID};
use super::sampler::{DEFAULT_ENTROPY_BOUND, DEFAULT_REMASK_RATE};
use super::scoring::{DEFAULT_DRAWS, MIN_DRAWS};
use crate::diffusion::SamplerKind;
use crate::diffusion::sampler::choice::MAX_TEMPERATURE;

const PROTOS: [&str; 3] = [
    include_str!("../../proto/denoised/v1/diffusion_service.proto"),
    include_str!("../../proto/denoised/v1/sampling.proto"),
    include_str!("../../proto/denoised/v1/scoring.proto"),
];

/// The comment above `field` of `message`, in one line.
fn comment(message: &str, field: &str) -> String {
    let opened = format!("message {message} {{");
    let body = PROTOS
        .iter()
        .find_map(|proto| proto.split(&opened).nth(1))
        .unwrap();
    let (value, block) = (format!(" {field} = "), format!("{field} {{"));
    let mut lines = Vec::new();
    for line in body.lines().map(str::trim) {
        if let Some(comment) = line.strip_prefix("//") {
            lines.push(comment.trim());
        } else if line.contains(&value) || line == block {
            return lines.join(" ");
        } else {
            lines.clear();
        }
    }
    String::new()
}

#[test]
fn the_proto_states_the_defaults_and_ranges_of_the_code() {
    let tweedie = super::sampler::name(&super::sampler::told(SamplerKind::default(), false));
    let burst = ["seven", "eight", "nine"][BURST as usize - 7];
    for (message, field, stated) in [
        ("Sampling", "steps", format!("at most {DEFAULT_STEPS}.")),
        (
            "Sampling",
            "oneof sampler",
            format!("Default: the model's, or {tweedie}."),
        ),
        (
            "Sampling",
            "temperature",
            format!("0 to {MAX_TEMPERATURE}. Default: the model's, or 1."),
        ),
        ("Sampling", "top_p", "Default: the model's, or 1.".to_owned()),
        (
            "EntropyBounded",
            "bound",
            format!("Default: the model's, or {DEFAULT_ENTROPY_BOUND}."),
        ),
        (
            "Remask",
            "rate",
            format!("0 to 1. Default: the model's, or {DEFAULT_REMASK_RATE}."),
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
            "Bound",
            "draws",
            format!("sequence, {MIN_DRAWS} to the server's max_steps"),
        ),
        ("Bound", "draws", format!("Default: {DEFAULT_DRAWS}.")),
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
