//! Deadlines of requests: of their field and of their call.

use std::time::{Duration, Instant};

use tonic::metadata::MetadataMap;

use super::status::FieldError;
use crate::engine::{Deadline, OnDeadline};
use crate::proto::v1;

/// The longest deadline that makes a difference: later ones hold as this.
const MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The deadline of a request that arrived at `arrived`, in a call of this `timeout`.
pub(super) fn deadline(
    asked: Option<v1::Deadline>,
    timeout: Option<Duration>,
    arrived: Instant,
) -> Result<Option<Deadline>, FieldError> {
    let asked_for_one = asked.is_some();
    let v1::Deadline { ms, on_deadline } = asked.unwrap_or_default();
    if ms == Some(0) {
        return Err(FieldError::new("deadline.ms", "is 0, must be at least 1"));
    }
    let then = match v1::OnDeadline::try_from(on_deadline) {
        Ok(v1::OnDeadline::Unspecified | v1::OnDeadline::Fail) => OnDeadline::Fail,
        Ok(v1::OnDeadline::FinishEarly) => OnDeadline::FinishEarly,
        Err(_) => {
            let problem = format!("{on_deadline} is no value this server knows");
            return Err(FieldError::new("deadline.on_deadline", problem));
        }
    };
    let left = ms.map(Duration::from_millis).into_iter().chain(timeout).min();
    match left {
        None if asked_for_one => Err(FieldError::new(
            "deadline.ms",
            "is absent, and the call has no deadline either",
        )),
        None => Ok(None),
        Some(left) => Ok(arrived.checked_add(left.min(MAX)).map(|at| Deadline { at, then })),
    }
}

/// The deadline that protocols ask for which know a time and whether to finish early.
pub(super) fn asked(ms: Option<u64>, finish_early: bool) -> Option<v1::Deadline> {
    let on_deadline = if finish_early {
        v1::OnDeadline::FinishEarly
    } else {
        v1::OnDeadline::Fail
    };
    (ms.is_some() || finish_early).then(|| v1::Deadline {
        ms,
        on_deadline: on_deadline.into(),
    })
}

/// The time that a call has, as its `grpc-timeout` says (gRPC over HTTP/2: up to eight digits and a unit).
pub(super) fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u32 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    let value = u64::from(value);
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        let read = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            timeout(&metadata)
        };
        assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(read("3M"), Some(Duration::from_secs(180)));
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("7u"), Some(Duration::from_micros(7)));
        assert_eq!(read("8n"), Some(Duration::from_nanos(8)));
        for bad in ["", "S", "5", "5s", "123456789S", "-1S", "1.5S"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
        assert_eq!(timeout(&MetadataMap::new()), None);
    }

    #[test]
    fn the_earlier_of_field_and_call_holds() {
        let arrived = Instant::now();
        let ask = |ms, timeout: Option<u64>| {
            let asked = v1::Deadline { ms, on_deadline: 2 };
            let found = deadline(Some(asked), timeout.map(Duration::from_millis), arrived)
                .unwrap()
                .unwrap();
            assert_eq!(found.then, OnDeadline::FinishEarly);
            found.at - arrived
        };
        assert_eq!(ask(Some(30), Some(50)), Duration::from_millis(30));
        assert_eq!(ask(Some(70), Some(50)), Duration::from_millis(50));
        assert_eq!(ask(None, Some(50)), Duration::from_millis(50));
        assert_eq!(ask(Some(u64::MAX), None), MAX);
        let silent = deadline(None, Some(Duration::from_secs(1)), arrived)
            .unwrap()
            .unwrap();
        assert_eq!(silent.then, OnDeadline::Fail);
        assert_eq!(deadline(None, None, arrived).unwrap(), None);
    }

    #[test]
    fn deadlines_that_cannot_be_are_refused() {
        for (ms, on_deadline, field) in [
            (Some(0), 0, "deadline.ms"),
            (None, 2, "deadline.ms"),
            (Some(1), 9, "deadline.on_deadline"),
        ] {
            let error = deadline(Some(v1::Deadline { ms, on_deadline }), None, Instant::now()).unwrap_err();
            assert_eq!(error.field, field);
        }
    }
}
