//! Buckets by hand and by property: never more than the limit allows, and never less than it promises.

use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn limit(bytes: u64, burst_bytes: u64, operations: u64, burst_operations: u64) -> RateLimit {
    RateLimit {
        bytes_per_second: bytes,
        operations_per_second: operations,
        burst_bytes,
        burst_operations,
    }
}

#[test]
fn nothing_is_limited_by_default() {
    let mut limiter = RateLimiter::new(&RateLimit::default(), 5);
    assert!(!limiter.is_limited());
    for _ in 0..1000 {
        assert_eq!(limiter.take(5, u64::MAX), Ok(()));
    }
}

#[test]
fn a_burst_passes_at_once_and_then_the_rate_holds() {
    let mut limiter = RateLimiter::new(&limit(1000, 500, 0, 0), 0);
    assert_eq!(limiter.take(0, 300), Ok(()));
    assert_eq!(limiter.take(0, 200), Ok(()));
    assert_eq!(limiter.take(0, 100), Err(SECOND / 10));
    assert_eq!(limiter.take(SECOND / 10 - 1, 100), Err(1));
    assert_eq!(limiter.take(SECOND / 10, 100), Ok(()));
    // A rest fills it up to the burst, not beyond.
    assert_eq!(limiter.take(100 * SECOND, 500), Ok(()));
    assert_eq!(limiter.take(100 * SECOND, 1), Err(SECOND / 1000));
}

#[test]
fn without_a_burst_a_second_may_pass_at_once() {
    let mut limiter = RateLimiter::new(&limit(0, 0, 3, 0), 0);
    for _ in 0..3 {
        assert_eq!(limiter.take(0, 1 << 30), Ok(()));
    }
    assert_eq!(limiter.take(0, 0), Err(SECOND.div_ceil(3)));
}

#[test]
fn an_operation_beyond_the_burst_waits_for_a_full_bucket_and_leaves_a_debt() {
    let mut limiter = RateLimiter::new(&limit(1000, 100, 0, 0), 0);
    assert_eq!(limiter.take(0, 1), Ok(()));
    assert_eq!(limiter.take(0, 1100), Err(SECOND / 1000));
    assert_eq!(limiter.take(SECOND / 1000, 1100), Ok(()));
    // 1000 bytes of debt, and one more.
    assert_eq!(limiter.take(SECOND / 1000, 1), Err(SECOND + SECOND / 1000));
}

#[test]
fn a_refusal_charges_neither_bucket() {
    let mut limiter = RateLimiter::new(&limit(1000, 1000, 1, 1), 0);
    assert_eq!(limiter.take(0, 600), Ok(()));
    assert_eq!(limiter.take(0, 100), Err(SECOND));
    assert_eq!(limiter.take(SECOND, 1000), Ok(()));
}

#[test]
fn a_clock_that_goes_back_gives_nothing() {
    let mut limiter = RateLimiter::new(&limit(1000, 1, 0, 0), SECOND);
    assert_eq!(limiter.take(SECOND, 1), Ok(()));
    assert!(limiter.take(0, 1).is_err());
    assert!(limiter.take(SECOND, 1).is_err());
}

#[test]
fn the_timer_wakes_when_the_operation_may_pass() {
    assert!(RateTimer::new(&RateLimit::default()).unwrap().is_none());
    let mut timer = RateTimer::new(&limit(0, 0, 1000, 1)).unwrap().unwrap();
    assert!(timer.admit(0).unwrap());
    for _ in 0..3 {
        while !timer.admit(0).unwrap() {
            let mut ready = [rustix::event::PollFd::new(&timer, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut ready, None).unwrap();
            timer.expired();
        }
    }
}

proptest! {
    /// In any stretch of time, what passes is at most the burst and what the rate gives; and whoever waits as told passes.
    #[test]
    fn the_rate_holds_and_waiting_helps(
        rate in 1..u64::MAX,
        burst in 1..1u64 << 40,
        operations in prop_oneof![Just(0), 1..1u64 << 32],
        steps in prop::collection::vec((0..10 * SECOND, 0..1u64 << 20, any::<bool>()), 1..50),
    ) {
        let mut limiter = RateLimiter::new(&limit(rate, burst, operations, 0), 0);
        let mut now = 0;
        let mut passed: Vec<(u64, u64)> = Vec::new();
        for (pause, bytes, patient) in steps {
            now += pause;
            let bytes = bytes.min(burst);
            match limiter.take(now, bytes) {
                Ok(()) => passed.push((now, bytes)),
                Err(wait) => {
                    prop_assert!(wait > 0);
                    if patient {
                        now += wait;
                        prop_assert_eq!(limiter.take(now, bytes), Ok(()));
                        passed.push((now, bytes));
                    }
                }
            }
        }
        for first in 0..passed.len() {
            let (mut total, mut count) = (0u128, 0u128);
            for &(at, bytes) in &passed[first..] {
                total += u128::from(bytes);
                count += 1;
                let elapsed = u128::from(at - passed[first].0);
                let most = |rate: u64, burst: u64| u128::from(burst) + u128::from(rate) * elapsed / u128::from(SECOND) + 1;
                prop_assert!(total <= most(rate, burst));
                prop_assert!(operations == 0 || count <= most(operations, operations));
            }
        }
    }

    /// No numbers overflow.
    #[test]
    fn any_numbers_will_do(rate: u64, burst: u64, operations: u64, steps in prop::collection::vec((any::<u64>(), any::<u64>()), 0..20)) {
        let mut limiter = RateLimiter::new(&limit(rate, burst, operations, burst), 0);
        for (now, bytes) in steps {
            let _ = limiter.take(now, bytes);
        }
    }
}
