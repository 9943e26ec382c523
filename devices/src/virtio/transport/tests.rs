//! The whole way that a driver goes, from the first look at configuration space to the message of a request given back, and all that can go wrong
//! on it, with real dispatch loops and without KVM.

mod bus_master;
mod driver;
mod hostile;
mod loopback;

use std::sync::mpsc::channel;

use self::driver::{
    BUS_MASTER_ONLY, Driver, MEMORY_AND_BUS_MASTER, MEMORY_ONLY, PATIENCE, WINDOW, WINDOW_64, World, message,
};
use self::loopback::Loopback;
use super::*;
use crate::dispatch::DeviceEvent;
use crate::interrupt::Msi;
use crate::pci::PciAddress;
use crate::virtio::device::DeviceKind;
use crate::virtio::{feature, status};

fn place(slot: u8) -> PciAddress {
    PciAddress::new(slot, 0).unwrap()
}

fn one() -> World {
    World::new(vec![Box::new(Loopback::default())])
}

#[test]
fn a_driver_finds_the_device_sets_it_up_and_is_answered_by_messages() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    assert_eq!(driver.offered(), feature::TRANSPORT | loopback::FEATURE);
    assert_eq!(driver.queues(), 2);
    driver.start();
    assert_eq!(driver.request(0, b"hello"), b"hello");
    assert_eq!(driver.request(1, b"other queue"), b"other queue");
    assert_eq!(driver.request(0, b"again"), b"again");
}

#[test]
fn a_device_that_cannot_be_is_refused() {
    let world = World::new(vec![]);
    let refusal = |device: Loopback| match connect(Box::new(device), world.wiring(), 1) {
        Ok(_) => panic!("it can be"),
        Err(error) => error.to_string(),
    };
    assert_eq!(
        refusal(Loopback::of(DeviceKind::Other(0x40), vec![8])),
        "a device of number 64: PCI has ids up to 63"
    );
    for (sizes, reason) in [
        (
            vec![8, 0],
            "queue 1: a size of 0; it has to be a power of two up to 32768",
        ),
        (
            vec![12],
            "queue 0: a size of 12; it has to be a power of two up to 32768",
        ),
        (vec![8; 1025], "1025 queues are too many: 1024 are possible"),
    ] {
        assert_eq!(refusal(Loopback::of(DeviceKind::Rng, sizes)), reason);
    }
}

#[test]
fn both_ways_to_configuration_space_show_the_same() {
    let world = one();
    for offset in (0..256).step_by(4) {
        let by_ecam = u32::from_le_bytes(world.read_config(place(1), offset));
        assert_eq!(by_ecam, world.read_config_by_ports(place(1), offset), "{offset:#x}");
    }
    assert_eq!(world.read_config::<8>(place(1), 0x100), [0; 8]);
    assert_eq!(world.read_config::<4>(place(2), 0), [0xff; 4]);
    // Entropy source: 0x1040 + 4, subsystem above 0x40, revision 1.
    assert_eq!(world.read_config_by_ports(place(1), 0), 0x1044_1af4);
    assert_eq!(world.read_config::<1>(place(1), 8), [1]);
    assert_eq!(world.read_config_by_ports(place(1), 0x2c), 0x0044_1af4);
}

