//! Limits against a simulated clock: rates, bunching, fairness, changes.

use super::{
    Change, Cost, Direction, Limit, Place, RateLimits, Scope, TOLERANCE_NS, Topic, Unit, Wait,
};

const SECOND_NS: u64 = 1_000_000_000;

fn limits(operations: &str, bytes: &str) -> RateLimits {
    let limits = RateLimits::default();
    change(&limits, Unit::Operations, operations);
    change(&limits, Unit::Bytes, bytes);
    limits
}

fn change(limits: &RateLimits, unit: Unit, spec: &str) {
    let topic = match unit {
        Unit::Operations => Topic::Iops,
        Unit::Bytes => Topic::Bps,
    };
    limits.change(&Change::parse(spec, topic).expect(spec));
}

fn read(bytes: u64) -> Cost {
    Cost { direction: Direction::ToDriver, bytes }
}

fn write(bytes: u64) -> Cost {
    Cost { direction: Direction::FromDriver, bytes }
}

/// Numbers that look random, the same ones again for the same seed.
struct Random(u64);

impl Random {
    fn up_to(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % (most + 1)
    }
}

/// A queue whose driver always has the next request ready.
struct Queue {
    cost: Cost,
    /// How late its timer fires at most.
    late_ns: u64,
    place: Option<Place>,
    wake_ns: u64,
    admitted: u64,
}

impl Queue {
    fn new(cost: Cost, late_ns: u64) -> Self {
        Self { cost, late_ns, place: None, wake_ns: 0, admitted: 0 }
    }
}

/// Lets the queues run until `end_ns`, and gives when what was admitted: time and bytes.
fn run(limits: &RateLimits, queues: &mut [Queue], end_ns: u64) -> Vec<(u64, u64)> {
    let mut random = Random(0x5eed);
    let mut admitted = Vec::new();
    while let Some(next) = queues.iter_mut().min_by_key(|queue| queue.wake_ns) {
        let now_ns = next.wake_ns;
        if now_ns >= end_ns {
            break;
        }
        match limits.admit(&mut next.place, next.cost, now_ns) {
            Ok(()) => {
                next.admitted += 1;
                admitted.push((now_ns, next.cost.bytes));
            }
            Err(Wait { until_ns, .. }) => {
                assert!(until_ns > now_ns, "a wait that has ended already is a spin");
                next.wake_ns = until_ns + random.up_to(next.late_ns);
            }
        }
    }
    admitted
}

/// Most of `amounts` that came in any window of that length.
fn most_in_a_window(admitted: &[(u64, u64)], window_ns: u64, amount: impl Fn(u64) -> u64) -> u64 {
    let (mut first, mut sum, mut most) = (0, 0, 0);
    for (time_ns, bytes) in admitted {
        sum += amount(*bytes);
        while admitted[first].0 + window_ns < *time_ns {
            sum -= amount(admitted[first].1);
            first += 1;
        }
        most = most.max(sum);
    }
    most
}

/// What the rate gives in that time, rounded up.
fn given(rate: u64, time_ns: u64) -> u64 {
    let given = (u128::from(rate) * u128::from(time_ns)).div_ceil(u128::from(SECOND_NS));
    u64::try_from(given).expect("a test's rates are small")
}

/// Asserts that `rate` was kept within 5 % over `end_ns`, and nowhere exceeded by more than `burst`.
fn must_be_even(admitted: &[(u64, u64)], rate: u64, burst: u64, amount: fn(u64) -> u64) {
    let end_ns = admitted.last().expect("something is admitted").0;
    let all: u64 = admitted.iter().map(|(_, bytes)| amount(*bytes)).sum();
    let due = given(rate, end_ns);
    let over = all.saturating_sub(due);
    assert!(all * 100 >= due * 95, "{all} instead of {due}");
    assert!(over <= burst + 1, "{all} instead of {due} and {burst} at once");
    for window_ns in [1, 1_000, 1_000_000, 10_000_000, 100_000_000, SECOND_NS] {
        let most = most_in_a_window(admitted, window_ns, amount);
        let allowed = given(rate, window_ns) + burst;
        assert!(most <= allowed, "{most} in {window_ns} ns, {allowed} allowed");
    }
}

