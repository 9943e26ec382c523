//! The policy on simulated hosts.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn read(change: impl FnOnce(pressure_policy::Builder<'_>)) -> Result<Policy, Error> {
    let mut message = capnp::message::TypedBuilder::<pressure_policy::Owned>::new_default();
    change(message.init_root());
    Policy::read(message.get_root_as_reader().unwrap())
}

#[test]
fn zeros_are_the_defaults_and_what_is_out_of_range_is_named() {
    let policy = read(|mut to| to.set_enabled(true)).unwrap();
    assert_eq!(policy, Policy::default());
    assert!(!read(|_| ()).unwrap().enabled);
    let field = |change: fn(pressure_policy::Builder<'_>)| read(change).unwrap_err().about;
    assert_eq!(field(|mut to| to.set_stall_percent(101)), "stallPercent");
    assert_eq!(field(|mut to| to.set_window_ms(499)), "windowMs");
    assert_eq!(field(|mut to| to.set_window_ms(10_001)), "windowMs");
    assert_eq!(field(|mut to| to.set_step_percent(51)), "stepPercent");
    assert_eq!(field(|mut to| to.set_reserve_percent(9)), "reservePercent");
    assert_eq!(field(|mut to| to.set_calm_ms(3_600_001)), "calmMs");
}

#[test]
fn what_is_written_is_read_again() {
    let policy = Policy {
        enabled: false,
        stall_percent: 33,
        window: Duration::from_millis(1500),
        step_percent: 7,
        reserve_percent: 100,
        calm: Duration::from_secs(3600),
    };
    assert_eq!(read(|to| policy.write(to)).unwrap(), policy);
}

/// A host with so much memory, and guests that use all of theirs as long as there is load.
struct Host {
    memory: u64,
    policy: Policy,
    calm: Calm,
    /// Memory, and what is taken of it.
    guests: Vec<(u64, u64)>,
    now: Duration,
}

impl Host {
    fn used(&self, load_percent: u64) -> u64 {
        let of = |(memory, taken): &(u64, u64)| (memory / 100 * load_percent).min(memory - taken);
        self.guests.iter().map(of).sum()
    }

    /// One window of time, with pressure if the memory does not suffice.
    fn window(&mut self, load_percent: u64) {
        self.now += self.policy.window;
        if self.used(load_percent) > self.memory {
            self.calm.pressed(self.now, &self.policy);
            for (memory, taken) in &mut self.guests {
                *taken = self.policy.take(*memory, *taken);
            }
        } else if self.calm.due(self.now, &self.policy) {
            for (memory, taken) in &mut self.guests {
                *taken = self.policy.give(*memory, *taken);
            }
            if self.guests.iter().all(|(_, taken)| *taken == 0) {
                self.calm.over();
            }
        }
    }
}

#[test]
fn pressure_ends_once_enough_is_taken_and_all_is_given_back_later() {
    let mut host = Host {
        memory: 3000 * MIB,
        policy: Policy::default(),
        calm: Calm::default(),
        guests: vec![(1000 * MIB, 0); 4],
        now: Duration::ZERO,
    };
    for _ in 0..60 {
        host.window(100);
    }
    // A quarter of each is missing; no more than a step beyond that is taken. Now and then it tries to give a step back.
    assert!(
        host.guests
            .iter()
            .all(|(_, taken)| (200 * MIB..=300 * MIB).contains(taken)),
        "{:?}",
        host.guests
    );
    assert!(host.used(100) <= 3200 * MIB);
    for _ in 0..100 {
        host.window(20);
    }
    assert!(host.guests.iter().all(|(_, taken)| *taken == 0), "{:?}", host.guests);
    assert_eq!(host.calm.deadline(), None);
}

#[test]
fn what_was_taken_before_is_given_back_as_well() {
    let (mut calm, policy) = (Calm::default(), Policy::default());
    calm.resumed(Duration::from_secs(5), &policy);
    // Another guest goes on, and does not put it off.
    calm.resumed(Duration::from_secs(7), &policy);
    assert!(!calm.is_pressed(Duration::from_secs(7), &policy));
    assert_eq!(calm.deadline(), Some(Duration::from_secs(15)));
    assert!(calm.due(Duration::from_secs(15), &policy));
}

fn policies() -> impl Strategy<Value = Policy> {
    (
        any::<bool>(),
        1..=100_u8,
        500..=10_000_u64,
        1..=50_u8,
        10..=100_u8,
        1..=100_000_u64,
    )
        .prop_map(
            |(enabled, stall_percent, window, step_percent, reserve_percent, calm)| Policy {
                enabled,
                stall_percent,
                window: Duration::from_millis(window),
                step_percent,
                reserve_percent,
                calm: Duration::from_millis(calm),
            },
        )
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Pressure,
    Wait(u64),
    Policy(Policy),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Pressure),
        3 => (0..20_000_u64).prop_map(Step::Wait),
        1 => policies().prop_map(Step::Policy),
    ];
    prop::collection::vec(step, 0..80)
}

proptest! {
    /// Whatever happens: no guest has less than the reserve, all that is taken is whole pages, nothing is taken while it is switched off, and all comes back.
    #[test]
    fn never_below_the_reserve_and_all_comes_back(
        memory in prop::collection::vec(0..1_u64 << 42, 1..5),
        mut policy in policies(),
        steps in steps(),
    ) {
        let (mut calm, mut now) = (Calm::default(), Duration::ZERO);
        let mut guests: Vec<_> = memory.into_iter().map(|memory| (memory, 0)).collect();
        for step in steps {
            match step {
                Step::Pressure if policy.enabled => {
                    calm.pressed(now, &policy);
                    prop_assert!(calm.is_pressed(now, &policy));
                    guests.iter_mut().for_each(|(memory, taken)| *taken = policy.take(*memory, *taken));
                }
                Step::Pressure => {}
                Step::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    let expected = calm.deadline().is_some_and(|deadline| deadline <= now);
                    let due = calm.due(now, &policy);
                    prop_assert_eq!(due, expected);
                    if due {
                        for (memory, taken) in &mut guests {
                            let before = *taken;
                            *taken = policy.give(*memory, *taken);
                            prop_assert!(*taken < before || before == 0);
                        }
                    }
                }
                Step::Policy(other) => {
                    policy = other;
                    calm.changed(now, &policy);
                    guests.iter_mut().for_each(|(memory, taken)| *taken = policy.keep(*memory, *taken));
                }
            }
            for (memory, taken) in &guests {
                prop_assert_eq!(taken % PAGE, 0);
                let kept = u128::from(memory - taken);
                prop_assert!(kept * 100 >= u128::from(*memory) * u128::from(policy.reserve_percent));
                prop_assert!(policy.enabled || *taken == 0);
            }
        }
        // No more than a hundred steps of a percent, and some pages that rounding leaves, are ever taken.
        for _ in 0..300 {
            now += policy.calm;
            if calm.due(now, &policy) {
                guests.iter_mut().for_each(|(memory, taken)| *taken = policy.give(*memory, *taken));
            }
        }
        prop_assert!(guests.iter().all(|(_, taken)| *taken == 0), "{:?}", guests);
    }
}
