//! Tests of the registers against a loop that follows their orders at any time, or never.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const OFFERED: u64 = feature::TRANSPORT | 1;
const QUEUES: u16 = 3;

fn registers() -> Registers {
    let mut registers = Registers::new(OFFERED, &[256, 128, 64], QUEUES + 1);
    registers.set_bus_master(true);
    registers
}

/// The loop's side, which knows what it was told and no more.
#[derive(Default)]
struct Worker {
    active: Option<u64>,
    queues: BTreeMap<u16, QueueSetup>,
    dead: bool,
}

impl Worker {
    /// Does what is to be done, as the real one does.
    fn obey(&mut self, registers: &mut Registers) {
        if self.dead {
            return;
        }
        let orders = registers.take_orders();
        if orders.reset {
            *self = Self::default();
            registers.reset_done();
        }
        if orders.stop {
            assert!(self.active.is_some() && orders.activate.is_none());
            *self = Self::default();
            registers.broken();
        }
        if let Some(Activation { features, queues }) = orders.activate {
            assert!(self.active.is_none(), "activated twice");
            assert_eq!(features & !OFFERED, 0);
            assert_ne!(features & feature::VERSION_1, 0);
            self.active = Some(features);
            self.queues = (0..).zip(queues).filter_map(|(n, setup)| Some((n, setup?))).collect();
        }
        for (queue, order) in orders.queues {
            match order {
                // It was enabled before the device stopped.
                QueueOrder::Enable(_) if self.active.is_none() => {}
                QueueOrder::Enable(setup) => {
                    assert!(self.active.is_some_and(|features| features & feature::RING_RESET != 0));
                    assert!(self.queues.insert(queue, setup).is_none(), "enabled twice");
                }
                QueueOrder::Reset => {
                    self.queues.remove(&queue);
                    registers.queue_reset_done(queue);
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Obey,
    BusMaster(bool),
    Broken,
    Dead,
}

/// Mostly what a driver would write, in any order.
fn step() -> impl Strategy<Value = Step> {
    let write = |at: u64, data: &[u8]| Step::Write(at, data.to_vec());
    prop_oneof![
        16 => prop::sample::select(vec![0_u8, 1, 3, 11, 15, 0xff]).prop_map(move |status| write(field::STATUS, &[status])),
        2 => prop::sample::select(vec![0_u32, OFFERED as u32, u32::MAX, (OFFERED >> 32) as u32])
            .prop_map(move |half| write(field::DRIVER_FEATURE, &half.to_le_bytes())),
        2 => (0_u32..3).prop_map(move |n| write(field::DRIVER_FEATURE_SELECT, &n.to_le_bytes())),
        3 => (0..QUEUES + 1).prop_map(move |n| write(field::QUEUE_SELECT, &n.to_le_bytes())),
        4 => Just(write(field::QUEUE_ENABLE, &[1, 0])),
        3 => Just(write(field::QUEUE_RESET, &[1, 0])),
        1 => any::<u16>().prop_map(move |n| write(field::QUEUE_SIZE, &n.to_le_bytes())),
        2 => (0_u64..0x40, prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, data)| Step::Write(at, data)),
        12 => Just(Step::Obey),
        2 => any::<bool>().prop_map(Step::BusMaster),
        2 => Just(Step::Broken),
        1 => Just(Step::Dead),
    ]
}

fn byte(registers: &Registers, at: u64) -> u8 {
    registers.image(0)[at as usize]
}

/// Accepts everything, so that random steps get further.
fn accept_all(registers: &mut Registers) {
    for (select, half) in [(0_u32, OFFERED as u32), (1, (OFFERED >> 32) as u32)] {
        registers.write(field::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
        registers.write(field::DRIVER_FEATURE, &half.to_le_bytes());
    }
}

proptest! {
    #[test]
    fn registers_and_loop_agree_whatever_a_driver_writes(steps in prop::collection::vec(step(), 0..300)) {
        let mut registers = registers();
        let mut worker = Worker::default();
        let mut bus_master = true;
        for step in steps {
            if registers.status() == 3 {
                accept_all(&mut registers);
            }
            match step {
                Step::Write(at, data) => {
                    let before = registers.status();
                    registers.write(at, &data);
                    let status = registers.status();
                    // Only a reset clears bits.
                    prop_assert!(status == 0 || before & !status == 0);
                }
                Step::Obey => {
                    worker.obey(&mut registers);
                    prop_assert!(bus_master || worker.active.is_none(), "it may not reach memory");
                }
                Step::BusMaster(on) => {
                    let ring = registers.set_bus_master(on).ring;
                    prop_assert_eq!(ring, on != bus_master && registers.phase() == Phase::Active);
                    bus_master = on;
                }
                // The loop finds a broken rule only while the device works.
                Step::Broken if worker.active.is_some() && !worker.dead => {
                    worker = Worker::default();
                    registers.broken();
                }
                Step::Broken => {}
                Step::Dead => {
                    worker = Worker { dead: true, ..Worker::default() };
                    registers.dead();
                }
            }
            let status = registers.status();
            if status & status::DRIVER_OK != 0 {
                prop_assert!(status & status::FEATURES_OK != 0);
                if worker.dead {
                    prop_assert!(status & status::DEVICE_NEEDS_RESET != 0);
                }
            }
            if status == 0 {
                prop_assert!(worker.active.is_none(), "a device that was reset still works");
                prop_assert_eq!(registers.config_vector, NO_VECTOR);
            }
            if registers.phase() != Phase::Active && registers.phase() != Phase::Resetting {
                prop_assert!(worker.active.is_none());
            }
        }
        // Once the loop has caught up, both know the same queues.
        registers.set_bus_master(true);
        worker.obey(&mut registers);
        if registers.phase() == Phase::Active {
            for queue in 0..QUEUES {
                registers.write(field::QUEUE_SELECT, &queue.to_le_bytes());
                prop_assert_eq!(byte(&registers, field::QUEUE_ENABLE) == 1, worker.queues.contains_key(&queue));
                prop_assert_eq!(byte(&registers, field::QUEUE_RESET), 0);
            }
        }
        prop_assert_ne!(registers.phase(), Phase::Resetting);
    }
}

/// A driver that got as far as DRIVER_OK with queue 0.
fn started() -> (Registers, Worker) {
    let mut registers = registers();
    registers.write(field::STATUS, &[3]);
    accept_all(&mut registers);
    registers.write(field::STATUS, &[11]);
    registers.write(field::QUEUE_ENABLE, &[1, 0]);
    assert!(registers.write(field::STATUS, &[15]).ring);
    let mut worker = Worker::default();
    worker.obey(&mut registers);
    assert!(worker.active.is_some());
    (registers, worker)
}

#[test]
fn a_reset_before_the_loop_has_looked_never_activates() {
    let (mut registers, mut worker) = started();
    registers.write(field::STATUS, &[0]);
    worker.obey(&mut registers);
    registers.write(field::STATUS, &[3]);
    accept_all(&mut registers);
    registers.write(field::STATUS, &[15]);
    registers.write(field::STATUS, &[0]);
    assert_ne!(registers.status(), 0);
    let orders = registers.take_orders();
    assert!(orders.reset && orders.activate.is_none());
    registers.reset_done();
    assert_eq!(registers.status(), 0);
}

#[test]
fn a_device_starts_when_it_becomes_a_bus_master_and_stops_when_it_is_none() {
    let mut registers = Registers::new(OFFERED, &[256], 2);
    registers.write(field::STATUS, &[3]);
    accept_all(&mut registers);
    registers.write(field::STATUS, &[11]);
    registers.write(field::QUEUE_ENABLE, &[1, 0]);
    registers.write(field::STATUS, &[15]);
    assert_eq!(registers.take_orders(), Orders::default());
    assert!(registers.set_bus_master(true).ring);
    let orders = registers.take_orders();
    assert!(orders.activate.is_some_and(|activation| activation.queues[0].is_some()));

    assert!(registers.set_bus_master(false).ring);
    assert!(registers.take_orders().stop);
    registers.broken();
    assert!(!registers.set_bus_master(true).ring, "it waits for a reset");
    assert_eq!(registers.status(), 15 | status::DEVICE_NEEDS_RESET);
}

#[test]
fn addresses_are_written_by_halves_or_whole_and_not_while_enabled() {
    let mut registers = registers();
    registers.write(field::QUEUE_DESC, &0x1234_5678_u32.to_le_bytes());
    registers.write(field::QUEUE_DESC + 4, &9_u32.to_le_bytes());
    registers.write(field::QUEUE_DRIVER, &0xa_1234_5678_u64.to_le_bytes());
    let address = |registers: &Registers, at: u64| {
        let image = registers.image(0);
        u64::from_le_bytes(image[at as usize..at as usize + 8].try_into().unwrap())
    };
    assert_eq!(address(&registers, field::QUEUE_DESC), 0x9_1234_5678);
    assert_eq!(address(&registers, field::QUEUE_DRIVER), 0xa_1234_5678);
    registers.write(field::QUEUE_ENABLE, &[1, 0]);
    registers.write(field::QUEUE_DRIVER, &[0; 8]);
    assert_eq!(address(&registers, field::QUEUE_DRIVER), 0xa_1234_5678);
}

#[test]
fn queues_are_reset_only_with_the_feature() {
    let mut registers = registers();
    registers.write(field::STATUS, &[3]);
    registers.write(field::DRIVER_FEATURE_SELECT, &1_u32.to_le_bytes());
    registers.write(field::DRIVER_FEATURE, &1_u32.to_le_bytes());
    registers.write(field::STATUS, &[11]);
    registers.write(field::QUEUE_ENABLE, &[1, 0]);
    registers.write(field::STATUS, &[15]);
    registers.write(field::QUEUE_RESET, &[1, 0]);
    assert_eq!(byte(&registers, field::QUEUE_RESET), 0);
    // Nor does a queue come late without it.
    registers.write(field::QUEUE_SELECT, &[1, 0]);
    registers.write(field::QUEUE_ENABLE, &[1, 0]);
    assert_eq!(byte(&registers, field::QUEUE_ENABLE), 0);
}

#[test]
fn the_driver_is_told_when_the_device_gives_up() {
    let (mut registers, _) = started();
    assert!(registers.broken().config_interrupt);
    assert_eq!(registers.status(), 15 | status::DEVICE_NEEDS_RESET);
    assert!(!registers.broken().config_interrupt, "once");
    assert!(registers.write(field::STATUS, &[0]).reset, "at once: the device rests");
    assert_eq!(registers.status(), 0);

    let (mut registers, _) = started();
    assert!(registers.dead().config_interrupt);
    assert_eq!(registers.status(), 15 | status::DEVICE_NEEDS_RESET);

    let (mut registers, _) = started();
    registers.write(field::STATUS, &[0]);
    assert!(registers.dead().reset, "the reset that was under way is over");
    assert_eq!(registers.status(), 0);
}
