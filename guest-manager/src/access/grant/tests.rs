//! What a tree of grants permits: examples, and a model that it is compared with.

use futures::{FutureExt, executor::LocalPool, join};
use proptest::prelude::*;
use sepal_schema::facet::RIGHTS;

use super::*;

fn root() -> Grant {
    Grant::root(Rights::ALL, Rc::default())
}

fn lasting(lifetime: Duration) -> Bounds {
    Bounds {
        lifetime: Some(lifetime),
        ..Bounds::default()
    }
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[derive(Debug, Clone)]
enum Step {
    Narrow {
        from: usize,
        only: Option<Rights>,
        lifetime: Option<u64>,
    },
    Revoke(usize),
    Drop(usize),
    Pass(u64),
}

fn some_rights() -> impl Strategy<Value = Rights> {
    proptest::collection::vec(proptest::sample::select(&RIGHTS[..]), 1..17).prop_map(|all| all.into_iter().collect())
}

fn step() -> impl Strategy<Value = Step> {
    let narrow = (
        any::<usize>(),
        proptest::option::of(some_rights()),
        proptest::option::of(1u64..50),
    );
    prop_oneof![
        5 => narrow.prop_map(|(from, only, lifetime)| Step::Narrow { from, only, lifetime }),
        2 => any::<usize>().prop_map(Step::Revoke),
        1 => any::<usize>().prop_map(Step::Drop),
        1 => (0u64..20).prop_map(Step::Pass),
    ]
}

/// What is known of a grant by what was done, with nothing derived from it.
struct Known {
    /// None: it was dropped, which changes nothing for those derived from it.
    grant: Option<Grant>,
    parent: Option<usize>,
    only: Rights,
    expires: Option<Instant>,
    revoked: bool,
}

fn way(all: &[Known], from: usize) -> impl Iterator<Item = &Known> {
    std::iter::successors(Some(from), |&at| all[at].parent).map(|at| &all[at])
}

proptest! {
    #[test]
    fn a_grant_permits_what_all_on_the_way_to_the_root_permit(steps in proptest::collection::vec(step(), 1..80)) {
        let alive = Rc::new(Cell::new(0));
        let mut now = Instant::now();
        let root = Grant::root(Rights::ALL, alive.clone());
        let mut all = vec![Known { grant: Some(root), parent: None, only: Rights::ALL, expires: None, revoked: false }];
        for step in steps {
            match step {
                Step::Narrow { from, only, lifetime } => {
                    let from = from % all.len();
                    let Some(parent) = &all[from].grant else { continue };
                    let bounds = Bounds { only, lifetime: lifetime.map(ms), ..Bounds::default() };
                    let Ok(grant) = parent.narrow(&bounds, now) else {
                        prop_assert_eq!(way(&all, from).count() as u32, MAX_DEPTH + 1);
                        continue;
                    };
                    // Never wider than what it came from.
                    prop_assert_eq!(grant.rights().and(parent.rights()), grant.rights());
                    all.push(Known {
                        grant: Some(grant),
                        parent: Some(from),
                        only: only.unwrap_or(Rights::ALL),
                        expires: lifetime.map(|lifetime| now + ms(lifetime)),
                        revoked: false,
                    });
                }
                Step::Revoke(which) => {
                    let which = which % all.len();
                    if let Some(grant) = &all[which].grant {
                        grant.revoke();
                        all[which].revoked = true;
                    }
                }
                Step::Drop(which) => {
                    let which = which % all.len();
                    if which > 0 {
                        all[which].grant = None;
                    }
                }
                Step::Pass(time) => now += ms(time),
            }
            let mut living = 0;
            for (i, known) in all.iter().enumerate() {
                let Some(grant) = &known.grant else { continue };
                let over = way(&all, i).any(|it| it.revoked || it.expires.is_some_and(|at| at <= now));
                living += usize::from(!over && i > 0);
                prop_assert_eq!(grant.ended(now).is_some(), over);
                for right in RIGHTS {
                    let has = way(&all, i).all(|it| it.only.has(right));
                    match grant.permits(right, now) {
                        Ok(()) => prop_assert!(has && !over),
                        Err(Denial::Lacks(lacking)) => prop_assert!(lacking == right && !has && !over),
                        Err(Denial::Ended(_)) => prop_assert!(over),
                    }
                }
            }
            // Those that were dropped may live on through what was derived from them.
            prop_assert!(alive.get() >= living);
        }
        drop(all);
        prop_assert_eq!(alive.get(), 0);
    }

    #[test]
    fn bounds_only_get_tighter(
        rates in proptest::collection::vec((1u32..1000, 1u32..1000), 1..6),
        ranges in proptest::collection::vec((0u64..100, 0u64..100), 1..6),
        ports in proptest::collection::vec(proptest::collection::vec(0u32..8, 0..8), 1..6),
    ) {
        let now = Instant::now();
        let mut grant = root();
        let (mut low, mut high) = (0, u64::MAX);
        let mut open: Vec<u32> = (0..8).collect();
        for (((per_second, burst), (a, b)), ports) in rates.into_iter().zip(ranges).zip(ports) {
            let range = Range { min: a.min(b), max: a.max(b) };
            let bounds = Bounds {
                rate: Some(CallRate { per_second, burst }),
                balloon_pages: Some(range),
                memory_bytes: Some(range),
                vsock_ports: ports.clone(),
                ..Bounds::default()
            };
            let left: Vec<_> = open.iter().copied().filter(|port| ports.is_empty() || ports.contains(port)).collect();
            let nothing = range.min > high || range.max < low || left.is_empty();
            let before = grant.bounds(now);
            match grant.narrow(&bounds, now) {
                Err(error) => {
                    prop_assert!(nothing && error.kind == Kind::BadConfig, "{}", error);
                    break;
                }
                Ok(narrow) => {
                    prop_assert!(!nothing);
                    (low, high) = (low.max(range.min), high.min(range.max));
                    open = left;
                    grant = narrow;
                }
            }
            for value in [0, low.wrapping_sub(1), low, high, high.wrapping_add(1), 50, u64::MAX] {
                let inside = (low..=high).contains(&value);
                prop_assert_eq!(grant.check_balloon(value).is_ok(), inside);
                prop_assert_eq!(grant.check_memory(value).is_ok(), inside);
            }
            for port in 0..8 {
                prop_assert_eq!(grant.check_port(port).is_ok(), open.contains(&port));
            }
            let tightest = grant.bounds(now).rate.unwrap();
            prop_assert!(tightest.per_second <= per_second && tightest.burst <= burst);
            prop_assert!(before.rate.is_none_or(|rate| rate.per_second >= tightest.per_second));
        }
    }

    #[test]
    fn no_more_calls_than_the_rate_and_no_fewer(
        per_second in 1u32..2_000_000,
        burst in 1u32..20,
        pauses in proptest::collection::vec(0u64..2_000_000_000, 1..200),
    ) {
        let begin = Instant::now();
        let rate = CallRate { per_second, burst };
        let grant = root().narrow(&Bounds { rate: Some(rate), ..Bounds::default() }, begin).unwrap();
        let (mut now, mut taken) = (begin, 0u128);
        for pause in pauses {
            now += Duration::from_nanos(pause);
            match grant.spend(now) {
                Ok(()) => taken += 1,
                Err(fast) => {
                    prop_assert_eq!(fast.rate, rate);
                    prop_assert!(fast.wait > Duration::ZERO && fast.wait <= Duration::from_secs(1) / per_second + ms(1));
                    // Whoever waits so long is taken.
                    now += fast.wait;
                    prop_assert!(grant.spend(now).is_ok());
                    taken += 1;
                }
            }
            let most = u128::from(burst) + (now - begin).as_nanos() * u128::from(per_second) / 999_000_000;
            prop_assert!(taken <= most, "{} of {}", taken, most);
        }
    }
}

#[test]
fn the_slowest_rate_on_the_way_counts_and_a_refused_call_costs_nothing() {
    let now = Instant::now();
    let rate = |per_second, burst| Bounds {
        rate: Some(CallRate { per_second, burst }),
        ..Bounds::default()
    };
    let slow = root().narrow(&rate(1, 2), now).unwrap();
    let fast = slow.narrow(&rate(100, 100), now).unwrap();
    assert_eq!((fast.spend(now), fast.spend(now)), (Ok(()), Ok(())));
    let refused = fast.spend(now).unwrap_err();
    assert_eq!((refused.rate.per_second, refused.wait), (1, Duration::from_secs(1)));
    // Siblings share what is above them.
    assert!(slow.spend(now).is_err());
    assert_eq!(fast.0.bucket.as_ref().unwrap().wait(now), Duration::ZERO);
    assert_eq!(slow.spend(now + Duration::from_secs(1)), Ok(()));
}

#[test]
fn whoever_waits_for_the_end_is_woken_and_told_how_it_came() {
    let now = Instant::now();
    let parent = root().narrow(&lasting(Duration::from_secs(10)), now).unwrap();
    let child = parent.narrow(&Bounds::default(), now).unwrap();
    let sibling = root().narrow(&Bounds::default(), now).unwrap();
    let end = async {
        assert!(child.until_ended().now_or_never().is_none());
        // As its timer does.
        parent.weak().expire(now + Duration::from_secs(9));
        assert!(child.until_ended().now_or_never().is_none());
        parent.weak().expire(now + Duration::from_secs(10));
    };
    let (of_parent, of_child, ()) =
        LocalPool::new().run_until(async { join!(parent.until_ended(), child.until_ended(), end) });
    assert_eq!(of_parent.to_string(), "expired after 10 s");
    assert_eq!(of_child.to_string(), "was derived from one that expired after 10 s");
    assert!(sibling.ended(now + Duration::from_secs(1000)).is_none());
    // The first end counts, and nothing made of what has ended lives.
    parent.revoke();
    let late = parent.narrow(&Bounds::default(), now).unwrap();
    assert_eq!(parent.ended(now), Some(of_parent));
    assert_eq!(late.ended(now).unwrap().to_string(), of_child.to_string());
    sibling.revoke();
    assert_eq!(sibling.ended(now).unwrap().to_string(), "was revoked");
}

#[test]
fn there_are_only_so_many_and_only_so_deep() {
    let now = Instant::now();
    let root = root();
    let mut deepest = root.clone();
    for _ in 0..MAX_DEPTH {
        deepest = deepest.narrow(&Bounds::default(), now).unwrap();
    }
    assert_eq!(
        deepest.narrow(&Bounds::default(), now).unwrap_err().kind,
        Kind::NoResources
    );
    drop(deepest);
    let hub = root.narrow(&Bounds::default(), now).unwrap();
    let many: Vec<_> = (1..MAX_ALIVE)
        .map(|_| hub.narrow(&Bounds::default(), now).unwrap())
        .collect();
    assert_eq!(
        root.narrow(&Bounds::default(), now).unwrap_err().kind,
        Kind::NoResources
    );
    // Whoever keeps what was revoked keeps nobody from anything.
    hub.revoke();
    let again = root.narrow(&Bounds::default(), now).unwrap();
    drop(many);
    drop(again);
    assert_eq!(root.0.alive.get(), 0);
    // Those that are gone are not remembered.
    let looking = root.narrow(&Bounds::only(Right::Observe.into()), now).unwrap();
    let mut many = Vec::new();
    let refused = loop {
        match looking.narrow(&Bounds::default(), now) {
            Ok(grant) => many.push(grant),
            Err(error) => break error,
        }
    };
    assert_eq!(
        (refused.kind, many.len()),
        (Kind::NoResources, MAX_ALIVE - FOR_SHARING - 1)
    );
    root.narrow(&Bounds::default(), now).unwrap();
    drop((many, looking));
    for _ in 0..10_000 {
        root.narrow(&Bounds::default(), now).unwrap();
    }
    assert!(root.0.children.borrow().capacity() < 64);
}