#[test]
fn without_msi_x_the_pin_tells_and_reading_isr_releases_it() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    driver.negotiate();
    driver.set_up_queues();
    driver.set_status(15);
    driver.add(0, b"pin", 16);
    driver.ring(0);
    world.board.line.wait(|line| line.then_some(()));
    assert_eq!(world.read_config::<1>(place(1), 6)[0] & 8, 8, "interrupt status");
    // Forbidden by the command register, and allowed again.
    world.write_config(place(1), 4, &0x0406_u16.to_le_bytes());
    world.board.line.wait(|line| (!*line).then_some(()));
    world.write_config(place(1), 4, &0x0006_u16.to_le_bytes());
    world.board.line.wait(|line| line.then_some(()));
    assert_eq!(world.read_memory(driver.bar() + driver.at.isr), [1]);
    assert_eq!(world.read_memory(driver.bar() + driver.at.isr), [0]);
    world.board.line.wait(|line| (!*line).then_some(()));
    assert_eq!(driver.used(0).unwrap(), b"pin");
    assert!(world.board.messages.change(|messages| messages.is_empty()));
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let world = one();
    let driver = Driver::find(&world, place(1), 0);
    for features in [
        0,
        loopback::FEATURE,
        feature::VERSION_1 | 1 << 63,
        feature::VERSION_1 | 2,
        feature::VERSION_1 | 1 << 33,
    ] {
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(11);
        assert_eq!(driver.status(), 3, "{features:#x}");
        // Nor does the device start without.
        driver.set_status(15);
        assert_eq!(driver.status(), 3);
        driver.reset();
    }
    driver.set_status(3);
    driver.accept(feature::VERSION_1);
    driver.set_status(11);
    assert_eq!(driver.status(), 11);
    // What was agreed on stays.
    driver.accept(0);
    driver.write(8, &1_u32.to_le_bytes());
    assert_eq!(driver.read(12), [1, 0, 0, 0]);
}

#[test]
fn registers_forget_what_is_out_of_range() {
    let world = one();
    let driver = Driver::find(&world, place(1), 0);
    // Vectors that are not there, sizes that are none.
    driver.write(0x10, &3_u16.to_le_bytes());
    assert_eq!(driver.read(0x10), [0xff, 0xff]);
    driver.write(0x10, &2_u16.to_le_bytes());
    assert_eq!(driver.read(0x10), [2, 0]);
    driver.select(0);
    let size: [u8; 2] = driver.read(0x18);
    for wrong in [0_u16, 3, 512, 0xffff] {
        driver.write(0x18, &wrong.to_le_bytes());
        assert_eq!(driver.read(0x18), size);
    }
    driver.select(2);
    assert_eq!(driver.read(0x18), [0, 0], "a queue that is not there has no entries");
    driver.write(0x1c, &1_u16.to_le_bytes());
    assert_eq!(driver.read(0x1c), [0, 0]);
}

#[test]
fn a_doorbell_before_the_driver_is_ready_is_not_lost() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    driver.enable_msix(true);
    driver.set_message(1, message(1).address, message(1).data, 0);
    driver.negotiate();
    driver.set_up_queues();
    driver.add(0, b"early", 16);
    driver.ring(0);
    driver.set_status(15);
    driver.await_message(message(1));
    assert_eq!(driver.used(0).unwrap(), b"early");
}

#[test]
fn a_masked_message_is_pending_until_it_is_unmasked() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    driver.start();
    driver.set_message(1, message(1).address, message(1).data, 1);
    driver.add(0, b"masked", 16);
    driver.ring(0);
    // The other queue's message comes after the first would have.
    assert_eq!(driver.request(1, b"unmasked"), b"unmasked");
    let deadline = std::time::Instant::now() + PATIENCE;
    while driver.pending() != 1 << 1 {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(world.board.messages.change(|messages| messages.is_empty()));
    let elsewhere = Msi {
        address: 0xfee1_0000,
        data: 0x99,
    };
    driver.set_message(1, elsewhere.address, elsewhere.data, 0);
    driver.await_message(elsewhere);
    assert_eq!(driver.pending(), 0);
    assert_eq!(driver.used(0).unwrap(), b"masked");
}

