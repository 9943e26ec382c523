//! From the guest to the host: what the device does with each packet that the guest sends.

use super::connection::{Connection, Gone, Received};
use super::device::{TRANSMIT, Vsock};
use super::handle::ConnectError;
use super::packet::{HOST_CID, Header, Op, STREAM};
use super::table::{Ports, Waiting};
use crate::virtio::chain::Chain;
use crate::virtio::device::Context;
use crate::virtio::violation::Violation;

/// Packets that one call works on.
const SHARE: u32 = 256;
/// Resets that may wait for buffers before no more packets are taken from the guest.
pub(super) const MAX_RESETS: usize = 256;

impl Vsock {
    /// Takes packets of the guest.
    pub(super) fn transmit(&mut self, context: &mut Context<'_>) -> Result<(), Violation> {
        let mut left = SHARE;
        loop {
            self.stalled = self.resets.len() >= MAX_RESETS;
            let Some(ring) = context.queue(TRANSMIT) else {
                return Ok(());
            };
            if self.stalled {
                break;
            }
            if left == 0 {
                context.ring(TRANSMIT);
                break;
            }
            left -= 1;
            if let Some(chain) = ring.pop()? {
                self.packet(&chain, context)?;
                if let Some(ring) = context.queue(TRANSMIT) {
                    ring.push(chain, 0)?;
                }
            } else if !ring.wait_for_doorbell()? {
                break;
            }
        }
        context.interrupt(TRANSMIT)
    }

    /// Acts on one packet of the guest.
    fn packet(&mut self, chain: &Chain, context: &mut Context<'_>) -> Result<(), Violation> {
        if !chain.writable().is_empty() {
            return Err(Violation::Direction {
                queue: TRANSMIT,
                what: "a packet has buffers for the device to write",
            });
        }
        let memory = context.memory;
        let mut reader = chain.reader(memory);
        let mut bytes = [0; Header::BYTES];
        if reader.read(&mut bytes).is_err() {
            return Err(Violation::Length {
                queue: TRANSMIT,
                what: "packet",
                got: chain.readable_bytes().into(),
                expected: "at least its header of 44",
            });
        }
        let header = Header::parse(&bytes);
        let Ok(payload) = reader.split_at(header.len as usize) else {
            return Err(Violation::Length {
                queue: TRANSMIT,
                what: "a packet's payload",
                got: reader.left() as u64,
                expected: "as many as its header says",
            });
        };
        if header.src_cid != self.config.cid {
            // Not from this guest (virtio 5.10.6.4.1), so nobody is there to be told.
            return Ok(());
        }
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            self.resets.extend(header.refusal());
            return Ok(());
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let Some(slot) = self.table.find(ports) else {
            if Op::new(header.op) == Some(Op::Request) {
                self.offer(ports, &header, context);
            } else {
                self.resets.extend(header.refusal());
            }
            return Ok(());
        };
        let Some(entry) = self.table.get(slot) else {
            return Ok(());
        };
        match entry.connection.receive(&header) {
            Received::Nothing => {}
            Received::Established => self.established(slot, context),
            Received::Data => {
                if let Some(stream) = &mut entry.stream {
                    let gone = stream.write(payload);
                    // A u32 of bytes at most.
                    entry.connection.forwarded(gone as u32);
                }
                self.settle(slot);
            }
            Received::Ended(ended) => {
                if let Some(stream) = &mut entry.stream {
                    if ended.sending {
                        stream.end();
                    }
                    if ended.receiving {
                        stream.refuse_input();
                    }
                }
                self.settle(slot);
            }
            Received::Gone { answer, how } => {
                if let Gone::Broken(rule) = how {
                    tracing::debug!(
                        device = context.name(),
                        ?ports,
                        "connection reset: the guest sent {rule}"
                    );
                }
                if answer {
                    self.resets.push_back(self.header(ports, Op::Reset));
                }
                self.gone(slot, ConnectError::Refused, context);
            }
        }
        self.table.wake(slot);
        Ok(())
    }

    /// The guest asks for a connection.
    fn offer(&mut self, ports: Ports, header: &Header, context: &mut Context<'_>) {
        let Some(listening) = self.shared.listener(ports.host) else {
            self.resets.extend(header.refusal());
            return;
        };
        let inserted = self
            .table
            .insert(ports, Waiting::None, |window| Connection::offer(window, header));
        let Ok(slot) = inserted else {
            self.resets.extend(header.refusal());
            return;
        };
        self.deadline(slot, Some(self.config.accept_timeout), context);
        if let Some(entry) = self.table.get(slot) {
            let (offer, incoming) = listening
                .clone()
                .offer(&self.shared, entry.id(), ports.host, ports.guest);
            entry.waiting = Waiting::Guest { _offer: offer };
            listening.call(incoming);
        }
    }
}
