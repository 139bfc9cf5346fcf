//! Parameters of `ModelInfer`: how to denoise, and until when.

use std::collections::HashMap;

use crate::proto::inference::InferParameter;
use crate::proto::inference::infer_parameter::ParameterChoice as Value;
use crate::proto::v1;
use crate::server::sampler;
use crate::server::status::FieldError;

/// Names of all parameters.
const KNOWN: [&str; 8] = [
    "sampler",
    "steps",
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "timeout",
    "finish_early",
];

/// What parameters ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Asked {
    /// How to denoise.
    pub(super) sampling: v1::Sampling,
    /// Milliseconds until all must be done.
    pub(super) timeout_ms: Option<u64>,
    /// Whether a deadline buys fewer steps instead of an error.
    pub(super) finish_early: bool,
}

/// The refusal of the parameter `name` in `field`, which has `known` ones.
pub(super) fn unknown(field: &str, name: &str, known: &[&str]) -> FieldError {
    let problem = if known.is_empty() {
        "is unknown, there are none".to_owned()
    } else {
        format!("is unknown, there are {}", known.join(", "))
    };
    FieldError::new(format!("{field}[{name:?}]"), problem)
}

/// Reads what `parameters` ask for.
pub(super) fn read(parameters: &HashMap<String, InferParameter>) -> Result<Asked, FieldError> {
    let (mut asked, mut timeout_us) = (Asked::default(), None);
    for (name, parameter) in parameters {
        let value = One {
            name,
            value: parameter.parameter_choice.as_ref(),
        };
        let sampling = &mut asked.sampling;
        match name.as_str() {
            "sampler" => sampling.sampler = Some(value.sampler()?),
            "steps" => sampling.steps = Some(value.whole()?),
            "seed" => sampling.seed = Some(value.whole()?),
            "temperature" => sampling.temperature = Some(value.number()?),
            "top_k" => sampling.top_k = Some(value.whole()?),
            "top_p" => sampling.top_p = Some(value.number()?),
            "timeout" => timeout_us = Some(value.whole::<u64>()?),
            "finish_early" => asked.finish_early = value.flag()?,
            _ => return Err(unknown("parameters", name, &KNOWN)),
        }
    }
    asked.timeout_ms = timeout_us.map(|us| us.div_ceil(1000));
    Ok(asked)
}

/// A parameter with its name.
struct One<'a> {
    name: &'a str,
    value: Option<&'a Value>,
}

impl One<'_> {
    fn wrong(&self, wanted: &str) -> FieldError {
        let told = match self.value {
            None => "empty".to_owned(),
            Some(Value::BoolParam(value)) => value.to_string(),
            Some(Value::Int64Param(value)) => value.to_string(),
            Some(Value::Uint64Param(value)) => value.to_string(),
            Some(Value::DoubleParam(value)) => value.to_string(),
            Some(Value::StringParam(_)) => "a string".to_owned(),
        };
        FieldError::new(
            format!("parameters[{:?}]", self.name),
            format!("is {told}, must be {wanted}"),
        )
    }

    fn whole<T: TryFrom<i64> + TryFrom<u64>>(&self) -> Result<T, FieldError> {
        let value = match self.value {
            Some(Value::Int64Param(value)) => T::try_from(*value).ok(),
            Some(Value::Uint64Param(value)) => T::try_from(*value).ok(),
            Some(Value::BoolParam(_) | Value::DoubleParam(_) | Value::StringParam(_)) | None => None,
        };
        let bits = 8 * size_of::<T>();
        value.ok_or_else(|| self.wrong(&format!("a whole number from 0, below 2^{bits}")))
    }

    fn number(&self) -> Result<f64, FieldError> {
        match self.value {
            Some(Value::DoubleParam(value)) => Ok(*value),
            // Clients make whole numbers of 1.
            Some(Value::Int64Param(value)) => Ok(*value as f64),
            Some(Value::Uint64Param(value)) => Ok(*value as f64),
            Some(Value::BoolParam(_) | Value::StringParam(_)) | None => Err(self.wrong("a number")),
        }
    }

    fn flag(&self) -> Result<bool, FieldError> {
        match self.value {
            Some(Value::BoolParam(value)) => Ok(*value),
            Some(
                Value::Int64Param(_) | Value::Uint64Param(_) | Value::DoubleParam(_) | Value::StringParam(_),
            )
            | None => Err(self.wrong("true or false")),
        }
    }

    fn sampler(&self) -> Result<v1::sampling::Sampler, FieldError> {
        match self.value {
            Some(Value::StringParam(asked)) => sampler::named(&format!("parameters[{:?}]", self.name), asked),
            Some(
                Value::Int64Param(_) | Value::Uint64Param(_) | Value::DoubleParam(_) | Value::BoolParam(_),
            )
            | None => Err(self.wrong("the name of a sampler")),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn one(name: &str, value: Value) -> HashMap<String, InferParameter> {
        let parameter = InferParameter {
            parameter_choice: Some(value),
        };
        HashMap::from([(name.to_owned(), parameter)])
    }

    #[test]
    fn numbers_are_taken_in_every_form_that_clients_give_them() {
        for value in [Value::Int64Param(8), Value::Uint64Param(8)] {
            assert_eq!(
                read(&one("steps", value.clone())).unwrap().sampling.steps,
                Some(8)
            );
            let asked = read(&one("temperature", value)).unwrap();
            assert_eq!(asked.sampling.temperature, Some(8.0));
        }
        let largest = read(&one("seed", Value::Uint64Param(u64::MAX))).unwrap();
        assert_eq!(largest.sampling.seed, Some(u64::MAX));
        // Microseconds, of which none is lost.
        let asked = read(&one("timeout", Value::Int64Param(1001))).unwrap();
        assert_eq!(asked.timeout_ms, Some(2));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name_and_limit() {
        for (name, value, problem) in [
            ("steps", Value::Int64Param(-1), "is -1, must be a whole number"),
            ("steps", Value::Uint64Param(1 << 32), "below 2^32"),
            ("steps", Value::DoubleParam(8.0), "is 8, must be a whole number"),
            ("top_p", Value::BoolParam(true), "is true, must be a number"),
            (
                "sampler",
                Value::Int64Param(1),
                "is 1, must be the name of a sampler",
            ),
            (
                "sampler",
                Value::StringParam("ddim".to_owned()),
                "must be one of tweedie",
            ),
            ("finish_early", Value::Int64Param(1), "must be true or false"),
            ("priority", Value::Uint64Param(1), "is unknown, there are sampler"),
        ] {
            let error = read(&one(name, value)).unwrap_err();
            assert_eq!(error.field, format!("parameters[{name:?}]"));
            assert!(error.problem.contains(problem), "{name}: {}", error.problem);
        }
    }
}