#[test]
fn the_bar_moves_and_its_doorbells_with_it() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    driver.start();
    let old = driver.bar();
    for new in [WINDOW.start + 0x10_0000, WINDOW_64.end - BAR_BYTES, old + BAR_BYTES] {
        let before = driver.bar();
        driver.move_bar(new);
        assert_eq!(driver.bar(), new);
        assert_eq!(world.read_memory::<4>(before), [0xff; 4], "{before:#x} is nobody's");
        let bells: Vec<u64> = lock(&world.board.bells).keys().copied().collect();
        assert_eq!(bells, [driver.doorbell(0), driver.doorbell(1)]);
        assert_eq!(driver.request(0, b"moved"), b"moved");
    }
    // Sizing: all ones give the mask, and nobody answers there.
    driver.move_bar(u64::MAX);
    assert_eq!(
        u64::from_le_bytes(world.read_config(place(1), 0x10)),
        !(BAR_BYTES - 1) | 4
    );
    assert!(lock(&world.board.bells).is_empty());
    // Out of the windows, and over guest memory.
    for nowhere in [0x8000_0000, WINDOW.end, WINDOW_64.start - BAR_BYTES, 0] {
        driver.move_bar(nowhere);
        assert_eq!(world.bus.memory(), []);
    }
    driver.move_bar(old);
    assert_eq!(driver.request(1, b"back"), b"back");
    // Memory off: gone. On: there.
    world.write_config(place(1), 4, &[BUS_MASTER_ONLY]);
    assert_eq!(world.read_memory::<4>(old), [0xff; 4]);
    assert!(lock(&world.board.bells).is_empty());
    world.write_config(place(1), 4, &[MEMORY_AND_BUS_MASTER]);
    assert_eq!(driver.request(1, b"on"), b"on");
}

#[test]
fn a_bar_over_another_disturbs_nobody() {
    let world = World::new(vec![Box::new(Loopback::default()), Box::new(Loopback::default())]);
    let mut first = Driver::find(&world, place(1), 0);
    let mut second = Driver::find(&world, place(2), 1);
    first.start();
    second.start();
    let home = second.bar();
    second.move_bar(first.bar());
    assert_eq!(world.bus.memory().len(), 1);
    assert_eq!(first.request(0, b"first"), b"first");
    // The first one leaves, so the second one answers where it wanted to be.
    let there = first.bar();
    first.move_bar(home);
    assert_eq!(second.bar(), there);
    assert_eq!(second.request(0, b"second"), b"second");
    assert_eq!(first.request(0, b"first"), b"first");
}

#[test]
fn the_bar_can_be_reached_through_configuration_space() {
    let world = one();
    let driver = Driver::find(&world, place(1), 0);
    world.write_config(place(1), 4, &[0]);
    let window = driver.at.window;
    let point = |offset: u32, length: u32| {
        world.write_config(place(1), window + 4, &[0]);
        world.write_config(place(1), window + 8, &offset.to_le_bytes());
        world.write_config(place(1), window + 12, &length.to_le_bytes());
    };
    // Number of queues.
    point(driver.at.common as u32 + 0x12, 2);
    assert_eq!(world.read_config::<2>(place(1), window + 16), [2, 0]);
    // Status.
    point(driver.at.common as u32 + 0x14, 1);
    world.write_config(place(1), window + 16, &[3]);
    assert_eq!(world.read_config::<1>(place(1), window + 16), [3]);
    // Lengths and places that are none.
    for (offset, length) in [(0, 0), (0, 3), (0, 8), (2, 4), (BAR_BYTES as u32, 1), (u32::MAX, 1)] {
        point(offset, length);
        world.write_config(place(1), window + 16, &[0xaa; 4]);
        assert_eq!(world.read_config::<4>(place(1), window + 16), [0xaa; 4]);
    }
    world.write_config(place(1), window + 4, &[1]);
    assert_eq!(world.read_config::<1>(place(1), window + 16), [0xaa]);
}

#[test]
fn configuration_changes_both_ways() {
    let (written, seen) = channel();
    let world = World::new(vec![Box::new(Loopback::that_tells(written))]);
    let mut driver = Driver::find(&world, place(1), 0);
    let config = driver.bar() + driver.at.device.unwrap();
    assert_eq!(world.read_memory(config), *b"loopback");
    driver.start();
    let generation: [u8; 1] = driver.read(0x15);
    // The device changes it.
    assert_eq!(driver.request(0, b"=changed!"), b"=changed!");
    driver.await_message(message(0));
    assert_eq!(world.read_memory(config), *b"changed!");
    assert_ne!(driver.read::<1>(0x15), generation);
    // The driver writes it: only its last four bytes can be.
    world.write_memory(config, b"12345678");
    assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), *b"chan5678");
    assert_eq!(world.read_memory(config), *b"chan5678");
}