#[test]
fn operations_come_at_their_rate_and_not_in_bunches() {
    for rate in [1, 7, 100, 999, 10_000, 123_456, 1_000_000, 3_000_000] {
        for late_ns in [0, 60_000, TOLERANCE_NS] {
            for queue_count in [1, 3] {
                let limits = limits(&rate.to_string(), "none");
                let mut queues: Vec<_> =
                    (0..queue_count).map(|_| Queue::new(read(4096), late_ns)).collect();
                let end_ns = (SECOND_NS / rate * 300).max(SECOND_NS / 10);
                let admitted = run(&limits, &mut queues, end_ns);
                let burst = 1 + given(rate, TOLERANCE_NS);
                must_be_even(&admitted, rate, burst, |_| 1);
            }
        }
    }
}

#[test]
fn bytes_come_at_their_rate_and_not_in_bunches() {
    for rate in [4 << 10, 1 << 20, 100 << 20, 1 << 30, 10 << 30] {
        for bytes in [512, 4096, 65_536, 1 << 20] {
            for late_ns in [0, 60_000, TOLERANCE_NS] {
                let limits = limits("none", &rate.to_string());
                let mut queues = [Queue::new(write(bytes), late_ns)];
                let each_ns = bytes * SECOND_NS / rate;
                let admitted = run(&limits, &mut queues, (each_ns * 300).max(SECOND_NS / 50));
                let burst = bytes + given(rate, TOLERANCE_NS);
                must_be_even(&admitted, rate, burst, |bytes| bytes);
            }
        }
    }
}

#[test]
fn requests_of_mixed_sizes_come_at_the_rate_of_bytes() {
    let limits = limits("none", "1M/64k");
    let sizes = [512, 4096, 65_536, 1 << 20];
    let mut queues = sizes.map(|bytes| Queue::new(read(bytes), 60_000));
    let admitted = run(&limits, &mut queues, 300 * SECOND_NS);
    must_be_even(&admitted, 1 << 20, 64 << 10 | 1 << 20, |bytes| bytes);
    // The smallest do not keep the largest out, nor the other way round. They may use the burst
    // while the largest, which it has no room for, waits for its turn.
    let counts = queues.map(|queue| queue.admitted);
    assert!(counts.iter().all(|count| (250..=600).contains(count)), "{counts:?}");
}

#[test]
fn burst_is_what_comes_at_once_after_a_pause() {
    for (spec, at_once) in [("100/50", 50), ("100/1", 1), ("100", 1), ("1000", 6), ("1000/3", 6)] {
        let limits = limits(spec, "none");
        for pause_ns in [0, 10 * SECOND_NS] {
            let mut place = None;
            let admitted = std::iter::repeat_with(|| {
                limits.admit(&mut place, read(4096), SECOND_NS + pause_ns)
            });
            assert_eq!(admitted.take_while(Result::is_ok).count(), at_once, "{spec}");
        }
    }
}

#[test]
fn request_larger_than_the_burst_goes_when_nothing_is_owed_and_then_pays() {
    let limits = limits("none", "1M/4k");
    let mut place = None;
    assert_eq!(limits.admit(&mut place, read(1 << 20), SECOND_NS), Ok(()));
    // What the tolerance is worth goes ahead of the second that has been paid.
    let wait = limits.admit(&mut place, read(512), SECOND_NS).expect_err("a megabyte is owed");
    assert_eq!(wait, Wait { until_ns: 2 * SECOND_NS - TOLERANCE_NS, is_first: true });
}

#[test]
fn bucket_that_refuses_leaves_the_others_uncharged() {
    let limits = limits("total=1000/1000,read=1", "none");
    let mut reader = None;
    assert_eq!(limits.admit(&mut reader, read(0), SECOND_NS), Ok(()));
    for after_ns in 0..100 {
        let first = after_ns == 0;
        let wait = limits.admit(&mut reader, read(0), SECOND_NS + after_ns);
        let wait = wait.expect_err("one a second");
        assert_eq!((wait.until_ns, wait.is_first), (2 * SECOND_NS - TOLERANCE_NS, first));
    }
    let mut writer = None;
    let writes = std::iter::repeat_with(|| limits.admit(&mut writer, write(0), SECOND_NS + 100));
    assert_eq!(writes.take_while(Result::is_ok).count(), 999);
}

