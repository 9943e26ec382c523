//! The driver's frames to the host: checked, sent straight from guest memory where the host's side can take them so, given back at once.

use std::time::Instant;

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::backend::{Backend, Sent};
use super::flow::Flow;
use super::handle::Counters;
use super::header::{ETHERNET_BYTES, HEADER_BYTES, Header, MAX_FRAME, VLAN_BYTES};
use super::limit::Limit;
use super::receive::Trouble;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Virtqueue;
use crate::virtio::violation::Violation;

/// Frames of one turn; then other events have theirs.
const TURN_FRAMES: usize = 64;
/// Frames that are taken, and given back, together: enough to share out what a look at the rings costs both sides, few enough for the driver to
/// prepare others meanwhile.
const BATCH: u16 = 8;
/// Bytes of one turn.
const TURN_BYTES: usize = 1 << 20;
/// The most parts of one frame: fewer than one system call takes, with the header.
const MOST_PARTS: usize = 1000;

/// Why a turn ended.
#[derive(Debug)]
pub(super) enum End {
    /// The driver has no more frames; it rings when it does.
    Drained,
    /// There may be more, but others have their turn.
    Turn,
    /// The host takes no more for now.
    Full,
    /// The rate limit holds the next frame back; its timer tells when to go on.
    Limited,
    /// The host's side is gone, and why.
    Lost(String),
}

/// What a transmit queue needs beside its ring.
pub(super) struct Sink<'a> {
    pub(super) backend: &'a mut dyn Backend,
    pub(super) port: usize,
    /// What the driver accepted.
    pub(super) accepted: u64,
    pub(super) flow: &'a mut Flow,
    /// Frames pass.
    pub(super) link_up: bool,
    pub(super) limit: &'a mut Limit,
    pub(super) counters: &'a Counters,
    /// Room for the chains of a batch.
    pub(super) batch: &'a mut Vec<Chain>,
}

/// What to do after a frame.
enum Next {
    GiveBack,
    Later(End),
}

/// Moves frames from `queue` to the host, for one turn.
///
/// # Errors
///
/// The driver's chains break the rules; or the timer of the limit does not work.
pub(super) fn transmit(memory: &GuestMemoryMmap, queue: &mut Virtqueue, sink: &mut Sink<'_>) -> Result<End, Trouble> {
    if let (Flow::Waiting(_), true) = (*sink.flow, sink.link_up) {
        return Ok(End::Full);
    }
    queue.ignore_doorbell()?;
    let mut batch = std::mem::take(sink.batch);
    let end = send_all(memory, queue, &mut batch, sink);
    batch.clear();
    *sink.batch = batch;
    queue.publish()?;
    let mut end = end?;
    // Otherwise its descriptor tells when what is staged can go out.
    if sink.link_up && *sink.flow == Flow::Open {
        match sink.backend.flush(sink.port) {
            Sent::Full => end = End::Full,
            Sent::Lost(reason) => end = End::Lost(reason),
            Sent::Done | Sent::Refused(_) => {}
        }
    }
    if matches!(end, End::Full) {
        sink.flow.full(Instant::now());
    }
    Ok(end)
}

/// Sends what `queue` has, by batches: why it ended.
fn send_all(
    memory: &GuestMemoryMmap,
    queue: &mut Virtqueue,
    batch: &mut Vec<Chain>,
    sink: &mut Sink<'_>,
) -> Result<End, Trouble> {
    let (mut frames, mut bytes) = (0, 0);
    let mut slices = Vec::new();
    while frames < TURN_FRAMES && bytes < TURN_BYTES {
        let popped = queue.pop_some(BATCH, batch);
        if batch.is_empty() {
            popped?;
            if queue.wait_for_doorbell()? {
                queue.ignore_doorbell()?;
                continue;
            }
            return Ok(End::Drained);
        }
        frames += batch.len();
        let mut chains = batch.drain(..);
        while let Some(chain) = chains.next() {
            check(&chain, queue.index())?;
            bytes += chain.readable_bytes() as usize;
            slices.clear();
            match send(memory, &chain, &mut slices, sink)? {
                Next::GiveBack => queue.stage(chain, 0)?,
                Next::Later(why) => {
                    // The last one first.
                    chains.rev().for_each(|later| queue.unpop(later));
                    queue.unpop(chain);
                    return Ok(why);
                }
            }
        }
        queue.publish()?;
        popped?;
    }
    Ok(End::Turn)
}

/// What a driver may not do at all.
fn check(chain: &Chain, queue: u16) -> Result<(), Violation> {
    if !chain.writable().is_empty() {
        return Err(Violation::Direction {
            queue,
            what: "a transmit buffer that the device is to write",
        });
    }
    if (chain.readable_bytes() as usize) < HEADER_BYTES {
        return Err(Violation::Length {
            queue,
            what: "a transmit buffer",
            got: chain.readable_bytes().into(),
            expected: "at least the 12 bytes of a header",
        });
    }
    Ok(())
}

fn send<'m>(
    memory: &'m GuestMemoryMmap,
    chain: &Chain,
    slices: &mut Vec<VolatileSlice<'m>>,
    sink: &mut Sink<'_>,
) -> Result<Next, Trouble> {
    if !sink.link_up || *sink.flow == Flow::Dropping {
        sink.counters.dropped();
        return Ok(Next::GiveBack);
    }
    let Some(header) = frame(memory, chain, sink.accepted, slices) else {
        sink.counters.error();
        return Ok(Next::GiveBack);
    };
    let len = chain.readable_bytes() as usize - HEADER_BYTES;
    if !sink.limit.admit(len).map_err(Trouble::Timer)? {
        return Ok(Next::Later(End::Limited));
    }
    Ok(match sink.backend.send(sink.port, &header, slices) {
        Sent::Done => {
            sink.counters.passed(len);
            Next::GiveBack
        }
        Sent::Refused(error) => {
            tracing::debug!(%error, len, "the host refused a frame");
            sink.counters.error();
            Next::GiveBack
        }
        Sent::Full => Next::Later(End::Full),
        Sent::Lost(reason) => Next::Later(End::Lost(reason)),
    })
}

/// The header of a frame, if it is one that may be sent; its bytes are appended to `slices`.
fn frame<'m>(
    memory: &'m GuestMemoryMmap,
    chain: &Chain,
    accepted: u64,
    slices: &mut Vec<VolatileSlice<'m>>,
) -> Option<Header> {
    let mut reader = chain.reader(memory);
    // The header is read once: what was checked is what is sent.
    let mut header = Header::default();
    reader.read(&mut header.0).ok()?;
    let len = reader.left();
    if !(ETHERNET_BYTES..=MAX_FRAME + VLAN_BYTES).contains(&len) {
        return None;
    }
    let header = header.checked(accepted, len)?;
    reader.each_slice(len, |slice| slices.push(slice)).ok()?;
    (slices.len() <= MOST_PARTS).then_some(header)
}
