//! How much memory networks may take, and who has to make room for others.

use std::time::{Duration, Instant};

/// How long a model stays in memory at least, once it is there: two that want the same room take turns, and
/// neither is unloaded before it has done something.
pub(super) const MIN_STAY: Duration = if cfg!(feature = "shuttle") {
    // Time does not pass there.
    Duration::ZERO
} else {
    Duration::from_millis(500)
};

/// How a model's networks in memory stand when room is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stay {
    /// When the first of them was loaded.
    pub(super) since: Instant,
    /// When one was last asked for.
    pub(super) used: Instant,
    /// Whether they are on their way out already, as soon as their passes end.
    pub(super) leaving: bool,
}

/// Remedy for a model that finds no room.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Remedy<K> {
    /// This one has to go.
    Unload(K),
    /// Whoever has been there for long enough at that time.
    At(Instant),
    /// Room is on its way.
    Wait,
}

/// Chooses who makes room: of those that have been there for long enough, the one that was used longest ago.
pub(super) fn remedy<K>(stays: impl IntoIterator<Item = (K, Stay)>, now: Instant) -> Remedy<K> {
    let (mut victim, mut earliest): (Option<(K, Instant)>, Option<Instant>) = (None, None);
    for (key, stay) in stays {
        if stay.leaving {
            return Remedy::Wait;
        }
        let free_from = stay.since + MIN_STAY;
        if free_from > now {
            earliest = Some(earliest.map_or(free_from, |earliest| earliest.min(free_from)));
        } else if victim.as_ref().is_none_or(|(_, used)| stay.used < *used) {
            victim = Some((key, stay.used));
        }
    }
    match (victim, earliest) {
        (Some((key, _)), _) => Remedy::Unload(key),
        (None, Some(earliest)) => Remedy::At(earliest),
        (None, None) => Remedy::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_goes_but_nobody_who_has_only_just_come() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let stay = |since, used| Stay {
            since: at(since),
            used: at(used),
            leaving: false,
        };
        let now = at(10);
        let rows = [("a", stay(0, 9)), ("b", stay(1, 8)), ("new", stay(10, 0))];
        assert_eq!(remedy(rows, now), Remedy::Unload("b"));
        assert_eq!(remedy([rows[2]], now), Remedy::At(at(10) + MIN_STAY));
        assert_eq!(remedy::<&str>([], now), Remedy::Wait);
        let leaving = Stay {
            leaving: true,
            ..stay(0, 0)
        };
        assert_eq!(remedy([rows[0], ("leaving", leaving)], now), Remedy::Wait);
    }
}
