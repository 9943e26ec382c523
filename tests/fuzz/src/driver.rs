//! A driver of a virtio device that does whatever the fuzzer says: well-formed requests, rings and descriptors written over, resets at any time.

use libfuzzer_sys::arbitrary;
use sepal_devices::virtio::device::{Fault, VirtioDevice};
use sepal_devices::virtio::testing::Rig;
use vm_memory::{Bytes, GuestAddress};

/// Something that a driver does.
#[derive(Debug, arbitrary::Arbitrary)]
pub enum RingStep {
    /// A chain of buffers that hold `out`, in pieces of `split` bytes, and then of `rooms` for the device to write.
    Request {
        queue: u8,
        out: Vec<u8>,
        split: u8,
        rooms: Vec<u16>,
    },
    /// Any descriptor.
    Descriptor {
        queue: u8,
        index: u8,
        address: u32,
        len: u32,
        flags: u8,
        next: u8,
    },
    /// Any head, or any index.
    Available {
        queue: u8,
        head: u16,
    },
    Index {
        queue: u8,
        index: u16,
    },
    Memory {
        address: u32,
        bytes: [u8; 16],
    },
    Config {
        offset: u8,
        bytes: [u8; 4],
    },
    Kick(u8),
    Reset,
    ResetQueue(u8),
    Activate(u64),
}

/// Has a write to a closed socket fail, as in every Rust program; the fuzzer's entry is not Rust's, which sees to that.
pub fn ignore_broken_pipes() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: the C library's own function with one of its constants (13 is SIGPIPE, 1 is SIG_IGN on x86-64 Linux), before any other thread
        // is there.
        unsafe {
            signal(13, 1);
        }
    });
}

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
}

/// Descriptors of one request at most.
const PIECES: usize = 16;

/// A device and its driver.
pub struct Driver<D: VirtioDevice> {
    pub rig: Rig<D>,
    /// The next descriptor that a request takes, of each queue.
    next: Vec<u16>,
}

impl<D: VirtioDevice> Driver<D> {
    /// Starts the device and activates it with all its features.
    pub fn new(device: D) -> Self {
        let rig = Rig::active(device);
        let next = vec![0; rig.drivers.len()];
        Self { rig, next }
    }

    fn queue(&self, queue: u8) -> u16 {
        u16::from(queue) % self.next.len() as u16
    }

    pub fn apply(&mut self, step: RingStep) {
        match step {
            RingStep::Request {
                queue,
                out,
                split,
                rooms,
            } => {
                let queue = self.queue(queue);
                self.request(queue, &out, split.into(), &rooms);
            }
            RingStep::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => {
                let queue = self.queue(queue);
                self.rig
                    .write_descriptor(queue, index.into(), address.into(), len, flags.into(), next.into());
            }
            RingStep::Available { queue, head } => self.rig.make_available(self.queue(queue), head),
            RingStep::Index { queue, index } => self.rig.set_available_index(self.queue(queue), index),
            RingStep::Memory { address, bytes } => {
                // A place outside of memory is the fuzzer's own affair.
                let _ = self.rig.memory.write_slice(&bytes, GuestAddress(address.into()));
            }
            RingStep::Config { offset, bytes } => {
                let result = self.rig.write_config(offset.into(), &bytes);
                self.check(result);
            }
            RingStep::Kick(queue) => {
                let queue = self.queue(queue);
                self.kick(queue);
            }
            RingStep::Reset => self.rig.reset(),
            RingStep::ResetQueue(queue) if self.rig.is_active() => {
                let queue = self.queue(queue);
                let result = self.rig.reset_queue(queue);
                self.check(result);
            }
            RingStep::ResetQueue(_) => {}
            RingStep::Activate(features) => {
                self.rig.reset();
                let result = self.rig.activate(features);
                self.check(result);
            }
        }
    }

    fn request(&mut self, queue: u16, out: &[u8], split: usize, rooms: &[u16]) {
        let mut buffers: Vec<(u64, u32, u16)> = Vec::new();
        for piece in out.chunks(split.max(1 + out.len() / PIECES)) {
            let address = self.rig.allocate(piece.len() as u32);
            let _ = self.rig.memory.write_slice(piece, GuestAddress(address));
            buffers.push((address, piece.len() as u32, 0));
        }
        for room in rooms.iter().take(PIECES) {
            buffers.push((self.rig.allocate((*room).into()), (*room).into(), 2));
        }
        let size = self.rig.drivers[usize::from(queue)].setup.size;
        let next = &mut self.next[usize::from(queue)];
        let first = *next;
        *next = (first + buffers.len() as u16) % size;
        for (n, (address, len, flags)) in (0u16..).zip(&buffers) {
            let more = u16::from(usize::from(n) + 1 < buffers.len());
            let (index, next) = ((first + n) % size, (first + n + 1) % size);
            self.rig
                .write_descriptor(queue, index, *address, *len, flags | more, next);
        }
        self.rig.make_available(queue, first);
    }

    pub fn kick(&mut self, queue: u16) {
        if self.rig.is_active() {
            let result = self.rig.try_kick(queue);
            self.check(result);
        }
    }

    /// Hands the device all events that are there.
    pub fn settle(&mut self) {
        let result = self.rig.settle();
        self.check(result);
    }

    /// A driver that breaks a rule is told which one, and a reset helps; nothing that it does is the host's failure.
    fn check(&mut self, result: Result<(), Fault>) {
        match result {
            Ok(()) => {}
            Err(Fault::Violation(violation)) => {
                assert!(!violation.to_string().is_empty());
                assert!(!self.rig.is_active());
                self.rig.activate(u64::MAX).expect("empty rings are all right");
            }
            Err(Fault::Host(error)) => panic!("{error}"),
        }
    }
}
