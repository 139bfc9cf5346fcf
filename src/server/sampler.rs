//! Samplers of the proto and of the domain: the one table between them.

use super::status::FieldError;
use crate::diffusion::{GraphKind, SamplerKind};
use crate::proto::v1;
use crate::proto::v1::sampling::Sampler as Arm;

/// Entropies of the positions filled at once, in nats.
pub(crate) const DEFAULT_ENTROPY_BOUND: f64 = 0.5;
/// Chance of a token to be masked again in a step.
pub(crate) const DEFAULT_REMASK_RATE: f64 = 0.02;

/// Every sampler, with the name of its field in the proto.
pub const ALL: [(&str, Arm); 8] = [
    ("tweedie", Arm::Tweedie(v1::Tweedie { normalize: false })),
    ("euler", Arm::Euler(v1::Euler { normalize: false })),
    ("first_hitting", Arm::FirstHitting(v1::FirstHitting {})),
    ("confidence", Arm::Confidence(v1::Confidence {})),
    (
        "entropy_bounded",
        Arm::EntropyBounded(v1::EntropyBounded { bound: None }),
    ),
    ("remask", Arm::Remask(v1::Remask { rate: None })),
    (
        "theta_trapezoidal",
        Arm::ThetaTrapezoidal(v1::ThetaTrapezoidal {}),
    ),
    (
        "probability_margin",
        Arm::ProbabilityMargin(v1::ProbabilityMargin {}),
    ),
];

/// The sampler of a request and whether it normalises scores: the one asked for with its options, or else the
/// model's `default`, which also gives options that are left open.
pub(super) fn asked(
    asked: Option<Arm>,
    default: Option<SamplerKind>,
) -> Result<(SamplerKind, bool), FieldError> {
    let fits = |field: &str, value: f64, kind: SamplerKind, range: &str| {
        if kind.option_fits() {
            return Ok((kind, false));
        }
        Err(FieldError::new(
            format!("sampling.{field}"),
            format!("is {value}, must be {range}"),
        ))
    };
    match asked {
        None => Ok((default.unwrap_or_default(), false)),
        Some(Arm::Tweedie(v1::Tweedie { normalize })) => Ok((SamplerKind::Tweedie, normalize)),
        Some(Arm::Euler(v1::Euler { normalize })) => Ok((SamplerKind::Euler, normalize)),
        Some(Arm::FirstHitting(v1::FirstHitting {})) => Ok((SamplerKind::FirstHitting, false)),
        Some(Arm::Confidence(v1::Confidence {})) => Ok((SamplerKind::Confidence, false)),
        Some(Arm::EntropyBounded(v1::EntropyBounded { bound })) => {
            let own = match default {
                Some(SamplerKind::EntropyBounded { bound }) => bound,
                _ => DEFAULT_ENTROPY_BOUND,
            };
            let bound = bound.unwrap_or(own);
            let kind = SamplerKind::EntropyBounded { bound };
            fits("entropy_bounded.bound", bound, kind, "a number from 0")
        }
        Some(Arm::Remask(v1::Remask { rate })) => {
            let own = match default {
                Some(SamplerKind::Remask { rate }) => rate,
                _ => DEFAULT_REMASK_RATE,
            };
            let rate = rate.unwrap_or(own);
            fits("remask.rate", rate, SamplerKind::Remask { rate }, "0 to 1")
        }
        Some(Arm::ThetaTrapezoidal(v1::ThetaTrapezoidal {})) => Ok((SamplerKind::ThetaTrapezoidal, false)),
        Some(Arm::ProbabilityMargin(v1::ProbabilityMargin {})) => Ok((SamplerKind::ProbabilityMargin, false)),
    }
}