#[test]
fn directions_have_limits_of_their_own() {
    let limits = limits("read=100,write=300", "none");
    let mut queues = [Queue::new(read(512), 0), Queue::new(write(512), 0)];
    run(&limits, &mut queues, 10 * SECOND_NS);
    assert_eq!(queues.map(|queue| queue.admitted), [1001, 3002]);
}

#[test]
fn direction_that_is_slow_leaves_the_other_the_rest_of_the_total() {
    let limits = limits("total=1000,read=10", "none");
    let mut queues = [Queue::new(read(512), 60_000), Queue::new(write(512), 60_000)];
    let admitted = run(&limits, &mut queues, 10 * SECOND_NS);
    must_be_even(&admitted, 1000, 6 + 1, |_| 1);
    assert!(queues[0].admitted.abs_diff(100) <= 1, "{}", queues[0].admitted);
}

#[test]
fn queues_that_share_a_limit_get_equal_parts_however_late_they_are() {
    for rate in ["10", "1000", "20000"] {
        let limits = limits(rate, "none");
        let mut queues =
            [0, 0, 50_000, 1_000_000, 50_000_000].map(|late| Queue::new(read(512), late));
        run(&limits, &mut queues, 100 * SECOND_NS);
        let counts = queues.map(|queue| queue.admitted);
        let slowest = counts[counts.len() - 1];
        // Nobody takes the turn of who is late: it has one at each of its wakes.
        assert!(slowest >= 100 * SECOND_NS / (500_000_000 + 50_000_000) - 1, "{counts:?}");
        assert!(counts[0].abs_diff(counts[1]) <= counts[0] / 20 + 1, "{counts:?}");
    }
}

#[test]
fn place_in_the_line_is_kept_from_who_asks_all_the_time() {
    let limits = limits("10", "none");
    let (mut patient, mut greedy) = (None, None);
    assert_eq!(limits.admit(&mut greedy, read(0), 0), Ok(()));
    let wait = limits.admit(&mut patient, read(0), 0).expect_err("ten a second");
    // Who asks all the time gets the slots that follow, not this one.
    let mut taken = 0;
    for now_ns in (0..10 * SECOND_NS).step_by(1_000_000) {
        taken += u64::from(limits.admit(&mut greedy, read(0), now_ns).is_ok());
    }
    assert!((98..=99).contains(&taken), "{taken}");
    assert_eq!(limits.admit(&mut patient, read(0), wait.until_ns), Ok(()));
}

#[test]
fn place_that_is_given_up_costs_nothing() {
    let limits = limits("1", "none");
    let mut place = None;
    assert_eq!(limits.admit(&mut place, read(0), 0), Ok(()));
    for _ in 0..100 {
        limits.admit(&mut place, read(0), 0).expect_err("one a second");
        limits.give_back(place.take().expect("it waits"));
    }
    assert_eq!(limits.admit(&mut place, read(0), SECOND_NS), Ok(()));
}

#[test]
fn another_request_at_the_head_of_the_queue_pays_its_own_price() {
    let limits = limits("none", "1M");
    let mut place = None;
    assert_eq!(limits.admit(&mut place, read(1 << 20), 0), Ok(()));
    let far = limits.admit(&mut place, read(1 << 30), 0).expect_err("a megabyte a second");
    let near = limits.admit(&mut place, read(512), 1).expect_err("a megabyte is owed");
    assert_eq!((far.until_ns, far.is_first), (near.until_ns, true));
    assert!(!near.is_first, "the queue waited already");
    assert_eq!(limits.admit(&mut place, read(512), near.until_ns), Ok(()));
    let next = limits.admit(&mut place, read(512), near.until_ns + TOLERANCE_NS);
    assert_eq!(next, Ok(()), "the gigabyte was not made");
}

