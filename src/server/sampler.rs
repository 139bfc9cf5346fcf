//! Samplers of the proto and of the domain: the one table between them.

use super::status::FieldError;
use crate::diffusion::SamplerKind;
use crate::proto::v1;

/// Entropies of the positions filled at once, in nats.
pub(crate) const DEFAULT_ENTROPY_BOUND: f64 = 0.5;
/// Chance of a token to be masked again in a step.
pub(crate) const DEFAULT_REMASK_RATE: f64 = 0.02;

/// The sampler of a request: the one asked for with its options, or else the model's `default`.
pub(super) fn asked(
    sampling: &v1::Sampling,
    default: Option<SamplerKind>,
) -> Result<SamplerKind, FieldError> {
    let bound = sampling.entropy_bound;
    if let Some(bound) = bound.filter(|bound| !(*bound >= 0.0 && bound.is_finite())) {
        let problem = format!("is {bound}, must be a number from 0");
        return Err(FieldError::new("sampling.entropy_bound", problem));
    }
    let rate = sampling.remask_rate;
    if let Some(rate) = rate.filter(|rate| !(0.0..=1.0).contains(rate)) {
        let problem = format!("is {rate}, must be 0 to 1");
        return Err(FieldError::new("sampling.remask_rate", problem));
    }
    let sampler = match v1::Sampler::try_from(sampling.sampler) {
        Ok(v1::Sampler::Unspecified) => default.unwrap_or_default(),
        Ok(v1::Sampler::Tweedie) => SamplerKind::Tweedie,
        Ok(v1::Sampler::Euler) => SamplerKind::Euler,
        Ok(v1::Sampler::FirstHitting) => SamplerKind::FirstHitting,
        Ok(v1::Sampler::Confidence) => SamplerKind::Confidence,
        Ok(v1::Sampler::EntropyBounded) => SamplerKind::EntropyBounded {
            bound: DEFAULT_ENTROPY_BOUND,
        },
        Ok(v1::Sampler::Remask) => SamplerKind::Remask {
            rate: DEFAULT_REMASK_RATE,
        },
        Ok(v1::Sampler::ThetaTrapezoidal) => SamplerKind::ThetaTrapezoidal,
        Err(_) => {
            let problem = format!("{} is no sampler this server knows", sampling.sampler);
            return Err(FieldError::new("sampling.sampler", problem));
        }
    };
    // What belongs to another sampler is refused, not ignored.
    match sampler {
        SamplerKind::EntropyBounded { bound: own } => Ok(SamplerKind::EntropyBounded {
            bound: bound.unwrap_or(own),
        }),
        _ if bound.is_some() => Err(FieldError::new(
            "sampling.entropy_bound",
            "is for SAMPLER_ENTROPY_BOUNDED alone",
        )),
        SamplerKind::Remask { rate: own } => Ok(SamplerKind::Remask {
            rate: rate.unwrap_or(own),
        }),
        _ if rate.is_some() => Err(FieldError::new(
            "sampling.remask_rate",
            "is for SAMPLER_REMASK alone",
        )),
        SamplerKind::Tweedie
        | SamplerKind::Euler
        | SamplerKind::FirstHitting
        | SamplerKind::Confidence
        | SamplerKind::ThetaTrapezoidal => Ok(sampler),
    }
}

/// A sampler in the proto, with its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Told {
    pub(super) sampler: v1::Sampler,
    pub(super) entropy_bound: Option<f64>,
    pub(super) remask_rate: Option<f64>,
}

/// The proto's words for `sampler`.
pub(super) fn told(sampler: SamplerKind) -> Told {
    let plain = |sampler| Told {
        sampler,
        entropy_bound: None,
        remask_rate: None,
    };
    match sampler {
        SamplerKind::Tweedie => plain(v1::Sampler::Tweedie),
        SamplerKind::Euler => plain(v1::Sampler::Euler),
        SamplerKind::FirstHitting => plain(v1::Sampler::FirstHitting),
        SamplerKind::Confidence => plain(v1::Sampler::Confidence),
        SamplerKind::EntropyBounded { bound } => Told {
            entropy_bound: Some(bound),
            ..plain(v1::Sampler::EntropyBounded)
        },
        SamplerKind::Remask { rate } => Told {
            remask_rate: Some(rate),
            ..plain(v1::Sampler::Remask)
        },
        SamplerKind::ThetaTrapezoidal => plain(v1::Sampler::ThetaTrapezoidal),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn every_value_makes_the_round_trip() {
        for value in 1.. {
            let Ok(sampler) = v1::Sampler::try_from(value) else {
                assert!(value > 7, "values follow each other");
                break;
            };
            let request = v1::Sampling {
                sampler: sampler.into(),
                ..v1::Sampling::default()
            };
            let kind = asked(&request, None).unwrap();
            let Told {
                sampler: again,
                entropy_bound,
                remask_rate,
            } = told(kind);
            assert_eq!(again, sampler);
            // What is told, options included, can be asked for again.
            let repeated = v1::Sampling {
                entropy_bound,
                remask_rate,
                ..request
            };
            assert_eq!(asked(&repeated, None).unwrap(), kind);
        }
    }

    #[test]
    fn the_models_default_is_for_silent_requests() {
        let default = Some(SamplerKind::Remask { rate: 0.25 });
        let silent = v1::Sampling::default();
        assert_eq!(asked(&silent, default).ok(), default);
        assert_eq!(asked(&silent, None).ok(), Some(SamplerKind::Tweedie));
        let changed = v1::Sampling {
            remask_rate: Some(0.5),
            ..silent
        };
        assert_eq!(
            asked(&changed, default).ok(),
            Some(SamplerKind::Remask { rate: 0.5 })
        );
        assert!(
            asked(&changed, None).is_err(),
            "the default sampler has no such option"
        );
        let own = v1::Sampling {
            sampler: v1::Sampler::Euler.into(),
            ..silent
        };
        assert_eq!(asked(&own, default).ok(), Some(SamplerKind::Euler));
    }
}
