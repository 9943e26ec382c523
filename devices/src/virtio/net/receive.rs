//! Frames from the host into the driver's buffers.
//!
//! Before a frame is read its length is not known, so room for the longest that is expected is taken from the ring as far as the driver gave it, and what
//! is not used is held for the next frame: that is one segment, or, for some frames after one that was longer, all that a frame can be. What has no room
//! goes into a spill buffer, and moves on when the driver gives more:
//!
//! ```text
//!           nothing held                 room for it all            used ring
//!   [idle] ------------------> [frame] ----------------------------------->
//!                                 |                                    ^
//!                                 '--- too little room, or limited --> [parked]: its beginning in held chains, its rest here
//! ```

use std::collections::VecDeque;
use std::io;

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::backend::{Backend, Received, Room, scatter};
use super::features;
use super::handle::Counters;
use super::header::{ETHERNET_BYTES, HEADER_BYTES, Header, MAX_FRAME, VLAN_BYTES};
use super::limit::Limit;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Virtqueue;
use crate::virtio::violation::Violation;

/// Bytes for what the driver gave no room for.
pub(super) const SPILL: usize = MAX_FRAME + VLAN_BYTES;
/// Frames of one turn; then other events have theirs.
const TURN_FRAMES: usize = 64;
/// Bytes of one turn.
const TURN_BYTES: usize = 1 << 20;
/// Frames that are shown to the driver together: enough to share out what a look at the ring costs both sides, few enough for the driver to take them
/// while others are read.
const BATCH: usize = 8;
/// Parts of guest memory after which no more chains are taken before a frame is read.
const MOST_PARTS: usize = 256;
/// Frames of one segment after which longer ones are not expected any more.
const LONG_FOR: u8 = 64;
/// The most parts of one chain. Together they are fewer than one system call takes.
const MOST_CHAIN_PARTS: usize = 512;

/// Why a turn ended.
#[derive(Debug)]
pub(super) enum End {
    /// The host has no more frames.
    Drained,
    /// The driver gave no more room; it rings when it does.
    NoRoom,
    /// There may be more, but others have their turn.
    Turn,
    /// The rate limit holds a frame back; its timer tells when to go on.
    Limited,
    /// The host's side is gone, and why.
    Lost(String),
}

/// A frame that cannot be given to the driver yet.
struct Parked {
    header: Header,
    /// Its bytes.
    len: usize,
    /// Bytes, with the header's, that are in held chains.
    placed: usize,
    /// The rest.
    rest: Vec<u8>,
    /// It is within the rate limit.
    admitted: bool,
}

/// What is held of one receive queue.
#[derive(Default)]
pub(super) struct Receiver {
    held: VecDeque<Chain>,
    parked: Option<Parked>,
    /// So many frames may be longer than one segment.
    long: u8,
    /// The driver was asked not to ring.
    quiet: bool,
}

/// What a receiver needs beside its queue.
pub(super) struct Source<'a> {
    pub(super) backend: &'a mut dyn Backend,
    pub(super) port: usize,
    /// What the driver accepted.
    pub(super) accepted: u64,
    pub(super) mtu: u16,
    pub(super) limit: &'a mut Limit,
    pub(super) spill: &'a mut [u8],
    pub(super) counters: &'a Counters,
}

impl Source<'_> {
    fn has(&self, feature: u64) -> bool {
        self.accepted & feature != 0
    }

    /// The longest frame that is one segment.
    fn longest_segment(&self) -> usize {
        if self.has(features::MTU) {
            ETHERNET_BYTES + VLAN_BYTES + usize::from(self.mtu)
        } else {
            MAX_FRAME
        }
    }

    /// Bytes, with the header's, that a frame of one segment needs.
    fn segment_room(&self) -> usize {
        HEADER_BYTES + ETHERNET_BYTES + VLAN_BYTES + usize::from(self.mtu)
    }

    /// Whether something is wrong with a frame.
    fn is_bad(&self, header: &Header, len: usize) -> bool {
        let most = if header.unsegmented() {
            SPILL
        } else {
            self.longest_segment()
        };
        len < ETHERNET_BYTES || len > most
    }
}

impl Receiver {
    /// Drops a frame that waits.
    pub(super) fn drop_parked(&mut self, counters: &Counters) {
        if self.parked.take().is_some() {
            counters.dropped();
        }
    }

    /// Moves frames from the host to `queue`, for one turn.
    ///
    /// # Errors
    ///
    /// The driver's buffers break the rules; or the timer of the limit does not work.
    pub(super) fn deliver(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut Virtqueue,
        source: &mut Source<'_>,
    ) -> Result<End, Trouble> {
        let end = self.deliver_some(memory, queue, source);
        queue.publish()?;
        end
    }

