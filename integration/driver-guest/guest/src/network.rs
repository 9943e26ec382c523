//! Network cards: ARP, ping and UDP, just enough to talk to a host on the same link.

mod flood;
mod packet;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use virtio_drivers::Error;
use virtio_drivers::device::net::{TxBuffer, VirtIONet};
use virtio_drivers::transport::DeviceType;

use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;
use crate::round_trips::RoundTrips;

pub(crate) use flood::{receive, transmit};
use packet::{Address, BROADCAST, Ethernet, Packet};

/// Bytes of a receive buffer.
const BUFFER: usize = 2048;
const PATIENCE: u64 = 60_000;
/// UDP port that ends `net-serve`, and the one that is echoed.
const END_PORT: u16 = 9;
const ECHO_PORT: u16 = 7;

/// A card with an address of its own.
struct Link {
    card: VirtIONet<Identity, Port, 32>,
    own: Address,
    mac: Ethernet,
}

impl Link {
    fn open(guest: &mut Guest, arguments: Arguments<'_>) -> Result<Self, Failure> {
        let own = packet::parse_address(arguments.text(0).unwrap_or("10.0.0.2"))?;
        let card = VirtIONet::new(Port::open(guest, DeviceType::Network, arguments.device)?, BUFFER)?;
        let mac = card.mac_address();
        Ok(Self { card, own, mac })
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), Failure> {
        Ok(self.card.send(TxBuffer::from(frame))?)
    }

    /// The next frame, if one has come.
    fn receive(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        match self.card.receive() {
            Ok(buffer) => {
                let frame = buffer.packet().to_vec();
                self.card.recycle_rx_buffer(buffer)?;
                Ok(Some(frame))
            }
            Err(Error::NotReady) => Ok(None),
            Err(other) => Err(other.into()),
        }
    }

    /// Answers what any host on a link answers; true if the frame was such.
    fn answer(&mut self, frame: &[u8]) -> Result<bool, Failure> {
        let reply = match Packet::parse(frame) {
            Some(Packet::ArpRequest { mac, sender, target }) if target == self.own => {
                packet::arp(2, self.mac, self.own, mac, sender)
            }
            Some(Packet::Ping { mac, from, to, body }) if to == self.own => {
                packet::icmp(0, (self.mac, self.own), (mac, from), body)
            }
            _ => return Ok(false),
        };
        self.send(&reply)?;
        Ok(true)
    }

    /// Finds out the hardware address of a host on the link.
    fn resolve(&mut self, guest: &mut Guest, peer: Address) -> Result<Ethernet, Failure> {
        let request = packet::arp(1, self.mac, self.own, BROADCAST, peer);
        let end = guest.now() + PATIENCE * 1_000_000;
        while guest.now() < end {
            self.send(&request)?;
            let again = guest.now() + 500_000_000;
            while guest.now() < again {
                let Some(frame) = self.receive()? else { continue };
                match Packet::parse(&frame) {
                    Some(Packet::ArpReply { mac, sender }) if sender == peer => return Ok(mac),
                    _ => _ = self.answer(&frame)?,
                }
            }
        }
        Err(Failure(format!("nobody on the link is {peer:?}")))
    }
}

/// `net-info`: hardware address and largest packet.
pub(crate) fn info(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let link = Link::open(guest, arguments)?;
    let mac: Vec<String> = link.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("mac={}", mac.join("-")))
}

/// `net-ping:OWN:PEER[:COUNT[:BYTES]]`: pings the peer and checks what comes back.
pub(crate) fn ping(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut link = Link::open(guest, arguments)?;
    let peer = packet::parse_address(arguments.text(1).unwrap_or("10.0.0.1"))?;
    let (count, bytes): (u16, usize) = (arguments.number(2, 10)?, arguments.number(3, 56)?);
    ensure!(bytes + 64 < BUFFER, "at most {} bytes", BUFFER - 64);
    let mac = link.resolve(guest, peer)?;
    let mut trips = RoundTrips::default();
    for number in 0..count {
        let mut body = Vec::from([0x5e, 0x9a, (number >> 8) as u8, number as u8]);
        body.extend((0..bytes).map(|index| (index + usize::from(number)) as u8));
        trips.time(guest, |guest| {
            link.send(&packet::icmp(8, (link.mac, link.own), (mac, peer), &body))?;
            let end = guest.now() + 5_000_000_000;
            loop {
                ensure!(guest.now() < end, "ping {number} of {count} is not answered");
                let Some(frame) = link.receive()? else { continue };
                match Packet::parse(&frame) {
                    Some(Packet::Pong { from, body: got, .. }) if from == peer => {
                        ensure!(got == body, "ping {number} comes back differently");
                        return Ok(());
                    }
                    _ => _ = link.answer(&frame)?,
                }
            }
        })?;
    }
    Ok(trips.report())
}

/// `net-serve:OWN`: answers pings, echoes UDP to port 7, until a UDP packet comes to port 9.
pub(crate) fn serve(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let mut link = Link::open(guest, arguments)?;
    guest.say("waiting net-serve");
    let (mut echoed, mut answered) = (0, 0);
    let end = guest.now() + PATIENCE * 1_000_000;
    loop {
        ensure!(
            guest.now() < end,
            "nobody ended it; answered {answered}, echoed {echoed}"
        );
        let Some(frame) = link.receive()? else { continue };
        match Packet::parse(&frame) {
            Some(Packet::Udp {
                to, to_port: END_PORT, ..
            }) if to == link.own => {
                return Ok(format!("answered={answered} echoed={echoed}"));
            }
            Some(Packet::Udp {
                mac,
                from,
                to,
                from_port,
                to_port: ECHO_PORT,
                body,
            }) if to == link.own => {
                let reply = packet::udp((link.mac, link.own, ECHO_PORT), (mac, from, from_port), body);
                link.send(&reply)?;
                echoed += 1;
            }
            _ => answered += u32::from(link.answer(&frame)?),
        }
    }
}
