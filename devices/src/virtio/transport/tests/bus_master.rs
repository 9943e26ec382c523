//! What the bus master bit of the command register allows a device: guest memory and messages, both or neither.

use super::*;

#[test]
fn a_device_starts_when_it_becomes_a_bus_master() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    world.write_config(place(1), 4, &[MEMORY_ONLY]);
    driver.start();
    assert_eq!(driver.status(), 15);
    driver.add(0, b"early", 16);
    driver.ring(0);
    // The loop has looked at its orders by the time that it has taken a reset, so it would have started the device before.
    driver.reset();
    assert!(driver.used(0).is_none());

    driver.start();
    driver.add(0, b"waits", 16);
    driver.ring(0);
    world.write_config(place(1), 4, &[MEMORY_AND_BUS_MASTER]);
    driver.await_message(message(1));
    assert_eq!(driver.used(0).unwrap(), b"waits");
    assert_eq!(driver.request(1, b"works"), b"works");
}

#[test]
fn a_device_that_is_no_bus_master_any_more_stops_until_it_is_reset() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    driver.start();
    assert_eq!(driver.request(0, b"before"), b"before");
    world.write_config(place(1), 4, &[MEMORY_ONLY]);
    assert_eq!(
        world.event(),
        DeviceEvent::NeedsReset {
            device: "device0".into(),
            reason: "the driver took bus mastering away while the device was in use".into(),
        }
    );
    assert_eq!(driver.status(), 15 | status::DEVICE_NEEDS_RESET);
    driver.add(0, b"during", 16);
    driver.ring(0);
    // What the device has to tell waits until it may send messages.
    assert_eq!(driver.pending(), 1);
    assert!(world.board.messages.change(|messages| messages.is_empty()));
    world.write_config(place(1), 4, &[MEMORY_AND_BUS_MASTER]);
    driver.await_message(message(0));
    assert_eq!(driver.status(), 15 | status::DEVICE_NEEDS_RESET);
    driver.reset();
    assert!(driver.used(0).is_none());
    driver.start();
    assert_eq!(driver.request(0, b"after"), b"after");
    assert_eq!(
        world.event(),
        DeviceEvent::Recovered {
            device: "device0".into()
        }
    );
}