    /// As [`deliver`](Self::deliver); the driver has yet to be shown the last few frames.
    fn deliver_some(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut Virtqueue,
        source: &mut Source<'_>,
    ) -> Result<End, Trouble> {
        let mut turn = Turn::new(self, memory, queue, source.has(features::MRG_RXBUF));
        let segment = source.segment_room();
        let mut bytes = 0;
        for number in 1..=TURN_FRAMES {
            let frame = match turn.receiver.parked.take() {
                Some(frame) => frame,
                None => {
                    let long = turn.receiver.long > 0;
                    if !turn.has_room(if long { HEADER_BYTES + MAX_FRAME } else { segment })? {
                        return Ok(End::NoRoom);
                    }
                    match turn.read(source) {
                        Ok(Some(frame)) => {
                            turn.receiver.long = if HEADER_BYTES + frame.len > segment {
                                LONG_FOR
                            } else {
                                turn.receiver.long.saturating_sub(1)
                            };
                            frame
                        }
                        Ok(None) => continue,
                        Err(end) => return Ok(end),
                    }
                }
            };
            bytes += frame.len;
            if let Some(end) = turn.place(frame, source)? {
                return Ok(end);
            }
            if number.is_multiple_of(BATCH) {
                turn.queue.publish()?;
            }
            if bytes >= TURN_BYTES {
                break;
            }
        }
        Ok(End::Turn)
    }
}

/// What keeps a turn from going on.
#[derive(Debug)]
pub(super) enum Trouble {
    Violation(Violation),
    Timer(io::Error),
}

impl From<Violation> for Trouble {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

/// One turn: what is held, as memory of this process.
struct Turn<'t, 'm> {
    receiver: &'t mut Receiver,
    memory: &'m GuestMemoryMmap,
    queue: &'t mut Virtqueue,
    /// A frame may be spread over several chains.
    merge: bool,
    /// Those of all held chains, from `first` on.
    slices: Vec<VolatileSlice<'m>>,
    first: usize,
    /// How many each held chain has.
    counts: VecDeque<usize>,
    /// Bytes of all held chains.
    room: usize,
}

impl<'t, 'm> Turn<'t, 'm> {
    fn new(receiver: &'t mut Receiver, memory: &'m GuestMemoryMmap, queue: &'t mut Virtqueue, merge: bool) -> Self {
        let held = std::mem::take(&mut receiver.held);
        let mut turn = Self {
            receiver,
            memory,
            queue,
            merge,
            slices: Vec::new(),
            first: 0,
            counts: VecDeque::new(),
            room: 0,
        };
        for chain in held {
            turn.hold(chain);
        }
        turn
    }

    /// Keeps a chain, whose writable bytes are memory of this process for as long as the turn lasts: in how many pieces.
    fn hold(&mut self, chain: Chain) -> usize {
        let before = self.slices.len();
        let bytes = chain.writable_bytes() as usize;
        // There are as many bytes.
        let _ = chain
            .writer(self.memory)
            .each_slice(bytes, |slice| self.slices.push(slice));
        let count = self.slices.len() - before;
        self.counts.push_back(count);
        self.room += bytes;
        self.receiver.held.push_back(chain);
        count
    }

    /// Takes chains until there are `wanted` bytes, as far as the driver gave some. Without merging, one chain is all that a frame gets.
    fn refill(&mut self, wanted: usize) -> Result<(), Violation> {
        while self.room < wanted && (self.merge || self.counts.is_empty()) {
            let Some(chain) = self.queue.pop()? else {
                break;
            };
            let queue = self.queue.index();
            if !chain.readable().is_empty() {
                return Err(Violation::Direction {
                    queue,
                    what: "a receive buffer that the device is to read",
                });
            }
            if (chain.writable_bytes() as usize) < HEADER_BYTES {
                return Err(Violation::Length {
                    queue,
                    what: "a receive buffer",
                    got: chain.writable_bytes().into(),
                    expected: "at least the 12 bytes of a header",
                });
            }
            let count = self.hold(chain);
            if count > MOST_CHAIN_PARTS {
                return Err(Violation::Length {
                    queue,
                    what: "pieces of a receive buffer",
                    got: count as u64,
                    expected: "at most 512",
                });
            }
            if self.slices.len() - self.first >= MOST_PARTS {
                break;
            }
        }
        Ok(())
    }

