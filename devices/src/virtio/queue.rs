//! A split virtqueue as the device sees it (virtio 2.7): takes descriptor chains from the available ring, gives them back through the used
//! ring, and checks everything that the driver wrote.
//!
//! ```text
//!   driver: avail.idx += n      pop -> Chain (checked, in flight)      push(chain, written)      driver: reads used
//!           doorbell                                                   needs_interrupt? -> vector
//! ```
//!
//! The ring's positions and both kinds of notification are `virtio_queue::Queue`'s; chains are walked here, because a chain that breaks the
//! rules has to be told from one that ends.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::access::Window;
use super::chain::{Chain, Segment};
use super::violation::Violation;

/// VIRTQ_DESC_F_NEXT: another descriptor follows.
const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE: the device writes.
const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT: the buffer is a table of descriptors.
const INDIRECT: u16 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT: without VIRTIO_F_EVENT_IDX, the driver wants no interrupt.
const NO_INTERRUPT: u16 = 1;
/// Most entries of a queue (virtio 2.7).
pub const MAX_SIZE: u16 = 32768;
/// Rooms for segments that are kept for the next chains.
const KEPT_ROOMS: usize = 64;

/// A descriptor as it lies in guest memory (virtio 2.7.5), little-endian.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

// SAFETY: four integers without padding (8 + 4 + 2 + 2 = 16 bytes), for which every pattern of bits is a value.
unsafe impl ByteValued for Descriptor {}

/// Bytes of the flags and the index in front of the used ring's entries.
const USED_HEADER_BYTES: u64 = 4;
/// Bytes of an entry of the used ring: a chain's first descriptor and what was written, 4 each.
const USED_ELEMENT_BYTES: u64 = 8;
const DESCRIPTOR_BYTES: u64 = size_of::<Descriptor>() as u64;

/// Where a driver put a queue, and how large it made it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// Entries: a power of two, at most [`MAX_SIZE`].
    pub size: u16,
    /// Guest physical address of the descriptor table, a multiple of 16.
    pub descriptors: u64,
    /// Guest physical address of the available ring, a multiple of 2.
    pub available: u64,
    /// Guest physical address of the used ring, a multiple of 4.
    pub used: u64,
}

/// One queue of an activated device.
pub struct Virtqueue {
    index: u16,
    setup: QueueSetup,
    queue: Queue,
    memory: GuestMemoryMmap,
    /// The same, by the piece that holds the descriptor table, and with most machines all that a driver uses.
    around: Window,
    event_idx: bool,
    indirect: bool,
    /// The available ring's index as it was read last; up to there the entries are the device's. Each look at it takes the line from the driver,
    /// which is about to write to it.
    seen: u16,
    /// Entries were written into the used ring whose index does not say so yet.
    staged: bool,
    /// Chains taken and not yet given back.
    in_flight: u16,
    /// Chains given back since the driver was last told.
    unannounced: u16,
    rooms: Vec<Vec<Segment>>,
}

