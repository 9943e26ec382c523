//! Rings that break the rules in ways that have nothing to do with the device: each device must rest on each, and come back by a reset.

use super::device::{Fault, VirtioDevice};
use super::testing::{MEMORY, Rig};

/// A way to break the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    HeadOutsideOfTable,
    NextOutsideOfTable,
    Loop,
    BufferOutsideOfMemory,
    BufferAroundTheEndOfAddresses,
    AvailableIndexAhead,
    ReadableAfterWritable,
    IndirectOfOddLength,
    IndirectOutsideOfMemory,
    IndirectLoop,
}

/// All of them.
pub(crate) const SHAPES: [Shape; 10] = [
    Shape::HeadOutsideOfTable,
    Shape::NextOutsideOfTable,
    Shape::Loop,
    Shape::BufferOutsideOfMemory,
    Shape::BufferAroundTheEndOfAddresses,
    Shape::AvailableIndexAhead,
    Shape::ReadableAfterWritable,
    Shape::IndirectOfOddLength,
    Shape::IndirectOutsideOfMemory,
    Shape::IndirectLoop,
];

/// Breaks the rules on `queue`; the driver's own record of its descriptors is not told, so the queue must be set up anew afterwards.
fn make<D: VirtioDevice>(rig: &mut Rig<D>, queue: u16, shape: Shape) {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let size = rig.drivers[usize::from(queue)].setup.size;
    let at = rig.allocate(64);
    match shape {
        Shape::HeadOutsideOfTable => return rig.make_available(queue, size),
        Shape::NextOutsideOfTable => rig.write_descriptor(queue, 0, at, 16, NEXT, size),
        Shape::Loop => rig.write_descriptor(queue, 0, at, 16, NEXT, 0),
        Shape::BufferOutsideOfMemory => rig.write_descriptor(queue, 0, MEMORY - 8, 16, 0, 0),
        Shape::BufferAroundTheEndOfAddresses => rig.write_descriptor(queue, 0, u64::MAX - 7, 16, WRITE, 0),
        Shape::AvailableIndexAhead => return rig.set_available_index(queue, 2 * size),
        Shape::ReadableAfterWritable => {
            rig.write_descriptor(queue, 0, at, 16, WRITE | NEXT, 1);
            rig.write_descriptor(queue, 1, at, 16, 0, 0);
        }
        Shape::IndirectOfOddLength => rig.write_descriptor(queue, 0, at, 24, INDIRECT, 0),
        Shape::IndirectOutsideOfMemory => rig.write_descriptor(queue, 0, MEMORY, 32, INDIRECT, 0),
        Shape::IndirectLoop => {
            rig.write_descriptor(queue, 0, at, 32, INDIRECT, 0);
            rig.write_raw_descriptor(at, at, 16, NEXT, 1);
            rig.write_raw_descriptor(at + 16, at, 16, NEXT, 0);
        }
    }
    rig.make_available(queue, 0);
}

/// Breaks the rules of each of `queues` in every way. Each time the device must rest, and `works` must find a device that works once it is
/// active again.
pub(crate) fn every_shape_rests_and_recovers<D: VirtioDevice>(
    rig: &mut Rig<D>,
    queues: &[u16],
    mut works: impl FnMut(&mut Rig<D>),
) {
    for &queue in queues {
        for shape in SHAPES {
            make(rig, queue, shape);
            match rig.try_kick(queue) {
                Err(Fault::Violation(_)) => {}
                other => panic!("{shape:?} on queue {queue}: {other:?}"),
            }
            assert!(!rig.is_active(), "{shape:?}");
            rig.activate(u64::MAX).unwrap();
            works(rig);
        }
    }
}