    /// Whether there is any room; tries to have `wanted` bytes of it. If not, the driver rings when it gives more.
    fn has_room(&mut self, wanted: usize) -> Result<bool, Violation> {
        self.refill(wanted)?;
        if self.counts.is_empty() {
            if !self.more_came()? {
                return Ok(false);
            }
            // At least one chain, whatever the driver does.
            self.refill(wanted)?;
        }
        if !std::mem::replace(&mut self.receiver.quiet, true) {
            self.queue.ignore_doorbell()?;
        }
        Ok(true)
    }

    /// Asks the driver to ring when it gives room. True: it gave some meanwhile.
    fn more_came(&mut self) -> Result<bool, Violation> {
        self.receiver.quiet = false;
        self.queue.wait_for_doorbell()
    }

    /// The slices that the next frame goes to.
    fn target(&self) -> &[VolatileSlice<'m>] {
        let all = &self.slices[self.first..];
        match self.counts.front() {
            Some(&count) if !self.merge => &all[..count],
            _ => all,
        }
    }

    /// Bytes that the next frame finds room for, with its header.
    fn target_bytes(&self) -> usize {
        match self.receiver.held.front() {
            Some(chain) if !self.merge => chain.writable_bytes() as usize,
            _ => self.room,
        }
    }

    /// Reads the next frame into what is held. `None`: it was not fit to be given to the driver.
    fn read(&mut self, source: &mut Source<'_>) -> Result<Option<Parked>, End> {
        let mut room = Room {
            slices: self.target(),
            spill: &mut *source.spill,
        };
        let (header, len) = match source.backend.receive(source.port, &mut room) {
            Received::Frame { header, len } => (header, len),
            Received::Nothing => return Err(End::Drained),
            Received::Lost(reason) => return Err(End::Lost(reason)),
            Received::Bad => {
                source.counters.error();
                return Ok(None);
            }
        };
        if source.is_bad(&header, len) {
            source.counters.error();
            return Ok(None);
        }
        let placed = self.target_bytes().min(HEADER_BYTES + len);
        let rest = HEADER_BYTES + len - placed;
        if rest > 0 && !self.merge {
            // It will never have room: the driver's buffers are too short for it.
            source.counters.dropped();
            return Ok(None);
        }
        Ok(Some(Parked {
            header,
            len,
            placed,
            rest: source.spill[..rest.min(SPILL)].to_vec(),
            admitted: false,
        }))
    }

    /// Gives a frame to the driver, or parks it and says why.
    fn place(&mut self, mut frame: Parked, source: &mut Source<'_>) -> Result<Option<End>, Trouble> {
        if !frame.admitted {
            frame.admitted = source.limit.admit(frame.len).map_err(Trouble::Timer)?;
        }
        if !frame.admitted {
            self.receiver.parked = Some(frame);
            return Ok(Some(End::Limited));
        }
        let total = HEADER_BYTES + frame.len;
        if !frame.rest.is_empty() {
            loop {
                self.refill(total)?;
                if self.room >= total {
                    break;
                }
                if self.queue.in_flight() >= self.queue.size() {
                    // The driver has no more to give: the frame is longer than all of its buffers.
                    source.counters.dropped();
                    return Ok(None);
                }
                // Room that came meanwhile may still be too little, but each time it is a chain, and there is an end to what fits into the ring.
                if !self.more_came()? {
                    self.receiver.parked = Some(frame);
                    return Ok(Some(End::NoRoom));
                }
            }
            scatter(&self.slices[self.first..], frame.placed, &frame.rest);
        }
        self.give_back(frame.header, total)?;
        source.counters.passed(frame.len);
        Ok(None)
    }

    /// Puts the held chains that hold `total` bytes into the used ring. A driver that sees the first of them looks for the others at once, so it is
    /// shown all of them together, at the end of a batch of frames.
    fn give_back(&mut self, mut header: Header, total: usize) -> Result<(), Violation> {
        let (mut chains, mut bytes) = (0, 0);
        for chain in &self.receiver.held {
            chains += 1;
            bytes += chain.writable_bytes() as usize;
            if bytes >= total {
                break;
            }
        }
        header.set_buffers(chains);
        scatter(&self.slices[self.first..], 0, &header.0);
        let mut left = total;
        for chain in self.receiver.held.drain(..usize::from(chains)) {
            let written = left.min(chain.writable_bytes() as usize);
            left -= written;
            // At most a chain's bytes.
            self.queue.stage(chain, written as u32)?;
        }
        self.room -= bytes;
        self.first += self.counts.drain(..usize::from(chains)).sum::<usize>();
        Ok(())
    }
}