#[test]
fn a_reset_waits_until_the_device_is_quiet() {
    let (loopback, hold) = Loopback::held();
    let world = World::new(vec![Box::new(loopback)]);
    let mut driver = Driver::find(&world, place(1), 0);
    driver.start();
    // A request that the device keeps.
    driver.add(0, b"~keep", 16);
    driver.ring(0);
    hold.entered();
    driver.set_status(0);
    for _ in 0..3 {
        assert_ne!(driver.status(), 0, "the device is still at work");
    }
    // Nothing but the reset's end changes anything.
    driver.set_status(3);
    hold.release();
    driver.reset();
    assert!(driver.used(0).is_none(), "nothing is written after a reset");
    // From the start.
    assert_eq!(driver.read(0x10), [0xff, 0xff]);
    driver.start();
    assert_eq!(driver.request(0, b"anew"), b"anew");
}

#[test]
fn a_hung_device_answers_its_registers_and_hinders_nobody() {
    let (loopback, hold) = Loopback::held();
    let world = World::new(vec![Box::new(loopback), Box::new(Loopback::default())]);
    let mut hung = Driver::find(&world, place(1), 0);
    let mut other = Driver::find(&world, place(2), 1);
    hung.start();
    other.start();
    hung.add(0, b"~", 16);
    hung.ring(0);
    hold.entered();
    assert_eq!(hung.status(), 15);
    assert_eq!(world.read_memory(hung.bar() + hung.at.device.unwrap()), *b"loopback");
    hung.select(1);
    assert_eq!(hung.read(0x1c), [1, 0]);
    hung.set_message(1, message(7).address, message(7).data, 0);
    hung.move_bar(WINDOW_64.start);
    assert_eq!(hung.status(), 15);
    hung.set_status(0);
    assert_ne!(hung.status(), 0);
    assert_eq!(other.request(0, b"works"), b"works");
    hold.release();
    hung.reset();
}

#[test]
fn a_broken_rule_stops_the_device_until_its_reset() {
    let world = World::new(vec![Box::new(Loopback::default()), Box::new(Loopback::default())]);
    let mut driver = Driver::find(&world, place(1), 0);
    let mut other = Driver::find(&world, place(2), 1);
    driver.start();
    other.start();
    driver.add(0, b"!", 16);
    driver.ring(0);
    driver.await_message(message(0));
    assert_eq!(driver.status(), 15 | status::DEVICE_NEEDS_RESET);
    let DeviceEvent::NeedsReset { device, reason } = world.event() else {
        panic!("not that event");
    };
    assert_eq!((device.as_str(), reason.as_str()), ("device0", "queue 0: on purpose"));
    // It rests: nothing comes of a doorbell.
    driver.add(1, b"?", 16);
    driver.ring(1);
    assert_eq!(other.request(0, b"works"), b"works");
    assert!(driver.used(1).is_none());
    driver.reset();
    driver.start();
    assert_eq!(
        world.event(),
        DeviceEvent::Recovered {
            device: "device0".into()
        }
    );
    assert_eq!(driver.request(0, b"revived"), b"revived");
}

#[test]
fn rings_that_are_not_in_memory_break_the_rules() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    for (descriptors, available, used) in [
        (!15, 0x1000, 0x2000),
        (0x1000, 1 << 40, 0x2000),
        (0x1000, 0x2000, (16 << 20) - 4),
        (0x1001, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
    ] {
        driver.negotiate();
        driver.select(0);
        driver.set_rings(descriptors, available, used);
        driver.write(0x1c, &1_u16.to_le_bytes());
        driver.set_status(15);
        let event = world.event();
        assert!(matches!(event, DeviceEvent::NeedsReset { .. }), "{event:?}");
        assert_eq!(driver.status(), 15 | status::DEVICE_NEEDS_RESET);
        driver.reset();
    }
    driver.start();
    assert_eq!(driver.request(0, b"fine"), b"fine");
}

