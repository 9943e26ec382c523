//! UUIDs, restarts and pins through the wire and back, and every refusal.

use super::*;
use crate::config::upkeep::{DEFAULT_ATTEMPTS, DEFAULT_DELAY, DEFAULT_HEALTHY, DEFAULT_MAX_DELAY};

fn through_the_wire(config: GuestConfig) -> Result<GuestConfig, Error> {
    let table = Table::default();
    let mut message = message();
    let mut to: guest_config::Builder<'_> = message.get_root().unwrap();
    config.encode(to.reborrow(), &table)?;
    GuestConfig::decode(to.into_reader(), &table)
}

#[test]
fn nothing_said_is_nothing_done() {
    let config = through_the_wire(GuestConfig::default()).unwrap();
    assert_eq!((config.uuid, config.durable, config.pins), (None, false, Vec::new()));
    assert_eq!(config.restart, Restart::default());
    assert_eq!(config.restart.policy, RestartPolicy::Never);
    assert_eq!(config.restart.attempts(), DEFAULT_ATTEMPTS);
    assert_eq!(config.restart.delay(), DEFAULT_DELAY);
    assert_eq!(config.restart.max_delay(), DEFAULT_MAX_DELAY);
    assert_eq!(config.restart.healthy(), DEFAULT_HEALTHY);
}

#[test]
fn what_is_out_of_range_is_refused_by_name() {
    refused(Kind::BadConfig, "uuid", |mut c, _| c.set_uuid(&[1; 15]));
    refused(Kind::BadConfig, "uuid", |mut c, _| c.set_uuid(&[0; 16]));
    refused(Kind::BadConfig, "restart.maxDelayMs", |c, _| {
        let mut restart = c.init_restart();
        restart.set_delay_ms(200);
        restart.set_max_delay_ms(199);
    });
    refused(Kind::BadConfig, "restart.maxDelayMs", |c, _| {
        c.init_restart().set_max_delay_ms(99)
    });
    refused(Kind::BadConfig, "pins", |c, _| {
        c.init_pins(65);
    });
    refused(Kind::BadConfig, "pins[0].vcpu", |c, _| {
        c.init_pins(1).get(0).set_vcpu(1)
    });
    refused(Kind::BadConfig, "pins[0].cpus", |c, _| {
        c.init_pins(1);
    });
    refused(Kind::BadConfig, "pins[0].cpus", |c, _| {
        c.init_pins(1).get(0).init_cpus(1025);
    });
    refused(Kind::BadConfig, "pins[1].vcpu", |c, _| {
        let mut pins = c.init_pins(2);
        for i in 0..2 {
            pins.reborrow().get(i).set_cpus(&[3][..]).unwrap();
        }
    });
}

#[test]
fn a_first_delay_past_the_longest_is_the_longest() {
    let restart = Restart {
        delay_ms: 60_000,
        ..Restart::default()
    };
    assert_eq!(restart.max_delay(), restart.delay());
}

proptest! {
    #[test]
    fn how_a_guest_is_kept_survives_the_wire(
        uuid in proptest::option::of(1u128..),
        policy in prop::sample::select(vec![RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always]),
        attempts: u32,
        delay_ms in 0u32..1 << 31,
        longer in proptest::option::of(100u32..1 << 31),
        healthy_ms: u32,
        durable: bool,
        cpus in 1u8..=MAX_CPUS,
        pins in prop::collection::btree_map(
            0u8..MAX_CPUS,
            prop::collection::btree_set(any::<u16>(), 1..9),
            0..8,
        ),
    ) {
        let max_delay_ms = longer.map_or(0, |longer| delay_ms + longer);
        let restart = Restart { policy, attempts, delay_ms, max_delay_ms, healthy_ms };
        let pins: Vec<Pin> = pins
            .into_iter()
            .filter(|(vcpu, _)| *vcpu < cpus)
            .map(|(vcpu, cpus)| Pin { vcpu, cpus: cpus.into_iter().collect() })
            .collect();
        let uuid = uuid.map(Uuid::from_u128);
        let config = GuestConfig { uuid, restart, durable, cpus, pins: pins.clone(), ..GuestConfig::default() };
        let back = through_the_wire(config.try_clone().unwrap()).unwrap();
        prop_assert_eq!((back.uuid, back.restart, back.durable, back.pins), (uuid, restart, durable, pins));
        prop_assert!(back.restart.max_delay() >= back.restart.delay());
    }
}
