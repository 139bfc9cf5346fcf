//! What finds room, what is refused, and what is predicted.

use super::*;

const MILLISECOND: u64 = 1_000_000;

fn caller(name: &str) -> Caller {
    Caller::new(name)
}

/// One worker, ten seconds for all, six for one caller.
fn admission() -> Arc<Admission> {
    Arc::new(Admission::new(Duration::from_secs(10), 0.6, 1))
}

/// Canvases of a request of its own.
fn wants(canvases: u32, evaluations: u64, cost: u64) -> Asked {
    static REQUESTS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    Asked {
        number: REQUESTS.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
        canvases,
        evaluations,
        cost,
        deadline: None,
        per_pass: 1,
    }
}

#[test]
fn predictions_share_the_time_with_who_waits() {
    let admission = admission();
    let second = 1_000 * MILLISECOND;
    let predicted = |name: &str, seconds| {
        let request = wants(1, seconds, second);
        admission.predicted(&caller(name), &request, seconds).as_secs()
    };
    assert_eq!(predicted("a", 2), 2, "alone");
    let _of_a = admission.admit(&caller("a"), wants(1, 3, second)).unwrap();
    let _of_b = admission.admit(&caller("b"), wants(1, 4, second)).unwrap();
    assert_eq!(predicted("c", 1), 3, "a turn of each");
    assert_eq!(predicted("c", 10), 17, "until all is done");
    let heavy = caller("c").with_weight(2);
    let predicted_heavy = admission.predicted(&heavy, &wants(1, 4, second), 4);
    assert_eq!(predicted_heavy.as_secs(), 8, "two turns for one of each");
    let wide = Asked {
        per_pass: 8,
        ..wants(1, 10, second)
    };
    let chain = admission.predicted(&caller("c"), &wide, 10).as_secs();
    assert_eq!(chain, 30, "three canvases share each of its passes");
    // Until "a" has had two for this request and two for the other one, "b" has had its four.
    assert_eq!(predicted("a", 2), 8);
}

#[test]
fn a_nearer_deadline_is_refused_where_it_would_break_a_later_one() {
    let admission = admission();
    let (now, second) = (Instant::now(), 1_000 * MILLISECOND);
    let within = |seconds, of| Asked {
        deadline: Some(Deadline {
            at: now + Duration::from_secs(seconds),
            then: OnDeadline::Fail,
        }),
        ..wants(1, of, second)
    };
    let misses = |request: Asked| {
        let missed = admission.misses(&caller("a"), &request, 1.0, Duration::ZERO)?;
        Some((missed.left.as_secs_f64().round(), missed.predicted.as_secs()))
    };
    assert_eq!(misses(within(4, 5)), Some((4.0, 5)), "its own");
    assert_eq!(misses(within(6, 3)), None);
    let _later = admission.admit(&caller("a"), within(6, 3)).unwrap();
    assert_eq!(misses(within(4, 2)), None, "there is room before it");
    assert_eq!(
        misses(within(5, 4)),
        Some((6.0, 7)),
        "it would push the later one out"
    );
    assert_eq!(misses(within(60, 4)), None, "later ones wait");
    let early = Deadline {
        at: now + Duration::from_secs(1),
        then: OnDeadline::FinishEarly,
    };
    let early = Asked {
        deadline: Some(early),
        ..wants(1, 2, second)
    };
    assert_eq!(misses(early), None);
    // Without a deadline half of the time is enough.
    let _patient = admission.admit(&caller("a"), wants(1, 2, second)).unwrap();
    assert_eq!(misses(within(5, 2)), Some((6.0, 7)));
}

