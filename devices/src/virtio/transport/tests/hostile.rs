//! A guest that writes anything anywhere: into configuration space, the BAR, and the memory that its rings may lie in.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::dispatch::stepper::Stepper;

/// What a guest does, with addresses kept near where something is.
#[derive(Clone, Debug)]
enum Step {
    Config(u16, Vec<u8>),
    Bar(u64, Vec<u8>),
    Read(u64, usize),
    Memory(u64, Vec<u8>),
    /// A good set-up up to DRIVER_OK, which random writes hardly ever make.
    Start,
    /// The loop has a turn.
    Turn,
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    (
        any::<u64>(),
        prop::sample::select(vec![1_usize, 2, 4, 8]),
        any::<bool>(),
    )
        .prop_map(|(value, len, small)| {
            let value = if small { value & 0x0f } else { value };
            value.to_le_bytes()[..len].to_vec()
        })
}

/// An offset in the BAR: mostly a field of the common structure, a doorbell, or the MSI-X table.
fn place_in_bar() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0_u64..0x40,
        2 => 0x3000_u64..0x3010,
        2 => 0x4000_u64..0x4040,
        1 => 0_u64..BAR_BYTES - 8,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0_u16..0x100, bytes()).prop_map(|(at, data)| Step::Config(at, data)),
        8 => (place_in_bar(), bytes()).prop_map(|(at, data)| Step::Bar(at, data)),
        2 => (place_in_bar(), prop::sample::select(vec![1_usize, 2, 4, 8])).prop_map(|(at, len)| Step::Read(at, len)),
        8 => (0_u64..0x400, bytes()).prop_map(|(at, data)| Step::Memory(at, data)),
        1 => Just(Step::Start),
        3 => Just(Step::Turn),
    ]
}

/// Rings of 8 entries for both queues, in the first KiB.
fn start(function: &VirtioPci) {
    let write = |at: u64, data: &[u8]| function.write_bar(BAR, at, data);
    write(0x14, &[0]);
    write(0x14, &[3]);
    for (select, features) in [
        (0_u32, feature::TRANSPORT as u32),
        (1, (feature::TRANSPORT >> 32) as u32),
    ] {
        write(8, &select.to_le_bytes());
        write(12, &features.to_le_bytes());
    }
    write(0x14, &[11]);
    for queue in 0..2_u16 {
        let base = u64::from(queue) * 0x180;
        write(0x16, &queue.to_le_bytes());
        write(0x18, &8_u16.to_le_bytes());
        for (at, address) in [(0x20, base), (0x28, base + 0x80), (0x30, base + 0x100)] {
            write(at, &address.to_le_bytes());
        }
        write(0x1c, &1_u16.to_le_bytes());
    }
    write(0x14, &[15]);
}

proptest! {
    #[test]
    fn no_guest_makes_the_loop_fail(steps in prop::collection::vec(step(), 0..200)) {
        let world = World::new(vec![]);
        let (function, worker) = connect(Box::new(Loopback::tame()), world.wiring(), 1).unwrap();
        // Panics when the device fails; a broken rule is no failure.
        let mut stepper = Stepper::start(worker).unwrap();
        function.place(WINDOW.start);
        world.bus.insert(place(1), "device", Arc::clone(&function) as _).unwrap();
        for step in steps {
            match step {
                Step::Config(at, data) => world.write_config(place(1), at, &data),
                Step::Bar(at, data) => function.write_bar(BAR, at, &data),
                Step::Read(at, len) => {
                    let mut data = [0; 8];
                    function.read_bar(BAR, at, &mut data[..len]);
                }
                Step::Memory(at, data) => world.memory.write_slice(&data, GuestAddress(at)).unwrap(),
                Step::Start => start(&function),
                Step::Turn => {
                    stepper.step();
                }
            }
        }
        // Whatever it was left like, a reset and a good set-up make it work.
        stepper.settle();
        function.write_bar(BAR, 0x14, &[0]);
        stepper.settle();
        let mut status = [0xff];
        function.read_bar(BAR, 0x14, &mut status);
        prop_assert_eq!(status, [0]);
        world.memory.write_slice(&[0; 0x400], GuestAddress(0)).unwrap();
        start(&function);
        stepper.settle();
        function.read_bar(BAR, 0x14, &mut status);
        prop_assert_eq!(status, [15]);
    }
}

#[test]
fn no_message_is_lost_while_its_vector_is_masked_and_unmasked() {
    let world = one();
    let mut driver = Driver::find(&world, place(1), 0);
    driver.start();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let entry = driver.bar() + TABLE + 16 + 12;
    let bus = Arc::clone(&world.bus);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                bus.write_memory(entry, &1_u32.to_le_bytes());
                bus.write_memory(entry, &0_u32.to_le_bytes());
            }
        });
        for n in 0..2000_u32 {
            let text = n.to_le_bytes();
            let text = [0x30, text[0], text[1]];
            assert_eq!(driver.request(0, &text), text);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(world.board.messages.change(|messages| messages.is_empty()));
}
