//! From the host to the guest: which packets go into the guest's buffers, and the bytes of sockets read right into them.

use std::collections::VecDeque;

use super::connection::{Due, Ended, State};
use super::device::{RECEIVE, TRANSMIT, Vsock};
use super::handle::ConnectError;
use super::packet::{Header, Op};
use super::stream::{Pieces, Read};
use super::table::Ports;
use super::transmit::MAX_RESETS;
use crate::virtio::chain::Chain;
use crate::virtio::device::Context;
use crate::virtio::violation::Violation;

/// Buffers that one call fills.
const SHARE: u32 = 256;
/// Buffers for one read of one connection.
const BUFFERS_PER_READ: usize = 32;
/// Bytes of one read of one connection.
const BYTES_PER_READ: u32 = 256 * 1024;
/// Bytes that one packet carries at most: as many as Linux accepts (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
const BYTES_PER_PACKET: usize = 64 * 1024;

impl Vsock {
    /// Gives the guest what is due, as far as it has buffers.
    pub(super) fn fill(&mut self, context: &mut Context<'_>) -> Result<(), Violation> {
        let mut left = SHARE;
        while left > 0 && (!self.resets.is_empty() || self.table.has_turns()) {
            let Some(chain) = self.buffer(context)? else { break };
            if let Some(reset) = self.resets.pop_front() {
                left -= 1;
                self.put(chain, &reset, context)?;
                continue;
            }
            self.spare.push_front(chain);
            let Some(slot) = self.table.next_turn() else { break };
            left = left.saturating_sub(self.turn(slot, context)?);
            self.table.wake(slot);
        }
        if left == 0 {
            context.ring(RECEIVE);
        }
        if self.stalled && self.resets.len() < MAX_RESETS {
            context.ring(TRANSMIT);
        }
        context.interrupt(RECEIVE)
    }

    /// Does what is due for one connection; how many buffers it took. There is at least one spare.
    fn turn(&mut self, slot: u32, context: &mut Context<'_>) -> Result<u32, Violation> {
        let Some(entry) = self.table.get(slot) else {
            return Ok(0);
        };
        let Some(ports) = entry.ports() else { return Ok(0) };
        match entry.connection.due(entry.host_has()) {
            None => Ok(0),
            Some(Due::Control(op, flags)) => {
                let Some(chain) = self.spare.pop_front() else {
                    return Ok(0);
                };
                let (buf_alloc, fwd_cnt) = entry.connection.tell_credit();
                entry.connection.sent_control(op);
                if entry.connection.state() == State::Closing && op == Op::Shutdown {
                    self.deadline(slot, Some(self.config.close_timeout), context);
                }
                let header = Header {
                    flags,
                    buf_alloc,
                    fwd_cnt,
                    ..self.header(ports, op)
                };
                self.put(chain, &header, context)?;
                Ok(1)
            }
            Some(Due::Data(most)) => self.read(slot, ports, most.min(BYTES_PER_READ), context),
        }
    }

    /// Reads what the host sent into the guest's buffers; how many it took.
    fn read(&mut self, slot: u32, ports: Ports, most: u32, context: &mut Context<'_>) -> Result<u32, Violation> {
        let memory = context.memory;
        let mut chains: VecDeque<(Chain, usize)> = VecDeque::new();
        let mut pieces = Pieces::default();
        let mut room = 0;
        'buffers: while room < most as usize && chains.len() < BUFFERS_PER_READ {
            let Some(chain) = self.buffer(context)? else { break };
            let mut writer = chain.writer(memory);
            // `buffer` has made sure that there is more than a header.
            let _ = writer.skip(Header::BYTES);
            let wanted = writer.left().min(BYTES_PER_PACKET).min(most as usize - room);
            let mut fits = 0;
            let mut full = false;
            for slice in writer.slices(wanted).unwrap_or_default() {
                if !pieces.push(&slice) {
                    full = true;
                    break;
                }
                fits += slice.len();
            }
            if fits == 0 {
                self.spare.push_front(chain);
                break 'buffers;
            }
            room += fits;
            chains.push_back((chain, fits));
            if full {
                break 'buffers;
            }
        }
        if room == 0 {
            // To read into nothing would look like the end.
            return Err(Violation::Device {
                queue: RECEIVE,
                reason: "a buffer is not in guest memory any more".into(),
            });
        }
        let Some(entry) = self.table.get(slot) else {
            return Ok(0);
        };
        let Some(stream) = &mut entry.stream else { return Ok(0) };
        let mut bytes = 0;
        let mut reset = false;
        match stream.read(&mut pieces, room) {
            Read::Bytes(count) => bytes = count,
            Read::Nothing => {}
            Read::End => {
                let receiving = stream.hung_up();
                entry.connection.host_ends(Ended {
                    receiving,
                    sending: true,
                });
            }
            Read::Reset => reset = true,
        }
        let mut used = 0;
        if bytes > 0 {
            entry.connection.sent_data(bytes as u32);
            let (buf_alloc, fwd_cnt) = entry.connection.tell_credit();
            let mut header = Header {
                buf_alloc,
                fwd_cnt,
                ..self.header(ports, Op::Data)
            };
            while bytes > 0 {
                let Some((chain, fits)) = chains.pop_front() else { break };
                let len = bytes.min(fits);
                bytes -= len;
                header.len = len as u32;
                self.put(chain, &header, context)?;
                used += 1;
            }
        }
        for (chain, _) in chains.into_iter().rev() {
            self.spare.push_front(chain);
        }
        if reset {
            self.reset_connection(slot, ConnectError::Refused, context);
        }
        Ok(used)
    }

    /// The next buffer of the guest, with room for more than a header; `None` if there is none, and a doorbell will tell of the next.
    pub(super) fn buffer(&mut self, context: &mut Context<'_>) -> Result<Option<Chain>, Violation> {
        if let Some(chain) = self.spare.pop_front() {
            return Ok(Some(chain));
        }
        let Some(ring) = context.queue(RECEIVE) else {
            return Ok(None);
        };
        loop {
            if let Some(chain) = ring.pop()? {
                if !chain.readable().is_empty() {
                    return Err(Violation::Direction {
                        queue: RECEIVE,
                        what: "a buffer for packets has parts for the device to read",
                    });
                }
                if chain.writable_bytes() as usize <= Header::BYTES {
                    return Err(Violation::Length {
                        queue: RECEIVE,
                        what: "a buffer for packets",
                        got: chain.writable_bytes().into(),
                        expected: "more than a header of 44",
                    });
                }
                return Ok(Some(chain));
            }
            if !ring.wait_for_doorbell()? {
                return Ok(None);
            }
        }
    }

    /// Gives a buffer back with a packet; its payload, if it has one, is there already.
    fn put(&mut self, chain: Chain, header: &Header, context: &mut Context<'_>) -> Result<(), Violation> {
        // `buffer` has made sure that it fits.
        let _ = chain.writer(context.memory).write(&header.bytes());
        match context.queue(RECEIVE) {
            Some(ring) => ring.push(chain, Header::BYTES as u32 + header.len),
            None => Ok(()),
        }
    }
}