#[test]
fn change_takes_effect_at_once_and_leaves_no_debt() {
    let limits = limits("1", "512");
    let mut place = None;
    assert_eq!(limits.admit(&mut place, write(1 << 20), 0), Ok(()));
    let wait = limits.admit(&mut place, write(1 << 20), 1).expect_err("for most of an hour");
    assert!(wait.until_ns > 2000 * SECOND_NS);
    change(&limits, Unit::Bytes, "1G");
    change(&limits, Unit::Operations, "1000");
    assert_eq!(limits.admit(&mut place, write(1 << 20), 2), Ok(()));
    change(&limits, Unit::Bytes, "none");
    change(&limits, Unit::Operations, "1/5");
    let admitted = std::iter::repeat_with(|| limits.admit(&mut place, write(1 << 20), 3));
    assert_eq!(admitted.take_while(Result::is_ok).count(), 5);
    change(&limits, Unit::Operations, "none");
    assert_eq!(limits.admit(&mut place, write(1 << 20), 4), Ok(()));
}

#[test]
fn change_of_one_limit_leaves_the_others_as_they_are() {
    let limits = limits("total=1,write=2/3", "none");
    let mut place = None;
    assert_eq!(limits.admit(&mut place, read(512), 0), Ok(()));
    change(&limits, Unit::Operations, "read=5,total=1");
    change(&limits, Unit::Bytes, "1M");
    limits.admit(&mut place, read(512), 0).expect_err("one a second has been used");
    let shown = [Scope::Total, Scope::ToDriver, Scope::FromDriver].map(|scope| {
        match limits.in_force(Unit::Operations, scope) {
            Limit::At { rate, burst } => (rate.get(), burst.map_or(0, std::num::NonZeroU64::get)),
            Limit::None => (0, 0),
        }
    });
    assert_eq!(shown, [(1, 0), (5, 0), (2, 3)]);
}

#[test]
fn threads_that_share_a_limit_keep_it_while_it_is_changed() {
    let limits = limits("none", "none");
    change(&limits, Unit::Operations, "1000");
    let admitted: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut place = None;
                    let times = (0..SECOND_NS).step_by(10_000);
                    times.filter(|now| limits.admit(&mut place, read(1), *now).is_ok()).count()
                })
            })
            .collect();
        // The same limit again is no change, and no excuse.
        (0..1000).for_each(|_| change(&limits, Unit::Operations, "total=1000"));
        // Of another one, who waits takes its place anew.
        (600..1600).for_each(|rate| change(&limits, Unit::Bytes, &format!("write={rate}")));
        threads.into_iter().map(|thread| thread.join().expect("no panic") as u64).sum()
    });
    // Their clocks differ, as far as one runs ahead of the others; the sum is what the longest
    // of them allows.
    assert!((950..=1000 + 6 + 4).contains(&admitted), "{admitted}");
}

#[test]
fn who_comes_too_late_brings_no_bunch() {
    let limits = limits("100", "none");
    let mut place = None;
    assert_eq!(limits.admit(&mut place, read(0), SECOND_NS), Ok(()));
    limits.admit(&mut place, read(0), SECOND_NS).expect_err("a hundred a second");
    assert_eq!(limits.admit(&mut place, read(0), 2 * SECOND_NS), Ok(()));
    limits.admit(&mut place, read(0), 2 * SECOND_NS).expect_err("one has just gone");
}

#[test]
fn place_of_before_a_change_is_worth_nothing_after_it() {
    let limits = limits("2", "none");
    let (mut waiting, mut other) = (None, None);
    assert_eq!(limits.admit(&mut waiting, read(0), SECOND_NS), Ok(()));
    limits.admit(&mut waiting, read(0), SECOND_NS).expect_err("two a second");
    change(&limits, Unit::Operations, "1");
    assert_eq!(limits.admit(&mut other, read(0), SECOND_NS), Ok(()));
    limits.give_back(waiting.take().expect("it waits"));
    limits.admit(&mut other, read(0), SECOND_NS + SECOND_NS / 2).expect_err("one a second");
}
