//! Packets a second, by queues of our own: the crate's driver sends one packet at a time.

use alloc::boxed::Box;
use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceType, Transport};

use super::{Link, packet};
use crate::arguments::Arguments;
use crate::ensure;
use crate::guest::{Failure, Guest, Outcome};
use crate::heap::Identity;
use crate::port::Port;

const ENTRIES: usize = 256;
/// Bytes of the header before a packet (virtio 5.1.6).
const HEADER: usize = 12;
/// Room for all headers of a datagram.
const HEADERS: usize = 64;
/// Queues (virtio 5.1.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// The device has an address of its own (virtio 5.1.3).
const MAC: u64 = 1 << 5;
/// UDP's discard port.
const DISCARD: u16 = 9;

struct RawCard {
    port: Port,
    receive: Box<VirtQueue<Identity, ENTRIES>>,
    transmit: Box<VirtQueue<Identity, ENTRIES>>,
}

impl RawCard {
    fn open(guest: &mut Guest, number: usize) -> Result<Self, Failure> {
        let mut port = Port::open(guest, DeviceType::Network, number)?;
        port.negotiate(0, MAC)?;
        let mut receive = Box::new(VirtQueue::new(&mut port, RECEIVE, false, false)?);
        let mut transmit = Box::new(VirtQueue::new(&mut port, TRANSMIT, false, false)?);
        receive.set_dev_notify(false);
        transmit.set_dev_notify(false);
        port.finish_init();
        Ok(Self {
            port,
            receive,
            transmit,
        })
    }
}

/// `net-tx:OWN:PEER[:BYTES[:COUNT]]`: sends UDP datagrams of so many bytes to the peer's discard port as fast as they are taken.
pub(crate) fn transmit(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (bytes, count): (usize, usize) = (arguments.number(2, 1400)?, arguments.number(3, 100_000)?);
    let peer = packet::parse_address(arguments.text(1).unwrap_or("10.0.0.1"))?;
    let frame = {
        let mut link = Link::open(guest, arguments)?;
        let mac = link.resolve(guest, peer)?;
        packet::udp((link.mac, link.own, DISCARD), (mac, peer, DISCARD), &vec![0x55; bytes])
    };
    let mut card = RawCard::open(guest, arguments.device)?;
    let mut data = vec![0; HEADER];
    data.extend_from_slice(&frame);
    let inputs = [data.as_slice()];
    let (mut sent, mut done, mut kicks) = (0, 0, 0_u64);
    let start = guest.now();
    let mut last = start;
    while done < count {
        let before = (sent, done);
        while sent < count && card.transmit.available_desc() > 0 {
            // SAFETY: the one packet is sent again and again and never written to; it lives until the device is reset.
            unsafe { card.transmit.add(&inputs, &mut []) }?;
            sent += 1;
        }
        if sent > before.0 && card.transmit.should_notify() {
            card.port.notify(TRANSMIT);
            kicks += 1;
        }
        while let Some(token) = card.transmit.peek_used() {
            // SAFETY: the buffer that was added.
            unsafe { card.transmit.pop_used(token, &inputs, &mut []) }?;
            done += 1;
        }
        if done > before.1 {
            last = guest.now();
        }
        ensure!(guest.now() < last + 10_000_000_000, "stuck after {done} of {count}");
    }
    let micros = ((last - start) / 1000).max(1);
    Ok(rate(done, bytes, micros, kicks))
}

fn rate(packets: usize, bytes: usize, micros: u64, kicks: u64) -> alloc::string::String {
    format!(
        "packets={packets} bytes={bytes} us={micros} pps={} mbit_s={} kicks={kicks}",
        packets as u64 * 1_000_000 / micros,
        (packets * bytes * 8) as u64 / micros
    )
}

/// `net-rx:OWN[:BYTES[:COUNT]]`: counts UDP datagrams to the discard port until so many came or none for a second.
pub(crate) fn receive(guest: &mut Guest, arguments: Arguments<'_>) -> Outcome {
    let (bytes, count): (usize, usize) = (arguments.number(1, 1400)?, arguments.number(2, 100_000)?);
    let mut card = RawCard::open(guest, arguments.device)?;
    let mut buffers: Vec<Vec<u8>> = vec![vec![0; (bytes + HEADERS).max(2048)]; ENTRIES];
    // Each descriptor keeps its buffer: the free list hands out the one that was given back last.
    for buffer in &mut buffers {
        // SAFETY: the buffers live until the device is reset.
        unsafe { card.receive.add(&[], &mut [buffer]) }?;
    }
    card.port.notify(RECEIVE);
    guest.say("waiting net-rx");
    let (mut got, mut kicks) = (0, 0);
    let (mut first, mut last) = (0, guest.now() + 60_000_000_000);
    while got < count {
        let before = got;
        let mut refilled = false;
        while let Some(token) = card.receive.peek_used() {
            let buffer = buffers
                .get_mut(usize::from(token))
                .ok_or_else(|| Failure(format!("no buffer {token}")))?;
            // SAFETY: the buffer of this descriptor.
            let length = unsafe { card.receive.pop_used(token, &[], &mut [buffer]) }?;
            if length as usize >= HEADER + bytes {
                got += 1;
            }
            // SAFETY: as above.
            unsafe { card.receive.add(&[], &mut [buffer]) }?;
            refilled = true;
        }
        if refilled && card.receive.should_notify() {
            card.port.notify(RECEIVE);
            kicks += 1;
        }
        let now = guest.now();
        if got > before {
            first = if before == 0 { now } else { first };
            last = now;
        } else if now > last + 1_000_000_000 {
            break;
        }
    }
    ensure!(got > 0, "nothing came");
    Ok(rate(got, bytes, ((last - first) / 1000).max(1), kicks))
}
