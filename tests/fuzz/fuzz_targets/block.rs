//! The disk: any requests, rings and guest memory of a driver, on an image whose bytes are made up, too, and which changes while it is used.
#![no_main]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Once;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sepal_devices::rate::RateLimit;
use sepal_devices::virtio::block::{Block, BlockConfig, BlockHandle, DiskFormat, DiskMode};
use sepal_devices::virtio::device::{Fault, VirtioDevice};
use sepal_devices::virtio::testing::{Buffer, Rig};
use vm_memory::{Bytes, GuestAddress};

/// Bytes of the disk.
const SIZE: u64 = 1 << 20;
/// Bytes of a cluster of the qcow2 image.
const CLUSTER: u64 = 4096;
/// Descriptors that requests take of a queue at most.
const DESCRIPTORS: usize = 200;

#[derive(Arbitrary, Debug)]
enum Step {
    Request {
        queue: bool,
        kind: u8,
        sector: u16,
        data: u16,
        more: Vec<u8>,
    },
    Odd {
        queue: bool,
        header: Vec<u8>,
        lens: Vec<(bool, u16)>,
    },
    Range {
        zeroes: bool,
        sector: u64,
        sectors: u32,
        flags: u8,
    },
    Descriptor {
        queue: bool,
        index: u8,
        address: u32,
        len: u32,
        flags: u8,
        next: u16,
    },
    Indirect {
        address: u16,
        buffer: u32,
        len: u32,
        flags: u8,
        next: u16,
    },
    Memory {
        address: u32,
        bytes: Vec<u8>,
    },
    Available(bool, u16),
    Index(bool, u16),
    Kick(bool),
    Wait,
    Config(u8, Vec<u8>),
    Reset,
    ResetQueue(bool),
    Activate(u64),
    Image(u16, u8),
    Length(u32),
    Resize(u32),
}

#[derive(Arbitrary, Debug)]
struct Input {
    qcow2: bool,
    mode: u8,
    io_uring: bool,
    large_blocks: bool,
    limited: bool,
    features: u64,
    image: Vec<(u16, u8)>,
    steps: Vec<Step>,
}

/// An image of six clusters: header, refcount table, refcount block, L1 table, L2 table, and one of data, mapped at the disk's beginning.
fn qcow2() -> Vec<u8> {
    let mut image = vec![0; 6 * CLUSTER as usize];
    let mut put = |at: u64, bytes: &[u8]| image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &12u32.to_be_bytes());
    put(24, &SIZE.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER).to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER).to_be_bytes());
    for cluster in 0..6 {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    put(3 * CLUSTER, &(1 << 63 | 4 * CLUSTER).to_be_bytes());
    put(4 * CLUSTER, &(1 << 63 | 5 * CLUSTER).to_be_bytes());
    put(5 * CLUSTER, b"data");
    image
}

fn memory_file(bytes: &[u8]) -> File {
    let file: File = rustix::fs::memfd_create(c"fuzz", rustix::fs::MemfdFlags::CLOEXEC)
        .expect("a memfd")
        .into();
    file.write_all_at(bytes, 0).expect("writing to a memfd");
    file
}

/// A panic of imago over an image is caught and makes the image unusable; only others are findings.
fn expect_panics_of_imago() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let aborting = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let place = info.location().map_or("", |location| location.file());
            let nested = place.ends_with("qcow2/storage.rs");
            if !place.contains("/imago-") && !nested {
                aborting(info);
            }
        }));
    });
}

struct Bench {
    rig: Rig<Block>,
    handle: BlockHandle,
    /// Descriptors of the requests under way, by queue and head.
    under_way: HashMap<(u16, u16), usize>,
    features: u64,
}

impl Bench {
    /// A broken rule is as good as none; the driver starts over.
    fn after(&mut self, result: Result<(), Fault>) {
        match result {
            Ok(()) => {}
            Err(Fault::Violation(violation)) => {
                assert!(!violation.to_string().is_empty());
                self.activate();
            }
            Err(Fault::Host(error)) => panic!("the host failed: {error}"),
        }
    }

    fn activate(&mut self) {
        self.rig.reset();
        self.under_way.clear();
        match self.rig.activate(self.features) {
            Ok(()) | Err(Fault::Violation(_)) => {}
            Err(Fault::Host(error)) => panic!("the host failed: {error}"),
        }
    }

    fn add(&mut self, queue: bool, buffers: &[Buffer]) {
        let queue = u16::from(queue);
        let taken: usize = self
            .under_way
            .iter()
            .filter(|((of, _), _)| *of == queue)
            .map(|(_, n)| n)
            .sum();
        if !buffers.is_empty() && taken + buffers.len() <= DESCRIPTORS {
            let head = self.rig.add(queue, buffers);
            self.under_way.insert((queue, head), buffers.len());
        }
    }

    fn collect(&mut self) {
        for queue in 0..2 {
            // As many as there can be; a driver that writes to the used ring itself finds more.
            for _ in 0..=DESCRIPTORS {
                let Some(used) = self.rig.used(queue) else { break };
                self.under_way.remove(&(queue, used.head));
            }
        }
    }