#[test]
fn a_device_that_panics_or_fails_is_quarantined_alone() {
    let world = World::new(vec![
        Box::new(Loopback::default()),
        Box::new(Loopback::default()),
        Box::new(Loopback::default()),
    ]);
    let mut other = Driver::find(&world, place(3), 2);
    other.start();
    for (slot, request, expected) in [(1, b"#", "on purpose"), (2, b"%", "the host failed")] {
        let mut driver = Driver::find(&world, place(slot), slot.into());
        driver.start();
        driver.add(0, request, 16);
        driver.ring(0);
        let DeviceEvent::Failed { device, reason } = world.event() else {
            panic!("not that event");
        };
        assert_eq!(device, format!("device{}", slot - 1));
        assert!(reason.contains(expected), "{reason}");
        driver.await_message(message(0));
        assert_eq!(driver.status(), 15 | status::DEVICE_NEEDS_RESET);
        // The reset works at once, and the device does not.
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        driver.start();
        assert_eq!(driver.status(), 15 | status::DEVICE_NEEDS_RESET);
        driver.set_status(0);
        assert_eq!(other.request(0, b"works"), b"works");
    }
}

#[test]
fn one_queue_is_reset_and_enabled_again() {
    let (loopback, hold) = Loopback::held();
    let world = World::new(vec![Box::new(loopback)]);
    let mut driver = Driver::find(&world, place(1), 0);
    driver.start();
    assert_eq!(driver.request(0, b"before"), b"before");
    driver.add(0, b"~", 16);
    driver.ring(0);
    hold.entered();
    driver.select(0);
    driver.write(0x3a, &1_u16.to_le_bytes());
    assert_eq!(driver.read(0x3a), [1, 0], "the device is still at work");
    hold.release();
    let deadline = std::time::Instant::now() + PATIENCE;
    while driver.read::<2>(0x3a) != [0, 0] {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert_eq!(driver.read(0x1c), [0, 0]);
    assert_eq!(driver.request(1, b"goes on"), b"goes on");
    driver.set_up_queue(0);
    assert_eq!(driver.request(0, b"after"), b"after");
    assert_eq!(driver.status(), 15);
}

#[test]
fn sixty_four_devices_fit() {
    let world = World::new(
        (0..64)
            .map(|_| Box::new(Loopback::default()) as Box<dyn VirtioDevice>)
            .collect(),
    );
    // As a guest looks: at functions 1 to 7 only if function 0 says that there are any.
    let mut found = Vec::new();
    for slot in 0..32 {
        let [header] = world.read_config(place(slot), 0x0e);
        let functions = if header & 0x80 == 0 { 1 } else { 8 };
        for function in 0..functions {
            let place = PciAddress::new(slot, function).unwrap();
            if world.read_config_by_ports(place, 0) == 0x1044_1af4 {
                found.push(place);
            }
        }
    }
    assert_eq!(found.len(), 64);
    for (n, place) in (0..).zip(found) {
        let mut driver = Driver::find(&world, place, n);
        driver.start();
        let text = format!("I am {n}");
        assert_eq!(driver.request(0, text.as_bytes()), text.as_bytes());
    }
}

#[test]
fn setting_messages_up_costs_few_route_changes() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    // As Linux does it: messages while all is masked, then the function mask goes.
    world.write_config(place(1), driver.at.msix + 3, &[0xc0]);
    for vector in 0..3 {
        driver.set_message(vector, message(vector).address, message(vector).data, 0);
    }
    assert_eq!(*lock(&world.board.route_calls), 0);
    world.write_config(place(1), driver.at.msix + 3, &[0x80]);
    assert_eq!(*lock(&world.board.route_calls), 1);
    // Masking and unmasking costs nothing.
    driver.set_message(0, message(0).address, message(0).data, 1);
    driver.set_message(0, message(0).address, message(0).data, 0);
    assert_eq!(*lock(&world.board.route_calls), 1);
    driver.start();
    assert_eq!(driver.request(0, b"still"), b"still");
}