impl Virtqueue {
    /// The queue of index `index` that a driver set up as `setup`; `features` are the bits it accepted.
    ///
    /// # Errors
    ///
    /// [`Violation::Setup`] says what is wrong with the size, an alignment or an address.
    pub fn new(index: u16, setup: QueueSetup, features: u64, memory: GuestMemoryMmap) -> Result<Self, Violation> {
        let wrong = |reason: String| Violation::Setup { queue: index, reason };
        let QueueSetup {
            size,
            descriptors,
            available,
            used,
        } = setup;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(wrong(format!(
                "a size of {size}; it has to be a power of two up to {MAX_SIZE}"
            )));
        }
        let entries = u64::from(size);
        for (what, address, align, len) in [
            ("descriptor table", descriptors, 16, DESCRIPTOR_BYTES * entries),
            // With the field of VIRTIO_F_EVENT_IDX, for which drivers leave room in any case.
            ("available ring", available, 2, 6 + 2 * entries),
            ("used ring", used, 4, 6 + 8 * entries),
        ] {
            if !address.is_multiple_of(align) {
                return Err(wrong(format!(
                    "its {what} at {address:#x} is not aligned to {align} bytes"
                )));
            }
            // The length is below 2^20.
            if !memory.check_range(GuestAddress(address), len as usize) {
                return Err(wrong(format!(
                    "its {what} of {len:#x} bytes at {address:#x} is not in guest memory"
                )));
            }
        }
        let around = Window::around(&memory, descriptors).ok_or_else(|| {
            wrong(format!(
                "its descriptor table at {descriptors:#x} is not in guest memory"
            ))
        })?;
        let event_idx = features & super::feature::EVENT_IDX != 0;
        let mut queue = Queue::new(size).map_err(|e| wrong(e.to_string()))?;
        queue
            .try_set_desc_table_address(GuestAddress(descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(used)))
            .map_err(|e| wrong(e.to_string()))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(Self {
            index,
            setup,
            queue,
            memory,
            around,
            event_idx,
            seen: 0,
            staged: false,
            indirect: features & super::feature::INDIRECT_DESC != 0,
            in_flight: 0,
            unannounced: 0,
            rooms: Vec::new(),
        })
    }

    /// The queue's index in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Where the driver put it: for a device whose work is done by another process.
    pub fn setup(&self) -> QueueSetup {
        self.setup
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.setup.size
    }

    /// Chains taken and not yet given back.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// The guest memory that this queue's chains lie in.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Takes the next chain; `None` when the driver has not made any more available. To be called until then, or the driver's next doorbell
    /// may never come: [`wait_for_doorbell`](Self::wait_for_doorbell) checks that.
    ///
    /// # Errors
    ///
    /// A [`Violation`]. The queue cannot go on then.
    pub fn pop(&mut self) -> Result<Option<Chain>, Violation> {
        if self.known() == 0 && self.look()? == 0 {
            return Ok(None);
        }
        let position = self.queue.next_avail();
        let head = self.head(position)?;
        let chain = self.walk(head)?;
        self.queue.set_next_avail(position.wrapping_add(1));
        self.in_flight += 1;
        Ok(Some(chain))
    }

    /// Appends the next chains to `chains`, at most `most`, as repeated [`pop`](Self::pop)s would do; for a device that works on several at a
    /// time. None: the driver has not made any more available.
    ///
    /// # Errors
    ///
    /// A [`Violation`], after the chains before it were taken. The queue cannot go on then.
    pub fn pop_some(&mut self, most: u16, chains: &mut Vec<Chain>) -> Result<(), Violation> {
        let known = match self.known() {
            0 => self.look()?,
            known => known,
        };
        let count = known.min(most);
        if count > 1 {
            self.prefetch_descriptors(count)?;
        }
        for _ in 0..count {
            let Some(chain) = self.pop()? else { break };
            if count > 1 {
                self.prefetch_ends(&chain);
            }
            chains.push(chain);
        }
        Ok(())
    }

    /// Has the descriptors of the next `count` chains fetched, all at a time: the driver wrote them last.
    fn prefetch_descriptors(&self, count: u16) -> Result<(), Violation> {
        for ahead in 0..count {
            let head = self.head(self.queue.next_avail().wrapping_add(ahead))?;
            let at = self.setup.descriptors + DESCRIPTOR_BYTES * u64::from(head);
            self.around.prefetch::<false>(at);
            // Where its next one is likely to be.
            self.around.prefetch::<false>(at + 2 * DESCRIPTOR_BYTES);
        }
        Ok(())
    }

    /// Has the beginning and the end of a chain fetched, where most devices have a header and a status.
    fn prefetch_ends(&self, chain: &Chain) {
        let last = chain.writable().last().filter(|last| last.len > 0);
        let end = last.map(|last| last.address + u64::from(last.len - 1));
        if let Some(end) = end {
            self.around.prefetch::<true>(end);
        }
        if let Some(first) = chain.readable().first()
            && end.is_none_or(|end| !Window::on_one_line(first.address, end))
        {
            self.around.prefetch::<false>(first.address);
        }
    }

    /// Chains that the driver had made available when the device looked last, and that were not taken yet.
    pub fn known(&self) -> u16 {
        self.seen.wrapping_sub(self.queue.next_avail())
    }

    /// Looks how many chains there are. They are [`known`](Self::known) from then on, whatever the driver writes.
    fn look(&mut self) -> Result<u16, Violation> {
        let available = self.available()?;
        self.seen = self.queue.next_avail().wrapping_add(available);
        Ok(available)
    }

    /// The first descriptor of the chain at a position of the available ring.
    fn head(&self, position: u16) -> Result<u16, Violation> {
        let slot = u64::from(position % self.setup.size);
        Ok(u16::from_le(self.load(self.setup.available + 4 + 2 * slot)?))
    }

    /// Puts back the chain that was popped last, as if it had not been taken; for a device that finds that it has no room for it yet. Only the
    /// last one can be put back, and only before another is popped.
    pub fn unpop(&mut self, chain: Chain) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
        self.in_flight = self.in_flight.saturating_sub(1);
        self.keep(chain);
    }

    /// Chains that the driver has made available and that were not taken yet.
    ///
    /// # Errors
    ///
    /// [`Violation::AvailableIndex`]: more than the ring can hold, counting those in flight.
    pub fn available(&self) -> Result<u16, Violation> {
        let index: u16 = u16::from_le(self.load(self.setup.available + 2)?);
        let ahead = (Wrapping(index) - Wrapping(self.queue.next_avail())).0;
        // A chain in flight keeps its descriptors, so the driver cannot have made more available than are left.
        if u32::from(ahead) + u32::from(self.in_flight) > u32::from(self.setup.size) {
            return Err(Violation::AvailableIndex {
                queue: self.index,
                index,
                ahead,
                size: self.setup.size,
            });
        }
        Ok(ahead)
    }

    /// Gives `chain` back with `written` bytes of its writable buffers filled, from the first on.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the used ring is not where it was.
    pub fn push(&mut self, chain: Chain, written: u32) -> Result<(), Violation> {
        self.stage(chain, written)?;
        self.publish()
    }

    /// Gives `chain` back as [`push`](Self::push) does, but the driver sees it only after [`publish`](Self::publish): each look that a driver takes
    /// at the ring costs both sides, so what is done at nearly the same time is shown together. And what belongs together, as the buffers of one
    /// received frame do (virtio 5.1.6.4), must not be seen in part by a driver that looks at the same time.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the used ring is not where it was.
    pub fn stage(&mut self, chain: Chain, written: u32) -> Result<(), Violation> {
        let next = self.queue.next_used();
        let slot = u64::from(next % self.setup.size);
        let at = self.setup.used + USED_HEADER_BYTES + USED_ELEMENT_BYTES * slot;
        let element = [u32::from(chain.head()).to_le(), written.to_le()];
        self.around
            .write(at, ByteValued::as_slice(&element))
            .ok_or_else(|| self.outside(at, USED_ELEMENT_BYTES))?;
        self.keep(chain);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.unannounced = self.unannounced.saturating_add(1);
        self.queue.set_next_used(next.wrapping_add(1));
        self.staged = true;
        Ok(())
    }

    /// Shows the driver what was [`stage`](Self::stage)d. Asking whether it [`needs_interrupt`](Self::needs_interrupt) does so, too.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the used ring is not where it was.
    pub fn publish(&mut self) -> Result<(), Violation> {
        if !std::mem::take(&mut self.staged) {
            return Ok(());
        }
        let (at, index) = (self.setup.used + 2, self.queue.next_used().to_le());
        // Released: whoever sees the index sees the entries.
        self.around.store(at, index).ok_or_else(|| self.outside(at, 2))
    }

    /// Whether the driver wants to be told of what was pushed since the last call. [`Context::interrupt`](super::device::Context::interrupt)
    /// asks this.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the rings are not where they were.
    pub fn needs_interrupt(&mut self) -> Result<bool, Violation> {
        self.publish()?;
        let pushed = std::mem::take(&mut self.unannounced);
        if pushed == 0 {
            return Ok(false);
        }
        // The used index is written before what the driver says is read.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags: u16 = self.load(self.setup.available)?;
            return Ok(u16::from_le(flags) & NO_INTERRUPT == 0);
        }
        // The field `used_event`, after the available ring: the driver wants to be told when that entry is written (virtio 2.7.7.2).
        let event = u16::from_le(self.load(self.setup.available + 4 + 2 * u64::from(self.setup.size))?);
        let since_event = Wrapping(self.queue.next_used()) - Wrapping(event) - Wrapping(1);
        Ok(since_event.0 < pushed)
    }

    /// Tells the driver that its doorbell is not needed for now: the device is going to look by itself.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the rings are not where they were.
    pub fn ignore_doorbell(&mut self) -> Result<(), Violation> {
        self.queue.disable_notification(&self.memory).map_err(|e| self.lost(&e))
    }

    /// Asks the driver to ring its doorbell for the next chain. True: one has come meanwhile, and the next [`pop`](Self::pop) takes it, even from a
    /// driver that takes it back, which none may do (virtio 2.7.6.1). So whoever pops again and again as long as this is true takes a chain each
    /// time, of which there are no more than the ring has entries.
    ///
    /// # Errors
    ///
    /// A [`Violation`] if the rings are not where they were, or as of [`available`](Self::available).
    pub fn wait_for_doorbell(&mut self) -> Result<bool, Violation> {
        self.queue
            .enable_notification(&self.memory)
            .map_err(|e| self.lost(&e))?;
        fence(Ordering::SeqCst);
        Ok(self.look()? > 0)
    }

    /// Position of the next chain to take, and of the next entry of the used ring: for a device whose work is done by another process.
    pub fn positions(&self) -> (u16, u16) {
        (self.queue.next_avail(), self.queue.next_used())
    }

    /// Collects and checks the buffers of the chain that begins with descriptor `head`.
    fn walk(&mut self, head: u16) -> Result<Chain, Violation> {
        let most = self.setup.size;
        let mut table = (self.setup.descriptors, u32::from(most));
        let mut in_indirect = false;
        let mut segments = self.rooms.pop().unwrap_or_default();
        let mut readable = 0;
        let mut bytes: u32 = 0;
        let mut next = u32::from(head);
        // An indirect table's descriptor counts as well; so at most `most` direct ones, then `most` of one table.
        let mut budget = most;
        loop {
            if next >= table.1 {
                return Err(Violation::DescriptorIndex {
                    queue: self.index,
                    index: next,
                    size: table.1,
                });
            }
            let too_long = Violation::ChainLength {
                queue: self.index,
                head,
                most,
            };
            budget = budget.checked_sub(1).ok_or(too_long)?;
            let descriptor = self.descriptor(table.0, next)?;
            if descriptor.flags & INDIRECT != 0 {
                if let Some(reason) = self.indirect_misuse(&descriptor, in_indirect) {
                    return Err(Violation::Indirect {
                        queue: self.index,
                        head,
                        reason,
                    });
                }
                table = (descriptor.address, descriptor.len / DESCRIPTOR_BYTES as u32);
                (in_indirect, next, budget) = (true, 0, most);
                continue;
            }
            self.check_buffer(&descriptor)?;
            bytes = bytes.checked_add(descriptor.len).ok_or(Violation::ChainBytes {
                queue: self.index,
                head,
            })?;
            if descriptor.flags & WRITE == 0 {
                if readable < segments.len() {
                    return Err(Violation::Order {
                        queue: self.index,
                        head,
                    });
                }
                readable += 1;
            }
            segments.push(Segment {
                address: descriptor.address,
                len: descriptor.len,
            });
            if descriptor.flags & NEXT == 0 {
                return Ok(Chain::new(head, segments, readable));
            }
            next = u32::from(descriptor.next);
        }
    }

    fn indirect_misuse(&self, descriptor: &Descriptor, nested: bool) -> Option<&'static str> {
        if !self.indirect {
            Some("the driver did not accept the feature for")
        } else if nested {
            Some("is itself in an indirect table")
        } else if descriptor.flags & NEXT != 0 {
            Some("is followed by a further descriptor")
        } else if descriptor.len == 0 || !u64::from(descriptor.len).is_multiple_of(DESCRIPTOR_BYTES) {
            Some("is not a whole number of descriptors long")
        } else {
            None
        }
    }

    fn descriptor(&self, table: u64, index: u32) -> Result<Descriptor, Violation> {
        let address = table.checked_add(DESCRIPTOR_BYTES * u64::from(index));
        let read = address.and_then(|address| self.around.read_obj::<Descriptor>(address));
        let raw = read.ok_or(Violation::Address {
            queue: self.index,
            address: address.unwrap_or(table),
            len: DESCRIPTOR_BYTES,
        })?;
        Ok(Descriptor {
            address: u64::from_le(raw.address),
            len: u32::from_le(raw.len),
            flags: u16::from_le(raw.flags),
            next: u16::from_le(raw.next),
        })
    }

    fn check_buffer(&self, descriptor: &Descriptor) -> Result<(), Violation> {
        let Descriptor { address, len, .. } = *descriptor;
        if len == 0 || self.around.is_inside(address, len) {
            Ok(())
        } else {
            Err(Violation::Address {
                queue: self.index,
                address,
                len: len.into(),
            })
        }
    }

    /// Reads a field of the available ring that the driver changes while the device reads.
    fn load(&self, address: u64) -> Result<u16, Violation> {
        self.around.load(address).ok_or_else(|| self.outside(address, 2))
    }

    fn outside(&self, address: u64, len: u64) -> Violation {
        Violation::Address {
            queue: self.index,
            address,
            len,
        }
    }

    fn lost(&self, error: &virtio_queue::Error) -> Violation {
        Violation::Setup {
            queue: self.index,
            reason: format!("its rings are not in guest memory any more: {error}"),
        }
    }

    fn keep(&mut self, chain: Chain) {
        if self.rooms.len() < KEPT_ROOMS {
            let mut room = chain.into_segments();
            room.clear();
            self.rooms.push(room);
        }
    }
}

#[cfg(test)]
mod tests;