    fn step(&mut self, step: Step, image: &File) {
        match step {
            Step::Request {
                queue,
                kind,
                sector,
                data,
                more,
            } => {
                let kind = [0, 1, 4, 8, 11, 13, u32::from(kind)][usize::from(kind) % 7];
                let mut header = kind.to_le_bytes().to_vec();
                header.extend([0; 4]);
                header.extend(u64::from(sector).to_le_bytes());
                let len = u32::from(data % 1030) * 512;
                let data = if kind == 1 {
                    Buffer::Out(vec![0xaa; len as usize])
                } else {
                    Buffer::In(len)
                };
                let extra = (!more.is_empty()).then_some(Buffer::Out(more));
                let buffers = [Some(Buffer::Out(header)), extra, Some(data), Some(Buffer::In(1))];
                let buffers: Vec<Buffer> = buffers
                    .into_iter()
                    .flatten()
                    .filter(|buffer| !matches!(buffer, Buffer::In(0)))
                    .collect();
                self.add(queue, &buffers);
            }
            Step::Odd { queue, header, lens } => {
                let mut buffers = vec![Buffer::Out(header)];
                buffers.extend(lens.iter().take(20).map(|&(out, len)| {
                    if out {
                        Buffer::Out(vec![1; usize::from(len)])
                    } else {
                        Buffer::In(len.into())
                    }
                }));
                self.add(queue, &buffers);
            }
            Step::Range {
                zeroes,
                sector,
                sectors,
                flags,
            } => {
                let mut bytes = if zeroes { 13u32 } else { 11 }.to_le_bytes().to_vec();
                bytes.extend([0; 12]);
                bytes.extend(sector.to_le_bytes());
                bytes.extend(sectors.to_le_bytes());
                bytes.extend(u32::from(flags).to_le_bytes());
                self.add(false, &[Buffer::Out(bytes), Buffer::In(1)]);
            }
            Step::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => {
                self.rig
                    .write_descriptor(queue.into(), index.into(), address.into(), len, flags.into(), next);
            }
            Step::Indirect {
                address,
                buffer,
                len,
                flags,
                next,
            } => {
                let at = (1 << 20) + u64::from(address);
                self.rig
                    .write_raw_descriptor(at, buffer.into(), len, flags.into(), next);
            }
            Step::Memory { address, bytes } => {
                let _ = self.rig.memory.write_slice(&bytes, GuestAddress(address.into()));
            }
            Step::Available(queue, head) => self.rig.make_available(queue.into(), head),
            Step::Index(queue, index) => self.rig.set_available_index(queue.into(), index),
            Step::Kick(queue) => {
                let kicked = self.rig.try_kick(queue.into());
                self.after(kicked);
                self.collect();
            }
            Step::Wait => {
                // What is under way by our own count ends some time, unless the limit holds it back.
                if self.handle.stats().in_flight > 0 {
                    let waited = self.rig.wait();
                    self.after(waited);
                    self.collect();
                }
            }
            Step::Config(at, bytes) => {
                let written = self.rig.write_config(at.into(), &bytes);
                self.after(written);
            }
            Step::Reset => self.activate(),
            Step::ResetQueue(queue) => {
                let reset = self.rig.reset_queue(queue.into());
                self.under_way.retain(|(of, _), _| *of != u16::from(queue));
                self.after(reset);
            }
            Step::Activate(features) => {
                self.features = features;
                self.activate();
            }
            Step::Image(at, byte) => drop(image.write_all_at(&[byte], at.into())),
            Step::Length(length) => drop(image.set_len(u64::from(length) % (2 * SIZE))),
            Step::Resize(bytes) => {
                self.handle.resize(u64::from(bytes) % (2 * SIZE), true, drop);
                let settled = self.rig.settle();
                self.after(settled);
            }
        }
    }
}

fuzz_target!(|input: Input| {
    expect_panics_of_imago();
    let image = if input.qcow2 {
        memory_file(&qcow2())
    } else {
        memory_file(&vec![0x55; SIZE as usize])
    };
    for (at, byte) in input.image {
        image.write_all_at(&[byte], at.into()).expect("writing to a memfd");
    }
    let config = BlockConfig {
        mode: [DiskMode::ReadWrite, DiskMode::ReadOnly, DiskMode::Volatile][usize::from(input.mode) % 3],
        format: if input.qcow2 {
            DiskFormat::Qcow2
        } else {
            DiskFormat::Raw
        },
        block_size: if input.large_blocks { 4096 } else { 512 },
        queues: 2,
        io_uring: input.io_uring,
        rate_limit: RateLimit {
            operations_per_second: if input.limited { 10_000 } else { 0 },
            burst_operations: 3,
            ..RateLimit::default()
        },
        ..BlockConfig::new("fuzz", OwnedFd::from(image.try_clone().expect("a descriptor")))
    };
    let Ok((block, handle)) = Block::new(config) else {
        return;
    };
    let mut bench = Bench {
        rig: Rig::new(block),
        handle,
        under_way: HashMap::new(),
        features: input.features,
    };
    bench.activate();
    for step in input.steps.into_iter().take(300) {
        bench.step(step, &image);
    }
    bench.rig.reset();
    bench.rig.device.stop(Instant::now() + Duration::from_secs(10));
});