proptest::proptest! {
    /// The running sums, against asking for each of the caller's requests what it is predicted to take.
    #[test]
    fn what_is_missed_is_the_first_that_is_predicted_to_be(
        running in proptest::collection::vec((0u64..6, 1u64..400, 1u32..3), 0..12),
        (seconds, evaluations, others) in (1u64..6, 1u64..400, 0u64..300),
    ) {
        let admission = Admission::new(Duration::from_secs(1_000_000), 1.0, 2);
        let admission = Arc::new(admission);
        let now = Instant::now();
        let within = |seconds: u64, evaluations, canvases| Asked {
            deadline: (seconds > 0).then(|| Deadline {
                // Far apart, so that what this takes itself does not matter.
                at: now + Duration::from_secs(1000 * seconds),
                then: OnDeadline::Fail,
            }),
            ..wants(canvases, evaluations, 10_000 * MILLISECOND)
        };
        let mut permits = Vec::new();
        let mut all = Vec::new();
        for (seconds, evaluations, canvases) in running {
            let request = within(seconds, evaluations, canvases);
            permits.extend(admission.admit(&caller("a"), request).unwrap());
            all.push(request.waits(evaluations));
        }
        permits.extend(admission.admit(&caller("b"), within(0, others + 1, 1)).unwrap());
        let new = within(seconds, evaluations, 1);
        let found = admission.misses(&caller("a"), &new, 1.3, Duration::ZERO);

        let waits = new.waits(evaluations);
        all.push(waits);
        let waiting = admission.waiting.lock();
        let mut missed: Vec<(Instant, Duration)> = Vec::new();
        for (index, one) in all.iter().enumerate() {
            let Some(must) = one.must.filter(|must| *must >= waits.must.unwrap()) else {
                continue;
            };
            let rest = all.iter().enumerate().filter(|(other, _)| *other != index);
            let own = of_caller(one, rest.map(|(_, waits)| waits));
            let predicted = admission.predicted_beside(&waiting, &caller("a"), own, one, &new).mul_f64(1.3);
            if now + predicted > must {
                missed.push((must, predicted));
            }
        }
        let first = missed.iter().map(|(must, _)| *must).min();
        let of_first = missed.iter().filter(|(must, _)| Some(*must) == first);
        let of_first: Vec<Duration> = of_first.map(|(_, predicted)| *predicted).collect();
        proptest::prop_assert_eq!(found.is_some(), first.is_some());
        proptest::prop_assert!(found.is_none_or(|found| of_first.contains(&found.predicted)));
    }
}

#[test]
fn room_is_taken_whole_and_given_back() {
    let admission = admission();
    let mut permits = admission
        .admit(&caller("a"), wants(2, 40, 50 * MILLISECOND))
        .unwrap();
    assert_eq!(admission.waiting(), Duration::from_secs(4));
    permits[0].keep(39);
    assert_eq!(admission.waiting(), Duration::from_millis(3950));
    permits[0].keep(10);
    permits[0].keep(40);
    assert_eq!(
        admission.waiting(),
        Duration::from_millis(2500),
        "never taken again"
    );
    drop(permits);
    assert!(admission.is_idle() && admission.waiting.lock().callers.is_empty());
}

#[test]
fn the_three_refusals_are_told_apart() {
    let admission = admission();
    let ask =
        |name: &str, seconds: u64| admission.admit(&caller(name), wants(1, seconds, 1_000 * MILLISECOND));
    let first = ask("a", 5).unwrap();
    assert!(matches!(ask("a", 7), Err(NoRoom::Request(room)) if room.waiting == Duration::from_secs(7)));
    assert!(matches!(ask("a", 3), Err(NoRoom::Caller(room)) if room.waiting == Duration::from_secs(5)));
    let second = ask("b", 4).unwrap();
    assert!(matches!(ask("c", 2), Err(NoRoom::Server(room)) if room.limit == Duration::from_secs(10)));
    assert_eq!(
        admission.waiting(),
        Duration::from_secs(9),
        "a refused request takes nothing"
    );
    let third = ask("c", 1).unwrap();
    drop((first, second, third));
    let small = caller("d").with_max_share(Some(0.2));
    let refused = admission.admit(&small, wants(1, 3, 1_000 * MILLISECOND));
    assert!(matches!(refused, Err(NoRoom::Request(room)) if room.limit == Duration::from_secs(2)));
}

/// On a simulated clock: work goes at the predicted pace, callers in turns; when it is time to come back, there
/// is room, and half of that time is too early.
#[test]
fn retry_delays_are_right_within_a_factor_of_two() {
    for (own, others, asked) in [(5, 0, 3), (5, 4, 3), (6, 1, 2), (2, 6, 5), (3, 6, 4)] {
        let admission = admission();
        let second = 1_000 * MILLISECOND;
        let mut mine = admission
            .admit(&caller("a"), wants(1, own, second))
            .unwrap()
            .remove(0);
        let mut theirs = (others > 0).then(|| {
            admission
                .admit(&caller("b"), wants(1, others, second))
                .unwrap()
                .remove(0)
        });
        let refused = admission
            .admit(&caller("a"), wants(1, asked, second))
            .unwrap_err();
        let (NoRoom::Server(room) | NoRoom::Caller(room) | NoRoom::Request(room)) = refused;
        let promised = room.retry_after.as_secs();
        let (mut mine_left, mut theirs_left, mut clock) = (own, others, 0);
        loop {
            let turn_is_mine = mine_left > 0 && (clock % 2 == 1 || theirs_left == 0);
            if turn_is_mine {
                mine_left -= 1;
                mine.keep(mine_left);
            } else {
                theirs_left -= 1;
                theirs.as_mut().unwrap().keep(theirs_left);
            }
            clock += 1;
            if admission.admit(&caller("a"), wants(1, asked, second)).is_ok() {
                break;
            }
        }
        assert!(
            promised <= 2 * clock && clock <= 2 * promised,
            "{own} own, {others} of others, {asked} asked: promised {promised}, was {clock}"
        );
    }
}