/// The proto's words for `sampler`, which normalises scores or does not.
pub(super) fn told(sampler: SamplerKind, normalize: bool) -> Arm {
    match sampler {
        SamplerKind::Tweedie => Arm::Tweedie(v1::Tweedie { normalize }),
        SamplerKind::Euler => Arm::Euler(v1::Euler { normalize }),
        SamplerKind::FirstHitting => Arm::FirstHitting(v1::FirstHitting {}),
        SamplerKind::Confidence => Arm::Confidence(v1::Confidence {}),
        SamplerKind::EntropyBounded { bound } => {
            Arm::EntropyBounded(v1::EntropyBounded { bound: Some(bound) })
        }
        SamplerKind::Remask { rate } => Arm::Remask(v1::Remask { rate: Some(rate) }),
        SamplerKind::ThetaTrapezoidal => Arm::ThetaTrapezoidal(v1::ThetaTrapezoidal {}),
        SamplerKind::ProbabilityMargin => Arm::ProbabilityMargin(v1::ProbabilityMargin {}),
    }
}

/// The name of the field that `arm` is.
pub fn name(arm: &Arm) -> &'static str {
    match arm {
        Arm::Tweedie(_) => "tweedie",
        Arm::Euler(_) => "euler",
        Arm::FirstHitting(_) => "first_hitting",
        Arm::Confidence(_) => "confidence",
        Arm::EntropyBounded(_) => "entropy_bounded",
        Arm::Remask(_) => "remask",
        Arm::ThetaTrapezoidal(_) => "theta_trapezoidal",
        Arm::ProbabilityMargin(_) => "probability_margin",
    }
}

/// The sampler that a text in `field` names, with its defaults.
pub(super) fn named(field: &str, asked: &str) -> Result<Arm, FieldError> {
    let found = ALL.iter().find(|(name, _)| *name == asked);
    found.map(|(_, arm)| *arm).ok_or_else(|| {
        let names = ALL.map(|(name, _)| name).join(", ");
        FieldError::new(field, format!("is {asked:?}, must be one of {names}"))
    })
}

/// Names of the samplers that models of this graph can be sampled with.
pub(super) fn that_fit(graph: GraphKind) -> impl Iterator<Item = &'static str> {
    ALL.iter().filter_map(move |(name, arm)| {
        let (kind, _) = asked(Some(*arm), None).ok()?;
        (graph == GraphKind::Absorbing || !kind.normalizes()).then_some(*name)
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;
    use crate::proto::DESCRIPTORS;

    #[test]
    fn every_sampler_of_the_proto_makes_the_round_trip() {
        let files = FileDescriptorSet::decode(DESCRIPTORS).unwrap().file;
        let mut messages = files.iter().flat_map(|file| &file.message_type);
        let message = messages.find(|message| message.name() == "Sampling").unwrap();
        let sampler = message
            .oneof_decl
            .iter()
            .position(|oneof| oneof.name() == "sampler");
        let arms: Vec<&str> = message
            .field
            .iter()
            .filter(|field| field.oneof_index.map(|index| index as usize) == sampler)
            .map(prost_types::FieldDescriptorProto::name)
            .collect();
        let table: Vec<&str> = ALL.iter().map(|(name, _)| *name).collect();
        assert_eq!(arms, table);
        for (known, arm) in ALL {
            assert_eq!(name(&arm), known);
            let (kind, normalize) = asked(Some(arm), None).unwrap();
            let again = told(kind, normalize);
            assert_eq!(name(&again), known);
            // What is told, options included, can be asked for again.
            assert_eq!(asked(Some(again), None).unwrap(), (kind, normalize));
        }
    }

    #[test]
    fn the_models_default_is_for_silent_requests() {
        let default = Some(SamplerKind::Remask { rate: 0.25 });
        let remask = |rate| Some(Arm::Remask(v1::Remask { rate }));
        let kind = |arm, default| asked(arm, default).map(|(kind, _)| kind).ok();
        assert_eq!(kind(None, default), default);
        assert_eq!(kind(None, None), Some(SamplerKind::Tweedie));
        assert_eq!(
            kind(remask(Some(0.5)), default),
            Some(SamplerKind::Remask { rate: 0.5 })
        );
        assert_eq!(kind(remask(None), default), default, "its option too");
        assert_eq!(
            kind(remask(None), None),
            Some(SamplerKind::Remask {
                rate: DEFAULT_REMASK_RATE
            })
        );
    }
}
