//! Rings against the rules: the device must say DEVICE_NEEDS_RESET, and a reset must revive it.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};

use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap;
use crate::port::{NEEDS_RESET, Port};
use crate::raw_ring::{Descriptor, ENTRIES, INDIRECT, NEXT, RawRing, WRITE, descriptor, table};

const INDIRECT_FEATURE: u64 = 1 << 28;
/// How long a device may take to notice, in milliseconds.
const PATIENCE: u64 = 3_000;
/// No machine has memory there.
const NOWHERE: u64 = 1 << 45;

/// What is wrong with a ring.
struct Shape {
    name: &'static str,
    descriptors: Vec<Descriptor>,
    heads: Vec<u16>,
    index: u16,
}

impl Shape {
    fn chain(name: &'static str, descriptors: Vec<Descriptor>) -> Self {
        Self {
            name,
            descriptors,
            heads: vec![0],
            index: 1,
        }
    }
}

/// The shapes that are wrong on every queue of every device. `page` is memory to point at, `end` the end of the machine's memory.
fn shapes(page: u64, end: u64) -> Vec<Shape> {
    let fine = descriptor(page, 64, 0, 0);
    let chain = Shape::chain;
    vec![
        Shape {
            name: "available-index",
            descriptors: vec![fine],
            heads: vec![0],
            index: ENTRIES + 5,
        },
        Shape {
            name: "available-index-backwards",
            descriptors: vec![fine],
            heads: vec![0],
            index: u16::MAX,
        },
        Shape {
            name: "head",
            descriptors: vec![fine],
            heads: vec![ENTRIES],
            index: 1,
        },
        Shape {
            name: "head-far",
            descriptors: vec![fine],
            heads: vec![u16::MAX],
            index: 1,
        },
        chain("next", vec![descriptor(page, 16, NEXT, ENTRIES)]),
        chain("loop-of-one", vec![descriptor(page, 16, NEXT, 0)]),
        chain(
            "loop-of-two",
            vec![descriptor(page, 16, NEXT, 1), descriptor(page, 16, NEXT, 0)],
        ),
        chain("address", vec![descriptor(NOWHERE, 64, 0, 0)]),
        chain(
            "address-writable",
            vec![descriptor(page, 16, NEXT, 1), descriptor(NOWHERE, 64, WRITE, 0)],
        ),
        chain("address-wraps", vec![descriptor(u64::MAX - 31, 64, 0, 0)]),
        chain("address-across-the-end", vec![descriptor(end - 16, 4096, 0, 0)]),
        chain(
            "order",
            vec![descriptor(page, 16, NEXT | WRITE, 1), descriptor(page, 16, 0, 0)],
        ),
        chain(
            "indirect-nested",
            vec![descriptor(
                table(vec![descriptor(table(vec![fine]), 16, INDIRECT, 0)]),
                16,
                INDIRECT,
                0,
            )],
        ),
        chain("indirect-length", vec![descriptor(table(vec![fine]), 17, INDIRECT, 0)]),
        chain("indirect-empty", vec![descriptor(table(vec![fine]), 0, INDIRECT, 0)]),
        chain("indirect-nowhere", vec![descriptor(NOWHERE, 16, INDIRECT, 0)]),
        chain(
            "indirect-next",
            vec![descriptor(table(vec![descriptor(page, 16, NEXT, 9)]), 16, INDIRECT, 0)],
        ),
        chain(
            "indirect-loop",
            vec![descriptor(table(vec![descriptor(page, 16, NEXT, 0)]), 16, INDIRECT, 0)],
        ),
    ]
}

/// Shapes that only a block device calls wrong.
fn block_shapes(page: u64) -> Vec<Shape> {
    let chain = Shape::chain;
    vec![
        chain(
            "block-no-status",
            vec![descriptor(page, 16, NEXT, 1), descriptor(page, 512, 0, 0)],
        ),
        chain(
            "block-header-short",
            vec![descriptor(page, 8, NEXT, 1), descriptor(page, 1, WRITE, 0)],
        ),
        chain(
            "block-header-writable",
            vec![descriptor(page, 16, NEXT | WRITE, 1), descriptor(page, 1, WRITE, 0)],
        ),
    ]
}

/// `hostile:KIND[:QUEUE]` with KIND one of `block`, `net`, `console`, `rng`, `balloon`, `vsock`, `mem`: each wrong shape on a queue that the
/// device reads by itself, and rings that are not in memory. Names the shapes that the device used as if they were right, and those
/// that it ignored.
pub(crate) fn run(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let name = arguments.text(0).unwrap_or("block");
    let (kind, queue) = match name {
        "block" => (DeviceType::Block, 0),
        "net" => (DeviceType::Network, 1),
        "console" => (DeviceType::Console, 1),
        "rng" => (DeviceType::EntropySource, 0),
        "balloon" => (DeviceType::MemoryBalloon, 0),
        "vsock" => (DeviceType::Socket, 1),
        "mem" => (DeviceType::Memory, 0),
        other => return Err(Failure(format!("no kind {other:?}"))),
    };
    let queue = arguments.number(1, queue)?;
    let page = heap::leak_pages(1) as u64;
    let end = guest
        .memory
        .ranges()
        .iter()
        .filter(|range| range.usable())
        .map(|range| range.end)
        .max();
    let mut shapes = shapes(page, end.unwrap_or(0));
    if kind == DeviceType::Block {
        shapes.extend(block_shapes(page));
    }
    let pages = RawRing::pages();
    let (mut used, mut ignored): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    let count = shapes.len() + 1;
    for shape in shapes {
        let mut port = Port::open(guest, kind, arguments.device)?;
        port.negotiate(0, INDIRECT_FEATURE)?;
        let ring = RawRing::new(pages);
        ring.set(&mut port, queue);
        port.finish_init();
        ring.describe(&shape.descriptors);
        ring.offer(&shape.heads, shape.index);
        port.notify(queue);
        let registers = port.registers;
        let noticed = guest.within(PATIENCE, || registers.status() & NEEDS_RESET != 0 || ring.used() != 0);
        if registers.status() & NEEDS_RESET == 0 {
            let list = if noticed { &mut used } else { &mut ignored };
            list.push(shape.name);
        }
        reset(guest, &mut port, shape.name)?;
    }
    let mut port = Port::open(guest, kind, arguments.device)?;
    port.negotiate(0, 0)?;
    port.queue_set(queue, ENTRIES.into(), NOWHERE, NOWHERE + 4096, NOWHERE + 8192);
    port.finish_init();
    port.notify(queue);
    let registers = port.registers;
    if !guest.within(PATIENCE, || registers.status() & NEEDS_RESET != 0) {
        ignored.push("rings-nowhere");
    }
    reset(guest, &mut port, "rings-nowhere")?;
    let refused = count - used.len() - ignored.len();
    let (used, ignored): (String, String) = (used.join("+"), ignored.join("+"));
    Ok(format!("kind={name} refused={refused} used={used} ignored={ignored}"))
}

/// Resets the device, which must then be as new.
fn reset(guest: &mut Guest, port: &mut Port, shape: &str) -> Result<(), Failure> {
    port.set_status(DeviceStatus::empty());
    let registers = port.registers;
    ensure!(
        guest.within(PATIENCE, || registers.status() == 0),
        "{shape}: its reset does not end"
    );
    Ok(())
}
